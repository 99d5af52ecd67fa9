// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What all messages of integration components have in common.

use crate::message::split_prefix;
use crate::pipe::PipeHeader;
use bitflags::bitflags;
use core::cmp::Ordering;
use core::fmt;
use zerocopy::little_endian::U16;
use zerocopy::IntoBytes as _;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a message without its body, in bytes.
pub const HEADER_SIZE: usize = 28;

open_enum! {
    /// What a message is about.
    pub struct MessageType: u16 {
        /// Versions are agreed on.
        NEGOTIATE = 0,
        /// Heartbeat.
        HEARTBEAT = 1,
        /// Data exchange.
        KVP = 2,
        /// Shutdown.
        SHUTDOWN = 3,
        /// Time synchronization.
        TIMESYNC = 4,
        /// Backup.
        VSS = 5,
        /// File copy.
        FILE_COPY = 7,
    }
}

open_enum! {
    /// What became of a request: a HRESULT.
    pub struct Status: u32 {
        /// Success (`S_OK`).
        OK = 0,
        /// Failure (`E_FAIL`).
        FAIL = 0x8000_4005,
    }
}

/// Flags of a message. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Flags(u8);

bitflags! {
    impl Flags: u8 {
        /// The transaction id counts.
        const TRANSACTION = 1;
        /// An answer is wanted.
        const REQUEST = 2;
        /// This is an answer.
        const RESPONSE = 4;
        const _ = !0;
    }
}

/// A version of the frame or of a service. Later ones compare greater.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Version {
    major: U16,
    minor: U16,
}

impl Version {
    /// Version `major.minor`.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self {
            major: U16::new(major),
            minor: U16::new(minor),
        }
    }

    /// The first part.
    pub const fn major(self) -> u16 {
        self.major.get()
    }

    /// The second part.
    pub const fn minor(self) -> u16 {
        self.minor.get()
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.major(), self.minor()).cmp(&(other.major(), other.minor()))
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What every message starts with: the frame of the pipe and the service's header.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// Frame of the pipe; guests send it back as it came.
    pub pipe: PipeHeader,
    /// Version of the frame.
    pub frame_version: Version,
    /// What the message is about.
    pub message_type: MessageType,
    /// Version of the service.
    pub message_version: Version,
    /// Size of the body, in bytes.
    pub body_size: U16,
    /// Answer: what became of the request.
    pub status: Status,
    /// Number of the request; the answer has the same.
    pub transaction_id: u8,
    /// [`Flags`].
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

const _: () = assert!(size_of::<Header>() == HEADER_SIZE);

impl Header {
    /// The header and the body of a message. `None` if it is too short.
    ///
    /// The body is what the packet has. The sizes in the header are not heeded: guests never did,
    /// and what they say cannot be more than what is there.
    pub fn split(payload: &[u8]) -> Option<(Self, &[u8])> {
        split_prefix(payload)
    }

    /// Flags of the message.
    pub fn flags(&self) -> Flags {
        Flags::from_bits_retain(self.flags)
    }
}

/// Room for what an answer changes: the header and this much of the body.
const CHANGED_BODY: usize = 16;

/// The answer of a guest: the request, with its first bytes changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    start: [u8; HEADER_SIZE + CHANGED_BODY],
    len: usize,
}

impl Reply {
    pub(super) fn new(request: &Header, status: Status) -> Self {
        let mut this = Self {
            start: [0; HEADER_SIZE + CHANGED_BODY],
            len: 0,
        };
        let header = Header {
            status,
            flags: (Flags::TRANSACTION | Flags::RESPONSE).bits(),
            ..*request
        };
        this.put(header.as_bytes());
        this
    }

    /// Changes the next bytes. Callers stay within [`CHANGED_BODY`].
    pub(super) fn put(&mut self, bytes: &[u8]) {
        let rest = self.start.get_mut(self.len..);
        if let Some(to) = rest.and_then(|rest| rest.get_mut(..bytes.len())) {
            to.copy_from_slice(bytes);
            self.len = self.len.saturating_add(bytes.len());
        }
    }

    /// Changes the header.
    pub(super) fn set_header(&mut self, change: impl FnOnce(&mut Header)) {
        if let Some((mut header, _)) = Header::split(&self.start) {
            change(&mut header);
            if let Some(to) = self.start.get_mut(..HEADER_SIZE) {
                to.copy_from_slice(header.as_bytes());
            }
        }
    }

    /// The answer to `request`, in two parts that follow each other.
    pub fn parts<'a>(&'a self, request: &'a [u8]) -> [&'a [u8]; 2] {
        let start = self.start.get(..self.len).unwrap_or_default();
        [start, request.get(self.len..).unwrap_or_default()]
    }
}
