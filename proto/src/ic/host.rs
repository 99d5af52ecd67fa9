// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The host's side of a channel: it asks, and judges the answers.

use super::frame::{Flags, Header, MessageType, Status, Version, HEADER_SIZE};
use super::negotiation::{self, Agreed, BadAnswer, Question};
use crate::pipe::PipeHeader;
use core::fmt;

/// What an answer of the guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostEvent<'a> {
    /// Versions were agreed on.
    Agreed(Agreed),
    /// The guest knows none of the versions.
    NoCommonVersion,
    /// The answer to a message of the service.
    Answer {
        /// What became of it.
        status: Status,
        /// The body, which may have some bytes more than that of the message.
        body: &'a [u8],
    },
}

/// What is wrong with a message of the guest. The session goes on as if it had not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostError {
    /// Too short for a header.
    TooShort {
        /// Number of bytes.
        len: usize,
    },
    /// It does not say that it is an answer.
    NotAnAnswer,
    /// Nobody waits for it: it is late, was answered before, or was never asked.
    Unasked {
        /// Transaction id of the answer.
        transaction_id: u8,
    },
    /// The answer is about something else than the question.
    WrongType(MessageType),
    /// The answer to the negotiation makes no sense.
    Negotiation(BadAnswer),
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort { len } => write!(f, "{len} bytes instead of {HEADER_SIZE}"),
            Self::NotAnAnswer => f.write_str("not an answer"),
            Self::Unasked { transaction_id } => {
                write!(
                    f,
                    "answer to transaction {transaction_id}, which is not open"
                )
            }
            Self::WrongType(message_type) => write!(f, "answer of type {message_type:?}"),
            Self::Negotiation(bad) => write!(f, "answer to the negotiation: {bad:?}"),
        }
    }
}

impl core::error::Error for HostError {}

/// The host's side of a channel. One question is open at a time; a new one takes the place of one
/// that was not answered.
#[derive(Clone, Debug)]
pub struct Host<'v> {
    message_type: MessageType,
    frames: &'v [Version],
    versions: &'v [Version],
    agreed: Option<Agreed>,
    last_id: u8,
    open: Option<MessageType>,
}

impl<'v> Host<'v> {
    /// The side of a channel that was opened just now, of the service with messages of that type,
    /// with the versions that the host knows.
    pub const fn new(
        message_type: MessageType,
        frames: &'v [Version],
        versions: &'v [Version],
    ) -> Self {
        Self {
            message_type,
            frames,
            versions,
            agreed: None,
            last_id: 0,
            open: None,
        }
    }

    /// The versions that were agreed on.
    pub fn agreed(&self) -> Option<Agreed> {
        self.agreed
    }

    /// Whether a question is open.
    pub fn is_waiting(&self) -> bool {
        self.open.is_some()
    }

    /// Header and body of a negotiation. `None` if a list of versions is too long.
    pub fn negotiate(&mut self) -> Option<(Header, Question)> {
        let question = Question::new(self.frames, self.versions)?;
        let version = Agreed {
            frame: Version::new(1, 0),
            message: Version::new(1, 0),
        };
        let len = question.as_bytes().len();
        let header = self.ask(MessageType::NEGOTIATE, version, len)?;
        self.agreed = None;
        Some((header, question))
    }

    /// The header of a message of the service with a body of `body_len` bytes, which follows it.
    /// `None` before versions were agreed on, or if the body is too long.
    pub fn request(&mut self, body_len: usize) -> Option<Header> {
        self.ask(self.message_type, self.agreed?, body_len)
    }

    fn ask(&mut self, message_type: MessageType, version: Agreed, len: usize) -> Option<Header> {
        let body_size = u16::try_from(len).ok()?;
        let message_size = u32::from(body_size).checked_add(HEADER_SIZE as u32)?;
        let pipe = PipeHeader::data(message_size.checked_sub(size_of::<PipeHeader>() as u32)?);
        self.last_id = self.last_id.wrapping_add(1);
        self.open = Some(message_type);
        Some(Header {
            pipe,
            frame_version: version.frame,
            message_type,
            message_version: version.message,
            body_size: body_size.into(),
            status: Status::OK,
            transaction_id: self.last_id,
            flags: (Flags::TRANSACTION | Flags::REQUEST).bits(),
            reserved: [0; 2],
        })
    }

    /// A message of the guest has come.
    pub fn on_message<'a>(&mut self, payload: &'a [u8]) -> Result<HostEvent<'a>, HostError> {
        let (header, body) =
            Header::split(payload).ok_or(HostError::TooShort { len: payload.len() })?;
        if !header.flags().contains(Flags::RESPONSE) {
            return Err(HostError::NotAnAnswer);
        }
        let unasked = HostError::Unasked {
            transaction_id: header.transaction_id,
        };
        let open = self.open.ok_or(unasked)?;
        if header.transaction_id != self.last_id {
            return Err(unasked);
        }
        if header.message_type != open {
            return Err(HostError::WrongType(header.message_type));
        }
        if open != MessageType::NEGOTIATE {
            self.open = None;
            return Ok(HostEvent::Answer {
                status: header.status,
                body,
            });
        }
        let agreed = negotiation::parse_answer(body, self.frames, self.versions)
            .map_err(HostError::Negotiation)?;
        self.open = None;
        self.agreed = agreed;
        Ok(match agreed {
            Some(agreed) => HostEvent::Agreed(agreed),
            None => HostEvent::NoCommonVersion,
        })
    }
}
