// SPDX-License-Identifier: MIT OR Apache-2.0

//! A cable inside this process: a backend, and its other end for a test or another NIC.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::frame::Frame;
use super::vnet::VnetSocket;
use super::{Backend, ReceiveOffloads, Received, Sent};

/// One end of a cable.
pub struct Link {
    name: String,
    queues: Vec<VnetSocket>,
}

/// The two ends of a cable: what is sent on a queue of one comes out of the same queue of the
/// other, with the work that is left on it.
///
/// # Errors
/// The system refuses the sockets.
pub fn link_pair(name: &str, queues: u16) -> io::Result<(Link, Link)> {
    let (mut near, mut far) = (Vec::new(), Vec::new());
    for _ in 0..queues.max(1) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        near.push(VnetSocket::new(a));
        far.push(VnetSocket::new(b));
    }
    let end = |queues| Link {
        name: name.to_owned(),
        queues,
    };
    Ok((end(near), end(far)))
}

impl Link {
    fn queue(&self, queue: u16) -> &VnetSocket {
        // There is at least one.
        &self.queues[usize::from(queue) % self.queues.len()]
    }
}

impl Backend for Link {
    fn describe(&self) -> String {
        format!("link {}", self.name)
    }

    fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    fn set_receive_offloads(&self, _: ReceiveOffloads) -> io::Result<()> {
        // Whoever sends on the other end decides.
        Ok(())
    }

    fn send(&self, queue: u16, frame: &Frame) -> io::Result<Sent> {
        self.queue(queue).send(frame)
    }

    fn readiness(&self, queue: u16) -> BorrowedFd<'_> {
        self.queue(queue).as_fd()
    }

    fn receive(&self, queue: u16, frame: &mut Frame) -> io::Result<Received> {
        self.queue(queue).receive(frame)
    }
}
