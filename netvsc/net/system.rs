// SPDX-License-Identifier: GPL-2.0

//! Facts about the system that network drivers ask for, and their limit on messages.

use crate::raw;
use kernel::types::NotThreadSafe;

/// Number of CPUs that are online, at least one.
pub(crate) fn online_cpus() -> u32 {
    // SAFETY: The function can always be called.
    unsafe { raw::netvsc_helper_online_cpus() }.max(1)
}

/// Whether a CPU is there; not if there can be none of this number.
pub(crate) fn cpu_is_present(cpu: u32) -> bool {
    // SAFETY: The function is fine with any number.
    unsafe { raw::netvsc_helper_cpu_present(cpu) }
}

/// Number of queues that a device should have, if it can and nobody says otherwise.
pub(crate) fn default_rss_queues() -> u32 {
    // SAFETY: The function can always be called.
    unsafe { raw::netvsc_helper_default_rss_queues() }
}

/// Whether one more message about what comes from outside is all right now. Any context.
pub(crate) fn may_log() -> bool {
    // SAFETY: The function can always be called.
    unsafe { raw::netvsc_helper_ratelimit() }
}

/// Softirqs do not run on this CPU while this exists. For process context that takes a lock that
/// softirqs take.
pub(crate) struct BhDisabled(NotThreadSafe);

impl BhDisabled {
    pub(crate) fn new() -> Self {
        // SAFETY: The function can be called from process context and from softirqs.
        unsafe { raw::netvsc_helper_bh_disable() };
        Self(NotThreadSafe)
    }
}

impl Drop for BhDisabled {
    fn drop(&mut self) {
        // SAFETY: This undoes `new()`, on the same thread.
        unsafe { raw::netvsc_helper_bh_enable() };
    }
}
