// SPDX-License-Identifier: MIT OR Apache-2.0

//! Disk images: the [`Disk`] trait, the formats raw, qcow2 and VHD, and what can be laid over
//! them (throw-away snapshots and injected media errors).
//!
//! Nothing here knows SCSI or VMBus: a disk is a sequence of bytes that is read and written in
//! multiples of 512 bytes. The methods take `&self`, block, and may be called from many threads.
//!
//! May use: the standard library, `vm-memory` (the type of a piece of guest memory), `imago`
//! (qcow2). Used by [`crate::scsi`] and [`crate::vsp::storvsp`].

mod buffer;
mod error;
mod faults;
mod file;
mod open;
mod options;
mod qcow2;
mod raw;
mod snapshot;
pub mod vhd;

pub use buffer::IoBuf;
pub use error::{DiskError, OpenError};
pub use faults::{Fault, FaultInjector, FaultKind};
pub use open::{OpenDisk, open};
pub use options::{Bus, DiskOptions, Format, OptionError};
pub use qcow2::Qcow2Disk;
pub use raw::RawDisk;
pub use snapshot::SnapshotDisk;
pub use vhd::VhdDisk;

/// The unit that every offset, length and disk size is a multiple of, in bytes.
pub const SECTOR: u64 = 512;

/// Block sizes of a disk in bytes, as a guest is to see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// The addressable unit: 512 or 4096.
    pub logical: u32,
    /// The unit below which a write costs more: a power of two, at least `logical`.
    pub physical: u32,
}

impl Default for BlockSizes {
    /// 512-byte addresses over 4096-byte blocks: "512e", as Hyper-V presents a VHDX.
    fn default() -> Self {
        Self {
            logical: 512,
            physical: 4096,
        }
    }
}

/// A disk image.
///
/// Offsets and lengths are in bytes, multiples of [`SECTOR`], and within [`Disk::size`]. A request
/// that crosses the end is an error ([`DiskError::OutOfRange`]), which can also happen to a
/// request that was checked before, when the disk has just shrunk.
pub trait Disk: Send + Sync {
    /// The size in bytes at this moment.
    fn size(&self) -> u64;

    /// The block sizes that suit this image.
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes::default()
    }

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// A 16-byte identity that is stored in the image and moves with it, if the format has one.
    fn identity(&self) -> Option<[u8; 16]> {
        None
    }

    /// Fills all of `buf` from the disk.
    ///
    /// # Errors
    /// The range is not inside the disk, or the image cannot be read there. The contents of `buf`
    /// are unspecified after an error.
    fn read_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError>;

    /// Writes all of `buf` to the disk. The data is stable only after [`Disk::flush`].
    ///
    /// # Errors
    /// The disk is read-only, the range is not inside the disk, or the image cannot be written.
    /// After an error any part of the range may have been written.
    fn write_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError>;

    /// Makes a range read as zeroes. With `unmap` its space is given back to the host as far as
    /// the image can do that; without, the space stays allocated where the format allows it.
    ///
    /// # Errors
    /// As for [`Disk::write_at`].
    fn zero_at(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError>;

    /// Makes everything that has been written stable.
    ///
    /// # Errors
    /// The system reports that data may not have reached the medium.
    fn flush(&self) -> Result<(), DiskError>;

    /// Changes the size. New space reads as zeroes; cut-off data is gone.
    ///
    /// # Errors
    /// The disk is read-only, the size is not a multiple of [`SECTOR`], or the format or the file
    /// cannot have this size.
    fn resize(&self, size: u64) -> Result<(), DiskError>;
}

/// Checks a request against a disk of `size` bytes.
fn check_range(size: u64, offset: u64, len: u64) -> Result<(), DiskError> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(DiskError::OutOfRange { offset, len, size }),
    }
}

#[cfg(test)]
mod tests;
