// SPDX-License-Identifier: GPL-2.0

//! Module parameters, as numbers that make sense whatever the user gave.
//!
//! The first two have the names and meanings that the C driver's have.

use crate::{
    net::Level,
    raw, //
};

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

/// Size of each of a channel's rings in bytes, header page included.
pub(crate) fn ring_bytes() -> usize {
    const MIN: u32 = 64;
    const MAX: u32 = 1024;
    // SAFETY: a parameter.
    let pages = unsafe { read(&raw const raw::netvsc_ring_size) }.clamp(MIN, MAX);
    pages as usize * hv_proto::PAGE_SIZE
}

/// The level of messages of a new device.
pub(crate) fn message_level() -> Level {
    // SAFETY: a parameter; the function can always be called.
    Level(unsafe { raw::netvsc_helper_msg_init(read(&raw const raw::netvsc_debug)) })
}

/// Time that the host is given for an answer, in milliseconds.
pub(crate) fn host_timeout_ms() -> u32 {
    // SAFETY: a parameter.
    unsafe { read(&raw const raw::netvsc_host_timeout) }.clamp(1, 600) * 1000
}
