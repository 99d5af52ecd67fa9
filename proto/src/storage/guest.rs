// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's side of the handshake that a controller's channel begins with.

use super::{
    ChannelProperties, Operation, PropertyFlags, Status, TooShort, Version, VersionBody,
    VstorPacket, WwnPacket, MIN_TRANSFER_SIZE, PACKET_SIZE,
};
use core::fmt;
use zerocopy::little_endian::U16;

/// What the guest wants from a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestConfig {
    /// How many sub-channels can be used; one less than there are processors.
    pub sub_channels: u16,
    /// Whether it is a Fibre Channel adapter, which is asked for its names.
    pub fibre_channel: bool,
}

/// What guest and host have agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Version in use.
    pub version: Version,
    /// The largest transfer of one command, in bytes; at least 4096 and a multiple of it.
    pub max_transfer_bytes: u32,
    /// How many sub-channels the host will offer now.
    pub sub_channels: u16,
    /// Names of a Fibre Channel port.
    pub wwn: Option<WwnPacket>,
}

/// What the guest does next in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestStep {
    /// Send this as in-band packet with completion request, wait for the completion, and give it to
    /// [`GuestHandshake::on_completion`].
    Send(VstorPacket),
    /// The controller can be used.
    Done(Negotiated),
}

/// Why the handshake of the guest has failed. The channel must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestError {
    /// A completion is too short.
    TooShort(TooShort),
    /// A completion does not say that it is one.
    UnexpectedOperation(Operation),
    /// The host has refused a step.
    Refused {
        /// The step.
        operation: Operation,
        /// The reason.
        status: Status,
    },
    /// The host has refused all versions of [`Version::GUEST`].
    NoCommonVersion,
    /// The host does not allow transfers of a whole page.
    TransferLimit(u32),
    /// A completion came although the handshake waits for none.
    NotWaiting,
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort(error) => error.fmt(f),
            Self::UnexpectedOperation(operation) => {
                write!(f, "unexpected storage operation {operation:?} in answer")
            }
            Self::Refused { operation, status } => {
                write!(
                    f,
                    "host refused storage operation {operation:?}: {status:?}"
                )
            }
            Self::NoCommonVersion => {
                f.write_str("host supports no common version of the storage protocol")
            }
            Self::TransferLimit(bytes) => write!(f, "host limits transfers to {bytes} bytes"),
            Self::NotWaiting => f.write_str("unexpected answer in storage handshake"),
        }
    }
}

impl core::error::Error for GuestError {}

/// Handshake of the guest, on the primary channel of a controller. Sub-channels have none.
///
/// The steps are BEGIN_INITIALIZATION, QUERY_PROTOCOL_VERSION until the host takes one,
/// QUERY_PROPERTIES, FCHBA_DATA for Fibre Channel, END_INITIALIZATION, and CREATE_SUB_CHANNELS if
/// both sides want some.
#[derive(Clone, Copy, Debug)]
pub struct GuestHandshake {
    config: GuestConfig,
    state: GuestState,
}

#[derive(Clone, Copy, Debug)]
enum GuestState {
    New,
    Begin,
    /// The version at this place of [`Version::GUEST`] was proposed.
    Version(usize),
    Properties(Version),
    WorldWideNames(Agreed),
    End(Agreed),
    SubChannels(Agreed),
    Finished,
}

/// What is known before the number of sub-channels is.
#[derive(Clone, Copy, Debug)]
struct Agreed {
    version: Version,
    max_transfer_bytes: u32,
    /// How many sub-channels to ask for.
    sub_channels: u16,
    wwn: Option<WwnPacket>,
}

impl Agreed {
    fn with_sub_channels(self, sub_channels: u16) -> Negotiated {
        Negotiated {
            version: self.version,
            max_transfer_bytes: self.max_transfer_bytes,
            sub_channels,
            wwn: self.wwn,
        }
    }
}

impl GuestHandshake {
    /// A handshake that has not begun.
    pub fn new(config: GuestConfig) -> Self {
        Self {
            config,
            state: GuestState::New,
        }
    }

    /// Begins, or begins again: returns the first packet.
    pub fn start(&mut self) -> VstorPacket {
        self.state = GuestState::Begin;
        VstorPacket::request(Operation::BEGIN_INITIALIZATION)
    }

    /// Judges the payload of the completion of the packet that was sent last.
    ///
    /// # Errors
    /// [`GuestError`]; the handshake is over. That the host refuses to create sub-channels is no
    /// error.
    pub fn on_completion(&mut self, payload: &[u8]) -> Result<GuestStep, GuestError> {
        // After an error, there is no state to continue in.
        let state = core::mem::replace(&mut self.state, GuestState::Finished);
        if matches!(state, GuestState::New | GuestState::Finished) {
            self.state = state;
            return Err(GuestError::NotWaiting);
        }
        let answer = VstorPacket::parse(payload, PACKET_SIZE).map_err(GuestError::TooShort)?;
        if answer.operation != Operation::COMPLETE_IO {
            return Err(GuestError::UnexpectedOperation(answer.operation));
        }
        let status = answer.status;
        let check = |operation| match status {
            Status::SUCCESS => Ok(()),
            _ => Err(GuestError::Refused { operation, status }),
        };
        match state {
            GuestState::New | GuestState::Finished => Err(GuestError::NotWaiting),
            GuestState::Begin => {
                check(Operation::BEGIN_INITIALIZATION)?;
                self.propose(0)
            }
            GuestState::Version(place) => {
                if status != Status::SUCCESS {
                    return self.propose(place.saturating_add(1));
                }
                let version = *Version::GUEST
                    .get(place)
                    .ok_or(GuestError::NoCommonVersion)?;
                self.send(
                    GuestState::Properties(version),
                    VstorPacket::request(Operation::QUERY_PROPERTIES),
                )
            }
            GuestState::Properties(version) => {
                check(Operation::QUERY_PROPERTIES)?;
                let agreed = self.judge_properties(version, &answer.properties())?;
                if self.config.fibre_channel {
                    self.send(
                        GuestState::WorldWideNames(agreed),
                        VstorPacket::request(Operation::FCHBA_DATA),
                    )
                } else {
                    self.end(agreed)
                }
            }
            GuestState::WorldWideNames(agreed) => {
                check(Operation::FCHBA_DATA)?;
                self.end(Agreed {
                    wwn: Some(answer.wwn()),
                    ..agreed
                })
            }
            GuestState::End(agreed) => {
                check(Operation::END_INITIALIZATION)?;
                if agreed.sub_channels == 0 {
                    return Ok(GuestStep::Done(agreed.with_sub_channels(0)));
                }
                let mut packet = VstorPacket::request(Operation::CREATE_SUB_CHANNELS);
                packet.set_body(&U16::new(agreed.sub_channels));
                self.send(GuestState::SubChannels(agreed), packet)
            }
            GuestState::SubChannels(agreed) => {
                // Without sub-channels the controller is slower, but it works.
                let granted = match status {
                    Status::SUCCESS => agreed.sub_channels,
                    _ => 0,
                };
                Ok(GuestStep::Done(agreed.with_sub_channels(granted)))
            }
        }
    }

    fn send(&mut self, next: GuestState, packet: VstorPacket) -> Result<GuestStep, GuestError> {
        self.state = next;
        Ok(GuestStep::Send(packet))
    }

    fn propose(&mut self, place: usize) -> Result<GuestStep, GuestError> {
        let version = Version::GUEST
            .get(place)
            .ok_or(GuestError::NoCommonVersion)?;
        let mut packet = VstorPacket::request(Operation::QUERY_PROTOCOL_VERSION);
        packet.set_body(&VersionBody {
            major_minor: version.raw().into(),
            revision: 0.into(),
        });
        self.send(GuestState::Version(place), packet)
    }

    fn end(&mut self, agreed: Agreed) -> Result<GuestStep, GuestError> {
        self.send(
            GuestState::End(agreed),
            VstorPacket::request(Operation::END_INITIALIZATION),
        )
    }

    fn judge_properties(
        &self,
        version: Version,
        properties: &ChannelProperties,
    ) -> Result<Agreed, GuestError> {
        let limit = properties.max_transfer_bytes.get();
        if limit < MIN_TRANSFER_SIZE {
            return Err(GuestError::TransferLimit(limit));
        }
        let flags = PropertyFlags::from_bits_retain(properties.flags.get());
        let sub_channels = if flags.contains(PropertyFlags::MULTI_CHANNEL) {
            properties
                .max_channel_count
                .get()
                .min(self.config.sub_channels)
        } else {
            0
        };
        Ok(Agreed {
            version,
            max_transfer_bytes: limit & !(MIN_TRANSFER_SIZE - 1),
            sub_channels,
            wwn: None,
        })
    }
}
