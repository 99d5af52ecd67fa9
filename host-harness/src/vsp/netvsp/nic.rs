// SPDX-License-Identifier: MIT OR Apache-2.0

//! One NIC: a device on the bus, its channels and their threads, and the network behind it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use hv_proto::guid::{self, Guid};
use hv_proto::net::adapter::{Adapter, AdapterConfig, Statistics};
use hv_proto::net::features::Offloads;
use hv_proto::net::nvsp::{Body, Capabilities, ChannelType, RndisPacket, Version};
use hv_proto::net::provider::{Provider, ProviderConfig};
use hv_proto::net::{ETHERNET_HEADER_SIZE, MacAddress, RECEIVE_BUFFER_ID};
use hv_proto::packet::TransferPageRange;
use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

use super::sections::{Outstanding, ReceiveBuffer, Section};
use crate::counters::Counter;
use crate::net::{Backend, CaptureInterface, ReceiveOffloads};
use crate::vmbus::{
    ChannelError, ChannelWriter, GpadlView, HostChannel, OfferParams, OpenError, OpenParams, Vsp,
};

/// Speed that the guest is told, in bits in a second.
const LINK_SPEED: u64 = 10_000_000_000;

/// Entries of the table from hash to channel.
const TABLE_SIZE: u16 = 128;

/// RNDIS messages in a row that one packet of the guest may have, and how they are aligned.
const MAX_PACKETS: u32 = 8;
const ALIGNMENT_FACTOR: u32 = 3;

/// How long a control message waits for a section.
const CONTROL_LIMIT: Duration = Duration::from_secs(2);

/// "Viridian" in UTF-16: what the guest sees as the name of the adapter.
const NAME: &[u8] = b"V\0i\0r\0i\0d\0i\0a\0n\0";

/// How a NIC is made.
pub(super) struct NicConfig {
    /// Name in logs and status.
    pub name: String,
    /// Its number, from which its identity is made.
    pub number: u8,
    pub mac: [u8; 6],
    /// The largest MTU of the guest.
    pub mtu: u16,
    /// Most channels.
    pub queues: u16,
    pub max_version: Version,
    pub link: bool,
    pub backend: Arc<dyn Backend>,
    pub captures: Vec<CaptureInterface>,
}

/// What a NIC has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct NicCounters {
    /// Frames from the guest that went out.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames from the guest that could not be sent: the link is down, the network did not take
    /// them, or they make no sense.
    pub send_errors: u64,
    /// Frames that the guest left to be cut into segments.
    pub sent_large: u64,
    /// Frames from the guest with checksums to be computed.
    pub sent_partial: u64,
    /// Frames that the guest was given.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that were given to the guest in parts.
    pub received_coalesced: u64,
    /// Frames that were longer than the guest takes.
    pub too_long: u64,
    /// Frames that were lost because the guest did not free sections or empty its ring.
    pub no_buffer: u64,
    /// Frames that the filter kept off.
    pub filtered: u64,
    /// Messages of the guest that made no sense.
    pub invalid: u64,
    /// Packets that the guest has completed as failed: it did not like what was in them.
    pub refused: u64,
}

macro_rules! live_counters {
    ($($name:ident),*) => {
        #[derive(Default)]
        pub(super) struct Counters {
            $(pub $name: AtomicU64,)*
        }
        impl Counters {
            fn snapshot(&self) -> NicCounters {
                NicCounters {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                }
            }
        }
    };
}

live_counters!(
    sent,
    sent_bytes,
    send_errors,
    sent_large,
    sent_partial,
    received,
    received_bytes,
    received_coalesced,
    too_long,
    no_buffer,
    filtered,
    invalid,
    refused
);

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// A NIC, for display.
#[derive(Debug, Clone, Serialize)]
pub struct NicStatus {
    /// Its name.
    pub name: String,
    /// The instance GUID of its offer, as the guest's sysfs names the device.
    pub instance: String,
    /// Its address now.
    pub mac: String,
    /// What it is connected to.
    pub network: String,
    /// Whether the link is up.
    pub link: bool,
    /// Version of NVSP that the guest uses.
    pub version: Option<String>,
    /// Channels that are open.
    pub channels: usize,
    /// Frames that came from the guest, and went to it, on each channel.
    pub queues: Vec<QueueStatus>,
    /// Sections of the guest's receive buffer.
    pub sections: usize,
    /// Those that are free.
    pub free_sections: usize,
    /// Packets that the guest has not completed.
    pub outstanding: usize,
    /// What it has done.
    #[serde(flatten)]
    pub counters: NicCounters,
}

/// A channel, for display.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct QueueStatus {
    /// 0 for the primary channel.
    pub index: u16,
    /// Frames from the guest.
    pub sent: u64,
    /// Frames to the guest.
    pub received: u64,
}

/// What a hostile host does: a testing aid.
#[derive(Debug, Clone)]
pub enum Injection {
    /// An in-band packet with this payload, on the primary channel.
    InBand(Vec<u8>),
    /// A completion of this request, which the guest may have made or not.
    Completion(u64, Vec<u8>),
    /// A packet for the buffer with this number, with these ranges (offset and length), whatever
    /// is there.
    Ranges(u16, Vec<(u32, u32)>),
    /// These bytes as an RNDIS message, in a section of the receive buffer.
    Rndis(Vec<u8>),
}

/// What a hostile host sends in place of an RNDIS message that is no frame, or of a completion: a testing aid.
pub type Tamper = dyn Fn(&Injection) -> Vec<Injection> + Send + Sync;

/// An open channel.
pub(super) struct Channel {
    pub index: u16,
    pub writer: ChannelWriter,
    pub outstanding: Outstanding,
    pub sent: AtomicU64,
    pub received: AtomicU64,
}

/// What the guest has set up. It is read for each frame and changed by control messages only.
pub(super) struct State {
    pub provider: Provider,
    pub adapter: Adapter<'static>,
    pub receive: Option<Arc<ReceiveBuffer>>,
    /// Sections of packets on sub-channels that were closed. If that was a rescind, the guest does not know yet and
    /// may be reading them: they come back with the buffer.
    pub orphans: Vec<Section>,
    pub send: Option<Arc<GpadlView>>,
    /// Open channels by index.
    pub channels: BTreeMap<u16, Arc<Channel>>,
    pub link: bool,
}

impl State {
    /// Takes the receive buffer back from the threads that use it.
    pub fn drop_receive_buffer(&mut self) -> Option<Arc<ReceiveBuffer>> {
        self.orphans.clear();
        let buffer = self.receive.take()?;
        buffer.close();
        Some(buffer)
    }
}

/// What all threads of a NIC share.
pub(super) struct Inner {
    pub config: NicConfig,
    pub state: RwLock<State>,
    pub counters: Counters,
    /// Sees what is sent before the guest does.
    tamper: RwLock<Option<Arc<Tamper>>>,
    /// Wakes the threads that read the network, for their end.
    pub wake: EventFd,
    pub ended: AtomicBool,
    /// Nothing that the guest sends is looked at: a testing aid.
    pub silent: AtomicBool,
    /// For the log.
    complaints: Counter,
}

impl Inner {
    fn new_machines(config: &NicConfig, link_up: bool) -> (Provider, Adapter<'static>) {
        let queues = u32::from(config.queues);
        let provider = Provider::new(ProviderConfig {
            max_version: config.max_version,
            max_sub_channels: queues.saturating_sub(1),
            // Whatever the guest says: the network takes no more.
            max_frame_size: u32::from(config.mtu) + ETHERNET_HEADER_SIZE,
        });
        let adapter = Adapter::new(AdapterConfig {
            mac: MacAddress(config.mac),
            mtu: config.mtu.into(),
            link_speed: LINK_SPEED,
            link_up,
            name: NAME,
            offloads: Offloads::ALL,
            queue_count: queues,
            table_size: TABLE_SIZE,
            max_packets: MAX_PACKETS,
            alignment_factor: ALIGNMENT_FACTOR,
        });
        (provider, adapter)
    }

    // The data behind the lock are consistent at every point where a panic could happen.
    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// What the guest can ask for, from the live counters.
    pub fn statistics(&self) -> Statistics {
        let counters = self.counters.snapshot();
        Statistics {
            sent: counters.sent,
            send_errors: counters.send_errors,
            received: counters.received,
            receive_errors: counters.too_long,
            no_buffer: counters.no_buffer,
        }
    }

    /// Tells of what a guest can bring about as often as it likes.
    pub fn complain(&self, channel: &Channel, error: &ChannelError, what: &str) {
        if let Some(times) = self.complaints.complain() {
            tracing::warn!(nic = self.name(), channel = channel.index, times, %error, "{what}");
        }
    }

    /// Tells the network which frames may come uncut.
    pub fn update_offloads(&self, state: &State) {
        let rsc = state.adapter.offloads().rsc
            && state.provider.capabilities().contains(Capabilities::RSC);
        let offloads = ReceiveOffloads {
            tso4: rsc,
            tso6: rsc,
        };
        if let Err(error) = self.config.backend.set_receive_offloads(offloads) {
            tracing::warn!(nic = self.name(), %error, "offloads of the network");
        }
    }

    /// Sends a packet with ranges of the receive buffer; keeps their sections until the guest has
    /// completed it.
    pub fn send_ranges(
        channel: &Channel,
        kind: ChannelType,
        ranges: &[TransferPageRange],
        sections: Vec<Section>,
    ) -> Result<(), ChannelError> {
        let Some(id) = channel.outstanding.add(sections) else {
            return Err(ChannelError::Stopped);
        };
        let payload = RndisPacket::outside(kind).encode();
        let sent =
            channel
                .writer
                .send_transfer_pages(id, RECEIVE_BUFFER_ID, ranges, &payload, true);
        if sent.is_err() {
            channel.outstanding.complete(id);
        }
        sent
    }

    /// Sends an RNDIS control message on the primary channel.
    pub fn send_control(&self, message: &[u8]) {
        if message.is_empty() {
            return;
        }
        let Some(channel) = self.read().channels.get(&0).cloned() else {
            return;
        };
        let sent = self.send(
            &channel,
            || Injection::Rndis(message.to_vec()),
            || self.send_message(&channel, message),
        );
        match sent {
            Ok(()) | Err(ChannelError::Stopped) => {}
            Err(error) => self.complain(&channel, &error, "a control message is lost"),
        }
    }

    /// Sends an RNDIS message that is no frame.
    fn send_message(&self, channel: &Channel, message: &[u8]) -> Result<(), ChannelError> {
        let Some(buffer) = self.read().receive.clone() else {
            return Ok(());
        };
        let Some(section) = buffer.take_for_control(CONTROL_LIMIT) else {
            tracing::warn!(nic = self.name(), "no section for a control message");
            return Ok(());
        };
        let Some(span) = section.write(&[message]) else {
            tracing::warn!(
                nic = self.name(),
                "a control message does not fit a section"
            );
            return Ok(());
        };
        let ranges = [range(span.offset, span.len)];
        Self::send_ranges(channel, ChannelType::CONTROL, &ranges, vec![section])
    }

    /// Completes a packet of the guest.
    pub fn send_completion(
        &self,
        channel: &Channel,
        id: u64,
        payload: &[u8],
    ) -> Result<(), ChannelError> {
        self.send(
            channel,
            || Injection::Completion(id, payload.to_vec()),
            || channel.writer.complete(id, payload),
        )
    }

    /// Sends a packet by `send`, or what the host's hostile side makes of it.
    fn send(
        &self,
        channel: &Channel,
        packet: impl FnOnce() -> Injection,
        send: impl FnOnce() -> Result<(), ChannelError>,
    ) -> Result<(), ChannelError> {
        let tamper = self.tamper.read().unwrap_or_else(PoisonError::into_inner);
        let Some(tamper) = tamper.clone() else {
            return send();
        };
        let packets = tamper(&packet());
        packets
            .iter()
            .try_for_each(|packet| self.inject(channel, packet))
    }

    /// Does what a host must not do.
    fn inject(&self, channel: &Channel, injection: &Injection) -> Result<(), ChannelError> {
        match injection {
            Injection::InBand(payload) => channel.writer.send(0, payload, false),
            Injection::Completion(id, payload) => channel.writer.complete(*id, payload),
            Injection::Ranges(buffer, ranges) => {
                let ranges: Vec<_> = ranges.iter().map(|&(at, len)| range(at, len)).collect();
                let payload = RndisPacket::outside(ChannelType::DATA).encode();
                let writer = &channel.writer;
                writer.send_transfer_pages(0, *buffer, &ranges, &payload, true)
            }
            Injection::Rndis(message) => self.send_message(channel, message),
        }
    }

    pub fn set_link(&self, up: bool) {
        let mut message = [0; hv_proto::net::adapter::MAX_ANSWER_SIZE];
        let len = {
            let mut state = self.write();
            state.link = up;
            state.adapter.set_link(up, &mut message)
        };
        self.send_control(message.get(..len).unwrap_or_default());
    }
}

/// A range of a transfer-page packet.
pub(super) fn range(offset: u32, len: u32) -> TransferPageRange {
    TransferPageRange {
        byte_count: len.into(),
        byte_offset: offset.into(),
    }
}

/// A NIC, with the threads that read its network.
pub(super) struct Nic {
    inner: Arc<Inner>,
    receivers: Vec<JoinHandle<()>>,
}

impl Nic {
    /// A NIC that is not offered yet.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn new(config: NicConfig) -> std::io::Result<Self> {
        let link = config.link;
        let (provider, adapter) = Inner::new_machines(&config, link);
        let queues = config.backend.queues();
        let inner = Arc::new(Inner {
            config,
            state: RwLock::new(State {
                provider,
                adapter,
                receive: None,
                orphans: Vec::new(),
                send: None,
                channels: BTreeMap::new(),
                link,
            }),
            counters: Counters::default(),
            tamper: RwLock::new(None),
            wake: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)?,
            ended: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            complaints: Counter::default(),
        });
        let mut nic = Self {
            inner,
            receivers: Vec::new(),
        };
        for queue in 0..queues {
            let inner = Arc::clone(&nic.inner);
            let thread = std::thread::Builder::new()
                .name(format!("{}-rx{queue}", nic.inner.name()))
                .spawn(move || inner.receive_frames(queue))?;
            nic.receivers.push(thread);
        }
        Ok(nic)
    }

    /// How the bus server offers it, and what serves it there. The instance GUID is the same in
    /// every run, so that a guest gives the NIC the same name.
    pub fn device(&self) -> (OfferParams, Box<dyn Vsp>) {
        let vsp = NetVsp {
            inner: Arc::clone(&self.inner),
            readers: BTreeMap::new(),
        };
        let name = self.inner.name().to_owned();
        (
            OfferParams::new(name, guid::NETWORK, self.instance()),
            Box::new(vsp),
        )
    }

    fn instance(&self) -> Guid {
        let mut id = *hv_proto::guid!("4e7a5c10-93d2-4b6f-8f51-4e4554565350").as_bytes();
        id[15] = self.inner.config.number;
        Guid::from_bytes(id)
    }

    /// Puts the cable in or takes it out.
    pub fn set_link(&self, up: bool) {
        self.inner.set_link(up);
    }

    /// Answers nothing any more, or does so again.
    pub fn set_silent(&self, silent: bool) {
        self.inner.silent.store(silent, Ordering::Release);
    }

    /// Does what a host must not do, on the primary channel.
    pub fn inject(&self, injection: &Injection) -> Result<(), String> {
        let channel = self.inner.read().channels.get(&0).cloned();
        let channel = channel.ok_or("the NIC has no open channel")?;
        let result = self.inner.inject(&channel, injection);
        result.map_err(|error| error.to_string())
    }

    /// Lets this see what is sent before the guest does; `None` ends that.
    pub fn set_tamper(&self, tamper: Option<Arc<Tamper>>) {
        let place = self.inner.tamper.write();
        *place.unwrap_or_else(PoisonError::into_inner) = tamper;
    }

    /// What is to be seen of it.
    pub fn status(&self) -> NicStatus {
        let state = self.inner.read();
        let queues = state.channels.values().map(|channel| QueueStatus {
            index: channel.index,
            sent: channel.sent.load(Ordering::Relaxed),
            received: channel.received.load(Ordering::Relaxed),
        });
        let outstanding = state.channels.values().map(|c| c.outstanding.len()).sum();
        NicStatus {
            name: self.inner.name().to_owned(),
            instance: self.instance().to_string(),
            mac: state.adapter.mac().to_string(),
            network: self.inner.config.backend.describe(),
            link: state.link,
            version: state.provider.version().map(|version| version.to_string()),
            channels: state.channels.len(),
            queues: queues.collect(),
            sections: state.receive.as_ref().map_or(0, |buffer| buffer.count()),
            free_sections: state.receive.as_ref().map_or(0, |buffer| buffer.free()),
            outstanding,
            counters: self.inner.counters.snapshot(),
        }
    }
}

impl Drop for Nic {
    fn drop(&mut self) {
        self.inner.ended.store(true, Ordering::Release);
        self.inner.write().drop_receive_buffer();
        // It can only fail when the count is at its limit, and then the threads wake anyway.
        let _ = self.inner.wake.write(1);
        for receiver in self.receivers.drain(..) {
            // One that panicked has been reported already.
            let _ = receiver.join();
        }
    }
}

/// The NIC as the bus server drives it.
struct NetVsp {
    inner: Arc<Inner>,
    /// Threads that read channels, by index.
    readers: BTreeMap<u16, JoinHandle<()>>,
}

impl NetVsp {
    /// Forgets what the guest has set up.
    fn forget(&self) {
        let mut state = self.inner.write();
        state.drop_receive_buffer();
        state.send = None;
        (state.provider, state.adapter) = Inner::new_machines(&self.inner.config, state.link);
        self.inner.update_offloads(&state);
    }
}

impl Vsp for NetVsp {
    fn open(&mut self, channel: HostChannel, params: OpenParams) -> Result<(), OpenError> {
        let index = params.subchannel_index;
        if index == 0 {
            self.forget();
        }
        let (reader, writer) = channel.into_parts();
        let channel = Arc::new(Channel {
            index,
            writer,
            outstanding: Outstanding::default(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        });
        let inner = Arc::clone(&self.inner);
        inner.write().channels.insert(index, Arc::clone(&channel));
        let thread = std::thread::Builder::new()
            .name(format!("{}-ch{index}", self.inner.name()))
            .spawn(move || inner.serve(&channel, reader));
        match thread {
            Ok(thread) => {
                self.readers.insert(index, thread);
                Ok(())
            }
            Err(error) => {
                self.inner.write().channels.remove(&index);
                Err(OpenError(format!("no thread for the channel: {error}")))
            }
        }
    }

    fn close(&mut self, subchannel_index: u16) {
        let (channel, buffer, others) = {
            let mut state = self.inner.write();
            let channel = state.channels.remove(&subchannel_index);
            if subchannel_index == 0 {
                // Threads that wait for sections go on.
                let buffer = state.drop_receive_buffer();
                (channel, buffer, state.channels.values().cloned().collect())
            } else {
                (channel, None, Vec::new())
            }
        };
        let Some(channel) = channel else {
            return;
        };
        if let Some(reader) = self.readers.remove(&subchannel_index) {
            // If it panicked, the rest of the clean-up is still right.
            let _ = reader.join();
        }
        let sections = channel.outstanding.end();
        if subchannel_index != 0 {
            let mut state = self.inner.write();
            if state.receive.is_some() {
                state.orphans.extend(sections);
            }
            return;
        }
        drop(sections);
        for other in others {
            other.outstanding.clear();
        }
        self.forget();
        if let Some(buffer) = buffer {
            // After a rescind, the guest takes its memory without another word.
            buffer.wait_unused();
        }
    }
}
