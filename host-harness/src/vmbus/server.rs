// SPDX-License-Identifier: MIT OR Apache-2.0

//! The VMBus server: its state, its messages in both directions, and its public face.
//!
//! What a message means in which state is decided by the state machines of
//! [`hv_proto::server`]. This module keeps the tables of devices, channels and GPADLs, sends the
//! messages and has the VSPs called; `connection.rs` and `offers.rs` have the rest of the methods.
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
//! drops anything of a VSP, with the lock held. Events are published with it held. VSPs may call the server from any thread.
//!
//! # Limits
//! Everything that a guest can make the server keep is bounded: channels by their numbers (2047),
//! GPADLs by [`super::MAX_PER_CHANNEL`] and [`super::MAX_PAGES`], calls of VSPs by the states of
//! channels, messages to the guest as follows: while messages wait because the SynIC's queue is
//! full, the guest's own messages are turned away (HV_STATUS_INSUFFICIENT_BUFFERS, upon which a
//! guest tries again later), except those that begin or end a connection.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use hv_proto::guid::Guid;
use hv_proto::hypercall::HvStatus;
use hv_proto::ids::{ChannelId, ConnectionId, GpadlId};
use hv_proto::message::{
    GuestMessage, HostMessage, Message, MessageBuf, MessageHeader, MessageType, TlConnectResult,
    read_prefix,
};
use hv_proto::monitor::MonitorId;
use hv_proto::server::{Channel, Connection, MessageTarget, Refusal, UnloadDecision};
use hv_proto::synic::SynicMessageType;
use hv_proto::version::Version;
use serde::Serialize;
use vm_memory::GuestAddress;

use super::channel::ChannelControl;
use super::counters::{CounterSnapshot, Counters};
use super::device::Job;
use super::gpa::GuestMem;
use super::gpadl::GpadlTable;
use super::monitor;
use super::trace::Trace;
use super::vsp::OfferParams;
use crate::counters::Counter;
use crate::events::{Event, Events};
use crate::hypervisor::{MessageSink, SynicError, SynicPort};

/// Most messages that wait for the SynIC. Those about channels and GPADLs are fewer, by their
/// states; a guest that makes contact again and again and takes no answer gets here.
const MAX_OUTBOX: usize = 16 * 1024;

/// What a guest hears that connects a socket to the host (`STATUS_CONNECTION_REFUSED` of NTSTATUS).
const STATUS_CONNECTION_REFUSED: u32 = 0xc000_0236;

/// How often waiting messages are tried again.
const OUTBOX_RETRY: Duration = Duration::from_millis(2);

/// How long a reset of the machine and [`Server::shutdown`] wait for VSPs.
const VSP_TIMEOUT: Duration = Duration::from_secs(30);

/// What a server is made with.
#[derive(Clone)]
pub struct ServerConfig {
    /// The newest version that is offered to the guest.
    pub max_version: Version,
    /// Number of virtual processors; their indices are 0 and up.
    pub vp_count: u32,
    /// Where messages and packet headers are traced to.
    pub trace: Option<Arc<Trace>>,
    /// What [`OfferParams::monitor_latency`] is for devices that leave it open.
    pub monitor_latency: Option<Duration>,
    /// Where to publish what happens on the bus.
    pub events: Events,
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

/// What the server is doing, for display.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// The version of the connection, `None` if there is none.
    pub version: Option<String>,
    /// All devices that exist.
    pub devices: Vec<DeviceStatus>,
    /// All channels that exist.
    pub channels: Vec<ChannelStatus>,
    /// Number of GPADLs.
    pub gpadls: usize,
}

/// A device, for display.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// The class GUID of its offer.
    pub class: String,
    /// The instance GUID of its offer, by which the guest's sysfs calls it.
    pub instance: String,
    /// The host has taken it away, and the guest has yet to let go of it.
    pub leaving: bool,
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
    /// Where it stands: `hidden` (not offered on this connection), `offered`, `opening`, `open`,
    /// `closing` or `rescinded` (the guest has yet to let go of it).
    pub state: String,
    /// The virtual processor that gets its interrupts.
    pub target_vp: u32,
    /// What went over it.
    pub counters: CounterSnapshot,
}

/// One channel.
pub(super) struct Entry {
    pub(super) device: u64,
    pub(super) index: u16,
    pub(super) machine: Channel,
    /// Changes with each opening.
    pub(super) serial: u64,
    /// The ring was found damaged while the VSP was still opening the channel.
    pub(super) failed: bool,
    /// The host has taken the channel away.
    pub(super) rescinded: bool,
    pub(super) control: Option<ChannelControl>,
    /// Keeps the guest's signals bound to the channel's event.
    pub(super) binding: Option<Box<dyn Send>>,
    pub(super) ring_gpadl: Option<(GpadlId, u64)>,
    pub(super) target_vp: Arc<AtomicU32>,
    pub(super) counters: Arc<Counters>,
    pub(super) monitor: Option<MonitorId>,
}

/// One device.
pub(super) struct Device {
    pub(super) name: Arc<str>,
    pub(super) params: OfferParams,
    /// `None` once the device's thread was told to end.
    pub(super) jobs: Option<Sender<Job>>,
    /// Calls of the VSP that are under way.
    pub(super) busy: u32,
    /// A channel was opened since the last reset of the VSP.
    pub(super) used: bool,
    /// The host has taken the device away.
    pub(super) removed: bool,
    /// Has to wait until the guest lets go of a former device with the same instance.
    pub(super) held: bool,
}

impl Device {
    /// Queues a call of the VSP. False if its thread has ended.
    pub(super) fn call(&mut self, job: Job) -> bool {
        let queued = self.jobs.as_ref().is_some_and(|q| q.send(job).is_ok());
        if queued {
            self.busy += 1;
        }
        queued
    }
}

pub(super) struct State {
    pub(super) connection: Connection,
    /// The last connection that was told of still stands.
    pub(super) connected: bool,
    /// The connection has ended, and VSPs are still closing its channels.
    pub(super) resetting: bool,
    /// The page in which the guest signals, if it named a good one.
    pub(super) monitor_page: Option<GuestAddress>,
    pub(super) channels: BTreeMap<ChannelId, Entry>,
    pub(super) devices: BTreeMap<u64, Device>,
    pub(super) gpadls: GpadlTable,
    /// Messages that the SynIC has no room for now.
    pub(super) outbox: VecDeque<(MessageTarget, MessageBuf)>,
    outbox_thread: bool,
    monitor_thread: bool,
    pub(super) next_channel: u32,
    pub(super) next_device: u64,
    pub(super) next_serial: u64,
    pub(super) complaints: Complaints,
}

/// Limits how often the log tells of a guest's mistakes.
pub(super) struct Complaints {
    since: Instant,
    count: u32,
}

impl Complaints {
    const PERIOD: Duration = Duration::from_secs(5);
    const MAX: u32 = 20;

    pub(super) fn allowed(&mut self) -> bool {
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
pub(super) use complain;

/// The VMBus server of one virtual machine.
pub struct Server {
    weak: Weak<Server>,
    mem: GuestMem,
    synic: Arc<dyn SynicPort>,
    config: ServerConfig,
    state: Mutex<State>,
    changed: Condvar,
    /// Messages that the SynIC did not take.
    unsent: Counter,
}

impl Server {
    /// A server without devices. The guest's messages come in through its [`MessageSink`] side.
    pub fn new(mem: GuestMem, synic: Arc<dyn SynicPort>, config: ServerConfig) -> Arc<Self> {
        let state = State {
            connection: Connection::new(config.max_version),
            connected: false,
            resetting: false,
            monitor_page: None,
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
        };
        Arc::new_cyclic(|weak| Self {
            weak: weak.clone(),
            mem,
            synic,
            config,
            state: Mutex::new(state),
            changed: Condvar::new(),
            unsent: Counter::default(),
        })
    }

    /// What the server is doing.
    pub fn status(&self) -> Status {
        let st = self.lock();
        let channel = |(id, entry): (&ChannelId, &Entry)| ChannelStatus {
            id: id.get(),
            name: st
                .devices
                .get(&entry.device)
                .map_or_else(String::new, |d| d.name.to_string()),
            subchannel_index: entry.index,
            state: format!("{:?}", entry.machine.state()).to_lowercase(),
            target_vp: entry.target_vp.load(Ordering::Relaxed),
            counters: entry.counters.snapshot(),
        };
        let device = |device: &Device| DeviceStatus {
            name: device.name.to_string(),
            class: device.params.class.to_string(),
            instance: device.params.instance.to_string(),
            leaving: device.removed,
        };
        Status {
            version: st.connection.version().map(|v| v.to_string()),
            devices: st.devices.values().map(device).collect(),
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
        self.machine_reset(&mut st);
        let done = self.wait(st, VSP_TIMEOUT, |st| st.devices.is_empty());
        if let Some(trace) = self.trace() {
            trace.flush();
        }
        done
    }

    /// Speaks all versions up to this one with the guest's next connection. A guest that is connected
    /// must unload first.
    pub fn set_max_version(&self, max_version: Version) {
        self.lock().connection.set_max_version(max_version);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // No code of a VSP runs with the lock held, so a panic there cannot poison it; if the
        // server itself has a bug, going on is better for the other devices than stopping.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn weak(&self) -> Weak<Self> {
        self.weak.clone()
    }

    pub(super) fn memory(&self) -> &GuestMem {
        &self.mem
    }

    pub(super) fn synic(&self) -> &Arc<dyn SynicPort> {
        &self.synic
    }

    pub(super) fn trace(&self) -> Option<&Arc<Trace>> {
        self.config.trace.as_ref()
    }

    /// Tells the readers of events.
    pub(super) fn publish(&self, event: Event) {
        self.config.events.publish(event);
    }

    pub(super) fn monitor_latency(&self) -> Option<Duration> {
        self.config.monitor_latency
    }

    pub(super) fn has_vp(&self, vp: u32) -> bool {
        vp < self.config.vp_count
    }

    /// Something changed that a thread may be waiting for.
    pub(super) fn notify(&self) {
        self.changed.notify_all();
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

    /// Sends a message to the guest, after those that wait already.
    pub(super) fn send<M: Message>(&self, st: &mut State, target: MessageTarget, message: &M) {
        let buf = message.encode();
        if let Some(trace) = self.trace()
            && let Ok(parsed) = HostMessage::parse(&buf, Some(Version::NEWEST))
        {
            trace.host_message(target.vp.get(), target.sint, &parsed);
        }
        if st.outbox.is_empty() && self.post(target, &buf) {
            return;
        }
        if st.outbox.len() >= MAX_OUTBOX {
            complain!(st, "too many messages wait for the guest, dropping one");
            return;
        }
        st.outbox.push_back((target, buf));
        if !st.outbox_thread {
            let server = self.weak();
            let spawned = thread::Builder::new()
                .name("vmbus-outbox".into())
                .spawn(move || flush_outbox(&server));
            // Without the thread, the next message tries again.
            st.outbox_thread = spawned.is_ok();
        }
    }

    /// Hands a message to the SynIC. Returns false if its queue is full.
    fn post(&self, target: MessageTarget, buf: &MessageBuf) -> bool {
        let kind = SynicMessageType::CHANNEL.get();
        match self.synic.post_message(target.vp, target.sint, kind, buf) {
            Ok(()) => true,
            Err(SynicError::QueueFull(_)) => false,
            Err(error) => {
                if let Some(times) = self.unsent.complain() {
                    let message = buf.message_type();
                    tracing::warn!(%error, ?message, times, "cannot send to the guest");
                }
                true
            }
        }
    }

    /// Sends to the guest of the present connection, if there is one.
    pub(super) fn reply<M: Message>(&self, st: &mut State, message: &M) {
        if let Some(target) = st.connection.agreed().map(|a| a.target) {
            self.send(st, target, message);
        }
    }

    /// Starts the thread that looks at the monitor page, unless it runs.
    pub(super) fn start_monitor(&self, st: &mut State) {
        if st.monitor_thread {
            return;
        }
        let server = self.weak();
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
        let mut pause = None;
        for entry in st.channels.values() {
            let monitored = (entry.monitor, &entry.control, st.monitor_page);
            let (Some(id), Some(control), Some(page)) = monitored else {
                continue;
            };
            if monitor::take_pending(&self.mem, page, id) {
                control.signalled();
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

    /// Handles a message of the guest.
    fn handle(
        &self,
        st: &mut State,
        connection: ConnectionId,
        payload: &[u8],
    ) -> Result<(), HvStatus> {
        let kind = read_prefix::<MessageHeader>(payload).map(|h| h.message_type);
        let vital = matches!(
            kind,
            Some(MessageType::INITIATE_CONTACT | MessageType::UNLOAD)
        );
        if !vital && !st.outbox.is_empty() {
            return Err(HvStatus::INSUFFICIENT_BUFFERS);
        }
        let message = match GuestMessage::parse(payload, st.connection.version()) {
            Ok(message) => message,
            Err(error) => {
                if let Some(trace) = self.trace() {
                    trace.bad_message(connection.get(), payload, &error.to_string());
                }
                complain!(st, "message of the guest ignored: {error}");
                return Ok(());
            }
        };
        if let Some(trace) = self.trace() {
            trace.guest_message(connection.get(), &message);
        }
        match st.connection.admit(connection, &message) {
            Ok(()) => {}
            Err(Refusal::WrongConnection) => return Err(HvStatus::INVALID_CONNECTION_ID),
            Err(why) => {
                complain!(st, "{:?} ignored: {why}", message.message_type());
                return Ok(());
            }
        }
        match message {
            GuestMessage::InitiateContact(m) => self.initiate_contact(st, connection, &m),
            GuestMessage::Unload(_) => match st.connection.unload() {
                UnloadDecision::ResetFirst => self.begin_reset(st),
                UnloadDecision::Ignore => complain!(st, "UNLOAD without a connection"),
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
                // There are no sockets to the host: nobody listens.
                tracing::debug!(service = %m.host_service_id, "no such socket service");
                let answer = TlConnectResult {
                    guest_endpoint_id: m.guest_endpoint_id,
                    host_service_id: m.host_service_id,
                    status: STATUS_CONNECTION_REFUSED.into(),
                };
                self.reply(st, &answer);
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
        let mut st = self.lock();
        if !st.connection.has_connection(connection) {
            return HvStatus::INVALID_CONNECTION_ID;
        }
        if message_type != SynicMessageType::CHANNEL.get() {
            return HvStatus::INVALID_PARAMETER;
        }
        match self.handle(&mut st, connection, payload) {
            Ok(()) => HvStatus::SUCCESS,
            Err(status) => status,
        }
    }

    /// Waits until the VSPs have let go of the guest's memory, at most 30 seconds.
    fn reset(&self) {
        let mut st = self.lock();
        self.machine_reset(&mut st);
        if !self.wait(st, VSP_TIMEOUT, |st| !st.resetting) {
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
                control.finish();
            }
        }
    }
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
    pub(super) fn new(server: Weak<Server>, device: u64) -> Self {
        Self { server, device }
    }

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
        let (server, device) = (self.server.upgrade(), self.device);
        drop(self);
        server.is_none_or(|server| {
            server.wait(server.lock(), timeout, |st| {
                !st.devices.contains_key(&device)
            })
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
