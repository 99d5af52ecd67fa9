// SPDX-License-Identifier: MIT OR Apache-2.0

//! Sockets and files that the host makes where its user says.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

/// How often and how far apart a lock is tried. A child that another thread is about to start can
/// hold it for a moment longer than its owner.
const LOCK_TRIES: u32 = 25;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Makes a file that is written while the guest runs, by threads that must not wait, or empties one
/// that is there.
///
/// # Errors
/// The file cannot be made, is not a regular file (the reader of a pipe can hold its writer up), or
/// is written to by somebody else.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    // Before it is opened, because to open a pipe is to wait for its reader.
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(io::Error::other("not a regular file"));
    }
    let mut options = OpenOptions::new();
    // Not emptied before it is known that nobody else writes to it.
    let file = options
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    let mut tries = 0;
    while let Err(rustix::io::Errno::WOULDBLOCK) =
        flock(&file, FlockOperation::NonBlockingLockExclusive)
    {
        tries += 1;
        if tries == LOCK_TRIES {
            return Err(io::Error::other("it is in use"));
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    file.set_len(0)?;
    Ok(file)
}

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
    fn a_file_has_one_writer_and_is_regular() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "old").unwrap();
        let file = create(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        std::fs::write(&path, "new").unwrap();
        assert!(create(&path).unwrap_err().to_string().contains("in use"));
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        drop(file);
        create(&path).unwrap();
        let pipe = dir.path().join("pipe");
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(create(&pipe).unwrap_err().to_string().contains("regular"));
    }

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
