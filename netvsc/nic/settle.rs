// SPDX-License-Identifier: GPL-2.0

//! What becomes of the device when the host has said what the adapter can do: offloads, and the spread of packets
//! over the channels.

use super::Nic;
use crate::{
    net::{
        Features,
        Rtnl,
        Transport, //
    },
    session::{
        Facts,
        Session, //
    }, //
};
use hv_proto::net::{
    features::Offloads,
    offload::{
        Parameters,
        Setting, //
    },
    MacAddress,
    MIN_SECTION_SIZE, //
};
use kernel::{
    prelude::*,
    sync::atomic::Relaxed, //
};

/// The longest packet that is given to the host to be cut into segments.
const MAX_TSO_SIZE: u32 = 65536;
/// A host that takes less than this is not given any.
const MIN_TSO_SIZE: u32 = 8192;

/// The features that depend on the host.
const HOST_FEATURES: Features = Features::union(&[
    Features::RXCSUM,
    Features::IP_CSUM,
    Features::TSO,
    Features::IPV6_CSUM,
    Features::TSO6,
    Features::LRO,
    Features::SG,
    Features::RXHASH,
]);

fn setting(on: bool) -> Setting {
    if on {
        Setting::ENABLED
    } else {
        Setting::DISABLED
    }
}

fn bit(kind: Transport) -> u32 {
    match kind {
        Transport::Tcp4 => 1 << 0,
        Transport::Udp4 => 1 << 1,
        Transport::Tcp6 => 1 << 2,
        Transport::Udp6 => 1 << 3,
        Transport::Other => 0,
    }
}

impl Nic {
    /// Sets the device up for an attachment.
    pub(super) fn settle(&self, rtnl: &Rtnl, session: &Session, facts: &Facts) -> Result {
        let netdev = &self.netdev;
        if let Some(max) = facts.max_mtu.filter(|&max| max < netdev.mtu()) {
            netdev.set_mtu(rtnl, max.max(MIN_SECTION_SIZE));
        }
        if let (Some(name), false) = (&facts.name, netdev.has_alias(rtnl)) {
            // That is what hosts call an adapter that nobody has named.
            if &**name != b"Network Adapter" {
                // It is for people to read only.
                let _ = netdev.set_alias(rtnl, name);
            }
        }
        self.link_up.store(facts.link_up, Relaxed);
        // A host forgets what a user has set when the channel is closed.
        let address = netdev.address(rtnl);
        if address != facts.mac.0 {
            if let Err(error) = session.set_address(address) {
                let address = MacAddress(address);
                dev_warn!(
                    self.dev,
                    "the host does not take the address {}: {:?}\n",
                    format_args!("{address}"),
                    error
                );
            }
        }
        self.settle_offloads(rtnl, session, facts)?;
        self.settle_channels(rtnl, session, facts)
    }

    /// Turns on what both sides can do.
    fn settle_offloads(&self, rtnl: &Rtnl, session: &Session, facts: &Facts) -> Result {
        let netdev = &self.netdev;
        let version = session.link().version().ok_or(EIO)?;
        let mut features = Features::RXCSUM | Features::SG | Features::RXHASH;
        let mut checksums = 0;
        let mut max_tso = MAX_TSO_SIZE;
        if let Some(can) = &facts.offloads {
            let mut chosen = Offloads::choose(can, version);
            for max in [&mut chosen.lso_ipv4, &mut chosen.lso_ipv6] {
                if *max < MIN_TSO_SIZE {
                    *max = 0;
                } else {
                    max_tso = max_tso.min(*max);
                }
            }
            for (is_chosen, feature, kind) in [
                (chosen.tcp_ipv4_send, Features::IP_CSUM, Transport::Tcp4),
                (chosen.udp_ipv4_send, Features::IP_CSUM, Transport::Udp4),
                (chosen.tcp_ipv6_send, Features::IPV6_CSUM, Transport::Tcp6),
                (chosen.udp_ipv6_send, Features::IPV6_CSUM, Transport::Udp6),
                (chosen.lso_ipv4 != 0, Features::TSO, Transport::Other),
                (chosen.lso_ipv6 != 0, Features::TSO6, Transport::Other),
                (chosen.rsc, Features::LRO, Transport::Other),
            ] {
                if is_chosen {
                    features |= feature;
                    checksums |= bit(kind);
                }
            }
            let wanted = Offloads {
                rsc: chosen.rsc && netdev.features().contains(Features::LRO),
                ..chosen
            };
            session.set_offloads(&wanted.to_parameters(&chosen, version))?;
        }
        self.checksums.store(checksums, Relaxed);
        let others = netdev.hw_features(rtnl) & !HOST_FEATURES;
        netdev.set_hw_features(rtnl, others | features);
        netdev.set_features(rtnl, netdev.features() & (!HOST_FEATURES | features));
        netdev.set_tso_max_size(rtnl, max_tso);
        Ok(())
    }

    /// Spreads packets over the channels, both ways.
    fn settle_channels(&self, rtnl: &Rtnl, session: &Session, facts: &Facts) -> Result {
        let count = session.count();
        self.steering.settle(count);
        self.netdev.set_queues(rtnl, count)?;
        let mut rss = self.rss.lock();
        let before = core::mem::replace(&mut rss.size, facts.rss.map_or(0, |(_, entries)| entries));
        let keeps = self.netdev.rx_hash_is_configured(rtnl)
            && before == rss.size
            && rss.table().iter().all(|&channel| channel < count);
        if !keeps {
            for (n, entry) in (0u16..).zip(&mut rss.table) {
                *entry = n.checked_rem(count).unwrap_or(0);
            }
        }
        if count > 1 && rss.size != 0 {
            if let Err(error) = session.set_rss(rss.table(), &rss.key) {
                // All comes on the first channel then.
                dev_warn!(self.dev, "packets are not spread: {:?}\n", error);
            }
        }
        Ok(())
    }

    /// Whether the host computes checksums of this kind.
    pub(crate) fn computes_checksum(&self, kind: Transport) -> bool {
        self.checksums.load(Relaxed) & bit(kind) != 0
    }

    /// Turns features on and off: those in `change` are to be as they are in `wanted`.
    ///
    /// # Errors
    ///
    /// Those of a request.
    pub(crate) fn set_features(&self, rtnl: &Rtnl, wanted: Features, change: Features) -> Result {
        if !change.contains(Features::LRO) {
            return Ok(());
        }
        let session = self.attached(rtnl)?;
        let version = session.link().version().ok_or(EIO)?;
        let mut parameters = Parameters::unchanged(version);
        let on = setting(wanted.contains(Features::LRO));
        parameters.rsc_ipv4 = on;
        parameters.rsc_ipv6 = on;
        session.set_offloads(&parameters)
    }
}
