// SPDX-License-Identifier: MIT OR Apache-2.0

//! Keys by name: what an operator calls them, and what a PC keyboard sends for them (scan code
//! set 1).

use std::str::FromStr;

use hv_proto::input::keyboard::{KeyFlags, Keystroke};
use hv_proto::input::typing::us_key;

/// A key of a PC keyboard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Scan code without prefix.
    code: u8,
    flags: KeyFlags,
}

/// Not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no key '{0}': a character of a US keyboard, a name such as enter, f1, leftctrl, \
     delete or kp5, or a scan code such as 0x1e, e0:0x48 expected"
)]
pub struct KeyError(String);

/// Names of keys without prefix, besides the characters.
const PLAIN: &[(&str, u8)] = &[
    ("esc", 0x01),
    ("backspace", 0x0e),
    ("tab", 0x0f),
    ("enter", 0x1c),
    ("leftctrl", 0x1d),
    ("ctrl", 0x1d),
    ("leftshift", 0x2a),
    ("shift", 0x2a),
    ("rightshift", 0x36),
    ("kpasterisk", 0x37),
    ("leftalt", 0x38),
    ("alt", 0x38),
    ("space", 0x39),
    ("capslock", 0x3a),
    ("f1", 0x3b),
    ("f2", 0x3c),
    ("f3", 0x3d),
    ("f4", 0x3e),
    ("f5", 0x3f),
    ("f6", 0x40),
    ("f7", 0x41),
    ("f8", 0x42),
    ("f9", 0x43),
    ("f10", 0x44),
    ("numlock", 0x45),
    ("scrolllock", 0x46),
    ("kp7", 0x47),
    ("kp8", 0x48),
    ("kp9", 0x49),
    ("kpminus", 0x4a),
    ("kp4", 0x4b),
    ("kp5", 0x4c),
    ("kp6", 0x4d),
    ("kpplus", 0x4e),
    ("kp1", 0x4f),
    ("kp2", 0x50),
    ("kp3", 0x51),
    ("kp0", 0x52),
    ("kpdot", 0x53),
    ("sysrq", 0x54),
    ("102nd", 0x56),
    ("f11", 0x57),
    ("f12", 0x58),
    ("minus", 0x0c),
    ("comma", 0x33),
];

/// Names of keys with the prefix 0xe0.
const E0: &[(&str, u8)] = &[
    ("kpenter", 0x1c),
    ("rightctrl", 0x1d),
    ("mute", 0x20),
    ("volumedown", 0x2e),
    ("volumeup", 0x30),
    ("kpslash", 0x35),
    ("rightalt", 0x38),
    ("home", 0x47),
    ("up", 0x48),
    ("pageup", 0x49),
    ("left", 0x4b),
    ("right", 0x4d),
    ("end", 0x4f),
    ("down", 0x50),
    ("pagedown", 0x51),
    ("insert", 0x52),
    ("delete", 0x53),
    ("leftmeta", 0x5b),
    ("meta", 0x5b),
    ("rightmeta", 0x5c),
    ("menu", 0x5d),
    ("power", 0x5e),
    ("sleep", 0x5f),
];

/// The second half of what a keyboard sends for the Pause key, which is `E1 1D 45`.
const PAUSE_SECOND: u8 = 0x45;
const PAUSE: Key = Key {
    code: 0x1d,
    flags: KeyFlags::E1,
};

impl Key {
    /// What is sent when the key goes down or up.
    pub fn strokes(self, down: bool) -> impl Iterator<Item = Keystroke> {
        let up = if down {
            KeyFlags::empty()
        } else {
            KeyFlags::BREAK
        };
        let first = Keystroke::new(self.code.into(), self.flags | up);
        let second = (self == PAUSE).then(|| Keystroke::new(PAUSE_SECOND.into(), up));
        [Some(first), second].into_iter().flatten()
    }

    /// Keys that are pressed together, such as `ctrl-alt-delete`. The minus key in such a list is
    /// called `minus`.
    ///
    /// # Errors
    /// The first name that is not a key.
    pub fn chord(text: &str) -> Result<Vec<Self>, KeyError> {
        if text == "-" {
            return Ok(vec!["minus".parse()?]);
        }
        text.split('-').map(str::parse).collect()
    }
}

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(name: &str) -> Result<Self, KeyError> {
        let error = || KeyError(name.to_owned());
        let find = |table: &[(&str, u8)]| {
            let known = table.iter().find(|(known, _)| *known == name);
            known.map(|(_, code)| *code)
        };
        let plain = |code| Key {
            code,
            flags: KeyFlags::empty(),
        };
        if name == "pause" {
            return Ok(PAUSE);
        }
        if let Some(code) = find(PLAIN) {
            return Ok(plain(code));
        }
        if let Some(code) = find(E0) {
            let flags = KeyFlags::E0;
            return Ok(Key { code, flags });
        }
        let mut characters = name.chars();
        if let (Some(character), None) = (characters.next(), characters.next()) {
            // With Shift it would be another key: that has to be named.
            let key = us_key(character).filter(|key| !key.shift);
            return key.map(|key| plain(key.code)).ok_or_else(error);
        }
        let (flags, number) = match name.split_once(':') {
            Some(("e0", number)) => (KeyFlags::E0, number),
            Some(("e1", number)) => (KeyFlags::E1, number),
            Some(_) => return Err(error()),
            None => (KeyFlags::empty(), name),
        };
        let digits = number.strip_prefix("0x").ok_or_else(error)?;
        let digits = Some(digits).filter(|d| d.bytes().all(|c| c.is_ascii_hexdigit()));
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        let code = code.filter(|code| code & 0x80 == 0).ok_or_else(error)?;
        Ok(Key { code, flags })
    }
}
