// SPDX-License-Identifier: GPL-2.0

//! Sending and receiving on an open channel.

use super::{
    Channel,
    Handler,
    OpenParams,
    ReadMode,
    NOTIFY,
    RECEIVE, //
};
use crate::{
    log::{
        warn_limited,
        Show, //
    },
    memory::{
        RingMapping,
        RingPair, //
    }, //
};
use hv_proto::{
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
    }, //
};
use kernel::{
    new_spinlock,
    new_spinlock_irq,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        rcu,
        Arc,
        ArcBorrow,
        SpinLock,
        SpinLockIrq, //
    }, //
};

/// Packets that are handled before another work item of the same CPU gets its turn.
const BUDGET: usize = 256;

/// Packets that are handled before the host sees that there is room again.
const COMMIT_EVERY: usize = 32;
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

impl Opened {
    /// Takes both rings, which have been set up and are not known to the host yet.
    pub(super) fn new(
        params: &OpenParams<'_>,
        handler: Arc<dyn Handler>,
        rings: Arc<RingPair>,
    ) -> Result<Arc<Self>> {
        let mut buf = KVVec::new();
        buf.resize(params.max_packet, 0, GFP_KERNEL)?;
        let producer = Producer::new(Ring::<true>(rings.clone())).map_err(|_| EIO)?;
        let ring = Consumer::new(Ring::<false>(rings.clone())).map_err(|_| EIO)?;
        Arc::pin_init(
            pin_init!(Self {
                handler,
                mode: params.mode,
                rings,
                sender <- new_spinlock_irq!(producer),
                receiver <- new_spinlock!(Receiver { ring, buf }),
                send_wanted: Atomic::new(false),
                send_full: Atomic::new(false),
                broken: Atomic::new(false),
            }),
            GFP_KERNEL,
        )
    }

    pub(super) fn handler(&self) -> &Arc<dyn Handler> {
        &self.handler
    }

    pub(super) fn rings(&self) -> &RingPair {
        &self.rings
    }

    /// Whether the host has damaged a ring.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Relaxed)
    }
}

impl Channel {
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
        self.send_parts(&[payload], request_id, completion)
    }

    /// As [`Channel::send`], with a payload of several parts that follow each other.
    ///
    /// # Errors
    ///
    /// As [`Channel::send`].
    pub fn send_parts(&self, payload: &[&[u8]], request_id: u64, completion: bool) -> Result {
        self.send_with(|ring| ring.write(Header::in_band(request_id, completion), payload))
    }

    /// Sends a packet with ranges of guest memory that the host may read and write until it has
    /// answered. The answer repeats `request_id`.
    ///
    /// Any context.
    ///
    /// # Errors
    ///
    /// As [`Channel::send`]; `EINVAL` if there is no range, or the number of pages of one does not
    /// fit its length.
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

    /// As [`Channel::send_gpa_ranges`], with one range and its frame numbers from an iterator: they go
    /// straight into the ring. There must be exactly as many as the range touches pages.
    ///
    /// # Errors
    ///
    /// As [`Channel::send_gpa_ranges`].
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
            ReadMode::Isr => this.interrupt_driver(&opened),
            ReadMode::Batched => {
                opened.rings.incoming.store(Field::InterruptMask, 1);
                Arc::from(this).schedule_receive();
            }
            ReadMode::Direct => Arc::from(this).schedule_receive(),
        }
    }

    /// Tells a driver that polls. Any context in which the RCU read side is held.
    fn interrupt_driver(&self, opened: &Opened) {
        opened.rings.incoming.store(Field::InterruptMask, 1);
        opened.handler.on_interrupt(self);
    }

    /// Looks for packets as if the host had signalled.
    pub(super) fn schedule_receive(self: Arc<Self>) {
        let queues = self.connection.queues().clone();
        // If it is queued already, it will see what there is now.
        let _ = queues.softirq.enqueue::<Arc<Channel>, RECEIVE>(self);
    }

    /// Handles packets. Returns true if there may be more. Softirq context.
    pub(super) fn receive(&self) -> bool {
        let guard = rcu::read_lock();
        let Some(opened) = self.opened.get(&guard) else {
            return false;
        };
        if opened.mode == ReadMode::Isr {
            self.interrupt_driver(&opened);
            return false;
        }
        let more = self
            .receive_some(&opened, BUDGET, |packet| {
                opened.handler.on_packet(self, packet);
                1
            })
            .1;
        self.check_send_space(&opened);
        more
    }

    /// Reads packets ([`ReadMode::Isr`] only) and calls `each` for them, until the ring is empty or
    /// `budget` is used up. `each` returns how much of the budget the packet took; it is taken as at
    /// least 1, so that no packet is free.
    ///
    /// Returns what was used. If that is less than `budget`, the ring is empty and the host signals
    /// the next packet ([`Handler::on_interrupt`]), possibly before this returns. If it is
    /// `budget`, the driver must call again: there is no signal. It is never more.
    ///
    /// A packet is a private copy, as for [`Handler::on_packet`].
    ///
    /// Softirq context (NAPI), one caller at a time.
    pub fn poll(&self, budget: usize, each: &mut dyn FnMut(&Packet<'_>) -> usize) -> usize {
        let guard = rcu::read_lock();
        let Some(opened) = self.opened.get(&guard) else {
            return 0;
        };
        let (done, more) = self.receive_some(&opened, budget, each);
        self.check_send_space(&opened);
        if more {
            budget
        } else {
            done
        }
    }

    /// Returns what was used of the budget, and whether there may be more packets.
    fn receive_some(
        &self,
        opened: &Opened,
        budget: usize,
        mut each: impl FnMut(&Packet<'_>) -> usize,
    ) -> (usize, bool) {
        // Somebody who has it is at work, and will see everything that came before.
        let Some(mut receiver) = opened.receiver.try_lock() else {
            return (0, true);
        };
        let Receiver { ring, buf } = &mut *receiver;
        let mut done = 0usize;
        let mut uncommitted = 0usize;
        if opened.broken.load(Relaxed) {
            return (0, false);
        }
        while done < budget {
            match ring.read(buf) {
                Ok(Some(packet)) => {
                    self.stats.received.count();
                    done = done.saturating_add(each(&packet).max(1));
                    uncommitted = uncommitted.saturating_add(1);
                    if uncommitted >= COMMIT_EVERY {
                        uncommitted = 0;
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
                    // A host can make it so, and take it back, without end.
                    done = done.saturating_add(1);
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

    pub(super) fn schedule_notify(self: Arc<Self>) {
        let queues = self.connection.queues().clone();
        // If it is queued already, it will see the state of now.
        let _ = queues.notify.enqueue::<Arc<Channel>, NOTIFY>(self);
    }
}
