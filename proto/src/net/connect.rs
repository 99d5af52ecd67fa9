// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's side of NVSP: from an open channel to an adapter that can send and receive.
//!
//! The guest proposes versions, newest first, until the host takes one, tells what it is like, and
//! shares its two buffers. [`Connect`] says at each step what to do ([`Step`]); an answer that does not
//! fit is an error, and ends it. Sub-channels come later, when the guest knows how many there can be:
//! [`granted_sub_channels`].
//!
//! ```
//! use hv_proto::ids::GpadlId;
//! use hv_proto::net::connect::{Connect, GuestConfig, Step};
//! use hv_proto::net::provider::{Provider, ProviderConfig, ProviderStep};
//!
//! let mut provider = Provider::new(ProviderConfig::default());
//! let mut connect = Connect::new(GuestConfig::new(1500));
//! let mut step = connect.start();
//! let agreed = loop {
//!     step = match step {
//!         Step::Request(message) => {
//!             let answer = match provider.on_message(&message).unwrap() {
//!                 ProviderStep::Answer(answer) => answer,
//!                 ProviderStep::MapReceiveBuffer(_) => provider.receive_buffer_mapped(Some(1 << 20)),
//!                 ProviderStep::MapSendBuffer(_) => provider.send_buffer_mapped(Some(1 << 20)),
//!                 other => panic!("{other:?}"),
//!             };
//!             connect.on_answer(answer.as_bytes()).unwrap()
//!         }
//!         Step::Notify(message) => {
//!             provider.on_message(&message).unwrap();
//!             connect.sent().unwrap()
//!         }
//!         Step::ShareBuffer { .. } => connect.shared(GpadlId::new(7), 1 << 20).unwrap(),
//!         Step::Done(agreed) => break agreed,
//!     };
//! };
//! assert_eq!(Some(agreed.version), provider.version());
//! assert_eq!(Some(agreed.receive), provider.receive_sections());
//! ```
//!
//! A state machine only: it does not send, wait or allocate.
//!
//! Source: `netvsc_connect_vsp` and `netvsc_init_buf` in `drivers/net/hyperv/netvsc.c` of the kernel.

use super::nvsp::*;
use super::sections::{SectionError, Sections};
use super::ETHERNET_HEADER_SIZE;
use crate::ids::GpadlId;
use core::fmt;

/// What the guest is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestConfig {
    /// The largest frame with its Ethernet header, in bytes.
    pub frame_size: u32,
    /// What it can do; what the version does not have is left out.
    pub capabilities: Capabilities,
    /// The oldest version that it accepts.
    pub min_version: Version,
    /// The newest version that it proposes.
    pub max_version: Version,
}

impl GuestConfig {
    /// A guest that takes any version, with everything it can do but virtual functions.
    pub fn new(mtu: u32) -> Self {
        Self {
            frame_size: mtu.saturating_add(ETHERNET_HEADER_SIZE),
            capabilities: Capabilities::all().difference(Capabilities::SRIOV),
            min_version: Version::V1,
            max_version: Version::V6_1,
        }
    }
}

/// One of the two shared buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// For what the host sends.
    Receive,
    /// For what the guest sends.
    Send,
}

/// What the guest must do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send this in an in-band packet that asks for a completion, and give the completion's payload to
    /// [`Connect::on_answer`].
    Request([u8; MESSAGE_SIZE]),
    /// Send this in an in-band packet that asks for none, then call [`Connect::sent`].
    Notify([u8; MESSAGE_SIZE]),
    /// Make a GPADL of memory for this buffer, of at most `max_size` bytes, then call
    /// [`Connect::shared`].
    ShareBuffer {
        /// Which one.
        buffer: Buffer,
        /// Its largest size in bytes.
        max_size: u32,
    },
    /// The adapter can send and receive.
    Done(Agreed),
}

/// What guest and host have agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Version of the protocol.
    pub version: Version,
    /// How the host has divided the receive buffer.
    pub receive: Sections,
    /// How the host has divided the send buffer.
    pub send: Sections,
}

/// Why the guest cannot use the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nothing of the kind is to be done now.
    OutOfOrder,
    /// The answer is no message.
    Message(NvspError),
    /// The message is not the answer.
    Unexpected(MessageType),
    /// The host takes none of the versions.
    NoCommonVersion,
    /// What the host has made of a buffer.
    Buffer(Buffer, SectionError),
    /// The host has no sub-channels for the guest.
    NoSubChannels(Status),
    /// The host says that it offers more sub-channels than the guest has asked for.
    SubChannelCount(u32),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::OutOfOrder => f.write_str("NVSP step out of order"),
            Self::Message(error) => write!(f, "{error}"),
            Self::Unexpected(message_type) => write!(f, "{message_type:?} is not the answer"),
            Self::NoCommonVersion => f.write_str("host takes no version of NVSP"),
            Self::Buffer(Buffer::Receive, error) => write!(f, "receive buffer: {error}"),
            Self::Buffer(Buffer::Send, error) => write!(f, "send buffer: {error}"),
            Self::NoSubChannels(status) => write!(f, "no sub-channels: {status:?}"),
            Self::SubChannelCount(count) => write!(f, "host offers {count} sub-channels"),
        }
    }
}

impl core::error::Error for ConnectError {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    /// Waits for the answer to the proposal.
    Proposed(Version),
    /// Is sending NDIS_CONFIG.
    Configuring(Version),
    /// Is sending NDIS_VERSION.
    Telling(Version),
    /// Is making the receive buffer.
    MakingReceive(Version),
    /// Waits for the host to divide the receive buffer, which has this many bytes.
    SharingReceive(Version, u32),
    /// Is making the send buffer.
    MakingSend(Version, Sections),
    /// Waits for the host to divide the send buffer, which has this many bytes.
    SharingSend(Version, Sections, u32),
    Over,
}

/// Negotiation of the guest. See the module.
#[derive(Clone, Copy, Debug)]
pub struct Connect {
    config: GuestConfig,
    state: State,
    /// The host was told of the receive buffer.
    receive_told: bool,
    /// The host was told of the send buffer.
    send_told: bool,
}

impl Connect {
    /// A negotiation that has not begun.
    pub fn new(config: GuestConfig) -> Self {
        Self {
            config,
            state: State::New,
            receive_told: false,
            send_told: false,
        }
    }

    /// Begins, or begins again on a channel that was opened again.
    pub fn start(&mut self) -> Step {
        self.receive_told = false;
        self.send_told = false;
        self.propose(self.config.max_version)
    }

    /// The message was sent; see [`Step::Notify`].
    ///
    /// # Errors
    /// [`ConnectError::OutOfOrder`], with nothing changed.
    pub fn sent(&mut self) -> Result<Step, ConnectError> {
        match self.state {
            State::Configuring(version) => Ok(self.tell_ndis(version)),
            State::Telling(version) => {
                self.state = State::MakingReceive(version);
                Ok(Step::ShareBuffer {
                    buffer: Buffer::Receive,
                    max_size: version.max_receive_buffer(),
                })
            }
            _ => Err(ConnectError::OutOfOrder),
        }
    }

    /// Memory of `len` bytes is ready for the host; see [`Step::ShareBuffer`].
    ///
    /// # Errors
    /// [`ConnectError::OutOfOrder`], with nothing changed.
    pub fn shared(&mut self, gpadl: GpadlId, len: u32) -> Result<Step, ConnectError> {
        match self.state {
            State::MakingReceive(version) => {
                self.state = State::SharingReceive(version, len);
                self.receive_told = true;
                Ok(Step::Request(SendReceiveBuffer::new(gpadl).encode()))
            }
            State::MakingSend(version, receive) => {
                self.state = State::SharingSend(version, receive, len);
                self.send_told = true;
                Ok(Step::Request(SendSendBuffer::new(gpadl).encode()))
            }
            _ => Err(ConnectError::OutOfOrder),
        }
    }

    /// Takes the payload of the completion that the host has sent; see [`Step::Request`].
    ///
    /// # Errors
    /// [`ConnectError`]. It is over then, but for [`ConnectError::OutOfOrder`], which changes nothing.
    pub fn on_answer(&mut self, payload: &[u8]) -> Result<Step, ConnectError> {
        let state = self.state;
        let agreed = match state {
            State::Proposed(_) => None,
            State::SharingReceive(version, _) | State::SharingSend(version, ..) => Some(version),
            _ => return Err(ConnectError::OutOfOrder),
        };
        self.state = State::Over;
        let message = HostMessage::parse(payload, agreed).map_err(ConnectError::Message)?;
        match (state, message) {
            (State::Proposed(version), HostMessage::InitComplete(complete)) => {
                if complete.status == Status::SUCCESS {
                    Ok(self.configure(version))
                } else {
                    self.older(version)
                }
            }
            (
                State::SharingReceive(version, len),
                HostMessage::ReceiveBufferComplete(complete, parts),
            ) => {
                let receive = match complete.status {
                    Status::SUCCESS => Sections::receive(parts, len),
                    status => Err(SectionError::Refused(status)),
                }
                .map_err(|error| ConnectError::Buffer(Buffer::Receive, error))?;
                self.state = State::MakingSend(version, receive);
                Ok(Step::ShareBuffer {
                    buffer: Buffer::Send,
                    max_size: version.max_send_buffer(),
                })
            }
            (
                State::SharingSend(version, receive, len),
                HostMessage::SendBufferComplete(complete),
            ) => {
                let send = Sections::send(&complete, len)
                    .map_err(|error| ConnectError::Buffer(Buffer::Send, error))?;
                Ok(Step::Done(Agreed {
                    version,
                    receive,
                    send,
                }))
            }
            _ => Err(ConnectError::Unexpected(
                split_type(payload).map_err(ConnectError::Message)?.0,
            )),
        }
    }

    /// The messages that take back the buffers that the host was told of: before the channel is
    /// closed, send those that there are, without asking for a completion.
    ///
    /// The host has let go of the memory only when it has acknowledged the teardown of the GPADL.
    pub fn revoke(&self) -> [Option<[u8; MESSAGE_SIZE]>; 2] {
        [
            self.receive_told
                .then(|| RevokeReceiveBuffer::new().encode()),
            self.send_told.then(|| RevokeSendBuffer::new().encode()),
        ]
    }

    fn propose(&mut self, version: Version) -> Step {
        self.state = State::Proposed(version);
        Step::Request(Init::propose(version).encode())
    }

    /// Proposes the next version after `refused`.
    fn older(&mut self, refused: Version) -> Result<Step, ConnectError> {
        let older = Version::NEWEST_FIRST
            .into_iter()
            .find(|version| *version < refused)
            .filter(|version| *version >= self.config.min_version)
            .ok_or(ConnectError::NoCommonVersion)?;
        Ok(self.propose(older))
    }

    fn configure(&mut self, version: Version) -> Step {
        if !version.has_ndis_config() {
            return self.tell_ndis(version);
        }
        self.state = State::Configuring(version);
        let capabilities = self.config.capabilities & version.capabilities();
        Step::Notify(NdisConfig::new(self.config.frame_size, capabilities).encode())
    }

    fn tell_ndis(&mut self, version: Version) -> Step {
        self.state = State::Telling(version);
        Step::Notify(version.ndis().encode())
    }
}

/// How many sub-channels the host will offer, by its answer to [`SubChannelRequest::allocate`].
///
/// # Errors
/// [`ConnectError`]; the adapter works with its primary channel.
pub fn granted_sub_channels(
    answer: &[u8],
    version: Version,
    asked: u32,
) -> Result<u32, ConnectError> {
    match HostMessage::parse(answer, Some(version)).map_err(ConnectError::Message)? {
        HostMessage::SubChannel(complete) => match (complete.status, complete.count.get()) {
            (Status::SUCCESS, count) if count <= asked => Ok(count),
            (Status::SUCCESS, count) => Err(ConnectError::SubChannelCount(count)),
            (status, _) => Err(ConnectError::NoSubChannels(status)),
        },
        _ => Err(ConnectError::Unexpected(
            split_type(answer).map_err(ConnectError::Message)?.0,
        )),
    }
}
