// SPDX-License-Identifier: GPL-2.0

//! What a controller does when commands are not answered, or a ring is damaged: it waits, resets,
//! gives up, and comes back.
//!
//! The kernel's error handler drives it: first each command's time runs out, then, when no other command
//! is in flight any more, the handler takes them back and asks for a reset. If the host does not do even
//! that, the channels are closed before the commands end, for it could write into their memory else. The
//! maintenance attaches the controller again.

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
    sync::{
        Arc,
        ArcBorrow, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Time between two tries to attach to a host that does not answer, in milliseconds.
const RETRY_TIME: u32 = 5_000;

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

    /// Asks the host to reset the controller.
    ///
    /// # Errors
    ///
    /// `EIO` if it refuses, or that of the request.
    fn ask_for_reset(&self) -> Result {
        dev_warn!(self.dev, "resetting the controller\n");
        let packet = VstorPacket::request(Operation::RESET_BUS);
        let reply = self
            .control
            .execute(self.paths.primary(), &packet, params::host_timeout())?;
        let answer = VstorPacket::parse(reply.payload(), PACKET_SIZE).map_err(|_| EIO)?;
        if answer.operation == Operation::COMPLETE_IO && answer.status == Status::SUCCESS {
            Ok(())
        } else {
            Err(EIO)
        }
    }

    /// Resets the controller, and ends all commands whether it can or not. Sleeps.
    pub(super) fn reset(self: ArcBorrow<'_, Self>) -> ResetOutcome {
        let Some(io) = self.io.as_ref() else {
            return ResetOutcome::Failed;
        };
        let mut attachment = self.attachment.lock();
        let reason = if !self.presence.is_attached() {
            "it is not attached to the host"
        } else {
            match self.ask_for_reset() {
                Ok(()) => {
                    // The host has ended all commands; the answers may be on their way still.
                    self.drain(io);
                    io.table.fail(None, HostByte::RESET);
                    return ResetOutcome::Done;
                }
                Err(_) if self.paths.is_gone() => "the host has taken the controller away",
                Err(e) if e == EIO => "the host refuses",
                Err(_) => "the host does not answer, and commands fail until it does",
            }
        };
        dev_err!(
            self.dev,
            "no reset: {}; giving up on all commands\n",
            reason
        );
        self.presence.set_away();
        self.detach_locked(&mut attachment);
        // With the lock: new commands are not meant.
        io.table.fail(None, HostByte::NO_CONNECT);
        drop(attachment);
        self.maintain(|_| ());
        ResetOutcome::Failed
    }

    /// Attaches the controller again if it is not. Says whether there is nothing left to be done for
    /// that; sleeps, for a while only.
    pub(super) fn restore(self: &Arc<Self>) -> bool {
        let Some(io) = self.io.as_ref() else {
            return true;
        };
        if self.presence.is_attached() || self.paths.is_gone() {
            return true;
        }
        // Commands wait for the first try, not for later ones.
        let is_first = self.presence.is_reattaching();
        if !is_first && self.stopping.wait(RETRY_TIME) {
            return true;
        }
        let mut attachment = self.attachment.lock();
        if self.presence.is_reattaching() {
            self.detach_locked(&mut attachment);
            io.table.fail(None, HostByte::REQUEUE);
        }
        match self.attach_again(&mut attachment) {
            Ok(()) => {
                drop(attachment);
                if self.news.allows() {
                    dev_info!(
                        self.dev,
                        "the host is back; disks that went offline stay so until their state is set\n"
                    );
                }
                // Units may have come and gone unheard.
                self.as_arc_borrow().maintain(|pending| {
                    pending.check = true;
                    pending.scan = true;
                });
                true
            }
            Err(error) => {
                self.presence.set_away();
                self.detach_locked(&mut attachment);
                if is_first && self.news.allows() {
                    dev_err!(
                        self.dev,
                        "cannot be attached again, and commands fail until it can: {:?}\n",
                        error
                    );
                }
                false
            }
        }
    }
}
