// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guest buffers: page lists that the guest names (GPADLs and GPA-direct packets), checked against
//! guest memory and then usable as one run of bytes.
//!
//! All accesses go through `vm-memory`, which keeps them inside guest memory and volatile. The
//! guest can change the bytes at any moment: copy first, then check the copy.

use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// The guest's memory. It does not change while the virtual machine exists.
pub type GuestMem = Arc<GuestMemoryMmap>;

/// Size of a guest page in bytes.
pub const PAGE_SIZE: u32 = 4096;
const PAGE_SHIFT: u32 = 12;

/// A view of a contiguous part of guest memory.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, ()>>;

/// Why a page list of the guest cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GpaError {
    /// A page is not guest memory.
    #[error("page frame {0:#x} is not guest memory")]
    NotMemory(u64),
    /// The page list has fewer pages than the byte count needs.
    #[error("{have} pages for a buffer that needs {need}")]
    TooFewPages {
        /// Pages in the list.
        have: usize,
        /// Pages that offset and length need.
        need: usize,
    },
    /// The offset into the first page is not inside it.
    #[error("byte offset {0} is not inside the first page")]
    BadOffset(u32),
    /// An access beyond the end of the buffer.
    #[error("access of {len} bytes at {offset} in a buffer of {size}")]
    OutOfBounds {
        /// First byte of the access.
        offset: usize,
        /// Length of the access.
        len: usize,
        /// Length of the buffer.
        size: usize,
    },
}

/// Returns the address of page `pfn` if the whole page is guest memory.
pub(super) fn page_address(mem: &GuestMemoryMmap, pfn: u64) -> Result<GuestAddress, GpaError> {
    let addr = pfn
        .checked_mul(u64::from(PAGE_SIZE))
        .map(GuestAddress)
        .ok_or(GpaError::NotMemory(pfn))?;
    // The slice must come from one region, so that later accesses to the page never straddle two.
    mem.get_slice(addr, PAGE_SIZE as usize)
        .map(|_| addr)
        .map_err(|_| GpaError::NotMemory(pfn))
}

/// One run of bytes in guest memory that lies in one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    addr: GuestAddress,
    len: usize,
}

/// A guest buffer: pages anywhere in guest memory, seen as bytes 0 to `len()`.
///
/// # Invariants
/// Every segment is inside one region of guest memory, and `len` is the sum of their lengths.
#[derive(Debug, Clone)]
pub struct GuestBuffer {
    mem: GuestMem,
    segments: Vec<Segment>,
    len: usize,
}

impl GuestBuffer {
    /// Makes a buffer of `len` bytes that starts `offset` bytes into the first page of `pfns`.
    /// Pages that follow each other in guest memory become one segment. Pages after the end of the
    /// buffer are not looked at.
    ///
    /// # Errors
    /// A page is not guest memory, or there are too few pages, or `offset` is 4096 or more.
    pub fn from_pfns(
        mem: &GuestMem,
        offset: u32,
        len: u32,
        pfns: impl IntoIterator<Item = u64>,
    ) -> Result<Self, GpaError> {
        if offset >= PAGE_SIZE {
            return Err(GpaError::BadOffset(offset));
        }
        let need = (offset as usize + len as usize).div_ceil(PAGE_SIZE as usize);
        let mut segments: Vec<Segment> = Vec::new();
        let mut left = len as usize;
        let mut skip = offset as usize;
        let mut have = 0;
        for pfn in pfns.into_iter().take(need) {
            have += 1;
            let page = page_address(mem, pfn)?;
            let n = left.min(PAGE_SIZE as usize - skip);
            // `page` is a page of guest memory and `skip` is below the page size.
            let addr = page.unchecked_add(skip as u64);
            match segments.last_mut() {
                Some(last)
                    if last.addr.checked_add(last.len as u64) == Some(addr)
                        && mem.get_slice(last.addr, last.len + n).is_ok() =>
                {
                    last.len += n;
                }
                _ => segments.push(Segment { addr, len: n }),
            }
            left -= n;
            skip = 0;
        }
        if have < need {
            return Err(GpaError::TooFewPages { have, need });
        }
        Ok(Self {
            mem: mem.clone(),
            segments,
            len: len as usize,
        })
    }

    /// An empty buffer, for commands that move no data.
    pub fn empty(mem: &GuestMem) -> Self {
        Self {
            mem: mem.clone(),
            segments: Vec::new(),
            len: 0,
        }
    }

    /// Joins `other` to the end of this buffer (a packet may have several ranges).
    pub fn append(&mut self, other: GuestBuffer) {
        self.segments.extend(other.segments);
        self.len = self.len.saturating_add(other.len);
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Calls `f` with each contiguous slice of the bytes `offset .. offset + len`, in order, and
    /// with the position of the slice relative to `offset`. `f` may use the slice for vectored I/O
    /// (see `VolatileSlice::ptr_guard_mut`), but not keep it.
    ///
    /// # Errors
    /// The range is not inside the buffer (then `f` is not called), or what `f` returns.
    pub fn for_each_slice<E: From<GpaError>>(
        &self,
        offset: usize,
        len: usize,
        mut f: impl FnMut(usize, GuestSlice<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let out_of_bounds = GpaError::OutOfBounds {
            offset,
            len,
            size: self.len,
        };
        match offset.checked_add(len) {
            Some(end) if end <= self.len => {}
            _ => return Err(out_of_bounds.into()),
        }
        let mut skip = offset;
        let mut done = 0;
        for segment in &self.segments {
            if done == len {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let n = (segment.len - skip).min(len - done);
            let addr = segment.addr.unchecked_add(skip as u64);
            // By the invariant this cannot fail; the error is the honest one if it ever does.
            let slice = self
                .mem
                .get_slice(addr, n)
                .map_err(|_| GpaError::NotMemory(addr.raw_value() >> PAGE_SHIFT))?;
            f(done, slice)?;
            done += n;
            skip = 0;
        }
        if done < len {
            return Err(out_of_bounds.into());
        }
        Ok(())
    }

    /// The contiguous slices of the whole buffer, in order, for vectored I/O.
    ///
    /// # Errors
    /// None, by the invariant of the type.
    pub fn slices(&self) -> Result<Vec<GuestSlice<'_>>, GpaError> {
        let slice = |segment: &Segment| {
            self.mem
                .get_slice(segment.addr, segment.len)
                .map_err(|_| GpaError::NotMemory(segment.addr.raw_value() >> PAGE_SHIFT))
        };
        self.segments.iter().map(slice).collect()
    }

    /// Copies bytes from the guest: fills `buf` from `offset` on.
    ///
    /// # Errors
    /// The range is not inside the buffer.
    pub fn read_at(&self, offset: usize, buf: &mut [u8]) -> Result<(), GpaError> {
        self.for_each_slice(offset, buf.len(), |at, slice| {
            if let Some(part) = buf.get_mut(at..at + slice.len()) {
                slice.copy_to(part);
            }
            Ok(())
        })
    }

    /// Copies `buf` to the guest at `offset`.
    ///
    /// # Errors
    /// The range is not inside the buffer.
    pub fn write_at(&self, offset: usize, buf: &[u8]) -> Result<(), GpaError> {
        self.for_each_slice(offset, buf.len(), |at, slice| {
            if let Some(part) = buf.get(at..at + slice.len()) {
                slice.copy_from(part);
            }
            Ok(())
        })
    }

    /// Sets `len` bytes from `offset` on to zero.
    ///
    /// # Errors
    /// The range is not inside the buffer.
    pub fn zero(&self, offset: usize, len: usize) -> Result<(), GpaError> {
        const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        self.for_each_slice(offset, len, |_, slice| {
            let mut rest = slice;
            while !rest.is_empty() {
                let n = rest.len().min(ZEROS.len());
                rest.copy_from(&ZEROS[..n]);
                match rest.offset(n) {
                    Ok(next) => rest = next,
                    Err(_) => break,
                }
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    fn mem() -> GuestMem {
        // Two regions with a hole, like memory below and above 4 GiB.
        Arc::new(
            GuestMemoryMmap::from_ranges(&[
                (GuestAddress(0), 16 << 12),
                (GuestAddress(32 << 12), 16 << 12),
            ])
            .unwrap(),
        )
    }

    #[test]
    fn pages_in_any_order() {
        let m = mem();
        let b = GuestBuffer::from_pfns(&m, 100, 8192, [5, 6, 33]).unwrap();
        assert_eq!(b.len(), 8192);
        assert_eq!(b.segments.len(), 2);
        let data: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
        b.write_at(0, &data).unwrap();
        let mut back = vec![0; 8192];
        b.read_at(0, &mut back).unwrap();
        assert_eq!(back, data);
        // The last part is at the start of page 33.
        let mut tail = [0; 100];
        m.read_slice(&mut tail, GuestAddress(33 << 12)).unwrap();
        assert_eq!(tail[..], data[8092..]);
        b.zero(4000, 4100).unwrap();
        b.read_at(0, &mut back).unwrap();
        assert!(back[4000..8100].iter().all(|&v| v == 0));
        assert_eq!(back[..4000], data[..4000]);
        assert_eq!(back[8100..], data[8100..]);
    }

    #[test]
    fn regions_are_not_joined() {
        // Memory regions that touch stay two segments.
        let m = Arc::new(
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096), (GuestAddress(4096), 4096)])
                .unwrap(),
        );
        let b = GuestBuffer::from_pfns(&m, 0, 8192, [0, 1]).unwrap();
        assert_eq!(b.segments.len(), 2);
        b.write_at(4090, &[7; 12]).unwrap();
        let mut v = [0; 12];
        b.read_at(4090, &mut v).unwrap();
        assert_eq!(v, [7; 12]);
    }

    #[test]
    fn bad_lists() {
        let m = mem();
        let e = |r: Result<GuestBuffer, GpaError>| r.unwrap_err();
        assert_eq!(
            e(GuestBuffer::from_pfns(&m, 4096, 1, [1])),
            GpaError::BadOffset(4096)
        );
        assert_eq!(
            e(GuestBuffer::from_pfns(&m, 1, 4096, [1])),
            GpaError::TooFewPages { have: 1, need: 2 }
        );
        for pfn in [16, 31, 48, u64::MAX, u64::MAX >> 12, 1 << 52] {
            assert_eq!(
                e(GuestBuffer::from_pfns(&m, 0, 10, [pfn])),
                GpaError::NotMemory(pfn)
            );
        }
        let b = GuestBuffer::from_pfns(&m, 0, 10, [1]).unwrap();
        assert!(b.read_at(5, &mut [0; 6]).is_err());
        assert!(b.read_at(usize::MAX, &mut [0; 6]).is_err());
        assert!(b.read_at(10, &mut []).is_ok());
    }
}
