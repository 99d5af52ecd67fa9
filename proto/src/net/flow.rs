// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The flow that a frame belongs to: what of its addresses and ports goes into the hash of
//! [`super::rss`].
//!
//! Uses `core`.
//!
//! Source: the NDIS documentation of receive side scaling, "RSS hashing types".

use super::rss::{toeplitz, HashInfo, KEY_SIZE};

const ETHERTYPE_VLAN: [u8; 2] = [0x81, 0x00];
pub(super) const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
pub(super) const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
pub(super) const PROTOCOL_TCP: u8 = 6;

/// Bytes of the longest input of the hash: two addresses of IPv6, two ports.
const MAX_INPUT: usize = 36;

/// The hash of an Ethernet frame, if it is one of IP and `hash_info` names something of it. A frame of
/// which only the start is there may count as one without ports.
pub(super) fn flow_hash(frame: &[u8], key: &[u8; KEY_SIZE], hash_info: HashInfo) -> Option<u32> {
    let (ethertype, packet) = split_ethernet(frame)?;
    let (addresses, ports) = match ethertype {
        ETHERTYPE_IPV4 => {
            let addresses = packet.get(12..20)?;
            let ports = hash_info
                .contains(HashInfo::TCP_IPV4)
                .then(|| ipv4_ports(packet))
                .flatten();
            if ports.is_none() && !hash_info.contains(HashInfo::IPV4) {
                return None;
            }
            (addresses, ports)
        }
        ETHERTYPE_IPV6 => {
            let addresses = packet.get(8..40)?;
            let ports = hash_info
                .contains(HashInfo::TCP_IPV6)
                .then(|| packet.get(40..44))
                .flatten()
                .filter(|_| packet.get(6) == Some(&PROTOCOL_TCP));
            if ports.is_none() && !hash_info.contains(HashInfo::IPV6) {
                return None;
            }
            (addresses, ports)
        }
        _ => return None,
    };
    let mut input = [0; MAX_INPUT];
    let mut len = 0usize;
    let parts = addresses.iter().chain(ports.unwrap_or_default());
    for (to, from) in input.iter_mut().zip(parts) {
        *to = *from;
        len = len.saturating_add(1);
    }
    Some(toeplitz(key, input.get(..len)?))
}

/// The type of what is in the frame, behind a VLAN tag if there is one, and the rest.
pub(super) fn split_ethernet(frame: &[u8]) -> Option<([u8; 2], &[u8])> {
    let (ethertype, rest) = frame.get(12..)?.split_first_chunk::<2>()?;
    if *ethertype != ETHERTYPE_VLAN {
        return Some((*ethertype, rest));
    }
    let (ethertype, rest) = rest.get(2..)?.split_first_chunk::<2>()?;
    Some((*ethertype, rest))
}

/// The ports of a packet of TCP over IPv4 that is no fragment.
fn ipv4_ports(packet: &[u8]) -> Option<&[u8]> {
    let header_size = usize::from(packet.first()? & 0xf).checked_mul(4)?;
    let fragment = u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?);
    // All but the bit "do not fragment".
    if *packet.get(9)? != PROTOCOL_TCP || fragment & 0xbfff != 0 || header_size < 20 {
        return None;
    }
    packet.get(header_size..header_size.checked_add(4)?)
}
