// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the guest's requests: which answer counts for which request, and what hostile answers do.

use crate::net::control::*;
use crate::net::oid::Oid;
use crate::net::rndis::*;
use proptest::prelude::*;
use std::vec::Vec;
use zerocopy::{FromZeros as _, IntoBytes};

fn bytes<B: IntoBytes + zerocopy::Immutable>(message_type: MessageType, body: &B) -> Vec<u8> {
    let buf = RequestBuf::<128>::new(message_type, body, &[]).unwrap();
    buf.as_bytes().to_vec()
}

fn initialized(id: u32, factor: u32, packets: u32) -> Vec<u8> {
    let body = InitializeComplete {
        request_id: id.into(),
        packet_alignment_factor: factor.into(),
        max_packets_per_message: packets.into(),
        ..InitializeComplete::new_zeroed()
    };
    bytes(MessageType::INITIALIZE_COMPLETE, &body)
}

fn queried(id: u32, status: Status, value: &[u8]) -> Vec<u8> {
    let body = QueryComplete::new(id, status, value).unwrap();
    let buf = RequestBuf::<128>::new(MessageType::QUERY_COMPLETE, &body, value).unwrap();
    buf.as_bytes().to_vec()
}

fn set(id: u32, status: Status) -> Vec<u8> {
    let body = SetComplete {
        request_id: id.into(),
        status,
    };
    bytes(MessageType::SET_COMPLETE, &body)
}

fn alive(id: u32) -> Vec<u8> {
    let body = KeepaliveComplete {
        request_id: id.into(),
        status: Status::SUCCESS,
    };
    bytes(MessageType::KEEPALIVE_COMPLETE, &body)
}

fn reset() -> Vec<u8> {
    bytes(MessageType::RESET_COMPLETE, &ResetComplete::new_zeroed())
}

fn indicated(status: Status, value: &[u8]) -> Vec<u8> {
    let body = IndicateStatus {
        status,
        buffer_length: (value.len() as u32).into(),
        buffer_offset: 12.into(),
    };
    let buf = RequestBuf::<64>::new(MessageType::INDICATE_STATUS, &body, value).unwrap();
    buf.as_bytes().to_vec()
}

const QUERY: Kind = Kind::Query(Oid::GEN_LINK_SPEED);
const SET: Kind = Kind::Set(Oid::GEN_CURRENT_PACKET_FILTER);
const KINDS: [Kind; 5] = [Kind::Initialize, QUERY, SET, Kind::Keepalive, Kind::Reset];

/// The answers to a request of each kind.
fn answers(id: u32) -> [Vec<u8>; 5] {
    [
        initialized(id, 3, 8),
        queried(id, Status::SUCCESS, &[1, 2, 3, 4]),
        set(id, Status::SUCCESS),
        alive(id),
        reset(),
    ]
}

fn receive<'a, const N: usize>(
    requests: &mut Requests<N>,
    message: &'a [u8],
) -> Result<Answer<'a>, ControlError> {
    match requests.receive(message)? {
        Event::Answer(answer) => Ok(answer),
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_the_right_answer_counts_and_once() {
    for (n, kind) in KINDS.into_iter().enumerate() {
        let mut requests: Requests<2> = Requests::new();
        let id = requests.begin(kind).unwrap();
        for (m, answer) in answers(id).iter().enumerate() {
            if m == n {
                continue;
            }
            let expected = match (m, kind) {
                (4, _) => ControlError::Unknown(0),
                _ => ControlError::WrongKind(id, kind),
            };
            assert_eq!(receive(&mut requests, answer), Err(expected));
            assert!(requests.is_waiting(id));
        }
        if kind != Kind::Reset {
            for wrong in [0, id + 1, u32::MAX] {
                let answer = &answers(wrong)[n];
                assert_eq!(
                    receive(&mut requests, answer),
                    Err(ControlError::Unknown(wrong))
                );
            }
        }
        // Every truncation is refused, and the request still waits.
        let right = &answers(id)[n];
        for len in 0..right.len() {
            let mut short = right[..len].to_vec();
            assert!(matches!(
                receive(&mut requests, &short),
                Err(ControlError::Malformed(_))
            ));
            if len >= 8 {
                short[4..8].copy_from_slice(&(len as u32).to_le_bytes());
                assert!(matches!(
                    receive(&mut requests, &short),
                    Err(ControlError::Malformed(_))
                ));
            }
        }
        assert!(requests.is_waiting(id));
        let answer = receive(&mut requests, right).unwrap();
        assert_eq!((answer.request_id, answer.kind), (id, kind));
        assert!(answer.result.is_ok());
        assert!(!requests.is_waiting(id));
        let before = requests.counts();
        let again = receive(&mut requests, right);
        assert!(matches!(again, Err(ControlError::Unknown(_))));
        let after = requests.counts();
        assert_eq!(after.unknown, before.unknown + 1);
        assert_eq!(after.wrong_kind, before.wrong_kind);
        assert!(before.malformed >= right.len() as u64);
    }
}

#[test]
fn replies_and_failures() {
    let mut requests: Requests<4> = Requests::new();
    let id = requests.begin(QUERY).unwrap();
    let message = queried(id, Status::SUCCESS, &[1, 2]);
    let answer = receive(&mut requests, &message).unwrap();
    assert_eq!(answer.result, Ok(Reply::Value(&[1, 2])));
    // A short value is for the reader to notice.
    assert_eq!(value::<zerocopy::little_endian::U32>(&[1, 2]), None);

    let id = requests.begin(QUERY).unwrap();
    let message = queried(id, Status::NOT_SUPPORTED, &[9; 4]);
    let answer = receive(&mut requests, &message).unwrap();
    assert_eq!(answer.result, Err(Failure::Status(Status::NOT_SUPPORTED)));

    let id = requests.begin(SET).unwrap();
    let message = set(id, Status::INVALID_DATA);
    let answer = receive(&mut requests, &message).unwrap();
    assert_eq!(answer.result, Err(Failure::Status(Status::INVALID_DATA)));
}

#[test]
fn limits_are_checked() {
    let mut requests: Requests<4> = Requests::new();
    let mut initialize = |factor, packets| {
        let id = requests.begin(Kind::Initialize).unwrap();
        let message = initialized(id, factor, packets);
        match receive(&mut requests, &message).unwrap().result {
            Ok(Reply::Initialized(limits)) => Ok(limits),
            Ok(other) => panic!("{other:?}"),
            Err(failure) => Err(failure),
        }
    };
    for (factor, packets, expected) in [(0, 1, 1), (3, 8, 8), (12, 0, 1)] {
        let limits = Limits {
            max_packets: expected,
            max_transfer_size: 0,
            alignment: 1 << factor,
        };
        assert_eq!(initialize(factor, packets), Ok(limits));
    }
    for factor in [13, 31, 32, u32::MAX] {
        assert_eq!(initialize(factor, 8), Err(Failure::AlignmentFactor(factor)));
    }
    let mut requests: Requests<1> = Requests::new();
    let id = requests.begin(Kind::Initialize).unwrap();
    let mut message = initialized(id, 3, 8);
    message[28] = 1;
    let answer = receive(&mut requests, &message).unwrap();
    assert_eq!(answer.result, Err(Failure::Medium(Medium::new(1))));
}

#[test]
fn requests_that_are_given_up() {
    let mut requests: Requests<2> = Requests::new();
    let first = requests.begin(QUERY).unwrap();
    let second = requests.begin(SET).unwrap();
    assert_eq!(requests.begin(QUERY), None);
    assert!(requests.cancel(first));
    assert!(!requests.cancel(first));
    let third = requests.begin(QUERY).unwrap();
    assert!(![first, second, 0].contains(&third));
    // The answer to the first one comes late, and does not count for the third.
    assert_eq!(
        receive(&mut requests, &queried(first, Status::SUCCESS, &[])),
        Err(ControlError::Unknown(first))
    );
    assert!(requests.is_waiting(third) && requests.is_waiting(second));
    let mut requests: Requests<4> = Requests::new();
    assert!(requests.begin(Kind::Reset).is_some());
    assert_eq!(requests.begin(Kind::Reset), None);
}

#[test]
fn what_the_host_tells() {
    let mut requests: Requests<1> = Requests::new();
    let mut event = |status, value: &[u8]| {
        let message = indicated(status, value);
        requests
            .receive(&message)
            .map(|event| std::format!("{event:?}"))
    };
    assert_eq!(event(Status::MEDIA_CONNECT, &[]).unwrap(), "LinkUp");
    assert_eq!(event(Status::MEDIA_DISCONNECT, &[]).unwrap(), "LinkDown");
    assert_eq!(event(Status::NETWORK_CHANGE, &[]).unwrap(), "NetworkChange");
    let speed = 400_000_000u32.to_le_bytes();
    assert_eq!(
        event(Status::LINK_SPEED_CHANGE, &speed).unwrap(),
        "LinkSpeed(40000000000)"
    );
    assert_eq!(
        event(Status::LINK_SPEED_CHANGE, &speed[..3]),
        Err(ControlError::NoValue(Status::LINK_SPEED_CHANGE))
    );
    assert!(event(Status::new(77), &[]).unwrap().starts_with("Other"));
    let keepalive = Keepalive {
        request_id: 99.into(),
    };
    match requests.receive(&bytes(MessageType::KEEPALIVE, &keepalive)) {
        Ok(Event::Keepalive(answer)) => assert_eq!(answer.as_bytes(), alive(99)),
        other => panic!("{other:?}"),
    }
    for unexpected in [MessageType::PACKET, MessageType::QUERY, MessageType::new(0)] {
        assert_eq!(
            requests.receive(&bytes(unexpected, &[0u8; 40])).map(|_| ()),
            Err(ControlError::Unexpected(unexpected))
        );
    }
    assert_eq!(requests.counts().unexpected, 3);
    assert_eq!(requests.counts().malformed, 1);
}

#[derive(Clone, Debug)]
enum Op {
    Begin(usize),
    Cancel(u32),
    Answer(usize, u32),
    Garbage(Vec<u8>),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0usize..5).prop_map(Op::Begin),
        1 => (0u32..20).prop_map(Op::Cancel),
        4 => (0usize..5, 0u32..20).prop_map(|(kind, id)| Op::Answer(kind, id)),
        1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Op::Garbage),
    ]
}

proptest! {
    /// The machine does what a list of the requests that wait does.
    #[test]
    fn agrees_with_a_list(ops in prop::collection::vec(op(), 0..100)) {
        let mut requests: Requests<3> = Requests::new();
        let mut model: Vec<(u32, usize)> = Vec::new();
        let mut given = Vec::new();
        for op in ops {
            match op {
                Op::Begin(kind) => match requests.begin(KINDS[kind]) {
                    Some(id) => {
                        prop_assert!(id != 0 && !given.contains(&id));
                        given.push(id);
                        model.push((id, kind));
                    }
                    None => prop_assert!(model.len() == 3
                        || (kind == 4 && model.iter().any(|(_, kind)| *kind == 4))),
                },
                Op::Cancel(id) => {
                    let place = model.iter().position(|(waiting, _)| *waiting == id);
                    prop_assert_eq!(requests.cancel(id), place.is_some());
                    place.map(|place| model.remove(place));
                }
                Op::Answer(kind, id) => {
                    let place = model.iter().position(|(waiting, own)| {
                        *own == kind && (*waiting == id || kind == 4)
                    });
                    let message = &answers(id)[kind];
                    let result = receive(&mut requests, message);
                    prop_assert_eq!(result.is_ok(), place.is_some());
                    if let Some(place) = place {
                        prop_assert_eq!(result.unwrap().request_id, model.remove(place).0);
                    }
                }
                Op::Garbage(bytes) => {
                    let _ = requests.receive(&bytes);
                }
            }
            for id in &given {
                let waits = model.iter().any(|(waiting, _)| waiting == id);
                prop_assert_eq!(requests.is_waiting(*id), waits);
            }
        }
    }
}
