// SPDX-License-Identifier: MIT OR Apache-2.0

//! The SCSI target: logical units on disk images, as Hyper-V's virtual disks look to a guest.
//!
//! A [`LogicalUnit`] executes command blocks on a [`crate::disk`]; a [`Target`] is a set of them
//! under one address and answers for those that are not there. Decoding of command blocks and
//! sense data are `hv_proto::scsi`'s. Facts: SPC-4 (INCITS 513) and SBC-3 (INCITS 514).
//!
//! May use: `hv_proto`, [`crate::disk`]. Knows nothing of VMBus. Used by [`crate::vsp::storvsp`].

mod inquiry;
mod mode;
mod target;
mod unit;

pub use target::Target;
pub use unit::{LogicalUnit, UnitCounters};

use crate::disk::IoBuf;
use hv_proto::scsi::{AdditionalSense, ScsiStatus, Sense};

/// The memory that a command moves data to or from.
#[derive(Debug, Clone, Default)]
pub enum Data<'a> {
    /// There is none.
    #[default]
    None,
    /// The device fills it.
    In(IoBuf<'a>),
    /// The device reads it.
    Out(IoBuf<'a>),
}

impl<'a> Data<'a> {
    /// The part that the device may fill.
    fn into_in(self) -> IoBuf<'a> {
        match self {
            Self::In(buf) => buf,
            _ => IoBuf::default(),
        }
    }

    /// The part that the device may read.
    fn into_out(self) -> IoBuf<'a> {
        match self {
            Self::Out(buf) => buf,
            _ => IoBuf::default(),
        }
    }
}

/// The end of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Status byte.
    pub status: ScsiStatus,
    /// Sense data, with CHECK CONDITION.
    pub sense: Option<Sense>,
    /// How many bytes of the buffer were filled or used.
    pub transferred: usize,
    /// The command was about more data than the buffer has room for. Data to the guest was cut;
    /// data from the guest was not used at all.
    pub overrun: bool,
}

impl Completion {
    /// Success, with this many bytes moved.
    fn good(transferred: usize) -> Self {
        Self {
            status: ScsiStatus::GOOD,
            sense: None,
            transferred,
            overrun: false,
        }
    }

    /// The buffer was too small for the command.
    fn overrun(transferred: usize) -> Self {
        Self {
            overrun: true,
            ..Self::good(transferred)
        }
    }

    /// CHECK CONDITION with this sense.
    fn check(sense: Sense) -> Self {
        Self {
            status: ScsiStatus::CHECK_CONDITION,
            sense: Some(sense),
            transferred: 0,
            overrun: false,
        }
    }

    /// CHECK CONDITION, ILLEGAL REQUEST.
    fn illegal(additional: AdditionalSense) -> Self {
        Self::check(Sense::illegal_request(additional))
    }

    /// Answers with parameter data: as much as the initiator allows and the buffer holds.
    fn respond(buf: &IoBuf<'_>, response: &[u8], allocation_length: usize) -> Self {
        let wanted = response.get(..allocation_length).unwrap_or(response);
        let transferred = buf.write(0, wanted);
        if transferred < wanted.len() {
            Self::overrun(transferred)
        } else {
            Self::good(transferred)
        }
    }
}

#[cfg(test)]
mod tests;
