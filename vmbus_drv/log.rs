// SPDX-License-Identifier: GPL-2.0

//! Messages about what the host does, which must not fill the log however often it does it.

use crate::raw;
use kernel::fmt;

/// Shows a value of [`hv_proto`], which implements the formatting traits of `core`, in a message of
/// the kernel, which has its own.
pub struct Show<T>(pub T);

impl<T: core::fmt::Display> fmt::Display for Show<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether one more complaint about what the host does is all right now. Any context.
pub fn may_log() -> bool {
    // SAFETY: Always safe to call, from any context.
    unsafe { raw::vmbus_helper_ratelimit() }
}

/// As [`may_log`], for what is in order but up to the host. Modules that are loaded again and
/// again leave no room for complaints otherwise. Any context.
pub fn may_tell() -> bool {
    // SAFETY: Always safe to call, from any context.
    unsafe { raw::vmbus_helper_ratelimit_news() }
}

/// As `pr_warn!`, but not too often.
macro_rules! warn_limited {
    ($($arg:tt)*) => {
        if $crate::log::may_log() {
            ::kernel::pr_warn!($($arg)*);
        }
    };
}
pub(crate) use warn_limited;

/// As `pr_err!`, but not too often.
macro_rules! err_limited {
    ($($arg:tt)*) => {
        if $crate::log::may_log() {
            ::kernel::pr_err!($($arg)*);
        }
    };
}
pub(crate) use err_limited;
