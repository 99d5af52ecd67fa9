// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The numbers by which the two sides name things: channels, GPADLs, connections, processors.
//!
//! Each is its own type, so that one cannot be passed for another. All are 32 bits wide and
//! little-endian on the wire; as types they have alignment 1 and may stand in any message.
//!
//! ```
//! use hv_proto::ids::{ChannelId, ConnectionId};
//!
//! assert_eq!(ChannelId::new(7).index(), Some(7));
//! assert_eq!(ChannelId::new(0).index(), None);
//! assert_eq!(ChannelId::INVALID.index(), None);
//! assert_eq!(ConnectionId::MESSAGE_V5.get(), 4);
//! ```

use zerocopy::little_endian::U32;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

macro_rules! id {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(
            Clone,
            Copy,
            Default,
            PartialEq,
            Eq,
            PartialOrd,
            Ord,
            Hash,
            FromBytes,
            IntoBytes,
            Immutable,
            KnownLayout,
            Unaligned,
        )]
        #[repr(transparent)]
        pub struct $name(U32);

        impl $name {
            /// Wraps a number. It is not judged here.
            #[inline]
            pub const fn new(raw: u32) -> Self {
                Self(U32::new(raw))
            }

            /// The number.
            #[inline]
            pub const fn get(self) -> u32 {
                self.0.get()
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.get())
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                core::fmt::Display::fmt(&self.get(), f)
            }
        }

        impl From<u32> for $name {
            #[inline]
            fn from(raw: u32) -> Self {
                Self::new(raw)
            }
        }

        impl From<$name> for u32 {
            #[inline]
            fn from(id: $name) -> Self {
                id.get()
            }
        }
    };
}

id! {
    /// A channel of the bus: the "relative id" (relid) that the host gives it in its offer.
    ///
    /// It is also the number of the channel's event flag in SIEFP pages and interrupt pages.
    ChannelId
}

id! {
    /// A GPADL (guest physical address descriptor list); chosen by the guest, unique while it
    /// lives.
    GpadlId
}

id! {
    /// A connection of the hypervisor, the address of HvPostMessage and HvSignalEvent.
    ///
    /// Only the low 24 bits are the number (`union hv_connection_id` in
    /// `hyperv/hvgdk.h`).
    ConnectionId
}

id! {
    /// The hypervisor's number of a virtual processor (MSR `HV_X64_MSR_VP_INDEX`), which is not
    /// the operating system's CPU number.
    VpIndex
}

id! {
    /// Tells one request to open a channel from the next one; chosen by the guest.
    OpenId
}

/// Number of channel ids: 0 is never used, so 1 to 2047 are.
///
/// One event-flag page slot has 2048 flags (`HV_EVENT_FLAGS_COUNT` in `hyperv/hvhdk.h`,
/// `MAX_CHANNEL_RELIDS` in `drivers/hv/hyperv_vmbus.h`).
pub const MAX_CHANNELS: usize = 2048;

impl ChannelId {
    /// The id that names no channel (`INVALID_RELID` in `linux/hyperv.h`).
    pub const INVALID: Self = Self::new(u32::MAX);

    /// Whether a channel can have this id: 1 to 2047.
    #[inline]
    pub const fn is_valid(self) -> bool {
        self.get() != 0 && self.get() < MAX_CHANNELS as u32
    }

    /// The id as an index into a table of [`MAX_CHANNELS`] entries; `None` if no channel can have
    /// it.
    #[inline]
    pub const fn index(self) -> Option<usize> {
        if self.is_valid() {
            Some(self.get() as usize)
        } else {
            None
        }
    }

    /// The id as the number of an event flag; `None` if no channel can have it.
    #[inline]
    pub const fn event_flag(self) -> Option<u16> {
        if self.is_valid() {
            Some(self.get() as u16)
        } else {
            None
        }
    }
}

impl GpadlId {
    /// The id that Linux's C driver starts with; the host must accept any
    /// (`next_gpadl_handle` in `drivers/hv/connection.c`).
    pub const FIRST: Self = Self::new(0xe1e10);

    /// The id after this one. It wraps around and leaves out 0, which the messages use as "none".
    #[inline]
    #[must_use]
    pub const fn next(self) -> Self {
        match self.get().checked_add(1) {
            Some(next) => Self::new(next),
            None => Self::new(1),
        }
    }
}

impl ConnectionId {
    /// VMBus messages up to version 4.1 (`VMBUS_MESSAGE_CONNECTION_ID`).
    pub const MESSAGE: Self = Self::new(1);
    /// Events of channels without a connection of their own (`VMBUS_EVENT_CONNECTION_ID`).
    pub const EVENT: Self = Self::new(2);
    /// Monitored notifications (`VMBUS_MONITOR_CONNECTION_ID`).
    pub const MONITOR: Self = Self::new(3);
    /// The INITIATE_CONTACT message from version 5.0 on (`VMBUS_MESSAGE_CONNECTION_ID_4`).
    pub const MESSAGE_V5: Self = Self::new(4);
    /// INITIATE_CONTACT of a guest that runs in VTL 2, from version 5.0 on
    /// (`VMBUS_MESSAGE_CONNECTION_ID_REDIRECT`).
    pub const MESSAGE_REDIRECT: Self = Self::new(0x80_0074);

    /// The bits that count (`union hv_connection_id`).
    pub const MASK: u32 = 0x00ff_ffff;

    /// Whether the number fits into the 24 bits that a connection id has.
    #[inline]
    pub const fn is_valid(self) -> bool {
        self.get() & !Self::MASK == 0
    }
}

impl VpIndex {
    /// No processor, or one whose number is not known (`VP_INVAL` in `asm/mshyperv.h`).
    pub const INVALID: Self = Self::new(u32::MAX);
    /// The processor that boots.
    pub const BOOT: Self = Self::new(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn channel_ids_have_bounds() {
        assert!(!ChannelId::new(0).is_valid());
        assert!(ChannelId::new(1).is_valid());
        assert!(ChannelId::new(2047).is_valid());
        assert!(!ChannelId::new(2048).is_valid());
        assert_eq!(ChannelId::new(2047).event_flag(), Some(2047));
        assert_eq!(ChannelId::new(2048).event_flag(), None);
    }

    #[test]
    fn gpadl_ids_skip_zero() {
        assert_eq!(GpadlId::new(u32::MAX).next(), GpadlId::new(1));
        assert_eq!(GpadlId::FIRST.next().get(), 0xe1e11);
    }

    #[test]
    fn wire_form_is_little_endian_and_ordered_by_value() {
        assert_eq!(VpIndex::new(0x0102_0304).as_bytes(), [4, 3, 2, 1]);
        assert!(ChannelId::new(0x100) > ChannelId::new(0xff));
        assert_eq!(
            format!("{:?} {}", OpenId::new(9), OpenId::new(9)),
            "OpenId(9) 9"
        );
    }

    #[test]
    fn connection_ids_have_24_bits() {
        assert!(ConnectionId::MESSAGE_REDIRECT.is_valid());
        assert!(!ConnectionId::new(0x0100_0000).is_valid());
    }
}
