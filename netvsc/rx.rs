// SPDX-License-Identifier: GPL-2.0

//! What comes in through the receive buffer: frames, and the other messages of RNDIS.
//!
//! The host may change the buffer at any time. What of it is believed, `hv_proto::net::receive` copies
//! and checks; the frame itself is copied once, into a packet of the stack.

use crate::{
    control::MAX_ANSWER,
    link::{
        Buffers,
        Link, //
    },
    net::{
        Features,
        PollContext, //
    }, //
};
use core::mem::MaybeUninit;
use hv_proto::{
    net::{
        coalesced::Segments,
        ppi::ReceivedChecksum,
        receive::{
            self,
            Completion,
            Frame,
            Owed,
            Received,
            Receiver, //
        },
        sections::Sections,
        Span,
        ETHERNET_HEADER_SIZE,
        MAX_TRANSFER_RANGES, //
    },
    packet::Packet, //
};
use kernel::prelude::*;
use vmbus::{
    Channel,
    SharedBuffer,
    Show, //
};

/// The receive buffer, as the checks see it.
struct Buffer<'a>(&'a SharedBuffer);

impl receive::SharedBuffer for Buffer<'_> {
    fn read(&self, offset: u32, to: &mut [u8]) -> bool {
        self.0.read_at(offset as usize, to).is_ok()
    }
}

/// What a poll keeps.
pub(crate) struct Receive {
    index: u16,
    receiver: Receiver<KVec<Span>>,
    /// Packets whose completion the host does not have yet.
    pub(crate) owed: Owed<KVVec<Completion>>,
    /// For messages that are not frames.
    scratch: KVec<u8>,
}

impl Receive {
    pub(crate) fn new(index: u16) -> Result<Self> {
        let mut scratch = KVec::new();
        scratch.resize(MAX_ANSWER, 0, GFP_KERNEL)?;
        let mut parts = KVec::new();
        parts.resize(MAX_TRANSFER_RANGES, Span::default(), GFP_KERNEL)?;
        Ok(Self {
            index,
            receiver: Receiver::new(parts),
            owed: Owed::new(KVVec::new()),
            scratch,
        })
    }

    /// Room for the completions that can be owed when the buffer has these sections.
    pub(crate) fn owed(sections: &Sections) -> Result<Owed<KVVec<Completion>>> {
        let mut room = KVVec::new();
        room.resize(sections.count() as usize, Completion::default(), GFP_KERNEL)?;
        Ok(Owed::new(room))
    }

    /// Tells the host which of its packets have been dealt with. Returns false if not all could be told.
    pub(crate) fn tell_host(&mut self, link: &Link, channel: &Channel) -> bool {
        while let Some(completion) = self.owed.front() {
            match channel.send_completion(completion.transaction_id, &completion.message()) {
                Err(error) if error == EAGAIN => {
                    link.nic.stats.events.rx_comp_busy.count();
                    return false;
                }
                // After another error there is nobody to be told.
                _ => self.owed.pop(),
            }
        }
        true
    }

    /// A packet with ranges of the receive buffer has come. Returns how many messages it had.
    pub(crate) fn packet(
        &mut self,
        link: &Link,
        cx: &PollContext<'_>,
        channel: &Channel,
        packet: &Packet<'_>,
    ) -> usize {
        let mut count = 1;
        let success = self.messages(link, cx, packet, &mut count);
        if self.owed.len() >= Owed::<KVVec<Completion>>::BATCH {
            self.tell_host(link, channel);
        }
        let completion = Completion {
            transaction_id: packet.transaction_id(),
            success,
        };
        if !self.owed.push(completion) {
            link.nic
                .invalid(fmt!("more packets than the receive buffer has sections\n"));
        }
        count
    }

    /// Handles the messages of a packet. Returns whether all were well.
    fn messages(
        &mut self,
        link: &Link,
        cx: &PollContext<'_>,
        packet: &Packet<'_>,
        count: &mut usize,
    ) -> bool {
        let (Some(version), Some(buffers)) = (link.version(), link.buffers()) else {
            link.nic
                .invalid(fmt!("packet before there is a receive buffer\n"));
            return false;
        };
        let ranges = match receive::open(packet, version) {
            Ok(ranges) => ranges,
            Err(error) => {
                link.nic.invalid(fmt!("{}\n", Show(error)));
                return false;
            }
        };
        *count = ranges.len();
        let buffer = Buffer(buffers.receive_buffer());
        let mut well = true;
        for (n, range) in (1..).zip(ranges) {
            let is_last = n == ranges.len();
            let sections = &buffers.receive_sections;
            well &= match self.receiver.receive(range, is_last, sections, &buffer) {
                Ok(Received::Frame(frame)) => {
                    Self::deliver(self.index, link, cx, buffers, &frame).is_ok()
                }
                Ok(Received::Part) => true,
                Ok(Received::Control(place)) => {
                    Self::control(&mut self.scratch, link, buffers, place)
                }
                Err(error) => {
                    link.nic.invalid(fmt!("{}\n", Show(error)));
                    false
                }
            };
        }
        well
    }

    /// Hands a frame to the stack.
    fn deliver(
        index: u16,
        link: &Link,
        cx: &PollContext<'_>,
        buffers: &Buffers,
        frame: &Frame<'_>,
    ) -> Result {
        let nic = &link.nic;
        let netdev = nic.netdev();
        let result = (|| {
            if !netdev.is_registered() {
                return Err(ENODEV);
            }
            let mut skb = cx.alloc(frame.len).inspect_err(|_| {
                nic.stats.events.rx_no_memory.count();
            })?;
            for part in frame.parts {
                skb.append(part.len, |to: &mut [MaybeUninit<u8>]| {
                    buffers
                        .receive_buffer()
                        .read_uninit(part.offset as usize, to)
                })?;
            }
            let mtu = netdev.mtu();
            if frame.len > mtu.saturating_add(ETHERNET_HEADER_SIZE) {
                if let Some(segments) = Segments::of(skb.bytes(), frame.len, mtu) {
                    skb.set_segments(segments.ipv6, segments.size, segments.count);
                }
            }
            skb.set_device(netdev)?;

            let features = netdev.features();
            if let Some(item) = frame.facts.checksum {
                let found = ReceivedChecksum::decode(item);
                // The host need not compute this for a frame that it has put together, and the stack
                // always looks at it.
                if found.ip_value_invalid && found.ip_header == Some(true) {
                    skb.fix_ipv4_checksum()?;
                }
                if features.contains(Features::RXCSUM) && found.transport_is_right() {
                    skb.set_checksum_ok();
                }
            }
            if let Some(hash) = frame.facts.hash {
                if features.contains(Features::RXHASH) {
                    skb.set_hash(hash);
                }
            }
            if let Some(vlan) = frame.facts.vlan {
                skb.set_vlan(vlan.tci());
            }
            // A sub-channel that came late has no queue.
            if u32::from(index) < netdev.rx_queues() {
                skb.set_queue(index);
            }
            Ok(skb)
        })();
        let skb = result.inspect_err(|_| nic.stats.rx_dropped.count())?;

        if let Some(stats) = nic.stats.queue(index) {
            stats.rx_packets.add(1);
            stats.rx_bytes.add(frame.len.into());
            if skb.is_multicast() {
                stats.rx_multicast.add(1);
            }
        }
        cx.receive(skb);
        Ok(())
    }

    /// Handles a message that is not a frame. Returns whether it is well.
    fn control(scratch: &mut [u8], link: &Link, buffers: &Buffers, place: Span) -> bool {
        // More than that belongs to no message that is of use.
        let len = scratch.len().min(place.len as usize);
        let copied = scratch.get_mut(..len).and_then(|to| {
            let offset = place.offset as usize;
            let read = buffers.receive_buffer().read_at(offset, to);
            read.ok().map(|()| &*to)
        });
        let Some(bytes) = copied else {
            link.nic.invalid(fmt!("RNDIS message of {} bytes\n", len));
            return false;
        };
        match link.control.receive(bytes) {
            Ok(None) => true,
            Ok(Some(event)) => {
                link.event(event);
                true
            }
            Err(error) => {
                link.nic.invalid(fmt!("{}\n", Show(error)));
                false
            }
        }
    }
}
