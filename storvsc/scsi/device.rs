// SPDX-License-Identifier: GPL-2.0

//! SCSI devices (logical units).
//!
//! C header: [`include/scsi/scsi_device.h`](srctree/include/scsi/scsi_device.h)

use crate::raw;
use core::{
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    time::Jiffies,
    types::Opaque, //
};

/// Where a device is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    /// Bus number.
    pub(crate) channel: u32,
    /// Target.
    pub(crate) id: u32,
    /// Logical unit.
    pub(crate) lun: u64,
}

/// The version of the SCSI standard that a device claims to follow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// SPC-3.
    Spc3,
}

/// A SCSI device.
///
/// # Invariants
///
/// The value is a valid `struct scsi_device`.
#[repr(transparent)]
pub(crate) struct Device(Opaque<raw::scsi_device>);

impl Device {
    /// # Safety
    ///
    /// `dev` must point to a device that lives for at least as long as `'a`.
    pub(super) unsafe fn from_raw<'a>(dev: *mut raw::scsi_device) -> &'a Self {
        // CAST: `Self` is a transparent wrapper of `struct scsi_device`.
        // SAFETY: as the caller promises.
        unsafe { &*dev.cast() }
    }

    /// Where the device is.
    pub(crate) fn address(&self) -> Address {
        let dev = self.0.get();
        // SAFETY: The device is valid by the type invariants; its address never changes.
        unsafe {
            Address {
                channel: (*dev).channel,
                id: (*dev).id,
                lun: (*dev).lun,
            }
        }
    }

    /// Whether the device is known to the system and takes commands; not while it is scanned for.
    pub(crate) fn is_running(&self) -> bool {
        // SAFETY: The device is valid by the type invariants. The state can change at any time, so
        // that it is read once.
        let state = unsafe { core::ptr::read_volatile(&raw const (*self.0.get()).sdev_state) };
        state == raw::scsi_device_state_SDEV_RUNNING
    }

    /// Asks the device whether it is ready. What it answers shows in the command's completion.
    /// Sleeps.
    pub(crate) fn test_unit_ready(&self, timeout: Jiffies) {
        // CAST: a timeout of more than 2^31 ticks makes no sense.
        let timeout = timeout.min(i32::MAX as Jiffies) as i32;
        // SAFETY: The device is valid by the type invariants; the sense header may be null.
        unsafe { raw::scsi_test_unit_ready(self.0.get(), timeout, 1, core::ptr::null_mut()) };
    }

    /// Whether the device's INQUIRY data says that it can queue tagged commands.
    pub(crate) fn tagged_supported(&self) -> bool {
        // SAFETY: The device is valid by the type invariants. The flag is set while the device is
        // scanned, before anything but the scan's own commands can come.
        unsafe { raw::scsi_device::tagged_supported_raw(self.0.get()) != 0 }
    }

    /// Sets how many commands the device may have at a time, within what the host allows, and
    /// returns what it is then.
    pub(crate) fn change_queue_depth(&self, depth: i32) -> i32 {
        // SAFETY: The device is valid by the type invariants.
        unsafe { raw::scsi_change_queue_depth(self.0.get(), depth) }
    }
}

/// A device while the mid-layer configures it, before it is made visible.
pub(crate) struct DeviceConfig<'a>(&'a Device);

impl<'a> DeviceConfig<'a> {
    /// # Safety
    ///
    /// This must be called in a callback in which the driver may change the device's settings.
    pub(super) unsafe fn new(dev: &'a Device) -> Self {
        Self(dev)
    }

    /// The first eight bytes of the vendor's name in the INQUIRY data, padded with spaces.
    pub(crate) fn vendor(&self) -> &[u8] {
        // SAFETY: The device is valid, and while it is configured nobody changes the name.
        unsafe { &(*self.0 .0.get()).vendor }
    }

    /// Time after which a command is reported as timed out.
    pub(crate) fn set_timeout(&mut self, timeout: Jiffies) {
        // SAFETY: The device has its queue from before the first command on.
        unsafe {
            let queue = (*self.0 .0.get()).request_queue;
            // CAST: as in C, the timeout is an unsigned int; larger ones make no sense.
            raw::blk_queue_rq_timeout(queue, timeout.min(u32::MAX as Jiffies) as u32);
        }
    }

    /// The device does not know REPORT SUPPORTED OPERATION CODES.
    pub(crate) fn set_no_report_opcodes(&mut self) {
        // SAFETY: The driver may change the settings, see `new()`.
        unsafe { raw::scsi_device::set_no_report_opcodes_raw(self.0 .0.get(), 1) };
    }

    /// Whether the device does not know WRITE SAME.
    pub(crate) fn set_no_write_same(&mut self, no: bool) {
        // SAFETY: The driver may change the settings, see `new()`.
        unsafe { raw::scsi_device::set_no_write_same_raw(self.0 .0.get(), u32::from(no)) };
    }

    /// The version of the standard that the device follows, whatever it claims.
    pub(crate) fn set_level(&mut self, level: Level) {
        let level = match level {
            Level::Spc3 => raw::SCSI_SPC_3,
        };
        // CAST: the constants of `scsi.h` are less than 16.
        // SAFETY: The driver may change the settings, see `new()`.
        unsafe { (*self.0 .0.get()).scsi_level = level as kernel::ffi::c_char };
    }

    /// Use REPORT LUNS and read VPD pages even of a device that claims an old version.
    pub(crate) fn set_modern(&mut self) {
        // SAFETY: The driver may change the settings, see `new()`.
        unsafe {
            (*self.0 .0.get()).sdev_bflags = raw::storvsc_helper_modern_bflags();
        }
    }
}

impl Deref for DeviceConfig<'_> {
    type Target = Device;

    fn deref(&self) -> &Device {
        self.0
    }
}

/// A reference to a device that keeps it from being freed.
///
/// # Invariants
///
/// The value owns one reference of the device, as `scsi_device_get()` takes it.
pub(crate) struct DeviceRef(NonNull<raw::scsi_device>);

impl DeviceRef {
    /// # Safety
    ///
    /// The caller must own a reference of the device, and hands it over.
    pub(super) unsafe fn from_raw(dev: NonNull<raw::scsi_device>) -> Self {
        // INVARIANT: as the caller promises.
        Self(dev)
    }

    /// Reads the device's properties again, such as its capacity. Sleeps.
    pub(crate) fn rescan(&self) {
        // SAFETY: The device is valid by the type invariants. The result says only that the device
        // is going away or has no driver, in which case there is nothing to do.
        unsafe { raw::scsi_rescan_device(self.0.as_ptr()) };
    }

    /// Removes the device from the system. Sleeps. Must not be called with a scan going on in the
    /// same thread.
    pub(crate) fn remove(&self) {
        // SAFETY: The device is valid by the type invariants; removing it twice does no harm.
        unsafe { raw::scsi_remove_device(self.0.as_ptr()) };
    }
}

impl Deref for DeviceRef {
    type Target = Device;

    fn deref(&self) -> &Device {
        // SAFETY: By the type invariants the device lives at least as long as `self`.
        unsafe { Device::from_raw(self.0.as_ptr()) }
    }
}

impl Drop for DeviceRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariants there is a reference to give up.
        unsafe { raw::scsi_device_put(self.0.as_ptr()) };
    }
}
