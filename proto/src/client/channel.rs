// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's side of one channel.

use super::{Outcome, Unexpected};
use crate::ids::{ChannelId, GpadlId, OpenId, VpIndex};
use crate::message::{
    CloseChannel, ModifyChannel, ModifyChannelResponse, OpenChannel, OpenChannelResult,
    RelidReleased, RescindChannelOffer,
};
use crate::version::Version;
use core::fmt;

/// Where a channel stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelState {
    /// Not open.
    Closed,
    /// OPENCHANNEL was sent with this id, and the result has not come.
    Opening(OpenId),
    /// Open.
    Open,
}

/// Why a channel cannot be opened or modified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChannelError {
    /// The host has taken it back.
    Rescinded,
    /// It is in the wrong state, or the answer to the same request has not come yet.
    Busy,
    /// There are more than 120 bytes of user data.
    UserDataTooLong,
    /// The agreed version does not have this.
    NotInVersion,
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rescinded => "channel was rescinded",
            Self::Busy => "channel is busy",
            Self::UserDataTooLong => "user data is longer than 120 bytes",
            Self::NotInVersion => "not part of the agreed version",
        })
    }
}

impl core::error::Error for ChannelError {}

/// The guest's side of one channel.
#[derive(Clone, Debug)]
pub struct Channel {
    channel_id: ChannelId,
    state: ChannelState,
    rescinded: bool,
    released: bool,
    /// Times that it was opened; makes open ids different.
    opens: u16,
    /// MODIFYCHANNEL was sent, and its answer has not come.
    modifying: bool,
}

impl Channel {
    /// A channel that was just offered.
    pub const fn new(channel_id: ChannelId) -> Self {
        Self {
            channel_id,
            state: ChannelState::Closed,
            rescinded: false,
            released: false,
            opens: 0,
            modifying: false,
        }
    }

    /// Its id.
    pub fn channel_id(&self) -> ChannelId {
        self.channel_id
    }

    /// Where it stands.
    pub fn state(&self) -> ChannelState {
        self.state
    }

    /// Whether it is open and the host has not taken it back.
    pub fn is_usable(&self) -> bool {
        self.state == ChannelState::Open && !self.rescinded
    }

    /// Whether the host has taken it back.
    pub fn is_rescinded(&self) -> bool {
        self.rescinded
    }

    /// Opens the channel: post what comes back, and wait for OPENCHANNEL_RESULT.
    ///
    /// # Errors
    ///
    /// [`ChannelError`]; then there is nothing to post.
    pub fn open(
        &mut self,
        ring_gpadl: GpadlId,
        target_vp: VpIndex,
        downstream_page_offset: u32,
        user_data: &[u8],
    ) -> Result<OpenChannel, ChannelError> {
        if self.rescinded {
            return Err(ChannelError::Rescinded);
        }
        if self.state != ChannelState::Closed {
            return Err(ChannelError::Busy);
        }
        // Linux always uses the channel's id. With the count above its 11 bits, a result that
        // comes too late cannot be taken for that of a later request.
        let open_id = OpenId::new(self.channel_id.get() | u32::from(self.opens) << 16);
        let message = OpenChannel::new(
            self.channel_id,
            open_id,
            ring_gpadl,
            target_vp,
            downstream_page_offset,
            user_data,
        )
        .ok_or(ChannelError::UserDataTooLong)?;
        self.opens = self.opens.wrapping_add(1);
        self.state = ChannelState::Opening(open_id);
        Ok(message)
    }

    /// OPENCHANNEL_RESULT came.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] when it does not belong to the request that waits.
    pub fn open_result(&mut self, result: &OpenChannelResult) -> Result<Outcome, Unexpected> {
        let ChannelState::Opening(open_id) = self.state else {
            return Err(Unexpected::NotWaited);
        };
        if result.channel_id != self.channel_id || result.open_id != open_id {
            return Err(Unexpected::WrongId);
        }
        let outcome = Outcome::of(result.status);
        self.state = match outcome {
            Outcome::Done => ChannelState::Open,
            Outcome::Refused(_) => ChannelState::Closed,
        };
        Ok(outcome)
    }

    /// OPENCHANNEL could not be posted: the host has not heard of it.
    pub fn open_not_posted(&mut self) {
        if let ChannelState::Opening(_) = self.state {
            self.state = ChannelState::Closed;
        }
    }

    /// OPENCHANNEL_RESULT does not come. `Some`: post this. The ring's GPADL must be torn down
    /// before its memory is used for anything else, as after any close.
    pub fn open_timed_out(&mut self) -> Option<CloseChannel> {
        match self.state {
            ChannelState::Opening(_) => self.stop(),
            _ => None,
        }
    }

    /// Closes an open channel. `Some`: post this (there is no answer), and then tear down the
    /// GPADLs. `None`: it was not open, or the host has closed it itself.
    pub fn close(&mut self) -> Option<CloseChannel> {
        match self.state {
            ChannelState::Open => self.stop(),
            _ => None,
        }
    }

    fn stop(&mut self) -> Option<CloseChannel> {
        self.state = ChannelState::Closed;
        self.modifying = false;
        (!self.rescinded).then_some(CloseChannel {
            channel_id: self.channel_id,
        })
    }

    /// RESCIND_CHANNELOFFER came. The driver must end every wait and every outstanding request of
    /// the channel; a request to open has failed. What comes back is where the channel stood.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] when it came before, or names another channel.
    pub fn rescind(&mut self, message: &RescindChannelOffer) -> Result<ChannelState, Unexpected> {
        if message.channel_id != self.channel_id {
            return Err(Unexpected::WrongId);
        }
        if self.rescinded {
            return Err(Unexpected::Rescinded);
        }
        self.rescinded = true;
        self.modifying = false;
        let was = self.state;
        if let ChannelState::Opening(_) = was {
            self.state = ChannelState::Closed;
        }
        Ok(was)
    }

    /// Nothing of a rescinded channel is left in the guest. `Some`: post this, and forget the
    /// channel. `None`: it is open still, not rescinded, or released before.
    pub fn release(&mut self) -> Option<RelidReleased> {
        if !self.rescinded || self.released || self.state != ChannelState::Closed {
            return None;
        }
        self.released = true;
        Some(RelidReleased {
            channel_id: self.channel_id,
        })
    }

    /// Moves the channel's interrupts to another processor: post what comes back. From version
    /// 5.3 on ([`Version::has_modify_channel_response`]) wait for MODIFYCHANNEL_RESPONSE; older
    /// hosts do not say when it is done.
    ///
    /// # Errors
    ///
    /// [`ChannelError`]; then there is nothing to post.
    pub fn modify(
        &mut self,
        target_vp: VpIndex,
        version: Version,
    ) -> Result<ModifyChannel, ChannelError> {
        if !version.has_modify_channel() {
            return Err(ChannelError::NotInVersion);
        }
        if self.rescinded {
            return Err(ChannelError::Rescinded);
        }
        if self.state != ChannelState::Open || self.modifying {
            return Err(ChannelError::Busy);
        }
        self.modifying = version.has_modify_channel_response();
        Ok(ModifyChannel {
            channel_id: self.channel_id,
            target_vp,
        })
    }

    /// MODIFYCHANNEL_RESPONSE came.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] when it is not waited for, or names another channel.
    pub fn modify_response(
        &mut self,
        response: &ModifyChannelResponse,
    ) -> Result<Outcome, Unexpected> {
        if response.channel_id != self.channel_id {
            return Err(Unexpected::WrongId);
        }
        if !core::mem::replace(&mut self.modifying, false) {
            return Err(Unexpected::NotWaited);
        }
        Ok(Outcome::of(response.status))
    }

    /// MODIFYCHANNEL could not be posted, or its answer does not come. Where the interrupts go
    /// now is not known.
    pub fn modify_timed_out(&mut self) {
        self.modifying = false;
    }
}
