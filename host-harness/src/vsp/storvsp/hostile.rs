// SPDX-License-Identifier: MIT OR Apache-2.0

//! A controller that answers wrongly when it is told to, for tests of how a guest copes.

use hv_proto::storage::{ScsiRequest, SrbCode, Version, VstorPacket};
use std::sync::atomic::{AtomicU32, Ordering};

use super::controller::Channel;

/// Packets that come before the true answer to a command when answers are forged.
pub const FORGED_PACKETS: u64 = 5;

/// How many of the next commands are answered wrongly, and how.
#[derive(Default)]
pub(super) struct Hostility {
    dropped: AtomicU32,
    duplicated: AtomicU32,
    forged: AtomicU32,
}

/// Takes one from a counter that is not zero.
fn take_one(counter: &AtomicU32) -> bool {
    counter
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
        .is_ok()
}

impl Hostility {
    pub fn set_dropped(&self, count: u32) {
        self.dropped.store(count, Ordering::Relaxed);
    }

    pub fn set_duplicated(&self, count: u32) {
        self.duplicated.store(count, Ordering::Relaxed);
    }

    pub fn set_forged(&self, count: u32) {
        self.forged.store(count, Ordering::Relaxed);
    }

    /// Whether the present answer is not sent.
    pub fn drops(&self) -> bool {
        take_one(&self.dropped)
    }

    /// How many times the present answer is sent.
    pub fn times(&self) -> u32 {
        1 + u32::from(take_one(&self.duplicated))
    }

    /// If it is the present command's turn: claims success before it is executed, in packets that no
    /// guest may take for its answer: completions of commands that there are not, and the right
    /// transaction in a packet of the wrong type. Packets that the guest has no room for are left out.
    pub fn forge(
        &self,
        channel: &Channel,
        transaction_id: u64,
        request: &ScsiRequest,
        version: Version,
    ) {
        if !take_one(&self.forged) {
            return;
        }
        let mut answer = *request;
        let length = request.data_transfer_length.get();
        answer.set_answer(SrbCode::SUCCESS, hv_proto::scsi::ScsiStatus::GOOD, length);
        let packet = VstorPacket::io_completion(&answer);
        let bytes = packet.bytes(version);
        // What nobody asked for, what our driver has for its own requests, an earlier use of the same
        // place in its table, and a place beyond the table.
        let ids = [
            0,
            u64::MAX,
            transaction_id ^ 1 << 62,
            transaction_id | 0xffff_ffff,
        ];
        for id in ids {
            let _ = channel.writer().try_complete(id, bytes);
        }
        let _ = channel.writer().try_send(transaction_id, bytes, false);
    }
}
