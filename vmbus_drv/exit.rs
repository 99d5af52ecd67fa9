// SPDX-License-Identifier: GPL-2.0

//! The interrupt handler, and the ways in which a kernel ends: kexec, crash, panic.
//!
//! The kernel has one slot for each of these handlers and calls them without an argument, so the
//! connection is found through a static.
//!
//! C header: [`include/asm-generic/mshyperv.h`](srctree/include/asm-generic/mshyperv.h)

use crate::{
    connection::Connection,
    cpu,
    raw, //
    rcu::RcuArc,
};
use core::ptr::addr_of_mut;
use kernel::{
    bindings,
    ffi::c_ulong,
    prelude::*,
    sync::{
        rcu,
        Arc, //
    },
    types::Opaque, //
};

/// The connection that the handlers act on.
static CURRENT: RcuArc<Connection> = RcuArc::empty();

/// The connection, if there is one.
pub(crate) fn current() -> Option<Arc<Connection>> {
    let guard = rcu::read_lock();
    CURRENT.get(&guard).map(Arc::from)
}

extern "C" fn interrupt() {
    let guard = rcu::read_lock();
    if let Some(connection) = CURRENT.get(&guard) {
        connection.interrupt(&guard);
    }
}

/// While this value exists, the host's interrupts go to a connection.
pub(crate) struct Interrupts(());

impl Interrupts {
    /// Sends them to `connection`.
    ///
    /// # Errors
    ///
    /// `EBUSY` if they go to another connection.
    pub(crate) fn new(connection: Arc<Connection>) -> Result<Self> {
        CURRENT.fill(connection).map_err(|_| EBUSY)?;

        // SAFETY: The slot of the kernel is ours: there is one connection, and the kernel's own
        // driver does not run. The handler is removed before the module can go.
        unsafe { raw::hv_setup_vmbus_handler(Some(interrupt)) };
        Ok(Self(()))
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        // SAFETY: `Self::new` has set the handler.
        unsafe { raw::hv_remove_vmbus_handler() };

        // Interrupt handlers are RCU readers, so none of them runs after this.
        drop(CURRENT.replace(None));
    }
}

extern "C" fn disable_cpu(_info: *mut c_void) {
    let guard = rcu::read_lock();
    if let Some(connection) = CURRENT.get(&guard) {
        connection.disable_cpu(cpu::current());
    }
}

/// A new kernel is about to be started in place of this one.
extern "C" fn kexec() {
    if let Some(connection) = current() {
        connection.unload();

        // SAFETY: `disable_cpu` does not use its argument.
        unsafe { raw::vmbus_helper_on_each_cpu(Some(disable_cpu), core::ptr::null_mut()) };
    }
}

/// A kernel that has crashed is about to start another one.
extern "C" fn crash(_regs: *mut bindings::pt_regs) {
    let guard = rcu::read_lock();
    let Some(connection) = CURRENT.get(&guard) else {
        return;
    };
    connection.crash_unload();
    let cpu = cpu::current();

    // SAFETY: Interrupts are off and this is that CPU.
    unsafe { raw::hv_stimer_cleanup(cpu) };
    connection.disable_cpu(cpu);
}

extern "C" fn panic(
    _block: *mut bindings::notifier_block,
    _action: c_ulong,
    _data: *mut c_void,
) -> c_int {
    let guard = rcu::read_lock();
    if let Some(connection) = CURRENT.get(&guard) {
        connection.crash_unload();
    }
    bindings::NOTIFY_DONE as c_int
}

/// While this value exists, the connection ends before the kernel does.
#[pin_data(PinnedDrop)]
pub(crate) struct ExitHandlers {
    #[pin]
    panic: Opaque<bindings::notifier_block>,
}

// SAFETY: The handlers can be removed from any thread.
unsafe impl Send for ExitHandlers {}

// SAFETY: There is nothing to do with a shared reference.
unsafe impl Sync for ExitHandlers {}

impl ExitHandlers {
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            panic <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                // SAFETY: `slot` is valid for writes and stays where it is until it is
                // unregistered. The slots of the kernel are ours, as that of the interrupt.
                unsafe {
                    slot.write(bindings::notifier_block {
                        notifier_call: Some(panic),
                        // After everyone who may still want to use a device.
                        priority: c_int::MIN + 1,
                        ..Default::default()
                    });
                    raw::hv_setup_kexec_handler(Some(kexec));
                    raw::hv_setup_crash_handler(Some(crash));
                    kernel::error::to_result(bindings::atomic_notifier_chain_register(
                        addr_of_mut!(raw::panic_notifier_list),
                        slot,
                    ))
                }
            }),
        })
    }
}

#[pinned_drop]
impl PinnedDrop for ExitHandlers {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: `Self::new` has registered all of them.
        unsafe {
            bindings::atomic_notifier_chain_unregister(
                addr_of_mut!(raw::panic_notifier_list),
                self.panic.get(),
            );
            raw::hv_remove_kexec_handler();
            raw::hv_remove_crash_handler();
        }
    }
}
