// SPDX-License-Identifier: MIT OR Apache-2.0

//! CPUID of the guest: the processor's leaves as KVM supports them, with a plain topology (one
//! socket, one thread a core), and the Hyper-V leaves (TLFS section 2.4) as KVM supports them, less
//! what the harness does not serve. KVM's own signature is not offered: a Linux guest would prefer
//! it.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Vendor and highest leaf.
const HV_VENDOR: u32 = 0x4000_0000;
/// Interface signature.
const HV_INTERFACE: u32 = 0x4000_0001;
/// Version of the hypervisor.
const HV_VERSION: u32 = 0x4000_0002;
/// Features and privileges.
const HV_FEATURES: u32 = 0x4000_0003;
/// Recommendations to the guest.
const HV_HINTS: u32 = 0x4000_0004;
/// Limits of the implementation.
const HV_LIMITS: u32 = 0x4000_0005;
/// Highest Hyper-V leaf that is offered. The Linux guest wants one between 0x40000005 and
/// 0x4000ffff.
const HV_HIGHEST: u32 = 0x4000_0006;
/// Leaves above the highest one which are given as zeros nevertheless: a guest reads some of them
/// without a look at the highest leaf, and KVM on Intel answers for an absent hypervisor leaf with
/// the highest basic one.
const HV_ZEROED: [std::ops::RangeInclusive<u32>; 2] =
    [0x4000_0006..=0x4000_000c, 0x4000_0080..=0x4000_0082];

/// "Microsoft Hv" in EBX, ECX, EDX.
const VENDOR: [u32; 3] = [
    u32::from_le_bytes(*b"Micr"),
    u32::from_le_bytes(*b"osof"),
    u32::from_le_bytes(*b"t Hv"),
];

/// Features (EAX) that are taken away. Reenlightenment tells of a migration, which the harness
/// does not do. With an invariant TSC the guest would choose the TSC itself as clock on some hosts
/// and the reference TSC page on others; without, it is the page everywhere.
const FEATURES_EAX_OFF: u32 = ACCESS_REENLIGHTENMENT | ACCESS_TSC_INVARIANT;
const ACCESS_REENLIGHTENMENT: u32 = 1 << 13;
const ACCESS_TSC_INVARIANT: u32 = 1 << 15;
/// Privileges (EBX) that are taken away: the synthetic debugger, the extended hypercalls.
const FEATURES_EBX_OFF: u32 = DEBUGGING | EXTENDED_HYPERCALLS;
const DEBUGGING: u32 = 1 << 11;
const EXTENDED_HYPERCALLS: u32 = 1 << 20;
/// Features (EDX) that are taken away: those of the debugger.
const FEATURES_EDX_OFF: u32 = GUEST_DEBUGGING | DEBUG_MSRS;
const GUEST_DEBUGGING: u32 = 1 << 1;
const DEBUG_MSRS: u32 = 1 << 11;

/// Features that a guest with VMBus cannot do without: hypercalls, VP index, SynIC.
const NEEDED_EAX: u32 = 1 << 5 | 1 << 6 | 1 << 2;
/// Privileges that VMBus needs: HvPostMessage, HvSignalEvent.
const NEEDED_EBX: u32 = 1 << 4 | 1 << 5;

/// AVX, in ECX of leaf 1.
const AVX: u32 = 1 << 28;

/// Hint: use the MSRs of the hypervisor to access the local APIC.
const HINT_APIC_ACCESS: u32 = 1 << 3;
/// Hint: do not use auto-EOI. Right only if the host's processor virtualizes the local APIC.
const HINT_DEPRECATE_AUTO_EOI: u32 = 1 << 9;
/// Hint: use the enlightened VMCS, for a hypervisor in the guest.
const HINT_ENLIGHTENED_VMCS: u32 = 1 << 14;

/// What the table depends on, beside KVM's own answers.
#[derive(Clone, Copy, Debug)]
pub struct CpuidOptions {
    /// Number of virtual processors, at least 1.
    pub cpus: u32,
    /// The host's processor virtualizes the local APIC (APICv, AVIC), and KVM uses it.
    pub apic_virtualized: bool,
}

/// KVM's Hyper-V emulation lacks something that every guest needs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("KVM's Hyper-V emulation lacks {0}")]
pub struct Lacking(&'static str);

/// Builds the CPUID table of virtual processor `cpu` from what KVM supports.
///
/// # Errors
/// [`Lacking`] when `hyperv` does not offer what VMBus needs.
pub fn build(
    supported: &[kvm_cpuid_entry2],
    hyperv: &[kvm_cpuid_entry2],
    cpu: u32,
    options: CpuidOptions,
) -> Result<Vec<kvm_cpuid_entry2>, Lacking> {
    let mut table: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter(|entry| !(0x4000_0000..=0x4fff_ffff).contains(&entry.function))
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .copied()
        .collect();
    let has_avx = supported
        .iter()
        .any(|entry| entry.function == 1 && entry.ecx & AVX != 0);
    let has_leaf_b = supported.iter().any(|entry| entry.function == 0xb);
    for entry in &mut table {
        set_topology(entry, cpu, options.cpus);
        if !has_avx {
            without_avx(entry);
        }
    }
    if has_leaf_b {
        table.extend(extended_topology(cpu, options.cpus));
    }
    table.extend(hyperv_leaves(hyperv, options)?);
    Ok(table)
}

/// Number of bits that number `cpus` cores.
fn core_bits(cpus: u32) -> u32 {
    cpus.max(1).next_power_of_two().trailing_zeros()
}

/// Takes away what needs AVX where there is no AVX. KVM passes it on even if AVX is hidden from it,
/// and a guest warns of that.
fn without_avx(entry: &mut kvm_cpuid_entry2) {
    const FMA: u32 = 1 << 12;
    const F16C: u32 = 1 << 29;
    const AVX2: u32 = 1 << 5;
    const VAES: u32 = 1 << 9;
    const VPCLMULQDQ: u32 = 1 << 10;
    match (entry.function, entry.index) {
        (1, _) => entry.ecx &= !(FMA | F16C),
        (7, 0) => {
            entry.ebx &= !AVX2;
            entry.ecx &= !(VAES | VPCLMULQDQ);
        }
        _ => {}
    }
}

/// Adapts one leaf to the processor's place.
fn set_topology(entry: &mut kvm_cpuid_entry2, cpu: u32, cpus: u32) {
    const HYPERVISOR: u32 = 1 << 31;
    const HTT: u32 = 1 << 28;
    match entry.function {
        // EBX: initial APIC id, number of logical processors; hypervisor bit.
        1 => {
            entry.ebx = (entry.ebx & 0xffff) | (1 << core_bits(cpus)).min(0xff) << 16 | cpu << 24;
            entry.ecx |= HYPERVISOR;
            entry.edx = if cpus > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Intel caches: EAX 31:26 cores of the package less one, 25:14 sharers less one.
        4 if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharers = if level >= 3 {
                (1 << core_bits(cpus)) - 1
            } else {
                0
            };
            let cores = ((1u32 << core_bits(cpus)) - 1).min(0x3f);
            entry.eax = (entry.eax & 0x3fff) | cores << 26 | sharers << 14;
        }
        // AMD: ECX 15:12 size of the core number in bits, 7:0 cores less one.
        0x8000_0008 => {
            entry.ecx = (entry.ecx & !0xf0ff) | core_bits(cpus) << 12 | (cpus - 1).min(0xff);
        }
        // AMD caches: EAX 25:14 sharers less one.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharers = if level >= 3 { cpus - 1 } else { 0 };
            entry.eax = (entry.eax & !(0xfff << 14)) | sharers << 14;
        }
        // AMD: extended APIC id, core id with one thread a core, node 0 of 1.
        0x8000_001e => {
            entry.eax = cpu;
            entry.ebx = cpu & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Leaf 0xb: threads (one a core), cores, end. EDX is the x2APIC id everywhere.
fn extended_topology(cpu: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let entry = |index: u32, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind << 8 | index,
        edx: cpu,
        ..Default::default()
    };
    [
        entry(0, 0, 1, THREAD),
        entry(1, core_bits(cpus), cpus, CORE),
        entry(2, 0, 0, 0),
    ]
}

fn hyperv_leaves(
    supported: &[kvm_cpuid_entry2],
    options: CpuidOptions,
) -> Result<Vec<kvm_cpuid_entry2>, Lacking> {
    let leaf = |function| {
        supported
            .iter()
            .find(|entry| entry.function == function)
            .copied()
            .unwrap_or(kvm_cpuid_entry2 {
                function,
                ..Default::default()
            })
    };

    let mut vendor = leaf(HV_VENDOR);
    [vendor.ebx, vendor.ecx, vendor.edx] = VENDOR;
    vendor.eax = HV_HIGHEST;

    let mut features = leaf(HV_FEATURES);
    if features.eax & NEEDED_EAX != NEEDED_EAX {
        return Err(Lacking("hypercalls or the SynIC"));
    }
    if features.ebx & NEEDED_EBX != NEEDED_EBX {
        return Err(Lacking("the message and event hypercalls"));
    }
    features.eax &= !FEATURES_EAX_OFF;
    features.ebx &= !FEATURES_EBX_OFF;
    features.edx &= !FEATURES_EDX_OFF;

    let mut hints = leaf(HV_HINTS);
    hints.eax &= !HINT_ENLIGHTENED_VMCS;
    if options.apic_virtualized {
        hints.eax |= HINT_DEPRECATE_AUTO_EOI;
        hints.eax &= !HINT_APIC_ACCESS;
    } else {
        hints.eax &= !HINT_DEPRECATE_AUTO_EOI;
    }

    let mut leaves = vec![
        vendor,
        leaf(HV_INTERFACE),
        leaf(HV_VERSION),
        features,
        hints,
        leaf(HV_LIMITS),
    ];
    leaves.extend(
        HV_ZEROED
            .into_iter()
            .flatten()
            .map(|function| kvm_cpuid_entry2 {
                function,
                ..Default::default()
            }),
    );
    Ok(leaves)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    /// KVM's answer on a recent kernel, shortened.
    fn kvm_hyperv() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(HV_VENDOR, 0x4000_0082, 1, 2, 3),
            entry(HV_INTERFACE, u32::from_le_bytes(*b"Hv#1"), 0, 0, 0),
            entry(HV_VERSION, 0x3839, 0xa_0000, 0, 0),
            entry(HV_FEATURES, 0xafff, 0x10_0830, 0, 0x8_0fff),
            entry(HV_HINTS, 0x4e2c, 0xfff, 0, 0),
            entry(HV_LIMITS, 1024, 64, 0, 0),
            entry(0x4000_000a, 0x6_0000, 1, 0, 0),
            entry(0x4000_0080, 0, 1, 2, 3),
            entry(0x4000_0082, 2, 0, 0, 0),
        ]
    }

    fn options(cpus: u32) -> CpuidOptions {
        CpuidOptions {
            cpus,
            apic_virtualized: false,
        }
    }

    fn find(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found: Vec<_> = table
            .iter()
            .filter(|e| e.function == function && e.index == index)
            .collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        *found[0]
    }

    #[test]
    fn hypervisor_is_microsoft_and_not_kvm() {
        let supported = [
            entry(1, 0, 0, 0, 0),
            entry(0x4000_0000, 1, u32::from_le_bytes(*b"KVMK"), 0, 0),
            entry(0x4000_0001, 0x100_7efb, 0, 0, 0),
        ];
        let table = build(&supported, &kvm_hyperv(), 0, options(1)).unwrap();
        let vendor = find(&table, HV_VENDOR, 0);
        let name: Vec<u8> = [vendor.ebx, vendor.ecx, vendor.edx]
            .iter()
            .flat_map(|r| r.to_le_bytes())
            .collect();
        assert_eq!(name, b"Microsoft Hv");
        assert!((0x4000_0005..=0x4000_ffff).contains(&vendor.eax));
        assert_eq!(find(&table, HV_INTERFACE, 0).eax, 0x3123_7648);
        assert_eq!(find(&table, 1, 0).ecx >> 31, 1);
    }

    #[test]
    fn unserved_features_are_off_and_guests_needs_are_on() {
        let table = build(&[], &kvm_hyperv(), 0, options(1)).unwrap();
        let features = find(&table, HV_FEATURES, 0);
        assert_eq!(features.eax & (1 << 13 | 1 << 15), 0);
        assert_eq!(features.eax & NEEDED_EAX, NEEDED_EAX);
        assert_eq!(features.ebx, 0x30);
        assert_eq!(features.edx & (1 << 1 | 1 << 11), 0);
        // Direct-mode timers and crash registers stay.
        assert_eq!(features.edx & (1 << 19 | 1 << 10), 1 << 19 | 1 << 10);
    }

    #[test]
    fn auto_eoi_is_deprecated_only_with_apic_virtualization() {
        let hints = |apic_virtualized| {
            let options = CpuidOptions {
                cpus: 1,
                apic_virtualized,
            };
            find(&build(&[], &kvm_hyperv(), 0, options).unwrap(), HV_HINTS, 0).eax
        };
        assert_eq!(hints(false) & (1 << 9 | 1 << 3 | 1 << 14), 1 << 3);
        assert_eq!(hints(true) & (1 << 9 | 1 << 3 | 1 << 14), 1 << 9);
    }

    #[test]
    fn leaves_that_guests_read_blindly_are_zero() {
        let table = build(&[], &kvm_hyperv(), 0, options(1)).unwrap();
        for function in [
            0x4000_0006,
            0x4000_000a,
            0x4000_000c,
            0x4000_0080,
            0x4000_0081,
            0x4000_0082,
        ] {
            let leaf = find(&table, function, 0);
            assert_eq!([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx], [0; 4]);
        }
    }

    #[test]
    fn topology_is_one_thread_a_core() {
        let supported = [
            entry(1, 0, 0xab00_1234, 0, 1 << 28),
            entry(0xb, 9, 9, 9, 9),
            entry(0x8000_0008, 0x3030, 0, 0xf0ff, 0),
            entry(0x8000_001e, 7, 7, 7, 0),
        ];
        let table = build(&supported, &kvm_hyperv(), 2, options(6)).unwrap();
        assert_eq!(find(&table, 1, 0).ebx, 0x0208_1234);
        let cores = find(&table, 0xb, 1);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (3, 6, 0x201, 2)
        );
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, 0x3005);
        assert_eq!(find(&table, 0x8000_001e, 0).eax, 2);
        assert_eq!(
            find(
                &build(&supported, &kvm_hyperv(), 0, options(1)).unwrap(),
                1,
                0
            )
            .edx & 1 << 28,
            0
        );
    }

    #[test]
    fn features_that_need_avx_go_with_it() {
        const ALL: u32 = u32::MAX;
        let ecx = |ecx| {
            let supported = [entry(1, 0, 0, ecx, 0), entry(7, 0, ALL, ALL, ALL)];
            let table = build(&supported, &kvm_hyperv(), 0, options(1)).unwrap();
            (find(&table, 1, 0).ecx, find(&table, 7, 0))
        };
        let (ecx_1, leaf_7) = ecx(ALL);
        assert_eq!((ecx_1, leaf_7.ebx, leaf_7.ecx), (ALL, ALL, ALL));
        let (ecx_1, leaf_7) = ecx(ALL & !AVX);
        assert_eq!(ecx_1, ALL & !(AVX | 1 << 29 | 1 << 12));
        assert_eq!((leaf_7.ebx, leaf_7.ecx), (ALL & !(1 << 5), ALL & !(3 << 9)));
    }

    #[test]
    fn missing_synic_is_an_error() {
        let mut hyperv = kvm_hyperv();
        hyperv[3].eax &= !(1 << 2);
        assert!(build(&[], &hyperv, 0, options(1)).is_err());
        assert!(build(&[], &[], 0, options(1)).is_err());
    }
}
