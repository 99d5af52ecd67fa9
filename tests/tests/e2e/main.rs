// SPDX-License-Identifier: MIT OR Apache-2.0

//! End-to-end tests. Each boots guests of its own; each runs for the C drivers and for ours.

mod bus;
mod control;
mod debian;
mod disk;
mod hostile;
mod hostile_bus;
mod ic;
mod images;
mod input;
mod lifecycle;
mod lsvmbus;
mod monitor;
mod net;
mod net_data;
mod net_hostile;
mod net_load;
mod parity;
mod services;
