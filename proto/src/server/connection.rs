// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The host's side of the connection with one guest.

use crate::ids::{ConnectionId, VpIndex};
use crate::message::{FeatureFlags, GuestMessage, InitiateContact, VersionResponse};
use crate::synic::{SINT_COUNT, VMBUS_SINT};
use crate::version::Version;
use crate::PAGE_SIZE;
use core::fmt;
use zerocopy::little_endian::{U16, U64};

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

    /// Speaks all versions up to this one from now on. Meant for while there is no connection: one
    /// that stands keeps its version, but may lose the connection id that messages come on.
    pub const fn set_max_version(&mut self, max_version: Version) {
        self.max_version = max_version;
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
