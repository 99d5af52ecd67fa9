// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's side of a channel: negotiation, and the messages of one service.

use super::frame::{Flags, Header, MessageType, Reply, Status, Version};
use super::negotiation::{self, Agreed, BadLists, Offered};
use super::FRAME_VERSIONS;
use core::fmt;

/// What a service makes of the messages that are its own.
pub trait Service {
    /// What its messages are called.
    const MESSAGE_TYPE: MessageType;

    /// The versions that it knows, the best first.
    const VERSIONS: &'static [Version];

    /// What a message asks for.
    type Event;

    /// A message of the agreed version has come. `reply` is the answer as it will be sent: success,
    /// with the body of the message.
    ///
    /// # Errors
    ///
    /// What is wrong with it. The message is not answered then, as other guests do.
    fn on_request(
        &mut self,
        version: Version,
        body: &[u8],
        reply: &mut Reply,
    ) -> Result<Self::Event, Malformed>;
}

/// What a message was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<E> {
    /// Versions were agreed on. The service may be used.
    Negotiated(Agreed),
    /// There is no common version. The service may not be used.
    NoCommonVersion,
    /// A message of the service.
    Service(E),
}

/// What is wrong with a message of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Too few bytes.
    TooShort {
        /// How many are needed, after the header or with it.
        needed: usize,
        /// How many there are.
        len: usize,
    },
    /// It says that it is an answer.
    NotARequest,
    /// Lists of versions that do not fit the message, or are too long.
    BadLists(BadLists),
    /// A message of the service before versions were agreed on.
    NotNegotiated,
    /// A message of another service.
    UnknownType(MessageType),
    /// A number that is out of the range that can be reckoned with.
    OutOfRange,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort { needed, len } => write!(f, "{len} bytes instead of {needed}"),
            Self::NotARequest => f.write_str("not a request"),
            Self::BadLists(lists) => write!(
                f,
                "impossible lists of versions ({} and {})",
                lists.frame, lists.message
            ),
            Self::NotNegotiated => f.write_str("no version was negotiated"),
            Self::UnknownType(message_type) => write!(f, "unknown type {message_type:?}"),
            Self::OutOfRange => f.write_str("number out of range"),
        }
    }
}

/// A message that was not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// What is wrong with it.
    pub why: Malformed,
    /// The answer, if there is one to be sent.
    pub reply: Option<Reply>,
}

/// The guest's side of a channel.
#[derive(Clone, Debug)]
pub struct Guest<S> {
    agreed: Option<Agreed>,
    service: S,
}

impl<S: Service> Guest<S> {
    /// The side of a channel that was opened just now.
    pub const fn new(service: S) -> Self {
        Self {
            agreed: None,
            service,
        }
    }

    /// The versions that were agreed on.
    pub fn agreed(&self) -> Option<Agreed> {
        self.agreed
    }

    /// The service.
    pub fn service(&self) -> &S {
        &self.service
    }

    /// A message of the host has come. Whatever comes back, the reply is for `payload`.
    ///
    /// # Errors
    ///
    /// The message is not served; it has changed nothing.
    pub fn on_message(&mut self, payload: &[u8]) -> Result<(Reply, Event<S::Event>), Rejected> {
        let silent = |why| Rejected { why, reply: None };
        let (header, body) = Header::split(payload).ok_or(silent(Malformed::TooShort {
            needed: super::HEADER_SIZE,
            len: payload.len(),
        }))?;
        if header.flags().contains(Flags::RESPONSE) {
            return Err(silent(Malformed::NotARequest));
        }
        let failure = |why| Rejected {
            why,
            reply: Some(Reply::new(&header, Status::FAIL)),
        };
        match header.message_type {
            MessageType::NEGOTIATE => self.negotiate(&header, body),
            message_type if message_type != S::MESSAGE_TYPE => {
                Err(failure(Malformed::UnknownType(message_type)))
            }
            _ => {
                let agreed = self.agreed.ok_or(failure(Malformed::NotNegotiated))?;
                let mut reply = Reply::new(&header, Status::OK);
                let event = self
                    .service
                    .on_request(agreed.message, body, &mut reply)
                    .map_err(silent)?;
                Ok((reply, Event::Service(event)))
            }
        }
    }

    fn negotiate(
        &mut self,
        header: &Header,
        body: &[u8],
    ) -> Result<(Reply, Event<S::Event>), Rejected> {
        let offered = Offered::parse(body).ok_or(Rejected {
            why: Malformed::TooShort {
                needed: size_of::<negotiation::Counts>(),
                len: body.len(),
            },
            reply: None,
        })?;
        let answer = |agreed, body: &[u8]| {
            let mut reply = Reply::new(header, Status::OK);
            reply.set_header(|header| header.body_size = negotiation::ANSWER_SIZE.into());
            // A question without versions has no room for those of the answer.
            let answer = negotiation::answer(agreed);
            reply.put(answer.get(..body.len()).unwrap_or(&answer));
            reply
        };
        let offered = offered.map_err(|lists| Rejected {
            why: Malformed::BadLists(lists),
            reply: Some(answer(None, body)),
        })?;
        self.agreed = offered.choose(FRAME_VERSIONS, S::VERSIONS);
        let event = match self.agreed {
            Some(agreed) => Event::Negotiated(agreed),
            None => Event::NoCommonVersion,
        };
        Ok((answer(self.agreed, body), event))
    }
}

/// Copies the body of a message; says how long it should be if it is too short.
pub(super) fn read_body<T: zerocopy::FromBytes>(body: &[u8]) -> Result<T, Malformed> {
    crate::message::read_prefix(body).ok_or(Malformed::TooShort {
        needed: size_of::<T>(),
        len: body.len(),
    })
}
