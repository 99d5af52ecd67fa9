// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The host's side of one GPADL.

use crate::gpadl::{GpadlAssembler, GpadlError, GpadlItem, Progress};
use crate::ids::{ChannelId, GpadlId};
use crate::message::{
    GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown, STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
};
use core::fmt;
use zerocopy::little_endian::{U32, U64};

/// The answer to GPADL_HEADER or its bodies.
fn created(channel_id: ChannelId, gpadl_id: GpadlId, status: u32) -> GpadlCreated {
    GpadlCreated {
        channel_id,
        gpadl_id,
        status: U32::new(status),
    }
}

/// The answer to a GPADL_HEADER that cannot be taken: the channel does not
/// [accept](super::Channel::accepts_gpadl) it, the id is in use, or there are too many.
pub fn refuse_gpadl(header: &GpadlHeader) -> GpadlCreated {
    created(header.channel_id, header.gpadl_id, STATUS_UNSUCCESSFUL)
}

/// What to do about a message that describes a GPADL.
#[derive(Clone, Copy, Debug)]
pub enum GpadlDecision {
    /// More bodies must come.
    Wait,
    /// The GPADL is complete: send this.
    Created(GpadlCreated),
}

/// The guest may not have this GPADL: send the answer, and forget the GPADL.
#[derive(Clone, Copy, Debug)]
pub struct GpadlRefused {
    /// What to send.
    pub answer: GpadlCreated,
    /// Why.
    pub error: GpadlError,
}

impl fmt::Display for GpadlRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl core::error::Error for GpadlRefused {}

/// What to do about GPADL_TEARDOWN.
#[derive(Clone, Copy, Debug)]
pub enum TeardownDecision {
    /// Forget the GPADL, then send this.
    Torndown(GpadlTorndown),
    /// The device still uses the memory; the last [`Gpadl::end_use`] has the answer.
    Later,
    /// Nothing: it is another channel's, or the teardown came twice.
    Ignore,
}

#[derive(Clone, Debug)]
enum GpadlState {
    Assembling(GpadlAssembler),
    /// Complete; `users` rings or devices use its memory.
    Live {
        users: u32,
        teardown: bool,
    },
}

/// The host's side of one GPADL.
#[derive(Clone, Debug)]
pub struct Gpadl {
    channel_id: ChannelId,
    gpadl_id: GpadlId,
    state: GpadlState,
}

impl Gpadl {
    /// GPADL_HEADER came, with the words after it. What it describes goes to `sink`.
    ///
    /// # Errors
    ///
    /// [`GpadlRefused`] when the description is not possible.
    pub fn create(
        header: &GpadlHeader,
        words: &[U64],
        sink: impl FnMut(GpadlItem),
    ) -> Result<(Self, GpadlDecision), GpadlRefused> {
        let (assembler, progress) =
            GpadlAssembler::start(header, words, sink).map_err(|error| GpadlRefused {
                answer: refuse_gpadl(header),
                error,
            })?;
        let mut gpadl = Self {
            channel_id: header.channel_id,
            gpadl_id: header.gpadl_id,
            state: GpadlState::Assembling(assembler),
        };
        let decision = gpadl.advance(progress);
        Ok((gpadl, decision))
    }

    /// GPADL_BODY came, with the words after it.
    ///
    /// # Errors
    ///
    /// [`GpadlRefused`] when the description is not possible. A body for a GPADL that is complete
    /// is nothing that an answer exists for: then `None`, and nothing is to be done.
    pub fn body(
        &mut self,
        body: &GpadlBody,
        words: &[U64],
        sink: impl FnMut(GpadlItem),
    ) -> Option<Result<GpadlDecision, GpadlRefused>> {
        let GpadlState::Assembling(assembler) = &mut self.state else {
            return None;
        };
        let progress = assembler.add(body, words, sink);
        Some(match progress {
            Ok(progress) => Ok(self.advance(progress)),
            Err(error) => Err(GpadlRefused {
                answer: created(self.channel_id, self.gpadl_id, STATUS_UNSUCCESSFUL),
                error,
            }),
        })
    }

    fn advance(&mut self, progress: Progress) -> GpadlDecision {
        match progress {
            Progress::More => GpadlDecision::Wait,
            Progress::Complete => {
                self.state = GpadlState::Live {
                    users: 0,
                    teardown: false,
                };
                GpadlDecision::Created(created(self.channel_id, self.gpadl_id, STATUS_SUCCESS))
            }
        }
    }

    /// The channel that the memory belongs to.
    pub fn channel_id(&self) -> ChannelId {
        self.channel_id
    }

    /// The GPADL's id.
    pub fn gpadl_id(&self) -> GpadlId {
        self.gpadl_id
    }

    /// Whether the description is complete.
    pub fn is_complete(&self) -> bool {
        matches!(self.state, GpadlState::Live { .. })
    }

    /// A ring or a device of channel `channel_id` starts to use the memory. `false`, and it must
    /// not: the GPADL is another channel's, is not complete, or is being torn down.
    #[must_use]
    pub fn start_use(&mut self, channel_id: ChannelId) -> bool {
        match &mut self.state {
            GpadlState::Live {
                users,
                teardown: false,
            } if channel_id == self.channel_id => match users.checked_add(1) {
                Some(more) => {
                    *users = more;
                    true
                }
                None => false,
            },
            _ => false,
        }
    }

    /// One of them does not use it any more. `Some`: forget the GPADL, then send this.
    pub fn end_use(&mut self) -> Option<GpadlTorndown> {
        match &mut self.state {
            GpadlState::Live { users, teardown } => {
                *users = users.saturating_sub(1);
                (*teardown && *users == 0).then_some(GpadlTorndown {
                    gpadl_id: self.gpadl_id,
                })
            }
            GpadlState::Assembling(_) => None,
        }
    }

    /// GPADL_TEARDOWN came. The guest may also give up one that is not complete.
    pub fn teardown(&mut self, request: &GpadlTeardown) -> TeardownDecision {
        if request.channel_id != self.channel_id || request.gpadl_id != self.gpadl_id {
            return TeardownDecision::Ignore;
        }
        match &mut self.state {
            GpadlState::Live { users, teardown } if *users > 0 => {
                if core::mem::replace(teardown, true) {
                    TeardownDecision::Ignore
                } else {
                    TeardownDecision::Later
                }
            }
            GpadlState::Live { .. } | GpadlState::Assembling(_) => {
                TeardownDecision::Torndown(GpadlTorndown {
                    gpadl_id: self.gpadl_id,
                })
            }
        }
    }
}
