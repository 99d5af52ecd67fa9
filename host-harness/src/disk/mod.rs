// SPDX-License-Identifier: MIT OR Apache-2.0

//! Disk images: raw, qcow2 and VHD.
