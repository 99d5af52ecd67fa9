// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest for tests, in memory and without KVM: it drives a [`Server`] through its
//! [`MessageSink`] side, keeps what the server sends through a [`SynicPort`] of its own, and uses
//! rings in a `vm-memory` guest memory, with the guest's side of `hv_proto`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use hv_proto::gpadl::GpadlMessages;
use hv_proto::guid::Guid;
use hv_proto::hypercall::HvStatus;
use hv_proto::ids::{ChannelId, ConnectionId, GpadlId, OpenId, VpIndex};
use hv_proto::message::{
    CloseChannel, ContactTarget, GpadlTeardown, GpadlTorndown, HostMessage, InitiateContact,
    Message, ModifyChannel, OfferChannel, OpenChannel, RelidReleased, RequestOffers, Unload,
};
use hv_proto::packet::{Header, PacketType};
use hv_proto::ring::{Consumer, Field, Producer, RingMem, Signal, WriteError, initialize};
use hv_proto::version::Version;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::FromZeros;

use super::gpa::GuestMem;
use super::ring::GuestRing;
use super::{Server, ServerConfig, Trace};
use crate::events::Events;
use crate::hypervisor::{MessageSink, SynicError, SynicPort};

/// How long a test waits for something that must come.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// How long a test waits for something that must not come.
pub(crate) const NEVER: Duration = Duration::from_millis(30);

#[derive(Default)]
struct Seen {
    messages: VecDeque<Vec<u8>>,
    events: Vec<(u32, u8, u16)>,
    bindings: BTreeMap<u32, EventFd>,
    /// Most messages in the queue; 0 for no limit.
    capacity: usize,
}

/// A SynIC that keeps what it gets.
#[derive(Default)]
pub(crate) struct FakeSynic {
    seen: Mutex<Seen>,
    changed: Condvar,
    weak: Weak<FakeSynic>,
}

impl FakeSynic {
    fn new() -> Arc<Self> {
        Arc::new_cyclic(|weak| Self {
            weak: weak.clone(),
            ..Self::default()
        })
    }

    /// Makes the queue of messages full when it has this many.
    pub(crate) fn set_capacity(&self, capacity: usize) {
        self.seen.lock().unwrap().capacity = capacity;
    }

    fn wait<R>(&self, timeout: Duration, mut f: impl FnMut(&mut Seen) -> Option<R>) -> Option<R> {
        let deadline = Instant::now() + timeout;
        let mut seen = self.seen.lock().unwrap();
        loop {
            if let Some(found) = f(&mut seen) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            seen = self.changed.wait_timeout(seen, left).unwrap().0;
        }
    }

    /// The event flags that were set so far, as (virtual processor, SINT, flag).
    pub(crate) fn take_events(&self) -> Vec<(u32, u8, u16)> {
        std::mem::take(&mut self.seen.lock().unwrap().events)
    }

    /// The next event flag.
    pub(crate) fn wait_event(&self, timeout: Duration) -> Option<(u32, u8, u16)> {
        self.wait(timeout, |seen| {
            (!seen.events.is_empty()).then(|| seen.events.remove(0))
        })
    }

    /// HvSignalEvent. False if nothing is bound to the connection.
    pub(crate) fn signal(&self, connection: ConnectionId) -> bool {
        let seen = self.seen.lock().unwrap();
        let event = seen.bindings.get(&connection.get());
        event.is_some_and(|e| e.write(1).is_ok())
    }
}

struct Binding {
    synic: Weak<FakeSynic>,
    connection: u32,
}

impl Drop for Binding {
    fn drop(&mut self) {
        if let Some(synic) = self.synic.upgrade() {
            synic.seen.lock().unwrap().bindings.remove(&self.connection);
        }
    }
}

impl SynicPort for FakeSynic {
    fn post_message(
        &self,
        vp: VpIndex,
        sint: u8,
        message_type: u32,
        payload: &[u8],
    ) -> Result<(), SynicError> {
        assert!(vp.get() < 4 && sint < 16 && message_type == 1);
        let mut seen = self.seen.lock().unwrap();
        if seen.capacity != 0 && seen.messages.len() >= seen.capacity {
            return Err(SynicError::QueueFull(vp));
        }
        seen.messages.push_back(payload.to_vec());
        self.changed.notify_all();
        Ok(())
    }

    fn signal_event(&self, vp: VpIndex, sint: u8, flag: u16) -> Result<(), SynicError> {
        self.seen
            .lock()
            .unwrap()
            .events
            .push((vp.get(), sint, flag));
        self.changed.notify_all();
        Ok(())
    }

    fn bind_event(
        &self,
        connection: ConnectionId,
        event: EventFd,
    ) -> Result<Box<dyn Send>, SynicError> {
        let connection = connection.get();
        let old = self.seen.lock().unwrap().bindings.insert(connection, event);
        assert!(old.is_none(), "connection bound twice");
        Ok(Box::new(Binding {
            synic: self.weak.clone(),
            connection,
        }))
    }
}

/// The guest.
pub(crate) struct FakeGuest {
    pub(crate) mem: GuestMem,
    pub(crate) synic: Arc<FakeSynic>,
    pub(crate) server: Arc<Server>,
    /// What the server publishes.
    pub(crate) events: Events,
    connection: ConnectionId,
    version: Option<Version>,
    next_pfn: u64,
    next_gpadl: GpadlId,
}

/// Pages of the guest's memory.
pub(crate) const PAGES: u64 = 20_000;

impl FakeGuest {
    /// A guest with 4 virtual processors on a server that speaks up to `max_version`.
    pub(crate) fn new(max_version: Version) -> Self {
        Self::with_trace(max_version, None)
    }

    pub(crate) fn with_trace(max_version: Version, trace: Option<Arc<Trace>>) -> Self {
        let ranges = [(GuestAddress(0), (PAGES as usize) << 12)];
        let mem: GuestMem = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let synic = FakeSynic::new();
        let events = Events::default();
        let config = ServerConfig {
            max_version,
            vp_count: 4,
            trace,
            monitor_latency: None,
            events: events.clone(),
        };
        let server = Server::new(mem.clone(), synic.clone(), config);
        Self {
            mem,
            synic,
            server,
            events,
            connection: ConnectionId::MESSAGE,
            version: None,
            next_pfn: 16,
            next_gpadl: GpadlId::FIRST,
        }
    }

    /// A guest that is connected.
    pub(crate) fn connected(version: Version) -> Self {
        let mut guest = Self::new(version);
        assert!(guest.connect(version));
        guest
    }

    pub(crate) fn post_raw(&self, bytes: &[u8]) -> HvStatus {
        self.server.post_message(self.connection, 1, bytes)
    }

    /// Posts a message, which the hypervisor must take.
    pub(crate) fn post(&self, message: &impl Message) {
        assert_eq!(self.post_raw(&message.encode()), HvStatus::SUCCESS);
    }

    /// The next message of the server.
    pub(crate) fn receive(&self, timeout: Duration) -> Option<HostMessage> {
        let bytes = self.synic.wait(timeout, |seen| seen.messages.pop_front())?;
        Some(HostMessage::parse(&bytes, Some(Version::NEWEST)).unwrap())
    }

    /// The next message of the server, which must come.
    pub(crate) fn expect(&self) -> HostMessage {
        self.receive(SOON).expect("no message from the server")
    }

    /// No message must come.
    pub(crate) fn expect_nothing(&self) {
        if let Some(message) = self.receive(NEVER) {
            panic!("unexpected {message:?}");
        }
    }

    /// Address of the monitor page in which this guest signals.
    pub(crate) const MONITOR_PAGE: u64 = 3 << 12;

    /// INITIATE_CONTACT for a version number, sent to a connection.
    pub(crate) fn contact(&mut self, raw: u32, connection: ConnectionId) -> HvStatus {
        self.connection = connection;
        let mut contact = InitiateContact::new_zeroed();
        contact.version = raw.into();
        contact.monitor_page1 = (2u64 << 12).into();
        contact.monitor_page2 = Self::MONITOR_PAGE.into();
        contact.interrupt_page_or_target = if raw >= Version::V5_0.raw() {
            let target = ContactTarget {
                sint: 2,
                ..ContactTarget::new_zeroed()
            };
            target.to_field()
        } else {
            (1u64 << 12).into()
        };
        self.post_raw(&contact.encode())
    }

    /// Makes contact as a driver does. Returns whether the server speaks the version.
    pub(crate) fn connect(&mut self, version: Version) -> bool {
        self.version = None;
        let connection = if version.uses_message_connection_id() {
            ConnectionId::MESSAGE_V5
        } else {
            ConnectionId::MESSAGE
        };
        match self.contact(version.raw(), connection) {
            HvStatus::SUCCESS => {}
            HvStatus::INVALID_CONNECTION_ID => return false,
            other => panic!("{other:?}"),
        }
        match self.expect() {
            HostMessage::VersionResponse(r) if r.version_supported == 0 => false,
            HostMessage::VersionResponse(r) => {
                assert_eq!(r.connection_state, 0);
                if version.uses_message_connection_id() {
                    self.connection = r.message_connection_id;
                }
                self.version = Some(version);
                true
            }
            other => panic!("{other:?}"),
        }
    }

    /// Asks for offers and returns them.
    pub(crate) fn request_offers(&self) -> Vec<OfferChannel> {
        self.post(&RequestOffers {});
        let mut offers = Vec::new();
        loop {
            match self.expect() {
                HostMessage::OfferChannel(offer) => offers.push(offer),
                HostMessage::AllOffersDelivered(_) => return offers,
                other => panic!("{other:?}"),
            }
        }
    }

    /// The next message, which must be an offer.
    pub(crate) fn expect_offer(&self) -> OfferChannel {
        match self.expect() {
            HostMessage::OfferChannel(offer) => offer,
            other => panic!("{other:?}"),
        }
    }

    /// The next message, which must be a rescind.
    pub(crate) fn expect_rescind(&self) -> ChannelId {
        match self.expect() {
            HostMessage::RescindChannelOffer(m) => m.channel_id,
            other => panic!("{other:?}"),
        }
    }

    /// Pages that nobody uses, not contiguous, zeroed.
    pub(crate) fn pages(&mut self, count: usize) -> Vec<u64> {
        let first = self.next_pfn;
        self.next_pfn += count as u64;
        assert!(self.next_pfn <= PAGES, "test uses too much memory");
        // Backwards, so that no two follow each other.
        (first..self.next_pfn).rev().collect()
    }

    /// Sends the description of a GPADL of whole pages, without waiting for the answer.
    pub(crate) fn send_gpadl(&mut self, channel: ChannelId, pfns: &[u64]) -> GpadlId {
        let id = self.next_gpadl;
        self.next_gpadl = id.next();
        let bytes = pfns.len() as u32 * 4096;
        let messages =
            GpadlMessages::new(channel, id, bytes, 0, |page| pfns[page as usize]).unwrap();
        for message in messages {
            assert_eq!(self.post_raw(&message), HvStatus::SUCCESS);
        }
        id
    }

    /// Makes a GPADL of whole pages.
    ///
    /// # Errors
    /// The server's status.
    pub(crate) fn create_gpadl(
        &mut self,
        channel: ChannelId,
        pfns: &[u64],
    ) -> Result<GpadlId, u32> {
        let id = self.send_gpadl(channel, pfns);
        match self.expect() {
            HostMessage::GpadlCreated(m) => {
                assert_eq!((m.channel_id, m.gpadl_id), (channel, id));
                match m.status.get() {
                    0 => Ok(id),
                    status => Err(status),
                }
            }
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn teardown_gpadl(&self, channel_id: ChannelId, gpadl_id: GpadlId) {
        self.post(&GpadlTeardown {
            channel_id,
            gpadl_id,
        });
        self.expect_torndown(gpadl_id);
    }

    pub(crate) fn expect_torndown(&self, gpadl_id: GpadlId) {
        match self.expect() {
            HostMessage::GpadlTorndown(m) => assert_eq!(m.gpadl_id, gpadl_id),
            other => panic!("{other:?}"),
        }
    }

    /// Prepares two rings of so many pages each, and makes their GPADL.
    pub(crate) fn make_rings(&mut self, channel: ChannelId, pages: usize) -> (Vec<u64>, GpadlId) {
        let pfns = self.pages(2 * pages);
        for ring in pfns.chunks(pages) {
            initialize(&GuestRing::new(&self.mem, ring).unwrap());
        }
        let gpadl = self.create_gpadl(channel, &pfns).unwrap();
        (pfns, gpadl)
    }

    /// Sends OPENCHANNEL, without waiting for the answer.
    pub(crate) fn send_open(&self, channel: ChannelId, gpadl: GpadlId, pages: usize, vp: u32) {
        let open_id = OpenId::new(channel.get());
        let vp = VpIndex::new(vp);
        let open = OpenChannel::new(channel, open_id, gpadl, vp, pages as u32, b"hello").unwrap();
        self.post(&open);
    }

    /// The next message, which must be the result of an open. Returns its status.
    pub(crate) fn expect_open_result(&self, channel: ChannelId) -> u32 {
        match self.expect() {
            HostMessage::OpenChannelResult(m) => {
                assert_eq!(m.channel_id, channel);
                assert_eq!(m.open_id.get(), channel.get());
                m.status.get()
            }
            other => panic!("{other:?}"),
        }
    }

    /// Opens a channel with two rings of so many pages (one of which is for control), interrupts
    /// to virtual processor `vp`.
    ///
    /// # Errors
    /// The server's status; the GPADL of the rings is torn down.
    pub(crate) fn open(
        &mut self,
        offer: &OfferChannel,
        pages: usize,
        vp: u32,
    ) -> Result<FakeChannel, u32> {
        let id = offer.channel_id;
        let (pfns, gpadl) = self.make_rings(id, pages);
        self.send_open(id, gpadl, pages, vp);
        let status = self.expect_open_result(id);
        if status != 0 {
            self.teardown_gpadl(id, gpadl);
            return Err(status);
        }
        let ring = |pfns| GuestRing::new(&self.mem, pfns).unwrap();
        let (out, back) = pfns.split_at(pages);
        Ok(FakeChannel {
            id,
            gpadl,
            offer: *offer,
            synic: self.synic.clone(),
            mem: self.mem.clone(),
            pages: pfns.clone(),
            tx: Producer::new(ring(out)).unwrap(),
            rx: Consumer::new(ring(back)).unwrap(),
            buffer: vec![0; pages * 4096],
        })
    }

    /// Closes a channel and takes its memory back.
    ///
    /// The end of a primary channel rescinds its sub-channels at a moment of the server's own. So other messages may
    /// come before the answer, and stay in the queue.
    pub(crate) fn close(&self, channel: FakeChannel) {
        self.post(&CloseChannel {
            channel_id: channel.id,
        });
        self.post(&GpadlTeardown {
            channel_id: channel.id,
            gpadl_id: channel.gpadl,
        });
        let torn_down = GpadlTorndown {
            gpadl_id: channel.gpadl,
        };
        let answer = torn_down.encode();
        let answered = self.synic.wait(SOON, |seen| {
            let at = seen.messages.iter().position(|m| m[..] == answer[..])?;
            seen.messages.remove(at)
        });
        assert!(answered.is_some(), "no answer to GPADL_TEARDOWN");
    }

    pub(crate) fn release(&self, channel_id: ChannelId) {
        self.post(&RelidReleased { channel_id });
    }

    pub(crate) fn modify(&self, channel_id: ChannelId, vp: u32) {
        self.post(&ModifyChannel {
            channel_id,
            target_vp: VpIndex::new(vp),
        });
    }

    /// Leaves the bus.
    pub(crate) fn unload(&mut self) {
        self.post(&Unload {});
        match self.expect() {
            HostMessage::UnloadResponse(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// A packet that the guest has received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) packet_type: PacketType,
    pub(crate) transaction_id: u64,
    pub(crate) wants_completion: bool,
    pub(crate) header: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

/// An open channel, from the guest's side.
pub(crate) struct FakeChannel {
    pub(crate) id: ChannelId,
    pub(crate) gpadl: GpadlId,
    pub(crate) offer: OfferChannel,
    /// The pages of both rings.
    pub(crate) pages: Vec<u64>,
    pub(crate) mem: GuestMem,
    synic: Arc<FakeSynic>,
    tx: Producer<GuestRing>,
    rx: Consumer<GuestRing>,
    buffer: Vec<u8>,
}

impl FakeChannel {
    /// Signals the host.
    pub(crate) fn signal(&self) -> bool {
        self.synic.signal(self.offer.connection_id)
    }

    fn sent(&self, result: Result<Signal, WriteError>) -> Result<(), WriteError> {
        if result?.is_needed() {
            self.signal();
        }
        Ok(())
    }

    /// Sends an in-band packet.
    ///
    /// # Errors
    /// The ring is full, for instance.
    pub(crate) fn try_send(
        &mut self,
        transaction_id: u64,
        payload: &[u8],
        completion: bool,
    ) -> Result<(), WriteError> {
        let header = Header::in_band(transaction_id, completion);
        let result = self.tx.write(header, &[payload]);
        self.sent(result)
    }

    /// Sends a completion of a request of the host.
    ///
    /// # Errors
    /// The ring is full, for instance.
    pub(crate) fn complete(
        &mut self,
        transaction_id: u64,
        payload: &[u8],
    ) -> Result<(), WriteError> {
        let header = Header::completion(transaction_id);
        let result = self.tx.write(header, &[payload]);
        self.sent(result)
    }

    /// Sends an in-band packet that asks for a completion.
    pub(crate) fn send(&mut self, transaction_id: u64, payload: &[u8]) {
        self.try_send(transaction_id, payload, true).unwrap();
    }

    /// Sends a packet with `len` bytes of guest memory in `pfns`, from `offset` in the first page.
    pub(crate) fn send_gpa(
        &mut self,
        transaction_id: u64,
        (offset, len): (u32, u32),
        pfns: &[u64],
        payload: &[u8],
    ) {
        let header = Header::gpa_direct(transaction_id, true);
        let pfns = pfns.iter().copied();
        let result = self
            .tx
            .write_gpa_direct(header, len, offset, pfns, &[payload]);
        self.sent(result).unwrap();
    }

    /// Takes a packet if there is one. Does not give its space back.
    pub(crate) fn take(&mut self) -> Option<Received> {
        let packet = self.rx.read(&mut self.buffer).unwrap()?;
        Some(Received {
            packet_type: packet.packet_type(),
            transaction_id: packet.transaction_id(),
            wants_completion: packet.wants_completion(),
            header: packet.header().to_vec(),
            payload: packet.payload().to_vec(),
        })
    }

    /// Gives the space of packets back, as the driver does when it is done with a batch.
    pub(crate) fn commit(&mut self) {
        if self.rx.commit().is_needed() {
            self.signal();
        }
    }

    /// Waits for a packet, at most `timeout`.
    pub(crate) fn receive_within(&mut self, timeout: Duration) -> Option<Received> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(packet) = self.take() {
                self.commit();
                return Some(packet);
            }
            // The flag may be of another channel, or may have come before; so only sleep a bit.
            let left = deadline.checked_duration_since(Instant::now())?;
            self.synic.wait_event(left.min(Duration::from_millis(5)));
        }
    }

    /// Waits for a packet, which must come.
    pub(crate) fn receive(&mut self) -> Received {
        self.receive_within(SOON).expect("no packet from the host")
    }

    /// The completion of a request, which must be the next packet.
    pub(crate) fn completion(&mut self, transaction_id: u64) -> Vec<u8> {
        let packet = self.receive();
        assert_eq!(packet.packet_type, PacketType::COMPLETION);
        assert_eq!(packet.transaction_id, transaction_id);
        packet.payload
    }

    /// Waits until the host has read all packets, is done with them, and sleeps.
    pub(crate) fn wait_idle(&self) {
        let deadline = Instant::now() + SOON;
        let load = |field| self.tx.mem().load(field);
        // While it reads, the host masks signals.
        while load(Field::ReadIndex) != load(Field::WriteIndex) || load(Field::InterruptMask) != 0 {
            assert!(Instant::now() < deadline, "the host does not read");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Damages a control word of the ring to the host.
    pub(crate) fn damage_tx(&self, field: Field, value: u32) {
        self.tx.mem().store(field, value);
    }

    /// Damages a control word of the ring to the guest.
    pub(crate) fn damage_rx(&self, field: Field, value: u32) {
        self.rx.mem().store(field, value);
    }

    /// Writes bytes into the data area of the ring to the host.
    pub(crate) fn scribble_tx(&self, offset: u32, bytes: &[u8]) {
        self.tx.mem().write_at(offset, bytes);
    }

    /// What is in a page of the rings.
    pub(crate) fn page(&self, index: usize) -> Vec<u8> {
        let mut page = vec![0; 4096];
        self.mem
            .read_slice(&mut page, GuestAddress(self.pages[index] << 12))
            .unwrap();
        page
    }
}

/// A GUID for tests.
pub(crate) fn guid(n: u8) -> Guid {
    Guid::from_bytes([n; 16])
}
