// SPDX-License-Identifier: GPL-2.0

//! Work queues of one's own. The work items are those of [`kernel::workqueue`].
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use crate::raw;
use core::{
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    prelude::*,
    workqueue::Queue, //
};

/// A work queue that this module made. Dropping it runs what is queued to its end, and sleeps.
///
/// # Invariants
///
/// The pointer is to a work queue that is owned by this value.
pub struct OwnedQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: Work queues can be used and destroyed from any thread.
unsafe impl Send for OwnedQueue {}

// SAFETY: Work queues can be used from several threads at once.
unsafe impl Sync for OwnedQueue {}

impl OwnedQueue {
    fn from_new(queue: *mut bindings::workqueue_struct) -> Result<Self> {
        // INVARIANT: The callers pass a work queue that nobody else knows.
        Ok(Self(NonNull::new(queue).ok_or(ENOMEM)?))
    }

    /// A queue that runs one work item at a time, in the order in which they came.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, as for the other kinds of queues.
    pub fn ordered(name: &'static CStr) -> Result<Self> {
        // SAFETY: `name` is a C string.
        Self::from_new(unsafe { raw::vmbus_helper_alloc_ordered_queue(name.as_char_ptr()) })
    }

    /// As [`OwnedQueue::ordered`], for work that memory may be waiting for: it does not need any to run.
    pub fn rescue(name: &'static CStr) -> Result<Self> {
        // SAFETY: `name` is a C string.
        Self::from_new(unsafe { raw::vmbus_helper_alloc_rescue_queue(name.as_char_ptr()) })
    }

    /// A queue that runs work items side by side, on any CPU.
    pub fn unbound(name: &'static CStr) -> Result<Self> {
        // SAFETY: `name` is a C string.
        Self::from_new(unsafe { raw::vmbus_helper_alloc_unbound_queue(name.as_char_ptr()) })
    }

    /// A queue that runs a work item soon, on the CPU that queued it.
    pub fn per_cpu(name: &'static CStr) -> Result<Self> {
        // SAFETY: `name` is a C string.
        Self::from_new(unsafe { raw::vmbus_helper_alloc_percpu_queue(name.as_char_ptr()) })
    }

    /// A queue that runs a work item in softirq context, on the CPU that queued it.
    pub fn softirq(name: &'static CStr) -> Result<Self> {
        // SAFETY: `name` is a C string.
        Self::from_new(unsafe { raw::vmbus_helper_alloc_bh_queue(name.as_char_ptr()) })
    }

    /// Waits for all work that is queued now.
    pub fn flush(&self) {
        // SAFETY: By the type invariants the queue is valid.
        unsafe { bindings::__flush_workqueue(self.0.as_ptr()) };
    }
}

impl Deref for OwnedQueue {
    type Target = Queue;

    fn deref(&self) -> &Queue {
        // SAFETY: By the type invariants the queue is valid for as long as `self` is.
        unsafe { Queue::from_raw(self.0.as_ptr()) }
    }
}

impl Drop for OwnedQueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the queue is ours.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}
