// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the messages of NVSP carry. [`super::nvsp`] has their numbers and parsers, and exports
//! these.
//!
//! Uses `zerocopy`. Source: `hyperv_net.h` of the kernel's network driver.

use super::nvsp::*;
use super::{RECEIVE_BUFFER_ID, SEND_BUFFER_ID};
use crate::ids::GpadlId;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::FromBytes as _;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// INIT: proposes the versions from `min` to `max`; guests propose one.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Init {
    /// The oldest version.
    pub min: U32,
    /// The newest version.
    pub max: U32,
}

impl Init {
    /// Proposes this version and no other.
    pub fn propose(version: Version) -> Self {
        let raw = U32::new(version.raw());
        Self { min: raw, max: raw }
    }
}

/// INIT_COMPLETE: whether the host takes the version.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct InitComplete {
    /// Not used any more: hosts may send any number.
    pub negotiated_version: U32,
    /// Most pieces of memory of a message.
    pub max_mdl_chain_length: U32,
    /// [`Status::SUCCESS`] if it does.
    pub status: Status,
}

impl InitComplete {
    /// Value of [`InitComplete::negotiated_version`] in which nothing is to be read.
    pub const NO_VERSION: u32 = u32::MAX;
}

/// SEND_NDIS_VERSION.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct NdisVersion {
    /// Major version.
    pub major: U32,
    /// Minor version.
    pub minor: U32,
}

/// SEND_RECEIVE_BUFFER: the host may put what it sends into this memory.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SendReceiveBuffer {
    /// The GPADL that describes the memory.
    pub gpadl: GpadlId,
    /// Number of the buffer.
    pub id: U16,
}

impl SendReceiveBuffer {
    /// Shares the memory of this GPADL.
    pub fn new(gpadl: GpadlId) -> Self {
        let id = U16::new(RECEIVE_BUFFER_ID);
        Self { gpadl, id }
    }
}

/// SEND_RECEIVE_BUFFER_COMPLETE, without the sections that follow it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ReceiveBufferComplete {
    /// [`Status::SUCCESS`] if the host uses the buffer.
    pub status: Status,
    /// How many [`ReceiveBufferSection`] follow.
    pub section_count: U32,
}

/// A part of the receive buffer that the host has divided into equal pieces.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct ReceiveBufferSection {
    /// Where it starts in the buffer, in bytes.
    pub offset: U32,
    /// Size of a piece, in bytes.
    pub piece_size: U32,
    /// Number of pieces.
    pub piece_count: U32,
    /// Where it ends in the buffer, in bytes.
    pub end_offset: U32,
}

impl ReceiveBufferComplete {
    /// Bytes of an answer with one section.
    pub const ANSWER_SIZE: usize =
        HEADER_SIZE + size_of::<Self>() + size_of::<ReceiveBufferSection>();

    /// Finds the sections in what follows the fixed part.
    pub(super) fn sections<'a>(
        &self,
        tail: &'a [u8],
        len: usize,
    ) -> Result<&'a [ReceiveBufferSection], NvspError> {
        if self.status != Status::SUCCESS {
            return Ok(&[]);
        }
        let bad = NvspError::SectionCount(self.section_count.get());
        let count = match usize::try_from(self.section_count.get()) {
            Ok(count @ 1..=MAX_SECTIONS) => count,
            _ => return Err(bad),
        };
        let (sections, _) = <[ReceiveBufferSection]>::ref_from_prefix_with_elems(tail, count)
            .map_err(|_| NvspError::Truncated {
                message_type: Self::TYPE,
                len,
                need: count
                    .saturating_mul(size_of::<ReceiveBufferSection>())
                    .saturating_add(HEADER_SIZE + size_of::<Self>()),
            })?;
        Ok(sections)
    }

    /// The answer of a host that uses the buffer with this one section.
    pub fn with_section(section: ReceiveBufferSection) -> [u8; MESSAGE_SIZE] {
        let complete = Self {
            status: Status::SUCCESS,
            section_count: U32::new(1),
        };
        let mut message = complete.encode();
        let start = HEADER_SIZE + size_of::<Self>();
        let place = message.iter_mut().skip(start);
        for (to, from) in place.zip(zerocopy::IntoBytes::as_bytes(&section)) {
            *to = *from;
        }
        message
    }

    /// The answer of a host that does not use the buffer.
    pub fn failed(status: Status) -> [u8; MESSAGE_SIZE] {
        let section_count = U32::ZERO;
        Self {
            status,
            section_count,
        }
        .encode()
    }
}

const _: () = assert!(ReceiveBufferComplete::ANSWER_SIZE <= MESSAGE_SIZE);

/// REVOKE_RECEIVE_BUFFER. It has no answer.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RevokeReceiveBuffer {
    /// Number of the buffer.
    pub id: U16,
}

impl RevokeReceiveBuffer {
    /// Takes the receive buffer back.
    pub fn new() -> Self {
        let id = U16::new(RECEIVE_BUFFER_ID);
        Self { id }
    }
}

impl Default for RevokeReceiveBuffer {
    fn default() -> Self {
        Self::new()
    }
}

/// SEND_SEND_BUFFER: the guest will put what it sends into this memory.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SendSendBuffer {
    /// The GPADL that describes the memory.
    pub gpadl: GpadlId,
    /// Number of the buffer.
    pub id: U16,
}

impl SendSendBuffer {
    /// Shares the memory of this GPADL.
    pub fn new(gpadl: GpadlId) -> Self {
        let id = U16::new(SEND_BUFFER_ID);
        Self { gpadl, id }
    }
}

/// SEND_SEND_BUFFER_COMPLETE.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SendBufferComplete {
    /// [`Status::SUCCESS`] if the host uses the buffer.
    pub status: Status,
    /// Size of a section, in bytes.
    pub section_size: U32,
}

/// REVOKE_SEND_BUFFER. It has no answer.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RevokeSendBuffer {
    /// Number of the buffer.
    pub id: U16,
}

impl RevokeSendBuffer {
    /// Takes the send buffer back.
    pub fn new() -> Self {
        let id = U16::new(SEND_BUFFER_ID);
        Self { id }
    }
}

impl Default for RevokeSendBuffer {
    fn default() -> Self {
        Self::new()
    }
}

/// SEND_RNDIS_PACKET: says where an RNDIS message is.
///
/// From the guest it is in a section of the send buffer, or in the memory that the GPA-direct packet
/// names, or begins in the one and goes on in the other. From the host it is in the ranges that the
/// transfer-page packet names.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RndisPacket {
    /// What kind of message.
    pub channel_type: ChannelType,
    /// Index of the section, or [`NO_SECTION`].
    pub section_index: U32,
    /// Bytes that are used of the section; 0 without one.
    pub section_size: U32,
}

impl RndisPacket {
    /// The message is not in a section.
    pub fn outside(channel_type: ChannelType) -> Self {
        Self {
            channel_type,
            section_index: U32::new(NO_SECTION),
            section_size: U32::ZERO,
        }
    }

    /// The message is, or begins, in `size` bytes of section `index`.
    pub fn in_section(channel_type: ChannelType, index: u32, size: u32) -> Self {
        Self {
            channel_type,
            section_index: U32::new(index),
            section_size: U32::new(size),
        }
    }

    /// Index of the section, and how many bytes of it are used; `None` without a section.
    pub fn section(&self) -> Option<(u32, u32)> {
        let index = self.section_index.get();
        (index != NO_SECTION).then_some((index, self.section_size.get()))
    }
}

/// SEND_RNDIS_PACKET_COMPLETE: the sender may use the memory of the message again.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PacketComplete {
    /// [`Status::SUCCESS`], or what was wrong with the message.
    pub status: Status,
}

impl PacketComplete {
    /// Bytes of the message when it is not filled up.
    pub const SHORT_SIZE: usize = HEADER_SIZE + size_of::<Self>();

    /// The message without filling: what a guest sends for each packet that it received.
    pub fn encode_short(&self) -> [u8; Self::SHORT_SIZE] {
        let [a, b, c, d] = Self::TYPE.get().to_le_bytes();
        let [e, f, g, h] = self.status.get().to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }
}

/// SEND_NDIS_CONFIG: what the guest is like. It has no answer.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct NdisConfig {
    /// The largest frame with its Ethernet header, in bytes.
    pub frame_size: U32,
    /// Zero.
    pub reserved: U32,
    /// [`Capabilities`].
    pub capabilities: U64,
}

impl NdisConfig {
    /// Frames of at most `frame_size` bytes, and these capabilities.
    pub fn new(frame_size: u32, capabilities: Capabilities) -> Self {
        Self {
            frame_size: frame_size.into(),
            reserved: U32::ZERO,
            capabilities: capabilities.bits().into(),
        }
    }

    /// What the guest can do.
    pub fn capabilities(&self) -> Capabilities {
        Capabilities::from_bits_retain(self.capabilities.get())
    }
}

/// SEND_VF_ASSOCIATION: a virtual function has come or gone.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct VfAssociation {
    /// 0 if it has gone.
    pub allocated: U32,
    /// Serial number of its PCI slot.
    pub serial: U32,
}

impl VfAssociation {
    /// The serial number of the function that is there, if one is.
    pub fn serial(&self) -> Option<u32> {
        (self.allocated.get() != 0).then(|| self.serial.get())
    }
}

/// SWITCH_DATA_PATH. The completion of its packet has no payload.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SwitchDataPath {
    /// The way that frames go from now on.
    pub active: DataPath,
}

/// SUB_CHANNEL of the guest.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SubChannelRequest {
    /// What to do.
    pub operation: SubChannelOperation,
    /// How many sub-channels.
    pub count: U32,
}

impl SubChannelRequest {
    /// Asks for `count` sub-channels.
    pub fn allocate(count: u32) -> Self {
        Self {
            operation: SubChannelOperation::ALLOCATE,
            count: count.into(),
        }
    }
}

/// SUB_CHANNEL of the host: the answer.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SubChannelComplete {
    /// [`Status::SUCCESS`] if there are some.
    pub status: Status,
    /// How many the host offers: as many as were asked for, or less.
    pub count: U32,
}

/// SEND_INDIRECTION_TABLE, without the table.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct IndirectionTableHeader {
    /// Number of entries: [`SEND_TABLE_SIZE`].
    pub count: U32,
    /// Where the table starts, in bytes from the start of the message.
    pub offset: U32,
}

/// The channel that a guest shall send a frame on, for each remainder of the frame's hash by
/// [`SEND_TABLE_SIZE`].
///
/// The entries are as the host sent them; [`SendTable::channel`] keeps them in range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendTable(pub [u32; SEND_TABLE_SIZE]);

impl SendTable {
    /// Bytes of the message with its table.
    pub const MESSAGE_SIZE: usize = MESSAGE_SIZE + size_of::<U32>() * SEND_TABLE_SIZE;

    /// Frames go over all of `channels` channels in turn.
    pub fn spread(channels: u32) -> Self {
        let mut table = [0; SEND_TABLE_SIZE];
        for (n, entry) in (0u32..).zip(&mut table) {
            *entry = n.checked_rem(channels).unwrap_or(0);
        }
        Self(table)
    }

    /// Index of the channel for a frame with this hash, less than `channels`: 0 if the table names
    /// one that is not there.
    pub fn channel(&self, hash: u32, channels: u32) -> u32 {
        let index = hash as usize % SEND_TABLE_SIZE;
        let channel = self.0.get(index).copied().unwrap_or(0);
        if channel < channels {
            channel
        } else {
            0
        }
    }

    /// The message of a host.
    pub fn encode(&self) -> [u8; Self::MESSAGE_SIZE] {
        let header = IndirectionTableHeader {
            count: U32::new(SEND_TABLE_SIZE as u32),
            offset: U32::new(MESSAGE_SIZE as u32),
        };
        let mut message = [0; Self::MESSAGE_SIZE];
        let table = self.0.iter().flat_map(|entry| entry.to_le_bytes());
        for (to, from) in message
            .iter_mut()
            .zip(header.encode().into_iter().chain(table))
        {
            *to = from;
        }
        message
    }

    /// Finds the table in its message.
    pub(super) fn parse(
        header: &IndirectionTableHeader,
        message: &[u8],
        agreed: Option<Version>,
    ) -> Result<Self, NvspError> {
        let count = header.count.get();
        if usize::try_from(count) != Ok(SEND_TABLE_SIZE) {
            return Err(NvspError::TableSize(count));
        }
        // Hosts before version 6.1 may name a wrong place; they always put the table behind the
        // room for the longest body.
        let old = agreed <= Some(Version::V6);
        let offset = if old && message.len() >= Self::MESSAGE_SIZE {
            MESSAGE_SIZE as u32
        } else {
            header.offset.get()
        };
        let bad = NvspError::TableOffset(header.offset.get());
        let tail = usize::try_from(offset)
            .ok()
            .filter(|&offset| offset >= HEADER_SIZE + size_of::<IndirectionTableHeader>())
            .and_then(|offset| message.get(offset..))
            .ok_or(bad)?;
        let (entries, _) = <[U32; SEND_TABLE_SIZE]>::read_from_prefix(tail).map_err(|_| bad)?;
        Ok(Self(entries.map(U32::get)))
    }
}
