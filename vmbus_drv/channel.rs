// SPDX-License-Identifier: GPL-2.0

//! Channels: what a driver opens to talk to its device.
//!
//! A channel belongs to an offer of the host. It is closed or open; while it is open, two rings are
//! shared with the host and a [`Handler`] gets what comes in. The host may rescind the offer at any
//! moment, also while the channel is being opened or closed: then the channel is of no use any
//! more, all waits on it end, and its id goes back to the host as soon as the driver let go of it.
//!
//! # Locks
//!
//! `control` serializes open, close, and change of CPU, and is held while the host's answer is
//! waited for. Sending and receiving take no lock that is shared with that: they find the open
//! channel by RCU.

use crate::{
    connection::Connection,
    cpu,
    device::{
        ChannelDirectory,
        ChannelsDirectory,
        Registration, //
    },
    log::{
        warn_limited,
        Show, //
    },
    memory::{
        RingMapping,
        RingPair,
        SharedBuffer, //
    },
    rcu::RcuArc,
    request::Key,
    stats::Stats, //
};
use core::ops::Deref;
use hv_proto::{
    client::{
        self,
        ChannelError,
        Outcome, //
    },
    gpadl::GpadlMessages,
    ids::{
        ChannelId,
        GpadlId, //
    },
    message::{
        HostMessage,
        Message,
        OfferChannel,
        RescindChannelOffer,
        USER_DATA_SIZE, //
    },
    packet::{
        Header,
        Packet,
        PageRange, //
    },
    ring::{
        Consumer,
        Field,
        Producer,
        ReadError,
        RingMem,
        Signal,
        Snapshot,
        WriteError, //
    },
    version::Version, //
};
use kernel::{
    device,
    impl_has_work,
    new_mutex,
    new_spinlock,
    new_spinlock_irq,
    new_work,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        rcu,
        Arc,
        ArcBorrow,
        Mutex,
        SpinLock,
        SpinLockIrq, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

/// Packets that are handled before another work item of the same CPU gets its turn.
const BUDGET: usize = 256;

/// Packets that are handled before the host sees that there is room again.
const COMMIT_EVERY: usize = 32;

/// How a channel's packets reach its [`Handler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadMode {
    /// [`Handler::on_packet`] in softirq context; the host's signals are masked meanwhile. For all
    /// devices with much to say.
    Batched,
    /// The same without masking. For devices that send a message now and then.
    Direct,
    /// [`Handler::on_interrupt`] in hard interrupt context. The driver calls [`Channel::poll`]
    /// later, from softirq context (NAPI), until that says that the ring is empty; there is no
    /// other signal before that.
    Isr,
}

/// What a driver chooses when it opens a channel.
#[derive(Clone, Copy, Debug)]
pub struct OpenParams<'a> {
    /// Size of the ring to the host in bytes, its control page included: at least two pages.
    pub send_bytes: usize,
    /// Size of the ring from the host in bytes, its control page included: at least two pages.
    pub recv_bytes: usize,
    /// What the host's service wants to know, at most 120 bytes.
    pub user_data: &'a [u8],
    /// Largest packet that the host may send, in bytes, descriptor included. Larger ones are
    /// counted and dropped.
    pub max_packet: usize,
    /// How packets reach the handler.
    pub mode: ReadMode,
}

/// The driver's side of an open channel.
///
/// No method is called after the [`OpenChannel`] was dropped.
pub trait Handler: Send + Sync + 'static {
    /// A packet has come. It is a private copy, and its lengths have been checked; what is in the
    /// payload has not.
    ///
    /// Softirq context; must not sleep.
    fn on_packet(&self, channel: &Channel, packet: &Packet<'_>);

    /// There is room in the ring again, after [`Channel::request_send_interrupt`].
    ///
    /// Softirq context; must not sleep.
    fn on_send_space(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The host has signalled the channel ([`ReadMode::Isr`] only).
    ///
    /// Hard interrupt context.
    fn on_interrupt(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The host has taken the channel away. Everything that waits for a packet of it must be ended
    /// here; no packet comes any more, and sending fails with `ENODEV`.
    ///
    /// Process context, may sleep. Called at most once, possibly before [`Channel::open`] has
    /// returned (which then fails). Must not drop the channel's [`OpenChannel`], nor wait for the
    /// one who does.
    fn on_rescind(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The host has damaged the ring. No packet comes any more, and sending fails with `EIO`.
    ///
    /// Process context, may sleep. Called at most once.
    fn on_error(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The host's signals come to another CPU from now on.
    ///
    /// Process context, may sleep, but must not open or close a channel.
    fn on_target_cpu_changed(&self, channel: &Channel, old: u32, new: u32) {
        let _ = (channel, old, new);
    }
}

/// A driver's interest in the sub-channels of its device.
pub trait SubchannelHandler: Send + Sync + 'static {
    /// A sub-channel was offered. Called once for each, also for those that were there before.
    ///
    /// Process context, may sleep and may open the channel.
    fn on_subchannel(&self, channel: Arc<Channel>);
}

/// One of the two rings of an open channel, as memory for the ring code.
struct Ring<const OUTGOING: bool>(Arc<RingPair>);

impl<const OUTGOING: bool> Ring<OUTGOING> {
    fn mapping(&self) -> &RingMapping {
        if OUTGOING {
            &self.0.outgoing
        } else {
            &self.0.incoming
        }
    }
}

impl<const OUTGOING: bool> RingMem for Ring<OUTGOING> {
    fn data_len(&self) -> u32 {
        self.mapping().data_len()
    }
    fn load(&self, field: Field) -> u32 {
        self.mapping().load(field)
    }
    fn store(&self, field: Field, value: u32) {
        self.mapping().store(field, value);
    }
    fn fence(&self) {
        self.mapping().fence();
    }
    fn read_at(&self, offset: u32, buf: &mut [u8]) {
        self.mapping().read_at(offset, buf);
    }
    fn write_at(&self, offset: u32, buf: &[u8]) {
        self.mapping().write_at(offset, buf);
    }
}

/// The receiving end, used by one softirq at a time.
struct Receiver {
    ring: Consumer<Ring<false>>,
    /// Where packets are copied to.
    buf: KVVec<u8>,
}

/// A channel while it is open.
#[pin_data]
pub(crate) struct Opened {
    handler: Arc<dyn Handler>,
    mode: ReadMode,
    rings: Arc<RingPair>,
    #[pin]
    sender: SpinLockIrq<Producer<Ring<true>>>,
    #[pin]
    receiver: SpinLock<Receiver>,
    /// The sender waits for room.
    send_wanted: Atomic<bool>,
    /// The ring was full at the last try to send.
    send_full: Atomic<bool>,
    /// The host has damaged a ring.
    broken: Atomic<bool>,
}

/// What `control` protects.
struct Control {
    /// Where the protocol stands.
    protocol: client::Channel,
    /// There is an [`OpenChannel`].
    open: bool,
}

/// What a primary channel knows of its sub-channels.
struct Subchannels {
    list: KVec<Arc<Channel>>,
    handler: Option<Arc<dyn SubchannelHandler>>,
}

/// State of a channel as the sysfs file `state` numbers it.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum State {
    Offered = 0,
    Opening = 1,
    Closed = 2,
    Open = 3,
}

/// One channel of a device.
#[pin_data(PinnedDrop)]
pub struct Channel {
    connection: Arc<Connection>,
    offer: OfferChannel,
    /// The primary channel, if this is a sub-channel.
    primary: Option<Arc<Channel>>,
    target_cpu: Atomic<u32>,
    state: Atomic<u32>,
    rescinded: Atomic<bool>,
    /// The bus is being shut down and the device must go.
    leaving: Atomic<bool>,
    opened: RcuArc<Opened>,
    stats: Stats,
    #[pin]
    control: Mutex<Control>,
    #[pin]
    subchannels: Mutex<Subchannels>,
    /// Held while the handler of sub-channels runs.
    #[pin]
    announcing: Mutex<()>,
    /// Of a sub-channel: it was announced to the driver.
    announced: Atomic<bool>,
    /// Held while the driver is told of a rescind.
    #[pin]
    rescinding: Mutex<()>,
    /// Of a primary channel: its device on the bus.
    #[pin]
    device: Mutex<Option<Registration>>,
    /// Of a primary channel: where the directories of the device's channels are in sysfs.
    #[pin]
    directories: Mutex<Option<ChannelsDirectory>>,
    /// Its directory in sysfs.
    #[pin]
    directory: Mutex<Option<ChannelDirectory>>,
    #[pin]
    receive_work: Work<Channel, RECEIVE>,
    #[pin]
    update_work: Work<Channel, UPDATE>,
    #[pin]
    notify_work: Work<Channel, NOTIFY>,
}

/// Work item: packets are handled (softirq).
const RECEIVE: u64 = 0;
/// Work item: the device or sub-channel is made or removed, as the state of the channel says.
const UPDATE: u64 = 1;
/// Work item: the driver is told of a rescind or of a damaged ring.
const NOTIFY: u64 = 2;

impl_has_work! {
    impl HasWork<Self, 0> for Channel { self.receive_work }
    impl HasWork<Self, 1> for Channel { self.update_work }
    impl HasWork<Self, 2> for Channel { self.notify_work }
}

impl WorkItem<RECEIVE> for Channel {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        if this.receive() {
            this.schedule_receive();
        }
    }
}

impl WorkItem<UPDATE> for Channel {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        match &this.primary {
            None => this.update_device(),
            Some(primary) => this.update_subchannel(primary),
        }
    }
}

impl WorkItem<NOTIFY> for Channel {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.notify();
    }
}

impl Channel {
    /// Makes the channel of a valid offer.
    pub(crate) fn new(
        connection: Arc<Connection>,
        offer: OfferChannel,
        primary: Option<Arc<Channel>>,
        target_cpu: u32,
    ) -> Result<Arc<Self>> {
        let protocol = client::Channel::new(offer.channel_id);
        connection.channel_made();
        Arc::pin_init(
            pin_init!(Self {
                connection,
                offer,
                primary,
                target_cpu: Atomic::new(target_cpu),
                state: Atomic::new(State::Offered as u32),
                rescinded: Atomic::new(false),
                leaving: Atomic::new(false),
                opened: RcuArc::empty(),
                stats: Stats::new(),
                control <- new_mutex!(Control { protocol, open: false }),
                subchannels <- new_mutex!(Subchannels { list: KVec::new(), handler: None }),
                announcing <- new_mutex!(()),
                announced: Atomic::new(false),
                rescinding <- new_mutex!(()),
                device <- new_mutex!(None),
                directories <- new_mutex!(None),
                directory <- new_mutex!(None),
                receive_work <- new_work!("vmbus receive"),
                update_work <- new_work!("vmbus update"),
                notify_work <- new_work!("vmbus notify"),
            }),
            GFP_KERNEL,
        )
    }

    // --------------------------------------------------------------------------------------------
    // What is known of the channel

    /// Id of the channel (the protocol's "relid").
    pub fn id(&self) -> ChannelId {
        self.offer.channel_id
    }

    /// The host's offer.
    pub fn offer(&self) -> &OfferChannel {
        &self.offer
    }

    /// 0 for the primary channel of a device, else the number of the sub-channel.
    pub fn subchannel_index(&self) -> u16 {
        self.offer.sub_channel_index.get()
    }

    /// The CPU that gets the host's signals.
    pub fn target_cpu(&self) -> u32 {
        self.target_cpu.load(Relaxed)
    }

    /// Whether the host has taken the channel away.
    pub fn is_rescinded(&self) -> bool {
        self.rescinded.load(Acquire)
    }

    /// Whether the channel is open.
    pub fn is_open(&self) -> bool {
        self.state() == State::Open as u32
    }

    /// Counters of the channel.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The version of the protocol that guest and host agreed on.
    pub fn version(&self) -> Version {
        self.connection.version().unwrap_or(Version::OLDEST)
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    pub(crate) fn primary(&self) -> Option<&Arc<Channel>> {
        self.primary.as_ref()
    }

    pub(crate) fn state(&self) -> u32 {
        self.state.load(Relaxed)
    }

    fn set_state(&self, state: State) {
        self.state.store(state as u32, Relaxed);
    }

    /// The device is being removed, or will be.
    pub(crate) fn is_leaving(&self) -> bool {
        self.is_rescinded() || self.leaving.load(Acquire)
    }

    /// Control words of the ring to the host (`outgoing`) or from it; `None` if the channel is not
    /// open.
    pub(crate) fn ring(&self, outgoing: bool) -> Option<Snapshot> {
        let guard = rcu::read_lock();
        let opened = self.opened.get(&guard)?;
        Some(if outgoing {
            Snapshot::of(&opened.rings.outgoing)
        } else {
            Snapshot::of(&opened.rings.incoming)
        })
    }

    /// Calls `f` for each sub-channel.
    pub(crate) fn for_each_subchannel(&self, mut f: impl FnMut(&Arc<Channel>) -> Result) -> Result {
        for channel in self.subchannels.lock().list.iter() {
            f(channel)?;
        }
        Ok(())
    }

    /// Number of sub-channels that the host has offered and not taken back.
    pub fn subchannel_count(&self) -> usize {
        self.subchannels.lock().list.len()
    }

    // --------------------------------------------------------------------------------------------
    // Open and close

    /// Opens the channel: shares two rings with the host, and asks it to serve them.
    ///
    /// Process context; sleeps until the host has answered. The rings are made of single pages, so
    /// they do not need free memory in one piece.
    ///
    /// # Errors
    ///
    /// `EBUSY` if the channel is open, `ENODEV` if it was rescinded, `EINVAL` or `ENOMEM` for the
    /// parameters, `EIO` if the host refused, `ETIMEDOUT` if it did not answer.
    pub fn open<H: Handler>(
        self: &Arc<Self>,
        params: &OpenParams<'_>,
        handler: Arc<H>,
    ) -> Result<OpenChannel> {
        self.open_dyn(params, handler)
    }

    fn open_dyn(
        self: &Arc<Self>,
        params: &OpenParams<'_>,
        handler: Arc<dyn Handler>,
    ) -> Result<OpenChannel> {
        if params.user_data.len() > USER_DATA_SIZE || params.max_packet < 16 {
            return Err(EINVAL);
        }
        let mut control = self.control.lock();
        if control.open {
            return Err(EBUSY);
        }
        if self.is_rescinded() {
            return Err(ENODEV);
        }
        self.set_state(State::Opening);
        let result = self.open_rings(&mut control, params, handler);
        match &result {
            Ok(_) => {
                control.open = true;
                self.set_state(State::Open);
            }
            Err(_) => self.set_state(State::Closed),
        }
        result
    }

    /// The part of open with `control` held.
    fn open_rings(
        self: &Arc<Self>,
        control: &mut Control,
        params: &OpenParams<'_>,
        handler: Arc<dyn Handler>,
    ) -> Result<OpenChannel> {
        let pair = Arc::new(
            RingPair::new(params.send_bytes, params.recv_bytes)?,
            GFP_KERNEL,
        )?;
        let mut buf = KVVec::new();
        buf.resize(params.max_packet, 0, GFP_KERNEL)?;
        let producer = Producer::new(Ring::<true>(pair.clone())).map_err(|_| EIO)?;
        let consumer = Consumer::new(Ring::<false>(pair.clone())).map_err(|_| EIO)?;
        let rings = pair.clone();
        let opened = Arc::pin_init(
            pin_init!(Opened {
                handler,
                mode: params.mode,
                rings,
                sender <- new_spinlock_irq!(producer),
                receiver <- new_spinlock!(Receiver { ring: consumer, buf }),
                send_wanted: Atomic::new(false),
                send_full: Atomic::new(false),
                broken: Atomic::new(false),
            }),
            GFP_KERNEL,
        )?;

        let gpadl = GpadlHandle::create(self, pair.len(), |page| pair.pfn(page), &pair)?;
        let mut open = OpenChannel {
            channel: self.clone(),
            gpadl: Some(gpadl),
        };

        // The host may send as soon as it has served the request, so everything is in place first.
        // From here on, dropping `open` cleans up.
        if self.opened.fill(opened).is_err() {
            // Cannot be: `control` is held and the channel was not open.
            open.finish(control);
            return Err(EBUSY);
        }
        let result = self.ask_to_open(
            &mut control.protocol,
            params,
            open.gpadl_id(),
            pair.outgoing_pages(),
        );
        match result {
            Ok(()) => Ok(open),
            Err(error) => {
                open.finish(control);
                Err(error)
            }
        }
    }

    fn ask_to_open(
        &self,
        protocol: &mut client::Channel,
        params: &OpenParams<'_>,
        ring: GpadlId,
        second_ring: u32,
    ) -> Result {
        let vp = cpu::vp_index(self.target_cpu());
        let message = protocol
            .open(ring, vp, second_ring, params.user_data)
            .map_err(to_errno)?;
        let key = Key::Open(self.id(), message.open_id);
        let mut posted = false;
        let answer = self.connection.ask(key, Some(self), || {
            self.connection.post(&message.encode())?;
            posted = true;
            Ok(())
        });
        match answer {
            Ok(HostMessage::OpenChannelResult(result)) => {
                match protocol.open_result(&result).map_err(|_| EIO)? {
                    Outcome::Done => Ok(()),
                    Outcome::Refused(status) => {
                        pr_err!(
                            "channel {}: host refuses to open it, status {:#x}\n",
                            self.id().get(),
                            status
                        );
                        Err(EIO)
                    }
                }
            }
            Ok(_) => Err(EIO),
            Err(error) if !posted => {
                protocol.open_not_posted();
                Err(error)
            }
            Err(error) => {
                // The host may open it late, and must not find it so.
                if self.is_rescinded() {
                    self.note_rescind(protocol);
                }
                if let Some(message) = protocol.open_timed_out() {
                    // The error has been logged; there is nothing else to be done.
                    let _ = self.connection.post(&message.encode());
                }
                Err(error)
            }
        }
    }

    /// Lets the protocol know of a rescind.
    fn note_rescind(&self, protocol: &mut client::Channel) {
        // The second time is an error there, and no matter here.
        let _ = protocol.rescind(&RescindChannelOffer {
            channel_id: self.id(),
        });
    }

    /// Shares `buffer` with the host, for as long as the value that is returned exists.
    ///
    /// Process context; sleeps.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the channel was rescinded, `EINVAL` if the buffer is larger than the protocol
    /// can describe (8190 pages), `EIO` if the host refused, `ETIMEDOUT` if it did not answer; then
    /// the buffer is never freed.
    pub fn establish_gpadl(self: &Arc<Self>, buffer: SharedBuffer) -> Result<Gpadl> {
        let buffer = Arc::new(buffer, GFP_KERNEL)?;
        let handle = GpadlHandle::create(self, buffer.len(), |page| buffer.pfn(page), &buffer)?;
        Ok(Gpadl { handle, buffer })
    }

    // --------------------------------------------------------------------------------------------
    // Sending

    /// Sends an in-band packet. `completion` asks the host for an answer that repeats `request_id`.
    ///
    /// Any context.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if there is no room now, `EMSGSIZE` if there never is, `ENODEV` if the channel is
    /// not open or was rescinded, `EIO` if the host has damaged the ring. Nothing was sent.
    pub fn send(&self, payload: &[u8], request_id: u64, completion: bool) -> Result {
        self.send_with(|ring| ring.write(Header::in_band(request_id, completion), &[payload]))
    }

    /// Sends a packet with a range of guest memory that the host may read and write until it has
    /// answered. The answer repeats `request_id`.
    ///
    /// Any context.
    ///
    /// # Errors
    ///
    /// As [`Channel::send`]; `EINVAL` if the number of pages does not fit the length.
    pub fn send_gpa(&self, range: &PageRange<'_>, payload: &[u8], request_id: u64) -> Result {
        self.send_gpa_ranges(core::slice::from_ref(range), payload, request_id)
    }

    /// As [`Channel::send_gpa`], with several ranges.
    ///
    /// # Errors
    ///
    /// As [`Channel::send_gpa`]; `EINVAL` if there is no range.
    pub fn send_gpa_ranges(
        &self,
        ranges: &[PageRange<'_>],
        payload: &[u8],
        request_id: u64,
    ) -> Result {
        self.send_with(|ring| {
            ring.write_gpa_ranges(Header::gpa_direct(request_id, true), ranges, &[payload])
        })
    }

    /// As [`Channel::send_gpa`], with the frame numbers from an iterator: they go straight into the
    /// ring. There must be exactly as many as the range touches pages.
    ///
    /// # Errors
    ///
    /// As [`Channel::send_gpa`].
    pub fn send_gpa_iter(
        &self,
        byte_count: u32,
        byte_offset: u32,
        pfns: impl IntoIterator<Item = u64>,
        payload: &[u8],
        request_id: u64,
    ) -> Result {
        self.send_with(|ring| {
            let header = Header::gpa_direct(request_id, true);
            ring.write_gpa_direct(header, byte_count, byte_offset, pfns, &[payload])
        })
    }

    /// Answers the host's request `request_id`.
    ///
    /// # Errors
    ///
    /// As [`Channel::send`].
    pub fn send_completion(&self, request_id: u64, payload: &[u8]) -> Result {
        self.send_with(|ring| ring.write(Header::completion(request_id), &[payload]))
    }

    fn send_with<F>(&self, write: F) -> Result
    where
        F: FnOnce(&mut Producer<Ring<true>>) -> core::result::Result<Signal, WriteError>,
    {
        if self.is_rescinded() {
            return Err(ENODEV);
        }
        let guard = rcu::read_lock();
        let opened = self.opened.get(&guard).ok_or(ENODEV)?;
        if opened.broken.load(Relaxed) {
            return Err(EIO);
        }
        let result = write(&mut opened.sender.lock());
        match result {
            Ok(signal) => {
                opened.send_full.store(false, Relaxed);
                self.stats.sent.count();
                if signal.is_needed() {
                    self.stats.out_empty.count();
                    self.signal_host();
                }
                Ok(())
            }
            Err(WriteError::Full { .. }) => {
                self.stats.out_full_total.count();
                if !opened.send_full.xchg(true, Relaxed) {
                    self.stats.out_full_first.count();
                }
                Err(EAGAIN)
            }
            Err(WriteError::TooLarge) => Err(EMSGSIZE),
            Err(WriteError::Corrupt(_)) => {
                self.break_rings(&opened);
                Err(EIO)
            }
            Err(_) => Err(EINVAL),
        }
    }

    /// Free bytes in the ring to the host; 0 if the channel is not open.
    pub fn send_space(&self) -> u32 {
        self.ring(true)
            .and_then(|ring| ring.writable)
            .unwrap_or_default()
    }

    /// Size of the data area of the ring to the host in bytes; 0 if the channel is not open.
    pub fn send_size(&self) -> u32 {
        let guard = rcu::read_lock();
        self.opened
            .get(&guard)
            .map_or(0, |opened| opened.rings.outgoing.data_len())
    }

    /// Whether at least `percent` of the ring to the host is free.
    pub fn has_send_room(&self, percent: u32) -> bool {
        let guard = rcu::read_lock();
        self.opened.get(&guard).is_some_and(|opened| {
            let free = Snapshot::of(&opened.rings.outgoing)
                .writable
                .unwrap_or_default();
            let size = opened.rings.outgoing.data_len();
            u64::from(free).saturating_mul(100)
                >= u64::from(size).saturating_mul(u64::from(percent))
        })
    }

    /// Asks the host to signal when `bytes` of the ring to it are free;
    /// [`Handler::on_send_space`] is called then. 0 takes the wish back.
    ///
    /// Returns true if there is so much room already; then there will be no signal. Any context.
    pub fn request_send_interrupt(&self, bytes: u32) -> bool {
        let guard = rcu::read_lock();
        let Some(opened) = self.opened.get(&guard) else {
            return false;
        };
        let mut sender = opened.sender.lock();
        if bytes == 0 {
            opened.send_wanted.store(false, Relaxed);
            sender.stop_waiting();
            return true;
        }
        // First, so that a signal that comes meanwhile finds it, and then waits for the lock.
        opened.send_wanted.store(true, Relaxed);
        match sender.wait_for_space(bytes) {
            Ok(room) => {
                opened.send_wanted.store(!room, Relaxed);
                room
            }
            Err(_) => {
                drop(sender);
                self.break_rings(&opened);
                false
            }
        }
    }

    fn signal_host(&self) {
        self.connection.signal(&self.offer, &self.stats);
    }

    // --------------------------------------------------------------------------------------------
    // Receiving

    /// The host has signalled the channel. Hard interrupt context, in an RCU read-side section.
    pub(crate) fn interrupt(this: ArcBorrow<'_, Self>, guard: &rcu::Guard) {
        this.stats.interrupts.count();
        let Some(opened) = this.opened.get(guard) else {
            return;
        };
        match opened.mode {
            ReadMode::Isr => {
                opened.rings.incoming.store(Field::InterruptMask, 1);
                opened.handler.on_interrupt(&this);
            }
            ReadMode::Batched => {
                opened.rings.incoming.store(Field::InterruptMask, 1);
                Arc::from(this).schedule_receive();
            }
            ReadMode::Direct => Arc::from(this).schedule_receive(),
        }
    }

    fn schedule_receive(self: Arc<Self>) {
        let queues = self.connection.queues().clone();
        // If it is queued already, it will see what there is now.
        let _ = queues.softirq.enqueue::<Arc<Channel>, RECEIVE>(self);
    }

    /// Handles packets. Returns true if there may be more. Softirq context.
    fn receive(&self) -> bool {
        let guard = rcu::read_lock();
        let Some(opened) = self.opened.get(&guard) else {
            return false;
        };
        let more = self.receive_some(&opened, BUDGET).1;
        self.check_send_space(&opened);
        more
    }

    /// Handles up to `budget` packets with [`Handler::on_packet`] ([`ReadMode::Isr`] only) and
    /// returns how many there were. If there are fewer than `budget`, the host signals the next
    /// one.
    ///
    /// Softirq context (NAPI).
    pub fn poll(&self, budget: usize) -> usize {
        let guard = rcu::read_lock();
        let Some(opened) = self.opened.get(&guard) else {
            return 0;
        };
        let done = self.receive_some(&opened, budget).0;
        self.check_send_space(&opened);
        done
    }

    /// Returns the number of packets, and whether there may be more.
    fn receive_some(&self, opened: &Opened, budget: usize) -> (usize, bool) {
        // Somebody who has it is at work, and will see everything that came before.
        let Some(mut receiver) = opened.receiver.try_lock() else {
            return (0, true);
        };
        let Receiver { ring, buf } = &mut *receiver;
        let mut done = 0usize;
        if opened.broken.load(Relaxed) {
            return (0, false);
        }
        while done < budget {
            match ring.read(buf) {
                Ok(Some(packet)) => {
                    done = done.saturating_add(1);
                    self.stats.received.count();
                    opened.handler.on_packet(self, &packet);
                    if done % COMMIT_EVERY == 0 {
                        self.signal_space(ring.commit());
                    }
                }
                Ok(None) => {
                    // Looks once more after the host has seen the room, in every mode: what it
                    // wrote before that came without a signal.
                    let unmasked = ring.unmask();
                    self.signal_space(unmasked.signal);
                    if !unmasked.more {
                        return (done, false);
                    }
                    if opened.mode != ReadMode::Direct {
                        ring.mask();
                    }
                }
                Err(ReadError::TooLarge { len }) => {
                    self.stats.oversized.count();
                    warn_limited!(
                        "channel {}: packet of {} bytes dropped\n",
                        self.id().get(),
                        len
                    );
                    done = done.saturating_add(1);
                    if !ring.skip() {
                        return (done, false);
                    }
                }
                Err(error) => {
                    warn_limited!("channel {}: {}\n", self.id().get(), Show(error));
                    self.break_rings(opened);
                    return (done, false);
                }
            }
        }
        self.signal_space(ring.commit());
        (done, true)
    }

    /// The host waited for room, and there is some.
    fn signal_space(&self, signal: Signal) {
        if signal.is_needed() {
            self.stats.in_full.count();
            self.signal_host();
        }
    }

    /// Tells a sender that waits for room if there is some.
    fn check_send_space(&self, opened: &Opened) {
        if !opened.send_wanted.load(Relaxed) {
            return;
        }
        let mut sender = opened.sender.lock();
        let wanted = sender.pending_send_size();
        if wanted != 0 && sender.free_bytes().is_ok_and(|free| free <= wanted) {
            return;
        }
        opened.send_wanted.store(false, Relaxed);
        sender.stop_waiting();
        drop(sender);
        opened.handler.on_send_space(self);
    }

    /// The host broke the rules: the rings are not used any more.
    fn break_rings(&self, opened: &Opened) {
        if opened.broken.xchg(true, Full) {
            return;
        }
        self.stats.corrupt.count();
        if let Some(this) = self.connection.channel(self.id()) {
            this.schedule_notify();
        }
    }

    fn schedule_notify(self: Arc<Self>) {
        let queues = self.connection.queues().clone();
        // If it is queued already, it will see the state of now.
        let _ = queues.notify.enqueue::<Arc<Channel>, NOTIFY>(self);
    }

    // --------------------------------------------------------------------------------------------
    // Which CPU

    /// Sends the host's signals to another CPU. The caller keeps CPUs from coming and going.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the CPU is not online or not for devices' interrupts, `EIO` if the channel is
    /// not open or the host refused, `EOPNOTSUPP` if the protocol version has no such message, or those of the wait.
    pub(crate) fn set_target_cpu(&self, new: u32) -> Result {
        if !cpu::is_online(new) || !cpu::is_housekeeping(new) {
            return Err(EINVAL);
        }
        let mut control = self.control.lock();
        if !control.open {
            return Err(EIO);
        }
        if self.is_rescinded() {
            return Err(ENODEV);
        }
        let old = self.target_cpu();
        if old == new {
            return Ok(());
        }
        let version = self.version();
        let message = control
            .protocol
            .modify(cpu::vp_index(new), version)
            .map_err(to_errno)?
            .encode();
        if version.has_modify_channel_response() {
            let answer = self.connection.ask(Key::Modify(self.id()), Some(self), || {
                self.connection.post(&message)
            });
            match answer {
                Ok(HostMessage::ModifyChannelResponse(response)) => {
                    let outcome = control.protocol.modify_response(&response);
                    if outcome != Ok(Outcome::Done) {
                        return Err(EIO);
                    }
                }
                Ok(_) => return Err(EIO),
                Err(error) => {
                    control.protocol.modify_timed_out();
                    return Err(error);
                }
            }
        } else {
            self.connection.post(&message)?;
        }
        self.target_cpu.store(new, Relaxed);

        let guard = rcu::read_lock();
        let handler = self.opened.get(&guard).map(|opened| opened.handler.clone());
        drop(guard);
        if let Some(handler) = handler {
            handler.on_target_cpu_changed(self, old, new);
        }
        // A signal may have gone to the old CPU's page while it was on its way out.
        if let Some(this) = self.connection.channel(self.id()) {
            this.schedule_receive();
        }
        Ok(())
    }

    /// Gives the channel to `new` because its CPU goes offline. Fails only if the host has to agree
    /// and does not.
    pub(crate) fn leave_cpu(&self, new: u32) -> Result {
        match self.set_target_cpu(new) {
            // Nobody has told the host a CPU yet.
            Err(error) if error == EIO && !self.is_open() => {
                self.target_cpu.store(new, Relaxed);
                Ok(())
            }
            Err(error) if error == ENODEV => Ok(()),
            result => result,
        }
    }

    // --------------------------------------------------------------------------------------------
    // Coming and going

    /// The host has rescinded the channel. Returns at once; the rest is done by work items.
    pub(crate) fn rescind(self: &Arc<Self>) {
        if self.rescinded.xchg(true, Full) {
            return;
        }
        self.connection.rescind_questions(self.id());
        self.clone().schedule_notify();
        self.schedule_update();
    }

    /// The bus goes: the device goes too, but the channel still works meanwhile.
    pub(crate) fn leave(self: &Arc<Self>) {
        self.leaving.store(true, Release);
        self.schedule_update();
    }

    /// Makes the device or sub-channel known, or removes it, soon.
    pub(crate) fn schedule_update(self: &Arc<Self>) {
        let queues = self.connection.queues();
        let queue = if self.primary.is_some() {
            &queues.subchannels
        } else {
            &queues.devices
        };
        // If it is queued already, it will see the state of now.
        let _ = queue.enqueue::<Arc<Channel>, UPDATE>(self.clone());
    }

    /// Tells the driver that the channel is rescinded or its rings are damaged, once.
    fn notify(&self) {
        let _rescinding = self.rescinding.lock();
        if self.is_rescinded() {
            // From here on, no handler runs and no sender writes.
            if let Some(opened) = self.opened.replace(None) {
                opened.handler.on_rescind(self);
            }
            return;
        }
        let guard = rcu::read_lock();
        let handler = self
            .opened
            .get(&guard)
            .filter(|opened| opened.broken.load(Relaxed))
            .map(|opened| opened.handler.clone());
        drop(guard);
        if let Some(handler) = handler {
            handler.on_error(self);
        }
    }

    /// Makes or removes the device of a primary channel. One at a time for the whole bus.
    fn update_device(self: &Arc<Self>) {
        if !self.is_leaving() {
            let mut device = self.device.lock();
            if device.is_none() {
                match Registration::new(self) {
                    Ok(registration) => *device = Some(registration),
                    Err(error) => {
                        pr_err!("channel {}: no device: {:?}\n", self.id().get(), error);
                    }
                }
            }
            return;
        }
        if self.is_rescinded() {
            self.notify();
        }
        let device = self.device.lock().take();
        // Unbinds the driver, which closes what it opened.
        drop(device);
        self.release();
    }

    /// Makes a sub-channel known to its driver, or removes it.
    fn update_subchannel(self: &Arc<Self>, primary: &Arc<Channel>) {
        if self.is_leaving() {
            if self.is_rescinded() {
                self.notify();
            }
            self.remove_directory();
            primary
                .subchannels
                .lock()
                .list
                .retain(|other| !Arc::ptr_eq(other, self));
            self.release();
            return;
        }
        let added = primary
            .subchannels
            .lock()
            .list
            .push(self.clone(), GFP_KERNEL);
        if added.is_err() {
            pr_err!("channel {}: no memory for it\n", self.id().get());
            return;
        }
        primary.make_directories(None);
        primary.announce();
    }

    /// Makes the sysfs directories of those channels of a device that do not have one. The first
    /// time, `device` says where they go; without it, only more of them are made later.
    pub(crate) fn make_directories(self: &Arc<Self>, device: Option<&device::Device>) {
        let mut directories = self.directories.lock();
        if self.is_leaving() {
            return;
        }
        if let (None, Some(device)) = (&*directories, device) {
            *directories = ChannelsDirectory::new(device).ok();
        }
        let Some(parent) = &*directories else {
            return;
        };
        // A directory that cannot be made is missed by those who look for it, and by nobody else.
        let make = |channel: &Arc<Channel>| {
            let mut directory = channel.directory.lock();
            if directory.is_none() && !channel.is_leaving() {
                *directory = ChannelDirectory::new(parent, channel).ok();
            }
            Ok(())
        };
        let _ = make(self);
        let _ = self.for_each_subchannel(make);
    }

    /// Removes the sysfs directories of all channels of a device.
    pub(crate) fn remove_directories(self: &Arc<Self>) {
        let mut directories = self.directories.lock();
        self.remove_directory();
        let _ = self.for_each_subchannel(|channel| {
            channel.remove_directory();
            Ok(())
        });
        *directories = None;
    }

    /// Removes the channel's sysfs directory.
    fn remove_directory(&self) {
        let directory = self.directory.lock().take();
        drop(directory);
    }

    /// Tells the driver of sub-channels that it does not know.
    fn announce(&self) {
        let _announcing = self.announcing.lock();
        loop {
            let subchannels = self.subchannels.lock();
            let Some(handler) = subchannels.handler.clone() else {
                return;
            };
            let next = subchannels
                .list
                .iter()
                .find(|channel| !channel.is_leaving() && !channel.announced.load(Relaxed))
                .cloned();
            drop(subchannels);
            let Some(channel) = next else {
                return;
            };
            channel.announced.store(true, Relaxed);
            handler.on_subchannel(channel);
        }
    }

    /// Asks to be told of sub-channels, those that are there included, until the value that is
    /// returned is dropped.
    ///
    /// Process context; calls `handler` before it returns.
    ///
    /// # Errors
    ///
    /// `EBUSY` if there is such a handler already.
    pub fn set_subchannel_handler<H: SubchannelHandler>(
        self: &Arc<Self>,
        handler: Arc<H>,
    ) -> Result<SubchannelRegistration> {
        self.set_subchannel_handler_dyn(handler)
    }

    fn set_subchannel_handler_dyn(
        self: &Arc<Self>,
        handler: Arc<dyn SubchannelHandler>,
    ) -> Result<SubchannelRegistration> {
        let mut subchannels = self.subchannels.lock();
        if subchannels.handler.is_some() {
            return Err(EBUSY);
        }
        subchannels.handler = Some(handler);
        drop(subchannels);
        let registration = SubchannelRegistration {
            channel: self.clone(),
        };
        self.announce();
        Ok(registration)
    }

    /// Takes the channel out of the table if nobody has it open, and, if the host has rescinded it,
    /// gives the id back.
    fn release(&self) {
        let mut control = self.control.lock();
        if control.open {
            return;
        }
        let message = self.is_rescinded().then(|| {
            self.note_rescind(&mut control.protocol);
            control.protocol.release()
        });
        drop(control);
        match message {
            // It was released before.
            Some(None) => {}
            Some(message) => self.connection.release(self, message),
            None => self.connection.release(self, None),
        }
    }
}

/// The error number for an error of the protocol.
fn to_errno(error: ChannelError) -> Error {
    match error {
        ChannelError::Rescinded => ENODEV,
        ChannelError::Busy => EBUSY,
        ChannelError::NotInVersion => EOPNOTSUPP,
        _ => EINVAL,
    }
}

#[pinned_drop]
impl PinnedDrop for Channel {
    fn drop(self: Pin<&mut Self>) {
        self.connection.channel_gone();
    }
}

/// A driver's wish to be told of sub-channels. See [`Channel::set_subchannel_handler`].
///
/// Dropping it takes the wish back, and waits for calls that run. It must not be dropped in such a
/// call.
pub struct SubchannelRegistration {
    channel: Arc<Channel>,
}

impl Drop for SubchannelRegistration {
    fn drop(&mut self) {
        let _announcing = self.channel.announcing.lock();
        let mut subchannels = self.channel.subchannels.lock();
        let handler = subchannels.handler.take();
        for channel in subchannels.list.iter() {
            // The next driver has not been told.
            channel.announced.store(false, Relaxed);
        }
        drop(subchannels);
        drop(handler);
    }
}

/// Memory that the host knows by an id.
struct GpadlHandle<T> {
    channel: Arc<Channel>,
    /// Where the protocol stands.
    protocol: client::Gpadl,
    /// What must not be freed before the host has let go of it.
    memory: Arc<T>,
}

impl<T> GpadlHandle<T> {
    /// Describes `len` bytes to the host.
    fn create(
        channel: &Arc<Channel>,
        len: usize,
        pfn: impl FnMut(u32) -> u64,
        memory: &Arc<T>,
    ) -> Result<Self> {
        let connection = &channel.connection;
        let id = connection.next_gpadl_id();
        let len = u32::try_from(len).map_err(|_| EINVAL)?;
        let messages = GpadlMessages::new(channel.id(), id, len, 0, pfn).map_err(|_| EINVAL)?;

        // From here on, dropping it takes the memory back from the host.
        let mut this = Self {
            channel: channel.clone(),
            protocol: client::Gpadl::new(channel.id(), id),
            memory: memory.clone(),
        };
        if !this.protocol.start() {
            return Err(EBUSY);
        }
        let mut posted = false;
        let key = Key::GpadlCreate(channel.id(), id);
        let answer = connection.ask(key, Some(channel), || {
            for message in messages {
                connection.post(&message)?;
                posted = true;
            }
            Ok(())
        });
        match answer {
            Ok(HostMessage::GpadlCreated(created)) => {
                match this.protocol.created(&created).map_err(|_| EIO)? {
                    Outcome::Done => Ok(this),
                    Outcome::Refused(status) => {
                        pr_err!(
                            "channel {}: host refuses {} bytes of memory, status {:#x}\n",
                            channel.id().get(),
                            len,
                            status
                        );
                        Err(EIO)
                    }
                }
            }
            Ok(_) => Err(EIO),
            Err(error) => {
                if !posted {
                    this.protocol.not_posted();
                }
                Err(error)
            }
        }
    }

    fn id(&self) -> GpadlId {
        self.protocol.gpadl_id()
    }

    /// Asks the host to let go of the memory.
    fn tear_down(&mut self) {
        let channel = &self.channel;
        // With the channel, the host took back what belongs to it.
        if channel.is_rescinded() {
            self.protocol.host_let_go();
            return;
        }
        let Some(message) = self.protocol.teardown() else {
            return;
        };
        let key = Key::GpadlTeardown(message.gpadl_id);
        let answer = channel.connection.ask(key, Some(channel), || {
            channel.connection.post(&message.encode())
        });
        match answer {
            Ok(HostMessage::GpadlTorndown(torn)) => {
                // It cannot be another one's: the key has the id.
                let _ = self.protocol.torndown(&torn);
            }
            Err(_) if channel.is_rescinded() => self.protocol.host_let_go(),
            _ => self.protocol.teardown_timed_out(),
        }
    }
}

impl<T> Drop for GpadlHandle<T> {
    /// Without the host's word that it has let go of the memory, that is never freed.
    fn drop(&mut self) {
        self.tear_down();
        if !self.protocol.may_free() {
            pr_err!(
                "channel {}: the host keeps memory, it is lost\n",
                self.channel.id().get()
            );
            core::mem::forget(self.memory.clone());
        }
    }
}

/// A buffer that the host knows. See [`Channel::establish_gpadl`].
///
/// Dropping it asks the host to let go of the buffer, and sleeps until it has.
pub struct Gpadl {
    handle: GpadlHandle<SharedBuffer>,
    buffer: Arc<SharedBuffer>,
}

impl Gpadl {
    /// The id by which the host knows the buffer.
    pub fn id(&self) -> GpadlId {
        self.handle.id()
    }

    /// The buffer.
    pub fn buffer(&self) -> &SharedBuffer {
        &self.buffer
    }
}

/// An open channel. Dropping it closes the channel: no method of the handler runs after that.
///
/// Dropping it sleeps, so it must not be done in [`Handler::on_packet`]. If the host does not let
/// go of the rings, their memory is never freed.
pub struct OpenChannel {
    channel: Arc<Channel>,
    /// `None` only after [`OpenChannel::finish`].
    gpadl: Option<GpadlHandle<RingPair>>,
}

impl OpenChannel {
    /// The channel.
    pub fn channel(&self) -> &Arc<Channel> {
        &self.channel
    }

    fn gpadl_id(&self) -> GpadlId {
        self.gpadl
            .as_ref()
            .map_or(GpadlId::new(0), |gpadl| gpadl.id())
    }

    /// Ends it, with `control` held.
    fn finish(&mut self, control: &mut Control) {
        let channel = &self.channel;
        let opened = channel.opened.replace(None);
        if channel.is_rescinded() {
            channel.note_rescind(&mut control.protocol);
        }
        if let Some(message) = control.protocol.close() {
            // The error has been logged; there is nothing else to be done.
            let _ = channel.connection.post(&message.encode());
        }
        // The host lets go of the rings before they are freed with the last reference.
        drop(self.gpadl.take());
        drop(opened);
    }
}

impl Deref for OpenChannel {
    type Target = Channel;

    fn deref(&self) -> &Channel {
        &self.channel
    }
}

impl Drop for OpenChannel {
    fn drop(&mut self) {
        if self.gpadl.is_none() {
            return;
        }
        let channel = self.channel.clone();
        {
            let mut control = channel.control.lock();
            self.finish(&mut control);
            control.open = false;
            channel.set_state(State::Closed);
        }
        // Wait for a notification that runs, which uses the handler.
        drop(channel.rescinding.lock());
        if channel.is_leaving() && channel.primary.is_some() {
            channel.schedule_update();
        }
    }
}
