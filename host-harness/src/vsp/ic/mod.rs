// SPDX-License-Identifier: MIT OR Apache-2.0

//! The integration components: heartbeat, time synchronization and shutdown.
//!
//! `link.rs` is what they share: it negotiates when the guest opens the channel, asks and waits for
//! answers, with the state machine of `hv_proto::ic`. Each service adds its messages.

mod heartbeat;
mod link;
mod shutdown;
#[cfg(test)]
mod tests;
mod timesync;

pub use heartbeat::{Heart, Heartbeat, HeartbeatStatus};
pub use link::{AskError, LinkConfig, LinkCounters, LinkState, LinkStatus};
pub use shutdown::{Shutdown, ShutdownStatus};
pub use timesync::{Timesync, TimesyncStatus};
