// SPDX-License-Identifier: GPL-2.0

//! Declarations of the kernel that its `bindings` crate does not have: bindgen's output for
//! `bindings_helper.h`. Types that `bindings` defines in full are taken from there.
//!
//! Only the files that wrap a facility of the kernel use this module.

#![allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    reason = "generated from C"
)]

use kernel::{
    bindings::*,
    ffi, //
};
use pin_init::MaybeZeroable;

include!(env!("VMBUS_BINDINGS"));
