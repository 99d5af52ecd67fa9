// SPDX-License-Identifier: GPL-2.0

//! Allocations that do not wait for disks, for those who bring a disk back.

pub(crate) use vmbus::NoIo;
