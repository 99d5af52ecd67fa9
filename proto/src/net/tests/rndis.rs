// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of RNDIS messages: layouts, round trips, truncation, offsets and lengths.

use crate::net::frame::{Head, Packet, PacketLayout, PACKET_HEAD_SIZE};
use crate::net::oid::Oid;
use crate::net::ppi::{Info, InfoWriter, Vlan};
use crate::net::rndis::*;
use crate::net::Span;
use proptest::prelude::*;
use std::vec::Vec;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

fn message(message_type: MessageType, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from(message_type.get().to_le_bytes());
    bytes.extend((body.len() as u32 + 8).to_le_bytes());
    bytes.extend(body);
    bytes
}

fn set_length(bytes: &mut [u8], len: u32) {
    bytes[4..8].copy_from_slice(&len.to_le_bytes());
}

/// Bytes of a body that count up.
fn body<B: FromBytes + IntoBytes + KnownLayout + Immutable>() -> B {
    let bytes: Vec<u8> = (0..size_of::<B>()).map(|n| n as u8 + 1).collect();
    B::read_from_bytes(&bytes).unwrap()
}

/// Round trip of a message without a value, and truncation of it at every place.
fn check<B>(message_type: MessageType, parse: impl Fn(&[u8]) -> Result<Vec<u8>, RndisError>)
where
    B: FromBytes + IntoBytes + KnownLayout + Immutable,
{
    let body: B = body();
    let buf = RequestBuf::<64>::new(message_type, &body, &[]).unwrap();
    let bytes = buf.as_bytes();
    assert_eq!(bytes, message(message_type, body.as_bytes()));
    assert_eq!(parse(bytes).unwrap(), body.as_bytes());
    let available = |len| RndisError::Length {
        len: bytes.len() as u32,
        available: len,
    };
    for len in 0..bytes.len() {
        let error = match len {
            0..8 => RndisError::NoHeader { len },
            _ => available(len),
        };
        assert_eq!(parse(&bytes[..len]), Err(error));
        // The message says that it is so short.
        let mut short = bytes.to_vec();
        set_length(&mut short, len as u32);
        let error = match len {
            0..8 => RndisError::Length {
                len: len as u32,
                available: bytes.len(),
            },
            _ => RndisError::Truncated {
                message_type,
                len,
                need: bytes.len(),
            },
        };
        assert_eq!(parse(&short), Err(error));
    }
    assert_eq!(
        RequestBuf::<7>::new(message_type, &body, &[]).map(|_| ()),
        None
    );
}

macro_rules! check_all {
    ($parser:ident: $($type:ident $variant:ident($body:ident)),* $(,)?) => {
        $(check::<$body>(MessageType::$type, |bytes| match $parser::parse(bytes)? {
            $parser::$variant(body) => Ok(body.as_bytes().to_vec()),
            other => panic!("{other:?}"),
        });)*
    };
}

#[test]
fn every_message_without_a_value() {
    check_all! { GuestMessage:
        INITIALIZE Initialize(Initialize),
        HALT Halt(Halt),
        RESET Reset(Reset),
        KEEPALIVE Keepalive(Keepalive),
        KEEPALIVE_COMPLETE KeepaliveComplete(KeepaliveComplete),
    }
    check_all! { HostMessage:
        INITIALIZE_COMPLETE InitializeComplete(InitializeComplete),
        SET_COMPLETE SetComplete(SetComplete),
        RESET_COMPLETE ResetComplete(ResetComplete),
        KEEPALIVE_COMPLETE KeepaliveComplete(KeepaliveComplete),
        KEEPALIVE Keepalive(Keepalive),
    }
}

/// What a message with a value says: its value, or what is wrong.
type Value<'a> = Result<&'a [u8], RndisError>;

/// Finds the value of a message.
type FindValue = for<'a> fn(&'a [u8]) -> Value<'a>;

/// All messages that have a value, with a parser for each, and the size of their bodies.
fn with_value() -> Vec<(Vec<u8>, FindValue, u32)> {
    fn query(bytes: &[u8]) -> Value<'_> {
        match GuestMessage::parse(bytes)? {
            GuestMessage::Query(_, value) => Ok(value),
            other => panic!("{other:?}"),
        }
    }
    fn set(bytes: &[u8]) -> Value<'_> {
        match GuestMessage::parse(bytes)? {
            GuestMessage::Set(_, value) => Ok(value),
            other => panic!("{other:?}"),
        }
    }
    fn query_complete(bytes: &[u8]) -> Value<'_> {
        match HostMessage::parse(bytes)? {
            HostMessage::QueryComplete(_, value) => Ok(value),
            other => panic!("{other:?}"),
        }
    }
    fn indicate(bytes: &[u8]) -> Value<'_> {
        match HostMessage::parse(bytes)? {
            HostMessage::IndicateStatus(_, value) => Ok(value),
            other => panic!("{other:?}"),
        }
    }
    let value = [1, 2, 3, 4];
    let oid = Oid::GEN_CURRENT_PACKET_FILTER;
    let complete = QueryComplete::new(5, Status::SUCCESS, &value).unwrap();
    let status = IndicateStatus {
        status: Status::LINK_SPEED_CHANGE,
        buffer_length: 4.into(),
        buffer_offset: 12.into(),
    };
    let make = |message_type, body: &[u8]| message(message_type, &[body, &value].concat());
    Vec::from([
        (
            RequestBuf::<64>::query(5, oid, &value)
                .unwrap()
                .as_bytes()
                .to_vec(),
            query as FindValue,
            20,
        ),
        (
            RequestBuf::<64>::set(5, oid, &value)
                .unwrap()
                .as_bytes()
                .to_vec(),
            set,
            20,
        ),
        (
            make(MessageType::QUERY_COMPLETE, complete.as_bytes()),
            query_complete,
            16,
        ),
        (
            make(MessageType::INDICATE_STATUS, status.as_bytes()),
            indicate,
            12,
        ),
    ])
}

#[test]
fn values_lie_in_their_messages() {
    for (bytes, parse, size) in with_value() {
        assert_eq!(parse(&bytes), Ok(&[1, 2, 3, 4][..]));
        // Length and offset follow each other, in this order.
        let at = if size == 12 { 12 } else { 16 };
        for (len, offset, fits) in [
            (4, size, true),
            (0, 0, true),
            (0, u32::MAX, true),
            (3, size + 1, true),
            (5, size, false),
            (4, size + 1, false),
            (4, size - 1, false),
            (4, 0, false),
            (1, size + 4, false),
            (u32::MAX, size, false),
            (4, u32::MAX, false),
            (u32::MAX, u32::MAX, false),
            (u32::MAX - size + 1, size, false),
        ] {
            let mut bytes = bytes.clone();
            bytes[at..at + 4].copy_from_slice(&len.to_le_bytes());
            bytes[at + 4..at + 8].copy_from_slice(&offset.to_le_bytes());
            let expected = if fits {
                let start = (offset.min(size + 4) - size.min(offset)) as usize;
                Ok([1, 2, 3, 4].get(start..start + len as usize).unwrap_or(&[]))
            } else {
                Err(RndisError::Info { offset, len })
            };
            assert_eq!(parse(&bytes), expected, "{len} at {offset} of {size}");
        }
        for len in 0..bytes.len() {
            assert!(parse(&bytes[..len]).is_err());
        }
    }
}

#[test]
fn some_hosts_do_not_count_the_status_buffer() {
    let (mut bytes, parse, _) = with_value().pop().unwrap();
    set_length(&mut bytes, 20);
    assert_eq!(parse(&bytes), Ok(&[1, 2, 3, 4][..]));
    bytes.pop();
    assert_eq!(parse(&bytes), Err(RndisError::Info { offset: 12, len: 4 }));
}

#[test]
fn unknown_numbers_are_data() {
    for number in [0u32, 9, 0x8000_0001, 0xff00_0001] {
        let bytes = message(MessageType::new(number), &[]);
        let expected = MessageType::new(number);
        assert_eq!(
            GuestMessage::parse(&bytes),
            Ok(GuestMessage::Other(expected))
        );
        assert_eq!(HostMessage::parse(&bytes), Ok(HostMessage::Other(expected)));
    }
}

#[test]
fn bytes_are_those_of_the_c_driver() {
    let filter = RequestBuf::<64>::set(9, Oid::GEN_CURRENT_PACKET_FILTER, &[0xb, 0, 0, 0]).unwrap();
    let words = [5u32, 32, 9, 0x0001_010e, 4, 20, 0, 0xb];
    assert_eq!(filter.as_bytes(), words.map(u32::to_le_bytes).concat());
    let mut info = InfoWriter::new();
    info.put(Info::Hash(0x1234)).unwrap();
    info.put(Info::Vlan(Vlan::new(0x123, 5, true))).unwrap();
    let head = Head::new(60, &info).unwrap();
    let words = [
        1u32,
        44 + 32 + 60,
        36 + 32,
        60,
        0,
        0,
        0,
        36,
        32,
        0,
        0,
        16,
        8,
        12,
        0x1234,
        16,
        6,
        12,
        0x123 << 4 | 1 << 3 | 5,
    ];
    assert_eq!(head.as_bytes(), words.map(u32::to_le_bytes).concat());
}

/// A frame's message with these places; what follows the header has `rest` bytes.
fn packet(data: (u32, u32), info: (u32, u32), rest: usize) -> Vec<u8> {
    let packet = Packet {
        data_offset: data.0.into(),
        data_length: data.1.into(),
        oob_data_offset: 0.into(),
        oob_data_length: 0.into(),
        oob_data_count: 0.into(),
        packet_info_offset: info.0.into(),
        packet_info_length: info.1.into(),
        vc_handle: 0.into(),
        reserved: 0.into(),
    };
    let body = [packet.as_bytes(), &std::vec![0; rest]].concat();
    message(MessageType::PACKET, &body)
}

fn layout(bytes: &[u8]) -> Result<PacketLayout, RndisError> {
    let head = &bytes[..bytes.len().min(PACKET_HEAD_SIZE)];
    PacketLayout::parse(head, bytes.len() as u32)
}

#[test]
fn frames_lie_in_their_messages() {
    let good = packet((36 + 16, 60), (36, 16), 76);
    let expected = PacketLayout {
        message_length: 120,
        data: Span {
            offset: 60,
            len: 60,
        },
        info: Span {
            offset: 44,
            len: 16,
        },
    };
    assert_eq!(layout(&good), Ok(expected));
    // The frame before the items, and no items.
    assert!(layout(&packet((36, 60), (96, 16), 76)).is_ok());
    for none in [(0, 16), (36, 0), (0, 0)] {
        let layout = layout(&packet((36, 76), none, 76)).unwrap();
        assert_eq!(layout.info, Span::default());
    }
    for (offset, len) in [
        (35, 60),
        (0, 60),
        (53, 60),
        (36, 77),
        (112, 1),
        (36, u32::MAX),
        (u32::MAX, 60),
        (u32::MAX, 1),
        (u32::MAX - 7, 8),
    ] {
        assert_eq!(
            layout(&packet((offset, len), (0, 0), 76)),
            Err(RndisError::Data { offset, len })
        );
        // At 0 there are no items, whatever their length.
        if offset != 0 {
            assert_eq!(
                layout(&packet((36, 60), (offset, len), 76)),
                Err(RndisError::PacketInfo { offset, len })
            );
        }
    }
    for len in 0..good.len() {
        assert!(layout(&good[..len]).is_err());
        let mut short = good.clone();
        set_length(&mut short, len as u32);
        assert!(layout(&short).is_err(), "{len}");
    }
    // What follows belongs to the next message.
    let mut two = [&good[..], &good].concat();
    assert_eq!(layout(&two), Ok(expected));
    two[8..12].copy_from_slice(&200u32.to_le_bytes());
    assert!(layout(&two).is_err());
    let other = message(MessageType::SET_COMPLETE, &[0; 40]);
    assert_eq!(
        layout(&other),
        Err(RndisError::NotAPacket(MessageType::SET_COMPLETE))
    );
}

#[test]
fn heads_can_be_padded() {
    let mut head = Head::new(61, &InfoWriter::new()).unwrap();
    assert_eq!(head.message_length(), 105);
    assert!(head.pad(7));
    let bytes = [head.as_bytes(), &[0; 68]].concat();
    let layout = layout(&bytes).unwrap();
    assert_eq!(layout.message_length, 112);
    assert_eq!(
        layout.data,
        Span {
            offset: 44,
            len: 61
        }
    );
    assert_eq!(layout.info.len, 0);
    assert!(!head.pad(u32::MAX));
    assert_eq!(head.message_length(), 112);
    assert!(Head::new(u32::MAX, &InfoWriter::new()).is_none());
    assert!(Head::new(u32::MAX - 44, &InfoWriter::new()).is_some());
}

fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![1u32..10, 0x8000_0001u32..0x8000_000a, any::<u32>()];
    let word = prop_oneof![0u32..64, any::<u32>(), (u32::MAX - 64)..=u32::MAX];
    (kind, word.clone(), prop::collection::vec(word, 0..24)).prop_map(|(kind, len, words)| {
        let mut all = Vec::from([kind, len]);
        // Most of the time the length is right.
        if len % 4 != 0 {
            all[1] = words.len() as u32 * 4 + 8;
        }
        all.extend(words);
        all.iter().flat_map(|word| word.to_le_bytes()).collect()
    })
}

proptest! {
    #[test]
    fn any_bytes_can_be_parsed(bytes in any_message(), cut in 0usize..100) {
        let bytes = &bytes[..bytes.len().min(cut)];
        let _ = GuestMessage::parse(bytes);
        let _ = HostMessage::parse(bytes);
        if let Ok(layout) = layout(bytes) {
            prop_assert!(layout.message_length as usize <= bytes.len());
            for span in [layout.data, layout.info] {
                prop_assert!(span.of(bytes).is_some());
                prop_assert!(span.end() <= layout.message_length);
                prop_assert!(span.len == 0 || span.offset >= PACKET_HEAD_SIZE as u32);
            }
        }
    }

    /// A walk over messages in a row ends, whatever they say.
    #[test]
    fn rows_of_messages_end(rows in prop::collection::vec(any_message(), 0..8)) {
        let bytes = rows.concat();
        let mut rest = &bytes[..];
        let mut count = 0;
        while let Ok(message) = Message::parse(rest) {
            rest = message.rest;
            count += 1;
        }
        prop_assert!(count <= bytes.len() / HEADER_SIZE);
    }
}
