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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::ContactTarget;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    const ID: ChannelId = ChannelId::new(5);

    fn contact(version: u32, vp: u32) -> InitiateContact {
        let field = if version >= Version::V5_0.raw() {
            ContactTarget {
                sint: 2,
                ..FromZeros::new_zeroed()
            }
            .to_field()
        } else {
            U64::new(0x7000)
        };
        InitiateContact {
            version: U32::new(version),
            target_vp: VpIndex::new(vp),
            interrupt_page_or_target: field,
            monitor_page1: U64::new(0x8000),
            monitor_page2: U64::new(0x9000),
        }
    }

    fn contact_connection(version: Version) -> ConnectionId {
        if version.uses_message_connection_id() {
            ConnectionId::MESSAGE_V5
        } else {
            ConnectionId::MESSAGE
        }
    }

    fn connected(version: Version) -> Connection {
        let mut connection = Connection::new(Version::NEWEST);
        let decision = connection.contact(&contact(version.raw(), 0), contact_connection(version));
        assert!(
            matches!(decision, ContactDecision::Accept(_)),
            "{decision:?}"
        );
        connection
    }

    #[test]
    fn each_version_can_be_agreed() {
        for max in Version::NEWEST_FIRST {
            for version in Version::NEWEST_FIRST {
                let mut connection = Connection::new(max);
                let decision =
                    connection.contact(&contact(version.raw(), 3), contact_connection(version));
                if version > max {
                    let target = MessageTarget {
                        vp: VpIndex::new(3),
                        sint: 2,
                    };
                    assert_eq!(decision, ContactDecision::Refuse(target));
                    assert_eq!(connection.version(), None);
                    continue;
                }
                let ContactDecision::Accept(agreed) = decision else {
                    panic!("{decision:?}");
                };
                assert_eq!(connection.agreed(), Some(&agreed));
                assert_eq!(agreed.version, version);
                assert_eq!(agreed.monitor_pages, Some([0x8000, 0x9000]));
                let old = version.has_interrupt_page();
                assert_eq!(agreed.interrupt_page, old.then_some(0x7000));
                let response = agreed.response();
                assert_eq!(response.version_supported, 1);
                let id = if old { 0 } else { 4 };
                assert_eq!(response.message_connection_id.get(), id);
            }
        }
    }

    #[test]
    fn contact_must_come_the_right_way() {
        let mut connection = Connection::new(Version::NEWEST);
        let new = contact(Version::V5_3.raw(), 0);
        let old = contact(Version::V4_0.raw(), 0);
        for (message, id) in [
            (new, ConnectionId::MESSAGE),
            (old, ConnectionId::MESSAGE_V5),
            (contact(0x0003_0000, 0), ConnectionId::MESSAGE),
            (contact(0x0005_0004, 0), ConnectionId::MESSAGE_V5),
        ] {
            let decision = connection.contact(&message, id);
            assert!(
                matches!(decision, ContactDecision::Refuse(_)),
                "{decision:?}"
            );
        }
        let with_target = |sint, vtl| InitiateContact {
            interrupt_page_or_target: ContactTarget {
                sint,
                vtl,
                ..FromZeros::new_zeroed()
            }
            .to_field(),
            ..new
        };
        let id = ConnectionId::MESSAGE_V5;
        assert!(matches!(
            connection.contact(&with_target(2, 2), id),
            ContactDecision::Refuse(_)
        ));
        assert_eq!(
            connection.contact(&with_target(16, 0), id),
            ContactDecision::Ignore
        );
        assert!(matches!(
            connection.contact(&with_target(5, 0), id),
            ContactDecision::Accept(agreed) if agreed.target.sint == 5
        ));
    }

    #[test]
    fn monitor_pages_must_be_pages() {
        for (page1, page2) in [(0, 0x1000), (0x1000, 0), (0x1001, 0x2000), (0x1000, 0x2800)] {
            let mut message = contact(Version::V4_1.raw(), 0);
            message.monitor_page1 = U64::new(page1);
            message.monitor_page2 = U64::new(page2);
            let decision =
                Connection::new(Version::NEWEST).contact(&message, ConnectionId::MESSAGE);
            assert!(matches!(
                decision,
                ContactDecision::Accept(agreed) if agreed.monitor_pages.is_none()
            ));
        }
    }

    #[test]
    fn old_hosts_lack_the_new_connection() {
        let old = Connection::new(Version::V4_1);
        assert!(old.has_connection(ConnectionId::MESSAGE));
        assert!(!old.has_connection(ConnectionId::MESSAGE_V5));
        let new = Connection::new(Version::V5_0);
        assert!(new.has_connection(ConnectionId::MESSAGE_V5));
        assert!(!new.has_connection(ConnectionId::EVENT));
    }

    #[test]
    fn messages_need_the_connection_that_was_agreed() {
        let request = GuestMessage::RequestOffers(FromZeros::new_zeroed());
        let new = ConnectionId::MESSAGE_V5;
        let old = ConnectionId::MESSAGE;
        let nobody = Connection::new(Version::NEWEST);
        assert_eq!(nobody.admit(new, &request), Err(Refusal::NotConnected));
        let unload = GuestMessage::Unload(FromZeros::new_zeroed());
        assert_eq!(nobody.admit(old, &unload), Ok(()));
        let connection = connected(Version::V5_3);
        assert_eq!(connection.admit(new, &request), Ok(()));
        assert_eq!(
            connection.admit(old, &request),
            Err(Refusal::WrongConnection)
        );
        assert_eq!(
            connection.admit(ConnectionId::EVENT, &unload),
            Err(Refusal::WrongConnection)
        );
        assert_eq!(connected(Version::V4_0).admit(old, &request), Ok(()));
    }

    #[test]
    fn offers_are_requested_once() {
        let mut connection = connected(Version::V5_3);
        assert!(!connection.wants_offers());
        assert!(connection.request_offers());
        assert!(connection.wants_offers());
        assert!(!connection.request_offers());
        assert!(!Connection::new(Version::NEWEST).request_offers());
    }

    #[test]
    fn unload_ends_with_a_response() {
        let mut connection = connected(Version::V5_3);
        assert_eq!(connection.unload(), UnloadDecision::ResetFirst);
        assert_eq!(connection.unload(), UnloadDecision::Ignore);
        assert_eq!(connection.version(), None);
        let target = MessageTarget {
            vp: VpIndex::BOOT,
            sint: 2,
        };
        assert_eq!(connection.reset_done(), ResetDecision::Unloaded(target));
        assert_eq!(connection.reset_done(), ResetDecision::Idle);
        assert_eq!(connection.unload(), UnloadDecision::Ignore);
    }

    #[test]
    fn new_contact_replaces_the_old_connection() {
        let mut connection = connected(Version::V5_3);
        connection.request_offers();
        let again = contact(Version::V5_1.raw(), 1);
        let id = ConnectionId::MESSAGE_V5;
        assert_eq!(connection.contact(&again, id), ContactDecision::ResetFirst);
        // One more, while the reset is under way: it counts.
        let third = contact(Version::V5_0.raw(), 2);
        assert_eq!(connection.contact(&third, id), ContactDecision::Ignore);
        assert!(matches!(
            connection.reset_done(),
            ResetDecision::Accept(agreed)
                if agreed.version == Version::V5_0 && agreed.target.vp == VpIndex::new(2)
        ));
        assert!(!connection.wants_offers());
        // The machine is reset while a contact waits: nobody is there to hear an answer.
        assert_eq!(connection.contact(&again, id), ContactDecision::ResetFirst);
        assert!(!connection.machine_reset());
        assert_eq!(connection.reset_done(), ResetDecision::Idle);
        assert!(!connection.machine_reset());
        let mut connection = connected(Version::V4_0);
        assert!(connection.machine_reset());
        assert_eq!(connection.reset_done(), ResetDecision::Idle);
    }

    fn open_request(open_id: u32) -> OpenChannel {
        OpenChannel::new(
            ID,
            OpenId::new(open_id),
            GpadlId::FIRST,
            VpIndex::BOOT,
            4,
            &[],
        )
        .unwrap()
    }

    fn open_channel() -> Channel {
        let mut channel = Channel::new(ID);
        assert!(channel.offer());
        assert!(matches!(
            channel.open(&open_request(1)),
            OpenDecision::Start
        ));
        let OpenedDecision::Answer(result) = channel.opened(STATUS_SUCCESS) else {
            panic!("no answer");
        };
        assert_eq!(result.open_id.get(), 1);
        assert_eq!(result.status.get(), 0);
        channel
    }

    #[test]
    fn open_close_and_open_again() {
        let mut channel = open_channel();
        assert!(matches!(
            channel.open(&open_request(2)),
            OpenDecision::Refuse(result) if result.open_id.get() == 2 && result.status.get() != 0
        ));
        assert_eq!(channel.close(), CloseDecision::StartClose);
        assert!(channel.uses_ring());
        assert!(matches!(
            channel.open(&open_request(3)),
            OpenDecision::Later
        ));
        assert!(matches!(
            channel.closed(),
            ClosedDecision::Reopen(request) if request.open_id.get() == 3
        ));
        assert!(matches!(
            channel.opened(STATUS_UNSUCCESSFUL),
            OpenedDecision::Answer(result) if result.open_id.get() == 3 && result.status.get() != 0
        ));
        assert_eq!(channel.state(), ChannelState::Offered);
        assert_eq!(channel.close(), CloseDecision::Ignore);
    }

    #[test]
    fn rescind_waits_for_the_device() {
        let mut channel = open_channel();
        assert_eq!(channel.rescind(), CloseDecision::StartClose);
        assert_eq!(channel.rescind(), CloseDecision::Ignore);
        assert_eq!(channel.close(), CloseDecision::Ignore);
        assert!(matches!(channel.closed(), ClosedDecision::SendRescind));
        assert!(!channel.accepts_gpadl());
        assert!(matches!(
            channel.open(&open_request(2)),
            OpenDecision::Refuse(_)
        ));
        assert_eq!(channel.released(), CloseDecision::Free);
        assert_eq!(channel.released(), CloseDecision::Ignore);
    }

    #[test]
    fn rescind_while_opening() {
        let mut channel = Channel::new(ID);
        channel.offer();
        channel.open(&open_request(1));
        assert_eq!(channel.rescind(), CloseDecision::Wait);
        assert!(matches!(
            channel.opened(STATUS_SUCCESS),
            OpenedDecision::StartClose
        ));
        assert!(matches!(channel.closed(), ClosedDecision::SendRescind));

        let mut channel = Channel::new(ID);
        channel.offer();
        channel.open(&open_request(1));
        assert_eq!(channel.rescind(), CloseDecision::Wait);
        assert!(matches!(
            channel.opened(STATUS_UNSUCCESSFUL),
            OpenedDecision::Closed(ClosedDecision::SendRescind)
        ));
    }

    #[test]
    fn reset_hides_channels() {
        let mut channel = open_channel();
        assert_eq!(channel.reset(), CloseDecision::StartClose);
        assert!(matches!(channel.closed(), ClosedDecision::Idle));
        assert_eq!(channel.state(), ChannelState::Hidden);
        assert_eq!(channel.released(), CloseDecision::Ignore);
        assert!(channel.offer());
        assert_eq!(channel.rescind(), CloseDecision::Done);
        assert_eq!(channel.reset(), CloseDecision::Free);
        assert_eq!(Channel::new(ID).rescind(), CloseDecision::Free);
    }

    #[test]
    fn modify_needs_an_open_channel() {
        let request = ModifyChannel {
            channel_id: ID,
            target_vp: VpIndex::new(3),
        };
        let channel = open_channel();
        let decision = channel.modify(&request, Version::V5_3, true);
        assert_eq!(decision.target_vp, Some(VpIndex::new(3)));
        assert_eq!(decision.response.unwrap().status.get(), 0);
        assert!(channel
            .modify(&request, Version::V5_2, true)
            .response
            .is_none());
        for decision in [
            channel.modify(&request, Version::V5_3, false),
            Channel::new(ID).modify(&request, Version::V5_3, true),
        ] {
            assert_eq!(decision.target_vp, None);
            assert_ne!(decision.response.unwrap().status.get(), 0);
        }
    }

    #[test]
    fn rings_need_two_pages_each() {
        assert_eq!(split_ring(3, 2), None);
        assert_eq!(split_ring(4, 1), None);
        assert_eq!(split_ring(4, u32::MAX), None);
        assert_eq!(
            split_ring(5, 2),
            Some(RingPages {
                to_host: 2,
                to_guest: 3
            })
        );
    }

    fn gpadl_header(pages: u16) -> (GpadlHeader, [U64; 2]) {
        let header = GpadlHeader {
            channel_id: ID,
            gpadl_id: GpadlId::FIRST,
            range_buf_len: U16::new(8 + pages * 8),
            range_count: U16::new(1),
        };
        (header, [U64::new(u64::from(pages) * 4096), U64::new(1)])
    }

    const TEARDOWN: GpadlTeardown = GpadlTeardown {
        channel_id: ID,
        gpadl_id: GpadlId::FIRST,
    };

    #[test]
    fn gpadl_belongs_to_its_channel_and_outlives_its_users() {
        let (header, words) = gpadl_header(1);
        let (mut gpadl, decision) = Gpadl::create(&header, &words, |_| ()).unwrap();
        assert!(matches!(decision, GpadlDecision::Created(m) if m.status.get() == 0));
        assert!(!gpadl.start_use(ChannelId::new(6)));
        assert!(gpadl.start_use(ID) && gpadl.start_use(ID));
        let other = GpadlTeardown {
            channel_id: ChannelId::new(6),
            ..TEARDOWN
        };
        assert!(matches!(gpadl.teardown(&other), TeardownDecision::Ignore));
        assert!(matches!(gpadl.teardown(&TEARDOWN), TeardownDecision::Later));
        assert!(matches!(
            gpadl.teardown(&TEARDOWN),
            TeardownDecision::Ignore
        ));
        assert!(!gpadl.start_use(ID));
        assert!(gpadl.end_use().is_none());
        assert_eq!(gpadl.end_use().unwrap().gpadl_id, GpadlId::FIRST);
    }

    #[test]
    fn gpadl_is_unusable_until_it_is_complete() {
        let (header, words) = gpadl_header(2);
        let (mut gpadl, decision) = Gpadl::create(&header, &words, |_| ()).unwrap();
        assert!(matches!(decision, GpadlDecision::Wait) && !gpadl.is_complete());
        assert!(!gpadl.start_use(ID));
        let body = GpadlBody {
            message_number: U32::ZERO,
            gpadl_id: GpadlId::FIRST,
        };
        let mut broken = gpadl.clone();
        let refused = broken.body(&body, &[], |_| ()).unwrap().unwrap_err();
        assert_ne!(refused.answer.status.get(), 0);
        assert!(matches!(
            gpadl.body(&body, &words[1..], |_| ()),
            Some(Ok(GpadlDecision::Created(_)))
        ));
        assert!(gpadl.body(&body, &words[1..], |_| ()).is_none());
        assert!(gpadl.start_use(ID));
        assert!(matches!(
            broken.teardown(&TEARDOWN),
            TeardownDecision::Torndown(_)
        ));
    }

    #[test]
    fn bad_gpadl_is_refused_with_its_ids() {
        let (mut header, words) = gpadl_header(1);
        header.range_count = U16::new(9);
        let refused = Gpadl::create(&header, &words, |_| ()).unwrap_err();
        assert_eq!(refused.answer.gpadl_id, GpadlId::FIRST);
        assert_ne!(refused.answer.status.get(), 0);
        assert_eq!(
            refused.error,
            GpadlError::InvalidLength { range_buf_len: 16 }
        );
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Offer,
        Open,
        Opened(bool),
        Close,
        Rescind,
        Released,
        Reset,
        Closed,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Device {
        Closed,
        Opening,
        Open,
        Closing,
    }

    /// A device and a guest's view, driven by the decisions of the machine.
    struct World {
        channel: Channel,
        device: Device,
        freed: bool,
        rescinds: u32,
    }

    impl World {
        fn on_close(&mut self, decision: CloseDecision, rescind: bool) {
            match decision {
                CloseDecision::StartClose => {
                    assert_eq!(self.device, Device::Open);
                    self.device = Device::Closing;
                }
                CloseDecision::Wait => {
                    assert!(matches!(self.device, Device::Opening | Device::Closing));
                }
                CloseDecision::Done => {
                    assert_eq!(self.device, Device::Closed);
                    self.rescinds += u32::from(rescind);
                }
                CloseDecision::Free => self.free(),
                CloseDecision::Ignore => {}
            }
        }

        fn on_closed(&mut self, decision: ClosedDecision) {
            match decision {
                ClosedDecision::Idle => {}
                ClosedDecision::Reopen(_) => self.device = Device::Opening,
                ClosedDecision::SendRescind => self.rescinds += 1,
                ClosedDecision::Free => self.free(),
                ClosedDecision::Ignore => panic!("a closing channel was not expected to close"),
            }
        }

        fn free(&mut self) {
            assert_eq!(self.device, Device::Closed);
            assert!(!self.freed);
            self.freed = true;
        }

        fn apply(&mut self, event: Event) {
            match event {
                Event::Offer => {
                    if self.channel.offer() {
                        assert_eq!(self.device, Device::Closed);
                    }
                }
                Event::Open => {
                    if let OpenDecision::Start = self.channel.open(&open_request(1)) {
                        assert_eq!(self.device, Device::Closed);
                        self.device = Device::Opening;
                    }
                }
                Event::Opened(ok) => {
                    let was = self.device;
                    let status = if ok {
                        STATUS_SUCCESS
                    } else {
                        STATUS_UNSUCCESSFUL
                    };
                    if was == Device::Opening {
                        self.device = if ok { Device::Open } else { Device::Closed };
                    }
                    match self.channel.opened(status) {
                        OpenedDecision::Ignore => assert_ne!(was, Device::Opening),
                        OpenedDecision::Answer(_) => assert_eq!(was, Device::Opening),
                        OpenedDecision::StartClose => {
                            assert_eq!(self.device, Device::Open);
                            self.device = Device::Closing;
                        }
                        OpenedDecision::Closed(decision) => self.on_closed(decision),
                    }
                }
                Event::Close => {
                    let decision = self.channel.close();
                    self.on_close(decision, false);
                }
                Event::Rescind => {
                    let decision = self.channel.rescind();
                    self.on_close(decision, true);
                }
                Event::Released => {
                    let decision = self.channel.released();
                    self.on_close(decision, false);
                }
                Event::Reset => {
                    let decision = self.channel.reset();
                    self.on_close(decision, false);
                }
                Event::Closed => {
                    if self.device == Device::Closing {
                        self.device = Device::Closed;
                        let decision = self.channel.closed();
                        self.on_closed(decision);
                    } else {
                        assert!(matches!(self.channel.closed(), ClosedDecision::Ignore));
                    }
                }
            }
        }
    }

    fn event() -> impl Strategy<Value = Event> {
        prop::sample::select(vec![
            Event::Offer,
            Event::Open,
            Event::Opened(true),
            Event::Opened(false),
            Event::Close,
            Event::Rescind,
            Event::Released,
            Event::Reset,
            Event::Closed,
        ])
    }

    proptest! {
        /// In any order of events the device is opened and closed in turn, RESCIND is sent at
        /// most once and never while the ring is used, and a freed channel stays freed.
        #[test]
        fn any_order_of_events(events in prop::collection::vec(event(), 0..60)) {
            let mut world = World {
                channel: Channel::new(ID),
                device: Device::Closed,
                freed: false,
                rescinds: 0,
            };
            for event in events {
                world.apply(event);
                prop_assert_eq!(world.channel.uses_ring(), world.device != Device::Closed);
                prop_assert_eq!(world.freed, world.channel.state() == ChannelState::Released);
                prop_assert!(world.rescinds <= 1);
                if world.channel.state() == ChannelState::Rescinded {
                    prop_assert_eq!(world.rescinds, 1);
                }
            }
        }

        #[test]
        fn any_contact_is_judged(
            version in prop_oneof![
                any::<u32>(),
                prop::sample::select(&Version::NEWEST_FIRST[..]).prop_map(Version::raw),
            ],
            field: u64,
            id in 0u32..6,
        ) {
            let mut connection = Connection::new(Version::NEWEST);
            let mut message = contact(version, 0);
            message.interrupt_page_or_target = U64::new(field);
            let decision = connection.contact(&message, ConnectionId::new(id));
            prop_assert_eq!(
                matches!(decision, ContactDecision::Accept(_)),
                connection.version().is_some()
            );
            if let ContactDecision::Accept(agreed) = decision {
                prop_assert_eq!(agreed.version.raw(), version);
                prop_assert!(agreed.target.sint < 16);
            }
        }
    }
}
