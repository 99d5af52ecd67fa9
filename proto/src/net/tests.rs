// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of the network protocols. Uses proptest.

mod coalesced;
mod control;
mod nvsp;
mod objects;
mod ppi;
mod receive;
mod rndis;
mod session;
mod transmit;
