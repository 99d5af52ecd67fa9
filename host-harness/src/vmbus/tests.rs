// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests of the server with [`FakeGuest`].

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hv_proto::hypercall::HvStatus;
use hv_proto::ids::{ChannelId, ConnectionId, GpadlId};
use hv_proto::message::{
    CloseChannel, GpadlHeader, GpadlTeardown, HostMessage, Message, MessageType, OfferChannel,
    TlConnectRequest,
};
use hv_proto::packet::{PacketType, TransferPageRange};
use hv_proto::ring::Field;
use hv_proto::version::Version;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::test_guest::{FakeChannel, FakeGuest, NEVER, PAGES, SOON, guid};
use super::*;
use crate::hypervisor::MessageSink;

/// What became of a VSP.
#[derive(Default)]
struct Log {
    opens: AtomicUsize,
    closes: AtomicUsize,
    resets: AtomicUsize,
    dropped: AtomicBool,
    /// Opening fails.
    refuse: AtomicBool,
    /// Opening and closing wait for the end of this.
    held: AtomicBool,
    /// Errors that ended threads.
    errors: Mutex<Vec<String>>,
    writers: Mutex<BTreeMap<u16, ChannelWriter>>,
    devices: Mutex<Vec<DeviceHandle>>,
    user_data: Mutex<Vec<u8>>,
}

impl Log {
    fn count(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::SeqCst)
    }

    fn writer(&self) -> ChannelWriter {
        self.writers.lock().unwrap()[&0].clone()
    }

    /// Makes opening and closing wait until [`Log::let_go`].
    fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    fn let_go(&self) {
        self.held.store(false, Ordering::SeqCst);
    }

    fn delay(&self) {
        until("let go", || !self.held.load(Ordering::SeqCst));
    }
}

/// Answers each request with its own payload; requests with guest memory have it inverted.
struct Echo {
    log: Arc<Log>,
    threads: BTreeMap<u16, JoinHandle<()>>,
}

impl Echo {
    fn new() -> (Box<Self>, Arc<Log>) {
        let log = Arc::new(Log::default());
        let echo = Self {
            log: log.clone(),
            threads: BTreeMap::new(),
        };
        (Box::new(echo), log)
    }
}

fn serve(reader: &mut ChannelReader, writer: &ChannelWriter) -> Result<(), ChannelError> {
    let mem = reader.memory().clone();
    loop {
        let Some(packet) = reader.next(None)? else {
            continue;
        };
        if !packet.wants_completion() {
            continue;
        }
        if let Ok(gpa) = packet.gpa_direct(16) {
            let mut whole = GuestBuffer::empty(&mem);
            let ranges = gpa
                .ranges()
                .map(|r| GuestBuffer::from_pfns(&mem, r.byte_offset(), r.byte_count(), r.pfns()));
            let mut failed = None;
            for range in ranges {
                match range {
                    Ok(part) => whole.append(part),
                    Err(e) => failed = Some(e),
                }
            }
            if let Some(error) = failed {
                let text = error.to_string();
                writer.complete(packet.transaction_id(), text.as_bytes())?;
                continue;
            }
            let mut data = vec![0; whole.len()];
            whole.read_at(0, &mut data).unwrap();
            data.iter_mut().for_each(|b| *b = !*b);
            whole.write_at(0, &data).unwrap();
        }
        writer.complete(packet.transaction_id(), packet.payload())?;
    }
}

impl Vsp for Echo {
    fn open(&mut self, channel: HostChannel, params: OpenParams) -> Result<(), OpenError> {
        self.log.delay();
        if self.log.refuse.load(Ordering::SeqCst) {
            return Err(OpenError("told to refuse".into()));
        }
        assert_eq!(channel.subchannel_index(), params.subchannel_index);
        *self.log.user_data.lock().unwrap() = params.user_data.to_vec();
        self.log.devices.lock().unwrap().push(channel.device());
        let (mut reader, writer) = channel.into_parts();
        let mut writers = self.log.writers.lock().unwrap();
        writers.insert(params.subchannel_index, writer.clone());
        let log = self.log.clone();
        let thread = thread::spawn(move || {
            if let Err(error) = serve(&mut reader, &writer) {
                log.errors.lock().unwrap().push(error.to_string());
            }
        });
        let old = self.threads.insert(params.subchannel_index, thread);
        assert!(old.is_none(), "opened twice");
        self.log.opens.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn close(&mut self, subchannel_index: u16) {
        self.log.delay();
        let thread = self.threads.remove(&subchannel_index).expect("not open");
        thread.join().unwrap();
        self.log.writers.lock().unwrap().remove(&subchannel_index);
        self.log.closes.fetch_add(1, Ordering::SeqCst);
    }

    fn reset(&mut self) {
        assert!(self.threads.is_empty(), "reset of an open device");
        self.log.resets.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        assert!(self.threads.is_empty(), "dropped while open");
        self.log.dropped.store(true, Ordering::SeqCst);
    }
}

fn params(n: u8) -> OfferParams {
    OfferParams::new(format!("echo{n}"), guid(0x77), guid(n))
}

/// Offers echo device `n`.
fn offer(guest: &FakeGuest, n: u8) -> (OfferHandle, Arc<Log>) {
    let (vsp, log) = Echo::new();
    (guest.server.offer(params(n), vsp).unwrap(), log)
}

/// A connected guest with an open echo device.
fn echo_guest() -> (FakeGuest, OfferHandle, Arc<Log>, FakeChannel) {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let (handle, log) = offer(&guest, 1);
    let offers = guest.request_offers();
    let channel = guest.open(&offers[0], 5, 1).unwrap();
    (guest, handle, log, channel)
}

fn until(what: &str, mut f: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !f() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn state(guest: &FakeGuest, id: ChannelId) -> Option<String> {
    let channels = guest.server.status().channels;
    channels
        .into_iter()
        .find(|c| c.id == id.get())
        .map(|c| c.state)
}

/// A request and its answer still work.
fn ping(channel: &mut FakeChannel) {
    channel.send(99, b"are you there?  ");
    assert_eq!(channel.completion(99), b"are you there?  ");
}

#[test]
fn each_version_connects_and_works() {
    for max in Version::NEWEST_FIRST {
        for version in Version::NEWEST_FIRST {
            let mut guest = FakeGuest::new(max);
            let (_handle, _) = offer(&guest, 1);
            assert_eq!(guest.connect(version), version <= max, "{version} of {max}");
            if version > max {
                // The guest goes on with an older version.
                assert!(guest.connect(max));
            }
            let offers = guest.request_offers();
            assert_eq!(offers.len(), 1);
            assert!(offers[0].has_dedicated_interrupt());
            let mut channel = guest.open(&offers[0], 3, 0).unwrap();
            ping(&mut channel);
            guest.close(channel);
            guest.unload();
        }
    }
}

#[test]
fn contact_on_the_wrong_connection_or_with_an_unknown_version() {
    let mut guest = FakeGuest::new(Version::V5_3);
    for (raw, connection) in [
        (Version::V5_3.raw(), ConnectionId::MESSAGE),
        (Version::V4_1.raw(), ConnectionId::MESSAGE_V5),
        (0x0005_0004, ConnectionId::MESSAGE_V5),
        (0x0003_0000, ConnectionId::MESSAGE),
        (u32::MAX, ConnectionId::MESSAGE_V5),
    ] {
        assert_eq!(guest.contact(raw, connection), HvStatus::SUCCESS);
        match guest.expect() {
            HostMessage::VersionResponse(r) => assert_eq!(r.version_supported, 0),
            other => panic!("{other:?}"),
        }
    }
    let status = guest.contact(Version::V5_3.raw(), ConnectionId::MESSAGE_REDIRECT);
    assert_eq!(status, HvStatus::INVALID_CONNECTION_ID);
    // An old host does not have connection 4.
    let mut guest = FakeGuest::new(Version::V4_1);
    let status = guest.contact(Version::V5_3.raw(), ConnectionId::MESSAGE_V5);
    assert_eq!(status, HvStatus::INVALID_CONNECTION_ID);
    // A type that is not VMBus's.
    let status = guest
        .server
        .post_message(ConnectionId::MESSAGE, 2, &[0; 40]);
    assert_eq!(status, HvStatus::INVALID_PARAMETER);
    // After contact on connection 4, connection 1 is not the guest's.
    let guest = FakeGuest::connected(Version::V5_3);
    let bytes = CloseChannel {
        channel_id: ChannelId::new(1),
    };
    let status = guest
        .server
        .post_message(ConnectionId::MESSAGE, 1, &bytes.encode());
    assert_eq!(status, HvStatus::INVALID_CONNECTION_ID);
}

#[test]
fn offers_say_what_the_device_is() {
    let guest = FakeGuest::connected(Version::V5_3);
    let mut p = params(7);
    p.mmio_megabytes = 64;
    p.user_defined[3] = 9;
    let (vsp, _) = Echo::new();
    let _handle = guest.server.offer(p, vsp).unwrap();
    let (vsp, _) = Echo::new();
    let again = guest.server.offer(params(7), vsp);
    assert_eq!(again.err(), Some(OfferError::Duplicate(guid(7))));
    let offers = guest.request_offers();
    let o = &offers[0];
    assert_eq!((o.interface_id, o.instance_id), (guid(0x77), guid(7)));
    assert_eq!((o.mmio_megabytes.get(), o.user_defined[3]), (64, 9));
    assert!(!o.is_subchannel() && o.monitor().is_none());
    assert!(o.connection_id.is_valid() && o.connection_id.get() > 0xffff);
    // A second request is a mistake without consequences.
    guest.post(&hv_proto::message::RequestOffers {});
    guest.expect_nothing();
}

#[test]
fn hot_add_and_remove() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    assert!(guest.request_offers().is_empty());
    let (handle, log) = offer(&guest, 1);
    let first = guest.expect_offer();
    let mut channel = guest.open(&first, 3, 0).unwrap();
    ping(&mut channel);
    drop(handle);
    assert_eq!(guest.expect_rescind(), first.channel_id);
    // The VSP has closed before the guest hears of it.
    assert_eq!(Log::count(&log.closes), 1);
    until("the VSP is gone", || log.dropped.load(Ordering::SeqCst));
    // The same device again: not while the guest has the old one.
    let (handle, _) = offer(&guest, 1);
    guest.expect_nothing();
    guest.release(first.channel_id);
    let second = guest.expect_offer();
    assert_ne!(second.channel_id, first.channel_id);
    let mut channel = guest.open(&second, 3, 0).unwrap();
    ping(&mut channel);
    // What Linux does upon a rescind: it closes, but tears no GPADL down.
    let (id, gpadl) = (channel.id, channel.gpadl);
    let waiter = thread::spawn(move || handle.rescind_and_wait(SOON));
    assert_eq!(guest.expect_rescind(), id);
    guest.post(&CloseChannel { channel_id: id });
    guest.release(id);
    assert!(waiter.join().unwrap());
    assert_eq!(guest.server.status().gpadls, 0);
    guest.post(&GpadlTeardown {
        channel_id: id,
        gpadl_id: gpadl,
    });
    guest.expect_nothing();
}

#[test]
fn rescind_in_each_state() {
    // Before the guest knows of the device.
    let guest = FakeGuest::connected(Version::V5_3);
    let (handle, log) = offer(&guest, 1);
    assert!(handle.rescind_and_wait(SOON));
    assert!(log.dropped.load(Ordering::SeqCst));
    assert!(guest.request_offers().is_empty());

    // Offered.
    let (handle, _) = offer(&guest, 2);
    let id = guest.expect_offer().channel_id;
    handle.rescind();
    assert_eq!(guest.expect_rescind(), id);
    assert_eq!(state(&guest, id).as_deref(), Some("rescinded"));
    guest.release(id);
    assert_eq!(state(&guest, id), None);

    // With GPADLs, one of them incomplete.
    let mut guest = guest;
    let (handle, _) = offer(&guest, 3);
    let id = guest.expect_offer().channel_id;
    let pages = guest.pages(3);
    let gpadl = guest.create_gpadl(id, &pages).unwrap();
    guest.post(&GpadlHeader {
        channel_id: id,
        gpadl_id: GpadlId::new(5),
        range_buf_len: 4096.into(),
        range_count: 1.into(),
    });
    drop(handle);
    assert_eq!(guest.expect_rescind(), id);
    guest.teardown_gpadl(id, gpadl);
    assert!(guest.create_gpadl(id, &pages).is_err());
    guest.release(id);
    assert_eq!(guest.server.status().gpadls, 0);

    // While it is being opened.
    let (handle, log) = offer(&guest, 4);
    let id = guest.expect_offer().channel_id;
    let (_, gpadl) = guest.make_rings(id, 2);
    log.hold();
    guest.send_open(id, gpadl, 2, 0);
    assert_eq!(state(&guest, id).as_deref(), Some("opening"));
    drop(handle);
    guest.expect_nothing();
    log.let_go();
    assert_eq!(guest.expect_rescind(), id);
    assert_eq!((Log::count(&log.opens), Log::count(&log.closes)), (1, 1));
    guest.send_open(id, gpadl, 2, 0);
    assert_ne!(guest.expect_open_result(id), 0);
    guest.release(id);

    // While it is being closed.
    let (handle, log) = offer(&guest, 5);
    let offered = guest.expect_offer();
    let channel = guest.open(&offered, 2, 0).unwrap();
    log.hold();
    guest.post(&CloseChannel {
        channel_id: channel.id,
    });
    assert_eq!(state(&guest, channel.id).as_deref(), Some("closing"));
    drop(handle);
    guest.post(&GpadlTeardown {
        channel_id: channel.id,
        gpadl_id: channel.gpadl,
    });
    guest.expect_nothing();
    log.let_go();
    guest.expect_torndown(channel.gpadl);
    assert_eq!(guest.expect_rescind(), channel.id);
    guest.release(channel.id);
    assert!(guest.server.status().channels.is_empty());
    assert!(guest.server.shutdown());
}

#[test]
fn open_close_reopen() {
    let (mut guest, _handle, log, channel) = echo_guest();
    assert_eq!(&log.user_data.lock().unwrap()[..6], b"hello\0");
    let offered = channel.offer;
    // Opening an open channel.
    guest.send_open(channel.id, channel.gpadl, 5, 0);
    assert_ne!(guest.expect_open_result(channel.id), 0);
    let mut channel = channel;
    for _ in 0..5 {
        ping(&mut channel);
        guest.close(channel);
        assert_eq!(guest.server.status().gpadls, 0);
        channel = guest.open(&offered, 3, 2).unwrap();
    }
    // An open that comes while the VSP closes waits for it.
    log.hold();
    guest.post(&CloseChannel {
        channel_id: channel.id,
    });
    let (_, gpadl) = guest.make_rings(channel.id, 2);
    guest.send_open(channel.id, gpadl, 2, 0);
    guest.expect_nothing();
    log.let_go();
    assert_eq!(guest.expect_open_result(channel.id), 0);
    // A VSP that refuses.
    guest.post(&CloseChannel {
        channel_id: channel.id,
    });
    log.refuse.store(true, Ordering::SeqCst);
    assert!(guest.open(&offered, 2, 0).is_err());
    log.refuse.store(false, Ordering::SeqCst);
    let mut channel = guest.open(&offered, 2, 0).unwrap();
    ping(&mut channel);
    let counters = || guest.server.status().channels[0].counters;
    assert_eq!(counters().opens, 8);
    // What goes out is counted after the guest can see it.
    until("all counted", || counters().packets_out == 6);
    assert_eq!(counters().packets_in, 6);
}

#[test]
fn opens_with_bad_numbers() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let (_handle, log) = offer(&guest, 1);
    let (_other, _) = offer(&guest, 2);
    let offers = guest.request_offers();
    let (id, other) = (offers[0].channel_id, offers[1].channel_id);
    let (pages, gpadl) = guest.make_rings(id, 4);
    let bad = |gpadl, split, vp| {
        guest.send_open(id, gpadl, split, vp);
        assert_ne!(guest.expect_open_result(id), 0);
    };
    bad(gpadl, 0, 0);
    bad(gpadl, 1, 0);
    bad(gpadl, 7, 0);
    bad(gpadl, 8, 0);
    bad(gpadl, 9, 0);
    bad(gpadl, u32::MAX as usize, 0);
    bad(gpadl, 4, 4);
    bad(gpadl, 4, u32::MAX);
    bad(GpadlId::new(1), 4, 0);
    // Another channel's GPADL, and one that is not whole pages.
    let theirs = guest.create_gpadl(other, &pages).unwrap();
    guest.send_open(id, theirs, 4, 0);
    assert_ne!(guest.expect_open_result(id), 0);
    let part = GpadlId::new(77);
    let messages =
        hv_proto::gpadl::GpadlMessages::new(id, part, 8 * 4096 - 8, 8, |p| pages[p as usize]);
    for message in messages.unwrap() {
        guest.post_raw(&message);
    }
    assert!(matches!(guest.expect(), HostMessage::GpadlCreated(m) if m.status.get() == 0));
    guest.send_open(id, part, 4, 0);
    assert_ne!(guest.expect_open_result(id), 0);
    // Rings with impossible contents.
    let control = GuestAddress(pages[0] << 12);
    guest
        .mem
        .write_obj(3u32, GuestAddress(control.0 + 4))
        .unwrap();
    guest.send_open(id, gpadl, 4, 0);
    assert_ne!(guest.expect_open_result(id), 0);
    assert_eq!(Log::count(&log.opens), 0);
    // Nothing of that is in the way of a good one.
    guest
        .mem
        .write_obj(0u32, GuestAddress(control.0 + 4))
        .unwrap();
    guest.send_open(id, gpadl, 4, 0);
    assert_eq!(guest.expect_open_result(id), 0);
}

#[test]
fn gpadls_of_all_sizes() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let (_handle, _) = offer(&guest, 1);
    let id = guest.request_offers()[0].channel_id;
    let pages = guest.pages(8190);
    for count in [1, 2, 25, 26, 27, 54, 55, 82, 1000, 8189, 8190] {
        let gpadl = guest.create_gpadl(id, &pages[..count]).unwrap();
        guest.teardown_gpadl(id, gpadl);
    }
    assert_eq!(guest.server.status().gpadls, 0);
}

#[test]
fn gpadls_that_are_refused() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let (_handle, _) = offer(&guest, 1);
    let id = guest.request_offers()[0].channel_id;
    let mut pages = guest.pages(100);
    // Pages beyond memory: in the header, in the last body.
    for at in [0, 99] {
        let good = std::mem::replace(&mut pages[at], PAGES);
        assert!(guest.create_gpadl(id, &pages).is_err());
        pages[at] = good;
        guest.expect_nothing();
    }
    // A channel that is not there; a number that is in use.
    assert!(guest.create_gpadl(ChannelId::new(500), &pages).is_err());
    guest.create_gpadl(id, &pages).unwrap();
    let header = GpadlHeader {
        channel_id: id,
        gpadl_id: GpadlId::FIRST.next().next().next(),
        range_buf_len: 16.into(),
        range_count: 1.into(),
    };
    guest.post(&header);
    assert!(matches!(guest.expect(), HostMessage::GpadlCreated(m) if m.status.get() != 0));
    // Too many.
    for _ in 1..MAX_PER_CHANNEL {
        guest.create_gpadl(id, &pages[..1]).unwrap();
    }
    assert!(guest.create_gpadl(id, &pages[..1]).is_err());
    assert_eq!(guest.server.status().gpadls, MAX_PER_CHANNEL);
}

#[test]
fn total_gpadl_pages_are_bounded() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let handles: Vec<_> = (1..=3).map(|n| offer(&guest, n)).collect();
    let offers = guest.request_offers();
    let pages = guest.pages(8190);
    let mut made = 0;
    'all: for offered in &offers {
        for _ in 0..MAX_PER_CHANNEL {
            if guest.create_gpadl(offered.channel_id, &pages).is_err() {
                break 'all;
            }
            made += 1;
        }
    }
    assert_eq!(made, MAX_PAGES / 8190);
    assert_eq!(guest.server.status().gpadls, made);
    drop(handles);
}

#[test]
fn teardown_waits_for_the_ring() {
    let (guest, _handle, _, channel) = echo_guest();
    let teardown = GpadlTeardown {
        channel_id: channel.id,
        gpadl_id: channel.gpadl,
    };
    guest.post(&teardown);
    guest.post(&teardown);
    guest.expect_nothing();
    let mut channel = channel;
    ping(&mut channel);
    guest.post(&CloseChannel {
        channel_id: channel.id,
    });
    guest.expect_torndown(channel.gpadl);
    guest.expect_nothing();
}

/// Keeps a GPADL that the guest names in its first packet until it is told to let go.
struct Keeper(Arc<Mutex<Option<GpadlView>>>, Option<JoinHandle<()>>);

impl Vsp for Keeper {
    fn open(&mut self, channel: HostChannel, _: OpenParams) -> Result<(), OpenError> {
        let (mut reader, writer) = channel.into_parts();
        let slot = self.0.clone();
        self.1 = Some(thread::spawn(move || {
            while let Ok(packet) = reader.next(None) {
                let Some(packet) = packet else { continue };
                let word = packet.payload()[..4].try_into().unwrap();
                let id = GpadlId::new(u32::from_le_bytes(word));
                let transaction = packet.transaction_id();
                let view = reader.gpadl(id);
                let found = [view.is_ok() as u8; 8];
                if let Ok(view) = view {
                    view.buffer().write_at(4090, b"from the host").unwrap();
                    *slot.lock().unwrap() = Some(view);
                }
                let range = TransferPageRange {
                    byte_count: 13.into(),
                    byte_offset: 4090.into(),
                };
                let _ = writer.complete(transaction, &found);
                let _ = writer.send_transfer_pages(5, 0xcafe, &[range], b"look....", true);
            }
        }));
        Ok(())
    }

    fn close(&mut self, _: u16) {
        self.1.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_view_keeps_a_gpadl() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let slot = Arc::new(Mutex::new(None));
    let keeper = Box::new(Keeper(slot.clone(), None));
    let _handle = guest.server.offer(params(1), keeper).unwrap();
    let offers = guest.request_offers();
    let mut channel = guest.open(&offers[0], 3, 0).unwrap();
    let pages = guest.pages(2);
    let gpadl = guest.create_gpadl(channel.id, &pages).unwrap();
    channel.send(1, &[0; 8]);
    assert_eq!(channel.completion(1), [0; 8]);
    assert_eq!(channel.receive().packet_type, PacketType::TRANSFER_PAGES);
    channel.send(2, &u64::from(gpadl.get()).to_le_bytes());
    assert_eq!(channel.completion(2), [1; 8]);
    let packet = channel.receive();
    assert_eq!(packet.packet_type, PacketType::TRANSFER_PAGES);
    assert_eq!(packet.payload, b"look....");
    assert!(packet.wants_completion && packet.header.len() == 16);
    let mut text = [0; 6];
    let at = GuestAddress((pages[0] << 12) + 4090);
    guest.mem.read_slice(&mut text, at).unwrap();
    assert_eq!(&text, b"from t");
    // The guest hears of the teardown when the VSP has let go.
    guest.post(&GpadlTeardown {
        channel_id: channel.id,
        gpadl_id: gpadl,
    });
    guest.expect_nothing();
    drop(slot.lock().unwrap().take());
    guest.expect_torndown(gpadl);
}

#[test]
fn interrupts_follow_modify_channel() {
    for version in [Version::V4_0, Version::V4_1, Version::V5_2, Version::V5_3] {
        let mut guest = FakeGuest::connected(version);
        let (_handle, _) = offer(&guest, 1);
        let offers = guest.request_offers();
        let mut channel = guest.open(&offers[0], 3, 1).unwrap();
        let flag = channel.id.event_flag().unwrap();
        guest.synic.take_events();
        channel.send(1, b"");
        assert_eq!(guest.synic.wait_event(SOON), Some((1, 2, flag)));
        channel.completion(1);
        guest.modify(channel.id, 3);
        if version >= Version::V5_3 {
            match guest.expect() {
                HostMessage::ModifyChannelResponse(m) => assert_eq!(m.status.get(), 0),
                other => panic!("{other:?}"),
            }
        }
        guest.expect_nothing();
        let moved = if version >= Version::V4_1 { 3 } else { 1 };
        guest.synic.take_events();
        channel.send(2, b"");
        assert_eq!(guest.synic.wait_event(SOON), Some((moved, 2, flag)));
        channel.completion(2);
        // A processor that is not there changes nothing.
        guest.modify(channel.id, 4);
        if version >= Version::V5_3 {
            match guest.expect() {
                HostMessage::ModifyChannelResponse(m) => assert_ne!(m.status.get(), 0),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(guest.server.status().channels[0].target_vp, moved);
    }
}

#[test]
fn subchannels() {
    let (mut guest, handle, log, mut channel) = echo_guest();
    let device = log.devices.lock().unwrap()[0].clone();
    device.offer_subchannels(3).unwrap();
    let subs: Vec<OfferChannel> = (0..3).map(|_| guest.expect_offer()).collect();
    for (i, sub) in subs.iter().enumerate() {
        assert_eq!(sub.sub_channel_index.get() as usize, i + 1);
        assert_eq!(sub.instance_id, channel.offer.instance_id);
        assert_eq!(sub.interface_id, channel.offer.interface_id);
    }
    // Asking again changes nothing; asking for more adds them.
    device.offer_subchannels(2).unwrap();
    guest.expect_nothing();
    handle.device().offer_subchannels(4).unwrap();
    let fourth = guest.expect_offer();
    assert_eq!(fourth.sub_channel_index.get(), 4);
    let mut open: Vec<FakeChannel> = subs
        .iter()
        .map(|sub| guest.open(sub, 3, 2).unwrap())
        .collect();
    for sub in &mut open {
        ping(sub);
    }
    ping(&mut channel);
    // As Linux closes: the sub-channels, then the primary, then it hears the rescinds.
    for sub in open {
        guest.close(sub);
    }
    let offered = channel.offer;
    guest.post(&CloseChannel {
        channel_id: channel.id,
    });
    for _ in 0..4 {
        let id = guest.expect_rescind();
        guest.release(id);
    }
    guest.teardown_gpadl(channel.id, channel.gpadl);
    assert_eq!(device.offer_subchannels(1), Err(OfferError::NotOpen));
    assert_eq!(guest.server.status().channels.len(), 1);
    // Closing the primary closes the others too.
    let channel = guest.open(&offered, 3, 0).unwrap();
    device.offer_subchannels(1).unwrap();
    let sub = guest.expect_offer();
    assert!(subs.iter().all(|old| old.channel_id != sub.channel_id));
    let sub = guest.open(&sub, 3, 0).unwrap();
    guest.post(&CloseChannel {
        channel_id: channel.id,
    });
    assert_eq!(guest.expect_rescind(), sub.id);
    assert_eq!(Log::count(&log.opens), Log::count(&log.closes));
    // A guest that lets go of a sub-channel without being asked.
    guest.release(sub.id);
    guest.teardown_gpadl(channel.id, channel.gpadl);
    let channel = guest.open(&offered, 3, 0).unwrap();
    device.offer_subchannels(1).unwrap();
    let sub = guest.expect_offer();
    guest.release(sub.channel_id);
    assert_eq!(guest.server.status().channels.len(), 1);
    device.offer_subchannels(1).unwrap();
    guest.expect_offer();
    drop(handle);
    let mut rescinded = [guest.expect_rescind(), guest.expect_rescind()];
    rescinded.sort();
    assert!(rescinded.contains(&channel.id));
    assert_eq!(device.offer_subchannels(1), Err(OfferError::Gone));
}

#[test]
fn unload_and_reconnect() {
    let (mut guest, _handle, log, channel) = echo_guest();
    log.devices.lock().unwrap()[0].offer_subchannels(1).unwrap();
    guest.expect_offer();
    let old = channel.offer.channel_id;
    // UNLOAD with everything open: kexec.
    guest.unload();
    assert_eq!(Log::count(&log.closes), 1);
    until("the VSP is reset", || Log::count(&log.resets) == 1);
    let status = guest.server.status();
    assert_eq!((status.version, status.gpadls), (None, 0));
    // Nothing but contact counts now.
    guest.release(old);
    guest.post(&CloseChannel { channel_id: old });
    guest.expect_nothing();
    for version in [Version::V4_0, Version::V5_3] {
        assert!(guest.connect(version));
        let offers = guest.request_offers();
        assert_eq!(offers.len(), 1);
        let mut channel = guest.open(&offers[0], 3, 0).unwrap();
        ping(&mut channel);
        // New contact without a word: kdump. The old channel is closed first.
    }
    assert!(guest.connect(Version::V5_0));
    assert_eq!(Log::count(&log.opens), Log::count(&log.closes));
    assert_eq!(guest.server.status().gpadls, 0);
    assert_eq!(guest.request_offers().len(), 1);
}

#[test]
fn contact_waits_for_a_slow_device() {
    let (mut guest, _handle, log, _channel) = echo_guest();
    log.hold();
    let status = guest.contact(Version::V5_2.raw(), ConnectionId::MESSAGE_V5);
    assert_eq!(status, HvStatus::SUCCESS);
    guest.expect_nothing();
    // Meanwhile the guest changes its mind; the last word counts.
    guest.contact(Version::V5_1.raw(), ConnectionId::MESSAGE_V5);
    log.let_go();
    assert!(matches!(guest.expect(), HostMessage::VersionResponse(r) if r.version_supported == 1));
    guest.expect_nothing();
    assert_eq!(guest.server.status().version.as_deref(), Some("5.1"));
}

#[test]
fn an_offer_that_the_guest_releases_comes_back() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let (handle, _) = offer(&guest, 1);
    let id = guest.request_offers()[0].channel_id;
    guest.release(id);
    guest.expect_nothing();
    assert!(guest.connect(Version::V5_3));
    assert_eq!(guest.request_offers().len(), 1);
    let (vsp, log) = Echo::new();
    let second = guest.server.offer(params(2), vsp).unwrap();
    guest.release(guest.expect_offer().channel_id);
    // Removing it while the guest does not have it.
    assert!(second.rescind_and_wait(SOON));
    assert!(log.dropped.load(Ordering::SeqCst));
    drop(handle);
}

#[test]
fn machine_reset_and_shutdown() {
    let (mut guest, handle, log, channel) = echo_guest();
    guest.server.reset();
    assert_eq!(Log::count(&log.closes), 1);
    guest.expect_nothing();
    guest.server.reset();
    drop(channel);
    assert!(guest.connect(Version::V5_3));
    let offers = guest.request_offers();
    let _channel = guest.open(&offers[0], 3, 0).unwrap();
    assert!(guest.server.shutdown());
    assert!(log.dropped.load(Ordering::SeqCst));
    drop(handle);
}

#[test]
fn dropping_the_server_ends_the_devices() {
    let (guest, handle, log, channel) = echo_guest();
    drop((guest, channel));
    until("the VSP is gone", || log.dropped.load(Ordering::SeqCst));
    assert_eq!(Log::count(&log.closes), 1);
    drop(handle);
}

#[test]
fn data_wraps_around_in_both_directions() {
    let (_guest, _handle, _, mut channel) = echo_guest();
    let mut sent = 0u64;
    let mut expected = std::collections::VecDeque::new();
    let payload = |id: u64| -> Vec<u8> {
        let len = 8 * ((id * 37) % 120) as usize;
        (0..len).map(|i| (i as u64 * 7 + id) as u8).collect()
    };
    while sent < 3000 || !expected.is_empty() {
        while sent < 3000 && channel.try_send(sent, &payload(sent), true).is_ok() {
            expected.push_back(sent);
            sent += 1;
        }
        let id = expected.pop_front().unwrap();
        assert_eq!(channel.completion(id), payload(id), "packet {id}");
    }
}

#[test]
fn guest_memory_in_packets() {
    let (mut guest, _handle, _, mut channel) = echo_guest();
    let pages = guest.pages(3);
    let data: Vec<u8> = (0..9000u32).map(|i| (i % 249) as u8).collect();
    let buffer = GuestBuffer::from_pfns(&guest.mem, 500, 9000, pages.iter().copied()).unwrap();
    buffer.write_at(0, &data).unwrap();
    channel.send_gpa(7, (500, 9000), &pages, b"invert..");
    assert_eq!(channel.completion(7), b"invert..");
    let mut back = vec![0; 9000];
    buffer.read_at(0, &mut back).unwrap();
    assert!(back.iter().zip(&data).all(|(a, b)| *a == !*b));
    // Pages that are not there.
    channel.send_gpa(8, (0, 4096), &[PAGES], b"");
    let text = channel.completion(8);
    assert!(String::from_utf8_lossy(&text).contains("not guest memory"));
}

#[test]
fn a_full_ring_waits_for_the_guest() {
    let (_guest, _handle, log, mut channel) = echo_guest();
    let writer = log.writer();
    let payload = [0x5a; 1000];
    let mut count = 0u64;
    while writer.try_send(count, &payload, false).is_ok() {
        count += 1;
    }
    assert!(count >= 15);
    // Two threads wait. The guest frees little at a time.
    let senders: Vec<_> = [1000, 2000]
        .into_iter()
        .map(|id| {
            let writer = writer.clone();
            thread::spawn(move || {
                for i in 0..20 {
                    writer.send(id + i, &payload, false).unwrap();
                }
            })
        })
        .collect();
    thread::sleep(NEVER);
    let mut got = 0;
    while got < count + 40 {
        let packet = channel.receive();
        assert_eq!(packet.payload, payload);
        got += 1;
    }
    for sender in senders {
        sender.join().unwrap();
    }
    ping(&mut channel);
    // The wait size is gone.
    assert_eq!(channel.page(5)[12..16], [0; 4]);
}

#[test]
fn closing_ends_a_wait_for_space() {
    let (guest, _handle, log, channel) = echo_guest();
    let writer = log.writer();
    while writer.try_send(1, &[0; 500], false).is_ok() {}
    let sender = thread::spawn(move || writer.send(2, &[0; 500], false));
    thread::sleep(NEVER);
    guest.close(channel);
    assert!(matches!(sender.join().unwrap(), Err(ChannelError::Stopped)));
}

#[test]
fn nothing_is_written_after_close() {
    let (guest, _handle, log, channel) = echo_guest();
    let writer = log.writer();
    let (pages, mem) = (channel.pages.clone(), channel.mem.clone());
    guest.close(channel);
    for pfn in &pages {
        mem.write_slice(&[0xee; 4096], GuestAddress(pfn << 12))
            .unwrap();
    }
    assert!(matches!(
        writer.try_send(1, b"x", false),
        Err(ChannelError::Stopped)
    ));
    for pfn in &pages {
        let mut page = [0; 4096];
        mem.read_slice(&mut page, GuestAddress(pfn << 12)).unwrap();
        assert!(page.iter().all(|&b| b == 0xee));
    }
}

#[test]
fn packets_that_do_not_fit() {
    let (_guest, _handle, log, mut channel) = echo_guest();
    let writer = log.writer();
    let large = vec![0; 4 * 4096];
    let error = writer.try_send(1, &large, false).unwrap_err();
    assert!(matches!(error, ChannelError::BadPacket(_)));
    ping(&mut channel);
}

#[test]
fn damaged_rings_close_one_channel() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let (_good, _) = offer(&guest, 1);
    let (_bad, log) = offer(&guest, 2);
    let offers = guest.request_offers();
    let mut healthy = guest.open(&offers[0], 5, 0).unwrap();
    type Damage = fn(&mut FakeChannel);
    let damages: [Damage; 8] = [
        |c| c.damage_tx(Field::WriteIndex, 4 * 4096),
        |c| c.damage_tx(Field::WriteIndex, u32::MAX),
        |c| c.damage_tx(Field::WriteIndex, 12),
        // Packets whose descriptors do not hold together.
        |c| c.damage_tx(Field::WriteIndex, 8),
        |c| c.damage_tx(Field::WriteIndex, 64),
        |c| {
            c.scribble_tx(0, &[6, 0, 2, 0, 0xff, 0xff, 0, 0]);
            c.damage_tx(Field::WriteIndex, 64);
        },
        |c| {
            c.scribble_tx(0, &[6, 0, 9, 0, 4, 0, 0, 0]);
            c.damage_tx(Field::WriteIndex, 64);
        },
        // The other ring: the answer to a request finds it.
        |c| {
            c.damage_rx(Field::ReadIndex, 3);
            c.try_send(1, b"", true).unwrap();
        },
    ];
    for (i, damage) in damages.into_iter().enumerate() {
        let mut channel = guest.open(&offers[1], 5, 0).unwrap();
        damage(&mut channel);
        channel.signal();
        until("closed by the host", || Log::count(&log.closes) == i + 1);
        let id = channel.id;
        until("offered", || {
            state(&guest, id).as_deref() == Some("offered")
        });
        let error = log.errors.lock().unwrap().pop().unwrap();
        assert!(error.contains("damaged"), "{error}");
        ping(&mut healthy);
        // The guest can close and open it again.
        guest.close(channel);
    }
}

#[test]
fn signals_are_masked_while_reading() {
    let (_guest, _handle, _, mut channel) = echo_guest();
    ping(&mut channel);
    // When the host is idle it wants a signal.
    until("unmasked", || channel.page(0)[8..12] == [0; 4]);
    let before = _guest.server.status().channels[0].counters;
    for _ in 0..10 {
        ping(&mut channel);
    }
    let after = _guest.server.status().channels[0].counters;
    assert_eq!(after.packets_in - before.packets_in, 10);
    // The signal of the first one may be counted late.
    assert!(after.signals - before.signals <= 11);
    assert!(after.interrupts > before.interrupts);
}

/// Tells how its reader was woken.
struct Sleeper(Arc<Mutex<Vec<&'static str>>>, Arc<Mutex<Option<Waker>>>);

impl Vsp for Sleeper {
    fn open(&mut self, channel: HostChannel, _: OpenParams) -> Result<(), OpenError> {
        let (mut reader, _writer) = channel.into_parts();
        *self.1.lock().unwrap() = Some(reader.waker());
        let log = self.0.clone();
        thread::spawn(move || {
            let start = Instant::now();
            assert!(reader.try_next().unwrap().is_none());
            let none = reader.next(Some(Duration::from_millis(20))).unwrap();
            assert!(none.is_none() && start.elapsed() >= Duration::from_millis(20));
            log.lock().unwrap().push("timeout");
            assert!(reader.next(None).unwrap().is_none());
            log.lock().unwrap().push("woken");
            assert!(reader.next(None).unwrap().is_some());
            log.lock().unwrap().push("packet");
            assert!(matches!(reader.next(None), Err(ChannelError::Stopped)));
            log.lock().unwrap().push("stopped");
        });
        Ok(())
    }

    fn close(&mut self, _: u16) {
        let log = self.0.clone();
        until("stopped", || log.lock().unwrap().len() == 4);
    }
}

#[test]
fn waits_end_for_each_reason() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let log = Arc::new(Mutex::new(Vec::new()));
    let waker = Arc::new(Mutex::new(None));
    let vsp = Box::new(Sleeper(log.clone(), waker.clone()));
    let _handle = guest.server.offer(params(1), vsp).unwrap();
    let offers = guest.request_offers();
    let mut channel = guest.open(&offers[0], 2, 0).unwrap();
    until("timeout", || log.lock().unwrap().len() == 1);
    waker.lock().unwrap().as_ref().unwrap().wake();
    until("woken", || log.lock().unwrap().len() == 2);
    channel.send(1, b"");
    until("packet", || log.lock().unwrap().len() == 3);
    guest.close(channel);
    let expected = ["timeout", "woken", "packet", "stopped"];
    assert_eq!(*log.lock().unwrap(), expected);
}

#[test]
fn monitor_pages_signal() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let (vsp, _) = Echo::new();
    let mut p = params(1);
    p.monitor_latency = Some(Duration::from_millis(1));
    let _handle = guest.server.offer(p, vsp).unwrap();
    let (_plain, _) = offer(&guest, 2);
    let offers = guest.request_offers();
    let monitor = offers[0].monitor().expect("a monitor id");
    assert!(offers[1].monitor().is_none());
    let page = FakeGuest::MONITOR_PAGE;
    let word = |offset: usize| -> u32 {
        let at = GuestAddress(page + offset as u64);
        guest.mem.read_obj(at).unwrap()
    };
    assert_eq!(word(0), 1);
    assert_eq!(word(monitor.latency_offset()) & 0xffff, 10_000);
    assert_eq!(
        word(monitor.parameter_offset()),
        offers[0].connection_id.get()
    );
    let mem = guest.mem.clone();
    let mut channel = guest.open(&offers[0], 3, 0).unwrap();
    for i in 0..5 {
        // Write without the hypercall, then set the bit.
        let mut tx = hv_proto::ring::Producer::new(
            super::ring::GuestRing::new(&mem, &channel.pages[..3]).unwrap(),
        )
        .unwrap();
        let header = hv_proto::packet::Header::in_band(i, true);
        let _ = tx.write(header, &[b"monitor!"]).unwrap();
        let at = GuestAddress(page + monitor.pending_offset() as u64);
        mem.write_obj(monitor.mask(), at).unwrap();
        assert_eq!(channel.completion(i), b"monitor!");
    }
}

#[test]
fn a_guest_that_does_not_take_messages() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let handles: Vec<_> = (1..=20).map(|n| offer(&guest, n)).collect();
    guest.synic.set_capacity(4);
    guest.post(&hv_proto::message::RequestOffers {});
    // While its queue is full, the guest's messages are turned away.
    let close = CloseChannel {
        channel_id: ChannelId::new(1),
    };
    let status = guest.post_raw(&close.encode());
    assert_eq!(status, HvStatus::INSUFFICIENT_BUFFERS);
    let mut offers = 0;
    while let HostMessage::OfferChannel(_) = guest.expect() {
        offers += 1;
    }
    assert_eq!(offers, 20);
    until("accepted again", || {
        guest.post_raw(&close.encode()) == HvStatus::SUCCESS
    });
    // A new contact does not wait for the old messages.
    drop(handles);
    let old = guest.receive(SOON);
    assert!(old.is_some());
    let status = guest.contact(Version::V5_3.raw(), ConnectionId::MESSAGE_V5);
    assert_eq!(status, HvStatus::SUCCESS);
    loop {
        match guest.expect() {
            HostMessage::RescindChannelOffer(_) => {}
            HostMessage::VersionResponse(_) => break,
            other => panic!("{other:?}"),
        }
    }
}

/// Answers what it has read only when the channel is closing.
struct Late(Option<JoinHandle<()>>);

impl Vsp for Late {
    fn open(&mut self, channel: HostChannel, _: OpenParams) -> Result<(), OpenError> {
        let (mut reader, writer) = channel.into_parts();
        self.0 = Some(thread::spawn(move || {
            let mut read = Vec::new();
            loop {
                match reader.next(None) {
                    Ok(Some(packet)) => read.push(packet.transaction_id()),
                    Ok(None) => {}
                    Err(ChannelError::Stopped) => break,
                    Err(e) => panic!("{e}"),
                }
            }
            for id in read {
                writer.complete(id, b"too late").unwrap();
            }
        }));
        Ok(())
    }

    fn close(&mut self, _: u16) {
        self.0.take().unwrap().join().unwrap();
    }
}

#[test]
fn what_was_read_is_answered_before_the_guest_hears_of_a_rescind() {
    let mut guest = FakeGuest::connected(Version::V5_3);
    let handle = guest.server.offer(params(1), Box::new(Late(None))).unwrap();
    let offers = guest.request_offers();
    let mut channel = guest.open(&offers[0], 3, 0).unwrap();
    for id in 1..=20 {
        channel.send(id, b"");
    }
    let counters = || guest.server.status().channels[0].counters;
    until("all read", || counters().packets_in == 20);
    handle.rescind();
    assert_eq!(guest.expect_rescind(), channel.id);
    for id in 1..=20 {
        let packet = channel.take().expect("an answer");
        assert_eq!(packet.transaction_id, id);
    }
}

/// How the use of rings ends.
#[derive(Debug, Clone, Copy)]
enum Ending {
    Close,
    Rescind,
    Unload,
    Contact,
    Reset,
}

/// With packets under way on several channels: when the guest hears of the end, the host does not
/// touch the rings any more.
#[test]
fn the_host_lets_go_of_rings_under_traffic() {
    use Ending::*;
    for round in 0..20 {
        let ending = [Close, Rescind, Unload, Contact, Reset][round % 5];
        let (mut guest, handle, log, primary) = echo_guest();
        let mut handle = Some(handle);
        handle
            .as_ref()
            .unwrap()
            .device()
            .offer_subchannels(2)
            .unwrap();
        let subs = [guest.expect_offer(), guest.expect_offer()];
        let mut channels = vec![primary];
        for sub in &subs {
            channels.push(guest.open(sub, 3, 3).unwrap());
        }
        let ids: Vec<_> = channels.iter().map(|c| (c.id, c.gpadl)).collect();
        let pages: Vec<u64> = channels.iter().flat_map(|c| c.pages.clone()).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let traffic: Vec<_> = channels
            .into_iter()
            .map(|mut channel| {
                let stop = stop.clone();
                thread::spawn(move || {
                    let mut id = 0;
                    loop {
                        id += u64::from(channel.try_send(id, &[7; 100], true).is_ok());
                        while channel.take().is_some() {
                            channel.commit();
                        }
                        if stop.load(Ordering::SeqCst) {
                            return id;
                        }
                    }
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(5));
        match ending {
            Close => {
                for (channel_id, gpadl_id) in ids.into_iter().rev() {
                    guest.post(&CloseChannel { channel_id });
                    guest.post(&GpadlTeardown {
                        channel_id,
                        gpadl_id,
                    });
                }
                let mut torn_down = 0;
                while torn_down < 3 {
                    torn_down += match guest.expect() {
                        HostMessage::GpadlTorndown(_) => 1,
                        HostMessage::RescindChannelOffer(_) => 0,
                        other => panic!("{other:?}"),
                    };
                }
            }
            Rescind => {
                handle.take().unwrap().rescind();
                for _ in 0..3 {
                    guest.expect_rescind();
                }
            }
            Unload => guest.unload(),
            Contact => assert!(guest.connect(Version::V5_3)),
            Reset => guest.server.reset(),
        }
        stop.store(true, Ordering::SeqCst);
        let sent: u64 = traffic.into_iter().map(|t| t.join().unwrap()).sum();
        assert!(sent > 0);
        for pfn in &pages {
            let at = GuestAddress(pfn << 12);
            guest.mem.write_slice(&[0xa5; 4096], at).unwrap();
        }
        thread::sleep(Duration::from_millis(5));
        for pfn in &pages {
            let mut page = [0; 4096];
            let at = GuestAddress(pfn << 12);
            guest.mem.read_slice(&mut page, at).unwrap();
            assert!(page.iter().all(|&b| b == 0xa5), "touched after {ending:?}");
        }
        assert_eq!(
            Log::count(&log.opens),
            Log::count(&log.closes),
            "{ending:?}"
        );
    }
}

#[test]
fn sockets_to_the_host_are_refused() {
    let guest = FakeGuest::connected(Version::V5_3);
    guest.post(&TlConnectRequest {
        guest_endpoint_id: guid(4),
        host_service_id: guid(5),
    });
    match guest.expect() {
        HostMessage::TlConnectResult(m) => {
            assert_eq!((m.guest_endpoint_id, m.host_service_id), (guid(4), guid(5)));
            assert_ne!(m.status.get(), 0);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn channel_numbers_are_bounded_and_not_reused_at_once() {
    let (guest, _handle, log, channel) = echo_guest();
    let device = log.devices.lock().unwrap()[0].clone();
    assert_eq!(device.offer_subchannels(3000), Err(OfferError::NoChannelId));
    let mut seen = std::collections::BTreeSet::from([channel.id]);
    for _ in 0..2046 {
        let offered = guest.expect_offer();
        assert!(offered.channel_id.is_valid());
        assert!(seen.insert(offered.channel_id));
    }
    guest.expect_nothing();
}

#[test]
fn the_trace_tells_everything() {
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let sink = Sink::default();
    let trace = Arc::new(Trace::to_writer(sink.clone()));
    let mut guest = FakeGuest::with_trace(Version::V5_3, Some(trace));
    let (_handle, _) = offer(&guest, 1);
    assert!(guest.connect(Version::V5_3));
    let offers = guest.request_offers();
    let mut channel = guest.open(&offers[0], 3, 0).unwrap();
    ping(&mut channel);
    // A packet is traced after the guest can see it.
    until("the answer is traced", || {
        String::from_utf8_lossy(&sink.0.lock().unwrap()).contains("COMPLETION")
    });
    guest.close(channel);
    guest.post_raw(&[5, 0, 0, 0]);
    guest.unload();
    let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let kinds: Vec<String> = lines
        .iter()
        .map(|l| {
            format!(
                "{} {}",
                l["dir"].as_str().unwrap(),
                l["type"].as_str().unwrap()
            )
        })
        .collect();
    let expected = [
        "to_host INITIATE_CONTACT",
        "to_guest VERSION_RESPONSE",
        "to_host REQUEST_OFFERS",
        "to_guest OFFER_CHANNEL",
        "to_guest ALL_OFFERS_DELIVERED",
        "to_host GPADL_HEADER",
        "to_guest GPADL_CREATED",
        "to_host OPEN_CHANNEL",
        "to_guest OPEN_CHANNEL_RESULT",
        "to_host IN_BAND",
        "to_guest COMPLETION",
        "to_host CLOSE_CHANNEL",
        "to_host GPADL_TEARDOWN",
        "to_guest GPADL_TORNDOWN",
        "to_host INVALID",
        "to_host UNLOAD",
        "to_guest UNLOAD_RESPONSE",
    ];
    assert_eq!(kinds, expected);
    assert!(lines.iter().all(|l| l["t"].is_number()));
    assert!(text.lines().all(|l| l.starts_with(r#"{"t":"#)));
    assert_eq!(lines[0]["version"], "5.3");
    assert_eq!(lines[9]["kind"], "packet");
    assert_eq!(lines[9]["len"], 32);
    assert_eq!(lines[9]["transaction_id"], 99);
    assert_eq!(lines[10]["len"], 32);
    assert_eq!(lines[3]["instance"], guid(1).to_string());
}

/// All message numbers that are known, and some that are not.
fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let body = proptest::collection::vec(any::<u8>(), 0..240);
    // Small numbers in the fields, so that some of them mean something.
    let small =
        proptest::collection::vec(0u32..6, 0..56).prop_map(|words| words.as_bytes().to_vec());
    (0u32..28, prop_oneof![body, small]).prop_map(|(kind, body)| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&body);
        bytes.truncate(240);
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a guest sends, nothing breaks, and after a new contact all is well.
    #[test]
    fn any_messages_leave_the_server_alive(
        messages in proptest::collection::vec(any_message(), 1..60)
    ) {
        let (mut guest, _handle, log, channel) = echo_guest();
        for message in &messages {
            guest.post_raw(message);
        }
        drop(channel);
        while guest.receive(Duration::ZERO).is_some() {}
        guest.server.reset();
        while guest.receive(Duration::ZERO).is_some() {}
        prop_assert!(guest.connect(Version::V5_3));
        let offers = guest.request_offers();
        prop_assert_eq!(offers.len(), 1);
        let mut channel = guest.open(&offers[0], 3, 0).unwrap();
        ping(&mut channel);
        prop_assert_eq!(Log::count(&log.opens), Log::count(&log.closes) + 1);
    }

    /// Bytes that are no message at all.
    #[test]
    fn any_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (guest, _handle, _, mut channel) = echo_guest();
        let contact = bytes.first() == Some(&(MessageType::INITIATE_CONTACT.get() as u8));
        let unload = bytes.first() == Some(&(MessageType::UNLOAD.get() as u8));
        prop_assume!(!contact && !unload);
        guest.post_raw(&bytes);
        let close = bytes.starts_with(&[MessageType::CLOSE_CHANNEL.get() as u8, 0, 0, 0]);
        prop_assume!(!close);
        ping(&mut channel);
    }

    /// Anything in the ring to the host: the channel answers or is closed, and the other one
    /// lives on.
    #[test]
    fn any_ring_contents_do_no_harm(
        bytes in proptest::collection::vec(any::<u8>(), 16..2000),
        write_index in prop_oneof![any::<u32>(), (0u32..4096).prop_map(|i| i & !7)],
    ) {
        let (mut guest, _handle, _, mut healthy) = echo_guest();
        let (_other, _) = offer(&guest, 2);
        let offered = guest.expect_offer();
        let channel = guest.open(&offered, 3, 0).unwrap();
        channel.scribble_tx(0, &bytes);
        channel.damage_tx(Field::WriteIndex, write_index);
        channel.signal();
        ping(&mut healthy);
        guest.close(channel);
        ping(&mut healthy);
    }
}
