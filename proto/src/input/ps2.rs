// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The PC keyboard whose scan codes the host sends, as software sees it through a keyboard
//! controller that translates (scan code set 1).
//!
//! An operating system asks such a keyboard who it is and sets its lights. The host does not answer
//! that, so the guest does it itself. It also sees to it that no scan code comes between a command and
//! its parameter: software that waits for an answer drops what is none.
//!
//! Source: the IBM PS/2 technical reference, "Keyboards"; what Linux sends is in
//! `drivers/input/keyboard/atkbd.c`.

use super::keyboard::Leds;

/// The command was understood.
const ACK: u8 = 0xfa;

/// The command was not understood.
const NAK: u8 = 0xfe;

/// The self test has passed.
const SELF_TEST_PASSED: u8 = 0xaa;

/// What the controller makes of the second byte of the id (0x83), and of the number of scan code
/// set 2.
const TRANSLATED: u8 = 0x41;

const SET_LEDS: u8 = 0xed;
const ECHO: u8 = 0xee;
const SCAN_CODE_SET: u8 = 0xf0;
const IDENTIFY: u8 = 0xf2;
const SET_RATE: u8 = 0xf3;
const ENABLE: u8 = 0xf4;
const DISABLE: u8 = 0xf5;
const SET_DEFAULTS: u8 = 0xf6;
const RESET: u8 = 0xff;

/// Bytes of scan codes that are held back; more keys than a user presses during a command.
const HELD: usize = 64;

/// Length of the longest answer, in bytes.
const ANSWER: usize = 3;

/// Bytes that are sent together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bytes<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Bytes<N> {
    const EMPTY: Self = Self {
        bytes: [0; N],
        len: 0,
    };

    /// Adds all of `more`, or nothing if there is no room.
    fn push(&mut self, more: &[u8]) {
        let end = self.len.saturating_add(more.len());
        if let Some(room) = self.bytes.get_mut(self.len..end) {
            for (to, from) in room.iter_mut().zip(more) {
                *to = *from;
            }
            self.len = end;
        }
    }

    fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// What the keyboard sends when software has written a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    bytes: Bytes<{ ANSWER + HELD }>,
    /// The lights were set.
    pub leds: Option<Leds>,
}

impl Answer {
    fn new(answer: &[u8]) -> Self {
        let mut bytes = Bytes::EMPTY;
        bytes.push(answer);
        Self { bytes, leds: None }
    }

    /// The answer, and the scan codes that were held back until it.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }
}

/// The keyboard.
#[derive(Clone, Debug)]
pub struct Ps2Keyboard {
    /// The command whose parameter comes next.
    command: Option<u8>,
    /// Scan codes that come after it.
    held: Bytes<HELD>,
    scanning: bool,
    leds: Leds,
}

impl Default for Ps2Keyboard {
    fn default() -> Self {
        Self::new()
    }
}

impl Ps2Keyboard {
    /// A keyboard that was switched on just now.
    pub const fn new() -> Self {
        Self {
            command: None,
            held: Bytes::EMPTY,
            scanning: true,
            leds: Leds::empty(),
        }
    }

    /// Whether keys are looked at.
    pub fn is_scanning(&self) -> bool {
        self.scanning
    }

    /// The lights that are on.
    pub fn leds(&self) -> Leds {
        self.leds
    }

    /// A key was used: gives those of its scan codes that are sent now, all or none. None are before
    /// the parameter of a command has come; the answer to that has them.
    pub fn scan<'a>(&mut self, codes: &'a [u8]) -> &'a [u8] {
        if self.command.is_none() && self.scanning {
            return codes;
        }
        if self.scanning {
            self.held.push(codes);
        }
        &[]
    }

    /// Software has written a byte.
    pub fn write(&mut self, byte: u8) -> Answer {
        let mut answer = self.answer(byte);
        if self.command.is_none() {
            answer.bytes.push(self.held.as_slice());
            self.held = Bytes::EMPTY;
        }
        answer
    }

    fn answer(&mut self, byte: u8) -> Answer {
        // A command may come in place of a parameter; those are below.
        let command = self.command.take().filter(|_| byte < SET_LEDS);
        match (command, byte) {
            (Some(SET_LEDS), leds) => {
                self.leds = Leds::from_bits_truncate(leds.into());
                let mut answer = Answer::new(&[ACK]);
                answer.leds = Some(self.leds);
                answer
            }
            (Some(SCAN_CODE_SET), 0) => Answer::new(&[ACK, TRANSLATED]),
            (Some(_), _) => Answer::new(&[ACK]),
            (None, SET_LEDS | SCAN_CODE_SET | SET_RATE) => {
                self.command = Some(byte);
                Answer::new(&[ACK])
            }
            (None, IDENTIFY) => Answer::new(&[ACK, 0xab, TRANSLATED]),
            (None, ECHO) => Answer::new(&[ECHO]),
            (None, ENABLE) => {
                self.scanning = true;
                Answer::new(&[ACK])
            }
            (None, DISABLE) => {
                self.scanning = false;
                Answer::new(&[ACK])
            }
            (None, SET_DEFAULTS) => Answer::new(&[ACK]),
            (None, RESET) => {
                *self = Self::new();
                let mut answer = Answer::new(&[ACK, SELF_TEST_PASSED]);
                answer.leds = Some(self.leds);
                answer
            }
            (None, _) => Answer::new(&[NAK]),
        }
    }
}
