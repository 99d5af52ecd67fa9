// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the guest's receive path against a buffer that a host fills, well or badly.

use crate::net::frame::Head;
use crate::net::nvsp::{self, Body as _, ChannelType, RndisPacket, Version};
use crate::net::ppi::{Facts, Info, InfoError, InfoWriter, PacketId, Vlan};
use crate::net::receive::*;
use crate::net::rndis::{MessageType, RndisError};
use crate::net::sections::{transfer_ranges, SectionError, Sections};
use crate::net::{Span, MAX_TRANSFER_RANGES};
use crate::packet::{Packet, PacketError, TransferPageRange};
use proptest::prelude::*;
use std::cell::Cell;
use std::collections::VecDeque;
use std::vec::Vec;

const SIZE: u32 = 1728;
const COUNT: u32 = 20;

/// A receive buffer in ordinary memory.
struct Memory(Vec<u8>);

impl SharedBuffer for Memory {
    fn read(&self, offset: u32, to: &mut [u8]) -> bool {
        let from = self
            .0
            .get(offset as usize..)
            .and_then(|from| from.get(..to.len()));
        from.map(|from| to.copy_from_slice(from)).is_some()
    }
}

fn sections() -> Sections {
    Sections::new(SIZE, COUNT, SIZE * COUNT + 100).unwrap()
}

fn range(offset: u32, len: u32) -> TransferPageRange {
    TransferPageRange {
        byte_count: len.into(),
        byte_offset: offset.into(),
    }
}

/// The message of a frame with these items.
fn message(frame: &[u8], items: &[Info]) -> Vec<u8> {
    let mut info = InfoWriter::new();
    for item in items {
        info.put(*item).unwrap();
    }
    let head = Head::new(frame.len() as u32, &info).unwrap();
    [head.as_bytes(), frame].concat()
}

/// A buffer with one message in each section, and the ranges.
fn fill(messages: &[Vec<u8>]) -> (Memory, Vec<TransferPageRange>) {
    let mut memory = std::vec![0; (SIZE * COUNT) as usize];
    let mut ranges = Vec::new();
    for (n, message) in messages.iter().enumerate() {
        let start = n * SIZE as usize;
        memory[start..start + message.len()].copy_from_slice(message);
        ranges.push(range(start as u32, message.len() as u32));
    }
    (Memory(memory), ranges)
}

/// A frame with its bytes.
type Whole = (Facts, Vec<u8>);

/// What comes out of each range.
fn run(
    receiver: &mut Receiver<Vec<Span>>,
    memory: &Memory,
    ranges: &[TransferPageRange],
) -> Vec<Result<Option<Whole>, ReceiveError>> {
    let last = ranges.len() - 1;
    let look = |(n, range): (usize, &TransferPageRange)| match receiver.receive(
        range,
        n == last,
        &sections(),
        memory,
    )? {
        Received::Frame(frame) => {
            let parts = frame.parts.iter().map(|part| part.of(&memory.0).unwrap());
            let bytes = parts.collect::<Vec<_>>().concat();
            assert_eq!(bytes.len() as u32, frame.len);
            Ok(Some((frame.facts, bytes)))
        }
        Received::Part => Ok(None),
        Received::Control(span) => panic!("{span:?}"),
    };
    ranges.iter().enumerate().map(look).collect()
}

fn receiver() -> Receiver<Vec<Span>> {
    Receiver::new(std::vec![Span::default(); 4])
}

fn part(id: u16, first: bool, last: bool) -> Info {
    Info::PacketId(PacketId::part(id, first, last))
}

#[test]
fn frames_with_facts() {
    let vlan = Vlan::new(7, 1, false);
    let messages = [
        message(&[1; 60], &[Info::Vlan(vlan), Info::Hash(9)]),
        message(&[2; 1514], &[]),
    ];
    let (memory, ranges) = fill(&messages);
    let results = run(&mut receiver(), &memory, &ranges);
    let facts = Facts {
        vlan: Some(vlan),
        hash: Some(9),
        ..Facts::default()
    };
    assert_eq!(results[0], Ok(Some((facts, Vec::from([1; 60])))));
    assert_eq!(
        results[1],
        Ok(Some((Facts::default(), Vec::from([2; 1514]))))
    );
}

#[test]
fn other_messages_are_for_the_control_path() {
    // Shorter than the head of a frame.
    let mut bytes = message(&[0; 60], &[]);
    bytes[..8].copy_from_slice(&[5, 0, 0, 0x80, 16, 0, 0, 0]);
    let (memory, _) = fill(&[bytes]);
    for len in [16, 43, 44, 200] {
        let mut receiver = receiver();
        let received = receiver.receive(&range(0, len), true, &sections(), &memory);
        assert_eq!(received, Ok(Received::Control(Span { offset: 0, len })));
    }
    for len in [0, 7] {
        let mut receiver = receiver();
        let received = receiver.receive(&range(0, len), true, &sections(), &memory);
        let len = len as usize;
        assert_eq!(
            received,
            Err(ReceiveError::Rndis(RndisError::NoHeader { len }))
        );
    }
}

#[test]
fn frames_in_parts() {
    let first = |n: u8| {
        message(
            &[n; 1000],
            &[Info::Hash(n.into()), part(n.into(), true, false)],
        )
    };
    let middle = |n: u8| message(&[n; 1000], &[Info::Hash(99), part(n.into(), false, false)]);
    let last = |n: u8| message(&[n; 10], &[part(n.into(), false, true)]);
    let whole = message(&[9; 60], &[]);
    let lone = message(&[8; 60], &[part(8, true, true)]);

    let (memory, ranges) = fill(&[first(1), middle(2), last(3), lone, whole.clone()]);
    let results = run(&mut receiver(), &memory, &ranges);
    assert_eq!(results[..2], [Ok(None), Ok(None)]);
    let (facts, bytes) = results[2].clone().unwrap().unwrap();
    assert_eq!(facts.hash, Some(1));
    assert_eq!(
        bytes,
        [[1; 1000], [2; 1000]]
            .concat()
            .into_iter()
            .chain([3; 10])
            .collect::<Vec<_>>()
    );
    assert!(results[3..]
        .iter()
        .all(|result| matches!(result, Ok(Some(_)))));

    // The first part is missing, then the last one.
    let (memory, ranges) = fill(&[
        middle(1),
        last(1),
        first(2),
        whole.clone(),
        last(2),
        first(3),
    ]);
    let results = run(&mut receiver(), &memory, &ranges);
    assert_eq!(results[0], Err(ReceiveError::NoFirstPart));
    assert_eq!(results[1], Err(ReceiveError::NoFirstPart));
    assert_eq!(results[2], Ok(None));
    assert_eq!(results[3].clone().unwrap().unwrap().1, [9; 60]);
    assert_eq!(results[4], Err(ReceiveError::NoFirstPart));
    assert_eq!(results[5], Err(ReceiveError::NoLastPart));

    // More parts than there is room for, and nothing of them in the next packet.
    let mut receiver = receiver();
    let (memory, ranges) = fill(&[
        first(1),
        middle(1),
        middle(1),
        middle(1),
        middle(1),
        last(1),
    ]);
    let results = run(&mut receiver, &memory, &ranges);
    assert_eq!(results[4], Err(ReceiveError::TooManyParts));
    assert_eq!(results[5], Err(ReceiveError::NoFirstPart));
    let (memory, ranges) = fill(&[last(1)]);
    let results = run(&mut receiver, &memory, &ranges);
    assert_eq!(results[0], Err(ReceiveError::NoFirstPart));

    // An error drops the parts before it.
    let (memory, mut ranges) = fill(&[first(1), middle(1), last(1)]);
    ranges[1] = range(0, SIZE + 1);
    let results = run(&mut receiver, &memory, &ranges);
    assert!(matches!(results[1], Err(ReceiveError::Section(_))));
    assert_eq!(results[2], Err(ReceiveError::NoFirstPart));
}

#[test]
fn frames_have_sizes_that_frames_have() {
    let (memory, ranges) = fill(&[message(&[1; 13], &[]), message(&[1; 14], &[])]);
    let results = run(&mut receiver(), &memory, &ranges);
    assert_eq!(results[0], Err(ReceiveError::FrameSize(13)));
    assert!(results[1].is_ok());
    // 40 parts of 1640 bytes are more than any frame.
    let mut receiver = Receiver::new(std::vec![Span::default(); 100]);
    let (memory, ranges) = fill(&[
        message(&[1; 1640], &[part(1, true, false)]),
        message(&[1; 1640], &[part(1, false, false)]),
    ]);
    let mut total = 1640;
    receiver
        .receive(&ranges[0], false, &sections(), &memory)
        .unwrap();
    let error = loop {
        total += 1640;
        match receiver.receive(&ranges[1], false, &sections(), &memory) {
            Ok(Received::Part) => assert!(total <= MAX_FRAME_SIZE),
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(error, ReceiveError::FrameSize(40 * 1640));
}

#[test]
fn ranges_lie_in_the_sections() {
    let (memory, _) = fill(&[]);
    let total = SIZE * COUNT;
    for (offset, len) in [
        (0, SIZE + 1),
        (total, 1),
        (total - 8, 9),
        (total + 1, 0),
        (u32::MAX, 1),
        (u32::MAX, u32::MAX),
        (0, u32::MAX),
        (8, u32::MAX - 7),
    ] {
        let mut receiver = receiver();
        let received = receiver.receive(&range(offset, len), true, &sections(), &memory);
        let error = SectionError::Range { offset, len };
        assert_eq!(received, Err(ReceiveError::Section(error)));
    }
    // The buffer is shorter than was agreed.
    let mut receiver = receiver();
    let received = receiver.receive(&range(0, 60), true, &sections(), &Memory(Vec::new()));
    let span = Span { offset: 0, len: 44 };
    assert_eq!(received, Err(ReceiveError::Buffer(span)));
}

#[test]
fn bad_items_and_too_many_of_them() {
    let mut bad = message(&[1; 60], &[Info::Hash(1)]);
    bad[44] = 0;
    // Items that reach over the frame: 36 + 600 bytes.
    let mut long = message(&[0; 1000], &[Info::Hash(1)]);
    long[32..36].copy_from_slice(&600u32.to_le_bytes());
    let (memory, ranges) = fill(&[bad, long]);
    let results = run(&mut receiver(), &memory, &ranges);
    assert_eq!(results[0], Err(ReceiveError::Info(InfoError::ItemSize(0))));
    assert_eq!(results[1], Err(ReceiveError::Info(InfoError::TooLong(600))));
}

/// Memory that changes after each time it is read.
struct Changing(Vec<u8>, Cell<u8>);

impl SharedBuffer for Changing {
    fn read(&self, offset: u32, to: &mut [u8]) -> bool {
        let noise = self.1.get();
        self.1.set(noise.wrapping_add(0x55));
        for (n, to) in to.iter_mut().enumerate() {
            *to = self.0[offset as usize + n] ^ noise;
        }
        true
    }
}

#[test]
fn memory_that_changes_is_read_once() {
    // The items are other ones when they are read; the places of the frame stay what was checked.
    let (memory, ranges) = fill(&[message(&[1; 60], &[Info::Hash(1)])]);
    let changing = Changing(memory.0, Cell::new(0));
    let mut receiver = receiver();
    let received = receiver.receive(&ranges[0], true, &sections(), &changing);
    assert!(matches!(received, Err(ReceiveError::Info(_))));
    assert_eq!(changing.1.get(), 0x55u8.wrapping_mul(2));
}

/// A transfer-page packet with this payload.
fn packet(id: u16, ranges: &[TransferPageRange], payload: &[u8]) -> Vec<u8> {
    let offset8 = 3 + ranges.len() as u16;
    let mut bytes = Vec::new();
    let len8 = offset8 + payload.len().div_ceil(8) as u16;
    for half in [7, offset8, len8, 1] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(77u64.to_le_bytes());
    bytes.extend(id.to_le_bytes());
    bytes.extend([0, 0]);
    bytes.extend((ranges.len() as u32).to_le_bytes());
    for range in ranges {
        bytes.extend(range.byte_count.get().to_le_bytes());
        bytes.extend(range.byte_offset.get().to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

#[test]
fn packets_with_ranges() {
    let payload = RndisPacket::outside(ChannelType::DATA).encode();
    let try_open = |bytes: &[u8]| {
        let packet = Packet::parse(bytes).unwrap();
        open(&packet, Version::V6_1).map(<[_]>::len)
    };
    let ranges = [range(0, 100); MAX_TRANSFER_RANGES + 1];
    for count in [1, 2, MAX_TRANSFER_RANGES] {
        let bytes = packet(0xcafe, &ranges[..count], &payload);
        assert_eq!(try_open(&bytes), Ok(count));
    }
    let section = |error| Err(ReceiveError::Section(error));
    let bytes = packet(0xcafe, &ranges, &payload);
    assert_eq!(try_open(&bytes), section(SectionError::RangeCount(563)));
    let bytes = packet(0xcafe, &[], &payload);
    assert_eq!(try_open(&bytes), section(SectionError::RangeCount(0)));
    let bytes = packet(0, &ranges[..1], &payload);
    assert_eq!(try_open(&bytes), section(SectionError::Buffer(0)));
    let bytes = packet(0xcafe, &ranges[..1], &[]);
    assert!(matches!(try_open(&bytes), Err(ReceiveError::Message(_))));
    let other = nvsp::SubChannelRequest::allocate(1).encode();
    let bytes = packet(0xcafe, &ranges[..1], &other);
    assert_eq!(
        try_open(&bytes),
        Err(ReceiveError::Unexpected(nvsp::MessageType::SUB_CHANNEL))
    );
    // In-band, and a count that does not fit.
    let mut in_band = packet(0xcafe, &ranges[..1], &payload);
    in_band[0] = 6;
    assert!(matches!(
        try_open(&in_band),
        Err(ReceiveError::Packet(PacketError::Type(_)))
    ));
    let mut count = packet(0xcafe, &ranges[..1], &payload);
    count[20] = 2;
    assert_eq!(
        try_open(&count),
        Err(ReceiveError::Packet(PacketError::HeaderTooShort))
    );
    let good = packet(0xcafe, &ranges[..1], &payload);
    let pages = Packet::parse(&good).unwrap().transfer_pages().unwrap();
    assert_eq!(transfer_ranges(&pages), Ok(&ranges[..1]));
}

#[test]
fn sections_of_buffers() {
    let size = |size, count| Err(SectionError::Size { size, count });
    assert_eq!(Sections::new(67, 10, 1 << 20), size(67, 10));
    assert_eq!(Sections::new(1728, 0, 1 << 20), size(1728, 0));
    assert_eq!(Sections::fill(0, 1 << 20), size(0, 0));
    assert_eq!(Sections::fill(6144, 6143), size(6144, 0));
    assert_eq!(
        Sections::new(1 << 31, 2, u32::MAX),
        Err(SectionError::TooLarge {
            size: 1 << 32,
            buffer: u32::MAX
        })
    );
    assert!(Sections::new(68, 15420, 1 << 20).is_ok());
    assert!(Sections::new(68, 15421, 1 << 20).is_err());
    let send = Sections::fill(6144, 1 << 20).unwrap();
    assert_eq!((send.size(), send.count()), (6144, 170));
    assert_eq!(
        send.section(169, 6144),
        Ok(Span {
            offset: 169 * 6144,
            len: 6144
        })
    );
    assert_eq!(send.section(170, 0), Err(SectionError::Index(170)));
    assert_eq!(
        send.section(u32::MAX, 0),
        Err(SectionError::Index(u32::MAX))
    );
    assert!(send.section(0, 6145).is_err());
    let part = send.to_receive_part();
    assert_eq!(Sections::receive(&[part], 1 << 20), Ok(send));
    assert_eq!(Sections::receive(&[], 1 << 20), Err(SectionError::Count(0)));
    assert_eq!(
        Sections::receive(&[part; 2], 1 << 20),
        Err(SectionError::Count(2))
    );
    let mut late = part;
    late.offset = 4096.into();
    assert_eq!(
        Sections::receive(&[late], 1 << 20),
        Err(SectionError::Offset(4096))
    );
}

#[test]
fn completions_are_short_messages() {
    let completion = Completion {
        transaction_id: 1,
        success: true,
    };
    assert_eq!(completion.message(), [108, 0, 0, 0, 1, 0, 0, 0]);
    let failed = Completion {
        success: false,
        ..completion
    };
    assert_eq!(failed.message(), [108, 0, 0, 0, 2, 0, 0, 0]);
    let mut none = Owed::new(Vec::new());
    assert!(!none.push(completion) && none.is_empty());
    none.pop();
}

proptest! {
    /// Completions leave in the order in which they came, and none is lost.
    #[test]
    fn owed_is_a_queue(room in 1usize..6, ops in prop::collection::vec(any::<bool>(), 0..100)) {
        let mut owed = Owed::new(std::vec![Completion::default(); room]);
        let mut model = VecDeque::new();
        for (n, push) in ops.into_iter().enumerate() {
            let completion = Completion { transaction_id: n as u64, success: n % 3 == 0 };
            if push {
                prop_assert_eq!(owed.push(completion), model.len() < room);
                if model.len() < room {
                    model.push_back(completion);
                }
            } else {
                owed.pop();
                model.pop_front();
            }
            prop_assert_eq!(owed.front(), model.front().copied());
            prop_assert_eq!(owed.len(), model.len());
            prop_assert_eq!(owed.is_empty(), model.is_empty());
        }
    }

    /// Whatever is in the buffer, the frames that come out lie in the sections and have possible sizes.
    #[test]
    fn any_buffer_can_be_received(
        words in prop::collection::vec(prop_oneof![
            Just(1u32), 0u32..40, Just(36u32), Just(44), Just(0x8000_0001), any::<u32>()], 0..80),
        places in prop::collection::vec((0u32..200, 0u32..400), 1..8),
        plausible in any::<bool>(),
    ) {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.resize((SIZE * COUNT) as usize, 1);
        if plausible {
            bytes[..8].copy_from_slice(&[1, 0, 0, 0, 100, 0, 0, 0]);
        }
        let memory = Memory(bytes);
        let mut receiver = receiver();
        for (n, (offset, len)) in places.iter().enumerate() {
            let offset = if plausible { 0 } else { *offset };
            let is_last = n + 1 == places.len();
            let got = receiver.receive(&range(offset, *len), is_last, &sections(), &memory);
            match got {
                Ok(Received::Frame(frame)) => {
                    prop_assert!((14..=MAX_FRAME_SIZE).contains(&frame.len));
                    let total: u32 = frame.parts.iter().map(|part| part.len).sum();
                    prop_assert_eq!(total, frame.len);
                    for part in frame.parts {
                        prop_assert!(part.end() <= sections().total());
                    }
                }
                Ok(Received::Part) => prop_assert!(!is_last),
                Ok(Received::Control(span)) => {
                    prop_assert_eq!(span, Span { offset, len: *len });
                }
                Err(_) => {}
            }
        }
    }
}

#[test]
fn control_messages_are_not_frames() {
    let error = RndisError::NotAPacket(MessageType::SET_COMPLETE);
    assert_eq!(std::format!("{error}"), "SET_COMPLETE instead of a frame");
}
