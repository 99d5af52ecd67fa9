// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Guest and host state machines against each other.
//!
//! One channel with one ring, two queues of messages between the sides, and a scheduler that lets
//! anything happen at any time: the driver opens, closes and gives up waiting, the device answers
//! late or refuses, the host rescinds, messages are delivered at their leisure. All messages go
//! through their wire form. What must hold is checked after each step, above all: memory that the
//! guest may free is memory that no device uses.

use std::collections::VecDeque;

use hv_proto::client;
use hv_proto::gpadl::GpadlMessages;
use hv_proto::ids::{ChannelId, GpadlId, OpenId, VpIndex};
use hv_proto::message::{GuestMessage, HostMessage, Message, MessageBuf, RescindChannelOffer};
use hv_proto::server::{self, CloseDecision, ClosedDecision, OpenDecision, OpenedDecision};
use hv_proto::version::Version;
use proptest::prelude::*;

const ID: ChannelId = ChannelId::new(9);
const VERSION: Version = Version::V5_3;
const PAGES: u32 = 64;

#[derive(Clone, Copy, Debug)]
enum Step {
    // The guest's driver.
    Create,
    Open,
    GiveUpOpen,
    Close,
    Teardown,
    GiveUpTeardown,
    Release,
    // The host's device and its owner.
    DeviceOpened(bool),
    DeviceClosed,
    Rescind,
    // The wires.
    ToHost,
    ToGuest,
}

/// Any step; messages travel more often than things happen.
fn step() -> impl Strategy<Value = Step> {
    prop::sample::select(
        &[
            Step::Create,
            Step::Create,
            Step::Create,
            Step::Open,
            Step::Open,
            Step::Open,
            Step::GiveUpOpen,
            Step::Close,
            Step::Close,
            Step::Teardown,
            Step::Teardown,
            Step::GiveUpTeardown,
            Step::Release,
            Step::DeviceOpened(true),
            Step::DeviceOpened(true),
            Step::DeviceOpened(true),
            Step::DeviceOpened(false),
            Step::DeviceClosed,
            Step::DeviceClosed,
            Step::DeviceClosed,
            Step::Rescind,
            Step::ToHost,
            Step::ToHost,
            Step::ToHost,
            Step::ToHost,
            Step::ToHost,
            Step::ToHost,
            Step::ToHost,
            Step::ToHost,
            Step::ToGuest,
            Step::ToGuest,
            Step::ToGuest,
            Step::ToGuest,
            Step::ToGuest,
            Step::ToGuest,
        ][..],
    )
}

struct World {
    to_host: VecDeque<MessageBuf>,
    to_guest: VecDeque<MessageBuf>,
    // Guest. Old GPADLs stay, to see what becomes of their memory.
    channel: client::Channel,
    gpadls: Vec<client::Gpadl>,
    next_gpadl: GpadlId,
    gave_up: bool,
    released: bool,
    // Host.
    host: server::Channel,
    host_gpadls: Vec<server::Gpadl>,
    /// The GPADL that the device uses as its ring.
    ring: Option<GpadlId>,
    freed: bool,
}

impl World {
    fn new() -> Self {
        let mut host = server::Channel::new(ID);
        assert!(host.offer());
        Self {
            to_host: VecDeque::new(),
            to_guest: VecDeque::new(),
            channel: client::Channel::new(ID),
            gpadls: Vec::new(),
            next_gpadl: GpadlId::FIRST,
            gave_up: false,
            released: false,
            host,
            host_gpadls: Vec::new(),
            ring: None,
            freed: false,
        }
    }

    fn send_to_host(&mut self, message: &impl Message) {
        self.to_host.push_back(message.encode());
    }

    fn send_to_guest(&mut self, message: &impl Message) {
        self.to_guest.push_back(message.encode());
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Create => self.create(),
            Step::Open => {
                let live = self.gpadls.last().map(|g| (g.gpadl_id(), g.state()));
                if let Some((id, client::GpadlState::Live)) = live {
                    if let Ok(open) = self.channel.open(id, VpIndex::BOOT, PAGES / 2, b"hello") {
                        self.send_to_host(&open);
                    }
                }
            }
            Step::GiveUpOpen => {
                if let Some(close) = self.channel.open_timed_out() {
                    self.gave_up = true;
                    self.send_to_host(&close);
                }
            }
            Step::Close => {
                if let Some(close) = self.channel.close() {
                    self.send_to_host(&close);
                }
            }
            Step::Teardown => {
                // As a driver must: the ring's memory only after the channel is closed.
                if self.channel.state() == client::ChannelState::Closed {
                    let gpadl = self.gpadls.last_mut();
                    if let Some(teardown) = gpadl.and_then(client::Gpadl::teardown) {
                        self.send_to_host(&teardown);
                    }
                }
            }
            Step::GiveUpTeardown => {
                if let Some(gpadl) = self.gpadls.last_mut() {
                    self.gave_up |= gpadl.state() == client::GpadlState::TearingDown;
                    gpadl.teardown_timed_out();
                }
            }
            Step::Release => {
                if let Some(release) = self.channel.release() {
                    assert!(!self.released);
                    self.released = true;
                    self.send_to_host(&release);
                }
            }
            Step::DeviceOpened(ok) => {
                if self.host.state() == server::ChannelState::Opening {
                    self.device_opened(if ok { 0 } else { 0xc000_0001 });
                }
            }
            Step::DeviceClosed => {
                if self.host.state() == server::ChannelState::Closing {
                    self.end_ring();
                    let decision = self.host.closed();
                    self.on_closed(decision);
                }
            }
            Step::Rescind => {
                if self.host.rescind() == CloseDecision::Done {
                    self.send_to_guest(&RescindChannelOffer { channel_id: ID });
                }
            }
            Step::ToHost => {
                if let Some(message) = self.to_host.pop_front() {
                    self.host_receives(&message);
                }
            }
            Step::ToGuest => {
                if let Some(message) = self.to_guest.pop_front() {
                    self.guest_receives(&message);
                }
            }
        }
        self.check();
    }

    /// Describes new memory, once the last memory is settled.
    fn create(&mut self) {
        let settled = self
            .gpadls
            .last()
            .is_none_or(|gpadl| gpadl.may_free() || gpadl.state() == client::GpadlState::Leaked);
        if !settled || self.channel.is_rescinded() {
            return;
        }
        let id = self.next_gpadl;
        self.next_gpadl = id.next();
        let mut gpadl = client::Gpadl::new(ID, id);
        assert!(gpadl.start());
        self.gpadls.push(gpadl);
        let messages = GpadlMessages::new(ID, id, PAGES * 4096, 0, u64::from).unwrap();
        self.to_host.extend(messages);
    }

    fn guest_receives(&mut self, bytes: &[u8]) {
        let unexpected = match HostMessage::parse(bytes, Some(VERSION)).unwrap() {
            HostMessage::OpenChannelResult(m) => self.channel.open_result(&m).err(),
            HostMessage::GpadlCreated(m) => {
                let gpadl = self.gpadls.iter_mut().find(|g| g.gpadl_id() == m.gpadl_id);
                gpadl.unwrap().created(&m).err()
            }
            HostMessage::GpadlTorndown(m) => {
                let gpadl = self.gpadls.iter_mut().find(|g| g.gpadl_id() == m.gpadl_id);
                gpadl.unwrap().torndown(&m).err()
            }
            HostMessage::RescindChannelOffer(m) => {
                let result = self.channel.rescind(&m).err();
                self.gpadls.iter_mut().for_each(client::Gpadl::host_let_go);
                result
            }
            other => panic!("{other:?}"),
        };
        // An honest host surprises only a guest that gave up waiting, or tore down a GPADL before
        // it heard that it was created.
        let early = unexpected == Some(client::Unexpected::NotWaited) && bytes[0] == 10;
        let late = self.channel.is_rescinded();
        assert!(
            unexpected.is_none() || self.gave_up || early || late,
            "{unexpected:?}"
        );
    }

    fn host_receives(&mut self, bytes: &[u8]) {
        match GuestMessage::parse(bytes, Some(VERSION)).unwrap() {
            GuestMessage::GpadlHeader(header, words) => {
                if !self.host.accepts_gpadl() {
                    self.send_to_guest(&server::refuse_gpadl(&header));
                    return;
                }
                let (gpadl, decision) = server::Gpadl::create(&header, words, |_| ()).unwrap();
                assert!(matches!(decision, server::GpadlDecision::Wait));
                self.host_gpadls.push(gpadl);
            }
            GuestMessage::GpadlBody(body, words) => {
                // Its header may have been refused.
                let gpadl = self
                    .host_gpadls
                    .iter_mut()
                    .find(|g| g.gpadl_id() == body.gpadl_id);
                let decision = gpadl.and_then(|gpadl| gpadl.body(&body, words, |_| ()));
                if let Some(server::GpadlDecision::Created(created)) = decision.transpose().unwrap()
                {
                    self.send_to_guest(&created);
                }
            }
            GuestMessage::GpadlTeardown(request) => {
                let at = self
                    .host_gpadls
                    .iter()
                    .position(|gpadl| gpadl.gpadl_id() == request.gpadl_id);
                let Some(at) = at else {
                    return;
                };
                if let server::TeardownDecision::Torndown(torndown) =
                    self.host_gpadls[at].teardown(&request)
                {
                    self.host_gpadls.remove(at);
                    self.send_to_guest(&torndown);
                }
            }
            GuestMessage::OpenChannel(open) => match self.host.open(&open) {
                OpenDecision::Start => self.start_ring(open.ring_gpadl),
                OpenDecision::Later => {}
                OpenDecision::Refuse(result) => self.send_to_guest(&result),
            },
            GuestMessage::CloseChannel(_) => {
                self.host.close();
            }
            GuestMessage::RelidReleased(_) => {
                if self.host.released() == CloseDecision::Free {
                    self.free();
                }
            }
            other => panic!("{other:?}"),
        }
    }

    fn start_ring(&mut self, gpadl_id: GpadlId) {
        assert_eq!(self.ring, None);
        let gpadl = self
            .host_gpadls
            .iter_mut()
            .find(|g| g.gpadl_id() == gpadl_id);
        if gpadl.is_some_and(|gpadl| gpadl.start_use(ID)) {
            self.ring = Some(gpadl_id);
        } else {
            self.device_opened(1);
        }
    }

    fn end_ring(&mut self) {
        let Some(gpadl_id) = self.ring.take() else {
            return;
        };
        let at = self
            .host_gpadls
            .iter()
            .position(|g| g.gpadl_id() == gpadl_id)
            .unwrap();
        if let Some(torndown) = self.host_gpadls[at].end_use() {
            self.host_gpadls.remove(at);
            self.send_to_guest(&torndown);
        }
    }

    fn device_opened(&mut self, status: u32) {
        if status != 0 {
            self.end_ring();
        }
        match self.host.opened(status) {
            OpenedDecision::Answer(result) => self.send_to_guest(&result),
            OpenedDecision::StartClose => {}
            OpenedDecision::Closed(decision) => self.on_closed(decision),
            OpenedDecision::Ignore => panic!("the channel was opening"),
        }
    }

    fn on_closed(&mut self, decision: ClosedDecision) {
        match decision {
            ClosedDecision::Idle => {}
            ClosedDecision::Reopen(open) => self.start_ring(open.ring_gpadl),
            ClosedDecision::SendRescind => {
                self.send_to_guest(&RescindChannelOffer { channel_id: ID });
            }
            ClosedDecision::Free => self.free(),
            ClosedDecision::Ignore => panic!("the channel was closing"),
        }
    }

    fn free(&mut self) {
        assert!(!self.freed && self.ring.is_none() && self.released);
        self.freed = true;
        self.host_gpadls.clear();
    }

    fn check(&self) {
        // The one that matters: no device uses memory that the guest may have given away.
        for gpadl in self.gpadls.iter().filter(|gpadl| gpadl.may_free()) {
            assert_ne!(self.ring, Some(gpadl.gpadl_id()));
        }
        // The ring is in use exactly while the channel says so.
        assert_eq!(self.ring.is_some(), self.host.uses_ring());
        if self.channel.is_usable() && !self.gave_up {
            assert!(matches!(
                self.host.state(),
                server::ChannelState::Open
                    | server::ChannelState::Closing
                    | server::ChannelState::Rescinded
            ));
        }
    }

    /// Lets everything come to its end, with a driver that waits for answers.
    fn settle(&mut self) {
        for _ in 0..200 {
            let moving = matches!(
                self.host.state(),
                server::ChannelState::Opening | server::ChannelState::Closing
            );
            if !moving && self.to_host.is_empty() && self.to_guest.is_empty() {
                return;
            }
            for step in [
                Step::ToHost,
                Step::ToGuest,
                Step::DeviceOpened(true),
                Step::DeviceClosed,
            ] {
                self.run(step);
            }
        }
        panic!("the two sides go on for ever");
    }
}

#[test]
fn open_use_close_and_open_again() {
    let mut world = World::new();
    for round in 0..3u32 {
        world.run(Step::Create);
        world.settle();
        assert_eq!(
            world.gpadls.last().unwrap().state(),
            client::GpadlState::Live
        );
        world.run(Step::Open);
        let id = OpenId::new(ID.get() | round << 16);
        assert_eq!(world.channel.state(), client::ChannelState::Opening(id));
        world.settle();
        assert!(world.channel.is_usable());
        world.run(Step::Close);
        world.run(Step::Teardown);
        world.settle();
        assert!(world.gpadls.last().unwrap().may_free());
        assert!(world.host_gpadls.is_empty());
    }
}

#[test]
fn rescind_of_an_open_channel_ends_with_a_free_id() {
    let mut world = World::new();
    world.run(Step::Create);
    world.settle();
    world.run(Step::Open);
    world.settle();
    world.run(Step::Rescind);
    // Not a word before the device has let go.
    assert!(world.to_guest.is_empty());
    world.settle();
    assert!(world.channel.is_rescinded() && world.gpadls[0].may_free());
    world.run(Step::Close);
    world.run(Step::Release);
    world.settle();
    assert!(world.freed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_schedule(steps in prop::collection::vec(step(), 0..150)) {
        let mut world = World::new();
        for step in steps {
            world.run(step);
        }
        // Whatever happened, a patient driver can always finish.
        world.settle();
        world.run(Step::Close);
        world.run(Step::Teardown);
        world.settle();
        prop_assert!(world.ring.is_none());
        for gpadl in &world.gpadls {
            prop_assert!(gpadl.may_free() || gpadl.state() == client::GpadlState::Leaked);
        }
        world.run(Step::Release);
        world.settle();
        prop_assert_eq!(world.freed, world.channel.is_rescinded());
    }
}
