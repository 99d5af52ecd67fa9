// SPDX-License-Identifier: MIT OR Apache-2.0

//! The ACPI tables of the virtual machine.
//!
//! The platform is "hardware-reduced" ACPI: no SCI, no PM1 or GPE blocks, no legacy interrupt
//! controller; power-off goes through the sleep control register and reset through the reset
//! register, both I/O ports of [`super::power`]. The DSDT has the processors, the two serial ports
//! and the device `VMBUS` that makes a Linux guest start its VMBus driver. Facts: ACPI
//! specification 6.5, sections 4.8.3 (sleep registers), 5.2 (tables); the VMBUS device: the guest's
//! platform driver matches the hardware id "VMBUS".

use acpi_tables::Aml;
use acpi_tables::aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::memory::ACPI_START;
use super::power::{
    RESET_PORT, RESET_VALUE, RESET_VECTOR, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLP_TYP_S5,
};
use super::rtc::{CENTURY, RTC_INDEX_PORT};
use super::serial::PORTS;
use super::{MAX_CPUS, VmError};

const OEM_ID: [u8; 6] = *b"VIRIDN";
const OEM_TABLE_ID: [u8; 8] = *b"VIRIDIAN";
const OEM_REVISION: u32 = 1;

/// Physical address of the local APICs.
pub const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// Physical address of the I/O APIC.
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;

/// Writes all tables to guest memory and returns the address of the RSDP.
///
/// # Errors
/// The tables do not fit, or guest memory does not cover their place.
pub fn write_tables(
    memory: &GuestMemoryMmap,
    cpus: u32,
    serial: &[bool; PORTS.len()],
) -> Result<u64, VmError> {
    // The RSDP comes first: a guest that searches for it looks from here upwards.
    let rsdp_address = ACPI_START;
    let mut next = align(rsdp_address + Rsdp::len() as u64);
    let mut place = |table: &[u8]| -> Result<u64, VmError> {
        let address = next;
        next = align(address + table.len() as u64);
        if next > RESET_VECTOR {
            return Err(VmError::Boot("the ACPI tables do not fit".into()));
        }
        memory
            .write_slice(table, GuestAddress(address))
            .map_err(|e| VmError::Boot(format!("writing the ACPI tables: {e}")))?;
        Ok(address)
    };

    let dsdt_address = place(dsdt(cpus, serial).as_slice())?;
    let fadt_address = place(&fadt(dsdt_address))?;
    let madt_address = place(&madt(cpus)?)?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt_address);
    xsdt.add_entry(madt_address);
    let xsdt_address = place(&bytes(&xsdt))?;

    memory
        .write_slice(
            &bytes(&Rsdp::new(OEM_ID, xsdt_address)),
            GuestAddress(rsdp_address),
        )
        .map_err(|e| VmError::Boot(format!("writing the RSDP: {e}")))?;
    Ok(rsdp_address)
}

fn align(address: u64) -> u64 {
    address.next_multiple_of(64)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

/// Fixed ACPI description table.
fn fadt(dsdt_address: u64) -> Vec<u8> {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            port.into(),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt_address)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.century = CENTURY;
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Viridian").into();
    bytes(&fadt.finalize())
}

/// Multiple APIC description table: the processors and the I/O APIC.
fn madt(cpus: u32) -> Result<Vec<u8>, VmError> {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LAPIC_ADDRESS),
    );
    for cpu in 0..cpus {
        let id = u8::try_from(cpu)
            .ok()
            .filter(|_| cpu < MAX_CPUS)
            .ok_or_else(|| VmError::BadOption(format!("{cpus} CPUs: at most {MAX_CPUS}")))?;
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS, 0));
    Ok(bytes(&madt))
}

/// One processor of the DSDT: the device that matches its MADT entry.
struct Processor(u32);

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        aml::Device::new(
            format!("C{:03X}", self.0).as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"ACPI0007"),
                &aml::Name::new("_UID".into(), &self.0),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The device that makes the guest start its VMBus driver.
struct Vmbus;

impl Aml for Vmbus {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        const PRESENT_AND_WORKING: u8 = 0x0f;
        aml::Device::new(
            "VMB0".into(),
            vec![
                &aml::Name::new("_HID".into(), &"VMBUS"),
                &aml::Name::new("_UID".into(), &aml::ZERO),
                &aml::Name::new("_STA".into(), &PRESENT_AND_WORKING),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The real-time clock. It has no interrupt, so the guest offers no alarms.
struct Clock;

impl Aml for Clock {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        aml::Device::new(
            "RTC0".into(),
            vec![
                &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0B00")),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![&aml::IO::new(
                        RTC_INDEX_PORT,
                        RTC_INDEX_PORT,
                        0,
                        2,
                    )]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Differentiated system description table.
fn dsdt(cpus: u32, serial: &[bool; PORTS.len()]) -> Sdt {
    let mut body = Vec::new();

    // S5 ("soft off"): its sleep type for the sleep control register.
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&SLP_TYP_S5, &SLP_TYP_S5, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut body);

    let processors: Vec<Processor> = (0..cpus).map(Processor).collect();
    let ports: Vec<SerialPort> = PORTS
        .iter()
        .enumerate()
        .filter(|&(index, _)| serial[index])
        .map(|(index, port)| SerialPort {
            base: port.base,
            irq: port.irq,
            index,
        })
        .collect();
    let mut children: Vec<&dyn Aml> = processors.iter().map(|p| p as &dyn Aml).collect();
    children.push(&Vmbus);
    children.push(&Clock);
    children.extend(ports.iter().map(|p| p as &dyn Aml));
    aml::Scope::new("\\_SB_".into(), children).to_aml_bytes(&mut body);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// A 16550 serial port of the DSDT.
struct SerialPort {
    base: u16,
    irq: u32,
    index: usize,
}

impl Aml for SerialPort {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        aml::Device::new(
            format!("COM{}", self.index + 1).as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
                &aml::Name::new("_UID".into(), &self.index),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &aml::IO::new(self.base, self.base, 0, 8),
                        &aml::Interrupt::new(true, true, false, false, self.irq),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [bool; 2] = [true, true];

    fn sum(table: &[u8]) -> u8 {
        table.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
    }

    fn table_at(memory: &GuestMemoryMmap, address: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut table = vec![0; len as usize];
        memory
            .read_slice(&mut table, GuestAddress(address))
            .unwrap();
        table
    }

    fn u64_at(table: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(table[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_linked_and_sums_to_zero() {
        let memory = memory();
        let rsdp_address = write_tables(&memory, 4, &BOTH).unwrap();
        let mut rsdp = [0; 36];
        memory
            .read_slice(&mut rsdp, GuestAddress(rsdp_address))
            .unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(sum(&rsdp[..20]), 0);
        assert_eq!(sum(&rsdp), 0);

        let xsdt = table_at(&memory, u64_at(&rsdp, 24));
        assert_eq!((&xsdt[..4], sum(&xsdt)), (&b"XSDT"[..], 0));
        let fadt = table_at(&memory, u64_at(&xsdt, 36));
        assert_eq!((&fadt[..4], sum(&fadt)), (&b"FACP"[..], 0));
        let madt = table_at(&memory, u64_at(&xsdt, 44));
        assert_eq!((&madt[..4], sum(&madt)), (&b"APIC"[..], 0));
        let dsdt = table_at(&memory, u64_at(&fadt, 140));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
        assert!(dsdt.windows(6).any(|w| w == b"VMBUS\0"));
        assert!(dsdt.windows(8).any(|w| w == b"ACPI0007"));
    }

    #[test]
    fn madt_has_one_entry_a_cpu() {
        let madt = madt(3).unwrap();
        // Header 44 bytes, 8 for each local APIC, 12 for the I/O APIC.
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        assert_eq!(&madt[44..52], &[0, 8, 0, 0, 1, 0, 0, 0]);
        assert_eq!(&madt[60..68], &[0, 8, 2, 2, 1, 0, 0, 0]);
    }

    #[test]
    fn tables_of_the_largest_guest_fit() {
        assert!(write_tables(&memory(), MAX_CPUS, &BOTH).is_ok());
        assert!(write_tables(&memory(), MAX_CPUS + 1, &BOTH).is_err());
    }

    #[test]
    fn absent_serial_ports_are_not_described() {
        let count = |serial| {
            let dsdt = dsdt(1, serial);
            dsdt.as_slice().windows(3).filter(|w| *w == b"COM").count()
        };
        assert_eq!(count(&[false, false]), 0);
        assert_eq!(count(&[true, false]), 1);
        assert_eq!(count(&BOTH), 2);
    }
}
