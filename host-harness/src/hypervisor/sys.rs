// SPDX-License-Identifier: MIT OR Apache-2.0

//! The parts of KVM's Hyper-V interface that `kvm-ioctls` does not wrap: two ioctls and the exit
//! `KVM_EXIT_HYPERV`. All `unsafe` of the hypervisor interface is in this file. Numbers: Linux
//! `include/uapi/linux/kvm.h`; behaviour: `Documentation/virt/kvm/api.rst`.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    CpuId, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNIC, KVM_HYPERV_EVENTFD_DEASSIGN,
    KVM_MAX_CPUID_ENTRIES, KVMIO, kvm_cpuid2, kvm_hyperv_eventfd, kvm_hyperv_exit, kvm_run,
};
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_HYPERV_EVENTFD, KVMIO, 0xbd, kvm_hyperv_eventfd);
ioctl_iowr_nr!(KVM_GET_SUPPORTED_HV_CPUID, KVMIO, 0xc1, kvm_cpuid2);

/// The Hyper-V CPUID leaves that this KVM supports, `KVM_GET_SUPPORTED_HV_CPUID` on `/dev/kvm`
/// (needs `KVM_CAP_SYS_HYPERV_CPUID`).
///
/// # Errors
/// The error of the ioctl.
pub fn supported_hv_cpuid(kvm: &Kvm) -> io::Result<CpuId> {
    let mut cpuid = CpuId::new(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| io::Error::other(format!("CPUID table: {e:?}")))?;
    // SAFETY:
    // - `kvm` is a descriptor of /dev/kvm.
    // - The pointer is to a `kvm_cpuid2` followed by as many entries as its `nent` says, as
    //   `CpuId` guarantees, and the kernel writes no more than these.
    let ret = unsafe {
        ioctl_with_mut_ptr(
            kvm,
            KVM_GET_SUPPORTED_HV_CPUID(),
            cpuid.as_mut_fam_struct_ptr(),
        )
    };
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cpuid)
}

/// Makes HvSignalEvent on `connection` write to `event`.
///
/// # Errors
/// The error of the ioctl: `EEXIST` when the connection is bound already.
pub fn bind_connection(vm: &VmFd, connection: u32, event: &EventFd) -> io::Result<()> {
    hyperv_eventfd(
        vm,
        kvm_hyperv_eventfd {
            conn_id: connection,
            fd: event.as_raw_fd(),
            ..Default::default()
        },
    )
}

/// Undoes [`bind_connection`].
///
/// # Errors
/// The error of the ioctl: `ENOENT` when the connection is not bound.
pub fn unbind_connection(vm: &VmFd, connection: u32) -> io::Result<()> {
    hyperv_eventfd(
        vm,
        kvm_hyperv_eventfd {
            conn_id: connection,
            fd: -1,
            flags: KVM_HYPERV_EVENTFD_DEASSIGN,
            ..Default::default()
        },
    )
}

fn hyperv_eventfd(vm: &VmFd, binding: kvm_hyperv_eventfd) -> io::Result<()> {
    // SAFETY: `vm` is a VM descriptor, and the kernel only reads the structure.
    let ret = unsafe { ioctl_with_ref(vm, KVM_HYPERV_EVENTFD(), &binding) };
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What a vCPU left KVM for with `KVM_EXIT_HYPERV`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HypervExit {
    /// The guest wrote a SynIC register; the registers' values after it.
    Synic {
        /// SCONTROL.
        control: u64,
        /// SIEFP.
        siefp: u64,
        /// SIMP.
        simp: u64,
    },
    /// A hypercall that KVM leaves to user space.
    Hypercall {
        /// The control word.
        input: u64,
        /// Input and output parameters: guest physical addresses, or values of a fast call.
        params: [u64; 2],
    },
    /// Another kind, of which the harness uses none (the synthetic debugger).
    Other(u32),
}

/// Decodes the exit of a vCPU that just returned `KVM_EXIT_HYPERV`.
pub fn hyperv_exit(run: &kvm_run) -> HypervExit {
    // SAFETY: all variants of both unions are plain integers, so reading any of them is sound
    // whichever the kernel wrote.
    let exit: kvm_hyperv_exit = unsafe { run.__bindgen_anon_1.hyperv };
    match exit.type_ {
        KVM_EXIT_HYPERV_SYNIC => {
            // SAFETY: as above.
            let synic = unsafe { exit.u.synic };
            HypervExit::Synic {
                control: synic.control,
                siefp: synic.evt_page,
                simp: synic.msg_page,
            }
        }
        KVM_EXIT_HYPERV_HCALL => {
            // SAFETY: as above.
            let call = unsafe { exit.u.hcall };
            HypervExit::Hypercall {
                input: call.input,
                params: call.params,
            }
        }
        other => HypervExit::Other(other),
    }
}

/// Sets the result of the hypercall that [`hyperv_exit`] returned. KVM gives it to the guest when
/// the vCPU runs next.
pub fn set_hypercall_result(run: &mut kvm_run, result: u64) {
    run.__bindgen_anon_1.hyperv.u.hcall.result = result;
}

/// The `KVM_EXIT_INTERNAL_ERROR` details: sub-error and data words.
pub fn internal_error(run: &kvm_run) -> (u32, Vec<u64>) {
    // SAFETY: as in `hyperv_exit`.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    (internal.suberror, internal.data[..count].to_vec())
}
