// SPDX-License-Identifier: GPL-2.0

//! Waiting with a time limit.
//!
//! C header: [`include/linux/completion.h`](srctree/include/linux/completion.h)

use crate::raw;
use kernel::{
    bindings,
    prelude::*,
    types::Opaque, //
};

/// What other modules' instances of the initializer call: they cannot call the helper itself.
mod base {
    use super::*;

    /// # Safety
    ///
    /// `slot` must be valid for writes, and the completion must not be moved.
    #[inline(never)]
    pub(super) unsafe fn init_completion(slot: *mut bindings::completion) {
        // SAFETY: as the caller promises.
        unsafe { raw::vmbus_helper_init_completion(slot) }
    }
}

/// An event that happens once and that threads can wait for, for a limited time.
#[pin_data]
pub struct Event {
    #[pin]
    completion: Opaque<bindings::completion>,
}

// SAFETY: Completions can be used from any thread.
unsafe impl Send for Event {}

// SAFETY: Completions can be used from several threads at once.
unsafe impl Sync for Event {}

impl Event {
    /// An event that has not happened.
    pub fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            completion <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes and will stay where it is.
                unsafe { base::init_completion(slot) }
            }),
        })
    }

    /// Makes the event happen; wakes everyone. Can be called from any context.
    pub fn set(&self) {
        // SAFETY: `self.completion` is initialized.
        unsafe { bindings::complete_all(self.completion.get()) };
    }

    /// Waits until the event happens, at most `ms` milliseconds. Returns whether it happened.
    pub fn wait(&self, ms: u32) -> bool {
        // SAFETY: Always safe to call.
        let jiffies = unsafe { raw::vmbus_helper_msecs_to_jiffies(ms) };
        // SAFETY: `self.completion` is initialized.
        unsafe { bindings::wait_for_completion_timeout(self.completion.get(), jiffies) != 0 }
    }
}
