// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the messages of RNDIS carry. [`super::rndis`] has their numbers and parsers, and exports these.
//!
//! Uses `zerocopy`. Source: `hyperv_net.h` of the kernel's network driver, [MS-RNDIS] 2.2.

use super::oid::Oid;
use super::rndis::{Medium, Status};
use zerocopy::little_endian::U32;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Declares the bodies of messages, all of whose fields have 4 bytes.
macro_rules! bodies {
    ($($(#[$meta:meta])* pub struct $name:ident {
        $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)*
    })*) => {
        $(
            $(#[$meta])*
            #[derive(
                Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
                Unaligned,
            )]
            #[repr(C)]
            pub struct $name {
                $($(#[$field_meta])* pub $field: $type,)*
            }
        )*
    };
}

bodies! {
    /// Body of [`MessageType::INITIALIZE`].
    pub struct Initialize {
        /// Number of the request.
        pub request_id: U32,
        /// [`MAJOR_VERSION`].
        pub major_version: U32,
        /// [`MINOR_VERSION`].
        pub minor_version: U32,
        /// The largest message that the guest can receive, in bytes.
        pub max_transfer_size: U32,
    }

    /// Body of [`MessageType::INITIALIZE_COMPLETE`].
    pub struct InitializeComplete {
        /// Number of the request.
        pub request_id: U32,
        /// Result.
        pub status: Status,
        /// [`MAJOR_VERSION`].
        pub major_version: U32,
        /// [`MINOR_VERSION`].
        pub minor_version: U32,
        /// 1: there are no connections below the adapter.
        pub device_flags: U32,
        /// Kind of network.
        pub medium: Medium,
        /// Most messages in a row that the host takes.
        pub max_packets_per_message: U32,
        /// The largest message that the host takes, in bytes.
        pub max_transfer_size: U32,
        /// Alignment of messages in a row, as a power of two.
        pub packet_alignment_factor: U32,
        /// Zero.
        pub address_family_offset: U32,
        /// Zero.
        pub address_family_size: U32,
    }

    /// Body of [`MessageType::HALT`].
    pub struct Halt {
        /// Number of the request.
        pub request_id: U32,
    }

    /// Body of [`MessageType::QUERY`] and of [`MessageType::SET`]. The value follows it.
    pub struct ObjectRequest {
        /// Number of the request.
        pub request_id: U32,
        /// The object.
        pub oid: Oid,
        /// Bytes of the value.
        pub info_length: U32,
        /// Where the value starts, in bytes from the start of this body.
        pub info_offset: U32,
        /// Zero.
        pub device_vc_handle: U32,
    }

    /// Body of [`MessageType::QUERY_COMPLETE`]. The value follows it.
    pub struct QueryComplete {
        /// Number of the request.
        pub request_id: U32,
        /// Result.
        pub status: Status,
        /// Bytes of the value.
        pub info_length: U32,
        /// Where the value starts, in bytes from the start of this body.
        pub info_offset: U32,
    }

    /// Body of [`MessageType::SET_COMPLETE`].
    pub struct SetComplete {
        /// Number of the request.
        pub request_id: U32,
        /// Result.
        pub status: Status,
    }

    /// Body of [`MessageType::RESET`]. It has no request id.
    pub struct Reset {
        /// Zero.
        pub reserved: U32,
    }

    /// Body of [`MessageType::RESET_COMPLETE`]. It has no request id.
    pub struct ResetComplete {
        /// Result.
        pub status: Status,
        /// Not 0 if filters and addresses must be set again.
        pub addressing_reset: U32,
    }

    /// Body of [`MessageType::INDICATE_STATUS`]. The status buffer follows it.
    pub struct IndicateStatus {
        /// What has changed.
        pub status: Status,
        /// Bytes of the status buffer.
        pub buffer_length: U32,
        /// Where the status buffer starts, in bytes from the start of this body.
        pub buffer_offset: U32,
    }

    /// Body of [`MessageType::KEEPALIVE`].
    pub struct Keepalive {
        /// Number of the request.
        pub request_id: U32,
    }

    /// Body of [`MessageType::KEEPALIVE_COMPLETE`].
    pub struct KeepaliveComplete {
        /// Number of the request.
        pub request_id: U32,
        /// Result.
        pub status: Status,
    }
}

const _: () = assert!(size_of::<Initialize>() == 16 && size_of::<InitializeComplete>() == 44);
const _: () = assert!(size_of::<ObjectRequest>() == 20 && size_of::<QueryComplete>() == 16);
const _: () = assert!(size_of::<IndicateStatus>() == 12);

impl ObjectRequest {
    /// A query or set whose value follows the body.
    pub fn new(request_id: u32, oid: Oid, value: &[u8]) -> Option<Self> {
        Some(Self {
            request_id: request_id.into(),
            oid,
            info_length: u32::try_from(value.len()).ok()?.into(),
            info_offset: U32::new(size_of::<Self>() as u32),
            device_vc_handle: U32::ZERO,
        })
    }
}

impl QueryComplete {
    /// An answer whose value follows the body.
    pub fn new(request_id: u32, status: Status, value: &[u8]) -> Option<Self> {
        Some(Self {
            request_id: request_id.into(),
            status,
            info_length: u32::try_from(value.len()).ok()?.into(),
            info_offset: U32::new(size_of::<Self>() as u32),
        })
    }
}
