// SPDX-License-Identifier: GPL-2.0

//! The lock that serializes all changes of network devices.
//!
//! C header: [`include/linux/rtnetlink.h`](srctree/include/linux/rtnetlink.h)

use crate::raw;
use core::ops::Deref;
use kernel::types::NotThreadSafe;

/// Shows that the lock is held.
pub(crate) struct Rtnl(NotThreadSafe);

impl Rtnl {
    /// # Safety
    ///
    /// The current thread must hold the lock for as long as the value, or a reference to it, exists.
    pub(super) unsafe fn assume_held() -> Self {
        Self(NotThreadSafe)
    }

    /// Takes the lock. Sleeps.
    pub(crate) fn lock() -> RtnlGuard {
        // SAFETY: The function can be called wherever one may sleep.
        unsafe { raw::rtnl_lock() };
        // SAFETY: The lock was taken just now, and is held until the guard is dropped.
        RtnlGuard(unsafe { Rtnl::assume_held() })
    }
}

/// The lock, held until this is dropped.
pub(crate) struct RtnlGuard(Rtnl);

impl Deref for RtnlGuard {
    type Target = Rtnl;

    fn deref(&self) -> &Rtnl {
        &self.0
    }
}

impl Drop for RtnlGuard {
    fn drop(&mut self) {
        // SAFETY: This thread took the lock when the guard was made.
        unsafe { raw::rtnl_unlock() };
    }
}
