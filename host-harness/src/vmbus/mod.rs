// SPDX-License-Identifier: MIT OR Apache-2.0

//! The VMBus server: connection, offers, channels, GPADLs and rings.
