// SPDX-License-Identifier: MIT OR Apache-2.0

//! The Viridian host: a small KVM-based VMM with a VMBus server and its service providers.
