// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Integration components: small services of the host, each on a channel of its own.
//!
//! The host asks and the guest answers: every message of the host is sent back with the same
//! transaction id, with something changed. First the host lists the versions that it knows, of the
//! frame and of the service ([`negotiation`]); then the service's own messages follow
//! ([`heartbeat`], [`shutdown`], [`timesync`]). [`Guest`] and [`Host`] are the two sides of one
//! channel.
//!
//! State machines only: bytes in, bytes and decisions out. Nothing here waits, allocates or panics.
//! Uses [`crate::pipe`], `zerocopy` and `bitflags`.
//!
//! Source of layouts and numbers: `linux/hyperv.h` and `drivers/hv/{hv_util,channel_mgmt}.c` of the
//! kernel.

mod frame;
mod guest;
pub mod heartbeat;
mod host;
pub mod negotiation;
pub mod shutdown;
#[cfg(test)]
mod tests;
pub mod timesync;

pub use self::frame::{Flags, Header, MessageType, Reply, Status, Version, HEADER_SIZE};
pub use self::guest::{Event, Guest, Malformed, Rejected, Service};
pub use self::host::{Host, HostError, HostEvent};
pub use self::negotiation::Agreed;

/// Versions of the frame that the guest knows, the best first.
pub const FRAME_VERSIONS: &[Version] = &[Version::new(3, 0), Version::new(1, 0)];
