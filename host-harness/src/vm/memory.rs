// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guest physical memory: where RAM lies, and its host mapping.
//!
//! RAM starts at 0 and leaves a hole from 3 GiB to 4 GiB for the interrupt controllers and other
//! memory-mapped devices, as PC systems do; what does not fit below the hole continues at 4 GiB.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::VmError;

/// First address of the device hole below 4 GiB.
pub const HOLE_START: u64 = 3 << 30;
/// First address after the device hole.
pub const HOLE_END: u64 = 4 << 30;
/// Page tables, zero page and command line are below this.
pub const HIGH_MEMORY_START: u64 = 1 << 20;
/// Start of the extended BIOS data area: conventional RAM ends here.
pub const EBDA_START: u64 = 0x9_fc00;
/// The ACPI tables lie here, up to [`super::power::RESET_VECTOR`]; the guest searches the RSDP here
/// too.
pub const ACPI_START: u64 = 0xe_0000;

/// Smallest guest memory: a distribution kernel does not unpack itself in less.
pub const MIN_MEMORY: u64 = 64 << 20;
/// Largest guest memory.
pub const MAX_MEMORY: u64 = 1 << 40;
/// The size of guest memory is a multiple of this.
pub const MEMORY_GRANULE: u64 = 1 << 20;

/// The RAM ranges (start, length) of a guest with `size` bytes.
pub fn ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= HOLE_START {
        vec![(0, size)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, size - HOLE_START)]
    }
}

/// End of the RAM below the hole.
pub fn low_end(size: u64) -> u64 {
    size.min(HOLE_START)
}

/// Checks the size and maps the guest's RAM. The host gives pages as the guest touches them.
///
/// # Errors
/// [`VmError::BadOption`] for a size out of range; [`VmError::Memory`] when the host cannot map it.
pub fn map(size: u64) -> Result<GuestMemoryMmap, VmError> {
    check_size(size)?;
    let mut map = Vec::new();
    for (start, len) in ranges(size) {
        let len = usize::try_from(len).map_err(|_| VmError::Memory(format!("{size} bytes")))?;
        map.push((GuestAddress(start), len));
    }
    GuestMemoryMmap::from_ranges(&map).map_err(|e| VmError::Memory(e.to_string()))
}

/// Checks the size of guest memory.
///
/// # Errors
/// [`VmError::BadOption`] says which bound is not kept.
pub fn check_size(size: u64) -> Result<(), VmError> {
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) {
        return Err(VmError::BadOption(format!(
            "guest memory of {size} bytes: must be between {}M and {}G",
            MIN_MEMORY >> 20,
            MAX_MEMORY >> 30
        )));
    }
    if !size.is_multiple_of(MEMORY_GRANULE) {
        return Err(VmError::BadOption(format!(
            "guest memory of {size} bytes: must be a multiple of 1M"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_range() {
        assert_eq!(ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(ranges(HOLE_START), [(0, HOLE_START)]);
    }

    #[test]
    fn large_memory_continues_after_the_hole() {
        assert_eq!(ranges(5 << 30), [(0, HOLE_START), (HOLE_END, 2 << 30)]);
        assert_eq!(low_end(5 << 30), HOLE_START);
    }

    #[test]
    fn odd_sizes_are_refused() {
        for size in [0, 4096, (64 << 20) - 1, (64 << 20) + 4096, u64::MAX] {
            assert!(check_size(size).is_err(), "{size}");
        }
        assert!(check_size(64 << 20).is_ok());
    }
}
