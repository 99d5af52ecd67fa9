// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A ring in ordinary memory, for tests and benchmarks of this crate and of the crates that use it.
//!
//! Not part of the kernel build: it needs `std`, and the feature `test-support` outside of this
//! crate's own tests.

extern crate std;

use crate::ring::{initialize, Field, RingMem};
use std::boxed::Box;
use std::sync::atomic::{fence, AtomicU32, AtomicU8, Ordering};
use std::sync::Arc;

/// Ring memory that both ends can share: clones are handles to the same memory.
#[derive(Clone, Debug)]
pub struct FlatRing(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    control: [AtomicU32; Field::ALL.len()],
    data: Box<[AtomicU8]>,
}

impl FlatRing {
    /// An empty ring with a data area of `data_len` bytes.
    pub fn new(data_len: u32) -> Self {
        let ring = Self(Arc::new(Inner {
            control: Default::default(),
            data: (0..data_len).map(|_| AtomicU8::new(0)).collect(),
        }));
        initialize(&ring);
        ring
    }

    fn word(&self, field: Field) -> &AtomicU32 {
        &self.0.control[field as usize]
    }

    /// The bytes from `offset` on, which continue at the start of the data area.
    fn bytes_from(&self, offset: u32) -> impl Iterator<Item = &AtomicU8> {
        let (start, end) = self.0.data.split_at(offset as usize);
        end.iter().chain(start)
    }
}

impl RingMem for FlatRing {
    fn data_len(&self) -> u32 {
        u32::try_from(self.0.data.len()).unwrap_or(u32::MAX)
    }

    fn load(&self, field: Field) -> u32 {
        self.word(field).load(Ordering::Acquire)
    }

    fn store(&self, field: Field, value: u32) {
        self.word(field).store(value, Ordering::Release);
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn read_at(&self, offset: u32, buf: &mut [u8]) {
        for (to, from) in buf.iter_mut().zip(self.bytes_from(offset)) {
            *to = from.load(Ordering::Relaxed);
        }
    }

    fn write_at(&self, offset: u32, buf: &[u8]) {
        for (to, from) in self.bytes_from(offset).zip(buf) {
            to.store(*from, Ordering::Relaxed);
        }
    }
}
