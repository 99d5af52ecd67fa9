// SPDX-License-Identifier: GPL-2.0

//! What a controller does when commands are not answered, or a ring is damaged: it waits, resets,
//! gives up, and comes back.
//!
//! The kernel's error handler drives it: first each command's time runs out, then, when no other command
//! is in flight any more, the handler takes them back and asks for a reset. If the host does not do even
//! that, the channels are closed before the commands end, for it could write into their memory else. A work
//! item attaches the controller again.

use super::{
    attachment::Attachment,
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
        atomic::Relaxed,
        Arc,
        ArcBorrow, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};
use vmbus::NoIo;

/// Time between two tries to attach to a host that does not answer, in milliseconds.
pub(super) const RETRY_TIME: u32 = 5_000;

/// The same for a host that keeps the memory of each try: 256 KiB an hour are bearable.
const MAX_RETRY_TIME: u32 = 60 * 60 * 1000;

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
        let _noio = NoIo::begin();
        let mut attachment = self.attachment.lock();
        let reason = if self.presence.is_attached() {
            match self.ask_for_reset() {
                Ok(()) => {
                    // The host has ended all commands; the answers may be on their way still.
                    self.drain(io);
                    if io.table.count() == 0 {
                        return ResetOutcome::Done;
                    }
                    // Either answers were lost, or it does not do what it says.
                    self.presence.lose();
                    "answers are missing"
                }
                Err(e) if e == EIO => "the host refuses",
                Err(_) => "the host does not answer, and commands fail until it does",
            }
        } else {
            "the controller is not attached to the host"
        };
        if self.presence.is_reattaching() && Arc::from(self).heal(io, &mut attachment) {
            return ResetOutcome::Done;
        }
        dev_err!(
            self.dev,
            "no reset: {}; giving up on all commands\n",
            if self.paths.is_gone() {
                "the host has taken the controller away"
            } else {
                reason
            }
        );
        self.give_up(io, &mut attachment);
        self.look_after_channels();
        ResetOutcome::Failed
    }

    /// Closes all channels, and fails all commands. Sleeps.
    fn give_up(&self, io: &Io, attachment: &mut Attachment) {
        self.presence.set_away();
        self.detach_locked(attachment);
        io.table.fail(None, HostByte::NO_CONNECT);
    }

    /// Opens all channels anew, for a controller whose commands wait for that. Those that the host has,
    /// begin again if they may. Says whether the controller is attached; if not, nothing has become of
    /// what is open. Sleeps.
    fn heal(self: &Arc<Self>, io: &Io, attachment: &mut Attachment) -> bool {
        self.detach_locked(attachment);
        io.table.fail(None, HostByte::RESET);
        let result = self.attach_again(attachment);
        if self.news.allows() {
            match &result {
                Ok(()) => dev_info!(self.dev, "the channels were opened anew\n"),
                Err(e) => dev_err!(self.dev, "the channels cannot be opened anew: {:?}\n", e),
            }
        }
        result.is_ok()
    }

    /// Attaches the controller again if it is not. Says whether there is nothing left to be done;
    /// sleeps, for a while only.
    pub(super) fn restore(self: &Arc<Self>) -> bool {
        let Some(io) = self.io.as_ref() else {
            return true;
        };
        if self.paths.is_gone() {
            self.give_up(io, &mut self.attachment.lock());
            return true;
        }
        if self.presence.is_attached() {
            return true;
        }
        // Commands wait for the first try, not for later ones.
        if !self.presence.is_reattaching() && self.stopping.wait(self.patience.load(Relaxed)) {
            return true;
        }
        let _noio = NoIo::begin();
        let mut attachment = self.attachment.lock();
        let lost = self.paths.primary().lost_memory();
        let is_healed = if self.presence.is_attached() {
            return true;
        } else if self.presence.is_reattaching() {
            self.heal(io, &mut attachment)
        } else {
            let is_back = self.attach_again(&mut attachment).is_ok();
            if is_back && self.news.allows() {
                dev_info!(
                    self.dev,
                    "the host is back; disks that went offline stay so until their state is set\n"
                );
            }
            is_back
        };
        if !is_healed {
            self.give_up(io, &mut attachment);
        }
        drop(attachment);
        // Each try must not cost memory for ever.
        let patience = if self.paths.primary().lost_memory() == lost {
            RETRY_TIME
        } else {
            let longer = self.patience.load(Relaxed).saturating_mul(2);
            longer.min(MAX_RETRY_TIME)
        };
        self.patience.store(patience, Relaxed);
        if is_healed {
            // Units may have come and gone unheard.
            self.as_arc_borrow().maintain(|pending| {
                pending.check = true;
                pending.scan = true;
            });
        }
        is_healed
    }
}
