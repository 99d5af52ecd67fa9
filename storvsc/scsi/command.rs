// SPDX-License-Identifier: GPL-2.0

//! SCSI commands as owned values.
//!
//! C header: [`include/scsi/scsi_cmnd.h`](srctree/include/scsi/scsi_cmnd.h)

use super::{
    host::Operations,
    Device,
    HostByte,
    Outcome, //
};
use crate::raw;
use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ptr::NonNull, //
};
use hv_proto::segments::Segment;
use kernel::{
    bindings,
    prelude::*,
    scatterlist::SGTable, //
};

/// Where a command is in the block layer's tag space: unique among all commands that a host has been
/// given and not completed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct UniqueTag {
    /// Number of the hardware queue.
    pub(crate) queue: u16,
    /// Tag within the hardware queue, less than the host's `can_queue`.
    pub(crate) tag: u16,
}

impl UniqueTag {
    /// # Safety
    ///
    /// `cmd` must point to a command that is in use by a request of a live host.
    unsafe fn of(cmd: *mut raw::scsi_cmnd) -> Self {
        // SAFETY: as the caller promises.
        let unique = unsafe { raw::storvsc_helper_unique_tag(cmd) };
        // CAST: `blk_mq_unique_tag()` packs two 16-bit numbers into one word.
        Self {
            queue: (unique >> 16) as u16,
            tag: (unique & 0xffff) as u16,
        }
    }
}

/// Direction of a command's data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// No data.
    None,
    /// From memory to the device.
    ToDevice,
    /// From the device to memory.
    FromDevice,
}

/// What lies behind each `struct scsi_cmnd` of a host. All zero when the command is queued.
pub(super) struct Private {
    /// How many segments are mapped for DMA.
    mapped: usize,
}

impl Private {
    /// The private area of `cmd`.
    ///
    /// # Safety
    ///
    /// `cmd` must point to a command of a host that has our template.
    unsafe fn of(cmd: *mut raw::scsi_cmnd) -> *mut Self {
        // SAFETY: as the caller promises. The template asks for an area of the size of `Self` behind
        // each command.
        unsafe { raw::storvsc_helper_scsi_cmd_priv(cmd) }.cast()
    }
}

/// A SCSI command that the driver owns.
///
/// It is completed with [`Command::complete`]. Dropping it completes it with an error, so that no
/// command is left without an end.
///
/// # Invariants
///
/// `cmd` points to a started command of a live host whose operations are `T`, that the mid-layer has
/// handed to the driver and that the driver has not completed. No other [`Command`] is for it.
pub(crate) struct Command<T: Operations> {
    cmd: NonNull<raw::scsi_cmnd>,
    _p: PhantomData<fn() -> T>,
}

// SAFETY: A command may be completed from any context and CPU.
unsafe impl<T: Operations> Send for Command<T> {}

impl<T: Operations> Command<T> {
    /// # Safety
    ///
    /// The caller must own the command that `cmd` points to, as in the type invariants of
    /// [`Command`], and hands it over.
    pub(super) unsafe fn from_raw(cmd: NonNull<raw::scsi_cmnd>) -> Self {
        // INVARIANT: as the caller promises.
        Self {
            cmd,
            _p: PhantomData,
        }
    }

    fn raw(&self) -> &raw::scsi_cmnd {
        // SAFETY: By the type invariants the pointer is valid. While the driver owns the command,
        // the mid-layer changes nothing in it but its `state`, and what error handling needs, of
        // which this type reads nothing.
        unsafe { self.cmd.as_ref() }
    }

    fn private(&self) -> &Private {
        // SAFETY: By the type invariants the private area is there. The mid-layer clears it before
        // it queues a command, and only the owner of the command refers to it.
        unsafe { &*Private::of(self.cmd.as_ptr()) }
    }

    fn private_mut(&mut self) -> &mut Private {
        // SAFETY: as for `private()`; `&mut self` makes the access exclusive.
        unsafe { &mut *Private::of(self.cmd.as_ptr()) }
    }

    /// The command's place in the tag space.
    pub(crate) fn unique_tag(&self) -> UniqueTag {
        // SAFETY: By the type invariants the command is in use by a request of a live host.
        unsafe { UniqueTag::of(self.cmd.as_ptr()) }
    }

    /// The number of the tag, as the kernel's own messages give it.
    pub(crate) fn tag(&self) -> u16 {
        self.unique_tag().tag
    }

    /// The command descriptor block.
    pub(crate) fn cdb(&self) -> &[u8] {
        let cmd = self.raw();
        cmd.cmnd
            .get(..usize::from(cmd.cmd_len))
            .unwrap_or(&cmd.cmnd)
    }

    /// The first byte of the command descriptor block.
    pub(crate) fn opcode(&self) -> u8 {
        let [opcode, ..] = self.raw().cmnd;
        opcode
    }

    /// Direction of the data.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is none of the three that a SCSI command can have.
    pub(crate) fn direction(&self) -> Result<Direction> {
        match self.raw().sc_data_direction {
            bindings::dma_data_direction::DMA_NONE => Ok(Direction::None),
            bindings::dma_data_direction::DMA_TO_DEVICE => Ok(Direction::ToDevice),
            bindings::dma_data_direction::DMA_FROM_DEVICE => Ok(Direction::FromDevice),
            _ => Err(EINVAL),
        }
    }

    /// Length of the data in bytes.
    pub(crate) fn data_len(&self) -> u32 {
        self.raw().sdb.length
    }

    /// The device that the command is for.
    pub(crate) fn device(&self) -> &Device {
        // SAFETY: The device of a command lives at least as long as the command is in use.
        unsafe { Device::from_raw(self.raw().device) }
    }

    /// The command has failed if less than this was transferred, in bytes.
    pub(crate) fn min_transfer(&self) -> u32 {
        self.raw().underflow
    }

    /// Maps the command's data for DMA; [`Command::segments`] are then as the device is to see them.
    /// The mapping ends with the command.
    ///
    /// # Errors
    ///
    /// `ENOMEM` or another error of the DMA layer (there is no room for bounce buffers just now).
    pub(crate) fn map(&mut self) -> Result {
        self.unmap();
        // SAFETY: By the type invariants this is a started command that the driver owns; its list is
        // not mapped, as the line above sees to.
        let mapped = unsafe { raw::scsi_dma_map(self.cmd.as_ptr()) };
        self.private_mut().mapped = usize::try_from(mapped).map_err(|_| ENOMEM)?;
        Ok(())
    }

    /// The segments of the data, as the device is to see them; none if the data is not mapped.
    pub(crate) fn segments(&self) -> Segments<'_> {
        // SAFETY: By the type invariants the pointer is valid. The table belongs to the command, and
        // nobody changes it while the driver owns the command, which the result's lifetime is bound
        // to.
        let table = unsafe { SGTable::from_raw(&raw mut (*self.cmd.as_ptr()).sdb.table) };
        Segments {
            // The mapping may have merged entries; only the first ones have a DMA address.
            entries: table.iter().take(self.private().mapped),
        }
    }

    /// Gives the device's sense data to the command; what exceeds the kernel's buffer is cut off.
    pub(crate) fn set_sense(&mut self, sense: &[u8]) {
        let len = sense.len().min(raw::SCSI_SENSE_BUFFERSIZE as usize);
        let buffer = self.raw().sense_buffer;
        // SAFETY: `sense_buffer` of a started command has `SCSI_SENSE_BUFFERSIZE` bytes, which belong
        // to the owner of the command; `sense` is some other memory of at least `len` bytes.
        unsafe { core::ptr::copy_nonoverlapping(sense.as_ptr(), buffer, len) };
    }

    /// Completes the command.
    pub(crate) fn complete(self, outcome: Outcome) {
        ManuallyDrop::new(self).finish(outcome);
    }

    /// Leaves the command to the kernel's error handler, which has already taken it over: what the
    /// driver holds for it is released, and the command is not completed.
    pub(crate) fn leave_to_error_handler(self) {
        ManuallyDrop::new(self).unmap();
    }

    /// Gives up the command without touching it, because the kernel has already ended it.
    pub(crate) fn forget(self) {
        let _ = ManuallyDrop::new(self);
    }

    /// Gives the command back to the mid-layer, which will queue it again later.
    pub(super) fn give_back(self) {
        ManuallyDrop::new(self).unmap();
    }

    fn unmap(&mut self) {
        if core::mem::take(&mut self.private_mut().mapped) != 0 {
            // SAFETY: The list was mapped by `map()`, and is unmapped once: the number is cleared.
            unsafe { raw::scsi_dma_unmap(self.cmd.as_ptr()) };
        }
    }

    /// Completes the command; the value must not be used afterwards.
    fn finish(&mut self, outcome: Outcome) {
        self.unmap();
        let cmd = self.cmd.as_ptr();
        let HostByte(host) = outcome.host;
        // SAFETY: By the type invariants the driver owns the command, so that it may write the
        // result, and completes it here, once.
        unsafe {
            let len = (*cmd).sdb.length;
            (*cmd).resid_len = len - outcome.transferred.min(len);
            (*cmd).result = i32::from(host) << 16 | i32::from(outcome.status);
            raw::scsi_done(cmd);
        }
    }
}

impl<T: Operations> Drop for Command<T> {
    fn drop(&mut self) {
        self.finish(Outcome::failed(HostByte::ERROR));
    }
}

/// A command that the driver cannot take just now.
pub(crate) struct Busy<T: Operations>(pub(crate) Command<T>);

/// A command that has timed out. The driver may own it, or may have completed it just now.
pub(crate) struct TimedOut<'a>(pub(super) UniqueTag, PhantomData<&'a ()>);

impl TimedOut<'_> {
    /// # Safety
    ///
    /// `cmd` must point to a started command of a live host.
    pub(super) unsafe fn new(cmd: *mut raw::scsi_cmnd) -> Self {
        // SAFETY: as the caller promises.
        Self(unsafe { UniqueTag::of(cmd) }, PhantomData)
    }

    /// The command's place in the tag space.
    pub(crate) fn unique_tag(&self) -> UniqueTag {
        self.0
    }
}

/// The segments of a mapped command; see [`Command::map`].
pub(crate) struct Segments<'a> {
    entries: core::iter::Take<kernel::scatterlist::SGTableIter<'a>>,
}

impl Iterator for Segments<'_> {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        let entry = self.entries.next()?;
        Some(Segment {
            address: entry.dma_address(),
            len: entry.dma_len(),
        })
    }
}
