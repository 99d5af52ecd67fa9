// SPDX-License-Identifier: GPL-2.0

//! Packets on their way out.
//!
//! A small packet is copied to a section of the send buffer, and several of them to one section while
//! the stack says that more are coming. A larger one stays where it is, and the host is told its pages;
//! if there is room for its head only in a section that has been begun, the head goes there.
//!
//! What the host may still read is kept until it has completed the message: packets and their sections, and the
//! driver's own messages. If it never does, until the channel is closed.

mod prepare;
mod ranges;

use self::ranges::Ranges;
use crate::{
    control::{
        Kind,
        Waiting, //
    },
    link::{
        Buffers,
        Link, //
    },
    net::{
        self,
        Piece,
        Transmit,
        TxSkb, //
    },
    queue::Queue, //
};
use hv_proto::net::{
    control::Limits,
    frame::{
        Head,
        MAX_HEAD_SIZE, //
    },
    nvsp::{
        Body,
        ChannelType,
        RndisPacket, //
    },
    sections::Sections,
    transmit::{
        Batch,
        Batcher,
        Place, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        barrier,
        Arc, //
    }, //
};
use vmbus::Channel;

/// A queue is stopped when less than this percentage of the ring is free,
const STOP_BELOW: u32 = 10;
/// and woken when this percentage is free, or nothing is outstanding.
const WAKE_ABOVE: u32 = 20;

/// The room before packets that a driver wants for their heads.
pub(crate) const HEADROOM: u32 = MAX_HEAD_SIZE as u32;

/// A request that the host has.
pub(crate) enum Request {
    /// Packets.
    Data(Sent),
    /// An RNDIS message of the driver itself, which the host can read until it has answered.
    Control(KVec<u8>),
    /// Something that somebody waits for.
    Nvsp(Arc<Waiting>),
}

/// Packets that the host has, or will be given, in one message.
pub(crate) struct Sent {
    /// The last of them; the others were copied, and freed.
    skb: TxSkb,
    section: Option<u32>,
    packets: u32,
    bytes: u64,
}

impl Sent {
    fn new(skb: TxSkb, section: Option<u32>) -> Self {
        Self {
            packets: 1,
            bytes: skb.len().into(),
            skb,
            section,
        }
    }

    /// Adds a packet to those that are in `section` already, if some are.
    fn add(before: Option<Self>, skb: TxSkb, section: u32) -> Self {
        let Some(mut sent) = before else {
            return Self::new(skb, Some(section));
        };
        sent.packets = sent.packets.saturating_add(1);
        sent.bytes = sent.bytes.saturating_add(skb.len().into());
        core::mem::replace(&mut sent.skb, skb).consume();
        sent
    }
}

/// What who sends keeps.
pub(crate) struct Sender {
    batcher: Batcher,
    /// The packets in the section that the batcher keeps for more.
    pending: Option<Sent>,
}

impl Sender {
    pub(crate) fn new(sections: &Sections, limits: &Limits) -> Self {
        Self {
            batcher: Batcher::new(sections, limits),
            pending: None,
        }
    }
}

/// Where byte `at` of a section is in the send buffer.
fn place(buffers: &Buffers, section: u32, at: u32) -> Result<usize> {
    let place = buffers
        .send_sections
        .section(section, 0)
        .map_err(|_| EINVAL)?;
    Ok(place.offset.checked_add(at).ok_or(EINVAL)? as usize)
}

/// Why a packet was not sent.
enum Failure {
    /// It never will be.
    Drop,
    /// It may be later.
    Busy(TxSkb),
}

impl Queue {
    /// Sends a packet; see [`net::Operations::start_xmit`].
    pub(crate) fn xmit(&self, link: &Link, skb: TxSkb, more: bool) -> Transmit {
        let result = self.try_xmit(link, skb, more);
        if result.is_err() {
            // Nobody may come to send those before it.
            self.flush(link);
        }
        match result {
            Ok(()) => Transmit::Done,
            Err(Failure::Busy(skb)) => {
                link.nic.stats.events.tx_busy.count();
                Transmit::Busy(skb)
            }
            Err(Failure::Drop) => {
                link.nic.stats.tx_dropped.count();
                Transmit::Done
            }
        }
    }

    fn try_xmit(&self, link: &Link, mut skb: TxSkb, more: bool) -> Result<(), Failure> {
        let (Some(channel), Some(buffers)) = (self.channel(), link.buffers()) else {
            return Err(Failure::Drop);
        };
        if link.is_closing() || link.is_dead() {
            return Err(Failure::Drop);
        }
        let mut head = Self::prepare(link, &mut skb)?;
        skb.timestamp();

        let more = more && !link.nic.netdev().is_xmit_stopped(self.index());
        let mut sender = self.sender.lock();
        let Some(Sender { batcher, pending }) = &mut *sender else {
            return Err(Failure::Drop);
        };
        let plan = batcher.place(&mut head, more, || {
            buffers.sections.take(u32::from(self.index()) * u64::BITS)
        });
        if plan.no_section {
            link.nic.stats.events.tx_send_full.count();
        }
        let mut begun = pending.take();
        if let (Some(batch), Some(begun)) = (plan.before, begun.take_if(|_| plan.before.is_some()))
        {
            self.send_batch(link, channel, buffers, &batch, begun);
        }
        match plan.place {
            Place::Copy {
                section,
                offset,
                padding,
            } => {
                if Self::copy(buffers, section, offset, &head, &skb, padding).is_err() {
                    batcher.flush();
                    return Err(Self::abandon(link, buffers, section, begun));
                }
                let sent = Sent::add(begun, skb, section);
                match plan.send {
                    Some(batch) => self.send_section(link, channel, buffers, &batch, sent),
                    None => {
                        *pending = Some(sent);
                        Ok(())
                    }
                }
            }
            Place::CopyHead { section, offset } => {
                let batch = plan.send.ok_or(Failure::Drop)?;
                let mut ranges = Ranges::new();
                let written = ranges.add_all(&skb).and_then(|()| {
                    let at = place(buffers, section, offset)?;
                    buffers.send_buffer().write_at(at, head.as_bytes())
                });
                if written.is_err() {
                    return Err(Self::abandon(link, buffers, section, begun));
                }
                let sent = Sent::add(begun, skb, section);
                let message = batch.message();
                self.post(link, channel, buffers, sent, |id| {
                    ranges.send(channel, &message, id)
                })
            }
            Place::Direct => self.send_pages(link, channel, buffers, &head, skb),
        }
    }

    /// Copies a packet into a section, from byte `at` on.
    fn copy(
        buffers: &Buffers,
        section: u32,
        at: u32,
        head: &Head,
        skb: &TxSkb,
        padding: u32,
    ) -> Result {
        const ZEROS: [u8; hv_proto::PAGE_SIZE] = [0; hv_proto::PAGE_SIZE];
        let buffer = buffers.send_buffer();
        let mut offset = place(buffers, section, at)?;
        buffer.write_at(offset, head.as_bytes())?;
        offset = offset.saturating_add(head.size() as usize);
        let (pieces, count) = skb.pieces();
        for piece in pieces.iter().take(count) {
            let len = piece.len() as usize;
            // SAFETY: A piece is memory of the kernel, which the packet keeps.
            unsafe { buffer.write_from(offset, piece.as_ptr(), len)? };
            offset = offset.saturating_add(len);
        }
        buffer.write_at(offset, ZEROS.get(..padding as usize).ok_or(EINVAL)?)
    }

    /// Gives up a section that a packet could not be added to, with those that are in it.
    fn abandon(link: &Link, buffers: &Buffers, section: u32, begun: Option<Sent>) -> Failure {
        match begun {
            Some(sent) => Self::lose(link, sent),
            None => {
                buffers.sections.give(section);
            }
        }
        Failure::Drop
    }

    /// Gives up packets that the host does not have, or cannot reach any more.
    fn lose(link: &Link, sent: Sent) {
        if let (Some(section), Some(buffers)) = (sent.section, link.buffers()) {
            buffers.sections.give(section);
        }
        link.nic.stats.tx_dropped.add(sent.packets.into());
    }

    /// Gives up everything that waits to be sent, and that the host has: the channel is closed. Nothing
    /// can be sent afterwards. What the host may still reach is never freed, unless `let_go` says that
    /// it cannot. Process context.
    pub(crate) fn cancel_all(&self, link: &Link, let_go: bool) {
        let sender = {
            let _softirqs = net::BhDisabled::new();
            self.sender.lock().take()
        };
        if let Some(sent) = sender.and_then(|sender| sender.pending) {
            Self::lose(link, sent);
        }
        self.slots.cancel_all(|_, request| match request {
            Request::Data(sent) => {
                self.end_send();
                // What is in a section is a copy.
                if let_go || sent.section.is_some() {
                    Self::lose(link, sent);
                } else {
                    link.nic.stats.tx_dropped.add(sent.packets.into());
                    sent.skb.leak();
                }
            }
            Request::Control(message) if !let_go => core::mem::forget(message),
            Request::Control(_) | Request::Nvsp(_) => {}
        });
    }

    /// Sends a message of RNDIS that is not a frame, and keeps it until the host has completed it.
    ///
    /// # Errors
    ///
    /// As [`Channel::send`], with the message, which may be sent again after `EAGAIN`; `EBUSY` if too
    /// much is outstanding.
    pub(crate) fn send_rndis(
        &self,
        message: KVec<u8>,
    ) -> core::result::Result<(), (Error, Option<KVec<u8>>)> {
        let Some(channel) = self.channel() else {
            return Err((ENODEV, None));
        };
        let mut ranges = Ranges::new();
        let added = Piece::of_heap(&message).and_then(|piece| ranges.add(&piece));
        if let Err(error) = added {
            return Err((error, None));
        }
        let packet = RndisPacket::outside(ChannelType::CONTROL);
        self.slots
            .send(Kind::Rndis, Request::Control(message), |id| {
                ranges.send(channel, &packet, id)
            })
            .map_err(|(error, request)| match request {
                Some(Request::Control(message)) => (error, Some(message)),
                _ => (error, None),
            })
    }

    /// Sends a section.
    fn send_section(
        &self,
        link: &Link,
        channel: &Channel,
        buffers: &Buffers,
        batch: &Batch,
        sent: Sent,
    ) -> Result<(), Failure> {
        let message = batch.message().encode();
        self.post(link, channel, buffers, sent, |id| {
            channel.send(&message, id, true)
        })
    }

    /// Sends a section whose packets the stack does not wait for.
    fn send_batch(
        &self,
        link: &Link,
        channel: &Channel,
        buffers: &Buffers,
        batch: &Batch,
        sent: Sent,
    ) {
        if self
            .send_section(link, channel, buffers, batch, sent)
            .is_err()
        {
            // The packets before the last one were counted already.
            link.nic.stats.tx_dropped.count();
        }
    }

    /// Sends a packet from where it is.
    fn send_pages(
        &self,
        link: &Link,
        channel: &Channel,
        buffers: &Buffers,
        head: &Head,
        mut skb: TxSkb,
    ) -> Result<(), Failure> {
        let mut ranges = Ranges::new();
        let added = skb
            .write_headroom(head.as_bytes())
            .and_then(|piece| ranges.add(&piece))
            .and_then(|()| ranges.add_all(&skb));
        if added.is_err() {
            link.nic.stats.events.tx_too_big.count();
            return Err(Failure::Drop);
        }
        let sent = Sent::new(skb, None);
        let message = RndisPacket::outside(ChannelType::DATA);
        self.post(link, channel, buffers, sent, |id| {
            ranges.send(channel, &message, id)
        })
    }

    /// Sends a message with packets by calling `send`, and keeps what is to be kept until the host has
    /// answered. Stops the queue if there is not much room left.
    fn post(
        &self,
        link: &Link,
        channel: &Channel,
        buffers: &Buffers,
        sent: Sent,
        send: impl FnOnce(u64) -> Result,
    ) -> Result<(), Failure> {
        let netdev = link.nic.netdev();
        let events = &link.nic.stats.events;
        let earlier = sent.packets.saturating_sub(1);
        // First, for the answer may come before `send` returns.
        self.begin_send();
        let result = self.slots.send(Kind::Rndis, Request::Data(sent), send);
        let mut failed = None;
        match result {
            Ok(()) => {
                if self.is_nearly_full() || !channel.has_send_room(STOP_BELOW) {
                    netdev.stop_queue(self.index());
                    events.stop_queue.count();
                }
            }
            Err((error, request)) => {
                let skb = match request {
                    Some(Request::Data(Sent { skb, section, .. })) => {
                        self.end_send();
                        if let Some(section) = section {
                            buffers.sections.give(section);
                        }
                        // They were copied, and are gone with the section.
                        link.nic.stats.tx_dropped.add(earlier.into());
                        Some(skb)
                    }
                    _ => None,
                };
                let retry = error == EAGAIN || error == EBUSY;
                if retry {
                    netdev.stop_queue(self.index());
                    events.stop_queue.count();
                }
                failed = Some((retry, skb));
            }
        }

        // Whoever completes the last request either sees that the queue is stopped, or is seen here.
        if netdev.is_queue_stopped(self.index()) {
            barrier::smp_mb(barrier::Full);
            if self.outstanding() == 0 && link.is_tx_enabled() {
                netdev.wake_queue(self.index());
                events.wake_queue.count();
                if let Some((retry @ true, _)) = &mut failed {
                    events.tx_no_space.count();
                    *retry = false;
                }
            }
        }
        match failed {
            None => Ok(()),
            Some((true, Some(skb))) => Err(Failure::Busy(skb)),
            Some(_) => Err(Failure::Drop),
        }
    }

    /// Sends what has been copied and not sent. Softirqs are disabled.
    pub(crate) fn flush(&self, link: &Link) {
        let mut sender = self.sender.lock();
        let (Some(sender), Some(channel), Some(buffers)) =
            (&mut *sender, self.channel(), link.buffers())
        else {
            return;
        };
        if let (Some(batch), Some(sent)) = (sender.batcher.flush(), sender.pending.take()) {
            self.send_batch(link, channel, buffers, &batch, sent);
        }
    }

    /// The host has taken packets. Runs in the poll of the queue's channel.
    pub(crate) fn sent(&self, link: &Link, cx: &net::PollContext<'_>, sent: Sent, ok: bool) {
        let nic = &link.nic;
        if let (Some(section), Some(buffers)) = (sent.section, link.buffers()) {
            buffers.sections.give(section);
        }
        if !ok {
            nic.stats.tx_dropped.add(sent.packets.into());
        } else if let Some(stats) = nic.stats.queue(self.index()) {
            stats.tx_packets.add(sent.packets.into());
            stats.tx_bytes.add(sent.bytes);
        }
        sent.skb.consume_in_poll(cx);
        self.end_send();
        barrier::smp_mb(barrier::Full);

        let netdev = nic.netdev();
        if netdev.is_queue_stopped(self.index()) && link.is_tx_enabled() {
            let room = self
                .channel()
                .is_some_and(|channel| channel.has_send_room(WAKE_ABOVE));
            if (room && !self.is_nearly_full()) || self.outstanding() == 0 {
                netdev.wake_queue(self.index());
                nic.stats.events.wake_queue.count();
            }
        }
    }
}
