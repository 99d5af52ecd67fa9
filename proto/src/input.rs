// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Mouse and keyboard: synthetic input devices, each on a channel of its own.
//!
//! The guest proposes a version; the host accepts it and sends what its user does. The mouse is a
//! HID device ([`hid`]); the keyboard sends scan codes of PC keyboards ([`keyboard`]). [`ps2`] is
//! the keyboard that such scan codes come from, as far as software can see; [`typing`] knows which
//! keys make a text.
//!
//! State machines only: bytes in, bytes and decisions out. Nothing here waits, allocates or panics.
//! Uses [`crate::pipe`], `zerocopy` and `bitflags`.
//!
//! Source of layouts and numbers: `drivers/hid/hid-hyperv.c` and
//! `drivers/input/serio/hyperv-keyboard.c` of the kernel; for the indicator lights, which that
//! driver does not have, `SynthKeyProtocol.h` of Microsoft's UEFI firmware for virtual machines
//! (mu_msvm).

pub mod hid;
pub mod keyboard;
pub mod ps2;
pub mod typing;

#[cfg(test)]
mod tests;
