// SPDX-License-Identifier: MIT OR Apache-2.0

//! What crosses network adapters: pings, connections whose data are hashed on both sides, iperf3, large frames, VLANs,
//! several queues, and the capture of it all against the guest's own counters. Nothing here says how quick it must be.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use viridian_tests::guest::COMMAND;
use viridian_tests::namespace::BRIDGE;
use viridian_tests::stream::{Listener, noise, sha256};
use viridian_tests::{Drivers, Guest, Namespace, both_drivers};

use crate::images::{Images, MIB};
use crate::net::{HERE, nic, open};

both_drivers!(a_tap_with_four_queues, passt_gives_a_network);

/// Our address on the bridge.
const HERE6: &str = "fd77::1";

/// The VLAN, and our address in it.
const VLAN: u16 = 5;
const HERE_IN_VLAN: &str = "10.78.0.1";

const QUEUES: u16 = 4;

/// A namespace whose bridge lets large frames through, with our addresses on it.
pub fn bridge() -> Result<Namespace> {
    let namespace = Namespace::new(9000)?;
    namespace.sh(&format!(
        "set -e; ip address add {HERE}/24 dev {BRIDGE}; ip address add {HERE6}/64 dev {BRIDGE} nodad
         ip link add link {BRIDGE} name vlan type vlan id {VLAN}; ip address add {HERE_IN_VLAN}/24 dev vlan
         ip link set vlan up"
    ))?;
    Ok(namespace)
}

/// Pings an address three times with so many bytes.
pub fn ping(guest: &Guest, address: &str, size: u32) -> Result<()> {
    let output = guest.sh(&format!("ping -c 3 -W 60 -s {size} {address}"))?;
    ensure!(output.contains(" 3 packets received"), "{output}");
    Ok(())
}

/// Sends random data of the guest to us, and the other way round, and compares what has come.
pub fn transfer(guest: &Guest, namespace: &Namespace, address: &str, size: u64) -> Result<()> {
    let listen = || namespace.enter(|| Listener::new(address));
    let listener = listen()?;
    let port = listener.port()?;
    let received = listener.receive();
    let sum = guest.sh(&format!(
        "head -c {size} /dev/urandom > /tmp/data && nc {address} {port} < /tmp/data && sha256sum < /tmp/data"
    ))?;
    let bytes = received.join()?;
    ensure!(
        bytes.len() as u64 == size && sum.starts_with(&sha256(&bytes)),
        "{} of {size} bytes came from the guest",
        bytes.len()
    );

    let bytes = noise(usize::try_from(size)?, u64::from(port));
    let expected = sha256(&bytes);
    let listener = listen()?;
    let port = listener.port()?;
    let sent = listener.send(bytes);
    let sum = guest.sh(&format!(
        "nc {address} {port} < /dev/null > /tmp/data && sha256sum < /tmp/data; stat -c %s /tmp/data"
    ))?;
    sent.join()?;
    ensure!(
        sum.starts_with(&expected),
        "something else came to the guest: {sum}"
    );
    Ok(())
}

/// Runs iperf3 in the guest; what it says in the end. (Without its reports it does not notice that all is sent.)
fn iperf3(guest: &Guest, options: &str) -> Result<Value> {
    let output = guest.tool(&format!("iperf3 -c {HERE} --json {options}"))?;
    let result: Value = serde_json::from_str(&output)?;
    Ok(result["end"].clone())
}

/// TCP and UDP, from the guest and to it.
fn measure(guest: &Guest, namespace: &Namespace, directory: &Images) -> Result<()> {
    let log = directory.path("iperf3.log");
    let _server = namespace.spawn(&format!("exec iperf3 -s > {} 2>&1", log.display()))?;
    guest.until("iperf3 listens", || {
        let listening = namespace.sh("ss -Hltn sport = :5201");
        listening.is_ok_and(|sockets| !sockets.is_empty())
    })?;
    let run = |options: &str| {
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        iperf3(guest, options).with_context(|| format!("the server: {}", said()))
    };
    for way in ["", "--reverse"] {
        let end = run(&format!("-n 1M {way}"))?;
        let received = end["sum_received"]["bytes"].as_u64();
        // It ends when all is sent, though the last of it may not be counted yet.
        ensure!(received > Some(MIB / 2), "TCP {way}: {end}");
        let end = run(&format!("-u -b 1M -n 200K -l 1400 {way}"))?;
        let count = |name: &str| end["sum"][name].as_u64();
        // That some are lost is the way of UDP; more would be a fault.
        let (sent, lost) = (count("packets"), count("lost_packets"));
        let (sent, lost) = sent.zip(lost).with_context(|| format!("UDP: {end}"))?;
        ensure!(sent > 100 && lost * 4 < sent, "UDP {way}: {end}");
    }
    Ok(())
}

/// Many connections at the same time.
fn connect_often(guest: &Guest, namespace: &Namespace) -> Result<()> {
    const CONNECTIONS: usize = 64;
    let listener = namespace.enter(|| Listener::new(HERE))?;
    let port = listener.port()?;
    let answers = listener.answer(CONNECTIONS);
    let output = guest.sh(&format!(
        "for n in $(seq {CONNECTIONS}); do echo line $n | nc {HERE} {port} > /tmp/answer.$n & done; wait
         for n in $(seq {CONNECTIONS}); do cat /tmp/answer.$n; done"
    ))?;
    answers.join()?;
    let expected: Vec<_> = (1..=CONNECTIONS)
        .map(|n| format!("answer to line {n}"))
        .collect();
    ensure!(
        output.lines().eq(&expected),
        "{} answers: {output}",
        output.lines().count()
    );
    Ok(())
}

/// Checks that both sides have used every queue both ways.
fn check_queues(guest: &Guest, eth: &str) -> Result<()> {
    let text = guest.tool(&format!("ethtool -S {eth}"))?;
    for queue in 0..QUEUES {
        for direction in ["tx", "rx"] {
            let name = format!("{direction}_queue_{queue}_packets:");
            let line = text
                .lines()
                .find_map(|line| line.trim().strip_prefix(&name));
            let count: u64 = line.context("no statistics of a queue")?.trim().parse()?;
            ensure!(count > 0, "{name} {text}");
        }
    }
    let queues = guest.nic("net0")?.queues;
    ensure!(
        queues.len() == usize::from(QUEUES)
            && queues
                .iter()
                .all(|queue| queue.sent > 0 && queue.received > 0),
        "{queues:?}"
    );
    Ok(())
}

/// Frames of one direction.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Total {
    frames: u64,
    bytes: u64,
}

/// What crossed a NIC.
#[derive(Debug, Default, PartialEq, Eq)]
struct Totals {
    /// To the guest.
    received: Total,
    /// From the guest.
    sent: Total,
}

/// What the guest has counted; it does not count VLAN tags.
fn counted(guest: &Guest, eth: &str) -> Result<Totals> {
    let of = |direction: &str| -> Result<Total> {
        let text = guest.sh(&format!(
            "cd /sys/class/net/{eth}/statistics; cat {direction}_packets {direction}_bytes"
        ))?;
        let (frames, bytes) = text.split_once('\n').context("no statistics")?;
        Ok(Total {
            frames: frames.parse()?,
            bytes: bytes.parse()?,
        })
    };
    Ok(Totals {
        received: of("rx")?,
        sent: of("tx")?,
    })
}

/// What tshark reads in a capture, without VLAN tags.
fn captured(pcap: &Path) -> Result<(Totals, u64)> {
    let mut command = Command::new("tshark");
    command.args(["-n", "-T", "fields", "-r"]).arg(pcap);
    for field in ["frame.packet_flags_direction", "frame.len", "vlan.id"] {
        command.args(["-e", field]);
    }
    let output = command.output().context("cannot start tshark")?;
    ensure!(output.status.success(), "tshark: {output:?}");
    let mut totals = Totals::default();
    let mut tagged = 0;
    for line in String::from_utf8(output.stdout)?.lines() {
        let mut fields = line.split('\t');
        let mut next = || fields.next().context("tshark has left a field out");
        let total = match next()? {
            "0x00000001" => &mut totals.received,
            "0x00000002" => &mut totals.sent,
            other => anyhow::bail!("direction {other}"),
        };
        total.frames += 1;
        total.bytes += next()?.parse::<u64>()?;
        let vlan = next()?;
        if !vlan.is_empty() {
            ensure!(vlan == VLAN.to_string(), "VLAN {vlan}");
            total.bytes -= 4;
            tagged += 1;
        }
    }
    Ok((totals, tagged))
}

fn a_tap_with_four_queues(drivers: Drivers) -> Result<()> {
    let directory = Images::new()?;
    let pcap = directory.path("tap.pcapng");
    let namespace = bridge()?;
    namespace.tap("t0", QUEUES)?;
    let options = nic(&format!(
        "tap=t0,mtu=9000,queues={QUEUES},pcap={}",
        pcap.display()
    ))?;
    let builder = Guest::with(drivers)
        .cpus(QUEUES.into())
        // The processors are one where they are emulated, and that may be kept waiting for long.
        .word("rcupdate.rcu_cpu_stall_timeout=300")
        .nic(options)
        .tools();
    let guest = namespace.enter(|| builder.boot())?;
    let eth = guest.interface("net0")?;
    let opened = || guest.nic("net0").map(|nic| nic.channels);
    guest.until("all channels are open", || {
        opened().is_ok_and(|channels| channels == usize::from(QUEUES))
    })?;
    guest.sh(&format!(
        "echo 1 > /proc/sys/net/ipv6/conf/{eth}/keep_addr_on_down"
    ))?;
    open(&guest, &eth, 2)?;
    for (address, size) in [(HERE, 8 * MIB), (HERE6, 2 * MIB)] {
        ping(&guest, address, 56)?;
        ping(&guest, address, 1400)?;
        transfer(&guest, &namespace, address, size)?;
    }
    let counters = guest.nic("net0")?.counters;
    ensure!(
        counters.sent_large > 0 && counters.received_coalesced > 0,
        "{counters:?}"
    );
    // From now on the kernel has frames that come in not coalesced by the host.
    guest.sh(&format!(
        "set -e; modprobe 8021q; ip link add link {eth} name vlan type vlan id {VLAN}; ip address add 10.78.0.2/24 dev vlan
         ip link set vlan up"
    ))?;
    ping(&guest, HERE_IN_VLAN, 1400)?;
    transfer(&guest, &namespace, HERE_IN_VLAN, MIB)?;
    measure(&guest, &namespace, &directory)?;
    connect_often(&guest, &namespace)?;
    check_queues(&guest, &eth)?;

    guest.sh(&format!("ip link set {eth} down"))?;
    let (seen, tagged) = captured(&pcap)?;
    let counted = counted(&guest, &eth)?;
    ensure!(
        seen == counted && tagged > 0,
        "captured {seen:?}, {tagged} of them tagged; the guest has counted {counted:?}; {:?}",
        guest.nic("net0")?
    );

    guest.sh(&format!(
        "ip link set {eth} mtu 9000 && ip link set {eth} up"
    ))?;
    guest.wait_for(&format!("test $(cat /sys/class/net/{eth}/carrier) = 1"))?;
    for (address, headers) in [(HERE, 28), (HERE6, 48)] {
        let size = 9000 - headers;
        guest.tool(&format!("ping -M do -c 3 -W 60 -s {size} {address}"))?;
    }
    transfer(&guest, &namespace, HERE, 2 * MIB)?;
    guest.check_log(&[])?;
    guest.power_off()
}

/// One guest has the C drivers, the other one ours: each sends to the other one.
#[test]
fn two_guests_talk_over_a_bridge() -> Result<()> {
    let namespace = bridge()?;
    let boot = |drivers, tap: &str| -> Result<(Guest, String)> {
        namespace.tap(tap, 2)?;
        let mac = if tap == "t0" { 1 } else { 2 };
        let options = format!("tap={tap},queues=2,mac=02:00:00:00:00:0{mac}");
        let builder = Guest::with(drivers).cpus(2).nic(nic(&options)?);
        let guest = namespace.enter(|| builder.boot())?;
        let eth = guest.interface("net0")?;
        open(&guest, &eth, mac + 1)?;
        Ok((guest, eth))
    };
    let (first, _) = boot(Drivers::C, "t0")?;
    let (second, _) = boot(Drivers::Rust, "t1")?;
    for (from, to, address) in [
        (&first, &second, "10.77.0.3"),
        (&second, &first, "10.77.0.2"),
        (&first, &second, "fd77::3"),
        (&second, &first, "fd77::2"),
    ] {
        ping(from, address, 1400)?;
        // With an input that does not end: an end makes the sender's program end.
        let receiver = to.spawn(
            "rm -f /tmp/never; mkfifo /tmp/never && exec 3<> /tmp/never && nc -l -p 7 <&3 | sha256sum",
        )?;
        to.wait_for("netstat -ltn | grep ':7 '")?;
        let sum = from.sh(&format!(
            "head -c {MIB} /dev/urandom > /tmp/data && nc {address} 7 < /tmp/data && sha256sum < /tmp/data"
        ))?;
        let output = receiver.wait(COMMAND)?;
        ensure!(
            output.stdout.trim_end() == sum,
            "to {address}: {output}, not {sum}"
        );
    }
    for guest in [first, second] {
        guest.check_log(&[])?;
        guest.power_off()?;
    }
    Ok(())
}

/// passt in a namespace of its own, whose address it gives the guest by DHCP; the address of the router leads to this
/// side.
fn passt_gives_a_network(drivers: Drivers) -> Result<()> {
    const ADDRESS: &str = "10.79.0.2";
    const ROUTER: &str = "10.79.0.1";
    const SIZE: usize = MIB as usize;
    let namespace = Namespace::new(1500)?;
    namespace.sh(&format!(
        "set -e; ip link add p0 type veth peer name p1; ip link set p0 up; ip link set p1 up
         ip address add {ADDRESS}/24 dev p0; ip route add default via {ROUTER}"
    ))?;
    let builder = Guest::with(drivers).nic(nic("passt")?);
    let guest = namespace.enter(|| builder.boot())?;
    let eth = guest.interface("net0")?;
    guest.sh(&format!(
        "cat > /tmp/dhcp << 'END'
#!/bin/sh
[ $1 = bound ] || exit 0
ip address add $ip/$mask dev $interface && ip route add default via $router && echo $ip $router > /tmp/lease
END
         chmod +x /tmp/dhcp; ip link set {eth} up
         udhcpc -i {eth} -s /tmp/dhcp -f -n -q -t 10 -T 10"
    ))?;
    let lease = guest.sh("cat /tmp/lease")?;
    ensure!(lease == format!("{ADDRESS} {ROUTER}"), "{lease}");

    let listen = || namespace.enter(|| Listener::new("127.0.0.1"));
    let listener = listen()?;
    let out = listener.port()?;
    let received = listener.receive();
    let sum = guest.sh(&format!(
        "head -c {SIZE} /dev/urandom > /tmp/data && nc {ROUTER} {out} < /tmp/data && sha256sum < /tmp/data"
    ))?;
    ensure!(
        sum.starts_with(&sha256(&received.join()?)),
        "something else came from the guest"
    );
    let bytes = noise(SIZE, 1);
    let expected = sha256(&bytes);
    let listener = listen()?;
    let out = listener.port()?;
    let sent = listener.send(bytes);
    // With an input that does not end: when the guest ends its side first, the passt of Debian 12 sends on behind the
    // last byte that it got, as a capture shows.
    let got = guest.sh(&format!(
        "mkfifo /tmp/never && exec 3<> /tmp/never && nc {ROUTER} {out} <&3 | sha256sum"
    ))?;
    sent.join()?;
    ensure!(
        got.starts_with(&expected),
        "something else came to the guest"
    );
    guest.check_log(&[])?;
    guest.power_off()
}
