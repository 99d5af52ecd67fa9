// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Monitor pages: signals without a hypercall.
//!
//! A channel that the host offers with a monitor id has a bit in a trigger group of a page that
//! the host looks at every so often (the latency of that bit), so that the guest need not make a
//! hypercall for each signal. The guest hands the host two pages in INITIATE_CONTACT: page 1 for
//! host to guest, page 2 for guest to host. They are shared memory, so each side works on single
//! fields, with atomic operations; [`MonitorPage`] is the layout, and [`MonitorId`] knows where the
//! fields of one id stand.
//!
//! Source: TLFS, "Monitored Notifications"; `struct hv_monitor_page` in
//! `drivers/hv/hyperv_vmbus.h`.
//!
//! ```
//! use hv_proto::monitor::MonitorId;
//!
//! let id = MonitorId::new(37).unwrap();
//! assert_eq!((id.group(), id.mask()), (1, 1 << 5));
//! assert_eq!(id.pending_offset(), 0x10);
//! assert_eq!(MonitorId::new(128), None);
//! ```

use crate::ids::ConnectionId;
use crate::PAGE_SIZE;
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Number of trigger groups of a page.
pub const GROUPS: usize = 4;
/// Number of bits, and so of monitor ids, of a group.
pub const GROUP_BITS: usize = 32;

/// A trigger group, 8 bytes (`union hv_monitor_trigger_group`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TriggerGroup {
    /// One bit for each id: a signal waits. The sender sets it, the receiver clears it.
    pub pending: U32,
    /// One bit for each id: the receiver wants to be told.
    pub armed: U32,
}

/// What a monitor id signals, 8 bytes (`struct hv_monitor_parameter`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MonitorParameter {
    /// The connection to signal.
    pub connection_id: ConnectionId,
    /// Which of its flags.
    pub flag_number: U16,
    /// Zero.
    pub reserved: U16,
}

/// Layout of a monitor page, 4096 bytes (`struct hv_monitor_page`).
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MonitorPage {
    /// Bits 3:0: one for each group that is in use.
    pub trigger_state: U32,
    /// Zero.
    pub reserved1: U32,
    /// The trigger groups.
    pub trigger_group: [TriggerGroup; GROUPS],
    /// Zero.
    pub reserved2: [U64; 3],
    /// When the host looks next, in its own units.
    pub next_check_time: [[I32; GROUP_BITS]; GROUPS],
    /// How often the host looks, in units of 100 ns.
    pub latency: [[U16; GROUP_BITS]; GROUPS],
    /// Zero.
    pub reserved3: [U64; 32],
    /// What each id signals.
    pub parameter: [[MonitorParameter; GROUP_BITS]; GROUPS],
    /// Zero.
    pub reserved4: [u8; 1984],
}

const _: () = assert!(size_of::<MonitorPage>() == PAGE_SIZE);
const _: () = assert!(core::mem::offset_of!(MonitorPage, trigger_group) == 0x8);
const _: () = assert!(core::mem::offset_of!(MonitorPage, next_check_time) == 0x40);
const _: () = assert!(core::mem::offset_of!(MonitorPage, latency) == 0x240);
const _: () = assert!(core::mem::offset_of!(MonitorPage, parameter) == 0x440);

/// A monitor id that has its place in a monitor page: 0 to 127.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MonitorId(u8);

impl MonitorId {
    /// Number of monitor ids.
    pub const COUNT: u8 = 128;

    /// Wraps an id from an offer; `None` if the page has no place for it.
    #[inline]
    pub const fn new(raw: u8) -> Option<Self> {
        if raw < Self::COUNT {
            Some(Self(raw))
        } else {
            None
        }
    }

    /// The number.
    #[inline]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The trigger group, 0 to 3.
    #[inline]
    pub const fn group(self) -> usize {
        self.0 as usize / GROUP_BITS
    }

    /// The bit in the group, 0 to 31.
    #[inline]
    pub const fn bit(self) -> usize {
        self.0 as usize % GROUP_BITS
    }

    /// The bit in the group as a mask of the `pending` and `armed` words.
    #[inline]
    pub const fn mask(self) -> u32 {
        1 << self.bit()
    }

    /// Byte offset of the group's `pending` word in the page (a 32-bit word).
    #[inline]
    pub const fn pending_offset(self) -> usize {
        core::mem::offset_of!(MonitorPage, trigger_group) + self.group() * size_of::<TriggerGroup>()
    }

    /// Byte offset of the group's `armed` word in the page (a 32-bit word).
    #[inline]
    pub const fn armed_offset(self) -> usize {
        self.pending_offset() + core::mem::offset_of!(TriggerGroup, armed)
    }

    /// Byte offset of the id's latency in the page (16 bits, units of 100 ns).
    #[inline]
    pub const fn latency_offset(self) -> usize {
        core::mem::offset_of!(MonitorPage, latency) + self.0 as usize * size_of::<U16>()
    }

    /// Byte offset of the id's [`MonitorParameter`] in the page.
    #[inline]
    pub const fn parameter_offset(self) -> usize {
        core::mem::offset_of!(MonitorPage, parameter)
            + self.0 as usize * size_of::<MonitorParameter>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromZeros, IntoBytes};

    #[test]
    fn offsets_name_the_fields() {
        for raw in 0..MonitorId::COUNT {
            let id = MonitorId::new(raw).unwrap();
            let mut page = MonitorPage::new_zeroed();
            page.trigger_group[id.group()].pending = U32::new(id.mask());
            page.trigger_group[id.group()].armed = U32::new(!id.mask());
            page.latency[id.group()][id.bit()] = U16::new(0x1234);
            page.parameter[id.group()][id.bit()].connection_id = ConnectionId::new(0x56);
            let bytes = page.as_bytes();
            assert_eq!(bytes[id.pending_offset()..][..4], id.mask().to_le_bytes());
            assert_eq!(bytes[id.armed_offset()..][..4], (!id.mask()).to_le_bytes());
            assert_eq!(bytes[id.latency_offset()..][..2], [0x34, 0x12]);
            assert_eq!(bytes[id.parameter_offset()], 0x56);
        }
        for raw in MonitorId::COUNT..=u8::MAX {
            assert_eq!(MonitorId::new(raw), None);
        }
    }
}
