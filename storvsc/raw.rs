// SPDX-License-Identifier: GPL-2.0

//! C declarations of the SCSI host interface, made by bindgen from `bindings_helper.h`.
//!
//! Only `scsi/` (the abstraction over these) and `params.rs` may name anything of this module.
//! Types that the kernel's own bindings define in full come from there, so that there is one Rust
//! type for each C type.

// Generated code: the same lints are allowed as in the kernel's own `bindings` crate.
#![allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    improper_ctypes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

use kernel::{
    bindings::*,
    ffi, //
};
use pin_init::MaybeZeroable;

include!(env!("STORVSC_BINDINGS"));
