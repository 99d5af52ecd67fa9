// SPDX-License-Identifier: MIT OR Apache-2.0

//! Service providers (VSPs): the host ends of the synthetic devices. Each is a
//! [`crate::vmbus::Vsp`], offered to the guest by the VMBus server.

pub mod ic;
pub mod inputvsp;
pub mod netvsp;
mod port;
pub mod services;
pub mod storvsp;

pub use port::{Port, PortError};
