// SPDX-License-Identifier: MIT OR Apache-2.0

//! Hosts that send nonsense to network adapters, and hosts that answer badly. Whatever comes is turned down, counted,
//! and changes nothing: after each piece of it there is traffic.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use host_harness::vsp::netvsp::{Injection, Tamper};
use hv_proto::net::RECEIVE_BUFFER_ID;
use hv_proto::net::frame::Head;
use hv_proto::net::nvsp::{self, Body, MessageType, PacketComplete, SendTable, Status};
use hv_proto::net::ppi::{Info, InfoWriter, PacketId};
use hv_proto::net::rndis;
use viridian_tests::{Drivers, Guest, Namespace, both_drivers, our_drivers};

use crate::images::MIB;
use crate::net::{HERE, nic, open};
use crate::net_data::{bridge, ping, transfer};

both_drivers!(malformed_packets_are_survived);

// The C driver does not end when the size of an item of per-packet information is wrong (`rndis_get_ppi` looks at the
// same item again), gives the stack frames that have no Ethernet header, and takes completions and answers of any
// kind for what it waits for, without a limit (`netvsc_send_completion`, `rndis_filter_receive_response`).
our_drivers!(worse_packets_are_survived, bad_answers_are_survived);

/// Which of the driver's counters a piece of nonsense counts in.
const PACKET: &str = "rx_invalid";
const COMPLETION: &str = "invalid_completion";

/// What the drivers say.
const COMPLAINTS: &[&str] = &["netvsc ", "hv_netvsc ", "suppressed"];

/// A piece of nonsense.
struct Nonsense {
    injection: Injection,
    /// The counter of our driver for it.
    counter: &'static str,
    /// What the C driver says to it; empty when it says nothing.
    c: &'static str,
}

fn nonsense(counter: &'static str, c: &'static str, injection: Injection) -> Nonsense {
    Nonsense {
        injection,
        counter,
        c,
    }
}

/// Words as they are in a message.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// An NVSP message with this body.
fn message(kind: MessageType, body: &[u32]) -> Vec<u8> {
    words(&[&[kind.get()], body].concat())
}

/// An RNDIS message with this body.
fn rndis(kind: rndis::MessageType, body: &[u32]) -> Injection {
    let length = 8 + 4 * body.len() as u32;
    Injection::Rndis(words(&[&[kind.get(), length], body].concat()))
}

/// A frame of a type that nobody listens to, with these items, and one word of the message's head changed.
fn frame(info: &InfoWriter, at: usize, word: u32) -> Result<Injection> {
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    let head = Head::new(frame.len() as u32, info).context("too long")?;
    let mut message = [head.as_bytes(), &frame].concat();
    message[at..at + 4].copy_from_slice(&word.to_le_bytes());
    Ok(Injection::Rndis(message))
}

/// Items with one word in them.
fn hash() -> Result<InfoWriter> {
    let mut info = InfoWriter::new();
    info.put(Info::Hash(1))?;
    Ok(info)
}

/// Where the words of a frame's head are: see `rndis::Header` and `frame::Packet` of `hv_proto`.
const LENGTH: usize = 4;
const DATA_OFFSET: usize = 8;
const DATA_LENGTH: usize = 12;
const INFO_OFFSET: usize = 28;
const INFO_LENGTH: usize = 32;
const ITEM_SIZE: usize = 44;
const ITEM_OFFSET: usize = 52;

/// A number that no request has.
const NOBODY: u32 = 0xdead;

fn in_band() -> Vec<Nonsense> {
    let case = |c, payload| nonsense(PACKET, c, Injection::InBand(payload));
    let table =
        |count, offset| message(MessageType::SEND_INDIRECTION_TABLE, &[count, offset, 0, 0]);
    vec![
        case("inband nvsp_message length too small", Vec::new()),
        case("", message(MessageType::new(9999), &[0; 9])),
        case("", message(MessageType::INIT, &[0; 9])),
        case(
            "nvsp_v5_msg length too small",
            message(MessageType::SEND_INDIRECTION_TABLE, &[16]),
        ),
        case("wrong send-table size", table(17, 40)),
        case("send-table offset too big", table(16, 40)),
        case("send-table offset too big", table(16, u32::MAX)),
        case(
            "nvsp_v4_msg length too small",
            message(MessageType::SEND_VF_ASSOCIATION, &[1]),
        ),
    ]
}

fn completions() -> Vec<Nonsense> {
    let case = |c, id, payload| nonsense(COMPLETION, c, Injection::Completion(id, payload));
    let status = Status::SUCCESS;
    let complete = || PacketComplete { status }.encode().to_vec();
    vec![
        case("Invalid transaction ID 0", 0, complete()),
        case("Invalid transaction ID dead", NOBODY.into(), complete()),
        case("Invalid transaction ID ffff", u64::MAX, complete()),
        case("Invalid transaction ID dead", NOBODY.into(), Vec::new()),
        case(
            "Unknown send completion type",
            NOBODY.into(),
            message(MessageType::new(9999), &[0; 9]),
        ),
        case(
            "nvsp_msg length too small",
            NOBODY.into(),
            message(MessageType::INIT_COMPLETE, &[0]),
        ),
    ]
}

fn ranges() -> Vec<Nonsense> {
    let case = |c, ranges| nonsense(PACKET, c, Injection::Ranges(RECEIVE_BUFFER_ID, ranges));
    let other = Injection::Ranges(RECEIVE_BUFFER_ID ^ 1, vec![(0, 100)]);
    vec![
        nonsense(PACKET, "Invalid xfer page set id", other),
        case("too big", vec![(u32::MAX - 10, 100)]),
        case("too big", vec![(100, u32::MAX)]),
        case("Packet too big", vec![(0, 5000)]),
        case("Invalid rndis_msg", vec![(0, 4)]),
        case("too big", vec![(0, 0), (1 << 30, 1 << 31)]),
    ]
}

fn rndis_messages() -> Result<Vec<Nonsense>> {
    use rndis::MessageType as Type;
    let case = |c, injection| nonsense(PACKET, c, injection);
    let none = InfoWriter::new();
    let mut part = InfoWriter::new();
    part.put(Info::PacketId(PacketId::part(7, false, true)))?;
    Ok(vec![
        case("unhandled rndis message", rndis(Type::new(119), &[0; 4])),
        case("Invalid rndis_msg", frame(&none, LENGTH, 1000)?),
        case("Invalid rndis_msg", frame(&none, LENGTH, 7)?),
        case("invalid rndis pkt", rndis(Type::PACKET, &[0; 3])),
        case(
            "invalid rndis packet offset",
            frame(&none, DATA_OFFSET, 5000)?,
        ),
        case(
            "invalid rndis packet offset",
            frame(&none, DATA_OFFSET, u32::MAX)?,
        ),
        case("message buffer overflow", frame(&none, DATA_LENGTH, 61)?),
        case(
            "message buffer overflow",
            frame(&none, DATA_LENGTH, u32::MAX)?,
        ),
        case(
            "Invalid per_pkt_info_offset",
            frame(&hash()?, INFO_OFFSET, 5000)?,
        ),
        case(
            "Invalid per_pkt_info_len",
            frame(&hash()?, INFO_LENGTH, u32::MAX)?,
        ),
        // The last part of a frame whose first part never came.
        case("", frame(&part, INFO_OFFSET, 36)?),
        case(
            "no rndis request found",
            rndis(Type::QUERY_COMPLETE, &[NOBODY, 0, 4, 16, 0]),
        ),
        case(
            "no rndis request found",
            rndis(Type::SET_COMPLETE, &[NOBODY, 0]),
        ),
        case(
            "no rndis request found",
            rndis(Type::INITIALIZE_COMPLETE, &[NOBODY; 11]),
        ),
        case(
            "unhandled rndis message",
            rndis(Type::KEEPALIVE_COMPLETE, &[NOBODY, 0]),
        ),
        case(
            "unhandled rndis message",
            rndis(Type::RESET_COMPLETE, &[0, 1]),
        ),
        case("rndis msg_len too small", rndis(Type::QUERY_COMPLETE, &[])),
        case("rndis msg_len too small", rndis(Type::SET_COMPLETE, &[])),
        case(
            "invalid rndis_indicate_status",
            rndis(Type::INDICATE_STATUS, &[0]),
        ),
        case(
            "invalid rndis_indicate_status",
            rndis(
                Type::INDICATE_STATUS,
                &[rndis::Status::LINK_SPEED_CHANGE.get(), 4, 5000],
            ),
        ),
    ])
}

/// What only our driver is given.
fn worse() -> Result<Vec<Nonsense>> {
    let case = |injection| nonsense(PACKET, "", injection);
    let none = InfoWriter::new();
    let mut first = InfoWriter::new();
    first.put(Info::PacketId(PacketId::part(7, true, false)))?;
    let mut all: Vec<_> = [0, 1, 11, 17, 1000, u32::MAX]
        .into_iter()
        .map(|size| frame(&hash()?, ITEM_SIZE, size))
        .chain([0, 11, 17, u32::MAX].map(|offset| frame(&hash()?, ITEM_OFFSET, offset)))
        // The value has no room, the items do not end with the last one, and there is no room for so many.
        .chain([16].map(|offset| frame(&hash()?, ITEM_OFFSET, offset)))
        .chain([12, 15, 20, 60].map(|length| frame(&hash()?, INFO_LENGTH, length)))
        .chain([0, 13].map(|length| frame(&none, DATA_LENGTH, length)))
        // The first part of a frame whose last part never comes.
        .chain([frame(&first, INFO_OFFSET, 36)])
        .map(|injection| injection.map(case))
        .collect::<Result<_>>()?;
    all.push(case(Injection::Ranges(RECEIVE_BUFFER_ID, Vec::new())));
    // Answers to requests of NVSP that nobody has made.
    for kind in [
        MessageType::INIT_COMPLETE,
        MessageType::SEND_RECEIVE_BUFFER_COMPLETE,
        MessageType::SEND_SEND_BUFFER_COMPLETE,
        MessageType::SUB_CHANNEL,
    ] {
        let answer = Injection::Completion(NOBODY.into(), message(kind, &[1; 9]));
        all.push(nonsense(COMPLETION, "", answer));
    }
    Ok(all)
}

/// A guest with a network, and its interface.
fn boot(drivers: Drivers, namespace: &Namespace, queues: u16) -> Result<(Guest, String)> {
    namespace.tap("t0", queues)?;
    let builder = Guest::with(drivers)
        .cpus(queues.into())
        .nic(nic(&format!("tap=t0,queues={queues}"))?)
        .tools();
    let guest = namespace.enter(|| builder.boot())?;
    let eth = guest.interface("net0")?;
    open(&guest, &eth, 2)?;
    // What the C driver finds wrong in packets it does not say otherwise.
    guest.tool(&format!("ethtool -s {eth} msglvl rx_err on"))?;
    Ok((guest, eth))
}

/// A counter of our driver.
fn count(guest: &Guest, eth: &str, counter: &str) -> Result<u64> {
    let text = guest.tool(&format!("ethtool -S {eth}"))?;
    let name = format!("{counter}:");
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(&name));
    Ok(line.context("no such counter")?.trim().parse()?)
}

/// How often the guest's log has this.
fn said(guest: &Guest, text: &str) -> Result<u64> {
    // `grep` fails when there is no such line.
    let lines = guest.sh(&format!("dmesg | grep -cF '{text}' || true"))?;
    Ok(lines.parse()?)
}

fn one_ping(guest: &Guest) -> Result<()> {
    guest.sh(&format!("ping -c 1 -W 60 {HERE}"))?;
    Ok(())
}

/// Sends nonsense; sees that it is noticed, and that there is still traffic.
fn send(guest: &Guest, eth: &str, nonsense: &Nonsense) -> Result<()> {
    let Nonsense {
        injection,
        counter,
        c,
    } = nonsense;
    let ours = guest.drivers() == Drivers::Rust;
    let noticed = || match ours {
        true => count(guest, eth, counter),
        false => said(guest, c),
    };
    let before = noticed()?;
    guest.host().network().inject("net0", injection)?;
    one_ping(guest).with_context(|| format!("no traffic after {injection:x?}"))?;
    if ours || !c.is_empty() {
        guest
            .until("it was noticed", || noticed().is_ok_and(|now| now > before))
            .with_context(|| format!("{injection:x?}"))?;
    }
    if ours {
        let now = noticed()?;
        let pieces = match injection {
            Injection::Ranges(RECEIVE_BUFFER_ID, ranges) => ranges.len().max(1) as u64,
            _ => 1,
        };
        ensure!(
            now == before + pieces,
            "{injection:x?} was counted {} times",
            now - before
        );
    }
    Ok(())
}

fn malformed_packets_are_survived(drivers: Drivers) -> Result<()> {
    let namespace = bridge()?;
    let (guest, eth) = boot(drivers, &namespace, 1)?;
    let all = [in_band(), completions(), ranges(), rndis_messages()?];
    for nonsense in all.iter().flatten() {
        send(&guest, &eth, nonsense)?;
    }
    let refused = guest.nic("net0")?.counters.refused;
    ensure!(
        refused > 0,
        "the guest has not said that it refuses anything"
    );
    transfer(&guest, &namespace, HERE, MIB)?;
    reload(&guest)?;
    guest.check_log(COMPLAINTS)?;
    guest.power_off()
}

/// Loads the driver anew, and sees that it works.
fn reload(guest: &Guest) -> Result<()> {
    let module = guest.drivers().network_module();
    guest.sh(&format!("rmmod {module} && modprobe {module}"))?;
    open(guest, &guest.interface("net0")?, 2)?;
    one_ping(guest)
}

fn worse_packets_are_survived(drivers: Drivers) -> Result<()> {
    let namespace = bridge()?;
    let (guest, eth) = boot(drivers, &namespace, 2)?;
    let refused = || guest.nic("net0").map(|nic| nic.counters.refused);
    for nonsense in &worse()? {
        let before = refused()?;
        send(&guest, &eth, nonsense)?;
        if matches!(nonsense.injection, Injection::Rndis(_)) {
            guest.until("the guest refuses it", || {
                refused().is_ok_and(|now| now == before + 1)
            })?;
        }
    }
    // Channels that are not there.
    let table = Injection::InBand(
        SendTable([u32::MAX; nvsp::SEND_TABLE_SIZE])
            .encode()
            .to_vec(),
    );
    guest.host().network().inject("net0", &table)?;
    transfer(&guest, &namespace, HERE, MIB)?;
    reload(&guest)?;
    guest.check_log(COMPLAINTS)?;
    guest.power_off()
}

/// What a host has sent while it was hostile.
#[derive(Default)]
struct Sent {
    completions: AtomicU64,
    answers: AtomicU64,
}

/// Bad packets around each good one: four of each kind.
fn surround(sent: &Sent, packet: &Injection) -> Vec<Injection> {
    let good = packet.clone();
    match packet {
        Injection::Completion(id, payload) => {
            sent.completions.fetch_add(1, Ordering::Relaxed);
            let status = Status::SUCCESS;
            let of_packet = PacketComplete { status }.encode().to_vec();
            let wrong_type = match nvsp::split_type(payload) {
                Ok((MessageType::SEND_RNDIS_PACKET_COMPLETE, _)) => {
                    message(MessageType::INIT_COMPLETE, &[0; 9])
                }
                _ => of_packet,
            };
            vec![
                Injection::Completion(*id, Vec::new()),
                Injection::Completion(*id, wrong_type),
                Injection::Completion(id.wrapping_add(1 << 40), payload.clone()),
                good.clone(),
                good,
            ]
        }
        Injection::Rndis(answer) => {
            sent.answers.fetch_add(1, Ordering::Relaxed);
            let mut wrong_type = answer.clone();
            // Query and set differ in their lowest bit.
            wrong_type[0] ^= 1;
            let mut wrong_request = answer.clone();
            wrong_request[8..12].copy_from_slice(&NOBODY.to_le_bytes());
            vec![
                Injection::Rndis(cut(answer, 10)),
                Injection::Rndis(wrong_type),
                Injection::Rndis(wrong_request),
                good.clone(),
                good,
            ]
        }
        _ => vec![good],
    }
}

/// The start of an RNDIS message, as if it were all of it.
fn cut(message: &[u8], length: usize) -> Vec<u8> {
    let mut start = message[..length.min(message.len())].to_vec();
    start[4..8].copy_from_slice(&(length as u32).to_le_bytes());
    start
}

fn bad_answers_are_survived(drivers: Drivers) -> Result<()> {
    let namespace = bridge()?;
    let (guest, eth) = boot(drivers, &namespace, 2)?;
    let network = guest.host().network();
    let tamper = |with: Arc<Tamper>| network.tamper("net0", Some(with));
    let counts = || -> Result<[u64; 2]> {
        Ok([
            count(&guest, &eth, COMPLETION)?,
            count(&guest, &eth, PACKET)?,
        ])
    };

    // Around good ones: each is counted, and nothing else happens.
    let sent = Arc::new(Sent::default());
    let before = counts()?;
    tamper({
        let sent = Arc::clone(&sent);
        Arc::new(move |packet| surround(&sent, packet))
    })?;
    transfer(&guest, &namespace, HERE, MIB)?;
    guest.tool(&format!("ethtool -K {eth} lro off"))?;
    one_ping(&guest)?;
    let expected = || {
        [
            before[0] + 4 * sent.completions.load(Ordering::Relaxed),
            before[1] + 4 * sent.answers.load(Ordering::Relaxed),
        ]
    };
    guest
        .until("all is counted", || {
            counts().is_ok_and(|now| now == expected())
        })
        .with_context(|| format!("{:?}, not {:?}", counts(), expected()))?;
    ensure!(expected()[0] > before[0] + 100 && expected()[1] > before[1]);
    // The whole set-up, too.
    guest.sh(&format!("ip link set {eth} mtu 1400"))?;
    guest.wait_for(&format!("test $(cat /sys/class/net/{eth}/carrier) = 1"))?;
    ping(&guest, HERE, 1000)?;
    network.tamper("net0", None)?;

    // No good one: the request fails when its time is over.
    guest.sh("echo 1 > /sys/module/netvsc/parameters/host_timeout")?;
    let before = counts()?;
    let sent = Arc::new(AtomicU32::new(0));
    for length in [8, 10, 12] {
        tamper({
            let sent = Arc::clone(&sent);
            Arc::new(move |packet| match packet {
                Injection::Rndis(answer) => {
                    sent.fetch_add(1, Ordering::Relaxed);
                    vec![Injection::Rndis(cut(answer, length))]
                }
                _ => vec![packet.clone()],
            })
        })?;
        guest
            .tool(&format!(
                "! ethtool -K {eth} lro on && ethtool -K {eth} lro off"
            ))
            .with_context(|| format!("{length} bytes were an answer"))?;
        one_ping(&guest)?;
    }
    let sent = sent.load(Ordering::Relaxed);
    ensure!(
        sent >= 3 && counts()? == [before[0], before[1] + u64::from(sent)],
        "{sent} answers, {before:?}, {:?}",
        counts()
    );
    network.tamper("net0", None)?;

    // A set-up that cannot succeed: the old one comes back.
    let left = AtomicU32::new(1);
    tamper(Arc::new(move |packet| match packet {
        Injection::Completion(id, payload)
            if matches!(
                nvsp::split_type(payload),
                Ok((MessageType::SEND_RECEIVE_BUFFER_COMPLETE, _))
            ) && left.swap(0, Ordering::Relaxed) == 1 =>
        {
            vec![Injection::Completion(*id, payload[..8].to_vec())]
        }
        _ => vec![packet.clone()],
    }))?;
    let output = guest.run(&format!("ip link set {eth} mtu 1300"))?;
    ensure!(output.status != 0, "a buffer without sections was taken");
    network.tamper("net0", None)?;
    ensure!(guest.sh(&format!("cat /sys/class/net/{eth}/mtu"))? == "1400");
    guest.wait_for(&format!("test $(cat /sys/class/net/{eth}/carrier) = 1"))?;
    guest.sh("echo 10 > /sys/module/netvsc/parameters/host_timeout")?;
    transfer(&guest, &namespace, HERE, MIB)?;
    reload(&guest)?;
    guest.check_log(COMPLAINTS)?;
    guest.power_off()
}
