// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Guest and host against each other: from an open channel to frames, with each version; and each of
//! them against a peer that does not keep to the protocol.

use crate::ids::GpadlId;
use crate::net::adapter::*;
use crate::net::connect::*;
use crate::net::control::{Event, Failure, Kind, Reply, Requests};
use crate::net::features::Offloads;
use crate::net::nvsp::{self, *};
use crate::net::offload;
use crate::net::oid::{set_mac, MediaState, Oid, PacketFilter};
use crate::net::provider::*;
use crate::net::rndis::{self, Initialize, MessageType as Rndis, RequestBuf};
use crate::net::rss;
use crate::net::sections::{SectionError, Sections};
use crate::net::{MacAddress, Span};
use proptest::prelude::*;
use std::vec::Vec;
use zerocopy::little_endian::U32;
use zerocopy::IntoBytes as _;

const BUFFER: u32 = 2 << 20;

/// Runs the negotiation. Returns what the guest got, and the messages that it sent.
fn connect(
    config: GuestConfig,
    provider: &mut Provider,
) -> (Result<Agreed, ConnectError>, Vec<nvsp::MessageType>) {
    let mut connect = Connect::new(config);
    let mut sent = Vec::new();
    let mut step = Ok(connect.start());
    loop {
        step = match step {
            Ok(Step::Request(message)) => {
                sent.push(split_type(&message).unwrap().0);
                assert_eq!(connect.sent(), Err(ConnectError::OutOfOrder));
                let answer = match provider.on_message(&message).unwrap() {
                    ProviderStep::Answer(answer) => answer,
                    ProviderStep::MapReceiveBuffer(gpadl) => {
                        assert_eq!(gpadl, GpadlId::new(1));
                        provider.receive_buffer_mapped(Some(BUFFER))
                    }
                    ProviderStep::MapSendBuffer(gpadl) => {
                        assert_eq!(gpadl, GpadlId::new(2));
                        provider.send_buffer_mapped(Some(BUFFER))
                    }
                    other => panic!("{other:?}"),
                };
                connect.on_answer(answer.as_bytes())
            }
            Ok(Step::Notify(message)) => {
                sent.push(split_type(&message).unwrap().0);
                let out_of_order = connect.on_answer(&[0; 40]);
                assert_eq!(out_of_order, Err(ConnectError::OutOfOrder));
                provider.on_message(&message).unwrap();
                connect.sent()
            }
            Ok(Step::ShareBuffer { buffer, max_size }) => {
                assert!(max_size >= 15 << 20);
                let gpadl = match buffer {
                    Buffer::Receive => 1,
                    Buffer::Send => 2,
                };
                connect.shared(GpadlId::new(gpadl), BUFFER)
            }
            Ok(Step::Done(agreed)) => return (Ok(agreed), sent),
            Err(error) => return (Err(error), sent),
        };
    }
}

fn provider(max_version: Version) -> Provider {
    Provider::new(ProviderConfig {
        max_version,
        max_sub_channels: 7,
        ..ProviderConfig::default()
    })
}

#[test]
fn every_version_is_agreed_on() {
    for host in Version::NEWEST_FIRST {
        for guest in Version::NEWEST_FIRST {
            let mut provider = provider(host);
            let config = GuestConfig {
                max_version: guest,
                ..GuestConfig::new(1500)
            };
            let (agreed, sent) = connect(config, &mut provider);
            let agreed = agreed.unwrap();
            assert_eq!(agreed.version, host.min(guest));
            assert_eq!(provider.version(), Some(agreed.version));
            assert_eq!(provider.receive_sections(), Some(agreed.receive));
            assert_eq!(provider.send_sections(), Some(agreed.send));
            assert_eq!(agreed.receive.size(), 1728);
            assert_eq!(agreed.send.size(), 6144);
            assert_eq!(provider.ndis_version(), Some(agreed.version.ndis()));
            let capabilities = agreed.version.capabilities() - Capabilities::SRIOV;
            assert_eq!(provider.capabilities(), capabilities);
            let proposals = Version::NEWEST_FIRST
                .iter()
                .filter(|version| (host.min(guest)..=guest).contains(*version));
            let inits = sent.iter().filter(|sent| **sent == nvsp::MessageType::INIT);
            assert_eq!(inits.count(), proposals.count());
            let config = sent.contains(&nvsp::MessageType::SEND_NDIS_CONFIG);
            assert_eq!(config, agreed.version.has_ndis_config());
        }
    }
}

#[test]
fn too_old_hosts_are_refused() {
    let config = GuestConfig {
        min_version: Version::V6_1,
        ..GuestConfig::new(1500)
    };
    let (result, sent) = connect(config, &mut provider(Version::V6));
    assert_eq!(result, Err(ConnectError::NoCommonVersion));
    assert_eq!(sent, [nvsp::MessageType::INIT]);
}

#[test]
fn sections_are_as_large_as_frames() {
    for mtu in [68, 1500, 9000, 65_521] {
        let mut provider = provider(Version::V6_1);
        let (agreed, _) = connect(GuestConfig::new(mtu), &mut provider);
        let receive = agreed.unwrap().receive;
        assert!(receive.size() >= (mtu + 14 + 200).max(1728));
        assert_eq!(receive.size() % 64, 0);
        assert_eq!(provider.frame_size(), mtu + 14);
    }
}

/// A negotiation that waits for the answer to this step: 0 version, 1 receive buffer, 2 send buffer.
fn waiting(step: usize) -> Connect {
    let mut connect = Connect::new(GuestConfig::new(1500));
    connect.start();
    let init = InitComplete {
        negotiated_version: 0.into(),
        max_mdl_chain_length: 0.into(),
        status: Status::SUCCESS,
    };
    if step > 0 {
        connect.on_answer(&init.encode()).unwrap();
        connect.sent().unwrap();
        connect.sent().unwrap();
        connect.shared(GpadlId::new(1), BUFFER).unwrap();
    }
    if step > 1 {
        let sections = Sections::fill(1728, BUFFER).unwrap();
        let answer = ReceiveBufferComplete::with_section(sections.to_receive_part());
        connect.on_answer(&answer).unwrap();
        connect.shared(GpadlId::new(2), BUFFER).unwrap();
    }
    connect
}

fn receive_answer(offset: u32, size: u32, count: u32) -> [u8; MESSAGE_SIZE] {
    ReceiveBufferComplete::with_section(ReceiveBufferSection {
        offset: offset.into(),
        piece_size: size.into(),
        piece_count: count.into(),
        end_offset: 0.into(),
    })
}

fn send_answer(status: Status, size: u32) -> [u8; MESSAGE_SIZE] {
    SendBufferComplete {
        status,
        section_size: size.into(),
    }
    .encode()
}

#[test]
fn hostile_answers_end_the_negotiation() {
    let wrong = PacketComplete {
        status: Status::SUCCESS,
    };
    let unexpected = nvsp::MessageType::SEND_RNDIS_PACKET_COMPLETE;
    for step in 0..3 {
        // Only the first answer can come before a version is agreed.
        let mut connect = waiting(step);
        let error = connect.on_answer(&wrong.encode()).unwrap_err();
        let expected = match step {
            0 => ConnectError::Message(NvspError::NotInVersion(unexpected)),
            _ => ConnectError::Unexpected(unexpected),
        };
        assert_eq!(error, expected);
        assert_eq!(
            connect.on_answer(&wrong.encode()),
            Err(ConnectError::OutOfOrder)
        );
        let told = connect.revoke().map(|message| message.is_some());
        assert_eq!(told, [step > 0, step > 1]);
        for len in 0..12 {
            let mut connect = waiting(step);
            let answer = [[2, 0, 0, 0], [102, 0, 0, 0], [105, 0, 0, 0]][step];
            let answer = [&answer[..], &[1; 8]].concat();
            assert!(matches!(
                connect.on_answer(&answer[..len]),
                Err(ConnectError::Message(_))
            ));
        }
    }
    let buffer = |buffer, error| Err(ConnectError::Buffer(buffer, error));
    let receive = |answer: &[u8]| waiting(1).on_answer(answer);
    assert_eq!(
        receive(&receive_answer(4096, 1728, 10)),
        buffer(Buffer::Receive, SectionError::Offset(4096))
    );
    assert_eq!(
        receive(&receive_answer(0, 67, 10)),
        buffer(
            Buffer::Receive,
            SectionError::Size {
                size: 67,
                count: 10
            }
        )
    );
    assert_eq!(
        receive(&receive_answer(0, u32::MAX, u32::MAX)),
        buffer(
            Buffer::Receive,
            SectionError::TooLarge {
                size: u64::from(u32::MAX) * u64::from(u32::MAX),
                buffer: BUFFER,
            }
        )
    );
    assert_eq!(
        receive(&ReceiveBufferComplete::failed(Status::BUSY)),
        buffer(Buffer::Receive, SectionError::Refused(Status::BUSY))
    );
    let send = |status, size| waiting(2).on_answer(&send_answer(status, size));
    assert_eq!(
        send(Status::FAILURE, 6144),
        buffer(Buffer::Send, SectionError::Refused(Status::FAILURE))
    );
    for size in [0, 67, BUFFER + 1, u32::MAX] {
        assert!(matches!(
            send(Status::SUCCESS, size),
            Err(ConnectError::Buffer(
                Buffer::Send,
                SectionError::Size { .. }
            ))
        ));
    }
    assert!(matches!(send(Status::SUCCESS, BUFFER), Ok(Step::Done(_))));
}

#[test]
fn sub_channels() {
    let mut provider = provider(Version::V6_1);
    connect(GuestConfig::new(1500), &mut provider).0.unwrap();
    let ask = |provider: &mut Provider, count| {
        let message = SubChannelRequest::allocate(count).encode();
        match provider.on_message(&message).unwrap() {
            ProviderStep::OfferSubChannels(offered, answer) => {
                let granted = granted_sub_channels(answer.as_bytes(), Version::V6_1, count);
                assert_eq!(granted, Ok(offered));
                offered
            }
            ProviderStep::Answer(answer) => {
                let granted = granted_sub_channels(answer.as_bytes(), Version::V6_1, count);
                assert_eq!(granted, Err(ConnectError::NoSubChannels(Status::FAILURE)));
                0
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ask(&mut provider, 0), 0);
    assert_eq!(ask(&mut provider, 100), 7);
    assert_eq!(ask(&mut provider, 3), 0);
    assert_eq!(provider.sub_channels(), 7);
    // A host that offers more than was asked for.
    let more = SubChannelComplete {
        status: Status::SUCCESS,
        count: 4.into(),
    };
    assert_eq!(
        granted_sub_channels(&more.encode(), Version::V5, 3),
        Err(ConnectError::SubChannelCount(4))
    );
    assert!(granted_sub_channels(&more.encode()[..11], Version::V5, 3).is_err());
    assert!(granted_sub_channels(&more.encode(), Version::V4, 3).is_err());
}

#[test]
fn guests_out_of_order() {
    let mut provider = provider(Version::V6_1);
    let rndis = RndisPacket::outside(ChannelType::DATA).encode();
    assert!(matches!(
        provider.on_message(&rndis),
        Err(ProviderError::Message(NvspError::NotInVersion(_)))
    ));
    let init = Init::propose(Version::V6_1).encode();
    provider.on_message(&init).unwrap();
    // Not again.
    let ProviderStep::Answer(again) = provider.on_message(&init).unwrap() else {
        panic!()
    };
    assert_eq!(again.as_bytes()[12..16], [7, 0, 0, 0]);
    let order = |message_type| Err(ProviderError::OutOfOrder(message_type));
    assert_eq!(
        provider.on_message(&rndis),
        order(nvsp::MessageType::SEND_RNDIS_PACKET)
    );
    assert_eq!(
        provider.on_message(&RevokeReceiveBuffer::new().encode()),
        order(nvsp::MessageType::REVOKE_RECEIVE_BUFFER)
    );
    assert_eq!(
        provider.on_message(&RevokeSendBuffer::new().encode()),
        order(nvsp::MessageType::REVOKE_SEND_BUFFER)
    );
    let mut wrong = SendReceiveBuffer::new(GpadlId::new(1));
    wrong.id = 1.into();
    assert_eq!(
        provider.on_message(&wrong.encode()),
        Err(ProviderError::Buffer(1))
    );
    // Memory that cannot be mapped, or is too small; then it is.
    let share = SendReceiveBuffer::new(GpadlId::new(1)).encode();
    for len in [None, Some(0), Some(1727)] {
        let step = provider.on_message(&share).unwrap();
        assert_eq!(step, ProviderStep::MapReceiveBuffer(GpadlId::new(1)));
        let failed = provider.receive_buffer_mapped(len);
        assert_eq!(failed.as_bytes()[4..8], [2, 0, 0, 0]);
        assert_eq!(provider.receive_sections(), None);
    }
    provider.on_message(&share).unwrap();
    let answer = provider.receive_buffer_mapped(Some(BUFFER));
    assert_eq!(answer.as_bytes()[4..8], [1, 0, 0, 0]);
    // Twice.
    let ProviderStep::Answer(twice) = provider.on_message(&share).unwrap() else {
        panic!()
    };
    assert_eq!(twice.as_bytes()[4..8], [2, 0, 0, 0]);
    assert!(provider.receive_sections().is_some());
    let config = NdisConfig::new(9014, Capabilities::empty()).encode();
    assert_eq!(
        provider.on_message(&config),
        order(nvsp::MessageType::SEND_NDIS_CONFIG)
    );
    // RNDIS messages: outside is possible now, a section is not.
    let outside = RndisPlace {
        channel_type: ChannelType::DATA,
        section: None,
    };
    assert_eq!(
        provider.on_message(&rndis),
        Ok(ProviderStep::Rndis(outside))
    );
    let inside = |index, size| RndisPacket::in_section(ChannelType::DATA, index, size).encode();
    assert!(provider.on_message(&inside(0, 100)).is_err());
    let share = SendSendBuffer::new(GpadlId::new(2)).encode();
    provider.on_message(&share).unwrap();
    provider.send_buffer_mapped(Some(6144 * 2));
    let place = RndisPlace {
        channel_type: ChannelType::DATA,
        section: Some(Span {
            offset: 6144,
            len: 100,
        }),
    };
    assert_eq!(
        provider.on_message(&inside(1, 100)),
        Ok(ProviderStep::Rndis(place))
    );
    for (index, size) in [(2, 100), (0, 6145), (u32::MAX - 1, 1), (0, u32::MAX)] {
        assert!(matches!(
            provider.on_message(&inside(index, size)),
            Err(ProviderError::Section(_))
        ));
    }
    assert_eq!(
        provider.on_message(&RevokeSendBuffer::new().encode()),
        Ok(ProviderStep::UnmapSendBuffer)
    );
    assert!(provider.on_message(&inside(0, 100)).is_err());
    let switch = SwitchDataPath {
        active: DataPath::VF,
    };
    assert!(matches!(
        provider.on_message(&switch.encode()),
        Ok(ProviderStep::SwitchDataPath(DataPath::VF, answer)) if answer.as_bytes().is_empty()
    ));
    assert!(matches!(
        provider.on_message(&[9, 0, 0, 0]),
        Err(ProviderError::Unknown(_))
    ));
}

const MAC: MacAddress = MacAddress([0x00, 0x15, 0x5d, 1, 2, 3]);
const NAME: [u8; 8] = [b'e', 0, b't', 0, b'h', 0, b'0', 0];

fn adapter() -> Adapter<'static> {
    Adapter::new(AdapterConfig {
        mac: MAC,
        mtu: 1500,
        link_speed: 10_000_000_000,
        link_up: true,
        name: &NAME,
        offloads: Offloads::ALL,
        queue_count: 8,
        table_size: 128,
        max_packets: 8,
        alignment_factor: 3,
    })
}

/// Both sides of the control path.
struct Link {
    adapter: Adapter<'static>,
    requests: Requests<2>,
    change: Change,
}

impl Link {
    fn new() -> Self {
        Self {
            adapter: adapter(),
            requests: Requests::new(),
            change: Change::None,
        }
    }

    /// Sends a request; the value of the answer, or why there is none.
    fn ask(&mut self, kind: Kind, value: &[u8]) -> Result<Vec<u8>, Failure> {
        let id = self.requests.begin(kind).unwrap();
        let message: RequestBuf<2048> = match kind {
            Kind::Initialize => {
                let body = Initialize {
                    request_id: id.into(),
                    major_version: 1.into(),
                    minor_version: 0.into(),
                    max_transfer_size: 0x4000.into(),
                };
                RequestBuf::new(Rndis::INITIALIZE, &body, value)
            }
            Kind::Query(oid) => RequestBuf::query(id, oid, value),
            Kind::Set(oid) => RequestBuf::set(id, oid, value),
            Kind::Reset => RequestBuf::new(Rndis::RESET, &U32::ZERO, value),
            Kind::Keepalive => RequestBuf::new(Rndis::KEEPALIVE, &U32::new(id), value),
        }
        .unwrap();
        let mut out = [0xee; MAX_ANSWER_SIZE];
        let statistics = Statistics {
            sent: 77,
            ..Statistics::default()
        };
        let reaction = self
            .adapter
            .on_message(message.as_bytes(), &statistics, &mut out);
        let reaction = reaction.unwrap();
        self.change = reaction.change;
        match self.requests.receive(&out[..reaction.answer]) {
            Ok(Event::Answer(answer)) => {
                assert_eq!((answer.request_id, answer.kind), (id, kind));
                answer.result.map(|reply| match reply {
                    Reply::Initialized(limits) => {
                        assert_eq!((limits.max_packets, limits.alignment), (8, 8));
                        Vec::new()
                    }
                    Reply::Value(value) => value.to_vec(),
                    Reply::Done => Vec::new(),
                })
            }
            other => panic!("{other:?}"),
        }
    }

    fn query(&mut self, oid: Oid) -> Vec<u8> {
        self.ask(Kind::Query(oid), &[]).unwrap()
    }

    fn set(&mut self, oid: Oid, value: &[u8]) -> Result<Vec<u8>, Failure> {
        self.ask(Kind::Set(oid), value)
    }
}

fn failed(status: rndis::Status) -> Result<Vec<u8>, Failure> {
    Err(Failure::Status(status))
}

#[test]
fn control_path_from_start_to_end() {
    let mut link = Link::new();
    assert_eq!(
        link.ask(Kind::Query(Oid::GEN_LINK_SPEED), &[]),
        failed(rndis::Status::ADAPTER_NOT_READY)
    );
    assert_eq!(link.ask(Kind::Initialize, &[]), Ok(Vec::new()));
    assert_eq!(link.change, Change::Initialized(0x4000));
    assert_eq!(link.query(Oid::ETHERNET_PERMANENT_ADDRESS), MAC.0);
    assert_eq!(
        link.query(Oid::GEN_MAXIMUM_FRAME_SIZE),
        1500u32.to_le_bytes()
    );
    assert_eq!(
        link.query(Oid::GEN_MAXIMUM_TOTAL_SIZE),
        1514u32.to_le_bytes()
    );
    assert_eq!(
        link.query(Oid::GEN_MEDIA_CONNECT_STATUS),
        MediaState::CONNECTED.as_bytes()
    );
    assert_eq!(
        link.query(Oid::GEN_LINK_SPEED),
        100_000_000u32.to_le_bytes()
    );
    assert_eq!(link.query(Oid::GEN_FRIENDLY_NAME), NAME);
    assert_eq!(link.query(Oid::GEN_XMIT_OK), 77u32.to_le_bytes());
    assert_eq!(
        link.ask(Kind::Query(Oid::new(0x1234)), &[]),
        failed(rndis::Status::NOT_SUPPORTED)
    );
    // What is listed can be queried or set.
    let list = link.query(Oid::GEN_SUPPORTED_LIST);
    for oid in list.chunks(4) {
        let oid = Oid::new(u32::from_le_bytes(oid.try_into().unwrap()));
        let query = link.ask(Kind::Query(oid), &[]);
        let only_set = [Oid::GEN_RNDIS_CONFIG_PARAMETER, Oid::TCP_OFFLOAD_PARAMETERS];
        assert_eq!(query.is_ok(), !only_set.contains(&oid), "{oid:?}");
    }

    // The filter decides which frames come.
    assert!(!link.adapter.accepts(MacAddress::BROADCAST));
    let filter = PacketFilter::DIRECTED | PacketFilter::BROADCAST | PacketFilter::MULTICAST;
    let bits = filter.bits().to_le_bytes();
    assert_eq!(
        link.set(Oid::GEN_CURRENT_PACKET_FILTER, &bits),
        Ok(Vec::new())
    );
    assert_eq!(link.change, Change::Filter);
    assert_eq!(link.query(Oid::GEN_CURRENT_PACKET_FILTER), bits);
    let group = [1, 0, 0x5e, 0, 0, 1];
    assert!(link.adapter.accepts(MAC) && link.adapter.accepts(MacAddress::BROADCAST));
    assert!(!link.adapter.accepts(MacAddress(group)));
    let groups = [group, [1; 6]].concat();
    assert_eq!(
        link.set(Oid::ETHERNET_MULTICAST_LIST, &groups),
        Ok(Vec::new())
    );
    assert!(link.adapter.accepts(MacAddress(group)));
    assert_eq!(link.query(Oid::ETHERNET_MULTICAST_LIST), groups);
    for bad in [&groups[..11], &[1; 6 * 33]] {
        assert_eq!(
            link.set(Oid::ETHERNET_MULTICAST_LIST, bad),
            failed(rndis::Status::INVALID_LENGTH)
        );
    }
    assert_eq!(
        link.set(Oid::GEN_CURRENT_PACKET_FILTER, &bits[..3]),
        failed(rndis::Status::INVALID_LENGTH)
    );

    // Another address.
    let mac = MacAddress([2, 0, 0, 0, 0, 9]);
    let oid = Oid::GEN_RNDIS_CONFIG_PARAMETER;
    assert_eq!(link.set(oid, &set_mac(mac)), Ok(Vec::new()));
    assert_eq!((link.change, link.adapter.mac()), (Change::Mac, mac));
    assert!(link.adapter.accepts(mac) && !link.adapter.accepts(MAC));
    assert_eq!(link.query(Oid::ETHERNET_CURRENT_ADDRESS), mac.0);
    assert_eq!(link.query(Oid::ETHERNET_PERMANENT_ADDRESS), MAC.0);
    let bad = set_mac(MacAddress([1; 6]));
    assert_eq!(link.set(oid, &bad), failed(rndis::Status::INVALID_DATA));

    assert_eq!(link.ask(Kind::Keepalive, &[]), Ok(Vec::new()));
    assert_eq!(link.ask(Kind::Reset, &[]), Ok(Vec::new()));
    assert_eq!(link.change, Change::Reset);
    let halt = RequestBuf::<12>::new(Rndis::HALT, &U32::new(99), &[]).unwrap();
    let mut out = [0; MAX_ANSWER_SIZE];
    let reaction = link
        .adapter
        .on_message(halt.as_bytes(), &Statistics::default(), &mut out);
    let halted = Reaction {
        answer: 0,
        change: Change::Halted,
    };
    assert_eq!(reaction, Ok(halted));
    assert!(!link.adapter.is_initialized() && !link.adapter.accepts(MAC));
    assert_eq!(link.adapter.set_link(false, &mut out), 0);
}

#[test]
fn offloads_are_agreed_on() {
    for version in Version::NEWEST_FIRST {
        let mut link = Link::new();
        link.ask(Kind::Initialize, &[]).unwrap();
        let asked = offload::Capabilities::empty(version);
        let oid = Oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES;
        let told = link.ask(Kind::Query(oid), asked.as_value()).unwrap();
        let told = offload::Capabilities::parse(&told).unwrap();
        let chosen = Offloads::choose(&told, version);
        assert!(chosen.tcp_ipv4_send && chosen.lso_ipv6 == 0xffff);
        let set = chosen.to_parameters(&chosen, version);
        let oid = Oid::TCP_OFFLOAD_PARAMETERS;
        assert_eq!(link.set(oid, set.as_value()), Ok(Vec::new()));
        assert_eq!(link.change, Change::Offloads);
        assert_eq!(*link.adapter.offloads(), chosen);
        let set = set.as_value();
        for len in 0..set.len() {
            assert_eq!(
                link.set(oid, &set[..len]),
                failed(rndis::Status::INVALID_DATA)
            );
        }
    }
}

#[test]
fn frames_are_spread_over_channels() {
    let mut link = Link::new();
    link.ask(Kind::Initialize, &[]).unwrap();
    let asked = rss::Capabilities::query();
    let oid = Oid::GEN_RECEIVE_SCALE_CAPABILITIES;
    let told = link.ask(Kind::Query(oid), asked.as_bytes()).unwrap();
    let told = rss::Capabilities::parse(&told).unwrap();
    assert_eq!((told.queue_count.get(), told.table_entries()), (8, 128));
    let mut frame = [0; 60];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    assert_eq!(link.adapter.channel(&frame, 8), (0, None));

    let table: Vec<u16> = (0..128).map(|n| n % 8).collect();
    let mut value = [0; rss::MAX_PARAMETERS_SIZE];
    let mut set = |link: &mut Link, flags, table: &[u16]| {
        let len = rss::encode_parameters(&mut value, flags, table, &rss::DEFAULT_KEY).unwrap();
        link.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &value[..len])
    };
    let on = rss::ParameterFlags::empty();
    assert_eq!(
        set(&mut link, rss::ParameterFlags::DISABLE, &table),
        Ok(Vec::new())
    );
    assert_eq!(set(&mut link, on, &table), Ok(Vec::new()));
    assert_eq!(link.change, Change::Scaling);
    let mut seen = std::collections::HashSet::new();
    for n in 0..100 {
        frame[29] = n;
        let (channel, hash) = link.adapter.channel(&frame, 8);
        assert_eq!(channel, hash.unwrap() % 128 % 8);
        seen.insert(channel);
        let (fewer, _) = link.adapter.channel(&frame, 3);
        assert!(fewer < 3);
    }
    assert_eq!(seen.len(), 8);
    // A channel that is not there changes nothing.
    assert_eq!(
        set(&mut link, on, &[0, 8]),
        failed(rndis::Status::INVALID_DATA)
    );
    assert_ne!(link.adapter.channel(&frame, 8).1, None);
    // The table alone, with the old key.
    let table_only = rss::ParameterFlags::KEY_UNCHANGED | rss::ParameterFlags::HASH_INFO_UNCHANGED;
    assert_eq!(set(&mut link, table_only, &[5]), Ok(Vec::new()));
    assert_eq!(link.adapter.channel(&frame, 8).0, 5);
    set(&mut link, rss::ParameterFlags::DISABLE, &table).unwrap();
    assert_eq!(link.adapter.channel(&frame, 8), (0, None));
}

#[test]
fn link_changes_are_told() {
    let mut link = Link::new();
    let mut out = [0; 64];
    assert_eq!(link.adapter.set_link(false, &mut out), 0);
    link.ask(Kind::Initialize, &[]).unwrap();
    assert_eq!(
        link.query(Oid::GEN_MEDIA_CONNECT_STATUS),
        MediaState::DISCONNECTED.as_bytes()
    );
    let len = link.adapter.set_link(true, &mut out);
    assert!(matches!(
        link.requests.receive(&out[..len]),
        Ok(Event::LinkUp)
    ));
    assert_eq!(link.adapter.set_link(true, &mut out), 0);
    let len = link.adapter.set_link(false, &mut out);
    assert!(matches!(
        link.requests.receive(&out[..len]),
        Ok(Event::LinkDown)
    ));
    let len = link.adapter.set_link_speed(25_000_000_000, &mut out);
    assert!(matches!(
        link.requests.receive(&out[..len]),
        Ok(Event::LinkSpeed(25_000_000_000))
    ));
    let len = link
        .adapter
        .indicate(rndis::Status::NETWORK_CHANGE, &[], &mut out);
    assert!(matches!(
        link.requests.receive(&out[..len]),
        Ok(Event::NetworkChange)
    ));
    assert_eq!(
        link.adapter
            .indicate(rndis::Status::NETWORK_CHANGE, &[0; 45], &mut out),
        0
    );
}

proptest! {
    /// A guest that sends anything gets an answer or none, and the host goes on.
    #[test]
    fn any_messages_of_a_guest(
        messages in prop::collection::vec(
            (prop_oneof![0u32..3, 99u32..140], prop::collection::vec(0u32..20, 0..12)), 0..30),
        mapped in prop::option::of(0u32..100_000),
    ) {
        let mut provider = provider(Version::V6_1);
        for (message_type, words) in messages {
            let words = [message_type].into_iter().chain(words);
            let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
            match provider.on_message(&bytes) {
                Ok(ProviderStep::MapReceiveBuffer(_)) => {
                    provider.receive_buffer_mapped(mapped);
                }
                Ok(ProviderStep::MapSendBuffer(_)) => {
                    provider.send_buffer_mapped(mapped);
                }
                Ok(ProviderStep::Rndis(place)) => {
                    let sections = provider.send_sections();
                    prop_assert!(place.section.is_none_or(|span|
                        span.end() <= sections.unwrap().total()));
                }
                _ => {}
            }
        }
        let agreed = mapped.unwrap_or(0);
        prop_assert!(provider.receive_sections().is_none_or(|all| all.total() <= agreed));
    }

    #[test]
    fn any_control_messages_of_a_guest(
        messages in prop::collection::vec(
            (1u32..10, prop_oneof![Just(0x1_0204u32), Just(0xfc01_020c), Just(0x1_021b), 0x1_0101u32..0x1_0120],
                prop::collection::vec(prop_oneof![0u8..50, any::<u8>()], 0..120)), 0..20),
    ) {
        let mut adapter = adapter();
        let mut out = [0; MAX_ANSWER_SIZE];
        let initialize: Vec<u8> = [2u32, 24, 1, 1, 0, 0x4000]
            .into_iter().flat_map(u32::to_le_bytes).collect();
        adapter.on_message(&initialize, &Statistics::default(), &mut out).unwrap();
        for (message_type, oid, rest) in messages {
            let len = rest.len() as u32;
            let words = [message_type, 28 + len, 5, oid, len, 20, 0];
            let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
            bytes.extend(rest);
            if let Ok(reaction) = adapter.on_message(&bytes, &Statistics::default(), &mut out) {
                prop_assert!(reaction.answer <= out.len());
                if reaction.answer != 0 {
                    prop_assert!(rndis::HostMessage::parse(&out[..reaction.answer]).is_ok());
                }
            }
            let (channel, _) = adapter.channel(&bytes, 4);
            prop_assert!(channel < 4);
        }
    }

    /// A guest that gets anything as an answer fails, or has sections inside of its buffers.
    #[test]
    fn any_answers_of_a_host(
        step in 0usize..3,
        words in prop::collection::vec(prop_oneof![0u32..3, Just(1728u32), any::<u32>()], 0..12),
    ) {
        let mut connect = waiting(step);
        let first = [2u32, 102, 105][step];
        let bytes: Vec<u8> = [first].into_iter().chain(words).flat_map(u32::to_le_bytes).collect();
        if let Ok(Step::Done(agreed)) = connect.on_answer(&bytes) {
            prop_assert!(agreed.send.total() <= BUFFER);
        }
        if let Ok(Step::ShareBuffer { .. }) = connect.sent() {
            prop_assert!(false, "nothing was to be sent");
        }
    }
}
