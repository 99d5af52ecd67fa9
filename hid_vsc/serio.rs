// SPDX-License-Identifier: GPL-2.0

//! Serial input ports: what the kernel's driver of PC keyboards reads from and writes to.
//!
//! C header: [`include/linux/serio.h`](srctree/include/linux/serio.h)

use crate::raw;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    device,
    ffi,
    module::this_module,
    new_spinlock_irq,
    prelude::*,
    sync::{
        Arc,
        SpinLockIrq, //
    }, //
};

/// A port, while it can take bytes.
#[derive(Clone, Copy)]
struct Open(NonNull<raw::serio>);

// SAFETY: Ports have a lock of their own.
unsafe impl Send for Open {}

/// The way from a device to its port.
#[pin_data]
pub(crate) struct Line {
    /// The port, between the calls by which the kernel starts and stops it.
    #[pin]
    open: SpinLockIrq<Option<Open>>,
}

impl Line {
    /// A line without a port.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            open <- new_spinlock_irq!(None),
        })
    }

    /// The device has sent these bytes, with nothing between them. Without a port they are lost.
    /// Any context, but not within [`Port::write`] while the port's lock is held, which it never is.
    pub(crate) fn receive(&self, bytes: &[u8]) {
        let open = self.open.lock();
        if let Some(Open(serio)) = *open {
            for byte in bytes {
                // SAFETY: The port is valid until it was stopped, which needs the lock.
                unsafe { raw::serio_interrupt(serio.as_ptr(), *byte, 0) };
            }
        }
    }
}

/// A device behind a port.
#[vtable]
pub(crate) trait Port: Send + Sync + 'static {
    /// The way to the port.
    fn line(&self) -> &Line;

    /// A byte was written to the device. May sleep or not; may send to the line.
    fn write(&self, byte: u8);
}

/// A port that is registered. Dropping it removes it, and waits for calls of the device.
///
/// # Invariants
///
/// `serio` was registered, and its `port_data` is `port`.
pub(crate) struct Registration<T: Port> {
    serio: NonNull<raw::serio>,
    port: Arc<T>,
    _type: PhantomData<T>,
}

// SAFETY: Ports can be removed by any task.
unsafe impl<T: Port> Send for Registration<T> {}

// SAFETY: There is nothing to do with a shared reference.
unsafe impl<T: Port> Sync for Registration<T> {}

impl<T: Port> Registration<T> {
    /// Makes the port of a PC keyboard behind a controller that translates its scan codes. The
    /// kernel finds its driver a little later.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn keyboard(
        parent: &device::Device<device::Bound>,
        name: &CStr,
        port: Arc<T>,
    ) -> Result<Self> {
        // SAFETY: Can always be called.
        let serio = unsafe { raw::hid_vsc_helper_alloc_serio() };
        let serio = NonNull::new(serio).ok_or(ENOMEM)?;

        // SAFETY: The port was allocated just now, zeroed; nobody else knows it.
        let serio_ref = unsafe { &mut *serio.as_ptr() };
        serio_ref.id.type_ = raw::SERIO_8042_XL as u8;
        serio_ref.port_data = Arc::as_ptr(&port).cast_mut().cast();
        serio_ref.write = Some(Self::write);
        serio_ref.start = Some(Self::start);
        serio_ref.stop = Some(Self::stop);
        // CAST: `device::Device` is a transparent wrapper of `struct device`.
        serio_ref.dev.parent = core::ptr::from_ref(parent).cast_mut().cast();
        for text in [&mut serio_ref.name, &mut serio_ref.phys] {
            // The last byte stays zero.
            let room = text.len().saturating_sub(1);
            for (to, from) in text.iter_mut().take(room).zip(name.to_bytes()) {
                *to = *from as ffi::c_char;
            }
        }

        let owner: *mut bindings::module = this_module::<T::OwnerModule>().as_ptr();
        // SAFETY: The port is set up. It belongs to the kernel from here on, which frees it some
        // time after it was unregistered; `port` and the parent outlive that call.
        unsafe { raw::__serio_register_port(serio.as_ptr(), owner) };

        // INVARIANT: The port was registered just now.
        Ok(Self {
            serio,
            port,
            _type: PhantomData,
        })
    }

    /// The device of a port.
    ///
    /// # Safety
    ///
    /// `serio` must be a port that was made here and was not unregistered.
    unsafe fn port<'a>(serio: *mut raw::serio) -> &'a T {
        // SAFETY: `port_data` is a `T`, which the registration keeps until the port is gone.
        unsafe { &*(*serio).port_data.cast::<T>() }
    }

    /// # Safety
    ///
    /// As [`Self::port`].
    unsafe extern "C" fn write(serio: *mut raw::serio, byte: ffi::c_uchar) -> ffi::c_int {
        // SAFETY: The kernel calls this for ports that are registered.
        unsafe { Self::port(serio) }.write(byte);
        0
    }

    /// # Safety
    ///
    /// As [`Self::port`].
    unsafe extern "C" fn start(serio: *mut raw::serio) -> ffi::c_int {
        // SAFETY: As above.
        let port = unsafe { Self::port(serio) };
        *port.line().open.lock() = NonNull::new(serio).map(Open);
        0
    }

    /// # Safety
    ///
    /// As [`Self::port`].
    unsafe extern "C" fn stop(serio: *mut raw::serio) {
        // SAFETY: As above.
        let port = unsafe { Self::port(serio) };
        *port.line().open.lock() = None;
    }
}

impl<T: Port> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the port is registered. Nothing is called after this.
        unsafe { raw::serio_unregister_port(self.serio.as_ptr()) };
        debug_assert!(self.port.line().open.lock().is_none());
    }
}
