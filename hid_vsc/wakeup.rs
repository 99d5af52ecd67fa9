// SPDX-License-Identifier: GPL-2.0

//! Devices that can wake the machine.
//!
//! C header: [`include/linux/pm_wakeup.h`](srctree/include/linux/pm_wakeup.h)

use crate::raw;
use kernel::{
    bindings,
    device,
    error::to_result,
    prelude::*,
    sync::aref::ARef, //
};

/// The right of a device to wake the machine, which users can take away in its `power/wakeup`.
/// Dropping it ends that.
pub(crate) struct Wakeup(ARef<device::Device>);

/// What C knows a device by.
fn as_raw(device: &device::Device) -> *mut bindings::device {
    // CAST: `device::Device` is a transparent wrapper of `struct device`.
    core::ptr::from_ref(device).cast_mut().cast()
}

impl Wakeup {
    /// Lets `device` wake the machine. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or `EEXIST` if it can already.
    pub(crate) fn new(device: &device::Device<device::Bound>) -> Result<Self> {
        let device: &device::Device = device;

        // SAFETY: The device is valid.
        to_result(unsafe { raw::hid_vsc_helper_init_wakeup(as_raw(device).cast(), true) })?;
        Ok(Self(device.into()))
    }
}

impl Drop for Wakeup {
    fn drop(&mut self) {
        // SAFETY: The device is valid. Taking the right away cannot fail.
        unsafe { raw::hid_vsc_helper_init_wakeup(as_raw(&self.0).cast(), false) };
    }
}

/// The user has done something: wakes the machine if `device` may. Any context.
pub(crate) fn wake(device: &device::Device) {
    // SAFETY: The device is valid.
    unsafe { raw::hid_vsc_helper_wakeup(as_raw(device).cast()) };
}
