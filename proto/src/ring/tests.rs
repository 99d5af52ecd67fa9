// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the ring: each rule by example, and random use and random memory by property.

use super::*;
use crate::flat_ring::FlatRing;
use crate::packet::{PacketFlags, PacketType};
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::{vec, vec::Vec};

/// Size of a packet with 8 bytes of payload in the ring.
const SMALL: u32 = 32;

fn ring(data_len: u32) -> (Producer<FlatRing>, Consumer<FlatRing>, FlatRing) {
    let mem = FlatRing::new(data_len);
    let producer = Producer::new(mem.clone()).unwrap();
    let consumer = Consumer::new(mem.clone()).unwrap();
    (producer, consumer, mem)
}

fn bytes(mem: &FlatRing, offset: u32, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    mem.read_at(offset, &mut buf);
    buf
}

fn write(producer: &mut Producer<FlatRing>, id: u64) -> Result<Signal, WriteError> {
    producer.write(Header::in_band(id, false), &[&id.to_le_bytes()])
}

fn read_id(consumer: &mut Consumer<FlatRing>) -> Option<u64> {
    let mut buf = [0; 24];
    let packet = consumer.read(&mut buf).unwrap()?;
    assert_eq!(packet.payload(), packet.transaction_id().to_le_bytes());
    Some(packet.transaction_id())
}

#[test]
fn packet_has_the_layout_of_the_wire() {
    let (mut producer, _, mem) = ring(4096);
    let header = Header::in_band(0x1122_3344_5566_7788, true);
    producer
        .write(header, &[b"ab", b"", b"cdefghi"])
        .unwrap()
        .is_needed();
    let expected = [
        6, 0, 2, 0, 4, 0, 1, 0, // type, offset8, len8, flags
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // transaction id
        b'a', b'b', b'c', b'd', b'e', b'f', b'g', b'h', // payload
        b'i', 0, 0, 0, 0, 0, 0, 0, // payload and padding
        0, 0, 0, 0, 0, 0, 0, 0, // trailer: write index 0
    ];
    assert_eq!(bytes(&mem, 0, 40), expected);
    assert_eq!(mem.load(Field::WriteIndex), 40);
    assert_eq!(mem.load(Field::FeatureBits), FEATURE_PENDING_SEND_SIZE);

    let _ = producer.write(Header::completion(5), &[]).unwrap();
    let expected = [
        11, 0, 2, 0, 2, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, // no payload
        0, 0, 0, 0, 40, 0, 0, 0, // trailer: write index 40
    ];
    assert_eq!(bytes(&mem, 40, 24), expected);
}

#[test]
fn padding_hides_what_was_there_before() {
    let (mut producer, mut consumer, mem) = ring(4096);
    mem.write_at(0, &[0xff; 64]);
    let _ = producer.write(Header::in_band(1, false), &[&[1]]).unwrap();
    let mut buf = [0; 24];
    let packet = consumer.read(&mut buf).unwrap().unwrap();
    assert_eq!(packet.payload(), [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn packets_wrap_around_the_end() {
    let (mut producer, mut consumer, _) = ring(80);
    for id in 0..100 {
        let _ = write(&mut producer, id).unwrap();
        assert_eq!(read_id(&mut consumer), Some(id));
        let _ = consumer.commit();
    }
}

#[test]
fn ring_is_never_filled_completely() {
    let (mut producer, mut consumer, mem) = ring(2 * SMALL);
    let _ = write(&mut producer, 1).unwrap();
    let full = WriteError::Full { needed: SMALL };
    assert_eq!(write(&mut producer, 2), Err(full));
    assert_eq!(mem.load(Field::WriteIndex), SMALL);
    assert_eq!(read_id(&mut consumer), Some(1));
    // The space counts as free only when the reader has said so.
    assert_eq!(write(&mut producer, 2), Err(full));
    let _ = consumer.commit();
    let _ = write(&mut producer, 2).unwrap();
    assert_eq!(read_id(&mut consumer), Some(2));
    assert_eq!(read_id(&mut consumer), None);
}

#[test]
fn packet_that_never_fits_is_not_full() {
    let (mut producer, _, _) = ring(64);
    let too_large = Err(WriteError::TooLarge);
    assert_eq!(producer.write(Header::cancel(0), &[&[0; 40]]), too_large);
    assert!(producer.write(Header::cancel(0), &[&[0; 32]]).is_ok());

    let (mut producer, mut consumer, _) = ring(1 << 20);
    let largest = vec![7; (MAX_PACKET_SIZE - DESCRIPTOR_SIZE) as usize];
    let header = Header::in_band(0, false);
    assert_eq!(producer.write(header, &[&largest, &[0]]), too_large);
    let _ = producer.write(header, &[&largest]).unwrap();
    let mut buf = vec![0; MAX_PACKET_SIZE as usize];
    assert_eq!(consumer.read(&mut buf).unwrap().unwrap().payload(), largest);
}

#[test]
fn impossible_memory_is_refused() {
    for len in [0, 8, 24, 33, MAX_DATA_LEN + 8, u32::MAX] {
        let mem = Chaos::with_len(len);
        let expected = Corrupt::DataLength(len);
        assert_eq!(Producer::new(&mem).unwrap_err(), expected);
        assert_eq!(Consumer::new(&mem).unwrap_err(), expected);
        assert_eq!(Snapshot::of(&mem).readable, None);
    }
    let mem = FlatRing::new(64);
    mem.store(Field::WriteIndex, 64);
    mem.store(Field::ReadIndex, 12);
    assert_eq!(Producer::new(&mem).unwrap_err(), Corrupt::WriteIndex(64));
    assert_eq!(Consumer::new(&mem).unwrap_err(), Corrupt::ReadIndex(12));
}

#[test]
fn ends_take_over_a_ring_in_use() {
    let (mut producer, mut consumer, mem) = ring(4096);
    let _ = write(&mut producer, 1).unwrap();
    let _ = write(&mut producer, 2).unwrap();
    assert_eq!(read_id(&mut consumer), Some(1));
    let _ = consumer.commit();
    let mut producer = Producer::new(mem.clone()).unwrap();
    let mut consumer = Consumer::new(mem).unwrap();
    let _ = write(&mut producer, 3).unwrap();
    assert_eq!(read_id(&mut consumer), Some(2));
    assert_eq!(read_id(&mut consumer), Some(3));
}

#[test]
fn corrupt_indices_are_not_empty_or_full() {
    for bad in [4096, 4100, 1, 4, 12, u32::MAX] {
        let (mut producer, mut consumer, mem) = ring(4096);
        let _ = write(&mut producer, 1).unwrap();
        mem.store(Field::WriteIndex, bad);
        mem.store(Field::ReadIndex, bad);
        let corrupt = Corrupt::ReadIndex(bad);
        assert_eq!(write(&mut producer, 2), Err(WriteError::Corrupt(corrupt)));
        assert_eq!(producer.free_bytes(), Err(corrupt));
        assert_eq!(producer.wait_for_space(8), Err(corrupt));
        let corrupt = Corrupt::WriteIndex(bad);
        assert_eq!(
            consumer.read(&mut [0; 64]).unwrap_err(),
            ReadError::Corrupt(corrupt)
        );
        assert_eq!(consumer.available_bytes(), Err(corrupt));
        // So that the reader looks and finds out.
        assert!(consumer.unmask().more);
        assert_eq!(Snapshot::of(&mem).readable, None);
        assert_eq!(Snapshot::of(&mem).writable, None);
    }
}

#[test]
fn own_index_in_shared_memory_does_not_count() {
    let (mut producer, mut consumer, mem) = ring(4096);
    let _ = write(&mut producer, 1).unwrap();
    mem.store(Field::WriteIndex, 400);
    let _ = write(&mut producer, 2).unwrap();
    assert_eq!(mem.load(Field::WriteIndex), 2 * SMALL);
    mem.store(Field::ReadIndex, 400);
    assert_eq!(read_id(&mut consumer), Some(1));
    assert_eq!(read_id(&mut consumer), Some(2));
    let _ = consumer.commit();
    assert_eq!(mem.load(Field::ReadIndex), 2 * SMALL);
}

#[test]
fn bad_descriptors_are_corrupt() {
    let length = |len, available| PacketError::Length { len, available };
    let offset = |offset, len| PacketError::PayloadOffset { offset, len };
    let cases = [
        // offset8, len8, bytes available, error
        (2, 0, 64, length(0, 64)),
        (1, 1, 64, length(8, 64)),
        (2, 8, 64, length(64, 64)), // no room for the trailer
        (2, 0xffff, 64, length(0x7fff8, 64)),
        (0, 4, 64, offset(0, 32)),
        (1, 4, 64, offset(8, 32)),
        (5, 4, 64, offset(40, 32)),
        (0xffff, 4, 64, offset(0x7fff8, 32)),
        (2, 2, 8, length(0, 8)),
        (2, 2, 16, length(16, 16)),
    ];
    for (offset8, len8, available, error) in cases {
        let (_, mut consumer, mem) = ring(4096);
        let descriptor = Descriptor {
            packet_type: PacketType::IN_BAND,
            offset8: U16::new(offset8),
            len8: U16::new(len8),
            flags: 0.into(),
            transaction_id: 0.into(),
        };
        mem.write_at(0, descriptor.as_bytes());
        mem.store(Field::WriteIndex, available);
        let expected = ReadError::Corrupt(Corrupt::Packet(error));
        assert_eq!(consumer.read(&mut [0; 4096]).unwrap_err(), expected);
    }
}

#[test]
fn packet_larger_than_the_buffer_can_be_read_or_skipped() {
    let (mut producer, mut consumer, _) = ring(4096);
    let _ = producer
        .write(Header::in_band(1, false), &[&[1; 100]])
        .unwrap();
    let _ = producer
        .write(Header::in_band(2, false), &[&[2; 100]])
        .unwrap();
    let _ = write(&mut producer, 3).unwrap();

    assert!(!consumer.skip());
    let too_large = ReadError::TooLarge { len: 120 };
    for size in [0, 15, 16, 119] {
        assert_eq!(consumer.read(&mut vec![0; size]).unwrap_err(), too_large);
    }
    let mut buf = [0; 120];
    assert_eq!(
        consumer.read(&mut buf).unwrap().unwrap().transaction_id(),
        1
    );
    assert!(!consumer.skip());
    assert_eq!(consumer.read(&mut [0; 24]).unwrap_err(), too_large);
    assert!(consumer.skip());
    assert!(!consumer.skip());
    assert_eq!(read_id(&mut consumer), Some(3));
    assert_eq!(read_id(&mut consumer), None);
}

#[test]
fn changes_after_the_copy_have_no_effect() {
    /// The peer changes the descriptor as soon as it has been read.
    struct Changing(FlatRing);
    impl RingMem for Changing {
        fn data_len(&self) -> u32 {
            self.0.data_len()
        }
        fn load(&self, field: Field) -> u32 {
            self.0.load(field)
        }
        fn store(&self, field: Field, value: u32) {
            self.0.store(field, value);
        }
        fn fence(&self) {}
        fn read_at(&self, offset: u32, buf: &mut [u8]) {
            self.0.read_at(offset, buf);
            self.0.write_at(0, &[0xff; 16]);
        }
        fn write_at(&self, _: u32, _: &[u8]) {}
    }
    let (mut producer, _, mem) = ring(4096);
    let _ = write(&mut producer, 9).unwrap();
    let mut consumer = Consumer::new(Changing(mem)).unwrap();
    let mut buf = [0; 64];
    let packet = consumer.read(&mut buf).unwrap().unwrap();
    assert_eq!(packet.transaction_id(), 9);
    assert_eq!(packet.packet_type(), PacketType::IN_BAND);
    assert_eq!(packet.payload(), 9u64.to_le_bytes());
}

#[test]
fn only_the_first_packet_of_an_empty_ring_signals() {
    let (mut producer, mut consumer, _) = ring(4096);
    assert_eq!(write(&mut producer, 1), Ok(Signal::Needed));
    assert_eq!(write(&mut producer, 2), Ok(Signal::NotNeeded));
    consumer.mask();
    while read_id(&mut consumer).is_some() {}
    let _ = consumer.commit();
    assert_eq!(write(&mut producer, 3), Ok(Signal::NotNeeded));
    let unmasked = consumer.unmask();
    assert!(unmasked.more);
    assert_eq!(read_id(&mut consumer), Some(3));
    assert!(!consumer.unmask().more);
    assert_eq!(write(&mut producer, 4), Ok(Signal::Needed));
}

#[test]
fn writer_that_waits_is_signalled_once() {
    let (mut producer, mut consumer, mem) = ring(4 * SMALL);
    for id in 0..3 {
        let _ = write(&mut producer, id).unwrap();
    }
    let needed = 2 * SMALL;
    let header = Header::in_band(9, false);
    let payload: &[&[u8]] = &[&[0; 40]];
    assert_eq!(
        producer.write(header, payload),
        Err(WriteError::Full { needed })
    );
    assert_eq!(producer.wait_for_space(needed), Ok(false));
    assert_eq!(mem.load(Field::PendingSendSize), needed);

    // Two units are free, which is not more than two.
    assert_eq!(read_id(&mut consumer), Some(0));
    assert_eq!(consumer.commit(), Signal::NotNeeded);
    assert_eq!(read_id(&mut consumer), Some(1));
    assert_eq!(consumer.commit(), Signal::Needed);
    assert_eq!(read_id(&mut consumer), Some(2));
    assert_eq!(consumer.commit(), Signal::NotNeeded);
    assert_eq!(consumer.commit(), Signal::NotNeeded);

    // A smaller packet of somebody else does not end the wait, the packet itself does.
    let _ = write(&mut producer, 3).unwrap();
    assert_eq!(producer.pending_send_size(), needed);
    let _ = producer.write(header, payload).unwrap();
    assert_eq!(producer.pending_send_size(), 0);
    assert_eq!(mem.load(Field::PendingSendSize), 0);
}

#[test]
fn wait_ends_at_once_when_there_is_room() {
    let (mut producer, _, mem) = ring(4096);
    assert_eq!(producer.wait_for_space(64), Ok(true));
    assert_eq!(mem.load(Field::PendingSendSize), 0);
    let _ = write(&mut producer, 1).unwrap();
    // Nothing can wait for more than the empty ring.
    assert_eq!(producer.wait_for_space(u32::MAX), Ok(false));
    assert_eq!(mem.load(Field::PendingSendSize), 4095);
    producer.stop_waiting();
    assert_eq!(mem.load(Field::PendingSendSize), 0);
}

#[test]
fn writer_that_waits_for_the_whole_ring_is_signalled() {
    let (mut producer, mut consumer, mem) = ring(4096);
    let _ = write(&mut producer, 1).unwrap();
    let _ = write(&mut producer, 2).unwrap();
    mem.store(Field::PendingSendSize, u32::MAX);
    assert_eq!(read_id(&mut consumer), Some(1));
    assert_eq!(consumer.commit(), Signal::NotNeeded);
    assert_eq!(read_id(&mut consumer), Some(2));
    assert_eq!(consumer.unmask().signal, Signal::Needed);
}

#[test]
fn pending_send_size_needs_the_feature_bit() {
    let (mut producer, mut consumer, mem) = ring(2 * SMALL);
    let _ = write(&mut producer, 1).unwrap();
    assert_eq!(producer.wait_for_space(SMALL), Ok(false));
    assert!(consumer.peer_uses_pending_send_size());
    mem.store(Field::FeatureBits, 0);
    assert!(!consumer.peer_uses_pending_send_size());
    assert_eq!(read_id(&mut consumer), Some(1));
    assert_eq!(consumer.commit(), Signal::NotNeeded);
}

#[test]
fn reservation_that_is_dropped_leaves_no_trace() {
    let (mut producer, mut consumer, mem) = ring(4096);
    let mut reservation = producer.reserve(Header::in_band(1, false), 8, 8).unwrap();
    reservation.put(&[1; 8]).unwrap();
    drop(reservation);
    assert_eq!(mem.load(Field::WriteIndex), 0);
    let _ = write(&mut producer, 2).unwrap();
    assert_eq!(read_id(&mut consumer), Some(2));
}

#[test]
fn reservation_is_filled_exactly() {
    let (mut producer, mut consumer, mem) = ring(4096);
    let header = Header::in_band(1, false);
    let wrong = WriteError::WrongLength;
    assert_eq!(producer.reserve(header, 4, 4).unwrap_err(), wrong);

    let mut reservation = producer.reserve(header, 8, 3).unwrap();
    assert_eq!(reservation.put(&[0; 12]), Err(wrong));
    reservation.put(&[0; 10]).unwrap();
    assert_eq!(reservation.put(&[0; 2]), Err(wrong));
    assert_eq!(reservation.commit(), Err(wrong));
    assert_eq!(mem.load(Field::WriteIndex), 0);

    let mut reservation = producer.reserve(header, 8, 3).unwrap();
    reservation.put(&[1; 8]).unwrap();
    reservation.put(&[]).unwrap();
    reservation.put(&[2; 3]).unwrap();
    let _ = reservation.commit().unwrap();
    let mut buf = [0; 64];
    let packet = consumer.read(&mut buf).unwrap().unwrap();
    assert_eq!(packet.header(), [1; 8]);
    assert_eq!(packet.payload(), [2, 2, 2, 0, 0, 0, 0, 0]);
}

#[test]
fn gpa_direct_packet_has_the_layout_of_the_wire() {
    let (mut producer, _, mem) = ring(4096);
    let header = Header::gpa_direct(7, true);
    let _ = producer
        .write_gpa_direct(header, 0x1700, 0x900, [0x10, 0x22], &[&[0xee; 8]])
        .unwrap();
    let expected = [
        9, 0, 6, 0, 7, 0, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0, // descriptor
        0, 0, 0, 0, 1, 0, 0, 0, // reserved, range count
        0, 0x17, 0, 0, 0, 9, 0, 0, // byte count, byte offset
        0x10, 0, 0, 0, 0, 0, 0, 0, 0x22, 0, 0, 0, 0, 0, 0, 0, // PFNs
        0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, // payload
        0, 0, 0, 0, 0, 0, 0, 0, // trailer
    ];
    assert_eq!(bytes(&mem, 0, 64), expected);
}

#[test]
fn gpa_direct_packet_needs_exactly_its_pages() {
    let (mut producer, mut consumer, mem) = ring(65536);
    let header = Header::gpa_direct(1, true);
    let pages = |count: u64| 0x1000..0x1000 + count;
    // Around the size of the chunks in which PFNs are converted.
    for count in [1, 2, 31, 32, 33, 63, 64, 65, 100] {
        let byte_count = count as u32 * PAGE_SIZE - 100;
        let mut write = |pfns| producer.write_gpa_direct(header, byte_count, 50, pfns, &[]);
        let wrong = Err(WriteError::WrongLength);
        assert_eq!(write(pages(count - 1)), wrong);
        assert_eq!(write(pages(count + 1)), wrong);
        let _ = write(pages(count)).unwrap();
        let mut buf = [0; 4096];
        let packet = consumer.read(&mut buf).unwrap().unwrap();
        let ranges = packet.gpa_direct(1).unwrap();
        assert_eq!(ranges.byte_count(), u64::from(byte_count));
        let range = ranges.ranges().next().unwrap();
        assert_eq!((range.byte_count(), range.byte_offset()), (byte_count, 50));
        assert!(range.pfns().eq(pages(count)));
        assert_eq!(read_id(&mut consumer), None);
    }
    let end = mem.load(Field::WriteIndex);
    for (count, offset) in [(1, 4096), (1, u32::MAX), (u32::MAX, 4095)] {
        let result = producer.write_gpa_direct(header, count, offset, [1], &[]);
        assert!(matches!(
            result,
            Err(WriteError::WrongLength | WriteError::TooLarge)
        ));
    }
    assert_eq!(
        producer.write_gpa_ranges(header, &[], &[]),
        Err(WriteError::WrongLength)
    );
    assert_eq!(mem.load(Field::WriteIndex), end);
}

#[test]
fn gpa_direct_packet_takes_several_ranges() {
    let (mut producer, mut consumer, _) = ring(4096);
    let ranges = [
        PageRange {
            byte_count: 10,
            byte_offset: 4090,
            pfns: &[5, 6],
        },
        PageRange {
            byte_count: 4096,
            byte_offset: 0,
            pfns: &[7],
        },
        PageRange {
            byte_count: 0,
            byte_offset: 0,
            pfns: &[],
        },
    ];
    let _ = producer
        .write_gpa_ranges(Header::gpa_direct(1, false), &ranges, &[b"payload"])
        .unwrap();
    let mut buf = [0; 256];
    let packet = consumer.read(&mut buf).unwrap().unwrap();
    assert_eq!(packet.payload(), b"payload\0");
    let direct = packet.gpa_direct(3).unwrap();
    assert_eq!(direct.range_count(), 3);
    assert_eq!(direct.byte_count(), 4106);
    let segments: Vec<_> = direct.ranges().flat_map(|range| range.segments()).collect();
    assert_eq!(segments, [(0x5ffa, 6), (0x6000, 4), (0x7000, 4096)]);
}

#[test]
fn snapshot_shows_both_directions() {
    let (mut producer, mut consumer, mem) = ring(4096);
    let _ = write(&mut producer, 1).unwrap();
    consumer.mask();
    let snapshot = Snapshot::of(&mem);
    assert_eq!(snapshot.readable, Some(SMALL));
    assert_eq!(snapshot.writable, Some(4096 - SMALL));
    assert_eq!(snapshot.interrupt_mask, 1);
    assert_eq!((snapshot.read_index, snapshot.write_index), (0, SMALL));
}

#[test]
fn errors_tell_what_is_wrong() {
    use std::string::ToString;
    let corrupt = Corrupt::Packet(PacketError::Length {
        len: 8,
        available: 32,
    });
    let text = "bad packet in ring: packet length 8 does not fit the 32 bytes available";
    assert_eq!(ReadError::Corrupt(corrupt).to_string(), text);
    assert_eq!(WriteError::Corrupt(corrupt).to_string(), text);
    let full = WriteError::Full { needed: 32 };
    assert_eq!(full.to_string(), "no room for 32 bytes in ring");
    let too_large = ReadError::TooLarge { len: 99 };
    assert_eq!(
        too_large.to_string(),
        "packet of 99 bytes is larger than the buffer"
    );
    assert_eq!(
        Corrupt::ReadIndex(16).to_string(),
        "bad ring read index 0x10"
    );
}

#[test]
fn threads_exchange_packets_without_polling() {
    let count = if cfg!(miri) { 50 } else { 20_000 };
    let (mut producer, mut consumer, _) = ring(256);
    let reader = std::thread::current();
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            for id in 0..count {
                let len = (id % 13 * 8) as usize;
                let payload = [id as u8; 104];
                let parts: &[&[u8]] = &[&payload[..len]];
                loop {
                    match producer.write(Header::in_band(id, false), parts) {
                        Ok(signal) => {
                            if signal.is_needed() {
                                reader.unpark();
                            }
                            break;
                        }
                        Err(WriteError::Full { needed }) => {
                            if !producer.wait_for_space(needed).unwrap() {
                                std::thread::park();
                            }
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        });
        let mut buf = [0; 120];
        let mut next = 0;
        while next < count {
            consumer.mask();
            while let Some(packet) = consumer.read(&mut buf).unwrap() {
                assert_eq!(packet.transaction_id(), next);
                assert_eq!(packet.payload().len() as u64, next % 13 * 8);
                assert!(packet.payload().iter().all(|&byte| byte == next as u8));
                next += 1;
            }
            let unmasked = consumer.unmask();
            if unmasked.signal.is_needed() {
                writer.thread().unpark();
            }
            if !unmasked.more && next < count {
                std::thread::park();
            }
        }
    });
}

/// A peer that stores other numbers all the time: each load and each read takes the next of a list.
#[derive(Debug)]
struct Chaos {
    len: u32,
    words: RefCell<VecDeque<u32>>,
}

impl Chaos {
    fn with_len(len: u32) -> Self {
        Self {
            len,
            words: RefCell::default(),
        }
    }

    fn next(&self) -> u32 {
        let mut words = self.words.borrow_mut();
        let word = words.pop_front().unwrap_or(0);
        words.push_back(word);
        word
    }
}

impl RingMem for Chaos {
    fn data_len(&self) -> u32 {
        self.len
    }
    fn load(&self, _: Field) -> u32 {
        self.next()
    }
    fn store(&self, _: Field, _: u32) {}
    fn fence(&self) {}
    fn read_at(&self, offset: u32, buf: &mut [u8]) {
        assert!(offset < self.len && buf.len() <= self.len as usize);
        for chunk in buf.chunks_mut(4) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
    fn write_at(&self, offset: u32, buf: &[u8]) {
        assert!(offset < self.len && buf.len() <= self.len as usize);
    }
}

/// What the ends do in a random run.
#[derive(Clone, Debug)]
enum Op {
    Write {
        extension: usize,
        payload: Vec<Vec<u8>>,
        flags: u16,
        packet_type: u16,
    },
    Read {
        room: usize,
    },
    Skip,
    Commit,
    Mask,
    Unmask,
    Wait(u32),
    StopWaiting,
}

fn any_op() -> impl Strategy<Value = Op> {
    let part = proptest::collection::vec(any::<u8>(), 0..40);
    let parts = proptest::collection::vec(part, 0..4);
    prop_oneof![
        6 => (0usize..5, parts, any::<u16>(), any::<u16>()).prop_map(
            |(extension, payload, flags, packet_type)| Op::Write {
                extension: extension * 8,
                payload,
                flags,
                packet_type,
            }
        ),
        6 => prop_oneof![Just(512usize), 0usize..200].prop_map(|room| Op::Read { room }),
        1 => Just(Op::Skip),
        3 => Just(Op::Commit),
        1 => Just(Op::Mask),
        1 => Just(Op::Unmask),
        1 => any::<u32>().prop_map(Op::Wait),
        1 => Just(Op::StopWaiting),
    ]
}

/// A packet as the model has it.
#[derive(Debug)]
struct Expected {
    header: Header,
    extension: Vec<u8>,
    payload: Vec<u8>,
}

impl Expected {
    fn len(&self) -> usize {
        16 + self.extension.len() + self.payload.len()
    }
}

/// Index-like words: mostly near the limits of a ring of `len` bytes.
fn any_word(len: u32) -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => (0..=len / 8).prop_map(|index| index * 8),
        2 => 0..len + 16,
        1 => any::<u32>(),
        // Descriptors with small lengths and offsets.
        4 => (0u32..12, 0u32..12).prop_map(|(low, high)| low | high << 16),
    ]
}

proptest! {
    /// Random use of both ends does what a queue of packets does, and signals come exactly when
    /// they must.
    #[test]
    fn behaves_like_a_queue(
        units in 4u32..40,
        ops in proptest::collection::vec(any_op(), 0..200),
    ) {
        let len = units * 8;
        let (mut producer, mut consumer, mem) = ring(len);
        let mut queue: VecDeque<Expected> = VecDeque::new();
        // Bytes that were read but not committed, and the size of a packet that can be skipped.
        let mut uncommitted = 0;
        let mut skippable = false;
        let mut masked = false;
        let mut pending = 0;
        for (id, op) in ops.into_iter().enumerate() {
            let used = |queue: &VecDeque<Expected>| -> u32 {
                queue.iter().map(|packet| packet.len() as u32 + 8).sum()
            };
            match op {
                Op::Write { extension, payload, flags, packet_type } => {
                    let header = Header {
                        packet_type: PacketType::new(packet_type),
                        flags: PacketFlags::from_bits_retain(flags),
                        transaction_id: id as u64,
                    };
                    let extension = vec![id as u8; extension];
                    let parts: Vec<&[u8]> = payload.iter().map(Vec::as_slice).collect();
                    let mut payload = payload.concat();
                    payload.resize(payload.len().next_multiple_of(8), 0);
                    let packet = Expected { header, extension, payload };
                    let total = packet.len() as u32 + 8;
                    let free = len - used(&queue) - uncommitted;
                    let result = producer.write_parts(header, &[&packet.extension], &parts);
                    if total >= len {
                        prop_assert_eq!(result, Err(WriteError::TooLarge));
                    } else if total >= free {
                        prop_assert_eq!(result, Err(WriteError::Full { needed: total }));
                    } else {
                        let was_empty = queue.is_empty() && uncommitted == 0;
                        let expected = Signal::when(was_empty && !masked);
                        prop_assert_eq!(result, Ok(expected));
                        queue.push_back(packet);
                        if total >= pending {
                            pending = 0;
                        }
                    }
                }
                Op::Read { room } => {
                    let mut buf = vec![0xaa; room];
                    let result = consumer.read(&mut buf);
                    skippable = false;
                    match queue.front() {
                        None => prop_assert!(result.unwrap().is_none()),
                        Some(packet) if packet.len() > room => {
                            let len = packet.len() as u32;
                            prop_assert_eq!(result.unwrap_err(), ReadError::TooLarge { len });
                            skippable = true;
                        }
                        Some(packet) => {
                            let read = result.unwrap().unwrap();
                            prop_assert_eq!(read.packet_type(), packet.header.packet_type);
                            prop_assert_eq!(read.flags(), packet.header.flags);
                            prop_assert_eq!(read.transaction_id(), packet.header.transaction_id);
                            prop_assert_eq!(read.header(), &packet.extension[..]);
                            prop_assert_eq!(read.payload(), &packet.payload[..]);
                            uncommitted += packet.len() as u32 + 8;
                            queue.pop_front();
                        }
                    }
                }
                Op::Skip => {
                    prop_assert_eq!(consumer.skip(), skippable);
                    if let (true, Some(packet)) = (skippable, queue.front()) {
                        uncommitted += packet.len() as u32 + 8;
                        queue.pop_front();
                    }
                    skippable = false;
                }
                Op::Commit | Op::Unmask => {
                    let free = len - used(&queue);
                    let crossed = pending != 0 && free > pending && free - uncommitted <= pending;
                    let signal = if matches!(op, Op::Commit) {
                        consumer.commit()
                    } else {
                        let unmasked = consumer.unmask();
                        masked = false;
                        prop_assert_eq!(unmasked.more, !queue.is_empty());
                        unmasked.signal
                    };
                    prop_assert_eq!(signal, Signal::when(crossed));
                    uncommitted = 0;
                }
                Op::Mask => {
                    consumer.mask();
                    masked = true;
                }
                Op::Wait(needed) => {
                    let needed = needed % (2 * len);
                    let free = len - used(&queue) - uncommitted;
                    let clamped = needed.min(len - 1);
                    let room = free > clamped;
                    prop_assert_eq!(producer.wait_for_space(needed), Ok(room));
                    pending = if room { 0 } else { clamped };
                }
                Op::StopWaiting => {
                    producer.stop_waiting();
                    pending = 0;
                }
            }
            prop_assert_eq!(producer.pending_send_size(), pending);
            prop_assert_eq!(mem.load(Field::PendingSendSize), pending);
            prop_assert_eq!(consumer.available_bytes(), Ok(used(&queue)));
            prop_assert_eq!(producer.free_bytes(), Ok(len - used(&queue) - uncommitted));
        }
    }

    /// Whatever the peer stores, at any time, nothing panics, and packets lie inside of the buffer.
    #[test]
    fn hostile_memory_is_survived(
        units in 4u32..20,
        words in proptest::collection::vec(any_word(160), 1..60),
        ops in proptest::collection::vec(any_op(), 0..60),
    ) {
        let len = units * 8;
        let mem = Chaos::with_len(len);
        let producer = Producer::new(&mem);
        let consumer = Consumer::new(&mem);
        mem.words.replace(words.into());
        let (mut producer, mut consumer) = (producer.unwrap(), consumer.unwrap());
        for op in ops {
            match op {
                Op::Write { extension, payload, .. } => {
                    let parts: Vec<&[u8]> = payload.iter().map(Vec::as_slice).collect();
                    let header = Header::in_band(0, true);
                    let _ = producer.write_parts(header, &[&vec![0; extension]], &parts);
                    let _ = producer.write_gpa_direct(header, 5000, 0, [1, 2], &parts);
                }
                Op::Read { room } => {
                    let mut buf = vec![0; room];
                    if let Ok(Some(packet)) = consumer.read(&mut buf) {
                        prop_assert!(16 + packet.header().len() + packet.payload().len() <= room);
                        if let Ok(direct) = packet.gpa_direct(4) {
                            let total: u64 = direct
                                .ranges()
                                .flat_map(|range| range.segments())
                                .map(|(_, len)| u64::from(len))
                                .sum();
                            prop_assert_eq!(total, direct.byte_count());
                        }
                        let _ = packet.transfer_pages();
                    }
                }
                Op::Skip => {
                    consumer.skip();
                }
                Op::Commit => {
                    let _ = consumer.commit();
                }
                Op::Mask => consumer.mask(),
                Op::Unmask => {
                    let _ = consumer.unmask();
                }
                Op::Wait(needed) => {
                    let _ = producer.wait_for_space(needed);
                }
                Op::StopWaiting => producer.stop_waiting(),
            }
            let _ = Snapshot::of(&mem);
        }
    }
}
