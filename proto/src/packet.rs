// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Packets of a VMBus ring: the descriptor, and what follows it for each kind of packet.
//!
//! A packet starts with a 16-byte [`Descriptor`]. Between the descriptor and the payload a packet
//! may carry a header of its kind: the list of guest memory ranges of a GPA-direct packet
//! ([`GpaDirect`]), or the list of sections of a transfer-page packet ([`TransferPages`]).
//! Descriptor, header and payload are each a multiple of 8 bytes; the payload is padded, and its
//! exact length, where it matters, is part of the protocol inside.
//!
//! Everything here works on a private copy of a packet ([`crate::ring::Consumer::read`] makes it),
//! checks every length and count once, when it is parsed, and never panics. Uses `core`, `zerocopy`
//! and `bitflags` only.
//!
//! Source of layouts and numbers: `include/linux/hyperv.h` of the kernel (`struct
//! vmpacket_descriptor`, `struct vmdata_gpa_direct`, `struct vmtransfer_page_packet_header`, `enum
//! vmbus_packet_type`).

use bitflags::bitflags;
use core::fmt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::FromBytes as _;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a page of guest memory as the hypervisor counts it, in bytes. PFNs on the wire are in
/// this unit.
pub const PAGE_SIZE: u32 = 4096;

/// Size of the packet descriptor, in bytes.
pub const DESCRIPTOR_SIZE: u32 = 16;

/// Size of the trailer that follows every packet in the ring, in bytes.
pub const TRAILER_SIZE: u32 = 8;

/// The largest packet that a descriptor can describe (16-bit count of 8-byte units), in bytes.
pub const MAX_PACKET_SIZE: u32 = 8 * u16::MAX as u32;

/// The first page frame number whose address does not fit 64 bits.
const PFN_LIMIT: u64 = 1 << 52;

/// Size of the fixed part of a GPA-direct or transfer-page header, and of a range without its PFNs,
/// in bytes.
const RANGE_PREFIX_SIZE: usize = 8;

open_enum! {
    /// Kind of a packet (`enum vmbus_packet_type`). Kinds without a use in today's protocols are
    /// left out.
    pub struct PacketType: u16 {
        /// Payload only.
        IN_BAND = 6,
        /// Payload, and sections of a buffer that both sides agreed on before ([`TransferPages`]).
        TRANSFER_PAGES = 7,
        /// Payload, and a buffer by its GPADL handle.
        GPADL = 8,
        /// Payload, and ranges of guest memory ([`GpaDirect`]).
        GPA_DIRECT = 9,
        /// Asks the peer to give up on the request with the same transaction id.
        CANCEL = 0xa,
        /// Answer to the request with the same transaction id.
        COMPLETION = 0xb,
        /// Payload that continues in [`PacketType::ADDITIONAL_DATA`] packets.
        WITH_ADDITIONAL = 0xc,
        /// Continuation of an earlier packet.
        ADDITIONAL_DATA = 0xd,
    }
}

/// Flags of a packet descriptor. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct PacketFlags(u16);

bitflags! {
    impl PacketFlags: u16 {
        /// The sender wants a [`PacketType::COMPLETION`] packet with the same transaction id.
        const COMPLETION_REQUESTED = 1;
        const _ = !0;
    }
}

/// The 16 bytes at the start of each packet, as they are on the wire.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Descriptor {
    /// Kind of the packet.
    pub packet_type: PacketType,
    /// Start of the payload, from the start of the descriptor, in units of 8 bytes.
    pub offset8: U16,
    /// Length of the packet with descriptor and header but without trailer, in units of 8 bytes.
    pub len8: U16,
    /// [`PacketFlags`].
    pub flags: U16,
    /// Chosen by the sender of a request and repeated in its completion.
    pub transaction_id: U64,
}

const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR_SIZE as usize);

impl Descriptor {
    /// Length of descriptor, header and payload, in bytes.
    pub fn len(&self) -> u32 {
        u32::from(self.len8.get()) << 3
    }

    /// Whether the packet is said to have no bytes at all, which makes it an invalid one.
    pub fn is_empty(&self) -> bool {
        self.len8.get() == 0
    }

    /// Offset of the payload from the start of the descriptor, in bytes.
    pub fn payload_offset(&self) -> u32 {
        u32::from(self.offset8.get()) << 3
    }

    /// Checks that the lengths hold together, and that the packet with its trailer fits in
    /// `available` bytes.
    ///
    /// # Errors
    /// [`PacketError::Length`] or [`PacketError::PayloadOffset`].
    pub fn validate(&self, available: u32) -> Result<(), PacketError> {
        let len = self.len();
        if len < DESCRIPTOR_SIZE || len.saturating_add(TRAILER_SIZE) > available {
            return Err(PacketError::Length { len, available });
        }
        let offset = self.payload_offset();
        if offset < DESCRIPTOR_SIZE || offset > len {
            return Err(PacketError::PayloadOffset { offset, len });
        }
        Ok(())
    }
}

/// What is wrong with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PacketError {
    /// The packet is shorter than a descriptor, or, with its trailer, longer than the bytes that
    /// are there.
    Length {
        /// The length that the descriptor tells, in bytes.
        len: u32,
        /// What there is, in bytes.
        available: u32,
    },
    /// The payload starts inside the descriptor or after the end of the packet.
    PayloadOffset {
        /// The offset that the descriptor tells, in bytes.
        offset: u32,
        /// The length of the packet, in bytes.
        len: u32,
    },
    /// The packet is not of the kind that was asked for.
    Type(PacketType),
    /// The header of a GPA-direct or transfer-page packet is shorter than its counts need.
    HeaderTooShort,
    /// A GPA-direct packet has no range, or more ranges than the caller accepts.
    RangeCount(u32),
    /// A GPA range starts outside of its first page.
    RangeOffset(u32),
    /// A page frame number has no 64-bit address.
    Pfn(u64),
    /// A section of a transfer-page packet ends after 4 GiB.
    SectionOverflow,
}

impl fmt::Display for PacketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { len, available } => {
                write!(
                    f,
                    "packet length {len} does not fit the {available} bytes available"
                )
            }
            Self::PayloadOffset { offset, len } => {
                write!(
                    f,
                    "payload offset {offset} does not fit packet length {len}"
                )
            }
            Self::Type(packet_type) => write!(f, "unexpected packet type {packet_type:?}"),
            Self::HeaderTooShort => f.write_str("packet header is shorter than its ranges"),
            Self::RangeCount(count) => write!(f, "bad number of GPA ranges: {count}"),
            Self::RangeOffset(offset) => {
                write!(f, "GPA range offset {offset} is outside of a page")
            }
            Self::Pfn(pfn) => write!(f, "page frame number {pfn:#x} is too large"),
            Self::SectionOverflow => f.write_str("transfer-page section is too large"),
        }
    }
}

impl core::error::Error for PacketError {}

/// What the sender chooses of a descriptor; the lengths come from the contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Kind of the packet.
    pub packet_type: PacketType,
    /// Flags of the packet.
    pub flags: PacketFlags,
    /// Transaction id: of this request, or of the request that is completed or cancelled.
    pub transaction_id: u64,
}

impl Header {
    /// An in-band packet; `completion` asks the peer to answer it.
    pub const fn in_band(transaction_id: u64, completion: bool) -> Self {
        Self::request(PacketType::IN_BAND, transaction_id, completion)
    }

    /// A GPA-direct packet; `completion` asks the peer to answer it.
    pub const fn gpa_direct(transaction_id: u64, completion: bool) -> Self {
        Self::request(PacketType::GPA_DIRECT, transaction_id, completion)
    }

    /// A transfer-page packet; `completion` asks the peer to answer it.
    pub const fn transfer_pages(transaction_id: u64, completion: bool) -> Self {
        Self::request(PacketType::TRANSFER_PAGES, transaction_id, completion)
    }

    /// The answer to request `transaction_id`.
    pub const fn completion(transaction_id: u64) -> Self {
        Self::request(PacketType::COMPLETION, transaction_id, false)
    }

    /// Asks the peer to give up on request `transaction_id`.
    pub const fn cancel(transaction_id: u64) -> Self {
        Self::request(PacketType::CANCEL, transaction_id, false)
    }

    const fn request(packet_type: PacketType, transaction_id: u64, completion: bool) -> Self {
        let flags = if completion {
            PacketFlags::COMPLETION_REQUESTED
        } else {
            PacketFlags::empty()
        };
        Self {
            packet_type,
            flags,
            transaction_id,
        }
    }
}

/// A received packet: a view of a private copy whose lengths have been checked.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    descriptor: Descriptor,
    header: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Views `bytes`, which start with the descriptor and do not contain the trailer.
    ///
    /// # Errors
    /// [`PacketError::Length`] or [`PacketError::PayloadOffset`] if the descriptor does not fit
    /// `bytes`.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, PacketError> {
        let available = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let short = |len| PacketError::Length { len, available };
        let (descriptor, _) = Descriptor::read_from_prefix(bytes).map_err(|_| short(0))?;
        descriptor.validate(available.saturating_add(TRAILER_SIZE))?;
        let (len, offset) = (descriptor.len(), descriptor.payload_offset());
        let packet = bytes.get(..len as usize).ok_or(short(len))?;
        let split = |range| packet.get(range).ok_or(short(len));
        Ok(Self {
            descriptor,
            header: split(DESCRIPTOR_SIZE as usize..offset as usize)?,
            payload: split(offset as usize..len as usize)?,
        })
    }

    /// Kind of the packet.
    pub fn packet_type(&self) -> PacketType {
        self.descriptor.packet_type
    }

    /// Flags of the packet.
    pub fn flags(&self) -> PacketFlags {
        PacketFlags::from_bits_retain(self.descriptor.flags.get())
    }

    /// Whether the sender waits for a completion packet.
    pub fn wants_completion(&self) -> bool {
        self.flags().contains(PacketFlags::COMPLETION_REQUESTED)
    }

    /// Transaction id, as the peer sent it.
    pub fn transaction_id(&self) -> u64 {
        self.descriptor.transaction_id.get()
    }

    /// The descriptor.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// What is between descriptor and payload: the ranges of a GPA-direct or transfer-page packet.
    pub fn header(&self) -> &'a [u8] {
        self.header
    }

    /// The payload with its padding: a multiple of 8 bytes, possibly none.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// The guest memory ranges of a GPA-direct packet, of which there may be at most `max_ranges`.
    ///
    /// # Errors
    /// [`PacketError::Type`] for another kind of packet, else what [`GpaDirect::parse`] reports.
    pub fn gpa_direct(&self, max_ranges: u32) -> Result<GpaDirect<'a>, PacketError> {
        match self.packet_type() {
            PacketType::GPA_DIRECT => GpaDirect::parse(self.header, max_ranges),
            other => Err(PacketError::Type(other)),
        }
    }

    /// The sections of a transfer-page packet.
    ///
    /// # Errors
    /// [`PacketError::Type`] for another kind of packet, else what [`TransferPages::parse`]
    /// reports.
    pub fn transfer_pages(&self) -> Result<TransferPages<'a>, PacketError> {
        match self.packet_type() {
            PacketType::TRANSFER_PAGES => TransferPages::parse(self.header),
            other => Err(PacketError::Type(other)),
        }
    }
}

/// Number of pages that `byte_count` bytes touch which start `byte_offset` bytes into a page.
///
/// ```
/// use hv_proto::packet::pages_spanned;
/// assert_eq!(pages_spanned(4095, 2), 2);
/// assert_eq!(pages_spanned(0, 4096), 1);
/// ```
pub const fn pages_spanned(byte_offset: u32, byte_count: u32) -> u64 {
    // Both are 32-bit, so the sum cannot overflow 64 bits.
    (byte_offset as u64 + byte_count as u64).div_ceil(PAGE_SIZE as u64)
}

/// A range of guest memory to send: `byte_count` bytes that start `byte_offset` bytes into the
/// first page.
#[derive(Clone, Copy, Debug)]
pub struct PageRange<'a> {
    /// Length in bytes.
    pub byte_count: u32,
    /// Start in the first page, in bytes; less than 4096.
    pub byte_offset: u32,
    /// Page frame numbers (4096-byte pages), exactly [`pages_spanned`] of them.
    pub pfns: &'a [u64],
}

/// Start of the header of a GPA-direct packet: reserved word and range count.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct GpaDirectPrefix {
    pub(crate) reserved: U32,
    pub(crate) range_count: U32,
}

/// A GPA range without its page frame numbers.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct GpaRangePrefix {
    pub(crate) byte_count: U32,
    pub(crate) byte_offset: U32,
}

const _: () = assert!(size_of::<GpaDirectPrefix>() == RANGE_PREFIX_SIZE);
const _: () = assert!(size_of::<GpaRangePrefix>() == RANGE_PREFIX_SIZE);

/// Bytes of the header of a GPA-direct packet with `ranges` ranges that have `pages` pages in
/// total.
///
/// `None` if no packet is large enough for that.
pub(crate) fn gpa_direct_header_size(ranges: usize, pages: u64) -> Option<usize> {
    let prefixes = ranges.checked_add(1)?.checked_mul(RANGE_PREFIX_SIZE)?;
    let pfns = usize::try_from(pages).ok()?.checked_mul(size_of::<U64>())?;
    prefixes.checked_add(pfns)
}

/// The ranges of guest memory that a GPA-direct packet names; all counts and PFNs are checked.
#[derive(Clone, Copy, Debug)]
pub struct GpaDirect<'a> {
    count: u32,
    byte_count: u64,
    ranges: &'a [u8],
}

impl<'a> GpaDirect<'a> {
    /// Parses the header of a GPA-direct packet: what is between its descriptor and its payload.
    ///
    /// Bytes after the last range are ignored.
    ///
    /// # Errors
    /// [`PacketError::RangeCount`] if there is no range or more than `max_ranges`,
    /// [`PacketError::HeaderTooShort`] if the ranges do not fit the header,
    /// [`PacketError::RangeOffset`] if a range starts outside of its first page,
    /// [`PacketError::Pfn`] if a page has no address.
    pub fn parse(header: &'a [u8], max_ranges: u32) -> Result<Self, PacketError> {
        let (prefix, ranges) =
            GpaDirectPrefix::read_from_prefix(header).map_err(|_| PacketError::HeaderTooShort)?;
        let count = prefix.range_count.get();
        if count == 0 || count > max_ranges {
            return Err(PacketError::RangeCount(count));
        }
        let mut byte_count = 0u64;
        let mut rest = ranges;
        // Every turn consumes at least 8 bytes of the header or fails, so a large count ends soon.
        for _ in 0..count {
            let (range, tail) = GpaRange::split_from(rest)?;
            if let Some(pfn) = range.pfns().find(|&pfn| pfn >= PFN_LIMIT) {
                return Err(PacketError::Pfn(pfn));
            }
            byte_count = byte_count.saturating_add(u64::from(range.byte_count));
            rest = tail;
        }
        Ok(Self {
            count,
            byte_count,
            ranges,
        })
    }

    /// Number of ranges; at least one.
    pub fn range_count(&self) -> u32 {
        self.count
    }

    /// Total number of bytes in all ranges.
    pub fn byte_count(&self) -> u64 {
        self.byte_count
    }

    /// The ranges in order.
    pub fn ranges(&self) -> GpaRanges<'a> {
        GpaRanges {
            left: self.count,
            rest: self.ranges,
        }
    }
}

/// Iterator over the ranges of a [`GpaDirect`].
#[derive(Clone, Debug)]
pub struct GpaRanges<'a> {
    left: u32,
    rest: &'a [u8],
}

impl<'a> Iterator for GpaRanges<'a> {
    type Item = GpaRange<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        // Cannot fail: `GpaDirect::parse` has walked the same private bytes.
        let (range, rest) = GpaRange::split_from(self.rest).ok()?;
        self.rest = rest;
        Some(range)
    }
}

/// One range of guest memory: bytes that are contiguous in the sender's view, page by page.
#[derive(Clone, Copy, Debug)]
pub struct GpaRange<'a> {
    byte_count: u32,
    byte_offset: u32,
    pfns: &'a [U64],
}

impl<'a> GpaRange<'a> {
    fn split_from(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), PacketError> {
        let too_short = PacketError::HeaderTooShort;
        let (prefix, rest) = GpaRangePrefix::read_from_prefix(bytes).map_err(|_| too_short)?;
        let (byte_count, byte_offset) = (prefix.byte_count.get(), prefix.byte_offset.get());
        if byte_offset >= PAGE_SIZE {
            return Err(PacketError::RangeOffset(byte_offset));
        }
        let pages =
            usize::try_from(pages_spanned(byte_offset, byte_count)).map_err(|_| too_short)?;
        let (pfns, rest) =
            <[U64]>::ref_from_prefix_with_elems(rest, pages).map_err(|_| too_short)?;
        Ok((
            Self {
                byte_count,
                byte_offset,
                pfns,
            },
            rest,
        ))
    }

    /// Length in bytes.
    pub fn byte_count(&self) -> u32 {
        self.byte_count
    }

    /// Start in the first page, in bytes; less than 4096.
    pub fn byte_offset(&self) -> u32 {
        self.byte_offset
    }

    /// Page frame numbers (4096-byte pages): as many as the bytes touch.
    pub fn pfns(&self) -> impl ExactSizeIterator<Item = u64> + Clone + 'a {
        self.pfns.iter().map(|pfn| pfn.get())
    }

    /// The pieces of the range, one for each page: guest physical address, and length in bytes.
    pub fn segments(&self) -> impl Iterator<Item = (u64, u32)> + Clone + 'a {
        let mut offset = self.byte_offset;
        let mut left = self.byte_count;
        self.pfns().map_while(move |pfn| {
            let len = left.min(PAGE_SIZE.saturating_sub(offset));
            // The parser has refused PFNs of 2^52 and more.
            let address = (pfn << 12) | u64::from(offset);
            left = left.saturating_sub(len);
            offset = 0;
            (len != 0).then_some((address, len))
        })
    }
}

/// Start of the header of a transfer-page packet.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TransferPagesPrefix {
    /// Number of the shared buffer that the sections are in.
    pub pageset_id: U16,
    /// Non-zero if the sender manages the buffer.
    pub sender_owns_set: u8,
    /// Zero.
    pub reserved: u8,
    /// Number of [`TransferPageRange`] that follow.
    pub range_count: U32,
}

/// A section of the shared buffer, as a transfer-page packet names it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct TransferPageRange {
    /// Length in bytes.
    pub byte_count: U32,
    /// Start in the shared buffer, in bytes.
    pub byte_offset: U32,
}

const _: () = assert!(size_of::<TransferPagesPrefix>() == RANGE_PREFIX_SIZE);
const _: () = assert!(size_of::<TransferPageRange>() == 8);

/// The sections that a transfer-page packet names; the count is checked, and no section wraps
/// around.
#[derive(Clone, Copy, Debug)]
pub struct TransferPages<'a> {
    prefix: TransferPagesPrefix,
    ranges: &'a [TransferPageRange],
}

impl<'a> TransferPages<'a> {
    /// Parses the header of a transfer-page packet: what is between its descriptor and its payload.
    ///
    /// Whether the sections are inside of the shared buffer is for the caller to check, who knows
    /// its size.
    ///
    /// # Errors
    /// [`PacketError::HeaderTooShort`] if the sections do not fit the header,
    /// [`PacketError::SectionOverflow`] if a section ends after 4 GiB.
    pub fn parse(header: &'a [u8]) -> Result<Self, PacketError> {
        let too_short = PacketError::HeaderTooShort;
        let (prefix, rest) =
            TransferPagesPrefix::read_from_prefix(header).map_err(|_| too_short)?;
        let count = usize::try_from(prefix.range_count.get()).map_err(|_| too_short)?;
        let (ranges, _) = <[TransferPageRange]>::ref_from_prefix_with_elems(rest, count)
            .map_err(|_| too_short)?;
        let overflows = |range: &TransferPageRange| {
            range
                .byte_offset
                .get()
                .checked_add(range.byte_count.get())
                .is_none()
        };
        if ranges.iter().any(overflows) {
            return Err(PacketError::SectionOverflow);
        }
        Ok(Self { prefix, ranges })
    }

    /// Number of the shared buffer that the sections are in.
    pub fn pageset_id(&self) -> u16 {
        self.prefix.pageset_id.get()
    }

    /// The sections in order.
    pub fn ranges(&self) -> &'a [TransferPageRange] {
        self.ranges
    }
}

#[cfg(test)]
mod tests;
