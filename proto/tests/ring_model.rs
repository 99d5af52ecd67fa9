// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The two ends of a ring at work at the same time, in every order that the memory model allows.
//!
//! loom runs the real code of `hv_proto::ring` over its own atomics, and tries all interleavings and
//! all values that a load may return. Three things are checked: no packet is torn (loom sees an
//! access to the data that is not ordered with the other end's), no signal is lost and no wait for
//! space is missed (loom sees that both threads sleep), and packets arrive whole and in order.
//!
//! That the models would see a mistake is checked, too: with one barrier or one ordering taken away
//! at a time, they must fail. Nothing needs a `cfg`, because the ring is generic over its memory.

use hv_proto::packet::Header;
use hv_proto::ring::{initialize, Consumer, Field, Producer, RingMem, WriteError};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{fence, AtomicU32, Ordering};
use loom::sync::Notify;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// What one run leaves out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// No barrier after a store to the field.
    FenceAfter(Field),
    /// No release ordering of stores to the field.
    Release(Field),
    /// No acquire ordering of loads from the field.
    Acquire(Field),
}

/// Memory that both ends share. loom runs its threads one after the other on a single one, so `Rc` may
/// cross them. It is not part of the model: a counter that
/// loom knew would panic once more while the panic of a flawed run unwinds.
struct Shared {
    control: [AtomicU32; Field::ALL.len()],
    /// loom checks accesses to the cells; a cell stands for 8 bytes.
    cells: Vec<UnsafeCell<()>>,
    /// The bytes themselves. Only one of loom's threads runs at a time, so loom need not know.
    bytes: Vec<AtomicU8>,
    flaw: Flaw,
}

/// One end's view of the memory.
struct Ring {
    shared: Rc<Shared>,
    last_store: Cell<Option<Field>>,
}

impl Ring {
    fn pair(data_len: usize, flaw: Flaw) -> (Self, Self) {
        let shared = Rc::new(Shared {
            control: std::array::from_fn(|_| AtomicU32::new(0)),
            cells: (0..data_len / 8).map(|_| UnsafeCell::new(())).collect(),
            bytes: (0..data_len).map(|_| AtomicU8::new(0)).collect(),
            flaw,
        });
        let view = |shared| Ring {
            shared,
            last_store: Cell::new(None),
        };
        let pair = (view(shared.clone()), view(shared));
        initialize(&pair.0);
        pair
    }

    /// The positions of `len` bytes from `offset` on, around the end of the data area.
    fn positions(&self, offset: u32, len: usize) -> impl Iterator<Item = usize> {
        let data_len = self.shared.bytes.len();
        (offset as usize..offset as usize + len).map(move |at| at % data_len)
    }
}

impl RingMem for Ring {
    fn data_len(&self) -> u32 {
        self.shared.bytes.len() as u32
    }

    fn load(&self, field: Field) -> u32 {
        let order = match self.shared.flaw {
            Flaw::Acquire(weak) if weak == field => Ordering::Relaxed,
            _ => Ordering::Acquire,
        };
        self.shared.control[field as usize].load(order)
    }

    fn store(&self, field: Field, value: u32) {
        let order = match self.shared.flaw {
            Flaw::Release(weak) if weak == field => Ordering::Relaxed,
            _ => Ordering::Release,
        };
        self.last_store.set(Some(field));
        self.shared.control[field as usize].store(value, order);
    }

    fn fence(&self) {
        match (self.shared.flaw, self.last_store.get()) {
            (Flaw::FenceAfter(weak), Some(field)) if weak == field => (),
            _ => fence(Ordering::SeqCst),
        }
    }

    fn read_at(&self, offset: u32, buf: &mut [u8]) {
        for at in self.positions(offset, buf.len()).step_by(8) {
            self.shared.cells[at / 8].with(|_| ());
        }
        for (at, to) in self.positions(offset, buf.len()).zip(buf) {
            *to = self.shared.bytes[at].load(Relaxed);
        }
    }

    fn write_at(&self, offset: u32, buf: &[u8]) {
        for at in self.positions(offset, buf.len()).step_by(8) {
            self.shared.cells[at / 8].with_mut(|_| ());
        }
        for (at, from) in self.positions(offset, buf.len()).zip(buf) {
            self.shared.bytes[at].store(*from, Relaxed);
        }
    }
}

/// Runs the model: `packets` packets of 32 bytes through a ring of `data_len` bytes.
///
/// The reader sleeps until it is signalled, and the writer does so when the ring is full.
fn run(data_len: usize, packets: u64, flaw: Flaw) {
    let mut model = loom::model::Builder::new();
    // Involuntary switches of thread. More of them multiply the time; every flaw below needs fewer.
    model.preemption_bound = Some(4);
    model.check(move || {
        let (writer, reader) = Ring::pair(data_len, flaw);
        let data = Rc::new(Notify::new());
        let space = Rc::new(Notify::new());

        let thread = {
            let (data, space) = (data.clone(), space.clone());
            loom::thread::spawn(move || {
                let mut consumer = Consumer::new(reader).unwrap();
                let mut buf = [0; 24];
                let mut next = 0;
                while next < packets {
                    data.wait();
                    loop {
                        consumer.mask();
                        while let Some(packet) = consumer.read(&mut buf).unwrap() {
                            assert_eq!(packet.transaction_id(), next);
                            assert_eq!(packet.payload(), (!next).to_le_bytes());
                            next += 1;
                        }
                        let unmasked = consumer.unmask();
                        if unmasked.signal.is_needed() {
                            space.notify();
                        }
                        if !unmasked.more {
                            break;
                        }
                    }
                }
            })
        };

        let mut producer = Producer::new(writer).unwrap();
        for id in 0..packets {
            let payload = (!id).to_le_bytes();
            let signal = loop {
                match producer.write(Header::in_band(id, false), &[&payload]) {
                    Ok(signal) => break signal,
                    Err(WriteError::Full { needed }) => {
                        if !producer.wait_for_space(needed).unwrap() {
                            space.wait();
                        }
                    }
                    Err(error) => panic!("{error}"),
                }
            };
            if signal.is_needed() {
                data.notify();
            }
        }
        thread.join().unwrap();
    });
}

/// Both packets fit, so that only the reader sleeps.
fn signals(flaw: Flaw) {
    run(128, 2, flaw);
}

/// Only one packet fits, so that the writer sleeps, too.
fn space(flaw: Flaw) {
    run(40, 2, flaw);
}

#[test]
fn no_signal_is_lost() {
    signals(Flaw::None);
}

#[test]
fn no_wait_for_space_is_missed() {
    space(Flaw::None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn barrier_after_the_write_index_is_needed() {
    signals(Flaw::FenceAfter(Field::WriteIndex));
}

#[test]
#[should_panic(expected = "deadlock")]
fn barrier_after_the_interrupt_mask_is_needed() {
    signals(Flaw::FenceAfter(Field::InterruptMask));
}

#[test]
#[should_panic(expected = "deadlock")]
fn barrier_after_the_pending_send_size_is_needed() {
    space(Flaw::FenceAfter(Field::PendingSendSize));
}

#[test]
#[should_panic(expected = "deadlock")]
fn barrier_after_the_read_index_is_needed() {
    space(Flaw::FenceAfter(Field::ReadIndex));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn release_of_the_write_index_is_needed() {
    signals(Flaw::Release(Field::WriteIndex));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn acquire_of_the_write_index_is_needed() {
    signals(Flaw::Acquire(Field::WriteIndex));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn release_of_the_read_index_is_needed() {
    space(Flaw::Release(Field::ReadIndex));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn acquire_of_the_read_index_is_needed() {
    space(Flaw::Acquire(Field::ReadIndex));
}
