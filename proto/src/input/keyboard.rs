// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The keyboard: scan codes from the host, indicator lights to it.
//!
//! Guest: request. Host: response, then keystrokes ([`GuestKeyboard`], [`HostKeyboard`]).

use crate::message::{read_prefix, split_prefix};
use bitflags::bitflags;
use core::fmt;
use zerocopy::little_endian::{U16, U32};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The only version in use, 1.0.
pub const VERSION: u32 = 0x0001_0000;

/// Flag of the response: the version is accepted.
pub const ACCEPTED: u32 = 1;

open_enum! {
    /// What a message is.
    pub struct MessageType: u32 {
        /// Guest: proposes a version.
        PROTOCOL_REQUEST = 1,
        /// Host: accepts it or not.
        PROTOCOL_RESPONSE = 2,
        /// Host: a key goes down or up.
        EVENT = 3,
        /// Guest: which indicator lights are on.
        LED_INDICATORS = 4,
    }
}

/// Proposes a version.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ProtocolRequest {
    /// What the message is.
    pub message_type: MessageType,
    /// Major version in the upper half, minor version in the lower one.
    pub version: U32,
}

/// Accepts a version or not.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ProtocolResponse {
    /// What the message is.
    pub message_type: MessageType,
    /// [`ACCEPTED`] or not.
    pub status: U32,
}

impl ProtocolResponse {
    /// Accepts or refuses.
    pub fn new(accepted: bool) -> Self {
        Self {
            message_type: MessageType::PROTOCOL_RESPONSE,
            status: if accepted { ACCEPTED } else { 0 }.into(),
        }
    }
}

/// Flags of a keystroke. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct KeyFlags(u32);

bitflags! {
    impl KeyFlags: u32 {
        /// The code is a UTF-16 code unit, not a scan code.
        const UNICODE = 1;
        /// The key goes up.
        const BREAK = 2;
        /// The scan code has the prefix 0xe0.
        const E0 = 4;
        /// The scan code has the prefix 0xe1.
        const E1 = 8;
        const _ = !0;
    }
}

/// A key goes down or up, 12 bytes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Keystroke {
    /// What the message is.
    pub message_type: MessageType,
    /// Scan code (set 1) of the key without the bit that means "up", or UTF-16 code unit.
    pub make_code: U16,
    /// Zero.
    pub reserved: U16,
    /// [`KeyFlags`].
    pub info: U32,
}

const _: () = assert!(size_of::<Keystroke>() == 12);

impl Keystroke {
    /// A keystroke.
    pub fn new(make_code: u16, flags: KeyFlags) -> Self {
        Self {
            message_type: MessageType::EVENT,
            make_code: make_code.into(),
            reserved: U16::ZERO,
            info: flags.bits().into(),
        }
    }

    /// Flags of the keystroke.
    pub fn flags(&self) -> KeyFlags {
        KeyFlags::from_bits_retain(self.info.get())
    }

    /// What the keystroke is.
    pub fn key(&self) -> Result<Key, GuestError> {
        let flags = self.flags();
        let code = self.make_code.get();
        if flags.contains(KeyFlags::UNICODE) {
            return Ok(Key::Unicode {
                unit: code,
                down: !flags.contains(KeyFlags::BREAK),
            });
        }
        // Above 0x7f, keyboards send answers to commands; only two Korean keys have codes there.
        let code = match u8::try_from(code) {
            Ok(code @ (..=0x7f | 0xf1 | 0xf2)) => code,
            _ => return Err(GuestError::MakeCode(code)),
        };
        let mut codes = ScanCodes {
            bytes: [0; 3],
            len: 0,
        };
        if flags.contains(KeyFlags::E0) {
            codes.push(0xe0);
        }
        if flags.contains(KeyFlags::E1) {
            codes.push(0xe1);
        }
        let up = flags.contains(KeyFlags::BREAK);
        codes.push(if up { code | 0x80 } else { code });
        Ok(Key::Scan { codes, down: !up })
    }
}

/// What a keystroke is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A key of a PC keyboard.
    Scan {
        /// What that keyboard sends.
        codes: ScanCodes,
        /// Whether the key goes down.
        down: bool,
    },
    /// A character.
    Unicode {
        /// UTF-16 code unit.
        unit: u16,
        /// Whether the key goes down.
        down: bool,
    },
}

/// What a PC keyboard sends for a key that goes down or up: at most 3 bytes of scan code set 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanCodes {
    bytes: [u8; 3],
    len: usize,
}

impl ScanCodes {
    fn push(&mut self, byte: u8) {
        if let Some(to) = self.bytes.get_mut(self.len) {
            *to = byte;
            self.len = self.len.saturating_add(1);
        }
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// Indicator lights, numbered as PC keyboards do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Leds(u16);

bitflags! {
    impl Leds: u16 {
        /// Scroll lock.
        const SCROLL_LOCK = 1;
        /// Num lock.
        const NUM_LOCK = 2;
        /// Caps lock.
        const CAPS_LOCK = 4;
    }
}

/// Which indicator lights are on, 8 bytes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct LedIndicators {
    /// What the message is.
    pub message_type: MessageType,
    /// [`Leds`].
    pub leds: U16,
    /// Zero.
    pub reserved: U16,
}

impl LedIndicators {
    /// These lights are on.
    pub fn new(leds: Leds) -> Self {
        Self {
            message_type: MessageType::LED_INDICATORS,
            leds: leds.bits().into(),
            reserved: U16::ZERO,
        }
    }
}

/// What the guest has to do after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestStep {
    /// The host accepts the version: keystrokes may come.
    Ready,
    /// Hand on a keystroke.
    Key(Key),
}

/// What is wrong with a message of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestError {
    /// Too few bytes.
    TooShort {
        /// How many bytes are needed.
        needed: usize,
        /// How many there are.
        len: usize,
    },
    /// This message may not come now.
    Unexpected(MessageType),
    /// The host does not know the version.
    Refused,
    /// No key has this scan code.
    MakeCode(u16),
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort { needed, len } => write!(f, "{len} bytes instead of {needed}"),
            Self::Unexpected(message_type) => write!(f, "{message_type:?} is not expected now"),
            Self::Refused => f.write_str("host does not know version 1.0"),
            Self::MakeCode(code) => write!(f, "impossible scan code {code:#x}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestState {
    Idle,
    Asked,
    Ready,
}

/// The guest's side of a keyboard.
#[derive(Clone, Debug)]
pub struct GuestKeyboard(GuestState);

impl Default for GuestKeyboard {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestKeyboard {
    /// The side of a channel that was opened just now.
    pub const fn new() -> Self {
        Self(GuestState::Idle)
    }

    /// Begins; what comes back is to be sent.
    pub fn start(&mut self) -> ProtocolRequest {
        self.0 = GuestState::Asked;
        ProtocolRequest {
            message_type: MessageType::PROTOCOL_REQUEST,
            version: U32::new(VERSION),
        }
    }

    /// A packet of the host has come.
    ///
    /// # Errors
    ///
    /// Nothing is to be done; after [`GuestError::Refused`] the handshake is over.
    pub fn on_packet(&mut self, payload: &[u8]) -> Result<GuestStep, GuestError> {
        let message_type = read::<MessageType>(payload)?;
        match (self.0, message_type) {
            (GuestState::Asked, MessageType::PROTOCOL_RESPONSE) => {
                let response: ProtocolResponse = read(payload)?;
                if response.status.get() & ACCEPTED == 0 {
                    self.0 = GuestState::Idle;
                    return Err(GuestError::Refused);
                }
                self.0 = GuestState::Ready;
                Ok(GuestStep::Ready)
            }
            (GuestState::Ready, MessageType::EVENT) => {
                read::<Keystroke>(payload)?.key().map(GuestStep::Key)
            }
            (_, message_type) => Err(GuestError::Unexpected(message_type)),
        }
    }
}

fn read<T: zerocopy::FromBytes>(payload: &[u8]) -> Result<T, GuestError> {
    read_prefix(payload).ok_or(GuestError::TooShort {
        needed: size_of::<T>(),
        len: payload.len(),
    })
}

/// What the host has to do after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostStep {
    /// Send this. If it accepts, keystrokes may be sent.
    Respond(ProtocolResponse),
    /// The guest has switched indicator lights.
    Leds(Leds),
}

/// What is wrong with a message of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostError {
    /// Too few bytes.
    TooShort {
        /// How many there are.
        len: usize,
    },
    /// This message may not come now.
    Unexpected(MessageType),
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort { len } => write!(f, "message of {len} bytes is too short"),
            Self::Unexpected(message_type) => write!(f, "{message_type:?} is not expected now"),
        }
    }
}

impl core::error::Error for HostError {}

/// The host's side of a keyboard.
#[derive(Clone, Debug, Default)]
pub struct HostKeyboard {
    ready: bool,
}

impl HostKeyboard {
    /// The side of a channel that was opened just now.
    pub const fn new() -> Self {
        Self { ready: false }
    }

    /// Whether keystrokes may be sent.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// A packet of the guest has come.
    pub fn on_packet(&mut self, payload: &[u8]) -> Result<HostStep, HostError> {
        let short = HostError::TooShort { len: payload.len() };
        let (message_type, rest): (MessageType, _) = split_prefix(payload).ok_or(short)?;
        match (self.ready, message_type) {
            (false, MessageType::PROTOCOL_REQUEST) => {
                let version: U32 = read_prefix(rest).ok_or(short)?;
                self.ready = version.get() == VERSION;
                Ok(HostStep::Respond(ProtocolResponse::new(self.ready)))
            }
            (true, MessageType::LED_INDICATORS) => {
                let leds: U16 = read_prefix(rest).ok_or(short)?;
                Ok(HostStep::Leds(Leds::from_bits_truncate(leds.get())))
            }
            (_, message_type) => Err(HostError::Unexpected(message_type)),
        }
    }
}
