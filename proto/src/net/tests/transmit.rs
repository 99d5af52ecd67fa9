// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the guest's transmit path: what the host finds in the sections is what was sent.

use crate::net::control::Limits;
use crate::net::frame::{Head, PacketLayout};
use crate::net::ppi::{Facts, Info, InfoWriter};
use crate::net::sections::Sections;
use crate::net::transmit::*;
use proptest::prelude::*;
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::vec::Vec;

/// Words that several threads can use.
struct Atomics(Vec<AtomicU64>);

impl Atomics {
    fn new(len: usize) -> Self {
        Self((0..len).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Words for Atomics {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn load(&self, index: usize) -> u64 {
        self.0[index].load(Ordering::Relaxed)
    }

    fn exchange(&self, index: usize, old: u64, new: u64) -> bool {
        let word = &self.0[index];
        word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}

#[test]
fn sections_are_taken_once() {
    for count in [1, 63, 64, 65, 170] {
        let words = SectionMap::<Atomics>::words_needed(count);
        let map = SectionMap::new(Atomics::new(words), count);
        for hint in [0, 64, 1000, u32::MAX] {
            let taken: HashSet<u32> = (0..count).map(|_| map.take(hint).unwrap()).collect();
            assert_eq!(taken, (0..count).collect());
            assert_eq!(map.take(hint), None);
            assert_eq!(map.used(), count);
            assert!(taken.into_iter().all(|section| map.give(section)));
            assert!(!map.give(0) && !map.give(count) && !map.give(u32::MAX));
            assert_eq!(map.used(), 0);
        }
    }
    let none = SectionMap::new(Atomics::new(0), 10);
    assert_eq!((none.take(3), none.count()), (None, 0));
    assert_eq!(SectionMap::new(Atomics::new(1), 100).count(), 64);
}

#[test]
fn sections_are_taken_once_by_several_threads() {
    let map = SectionMap::new(Atomics::new(2), 70);
    let owners: Vec<AtomicU64> = (0..70).map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        for hint in [0, 64, 7] {
            let (map, owners) = (&map, &owners);
            scope.spawn(move || {
                for _ in 0..2000 {
                    if let Some(section) = map.take(hint) {
                        let owner = &owners[section as usize];
                        assert_eq!(owner.swap(1, Ordering::Relaxed), 0);
                        owner.store(0, Ordering::Relaxed);
                        assert!(map.give(section));
                    }
                }
            });
        }
    });
    assert_eq!(map.used(), 0);
}

/// What the host was told: bytes of a section, and of the guest's own pages behind them.
struct Sent(Vec<u8>, Vec<u8>);

/// A guest that sends, with the memory of its sections.
struct Guest {
    batcher: Batcher,
    memory: Vec<u8>,
    size: u32,
    map: SectionMap<Atomics>,
    sent: Vec<Sent>,
}

impl Guest {
    fn new(size: u32, count: u32, max_packets: u32, alignment: u32) -> Self {
        let sections = Sections::new(size, count, size * count).unwrap();
        let limits = Limits {
            max_packets,
            alignment,
            ..Limits::DEFAULT
        };
        let words = SectionMap::<Atomics>::words_needed(count);
        Self {
            batcher: Batcher::new(&sections, &limits),
            // Old bytes must not be sent as padding.
            memory: std::vec![0xee; (size * count) as usize],
            size,
            map: SectionMap::new(Atomics::new(words), count),
            sent: Vec::new(),
        }
    }

    fn put(&mut self, section: u32, offset: u32, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= self.size as usize);
        let start = (section * self.size + offset) as usize;
        self.memory[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn announce(&mut self, batch: Batch, pages: &[u8]) {
        let (section, used) = batch.message().section().unwrap();
        assert!(used <= self.size);
        let start = (section * self.size) as usize;
        let bytes = self.memory[start..start + used as usize].to_vec();
        self.sent.push(Sent(bytes, pages.to_vec()));
        assert!(self.map.give(section));
    }

    fn send(&mut self, frame: &[u8], more: bool) -> Plan {
        let mut info = InfoWriter::new();
        info.put(Info::Hash(frame.len() as u32)).unwrap();
        let mut head = Head::new(frame.len() as u32, &info).unwrap();
        let map = &self.map;
        let plan = self.batcher.place(&mut head, more, || map.take(0));
        if let Some(before) = plan.before {
            self.announce(before, &[]);
        }
        match plan.place {
            Place::Copy {
                section,
                offset,
                padding,
            } => {
                let zeros = std::vec![0; padding as usize];
                let bytes = [head.as_bytes(), frame, &zeros].concat();
                assert_eq!(bytes.len() as u32, head.message_length());
                self.put(section, offset, &bytes);
                if let Some(batch) = plan.send {
                    self.announce(batch, &[]);
                }
            }
            Place::CopyHead { section, offset } => {
                self.put(section, offset, head.as_bytes());
                self.announce(plan.send.unwrap(), frame);
            }
            Place::Direct => {
                assert_eq!(plan.send, None);
                let bytes = [head.as_bytes(), frame].concat();
                self.sent.push(Sent(Vec::new(), bytes));
            }
        }
        assert_eq!(
            self.batcher.is_pending(),
            more && plan.send.is_none() && plan.place != Place::Direct
        );
        plan
    }

    fn flush(&mut self) {
        if let Some(batch) = self.batcher.flush() {
            self.announce(batch, &[]);
        }
    }

    /// Reads what was sent as a host does: for each packet its frames.
    fn frames(&self, alignment: u32) -> Vec<Vec<Vec<u8>>> {
        let read = |sent: &Sent| {
            let bytes = [&sent.0[..], &sent.1].concat();
            let mut at = 0;
            let mut frames = Vec::new();
            while at < bytes.len() {
                assert_eq!(at % alignment as usize, 0);
                let rest = &bytes[at..];
                let layout = PacketLayout::parse(rest, rest.len() as u32).unwrap();
                let frame = layout.data.of(rest).unwrap();
                let facts = Facts::from_guest(layout.info.of(rest).unwrap()).unwrap();
                assert_eq!(facts.hash, Some(frame.len() as u32));
                let padding = &rest[layout.data.end() as usize..layout.message_length as usize];
                assert!(padding.iter().all(|&byte| byte == 0));
                frames.push(frame.to_vec());
                at += layout.message_length as usize;
            }
            frames
        };
        self.sent.iter().map(read).collect()
    }
}

#[test]
fn small_frames_go_together() {
    let mut guest = Guest::new(6144, 10, 8, 8);
    for n in 0..9 {
        guest.send(&[n; 61], n < 8);
    }
    let frames = guest.frames(8);
    assert_eq!(frames.len(), 2);
    assert_eq!((frames[0].len(), frames[1].len()), (8, 1));
    assert_eq!(guest.map.used(), 0);
}

#[test]
fn a_frame_that_does_not_fit_any_more() {
    let mut guest = Guest::new(6144, 10, 8, 8);
    for n in 0..3 {
        guest.send(&[n; 1514], true);
    }
    // 6144 - 3 * 1576: the head fits, the frame does not.
    let plan = guest.send(&[3; 1514], true);
    assert_eq!(
        plan.place,
        Place::CopyHead {
            section: 0,
            offset: 3 * 1576
        }
    );
    assert_eq!(guest.frames(8)[0].len(), 4);
    // A large frame goes by itself, after what waited.
    guest.send(&[4; 60], true);
    let plan = guest.send(&[5; 9000], false);
    assert!(plan.before.is_none());
    assert!(matches!(plan.place, Place::CopyHead { .. }));
    let plan = guest.send(&[6; 9000], true);
    assert_eq!((plan.place, plan.no_section), (Place::Direct, false));
    assert_eq!(guest.map.used(), 0);
    // Not even the head fits: 6144 - 6088 = 56.
    guest.send(&[7; 6028], true);
    let plan = guest.send(&[8; 1500], false);
    assert_eq!(plan.before.map(|batch| batch.used), Some(6088));
    assert_eq!(plan.send.map(|batch| batch.packets), Some(1));
}

#[test]
fn a_section_is_used_to_its_last_byte() {
    // A head with one item has 60 bytes.
    for alignment in [1, 4] {
        let mut guest = Guest::new(400, 2, 8, alignment);
        assert_eq!(guest.send(&[0; 341], false).place, Place::Direct);
        let copied = |section, offset| Place::Copy {
            section,
            offset,
            padding: 0,
        };
        assert_eq!(guest.send(&[1; 340], false).place, copied(0, 0));
        // Behind another one: frame and head, then the head alone, then not even that.
        guest.send(&[2; 140], true);
        assert_eq!(guest.send(&[3; 140], false).place, copied(0, 200));
        guest.send(&[4; 140], true);
        let plan = guest.send(&[5; 141], false);
        let head = Place::CopyHead {
            section: 0,
            offset: 200,
        };
        assert_eq!(plan.place, head);
        guest.send(&[6; 280], true);
        let plan = guest.send(&[7; 100], false);
        assert_eq!(plan.send.map(|batch| batch.used), Some(400));
        guest.send(&[8; 288], true);
        let plan = guest.send(&[9; 100], false);
        assert_eq!(
            (plan.before.map(|batch| batch.used), plan.place),
            (Some(348), copied(1, 0))
        );
    }
}

#[test]
fn without_a_free_section() {
    let mut guest = Guest::new(6144, 1, 2, 8);
    guest.send(&[0; 60], true);
    guest.send(&[1; 60], true);
    // The batch is full, and its section is the only one.
    let plan = guest.send(&[2; 60], true);
    assert!(plan.no_section && plan.before.is_some());
    assert_eq!(plan.place, Place::Direct);
    assert_eq!(guest.frames(8).concat().len(), 3);
    assert!(!guest.batcher.is_pending());
    assert_eq!(guest.batcher.flush(), None);
}

proptest! {
    /// Every frame arrives once, in order, whole, in no more than the allowed number for each packet.
    #[test]
    fn host_gets_what_the_guest_sends(
        frames in prop::collection::vec((prop_oneof![14usize..200, 14usize..9000], any::<bool>()), 1..40),
        size in prop_oneof![Just(6144u32), 68u32..400, 1000u32..10_000],
        count in 1u32..4,
        max_packets in 1u32..10,
        factor in 0u32..13,
    ) {
        let alignment = 1 << factor;
        let mut guest = Guest::new(size, count, max_packets, alignment);
        for (n, (len, more)) in frames.iter().enumerate() {
            guest.send(&std::vec![n as u8; *len], *more);
        }
        guest.flush();
        let packets = guest.frames(alignment);
        prop_assert!(packets.iter().all(|packet| packet.len() <= max_packets as usize));
        let received = packets.concat();
        let sent: Vec<Vec<u8>> = frames
            .iter()
            .enumerate()
            .map(|(n, (len, _))| std::vec![n as u8; *len])
            .collect();
        prop_assert_eq!(received, sent);
        prop_assert_eq!(guest.map.used(), 0);
    }
}
