// SPDX-License-Identifier: MIT OR Apache-2.0

//! Power-off and reset: the I/O ports behind the sleep control and reset registers of the ACPI
//! tables, and the other ways to reset a PC that an operating system tries: the keyboard
//! controller's reset line, and a jump to the firmware's reset vector.

/// Sleep control register (ACPI 6.5, section 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Reset register.
pub const RESET_PORT: u16 = 0x602;
/// Value that resets, written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5 (soft off), of the firmware's own choice.
pub const SLP_TYP_S5: u8 = 5;

/// Where a PC's processor starts after a reset, as real mode sees it (F000:FFF0). Linux on a
/// hardware-reduced platform without EFI jumps there to reboot.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// The firmware at [`RESET_VECTOR`], 16-bit code that writes the reset register and halts:
/// `mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; 1: hlt; jmp 1b`.
pub const RESET_CODE: [u8; 9] = {
    let [low, high] = RESET_PORT.to_le_bytes();
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// SLP_EN of the sleep control register; the sleep type is in bits 2 to 4.
const SLP_EN: u8 = 1 << 5;
/// Command port of the keyboard controller, and its command "pulse the reset line".
const KEYBOARD_COMMAND_PORT: u16 = 0x64;
const KEYBOARD_PULSE_RESET: u8 = 0xfe;

/// What a write to a power port asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Soft off.
    PowerOff,
    /// Restart.
    Reset,
}

/// Decodes a byte that the guest wrote to `port`.
pub fn decode_write(port: u16, value: u8) -> Option<PowerRequest> {
    match (port, value) {
        (SLEEP_CONTROL_PORT, v) if v & SLP_EN != 0 && (v >> 2) & 7 == SLP_TYP_S5 => {
            Some(PowerRequest::PowerOff)
        }
        (RESET_PORT, RESET_VALUE) => Some(PowerRequest::Reset),
        (KEYBOARD_COMMAND_PORT, KEYBOARD_PULSE_RESET) => Some(PowerRequest::Reset),
        _ => None,
    }
}

/// The value that a power port reads as, or `None` for other ports.
pub fn read(port: u16) -> Option<u8> {
    match port {
        SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT | RESET_PORT => Some(0),
        // No keyboard controller is there: its buffers are empty, so that a guest which wants to
        // reset through it need not wait for it.
        KEYBOARD_COMMAND_PORT => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_off_needs_type_and_enable() {
        let s5 = (SLP_TYP_S5 << 2) | SLP_EN;
        assert_eq!(
            decode_write(SLEEP_CONTROL_PORT, s5),
            Some(PowerRequest::PowerOff)
        );
        assert_eq!(decode_write(SLEEP_CONTROL_PORT, SLP_TYP_S5 << 2), None);
        assert_eq!(decode_write(SLEEP_CONTROL_PORT, (3 << 2) | SLP_EN), None);
    }

    #[test]
    fn both_ways_of_reset() {
        assert_eq!(decode_write(RESET_PORT, 1), Some(PowerRequest::Reset));
        assert_eq!(decode_write(RESET_PORT, 0), None);
        assert_eq!(decode_write(0x64, 0xfe), Some(PowerRequest::Reset));
        assert_eq!(decode_write(0x64, 0xd1), None);
    }
}
