// SPDX-License-Identifier: MIT OR Apache-2.0

//! The PCI bus of the virtual machine: nothing but its host bridge, by configuration mechanism 1
//! (I/O ports 0xcf8 and 0xcfc). Without any a Linux guest reports an error at each boot. PCI Local
//! Bus Specification 3.0, section 3.2.2.3.2.

/// Address port; 32 bits wide.
pub const PCI_ADDRESS_PORT: u16 = 0xcf8;
/// First of the four data ports: the bytes of the register that the address names.
pub const PCI_DATA_PORT: u16 = 0xcfc;

/// The address' enable bit.
const ENABLE: u32 = 1 << 31;
/// Bus, device and function of an address.
const FUNCTION_MASK: u32 = 0x00ff_ff00;
/// Register of an address.
const REGISTER_MASK: u32 = 0xfc;

/// Vendor and device id of a host bridge that needs no driver; class "host bridge". The registers
/// behind these are 0.
const HOST_BRIDGE: [u8; 12] = [0x86, 0x80, 0x57, 0x0d, 0, 0, 0, 0, 0, 0, 0, 6];

/// The bus' only state: the address that was written last.
#[derive(Debug, Default)]
pub struct PciBus {
    address: u32,
}

impl PciBus {
    /// The guest writes a port. Only a 32-bit write of the address does anything.
    pub fn write(&mut self, port: u16, data: &[u8]) {
        if let (PCI_ADDRESS_PORT, Ok(bytes)) = (port, data.try_into()) {
            self.address = u32::from_le_bytes(bytes);
        }
    }

    /// The guest reads a port. What is not there reads as ones.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port == PCI_ADDRESS_PORT {
            if let Ok(bytes) = <&mut [u8; 4]>::try_from(data) {
                *bytes = self.address.to_le_bytes();
            }
            return;
        }
        let Some(offset) = port.checked_sub(PCI_DATA_PORT).filter(|&offset| offset < 4) else {
            return;
        };
        if self.address & ENABLE == 0 || self.address & FUNCTION_MASK != 0 {
            return;
        }
        let register = (self.address & REGISTER_MASK) as usize + usize::from(offset);
        for (byte, index) in data.iter_mut().zip(register..) {
            *byte = HOST_BRIDGE.get(index).copied().unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(address: u32, port: u16, len: usize) -> Vec<u8> {
        let mut bus = PciBus::default();
        bus.write(PCI_ADDRESS_PORT, &address.to_le_bytes());
        let mut data = vec![0x55; len];
        bus.read(port, &mut data);
        data
    }

    #[test]
    fn the_host_bridge_is_alone() {
        assert_eq!(config(0x8000_0000, 0xcfc, 4), [0x86, 0x80, 0x57, 0x0d]);
        assert_eq!(config(0x8000_0008, 0xcfe, 2), [0, 6]);
        assert_eq!(config(0x8000_00fc, 0xcff, 4), [0; 4]);
        assert_eq!(config(0x0000_0000, 0xcfc, 4), [0xff; 4]);
        for other in [0x8000_0100, 0x8000_0800, 0x8001_0000] {
            assert_eq!(config(other, 0xcfc, 2), [0xff; 2]);
        }
    }

    #[test]
    fn the_address_can_be_read_back() {
        assert_eq!(config(0x8000_0000, PCI_ADDRESS_PORT, 4), [0, 0, 0, 0x80]);
        assert_eq!(config(0x8000_0000, PCI_ADDRESS_PORT, 1), [0xff]);
        assert_eq!(config(0x8000_0000, 0xcfb, 1), [0xff]);
        let mut bus = PciBus::default();
        bus.write(PCI_ADDRESS_PORT, &[1, 2]);
        bus.write(0xcfb, &[1]);
        assert_eq!(bus.address, 0);
    }
}
