// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Hypercalls: codes, statuses, and the inputs of the two that VMBus uses.
//!
//! Source: TLFS, "Hypercall Interface", HvCallPostMessage and HvCallSignalEvent;
//! `hyperv/hvgdk_mini.h`, `drivers/hv/hyperv_vmbus.h`.
//!
//! ```
//! use hv_proto::hypercall::{HypercallCode, HypercallInput, SignalEvent};
//! use hv_proto::ids::ConnectionId;
//!
//! let input = HypercallInput::fast(HypercallCode::SIGNAL_EVENT);
//! assert_eq!(input.raw(), 0x1005d);
//! assert_eq!(SignalEvent::new(ConnectionId::EVENT, 0).raw(), 2);
//! ```

use crate::ids::ConnectionId;
use crate::synic::{SynicMessageType, MESSAGE_PAYLOAD_SIZE};
use zerocopy::little_endian::U32;
use zerocopy::FromZeros;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

open_enum! {
    /// Which hypercall is made (`HVCALL_*`).
    pub struct HypercallCode: u16 {
        /// HvFlushVirtualAddressSpace.
        FLUSH_VIRTUAL_ADDRESS_SPACE = 0x0002,
        /// HvFlushVirtualAddressList.
        FLUSH_VIRTUAL_ADDRESS_LIST = 0x0003,
        /// HvNotifyLongSpinWait.
        NOTIFY_LONG_SPIN_WAIT = 0x0008,
        /// HvSendSyntheticClusterIpi.
        SEND_IPI = 0x000b,
        /// HvFlushVirtualAddressSpaceEx.
        FLUSH_VIRTUAL_ADDRESS_SPACE_EX = 0x0013,
        /// HvFlushVirtualAddressListEx.
        FLUSH_VIRTUAL_ADDRESS_LIST_EX = 0x0014,
        /// HvSendSyntheticClusterIpiEx.
        SEND_IPI_EX = 0x0015,
        /// HvPostMessage; input [`PostMessage`].
        POST_MESSAGE = 0x005c,
        /// HvSignalEvent; input [`SignalEvent`].
        SIGNAL_EVENT = 0x005d,
        /// HvPostDebugData.
        POST_DEBUG_DATA = 0x0069,
        /// HvRetrieveDebugData.
        RETRIEVE_DEBUG_DATA = 0x006a,
        /// HvResetDebugSession.
        RESET_DEBUG_SESSION = 0x006b,
        /// HvExtCallQueryCapabilities, the first of the extended hypercalls.
        QUERY_CAPABILITIES = 0x8001,
    }
}

open_enum! {
    /// What a hypercall came to (`HV_STATUS_*`).
    pub struct HvStatus: u16 {
        /// Done.
        SUCCESS = 0x0000,
        /// No such hypercall.
        INVALID_HYPERCALL_CODE = 0x0002,
        /// The control word or the form of the input is wrong.
        INVALID_HYPERCALL_INPUT = 0x0003,
        /// The input does not lie at a multiple of 8 bytes, or crosses a page.
        INVALID_ALIGNMENT = 0x0004,
        /// A field of the input is wrong.
        INVALID_PARAMETER = 0x0005,
        /// The caller has no right to it.
        ACCESS_DENIED = 0x0006,
        /// The partition is in the wrong state.
        INVALID_PARTITION_STATE = 0x0007,
        /// Not now.
        OPERATION_DENIED = 0x0008,
        /// The hypervisor needs more memory; the call may be made again.
        INSUFFICIENT_MEMORY = 0x000b,
        /// No such processor.
        INVALID_VP_INDEX = 0x000e,
        /// No such port.
        INVALID_PORT_ID = 0x0011,
        /// No such connection. The answer to INITIATE_CONTACT on a connection that the host does
        /// not have, which means an older host.
        INVALID_CONNECTION_ID = 0x0012,
        /// All message buffers are in use; the call may be made again.
        INSUFFICIENT_BUFFERS = 0x0013,
        /// A message was not acknowledged.
        NOT_ACKNOWLEDGED = 0x0014,
        /// The processor is in the wrong state.
        INVALID_VP_STATE = 0x0015,
        /// The SynIC is off.
        INVALID_SYNIC_STATE = 0x0018,
    }
}

impl HvStatus {
    /// Whether the call was done.
    #[inline]
    pub fn is_success(self) -> bool {
        self == Self::SUCCESS
    }

    /// Whether HvPostMessage may succeed when it is made again a little later: the host is out of
    /// memory or of buffers.
    ///
    /// [`INVALID_CONNECTION_ID`](Self::INVALID_CONNECTION_ID) is not among them although the host
    /// also gives it for a moment while a connection is set up: for INITIATE_CONTACT it means
    /// that another version must be tried, so the caller decides.
    #[inline]
    pub fn is_retryable(self) -> bool {
        self == Self::INSUFFICIENT_MEMORY || self == Self::INSUFFICIENT_BUFFERS
    }
}

/// The control word of a hypercall, in RCX (TLFS, "Hypercall Interface").
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HypercallInput(u64);

impl HypercallInput {
    const FAST: u64 = 1 << 16;
    /// Bits that must be zero: 31:27, 47:44 and 63:60.
    const RESERVED: u64 = 0xf000_f000_f800_0000;

    /// A call whose input lies in memory.
    #[inline]
    pub const fn memory(code: HypercallCode) -> Self {
        Self(code.get() as u64)
    }

    /// A call whose input is in registers: 16 bytes in RDX and R8.
    #[inline]
    pub const fn fast(code: HypercallCode) -> Self {
        Self(code.get() as u64 | Self::FAST)
    }

    /// Wraps a control word that a guest gave.
    #[inline]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The control word.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Which hypercall.
    #[inline]
    pub const fn code(self) -> HypercallCode {
        HypercallCode::new(self.0 as u16)
    }

    /// Whether the input is in registers.
    #[inline]
    pub const fn is_fast(self) -> bool {
        self.0 & Self::FAST != 0
    }

    /// Size of the variable header, in units of 8 bytes (0 to 1023).
    #[inline]
    pub const fn variable_header_size(self) -> u16 {
        (self.0 >> 17) as u16 & 0x3ff
    }

    /// Number of repetitions, 0 for a simple call (0 to 4095).
    #[inline]
    pub const fn rep_count(self) -> u16 {
        (self.0 >> 32) as u16 & 0xfff
    }

    /// Where the repetitions start (0 to 4095).
    #[inline]
    pub const fn rep_start(self) -> u16 {
        (self.0 >> 48) as u16 & 0xfff
    }

    /// Whether a simple call, which is neither repeated nor has a variable header, may have this
    /// control word.
    #[inline]
    pub const fn is_simple(self) -> bool {
        self.0 & !(Self::FAST | 0xffff) == 0
    }

    /// Whether all reserved bits are zero.
    #[inline]
    pub const fn reserved_is_zero(self) -> bool {
        self.0 & Self::RESERVED == 0
    }
}

/// The status in the result of a hypercall, RAX (TLFS, "Hypercall Interface": bits 15:0).
#[inline]
pub const fn status_of(result: u64) -> HvStatus {
    HvStatus::new(result as u16)
}

/// Input of HvPostMessage, 256 bytes at a multiple of 8 within one page (TLFS, HvCallPostMessage;
/// `struct hv_input_post_message`).
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PostMessage {
    /// To whom.
    pub connection_id: ConnectionId,
    /// Zero.
    pub reserved: U32,
    /// What the receiver sees as type; bit 31 must be clear.
    pub message_type: SynicMessageType,
    /// Length of the payload in bytes, at most 240.
    pub payload_size: U32,
    /// The payload; only `payload_size` bytes of it count.
    pub payload: [u8; MESSAGE_PAYLOAD_SIZE],
}

const _: () = assert!(size_of::<PostMessage>() == 256);

impl PostMessage {
    /// The input that posts `payload`; `None` if it is longer than 240 bytes.
    pub fn new(
        connection_id: ConnectionId,
        message_type: SynicMessageType,
        payload: &[u8],
    ) -> Option<Self> {
        let mut input = Self {
            connection_id,
            message_type,
            payload_size: U32::new(u32::try_from(payload.len()).ok()?),
            ..FromZeros::new_zeroed()
        };
        input
            .payload
            .get_mut(..payload.len())?
            .copy_from_slice(payload);
        Some(input)
    }

    /// Judges the input as the hypervisor does: the connection id has 24 bits, the type's bit 31
    /// is clear and the type is not 0 (an empty slot), and the payload is at most 240 bytes.
    ///
    /// # Errors
    ///
    /// The status for the caller: INVALID_CONNECTION_ID or INVALID_PARAMETER.
    pub fn payload(&self) -> Result<&[u8], HvStatus> {
        if !self.connection_id.is_valid() {
            return Err(HvStatus::INVALID_CONNECTION_ID);
        }
        let message_type = self.message_type.get();
        if message_type == 0 || message_type & 0x8000_0000 != 0 {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        usize::try_from(self.payload_size.get())
            .ok()
            .and_then(|size| self.payload.get(..size))
            .ok_or(HvStatus::INVALID_PARAMETER)
    }
}

impl core::fmt::Debug for PostMessage {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("PostMessage")
            .field("connection_id", &self.connection_id)
            .field("message_type", &self.message_type)
            .field("payload", &self.payload())
            .finish_non_exhaustive()
    }
}

/// Input of HvSignalEvent, 8 bytes: connection in bits 31:0, flag number in bits 47:32 (TLFS,
/// HvCallSignalEvent).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SignalEvent(u64);

impl SignalEvent {
    /// Signals flag `flag` of `connection`, counted from the connection's first flag.
    #[inline]
    pub const fn new(connection: ConnectionId, flag: u16) -> Self {
        Self(connection.get() as u64 | (flag as u64) << 32)
    }

    /// Wraps what a guest gave.
    #[inline]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The 8 bytes as a number, as a fast hypercall takes them.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Which connection.
    #[inline]
    pub const fn connection_id(self) -> ConnectionId {
        ConnectionId::new(self.0 as u32)
    }

    /// Which flag.
    #[inline]
    pub const fn flag(self) -> u16 {
        (self.0 >> 32) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromBytes, IntoBytes};

    #[test]
    fn control_word() {
        let input = HypercallInput::from_raw(0x0123_0fed_0000_000b | 5 << 17);
        assert_eq!(input.code(), HypercallCode::SEND_IPI);
        assert_eq!(input.variable_header_size(), 5);
        assert_eq!(input.rep_count(), 0xfed);
        assert_eq!(input.rep_start(), 0x123);
        assert!(!input.is_fast() && !input.is_simple() && input.reserved_is_zero());
        assert!(HypercallInput::memory(HypercallCode::POST_MESSAGE).is_simple());
        assert!(HypercallInput::fast(HypercallCode::SIGNAL_EVENT).is_simple());
        assert!(!HypercallInput::from_raw(1 << 63).reserved_is_zero());
        assert_eq!(
            status_of(0xffff_ffff_ffff_0012),
            HvStatus::INVALID_CONNECTION_ID
        );
    }

    #[test]
    fn post_message_is_judged() {
        let channel = SynicMessageType::CHANNEL;
        let good = PostMessage::new(ConnectionId::MESSAGE, channel, &[1, 2, 3]).unwrap();
        assert_eq!(good.payload(), Ok(&[1, 2, 3][..]));
        assert_eq!(
            good.as_bytes()[..16],
            [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]
        );
        assert!(PostMessage::new(ConnectionId::MESSAGE, channel, &[0; 241]).is_none());

        let mut bad = good;
        bad.payload_size = U32::new(241);
        assert_eq!(bad.payload(), Err(HvStatus::INVALID_PARAMETER));
        let mut bad = good;
        bad.message_type = SynicMessageType::TIMER_EXPIRED;
        assert_eq!(bad.payload(), Err(HvStatus::INVALID_PARAMETER));
        bad.message_type = SynicMessageType::NONE;
        assert_eq!(bad.payload(), Err(HvStatus::INVALID_PARAMETER));
        let mut bad = good;
        bad.connection_id = ConnectionId::new(0x100_0001);
        assert_eq!(bad.payload(), Err(HvStatus::INVALID_CONNECTION_ID));
    }

    #[test]
    fn signal_event() {
        let event = SignalEvent::new(ConnectionId::new(0x12_3456), 0x789);
        assert_eq!(event.raw(), 0x0789_0012_3456);
        assert_eq!(event.connection_id().get(), 0x12_3456);
        assert_eq!(event.flag(), 0x789);
    }

    proptest::proptest! {
        #[test]
        fn any_input_is_safe(bytes in proptest::collection::vec(proptest::num::u8::ANY, 256)) {
            let input = PostMessage::read_from_bytes(&bytes).unwrap();
            if let Ok(payload) = input.payload() {
                proptest::prop_assert!(payload.len() <= 240);
            }
            let _ = format!("{input:?}");
        }
    }
}
