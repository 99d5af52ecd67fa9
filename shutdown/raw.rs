// SPDX-License-Identifier: GPL-2.0

//! C declarations of reboot, made by bindgen from `bindings_helper.h`.
//!
//! Only `power` may name anything of this module.

#![allow(
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    reason = "generated from C"
)]

use kernel::bindings::*;

include!(env!("SHUTDOWN_BINDINGS"));
