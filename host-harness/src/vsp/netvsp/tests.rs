// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests of the network provider, with a guest in memory: the real bus server and rings, the
//! guest's side of `hv_proto`, and a cable to the test in place of a network.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use etherparse::PacketBuilder;
use hv_proto::guid;
use hv_proto::ids::GpadlId;
use hv_proto::message::OfferChannel;
use hv_proto::net::RECEIVE_BUFFER_ID;
use hv_proto::net::connect::{Agreed, Buffer, Connect, GuestConfig, Step, granted_sub_channels};
use hv_proto::net::frame::{Head, PacketLayout};
use hv_proto::net::nvsp::{
    Body, ChannelType, HostMessage, PacketComplete, RndisPacket, Status, SubChannelRequest, Version,
};
use hv_proto::net::offload;
use hv_proto::net::oid::{Oid, PacketFilter, set_mac};
use hv_proto::net::ppi::{
    Facts, Info, InfoWriter, LargeSend, ReceivedChecksum, SendChecksum, Transport as PpiTransport,
    Vlan,
};
use hv_proto::net::rndis::{self, Initialize, MessageType, RequestBuf, Status as RndisStatus};
use hv_proto::net::rss;
use hv_proto::packet::PacketType;
use hv_proto::version::Version as BusVersion;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::FromBytes;

use super::*;
use crate::net::{
    Backend, Checksum, Frame, Link, ReceiveOffloads, Received, Sent, Transport,
    for_each_wire_frame, link_pair,
};
use crate::vmbus::test_guest::{FakeChannel, FakeGuest, NEVER, Received as BusPacket, SOON};

const RING_PAGES: usize = 32;
/// Pages of the guest's buffers.
const RECEIVE_PAGES: usize = 64;
const SEND_PAGES: usize = 16;

const PEER: [u8; 6] = [2, 0, 0, 0, 0, 9];
const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// What of a message of the host a test looks at.
#[derive(Debug)]
struct Got {
    transaction_id: u64,
    control: bool,
    messages: Vec<Vec<u8>>,
}

/// A NIC whose guest has set it up, and the other end of its cable.
struct Rig {
    network: Network,
    guest: FakeGuest,
    peer: Arc<dyn Backend>,
    channel: FakeChannel,
    subs: Vec<FakeChannel>,
    receive: Vec<u64>,
    send: Vec<u64>,
    agreed: Agreed,
    /// Frames that came before an answer that a test waited for.
    early: Vec<(usize, Got)>,
}

fn pages(guest: &mut FakeGuest, channel: &FakeChannel, count: usize) -> (Vec<u64>, GpadlId) {
    let pfns = guest.pages(count);
    let gpadl = guest.create_gpadl(channel.id, &pfns).unwrap();
    (pfns, gpadl)
}

fn read_pages(guest: &FakeGuest, pfns: &[u64], offset: u32, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    for (at, byte) in (offset as usize..).zip(&mut bytes) {
        let address = GuestAddress((pfns[at / 4096] << 12) + at as u64 % 4096);
        *byte = guest.mem.read_obj(address).unwrap();
    }
    bytes
}

fn write_pages(guest: &FakeGuest, pfns: &[u64], offset: u32, bytes: &[u8]) {
    for (at, byte) in (offset as usize..).zip(bytes) {
        let address = GuestAddress((pfns[at / 4096] << 12) + at as u64 % 4096);
        guest.mem.write_obj(*byte, address).unwrap();
    }
}

impl Rig {
    fn new() -> Self {
        Self::with(1, GuestConfig::new(1500))
    }

    fn with(queues: u16, config: GuestConfig) -> Self {
        let (near, far) = link_pair("t", queues).unwrap();
        Self::on(Arc::new(near), far, config)
    }

    /// With a NIC on `near`, and `far` at the other end of it.
    fn on(near: Arc<dyn Backend>, far: Link, config: GuestConfig) -> Self {
        let guest = FakeGuest::connected(BusVersion::V5_3);
        let network = Network::new(4, None).unwrap();
        network.connect(&guest.server).unwrap();
        let params = NicParams {
            mac: Some(OWN),
            ..NicParams::new(near)
        };
        assert_eq!(network.add_nic(params).unwrap(), "net0");
        let offer = Self::offer(&guest);
        let (guest, channel, receive, send, agreed) = Self::connect(guest, offer, config);
        let mut rig = Self {
            network,
            guest,
            peer: Arc::new(far),
            channel,
            subs: Vec::new(),
            receive,
            send,
            agreed,
            early: Vec::new(),
        };
        let initialize = Initialize {
            request_id: 1.into(),
            major_version: 1.into(),
            minor_version: 0.into(),
            max_transfer_size: 0x4000.into(),
        };
        let message = RequestBuf::<64>::new(MessageType::INITIALIZE, &initialize, &[]).unwrap();
        rig.request(message.as_bytes());
        let filter = PacketFilter::DIRECTED | PacketFilter::BROADCAST;
        assert_eq!(
            rig.set(Oid::GEN_CURRENT_PACKET_FILTER, &filter.bits().to_le_bytes()),
            RndisStatus::SUCCESS
        );
        rig
    }

    fn offer(guest: &FakeGuest) -> OfferChannel {
        let mut offers = guest.request_offers();
        offers.retain(|offer| offer.interface_id == guid::NETWORK);
        assert_eq!(offers.len(), 1);
        offers[0]
    }

    fn connect(
        mut guest: FakeGuest,
        offer: OfferChannel,
        config: GuestConfig,
    ) -> (FakeGuest, FakeChannel, Vec<u64>, Vec<u64>, Agreed) {
        let mut channel = guest.open(&offer, RING_PAGES, 0).unwrap();
        let (receive, receive_gpadl) = pages(&mut guest, &channel, RECEIVE_PAGES);
        let (send, send_gpadl) = pages(&mut guest, &channel, SEND_PAGES);
        let mut connect = Connect::new(config);
        let mut step = connect.start();
        loop {
            step = match step {
                Step::Request(message) => {
                    channel.send(7, &message);
                    connect.on_answer(&channel.completion(7)).unwrap()
                }
                Step::Notify(message) => {
                    channel.try_send(8, &message, false).unwrap();
                    connect.sent().unwrap()
                }
                Step::ShareBuffer { buffer, .. } => {
                    let (gpadl, len) = match buffer {
                        Buffer::Receive => (receive_gpadl, RECEIVE_PAGES),
                        Buffer::Send => (send_gpadl, SEND_PAGES),
                    };
                    connect.shared(gpadl, len as u32 * 4096).unwrap()
                }
                Step::Done(agreed) => return (guest, channel, receive, send, agreed),
            };
        }
    }

    /// A transfer-page packet, with its messages out of the receive buffer.
    fn open(&self, packet: &BusPacket) -> Got {
        assert_eq!(packet.packet_type, PacketType::TRANSFER_PAGES);
        assert!(packet.wants_completion);
        let header = &packet.header;
        assert_eq!(header[..2], RECEIVE_BUFFER_ID.to_le_bytes());
        let count = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
        let messages = (0..count).map(|i| {
            let (range, _) =
                hv_proto::packet::TransferPageRange::read_from_prefix(&header[8 + 8 * i..])
                    .unwrap();
            let span = self
                .agreed
                .receive
                .range(&range)
                .expect("range in a section");
            read_pages(&self.guest, &self.receive, span.offset, span.len)
        });
        let kind = match HostMessage::parse(&packet.payload, Some(self.agreed.version)) {
            Ok(HostMessage::RndisPacket(kind)) => kind,
            other => panic!("{other:?}"),
        };
        Got {
            transaction_id: packet.transaction_id,
            control: kind.channel_type == ChannelType::CONTROL,
            messages: messages.collect(),
        }
    }

    /// Gives the sections of a packet back.
    fn give_back(channel: &mut FakeChannel, id: u64) {
        let status = Status::SUCCESS;
        channel
            .complete(id, &PacketComplete { status }.encode_short())
            .unwrap();
    }

    /// The next packet of the host with sections, on the primary channel, given back.
    fn receive(&mut self) -> Got {
        let packet = self.channel.receive();
        let got = self.open(&packet);
        Self::give_back(&mut self.channel, got.transaction_id);
        got
    }

    /// Sends a control message; the answer to it.
    fn request(&mut self, message: &[u8]) -> Vec<u8> {
        write_pages(&self.guest, &self.send, 0, message);
        let packet = RndisPacket::in_section(ChannelType::CONTROL, 0, message.len() as u32);
        self.channel.send(9, &packet.encode());
        let mut answer = None;
        let mut completed = false;
        while answer.is_none() || !completed {
            let packet = self.channel.receive();
            if packet.packet_type == PacketType::COMPLETION {
                assert_eq!(packet.transaction_id, 9);
                completed = true;
                continue;
            }
            let mut got = self.open(&packet);
            Self::give_back(&mut self.channel, got.transaction_id);
            if got.control {
                answer = got.messages.pop();
            } else {
                self.early.push((0, got));
            }
        }
        answer.unwrap()
    }

    fn set(&mut self, oid: Oid, value: &[u8]) -> RndisStatus {
        let message = RequestBuf::<2048>::set(5, oid, value).unwrap();
        match rndis::HostMessage::parse(&self.request(message.as_bytes())) {
            Ok(rndis::HostMessage::SetComplete(complete)) => complete.status,
            other => panic!("{other:?}"),
        }
    }

    fn query(&mut self, oid: Oid) -> Vec<u8> {
        let message = RequestBuf::<64>::query(6, oid, &[]).unwrap();
        match rndis::HostMessage::parse(&self.request(message.as_bytes())) {
            Ok(rndis::HostMessage::QueryComplete(complete, value)) => {
                assert_eq!(complete.status, RndisStatus::SUCCESS);
                value.to_vec()
            }
            other => panic!("{other:?}"),
        }
    }

    /// Sends messages with frames in a section of the send buffer; the host's status.
    fn send_messages(&mut self, messages: &[u8]) -> Status {
        write_pages(&self.guest, &self.send, 6144, messages);
        let packet = RndisPacket::in_section(ChannelType::DATA, 1, messages.len() as u32);
        self.channel.send(11, &packet.encode());
        status(&self.channel.completion(11))
    }

    /// Sends a frame from the guest's memory; the host's status.
    fn send_direct(&mut self, frame: &[u8], info: &InfoWriter) -> Status {
        let bytes = message(frame, info);
        let offset = 100;
        let pfns = self
            .guest
            .pages((offset as usize + bytes.len()).div_ceil(4096));
        write_pages(&self.guest, &pfns, offset, &bytes);
        let packet = RndisPacket::outside(ChannelType::DATA).encode();
        let place = (offset, bytes.len() as u32);
        self.channel.send_gpa(12, place, &pfns, &packet);
        status(&self.channel.completion(12))
    }

    /// The next frame that comes out of the cable.
    fn out(&self) -> Option<Frame> {
        let mut frame = Frame::default();
        let deadline = Instant::now() + SOON;
        while Instant::now() < deadline {
            for queue in 0..self.peer.queues() {
                if self.peer.receive(queue, &mut frame).unwrap() == Received::Frame {
                    return Some(frame);
                }
            }
            std::thread::sleep(NEVER / 30);
        }
        None
    }

    fn to_guest(&self, queue: u16, frame: &Frame) {
        assert_eq!(self.peer.send(queue, frame).unwrap(), Sent::Done);
    }

    fn status(&self) -> NicStatus {
        self.network.nics().remove(0)
    }

    /// Waits for something to become true of the NIC.
    #[track_caller]
    fn wait(&self, what: impl Fn(&NicStatus) -> bool) {
        let deadline = Instant::now() + SOON;
        while !what(&self.status()) {
            assert!(Instant::now() < deadline, "{:?}", self.status());
            std::thread::sleep(NEVER / 30);
        }
    }
}

fn status(completion: &[u8]) -> Status {
    match HostMessage::parse(completion, Some(Version::V6_1)) {
        Ok(HostMessage::PacketComplete(complete)) => complete.status,
        other => panic!("{other:?}"),
    }
}

fn message(frame: &[u8], info: &InfoWriter) -> Vec<u8> {
    let head = Head::new(frame.len() as u32, info).unwrap();
    [head.as_bytes(), frame].concat()
}

/// The frame in a message, and what is said of it.
fn parse(message: &[u8]) -> (Vec<u8>, Facts) {
    let layout = PacketLayout::parse(message, message.len() as u32).unwrap();
    let facts = Facts::from_host(layout.info.of(message).unwrap()).unwrap();
    (layout.data.of(message).unwrap().to_vec(), facts)
}

fn tcp(destination: [u8; 6], port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(PEER, destination)
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .tcp(port, 80, 1, 1000)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

#[test]
fn a_guest_sets_the_nic_up() {
    let mut rig = Rig::new();
    assert_eq!(rig.agreed.version, Version::V6_1);
    assert_eq!(rig.query(Oid::ETHERNET_PERMANENT_ADDRESS), OWN);
    assert_eq!(
        rig.query(Oid::GEN_MAXIMUM_FRAME_SIZE),
        1500u32.to_le_bytes()
    );
    assert_eq!(rig.query(Oid::GEN_MEDIA_CONNECT_STATUS), [0; 4]);
    let status = rig.status();
    assert_eq!(status.version.as_deref(), Some("6.1"));
    assert_eq!((status.channels, status.link), (1, true));
    assert_eq!(status.sections, RECEIVE_PAGES * 4096 / 1728);
    rig.wait(|status| status.free_sections == status.sections && status.outstanding == 0);
}

#[test]
fn old_versions_work() {
    for version in Version::NEWEST_FIRST {
        let config = GuestConfig {
            max_version: version,
            ..GuestConfig::new(1500)
        };
        let mut rig = Rig::with(1, config);
        assert_eq!(rig.agreed.version, version);
        assert_eq!(rig.query(Oid::ETHERNET_PERMANENT_ADDRESS), OWN);
    }
}

#[test]
fn frames_cross_both_ways() {
    let mut rig = Rig::new();
    let sent = tcp(PEER, 1, b"from the guest");
    assert_eq!(rig.send_direct(&sent, &InfoWriter::new()), Status::SUCCESS);
    let out = rig.out().unwrap();
    assert_eq!(
        (out.bytes, out.checksum, out.gso),
        (sent, Checksum::Unknown, None)
    );
    // Several messages in one section.
    let info = InfoWriter::new();
    let frames = [
        tcp(PEER, 2, b"a"),
        tcp(PEER, 3, b"bb"),
        tcp(PEER, 4, b"ccc"),
    ];
    let messages: Vec<u8> = frames
        .iter()
        .flat_map(|frame| message(frame, &info))
        .collect();
    assert_eq!(rig.send_messages(&messages), Status::SUCCESS);
    for frame in &frames {
        assert_eq!(&rig.out().unwrap().bytes, frame);
    }
    let received = tcp(OWN, 5, b"to the guest");
    rig.to_guest(0, &Frame::plain(received.clone()));
    let got = rig.receive();
    let (frame, facts) = parse(&got.messages[0]);
    assert!(!got.control && frame == received && facts == Facts::default());
    rig.wait(|status| status.free_sections == status.sections && status.outstanding == 0);
    let counters = rig.status().counters;
    assert_eq!(
        (counters.sent, counters.received, counters.invalid),
        (4, 1, 0)
    );
}

/// A network that takes nothing, and counts how often it is tried.
struct Stopped(Link, AtomicUsize);

impl Backend for Stopped {
    fn describe(&self) -> String {
        self.0.describe()
    }

    fn queues(&self) -> u16 {
        self.0.queues()
    }

    fn set_receive_offloads(&self, offloads: ReceiveOffloads) -> std::io::Result<()> {
        self.0.set_receive_offloads(offloads)
    }

    fn send(&self, _: u16, _: &Frame) -> std::io::Result<Sent> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Ok(Sent::Lost)
    }

    fn readiness(&self, queue: u16) -> BorrowedFd<'_> {
        self.0.readiness(queue)
    }

    fn receive(&self, queue: u16, frame: &mut Frame) -> std::io::Result<Received> {
        self.0.receive(queue, frame)
    }
}

#[test]
fn a_network_that_takes_nothing_is_tried_once_a_packet() {
    let (near, far) = link_pair("t", 1).unwrap();
    let network = Arc::new(Stopped(near, AtomicUsize::new(0)));
    let mut rig = Rig::on(network.clone(), far, GuestConfig::new(1500));
    let one = message(&tcp(PEER, 2, b"a"), &InfoWriter::new());
    for packets in 1..3 {
        assert_eq!(rig.send_messages(&one.repeat(5)), Status::SUCCESS);
        assert_eq!(network.1.load(Ordering::Relaxed), packets);
    }
    assert_eq!(rig.status().counters.send_errors, 10);
}

#[test]
fn the_mtu_of_the_nic_is_the_limit() {
    // Whatever the guest says of itself.
    let mut rig = Rig::with(1, GuestConfig::new(9000));
    assert_eq!(
        rig.query(Oid::GEN_MAXIMUM_FRAME_SIZE),
        1500u32.to_le_bytes()
    );
    let headers = tcp(OWN, 1, &[]).len();
    let frame = |mtu: usize| tcp(OWN, 1, &vec![7; mtu + 14 - headers]);
    let info = InfoWriter::new();
    assert_eq!(rig.send_direct(&frame(1500), &info), Status::SUCCESS);
    assert_eq!(rig.out().unwrap().bytes, frame(1500));
    // Room for a VLAN tag is left.
    assert_ne!(rig.send_direct(&frame(1505), &info), Status::SUCCESS);
    assert!(rig.out_nothing());
    rig.to_guest(0, &Frame::plain(frame(1501)));
    rig.wait(|status| status.counters.too_long == 1);
    rig.to_guest(0, &Frame::plain(frame(1500)));
    assert_eq!(parse(&rig.receive().messages[0]).0, frame(1500));
}

#[test]
fn offloads_go_to_the_network() {
    let mut rig = Rig::new();
    let mut info = InfoWriter::new();
    let checksum = SendChecksum {
        ipv6: false,
        transport: Some(PpiTransport::Tcp),
        ip_header: true,
        transport_offset: 34,
    };
    info.put(Info::Checksum(checksum.encode().unwrap()))
        .unwrap();
    let right = tcp(PEER, 1, b"hello");
    let mut open = right.clone();
    open[24..26].fill(0xaa);
    open[50..52].fill(0xaa);
    assert_eq!(rig.send_direct(&open, &info), Status::SUCCESS);
    let mut out = rig.out().unwrap();
    assert_eq!(
        out.checksum,
        Checksum::Partial {
            start: 34,
            offset: 16
        }
    );
    out.complete();
    assert_eq!(out.bytes, right);

    let mut info = InfoWriter::new();
    let lso = LargeSend {
        ipv6: false,
        mss: 1000,
        tcp_offset: 34,
    };
    info.put(Info::LargeSend(lso.encode().unwrap())).unwrap();
    let payload: Vec<u8> = (0..20_000u32).map(|i| (i % 253) as u8).collect();
    let mut large = tcp(PEER, 1, &payload);
    large[16..18].fill(0);
    large[24..26].fill(0);
    assert_eq!(rig.send_direct(&large, &info), Status::SUCCESS);
    let out = rig.out().unwrap();
    assert_eq!(out.gso.map(|gso| gso.segment), Some(1000));
    let mut segments = 0;
    for_each_wire_frame(&out, |_| {
        segments += 1;
        true
    });
    assert_eq!(segments, 20);
    // Without large send it is too long.
    assert_eq!(
        rig.send_direct(&large, &InfoWriter::new()),
        Status::INVALID_RNDIS_PACKET
    );
    let counters = rig.status().counters;
    assert_eq!((counters.sent_large, counters.sent_partial), (1, 1));
    assert_eq!((counters.send_errors, counters.invalid), (1, 1));
}

#[test]
fn checksums_are_reported_when_they_are_known() {
    let mut rig = Rig::new();
    let facts = |rig: &mut Rig, frame: &Frame| {
        rig.to_guest(0, frame);
        let got = rig.receive();
        parse(&got.messages[0])
    };
    let whole = tcp(OWN, 1, b"x");
    let mut valid = Frame::plain(whole.clone());
    valid.checksum = Checksum::Valid;
    let (frame, _) = facts(&mut rig, &valid);
    assert_eq!(frame, whole);
    // Turned on, as guests do.
    let mut parameters = offload::Parameters::unchanged(Version::V6_1);
    parameters.tcp_ipv4_checksum = offload::ChecksumSetting::ENABLED;
    parameters.udp_ipv4_checksum = offload::ChecksumSetting::ENABLED;
    parameters.tcp_ipv6_checksum = offload::ChecksumSetting::ENABLED;
    parameters.udp_ipv6_checksum = offload::ChecksumSetting::ENABLED;
    parameters.ipv4_checksum = offload::ChecksumSetting::ENABLED;
    let value = parameters.as_value().to_vec();
    assert_eq!(
        rig.set(Oid::TCP_OFFLOAD_PARAMETERS, &value),
        RndisStatus::SUCCESS
    );
    let (_, known) = facts(&mut rig, &valid);
    let known = ReceivedChecksum::decode(known.checksum.unwrap());
    assert!(known.transport_is_right() && known.ip_header == Some(true));
    // One that was left open is computed, and then known.
    let mut open = Frame::plain(whole.clone());
    assert!(open.leave_checksum(Transport::Tcp));
    let (frame, known) = facts(&mut rig, &open);
    assert!(frame == whole && known.checksum.is_some());
    let (_, unknown) = facts(&mut rig, &Frame::plain(whole));
    assert_eq!(unknown.checksum, None);
}

#[test]
fn large_frames_are_cut_or_coalesced() {
    let mut rig = Rig::new();
    let payload: Vec<u8> = (0..9_000u32).map(|i| (i % 249) as u8).collect();
    let mut large = Frame::plain(tcp(OWN, 1, &payload));
    assert!(large.leave_segmentation(1400));
    let mut wire = Vec::new();
    for_each_wire_frame(&large, |bytes| {
        wire.push(bytes.to_vec());
        true
    });
    rig.to_guest(0, &large);
    let mut got = Vec::new();
    while got.len() < wire.len() {
        got.extend(
            rig.receive()
                .messages
                .iter()
                .map(|message| parse(message).0),
        );
    }
    assert_eq!(got, wire);
    // A guest that takes coalesced segments gets one frame in parts, in one packet.
    let mut parameters = offload::Parameters::unchanged(Version::V6_1);
    parameters.rsc_ipv4 = offload::Setting::ENABLED;
    parameters.rsc_ipv6 = offload::Setting::ENABLED;
    let value = parameters.as_value().to_vec();
    assert_eq!(
        rig.set(Oid::TCP_OFFLOAD_PARAMETERS, &value),
        RndisStatus::SUCCESS
    );
    rig.to_guest(0, &large);
    let got = rig.receive();
    let parts: Vec<_> = got.messages.iter().map(|message| parse(message)).collect();
    let last = parts.len() - 1;
    for (number, (_, facts)) in parts.iter().enumerate() {
        let id = facts.packet_id.unwrap();
        assert!(id.is_part());
        assert_eq!((id.is_first(), id.is_last()), (number == 0, number == last));
    }
    let whole: Vec<u8> = parts.into_iter().flat_map(|(bytes, _)| bytes).collect();
    assert_eq!(whole, large.bytes);
    rig.wait(|status| status.counters.received_coalesced == 1);
    rig.wait(|status| status.free_sections == status.sections);
}

#[test]
fn vlan_tags_go_beside_the_frame() {
    let mut rig = Rig::new();
    let plain = tcp(PEER, 1, b"tagged");
    let mut info = InfoWriter::new();
    info.put(Info::Vlan(Vlan::new(5, 3, false))).unwrap();
    assert_eq!(rig.send_direct(&plain, &info), Status::SUCCESS);
    let out = rig.out().unwrap().bytes;
    assert_eq!(out[12..16], [0x81, 0x00, 0x60, 0x05]);
    assert_eq!([&out[..12], &out[16..]].concat(), plain);
    let mut tagged = tcp(OWN, 1, b"back");
    let untagged = tagged.clone();
    tagged.splice(12..12, [0x81, 0x00, 0x60, 0x05]);
    rig.to_guest(0, &Frame::plain(tagged));
    let got = rig.receive();
    let (frame, facts) = parse(&got.messages[0]);
    assert_eq!(
        (frame, facts.vlan),
        (untagged, Some(Vlan::new(5, 3, false)))
    );
}

#[test]
fn the_filter_decides() {
    let mut rig = Rig::new();
    let group = [1, 0, 0x5e, 0, 0, 1];
    let other = [2, 0, 0, 0, 0, 7];
    let expect = |rig: &mut Rig, destination: [u8; 6], wanted: bool| {
        let before = rig.status().counters;
        rig.to_guest(0, &Frame::plain(tcp(destination, 1, b"?")));
        if wanted {
            assert_eq!(parse(&rig.receive().messages[0]).0[..6], destination);
        } else {
            rig.wait(|status| status.counters.filtered == before.filtered + 1);
        }
    };
    expect(&mut rig, OWN, true);
    expect(&mut rig, [0xff; 6], true);
    expect(&mut rig, group, false);
    expect(&mut rig, other, false);
    let all = PacketFilter::PROMISCUOUS.bits().to_le_bytes();
    rig.set(Oid::GEN_CURRENT_PACKET_FILTER, &all);
    expect(&mut rig, other, true);
    let groups = (PacketFilter::ALL_MULTICAST | PacketFilter::DIRECTED)
        .bits()
        .to_le_bytes();
    rig.set(Oid::GEN_CURRENT_PACKET_FILTER, &groups);
    expect(&mut rig, group, true);
    expect(&mut rig, [0xff; 6], false);
    // Another address.
    let value = set_mac(hv_proto::net::MacAddress(other));
    assert_eq!(
        rig.set(Oid::GEN_RNDIS_CONFIG_PARAMETER, &value),
        RndisStatus::SUCCESS
    );
    expect(&mut rig, OWN, false);
    expect(&mut rig, other, true);
}

#[test]
fn sections_come_back_once() {
    let mut rig = Rig::new();
    let frame = Frame::plain(tcp(OWN, 1, b"again"));
    // The guest keeps what it gets: frames end when the reserve is reached.
    let sections = rig.status().sections;
    for _ in 0..sections {
        rig.to_guest(0, &frame);
    }
    rig.wait(|status| {
        let counters = status.counters;
        counters.no_buffer >= 1 && counters.received + counters.no_buffer == sections as u64
    });
    let mut kept = Vec::new();
    while let Some(packet) = rig.channel.receive_within(NEVER * 10) {
        kept.push(rig.open(&packet));
    }
    let held: usize = kept.iter().map(|got| got.messages.len()).sum();
    let status = rig.status();
    assert_eq!(status.free_sections, sections - held);
    assert!(status.free_sections >= 4 && status.outstanding == kept.len());
    // Control messages still have room.
    assert_eq!(rig.query(Oid::ETHERNET_CURRENT_ADDRESS), OWN);
    // Given back twice, and with numbers that never were.
    for got in &kept {
        Rig::give_back(&mut rig.channel, got.transaction_id);
        Rig::give_back(&mut rig.channel, got.transaction_id);
    }
    Rig::give_back(&mut rig.channel, u64::MAX);
    let wrong = kept.len() as u64 + 1;
    rig.wait(|status| status.counters.invalid == wrong && status.free_sections == sections);
    rig.to_guest(0, &frame);
    assert_eq!(parse(&rig.receive().messages[0]).0, frame.bytes);
}

#[test]
fn the_link_goes_down_and_up() {
    let mut rig = Rig::new();
    rig.network.set_link("net0", false).unwrap();
    let down = rig.receive();
    assert_eq!(
        rndis::HostMessage::parse(&down.messages[0]),
        Ok(rndis::HostMessage::IndicateStatus(
            RndisStatus::MEDIA_DISCONNECT,
            &[]
        ))
    );
    assert_eq!(rig.query(Oid::GEN_MEDIA_CONNECT_STATUS), 1u32.to_le_bytes());
    let errors = rig.status().counters.send_errors;
    rig.send_direct(&tcp(PEER, 1, b"lost"), &InfoWriter::new());
    assert_eq!(rig.status().counters.send_errors, errors + 1);
    rig.network.set_link("net0", true).unwrap();
    let up = rig.receive();
    assert_eq!(
        rndis::HostMessage::parse(&up.messages[0]),
        Ok(rndis::HostMessage::IndicateStatus(
            RndisStatus::MEDIA_CONNECT,
            &[]
        ))
    );
    // The other end of the cable goes away.
    rig.peer = Arc::new(link_pair("x", 1).unwrap().0);
    let down = rig.receive();
    assert!(matches!(
        rndis::HostMessage::parse(&down.messages[0]),
        Ok(rndis::HostMessage::IndicateStatus(
            RndisStatus::MEDIA_DISCONNECT,
            _
        ))
    ));
    assert!(rig.network.set_link("net7", true).is_err());
}

#[test]
fn sub_channels_share_the_load() {
    let mut rig = Rig::with(4, GuestConfig::new(1500));
    rig.channel
        .send(3, &SubChannelRequest::allocate(3).encode());
    let answer = rig.channel.completion(3);
    assert_eq!(granted_sub_channels(&answer, Version::V6_1, 3), Ok(3));
    let offers: Vec<_> = (1..4).map(|_| rig.guest.expect_offer()).collect();
    for (vp, offer) in (1..4).zip(offers) {
        let sub = rig.guest.open(&offer, RING_PAGES, vp).unwrap();
        rig.subs.push(sub);
    }
    let table = rig.channel.receive();
    match HostMessage::parse(&table.payload, Some(Version::V6_1)) {
        Ok(HostMessage::IndirectionTable(table)) => {
            assert_eq!(table.0[..5], [0, 1, 2, 3, 0]);
        }
        other => panic!("{other:?}"),
    }
    // Every frame on the last channel.
    let mut value = vec![0; rss::MAX_PARAMETERS_SIZE];
    let flags = rss::ParameterFlags::empty();
    let len = rss::encode_parameters(&mut value, flags, &[3; 128], &rss::DEFAULT_KEY).unwrap();
    assert_eq!(
        rig.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &value[..len]),
        RndisStatus::SUCCESS
    );
    let frame = tcp(OWN, 1234, b"x");
    rig.to_guest(2, &Frame::plain(frame.clone()));
    let packet = rig.subs[2].receive();
    let got = rig.open(&packet);
    Rig::give_back(&mut rig.subs[2], got.transaction_id);
    let (bytes, facts) = parse(&got.messages[0]);
    assert_eq!(bytes, frame);
    let input = [10, 0, 0, 1, 10, 0, 0, 2, 0x04, 0xd2, 0, 80];
    assert_eq!(facts.hash, Some(rss::toeplitz(&rss::DEFAULT_KEY, &input)));
    // What comes from a sub-channel goes to its queue of the network.
    let messages = message(&tcp(PEER, 1, b"y"), &InfoWriter::new());
    write_pages(&rig.guest, &rig.send, 6144, &messages);
    let packet = RndisPacket::in_section(ChannelType::DATA, 1, messages.len() as u32);
    rig.subs[0].send(4, &packet.encode());
    assert_eq!(status(&rig.subs[0].completion(4)), Status::SUCCESS);
    let mut out = Frame::default();
    assert_eq!(rig.peer.receive(1, &mut out).unwrap(), Received::Frame);
    // Control messages do not belong there.
    rig.subs[0].send(5, &SubChannelRequest::allocate(1).encode());
    assert_eq!(status(&rig.subs[0].completion(5)), Status::FAILURE);
    let queues = rig.status().queues;
    assert_eq!(
        (queues[3].received, queues[1].sent, queues.len()),
        (1, 1, 4)
    );
}

#[test]
fn nonsense_is_answered_and_survived() {
    let mut rig = Rig::new();
    // A section that is not there, one that is too long, no message at all, and cut ones.
    for packet in [
        RndisPacket::in_section(ChannelType::DATA, 9999, 100),
        RndisPacket::in_section(ChannelType::DATA, 0, 6145),
        RndisPacket::outside(ChannelType::DATA),
    ] {
        rig.channel.send(1, &packet.encode());
        assert_ne!(status(&rig.channel.completion(1)), Status::SUCCESS);
    }
    let good = message(&tcp(PEER, 1, b"x"), &InfoWriter::new());
    for (at, value) in [
        (4, 0xffff_ffffu32),
        (8, 0xffff_fff0),
        (12, 5000),
        (4, 8),
        (0, 77),
    ] {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert_eq!(rig.send_messages(&bad), Status::INVALID_RNDIS_PACKET);
    }
    // Items whose sizes lead nowhere.
    for size in [0u32, 11, 1000] {
        let mut info = InfoWriter::new();
        info.put(Info::Hash(1)).unwrap();
        let mut bad = message(&tcp(PEER, 1, b"x"), &info);
        bad[44..48].copy_from_slice(&size.to_le_bytes());
        assert_eq!(rig.send_messages(&bad), Status::INVALID_RNDIS_PACKET);
    }
    // Memory that is not the guest's.
    let packet = RndisPacket::outside(ChannelType::DATA).encode();
    rig.channel
        .send_gpa(2, (0, 100), &[u64::MAX >> 13], &packet);
    assert_eq!(status(&rig.channel.completion(2)), Status::FAILURE);
    assert!(rig.out_nothing());
    // It works as before.
    let frame = tcp(PEER, 1, b"still here");
    assert_eq!(rig.send_direct(&frame, &InfoWriter::new()), Status::SUCCESS);
    assert_eq!(rig.out().unwrap().bytes, frame);
}

impl Rig {
    fn out_nothing(&self) -> bool {
        self.peer.receive(0, &mut Frame::default()).unwrap() == Received::Nothing
    }
}

#[test]
fn a_hostile_host_does_what_it_is_told() {
    let mut rig = Rig::new();
    let inject = |rig: &Rig, injection| rig.network.inject("net0", &injection).unwrap();
    inject(&rig, Injection::InBand(vec![1, 2, 3]));
    let packet = rig.channel.receive();
    assert_eq!(packet.packet_type, PacketType::IN_BAND);
    assert_eq!(packet.payload[..3], [1, 2, 3]);
    inject(&rig, Injection::Completion(77, vec![4]));
    assert_eq!(rig.channel.completion(77)[..1], [4]);
    inject(&rig, Injection::Ranges(9, vec![(u32::MAX, 5)]));
    let packet = rig.channel.receive();
    assert_eq!(packet.header[..2], [9, 0]);
    assert_eq!(packet.header[8..16], [5, 0, 0, 0, 255, 255, 255, 255]);

    // What the guest says to a message is counted.
    for (status, refused) in [(Status::SUCCESS, 0), (Status::FAILURE, 1)] {
        inject(&rig, Injection::Rndis(b"not a message".to_vec()));
        let packet = rig.channel.receive();
        let got = rig.open(&packet);
        assert_eq!(got.messages, [b"not a message"]);
        let answer = PacketComplete { status }.encode_short();
        rig.channel.complete(got.transaction_id, &answer).unwrap();
        rig.wait(|status| status.outstanding == 0 && status.counters.refused == refused);
    }

    // Each answer and each completion comes twice.
    let twice = |packet: &Injection| vec![packet.clone(), packet.clone()];
    rig.network.tamper("net0", Some(Arc::new(twice))).unwrap();
    let message = RequestBuf::<64>::query(6, Oid::GEN_LINK_SPEED, &[]).unwrap();
    write_pages(&rig.guest, &rig.send, 0, message.as_bytes());
    let packet = RndisPacket::in_section(ChannelType::CONTROL, 0, message.as_bytes().len() as u32);
    rig.channel.send(9, &packet.encode());
    let (mut answers, mut completions) = (Vec::new(), 0);
    for _ in 0..4 {
        let packet = rig.channel.receive();
        if packet.packet_type == PacketType::COMPLETION {
            assert_eq!(packet.transaction_id, 9);
            completions += 1;
        } else {
            let got = rig.open(&packet);
            Rig::give_back(&mut rig.channel, got.transaction_id);
            answers.extend(got.messages);
        }
    }
    assert_eq!((answers.len(), completions), (2, 2));
    assert_eq!(answers[0], answers[1]);
    rig.network.tamper("net0", None).unwrap();
    assert_eq!(
        rig.send_messages(&message_of(b"a frame that is sent once")),
        Status::SUCCESS
    );
    assert!(rig.channel.receive_within(NEVER).is_none());
    assert!(rig.network.tamper("net1", None).is_err());
}

fn message_of(payload: &[u8]) -> Vec<u8> {
    message(&tcp(PEER, 1, payload), &InfoWriter::new())
}

#[test]
fn it_opens_again_after_a_close() {
    let Rig {
        network,
        guest,
        peer,
        channel,
        ..
    } = Rig::new();
    // With frames under way.
    for _ in 0..200 {
        peer.send(0, &Frame::plain(tcp(OWN, 1, b"flood"))).unwrap();
    }
    let offer = channel.offer;
    guest.close(channel);
    assert_eq!(network.nics()[0].outstanding, 0);
    // The buffers are not held any more: their GPADLs can go, and a new set-up works. The old
    // pages stay with the test.
    let (guest, channel, ..) = Rig::connect(guest, offer, GuestConfig::new(9000));
    assert_eq!(network.nics()[0].version.as_deref(), Some("6.1"));
    drop((channel, guest));
    network.remove("net0").unwrap();
    assert!(network.nics().is_empty());
    assert!(network.remove("net0").is_err());
}
