// SPDX-License-Identifier: GPL-2.0 OR MIT

//! NVSP, the protocol of the channel of a network adapter: its messages.
//!
//! A message is a type of 4 bytes and a body. A guest sends each with [`MESSAGE_SIZE`] bytes, whatever
//! its type; hosts may send less, and only what the type needs is looked at. The two tables below name
//! the messages of each side once. They yield [`GuestMessage`] (what a guest sends) and
//! [`HostMessage`] (what a host sends), with parsers that know which version has which message. A
//! number that is in no table is data: [`GuestMessage::Other`], [`HostMessage::Other`].
//!
//! ```
//! use hv_proto::net::nvsp::{Body, GuestMessage, SubChannelRequest, Version};
//!
//! let sent = SubChannelRequest::allocate(3).encode();
//! match GuestMessage::parse(&sent, Some(Version::V5)) {
//!     Ok(GuestMessage::SubChannel(request)) => assert_eq!(request.count.get(), 3),
//!     other => panic!("{other:?}"),
//! }
//! assert!(GuestMessage::parse(&sent, Some(Version::V4)).is_err());
//! ```
//!
//! Uses `zerocopy` and `bitflags`.
//!
//! Source: `hyperv_net.h` of the kernel's network driver.

use crate::message::split_prefix;
use bitflags::bitflags;
use core::fmt;
use zerocopy::IntoBytes as _;

/// Bytes of every message of a guest.
pub const MESSAGE_SIZE: usize = 40;

/// Bytes of the type before each body.
pub const HEADER_SIZE: usize = 4;

/// Entries of the send indirection table.
pub const SEND_TABLE_SIZE: usize = 16;

/// Most sections of the receive buffer that are looked at. No host has ever made more than one.
pub const MAX_SECTIONS: usize = 8;

/// Index of a section that says: none, the data is elsewhere.
pub const NO_SECTION: u32 = u32::MAX;

/// Version of the protocol. Later ones compare greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// 1.
    V1,
    /// 2, of Windows Server 2008 R2: NDIS configuration.
    V2,
    /// 4, of Windows Server 2012: virtual functions.
    V4,
    /// 5, of Windows Server 2012 R2: sub-channels.
    V5,
    /// 6, of Windows Server 2016.
    V6,
    /// 6.1, of Windows Server 2019: coalesced segments.
    V6_1,
}

impl Version {
    /// All versions, newest first, as a guest proposes them.
    pub const NEWEST_FIRST: [Self; 6] =
        [Self::V6_1, Self::V6, Self::V5, Self::V4, Self::V2, Self::V1];

    /// The number on the wire.
    pub const fn raw(self) -> u32 {
        match self {
            Self::V1 => 0x0000_0002,
            Self::V2 => 0x0003_0002,
            Self::V4 => 0x0004_0000,
            Self::V5 => 0x0005_0000,
            Self::V6 => 0x0006_0000,
            Self::V6_1 => 0x0006_0001,
        }
    }

    /// The version with number `raw`, if it is a known one.
    pub fn from_raw(raw: u32) -> Option<Self> {
        Self::NEWEST_FIRST
            .into_iter()
            .find(|version| version.raw() == raw)
    }

    /// Whether the guest tells its MTU and what it can do ([`NdisConfig`]).
    pub fn has_ndis_config(self) -> bool {
        self >= Self::V2
    }

    /// Whether an adapter may have sub-channels.
    pub fn has_sub_channels(self) -> bool {
        self >= Self::V5
    }

    /// What a guest may tell the host that it can do.
    pub fn capabilities(self) -> Capabilities {
        let mut all = Capabilities::empty();
        if self >= Self::V2 {
            all |= Capabilities::IEEE8021Q;
        }
        if self >= Self::V5 {
            // Without teaming, the host does not tell when the speed of the link changes.
            all |= Capabilities::SRIOV | Capabilities::TEAMING;
        }
        if self >= Self::V6_1 {
            all |= Capabilities::RSC;
        }
        all
    }

    /// The version of NDIS that goes with it: major and minor number.
    pub fn ndis(self) -> NdisVersion {
        let minor = if self <= Self::V4 { 1 } else { 30 };
        NdisVersion {
            major: 6.into(),
            minor: minor.into(),
        }
    }

    /// The largest receive buffer that hosts accept, in bytes.
    pub fn max_receive_buffer(self) -> u32 {
        let megabytes = if self <= Self::V2 { 15 } else { 31 };
        megabytes << 20
    }

    /// The largest send buffer that hosts accept, in bytes.
    pub fn max_send_buffer(self) -> u32 {
        15 << 20
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "1",
            Self::V2 => "2",
            Self::V4 => "4",
            Self::V5 => "5",
            Self::V6 => "6",
            Self::V6_1 => "6.1",
        })
    }
}

open_enum! {
    /// Which message it is.
    pub struct MessageType: u32 {
        /// Guest: proposes a version.
        INIT = 1,
        /// Host: whether it takes the version.
        INIT_COMPLETE = 2,
        /// Guest: the version of NDIS that it follows.
        SEND_NDIS_VERSION = 100,
        /// Guest: shares the receive buffer.
        SEND_RECEIVE_BUFFER = 101,
        /// Host: how it divides the receive buffer.
        SEND_RECEIVE_BUFFER_COMPLETE = 102,
        /// Guest: takes the receive buffer back.
        REVOKE_RECEIVE_BUFFER = 103,
        /// Guest: shares the send buffer.
        SEND_SEND_BUFFER = 104,
        /// Host: how it divides the send buffer.
        SEND_SEND_BUFFER_COMPLETE = 105,
        /// Guest: takes the send buffer back.
        REVOKE_SEND_BUFFER = 106,
        /// Both: here is an RNDIS message.
        SEND_RNDIS_PACKET = 107,
        /// Both: the RNDIS message has been taken.
        SEND_RNDIS_PACKET_COMPLETE = 108,
        /// Guest: its MTU and what it can do.
        SEND_NDIS_CONFIG = 125,
        /// Host: a virtual function has come or gone.
        SEND_VF_ASSOCIATION = 128,
        /// Guest: which way its frames go from now on.
        SWITCH_DATA_PATH = 129,
        /// Both: asks for sub-channels, and how many there are.
        SUB_CHANNEL = 133,
        /// Host: which channel the guest shall send on, by the hash of the frame.
        SEND_INDIRECTION_TABLE = 134,
    }
}

open_enum! {
    /// Whether it worked.
    pub struct Status: u32 {
        /// Not set.
        NONE = 0,
        /// Done.
        SUCCESS = 1,
        /// Not done.
        FAILURE = 2,
        /// The version is newer than all that are known.
        PROTOCOL_TOO_NEW = 3,
        /// The version is older than all that are known.
        PROTOCOL_TOO_OLD = 4,
        /// The RNDIS message makes no sense.
        INVALID_RNDIS_PACKET = 5,
        /// Not now.
        BUSY = 6,
        /// The version is not supported.
        PROTOCOL_UNSUPPORTED = 7,
    }
}

open_enum! {
    /// Which of RNDIS's two channels a message belongs to.
    pub struct ChannelType: u32 {
        /// Frames.
        DATA = 0,
        /// Everything else.
        CONTROL = 1,
    }
}

open_enum! {
    /// Which way the frames of a guest go.
    pub struct DataPath: u32 {
        /// Through this adapter.
        SYNTHETIC = 0,
        /// Through the virtual function.
        VF = 1,
    }
}

open_enum! {
    /// What is to be done about sub-channels.
    pub struct SubChannelOperation: u32 {
        /// Make some.
        ALLOCATE = 1,
    }
}

/// What a guest can do (`struct nvsp_2_vsc_capability`). Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Capabilities(u64);

bitflags! {
    impl Capabilities: u64 {
        /// Virtual machine queues.
        const VMQ = 1 << 0;
        /// TCP chimney.
        const CHIMNEY = 1 << 1;
        /// Virtual functions.
        const SRIOV = 1 << 2;
        /// VLAN tags beside the frame.
        const IEEE8021Q = 1 << 3;
        /// Correlation ids.
        const CORRELATION_ID = 1 << 4;
        /// Teaming of adapters, which brings changes of the link's speed.
        const TEAMING = 1 << 5;
        /// Virtual subnet ids.
        const VIRTUAL_SUBNET_ID = 1 << 6;
        /// Receive segment coalescing.
        const RSC = 1 << 7;
        const _ = !0;
    }
}

/// Body of a message: at most 36 bytes.
pub trait Body:
    zerocopy::FromBytes
    + zerocopy::IntoBytes
    + zerocopy::Immutable
    + zerocopy::KnownLayout
    + zerocopy::Unaligned
    + Copy
    + fmt::Debug
{
    /// Which message it belongs to.
    const TYPE: MessageType;
    /// The first version that has the message.
    const SINCE: Version;

    /// The message as a guest sends it, and as a host may: filled up with zeros.
    fn encode(&self) -> [u8; MESSAGE_SIZE] {
        let mut message = [0; MESSAGE_SIZE];
        let bytes = Self::TYPE.as_bytes().iter().chain(self.as_bytes());
        for (to, from) in message.iter_mut().zip(bytes) {
            *to = *from;
        }
        message
    }
}

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NvspError {
    /// Too short for the type.
    NoHeader {
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
    NotInVersion(MessageType),
    /// A table of another size than [`SEND_TABLE_SIZE`].
    TableSize(u32),
    /// The table does not lie inside of the message.
    TableOffset(u32),
    /// No section, or more than [`MAX_SECTIONS`].
    SectionCount(u32),
}

impl fmt::Display for NvspError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoHeader { len } => write!(f, "NVSP message of {len} bytes has no type"),
            Self::Truncated {
                message_type,
                len,
                need,
            } => write!(f, "{message_type:?} of {len} bytes, must be {need}"),
            Self::NotInVersion(message_type) => {
                write!(f, "{message_type:?} is not part of the agreed version")
            }
            Self::TableSize(count) => write!(f, "send table has {count} entries"),
            Self::TableOffset(offset) => {
                write!(f, "send table at {offset} is outside of its message")
            }
            Self::SectionCount(count) => write!(f, "receive buffer has {count} sections"),
        }
    }
}

impl core::error::Error for NvspError {}

/// The type of a message, and what follows it.
///
/// # Errors
/// [`NvspError::NoHeader`].
pub fn split_type(payload: &[u8]) -> Result<(MessageType, &[u8]), NvspError> {
    split_prefix(payload).ok_or(NvspError::NoHeader { len: payload.len() })
}

/// Copies the body of a message of type `B` out of `payload`, which starts with the type, and returns
/// it with what follows.
fn read_body<B: Body>(payload: &[u8], agreed: Option<Version>) -> Result<(B, &[u8]), NvspError> {
    let allowed = match agreed {
        // Only the proposal of a version, and the answer to it, go over a channel without one.
        None => matches!(B::TYPE, MessageType::INIT | MessageType::INIT_COMPLETE),
        Some(agreed) => agreed >= B::SINCE,
    };
    if !allowed {
        return Err(NvspError::NotInVersion(B::TYPE));
    }
    let (_, body) = split_type(payload)?;
    split_prefix(body).ok_or(NvspError::Truncated {
        message_type: B::TYPE,
        len: payload.len(),
        need: size_of::<B>().saturating_add(HEADER_SIZE),
    })
}

/// Makes the enumeration of the messages of one side from their table.
macro_rules! messages {
    (
        $(#[$meta:meta])*
        pub enum $name:ident {
            $($type:ident since $since:ident: $variant:ident($body:ident),)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        #[non_exhaustive]
        pub enum $name {
            $(#[doc = concat!("[`MessageType::", stringify!($type), "`].")] $variant($body),)*
            /// A message of another type.
            Other(MessageType),
        }

        $(
            impl Body for $body {
                const TYPE: MessageType = MessageType::$type;
                const SINCE: Version = Version::$since;
            }

            const _: () = assert!(size_of::<$body>() + HEADER_SIZE <= MESSAGE_SIZE);
        )*

        impl $name {
            /// Parses the payload of a packet. `agreed` is the version in use.
            ///
            /// # Errors
            /// [`NvspError`], if the payload is too short, or its message is not part of the
            /// version.
            pub fn parse(payload: &[u8], agreed: Option<Version>) -> Result<Self, NvspError> {
                let (message_type, _) = split_type(payload)?;
                match message_type {
                    $(MessageType::$type => {
                        read_body(payload, agreed).map(|(body, _)| Self::$variant(body))
                    })*
                    other => Ok(Self::Other(other)),
                }
            }
        }
    };
}

messages! {
    /// What a guest sends: requests in in-band packets, [`RndisPacket`]s also in GPA-direct packets,
    /// and [`PacketComplete`] in completions.
    pub enum GuestMessage {
        INIT since V1: Init(Init),
        SEND_NDIS_VERSION since V1: NdisVersion(NdisVersion),
        SEND_RECEIVE_BUFFER since V1: SendReceiveBuffer(SendReceiveBuffer),
        REVOKE_RECEIVE_BUFFER since V1: RevokeReceiveBuffer(RevokeReceiveBuffer),
        SEND_SEND_BUFFER since V1: SendSendBuffer(SendSendBuffer),
        REVOKE_SEND_BUFFER since V1: RevokeSendBuffer(RevokeSendBuffer),
        SEND_RNDIS_PACKET since V1: RndisPacket(RndisPacket),
        SEND_RNDIS_PACKET_COMPLETE since V1: PacketComplete(PacketComplete),
        SEND_NDIS_CONFIG since V2: NdisConfig(NdisConfig),
        SWITCH_DATA_PATH since V4: SwitchDataPath(SwitchDataPath),
        SUB_CHANNEL since V5: SubChannel(SubChannelRequest),
    }
}

/// Makes the enumeration of the messages of the host: the two that go both ways have their [`Body`]
/// already, and two have a tail.
macro_rules! host_messages {
    ($($type:ident since $since:ident: $body:ident,)*) => {
        $(
            impl Body for $body {
                const TYPE: MessageType = MessageType::$type;
                const SINCE: Version = Version::$since;
            }

            const _: () = assert!(size_of::<$body>() + HEADER_SIZE <= MESSAGE_SIZE);
        )*
    };
}

host_messages! {
    INIT_COMPLETE since V1: InitComplete,
    SEND_RECEIVE_BUFFER_COMPLETE since V1: ReceiveBufferComplete,
    SEND_SEND_BUFFER_COMPLETE since V1: SendBufferComplete,
    SEND_VF_ASSOCIATION since V4: VfAssociation,
    SUB_CHANNEL since V5: SubChannelComplete,
    SEND_INDIRECTION_TABLE since V5: IndirectionTableHeader,
}

/// What a host sends: answers in completions, [`RndisPacket`]s in transfer-page packets, and the rest
/// in in-band packets.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum HostMessage<'a> {
    /// [`MessageType::INIT_COMPLETE`].
    InitComplete(InitComplete),
    /// [`MessageType::SEND_RECEIVE_BUFFER_COMPLETE`], with its sections: none after a failure, else
    /// at most [`MAX_SECTIONS`].
    ReceiveBufferComplete(ReceiveBufferComplete, &'a [ReceiveBufferSection]),
    /// [`MessageType::SEND_SEND_BUFFER_COMPLETE`].
    SendBufferComplete(SendBufferComplete),
    /// [`MessageType::SEND_RNDIS_PACKET`].
    RndisPacket(RndisPacket),
    /// [`MessageType::SEND_RNDIS_PACKET_COMPLETE`].
    PacketComplete(PacketComplete),
    /// [`MessageType::SEND_VF_ASSOCIATION`].
    VfAssociation(VfAssociation),
    /// [`MessageType::SUB_CHANNEL`].
    SubChannel(SubChannelComplete),
    /// [`MessageType::SEND_INDIRECTION_TABLE`].
    IndirectionTable(SendTable),
    /// A message of another type.
    Other(MessageType),
}

impl<'a> HostMessage<'a> {
    /// Parses the payload of a packet. `agreed` is the version in use.
    ///
    /// # Errors
    /// [`NvspError`], if the payload is too short, its message is not part of the version, or its
    /// counts and offsets do not hold together.
    pub fn parse(payload: &'a [u8], agreed: Option<Version>) -> Result<Self, NvspError> {
        /// A message without a tail.
        fn plain<'a, B: Body>(
            payload: &[u8],
            agreed: Option<Version>,
            make: impl FnOnce(B) -> HostMessage<'a>,
        ) -> Result<HostMessage<'a>, NvspError> {
            read_body(payload, agreed).map(|(body, _)| make(body))
        }
        let (message_type, _) = split_type(payload)?;
        match message_type {
            MessageType::INIT_COMPLETE => plain(payload, agreed, Self::InitComplete),
            MessageType::SEND_RECEIVE_BUFFER_COMPLETE => {
                let (body, tail) = read_body::<ReceiveBufferComplete>(payload, agreed)?;
                body.sections(tail, payload.len())
                    .map(|sections| Self::ReceiveBufferComplete(body, sections))
            }
            MessageType::SEND_SEND_BUFFER_COMPLETE => {
                plain(payload, agreed, Self::SendBufferComplete)
            }
            MessageType::SEND_RNDIS_PACKET => plain(payload, agreed, Self::RndisPacket),
            MessageType::SEND_RNDIS_PACKET_COMPLETE => plain(payload, agreed, Self::PacketComplete),
            MessageType::SEND_VF_ASSOCIATION => plain(payload, agreed, Self::VfAssociation),
            MessageType::SUB_CHANNEL => plain(payload, agreed, Self::SubChannel),
            MessageType::SEND_INDIRECTION_TABLE => {
                let (body, _) = read_body::<IndirectionTableHeader>(payload, agreed)?;
                SendTable::parse(&body, payload, agreed).map(Self::IndirectionTable)
            }
            other => Ok(Self::Other(other)),
        }
    }
}

pub use super::nvsp_body::*;
