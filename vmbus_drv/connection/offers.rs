// SPDX-License-Identifier: GPL-2.0

//! Offers and rescinds: which channels there are, and which CPU each starts on.

use super::{
    set_bit,
    Connection,
    State, //
};
use crate::{
    channel::Channel,
    cpu::{
        self,
        CONNECT_CPU, //
    },
    log::{
        err_limited,
        warn_limited,
        Show, //
    }, //
};
use hv_proto::{
    client::{
        check_offer,
        place_offer,
        KnownChannel,
        OfferError,
        OfferRules,
        Placement, //
    },
    guid,
    guid::Guid,
    ids::ChannelId,
    message::{
        Message,
        OfferChannel,
        RelidReleased, //
    },
    version::Version, //
};
use kernel::{
    cpu::nr_cpu_ids,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Full,
            Relaxed,
            Release, //
        },
        barrier,
        Arc, //
    }, //
};

impl Connection {
    /// Checks an offer, and makes a channel of it.
    pub(super) fn handle_offer(self: &Arc<Self>, offer: OfferChannel) {
        if !self.is_in(State::Connected) {
            return;
        }
        let _offering = self.offering.lock();
        let result = self.judge_offer(&offer).map(|primary| {
            if self.accept_offer(offer, primary).is_err() {
                err_limited!("channel {}: no memory for it\n", offer.channel_id.get());
                self.refuse_id(offer.channel_id);
            }
        });
        if let Err(reason) = result {
            self.mistakes.refused_offers.count();
            warn_limited!(
                "offer of channel {} ({}, {}): {}\n",
                offer.channel_id.get(),
                Show(offer.interface_id),
                Show(offer.instance_id),
                Show(reason)
            );
            if reason.must_release() {
                self.refuse_id(offer.channel_id);
            }
        }
    }

    /// Gives the id of a refused offer back, soon: messages are not kept waiting for that.
    fn refuse_id(self: &Arc<Self>, id: ChannelId) {
        let Some(index) = id.index() else {
            return;
        };
        if let Some(word) = self.refused.get(index / u32::BITS as usize) {
            set_bit(word, id.get() % u32::BITS);
        }
        // If it is queued already, it will see the bit.
        let _ = self.queues.notify.enqueue(self.clone());
    }

    /// The work item for that.
    pub(super) fn release_refused(&self) {
        let mut first = 0u32;
        for word in &self.refused {
            let mut bits = word.xchg(0, Full);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                bits &= bits.wrapping_sub(1);
                // Each can take seconds, and with the connection the host forgets them all.
                if !self.is_in(State::Connected) {
                    return;
                }
                self.release_id(ChannelId::new(first.wrapping_add(bit)));
            }
            first = first.wrapping_add(u32::BITS);
        }
    }

    /// The primary channel for an offered sub-channel, `None` for a device of its own.
    fn judge_offer(
        &self,
        offer: &OfferChannel,
    ) -> core::result::Result<Option<Arc<Channel>>, OfferError> {
        let rules = OfferRules {
            version: self.version().unwrap_or(Version::OLDEST),
            confidential: false,
            isolated: false,
        };
        check_offer(offer, &rules)?;
        let highest = self.highest.load(Acquire);
        let known = (0..=highest)
            .filter_map(|id| self.channel(ChannelId::new(id)))
            .map(|channel| {
                let offer = channel.offer();
                KnownChannel {
                    channel_id: channel.id(),
                    interface_id: offer.interface_id,
                    instance_id: offer.instance_id,
                    sub_channel_index: channel.subchannel_index(),
                    rescinded: channel.is_leaving(),
                }
            });
        match place_offer(offer, known)? {
            // The queue of devices is ordered, and the old one's removal is in it already.
            Placement::Primary | Placement::PrimaryAfter(_) => Ok(None),
            Placement::Subchannel { primary } => {
                let primary = self.channel(primary).ok_or(OfferError::NoPrimary)?;
                Ok(Some(primary))
            }
        }
    }

    fn accept_offer(
        self: &Arc<Self>,
        offer: OfferChannel,
        primary: Option<Arc<Channel>>,
    ) -> Result {
        let id = offer.channel_id;
        let slot = id
            .index()
            .and_then(|index| self.channels.get(index))
            .ok_or(EINVAL)?;
        let target_cpu = self.choose_cpu(&offer);
        let channel = Channel::new(self.clone(), offer, primary, target_cpu)?;
        slot.fill(channel.clone()).map_err(|_| EEXIST)?;
        if self.highest.load(Relaxed) < id.get() {
            self.highest.store(id.get(), Release);
        }
        // Either a CPU that goes offline just now sees the channel, or this sees that it goes. Nobody
        // can have opened the channel yet.
        barrier::mb(barrier::Full);
        if !self.is_usable(target_cpu) {
            channel.set_first_cpu(CONNECT_CPU);
        }
        channel.schedule_update();
        Ok(())
    }

    /// The CPU that is to get a channel's interrupts. Channels of devices with much to say are
    /// spread: first those of one device over the CPUs, then all of them.
    fn choose_cpu(&self, offer: &OfferChannel) -> u32 {
        if !is_performance_critical(&offer.interface_id) {
            return CONNECT_CPU;
        }
        // For each CPU, the channels of this device and those of all.
        let mut loads = KVec::new();
        if loads
            .resize(nr_cpu_ids() as usize, (0u32, 0u32), GFP_KERNEL)
            .is_err()
        {
            return CONNECT_CPU;
        }
        let _ = self.for_each_channel(|other| {
            let theirs = other.offer();
            let load = loads.get_mut(other.target_cpu() as usize);
            if let (Some((device, all)), true) =
                (load, is_performance_critical(&theirs.interface_id))
            {
                *all = all.saturating_add(1);
                if theirs.instance_id == offer.instance_id {
                    *device = device.saturating_add(1);
                }
            }
            Ok(())
        });
        (0..nr_cpu_ids())
            .zip(&loads)
            .filter(|&(cpu, _)| self.is_usable(cpu) && cpu::is_housekeeping(cpu))
            .min_by_key(|&(_, load)| load)
            .map_or(CONNECT_CPU, |(cpu, _)| cpu)
    }

    pub(super) fn handle_rescind(&self, id: ChannelId) {
        // An offer that finds the channel rescinded finds its removal queued, too.
        let _offering = self.offering.lock();
        match self.channel(id) {
            Some(channel) => channel.rescind(),
            // Its offer was refused, and the id given back, before.
            None if self.is_in(State::Connected) => {
                self.mistakes.unknown_rescinds.count();
                warn_limited!("rescind of channel {}, which is not there\n", id.get());
            }
            None => {}
        }
    }

    /// Tells the host that it may use the id of a channel for another one.
    fn release_id(&self, id: ChannelId) {
        // The error has been logged. The host keeps the id then, which costs it nothing.
        let _ = self.post(&RelidReleased { channel_id: id }.encode());
    }

    /// Takes a channel out of the table. `message`, if any, gives its id back to the host.
    pub(crate) fn release(&self, channel: &Channel, message: Option<RelidReleased>) {
        let slot = channel
            .id()
            .index()
            .and_then(|index| self.channels.get(index));
        let removed = slot.and_then(|slot| slot.replace(None));
        if let Some(message) = message {
            self.release_id(message.channel_id);
        }
        drop(removed);
    }
}

/// Whether a device class has so much to say that its channels are spread over the CPUs.
fn is_performance_critical(class: &Guid) -> bool {
    [
        guid::IDE,
        guid::SCSI,
        guid::FIBRE_CHANNEL,
        guid::NETWORK,
        guid::NETWORK_DIRECT,
    ]
    .contains(class)
}
