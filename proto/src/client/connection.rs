// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's side of the connection with the host: version, messages that are due, unload.

use super::Unexpected;
use crate::hypercall::HvStatus;
use crate::ids::{ConnectionId, VpIndex};
use crate::message::{
    ContactTarget, FeatureFlags, HostMessage, InitiateContact, Unload, VersionResponse,
};
use crate::synic::VMBUS_SINT;
use crate::version::Version;
use core::fmt;
use zerocopy::little_endian::{U32, U64};

/// What a guest tells the host of itself in INITIATE_CONTACT.
#[derive(Clone, Copy, Debug)]
pub struct ContactParams {
    /// The processor that handles the host's messages.
    pub target_vp: VpIndex,
    /// Guest physical address of the interrupt page; only hosts before version 5.0 hear of it.
    pub interrupt_page: u64,
    /// Guest physical addresses of the monitor pages: host to guest, guest to host.
    pub monitor_pages: [u64; 2],
    /// The VTL that the guest runs in, 0 nearly always.
    pub vtl: u8,
    /// Whether a paravisor offers confidential channels.
    pub confidential: bool,
    /// The newest version to try.
    pub max_version: Version,
    /// The oldest version to be content with: 4.0, or 5.2 for an isolated guest.
    pub min_version: Version,
}

impl ContactParams {
    /// The usual case: VTL 0, not confidential, all versions.
    pub const fn new(target_vp: VpIndex, interrupt_page: u64, monitor_pages: [u64; 2]) -> Self {
        Self {
            target_vp,
            interrupt_page,
            monitor_pages,
            vtl: 0,
            confidential: false,
            max_version: Version::NEWEST,
            min_version: Version::OLDEST,
        }
    }

    /// The message that asks for `version`.
    pub fn message(&self, version: Version) -> InitiateContact {
        let field = if version.names_message_sint() {
            let features = if self.confidential && version.has_confidential_channels() {
                FeatureFlags::CONFIDENTIAL_CHANNELS
            } else {
                FeatureFlags::empty()
            };
            ContactTarget {
                sint: VMBUS_SINT,
                vtl: self.vtl,
                reserved: [0; 2],
                feature_flags: U32::new(features.bits()),
            }
            .to_field()
        } else {
            U64::new(self.interrupt_page)
        };
        let [to_guest, to_host] = self.monitor_pages;
        InitiateContact {
            version: U32::new(version.raw()),
            target_vp: self.target_vp,
            interrupt_page_or_target: field,
            monitor_page1: U64::new(to_guest),
            monitor_page2: U64::new(to_host),
        }
    }

    /// The connection to try first for `version`.
    fn first_connection(&self, version: Version) -> ConnectionId {
        if !version.uses_message_connection_id() {
            ConnectionId::MESSAGE
        } else if self.vtl == 2 {
            ConnectionId::MESSAGE_REDIRECT
        } else {
            ConnectionId::MESSAGE_V5
        }
    }
}

/// One try to make contact.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// The version that is asked for.
    pub version: Version,
    /// Where to post the message.
    pub connection_id: ConnectionId,
    /// The message.
    pub message: InitiateContact,
}

/// What guest and host have agreed upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The version of the protocol.
    pub version: Version,
    /// Where to post all later messages.
    pub message_connection_id: ConnectionId,
}

/// Why there is no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectError {
    /// The host speaks none of the versions.
    NoCommonVersion,
    /// The message could not be posted.
    Post(HvStatus),
    /// The host speaks the version, but does not make the connection.
    Refused {
        /// The host's reason; see VERSION_RESPONSE.
        connection_state: u8,
    },
    /// The host names a connection id for later messages that cannot be one.
    InvalidConnectionId(ConnectionId),
    /// The host did not answer.
    TimedOut,
    /// There is a connection, or one is being made or left.
    Busy,
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCommonVersion => f.write_str("host speaks no version of VMBus that we speak"),
            Self::Post(status) => write!(f, "posting INITIATE_CONTACT failed: {status:?}"),
            Self::Refused { connection_state } => {
                write!(f, "host refused the connection, state {connection_state}")
            }
            Self::InvalidConnectionId(id) => write!(f, "host gave message connection {id}"),
            Self::TimedOut => f.write_str("host did not answer INITIATE_CONTACT"),
            Self::Busy => f.write_str("there is a connection already"),
        }
    }
}

impl core::error::Error for ConnectError {}

/// What to do next to make contact.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Post this, and wait for VERSION_RESPONSE.
    Post(Attempt),
    /// There is a connection.
    Connected(Agreed),
    /// There is none, and there will not be one.
    Failed(ConnectError),
}

#[derive(Clone, Copy, Debug)]
enum ConnectionState {
    Disconnected,
    Contacting {
        params: ContactParams,
        version: Version,
        connection_id: ConnectionId,
    },
    Connected(Agreed),
    Unloading(Agreed),
}

/// The guest's side of the connection with the host.
#[derive(Clone, Debug)]
pub struct Connection {
    state: ConnectionState,
}

impl Default for Connection {
    fn default() -> Self {
        Self::new()
    }
}

impl Connection {
    /// No connection.
    pub const fn new() -> Self {
        Self {
            state: ConnectionState::Disconnected,
        }
    }

    /// Starts to make contact, with the newest version.
    pub fn start(&mut self, params: &ContactParams) -> Step {
        match self.state {
            ConnectionState::Disconnected => self.attempt(*params, Some(params.max_version)),
            _ => Step::Failed(ConnectError::Busy),
        }
    }

    fn attempt(&mut self, params: ContactParams, version: Option<Version>) -> Step {
        match version.filter(|v| *v >= params.min_version) {
            Some(version) => self.attempt_on(params, version, params.first_connection(version)),
            None => self.fail(ConnectError::NoCommonVersion),
        }
    }

    fn attempt_on(
        &mut self,
        params: ContactParams,
        version: Version,
        connection_id: ConnectionId,
    ) -> Step {
        self.state = ConnectionState::Contacting {
            params,
            version,
            connection_id,
        };
        Step::Post(Attempt {
            version,
            connection_id,
            message: params.message(version),
        })
    }

    fn fail(&mut self, error: ConnectError) -> Step {
        self.state = ConnectionState::Disconnected;
        Step::Failed(error)
    }

    /// The message of the last [`Step::Post`] could not be posted, for good.
    pub fn post_failed(&mut self, status: HvStatus) -> Step {
        let ConnectionState::Contacting {
            params,
            version,
            connection_id,
        } = self.state
        else {
            return Step::Failed(ConnectError::Busy);
        };
        if status != HvStatus::INVALID_CONNECTION_ID {
            self.fail(ConnectError::Post(status))
        } else if connection_id == ConnectionId::MESSAGE_REDIRECT {
            self.attempt_on(params, version, ConnectionId::MESSAGE_V5)
        } else {
            // A host that is too old for the version does not have the connection.
            self.attempt(params, version.older())
        }
    }

    /// VERSION_RESPONSE came.
    ///
    /// # Errors
    ///
    /// [`Unexpected::NotWaited`] if no contact is being made.
    pub fn version_response(&mut self, response: &VersionResponse) -> Result<Step, Unexpected> {
        let ConnectionState::Contacting {
            params, version, ..
        } = self.state
        else {
            return Err(Unexpected::NotWaited);
        };
        if response.version_supported == 0 {
            return Ok(self.attempt(params, version.older()));
        }
        // Hosts before 5.0 need not set the field.
        if version.uses_message_connection_id() && response.connection_state != 0 {
            return Ok(self.fail(ConnectError::Refused {
                connection_state: response.connection_state,
            }));
        }
        let message_connection_id = if version.uses_message_connection_id() {
            let id = response.message_connection_id;
            if id.get() == 0 || !id.is_valid() {
                return Ok(self.fail(ConnectError::InvalidConnectionId(id)));
            }
            id
        } else {
            ConnectionId::MESSAGE
        };
        let agreed = Agreed {
            version,
            message_connection_id,
        };
        self.state = ConnectionState::Connected(agreed);
        Ok(Step::Connected(agreed))
    }

    /// VERSION_RESPONSE does not come. The host may still take the monitor pages for its own, so
    /// they must not be used for anything else.
    pub fn contact_timed_out(&mut self) -> Step {
        match self.state {
            ConnectionState::Contacting { .. } => self.fail(ConnectError::TimedOut),
            _ => Step::Failed(ConnectError::Busy),
        }
    }

    /// What is agreed, while there is a connection.
    pub fn agreed(&self) -> Option<Agreed> {
        match self.state {
            ConnectionState::Connected(agreed) | ConnectionState::Unloading(agreed) => Some(agreed),
            _ => None,
        }
    }

    /// The agreed version: what [`HostMessage::parse`] wants to know.
    pub fn version(&self) -> Option<Version> {
        self.agreed().map(|agreed| agreed.version)
    }

    /// Whether a message of the host may be looked at now. While the guest leaves the bus, only
    /// the answer to that is of interest.
    pub fn accepts(&self, message: &HostMessage) -> bool {
        match self.state {
            ConnectionState::Disconnected => false,
            ConnectionState::Contacting { .. } => {
                matches!(message, HostMessage::VersionResponse(_))
            }
            ConnectionState::Connected(_) => !matches!(
                message,
                HostMessage::VersionResponse(_) | HostMessage::UnloadResponse(_)
            ),
            ConnectionState::Unloading(_) => matches!(message, HostMessage::UnloadResponse(_)),
        }
    }

    /// The guest leaves the bus. `Some`: post this, and wait for UNLOAD_RESPONSE.
    pub fn unload(&mut self) -> Option<Unload> {
        match self.state {
            ConnectionState::Connected(agreed) => {
                self.state = ConnectionState::Unloading(agreed);
                Some(Unload {})
            }
            _ => None,
        }
    }

    /// UNLOAD_RESPONSE came: the host does not touch the guest's memory any more.
    ///
    /// # Errors
    ///
    /// [`Unexpected::NotWaited`] if the guest is not leaving.
    pub fn unload_response(&mut self) -> Result<(), Unexpected> {
        match self.state {
            ConnectionState::Unloading(_) => {
                self.state = ConnectionState::Disconnected;
                Ok(())
            }
            _ => Err(Unexpected::NotWaited),
        }
    }

    /// UNLOAD_RESPONSE does not come. All memory that the host knows of must be leaked.
    pub fn unload_timed_out(&mut self) {
        if let ConnectionState::Unloading(_) = self.state {
            self.state = ConnectionState::Disconnected;
        }
    }
}
