// SPDX-License-Identifier: MIT OR Apache-2.0

//! Captures of what crosses NICs, as pcapng files with times in nanoseconds, for Wireshark and its
//! kin. Format: draft-ietf-opsawg-pcapng.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::{DataLink, PcapError};

use super::NetError;
use super::frame::MAX_FRAME;
use crate::files;

/// Resolution of the times: a negative power of ten.
const NANOSECONDS: u8 = 9;

/// Which way a frame goes, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the guest.
    In,
    /// From the guest.
    Out,
}

struct State {
    /// `None` after a failure.
    writer: Option<PcapNgWriter<BufWriter<File>>>,
    interfaces: u32,
}

/// A capture file. It has an interface for each NIC.
pub struct Capture {
    path: PathBuf,
    state: Mutex<State>,
}

impl Capture {
    /// Makes the file.
    ///
    /// # Errors
    /// It cannot be made, is not a regular file, or another capture is written to it.
    pub fn create(path: &Path) -> Result<Arc<Self>, NetError> {
        let fail = |source| NetError::Capture {
            path: path.to_owned(),
            source,
        };
        let file = files::create(path).map_err(fail)?;
        let capture = Self {
            path: path.to_owned(),
            state: Mutex::new(State {
                writer: None,
                interfaces: 0,
            }),
        };
        match PcapNgWriter::new(BufWriter::new(file)) {
            Ok(writer) => capture.lock().writer = Some(writer),
            Err(error) => return Err(fail(std::io::Error::other(error.to_string()))),
        }
        Ok(Arc::new(capture))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes, and flushes, so that the file can be read at any time. The first failure ends the
    /// capture, not the network.
    fn write(
        &self,
        state: &mut State,
        block: impl FnOnce(&mut PcapNgWriter<BufWriter<File>>) -> Result<usize, PcapError>,
    ) {
        let Some(writer) = &mut state.writer else {
            return;
        };
        let flushed =
            block(writer).and_then(|_| writer.get_mut().flush().map_err(PcapError::IoError));
        if let Err(error) = flushed {
            tracing::warn!("capture {} ends here: {error}", self.path.display());
            state.writer = None;
        }
    }

    /// Adds a NIC.
    pub fn interface(self: &Arc<Self>, name: &str, mac: [u8; 6]) -> CaptureInterface {
        let mut state = self.lock();
        let id = state.interfaces;
        state.interfaces += 1;
        let block = InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: MAX_FRAME as u32,
            options: vec![
                InterfaceDescriptionOption::IfName(Cow::Borrowed(name)),
                InterfaceDescriptionOption::IfMacAddr(Cow::Borrowed(&mac)),
                InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
            ],
        };
        self.write(&mut state, |writer| writer.write_pcapng_block(block));
        drop(state);
        CaptureInterface {
            capture: Arc::clone(self),
            id,
        }
    }
}

/// A NIC in a capture.
pub struct CaptureInterface {
    capture: Arc<Capture>,
    id: u32,
}

impl CaptureInterface {
    /// Writes a frame, as it is now: a checksum that is left to others is not in it yet.
    pub fn frame(&self, way: Way, bytes: &[u8]) {
        let mut state = self.capture.lock();
        // With the lock held, so that times do not go back in the file.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let direction = match way {
            Way::In => 1,
            Way::Out => 2,
        };
        let block = EnhancedPacketBlock {
            interface_id: self.id,
            timestamp: now.unwrap_or(Duration::ZERO),
            original_len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            data: Cow::Borrowed(bytes),
            options: vec![EnhancedPacketOption::Flags(direction)],
        };
        self.capture
            .write(&mut state, |writer| writer.write_pcapng_block(block));
    }
}
