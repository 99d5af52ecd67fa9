// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the integration components: layouts, guest against host, odd peers, and arithmetic of
//! time.

use super::heartbeat::Heartbeat;
use super::negotiation::{parse_answer, BadAnswer, BadLists, Question, MAX_VERSIONS};
use super::shutdown::{Action, Request, Shutdown};
use super::timesync::{
    is_far_behind, HostTime, Leap, PlainBody, Quality, ReferenceBody, Sample, Stale, Timesync,
    MAX_AGE,
};
use super::*;
use proptest::prelude::*;
use std::{vec, vec::Vec};
use zerocopy::{FromZeros as _, IntoBytes as _};

/// A packet as the ring hands it over: rounded up to 8 bytes.
fn packet(header: &Header, body: &[u8]) -> Vec<u8> {
    let mut bytes = [header.as_bytes(), body].concat();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn answer<E>(result: Result<(Reply, Event<E>), Rejected>, request: &[u8]) -> (Vec<u8>, Event<E>) {
    let (reply, event) = match result {
        Ok(served) => served,
        Err(rejected) => panic!("{rejected:?}"),
    };
    (reply.parts(request).concat(), event)
}

/// Agrees on versions; returns the host's and the guest's side.
fn connect<S: Service>(service: S, versions: &[Version]) -> (Host<'_>, Guest<S>) {
    let mut host = Host::new(S::MESSAGE_TYPE, FRAME_VERSIONS, versions);
    let mut guest = Guest::new(service);
    let (header, question) = host.negotiate().unwrap();
    let request = packet(&header, question.as_bytes());
    let (reply, event) = answer(guest.on_message(&request), &request);
    assert_eq!(reply.len(), request.len());
    let agreed = guest.agreed().unwrap();
    assert!(matches!(event, Event::Negotiated(event) if event == agreed));
    assert_eq!(host.on_message(&reply), Ok(HostEvent::Agreed(agreed)));
    assert_eq!(host.agreed(), Some(agreed));
    (host, guest)
}

/// Sends one message of the service.
fn ask<'a, S: Service>(
    host: &mut Host<'_>,
    guest: &mut Guest<S>,
    body: &[u8],
    reply: &'a mut Vec<u8>,
) -> (Status, &'a [u8], S::Event) {
    let request = packet(&host.request(body.len()).unwrap(), body);
    let (bytes, event) = answer(guest.on_message(&request), &request);
    *reply = bytes;
    let Event::Service(event) = event else {
        panic!("not a message of the service");
    };
    match host.on_message(reply) {
        Ok(HostEvent::Answer { status, body }) => (status, body, event),
        other => panic!("{other:?}"),
    }
}

#[test]
fn header_is_laid_out_as_in_c() {
    let mut host = Host::new(MessageType::TIMESYNC, FRAME_VERSIONS, timesync::VERSIONS);
    let (header, question) = host.negotiate().unwrap();
    // Pipe: type and size; versions of frame, type, version, size, status, id, flags.
    let expected = [
        1, 0, 0, 0, 48, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 0, 0, 1, 3, 0, 0,
    ];
    assert_eq!(header.as_bytes(), expected);
    let expected = [
        2, 0, 3, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0,
    ];
    assert_eq!(question.as_bytes(), expected);
}

#[test]
fn best_common_version_is_taken() {
    let (_, guest) = connect(Heartbeat, heartbeat::VERSIONS);
    let newest = Agreed {
        frame: Version::new(3, 0),
        message: Version::new(3, 0),
    };
    assert_eq!(guest.agreed(), Some(newest));
    // The guest's order counts, not the host's.
    const MIXED: &[Version] = &[
        Version::new(1, 0),
        Version::new(9, 9),
        Version::new(3, 0),
        Version::new(3, 1),
    ];
    let (_, guest) = connect(Shutdown::new(false), MIXED);
    assert_eq!(guest.agreed().unwrap().message, Version::new(3, 1));
    let (_, guest) = connect(Timesync, &timesync::VERSIONS[2..]);
    assert_eq!(guest.agreed().unwrap().message, Version::new(1, 0));
}

#[test]
fn no_common_version_is_said_so() {
    let unknown = [Version::new(7, 0)];
    let mut host = Host::new(MessageType::HEARTBEAT, FRAME_VERSIONS, &unknown);
    let mut guest = Guest::new(Heartbeat);
    let (header, question) = host.negotiate().unwrap();
    let request = packet(&header, question.as_bytes());
    let (reply, event) = answer(guest.on_message(&request), &request);
    assert_eq!(event, Event::NoCommonVersion);
    assert_eq!(guest.agreed(), None);
    assert_eq!(host.on_message(&reply), Ok(HostEvent::NoCommonVersion));
    assert_eq!(host.request(8), None);
}

#[test]
fn versions_can_be_negotiated_again() {
    let (_, mut guest) = connect(Heartbeat, heartbeat::VERSIONS);
    const OLD: &[Version] = &[Version::new(1, 0)];
    let mut host = Host::new(MessageType::HEARTBEAT, OLD, OLD);
    let (header, question) = host.negotiate().unwrap();
    let request = packet(&header, question.as_bytes());
    let (reply, _) = answer(guest.on_message(&request), &request);
    let old = Agreed {
        frame: Version::new(1, 0),
        message: Version::new(1, 0),
    };
    assert_eq!(host.on_message(&reply), Ok(HostEvent::Agreed(old)));
    assert_eq!(guest.agreed(), Some(old));
}

#[test]
fn impossible_lists_are_refused_and_change_nothing() {
    let (mut host, mut guest) = connect(Heartbeat, heartbeat::VERSIONS);
    let before = guest.agreed();
    let (header, _) = host.negotiate().unwrap();
    let many = u16::try_from(MAX_VERSIONS).unwrap() + 1;
    for (frame, message, versions) in [
        (3u16, 0u16, 2usize),
        (1, 2, 2),
        (u16::MAX, u16::MAX, 4),
        (many, 1, 110),
        (1, many, 110),
    ] {
        let mut body = vec![0; 8 + 4 * versions];
        body[..2].copy_from_slice(&frame.to_le_bytes());
        body[2..4].copy_from_slice(&message.to_le_bytes());
        let request = [header.as_bytes(), &body].concat();
        let rejected = guest.on_message(&request).unwrap_err();
        assert_eq!(
            rejected.why,
            Malformed::BadLists(BadLists { frame, message })
        );
        let reply = rejected.reply.unwrap().parts(&request).concat();
        assert_eq!(reply.len(), request.len());
        // The host hears that there is no version.
        assert_eq!(reply[28..32], [0; 4]);
        assert_eq!(guest.agreed(), before);
    }
    let short = [header.as_bytes(), &[1, 0, 1, 0]].concat();
    let rejected = guest.on_message(&short).unwrap_err();
    assert_eq!(rejected.why, Malformed::TooShort { needed: 8, len: 4 });
    assert_eq!(rejected.reply, None);
    // Empty lists are proper ones.
    let none = packet(&header, &[0; 8]);
    let (reply, event) = answer(guest.on_message(&none), &none);
    assert_eq!((reply.len(), event), (none.len(), Event::NoCommonVersion));
}

#[test]
fn full_lists_are_read() {
    let mut frames = vec![Version::new(8, 8); MAX_VERSIONS];
    frames[MAX_VERSIONS - 1] = Version::new(1, 0);
    let mut versions = vec![Version::new(9, 9); MAX_VERSIONS];
    versions[MAX_VERSIONS - 1] = Version::new(3, 0);
    let mut host = Host::new(MessageType::HEARTBEAT, &frames, &versions);
    let mut guest = Guest::new(Heartbeat);
    let (header, question) = host.negotiate().unwrap();
    let request = packet(&header, question.as_bytes());
    let (reply, _) = answer(guest.on_message(&request), &request);
    assert!(matches!(host.on_message(&reply), Ok(HostEvent::Agreed(_))));
    versions.push(Version::new(1, 0));
    assert_eq!(Question::new(&[], &versions), None);
    assert_eq!(Question::new(&versions, &[]), None);
}

#[test]
fn guest_survives_an_odd_host() {
    let mut guest = Guest::new(Heartbeat);
    for len in 0..HEADER_SIZE {
        let rejected = guest.on_message(&vec![0; len]).unwrap_err();
        let why = Malformed::TooShort { needed: 28, len };
        assert_eq!(rejected, Rejected { why, reply: None });
    }
    // Before the negotiation.
    let (mut host, _) = connect(Heartbeat, heartbeat::VERSIONS);
    let request = packet(&host.request(40).unwrap(), &[0; 40]);
    let rejected = guest.on_message(&request).unwrap_err();
    assert_eq!(rejected.why, Malformed::NotNegotiated);
    let reply = rejected.reply.unwrap().parts(&request).concat();
    let (header, _) = Header::split(&reply).unwrap();
    assert_eq!(header.status, Status::FAIL);
    assert_eq!(header.flags(), Flags::TRANSACTION | Flags::RESPONSE);
    // Of another service.
    let (_, mut guest) = connect(Heartbeat, heartbeat::VERSIONS);
    let mut header = host.request(40).unwrap();
    header.message_type = MessageType::KVP;
    let rejected = guest.on_message(&packet(&header, &[0; 40])).unwrap_err();
    assert_eq!(rejected.why, Malformed::UnknownType(MessageType::KVP));
    assert!(rejected.reply.is_some());
    // An answer is never answered.
    let mut header = host.request(40).unwrap();
    header.flags = Flags::RESPONSE.bits();
    let rejected = guest.on_message(&packet(&header, &[0; 40])).unwrap_err();
    let why = Malformed::NotARequest;
    assert_eq!(rejected, Rejected { why, reply: None });
}

#[test]
fn host_survives_an_odd_guest() {
    let (mut host, mut guest) = connect(Heartbeat, heartbeat::VERSIONS);
    assert_eq!(
        host.on_message(&[0; 27]),
        Err(HostError::TooShort { len: 27 })
    );
    let request = packet(&host.request(40).unwrap(), &[0; 40]);
    // The request itself comes back.
    assert_eq!(host.on_message(&request), Err(HostError::NotAnAnswer));
    let (reply, _) = answer(guest.on_message(&request), &request);
    let mut other = reply.clone();
    other[12] = 3;
    let wrong = Err(HostError::WrongType(MessageType::SHUTDOWN));
    assert_eq!(host.on_message(&other), wrong);
    assert!(host.on_message(&reply).is_ok());
    // Twice.
    let unasked = Err(HostError::Unasked { transaction_id: 2 });
    assert_eq!(host.on_message(&reply), unasked);
    // Too late: another question is open.
    host.request(40).unwrap();
    assert_eq!(host.on_message(&reply), unasked);
    assert!(host.is_waiting());
}

#[test]
fn odd_answers_to_a_negotiation() {
    let ours = &[Version::new(3, 0)][..];
    let parse = |body: &[u8]| parse_answer(body, ours, ours);
    assert_eq!(parse(&[0; 7]), Err(BadAnswer::TooShort));
    assert_eq!(
        parse(&[1, 0, 1, 0, 0, 0, 0, 0, 3, 0, 0, 0]),
        Err(BadAnswer::TooShort)
    );
    let counts = BadAnswer::Counts(BadLists {
        frame: 1,
        message: 2,
    });
    assert_eq!(parse(&[1, 0, 2, 0, 0, 0, 0, 0]), Err(counts));
    let unknown = [1, 0, 1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0];
    let agreed = Agreed {
        frame: Version::new(3, 0),
        message: Version::new(2, 0),
    };
    assert_eq!(parse(&unknown), Err(BadAnswer::NotOffered(agreed)));
}

#[test]
fn heartbeats_are_counted_on() {
    let (mut host, mut guest) = connect(Heartbeat, heartbeat::VERSIONS);
    let mut reply = vec![];
    for sequence in [0, 1, 0x1234_5678_9abc, u64::MAX] {
        let body = heartbeat::Body::new(sequence);
        let (status, body, event) = ask(&mut host, &mut guest, body.as_bytes(), &mut reply);
        assert_eq!((status, event), (Status::OK, sequence));
        assert!(heartbeat::is_answer(sequence, body));
        assert!(!heartbeat::is_answer(sequence.wrapping_add(1), body));
    }
    // The number alone is enough; less is not.
    let (_, body, _) = ask(&mut host, &mut guest, &[7; 8], &mut reply);
    assert_eq!(body[..8], [8, 7, 7, 7, 7, 7, 7, 7]);
    let short = [host.request(7).unwrap().as_bytes(), &[0; 7]].concat();
    let rejected = guest.on_message(&short).unwrap_err();
    assert_eq!(rejected.why, Malformed::TooShort { needed: 8, len: 7 });
    assert_eq!(rejected.reply, None);
}

#[test]
fn shutdown_says_yes_before_it_begins() {
    let mut reply = vec![];
    for (can_hibernate, action, force) in [
        (false, Action::PowerOff, false),
        (false, Action::PowerOff, true),
        (false, Action::Reboot, false),
        (true, Action::Reboot, true),
        (true, Action::Hibernate, false),
        (true, Action::Hibernate, true),
    ] {
        let (mut host, mut guest) = connect(Shutdown::new(can_hibernate), shutdown::VERSIONS);
        let body = shutdown::Body::new(action, force, 60, "bye");
        assert_eq!(body.action(), Some((action, force)));
        let (status, _, event) = ask(&mut host, &mut guest, body.as_bytes(), &mut reply);
        assert_eq!((status, event), (Status::OK, Request::Do { action, force }));
        // The text goes back as it came.
        assert_eq!(reply[28..28 + 2060], *body.as_bytes());
    }
}

#[test]
fn shutdown_refuses_what_it_cannot_do() {
    let mut reply = vec![];
    let (mut host, mut guest) = connect(Shutdown::new(false), shutdown::VERSIONS);
    let body = shutdown::Body::new(Action::Hibernate, false, 60, "");
    let (status, _, event) = ask(&mut host, &mut guest, body.as_bytes(), &mut reply);
    assert_eq!((status, event), (Status::FAIL, Request::CannotHibernate));
    for flags in [6, 7, 8, 0x8000_0000, u32::MAX] {
        let mut body = shutdown::Body::new(Action::PowerOff, false, 60, "");
        body.flags = flags.into();
        assert_eq!(body.action(), None);
        let (status, _, event) = ask(&mut host, &mut guest, body.as_bytes(), &mut reply);
        assert_eq!((status, event), (Status::FAIL, Request::Unknown { flags }));
    }
    let request = [host.request(2059).unwrap().as_bytes(), &[0; 2059]].concat();
    let rejected = guest.on_message(&request).unwrap_err();
    let why = Malformed::TooShort {
        needed: 2060,
        len: 2059,
    };
    assert_eq!(rejected, Rejected { why, reply: None });
}

#[test]
fn text_of_a_shutdown_always_ends() {
    let long = "x".repeat(3000);
    let body = shutdown::Body::new(Action::PowerOff, false, 0, &long);
    assert_eq!(body.message[1022].get(), u16::from(b'x'));
    assert_eq!(body.message[1023].get(), 0);
}

/// 2026-11-22 12:00:00 UTC, in nanoseconds since 1970.
const NOON: i64 = 1_795_348_800_000_000_000;

#[test]
fn times_are_converted() {
    let epoch = HostTime::from_raw(116_444_736_000_000_000);
    assert_eq!(epoch.to_unix_ns(), Some(0));
    assert_eq!(HostTime::from_raw(epoch.raw() - 1).to_unix_ns(), None);
    assert_eq!(HostTime::from_raw(0).to_unix_ns(), None);
    assert_eq!(HostTime::from_raw(u64::MAX).to_unix_ns(), None);
    let noon = HostTime::from_unix_ns(NOON).unwrap();
    assert_eq!(noon.to_unix_ns(), Some(NOON));
    assert_eq!(
        HostTime::from_unix_ns(NOON + 199).unwrap().raw(),
        noon.raw() + 1
    );
    assert_eq!(
        HostTime::from_unix_ns(i64::MAX).unwrap().to_unix_ns(),
        Some(i64::MAX / 100 * 100)
    );
    // 1677: before 1970, but after 1601.
    assert_eq!(HostTime::from_unix_ns(i64::MIN).unwrap().to_unix_ns(), None);
}

fn sample(reference: Option<u64>) -> Sample {
    Sample {
        time: HostTime::from_unix_ns(NOON).unwrap(),
        reference,
        flags: timesync::Flags::SAMPLE,
        quality: None,
    }
}

#[test]
fn reference_counter_makes_up_for_the_way() {
    // 3 ms on its way.
    let anchor = sample(Some(1_000_000)).anchor(1_030_000).unwrap();
    assert_eq!(anchor.unix_ns(1_030_000), Ok(NOON + 3_000_000));
    // A second later.
    assert_eq!(anchor.unix_ns(11_030_000), Ok(NOON + 1_003_000_000));
    assert_eq!(anchor.age(11_030_000), 10_000_000);
    // Without it, the way is not known.
    let anchor = sample(None).anchor(1_030_000).unwrap();
    assert_eq!(anchor.unix_ns(1_030_000), Ok(NOON));
    // Another CPU's counter is a little ahead.
    let anchor = sample(Some(1_000_010)).anchor(1_000_000).unwrap();
    assert_eq!(anchor.unix_ns(1_000_000), Ok(NOON - 1000));
    assert_eq!(anchor.unix_ns(999_990), Ok(NOON - 2000));
}

#[test]
fn old_samples_are_stale() {
    let anchor = sample(Some(500)).anchor(500).unwrap();
    assert!(anchor.unix_ns(500 + MAX_AGE).is_ok());
    assert_eq!(anchor.unix_ns(501 + MAX_AGE), Err(Stale));
    assert_eq!(anchor.unix_ns(u64::MAX), Err(Stale));
    let late = sample(Some(u64::MAX)).anchor(u64::MAX).unwrap();
    assert_eq!(late.unix_ns(0), Err(Stale));
}

#[test]
fn impossible_times_give_no_anchor() {
    assert_eq!(sample(Some(u64::MAX)).anchor(0), None);
    assert_eq!(sample(Some(0)).anchor(u64::MAX), None);
    // Before 1970 after all.
    assert_eq!(sample(Some(1 << 60)).anchor(0), None);
    let mut late = sample(Some(0));
    late.time = HostTime::from_unix_ns(i64::MAX).unwrap();
    assert!(late.anchor(0).is_some());
    assert_eq!(late.anchor(100), None);
}

#[test]
fn only_clocks_that_are_far_behind_are_set_unasked() {
    let (guest, second) = (NOON, 1_000_000_000);
    assert!(is_far_behind(guest, guest + 5 * second));
    assert!(!is_far_behind(guest, guest + 5 * second - 1));
    assert!(!is_far_behind(guest, guest - 100 * second));
    assert!(!is_far_behind(i64::MIN, i64::MAX));
}

#[test]
fn samples_of_all_versions() {
    let time = HostTime::from_unix_ns(NOON).unwrap();
    let mut reply = vec![];
    let new = ReferenceBody {
        parent_time: time.raw().into(),
        reference_time: 77.into(),
        flags: timesync::Flags::SYNC.bits(),
        leap: Leap::INSERT,
        stratum: 2,
        reserved: [0; 3],
    };
    let (mut host, mut guest) = connect(Timesync, timesync::VERSIONS);
    let (status, body, event) = ask(&mut host, &mut guest, new.as_bytes(), &mut reply);
    assert_eq!((status, &body[..22]), (Status::OK, new.as_bytes()));
    let expected = Sample {
        time,
        reference: Some(77),
        flags: timesync::Flags::SYNC,
        quality: Some(Quality {
            leap: Leap::INSERT,
            stratum: 2,
        }),
    };
    assert_eq!(event, expected);

    let old = PlainBody {
        parent_time: time.raw().into(),
        flags: timesync::Flags::SAMPLE.bits(),
        ..PlainBody::new_zeroed()
    };
    for version in &timesync::VERSIONS[1..] {
        let (mut host, mut guest) = connect(Timesync, std::slice::from_ref(version));
        let (_, _, event) = ask(&mut host, &mut guest, old.as_bytes(), &mut reply);
        assert_eq!(event, sample(None));
        // A body of version 4 is too short for this one.
        let short = [host.request(22).unwrap().as_bytes(), new.as_bytes()].concat();
        let why = guest.on_message(&short).unwrap_err().why;
        assert_eq!(
            why,
            Malformed::TooShort {
                needed: 25,
                len: 22
            }
        );
    }
    let mut bad = new;
    bad.parent_time = u64::MAX.into();
    let request = packet(&host.request(22).unwrap(), bad.as_bytes());
    let rejected = guest.on_message(&request).unwrap_err();
    assert_eq!(rejected.why, Malformed::OutOfRange);
}

proptest! {
    #[test]
    fn guest_survives_any_bytes(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..96), 0..8)) {
        let mut heartbeat = Guest::new(Heartbeat);
        let mut shutdown = Guest::new(Shutdown::new(true));
        let (_, mut timesync) = connect(Timesync, timesync::VERSIONS);
        for message in &messages {
            let _ = heartbeat.on_message(message);
            let _ = shutdown.on_message(message);
            if let Ok((reply, _)) = timesync.on_message(message) {
                prop_assert_eq!(reply.parts(message).concat().len(), message.len());
            }
        }
    }

    #[test]
    fn guest_survives_almost_right_messages(
        message_type in 0u16..8,
        flags in any::<u8>(),
        body in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let (mut host, mut guest) = connect(Heartbeat, heartbeat::VERSIONS);
        let mut header = host.request(body.len()).unwrap();
        header.message_type = MessageType::new(message_type);
        header.flags = flags;
        let request = packet(&header, &body);
        let reply = match guest.on_message(&request) {
            Ok((reply, _)) => Some(reply),
            Err(rejected) => rejected.reply,
        };
        if let Some(reply) = reply {
            let bytes = reply.parts(&request).concat();
            prop_assert_eq!(bytes.len(), request.len());
            // Whatever it says, the host survives it, too.
            let _ = host.on_message(&bytes);
        }
    }

    #[test]
    fn host_survives_any_bytes(message in prop::collection::vec(any::<u8>(), 0..96)) {
        let (mut host, _) = connect(Heartbeat, heartbeat::VERSIONS);
        host.negotiate().unwrap();
        let _ = host.on_message(&message);
    }

    #[test]
    fn arithmetic_of_time_never_overflows(time: u64, reference: Option<u64>, now: u64, later: u64) {
        let sample = Sample { time: HostTime::from_raw(time), ..sample(reference) };
        if let Some(anchor) = sample.anchor(now) {
            if let Ok(ns) = anchor.unix_ns(later) {
                prop_assert!(ns >= 0);
                prop_assert!(now.abs_diff(later) <= MAX_AGE);
            }
            let _ = anchor.age(later);
        }
    }

    #[test]
    fn times_go_both_ways(ns in 0..i64::MAX) {
        let back = HostTime::from_unix_ns(ns).unwrap().to_unix_ns().unwrap();
        prop_assert!((0..100).contains(&(ns - back)));
    }
}
