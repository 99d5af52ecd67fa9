// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the storage protocol: layouts, both handshakes against each other and against odd
//! peers, and the judgement of answers.

use super::host::HostState;
use super::*;
use crate::scsi::{AdditionalSense, Opcode, Sense, SenseKey};
use proptest::prelude::*;
use std::{vec, vec::Vec};

const GUEST: GuestConfig = GuestConfig {
    sub_channels: 3,
    fibre_channel: false,
};

const HOST: HostConfig = HostConfig {
    max_version: Version::V6_2,
    max_transfer_bytes: 0x4_0fff,
    max_sub_channels: 8,
    wwn: None,
};

const WWN: WwnPacket = WwnPacket {
    primary_active: 1,
    reserved: [0; 3],
    primary_port_wwn: [1; 8],
    primary_node_wwn: [2; 8],
    secondary_port_wwn: [3; 8],
    secondary_node_wwn: [4; 8],
};

const DISK: LunAddress = LunAddress {
    path: 0,
    target: 1,
    lun: 2,
};

/// Runs the handshake of `guest` with `host`; returns what the guest got, and all operations it
/// sent.
fn shake_hands(
    guest: GuestConfig,
    host: &mut HostHandshake,
) -> (Result<Negotiated, GuestError>, Vec<Operation>) {
    let mut guest = GuestHandshake::new(guest);
    let mut packet = guest.start();
    let mut sent = vec![];
    loop {
        sent.push(packet.operation);
        assert_eq!(packet.flags, REQUEST_COMPLETION);
        let answer = match host.on_packet(packet.as_bytes()).unwrap() {
            HostStep::Answer(answer) => answer,
            HostStep::CreateSubChannels(_) => VstorPacket::completion(Status::SUCCESS),
            other => panic!("{other:?}"),
        };
        match guest.on_completion(answer.as_bytes()) {
            Ok(GuestStep::Send(next)) => packet = next,
            Ok(GuestStep::Done(negotiated)) => return (Ok(negotiated), sent),
            Err(error) => return (Err(error), sent),
        }
    }
}

#[test]
fn guest_and_host_agree() {
    let mut host = HostHandshake::new(HOST);
    assert_eq!(host.version(), None);
    let (result, sent) = shake_hands(GUEST, &mut host);
    let expected = Negotiated {
        version: Version::V6_2,
        max_transfer_bytes: 0x4_0000,
        sub_channels: 3,
        wwn: None,
    };
    assert_eq!(result, Ok(expected));
    let operations = [
        Operation::BEGIN_INITIALIZATION,
        Operation::QUERY_PROTOCOL_VERSION,
        Operation::QUERY_PROPERTIES,
        Operation::END_INITIALIZATION,
        Operation::CREATE_SUB_CHANNELS,
    ];
    assert_eq!(sent, operations);
    assert!(host.is_ready());
    assert_eq!(host.version(), Some(Version::V6_2));
}

#[test]
fn older_host_gets_the_older_version() {
    let config = HostConfig {
        max_version: Version::V6_0,
        ..HOST
    };
    let (result, sent) = shake_hands(GUEST, &mut HostHandshake::new(config));
    assert_eq!(result.unwrap().version, Version::V6_0);
    assert_eq!(sent[1..3], [Operation::QUERY_PROTOCOL_VERSION; 2]);
}

#[test]
fn host_of_another_age_is_refused() {
    let config = HostConfig {
        max_version: Version::V5_1,
        ..HOST
    };
    let mut host = HostHandshake::new(config);
    let (result, _) = shake_hands(GUEST, &mut host);
    assert_eq!(result, Err(GuestError::NoCommonVersion));
    assert!(!host.is_ready());
}

#[test]
fn sub_channels_are_asked_for_only_when_both_want_them() {
    let none = HostConfig {
        max_sub_channels: 0,
        ..HOST
    };
    let (result, sent) = shake_hands(GUEST, &mut HostHandshake::new(none));
    assert_eq!(result.unwrap().sub_channels, 0);
    assert!(!sent.contains(&Operation::CREATE_SUB_CHANNELS));

    let single = GuestConfig {
        sub_channels: 0,
        ..GUEST
    };
    let (result, sent) = shake_hands(single, &mut HostHandshake::new(HOST));
    assert_eq!(result.unwrap().sub_channels, 0);
    assert!(!sent.contains(&Operation::CREATE_SUB_CHANNELS));

    let many = GuestConfig {
        sub_channels: 100,
        ..GUEST
    };
    let (result, _) = shake_hands(many, &mut HostHandshake::new(HOST));
    assert_eq!(result.unwrap().sub_channels, 8);
}

#[test]
fn fibre_channel_guest_learns_its_names() {
    let guest = GuestConfig {
        fibre_channel: true,
        ..GUEST
    };
    let host = HostConfig {
        wwn: Some(WWN),
        ..HOST
    };
    let (result, sent) = shake_hands(guest, &mut HostHandshake::new(host));
    let wwn = result.unwrap().wwn.unwrap();
    assert_eq!(wwn.port_name(), 0x0101_0101_0101_0101);
    assert_eq!(wwn.node_name(), 0x0202_0202_0202_0202);
    assert_eq!(sent[3], Operation::FCHBA_DATA);
    let secondary = WwnPacket {
        primary_active: 0,
        ..wwn
    };
    assert_eq!(secondary.port_name(), 0x0303_0303_0303_0303);
    assert_eq!(secondary.node_name(), 0x0404_0404_0404_0404);

    let (result, _) = shake_hands(guest, &mut HostHandshake::new(HOST));
    let refused = GuestError::Refused {
        operation: Operation::FCHBA_DATA,
        status: Status::NOT_SUPPORTED,
    };
    assert_eq!(result, Err(refused));
}

#[test]
fn guest_survives_an_odd_host() {
    let mut guest = GuestHandshake::new(GUEST);
    let success = VstorPacket::completion(Status::SUCCESS);
    assert_eq!(
        guest.on_completion(success.as_bytes()),
        Err(GuestError::NotWaiting)
    );

    guest.start();
    let short = Err(GuestError::TooShort(TooShort { len: 63 }));
    assert_eq!(guest.on_completion(&success.as_bytes()[..63]), short);
    // The handshake is over after an error, but it may begin anew.
    assert_eq!(
        guest.on_completion(success.as_bytes()),
        Err(GuestError::NotWaiting)
    );

    guest.start();
    let other = VstorPacket::notification(Operation::ENUMERATE_BUS);
    let unexpected = Err(GuestError::UnexpectedOperation(Operation::ENUMERATE_BUS));
    assert_eq!(guest.on_completion(other.as_bytes()), unexpected);

    guest.start();
    let failure = VstorPacket::completion(Status::UNSUCCESSFUL);
    let refused = GuestError::Refused {
        operation: Operation::BEGIN_INITIALIZATION,
        status: Status::UNSUCCESSFUL,
    };
    assert_eq!(guest.on_completion(failure.as_bytes()), Err(refused));

    // Success without properties.
    guest.start();
    assert!(guest.on_completion(success.as_bytes()).is_ok());
    assert!(guest.on_completion(success.as_bytes()).is_ok());
    let limit = Err(GuestError::TransferLimit(0));
    assert_eq!(guest.on_completion(success.as_bytes()), limit);
}

#[test]
fn guest_works_without_the_sub_channels_that_it_is_refused() {
    let mut host = HostHandshake::new(HOST);
    let mut guest = GuestHandshake::new(GUEST);
    let mut packet = guest.start();
    loop {
        let answer = match host.on_packet(packet.as_bytes()).unwrap() {
            HostStep::Answer(answer) => answer,
            HostStep::CreateSubChannels(3) => VstorPacket::completion(Status::UNSUCCESSFUL),
            other => panic!("{other:?}"),
        };
        match guest.on_completion(answer.as_bytes()).unwrap() {
            GuestStep::Send(next) => packet = next,
            GuestStep::Done(negotiated) => {
                assert_eq!(negotiated.sub_channels, 0);
                break;
            }
        }
    }
}

fn status(host: &mut HostHandshake, packet: &VstorPacket) -> Status {
    match host.on_packet(packet.as_bytes()).unwrap() {
        HostStep::Answer(answer) => {
            assert_eq!(answer.operation, Operation::COMPLETE_IO);
            answer.status
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn host_enforces_the_order() {
    let steps = [
        Operation::BEGIN_INITIALIZATION,
        Operation::QUERY_PROTOCOL_VERSION,
        Operation::QUERY_PROPERTIES,
        Operation::END_INITIALIZATION,
    ];
    let others = [
        Operation::EXECUTE_SRB,
        Operation::RESET_BUS,
        Operation::RESET_LUN,
        Operation::CREATE_SUB_CHANNELS,
    ];
    let request = |operation| {
        let mut packet = VstorPacket::request(operation);
        if operation == Operation::QUERY_PROTOCOL_VERSION {
            packet.set_body(&U16::new(Version::V6_2.raw()));
        }
        packet
    };
    let mut host = HostHandshake::new(HOST);
    for step in steps {
        for other in steps.iter().chain(&others).filter(|&&other| other != step) {
            let refused = status(&mut host, &request(*other));
            assert_eq!(
                refused,
                Status::INVALID_DEVICE_STATE,
                "{other:?} before {step:?}"
            );
        }
        assert_eq!(status(&mut host, &request(step)), Status::SUCCESS);
    }
    for step in steps {
        assert_eq!(
            status(&mut host, &request(step)),
            Status::INVALID_DEVICE_STATE
        );
    }
}

#[test]
fn host_tells_unknown_from_untimely() {
    let mut host = HostHandshake::new(HOST);
    for raw in [0, 1, 2, 11, 14, u32::MAX] {
        let packet = VstorPacket::request(Operation::new(raw));
        assert_eq!(status(&mut host, &packet), Status::INVALID_DEVICE_REQUEST);
    }
}

#[test]
fn host_refuses_unknown_versions() {
    let mut host = HostHandshake::new(HOST);
    let begin = VstorPacket::request(Operation::BEGIN_INITIALIZATION);
    assert_eq!(status(&mut host, &begin), Status::SUCCESS);
    let mut query = VstorPacket::request(Operation::QUERY_PROTOCOL_VERSION);
    for raw in [0, 0x0601, 0x0603, 0x0700, 0xffff] {
        query.set_body(&U16::new(raw));
        assert_eq!(status(&mut host, &query), Status::REVISION_MISMATCH);
        assert_eq!(host.version(), None);
    }
    for version in Version::NEWEST_FIRST {
        let mut host = host;
        query.set_body(&U16::new(version.raw()));
        assert_eq!(status(&mut host, &query), Status::SUCCESS);
        assert_eq!(host.version(), Some(version));
    }
}

fn ready_host(version: Version) -> HostHandshake {
    let mut host = HostHandshake::new(HOST);
    host.state = HostState::Ready {
        version,
        has_sub_channels: false,
    };
    host
}

#[test]
fn host_limits_sub_channels() {
    let request = |count: u16| {
        let mut packet = VstorPacket::request(Operation::CREATE_SUB_CHANNELS);
        packet.set_body(&U16::new(count));
        packet
    };
    let mut host = ready_host(Version::V6_0);
    assert_eq!(status(&mut host, &request(9)), Status::INVALID_PARAMETER);
    let step = host.on_packet(request(8).as_bytes());
    assert_eq!(step, Ok(HostStep::CreateSubChannels(8)));
    assert_eq!(status(&mut host, &request(1)), Status::INVALID_DEVICE_STATE);

    let mut host = ready_host(Version::V4_2);
    assert_eq!(status(&mut host, &request(1)), Status::NOT_SUPPORTED);
}

#[test]
fn host_sorts_requests() {
    let mut host = ready_host(Version::V6_2);
    let cdb = [0x28, 0, 0, 0, 0, 1, 0, 0, 8, 0];
    let request = ScsiRequest::new(DISK, &cdb, DataIn::READ, 4096).unwrap();
    let step = host
        .on_packet(VstorPacket::execute(&request).as_bytes())
        .unwrap();
    assert_eq!(step, HostStep::Execute(request));

    for operation in [
        Operation::RESET_BUS,
        Operation::RESET_ADAPTER,
        Operation::RESET_LUN,
    ] {
        let mut packet = VstorPacket::request(operation);
        packet.set_body(&request);
        let step = host.on_packet(packet.as_bytes());
        assert_eq!(step, Ok(HostStep::Reset(operation, DISK)));
    }
}

#[test]
fn size_of_packets_depends_on_the_version() {
    let packet = VstorPacket::request(Operation::EXECUTE_SRB);
    assert_eq!(packet.bytes(Version::V4_2).len(), 48);
    assert_eq!(packet.bytes(Version::V6_2).len(), 64);

    let too_short = |len| Err(TooShort { len });
    let mut host = ready_host(Version::V6_2);
    assert_eq!(host.on_packet(&packet.as_bytes()[..63]), too_short(63));
    let mut host = ready_host(Version::V2_0);
    assert_eq!(host.on_packet(&packet.as_bytes()[..47]), too_short(47));
    assert!(host.on_packet(&packet.as_bytes()[..48]).is_ok());
    assert_eq!(VstorPacket::parse(&[], 0), Err(TooShort { len: 0 }));
    // Bytes that follow do not matter.
    let longer = [packet.as_bytes(), &[1; 8]].concat();
    assert_eq!(VstorPacket::parse(&longer, PACKET_SIZE), Ok(packet));

    assert_eq!(VstorPacket::operation_of(&[1, 0, 0]), None);
    let unasked = VstorPacket::notification(Operation::ENUMERATE_BUS);
    let operation = VstorPacket::operation_of(&unasked.as_bytes()[..4]);
    assert_eq!(operation, Some(Operation::ENUMERATE_BUS));
}

#[test]
fn scsi_request_has_the_layout_of_the_wire() {
    let cdb = [0x2a, 0, 1, 2, 3, 4, 0, 5, 6, 0];
    let mut request = ScsiRequest::new(DISK, &cdb, DataIn::WRITE, 0x1234).unwrap();
    request.set_simple_tag();
    request.time_out_value = 60.into();
    let expected = [
        3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, // operation, flags, status
        52, 0, 0, 0, 0, 0, 1, 2, // length, status, address
        10, 20, 0, 0, 0x34, 0x12, 0, 0, // lengths, direction
        0x2a, 0, 1, 2, 3, 4, 0, 5, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // command block
        0, 0, 0xff, 0x20, 0x8a, 1, 0, 0, // tag, flags
        60, 0, 0, 0, 0, 0, 0, 0, // time, sort key
    ];
    assert_eq!(VstorPacket::execute(&request).as_bytes(), expected);
    assert_eq!(request.cdb(), Some(&cdb[..]));
    assert_eq!(request.address(), DISK);
    assert!(request
        .flags()
        .contains(SrbFlags::DATA_OUT | SrbFlags::QUEUE_ACTION_ENABLE));
}

#[test]
fn command_blocks_of_impossible_length() {
    assert_eq!(ScsiRequest::new(DISK, &[], DataIn::NONE, 0), None);
    assert_eq!(ScsiRequest::new(DISK, &[0; 17], DataIn::NONE, 0), None);
    let mut request = ScsiRequest::new(DISK, &[0; 16], DataIn::NONE, 0).unwrap();
    assert_eq!(request.cdb().unwrap().len(), 16);
    for len in [0, 17, 20, 255] {
        request.cdb_length = len;
        assert_eq!(request.cdb(), None);
    }
}

#[test]
fn answers_carry_what_the_host_says() {
    let mut answer = ScsiRequest::new(DISK, &[0; 6], DataIn::NONE, 0).unwrap();
    answer.set_check_condition(&[9; 30], 5);
    assert_eq!(answer.srb_status.code(), SrbCode::ERROR);
    assert_eq!(answer.scsi_status, ScsiStatus::CHECK_CONDITION);
    assert_eq!(answer.sense(), [9; SENSE_SIZE]);
    assert_eq!(answer.data_transfer_length, 5);
    answer.sense_info_length = 255;
    assert_eq!(answer.sense().len(), SENSE_SIZE);
    answer.set_answer(SrbCode::SUCCESS, ScsiStatus::GOOD, 7);
    assert_eq!(answer.srb_status.raw(), 1);
    assert!(answer.sense().is_empty());
    // Sense data that the host does not declare is not there.
    answer.sense_info_length = 18;
    assert!(answer.sense().is_empty());
}

#[test]
fn versions_are_ordered_and_named() {
    use std::string::ToString;
    assert!(Version::NEWEST_FIRST.is_sorted_by(|a, b| a > b));
    assert_eq!(Version::V6_2.to_string(), "6.2");
    for version in Version::NEWEST_FIRST {
        assert_eq!(Version::from_raw(version.raw()), Some(version));
    }
    assert_eq!(Version::from_raw(0x0601), None);
}

/// An answer to a command with 4096 bytes of data.
fn answer(
    srb: SrbStatus,
    status: ScsiStatus,
    transferred: u32,
    sense: Option<Sense>,
) -> ScsiRequest {
    let mut answer = ScsiRequest::new(DISK, &[0; 10], DataIn::READ, 4096).unwrap();
    answer.set_answer(SrbCode::PENDING, status, transferred);
    answer.srb_status = srb;
    if let Some(sense) = sense {
        answer.srb_status = srb.with_autosense();
        answer.sense_info_length = 18;
        answer.cdb_or_sense[..18].copy_from_slice(&sense.to_fixed());
    }
    answer
}

fn judge_read(srb: SrbCode, status: ScsiStatus, transferred: u32, sense: Option<Sense>) -> Verdict {
    judge_command(Opcode::READ_10, srb, status, transferred, sense)
}

fn judge_command(
    opcode: Opcode,
    srb: SrbCode,
    status: ScsiStatus,
    transferred: u32,
    sense: Option<Sense>,
) -> Verdict {
    let sent = SentCommand {
        opcode,
        data_length: 4096,
        min_transfer: 0,
    };
    judge(
        &sent,
        &answer(SrbStatus::new(srb), status, transferred, sense),
    )
}

const GOOD: Action = Action::Finish(ScsiStatus::GOOD);
const CHECK: Action = Action::Finish(ScsiStatus::CHECK_CONDITION);
const MEDIUM_ERROR: Sense = Sense::new(
    SenseKey::MEDIUM_ERROR,
    AdditionalSense::UNRECOVERED_READ_ERROR,
);

#[test]
fn success_has_a_residual() {
    for (transferred, residual) in [(4096, 0), (512, 3584), (0, 4096), (5000, 0), (u32::MAX, 0)] {
        let verdict = judge_read(SrbCode::SUCCESS, ScsiStatus::GOOD, transferred, None);
        assert_eq!((verdict.action, verdict.residual), (GOOD, residual));
        assert!(verdict.sense().is_empty());
    }
}

#[test]
fn frozen_queue_does_not_spoil_success() {
    let sent = SentCommand {
        opcode: Opcode::READ_10,
        data_length: 4096,
        min_transfer: 4096,
    };
    let frozen = SrbStatus::from_raw(0x41);
    let verdict = judge(&sent, &answer(frozen, ScsiStatus::GOOD, 4096, None));
    assert_eq!((verdict.action, verdict.residual), (GOOD, 0));
}

#[test]
fn too_little_data_is_a_failure() {
    let sent = SentCommand {
        opcode: Opcode::READ_10,
        data_length: 4096,
        min_transfer: 4096,
    };
    let success = SrbStatus::new(SrbCode::SUCCESS);
    let verdict = judge(&sent, &answer(success, ScsiStatus::GOOD, 4095, None));
    assert_eq!(verdict.action, Action::Fail);
}

#[test]
fn overrun_is_fine_except_for_blocks() {
    let overrun = SrbCode::DATA_OVERRUN;
    let verdict = judge_read(overrun, ScsiStatus::GOOD, 512, None);
    assert_eq!((verdict.action, verdict.residual), (Action::Fail, 3584));
    let verdict = judge_command(Opcode::INQUIRY, overrun, ScsiStatus::GOOD, 36, None);
    assert_eq!((verdict.action, verdict.residual), (GOOD, 4060));
}

#[test]
fn sense_data_is_passed_on() {
    let status = ScsiStatus::CHECK_CONDITION;
    let verdict = judge_read(SrbCode::ERROR, status, 4096, Some(MEDIUM_ERROR));
    // The host leaves the length alone when a command fails, so nothing counts as transferred.
    assert_eq!((verdict.action, verdict.residual), (CHECK, 4096));
    assert_eq!(verdict.sense(), MEDIUM_ERROR.to_fixed());

    let recovered = Sense::new(SenseKey::RECOVERED_ERROR, AdditionalSense::NONE);
    let verdict = judge_read(SrbCode::ERROR, status, 4096, Some(recovered));
    assert_eq!((verdict.action, verdict.residual), (CHECK, 0));
    let verdict = judge_read(SrbCode::SUCCESS, status, 4096, Some(MEDIUM_ERROR));
    assert_eq!(verdict.action, CHECK);
}

#[test]
fn error_with_good_status_is_no_success() {
    let verdict = judge_read(SrbCode::ERROR, ScsiStatus::GOOD, 4096, Some(MEDIUM_ERROR));
    assert_eq!(verdict.action, CHECK);
    assert_eq!(verdict.sense(), MEDIUM_ERROR.to_fixed());
    let codes = (0..64).map(SrbCode::new);
    for code in codes.filter(|code| !matches!(*code, SrbCode::SUCCESS | SrbCode::DATA_OVERRUN)) {
        for opcode in (0..=255).map(Opcode::new) {
            let verdict = judge_command(opcode, code, ScsiStatus::GOOD, 4096, None);
            assert_ne!(verdict.action, GOOD, "{opcode:?} {code:?}");
            assert_eq!(verdict.residual, 4096);
        }
    }
}

#[test]
fn success_with_sense_data_is_success() {
    let verdict = judge_read(SrbCode::SUCCESS, ScsiStatus::GOOD, 4096, Some(MEDIUM_ERROR));
    assert_eq!((verdict.action, verdict.residual), (GOOD, 0));
    assert!(verdict.sense().is_empty());
}

#[test]
fn sense_data_that_is_not_there_does_not_count() {
    let check = ScsiStatus::CHECK_CONDITION;
    let changed = Sense::unit_attention(AdditionalSense::CAPACITY_CHANGED);
    let sent = SentCommand {
        opcode: Opcode::READ_10,
        data_length: 4096,
        min_transfer: 0,
    };
    let full = answer(SrbStatus::new(SrbCode::ERROR), check, 0, Some(changed));
    assert_eq!(judge(&sent, &full).action, Action::RescanAndRequeue);

    let mut undeclared = full;
    undeclared.srb_status = SrbStatus::new(SrbCode::ERROR);
    let mut empty = full;
    empty.sense_info_length = 0;
    let mut malformed = full;
    malformed.cdb_or_sense[0] = 0x12;
    for odd in [undeclared, empty, malformed] {
        let verdict = judge(&sent, &odd);
        assert_eq!(verdict.action, Action::Fail);
        assert!(verdict.sense().is_empty());
    }
    // Codes that the length cuts off are not those that follow in memory.
    let mut cut = full;
    cut.sense_info_length = 8;
    assert_eq!(judge(&sent, &cut).action, CHECK);
}

#[test]
fn changed_units_are_looked_at_anew() {
    let action =
        |sense| judge_read(SrbCode::ERROR, ScsiStatus::CHECK_CONDITION, 0, Some(sense)).action;
    let attention = |asc, ascq| Sense::unit_attention(AdditionalSense::new(asc, ascq));
    assert_eq!(action(attention(0x2a, 0x09)), Action::RescanAndRequeue);
    assert_eq!(action(attention(0x3f, 0x00)), Action::RescanAndRequeue);
    assert_eq!(action(attention(0x3f, 0x05)), Action::RescanAndRequeue);
    for (asc, ascq) in [(0x3f, 0x03), (0x3f, 0x0e), (0x2a, 0x01), (0x29, 0x00)] {
        assert_eq!(action(attention(asc, ascq)), CHECK);
    }
    // Only a unit attention says that something has changed, and only about this command.
    let changed = AdditionalSense::CAPACITY_CHANGED;
    assert_eq!(action(Sense::new(SenseKey::HARDWARE_ERROR, changed)), CHECK);
    let deferred = Sense {
        deferred: true,
        ..Sense::unit_attention(changed)
    };
    assert_eq!(action(deferred), CHECK);
}

#[test]
fn missing_units_are_removed() {
    let codes = [
        SrbCode::INVALID_LUN,
        SrbCode::INVALID_TARGET_ID,
        SrbCode::INVALID_PATH_ID,
        SrbCode::NO_DEVICE,
    ];
    for code in codes {
        let verdict = judge_command(Opcode::INQUIRY, code, ScsiStatus::GOOD, 4096, None);
        assert_eq!(
            (verdict.action, verdict.residual),
            (Action::RemoveLun, 4096)
        );
        let sense = Sense::illegal_request(AdditionalSense::LUN_NOT_SUPPORTED);
        let verdict = judge_read(code, ScsiStatus::CHECK_CONDITION, 0, Some(sense));
        assert_eq!(verdict.action, Action::RemoveLun);
    }
}

#[test]
fn status_of_the_device_decides_without_sense_data() {
    let statuses = [
        ScsiStatus::BUSY,
        ScsiStatus::TASK_SET_FULL,
        ScsiStatus::RESERVATION_CONFLICT,
    ];
    for status in statuses {
        for code in [SrbCode::SUCCESS, SrbCode::ERROR] {
            let verdict = judge_read(code, status, 4096, None);
            assert_eq!(
                (verdict.action, verdict.residual),
                (Action::Finish(status), 4096)
            );
        }
    }
    let verdict = judge_read(SrbCode::BUSY, ScsiStatus::GOOD, 0, None);
    assert_eq!(verdict.action, Action::Finish(ScsiStatus::BUSY));
    let verdict = judge_read(SrbCode::SUCCESS, ScsiStatus::new(0x77), 0, None);
    assert_eq!(verdict.action, Action::Fail);
}

#[test]
fn some_commands_have_failures_of_their_own() {
    let check = ScsiStatus::CHECK_CONDITION;
    let judge = |opcode, code, status| judge_command(opcode, code, status, 0, None);

    let ata = Opcode::ATA_PASS_THROUGH_16;
    assert_eq!(
        judge(ata, SrbCode::ERROR, check).action,
        Action::PassThrough(check)
    );
    assert_eq!(
        judge(ata, SrbCode::TIMEOUT, ScsiStatus::GOOD).action,
        Action::Fail
    );

    let ready = Opcode::TEST_UNIT_READY;
    assert_eq!(judge(ready, SrbCode::ERROR, check).action, CHECK);
    assert_eq!(
        judge(ready, SrbCode::ERROR, ScsiStatus::GOOD).action,
        Action::Fail
    );

    for opcode in [Opcode::INQUIRY, Opcode::MODE_SENSE_6, Opcode::MODE_SENSE_10] {
        let verdict = judge(opcode, SrbCode::ERROR, ScsiStatus::GOOD);
        assert_eq!((verdict.action, verdict.residual), (CHECK, 4096));
        let sense = Sense::parse(verdict.sense()).unwrap();
        assert_eq!(
            sense,
            Sense::illegal_request(AdditionalSense::INVALID_FIELD_IN_CDB)
        );
        // This is no answer to the question, so it may be asked again.
        assert_eq!(
            judge(opcode, SrbCode::ABORTED, ScsiStatus::GOOD).action,
            Action::Fail
        );
    }
}

fn any_operation() -> impl Strategy<Value = Operation> {
    prop_oneof![0u32..16, any::<u32>()].prop_map(Operation::new)
}

/// Packets of every operation, mostly long enough, often with a known version.
fn any_packet() -> impl Strategy<Value = Vec<u8>> {
    let version = prop_oneof![
        (0usize..5).prop_map(|at| Version::NEWEST_FIRST[at].raw()),
        any::<u16>()
    ];
    let rest = proptest::collection::vec(any::<u8>(), 50..60);
    let status = prop_oneof![3 => Just(0u32), 1 => any::<u32>()];
    let len = prop_oneof![3 => Just(64usize), 1 => 0usize..80];
    (any_operation(), status, version, rest, len).prop_map(
        |(operation, status, version, rest, len)| {
            let mut bytes = [
                operation.as_bytes(),
                &[0; 4],
                &status.to_le_bytes(),
                &version.to_le_bytes(),
            ]
            .concat();
            bytes.extend(rest);
            bytes.resize(len, 0);
            bytes
        },
    )
}

proptest! {
    #[test]
    fn any_guest_is_survived(packets in proptest::collection::vec(any_packet(), 0..40)) {
        let mut host = HostHandshake::new(HOST);
        let mut sub_channels = 0;
        for packet in packets {
            match host.on_packet(&packet) {
                Ok(HostStep::CreateSubChannels(count)) => {
                    prop_assert!(host.is_ready() && count <= HOST.max_sub_channels);
                    sub_channels += 1;
                }
                Ok(HostStep::Execute(request)) => {
                    prop_assert!(host.is_ready());
                    prop_assert!(request.cdb().is_none_or(|cdb| (1..=16).contains(&cdb.len())));
                }
                Ok(HostStep::Reset(..)) => prop_assert!(host.is_ready()),
                Ok(HostStep::Answer(answer)) => {
                    prop_assert_eq!(answer.operation, Operation::COMPLETE_IO);
                }
                Err(TooShort { len }) => prop_assert!(len < PACKET_SIZE),
            }
        }
        prop_assert!(sub_channels <= 1);
    }

    #[test]
    fn any_host_is_survived(
        packets in proptest::collection::vec(any_packet(), 10),
        complete in any::<bool>(),
        fibre_channel: bool,
    ) {
        let mut guest = GuestHandshake::new(GuestConfig { fibre_channel, ..GUEST });
        guest.start();
        let mut done = false;
        for mut packet in packets {
            if let (true, Some(operation)) = (complete, packet.get_mut(..4)) {
                operation.copy_from_slice(Operation::COMPLETE_IO.as_bytes());
            }
            match guest.on_completion(&packet) {
                Ok(GuestStep::Send(next)) => {
                    prop_assert!(!done);
                    prop_assert_eq!(next.flags.get(), REQUEST_COMPLETION);
                }
                Ok(GuestStep::Done(negotiated)) => {
                    prop_assert!(negotiated.sub_channels <= GUEST.sub_channels);
                    prop_assert!(negotiated.max_transfer_bytes >= 4096);
                    prop_assert_eq!(negotiated.max_transfer_bytes % 4096, 0);
                    prop_assert_eq!(negotiated.wwn.is_some(), fibre_channel);
                    done = true;
                }
                Err(_) => done = true,
            }
        }
        // 9 answers are the most that a handshake takes.
        prop_assert!(done);
    }

    #[test]
    fn any_answer_is_judged(
        body in proptest::array::uniform32(any::<u8>()),
        srb in prop_oneof![Just(1u8), Just(0x84), Just(4), any::<u8>()],
        status in prop_oneof![Just(0u8), Just(2), any::<u8>()],
        opcode: u8,
        data_length: u32,
        min_transfer: u32,
    ) {
        let mut bytes = [0; 52];
        bytes[..32].copy_from_slice(&body);
        let mut answer = ScsiRequest::read_from_bytes(&bytes).unwrap();
        answer.srb_status = SrbStatus::from_raw(srb);
        answer.scsi_status = ScsiStatus::new(status);
        let sent = SentCommand { opcode: Opcode::new(opcode), data_length, min_transfer };
        let verdict = judge(&sent, &answer);
        prop_assert!(verdict.residual <= data_length);
        prop_assert!(verdict.sense().len() <= SENSE_SIZE);
        if verdict.action == GOOD {
            let code = answer.srb_status.code();
            prop_assert!(matches!(code, SrbCode::SUCCESS | SrbCode::DATA_OVERRUN));
            prop_assert_eq!(answer.scsi_status, ScsiStatus::GOOD);
            prop_assert!(data_length - verdict.residual >= min_transfer);
        }
        if !verdict.sense().is_empty() {
            prop_assert_eq!(verdict.action, CHECK);
            prop_assert!(Sense::parse(verdict.sense()).is_some());
        }
    }
}
