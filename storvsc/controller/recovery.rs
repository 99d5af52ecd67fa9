// SPDX-License-Identifier: GPL-2.0

//! What a controller does when commands are not answered: it waits, resets, gives up.
//!
//! The kernel's error handler drives it: first each command's time runs out, then, when no other command
//! is in flight any more, the handler takes them back and asks for a reset.

use super::{
    Controller,
    Io, //
};
use crate::{
    params,
    scsi::{
        HostByte,
        ResetOutcome,
        TimeoutAction,
        UniqueTag, //
    }, //
};
use hv_proto::storage::{
    Operation,
    Status,
    VstorPacket,
    PACKET_SIZE, //
};
use kernel::{
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// How long answers may be on their way after a reset, in milliseconds.
const DRAIN_TIME: u32 = 5_000;

/// Time between two looks at whether all commands have been answered after a reset.
const DRAIN_STEP: Delta = Delta::from_millis(10);
const DRAIN_STEP_MS: u32 = 10;

impl Controller {
    /// Waits until the host has answered all commands, but not for long.
    fn drain(&self, io: &Io) {
        let mut left = DRAIN_TIME;
        while left > DRAIN_STEP_MS && io.table.count() != 0 {
            left -= DRAIN_STEP_MS;
            fsleep(DRAIN_STEP);
        }
    }

    /// A command was not answered in its time.
    pub(super) fn timed_out(&self, tag: UniqueTag) -> TimeoutAction {
        let Some(io) = self.io.as_ref() else {
            return TimeoutAction::NotHandled;
        };
        if io.table.extend(tag, params::timeout_extensions()) {
            if self.limit.allows() {
                dev_warn!(self.dev, "tag#{} has no answer yet, waiting on\n", tag.tag);
            }
            return TimeoutAction::ResetTimer;
        }
        if io.table.abandon(tag) {
            TimeoutAction::NotHandled
        } else {
            TimeoutAction::ResetTimer
        }
    }

    /// Asks the host to reset the controller. Says whether it did.
    fn ask_for_reset(&self) -> bool {
        if self.paths.is_gone() {
            return false;
        }
        dev_warn!(self.dev, "resetting the controller\n");
        self.presence.ask();
        let packet = VstorPacket::request(Operation::RESET_BUS);
        let reply = self
            .control
            .execute(self.paths.primary(), &packet, params::host_timeout());
        match reply {
            Ok(reply) => VstorPacket::parse(reply.payload(), PACKET_SIZE).is_ok_and(|answer| {
                answer.operation == Operation::COMPLETE_IO && answer.status == Status::SUCCESS
            }),
            Err(e) => {
                if e == ETIMEDOUT || e == EAGAIN {
                    self.presence.give_up();
                }
                false
            }
        }
    }

    /// Resets the controller, and ends all commands whether it can or not. Sleeps.
    pub(super) fn reset(&self) -> ResetOutcome {
        let Some(io) = self.io.as_ref() else {
            return ResetOutcome::Failed;
        };
        if self.ask_for_reset() {
            // The host has ended all commands; the answers may be on their way still.
            self.drain(io);
            io.table.fail(None, HostByte::RESET);
            return ResetOutcome::Done;
        }
        dev_err!(
            self.dev,
            "no reset: {}; giving up on all commands\n",
            if self.paths.is_gone() {
                "the host has taken the controller away"
            } else if self.presence.is_silent() {
                "the host does not answer, and commands fail until it does"
            } else {
                "the host refuses"
            }
        );
        io.table.fail(None, HostByte::NO_CONNECT);
        ResetOutcome::Failed
    }
}
