// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a guest takes of what a host offers, and how it fits to what is there.

use crate::guid::{self, Guid};
use crate::ids::ChannelId;
use crate::message::{OfferChannel, OfferFlags};
use crate::version::Version;
use core::fmt;

/// What the guest can do with channels that a host offers.
#[derive(Clone, Copy, Debug)]
pub struct OfferRules {
    /// The agreed version.
    pub version: Version,
    /// Whether the guest and its paravisor know confidential channels.
    pub confidential: bool,
    /// Whether the guest is isolated from the host, and so takes few kinds of devices from it.
    pub isolated: bool,
}

/// Why an offer is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OfferError {
    /// The channel id is not between 1 and 2047.
    InvalidChannelId,
    /// A channel that is still there has the id.
    DuplicateChannelId,
    /// The class or the instance is all zero.
    ZeroGuid,
    /// Confidential memory behind a ring that is not: no secret would be kept.
    ConfidentialMemoryOnly,
    /// A confidential channel, which this guest or this version does not know.
    ConfidentialNotSupported,
    /// An isolated guest takes no device of this class.
    NotAllowedWhenIsolated,
    /// The instance exists with another class.
    ClassMismatch,
    /// The device exists with a channel of this index.
    DuplicateIndex,
    /// A sub-channel of a device that does not exist.
    NoPrimary,
}

impl OfferError {
    /// Whether the guest must say RELID_RELEASED, so that the host need not keep the channel for
    /// it. Not when the id is none, or belongs to a channel that the guest has.
    pub fn must_release(self) -> bool {
        !matches!(self, Self::InvalidChannelId | Self::DuplicateChannelId)
    }
}

impl fmt::Display for OfferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InvalidChannelId => "channel id is out of bounds",
            Self::DuplicateChannelId => "channel id is in use",
            Self::ZeroGuid => "class or instance is zero",
            Self::ConfidentialMemoryOnly => "confidential memory without a confidential ring",
            Self::ConfidentialNotSupported => "confidential channels are not supported",
            Self::NotAllowedWhenIsolated => "class is not allowed in an isolated guest",
            Self::ClassMismatch => "instance exists with another class",
            Self::DuplicateIndex => "device has a channel of this index",
            Self::NoPrimary => "sub-channel without a device",
        })
    }
}

impl core::error::Error for OfferError {}

/// The classes that an isolated guest takes from the host; their drivers are hardened
/// (`allowed_in_isolated` in `drivers/hv/channel_mgmt.c`).
const ISOLATED_CLASSES: [Guid; 6] = [
    guid::SCSI,
    guid::NETWORK,
    guid::PCI,
    guid::TIME_SYNC,
    guid::HEARTBEAT,
    guid::SHUTDOWN,
];

/// Judges an offer by itself.
///
/// A monitor id for which the page has no place is no error: [`OfferChannel::monitor`] answers
/// `None` for it, and the channel is signalled by hypercall.
///
/// # Errors
///
/// Why the offer is not taken; see [`OfferError::must_release`].
pub fn check_offer(offer: &OfferChannel, rules: &OfferRules) -> Result<(), OfferError> {
    if !offer.channel_id.is_valid() {
        return Err(OfferError::InvalidChannelId);
    }
    if offer.interface_id.is_zero() || offer.instance_id.is_zero() {
        return Err(OfferError::ZeroGuid);
    }
    let flags = offer.flags();
    let ring = flags.contains(OfferFlags::CONFIDENTIAL_RING_BUFFER);
    let memory = flags.contains(OfferFlags::CONFIDENTIAL_EXTERNAL_MEMORY);
    if memory && !ring {
        return Err(OfferError::ConfidentialMemoryOnly);
    }
    if ring && !(rules.confidential && rules.version.has_confidential_channels()) {
        return Err(OfferError::ConfidentialNotSupported);
    }
    if rules.isolated
        && !flags.contains(OfferFlags::TLNPI_PROVIDER_OFFER)
        && !ISOLATED_CLASSES.contains(&offer.interface_id)
    {
        return Err(OfferError::NotAllowedWhenIsolated);
    }
    Ok(())
}

/// What the guest knows of a channel that it has taken and not released.
#[derive(Clone, Copy, Debug)]
pub struct KnownChannel {
    /// Its id.
    pub channel_id: ChannelId,
    /// Its device's class.
    pub interface_id: Guid,
    /// Its device's instance.
    pub instance_id: Guid,
    /// 0 for a primary channel.
    pub sub_channel_index: u16,
    /// Whether the host has taken it back.
    pub rescinded: bool,
}

/// Where an offered channel belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// A new device.
    Primary,
    /// A new device, but its former self, with this channel, has not quite gone: it must not be
    /// made before that is.
    PrimaryAfter(ChannelId),
    /// One more channel for the device that has this primary channel.
    Subchannel {
        /// The primary channel.
        primary: ChannelId,
    },
}

/// Decides where an offer that [`check_offer`] takes belongs, among the channels that the guest
/// has.
///
/// # Errors
///
/// [`OfferError::DuplicateChannelId`], [`ClassMismatch`](OfferError::ClassMismatch),
/// [`DuplicateIndex`](OfferError::DuplicateIndex) or [`NoPrimary`](OfferError::NoPrimary).
pub fn place_offer(
    offer: &OfferChannel,
    known: impl IntoIterator<Item = KnownChannel>,
) -> Result<Placement, OfferError> {
    let index = offer.sub_channel_index.get();
    let mut mismatch = false;
    let mut duplicate = false;
    let mut primary = None;
    let mut old_primary = None;
    for channel in known {
        if channel.channel_id == offer.channel_id {
            return Err(OfferError::DuplicateChannelId);
        }
        if channel.instance_id != offer.instance_id {
            continue;
        }
        if channel.rescinded {
            // Names in sysfs are by instance, so its class does not matter.
            if channel.sub_channel_index == 0 {
                old_primary = Some(channel.channel_id);
            }
            continue;
        }
        mismatch |= channel.interface_id != offer.interface_id;
        duplicate |= channel.sub_channel_index == index;
        if channel.sub_channel_index == 0 {
            primary = Some(channel.channel_id);
        }
    }
    if mismatch {
        return Err(OfferError::ClassMismatch);
    }
    if duplicate {
        return Err(OfferError::DuplicateIndex);
    }
    match (index, primary, old_primary) {
        (0, _, None) => Ok(Placement::Primary),
        (0, _, Some(old)) => Ok(Placement::PrimaryAfter(old)),
        (_, Some(primary), _) => Ok(Placement::Subchannel { primary }),
        (_, None, _) => Err(OfferError::NoPrimary),
    }
}
