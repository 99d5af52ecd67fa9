// SPDX-License-Identifier: GPL-2.0

//! Module parameters, as numbers that make sense whatever the user gave.
//!
//! The first five have the names and meanings that the C driver's have.

use crate::raw;

/// Reads a parameter of `params.c`.
///
/// # Safety
///
/// `parameter` must point to a parameter: an integer, which is written as a whole.
unsafe fn read<T: Copy>(parameter: *const T) -> T {
    // SAFETY: as the caller promises. The kernel stores to a parameter when the user writes it, so
    // that it is read once.
    unsafe { parameter.read_volatile() }
}

/// Size of each of a channel's rings in bytes, header page included: whole pages, at least 4.
pub(crate) fn ring_bytes() -> usize {
    const MIN: usize = 16 << 10;
    const MAX: usize = 4 << 20;
    // SAFETY: a parameter.
    let bytes = unsafe { read(&raw const raw::storvsc_ringbuffer_size) };
    let bytes = usize::try_from(bytes).unwrap_or(0).clamp(MIN, MAX);
    bytes.next_multiple_of(hv_proto::PAGE_SIZE)
}

/// Most hardware queues of a controller; `None`: as many as there are CPUs.
pub(crate) fn max_hw_queues() -> Option<u16> {
    // SAFETY: a parameter.
    let queues = unsafe { read(&raw const raw::storvsc_max_hw_queues) };
    match queues {
        0 => None,
        n => Some(u16::try_from(n).unwrap_or(u16::MAX)),
    }
}

/// CPUs that a sub-channel is expected to serve, at least one.
pub(crate) fn cpus_per_subchannel() -> u32 {
    // SAFETY: a parameter.
    let cpus = unsafe { read(&raw const raw::storvsc_vcpus_per_sub_channel) };
    u32::try_from(cpus).unwrap_or(1).max(1)
}

/// Percentage of free ring space at or below which another channel is tried, at most 99.
pub(crate) fn ring_low_water() -> u32 {
    // SAFETY: a parameter.
    let percent = unsafe { read(&raw const raw::storvsc_ring_avail_percent_lowater) };
    u32::try_from(percent).unwrap_or(0).min(99)
}

/// How much is logged.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum LogLevel {
    /// Failed commands.
    Error = 1,
    /// Also what a scan makes fail, and sense data.
    Warning = 2,
}

/// Whether messages of `level` are wanted.
pub(crate) fn logs(level: LogLevel) -> bool {
    // SAFETY: a parameter.
    let wanted = unsafe { read(&raw const raw::storvsc_logging_level) };
    wanted >= level as i32
}

/// The largest number of seconds that the parameters below can mean: a day.
const MAX_SECONDS: u32 = 24 * 60 * 60;

/// Time that the host is given for a command, in seconds.
pub(crate) fn request_timeout() -> u32 {
    // SAFETY: a parameter.
    unsafe { read(&raw const raw::storvsc_request_timeout) }.clamp(1, MAX_SECONDS)
}

/// How many times a command is given its time again.
pub(crate) fn timeout_extensions() -> u32 {
    // SAFETY: a parameter.
    unsafe { read(&raw const raw::storvsc_timeout_extensions) }
}

/// Time that the host is given for a step of set-up or for a reset, in seconds.
pub(crate) fn host_timeout() -> u32 {
    // SAFETY: a parameter.
    unsafe { read(&raw const raw::storvsc_host_timeout) }.clamp(1, MAX_SECONDS)
}

/// Number of CPUs that are online, at least one.
pub(crate) fn online_cpus() -> u32 {
    // SAFETY: The function can always be called.
    unsafe { raw::storvsc_helper_online_cpus() }.max(1)
}
