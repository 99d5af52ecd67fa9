// SPDX-License-Identifier: MIT OR Apache-2.0

//! qcow2 images, through the `imago` crate in its synchronous mode.
//!
//! The data is copied through a buffer of ordinary memory: imago wants Rust slices, and those
//! must not be made of guest memory, which may change or overlap.
//!
//! Backing files and external data files that the image names are opened (the guest cannot change
//! these names: it sees only the contents of the disk).

use super::{Disk, DiskError, IoBuf, SECTOR, check_range};
use imago::file::File as ImagoFile;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A qcow2 image.
pub struct Qcow2Disk {
    /// Requests share it; what moves data about (unmap, resize) takes it alone.
    image: RwLock<FormatAccess<ImagoFile>>,
    read_only: bool,
    /// Keeps the lock on the image, which imago does not take.
    _locked: File,
}

impl Qcow2Disk {
    /// Opens the image at `path` and the files that it refers to. `locked` is the same file, on
    /// which the caller holds a lock that is to last as long as the disk.
    ///
    /// # Errors
    /// A file is missing or is not a sound qcow2 image.
    pub fn open(path: &Path, read_only: bool, locked: File) -> io::Result<Self> {
        let image = Qcow2::<ImagoFile>::builder_path(path)
            .write(!read_only)
            .open(PermissiveImplicitOpenGate::default())?;
        let image = FormatAccess::new(image);
        if !image.size().is_multiple_of(SECTOR) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "its size of {} bytes is not a multiple of 512",
                    image.size()
                ),
            ));
        }
        Ok(Self {
            image: RwLock::new(image),
            read_only,
            _locked: locked,
        })
    }

    // imago has locks of its own for its state, so a panic elsewhere leaves this one usable.
    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<ImagoFile>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<ImagoFile>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn writable(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        Ok(())
    }
}

impl Disk for Qcow2Disk {
    fn size(&self) -> u64 {
        self.shared().size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        let image = self.shared();
        check_range(image.size(), offset, buf.len() as u64)?;
        let mut bytes = vec![0; buf.len()];
        image.read(&mut bytes[..], offset)?;
        buf.write(0, &bytes);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        self.writable()?;
        let image = self.shared();
        check_range(image.size(), offset, buf.len() as u64)?;
        Ok(image.write(&buf.to_vec()[..], offset)?)
    }

    fn zero_at(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.writable()?;
        if unmap {
            let mut image = self.alone();
            check_range(image.size(), offset, len)?;
            Ok(image.discard_to_zero(offset, len)?)
        } else {
            let image = self.shared();
            check_range(image.size(), offset, len)?;
            Ok(image.write_zeroes(offset, len)?)
        }
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        let image = self.shared();
        // First imago's own caches, then the kernel's.
        image.flush()?;
        Ok(image.sync()?)
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.writable()?;
        if !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Unsupported(format!(
                "{size} bytes are not a multiple of {SECTOR}"
            )));
        }
        let mut image = self.alone();
        let old_size = image.size();
        if size < old_size {
            // imago keeps what is cut off inside the last cluster, and it would come back when
            // the disk grows again.
            image.discard_to_zero(size, old_size - size)?;
        }
        Ok(image.resize(size, PreallocateMode::None)?)
    }
}
