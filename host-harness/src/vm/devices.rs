// SPDX-License-Identifier: MIT OR Apache-2.0

//! The I/O ports of the virtual machine. What is not there reads as all ones and swallows writes,
//! as on a PC.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::counters::ExitCounters;
use super::pci::{PCI_ADDRESS_PORT, PCI_DATA_PORT, PciBus};
use super::power::{self, PowerRequest};
use super::rtc::{RTC_DATA_PORT, RTC_INDEX_PORT, Rtc};
use super::serial::{PORT_COUNT, PORTS, SerialPort};

/// The devices on I/O ports. They outlive a reset.
pub struct Devices {
    serial: [Option<SerialPort>; PORTS.len()],
    rtc: Mutex<Rtc>,
    pci: Mutex<PciBus>,
    exits: Arc<ExitCounters>,
}

impl Devices {
    /// Puts the devices together.
    pub fn new(serial: [Option<SerialPort>; PORTS.len()], exits: Arc<ExitCounters>) -> Devices {
        Devices {
            serial,
            rtc: Mutex::default(),
            pci: Mutex::default(),
            exits,
        }
    }

    /// The serial ports.
    pub fn serial(&self) -> &[Option<SerialPort>; PORTS.len()] {
        &self.serial
    }

    fn serial_at(&self, port: u16) -> Option<(&SerialPort, u8)> {
        let (index, address) = PORTS
            .iter()
            .enumerate()
            .find(|(_, a)| (a.base..a.base + PORT_COUNT).contains(&port))?;
        let offset = u8::try_from(port - address.base).ok()?;
        Some((self.serial.get(index)?.as_ref()?, offset))
    }

    /// The guest reads a port. For the devices with 8-bit registers each byte is one access.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        if let Some((serial, offset)) = self.serial_at(port) {
            self.exits.serial_read.add(1);
            data.fill_with(|| serial.read(offset));
            return;
        }
        self.exits.port_read.add(1);
        match port {
            RTC_DATA_PORT => data.fill(lock(&self.rtc).read()),
            PCI_PORTS_FIRST..=PCI_PORTS_LAST => lock(&self.pci).read(port, data),
            _ => data.fill(power::read(port).unwrap_or(0xff)),
        }
    }

    /// The guest writes a port, as in [`Devices::read`]. Returns what it asks of the VM.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<PowerRequest> {
        if let Some((serial, offset)) = self.serial_at(port) {
            self.exits.serial_write.add(1);
            for &byte in data {
                serial.write(offset, byte);
            }
            return None;
        }
        self.exits.port_write.add(1);
        let &first = data.first()?;
        match port {
            RTC_INDEX_PORT => lock(&self.rtc).select(first),
            PCI_PORTS_FIRST..=PCI_PORTS_LAST => lock(&self.pci).write(port, data),
            _ => {}
        }
        power::decode_write(port, first)
    }
}

/// The ports of the PCI bus.
const PCI_PORTS_FIRST: u16 = PCI_ADDRESS_PORT;
const PCI_PORTS_LAST: u16 = PCI_DATA_PORT + 3;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::serial::SerialBackend;

    fn devices() -> Devices {
        let backend = SerialBackend::Streams {
            output: Box::new(std::io::sink()),
            input: None,
        };
        let serial = SerialPort::open(backend, || ()).unwrap();
        Devices::new([serial, None], Arc::default())
    }

    fn read(devices: &Devices, port: u16) -> u8 {
        let mut data = [0];
        devices.read(port, &mut data);
        data[0]
    }

    #[test]
    fn absent_ports_read_as_ones() {
        let devices = devices();
        let mut data = [0; 4];
        devices.read(0xce0, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(read(&devices, 0x2f8 + 5), 0xff);
        assert_eq!(devices.write(0x80, &[1]), None);
        assert_eq!(devices.write(0x602, &[]), None);
    }

    #[test]
    fn present_ports_answer() {
        let devices = devices();
        assert_eq!(read(&devices, 0x3f8 + 5) & 0x60, 0x60);
        assert_eq!(devices.write(0x70, &[0x8d]), None);
        assert_eq!(read(&devices, 0x71), 0x80);
        assert_eq!(devices.write(0x602, &[1]), Some(PowerRequest::Reset));
        let exits = devices.exits.snapshot();
        assert_eq!((exits.serial_read, exits.port_read), (1, 1));
        assert_eq!((exits.serial_write, exits.port_write), (0, 2));
    }
}
