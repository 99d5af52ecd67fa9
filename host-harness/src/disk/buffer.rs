// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory side of a disk transfer: a list of pieces of (guest) memory.

use vm_memory::VolatileSlice;

/// Pieces of memory, in order, that one transfer reads into or writes from.
///
/// The pieces may be guest memory, so other parties may change the bytes at any moment and pieces
/// may overlap: no reference to the bytes is ever made, they are copied or handed to the kernel.
#[derive(Debug, Clone, Default)]
pub struct IoBuf<'a> {
    slices: Vec<VolatileSlice<'a>>,
    len: usize,
}

impl<'a> IoBuf<'a> {
    /// A buffer of these pieces.
    pub fn new(slices: impl IntoIterator<Item = VolatileSlice<'a>>) -> Self {
        let slices: Vec<_> = slices.into_iter().filter(|s| !s.is_empty()).collect();
        let len = slices.iter().map(VolatileSlice::len).sum();
        Self { slices, len }
    }

    /// A buffer of one piece of ordinary memory.
    pub fn from_slice(bytes: &'a mut [u8]) -> Self {
        Self::new([VolatileSlice::from(bytes)])
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces; none is empty.
    pub fn slices(&self) -> &[VolatileSlice<'a>] {
        &self.slices
    }

    /// The part from `offset` on, at most `len` bytes: shorter when the buffer ends before.
    pub fn range(&self, offset: usize, len: usize) -> IoBuf<'a> {
        let mut skip = offset;
        let mut left = len;
        let mut slices = Vec::new();
        for slice in &self.slices {
            if left == 0 {
                break;
            }
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            let take = left.min(slice.len() - skip);
            if let Ok(part) = slice.subslice(skip, take) {
                slices.push(part);
            }
            left -= take;
            skip = 0;
        }
        Self::new(slices)
    }

    /// Copies `bytes` in from `offset` on, as far as there is room. Returns how many were copied.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.range(offset, bytes.len()).slices() {
            let Some(part) = bytes.get(done..done + slice.len()) else {
                break;
            };
            slice.copy_from(part);
            done += slice.len();
        }
        done
    }

    /// Copies bytes out from `offset` on into `bytes`. Returns how many there were.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.range(offset, bytes.len()).slices() {
            let Some(part) = bytes.get_mut(done..done + slice.len()) else {
                break;
            };
            slice.copy_to(part);
            done += slice.len();
        }
        done
    }

    /// All the bytes, copied.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }

    /// Sets all the bytes to zero.
    pub fn fill_zero(&self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < self.len {
            let n = (self.len - done).min(ZEROES.len());
            self.write(done, &ZEROES[..n]);
            done += n;
        }
    }
}
