// SPDX-License-Identifier: MIT OR Apache-2.0

//! The SCSI target: one logical unit on one disk image.
