// SPDX-License-Identifier: MIT OR Apache-2.0

//! A throw-away layer over a disk (`snapshot=on`): what is written goes to a nameless temporary
//! file, which vanishes with the disk. The image below is only read.

use super::{BlockSizes, Disk, DiskError, IoBuf, SECTOR, check_range, file};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The unit in which the layer knows whether it has the data, in bytes.
const GRAIN: u64 = 4096;

/// The largest disk: ext4 has no larger files for the layer. Its map takes 512 MiB of addresses,
/// and memory only where the guest writes.
const MAX_SIZE: u64 = 16 << 40;

/// A disk whose changes are kept apart and forgotten.
pub struct SnapshotDisk {
    base: Box<dyn Disk>,
    layer: File,
    state: RwLock<State>,
}

struct State {
    /// One bit a grain: the layer has it.
    present: Vec<u64>,
    size: u64,
    /// Bytes of the base that still show through; what is after them reads as zeroes.
    base_size: u64,
}

impl State {
    fn has(&self, grain: u64) -> bool {
        self.present
            .get((grain / 64) as usize)
            .is_some_and(|word| word & (1 << (grain % 64)) != 0)
    }

    fn set(&mut self, grain: u64) {
        if let Some(word) = self.present.get_mut((grain / 64) as usize) {
            *word |= 1 << (grain % 64);
        }
    }

    fn clear(&mut self, grain: u64) {
        if let Some(word) = self.present.get_mut((grain / 64) as usize) {
            *word &= !(1 << (grain % 64));
        }
    }

    fn has_all(&self, grains: Range<u64>) -> bool {
        grains.into_iter().all(|grain| self.has(grain))
    }

    fn words(size: u64) -> usize {
        size.div_ceil(GRAIN).div_ceil(64) as usize
    }
}

/// The grains that a range of bytes touches.
fn grains(offset: u64, len: u64) -> Range<u64> {
    offset / GRAIN..(offset + len).div_ceil(GRAIN)
}

/// Refuses a size whose map would take all memory.
fn check_size(size: u64) -> Result<(), DiskError> {
    if size > MAX_SIZE {
        return Err(DiskError::Unsupported(format!(
            "{size} bytes are more than a disk with snapshot=on can have ({MAX_SIZE})"
        )));
    }
    Ok(())
}

impl SnapshotDisk {
    /// A layer over `base`, in a temporary file in the system's folder for such files (`TMPDIR`).
    ///
    /// # Errors
    /// The disk is larger than 16 TiB, or the temporary file cannot be made.
    pub fn new(base: Box<dyn Disk>) -> Result<Self, DiskError> {
        let size = base.size();
        check_size(size)?;
        Ok(Self {
            layer: tempfile::tempfile()
                .map_err(|e| io::Error::new(e.kind(), format!("no temporary file: {e}")))?,
            state: RwLock::new(State {
                present: vec![0; State::words(size)],
                size,
                base_size: size,
            }),
            base,
        })
    }

    // The state is consistent after each statement that changes it, so a poisoned lock is usable.
    fn shared(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads from the image below, with zeroes for what it has no longer.
    fn read_base(&self, base_size: u64, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        let below = base_size.saturating_sub(offset).min(buf.len() as u64) as usize;
        if below > 0 {
            self.base.read_at(offset, &buf.range(0, below))?;
        }
        buf.range(below, buf.len() - below).fill_zero();
        Ok(())
    }

    /// Brings a grain into the layer, unless it is there.
    fn fetch(&self, state: &mut State, grain: u64) -> Result<(), DiskError> {
        if state.has(grain) {
            return Ok(());
        }
        let mut bytes = vec![0; GRAIN as usize];
        let start = grain * GRAIN;
        let len = GRAIN.min(state.size.saturating_sub(start)) as usize;
        let part = bytes.get_mut(..len).unwrap_or_default();
        self.read_base(state.base_size, start, &IoBuf::from_slice(part))?;
        self.layer.write_all_at(&bytes, start)?;
        state.set(grain);
        Ok(())
    }

    /// Brings in the grains at the two ends of a range that the range covers only in part.
    fn fetch_edges(&self, state: &mut State, offset: u64, len: u64) -> Result<(), DiskError> {
        let end = offset + len;
        if !offset.is_multiple_of(GRAIN) {
            self.fetch(state, offset / GRAIN)?;
        }
        if !end.is_multiple_of(GRAIN) {
            self.fetch(state, end / GRAIN)?;
        }
        Ok(())
    }
}

impl Disk for SnapshotDisk {
    fn size(&self) -> u64 {
        self.shared().size
    }

    fn block_sizes(&self) -> BlockSizes {
        self.base.block_sizes()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn identity(&self) -> Option<[u8; 16]> {
        self.base.identity()
    }

    fn read_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        let state = self.shared();
        check_range(state.size, offset, buf.len() as u64)?;
        // One request to the layer or the base for each run of grains from the same place.
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let here = state.has(at / GRAIN);
            let mut stop = (at / GRAIN + 1) * GRAIN;
            while stop < end && state.has(stop / GRAIN) == here {
                stop += GRAIN;
            }
            let stop = stop.min(end);
            let part = buf.range((at - offset) as usize, (stop - at) as usize);
            if here {
                file::read_at(&self.layer, at, &part)?;
            } else {
                self.read_base(state.base_size, at, &part)?;
            }
            at = stop;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        let len = buf.len() as u64;
        if len == 0 {
            return Ok(());
        }
        let touched = {
            let state = self.shared();
            check_range(state.size, offset, len)?;
            let touched = grains(offset, len);
            if state.has_all(touched.clone()) {
                return Ok(file::write_at(&self.layer, offset, buf)?);
            }
            touched
        };
        let mut state = self.alone();
        check_range(state.size, offset, len)?;
        self.fetch_edges(&mut state, offset, len)?;
        file::write_at(&self.layer, offset, buf)?;
        for grain in touched {
            state.set(grain);
        }
        Ok(())
    }

    fn zero_at(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), DiskError> {
        if len == 0 {
            return Ok(());
        }
        let mut state = self.alone();
        check_range(state.size, offset, len)?;
        self.fetch_edges(&mut state, offset, len)?;
        file::zero_at(&self.layer, offset, len, true)?;
        for grain in grains(offset, len) {
            state.set(grain);
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        // Nothing of the layer outlives the process.
        Ok(())
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        if !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Unsupported(format!(
                "{size} bytes are not a multiple of {SECTOR}"
            )));
        }
        check_size(size)?;
        let mut state = self.alone();
        if size < state.size {
            // What is cut off must not come back: neither from the base nor from the layer.
            state.base_size = state.base_size.min(size);
            self.layer.set_len(size)?;
            // Only in the last word of the map; the words after it go.
            for grain in size.div_ceil(GRAIN)..State::words(size) as u64 * 64 {
                state.clear(grain);
            }
        }
        let words = State::words(size);
        if words > state.present.len() {
            // A new map, because growing the old one would touch all of its memory.
            let mut present = vec![0; words];
            for (new, old) in present.iter_mut().zip(&state.present) {
                *new = *old;
            }
            state.present = present;
        } else {
            state.present.truncate(words);
        }
        state.size = size;
        Ok(())
    }
}
