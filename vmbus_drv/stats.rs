// SPDX-License-Identifier: GPL-2.0

//! Counters of a channel, and of the host's mistakes. Some are files in sysfs, with the names that
//! are given here; the others are in `vmbus_drv/counters` in debugfs.

use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// A counter.
pub struct Counter(Atomic<u64>);

impl Default for Counter {
    fn default() -> Self {
        Self::new()
    }
}

impl Counter {
    /// A counter that is zero.
    pub const fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Counts one more. Any context.
    pub fn count(&self) {
        self.0.add(1, Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What the host did wrong on a connection.
pub(crate) struct Mistakes {
    /// Messages that make no sense.
    pub(crate) invalid: Counter,
    /// Messages at a wrong time, and answers to no question.
    pub(crate) unexpected: Counter,
    /// Offers that contradict what the guest has.
    pub(crate) refused_offers: Counter,
    /// Rescinds of channels that the guest does not have.
    pub(crate) unknown_rescinds: Counter,
}

impl Mistakes {
    pub(crate) const fn new() -> Self {
        Self {
            invalid: Counter::new(),
            unexpected: Counter::new(),
            refused_offers: Counter::new(),
            unknown_rescinds: Counter::new(),
        }
    }
}

/// Counters of a channel, since it was offered.
pub struct Stats {
    /// Signals from the host (`interrupts`).
    pub interrupts: Counter,
    /// Signals to the host that took a hypercall (`events`).
    pub events: Counter,
    /// Packets sent.
    pub sent: Counter,
    /// Packets received.
    pub received: Counter,
    /// Signals to the host because it waited for room (`intr_in_full`).
    pub in_full: Counter,
    /// Signals to the host because the ring had been empty (`intr_out_empty`).
    pub out_empty: Counter,
    /// Times that the ring to the host became full (`out_full_first`).
    pub out_full_first: Counter,
    /// Packets that found the ring to the host full (`out_full_total`).
    pub out_full_total: Counter,
    /// Packets dropped because they were larger than the driver expects.
    pub oversized: Counter,
    /// Times that the host was found to have damaged a ring.
    pub corrupt: Counter,
}

impl Stats {
    pub(crate) const fn new() -> Self {
        Self {
            interrupts: Counter::new(),
            events: Counter::new(),
            sent: Counter::new(),
            received: Counter::new(),
            in_full: Counter::new(),
            out_empty: Counter::new(),
            out_full_first: Counter::new(),
            out_full_total: Counter::new(),
            oversized: Counter::new(),
            corrupt: Counter::new(),
        }
    }
}
