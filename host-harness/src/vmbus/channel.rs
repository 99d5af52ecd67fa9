// SPDX-License-Identifier: MIT OR Apache-2.0

//! An open channel as a VSP sees it: a reader for the packets of the guest and a writer for the
//! packets to the guest.
//!
//! # Locks and waiting
//! Any number of threads may write; the producer's lock is held while one packet is copied, never
//! while waiting. A sender that finds the ring full asks the guest for a signal (pending-send
//! size) and sleeps, at most [`SEND_TIMEOUT`]. The guest has one signal for both directions, so
//! whoever takes it (the reader, or a sender that waits for space) passes it on to the other.
//!
//! When a channel closes, reading ends first. Until the VSP has closed it, what was read before
//! can still be answered, as far as there is space: a guest whose device is taken away gets the
//! results of what was under way.
//!
//! Order: server state, then turnstile, then producer. No server lock is taken with one of this
//! file's held.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use hv_proto::ids::{ChannelId, GpadlId, VpIndex};
use hv_proto::packet::{
    DESCRIPTOR_SIZE, Descriptor, Header, MAX_PACKET_SIZE, Packet, TransferPageRange,
    TransferPagesPrefix,
};
use hv_proto::ring::{Consumer, Corrupt, Producer, ReadError, Signal, WriteError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::IntoBytes;

use super::counters::Counters;
use super::gpa::{GpaError, GuestBuffer, GuestMem};
use super::ring::GuestRing;
use super::server::{DeviceHandle, Server};
use super::trace::{Direction, Trace};
use crate::hypervisor::SynicPort;

/// How long a send waits for a guest that does not empty its ring.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// A sleeper looks at the ring this often even without a signal, so that a guest that does not
/// obey pending-send sizes is slow but not stuck.
const SPACE_POLL: Duration = Duration::from_millis(50);

/// Why a channel could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The channel is closing. Return from the thread that serves it.
    #[error("the channel is closing")]
    Stopped,
    /// The guest does not empty the ring.
    #[error("the ring to the guest is full")]
    Full,
    /// The packet can never be sent on this ring, or its parts do not fit together.
    #[error("cannot send this packet: {0}")]
    BadPacket(WriteError),
    /// The guest has damaged a ring. The server closes the channel.
    #[error("the guest damaged the ring: {0}")]
    Corrupt(Corrupt),
    /// The system refused to wait.
    #[error("waiting for the guest: {0}")]
    System(#[from] io::Error),
}

/// A GPADL of the guest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GpadlError {
    /// The guest made no such GPADL for this channel, or is tearing it down.
    #[error("the channel has no GPADL {0}")]
    Unknown(GpadlId),
    /// A page of it is not guest memory.
    #[error(transparent)]
    Pages(#[from] GpaError),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic of a VSP's thread must not take other threads down. The data are consistent at every
    // point where the lock can be released.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What reader, writers and server share of an open channel.
pub(super) struct Shared {
    pub(super) id: ChannelId,
    pub(super) subchannel_index: u16,
    /// Tells this opening of the channel from earlier ones.
    pub(super) serial: u64,
    pub(super) mem: GuestMem,
    pub(super) synic: Arc<dyn SynicPort>,
    pub(super) sint: u8,
    /// The virtual processor that gets the interrupts; shared with the server, which changes it.
    pub(super) target_vp: Arc<AtomicU32>,
    pub(super) counters: Arc<Counters>,
    pub(super) trace: Option<Arc<Trace>>,
    pub(super) server: Weak<Server>,
    pub(super) device: u64,
    /// The guest signalled.
    pub(super) signal: EventFd,
    /// The reader shall look again.
    kick: EventFd,
    /// A sender that waits shall look again.
    space: EventFd,
    stop: EventFd,
    /// The channel is closing: nothing is read any more, and nobody waits for the guest. Answers
    /// to what was read before may still be written.
    closing: AtomicBool,
    /// Nothing is written any more.
    closed: AtomicBool,
    woken: AtomicBool,
    space_waiters: AtomicU32,
}

/// What a channel is opened with, apart from its rings.
pub(super) struct SharedParams {
    pub(super) id: ChannelId,
    pub(super) subchannel_index: u16,
    pub(super) serial: u64,
    pub(super) mem: GuestMem,
    pub(super) synic: Arc<dyn SynicPort>,
    pub(super) sint: u8,
    pub(super) target_vp: Arc<AtomicU32>,
    pub(super) counters: Arc<Counters>,
    pub(super) trace: Option<Arc<Trace>>,
    pub(super) server: Weak<Server>,
    pub(super) device: u64,
}

impl Shared {
    fn new(p: SharedParams) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK);
        Ok(Self {
            id: p.id,
            subchannel_index: p.subchannel_index,
            serial: p.serial,
            mem: p.mem,
            synic: p.synic,
            sint: p.sint,
            target_vp: p.target_vp,
            counters: p.counters,
            trace: p.trace,
            server: p.server,
            device: p.device,
            signal: event()?,
            kick: event()?,
            space: event()?,
            stop: event()?,
            closing: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            woken: AtomicBool::new(false),
            space_waiters: AtomicU32::new(0),
        })
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Makes every read fail from now on, and ends every wait.
    fn stop(&self) {
        self.closing.store(true, Ordering::Release);
        notify(&self.stop);
    }

    pub(super) fn interrupt(&self) {
        let vp = VpIndex::new(self.target_vp.load(Ordering::Relaxed));
        // The id of an open channel always has a flag.
        let Some(flag) = self.id.event_flag() else {
            return;
        };
        if let Err(error) = self.synic.signal_event(vp, self.sint, flag) {
            // The guest turned its own SynIC off; it must look at its rings when it is back.
            tracing::debug!(channel = self.id.get(), %error, "cannot signal the guest");
        }
    }

    /// The ring is beyond repair: stop, and have the server close the channel.
    fn fail(&self, what: Corrupt) -> ChannelError {
        if !self.closed.swap(true, Ordering::AcqRel) {
            self.stop();
            if let Some(server) = self.server.upgrade() {
                server.channel_failed(self.id, self.serial, what);
            }
        }
        ChannelError::Corrupt(what)
    }

    /// Takes the guest's signal, if there is one.
    fn take_signal(&self) -> bool {
        match self.signal.read() {
            Ok(n) => {
                self.counters.signals(n);
                true
            }
            Err(_) => false,
        }
    }
}

/// Writes to an event. It can only fail when the count is at its limit, and then the reader is
/// woken anyway.
fn notify(event: &EventFd) {
    let _ = event.write(1);
}

/// An open channel, for the VSP that serves it.
pub struct HostChannel {
    reader: ChannelReader,
    writer: ChannelWriter,
}

impl HostChannel {
    /// Sets up the host's side of the rings: `incoming` has the packets of the guest.
    pub(super) fn new(
        params: SharedParams,
        incoming: GuestRing,
        outgoing: GuestRing,
    ) -> Result<(Self, ChannelControl), ChannelError> {
        let rings = [incoming.clone(), outgoing.clone()];
        let consumer = Consumer::new(incoming).map_err(ChannelError::Corrupt)?;
        let producer = Producer::new(outgoing).map_err(ChannelError::Corrupt)?;
        let shared = Arc::new(Shared::new(params)?);
        let epoll = Epoll::new()?;
        for event in [&shared.signal, &shared.kick, &shared.stop] {
            let fd = event.as_raw_fd();
            epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN, fd as u64),
            )?;
        }
        let inner = Arc::new(WriterInner {
            producer: Mutex::new(producer),
            turnstile: Mutex::new(()),
        });
        let control = ChannelControl {
            shared: shared.clone(),
            inner: inner.clone(),
            rings,
        };
        let channel = Self {
            reader: ChannelReader {
                epoll,
                // Room for every packet that the ring can hold.
                buffer: vec![0; consumer.data_len().min(MAX_PACKET_SIZE) as usize],
                consumer,
                masked: false,
                shared: shared.clone(),
            },
            writer: ChannelWriter { shared, inner },
        };
        Ok((channel, control))
    }

    /// The channel's number on the bus.
    pub fn id(&self) -> ChannelId {
        self.reader.shared.id
    }

    /// 0 for the primary channel of the device.
    pub fn subchannel_index(&self) -> u16 {
        self.reader.shared.subchannel_index
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMem {
        &self.reader.shared.mem
    }

    /// The device that the channel belongs to, for instance to offer sub-channels.
    pub fn device(&self) -> DeviceHandle {
        self.reader.device()
    }

    /// The two ends, for different threads.
    pub fn into_parts(self) -> (ChannelReader, ChannelWriter) {
        (self.reader, self.writer)
    }
}

/// The server's hold on an open channel.
pub(super) struct ChannelControl {
    pub(super) shared: Arc<Shared>,
    inner: Arc<WriterInner>,
    /// Guest to host, and host to guest.
    rings: [GuestRing; 2],
}

impl ChannelControl {
    /// The memory of a ring, for who breaks the rules on purpose.
    pub(super) fn ring(&self, direction: Direction) -> &GuestRing {
        match direction {
            Direction::ToHost => &self.rings[0],
            Direction::ToGuest => &self.rings[1],
        }
    }

    /// The guest signalled by other means than the hypervisor's.
    pub(super) fn signalled(&self) {
        notify(&self.shared.signal);
    }

    /// Tells the VSP that the channel is closing: the reader fails at its next call, and senders
    /// do not wait for space any more. What was read before can still be answered.
    pub(super) fn stop(&self) {
        self.shared.stop();
    }

    /// Ends all use of the rings. When this returns, no writer touches them any more.
    pub(super) fn finish(&self) {
        self.shared.stop();
        self.shared.closed.store(true, Ordering::Release);
        // A writer looks at `closed` with this lock held, so whoever got it before us is done now.
        drop(lock(&self.inner.producer));
    }
}

/// A GPADL that a VSP uses. While one lives, the guest is not told that its memory is free.
pub struct GpadlView {
    pub(super) id: GpadlId,
    /// Tells this GPADL from an earlier one with the same id.
    pub(super) serial: u64,
    pub(super) buffer: GuestBuffer,
    pub(super) server: Weak<Server>,
}

impl GpadlView {
    /// The memory: all ranges of the GPADL, one after the other.
    pub fn buffer(&self) -> &GuestBuffer {
        &self.buffer
    }
}

impl Drop for GpadlView {
    fn drop(&mut self) {
        if let Some(server) = self.server.upgrade() {
            server.gpadl_view_dropped(self.id, self.serial);
        }
    }
}

/// Wakes a reader from another thread.
#[derive(Clone)]
pub struct Waker(Arc<Shared>);

impl Waker {
    /// Ends the present or the next wait of [`ChannelReader::next`], which then returns
    /// `Ok(None)`.
    pub fn wake(&self) {
        self.0.woken.store(true, Ordering::Release);
        notify(&self.0.kick);
    }
}

/// The host's end of the ring that the guest writes.
pub struct ChannelReader {
    shared: Arc<Shared>,
    consumer: Consumer<GuestRing>,
    epoll: Epoll,
    buffer: Vec<u8>,
    /// Whether the guest was told not to signal, because packets are being read.
    masked: bool,
}

impl ChannelReader {
    /// Takes the next packet if there is one; never blocks. The packet is a private copy.
    ///
    /// # Errors
    /// The channel is closing, or the guest has damaged the ring.
    pub fn try_next(&mut self) -> Result<Option<Packet<'_>>, ChannelError> {
        if self.prepare()? {
            self.read()
        } else {
            Ok(None)
        }
    }

    /// Waits for the next packet, for ever if `timeout` is `None`. Returns `Ok(None)` when the
    /// time is over or somebody used the [`Waker`].
    ///
    /// # Errors
    /// The channel is closing, or the guest has damaged the ring.
    pub fn next(&mut self, timeout: Option<Duration>) -> Result<Option<Packet<'_>>, ChannelError> {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        loop {
            if self.prepare()? {
                break;
            }
            if self.shared.woken.swap(false, Ordering::AcqRel) {
                return Ok(None);
            }
            if self.masked {
                self.masked = false;
                let unmasked = self.consumer.unmask();
                self.after_commit(unmasked.signal);
                if unmasked.more {
                    continue;
                }
            }
            let wait_ms = match deadline {
                None => -1,
                Some(end) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    // Rounded up: a wait that ends too early would only be made again.
                    i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
                }
            };
            let mut events = [EpollEvent::default(); 3];
            let woken_by = match self.epoll.wait(wait_ms, &mut events) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e.into()),
                result => events.get(..result.unwrap_or(0)).unwrap_or_default(),
            };
            let shared = &self.shared;
            for event in woken_by {
                if event.fd() == shared.kick.as_raw_fd() {
                    // The count does not matter, and an empty event is as good.
                    let _ = shared.kick.read();
                } else if shared.take_signal() && shared.space_waiters.load(Ordering::SeqCst) > 0 {
                    notify(&shared.space);
                }
            }
        }
        self.read()
    }

    /// Gives the space of earlier packets back, and says whether there is another packet.
    fn prepare(&mut self) -> Result<bool, ChannelError> {
        if self.shared.is_closing() {
            return Err(ChannelError::Stopped);
        }
        let signal = self.consumer.commit();
        self.after_commit(signal);
        let ready = self.consumer.available_bytes();
        let ready = ready.map_err(|e| self.shared.fail(e))? > 0;
        if ready && !self.masked {
            self.masked = true;
            self.consumer.mask();
        }
        Ok(ready)
    }

    fn after_commit(&self, signal: Signal) {
        if signal.is_needed() {
            self.shared.counters.space_signal();
            self.shared.interrupt();
        }
    }

    fn read(&mut self) -> Result<Option<Packet<'_>>, ChannelError> {
        let shared = &self.shared;
        match self.consumer.read(&mut self.buffer) {
            Ok(Some(packet)) => {
                shared
                    .counters
                    .packet_in(packet.descriptor().len() as usize);
                if let Some(trace) = &shared.trace {
                    trace.packet(Direction::ToHost, shared.id, packet.descriptor(), None);
                }
                Ok(Some(packet))
            }
            Ok(None) => Ok(None),
            Err(ReadError::Corrupt(e)) => Err(shared.fail(e)),
            // The buffer takes every packet that fits the ring, so this cannot be.
            Err(_) => Err(shared.fail(Corrupt::DataLength(self.consumer.data_len()))),
        }
    }

    /// The channel's number on the bus.
    pub fn id(&self) -> ChannelId {
        self.shared.id
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMem {
        &self.shared.mem
    }

    /// The device that the channel belongs to.
    pub fn device(&self) -> DeviceHandle {
        DeviceHandle::new(self.shared.server.clone(), self.shared.device)
    }

    /// The memory of a GPADL that the guest made for this channel, for buffers that a driver sets
    /// up once. Drop all clones when the guest takes the buffer back: only then does the guest
    /// hear that its memory is free.
    ///
    /// # Errors
    /// There is no such GPADL, or the channel is closing.
    pub fn gpadl(&self, id: GpadlId) -> Result<GpadlView, GpadlError> {
        let server = self.shared.server.upgrade();
        let server = server.ok_or(GpadlError::Unknown(id))?;
        server.view_gpadl(self.shared.id, id)
    }

    /// A way to wake this reader from other threads.
    pub fn waker(&self) -> Waker {
        Waker(self.shared.clone())
    }
}

/// The host's end of the ring that the guest reads. Clones write to the same ring.
#[derive(Clone)]
pub struct ChannelWriter {
    shared: Arc<Shared>,
    inner: Arc<WriterInner>,
}

struct WriterInner {
    producer: Mutex<Producer<GuestRing>>,
    /// Held by the one sender that waits for space; later ones queue up here.
    turnstile: Mutex<()>,
}

impl ChannelWriter {
    /// Sends `payload` as an in-band packet. Waits at most [`SEND_TIMEOUT`] for space.
    ///
    /// # Errors
    /// The channel is closing, the guest does not empty the ring or has damaged it, or the packet
    /// is larger than the ring.
    pub fn send(
        &self,
        transaction_id: u64,
        payload: &[u8],
        completion_requested: bool,
    ) -> Result<(), ChannelError> {
        let header = Header::in_band(transaction_id, completion_requested);
        self.write_waiting(header, &[], &[payload])
    }

    /// Answers the request `transaction_id` of the guest. Waits at most [`SEND_TIMEOUT`] for space.
    ///
    /// # Errors
    /// As [`ChannelWriter::send`].
    pub fn complete(&self, transaction_id: u64, payload: &[u8]) -> Result<(), ChannelError> {
        self.write_waiting(Header::completion(transaction_id), &[], &[payload])
    }

    /// Like [`ChannelWriter::send`], but never waits.
    ///
    /// # Errors
    /// As [`ChannelWriter::send`]; [`ChannelError::Full`] at once.
    pub fn try_send(
        &self,
        transaction_id: u64,
        payload: &[u8],
        completion_requested: bool,
    ) -> Result<(), ChannelError> {
        let header = Header::in_band(transaction_id, completion_requested);
        self.write(header, &[], &[payload], false).map(drop)
    }

    /// Like [`ChannelWriter::complete`], but never waits.
    ///
    /// # Errors
    /// As [`ChannelWriter::complete`]; [`ChannelError::Full`] at once.
    pub fn try_complete(&self, transaction_id: u64, payload: &[u8]) -> Result<(), ChannelError> {
        self.write(Header::completion(transaction_id), &[], &[payload], false)
            .map(drop)
    }

    /// Sends a packet that names `ranges` of a buffer which both sides agreed on before. Waits at
    /// most [`SEND_TIMEOUT`] for space.
    ///
    /// # Errors
    /// As [`ChannelWriter::send`].
    pub fn send_transfer_pages(
        &self,
        transaction_id: u64,
        pageset_id: u16,
        ranges: &[TransferPageRange],
        payload: &[u8],
        completion_requested: bool,
    ) -> Result<(), ChannelError> {
        let too_many = |_| ChannelError::BadPacket(WriteError::TooLarge);
        let prefix = TransferPagesPrefix {
            pageset_id: pageset_id.into(),
            sender_owns_set: 0,
            reserved: 0,
            range_count: u32::try_from(ranges.len()).map_err(too_many)?.into(),
        };
        let header = Header::transfer_pages(transaction_id, completion_requested);
        let extension = [prefix.as_bytes(), ranges.as_bytes()];
        self.write_waiting(header, &extension, &[payload])
    }

    /// Writes a packet, and waits for space if there is none.
    fn write_waiting(
        &self,
        header: Header,
        extension: &[&[u8]],
        payload: &[&[u8]],
    ) -> Result<(), ChannelError> {
        match self.write(header, extension, payload, false) {
            Err(ChannelError::Full) => {}
            other => return other,
        }
        let deadline = Instant::now() + SEND_TIMEOUT;
        // One sender waits for space, and those that come later wait for their turn.
        let _turn = lock(&self.inner.turnstile);
        self.shared.space_waiters.fetch_add(1, Ordering::SeqCst);
        let result = self.wait_and_write(header, extension, payload, deadline);
        self.shared.space_waiters.fetch_sub(1, Ordering::SeqCst);
        if result.is_err() {
            lock(&self.inner.producer).stop_waiting();
        }
        result
    }

    fn wait_and_write(
        &self,
        header: Header,
        extension: &[&[u8]],
        payload: &[&[u8]],
        deadline: Instant,
    ) -> Result<(), ChannelError> {
        let shared = &self.shared;
        let epoll = Epoll::new()?;
        for event in [&shared.signal, &shared.space, &shared.stop] {
            let fd = event.as_raw_fd();
            let interest = EpollEvent::new(EventSet::IN, fd as u64);
            epoll.ctl(ControlOperation::Add, fd, interest)?;
        }
        loop {
            match self.write(header, extension, payload, true) {
                Err(ChannelError::Full) => {}
                other => return other,
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ChannelError::Full);
            }
            let wait_ms = left.min(SPACE_POLL).as_millis().max(1) as i32;
            let mut events = [EpollEvent::default(); 3];
            match epoll.wait(wait_ms, &mut events) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e.into()),
                _ => {}
            }
            if shared.take_signal() {
                // The signal may have been for the reader.
                notify(&shared.kick);
            }
            let _ = shared.space.read();
        }
    }

    /// Writes a packet if there is space. Otherwise, with `wait`, asks the guest for a signal.
    fn write(
        &self,
        header: Header,
        extension: &[&[u8]],
        payload: &[&[u8]],
        wait: bool,
    ) -> Result<(), ChannelError> {
        let shared = &self.shared;
        let written = {
            let mut producer = lock(&self.inner.producer);
            // With the lock held: see `ChannelControl::finish`.
            if shared.closed.load(Ordering::Acquire) {
                return Err(ChannelError::Stopped);
            }
            match producer.write_parts(header, extension, payload) {
                Err(WriteError::Full { needed }) if wait => match producer.wait_for_space(needed) {
                    // Space appeared between the two calls. If it is gone again, which a correct
                    // guest cannot do, the caller's timed wait handles it.
                    Ok(true) => producer.write_parts(header, extension, payload),
                    Ok(false) => Err(WriteError::Full { needed }),
                    Err(e) => Err(WriteError::Corrupt(e)),
                },
                other => other,
            }
        };
        let signal = match written {
            Ok(signal) => signal,
            Err(WriteError::Full { .. }) => {
                if !wait {
                    shared.counters.ring_full();
                }
                // A guest that closes the channel need not empty the ring.
                return Err(if shared.is_closing() {
                    ChannelError::Stopped
                } else {
                    ChannelError::Full
                });
            }
            // The lock is not held any more: this takes the server's.
            Err(WriteError::Corrupt(e)) => return Err(shared.fail(e)),
            Err(e) => return Err(ChannelError::BadPacket(e)),
        };
        let sum = |parts: &[&[u8]]| parts.iter().map(|p| p.len()).sum::<usize>();
        let head = DESCRIPTOR_SIZE as usize + sum(extension);
        let len = head + sum(payload);
        shared.counters.packet_out(len);
        if let Some(trace) = &shared.trace {
            // The same numbers as in the ring; the lengths fit, or the write would have failed.
            let units = |bytes: usize| (bytes.div_ceil(8) as u16).into();
            let descriptor = Descriptor {
                packet_type: header.packet_type,
                offset8: units(head),
                len8: units(len),
                flags: header.flags.bits().into(),
                transaction_id: header.transaction_id.into(),
            };
            trace.packet(
                Direction::ToGuest,
                shared.id,
                &descriptor,
                Some(signal.is_needed()),
            );
        }
        if signal.is_needed() {
            shared.counters.interrupt();
            shared.interrupt();
        }
        Ok(())
    }

    /// The channel's number on the bus.
    pub fn id(&self) -> ChannelId {
        self.shared.id
    }
}
