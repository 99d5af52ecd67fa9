// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The host's side of connection, channel and GPADL, as state machines.
//!
//! Each machine is a small value without tables, memory or I/O: a method for each event, which
//! returns what the server must do. The server keeps the tables of channels and GPADLs, sends the
//! messages, and runs the devices. Whatever a guest sends, in whatever order, a method answers
//! with a decision; none of them fails.
//!
//! What holds between the machines:
//!
//! * A device has let go of its ring before the guest hears of it: RESCIND, TORNDOWN and
//!   UNLOAD_RESPONSE are only sent after [`Channel::closed`], because the guest frees the memory
//!   then. (Linux frees rings of rescinded channels without GPADL_TEARDOWN.)
//! * A channel id is used again only after RELID_RELEASED, or on a new connection.
//!
//! Source: what `drivers/hv/connection.c`, `channel.c` and `channel_mgmt.c` of Linux 7.3 expect of
//! a host.
//!
//! ```
//! use hv_proto::ids::ConnectionId;
//! use hv_proto::message::{GuestMessage, RequestOffers};
//! use hv_proto::server::{Connection, ContactDecision};
//! use hv_proto::version::Version;
//! # use hv_proto::message::{ContactTarget, InitiateContact};
//! # use zerocopy::FromZeros;
//! # let mut contact = InitiateContact::new_zeroed();
//! # contact.version = Version::V5_3.raw().into();
//! # contact.interrupt_page_or_target =
//! #     ContactTarget { sint: 2, ..FromZeros::new_zeroed() }.to_field();
//!
//! let mut connection = Connection::new(Version::V6_0);
//! match connection.contact(&contact, ConnectionId::MESSAGE_V5) {
//!     ContactDecision::Accept(agreed) => assert_eq!(agreed.version, Version::V5_3),
//!     other => panic!("{other:?}"),
//! }
//! let message = GuestMessage::RequestOffers(RequestOffers {});
//! assert!(connection.admit(ConnectionId::MESSAGE_V5, &message).is_ok());
//! ```

use crate::gpadl::{GpadlAssembler, GpadlError, GpadlItem, Progress};
use crate::ids::{ChannelId, ConnectionId, GpadlId, OpenId, VpIndex};
use crate::message::{
    FeatureFlags, GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown, GuestMessage,
    InitiateContact, ModifyChannel, ModifyChannelResponse, OpenChannel, OpenChannelResult,
    VersionResponse, STATUS_SUCCESS, STATUS_UNSUCCESSFUL,
};
use crate::synic::{SINT_COUNT, VMBUS_SINT};
use crate::version::Version;
use crate::PAGE_SIZE;
use core::fmt;
use zerocopy::little_endian::{U16, U32, U64};

/// Where the guest wants the host's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageTarget {
    /// The processor. Whether the machine has it, the sender finds out.
    pub vp: VpIndex,
    /// The SINT, below 16.
    pub sint: u8,
}

/// What a guest and the host have agreed upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The version of the protocol.
    pub version: Version,
    /// Where the host's messages go.
    pub target: MessageTarget,
    /// The connection on which the guest must send all later messages.
    pub message_connection_id: ConnectionId,
    /// Guest physical address of the interrupt page, before version 5.0.
    pub interrupt_page: Option<u64>,
    /// Guest physical addresses of the monitor pages: host to guest, guest to host. `None` if one
    /// of them is not there or does not lie at a multiple of 4096 bytes.
    pub monitor_pages: Option<[u64; 2]>,
    /// The features that the guest asks for, from version 6.0 on; empty before.
    pub features: FeatureFlags,
}

impl Agreed {
    /// The answer to the guest.
    pub fn response(&self) -> VersionResponse {
        VersionResponse {
            version_supported: 1,
            connection_state: 0,
            padding: U16::ZERO,
            message_connection_id: if self.version.uses_message_connection_id() {
                self.message_connection_id
            } else {
                ConnectionId::new(0)
            },
        }
    }
}

/// The answer to a guest whose version the host does not speak.
pub const REFUSED: VersionResponse = VersionResponse {
    version_supported: 0,
    connection_state: 0,
    padding: U16::ZERO,
    message_connection_id: ConnectionId::new(0),
};

/// What to do about INITIATE_CONTACT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContactDecision {
    /// Send [`Agreed::response`]; the connection stands.
    Accept(Agreed),
    /// The guest left no word before (a crash kernel, say): forget everything of the old
    /// connection, then call [`Connection::reset_done`].
    ResetFirst,
    /// Send [`REFUSED`] to there; the guest tries another version.
    Refuse(MessageTarget),
    /// There is nowhere to answer to.
    Ignore,
}

/// What to do about UNLOAD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnloadDecision {
    /// Forget everything of the connection, then call [`Connection::reset_done`].
    ResetFirst,
    /// Nothing; there is no connection, or an unload is under way.
    Ignore,
}

/// What to do when everything of an old connection is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetDecision {
    /// A new contact waits: send [`Agreed::response`]; the connection stands.
    Accept(Agreed),
    /// Send UNLOAD_RESPONSE to there.
    Unloaded(MessageTarget),
    /// Nothing.
    Idle,
}

/// Why a guest's message is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// There is no connection, or it is being reset.
    NotConnected,
    /// The message came on a connection id that is not for it.
    WrongConnection,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotConnected => "no connection",
            Self::WrongConnection => "wrong connection id",
        })
    }
}

impl core::error::Error for Refusal {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ConnectionState {
    Disconnected,
    Connected { agreed: Agreed, offered: bool },
    Resetting { then: AfterReset },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AfterReset {
    Unloaded(MessageTarget),
    Accept(Agreed),
    Disconnected,
}

/// The host's side of the connection with one guest.
#[derive(Clone, Debug)]
pub struct Connection {
    max_version: Version,
    state: ConnectionState,
}

impl Connection {
    /// A connection that speaks all versions up to `max_version`.
    pub const fn new(max_version: Version) -> Self {
        Self {
            max_version,
            state: ConnectionState::Disconnected,
        }
    }

    /// The agreed version, `None` while there is no connection. It is what
    /// [`GuestMessage::parse`] wants to know.
    pub fn version(&self) -> Option<Version> {
        self.agreed().map(|agreed| agreed.version)
    }

    /// What is agreed, `None` while there is no connection.
    pub fn agreed(&self) -> Option<&Agreed> {
        match &self.state {
            ConnectionState::Connected { agreed, .. } => Some(agreed),
            _ => None,
        }
    }

    /// Whether the guest has asked for offers, so that new ones may be sent to it.
    pub fn wants_offers(&self) -> bool {
        matches!(self.state, ConnectionState::Connected { offered: true, .. })
    }

    /// Whether the host has such a connection for messages. If not, HvPostMessage fails with
    /// INVALID_CONNECTION_ID, by which a guest knows an older host.
    pub fn has_connection(&self, connection_id: ConnectionId) -> bool {
        connection_id == ConnectionId::MESSAGE
            || (connection_id == ConnectionId::MESSAGE_V5
                && self.max_version.uses_message_connection_id())
    }

    /// Whether a message may be looked at now, when it came on this connection id.
    ///
    /// INITIATE_CONTACT and UNLOAD may always; [`contact`](Self::contact) and
    /// [`unload`](Self::unload) judge them.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn admit(
        &self,
        connection_id: ConnectionId,
        message: &GuestMessage<'_>,
    ) -> Result<(), Refusal> {
        if !self.has_connection(connection_id) {
            return Err(Refusal::WrongConnection);
        }
        if matches!(
            message,
            GuestMessage::InitiateContact(_) | GuestMessage::Unload(_)
        ) {
            return Ok(());
        }
        match self.agreed() {
            None => Err(Refusal::NotConnected),
            Some(agreed) if agreed.message_connection_id != connection_id => {
                Err(Refusal::WrongConnection)
            }
            Some(_) => Ok(()),
        }
    }

    /// INITIATE_CONTACT came on this connection id.
    pub fn contact(
        &mut self,
        contact: &InitiateContact,
        connection_id: ConnectionId,
    ) -> ContactDecision {
        let agreed = match self.judge(contact, connection_id) {
            Ok(agreed) => agreed,
            Err(decision) => return decision,
        };
        match self.state {
            ConnectionState::Disconnected => {
                self.state = ConnectionState::Connected {
                    agreed,
                    offered: false,
                };
                ContactDecision::Accept(agreed)
            }
            ConnectionState::Connected { .. } => {
                self.state = ConnectionState::Resetting {
                    then: AfterReset::Accept(agreed),
                };
                ContactDecision::ResetFirst
            }
            // The reset is under way; the newest contact counts.
            ConnectionState::Resetting { .. } => {
                self.state = ConnectionState::Resetting {
                    then: AfterReset::Accept(agreed),
                };
                ContactDecision::Ignore
            }
        }
    }

    /// What would be agreed.
    fn judge(
        &self,
        contact: &InitiateContact,
        connection_id: ConnectionId,
    ) -> Result<Agreed, ContactDecision> {
        let raw = contact.version.get();
        // The form of the message changed with 5.0, also for versions that are not known here.
        let names_target = raw >= Version::V5_0.raw();
        let wanted = contact.target();
        let target = MessageTarget {
            vp: contact.target_vp,
            sint: if names_target {
                wanted.sint
            } else {
                VMBUS_SINT
            },
        };
        if target.sint >= SINT_COUNT {
            return Err(ContactDecision::Ignore);
        }
        let refuse = Err(ContactDecision::Refuse(target));
        let Some(version) = Version::from_raw(raw).filter(|v| *v <= self.max_version) else {
            return refuse;
        };
        let message_connection_id = if version.uses_message_connection_id() {
            ConnectionId::MESSAGE_V5
        } else {
            ConnectionId::MESSAGE
        };
        // There is only VTL 0 here.
        if connection_id != message_connection_id || (names_target && wanted.vtl != 0) {
            return refuse;
        }
        let page = |field: U64| {
            let address = field.get();
            (address != 0 && address % PAGE_SIZE as u64 == 0).then_some(address)
        };
        let monitor_pages = match (page(contact.monitor_page1), page(contact.monitor_page2)) {
            (Some(to_guest), Some(to_host)) => Some([to_guest, to_host]),
            _ => None,
        };
        Ok(Agreed {
            version,
            target,
            message_connection_id,
            interrupt_page: if version.has_interrupt_page() {
                page(contact.interrupt_page_or_target)
            } else {
                None
            },
            monitor_pages,
            features: if version.has_confidential_channels() {
                FeatureFlags::from_bits_retain(wanted.feature_flags.get())
            } else {
                FeatureFlags::empty()
            },
        })
    }

    /// REQUESTOFFERS came. `true`: send all offers, then ALLOFFERS_DELIVERED. `false`: the guest
    /// has asked before, or there is no connection.
    pub fn request_offers(&mut self) -> bool {
        match &mut self.state {
            ConnectionState::Connected { offered, .. } => !core::mem::replace(offered, true),
            _ => false,
        }
    }

    /// UNLOAD came.
    pub fn unload(&mut self) -> UnloadDecision {
        match self.state {
            ConnectionState::Connected { agreed, .. } => {
                self.state = ConnectionState::Resetting {
                    then: AfterReset::Unloaded(agreed.target),
                };
                UnloadDecision::ResetFirst
            }
            _ => UnloadDecision::Ignore,
        }
    }

    /// The guest's machine was reset, without a word to the bus. `true`: forget everything of the
    /// connection, then call [`reset_done`](Self::reset_done).
    pub fn machine_reset(&mut self) -> bool {
        match &mut self.state {
            ConnectionState::Disconnected => false,
            ConnectionState::Connected { .. } => {
                self.state = ConnectionState::Resetting {
                    then: AfterReset::Disconnected,
                };
                true
            }
            ConnectionState::Resetting { then } => {
                *then = AfterReset::Disconnected;
                false
            }
        }
    }

    /// All channels are closed, all GPADLs forgotten, all offers taken back.
    pub fn reset_done(&mut self) -> ResetDecision {
        let ConnectionState::Resetting { then } = self.state else {
            return ResetDecision::Idle;
        };
        self.state = ConnectionState::Disconnected;
        match then {
            AfterReset::Disconnected => ResetDecision::Idle,
            AfterReset::Unloaded(target) => ResetDecision::Unloaded(target),
            AfterReset::Accept(agreed) => {
                self.state = ConnectionState::Connected {
                    agreed,
                    offered: false,
                };
                ResetDecision::Accept(agreed)
            }
        }
    }
}

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

/// The answer to GPADL_HEADER or its bodies.
fn created(channel_id: ChannelId, gpadl_id: GpadlId, status: u32) -> GpadlCreated {
    GpadlCreated {
        channel_id,
        gpadl_id,
        status: U32::new(status),
    }
}

/// The answer to a GPADL_HEADER that cannot be taken: the channel does not
/// [accept](Channel::accepts_gpadl) it, the id is in use, or there are too many.
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
