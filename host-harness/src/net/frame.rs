// SPDX-License-Identifier: MIT OR Apache-2.0

//! An Ethernet frame and what is still to be done on it.
//!
//! The header by which the kernel's TAPs say the same is `struct virtio_net_hdr` (Linux,
//! `include/uapi/linux/virtio_net.h`; virtio 1.2, section 5.1.6), the form without a count of
//! buffers.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Longest frame: an IP packet of 64 KiB behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME: usize = 65535 + 18;

/// What is known of a frame's TCP or UDP checksum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Checksum {
    /// Nothing: the receiver checks it.
    #[default]
    Unknown,
    /// It was checked.
    Valid,
    /// The field has the sum of the pseudo header: the sum from `start` to the end is to be put
    /// at `start + offset`.
    Partial {
        /// Where the transport header starts.
        start: u16,
        /// Where in it the checksum is.
        offset: u16,
    },
}

/// The frame is to be cut into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gso {
    /// TCP over IPv6, not IPv4.
    pub v6: bool,
    /// The window-reduced flag (CWR) belongs to the first segment only.
    pub ecn: bool,
    /// Bytes of all headers.
    pub header_len: u16,
    /// Payload bytes of a segment.
    pub segment: u16,
}

/// A frame.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frame {
    /// From the destination address on, without the check sequence.
    pub bytes: Vec<u8>,
    /// Its TCP or UDP checksum.
    pub checksum: Checksum,
    /// Its segmentation.
    pub gso: Option<Gso>,
}

impl Frame {
    /// A frame with nothing left to do.
    pub fn plain(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            ..Self::default()
        }
    }
}

/// `struct virtio_net_hdr`, in the byte order of the machine.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct VnetHeader {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

/// Size of the header.
pub(super) const VNET_HEADER: usize = size_of::<VnetHeader>();
const _: () = assert!(VNET_HEADER == 10);

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

impl VnetHeader {
    /// The header for a frame.
    pub fn of(frame: &Frame) -> Self {
        let mut header = Self::new_zeroed();
        match frame.checksum {
            Checksum::Unknown => {}
            Checksum::Valid => header.flags = DATA_VALID,
            Checksum::Partial { start, offset } => {
                header.flags = NEEDS_CSUM;
                header.csum_start = start;
                header.csum_offset = offset;
            }
        }
        if let Some(gso) = frame.gso {
            header.gso_type = if gso.v6 { GSO_TCPV6 } else { GSO_TCPV4 };
            if gso.ecn {
                header.gso_type |= GSO_ECN;
            }
            header.hdr_len = gso.header_len;
            header.gso_size = gso.segment;
        }
        header
    }

    /// What the header says. `None` for a kind of segmentation that nobody asked for.
    pub fn meaning(&self) -> Option<(Checksum, Option<Gso>)> {
        let checksum = if self.flags & NEEDS_CSUM != 0 {
            Checksum::Partial {
                start: self.csum_start,
                offset: self.csum_offset,
            }
        } else if self.flags & DATA_VALID != 0 {
            Checksum::Valid
        } else {
            Checksum::Unknown
        };
        let v6 = match self.gso_type & !GSO_ECN {
            GSO_NONE => return Some((checksum, None)),
            GSO_TCPV4 => false,
            GSO_TCPV6 => true,
            _ => return None,
        };
        let gso = Gso {
            v6,
            ecn: self.gso_type & GSO_ECN != 0,
            header_len: self.hdr_len,
            segment: self.gso_size,
        };
        Some((checksum, Some(gso)))
    }
}
