// SPDX-License-Identifier: GPL-2.0

//! Whether a controller is attached to its host: whether its channels are open and agreed on.
//!
//! ```text
//!              damaged                failed
//!     ATTACHED -------> REATTACHING ---------> AWAY
//!      ^  ^  |               |                 |  ^
//!      |  |  +---------------|-- given up -----|--+
//!      |  +---- attached ----+                 |
//!      +--------------- attached --------------+
//! ```

use kernel::sync::atomic::{
    Atomic,
    Full,
    Relaxed, //
};

const ATTACHED: u32 = 0;
const REATTACHING: u32 = 1;
const AWAY: u32 = 2;

/// Whether a controller is attached to its host.
pub(crate) struct Presence(Atomic<u32>);

impl Presence {
    /// A controller that is not attached yet.
    pub(crate) const fn new() -> Self {
        Self(Atomic::new(AWAY))
    }

    /// Whether commands can go.
    pub(crate) fn is_attached(&self) -> bool {
        self.0.load(Relaxed) == ATTACHED
    }

    /// Whether it will be known soon if commands can go.
    pub(crate) fn is_reattaching(&self) -> bool {
        self.0.load(Relaxed) == REATTACHING
    }

    /// Commands can go. What the caller reads later, it reads after this is seen.
    pub(crate) fn set_attached(&self) {
        self.0.xchg(ATTACHED, Full);
    }

    /// A channel can be used no more, as the caller has noted: commands have to wait until the
    /// controller was attached again.
    pub(crate) fn lose(&self) {
        // One that is away has no channels to lose.
        let _ = self.0.cmpxchg(ATTACHED, REATTACHING, Full);
    }

    /// The host does not do what it must; commands fail.
    pub(crate) fn set_away(&self) {
        self.0.store(AWAY, Relaxed);
    }
}
