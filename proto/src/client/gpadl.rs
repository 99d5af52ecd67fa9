// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's side of one GPADL.

use super::{Outcome, Unexpected};
use crate::ids::{ChannelId, GpadlId};
use crate::message::{GpadlCreated, GpadlTeardown, GpadlTorndown};

/// Where a GPADL stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpadlState {
    /// The host has not heard of it.
    Unsent,
    /// The host is being told of it, or its answer has not come.
    Creating,
    /// The host may use the memory.
    Live,
    /// The host did not want it.
    Refused,
    /// The host shall let go of the memory, and has not said that it did.
    TearingDown,
    /// The host has let go of the memory.
    Released,
    /// The host never said that it let go of the memory, and it is not waited for any more.
    Leaked,
}

/// The guest's side of one GPADL.
///
/// The owner of the memory asks [`may_free`](Self::may_free) at the end; if the answer is no, it
/// must leak the memory, since the host may write to it at any later time.
#[derive(Clone, Debug)]
pub struct Gpadl {
    channel_id: ChannelId,
    gpadl_id: GpadlId,
    state: GpadlState,
}

impl Gpadl {
    /// A GPADL of which the host has not heard.
    pub const fn new(channel_id: ChannelId, gpadl_id: GpadlId) -> Self {
        Self {
            channel_id,
            gpadl_id,
            state: GpadlState::Unsent,
        }
    }

    /// Its id.
    pub fn gpadl_id(&self) -> GpadlId {
        self.gpadl_id
    }

    /// Where it stands.
    pub fn state(&self) -> GpadlState {
        self.state
    }

    /// Whether the memory may be used for something else: the host has never heard of it, did
    /// not want it, or has let go of it.
    pub fn may_free(&self) -> bool {
        matches!(
            self.state,
            GpadlState::Unsent | GpadlState::Refused | GpadlState::Released
        )
    }

    /// The first message that describes the memory is about to be posted. `false`, and it must
    /// not be: the GPADL was sent before.
    #[must_use]
    pub fn start(&mut self) -> bool {
        if self.state != GpadlState::Unsent {
            return false;
        }
        self.state = GpadlState::Creating;
        true
    }

    /// Not one of the messages could be posted.
    pub fn not_posted(&mut self) {
        if self.state == GpadlState::Creating {
            self.state = GpadlState::Unsent;
        }
    }

    /// GPADL_CREATED came.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] when it is not waited for, or names another GPADL or channel.
    pub fn created(&mut self, message: &GpadlCreated) -> Result<Outcome, Unexpected> {
        if message.gpadl_id != self.gpadl_id || message.channel_id != self.channel_id {
            return Err(Unexpected::WrongId);
        }
        if self.state != GpadlState::Creating {
            return Err(Unexpected::NotWaited);
        }
        let outcome = Outcome::of(message.status);
        self.state = match outcome {
            Outcome::Done => GpadlState::Live,
            Outcome::Refused(_) => GpadlState::Refused,
        };
        Ok(outcome)
    }

    /// The memory is wanted back; also when only some of the messages could be posted, and when
    /// GPADL_CREATED does not come. `Some`: post this, and wait for GPADL_TORNDOWN. `None`: there
    /// is nothing to tear down.
    pub fn teardown(&mut self) -> Option<GpadlTeardown> {
        match self.state {
            GpadlState::Creating | GpadlState::Live => {
                self.state = GpadlState::TearingDown;
                Some(GpadlTeardown {
                    channel_id: self.channel_id,
                    gpadl_id: self.gpadl_id,
                })
            }
            _ => None,
        }
    }

    /// GPADL_TORNDOWN came.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] when it is not waited for, or names another GPADL.
    pub fn torndown(&mut self, message: &GpadlTorndown) -> Result<(), Unexpected> {
        if message.gpadl_id != self.gpadl_id {
            return Err(Unexpected::WrongId);
        }
        if self.state != GpadlState::TearingDown {
            return Err(Unexpected::NotWaited);
        }
        self.state = GpadlState::Released;
        Ok(())
    }

    /// GPADL_TEARDOWN could not be posted, or GPADL_TORNDOWN does not come.
    pub fn teardown_timed_out(&mut self) {
        if self.state == GpadlState::TearingDown {
            self.state = GpadlState::Leaked;
        }
    }

    /// The host has rescinded the channel, or has answered UNLOAD: with it, it has let go of all
    /// memory of the channel, and answers no teardown any more.
    pub fn host_let_go(&mut self) {
        if !self.may_free() {
            self.state = GpadlState::Released;
        }
    }
}
