// SPDX-License-Identifier: GPL-2.0

//! The interrupt handler, and the ways in which a kernel ends: kexec, crash, panic, hibernation.
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
use core::{
    marker::PhantomData,
    ptr::addr_of_mut, //
};
use kernel::{
    bindings,
    error::to_result,
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

/// One of the kernel's lists of callbacks.
trait Chain {
    /// Callbacks with a higher priority come first.
    const PRIORITY: c_int;

    /// Adds a block to the list.
    ///
    /// # Safety
    ///
    /// The block must stay where it is until it is removed.
    unsafe fn add(block: *mut bindings::notifier_block) -> c_int;

    /// Removes a block from the list, and waits for callbacks that run.
    ///
    /// # Safety
    ///
    /// The block must be in the list.
    unsafe fn remove(block: *mut bindings::notifier_block);

    /// Something has happened.
    fn notify(action: c_ulong) -> c_int;
}

extern "C" fn notified<C: Chain>(
    _block: *mut bindings::notifier_block,
    action: c_ulong,
    _data: *mut c_void,
) -> c_int {
    C::notify(action)
}

/// An entry in such a list, while this value exists.
#[pin_data(PinnedDrop)]
struct Notifier<C: Chain> {
    #[pin]
    block: Opaque<bindings::notifier_block>,
    _chain: PhantomData<C>,
}

// SAFETY: The entry can be removed from any thread.
unsafe impl<C: Chain> Send for Notifier<C> {}

// SAFETY: There is nothing to do with a shared reference.
unsafe impl<C: Chain> Sync for Notifier<C> {}

impl<C: Chain> Notifier<C> {
    fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            block <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                // SAFETY: `slot` is valid for writes, and stays where it is until `drop`.
                to_result(unsafe {
                    slot.write(bindings::notifier_block {
                        notifier_call: Some(notified::<C>),
                        priority: C::PRIORITY,
                        ..Default::default()
                    });
                    C::add(slot)
                })
            }),
            _chain: PhantomData,
        })
    }
}

#[pinned_drop]
impl<C: Chain> PinnedDrop for Notifier<C> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: `Self::new` has added the block.
        unsafe { C::remove(self.block.get()) };
    }
}

/// The kernel panics.
struct Panic;

impl Chain for Panic {
    // After everyone who may still want to use a device.
    const PRIORITY: c_int = c_int::MIN + 1;

    unsafe fn add(block: *mut bindings::notifier_block) -> c_int {
        // SAFETY: By the safety requirements.
        unsafe {
            bindings::atomic_notifier_chain_register(addr_of_mut!(raw::panic_notifier_list), block)
        }
    }

    unsafe fn remove(block: *mut bindings::notifier_block) {
        // SAFETY: By the safety requirements.
        unsafe {
            bindings::atomic_notifier_chain_unregister(
                addr_of_mut!(raw::panic_notifier_list),
                block,
            )
        };
    }

    fn notify(_action: c_ulong) -> c_int {
        let guard = rcu::read_lock();
        if let Some(connection) = CURRENT.get(&guard) {
            connection.crash_unload();
        }
        bindings::NOTIFY_DONE as c_int
    }
}

/// The machine is about to sleep.
struct Sleep;

impl Chain for Sleep {
    const PRIORITY: c_int = 0;

    unsafe fn add(block: *mut bindings::notifier_block) -> c_int {
        // SAFETY: By the safety requirements.
        unsafe { bindings::register_pm_notifier(block) }
    }

    unsafe fn remove(block: *mut bindings::notifier_block) {
        // SAFETY: By the safety requirements.
        unsafe { bindings::unregister_pm_notifier(block) };
    }

    /// Refuses to hibernate: the channels of the kernel that wakes up would be gone.
    fn notify(action: c_ulong) -> c_int {
        if action != bindings::PM_HIBERNATION_PREPARE as c_ulong {
            return bindings::NOTIFY_DONE as c_int;
        }
        pr_err!("hibernation is not supported\n");
        // As `notifier_from_errno`.
        bindings::NOTIFY_STOP_MASK as c_int | (bindings::NOTIFY_OK as c_int - EOPNOTSUPP.to_errno())
    }
}

/// The kernel's slots for kexec and crash, while this value exists.
struct Slots(());

impl Slots {
    fn new() -> Self {
        // SAFETY: The slots are ours, as that of the interrupt, and the handlers are removed before
        // the module can go.
        unsafe {
            raw::hv_setup_kexec_handler(Some(kexec));
            raw::hv_setup_crash_handler(Some(crash));
        }
        Self(())
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: `Self::new` has set the handlers.
        unsafe {
            raw::hv_remove_kexec_handler();
            raw::hv_remove_crash_handler();
        }
    }
}

/// While this value exists, the connection ends before the kernel does.
#[pin_data]
pub(crate) struct ExitHandlers {
    #[pin]
    sleep: Notifier<Sleep>,
    #[pin]
    panic: Notifier<Panic>,
    slots: Slots,
}

impl ExitHandlers {
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            sleep <- Notifier::new(),
            panic <- Notifier::new(),
            slots: Slots::new(),
        })
    }
}
