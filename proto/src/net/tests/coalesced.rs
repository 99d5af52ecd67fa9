// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of what is known of frames that the host has put together.

use crate::net::coalesced::*;
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

const MTU: u32 = 1500;

/// Headers of a TCP packet, with these bytes of options of IPv4 and of TCP.
fn headers(ipv6: bool, vlan: bool, ip_options: usize, tcp_options: usize) -> Vec<u8> {
    let mut head = vec![0; 12];
    if vlan {
        head.extend([0x81, 0, 0, 1]);
    }
    if ipv6 {
        head.extend([0x86, 0xdd]);
        let mut ip = [0; 40];
        ip[6] = 6;
        head.extend(ip);
    } else {
        head.extend([8, 0]);
        let mut ip = vec![0; 20 + ip_options];
        ip[0] = 0x40 | (5 + ip_options / 4) as u8;
        ip[6] = 0x40; // do not fragment
        ip[9] = 6;
        head.extend(ip);
    }
    let mut tcp = vec![0; 20 + tcp_options];
    tcp[12] = ((5 + tcp_options / 4) << 4) as u8;
    head.extend(tcp);
    head
}

#[test]
fn segments_are_as_long_as_the_mtu_admits() {
    let cases = [
        // IPv6, VLAN tag, options of IPv4, of TCP, size
        (false, false, 0, 0, 1460),
        (false, false, 0, 12, 1448),
        (false, true, 4, 12, 1444),
        (true, false, 0, 12, 1428),
        (true, true, 0, 40, 1400),
    ];
    for (ipv6, vlan, ip_options, tcp_options, size) in cases {
        let head = headers(ipv6, vlan, ip_options, tcp_options);
        assert!(head.len() <= MAX_HEADERS_SIZE);
        let of = |payload: u32| Segments::of(&head, head.len() as u32 + payload, MTU);
        let some = |count| {
            Some(Segments {
                ipv6,
                size: size as u16,
                count,
            })
        };
        assert_eq!(of(0), None);
        assert_eq!(of(size), None);
        assert_eq!(of(size + 1), some(2));
        assert_eq!(of(2 * size), some(2));
        assert_eq!(of(40 * size + 7), some(41));
    }
}

#[test]
fn others_have_no_segments() {
    let len = 20_000;
    let change = |at: usize, to: u8| {
        let mut head = headers(false, false, 0, 0);
        head[at] = to;
        Segments::of(&head, len, MTU)
    };
    assert!(change(14, 0x45).is_some());
    assert_eq!(change(12, 9), None, "another protocol than IP");
    assert_eq!(change(14, 0x44), None, "a header that is too short");
    assert_eq!(change(20, 0x20), None, "a fragment");
    assert_eq!(change(23, 17), None, "UDP");
    assert_eq!(change(46, 0x40), None, "a TCP header that is too short");
    let head = headers(true, false, 0, 0);
    assert!(Segments::of(&head, len, MTU).is_some());
    assert_eq!(Segments::of(&head[..60], len, MTU), None, "cut off");
    assert_eq!(
        Segments::of(&head, 60, MTU),
        None,
        "shorter than its headers"
    );
    assert_eq!(Segments::of(&head, len, 60), None, "no room in the MTU");
}

proptest! {
    /// Whatever the bytes are: all of the payload is in the segments.
    #[test]
    fn nothing_is_lost(
        mut head in prop::collection::vec(any::<u8>(), 0..160),
        tcp in any::<bool>(),
        len in 0u32..70_000,
        mtu in 0u32..70_000,
    ) {
        if tcp && head.len() > 24 {
            head[12..15].copy_from_slice(&[8, 0, 0x45]);
            head[20..22].fill(0);
            head[23] = 6;
        }
        if let Some(segments) = Segments::of(&head, len, mtu) {
            let (size, count) = (u32::from(segments.size), u32::from(segments.count));
            prop_assert!(count >= 2 && size < mtu);
            prop_assert!(size * count >= len.saturating_sub(18 + 60 + 60));
            prop_assert!(size * (count - 1) < len);
        }
    }
}
