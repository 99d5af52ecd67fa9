// SPDX-License-Identifier: MIT OR Apache-2.0

//! The VMBus server: what the guest's control messages do, and the offers of the host.
//!
//! # Threads
//! Messages of the guest are handled on the vCPU thread that posted them. Nothing there waits for
//! a VSP: calls of a VSP are queued for the thread of its device, which reports back when it is
//! done, and only then does the guest get its answer. So a slow VSP delays answers to its own
//! device, and the end of a connection, but nothing else.
//!
//! # Lock order
//! [`Server`] has one lock, for all its state. With it held, the server takes channel locks (see
//! `channel.rs`), and calls [`SynicPort`], whose methods do not block. It never calls a VSP, nor
//! drops anything of a VSP, with the lock held. VSPs may call the server from any thread.
//!
//! # Limits
//! Everything that a guest can make the server keep is bounded: channels by their numbers (2047),
//! GPADLs by [`super::gpadl::MAX_PER_CHANNEL`] and [`super::gpadl::MAX_PAGES`], calls of VSPs by
//! the states of channels, messages to the guest as follows: while messages wait because the
//! SynIC's queue is full, the guest's own messages are turned away (HV_STATUS_INSUFFICIENT_BUFFERS,
//! which a guest answers by trying again later), except those that begin or end a connection.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use hv_proto::guid::Guid;
use hv_proto::hypercall::HvStatus;
use hv_proto::ids::{ChannelId, ConnectionId, GpadlId, MAX_CHANNELS, OpenId, VpIndex};
use hv_proto::message::{
    AllOffersDelivered, GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown,
    GuestMessage, HostMessage, InitiateContact, Message, MessageBuf, MessageHeader, MessageType,
    ModifyChannel, ModifyChannelResponse, OfferChannel, OpenChannel, OpenChannelResult,
    RescindChannelOffer, UnloadResponse, VersionResponse, read_prefix,
};
use hv_proto::monitor::MonitorId;
use hv_proto::synic::{SINT_COUNT, SynicMessageType, VMBUS_SINT};
use hv_proto::version::Version;
use serde::Serialize;
use vm_memory::GuestAddress;
use zerocopy::FromZeros;
use zerocopy::little_endian::U64;

use super::channel::{ChannelControl, GpadlError, GpadlView, HostChannel, SharedParams};
use super::counters::{CounterSnapshot, Counters};
use super::device::{self, Job};
use super::gpa::{GuestMem, PAGE_SIZE, page_address};
use super::gpadl::{Added, GpadlTable, Teardown};
use super::monitor;
use super::ring::{GuestRing, MIN_RING_PAGES};
use super::trace::Trace;
use super::vsp::{OfferParams, OpenParams, Vsp};
use crate::hypervisor::{MessageSink, SynicError, SynicPort};

/// Connection ids of channel events are this plus the channel's id.
const EVENT_CONNECTION_BASE: u32 = 0x1_0000;

/// Most messages that wait for the SynIC. The states of channels and GPADLs bound them anyway;
/// this is beyond what they allow.
const MAX_OUTBOX: usize = 16 * 1024;

/// How often waiting messages are tried again.
const OUTBOX_RETRY: Duration = Duration::from_millis(2);

/// How long a reset of the machine and [`Server::shutdown`] wait for VSPs.
const VSP_TIMEOUT: Duration = Duration::from_secs(30);

/// Statuses of answers to the guest; Windows' NTSTATUS numbers, of which a guest only looks at
/// "is zero".
mod status {
    pub(super) const SUCCESS: u32 = 0;
    pub(super) const UNSUCCESSFUL: u32 = 0xc000_0001;
    pub(super) const INVALID_PARAMETER: u32 = 0xc000_000d;
    pub(super) const INSUFFICIENT_RESOURCES: u32 = 0xc000_009a;
}

/// What a server is made with.
#[derive(Clone)]
pub struct ServerConfig {
    /// The newest version that is offered to the guest.
    pub max_version: Version,
    /// Number of virtual processors; their indices are 0 and up.
    pub vp_count: u32,
    /// Where messages and packet headers are traced to.
    pub trace: Option<Arc<Trace>>,
}

/// Why a device or sub-channel cannot be offered.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OfferError {
    /// A device with this instance GUID is there already.
    #[error("there is a device with instance {0} already")]
    Duplicate(Guid),
    /// All channel ids are in use.
    #[error("all channel numbers are in use")]
    NoChannelId,
    /// All monitor ids are in use.
    #[error("all monitor numbers are in use")]
    NoMonitorId,
    /// Sub-channels can be offered only while the primary channel is open.
    #[error("the primary channel is not open")]
    NotOpen,
    /// The device or the server is gone.
    #[error("the device is gone")]
    Gone,
    /// The thread of the device cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(String),
}

/// What the server is connected to, for display.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// The version of the connection, `None` if there is none.
    pub version: Option<String>,
    /// All channels that exist.
    pub channels: Vec<ChannelStatus>,
    /// Number of GPADLs.
    pub gpadls: usize,
}

/// A channel, for display.
#[derive(Debug, Clone, Serialize)]
pub struct ChannelStatus {
    /// The channel's number.
    pub id: u32,
    /// The name of the device.
    pub name: String,
    /// 0 for the primary channel.
    pub subchannel_index: u16,
    /// Whether the guest has been told of it.
    pub offered: bool,
    /// What it is doing.
    pub state: ChannelState,
    /// The virtual processor that gets its interrupts.
    pub target_vp: u32,
    /// What went over it.
    pub counters: CounterSnapshot,
}

/// What a channel is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ChannelState {
    /// Not open.
    Closed,
    /// The VSP is opening it.
    Opening,
    /// Open.
    Open,
    /// The VSP is closing it.
    Closing,
    /// Taken back; the guest has yet to let go of it.
    Rescinded,
}

/// Where the guest wants its messages.
#[derive(Debug, Clone, Copy)]
struct Target {
    vp: VpIndex,
    sint: u8,
}

/// A guest that asks for a version, or has got it.
#[derive(Debug, Clone, Copy)]
struct Contact {
    /// `None`: the answer is "not supported".
    version: Option<Version>,
    target: Target,
    /// Where the guest asked, and shall send its messages to.
    connection: ConnectionId,
    /// The page in which the guest signals, if it named a good one.
    monitor_page: Option<GuestAddress>,
}

#[derive(Debug, Clone, Copy)]
struct Connected {
    version: Version,
    target: Target,
    connection: ConnectionId,
    monitor_page: Option<GuestAddress>,
    offers_requested: bool,
}

/// What happens when the last channel of a connection is closed.
#[derive(Debug, Clone, Copy)]
enum After {
    /// Answer the guest's UNLOAD.
    Unload(Target),
    /// Answer a new INITIATE_CONTACT.
    Contact(Contact),
    /// Nothing: the machine is reset.
    Reset,
}

#[derive(Debug, Clone, Copy)]
enum Connection {
    Disconnected,
    Connected(Connected),
    /// A connection has ended, and VSPs are still closing its channels.
    Draining(After),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Closed,
    Opening(OpenId),
    Open,
    Closing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rescind {
    No,
    /// As soon as the VSP has let go of the ring: the guest may free its memory when it hears of
    /// the rescind.
    Wanted,
    Sent,
}

/// One channel.
struct Entry {
    device: u64,
    index: u16,
    /// Changes with each opening.
    serial: u64,
    phase: Phase,
    /// While `Opening`: close it right afterwards.
    close_wanted: bool,
    /// The guest knows of it.
    offered: bool,
    /// The guest has let go of it without being asked. It hears of it again in its next life.
    released: bool,
    rescind: Rescind,
    control: Option<ChannelControl>,
    /// Keeps the guest's signals bound to the channel's event.
    binding: Option<Box<dyn Send>>,
    ring_gpadl: Option<(GpadlId, u64)>,
    target_vp: Arc<AtomicU32>,
    counters: Arc<Counters>,
    monitor: Option<MonitorId>,
}

impl Entry {
    fn is_live(&self) -> bool {
        self.rescind == Rescind::No && !self.released
    }
}

struct Device {
    name: Arc<str>,
    params: OfferParams,
    /// `None` once the device's thread was told to end.
    jobs: Option<Sender<Job>>,
    /// Calls of the VSP that are under way.
    busy: u32,
    /// A channel was opened since the last reset of the VSP.
    used: bool,
    /// The host has taken the device away.
    removed: bool,
    /// Has to wait until the guest lets go of a former device with the same instance.
    held: bool,
}

struct State {
    connection: Connection,
    channels: BTreeMap<ChannelId, Entry>,
    devices: BTreeMap<u64, Device>,
    gpadls: GpadlTable,
    outbox: VecDeque<(Target, MessageBuf)>,
    outbox_thread: bool,
    monitor_thread: bool,
    next_channel: u32,
    next_device: u64,
    next_serial: u64,
    complaints: Complaints,
}

/// Limits how often the log tells of a guest's mistakes.
struct Complaints {
    since: Instant,
    count: u32,
}

impl Complaints {
    const PERIOD: Duration = Duration::from_secs(5);
    const MAX: u32 = 20;

    fn allowed(&mut self) -> bool {
        if self.since.elapsed() >= Self::PERIOD {
            if self.count > Self::MAX {
                let hidden = self.count - Self::MAX;
                tracing::warn!("{hidden} more complaints about the guest were not logged");
            }
            self.since = Instant::now();
            self.count = 0;
        }
        self.count = self.count.saturating_add(1);
        self.count <= Self::MAX
    }
}

/// Tells of something that a correct guest does not do.
macro_rules! complain {
    ($state:expr, $($arg:tt)*) => {
        if $state.complaints.allowed() {
            tracing::warn!($($arg)*);
        }
    };
}

/// The VMBus server of one virtual machine.
pub struct Server {
    weak: Weak<Server>,
    mem: GuestMem,
    synic: Arc<dyn SynicPort>,
    config: ServerConfig,
    state: Mutex<State>,
    changed: Condvar,
}

impl Server {
    /// A server without devices. The guest's messages come in through its [`MessageSink`] side.
    pub fn new(mem: GuestMem, synic: Arc<dyn SynicPort>, config: ServerConfig) -> Arc<Self> {
        Arc::new_cyclic(|weak| Self {
            weak: weak.clone(),
            mem,
            synic,
            config,
            state: Mutex::new(State {
                connection: Connection::Disconnected,
                channels: BTreeMap::new(),
                devices: BTreeMap::new(),
                gpadls: GpadlTable::default(),
                outbox: VecDeque::new(),
                outbox_thread: false,
                monitor_thread: false,
                next_channel: 1,
                next_device: 1,
                next_serial: 1,
                complaints: Complaints {
                    since: Instant::now(),
                    count: 0,
                },
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of a VSP runs with the lock held, so a panic there cannot poison it; if the
        // server itself has a bug, going on is better for the other devices than stopping.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offers a device. If a guest has asked for offers already, it hears of this one at once.
    ///
    /// A device with the instance GUID of one that was taken away waits until the guest has let
    /// go of that one.
    ///
    /// # Errors
    /// [`OfferError`]: the instance or all numbers are in use, or there can be no more threads.
    pub fn offer(&self, params: OfferParams, vsp: Box<dyn Vsp>) -> Result<OfferHandle, OfferError> {
        let mut st = self.lock();
        let same = st
            .devices
            .values()
            .find(|d| !d.removed && d.params.instance == params.instance);
        if same.is_some() {
            return Err(OfferError::Duplicate(params.instance));
        }
        let number = st.next_device;
        st.next_device += 1;
        let name: Arc<str> = params.name.as_str().into();
        let (jobs, queue) = channel();
        let server = self.weak.clone();
        let thread_name = name.clone();
        thread::Builder::new()
            .name(format!("vmbus-{name}"))
            .spawn(move || device::run(&thread_name, number, vsp, &queue, &server))
            .map_err(|e| OfferError::Thread(e.to_string()))?;
        let held = st
            .devices
            .values()
            .any(|d| d.params.instance == params.instance);
        st.devices.insert(
            number,
            Device {
                name,
                params,
                jobs: Some(jobs),
                busy: 0,
                used: false,
                removed: false,
                held,
            },
        );
        if !held && let Err(e) = self.add_channel(&mut st, number, 0) {
            st.devices.remove(&number);
            return Err(e);
        }
        Ok(OfferHandle {
            server: self.weak.clone(),
            device: number,
        })
    }

    /// What the server is doing.
    pub fn status(&self) -> Status {
        let st = self.lock();
        let version = match st.connection {
            Connection::Connected(c) => Some(c.version.to_string()),
            _ => None,
        };
        let channel = |(id, entry): (&ChannelId, &Entry)| ChannelStatus {
            id: id.get(),
            name: st
                .devices
                .get(&entry.device)
                .map_or_else(String::new, |d| d.name.to_string()),
            subchannel_index: entry.index,
            offered: entry.offered,
            state: match (entry.rescind, entry.phase) {
                (Rescind::Sent, _) => ChannelState::Rescinded,
                (_, Phase::Closed) => ChannelState::Closed,
                (_, Phase::Opening(_)) => ChannelState::Opening,
                (_, Phase::Open) => ChannelState::Open,
                (_, Phase::Closing) => ChannelState::Closing,
            },
            target_vp: entry.target_vp.load(Ordering::Relaxed),
            counters: entry.counters.snapshot(),
        };
        Status {
            version,
            channels: st.channels.iter().map(channel).collect(),
            gpadls: st.gpadls.len(),
        }
    }

    /// Takes all devices away and waits until their VSPs have ended, for instance so that disk
    /// images are complete when the process ends. Returns whether all did, within 30 seconds.
    pub fn shutdown(&self) -> bool {
        let mut st = self.lock();
        let numbers: Vec<u64> = st.devices.keys().copied().collect();
        for number in numbers {
            self.remove_device(&mut st, number);
        }
        self.disconnect(&mut st, After::Reset);
        let done = self.wait(st, VSP_TIMEOUT, |st| st.devices.is_empty());
        if let Some(trace) = &self.config.trace {
            trace.flush();
        }
        done
    }

    /// Waits until `done` holds, at most `timeout`. Returns whether it does.
    fn wait(
        &self,
        st: MutexGuard<'_, State>,
        timeout: Duration,
        mut done: impl FnMut(&State) -> bool,
    ) -> bool {
        let result = self
            .changed
            .wait_timeout_while(st, timeout, |st| !done(st))
            .unwrap_or_else(PoisonError::into_inner);
        !result.1.timed_out()
    }

    // ---- Channels and offers -------------------------------------------------------------

    /// Makes a channel of a device, and offers it if a guest wants to hear of offers.
    fn add_channel(&self, st: &mut State, number: u64, index: u16) -> Result<(), OfferError> {
        let device = st.devices.get(&number).ok_or(OfferError::Gone)?;
        let monitor = if device.params.monitor_latency.is_some() {
            let free = (0..MonitorId::COUNT)
                .filter_map(MonitorId::new)
                .find(|m| st.channels.values().all(|c| c.monitor != Some(*m)));
            Some(free.ok_or(OfferError::NoMonitorId)?)
        } else {
            None
        };
        // Numbers go round, so that a number is not used again soon after it was released.
        let last = MAX_CHANNELS as u32 - 1;
        let from = st.next_channel;
        let id = (from..=last)
            .chain(1..from)
            .map(ChannelId::new)
            .find(|id| !st.channels.contains_key(id))
            .ok_or(OfferError::NoChannelId)?;
        st.next_channel = if id.get() == last { 1 } else { id.get() + 1 };
        st.channels.insert(
            id,
            Entry {
                device: number,
                index,
                serial: 0,
                phase: Phase::Closed,
                close_wanted: false,
                offered: false,
                released: false,
                rescind: Rescind::No,
                control: None,
                binding: None,
                ring_gpadl: None,
                target_vp: Arc::new(AtomicU32::new(0)),
                counters: Arc::new(Counters::default()),
                monitor,
            },
        );
        self.send_offer(st, id);
        Ok(())
    }

    /// Tells the guest of a channel, if it wants to hear and does not know.
    fn send_offer(&self, st: &mut State, id: ChannelId) {
        let Connection::Connected(connected) = st.connection else {
            return;
        };
        if !connected.offers_requested {
            return;
        }
        let Some(entry) = st.channels.get_mut(&id) else {
            return;
        };
        let Some(device) = st.devices.get(&entry.device) else {
            return;
        };
        if entry.offered || !entry.is_live() {
            return;
        }
        entry.offered = true;
        let params = &device.params;
        let connection = event_connection(id);
        let monitor = match (
            entry.monitor,
            connected.monitor_page,
            params.monitor_latency,
        ) {
            (Some(monitor), Some(page), Some(latency)) => {
                monitor::describe(&self.mem, page, monitor, latency, connection);
                Some(monitor)
            }
            _ => None,
        };
        let offer = OfferChannel {
            interface_id: params.class,
            instance_id: params.instance,
            channel_flags: params.flags.into(),
            mmio_megabytes: params.mmio_megabytes.into(),
            user_defined: params.user_defined,
            sub_channel_index: entry.index.into(),
            channel_id: id,
            monitor_id: monitor.map_or(0, MonitorId::get),
            monitor_allocated: monitor.is_some().into(),
            is_dedicated_interrupt: 1.into(),
            connection_id: connection,
            ..OfferChannel::new_zeroed()
        };
        self.send(st, connected.target, &offer);
    }

    /// Takes a device away from the guest.
    fn remove_device(&self, st: &mut State, number: u64) {
        let Some(device) = st.devices.get_mut(&number) else {
            return;
        };
        if std::mem::replace(&mut device.removed, true) {
            return;
        }
        for id in channels_of(st, number) {
            self.rescind(st, id);
        }
        self.settle_device(st, number);
    }

    /// Takes a channel back: the VSP closes it first, then the guest is told.
    fn rescind(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.get_mut(&id) else {
            return;
        };
        if entry.rescind == Rescind::No {
            entry.rescind = Rescind::Wanted;
        }
        match entry.phase {
            Phase::Closed => self.finish_rescind(st, id),
            Phase::Opening(_) | Phase::Open => self.close(st, id),
            Phase::Closing => {}
        }
    }

    /// The second half of a rescind: the channel is closed, so the guest may be told.
    fn finish_rescind(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.get_mut(&id) else {
            return;
        };
        if entry.rescind != Rescind::Wanted || entry.phase != Phase::Closed {
            return;
        }
        match st.connection {
            Connection::Connected(connected) if entry.offered && !entry.released => {
                entry.rescind = Rescind::Sent;
                self.send(
                    st,
                    connected.target,
                    &RescindChannelOffer { channel_id: id },
                );
            }
            _ => self.remove_channel(st, id),
        }
    }

    /// Forgets a channel that is closed and that the guest does not know (any more).
    fn remove_channel(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.remove(&id) else {
            return;
        };
        st.gpadls.forget_channel(id);
        self.settle_device(st, entry.device);
        self.changed.notify_all();
    }

    /// Ends the thread of a device that was removed, once its channels are closed, and forgets
    /// it, once its channels are gone too. Devices that waited for that are offered then.
    fn settle_device(&self, st: &mut State, number: u64) {
        let Some(device) = st.devices.get_mut(&number) else {
            return;
        };
        if !device.removed {
            return;
        }
        let mut phases = st
            .channels
            .values()
            .filter(|c| c.device == number)
            .map(|c| c.phase);
        if device.busy == 0 && phases.all(|p| p == Phase::Closed) && device.jobs.take().is_some() {
            // Counted like a call, until the thread reports its end.
            device.busy = 1;
        }
        let gone = device.jobs.is_none() && device.busy == 0;
        if gone && channels_of(st, number).is_empty() {
            let instance = device_instance(st, number);
            st.devices.remove(&number);
            let blocked = |st: &State| {
                let mut same = st
                    .devices
                    .values()
                    .filter(|d| Some(d.params.instance) == instance);
                same.any(|d| d.removed)
            };
            if !blocked(st) {
                let waiting = st
                    .devices
                    .iter()
                    .find(|(_, d)| d.held && Some(d.params.instance) == instance);
                if let Some(next) = waiting.map(|(n, _)| *n) {
                    self.unhold(st, next);
                }
            }
            self.changed.notify_all();
        }
    }

    fn unhold(&self, st: &mut State, number: u64) {
        if let Some(device) = st.devices.get_mut(&number) {
            device.held = false;
            let name = device.name.clone();
            if let Err(error) = self.add_channel(st, number, 0) {
                tracing::error!(device = %name, %error, "cannot offer the device again");
            }
        }
    }

    /// Offers sub-channels 1 to `count` of a device, as far as they are not offered yet.
    fn offer_subchannels(&self, number: u64, count: u16) -> Result<(), OfferError> {
        let mut st = self.lock();
        let device = st.devices.get(&number).filter(|d| !d.removed);
        device.ok_or(OfferError::Gone)?;
        let mine = |st: &State, index: u16| {
            st.channels
                .values()
                .any(|c| c.device == number && c.index == index && c.is_live())
        };
        let primary_open = st.channels.values().any(|c| {
            let open = matches!(c.phase, Phase::Open | Phase::Opening(_));
            c.device == number && c.index == 0 && c.is_live() && open && !c.close_wanted
        });
        if !primary_open {
            return Err(OfferError::NotOpen);
        }
        for index in 1..=count {
            if !mine(&st, index) {
                self.add_channel(&mut st, number, index)?;
            }
        }
        Ok(())
    }

    // ---- Messages to the guest -----------------------------------------------------------

    fn send<M: Message>(&self, st: &mut State, target: Target, message: &M) {
        let buf = message.encode();
        if let Some(trace) = &self.config.trace
            && let Ok(parsed) = HostMessage::parse(&buf, Some(Version::NEWEST))
        {
            trace.host_message(target.vp.get(), target.sint, &parsed);
        }
        if st.outbox.is_empty() && self.post(target, &buf) {
            return;
        }
        if st.outbox.len() >= MAX_OUTBOX {
            tracing::error!("too many messages wait for the guest, dropping one");
            return;
        }
        st.outbox.push_back((target, buf));
        if !st.outbox_thread {
            let server = self.weak.clone();
            let spawned = thread::Builder::new()
                .name("vmbus-outbox".into())
                .spawn(move || flush_outbox(&server));
            // Without the thread, the next message tries again.
            st.outbox_thread = spawned.is_ok();
        }
    }

    /// Hands a message to the SynIC. Returns false if its queue is full.
    fn post(&self, target: Target, buf: &MessageBuf) -> bool {
        let message_type = SynicMessageType::CHANNEL.get();
        let posted = self
            .synic
            .post_message(target.vp, target.sint, message_type, buf);
        match posted {
            Ok(()) => true,
            Err(SynicError::QueueFull(_)) => false,
            Err(error) => {
                tracing::warn!(%error, message = ?buf.message_type(), "cannot send to the guest");
                true
            }
        }
    }

    /// Sends to the guest of the present connection, if there is one.
    fn reply<M: Message>(&self, st: &mut State, message: &M) {
        if let Connection::Connected(connected) = st.connection {
            self.send(st, connected.target, message);
        }
    }

    // ---- Connection ----------------------------------------------------------------------

    fn initiate_contact(
        &self,
        st: &mut State,
        connection: ConnectionId,
        message: &InitiateContact,
    ) {
        let raw = message.version.get();
        // From 5.0 on the guest names the SINT, also if it is a version that we do not know.
        let new_style = raw >= Version::V5_0.raw();
        let sint = if new_style {
            message.target().sint
        } else {
            VMBUS_SINT
        };
        let vp = message.target_vp;
        if vp.get() >= self.config.vp_count || sint >= SINT_COUNT {
            complain!(
                st,
                vp = vp.get(),
                sint,
                "INITIATE_CONTACT with a bad target"
            );
            return;
        }
        let right_place = new_style == (connection == ConnectionId::MESSAGE_V5);
        let version =
            Version::from_raw(raw).filter(|v| *v <= self.config.max_version && right_place);
        let page = message.monitor_page2.get();
        let monitor_page = (page != 0 && page.is_multiple_of(u64::from(PAGE_SIZE)))
            .then(|| page_address(&self.mem, page / u64::from(PAGE_SIZE)).ok())
            .flatten();
        let contact = Contact {
            version,
            target: Target { vp, sint },
            connection,
            monitor_page,
        };
        // A guest that makes contact has forgotten every earlier connection (kexec, kdump).
        self.disconnect(st, After::Contact(contact));
    }

    /// Ends the connection: closes all channels, forgets what the guest made, then does `after`.
    fn disconnect(&self, st: &mut State, after: After) {
        st.connection = Connection::Draining(after);
        st.outbox.clear();
        // Sub-channels before primary channels.
        let mut ids: Vec<ChannelId> = st.channels.keys().copied().collect();
        ids.sort_by_key(|id| st.channels.get(id).is_none_or(|c| c.index == 0));
        for id in ids {
            self.close(st, id);
        }
        self.finish_drain(st);
    }

    /// The last part of [`Server::disconnect`], once all VSPs are done.
    fn finish_drain(&self, st: &mut State) {
        let Connection::Draining(after) = st.connection else {
            return;
        };
        let busy = st.devices.values().any(|d| d.busy > 0 && d.jobs.is_some());
        if busy || st.channels.values().any(|c| c.phase != Phase::Closed) {
            return;
        }
        st.gpadls.clear();
        for device in st.devices.values_mut() {
            if std::mem::take(&mut device.used) && queue(device, Job::Reset) {
                device.busy += 1;
            }
        }
        // Sub-channels are offered anew when the guest asks the device for them.
        let ids: Vec<ChannelId> = st.channels.keys().copied().collect();
        for id in ids {
            let Some(entry) = st.channels.get_mut(&id) else {
                continue;
            };
            entry.offered = false;
            entry.released = false;
            if entry.index != 0 || entry.rescind != Rescind::No {
                self.remove_channel(st, id);
            }
        }
        match after {
            After::Reset => st.connection = Connection::Disconnected,
            After::Unload(target) => {
                st.connection = Connection::Disconnected;
                tracing::info!("the guest left the bus");
                self.send(st, target, &UnloadResponse {});
            }
            After::Contact(contact) => self.accept(st, &contact),
        }
        self.changed.notify_all();
    }

    fn accept(&self, st: &mut State, contact: &Contact) {
        st.connection = match contact.version {
            None => Connection::Disconnected,
            Some(version) => {
                tracing::info!(%version, "the guest connected");
                Connection::Connected(Connected {
                    version,
                    target: contact.target,
                    connection: contact.connection,
                    monitor_page: contact.monitor_page,
                    offers_requested: false,
                })
            }
        };
        let response = VersionResponse {
            version_supported: contact.version.is_some().into(),
            connection_state: 0,
            padding: 0.into(),
            message_connection_id: contact.connection,
        };
        self.send(st, contact.target, &response);
    }

    fn request_offers(&self, st: &mut State) {
        let Connection::Connected(connected) = &mut st.connection else {
            return;
        };
        connected.offers_requested = true;
        let ids: Vec<ChannelId> = st.channels.keys().copied().collect();
        for id in ids {
            self.send_offer(st, id);
        }
        self.reply(st, &AllOffersDelivered {});
    }

    // ---- GPADLs --------------------------------------------------------------------------

    fn gpadl_header(&self, st: &mut State, header: &GpadlHeader, words: &[U64]) {
        let (channel, id) = (header.channel_id, header.gpadl_id);
        let known = st.channels.get(&channel).is_some_and(|c| c.offered);
        let known = known && st.channels.get(&channel).is_some_and(Entry::is_live);
        if !known {
            complain!(
                st,
                channel = channel.get(),
                "GPADL for a channel that is not there"
            );
            self.gpadl_answer(st, channel, id, status::INVALID_PARAMETER);
            return;
        }
        match st.gpadls.start(&self.mem, header, words) {
            Ok(Added::Complete(channel)) => self.gpadl_answer(st, channel, id, status::SUCCESS),
            Ok(Added::More | Added::Unknown) => {}
            Err(refusal) => {
                complain!(
                    st,
                    channel = channel.get(),
                    gpadl = id.get(),
                    "bad GPADL: {refusal}"
                );
                self.gpadl_answer(st, channel, id, status::INVALID_PARAMETER);
            }
        }
    }

    fn gpadl_body(&self, st: &mut State, body: &GpadlBody, words: &[U64]) {
        let id = body.gpadl_id;
        match st.gpadls.add(&self.mem, body, words) {
            Ok(Added::Complete(channel)) => self.gpadl_answer(st, channel, id, status::SUCCESS),
            Ok(Added::More) => {}
            // The rest of a GPADL that was refused, normally.
            Ok(Added::Unknown) => tracing::debug!(gpadl = id.get(), "GPADL_BODY ignored"),
            Err((channel, refusal)) => {
                complain!(
                    st,
                    channel = channel.get(),
                    gpadl = id.get(),
                    "bad GPADL: {refusal}"
                );
                self.gpadl_answer(st, channel, id, status::INVALID_PARAMETER);
            }
        }
    }

    fn gpadl_answer(&self, st: &mut State, channel_id: ChannelId, gpadl_id: GpadlId, code: u32) {
        let answer = GpadlCreated {
            channel_id,
            gpadl_id,
            status: code.into(),
        };
        self.reply(st, &answer);
    }

    fn gpadl_teardown(&self, st: &mut State, message: &GpadlTeardown) {
        let (channel, id) = (message.channel_id, message.gpadl_id);
        match st.gpadls.teardown(channel, id) {
            Teardown::Done => self.reply(st, &GpadlTorndown { gpadl_id: id }),
            // Refused for now: the answer follows when the channel is closed.
            Teardown::Later => tracing::debug!(gpadl = id.get(), "GPADL is in use"),
            Teardown::Unknown => {
                complain!(
                    st,
                    channel = channel.get(),
                    gpadl = id.get(),
                    "GPADL_TEARDOWN for a GPADL that is not there"
                );
            }
        }
    }

    /// One use of a GPADL ends.
    fn release_gpadl(&self, st: &mut State, id: GpadlId, serial: u64) {
        if st.gpadls.release(id, serial) {
            self.reply(st, &GpadlTorndown { gpadl_id: id });
        }
    }

    pub(super) fn view_gpadl(
        &self,
        channel: ChannelId,
        id: GpadlId,
    ) -> Result<GpadlView, GpadlError> {
        let mut st = self.lock();
        let open = st
            .channels
            .get(&channel)
            .is_some_and(|c| matches!(c.phase, Phase::Open | Phase::Opening(_)));
        if !open {
            return Err(GpadlError::Unknown(id));
        }
        let view = st.gpadls.view(&self.mem, channel, id);
        let (serial, buffer) = view.ok_or(GpadlError::Unknown(id))??;
        Ok(GpadlView {
            id,
            serial,
            buffer,
            server: self.weak.clone(),
        })
    }

    pub(super) fn gpadl_view_dropped(&self, id: GpadlId, serial: u64) {
        self.release_gpadl(&mut self.lock(), id, serial);
    }

    // ---- Opening and closing -------------------------------------------------------------

    fn open(&self, st: &mut State, message: &OpenChannel) {
        let Connection::Connected(connected) = st.connection else {
            return;
        };
        if let Err((code, why)) = self.try_open(st, connected, message) {
            complain!(
                st,
                channel = message.channel_id.get(),
                "OPENCHANNEL refused: {why}"
            );
            self.open_answer(st, message.channel_id, message.open_id, code);
        }
    }

    fn try_open(
        &self,
        st: &mut State,
        connected: Connected,
        message: &OpenChannel,
    ) -> Result<(), (u32, String)> {
        let bad = |why: &str| (status::INVALID_PARAMETER, why.to_owned());
        let failed = |why: String| (status::INSUFFICIENT_RESOURCES, why);
        let id = message.channel_id;
        let entry = st.channels.get_mut(&id);
        let entry = entry
            .filter(|c| c.offered && c.is_live())
            .ok_or_else(|| bad("no such channel"))?;
        let device = st.devices.get_mut(&entry.device);
        let device = device
            .filter(|d| !d.removed && d.jobs.is_some())
            .ok_or_else(|| bad("the device is gone"))?;
        if entry.phase != Phase::Closed {
            return Err(bad("it is open already"));
        }
        if message.target_vp.get() >= self.config.vp_count {
            return Err(bad("no such virtual processor"));
        }
        let (gpadl_serial, pages) = st
            .gpadls
            .use_for_rings(id, message.ring_gpadl)
            .ok_or_else(|| bad("no GPADL of whole pages for the rings"))?;
        let serial = st.next_serial;
        st.next_serial += 1;
        let started = (|| {
            let split = message.downstream_page_offset.get() as usize;
            let rings = pages
                .split_at_checked(split)
                .filter(|(a, b)| a.len() >= MIN_RING_PAGES && b.len() >= MIN_RING_PAGES)
                .ok_or_else(|| bad("the rings do not fit the GPADL"))?;
            let ring = |pages| GuestRing::new(&self.mem, pages).map_err(|e| bad(&e.to_string()));
            let (incoming, outgoing) = (ring(rings.0)?, ring(rings.1)?);
            let params = SharedParams {
                id,
                subchannel_index: entry.index,
                name: device.name.clone(),
                serial,
                mem: self.mem.clone(),
                synic: self.synic.clone(),
                sint: connected.target.sint,
                target_vp: entry.target_vp.clone(),
                counters: entry.counters.clone(),
                trace: self.config.trace.clone(),
                server: self.weak.clone(),
                device: entry.device,
            };
            let (channel, control) =
                HostChannel::new(params, incoming, outgoing).map_err(|e| failed(e.to_string()))?;
            let event = control
                .shared
                .signal
                .try_clone()
                .map_err(|e| failed(e.to_string()))?;
            let binding = self
                .synic
                .bind_event(event_connection(id), event)
                .map_err(|e| failed(e.to_string()))?;
            Ok((channel, control, binding))
        })();
        let (channel, control, binding) = match started {
            Ok(started) => started,
            Err(e) => {
                // The guest has not torn it down meanwhile: the lock was held.
                st.gpadls.release(message.ring_gpadl, gpadl_serial);
                return Err(e);
            }
        };
        entry
            .target_vp
            .store(message.target_vp.get(), Ordering::Relaxed);
        entry.serial = serial;
        entry.phase = Phase::Opening(message.open_id);
        entry.close_wanted = false;
        entry.control = Some(control);
        entry.binding = Some(binding);
        entry.ring_gpadl = Some((message.ring_gpadl, gpadl_serial));
        device.used = true;
        let params = Box::new(OpenParams {
            subchannel_index: entry.index,
            target_vp: message.target_vp,
            version: connected.version,
            user_data: message.user_data,
        });
        let channel = Box::new(channel);
        if queue(
            device,
            Job::Open {
                id,
                channel,
                params,
            },
        ) {
            device.busy += 1;
        } else {
            self.opened(st, id, false);
        }
        Ok(())
    }

    fn open_answer(&self, st: &mut State, channel_id: ChannelId, open_id: OpenId, code: u32) {
        let answer = OpenChannelResult {
            channel_id,
            open_id,
            status: code.into(),
        };
        self.reply(st, &answer);
    }

    /// A VSP has opened a channel, or has refused to.
    pub(super) fn open_done(&self, id: ChannelId, ok: bool) {
        let mut st = self.lock();
        self.call_ended(&mut st, id);
        self.opened(&mut st, id, ok);
    }

    fn opened(&self, st: &mut State, id: ChannelId, ok: bool) {
        let Some(entry) = st.channels.get_mut(&id) else {
            return;
        };
        let Phase::Opening(open_id) = entry.phase else {
            return;
        };
        if ok {
            entry.phase = Phase::Open;
            if entry.close_wanted {
                self.open_answer(st, id, open_id, status::UNSUCCESSFUL);
                self.close(st, id);
            } else {
                entry.counters.open();
                let monitored = entry.monitor.is_some();
                tracing::debug!(channel = id.get(), "open");
                self.open_answer(st, id, open_id, status::SUCCESS);
                if monitored {
                    self.start_monitor(st);
                }
            }
        } else {
            self.open_answer(st, id, open_id, status::UNSUCCESSFUL);
            self.closed(st, id);
        }
        self.changed.notify_all();
    }

    /// Has the VSP close a channel, or, if it is opening it, do so afterwards.
    fn close(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.get_mut(&id) else {
            return;
        };
        match entry.phase {
            Phase::Closed | Phase::Closing => return,
            Phase::Opening(_) | Phase::Open => {}
        }
        if let Some(control) = &entry.control {
            control.stop();
        }
        entry.binding = None;
        if entry.phase != Phase::Open {
            entry.close_wanted = true;
            return;
        }
        entry.phase = Phase::Closing;
        let job = Job::Close {
            id,
            subchannel_index: entry.index,
        };
        match st.devices.get_mut(&entry.device) {
            Some(device) if queue(device, job) => device.busy += 1,
            _ => self.closed(st, id),
        }
    }

    /// A VSP has closed a channel.
    pub(super) fn close_done(&self, id: ChannelId) {
        let mut st = self.lock();
        self.call_ended(&mut st, id);
        self.closed(&mut st, id);
    }

    /// The VSP has let go of a channel.
    fn closed(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.get_mut(&id) else {
            return;
        };
        tracing::debug!(channel = id.get(), "closed");
        entry.phase = Phase::Closed;
        entry.close_wanted = false;
        entry.control = None;
        entry.binding = None;
        let (index, number) = (entry.index, entry.device);
        if let Some((gpadl, serial)) = entry.ring_gpadl.take() {
            self.release_gpadl(st, gpadl, serial);
        }
        if index == 0 {
            // The guest cannot use sub-channels without the primary channel, and expects to hear
            // of new ones when it has opened that again.
            for sub in channels_of(st, number) {
                if sub != id {
                    self.rescind(st, sub);
                }
            }
        }
        self.finish_rescind(st, id);
        self.settle_device(st, number);
        self.finish_drain(st);
        self.changed.notify_all();
    }

    pub(super) fn reset_done(&self, number: u64) {
        let mut st = self.lock();
        if let Some(device) = st.devices.get_mut(&number) {
            device.busy = device.busy.saturating_sub(1);
        }
        self.settle_device(&mut st, number);
        self.finish_drain(&mut st);
        self.changed.notify_all();
    }

    /// The thread of a device has ended, and its VSP is gone.
    pub(super) fn device_ended(&self, number: u64) {
        let mut st = self.lock();
        if let Some(device) = st.devices.get_mut(&number) {
            device.busy = 0;
            device.jobs = None;
        }
        self.settle_device(&mut st, number);
        self.changed.notify_all();
    }

    fn call_ended(&self, st: &mut State, id: ChannelId) {
        let number = st.channels.get(&id).map(|c| c.device);
        if let Some(device) = number.and_then(|n| st.devices.get_mut(&n)) {
            device.busy = device.busy.saturating_sub(1);
        }
    }

    /// A ring of an open channel was found damaged.
    pub(super) fn channel_failed(&self, id: ChannelId, serial: u64) {
        let mut st = self.lock();
        if st.channels.get(&id).is_some_and(|c| c.serial == serial) {
            self.close(&mut st, id);
        }
    }

    fn close_channel(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.get(&id).filter(|c| c.offered) else {
            complain!(
                st,
                channel = id.get(),
                "CLOSECHANNEL for a channel that is not there"
            );
            return;
        };
        if entry.index == 0 {
            for sub in channels_of(st, entry.device) {
                if sub != id {
                    self.close(st, sub);
                }
            }
        }
        // Closing a closed channel is not a mistake: the host may have closed it.
        self.close(st, id);
    }

    fn relid_released(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.get_mut(&id).filter(|c| c.offered) else {
            complain!(
                st,
                channel = id.get(),
                "RELID_RELEASED for a channel that is not there"
            );
            return;
        };
        match (entry.rescind, entry.phase) {
            (Rescind::Sent, _) => self.remove_channel(st, id),
            (Rescind::No, Phase::Closed) if entry.index != 0 => self.remove_channel(st, id),
            (Rescind::No, Phase::Closed) => {
                // The guest could not use the offer. It stays for the guest's next connection.
                entry.released = true;
                st.gpadls.forget_channel(id);
            }
            _ => {
                complain!(
                    st,
                    channel = id.get(),
                    "RELID_RELEASED for a channel that is in use"
                );
            }
        }
    }

    fn modify_channel(&self, st: &mut State, message: &ModifyChannel) {
        let Connection::Connected(connected) = st.connection else {
            return;
        };
        let (id, vp) = (message.channel_id, message.target_vp.get());
        let entry = st.channels.get(&id).filter(|c| c.offered);
        let good = vp < self.config.vp_count
            && entry.is_some_and(|c| matches!(c.phase, Phase::Open | Phase::Opening(_)));
        let code = match entry {
            Some(entry) if good => {
                entry.target_vp.store(vp, Ordering::Relaxed);
                status::SUCCESS
            }
            _ => {
                complain!(st, channel = id.get(), vp, "MODIFYCHANNEL refused");
                status::INVALID_PARAMETER
            }
        };
        if connected.version.has_modify_channel_response() {
            let answer = ModifyChannelResponse {
                channel_id: id,
                status: code.into(),
            };
            self.send(st, connected.target, &answer);
        }
    }

    // ---- Monitor pages -------------------------------------------------------------------

    /// Starts the thread that looks at the monitor page, unless it runs.
    fn start_monitor(&self, st: &mut State) {
        if st.monitor_thread {
            return;
        }
        let server = self.weak.clone();
        let spawned = thread::Builder::new()
            .name("vmbus-monitor".into())
            .spawn(move || {
                while let Some(pause) = server.upgrade().and_then(|s| s.poll_monitor()) {
                    thread::sleep(pause);
                }
            });
        match spawned {
            Ok(_) => st.monitor_thread = true,
            Err(error) => tracing::error!(%error, "cannot look at monitor pages"),
        }
    }

    /// Looks at the monitor page once. Returns when to look again; `None` if nothing is left to
    /// look for.
    fn poll_monitor(&self) -> Option<Duration> {
        let mut st = self.lock();
        let page = match st.connection {
            Connection::Connected(c) => c.monitor_page,
            _ => None,
        };
        let mut pause = None;
        for entry in st.channels.values() {
            let (Some(id), Some(control), Some(page)) = (entry.monitor, &entry.control, page)
            else {
                continue;
            };
            if monitor::take_pending(&self.mem, page, id) {
                // The event's count cannot be at its limit: the reader would be awake.
                let _ = control.shared.signal.write(1);
            }
            let latency = st.devices.get(&entry.device);
            let latency = latency.and_then(|d| d.params.monitor_latency);
            let latency = latency.map(monitor::poll_interval);
            pause = [pause, latency].into_iter().flatten().min();
        }
        if pause.is_none() {
            st.monitor_thread = false;
        }
        pause
    }

    // ---- Dispatch ------------------------------------------------------------------------

    fn handle(
        &self,
        st: &mut State,
        connection: ConnectionId,
        payload: &[u8],
    ) -> Result<(), HvStatus> {
        let agreed = match st.connection {
            Connection::Connected(c) => Some(c.version),
            _ => None,
        };
        let kind = read_prefix::<MessageHeader>(payload).map(|h| h.message_type);
        let vital = matches!(
            kind,
            Some(MessageType::INITIATE_CONTACT | MessageType::UNLOAD)
        );
        if !vital && !st.outbox.is_empty() {
            return Err(HvStatus::INSUFFICIENT_BUFFERS);
        }
        let message = match GuestMessage::parse(payload, agreed) {
            Ok(message) => message,
            Err(error) => {
                if let Some(trace) = &self.config.trace {
                    trace.bad_message(connection.get(), payload, &error.to_string());
                }
                complain!(st, "message of the guest ignored: {error}");
                return Ok(());
            }
        };
        if let Some(trace) = &self.config.trace {
            trace.guest_message(connection.get(), &message);
        }
        match st.connection {
            Connection::Connected(c) if c.connection != connection && !vital => {
                return Err(HvStatus::INVALID_CONNECTION_ID);
            }
            _ => {}
        }
        match message {
            GuestMessage::InitiateContact(m) => self.initiate_contact(st, connection, &m),
            GuestMessage::Unload(_) => match st.connection {
                Connection::Connected(c) => self.disconnect(st, After::Unload(c.target)),
                _ => complain!(st, "UNLOAD without a connection"),
            },
            GuestMessage::RequestOffers(_) => self.request_offers(st),
            GuestMessage::GpadlHeader(m, words) => self.gpadl_header(st, &m, words),
            GuestMessage::GpadlBody(m, words) => self.gpadl_body(st, &m, words),
            GuestMessage::GpadlTeardown(m) => self.gpadl_teardown(st, &m),
            GuestMessage::OpenChannel(m) => self.open(st, &m),
            GuestMessage::CloseChannel(m) => self.close_channel(st, m.channel_id),
            GuestMessage::RelidReleased(m) => self.relid_released(st, m.channel_id),
            GuestMessage::ModifyChannel(m) => self.modify_channel(st, &m),
            GuestMessage::TlConnectRequest(m) => {
                // There are no sockets to the host. Nobody listens, and the guest's connect()
                // ends by its own timeout, as it does on a host without such a service.
                tracing::debug!(service = %m.host_service_id, "no such socket service");
            }
            GuestMessage::Unknown(kind) => {
                complain!(
                    st,
                    kind = kind.get(),
                    "unknown message of the guest ignored"
                );
            }
            other => complain!(
                st,
                "message of the guest ignored: {:?}",
                other.message_type()
            ),
        }
        Ok(())
    }
}

impl MessageSink for Server {
    fn post_message(
        &self,
        connection: ConnectionId,
        message_type: u32,
        payload: &[u8],
    ) -> HvStatus {
        let newer = self.config.max_version.uses_message_connection_id();
        let ours = connection == ConnectionId::MESSAGE
            || (newer && connection == ConnectionId::MESSAGE_V5);
        if !ours {
            return HvStatus::INVALID_CONNECTION_ID;
        }
        if message_type != SynicMessageType::CHANNEL.get() {
            return HvStatus::INVALID_PARAMETER;
        }
        let mut st = self.lock();
        match self.handle(&mut st, connection, payload) {
            Ok(()) => HvStatus::SUCCESS,
            Err(status) => status,
        }
    }

    /// Waits until the VSPs have let go of the guest's memory, at most 30 seconds.
    fn reset(&self) {
        let mut st = self.lock();
        self.disconnect(&mut st, After::Reset);
        let done = self.wait(st, VSP_TIMEOUT, |st| {
            matches!(st.connection, Connection::Disconnected)
        });
        if !done {
            tracing::error!("a service provider does not let go of the guest's memory");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let st = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The threads of the VSPs end when they see this; those of the devices when their queues
        // go, and they close what is open.
        for entry in st.channels.values() {
            if let Some(control) = &entry.control {
                control.stop();
            }
        }
    }
}

fn event_connection(id: ChannelId) -> ConnectionId {
    ConnectionId::new(EVENT_CONNECTION_BASE | id.get())
}

/// The channels of a device, sub-channels first.
fn channels_of(st: &State, number: u64) -> Vec<ChannelId> {
    let mut channels: Vec<_> = st
        .channels
        .iter()
        .filter(|(_, c)| c.device == number)
        .map(|(id, c)| (c.index == 0, *id))
        .collect();
    channels.sort();
    channels.into_iter().map(|(_, id)| id).collect()
}

fn device_instance(st: &State, number: u64) -> Option<Guid> {
    st.devices.get(&number).map(|d| d.params.instance)
}

/// Queues a call for the VSP. False if its thread has ended.
fn queue(device: &Device, job: Job) -> bool {
    device.jobs.as_ref().is_some_and(|q| q.send(job).is_ok())
}

/// The thread that sends waiting messages. Runs until none is left.
fn flush_outbox(server: &Weak<Server>) {
    loop {
        thread::sleep(OUTBOX_RETRY);
        let Some(server) = server.upgrade() else {
            return;
        };
        let mut st = server.lock();
        while let Some((target, buf)) = st.outbox.front() {
            if !server.post(*target, buf) {
                break;
            }
            st.outbox.pop_front();
        }
        if st.outbox.is_empty() {
            st.outbox_thread = false;
            return;
        }
    }
}

/// A device as its VSP sees it: what it can ask of the bus. It does not keep the device alive.
#[derive(Clone)]
pub struct DeviceHandle {
    server: Weak<Server>,
    device: u64,
}

impl DeviceHandle {
    pub(super) fn new(server: Weak<Server>, device: u64) -> Self {
        Self { server, device }
    }

    /// Offers sub-channels 1 to `count` to the guest, as far as they are not offered yet. The
    /// server takes them back when the primary channel closes.
    ///
    /// # Errors
    /// The device is gone, its primary channel is not open, or all numbers are in use.
    pub fn offer_subchannels(&self, count: u16) -> Result<(), OfferError> {
        let server = self.server.upgrade().ok_or(OfferError::Gone)?;
        server.offer_subchannels(self.device, count)
    }
}

/// A device that is offered. Dropping it takes the device away.
#[must_use = "dropping the handle takes the device away"]
pub struct OfferHandle {
    server: Weak<Server>,
    device: u64,
}

impl OfferHandle {
    /// The device, as its VSP sees it.
    pub fn device(&self) -> DeviceHandle {
        DeviceHandle::new(self.server.clone(), self.device)
    }

    /// Takes the device away: its VSP closes all channels, then the guest hears of it. Does not
    /// wait for that.
    pub fn rescind(self) {}

    /// Takes the device away and waits until its VSP has ended and the guest has let go of it.
    /// Returns false if that takes longer than `timeout`; it then still happens.
    ///
    /// Must not be called by a VSP.
    pub fn rescind_and_wait(self, timeout: Duration) -> bool {
        let Some(server) = self.server.upgrade() else {
            return true;
        };
        let device = self.device;
        drop(self);
        server.wait(server.lock(), timeout, |st| {
            !st.devices.contains_key(&device)
        })
    }
}

impl Drop for OfferHandle {
    fn drop(&mut self) {
        if let Some(server) = self.server.upgrade() {
            server.remove_device(&mut server.lock(), self.device);
        }
    }
}
