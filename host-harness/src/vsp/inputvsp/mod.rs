// SPDX-License-Identifier: MIT OR Apache-2.0

//! `inputvsp`: the synthetic keyboard and mouse, and how an operator uses them.
//!
//! The handshakes are those of `hv_proto::input`. What the operator does is sent at once; while no
//! driver of the guest is there, it is an error rather than kept.

mod keyboard;
mod keys;
mod mouse;
#[cfg(test)]
mod tests;

pub use keyboard::{InputError, KeyAction, Keyboard, KeyboardStatus, LedStatus, MAX_TEXT};
pub use keys::{Key, KeyError};
pub use mouse::{Button, Mouse, MouseInput, MouseStatus};
