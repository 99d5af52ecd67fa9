// SPDX-License-Identifier: GPL-2.0

//! The clocks that there are: the partition's reference counter, and the kernel's clock.
//!
//! C header: [`include/linux/timekeeping.h`](srctree/include/linux/timekeeping.h)

use crate::raw;
use kernel::{
    bindings,
    error::to_result,
    ffi,
    prelude::*, //
};

const NSEC_PER_SEC: i64 = 1_000_000_000;

/// The partition's reference counter: 100 ns since the guest was made.
pub(crate) fn reference_counter() -> u64 {
    // SAFETY: Can be called at any time in a guest of Hyper-V, which this is: there is a bus.
    unsafe { raw::timesync_helper_reference_counter() }
}

/// What a number of nanoseconds since 1970 is for C.
pub(crate) fn to_timespec(unix_ns: i64) -> bindings::timespec64 {
    bindings::timespec64 {
        tv_sec: unix_ns.div_euclid(NSEC_PER_SEC),
        // CAST: Less than 10^9.
        tv_nsec: unix_ns.rem_euclid(NSEC_PER_SEC) as ffi::c_long,
    }
}

/// What the kernel's clock shows, in nanoseconds since 1970.
pub(crate) fn now() -> i64 {
    let mut time = bindings::timespec64::default();

    // SAFETY: The time is valid for writes.
    unsafe { bindings::ktime_get_real_ts64(&raw mut time) };
    let nanoseconds = i64::try_from(time.tv_nsec).unwrap_or(0);
    time.tv_sec
        .saturating_mul(NSEC_PER_SEC)
        .saturating_add(nanoseconds)
}

/// Sets the kernel's clock. May sleep.
pub(crate) fn set(unix_ns: i64) -> Result {
    let time = to_timespec(unix_ns);

    // SAFETY: The time is valid for reads.
    to_result(unsafe { bindings::do_settimeofday64(&raw const time) })
}

/// Whether clocks that are far behind are set also when the host does not ask for it.
pub(crate) fn sets_implicitly() -> bool {
    // SAFETY: A parameter, which the kernel stores to when the user writes it.
    unsafe { (&raw const raw::timesync_implicit).read_volatile() }
}
