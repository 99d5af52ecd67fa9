// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The values of per-packet information. [`super::ppi`] has the items that they are in, and exports
//! these.
//!
//! Uses `zerocopy`. Source: `hyperv_net.h` of the kernel's network driver (`struct
//! ndis_tcp_ip_checksum_info` and those after it).

use zerocopy::little_endian::U16;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Checksums of a frame, as an item of 32 bits has them. What the bits mean depends on the direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checksum(pub u32);

impl Checksum {
    const IS_IPV4: u32 = 1 << 0;
    const IS_IPV6: u32 = 1 << 1;
    const SEND_TCP: u32 = 1 << 2;
    const SEND_UDP: u32 = 1 << 3;
    const SEND_IP_HEADER: u32 = 1 << 4;
    const TCP_FAILED: u32 = 1 << 0;
    const UDP_FAILED: u32 = 1 << 1;
    const IP_FAILED: u32 = 1 << 2;
    const TCP_SUCCEEDED: u32 = 1 << 3;
    const UDP_SUCCEEDED: u32 = 1 << 4;
    const IP_SUCCEEDED: u32 = 1 << 5;
    const LOOPBACK: u32 = 1 << 6;
    const TCP_VALUE_INVALID: u32 = 1 << 7;
    const IP_VALUE_INVALID: u32 = 1 << 8;

    const fn is(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
}

/// Which checksum a sender wants the host to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// That of TCP.
    Tcp,
    /// That of UDP.
    Udp,
}

/// What a guest asks for when it sends a frame with open checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendChecksum {
    /// Whether the frame is one of IPv6; else it is one of IPv4.
    pub ipv6: bool,
    /// The checksum behind the IP header, if it is open. It holds that of the pseudo header.
    pub transport: Option<Transport>,
    /// Whether the checksum of the IPv4 header is open.
    pub ip_header: bool,
    /// Where the header of TCP or UDP starts, in bytes from the start of the frame; less than 1024.
    pub transport_offset: u16,
}

impl SendChecksum {
    /// The item; `None` if the header is too far away.
    pub fn encode(self) -> Option<Checksum> {
        if self.transport_offset >= 1 << 10 {
            return None;
        }
        let mut bits = u32::from(self.transport_offset) << 16;
        bits |= if self.ipv6 {
            Checksum::IS_IPV6
        } else {
            Checksum::IS_IPV4
        };
        bits |= match self.transport {
            Some(Transport::Tcp) => Checksum::SEND_TCP,
            Some(Transport::Udp) => Checksum::SEND_UDP,
            None => 0,
        };
        if self.ip_header {
            bits |= Checksum::SEND_IP_HEADER;
        }
        Some(Checksum(bits))
    }

    /// What the item asks for; `None` if it contradicts itself, or asks for nothing.
    pub fn decode(item: Checksum) -> Option<Self> {
        let ipv6 = match (item.is(Checksum::IS_IPV4), item.is(Checksum::IS_IPV6)) {
            (true, false) => false,
            (false, true) => true,
            _ => return None,
        };
        let transport = match (item.is(Checksum::SEND_TCP), item.is(Checksum::SEND_UDP)) {
            (true, false) => Some(Transport::Tcp),
            (false, true) => Some(Transport::Udp),
            (false, false) => None,
            (true, true) => return None,
        };
        let ip_header = item.is(Checksum::SEND_IP_HEADER) && !ipv6;
        (transport.is_some() || ip_header).then_some(Self {
            ipv6,
            transport,
            ip_header,
            transport_offset: (item.0 >> 16 & 0x3ff) as u16,
        })
    }
}

/// What the host has found about the checksums of a received frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReceivedChecksum {
    /// Result for TCP: right, wrong, or not looked at.
    pub tcp: Option<bool>,
    /// Result for UDP.
    pub udp: Option<bool>,
    /// Result for the IPv4 header.
    pub ip_header: Option<bool>,
    /// The frame comes from this machine.
    pub loopback: bool,
    /// The frame was put together from several, and its TCP checksum was not computed again.
    pub tcp_value_invalid: bool,
    /// The same for the checksum of the IPv4 header.
    pub ip_value_invalid: bool,
}

impl ReceivedChecksum {
    /// The item.
    pub fn encode(self) -> Checksum {
        let result = |result: Option<bool>, succeeded: u32, failed: u32| match result {
            Some(true) => succeeded,
            Some(false) => failed,
            None => 0,
        };
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        Checksum(
            result(self.tcp, Checksum::TCP_SUCCEEDED, Checksum::TCP_FAILED)
                | result(self.udp, Checksum::UDP_SUCCEEDED, Checksum::UDP_FAILED)
                | result(self.ip_header, Checksum::IP_SUCCEEDED, Checksum::IP_FAILED)
                | flag(self.loopback, Checksum::LOOPBACK)
                | flag(self.tcp_value_invalid, Checksum::TCP_VALUE_INVALID)
                | flag(self.ip_value_invalid, Checksum::IP_VALUE_INVALID),
        )
    }

    /// What the item says. Who says that a checksum is right and wrong says that it is wrong.
    pub fn decode(item: Checksum) -> Self {
        let result = |succeeded: u32, failed: u32| match (item.is(succeeded), item.is(failed)) {
            (_, true) => Some(false),
            (true, false) => Some(true),
            (false, false) => None,
        };
        Self {
            tcp: result(Checksum::TCP_SUCCEEDED, Checksum::TCP_FAILED),
            udp: result(Checksum::UDP_SUCCEEDED, Checksum::UDP_FAILED),
            ip_header: result(Checksum::IP_SUCCEEDED, Checksum::IP_FAILED),
            loopback: item.is(Checksum::LOOPBACK),
            tcp_value_invalid: item.is(Checksum::TCP_VALUE_INVALID),
            ip_value_invalid: item.is(Checksum::IP_VALUE_INVALID),
        }
    }

    /// Whether the checksum behind the IP header is known to be right.
    pub fn transport_is_right(&self) -> bool {
        let results = [self.tcp, self.udp];
        results.contains(&Some(true)) && !results.contains(&Some(false))
    }
}

/// Large send, version 2: the frame is to be divided into TCP segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LargeSend {
    /// Whether the frame is one of IPv6; else it is one of IPv4.
    pub ipv6: bool,
    /// Most bytes of a segment's data; not 0, less than 2^20.
    pub mss: u32,
    /// Where the header of TCP starts, in bytes from the start of the frame; less than 1024.
    pub tcp_offset: u16,
}

impl LargeSend {
    const VERSION_2: u32 = 1 << 30;
    const IPV6: u32 = 1 << 31;

    /// The item; `None` if a number is too large, or the segments would be empty.
    pub fn encode(self) -> Option<u32> {
        if self.mss == 0 || self.mss >= 1 << 20 || self.tcp_offset >= 1 << 10 {
            return None;
        }
        let version = if self.ipv6 { Self::IPV6 } else { 0 };
        Some(self.mss | u32::from(self.tcp_offset) << 20 | Self::VERSION_2 | version)
    }

    /// What the item asks for; `None` if it is of version 1, or the segments would be empty.
    pub fn decode(item: u32) -> Option<Self> {
        let mss = item & 0xf_ffff;
        (item & Self::VERSION_2 != 0 && mss != 0).then_some(Self {
            ipv6: item & Self::IPV6 != 0,
            mss,
            tcp_offset: (item >> 20 & 0x3ff) as u16,
        })
    }
}

/// VLAN tag of a frame that does not contain it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vlan(u16);

impl Vlan {
    /// A tag with this id (12 bits), this priority (3 bits) and this drop bit.
    pub const fn new(id: u16, priority: u8, drop_eligible: bool) -> Self {
        let drop = if drop_eligible { 1 << 12 } else { 0 };
        Self((priority as u16 & 7) << 13 | drop | id & 0xfff)
    }

    /// From the tag control information of IEEE 802.1Q.
    pub const fn from_tci(tci: u16) -> Self {
        Self(tci)
    }

    /// As the tag control information of IEEE 802.1Q.
    pub const fn tci(self) -> u16 {
        self.0
    }

    /// Number of the VLAN.
    pub const fn id(self) -> u16 {
        self.0 & 0xfff
    }

    /// Priority: 0 to 7.
    pub const fn priority(self) -> u8 {
        (self.0 >> 13) as u8
    }

    /// The item.
    pub(super) const fn encode(self) -> u32 {
        let drop = self.0 as u32 >> 12 & 1;
        self.priority() as u32 | drop << 3 | (self.id() as u32) << 4
    }

    /// What the item says.
    pub(super) const fn decode(item: u32) -> Self {
        Self::new((item >> 4 & 0xfff) as u16, item as u8 & 7, item & 8 != 0)
    }
}

/// Says of a message which part of a frame it is, when the host has put the frame together from
/// several.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PacketId {
    /// 1.
    pub version: u8,
    /// See the methods.
    pub flags: u8,
    /// Number of the frame.
    pub packet_id: U16,
}

impl PacketId {
    const IS_PART: u8 = 1 << 0;
    const FIRST: u8 = 1 << 1;
    const LAST: u8 = 1 << 2;

    /// Part of frame `packet_id`.
    pub fn part(packet_id: u16, first: bool, last: bool) -> Self {
        let first = if first { Self::FIRST } else { 0 };
        let last = if last { Self::LAST } else { 0 };
        Self {
            version: 1,
            flags: Self::IS_PART | first | last,
            packet_id: packet_id.into(),
        }
    }

    /// Whether the message has a part of a frame, and not a whole one.
    pub fn is_part(&self) -> bool {
        self.flags & Self::IS_PART != 0
    }

    /// Whether it has the first part.
    pub fn is_first(&self) -> bool {
        self.flags & Self::FIRST != 0
    }

    /// Whether it has the last part.
    pub fn is_last(&self) -> bool {
        self.flags & Self::LAST != 0
    }
}
