// SPDX-License-Identifier: MIT OR Apache-2.0

//! A logical unit: a direct-access block device on a disk image (SBC-3).

use super::inquiry::{self, Facts, MAX_UNMAP_BLOCKS, MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME_BLOCKS};
use super::{Completion, Data, mode};
use crate::disk::{Disk, DiskError, FaultInjector, IoBuf, OpenDisk};
use hv_proto::scsi::{AdditionalSense, Blocks, Command, Sense, SenseKey};
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most bytes of one VERIFY, so that no command runs for minutes.
const MAX_VERIFY: u64 = 1 << 30;

/// Piece by which VERIFY and WRITE SAME work, in bytes.
const PIECE: u64 = 1 << 20;

/// What a logical unit has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct UnitCounters {
    /// Commands of any kind.
    pub commands: u64,
    /// Bytes read by READ commands.
    pub read_bytes: u64,
    /// Bytes written by WRITE commands.
    pub written_bytes: u64,
    /// SYNCHRONIZE CACHE commands and forced writes.
    pub flushes: u64,
    /// Commands that ended in CHECK CONDITION.
    pub check_conditions: u64,
}

#[derive(Default)]
struct Counters {
    commands: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    check_conditions: AtomicU64,
    /// Failures of the image, on the host's side.
    host_errors: AtomicU64,
}

/// A direct-access block device.
///
/// Commands may be executed by many threads at once; they are not ordered among each other, which
/// the control mode page says. SYNCHRONIZE CACHE covers every write whose completion was returned
/// before it began.
pub struct LogicalUnit {
    disk: OpenDisk,
    serial: String,
    max_transfer: u32,
    /// Unit attention conditions that the guest has not seen yet, the oldest first, each at most
    /// once.
    attentions: Mutex<VecDeque<AdditionalSense>>,
    counters: Counters,
}

impl LogicalUnit {
    /// A unit on `disk` behind a controller that moves at most `max_transfer` bytes a command.
    ///
    /// There is no power-on attention: Hyper-V's disks have none, and Linux prints a warning.
    pub fn new(disk: OpenDisk, max_transfer: u32) -> Self {
        let serial = disk.serial.clone().unwrap_or_else(|| {
            disk.identity
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect()
        });
        Self {
            disk,
            serial,
            max_transfer,
            attentions: Mutex::new(VecDeque::new()),
            counters: Counters::default(),
        }
    }

    /// The disk, to inject faults.
    pub fn disk(&self) -> &FaultInjector {
        &self.disk.disk
    }

    /// What was done so far.
    pub fn counters(&self) -> UnitCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        UnitCounters {
            commands: get(&self.counters.commands),
            read_bytes: get(&self.counters.read_bytes),
            written_bytes: get(&self.counters.written_bytes),
            flushes: get(&self.counters.flushes),
            check_conditions: get(&self.counters.check_conditions),
        }
    }

    /// Changes the size of the disk; the guest hears of it with its next command.
    ///
    /// # Errors
    /// As for [`Disk::resize`], and if the size is zero or not a multiple of the block size.
    pub fn resize(&self, size: u64) -> Result<(), DiskError> {
        if size == 0 || !size.is_multiple_of(self.block_size()) {
            return Err(DiskError::Unsupported(format!(
                "{size} bytes are not a whole number of blocks of {} bytes",
                self.block_size()
            )));
        }
        self.disk.disk.resize(size)?;
        self.raise(AdditionalSense::CAPACITY_CHANGED);
        Ok(())
    }

    /// A reset: what was pending is forgotten, and the guest hears of the reset.
    pub fn reset(&self) {
        self.attentions().clear();
        self.raise(AdditionalSense::POWER_ON_OR_RESET);
    }

    fn attentions(&self) -> MutexGuard<'_, VecDeque<AdditionalSense>> {
        // A list of numbers is always consistent.
        self.attentions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn raise(&self, condition: AdditionalSense) {
        let mut attentions = self.attentions();
        if !attentions.contains(&condition) {
            attentions.push_back(condition);
        }
    }

    fn block_size(&self) -> u64 {
        self.disk.blocks.logical.into()
    }

    fn block_count(&self) -> u64 {
        self.disk.disk.size() / self.block_size()
    }

    /// Executes a command block.
    pub fn execute(&self, cdb: &[u8], data: Data<'_>) -> Completion {
        self.counters.commands.fetch_add(1, Ordering::Relaxed);
        let completion = self.dispatch(cdb, data);
        if completion.sense.is_some() {
            self.counters
                .check_conditions
                .fetch_add(1, Ordering::Relaxed);
        }
        completion
    }

    fn dispatch(&self, cdb: &[u8], data: Data<'_>) -> Completion {
        let command = Command::decode(cdb);
        // A unit attention takes the place of any other answer, but for the commands that find
        // out about a device, and for REQUEST SENSE, which reports it as its data.
        if !matches!(
            command,
            Ok(Command::Inquiry { .. } | Command::ReportLuns { .. } | Command::RequestSense { .. })
        ) && let Some(condition) = self.attentions().pop_front()
        {
            return Completion::check(Sense::unit_attention(condition));
        }
        let command = match command {
            Ok(command) => command,
            Err(error) => return Completion::check(error.sense()),
        };
        self.perform(command, data)
            .unwrap_or_else(Completion::check)
    }

    fn perform(&self, command: Command, data: Data<'_>) -> Result<Completion, Sense> {
        match command {
            // A virtual disk is always ready and has no motor.
            Command::TestUnitReady => Ok(Completion::good(0)),
            Command::StartStopUnit {
                power_condition: 0,
                load_eject: false,
                ..
            } => Ok(Completion::good(0)),
            Command::StartStopUnit { .. } => Err(invalid_field()),
            Command::RequestSense {
                descriptor,
                allocation_length,
            } => Ok(self.request_sense(descriptor, allocation_length, &data.into_in())),
            Command::Inquiry {
                vpd_page,
                allocation_length,
            } => self.inquiry(vpd_page, allocation_length, &data.into_in()),
            Command::ModeSense {
                long,
                no_block_descriptors,
                page_control,
                page,
                subpage,
                allocation_length,
            } => {
                let request = mode::Request {
                    long,
                    no_block_descriptors,
                    page_control,
                    page,
                    subpage,
                    read_only: self.disk.disk.read_only(),
                    blocks: self.block_count(),
                    block_size: self.disk.blocks.logical,
                };
                let response = mode::sense(&request).map_err(Sense::illegal_request)?;
                Ok(Completion::respond(
                    &data.into_in(),
                    &response,
                    allocation_length.into(),
                ))
            }
            Command::ReadCapacity10 => {
                let last = self.block_count().saturating_sub(1);
                let mut response = u32::try_from(last)
                    .unwrap_or(u32::MAX)
                    .to_be_bytes()
                    .to_vec();
                response.extend_from_slice(&self.disk.blocks.logical.to_be_bytes());
                Ok(Completion::respond(&data.into_in(), &response, 8))
            }
            Command::ReadCapacity16 { allocation_length } => Ok(Completion::respond(
                &data.into_in(),
                &self.capacity(),
                allocation_length as usize,
            )),
            Command::Read {
                blocks, protect, ..
            } => self.read(blocks, protect, &data.into_in()),
            Command::Write {
                blocks,
                protect,
                force_unit_access,
            } => self.write(blocks, protect, force_unit_access, &data.into_out()),
            Command::Verify {
                blocks,
                protect,
                byte_check,
            } => self.verify(blocks, protect, byte_check, &data.into_out()),
            Command::WriteSame {
                blocks,
                protect,
                unmap,
                anchor,
                no_data_out,
            } => {
                if protect != 0 || anchor {
                    return Err(invalid_field());
                }
                self.write_same(blocks, unmap, no_data_out, &data.into_out())
            }
            Command::Unmap {
                anchor,
                parameter_list_length,
            } => {
                if anchor {
                    return Err(invalid_field());
                }
                self.unmap(parameter_list_length.into(), &data.into_out())
            }
            Command::SynchronizeCache { blocks, .. } => {
                // All of the cache is written, and before the end of the command in any case.
                let rest = self.block_count().saturating_sub(blocks.lba);
                self.range(blocks.lba, u64::from(blocks.count).min(rest))?;
                if u64::from(blocks.count) > rest {
                    return Err(out_of_range(blocks.lba));
                }
                self.flush()?;
                Ok(Completion::good(0))
            }
            // REPORT LUNS is the target's; everything else is not supported.
            _ => Err(Sense::illegal_request(AdditionalSense::INVALID_OPCODE)),
        }
    }

    fn request_sense(
        &self,
        descriptor: bool,
        allocation_length: u8,
        buf: &IoBuf<'_>,
    ) -> Completion {
        let sense = match self.attentions().pop_front() {
            Some(condition) => Sense::unit_attention(condition),
            None => Sense::new(SenseKey::NO_SENSE, AdditionalSense::NONE),
        };
        if descriptor {
            let (bytes, len) = sense.to_descriptor();
            let bytes = bytes.get(..len).unwrap_or(&bytes);
            Completion::respond(buf, bytes, allocation_length.into())
        } else {
            Completion::respond(buf, &sense.to_fixed(), allocation_length.into())
        }
    }

    fn inquiry(
        &self,
        vpd_page: Option<u8>,
        allocation_length: u16,
        buf: &IoBuf<'_>,
    ) -> Result<Completion, Sense> {
        let facts = Facts {
            logical: self.disk.blocks.logical,
            physical: self.disk.blocks.physical,
            max_transfer: self.max_transfer,
            identity: &self.disk.identity,
            serial: &self.serial,
        };
        let response = match vpd_page {
            None => inquiry::standard().to_vec(),
            Some(page) => inquiry::vpd(page, &facts).ok_or_else(invalid_field)?,
        };
        Ok(Completion::respond(
            buf,
            &response,
            allocation_length.into(),
        ))
    }

    /// Parameter data of READ CAPACITY (16).
    fn capacity(&self) -> [u8; 32] {
        let blocks = self.disk.blocks;
        let mut data = [0; 32];
        let last = self.block_count().saturating_sub(1);
        data[..8].copy_from_slice(&last.to_be_bytes());
        data[8..12].copy_from_slice(&blocks.logical.to_be_bytes());
        // Exponent of logical blocks a physical block: at most 11 by the limits of the options.
        data[13] = (blocks.physical / blocks.logical).ilog2() as u8;
        data[14] = 0xc0; // Blocks can be unmapped, and then read as zeroes.
        data
    }

    /// Checks a range of blocks; its place and length in bytes.
    fn range(&self, lba: u64, count: u64) -> Result<(u64, u64), Sense> {
        match lba.checked_add(count) {
            Some(end) if end <= self.block_count() => {
                Ok((lba * self.block_size(), count * self.block_size()))
            }
            _ => Err(out_of_range(lba)),
        }
    }

    fn check_writable(&self) -> Result<(), Sense> {
        if self.disk.disk.read_only() {
            return Err(write_protected());
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), Sense> {
        self.counters.flushes.fetch_add(1, Ordering::Relaxed);
        self.disk
            .disk
            .flush()
            .map_err(|error| self.sense_of(&error, AdditionalSense::WRITE_ERROR))
    }

    fn read(&self, blocks: Blocks, protect: u8, buf: &IoBuf<'_>) -> Result<Completion, Sense> {
        if protect != 0 {
            return Err(invalid_field());
        }
        let (offset, len) = self.range(blocks.lba, blocks.count.into())?;
        // Whole sectors only: what a buffer has beyond them stays as it is.
        let fitting = (buf.len() as u64).min(len) / crate::disk::SECTOR * crate::disk::SECTOR;
        self.disk
            .disk
            .read_at(offset, &buf.range(0, fitting as usize))
            .map_err(|error| self.sense_of(&error, AdditionalSense::UNRECOVERED_READ_ERROR))?;
        self.counters
            .read_bytes
            .fetch_add(fitting, Ordering::Relaxed);
        Ok(if fitting < len {
            Completion::overrun(fitting as usize)
        } else {
            Completion::good(fitting as usize)
        })
    }

    fn write(
        &self,
        blocks: Blocks,
        protect: u8,
        force: bool,
        buf: &IoBuf<'_>,
    ) -> Result<Completion, Sense> {
        if protect != 0 {
            return Err(invalid_field());
        }
        let (offset, len) = self.range(blocks.lba, blocks.count.into())?;
        self.check_writable()?;
        if (buf.len() as u64) < len {
            return Ok(Completion::overrun(0));
        }
        self.disk
            .disk
            .write_at(offset, &buf.range(0, len as usize))
            .map_err(|error| self.sense_of(&error, AdditionalSense::WRITE_ERROR))?;
        self.counters
            .written_bytes
            .fetch_add(len, Ordering::Relaxed);
        if force {
            self.flush()?;
        }
        Ok(Completion::good(len as usize))
    }

    fn verify(
        &self,
        blocks: Blocks,
        protect: u8,
        byte_check: u8,
        buf: &IoBuf<'_>,
    ) -> Result<Completion, Sense> {
        if protect != 0 || byte_check > 1 {
            return Err(invalid_field());
        }
        let (offset, len) = self.range(blocks.lba, blocks.count.into())?;
        if len > MAX_VERIFY {
            return Err(invalid_field());
        }
        let compare = byte_check == 1;
        if compare && (buf.len() as u64) < len {
            return Ok(Completion::overrun(0));
        }
        let mut bytes = vec![0; len.min(PIECE) as usize];
        let mut expected = vec![0; if compare { bytes.len() } else { 0 }];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(PIECE) as usize;
            self.disk
                .disk
                .read_at(offset + done, &IoBuf::from_slice(&mut bytes[..n]))
                .map_err(|error| self.sense_of(&error, AdditionalSense::UNRECOVERED_READ_ERROR))?;
            if compare {
                buf.read(done as usize, &mut expected[..n]);
                if bytes[..n] != expected[..n] {
                    return Err(Sense::new(
                        SenseKey::MISCOMPARE,
                        AdditionalSense::MISCOMPARE_DURING_VERIFY,
                    ));
                }
            }
            done += n as u64;
        }
        Ok(Completion::good(if compare { len as usize } else { 0 }))
    }

    fn write_same(
        &self,
        blocks: Blocks,
        unmap: bool,
        no_data_out: bool,
        buf: &IoBuf<'_>,
    ) -> Result<Completion, Sense> {
        if blocks.count == 0 || blocks.count > MAX_WRITE_SAME_BLOCKS {
            return Err(invalid_field());
        }
        let (offset, len) = self.range(blocks.lba, blocks.count.into())?;
        self.check_writable()?;
        let mut block = vec![0; self.block_size() as usize];
        let used = if no_data_out {
            0
        } else {
            if buf.len() < block.len() {
                return Ok(Completion::overrun(0));
            }
            buf.read(0, &mut block)
        };
        let failed = |error| self.sense_of(&error, AdditionalSense::WRITE_ERROR);
        if block.iter().all(|&byte| byte == 0) {
            self.disk.disk.zero_at(offset, len, unmap).map_err(failed)?;
        } else {
            let mut pattern = block.repeat((len.min(PIECE) / self.block_size()) as usize);
            let mut done = 0;
            while done < len {
                let n = (len - done).min(pattern.len() as u64);
                self.disk
                    .disk
                    .write_at(
                        offset + done,
                        &IoBuf::from_slice(&mut pattern[..n as usize]),
                    )
                    .map_err(failed)?;
                done += n;
            }
        }
        Ok(Completion::good(used))
    }

    /// UNMAP (SBC-3 section 5.28): a header of 8 bytes, then descriptors of 16.
    fn unmap(&self, list_length: usize, buf: &IoBuf<'_>) -> Result<Completion, Sense> {
        self.check_writable()?;
        if list_length == 0 {
            return Ok(Completion::good(0));
        }
        if buf.len() < list_length {
            return Ok(Completion::overrun(0));
        }
        if list_length < 8 {
            return Err(Sense::illegal_request(
                AdditionalSense::PARAMETER_LIST_LENGTH_ERROR,
            ));
        }
        // At most 64 KiB, by the width of the length.
        let list = buf.range(0, list_length).to_vec();
        let field = || Sense::illegal_request(AdditionalSense::INVALID_FIELD_IN_PARAMETER_LIST);
        let described = usize::from(u16::from_be_bytes([list[2], list[3]]));
        let descriptors = &list[8..];
        let descriptors = descriptors.get(..described).unwrap_or(descriptors);
        let mut ranges = Vec::new();
        let mut total = 0u64;
        for descriptor in descriptors.chunks_exact(16) {
            let (lba, rest) = descriptor.split_first_chunk().ok_or_else(field)?;
            let (count, _) = rest.split_first_chunk().ok_or_else(field)?;
            let count = u64::from(u32::from_be_bytes(*count));
            total += count;
            ranges.push(self.range(u64::from_be_bytes(*lba), count)?);
        }
        if ranges.len() > MAX_UNMAP_DESCRIPTORS as usize || total > MAX_UNMAP_BLOCKS.into() {
            return Err(field());
        }
        for (offset, len) in ranges {
            self.disk
                .disk
                .zero_at(offset, len, true)
                .map_err(|error| self.sense_of(&error, AdditionalSense::WRITE_ERROR))?;
        }
        Ok(Completion::good(list_length))
    }

    /// The sense data for a failure of the disk; `medium` is the condition of a bad medium.
    fn sense_of(&self, error: &DiskError, medium: AdditionalSense) -> Sense {
        let sense = Sense::new(SenseKey::MEDIUM_ERROR, medium);
        match error {
            // Injected on purpose, so not worth a line in the log.
            DiskError::Medium { offset } => sense.with_information(offset / self.block_size()),
            DiskError::ReadOnly => write_protected(),
            DiskError::OutOfRange { offset, .. } => out_of_range(offset / self.block_size()),
            _ => {
                // The first one, and then ever more rarely: a guest can repeat it for ever.
                let times = self.counters.host_errors.fetch_add(1, Ordering::Relaxed) + 1;
                if times.is_power_of_two() {
                    tracing::warn!(disk = self.serial, times, %error, "the image failed");
                }
                if error.is_no_space() {
                    Sense::new(
                        SenseKey::DATA_PROTECT,
                        AdditionalSense::SPACE_ALLOCATION_FAILED,
                    )
                } else if matches!(error, DiskError::Io(_)) {
                    sense
                } else {
                    Sense::new(
                        SenseKey::HARDWARE_ERROR,
                        AdditionalSense::INTERNAL_TARGET_FAILURE,
                    )
                }
            }
        }
    }
}

fn invalid_field() -> Sense {
    Sense::illegal_request(AdditionalSense::INVALID_FIELD_IN_CDB)
}

fn out_of_range(lba: u64) -> Sense {
    Sense::illegal_request(AdditionalSense::LBA_OUT_OF_RANGE).with_information(lba)
}

fn write_protected() -> Sense {
    Sense::new(SenseKey::DATA_PROTECT, AdditionalSense::WRITE_PROTECTED)
}
