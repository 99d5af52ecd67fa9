// SPDX-License-Identifier: MIT OR Apache-2.0

//! Injected media errors, for tests of how a guest copes: ranges of a disk that cannot be read
//! or written.

use super::{BlockSizes, Disk, DiskError, IoBuf};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

/// Which requests a fault makes fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// Reads.
    Read,
    /// Writes, zeroing included.
    Write,
    /// Both.
    All,
}

/// A bad range of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The bad bytes. The end may be far beyond the end of the disk.
    pub bytes: Range<u64>,
    /// Which requests fail.
    pub kind: FaultKind,
}

/// A disk with bad ranges, which can change at any time. Without any it is just the disk below.
pub struct FaultInjector {
    inner: Box<dyn Disk>,
    /// Lets the data path skip the lock; set while `faults` is not empty.
    any: AtomicBool,
    faults: RwLock<Vec<Fault>>,
}

impl FaultInjector {
    /// A layer over `inner` that begins with these faults.
    pub fn new(inner: Box<dyn Disk>, faults: Vec<Fault>) -> Self {
        Self {
            inner,
            any: AtomicBool::new(!faults.is_empty()),
            faults: RwLock::new(faults),
        }
    }

    /// Replaces all faults by these; none heals the disk.
    pub fn set_faults(&self, faults: Vec<Fault>) {
        let mut current = self.faults.write().unwrap_or_else(PoisonError::into_inner);
        self.any.store(!faults.is_empty(), Ordering::Release);
        *current = faults;
    }

    /// Fails when a request of this kind touches a fault, and names the first bad byte.
    fn check(&self, offset: u64, len: u64, kind: FaultKind) -> Result<(), DiskError> {
        if !self.any.load(Ordering::Acquire) {
            return Ok(());
        }
        let end = offset.saturating_add(len);
        let faults = self.faults.read().unwrap_or_else(PoisonError::into_inner);
        let first = faults
            .iter()
            .filter(|fault| fault.kind == kind || fault.kind == FaultKind::All)
            .filter(|fault| fault.bytes.start < end && offset < fault.bytes.end)
            .map(|fault| fault.bytes.start.max(offset))
            .min();
        match first {
            Some(offset) => Err(DiskError::Medium { offset }),
            None => Ok(()),
        }
    }
}

impl Disk for FaultInjector {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn block_sizes(&self) -> BlockSizes {
        self.inner.block_sizes()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn identity(&self) -> Option<[u8; 16]> {
        self.inner.identity()
    }

    fn read_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        self.check(offset, buf.len() as u64, FaultKind::Read)?;
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        self.check(offset, buf.len() as u64, FaultKind::Write)?;
        self.inner.write_at(offset, buf)
    }

    fn zero_at(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.check(offset, len, FaultKind::Write)?;
        self.inner.zero_at(offset, len, unmap)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.inner.flush()
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.inner.resize(size)
    }
}
