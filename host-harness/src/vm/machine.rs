// SPDX-License-Identifier: MIT OR Apache-2.0

//! One KVM virtual machine with its vCPUs, from power-on to power-off or reset. A reset makes a
//! new one on the same memory: so nothing of the old state can be forgotten.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_HYPERV_EVENTFD, KVM_CAP_HYPERV_SYNIC2, KVM_CAP_SYS_HYPERV_CPUID,
    KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_enable_cap, kvm_lapic_state, kvm_msr_entry, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::VmError;
use super::boot::{self, Entry};
use super::devices::Devices;
use super::serial::PORTS;
use crate::hypervisor::cpuid::{self, CpuidOptions};
use crate::hypervisor::kvm::KvmInterrupts;
use crate::hypervisor::sys;

/// Three pages in the device hole that KVM needs on Intel processors.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// `MSR_IA32_MISC_ENABLE` and its bit for fast string operations.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_FAST_STRING: u64 = 1;
/// `MSR_MTRRdefType`: enabled, write-back.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets of the local vector table in the local APIC, and its delivery modes.
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const LVT_EXTINT: u32 = 7 << 8;
const LVT_NMI: u32 = 4 << 8;

/// What is needed of KVM beside what every KVM has.
const NEEDED: [(u32, &str); 3] = [
    (
        KVM_CAP_HYPERV_SYNIC2,
        "Hyper-V SynIC (KVM_CAP_HYPERV_SYNIC2)",
    ),
    (
        KVM_CAP_HYPERV_EVENTFD,
        "Hyper-V events (KVM_CAP_HYPERV_EVENTFD)",
    ),
    (
        KVM_CAP_SYS_HYPERV_CPUID,
        "Hyper-V CPUID (KVM_CAP_SYS_HYPERV_CPUID)",
    ),
];

/// Opens `/dev/kvm` and checks that it has what the harness needs.
///
/// # Errors
/// [`VmError::NoKvm`] says what is missing.
pub fn open_kvm() -> Result<Kvm, VmError> {
    let kvm = Kvm::new()
        .map_err(|e| VmError::NoKvm(format!("cannot open /dev/kvm: {}", io::Error::from(e))))?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(VmError::NoKvm(format!(
            "/dev/kvm has API version {version}, not 12"
        )));
    }
    for (cap, name) in NEEDED {
        if kvm.check_extension_raw(cap.into()) <= 0 {
            return Err(VmError::NoKvm(format!("this machine's KVM has no {name}")));
        }
    }
    for cap in [
        Cap::Irqchip,
        Cap::Irqfd,
        Cap::IrqfdResample,
        Cap::Pit2,
        Cap::UserMemory,
    ] {
        if !kvm.check_extension(cap) {
            return Err(VmError::NoKvm(format!("this machine's KVM has no {cap:?}")));
        }
    }
    Ok(kvm)
}

/// Whether KVM uses the processor's virtual local APIC.
fn apic_virtualized() -> bool {
    [
        "/sys/module/kvm_intel/parameters/enable_apicv",
        "/sys/module/kvm_amd/parameters/avic",
    ]
    .iter()
    .filter_map(|path| std::fs::read_to_string(path).ok())
    .any(|value| matches!(value.trim(), "Y" | "1"))
}

/// A KVM virtual machine that is ready to run.
pub struct Machine {
    /// The vCPUs, in order of their numbers.
    pub vcpus: Vec<VcpuFd>,
    /// Its SINTs and connections.
    pub interrupts: Arc<KvmInterrupts>,
}

fn kvm_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |error| VmError::System(what, error.into())
}

impl Machine {
    /// Makes a VM on `memory` with `cpus` vCPUs. `eom` is written at EOM.
    ///
    /// # Errors
    /// [`VmError::System`] or [`VmError::NoKvm`] when KVM refuses.
    pub fn new(
        kvm: &Kvm,
        memory: &Arc<GuestMemoryMmap>,
        cpus: u32,
        devices: &Devices,
        eom: &EventFd,
    ) -> Result<Machine, VmError> {
        let vm = Arc::new(kvm.create_vm().map_err(kvm_error("creating a VM"))?);
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(kvm_error("setting the TSS address"))?;
        vm.create_irq_chip()
            .map_err(kvm_error("creating the interrupt controllers"))?;
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(kvm_error("creating the timer"))?;
        register_memory(&vm, memory)?;

        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm_error("reading CPUID"))?;
        let hyperv = sys::supported_hv_cpuid(kvm)
            .map_err(|e| VmError::System("reading the Hyper-V CPUID", e))?;
        let options = CpuidOptions {
            cpus,
            apic_virtualized: apic_virtualized(),
        };
        let mut vcpus = Vec::with_capacity(cpus as usize);
        for vp in 0..cpus {
            let vcpu = vm
                .create_vcpu(vp.into())
                .map_err(kvm_error("creating a vCPU"))?;
            vcpu.enable_cap(&kvm_enable_cap {
                cap: KVM_CAP_HYPERV_SYNIC2,
                ..Default::default()
            })
            .map_err(kvm_error("enabling the SynIC"))?;
            let table = cpuid::build(supported.as_slice(), hyperv.as_slice(), vp, options)
                .map_err(|e| VmError::NoKvm(e.to_string()))?;
            let table = CpuId::from_entries(&table)
                .map_err(|e| VmError::NoKvm(format!("CPUID table: {e:?}")))?;
            vcpu.set_cpuid2(&table)
                .map_err(kvm_error("setting CPUID"))?;
            set_msrs(&vcpu)?;
            set_lapic(&vcpu)?;
            vcpus.push(vcpu);
        }

        let interrupts = eom
            .try_clone()
            .and_then(|eom| KvmInterrupts::new(vm.clone(), cpus, eom))
            .map_err(|e| VmError::System("setting the interrupt routes", e))?;
        for (port, address) in devices.serial().iter().zip(PORTS) {
            if let Some(port) = port {
                vm.register_irqfd(port.interrupt(), address.irq)
                    .map_err(kvm_error("registering a serial interrupt"))?;
            }
        }
        Ok(Machine {
            vcpus,
            interrupts: Arc::new(interrupts),
        })
    }

    /// Sets the first vCPU to the kernel's entry. The others wait for their start-up message.
    ///
    /// # Errors
    /// [`VmError::System`] when KVM refuses.
    pub fn set_entry(&self, entry: Entry) -> Result<(), VmError> {
        let Some(vcpu) = self.vcpus.first() else {
            return Ok(());
        };
        let sregs = vcpu
            .get_sregs()
            .map_err(kvm_error("reading the registers"))?;
        vcpu.set_sregs(&boot::long_mode(sregs))
            .map_err(kvm_error("setting the system registers"))?;
        vcpu.set_regs(&boot::entry_registers(entry))
            .map_err(kvm_error("setting the registers"))
    }
}

fn register_memory(vm: &VmFd, memory: &Arc<GuestMemoryMmap>) -> Result<(), VmError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let host = region
            .get_host_address(vm_memory::MemoryRegionAddress(0))
            .map_err(|e| VmError::Memory(e.to_string()))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY:
        // - The range is the whole mapping of a region of guest memory, which nothing in this
        //   process refers to but as volatile guest memory.
        // - KVM accesses it only while a vCPU runs, and each vCPU thread holds an `Arc` of the
        //   memory (`VcpuContext::memory`), so that the mapping lives longer.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(kvm_error("registering guest memory"))?;
    }
    Ok(())
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), VmError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries)
        .map_err(|e| VmError::System("setting MSRs", io::Error::other(format!("{e:?}"))))?;
    let count = vcpu.set_msrs(&msrs).map_err(kvm_error("setting MSRs"))?;
    if count != entries.len() {
        return Err(VmError::System(
            "setting MSRs",
            io::Error::other("KVM refused one"),
        ));
    }
    Ok(())
}

/// Wires the local interrupt pins as a PC does: LINT0 to the legacy controller, LINT1 to NMI.
fn set_lapic(vcpu: &VcpuFd) -> Result<(), VmError> {
    let mut lapic = vcpu
        .get_lapic()
        .map_err(kvm_error("reading the local APIC"))?;
    set_delivery_mode(&mut lapic, LAPIC_LVT_LINT0, LVT_EXTINT);
    set_delivery_mode(&mut lapic, LAPIC_LVT_LINT1, LVT_NMI);
    vcpu.set_lapic(&lapic)
        .map_err(kvm_error("setting the local APIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    const MODE_MASK: u32 = 7 << 8;
    if let Some(bytes) = lapic.regs.get_mut(register..register + 4) {
        let mut value = 0;
        for (shift, byte) in (0..32).step_by(8).zip(bytes.iter()) {
            value |= u32::from(*byte as u8) << shift;
        }
        value = (value & !MODE_MASK) | mode;
        for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *byte = new as _;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delivery_mode_changes_only_its_bits() {
        let mut lapic = kvm_lapic_state::default();
        for (byte, new) in lapic.regs[0x350..0x354].iter_mut().zip([0xff, 0xf8, 1, 0]) {
            *byte = new as u8 as _;
        }
        set_delivery_mode(&mut lapic, LAPIC_LVT_LINT0, LVT_EXTINT);
        let bytes: Vec<u8> = lapic.regs[0x350..0x354].iter().map(|b| *b as u8).collect();
        assert_eq!(bytes, [0xff, 0xff, 1, 0]);
    }
}
