// SPDX-License-Identifier: MIT OR Apache-2.0

//! `storvsp`: disks behind synthetic SCSI controllers and IDE positions.
//!
//! [`Storage`] is what the machine has: controllers with disks, offered on a VMBus server, with
//! operations for the operator and for tests (hot add and remove, resize, faults). One
//! `Controller` is one device on the bus. Its packets are read by one thread a channel, which
//! sorts them with `hv_proto::storage`'s handshake and puts the commands into the controller's
//! queue; a few worker threads execute them on [`crate::scsi`] and answer. Nothing runs on a
//! thread of a virtual processor.
//!
//! The guest is not trusted. What it can make the host hold is bounded: commands in flight by
//! [`MAX_IN_FLIGHT`] a channel (then its ring is not read), bytes a command by the transfer limit
//! that it was told. Closing a channel aborts what is queued and waits for what runs; each of these
//! commands is answered, and when that is done nothing touches guest memory any more.
//!
//! Layouts and numbers: `hv_proto::storage`, and `drivers/scsi/storvsc_drv.c` of Linux for what a
//! guest expects.

mod controller;
mod hostile;
mod queue;
mod storage;

pub use controller::{ControllerCounters, MAX_IN_FLIGHT};
pub use hostile::FORGED_PACKETS;
pub use queue::Stall;
pub use storage::{
    ControllerStatus, DiskStatus, MAX_SUB_CHANNELS, Storage, StorageConfig, StorageError,
};

#[cfg(test)]
mod tests;
