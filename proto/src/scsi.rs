// SPDX-License-Identifier: GPL-2.0 OR MIT

//! SCSI as it travels inside the storage protocol: operation codes, command blocks, status, sense.
//!
//! [`Command`] decodes the command blocks that a virtual disk serves, and encodes them for tests
//! and tools; [`Sense`] parses and builds sense data in both of its formats. Nothing here knows
//! VMBus. Numbers in command blocks and sense data are big-endian. Uses `core` only.
//!
//! Sources: SPC-4 (INCITS 513) for status, sense data and the primary commands, SBC-3 (INCITS 514)
//! for the block commands; the same numbers are in the kernel's `include/scsi/scsi_proto.h`.

use core::fmt;

/// Size of the largest command block that the storage protocol carries, in bytes.
pub const MAX_CDB_SIZE: usize = 16;

/// Size of fixed-format sense data without vendor bytes, in bytes (SPC-4 section 4.5.3).
pub const FIXED_SENSE_SIZE: usize = 18;

/// Size of the header of descriptor-format sense data, in bytes (SPC-4 section 4.5.2).
const DESCRIPTOR_SENSE_HEADER: usize = 8;

/// Size of an information descriptor of descriptor-format sense data, in bytes.
const INFORMATION_DESCRIPTOR: usize = 12;

open_enum! {
    /// Operation code: the first byte of a command block.
    pub struct Opcode: u8 {
        /// TEST UNIT READY.
        TEST_UNIT_READY = 0x00,
        /// REQUEST SENSE.
        REQUEST_SENSE = 0x03,
        /// READ (6).
        READ_6 = 0x08,
        /// WRITE (6).
        WRITE_6 = 0x0a,
        /// INQUIRY.
        INQUIRY = 0x12,
        /// MODE SELECT (6).
        MODE_SELECT_6 = 0x15,
        /// MODE SENSE (6).
        MODE_SENSE_6 = 0x1a,
        /// START STOP UNIT.
        START_STOP_UNIT = 0x1b,
        /// PREVENT ALLOW MEDIUM REMOVAL.
        PREVENT_ALLOW_MEDIUM_REMOVAL = 0x1e,
        /// READ CAPACITY (10).
        READ_CAPACITY_10 = 0x25,
        /// READ (10).
        READ_10 = 0x28,
        /// WRITE (10).
        WRITE_10 = 0x2a,
        /// VERIFY (10).
        VERIFY_10 = 0x2f,
        /// SYNCHRONIZE CACHE (10).
        SYNCHRONIZE_CACHE_10 = 0x35,
        /// WRITE SAME (10).
        WRITE_SAME_10 = 0x41,
        /// UNMAP.
        UNMAP = 0x42,
        /// LOG SENSE.
        LOG_SENSE = 0x4d,
        /// MODE SELECT (10).
        MODE_SELECT_10 = 0x55,
        /// MODE SENSE (10).
        MODE_SENSE_10 = 0x5a,
        /// PERSISTENT RESERVE IN.
        PERSISTENT_RESERVE_IN = 0x5e,
        /// PERSISTENT RESERVE OUT.
        PERSISTENT_RESERVE_OUT = 0x5f,
        /// ATA PASS-THROUGH (16).
        ATA_PASS_THROUGH_16 = 0x85,
        /// READ (16).
        READ_16 = 0x88,
        /// WRITE (16).
        WRITE_16 = 0x8a,
        /// VERIFY (16).
        VERIFY_16 = 0x8f,
        /// SYNCHRONIZE CACHE (16).
        SYNCHRONIZE_CACHE_16 = 0x91,
        /// WRITE SAME (16).
        WRITE_SAME_16 = 0x93,
        /// SERVICE ACTION IN (16): READ CAPACITY (16) and others.
        SERVICE_ACTION_IN_16 = 0x9e,
        /// REPORT LUNS.
        REPORT_LUNS = 0xa0,
        /// ATA PASS-THROUGH (12).
        ATA_PASS_THROUGH_12 = 0xa1,
        /// MAINTENANCE IN: REPORT SUPPORTED OPERATION CODES and others.
        MAINTENANCE_IN = 0xa3,
        /// READ (12).
        READ_12 = 0xa8,
        /// WRITE (12).
        WRITE_12 = 0xaa,
        /// VERIFY (12).
        VERIFY_12 = 0xaf,
    }
}

/// Service action of READ CAPACITY (16) in SERVICE ACTION IN (16).
const READ_CAPACITY_16: u8 = 0x10;

open_enum! {
    /// Status of a finished command (SPC-4, SAM-5 section 5.3).
    pub struct ScsiStatus: u8 {
        /// Success.
        GOOD = 0x00,
        /// Sense data tells what happened.
        CHECK_CONDITION = 0x02,
        /// Success of a pre-fetch command.
        CONDITION_MET = 0x04,
        /// Try again later.
        BUSY = 0x08,
        /// Another initiator has reserved the unit.
        RESERVATION_CONFLICT = 0x18,
        /// Try again when an earlier command has finished.
        TASK_SET_FULL = 0x28,
        /// An automatic contingent allegiance is active.
        ACA_ACTIVE = 0x30,
        /// Another initiator has aborted the command.
        TASK_ABORTED = 0x40,
    }
}

open_enum! {
    /// Sense key: the class of a sense condition (SPC-4 table 48).
    pub struct SenseKey: u8 {
        /// Nothing to tell.
        NO_SENSE = 0x0,
        /// Success, after the device helped itself.
        RECOVERED_ERROR = 0x1,
        /// The unit cannot be accessed.
        NOT_READY = 0x2,
        /// A flaw of the medium.
        MEDIUM_ERROR = 0x3,
        /// A failure of the device.
        HARDWARE_ERROR = 0x4,
        /// The command or its parameters are wrong, or not supported.
        ILLEGAL_REQUEST = 0x5,
        /// The unit has changed since the last command.
        UNIT_ATTENTION = 0x6,
        /// The unit is write protected.
        DATA_PROTECT = 0x7,
        /// Unwritten medium where data was expected.
        BLANK_CHECK = 0x8,
        /// The device aborted the command.
        ABORTED_COMMAND = 0xb,
        /// Data does not match the medium.
        MISCOMPARE = 0xe,
    }
}

/// Additional sense code and its qualifier (SPC-4 annex F).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AdditionalSense {
    /// Additional sense code.
    pub asc: u8,
    /// Additional sense code qualifier.
    pub ascq: u8,
}

impl AdditionalSense {
    /// No additional sense information.
    pub const NONE: Self = Self::new(0x00, 0x00);
    /// Write error.
    pub const WRITE_ERROR: Self = Self::new(0x0c, 0x00);
    /// Unrecovered read error.
    pub const UNRECOVERED_READ_ERROR: Self = Self::new(0x11, 0x00);
    /// Miscompare during verify operation.
    pub const MISCOMPARE_DURING_VERIFY: Self = Self::new(0x1d, 0x00);
    /// Parameter list length error.
    pub const PARAMETER_LIST_LENGTH_ERROR: Self = Self::new(0x1a, 0x00);
    /// Invalid command operation code.
    pub const INVALID_OPCODE: Self = Self::new(0x20, 0x00);
    /// Logical block address out of range.
    pub const LBA_OUT_OF_RANGE: Self = Self::new(0x21, 0x00);
    /// Invalid field in command block.
    pub const INVALID_FIELD_IN_CDB: Self = Self::new(0x24, 0x00);
    /// Logical unit not supported.
    pub const LUN_NOT_SUPPORTED: Self = Self::new(0x25, 0x00);
    /// Invalid field in parameter list.
    pub const INVALID_FIELD_IN_PARAMETER_LIST: Self = Self::new(0x26, 0x00);
    /// Write protected.
    pub const WRITE_PROTECTED: Self = Self::new(0x27, 0x00);
    /// Space allocation failed write protect.
    pub const SPACE_ALLOCATION_FAILED: Self = Self::new(0x27, 0x07);
    /// Power on, reset, or bus device reset occurred.
    pub const POWER_ON_OR_RESET: Self = Self::new(0x29, 0x00);
    /// Mode parameters changed.
    pub const MODE_PARAMETERS_CHANGED: Self = Self::new(0x2a, 0x01);
    /// Capacity data has changed.
    pub const CAPACITY_CHANGED: Self = Self::new(0x2a, 0x09);
    /// Saving parameters not supported.
    pub const SAVING_PARAMETERS_NOT_SUPPORTED: Self = Self::new(0x39, 0x00);
    /// Medium not present.
    pub const MEDIUM_NOT_PRESENT: Self = Self::new(0x3a, 0x00);
    /// Target operating conditions have changed.
    pub const OPERATING_CONDITIONS_CHANGED: Self = Self::new(0x3f, 0x00);
    /// Inquiry data has changed.
    pub const INQUIRY_DATA_CHANGED: Self = Self::new(0x3f, 0x03);
    /// Reported LUNs data has changed.
    pub const REPORTED_LUNS_CHANGED: Self = Self::new(0x3f, 0x0e);
    /// Internal target failure.
    pub const INTERNAL_TARGET_FAILURE: Self = Self::new(0x44, 0x00);

    /// A code and its qualifier.
    pub const fn new(asc: u8, ascq: u8) -> Self {
        Self { asc, ascq }
    }
}

/// What sense data says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// Whether it is about an earlier command than the one that it came with.
    pub deferred: bool,
    /// Class of the condition.
    pub key: SenseKey,
    /// The condition.
    pub additional: AdditionalSense,
    /// For block commands, usually the address of the block that failed.
    pub information: Option<u64>,
}

impl Sense {
    /// A condition of the current command, without information.
    pub const fn new(key: SenseKey, additional: AdditionalSense) -> Self {
        Self {
            deferred: false,
            key,
            additional,
            information: None,
        }
    }

    /// ILLEGAL REQUEST with `additional`.
    pub const fn illegal_request(additional: AdditionalSense) -> Self {
        Self::new(SenseKey::ILLEGAL_REQUEST, additional)
    }

    /// UNIT ATTENTION with `additional`.
    pub const fn unit_attention(additional: AdditionalSense) -> Self {
        Self::new(SenseKey::UNIT_ATTENTION, additional)
    }

    /// The same with `information`, usually a block address.
    pub const fn with_information(mut self, information: u64) -> Self {
        self.information = Some(information);
        self
    }

    /// Parses sense data of either format; `None` if it is neither, or has no sense key.
    ///
    /// Codes that are cut off, or that the additional length excludes, count as zero.
    pub fn parse(data: &[u8]) -> Option<Self> {
        let response = *data.first()?;
        let deferred = response & 1 != 0;
        match response & 0x7f {
            0x70 | 0x71 => {
                let key = SenseKey::new(data.get(2)? & 0xf);
                // The additional length counts the bytes after itself, which is byte 7.
                let end = usize::from(data.get(7).copied().unwrap_or(0)).saturating_add(8);
                let data = data.get(..end).unwrap_or(data);
                let code = |at| data.get(at).copied().unwrap_or(0);
                let valid = response & 0x80 != 0;
                let information = valid.then(|| be32(data, 3)).flatten().map(u64::from);
                Some(Self {
                    deferred,
                    key,
                    additional: AdditionalSense::new(code(12), code(13)),
                    information,
                })
            }
            0x72 | 0x73 => {
                let key = SenseKey::new(data.get(1)? & 0xf);
                let code = |at| data.get(at).copied().unwrap_or(0);
                Some(Self {
                    deferred,
                    key,
                    additional: AdditionalSense::new(code(2), code(3)),
                    information: descriptor_information(data),
                })
            }
            _ => None,
        }
    }

    /// Fixed-format sense data. Information that needs more than 32 bits is left out.
    pub fn to_fixed(&self) -> [u8; FIXED_SENSE_SIZE] {
        let mut data = [0; FIXED_SENSE_SIZE];
        let information = self.information.and_then(|value| u32::try_from(value).ok());
        data[0] = if self.deferred { 0x71 } else { 0x70 };
        if let Some(information) = information {
            data[0] |= 0x80;
            data[3..7].copy_from_slice(&information.to_be_bytes());
        }
        data[2] = self.key.get() & 0xf;
        data[7] = 10; // FIXED_SENSE_SIZE without the first 8 bytes.
        data[12] = self.additional.asc;
        data[13] = self.additional.ascq;
        data
    }

    /// Descriptor-format sense data and its length in bytes.
    pub fn to_descriptor(
        &self,
    ) -> (
        [u8; DESCRIPTOR_SENSE_HEADER + INFORMATION_DESCRIPTOR],
        usize,
    ) {
        let mut data = [0; DESCRIPTOR_SENSE_HEADER + INFORMATION_DESCRIPTOR];
        data[0] = if self.deferred { 0x73 } else { 0x72 };
        data[1] = self.key.get() & 0xf;
        data[2] = self.additional.asc;
        data[3] = self.additional.ascq;
        let Some(information) = self.information else {
            return (data, DESCRIPTOR_SENSE_HEADER);
        };
        data[7] = 12; // INFORMATION_DESCRIPTOR
        data[9] = 10; // Its length after this byte.
        data[10] = 0x80; // The information is valid.
        data[12..20].copy_from_slice(&information.to_be_bytes());
        (data, DESCRIPTOR_SENSE_HEADER + INFORMATION_DESCRIPTOR)
    }
}

/// The information descriptor of descriptor-format sense data.
fn descriptor_information(data: &[u8]) -> Option<u64> {
    let len = usize::from(*data.get(7)?);
    let mut rest = data.get(DESCRIPTOR_SENSE_HEADER..)?;
    rest = rest.get(..len).unwrap_or(rest);
    // Every descriptor takes at least 2 bytes, so this ends.
    while let [kind, len, tail @ ..] = rest {
        let descriptor = tail.get(..usize::from(*len))?;
        if *kind == 0 {
            let valid = *descriptor.first()? & 0x80 != 0;
            return valid.then(|| be64(descriptor, 2)).flatten();
        }
        rest = tail.get(usize::from(*len)..)?;
    }
    None
}

/// Where the data of a command goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// There is no data.
    None,
    /// From the device.
    In,
    /// To the device.
    Out,
}

/// Blocks that a command is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Address of the first logical block.
    pub lba: u64,
    /// Number of logical blocks. What zero means depends on the command.
    pub count: u32,
}

/// Page control of MODE SENSE: which values are asked for (SPC-4 table 159).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageControl {
    /// Current values.
    Current,
    /// A mask of the values that can be changed.
    Changeable,
    /// Default values.
    Default,
    /// Saved values.
    Saved,
}

/// A decoded command block. Allocation and parameter list lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command {
    /// TEST UNIT READY.
    TestUnitReady,
    /// REQUEST SENSE.
    RequestSense {
        /// Descriptor format is wanted.
        descriptor: bool,
        /// How much the initiator takes.
        allocation_length: u8,
    },
    /// INQUIRY.
    Inquiry {
        /// Page of vital product data; `None` for standard inquiry data.
        vpd_page: Option<u8>,
        /// How much the initiator takes.
        allocation_length: u16,
    },
    /// MODE SENSE (6) or (10).
    ModeSense {
        /// The 10-byte form, whose answer has the longer header.
        long: bool,
        /// Block descriptors are not wanted.
        no_block_descriptors: bool,
        /// Which values are wanted.
        page_control: PageControl,
        /// Page code; 0x3f asks for all pages.
        page: u8,
        /// Subpage code; 0xff asks for all subpages.
        subpage: u8,
        /// How much the initiator takes.
        allocation_length: u16,
    },
    /// START STOP UNIT.
    StartStopUnit {
        /// The initiator does not wait for the end.
        immediate: bool,
        /// Power condition to change to; zero means that `start` and `load_eject` count.
        power_condition: u8,
        /// Load or eject the medium.
        load_eject: bool,
        /// Start or stop the unit.
        start: bool,
    },
    /// READ CAPACITY (10).
    ReadCapacity10,
    /// READ CAPACITY (16).
    ReadCapacity16 {
        /// How much the initiator takes.
        allocation_length: u32,
    },
    /// REPORT LUNS.
    ReportLuns {
        /// Which logical units are wanted.
        select_report: u8,
        /// How much the initiator takes.
        allocation_length: u32,
    },
    /// READ (6), (10), (12) or (16). A count of zero reads nothing.
    Read {
        /// What to read.
        blocks: Blocks,
        /// Protection information wanted; zero if none.
        protect: u8,
        /// Data must come from the medium.
        force_unit_access: bool,
    },
    /// WRITE (6), (10), (12) or (16). A count of zero writes nothing.
    Write {
        /// What to write.
        blocks: Blocks,
        /// Protection information sent; zero if none.
        protect: u8,
        /// Data must reach the medium before the end of the command.
        force_unit_access: bool,
    },
    /// VERIFY (10), (12) or (16). A count of zero verifies nothing.
    Verify {
        /// What to verify.
        blocks: Blocks,
        /// Protection information; zero if none.
        protect: u8,
        /// What is compared: 0 nothing (only read), 1 all blocks, 3 all blocks with one that is
        /// sent.
        byte_check: u8,
    },
    /// WRITE SAME (10) or (16). A count of zero means all blocks up to the end of the unit.
    WriteSame {
        /// What to write.
        blocks: Blocks,
        /// Protection information; zero if none.
        protect: u8,
        /// The blocks may be unmapped instead.
        unmap: bool,
        /// The blocks shall be anchored.
        anchor: bool,
        /// No block is sent; zeros are written.
        no_data_out: bool,
    },
    /// UNMAP.
    Unmap {
        /// The blocks shall be anchored.
        anchor: bool,
        /// Size of the list of blocks that is sent.
        parameter_list_length: u16,
    },
    /// SYNCHRONIZE CACHE (10) or (16). A count of zero means all blocks up to the end of the unit.
    SynchronizeCache {
        /// What must reach the medium.
        blocks: Blocks,
        /// The initiator does not wait for the end.
        immediate: bool,
    },
}

/// Why a command block is not a [`Command`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CdbError {
    /// The operation code (or service action) is not one of [`Command`].
    UnknownOpcode(Opcode),
    /// The command block is shorter than its operation code requires, or a field has a value that
    /// the standard does not allow. `byte` is the position of that field.
    InvalidField {
        /// Position in the command block, in bytes.
        byte: u8,
    },
}

impl CdbError {
    /// The sense data for it.
    pub const fn sense(self) -> Sense {
        Sense::illegal_request(match self {
            Self::UnknownOpcode(_) => AdditionalSense::INVALID_OPCODE,
            Self::InvalidField { .. } => AdditionalSense::INVALID_FIELD_IN_CDB,
        })
    }
}

impl fmt::Display for CdbError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownOpcode(opcode) => write!(f, "SCSI command {opcode:?} is not supported"),
            Self::InvalidField { byte } => {
                write!(f, "invalid field in byte {byte} of SCSI command")
            }
        }
    }
}

impl core::error::Error for CdbError {}

/// A command block and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cdb {
    bytes: [u8; MAX_CDB_SIZE],
    len: usize,
}

impl Cdb {
    fn new<const N: usize>(bytes: [u8; N]) -> Self {
        let mut cdb = Self {
            bytes: [0; MAX_CDB_SIZE],
            len: N.min(MAX_CDB_SIZE),
        };
        for (to, from) in cdb.bytes.iter_mut().zip(bytes) {
            *to = from;
        }
        cdb
    }

    /// The command block: 6, 10 or 16 bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&self.bytes)
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|chunk| u16::from_be_bytes(*chunk))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|chunk| u32::from_be_bytes(*chunk))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|chunk| u64::from_be_bytes(*chunk))
}

/// The length of a command block by the group in its operation code (SPC-4 section 4.2.5.1).
const fn cdb_len(opcode: u8) -> Option<usize> {
    match opcode >> 5 {
        0 => Some(6),
        1 | 2 => Some(10),
        4 => Some(16),
        5 => Some(12),
        _ => None,
    }
}

impl Command {
    /// Decodes a command block. Bytes after its end are ignored.
    ///
    /// # Errors
    /// [`CdbError`]; its [`CdbError::sense`] is what the initiator gets.
    pub fn decode(cdb: &[u8]) -> Result<Self, CdbError> {
        let Some(&first) = cdb.first() else {
            return Err(CdbError::InvalidField { byte: 0 });
        };
        let opcode = Opcode::new(first);
        let unknown = CdbError::UnknownOpcode(opcode);
        let len = cdb_len(first).ok_or(unknown)?;
        let Some(cdb) = cdb.get(..len) else {
            let byte = u8::try_from(cdb.len()).unwrap_or(u8::MAX);
            return Err(CdbError::InvalidField { byte });
        };
        // The length is known now, so that `None` here stands for an operation code of another
        // length.
        Self::decode_fields(opcode, cdb).unwrap_or(Err(unknown))
    }

    fn decode_fields(opcode: Opcode, cdb: &[u8]) -> Option<Result<Self, CdbError>> {
        let invalid = |byte| Some(Err(CdbError::InvalidField { byte }));
        let byte = |at: usize| cdb.get(at).copied();
        let flags = byte(1)?;
        let protect = flags >> 5;
        let force_unit_access = flags & 0x08 != 0;
        let blocks10 = || {
            Some(Blocks {
                lba: be32(cdb, 2)?.into(),
                count: be16(cdb, 7)?.into(),
            })
        };
        let blocks12 = || {
            Some(Blocks {
                lba: be32(cdb, 2)?.into(),
                count: be32(cdb, 6)?,
            })
        };
        let blocks16 = || {
            Some(Blocks {
                lba: be64(cdb, 2)?,
                count: be32(cdb, 10)?,
            })
        };
        let blocks6 = || {
            Some(Blocks {
                lba: u64::from(be32(cdb, 0)? & 0x1f_ffff),
                // In this form only, zero stands for 256.
                count: match byte(4)? {
                    0 => 256,
                    count => count.into(),
                },
            })
        };
        let read = |blocks, protect, force_unit_access| Self::Read {
            blocks,
            protect,
            force_unit_access,
        };
        let write = |blocks, protect, force_unit_access| Self::Write {
            blocks,
            protect,
            force_unit_access,
        };
        let verify = |blocks| Self::Verify {
            blocks,
            protect,
            byte_check: (flags >> 1) & 3,
        };
        let synchronize_cache = |blocks| Self::SynchronizeCache {
            blocks,
            immediate: flags & 0x02 != 0,
        };
        let write_same = |blocks, no_data_out| Self::WriteSame {
            blocks,
            protect,
            unmap: flags & 0x08 != 0,
            anchor: flags & 0x10 != 0,
            no_data_out,
        };
        let mode_sense = |long, allocation_length| {
            Some(Self::ModeSense {
                long,
                no_block_descriptors: flags & 0x08 != 0,
                page_control: match byte(2)? >> 6 {
                    0 => PageControl::Current,
                    1 => PageControl::Changeable,
                    2 => PageControl::Default,
                    _ => PageControl::Saved,
                },
                page: byte(2)? & 0x3f,
                subpage: byte(3)?,
                allocation_length,
            })
        };
        let command = match opcode {
            Opcode::TEST_UNIT_READY => Self::TestUnitReady,
            Opcode::REQUEST_SENSE => Self::RequestSense {
                descriptor: flags & 1 != 0,
                allocation_length: byte(4)?,
            },
            Opcode::INQUIRY => {
                // The bit for command support data is obsolete and must be zero.
                if flags & 0x02 != 0 {
                    return invalid(1);
                }
                let vpd = flags & 0x01 != 0;
                let page = byte(2)?;
                if !vpd && page != 0 {
                    return invalid(2);
                }
                Self::Inquiry {
                    vpd_page: vpd.then_some(page),
                    allocation_length: be16(cdb, 3)?,
                }
            }
            Opcode::MODE_SENSE_6 => mode_sense(false, byte(4)?.into())?,
            Opcode::MODE_SENSE_10 => mode_sense(true, be16(cdb, 7)?)?,
            Opcode::START_STOP_UNIT => Self::StartStopUnit {
                immediate: flags & 1 != 0,
                power_condition: byte(4)? >> 4,
                load_eject: byte(4)? & 2 != 0,
                start: byte(4)? & 1 != 0,
            },
            Opcode::READ_CAPACITY_10 => {
                // Without the obsolete partial medium indicator, the address must be zero.
                if byte(8)? & 1 != 0 {
                    return invalid(8);
                }
                if be32(cdb, 2)? != 0 {
                    return invalid(2);
                }
                Self::ReadCapacity10
            }
            Opcode::SERVICE_ACTION_IN_16 if flags & 0x1f == READ_CAPACITY_16 => {
                if byte(14)? & 1 != 0 {
                    return invalid(14);
                }
                if be64(cdb, 2)? != 0 {
                    return invalid(2);
                }
                Self::ReadCapacity16 {
                    allocation_length: be32(cdb, 10)?,
                }
            }
            Opcode::REPORT_LUNS => Self::ReportLuns {
                select_report: byte(2)?,
                allocation_length: be32(cdb, 6)?,
            },
            Opcode::READ_6 => read(blocks6()?, 0, false),
            Opcode::READ_10 => read(blocks10()?, protect, force_unit_access),
            Opcode::READ_12 => read(blocks12()?, protect, force_unit_access),
            Opcode::READ_16 => read(blocks16()?, protect, force_unit_access),
            Opcode::WRITE_6 => write(blocks6()?, 0, false),
            Opcode::WRITE_10 => write(blocks10()?, protect, force_unit_access),
            Opcode::WRITE_12 => write(blocks12()?, protect, force_unit_access),
            Opcode::WRITE_16 => write(blocks16()?, protect, force_unit_access),
            Opcode::VERIFY_10 => verify(blocks10()?),
            Opcode::VERIFY_12 => verify(blocks12()?),
            Opcode::VERIFY_16 => verify(blocks16()?),
            Opcode::SYNCHRONIZE_CACHE_10 => synchronize_cache(blocks10()?),
            Opcode::SYNCHRONIZE_CACHE_16 => synchronize_cache(blocks16()?),
            Opcode::WRITE_SAME_10 => write_same(blocks10()?, false),
            Opcode::WRITE_SAME_16 => write_same(blocks16()?, flags & 1 != 0),
            Opcode::UNMAP => Self::Unmap {
                anchor: flags & 1 != 0,
                parameter_list_length: be16(cdb, 7)?,
            },
            _ => return None,
        };
        if let Self::Verify { byte_check: 2, .. } = command {
            return invalid(1);
        }
        Some(Ok(command))
    }

    /// Encodes the command in its shortest form; block commands never use those of 6 and 12 bytes.
    ///
    /// Fields that are wider than their place in the command block lose their upper bits.
    pub fn encode(&self) -> Cdb {
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        match *self {
            Self::TestUnitReady => Cdb::new([Opcode::TEST_UNIT_READY.get(), 0, 0, 0, 0, 0]),
            Self::RequestSense {
                descriptor,
                allocation_length,
            } => Cdb::new([
                Opcode::REQUEST_SENSE.get(),
                bit(descriptor, 1),
                0,
                0,
                allocation_length,
                0,
            ]),
            Self::Inquiry {
                vpd_page,
                allocation_length,
            } => {
                let [high, low] = allocation_length.to_be_bytes();
                Cdb::new([
                    Opcode::INQUIRY.get(),
                    bit(vpd_page.is_some(), 1),
                    vpd_page.unwrap_or(0),
                    high,
                    low,
                    0,
                ])
            }
            Self::ModeSense {
                long,
                no_block_descriptors,
                page_control,
                page,
                subpage,
                allocation_length,
            } => {
                let flags = bit(no_block_descriptors, 0x08);
                let control = match page_control {
                    PageControl::Current => 0,
                    PageControl::Changeable => 0x40,
                    PageControl::Default => 0x80,
                    PageControl::Saved => 0xc0,
                };
                let page = control | (page & 0x3f);
                let [high, low] = allocation_length.to_be_bytes();
                if long {
                    let opcode = Opcode::MODE_SENSE_10.get();
                    Cdb::new([opcode, flags, page, subpage, 0, 0, 0, high, low, 0])
                } else {
                    Cdb::new([Opcode::MODE_SENSE_6.get(), flags, page, subpage, low, 0])
                }
            }
            Self::StartStopUnit {
                immediate,
                power_condition,
                load_eject,
                start,
            } => Cdb::new([
                Opcode::START_STOP_UNIT.get(),
                bit(immediate, 1),
                0,
                0,
                (power_condition << 4) | bit(load_eject, 2) | bit(start, 1),
                0,
            ]),
            Self::ReadCapacity10 => {
                let blocks = Blocks { lba: 0, count: 0 };
                cdb10(Opcode::READ_CAPACITY_10, 0, blocks)
            }
            Self::ReadCapacity16 { allocation_length } => {
                let blocks = Blocks {
                    lba: 0,
                    count: allocation_length,
                };
                cdb16(Opcode::SERVICE_ACTION_IN_16, READ_CAPACITY_16, blocks)
            }
            Self::ReportLuns {
                select_report,
                allocation_length,
            } => {
                let opcode = Opcode::REPORT_LUNS.get();
                let [a, b, c, d] = allocation_length.to_be_bytes();
                Cdb::new([opcode, 0, select_report, 0, 0, 0, a, b, c, d, 0, 0])
            }
            Self::Read {
                blocks,
                protect,
                force_unit_access,
            } => {
                let flags = (protect << 5) | bit(force_unit_access, 0x08);
                cdb10_or_16(Opcode::READ_10, Opcode::READ_16, flags, blocks)
            }
            Self::Write {
                blocks,
                protect,
                force_unit_access,
            } => {
                let flags = (protect << 5) | bit(force_unit_access, 0x08);
                cdb10_or_16(Opcode::WRITE_10, Opcode::WRITE_16, flags, blocks)
            }
            Self::Verify {
                blocks,
                protect,
                byte_check,
            } => {
                let flags = (protect << 5) | ((byte_check & 3) << 1);
                cdb10_or_16(Opcode::VERIFY_10, Opcode::VERIFY_16, flags, blocks)
            }
            Self::WriteSame {
                blocks,
                protect,
                unmap,
                anchor,
                no_data_out,
            } => {
                let flags = (protect << 5) | bit(anchor, 0x10) | bit(unmap, 0x08);
                if no_data_out {
                    return cdb16(Opcode::WRITE_SAME_16, flags | 1, blocks);
                }
                cdb10_or_16(Opcode::WRITE_SAME_10, Opcode::WRITE_SAME_16, flags, blocks)
            }
            Self::Unmap {
                anchor,
                parameter_list_length,
            } => {
                let blocks = Blocks {
                    lba: 0,
                    count: parameter_list_length.into(),
                };
                cdb10(Opcode::UNMAP, bit(anchor, 1), blocks)
            }
            Self::SynchronizeCache { blocks, immediate } => cdb10_or_16(
                Opcode::SYNCHRONIZE_CACHE_10,
                Opcode::SYNCHRONIZE_CACHE_16,
                bit(immediate, 2),
                blocks,
            ),
        }
    }

    /// Where the data of the command goes.
    pub fn direction(&self) -> Direction {
        match self {
            Self::TestUnitReady
            | Self::StartStopUnit { .. }
            | Self::SynchronizeCache { .. }
            | Self::Verify { byte_check: 0, .. }
            | Self::WriteSame {
                no_data_out: true, ..
            } => Direction::None,
            Self::RequestSense { .. }
            | Self::Inquiry { .. }
            | Self::ModeSense { .. }
            | Self::ReadCapacity10
            | Self::ReadCapacity16 { .. }
            | Self::ReportLuns { .. }
            | Self::Read { .. } => Direction::In,
            Self::Write { .. }
            | Self::Verify { .. }
            | Self::WriteSame { .. }
            | Self::Unmap { .. } => Direction::Out,
        }
    }
}

fn cdb10(opcode: Opcode, flags: u8, blocks: Blocks) -> Cdb {
    let [.., a, b, c, d] = blocks.lba.to_be_bytes();
    let [.., high, low] = blocks.count.to_be_bytes();
    Cdb::new([opcode.get(), flags, a, b, c, d, 0, high, low, 0])
}

fn cdb16(opcode: Opcode, flags: u8, blocks: Blocks) -> Cdb {
    let [a, b, c, d, e, f, g, h] = blocks.lba.to_be_bytes();
    let [i, j, k, l] = blocks.count.to_be_bytes();
    Cdb::new([
        opcode.get(),
        flags,
        a,
        b,
        c,
        d,
        e,
        f,
        g,
        h,
        i,
        j,
        k,
        l,
        0,
        0,
    ])
}

fn cdb10_or_16(short: Opcode, long: Opcode, flags: u8, blocks: Blocks) -> Cdb {
    if u32::try_from(blocks.lba).is_ok() && u16::try_from(blocks.count).is_ok() {
        cdb10(short, flags, blocks)
    } else {
        cdb16(long, flags, blocks)
    }
}

#[cfg(test)]
mod tests;
