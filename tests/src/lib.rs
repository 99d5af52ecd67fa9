// SPDX-License-Identifier: MIT OR Apache-2.0

//! End-to-end and conformance tests: they boot real guests on the harness.
//!
//! A test gets a [`Guest`], runs commands in it through its agent, and works the host's side through the harness's
//! library, in the same process. Each test is written once, as a function of [`Drivers`], and
//! [`both_drivers!`] makes two tests of it: one for the kernel's own C drivers, one for ours. The C drivers
//! are what proves the harness right; the tests that they pass are what ours are held against.
//!
//! May use every host crate; nothing may use it.

pub mod guest;
pub mod klog;
pub mod manifest;
pub mod namespace;
pub mod services;
pub mod stream;

pub use guest::{Drivers, Guest, GuestBuilder};
pub use namespace::Namespace;

/// Makes two tests of each function, `c::NAME` and `rust::NAME`.
///
/// The functions take a [`Drivers`] and return `anyhow::Result<()>`.
#[macro_export]
macro_rules! both_drivers {
    ($($name:ident),+ $(,)?) => {
        mod c {
            $(#[test]
            fn $name() -> ::anyhow::Result<()> {
                super::$name($crate::Drivers::C)
            })+
        }
        mod rust {
            $(#[test]
            fn $name() -> ::anyhow::Result<()> {
                super::$name($crate::Drivers::Rust)
            })+
        }
    };
}

/// Makes one test of each function, `ours::NAME`, for behaviour that the C drivers lack. Where it is used, a comment
/// says what they do instead.
#[macro_export]
macro_rules! our_drivers {
    ($($name:ident),+ $(,)?) => {
        mod ours {
            $(#[test]
            fn $name() -> ::anyhow::Result<()> {
                super::$name($crate::Drivers::Rust)
            })+
        }
    };
}

/// Runs cases on one guest, one after the other, because a guest takes longer to start than most of them. Each is a
/// function of the arguments in parentheses that returns `anyhow::Result<()>`; an error names the case.
#[macro_export]
macro_rules! on_one_guest {
    ($arguments:tt, $($case:ident),+ $(,)?) => {
        $(::anyhow::Context::context($case $arguments, stringify!($case))?;)+
    };
}
