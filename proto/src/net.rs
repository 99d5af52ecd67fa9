// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Networking: how a synthetic network adapter speaks over its channels.
//!
//! Two protocols lie on each other. [`nvsp`] is what the packets of the channel carry: it agrees on a
//! version and on two shared buffers, and says where an RNDIS message is. [`rndis`] is the adapter
//! itself: requests to query and set its properties ([`oid`], [`offload`], [`rss`]), and frames with
//! what is known of each ([`ppi`]).
//!
//! A frame goes from host to guest through a section of the guest's receive buffer ([`sections`]), and
//! from guest to host through a section of its send buffer or straight from its memory.
//!
//! Uses `core`, `zerocopy`, `bitflags` and modules of this crate. Nothing here waits, allocates,
//! locks or panics.
//!
//! Source of layouts and numbers: `drivers/net/hyperv` and `include/linux/rndis.h` of the kernel, and
//! [MS-RNDIS]. Each module names its part.

pub mod adapter;
pub mod coalesced;
pub mod connect;
pub mod control;
pub mod features;
mod flow;
pub mod frame;
pub mod nvsp;
mod nvsp_body;
pub mod offload;
pub mod oid;
pub mod ppi;
mod ppi_value;
pub mod provider;
pub mod receive;
pub mod rndis;
mod rndis_body;
pub mod rss;
pub mod sections;
pub mod transmit;

/// Number of the receive buffer; every transfer-page packet names it.
pub const RECEIVE_BUFFER_ID: u16 = 0xcafe;
/// Number of the send buffer.
pub const SEND_BUFFER_ID: u16 = 0;

/// The smallest section of a buffer that is of use, in bytes: the smallest MTU of IPv4.
pub const MIN_SECTION_SIZE: u32 = 68;

/// Bytes of an Ethernet header without a VLAN tag.
pub const ETHERNET_HEADER_SIZE: u32 = 14;

/// Most channels of an adapter, the primary one included.
pub const MAX_CHANNELS: u32 = 64;

/// Most ranges of a transfer-page packet: 375 frames, and the fragments of one that was put together
/// by the host.
pub const MAX_TRANSFER_RANGES: usize = 562;

/// A place in a message or in a shared buffer that has been checked to be inside of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Where it starts, in bytes.
    pub offset: u32,
    /// Its length in bytes.
    pub len: u32,
}

impl Span {
    /// `len` bytes at `offset` of something that has `available` bytes; `None` if they are not all
    /// there.
    pub fn within(offset: u32, len: u32, available: u32) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (end <= available).then_some(Self { offset, len })
    }

    /// Where it ends. The constructors have checked that this fits.
    pub fn end(self) -> u32 {
        self.offset.saturating_add(self.len)
    }

    /// The same place as seen from `base` bytes before; `None` if it is too far.
    pub fn after(self, base: u32) -> Option<Self> {
        let offset = self.offset.checked_add(base)?;
        offset.checked_add(self.len)?;
        Some(Self { offset, ..self })
    }

    /// The bytes at this place; `None` if `bytes` is too short.
    pub fn of(self, bytes: &[u8]) -> Option<&[u8]> {
        let start = usize::try_from(self.offset).ok()?;
        let end = start.checked_add(usize::try_from(self.len).ok()?)?;
        bytes.get(start..end)
    }
}

/// Address of an Ethernet adapter.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    zerocopy_derive::FromBytes,
    zerocopy_derive::IntoBytes,
    zerocopy_derive::Immutable,
    zerocopy_derive::KnownLayout,
    zerocopy_derive::Unaligned,
)]
#[repr(transparent)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The address of all.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it is the address of a group; broadcast is one.
    pub const fn is_group(self) -> bool {
        let [first, ..] = self.0;
        first & 1 != 0
    }

    /// Whether an adapter may have it: it is not a group's, and not zero.
    pub fn is_unicast(self) -> bool {
        !self.is_group() && self.0 != [0; 6]
    }
}

impl core::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests;
