// SPDX-License-Identifier: GPL-2.0

//! Counters of an adapter. They live as long as the adapter does, whatever becomes of its channels.

use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// A counter that any CPU may count.
pub(crate) struct Counter(Atomic<u64>);

impl Counter {
    pub(crate) const fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Counts one.
    pub(crate) fn count(&self) {
        self.add(1);
    }

    /// Counts several.
    pub(crate) fn add(&self, number: u64) {
        self.0.add(number, Relaxed);
    }

    /// The count.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A counter of something that is done by one CPU at a time: cheaper to count.
pub(crate) struct LocalCounter(Atomic<u64>);

impl LocalCounter {
    const fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Counts several.
    pub(crate) fn add(&self, number: u64) {
        let now = self.0.load(Relaxed);
        self.0.store(now.wrapping_add(number), Relaxed);
    }

    /// The count.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What a queue has done. All of it is counted in the poll of the queue's channel.
pub(crate) struct QueueStats {
    pub(crate) tx_packets: LocalCounter,
    pub(crate) tx_bytes: LocalCounter,
    pub(crate) rx_packets: LocalCounter,
    pub(crate) rx_bytes: LocalCounter,
    pub(crate) rx_multicast: LocalCounter,
}

impl QueueStats {
    const fn new() -> Self {
        Self {
            tx_packets: LocalCounter::new(),
            tx_bytes: LocalCounter::new(),
            rx_packets: LocalCounter::new(),
            rx_bytes: LocalCounter::new(),
            rx_multicast: LocalCounter::new(),
        }
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What happened to the adapter as a whole.
        pub(crate) struct Events {
            $($(#[$doc])* pub(crate) $name: Counter,)*
        }

        impl Events {
            /// Names of the counters that a user sees.
            pub(crate) const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];

            const fn new() -> Self {
                Self { $($name: Counter::new(),)* }
            }

            /// The counters, in the order of their names.
            pub(crate) fn values(&self) -> impl Iterator<Item = u64> + '_ {
                [$(&self.$name),*].into_iter().map(Counter::get)
            }
        }
    };
}

counters! {
    /// Packets in too many pieces, which were copied into one.
    tx_scattered,
    /// Packets lost for want of memory.
    tx_no_memory,
    /// Packets lost because the ring was full and nothing was outstanding.
    tx_no_space,
    /// Packets lost because they do not fit into a message.
    tx_too_big,
    /// Packets given back to the stack.
    tx_busy,
    /// Packets that found no free section of the send buffer.
    tx_send_full,
    /// Times that a completion found the ring full.
    rx_comp_busy,
    /// Packets lost for want of memory.
    rx_no_memory,
    /// Times that a queue was stopped.
    stop_queue,
    /// Times that a queue was woken.
    wake_queue,
    /// Packets lost because of a VLAN tag that could not be taken out.
    vlan_error,
    /// Packets, or parts of packets, of the host that broke the rules.
    rx_invalid,
    /// Completions of the host for what is not outstanding, or of the wrong kind.
    invalid_completion,
}

/// All counters of an adapter.
pub(crate) struct Stats {
    pub(crate) events: Events,
    /// Packets of the stack that were not sent.
    pub(crate) tx_dropped: Counter,
    /// Good packets of the host that were not delivered.
    pub(crate) rx_dropped: Counter,
    queues: KVec<QueueStats>,
}

impl Stats {
    /// Counters for `queues` queues.
    pub(crate) fn new(queues: u16) -> Result<Self> {
        let mut all = KVec::with_capacity(queues.into(), GFP_KERNEL)?;
        for _ in 0..queues {
            all.push(QueueStats::new(), GFP_KERNEL)?;
        }
        Ok(Self {
            events: Events::new(),
            tx_dropped: Counter::new(),
            rx_dropped: Counter::new(),
            queues: all,
        })
    }

    /// The counters of a queue.
    pub(crate) fn queue(&self, index: u16) -> Option<&QueueStats> {
        self.queues.get(usize::from(index))
    }

    /// The counters of all queues.
    pub(crate) fn queues(&self) -> &[QueueStats] {
        &self.queues
    }
}
