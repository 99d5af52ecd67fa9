// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The host's side of the handshake, and how it sorts the guest's packets after it.

use super::{
    ChannelProperties, LunAddress, Operation, PropertyFlags, ScsiRequest, Status, TooShort,
    Version, VstorPacket, WwnPacket, OLD_PACKET_SIZE,
};
use zerocopy::FromZeros as _;

/// What the host offers on a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// The newest version that is accepted; older known ones are, too.
    pub max_version: Version,
    /// The largest transfer of one command, in bytes.
    pub max_transfer_bytes: u32,
    /// How many sub-channels the guest may ask for.
    pub max_sub_channels: u16,
    /// Names of a Fibre Channel port; `None` for other controllers.
    pub wwn: Option<WwnPacket>,
}

/// What the host does with a packet of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostStep {
    /// Answer with this.
    Answer(VstorPacket),
    /// Offer this many sub-channels after answering with success.
    CreateSubChannels(u16),
    /// Run this SCSI command, and answer with [`VstorPacket::io_completion`].
    Execute(ScsiRequest),
    /// Abort all commands that run (of one logical unit for [`Operation::RESET_LUN`]), then answer
    /// with success.
    Reset(Operation, LunAddress),
}

/// Handshake of the host, and sorting of the guest's packets after it.
///
/// It enforces the order of the steps. A step out of order is answered with
/// [`Status::INVALID_DEVICE_STATE`] and changes nothing.
#[derive(Clone, Copy, Debug)]
pub struct HostHandshake {
    config: HostConfig,
    pub(super) state: HostState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostState {
    /// Waits for BEGIN_INITIALIZATION.
    New,
    /// Waits for an acceptable version.
    Begun,
    /// Waits for QUERY_PROPERTIES.
    Versioned(Version),
    /// Waits for END_INITIALIZATION.
    Described(Version),
    Ready {
        version: Version,
        has_sub_channels: bool,
    },
}

impl HostHandshake {
    /// A handshake that waits for the guest to begin.
    pub fn new(config: HostConfig) -> Self {
        Self {
            config,
            state: HostState::New,
        }
    }

    /// The version in use; `None` as long as there is none.
    pub fn version(&self) -> Option<Version> {
        match self.state {
            HostState::New | HostState::Begun => None,
            HostState::Versioned(version)
            | HostState::Described(version)
            | HostState::Ready { version, .. } => Some(version),
        }
    }

    /// Whether the handshake is over and commands are accepted.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, HostState::Ready { .. })
    }

    /// Takes the payload of an in-band or GPA-direct packet of the guest.
    ///
    /// # Errors
    /// [`TooShort`]; the packet cannot be answered in a sensible way.
    pub fn on_packet(&mut self, payload: &[u8]) -> Result<HostStep, TooShort> {
        let min_size = self.version().map_or(OLD_PACKET_SIZE, Version::packet_size);
        let packet = VstorPacket::parse(payload, min_size)?;
        let answer = |status| Ok(HostStep::Answer(VstorPacket::completion(status)));
        match (self.state, packet.operation) {
            (HostState::New, Operation::BEGIN_INITIALIZATION) => {
                self.state = HostState::Begun;
                answer(Status::SUCCESS)
            }
            (HostState::Begun, Operation::QUERY_PROTOCOL_VERSION) => {
                let version = Version::from_raw(packet.version());
                let status = match version {
                    Some(version) if version <= self.config.max_version => {
                        self.state = HostState::Versioned(version);
                        Status::SUCCESS
                    }
                    _ => Status::REVISION_MISMATCH,
                };
                let mut answer = VstorPacket::completion(status);
                answer.body = packet.body;
                Ok(HostStep::Answer(answer))
            }
            (HostState::Versioned(version), Operation::QUERY_PROPERTIES) => {
                self.state = HostState::Described(version);
                let mut answer = VstorPacket::completion(Status::SUCCESS);
                answer.set_body(&self.properties(version));
                Ok(HostStep::Answer(answer))
            }
            (HostState::Described(_), Operation::FCHBA_DATA) => {
                let Some(wwn) = self.config.wwn else {
                    return answer(Status::NOT_SUPPORTED);
                };
                let mut answer = VstorPacket::completion(Status::SUCCESS);
                answer.set_body(&wwn);
                Ok(HostStep::Answer(answer))
            }
            (HostState::Described(version), Operation::END_INITIALIZATION) => {
                self.state = HostState::Ready {
                    version,
                    has_sub_channels: false,
                };
                answer(Status::SUCCESS)
            }
            (HostState::Ready { .. }, Operation::EXECUTE_SRB) => {
                Ok(HostStep::Execute(packet.scsi_request()))
            }
            (
                HostState::Ready { .. },
                Operation::RESET_BUS | Operation::RESET_ADAPTER | Operation::RESET_LUN,
            ) => Ok(HostStep::Reset(
                packet.operation,
                packet.scsi_request().address(),
            )),
            (
                HostState::Ready {
                    version,
                    has_sub_channels: false,
                },
                Operation::CREATE_SUB_CHANNELS,
            ) => {
                let count = packet.sub_channel_count();
                if !version.has_sub_channels() {
                    return answer(Status::NOT_SUPPORTED);
                }
                if count > self.config.max_sub_channels {
                    return answer(Status::INVALID_PARAMETER);
                }
                self.state = HostState::Ready {
                    version,
                    has_sub_channels: true,
                };
                Ok(HostStep::CreateSubChannels(count))
            }
            (_, operation) if Self::is_request(operation) => answer(Status::INVALID_DEVICE_STATE),
            _ => answer(Status::INVALID_DEVICE_REQUEST),
        }
    }

    /// Whether a guest may send this at some time.
    fn is_request(operation: Operation) -> bool {
        operation.name().is_some()
            && !matches!(
                operation,
                Operation::COMPLETE_IO | Operation::REMOVE_DEVICE | Operation::ENUMERATE_BUS
            )
    }

    fn properties(&self, version: Version) -> ChannelProperties {
        let (sub_channels, flags) =
            if version.has_sub_channels() && self.config.max_sub_channels != 0 {
                (self.config.max_sub_channels, PropertyFlags::MULTI_CHANNEL)
            } else {
                (0, PropertyFlags::empty())
            };
        ChannelProperties {
            max_channel_count: sub_channels.into(),
            flags: flags.bits().into(),
            max_transfer_bytes: self.config.max_transfer_bytes.into(),
            ..ChannelProperties::new_zeroed()
        }
    }
}
