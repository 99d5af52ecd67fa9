// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a frame was that the host has put together (RSC): so many TCP segments of such a size.
//!
//! The host does not say where one segment ended and the next began. [`Segments::of`] takes them to be as long as
//! the MTU admits, which is what senders of bulk data do.
//!
//! Uses `core` and modules of this crate.
//!
//! Source: RFC 9293 (TCP), RFC 791 and RFC 8200 (IP); what the receiver's TCP wants to know,
//! `tcp_measure_rcv_mss` in `net/ipv4/tcp_input.c` of the kernel.

use super::flow::{split_ethernet, ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTOCOL_TCP};

const IPV6_HEADER_SIZE: usize = 40;
/// The shortest header of IPv4 or of TCP.
const MIN_HEADER_SIZE: usize = 20;

/// Most bytes of a frame's headers: Ethernet with a VLAN tag, IP with options, TCP with options.
pub const MAX_HEADERS_SIZE: usize = 18 + 60 + 60;

/// The TCP segments that a frame was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Over IPv6, not IPv4.
    pub ipv6: bool,
    /// Bytes of payload of each; the last may have fewer.
    pub size: u16,
    /// How many: at least two.
    pub count: u16,
}

impl Segments {
    /// The segments of a frame of `len` bytes on a link with this MTU. `head` is its start: at least its
    /// headers, or at most [`MAX_HEADERS_SIZE`] bytes.
    ///
    /// `None` if it is not TCP, or fits into one segment.
    pub fn of(head: &[u8], len: u32, mtu: u32) -> Option<Self> {
        let (ethertype, packet) = split_ethernet(head)?;
        let (ipv6, ip_size) = match ethertype {
            ETHERTYPE_IPV4 => (false, ipv4_header_size(packet)?),
            ETHERTYPE_IPV6 => {
                (*packet.get(6)? == PROTOCOL_TCP).then_some((true, IPV6_HEADER_SIZE))?
            }
            _ => return None,
        };
        let tcp = packet.get(ip_size..)?;
        let tcp_size = usize::from(*tcp.get(12)? >> 4).checked_mul(4)?;
        if tcp_size < MIN_HEADER_SIZE {
            return None;
        }
        let link_size = head.len().checked_sub(packet.len())?;
        let headers = u32::try_from(ip_size.checked_add(tcp_size)?).ok()?;
        let payload = len
            .checked_sub(u32::try_from(link_size).ok()?)?
            .checked_sub(headers)?;
        let size = mtu.checked_sub(headers)?;
        if payload <= size {
            return None;
        }
        let rounded = payload.checked_add(size.checked_sub(1)?)?;
        Some(Self {
            ipv6,
            size: u16::try_from(size).ok()?,
            count: u16::try_from(rounded.checked_div(size)?).ok()?,
        })
    }
}

/// Size of the header of a packet of TCP over IPv4 that is no fragment.
fn ipv4_header_size(packet: &[u8]) -> Option<usize> {
    let size = usize::from(packet.first()? & 0xf).checked_mul(4)?;
    let fragment = u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?);
    // All but the bit "do not fragment".
    let is_whole = fragment & 0xbfff == 0;
    (size >= MIN_HEADER_SIZE && is_whole && *packet.get(9)? == PROTOCOL_TCP).then_some(size)
}
