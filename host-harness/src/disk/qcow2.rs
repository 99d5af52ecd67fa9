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
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A qcow2 image.
pub struct Qcow2Disk {
    /// Requests share it; what moves data about (unmap, resize) takes it alone.
    image: RwLock<FormatAccess<ImagoFile>>,
    read_only: bool,
    header: Header,
    /// Keeps the lock on the image, which imago does not take.
    _locked: File,
}

/// What of an image's header decides how space is given back.
#[derive(Debug, Clone, Copy)]
struct Header {
    /// Version 2 (`compat=0.10`) has no clusters that read as zeroes whatever is below them.
    has_zero_clusters: bool,
    /// Size of a cluster in bytes.
    cluster: u64,
    /// There is a file below.
    has_backing: bool,
}

impl Header {
    /// Reads it from an image that is known to be sound.
    fn read(file: &File) -> io::Result<Self> {
        // Magic, version, offset and length of the name of the file below, bits of a cluster.
        let mut start = [0; 24];
        file.read_exact_at(&mut start, 0)?;
        let [
            _,
            _,
            _,
            _,
            v0,
            v1,
            v2,
            v3,
            name @ ..,
            _,
            _,
            _,
            _,
            b0,
            b1,
            b2,
            b3,
        ] = start;
        let bits = u32::from_be_bytes([b0, b1, b2, b3]);
        Ok(Self {
            has_zero_clusters: u32::from_be_bytes([v0, v1, v2, v3]) >= 3,
            cluster: 1u64.checked_shl(bits).unwrap_or(1),
            has_backing: name != [0; 8],
        })
    }
}

/// How much is zeroed at a time where zeroes must be written.
const PIECE: u64 = 1 << 20;

/// Writes zeroes where the image has something else.
fn write_zeroes(image: &FormatAccess<ImagoFile>, offset: u64, len: u64) -> io::Result<()> {
    let mut bytes = vec![0; len.min(PIECE) as usize];
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let n = (end - at).min(PIECE);
        let piece = bytes.get_mut(..n as usize).unwrap_or_default();
        image.read(&mut *piece, at)?;
        if piece.iter().any(|byte| *byte != 0) {
            piece.fill(0);
            image.write(&*piece, at)?;
        }
        at += n;
    }
    Ok(())
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
            header: Header::read(&locked)?,
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

    /// Makes a range read as zeroes, and gives its space back as far as the image can do that.
    fn clear(&self, image: &mut FormatAccess<ImagoFile>, offset: u64, len: u64) -> io::Result<()> {
        let Header {
            has_zero_clusters,
            cluster,
            has_backing,
        } = self.header;
        if has_zero_clusters {
            return image.discard_to_zero(offset, len);
        }
        if has_backing {
            return write_zeroes(image, offset, len);
        }
        // Clusters that are not there read as zeroes; what is left are parts of clusters.
        image.discard_to_backing(offset, len)?;
        let end = offset + len;
        let head = offset.next_multiple_of(cluster).min(end);
        let tail = (end - end % cluster).max(head);
        write_zeroes(image, offset, head - offset)?;
        write_zeroes(image, tail, end - tail)
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
            Ok(self.clear(&mut image, offset, len)?)
        } else {
            let image = self.shared();
            check_range(image.size(), offset, len)?;
            if !self.header.has_zero_clusters {
                return Ok(write_zeroes(&image, offset, len)?);
            }
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
            let end = size.next_multiple_of(self.header.cluster).min(old_size);
            self.clear(&mut image, size, end - size)?;
        }
        image.resize(size, PreallocateMode::None)?;
        if size > old_size && self.header.has_backing {
            // What the file below has there was cut off, or is longer than this disk was.
            if let Err(error) = self.clear(&mut image, old_size, size - old_size) {
                image.resize(old_size, PreallocateMode::None)?;
                return Err(error.into());
            }
        }
        Ok(())
    }
}
