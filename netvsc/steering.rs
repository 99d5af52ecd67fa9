// SPDX-License-Identifier: GPL-2.0

//! On which channel a packet goes out: by a hash of its flow, and a table that the host can change.

use crate::net::{
    Flow,
    FlowType,
    QueuedSkb, //
};
use hv_proto::net::nvsp::{
    SendTable,
    SEND_TABLE_SIZE, //
};
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// How packets are spread over the channels.
pub(crate) struct Steering {
    /// The channel for each remainder of a hash.
    table: [Atomic<u32>; SEND_TABLE_SIZE],
    /// The table is the host's.
    is_hosts: Atomic<bool>,
    /// Kinds of flows whose ports are part of the hash, one bit each.
    port_hashes: Atomic<u32>,
}

fn bit(flow: FlowType) -> u32 {
    match flow {
        FlowType::Tcp4 => 1 << 0,
        FlowType::Tcp6 => 1 << 1,
        FlowType::Udp4 => 1 << 2,
        FlowType::Udp6 => 1 << 3,
    }
}

/// Ports are part of the hash of every flow.
const ALL_PORTS: u32 = 0b1111;

impl Steering {
    pub(crate) const fn new() -> Self {
        Self {
            table: [const { Atomic::new(0) }; SEND_TABLE_SIZE],
            is_hosts: Atomic::new(false),
            port_hashes: Atomic::new(ALL_PORTS),
        }
    }

    /// An attachment begins, whose host has not sent a table yet.
    pub(crate) fn begin(&self) {
        self.is_hosts.store(false, Relaxed);
    }

    /// The host sends a table.
    pub(crate) fn set_hosts_table(&self, table: &SendTable) {
        self.is_hosts.store(true, Relaxed);
        self.set_table(table);
    }

    /// There are so many channels. Packets go over all of them if the host has no other wish.
    pub(crate) fn settle(&self, channels: u16) {
        if !self.is_hosts.load(Relaxed) {
            self.set_table(&SendTable::spread(channels.into()));
        }
    }

    fn set_table(&self, table: &SendTable) {
        for (to, from) in self.table.iter().zip(table.0) {
            to.store(from, Relaxed);
        }
    }

    /// The channel for each remainder of a hash.
    pub(crate) fn table(&self) -> SendTable {
        SendTable(core::array::from_fn(|n| {
            self.table.get(n).map_or(0, |entry| entry.load(Relaxed))
        }))
    }

    /// Whether ports are part of the hash of a kind of flow.
    pub(crate) fn hashes_ports(&self, flow: FlowType) -> bool {
        self.port_hashes.load(Relaxed) & bit(flow) != 0
    }

    /// Sets whether they are. With the `Rtnl` lock.
    pub(crate) fn set_hashes_ports(&self, flow: FlowType, on: bool) {
        let now = self.port_hashes.load(Relaxed);
        let bit = bit(flow);
        self.port_hashes
            .store(if on { now | bit } else { now & !bit }, Relaxed);
    }

    /// The hash by which a packet's channel is chosen.
    fn hash(&self, skb: &mut QueuedSkb<'_>) -> u32 {
        if self.port_hashes.load(Relaxed) == ALL_PORTS {
            return skb.hash();
        }
        let flow = match skb.flow() {
            Flow::Tcp4 => FlowType::Tcp4,
            Flow::Tcp6 => FlowType::Tcp6,
            Flow::Udp4 => FlowType::Udp4,
            Flow::Udp6 => FlowType::Udp6,
            Flow::Other => return skb.hash(),
        };
        if self.hashes_ports(flow) {
            skb.hash()
        } else {
            skb.address_hash()
        }
    }

    /// The transmit queue of a packet, if there are `queues`. May be too large a number.
    pub(crate) fn select(&self, skb: &mut QueuedSkb<'_>, queues: u16) -> u16 {
        if queues == 1 {
            return 0;
        }
        let recorded = skb.recorded_tx_queue();
        if let Some(queue) = recorded.filter(|&queue| queue < queues && !skb.may_reorder()) {
            return queue;
        }
        // A packet that is forwarded stays on its CPU.
        if let Some(queue) = skb.recorded_rx_queue() {
            return queue;
        }
        let hash = self.hash(skb);
        // CAST: less than `queues`.
        let queue = self.table().channel(hash, queues.into()) as u16;
        if recorded != Some(queue) {
            skb.remember_tx_queue(queue);
        }
        queue
    }
}
