// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The control messages of VMBus: one table of them, and everything that follows from it.
//!
//! A message is a header of 8 bytes with its type, and a body. It travels as the payload of a
//! SynIC message (host to guest) or of HvPostMessage (guest to host), so it has at most 240 bytes.
//! Senders may pad it; what comes after the fields is not looked at.
//!
//! The table at the end of this file names each message once: number, body, size, and the version
//! of the protocol that it needs. It yields [`MessageType`], the size checks, [`Message`] for each
//! body, and the parsers [`HostMessage`] (what a host sends) and [`GuestMessage`] (what a guest
//! sends).
//!
//! Source: `linux/hyperv.h`, `enum vmbus_channel_message_type` and the structs after it.
//!
//! ```
//! use hv_proto::ids::ChannelId;
//! use hv_proto::message::{CloseChannel, GuestMessage, Message};
//! use hv_proto::version::Version;
//!
//! let sent = CloseChannel { channel_id: ChannelId::new(5) }.encode();
//! assert_eq!(sent.as_bytes(), [7, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0]);
//!
//! match GuestMessage::parse(sent.as_bytes(), Some(Version::V5_3)) {
//!     Ok(GuestMessage::CloseChannel(close)) => assert_eq!(close.channel_id.get(), 5),
//!     other => panic!("{other:?}"),
//! }
//! ```

use crate::guid::Guid;
use crate::ids::{ChannelId, ConnectionId, GpadlId, OpenId, VpIndex};
use crate::monitor::MonitorId;
use crate::synic::MESSAGE_PAYLOAD_SIZE;
use crate::version::Version;
use bitflags::bitflags;
use core::fmt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes as _, FromZeros, IntoBytes as _};
// The traits of the same names are written with their path: zerocopy exports the derives beside
// them when another crate turns its feature "derive" on, and would clash with these.
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most bytes of a message, header and all.
pub const MAX_MESSAGE_SIZE: usize = MESSAGE_PAYLOAD_SIZE;
/// Bytes of the header before each body.
pub const HEADER_SIZE: usize = size_of::<MessageHeader>();
/// Bytes that a device may add to its offer, and a driver to its request to open
/// (`MAX_USER_DEFINED_BYTES`).
pub const USER_DATA_SIZE: usize = 120;
/// Most frame numbers in one GPADL_HEADER.
pub const GPADL_HEADER_PFNS: usize = (MAX_MESSAGE_SIZE - HEADER_SIZE - 12 - 8) / 8;
/// Most frame numbers in one GPADL_BODY.
pub const GPADL_BODY_PFNS: usize = (MAX_MESSAGE_SIZE - HEADER_SIZE - 8) / 8;

const _: () = assert!(GPADL_HEADER_PFNS == 26 && GPADL_BODY_PFNS == 28);

/// `status` of an answer: done.
pub const STATUS_SUCCESS: u32 = 0;
/// `status` of an answer: not done, for no reason that has its own number
/// (`STATUS_UNSUCCESSFUL` of NTSTATUS).
pub const STATUS_UNSUCCESSFUL: u32 = 0xc000_0001;

/// Copies a `T` out of the start of `bytes`. What follows it is left alone.
///
/// `None` if there are too few bytes.
#[inline]
pub fn read_prefix<T: zerocopy::FromBytes>(bytes: &[u8]) -> Option<T> {
    T::read_from_prefix(bytes).ok().map(|(value, _)| value)
}

/// Copies a `T` out of the start of `bytes`, and returns it with what follows.
///
/// `None` if there are too few bytes.
#[inline]
pub fn split_prefix<T: zerocopy::FromBytes>(bytes: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(bytes).ok()
}

/// What every message starts with, 8 bytes (`struct vmbus_channel_message_header`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MessageHeader {
    /// Which message.
    pub message_type: MessageType,
    /// Zero.
    pub padding: U32,
}

/// Who sends a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The host, to the guest.
    HostToGuest,
    /// The guest, to the host.
    GuestToHost,
}

/// Which versions of the protocol have a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// The message also goes over a bus on which no version is agreed.
    Always,
    /// This version and all later ones.
    Version(Version),
}

impl Since {
    /// Whether the message may be sent when this version (or none) is agreed.
    #[inline]
    pub fn allows(self, agreed: Option<Version>) -> bool {
        match (self, agreed) {
            (Self::Always, _) => true,
            (Self::Version(since), Some(agreed)) => agreed >= since,
            (Self::Version(_), None) => false,
        }
    }
}

/// The body of a message.
pub trait Message:
    zerocopy::FromBytes
    + zerocopy::IntoBytes
    + zerocopy::Immutable
    + zerocopy::KnownLayout
    + zerocopy::Unaligned
    + Copy
    + fmt::Debug
{
    /// Its number.
    const TYPE: MessageType;
    /// Who sends it.
    const DIRECTION: Direction;
    /// Which versions have it.
    const SINCE: Since;
    /// Its size in bytes with the header, without a tail.
    const SIZE: usize;

    /// The message as bytes, with its header.
    fn encode(&self) -> MessageBuf {
        let mut buf = MessageBuf::new(Self::TYPE);
        // Each body's size is checked at compile time, by the table.
        let fits = buf.append(self.as_bytes());
        debug_assert!(fits);
        buf
    }
}

/// A message as bytes, ready to be posted: at most 240.
#[derive(Clone, Copy)]
pub struct MessageBuf {
    len: u8,
    bytes: [u8; MAX_MESSAGE_SIZE],
}

impl MessageBuf {
    /// A message of this type with an empty body.
    pub fn new(message_type: MessageType) -> Self {
        let mut buf = Self {
            len: 0,
            bytes: [0; MAX_MESSAGE_SIZE],
        };
        let header = MessageHeader {
            message_type,
            padding: U32::ZERO,
        };
        let fits = buf.append(header.as_bytes());
        debug_assert!(fits);
        buf
    }

    /// Adds bytes to the end. `false`, with nothing added, if there is no room for them.
    #[must_use]
    pub fn append(&mut self, more: &[u8]) -> bool {
        let start = usize::from(self.len);
        let Some(end) = start.checked_add(more.len()) else {
            return false;
        };
        let (Some(place), Ok(len)) = (self.bytes.get_mut(start..end), u8::try_from(end)) else {
            return false;
        };
        place.copy_from_slice(more);
        self.len = len;
        true
    }

    /// The bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }

    /// Which message it is.
    pub fn message_type(&self) -> MessageType {
        read_prefix::<MessageHeader>(&self.bytes).map_or(MessageType::INVALID, |h| h.message_type)
    }
}

impl core::ops::Deref for MessageBuf {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl PartialEq for MessageBuf {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for MessageBuf {}

impl fmt::Debug for MessageBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "MessageBuf({:?}, {} bytes)",
            self.message_type(),
            self.len
        )
    }
}

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParseError {
    /// Shorter than the header, which has 8 bytes.
    NoHeader {
        /// Bytes that there are.
        len: usize,
    },
    /// Longer than 240 bytes.
    TooLong {
        /// Bytes that there are.
        len: usize,
    },
    /// Shorter than a message of its type must be.
    Truncated {
        /// Which message.
        message_type: MessageType,
        /// Bytes that there are.
        len: usize,
        /// Bytes that there must be.
        need: usize,
    },
    /// The agreed version does not have the message, or none is agreed.
    NotInVersion {
        /// Which message.
        message_type: MessageType,
    },
    /// The message is one that only this side sends.
    WrongDirection {
        /// Which message.
        message_type: MessageType,
    },
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoHeader { len } => write!(f, "message of {len} bytes has no header"),
            Self::TooLong { len } => write!(f, "message of {len} bytes is too long"),
            Self::Truncated {
                message_type,
                len,
                need,
            } => write!(f, "{message_type:?} of {len} bytes, must be {need}"),
            Self::NotInVersion { message_type } => {
                write!(f, "{message_type:?} is not part of the agreed version")
            }
            Self::WrongDirection { message_type } => {
                write!(f, "{message_type:?} goes the other way")
            }
        }
    }
}

impl core::error::Error for ParseError {}

/// Checks length and header, and returns the type with the body.
fn parse_header(bytes: &[u8]) -> Result<(MessageType, &[u8]), ParseError> {
    let len = bytes.len();
    if len > MAX_MESSAGE_SIZE {
        return Err(ParseError::TooLong { len });
    }
    let (header, body) =
        split_prefix::<MessageHeader>(bytes).ok_or(ParseError::NoHeader { len })?;
    Ok((header.message_type, body))
}

/// Checks that the message is part of the version, and returns its body with what follows it.
fn parse_body<T: Message>(
    bytes: &[u8],
    body: &'_ [u8],
    agreed: Option<Version>,
) -> Result<T, ParseError> {
    if !T::SINCE.allows(agreed) {
        return Err(ParseError::NotInVersion {
            message_type: T::TYPE,
        });
    }
    read_prefix(body).ok_or(ParseError::Truncated {
        message_type: T::TYPE,
        len: bytes.len(),
        need: T::SIZE,
    })
}

/// The 64-bit words that follow a body of fixed size.
///
/// Bytes at the end that are not a whole word are left out; messages may be padded.
fn tail_words<T: Message>(bytes: &[u8]) -> &[U64] {
    let tail = bytes.get(T::SIZE..).unwrap_or_default();
    <[U64]>::ref_from_prefix(tail).map_or(&[], |(words, _)| words)
}

/// OFFERCHANNEL, 196 bytes: the host has a channel for the guest.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OfferChannel {
    /// The device's class.
    pub interface_id: Guid,
    /// The device itself. Sub-channels have the same as their primary channel.
    pub instance_id: Guid,
    /// Zero.
    pub reserved1: U64,
    /// Zero.
    pub reserved2: U64,
    /// See [`flags`](Self::flags).
    pub channel_flags: U16,
    /// How much MMIO space the device needs, in MB (2^20 bytes).
    pub mmio_megabytes: U16,
    /// Whatever the device wants to say. For pipes, the first 4 bytes are the pipe's mode.
    pub user_defined: [u8; USER_DATA_SIZE],
    /// 0 for the primary channel of a device.
    pub sub_channel_index: U16,
    /// Zero.
    pub reserved3: U16,
    /// The channel's id.
    pub channel_id: ChannelId,
    /// See [`monitor`](Self::monitor).
    pub monitor_id: u8,
    /// Bit 0: the monitor id counts.
    pub monitor_allocated: u8,
    /// Bit 0, see [`has_dedicated_interrupt`](Self::has_dedicated_interrupt).
    pub is_dedicated_interrupt: U16,
    /// The connection to signal the host on.
    pub connection_id: ConnectionId,
}

/// `channel_flags` of an offer (`VMBUS_CHANNEL_*` in `linux/hyperv.h`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct OfferFlags(u16);

bitflags! {
    impl OfferFlags: u16 {
        /// Shall be found by drivers that look for devices.
        const ENUMERATE_DEVICE_INTERFACE = 0x0001;
        /// The ring lies in memory that the host cannot read (version 6.0).
        const CONFIDENTIAL_RING_BUFFER = 0x0002;
        /// So does the memory that packets point to (version 6.0).
        const CONFIDENTIAL_EXTERNAL_MEMORY = 0x0004;
        /// A pipe.
        const NAMED_PIPE_MODE = 0x0010;
        /// Both ends are in the guest.
        const LOOPBACK_OFFER = 0x0100;
        /// The parent partition offers it.
        const PARENT_OFFER = 0x0200;
        /// Asks for monitored notification.
        const REQUEST_MONITORED_NOTIFICATION = 0x0400;
        /// A socket (hv_sock).
        const TLNPI_PROVIDER_OFFER = 0x2000;

        // The rest is for the host to define.
        const _ = !0;
    }
}

impl fmt::Debug for OfferFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OfferFlags({:#06x})", self.0)
    }
}

impl OfferChannel {
    /// The flags.
    #[inline]
    pub fn flags(&self) -> OfferFlags {
        OfferFlags::from_bits_retain(self.channel_flags.get())
    }

    /// Whether this is a sub-channel of a device whose primary channel has the same GUIDs.
    #[inline]
    pub fn is_subchannel(&self) -> bool {
        self.sub_channel_index.get() != 0
    }

    /// Whether the guest must signal the channel's own connection only, and leave the shared
    /// interrupt page alone. From version 5.0 on there is no such page, and the host sets this.
    #[inline]
    pub fn has_dedicated_interrupt(&self) -> bool {
        self.is_dedicated_interrupt.get() & 1 != 0
    }

    /// The monitor id, if the channel is offered with one for which the monitor page has a place.
    #[inline]
    pub fn monitor(&self) -> Option<MonitorId> {
        if self.monitor_allocated & 1 != 0 {
            MonitorId::new(self.monitor_id)
        } else {
            None
        }
    }
}

/// RESCIND_CHANNELOFFER, 12 bytes: the host takes a channel back.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RescindChannelOffer {
    /// Which channel.
    pub channel_id: ChannelId,
}

/// REQUESTOFFERS, 8 bytes: the guest wants to hear all offers.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestOffers {}

/// ALLOFFERS_DELIVERED, 8 bytes: the host has sent the offers that it had.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AllOffersDelivered {}

/// OPENCHANNEL, 148 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OpenChannel {
    /// Which channel.
    pub channel_id: ChannelId,
    /// Comes back in the result. Linux uses the channel's id.
    pub open_id: OpenId,
    /// The memory of both rings: guest to host first.
    pub ring_gpadl: GpadlId,
    /// The processor that the host shall interrupt.
    pub target_vp: VpIndex,
    /// Where the ring from host to guest starts in that memory, in pages.
    pub downstream_page_offset: U32,
    /// Whatever the driver wants to say.
    pub user_data: [u8; USER_DATA_SIZE],
}

impl OpenChannel {
    /// A request to open, with `user_data` filled up with zeros; `None` if there are more than
    /// 120 bytes of it.
    pub fn new(
        channel_id: ChannelId,
        open_id: OpenId,
        ring_gpadl: GpadlId,
        target_vp: VpIndex,
        downstream_page_offset: u32,
        user_data: &[u8],
    ) -> Option<Self> {
        let mut open = Self {
            channel_id,
            open_id,
            ring_gpadl,
            target_vp,
            downstream_page_offset: U32::new(downstream_page_offset),
            ..FromZeros::new_zeroed()
        };
        open.user_data
            .get_mut(..user_data.len())?
            .copy_from_slice(user_data);
        Some(open)
    }
}

/// OPENCHANNEL_RESULT, 20 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OpenChannelResult {
    /// Which channel.
    pub channel_id: ChannelId,
    /// From the request.
    pub open_id: OpenId,
    /// 0 when the channel is open.
    pub status: U32,
}

/// CLOSECHANNEL, 12 bytes. There is no answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CloseChannel {
    /// Which channel.
    pub channel_id: ChannelId,
}

/// GPADL_HEADER, 20 bytes and the first part of the ranges: guest memory gets an id.
///
/// The ranges are a sequence of 64-bit words: for each range one word with its length (low 32
/// bits) and its offset in the first page (high 32 bits), both in bytes, and a frame number for
/// each page that it touches. What does not fit follows in GPADL_BODY messages.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GpadlHeader {
    /// The channel that the memory belongs to.
    pub channel_id: ChannelId,
    /// The id that the guest has chosen.
    pub gpadl_id: GpadlId,
    /// Length of all ranges, in bytes, over all messages.
    pub range_buf_len: U16,
    /// Number of ranges. Linux sends 1.
    pub range_count: U16,
}

/// GPADL_BODY, 16 bytes and the next part of the ranges.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GpadlBody {
    /// Meant as the number of the message; Linux always sends 0, so it must not be looked at.
    pub message_number: U32,
    /// Which GPADL.
    pub gpadl_id: GpadlId,
}

/// GPADL_CREATED, 20 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GpadlCreated {
    /// Which channel.
    pub channel_id: ChannelId,
    /// Which GPADL.
    pub gpadl_id: GpadlId,
    /// 0 when the host has it.
    pub status: U32,
}

/// GPADL_TEARDOWN, 16 bytes: the guest wants its memory back.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GpadlTeardown {
    /// Which channel.
    pub channel_id: ChannelId,
    /// Which GPADL.
    pub gpadl_id: GpadlId,
}

/// GPADL_TORNDOWN, 12 bytes: the host does not touch the memory any more.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GpadlTorndown {
    /// Which GPADL.
    pub gpadl_id: GpadlId,
}

/// RELID_RELEASED, 12 bytes: the guest has done with a channel, its id may be used again.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RelidReleased {
    /// Which channel.
    pub channel_id: ChannelId,
}

/// INITIATE_CONTACT, 40 bytes: the guest asks for a version of the protocol.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InitiateContact {
    /// The version, major << 16 | minor.
    pub version: U32,
    /// The processor that the host shall send its messages to.
    pub target_vp: VpIndex,
    /// Before 5.0 the address of the interrupt page; from 5.0 on see [`ContactTarget`].
    pub interrupt_page_or_target: U64,
    /// Guest physical address of the monitor page for host to guest, 0 for none.
    pub monitor_page1: U64,
    /// Guest physical address of the monitor page for guest to host, 0 for none.
    pub monitor_page2: U64,
}

/// Where the host's messages shall go, in INITIATE_CONTACT from version 5.0 on, 8 bytes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ContactTarget {
    /// The SINT, 2 for Linux.
    pub sint: u8,
    /// The VTL.
    pub vtl: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// From version 6.0 on, see [`FeatureFlags`].
    pub feature_flags: U32,
}

/// Features that a guest asks for in INITIATE_CONTACT from version 6.0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FeatureFlags(u32);

bitflags! {
    impl FeatureFlags: u32 {
        /// Encrypted rings and external memory; a paravisor answers to it
        /// (`VMBUS_FEATURE_FLAG_CONFIDENTIAL_CHANNELS`).
        const CONFIDENTIAL_CHANNELS = 0x10;

        // Others may be defined later.
        const _ = !0;
    }
}

impl ContactTarget {
    /// The 8 bytes as they stand in INITIATE_CONTACT.
    #[inline]
    pub fn to_field(self) -> U64 {
        zerocopy::transmute!(self)
    }
}

impl InitiateContact {
    /// Where messages shall go; only from version 5.0 on.
    #[inline]
    pub fn target(&self) -> ContactTarget {
        zerocopy::transmute!(self.interrupt_page_or_target)
    }
}

/// VERSION_RESPONSE, 16 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VersionResponse {
    /// Not 0 when the host speaks the version that was asked for.
    pub version_supported: u8,
    /// 0 when the connection was made.
    pub connection_state: u8,
    /// Zero.
    pub padding: U16,
    /// From version 5.0 on, the connection for all later messages of the guest.
    pub message_connection_id: ConnectionId,
}

/// UNLOAD, 8 bytes: the guest leaves the bus.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Unload {}

/// UNLOAD_RESPONSE, 8 bytes: the host does not touch the guest's memory any more.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct UnloadResponse {}

/// TL_CONNECT_REQUEST, 40 bytes: a socket of the guest connects to a service of the host.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TlConnectRequest {
    /// The guest's end.
    pub guest_endpoint_id: Guid,
    /// The host's service.
    pub host_service_id: Guid,
}

/// MODIFYCHANNEL, 16 bytes: the host shall interrupt another processor for an open channel.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ModifyChannel {
    /// Which channel.
    pub channel_id: ChannelId,
    /// The processor.
    pub target_vp: VpIndex,
}

/// TL_CONNECT_RESULT, 44 bytes: what became of a request that the host refused.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TlConnectResult {
    /// From the request.
    pub guest_endpoint_id: Guid,
    /// From the request.
    pub host_service_id: Guid,
    /// Why it was refused.
    pub status: U32,
}

/// MODIFYCHANNEL_RESPONSE, 16 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ModifyChannelResponse {
    /// Which channel.
    pub channel_id: ChannelId,
    /// 0 when it was done.
    pub status: U32,
}

macro_rules! since {
    (always) => {
        Since::Always
    };
    ($version:ident) => {
        Since::Version(Version::$version)
    };
}

macro_rules! message {
    ($direction:ident, $number:literal, $name:ident, $body:ident, $size:literal, $since:ident) => {
        impl Message for $body {
            const TYPE: MessageType = MessageType::$name;
            const DIRECTION: Direction = Direction::$direction;
            const SINCE: Since = since!($since);
            const SIZE: usize = $size;
        }

        const _: () = assert!(HEADER_SIZE + size_of::<$body>() == $size);
        const _: () = assert!($size <= MAX_MESSAGE_SIZE);
    };
}

/// The table: number, name of the type, body, size in bytes with the header, and first version.
/// `+ words` marks messages that end in a list of 64-bit words.
macro_rules! vmbus_messages {
    (
        host_to_guest {
            $($hnum:literal $hname:ident $hbody:ident $hsize:literal since $hsince:ident;)*
        }
        guest_to_host {
            $($gnum:literal $gname:ident $gbody:ident $gsize:literal
                $(+ $gtail:ident)? since $gsince:ident;)*
        }
    ) => {
        open_enum! {
            /// Type of a VMBus message.
            pub struct MessageType: u32 {
                /// Not a message.
                INVALID = 0,
                $(
                    #[doc = concat!("Host to guest, body [`", stringify!($hbody), "`].")]
                    $hname = $hnum,
                )*
                $(
                    #[doc = concat!("Guest to host, body [`", stringify!($gbody), "`].")]
                    $gname = $gnum,
                )*
            }
        }

        impl MessageType {
            /// Who sends it and which versions have it; `None` for types that are not known.
            pub fn rule(self) -> Option<(Direction, Since)> {
                match self {
                    $(Self::$hname => Some((Direction::HostToGuest, <$hbody as Message>::SINCE)),)*
                    $(Self::$gname => Some((Direction::GuestToHost, <$gbody as Message>::SINCE)),)*
                    _ => None,
                }
            }
        }

        $(message!(HostToGuest, $hnum, $hname, $hbody, $hsize, $hsince);)*
        $(message!(GuestToHost, $gnum, $gname, $gbody, $gsize, $gsince);)*

        /// A message of the host, taken apart. It is a copy; nothing refers to the bytes any more.
        #[derive(Clone, Copy, Debug)]
        #[non_exhaustive]
        pub enum HostMessage {
            $(
                #[doc = concat!("See [`struct@", stringify!($hbody), "`].")]
                $hbody($hbody),
            )*
            /// A type that is not known here.
            Unknown(MessageType),
        }

        impl HostMessage {
            /// Takes apart what a host has sent. `agreed` is the version of the connection, `None`
            /// while there is none.
            ///
            /// # Errors
            ///
            /// [`ParseError`] when the message is too short or too long for its type, when the
            /// version does not have it, or when only guests send it.
            pub fn parse(bytes: &[u8], agreed: Option<Version>) -> Result<Self, ParseError> {
                let (message_type, body) = parse_header(bytes)?;
                match message_type {
                    $(MessageType::$hname => {
                        parse_body::<$hbody>(bytes, body, agreed).map(Self::$hbody)
                    })*
                    $(MessageType::$gname => Err(ParseError::WrongDirection { message_type }),)*
                    other => Ok(Self::Unknown(other)),
                }
            }

            /// Which message it is.
            pub fn message_type(&self) -> MessageType {
                match self {
                    $(Self::$hbody(_) => MessageType::$hname,)*
                    Self::Unknown(other) => *other,
                }
            }
        }

        /// A message of the guest, taken apart. Only the lists at the end of GPADL messages refer
        /// to the bytes that it was made from.
        #[derive(Clone, Copy, Debug)]
        #[non_exhaustive]
        pub enum GuestMessage<'a> {
            $(
                #[doc = concat!("See [`struct@", stringify!($gbody), "`].")]
                $gbody($gbody $(, vmbus_messages!(@tail_type $gtail 'a))?),
            )*
            /// A type that is not known here.
            Unknown(MessageType),
        }

        impl<'a> GuestMessage<'a> {
            /// Takes apart what a guest has sent. `agreed` is the version of the connection,
            /// `None` while there is none.
            ///
            /// # Errors
            ///
            /// [`ParseError`] when the message is too short or too long for its type, when the
            /// version does not have it, or when only hosts send it.
            pub fn parse(bytes: &'a [u8], agreed: Option<Version>) -> Result<Self, ParseError> {
                let (message_type, body) = parse_header(bytes)?;
                match message_type {
                    $(MessageType::$gname => {
                        let fixed = parse_body::<$gbody>(bytes, body, agreed)?;
                        Ok(Self::$gbody(
                            fixed $(, vmbus_messages!(@tail $gtail $gbody bytes))?
                        ))
                    })*
                    $(MessageType::$hname => Err(ParseError::WrongDirection { message_type }),)*
                    other => Ok(Self::Unknown(other)),
                }
            }

            /// Which message it is.
            pub fn message_type(&self) -> MessageType {
                match self {
                    $(Self::$gbody(..) => MessageType::$gname,)*
                    Self::Unknown(other) => *other,
                }
            }
        }
    };
    (@tail_type words $lifetime:lifetime) => { &$lifetime [U64] };
    (@tail words $body:ident $bytes:ident) => { tail_words::<$body>($bytes) };
}

vmbus_messages! {
    host_to_guest {
        1 OFFER_CHANNEL OfferChannel 196 since V4_0;
        2 RESCIND_CHANNEL_OFFER RescindChannelOffer 12 since V4_0;
        4 ALL_OFFERS_DELIVERED AllOffersDelivered 8 since V4_0;
        6 OPEN_CHANNEL_RESULT OpenChannelResult 20 since V4_0;
        10 GPADL_CREATED GpadlCreated 20 since V4_0;
        12 GPADL_TORNDOWN GpadlTorndown 12 since V4_0;
        15 VERSION_RESPONSE VersionResponse 16 since always;
        17 UNLOAD_RESPONSE UnloadResponse 8 since always;
        23 TL_CONNECT_RESULT TlConnectResult 44 since V4_0;
        24 MODIFY_CHANNEL_RESPONSE ModifyChannelResponse 16 since V5_3;
    }
    guest_to_host {
        3 REQUEST_OFFERS RequestOffers 8 since V4_0;
        5 OPEN_CHANNEL OpenChannel 148 since V4_0;
        7 CLOSE_CHANNEL CloseChannel 12 since V4_0;
        8 GPADL_HEADER GpadlHeader 20 + words since V4_0;
        9 GPADL_BODY GpadlBody 16 + words since V4_0;
        11 GPADL_TEARDOWN GpadlTeardown 16 since V4_0;
        13 RELID_RELEASED RelidReleased 12 since V4_0;
        14 INITIATE_CONTACT InitiateContact 40 since always;
        16 UNLOAD Unload 8 since always;
        21 TL_CONNECT_REQUEST TlConnectRequest 40 since V4_0;
        22 MODIFY_CHANNEL ModifyChannel 16 since V4_1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn types() -> impl Iterator<Item = MessageType> {
        (0..=30).map(MessageType::new)
    }

    /// Smallest size of a message that a parser takes.
    fn size_of_type(message_type: MessageType) -> Option<usize> {
        (0..=MAX_MESSAGE_SIZE).find(|len| {
            let mut bytes = [0; MAX_MESSAGE_SIZE];
            bytes[..4].copy_from_slice(message_type.as_bytes());
            let bytes = &bytes[..*len];
            matches!(HostMessage::parse(bytes, Some(Version::NEWEST)),
                Ok(message) if !matches!(message, HostMessage::Unknown(_)))
                || matches!(GuestMessage::parse(bytes, Some(Version::NEWEST)),
                    Ok(message) if !matches!(message, GuestMessage::Unknown(_)))
        })
    }

    #[test]
    fn numbers_and_sizes_are_those_of_the_headers() {
        let sizes: Vec<_> = types()
            .filter_map(|t| size_of_type(t).map(|size| (t.get(), size)))
            .collect();
        assert_eq!(
            sizes,
            [
                (1, 196),
                (2, 12),
                (3, 8),
                (4, 8),
                (5, 148),
                (6, 20),
                (7, 12),
                (8, 20),
                (9, 16),
                (10, 20),
                (11, 16),
                (12, 12),
                (13, 12),
                (14, 40),
                (15, 16),
                (16, 8),
                (17, 8),
                (21, 40),
                (22, 16),
                (23, 44),
                (24, 16),
            ]
        );
    }

    #[test]
    fn offer_has_its_fields_where_linux_has_them() {
        let mut bytes = [0u8; 196];
        bytes[0] = 1;
        bytes[8..24].fill(0x11);
        bytes[24..40].fill(0x22);
        bytes[56..58].copy_from_slice(&0x0201u16.to_le_bytes());
        bytes[58] = 5;
        bytes[60] = 0x33;
        bytes[179] = 0x44;
        bytes[180] = 6;
        bytes[184] = 7;
        bytes[188] = 100;
        bytes[189] = 0xff;
        bytes[190] = 1;
        bytes[192] = 9;
        let Ok(HostMessage::OfferChannel(offer)) = HostMessage::parse(&bytes, Some(Version::V4_0))
        else {
            panic!("not an offer");
        };
        assert_eq!(offer.interface_id, Guid::from_bytes([0x11; 16]));
        assert_eq!(offer.instance_id, Guid::from_bytes([0x22; 16]));
        assert_eq!(
            offer.flags(),
            OfferFlags::PARENT_OFFER | OfferFlags::ENUMERATE_DEVICE_INTERFACE
        );
        assert_eq!(offer.mmio_megabytes.get(), 5);
        assert_eq!(
            (offer.user_defined[0], offer.user_defined[119]),
            (0x33, 0x44)
        );
        assert_eq!(offer.sub_channel_index.get(), 6);
        assert!(offer.is_subchannel() && offer.has_dedicated_interrupt());
        assert_eq!(offer.channel_id, ChannelId::new(7));
        assert_eq!(offer.monitor(), MonitorId::new(100));
        assert_eq!(offer.connection_id, ConnectionId::new(9));
    }

    #[test]
    fn monitor_id_needs_a_place() {
        let mut offer = OfferChannel::new_zeroed();
        offer.monitor_id = 5;
        assert_eq!(offer.monitor(), None);
        offer.monitor_allocated = 1;
        assert_eq!(offer.monitor(), MonitorId::new(5));
        offer.monitor_id = 128;
        assert_eq!(offer.monitor(), None);
    }

    #[test]
    fn contact_target_shares_the_field_with_the_interrupt_page() {
        let mut contact = InitiateContact::new_zeroed();
        contact.interrupt_page_or_target = ContactTarget {
            sint: 2,
            vtl: 1,
            reserved: [0; 2],
            feature_flags: U32::new(0x10),
        }
        .to_field();
        assert_eq!(
            contact.interrupt_page_or_target.get(),
            0x0000_0010_0000_0102
        );
        assert_eq!(contact.target().sint, 2);
        assert_eq!(contact.target().feature_flags.get(), 0x10);
    }

    #[test]
    fn version_gates_messages() {
        let modify = ModifyChannel::new_zeroed().encode();
        let message_type = MessageType::MODIFY_CHANNEL;
        for agreed in [None, Some(Version::V4_0)] {
            assert_eq!(
                GuestMessage::parse(&modify, agreed).unwrap_err(),
                ParseError::NotInVersion { message_type }
            );
        }
        assert!(GuestMessage::parse(&modify, Some(Version::V4_1)).is_ok());

        let response = ModifyChannelResponse::new_zeroed().encode();
        assert!(HostMessage::parse(&response, Some(Version::V5_2)).is_err());
        assert!(HostMessage::parse(&response, Some(Version::V5_3)).is_ok());

        let contact = InitiateContact::new_zeroed().encode();
        assert!(GuestMessage::parse(&contact, None).is_ok());
        assert!(GuestMessage::parse(&RequestOffers {}.encode(), None).is_err());
        assert!(HostMessage::parse(&VersionResponse::new_zeroed().encode(), None).is_ok());
        assert!(HostMessage::parse(&AllOffersDelivered {}.encode(), None).is_err());
    }

    #[test]
    fn direction_matters_and_unknown_types_are_data() {
        let close = CloseChannel::new_zeroed().encode();
        assert_eq!(
            HostMessage::parse(&close, Some(Version::NEWEST)).unwrap_err(),
            ParseError::WrongDirection {
                message_type: MessageType::CLOSE_CHANNEL
            }
        );
        let strange = MessageBuf::new(MessageType::new(99));
        assert!(matches!(
            HostMessage::parse(&strange, None),
            Ok(HostMessage::Unknown(t)) if t.get() == 99
        ));
        assert!(matches!(
            GuestMessage::parse(&strange, None),
            Ok(GuestMessage::Unknown(t)) if t.get() == 99
        ));
    }

    #[test]
    fn length_has_two_bounds() {
        assert_eq!(
            HostMessage::parse(&[4, 0, 0, 0, 0, 0, 0], None).unwrap_err(),
            ParseError::NoHeader { len: 7 }
        );
        let mut long = [0; 241];
        long[0] = 4;
        assert_eq!(
            HostMessage::parse(&long, Some(Version::V5_3)).unwrap_err(),
            ParseError::TooLong { len: 241 }
        );
        // Padding up to the bound is no harm.
        assert!(HostMessage::parse(&long[..240], Some(Version::V5_3)).is_ok());
        assert_eq!(
            HostMessage::parse(&[2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], Some(Version::V5_3))
                .unwrap_err(),
            ParseError::Truncated {
                message_type: MessageType::RESCIND_CHANNEL_OFFER,
                len: 11,
                need: 12
            }
        );
    }

    #[test]
    fn user_data_has_a_bound() {
        let open = |len: usize| {
            OpenChannel::new(
                ChannelId::new(1),
                OpenId::new(1),
                GpadlId::FIRST,
                VpIndex::BOOT,
                4,
                &[7; 121][..len],
            )
        };
        assert!(open(121).is_none());
        assert_eq!(open(120).unwrap().user_data, [7; 120]);
        assert_eq!(open(1).unwrap().user_data[..3], [7, 0, 0]);
    }

    #[test]
    fn buffer_has_a_bound() {
        let mut buf = MessageBuf::new(MessageType::UNLOAD);
        assert!(buf.append(&[1; 232]));
        assert!(!buf.append(&[1]) && buf.append(&[]));
        assert_eq!(buf.len(), 240);
        assert_eq!(buf.message_type(), MessageType::UNLOAD);
    }

    #[test]
    fn rules_name_direction_and_version() {
        assert_eq!(
            MessageType::MODIFY_CHANNEL_RESPONSE.rule(),
            Some((Direction::HostToGuest, Since::Version(Version::V5_3)))
        );
        assert_eq!(
            MessageType::UNLOAD.rule(),
            Some((Direction::GuestToHost, Since::Always))
        );
        assert_eq!(MessageType::new(18).rule(), None);
    }

    /// Any bytes with a type that is often a known one.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        (0u32..30, prop::collection::vec(any::<u8>(), 0..260)).prop_map(|(number, mut bytes)| {
            for (byte, value) in bytes.iter_mut().zip(number.to_le_bytes()) {
                *byte = value;
            }
            bytes
        })
    }

    fn agreed() -> impl Strategy<Value = Option<Version>> {
        prop::option::of(prop::sample::select(&Version::NEWEST_FIRST[..]))
    }

    /// Encodes a host's message again; its bytes must be a prefix of those it was parsed from.
    fn encode_host(message: &HostMessage) -> Option<MessageBuf> {
        Some(match message {
            HostMessage::OfferChannel(m) => m.encode(),
            HostMessage::RescindChannelOffer(m) => m.encode(),
            HostMessage::AllOffersDelivered(m) => m.encode(),
            HostMessage::OpenChannelResult(m) => m.encode(),
            HostMessage::GpadlCreated(m) => m.encode(),
            HostMessage::GpadlTorndown(m) => m.encode(),
            HostMessage::VersionResponse(m) => m.encode(),
            HostMessage::UnloadResponse(m) => m.encode(),
            HostMessage::TlConnectResult(m) => m.encode(),
            HostMessage::ModifyChannelResponse(m) => m.encode(),
            HostMessage::Unknown(_) => return None,
        })
    }

    fn encode_guest(message: &GuestMessage<'_>) -> Option<MessageBuf> {
        Some(match message {
            GuestMessage::RequestOffers(m) => m.encode(),
            GuestMessage::OpenChannel(m) => m.encode(),
            GuestMessage::CloseChannel(m) => m.encode(),
            GuestMessage::GpadlHeader(m, words) => {
                let mut buf = m.encode();
                assert!(buf.append(words.as_bytes()));
                buf
            }
            GuestMessage::GpadlBody(m, words) => {
                let mut buf = m.encode();
                assert!(buf.append(words.as_bytes()));
                buf
            }
            GuestMessage::GpadlTeardown(m) => m.encode(),
            GuestMessage::RelidReleased(m) => m.encode(),
            GuestMessage::InitiateContact(m) => m.encode(),
            GuestMessage::Unload(m) => m.encode(),
            GuestMessage::TlConnectRequest(m) => m.encode(),
            GuestMessage::ModifyChannel(m) => m.encode(),
            GuestMessage::Unknown(_) => return None,
        })
    }

    proptest! {
        /// No bytes make a parser panic; what it takes, it takes as it is; what it refuses, it
        /// refuses for the reason that it gives.
        #[test]
        fn any_bytes(mut bytes in bytes(), agreed in agreed()) {
            // Of the header, only the type is kept.
            if let Some(padding) = bytes.get_mut(4..8) {
                padding.fill(0);
            }
            let host = HostMessage::parse(&bytes, agreed);
            let guest = GuestMessage::parse(&bytes, agreed);
            let number = bytes.first_chunk().map(|b| MessageType::new(u32::from_le_bytes(*b)));
            if let Ok(message) = &host {
                prop_assert_eq!(Some(message.message_type()), number);
                if let Some(buf) = encode_host(message) {
                    prop_assert_eq!(&bytes[..buf.len()], buf.as_bytes());
                    // All bytes but padding are needed.
                    prop_assert!(HostMessage::parse(&bytes[..buf.len()], agreed).is_ok());
                    prop_assert!(HostMessage::parse(&bytes[..buf.len() - 1], agreed).is_err());
                    prop_assert!(guest.is_err());
                }
            }
            if let Ok(message) = &guest {
                prop_assert_eq!(Some(message.message_type()), number);
                if let Some(buf) = encode_guest(message) {
                    prop_assert_eq!(&bytes[..buf.len()], buf.as_bytes());
                    prop_assert!(host.is_err());
                }
            }
            for error in [host.err(), guest.err()].into_iter().flatten() {
                prop_assert!(!error.to_string().is_empty());
                match error {
                    ParseError::NoHeader { len } => prop_assert!(len < 8 && len == bytes.len()),
                    ParseError::TooLong { len } => prop_assert!(len > 240 && len == bytes.len()),
                    ParseError::Truncated { len, need, .. } => {
                        prop_assert!(len < need && len == bytes.len());
                    }
                    ParseError::NotInVersion { message_type } => {
                        let (_, since) = message_type.rule().unwrap();
                        prop_assert!(!since.allows(agreed));
                    }
                    ParseError::WrongDirection { message_type } => {
                        prop_assert!(message_type.rule().is_some());
                    }
                }
            }
        }
    }
}
