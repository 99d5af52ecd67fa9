// SPDX-License-Identifier: GPL-2.0

//! Whether the host is there, as far as can be told from what it sends.
//!
//! A host that lets a reset wait and sends nothing else meanwhile counts as dead. It is not asked for
//! anything then, or each command would have to wait for all the time that a host is given. Whatever it
//! sends later shows that it is back.
//!
//! ```text
//!               ask               give_up
//!     PRESENT ------> QUESTIONED ---------> SILENT
//!        ^                |                   |
//!        +----- heard ----+------ heard ------+
//! ```

use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

const PRESENT: u32 = 0;
const QUESTIONED: u32 = 1;
const SILENT: u32 = 2;

/// Whether a host is there.
///
/// One word tells everything, so that it does not matter in which order CPUs see other memory.
pub(crate) struct Presence(Atomic<u32>);

impl Presence {
    /// A host that is there.
    pub(crate) const fn new() -> Self {
        Self(Atomic::new(PRESENT))
    }

    /// Something is asked that any living host answers.
    pub(crate) fn ask(&self) {
        // One that was silent stays so until it is heard.
        let _ = self.0.cmpxchg(PRESENT, QUESTIONED, Relaxed);
    }

    /// The time to answer is over. The host is silent unless it was heard since [`Presence::ask`].
    pub(crate) fn give_up(&self) {
        let _ = self.0.cmpxchg(QUESTIONED, SILENT, Relaxed);
    }

    /// The host has sent something. Says whether it had been silent.
    pub(crate) fn heard(&self) -> bool {
        // The usual case only reads, so that CPUs can share the word.
        self.0.load(Relaxed) != PRESENT && self.0.xchg(PRESENT, Relaxed) == SILENT
    }

    /// Whether the host is silent.
    pub(crate) fn is_silent(&self) -> bool {
        self.0.load(Relaxed) == SILENT
    }
}
