// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Per-packet information: what is known of a frame beside its bytes.
//!
//! It is a row of items between the header of an RNDIS message and the frame. An item has its size, so
//! that unknown ones can be passed over. The walk ([`PacketInfo`]) goes on by at least the size of an
//! item's header or stops; an item that does not fit ends it with an error.
//!
//! ```
//! use hv_proto::net::ppi::{Facts, Info, InfoWriter, Vlan};
//!
//! let mut writer = InfoWriter::new();
//! writer.put(Info::Vlan(Vlan::new(100, 3, false))).unwrap();
//! writer.put(Info::Hash(0x1234_5678)).unwrap();
//! let facts = Facts::from_guest(writer.as_bytes()).unwrap();
//! assert_eq!(facts.vlan.map(|vlan| vlan.id()), Some(100));
//! assert_eq!(facts.hash, Some(0x1234_5678));
//! assert_eq!(facts.lso, None);
//! ```
//!
//! Uses `zerocopy`.
//!
//! Source: `hyperv_net.h` of the kernel's network driver (`struct rndis_per_packet_info`, `enum
//! ndis_per_pkt_info_type`).

pub use super::ppi_value::*;

use crate::message::{read_prefix, split_prefix};
use core::fmt;
use zerocopy::little_endian::U32;
use zerocopy::IntoBytes as _;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the header of an item.
pub const ITEM_HEADER_SIZE: usize = size_of::<ItemHeader>();

/// Most bytes of items that are accepted for one frame; more than all known items need.
pub const MAX_INFO_SIZE: usize = 512;

/// Bytes of an item whose value is a number of 32 bits, as all are that this crate writes.
const WORD_ITEM_SIZE: usize = ITEM_HEADER_SIZE + 4;

/// Most items that this crate writes for one frame.
const MAX_WRITTEN: usize = 5;

/// Most bytes of items that this crate writes for one frame.
pub const MAX_WRITTEN_SIZE: usize = MAX_WRITTEN * WORD_ITEM_SIZE;

open_enum! {
    /// What an item is about.
    pub struct InfoType: u32 {
        /// Checksums.
        TCP_IP_CHECKSUM = 0,
        /// IPsec.
        IPSEC = 1,
        /// Large send.
        TCP_LARGE_SEND = 2,
        /// Handle of a class.
        CLASSIFICATION_HANDLE = 3,
        /// Scatter-gather list.
        SG_LIST = 5,
        /// VLAN tag.
        IEEE_8021Q = 6,
        /// The original packet.
        ORIGINAL_PACKET = 7,
        /// Hash of the flow.
        HASH_VALUE = 8,
        /// The original list of buffers.
        ORIGINAL_NET_BUFFER_LIST = 9,
        /// The stored list of buffers.
        CACHED_NET_BUFFER_LIST = 10,
        /// Padding of short frames.
        SHORT_PACKET_PADDING = 11,
    }
}

open_enum! {
    /// What an item is about that only this protocol has.
    pub struct InternalType: u32 {
        /// [`PacketId`].
        PACKET_ID = 1,
    }
}

/// What every item starts with.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ItemHeader {
    /// Bytes of the item, with this header.
    pub size: U32,
    /// Lower 31 bits: [`InfoType`], or with the highest bit set [`InternalType`].
    pub kind: U32,
    /// Where the value starts, in bytes from the start of this header.
    pub offset: U32,
}

/// Highest bit of [`ItemHeader::kind`].
const INTERNAL: u32 = 1 << 31;

/// What is wrong with per-packet information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InfoError {
    /// More than [`MAX_INFO_SIZE`] bytes.
    TooLong(usize),
    /// Bytes are left that are no item.
    Leftover(usize),
    /// An item is smaller than its header, or larger than what is left.
    ItemSize(u32),
    /// The value of an item starts in its header or after its end.
    ValueOffset(u32),
    /// The value of an item is too short for its type.
    ValueSize {
        /// The item's [`ItemHeader::kind`].
        kind: u32,
        /// Bytes of the value.
        len: usize,
    },
    /// The same item comes twice; the number is its [`ItemHeader::kind`].
    Twice(u32),
    /// There is no room for another item.
    Full,
}

impl fmt::Display for InfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TooLong(len) => write!(f, "{len} bytes of packet information are too many"),
            Self::Leftover(len) => write!(f, "{len} bytes of packet information are no item"),
            Self::ItemSize(size) => write!(f, "bad size {size} of a packet information item"),
            Self::ValueOffset(offset) => {
                write!(f, "bad value offset {offset} of a packet information item")
            }
            Self::ValueSize { kind, len } => {
                write!(f, "packet information {kind:#x} has only {len} bytes")
            }
            Self::Twice(kind) => write!(f, "packet information {kind:#x} comes twice"),
            Self::Full => f.write_str("no room for more packet information"),
        }
    }
}

impl core::error::Error for InfoError {}

/// An item of per-packet information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item<'a> {
    /// [`ItemHeader::kind`].
    pub kind: u32,
    /// The value.
    pub value: &'a [u8],
}

impl Item<'_> {
    /// What the item is about, if it is one of NDIS.
    pub fn info_type(&self) -> Option<InfoType> {
        (self.kind & INTERNAL == 0).then(|| InfoType::new(self.kind))
    }

    /// What the item is about, if it is one of this protocol only.
    pub fn internal_type(&self) -> Option<InternalType> {
        (self.kind & INTERNAL != 0).then(|| InternalType::new(self.kind & !INTERNAL))
    }

    fn read<T: zerocopy::FromBytes>(&self) -> Result<T, InfoError> {
        read_prefix(self.value).ok_or(InfoError::ValueSize {
            kind: self.kind,
            len: self.value.len(),
        })
    }
}

/// Iterator over the items in a private copy of per-packet information. After an error it ends.
#[derive(Clone, Debug)]
pub struct PacketInfo<'a> {
    rest: &'a [u8],
}

impl<'a> PacketInfo<'a> {
    /// The items in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn split(bytes: &'a [u8]) -> Result<(Item<'a>, &'a [u8]), InfoError> {
        let (header, _) =
            split_prefix::<ItemHeader>(bytes).ok_or(InfoError::Leftover(bytes.len()))?;
        let bad_size = InfoError::ItemSize(header.size.get());
        let size = usize::try_from(header.size.get()).map_err(|_| bad_size)?;
        if size < ITEM_HEADER_SIZE {
            return Err(bad_size);
        }
        let item = bytes.get(..size).ok_or(bad_size)?;
        let value = usize::try_from(header.offset.get())
            .ok()
            .filter(|&offset| offset >= ITEM_HEADER_SIZE)
            .and_then(|offset| item.get(offset..))
            .ok_or(InfoError::ValueOffset(header.offset.get()))?;
        let kind = header.kind.get();
        Ok((Item { kind, value }, bytes.get(size..).unwrap_or_default()))
    }
}

impl<'a> Iterator for PacketInfo<'a> {
    type Item = Result<Item<'a>, InfoError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        match Self::split(self.rest) {
            Ok((item, rest)) => {
                self.rest = rest;
                Some(Ok(item))
            }
            Err(error) => {
                self.rest = &[];
                Some(Err(error))
            }
        }
    }
}

/// An item to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Info {
    /// Checksums, from [`SendChecksum::encode`] or [`ReceivedChecksum::encode`].
    Checksum(Checksum),
    /// Large send, from [`LargeSend::encode`].
    LargeSend(u32),
    /// VLAN tag.
    Vlan(Vlan),
    /// Hash of the flow.
    Hash(u32),
    /// Part of a frame.
    PacketId(PacketId),
}

impl Info {
    /// Kind and value.
    fn item(self) -> [u8; WORD_ITEM_SIZE] {
        let (kind, value) = match self {
            Self::Checksum(checksum) => (InfoType::TCP_IP_CHECKSUM.get(), checksum.0),
            Self::LargeSend(value) => (InfoType::TCP_LARGE_SEND.get(), value),
            Self::Vlan(vlan) => (InfoType::IEEE_8021Q.get(), vlan.encode()),
            Self::Hash(hash) => (InfoType::HASH_VALUE.get(), hash),
            Self::PacketId(id) => {
                let [a, b] = id.packet_id.get().to_le_bytes();
                (
                    InternalType::PACKET_ID.get() | INTERNAL,
                    u32::from_le_bytes([id.version, id.flags, a, b]),
                )
            }
        };
        let words = [WORD_ITEM_SIZE as u32, kind, ITEM_HEADER_SIZE as u32, value].map(U32::new);
        let mut bytes = [0; WORD_ITEM_SIZE];
        for (to, from) in bytes.iter_mut().zip(words.as_bytes()) {
            *to = *from;
        }
        bytes
    }
}

/// Writes items one after the other.
#[derive(Clone, Copy, Debug)]
pub struct InfoWriter {
    bytes: [u8; MAX_WRITTEN_SIZE],
    len: usize,
}

impl InfoWriter {
    /// Nothing is written.
    pub const fn new() -> Self {
        Self {
            bytes: [0; MAX_WRITTEN_SIZE],
            len: 0,
        }
    }

    /// Adds an item.
    ///
    /// # Errors
    /// [`InfoError::Full`] after one item of each kind.
    pub fn put(&mut self, info: Info) -> Result<(), InfoError> {
        let rest = self.bytes.get_mut(self.len..).ok_or(InfoError::Full)?;
        *rest.first_chunk_mut().ok_or(InfoError::Full)? = info.item();
        self.len = self.len.saturating_add(WORD_ITEM_SIZE);
        Ok(())
    }

    /// The items.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl Default for InfoWriter {
    fn default() -> Self {
        Self::new()
    }
}

/// What the items of a frame say, as far as it is understood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Checksums; [`SendChecksum::decode`] or [`ReceivedChecksum::decode`] knows the meaning.
    pub checksum: Option<Checksum>,
    /// Large send; [`LargeSend::decode`] knows the meaning.
    pub lso: Option<u32>,
    /// VLAN tag.
    pub vlan: Option<Vlan>,
    /// Hash of the flow.
    pub hash: Option<u32>,
    /// Part of a frame.
    pub packet_id: Option<PacketId>,
}

impl Facts {
    /// Reads a private copy of the items of a frame that a guest sends.
    ///
    /// # Errors
    /// [`InfoError`].
    pub fn from_guest(info: &[u8]) -> Result<Self, InfoError> {
        Self::read(info, false)
    }

    /// Reads a private copy of the items of a frame that a host sends.
    ///
    /// # Errors
    /// [`InfoError`].
    pub fn from_host(info: &[u8]) -> Result<Self, InfoError> {
        Self::read(info, true)
    }

    fn read(info: &[u8], parts: bool) -> Result<Self, InfoError> {
        if info.len() > MAX_INFO_SIZE {
            return Err(InfoError::TooLong(info.len()));
        }
        let mut facts = Self::default();
        for item in PacketInfo::new(info) {
            let item = item?;
            let word = || item.read::<U32>().map(U32::get);
            let twice = match (item.info_type(), item.internal_type()) {
                (Some(InfoType::TCP_IP_CHECKSUM), _) => {
                    facts.checksum.replace(Checksum(word()?)).is_some()
                }
                (Some(InfoType::TCP_LARGE_SEND), _) => facts.lso.replace(word()?).is_some(),
                (Some(InfoType::IEEE_8021Q), _) => {
                    facts.vlan.replace(Vlan::decode(word()?)).is_some()
                }
                (Some(InfoType::HASH_VALUE), _) => facts.hash.replace(word()?).is_some(),
                (_, Some(InternalType::PACKET_ID)) if parts => {
                    facts.packet_id.replace(item.read()?).is_some()
                }
                _ => false,
            };
            if twice {
                return Err(InfoError::Twice(item.kind));
            }
        }
        Ok(facts)
    }
}
