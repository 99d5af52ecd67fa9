// SPDX-License-Identifier: MIT OR Apache-2.0

//! The integration components: heartbeat, time synchronization, shutdown.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use host_harness::events::Event;
use host_harness::vm::ExitReason;
use host_harness::vsp::ic::{AskError, Heart, HeartbeatStatus, LinkConfig, LinkState};
use host_harness::vsp::inputvsp::{Key, KeyAction, MouseInput};
use host_harness::vsp::services::ServiceKind;
use hv_proto::ic::shutdown::{self, Action};
use hv_proto::ic::timesync::{self, Flags, HostTime, Leap, PlainBody, V4};
use hv_proto::ic::{FRAME_VERSIONS, MessageType, Status, Version, heartbeat, negotiation};
use viridian_tests::guest::COMMAND;
use viridian_tests::{Drivers, Guest, both_drivers, our_drivers};
use zerocopy::IntoBytes;

use crate::control::{self, Operator};
use crate::ic::{Peer, number};
use crate::input::{EV_KEY, KEYBOARD, Recorder, caps_lock};

both_drivers!(
    every_version_works_and_malformed_messages_are_survived,
    modules_reload_and_the_heart_stops_with_the_guest,
);

// The C drivers have one buffer, one version and one clock for all devices of a class.
our_drivers!(two_devices_of_a_class_are_apart);

pub const DAY: i64 = 86_400;

/// How far two clocks that are the same may seem apart, in seconds: both are read in whole seconds, one after the other.
const SAME: i64 = 2;

fn unix_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(since.unwrap_or_default().as_secs()).unwrap_or(0)
}

/// By how many seconds the guest's clock is ahead of the host's: at least and at most.
fn guest_ahead(guest: &Guest) -> Result<(i64, i64)> {
    let before = unix_seconds();
    let theirs: i64 = guest.sh("date +%s")?.parse()?;
    Ok((theirs - unix_seconds() - SAME, theirs - before + SAME))
}

/// Whether the guest's clock is ahead by so many seconds.
fn is_ahead(guest: &Guest, seconds: i64) -> Result<bool> {
    let (least, most) = guest_ahead(guest)?;
    Ok((least..=most).contains(&seconds))
}

/// Waits until the guest's clock is ahead by so many seconds.
pub fn until_ahead(guest: &Guest, seconds: i64) -> Result<()> {
    let deadline = Instant::now() + COMMAND;
    while !is_ahead(guest, seconds)? {
        ensure!(
            Instant::now() < deadline,
            "the guest's clock is ahead by {:?} s, not by {seconds} s",
            guest_ahead(guest)?
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn tell(guest: &Guest, flags: Flags, ahead: i64) -> Result<()> {
    let services = guest.host().services();
    services.timesync(None, |timesync| timesync.send(flags, ahead * 1000))??;
    Ok(())
}

fn heart(guest: &Guest) -> Result<HeartbeatStatus> {
    let services = guest.host().services();
    Ok(services.heartbeat(None, |heartbeat| heartbeat.status())?)
}

fn every_version_works_and_malformed_messages_are_survived(drivers: Drivers) -> Result<()> {
    let guest = Guest::with(drivers).boot()?;
    guest.load_services()?;
    for (device, version) in [
        ("heartbeat", "3.0"),
        ("timesync", "4.0"),
        ("shutdown", "3.2"),
    ] {
        let agreed = guest.version_of(device);
        ensure!(
            agreed.as_deref() == Some(version),
            "{device}: {agreed:?} is not the best version"
        );
    }

    heartbeat_versions(&guest)?;
    clock_follows_the_host(&guest, drivers)?;
    timesync_versions(&guest)?;
    shutdown_versions(&guest)?;
    guest.check_log(&["none of our versions"])?;
    malformed_messages_are_survived(&guest)?;
    if drivers == Drivers::Rust {
        // With such a message the C drivers stop: it stays the first in the ring for ever.
        messages_longer_than_a_page_are_dropped(&guest)?;
    }
    services_come_back(&guest)?;
    guest.check_log(&[
        "message dropped",
        "bytes dropped",
        "none of our versions",
        "callbacks suppressed",
        // The C drivers.
        "Packet length too small",
        "Length too small",
        "Invalid msg type",
        "Invalid icmsg negotiate",
    ])?;
    guest.power_off()
}

fn heartbeat_versions(guest: &Guest) -> Result<()> {
    let peer = Peer::new(guest, "heartbeat", MessageType::HEARTBEAT)?;
    let mut sequence = u64::MAX - 1;
    for frame in FRAME_VERSIONS {
        for version in heartbeat::VERSIONS {
            peer.speak(*frame, *version)?;
            for _ in 0..2 {
                let body = heartbeat::Body::new(sequence);
                let reply = peer.ask(&peer.request(body.as_bytes()))?;
                sequence = sequence.wrapping_add(1);
                ensure!(
                    reply.header.status == Status::OK && number(&reply.body)? == sequence,
                    "heartbeat {version}: {:?}",
                    reply.header
                );
            }
        }
    }
    // The guest takes the best of its own list that is in the host's, whatever is around it.
    let unknown = Version::new(9, 9);
    let lists = [Version::new(1, 0), unknown, Version::new(3, 0), unknown];
    let agreed = peer.negotiate(&lists, &lists)?.context("no version")?;
    ensure!(
        (agreed.frame, agreed.message) == (Version::new(3, 0), Version::new(3, 0)),
        "{agreed:?} is not the best of {lists:?}"
    );
    ensure!(peer.negotiate(&[unknown], &lists)?.is_none(), "frame 9.9");
    ensure!(peer.negotiate(&lists, &[unknown])?.is_none(), "version 9.9");
    ensure!(peer.negotiate(&[], &[])?.is_none(), "no list at all");
    peer.give_back(heartbeat::VERSIONS)
}

fn clock_follows_the_host(guest: &Guest, drivers: Drivers) -> Result<()> {
    ensure!(
        guest.sh("cat /sys/class/ptp/*/clock_name")? == "hyperv",
        "the name of the clock"
    );
    // Both directions, two days each.
    for days in [2, 0, -2, 0] {
        tell(guest, Flags::SYNC, days * DAY)?;
        until_ahead(guest, days * DAY)?;
    }
    // A sample is an offer, and nothing more.
    for days in [-2, 2] {
        tell(guest, Flags::SYNC, days * DAY)?;
        until_ahead(guest, days * DAY)?;
        tell(guest, Flags::SAMPLE, 0)?;
        tell(guest, timesync::PROBE, 0)?;
        ensure!(is_ahead(guest, days * DAY)?, "a sample has set the clock");
    }
    // Where the administrator wants it, a sample sets a clock that is behind, and none that is ahead.
    let module = match drivers {
        Drivers::C => "hv_utils",
        Drivers::Rust => "timesync",
    };
    let implicit = format!("/sys/module/{module}/parameters/timesync_implicit");
    guest.sh(&format!("echo 1 > {implicit}"))?;
    tell(guest, Flags::SAMPLE, 0)?;
    ensure!(is_ahead(guest, 2 * DAY)?, "a sample has set a clock back");
    tell(guest, Flags::SAMPLE, 3 * DAY)?;
    until_ahead(guest, 3 * DAY)?;
    guest.sh(&format!("echo 0 > {implicit}"))?;
    tell(guest, Flags::SYNC, 0)?;
    until_ahead(guest, 0)
}

fn timesync_versions(guest: &Guest) -> Result<()> {
    let peer = Peer::new(guest, "timesync", MessageType::TIMESYNC)?;
    // What version 4 does was seen before. The older ones have no reference counter.
    let old = timesync::VERSIONS.iter().filter(|version| **version < V4);
    for (days, version) in (1..).zip(old) {
        for frame in FRAME_VERSIONS {
            peer.speak(*frame, *version)?;
            let time = (unix_seconds() + days * DAY) * 1_000_000_000;
            let body = PlainBody {
                parent_time: HostTime::from_unix_ns(time).context("time")?.raw().into(),
                child_time: 0.into(),
                round_trip_time: 0.into(),
                flags: Flags::SYNC.bits(),
            };
            let reply = peer.ask(&peer.request(body.as_bytes()))?;
            ensure!(reply.header.status == Status::OK, "timesync {version}");
            until_ahead(guest, days * DAY)?;
        }
    }
    if guest.drivers() == Drivers::Rust {
        // How good the host's clock is, which the C driver does nothing with.
        peer.speak(Version::new(3, 0), V4)?;
        peer.ask(&peer.request(&probe(Leap::INSERT, 3)))?;
        for (name, wanted) in [("leap", 1), ("stratum", 3)] {
            let told = guest.driver_count("timesync", "timesync", name)?;
            ensure!(told == wanted, "{name} {told}, not {wanted}");
        }
    }
    peer.give_back(timesync::VERSIONS)?;
    tell(guest, Flags::SYNC, 0)?;
    until_ahead(guest, 0)
}

/// Also: a guest that cannot hibernate says so.
fn shutdown_versions(guest: &Guest) -> Result<()> {
    let services = guest.host().services();
    let hibernate = |force| {
        services.shutdown(None, |shutdown| {
            shutdown.request(Action::Hibernate, force, 0, "good night")
        })
    };
    for force in [false, true] {
        let refused = hibernate(force)?;
        ensure!(
            matches!(refused, Err(AskError::Refused(status)) if status == Status::FAIL.get()),
            "hibernation was not refused: {refused:?}"
        );
    }
    let peer = Peer::new(guest, "shutdown", MessageType::SHUTDOWN)?;
    for version in shutdown::VERSIONS {
        for frame in FRAME_VERSIONS {
            peer.speak(*frame, *version)?;
            let mut body = shutdown::Body::new(Action::Hibernate, false, 0, "");
            let hibernate = peer.ask(&peer.request(body.as_bytes()))?;
            // None of the things that there are.
            body.flags = 0x40.into();
            let unknown = peer.ask(&peer.request(body.as_bytes()))?;
            for reply in [hibernate, unknown] {
                ensure!(
                    reply.header.status == Status::FAIL,
                    "shutdown {version}: {:?}",
                    reply.header
                );
            }
        }
    }
    peer.give_back(shutdown::VERSIONS)
}

fn two_input_devices_are_apart(guest: &Guest) -> Result<()> {
    let devices = ["keyboard", "keyboard1", "mouse", "mouse1"];
    guest.load(guest.drivers().input_modules(), &devices)?;
    let received = || -> Result<Vec<u64>> {
        let count = |device: &&str| guest.driver_count("hid_vsc", device, "received");
        devices.iter().map(count).collect()
    };
    let before = received()?;
    let services = guest.host().services();
    let a = Key::chord("a")?;
    services.keyboard(Some("keyboard1"), |keyboard| {
        keyboard.key(&a, KeyAction::Press)
    })??;
    services.mouse(Some("mouse1"), |mouse| mouse.input(&MouseInput::default()))??;
    for device in devices {
        guest.until_taken(device)?;
    }
    let after = received()?;
    let new: Vec<u64> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
    ensure!(new == [0, 2, 0, 1], "{new:?} of {devices:?}");
    // The first ones go, the second ones stay.
    for device in ["keyboard", "mouse"] {
        services.rescind(device)?;
    }
    guest.wait_for("test $(ls -d /sys/kernel/debug/hid_vsc-* | wc -l) = 2")?;
    services.keyboard(Some("keyboard1"), |keyboard| {
        keyboard.key(&a, KeyAction::Press)
    })??;
    guest.until_taken("keyboard1")?;
    let received = guest.driver_count("hid_vsc", "keyboard1", "received")?;
    ensure!(received == after[1] + 2, "{received} keystrokes");
    Ok(())
}

/// What a guest does about a message.
enum Expect {
    /// It says nothing.
    Silence,
    /// It refuses.
    Refusal,
    /// It says that there is no common version.
    NoVersion,
}

/// Messages that no host should send, and what the guest does about each: first those that are the same with all
/// drivers.
fn malformed(peer: &Peer, drivers: Drivers, body: &[u8]) -> Vec<(&'static str, Vec<u8>, Expect)> {
    let counts = |frame: u16, message: u16| {
        let counts = negotiation::Counts {
            frame: frame.into(),
            message: message.into(),
            reserved: 0.into(),
        };
        counts.as_bytes().to_vec()
    };
    let negotiation = |frame, message, versions: usize| {
        let body = [counts(frame, message), vec![3; versions * 4]].concat();
        peer.message(MessageType::NEGOTIATE, &body)
    };
    let good = peer.request(body);
    let mut list = vec![
        ("nothing", Vec::new(), Expect::Silence),
        // Packets are made of 8 bytes.
        ("half a header", good[..24].to_vec(), Expect::Silence),
        ("no body", peer.request(&[]), Expect::Silence),
        ("short body", peer.request(&[1; 4]), Expect::Silence),
        (
            "another service",
            peer.message(MessageType::KVP, body),
            Expect::Refusal,
        ),
        (
            "no service",
            peer.message(MessageType::new(0xffff), body),
            Expect::Refusal,
        ),
        (
            "too many versions",
            negotiation(101, 1, 102),
            Expect::NoVersion,
        ),
        (
            "too many versions of the service",
            negotiation(1, 101, 102),
            Expect::NoVersion,
        ),
        (
            "all versions",
            negotiation(u16::MAX, u16::MAX, 500),
            Expect::NoVersion,
        ),
        (
            "fewer versions than said",
            negotiation(50, 50, 99),
            Expect::NoVersion,
        ),
        ("no versions", negotiation(0, 0, 2), Expect::NoVersion),
        ("only one list", negotiation(2, 0, 2), Expect::NoVersion),
    ];
    if drivers == Drivers::Rust {
        // The C drivers use the service in whatever version is left over, and take answers for questions.
        list.push(("before versions", peer.request(body), Expect::Refusal));
        let mut answer = peer.request(body);
        let flags = std::mem::offset_of!(hv_proto::ic::Header, flags);
        answer[flags] = hv_proto::ic::Flags::RESPONSE.bits();
        list.push(("an answer", answer, Expect::Silence));
    }
    list
}

/// Size of the longest message that all drivers take, in bytes.
const LONGEST: usize = 4096 - 16;

/// Bodies of the three services that a guest answers without doing anything.
fn harmless() -> [(&'static str, MessageType, &'static [Version], Vec<u8>); 3] {
    [
        (
            "heartbeat",
            MessageType::HEARTBEAT,
            heartbeat::VERSIONS,
            heartbeat::Body::new(7).as_bytes().to_vec(),
        ),
        (
            "timesync",
            MessageType::TIMESYNC,
            timesync::VERSIONS,
            probe(Leap::NONE, 0),
        ),
        (
            "shutdown",
            MessageType::SHUTDOWN,
            shutdown::VERSIONS,
            shutdown::Body::new(Action::Hibernate, false, 0, "")
                .as_bytes()
                .to_vec(),
        ),
    ]
}

/// A body of time synchronization, of the newest version, that only says what time it is.
fn probe(leap: Leap, stratum: u8) -> Vec<u8> {
    let time = HostTime::from_unix_ns(unix_seconds() * 1_000_000_000);
    let body = timesync::ReferenceBody {
        parent_time: time.map_or(0, HostTime::raw).into(),
        reference_time: 0.into(),
        flags: timesync::PROBE.bits(),
        leap,
        stratum,
        reserved: [0; 3],
    };
    body.as_bytes().to_vec()
}

fn malformed_messages_are_survived(guest: &Guest) -> Result<()> {
    let drivers = guest.drivers();
    for (device, message_type, versions, body) in harmless() {
        let rejected = || match drivers {
            Drivers::C => Ok(0),
            Drivers::Rust => guest.driver_count(device, device, "rejected"),
        };
        let peer = Peer::new(guest, device, message_type)?;
        let before = rejected()?;
        let mut wrong = 0;
        for (what, message, expect) in malformed(&peer, drivers, &body) {
            answer_is(&peer, &message, &expect).with_context(|| format!("{device}, {what}"))?;
            if !matches!(expect, Expect::NoVersion) {
                wrong += 1;
            }
            // Some drivers stop reading at such a message, until the host signals again; and it
            // signals when the ring was empty.
            guest.until_taken(device)?;
        }
        peer.complete(5)?;
        guest.until_taken(device)?;
        if drivers == Drivers::Rust {
            let rejected = rejected()? - before;
            // Four of the lists of versions cannot be; the others only have nothing in common.
            ensure!(
                rejected == wrong + 4 + 1,
                "{device}: {rejected} messages rejected, {wrong} of the service were wrong"
            );
        }
        peer.negotiate(FRAME_VERSIONS, versions)?
            .context("no version")?;

        // Twice the same; and as long as a packet may be: a page, with its header.
        let twice = peer.request(&body);
        for _ in 0..2 {
            peer.send(&twice)?;
            peer.answer(&twice).context("twice")?;
        }
        let long = [&*body, &vec![0; LONGEST - 28 - body.len()]].concat();
        let reply = peer.ask(&peer.request(&long)).context("a page")?;
        ensure!(
            reply.body.len() + 28 == LONGEST,
            "{device}: the answer has {} bytes",
            reply.body.len()
        );
        peer.give_back(versions)?;
    }
    let beats = heart(guest)?.beats;
    guest.until("the heart beats", || {
        heart(guest).is_ok_and(|heart| heart.beats > beats)
    })
}

fn services_come_back(guest: &Guest) -> Result<()> {
    let services = guest.host().services();
    for device in ["heartbeat", "timesync", "shutdown"] {
        let instance = guest.service_instance(device)?;
        let path = format!("/sys/bus/vmbus/devices/{instance}");
        for _ in 0..3 {
            guest.sh(&format!("test -d {path}/driver"))?;
            services.rescind(device)?;
            guest.wait_for(&format!("! test -e {path}"))?;
            services.offer(device)?;
            guest.until_negotiated(&[device])?;
        }
    }
    tell(guest, Flags::SYNC, 2 * DAY)?;
    until_ahead(guest, 2 * DAY)
}

fn answer_is(peer: &Peer, message: &[u8], expect: &Expect) -> Result<()> {
    match expect {
        // If it said anything, that would be the next answer.
        Expect::Silence => peer.send(message),
        Expect::Refusal => {
            let reply = peer.ask(message)?;
            ensure!(reply.header.status == Status::FAIL, "{:?}", reply.header);
            Ok(())
        }
        Expect::NoVersion => {
            let reply = peer.ask(message)?;
            ensure!(
                reply.body.get(..4) == Some(&[0; 4]),
                "{:x?} {:?}",
                reply.body,
                reply.header
            );
            Ok(())
        }
    }
}

/// The modules of the services and of the input devices, and then the end of the guest.
fn modules_reload_and_the_heart_stops_with_the_guest(drivers: Drivers) -> Result<()> {
    let mut guest = Guest::with(drivers)
        .word("panic=0")
        .run_after_crash()
        .boot()?;
    let (_folder, operator) = control::listen(&mut guest)?;
    modules_reload_twenty_times(&guest)?;
    heart_stops_with_the_guest(&guest, &operator)?;
    // It says nothing any more, so the plug is pulled.
    operator.ctl(&["power-off"])?;
    guest.ends_with(ExitReason::Stopped)
}

fn modules_reload_twenty_times(guest: &Guest) -> Result<()> {
    let drivers = guest.drivers();
    guest.load(&["evdev"], &[])?;
    let modules = [drivers.service_modules(), drivers.input_modules()].concat();
    let devices = ["heartbeat", "timesync", "shutdown", "keyboard", "mouse"];
    for round in 0..20 {
        guest
            .load(&modules, &devices)
            .with_context(|| format!("round {round}"))?;
        tell(guest, Flags::SAMPLE, 0)?;
        if drivers == Drivers::Rust && round % 5 == 0 {
            // As soon as there is a keyboard.
            let mut pressed = Recorder::new(guest, KEYBOARD, &[EV_KEY])?;
            caps_lock(guest, &mut pressed, true)?;
            caps_lock(guest, &mut pressed, false)?;
        }
        guest.sh(&format!("rmmod {}", modules.join(" ")))?;
        guest.sh("test -z \"$(ls /sys/class/ptp)\"")?;
    }
    guest.load(&modules, &devices)?;
    guest.check_log(&[])
}

fn heart_stops_with_the_guest(guest: &Guest, operator: &Operator) -> Result<()> {
    guest.until("two beats", || {
        heart(guest).is_ok_and(|heart| heart.beats >= 2)
    })?;
    ensure!(heart(guest)?.heart == Heart::Beats, "it does not beat");

    let events = guest.host().events().subscribe();
    guest.host().control().vm.pause();
    let lost = |event: &Event| matches!(event, Event::HeartbeatLost { .. });
    ensure!(events.find(COMMAND, lost).is_some(), "nobody missed it");
    let paused = operator.device("heartbeat")?;
    ensure!(
        paused["heartbeat"]["heart"] == "lost"
            && paused["heartbeat"]["age_ms"]
                .as_u64()
                .is_some_and(|age| age >= 6000),
        "the heart of a paused guest: {paused:#}"
    );
    guest.host().control().vm.resume();
    let back = |event: &Event| matches!(event, Event::HeartbeatRecovered { .. });
    ensure!(events.find(COMMAND, back).is_some(), "it did not come back");
    let beats = heart(guest)?.beats;
    guest.until("it goes on", || {
        heart(guest).is_ok_and(|heart| heart.beats > beats && heart.wrong == 0)
    })?;
    guest.check_log(&[])?;

    let _ends = guest.spawn("echo c > /proc/sysrq-trigger")?;
    let crashed = |event: &Event| matches!(event, Event::Crashed { .. });
    ensure!(events.find(COMMAND, crashed).is_some(), "no crash");
    // The kernel says goodbye to the bus, or does not answer any more.
    let deadline = Instant::now() + COMMAND;
    loop {
        let now = heart(guest)?;
        if now.heart == Heart::Lost || now.link.state == LinkState::Closed {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "the heart of a dead guest: {now:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let status = operator.ctl(&["status"])?;
    ensure!(
        status["vm"]["crash"]["parameters"].is_array(),
        "the operator does not see the crash: {status:#}"
    );
    Ok(())
}

fn messages_longer_than_a_page_are_dropped(guest: &Guest) -> Result<()> {
    for (device, message_type, versions, body) in harmless() {
        let peer = Peer::new(guest, device, message_type)?;
        peer.negotiate(FRAME_VERSIONS, versions)?
            .context("no version")?;
        for size in [4104, 8192] {
            let mut message = peer.request(&body);
            message.resize(size, 0);
            peer.send(&message)?;
            // Its answer would come first.
            peer.ask(&peer.request(&body)).context(device)?;
        }
        peer.give_back(versions)?;
    }
    Ok(())
}

fn two_devices_of_a_class_are_apart(drivers: Drivers) -> Result<()> {
    const OLD: &[Version] = &[Version::new(1, 0)];
    let old = LinkConfig::new(OLD);
    let guest = Guest::with(drivers)
        .service(ServiceKind::Heartbeat(old))
        .service(ServiceKind::Timesync(old))
        .service(ServiceKind::Shutdown(old))
        .service(ServiceKind::Keyboard)
        .service(ServiceKind::Mouse)
        .boot()?;
    guest.load_services()?;
    guest.until_negotiated(&["heartbeat1", "timesync1", "shutdown1"])?;
    two_input_devices_are_apart(&guest)?;
    for device in ["heartbeat", "timesync", "shutdown"] {
        ensure!(guest.version_of(device) != Some("1.0".into()), "{device}");
        let second = guest.version_of(&format!("{device}1"));
        ensure!(second == Some("1.0".into()), "{device}1 speaks {second:?}");
    }
    ensure!(
        guest.sh("cat /sys/class/ptp/*/clock_name")? == "hyperv\nhyperv",
        "the clocks"
    );
    let services = guest.host().services();
    services.timesync(Some("timesync1"), |timesync| {
        timesync.send(Flags::SYNC, 2 * DAY * 1000)
    })??;
    until_ahead(&guest, 2 * DAY)?;
    // The first one goes, the second one stays.
    for device in ["heartbeat", "timesync", "shutdown"] {
        services.rescind(device)?;
    }
    guest.wait_for("test $(ls /sys/class/ptp | wc -l) = 1")?;
    let beats = |guest: &Guest| {
        let services = guest.host().services();
        services.heartbeat(Some("heartbeat1"), |heartbeat| heartbeat.status().beats)
    };
    let before = beats(&guest)?;
    guest.until("the second heart beats", || {
        beats(&guest).is_ok_and(|beats| beats >= before + 2)
    })?;
    services.timesync(Some("timesync1"), |timesync| timesync.send(Flags::SYNC, 0))??;
    until_ahead(&guest, 0)?;
    let refused = services.shutdown(Some("shutdown1"), |shutdown| {
        shutdown.request(Action::Hibernate, false, 0, "")
    })?;
    ensure!(matches!(refused, Err(AskError::Refused(_))), "{refused:?}");
    guest.check_log(&[])?;
    guest.power_off()
}
