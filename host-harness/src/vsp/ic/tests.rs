// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests of the integration components, with a guest in memory: the real bus server and rings, and
//! the guest's side of `hv_proto::ic`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hv_proto::ic::shutdown::{Action, Request};
use hv_proto::ic::timesync::{Flags, Sample};
use hv_proto::ic::{
    self, Event as GuestEvent, Guest, Header, Service as GuestService, Version, heartbeat,
    shutdown, timesync,
};
use hv_proto::version::Version as BusVersion;
use zerocopy::{FromBytes, IntoBytes};

use super::*;
use crate::events::{Event, Events, Subscription};
use crate::hypervisor::{FixedClock, ReferenceClock};
use crate::vmbus::test_guest::{FakeChannel, FakeGuest, NEVER, SOON};
use crate::vmbus::{OfferHandle, OfferParams, Vsp};
use crate::vsp::port::PortError;

/// The guest's end of a component.
struct Rig<S> {
    guest: FakeGuest,
    channel: FakeChannel,
    session: Guest<S>,
    events: Subscription,
    _offer: OfferHandle,
}

impl<S: GuestService> Rig<S> {
    fn new(guest_events: &Events, vsp: Box<dyn Vsp>, service: S) -> Self {
        let mut guest = FakeGuest::connected(BusVersion::V5_3);
        let class = hv_proto::guid::HEARTBEAT;
        let instance = hv_proto::guid!("00000000-0000-0000-0000-000000000001");
        let params = OfferParams::new("ic", class, instance);
        let offer = guest.server.offer(params, vsp).unwrap();
        let channel = guest.request_offers().remove(0);
        let channel = guest.open(&channel, 4, 0).unwrap();
        Self {
            guest,
            channel,
            session: Guest::new(service),
            events: guest_events.subscribe(),
            _offer: offer,
        }
    }

    /// Takes a message of the host, and answers it.
    fn serve(&mut self) -> GuestEvent<S::Event> {
        let packet = self.channel.receive();
        let (reply, event) = self.session.on_message(&packet.payload).unwrap();
        let reply = reply.parts(&packet.payload).concat();
        self.channel
            .try_send(packet.transaction_id, &reply, false)
            .unwrap();
        event
    }

    fn expect_service(&mut self) -> S::Event {
        match self.serve() {
            GuestEvent::Service(event) => event,
            _ => panic!("not a message of the service"),
        }
    }

    fn negotiate(&mut self) -> String {
        match self.serve() {
            GuestEvent::Negotiated(agreed) => agreed.message.to_string(),
            _ => panic!("no version was agreed on"),
        }
    }

    fn expect_event(&self, wanted: impl Fn(&Event) -> bool) -> Event {
        self.events.find(SOON, wanted).expect("no such event")
    }
}

/// Waits until something holds.
fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn config(versions: &'static [Version]) -> LinkConfig {
    LinkConfig::new(versions)
}

/// Three of them without an answer are a lost guest: long enough for a busy machine.
const FAST: Duration = Duration::from_millis(300);

fn heart(period: Duration) -> (Heartbeat, Rig<ic::heartbeat::Heartbeat>) {
    let events = Events::default();
    let versions = config(heartbeat::VERSIONS);
    let host = Heartbeat::with_period("ic", versions, events.clone(), period);
    let rig = Rig::new(&events, host.vsp(), ic::heartbeat::Heartbeat);
    (host, rig)
}

#[test]
fn a_guest_that_answers_beats() {
    let (host, mut rig) = heart(FAST);
    wait_until("negotiating", || {
        host.status().link.state == LinkState::Negotiating
    });
    assert_eq!(rig.negotiate(), "3.0");
    for sequence in 1..5 {
        assert_eq!(rig.expect_service(), sequence);
    }
    wait_until("four beats", || host.status().beats == 4);
    let status = host.status();
    assert_eq!(status.heart, Heart::Beats);
    assert!(status.age_ms.is_some_and(|age| age < 5000));
    assert_eq!(status.link.version.as_deref(), Some("3.0"));
    assert_eq!(status.link.frame.as_deref(), Some("3.0"));
    rig.guest.close(rig.channel);
    assert_eq!(host.status().heart, Heart::Unknown);
    assert_eq!(host.status().link.state, LinkState::Closed);
}

#[test]
fn a_guest_that_stops_is_lost_and_comes_back() {
    let (host, mut rig) = heart(FAST);
    rig.negotiate();
    rig.expect_service();
    let lost = |event: &Event| matches!(event, Event::HeartbeatLost { .. });
    let Event::HeartbeatLost { device, age_ms } = rig.expect_event(lost) else {
        unreachable!();
    };
    assert_eq!(device, "ic");
    assert!(age_ms >= 900, "{age_ms}");
    assert_eq!(host.status().heart, Heart::Lost);
    // The ring of a guest that sleeps does not fill.
    assert!(host.status().link.counters.requests <= 4);
    rig.expect_service();
    rig.expect_event(|event| matches!(event, Event::HeartbeatRecovered { .. }));
    assert_eq!(host.status().heart, Heart::Beats);
}

#[test]
fn a_guest_that_never_answers_is_lost_too() {
    let (host, mut rig) = heart(FAST);
    rig.negotiate();
    rig.expect_event(|event| matches!(event, Event::HeartbeatLost { .. }));
    assert_eq!(host.status().age_ms, None);
}

#[test]
fn answers_that_make_no_sense_are_counted_and_change_nothing() {
    let (host, mut rig) = heart(FAST);
    rig.negotiate();
    let packet = rig.channel.receive();
    let (reply, _) = rig.session.on_message(&packet.payload).unwrap();
    let good = reply.parts(&packet.payload).concat();
    let id = packet.transaction_id;
    let mut other_transaction = good.clone();
    other_transaction[24] ^= 0x55;
    let mut other_type = good.clone();
    other_type[12] = 3;
    for bad in [
        &good[..20],
        &[],
        &packet.payload,
        &other_transaction,
        &other_type,
    ] {
        rig.channel.try_send(id, bad, false).unwrap();
    }
    wait_until("all rejected", || host.status().link.counters.rejected == 5);
    assert_eq!(host.status().beats, 0);
    rig.channel.try_send(id, &good, false).unwrap();
    wait_until("one beat", || host.status().beats == 1);
    // A wrong number is an answer, but no heartbeat.
    let packet = rig.channel.receive();
    let (reply, _) = rig.session.on_message(&packet.payload).unwrap();
    let mut wrong = reply.parts(&packet.payload).concat();
    wrong[28] ^= 1;
    rig.channel
        .try_send(packet.transaction_id, &wrong, false)
        .unwrap();
    wait_until("a wrong number", || host.status().wrong == 1);
    assert_eq!(host.status().beats, 1);
}

const UNKNOWN: &[Version] = &[Version::new(9, 9)];

#[test]
fn a_guest_without_a_common_version_is_left_alone() {
    let events = Events::default();
    let host = Heartbeat::with_period("ic", config(UNKNOWN), events.clone(), FAST);
    let mut rig = Rig::new(&events, host.vsp(), ic::heartbeat::Heartbeat);
    assert!(matches!(rig.serve(), GuestEvent::NoCommonVersion));
    wait_until("known", || {
        host.status().link.state == LinkState::NoCommonVersion
    });
    assert!(rig.channel.receive_within(3 * FAST).is_none());
}

#[test]
fn a_quiet_provider_only_sends_what_a_test_makes_it() {
    let events = Events::default();
    let host = Heartbeat::with_period("ic", config(heartbeat::VERSIONS), events.clone(), FAST);
    assert!(matches!(host.port().send_raw(b"x"), Err(PortError::Closed)));
    host.port().set_quiet(true);
    let tap = host.port().tap();
    let mut rig = Rig::new(&events, host.vsp(), ic::heartbeat::Heartbeat);
    assert!(rig.channel.receive_within(NEVER).is_none());
    host.port().send_raw(b"nonsense").unwrap();
    assert_eq!(rig.channel.receive().payload, b"nonsense");
    rig.channel.try_send(7, b"12345678", false).unwrap();
    assert_eq!(tap.recv_timeout(SOON).unwrap(), b"12345678");
    host.port().complete_raw(99, &[]).unwrap();
    assert_eq!(rig.channel.completion(99), b"");
}

fn clock(versions: &'static [Version]) -> (Arc<Timesync>, Rig<ic::timesync::Timesync>) {
    let events = Events::default();
    let clock: Arc<dyn ReferenceClock> = Arc::new(FixedClock);
    let host = Timesync::new("ic", config(versions), events.clone(), clock);
    host.set_samples(false);
    let rig = Rig::new(&events, host.vsp(), ic::timesync::Timesync);
    (Arc::new(host), rig)
}

fn unix_ms(sample: &Sample) -> i64 {
    sample.time.to_unix_ns().unwrap() / 1_000_000
}

#[test]
fn the_guest_is_told_the_time_when_it_comes() {
    for (first, reference) in [(0, Some(FixedClock::TIME.counter)), (1, None), (2, None)] {
        let (host, mut rig) = clock(&timesync::VERSIONS[first..]);
        assert_eq!(rig.negotiate(), timesync::VERSIONS[first].to_string());
        let sample = rig.expect_service();
        assert_eq!(sample.flags, Flags::SYNC);
        assert_eq!(sample.reference, reference);
        assert_eq!(unix_ms(&sample), FixedClock::TIME.unix_ns / 1_000_000);
        wait_until("a round trip", || host.status().round_trip_us.is_some());
    }
}

#[test]
fn an_offset_holds_until_it_is_changed() {
    let (host, mut rig) = clock(timesync::VERSIONS);
    rig.negotiate();
    rig.expect_service();
    for (flags, offset) in [
        (Flags::SAMPLE, 5000),
        (Flags::SYNC, -2000),
        (Flags::SYNC, 0),
    ] {
        let host = host.clone();
        let call = std::thread::spawn(move || host.send(flags, offset));
        let sample = rig.expect_service();
        assert_eq!(sample.flags, flags);
        assert_eq!(
            unix_ms(&sample),
            FixedClock::TIME.unix_ns / 1_000_000 + offset
        );
        call.join().unwrap().unwrap();
    }
    for impossible in [i64::MAX, i64::MIN, -20_000_000_000_000] {
        assert!(matches!(
            host.send(Flags::SYNC, impossible),
            Err(AskError::Impossible(_))
        ));
        assert_eq!(host.status().offset_ms, 0);
    }
    // One that the guest did not confirm does not hold.
    let asking = host.clone();
    let call = std::thread::spawn(move || asking.send(Flags::SYNC, 7000));
    rig.channel.receive();
    assert_eq!(host.status().offset_ms, 7000);
    rig.guest.close(rig.channel);
    call.join().unwrap().unwrap_err();
    assert_eq!(host.status().offset_ms, 0);
}

#[test]
fn shutdown_says_what_the_guest_answers() {
    let events = Events::default();
    let host = Shutdown::new("ic", config(shutdown::VERSIONS), events.clone());
    let ask = |host: &Shutdown, action| host.request(action, true, 5, "bye");
    assert!(matches!(
        ask(&host, Action::Reboot),
        Err(AskError::Port(PortError::Closed))
    ));
    let host = Arc::new(host);
    let mut rig = Rig::new(&events, host.vsp(), ic::shutdown::Shutdown::new(false));
    wait_until("negotiating", || {
        host.status().link.state == LinkState::Negotiating
    });
    assert!(matches!(
        ask(&host, Action::Reboot),
        Err(AskError::NotReady)
    ));
    assert_eq!(rig.negotiate(), "3.2");
    wait_until("ready", || host.status().link.state == LinkState::Ready);
    for action in [Action::Hibernate, Action::PowerOff, Action::Reboot] {
        let asking = host.clone();
        let call = std::thread::spawn(move || ask(&asking, action));
        let answer = (rig.expect_service(), call.join().unwrap());
        match (action, answer) {
            (
                Action::Hibernate,
                (Request::CannotHibernate, Err(AskError::Refused(0x8000_4005))),
            ) => {
                assert_eq!(host.status().agreed, None);
                assert_eq!(host.status().link.counters.refusals, 1);
            }
            (
                _,
                (
                    Request::Do {
                        action: asked,
                        force: true,
                    },
                    Ok(()),
                ),
            ) => {
                assert_eq!(asked, action);
                assert_eq!(host.status().agreed, Some(action.to_string()));
                rig.expect_event(|event| matches!(event, Event::ShutdownAgreed { .. }));
            }
            (action, other) => panic!("{action}: {other:?}"),
        }
    }
}

#[test]
fn the_one_who_asks_hears_of_the_end_of_the_channel() {
    let events = Events::default();
    let host = Arc::new(Shutdown::new(
        "ic",
        config(shutdown::VERSIONS),
        events.clone(),
    ));
    let mut rig = Rig::new(&events, host.vsp(), ic::shutdown::Shutdown::new(false));
    rig.negotiate();
    wait_until("ready", || host.status().link.state == LinkState::Ready);
    let asking = host.clone();
    let call = std::thread::spawn(move || asking.request(Action::PowerOff, false, 0, ""));
    let request = rig.channel.receive();
    let header = Header::read_from_prefix(request.payload.as_bytes());
    assert_eq!(header.unwrap().0.body_size.get(), 2060);
    rig.guest.close(rig.channel);
    assert!(matches!(
        call.join().unwrap(),
        Err(AskError::Port(PortError::Closed))
    ));
}
