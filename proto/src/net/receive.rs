// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's receive path: from the ranges of a transfer-page packet to frames.
//!
//! Each range holds one RNDIS message, in memory that the host can change at any time. A [`Receiver`]
//! copies its header, then its per-packet information, checks the copies, and says where in the buffer
//! the frame is; only the bytes of the frame itself are left for the driver to copy, once. A frame that
//! the host has put together (RSC) comes in parts, one for each range, and ends with its packet.
//!
//! The driver owes the host one completion for each packet. It may have to wait until there is room in
//! the ring: [`Owed`] keeps them.
//!
//! Uses `core` and modules of this crate; the caller provides all memory.
//!
//! Source: `netvsc_receive` in `drivers/net/hyperv/netvsc.c`, and `rndis_filter_receive_data` in
//! `rndis_filter.c`, of the kernel.

use super::frame::{PacketLayout, PACKET_HEAD_SIZE};
use super::nvsp::{self, HostMessage, NvspError, Status, Version};
use super::ppi::{Facts, InfoError, MAX_INFO_SIZE};
use super::rndis::{Header, MessageType, RndisError, HEADER_SIZE};
use super::sections::{transfer_ranges, SectionError, Sections};
use super::{Span, ETHERNET_HEADER_SIZE};
use crate::packet::{Packet, PacketError, TransferPageRange};
use core::fmt;
use core::ops::DerefMut;

/// Most bytes of a frame: the longest IP packet, Ethernet header, VLAN tag.
pub const MAX_FRAME_SIZE: u32 = 65_535 + ETHERNET_HEADER_SIZE + 4;

/// Memory that the host can write at any time.
pub trait SharedBuffer {
    /// Copies the bytes at `offset` to `to`. `false` if they are not all inside of the buffer.
    fn read(&self, offset: u32, to: &mut [u8]) -> bool;
}

/// Why a packet or a range is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The packet is not one with ranges.
    Packet(PacketError),
    /// Its payload is no message.
    Message(NvspError),
    /// Its payload is another message than that for frames.
    Unexpected(nvsp::MessageType),
    /// A range is not in the sections.
    Section(SectionError),
    /// The buffer has not the bytes that were agreed.
    Buffer(Span),
    /// The message in a range makes no sense.
    Rndis(RndisError),
    /// Nor does what it says about its frame.
    Info(InfoError),
    /// The frame is too short or too long; the number is its length in bytes.
    FrameSize(u32),
    /// A part comes without the first one.
    NoFirstPart,
    /// A frame has not its last part in its packet.
    NoLastPart,
    /// A frame has more parts than there is room for.
    TooManyParts,
}

impl fmt::Display for ReceiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packet(error) => write!(f, "{error}"),
            Self::Message(error) => write!(f, "{error}"),
            Self::Unexpected(message_type) => write!(f, "{message_type:?} with ranges"),
            Self::Section(error) => write!(f, "{error}"),
            Self::Buffer(span) => write!(f, "receive buffer has no {span:?}"),
            Self::Rndis(error) => write!(f, "{error}"),
            Self::Info(error) => write!(f, "{error}"),
            Self::FrameSize(size) => write!(f, "frame of {size} bytes"),
            Self::NoFirstPart => f.write_str("part of a frame without the first one"),
            Self::NoLastPart => f.write_str("frame without its last part"),
            Self::TooManyParts => f.write_str("frame with too many parts"),
        }
    }
}

impl core::error::Error for ReceiveError {}

/// Checks a transfer-page packet, and returns its ranges: give each to [`Receiver::receive`].
///
/// # Errors
/// [`ReceiveError`].
pub fn open<'a>(
    packet: &Packet<'a>,
    version: Version,
) -> Result<&'a [TransferPageRange], ReceiveError> {
    let pages = packet.transfer_pages().map_err(ReceiveError::Packet)?;
    match HostMessage::parse(packet.payload(), Some(version)).map_err(ReceiveError::Message)? {
        HostMessage::RndisPacket(_) => transfer_ranges(&pages).map_err(ReceiveError::Section),
        _ => {
            let (message_type, _) =
                nvsp::split_type(packet.payload()).map_err(ReceiveError::Message)?;
            Err(ReceiveError::Unexpected(message_type))
        }
    }
}

/// A frame, whose bytes are still in the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What the host says about it.
    pub facts: Facts,
    /// Its length in bytes: from 14 to [`MAX_FRAME_SIZE`].
    pub len: u32,
    /// Where its bytes are, in order: at least one part.
    pub parts: &'a [Span],
}

/// What is in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// A frame, or the last part of one.
    Frame(Frame<'a>),
    /// A part of a frame, whose other parts follow.
    Part,
    /// Another message: copy it, and give the copy to [`super::control::Requests::receive`].
    Control(Span),
}

/// The receive path of one channel. `S` has room for the parts of a frame: at most
/// [`super::MAX_TRANSFER_RANGES`].
#[derive(Debug)]
pub struct Receiver<S> {
    parts: S,
    used: usize,
    len: u32,
    /// What was said with the first part.
    facts: Facts,
    /// Room for the items of a message.
    info: [u8; MAX_INFO_SIZE],
}

impl<S: DerefMut<Target = [Span]>> Receiver<S> {
    /// A receiver with this room for parts.
    pub fn new(parts: S) -> Self {
        Self {
            parts,
            used: 0,
            len: 0,
            facts: Facts::default(),
            info: [0; MAX_INFO_SIZE],
        }
    }

    /// Looks into the next range of a packet; `is_last` says whether it is the last one, and so no
    /// frame may go on after it.
    ///
    /// # Errors
    /// [`ReceiveError`]. A frame of which only some parts have come is dropped. Complete the packet with
    /// [`Status::FAILURE`], but look at its other ranges.
    pub fn receive(
        &mut self,
        range: &TransferPageRange,
        is_last: bool,
        sections: &Sections,
        buffer: &impl SharedBuffer,
    ) -> Result<Received<'_>, ReceiveError> {
        match self.look(range, is_last, sections, buffer) {
            Ok(Looked::Control(span)) => {
                self.used = 0;
                Ok(Received::Control(span))
            }
            Ok(Looked::Part) => Ok(Received::Part),
            Ok(Looked::Frame) => {
                let used = core::mem::take(&mut self.used);
                Ok(Received::Frame(Frame {
                    facts: self.facts,
                    len: self.len,
                    parts: self.parts.get(..used).unwrap_or_default(),
                }))
            }
            Err(error) => {
                self.used = 0;
                Err(error)
            }
        }
    }

    fn look(
        &mut self,
        range: &TransferPageRange,
        is_last: bool,
        sections: &Sections,
        buffer: &impl SharedBuffer,
    ) -> Result<Looked, ReceiveError> {
        let range = sections.range(range).map_err(ReceiveError::Section)?;
        let mut head = [0; PACKET_HEAD_SIZE];
        // Shorter ranges can still hold other messages than frames.
        let head_len = head.len().min(range.len as usize);
        let head = head.get_mut(..head_len).unwrap_or_default();
        copy(buffer, range.offset, head)?;
        let header = Header::read(head, range.len as usize).map_err(ReceiveError::Rndis)?;
        if header.message_type != MessageType::PACKET {
            return Ok(Looked::Control(range));
        }
        let layout = PacketLayout::parse(head, range.len).map_err(ReceiveError::Rndis)?;
        let data = layout.data.after(range.offset);
        let data = data.ok_or(ReceiveError::Buffer(layout.data))?;
        let facts = self.read_facts(range.offset, layout.info, buffer)?;
        let (first, last) = match facts.packet_id {
            Some(id) if id.is_part() => (id.is_first(), id.is_last()),
            _ => (true, true),
        };
        if first {
            self.used = 0;
            self.len = 0;
            self.facts = facts;
        } else if self.used == 0 {
            return Err(ReceiveError::NoFirstPart);
        }
        if !last && is_last {
            return Err(ReceiveError::NoLastPart);
        }
        let place = self
            .parts
            .get_mut(self.used)
            .ok_or(ReceiveError::TooManyParts)?;
        *place = data;
        self.used = self.used.saturating_add(1);
        self.len = self.len.saturating_add(data.len);
        if self.len > MAX_FRAME_SIZE || (last && self.len < ETHERNET_HEADER_SIZE) {
            return Err(ReceiveError::FrameSize(self.len));
        }
        Ok(if last { Looked::Frame } else { Looked::Part })
    }

    /// Copies the items of the message at `base`, and reads the copy.
    fn read_facts(
        &mut self,
        base: u32,
        info: Span,
        buffer: &impl SharedBuffer,
    ) -> Result<Facts, ReceiveError> {
        if info.len == 0 {
            return Ok(Facts::default());
        }
        let place = info.after(base).ok_or(ReceiveError::Buffer(info))?;
        let len = info.len as usize;
        let too_long = ReceiveError::Info(InfoError::TooLong(len));
        let bytes = self.info.get_mut(..len).ok_or(too_long)?;
        copy(buffer, place.offset, bytes)?;
        Facts::from_host(bytes).map_err(ReceiveError::Info)
    }
}

enum Looked {
    Frame,
    Part,
    Control(Span),
}

/// Copies out of the buffer.
fn copy(buffer: &impl SharedBuffer, offset: u32, to: &mut [u8]) -> Result<(), ReceiveError> {
    if buffer.read(offset, to) {
        return Ok(());
    }
    let len = u32::try_from(to.len()).unwrap_or(u32::MAX);
    Err(ReceiveError::Buffer(Span { offset, len }))
}

const _: () = assert!(HEADER_SIZE <= PACKET_HEAD_SIZE);

/// A completion that the guest owes the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// The packet's transaction id.
    pub transaction_id: u64,
    /// What has become of it.
    pub success: bool,
}

impl Completion {
    /// Payload of the completion packet.
    pub fn message(&self) -> [u8; nvsp::PacketComplete::SHORT_SIZE] {
        let status = if self.success {
            Status::SUCCESS
        } else {
            Status::FAILURE
        };
        nvsp::PacketComplete { status }.encode_short()
    }
}

/// The completions that a channel owes the host, oldest first. `S` has room for as many as there are
/// sections in the receive buffer: more packets cannot be outstanding.
#[derive(Debug)]
pub struct Owed<S> {
    storage: S,
    first: usize,
    len: usize,
}

impl<S: DerefMut<Target = [Completion]>> Owed<S> {
    /// How many a channel should collect before it sends them.
    pub const BATCH: usize = 64;

    /// Nothing is owed.
    pub fn new(storage: S) -> Self {
        Self {
            storage,
            first: 0,
            len: 0,
        }
    }

    /// Number of completions that are owed.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is owed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a completion. `false`, with nothing added, if there is no room: the host has sent more
    /// packets than it has sections.
    #[must_use]
    pub fn push(&mut self, completion: Completion) -> bool {
        let capacity = self.storage.len();
        if self.len >= capacity {
            return false;
        }
        let at = self.first.saturating_add(self.len);
        let at = at.checked_rem(capacity).unwrap_or(0);
        let Some(place) = self.storage.get_mut(at) else {
            return false;
        };
        *place = completion;
        self.len = self.len.saturating_add(1);
        true
    }

    /// The oldest one.
    pub fn front(&self) -> Option<Completion> {
        self.storage
            .get(self.first)
            .filter(|_| self.len != 0)
            .copied()
    }

    /// The oldest one was sent.
    pub fn pop(&mut self) {
        if self.len != 0 {
            let next = self.first.saturating_add(1);
            self.first = next.checked_rem(self.storage.len()).unwrap_or(0);
            self.len = self.len.saturating_sub(1);
        }
    }
}
