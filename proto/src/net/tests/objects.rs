// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the values of objects: addresses, filters, offloads, receive side scaling.

use crate::net::features::Offloads;
use crate::net::flow::flow_hash;
use crate::net::nvsp::Version;
use crate::net::offload::{self, ObjectError, ObjectHeader, ObjectType};
use crate::net::oid::*;
use crate::net::rss;
use crate::net::MacAddress;
use proptest::prelude::*;
use std::vec::Vec;
use zerocopy::{FromBytes as _, IntoBytes as _};

const MAC: MacAddress = MacAddress([0x00, 0x15, 0x5d, 0xab, 0xcd, 0xef]);

#[test]
fn address_as_a_parameter() {
    let value = set_mac(MAC);
    assert_eq!(value.len(), 20 + 28 + 24);
    let words = [20u32, 28, 2, 48, 24];
    assert_eq!(value[..20], words.map(u32::to_le_bytes).concat());
    let text: Vec<u16> = value[20..]
        .chunks(2)
        .map(|unit| u16::from_le_bytes(unit.try_into().unwrap()))
        .collect();
    assert_eq!(
        std::string::String::from_utf16(&text).unwrap(),
        "NetworkAddress00155dabcdef"
    );
    let parameter = ConfigParameter::parse(&value).unwrap();
    assert_eq!(parameter.network_address(), Some(MAC));
    for len in 0..value.len() {
        assert_eq!(ConfigParameter::parse(&value[..len]), None);
    }
    // Another name, another shape, no digit, a digit of two characters.
    for (at, byte) in [(20, b'n'), (21, 1), (8, 0), (48, b'g'), (49, 1), (70, b' ')] {
        let mut value = value;
        value[at] = byte;
        let parameter = ConfigParameter::parse(&value).unwrap();
        assert_eq!(parameter.network_address(), None, "{at}");
    }
    for (at, word) in [(0, 45u32), (4, 53), (12, 49), (16, 25), (0, u32::MAX)] {
        let mut value = value;
        value[at..at + 4].copy_from_slice(&word.to_le_bytes());
        assert_eq!(ConfigParameter::parse(&value), None, "{at}");
    }
    // Too few digits, and too many.
    for len in [22u8, 26] {
        let mut value = [&value[..], b"0\0"].concat();
        value[16] = len;
        let parameter = ConfigParameter::parse(&value).unwrap();
        assert_eq!(parameter.value.len(), usize::from(len));
        assert_eq!(parameter.network_address(), None);
    }
    let mut upper = value;
    upper[48..].make_ascii_uppercase();
    let parameter = ConfigParameter::parse(&upper).unwrap();
    assert_ne!(upper, value);
    assert_eq!(parameter.network_address(), Some(MAC));
}

#[test]
fn filters() {
    let group = MacAddress([0x33, 0x33, 0, 0, 0, 1]);
    let other = MacAddress([2; 6]);
    let accepted = |filter: PacketFilter| {
        [MAC, other, group, MacAddress([1; 6]), MacAddress::BROADCAST]
            .map(|to| filter.accepts(to, MAC, |address| address == group))
    };
    let (t, f) = (true, false);
    assert_eq!(accepted(PacketFilter::empty()), [f, f, f, f, f]);
    assert_eq!(accepted(PacketFilter::DIRECTED), [t, f, f, f, f]);
    assert_eq!(accepted(PacketFilter::MULTICAST), [f, f, t, f, f]);
    assert_eq!(accepted(PacketFilter::ALL_MULTICAST), [f, f, t, t, f]);
    assert_eq!(accepted(PacketFilter::BROADCAST), [f, f, f, f, t]);
    assert_eq!(accepted(PacketFilter::PROMISCUOUS), [t, t, t, t, t]);
    assert!(MAC.is_unicast() && !group.is_unicast() && !MacAddress::default().is_unicast());
    assert_eq!(std::format!("{MAC}"), "00:15:5d:ab:cd:ef");
}

#[test]
fn offloads_by_revision() {
    for (version, revision, size) in [
        (Version::V1, 1, 112),
        (Version::V2, 1, 112),
        (Version::V4, 2, 144),
        (Version::V5, 3, 156),
        (Version::V6_1, 3, 156),
    ] {
        let asked = offload::Capabilities::empty(version);
        let header = ObjectHeader::read_from_bytes(&asked.as_value()[..4]).unwrap();
        assert_eq!(asked.as_value().len(), size);
        assert_eq!(asked.as_value()[..4], [0xa7, revision, size as u8, 0]);
        let told = Offloads::ALL.to_capabilities(Some(header));
        assert_eq!(told.as_value().len(), size);
        let parsed = offload::Capabilities::parse(told.as_value()).unwrap();
        assert_eq!(parsed.rsc(), revision == 3);
        assert_eq!(parsed.ipv4_lso(), Some(0xffff));
        assert_eq!(parsed.ipv6_lso(), Some(0xffff));
        for len in 0..size {
            assert!(offload::Capabilities::parse(&told.as_value()[..len]).is_err());
        }
        // Bytes after the structure do not count.
        let longer = [told.as_value(), &[0xff; 60]].concat();
        let longer = offload::Capabilities::parse(&longer).unwrap();
        assert_eq!(longer.as_value(), parsed.as_value());
        let chosen = Offloads::choose(&parsed, version);
        assert_eq!(
            chosen,
            Offloads {
                ipv4_send: false,
                udp_ipv4_send: version >= Version::V5,
                udp_ipv6_send: version >= Version::V5,
                rsc: version == Version::V6_1,
                ..Offloads::ALL
            }
        );
        let set = chosen.to_parameters(&chosen, version);
        let expected = if version <= Version::V4 { 22 } else { 28 };
        assert_eq!(set.as_value().len(), expected);
        let parsed = offload::Parameters::parse(set.as_value()).unwrap();
        let on = Offloads::default().apply(&parsed, &Offloads::ALL);
        let kept = Offloads {
            // Not part of the structure.
            rsc: chosen.rsc && version > Version::V4,
            ..chosen
        };
        assert_eq!(on, Some(kept));
        // And off again.
        let off = Offloads::default().to_parameters(&chosen, version);
        let off = kept.apply(&off, &Offloads::ALL);
        assert_eq!(off, Some(Offloads::default()));
    }
}

#[test]
fn guests_choose_what_there_is() {
    let none = Offloads::default().to_capabilities(None);
    assert_eq!(Offloads::choose(&none, Version::V6_1), Offloads::default());
    // Without checksums there is no large send.
    let odd = Offloads {
        lso_ipv4: 60_000,
        lso_ipv6: 60_000,
        ..Offloads::default()
    };
    let chosen = Offloads::choose(&odd.to_capabilities(None), Version::V6_1);
    assert_eq!(chosen, Offloads::default());
    // What the host has not is not set, and cannot be.
    let set = Offloads::ALL.to_parameters(&Offloads::ALL, Version::V6_1);
    assert_eq!(Offloads::default().apply(&set, &Offloads::default()), None);
    for missing in [
        Offloads {
            rsc: false,
            ..Offloads::ALL
        },
        Offloads {
            udp_ipv6_send: false,
            ..Offloads::ALL
        },
        Offloads {
            lso_ipv4: 0,
            ..Offloads::ALL
        },
    ] {
        assert_eq!(Offloads::default().apply(&set, &missing), None);
    }
    let set = Offloads::ALL.to_parameters(&Offloads::default(), Version::V6_1);
    assert_eq!(
        Offloads::default().apply(&set, &Offloads::default()),
        Some(Offloads::default())
    );
    // Nothing changes.
    let unchanged = offload::Parameters::unchanged(Version::V5);
    assert_eq!(
        Offloads::ALL.apply(&unchanged, &Offloads::ALL),
        Some(Offloads::ALL)
    );
}

#[test]
fn structures_that_are_none() {
    let good = Offloads::ALL.to_capabilities(None);
    let with = |at: usize, bytes: &[u8]| {
        let mut value = good.as_value().to_vec();
        value[at..at + bytes.len()].copy_from_slice(bytes);
        offload::Capabilities::parse(&value).map(|_| ())
    };
    assert_eq!(
        with(0, &[0x80]),
        Err(ObjectError::Type(ObjectType::DEFAULT))
    );
    assert_eq!(with(1, &[0]), Err(ObjectError::Revision(0)));
    assert_eq!(with(1, &[200]), Ok(()));
    assert_eq!(with(2, &[111, 0]), Err(ObjectError::Size(111)));
    assert_eq!(with(2, &[157, 0]), Err(ObjectError::Size(157)));
    assert_eq!(with(2, &[0xff, 0xff]), Err(ObjectError::Size(0xffff)));
    assert_eq!(with(2, &[112, 0]), Ok(()));
}

#[test]
fn scaling_capabilities() {
    let told = rss::Capabilities::new(8, 128);
    let bytes = told.as_bytes();
    assert_eq!(bytes[..4], [0x88, 2, 18, 0]);
    assert_eq!(rss::Capabilities::parse(bytes), Ok(told));
    assert_eq!(told.table_entries(), 128);
    for len in 0..bytes.len() {
        assert!(rss::Capabilities::parse(&bytes[..len]).is_err());
    }
    // The first revision has no size of the table.
    let mut old = bytes[..16].to_vec();
    old[1..3].copy_from_slice(&[1, 16]);
    let old = rss::Capabilities::parse(&old).unwrap();
    assert_eq!(old.table_entries(), rss::DEFAULT_TABLE_SIZE);
    for (size, entries) in [(0, 128), (1, 1), (256, 256), (257, 128), (u16::MAX, 128)] {
        assert_eq!(rss::Capabilities::new(2, size).table_entries(), entries);
    }
    assert_eq!(rss::Capabilities::query().as_bytes()[..4], [0x88, 2, 18, 0]);
}

fn encoded(flags: rss::ParameterFlags, table: &[u16]) -> Vec<u8> {
    let mut out = [0xee; rss::MAX_PARAMETERS_SIZE];
    let len = rss::encode_parameters(&mut out, flags, table, &rss::DEFAULT_KEY).unwrap();
    out[..len].to_vec()
}

#[test]
fn scaling_parameters() {
    let table: Vec<u16> = (0..128).map(|n| n % 4).collect();
    let value = encoded(rss::ParameterFlags::empty(), &table);
    assert_eq!(value.len(), 40 + 512 + 40);
    assert_eq!(value[..8], [0x89, 2, 40, 0, 0, 0, 0, 0]);
    assert_eq!(value[8..16], [0x01, 0x17, 0, 0, 0, 2, 0, 0]);
    let parsed = rss::Parameters::parse(&value).unwrap();
    assert!(parsed
        .table
        .iter()
        .map(|n| n.get() as u16)
        .eq(table.iter().copied()));
    assert_eq!(parsed.key, rss::DEFAULT_KEY);
    assert_eq!(parsed.hash_info, rss::HashInfo::GUEST);
    for len in 0..value.len() {
        assert!(rss::Parameters::parse(&value[..len]).is_err());
    }
    // Table and key: sizes and offsets.
    for (at, word) in [
        (12, 0u16),
        (12, 513),
        (12, 2),
        (12, 1028),
        (20, 0),
        (20, 41),
        (16, u16::MAX),
        (18, 1),
        (24, u16::MAX),
        (26, u16::MAX),
    ] {
        let mut value = value.clone();
        value[at..at + 2].copy_from_slice(&word.to_le_bytes());
        assert!(
            matches!(
                rss::Parameters::parse(&value),
                Err(ObjectError::Table { .. })
            ),
            "{word} at {at}"
        );
        // What is not used need not be right.
        value[4] = (rss::ParameterFlags::TABLE_UNCHANGED | rss::ParameterFlags::KEY_UNCHANGED)
            .bits() as u8;
        let parsed = rss::Parameters::parse(&value).unwrap();
        assert!(parsed.table.is_empty() && parsed.key.is_empty());
    }
    let off = encoded(rss::ParameterFlags::DISABLE, &table);
    assert!(rss::Parameters::parse(&off).unwrap().table.is_empty());
    let key = &rss::DEFAULT_KEY;
    let flags = rss::ParameterFlags::empty();
    let mut out = [0; rss::MAX_PARAMETERS_SIZE];
    assert_eq!(
        rss::encode_parameters(&mut out[..119], flags, &[0; 10], key),
        None
    );
    assert_eq!(
        rss::encode_parameters(&mut out, flags, &[0; 257], key),
        None
    );
    assert_eq!(
        rss::encode_parameters(&mut out, flags, &[0; 256], key),
        Some(rss::MAX_PARAMETERS_SIZE)
    );
}

/// A frame with these addresses and, if it is TCP, ports.
fn frame(source: &[u8], destination: &[u8], ports: [u16; 2], protocol: u8, vlan: bool) -> Vec<u8> {
    let mut frame = Vec::from([0; 12]);
    if vlan {
        frame.extend([0x81, 0, 0, 5]);
    }
    if source.len() == 4 {
        frame.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, protocol, 64]);
    }
    frame.extend(source);
    frame.extend(destination);
    frame.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    frame.extend([0; 16]);
    frame
}

/// The examples of the NDIS documentation ("Verifying the RSS hash calculation").
#[test]
fn hash_of_known_flows() {
    let v6 = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
    let all = rss::HashInfo::GUEST;
    let no_ports = rss::HashInfo::TOEPLITZ | rss::HashInfo::IPV4 | rss::HashInfo::IPV6;
    for (source, destination, ports, addresses_only, with_ports) in [
        (
            &[66, 9, 149, 187][..],
            &[161, 142, 100, 80][..],
            [2794, 1766],
            0x323e_8fc2,
            0x51cc_c178,
        ),
        (
            &[199, 92, 111, 2],
            &[65, 69, 140, 83],
            [14230, 4739],
            0xd718_262a,
            0xc626_b0ea,
        ),
        (
            &v6("3ffe:2501:200:1fff::7"),
            &v6("3ffe:2501:200:3::1"),
            [2794, 1766],
            0x2cc1_8cd5,
            0x4020_7d3d,
        ),
        (
            &v6("3ffe:501:8::260:97ff:fe40:efab"),
            &v6("ff02::1"),
            [14230, 4739],
            0x0f0c_461c,
            0xdde5_1bbf,
        ),
    ] {
        for vlan in [false, true] {
            let tcp = frame(source, destination, ports, 6, vlan);
            let udp = frame(source, destination, ports, 17, vlan);
            let hash = |frame: &[u8], info| flow_hash(frame, &rss::DEFAULT_KEY, info);
            assert_eq!(hash(&tcp, all), Some(with_ports));
            assert_eq!(hash(&tcp, no_ports), Some(addresses_only));
            assert_eq!(hash(&udp, all), Some(addresses_only));
            assert_eq!(hash(&tcp, rss::HashInfo::TOEPLITZ), None);
            assert_eq!(hash(&udp, all - no_ports), None);
            for len in 0..tcp.len() {
                let hash = hash(&tcp[..len], all);
                assert!([None, Some(addresses_only), Some(with_ports)].contains(&hash));
            }
        }
    }
    // A fragment has no ports, and what is not IP has no hash.
    let mut fragment = frame(
        &[66, 9, 149, 187],
        &[161, 142, 100, 80],
        [2794, 1766],
        6,
        false,
    );
    fragment[20] = 0x20;
    assert_eq!(
        flow_hash(&fragment, &rss::DEFAULT_KEY, all),
        Some(0x323e_8fc2)
    );
    fragment[12..14].copy_from_slice(&[8, 6]);
    assert_eq!(flow_hash(&fragment, &rss::DEFAULT_KEY, all), None);
}

proptest! {
    #[test]
    fn any_bytes_can_be_parsed(mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        kind in prop::sample::select(std::vec![0x80u8, 0x88, 0x89, 0xa7]),
        size in prop_oneof![0u16..200, any::<u16>()])
    {
        let _ = ConfigParameter::parse(&bytes).map(|parameter| parameter.network_address());
        if bytes.len() >= 4 {
            bytes[..2].copy_from_slice(&[kind, 1]);
            bytes[2..4].copy_from_slice(&size.to_le_bytes());
        }
        let _ = offload::Capabilities::parse(&bytes);
        let _ = rss::Capabilities::parse(&bytes);
        if let Ok(parameters) = offload::Parameters::parse(&bytes) {
            let _ = Offloads::default().apply(&parameters, &Offloads::ALL);
        }
        if let Ok(parameters) = rss::Parameters::parse(&bytes) {
            prop_assert!(parameters.table.len() <= rss::MAX_TABLE_SIZE);
            prop_assert!(parameters.key.len() <= rss::KEY_SIZE);
        }
        flow_hash(&bytes, &rss::DEFAULT_KEY, rss::HashInfo::GUEST);
    }

    #[test]
    fn offloads_come_back(bits in any::<[bool; 6]>(), lso in any::<[u16; 2]>()) {
        let tcp4 = bits[0];
        let tcp6 = bits[1];
        let offloads = Offloads {
            tcp_ipv4_send: tcp4,
            udp_ipv4_send: tcp4 && bits[2],
            tcp_ipv6_send: tcp6,
            udp_ipv6_send: tcp6 && bits[3],
            ipv4_send: false,
            receive: tcp4 || tcp6,
            lso_ipv4: if tcp4 { lso[0].into() } else { 0 },
            lso_ipv6: if tcp6 { lso[1].into() } else { 0 },
            rsc: bits[5],
        };
        let chosen = Offloads::choose(&offloads.to_capabilities(None), Version::V6_1);
        prop_assert_eq!(chosen, offloads);
        let set = chosen.to_parameters(&chosen, Version::V6_1);
        let set = offload::Parameters::parse(set.as_value()).unwrap();
        prop_assert_eq!(Offloads::default().apply(&set, &offloads), Some(offloads));
    }
}
