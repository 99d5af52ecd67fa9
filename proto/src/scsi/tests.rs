// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of command blocks and sense data.

use super::*;
use proptest::prelude::*;
use std::{format, vec::Vec};

const fn blocks(lba: u64, count: u32) -> Blocks {
    Blocks { lba, count }
}

const fn read(lba: u64, count: u32) -> Command {
    Command::Read {
        blocks: blocks(lba, count),
        protect: 0,
        force_unit_access: false,
    }
}

#[test]
fn command_blocks_decode() {
    let cases: &[(&[u8], Command)] = &[
        (&[0; 6], Command::TestUnitReady),
        (
            &[0x03, 1, 0, 0, 252, 0],
            Command::RequestSense {
                descriptor: true,
                allocation_length: 252,
            },
        ),
        (
            &[0x12, 0, 0, 1, 0x24, 0],
            Command::Inquiry {
                vpd_page: None,
                allocation_length: 0x124,
            },
        ),
        (
            &[0x12, 1, 0x83, 0, 255, 0],
            Command::Inquiry {
                vpd_page: Some(0x83),
                allocation_length: 255,
            },
        ),
        (
            &[0x1a, 8, 0x88, 0, 4, 0],
            Command::ModeSense {
                long: false,
                no_block_descriptors: true,
                page_control: PageControl::Default,
                page: 8,
                subpage: 0,
                allocation_length: 4,
            },
        ),
        (
            &[0x5a, 0, 0x3f, 0xff, 0, 0, 0, 2, 0, 0],
            Command::ModeSense {
                long: true,
                no_block_descriptors: false,
                page_control: PageControl::Current,
                page: 0x3f,
                subpage: 0xff,
                allocation_length: 512,
            },
        ),
        (
            &[0x1b, 1, 0, 0, 0x23, 0],
            Command::StartStopUnit {
                immediate: true,
                power_condition: 2,
                load_eject: true,
                start: true,
            },
        ),
        (&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], Command::ReadCapacity10),
        (
            &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0],
            Command::ReadCapacity16 {
                allocation_length: 32,
            },
        ),
        (
            &[0xa0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0],
            Command::ReportLuns {
                select_report: 2,
                allocation_length: 0x1_0000,
            },
        ),
        // The address of the 6-byte form has 21 bits.
        (&[0x08, 0xff, 0xff, 0xff, 9, 0], read(0x1f_ffff, 9)),
        (&[0x08, 0, 0, 1, 0, 0], read(1, 256)),
        (
            &[0x28, 0, 1, 2, 3, 4, 0, 5, 6, 0],
            read(0x0102_0304, 0x0506),
        ),
        (&[0x28, 0, 1, 2, 3, 4, 0, 0, 0, 0], read(0x0102_0304, 0)),
        (
            &[0xa8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0],
            read(0x0102_0304, 0x0506_0708),
        ),
        (
            &[0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0],
            read(0x0102_0304_0506_0708, 0x090a_0b0c),
        ),
        (
            &[0x8a, 0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0],
            Command::Write {
                blocks: blocks(1, 2),
                protect: 1,
                force_unit_access: true,
            },
        ),
        (
            &[0x2f, 2, 0, 0, 0, 1, 0, 0, 2, 0],
            Command::Verify {
                blocks: blocks(1, 2),
                protect: 0,
                byte_check: 1,
            },
        ),
        (
            &[0x93, 0x19, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0],
            Command::WriteSame {
                blocks: blocks(1, 2),
                protect: 0,
                unmap: true,
                anchor: true,
                no_data_out: true,
            },
        ),
        (
            // Bit 0 has another, obsolete meaning in the 10-byte form.
            &[0x41, 0x01, 0, 0, 0, 1, 0, 0, 2, 0],
            Command::WriteSame {
                blocks: blocks(1, 2),
                protect: 0,
                unmap: false,
                anchor: false,
                no_data_out: false,
            },
        ),
        (
            &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0],
            Command::Unmap {
                anchor: false,
                parameter_list_length: 24,
            },
        ),
        (
            &[0x35, 2, 0, 0, 0, 7, 0, 0, 8, 0],
            Command::SynchronizeCache {
                blocks: blocks(7, 8),
                immediate: true,
            },
        ),
    ];
    for (cdb, command) in cases {
        assert_eq!(Command::decode(cdb), Ok(*command), "{cdb:02x?}");
        // Bytes after the end, as the storage protocol has them, do not matter.
        let padded: Vec<u8> = cdb.iter().copied().chain([0xff; 4]).collect();
        assert_eq!(Command::decode(&padded), Ok(*command), "{padded:02x?}");
        for len in 0..cdb.len() {
            let error = Command::decode(&cdb[..len]).unwrap_err();
            assert_eq!(error, CdbError::InvalidField { byte: len as u8 });
        }
    }
}

#[test]
fn impossible_command_blocks_are_refused() {
    let field = |byte| Err(CdbError::InvalidField { byte });
    assert_eq!(Command::decode(&[]), field(0));
    // Obsolete command support data; a page code without vital product data.
    assert_eq!(Command::decode(&[0x12, 2, 0, 0, 0, 0]), field(1));
    assert_eq!(Command::decode(&[0x12, 0, 0x80, 0, 0, 0]), field(2));
    // Capacity of a part of the unit.
    assert_eq!(
        Command::decode(&[0x25, 0, 0, 0, 0, 1, 0, 0, 0, 0]),
        field(2)
    );
    assert_eq!(
        Command::decode(&[0x25, 0, 0, 0, 0, 0, 0, 0, 1, 0]),
        field(8)
    );
    // A reserved kind of comparison.
    assert_eq!(
        Command::decode(&[0x2f, 4, 0, 0, 0, 0, 0, 0, 0, 0]),
        field(1)
    );

    let unknown = |opcode| Err(CdbError::UnknownOpcode(Opcode::new(opcode)));
    assert_eq!(Command::decode(&[0x4d; 16]), unknown(0x4d));
    assert_eq!(Command::decode(&[0xff; 16]), unknown(0xff));
    // GET LBA STATUS has the operation code of READ CAPACITY (16).
    let mut cdb = [0; 16];
    cdb[..2].copy_from_slice(&[0x9e, 0x12]);
    assert_eq!(Command::decode(&cdb), unknown(0x9e));

    let error = Command::decode(&[0x4d; 16]).unwrap_err();
    assert_eq!(error.sense().additional, AdditionalSense::INVALID_OPCODE);
    assert_eq!(
        format!("{error}"),
        "SCSI command LOG_SENSE is not supported"
    );
    let error = Command::decode(&[0x12, 2, 0, 0, 0, 0]).unwrap_err();
    assert_eq!(
        error.sense().additional,
        AdditionalSense::INVALID_FIELD_IN_CDB
    );
    assert_eq!(error.sense().key, SenseKey::ILLEGAL_REQUEST);
}

#[test]
fn directions() {
    let direction = |cdb: &[u8]| Command::decode(cdb).unwrap().direction();
    assert_eq!(direction(&[0; 6]), Direction::None);
    assert_eq!(direction(&[0x28; 10]), Direction::In);
    assert_eq!(direction(&[0x2a; 10]), Direction::Out);
    assert_eq!(direction(&[0x42; 10]), Direction::Out);
    assert_eq!(
        direction(&[0x2f, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Direction::None
    );
    assert_eq!(
        direction(&[0x2f, 6, 0, 0, 0, 0, 0, 0, 0, 0]),
        Direction::Out
    );
    let mut cdb = [0; 16];
    cdb[0] = 0x93;
    assert_eq!(direction(&cdb), Direction::Out);
    cdb[1] = 1;
    assert_eq!(direction(&cdb), Direction::None);
}

#[test]
fn fixed_sense_has_the_layout_of_the_standard() {
    let sense = Sense::new(
        SenseKey::MEDIUM_ERROR,
        AdditionalSense::UNRECOVERED_READ_ERROR,
    );
    let sense = sense.with_information(0x0102_0304);
    let expected = [0xf0, 0, 3, 1, 2, 3, 4, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0];
    assert_eq!(sense.to_fixed(), expected);
    // What does not fit is left out, not cut off.
    let large = sense.with_information(1 << 32).to_fixed();
    assert_eq!(large[..7], [0x70, 0, 3, 0, 0, 0, 0]);
    assert_eq!(Sense::parse(&large).unwrap().information, None);
}

#[test]
fn descriptor_sense_has_the_layout_of_the_standard() {
    let sense = Sense::unit_attention(AdditionalSense::CAPACITY_CHANGED);
    let (data, len) = sense.to_descriptor();
    assert_eq!(data[..len], [0x72, 6, 0x2a, 9, 0, 0, 0, 0]);
    let (data, len) = sense.with_information(0x1234).to_descriptor();
    let expected = [
        0x72, 6, 0x2a, 9, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x12, 0x34,
    ];
    assert_eq!(data[..len], expected);
}

#[test]
fn odd_sense_data() {
    assert_eq!(Sense::parse(&[]), None);
    assert_eq!(Sense::parse(&[0; 18]), None);
    assert_eq!(Sense::parse(&[0x70, 0]), None);
    assert_eq!(Sense::parse(&[0x72]), None);
    assert_eq!(Sense::parse(&[0x7f; 18]), None);

    // The additional length excludes the codes.
    let mut data = Sense::unit_attention(AdditionalSense::CAPACITY_CHANGED).to_fixed();
    data[7] = 4;
    let sense = Sense::parse(&data).unwrap();
    assert_eq!(sense.key, SenseKey::UNIT_ATTENTION);
    assert_eq!(sense.additional, AdditionalSense::NONE);
    // Cut off between code and qualifier.
    data[7] = 10;
    let sense = Sense::parse(&data[..13]).unwrap();
    assert_eq!(sense.additional, AdditionalSense::new(0x2a, 0));

    data[0] = 0x71;
    assert!(Sense::parse(&data).unwrap().deferred);

    // The information is the second descriptor; the first one is of another kind.
    let data = [
        0x72, 3, 0x11, 0, 0, 0, 0, 16, 2, 2, 0, 0, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 5,
    ];
    assert_eq!(Sense::parse(&data).unwrap().information, Some(5));
    // Descriptors that are cut off, or not valid.
    assert_eq!(Sense::parse(&data[..20]).unwrap().information, None);
    let data = [0x72, 3, 0x11, 0, 0, 0, 0, 4, 2, 200, 0, 0];
    assert_eq!(Sense::parse(&data).unwrap().information, None);
}

fn any_page_control() -> impl Strategy<Value = PageControl> {
    prop_oneof![
        Just(PageControl::Current),
        Just(PageControl::Changeable),
        Just(PageControl::Default),
        Just(PageControl::Saved),
    ]
}

fn any_command() -> impl Strategy<Value = Command> {
    let lba = prop_oneof![any::<u64>(), any::<u32>().prop_map(u64::from)];
    let count = prop_oneof![any::<u32>(), any::<u16>().prop_map(u32::from)];
    let any_blocks = (lba, count).prop_map(|(lba, count)| Blocks { lba, count });
    let rest = (
        any::<u16>(),
        any::<u32>(),
        any::<u8>(),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    );
    (0..14, any_blocks, any_page_control(), rest).prop_map(
        |(kind, blocks, page_control, (short, long, byte, a, b, c))| match kind {
            0 => Command::TestUnitReady,
            1 => Command::RequestSense {
                descriptor: a,
                allocation_length: byte,
            },
            2 => Command::Inquiry {
                vpd_page: a.then_some(byte),
                allocation_length: short,
            },
            3 => Command::ModeSense {
                long: a,
                no_block_descriptors: b,
                page_control,
                page: byte & 0x3f,
                subpage: long as u8,
                allocation_length: if a { short } else { short & 0xff },
            },
            4 => Command::StartStopUnit {
                immediate: a,
                power_condition: byte >> 4,
                load_eject: b,
                start: c,
            },
            5 => Command::ReadCapacity10,
            6 => Command::ReadCapacity16 {
                allocation_length: long,
            },
            7 => Command::ReportLuns {
                select_report: byte,
                allocation_length: long,
            },
            8 => Command::Read {
                blocks,
                protect: byte >> 5,
                force_unit_access: a,
            },
            9 => Command::Write {
                blocks,
                protect: byte >> 5,
                force_unit_access: a,
            },
            10 => Command::Verify {
                blocks,
                protect: byte >> 5,
                byte_check: [0, 1, 3][usize::from(byte % 3)],
            },
            11 => Command::WriteSame {
                blocks,
                protect: byte >> 5,
                unmap: a,
                anchor: b,
                no_data_out: c,
            },
            12 => Command::Unmap {
                anchor: a,
                parameter_list_length: short,
            },
            _ => Command::SynchronizeCache {
                blocks,
                immediate: a,
            },
        },
    )
}

proptest! {
    #[test]
    fn commands_survive_encoding(command in any_command()) {
        let cdb = command.encode();
        prop_assert!(matches!(cdb.as_bytes().len(), 6 | 10 | 12 | 16));
        prop_assert_eq!(Command::decode(cdb.as_bytes()), Ok(command));
    }

    #[test]
    fn any_command_block_decodes_or_fails(cdb in proptest::collection::vec(any::<u8>(), 0..20)) {
        match Command::decode(&cdb) {
            Ok(command) => {
                let again = command.encode();
                prop_assert_eq!(Command::decode(again.as_bytes()), Ok(command));
            }
            Err(error) => prop_assert_eq!(error.sense().key, SenseKey::ILLEGAL_REQUEST),
        }
    }

    #[test]
    fn sense_survives_both_formats(
        deferred: bool,
        key in 0u8..16,
        asc: u8,
        ascq: u8,
        information: Option<u64>,
    ) {
        let sense = Sense {
            deferred,
            key: SenseKey::new(key),
            additional: AdditionalSense::new(asc, ascq),
            information,
        };
        let (data, len) = sense.to_descriptor();
        prop_assert_eq!(Sense::parse(&data[..len]), Some(sense));
        let fits = information.filter(|&value| value <= u64::from(u32::MAX));
        let fixed = Sense { information: fits, ..sense };
        prop_assert_eq!(Sense::parse(&sense.to_fixed()), Some(fixed));
    }

    #[test]
    fn any_sense_data_parses_or_fails(data in proptest::collection::vec(any::<u8>(), 0..40), format in 0x70u8..0x76) {
        let _ = Sense::parse(&data);
        let mut data = data;
        if let Some(first) = data.first_mut() {
            *first = format | (*first & 0x80);
        }
        let _ = Sense::parse(&data);
    }
}
