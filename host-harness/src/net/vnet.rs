// SPDX-License-Identifier: MIT OR Apache-2.0

//! A descriptor that carries frames as packets, each behind a `virtio_net_hdr`: a queue of a TAP, or
//! a socket that keeps the bounds of packets.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use zerocopy::{FromZeros, IntoBytes};

use super::frame::{Frame, MAX_FRAME, VNET_HEADER, VnetHeader};
use super::{Received, SEND_LIMIT, Sent};

fn wait(fd: BorrowedFd<'_>, events: PollFlags, limit: Duration) -> io::Result<bool> {
    let limit = Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    let mut fds = [PollFd::from_borrowed_fd(fd, events)];
    match poll(&mut fds, Some(&limit)) {
        Ok(count) => Ok(count > 0),
        Err(Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Waits until a descriptor takes data, at most [`SEND_LIMIT`].
pub(super) fn wait_writable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    wait(fd, PollFlags::OUT, SEND_LIMIT)
}

/// Waits until a descriptor has data or its other end is gone.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    wait(fd, PollFlags::IN, limit)
}

/// The descriptor; it does not block.
pub struct VnetSocket(OwnedFd);

impl VnetSocket {
    /// Takes a descriptor that does not block.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends a frame. Waits at most [`SEND_LIMIT`].
    ///
    /// # Errors
    /// The system's.
    pub fn send(&self, frame: &Frame) -> io::Result<Sent> {
        let header = VnetHeader::of(frame);
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(&frame.bytes)];
        let mut waited = false;
        loop {
            match rustix::io::writev(&self.0, &parts) {
                Ok(_) => return Ok(Sent::Done),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if !waited => {
                    waited = true;
                    if !wait_writable(self.0.as_fd())? {
                        return Ok(Sent::Lost);
                    }
                }
                // A TAP says INVAL to a frame that it does not understand, and IO when it is down;
                // a socket says MSGSIZE to one that is too long.
                Err(Errno::AGAIN | Errno::INVAL | Errno::IO | Errno::MSGSIZE | Errno::NOBUFS) => {
                    return Ok(Sent::Lost);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes the next frame; never waits.
    ///
    /// # Errors
    /// The system's.
    pub fn receive(&self, frame: &mut Frame) -> io::Result<Received> {
        loop {
            let mut header = VnetHeader::new_zeroed();
            frame.bytes.resize(MAX_FRAME, 0);
            let mut parts = [
                IoSliceMut::new(header.as_mut_bytes()),
                IoSliceMut::new(&mut frame.bytes),
            ];
            let length = match rustix::io::readv(&self.0, &mut parts) {
                Ok(0) | Err(Errno::CONNRESET) => return Ok(Received::Closed),
                Ok(length) => length,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(error) => return Err(error.into()),
            };
            let Some(length) = length.checked_sub(VNET_HEADER) else {
                continue;
            };
            frame.bytes.truncate(length);
            let Some((checksum, gso)) = header.meaning() else {
                continue;
            };
            frame.checksum = checksum;
            frame.gso = gso;
            return Ok(Received::Frame);
        }
    }
}

impl AsFd for VnetSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
