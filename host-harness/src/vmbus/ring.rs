// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory of one ring, as the ring code of `hv_proto` wants it: the pages of a GPADL, which
//! lie anywhere in guest memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use hv_proto::ring::{Field, RingMem};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, VolatileMemory};

use super::gpa::{GpaError, GuestMem, PAGE_SIZE, page_address};

const PAGE: usize = PAGE_SIZE as usize;

/// The smallest ring: the control page and one page of data.
pub(super) const MIN_RING_PAGES: usize = 2;

/// One ring in guest memory.
///
/// # Invariants
/// Each page was checked to be wholly inside one region of guest memory, which never changes.
/// There is at least one data page, and the data area is below 4 GiB.
#[derive(Debug, Clone)]
pub(super) struct GuestRing {
    mem: GuestMem,
    control: GuestAddress,
    data: Arc<[GuestAddress]>,
    data_len: u32,
}

impl GuestRing {
    /// The ring in these pages: the control page first, then the data.
    ///
    /// # Errors
    /// There are fewer than two pages, or a page is not guest memory.
    pub(super) fn new(mem: &GuestMem, pfns: &[u64]) -> Result<Self, GpaError> {
        let too_few = GpaError::TooFewPages {
            have: pfns.len(),
            need: MIN_RING_PAGES,
        };
        let (&control, data) = pfns.split_first().ok_or(too_few)?;
        if data.is_empty() {
            return Err(too_few);
        }
        let data_len = u32::try_from(data.len())
            .ok()
            .and_then(|n| n.checked_mul(PAGE_SIZE))
            .ok_or(too_few)?;
        Ok(Self {
            mem: mem.clone(),
            control: page_address(mem, control)?,
            data: data
                .iter()
                .map(|&pfn| page_address(mem, pfn))
                .collect::<Result<_, _>>()?,
            data_len,
        })
    }

    /// Runs `f` on a word of the control page.
    fn word<R>(&self, field: Field, f: impl FnOnce(&AtomicU32) -> R) -> Option<R> {
        let slice = self.mem.get_slice(self.control, PAGE).ok()?;
        let word = slice.get_atomic_ref::<AtomicU32>(field.offset() as usize);
        word.ok().map(f)
    }

    /// Calls `f` with each contiguous part of the data area from `offset` on, wrapping around at
    /// its end, and with the place of that part in the buffer of `len` bytes.
    fn for_each(
        &self,
        offset: u32,
        len: usize,
        mut f: impl FnMut(usize, vm_memory::VolatileSlice<'_>),
    ) {
        let mut at = offset % self.data_len;
        let mut done = 0;
        while done < len {
            let (page, in_page) = (at as usize / PAGE, at as usize % PAGE);
            let n = (PAGE - in_page).min(len - done);
            // By the invariant both lookups succeed.
            let slice = self
                .data
                .get(page)
                .and_then(|a| self.mem.get_slice(a.unchecked_add(in_page as u64), n).ok());
            if let Some(slice) = slice {
                f(done, slice);
            }
            done += n;
            at = (at + n as u32) % self.data_len;
        }
    }
}

impl RingMem for GuestRing {
    fn data_len(&self) -> u32 {
        self.data_len
    }

    fn load(&self, field: Field) -> u32 {
        // By the invariant the word is there.
        self.word(field, |w| w.load(Ordering::Acquire))
            .unwrap_or_default()
    }

    fn store(&self, field: Field, value: u32) {
        self.word(field, |w| w.store(value, Ordering::Release));
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn read_at(&self, offset: u32, buf: &mut [u8]) {
        let len = buf.len();
        self.for_each(offset, len, |at, slice| {
            if let Some(part) = buf.get_mut(at..) {
                slice.copy_to(part);
            }
        });
    }

    fn write_at(&self, offset: u32, buf: &[u8]) {
        self.for_each(offset, buf.len(), |at, slice| {
            if let Some(part) = buf.get(at..) {
                slice.copy_from(part);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use hv_proto::packet::Header;
    use hv_proto::ring::{Consumer, Producer, initialize};
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;

    fn mem() -> GuestMem {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 12)]).unwrap())
    }

    #[test]
    fn data_wraps_over_scattered_pages() {
        let m = mem();
        let ring = GuestRing::new(&m, &[9, 40, 3, 17]).unwrap();
        assert_eq!(ring.data_len(), 3 * 4096);
        let data: Vec<u8> = (0..9000u32).map(|i| (i % 253) as u8).collect();
        ring.write_at(2 * 4096 + 1000, &data);
        let mut back = vec![0; 9000];
        ring.read_at(2 * 4096 + 1000, &mut back);
        assert_eq!(back, data);
        // The part after the wrap starts with the second page of the list.
        let mut start = [0; 16];
        m.read_slice(&mut start, GuestAddress(40 << 12)).unwrap();
        assert_eq!(start[..], data[3096..3112]);
        ring.store(Field::FeatureBits, 0x1234);
        let word: u32 = m.read_obj(GuestAddress((9 << 12) + 64)).unwrap();
        assert_eq!(word, 0x1234);
    }

    #[test]
    fn packets_cross() {
        let m = mem();
        let pages = [5, 60, 6];
        initialize(&GuestRing::new(&m, &pages).unwrap());
        let mut tx = Producer::new(GuestRing::new(&m, &pages).unwrap()).unwrap();
        let mut rx = Consumer::new(GuestRing::new(&m, &pages).unwrap()).unwrap();
        let mut buf = [0; 4096];
        for i in 0..100u64 {
            let payload = vec![i as u8; 8 * (i as usize % 90)];
            let _ = tx.write(Header::in_band(i, false), &[&payload]).unwrap();
            let packet = rx.read(&mut buf).unwrap().unwrap();
            assert_eq!(packet.transaction_id(), i);
            assert_eq!(packet.payload(), &payload[..]);
            let _ = rx.commit();
        }
    }

    #[test]
    fn pages_are_checked() {
        let m = mem();
        assert!(GuestRing::new(&m, &[]).is_err());
        assert!(GuestRing::new(&m, &[1]).is_err());
        assert!(GuestRing::new(&m, &[1, 64]).is_err());
        assert!(GuestRing::new(&m, &[u64::MAX, 1]).is_err());
    }
}
