// SPDX-License-Identifier: MIT OR Apache-2.0

//! `netvsp`: synthetic network adapters.
//!
//! [`Network`] is what the machine has: NICs on networks of [`crate::net`], offered on a VMBus server,
//! with operations for the operator and for tests (hot add and remove, link up and down). A NIC is
//! one device on the bus. One thread a channel reads what the guest sends; one thread a queue of the
//! network brings frames to the guest. Nothing runs on a thread of a virtual processor, and nothing
//! polls.
//!
//! The guest is not trusted. What it can make the host hold is bounded by the sections of its own
//! receive buffer and by [`MAX_MESSAGE`]; a section is used for one packet until the guest has
//! completed it, once. A guest that does not complete loses frames, not those of other NICs.
//!
//! The two protocols, NVSP and RNDIS, are the state machines of `hv_proto::net`; here are memory,
//! threads and networks.

mod deliver;
mod network;
mod nic;
mod sections;
mod transmit;

pub use network::{Network, NetworkError, NicParams};
pub use nic::{Injection, NicCounters, NicStatus, Tamper};
pub use transmit::MAX_MESSAGE;

#[cfg(test)]
mod tests;
