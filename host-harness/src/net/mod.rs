// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a NIC of the machine is connected to: a TAP of the host, user-mode networking through
//! `passt`, or another part of this process.
//!
//! A [`Backend`] moves Ethernet frames, with what is still to be done on them (checksums,
//! segmentation) beside them, as `virtio_net_hdr` does. Nothing here knows of VMBus. Nothing polls:
//! a user waits on [`Backend::readiness`].

mod capture;
mod frame;
mod headers;
mod link;
mod options;
mod passt;
mod segment;
mod tap;
#[cfg(test)]
mod tests;
mod vnet;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

pub use capture::{Capture, CaptureInterface, Way};
pub use frame::{Checksum, Frame, Gso, MAX_FRAME};
pub use headers::{Headers, Transport};
pub use link::{Link, link_pair};
pub use options::{BackendOption, MAX_QUEUES, NetOptions, OptionError};
pub use passt::{Passt, PasstOptions};
pub use segment::for_each_wire_frame;
pub use tap::Tap;
pub use vnet::VnetSocket;

/// How long a send may wait for a backend that takes nothing. Then the frame is lost, as on a wire.
pub const SEND_LIMIT: Duration = Duration::from_millis(200);

/// Which frames with work left the receiver of a backend can take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiveOffloads {
    /// TCP over IPv4, to be segmented.
    pub tso4: bool,
    /// TCP over IPv6, to be segmented.
    pub tso6: bool,
}

/// What came of a look for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A frame.
    Frame,
    /// None now; wait for readiness.
    Nothing,
    /// None any more: the other end is gone.
    Closed,
}

/// What came of a frame that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Done,
    /// The backend did not take it in time, or at all.
    Lost,
}

/// A network that a NIC is connected to. Queues are used by different threads at the same time.
pub trait Backend: Send + Sync {
    /// What it is, for status and logs.
    fn describe(&self) -> String;

    /// Number of queues; at least 1.
    fn queues(&self) -> u16;

    /// Says which frames [`Backend::receive`] may give from now on. Some that were under way
    /// before may still come.
    ///
    /// # Errors
    /// The system refuses.
    fn set_receive_offloads(&self, offloads: ReceiveOffloads) -> io::Result<()>;

    /// Sends a frame. Waits at most [`SEND_LIMIT`].
    ///
    /// # Errors
    /// The other end is gone, or the system fails.
    fn send(&self, queue: u16, frame: &Frame) -> io::Result<Sent>;

    /// After [`Received::Nothing`] this becomes readable when it is worth another look. (Before,
    /// frames may have been read ahead.)
    fn readiness(&self, queue: u16) -> BorrowedFd<'_>;

    /// Takes the next frame into `frame`; never waits.
    ///
    /// # Errors
    /// The system fails.
    fn receive(&self, queue: u16, frame: &mut Frame) -> io::Result<Received>;
}

/// A backend or a capture cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The TAP.
    #[error("TAP {name}: {reason}")]
    Tap {
        /// Its name.
        name: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The program `passt`.
    #[error("passt: {0}")]
    Passt(String),
    /// The capture file.
    #[error("capture {}: {source}", path.display())]
    Capture {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
