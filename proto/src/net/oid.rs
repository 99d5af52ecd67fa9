// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The objects of a network adapter that a guest queries and sets, and the simple ones of their
//! values. [`super::offload`] and [`super::rss`] have the others.
//!
//! Uses `zerocopy` and `bitflags`.
//!
//! Source: `include/linux/rndis.h` and `hyperv_net.h` of the kernel, [MS-RNDIS] 2.2, and the NDIS
//! documentation of the objects.

use super::{MacAddress, Span};
use crate::message::read_prefix;
use bitflags::bitflags;
use zerocopy::little_endian::U32;
use zerocopy::IntoBytes as _;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

open_enum! {
    /// Number of an object.
    pub struct Oid: u32 {
        /// The objects that the adapter has.
        GEN_SUPPORTED_LIST = 0x0001_0101,
        /// Whether the hardware works.
        GEN_HARDWARE_STATUS = 0x0001_0102,
        /// Kinds of network that the adapter could have.
        GEN_MEDIA_SUPPORTED = 0x0001_0103,
        /// Kind of network that it has.
        GEN_MEDIA_IN_USE = 0x0001_0104,
        /// Largest frame without its Ethernet header, in bytes.
        GEN_MAXIMUM_FRAME_SIZE = 0x0001_0106,
        /// Speed of the link, in units of 100 bit/s.
        GEN_LINK_SPEED = 0x0001_0107,
        /// Memory for frames to send, in bytes.
        GEN_TRANSMIT_BUFFER_SPACE = 0x0001_0108,
        /// Memory for received frames, in bytes.
        GEN_RECEIVE_BUFFER_SPACE = 0x0001_0109,
        /// Smallest unit of that memory, in bytes.
        GEN_TRANSMIT_BLOCK_SIZE = 0x0001_010a,
        /// Smallest unit of that memory, in bytes.
        GEN_RECEIVE_BLOCK_SIZE = 0x0001_010b,
        /// Who made the adapter.
        GEN_VENDOR_ID = 0x0001_010c,
        /// The same in words.
        GEN_VENDOR_DESCRIPTION = 0x0001_010d,
        /// Which frames are received: [`PacketFilter`].
        GEN_CURRENT_PACKET_FILTER = 0x0001_010e,
        /// Bytes of a frame that are looked at early.
        GEN_CURRENT_LOOKAHEAD = 0x0001_010f,
        /// Version of the driver.
        GEN_DRIVER_VERSION = 0x0001_0110,
        /// Largest frame with its Ethernet header, in bytes.
        GEN_MAXIMUM_TOTAL_SIZE = 0x0001_0111,
        /// Flags.
        GEN_MAC_OPTIONS = 0x0001_0113,
        /// [`MediaState`].
        GEN_MEDIA_CONNECT_STATUS = 0x0001_0114,
        /// Frames in a row that the adapter takes.
        GEN_MAXIMUM_SEND_PACKETS = 0x0001_0115,
        /// Version of the adapter.
        GEN_VENDOR_DRIVER_VERSION = 0x0001_0116,
        /// [`super::rss::Capabilities`].
        GEN_RECEIVE_SCALE_CAPABILITIES = 0x0001_0203,
        /// [`super::rss::Parameters`].
        GEN_RECEIVE_SCALE_PARAMETERS = 0x0001_0204,
        /// Set: a [`ConfigParameter`].
        GEN_RNDIS_CONFIG_PARAMETER = 0x0001_021b,
        /// Frames that were sent.
        GEN_XMIT_OK = 0x0002_0101,
        /// Frames that were received.
        GEN_RCV_OK = 0x0002_0102,
        /// Frames that could not be sent.
        GEN_XMIT_ERROR = 0x0002_0103,
        /// Frames that were received with errors.
        GEN_RCV_ERROR = 0x0002_0104,
        /// Frames for which there was no buffer.
        GEN_RCV_NO_BUFFER = 0x0002_0105,
        /// Name of the adapter, in UTF-16.
        GEN_FRIENDLY_NAME = 0x0002_0216,
        /// The address that the adapter was made with.
        ETHERNET_PERMANENT_ADDRESS = 0x0101_0101,
        /// The address that it has now.
        ETHERNET_CURRENT_ADDRESS = 0x0101_0102,
        /// Addresses of groups.
        ETHERNET_MULTICAST_LIST = 0x0101_0103,
        /// How many addresses of groups there may be.
        ETHERNET_MAXIMUM_LIST_SIZE = 0x0101_0104,
        /// How frames are wrapped when offloads work on them.
        OFFLOAD_ENCAPSULATION = 0x0101_010a,
        /// [`super::offload::Capabilities`] in effect.
        TCP_OFFLOAD_CURRENT_CONFIG = 0xfc01_020b,
        /// Set: [`super::offload::Parameters`].
        TCP_OFFLOAD_PARAMETERS = 0xfc01_020c,
        /// [`super::offload::Capabilities`] that there are.
        TCP_OFFLOAD_HARDWARE_CAPABILITIES = 0xfc01_020d,
    }
}

open_enum! {
    /// State of the link.
    pub struct MediaState: u32 {
        /// Up.
        CONNECTED = 0,
        /// Down.
        DISCONNECTED = 1,
    }
}

/// Which frames an adapter receives. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct PacketFilter(u32);

bitflags! {
    impl PacketFilter: u32 {
        /// To its own address.
        const DIRECTED = 0x01;
        /// To the groups that are set.
        const MULTICAST = 0x02;
        /// To any group.
        const ALL_MULTICAST = 0x04;
        /// To all.
        const BROADCAST = 0x08;
        /// To anybody.
        const PROMISCUOUS = 0x20;
        const _ = !0;
    }
}

impl PacketFilter {
    /// Whether an adapter with address `own` receives a frame to `destination`. `is_member` says
    /// whether an address is one of the groups that are set.
    pub fn accepts(
        self,
        destination: MacAddress,
        own: MacAddress,
        is_member: impl FnOnce(MacAddress) -> bool,
    ) -> bool {
        if self.contains(Self::PROMISCUOUS) {
            return true;
        }
        if destination == MacAddress::BROADCAST {
            return self.contains(Self::BROADCAST);
        }
        if destination.is_group() {
            return self.contains(Self::ALL_MULTICAST)
                || (self.contains(Self::MULTICAST) && is_member(destination));
        }
        self.contains(Self::DIRECTED) && destination == own
    }
}

/// Start of the value of [`Oid::GEN_RNDIS_CONFIG_PARAMETER`]; name and value of the parameter follow.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ConfigParameterHeader {
    /// Where the name starts, in bytes from the start of this structure.
    pub name_offset: U32,
    /// Bytes of the name.
    pub name_length: U32,
    /// Shape of the value.
    pub parameter_type: ConfigType,
    /// Where the value starts, in bytes from the start of this structure.
    pub value_offset: U32,
    /// Bytes of the value.
    pub value_length: U32,
}

open_enum! {
    /// Shape of a configuration parameter.
    pub struct ConfigType: u32 {
        /// A number.
        INTEGER = 0,
        /// UTF-16.
        STRING = 2,
    }
}

/// A configuration parameter of an adapter. Name and value are views of the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigParameter<'a> {
    /// Name, in UTF-16.
    pub name: &'a [u8],
    /// Shape of the value.
    pub parameter_type: ConfigType,
    /// Value.
    pub value: &'a [u8],
}

/// Name of the parameter that is the address of the adapter.
const NETWORK_ADDRESS: &[u8; 14] = b"NetworkAddress";

/// Bytes of the name in UTF-16.
const NAME_SIZE: usize = 2 * NETWORK_ADDRESS.len();

/// Bytes of an address in hexadecimal digits in UTF-16.
const MAC_SIZE: usize = 4 * 6;

/// Bytes of the value of [`Oid::GEN_RNDIS_CONFIG_PARAMETER`] that sets the address.
pub const SET_MAC_SIZE: usize = size_of::<ConfigParameterHeader>() + NAME_SIZE + MAC_SIZE;

/// The value of [`Oid::GEN_RNDIS_CONFIG_PARAMETER`] that sets the address of the adapter.
pub fn set_mac(mac: MacAddress) -> [u8; SET_MAC_SIZE] {
    let start = size_of::<ConfigParameterHeader>();
    let header = ConfigParameterHeader {
        name_offset: U32::new(start as u32),
        name_length: U32::new(NAME_SIZE as u32),
        parameter_type: ConfigType::STRING,
        value_offset: U32::new((start + NAME_SIZE) as u32),
        value_length: U32::new(MAC_SIZE as u32),
    };
    let digit = |nibble: u8| match nibble {
        0..=9 => nibble.wrapping_add(b'0'),
        _ => nibble.wrapping_sub(10).wrapping_add(b'a'),
    };
    let digits = mac.0.into_iter().flat_map(|byte| [byte >> 4, byte & 0xf]);
    let text = NETWORK_ADDRESS.iter().copied().chain(digits.map(digit));
    let bytes = header.as_bytes().iter().copied();
    let mut value = [0; SET_MAC_SIZE];
    let all = bytes.chain(text.flat_map(|character| [character, 0]));
    for (to, from) in value.iter_mut().zip(all) {
        *to = from;
    }
    value
}

impl<'a> ConfigParameter<'a> {
    /// Parses the value of [`Oid::GEN_RNDIS_CONFIG_PARAMETER`]; `None` if name or value are outside
    /// of it.
    pub fn parse(info: &'a [u8]) -> Option<Self> {
        let header: ConfigParameterHeader = read_prefix(info)?;
        let part = |offset: U32, len: U32| {
            Span {
                offset: offset.get(),
                len: len.get(),
            }
            .of(info)
        };
        Some(Self {
            name: part(header.name_offset, header.name_length)?,
            parameter_type: header.parameter_type,
            value: part(header.value_offset, header.value_length)?,
        })
    }

    /// The address, if this parameter sets it and is well-formed.
    pub fn network_address(&self) -> Option<MacAddress> {
        let characters = |bytes: &'a [u8]| {
            bytes
                .chunks_exact(2)
                .map(|unit| <[u8; 2]>::try_from(unit).map_or(0, u16::from_le_bytes))
        };
        let is_name = self.name.len() == NAME_SIZE
            && characters(self.name).eq(NETWORK_ADDRESS.iter().copied().map(u16::from));
        if !is_name || self.parameter_type != ConfigType::STRING || self.value.len() != MAC_SIZE {
            return None;
        }
        let mut mac = [0u8; 6];
        let mut digits =
            characters(self.value).map(|unit| char::from_u32(unit.into())?.to_digit(16));
        for byte in &mut mac {
            let (high, low) = (digits.next()??, digits.next()??);
            *byte = u8::try_from(high << 4 | low).ok()?;
        }
        Some(MacAddress(mac))
    }
}
