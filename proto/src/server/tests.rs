// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the state machines of the host.

use super::*;
use crate::gpadl::GpadlError;
use crate::ids::{ChannelId, ConnectionId, GpadlId, OpenId, VpIndex};
use crate::message::ContactTarget;
use crate::message::{
    GpadlBody, GpadlHeader, GpadlTeardown, GuestMessage, InitiateContact, ModifyChannel,
    OpenChannel, STATUS_SUCCESS, STATUS_UNSUCCESSFUL,
};
use crate::version::Version;
use proptest::prelude::*;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::FromZeros;

const ID: ChannelId = ChannelId::new(5);

fn contact(version: u32, vp: u32) -> InitiateContact {
    let field = if version >= Version::V5_0.raw() {
        ContactTarget {
            sint: 2,
            ..FromZeros::new_zeroed()
        }
        .to_field()
    } else {
        U64::new(0x7000)
    };
    InitiateContact {
        version: U32::new(version),
        target_vp: VpIndex::new(vp),
        interrupt_page_or_target: field,
        monitor_page1: U64::new(0x8000),
        monitor_page2: U64::new(0x9000),
    }
}

fn contact_connection(version: Version) -> ConnectionId {
    if version.uses_message_connection_id() {
        ConnectionId::MESSAGE_V5
    } else {
        ConnectionId::MESSAGE
    }
}

fn connected(version: Version) -> Connection {
    let mut connection = Connection::new(Version::NEWEST);
    let decision = connection.contact(&contact(version.raw(), 0), contact_connection(version));
    assert!(
        matches!(decision, ContactDecision::Accept(_)),
        "{decision:?}"
    );
    connection
}

#[test]
fn each_version_can_be_agreed() {
    for max in Version::NEWEST_FIRST {
        for version in Version::NEWEST_FIRST {
            let mut connection = Connection::new(max);
            let decision =
                connection.contact(&contact(version.raw(), 3), contact_connection(version));
            if version > max {
                let target = MessageTarget {
                    vp: VpIndex::new(3),
                    sint: 2,
                };
                assert_eq!(decision, ContactDecision::Refuse(target));
                assert_eq!(connection.version(), None);
                continue;
            }
            let ContactDecision::Accept(agreed) = decision else {
                panic!("{decision:?}");
            };
            assert_eq!(connection.agreed(), Some(&agreed));
            assert_eq!(agreed.version, version);
            assert_eq!(agreed.monitor_pages, Some([0x8000, 0x9000]));
            let old = version.has_interrupt_page();
            assert_eq!(agreed.interrupt_page, old.then_some(0x7000));
            let response = agreed.response();
            assert_eq!(response.version_supported, 1);
            let id = if old { 0 } else { 4 };
            assert_eq!(response.message_connection_id.get(), id);
        }
    }
}

#[test]
fn contact_must_come_the_right_way() {
    let mut connection = Connection::new(Version::NEWEST);
    let new = contact(Version::V5_3.raw(), 0);
    let old = contact(Version::V4_0.raw(), 0);
    for (message, id) in [
        (new, ConnectionId::MESSAGE),
        (old, ConnectionId::MESSAGE_V5),
        (contact(0x0003_0000, 0), ConnectionId::MESSAGE),
        (contact(0x0005_0004, 0), ConnectionId::MESSAGE_V5),
    ] {
        let decision = connection.contact(&message, id);
        assert!(
            matches!(decision, ContactDecision::Refuse(_)),
            "{decision:?}"
        );
    }
    let with_target = |sint, vtl| InitiateContact {
        interrupt_page_or_target: ContactTarget {
            sint,
            vtl,
            ..FromZeros::new_zeroed()
        }
        .to_field(),
        ..new
    };
    let id = ConnectionId::MESSAGE_V5;
    assert!(matches!(
        connection.contact(&with_target(2, 2), id),
        ContactDecision::Refuse(_)
    ));
    assert_eq!(
        connection.contact(&with_target(16, 0), id),
        ContactDecision::Ignore
    );
    assert!(matches!(
        connection.contact(&with_target(5, 0), id),
        ContactDecision::Accept(agreed) if agreed.target.sint == 5
    ));
}

#[test]
fn monitor_pages_must_be_pages() {
    for (page1, page2) in [(0, 0x1000), (0x1000, 0), (0x1001, 0x2000), (0x1000, 0x2800)] {
        let mut message = contact(Version::V4_1.raw(), 0);
        message.monitor_page1 = U64::new(page1);
        message.monitor_page2 = U64::new(page2);
        let decision = Connection::new(Version::NEWEST).contact(&message, ConnectionId::MESSAGE);
        assert!(matches!(
            decision,
            ContactDecision::Accept(agreed) if agreed.monitor_pages.is_none()
        ));
    }
}

#[test]
fn old_hosts_lack_the_new_connection() {
    let old = Connection::new(Version::V4_1);
    assert!(old.has_connection(ConnectionId::MESSAGE));
    assert!(!old.has_connection(ConnectionId::MESSAGE_V5));
    let new = Connection::new(Version::V5_0);
    assert!(new.has_connection(ConnectionId::MESSAGE_V5));
    assert!(!new.has_connection(ConnectionId::EVENT));
}

#[test]
fn messages_need_the_connection_that_was_agreed() {
    let request = GuestMessage::RequestOffers(FromZeros::new_zeroed());
    let new = ConnectionId::MESSAGE_V5;
    let old = ConnectionId::MESSAGE;
    let nobody = Connection::new(Version::NEWEST);
    assert_eq!(nobody.admit(new, &request), Err(Refusal::NotConnected));
    let unload = GuestMessage::Unload(FromZeros::new_zeroed());
    assert_eq!(nobody.admit(old, &unload), Ok(()));
    let connection = connected(Version::V5_3);
    assert_eq!(connection.admit(new, &request), Ok(()));
    assert_eq!(
        connection.admit(old, &request),
        Err(Refusal::WrongConnection)
    );
    assert_eq!(
        connection.admit(ConnectionId::EVENT, &unload),
        Err(Refusal::WrongConnection)
    );
    assert_eq!(connected(Version::V4_0).admit(old, &request), Ok(()));
}

#[test]
fn offers_are_requested_once() {
    let mut connection = connected(Version::V5_3);
    assert!(!connection.wants_offers());
    assert!(connection.request_offers());
    assert!(connection.wants_offers());
    assert!(!connection.request_offers());
    assert!(!Connection::new(Version::NEWEST).request_offers());
}

#[test]
fn unload_ends_with_a_response() {
    let mut connection = connected(Version::V5_3);
    assert_eq!(connection.unload(), UnloadDecision::ResetFirst);
    assert_eq!(connection.unload(), UnloadDecision::Ignore);
    assert_eq!(connection.version(), None);
    let target = MessageTarget {
        vp: VpIndex::BOOT,
        sint: 2,
    };
    assert_eq!(connection.reset_done(), ResetDecision::Unloaded(target));
    assert_eq!(connection.reset_done(), ResetDecision::Idle);
    assert_eq!(connection.unload(), UnloadDecision::Ignore);
}

#[test]
fn new_contact_replaces_the_old_connection() {
    let mut connection = connected(Version::V5_3);
    connection.request_offers();
    let again = contact(Version::V5_1.raw(), 1);
    let id = ConnectionId::MESSAGE_V5;
    assert_eq!(connection.contact(&again, id), ContactDecision::ResetFirst);
    // One more, while the reset is under way: it counts.
    let third = contact(Version::V5_0.raw(), 2);
    assert_eq!(connection.contact(&third, id), ContactDecision::Ignore);
    assert!(matches!(
        connection.reset_done(),
        ResetDecision::Accept(agreed)
            if agreed.version == Version::V5_0 && agreed.target.vp == VpIndex::new(2)
    ));
    assert!(!connection.wants_offers());
    // The machine is reset while a contact waits: nobody is there to hear an answer.
    assert_eq!(connection.contact(&again, id), ContactDecision::ResetFirst);
    assert!(!connection.machine_reset());
    assert_eq!(connection.reset_done(), ResetDecision::Idle);
    assert!(!connection.machine_reset());
    let mut connection = connected(Version::V4_0);
    assert!(connection.machine_reset());
    assert_eq!(connection.reset_done(), ResetDecision::Idle);
}

fn open_request(open_id: u32) -> OpenChannel {
    OpenChannel::new(
        ID,
        OpenId::new(open_id),
        GpadlId::FIRST,
        VpIndex::BOOT,
        4,
        &[],
    )
    .unwrap()
}

fn open_channel() -> Channel {
    let mut channel = Channel::new(ID);
    assert!(channel.offer());
    assert!(matches!(
        channel.open(&open_request(1)),
        OpenDecision::Start
    ));
    let OpenedDecision::Answer(result) = channel.opened(STATUS_SUCCESS) else {
        panic!("no answer");
    };
    assert_eq!(result.open_id.get(), 1);
    assert_eq!(result.status.get(), 0);
    channel
}

#[test]
fn open_close_and_open_again() {
    let mut channel = open_channel();
    assert!(matches!(
        channel.open(&open_request(2)),
        OpenDecision::Refuse(result) if result.open_id.get() == 2 && result.status.get() != 0
    ));
    assert_eq!(channel.close(), CloseDecision::StartClose);
    assert!(channel.uses_ring());
    assert!(matches!(
        channel.open(&open_request(3)),
        OpenDecision::Later
    ));
    assert!(matches!(
        channel.closed(),
        ClosedDecision::Reopen(request) if request.open_id.get() == 3
    ));
    assert!(matches!(
        channel.opened(STATUS_UNSUCCESSFUL),
        OpenedDecision::Answer(result) if result.open_id.get() == 3 && result.status.get() != 0
    ));
    assert_eq!(channel.state(), ChannelState::Offered);
    assert_eq!(channel.close(), CloseDecision::Ignore);
}

#[test]
fn rescind_waits_for_the_device() {
    let mut channel = open_channel();
    assert_eq!(channel.rescind(), CloseDecision::StartClose);
    assert_eq!(channel.rescind(), CloseDecision::Ignore);
    assert_eq!(channel.close(), CloseDecision::Ignore);
    assert!(matches!(channel.closed(), ClosedDecision::SendRescind));
    assert!(!channel.accepts_gpadl());
    assert!(matches!(
        channel.open(&open_request(2)),
        OpenDecision::Refuse(_)
    ));
    assert_eq!(channel.released(), CloseDecision::Free);
    assert_eq!(channel.released(), CloseDecision::Ignore);
}

#[test]
fn rescind_while_opening() {
    let mut channel = Channel::new(ID);
    channel.offer();
    channel.open(&open_request(1));
    assert_eq!(channel.rescind(), CloseDecision::Wait);
    assert!(matches!(
        channel.opened(STATUS_SUCCESS),
        OpenedDecision::StartClose
    ));
    assert!(matches!(channel.closed(), ClosedDecision::SendRescind));

    let mut channel = Channel::new(ID);
    channel.offer();
    channel.open(&open_request(1));
    assert_eq!(channel.rescind(), CloseDecision::Wait);
    assert!(matches!(
        channel.opened(STATUS_UNSUCCESSFUL),
        OpenedDecision::Closed(ClosedDecision::SendRescind)
    ));
}

#[test]
fn reset_hides_channels() {
    let mut channel = open_channel();
    assert_eq!(channel.reset(), CloseDecision::StartClose);
    assert!(matches!(channel.closed(), ClosedDecision::Idle));
    assert_eq!(channel.state(), ChannelState::Hidden);
    assert_eq!(channel.released(), CloseDecision::Ignore);
    assert!(channel.offer());
    assert_eq!(channel.rescind(), CloseDecision::Done);
    assert_eq!(channel.reset(), CloseDecision::Free);
    assert_eq!(Channel::new(ID).rescind(), CloseDecision::Free);
}

#[test]
fn modify_needs_an_open_channel() {
    let request = ModifyChannel {
        channel_id: ID,
        target_vp: VpIndex::new(3),
    };
    let channel = open_channel();
    let decision = channel.modify(&request, Version::V5_3, true);
    assert_eq!(decision.target_vp, Some(VpIndex::new(3)));
    assert_eq!(decision.response.unwrap().status.get(), 0);
    assert!(channel
        .modify(&request, Version::V5_2, true)
        .response
        .is_none());
    for decision in [
        channel.modify(&request, Version::V5_3, false),
        Channel::new(ID).modify(&request, Version::V5_3, true),
    ] {
        assert_eq!(decision.target_vp, None);
        assert_ne!(decision.response.unwrap().status.get(), 0);
    }
}

#[test]
fn rings_need_two_pages_each() {
    assert_eq!(split_ring(3, 2), None);
    assert_eq!(split_ring(4, 1), None);
    assert_eq!(split_ring(4, u32::MAX), None);
    assert_eq!(
        split_ring(5, 2),
        Some(RingPages {
            to_host: 2,
            to_guest: 3
        })
    );
}

fn gpadl_header(pages: u16) -> (GpadlHeader, [U64; 2]) {
    let header = GpadlHeader {
        channel_id: ID,
        gpadl_id: GpadlId::FIRST,
        range_buf_len: U16::new(8 + pages * 8),
        range_count: U16::new(1),
    };
    (header, [U64::new(u64::from(pages) * 4096), U64::new(1)])
}

const TEARDOWN: GpadlTeardown = GpadlTeardown {
    channel_id: ID,
    gpadl_id: GpadlId::FIRST,
};

#[test]
fn gpadl_belongs_to_its_channel_and_outlives_its_users() {
    let (header, words) = gpadl_header(1);
    let (mut gpadl, decision) = Gpadl::create(&header, &words, |_| ()).unwrap();
    assert!(matches!(decision, GpadlDecision::Created(m) if m.status.get() == 0));
    assert!(!gpadl.start_use(ChannelId::new(6)));
    assert!(gpadl.start_use(ID) && gpadl.start_use(ID));
    let other = GpadlTeardown {
        channel_id: ChannelId::new(6),
        ..TEARDOWN
    };
    assert!(matches!(gpadl.teardown(&other), TeardownDecision::Ignore));
    assert!(matches!(gpadl.teardown(&TEARDOWN), TeardownDecision::Later));
    assert!(matches!(
        gpadl.teardown(&TEARDOWN),
        TeardownDecision::Ignore
    ));
    assert!(!gpadl.start_use(ID));
    assert!(gpadl.end_use().is_none());
    assert_eq!(gpadl.end_use().unwrap().gpadl_id, GpadlId::FIRST);
}

#[test]
fn gpadl_is_unusable_until_it_is_complete() {
    let (header, words) = gpadl_header(2);
    let (mut gpadl, decision) = Gpadl::create(&header, &words, |_| ()).unwrap();
    assert!(matches!(decision, GpadlDecision::Wait) && !gpadl.is_complete());
    assert!(!gpadl.start_use(ID));
    let body = GpadlBody {
        message_number: U32::ZERO,
        gpadl_id: GpadlId::FIRST,
    };
    let mut broken = gpadl.clone();
    let refused = broken.body(&body, &[], |_| ()).unwrap().unwrap_err();
    assert_ne!(refused.answer.status.get(), 0);
    assert!(matches!(
        gpadl.body(&body, &words[1..], |_| ()),
        Some(Ok(GpadlDecision::Created(_)))
    ));
    assert!(gpadl.body(&body, &words[1..], |_| ()).is_none());
    assert!(gpadl.start_use(ID));
    assert!(matches!(
        broken.teardown(&TEARDOWN),
        TeardownDecision::Torndown(_)
    ));
}

#[test]
fn bad_gpadl_is_refused_with_its_ids() {
    let (mut header, words) = gpadl_header(1);
    header.range_count = U16::new(9);
    let refused = Gpadl::create(&header, &words, |_| ()).unwrap_err();
    assert_eq!(refused.answer.gpadl_id, GpadlId::FIRST);
    assert_ne!(refused.answer.status.get(), 0);
    assert_eq!(
        refused.error,
        GpadlError::InvalidLength { range_buf_len: 16 }
    );
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Offer,
    Open,
    Opened(bool),
    Close,
    Rescind,
    Released,
    Reset,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Device {
    Closed,
    Opening,
    Open,
    Closing,
}

/// A device and a guest's view, driven by the decisions of the machine.
struct World {
    channel: Channel,
    device: Device,
    freed: bool,
    rescinds: u32,
}

impl World {
    fn on_close(&mut self, decision: CloseDecision, rescind: bool) {
        match decision {
            CloseDecision::StartClose => {
                assert_eq!(self.device, Device::Open);
                self.device = Device::Closing;
            }
            CloseDecision::Wait => {
                assert!(matches!(self.device, Device::Opening | Device::Closing));
            }
            CloseDecision::Done => {
                assert_eq!(self.device, Device::Closed);
                self.rescinds += u32::from(rescind);
            }
            CloseDecision::Free => self.free(),
            CloseDecision::Ignore => {}
        }
    }

    fn on_closed(&mut self, decision: ClosedDecision) {
        match decision {
            ClosedDecision::Idle => {}
            ClosedDecision::Reopen(_) => self.device = Device::Opening,
            ClosedDecision::SendRescind => self.rescinds += 1,
            ClosedDecision::Free => self.free(),
            ClosedDecision::Ignore => panic!("a closing channel was not expected to close"),
        }
    }

    fn free(&mut self) {
        assert_eq!(self.device, Device::Closed);
        assert!(!self.freed);
        self.freed = true;
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Offer => {
                if self.channel.offer() {
                    assert_eq!(self.device, Device::Closed);
                }
            }
            Event::Open => {
                if let OpenDecision::Start = self.channel.open(&open_request(1)) {
                    assert_eq!(self.device, Device::Closed);
                    self.device = Device::Opening;
                }
            }
            Event::Opened(ok) => {
                let was = self.device;
                let status = if ok {
                    STATUS_SUCCESS
                } else {
                    STATUS_UNSUCCESSFUL
                };
                if was == Device::Opening {
                    self.device = if ok { Device::Open } else { Device::Closed };
                }
                match self.channel.opened(status) {
                    OpenedDecision::Ignore => assert_ne!(was, Device::Opening),
                    OpenedDecision::Answer(_) => assert_eq!(was, Device::Opening),
                    OpenedDecision::StartClose => {
                        assert_eq!(self.device, Device::Open);
                        self.device = Device::Closing;
                    }
                    OpenedDecision::Closed(decision) => self.on_closed(decision),
                }
            }
            Event::Close => {
                let decision = self.channel.close();
                self.on_close(decision, false);
            }
            Event::Rescind => {
                let decision = self.channel.rescind();
                self.on_close(decision, true);
            }
            Event::Released => {
                let decision = self.channel.released();
                self.on_close(decision, false);
            }
            Event::Reset => {
                let decision = self.channel.reset();
                self.on_close(decision, false);
            }
            Event::Closed => {
                if self.device == Device::Closing {
                    self.device = Device::Closed;
                    let decision = self.channel.closed();
                    self.on_closed(decision);
                } else {
                    assert!(matches!(self.channel.closed(), ClosedDecision::Ignore));
                }
            }
        }
    }
}

fn event() -> impl Strategy<Value = Event> {
    prop::sample::select(vec![
        Event::Offer,
        Event::Open,
        Event::Opened(true),
        Event::Opened(false),
        Event::Close,
        Event::Rescind,
        Event::Released,
        Event::Reset,
        Event::Closed,
    ])
}

proptest! {
    /// In any order of events the device is opened and closed in turn, RESCIND is sent at
    /// most once and never while the ring is used, and a freed channel stays freed.
    #[test]
    fn any_order_of_events(events in prop::collection::vec(event(), 0..60)) {
        let mut world = World {
            channel: Channel::new(ID),
            device: Device::Closed,
            freed: false,
            rescinds: 0,
        };
        for event in events {
            world.apply(event);
            prop_assert_eq!(world.channel.uses_ring(), world.device != Device::Closed);
            prop_assert_eq!(world.freed, world.channel.state() == ChannelState::Released);
            prop_assert!(world.rescinds <= 1);
            if world.channel.state() == ChannelState::Rescinded {
                prop_assert_eq!(world.rescinds, 1);
            }
        }
    }

    #[test]
    fn any_contact_is_judged(
        version in prop_oneof![
            any::<u32>(),
            prop::sample::select(&Version::NEWEST_FIRST[..]).prop_map(Version::raw),
        ],
        field: u64,
        id in 0u32..6,
    ) {
        let mut connection = Connection::new(Version::NEWEST);
        let mut message = contact(version, 0);
        message.interrupt_page_or_target = U64::new(field);
        let decision = connection.contact(&message, ConnectionId::new(id));
        prop_assert_eq!(
            matches!(decision, ContactDecision::Accept(_)),
            connection.version().is_some()
        );
        if let ContactDecision::Accept(agreed) = decision {
            prop_assert_eq!(agreed.version.raw(), version);
            prop_assert!(agreed.target.sint < 16);
        }
    }
}
