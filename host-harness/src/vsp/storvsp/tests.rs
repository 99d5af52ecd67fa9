// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests of the storage provider, with a guest in memory: the real bus server and rings, the
//! guest's side of `hv_proto`, and images in a temporary folder.

use super::controller::MAX_IN_FLIGHT;
use super::*;
use crate::disk::{DiskOptions, Fault, FaultKind};
use crate::vmbus::test_guest::{FakeChannel, FakeGuest, NEVER, SOON};
use hv_proto::guid::{self, Guid};
use hv_proto::message::{CloseChannel, HostMessage, OfferChannel};
use hv_proto::packet::PacketType;
use hv_proto::scsi::{ScsiStatus, Sense, SenseKey};
use hv_proto::storage::{
    DataIn, GuestConfig, GuestHandshake, GuestStep, LunAddress, Negotiated, Operation, ScsiRequest,
    SrbCode, Status, Version, VstorPacket,
};
use hv_proto::version::Version as BusVersion;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

const MIB: u64 = 1 << 20;

/// Pages of each ring: room for thousands of commands without data.
const RING_PAGES: usize = 64;

/// A machine with storage, and a guest on its bus.
struct Rig {
    storage: Storage,
    guest: FakeGuest,
    dir: TempDir,
}

fn unit(lun: u8) -> LunAddress {
    LunAddress {
        path: 0,
        target: 0,
        lun,
    }
}

/// A packet for a command without data.
fn command(address: LunAddress, cdb: &[u8]) -> VstorPacket {
    VstorPacket::execute(&ScsiRequest::new(address, cdb, DataIn::NONE, 0).expect("request"))
}

const TEST_UNIT_READY: [u8; 6] = [0; 6];

fn read_10(lba: u32, count: u16) -> [u8; 10] {
    let [a, b, c, d] = lba.to_be_bytes();
    let [high, low] = count.to_be_bytes();
    [0x28, 0, a, b, c, d, 0, high, low, 0]
}

fn write_10(lba: u32, count: u16) -> [u8; 10] {
    let mut cdb = read_10(lba, count);
    cdb[0] = 0x2a;
    cdb
}

impl Rig {
    fn new(config: StorageConfig) -> Self {
        let guest = FakeGuest::connected(BusVersion::V5_3);
        let storage = Storage::new(config).expect("storage");
        storage.connect(&guest.server).expect("connect");
        Self {
            storage,
            guest,
            dir: TempDir::new().expect("folder"),
        }
    }

    /// One controller with a disk of 4 MiB.
    fn with_disk() -> Self {
        let rig = Self::new(StorageConfig::default());
        rig.add("first.img", 4 * MIB, "");
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a raw image and adds it.
    fn add(&self, name: &str, size: u64, options: &str) -> String {
        let path = self.path(name);
        File::create(&path)
            .and_then(|file| file.set_len(size))
            .expect("image");
        let options: DiskOptions = format!("path={}{options}", path.display())
            .parse()
            .expect("options");
        self.storage.add_disk(&options).expect("disk")
    }

    /// The offer of the one controller of a class.
    fn offer(&self, class: Guid) -> OfferChannel {
        let mut offers = self.guest.request_offers();
        offers.retain(|offer| offer.interface_id == class);
        assert_eq!(offers.len(), 1);
        offers[0]
    }

    /// Opens the SCSI controller and does the handshake without sub-channels.
    fn open(&mut self) -> FakeChannel {
        let offer = self.offer(guid::SCSI);
        let mut channel = self.guest.open(&offer, RING_PAGES, 1).expect("open");
        let agreed = handshake(&mut channel, 0);
        assert_eq!(agreed.version, Version::V6_2);
        assert_eq!(agreed.max_transfer_bytes, 512 << 10);
        channel
    }

    /// Runs a command with data in or out, `offset` bytes into the first page.
    fn transfer(
        &mut self,
        channel: &mut FakeChannel,
        address: LunAddress,
        cdb: &[u8],
        data_in: DataIn,
        (offset, bytes): (u32, &mut [u8]),
    ) -> ScsiRequest {
        let count = (offset as usize + bytes.len()).div_ceil(4096);
        let pages = self.guest.pages(count);
        let mem = Arc::clone(&self.guest.mem);
        let place = |at: usize| {
            let at = offset as usize + at;
            GuestAddress((pages[at / 4096] << 12) + at as u64 % 4096)
        };
        for (at, byte) in bytes.iter().enumerate() {
            mem.write_obj(*byte, place(at)).expect("guest memory");
        }
        let request = ScsiRequest::new(address, cdb, data_in, bytes.len() as u32).expect("request");
        let packet = VstorPacket::execute(&request);
        channel.send_gpa(77, (offset, bytes.len() as u32), &pages, packet.as_bytes());
        let answer = answer(&channel.completion(77));
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = mem.read_obj(place(at)).expect("guest memory");
        }
        answer
    }

    fn read(
        &mut self,
        channel: &mut FakeChannel,
        lun: u8,
        lba: u32,
        len: usize,
        offset: u32,
    ) -> (ScsiRequest, Vec<u8>) {
        let mut bytes = vec![0xee; len];
        let cdb = read_10(lba, (len / 512) as u16);
        let answer = self.transfer(channel, unit(lun), &cdb, DataIn::READ, (offset, &mut bytes));
        (answer, bytes)
    }

    fn write(&mut self, channel: &mut FakeChannel, lun: u8, lba: u32, bytes: &[u8], offset: u32) {
        let cdb = write_10(lba, (bytes.len() / 512) as u16);
        let mut bytes = bytes.to_vec();
        let len = bytes.len();
        let answer = self.transfer(
            channel,
            unit(lun),
            &cdb,
            DataIn::WRITE,
            (offset, &mut bytes),
        );
        assert_good(&answer, len);
    }

    fn controller(&self) -> ControllerStatus {
        self.storage.controllers().remove(0)
    }
}

fn handshake(channel: &mut FakeChannel, sub_channels: u16) -> Negotiated {
    let mut handshake = GuestHandshake::new(GuestConfig {
        sub_channels,
        fibre_channel: false,
    });
    let mut packet = handshake.start();
    loop {
        channel.send(1, packet.as_bytes());
        match handshake
            .on_completion(&channel.completion(1))
            .expect("handshake")
        {
            GuestStep::Send(next) => packet = next,
            GuestStep::Done(agreed) => return agreed,
        }
    }
}

/// The body of a completion of a SCSI command.
fn answer(payload: &[u8]) -> ScsiRequest {
    let packet = VstorPacket::parse(payload, 64).expect("completion");
    assert_eq!(packet.operation, Operation::COMPLETE_IO);
    let answer = packet.scsi_request();
    let good = answer.srb_status.code() == SrbCode::SUCCESS;
    assert_eq!(packet.status == Status::SUCCESS, good);
    answer
}

#[track_caller]
fn assert_good(answer: &ScsiRequest, transferred: usize) {
    assert_eq!(answer.srb_status.code(), SrbCode::SUCCESS);
    assert_eq!(answer.scsi_status, ScsiStatus::GOOD);
    assert_eq!(answer.data_transfer_length.get() as usize, transferred);
}

#[track_caller]
fn assert_sense(answer: &ScsiRequest, key: SenseKey, asc: u8, ascq: u8) {
    assert_eq!(answer.scsi_status, ScsiStatus::CHECK_CONDITION);
    assert_eq!(answer.srb_status.code(), SrbCode::ERROR);
    let sense = Sense::parse(answer.sense()).expect("sense");
    assert_eq!(
        (sense.key, sense.additional.asc, sense.additional.ascq),
        (key, asc, ascq)
    );
}

fn pattern(seed: u32, len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8)
        .collect()
}

#[test]
fn handshake_of_each_version() {
    let mut rig = Rig::with_disk();
    let offer = rig.offer(guid::SCSI);
    for raw in [0x0602u16, 0x0600] {
        let mut channel = rig.guest.open(&offer, 8, 0).expect("open");
        let mut ask = |packet: &VstorPacket| {
            channel.send(5, packet.as_bytes());
            VstorPacket::parse(&channel.completion(5), 64).expect("answer")
        };
        // Commands before the end of the handshake are refused.
        let early = ask(&command(unit(0), &TEST_UNIT_READY));
        assert_eq!(early.status, Status::INVALID_DEVICE_STATE);
        let begin = ask(&VstorPacket::request(Operation::BEGIN_INITIALIZATION));
        assert_eq!(begin.status, Status::SUCCESS);
        for (propose, status) in [
            (0x0909, Status::REVISION_MISMATCH),
            (0x0603, Status::REVISION_MISMATCH),
            (raw, Status::SUCCESS),
        ] {
            let mut version = VstorPacket::request(Operation::QUERY_PROTOCOL_VERSION);
            version.body[..2].copy_from_slice(&propose.to_le_bytes());
            assert_eq!(ask(&version).status, status);
        }
        let properties = ask(&VstorPacket::request(Operation::QUERY_PROPERTIES)).properties();
        assert_eq!(properties.max_transfer_bytes.get(), 512 << 10);
        assert_eq!(properties.max_channel_count.get(), 7);
        assert_eq!(properties.flags.get(), 1);
        let end = ask(&VstorPacket::request(Operation::END_INITIALIZATION));
        assert_eq!(end.status, Status::SUCCESS);
        assert_good(&ask(&command(unit(0), &TEST_UNIT_READY)).scsi_request(), 0);
        // Closing forgets the handshake.
        rig.guest.close(channel);
        assert_eq!(rig.controller().version, None);
    }
}

#[test]
fn data_of_any_alignment_reaches_the_image() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    let mut expected = vec![0; 4 * MIB as usize];
    for (n, (lba, len, offset)) in [
        (0, 512, 0),
        (3, 512, 4095),
        (7, 4096, 1),
        (100, 65536, 513),
        (1000, 512 << 10, 0),
        (3000, (512 << 10) - 512, 3584),
    ]
    .into_iter()
    .enumerate()
    {
        let bytes = pattern(n as u32, len);
        rig.write(&mut channel, 0, lba, &bytes, offset);
        expected[lba as usize * 512..][..len].copy_from_slice(&bytes);
        let (answer, read) = rig.read(&mut channel, 0, lba, len, 4096 - 1 - offset);
        assert_good(&answer, len);
        assert!(read == bytes);
    }
    channel.send(
        3,
        command(unit(0), &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0]).as_bytes(),
    );
    assert_good(&answer(&channel.completion(3)), 0);
    assert!(std::fs::read(rig.path("first.img")).expect("image") == expected);
    let disk = rig.storage.disks().remove(0);
    assert_eq!(disk.counters.flushes, 1);
    assert!(disk.counters.written_bytes > MIB);
}

#[test]
fn what_is_not_there_says_so() {
    let mut rig = Rig::with_disk();
    rig.add("far.img", MIB, ",channel=3,target=1,lun=9");
    let mut channel = rig.open();
    let mut ask = |address, cdb: &[u8], len| {
        let mut bytes = vec![0; len];
        let answer = rig.transfer(&mut channel, address, cdb, DataIn::READ, (0, &mut bytes));
        bytes.truncate(answer.data_transfer_length.get() as usize);
        (answer, bytes)
    };
    let far = LunAddress {
        path: 3,
        target: 1,
        lun: 9,
    };
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    let (answer, data) = ask(unit(0), &inquiry, 36);
    assert_good(&answer, 36);
    assert_eq!(&data[8..12], b"Msft");
    assert_eq!(ask(far, &inquiry, 36).1[0], 0);
    // A unit that is not there is a success, with data that says it.
    let (answer, data) = ask(unit(1), &inquiry, 36);
    assert_good(&answer, 36);
    assert_eq!(data[0], 0x7f);
    let report = [0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    let (answer, data) = ask(LunAddress { lun: 0, ..far }, &report, 256);
    assert_good(&answer, 16);
    assert_eq!(data[..4], [0, 0, 0, 8]);
    assert_eq!(data[9], 9);
    assert_eq!(ask(LunAddress { path: 5, ..far }, &report, 256).1, [0; 8]);
    for (address, code) in [
        (unit(1), SrbCode::INVALID_LUN),
        (LunAddress { path: 8, ..far }, SrbCode::INVALID_TARGET_ID),
        (LunAddress { target: 2, ..far }, SrbCode::INVALID_TARGET_ID),
    ] {
        channel.send(4, command(address, &TEST_UNIT_READY).as_bytes());
        let answer = super::tests::answer(&channel.completion(4));
        assert_eq!(answer.srb_status.code(), code);
        assert_eq!(answer.data_transfer_length.get(), 0);
    }
}

#[test]
fn errors_carry_sense_data() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    rig.storage
        .set_faults(
            "disk0",
            vec![Fault {
                bytes: 5120..6144,
                kind: FaultKind::Read,
            }],
        )
        .expect("faults");
    let (answer, _) = rig.read(&mut channel, 0, 8, 4096, 0);
    assert_sense(&answer, SenseKey::MEDIUM_ERROR, 0x11, 0);
    assert_eq!(answer.data_transfer_length.get(), 0);
    let sense = Sense::parse(answer.sense()).expect("sense");
    assert_eq!(sense.information, Some(10));
    // Without room, or without a wish for it, there is none.
    for (room, flag) in [(0u8, 0u32), (20, 0x20)] {
        let mut request = ScsiRequest::new(unit(0), &[0xff], DataIn::NONE, 0).expect("request");
        request.sense_info_length = room;
        request.srb_flags = (request.srb_flags.get() | flag).into();
        channel.send(9, VstorPacket::execute(&request).as_bytes());
        let answer = super::tests::answer(&channel.completion(9));
        assert_eq!(answer.scsi_status, ScsiStatus::CHECK_CONDITION);
        assert!(!answer.srb_status.has_autosense());
        assert!(answer.sense().is_empty());
    }
    // A buffer that is too small is told by its own status, with what did fit.
    let mut bytes = [0; 512];
    let cdb = read_10(0, 2);
    let answer = rig.transfer(&mut channel, unit(0), &cdb, DataIn::READ, (0, &mut bytes));
    assert_eq!(answer.srb_status.code(), SrbCode::DATA_OVERRUN);
    assert_eq!(answer.data_transfer_length.get(), 512);
}

#[test]
fn a_guest_that_lies_is_refused() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    let pages = rig.guest.pages(300);
    let execute = |len: u32| {
        let request = ScsiRequest::new(unit(0), &read_10(0, 1), DataIn::READ, len);
        VstorPacket::execute(&request.expect("request"))
    };
    let invalid = |channel: &mut FakeChannel| {
        let answer = answer(&channel.completion(6));
        assert_eq!(answer.srb_status.code(), SrbCode::INVALID_REQUEST);
        assert_eq!(answer.data_transfer_length.get(), 0);
    };
    // More data than memory for it.
    channel.send_gpa(6, (0, 512), &pages[..1], execute(513).as_bytes());
    invalid(&mut channel);
    channel.send(6, execute(512).as_bytes());
    invalid(&mut channel);
    // More than the transfer limit.
    let len = (512 << 10) + 512;
    channel.send_gpa(6, (0, len), &pages[..129], execute(len).as_bytes());
    invalid(&mut channel);
    // Memory that is not there.
    channel.send_gpa(6, (0, 512), &[1 << 30], execute(512).as_bytes());
    invalid(&mut channel);
    // A command block of no or of impossible length.
    for length in [0, 17, 255] {
        let mut request = ScsiRequest::new(unit(0), &[0], DataIn::NONE, 0).expect("request");
        request.cdb_length = length;
        channel.send(6, VstorPacket::execute(&request).as_bytes());
        invalid(&mut channel);
    }
    // Less than a packet, and operations that are none.
    channel.send(6, &[3, 0, 0, 0, 1]);
    let status = |payload: &[u8]| VstorPacket::parse(payload, 64).expect("answer").status;
    assert_eq!(status(&channel.completion(6)), Status::INVALID_PARAMETER);
    channel.send(6, VstorPacket::request(Operation::new(99)).as_bytes());
    assert_eq!(
        status(&channel.completion(6)),
        Status::INVALID_DEVICE_REQUEST
    );
    // Without a wish for a completion there is none.
    let quiet = command(unit(0), &TEST_UNIT_READY);
    channel.try_send(6, quiet.as_bytes(), false).expect("send");
    assert!(channel.receive_within(NEVER).is_none());
    // And all of this did no harm.
    let (answer, _) = rig.read(&mut channel, 0, 0, 512, 0);
    assert_good(&answer, 512);
}

#[test]
fn disks_come_and_go() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    let notified = |channel: &mut FakeChannel, operation| {
        let packet = channel.receive();
        assert_eq!(packet.packet_type, PacketType::IN_BAND);
        assert_eq!(packet.transaction_id, 0);
        assert!(!packet.wants_completion);
        assert_eq!(VstorPacket::operation_of(&packet.payload), Some(operation));
    };
    let name = rig.add("second.img", MIB, ",id=second");
    assert_eq!(name, "second");
    notified(&mut channel, Operation::ENUMERATE_BUS);
    assert_eq!(rig.storage.disks()[1].address, (0, 0, 1));
    rig.write(&mut channel, 1, 5, &pattern(1, 1024), 0);
    rig.storage.remove_disk("second").expect("remove");
    notified(&mut channel, Operation::REMOVE_DEVICE);
    let (answer, _) = rig.read(&mut channel, 1, 5, 512, 0);
    assert_eq!(answer.srb_status.code(), SrbCode::INVALID_LUN);
    // The image is closed: it can be attached anew, with what was written.
    let options: DiskOptions = format!("path={},lun=3", rig.path("second.img").display())
        .parse()
        .expect("options");
    rig.storage.add_disk(&options).expect("disk");
    notified(&mut channel, Operation::ENUMERATE_BUS);
    let (answer, bytes) = rig.read(&mut channel, 3, 5, 1024, 0);
    assert_good(&answer, 1024);
    assert!(bytes == pattern(1, 1024));
    let error = rig
        .storage
        .add_disk(&options)
        .expect_err("address")
        .to_string();
    assert!(
        error.contains("scsi0 has a disk at channel 0, target 0, LUN 3"),
        "{error}"
    );
    assert!(rig.storage.remove_disk("second").is_err());
}

/// A controller with a command, number 10, that has begun and does not get on.
fn with_a_command_that_runs() -> (Rig, FakeChannel) {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    rig.storage.stall("scsi0", Stall::Running).expect("stall");
    channel.send(10, command(unit(0), &TEST_UNIT_READY).as_bytes());
    let deadline = Instant::now() + SOON;
    while rig.controller().counters.running == 0 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(NEVER);
    }
    (rig, channel)
}

#[test]
fn the_removal_of_a_disk_holds_up_nothing_else() {
    let (rig, _channel) = with_a_command_that_runs();
    let deadline = Instant::now() + SOON;
    std::thread::scope(|scope| {
        let removal = scope.spawn(|| rig.storage.remove_disk("disk0"));
        while !rig.storage.disks().is_empty() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(NEVER);
        }
        rig.add("second.img", MIB, "");
        assert!(!removal.is_finished());
        rig.storage.stall("scsi0", Stall::Off).expect("stall");
        removal.join().expect("thread").expect("remove");
    });
}

#[test]
fn a_resize_is_an_attention() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    rig.storage.resize_disk("disk0", 8 * MIB).expect("resize");
    let (answer, _) = rig.read(&mut channel, 0, 0, 512, 0);
    assert_sense(&answer, SenseKey::UNIT_ATTENTION, 0x2a, 9);
    let mut capacity = [0; 8];
    let cdb = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let answer = rig.transfer(
        &mut channel,
        unit(0),
        &cdb,
        DataIn::READ,
        (0, &mut capacity),
    );
    assert_good(&answer, 8);
    assert_eq!(capacity[..4], (8 * 2048u32 - 1).to_be_bytes());
    rig.write(&mut channel, 0, 8 * 2048 - 1, &[1; 512], 0);
    let error = rig.storage.resize_disk("disk0", 1000).expect_err("size");
    assert!(error.to_string().contains("disk0"), "{error}");
}

#[test]
fn sub_channels_carry_commands_only() {
    let mut rig = Rig::with_disk();
    let offer = rig.offer(guid::SCSI);
    let mut primary = rig.guest.open(&offer, 16, 0).expect("open");
    let agreed = handshake(&mut primary, 3);
    assert_eq!(agreed.sub_channels, 3);
    let offers: Vec<_> = (0..3).map(|_| rig.guest.expect_offer()).collect();
    let mut subs = Vec::new();
    for (offer, index) in offers.iter().zip(1..) {
        assert_eq!(offer.sub_channel_index.get(), index);
        subs.push(rig.guest.open(offer, 16, index.into()).expect("open"));
    }
    for (n, channel) in subs.iter_mut().enumerate() {
        let bytes = pattern(n as u32, 2048);
        rig.write(channel, 0, 4 * n as u32, &bytes, 100);
        let (_, read) = rig.read(&mut primary, 0, 4 * n as u32, 2048, 0);
        assert!(read == bytes);
        for operation in [
            Operation::BEGIN_INITIALIZATION,
            Operation::QUERY_PROPERTIES,
            Operation::CREATE_SUB_CHANNELS,
        ] {
            channel.send(8, VstorPacket::request(operation).as_bytes());
            let answer = VstorPacket::parse(&channel.completion(8), 64).expect("answer");
            assert_eq!(answer.status, Status::INVALID_DEVICE_STATE);
        }
    }
    assert_eq!(rig.controller().counters.channels, 4);
}

#[test]
fn a_stalled_controller_can_be_reset() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    rig.storage.stall("scsi0", Stall::Commands).expect("stall");
    for id in 10..15 {
        channel.send(id, command(unit(0), &TEST_UNIT_READY).as_bytes());
    }
    assert!(channel.receive_within(NEVER).is_none());
    channel.send(20, VstorPacket::request(Operation::RESET_BUS).as_bytes());
    for id in 10..15 {
        let answer = answer(&channel.completion(id));
        assert_eq!(answer.srb_status.code(), SrbCode::BUS_RESET);
    }
    let done = VstorPacket::parse(&channel.completion(20), 64).expect("answer");
    assert_eq!(done.status, Status::SUCCESS);
    rig.storage.stall("scsi0", Stall::Off).expect("stall");
    let (answer, _) = rig.read(&mut channel, 0, 0, 512, 0);
    assert_sense(&answer, SenseKey::UNIT_ATTENTION, 0x29, 0);
    let (answer, _) = rig.read(&mut channel, 0, 0, 512, 0);
    assert_good(&answer, 512);

    // A reset of one unit leaves the others alone.
    rig.storage.stall("scsi0", Stall::Commands).expect("stall");
    channel.send(30, command(unit(0), &TEST_UNIT_READY).as_bytes());
    channel.send(31, command(unit(1), &TEST_UNIT_READY).as_bytes());
    let mut reset = command(unit(1), &TEST_UNIT_READY);
    reset.operation = Operation::RESET_LUN;
    channel.send(32, reset.as_bytes());
    assert_eq!(
        super::tests::answer(&channel.completion(31))
            .srb_status
            .code(),
        SrbCode::BUS_RESET
    );
    channel.completion(32);
    assert!(channel.receive_within(NEVER).is_none());

    // A dead host answers nothing at all.
    rig.storage
        .stall("scsi0", Stall::Everything)
        .expect("stall");
    channel.send(40, VstorPacket::request(Operation::RESET_BUS).as_bytes());
    channel.wait_idle();
    assert!(channel.receive_within(NEVER).is_none());
    rig.storage.stall("scsi0", Stall::Off).expect("stall");
    assert_good(&super::tests::answer(&channel.completion(30)), 0);
    assert_eq!(rig.controller().counters.resets, 2);
}

#[test]
fn a_close_waits_for_a_command_that_runs() {
    let (rig, mut channel) = with_a_command_that_runs();
    // A reset waits, and so do the end of the channel and the answer to the taking back of its memory.
    channel.send(20, VstorPacket::request(Operation::RESET_BUS).as_bytes());
    assert!(channel.receive_within(NEVER).is_none());
    rig.guest.post(&CloseChannel {
        channel_id: channel.id,
    });
    std::thread::scope(|scope| {
        let torn = scope.spawn(|| rig.guest.teardown_gpadl(channel.id, channel.gpadl));
        std::thread::sleep(NEVER);
        assert!(!torn.is_finished());
        assert_eq!(rig.controller().counters.running, 1);
        rig.storage.stall("scsi0", Stall::Off).expect("stall");
        torn.join().expect("the memory comes back");
    });
    assert_eq!(rig.controller().counters.running, 0);
}

#[test]
fn what_the_host_holds_is_bounded_and_a_close_drops_it() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    rig.storage.stall("scsi0", Stall::Commands).expect("stall");
    let sent = MAX_IN_FLIGHT as u64 + 100;
    let packet = command(unit(0), &TEST_UNIT_READY);
    for id in 1..=sent {
        channel.send(id, packet.as_bytes());
    }
    let deadline = Instant::now() + SOON;
    while rig.controller().counters.in_flight < MAX_IN_FLIGHT {
        assert!(Instant::now() < deadline);
        std::thread::sleep(NEVER);
    }
    std::thread::sleep(NEVER);
    assert_eq!(rig.controller().counters.in_flight, MAX_IN_FLIGHT);
    // Let go, all are answered, each once.
    rig.storage.stall("scsi0", Stall::Off).expect("stall");
    let mut seen = BTreeMap::new();
    for _ in 0..sent {
        let packet = channel.receive();
        assert_eq!(packet.packet_type, PacketType::COMPLETION);
        *seen.entry(packet.transaction_id).or_insert(0) += 1;
    }
    assert!(seen.values().all(|&n| n == 1));
    assert_eq!(seen.len() as u64, sent);
    assert!(channel.receive_within(NEVER).is_none());

    // Stalled again, a close does not wait for what will never run.
    rig.storage.stall("scsi0", Stall::Commands).expect("stall");
    for id in 1..=sent {
        channel.send(id, packet.as_bytes());
    }
    let offer = channel.offer;
    rig.guest.close(channel);
    assert_eq!(rig.controller().counters.in_flight, 0);
    assert_eq!(rig.controller().counters.channels, 0);
    rig.storage.stall("scsi0", Stall::Off).expect("stall");
    let mut channel = rig.guest.open(&offer, 8, 0).expect("open again");
    handshake(&mut channel, 0);
    let (answer, _) = rig.read(&mut channel, 0, 0, 512, 0);
    assert_good(&answer, 512);
}

/// Tells the host that a channel is to be closed, and takes its memory back; the rings can be read
/// afterwards as the host left them.
fn close(guest: &FakeGuest, channel: &FakeChannel) {
    guest.post(&CloseChannel {
        channel_id: channel.id,
    });
    guest.teardown_gpadl(channel.id, channel.gpadl);
}

#[test]
fn a_close_answers_what_is_queued_and_lets_go_of_memory() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    let data = rig.guest.pages(20);
    let read = |count| {
        let request = ScsiRequest::new(unit(0), &read_10(0, count), DataIn::READ, 4096);
        VstorPacket::execute(&request.expect("request"))
    };
    // One that runs when the close comes, and more than the host reads from the ring.
    rig.storage
        .set_latency("disk0", Duration::from_millis(300))
        .expect("latency");
    channel.send_gpa(1, (0, 4096), &data[..1], read(8).as_bytes());
    // A worker has it: the others find the controller stalled.
    let deadline = Instant::now() + SOON;
    while rig.controller().counters.running == 0 {
        assert!(Instant::now() < deadline);
    }
    rig.storage.stall("scsi0", Stall::Commands).expect("stall");
    for (&page, id) in data[1..].iter().zip(2..) {
        channel.send_gpa(id, (0, 4096), &[page], read(8).as_bytes());
    }
    while rig.controller().counters.commands < data.len() as u64 {
        assert!(Instant::now() < deadline);
    }
    close(&rig.guest, &channel);

    let mut ended = BTreeMap::new();
    while let Some(packet) = channel.take() {
        let before = ended.insert(packet.transaction_id, answer(&packet.payload));
        assert!(before.is_none(), "answered twice");
    }
    assert!(ended.keys().copied().eq(1..=data.len() as u64));
    for (id, answer) in ended {
        if id == 1 {
            assert_good(&answer, 4096);
        } else {
            assert_eq!(answer.srb_status.code(), SrbCode::ABORTED);
            assert_eq!(answer.data_transfer_length.get(), 0);
        }
    }

    // The memory is the guest's again, whatever the host does next.
    let mem = Arc::clone(&rig.guest.mem);
    let all = || data.iter().chain(&channel.pages);
    for &page in all() {
        mem.write_slice(&[0xa5; 4096], GuestAddress(page << 12))
            .expect("guest memory");
    }
    rig.storage.stall("scsi0", Stall::Off).expect("stall");
    rig.storage
        .set_latency("disk0", Duration::ZERO)
        .expect("latency");
    let mut other = rig.guest.open(&channel.offer, 8, 1).expect("open");
    handshake(&mut other, 0);
    rig.write(&mut other, 0, 0, &[1; 4096], 0);
    rig.add("new.img", MIB, "");
    std::thread::sleep(NEVER);
    for &page in all() {
        let mut bytes = [0; 4096];
        mem.read_slice(&mut bytes, GuestAddress(page << 12))
            .expect("guest memory");
        assert!(bytes == [0xa5; 4096], "the host wrote to page {page:#x}");
    }
}

#[test]
fn a_dead_host_lets_go_of_memory_without_a_word() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    rig.storage
        .stall("scsi0", Stall::Everything)
        .expect("stall");
    for id in 1..10 {
        channel.send(id, command(unit(0), &TEST_UNIT_READY).as_bytes());
    }
    close(&rig.guest, &channel);
    assert!(channel.take().is_none());
    assert_eq!(rig.controller().counters.in_flight, 0);
}

#[test]
fn forged_answers_come_before_the_true_one() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    rig.storage.forge_answers("scsi0", 1).expect("forge");
    for id in [60, 61] {
        channel.send(id, command(unit(0), &TEST_UNIT_READY).as_bytes());
    }
    for _ in 0..FORGED_PACKETS {
        let packet = channel.receive();
        let is_answer = packet.packet_type == PacketType::COMPLETION;
        assert_ne!((is_answer, packet.transaction_id), (true, 60));
        assert_good(&answer(&packet.payload), 0);
    }
    let mut ids = [channel.receive(), channel.receive()].map(|packet| packet.transaction_id);
    ids.sort_unstable();
    assert_eq!(ids, [60, 61]);
    assert!(channel.receive_within(NEVER).is_none());
}

#[test]
fn a_hostile_host_drops_and_repeats_answers() {
    let mut rig = Rig::with_disk();
    let mut channel = rig.open();
    let packet = command(unit(0), &TEST_UNIT_READY);
    rig.storage.drop_answers("scsi0", 1).expect("drop");
    channel.send(50, packet.as_bytes());
    let deadline = Instant::now() + SOON;
    while rig.controller().counters.lost_answers == 0 {
        assert!(Instant::now() < deadline);
    }
    assert!(channel.receive_within(NEVER).is_none());
    channel.send(51, packet.as_bytes());
    channel.completion(51);
    rig.storage
        .duplicate_answers("scsi0", 1)
        .expect("duplicate");
    channel.send(52, packet.as_bytes());
    channel.completion(52);
    channel.completion(52);
    assert!(channel.receive_within(NEVER).is_none());
    assert_eq!(rig.controller().counters.lost_answers, 1);
    assert!(rig.storage.drop_answers("scsi9", 1).is_err());
}

#[test]
fn commands_of_several_channels_each_end_once() {
    let mut rig = Rig::with_disk();
    let offer = rig.offer(guid::SCSI);
    let mut channels = vec![rig.guest.open(&offer, 32, 0).expect("open")];
    handshake(&mut channels[0], 2);
    let offers: Vec<_> = (0..2).map(|_| rig.guest.expect_offer()).collect();
    for offer in &offers {
        channels.push(rig.guest.open(offer, 32, 1).expect("open"));
    }
    // Sixty writes each, none of which touches another's blocks.
    let pages = rig.guest.pages(180);
    let mem = Arc::clone(&rig.guest.mem);
    for (n, &page) in pages.iter().enumerate() {
        let bytes = pattern(n as u32, 4096);
        mem.write_slice(&bytes, GuestAddress(page << 12))
            .expect("guest memory");
        let cdb = write_10(n as u32 * 8, 8);
        let request = ScsiRequest::new(unit(0), &cdb, DataIn::WRITE, 4096).expect("request");
        let packet = VstorPacket::execute(&request);
        channels[n % 3].send_gpa(n as u64 + 1, (0, 4096), &[page], packet.as_bytes());
    }
    let mut ids = Vec::new();
    for channel in &mut channels {
        for _ in 0..60 {
            let packet = channel.receive();
            assert_good(&answer(&packet.payload), 4096);
            ids.push(packet.transaction_id);
        }
        assert!(channel.receive_within(NEVER).is_none());
    }
    ids.sort_unstable();
    assert!(ids.into_iter().eq(1..=180));
    let image = std::fs::read(rig.path("first.img")).expect("image");
    for n in 0..180 {
        assert!(image[n * 4096..][..4096] == pattern(n as u32, 4096));
    }
}

#[test]
fn an_ide_drive_is_a_device_of_its_own() {
    let mut rig = Rig::new(StorageConfig {
        scsi_controllers: 0,
        ..StorageConfig::default()
    });
    rig.add("ide.img", MIB, ",bus=ide,controller=1,target=1,id=ide");
    let offer = rig.offer(guid::IDE);
    // Linux takes the target number from bytes 4 and 5.
    let instance = offer.instance_id.as_bytes();
    assert_eq!((instance[0], instance[4], instance[5]), (1, 1, 0));
    let mut channel = rig.guest.open(&offer, 8, 0).expect("open");
    let agreed = handshake(&mut channel, 4);
    assert_eq!(agreed.sub_channels, 0);
    let target = LunAddress {
        path: 0,
        target: 1,
        lun: 0,
    };
    channel.send(2, command(target, &TEST_UNIT_READY).as_bytes());
    assert_good(&answer(&channel.completion(2)), 0);
    let error = rig
        .storage
        .add_disk(
            &format!(
                "path={},bus=ide,controller=1,target=1",
                rig.path("ide.img").display()
            )
            .parse()
            .expect("options"),
        )
        .expect_err("position");
    assert!(error.to_string().contains("ide1.1 has a disk"), "{error}");
    // The position goes with its disk.
    std::thread::scope(|scope| {
        let removal = scope.spawn(|| rig.storage.remove_disk("ide"));
        let rescinded = rig.guest.expect_rescind();
        assert_eq!(rescinded, offer.channel_id);
        rig.guest.teardown_gpadl(channel.id, channel.gpadl);
        rig.guest.release(rescinded);
        removal.join().expect("thread").expect("remove");
    });
    assert!(rig.storage.controllers().is_empty());
}

#[test]
fn a_controller_can_come_and_go_under_a_running_guest() {
    let mut rig = Rig::with_disk();
    let channel = rig.open();
    rig.add("other.img", MIB, ",controller=2");
    let offer = rig.guest.expect_offer();
    assert_eq!(offer.interface_id, guid::SCSI);
    let names: Vec<_> = rig
        .storage
        .controllers()
        .into_iter()
        .map(|c| c.name)
        .collect();
    assert_eq!(names, ["scsi0", "scsi2"]);
    // Commands wait in the queue when the controller goes.
    rig.storage.stall("scsi0", Stall::Commands).expect("stall");
    let mut channel = channel;
    for id in 1..100 {
        channel.send(id, command(unit(0), &TEST_UNIT_READY).as_bytes());
    }
    std::thread::scope(|scope| {
        let removal = scope.spawn(|| rig.storage.remove_controller("scsi0"));
        let rescinded = rig.guest.expect_rescind();
        assert_eq!(rescinded, channel.id);
        rig.guest.teardown_gpadl(channel.id, channel.gpadl);
        rig.guest.release(rescinded);
        removal.join().expect("thread").expect("remove");
    });
    assert!(
        rig.storage
            .disks()
            .iter()
            .all(|disk| disk.controller != "scsi0")
    );
    assert!(!matches!(
        rig.guest.receive(NEVER),
        Some(HostMessage::OpenChannelResult(_))
    ));
}

#[test]
fn a_reset_of_the_guest_forgets_its_channels() {
    let mut rig = Rig::with_disk();
    let _channel = rig.open();
    rig.storage.stall("scsi0", Stall::Commands).expect("stall");
    // A new kernel makes contact without a word of the old one.
    assert!(rig.guest.connect(BusVersion::V5_3));
    rig.storage.stall("scsi0", Stall::Off).expect("stall");
    let mut channel = rig.open();
    let (answer, _) = rig.read(&mut channel, 0, 0, 512, 0);
    assert_good(&answer, 512);
}

/// A packet that begins like one of a guest and goes on like none.
fn odd_packet() -> impl Strategy<Value = Vec<u8>> {
    let operation = prop_oneof![4 => Just(3u32), 1 => 0u32..16, 1 => any::<u32>()];
    let opcode = prop::sample::select(vec![
        0x00u8, 0x03, 0x08, 0x0a, 0x12, 0x1a, 0x25, 0x28, 0x2a, 0x2f, 0x35, 0x41, 0x42, 0x88, 0x93,
        0x9e, 0xa0, 0xff,
    ]);
    let body = prop::collection::vec(any::<u8>(), 0..80);
    (operation, opcode, 0u8..20, body, any::<bool>()).prop_map(
        |(operation, opcode, cdb_length, body, small)| {
            let mut packet = vec![0; 12];
            packet[..4].copy_from_slice(&operation.to_le_bytes());
            packet.extend_from_slice(&body);
            let mut set = |at: usize, value: u8| {
                if let Some(byte) = packet.get_mut(at) {
                    *byte = value;
                }
            };
            set(17, 0);
            set(18, 0);
            set(19, 0);
            set(20, cdb_length);
            if small {
                // A data length of at most 4095 bytes.
                set(25, 7);
                set(26, 0);
                set(27, 0);
            }
            set(28, opcode);
            packet
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_packet_does_harm(
        packets in prop::collection::vec((odd_packet(), any::<bool>(), 0u32..5000), 1..40),
    ) {
        let mut rig = Rig::with_disk();
        let mut channel = rig.open();
        let pages = rig.guest.pages(3);
        for (n, (packet, gpa, len)) in packets.iter().enumerate() {
            let id = n as u64 + 1;
            if *gpa {
                channel.send_gpa(id, (300, *len), &pages[..(300 + *len as usize).div_ceil(4096)], packet);
            } else {
                channel.send(id, packet);
            }
        }
        // Each is answered once, whatever it was.
        let mut ids = Vec::new();
        for _ in &packets {
            ids.push(channel.receive().transaction_id);
        }
        ids.sort_unstable();
        prop_assert!(ids.into_iter().eq(1..=packets.len() as u64));
        // One of them may have been a reset, whose attention comes first.
        for _ in 0..2 {
            rig.read(&mut channel, 0, 0, 512, 0);
        }
        let (answer, _) = rig.read(&mut channel, 0, 0, 512, 0);
        assert_good(&answer, 512);
    }
}
