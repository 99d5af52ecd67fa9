// SPDX-License-Identifier: GPL-2.0

//! What the stack asks of an adapter.

use crate::{
    net::{
        Features,
        LinkStats,
        Operations,
        QueuedSkb,
        Rtnl,
        RxFlags,
        Transmit,
        TxSkb, //
    },
    nic::Nic,
    session::Config, //
};
use hv_proto::net::oid::PacketFilter;
use kernel::{
    prelude::*,
    sync::{
        rcu,
        Arc, //
    }, //
};

/// The adapter, as the stack knows it.
pub(crate) struct Adapter(pub(crate) Arc<Nic>);

impl Operations for Adapter {
    fn open(&self, rtnl: &Rtnl) -> Result {
        let nic = &self.0;
        nic.open(rtnl).inspect_err(|error| {
            dev_err!(nic.dev(), "the adapter does not open: {:?}\n", error);
        })
    }

    fn stop(&self, rtnl: &Rtnl) {
        self.0.close(rtnl);
    }

    fn start_xmit(&self, skb: TxSkb, more: bool) -> Transmit {
        let lost = || {
            self.0.stats.tx_dropped.count();
            Transmit::Done
        };
        let guard = rcu::read_lock();
        let Some(session) = self.0.session(&guard) else {
            return lost();
        };
        let queue = session.tx_queue(skb.queue());
        match queue.xmit(session.link(), skb, more) {
            // It is not the stack's queue that was stopped.
            Transmit::Busy(skb) if skb.queue() != queue.index() => lost(),
            result => result,
        }
    }

    fn select_queue(&self, skb: &mut QueuedSkb<'_>, queues: u16) -> u16 {
        self.0.steering.select(skb, queues)
    }

    fn set_rx_mode(&self, rtnl: &Rtnl, flags: RxFlags) -> Result {
        let mut filter = PacketFilter::DIRECTED;
        if flags.promiscuous {
            filter = PacketFilter::PROMISCUOUS;
        } else {
            filter.set(PacketFilter::ALL_MULTICAST, flags.multicast);
            filter.set(PacketFilter::BROADCAST, flags.broadcast);
        }
        self.0.set_filter(rtnl, filter)
    }

    fn set_features(&self, rtnl: &Rtnl, wanted: Features, change: Features) -> Result {
        self.0.set_features(rtnl, wanted, change)
    }

    fn change_mtu(&self, rtnl: &Rtnl, mtu: u32) -> Result {
        let nic = &self.0;
        let config = nic.config();
        nic.reconfigure(rtnl, Config { mtu, ..config })
    }

    fn set_address(&self, rtnl: &Rtnl, address: [u8; 6]) -> Result {
        self.0.attached(rtnl)?.set_address(address)
    }

    fn stats(&self) -> LinkStats {
        let stats = &self.0.stats;
        let mut all = LinkStats {
            rx_dropped: stats.rx_dropped.get(),
            rx_errors: stats.events.rx_invalid.get(),
            tx_dropped: stats.tx_dropped.get(),
            ..LinkStats::default()
        };
        for queue in stats.queues() {
            all.rx_packets = all.rx_packets.wrapping_add(queue.rx_packets.get());
            all.rx_bytes = all.rx_bytes.wrapping_add(queue.rx_bytes.get());
            all.multicast = all.multicast.wrapping_add(queue.rx_multicast.get());
            all.tx_packets = all.tx_packets.wrapping_add(queue.tx_packets.get());
            all.tx_bytes = all.tx_bytes.wrapping_add(queue.tx_bytes.get());
        }
        all
    }
}
