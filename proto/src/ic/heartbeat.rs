// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Heartbeat: the host sends a number, the guest sends it back plus one.

use super::guest::read_body;
use super::{Malformed, MessageType, Reply, Service, Version};
use crate::message::read_prefix;
use zerocopy::little_endian::{U32, U64};
use zerocopy::IntoBytes as _;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Versions of the service, the best first.
pub const VERSIONS: &[Version] = &[Version::new(3, 0), Version::new(1, 0)];

/// How often hosts ask, in seconds.
pub const PERIOD_SECONDS: u32 = 2;

/// Body of a heartbeat, 40 bytes. A host need not send more than the number.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Body {
    /// Number of the heartbeat.
    pub sequence: U64,
    /// Zero.
    pub reserved: [U32; 8],
}

const _: () = assert!(size_of::<Body>() == 40);

impl Body {
    /// The host's heartbeat with this number.
    pub const fn new(sequence: u64) -> Self {
        Self {
            sequence: U64::new(sequence),
            reserved: [U32::ZERO; 8],
        }
    }
}

/// Whether `body` is the right answer to heartbeat `sequence`.
pub fn is_answer(sequence: u64, body: &[u8]) -> bool {
    read_prefix::<U64>(body).is_some_and(|answer| answer.get() == sequence.wrapping_add(1))
}

/// The guest's service.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heartbeat;

impl Service for Heartbeat {
    const MESSAGE_TYPE: MessageType = MessageType::HEARTBEAT;
    const VERSIONS: &'static [Version] = VERSIONS;

    /// Number of the heartbeat.
    type Event = u64;

    fn on_request(
        &mut self,
        _version: Version,
        body: &[u8],
        reply: &mut Reply,
    ) -> Result<u64, Malformed> {
        let sequence = read_body::<U64>(body)?.get();
        reply.put(U64::new(sequence.wrapping_add(1)).as_bytes());
        Ok(sequence)
    }
}
