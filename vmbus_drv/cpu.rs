// SPDX-License-Identifier: GPL-2.0

//! CPUs: numbers, hot-plug callbacks, and running something on all of them.
//!
//! C header: [`include/linux/cpuhotplug.h`](srctree/include/linux/cpuhotplug.h)

use crate::raw;
use hv_proto::ids::VpIndex;
use kernel::{
    bindings,
    cpu::nr_cpu_ids,
    error::{
        from_result,
        Error, //
    },
    ffi::{
        c_uint,
        c_void, //
    },
    prelude::*,
    types::NotThreadSafe, //
};

/// The CPU to which the host sends its messages, and which can not go offline while the bus is
/// connected: the protocol has no way to name another one later.
pub(crate) const CONNECT_CPU: u32 = 0;

/// The CPU that runs this code. Without a lock that holds it there, only a hint.
pub(crate) fn current() -> u32 {
    // SAFETY: Always safe to call.
    unsafe { raw::vmbus_helper_current_cpu() }
}

/// Whether `cpu` is online. Only a hint without [`HotplugLock`].
pub(crate) fn is_online(cpu: u32) -> bool {
    // SAFETY: Always safe to call; numbers that no CPU has are checked.
    unsafe { raw::vmbus_helper_cpu_online(cpu) }
}

/// Whether `cpu` is there, online or not.
pub(crate) fn is_present(cpu: u32) -> bool {
    // SAFETY: Always safe to call; numbers that no CPU has are checked.
    unsafe { raw::vmbus_helper_cpu_present(cpu) }
}

/// Whether the administrator left `cpu` for interrupts of devices (`isolcpus=managed_irq`).
pub(crate) fn is_housekeeping(cpu: u32) -> bool {
    // SAFETY: Always safe to call; numbers that no CPU has are checked.
    unsafe { raw::vmbus_helper_cpu_housekeeping(cpu) }
}

/// NUMA node of `cpu`.
pub(crate) fn node(cpu: u32) -> i32 {
    if cpu < nr_cpu_ids() {
        // SAFETY: The number is one that a CPU can have.
        unsafe { raw::vmbus_helper_cpu_node(cpu) }
    } else {
        bindings::NUMA_NO_NODE
    }
}

/// The hypervisor's number of `cpu`.
pub(crate) fn vp_index(cpu: u32) -> VpIndex {
    if cpu < nr_cpu_ids() {
        // SAFETY: The number is one that a CPU can have.
        VpIndex::new(unsafe { raw::vmbus_helper_vp_number(cpu) })
    } else {
        VpIndex::INVALID
    }
}

/// While this value exists, no CPU comes or goes. The thread that took the lock gives it back.
pub(crate) struct HotplugLock(NotThreadSafe);

impl HotplugLock {
    /// Takes the lock for reading; sleeps.
    pub(crate) fn read() -> Self {
        // SAFETY: Always safe to call from process context.
        unsafe { bindings::cpus_read_lock() };
        Self(NotThreadSafe)
    }
}

impl Drop for HotplugLock {
    fn drop(&mut self) {
        // SAFETY: `Self::read` took the lock.
        unsafe { bindings::cpus_read_unlock() };
    }
}

/// What happens when a CPU comes or goes. Both run on that CPU, in process context.
pub(crate) trait Hotplug {
    /// `cpu` has come online.
    fn online(cpu: u32) -> Result;

    /// `cpu` is about to go offline; an error stops that.
    fn offline(cpu: u32) -> Result;
}

/// A registration of [`Hotplug`] callbacks.
///
/// # Invariants
///
/// `state` is the number of a hot-plug state that this value registered.
pub(crate) struct HotplugRegistration {
    state: i32,
}

extern "C" fn online_callback<T: Hotplug>(cpu: c_uint) -> i32 {
    from_result(|| T::online(cpu).map(|()| 0))
}

extern "C" fn offline_callback<T: Hotplug>(cpu: c_uint) -> i32 {
    from_result(|| T::offline(cpu).map(|()| 0))
}

impl HotplugRegistration {
    /// Registers the callbacks for changes, and calls `T::online` on every CPU that is online.
    pub(crate) fn new<T: Hotplug>(name: &'static CStr) -> Result<Self> {
        extern "C" fn call<T: Hotplug>(_info: *mut c_void) {
            // Nothing can be undone here; a CPU that fails gets no interrupts of the bus.
            if T::online(current()).is_err() {
                pr_err!("CPU {} cannot be used for the bus\n", current());
            }
        }

        let _lock = HotplugLock::read();

        // SAFETY: The hot-plug lock is held, the callbacks are functions of this module, and the
        // value that is returned removes them before the module can go.
        let state = unsafe {
            raw::vmbus_helper_cpuhp_setup_cpuslocked(
                name.as_char_ptr(),
                Some(online_callback::<T>),
                Some(offline_callback::<T>),
            )
        };
        if state < 0 {
            return Err(Error::from_errno(state));
        }

        // Last, because nothing takes it back. No CPU has come or gone meanwhile.
        // SAFETY: `call` does not use its argument.
        unsafe { raw::vmbus_helper_on_each_cpu(Some(call::<T>), core::ptr::null_mut()) };

        // INVARIANT: The state was registered just now.
        Ok(Self { state })
    }
}

impl Drop for HotplugRegistration {
    /// Calls `T::offline` on every CPU that is online and removes the callbacks.
    fn drop(&mut self) {
        // SAFETY: By the type invariants the state is ours.
        unsafe { raw::vmbus_helper_cpuhp_remove(self.state, true) };
    }
}
