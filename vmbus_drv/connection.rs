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

use crate::{
    channel::Channel,
    cpu::{
        self,
        CONNECT_CPU, //
    },
    hypercall,
    log::{
        warn_limited,
        Show, //
    },
    memory::SharedPage,
    queue::OwnedQueue,
    rcu::RcuArc,
    request::{
        Key,
        Questions, //
    },
    stats::Stats,
    synic::Synic,
    wait::Event, //
};
use hv_proto::{
    client::{
        self,
        check_offer,
        place_offer,
        Agreed,
        ContactParams,
        KnownChannel,
        OfferError,
        OfferRules,
        Placement,
        Step, //
    },
    guid,
    guid::Guid,
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
        Message,
        MessageBuf,
        OfferChannel,
        RelidReleased,
        RequestOffers,
        Unload, //
    },
    monitor::MonitorId,
    synic::SynicMessageType,
    version::Version, //
};
use kernel::{
    cpu::nr_cpu_ids,
    device,
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
        delay::{
            fsleep,
            udelay, //
        },
        Delta, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

/// How long the offers are waited for that the host makes at once, in milliseconds.
const OFFERS_TIMEOUT_MS: u32 = 60_000;

/// How long a crashing guest waits for the host to let go of its memory, in steps of 10 ms.
const CRASH_UNLOAD_STEPS: u32 = 10_000;

/// How often a message is posted that the hypervisor has no room for.
const POST_TRIES: u32 = 100;

/// Messages that one run of the message work item handles.
const MESSAGE_BUDGET: usize = 64;

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
    cpu: u32,
    synic: Synic,
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

/// The connection.
#[pin_data]
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
    /// Before version 5.0, the host is told of signals by a bit in the second half of this page.
    interrupt_page: SharedPage,
    /// Monitored notifications: host to guest, and guest to host.
    monitor_pages: [SharedPage; 2],
    #[pin]
    questions: Questions,
    #[pin]
    offers_delivered: Event,
    /// Channels that exist.
    live: Atomic<u32>,
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
                Some(PerCpu::new(cpu)?)
            } else {
                None
            };
            per_cpu.push(entry, GFP_KERNEL)?;
        }
        let interrupt_page = SharedPage::new()?;
        let monitor_pages = [SharedPage::new()?, SharedPage::new()?];
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
                interrupt_page,
                monitor_pages,
                questions <- Questions::new(),
                offers_delivered <- Event::new(),
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

    pub(crate) fn next_gpadl_id(&self) -> GpadlId {
        loop {
            let id = self.next_gpadl.fetch_add(1, Relaxed);
            if id != 0 {
                return GpadlId::new(id);
            }
        }
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
        self.monitor_pages.get(index)
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
                pr_err!("{:?}: {:?}\n", message.message_type(), status);
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
        if let Some(word) = self.interrupt_page.word::<u32>(offset as usize) {
            set_bit(word, bit);
        }
    }

    /// Sets the channel's bit in the monitor page that the host polls.
    fn set_monitor_bit(&self, id: MonitorId) {
        let page = &self.monitor_pages[1];
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
        for _ in 0..MESSAGE_BUDGET {
            let Some(message) = per_cpu.synic.message() else {
                return;
            };
            if message.message_type == SynicMessageType::CHANNEL {
                match message.payload() {
                    Some(payload) => self.handle_message(payload),
                    None => warn_limited!("message with a length of {}\n", message.payload_size),
                }
            }
            per_cpu.synic.end_of_message(&message);
        }
        let _ = self.queues.messages.enqueue(per_cpu.clone());
    }

    fn handle_message(self: &Arc<Self>, payload: &[u8]) {
        let message = match HostMessage::parse(payload, self.version()) {
            Ok(message) => message,
            Err(error) => {
                warn_limited!("{}\n", Show(error));
                return;
            }
        };
        let message_type = message.message_type();
        if !self.protocol.lock().accepts(&message) {
            warn_limited!("{:?} at a wrong time\n", message_type);
            return;
        }
        match message {
            HostMessage::OfferChannel(offer) => self.handle_offer(offer),
            HostMessage::RescindChannelOffer(rescind) => self.handle_rescind(rescind.channel_id),
            HostMessage::AllOffersDelivered(_) => self.offers_delivered.set(),
            answer => {
                if !self.questions.answer(answer) {
                    warn_limited!("{:?} was not expected\n", message_type);
                }
            }
        }
    }

    /// Checks an offer, and makes a channel of it.
    fn handle_offer(self: &Arc<Self>, offer: OfferChannel) {
        if !self.is_in(State::Connected) {
            return;
        }
        let result = self.judge_offer(&offer).map(|primary| {
            if self.accept_offer(offer, primary).is_err() {
                pr_err!("channel {}: no memory for it\n", offer.channel_id.get());
                self.release_id(offer.channel_id);
            }
        });
        if let Err(reason) = result {
            warn_limited!(
                "offer of channel {} ({}, {}): {}\n",
                offer.channel_id.get(),
                Show(offer.interface_id),
                Show(offer.instance_id),
                Show(reason)
            );
            if reason.must_release() {
                self.release_id(offer.channel_id);
            }
        }
    }

    /// The primary channel for an offered sub-channel, `None` for a device of its own.
    fn judge_offer(
        &self,
        offer: &OfferChannel,
    ) -> core::result::Result<Option<Arc<Channel>>, OfferError> {
        let rules = OfferRules {
            version: self.version().unwrap_or(Version::OLDEST),
            confidential: false,
            isolated: false,
        };
        check_offer(offer, &rules)?;
        let highest = self.highest.load(Acquire);
        let known = (0..=highest)
            .filter_map(|id| self.channel(ChannelId::new(id)))
            .map(|channel| {
                let offer = channel.offer();
                KnownChannel {
                    channel_id: channel.id(),
                    interface_id: offer.interface_id,
                    instance_id: offer.instance_id,
                    sub_channel_index: channel.subchannel_index(),
                    rescinded: channel.is_leaving(),
                }
            });
        match place_offer(offer, known)? {
            // The queue of devices is ordered, and the old one's removal is in it already.
            Placement::Primary | Placement::PrimaryAfter(_) => Ok(None),
            Placement::Subchannel { primary } => {
                let primary = self.channel(primary).ok_or(OfferError::NoPrimary)?;
                Ok(Some(primary))
            }
        }
    }

    fn accept_offer(
        self: &Arc<Self>,
        offer: OfferChannel,
        primary: Option<Arc<Channel>>,
    ) -> Result {
        let id = offer.channel_id;
        let slot = id
            .index()
            .and_then(|index| self.channels.get(index))
            .ok_or(EINVAL)?;
        let target_cpu = self.choose_cpu(&offer);
        let channel = Channel::new(self.clone(), offer, primary, target_cpu)?;
        slot.fill(channel.clone()).map_err(|_| EEXIST)?;

        // Only this work item offers channels, but it can run on several CPUs.
        let mut highest = self.highest.load(Relaxed);
        while highest < id.get() {
            match self.highest.cmpxchg(highest, id.get(), Release) {
                Ok(_) => break,
                Err(now) => highest = now,
            }
        }
        channel.schedule_update();
        Ok(())
    }

    /// The CPU that is to get a channel's interrupts. Channels of devices with much to say are
    /// spread: first those of one device over the CPUs, then all of them.
    fn choose_cpu(&self, offer: &OfferChannel) -> u32 {
        if !is_performance_critical(&offer.interface_id) {
            return CONNECT_CPU;
        }
        let load = |cpu| {
            let mut device = 0usize;
            let mut all = 0usize;
            let _ = self.for_each_channel(|other| {
                let theirs = other.offer();
                if other.target_cpu() == cpu && is_performance_critical(&theirs.interface_id) {
                    all = all.saturating_add(1);
                    if theirs.instance_id == offer.instance_id {
                        device = device.saturating_add(1);
                    }
                }
                Ok(())
            });
            (device, all)
        };
        (0..nr_cpu_ids())
            .filter(|&cpu| cpu::is_online(cpu) && cpu::is_housekeeping(cpu))
            .min_by_key(|&cpu| load(cpu))
            .unwrap_or(CONNECT_CPU)
    }

    fn handle_rescind(&self, id: ChannelId) {
        match self.channel(id) {
            Some(channel) => channel.rescind(),
            // Its offer was refused, and the id given back, before.
            None if self.is_in(State::Connected) => {
                warn_limited!("rescind of channel {}, which is not there\n", id.get());
            }
            None => {}
        }
    }

    /// Tells the host that it may use the id of a channel for another one.
    fn release_id(&self, id: ChannelId) {
        // The error has been logged. The host keeps the id then, which costs it nothing.
        let _ = self.post(&RelidReleased { channel_id: id }.encode());
    }

    /// Takes a channel out of the table. `message`, if any, gives its id back to the host.
    pub(crate) fn release(&self, channel: &Channel, message: Option<RelidReleased>) {
        let slot = channel
            .id()
            .index()
            .and_then(|index| self.channels.get(index));
        let removed = slot.and_then(|slot| slot.replace(None));
        if let Some(message) = message {
            self.release_id(message.channel_id);
        }
        drop(removed);
    }

    // --------------------------------------------------------------------------------------------
    // Connecting

    /// Agrees on a version with the host, and asks for its offers.
    ///
    /// # Errors
    ///
    /// `EINVAL` if `max_version` is older than all, `EOPNOTSUPP` if there is no version that both
    /// know and allow, or those of posting and waiting.
    pub(crate) fn connect(&self, max_version: u32) -> Result {
        let Some(max_version) = Version::at_most(max_version) else {
            pr_err!("max_version {:#x} is older than all\n", max_version);
            return Err(EINVAL);
        };
        let params = ContactParams {
            max_version,
            ..ContactParams::new(
                cpu::vp_index(CONNECT_CPU),
                self.interrupt_page.phys(),
                [self.monitor_pages[0].phys(), self.monitor_pages[1].phys()],
            )
        };
        let agreed = self.negotiate(&params)?;
        pr_info!(
            "Vmbus version:{}.{}\n",
            agreed.version.major(),
            agreed.version.minor()
        );
        self.request_offers()
    }

    /// Proposes versions until the host takes one.
    fn negotiate(&self, params: &ContactParams) -> Result<Agreed> {
        let mut step = self.protocol.lock().start(params);
        loop {
            let attempt = match step {
                Step::Post(attempt) => attempt,
                Step::Connected(agreed) => {
                    self.message_connection
                        .store(agreed.message_connection_id.get(), Relaxed);
                    self.version.store(agreed.version.raw(), Release);
                    self.set_state(State::Connected);
                    return Ok(agreed);
                }
                Step::Failed(error) => {
                    pr_err!("{}\n", Show(error));
                    return Err(EOPNOTSUPP);
                }
            };
            let message = attempt.message.encode();
            let mut failed = HvStatus::SUCCESS;
            let answer = self.ask(Key::Version, None, || {
                self.post_to(attempt.connection_id, &message, false, sleep)
                    .map_err(|status| {
                        failed = status;
                        EIO
                    })
            });
            let mut protocol = self.protocol.lock();
            step = match answer {
                Ok(HostMessage::VersionResponse(response)) => {
                    protocol.version_response(&response).map_err(|_| EIO)?
                }
                Err(_) if !failed.is_success() => protocol.post_failed(failed),
                _ => protocol.contact_timed_out(),
            };
        }
    }

    fn request_offers(&self) -> Result {
        self.post(&RequestOffers {}.encode())?;
        if !self.offers_delivered.wait(OFFERS_TIMEOUT_MS) {
            pr_warn!("the host has not made all its offers yet\n");
        }
        // What is offered at once is there when the module has loaded.
        self.queues.devices.flush();
        Ok(())
    }

    /// Removes all devices and waits until nothing uses them any more.
    pub(crate) fn remove_devices(&self) {
        self.set_state(State::Leaving);
        // An offer may be at work.
        self.queues.flush();
        let _ = self.for_each_channel(|channel| {
            if channel.primary().is_none() {
                channel.leave();
            }
            Ok(())
        });
        self.queues.flush();
        // Most hosts take the sub-channels away when the primary channel is closed.
        let _ = self.for_each_channel(|channel| {
            channel.leave();
            Ok(())
        });
        self.queues.flush();
        // Somebody may hold a device for a moment longer; the module must not go before that.
        let mut waited = 0u32;
        while self.live.load(Acquire) != 0 {
            self.queues.flush();
            fsleep(Delta::from_millis(10));
            waited = waited.saturating_add(1);
            if waited % 1000 == 0 {
                pr_warn!("{} channels are still in use\n", self.live.load(Relaxed));
            }
        }
    }

    /// Tells the host that the guest lets go of everything, and waits until it has, too.
    pub(crate) fn unload(&self) {
        if self.state.xchg(State::Disconnected as u32, Full) == State::Disconnected as u32 {
            return;
        }
        let Some(message) = self.protocol.lock().unload() else {
            return;
        };
        let answer = self.ask(Key::Unload, None, || self.post(&message.encode()));
        let mut protocol = self.protocol.lock();
        if let Err(error) = answer {
            pr_err!("the host does not let go: {:?}\n", error);
            protocol.unload_timed_out();
        } else if protocol.unload_response().is_err() {
            protocol.unload_timed_out();
        }
        drop(protocol);
        self.version.store(0, Release);
    }

    /// The same in a guest that has crashed: interrupts are off, the other CPUs stand still and
    /// hold any lock.
    pub(crate) fn crash_unload(&self) {
        if self.state.xchg(State::Disconnected as u32, Full) == State::Disconnected as u32 {
            return;
        }
        let connection = ConnectionId::new(self.message_connection.load(Relaxed));
        let delay = |us| udelay(Delta::from_micros(i64::from(us)));
        if self
            .post_to(connection, &Unload {}.encode(), true, delay)
            .is_err()
        {
            return;
        }
        let mut unloaded = false;
        for step in 0..CRASH_UNLOAD_STEPS {
            for per_cpu in self.per_cpu.iter().flatten() {
                let Some(message) = per_cpu.synic.message() else {
                    continue;
                };
                if let Some(payload) = message.payload() {
                    if let Ok(HostMessage::UnloadResponse(_)) = HostMessage::parse(payload, None) {
                        unloaded = true;
                    }
                }
                // Another CPU's register cannot be written, but the host looks again by itself.
                per_cpu.synic.end_of_message(&message);
            }
            if unloaded {
                return;
            }
            if step % 500 == 499 {
                pr_notice!("waiting for the host to let go\n");
            }
            for _ in 0..10 {
                delay(1000);
            }
        }
        pr_err!("the host did not let go in time\n");
    }

    // --------------------------------------------------------------------------------------------
    // CPUs come and go

    /// Runs on the CPU.
    pub(crate) fn cpu_online(&self, cpu: u32) -> Result {
        let per_cpu = self.per_cpu(cpu).ok_or(ENODEV)?;
        per_cpu.synic.enable();
        Ok(())
    }

    /// Runs on the CPU. Fails if the CPU is needed.
    pub(crate) fn cpu_offline(&self, cpu: u32) -> Result {
        let per_cpu = self.per_cpu(cpu).ok_or(ENODEV)?;
        if self.is_connected() {
            if cpu == CONNECT_CPU {
                return Err(EBUSY);
            }
            self.for_each_channel(|channel| self.move_channel(channel, cpu))?;
            if !per_cpu.synic.wait_for_events() {
                return Err(EBUSY);
            }
        }
        self.disable_cpu(cpu);
        Ok(())
    }

    /// Gives a channel of CPU `from` to another one.
    fn move_channel(&self, channel: &Arc<Channel>, from: u32) -> Result {
        if channel.target_cpu() != from {
            return Ok(());
        }
        // Before 5.3 the host does not say when it has stopped to use the old CPU.
        let acknowledged = self
            .version()
            .is_some_and(|version| version.has_modify_channel_response());
        if channel.is_open() && !acknowledged {
            return Err(EBUSY);
        }
        let mut to = CONNECT_CPU;
        let mut least = usize::MAX;
        for cpu in (0..nr_cpu_ids())
            .filter(|&cpu| cpu != from && cpu::is_online(cpu) && cpu::is_housekeeping(cpu))
        {
            let mut load = 0usize;
            let _ = self.for_each_channel(|other| {
                load = load.saturating_add(usize::from(other.target_cpu() == cpu));
                Ok(())
            });
            // The connect CPU has enough to do.
            if load < least && (cpu != CONNECT_CPU || least == usize::MAX) {
                (to, least) = (cpu, load);
            }
        }
        channel.leave_cpu(to).map_err(|_| EBUSY)
    }

    /// Takes the pages of this CPU back from the hypervisor.
    pub(crate) fn disable_cpu(&self, cpu: u32) {
        if let Some(per_cpu) = self.per_cpu(cpu) {
            per_cpu.synic.disable();
        }
    }
}

impl PerCpu {
    fn new(cpu: u32) -> Result<Arc<Self>> {
        let synic = Synic::new()?;
        Arc::pin_init(
            pin_init!(Self {
                connection: RcuArc::empty(),
                cpu,
                synic,
                work <- new_work!("vmbus messages"),
            }),
            GFP_KERNEL,
        )
    }
}

/// Whether a device class has so much to say that its channels are spread over the CPUs.
fn is_performance_critical(class: &Guid) -> bool {
    [
        guid::IDE,
        guid::SCSI,
        guid::FIBRE_CHANNEL,
        guid::NETWORK,
        guid::NETWORK_DIRECT,
    ]
    .contains(class)
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
