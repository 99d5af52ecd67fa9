// SPDX-License-Identifier: GPL-2.0

//! Allocations that do not wait for disks, for those who bring a disk back.
//!
//! C header: [`include/linux/sched/mm.h`](srctree/include/linux/sched/mm.h)

use crate::raw;
use kernel::types::NotThreadSafe;

/// As long as it exists, what this thread allocates does not wait for I/O.
pub(crate) struct NoIo {
    flags: u32,
    /// It is about the thread that made it.
    _thread: NotThreadSafe,
}

impl NoIo {
    /// Begins it. They can be nested.
    pub(crate) fn begin() -> Self {
        Self {
            // SAFETY: Only the flags of this thread are read and changed.
            flags: unsafe { raw::storvsc_helper_noio_save() },
            _thread: NotThreadSafe,
        }
    }
}

impl Drop for NoIo {
    fn drop(&mut self) {
        // SAFETY: The flags are those that this thread had at the beginning.
        unsafe { raw::storvsc_helper_noio_restore(self.flags) };
    }
}
