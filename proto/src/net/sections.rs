// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The shared buffers of an adapter: how the host has divided them, and whether a place that the peer
//! names lies in what was agreed.
//!
//! Uses the other modules of [`super`] only.
//!
//! Source: `drivers/net/hyperv/netvsc.c` of the kernel.

use super::nvsp::{ReceiveBufferSection, SendBufferComplete, Status};
use super::{Span, MAX_TRANSFER_RANGES, MIN_SECTION_SIZE, RECEIVE_BUFFER_ID};
use crate::packet::{TransferPageRange, TransferPages};
use core::fmt;

/// Why a buffer, or a place in it, is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SectionError {
    /// The host does not use the buffer.
    Refused(Status),
    /// The host has made another number of parts than one.
    Count(usize),
    /// The host's part does not start with the buffer.
    Offset(u32),
    /// A section is too small to be of use, or there is no section.
    Size {
        /// Size of a section, in bytes.
        size: u32,
        /// Number of sections.
        count: u32,
    },
    /// The sections are larger than the buffer.
    TooLarge {
        /// Size of all sections, in bytes.
        size: u64,
        /// Size of the buffer, in bytes.
        buffer: u32,
    },
    /// A transfer-page packet is for another buffer.
    Buffer(u16),
    /// A transfer-page packet has no range, or too many.
    RangeCount(usize),
    /// A range is longer than a section, or not inside of the sections.
    Range {
        /// Where it starts, in bytes.
        offset: u32,
        /// Its length in bytes.
        len: u32,
    },
    /// There is no section with this index.
    Index(u32),
}

impl fmt::Display for SectionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Refused(status) => write!(f, "buffer was refused with {status:?}"),
            Self::Count(count) => write!(f, "receive buffer has {count} parts"),
            Self::Offset(offset) => write!(f, "receive buffer is used from {offset} on"),
            Self::Size { size, count } => write!(f, "{count} sections of {size} bytes"),
            Self::TooLarge { size, buffer } => {
                write!(f, "{size} bytes of sections in a buffer of {buffer}")
            }
            Self::Buffer(id) => write!(f, "packet for unknown buffer {id:#x}"),
            Self::RangeCount(count) => write!(f, "packet with {count} ranges"),
            Self::Range { offset, len } => {
                write!(
                    f,
                    "{len} bytes at {offset} are not in a section of the buffer"
                )
            }
            Self::Index(index) => write!(f, "there is no section {index}"),
        }
    }
}

impl core::error::Error for SectionError {}

/// A buffer that is divided into sections of equal size, from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sections {
    size: u32,
    count: u32,
}

impl Sections {
    /// `count` sections of `size` bytes in a buffer of `buffer` bytes.
    ///
    /// # Errors
    /// [`SectionError::Size`] or [`SectionError::TooLarge`].
    pub fn new(size: u32, count: u32, buffer: u32) -> Result<Self, SectionError> {
        if size < MIN_SECTION_SIZE || count == 0 {
            return Err(SectionError::Size { size, count });
        }
        // Both are 32-bit, so the product cannot overflow 64 bits.
        let all = u64::from(size).saturating_mul(u64::from(count));
        if all > u64::from(buffer) {
            return Err(SectionError::TooLarge { size: all, buffer });
        }
        Ok(Self { size, count })
    }

    /// As many sections of `size` bytes as a buffer of `buffer` bytes has room for.
    ///
    /// # Errors
    /// [`SectionError::Size`].
    pub fn fill(size: u32, buffer: u32) -> Result<Self, SectionError> {
        Self::new(size, buffer.checked_div(size).unwrap_or(0), buffer)
    }

    /// What the host has made of a receive buffer of `buffer` bytes.
    ///
    /// # Errors
    /// [`SectionError`]: guests want one part, which starts with the buffer.
    pub fn receive(parts: &[ReceiveBufferSection], buffer: u32) -> Result<Self, SectionError> {
        let [part] = parts else {
            return Err(SectionError::Count(parts.len()));
        };
        if part.offset.get() != 0 {
            return Err(SectionError::Offset(part.offset.get()));
        }
        Self::new(part.piece_size.get(), part.piece_count.get(), buffer)
    }

    /// What the host has made of a send buffer of `buffer` bytes.
    ///
    /// # Errors
    /// [`SectionError`].
    pub fn send(answer: &SendBufferComplete, buffer: u32) -> Result<Self, SectionError> {
        if answer.status != Status::SUCCESS {
            return Err(SectionError::Refused(answer.status));
        }
        Self::fill(answer.section_size.get(), buffer)
    }

    /// Size of a section, in bytes.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Number of sections; at least one.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Bytes of all sections.
    pub fn total(&self) -> u32 {
        // At most the size of the buffer.
        self.size.saturating_mul(self.count)
    }

    /// The section as the host's answer tells it.
    pub fn to_receive_part(&self) -> ReceiveBufferSection {
        ReceiveBufferSection {
            offset: 0.into(),
            piece_size: self.size.into(),
            piece_count: self.count.into(),
            end_offset: self.total().into(),
        }
    }

    /// Where section `index` is, of which `len` bytes are used.
    ///
    /// # Errors
    /// [`SectionError::Index`] or [`SectionError::Range`].
    pub fn section(&self, index: u32, len: u32) -> Result<Span, SectionError> {
        if index >= self.count {
            return Err(SectionError::Index(index));
        }
        // Less than the size of the buffer.
        let offset = self.size.saturating_mul(index);
        if len > self.size {
            return Err(SectionError::Range { offset, len });
        }
        Ok(Span { offset, len })
    }

    /// Checks a range that the host says it has filled: it is inside of the sections, and no longer
    /// than one.
    ///
    /// # Errors
    /// [`SectionError::Range`].
    pub fn range(&self, range: &TransferPageRange) -> Result<Span, SectionError> {
        let (offset, len) = (range.byte_offset.get(), range.byte_count.get());
        Span::within(offset, len, self.total())
            .filter(|_| len <= self.size)
            .ok_or(SectionError::Range { offset, len })
    }
}

/// Checks that a transfer-page packet is for the receive buffer, and has not too many ranges. Returns
/// the ranges; each is for [`Sections::range`] to check.
///
/// # Errors
/// [`SectionError::Buffer`] or [`SectionError::RangeCount`].
pub fn transfer_ranges<'a>(
    pages: &TransferPages<'a>,
) -> Result<&'a [TransferPageRange], SectionError> {
    if pages.pageset_id() != RECEIVE_BUFFER_ID {
        return Err(SectionError::Buffer(pages.pageset_id()));
    }
    match pages.ranges().len() {
        1..=MAX_TRANSFER_RANGES => Ok(pages.ranges()),
        count => Err(SectionError::RangeCount(count)),
    }
}
