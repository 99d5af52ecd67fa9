// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of NVSP's messages: layouts, round trips, truncation, versions, counts and offsets.

use crate::ids::GpadlId;
use crate::net::nvsp::*;
use proptest::prelude::*;
use std::vec::Vec;
use zerocopy::IntoBytes as _;

/// A body with other bytes in each field.
fn body<B: Body>(seed: u8) -> B {
    let bytes: Vec<u8> = (0..size_of::<B>()).map(|n| seed ^ n as u8).collect();
    B::read_from_bytes(&bytes).unwrap()
}

/// All that is the same for every body: round trip, truncation, version.
fn check<B: Body>(parse: impl Fn(&[u8], Option<Version>) -> Result<Vec<u8>, NvspError>) {
    let body: B = body(0xa5);
    let message = body.encode();
    let need = HEADER_SIZE + size_of::<B>();
    assert!(message[need..].iter().all(|&byte| byte == 0));
    for version in Version::NEWEST_FIRST {
        let parsed = parse(&message, Some(version));
        if version < B::SINCE {
            assert_eq!(parsed, Err(NvspError::NotInVersion(B::TYPE)));
            continue;
        }
        assert_eq!(parsed.unwrap(), body.as_bytes());
        for len in 0..need {
            let error = if len < HEADER_SIZE {
                NvspError::NoHeader { len }
            } else {
                NvspError::Truncated {
                    message_type: B::TYPE,
                    len,
                    need,
                }
            };
            assert_eq!(parse(&message[..len], Some(version)), Err(error));
        }
        assert!(parse(&message[..need], Some(version)).is_ok());
    }
    let before = parse(&message, None).is_ok();
    let is_init = matches!(B::TYPE, MessageType::INIT | MessageType::INIT_COMPLETE);
    assert_eq!(before, is_init);
}

macro_rules! check_guest {
    ($($variant:ident($body:ident)),* $(,)?) => {
        $(check::<$body>(|bytes, agreed| match GuestMessage::parse(bytes, agreed)? {
            GuestMessage::$variant(body) => Ok(body.as_bytes().to_vec()),
            other => panic!("{other:?}"),
        });)*
    };
}

macro_rules! check_host {
    ($($variant:ident($body:ident)),* $(,)?) => {
        $(check::<$body>(|bytes, agreed| match HostMessage::parse(bytes, agreed)? {
            HostMessage::$variant(body) => Ok(body.as_bytes().to_vec()),
            other => panic!("{other:?}"),
        });)*
    };
}

#[test]
fn every_message_of_a_guest() {
    check_guest! {
        Init(Init),
        NdisVersion(NdisVersion),
        SendReceiveBuffer(SendReceiveBuffer),
        RevokeReceiveBuffer(RevokeReceiveBuffer),
        SendSendBuffer(SendSendBuffer),
        RevokeSendBuffer(RevokeSendBuffer),
        RndisPacket(RndisPacket),
        PacketComplete(PacketComplete),
        NdisConfig(NdisConfig),
        SwitchDataPath(SwitchDataPath),
        SubChannel(SubChannelRequest),
    }
}

#[test]
fn every_message_of_a_host() {
    check_host! {
        InitComplete(InitComplete),
        SendBufferComplete(SendBufferComplete),
        RndisPacket(RndisPacket),
        PacketComplete(PacketComplete),
        VfAssociation(VfAssociation),
        SubChannel(SubChannelComplete),
    }
    check::<ReceiveBufferComplete>(|bytes, agreed| match HostMessage::parse(bytes, agreed)? {
        // Not a success, so there are no sections.
        HostMessage::ReceiveBufferComplete(body, &[]) => Ok(body.as_bytes().to_vec()),
        other => panic!("{other:?}"),
    });
}

#[test]
fn bytes_are_those_of_the_c_driver() {
    let start = |message: &[u8], bytes: &[u8]| assert_eq!(&message[..bytes.len()], bytes);
    start(
        &Init::propose(Version::V6_1).encode(),
        &[1, 0, 0, 0, 1, 0, 6, 0, 1, 0, 6, 0, 0],
    );
    start(
        &Version::V5.ndis().encode(),
        &[100, 0, 0, 0, 6, 0, 0, 0, 30, 0, 0, 0],
    );
    start(&Version::V4.ndis().encode()[8..], &[1, 0, 0, 0]);
    start(
        &SendReceiveBuffer::new(GpadlId::new(0x11223344)).encode(),
        &[101, 0, 0, 0, 0x44, 0x33, 0x22, 0x11, 0xfe, 0xca, 0, 0],
    );
    start(
        &SendSendBuffer::new(GpadlId::new(2)).encode(),
        &[104, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
    );
    let all =
        Capabilities::SRIOV | Capabilities::IEEE8021Q | Capabilities::TEAMING | Capabilities::RSC;
    assert_eq!(Version::V6_1.capabilities(), all);
    start(
        &NdisConfig::new(1514, all).encode(),
        &[
            125, 0, 0, 0, 0xea, 5, 0, 0, 0, 0, 0, 0, 0xac, 0, 0, 0, 0, 0, 0, 0,
        ],
    );
    start(
        &RndisPacket::outside(ChannelType::CONTROL).encode(),
        &[107, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
    );
    start(
        &RndisPacket::in_section(ChannelType::DATA, 3, 500).encode(),
        &[107, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0xf4, 1, 0, 0],
    );
    start(
        &SubChannelRequest::allocate(3).encode(),
        &[133, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0],
    );
    let complete = PacketComplete {
        status: Status::SUCCESS,
    };
    assert_eq!(complete.encode_short(), [108, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(complete.encode()[..8], complete.encode_short());
}

#[test]
fn versions_are_ordered_and_known() {
    assert!(Version::NEWEST_FIRST.is_sorted_by(|a, b| a > b));
    for version in Version::NEWEST_FIRST {
        assert_eq!(Version::from_raw(version.raw()), Some(version));
    }
    assert_eq!(Version::from_raw(0x0003_0001), None);
    assert_eq!(Version::V1.capabilities(), Capabilities::empty());
    assert_eq!(Version::V4.capabilities(), Capabilities::IEEE8021Q);
}

#[test]
fn unknown_numbers_are_data() {
    let mut message = [0; MESSAGE_SIZE];
    for number in [0u32, 3, 135, 136, u32::MAX] {
        message[..4].copy_from_slice(&number.to_le_bytes());
        let version = Some(Version::V6_1);
        assert!(matches!(
            GuestMessage::parse(&message, version),
            Ok(GuestMessage::Other(other)) if other.get() == number
        ));
        assert!(matches!(
            HostMessage::parse(&message, version),
            Ok(HostMessage::Other(other)) if other.get() == number
        ));
    }
}

/// An answer with this many sections, of which as many follow as fit.
fn answer(claimed: u32, present: usize) -> Vec<u8> {
    let mut message = [102u32, 1, claimed].map(u32::to_le_bytes).concat();
    for n in 0..present as u32 {
        let section = [n * 1000, 100, 10, n * 1000 + 1000];
        message.extend(section.iter().flat_map(|word| word.to_le_bytes()));
    }
    message
}

#[test]
fn sections_of_a_receive_buffer() {
    let parse = |bytes: &[u8]| match HostMessage::parse(bytes, Some(Version::V1)) {
        Ok(HostMessage::ReceiveBufferComplete(_, sections)) => Ok(sections.to_vec()),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error),
    };
    for count in 1..=MAX_SECTIONS {
        let bytes = answer(count as u32, count);
        let sections = parse(&bytes).unwrap();
        assert_eq!(sections.len(), count);
        assert_eq!(sections[count - 1].offset.get(), (count as u32 - 1) * 1000);
        for len in 12..bytes.len() {
            assert_eq!(
                parse(&bytes[..len]),
                Err(NvspError::Truncated {
                    message_type: MessageType::SEND_RECEIVE_BUFFER_COMPLETE,
                    len,
                    need: bytes.len(),
                })
            );
        }
    }
    for count in [0, MAX_SECTIONS as u32 + 1, u32::MAX] {
        let bytes = answer(count, 9);
        assert_eq!(parse(&bytes), Err(NvspError::SectionCount(count)));
    }
    let section = ReceiveBufferSection {
        offset: 0.into(),
        piece_size: 1728.into(),
        piece_count: 9709.into(),
        end_offset: 16_777_152.into(),
    };
    let message = ReceiveBufferComplete::with_section(section);
    assert_eq!(parse(&message), Ok(Vec::from([section])));
    assert_eq!(
        parse(&message[..ReceiveBufferComplete::ANSWER_SIZE]),
        Ok(Vec::from([section]))
    );
}

fn table(message: &[u8], version: Version) -> Result<SendTable, NvspError> {
    match HostMessage::parse(message, Some(version))? {
        HostMessage::IndirectionTable(table) => Ok(table),
        other => panic!("{other:?}"),
    }
}

#[test]
fn send_table() {
    let sent = SendTable::spread(5);
    assert_eq!(sent.0[..7], [0, 1, 2, 3, 4, 0, 1]);
    let message = sent.encode();
    assert_eq!(message[..12], [134, 0, 0, 0, 16, 0, 0, 0, 40, 0, 0, 0]);
    for version in [Version::V5, Version::V6, Version::V6_1] {
        assert_eq!(table(&message, version), Ok(sent));
        for len in 12..message.len() {
            assert_eq!(
                table(&message[..len], version),
                Err(NvspError::TableOffset(40))
            );
        }
    }
    assert_eq!(
        table(&message, Version::V4).unwrap_err(),
        NvspError::NotInVersion(MessageType::SEND_INDIRECTION_TABLE)
    );
    // Old hosts name a wrong place; later ones are believed.
    for wrong in [0u32, 4, 41, 104, u32::MAX, u32::MAX - 63] {
        let mut message = message;
        message[8..12].copy_from_slice(&wrong.to_le_bytes());
        assert_eq!(table(&message, Version::V6), Ok(sent));
        assert_eq!(
            table(&message, Version::V6_1),
            Err(NvspError::TableOffset(wrong))
        );
    }
    for count in [0u32, 15, 17, u32::MAX] {
        let mut message = message;
        message[4..8].copy_from_slice(&count.to_le_bytes());
        assert_eq!(
            table(&message, Version::V6_1),
            Err(NvspError::TableSize(count))
        );
    }
    // A table right behind the header.
    let mut close = message;
    close[8] = 12;
    close.copy_within(40.., 12);
    assert_eq!(table(&close[..76], Version::V5), Ok(sent));
}

proptest! {
    #[test]
    fn table_never_leaves_the_channels(
        entries in any::<[u32; SEND_TABLE_SIZE]>(),
        hash in any::<u32>(),
        channels in 1u32..70,
    ) {
        let table = SendTable(entries);
        prop_assert!(table.channel(hash, channels) < channels);
        prop_assert_eq!(SendTable::spread(channels).channel(hash, channels),
            (hash % 16) % channels);
        prop_assert_eq!(SendTable::spread(0), SendTable::default());
    }

    #[test]
    fn any_bytes_can_be_parsed(
        message_type in prop_oneof![0u32..3, 99u32..140, any::<u32>()],
        rest in prop::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 0..160),
        version in prop::sample::select(Version::NEWEST_FIRST.to_vec()),
    ) {
        let bytes = [&message_type.to_le_bytes()[..], &rest].concat();
        for agreed in [None, Some(version)] {
            let _ = GuestMessage::parse(&bytes, agreed);
            if let Ok(HostMessage::ReceiveBufferComplete(complete, sections)) =
                HostMessage::parse(&bytes, agreed)
            {
                prop_assert!(sections.len() <= MAX_SECTIONS);
                prop_assert!(sections.is_empty() || complete.status == Status::SUCCESS);
            }
        }
    }
}
