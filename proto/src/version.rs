// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Versions of the VMBus protocol, and what each of them changed.
//!
//! A version is major << 16 | minor on the wire. Versions below 4.0 (Windows Server 2012 R2 and
//! older) are not spoken by this crate, as they are not by Linux 7.3
//! (`VERSION_WIN10*` in `linux/hyperv.h`, `vmbus_versions[]` in `drivers/hv/connection.c`).
//!
//! ```
//! use hv_proto::version::Version;
//!
//! assert_eq!("5.3".parse(), Ok(Version::V5_3));
//! assert!(Version::V4_1 < Version::V5_0);
//! assert_eq!(Version::V5_3.raw(), 0x0005_0003);
//! assert_eq!(Version::at_most(0x0005_ffff), Some(Version::V5_3));
//! ```

use core::fmt;
use core::str::FromStr;

/// A version of the protocol. Later versions compare greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Version {
    /// 4.0, Windows 10.
    V4_0 = 0x0004_0000,
    /// 4.1, Windows 10 RS3.
    V4_1 = 0x0004_0001,
    /// 5.0, Windows 10 RS4.
    V5_0 = 0x0005_0000,
    /// 5.1, Windows 10 RS5 and Windows Server 2019.
    V5_1 = 0x0005_0001,
    /// 5.2, Windows Server 2022 previews.
    V5_2 = 0x0005_0002,
    /// 5.3, Windows Server 2022.
    V5_3 = 0x0005_0003,
    /// 6.0, hosts that know confidential channels.
    V6_0 = 0x0006_0000,
}

impl Version {
    /// All versions, the newest first: the order in which a guest tries them.
    pub const NEWEST_FIRST: [Self; 7] = [
        Self::V6_0,
        Self::V5_3,
        Self::V5_2,
        Self::V5_1,
        Self::V5_0,
        Self::V4_1,
        Self::V4_0,
    ];

    /// The newest version.
    pub const NEWEST: Self = Self::V6_0;
    /// The oldest version.
    pub const OLDEST: Self = Self::V4_0;

    /// The version that a number of the wire names, if it is one of ours.
    pub fn from_raw(raw: u32) -> Option<Self> {
        Self::NEWEST_FIRST.into_iter().find(|v| v.raw() == raw)
    }

    /// The newest version whose number is not above `raw`; `None` if even 4.0 is.
    ///
    /// This is how the module parameter `max_version` is read: it may name a version that does
    /// not exist.
    pub fn at_most(raw: u32) -> Option<Self> {
        Self::NEWEST_FIRST.into_iter().find(|v| v.raw() <= raw)
    }

    /// The next older version, `None` after 4.0.
    pub fn older(self) -> Option<Self> {
        Self::NEWEST_FIRST.into_iter().find(|v| *v < self)
    }

    /// The number on the wire: major << 16 | minor.
    #[inline]
    pub const fn raw(self) -> u32 {
        self as u32
    }

    /// The number before the point.
    #[inline]
    pub const fn major(self) -> u16 {
        (self.raw() >> 16) as u16
    }

    /// The number after the point.
    #[inline]
    pub const fn minor(self) -> u16 {
        (self.raw() & 0xffff) as u16
    }

    /// 5.0 and later: VERSION_RESPONSE carries the connection id for all later messages, and
    /// INITIATE_CONTACT goes to connection 4. Before, every message goes to connection 1.
    #[inline]
    pub fn uses_message_connection_id(self) -> bool {
        self >= Self::V5_0
    }

    /// 5.0 and later: INITIATE_CONTACT names the SINT and the VTL for the host's messages in the
    /// field that older versions use for the interrupt page.
    #[inline]
    pub fn names_message_sint(self) -> bool {
        self >= Self::V5_0
    }

    /// Before 5.0 the host knows the guest's interrupt page, so a channel without a dedicated
    /// interrupt is signalled by its bit there and event connection 2. Later hosts are never told
    /// the page's address, and must offer every channel with a dedicated interrupt.
    #[inline]
    pub fn has_interrupt_page(self) -> bool {
        self < Self::V5_0
    }

    /// 4.1 and later: MODIFYCHANNEL moves an open channel's interrupts to another processor.
    #[inline]
    pub fn has_modify_channel(self) -> bool {
        self >= Self::V4_1
    }

    /// 5.3 and later: the host answers MODIFYCHANNEL, so the guest can know when the old
    /// processor gets no more interrupts (which taking that processor offline needs).
    #[inline]
    pub fn has_modify_channel_response(self) -> bool {
        self >= Self::V5_3
    }

    /// 5.2 and later: what an isolated (confidential) guest asks for at least.
    #[inline]
    pub fn supports_isolation(self) -> bool {
        self >= Self::V5_2
    }

    /// 6.0 and later: INITIATE_CONTACT has feature flags, and offers may ask for confidential
    /// rings and confidential external memory.
    #[inline]
    pub fn has_confidential_channels(self) -> bool {
        self >= Self::V6_0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())
    }
}

impl From<Version> for u32 {
    fn from(version: Version) -> Self {
        version.raw()
    }
}

/// The text is not the name of a version from 4.0 to 6.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownVersion;

impl fmt::Display for UnknownVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a VMBus version (4.0, 4.1, 5.0, 5.1, 5.2, 5.3 or 6.0)")
    }
}

impl core::error::Error for UnknownVersion {}

impl FromStr for Version {
    type Err = UnknownVersion;

    /// Reads `major.minor` as people write it.
    fn from_str(text: &str) -> Result<Self, UnknownVersion> {
        let (major, minor) = text.split_once('.').ok_or(UnknownVersion)?;
        let number = |digits: &str| {
            let plain = digits.bytes().all(|b| b.is_ascii_digit());
            digits
                .parse::<u16>()
                .ok()
                .filter(|_| plain)
                .ok_or(UnknownVersion)
        };
        let raw = (u32::from(number(major)?) << 16) | u32::from(number(minor)?);
        Self::from_raw(raw).ok_or(UnknownVersion)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_numbers_agree() {
        for pair in Version::NEWEST_FIRST.windows(2) {
            assert!(pair[0] > pair[1] && pair[0].raw() > pair[1].raw());
            assert_eq!(pair[0].older(), Some(pair[1]));
        }
        assert_eq!(Version::OLDEST.older(), None);
        for version in Version::NEWEST_FIRST {
            assert_eq!(Version::from_raw(version.raw()), Some(version));
            assert_eq!(version.to_string().parse(), Ok(version));
        }
        assert_eq!(Version::from_raw(0x0003_0000), None);
        assert_eq!(Version::from_raw(0x0005_0004), None);
    }

    #[test]
    fn cap_may_lie_between_versions() {
        assert_eq!(Version::at_most(u32::MAX), Some(Version::V6_0));
        assert_eq!(Version::at_most(0x0004_0009), Some(Version::V4_1));
        assert_eq!(Version::at_most(0x0003_ffff), None);
    }

    #[test]
    fn text_must_be_exact() {
        for text in [
            "", "5", "5.", ".3", "5.4", "+5.3", "5.3.0", "v5.3", "5.03 ", "65541.3",
        ] {
            assert_eq!(text.parse::<Version>(), Err(UnknownVersion), "{text}");
        }
    }

    #[test]
    fn features_start_where_they_should() {
        assert!(Version::V4_1.has_interrupt_page() && !Version::V5_0.has_interrupt_page());
        assert!(!Version::V4_0.has_modify_channel() && Version::V4_1.has_modify_channel());
        assert!(!Version::V5_2.has_modify_channel_response());
        assert!(Version::V5_3.has_modify_channel_response());
        assert!(!Version::V5_3.has_confidential_channels());
        assert!(Version::V6_0.has_confidential_channels());
        assert!(!Version::V5_1.supports_isolation() && Version::V5_2.supports_isolation());
    }

    proptest::proptest! {
        #[test]
        fn any_text_and_any_number(text in "[0-9.+ v]{0,8}", raw: u32) {
            if let Ok(version) = text.parse::<Version>() {
                proptest::prop_assert_eq!(Version::from_raw(version.raw()), Some(version));
            }
            if let Some(version) = Version::at_most(raw) {
                proptest::prop_assert!(version.raw() <= raw);
                let newer = Version::NEWEST_FIRST.into_iter().filter(|v| *v > version);
                for version in newer {
                    proptest::prop_assert!(version.raw() > raw);
                }
            }
        }
    }
}
