// SPDX-License-Identifier: GPL-2.0

//! How the machine is switched off.
//!
//! C header: [`include/linux/reboot.h`](srctree/include/linux/reboot.h)

use crate::raw;
use kernel::{
    bindings,
    device,
    error::to_result,
    prelude::*, //
};

/// Powers off, in order if possible. Any context; returns at once.
pub(crate) fn off() {
    // SAFETY: Can be called at any time.
    unsafe { raw::orderly_poweroff(true) };
}

/// Reboots, in order if possible. Any context; returns at once.
pub(crate) fn reboot() {
    // SAFETY: Can be called at any time.
    unsafe { raw::orderly_reboot() };
}

/// Whether the virtual machine can hibernate: it has the ACPI state S4.
pub(crate) fn can_hibernate() -> bool {
    // SAFETY: Can be called at any time.
    unsafe { raw::hv_is_hibernation_supported() }
}

/// Tells user space that the host wants the machine to hibernate. May sleep.
pub(crate) fn announce_hibernation(device: &device::Device) -> Result {
    // CAST: `device::Device` is a transparent wrapper of `struct device`.
    let dev: *mut bindings::device = core::ptr::from_ref(device).cast_mut().cast();
    let mut environment = [
        c"EVENT=hibernate".as_char_ptr().cast_mut(),
        core::ptr::null_mut(),
    ];

    // SAFETY: The device is valid; the environment ends with a null pointer, and its strings are
    // only read.
    to_result(unsafe {
        bindings::kobject_uevent_env(
            &raw mut (*dev).kobj,
            bindings::kobject_action_KOBJ_CHANGE,
            environment.as_mut_ptr(),
        )
    })
}
