// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Offloads of a network adapter: what the host can do ([`Capabilities`]), and what the guest turns on
//! and off ([`Parameters`]).
//!
//! Both structures have grown with NDIS. A revision is an earlier one with something added at the end;
//! what is missing at the end counts as zero, which means "cannot" and "no change".
//!
//! Uses `zerocopy` and `bitflags`.
//!
//! Source: `hyperv_net.h` of the kernel's network driver (`struct ndis_offload`, `struct
//! ndis_offload_params`), and the NDIS documentation of the structures of the same names.

use super::nvsp::Version;
use crate::message::read_prefix;
use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromZeros as _, IntoBytes as _};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

open_enum! {
    /// Kind of a structure of NDIS.
    pub struct ObjectType: u8 {
        /// One whose place says what it is.
        DEFAULT = 0x80,
        /// [`super::rss::Capabilities`].
        RSS_CAPABILITIES = 0x88,
        /// [`super::rss::Parameters`].
        RSS_PARAMETERS = 0x89,
        /// [`Capabilities`].
        OFFLOAD = 0xa7,
    }
}

/// What every structure of NDIS starts with.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ObjectHeader {
    /// Kind of the structure.
    pub object_type: ObjectType,
    /// Revision of the kind.
    pub revision: u8,
    /// Bytes of the structure, with this header.
    pub size: U16,
}

impl ObjectHeader {
    /// The bytes of the structure that starts `value`, if it is of this kind, has at least revision 1,
    /// at least `min_size` bytes, and lies in `value`.
    pub(super) fn check(
        value: &[u8],
        object_type: ObjectType,
        min_size: usize,
    ) -> Result<(Self, &[u8]), ObjectError> {
        let header: Self = read_prefix(value).ok_or(ObjectError::Truncated(value.len()))?;
        if header.object_type != object_type {
            return Err(ObjectError::Type(header.object_type));
        }
        if header.revision == 0 {
            return Err(ObjectError::Revision(header.revision));
        }
        let size = usize::from(header.size.get());
        let bytes = value
            .get(..size)
            .filter(|_| size >= min_size)
            .ok_or(ObjectError::Size(header.size.get()))?;
        Ok((header, bytes))
    }
}

/// Why a value is not the structure of NDIS that it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ObjectError {
    /// Too short for a header; the number is its length in bytes.
    Truncated(usize),
    /// Of another kind.
    Type(ObjectType),
    /// Of an impossible revision.
    Revision(u8),
    /// It says that it is shorter than the first revision, or longer than what is there.
    Size(u16),
    /// A table or key in it lies outside of it, or has an impossible size.
    Table {
        /// Where it starts, in bytes from the start of the structure.
        offset: u32,
        /// Its length in bytes.
        len: u32,
    },
}

impl core::fmt::Display for ObjectError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::Truncated(len) => write!(f, "NDIS structure of {len} bytes has no header"),
            Self::Type(object_type) => write!(f, "unexpected NDIS structure {object_type:?}"),
            Self::Revision(revision) => write!(f, "bad revision {revision} of an NDIS structure"),
            Self::Size(size) => write!(f, "bad size {size} of an NDIS structure"),
            Self::Table { offset, len } => {
                write!(
                    f,
                    "bad table of {len} bytes at {offset} of an NDIS structure"
                )
            }
        }
    }
}

impl core::error::Error for ObjectError {}

/// Copies what there is of `bytes` into a `T`; the rest is zero.
fn read_with_zeros<T>(bytes: &[u8]) -> T
where
    T: zerocopy::FromZeros + zerocopy::IntoBytes + zerocopy::FromBytes,
{
    let mut value = T::new_zeroed();
    for (to, from) in value.as_mut_bytes().iter_mut().zip(bytes) {
        *to = *from;
    }
    value
}

/// How a frame may be wrapped for an offload to work on it. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Encapsulation(u32);

bitflags! {
    impl Encapsulation: u32 {
        /// Not at all.
        const NULL = 0x01;
        /// Ethernet.
        const IEEE_802_3 = 0x02;
        /// Ethernet with a VLAN tag.
        const IEEE_802_3_PQ = 0x04;
        /// Ethernet with a VLAN tag beside the frame.
        const IEEE_802_3_PQ_OOB = 0x08;
        const _ = !0;
    }
}

/// Checksums that can be computed for IPv4. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Ipv4Checksums(u32);

bitflags! {
    impl Ipv4Checksums: u32 {
        /// With options in the IP header.
        const IP_OPTIONS = 0x001;
        /// With options in the TCP header.
        const TCP_OPTIONS = 0x004;
        /// That of TCP.
        const TCP = 0x010;
        /// That of UDP.
        const UDP = 0x040;
        /// That of the IP header.
        const IP = 0x100;
        const _ = !0;
    }
}

/// Checksums that can be computed for IPv6. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Ipv6Checksums(u32);

bitflags! {
    impl Ipv6Checksums: u32 {
        /// With extension headers.
        const EXTENSION_HEADERS = 0x001;
        /// With options in the TCP header.
        const TCP_OPTIONS = 0x004;
        /// That of TCP.
        const TCP = 0x010;
        /// That of UDP.
        const UDP = 0x040;
        const _ = !0;
    }
}

/// Which frames of IPv6 large send can divide. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Ipv6LsoOptions(u32);

bitflags! {
    impl Ipv6LsoOptions: u32 {
        /// Those with extension headers.
        const EXTENSION_HEADERS = 0x001;
        /// Those with options in the TCP header.
        const TCP_OPTIONS = 0x004;
        const _ = !0;
    }
}

/// What the host can do with checksums (`struct ndis_csum_offload`).
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct ChecksumCapabilities {
    /// [`Encapsulation`] of frames of IPv4 from the guest.
    pub ipv4_send_encapsulation: U32,
    /// [`Ipv4Checksums`] of frames from the guest.
    pub ipv4_send: U32,
    /// [`Encapsulation`] of frames of IPv4 to the guest.
    pub ipv4_receive_encapsulation: U32,
    /// [`Ipv4Checksums`] of frames to the guest.
    pub ipv4_receive: U32,
    /// [`Encapsulation`] of frames of IPv6 from the guest.
    pub ipv6_send_encapsulation: U32,
    /// [`Ipv6Checksums`] of frames from the guest.
    pub ipv6_send: U32,
    /// [`Encapsulation`] of frames of IPv6 to the guest.
    pub ipv6_receive_encapsulation: U32,
    /// [`Ipv6Checksums`] of frames to the guest.
    pub ipv6_receive: U32,
}

/// Large send, version 1 (`struct ndis_lsov1_offload`).
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct LsoV1Capabilities {
    /// [`Encapsulation`].
    pub encapsulation: U32,
    /// Largest frame, in bytes.
    pub max_size: U32,
    /// Fewest segments of a frame.
    pub min_segments: U32,
    /// Options that frames may have.
    pub options: U32,
}

/// Large send, version 2 (`struct ndis_lsov2_offload`).
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct LsoV2Capabilities {
    /// [`Encapsulation`] of frames of IPv4.
    pub ipv4_encapsulation: U32,
    /// Largest frame of IPv4, in bytes.
    pub ipv4_max_size: U32,
    /// Fewest segments of a frame of IPv4.
    pub ipv4_min_segments: U32,
    /// [`Encapsulation`] of frames of IPv6.
    pub ipv6_encapsulation: U32,
    /// Largest frame of IPv6, in bytes.
    pub ipv6_max_size: U32,
    /// Fewest segments of a frame of IPv6.
    pub ipv6_min_segments: U32,
    /// [`Ipv6LsoOptions`].
    pub ipv6_options: U32,
}

/// What the host can do (`struct ndis_offload`, revision 3). IPsec and encapsulation are not looked at.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Capabilities {
    /// Kind, revision, size.
    pub header: ObjectHeader,
    /// Checksums.
    pub checksum: ChecksumCapabilities,
    /// Large send, version 1.
    pub lso_v1: LsoV1Capabilities,
    /// IPsec, version 1.
    pub ipsec_v1: [U32; 7],
    /// Large send, version 2.
    pub lso_v2: LsoV2Capabilities,
    /// Flags.
    pub flags: U32,
    /// Since revision 2: IPsec, version 2.
    pub ipsec_v2: [U32; 8],
    /// Since revision 3: not 0 if segments of TCP over IPv4 are coalesced.
    pub rsc_ipv4: u8,
    /// Since revision 3: the same for IPv6.
    pub rsc_ipv6: u8,
    /// Zero.
    pub reserved: U16,
    /// Since revision 3: encapsulation in GRE, flags.
    pub gre_flags: U32,
    /// Since revision 3: encapsulation in GRE, longest header in bytes.
    pub gre_max_header: U32,
}

/// Bytes of the offload structure at each revision.
const CAPABILITY_SIZES: [usize; 3] = [112, 144, 156];

const _: () = assert!(size_of::<Capabilities>() == CAPABILITY_SIZES[2]);

impl Capabilities {
    /// The revision that goes with a version of NVSP.
    fn revision(version: Version) -> u8 {
        match version {
            Version::V1 | Version::V2 => 1,
            Version::V4 => 2,
            Version::V5 | Version::V6 | Version::V6_1 => 3,
        }
    }

    /// Nothing can be done; header as a guest sends it to say which revision it asks for.
    pub fn empty(version: Version) -> Self {
        Self::with_revision(Self::revision(version))
    }

    /// Nothing can be done, in this revision: 1, 2, or 3 for any other number.
    pub fn with_revision(revision: u8) -> Self {
        let [first, second, third] = CAPABILITY_SIZES;
        let (revision, size) = match revision {
            1 => (1, first),
            2 => (2, second),
            _ => (3, third),
        };
        let mut empty = Self::new_zeroed();
        empty.header = ObjectHeader {
            object_type: ObjectType::OFFLOAD,
            revision,
            size: U16::new(size as u16),
        };
        empty
    }

    /// The bytes that belong to the revision of the header.
    pub fn as_value(&self) -> &[u8] {
        let size = usize::from(self.header.size.get());
        self.as_bytes().get(..size).unwrap_or(self.as_bytes())
    }

    /// Parses the value of an answer.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub fn parse(value: &[u8]) -> Result<Self, ObjectError> {
        let [first, ..] = CAPABILITY_SIZES;
        let (_, bytes) = ObjectHeader::check(value, ObjectType::OFFLOAD, first)?;
        Ok(read_with_zeros(bytes))
    }

    /// Checksums that the host computes for IPv4.
    pub fn ipv4_send(&self) -> Ipv4Checksums {
        Ipv4Checksums::from_bits_retain(self.checksum.ipv4_send.get())
    }

    /// Checksums that the host computes for IPv6.
    pub fn ipv6_send(&self) -> Ipv6Checksums {
        Ipv6Checksums::from_bits_retain(self.checksum.ipv6_send.get())
    }

    /// Largest frame of IPv4 that the host divides, in bytes; `None` if it divides none.
    pub fn ipv4_lso(&self) -> Option<u32> {
        let encapsulation = Encapsulation::from_bits_retain(self.lso_v2.ipv4_encapsulation.get());
        Some(self.lso_v2.ipv4_max_size.get())
            .filter(|&max| max != 0 && encapsulation.contains(Encapsulation::IEEE_802_3))
    }

    /// Largest frame of IPv6 that the host divides, in bytes; `None` if it divides none, or only such
    /// without options.
    pub fn ipv6_lso(&self) -> Option<u32> {
        let encapsulation = Encapsulation::from_bits_retain(self.lso_v2.ipv6_encapsulation.get());
        let options = Ipv6LsoOptions::from_bits_retain(self.lso_v2.ipv6_options.get());
        let all = Ipv6LsoOptions::EXTENSION_HEADERS | Ipv6LsoOptions::TCP_OPTIONS;
        Some(self.lso_v2.ipv6_max_size.get()).filter(|&max| {
            max != 0 && encapsulation.contains(Encapsulation::IEEE_802_3) && options.contains(all)
        })
    }

    /// Whether the host coalesces segments of IPv4 and of IPv6.
    pub fn rsc(&self) -> bool {
        self.rsc_ipv4 != 0 && self.rsc_ipv6 != 0
    }
}

open_enum! {
    /// What is to become of a checksum offload.
    pub struct ChecksumSetting: u8 {
        /// It stays as it is.
        NO_CHANGE = 0,
        /// Off both ways.
        DISABLED = 1,
        /// On for frames from the guest, off for those to it.
        SEND = 2,
        /// On for frames to the guest, off for those from it.
        RECEIVE = 3,
        /// On both ways.
        ENABLED = 4,
    }
}

open_enum! {
    /// What is to become of another offload.
    pub struct Setting: u8 {
        /// It stays as it is.
        NO_CHANGE = 0,
        /// Off.
        DISABLED = 1,
        /// On.
        ENABLED = 2,
    }
}

impl ChecksumSetting {
    /// Whether frames from the guest get this checksum, if `now` says whether they do.
    pub fn apply_to_send(self, now: bool) -> bool {
        match self {
            Self::SEND | Self::ENABLED => true,
            Self::DISABLED | Self::RECEIVE => false,
            _ => now,
        }
    }

    /// Whether this checksum of frames to the guest is looked at, if `now` says whether it is.
    pub fn apply_to_receive(self, now: bool) -> bool {
        match self {
            Self::RECEIVE | Self::ENABLED => true,
            Self::DISABLED | Self::SEND => false,
            _ => now,
        }
    }
}

impl Setting {
    /// Whether the offload is on afterwards, if `now` says whether it is.
    pub fn apply(self, now: bool) -> bool {
        match self {
            Self::ENABLED => true,
            Self::DISABLED => false,
            _ => now,
        }
    }
}

/// What the guest turns on and off (`struct ndis_offload_params`). Zeros change nothing.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Parameters {
    /// Kind, revision, size.
    pub header: ObjectHeader,
    /// Checksum of the IPv4 header.
    pub ipv4_checksum: ChecksumSetting,
    /// Checksum of TCP over IPv4.
    pub tcp_ipv4_checksum: ChecksumSetting,
    /// Checksum of UDP over IPv4.
    pub udp_ipv4_checksum: ChecksumSetting,
    /// Checksum of TCP over IPv6.
    pub tcp_ipv6_checksum: ChecksumSetting,
    /// Checksum of UDP over IPv6.
    pub udp_ipv6_checksum: ChecksumSetting,
    /// Large send, version 1.
    pub lso_v1: Setting,
    /// IPsec, version 1.
    pub ipsec_v1: u8,
    /// Large send, version 2, for IPv4.
    pub lso_v2_ipv4: Setting,
    /// Large send, version 2, for IPv6.
    pub lso_v2_ipv6: Setting,
    /// Connections over IPv4 in the adapter.
    pub connection_ipv4: u8,
    /// Connections over IPv6 in the adapter.
    pub connection_ipv6: u8,
    /// Zero.
    pub reserved: u8,
    /// Flags.
    pub flags: U32,
    /// IPsec, version 2.
    pub ipsec_v2: u8,
    /// IPsec, version 2, for IPv4.
    pub ipsec_v2_ipv4: u8,
    /// Coalescing of segments of IPv4.
    pub rsc_ipv4: Setting,
    /// Coalescing of segments of IPv6.
    pub rsc_ipv6: Setting,
    /// Encapsulation.
    pub encapsulation: u8,
    /// Kinds of it.
    pub encapsulation_types: u8,
    /// Zero.
    pub reserved2: U16,
}

const _: () = assert!(size_of::<Parameters>() == 28);

/// Bytes of the parameters before version 5: without coalescing and encapsulation.
const OLD_PARAMETERS_SIZE: usize = 22;

/// Bytes of the parameters at their first revision.
const MIN_PARAMETERS_SIZE: usize = 20;

impl Parameters {
    /// Changes nothing.
    pub fn unchanged(version: Version) -> Self {
        let size = if version <= Version::V4 {
            OLD_PARAMETERS_SIZE
        } else {
            size_of::<Self>()
        };
        let mut parameters = Self::new_zeroed();
        parameters.header = ObjectHeader {
            object_type: ObjectType::DEFAULT,
            revision: 3,
            size: U16::new(size as u16),
        };
        parameters
    }

    /// The bytes that hosts of the version know.
    pub fn as_value(&self) -> &[u8] {
        let size = usize::from(self.header.size.get());
        self.as_bytes().get(..size).unwrap_or(self.as_bytes())
    }

    /// Parses the value of a request.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub fn parse(value: &[u8]) -> Result<Self, ObjectError> {
        let (_, bytes) = ObjectHeader::check(value, ObjectType::DEFAULT, MIN_PARAMETERS_SIZE)?;
        Ok(read_with_zeros(bytes))
    }
}
