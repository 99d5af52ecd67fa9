// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the state machines of the guest.

use super::*;
use crate::guid::{self, Guid};
use crate::hypercall::HvStatus;
use crate::ids::{ChannelId, ConnectionId, GpadlId, OpenId, VpIndex};
use crate::message::{
    GpadlCreated, GpadlTorndown, HostMessage, ModifyChannelResponse, OfferChannel, OfferFlags,
    OpenChannelResult, RescindChannelOffer, VersionResponse,
};
use crate::server;
use crate::synic::VMBUS_SINT;
use crate::version::Version;
use proptest::prelude::*;
use zerocopy::little_endian::U32;
use zerocopy::FromZeros;

const ID: ChannelId = ChannelId::new(5);

fn params(max_version: Version) -> ContactParams {
    ContactParams {
        max_version,
        ..ContactParams::new(VpIndex::new(1), 0x1000, [0x2000, 0x3000])
    }
}

/// Runs the negotiation against a host, and counts the messages that were posted.
fn negotiate(
    params: &ContactParams,
    host: &mut server::Connection,
) -> (Result<Agreed, ConnectError>, u32, Connection) {
    let mut guest = Connection::new();
    let mut step = guest.start(params);
    let mut posted = 0;
    loop {
        step = match step {
            Step::Post(attempt) => {
                posted += 1;
                assert!(posted <= 16);
                if !host.has_connection(attempt.connection_id) {
                    guest.post_failed(HvStatus::INVALID_CONNECTION_ID)
                } else {
                    let response = match host.contact(&attempt.message, attempt.connection_id) {
                        server::ContactDecision::Accept(agreed) => agreed.response(),
                        server::ContactDecision::Refuse(target) => {
                            assert_eq!(target.sint, VMBUS_SINT);
                            server::REFUSED
                        }
                        other => panic!("{other:?}"),
                    };
                    guest.version_response(&response).unwrap()
                }
            }
            Step::Connected(agreed) => return (Ok(agreed), posted, guest),
            Step::Failed(error) => return (Err(error), posted, guest),
        }
    }
}

#[test]
fn guest_and_host_agree_on_the_newest_common_version() {
    for of_guest in Version::NEWEST_FIRST {
        for of_host in Version::NEWEST_FIRST {
            let mut host = server::Connection::new(of_host);
            let (agreed, _, guest) = negotiate(&params(of_guest), &mut host);
            let agreed = agreed.unwrap();
            assert_eq!(agreed.version, of_guest.min(of_host));
            assert_eq!(guest.version(), host.version());
            let host_side = host.agreed().unwrap();
            assert_eq!(
                host_side.message_connection_id,
                agreed.message_connection_id
            );
            assert_eq!(host_side.target.vp, VpIndex::new(1));
            assert_eq!(host_side.monitor_pages, Some([0x2000, 0x3000]));
        }
    }
}

#[test]
fn isolated_guest_is_not_content_with_old_hosts() {
    let isolated = ContactParams {
        min_version: Version::V5_2,
        ..params(Version::NEWEST)
    };
    let (agreed, posted, guest) = negotiate(&isolated, &mut server::Connection::new(Version::V5_1));
    assert_eq!(agreed, Err(ConnectError::NoCommonVersion));
    assert_eq!(posted, 3);
    assert_eq!(guest.agreed(), None);
    let (agreed, _, _) = negotiate(&isolated, &mut server::Connection::new(Version::V5_2));
    assert_eq!(agreed.unwrap().version, Version::V5_2);
}

#[test]
fn vtl2_tries_the_redirect_connection_first() {
    let mut guest = Connection::new();
    let params = ContactParams {
        vtl: 2,
        confidential: true,
        ..params(Version::NEWEST)
    };
    let Step::Post(first) = guest.start(&params) else {
        panic!("nothing to post");
    };
    assert_eq!(first.connection_id, ConnectionId::MESSAGE_REDIRECT);
    assert_eq!(first.message.target().vtl, 2);
    assert_eq!(first.message.target().feature_flags.get(), 0x10);
    let Step::Post(second) = guest.post_failed(HvStatus::INVALID_CONNECTION_ID) else {
        panic!("nothing to post");
    };
    assert_eq!(second.connection_id, ConnectionId::MESSAGE_V5);
    assert_eq!(second.version, first.version);
    let Step::Post(third) = guest.post_failed(HvStatus::INVALID_CONNECTION_ID) else {
        panic!("nothing to post");
    };
    assert_eq!(third.connection_id, ConnectionId::MESSAGE_REDIRECT);
    assert_eq!(third.version, Version::V5_3);
    assert_eq!(third.message.target().feature_flags.get(), 0);
}

#[test]
fn bad_answers_end_the_negotiation() {
    let answer = |response: VersionResponse, max| {
        let mut guest = Connection::new();
        assert!(matches!(guest.start(&params(max)), Step::Post(_)));
        let step = guest.version_response(&response).unwrap();
        // Whatever came of it, a second answer is one too many, unless one more was asked for.
        if !matches!(step, Step::Post(_)) {
            assert_eq!(
                guest.version_response(&response).unwrap_err(),
                Unexpected::NotWaited
            );
        }
        step
    };
    let good = VersionResponse {
        version_supported: 1,
        message_connection_id: ConnectionId::new(4),
        ..FromZeros::new_zeroed()
    };
    assert!(matches!(answer(good, Version::V5_3), Step::Connected(_)));
    let busy = VersionResponse {
        connection_state: 1,
        ..good
    };
    assert!(matches!(
        answer(busy, Version::V5_3),
        Step::Failed(ConnectError::Refused {
            connection_state: 1
        })
    ));
    assert!(matches!(answer(busy, Version::V4_0), Step::Connected(_)));
    for id in [0, 0x100_0000, u32::MAX] {
        let strange = VersionResponse {
            message_connection_id: ConnectionId::new(id),
            ..good
        };
        assert!(matches!(
            answer(strange, Version::V5_0),
            Step::Failed(ConnectError::InvalidConnectionId(_))
        ));
        assert!(matches!(answer(strange, Version::V4_1), Step::Connected(_)));
    }
}

#[test]
fn contact_can_be_given_up() {
    let mut guest = Connection::new();
    guest.start(&params(Version::NEWEST));
    assert!(matches!(
        guest.start(&params(Version::NEWEST)),
        Step::Failed(ConnectError::Busy)
    ));
    assert!(matches!(
        guest.post_failed(HvStatus::ACCESS_DENIED),
        Step::Failed(ConnectError::Post(HvStatus::ACCESS_DENIED))
    ));
    guest.start(&params(Version::NEWEST));
    assert!(matches!(
        guest.contact_timed_out(),
        Step::Failed(ConnectError::TimedOut)
    ));
    assert!(guest.version_response(&FromZeros::new_zeroed()).is_err());
}

#[test]
fn only_what_fits_the_connection_is_accepted() {
    let offers_done = HostMessage::AllOffersDelivered(FromZeros::new_zeroed());
    let response = HostMessage::VersionResponse(FromZeros::new_zeroed());
    let unloaded = HostMessage::UnloadResponse(FromZeros::new_zeroed());
    let accepted = |guest: &Connection| {
        [&offers_done, &response, &unloaded].map(|message| guest.accepts(message))
    };
    let mut guest = Connection::default();
    assert_eq!(accepted(&guest), [false, false, false]);
    assert!(guest.unload().is_none() && guest.unload_response().is_err());
    guest.start(&params(Version::V4_0));
    assert_eq!(accepted(&guest), [false, true, false]);
    guest
        .version_response(&VersionResponse {
            version_supported: 1,
            ..FromZeros::new_zeroed()
        })
        .unwrap();
    assert_eq!(accepted(&guest), [true, false, false]);
    assert!(guest.unload().is_some() && guest.unload().is_none());
    assert_eq!(accepted(&guest), [false, false, true]);
    // The message connection is needed for the last message.
    assert!(guest.agreed().is_some());
    assert_eq!(guest.unload_response(), Ok(()));
    assert_eq!(accepted(&guest), [false, false, false]);
    guest.unload_timed_out();
    assert_eq!(guest.agreed(), None);
}

fn offer(id: u32, class: Guid, instance: u8, index: u16) -> OfferChannel {
    let mut offer = OfferChannel::new_zeroed();
    offer.channel_id = ChannelId::new(id);
    offer.interface_id = class;
    offer.instance_id = Guid::from_bytes([instance; 16]);
    offer.sub_channel_index.set(index);
    offer
}

fn rules(version: Version) -> OfferRules {
    OfferRules {
        version,
        confidential: false,
        isolated: false,
    }
}

#[test]
fn offers_are_judged() {
    let check = |offer: &OfferChannel| check_offer(offer, &rules(Version::V5_3));
    let good = offer(7, guid::SCSI, 1, 0);
    assert_eq!(check(&good), Ok(()));
    for id in [0, 2048, u32::MAX] {
        let error = check(&offer(id, guid::SCSI, 1, 0)).unwrap_err();
        assert_eq!(error, OfferError::InvalidChannelId);
        assert!(!error.must_release());
    }
    assert_eq!(
        check(&offer(7, Guid::ZERO, 1, 0)),
        Err(OfferError::ZeroGuid)
    );
    assert_eq!(
        check(&offer(7, guid::SCSI, 0, 0)),
        Err(OfferError::ZeroGuid)
    );
}

#[test]
fn confidential_offers_need_support_and_sense() {
    let ring = OfferFlags::CONFIDENTIAL_RING_BUFFER;
    let memory = OfferFlags::CONFIDENTIAL_EXTERNAL_MEMORY;
    let check = |flags: OfferFlags, version, confidential| {
        let mut offer = offer(7, guid::SCSI, 1, 0);
        offer.channel_flags.set(flags.bits());
        check_offer(
            &offer,
            &OfferRules {
                confidential,
                ..rules(version)
            },
        )
    };
    assert_eq!(
        check(memory, Version::V6_0, true),
        Err(OfferError::ConfidentialMemoryOnly)
    );
    assert_eq!(
        check(ring, Version::V6_0, false),
        Err(OfferError::ConfidentialNotSupported)
    );
    assert_eq!(
        check(ring, Version::V5_3, true),
        Err(OfferError::ConfidentialNotSupported)
    );
    assert_eq!(check(ring | memory, Version::V6_0, true), Ok(()));
}

#[test]
fn isolated_guest_takes_few_classes() {
    let rules = OfferRules {
        isolated: true,
        ..rules(Version::V5_3)
    };
    let check = |class| check_offer(&offer(7, class, 1, 0), &rules);
    assert_eq!(check(guid::SCSI), Ok(()));
    assert_eq!(check(guid::KVP), Err(OfferError::NotAllowedWhenIsolated));
    let mut socket = offer(7, Guid::from_bytes([9; 16]), 1, 0);
    socket
        .channel_flags
        .set(OfferFlags::TLNPI_PROVIDER_OFFER.bits());
    assert_eq!(check_offer(&socket, &rules), Ok(()));
}

fn known(id: u32, class: Guid, instance: u8, index: u16, rescinded: bool) -> KnownChannel {
    KnownChannel {
        channel_id: ChannelId::new(id),
        interface_id: class,
        instance_id: Guid::from_bytes([instance; 16]),
        sub_channel_index: index,
        rescinded,
    }
}

#[test]
fn offers_find_their_place() {
    let scsi = known(1, guid::SCSI, 1, 0, false);
    let sub = known(2, guid::SCSI, 1, 1, false);
    let gone = known(3, guid::SCSI, 2, 0, true);
    let all = [scsi, sub, gone];
    let place = |id, class, instance, index| place_offer(&offer(id, class, instance, index), all);
    let primary = ChannelId::new(1);
    assert_eq!(place(9, guid::SCSI, 9, 0), Ok(Placement::Primary));
    assert_eq!(
        place(9, guid::SCSI, 1, 2),
        Ok(Placement::Subchannel { primary })
    );
    assert_eq!(place(9, guid::SCSI, 1, 1), Err(OfferError::DuplicateIndex));
    assert_eq!(place(9, guid::SCSI, 1, 0), Err(OfferError::DuplicateIndex));
    assert_eq!(
        place(9, guid::NETWORK, 1, 0),
        Err(OfferError::ClassMismatch)
    );
    assert_eq!(
        place(9, guid::NETWORK, 1, 2),
        Err(OfferError::ClassMismatch)
    );
    assert_eq!(place(9, guid::SCSI, 9, 1), Err(OfferError::NoPrimary));
    assert_eq!(
        place(2, guid::SCSI, 9, 0),
        Err(OfferError::DuplicateChannelId)
    );
    assert_eq!(
        place(3, guid::SCSI, 9, 0),
        Err(OfferError::DuplicateChannelId)
    );
    // The old self of the device is on its way out.
    let old = ChannelId::new(3);
    assert_eq!(place(9, guid::SCSI, 2, 0), Ok(Placement::PrimaryAfter(old)));
    assert_eq!(
        place(9, guid::NETWORK, 2, 0),
        Ok(Placement::PrimaryAfter(old))
    );
    assert_eq!(place(9, guid::SCSI, 2, 1), Err(OfferError::NoPrimary));
}

fn opened() -> Channel {
    let mut channel = Channel::new(ID);
    let message = channel
        .open(GpadlId::FIRST, VpIndex::BOOT, 4, &[1])
        .unwrap();
    assert_eq!(
        channel.open_result(&result(message.open_id, 0)),
        Ok(Outcome::Done)
    );
    assert!(channel.is_usable());
    channel
}

fn result(open_id: OpenId, status: u32) -> OpenChannelResult {
    OpenChannelResult {
        channel_id: ID,
        open_id,
        status: U32::new(status),
    }
}

const RESCIND: RescindChannelOffer = RescindChannelOffer { channel_id: ID };

#[test]
fn results_must_belong_to_the_request() {
    let mut channel = Channel::new(ID);
    let open = |channel: &mut Channel| {
        channel
            .open(GpadlId::FIRST, VpIndex::BOOT, 4, &[])
            .map(|m| m.open_id)
    };
    assert_eq!(
        channel.open_result(&result(OpenId::new(5), 0)),
        Err(Unexpected::NotWaited)
    );
    let first = open(&mut channel).unwrap();
    assert_eq!(first.get(), 5);
    assert_eq!(open(&mut channel), Err(ChannelError::Busy));
    assert!(channel.open_timed_out().is_some());
    let second = open(&mut channel).unwrap();
    assert_eq!(
        channel.open_result(&result(first, 0)),
        Err(Unexpected::WrongId)
    );
    let mut other = result(second, 0);
    other.channel_id = ChannelId::new(6);
    assert_eq!(channel.open_result(&other), Err(Unexpected::WrongId));
    assert_eq!(
        channel.open_result(&result(second, 7)),
        Ok(Outcome::Refused(7))
    );
    assert_eq!(channel.state(), ChannelState::Closed);
    assert_eq!(
        channel
            .open(GpadlId::FIRST, VpIndex::BOOT, 4, &[0; 121])
            .map(|m| m.open_id),
        Err(ChannelError::UserDataTooLong)
    );
    open(&mut channel).unwrap();
    channel.open_not_posted();
    assert_eq!(channel.state(), ChannelState::Closed);
    assert!(channel.close().is_none());
}

#[test]
fn rescind_ends_everything_and_the_id_is_released_once() {
    let mut channel = opened();
    assert!(channel.release().is_none());
    assert_eq!(
        channel.rescind(&RescindChannelOffer {
            channel_id: ChannelId::new(6)
        }),
        Err(Unexpected::WrongId)
    );
    assert_eq!(channel.rescind(&RESCIND), Ok(ChannelState::Open));
    assert_eq!(channel.rescind(&RESCIND), Err(Unexpected::Rescinded));
    assert!(channel.is_rescinded() && !channel.is_usable());
    // The driver has not let go yet.
    assert!(channel.release().is_none());
    assert!(channel.close().is_none());
    assert!(channel.open(GpadlId::FIRST, VpIndex::BOOT, 4, &[]).is_err());
    assert_eq!(channel.release().unwrap().channel_id, ID);
    assert!(channel.release().is_none());

    let mut opening = Channel::new(ID);
    let message = opening.open(GpadlId::FIRST, VpIndex::BOOT, 4, &[]).unwrap();
    assert!(matches!(
        opening.rescind(&RESCIND),
        Ok(ChannelState::Opening(_))
    ));
    assert!(opening.open_result(&result(message.open_id, 0)).is_err());
    assert!(opening.release().is_some());
}

#[test]
fn modify_waits_only_where_there_is_an_answer() {
    let response = ModifyChannelResponse {
        channel_id: ID,
        status: U32::ZERO,
    };
    let mut channel = opened();
    let vp = VpIndex::new(1);
    let modify = |channel: &mut Channel, version| channel.modify(vp, version).map(|_| ());
    assert_eq!(
        modify(&mut channel, Version::V4_0),
        Err(ChannelError::NotInVersion)
    );
    assert_eq!(modify(&mut channel, Version::V5_2), Ok(()));
    assert_eq!(
        channel.modify_response(&response),
        Err(Unexpected::NotWaited)
    );
    assert_eq!(modify(&mut channel, Version::V5_3), Ok(()));
    assert_eq!(modify(&mut channel, Version::V5_3), Err(ChannelError::Busy));
    assert_eq!(channel.modify_response(&response), Ok(Outcome::Done));
    assert_eq!(modify(&mut channel, Version::V5_3), Ok(()));
    channel.modify_timed_out();
    assert_eq!(
        channel.modify_response(&response),
        Err(Unexpected::NotWaited)
    );
    channel.rescind(&RESCIND).unwrap();
    assert_eq!(
        modify(&mut channel, Version::V5_3),
        Err(ChannelError::Rescinded)
    );
    assert_eq!(
        modify(&mut Channel::new(ID), Version::V5_3),
        Err(ChannelError::Busy)
    );
}

fn created(status: u32) -> GpadlCreated {
    GpadlCreated {
        channel_id: ID,
        gpadl_id: GpadlId::FIRST,
        status: U32::new(status),
    }
}

const TORNDOWN: GpadlTorndown = GpadlTorndown {
    gpadl_id: GpadlId::FIRST,
};

#[test]
fn memory_is_freed_only_when_the_host_let_go() {
    let mut gpadl = Gpadl::new(ID, GpadlId::FIRST);
    assert!(gpadl.may_free());
    assert!(gpadl.start() && !gpadl.start());
    assert!(!gpadl.may_free());
    assert_eq!(gpadl.torndown(&TORNDOWN), Err(Unexpected::NotWaited));
    assert_eq!(gpadl.created(&created(0)), Ok(Outcome::Done));
    assert_eq!(gpadl.created(&created(0)), Err(Unexpected::NotWaited));
    assert_eq!(gpadl.teardown().unwrap().channel_id, ID);
    assert!(gpadl.teardown().is_none() && !gpadl.may_free());
    assert_eq!(
        gpadl.torndown(&GpadlTorndown {
            gpadl_id: GpadlId::new(1)
        }),
        Err(Unexpected::WrongId)
    );
    let mut silent = gpadl.clone();
    assert_eq!(gpadl.torndown(&TORNDOWN), Ok(()));
    assert!(gpadl.may_free());

    silent.teardown_timed_out();
    assert_eq!(silent.state(), GpadlState::Leaked);
    assert!(!silent.may_free());
    // It is too late: the owner of the memory may have left it for good.
    assert_eq!(silent.torndown(&TORNDOWN), Err(Unexpected::NotWaited));
}

#[test]
fn gpadl_that_never_came_to_life() {
    let mut refused = Gpadl::new(ID, GpadlId::FIRST);
    assert!(refused.start());
    assert_eq!(refused.created(&created(9)), Ok(Outcome::Refused(9)));
    assert!(refused.may_free() && refused.teardown().is_none());

    let mut unsent = Gpadl::new(ID, GpadlId::FIRST);
    assert!(unsent.start());
    unsent.not_posted();
    assert!(unsent.may_free());

    // The answer does not come: only a teardown makes sure.
    let mut unanswered = Gpadl::new(ID, GpadlId::FIRST);
    assert!(unanswered.start());
    assert!(unanswered.teardown().is_some());
    assert_eq!(unanswered.created(&created(0)), Err(Unexpected::NotWaited));
    assert!(!unanswered.may_free());
    unanswered.host_let_go();
    assert!(unanswered.may_free());
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Open,
    Result { stale: bool, status: u32 },
    OpenTimedOut,
    Close,
    Rescind,
    Release,
    Modify,
    Modified,
}

fn event() -> impl Strategy<Value = Event> {
    prop::sample::select(vec![
        Event::Open,
        Event::Open,
        Event::Result {
            stale: false,
            status: 0,
        },
        Event::Result {
            stale: false,
            status: 0,
        },
        Event::Result {
            stale: false,
            status: 1,
        },
        Event::Result {
            stale: true,
            status: 0,
        },
        Event::OpenTimedOut,
        Event::Close,
        Event::Rescind,
        Event::Release,
        Event::Modify,
        Event::Modified,
    ])
}

#[derive(Clone, Copy, Debug)]
enum GpadlEvent {
    Start,
    NotPosted,
    Created(u32),
    Teardown,
    Torndown,
    TimedOut,
    LetGo,
}

proptest! {
    /// In any order of events: a result opens only the request that waits, nothing is opened
    /// after a rescind, and the id is released at most once, when the channel is closed.
    #[test]
    fn any_order_of_channel_events(events in prop::collection::vec(event(), 0..80)) {
        let mut channel = Channel::new(ID);
        let mut waiting = None;
        let mut closes_due = 0u32;
        let mut releases = 0;
        let mut rescinded = false;
        for event in events {
            match event {
                Event::Open => {
                    if let Ok(message) = channel.open(GpadlId::FIRST, VpIndex::BOOT, 2, &[]) {
                        prop_assert!(!rescinded && waiting.is_none());
                        waiting = Some(message.open_id);
                    }
                }
                Event::Result { stale, status } => {
                    let id = waiting.map_or(5, OpenId::get) ^ (u32::from(stale) << 20);
                    let got = channel.open_result(&result(OpenId::new(id), status));
                    prop_assert_eq!(got.is_ok(), waiting.is_some() && !stale);
                    if got.is_ok() {
                        waiting = None;
                        closes_due += u32::from(status == 0);
                    }
                }
                Event::OpenTimedOut => {
                    let close = channel.open_timed_out();
                    prop_assert_eq!(close.is_some(), waiting.take().is_some());
                }
                Event::Close => {
                    if channel.close().is_some() {
                        prop_assert!(!rescinded);
                        closes_due -= 1;
                    }
                }
                Event::Rescind => {
                    prop_assert_eq!(channel.rescind(&RESCIND).is_ok(), !rescinded);
                    rescinded = true;
                    waiting = None;
                }
                Event::Release => {
                    if channel.release().is_some() {
                        prop_assert!(rescinded);
                        prop_assert_eq!(channel.state(), ChannelState::Closed);
                        releases += 1;
                    }
                }
                Event::Modify => {
                    let open = channel.is_usable();
                    if channel.modify(VpIndex::BOOT, Version::V5_3).is_ok() {
                        prop_assert!(open);
                    }
                }
                Event::Modified => {
                    let response =
                        ModifyChannelResponse { channel_id: ID, status: U32::ZERO };
                    if channel.modify_response(&response).is_ok() {
                        prop_assert!(channel.is_usable());
                    }
                }
            }
            prop_assert!(releases <= 1 && closes_due <= 1);
            prop_assert_eq!(
                matches!(channel.state(), ChannelState::Opening(_)),
                waiting.is_some()
            );
            if channel.is_usable() {
                prop_assert!(!rescinded && closes_due == 1);
            }
        }
    }

    /// In any order of events, memory of which the host may hold on is never free.
    #[test]
    fn any_order_of_gpadl_events(
        events in prop::collection::vec(
            prop::sample::select(vec![
                GpadlEvent::Start,
                GpadlEvent::NotPosted,
                GpadlEvent::Created(0),
                GpadlEvent::Created(1),
                GpadlEvent::Teardown,
                GpadlEvent::Torndown,
                GpadlEvent::TimedOut,
                GpadlEvent::LetGo,
            ]),
            0..30,
        ),
    ) {
        let mut gpadl = Gpadl::new(ID, GpadlId::FIRST);
        let mut held = false;
        for event in events {
            match event {
                GpadlEvent::Start => held |= gpadl.start(),
                GpadlEvent::NotPosted => {
                    held &= gpadl.state() != GpadlState::Creating;
                    gpadl.not_posted();
                }
                GpadlEvent::Created(status) => {
                    if let Ok(Outcome::Refused(_)) = gpadl.created(&created(status)) {
                        held = false;
                    }
                }
                GpadlEvent::Teardown => {
                    let sent = gpadl.teardown().is_some();
                    prop_assert!(held || !sent);
                }
                GpadlEvent::Torndown => {
                    if gpadl.torndown(&TORNDOWN).is_ok() {
                        held = false;
                    }
                }
                GpadlEvent::TimedOut => gpadl.teardown_timed_out(),
                GpadlEvent::LetGo => {
                    gpadl.host_let_go();
                    held = false;
                }
            }
            prop_assert_eq!(gpadl.may_free(), !held);
        }
    }

    /// No order of events of the connection makes it panic or try for ever.
    #[test]
    fn any_order_of_contact_events(events in prop::collection::vec(0u8..8, 0..60), vtl: u8) {
        let mut guest = Connection::new();
        let params = ContactParams { vtl, ..params(Version::NEWEST) };
        for event in events {
            let response = |supported, id| VersionResponse {
                version_supported: supported,
                message_connection_id: ConnectionId::new(id),
                ..FromZeros::new_zeroed()
            };
            let before = guest.version();
            match event {
                0 => drop(guest.start(&params)),
                1 => drop(guest.post_failed(HvStatus::INVALID_CONNECTION_ID)),
                2 => drop(guest.post_failed(HvStatus::INSUFFICIENT_BUFFERS)),
                3 => drop(guest.version_response(&response(0, 0))),
                4 => drop(guest.version_response(&response(1, 4))),
                5 => drop(guest.unload()),
                6 => drop(guest.unload_response()),
                _ => guest.unload_timed_out(),
            }
            // Only an answer makes a connection, and only its end ends it.
            if guest.version() != before {
                prop_assert!(matches!(event, 4 | 6 | 7));
            }
        }
    }
}
