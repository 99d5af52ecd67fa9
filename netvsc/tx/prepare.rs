// SPDX-License-Identifier: GPL-2.0

//! What is done to a packet before it is sent: its pieces are few enough, and what the host is to do with it is said
//! in the head that goes before it.

use super::{
    ranges::{
        pages,
        MAX_PAGES, //
    },
    Failure,
    HEADROOM, //
};
use crate::{
    link::Link,
    net::{
        self,
        TxSkb, //
    },
    queue::Queue, //
};
use hv_proto::net::{
    frame::Head,
    ppi::{
        Info,
        InfoWriter,
        LargeSend,
        SendChecksum,
        Transport,
        Vlan, //
    }, //
};
use kernel::prelude::*;

/// Length of a tag that stays in the frame.
const VLAN_TAG: u32 = 4;

/// Pages that a head can touch.
const HEAD_PAGES: u64 = 2;

impl Queue {
    /// Brings a packet into shape, and says what goes before it.
    pub(super) fn prepare(link: &Link, skb: &mut TxSkb) -> Result<Head, Failure> {
        let events = &link.nic.stats.events;
        let no_memory = |_| {
            events.tx_no_memory.count();
            Failure::Drop
        };
        if skb.hoist_vlan().is_err() {
            events.vlan_error.count();
            return Err(Failure::Drop);
        }
        // The stack may have made it when the MTU was a larger one.
        let tag = if skb.has_inline_tag() { VLAN_TAG } else { 0 };
        if skb.len() > link.frame_size.saturating_add(tag) && !skb.is_gso() {
            events.tx_too_big.count();
            return Err(Failure::Drop);
        }
        let most = MAX_PAGES as u64 - HEAD_PAGES;
        if pages(skb) > most {
            events.tx_scattered.count();
            skb.linearize().map_err(no_memory)?;
            if pages(skb) > most {
                events.tx_too_big.count();
                return Err(Failure::Drop);
            }
        }
        skb.make_headroom(HEADROOM).map_err(no_memory)?;

        let mut info = InfoWriter::new();
        let mut put = |item| info.put(item).map_err(|_| Failure::Drop);
        if link.nic.netdev().tx_queues() > 1 {
            if let Some(hash) = skb.known_hash() {
                put(Info::Hash(hash))?;
            }
        }
        if let Some(tci) = skb.vlan() {
            put(Info::Vlan(Vlan::from_tci(tci)))?;
        }
        if skb.is_gso() {
            let ipv6 = skb.prepare_tso();
            let item = LargeSend {
                ipv6,
                mss: skb.gso_size().into(),
                tcp_offset: u16::try_from(skb.transport_offset()).unwrap_or(u16::MAX),
            };
            let item = item.encode().ok_or_else(|| {
                events.tx_too_big.count();
                Failure::Drop
            })?;
            put(Info::LargeSend(item))?;
        } else if skb.wants_checksum() {
            match Self::checksum(link, skb) {
                Some(item) => put(Info::Checksum(item))?,
                None => skb.compute_checksum().map_err(|_| Failure::Drop)?,
            }
        }
        Head::new(skb.len(), &info).ok_or(Failure::Drop)
    }

    /// What the host is to compute; `None` if it cannot.
    fn checksum(link: &Link, skb: &TxSkb) -> Option<hv_proto::net::ppi::Checksum> {
        let kind = skb.transport();
        if !link.nic.computes_checksum(kind) {
            return None;
        }
        let (ipv6, transport) = match kind {
            net::Transport::Tcp4 => (false, Transport::Tcp),
            net::Transport::Udp4 => (false, Transport::Udp),
            net::Transport::Tcp6 => (true, Transport::Tcp),
            net::Transport::Udp6 => (true, Transport::Udp),
            net::Transport::Other => return None,
        };
        SendChecksum {
            ipv6,
            transport: Some(transport),
            ip_header: false,
            transport_offset: u16::try_from(skb.transport_offset()).ok()?,
        }
        .encode()
    }
}
