// SPDX-License-Identifier: GPL-2.0 OR MIT

//! RNDIS, the protocol of the network adapter itself: its messages.
//!
//! A message is a [`Header`] with type and length, and a body. The guest asks (initialize, query, set,
//! reset, keepalive, halt); the host answers each request but halt with a completion that repeats the
//! request's id, and tells by itself what changes ([`IndicateStatus`]). Both send frames ([`super::frame`]).
//! In RNDIS's own words the guest is the "host" and the host is the "device".
//!
//! Offsets in a message count from the start of its body. Everything here works on a private copy of a
//! message.
//!
//! ```
//! use hv_proto::net::oid::Oid;
//! use hv_proto::net::rndis::{GuestMessage, RequestBuf};
//!
//! let sent = RequestBuf::<64>::query(7, Oid::GEN_LINK_SPEED, &[]).unwrap();
//! match GuestMessage::parse(sent.as_bytes()) {
//!     Ok(GuestMessage::Query(query, info)) => {
//!         assert_eq!((query.request_id.get(), query.oid), (7, Oid::GEN_LINK_SPEED));
//!         assert!(info.is_empty());
//!     }
//!     other => panic!("{other:?}"),
//! }
//! ```
//!
//! Uses `zerocopy`.
//!
//! Source: `include/linux/rndis.h` and `hyperv_net.h` of the kernel, [MS-RNDIS] 2.2.

pub use super::rndis_body::*;

use super::oid::Oid;
use super::Span;
use crate::message::{read_prefix, split_prefix};
use core::fmt;
use zerocopy::little_endian::U32;
use zerocopy::IntoBytes as _;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of [`Header`].
pub const HEADER_SIZE: usize = size_of::<Header>();

/// Version of RNDIS.
pub const MAJOR_VERSION: u32 = 1;
/// Version of RNDIS.
pub const MINOR_VERSION: u32 = 0;

/// The largest alignment of messages in a row that a guest accepts, as a power of two: one page.
pub const MAX_ALIGNMENT_FACTOR: u32 = 12;

open_enum! {
    /// Which message it is.
    pub struct MessageType: u32 {
        /// A frame.
        PACKET = 0x0000_0001,
        /// Request: begin.
        INITIALIZE = 0x0000_0002,
        /// Request without an answer: end.
        HALT = 0x0000_0003,
        /// Request: tell the value of an object.
        QUERY = 0x0000_0004,
        /// Request: change the value of an object.
        SET = 0x0000_0005,
        /// Request: drop what is outstanding.
        RESET = 0x0000_0006,
        /// Host: something has changed.
        INDICATE_STATUS = 0x0000_0007,
        /// Request of either side: are you there?
        KEEPALIVE = 0x0000_0008,
        /// Answer to INITIALIZE.
        INITIALIZE_COMPLETE = 0x8000_0002,
        /// Answer to QUERY.
        QUERY_COMPLETE = 0x8000_0004,
        /// Answer to SET.
        SET_COMPLETE = 0x8000_0005,
        /// Answer to RESET.
        RESET_COMPLETE = 0x8000_0006,
        /// Answer to KEEPALIVE.
        KEEPALIVE_COMPLETE = 0x8000_0008,
    }
}

open_enum! {
    /// Result of a request, or what has changed.
    pub struct Status: u32 {
        /// Done.
        SUCCESS = 0,
        /// The link is up.
        MEDIA_CONNECT = 0x4001_000b,
        /// The link is down.
        MEDIA_DISCONNECT = 0x4001_000c,
        /// The speed of the link is another; the status buffer has it, in units of 100 bit/s.
        LINK_SPEED_CHANGE = 0x4001_0013,
        /// The offloads in effect are others.
        TASK_OFFLOAD_CURRENT_CONFIG = 0x4002_0006,
        /// The adapter is in another network: whoever has an address there must ask again.
        NETWORK_CHANGE = 0x4001_0018,
        /// An answer did not fit its buffer.
        BUFFER_OVERFLOW = 0x8000_0005,
        /// Not done, for no reason that has its own number.
        FAILURE = 0xc000_0001,
        /// Not enough memory.
        RESOURCES = 0xc000_009a,
        /// The host does not know the object.
        NOT_SUPPORTED = 0xc000_00bb,
        /// The adapter is not in a state for this.
        ADAPTER_NOT_READY = 0xc001_0011,
        /// The version is not supported.
        BAD_VERSION = 0xc001_0004,
        /// The value is too short or too long.
        INVALID_LENGTH = 0xc001_0014,
        /// The value makes no sense.
        INVALID_DATA = 0xc001_0015,
        /// There is no room for the value.
        BUFFER_TOO_SHORT = 0xc001_0016,
        /// There is no such object.
        INVALID_OID = 0xc001_0017,
    }
}

open_enum! {
    /// Kind of network.
    pub struct Medium: u32 {
        /// Ethernet.
        ETHERNET = 0,
    }
}

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RndisError {
    /// Shorter than a header.
    NoHeader {
        /// Bytes that there are.
        len: usize,
    },
    /// The message says that it is shorter than a header, or longer than what is there.
    Length {
        /// What it says, in bytes.
        len: u32,
        /// What there is, in bytes.
        available: usize,
    },
    /// Shorter than a message of its type must be.
    Truncated {
        /// Which message.
        message_type: MessageType,
        /// Its length in bytes.
        len: usize,
        /// What it must have, in bytes.
        need: usize,
    },
    /// The value of a query, set or indication lies outside of its message.
    Info {
        /// Where it starts, in bytes from the start of the body.
        offset: u32,
        /// Its length in bytes.
        len: u32,
    },
    /// The frame lies outside of its message, or over the header.
    Data {
        /// Where it starts, in bytes from the start of the body.
        offset: u32,
        /// Its length in bytes.
        len: u32,
    },
    /// The per-packet information lies outside of its message, or over the header.
    PacketInfo {
        /// Where it starts, in bytes from the start of the body.
        offset: u32,
        /// Its length in bytes.
        len: u32,
    },
    /// It is not a message with a frame.
    NotAPacket(MessageType),
}

impl fmt::Display for RndisError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoHeader { len } => write!(f, "RNDIS message of {len} bytes has no header"),
            Self::Length { len, available } => {
                write!(
                    f,
                    "RNDIS message length {len} does not fit {available} bytes"
                )
            }
            Self::Truncated {
                message_type,
                len,
                need,
            } => write!(f, "{message_type:?} of {len} bytes, must be {need}"),
            Self::Info { offset, len } => {
                write!(
                    f,
                    "{len} bytes of value at {offset} are outside of the message"
                )
            }
            Self::Data { offset, len } => {
                write!(
                    f,
                    "{len} bytes of frame at {offset} are outside of the message"
                )
            }
            Self::PacketInfo { offset, len } => write!(
                f,
                "{len} bytes of packet information at {offset} are outside of the message"
            ),
            Self::NotAPacket(message_type) => write!(f, "{message_type:?} instead of a frame"),
        }
    }
}

impl core::error::Error for RndisError {}

/// What every message starts with.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// Which message.
    pub message_type: MessageType,
    /// Bytes of the message, with this header.
    pub message_length: U32,
}

impl Header {
    /// Copies the header out of the start of `bytes`, and checks the length that it names against the
    /// `available` bytes that there are.
    ///
    /// # Errors
    /// [`RndisError::NoHeader`] or [`RndisError::Length`].
    pub fn read(bytes: &[u8], available: usize) -> Result<Self, RndisError> {
        let no_header = RndisError::NoHeader { len: bytes.len() };
        let header: Self = read_prefix(bytes).ok_or(no_header)?;
        let len = header.message_length.get();
        match usize::try_from(len) {
            Ok(size) if size >= HEADER_SIZE && size <= available => Ok(header),
            _ => Err(RndisError::Length { len, available }),
        }
    }
}

/// A message whose length is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Which message.
    pub message_type: MessageType,
    /// What follows the header, as far as the message goes.
    pub body: &'a [u8],
    /// What follows the message.
    pub rest: &'a [u8],
}

impl<'a> Message<'a> {
    /// Finds the first message in `bytes`. Its length is at least that of a header, so whoever goes
    /// on with [`Message::rest`] comes to an end.
    ///
    /// # Errors
    /// [`RndisError::NoHeader`] or [`RndisError::Length`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, RndisError> {
        let header = Header::read(bytes, bytes.len())?;
        let len = header.message_length.get();
        let available = bytes.len();
        let bad = RndisError::Length { len, available };
        let end = usize::try_from(len).map_err(|_| bad)?;
        let body = bytes.get(HEADER_SIZE..end).ok_or(bad)?;
        Ok(Self {
            message_type: header.message_type,
            body,
            rest: bytes.get(end..).unwrap_or_default(),
        })
    }

    /// Copies the body out of the message.
    fn read<B: zerocopy::FromBytes>(&self) -> Result<B, RndisError> {
        read_prefix(self.body).ok_or(RndisError::Truncated {
            message_type: self.message_type,
            len: self.body.len().saturating_add(HEADER_SIZE),
            need: size_of::<B>().saturating_add(HEADER_SIZE),
        })
    }
}

/// The value at `offset` from the start of `body`, behind a fixed part of type `B`. No bytes are no
/// bytes wherever they are.
fn info<B>(body: &[u8], offset: U32, len: U32) -> Result<&[u8], RndisError> {
    let (offset, len) = (offset.get(), len.get());
    if len == 0 {
        return Ok(&[]);
    }
    Span { offset, len }
        .of(body)
        .filter(|_| usize::try_from(offset).is_ok_and(|offset| offset >= size_of::<B>()))
        .ok_or(RndisError::Info { offset, len })
}

/// What a guest sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestMessage<'a> {
    /// [`MessageType::INITIALIZE`].
    Initialize(Initialize),
    /// [`MessageType::HALT`].
    Halt(Halt),
    /// [`MessageType::QUERY`], and what was sent with it.
    Query(ObjectRequest, &'a [u8]),
    /// [`MessageType::SET`], and the value.
    Set(ObjectRequest, &'a [u8]),
    /// [`MessageType::RESET`].
    Reset(Reset),
    /// [`MessageType::KEEPALIVE`].
    Keepalive(Keepalive),
    /// [`MessageType::KEEPALIVE_COMPLETE`].
    KeepaliveComplete(KeepaliveComplete),
    /// [`MessageType::PACKET`]; [`super::frame`] looks into it.
    Packet,
    /// A message of another type.
    Other(MessageType),
}

impl<'a> GuestMessage<'a> {
    /// Parses the first message in `bytes`, a private copy.
    ///
    /// # Errors
    /// [`RndisError`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, RndisError> {
        let message = Message::parse(bytes)?;
        let object = || {
            let request: ObjectRequest = message.read()?;
            info::<ObjectRequest>(message.body, request.info_offset, request.info_length)
                .map(|info| (request, info))
        };
        Ok(match message.message_type {
            MessageType::INITIALIZE => Self::Initialize(message.read()?),
            MessageType::HALT => Self::Halt(message.read()?),
            MessageType::QUERY => {
                let (request, info) = object()?;
                Self::Query(request, info)
            }
            MessageType::SET => {
                let (request, info) = object()?;
                Self::Set(request, info)
            }
            MessageType::RESET => Self::Reset(message.read()?),
            MessageType::KEEPALIVE => Self::Keepalive(message.read()?),
            MessageType::KEEPALIVE_COMPLETE => Self::KeepaliveComplete(message.read()?),
            MessageType::PACKET => Self::Packet,
            other => Self::Other(other),
        })
    }
}

/// What a host sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostMessage<'a> {
    /// [`MessageType::INITIALIZE_COMPLETE`].
    InitializeComplete(InitializeComplete),
    /// [`MessageType::QUERY_COMPLETE`], and the value.
    QueryComplete(QueryComplete, &'a [u8]),
    /// [`MessageType::SET_COMPLETE`].
    SetComplete(SetComplete),
    /// [`MessageType::RESET_COMPLETE`].
    ResetComplete(ResetComplete),
    /// [`MessageType::KEEPALIVE_COMPLETE`].
    KeepaliveComplete(KeepaliveComplete),
    /// [`MessageType::KEEPALIVE`].
    Keepalive(Keepalive),
    /// [`MessageType::INDICATE_STATUS`], and the status buffer.
    IndicateStatus(Status, &'a [u8]),
    /// [`MessageType::PACKET`]; [`super::frame`] looks into it.
    Packet,
    /// A message of another type.
    Other(MessageType),
}

impl<'a> HostMessage<'a> {
    /// Parses the first message in `bytes`, a private copy of a whole transfer range.
    ///
    /// # Errors
    /// [`RndisError`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, RndisError> {
        let message = Message::parse(bytes)?;
        Ok(match message.message_type {
            MessageType::INITIALIZE_COMPLETE => Self::InitializeComplete(message.read()?),
            MessageType::QUERY_COMPLETE => {
                let complete: QueryComplete = message.read()?;
                let (offset, len) = (complete.info_offset, complete.info_length);
                let value = info::<QueryComplete>(message.body, offset, len)?;
                Self::QueryComplete(complete, value)
            }
            MessageType::SET_COMPLETE => Self::SetComplete(message.read()?),
            MessageType::RESET_COMPLETE => Self::ResetComplete(message.read()?),
            MessageType::KEEPALIVE_COMPLETE => Self::KeepaliveComplete(message.read()?),
            MessageType::KEEPALIVE => Self::Keepalive(message.read()?),
            MessageType::INDICATE_STATUS => {
                let indication: IndicateStatus = message.read()?;
                // Some hosts leave the buffer out of the message's length, so it is looked for in
                // the whole range.
                let (offset, len) = (indication.buffer_offset, indication.buffer_length);
                let range = bytes.get(HEADER_SIZE..).unwrap_or_default();
                let buffer = info::<IndicateStatus>(range, offset, len)?;
                Self::IndicateStatus(indication.status, buffer)
            }
            MessageType::PACKET => Self::Packet,
            other => Self::Other(other),
        })
    }
}

/// A message that is not a frame, in `N` bytes.
#[derive(Clone, Copy, Debug)]
pub struct RequestBuf<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> RequestBuf<N> {
    /// A message with this body, and a value behind it. `None` if there is no room.
    pub fn new<B>(message_type: MessageType, body: &B, value: &[u8]) -> Option<Self>
    where
        B: zerocopy::IntoBytes + zerocopy::Immutable,
    {
        let mut bytes = [0; N];
        let len = encode(&mut bytes, message_type, body, value)?;
        Some(Self { bytes, len })
    }

    /// Asks for the value of `oid`; some objects need a value of the same shape to say which version
    /// of it is asked for.
    pub fn query(request_id: u32, oid: Oid, value: &[u8]) -> Option<Self> {
        let body = ObjectRequest::new(request_id, oid, value)?;
        Self::new(MessageType::QUERY, &body, value)
    }

    /// Changes the value of `oid`.
    pub fn set(request_id: u32, oid: Oid, value: &[u8]) -> Option<Self> {
        let body = ObjectRequest::new(request_id, oid, value)?;
        Self::new(MessageType::SET, &body, value)
    }

    /// The message.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// Writes a message with this body, and a value behind it, to the start of `out`. Returns its length;
/// `None` if there is no room.
pub fn encode<B>(out: &mut [u8], message_type: MessageType, body: &B, value: &[u8]) -> Option<usize>
where
    B: zerocopy::IntoBytes + zerocopy::Immutable,
{
    let body = body.as_bytes();
    let value_at = HEADER_SIZE.checked_add(body.len())?;
    let len = value_at.checked_add(value.len())?;
    let header = Header {
        message_type,
        message_length: u32::try_from(len).ok()?.into(),
    };
    let out = out.get_mut(..len)?;
    out.get_mut(..HEADER_SIZE)?
        .copy_from_slice(header.as_bytes());
    out.get_mut(HEADER_SIZE..value_at)?.copy_from_slice(body);
    out.get_mut(value_at..)?.copy_from_slice(value);
    Some(len)
}

/// Copies a `T` out of the start of a value. What follows it is left alone.
///
/// `None` if the value is too short.
pub fn value<T: zerocopy::FromBytes>(value: &[u8]) -> Option<T> {
    split_prefix(value).map(|(value, _)| value)
}
