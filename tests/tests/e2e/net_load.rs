// SPDX-License-Identifier: MIT OR Apache-2.0

//! Network adapters whose settings change, that are unloaded, and that are taken away, while traffic goes both ways.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use host_harness::net::NetOptions;
use host_harness::vmbus::Direction;
use hv_proto::ids::ChannelId;
use hv_proto::ring::Field;
use viridian_tests::guest::COMMAND;
use viridian_tests::namespace::BRIDGE;
use viridian_tests::{Drivers, Guest, Namespace, both_drivers};

both_drivers!(
    settings_change_under_traffic,
    reloads_and_rescinds_under_traffic
);

/// Our address on the bridge, and the guest's.
const HERE: &str = "10.78.0.1";
const THERE: &str = "10.78.0.2";

/// What the NIC of these tests takes.
const MTU: u32 = 9000;

/// Lets a connection that found the NIC away try again each second, not ever more rarely, and not give up: the one at
/// the other end would not know.
const EAGER: &str = "cd /proc/sys/net/ipv4; echo 1000 > tcp_rto_max_ms; echo 200 > tcp_retries2";

/// What must go each way for traffic to count as flowing.
const SOME: u64 = 128 << 10;

/// A network with traffic both ways, as long as the guest takes part: [`Traffic::begin`].
struct Traffic {
    namespace: Namespace,
    ended: Arc<AtomicBool>,
    /// Where the guest sends to, and gets from.
    sink: u16,
    source: u16,
}

impl Traffic {
    fn new(queues: u16) -> Result<Self> {
        let namespace = Namespace::new(MTU)?;
        namespace.sh(&format!("{EAGER}; ip address add {HERE}/24 dev {BRIDGE}"))?;
        namespace.tap("t0", queues)?;
        let ended = Arc::new(AtomicBool::new(false));
        let serve = |each: fn(TcpStream) -> std::io::Result<()>| -> Result<u16> {
            let listener = namespace.enter(|| Ok(TcpListener::bind((HERE, 0))?))?;
            listener.set_nonblocking(true)?;
            let port = listener.local_addr()?.port();
            let ended = Arc::clone(&ended);
            std::thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    match listener.accept() {
                        // It ends with its connection.
                        Ok((stream, _)) => _ = std::thread::spawn(move || each(stream)),
                        Err(_) => std::thread::sleep(Duration::from_millis(50)),
                    }
                }
            });
            Ok(port)
        };
        let sink = serve(|mut stream| {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(COMMAND))?;
            let mut room = [0; 1 << 16];
            while stream.read(&mut room)? != 0 {}
            Ok(())
        })?;
        let source = serve(|mut stream| {
            stream.set_nonblocking(false)?;
            stream.set_write_timeout(Some(COMMAND))?;
            loop {
                stream.write_all(&[0; 1 << 14])?;
                // The guest has other things to do, too.
                std::thread::sleep(Duration::from_millis(5));
            }
        })?;
        Ok(Self {
            namespace,
            ended,
            sink,
            source,
        })
    }

    /// Adds the NIC. Returns its name.
    fn add(&self, guest: &Guest, queues: u16) -> Result<String> {
        let options: NetOptions = format!("tap=t0,queues={queues},mtu={MTU},id=load").parse()?;
        self.namespace
            .enter(|| Ok(guest.host().network().add(&options)?))
    }

    /// Gives the guest's interface its address, and brings it up.
    fn open(&self, guest: &Guest, nic: &str) -> Result<String> {
        let eth = guest.interface(nic)?;
        guest.sh(&format!(
            "ip address add {THERE}/24 dev {eth} && ip link set {eth} up"
        ))?;
        Ok(eth)
    }

    /// Lets the guest send and receive until [`Traffic::quiet`], whatever becomes of its interface.
    fn begin(&self, guest: &Guest) -> Result<()> {
        let Self { sink, source, .. } = self;
        guest.sh(&format!("{EAGER}; touch /tmp/traffic"))?;
        for command in [
            // One whose other end has gone unheard is not waited for: it begins anew.
            // As the source: as much as is needed, for an emulated processor.
            format!(
                "while head -c 16384 /dev/zero; do usleep 5000; done | timeout 10 nc {HERE} {sink}"
            ),
            format!("timeout 10 nc {HERE} {source} > /dev/null"),
        ] {
            guest.sh(&format!(
                "(while test -e /tmp/traffic; do {command}; sleep 0.1; done) >/dev/null 2>&1 </dev/null &"
            ))?;
        }
        Ok(())
    }

    /// Ends the traffic.
    fn quiet(&self, guest: &Guest, nic: &str) -> Result<()> {
        guest.sh("rm /tmp/traffic; killall nc; true")?;
        guest.until("the NIC is quiet", || {
            let sent = || guest.nic(nic).map(|nic| nic.counters.sent);
            let before = sent();
            std::thread::sleep(Duration::from_secs(1));
            matches!((before, sent()), (Ok(a), Ok(b)) if a == b)
        })
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// Waits until traffic goes both ways, after something was done.
fn flows(guest: &Guest, nic: &str, what: &str) -> Result<()> {
    let before = guest.nic(nic)?.counters;
    guest.until(&format!("traffic after {what}"), || {
        guest.nic(nic).is_ok_and(|nic| {
            nic.counters.sent_bytes > before.sent_bytes + SOME
                && nic.counters.received_bytes > before.received_bytes + SOME
        })
    })
}

/// What `ethtool` says of a NIC, by the first word of a line: the last one counts.
fn shown(guest: &Guest, command: &str, key: &str) -> Result<u32> {
    let text = guest.tool(command)?;
    let line = text.lines().rfind(|line| line.starts_with(key));
    let value = line.and_then(|line| line.split_whitespace().next_back());
    let value = value.with_context(|| format!("{command}: no {key} in\n{text}"))?;
    Ok(value.parse()?)
}

fn settings_change_under_traffic(drivers: Drivers) -> Result<()> {
    const QUEUES: u16 = 3;
    let traffic = Traffic::new(QUEUES)?;
    let guest = Guest::with(drivers).cpus(QUEUES.into()).tools().boot()?;
    guest.load_network_driver()?;
    let nic = traffic.add(&guest, QUEUES)?;
    let eth = traffic.open(&guest, &nic)?;
    traffic.begin(&guest)?;
    flows(&guest, &nic, "the start")?;
    let queues = u32::from(QUEUES);

    let channels = || shown(&guest, &format!("ethtool -l {eth}"), "Combined:");
    ensure!(channels()? == queues, "not all channels are used at first");
    for count in [1, 2, 3, 1, 3, 2, 3] {
        guest.tool(&format!("ethtool -L {eth} combined {count}"))?;
        ensure!(channels()? == count, "{count} channels are not there");
        flows(&guest, &nic, &format!("a change to {count} channels"))?;
        ensure!(guest.nic(&nic)?.channels == count as usize);
    }
    ensure!(
        guest
            .tool(&format!("ethtool -L {eth} combined {}", queues + 1))
            .is_err(),
        "there are more channels than the host has"
    );

    // All frames of TCP on one channel after the other. Others come on the first one.
    for channel in (0..queues).rev() {
        let weights: Vec<_> = (0..queues)
            .map(|other| if other == channel { "1" } else { "0" })
            .collect();
        guest.tool(&format!("ethtool -X {eth} weight {}", weights.join(" ")))?;
        let received = || -> Result<Vec<u64>> {
            let nic = guest.nic(&nic)?;
            Ok(nic.queues.iter().map(|queue| queue.received).collect())
        };
        let before = received()?;
        flows(
            &guest,
            &nic,
            &format!("a table that names channel {channel} only"),
        )?;
        let after = received()?;
        let most = (0..queues).max_by_key(|&n| after[n as usize] - before[n as usize]);
        ensure!(
            most == Some(channel),
            "channel {channel}: {before:?} {after:?}"
        );
    }
    for (what, table) in [
        ("equal 2", "an even table"),
        ("default", "the default table"),
        (
            "hkey 00:01:02:03:04:05:06:07:08:09:0a:0b:0c:0d:0e:0f:10:11:12:13:14:15:16:17:18:19:1a:1b:1c:1d:1e:1f:20:21:22:23:24:25:26:27",
            "another key",
        ),
    ] {
        guest.tool(&format!("ethtool -X {eth} {what}"))?;
        flows(&guest, &nic, table)?;
    }
    let hash = guest.tool(&format!("ethtool -x {eth}"))?;
    ensure!(
        hash.contains("00:01:02:03:04") && hash.contains("24:25:26:27"),
        "the key was not kept: {hash}"
    );

    let rings = |key| shown(&guest, &format!("ethtool -g {eth}"), key);
    let (rx, tx) = (rings("RX:")?, rings("TX:")?);
    for (new_rx, new_tx) in [(100, 20), (rx / 2, tx / 2), (rx, tx)] {
        guest.tool(&format!("ethtool -G {eth} rx {new_rx} tx {new_tx}"))?;
        let (now_rx, now_tx) = (rings("RX:")?, rings("TX:")?);
        // The buffers have whole pages.
        ensure!(
            (new_rx..=new_rx + 4).contains(&now_rx) && (new_tx..=new_tx + 4).contains(&now_tx),
            "rings of {new_rx} and {new_tx} became {now_rx} and {now_tx}"
        );
        flows(
            &guest,
            &nic,
            &format!("a change to rings of {new_rx} and {new_tx}"),
        )?;
    }

    let mtu = || guest.sh(&format!("cat /sys/class/net/{eth}/mtu"));
    for new in [576, MTU, 1280, 4000, 1500] {
        guest.sh(&format!("ip link set {eth} mtu {new}"))?;
        ensure!(mtu()? == new.to_string(), "the MTU is not {new}");
        flows(&guest, &nic, &format!("a change of the MTU to {new}"))?;
    }
    // The C driver does as if it were done, and takes the largest one.
    let above = guest.run(&format!("ip link set {eth} mtu {}", MTU + 500))?;
    match drivers {
        Drivers::C => ensure!(above.status == 0 && mtu()? == MTU.to_string(), "{above}"),
        Drivers::Rust => ensure!(above.status != 0 && mtu()? == "1500", "{above}"),
    }
    flows(&guest, &nic, "an MTU that the host does not take")?;

    guest.tool(&format!("ethtool -K {eth} lro off"))?;
    flows(&guest, &nic, "LRO was turned off")?;
    guest.tool(&format!("ethtool -K {eth} lro on"))?;

    for round in 0..4 {
        guest.sh(&format!("ip link set {eth} down && ip link set {eth} up"))?;
        flows(&guest, &nic, &format!("down and up {round}"))?;
    }

    let network = guest.host().network();
    let carrier = |up: u32| {
        guest.wait_for(&format!(
            "test \"$(cat /sys/class/net/{eth}/carrier)\" = {up}"
        ))
    };
    network.set_link(&nic, false)?;
    carrier(0)?;
    network.set_link(&nic, true)?;
    carrier(1)?;
    flows(&guest, &nic, "the cable was out")?;
    for _ in 0..5 {
        network.set_link(&nic, false)?;
        network.set_link(&nic, true)?;
    }
    // Meanwhile it is attached again, and must not believe what was said before.
    guest.tool(&format!("ethtool -L {eth} combined {queues}"))?;
    flows(&guest, &nic, "a flapping link")?;
    carrier(1)?;

    // A user's address lasts.
    const ADDRESS: &str = "02:00:00:00:00:05";
    let set_address = |address: &str| {
        guest.sh(&format!(
            "ip link set {eth} down && ip link set {eth} address {address} && ip link set {eth} up"
        ))?;
        // Or it would be half a minute before the bridge asks for it again.
        traffic
            .namespace
            .sh(&format!("ip neighbour del {THERE} dev {BRIDGE}; true"))
    };
    set_address(ADDRESS)?;
    flows(&guest, &nic, "a change of the address")?;
    guest.tool(&format!("ethtool -L {eth} combined 2"))?;
    let address = guest.nic(&nic)?.mac;
    match drivers {
        // It does not tell the host again, so that nothing comes before it is told another one.
        Drivers::C => {
            ensure!(address != ADDRESS, "it lasts");
            set_address("02:00:00:00:00:06")?;
        }
        Drivers::Rust => ensure!(address == ADDRESS, "the host knows {address}"),
    }
    flows(&guest, &nic, "a change of the address and of the channels")?;

    // Names that test suites look for.
    guest.sh(
        "grep -q netvsc_get_msglevel /proc/kallsyms && grep -q netvsc_set_msglevel /proc/kallsyms",
    )?;
    guest.tool(&format!(
        "ethtool -s {eth} msglvl 0x35 && ethtool {eth} | grep -q 0x00000035"
    ))?;
    traffic.quiet(&guest, &nic)?;
    // The C driver sends frames that were made for a larger MTU.
    let expected: &[&str] = match drivers {
        Drivers::C => &["nvsp_rndis_pkt_complete error status"],
        Drivers::Rust => &["the host takes no larger MTU", "new settings do not work"],
    };
    guest.check_log(expected)?;
    ensure!(
        !guest.sh("dmesg")?.contains("suspect GRO") || drivers == Drivers::C,
        "frames that the host has put together are not understood"
    );
    guest.power_off()
}

fn reloads_and_rescinds_under_traffic(drivers: Drivers) -> Result<()> {
    const QUEUES: u16 = 2;
    let traffic = Traffic::new(QUEUES)?;
    let guest = Guest::with(drivers).cpus(QUEUES.into()).tools().boot()?;
    guest.load_network_driver()?;
    let nic = traffic.add(&guest, QUEUES)?;
    let mut eth = traffic.open(&guest, &nic)?;
    traffic.begin(&guest)?;
    flows(&guest, &nic, "the start")?;
    let module = drivers.network_module();
    for round in 0..20 {
        guest.sh(&format!("rmmod {module}"))?;
        guest.sh(&format!(
            "! test -e /sys/class/net/{eth} && modprobe {module}"
        ))?;
        eth = traffic.open(&guest, &nic)?;
        flows(&guest, &nic, &format!("reload {round}"))?;
    }

    let gone = |eth: &str| guest.wait_for(&format!("! test -e /sys/class/net/{eth}"));
    let network = guest.host().network();
    // Nothing is under way when it goes.
    traffic.quiet(&guest, &nic)?;
    network.remove(&nic)?;
    gone(&eth)?;
    traffic.add(&guest, QUEUES)?;
    let mut eth = traffic.open(&guest, &nic)?;
    traffic.begin(&guest)?;
    flows(&guest, &nic, "a rescind")?;

    if drivers == Drivers::Rust {
        // Not tried with the C driver, which has no time limits; see `net::nics_come_and_go_under_traffic`.
        subchannels_go(&guest, &nic, &eth)?;
        silent_host(&guest, &nic, &eth)?;
        damaged_ring(&guest, &nic, &eth)?;
        for round in 0..3 {
            let changes = guest.spawn(&format!(
                "while chroot /debian ethtool -L {eth} combined 1 && chroot /debian ethtool -L {eth} combined 2; do :; done"
            ))?;
            for count in [1, 2, 1] {
                guest.until("the channels change", || {
                    guest.nic(&nic).is_ok_and(|nic| nic.channels == count)
                })?;
            }
            network.remove(&nic)?;
            gone(&eth)?;
            changes.wait(COMMAND)?;
            traffic.add(&guest, QUEUES)?;
            eth = traffic.open(&guest, &nic)?;
            flows(&guest, &nic, &format!("rescind {round} amid changes"))?;
        }
    }
    traffic.quiet(&guest, &nic)?;
    let expected: &[&str] = match drivers {
        // It sends when the host has no buffers any more.
        Drivers::C => &["nvsp_rndis_pkt_complete error status"],
        Drivers::Rust => &[
            "new settings do not work",
            "nor do the old ones",
            "the adapter does not open",
            "the host goes on sending",
            "the host keeps packets",
            "ring",
        ],
    };
    guest.check_log(expected)?;
    guest.power_off()
}

/// The host takes the sub-channels away, and what was sent on them goes on the primary channel.
fn subchannels_go(guest: &Guest, nic: &str, eth: &str) -> Result<()> {
    let server = guest.host().server().context("no bus")?;
    let device = guest.nic(nic)?.instance;
    let channels = format!("/sys/bus/vmbus/devices/{device}/channels");
    let ids = guest.sh(&format!(
        "cd {channels} && for c in *; do test $(cat $c/subchannel_id) = 0 || echo $c; done"
    ))?;
    for id in ids.lines() {
        ensure!(
            server.rescind_subchannel(ChannelId::new(id.parse()?)),
            "no sub-channel {id}"
        );
        guest.wait_for(&format!("! test -e {channels}/{id}"))?;
        flows(guest, nic, &format!("sub-channel {id}"))?;
    }
    ensure!(guest.nic(nic)?.channels == 1, "there are sub-channels yet");
    guest.tool(&format!("ethtool -L {eth} combined 2"))?;
    flows(guest, nic, "new sub-channels")?;
    ensure!(guest.nic(nic)?.channels == 2, "there is no new sub-channel");
    Ok(())
}

/// All that a user can do ends while the host answers nothing, and the NIC works when it does again.
fn silent_host(guest: &Guest, nic: &str, eth: &str) -> Result<()> {
    let network = guest.host().network();
    guest.sh("echo 1 > /sys/module/netvsc/parameters/host_timeout")?;
    for command in ["ethtool -L ETH combined 1", "ip link set ETH mtu 1400"] {
        let command = command.replace("ETH", eth);
        network.set_silent(nic, true)?;
        let refused = guest.run(&format!("chroot /debian {command}"))?;
        ensure!(refused.status != 0, "{command}: {refused}");
        // Without channels there is nothing to spread over.
        let refused = guest.run(&format!("chroot /debian ethtool -X {eth} default"))?;
        ensure!(refused.status != 0, "a table was set: {refused}");
        guest.sh(&format!("ip link set {eth} down"))?;
        let refused = guest.run(&format!("ip link set {eth} up"))?;
        ensure!(refused.status != 0, "it came up: {refused}");
        network.set_silent(nic, false)?;
        guest.sh(&format!("ip link set {eth} up"))?;
        flows(guest, nic, &format!("{command} with a silent host"))?;
    }
    guest.sh("echo 10 > /sys/module/netvsc/parameters/host_timeout")?;
    Ok(())
}

/// A NIC whose ring the host has damaged is well again when it was down.
fn damaged_ring(guest: &Guest, nic: &str, eth: &str) -> Result<()> {
    let server = guest.host().server().context("no bus")?;
    let mut channels = server.status().channels.into_iter();
    let primary = channels.find(|channel| channel.name == nic && channel.subchannel_index == 0);
    let id = ChannelId::new(primary.context("the NIC has no channel")?.id);
    // The host puts it right with its next packet, so that the guest may not see it the first time.
    guest.until("the guest has seen the damage", || {
        server
            .hostile()
            .store(id, Direction::ToGuest, Field::WriteIndex, 13);
        guest
            .run("dmesg | grep 'damaged the ring of queue 0'")
            .is_ok_and(|output| output.status == 0)
    })?;
    guest.sh(&format!("ip link set {eth} down && ip link set {eth} up"))?;
    flows(guest, nic, "a damaged ring")
}
