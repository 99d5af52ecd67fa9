// SPDX-License-Identifier: MIT OR Apache-2.0

//! Injected faults, for tests of how a guest copes: ranges of a disk that cannot be read or
//! written, and a disk that is slow.

use super::{BlockSizes, Disk, DiskError, IoBuf};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

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
    /// Nanoseconds that each request takes longer.
    latency: AtomicU64,
}

impl FaultInjector {
    /// A layer over `inner` that begins with these faults.
    pub fn new(inner: Box<dyn Disk>, faults: Vec<Fault>) -> Self {
        Self {
            inner,
            any: AtomicBool::new(!faults.is_empty()),
            faults: RwLock::new(faults),
            latency: AtomicU64::new(0),
        }
    }

    /// Replaces all faults by these; none heals the disk.
    pub fn set_faults(&self, faults: Vec<Fault>) {
        let mut current = self.faults.write().unwrap_or_else(PoisonError::into_inner);
        self.any.store(!faults.is_empty(), Ordering::Release);
        *current = faults;
    }

    /// Makes each request that begins from now on take so much longer.
    pub fn set_latency(&self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latency.store(nanos, Ordering::Relaxed);
    }

    fn wait(&self) {
        let nanos = self.latency.load(Ordering::Relaxed);
        if nanos != 0 {
            std::thread::sleep(Duration::from_nanos(nanos));
        }
    }

    /// Waits as long as requests are to take, and fails when a request of this kind touches a
    /// fault, naming the first bad byte.
    fn check(&self, offset: u64, len: u64, kind: FaultKind) -> Result<(), DiskError> {
        self.wait();
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
        self.wait();
        self.inner.flush()
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.inner.resize(size)
    }
}
