// SPDX-License-Identifier: MIT OR Apache-2.0

//! A TAP of the host. Frames cross with their offloads: `virtio_net_hdr`, `TUNSETOFFLOAD`, and one
//! descriptor for each queue. Source: Linux, `Documentation/networking/tuntap.rst` and
//! `include/uapi/linux/if_tun.h`.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, c_uint};
use rustix::io::Errno;

use super::frame::{Frame, VNET_HEADER};
use super::vnet::VnetSocket;
use super::{Backend, NetError, ReceiveOffloads, Received, Sent};

const TUN: &str = "/dev/net/tun";

/// An open TAP.
pub struct Tap {
    name: String,
    queues: Vec<VnetSocket>,
}

/// Why a queue of a TAP cannot be opened.
enum OpenError {
    /// The device of all TAPs cannot be opened.
    Device(io::Error),
    /// There is an interface of this name that is something else.
    Other,
    /// The kernel refuses.
    Refused(Errno),
}

impl OpenError {
    /// What is wrong, and what to do.
    fn reason(self, name: &str) -> String {
        match self {
            Self::Device(error) if error.kind() == io::ErrorKind::NotFound => {
                format!("{TUN} is not there; load the kernel module `tun`")
            }
            Self::Device(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                format!("{TUN} may not be opened; run as root")
            }
            Self::Device(error) => format!("{TUN}: {error}"),
            Self::Other => "it is not a TAP, or was made with other properties".into(),
            Self::Refused(Errno::PERM | Errno::ACCESS) => format!(
                "may not be opened; run as root, or make it for yourself with `ip tuntap add dev \
                 {name} mode tap user $USER`"
            ),
            Self::Refused(Errno::BUSY) => "another program uses it".into(),
            Self::Refused(error) => error.to_string(),
        }
    }
}

/// Asks the kernel for something about a descriptor of the TAP driver.
fn ioctl<T>(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: *mut T) -> Result<(), Errno> {
    // SAFETY:
    // - `fd` is open while it is borrowed.
    // - The callers pass a pointer to a live value of the type that `request` reads or writes, or,
    //   for TUNSETOFFLOAD, a number that is not used as a pointer.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(())
}

impl Tap {
    /// Opens the TAP `name`, with so many queues; makes it if there is none and we may. Without a
    /// number it has `default_queues`, or one if it exists and was made for one.
    ///
    /// # Errors
    /// Says what is wrong and what to do.
    pub fn open(name: &str, queues: Option<u16>, default_queues: u16) -> Result<Self, NetError> {
        let fail = |reason: String| NetError::Tap {
            name: name.to_owned(),
            reason,
        };
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '%', ' ']) {
            return Err(fail("not a name of an interface".into()));
        }
        let mut count = queues.unwrap_or(default_queues).max(1);
        let mut multi_queue = count > 1;
        let mut first = Self::open_queue(name, multi_queue);
        if matches!(first, Err(OpenError::Other)) {
            // There is one that was made the other way. (sysfs would say so, but may be that of
            // another network namespace.)
            first = Self::open_queue(name, !multi_queue);
            if first.is_ok() {
                multi_queue = !multi_queue;
            }
        }
        let first = first.map_err(|error| fail(error.reason(name)))?;
        if count > 1 && !multi_queue {
            if queues.is_some() {
                return Err(fail(format!(
                    "it has one queue; make it with `ip tuntap add dev {name} mode tap \
                     multi_queue`, or use queues=1"
                )));
            }
            count = 1;
        }
        let mut tap = Self {
            name: name.to_owned(),
            queues: vec![first],
        };
        for _ in 1..count {
            let queue = Self::open_queue(name, true).map_err(|error| fail(error.reason(name)))?;
            tap.queues.push(queue);
        }
        tap.set_receive_offloads(ReceiveOffloads::default())
            .map_err(|error| fail(format!("offloads: {error}")))?;
        Ok(tap)
    }

    fn open_queue(name: &str, multi_queue: bool) -> Result<VnetSocket, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN)
            .map_err(OpenError::Device)?;
        let mut flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if multi_queue {
            flags |= IFF_MULTI_QUEUE;
        }
        // SAFETY: `ifreq` is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        ioctl(file.as_fd(), libc::TUNSETIFF, &raw mut request).map_err(|error| match error {
            Errno::INVAL => OpenError::Other,
            error => OpenError::Refused(error),
        })?;
        let mut size = VNET_HEADER as libc::c_int;
        ioctl(file.as_fd(), libc::TUNSETVNETHDRSZ, &raw mut size).map_err(OpenError::Refused)?;
        Ok(VnetSocket::new(file.into()))
    }

    fn queue(&self, queue: u16) -> &VnetSocket {
        // There is at least one.
        &self.queues[usize::from(queue) % self.queues.len()]
    }
}

impl Backend for Tap {
    fn describe(&self) -> String {
        format!("tap {}", self.name)
    }

    fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    fn set_receive_offloads(&self, offloads: ReceiveOffloads) -> io::Result<()> {
        let mut flags: c_uint = libc::TUN_F_CSUM;
        if offloads.tso4 {
            flags |= libc::TUN_F_TSO4 | libc::TUN_F_TSO_ECN;
        }
        if offloads.tso6 {
            flags |= libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        }
        // The kernel keeps them for the whole TAP.
        let argument = std::ptr::without_provenance_mut::<libc::c_void>(flags as usize);
        Ok(ioctl(self.queue(0).as_fd(), libc::TUNSETOFFLOAD, argument)?)
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
