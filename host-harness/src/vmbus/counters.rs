// SPDX-License-Identifier: MIT OR Apache-2.0

//! Counters of a channel: written by the threads that use the channel, readable by anybody.
//!
//! They count events and never order anything, so all accesses are relaxed.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// The live counters of one channel. They start at 0 when the channel is offered and go on over
/// close and reopen.
#[derive(Debug, Default)]
pub(super) struct Counters {
    packets_in: AtomicU64,
    bytes_in: AtomicU64,
    packets_out: AtomicU64,
    bytes_out: AtomicU64,
    signals: AtomicU64,
    interrupts: AtomicU64,
    space_signals: AtomicU64,
    ring_full: AtomicU64,
    opens: AtomicU64,
}

impl Counters {
    pub(super) fn packet_in(&self, bytes: usize) {
        self.packets_in.fetch_add(1, Ordering::Relaxed);
        self.bytes_in.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn packet_out(&self, bytes: usize) {
        self.packets_out.fetch_add(1, Ordering::Relaxed);
        self.bytes_out.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn signals(&self, n: u64) {
        self.signals.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn interrupt(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn space_signal(&self) {
        self.space_signals.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn ring_full(&self) {
        self.ring_full.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn open(&self) {
        self.opens.fetch_add(1, Ordering::Relaxed);
    }

    /// The values now. The fields are read one by one, so they may be a few events apart.
    pub(super) fn snapshot(&self) -> CounterSnapshot {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        CounterSnapshot {
            packets_in: get(&self.packets_in),
            bytes_in: get(&self.bytes_in),
            packets_out: get(&self.packets_out),
            bytes_out: get(&self.bytes_out),
            signals: get(&self.signals),
            interrupts: get(&self.interrupts),
            space_signals: get(&self.space_signals),
            ring_full: get(&self.ring_full),
            opens: get(&self.opens),
        }
    }
}

/// The counters of one channel at one moment. "In" is guest to host, "out" is host to guest.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CounterSnapshot {
    /// Packets that the host took from the ring.
    pub packets_in: u64,
    /// Their bytes, with descriptors and padding, without the ring's trailers.
    pub bytes_in: u64,
    /// Packets that the host put into the ring.
    pub packets_out: u64,
    /// Their bytes, with descriptors, without padding and trailers.
    pub bytes_out: u64,
    /// Signals of the guest (HvSignalEvent or a monitor trigger) that woke the host. Signals that
    /// arrive while the host has not yet looked at the former count one by one.
    pub signals: u64,
    /// Event flags that the host raised because it wrote a packet.
    pub interrupts: u64,
    /// Event flags that the host raised because the guest waited for space.
    pub space_signals: u64,
    /// Sends that found the ring to the guest full.
    pub ring_full: u64,
    /// Successful opens.
    pub opens: u64,
}
