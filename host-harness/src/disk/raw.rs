// SPDX-License-Identifier: MIT OR Apache-2.0

//! Raw images: a file or block device whose bytes are the disk's bytes.

use super::{BlockSizes, Disk, DiskError, IoBuf, SECTOR, check_range, file};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// A raw image.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    read_only: bool,
    block_device: bool,
    /// Requests share it, so that the size does not change under them; a resize takes it alone.
    size: RwLock<u64>,
}

impl RawDisk {
    /// The disk in `file`, which is open for reading, and for writing unless `read_only`.
    ///
    /// A file whose length is not a multiple of 512 counts as longer; the bytes after its end
    /// read as zeroes.
    ///
    /// # Errors
    /// The length of the file cannot be found out.
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        let length = file::length(&file)?;
        let block_device = file.metadata()?.file_type().is_block_device();
        Ok(Self {
            size: RwLock::new(length.next_multiple_of(SECTOR)),
            file,
            read_only,
            block_device,
        })
    }

    // A number is always consistent.
    fn shared(&self) -> RwLockReadGuard<'_, u64> {
        self.size.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn writable(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        Ok(())
    }
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        *self.shared()
    }

    fn block_sizes(&self) -> BlockSizes {
        BlockSizes::default()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        let size = self.shared();
        check_range(*size, offset, buf.len() as u64)?;
        Ok(file::read_at(&self.file, offset, buf)?)
    }

    fn write_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        self.writable()?;
        let size = self.shared();
        check_range(*size, offset, buf.len() as u64)?;
        Ok(file::write_at(&self.file, offset, buf)?)
    }

    fn zero_at(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.writable()?;
        let size = self.shared();
        check_range(*size, offset, len)?;
        Ok(file::zero_at(&self.file, offset, len, unmap)?)
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        Ok(self.file.sync_data()?)
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.writable()?;
        if !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Unsupported(format!(
                "{size} bytes are not a multiple of {SECTOR}"
            )));
        }
        if self.block_device {
            return Err(DiskError::Unsupported(
                "a block device cannot be resized from here".into(),
            ));
        }
        let mut current = self.size.write().unwrap_or_else(PoisonError::into_inner);
        self.file.set_len(size)?;
        *current = size;
        Ok(())
    }
}
