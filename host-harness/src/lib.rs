// SPDX-License-Identifier: MIT OR Apache-2.0

//! The Viridian host: a small KVM-based VMM with the hypervisor interface of Hyper-V, a VMBus
//! server and its service providers. The binary `host-harness` is a thin front on this library,
//! and tests use the library directly.
//!
//! Layers, each of which uses only those above it in this list:
//! - [`events`]: where what happens is published.
//! - [`hypervisor`]: CPUID, SynIC and hypercalls, on KVM's own Hyper-V support; the traits by
//!   which the VMBus server sees it.
//! - [`vmbus`]: the VMBus server: connection, offers, channels, GPADLs, rings.
//! - [`disk`], [`scsi`]: disk images and the SCSI target.
//! - [`net`]: what a NIC is connected to.
//! - [`vsp`]: the service providers (storage, network, integration components, input).
//! - [`vm`]: the virtual machine: memory, vCPUs, boot, ACPI, serial ports, power.
//! - [`control`]: what an operator can do with a running host; [`api`]: the same over a socket.
//! - [`host`]: all of it put together.

pub mod api;
pub mod control;
pub mod counters;
pub mod disk;
pub mod events;
mod files;
pub mod host;
pub mod hypervisor;
mod key_values;
pub mod net;
pub mod scsi;
pub mod vm;
pub mod vmbus;
pub mod vsp;
