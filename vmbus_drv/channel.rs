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

mod gpadl;
mod handler;
mod lifecycle;
mod transfer;

pub use self::{
    gpadl::Gpadl,
    handler::{
        Handler,
        OpenParams,
        ReadMode,
        SubchannelHandler, //
    },
    lifecycle::SubchannelRegistration, //
};

use self::{
    gpadl::GpadlHandle,
    transfer::Opened, //
};
use crate::{
    connection::Connection,
    cpu,
    device::{
        ChannelDirectory,
        ChannelsDirectory,
        Registration, //
    },
    log::err_limited,
    memory::RingPair,
    noio::NoIo,
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
    ring::Snapshot,
    version::Version, //
};
use kernel::{
    impl_has_work,
    new_mutex,
    new_work,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed, //
        },
        rcu,
        Arc,
        Mutex, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

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
    /// How often the host has kept memory that it should have let go of.
    lost: Atomic<u32>,
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
        // A disk may be waiting for its removal, which comes after this.
        let _noio = NoIo::begin();
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
        let channel = Arc::pin_init(
            pin_init!(Self {
                connection,
                offer,
                primary,
                target_cpu: Atomic::new(target_cpu),
                state: Atomic::new(State::Offered as u32),
                rescinded: Atomic::new(false),
                leaving: Atomic::new(false),
                opened: RcuArc::empty(),
                lost: Atomic::new(0),
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
        )?;
        channel.connection.channel_made();
        Ok(channel)
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

    /// How often the host has not let go of memory that it was given for the channel; each time the
    /// memory is lost.
    pub fn lost_memory(&self) -> u32 {
        self.lost.load(Relaxed)
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
            Snapshot::of(&opened.rings().outgoing)
        } else {
            Snapshot::of(&opened.rings().incoming)
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
    fn subchannel_count(&self) -> usize {
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
            Err(_) => {
                self.set_state(State::Closed);
                drop(control);
                // Wait for a notification that runs, which uses the handler.
                drop(self.rescinding.lock());
            }
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
        let opened = Opened::new(params, handler, pair.clone())?;
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
                        err_limited!(
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
        self.retarget(&mut control, new)
    }

    /// Gives the channel to `new` because its CPU goes offline. Fails only if the host has to agree
    /// and does not, or cannot say that it does.
    pub(crate) fn leave_cpu(&self, new: u32) -> Result {
        let mut control = self.control.lock();
        if !control.open {
            // The host hears of the CPU when the channel is opened.
            self.target_cpu.store(new, Relaxed);
            return Ok(());
        }
        // Before 5.3 the host does not say when it has stopped to use the old CPU.
        if !self.version().has_modify_channel_response() {
            return Err(EBUSY);
        }
        match self.retarget(&mut control, new) {
            Err(error) if error == ENODEV => Ok(()),
            result => result,
        }
    }

    /// Sets the CPU of a channel that nobody can have opened yet.
    pub(crate) fn set_first_cpu(&self, cpu: u32) {
        self.target_cpu.store(cpu, Relaxed);
    }

    /// The part of a change of CPU with `control` held, for an open channel.
    fn retarget(&self, control: &mut Control, new: u32) -> Result {
        if self.is_rescinded() {
            return Err(ENODEV);
        }
        if self.target_cpu() == new {
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
        // A signal may have gone to the old CPU's page while it was on its way out.
        if let Some(this) = self.connection.channel(self.id()) {
            this.schedule_receive();
        }
        Ok(())
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
        if channel.is_leaving() {
            // It was not released while it was open.
            channel.schedule_update();
        }
    }
}
