// SPDX-License-Identifier: GPL-2.0

//! Abstraction of the kernel's SCSI host interface, for low-level drivers.
//!
//! A driver implements [`Operations`] and registers a host with [`Registration::new`]. The mid-layer
//! then hands it SCSI commands as owned [`Command`] values, each of which must come to exactly one
//! end: it is completed, or given back with [`Busy`]. The types see to that: completing takes the
//! value, and a [`Command`] that is dropped is completed with an error.
//!
//! The kernel crate has no such abstraction (7.3); this one has what storvsc needs, and nothing that
//! is specific to it. All `unsafe` code of storvsc is in here and in `params.rs`.
//!
//! C headers: [`include/scsi/scsi_host.h`](srctree/include/scsi/scsi_host.h),
//! [`include/scsi/scsi_cmnd.h`](srctree/include/scsi/scsi_cmnd.h),
//! [`include/scsi/scsi_device.h`](srctree/include/scsi/scsi_device.h)

mod command;
mod device;
mod host;

use crate::raw;

pub(crate) use self::command::{
    Busy,
    Command,
    Direction,
    TimedOut,
    UniqueTag, //
};
pub(crate) use self::device::{
    Address,
    Device,
    DeviceConfig,
    DeviceRef,
    Level, //
};
pub(crate) use self::host::{
    Geometry,
    Host,
    HostParams,
    Operations,
    QueueMap,
    Registration,
    ResetOutcome,
    TimeoutAction, //
};

/// The host byte of a command's result: what the driver, not the device, says about it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostByte(u8);

impl HostByte {
    /// Nothing to report; the status byte decides.
    pub(crate) const OK: Self = Self::new(raw::scsi_host_status_DID_OK);
    /// There is no such device (any more).
    pub(crate) const NO_CONNECT: Self = Self::new(raw::scsi_host_status_DID_NO_CONNECT);
    /// An error that the driver cannot say more about.
    pub(crate) const ERROR: Self = Self::new(raw::scsi_host_status_DID_ERROR);
    /// The command was lost to a reset.
    pub(crate) const RESET: Self = Self::new(raw::scsi_host_status_DID_RESET);
    /// Low-level pass-through command: no interpretation, no retry.
    pub(crate) const PASSTHROUGH: Self = Self::new(raw::scsi_host_status_DID_PASSTHROUGH);
    /// Queue the command again, without counting it as a retry.
    pub(crate) const REQUEUE: Self = Self::new(raw::scsi_host_status_DID_REQUEUE);

    const fn new(status: raw::scsi_host_status) -> Self {
        // CAST: the constants of `enum scsi_host_status` that are named above are less than 256.
        Self(status as u8)
    }
}

/// How a command ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// SCSI status byte (SAM).
    pub(crate) status: u8,
    /// Host byte.
    pub(crate) host: HostByte,
    /// Bytes that were transferred. More than the command asked for counts as all of it.
    pub(crate) transferred: u32,
}

impl Outcome {
    /// A command that failed without reaching a device, or whose answer is of no use.
    pub(crate) const fn failed(host: HostByte) -> Self {
        Self {
            status: 0,
            host,
            transferred: 0,
        }
    }
}
