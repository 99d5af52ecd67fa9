// SPDX-License-Identifier: GPL-2.0

//! A reference-counted object that hot paths reach under RCU.
//!
//! C header: [`include/linux/rcupdate.h`](srctree/include/linux/rcupdate.h)

use kernel::sync::{
    atomic::{
        Acquire,
        Atomic,
        Full, //
    },
    rcu,
    Arc,
    ArcBorrow, //
};

/// A place for one `Arc<T>`. Readers borrow it without touching the reference count; the one who
/// replaces it waits until they are gone.
///
/// # Invariants
///
/// The pointer is null, or comes from [`Arc::into_raw`] and owns that reference.
pub struct RcuArc<T> {
    ptr: Atomic<*mut T>,
}

// SAFETY: The slot owns an `Arc<T>`, which is `Send` if `T` is `Send` and `Sync`.
unsafe impl<T: Send + Sync> Send for RcuArc<T> {}

// SAFETY: Shared access hands out `&T` and moves `Arc<T>` in and out, both fine for such a `T`.
unsafe impl<T: Send + Sync> Sync for RcuArc<T> {}

impl<T> RcuArc<T> {
    /// An empty place.
    pub const fn empty() -> Self {
        // INVARIANT: The pointer is null.
        Self {
            ptr: Atomic::new(core::ptr::null_mut()),
        }
    }

    /// Borrows the object for as long as the RCU read side is held.
    pub fn get<'a>(&'a self, _guard: &'a rcu::Guard) -> Option<ArcBorrow<'a, T>> {
        let ptr = self.ptr.load(Acquire);
        if ptr.is_null() {
            return None;
        }

        // SAFETY: By the type invariants a pointer that is not null is valid and owned by the slot;
        // `replace` waits for a grace period before it gives the ownership away, and the guard
        // keeps that grace period from ending.
        Some(unsafe { ArcBorrow::from_raw(ptr) })
    }

    /// Puts `new` in place and returns what was there, when no reader borrows it any more.
    ///
    /// Sleeps if there was something. Must not be called with the RCU read side held.
    pub fn replace(&self, new: Option<Arc<T>>) -> Option<Arc<T>> {
        let new = new.map_or(core::ptr::null_mut(), |arc| Arc::into_raw(arc).cast_mut());

        // INVARIANT: `new` is null or owns a reference.
        let old = self.ptr.xchg(new, Full);
        if old.is_null() {
            return None;
        }
        rcu::synchronize_rcu();

        // SAFETY: By the type invariants `old` comes from `Arc::into_raw` and its reference was the
        // slot's; the exchange made it ours, and ours alone.
        Some(unsafe { Arc::from_raw(old) })
    }

    /// As [`RcuArc::replace`], but only if the place is free; gives `new` back otherwise.
    pub fn fill(&self, new: Arc<T>) -> core::result::Result<(), Arc<T>> {
        let ptr = Arc::into_raw(new).cast_mut();

        // INVARIANT: `ptr` owns a reference.
        match self.ptr.cmpxchg(core::ptr::null_mut(), ptr, Full) {
            Ok(_) => Ok(()),
            // SAFETY: `ptr` comes from `Arc::into_raw` above and was not stored.
            Err(_) => Err(unsafe { Arc::from_raw(ptr) }),
        }
    }
}

impl<T> Drop for RcuArc<T> {
    fn drop(&mut self) {
        let ptr = *self.ptr.get_mut();
        if !ptr.is_null() {
            // SAFETY: By the type invariants the slot owns this reference, and `&mut self` means
            // that no reader is left.
            drop(unsafe { Arc::from_raw(ptr) });
        }
    }
}
