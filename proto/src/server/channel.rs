// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The host's side of one channel, and how its rings lie in their pages.

use crate::ids::{ChannelId, OpenId, VpIndex};
use crate::message::{
    ModifyChannel, ModifyChannelResponse, OpenChannel, OpenChannelResult, STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
};
use crate::version::Version;
use zerocopy::little_endian::U32;

/// Where a channel stands, for those who look at it from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelState {
    /// The guest has not heard of the channel on this connection.
    Hidden,
    /// The guest knows the channel, and may open it.
    Offered,
    /// The device is being opened.
    Opening,
    /// Open.
    Open,
    /// The device is letting go of the ring.
    Closing,
    /// The guest was told that the channel is gone, and has not released its id yet.
    Rescinded,
    /// Nothing is left of the channel; its id is free.
    Released,
}

/// What follows when the device of a closing channel has let go of the ring.
#[derive(Clone, Copy, Debug)]
enum AfterClose {
    Offered,
    Reopen(OpenChannel),
    Hidden,
    Rescind,
    Release,
}

/// What follows when the device of an opening channel has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AfterOpen {
    Stay,
    Close,
    Hide,
    Rescind,
    Release,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Hidden,
    Offered,
    Opening { open_id: OpenId, after: AfterOpen },
    Open,
    Closing { after: AfterClose },
    Rescinded,
    Released,
}

/// What to do about OPENCHANNEL.
#[derive(Clone, Copy, Debug)]
pub enum OpenDecision {
    /// Check the ring, open the device, then call [`Channel::opened`]; also when the check fails.
    Start,
    /// The device still lets go of the old ring; the request waits for [`Channel::closed`].
    Later,
    /// Send this.
    Refuse(OpenChannelResult),
}

/// What to do when the device is open, or is not.
#[derive(Clone, Copy, Debug)]
pub enum OpenedDecision {
    /// Send this.
    Answer(OpenChannelResult),
    /// The channel is not wanted any more: close the device, then call [`Channel::closed`].
    StartClose,
    /// As after [`Channel::closed`].
    Closed(ClosedDecision),
    /// Nothing; the channel was not opening.
    Ignore,
}

/// What to do about an event that ends the use of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseDecision {
    /// Close the device, then call [`Channel::closed`].
    StartClose,
    /// Nothing yet: what the channel does now ends first, and its decision says more.
    Wait,
    /// The device was closed already. Send RESCIND_CHANNELOFFER, if the event was
    /// [`Channel::rescind`]; else nothing.
    Done,
    /// Forget the channel; its id is free.
    Free,
    /// Nothing: the event does not fit, or came twice.
    Ignore,
}

/// What to do when a device has let go of its ring.
#[derive(Clone, Copy, Debug)]
pub enum ClosedDecision {
    /// Nothing; the channel may be opened again.
    Idle,
    /// A request to open waits: go on as after [`OpenDecision::Start`].
    Reopen(OpenChannel),
    /// Send RESCIND_CHANNELOFFER.
    SendRescind,
    /// Forget the channel; its id is free.
    Free,
    /// Nothing; the channel was not closing.
    Ignore,
}

/// What to do about MODIFYCHANNEL.
#[derive(Clone, Copy, Debug)]
pub struct ModifyDecision {
    /// Send the channel's interrupts to this processor from now on.
    pub target_vp: Option<VpIndex>,
    /// Then send this, from version 5.3 on.
    pub response: Option<ModifyChannelResponse>,
}

/// The host's side of one channel.
#[derive(Clone, Debug)]
pub struct Channel {
    channel_id: ChannelId,
    state: State,
}

impl Channel {
    /// A channel that the guest has not heard of.
    pub const fn new(channel_id: ChannelId) -> Self {
        Self {
            channel_id,
            state: State::Hidden,
        }
    }

    /// Its id.
    pub fn channel_id(&self) -> ChannelId {
        self.channel_id
    }

    /// Where it stands.
    pub fn state(&self) -> ChannelState {
        match self.state {
            State::Hidden => ChannelState::Hidden,
            State::Offered => ChannelState::Offered,
            State::Opening { .. } => ChannelState::Opening,
            State::Open => ChannelState::Open,
            State::Closing { .. } => ChannelState::Closing,
            State::Rescinded => ChannelState::Rescinded,
            State::Released => ChannelState::Released,
        }
    }

    /// Whether the device may use the channel's ring.
    pub fn uses_ring(&self) -> bool {
        matches!(
            self.state,
            State::Opening { .. } | State::Open | State::Closing { .. }
        )
    }

    /// The guest asked for offers. `true`: send OFFERCHANNEL.
    pub fn offer(&mut self) -> bool {
        match self.state {
            State::Hidden => {
                self.state = State::Offered;
                true
            }
            _ => false,
        }
    }

    /// OPENCHANNEL came.
    pub fn open(&mut self, request: &OpenChannel) -> OpenDecision {
        match &mut self.state {
            State::Offered => {
                self.state = State::Opening {
                    open_id: request.open_id,
                    after: AfterOpen::Stay,
                };
                OpenDecision::Start
            }
            State::Closing {
                after: after @ AfterClose::Offered,
            } => {
                *after = AfterClose::Reopen(*request);
                OpenDecision::Later
            }
            _ => OpenDecision::Refuse(self.open_result(request.open_id, STATUS_UNSUCCESSFUL)),
        }
    }

    /// The device answered: `status` is 0 when it is open.
    pub fn opened(&mut self, status: u32) -> OpenedDecision {
        let State::Opening { open_id, after } = self.state else {
            return OpenedDecision::Ignore;
        };
        if after == AfterOpen::Stay {
            self.state = if status == STATUS_SUCCESS {
                State::Open
            } else {
                State::Offered
            };
            return OpenedDecision::Answer(self.open_result(open_id, status));
        }
        self.state = State::Closing {
            after: match after {
                AfterOpen::Stay | AfterOpen::Close => AfterClose::Offered,
                AfterOpen::Hide => AfterClose::Hidden,
                AfterOpen::Rescind => AfterClose::Rescind,
                AfterOpen::Release => AfterClose::Release,
            },
        };
        if status == STATUS_SUCCESS {
            OpenedDecision::StartClose
        } else {
            // There is nothing to close.
            OpenedDecision::Closed(self.closed())
        }
    }

    /// CLOSECHANNEL came, or the ring turned out corrupt.
    pub fn close(&mut self) -> CloseDecision {
        match &mut self.state {
            State::Opening {
                after: after @ AfterOpen::Stay,
                ..
            } => {
                *after = AfterOpen::Close;
                CloseDecision::Wait
            }
            State::Open => {
                self.state = State::Closing {
                    after: AfterClose::Offered,
                };
                CloseDecision::StartClose
            }
            State::Closing {
                after: after @ AfterClose::Reopen(_),
            } => {
                *after = AfterClose::Offered;
                CloseDecision::Wait
            }
            _ => CloseDecision::Ignore,
        }
    }

    /// The host takes the channel away. [`CloseDecision::Done`]: send RESCIND_CHANNELOFFER now.
    pub fn rescind(&mut self) -> CloseDecision {
        match &mut self.state {
            State::Hidden => {
                self.state = State::Released;
                CloseDecision::Free
            }
            State::Offered => {
                self.state = State::Rescinded;
                CloseDecision::Done
            }
            State::Opening { after, .. } => {
                match after {
                    AfterOpen::Stay | AfterOpen::Close => *after = AfterOpen::Rescind,
                    // The guest has no connection any more, or no interest.
                    AfterOpen::Hide => *after = AfterOpen::Release,
                    AfterOpen::Rescind | AfterOpen::Release => return CloseDecision::Ignore,
                }
                CloseDecision::Wait
            }
            State::Open => {
                self.state = State::Closing {
                    after: AfterClose::Rescind,
                };
                CloseDecision::StartClose
            }
            State::Closing { after } => {
                match after {
                    AfterClose::Offered | AfterClose::Reopen(_) => *after = AfterClose::Rescind,
                    AfterClose::Hidden => *after = AfterClose::Release,
                    AfterClose::Rescind | AfterClose::Release => return CloseDecision::Ignore,
                }
                CloseDecision::Wait
            }
            State::Rescinded | State::Released => CloseDecision::Ignore,
        }
    }

    /// RELID_RELEASED came. Linux also sends it for offers that it does not want, and for
    /// sub-channels that it closes.
    pub fn released(&mut self) -> CloseDecision {
        match &mut self.state {
            State::Offered | State::Rescinded => {
                self.state = State::Released;
                CloseDecision::Free
            }
            State::Opening { after, .. } => {
                *after = AfterOpen::Release;
                CloseDecision::Wait
            }
            State::Open => {
                self.state = State::Closing {
                    after: AfterClose::Release,
                };
                CloseDecision::StartClose
            }
            State::Closing { after } => {
                *after = AfterClose::Release;
                CloseDecision::Wait
            }
            // The guest does not know the channel.
            State::Hidden | State::Released => CloseDecision::Ignore,
        }
    }

    /// The connection ends: UNLOAD, a new contact, or a reset of the machine. Channels that the
    /// host has not taken away become hidden, and are offered again on the next connection.
    pub fn reset(&mut self) -> CloseDecision {
        match &mut self.state {
            State::Hidden => CloseDecision::Ignore,
            State::Offered => {
                self.state = State::Hidden;
                CloseDecision::Done
            }
            State::Opening { after, .. } => {
                *after = match after {
                    AfterOpen::Rescind | AfterOpen::Release => AfterOpen::Release,
                    AfterOpen::Stay | AfterOpen::Close | AfterOpen::Hide => AfterOpen::Hide,
                };
                CloseDecision::Wait
            }
            State::Open => {
                self.state = State::Closing {
                    after: AfterClose::Hidden,
                };
                CloseDecision::StartClose
            }
            State::Closing { after } => {
                *after = match after {
                    AfterClose::Rescind | AfterClose::Release => AfterClose::Release,
                    AfterClose::Offered | AfterClose::Reopen(_) | AfterClose::Hidden => {
                        AfterClose::Hidden
                    }
                };
                CloseDecision::Wait
            }
            State::Rescinded => {
                self.state = State::Released;
                CloseDecision::Free
            }
            State::Released => CloseDecision::Ignore,
        }
    }

    /// The device has let go of the ring.
    pub fn closed(&mut self) -> ClosedDecision {
        let State::Closing { after } = self.state else {
            return ClosedDecision::Ignore;
        };
        match after {
            AfterClose::Offered => {
                self.state = State::Offered;
                ClosedDecision::Idle
            }
            AfterClose::Hidden => {
                self.state = State::Hidden;
                ClosedDecision::Idle
            }
            AfterClose::Reopen(request) => {
                self.state = State::Opening {
                    open_id: request.open_id,
                    after: AfterOpen::Stay,
                };
                ClosedDecision::Reopen(request)
            }
            AfterClose::Rescind => {
                self.state = State::Rescinded;
                ClosedDecision::SendRescind
            }
            AfterClose::Release => {
                self.state = State::Released;
                ClosedDecision::Free
            }
        }
    }

    /// MODIFYCHANNEL came. `vp_exists` says whether the machine has the processor.
    pub fn modify(
        &self,
        request: &ModifyChannel,
        version: Version,
        vp_exists: bool,
    ) -> ModifyDecision {
        let allowed = vp_exists && matches!(self.state, State::Open);
        ModifyDecision {
            target_vp: allowed.then_some(request.target_vp),
            response: version
                .has_modify_channel_response()
                .then_some(ModifyChannelResponse {
                    channel_id: self.channel_id,
                    status: U32::new(if allowed {
                        STATUS_SUCCESS
                    } else {
                        STATUS_UNSUCCESSFUL
                    }),
                }),
        }
    }

    /// Whether the guest may create GPADLs for the channel.
    pub fn accepts_gpadl(&self) -> bool {
        matches!(
            self.state,
            State::Offered | State::Opening { .. } | State::Open | State::Closing { .. }
        )
    }

    fn open_result(&self, open_id: OpenId, status: u32) -> OpenChannelResult {
        OpenChannelResult {
            channel_id: self.channel_id,
            open_id,
            status: U32::new(status),
        }
    }
}

/// The two rings of a channel within the pages of its GPADL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPages {
    /// Pages of the ring from guest to host; they come first. At least 2.
    pub to_host: u32,
    /// Pages of the ring from host to guest. At least 2.
    pub to_guest: u32,
}

/// Splits the `pages` of a GPADL at OPENCHANNEL's `downstream_page_offset`. `None` if one of the
/// rings has no room for its control page and a page of data.
pub const fn split_ring(pages: u32, downstream_page_offset: u32) -> Option<RingPages> {
    match pages.checked_sub(downstream_page_offset) {
        Some(to_guest) if to_guest >= 2 && downstream_page_offset >= 2 => Some(RingPages {
            to_host: downstream_page_offset,
            to_guest,
        }),
        _ => None,
    }
}
