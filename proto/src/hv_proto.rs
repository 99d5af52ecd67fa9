// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Everything that crosses the Hyper-V VMBus, for both of its sides.
//!
//! The guest's kernel modules and the host harness are built from these same files: message
//! layouts, parsers, the packet ring, and the state machines of connection, channel and device.
//!
//! # What it may use
//!
//! `core`, `zerocopy` and `bitflags`; nothing else. There is no `std`, no allocation, no I/O, no
//! lock and no `unsafe` here. Kbuild compiles the crate with the kernel's own compiler (rustc
//! 1.85, edition 2021), cargo with the host's.
//!
//! # What the code holds to
//!
//! The peer is never trusted. Copy out of shared memory first, then validate the copy, then use
//! it. A panic in a kernel module stops the guest, so a number from the peer only reaches
//! arithmetic that is checked and lookups that can fail. Unknown numbers are data, not errors.
//!
//! # Where the facts come from
//!
//! TLFS is Microsoft's "Hypervisor Top-Level Functional Specification"; its chapters are named by
//! their titles. Where it is silent (it does not describe VMBus), the headers of Linux 7.3 are
//! named.

#![cfg_attr(not(any(test, CONFIG_RUST)), no_std)]
#![forbid(unsafe_code)]

#[macro_use]
mod open_enum;

pub mod client;
#[cfg(any(test, feature = "test-support"))]
pub mod flat_ring;
pub mod gpadl;
pub mod guid;
pub mod hypercall;
pub mod ic;
pub mod ids;
pub mod inflight;
pub mod input;
pub mod message;
pub mod monitor;
pub mod net;
pub mod packet;
pub mod pipe;
pub mod ring;
pub mod scsi;
pub mod segments;
pub mod server;
pub mod slots;
pub mod storage;
pub mod synic;
pub mod version;

/// Size of one page of the bus, in bytes: GPADLs, rings, SynIC and monitor pages all count in it.
///
/// Source: `HV_HYP_PAGE_SIZE` in `hyperv/hvgdk_mini.h`.
pub const PAGE_SIZE: usize = 4096;
