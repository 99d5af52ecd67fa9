// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests of the backends, and of segmentation against etherparse's own reading of the frames.

use etherparse::{PacketBuilder, SlicedPacket, TcpHeader, TransportSlice};
use proptest::prelude::*;
use std::time::{Duration, Instant};

use super::vnet::wait_readable;
use super::*;

const SOURCE: [u8; 6] = [2, 0, 0, 0, 0, 1];
const TARGET: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A TCP frame with checksums that are right.
fn tcp_frame(v6: bool, vlan: bool, fin: bool, payload: &[u8]) -> Vec<u8> {
    let mut tcp = TcpHeader::new(1000, 80, 0xffff_ff00, 512);
    tcp.fin = fin;
    tcp.psh = true;
    tcp.ack = true;
    tcp.cwr = true;
    tcp.acknowledgment_number = 77;
    tcp.set_options_raw(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2])
        .unwrap();
    let mut frame = Vec::new();
    let ethernet = PacketBuilder::ethernet2(SOURCE, TARGET);
    match (v6, vlan) {
        (false, false) => ethernet
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .tcp_header(tcp)
            .write(&mut frame, payload),
        (false, true) => ethernet
            .single_vlan(5.try_into().unwrap())
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .tcp_header(tcp)
            .write(&mut frame, payload),
        (true, false) => ethernet
            .ipv6([0xfd; 16], [0xfe; 16], 64)
            .tcp_header(tcp)
            .write(&mut frame, payload),
        (true, true) => ethernet
            .single_vlan(5.try_into().unwrap())
            .ipv6([0xfd; 16], [0xfe; 16], 64)
            .tcp_header(tcp)
            .write(&mut frame, payload),
    }
    .unwrap();
    frame
}

fn udp_frame(v6: bool, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let ethernet = PacketBuilder::ethernet2(SOURCE, TARGET);
    if v6 {
        ethernet
            .ipv6([0xfd; 16], [0xfe; 16], 64)
            .udp(53, 54)
            .write(&mut frame, payload)
    } else {
        ethernet
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .udp(53, 54)
            .write(&mut frame, payload)
    }
    .unwrap();
    frame
}

/// What a guest does to a frame that it leaves to be cut: no lengths, no checksums.
fn forget_lengths(frame: &mut [u8]) {
    let headers = Headers::find(frame).unwrap();
    let (tcp, _) = headers.transport.unwrap();
    let length = if headers.v6 { 4 } else { 2 };
    frame[headers.network + length..][..2].fill(0);
    if !headers.v6 {
        frame[headers.network + 10..][..2].fill(0);
    }
    frame[tcp + 16..][..2].fill(0x55);
}

/// The payload of a frame whose lengths and checksums must all be right, and its TCP header.
fn checked(frame: &[u8]) -> (TcpHeader, Vec<u8>) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else {
        panic!("no TCP in {frame:x?}");
    };
    let sum = match packet.net.as_ref().unwrap() {
        etherparse::NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            let (from, to) = (ip.header().source(), ip.header().destination());
            tcp.calc_checksum_ipv4(from, to).unwrap()
        }
        etherparse::NetSlice::Ipv6(ip) => {
            let (from, to) = (ip.header().source(), ip.header().destination());
            tcp.calc_checksum_ipv6(from, to).unwrap()
        }
        _ => panic!("no IP"),
    };
    assert_eq!(tcp.checksum(), sum);
    (tcp.to_header(), tcp.payload().to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn segments_carry_the_payload(
        v6: bool, vlan: bool, fin: bool,
        payload in proptest::collection::vec(any::<u8>(), 1..20000),
        segment in 1u16..9000,
    ) {
        // No more segments than a frame has in practice.
        let segment = segment.max((payload.len() / 60) as u16).max(1);
        let original = tcp_frame(v6, vlan, fin, &payload);
        let mut frame = Frame::plain(original.clone());
        forget_lengths(&mut frame.bytes);
        prop_assert!(frame.leave_segmentation(segment));
        prop_assert_eq!(frame.gso.is_some(), payload.len() > usize::from(segment));
        let mut wire = Vec::new();
        for_each_wire_frame(&frame, |bytes| { wire.push(bytes.to_vec()); true });
        prop_assert_eq!(wire.len(), payload.len().div_ceil(usize::from(segment)));
        let mut back = Vec::new();
        let mut sequence = 0xffff_ff00u32;
        for (number, bytes) in wire.iter().enumerate() {
            let (tcp, part) = checked(bytes);
            let (first, last) = (number == 0, number + 1 == wire.len());
            prop_assert_eq!(tcp.sequence_number, sequence);
            prop_assert_eq!((tcp.fin, tcp.psh, tcp.cwr), (last && fin, last, first));
            prop_assert!(part.len() == usize::from(segment) || last);
            sequence = sequence.wrapping_add(part.len() as u32);
            back.extend(part);
        }
        prop_assert_eq!(back, payload);
        if wire.len() == 1 {
            prop_assert_eq!(&wire[0], &original);
        }
    }

    #[test]
    fn any_bytes_are_survived(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        start: u16, offset: u16, segment: u16,
    ) {
        let mut frame = Frame::plain(bytes.clone());
        frame.checksum = Checksum::Partial { start, offset };
        frame.gso = Some(Gso { v6: false, ecn: false, header_len: start, segment });
        for_each_wire_frame(&frame, |_| true);
        let mut frame = Frame::plain(bytes);
        frame.leave_segmentation(segment);
        frame.leave_checksum(Transport::Udp);
        frame.complete_ipv4_checksum();
    }
}

#[test]
fn checksums_are_completed() {
    for v6 in [false, true] {
        for payload in [&b""[..], b"x", b"odd", b"even"] {
            let tcp = tcp_frame(v6, false, false, payload);
            let udp = udp_frame(v6, payload);
            for (original, transport) in [(tcp, Transport::Tcp), (udp, Transport::Udp)] {
                // Padding is not part of the sum.
                let mut padded = original.clone();
                padded.extend([0xaa; 7]);
                let mut frame = Frame::plain(padded.clone());
                let headers = Headers::find(&original).unwrap();
                let at = headers.transport.unwrap().0 + usize::from(transport.checksum_offset());
                frame.bytes[at..at + 2].fill(0x77);
                assert!(frame.leave_checksum(transport));
                assert_ne!(frame.bytes, padded);
                frame.complete();
                assert_eq!(frame.bytes, padded);
                assert_eq!(frame.checksum, Checksum::Valid);
                let other = match transport {
                    Transport::Tcp => Transport::Udp,
                    Transport::Udp => Transport::Tcp,
                };
                assert!(!frame.leave_checksum(other));
            }
        }
    }
}

#[test]
fn a_link_carries_what_is_left_to_do() {
    let (near, far) = link_pair("t", 2).unwrap();
    let mut frame = Frame::plain(tcp_frame(false, false, false, &[7; 60_000]));
    assert!(frame.leave_segmentation(1448));
    assert!(frame.gso.is_some_and(|gso| gso.ecn && !gso.v6));
    let mut got = Frame::default();
    assert_eq!(far.receive(1, &mut got).unwrap(), Received::Nothing);
    assert_eq!(near.send(1, &frame).unwrap(), Sent::Done);
    assert_eq!(far.receive(0, &mut got).unwrap(), Received::Nothing);
    assert!(wait_readable(far.readiness(1), Duration::from_secs(5)).unwrap());
    assert_eq!(far.receive(1, &mut got).unwrap(), Received::Frame);
    assert_eq!(got, frame);
    // A receiver that takes nothing costs frames, not time without end.
    let began = Instant::now();
    let lost = (0..1000).any(|_| near.send(0, &frame).unwrap() == Sent::Lost);
    assert!(lost && began.elapsed() < Duration::from_secs(20));
    drop(near);
    assert!(wait_readable(far.readiness(1), Duration::from_secs(5)).unwrap());
    assert_eq!(far.receive(1, &mut got).unwrap(), Received::Closed);
}

#[test]
fn options() {
    let parse = |text: &str| text.parse::<NetOptions>();
    let options =
        parse("tap=tap0,mac=52:54:00:12:34:56,queues=4,mtu=9000,pcap=a,,b,id=n0").unwrap();
    assert_eq!(options.backend, BackendOption::Tap("tap0".into()));
    assert_eq!(options.mac, Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
    assert_eq!(
        (options.queues, options.mtu, options.link),
        (Some(4), 9000, true)
    );
    assert_eq!(options.pcap, Some("a,b".into()));
    assert_eq!(options.id.as_deref(), Some("n0"));
    let options = parse("link=off,passt=/opt/passt,tcp_ports=2222:22,,80").unwrap();
    let BackendOption::Passt(passt) = options.backend else {
        panic!("not passt");
    };
    assert_eq!(passt.program, Some("/opt/passt".into()));
    assert_eq!(passt.tcp_ports.as_deref(), Some("2222:22,80"));
    assert!(!options.link);
    assert_eq!(
        parse("passt").unwrap(),
        NetOptions::new(BackendOption::Passt(PasstOptions::default()))
    );
    for (bad, part) in [
        ("", "key=value"),
        ("queues=1", "tap=NAME or passt"),
        ("tap", "key=value"),
        ("tap=", "key=value"),
        ("tap=a,passt", "exclude"),
        ("tap=a,tap=b", "twice"),
        ("tap=a,tcp_ports=1", "passt only"),
        ("tap=a,mac=01:00:00:00:00:01", "one station"),
        ("tap=a,mac=00:00:00:00:00:00", "one station"),
        ("tap=a,mac=0:0:0:0:0:1", "one station"),
        ("tap=a,mac=52:54:00:12:34:56:78", "one station"),
        ("tap=a,mtu=100", "576 to 65521"),
        ("tap=a,queues=0", "1 to 64"),
        ("tap=a,queues=65", "1 to 64"),
        ("tap=a,link=yes", "on or off"),
        ("tap=a,color=red", "unknown key 'color'"),
        ("tap=a,id=", "key=value"),
        ("tap=a,id=keyboard", "other devices"),
        ("tap=a,id=mouse1", "other devices"),
        ("tap=a,id=scsi0", "other devices"),
        ("tap=a,id=ide0.1", "other devices"),
    ] {
        let error = parse(bad).unwrap_err().to_string();
        assert!(
            error.contains(part) && !error.contains('\n'),
            "{bad}: {error}"
        );
    }
}

#[test]
fn names_that_are_no_interfaces_are_refused() {
    for name in ["", "a/b", "a b", "a-name-that-is-too-long"] {
        let error = Tap::open(name, None, 1).err().unwrap().to_string();
        assert!(error.contains("not a name"), "{error}");
    }
    // One that exists and is no TAP.
    let error = Tap::open("lo", Some(1), 1).err().unwrap().to_string();
    assert!(error.starts_with("TAP lo: "), "{error}");
}

#[test]
fn a_missing_passt_is_named() {
    let options = PasstOptions {
        program: Some("/nowhere/passt".into()),
        ..PasstOptions::default()
    };
    let error = Passt::start(&options, 1500).err().unwrap().to_string();
    assert!(
        error.contains("/nowhere/passt") && error.contains("install"),
        "{error}"
    );
}

/// A program in place of passt, from a shell script.
fn fake_passt(folder: &tempfile::TempDir, script: &str) -> PasstOptions {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.path().join("passt");
    std::fs::write(&path, format!("#!/bin/bash\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    PasstOptions {
        program: Some(path),
        ..PasstOptions::default()
    }
}

#[test]
fn a_passt_that_ends_at_once_is_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let options = fake_passt(&folder, "echo 'No routable interface' >&2; exit 1");
    let error = Passt::start(&options, 1500).err().unwrap().to_string();
    assert_eq!(error, "passt: No routable interface");
}

#[test]
fn passt_frames_have_their_length_before_them() {
    // Gives back what it gets. Arguments: ... --fd 7 --pid 8, at the end.
    let folder = tempfile::tempdir().unwrap();
    let options = fake_passt(
        &folder,
        "while [ \"$1\" != --fd ]; do shift; done; echo 1 > \"$4\"; exec dd bs=64k status=none <&$2 >&$2",
    );
    let passt = Passt::start(&options, 1500).unwrap();
    let payload: Vec<u8> = (0..50_000u32).map(|i| (i % 251) as u8).collect();
    let mut large = Frame::plain(tcp_frame(true, false, true, &payload));
    assert!(large.leave_segmentation(1400));
    let small = Frame::plain(udp_frame(false, b"hello"));
    assert_eq!(passt.send(0, &large).unwrap(), Sent::Done);
    assert_eq!(passt.send(0, &small).unwrap(), Sent::Done);
    let mut got = Frame::default();
    let mut back = Vec::new();
    loop {
        match passt.receive(0, &mut got).unwrap() {
            Received::Frame if got.bytes == small.bytes => break,
            Received::Frame => back.extend(checked(&got.bytes).1),
            Received::Nothing => {
                assert!(wait_readable(passt.readiness(0), Duration::from_secs(10)).unwrap());
            }
            Received::Closed => panic!("it ended"),
        }
    }
    assert_eq!(back, payload);
}

#[test]
fn a_capture_can_be_read_back() {
    use pcap_file::pcapng::{Block, PcapNgReader};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pcapng");
    let capture = Capture::create(&path).unwrap();
    let first = capture.interface("n0", SOURCE);
    let second = capture.interface("n1", TARGET);
    first.frame(Way::Out, b"abcdefghijklmnopq");
    second.frame(Way::In, b"x");
    // Without an end: each block is there when it is written.
    let mut reader = PcapNgReader::new(std::fs::File::open(&path).unwrap()).unwrap();
    let mut seen = Vec::new();
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(packet) = block.unwrap() {
            let age = std::time::SystemTime::now()
                .duration_since(std::time::SystemTime::UNIX_EPOCH + packet.timestamp)
                .unwrap();
            assert!(age < Duration::from_secs(60), "{age:?}");
            seen.push((packet.interface_id, packet.data.to_vec()));
        }
    }
    assert_eq!(
        seen,
        [(0, b"abcdefghijklmnopq".to_vec()), (1, b"x".to_vec())]
    );
    assert!(Capture::create(folder.path()).is_err());
}
