// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests of the SCSI target: against a model in memory, and case by case.

use super::*;
use crate::disk::{BlockSizes, DiskOptions, Fault, FaultKind, OpenDisk, open};
use hv_proto::scsi::{Blocks, Command, SenseKey};
use proptest::prelude::*;
use std::fs::File;
use std::sync::Arc;
use tempfile::TempDir;

const MAX_TRANSFER: u32 = 1 << 20;

/// A unit on a raw image in a folder that lives as long.
struct Fixture {
    unit: LogicalUnit,
    _dir: TempDir,
}

fn disk(dir: &TempDir, size: u64, options: &str) -> OpenDisk {
    let path = dir.path().join("disk.img");
    File::create(&path)
        .and_then(|file| file.set_len(size))
        .expect("image");
    let options: DiskOptions = format!("path={}{options}", path.display())
        .parse()
        .expect("options");
    open(&options).expect("open")
}

fn fixture(size: u64, options: &str) -> Fixture {
    let dir = TempDir::new().expect("folder");
    Fixture {
        unit: LogicalUnit::new(disk(&dir, size, options), MAX_TRANSFER),
        _dir: dir,
    }
}

impl Fixture {
    fn data_in(&self, cdb: &[u8], room: usize) -> (Completion, Vec<u8>) {
        let mut bytes = vec![0xee; room];
        let completion = self
            .unit
            .execute(cdb, Data::In(IoBuf::from_slice(&mut bytes)));
        assert!(completion.transferred <= room);
        assert!(bytes[completion.transferred..].iter().all(|&b| b == 0xee));
        bytes.truncate(completion.transferred);
        (completion, bytes)
    }

    fn data_out(&self, cdb: &[u8], bytes: &[u8]) -> Completion {
        let mut bytes = bytes.to_vec();
        self.unit
            .execute(cdb, Data::Out(IoBuf::from_slice(&mut bytes)))
    }

    fn none(&self, cdb: &[u8]) -> Completion {
        self.unit.execute(cdb, Data::None)
    }

    /// Parameter data of a command that succeeds.
    fn good(&self, cdb: &[u8], room: usize) -> Vec<u8> {
        let (completion, bytes) = self.data_in(cdb, room);
        assert_eq!(completion, Completion::good(bytes.len()), "{cdb:02x?}");
        bytes
    }
}

#[track_caller]
fn assert_sense(completion: Completion, key: SenseKey, asc: u8, ascq: u8) {
    let sense = completion.sense.expect("sense");
    assert_eq!(completion.status, ScsiStatus::CHECK_CONDITION);
    assert_eq!(completion.transferred, 0);
    assert_eq!(
        (sense.key, sense.additional),
        (key, AdditionalSense::new(asc, ascq))
    );
}

const ILLEGAL: SenseKey = SenseKey::ILLEGAL_REQUEST;
const TEST_UNIT_READY: [u8; 6] = [0; 6];

fn rw(write: bool, lba: u64, count: u32, force_unit_access: bool) -> Vec<u8> {
    let blocks = Blocks { lba, count };
    let command = if write {
        Command::Write {
            blocks,
            protect: 0,
            force_unit_access,
        }
    } else {
        Command::Read {
            blocks,
            protect: 0,
            force_unit_access,
        }
    };
    command.encode().as_bytes().to_vec()
}

#[test]
fn inquiry_is_that_of_a_hyper_v_disk() {
    let f = fixture(1 << 20, ",serial=S123");
    let data = f.good(&[0x12, 0, 0, 0, 255, 0], 255);
    assert_eq!(data.len(), 36);
    assert_eq!((data[0], data[2], data[4]), (0, 5, 31));
    assert_eq!(&data[8..36], b"Msft    Virtual Disk    1.0 ");
    // The allocation length cuts the data, and that is no error.
    assert_eq!(f.good(&[0x12, 0, 0, 0, 5, 0], 255), &data[..5]);
    assert_eq!(f.good(&[0x12, 0, 0, 0, 0, 0], 255).len(), 0);
    // A buffer that is too small for what the guest asked for is one.
    let (completion, bytes) = f.data_in(&[0x12, 0, 0, 0, 255, 0], 20);
    assert_eq!(completion, Completion::overrun(20));
    assert_eq!(bytes, &data[..20]);
    assert_eq!(f.none(&[0x12, 0, 0, 0, 255, 0]), Completion::overrun(0));

    let pages = f.good(&[0x12, 1, 0, 0, 255, 0], 255);
    assert_eq!(pages, [0, 0, 0, 6, 0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2]);
    for &page in &pages[4..] {
        let data = f.good(&[0x12, 1, page, 1, 0, 0], 256);
        assert_eq!(data[1], page);
        assert_eq!(
            usize::from(u16::from_be_bytes([data[2], data[3]])),
            data.len() - 4
        );
    }
    assert_eq!(f.good(&[0x12, 1, 0x80, 0, 255, 0], 255)[4..], *b"S123");
    let (bad, _) = f.data_in(&[0x12, 1, 0xc0, 0, 255, 0], 255);
    assert_sense(bad, ILLEGAL, 0x24, 0);
    let (bad, _) = f.data_in(&[0x12, 0, 0x80, 0, 255, 0], 255);
    assert_sense(bad, ILLEGAL, 0x24, 0);
}

#[test]
fn device_identification_is_a_name_in_microsofts_space() {
    let f = fixture(1 << 20, ",id=root");
    let data = f.good(&[0x12, 1, 0x83, 0, 255, 0], 255);
    assert_eq!(data[4..8], [0x01, 0x03, 0, 16]);
    // NAA 6, 00-22-48.
    assert_eq!(data[8..11], [0x60, 0x02, 0x24]);
    assert_eq!(data[11] >> 4, 8);
    assert_eq!(data[24..28], [0x02, 0x01, 0, 40]);
    assert_eq!(&data[28..36], b"Msft    ");
    assert_eq!(data.len(), 68);
}

#[test]
fn limits_and_provisioning_match_the_block_sizes() {
    for (options, logical, physical) in [
        ("", 512u32, 4096u32),
        (",logical_block_size=4096", 4096, 4096),
        (",physical_block_size=512", 512, 512),
    ] {
        let f = fixture(1 << 20, options);
        let limits = f.good(&[0x12, 1, 0xb0, 0, 255, 0], 255);
        assert_eq!(limits.len(), 64);
        assert_eq!(
            u32::from_be_bytes([limits[8], limits[9], limits[10], limits[11]]),
            MAX_TRANSFER / logical
        );
        assert_eq!(limits[31], (4096 / logical) as u8);
        let capacity = f.good(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32);
        assert_eq!(
            capacity[..8],
            ((1u64 << 20) / u64::from(logical) - 1).to_be_bytes()
        );
        assert_eq!(capacity[8..12], logical.to_be_bytes());
        assert_eq!(capacity[13], (physical / logical).ilog2() as u8);
        assert_eq!(capacity[14], 0xc0);
        let short = f.good(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8);
        assert_eq!(short[..4], ((1u32 << 20) / logical - 1).to_be_bytes());
        assert_eq!(short[4..], logical.to_be_bytes());
        assert_eq!(f.good(&[0x12, 1, 0xb2, 0, 255, 0], 255)[5] & 0xe4, 0xe4);
        assert_eq!(f.good(&[0x12, 1, 0xb1, 0, 255, 0], 255)[4..6], [0, 1]);
    }
}

#[test]
fn a_disk_beyond_2_tib_needs_the_long_forms() {
    let f = fixture(3 << 40, "");
    let short = f.good(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8);
    assert_eq!(short[..4], [0xff; 4]);
    let last = (3u64 << 40) / 512 - 1;
    assert_eq!(
        f.data_out(&rw(true, last, 1, false), &[7; 512]),
        Completion::good(512)
    );
    assert_eq!(f.good(&rw(false, last, 1, false), 512), [7; 512]);
    let (beyond, _) = f.data_in(&rw(false, last, 2, false), 1024);
    assert_sense(beyond, ILLEGAL, 0x21, 0);
    let (wrapped, _) = f.data_in(&rw(false, u64::MAX, 2, false), 1024);
    assert_sense(wrapped, ILLEGAL, 0x21, 0);
}

#[test]
fn every_form_of_read_and_write_reaches_the_same_blocks() {
    let f = fixture(1 << 20, "");
    let forms: [(&[u8], &[u8]); 4] = [
        (&[0x0a, 0, 0, 9, 2, 0], &[0x08, 0, 0, 9, 2, 0]),
        (
            &[0x2a, 8, 0, 0, 0, 9, 0, 0, 2, 0],
            &[0x28, 0, 0, 0, 0, 9, 0, 0, 2, 0],
        ),
        (
            &[0xaa, 0, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0],
            &[0xa8, 8, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0],
        ),
        (
            &[0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0],
            &[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0],
        ),
    ];
    for (n, (write, _)) in forms.iter().enumerate() {
        let bytes = vec![n as u8 + 1; 1024];
        assert_eq!(f.data_out(write, &bytes), Completion::good(1024));
        for (_, read) in &forms {
            assert_eq!(f.good(read, 1024), bytes);
        }
    }
    // In the 6-byte form only, zero blocks are 256.
    assert_eq!(f.good(&[0x08, 0, 0, 0, 0, 0], 256 * 512).len(), 256 * 512);
    assert_eq!(
        f.none(&[0x28, 0, 0, 0, 0, 9, 0, 0, 0, 0]),
        Completion::good(0)
    );
}

#[test]
fn buffers_that_do_not_match_the_transfer_length() {
    let f = fixture(1 << 20, "");
    assert_eq!(
        f.data_out(&rw(true, 0, 2, false), &[1; 1024]),
        Completion::good(1024)
    );
    // More room than data: the rest is a residual.
    assert_eq!(f.good(&rw(false, 0, 1, false), 4096).len(), 512);
    assert_eq!(
        f.data_out(&rw(true, 0, 1, false), &[2; 4096]),
        Completion::good(512)
    );
    assert_eq!(f.good(&rw(false, 1, 1, false), 512), [1; 512]);
    // Less room: what fits is read, nothing is written.
    let (short, bytes) = f.data_in(&rw(false, 0, 2, false), 700);
    assert_eq!(short, Completion::overrun(512));
    assert_eq!(bytes, [2; 512]);
    assert_eq!(
        f.data_out(&rw(true, 0, 2, false), &[3; 1000]),
        Completion::overrun(0)
    );
    assert_eq!(f.good(&rw(false, 0, 1, false), 512), [2; 512]);
    // A buffer of the wrong direction is no buffer.
    assert_eq!(
        f.data_out(&rw(false, 0, 1, false), &[0; 512]),
        Completion::overrun(0)
    );
}

#[test]
fn unmap_and_write_same_leave_zeroes_or_the_pattern() {
    let f = fixture(1 << 20, "");
    let all = 2048;
    let fill = |value: u8| {
        let (lba, count) = (0, all);
        assert!(
            f.data_out(
                &rw(true, lba, count, false),
                &vec![value; count as usize * 512]
            )
            .sense
            .is_none()
        );
    };
    fill(0x5a);
    let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
    for (lba, count) in [(8u64, 8u32), (100, 3)] {
        list.extend_from_slice(&lba.to_be_bytes());
        list.extend_from_slice(&count.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
    }
    let unmap = |length: u8| [0x42, 0, 0, 0, 0, 0, 0, 0, length, 0];
    assert_eq!(f.data_out(&unmap(40), &list), Completion::good(40));
    let zero = |lba: u64| f.good(&rw(false, lba, 1, false), 512) == [0; 512];
    assert!(!zero(7) && zero(8) && zero(15) && !zero(16));
    assert!(!zero(99) && zero(100) && zero(102) && !zero(103));
    assert_eq!(f.data_out(&unmap(0), &[]), Completion::good(0));
    assert_sense(f.data_out(&unmap(7), &list), ILLEGAL, 0x1a, 0);
    assert_eq!(f.data_out(&unmap(40), &list[..30]), Completion::overrun(0));
    list[8..16].copy_from_slice(&2048u64.to_be_bytes());
    assert_sense(f.data_out(&unmap(40), &list), ILLEGAL, 0x21, 0);
    assert_sense(
        f.data_out(&[0x42, 1, 0, 0, 0, 0, 0, 0, 40, 0], &list),
        ILLEGAL,
        0x24,
        0,
    );

    // WRITE SAME (10) with a pattern, (16) with UNMAP and with NDOB.
    let pattern: Vec<u8> = (0..512u32).map(|i| i as u8).collect();
    let same = [0x41, 0, 0, 0, 0, 16, 0, 0, 4, 0];
    assert_eq!(f.data_out(&same, &pattern), Completion::good(512));
    assert_eq!(f.good(&rw(false, 19, 1, false), 512), pattern);
    assert_eq!(f.good(&rw(false, 20, 1, false), 512), [0x5a; 512]);
    let same16 = |flags, lba, count| [0x93, flags, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, count, 0, 0];
    assert_eq!(
        f.data_out(&same16(8, 30, 2), &[0; 512]),
        Completion::good(512)
    );
    assert!(zero(30) && zero(31) && !zero(32));
    assert_eq!(f.none(&same16(1, 40, 2)), Completion::good(0));
    assert!(zero(40) && zero(41) && !zero(42));
    assert_eq!(
        f.data_out(&same16(0, 40, 2), &[1; 100]),
        Completion::overrun(0)
    );
    assert_sense(f.none(&same16(1, 40, 0)), ILLEGAL, 0x24, 0);
    assert_sense(f.none(&same16(0x11, 40, 1)), ILLEGAL, 0x24, 0);
}

#[test]
fn verify_reads_and_compares() {
    let f = fixture(1 << 20, ",fault=read:1000-1003");
    assert_eq!(
        f.none(&[0x2f, 0, 0, 0, 0, 0, 0, 1, 0, 0]),
        Completion::good(0)
    );
    assert_eq!(
        f.none(&[0x8f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
        Completion::good(0)
    );
    assert_eq!(
        f.none(&[0xaf, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
        Completion::good(0)
    );
    let bad = f.none(&[0x2f, 0, 0, 0, 3, 0xe0, 0, 0, 16, 0]);
    assert_sense(bad, SenseKey::MEDIUM_ERROR, 0x11, 0);
    assert_eq!(bad.sense.and_then(|s| s.information), Some(1000));
    assert_sense(f.none(&[0x2f, 0, 0, 0, 8, 0, 0, 0, 1, 0]), ILLEGAL, 0x21, 0);
    let compare = [0x2f, 2, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(f.data_out(&compare, &[0; 512]), Completion::good(512));
    assert_sense(
        f.data_out(&compare, &[1; 512]),
        SenseKey::MISCOMPARE,
        0x1d,
        0,
    );
}

#[test]
fn mode_sense_pages() {
    let f = fixture(1 << 20, "");
    let six = |dbd, page, length| [0x1a, dbd, page, 0, length, 0];
    let caching = f.good(&six(8, 0x08, 255), 255);
    assert_eq!(caching.len(), 4 + 20);
    assert_eq!(caching[..6], [23, 0, 0x10, 0, 0x08, 18]);
    assert_eq!(caching[6] & 4, 4, "the write cache is on");
    let with_descriptor = f.good(&six(0, 0x0a, 255), 255);
    assert_eq!(with_descriptor[..4], [23, 0, 0x10, 8]);
    assert_eq!(with_descriptor[4..12], [0, 0, 8, 0, 0, 0, 2, 0]);
    assert_eq!(with_descriptor[12..14], [0x0a, 10]);
    assert_eq!(f.good(&six(8, 0x3f, 4), 255), [47, 0, 0x10, 0]);
    // More blocks than three bytes can say: the first has a part of the number in SBC-3.
    let large = fixture(16 << 30, "");
    let descriptor = large.good(&six(0, 0x0a, 255), 255)[4..12].to_vec();
    assert_eq!(descriptor, [2, 0, 0, 0, 0, 0, 2, 0]);
    let ten = large.good(&[0x5a, 0, 0x0a, 0, 0, 0, 0, 0, 255, 0], 255);
    assert_eq!(ten[8..16], descriptor);
    let ten = f.good(&[0x5a, 8, 0x3f, 0, 0, 0, 0, 0, 255, 0], 255);
    assert_eq!(ten[..8], [0, 50, 0, 0x10, 0, 0, 0, 0]);
    assert_eq!(ten.len(), 52);
    // Nothing can be changed, nothing is saved.
    let changeable = f.good(&six(8, 0x48, 255), 255);
    assert!(changeable[6..].iter().all(|&b| b == 0));
    assert_sense(f.data_in(&six(8, 0xc8, 255), 255).0, ILLEGAL, 0x39, 0);
    assert_sense(f.data_in(&six(8, 0x02, 255), 255).0, ILLEGAL, 0x24, 0);
    assert_sense(f.none(&[0x15, 0x10, 0, 0, 12, 0]), ILLEGAL, 0x20, 0);
    let protected = fixture(1 << 20, ",readonly=on");
    assert_eq!(protected.good(&six(8, 0x3f, 255), 255)[2], 0x90);
}

#[test]
fn read_only_disks_are_write_protected() {
    let f = fixture(1 << 20, ",readonly=on");
    let protected = SenseKey::DATA_PROTECT;
    assert_sense(
        f.data_out(&rw(true, 0, 1, false), &[0; 512]),
        protected,
        0x27,
        0,
    );
    assert_sense(
        f.data_out(&[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 512]),
        protected,
        0x27,
        0,
    );
    assert_sense(
        f.data_out(&[0x42, 0, 0, 0, 0, 0, 0, 0, 8, 0], &[0; 8]),
        protected,
        0x27,
        0,
    );
    assert_eq!(f.good(&rw(false, 0, 1, false), 512), [0; 512]);
    assert_eq!(
        f.none(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Completion::good(0)
    );
}

#[test]
fn media_errors_name_the_block() {
    let f = fixture(1 << 20, ",logical_block_size=4096");
    f.unit.disk().set_faults(vec![Fault {
        bytes: 8192..12288,
        kind: FaultKind::All,
    }]);
    let (read, _) = f.data_in(&rw(false, 0, 4, false), 16384);
    assert_sense(read, SenseKey::MEDIUM_ERROR, 0x11, 0);
    assert_eq!(read.sense.and_then(|s| s.information), Some(2));
    let write = f.data_out(&rw(true, 2, 1, false), &[0; 4096]);
    assert_sense(write, SenseKey::MEDIUM_ERROR, 0x0c, 0);
    assert_eq!(f.good(&rw(false, 3, 1, false), 4096).len(), 4096);
    assert_eq!(f.unit.counters().check_conditions, 2);
}

#[test]
fn attentions_come_once_and_in_order() {
    let f = fixture(1 << 20, "");
    assert_eq!(f.none(&TEST_UNIT_READY), Completion::good(0));
    f.unit.resize(2 << 20).expect("resize");
    // These do not report it.
    assert_eq!(f.good(&[0x12, 0, 0, 0, 36, 0], 36).len(), 36);
    let attention = SenseKey::UNIT_ATTENTION;
    assert_sense(
        f.data_in(&rw(false, 0, 1, false), 512).0,
        attention,
        0x2a,
        9,
    );
    assert_eq!(
        f.good(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8)[2..4],
        [0x0f, 0xff]
    );
    f.unit.resize(3 << 20).expect("resize");
    f.unit.resize(4 << 20).expect("resize");
    let data = f.good(&[0x03, 0, 0, 0, 18, 0], 18);
    assert_eq!((data[2], data[12], data[13]), (6, 0x2a, 9));
    assert_eq!(f.good(&[0x03, 0, 0, 0, 18, 0], 18)[2], 0);
    assert_eq!(f.good(&[0x03, 1, 0, 0, 252, 0], 252)[..2], [0x72, 0]);
    f.unit.resize(5 << 20).expect("resize");
    f.unit.reset();
    assert_sense(f.none(&TEST_UNIT_READY), attention, 0x29, 0);
    assert_eq!(f.none(&TEST_UNIT_READY), Completion::good(0));
    assert!(f.unit.resize(0).is_err());
    assert!(f.unit.resize(1000).is_err());
}

#[test]
fn everything_else_is_an_illegal_request() {
    let f = fixture(1 << 20, "");
    for opcode in [
        0x04, 0x15, 0x16, 0x1e, 0x3b, 0x4d, 0x55, 0x5e, 0x5f, 0x85, 0x89, 0xa1, 0xa3, 0xc0,
    ] {
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        assert_sense(f.none(&cdb), ILLEGAL, 0x20, 0);
    }
    assert_sense(f.none(&[0x28, 0, 0]), ILLEGAL, 0x24, 0);
    assert_sense(
        f.data_in(&[0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0], 512).0,
        ILLEGAL,
        0x24,
        0,
    );
    assert_sense(f.none(&[0x1b, 0, 0, 0, 2, 0]), ILLEGAL, 0x24, 0);
    assert_eq!(f.none(&[0x1b, 0, 0, 0, 0, 0]), Completion::good(0));
    assert_sense(f.none(&[0x35, 0, 0, 0, 9, 0, 0, 0, 0, 0]), ILLEGAL, 0x21, 0);
}

#[test]
fn a_target_answers_for_units_that_are_not_there() {
    let dir = TempDir::new().expect("folder");
    let unit = Arc::new(LogicalUnit::new(disk(&dir, 1 << 20, ""), MAX_TRANSFER));
    let mut target = Target::default();
    assert!(target.add(5, Arc::clone(&unit)));
    assert!(!target.add(5, unit));
    let ask = |target: &Target, lun, cdb: &[u8]| {
        let mut bytes = [0; 64];
        let data = Data::In(IoBuf::from_slice(&mut bytes));
        let completion = target.answer(lun, cdb, &data);
        completion.map(|c| (c, bytes[..c.transferred].to_vec()))
    };
    let report = [0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0];
    let (_, luns) = ask(&target, 0, &report).expect("answer");
    assert_eq!(luns, [0, 0, 0, 8, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0]);
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    let (_, data) = ask(&target, 0, &inquiry).expect("answer");
    assert_eq!(data[0], 0x7f);
    assert!(ask(&target, 5, &inquiry).is_none());
    assert!(ask(&target, 0, &TEST_UNIT_READY).is_none());
    assert!(target.remove(5).is_some());
    assert_eq!(ask(&target, 5, &inquiry).expect("answer").1[0], 0x7f);
}

#[derive(Debug, Clone)]
enum Step {
    Read(u64, u32),
    Write(u64, u32, u8),
    Same(u64, u32, u8, bool),
    Unmap(u64, u32),
}

fn step() -> impl Strategy<Value = Step> {
    let lba = 0u64..140;
    let count = 0u32..40;
    prop_oneof![
        (lba.clone(), count.clone()).prop_map(|(l, n)| Step::Read(l, n)),
        (lba.clone(), count.clone(), any::<u8>()).prop_map(|(l, n, v)| Step::Write(l, n, v)),
        (lba.clone(), 1u32..40, 0u8..3, any::<bool>())
            .prop_map(|(l, n, v, u)| Step::Same(l, n, v, u)),
        (lba, count).prop_map(|(l, n)| Step::Unmap(l, n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_unit_behaves_like_memory(
        steps in prop::collection::vec(step(), 1..40),
        large in any::<bool>(),
    ) {
        let size = if large { 4096usize } else { 512 };
        let blocks = 128;
        let f = fixture((blocks * size) as u64, if large { ",logical_block_size=4096" } else { "" });
        let mut model = vec![0u8; blocks * size];
        for step in steps {
            let (lba, count) = match step {
                Step::Read(l, n) | Step::Write(l, n, _) | Step::Same(l, n, ..)
                | Step::Unmap(l, n) => (l, n),
            };
            let area = lba as usize * size..(lba as usize + count as usize) * size;
            let bytes = area.len();
            let (completion, used) = match step {
                Step::Read(..) => {
                    let (completion, data) = f.data_in(&rw(false, lba, count, false), bytes);
                    if let Some(expected) = model.get(area.clone()) {
                        prop_assert!(data == expected);
                    }
                    (completion, bytes)
                }
                Step::Write(_, _, value) => {
                    let completion = f.data_out(&rw(true, lba, count, value & 1 == 0), &vec![value; bytes]);
                    if let Some(expected) = model.get_mut(area.clone()) {
                        expected.fill(value);
                    }
                    (completion, bytes)
                }
                Step::Same(_, _, value, unmap) => {
                    let cdb = Command::WriteSame {
                        blocks: Blocks { lba, count },
                        protect: 0,
                        unmap,
                        anchor: false,
                        no_data_out: false,
                    }
                    .encode();
                    let completion = f.data_out(cdb.as_bytes(), &vec![value; size]);
                    if let Some(expected) = model.get_mut(area.clone()) {
                        expected.fill(value);
                    }
                    (completion, size)
                }
                Step::Unmap(..) => {
                    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
                    list.extend_from_slice(&lba.to_be_bytes());
                    list.extend_from_slice(&count.to_be_bytes());
                    list.extend_from_slice(&[0; 4]);
                    let completion = f.data_out(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &list);
                    if let Some(expected) = model.get_mut(area.clone()) {
                        expected.fill(0);
                    }
                    (completion, 24)
                }
            };
            if area.end <= model.len() {
                prop_assert_eq!(completion, Completion::good(used));
            } else {
                assert_sense(completion, ILLEGAL, 0x21, 0);
            }
        }
        prop_assert!(f.good(&rw(false, 0, blocks as u32, false), model.len()) == model);
    }

    #[test]
    fn no_command_block_does_harm(
        cdb in prop::collection::vec(any::<u8>(), 0..17),
        data in prop::collection::vec(any::<u8>(), 0..2000),
        into in any::<bool>(),
    ) {
        let f = fixture(1 << 16, "");
        let mut bytes = data.clone();
        let buf = IoBuf::from_slice(&mut bytes);
        let completion = f.unit.execute(&cdb, if into { Data::In(buf) } else { Data::Out(buf) });
        prop_assert!(completion.transferred <= data.len());
        prop_assert_eq!(
            completion.sense.is_some(),
            completion.status == ScsiStatus::CHECK_CONDITION
        );
    }
}

#[test]
fn block_sizes_default_to_512e() {
    assert_eq!(
        BlockSizes::default(),
        BlockSizes {
            logical: 512,
            physical: 4096
        }
    );
}
