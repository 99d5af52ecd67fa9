// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the packet parsers.

use super::*;
use proptest::prelude::*;
use std::{format, vec::Vec};
use zerocopy::IntoBytes;

fn packet(packet_type: PacketType, offset8: u16, len8: u16, rest: &[u8]) -> Vec<u8> {
    let descriptor = Descriptor {
        packet_type,
        offset8: offset8.into(),
        len8: len8.into(),
        flags: 1.into(),
        transaction_id: 0x55.into(),
    };
    [descriptor.as_bytes(), rest].concat()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn parts_of_a_packet() {
    let bytes = packet(PacketType::IN_BAND, 3, 5, &(0..24).collect::<Vec<u8>>());
    let packet = Packet::parse(&bytes).unwrap();
    assert_eq!(packet.packet_type(), PacketType::IN_BAND);
    assert!(packet.wants_completion());
    assert_eq!(packet.transaction_id(), 0x55);
    assert_eq!(packet.header(), (0..8).collect::<Vec<u8>>());
    assert_eq!(packet.payload(), (8..24).collect::<Vec<u8>>());
    assert_eq!(packet.descriptor().len(), 40);
    assert!(!packet.descriptor().is_empty());
}

#[test]
fn truncated_and_oversized_packets() {
    let bytes = packet(PacketType::IN_BAND, 2, 4, &[0; 16]);
    assert!(Packet::parse(&bytes).is_ok());
    for len in 0..bytes.len() {
        let error = Packet::parse(&bytes[..len]).unwrap_err();
        assert!(
            matches!(error, PacketError::Length { .. }),
            "{len}: {error}"
        );
    }
    // What follows the packet is not part of it.
    let longer = [&bytes[..], &[1; 8]].concat();
    assert_eq!(Packet::parse(&longer).unwrap().payload(), [0; 16]);
}

#[test]
fn kinds_are_not_mixed_up() {
    let bytes = packet(PacketType::COMPLETION, 2, 2, &[]);
    let packet = Packet::parse(&bytes).unwrap();
    let error = PacketError::Type(PacketType::COMPLETION);
    assert_eq!(packet.gpa_direct(1).unwrap_err(), error);
    assert_eq!(packet.transfer_pages().unwrap_err(), error);
    assert_eq!(format!("{error}"), "unexpected packet type COMPLETION");
}

#[test]
fn gpa_ranges_are_checked() {
    let parse = |header: &[u32], max| GpaDirect::parse(&words(header), max).map(|_| ());
    let too_short = Err(PacketError::HeaderTooShort);
    assert_eq!(parse(&[], 1), too_short);
    assert_eq!(parse(&[0], 1), too_short);
    assert_eq!(parse(&[0, 0], 1), Err(PacketError::RangeCount(0)));
    assert_eq!(parse(&[0, 2], 1), Err(PacketError::RangeCount(2)));
    assert_eq!(parse(&[0, u32::MAX], u32::MAX), too_short);
    assert_eq!(parse(&[0, 1], 1), too_short);
    assert_eq!(parse(&[0, 1, 4096, 0], 1), too_short);
    assert_eq!(parse(&[0, 1, 4096, 0, 5], 1), too_short);
    assert_eq!(parse(&[0, 1, 4096, 0, 5, 0], 1), Ok(()));
    assert_eq!(parse(&[0, 1, 4096, 1, 5, 0], 1), too_short);
    assert_eq!(parse(&[0, 1, 4096, 1, 5, 0, 6, 0], 1), Ok(()));
    assert_eq!(
        parse(&[0, 1, 1, 4096, 5, 0, 6, 0], 1),
        Err(PacketError::RangeOffset(4096))
    );
    assert_eq!(parse(&[0, 1, u32::MAX, 4095, 5, 0], 1), too_short);
    // An empty range has no pages, so many of them fit.
    assert_eq!(parse(&[0, 2, 0, 0, 0, 0], 2), Ok(()));
    // 2^52 is the first page frame number whose address needs more than 64 bits.
    assert_eq!(
        parse(&[0, 1, 1, 0, 0, 0x10_0000], 1),
        Err(PacketError::Pfn(1 << 52))
    );
    assert_eq!(parse(&[0, 1, 1, 0, u32::MAX, 0xf_ffff], 1), Ok(()));
    // Bytes after the ranges are ignored.
    assert_eq!(parse(&[0, 1, 1, 0, 5, 0, 7, 7], 1), Ok(()));
}

#[test]
fn transfer_pages_are_checked() {
    let parse = |header: &[u32]| TransferPages::parse(&words(header)).map(|_| ());
    let too_short = Err(PacketError::HeaderTooShort);
    assert_eq!(parse(&[0xcafe]), too_short);
    assert_eq!(parse(&[0xcafe, 0]), Ok(()));
    assert_eq!(parse(&[0xcafe, 1]), too_short);
    assert_eq!(parse(&[0xcafe, u32::MAX, 1, 1]), too_short);
    assert_eq!(
        parse(&[0xcafe, 1, u32::MAX, 1]),
        Err(PacketError::SectionOverflow)
    );

    let header = words(&[0xcafe, 2, 100, 0, 200, 0x600]);
    let bytes = packet(PacketType::TRANSFER_PAGES, 5, 5, &header);
    let pages = Packet::parse(&bytes).unwrap().transfer_pages().unwrap();
    assert_eq!(pages.pageset_id(), 0xcafe);
    let ranges: Vec<_> = pages
        .ranges()
        .iter()
        .map(|range| (range.byte_count.get(), range.byte_offset.get()))
        .collect();
    assert_eq!(ranges, [(100, 0), (200, 0x600)]);
}

#[test]
fn pages_that_bytes_touch() {
    assert_eq!(pages_spanned(0, 0), 0);
    assert_eq!(pages_spanned(1, 0), 1);
    assert_eq!(pages_spanned(0, 4097), 2);
    assert_eq!(pages_spanned(u32::MAX, u32::MAX), 0x20_0000);
}

#[test]
fn header_sizes_do_not_overflow() {
    assert_eq!(gpa_direct_header_size(1, 2), Some(32));
    assert_eq!(gpa_direct_header_size(usize::MAX, 0), None);
    assert_eq!(gpa_direct_header_size(1, u64::MAX), None);
    assert_eq!(gpa_direct_header_size(usize::MAX / 8 - 1, 2), None);
}

proptest! {
    #[test]
    fn any_bytes_parse_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        if let Ok(packet) = Packet::parse(&bytes) {
            let len = 16 + packet.header().len() + packet.payload().len();
            prop_assert!(len <= bytes.len());
            prop_assert_eq!(len as u32, packet.descriptor().len());
        }
    }

    #[test]
    fn any_ranges_parse_or_fail(
        count in 0u32..6,
        lengths in proptest::collection::vec((0u32..0x4000, 0u32..0x1100), 0..5),
        tail in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut header = words(&[0, count]);
        for (byte_count, byte_offset) in lengths {
            header.extend(words(&[byte_count, byte_offset]));
            let pages = pages_spanned(byte_offset, byte_count) as usize;
            header.extend([1, 0, 0, 0, 0, 0, 0, 0].repeat(pages));
        }
        header.extend(tail);
        let Ok(direct) = GpaDirect::parse(&header, 4) else { return Ok(()) };
        prop_assert!((1..=4).contains(&direct.range_count()));
        prop_assert_eq!(direct.ranges().count() as u32, direct.range_count());
        let mut total = 0;
        for range in direct.ranges() {
            let mut sum = 0;
            for (address, len) in range.segments() {
                prop_assert!(len <= PAGE_SIZE);
                prop_assert_eq!(address >> 12, (address + u64::from(len) - 1) >> 12);
                sum += u64::from(len);
            }
            prop_assert_eq!(sum, u64::from(range.byte_count()));
            total += sum;
        }
        prop_assert_eq!(total, direct.byte_count());
    }

    #[test]
    fn any_sections_parse_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..64), count in 0u8..8) {
        let mut header = bytes;
        if let Some(range_count) = header.get_mut(4..8) {
            range_count.copy_from_slice(&u32::from(count).to_le_bytes());
        }
        if let Ok(pages) = TransferPages::parse(&header) {
            prop_assert_eq!(pages.ranges().len(), usize::from(count));
        }
    }
}
