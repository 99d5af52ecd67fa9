// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The synthetic interrupt controller (SynIC): messages, event flags, registers.
//!
//! Each virtual processor has a message page (SIMP) and an event-flags page (SIEFP), each with one
//! slot of 256 bytes for each of its 16 interrupt sources (SINTs). VMBus uses SINT 2.
//!
//! Source: TLFS, "Virtual Interrupt Control" and "Inter-Partition Communication";
//! `hyperv/hvgdk_mini.h`, `hyperv/hvhdk.h`.
//!
//! ```
//! use hv_proto::synic::{HvMessage, SynicMessageType};
//!
//! let message = HvMessage::new(SynicMessageType::CHANNEL, b"payload").unwrap();
//! assert_eq!(message.payload(), Some(&b"payload"[..]));
//! assert_eq!(size_of::<HvMessage>(), 256);
//! ```

use bitflags::bitflags;
use zerocopy::little_endian::U64;
use zerocopy::FromZeros;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// MSR that turns the SynIC of this processor on (bit 0) (`HV_X64_MSR_SCONTROL`).
pub const MSR_SCONTROL: u32 = 0x4000_0080;
/// MSR with the version of the SynIC (`HV_X64_MSR_SVERSION`).
pub const MSR_SVERSION: u32 = 0x4000_0081;
/// MSR with address (bits 63:12) and enable bit of the event-flags page (`HV_X64_MSR_SIEFP`).
pub const MSR_SIEFP: u32 = 0x4000_0082;
/// MSR with address (bits 63:12) and enable bit of the message page (`HV_X64_MSR_SIMP`).
pub const MSR_SIMP: u32 = 0x4000_0083;
/// MSR that is written when a message slot was emptied while more wait (`HV_X64_MSR_EOM`).
pub const MSR_EOM: u32 = 0x4000_0084;
/// MSR of SINT 0; the others follow (`HV_X64_MSR_SINT0`).
pub const MSR_SINT0: u32 = 0x4000_0090;

/// Number of SINTs of a processor (`HV_SYNIC_SINT_COUNT`).
pub const SINT_COUNT: u8 = 16;
/// The SINT that VMBus uses for messages and events (`VMBUS_MESSAGE_SINT`).
pub const VMBUS_SINT: u8 = 2;
/// The interrupt vector of VMBus in a Linux guest on x86 (`HYPERVISOR_CALLBACK_VECTOR`).
pub const LINUX_VMBUS_VECTOR: u8 = 0xf3;

/// Size of a message slot, in bytes (`HV_MESSAGE_SIZE`).
pub const MESSAGE_SIZE: usize = 256;
/// Most payload that a message has, in bytes (`HV_MESSAGE_PAYLOAD_BYTE_COUNT`).
pub const MESSAGE_PAYLOAD_SIZE: usize = 240;
/// Size of the event flags of one SINT, in bytes (`HV_EVENT_FLAGS_BYTE_COUNT`).
pub const EVENT_FLAGS_SIZE: usize = 256;
/// Number of event flags of one SINT (`HV_EVENT_FLAGS_COUNT`).
pub const EVENT_FLAGS_COUNT: u16 = 2048;

/// Enable bit of SCONTROL, SIMP and SIEFP (`HV_SYNIC_CONTROL_ENABLE` and its kin).
pub const REGISTER_ENABLE: u64 = 1;

/// Whether SIMP, SIEFP or SCONTROL is enabled.
#[inline]
pub const fn is_enabled(register: u64) -> bool {
    register & REGISTER_ENABLE != 0
}

/// The guest physical address of the page that SIMP or SIEFP names, in bytes.
#[inline]
pub const fn page_address(register: u64) -> u64 {
    register & !0xfff
}

/// The MSR of a SINT, `None` if there is no such SINT.
#[inline]
pub const fn sint_msr(sint: u8) -> Option<u32> {
    if sint < SINT_COUNT {
        Some(MSR_SINT0 + sint as u32)
    } else {
        None
    }
}

/// Byte offset of a SINT's slot in its SIMP page, and of its flags in its SIEFP page; `None` if
/// there is no such SINT.
#[inline]
pub const fn slot_offset(sint: u8) -> Option<usize> {
    if sint < SINT_COUNT {
        Some(sint as usize * MESSAGE_SIZE)
    } else {
        None
    }
}

/// A SINT's register (`union hv_synic_sint`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sint(u64);

bitflags! {
    impl Sint: u64 {
        /// No interrupt is raised for this SINT; the host leaves its messages queued.
        const MASKED = 1 << 16;
        /// The interrupt ends by itself, without EOI.
        const AUTO_EOI = 1 << 17;
        /// No interrupt; the guest polls the pages.
        const POLLING = 1 << 18;

        // The vector and the reserved bits.
        const _ = !0;
    }
}

impl Sint {
    /// The register for `vector`, unmasked.
    #[inline]
    pub const fn with_vector(vector: u8) -> Self {
        Self(vector as u64)
    }

    /// The interrupt vector; 16 is the lowest that is valid (`HV_SYNIC_FIRST_VALID_VECTOR`).
    #[inline]
    pub const fn vector(self) -> u8 {
        (self.0 & 0xff) as u8
    }
}

impl core::fmt::Debug for Sint {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Sint({:#x})", self.0)
    }
}

open_enum! {
    /// Type of a SynIC message. The hypervisor's own have bit 31 set (TLFS, HV_MESSAGE_TYPE;
    /// `enum hv_message_type`); others belong to whoever posts them.
    pub struct SynicMessageType: u32 {
        /// The slot is empty.
        NONE = 0,
        /// A VMBus message.
        CHANNEL = 1,
        /// A synthetic timer expired.
        TIMER_EXPIRED = 0x8000_0010,
    }
}

/// `flags` bit of a message: more messages wait for this slot, so EOM must be written.
pub const MESSAGE_PENDING: u8 = 1;

/// One message slot of a SIMP page, 256 bytes (TLFS, HV_MESSAGE; `struct hv_message`).
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HvMessage {
    /// Who speaks; [`SynicMessageType::NONE`] while the slot is free.
    pub message_type: SynicMessageType,
    /// Length of the payload in bytes, at most 240; see [`payload`](Self::payload).
    pub payload_size: u8,
    /// Bit 0: [`MESSAGE_PENDING`].
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// Partition or port that sent the message.
    pub sender: U64,
    /// The payload; only `payload_size` bytes of it count.
    pub payload: [u8; MESSAGE_PAYLOAD_SIZE],
}

const _: () = assert!(size_of::<HvMessage>() == MESSAGE_SIZE);
const _: () = assert!(core::mem::offset_of!(HvMessage, payload) == 16);

/// Byte offset of `flags` in a message slot: the guest reads it again after it freed the slot.
pub const MESSAGE_FLAGS_OFFSET: usize = core::mem::offset_of!(HvMessage, flags);

impl HvMessage {
    /// A message with this payload; `None` if it is longer than 240 bytes.
    pub fn new(message_type: SynicMessageType, payload: &[u8]) -> Option<Self> {
        let mut message = Self {
            message_type,
            payload_size: u8::try_from(payload.len()).ok()?,
            ..FromZeros::new_zeroed()
        };
        message
            .payload
            .get_mut(..payload.len())?
            .copy_from_slice(payload);
        Some(message)
    }

    /// The bytes of the payload that count; `None` if `payload_size` is out of bounds.
    #[inline]
    pub fn payload(&self) -> Option<&[u8]> {
        self.payload.get(..usize::from(self.payload_size))
    }

    /// Whether more messages wait for this slot.
    #[inline]
    pub const fn is_pending(&self) -> bool {
        self.flags & MESSAGE_PENDING != 0
    }
}

impl core::fmt::Debug for HvMessage {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("HvMessage")
            .field("message_type", &self.message_type)
            .field("flags", &self.flags)
            .field("sender", &self.sender.get())
            .field("payload", &self.payload())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromBytes, IntoBytes};

    #[test]
    fn message_bounds() {
        assert!(HvMessage::new(SynicMessageType::CHANNEL, &[7; 240]).is_some());
        assert!(HvMessage::new(SynicMessageType::CHANNEL, &[7; 241]).is_none());
        assert!(HvMessage::new(SynicMessageType::CHANNEL, &[7; 256]).is_none());
        let mut message = HvMessage::new(SynicMessageType::CHANNEL, &[]).unwrap();
        assert_eq!(message.payload(), Some(&[][..]));
        message.payload_size = 241;
        assert_eq!(message.payload(), None);
    }

    #[test]
    fn layout() {
        let bytes = *HvMessage::new(SynicMessageType::TIMER_EXPIRED, &[0xaa, 0xbb])
            .unwrap()
            .as_bytes()
            .first_chunk::<18>()
            .unwrap();
        assert_eq!(bytes[..8], [0x10, 0, 0, 0x80, 2, 0, 0, 0]);
        assert_eq!(bytes[16..], [0xaa, 0xbb]);
        assert_eq!(MESSAGE_FLAGS_OFFSET, 5);
    }

    #[test]
    fn registers() {
        let sint = Sint::with_vector(LINUX_VMBUS_VECTOR) | Sint::AUTO_EOI;
        assert_eq!(sint.bits(), 0x200f3);
        assert_eq!(sint.vector(), 0xf3);
        assert!(!sint.contains(Sint::MASKED));
        assert_eq!(sint_msr(VMBUS_SINT), Some(0x4000_0092));
        assert_eq!(sint_msr(16), None);
        assert_eq!(slot_offset(VMBUS_SINT), Some(512));
        assert_eq!(slot_offset(16), None);
        assert!(is_enabled(0x1234_5001));
        assert_eq!(page_address(0x1234_5001), 0x1234_5000);
    }

    #[test]
    fn unknown_types_print_as_numbers() {
        assert_eq!(format!("{:?}", SynicMessageType::new(1)), "CHANNEL");
        assert_eq!(
            format!("{:?}", SynicMessageType::new(2)),
            "SynicMessageType(0x2)"
        );
    }

    proptest::proptest! {
        #[test]
        fn any_slot_is_safe(bytes in proptest::collection::vec(proptest::num::u8::ANY, 256)) {
            let message = HvMessage::read_from_bytes(&bytes).unwrap();
            match message.payload() {
                Some(payload) => proptest::prop_assert_eq!(payload.len(), usize::from(bytes[4])),
                None => proptest::prop_assert!(bytes[4] > 240),
            }
            let _ = format!("{message:?}");
        }
    }
}
