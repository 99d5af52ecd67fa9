// SPDX-License-Identifier: GPL-2.0

//! How the machine is switched off.
//!
//! C header: [`include/linux/reboot.h`](srctree/include/linux/reboot.h)

use crate::raw;

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
