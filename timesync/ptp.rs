// SPDX-License-Identifier: GPL-2.0

//! PTP hardware clocks: clocks that programs such as chrony can read through `/dev/ptp*`.
//!
//! Only clocks that cannot be set or adjusted are needed here.
//!
//! C header: [`include/linux/ptp_clock_kernel.h`](srctree/include/linux/ptp_clock_kernel.h)

use crate::{
    clock,
    raw, //
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    device,
    error::{
        from_err_ptr,
        from_result, //
    },
    ffi,
    module::this_module,
    prelude::*,
    sync::Arc, //
};

/// A clock that can be read.
#[vtable]
pub(crate) trait Clock: Send + Sync + 'static {
    /// Nanoseconds since 1970. Process context.
    fn read(&self) -> Result<i64>;
}

/// What is allocated for a clock. `info` comes first, so that a pointer to it is one to all.
#[repr(C)]
struct Inner<T: Clock> {
    info: raw::ptp_clock_info,
    clock: Arc<T>,
}

/// A clock that programs can read. Dropping it takes it away, and waits for those that read it.
///
/// # Invariants
///
/// `inner` comes from a box and `ptp` is the clock that was registered with its `info`.
pub(crate) struct Registration<T: Clock> {
    inner: NonNull<Inner<T>>,
    ptp: NonNull<raw::ptp_clock>,
    _owns: PhantomData<Inner<T>>,
}

// SAFETY: A clock can be unregistered by any task, and `T` be dropped there.
unsafe impl<T: Clock> Send for Registration<T> {}

// SAFETY: There is nothing to do with a shared reference.
unsafe impl<T: Clock> Sync for Registration<T> {}

impl<T: Clock> Registration<T> {
    /// Makes `clock` known as `name`. `None` if the kernel has no PTP clocks.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or what the kernel says.
    pub(crate) fn new(
        parent: &device::Device<device::Bound>,
        name: &CStr,
        clock: Arc<T>,
    ) -> Result<Option<Self>> {
        let mut info = raw::ptp_clock_info {
            owner: this_module::<T::OwnerModule>().as_ptr(),
            enable: Some(Self::enable),
            adjtime: Some(Self::adjtime),
            adjfine: Some(Self::adjfine),
            gettimex64: Some(Self::gettimex64),
            settime64: Some(Self::settime64),
            ..pin_init::zeroed()
        };
        // The last byte stays zero.
        let room = info.name.len().saturating_sub(1);
        for (to, from) in info.name.iter_mut().take(room).zip(name.to_bytes()) {
            *to = *from as ffi::c_char;
        }
        let inner = KBox::into_raw(KBox::new(Inner { info, clock }, GFP_KERNEL)?);

        // CAST: `device::Device` is a transparent wrapper of `struct device`.
        let parent: *mut bindings::device = core::ptr::from_ref(parent).cast_mut().cast();
        // SAFETY: `info` stays where it is until the clock is unregistered; the parent is bound to
        // the driver, which does that before it lets go of the device.
        let ptp = unsafe { raw::ptp_clock_register(&raw mut (*inner).info, parent.cast()) };

        let ptp = match from_err_ptr(ptp).map(NonNull::new) {
            Ok(Some(ptp)) => ptp,
            failed => {
                // SAFETY: The box was given up above, and nobody else has it.
                drop(unsafe { KBox::from_raw(inner) });
                return failed.map(|_| None);
            }
        };

        // INVARIANT: The clock was registered just now.
        Ok(Some(Self {
            // SAFETY: The pointer of a box is not null.
            inner: unsafe { NonNull::new_unchecked(inner) },
            ptp,
            _owns: PhantomData,
        }))
    }

    /// # Safety
    ///
    /// `info` must be that of a registered clock of this type, `time` valid for writes, and `sts`
    /// null or valid.
    unsafe extern "C" fn gettimex64(
        info: *mut raw::ptp_clock_info,
        time: *mut bindings::timespec64,
        sts: *mut raw::ptp_system_timestamp,
    ) -> ffi::c_int {
        // SAFETY: `info` is the first field of an `Inner`, which lives until this has returned.
        let clock = unsafe { &(*info.cast::<Inner<T>>()).clock };

        from_result(|| {
            // SAFETY: `sts` is null or valid, both of which the helpers take.
            unsafe { raw::timesync_helper_read_prets(sts) };
            let now = clock.read();
            // SAFETY: As above.
            unsafe { raw::timesync_helper_read_postts(sts) };
            // SAFETY: The caller wants the time there.
            unsafe { time.write(clock::to_timespec(now?)) };
            Ok(0)
        })
    }

    extern "C" fn settime64(
        _info: *mut raw::ptp_clock_info,
        _time: *const bindings::timespec64,
    ) -> ffi::c_int {
        EOPNOTSUPP.to_errno()
    }

    extern "C" fn adjtime(_info: *mut raw::ptp_clock_info, _delta: i64) -> ffi::c_int {
        EOPNOTSUPP.to_errno()
    }

    extern "C" fn adjfine(_info: *mut raw::ptp_clock_info, _scaled_ppm: ffi::c_long) -> ffi::c_int {
        EOPNOTSUPP.to_errno()
    }

    extern "C" fn enable(
        _info: *mut raw::ptp_clock_info,
        _request: *mut raw::ptp_clock_request,
        _on: ffi::c_int,
    ) -> ffi::c_int {
        EOPNOTSUPP.to_errno()
    }
}

impl<T: Clock> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the clock is registered. No callback runs after this.
        unsafe { raw::ptp_clock_unregister(self.ptp.as_ptr()) };

        // SAFETY: By the type invariants this comes from a box.
        drop(unsafe { KBox::from_raw(self.inner.as_ptr()) });
    }
}
