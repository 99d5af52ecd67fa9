// SPDX-License-Identifier: MIT OR Apache-2.0

//! The Viridian host: a small KVM-based VMM with the hypervisor interface of Hyper-V, a VMBus
//! server and its service providers. The binary `host-harness` is a thin front on this library,
//! and tests use the library directly.
//!
//! Layers, each of which uses only those above it in this list:
//! - [`hypervisor`]: CPUID, SynIC and hypercalls, on KVM's own Hyper-V support; the traits by
//!   which the VMBus server sees it.
//! - [`vmbus`]: the VMBus server: connection, offers, channels, GPADLs, rings.
//! - [`disk`], [`scsi`]: disk images and the SCSI target.
//! - [`vsp`]: the service providers (storage).
//! - [`vm`]: the virtual machine: memory, vCPUs, boot, ACPI, serial ports, power.
//! - [`host`]: all of it put together.

pub mod counters;
pub mod disk;
pub mod host;
pub mod hypervisor;
pub mod scsi;
pub mod vm;
pub mod vmbus;
pub mod vsp;
