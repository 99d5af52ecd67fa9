// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of per-packet information: the walk, and each item.

use crate::net::ppi::*;
use proptest::prelude::*;
use std::vec::Vec;

/// An item with these words in its header.
fn item(size: u32, kind: u32, offset: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = [size, kind, offset].map(u32::to_le_bytes).concat();
    bytes.extend(value);
    bytes
}

#[test]
fn bad_items_end_the_walk() {
    let good = item(16, 8, 12, &[1, 0, 0, 0]);
    for (bad, error) in [
        (item(0, 8, 12, &[1; 4]), InfoError::ItemSize(0)),
        (item(11, 8, 12, &[1; 4]), InfoError::ItemSize(11)),
        (item(17, 8, 12, &[1; 4]), InfoError::ItemSize(17)),
        (
            item(u32::MAX, 8, 12, &[1; 4]),
            InfoError::ItemSize(u32::MAX),
        ),
        (item(16, 8, 11, &[1; 4]), InfoError::ValueOffset(11)),
        (item(16, 8, 0, &[1; 4]), InfoError::ValueOffset(0)),
        (item(16, 8, 17, &[1; 4]), InfoError::ValueOffset(17)),
        (
            item(16, 8, u32::MAX, &[1; 4]),
            InfoError::ValueOffset(u32::MAX),
        ),
        (Vec::from([1; 11]), InfoError::Leftover(11)),
        (Vec::from([1]), InfoError::Leftover(1)),
    ] {
        let bytes = [&good[..], &bad].concat();
        let items: Vec<_> = PacketInfo::new(&bytes).collect();
        assert_eq!(items.len(), 2, "{error}");
        assert!(items[0].is_ok());
        assert_eq!(items[1], Err(error));
        assert_eq!(Facts::from_host(&bytes), Err(error));
    }
}

#[test]
fn values_have_their_sizes() {
    for kind in [0, 2, 6, 8, 0x8000_0001] {
        for len in 0..4 {
            let bytes = item(12 + len as u32, kind, 12, &[0xff; 4][..len]);
            assert_eq!(
                Facts::from_host(&bytes),
                Err(InfoError::ValueSize { kind, len })
            );
        }
        let twice = item(16, kind, 12, &[1; 4]).repeat(2);
        assert_eq!(Facts::from_host(&twice), Err(InfoError::Twice(kind)));
    }
    // A value need not follow its header, nor end the item.
    let bytes = item(24, 8, 16, &[9, 9, 9, 9, 1, 2, 3, 4, 9, 9, 9, 9]);
    assert_eq!(Facts::from_host(&bytes).unwrap().hash, Some(0x0403_0201));
}

#[test]
fn unknown_items_are_passed_over() {
    let known = item(16, 8, 12, &[7, 0, 0, 0]);
    for kind in [1, 3, 5, 7, 12, 100, 0x7fff_ffff, 0x8000_0000, 0x8000_0002] {
        let bytes = [item(20, kind, 12, &[0xff; 8]), known.clone()].concat();
        let facts = Facts::from_host(&bytes).unwrap();
        assert_eq!(
            facts,
            Facts {
                hash: Some(7),
                ..Facts::default()
            }
        );
    }
    // Parts go from host to guest only.
    let mut writer = InfoWriter::new();
    writer
        .put(Info::PacketId(PacketId::part(3, true, false)))
        .unwrap();
    assert_eq!(Facts::from_guest(writer.as_bytes()), Ok(Facts::default()));
    let id = Facts::from_host(writer.as_bytes())
        .unwrap()
        .packet_id
        .unwrap();
    assert!(id.is_part() && id.is_first() && !id.is_last());
    assert_eq!((id.version, id.packet_id.get()), (1, 3));
}

#[test]
fn too_much_information() {
    let bytes = item(16, 100, 12, &[0; 4]).repeat(MAX_INFO_SIZE / 16);
    assert_eq!(Facts::from_host(&bytes), Ok(Facts::default()));
    let bytes = [&bytes[..], &bytes].concat();
    assert_eq!(
        Facts::from_host(&bytes),
        Err(InfoError::TooLong(2 * MAX_INFO_SIZE))
    );
    let mut writer = InfoWriter::new();
    for _ in 0..MAX_WRITTEN_SIZE / 16 {
        writer.put(Info::Hash(1)).unwrap();
    }
    assert_eq!(writer.put(Info::Hash(1)), Err(InfoError::Full));
    assert_eq!(writer.as_bytes().len(), MAX_WRITTEN_SIZE);
}

#[test]
fn checksums_that_make_no_sense() {
    for bits in [
        0b00100, // neither IPv4 nor IPv6
        0b00111, // both
        0b01101, // TCP and UDP
        0b00001, // nothing
        0b10010, // IPv6 has no checksum in its header
        0b00000,
    ] {
        assert_eq!(SendChecksum::decode(Checksum(bits)), None, "{bits:#b}");
    }
    let far = SendChecksum {
        ipv6: false,
        transport: Some(Transport::Tcp),
        ip_header: false,
        transport_offset: 1024,
    };
    assert_eq!(far.encode(), None);
    // Bits of the C driver: IPv4, TCP, header at 34.
    let usual = SendChecksum {
        transport_offset: 34,
        ..far
    };
    assert_eq!(usual.encode(), Some(Checksum(34 << 16 | 0b101)));
    let failed = ReceivedChecksum::decode(Checksum(0b00_1001));
    assert_eq!(failed.tcp, Some(false));
    assert!(!failed.transport_is_right());
    let contradicts = ReceivedChecksum::decode(Checksum(0b01_0001));
    assert!(!contradicts.transport_is_right());
    assert!(ReceivedChecksum::decode(Checksum(0b00_1000)).transport_is_right());
    assert!(!ReceivedChecksum::decode(Checksum(0b10_0000)).transport_is_right());
}

#[test]
fn large_sends_that_make_no_sense() {
    let good = LargeSend {
        ipv6: true,
        mss: 1448,
        tcp_offset: 54,
    };
    assert_eq!(good.encode(), Some(1448 | 54 << 20 | 3 << 30));
    for bad in [
        LargeSend { mss: 0, ..good },
        LargeSend {
            mss: 1 << 20,
            ..good
        },
        LargeSend {
            tcp_offset: 1024,
            ..good
        },
    ] {
        assert_eq!(bad.encode(), None);
    }
    assert_eq!(LargeSend::decode(1448 | 54 << 20), None);
    assert_eq!(LargeSend::decode(1 << 30), None);
}

fn received() -> impl Strategy<Value = ReceivedChecksum> {
    let result = prop::option::of(any::<bool>());
    (result.clone(), result.clone(), result, any::<[bool; 3]>()).prop_map(
        |(tcp, udp, ip_header, flags)| ReceivedChecksum {
            tcp,
            udp,
            ip_header,
            loopback: flags[0],
            tcp_value_invalid: flags[1],
            ip_value_invalid: flags[2],
        },
    )
}

fn sent() -> impl Strategy<Value = SendChecksum> {
    let transport = prop_oneof![
        Just(Some(Transport::Tcp)),
        Just(Some(Transport::Udp)),
        Just(None)
    ];
    (any::<bool>(), transport, any::<bool>(), 0u16..1024).prop_map(
        |(ipv6, transport, ip_header, transport_offset)| SendChecksum {
            ipv6,
            transport,
            ip_header: !ipv6 && (ip_header || transport.is_none()),
            transport_offset,
        },
    )
}

proptest! {
    #[test]
    fn items_come_back(
        checksum in prop::option::of(any::<u32>()),
        lso in prop::option::of(any::<u32>()),
        vlan in prop::option::of(any::<u16>()),
        hash in prop::option::of(any::<u32>()),
        part in prop::option::of(any::<(u16, bool, bool)>()),
    ) {
        let facts = Facts {
            checksum: checksum.map(Checksum),
            lso,
            vlan: vlan.map(Vlan::from_tci),
            hash,
            packet_id: part.map(|(id, first, last)| PacketId::part(id, first, last)),
        };
        let items = [
            facts.checksum.map(Info::Checksum),
            facts.lso.map(Info::LargeSend),
            facts.vlan.map(Info::Vlan),
            facts.hash.map(Info::Hash),
            facts.packet_id.map(Info::PacketId),
        ];
        let mut writer = InfoWriter::new();
        for item in items.into_iter().flatten() {
            writer.put(item).unwrap();
        }
        let bytes = writer.as_bytes();
        prop_assert_eq!(bytes.len(), 16 * items.iter().flatten().count());
        prop_assert_eq!(Facts::from_host(bytes), Ok(facts));
        for cut in 1..bytes.len() {
            prop_assert_eq!(Facts::from_host(&bytes[..cut]).is_ok(), cut % 16 == 0);
        }
    }

    #[test]
    fn values_come_back(received in received(), sent in sent(), mss in 1u32..1 << 20,
        tcp_offset in 0u16..1024, ipv6 in any::<bool>(), tci in any::<u16>())
    {
        prop_assert_eq!(ReceivedChecksum::decode(received.encode()), received);
        if sent.transport.is_some() || sent.ip_header {
            prop_assert_eq!(SendChecksum::decode(sent.encode().unwrap()), Some(sent));
        }
        let lso = LargeSend { ipv6, mss, tcp_offset };
        prop_assert_eq!(LargeSend::decode(lso.encode().unwrap()), Some(lso));
        let vlan = Vlan::from_tci(tci);
        prop_assert_eq!(Vlan::new(vlan.id(), vlan.priority(), tci & 0x1000 != 0).tci(), tci);
    }

    /// The walk always ends, soon, and with bytes of its own.
    #[test]
    fn any_bytes_can_be_walked(
        words in prop::collection::vec(
            prop_oneof![0u32..24, Just(12u32), Just(16u32), any::<u32>()], 0..140),
        cut in 0usize..4,
    ) {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(bytes.len().saturating_sub(cut));
        let items: Vec<_> = PacketInfo::new(&bytes).collect();
        prop_assert!(items.len() <= bytes.len() / ITEM_HEADER_SIZE + 1);
        let total: usize = items.iter().flatten().map(|item| item.value.len()).sum();
        prop_assert!(total <= bytes.len());
        let bad = items.iter().position(|item| item.is_err());
        prop_assert!(bad.is_none_or(|bad| bad + 1 == items.len()));
        let facts = Facts::from_host(&bytes);
        prop_assert!(bad.is_none() || facts.is_err());
        if let Ok(facts) = facts {
            facts.checksum.map(SendChecksum::decode);
            facts.checksum.map(ReceivedChecksum::decode);
            facts.lso.map(LargeSend::decode);
        }
    }
}
