// SPDX-License-Identifier: MIT OR Apache-2.0

//! `cargo xtask`: set-up, builds, images and runs.

fn main() {}
