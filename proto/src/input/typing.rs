// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Which keys make a text.
//!
//! What has a key of its own on a US keyboard is typed with that. Everything else is typed as Linux'
//! text console understands it: Alt held down while its number is entered on the keypad.

use super::keyboard::Leds;

/// Scan code of the left Shift key.
pub const LEFT_SHIFT: u8 = 0x2a;

/// Scan code of the left Alt key.
const LEFT_ALT: u8 = 0x38;

/// Scan codes of the keypad's digits.
const KEYPAD: [u8; 10] = [0x52, 0x4f, 0x50, 0x51, 0x4b, 0x4c, 0x4d, 0x47, 0x48, 0x49];

/// Bit of a scan code: the key goes up.
const UP: u8 = 0x80;

/// Keys with characters: the scan code of the first of a row, what they make, and what they make
/// with Shift.
const ROWS: [(u8, &[u8], &[u8]); 6] = [
    (0x02, b"1234567890-=", b"!@#$%^&*()_+"),
    (0x0e, b"\x08\t", b""),
    (0x10, b"qwertyuiop[]\n", b"QWERTYUIOP{}"),
    (0x1e, b"asdfghjkl;'`", b"ASDFGHJKL:\"~"),
    (0x2b, b"\\zxcvbnm,./", b"|ZXCVBNM<>?"),
    (0x39, b" ", b""),
];

/// Scan code of the Escape key.
const ESCAPE: u8 = 0x01;

/// A key of a US keyboard, with or without Shift.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsKey {
    /// Scan code.
    pub code: u8,
    /// Whether Shift is held down.
    pub shift: bool,
}

/// The key that makes `character` on a US keyboard, if there is one. Line feed and carriage return
/// are Enter.
pub fn us_key(character: char) -> Option<UsKey> {
    let byte = match character {
        '\r' => b'\n',
        '\x1b' => {
            return Some(UsKey {
                code: ESCAPE,
                shift: false,
            })
        }
        other => u8::try_from(other).ok()?,
    };
    ROWS.iter().find_map(|(first, plain, shifted)| {
        let place = |row: &[u8]| row.iter().position(|key| *key == byte);
        let (at, shift) = match (place(plain), place(shifted)) {
            (Some(at), _) => (at, false),
            (None, Some(at)) => (at, true),
            (None, None) => return None,
        };
        Some(UsKey {
            code: first.checked_add(u8::try_from(at).ok()?)?,
            shift,
        })
    })
}

/// Keys that go down and up: scan codes of set 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strokes {
    // Alt down, seven digits down and up, Alt up.
    bytes: [u8; 16],
    len: usize,
}

impl Strokes {
    /// The keys that make `character` while these lights are on.
    pub fn of(character: char, leds: Leds) -> Self {
        let mut this = Self {
            bytes: [0; 16],
            len: 0,
        };
        match us_key(character) {
            Some(key) => {
                let inverted = leds.contains(Leds::CAPS_LOCK) && character.is_ascii_alphabetic();
                let shift = key.shift != inverted;
                if shift {
                    this.push(LEFT_SHIFT);
                }
                this.press(key.code);
                if shift {
                    this.push(LEFT_SHIFT | UP);
                }
            }
            None => {
                this.push(LEFT_ALT);
                this.number(character.into());
                this.push(LEFT_ALT | UP);
            }
        }
        this
    }

    fn number(&mut self, number: u32) {
        // Numbers of characters have at most seven digits.
        let mut place = 1_000_000;
        let mut begun = false;
        while place != 0 {
            let digit = (number / place) % 10;
            begun = begun || digit != 0 || place == 1;
            if begun {
                let key = usize::try_from(digit).ok().and_then(|at| KEYPAD.get(at));
                self.press(key.copied().unwrap_or_default());
            }
            place /= 10;
        }
    }

    fn press(&mut self, code: u8) {
        self.push(code);
        self.push(code | UP);
    }

    fn push(&mut self, byte: u8) {
        if let Some(to) = self.bytes.get_mut(self.len) {
            *to = byte;
            self.len = self.len.saturating_add(1);
        }
    }

    /// The scan codes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// Makes characters of UTF-16 code units that come one by one.
#[derive(Clone, Debug, Default)]
pub struct Utf16 {
    high: Option<u16>,
}

impl Utf16 {
    /// The next code unit. What has no meaning is left out.
    pub fn push(&mut self, unit: u16) -> Option<char> {
        // A half that is alone is an error, which gives nothing.
        let high = self.high.take().filter(|_| matches!(unit, 0xdc00..=0xdfff));
        if matches!(unit, 0xd800..=0xdbff) {
            self.high = Some(unit);
            return None;
        }
        char::decode_utf16(high.into_iter().chain([unit]))
            .next()?
            .ok()
    }
}
