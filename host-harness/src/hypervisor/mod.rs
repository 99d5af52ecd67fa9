// SPDX-License-Identifier: MIT OR Apache-2.0

//! The hypervisor interface that a Hyper-V guest expects, on KVM's own Hyper-V support.
