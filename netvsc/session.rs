// SPDX-License-Identifier: GPL-2.0

//! One attachment to the host, as the rest of the driver uses it.
//!
//! Every wait has a time limit. A wait for an answer of the adapter ends at once when the host takes it
//! away; one for the bus, when the host takes away the channel that it is about.

mod attachment;
mod ports;
mod requests;

use self::attachment::Attachment;
use crate::{
    link::Link,
    net::{
        BhDisabled,
        Rtnl, //
    },
    nic::Nic,
    queue::Queue, //
};
use hv_proto::net::{
    offload,
    oid::{
        self,
        Oid,
        PacketFilter, //
    },
    rss,
    MacAddress, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    }, //
};
use vmbus::Channel;

/// What an attachment is to be like.
#[derive(Clone, Copy)]
pub(crate) struct Config {
    pub(crate) mtu: u32,
    /// Most channels.
    pub(crate) channels: u32,
    pub(crate) rx_sections: u32,
    pub(crate) rx_section_size: u32,
    pub(crate) tx_sections: u32,
    pub(crate) tx_section_size: u32,
}

/// What the host has said of the adapter.
pub(crate) struct Facts {
    pub(crate) mac: MacAddress,
    /// The largest MTU.
    pub(crate) max_mtu: Option<u32>,
    /// A name for people to read, in UTF-8.
    pub(crate) name: Option<KVec<u8>>,
    pub(crate) offloads: Option<offload::Capabilities>,
    pub(crate) link_up: bool,
    /// Channels that frames can come on, and entries of the table that spreads them.
    pub(crate) rss: Option<(u32, usize)>,
}

/// One attachment, from when the adapter is known. Dropping it gives everything back, and sleeps.
#[pin_data]
pub(crate) struct Session {
    attachment: Attachment,
    /// Number of channels in use.
    count: u16,
    /// Most channels that host and guest can use.
    max_channels: u32,
    /// Which frames the host sends; `None` if that is not known.
    #[pin]
    filter: Mutex<Option<PacketFilter>>,
}

impl Session {
    /// Attaches. Returns what the host has said, too.
    ///
    /// # Errors
    ///
    /// Those of the bus; `EIO` if the host breaks the rules, `ENODEV` if it takes the adapter away,
    /// `ETIMEDOUT` if it does not answer.
    pub(crate) fn new(
        nic: &Arc<Nic>,
        primary: &Arc<Channel>,
        config: &Config,
    ) -> Result<(Arc<Self>, Facts)> {
        nic.steering.begin();
        let mut attachment = Attachment::new(nic, primary, config)?;
        attachment.initialize()?;
        let facts = attachment.facts()?;
        let max_channels = match facts.rss {
            Some((queues, _)) => crate::net::online_cpus()
                .min(queues)
                .min(nic.netdev().max_queues().into())
                .max(1),
            None => 1,
        };
        let count = attachment.open_subchannels(primary, max_channels.min(config.channels))?;
        let session = Arc::pin_init(
            pin_init!(Self {
                attachment,
                count,
                max_channels,
                filter <- new_mutex!(Some(PacketFilter::empty()), "netvsc_filter"),
            }),
            GFP_KERNEL,
        )?;
        Ok((session, facts))
    }

    /// The attachment's link.
    pub(crate) fn link(&self) -> &Link {
        &self.attachment.link
    }

    /// Who sends what the stack gives to a transmit queue: the queue itself, or the first one if the host
    /// does not serve it any more.
    pub(crate) fn tx_queue(&self, index: u16) -> &Queue {
        self.queue(index)
            .filter(|queue| queue.is_served())
            .unwrap_or(&self.attachment.primary)
    }

    /// A queue; `None` if there is no such one.
    pub(crate) fn queue(&self, index: u16) -> Option<&Queue> {
        self.attachment
            .queues
            .get(usize::from(index))
            .map(|queue| &**queue)
    }

    /// The first queue.
    pub(crate) fn primary_queue(&self) -> &Queue {
        &self.attachment.primary
    }

    /// Number of channels in use.
    pub(crate) fn count(&self) -> u16 {
        self.count
    }

    /// Number of those that the host serves yet.
    pub(crate) fn served_count(&self) -> u32 {
        let served = |&index: &u16| self.queue(index).is_some_and(Queue::is_served);
        // CAST: not more than channels.
        (0..self.count).filter(served).count() as u32
    }

    /// Most channels that host and guest can use.
    pub(crate) fn max_channels(&self) -> u32 {
        self.max_channels
    }

    /// Lets users know which NAPI instances serve the queues.
    pub(crate) fn show_napi(&self, rtnl: &Rtnl, on: bool) {
        for queue in self.attachment.queues.iter().take(self.count.into()) {
            queue.show_napi(rtnl, on);
        }
    }

    /// Sets which frames the host sends.
    ///
    /// # Errors
    ///
    /// Those of a request.
    pub(crate) fn set_filter(&self, filter: PacketFilter) -> Result {
        let mut now = self.filter.lock();
        if *now != Some(filter) {
            // A request that is not answered may be heard later.
            *now = None;
            let value = filter.bits().to_le_bytes();
            self.attachment
                .set(Oid::GEN_CURRENT_PACKET_FILTER, &value)?;
            *now = Some(filter);
        }
        Ok(())
    }

    /// Turns offloads on and off.
    ///
    /// # Errors
    ///
    /// Those of a request.
    pub(crate) fn set_offloads(&self, parameters: &offload::Parameters) -> Result {
        self.attachment
            .set(Oid::TCP_OFFLOAD_PARAMETERS, parameters.as_value())
    }

    /// Sets how frames that come in are spread over the channels.
    ///
    /// # Errors
    ///
    /// Those of a request.
    pub(crate) fn set_rss(&self, table: &[u16], key: &[u8; rss::KEY_SIZE]) -> Result {
        let mut value = KVec::new();
        value.resize(rss::MAX_PARAMETERS_SIZE, 0, GFP_KERNEL)?;
        // Hosts want it to be off before it is changed; what they say to that is of no matter.
        for flags in [rss::ParameterFlags::DISABLE, rss::ParameterFlags::empty()] {
            let len = rss::encode_parameters(&mut value, flags, table, key).ok_or(EINVAL)?;
            let value = value.get(..len).ok_or(EINVAL)?;
            let set = self
                .attachment
                .set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, value);
            match set {
                Err(error) if flags.is_empty() || error != EOPNOTSUPP => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Changes the adapter's address.
    ///
    /// # Errors
    ///
    /// Those of a request.
    pub(crate) fn set_address(&self, address: [u8; 6]) -> Result {
        let value = oid::set_mac(MacAddress(address));
        self.attachment.set(Oid::GEN_RNDIS_CONFIG_PARAMETER, &value)
    }

    /// Lets packets be sent.
    pub(crate) fn start(&self) {
        self.link().set_tx_enabled(true);
        self.link().nic.netdev().wake_all_queues();
    }

    /// Lets no packet be sent, and waits until those that are on their way have gone. It takes limited
    /// time.
    pub(crate) fn stop(&self) {
        let link = self.link();
        link.set_tx_enabled(false);
        link.nic.netdev().disable_tx();
        {
            let _softirqs = BhDisabled::new();
            for queue in self.attachment.queues.iter() {
                queue.flush(link);
            }
        }
        if let Err(error) = self.set_filter(PacketFilter::empty()) {
            if !link.is_dead() {
                dev_warn!(link.nic.dev(), "the host goes on sending: {:?}\n", error);
            }
        }
        if !self.attachment.drain() && !link.is_dead() {
            dev_warn!(link.nic.dev(), "the host keeps packets\n");
        }
    }
}
