// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Everything that crosses the Hyper-V VMBus, for both of its sides.

#![cfg_attr(not(any(test, CONFIG_RUST)), no_std)]
#![forbid(unsafe_code)]
