// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The host's side of NVSP: the counterpart of [`super::connect`].
//!
//! [`Provider`] takes the guest's messages and says what to do ([`ProviderStep`]). It enforces the
//! order: a version first, a buffer before it is used, each buffer once. What comes out of order is
//! answered with a failure, or is an error if there is no answer to it, and changes nothing.
//!
//! A state machine only: it does not map memory, send or wait.
//!
//! Source: the guest's side in `drivers/net/hyperv/netvsc.c` of the kernel.

use super::nvsp::*;
use super::sections::{SectionError, Sections};
use super::{Span, MAX_CHANNELS, RECEIVE_BUFFER_ID, SEND_BUFFER_ID};
use crate::ids::GpadlId;
use core::fmt;
use zerocopy::little_endian::U32;

/// Bytes that a section of the receive buffer has beside the frame: head and items.
const SECTION_OVERHEAD: u32 = 200;

/// Sections of the receive buffer are a multiple of this.
const SECTION_ALIGNMENT: u32 = 64;

/// The smallest section of the receive buffer, whatever frames the guest wants: control messages must
/// fit, too. Also what a guest gets that does not tell its MTU.
const MIN_RECEIVE_SECTION: u32 = 1728;

/// Size of the sections of the send buffer, in bytes.
const SEND_SECTION_SIZE: u32 = 6144;

/// What the host offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProviderConfig {
    /// The newest version that is accepted; older ones are, too.
    pub max_version: Version,
    /// Most sub-channels.
    pub max_sub_channels: u32,
    /// The largest frame with its Ethernet header, in bytes.
    pub max_frame_size: u32,
}

impl Default for ProviderConfig {
    /// Everything that the protocol has.
    fn default() -> Self {
        Self {
            max_version: Version::V6_1,
            max_sub_channels: MAX_CHANNELS - 1,
            max_frame_size: 65_535,
        }
    }
}

/// An answer as bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NvspAnswer {
    bytes: [u8; MESSAGE_SIZE],
    len: usize,
}

impl NvspAnswer {
    fn full(bytes: [u8; MESSAGE_SIZE]) -> Self {
        Self {
            bytes,
            len: MESSAGE_SIZE,
        }
    }

    /// No payload.
    const EMPTY: Self = Self {
        bytes: [0; MESSAGE_SIZE],
        len: 0,
    };

    /// Payload of the completion packet; possibly empty.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl fmt::Debug for NvspAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match split_type(self.as_bytes()) {
            Ok((message_type, _)) => write!(f, "NvspAnswer({message_type:?})"),
            Err(_) => f.write_str("NvspAnswer(empty)"),
        }
    }
}

/// Where the guest says an RNDIS message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RndisPlace {
    /// What kind of message.
    pub channel_type: ChannelType,
    /// The part of the send buffer that the message is in, or begins in. Without one, the message is in
    /// the packet's own ranges of guest memory; they follow the part if there are both.
    pub section: Option<Span>,
}

/// What the host does with a message of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProviderStep {
    /// Complete the packet with this.
    Answer(NvspAnswer),
    /// Nothing.
    None,
    /// Map this memory for what is sent to the guest, then complete the packet with what
    /// [`Provider::receive_buffer_mapped`] says.
    MapReceiveBuffer(GpadlId),
    /// Map this memory for what the guest sends, then complete the packet with what
    /// [`Provider::send_buffer_mapped`] says.
    MapSendBuffer(GpadlId),
    /// Do not use the receive buffer any more, and unmap it.
    UnmapReceiveBuffer,
    /// Do not use the send buffer any more, and unmap it.
    UnmapSendBuffer,
    /// The guest has told what it is like.
    Configured(NdisConfig),
    /// Take this RNDIS message, then complete the packet with [`PacketComplete`].
    Rndis(RndisPlace),
    /// The guest has dealt with the packet that was sent to it.
    Completed(Status),
    /// Complete the packet with the answer, then offer this many sub-channels.
    OfferSubChannels(u32, NvspAnswer),
    /// Send frames this way from now on, and complete the packet without a payload.
    SwitchDataPath(DataPath, NvspAnswer),
}

/// What the host cannot do anything about, or with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProviderError {
    /// It is no message.
    Message(NvspError),
    /// It comes at the wrong time.
    OutOfOrder(MessageType),
    /// It names another buffer.
    Buffer(u16),
    /// It names a section that is not there. Complete the packet with a failure.
    Section(SectionError),
    /// Guests do not send this.
    Unknown(MessageType),
}

impl fmt::Display for ProviderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(error) => write!(f, "{error}"),
            Self::OutOfOrder(message_type) => write!(f, "{message_type:?} out of order"),
            Self::Buffer(id) => write!(f, "there is no buffer {id:#x}"),
            Self::Section(error) => write!(f, "{error}"),
            Self::Unknown(message_type) => write!(f, "unknown message {message_type:?}"),
        }
    }
}

impl core::error::Error for ProviderError {}

/// State of a buffer that the guest shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shared {
    Not,
    Mapping,
    Mapped(Sections),
}

impl Shared {
    fn sections(self) -> Option<Sections> {
        match self {
            Self::Mapped(sections) => Some(sections),
            Self::Not | Self::Mapping => None,
        }
    }
}

/// The provider's side of one adapter. See the module.
#[derive(Clone, Copy, Debug)]
pub struct Provider {
    config: ProviderConfig,
    version: Option<Version>,
    ndis_version: Option<NdisVersion>,
    guest: Option<NdisConfig>,
    receive: Shared,
    send: Shared,
    sub_channels: Option<u32>,
}

impl Provider {
    /// An adapter whose channel was just opened.
    pub fn new(config: ProviderConfig) -> Self {
        Self {
            config,
            version: None,
            ndis_version: None,
            guest: None,
            receive: Shared::Not,
            send: Shared::Not,
            sub_channels: None,
        }
    }

    /// The version in use; `None` as long as there is none.
    pub fn version(&self) -> Option<Version> {
        self.version
    }

    /// What the guest can do; nothing as long as it has not told.
    pub fn capabilities(&self) -> Capabilities {
        match (self.guest, self.version) {
            (Some(guest), Some(version)) => guest.capabilities() & version.capabilities(),
            _ => Capabilities::empty(),
        }
    }

    /// The largest frame with its Ethernet header that goes to the guest, in bytes.
    pub fn frame_size(&self) -> u32 {
        let told = self.guest.map_or(1514, |guest| guest.frame_size.get());
        told.min(self.config.max_frame_size)
    }

    /// The version of NDIS that the guest follows, if it has told.
    pub fn ndis_version(&self) -> Option<NdisVersion> {
        self.ndis_version
    }

    /// The sections of the receive buffer; `None` as long as it is not mapped.
    pub fn receive_sections(&self) -> Option<Sections> {
        self.receive.sections()
    }

    /// The sections of the send buffer; `None` as long as it is not mapped.
    pub fn send_sections(&self) -> Option<Sections> {
        self.send.sections()
    }

    /// How many sub-channels the guest was granted.
    pub fn sub_channels(&self) -> u32 {
        self.sub_channels.unwrap_or(0)
    }

    /// Takes the payload of a packet of the guest: in-band, GPA-direct, or completion.
    ///
    /// # Errors
    /// [`ProviderError`], with nothing changed. If the packet asks for a completion, send one without a
    /// payload, or for [`ProviderError::Section`] one with a failure.
    pub fn on_message(&mut self, payload: &[u8]) -> Result<ProviderStep, ProviderError> {
        let message = GuestMessage::parse(payload, self.version).map_err(ProviderError::Message)?;
        match message {
            GuestMessage::Init(init) => Ok(self.init(init)),
            GuestMessage::NdisVersion(version) => {
                self.ndis_version = Some(version);
                Ok(ProviderStep::None)
            }
            GuestMessage::NdisConfig(config) => {
                if self.receive != Shared::Not {
                    return Err(ProviderError::OutOfOrder(MessageType::SEND_NDIS_CONFIG));
                }
                self.guest = Some(config);
                Ok(ProviderStep::Configured(config))
            }
            GuestMessage::SendReceiveBuffer(buffer) => {
                Self::check_buffer(buffer.id.get(), RECEIVE_BUFFER_ID)?;
                if self.receive != Shared::Not {
                    let failed = ReceiveBufferComplete::failed(Status::FAILURE);
                    return Ok(ProviderStep::Answer(NvspAnswer::full(failed)));
                }
                self.receive = Shared::Mapping;
                Ok(ProviderStep::MapReceiveBuffer(buffer.gpadl))
            }
            GuestMessage::SendSendBuffer(buffer) => {
                Self::check_buffer(buffer.id.get(), SEND_BUFFER_ID)?;
                if self.send != Shared::Not {
                    return Ok(ProviderStep::Answer(Self::send_answer(Status::FAILURE)));
                }
                self.send = Shared::Mapping;
                Ok(ProviderStep::MapSendBuffer(buffer.gpadl))
            }
            GuestMessage::RevokeReceiveBuffer(revoke) => {
                Self::check_buffer(revoke.id.get(), RECEIVE_BUFFER_ID)?;
                let out_of_order = ProviderError::OutOfOrder(MessageType::REVOKE_RECEIVE_BUFFER);
                self.receive.sections().ok_or(out_of_order)?;
                self.receive = Shared::Not;
                Ok(ProviderStep::UnmapReceiveBuffer)
            }
            GuestMessage::RevokeSendBuffer(revoke) => {
                Self::check_buffer(revoke.id.get(), SEND_BUFFER_ID)?;
                let out_of_order = ProviderError::OutOfOrder(MessageType::REVOKE_SEND_BUFFER);
                self.send.sections().ok_or(out_of_order)?;
                self.send = Shared::Not;
                Ok(ProviderStep::UnmapSendBuffer)
            }
            GuestMessage::RndisPacket(packet) => self.rndis(&packet).map(ProviderStep::Rndis),
            GuestMessage::PacketComplete(complete) => Ok(ProviderStep::Completed(complete.status)),
            GuestMessage::SwitchDataPath(switch) => Ok(ProviderStep::SwitchDataPath(
                switch.active,
                NvspAnswer::EMPTY,
            )),
            GuestMessage::SubChannel(request) => Ok(self.offer_sub_channels(&request)),
            GuestMessage::Other(other) => Err(ProviderError::Unknown(other)),
        }
    }

    /// The memory of the receive buffer is mapped, and has `len` bytes; `None` if that failed. Returns
    /// the answer to the guest.
    pub fn receive_buffer_mapped(&mut self, len: Option<u32>) -> NvspAnswer {
        let size = self
            .frame_size()
            .saturating_add(SECTION_OVERHEAD)
            .checked_next_multiple_of(SECTION_ALIGNMENT)
            .unwrap_or(u32::MAX)
            .max(MIN_RECEIVE_SECTION);
        let sections = len
            .filter(|_| self.receive == Shared::Mapping)
            .and_then(|len| Sections::fill(size, len).ok());
        self.receive = sections.map_or(Shared::Not, Shared::Mapped);
        NvspAnswer::full(match sections {
            Some(sections) => ReceiveBufferComplete::with_section(sections.to_receive_part()),
            None => ReceiveBufferComplete::failed(Status::FAILURE),
        })
    }

    /// The memory of the send buffer is mapped, and has `len` bytes; `None` if that failed. Returns the
    /// answer to the guest.
    pub fn send_buffer_mapped(&mut self, len: Option<u32>) -> NvspAnswer {
        let sections = len
            .filter(|_| self.send == Shared::Mapping)
            .and_then(|len| Sections::fill(SEND_SECTION_SIZE, len).ok());
        self.send = sections.map_or(Shared::Not, Shared::Mapped);
        Self::send_answer(match sections {
            Some(_) => Status::SUCCESS,
            None => Status::FAILURE,
        })
    }

    fn send_answer(status: Status) -> NvspAnswer {
        let section_size = match status {
            Status::SUCCESS => U32::new(SEND_SECTION_SIZE),
            _ => U32::ZERO,
        };
        NvspAnswer::full(
            SendBufferComplete {
                status,
                section_size,
            }
            .encode(),
        )
    }

    fn check_buffer(id: u16, expected: u16) -> Result<(), ProviderError> {
        if id == expected {
            Ok(())
        } else {
            Err(ProviderError::Buffer(id))
        }
    }

    /// The newest version of the guest's range, if none is agreed yet.
    fn init(&mut self, init: Init) -> ProviderStep {
        let (min, max) = (init.min.get(), init.max.get());
        let version = Version::NEWEST_FIRST
            .into_iter()
            .filter(|version| *version <= self.config.max_version)
            .find(|version| (min..=max).contains(&version.raw()))
            .filter(|_| self.version.is_none());
        let status = match version {
            Some(version) => {
                self.version = Some(version);
                Status::SUCCESS
            }
            None => Status::PROTOCOL_UNSUPPORTED,
        };
        let complete = InitComplete {
            negotiated_version: U32::new(InitComplete::NO_VERSION),
            max_mdl_chain_length: U32::new(34),
            status,
        };
        ProviderStep::Answer(NvspAnswer::full(complete.encode()))
    }

    fn rndis(&self, packet: &RndisPacket) -> Result<RndisPlace, ProviderError> {
        // Answers and frames go through the receive buffer, so without it there is nothing to say.
        let out_of_order = ProviderError::OutOfOrder(MessageType::SEND_RNDIS_PACKET);
        self.receive_sections().ok_or(out_of_order)?;
        let section = match packet.section() {
            None => None,
            Some((index, len)) => Some(
                self.send_sections()
                    .ok_or(out_of_order)?
                    .section(index, len)
                    .map_err(ProviderError::Section)?,
            ),
        };
        Ok(RndisPlace {
            channel_type: packet.channel_type,
            section,
        })
    }

    fn offer_sub_channels(&mut self, request: &SubChannelRequest) -> ProviderStep {
        let asked = request.count.get();
        let allowed = request.operation == SubChannelOperation::ALLOCATE
            && asked != 0
            && self.sub_channels.is_none()
            && self.receive_sections().is_some();
        let answer = |status, count: u32| {
            let count = count.into();
            NvspAnswer::full(SubChannelComplete { status, count }.encode())
        };
        if !allowed {
            return ProviderStep::Answer(answer(Status::FAILURE, 0));
        }
        let count = asked.min(self.config.max_sub_channels);
        self.sub_channels = Some(count);
        ProviderStep::OfferSubChannels(count, answer(Status::SUCCESS, count))
    }
}
