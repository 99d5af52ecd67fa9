// SPDX-License-Identifier: GPL-2.0 OR MIT

//! GUIDs: how offers name a device's class and instance.
//!
//! On the wire a GUID is 16 bytes: the first three groups little-endian, the rest in the order of
//! the text (`guid_t`, `GUID_INIT` in `linux/uuid.h`).
//!
//! ```
//! use hv_proto::guid::{self, Guid};
//!
//! const SCSI: Guid = hv_proto::guid!("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
//! assert_eq!(SCSI, guid::SCSI);
//! assert_eq!(SCSI.as_bytes()[..4], [0xd9, 0x63, 0x61, 0xba]);
//! assert_eq!("{ba6163d9-04a1-4d29-b605-72e2ffb1dc7f}".parse(), Ok(SCSI));
//! ```

use core::fmt;
use core::str::FromStr;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A GUID as it stands on the wire, 16 bytes.
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
pub struct Guid([u8; 16]);

/// Where each byte of the text stands on the wire.
const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl Guid {
    /// All bits zero.
    pub const ZERO: Self = Self([0; 16]);

    /// A GUID from the bytes of the wire.
    #[inline]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes of the wire.
    #[inline]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Whether all bits are zero.
    #[inline]
    pub const fn is_zero(&self) -> bool {
        u128::from_le_bytes(self.0) == 0
    }

    /// Reads `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`, in either case; `None` for other text.
    pub const fn parse(text: &str) -> Option<Self> {
        let mut rest = text.as_bytes();
        if rest.len() != 36 {
            return None;
        }
        let mut digits: u128 = 0;
        let mut at = 0_u8;
        while let Some((&c, tail)) = rest.split_first() {
            if matches!(at, 8 | 13 | 18 | 23) {
                if c != b'-' {
                    return None;
                }
            } else {
                let Some(digit) = hex_digit(c) else {
                    return None;
                };
                digits = digits << 4 | digit as u128;
            }
            at = at.wrapping_add(1);
            rest = tail;
        }
        // The first three fields are numbers, little-endian; the rest is bytes.
        let numbers = (digits >> 96) as u32 as u64
            | ((digits >> 80) as u16 as u64) << 32
            | ((digits >> 64) as u16 as u64) << 48;
        let bytes = (digits as u64).swap_bytes();
        Some(Self(
            (numbers as u128 | (bytes as u128) << 64).to_le_bytes(),
        ))
    }

    /// A GUID that a constant names; see the macro [`guid!`](crate::guid!).
    ///
    /// # Panics
    ///
    /// When the text is not a GUID, which in a constant is an error of the compiler.
    #[inline]
    pub const fn literal(text: &str) -> Self {
        match Self::parse(text) {
            Some(guid) => guid,
            None => panic!("not a GUID"),
        }
    }
}

const fn hex_digit(c: u8) -> Option<u8> {
    match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        b'A'..=b'F' => Some(c - b'A' + 10),
        _ => None,
    }
}

/// A constant GUID from its text, checked by the compiler.
#[macro_export]
macro_rules! guid {
    ($text:literal) => {
        const { $crate::guid::Guid::literal($text) }
    };
}

impl fmt::Display for Guid {
    /// Lower case, with dashes, without braces: the form that sysfs shows.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, at) in ORDER.iter().enumerate() {
            if matches!(n, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0.get(*at).copied().unwrap_or_default())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a GUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidGuid;

impl fmt::Display for InvalidGuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a GUID (xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx)")
    }
}

impl core::error::Error for InvalidGuid {}

impl FromStr for Guid {
    type Err = InvalidGuid;

    /// Reads the text with or without braces.
    fn from_str(text: &str) -> Result<Self, InvalidGuid> {
        let inner = match text.strip_prefix('{') {
            Some(rest) => rest.strip_suffix('}').ok_or(InvalidGuid)?,
            None => text,
        };
        Self::parse(inner).ok_or(InvalidGuid)
    }
}

macro_rules! classes {
    ($($(#[$meta:meta])* $name:ident = $text:literal, $title:literal;)*) => {
        $($(#[$meta])* pub const $name: Guid = guid!($text);)*

        /// The classes that have a name here, with the name.
        pub const CLASSES: &[(Guid, &str)] = &[$(($name, $title)),*];
    };
}

classes! {
    /// Network adapter.
    NETWORK = "f8615163-df3e-46c5-913f-f2d2f965ed0e", "network adapter";
    /// SCSI controller.
    SCSI = "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f", "SCSI controller";
    /// IDE disks of generation 1 machines, through the storage protocol.
    IDE = "32412632-86cb-44a2-9b5c-50d1417354f5", "IDE controller";
    /// Fibre Channel adapter.
    FIBRE_CHANNEL = "2f9bcc4a-0069-4af3-b76b-6fd0be528cda", "Fibre Channel adapter";
    /// Mouse (HID).
    MOUSE = "cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a", "mouse";
    /// Keyboard.
    KEYBOARD = "f912ad6d-2b17-48ea-bd65-f927a61c7684", "keyboard";
    /// Shutdown by the host.
    SHUTDOWN = "0e0b6031-5213-4934-818b-38d90ced39db", "shutdown";
    /// Time synchronization.
    TIME_SYNC = "9527e630-d0ae-497b-adce-e80ab0175caf", "time synchronization";
    /// Heartbeat.
    HEARTBEAT = "57164f39-9115-4e78-ab55-382f3bd5422d", "heartbeat";
    /// Data exchange (key-value pairs).
    KVP = "a9a0f4e7-5a45-4d96-b827-8a841e8c03e6", "data exchange";
    /// Backup (volume snapshots).
    VSS = "35fa2e29-ea23-4236-96ae-3a6ebacba440", "backup";
    /// File copy from the host.
    FILE_COPY = "34d14be3-dee4-41c8-9ae7-6b174977c192", "file copy";
    /// Dynamic memory.
    DYNAMIC_MEMORY = "525074dc-8985-46e2-8057-a307dc18a502", "dynamic memory";
    /// Video.
    VIDEO = "da0a7802-e377-4aac-8e77-0558eb1073f8", "video";
    /// PCI Express pass-through.
    PCI = "44c4f61d-4444-4400-9d52-802e27ede19f", "PCI pass-through";
    /// Network Direct (RDMA).
    NETWORK_DIRECT = "8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501", "Network Direct";
    /// Automatic activation of Windows guests, first part.
    ACTIVATION_1 = "f8e65716-3cb3-4a06-9a60-1889c5cccab5", "activation";
    /// Automatic activation of Windows guests, second part.
    ACTIVATION_2 = "3375baf4-9e15-4b30-b765-67acb10d607b", "activation";
    /// Remote desktop of Windows guests.
    REMOTE_DESKTOP = "276aacf4-ac15-426c-98dd-7521ad3f01fe", "remote desktop";
    /// Initial configuration of Windows guests.
    INITIAL_CONFIGURATION = "c376c1c3-d276-48d2-90a9-c04748072c60", "initial configuration";
}

/// The name of a device class, `None` for a class that is not known here.
pub fn class_name(class: &Guid) -> Option<&'static str> {
    CLASSES
        .iter()
        .find(|(guid, _)| guid == class)
        .map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes() {
        let guid = guid!("00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(
            guid.as_bytes(),
            &[
                0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd,
                0xee, 0xff
            ]
        );
        assert_eq!(guid.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
        assert!(Guid::ZERO.is_zero() && !guid.is_zero());
    }

    #[test]
    fn rejects_other_text() {
        for text in [
            "",
            "{}",
            "00112233-4455-6677-8899-aabbccddeef",
            "00112233-4455-6677-8899-aabbccddeefff",
            "{00112233-4455-6677-8899-aabbccddeeff",
            "00112233-4455-6677-8899-aabbccddeeff}",
            "00112233x4455-6677-8899-aabbccddeeff",
            "0011223g-4455-6677-8899-aabbccddeeff",
            "0011223-34455-6677-8899-aabbccddeeff",
            "00112233-4455-6677-8899-aabbccddee\u{e9}",
        ] {
            assert_eq!(text.parse::<Guid>(), Err(InvalidGuid), "{text}");
        }
    }

    #[test]
    fn classes_differ_and_have_names() {
        for (n, (guid, name)) in CLASSES.iter().enumerate() {
            assert_eq!(class_name(guid), Some(*name));
            assert!(CLASSES.iter().skip(n + 1).all(|(other, _)| other != guid));
        }
        assert_eq!(class_name(&Guid::ZERO), None);
    }

    proptest::proptest! {
        #[test]
        fn round_trip(bytes: [u8; 16]) {
            let guid = Guid::from_bytes(bytes);
            proptest::prop_assert_eq!(guid.to_string().parse(), Ok(guid));
            proptest::prop_assert_eq!(guid.to_string().to_uppercase().parse(), Ok(guid));
        }

        #[test]
        fn any_text_is_safe(text in ".{0,40}") {
            let _ = text.parse::<Guid>();
        }
    }
}
