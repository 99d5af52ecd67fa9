// SPDX-License-Identifier: GPL-2.0

//! The hypervisor: hypercalls, registers, and what it says about itself.
//!
//! The kernel's architecture code owns the hypercall page and the per-CPU input page; this file
//! only calls it.
//!
//! C header: [`include/asm-generic/mshyperv.h`](srctree/include/asm-generic/mshyperv.h)

use crate::raw;
use hv_proto::hypercall::{
    HvStatus,
    HypercallCode,
    HypercallInput,
    PostMessage,
    SignalEvent, //
};
use zerocopy::IntoBytes;

/// Whether this kernel runs on a hypervisor with the Hyper-V interface.
pub(crate) fn is_present() -> bool {
    // SAFETY: Always safe to call.
    unsafe { raw::vmbus_helper_is_hyperv() }
}

/// Whether this is the root partition, which has no VMBus to connect to.
pub(crate) fn is_root_partition() -> bool {
    // SAFETY: Always safe to call.
    unsafe { raw::vmbus_helper_is_root_partition() }
}

/// Whether the host cannot see the guest's memory unless it is shared (confidential VMs).
pub(crate) fn is_isolated() -> bool {
    // SAFETY: Always safe to call.
    unsafe { raw::vmbus_helper_is_isolated() }
}

/// Whether the kernel's own VMBus driver is connected to the host.
pub(crate) fn c_driver_is_active() -> bool {
    // SAFETY: Always safe to call from process context.
    unsafe { raw::vmbus_helper_c_driver_active() }
}

/// Whether interrupts should be acknowledged by the hypervisor (`DEPRECATING_AEOI` hint not set).
pub(crate) fn auto_eoi() -> bool {
    // SAFETY: Always safe to call.
    unsafe { raw::vmbus_helper_auto_eoi() }
}

/// The interrupt vector that the kernel keeps for the hypervisor's callbacks.
pub(crate) fn callback_vector() -> u8 {
    // SAFETY: Always safe to call.
    unsafe { raw::vmbus_helper_vector() }
}

/// The newest protocol version that the module's parameter allows, as a raw number.
pub(crate) fn max_version() -> u32 {
    // SAFETY: Always safe to call.
    unsafe { raw::vmbus_helper_max_version() }
}

/// Reads a register of the hypervisor on this CPU. Only `synic` calls it.
pub(crate) fn read_register(msr: u32) -> u64 {
    // SAFETY: `synic` passes registers of the SynIC only, which Hyper-V guests can always read.
    unsafe { raw::hv_get_msr(msr) }
}

/// Writes a register of the hypervisor on this CPU. Only `synic` calls it.
pub(crate) fn write_register(msr: u32, value: u64) {
    // SAFETY: `synic` passes registers of the SynIC only, which Hyper-V guests can always write. The
    // pages that are named in values are those of a `Synic`, which are taken back before it goes.
    unsafe { raw::hv_set_msr(msr, value) }
}

/// Posts a message to the host. Any context; does not retry.
pub(crate) fn post_message(message: &PostMessage) -> HvStatus {
    let bytes = message.as_bytes();
    let control = HypercallInput::memory(HypercallCode::POST_MESSAGE).raw();

    // SAFETY: `bytes` is valid for reads of its length, which is less than a page, and the host
    // reads that much for this hypercall and writes nothing.
    HvStatus::new(unsafe {
        raw::vmbus_helper_hypercall(control, bytes.as_ptr().cast(), bytes.len() as u32)
    })
}

/// Signals the host. Any context.
pub(crate) fn signal_event(event: SignalEvent) -> HvStatus {
    // SAFETY: The hypercall takes its input in a register and writes nothing.
    HvStatus::new(unsafe {
        raw::vmbus_helper_fast_hypercall(HypercallCode::SIGNAL_EVENT.get(), event.raw())
    })
}
