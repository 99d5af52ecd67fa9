// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The host's side of RNDIS, but for frames: the adapter that a guest initializes, queries and sets.
//!
//! [`Adapter`] holds what the guest has set, writes the answers, and says what has changed
//! ([`Change`]). The provider asks it which frames the guest wants, and on which channel.
//!
//! A state machine only: it does not send, wait or allocate.
//!
//! Source: [MS-RNDIS] 3.2, and what the guest's driver asks for (`drivers/net/hyperv/rndis_filter.c` of
//! the kernel).

use super::features::Offloads;
use super::flow::flow_hash;
use super::offload;
use super::oid::{ConfigParameter, MediaState, Oid, PacketFilter};
use super::rndis::*;
use super::rss;
use super::{MacAddress, ETHERNET_HEADER_SIZE};
use core::fmt;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes as _, IntoBytes as _};

/// Most addresses of groups that a guest can set.
pub const MAX_MULTICAST: usize = 32;

/// Most bytes of an answer: header, body, and the longest value.
pub const MAX_ANSWER_SIZE: usize = 1024;

/// Most bytes of a name, in UTF-16.
pub const MAX_NAME_SIZE: usize = 512;

/// What the adapter says of who made it.
const VENDOR_DESCRIPTION: &[u8] = b"Viridian network adapter\0";

/// What an adapter is like.
#[derive(Clone, Copy, Debug)]
pub struct AdapterConfig<'a> {
    /// The address that it was made with.
    pub mac: MacAddress,
    /// The largest frame without its Ethernet header, in bytes.
    pub mtu: u32,
    /// Speed of the link, in bits in a second.
    pub link_speed: u64,
    /// Whether the link is up.
    pub link_up: bool,
    /// Name in UTF-16, at most [`MAX_NAME_SIZE`] bytes; may be empty.
    pub name: &'a [u8],
    /// Offloads that there are.
    pub offloads: Offloads,
    /// Channels that frames can come on.
    pub queue_count: u32,
    /// Entries of the table from hash to channel: at most [`rss::MAX_TABLE_SIZE`].
    pub table_size: u16,
    /// Most messages in a row.
    pub max_packets: u32,
    /// Alignment of messages in a row, as a power of two.
    pub alignment_factor: u32,
}

/// What a message of the guest has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Nothing.
    None,
    /// The adapter is initialized. Messages in a row to the guest have at most this many bytes.
    Initialized(u32),
    /// The guest wants other frames: [`Adapter::filter`].
    Filter,
    /// Other offloads are on: [`Adapter::offloads`].
    Offloads,
    /// Frames go over the channels in another way.
    Scaling,
    /// The adapter has another address: [`Adapter::mac`].
    Mac,
    /// The guest wants what is outstanding to be dropped.
    Reset,
    /// The guest has ended. No more frames go to it.
    Halted,
    /// The guest has answered whether it is there.
    Alive(u32),
}

/// What the host does after a message of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reaction {
    /// Bytes of the answer that was written; 0 if there is none.
    pub answer: usize,
    /// What has changed.
    pub change: Change,
}

/// Why a message of the guest has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterError {
    /// It is no message.
    Malformed(RndisError),
    /// It is a frame, which is not for the adapter.
    Frame,
    /// There is no such message.
    Unknown(MessageType),
    /// There is no room for the answer.
    NoRoom,
}

impl fmt::Display for AdapterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(error) => write!(f, "{error}"),
            Self::Frame => f.write_str("frame in a control message"),
            Self::Unknown(message_type) => write!(f, "unknown message {message_type:?}"),
            Self::NoRoom => f.write_str("no room for the answer"),
        }
    }
}

impl core::error::Error for AdapterError {}

/// Frames that went through an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Frames from the guest.
    pub sent: u64,
    /// Frames from the guest that could not be sent on.
    pub send_errors: u64,
    /// Frames to the guest.
    pub received: u64,
    /// Bad frames for the guest.
    pub receive_errors: u64,
    /// Frames for the guest for which there was no section.
    pub no_buffer: u64,
}

/// How frames go over the channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scaling {
    hash_info: rss::HashInfo,
    key: [u8; rss::KEY_SIZE],
    table: [u8; rss::MAX_TABLE_SIZE],
    table_len: usize,
}

/// The adapter of a guest. See the module.
#[derive(Clone, Debug)]
pub struct Adapter<'a> {
    config: AdapterConfig<'a>,
    initialized: bool,
    mac: MacAddress,
    filter: PacketFilter,
    multicast: [MacAddress; MAX_MULTICAST],
    multicast_len: usize,
    offloads: Offloads,
    scaling: Option<Scaling>,
    key: [u8; rss::KEY_SIZE],
}

/// The value of an object, or why there is none.
type Query = Result<usize, Status>;

impl<'a> Adapter<'a> {
    /// An adapter whose channel was just opened.
    pub fn new(config: AdapterConfig<'a>) -> Self {
        Self {
            config,
            initialized: false,
            mac: config.mac,
            filter: PacketFilter::empty(),
            multicast: [MacAddress::default(); MAX_MULTICAST],
            multicast_len: 0,
            offloads: Offloads::default(),
            scaling: None,
            key: rss::DEFAULT_KEY,
        }
    }

    /// Whether the guest has initialized it.
    pub fn is_initialized(&self) -> bool {
        self.initialized
    }

    /// The address that it has now.
    pub fn mac(&self) -> MacAddress {
        self.mac
    }

    /// Which frames the guest wants; none at first.
    pub fn filter(&self) -> PacketFilter {
        self.filter
    }

    /// The offloads that the guest has turned on.
    pub fn offloads(&self) -> &Offloads {
        &self.offloads
    }

    /// Whether the guest wants a frame to this address.
    pub fn accepts(&self, destination: MacAddress) -> bool {
        self.initialized
            && self.filter.accepts(destination, self.mac, |group| {
                let members = self.multicast.get(..self.multicast_len);
                members.unwrap_or_default().contains(&group)
            })
    }

    /// Index of the channel that a frame comes on, and its hash if it has one. The index is less than
    /// `channels`.
    pub fn channel(&self, frame: &[u8], channels: u32) -> (u32, Option<u32>) {
        let Some(scaling) = &self.scaling else {
            return (0, None);
        };
        let Some(hash) = flow_hash(frame, &scaling.key, scaling.hash_info) else {
            return (0, None);
        };
        let channel = (hash as usize)
            .checked_rem(scaling.table_len)
            .and_then(|index| scaling.table.get(index))
            .map_or(0, |&channel| u32::from(channel));
        (if channel < channels { channel } else { 0 }, Some(hash))
    }

    /// The link goes up or down. Writes what the guest is told to the start of `out`; returns its
    /// length, 0 if the guest need not know.
    pub fn set_link(&mut self, up: bool, out: &mut [u8]) -> usize {
        let status = if up {
            Status::MEDIA_CONNECT
        } else {
            Status::MEDIA_DISCONNECT
        };
        if core::mem::replace(&mut self.config.link_up, up) == up {
            return 0;
        }
        self.indicate(status, &[], out)
    }

    /// The link has another speed, in bits in a second. As [`Adapter::set_link`].
    pub fn set_link_speed(&mut self, speed: u64, out: &mut [u8]) -> usize {
        self.config.link_speed = speed;
        let raw = self.raw_link_speed().to_le_bytes();
        self.indicate(Status::LINK_SPEED_CHANGE, &raw, out)
    }

    /// Writes an indication to the start of `out`; returns its length, 0 if the guest has not
    /// initialized the adapter, or there is no room.
    pub fn indicate(&self, status: Status, buffer: &[u8], out: &mut [u8]) -> usize {
        let Some(buffer_length) = u32::try_from(buffer.len())
            .ok()
            .filter(|_| self.initialized)
        else {
            return 0;
        };
        let offset = if buffer.is_empty() {
            0
        } else {
            size_of::<IndicateStatus>() as u32
        };
        let body = IndicateStatus {
            status,
            buffer_length: buffer_length.into(),
            buffer_offset: offset.into(),
        };
        encode(out, MessageType::INDICATE_STATUS, &body, buffer).unwrap_or(0)
    }

    /// Takes a private copy of a control message of the guest, and writes the answer to the start of
    /// `out`, which has room for [`MAX_ANSWER_SIZE`] bytes.
    ///
    /// # Errors
    /// [`AdapterError`], with nothing changed: there is no answer.
    pub fn on_message(
        &mut self,
        message: &[u8],
        statistics: &Statistics,
        out: &mut [u8],
    ) -> Result<Reaction, AdapterError> {
        if out.len() < MAX_ANSWER_SIZE {
            return Err(AdapterError::NoRoom);
        }
        let (answer, change) =
            match GuestMessage::parse(message).map_err(AdapterError::Malformed)? {
                GuestMessage::Initialize(request) => {
                    let (complete, change) = self.initialize(&request);
                    let answer = encode(out, MessageType::INITIALIZE_COMPLETE, &complete, &[]);
                    (answer, change)
                }
                GuestMessage::Halt(_) => {
                    let config = self.config;
                    *self = Self::new(config);
                    (Some(0), Change::Halted)
                }
                GuestMessage::Query(request, value) => {
                    let mut buffer = [0; MAX_NAME_SIZE];
                    let result = self.query(request.oid, value, statistics, &mut buffer);
                    let (status, len) = match result {
                        Ok(len) => (Status::SUCCESS, len),
                        Err(status) => (status, 0),
                    };
                    let value = buffer.get(..len).unwrap_or_default();
                    let complete = QueryComplete::new(request.request_id.get(), status, value)
                        .ok_or(AdapterError::NoRoom)?;
                    let answer = encode(out, MessageType::QUERY_COMPLETE, &complete, value);
                    (answer, Change::None)
                }
                GuestMessage::Set(request, value) => {
                    let (status, change) = match self.set(request.oid, value) {
                        Ok(change) => (Status::SUCCESS, change),
                        Err(status) => (status, Change::None),
                    };
                    let complete = SetComplete {
                        request_id: request.request_id,
                        status,
                    };
                    let answer = encode(out, MessageType::SET_COMPLETE, &complete, &[]);
                    (answer, change)
                }
                GuestMessage::Reset(_) => {
                    let complete = ResetComplete {
                        status: Status::SUCCESS,
                        addressing_reset: U32::ZERO,
                    };
                    let answer = encode(out, MessageType::RESET_COMPLETE, &complete, &[]);
                    (answer, Change::Reset)
                }
                GuestMessage::Keepalive(request) => {
                    let complete = KeepaliveComplete {
                        request_id: request.request_id,
                        status: Status::SUCCESS,
                    };
                    let answer = encode(out, MessageType::KEEPALIVE_COMPLETE, &complete, &[]);
                    (answer, Change::None)
                }
                GuestMessage::KeepaliveComplete(complete) => {
                    (Some(0), Change::Alive(complete.request_id.get()))
                }
                GuestMessage::Packet => return Err(AdapterError::Frame),
                GuestMessage::Other(other) => return Err(AdapterError::Unknown(other)),
            };
        // The answers above are shorter than the room that was asked for.
        let answer = answer.ok_or(AdapterError::NoRoom)?;
        Ok(Reaction { answer, change })
    }

    fn initialize(&mut self, request: &Initialize) -> (InitializeComplete, Change) {
        let status = if request.major_version.get() == MAJOR_VERSION {
            Status::SUCCESS
        } else {
            Status::BAD_VERSION
        };
        let change = if status == Status::SUCCESS {
            self.initialized = true;
            Change::Initialized(request.max_transfer_size.get())
        } else {
            Change::None
        };
        let complete = InitializeComplete {
            request_id: request.request_id,
            status,
            major_version: U32::new(MAJOR_VERSION),
            minor_version: U32::new(MINOR_VERSION),
            device_flags: U32::new(1),
            medium: Medium::ETHERNET,
            max_packets_per_message: self.config.max_packets.into(),
            max_transfer_size: U32::new(0xefff_ffff),
            packet_alignment_factor: self.config.alignment_factor.into(),
            address_family_offset: U32::ZERO,
            address_family_size: U32::ZERO,
        };
        (complete, change)
    }

    fn raw_link_speed(&self) -> u32 {
        u32::try_from(self.config.link_speed / 100).unwrap_or(u32::MAX)
    }

    /// Writes the value of an object to the start of `out`.
    fn query(
        &self,
        oid: Oid,
        asked: &[u8],
        statistics: &Statistics,
        out: &mut [u8; MAX_NAME_SIZE],
    ) -> Query {
        if !self.initialized {
            return Err(Status::ADAPTER_NOT_READY);
        }
        let mut put = |value: &[u8]| -> Query {
            let place = out.get_mut(..value.len()).ok_or(Status::BUFFER_OVERFLOW)?;
            place.copy_from_slice(value);
            Ok(value.len())
        };
        let count = |count: u64| (count as u32).to_le_bytes();
        let config = &self.config;
        let frame_size = config.mtu.saturating_add(ETHERNET_HEADER_SIZE);
        match oid {
            Oid::GEN_SUPPORTED_LIST => put(SUPPORTED.as_bytes()),
            Oid::GEN_HARDWARE_STATUS | Oid::GEN_MEDIA_SUPPORTED | Oid::GEN_MEDIA_IN_USE => {
                put(&[0; 4])
            }
            Oid::GEN_MAXIMUM_FRAME_SIZE => put(&config.mtu.to_le_bytes()),
            Oid::GEN_MAXIMUM_TOTAL_SIZE | Oid::GEN_CURRENT_LOOKAHEAD => {
                put(&frame_size.to_le_bytes())
            }
            Oid::GEN_LINK_SPEED => put(&self.raw_link_speed().to_le_bytes()),
            Oid::GEN_MEDIA_CONNECT_STATUS => put(if config.link_up {
                MediaState::CONNECTED.as_bytes()
            } else {
                MediaState::DISCONNECTED.as_bytes()
            }),
            Oid::GEN_CURRENT_PACKET_FILTER => put(&self.filter.bits().to_le_bytes()),
            Oid::GEN_VENDOR_ID => put(&[0xff, 0xff, 0xff, 0]),
            Oid::GEN_VENDOR_DESCRIPTION => put(VENDOR_DESCRIPTION),
            Oid::GEN_FRIENDLY_NAME => put(config.name),
            Oid::GEN_MAXIMUM_SEND_PACKETS => put(&config.max_packets.to_le_bytes()),
            Oid::GEN_XMIT_OK => put(&count(statistics.sent)),
            Oid::GEN_RCV_OK => put(&count(statistics.received)),
            Oid::GEN_XMIT_ERROR => put(&count(statistics.send_errors)),
            Oid::GEN_RCV_ERROR => put(&count(statistics.receive_errors)),
            Oid::GEN_RCV_NO_BUFFER => put(&count(statistics.no_buffer)),
            Oid::ETHERNET_PERMANENT_ADDRESS => put(&config.mac.0),
            Oid::ETHERNET_CURRENT_ADDRESS => put(&self.mac.0),
            Oid::ETHERNET_MULTICAST_LIST => put(self
                .multicast
                .get(..self.multicast_len)
                .unwrap_or_default()
                .as_bytes()),
            Oid::ETHERNET_MAXIMUM_LIST_SIZE => put(&(MAX_MULTICAST as u32).to_le_bytes()),
            Oid::GEN_RECEIVE_SCALE_CAPABILITIES if config.queue_count > 1 => {
                let table_size = config.table_size;
                put(rss::Capabilities::new(config.queue_count, table_size).as_bytes())
            }
            Oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES => {
                let asked = value::<offload::ObjectHeader>(asked);
                put(config.offloads.to_capabilities(asked).as_value())
            }
            Oid::TCP_OFFLOAD_CURRENT_CONFIG => {
                let asked = value::<offload::ObjectHeader>(asked);
                put(self.offloads.to_capabilities(asked).as_value())
            }
            _ => Err(Status::NOT_SUPPORTED),
        }
    }

    /// Changes the value of an object.
    fn set(&mut self, oid: Oid, info: &[u8]) -> Result<Change, Status> {
        if !self.initialized {
            return Err(Status::ADAPTER_NOT_READY);
        }
        match oid {
            Oid::GEN_CURRENT_PACKET_FILTER => {
                let filter = value::<U32>(info).ok_or(Status::INVALID_LENGTH)?;
                self.filter = PacketFilter::from_bits_retain(filter.get());
                Ok(Change::Filter)
            }
            Oid::GEN_CURRENT_LOOKAHEAD => {
                value::<U32>(info).ok_or(Status::INVALID_LENGTH)?;
                Ok(Change::None)
            }
            Oid::ETHERNET_MULTICAST_LIST => self.set_multicast(info),
            Oid::GEN_RNDIS_CONFIG_PARAMETER => {
                let parameter = ConfigParameter::parse(info).ok_or(Status::INVALID_DATA)?;
                let mac = parameter.network_address().ok_or(Status::NOT_SUPPORTED)?;
                if !mac.is_unicast() {
                    return Err(Status::INVALID_DATA);
                }
                self.mac = mac;
                Ok(Change::Mac)
            }
            Oid::TCP_OFFLOAD_PARAMETERS => {
                let parameters =
                    offload::Parameters::parse(info).map_err(|_| Status::INVALID_DATA)?;
                self.offloads = self
                    .offloads
                    .apply(&parameters, &self.config.offloads)
                    .ok_or(Status::NOT_SUPPORTED)?;
                Ok(Change::Offloads)
            }
            Oid::GEN_RECEIVE_SCALE_PARAMETERS if self.config.queue_count > 1 => {
                self.set_scaling(info)
            }
            _ => Err(Status::NOT_SUPPORTED),
        }
    }

    fn set_multicast(&mut self, info: &[u8]) -> Result<Change, Status> {
        let list = <[MacAddress]>::ref_from_bytes(info).map_err(|_| Status::INVALID_LENGTH)?;
        let place = self
            .multicast
            .get_mut(..list.len())
            .ok_or(Status::INVALID_LENGTH)?;
        place.copy_from_slice(list);
        self.multicast_len = list.len();
        Ok(Change::Filter)
    }

    fn set_scaling(&mut self, info: &[u8]) -> Result<Change, Status> {
        let parameters = rss::Parameters::parse(info).map_err(|_| Status::INVALID_DATA)?;
        if parameters.flags.contains(rss::ParameterFlags::DISABLE) {
            self.scaling = None;
            return Ok(Change::Scaling);
        }
        let mut scaling = self.scaling.unwrap_or(Scaling {
            hash_info: rss::HashInfo::GUEST,
            key: self.key,
            table: [0; rss::MAX_TABLE_SIZE],
            table_len: 1,
        });
        if !parameters
            .flags
            .contains(rss::ParameterFlags::HASH_INFO_UNCHANGED)
        {
            if !parameters.hash_info.contains(rss::HashInfo::TOEPLITZ) {
                return Err(Status::INVALID_DATA);
            }
            scaling.hash_info = parameters.hash_info;
        }
        if !parameters.table.is_empty() {
            for (to, channel) in scaling.table.iter_mut().zip(parameters.table) {
                *to = u8::try_from(channel.get())
                    .ok()
                    .filter(|&channel| u32::from(channel) < self.config.queue_count)
                    .ok_or(Status::INVALID_DATA)?;
            }
            scaling.table_len = parameters.table.len();
        }
        for (to, from) in scaling.key.iter_mut().zip(parameters.key) {
            *to = *from;
        }
        self.key = scaling.key;
        self.scaling = Some(scaling);
        Ok(Change::Scaling)
    }
}

/// The objects that an adapter has.
const SUPPORTED: [Oid; 27] = [
    Oid::GEN_SUPPORTED_LIST,
    Oid::GEN_HARDWARE_STATUS,
    Oid::GEN_MEDIA_SUPPORTED,
    Oid::GEN_MEDIA_IN_USE,
    Oid::GEN_MAXIMUM_FRAME_SIZE,
    Oid::GEN_LINK_SPEED,
    Oid::GEN_VENDOR_ID,
    Oid::GEN_VENDOR_DESCRIPTION,
    Oid::GEN_CURRENT_PACKET_FILTER,
    Oid::GEN_CURRENT_LOOKAHEAD,
    Oid::GEN_MAXIMUM_TOTAL_SIZE,
    Oid::GEN_MEDIA_CONNECT_STATUS,
    Oid::GEN_MAXIMUM_SEND_PACKETS,
    Oid::GEN_RNDIS_CONFIG_PARAMETER,
    Oid::GEN_XMIT_OK,
    Oid::GEN_RCV_OK,
    Oid::GEN_XMIT_ERROR,
    Oid::GEN_RCV_ERROR,
    Oid::GEN_RCV_NO_BUFFER,
    Oid::GEN_FRIENDLY_NAME,
    Oid::ETHERNET_PERMANENT_ADDRESS,
    Oid::ETHERNET_CURRENT_ADDRESS,
    Oid::ETHERNET_MULTICAST_LIST,
    Oid::ETHERNET_MAXIMUM_LIST_SIZE,
    Oid::TCP_OFFLOAD_CURRENT_CONFIG,
    Oid::TCP_OFFLOAD_PARAMETERS,
    Oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES,
];
