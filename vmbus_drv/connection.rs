// SPDX-License-Identifier: GPL-2.0

//! The connection to the host: versions, control messages, offers, and the table of channels.
//!
//! # Contexts
//!
//! An interrupt takes the event flags and gives each to its channel; if a message waits, it starts
//! a work item of its CPU. That work item handles one message after the other: it only ever stores,
//! wakes and queues, and never waits for the host, so that answers always get through. Devices are
//! made and removed by an ordered queue, sub-channels by another one (a driver's probe, which the
//! first one may wait for, can wait for sub-channels), and drivers are told of rescinds by a third
//! one, so that whatever waits for the host in the other two ends at once.

mod contact;
mod cpus;
mod offers;

use crate::{
    channel::Channel,
    cpu,
    hypercall,
    log::{
        err_limited,
        warn_limited,
        Show, //
    },
    memory::SharedPage,
    noio::NoIo,
    queue::OwnedQueue,
    rcu::RcuArc,
    request::{
        Key,
        Questions, //
    },
    stats::{
        Mistakes,
        Stats, //
    },
    synic::Synic,
    wait::Event, //
};
use hv_proto::{
    client,
    hypercall::{
        HvStatus,
        PostMessage,
        SignalEvent, //
    },
    ids::{
        ChannelId,
        ConnectionId,
        GpadlId,
        MAX_CHANNELS, //
    },
    message::{
        HostMessage,
        MessageBuf,
        OfferChannel, //
    },
    monitor::MonitorId,
    synic::SynicMessageType,
    version::Version, //
};
use kernel::{
    cpu::nr_cpu_ids,
    device,
    fmt,
    impl_has_work,
    new_mutex,
    new_work,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        rcu,
        Arc,
        Mutex, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

/// How often a message is posted that the hypervisor has no room for.
const POST_TRIES: u32 = 100;

/// Messages that one run of the message work item handles.
const MESSAGE_BUDGET: usize = 64;

/// How much memory a host may keep before it gets no more, in bytes.
const MAX_LOST: u64 = 64 << 20;

/// The work queues. They outlive the connection, because channels hold that from work items.
pub(crate) struct Queues {
    /// Messages of the host, on the CPU that got the interrupt.
    messages: OwnedQueue,
    /// Packets, in softirq context on the CPU that got the interrupt.
    pub(crate) softirq: OwnedQueue,
    /// Devices come and go, one at a time.
    pub(crate) devices: OwnedQueue,
    /// Sub-channels come and go, one at a time.
    pub(crate) subchannels: OwnedQueue,
    /// Drivers are told of rescinds.
    pub(crate) notify: OwnedQueue,
}

impl Queues {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            messages: OwnedQueue::per_cpu(c"vmbus_messages")?,
            softirq: OwnedQueue::softirq(c"vmbus_packets")?,
            devices: OwnedQueue::ordered(c"vmbus_devices")?,
            subchannels: OwnedQueue::ordered(c"vmbus_subchans")?,
            notify: OwnedQueue::unbound(c"vmbus_notify")?,
        })
    }

    /// Waits for everything that is queued, and for what that queues in turn.
    pub(crate) fn flush(&self) {
        // Messages queue the rest; notifications and devices queue each other once.
        for _ in 0..2 {
            self.messages.flush();
            self.softirq.flush();
            self.notify.flush();
            self.subchannels.flush();
            self.devices.flush();
        }
    }
}

/// What the bus has on one CPU.
#[pin_data]
pub(crate) struct PerCpu {
    connection: RcuArc<Connection>,
    synic: Synic,
    /// Channels may be given to it.
    usable: Atomic<bool>,
    #[pin]
    work: Work<PerCpu>,
}

impl_has_work! {
    impl HasWork<Self> for PerCpu { self.work }
}

impl WorkItem for PerCpu {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let guard = rcu::read_lock();
        let connection: Option<Arc<Connection>> = this.connection.get(&guard).map(Arc::from);
        drop(guard);
        if let Some(connection) = connection {
            connection.handle_messages(&this);
        }
    }
}

/// Whether the host knows of us.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum State {
    /// No version agreed.
    Disconnected = 0,
    /// Channels can be offered.
    Connected = 1,
    /// No new devices any more.
    Leaving = 2,
}

/// Words of a bitmap of channel ids.
const REFUSED_WORDS: usize = MAX_CHANNELS / u32::BITS as usize;

/// What the host hears of when contact is made.
struct HostPages {
    /// Before version 5.0, the host is told of signals by a bit in the second half of this page.
    interrupt: SharedPage,
    /// Monitored notifications: host to guest, and guest to host.
    monitor: [SharedPage; 2],
}

impl HostPages {
    fn new() -> Result<Self> {
        Ok(Self {
            interrupt: SharedPage::new()?,
            monitor: [SharedPage::new()?, SharedPage::new()?],
        })
    }
}

/// The connection.
#[pin_data(PinnedDrop)]
pub(crate) struct Connection {
    /// Parent of all devices: the ACPI device.
    parent: ARef<device::Device>,
    queues: Arc<Queues>,
    /// Where the protocol stands.
    #[pin]
    protocol: Mutex<client::Connection>,
    state: Atomic<u32>,
    /// Agreed version as a raw number, 0 if there is none.
    version: Atomic<u32>,
    /// Where control messages are posted to.
    message_connection: Atomic<u32>,
    per_cpu: KVec<Option<Arc<PerCpu>>>,
    channels: KVVec<RcuArc<Channel>>,
    /// Highest id of a channel that was ever offered.
    highest: Atomic<u32>,
    next_gpadl: Atomic<u32>,
    pages: Arc<HostPages>,
    /// The host may use `pages`: they must not be freed.
    host_has_pages: Atomic<bool>,
    /// Held while an offer is judged, and by a rescind: messages can come on several CPUs at once.
    #[pin]
    offering: Mutex<()>,
    /// Ids of offers that were refused, to be given back: one bit each.
    refused: [Atomic<u32>; REFUSED_WORDS],
    #[pin]
    refused_work: Work<Connection>,
    mistakes: Mistakes,
    #[pin]
    questions: Questions,
    #[pin]
    offers_delivered: Event,
    /// UNLOAD_RESPONSE came: what a guest that crashes looks for.
    unloaded: Atomic<bool>,
    /// Bytes of memory that the host has kept.
    lost: Atomic<u64>,
    /// Channels that exist.
    live: Atomic<u32>,
}

impl_has_work! {
    impl HasWork<Self> for Connection { self.refused_work }
}

impl WorkItem for Connection {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.release_refused();
    }
}

impl Connection {
    /// Allocates everything; nothing is shared with the host yet.
    pub(crate) fn new(parent: ARef<device::Device>, queues: Arc<Queues>) -> Result<Arc<Self>> {
        let mut channels = KVVec::with_capacity(MAX_CHANNELS, GFP_KERNEL)?;
        for _ in 0..MAX_CHANNELS {
            channels.push(RcuArc::empty(), GFP_KERNEL)?;
        }
        let mut per_cpu = KVec::with_capacity(nr_cpu_ids() as usize, GFP_KERNEL)?;
        for cpu in 0..nr_cpu_ids() {
            let entry = if cpu::is_present(cpu) {
                Some(PerCpu::new()?)
            } else {
                None
            };
            per_cpu.push(entry, GFP_KERNEL)?;
        }
        let pages = Arc::new(HostPages::new()?, GFP_KERNEL)?;
        let connection = Arc::pin_init(
            pin_init!(Self {
                parent,
                queues,
                protocol <- new_mutex!(client::Connection::new()),
                state: Atomic::new(State::Disconnected as u32),
                version: Atomic::new(0),
                message_connection: Atomic::new(ConnectionId::MESSAGE.get()),
                per_cpu,
                channels,
                highest: Atomic::new(0),
                next_gpadl: Atomic::new(GpadlId::FIRST.get()),
                pages,
                host_has_pages: Atomic::new(false),
                offering <- new_mutex!(()),
                refused: core::array::from_fn(|_| Atomic::new(0)),
                refused_work <- new_work!("vmbus refused offers"),
                mistakes: Mistakes::new(),
                questions <- Questions::new(),
                offers_delivered <- Event::new(),
                unloaded: Atomic::new(false),
                lost: Atomic::new(0),
                live: Atomic::new(0),
            }),
            GFP_KERNEL,
        )?;
        for entry in connection.per_cpu.iter().flatten() {
            entry.connection.replace(Some(connection.clone()));
        }
        Ok(connection)
    }

    /// Breaks the circle of references between the connection and its CPUs.
    pub(crate) fn forget_cpus(&self) {
        for entry in self.per_cpu.iter().flatten() {
            drop(entry.connection.replace(None));
        }
    }

    // --------------------------------------------------------------------------------------------
    // Small things

    pub(crate) fn parent(&self) -> &device::Device {
        &self.parent
    }

    pub(crate) fn queues(&self) -> &Arc<Queues> {
        &self.queues
    }

    /// The agreed version.
    pub(crate) fn version(&self) -> Option<Version> {
        Version::from_raw(self.version.load(Acquire))
    }

    fn is_in(&self, state: State) -> bool {
        self.state.load(Acquire) == state as u32
    }

    fn set_state(&self, state: State) {
        self.state.store(state as u32, Release);
    }

    /// Whether the host knows of us.
    pub(crate) fn is_connected(&self) -> bool {
        !self.is_in(State::Disconnected)
    }

    fn per_cpu(&self, cpu: u32) -> Option<&Arc<PerCpu>> {
        self.per_cpu.get(cpu as usize)?.as_ref()
    }

    /// Writes the counters: the host's mistakes, and a line for each channel.
    pub(crate) fn write_counters(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mistakes = &self.mistakes;
        writeln!(
            f,
            "invalid_messages {} unexpected_messages {} refused_offers {} unknown_rescinds {}",
            mistakes.invalid.get(),
            mistakes.unexpected.get(),
            mistakes.refused_offers.get(),
            mistakes.unknown_rescinds.get(),
        )?;
        self.for_each_channel(|channel| {
            let stats = channel.stats();
            writeln!(
                f,
                "channel {} sent {} received {} oversized {} corrupt {}",
                channel.id().get(),
                stats.sent.get(),
                stats.received.get(),
                stats.oversized.get(),
                stats.corrupt.get(),
            )?;
            Ok(())
        })
        .map_err(|_| fmt::Error)
    }

    pub(crate) fn next_gpadl_id(&self) -> GpadlId {
        let mut id = self.next_gpadl.load(Relaxed);
        loop {
            let this = GpadlId::new(id);
            match self.next_gpadl.cmpxchg(id, this.next().get(), Relaxed) {
                Ok(_) => return this,
                Err(now) => id = now,
            }
        }
    }

    /// The host keeps memory that it should have let go of.
    pub(crate) fn memory_lost(&self, bytes: u64) {
        self.lost.add(bytes, Relaxed);
    }

    /// Whether the host may be given memory: it has not kept too much.
    pub(crate) fn may_share(&self) -> bool {
        self.lost.load(Relaxed) < MAX_LOST
    }

    pub(crate) fn channel_made(&self) {
        self.live.fetch_add(1, Relaxed);
    }

    pub(crate) fn channel_gone(&self) {
        self.live.fetch_sub(1, Release);
    }

    /// The channel with this id.
    pub(crate) fn channel(&self, id: ChannelId) -> Option<Arc<Channel>> {
        let guard = rcu::read_lock();
        let slot = self.channels.get(id.index()?)?;
        slot.get(&guard).map(Arc::from)
    }

    /// All channels, those that are leaving included.
    pub(crate) fn for_each_channel(&self, mut f: impl FnMut(&Arc<Channel>) -> Result) -> Result {
        for id in 0..=self.highest.load(Acquire) {
            if let Some(channel) = self.channel(ChannelId::new(id)) {
                f(&channel)?;
            }
        }
        Ok(())
    }

    /// A page of the monitor mechanism: 0 host to guest, 1 guest to host.
    pub(crate) fn monitor_page(&self, index: usize) -> Option<&SharedPage> {
        self.pages.monitor.get(index)
    }

    pub(crate) fn ask(
        &self,
        key: Key,
        channel: Option<&Channel>,
        ask: impl FnOnce() -> Result,
    ) -> Result<HostMessage> {
        self.questions.ask(key, channel, ask)
    }

    pub(crate) fn rescind_questions(&self, channel: ChannelId) {
        self.questions.rescind(channel);
    }

    // --------------------------------------------------------------------------------------------
    // To the host

    /// Posts a control message. Sleeps if the hypervisor has no room for it.
    pub(crate) fn post(&self, message: &MessageBuf) -> Result {
        let connection = ConnectionId::new(self.message_connection.load(Relaxed));
        self.post_to(connection, message, true, sleep)
            .map_err(|status| {
                err_limited!("{:?}: {:?}\n", message.message_type(), status);
                if status.is_retryable() || status == HvStatus::INVALID_CONNECTION_ID {
                    EAGAIN
                } else {
                    EINVAL
                }
            })
    }

    /// Posts a message, several times if the hypervisor has no room for it. `patient` also waits
    /// for a connection that the host may be about to make.
    fn post_to(
        &self,
        connection: ConnectionId,
        message: &MessageBuf,
        patient: bool,
        delay: impl Fn(u32),
    ) -> core::result::Result<(), HvStatus> {
        let input = PostMessage::new(connection, SynicMessageType::CHANNEL, message)
            .ok_or(HvStatus::INVALID_PARAMETER)?;
        let mut us = 1u32;
        let mut status = HvStatus::SUCCESS;
        for _ in 0..POST_TRIES {
            status = hypercall::post_message(&input);
            if status.is_success() {
                return Ok(());
            }
            let unknown = status == HvStatus::INVALID_CONNECTION_ID;
            let again = status.is_retryable() || (patient && unknown);
            if !again {
                break;
            }
            delay(us);
            us = us.saturating_mul(2).min(32_768);
        }
        Err(status)
    }

    /// Signals the host that it should look at a channel's rings. Any context.
    pub(crate) fn signal(&self, offer: &OfferChannel, stats: &Stats) {
        let monitor = offer.monitor();
        if monitor.is_some() || !offer.has_dedicated_interrupt() {
            self.set_interrupt_bit(offer.channel_id);
        }
        match monitor {
            Some(id) => self.set_monitor_bit(id),
            None => {
                stats.events.count();
                let status = hypercall::signal_event(SignalEvent::new(offer.connection_id, 0));
                // A host that takes the channel back forgets its connection first: the rescind comes.
                let gone = status == HvStatus::INVALID_CONNECTION_ID;
                if !status.is_success() && !gone {
                    warn_limited!("channel {}: signal: {:?}\n", offer.channel_id.get(), status);
                }
            }
        }
    }

    /// Sets the channel's bit in the half of the interrupt page that the host reads.
    fn set_interrupt_bit(&self, id: ChannelId) {
        let bit = id.get() % u32::BITS;
        let offset = (id.get() / u32::BITS)
            .saturating_mul(4)
            .saturating_add(hv_proto::PAGE_SIZE as u32 / 2);
        if let Some(word) = self.pages.interrupt.word::<u32>(offset as usize) {
            set_bit(word, bit);
        }
    }

    /// Sets the channel's bit in the monitor page that the host polls.
    fn set_monitor_bit(&self, id: MonitorId) {
        let page = &self.pages.monitor[1];
        if let Some(word) = page.word::<u32>(id.pending_offset()) {
            set_bit(word, id.bit() as u32);
        }
    }

    // --------------------------------------------------------------------------------------------
    // From the host

    /// Hard interrupt on this CPU.
    pub(crate) fn interrupt(&self, guard: &rcu::Guard) {
        let Some(per_cpu) = self.per_cpu(cpu::current()) else {
            return;
        };
        per_cpu
            .synic
            .take_events(self.highest.load(Relaxed), |flag| {
                let channel = ChannelId::new(flag)
                    .index()
                    .and_then(|index| self.channels.get(index))
                    .and_then(|slot| slot.get(guard));
                if let Some(channel) = channel {
                    Channel::interrupt(channel, guard);
                }
            });
        if per_cpu.synic.has_message() {
            // If it is queued already, it will see the message.
            let _ = self.queues.messages.enqueue(per_cpu.clone());
        }
    }

    /// Work item of one CPU: handles the messages in its slot.
    fn handle_messages(self: &Arc<Self>, per_cpu: &Arc<PerCpu>) {
        // A disk may be waiting for the next message: its rescind.
        let _noio = NoIo::begin();
        for _ in 0..MESSAGE_BUDGET {
            let Some(message) = per_cpu.synic.message() else {
                return;
            };
            if message.message_type == SynicMessageType::CHANNEL {
                match message.payload() {
                    Some(payload) => self.handle_message(payload),
                    None => {
                        self.mistakes.invalid.count();
                        warn_limited!("message with a length of {}\n", message.payload_size);
                    }
                }
            }
            per_cpu.synic.end_of_message(&message);
        }
        let _ = self.queues.messages.enqueue(per_cpu.clone());
    }

    fn handle_message(self: &Arc<Self>, payload: &[u8]) {
        self.questions.heard();
        let message = match HostMessage::parse(payload, self.version()) {
            Ok(message) => message,
            Err(error) => {
                self.mistakes.invalid.count();
                warn_limited!("{}\n", Show(error));
                return;
            }
        };
        let message_type = message.message_type();
        if let HostMessage::UnloadResponse(_) = message {
            // First: this CPU may stand still at any moment.
            self.unloaded.store(true, Release);
        }
        if !self.protocol.lock().accepts(&message) {
            self.mistakes.unexpected.count();
            warn_limited!("{:?} at a wrong time\n", message_type);
            return;
        }
        match message {
            HostMessage::OfferChannel(offer) => self.handle_offer(offer),
            HostMessage::RescindChannelOffer(rescind) => self.handle_rescind(rescind.channel_id),
            HostMessage::AllOffersDelivered(_) => self.offers_delivered.set(),
            answer => {
                if !self.questions.answer(answer) {
                    self.mistakes.unexpected.count();
                    warn_limited!("{:?} was not expected\n", message_type);
                }
            }
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Connection {
    /// Pages that the host has not let go of are never freed.
    fn drop(self: Pin<&mut Self>) {
        if self.host_has_pages.load(Relaxed) {
            core::mem::forget(self.pages.clone());
        }
    }
}

impl PerCpu {
    fn new() -> Result<Arc<Self>> {
        let synic = Synic::new()?;
        Arc::pin_init(
            pin_init!(Self {
                connection: RcuArc::empty(),
                usable: Atomic::new(false),
                synic,
                work <- new_work!("vmbus messages"),
            }),
            GFP_KERNEL,
        )
    }
}

/// Sets a bit of a word that the host reads and clears. Full barrier.
fn set_bit(word: &Atomic<u32>, bit: u32) {
    let mask = 1u32.wrapping_shl(bit);
    let mut old = word.load(Relaxed);
    while let Err(now) = word.cmpxchg(old, old | mask, Full) {
        old = now;
    }
}

/// Waits for `us` microseconds; process context.
fn sleep(us: u32) {
    fsleep(Delta::from_micros(i64::from(us)));
}
