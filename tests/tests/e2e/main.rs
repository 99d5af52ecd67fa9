// SPDX-License-Identifier: MIT OR Apache-2.0

//! End-to-end tests. Each boots guests of its own; each runs for the C drivers and for ours.

mod bus;
mod debian;
mod disk;
mod images;
mod lifecycle;
mod monitor;
