// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's side of RNDIS, but for frames: requests and their answers, and what the host tells by
//! itself.
//!
//! [`Requests`] gives every request a number. An answer counts if a request with its number waits, and
//! if it is of the kind that answers that request; then the request is over. A late, second, or wrong
//! answer, and one that is too short, changes nothing and is counted.
//!
//! ```
//! use hv_proto::net::control::{Event, Kind, Reply, Requests};
//! use hv_proto::net::oid::Oid;
//! use hv_proto::net::rndis::{self, MessageType, QueryComplete, RequestBuf, Status};
//! use zerocopy::little_endian::U32;
//!
//! let mut requests: Requests<4> = Requests::new();
//! let id = requests.begin(Kind::Query(Oid::GEN_LINK_SPEED)).unwrap();
//! let sent = RequestBuf::<64>::query(id, Oid::GEN_LINK_SPEED, &[]).unwrap();
//! # let _ = sent;
//!
//! let speed = 100_000u32.to_le_bytes();
//! let body = QueryComplete::new(id, Status::SUCCESS, &speed).unwrap();
//! let received = RequestBuf::<64>::new(MessageType::QUERY_COMPLETE, &body, &speed).unwrap();
//! match requests.receive(received.as_bytes()) {
//!     Ok(Event::Answer(answer)) => {
//!         assert_eq!(answer.request_id, id);
//!         let Ok(Reply::Value(value)) = answer.result else { panic!() };
//!         assert_eq!(rndis::value::<U32>(value).map(|speed| speed.get()), Some(100_000));
//!     }
//!     other => panic!("{other:?}"),
//! }
//! assert!(requests.receive(received.as_bytes()).is_err());
//! assert_eq!(requests.counts().unknown, 1);
//! ```
//!
//! A state machine only: it does not send, wait, lock or allocate. Keep it under a lock.
//!
//! Source: `drivers/net/hyperv/rndis_filter.c` of the kernel, and its weak places.

use super::oid::Oid;
use super::rndis::*;
use core::fmt;
use zerocopy::little_endian::U32;

/// What a guest asks of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To begin.
    Initialize,
    /// The value of an object.
    Query(Oid),
    /// To change the value of an object.
    Set(Oid),
    /// To drop what is outstanding. Its answer has no number: only one can wait.
    Reset,
    /// Whether it is there.
    Keepalive,
}

/// What the host has said about messages when it was initialized. The numbers are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most messages in a row that the host takes; at least 1.
    pub max_packets: u32,
    /// The largest message that the host says it takes, in bytes; not checked.
    pub max_transfer_size: u32,
    /// Alignment of messages in a row, in bytes: a power of two, at most 4096.
    pub alignment: u32,
}

impl Limits {
    /// What holds before the host has said anything.
    pub const DEFAULT: Self = Self {
        max_packets: 8,
        max_transfer_size: 0x4000,
        alignment: 8,
    };

    /// Checks what the host has said.
    fn check(complete: &InitializeComplete) -> Result<Self, Failure> {
        let factor = complete.packet_alignment_factor.get();
        if factor > MAX_ALIGNMENT_FACTOR {
            return Err(Failure::AlignmentFactor(factor));
        }
        if complete.medium != Medium::ETHERNET {
            return Err(Failure::Medium(complete.medium));
        }
        Ok(Self {
            max_packets: complete.max_packets_per_message.get().max(1),
            max_transfer_size: complete.max_transfer_size.get(),
            alignment: 1 << factor,
        })
    }
}

/// Why a request that was answered has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The host says so.
    Status(Status),
    /// The host wants an impossible alignment.
    AlignmentFactor(u32),
    /// The adapter is not one of Ethernet.
    Medium(Medium),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "RNDIS request failed with {status:?}"),
            Self::AlignmentFactor(factor) => write!(f, "host wants alignment to 2^{factor}"),
            Self::Medium(medium) => write!(f, "adapter has unknown {medium:?}"),
        }
    }
}

impl core::error::Error for Failure {}

/// What the host has answered to a request that it has carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// It is initialized.
    Initialized(Limits),
    /// The value of an object, as long as the host has made it: [`value`] reads it.
    Value(&'a [u8]),
    /// It is done.
    Done,
}

/// The answer to a request, which is over with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    /// Number of the request.
    pub request_id: u32,
    /// What it was.
    pub kind: Kind,
    /// What has become of it.
    pub result: Result<Reply<'a>, Failure>,
}

/// What a message of the host means.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A request is answered.
    Answer(Answer<'a>),
    /// The link is up.
    LinkUp,
    /// The link is down.
    LinkDown,
    /// The adapter is in another network.
    NetworkChange,
    /// The link has this speed, in bits in a second.
    LinkSpeed(u64),
    /// Something else has changed, of which the guest need not know.
    Other(Status),
    /// The host wants to know whether the guest is there: send this.
    Keepalive(RequestBuf<16>),
}

/// Why a message of the host is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ControlError {
    /// It is no message.
    Malformed(RndisError),
    /// No request with this number waits: the answer is late, or came before.
    Unknown(u32),
    /// The request with this number is of another kind. It still waits.
    WrongKind(u32, Kind),
    /// The status needs a value and has none.
    NoValue(Status),
    /// A guest has no use for such a message.
    Unexpected(MessageType),
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Malformed(error) => write!(f, "{error}"),
            Self::Unknown(id) => write!(f, "no request {id} waits for an answer"),
            Self::WrongKind(id, kind) => write!(f, "wrong answer to request {id}, {kind:?}"),
            Self::NoValue(status) => write!(f, "{status:?} without a value"),
            Self::Unexpected(message_type) => write!(f, "unexpected {message_type:?}"),
        }
    }
}

impl core::error::Error for ControlError {}

/// How many messages were dropped, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// [`ControlError::Malformed`] and [`ControlError::NoValue`].
    pub malformed: u64,
    /// [`ControlError::Unknown`].
    pub unknown: u64,
    /// [`ControlError::WrongKind`].
    pub wrong_kind: u64,
    /// [`ControlError::Unexpected`].
    pub unexpected: u64,
}

/// The requests of an adapter that wait for an answer: at most `N`.
#[derive(Clone, Copy, Debug)]
pub struct Requests<const N: usize> {
    waiting: [Option<(u32, Kind)>; N],
    last_id: u32,
    counts: Counts,
}

impl<const N: usize> Requests<N> {
    /// None waits.
    pub const fn new() -> Self {
        Self {
            waiting: [None; N],
            last_id: 0,
            counts: Counts {
                malformed: 0,
                unknown: 0,
                wrong_kind: 0,
                unexpected: 0,
            },
        }
    }

    /// A request is to be sent. Returns its number, which is not 0 and was not used for a long time;
    /// `None` if `N` requests wait, or another reset.
    pub fn begin(&mut self, kind: Kind) -> Option<u32> {
        if kind == Kind::Reset && self.find(|_, waiting| waiting == Kind::Reset).is_some() {
            return None;
        }
        // Among N + 1 numbers in a row there is one that none of the N requests has.
        for _ in 0..=N {
            self.last_id = self.last_id.wrapping_add(1).max(1);
            if !self.is_waiting(self.last_id) {
                break;
            }
        }
        let place = self.waiting.iter_mut().find(|place| place.is_none())?;
        *place = Some((self.last_id, kind));
        Some(self.last_id)
    }

    /// The request is given up, or could not be sent. Says whether it still waited.
    pub fn cancel(&mut self, request_id: u32) -> bool {
        self.take(|id, _| id == request_id).is_some()
    }

    /// Whether the request waits for its answer.
    pub fn is_waiting(&self, request_id: u32) -> bool {
        self.find(|id, _| id == request_id).is_some()
    }

    /// How many messages were dropped.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Takes a private copy of what the host has sent in a transfer range that is not a frame.
    ///
    /// # Errors
    /// [`ControlError`]; it is counted, and nothing else has changed.
    pub fn receive<'a>(&mut self, bytes: &'a [u8]) -> Result<Event<'a>, ControlError> {
        let result = self.understand(bytes);
        let count = match result {
            Ok(_) => return result,
            Err(ControlError::Malformed(_) | ControlError::NoValue(_)) => {
                &mut self.counts.malformed
            }
            Err(ControlError::Unknown(_)) => &mut self.counts.unknown,
            Err(ControlError::WrongKind(..)) => &mut self.counts.wrong_kind,
            Err(ControlError::Unexpected(_)) => &mut self.counts.unexpected,
        };
        *count = count.saturating_add(1);
        result
    }

    fn understand<'a>(&mut self, bytes: &'a [u8]) -> Result<Event<'a>, ControlError> {
        match HostMessage::parse(bytes).map_err(ControlError::Malformed)? {
            HostMessage::InitializeComplete(complete) => self.answer(
                complete.request_id,
                |kind| kind == Kind::Initialize,
                complete.status,
                || Limits::check(&complete).map(Reply::Initialized),
            ),
            HostMessage::QueryComplete(complete, value) => self.answer(
                complete.request_id,
                |kind| matches!(kind, Kind::Query(_)),
                complete.status,
                || Ok(Reply::Value(value)),
            ),
            HostMessage::SetComplete(complete) => self.answer(
                complete.request_id,
                |kind| matches!(kind, Kind::Set(_)),
                complete.status,
                || Ok(Reply::Done),
            ),
            HostMessage::KeepaliveComplete(complete) => self.answer(
                complete.request_id,
                |kind| kind == Kind::Keepalive,
                complete.status,
                || Ok(Reply::Done),
            ),
            HostMessage::ResetComplete(complete) => {
                let reset = self.find(|_, kind| kind == Kind::Reset);
                let (id, _) = reset.ok_or(ControlError::Unknown(0))?;
                let is_reset = |kind| kind == Kind::Reset;
                self.answer(id.into(), is_reset, complete.status, || Ok(Reply::Done))
            }
            HostMessage::Keepalive(keepalive) => {
                let body = KeepaliveComplete {
                    request_id: keepalive.request_id,
                    status: Status::SUCCESS,
                };
                RequestBuf::new(MessageType::KEEPALIVE_COMPLETE, &body, &[])
                    .map(Event::Keepalive)
                    .ok_or(ControlError::Unexpected(MessageType::KEEPALIVE))
            }
            HostMessage::IndicateStatus(status, buffer) => match status {
                Status::MEDIA_CONNECT => Ok(Event::LinkUp),
                Status::MEDIA_DISCONNECT => Ok(Event::LinkDown),
                Status::NETWORK_CHANGE => Ok(Event::NetworkChange),
                Status::LINK_SPEED_CHANGE => value::<U32>(buffer)
                    .map(|speed| Event::LinkSpeed(link_speed(speed.get())))
                    .ok_or(ControlError::NoValue(status)),
                other => Ok(Event::Other(other)),
            },
            HostMessage::Packet => Err(ControlError::Unexpected(MessageType::PACKET)),
            HostMessage::Other(other) => Err(ControlError::Unexpected(other)),
        }
    }

    /// The answer to request `request_id`, if it waits and `fits` says that its kind is right.
    fn answer<'a>(
        &mut self,
        request_id: U32,
        fits: impl FnOnce(Kind) -> bool,
        status: Status,
        reply: impl FnOnce() -> Result<Reply<'a>, Failure>,
    ) -> Result<Event<'a>, ControlError> {
        let request_id = request_id.get();
        let (_, kind) = self
            .find(|id, _| id == request_id)
            .ok_or(ControlError::Unknown(request_id))?;
        if !fits(kind) {
            return Err(ControlError::WrongKind(request_id, kind));
        }
        self.take(|id, _| id == request_id);
        let result = match status {
            Status::SUCCESS => reply(),
            status => Err(Failure::Status(status)),
        };
        Ok(Event::Answer(Answer {
            request_id,
            kind,
            result,
        }))
    }

    fn find(&self, is: impl Fn(u32, Kind) -> bool) -> Option<(u32, Kind)> {
        let mut waiting = self.waiting.iter().flatten().copied();
        waiting.find(|&(id, kind)| is(id, kind))
    }

    fn take(&mut self, is: impl Fn(u32, Kind) -> bool) -> Option<(u32, Kind)> {
        self.waiting
            .iter_mut()
            .find(|place| place.is_some_and(|(id, kind)| is(id, kind)))?
            .take()
    }
}

impl<const N: usize> Default for Requests<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// A speed in bits in a second, from the unit of RNDIS: 100 bits in a second.
pub fn link_speed(raw: u32) -> u64 {
    u64::from(raw).saturating_mul(100)
}
