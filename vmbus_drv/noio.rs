// SPDX-License-Identifier: GPL-2.0

//! Allocations that do not wait for disks, for those whom a disk may be waiting for.
//!
//! C header: [`include/linux/sched/mm.h`](srctree/include/linux/sched/mm.h)

use crate::raw;
use kernel::types::NotThreadSafe;

/// As long as it exists, what this thread allocates does not wait for I/O.
pub struct NoIo {
    flags: u32,
    /// It is about the thread that made it.
    _thread: NotThreadSafe,
}

impl NoIo {
    /// Begins it. They can be nested.
    // Not inlined: other modules cannot call the helper itself.
    #[inline(never)]
    pub fn begin() -> Self {
        Self {
            // SAFETY: Only the flags of this thread are read and changed.
            flags: unsafe { raw::vmbus_helper_noio_save() },
            _thread: NotThreadSafe,
        }
    }
}

impl Drop for NoIo {
    #[inline(never)]
    fn drop(&mut self) {
        // SAFETY: The flags are those that this thread had at the beginning.
        unsafe { raw::vmbus_helper_noio_restore(self.flags) };
    }
}
