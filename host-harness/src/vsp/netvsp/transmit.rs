// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the guest sends: control messages of both protocols, frames, and completions of what it was
//! sent.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hv_proto::net::adapter::{Change, MAX_ANSWER_SIZE};
use hv_proto::net::frame::{PACKET_HEAD_SIZE, PacketLayout};
use hv_proto::net::nvsp::{
    self, Body, ChannelType, GuestMessage, MessageType, PacketComplete, SendTable, Status, Version,
};
use hv_proto::net::ppi::{self, Facts, LargeSend, SendChecksum};
use hv_proto::net::provider::{ProviderStep, RndisPlace};
use hv_proto::net::{ETHERNET_HEADER_SIZE, Span};
use hv_proto::packet::{Packet, PacketType};

use super::nic::{Channel, Inner, add};
use crate::net::{Frame, MAX_FRAME, Sent, Transport, Way};
use crate::vmbus::{ChannelError, ChannelReader, GuestBuffer, GuestMem};

/// Longest message of a guest: a frame of 64 KiB with its head, or several small ones.
pub const MAX_MESSAGE: usize = 128 << 10;

/// Ranges in one packet. Linux sends at most 19.
const MAX_RANGES: u32 = 64;

/// Bytes of a VLAN tag, and its type.
const VLAN_TAG: usize = 4;
const VLAN_TYPE: [u8; 2] = [0x81, 0x00];
/// Where the tag is: behind both addresses.
const VLAN_AT: usize = 12;

/// Buffers of the thread of a channel.
struct Scratch {
    message: Vec<u8>,
    frame: Frame,
}

impl Inner {
    /// Reads a channel until it closes.
    pub(super) fn serve(&self, channel: &Arc<Channel>, mut reader: ChannelReader) {
        let mem = Arc::clone(reader.memory());
        let mut scratch = Scratch {
            message: Vec::new(),
            frame: Frame::default(),
        };
        loop {
            let control = match reader.next(None) {
                Ok(Some(_)) if self.silent.load(Ordering::Acquire) => None,
                Ok(Some(packet)) => self.handle(channel, &mem, &packet, &mut scratch),
                Ok(None) => None,
                Err(error) => {
                    if !matches!(error, ChannelError::Stopped) {
                        self.complain(channel, &error, "a network channel failed");
                    }
                    return;
                }
            };
            if let Some(control) = control {
                self.control(channel, &reader, &control);
            }
        }
    }

    /// Handles what needs no more than the packet: completions and RNDIS messages. Gives the rest
    /// back.
    fn handle(
        &self,
        channel: &Channel,
        mem: &GuestMem,
        packet: &Packet<'_>,
        scratch: &mut Scratch,
    ) -> Option<Control> {
        let transaction = Transaction {
            id: packet.transaction_id(),
            wanted: packet.wants_completion(),
        };
        match packet.packet_type() {
            PacketType::COMPLETION => {
                if !channel.outstanding.complete(transaction.id) {
                    add(&self.counters.invalid, 1);
                } else if is_failure(packet.payload()) {
                    add(&self.counters.refused, 1);
                }
                return None;
            }
            PacketType::IN_BAND | PacketType::GPA_DIRECT => {}
            _ => {
                add(&self.counters.invalid, 1);
                return None;
            }
        }
        let payload = packet.payload();
        match nvsp::split_type(payload) {
            Ok((MessageType::SEND_RNDIS_PACKET, _)) => {}
            _ => {
                return Some(Control {
                    payload: payload.to_vec(),
                    transaction,
                });
            }
        }
        // These messages change nothing in the state machine: a copy of it does, and channels do
        // not wait for each other.
        let (step, send) = {
            let state = self.read();
            let mut provider = state.provider;
            (provider.on_message(payload), state.send.clone())
        };
        let mut status = Status::FAILURE;
        if let Ok(ProviderStep::Rndis(place)) = step {
            let section = place.section.zip(send.as_ref().map(|view| view.buffer()));
            let copied = copy_message(mem, packet, section, &mut scratch.message);
            // The guest may want it back before all frames are sent.
            drop(send);
            if copied {
                status = match self.rndis(channel, place, scratch) {
                    true => Status::SUCCESS,
                    false => Status::INVALID_RNDIS_PACKET,
                };
            }
        }
        if status != Status::SUCCESS {
            add(&self.counters.invalid, 1);
        }
        self.complete(channel, transaction, &PacketComplete { status }.encode());
        None
    }

    /// Handles the RNDIS messages in the scratch buffer. False if they make no sense.
    fn rndis(&self, channel: &Channel, place: RndisPlace, scratch: &mut Scratch) -> bool {
        if place.channel_type == ChannelType::CONTROL {
            return self.rndis_control(&scratch.message);
        }
        let Scratch { message, frame } = scratch;
        let mut rest = message.as_slice();
        let mut sensible = !rest.is_empty();
        let mut lost = false;
        // Each message is at least its head.
        while rest.len() >= PACKET_HEAD_SIZE {
            // The buffer is at most `MAX_MESSAGE`.
            let Ok(layout) = PacketLayout::parse(rest, rest.len() as u32) else {
                return false;
            };
            let data = layout.data.of(rest).unwrap_or_default();
            let info = layout.info.of(rest).unwrap_or_default();
            frame.bytes.clear();
            frame.bytes.extend_from_slice(data);
            sensible &= self.send_frame(channel, frame, info, &mut lost);
            rest = rest
                .get(layout.message_length as usize..)
                .unwrap_or_default();
        }
        sensible
    }

    /// Sends a frame to the network, with what its items say. False if they make no sense. `lost` says
    /// that the network did not take an earlier frame of the same packet. Then it gets no more of
    /// it, because it may have to be waited for each time.
    fn send_frame(
        &self,
        channel: &Channel,
        frame: &mut Frame,
        info: &[u8],
        lost: &mut bool,
    ) -> bool {
        frame.checksum = Default::default();
        frame.gso = None;
        let (limit, link) = {
            let state = self.read();
            (state.provider.frame_size(), state.link)
        };
        let Some((facts, lso)) = read_facts(info) else {
            add(&self.counters.send_errors, 1);
            return false;
        };
        let length = frame.bytes.len();
        let limit = match lso {
            Some(_) => MAX_FRAME,
            None => limit as usize + VLAN_TAG,
        };
        if length < ETHERNET_HEADER_SIZE as usize || length > limit {
            add(&self.counters.send_errors, 1);
            return false;
        }
        if let Some(vlan) = facts.vlan {
            let [a, b] = VLAN_TYPE;
            let [c, d] = vlan.tci().to_be_bytes();
            frame.bytes.splice(VLAN_AT..VLAN_AT, [a, b, c, d]);
        }
        let mut sensible = true;
        if let Some(lso) = lso {
            let segment = u16::try_from(lso.mss).unwrap_or(u16::MAX);
            sensible = frame.leave_segmentation(segment);
            add(&self.counters.sent_large, 1);
        } else if let Some(checksum) = facts.checksum.and_then(SendChecksum::decode) {
            if checksum.ip_header {
                frame.complete_ipv4_checksum();
            }
            if let Some(transport) = checksum.transport {
                sensible = frame.leave_checksum(match transport {
                    ppi::Transport::Tcp => Transport::Tcp,
                    ppi::Transport::Udp => Transport::Udp,
                });
                add(&self.counters.sent_partial, 1);
            }
        }
        if !sensible {
            add(&self.counters.send_errors, 1);
            return false;
        }
        if !link || *lost {
            add(&self.counters.send_errors, 1);
            return true;
        }
        for capture in &self.config.captures {
            capture.frame(Way::Out, &frame.bytes);
        }
        let backend = &self.config.backend;
        match backend.send(channel.index % backend.queues(), frame) {
            Ok(Sent::Done) => {
                add(&self.counters.sent, 1);
                add(&self.counters.sent_bytes, frame.bytes.len() as u64);
                add(&channel.sent, 1);
            }
            Ok(Sent::Lost) => {
                *lost = true;
                add(&self.counters.send_errors, 1);
            }
            Err(error) => {
                add(&self.counters.send_errors, 1);
                tracing::debug!(nic = self.name(), %error, "a frame is lost");
            }
        }
        true
    }

    /// Handles an RNDIS message that is not a frame. False if it makes no sense.
    fn rndis_control(&self, message: &[u8]) -> bool {
        let mut out = [0; MAX_ANSWER_SIZE];
        let statistics = self.statistics();
        let reaction = {
            let mut state = self.write();
            let reaction = state.adapter.on_message(message, &statistics, &mut out);
            if matches!(
                &reaction,
                Ok(reaction) if matches!(
                    reaction.change,
                    Change::Offloads | Change::Halted | Change::Initialized(_)
                )
            ) {
                self.update_offloads(&state);
            }
            reaction
        };
        match reaction {
            Ok(reaction) => {
                self.send_control(out.get(..reaction.answer).unwrap_or_default());
                true
            }
            Err(error) => {
                tracing::debug!(nic = self.name(), %error, "an RNDIS message");
                false
            }
        }
    }

    /// Handles an NVSP message that is not an RNDIS message.
    fn control(&self, channel: &Channel, reader: &ChannelReader, control: &Control) {
        let transaction = control.transaction;
        let answer = |bytes: &[u8]| self.complete(channel, transaction, bytes);
        if channel.index != 0 {
            // Sub-channels carry RNDIS messages only.
            add(&self.counters.invalid, 1);
            answer(
                &PacketComplete {
                    status: Status::FAILURE,
                }
                .encode(),
            );
            return;
        }
        let step = self.write().provider.on_message(&control.payload);
        match step {
            Err(error) => {
                add(&self.counters.invalid, 1);
                tracing::debug!(nic = self.name(), %error);
                answer(
                    &PacketComplete {
                        status: Status::FAILURE,
                    }
                    .encode(),
                );
            }
            Ok(ProviderStep::Answer(message)) => answer(message.as_bytes()),
            Ok(ProviderStep::MapReceiveBuffer(gpadl)) => {
                let view = reader.gpadl(gpadl);
                let message = {
                    let mut state = self.write();
                    let len = view.as_ref().ok().map(|view| view.buffer().len());
                    let len = len.and_then(|len| u32::try_from(len).ok());
                    let message = state.provider.receive_buffer_mapped(len);
                    if let (Some(sections), Ok(view)) = (state.provider.receive_sections(), view) {
                        state.receive = Some(super::sections::ReceiveBuffer::new(view, sections));
                    }
                    message
                };
                answer(message.as_bytes());
            }
            Ok(ProviderStep::MapSendBuffer(gpadl)) => {
                let view = reader.gpadl(gpadl);
                let message = {
                    let mut state = self.write();
                    let len = view.as_ref().ok().map(|view| view.buffer().len());
                    let len = len.and_then(|len| u32::try_from(len).ok());
                    let message = state.provider.send_buffer_mapped(len);
                    if let (Some(_), Ok(view)) = (state.provider.send_sections(), view) {
                        state.send = Some(Arc::new(view));
                    }
                    message
                };
                answer(message.as_bytes());
            }
            Ok(ProviderStep::UnmapReceiveBuffer) => {
                let outstanding: Vec<_> = {
                    let mut state = self.write();
                    state.drop_receive_buffer();
                    state.channels.values().cloned().collect()
                };
                // What holds sections holds the buffer, and the guest wants its memory back.
                for channel in outstanding {
                    channel.outstanding.clear();
                }
            }
            Ok(ProviderStep::UnmapSendBuffer) => self.write().send = None,
            Ok(ProviderStep::OfferSubChannels(count, message)) => {
                answer(message.as_bytes());
                let offered = u16::try_from(count)
                    .map_err(|error| error.to_string())
                    .and_then(|count| {
                        let device = reader.device();
                        device
                            .offer_subchannels(count)
                            .map_err(|error| error.to_string())
                    });
                match offered {
                    Ok(()) => {
                        let table = SendTable::spread(count.saturating_add(1)).encode();
                        if let Err(error) = channel.writer.send(0, &table, false) {
                            tracing::debug!(nic = self.name(), %error, "the send table is lost");
                        }
                    }
                    Err(error) => {
                        tracing::warn!(nic = self.name(), error, "sub-channels not offered");
                    }
                }
            }
            Ok(ProviderStep::SwitchDataPath(_, message)) => answer(message.as_bytes()),
            Ok(_) => {}
        }
    }

    /// Sends a completion, if it is wanted.
    fn complete(&self, channel: &Channel, transaction: Transaction, bytes: &[u8]) {
        if !transaction.wanted {
            return;
        }
        match self.send_completion(channel, transaction.id, bytes) {
            // The channel goes, and the guest knows.
            Ok(()) | Err(ChannelError::Stopped) => {}
            Err(error) => self.complain(channel, &error, "a completion is lost"),
        }
    }
}

#[derive(Clone, Copy)]
struct Transaction {
    id: u64,
    wanted: bool,
}

/// An NVSP message that is not an RNDIS message.
struct Control {
    payload: Vec<u8>,
    transaction: Transaction,
}

/// Whether a completion of the guest says that a packet came to nothing.
fn is_failure(payload: &[u8]) -> bool {
    match GuestMessage::parse(payload, Some(Version::V1)) {
        Ok(GuestMessage::PacketComplete(complete)) => complete.status != Status::SUCCESS,
        _ => true,
    }
}

/// The items of a frame; `None` if they make no sense.
fn read_facts(info: &[u8]) -> Option<(Facts, Option<LargeSend>)> {
    let facts = Facts::from_guest(info).ok()?;
    let lso = match facts.lso {
        Some(item) => Some(LargeSend::decode(item)?),
        None => None,
    };
    Some((facts, lso))
}

/// Copies the message of a packet: from a section of the send buffer, from the guest's memory, or
/// both. False if it is not all there.
fn copy_message(
    mem: &GuestMem,
    packet: &Packet<'_>,
    section: Option<(Span, &GuestBuffer)>,
    message: &mut Vec<u8>,
) -> bool {
    let mut direct = GuestBuffer::empty(mem);
    if packet.packet_type() == PacketType::GPA_DIRECT {
        let Ok(ranges) = packet.gpa_direct(MAX_RANGES) else {
            return false;
        };
        if ranges.byte_count() > MAX_MESSAGE as u64 {
            return false;
        }
        for range in ranges.ranges() {
            let part =
                GuestBuffer::from_pfns(mem, range.byte_offset(), range.byte_count(), range.pfns());
            match part {
                Ok(part) => direct.append(part),
                Err(_) => return false,
            }
        }
    }
    let first = section.map_or(0, |(span, _)| span.len as usize);
    // Sections are smaller than the rest of the limit.
    message.resize(first + direct.len(), 0);
    let (begin, end) = message.split_at_mut(first);
    let copied = match section {
        Some((span, buffer)) => buffer.read_at(span.offset as usize, begin).is_ok(),
        None => true,
    };
    copied && direct.read_at(0, end).is_ok()
}
