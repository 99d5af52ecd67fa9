// SPDX-License-Identifier: GPL-2.0

//! What a network device can do, and what of it is turned on.
//!
//! C header: [`include/linux/netdev_features.h`](srctree/include/linux/netdev_features.h)

use core::ops::{
    BitAnd,
    BitOr,
    BitOrAssign,
    BitXor,
    Not, //
};
use kernel::bindings;

/// A set of features (`netdev_features_t`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Features(u64);

impl Features {
    /// Packets in several pieces.
    pub(crate) const SG: Self = Self::bit(bindings::NETIF_F_SG_BIT);
    /// Checksums of TCP and UDP over IPv4.
    pub(crate) const IP_CSUM: Self = Self::bit(bindings::NETIF_F_IP_CSUM_BIT);
    /// Checksums of TCP and UDP over IPv6.
    pub(crate) const IPV6_CSUM: Self = Self::bit(bindings::NETIF_F_IPV6_CSUM_BIT);
    /// Packets anywhere in memory.
    pub(crate) const HIGHDMA: Self = Self::bit(bindings::NETIF_F_HIGHDMA_BIT);
    /// Segmentation of TCP over IPv4.
    pub(crate) const TSO: Self = Self::bit(bindings::NETIF_F_TSO_BIT);
    /// Segmentation of TCP over IPv6.
    pub(crate) const TSO6: Self = Self::bit(bindings::NETIF_F_TSO6_BIT);
    /// Coalesced packets come in.
    pub(crate) const LRO: Self = Self::bit(bindings::NETIF_F_LRO_BIT);
    /// The checksums of packets that come in are checked.
    pub(crate) const RXCSUM: Self = Self::bit(bindings::NETIF_F_RXCSUM_BIT);
    /// Packets that come in have a hash.
    pub(crate) const RXHASH: Self = Self::bit(bindings::NETIF_F_RXHASH_BIT);
    /// VLAN tags beside packets that go out.
    pub(crate) const VLAN_TX: Self = Self::bit(bindings::NETIF_F_HW_VLAN_CTAG_TX_BIT);
    /// VLAN tags beside packets that come in.
    pub(crate) const VLAN_RX: Self = Self::bit(bindings::NETIF_F_HW_VLAN_CTAG_RX_BIT);

    const fn bit(number: u32) -> Self {
        Self(1 << number)
    }

    /// All that are in one of `sets`.
    pub(crate) const fn union(sets: &[Self]) -> Self {
        let mut all = 0;
        let mut n = 0;
        while n < sets.len() {
            all |= sets[n].0;
            n += 1;
        }
        Self(all)
    }

    pub(super) const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    pub(super) const fn as_raw(self) -> u64 {
        self.0
    }

    /// Whether all of `other` are in the set.
    pub(crate) fn contains(self, other: Self) -> bool {
        self & other == other
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Features {
    fn bitor_assign(&mut self, other: Self) {
        *self = *self | other;
    }
}

impl BitAnd for Features {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitXor for Features {
    type Output = Self;

    fn bitxor(self, other: Self) -> Self {
        Self(self.0 ^ other.0)
    }
}

impl Not for Features {
    type Output = Self;

    fn not(self) -> Self {
        Self(!self.0)
    }
}
