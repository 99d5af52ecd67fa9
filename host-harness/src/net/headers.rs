// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where the headers of a frame are, and the work on them that segmentation and checksums need.

use etherparse::checksum::Sum16BitWords;
use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};

use super::frame::{Checksum, Frame, Gso};

/// The protocol over IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// Place of the checksum in the header.
    pub fn checksum_offset(self) -> u16 {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

/// The headers of an IP packet in a frame. All places are inside the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Headers {
    /// Where the IP header starts.
    pub network: usize,
    /// IPv6, not IPv4.
    pub v6: bool,
    /// Where the transport header starts and what it is; `None` for other protocols and fragments.
    pub transport: Option<(usize, Transport)>,
    /// Where the payload of the transport starts; of IP when there is no transport.
    pub payload: usize,
    /// Where the IP packet ends. What follows is padding.
    pub end: usize,
}

impl Headers {
    /// Finds the headers of a frame; `None` when it has no IP packet. A length of 0 in the IP
    /// header, which senders of large packets leave, stands for all of the frame.
    pub fn find(frame: &[u8]) -> Option<Self> {
        let packet = LaxSlicedPacket::from_ethernet(frame).ok()?;
        // Slices of the frame: differences of their addresses are places in it.
        let place = |part: &[u8]| part.as_ptr().addr().checked_sub(frame.as_ptr().addr());
        let (network, v6, payload) = match packet.net.as_ref()? {
            LaxNetSlice::Ipv4(ip) => (place(ip.header().slice())?, false, ip.payload().payload),
            LaxNetSlice::Ipv6(ip) => (place(ip.header().slice())?, true, ip.payload().payload),
            LaxNetSlice::Arp(_) => return None,
        };
        let start = place(payload)?;
        let end = start.checked_add(payload.len())?;
        let (transport, payload) = match packet.transport {
            Some(TransportSlice::Tcp(tcp)) => (
                Some((start, Transport::Tcp)),
                start.checked_add(tcp.header_slice().len())?,
            ),
            Some(TransportSlice::Udp(_)) => (
                Some((start, Transport::Udp)),
                start.checked_add(UDP_HEADER)?,
            ),
            _ => (None, start),
        };
        Some(Self {
            network,
            v6,
            transport,
            payload,
            end,
        })
    }

    /// Source and destination address, one after the other.
    pub fn addresses<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        let range = if self.v6 { 8..40 } else { 12..20 };
        frame
            .get(self.network + range.start..self.network + range.end)
            .unwrap_or_default()
    }

    /// Writes the length of the IP packet, `end - network`, and the IPv4 header's checksum.
    pub(super) fn write_lengths(&self, frame: &mut [u8]) {
        let Some(ip) = frame.get_mut(self.network..) else {
            return;
        };
        if self.v6 {
            let length = (self.end - self.network).saturating_sub(IPV6_HEADER);
            write(ip, 4, &u16::try_from(length).unwrap_or(0).to_be_bytes());
        } else {
            let length = self.end - self.network;
            write(ip, 2, &u16::try_from(length).unwrap_or(0).to_be_bytes());
            self.write_ipv4_checksum(frame);
        }
    }

    /// Computes the checksum of the IPv4 header.
    pub fn write_ipv4_checksum(&self, frame: &mut [u8]) {
        let Some(ip) = frame.get_mut(self.network..) else {
            return;
        };
        if self.v6 {
            return;
        }
        let length = ip.first().map_or(0, |first| usize::from(first & 15) * 4);
        write(ip, 10, &[0, 0]);
        if let Some(header) = ip.get(..length) {
            // The sum is over words as they are in memory, and so is its result.
            let sum = Sum16BitWords::new().add_slice(header).ones_complement();
            write(ip, 10, &sum.to_ne_bytes());
        }
    }

    /// The sum of the pseudo header, for a transport of `length` bytes, not complemented.
    fn pseudo_header(&self, frame: &[u8], transport: Transport, length: usize) -> u16 {
        let length = u32::try_from(length).unwrap_or(0);
        let sum = Sum16BitWords::new()
            .add_slice(self.addresses(frame))
            .add_2bytes([0, transport.number()])
            .add_4bytes(length.to_be_bytes());
        !sum.ones_complement()
    }

    /// Prepares the transport's checksum for whoever completes it.
    pub(super) fn write_partial_checksum(&self, frame: &mut [u8]) -> Option<Checksum> {
        let (start, transport) = self.transport?;
        let offset = transport.checksum_offset();
        let sum = self.pseudo_header(frame, transport, self.end.checked_sub(start)?);
        write(frame, start + usize::from(offset), &sum.to_ne_bytes());
        Some(Checksum::Partial {
            start: u16::try_from(start).ok()?,
            offset,
        })
    }
}

const UDP_HEADER: usize = 8;
const IPV6_HEADER: usize = 40;

/// Writes bytes that are known to be inside.
pub(super) fn write(frame: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = frame.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

impl Frame {
    /// Leaves the checksum of TCP or UDP to whoever sends the frame on. False, and unchanged, when
    /// the frame has none of these.
    pub fn leave_checksum(&mut self, wanted: Transport) -> bool {
        let headers = Headers::find(&self.bytes)
            .filter(|headers| matches!(headers.transport, Some((_, found)) if found == wanted));
        let checksum = headers.and_then(|headers| headers.write_partial_checksum(&mut self.bytes));
        self.checksum = checksum.unwrap_or(self.checksum);
        checksum.is_some()
    }

    /// Leaves the frame to be cut into TCP segments of `segment` payload bytes. False, and
    /// unchanged, when it is not TCP. A frame with no more than that stays one segment.
    pub fn leave_segmentation(&mut self, segment: u16) -> bool {
        const CWR: u8 = 0x80;
        let Some(headers) = Headers::find(&self.bytes) else {
            return false;
        };
        let Some((tcp, Transport::Tcp)) = headers.transport else {
            return false;
        };
        let Ok(header_len) = u16::try_from(headers.payload) else {
            return false;
        };
        if segment == 0 {
            return false;
        }
        headers.write_lengths(&mut self.bytes);
        let Some(checksum) = headers.write_partial_checksum(&mut self.bytes) else {
            return false;
        };
        self.checksum = checksum;
        if headers.end - headers.payload > usize::from(segment) {
            self.gso = Some(Gso {
                v6: headers.v6,
                ecn: self
                    .bytes
                    .get(tcp + 13)
                    .is_some_and(|flags| flags & CWR != 0),
                header_len,
                segment,
            });
        }
        true
    }

    /// Computes the IPv4 header's checksum, if the frame has one.
    pub fn complete_ipv4_checksum(&mut self) {
        if let Some(headers) = Headers::find(&self.bytes) {
            headers.write_ipv4_checksum(&mut self.bytes);
        }
    }
}
