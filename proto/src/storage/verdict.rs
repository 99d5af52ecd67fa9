// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What an answer means for the command: status, sense data, residue, and what is to be done.

use super::{ScsiRequest, SrbCode, SENSE_SIZE};
use crate::scsi::{AdditionalSense, Opcode, ScsiStatus, Sense, SenseKey};

/// What [`judge`] must know of a command that was sent. From the guest's own memory, not from the
/// answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SentCommand {
    /// Its operation code.
    pub opcode: Opcode,
    /// Size of its data, in bytes.
    pub data_length: u32,
    /// It has failed if less than this was transferred, in bytes; zero if less is fine.
    pub min_transfer: u32,
}

/// What the guest must do with a command whose answer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Finish it with this SCSI status, and with the sense data of the verdict for CHECK CONDITION.
    Finish(ScsiStatus),
    /// The logical unit has changed: look at it anew, and run the command again.
    RescanAndRequeue,
    /// The logical unit is not there: fail the command without retry, and remove the unit.
    RemoveLun,
    /// Finish an ATA command with this SCSI status, without any error handling: who sent it knows
    /// what to do.
    PassThrough(ScsiStatus),
    /// The command failed, and nothing is known about why: the caller may retry a few times.
    Fail,
}

/// Judgement of the answer to a SCSI command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What to do.
    pub action: Action,
    /// How much of the data was not transferred, in bytes; at most the length of the data.
    pub residual: u32,
    /// Sense data for the caller: the first [`Verdict::sense_length`] bytes.
    sense: [u8; SENSE_SIZE],
    sense_length: usize,
}

impl Verdict {
    /// Sense data for the caller; empty if there is none.
    pub fn sense(&self) -> &[u8] {
        self.sense.get(..self.sense_length).unwrap_or_default()
    }

    fn with_sense(mut self, sense: &[u8]) -> Self {
        for (to, from) in self.sense.iter_mut().zip(sense) {
            *to = *from;
        }
        self.sense_length = sense.len().min(SENSE_SIZE);
        self
    }
}

/// Judges the answer to a SCSI command.
///
/// The rules, in this order:
/// - Sense data counts only if the host says that there is some, its length is not zero, and it is
///   well-formed. With it, an error is a CHECK CONDITION whatever the SCSI status says: an error
///   never becomes a success.
/// - A unit attention about the capacity, or about changed operating conditions other than inquiry
///   data and the list of units, makes the guest rescan the unit and run the command again.
/// - Without sense data, the request status decides. INQUIRY, MODE SENSE, MAINTENANCE IN and
///   PERSISTENT RESERVE IN, of which hosts do not know all pages, then fail as an unsupported
///   request, which is not retried.
/// - Data that the host says it transferred counts only after success, after an overrun, and after
///   a recovered error; and never more than was asked for.
pub fn judge(sent: &SentCommand, answer: &ScsiRequest) -> Verdict {
    let code = answer.srb_status.code();
    let status = answer.scsi_status;
    let transferred = answer.data_transfer_length.get().min(sent.data_length);
    let finish = |action, transferred: u32| Verdict {
        action,
        residual: sent.data_length.saturating_sub(transferred),
        sense: [0; SENSE_SIZE],
        sense_length: 0,
    };

    let failed = code != SrbCode::SUCCESS || status == ScsiStatus::CHECK_CONDITION;
    if let Some(sense) = Sense::parse(answer.sense()).filter(|_| failed && !is_unit_missing(code)) {
        if asks_for_rescan(&sense) {
            return finish(Action::RescanAndRequeue, 0);
        }
        let transferred = match sense.key {
            SenseKey::RECOVERED_ERROR => transferred,
            _ if code == SrbCode::DATA_OVERRUN => transferred,
            _ => 0,
        };
        let finished = finish(Action::Finish(ScsiStatus::CHECK_CONDITION), transferred);
        return finished.with_sense(answer.sense());
    }

    match code {
        code if is_unit_missing(code) => finish(Action::RemoveLun, 0),
        // What the device itself says about trying later or about reservations is better than
        // "failed".
        _ if is_flow_control(status) => finish(Action::Finish(status), 0),
        SrbCode::SUCCESS | SrbCode::DATA_OVERRUN
            if matches!(status, ScsiStatus::GOOD | ScsiStatus::CONDITION_MET) =>
        {
            // Reads and writes know exactly how much they want, so for them an overrun is an error.
            if (code == SrbCode::DATA_OVERRUN && moves_blocks(sent.opcode))
                || transferred < sent.min_transfer
            {
                return finish(Action::Fail, transferred);
            }
            finish(Action::Finish(status), transferred)
        }
        SrbCode::BUSY => finish(Action::Finish(ScsiStatus::BUSY), 0),
        _ => match sent.opcode {
            Opcode::ATA_PASS_THROUGH_12 | Opcode::ATA_PASS_THROUGH_16
                if status != ScsiStatus::GOOD =>
            {
                finish(Action::PassThrough(status), 0)
            }
            // Hosts answer this without sense data when a removable device has no medium; the
            // caller asks for the sense data then.
            Opcode::TEST_UNIT_READY if status == ScsiStatus::CHECK_CONDITION => {
                finish(Action::Finish(status), 0)
            }
            Opcode::INQUIRY
            | Opcode::MODE_SENSE_6
            | Opcode::MODE_SENSE_10
            | Opcode::MAINTENANCE_IN
            | Opcode::PERSISTENT_RESERVE_IN
                if is_refusal(code) =>
            {
                let sense =
                    Sense::illegal_request(AdditionalSense::INVALID_FIELD_IN_CDB).to_fixed();
                finish(Action::Finish(ScsiStatus::CHECK_CONDITION), 0).with_sense(&sense)
            }
            _ => finish(Action::Fail, 0),
        },
    }
}

/// Whether the request status says that there is nothing at the address of the command.
fn is_unit_missing(code: SrbCode) -> bool {
    matches!(
        code,
        SrbCode::INVALID_LUN
            | SrbCode::INVALID_TARGET_ID
            | SrbCode::INVALID_PATH_ID
            | SrbCode::NO_DEVICE
            | SrbCode::NO_HBA
    )
}

/// Whether the request status can mean that the host does not support the command.
fn is_refusal(code: SrbCode) -> bool {
    matches!(
        code,
        SrbCode::SUCCESS
            | SrbCode::ERROR
            | SrbCode::INVALID_REQUEST
            | SrbCode::BAD_FUNCTION
            | SrbCode::INTERNAL_ERROR
    )
}

/// Whether the device says by its status alone what to do.
fn is_flow_control(status: ScsiStatus) -> bool {
    matches!(
        status,
        ScsiStatus::BUSY
            | ScsiStatus::TASK_SET_FULL
            | ScsiStatus::RESERVATION_CONFLICT
            | ScsiStatus::ACA_ACTIVE
            | ScsiStatus::TASK_ABORTED
    )
}

/// Whether a unit attention tells that something has changed which the guest has stored.
fn asks_for_rescan(sense: &Sense) -> bool {
    if sense.key != SenseKey::UNIT_ATTENTION || sense.deferred {
        return false;
    }
    let additional = sense.additional;
    let operating_conditions = AdditionalSense::OPERATING_CONDITIONS_CHANGED.asc;
    additional == AdditionalSense::CAPACITY_CHANGED
        || (additional.asc == operating_conditions
            && additional != AdditionalSense::INQUIRY_DATA_CHANGED
            && additional != AdditionalSense::REPORTED_LUNS_CHANGED)
}

/// Whether a command reads or writes blocks.
fn moves_blocks(opcode: Opcode) -> bool {
    matches!(
        opcode,
        Opcode::READ_6
            | Opcode::READ_10
            | Opcode::READ_12
            | Opcode::READ_16
            | Opcode::WRITE_6
            | Opcode::WRITE_10
            | Opcode::WRITE_12
            | Opcode::WRITE_16
    )
}
