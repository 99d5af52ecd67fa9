// SPDX-License-Identifier: GPL-2.0

//! Packets on their way out.
//!
//! A small packet is copied to a section of the send buffer, and several of them to one section while
//! the stack says that more are coming. A larger one stays where it is, and the host is told its pages;
//! if there is room for its head only in a section that has been begun, the head goes there.

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
use hv_proto::{
    net::{
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
        ppi::{
            Info,
            InfoWriter,
            LargeSend,
            SendChecksum,
            Transport,
            Vlan, //
        },
        sections::Sections,
        transmit::{
            Batch,
            Batcher,
            Place, //
        }, //
    },
    packet::pages_spanned, //
};
use kernel::{
    prelude::*,
    sync::{
        barrier,
        Arc, //
    }, //
};
use vmbus::{
    Channel,
    GpaRange, //
};

/// Most pages of a packet that the host takes, its head included.
const MAX_PAGES: usize = 32;
/// Pages that a head can touch.
const HEAD_PAGES: u64 = 2;
/// Most ranges of a packet: its head, and its pieces.
const MAX_RANGES: usize = 19;

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
    /// An RNDIS message of the driver itself.
    Control,
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

/// The pages of a packet, as the host is told them.
struct Ranges {
    pfns: [u64; MAX_PAGES],
    pages: usize,
    /// Offset, length, number of pages.
    ranges: [(u32, u32, usize); MAX_RANGES],
    count: usize,
}

impl Ranges {
    const fn new() -> Self {
        Self {
            pfns: [0; MAX_PAGES],
            pages: 0,
            ranges: [(0, 0, 0); MAX_RANGES],
            count: 0,
        }
    }

    fn add(&mut self, piece: &Piece<'_>) -> Result {
        const PAGE: u64 = hv_proto::PAGE_SIZE as u64;
        let phys = piece.phys();
        // CAST: less than a page.
        let offset = (phys % PAGE) as u32;
        let pages = usize::try_from(pages_spanned(offset, piece.len()))?;
        let end = self.pages.checked_add(pages).ok_or(EMSGSIZE)?;
        let places = self.pfns.get_mut(self.pages..end).ok_or(EMSGSIZE)?;
        for (place, pfn) in places.iter_mut().zip(phys / PAGE..) {
            *place = pfn;
        }
        *self.ranges.get_mut(self.count).ok_or(EMSGSIZE)? = (offset, piece.len(), pages);
        self.pages = end;
        self.count = self.count.saturating_add(1);
        Ok(())
    }

    /// Adds the pieces of a packet.
    fn add_all(&mut self, skb: &TxSkb) -> Result {
        let (pieces, count) = skb.pieces();
        pieces
            .iter()
            .take(count)
            .try_for_each(|piece| self.add(piece))
    }

    /// Sends a packet with these ranges.
    fn send(&self, channel: &Channel, message: &RndisPacket, id: u64) -> Result {
        const EMPTY: GpaRange<'static> = GpaRange {
            byte_count: 0,
            byte_offset: 0,
            pfns: &[],
        };
        let mut ranges = [EMPTY; MAX_RANGES];
        let mut pfns = self.pfns.as_slice();
        for (to, &(byte_offset, byte_count, pages)) in ranges.iter_mut().zip(&self.ranges) {
            let (own, rest) = pfns.split_at_checked(pages).ok_or(EINVAL)?;
            pfns = rest;
            *to = GpaRange {
                byte_count,
                byte_offset,
                pfns: own,
            };
        }
        let ranges = ranges.get(..self.count).ok_or(EINVAL)?;
        channel.send_gpa_ranges(ranges, &message.encode(), id)
    }
}

/// Number of pages that the pieces of a packet touch.
fn pages(skb: &TxSkb) -> u64 {
    let (pieces, count) = skb.pieces();
    pieces
        .iter()
        .take(count)
        .map(|piece| {
            pages_spanned(
                (piece.phys() % hv_proto::PAGE_SIZE as u64) as u32,
                piece.len(),
            )
        })
        .fold(0, u64::saturating_add)
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
                Self::copy(buffers, section, offset, &head, &skb, padding)
                    .map_err(|_| Failure::Drop)?;
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
                ranges
                    .add_all(&skb)
                    .and_then(|()| {
                        let at = place(buffers, section, offset)?;
                        buffers.send_buffer().write_at(at, head.as_bytes())
                    })
                    .map_err(|_| Failure::Drop)?;
                let sent = Sent::add(begun, skb, section);
                let message = batch.message();
                self.post(link, channel, buffers, sent, |id| {
                    ranges.send(channel, &message, id)
                })
            }
            Place::Direct => self.send_pages(link, channel, buffers, &head, skb),
        }
    }

    /// Brings a packet into shape, and says what goes before it.
    fn prepare(link: &Link, skb: &mut TxSkb) -> Result<Head, Failure> {
        let events = &link.nic.stats.events;
        let no_memory = |_| {
            events.tx_no_memory.count();
            Failure::Drop
        };
        if skb.hoist_vlan().is_err() {
            events.vlan_error.count();
            return Err(Failure::Drop);
        }
        let most = MAX_PAGES as u64 - HEAD_PAGES;
        if pages(skb) > most {
            events.tx_scattered.count();
            skb.linearize().map_err(no_memory)?;
            if pages(skb) > most {
                events.tx_too_big.count();
                return Err(Failure::Drop);
            }
        }
        skb.make_headroom(HEADROOM).map_err(no_memory)?;

        let mut info = InfoWriter::new();
        let mut put = |item| info.put(item).map_err(|_| Failure::Drop);
        if link.nic.netdev().tx_queues() > 1 {
            if let Some(hash) = skb.known_hash() {
                put(Info::Hash(hash))?;
            }
        }
        if let Some(tci) = skb.vlan() {
            put(Info::Vlan(Vlan::from_tci(tci)))?;
        }
        if skb.is_gso() {
            let ipv6 = skb.prepare_tso();
            let item = LargeSend {
                ipv6,
                mss: skb.gso_size().into(),
                tcp_offset: u16::try_from(skb.transport_offset()).unwrap_or(u16::MAX),
            };
            let item = item.encode().ok_or_else(|| {
                events.tx_too_big.count();
                Failure::Drop
            })?;
            put(Info::LargeSend(item))?;
        } else if skb.wants_checksum() {
            match Self::checksum(link, skb) {
                Some(item) => put(Info::Checksum(item))?,
                None => skb.compute_checksum().map_err(|_| Failure::Drop)?,
            }
        }
        Head::new(skb.len(), &info).ok_or(Failure::Drop)
    }

    /// What the host is to compute; `None` if it cannot.
    fn checksum(link: &Link, skb: &TxSkb) -> Option<hv_proto::net::ppi::Checksum> {
        let kind = skb.transport();
        if !link.nic.computes_checksum(kind) {
            return None;
        }
        let (ipv6, transport) = match kind {
            net::Transport::Tcp4 => (false, Transport::Tcp),
            net::Transport::Udp4 => (false, Transport::Udp),
            net::Transport::Tcp6 => (true, Transport::Tcp),
            net::Transport::Udp6 => (true, Transport::Udp),
            net::Transport::Other => return None,
        };
        SendChecksum {
            ipv6,
            transport: Some(transport),
            ip_header: false,
            transport_offset: u16::try_from(skb.transport_offset()).ok()?,
        }
        .encode()
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
                self.end_send();
                let skb = match request {
                    Some(Request::Data(Sent { skb, section, .. })) => {
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
