// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The packet ring: one direction of a VMBus channel, for both of its ends.
//!
//! A ring is one control page followed by a data area of whole pages. Exactly one side writes
//! packets ([`Producer`]) and exactly one side reads them ([`Consumer`]). The control page holds,
//! as 32-bit little-endian words, the two indices (byte offsets into the data area), the reader's
//! interrupt mask, the writer's pending-send size and a feature word; [`Field`] names them. In the
//! data area a packet is a 16-byte descriptor, a header and a payload that fill whole multiples of
//! 8 bytes, and an 8-byte trailer.
//!
//! The peer may be hostile, whichever end this is. Each end keeps its own index privately and never
//! reads it back. The index of the peer is checked each time it is read. A packet is copied out of
//! shared memory once, and only the copy is looked at. Nothing here panics, waits or allocates,
//! whatever the memory holds.
//!
//! # Signals
//!
//! The writer signals the reader when the ring goes from empty to non-empty and the reader has not
//! masked interrupts. A writer that finds the ring full may store how much room it needs as
//! pending-send size; the reader signals once when the free space crosses that size. In both
//! directions one side stores a word and then loads another one, while the peer does the same the
//! other way round. So each side needs a full barrier between its store and its load; without it
//! each can miss the store of the other, and both sleep.
//!
//! # Sources
//!
//! The layout is `struct hv_ring_buffer` in the kernel's `include/linux/hyperv.h`; the order of the
//! accesses is discussed in its `drivers/hv/ring_buffer.c`. Uses [`crate::packet`] only.

use crate::packet::{
    gpa_direct_header_size, pages_spanned, Descriptor, GpaDirectPrefix, GpaRangePrefix, Header,
    Packet, PacketError, PageRange, DESCRIPTOR_SIZE, MAX_PACKET_SIZE, PAGE_SIZE, TRAILER_SIZE,
};
use core::fmt;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromZeros, IntoBytes};

/// Size of the control page in front of the data area, in bytes.
pub const CONTROL_SIZE: u32 = PAGE_SIZE;

/// Bit of [`Field::FeatureBits`]: pending-send sizes are used.
///
/// The bit is a promise of the writer of the ring: it sets a pending-send size when it waits for
/// room in this ring, and as reader of the channel's other ring it obeys the pending-send size
/// there.
pub const FEATURE_PENDING_SEND_SIZE: u32 = 1;

/// The largest data area, in bytes. A GPADL cannot describe 32 MiB, so every real ring is smaller.
const MAX_DATA_LEN: u32 = 1 << 30;

/// Everything in a ring is a multiple of this, in bytes.
const ALIGN: u32 = 8;

/// How many PFNs are converted to bytes at a time.
const PFN_CHUNK: usize = 32;

/// A 32-bit word of the control page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Where the next packet will start. Stored by the writer.
    WriteIndex,
    /// Where the next unread packet starts. Stored by the reader.
    ReadIndex,
    /// Not zero while the reader does not want signals. Stored by the reader.
    InterruptMask,
    /// Free bytes that the writer waits for; zero if it does not wait. Stored by the writer.
    PendingSendSize,
    /// [`FEATURE_PENDING_SEND_SIZE`]. Stored by the writer when the ring is set up.
    FeatureBits,
}

impl Field {
    /// All fields.
    pub const ALL: [Self; 5] = [
        Self::WriteIndex,
        Self::ReadIndex,
        Self::InterruptMask,
        Self::PendingSendSize,
        Self::FeatureBits,
    ];

    /// Offset in the control page, in bytes.
    pub const fn offset(self) -> u32 {
        match self {
            Self::WriteIndex => 0,
            Self::ReadIndex => 4,
            Self::InterruptMask => 8,
            Self::PendingSendSize => 12,
            Self::FeatureBits => 64,
        }
    }
}

/// The shared memory of a ring.
///
/// The peer may change any of it at any time, also against the rules. An implementation must make
/// that harmless: control words are accessed atomically, and data is only copied in and out.
pub trait RingMem {
    /// Size of the data area in bytes: a multiple of 4096 in all real rings. It must not change.
    fn data_len(&self) -> u32;

    /// Loads a control word, with acquire ordering.
    fn load(&self, field: Field) -> u32;

    /// Stores a control word, with release ordering.
    fn store(&self, field: Field, value: u32);

    /// A full barrier between earlier and later accesses (`smp_mb()`, `fence(SeqCst)`).
    fn fence(&self);

    /// Copies data from `offset` (less than `data_len`) to `buf`, which is not longer than the data
    /// area; at the end of the data area, the copy continues at its start.
    fn read_at(&self, offset: u32, buf: &mut [u8]);

    /// Copies `buf`, which is not longer than the data area, to the data at `offset` (less than
    /// `data_len`); at the end of the data area, the copy continues at its start.
    fn write_at(&self, offset: u32, buf: &[u8]);
}

impl<M: RingMem + ?Sized> RingMem for &M {
    fn data_len(&self) -> u32 {
        (**self).data_len()
    }
    fn load(&self, field: Field) -> u32 {
        (**self).load(field)
    }
    fn store(&self, field: Field, value: u32) {
        (**self).store(field, value);
    }
    fn fence(&self) {
        (**self).fence();
    }
    fn read_at(&self, offset: u32, buf: &mut [u8]) {
        (**self).read_at(offset, buf);
    }
    fn write_at(&self, offset: u32, buf: &[u8]) {
        (**self).write_at(offset, buf);
    }
}

/// The shared memory holds something that a correct peer never stores. The channel is beyond
/// repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Corrupt {
    /// The data area has an impossible size.
    DataLength(u32),
    /// The write index is outside of the data area or not a multiple of 8.
    WriteIndex(u32),
    /// The read index is outside of the data area or not a multiple of 8.
    ReadIndex(u32),
    /// A descriptor does not fit what the writer made available.
    Packet(PacketError),
}

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DataLength(len) => write!(f, "bad ring size {len}"),
            Self::WriteIndex(index) => write!(f, "bad ring write index {index:#x}"),
            Self::ReadIndex(index) => write!(f, "bad ring read index {index:#x}"),
            Self::Packet(error) => write!(f, "bad packet in ring: {error}"),
        }
    }
}

impl core::error::Error for Corrupt {}

/// Why a packet was not written. The ring is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WriteError {
    /// There is no room now. `needed` is what [`Producer::wait_for_space`] takes, in bytes.
    Full {
        /// Room that the packet takes in the ring, in bytes.
        needed: u32,
    },
    /// The packet can never be sent on this ring.
    TooLarge,
    /// The parts do not have the lengths that were announced, or a header is not a multiple of 8
    /// bytes long.
    WrongLength,
    /// The peer has damaged the ring.
    Corrupt(Corrupt),
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { needed } => write!(f, "no room for {needed} bytes in ring"),
            Self::TooLarge => f.write_str("packet is too large for the ring"),
            Self::WrongLength => f.write_str("parts of packet have wrong lengths"),
            Self::Corrupt(corrupt) => corrupt.fmt(f),
        }
    }
}

impl core::error::Error for WriteError {}

impl From<Corrupt> for WriteError {
    fn from(corrupt: Corrupt) -> Self {
        Self::Corrupt(corrupt)
    }
}

/// Why a packet was not read. It stays in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReadError {
    /// The packet is longer than the buffer. Read it with a larger one, or [`Consumer::skip`] it.
    TooLarge {
        /// Length of the packet without trailer, in bytes.
        len: u32,
    },
    /// The peer has damaged the ring.
    Corrupt(Corrupt),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { len } => write!(f, "packet of {len} bytes is larger than the buffer"),
            Self::Corrupt(corrupt) => corrupt.fmt(f),
        }
    }
}

impl core::error::Error for ReadError {}

impl From<Corrupt> for ReadError {
    fn from(corrupt: Corrupt) -> Self {
        Self::Corrupt(corrupt)
    }
}

/// Whether the peer must be signalled after an operation.
///
/// Both ways of being wrong hurt: a missed signal can stop the channel for ever, and Hyper-V slows
/// down guests that signal without need.
#[must_use = "a missed signal can stop the channel"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// The peer waits for a signal.
    Needed,
    /// The peer will see the change without a signal.
    NotNeeded,
}

impl Signal {
    /// Whether the peer must be signalled.
    pub fn is_needed(self) -> bool {
        self == Self::Needed
    }

    fn when(condition: bool) -> Self {
        if condition {
            Self::Needed
        } else {
            Self::NotNeeded
        }
    }
}

/// Makes a ring empty: indices, mask and pending-send size zero, feature bit set.
///
/// The guest does this with both rings before it offers them to the host, which may look at them
/// afterwards only.
pub fn initialize<M: RingMem>(mem: &M) {
    for field in Field::ALL {
        let value = match field {
            Field::FeatureBits => FEATURE_PENDING_SEND_SIZE,
            _ => 0,
        };
        mem.store(field, value);
    }
}

/// The control words of a ring at one moment, for display. The peer may have stored any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// [`Field::WriteIndex`].
    pub write_index: u32,
    /// [`Field::ReadIndex`].
    pub read_index: u32,
    /// [`Field::InterruptMask`].
    pub interrupt_mask: u32,
    /// [`Field::PendingSendSize`].
    pub pending_send_size: u32,
    /// Bytes that can be read, if both indices are valid.
    pub readable: Option<u32>,
    /// Bytes that are free, if both indices are valid. At least 8 of them always stay free.
    pub writable: Option<u32>,
}

impl Snapshot {
    /// Looks at the ring.
    pub fn of<M: RingMem>(mem: &M) -> Self {
        let write_index = mem.load(Field::WriteIndex);
        let read_index = mem.load(Field::ReadIndex);
        let readable = Geometry::new(mem).ok().and_then(|geometry| {
            let valid = geometry.is_valid(write_index) && geometry.is_valid(read_index);
            valid.then(|| geometry.distance(read_index, write_index))
        });
        Self {
            write_index,
            read_index,
            interrupt_mask: mem.load(Field::InterruptMask),
            pending_send_size: mem.load(Field::PendingSendSize),
            readable,
            writable: readable.map(|used| mem.data_len().saturating_sub(used)),
        }
    }
}

/// Arithmetic of offsets in a data area.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    /// Size of the data area: a multiple of 8, at least room for one empty packet, at most
    /// [`MAX_DATA_LEN`].
    len: u32,
}

impl Geometry {
    fn new<M: RingMem>(mem: &M) -> Result<Self, Corrupt> {
        let len = mem.data_len();
        let smallest = DESCRIPTOR_SIZE + TRAILER_SIZE + ALIGN;
        if len % ALIGN != 0 || !(smallest..=MAX_DATA_LEN).contains(&len) {
            return Err(Corrupt::DataLength(len));
        }
        Ok(Self { len })
    }

    fn is_valid(self, index: u32) -> bool {
        index < self.len && index % ALIGN == 0
    }

    fn write_index<M: RingMem>(self, mem: &M) -> Result<u32, Corrupt> {
        let index = mem.load(Field::WriteIndex);
        self.is_valid(index)
            .then_some(index)
            .ok_or(Corrupt::WriteIndex(index))
    }

    fn read_index<M: RingMem>(self, mem: &M) -> Result<u32, Corrupt> {
        let index = mem.load(Field::ReadIndex);
        self.is_valid(index)
            .then_some(index)
            .ok_or(Corrupt::ReadIndex(index))
    }

    /// Bytes from `from` forward to `to`, both less than `len`.
    fn distance(self, from: u32, to: u32) -> u32 {
        let distance = to.wrapping_sub(from);
        if to >= from {
            distance
        } else {
            distance.wrapping_add(self.len)
        }
    }

    /// The index `by` bytes (at most `len`) after `index` (less than `len`).
    fn advance(self, index: u32, by: u32) -> u32 {
        // At most 2^31, see `MAX_DATA_LEN`.
        let sum = index.wrapping_add(by);
        if sum >= self.len {
            sum.wrapping_sub(self.len)
        } else {
            sum
        }
    }
}

/// The writing end of a ring.
///
/// # Invariants
/// `write_index` is valid in `geometry`, and is what was last stored to [`Field::WriteIndex`].
#[derive(Debug)]
pub struct Producer<M: RingMem> {
    mem: M,
    geometry: Geometry,
    write_index: u32,
    /// What was last stored to [`Field::PendingSendSize`].
    pending: u32,
}

impl<M: RingMem> Producer<M> {
    /// Takes the writing end of a ring that [`initialize`] or an earlier writer has set up.
    ///
    /// Sets the feature bit. The write index is read from the shared memory, this one time.
    ///
    /// # Errors
    /// [`Corrupt`] if the size or the write index is impossible.
    pub fn new(mem: M) -> Result<Self, Corrupt> {
        let geometry = Geometry::new(&mem)?;
        let write_index = geometry.write_index(&mem)?;
        mem.store(Field::FeatureBits, FEATURE_PENDING_SEND_SIZE);
        mem.store(Field::PendingSendSize, 0);
        Ok(Self {
            mem,
            geometry,
            write_index,
            pending: 0,
        })
    }

    /// The shared memory.
    pub fn mem(&self) -> &M {
        &self.mem
    }

    /// Size of the data area, in bytes.
    pub fn data_len(&self) -> u32 {
        self.geometry.len
    }

    /// Free bytes now. A packet needs one byte less than that, with descriptor, padding and
    /// trailer.
    ///
    /// # Errors
    /// [`Corrupt::ReadIndex`] if the peer stored an impossible one.
    pub fn free_bytes(&self) -> Result<u32, Corrupt> {
        let read_index = self.geometry.read_index(&self.mem)?;
        let used = self.geometry.distance(read_index, self.write_index);
        Ok(self.geometry.len.saturating_sub(used))
    }

    /// Writes a packet of `payload`, given in parts, with nothing between descriptor and payload.
    ///
    /// # Errors
    /// [`WriteError`]; nothing was written.
    pub fn write(&mut self, header: Header, payload: &[&[u8]]) -> Result<Signal, WriteError> {
        self.write_parts(header, &[], payload)
    }

    /// Writes a packet with `extension` between descriptor and payload, both given in parts.
    ///
    /// # Errors
    /// [`WriteError`]; nothing was written. The extension must be a multiple of 8 bytes long in
    /// total.
    pub fn write_parts(
        &mut self,
        header: Header,
        extension: &[&[u8]],
        payload: &[&[u8]],
    ) -> Result<Signal, WriteError> {
        let mut reservation = self.reserve(header, parts_len(extension)?, parts_len(payload)?)?;
        for part in extension.iter().chain(payload) {
            reservation.put(part)?;
        }
        reservation.commit()
    }

    /// Writes a GPA-direct packet with one range: `byte_count` bytes of guest memory that start
    /// `byte_offset` bytes into the first of the pages `pfns`.
    ///
    /// The PFNs go straight into the ring, so they need not be in an array.
    ///
    /// # Errors
    /// [`WriteError`]; nothing was written. [`WriteError::WrongLength`] if `pfns` does not have
    /// exactly [`pages_spanned`] items, or `byte_offset` is not inside of a page.
    pub fn write_gpa_direct(
        &mut self,
        header: Header,
        byte_count: u32,
        byte_offset: u32,
        pfns: impl IntoIterator<Item = u64>,
        payload: &[&[u8]],
    ) -> Result<Signal, WriteError> {
        let pages = pages_spanned(byte_offset, byte_count);
        let mut reservation = self.reserve_gpa_direct(header, 1, pages, payload)?;
        reservation.put_range(byte_count, byte_offset, pfns)?;
        reservation.finish(payload)
    }

    /// Writes a GPA-direct packet with several ranges.
    ///
    /// # Errors
    /// As [`Producer::write_gpa_direct`]; also [`WriteError::WrongLength`] if there is no range.
    pub fn write_gpa_ranges(
        &mut self,
        header: Header,
        ranges: &[PageRange<'_>],
        payload: &[&[u8]],
    ) -> Result<Signal, WriteError> {
        if ranges.is_empty() {
            return Err(WriteError::WrongLength);
        }
        let pages = ranges.iter().fold(0u64, |sum, range| {
            sum.saturating_add(pages_spanned(range.byte_offset, range.byte_count))
        });
        let mut reservation = self.reserve_gpa_direct(header, ranges.len(), pages, payload)?;
        for range in ranges {
            reservation.put_range(
                range.byte_count,
                range.byte_offset,
                range.pfns.iter().copied(),
            )?;
        }
        reservation.finish(payload)
    }

    fn reserve_gpa_direct(
        &mut self,
        header: Header,
        ranges: usize,
        pages: u64,
        payload: &[&[u8]],
    ) -> Result<Reservation<'_, M>, WriteError> {
        let range_count = u32::try_from(ranges).map_err(|_| WriteError::TooLarge)?;
        let size = gpa_direct_header_size(ranges, pages).ok_or(WriteError::TooLarge)?;
        let mut reservation = self.reserve(header, size, parts_len(payload)?)?;
        let prefix = GpaDirectPrefix {
            reserved: 0.into(),
            range_count: range_count.into(),
        };
        reservation.put(prefix.as_bytes())?;
        Ok(reservation)
    }

    /// Starts a packet with `extension_len` bytes between descriptor and payload and `payload_len`
    /// bytes of payload, to be filled in order with [`Reservation::put`] and then sent with
    /// [`Reservation::commit`].
    ///
    /// A reservation that is dropped leaves no trace.
    ///
    /// # Errors
    /// [`WriteError::Full`], [`WriteError::TooLarge`] or [`WriteError::Corrupt`];
    /// [`WriteError::WrongLength`] if `extension_len` is not a multiple of 8.
    pub fn reserve(
        &mut self,
        header: Header,
        extension_len: usize,
        payload_len: usize,
    ) -> Result<Reservation<'_, M>, WriteError> {
        let too_large = WriteError::TooLarge;
        let extension_len = u32::try_from(extension_len).map_err(|_| too_large)?;
        let payload_len = u32::try_from(payload_len).map_err(|_| too_large)?;
        if extension_len % ALIGN != 0 {
            return Err(WriteError::WrongLength);
        }
        let offset = DESCRIPTOR_SIZE
            .checked_add(extension_len)
            .ok_or(too_large)?;
        let unpadded = offset.checked_add(payload_len).ok_or(too_large)?;
        let len = unpadded.checked_next_multiple_of(ALIGN).ok_or(too_large)?;
        if len > MAX_PACKET_SIZE {
            return Err(too_large);
        }
        let total = len.saturating_add(TRAILER_SIZE);
        if total >= self.geometry.len {
            return Err(too_large);
        }
        // A ring that is filled completely would look empty, so at least one byte stays free.
        if total >= self.free_bytes()? {
            return Err(WriteError::Full { needed: total });
        }
        let descriptor = Descriptor {
            packet_type: header.packet_type,
            offset8: units(offset),
            len8: units(len),
            flags: header.flags.bits().into(),
            transaction_id: header.transaction_id.into(),
        };
        self.mem.write_at(self.write_index, descriptor.as_bytes());
        Ok(Reservation {
            at: self.geometry.advance(self.write_index, DESCRIPTOR_SIZE),
            left: unpadded.saturating_sub(DESCRIPTOR_SIZE),
            padding: len.saturating_sub(unpadded),
            total,
            producer: self,
        })
    }

    /// Asks the reader for a signal when more than `needed` bytes are free, after
    /// [`WriteError::Full`].
    ///
    /// Returns true if there is room already, so that the packet should be written again now.
    /// Otherwise the signal will come, if the reader obeys pending-send sizes
    /// ([`Consumer::peer_uses_pending_send_size`] of the channel's other ring tells). A later write
    /// of this size or a larger one ends the wait by itself.
    ///
    /// # Errors
    /// [`Corrupt::ReadIndex`] if the peer stored an impossible one.
    pub fn wait_for_space(&mut self, needed: u32) -> Result<bool, Corrupt> {
        // More than that is never free.
        let needed = needed.min(self.geometry.len.wrapping_sub(1));
        self.set_pending(needed);
        // The reader stores its index and then loads the pending-send size. With a barrier on both
        // sides, either the reader sees our store, or we see its index now.
        self.mem.fence();
        let free = self.free_bytes()?;
        if free > needed {
            self.set_pending(0);
            return Ok(true);
        }
        Ok(false)
    }

    /// Ends the wait that [`Producer::wait_for_space`] began, without having written.
    pub fn stop_waiting(&mut self) {
        self.set_pending(0);
    }

    /// The pending-send size now, in bytes; zero if nothing waits.
    pub fn pending_send_size(&self) -> u32 {
        self.pending
    }

    fn set_pending(&mut self, bytes: u32) {
        if self.pending != bytes {
            self.pending = bytes;
            self.mem.store(Field::PendingSendSize, bytes);
        }
    }

    /// Makes `total` bytes from the write index on visible to the reader.
    fn publish(&mut self, total: u32) -> Signal {
        let old = self.write_index;
        if self.pending != 0 && total >= self.pending {
            self.set_pending(0);
        }
        // INVARIANT: `advance` returns a valid index.
        self.write_index = self.geometry.advance(old, total);
        self.mem.store(Field::WriteIndex, self.write_index);
        // The reader clears its mask and then loads the write index. With a barrier on both sides,
        // either the reader sees this packet, or we see that it does not mask.
        self.mem.fence();
        // The mask must be loaded before the read index: a reader stores its index before it clears
        // the mask.
        let masked = self.mem.load(Field::InterruptMask) != 0;
        Signal::when(!masked && self.mem.load(Field::ReadIndex) == old)
    }
}

/// `bytes`, a multiple of 8 that is at most [`MAX_PACKET_SIZE`], in the descriptor's units of 8
/// bytes.
fn units(bytes: u32) -> U16 {
    U16::new(u16::try_from(bytes / ALIGN).unwrap_or(u16::MAX))
}

/// Total length of `parts`, in bytes.
fn parts_len(parts: &[&[u8]]) -> Result<usize, WriteError> {
    parts
        .iter()
        .try_fold(0usize, |sum, part| sum.checked_add(part.len()))
        .ok_or(WriteError::TooLarge)
}

/// Room for a packet in the ring that the reader does not see yet.
#[must_use = "a packet is sent by `commit`"]
#[derive(Debug)]
pub struct Reservation<'p, M: RingMem> {
    producer: &'p mut Producer<M>,
    /// Where the next byte goes.
    at: u32,
    /// Bytes that are still to be put, without padding.
    left: u32,
    padding: u32,
    /// Room that the packet takes in the ring, with trailer.
    total: u32,
}

impl<M: RingMem> Reservation<'_, M> {
    /// Appends `bytes` to the packet.
    ///
    /// # Errors
    /// [`WriteError::WrongLength`] if there are more than were reserved.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let len = u32::try_from(bytes.len()).map_err(|_| WriteError::WrongLength)?;
        self.left = self.left.checked_sub(len).ok_or(WriteError::WrongLength)?;
        self.append(bytes, len);
        Ok(())
    }

    /// Appends a range of a GPA-direct packet: its lengths, and the PFNs of its pages.
    ///
    /// # Errors
    /// [`WriteError::WrongLength`] if `pfns` does not have exactly [`pages_spanned`] items,
    /// `byte_offset` is not inside of a page, or it is more than was reserved.
    fn put_range(
        &mut self,
        byte_count: u32,
        byte_offset: u32,
        pfns: impl IntoIterator<Item = u64>,
    ) -> Result<(), WriteError> {
        if byte_offset >= PAGE_SIZE {
            return Err(WriteError::WrongLength);
        }
        let prefix = GpaRangePrefix {
            byte_count: byte_count.into(),
            byte_offset: byte_offset.into(),
        };
        self.put(prefix.as_bytes())?;
        let mut pages = pages_spanned(byte_offset, byte_count);
        let mut pfns = pfns.into_iter().fuse();
        let mut chunk = [U64::new_zeroed(); PFN_CHUNK];
        loop {
            let mut filled = 0usize;
            for (slot, pfn) in chunk.iter_mut().zip(pfns.by_ref()) {
                slot.set(pfn);
                filled = filled.saturating_add(1);
            }
            // A full chunk may have pulled exactly the last item; the next turn then has an empty
            // one.
            let chunk = chunk.get(..filled).unwrap_or_default();
            pages = pages
                .checked_sub(chunk.len() as u64)
                .ok_or(WriteError::WrongLength)?;
            self.put(chunk.as_bytes())?;
            if filled < PFN_CHUNK {
                break;
            }
        }
        if pages != 0 {
            return Err(WriteError::WrongLength);
        }
        Ok(())
    }

    fn finish(mut self, payload: &[&[u8]]) -> Result<Signal, WriteError> {
        for part in payload {
            self.put(part)?;
        }
        self.commit()
    }

    /// Sends the packet.
    ///
    /// # Errors
    /// [`WriteError::WrongLength`] if less than was reserved has been put; nothing was sent.
    pub fn commit(mut self) -> Result<Signal, WriteError> {
        if self.left != 0 {
            return Err(WriteError::WrongLength);
        }
        let zeros = [0u8; ALIGN as usize];
        let padding = zeros
            .get(..self.padding as usize)
            .ok_or(WriteError::WrongLength)?;
        self.append(padding, self.padding);
        // The trailer holds the write index from before this packet, in its upper half.
        let trailer = u64::from(self.producer.write_index) << 32;
        self.append(&trailer.to_le_bytes(), TRAILER_SIZE);
        Ok(self.producer.publish(self.total))
    }

    fn append(&mut self, bytes: &[u8], len: u32) {
        if len != 0 {
            self.producer.mem.write_at(self.at, bytes);
            self.at = self.producer.geometry.advance(self.at, len);
        }
    }
}

/// What [`Consumer::unmask`] found.
#[must_use = "a packet that arrived before the unmasking brings no signal"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmasked {
    /// Whether the writer waits for the space that was freed.
    pub signal: Signal,
    /// Whether there is something to read, for which no signal will come.
    pub more: bool,
}

/// The reading end of a ring.
///
/// A reader that was woken by a signal masks, reads until there is nothing more, and unmasks; if
/// that finds something, it starts again:
///
/// ```
/// # use hv_proto::{packet::Packet, ring::{Consumer, ReadError, RingMem, Signal}};
/// fn drain<M: RingMem>(
///     ring: &mut Consumer<M>, buf: &mut [u8], signal_peer: impl Fn(), handle: impl Fn(Packet<'_>),
/// ) -> Result<(), ReadError> {
///     loop {
///         ring.mask();
///         while let Some(packet) = ring.read(buf)? {
///             handle(packet);
///         }
///         let unmasked = ring.unmask();
///         if unmasked.signal.is_needed() {
///             signal_peer();
///         }
///         if !unmasked.more {
///             return Ok(());
///         }
///     }
/// }
/// ```
///
/// # Invariants
/// `read_index` and `committed` are valid in `geometry`, and `committed` is what was last stored to
/// [`Field::ReadIndex`].
#[derive(Debug)]
pub struct Consumer<M: RingMem> {
    mem: M,
    geometry: Geometry,
    read_index: u32,
    committed: u32,
    /// Room in the ring of the packet that did not fit the buffer; zero if there is none.
    oversized: u32,
}

impl<M: RingMem> Consumer<M> {
    /// Takes the reading end of a ring that [`initialize`] or an earlier reader has set up.
    ///
    /// The read index is read from the shared memory, this one time.
    ///
    /// # Errors
    /// [`Corrupt`] if the size or the read index is impossible.
    pub fn new(mem: M) -> Result<Self, Corrupt> {
        let geometry = Geometry::new(&mem)?;
        let read_index = geometry.read_index(&mem)?;
        Ok(Self {
            mem,
            geometry,
            read_index,
            committed: read_index,
            oversized: 0,
        })
    }

    /// The shared memory.
    pub fn mem(&self) -> &M {
        &self.mem
    }

    /// Size of the data area, in bytes.
    pub fn data_len(&self) -> u32 {
        self.geometry.len
    }

    /// Bytes that the writer has made available and that have not been read yet.
    ///
    /// # Errors
    /// [`Corrupt::WriteIndex`] if the peer stored an impossible one.
    pub fn available_bytes(&self) -> Result<u32, Corrupt> {
        let write_index = self.geometry.write_index(&self.mem)?;
        Ok(self.geometry.distance(self.read_index, write_index))
    }

    /// Whether the peer, as writer of this ring, has set [`FEATURE_PENDING_SEND_SIZE`].
    pub fn peer_uses_pending_send_size(&self) -> bool {
        self.mem.load(Field::FeatureBits) & FEATURE_PENDING_SEND_SIZE != 0
    }

    /// Copies the next packet to `buf` and steps over it; `None` if there is none.
    ///
    /// The writer sees the free space after [`Consumer::commit`] or [`Consumer::unmask`] only.
    ///
    /// # Errors
    /// [`ReadError`]; the packet stays where it is.
    pub fn read<'b>(&mut self, buf: &'b mut [u8]) -> Result<Option<Packet<'b>>, ReadError> {
        self.oversized = 0;
        let available = self.available_bytes()?;
        if available == 0 {
            return Ok(None);
        }
        let mut descriptor = Descriptor::new_zeroed();
        if available < DESCRIPTOR_SIZE {
            let error = PacketError::Length { len: 0, available };
            return Err(Corrupt::Packet(error).into());
        }
        self.mem.read_at(self.read_index, descriptor.as_mut_bytes());
        descriptor.validate(available).map_err(Corrupt::Packet)?;
        let len = descriptor.len();
        let total = len.saturating_add(TRAILER_SIZE);
        let too_large = ReadError::TooLarge { len };
        let Some((head, body)) = buf
            .get_mut(..len as usize)
            .and_then(|packet| packet.split_at_mut_checked(DESCRIPTOR_SIZE as usize))
        else {
            self.oversized = total;
            return Err(too_large);
        };
        // The peer could have changed the descriptor since, so the checked copy is what the packet
        // gets.
        head.copy_from_slice(descriptor.as_bytes());
        if !body.is_empty() {
            let start = self.geometry.advance(self.read_index, DESCRIPTOR_SIZE);
            self.mem.read_at(start, body);
        }
        // INVARIANT: `advance` returns a valid index.
        self.read_index = self.geometry.advance(self.read_index, total);
        let packet = buf.get(..len as usize).ok_or(too_large)?;
        let packet = Packet::parse(packet).map_err(Corrupt::Packet)?;
        Ok(Some(packet))
    }

    /// Steps over the packet for which the last [`Consumer::read`] returned
    /// [`ReadError::TooLarge`].
    ///
    /// Returns false if there is no such packet.
    pub fn skip(&mut self) -> bool {
        let total = core::mem::take(&mut self.oversized);
        // INVARIANT: `advance` returns a valid index.
        self.read_index = self.geometry.advance(self.read_index, total);
        total != 0
    }

    /// Gives the space of the packets that were read back to the writer.
    ///
    /// Doing this for several packets at once saves the writer's cache misses; a reader that works
    /// long should do it now and then.
    pub fn commit(&mut self) -> Signal {
        let freed = self.geometry.distance(self.committed, self.read_index);
        if freed == 0 {
            return Signal::NotNeeded;
        }
        // INVARIANT: `committed` is what is stored.
        self.committed = self.read_index;
        self.mem.store(Field::ReadIndex, self.read_index);
        if !self.peer_uses_pending_send_size() {
            return Signal::NotNeeded;
        }
        // The writer stores its pending-send size and then loads the read index. With a barrier on
        // both sides, either the writer sees the space, or we see that it waits.
        self.mem.fence();
        let pending = self.mem.load(Field::PendingSendSize);
        if pending == 0 {
            return Signal::NotNeeded;
        }
        // A bad index is for the next `read` to report.
        let Ok(used) = self.available_bytes() else {
            return Signal::NotNeeded;
        };
        // Some writers wait for the whole ring; it is empty when all but one of its bytes count as
        // free.
        let pending = pending.min(self.geometry.len.wrapping_sub(1));
        let free = self.geometry.len.saturating_sub(used);
        let free_before = free.saturating_sub(freed);
        // Only the step over the threshold counts, so that one wait gets one signal.
        Signal::when(free_before <= pending && free > pending)
    }

    /// Tells the writer that no signals are wanted, because the reader is at work.
    pub fn mask(&mut self) {
        self.mem.store(Field::InterruptMask, 1);
    }

    /// Commits, asks for signals again, and looks once more for packets.
    pub fn unmask(&mut self) -> Unmasked {
        let signal = self.commit();
        self.mem.store(Field::InterruptMask, 0);
        // The writer stores its index and then loads the mask. With a barrier on both sides, either
        // it sees that signals are wanted, or we see its packet.
        self.mem.fence();
        // A bad index counts as something to read, so that `read` reports it.
        let more = self.mem.load(Field::WriteIndex) != self.read_index;
        Unmasked { signal, more }
    }
}

#[cfg(test)]
mod tests;
