// SPDX-License-Identifier: MIT OR Apache-2.0

//! Frames from the network to the guest.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hv_proto::net::MacAddress;
use hv_proto::net::frame::{Head, MAX_HEAD_SIZE};
use hv_proto::net::nvsp::{Capabilities, ChannelType};
use hv_proto::net::ppi::{Info, InfoWriter, PacketId, ReceivedChecksum, Vlan};
use hv_proto::packet::TransferPageRange;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::nic::{Channel, Inner, add, range};
use super::sections::{ReceiveBuffer, Section};
use crate::net::{Checksum, Frame, Headers, Received, Transport, Way, for_each_wire_frame};
use crate::vmbus::ChannelError;

/// How long a frame waits for the guest to free a section. Then it is lost, as when a NIC's ring is
/// full. Meanwhile the network's own queue fills, which is where senders are slowed down.
const SECTION_LIMIT: Duration = Duration::from_millis(100);

/// Most frames that one packet announces.
const BATCH: usize = 32;

/// Frames that are in sections and not announced yet, all for one channel.
#[derive(Default)]
struct Batch {
    channel: Option<Arc<Channel>>,
    ranges: Vec<TransferPageRange>,
    sections: Vec<Section>,
}

impl Batch {
    /// Fills a section. False if there is none, or the message does not fit.
    fn add(
        &mut self,
        target: &Target,
        section: Option<Section>,
        info: &InfoWriter,
        bytes: &[u8],
    ) -> bool {
        let head = u32::try_from(bytes.len())
            .ok()
            .and_then(|len| Head::new(len, info));
        let (Some(section), Some(head)) = (section, head) else {
            return false;
        };
        let Some(span) = section.write(&[head.as_bytes(), bytes]) else {
            return false;
        };
        self.channel = Some(Arc::clone(&target.channel));
        self.ranges.push(range(span.offset, span.len));
        self.sections.push(section);
        true
    }
}

/// What a frame needs of the guest's set-up.
struct Target {
    channel: Arc<Channel>,
    buffer: Arc<ReceiveBuffer>,
    hash: Option<u32>,
    frame_size: usize,
    strip_vlan: bool,
    checksums: bool,
    coalesce: bool,
}

impl Inner {
    /// Brings frames of a queue of the network to the guest, until the NIC ends.
    pub(super) fn receive_frames(&self, queue: u16) {
        if let Err(error) = self.try_receive_frames(queue) {
            tracing::error!(nic = self.name(), queue, %error, "no more frames from the network");
            self.network_gone();
        }
    }

    fn try_receive_frames(&self, queue: u16) -> std::io::Result<()> {
        let backend = &self.config.backend;
        let epoll = Epoll::new()?;
        for fd in [backend.readiness(queue).as_raw_fd(), self.wake.as_raw_fd()] {
            let interest = EpollEvent::new(EventSet::IN, fd as u64);
            epoll.ctl(ControlOperation::Add, fd, interest)?;
        }
        let mut frame = Frame::default();
        let mut batch = Batch::default();
        while !self.ended.load(Ordering::Acquire) {
            match backend.receive(queue, &mut frame)? {
                Received::Frame => self.deliver(&mut frame, &mut batch),
                Received::Nothing => {
                    self.announce(&mut batch);
                    let mut events = [EpollEvent::default(); 2];
                    match epoll.wait(-1, &mut events) {
                        Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                            return Err(error);
                        }
                        _ => {}
                    }
                }
                Received::Closed => {
                    self.announce(&mut batch);
                    tracing::warn!(nic = self.name(), "the network is gone");
                    self.network_gone();
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The guest sees a cable that was taken out.
    fn network_gone(&self) {
        if !self.ended.load(Ordering::Acquire) {
            self.set_link(false);
        }
    }

    /// Where a frame goes; `None` if the guest does not want it.
    fn target(&self, frame: &[u8]) -> Option<Target> {
        let destination: [u8; 6] = *frame.first_chunk()?;
        let state = self.read();
        if !state.link || !state.adapter.accepts(MacAddress(destination)) {
            return None;
        }
        let channels = u32::try_from(state.channels.len()).unwrap_or(1);
        let (index, hash) = state.adapter.channel(frame, channels);
        let index = u16::try_from(index).unwrap_or(0);
        let channel = state.channels.get(&index).or(state.channels.get(&0))?;
        let capabilities = state.provider.capabilities();
        let offloads = state.adapter.offloads();
        Some(Target {
            channel: Arc::clone(channel),
            buffer: state.receive.clone()?,
            hash,
            frame_size: state.provider.frame_size() as usize,
            strip_vlan: capabilities.contains(Capabilities::IEEE8021Q),
            checksums: offloads.receive,
            coalesce: offloads.rsc && capabilities.contains(Capabilities::RSC),
        })
    }

    /// Gives a frame of the network to the guest, if it wants it.
    fn deliver(&self, frame: &mut Frame, batch: &mut Batch) {
        let Some(target) = self.target(&frame.bytes) else {
            add(&self.counters.filtered, 1);
            return;
        };
        for capture in &self.config.captures {
            capture.frame(Way::In, &frame.bytes);
        }
        if frame.gso.is_none() {
            frame.complete();
            self.deliver_whole(&target, &mut frame.bytes, frame.checksum, batch);
        } else if target.coalesce {
            self.deliver_parts(&target, frame, batch);
        } else {
            let mut segment = Vec::new();
            for_each_wire_frame(frame, |bytes| {
                segment.clear();
                segment.extend_from_slice(bytes);
                self.deliver_whole(&target, &mut segment, Checksum::Valid, batch);
                true
            });
        }
    }

    /// A frame in one section.
    fn deliver_whole(
        &self,
        target: &Target,
        bytes: &mut Vec<u8>,
        checksum: Checksum,
        batch: &mut Batch,
    ) {
        let mut info = InfoWriter::new();
        self.facts(target, bytes, checksum, &mut info);
        if bytes.len() > target.frame_size {
            add(&self.counters.too_long, 1);
            return;
        }
        let put = self.put(target, &info, bytes, batch);
        self.count(target, put, bytes.len());
    }

    /// A frame that was not cut yet, over several sections: the guest gets it as one.
    fn deliver_parts(&self, target: &Target, frame: &mut Frame, batch: &mut Batch) {
        let mut info = InfoWriter::new();
        self.facts(target, &mut frame.bytes, Checksum::Valid, &mut info);
        // The frame number only has to differ from those of its neighbours.
        let id = self.counters.received.load(Ordering::Relaxed) as u16;
        let room = (target.buffer.section_size() as usize).saturating_sub(MAX_HEAD_SIZE);
        let parts = frame.bytes.chunks(room.max(1));
        let last = parts.len().saturating_sub(1);
        // All parts are announced by one packet, so that they cannot mix with others.
        self.announce(batch);
        let mut put = true;
        for (number, part) in parts.enumerate() {
            let mut info = if number == 0 { info } else { InfoWriter::new() };
            let id = PacketId::part(id, number == 0, number == last);
            let section = target.buffer.take_for_frame(SECTION_LIMIT);
            put = info.put(Info::PacketId(id)).is_ok() && batch.add(target, section, &info, part);
            if !put {
                break;
            }
        }
        if !put {
            *batch = Batch::default();
        }
        self.announce(batch);
        if put {
            add(&self.counters.received_coalesced, 1);
        }
        self.count(target, put, frame.bytes.len());
    }

    fn count(&self, target: &Target, put: bool, bytes: usize) {
        if put {
            add(&self.counters.received, 1);
            add(&self.counters.received_bytes, bytes as u64);
            add(&target.channel.received, 1);
        } else {
            add(&self.counters.no_buffer, 1);
        }
    }

    /// Takes out of a frame what goes beside it.
    fn facts(
        &self,
        target: &Target,
        bytes: &mut Vec<u8>,
        checksum: Checksum,
        info: &mut InfoWriter,
    ) {
        let mut items = [None; 3];
        if target.strip_vlan
            && let Some(&[0x81, 0x00, a, b]) = bytes.get(12..16)
        {
            bytes.drain(12..16);
            items[0] = Some(Info::Vlan(Vlan::from_tci(u16::from_be_bytes([a, b]))));
        }
        if target.checksums && checksum == Checksum::Valid {
            let transport = Headers::find(bytes).map(|headers| (headers.v6, headers.transport));
            if let Some((v6, Some((_, transport)))) = transport {
                let received = ReceivedChecksum {
                    tcp: (transport == Transport::Tcp).then_some(true),
                    udp: (transport == Transport::Udp).then_some(true),
                    ip_header: (!v6).then_some(true),
                    ..ReceivedChecksum::default()
                };
                items[1] = Some(Info::Checksum(received.encode()));
            }
        }
        items[2] = target.hash.map(Info::Hash);
        for item in items.into_iter().flatten() {
            // There is room for one of each kind.
            let _ = info.put(item);
        }
    }

    /// Puts a frame into a section, behind others for the same channel if there are some.
    fn put(&self, target: &Target, info: &InfoWriter, bytes: &[u8], batch: &mut Batch) -> bool {
        let same = |channel: &Arc<Channel>| Arc::ptr_eq(channel, &target.channel);
        if batch.ranges.len() >= BATCH || !batch.channel.as_ref().is_none_or(same) {
            self.announce(batch);
        }
        let section = target.buffer.take_for_frame(Duration::ZERO).or_else(|| {
            // What is not announced cannot come back.
            self.announce(batch);
            target.buffer.take_for_frame(SECTION_LIMIT)
        });
        batch.add(target, section, info, bytes)
    }

    /// Announces what is in sections.
    fn announce(&self, batch: &mut Batch) {
        let Batch {
            channel,
            ranges,
            sections,
        } = std::mem::take(batch);
        let Some(channel) = channel else {
            return;
        };
        match Self::send_ranges(&channel, ChannelType::DATA, &ranges, sections) {
            Ok(()) | Err(ChannelError::Stopped) => {}
            Err(error) => {
                add(&self.counters.no_buffer, ranges.len() as u64);
                tracing::debug!(nic = self.name(), %error, "frames are lost");
            }
        }
    }
}
