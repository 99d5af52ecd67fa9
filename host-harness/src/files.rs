// SPDX-License-Identifier: MIT OR Apache-2.0

//! Sockets and files that the host makes where its user says.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Listens on a Unix socket.
///
/// # Errors
/// The socket cannot be made, for instance because somebody listens there already, or there is a
/// file of this name.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    // A socket that an ended process left behind is in the way; anything else is the user's, also
    // one that cannot be connected to for another reason.
    if let Ok(metadata) = std::fs::symlink_metadata(path)
        && metadata.file_type().is_socket()
        && let Err(error) = UnixStream::connect(path)
        && error.kind() == io::ErrorKind::ConnectionRefused
    {
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn only_a_socket_that_was_left_behind_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(listen(&path).unwrap());
        let listening = listen(&path).unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listening);
        // Of another kind: to connect fails, but somebody has it.
        let other = dir.path().join("other");
        let _other = UnixDatagram::bind(&other).unwrap();
        assert!(listen(&other).is_err());
        assert!(other.exists());
    }
}
