// SPDX-License-Identifier: GPL-2.0 OR MIT

//! RNDIS messages with frames: a header, items of per-packet information ([`super::ppi`]), and the
//! frame.
//!
//! The receiver copies the first [`PACKET_HEAD_SIZE`] bytes out of shared memory; [`PacketLayout`]
//! checks them and says where the rest is. The sender puts a [`Head`] before each frame.
//!
//! ```
//! use hv_proto::net::frame::{Head, PacketLayout};
//! use hv_proto::net::ppi::{Facts, Info, InfoWriter, Vlan};
//!
//! let mut info = InfoWriter::new();
//! info.put(Info::Vlan(Vlan::new(5, 0, false))).unwrap();
//! let head = Head::new(60, &info).unwrap();
//! let message = [head.as_bytes(), &[0; 60]].concat();
//!
//! let layout = PacketLayout::parse(&message, message.len() as u32).unwrap();
//! assert_eq!(layout.data.of(&message), Some(&[0; 60][..]));
//! let facts = Facts::from_guest(layout.info.of(&message).unwrap()).unwrap();
//! assert_eq!(facts.vlan, Some(Vlan::new(5, 0, false)));
//! ```
//!
//! Uses `zerocopy`.
//!
//! Source: `hyperv_net.h` of the kernel's network driver (`struct rndis_packet`), [MS-RNDIS] 2.2.14.

use super::ppi::{InfoWriter, MAX_WRITTEN_SIZE};
use super::rndis::{Header, MessageType, RndisError, HEADER_SIZE};
use super::Span;
use crate::message::read_prefix;
use zerocopy::little_endian::U32;
use zerocopy::{FromZeros as _, IntoBytes as _};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of header and body of a frame's message, without per-packet information and frame.
pub const PACKET_HEAD_SIZE: usize = HEADER_SIZE + size_of::<Packet>();

/// Most bytes of a [`Head`].
pub const MAX_HEAD_SIZE: usize = PACKET_HEAD_SIZE + MAX_WRITTEN_SIZE;

/// Body of [`MessageType::PACKET`]. Per-packet information and frame follow it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Packet {
    /// Where the frame starts, in bytes from the start of this body.
    pub data_offset: U32,
    /// Bytes of the frame.
    pub data_length: U32,
    /// Zero.
    pub oob_data_offset: U32,
    /// Zero.
    pub oob_data_length: U32,
    /// Zero.
    pub oob_data_count: U32,
    /// Where the per-packet information starts, in bytes from the start of this body.
    pub packet_info_offset: U32,
    /// Bytes of the per-packet information.
    pub packet_info_length: U32,
    /// Zero.
    pub vc_handle: U32,
    /// Zero.
    pub reserved: U32,
}

const _: () = assert!(size_of::<Packet>() == 36);

/// Where frame and per-packet information are in a [`MessageType::PACKET`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketLayout {
    /// Bytes of the message; the next one may follow.
    pub message_length: u32,
    /// The frame, from the start of the message.
    pub data: Span,
    /// The per-packet information, from the start of the message; empty if there is none.
    pub info: Span,
}

impl PacketLayout {
    /// Checks a message of which `head` is a copy of the start ([`PACKET_HEAD_SIZE`] bytes), and of
    /// which `available` bytes are there.
    ///
    /// # Errors
    /// [`RndisError`].
    pub fn parse(head: &[u8], available: u32) -> Result<Self, RndisError> {
        let header = Header::read(head, usize::try_from(available).unwrap_or(usize::MAX))?;
        if header.message_type != MessageType::PACKET {
            return Err(RndisError::NotAPacket(header.message_type));
        }
        let truncated = |len| RndisError::Truncated {
            message_type: MessageType::PACKET,
            len,
            need: PACKET_HEAD_SIZE,
        };
        let message_length = header.message_length.get();
        let body_length = message_length.saturating_sub(HEADER_SIZE as u32);
        let body = head.get(HEADER_SIZE..).ok_or(truncated(head.len()))?;
        let packet: Packet = read_prefix(body).ok_or(truncated(head.len()))?;
        let fixed = size_of::<Packet>() as u32;
        if body_length < fixed {
            return Err(truncated(message_length as usize));
        }
        let place = |offset: u32, len: u32| {
            let span = Span::within(offset, len, body_length).filter(|_| offset >= fixed)?;
            span.after(HEADER_SIZE as u32)
        };
        let (offset, len) = (packet.data_offset.get(), packet.data_length.get());
        let data = place(offset, len).ok_or(RndisError::Data { offset, len })?;
        let (offset, len) = (
            packet.packet_info_offset.get(),
            packet.packet_info_length.get(),
        );
        let info = if offset == 0 || len == 0 {
            Span::default()
        } else {
            place(offset, len).ok_or(RndisError::PacketInfo { offset, len })?
        };
        Ok(Self {
            message_length,
            data,
            info,
        })
    }
}

/// What goes before a frame: the message's header and the items.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; MAX_HEAD_SIZE],
    len: u32,
    message_length: u32,
}

impl Head {
    /// The head of a message with a frame of `data_length` bytes; `None` if that is too long for any
    /// message.
    pub fn new(data_length: u32, info: &InfoWriter) -> Option<Self> {
        let info = info.as_bytes();
        let info_length = u32::try_from(info.len()).ok()?;
        let packet_size = size_of::<Packet>() as u32;
        let len = info_length.checked_add(PACKET_HEAD_SIZE as u32)?;
        let packet = Packet {
            data_offset: packet_size.checked_add(info_length)?.into(),
            data_length: data_length.into(),
            packet_info_offset: if info.is_empty() { 0 } else { packet_size }.into(),
            packet_info_length: info_length.into(),
            ..Packet::new_zeroed()
        };
        let mut head = Self {
            bytes: [0; MAX_HEAD_SIZE],
            len,
            message_length: len.checked_add(data_length)?,
        };
        let rest = head.bytes.get_mut(HEADER_SIZE..)?;
        for (to, from) in rest.iter_mut().zip(packet.as_bytes().iter().chain(info)) {
            *to = *from;
        }
        head.set_header();
        Some(head)
    }

    fn set_header(&mut self) {
        let header = Header {
            message_type: MessageType::PACKET,
            message_length: self.message_length.into(),
        };
        for (to, from) in self.bytes.iter_mut().zip(header.as_bytes()) {
            *to = *from;
        }
    }

    /// Makes the message longer by `padding` bytes, which come after the frame. `false`, with nothing
    /// changed, if that is too long for any message.
    #[must_use]
    pub fn pad(&mut self, padding: u32) -> bool {
        let Some(length) = self.message_length.checked_add(padding) else {
            return false;
        };
        self.message_length = length;
        self.set_header();
        true
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        // At most 124.
        self.bytes.get(..self.len as usize).unwrap_or_default()
    }

    /// Number of bytes; the frame starts there.
    pub fn size(&self) -> u32 {
        self.len
    }

    /// Bytes of the whole message: head, frame and padding.
    pub fn message_length(&self) -> u32 {
        self.message_length
    }
}
