// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Receive side scaling: the hash of a frame's addresses chooses the channel that the frame comes on.
//!
//! The host says how many channels there can be ([`Capabilities`]); the guest sets a key for the hash
//! and a table from the lowest bits of the hash to channels ([`Parameters`]). [`toeplitz`] is the hash.
//!
//! Uses `zerocopy` and `bitflags`.
//!
//! Source: `hyperv_net.h` of the kernel's network driver (`struct ndis_recv_scale_cap`, `struct
//! ndis_recv_scale_param`), and the NDIS documentation of receive side scaling.

use super::offload::{ObjectError, ObjectHeader, ObjectType};
use super::Span;
use crate::message::read_prefix;
use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes as _, FromZeros as _, IntoBytes as _};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the key of the hash.
pub const KEY_SIZE: usize = 40;

/// Entries of the table if the host does not say how many.
pub const DEFAULT_TABLE_SIZE: usize = 128;

/// Most entries of the table.
pub const MAX_TABLE_SIZE: usize = 256;

/// The key that is used if nobody sets one: that of the NDIS documentation's examples.
pub const DEFAULT_KEY: [u8; KEY_SIZE] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// What the host can do (`struct ndis_recv_scale_cap`).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Capabilities {
    /// Kind, revision, size.
    pub header: ObjectHeader,
    /// Flags.
    pub flags: U32,
    /// Number of interrupts.
    pub interrupt_count: U32,
    /// Number of channels that frames can come on.
    pub queue_count: U32,
    /// Since revision 2: entries of the table.
    pub table_size: U16,
}

const _: () = assert!(size_of::<Capabilities>() == 18);

/// Bytes of the capabilities at their first revision.
const MIN_CAPABILITIES_SIZE: usize = 16;

impl Capabilities {
    /// Flags of a host that hashes TCP over IPv4 and IPv6, and frames of the device's own choice.
    pub const FLAGS: u32 = 0x0300_0300;

    /// A host with this many channels and entries.
    pub fn new(queue_count: u32, table_size: u16) -> Self {
        Self {
            header: ObjectHeader {
                object_type: ObjectType::RSS_CAPABILITIES,
                revision: 2,
                size: U16::new(size_of::<Self>() as u16),
            },
            flags: U32::new(Self::FLAGS),
            interrupt_count: U32::new(1),
            queue_count: queue_count.into(),
            table_size: table_size.into(),
        }
    }

    /// What a guest sends to say which revision it asks for.
    pub fn query() -> Self {
        let mut query = Self::new_zeroed();
        query.header = Self::new(0, 0).header;
        query
    }

    /// Parses the value of an answer.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub fn parse(value: &[u8]) -> Result<Self, ObjectError> {
        let (_, bytes) =
            ObjectHeader::check(value, ObjectType::RSS_CAPABILITIES, MIN_CAPABILITIES_SIZE)?;
        let mut capabilities = Self::new_zeroed();
        for (to, from) in capabilities.as_mut_bytes().iter_mut().zip(bytes) {
            *to = *from;
        }
        Ok(capabilities)
    }

    /// Entries of the table that the guest should set: a number from 1 to [`MAX_TABLE_SIZE`].
    pub fn table_entries(&self) -> usize {
        match usize::from(self.table_size.get()) {
            size @ 1..=MAX_TABLE_SIZE => size,
            _ => DEFAULT_TABLE_SIZE,
        }
    }
}

/// What of the parameters counts. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct ParameterFlags(u16);

bitflags! {
    impl ParameterFlags: u16 {
        /// Not the base CPU.
        const BASE_CPU_UNCHANGED = 0x01;
        /// Not the hash.
        const HASH_INFO_UNCHANGED = 0x02;
        /// Not the table.
        const TABLE_UNCHANGED = 0x04;
        /// Not the key.
        const KEY_UNCHANGED = 0x08;
        /// All frames come on the primary channel from now on.
        const DISABLE = 0x10;
        const _ = !0;
    }
}

/// Hash, and what of a frame goes into it. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct HashInfo(u32);

bitflags! {
    impl HashInfo: u32 {
        /// [`toeplitz`].
        const TOEPLITZ = 0x0001;
        /// Addresses of IPv4.
        const IPV4 = 0x0100;
        /// Addresses and ports of TCP over IPv4.
        const TCP_IPV4 = 0x0200;
        /// Addresses of IPv6.
        const IPV6 = 0x0400;
        /// Addresses of IPv6, those in extension headers too.
        const IPV6_EX = 0x0800;
        /// Addresses and ports of TCP over IPv6.
        const TCP_IPV6 = 0x1000;
        /// The same with addresses in extension headers.
        const TCP_IPV6_EX = 0x2000;
        const _ = !0;
    }
}

impl HashInfo {
    /// What a guest asks for.
    pub const GUEST: Self = Self::TOEPLITZ
        .union(Self::IPV4)
        .union(Self::TCP_IPV4)
        .union(Self::IPV6)
        .union(Self::TCP_IPV6);
}

/// Start of the value that sets key and table (`struct ndis_recv_scale_param`); both follow.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ParametersHeader {
    /// Kind, revision, size of this structure without what follows.
    pub header: ObjectHeader,
    /// [`ParameterFlags`].
    pub flags: U16,
    /// Not used.
    pub base_cpu: U16,
    /// [`HashInfo`].
    pub hash_info: U32,
    /// Bytes of the table; an entry has 4.
    pub table_size: U16,
    /// Zero.
    pub reserved: U16,
    /// Where the table starts, in bytes from the start of this structure.
    pub table_offset: U32,
    /// Bytes of the key.
    pub key_size: U16,
    /// Zero.
    pub reserved2: U16,
    /// Where the key starts, in bytes from the start of this structure.
    pub key_offset: U32,
    /// Not used.
    pub processor_masks_offset: U32,
    /// Not used.
    pub processor_mask_count: U32,
    /// Not used.
    pub processor_mask_size: U32,
}

const _: () = assert!(size_of::<ParametersHeader>() == 40);

/// Bytes of the parameters at their first revision: without the processor masks.
const MIN_PARAMETERS_SIZE: usize = 28;

/// Most bytes of the value that sets key and table.
pub const MAX_PARAMETERS_SIZE: usize =
    size_of::<ParametersHeader>() + size_of::<U32>() * MAX_TABLE_SIZE + KEY_SIZE;

/// What a guest sets. Key and table are views of the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters<'a> {
    /// What counts.
    pub flags: ParameterFlags,
    /// The hash.
    pub hash_info: HashInfo,
    /// Channels; empty if the table does not change.
    pub table: &'a [U32],
    /// Key, of at most [`KEY_SIZE`] bytes; empty if it does not change.
    pub key: &'a [u8],
}

impl<'a> Parameters<'a> {
    /// Parses the value of a request.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub fn parse(value: &'a [u8]) -> Result<Self, ObjectError> {
        ObjectHeader::check(value, ObjectType::RSS_PARAMETERS, MIN_PARAMETERS_SIZE)?;
        let size = value.len();
        let header: ParametersHeader = read_prefix(value).ok_or(ObjectError::Truncated(size))?;
        let flags = ParameterFlags::from_bits_retain(header.flags.get());
        let part = |offset: U32, len: U16, max: usize| {
            let (offset, len) = (offset.get(), u32::from(len.get()));
            Span { offset, len }
                .of(value)
                .filter(|part| !part.is_empty() && part.len() <= max)
                .ok_or(ObjectError::Table { offset, len })
        };
        let off = flags.contains(ParameterFlags::DISABLE);
        let table = if off || flags.contains(ParameterFlags::TABLE_UNCHANGED) {
            &[]
        } else {
            let max = MAX_TABLE_SIZE.saturating_mul(size_of::<U32>());
            let table = part(header.table_offset, header.table_size, max)?;
            <[U32]>::ref_from_bytes(table).map_err(|_| ObjectError::Table {
                offset: header.table_offset.get(),
                len: header.table_size.get().into(),
            })?
        };
        let key = if off || flags.contains(ParameterFlags::KEY_UNCHANGED) {
            &[][..]
        } else {
            part(header.key_offset, header.key_size, KEY_SIZE)?
        };
        Ok(Self {
            flags,
            hash_info: HashInfo::from_bits_retain(header.hash_info.get()),
            table,
            key,
        })
    }
}

/// Writes the value that sets key and table to the start of `out`. Returns its length; `None` if there
/// is no room, or the table has more than [`MAX_TABLE_SIZE`] entries.
///
/// Hosts want RSS to be disabled before it is changed: set it once with [`ParameterFlags::DISABLE`],
/// and once with no flags.
pub fn encode_parameters(
    out: &mut [u8],
    flags: ParameterFlags,
    table: &[u16],
    key: &[u8; KEY_SIZE],
) -> Option<usize> {
    if table.len() > MAX_TABLE_SIZE {
        return None;
    }
    let table_at = size_of::<ParametersHeader>();
    let table_size = table.len().checked_mul(size_of::<U32>())?;
    let key_at = table_at.checked_add(table_size)?;
    let end = key_at.checked_add(KEY_SIZE)?;
    let header = ParametersHeader {
        header: ObjectHeader {
            object_type: ObjectType::RSS_PARAMETERS,
            revision: 2,
            size: U16::new(size_of::<ParametersHeader>() as u16),
        },
        flags: flags.bits().into(),
        hash_info: HashInfo::GUEST.bits().into(),
        table_size: u16::try_from(table_size).ok()?.into(),
        table_offset: U32::new(table_at as u32),
        key_size: U16::new(KEY_SIZE as u16),
        key_offset: u32::try_from(key_at).ok()?.into(),
        ..ParametersHeader::new_zeroed()
    };
    let entries = table
        .iter()
        .flat_map(|&entry| u32::from(entry).to_le_bytes());
    let bytes = header.as_bytes().iter().copied().chain(entries);
    for (to, from) in out.get_mut(..end)?.iter_mut().zip(bytes.chain(*key)) {
        *to = from;
    }
    Some(end)
}

/// The hash of `input` with this key. For every bit of the input that is set, the 32 bits of the key
/// that start at the same place go into it. An input of more than 36 bytes uses the key from its start
/// again.
pub fn toeplitz(key: &[u8; KEY_SIZE], input: &[u8]) -> u32 {
    let [a, b, c, d, rest @ ..] = key;
    let mut window = u32::from_be_bytes([*a, *b, *c, *d]);
    let mut coming = rest.iter().chain(key).copied().cycle();
    let mut hash = 0;
    for byte in input {
        let mut next = coming.next().unwrap_or(0);
        for bit in (0..8).rev() {
            if byte >> bit & 1 != 0 {
                hash ^= window;
            }
            window = window << 1 | u32::from(next >> 7);
            next <<= 1;
        }
    }
    hash
}
