// SPDX-License-Identifier: MIT OR Apache-2.0

//! INQUIRY: standard data and the pages of vital product data (SPC-4 sections 6.6 and 7.8, SBC-3
//! section 6.6).

/// Vendor and product by which guests know a Hyper-V disk. Linux allows WRITE SAME only when the
/// vendor begins with "Msft" (`drivers/scsi/storvsc_drv.c`, `storvsc_sdev_configure`).
const VENDOR: &[u8; 8] = b"Msft    ";
const PRODUCT: &[u8; 16] = b"Virtual Disk    ";
const REVISION: &[u8; 4] = b"1.0 ";

/// Peripheral qualifier and type of a unit that is not there and cannot be.
const NO_UNIT: u8 = 0x7f;

/// The most blocks that one UNMAP may name.
pub(super) const MAX_UNMAP_BLOCKS: u32 = 1 << 22;
/// The most descriptors in one UNMAP.
pub(super) const MAX_UNMAP_DESCRIPTORS: u32 = 256;
/// The most blocks of one WRITE SAME.
pub(super) const MAX_WRITE_SAME_BLOCKS: u32 = 0xffff;

/// What the pages say about a unit.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    /// Logical block size in bytes.
    pub logical: u32,
    /// Physical block size in bytes.
    pub physical: u32,
    /// Longest transfer in bytes.
    pub max_transfer: u32,
    /// Identity of the disk.
    pub identity: &'a [u8; 16],
    /// Serial number, printable.
    pub serial: &'a str,
}

/// Standard inquiry data.
pub(super) fn standard() -> [u8; 36] {
    let mut data = [0; 36];
    data[2] = 0x05; // Complies with SPC-3, as Hyper-V says.
    data[3] = 0x12; // Hierarchical addresses; this data format.
    data[4] = 31; // Bytes after this one.
    data[7] = 0x02; // Commands are queued.
    data[8..16].copy_from_slice(VENDOR);
    data[16..32].copy_from_slice(PRODUCT);
    data[32..36].copy_from_slice(REVISION);
    data
}

/// Standard inquiry data of a logical unit that is not there.
pub(super) fn absent() -> [u8; 36] {
    let mut data = standard();
    data[0] = NO_UNIT;
    data
}

/// A page of vital product data, if it exists.
pub(super) fn vpd(page: u8, facts: &Facts<'_>) -> Option<Vec<u8>> {
    let body = match page {
        0x00 => vec![0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2],
        0x80 => facts.serial.as_bytes().to_vec(),
        0x83 => identification(facts),
        0xb0 => block_limits(facts),
        0xb1 => {
            let mut body = vec![0; 60];
            body[1] = 1; // Medium rotation rate: does not rotate.
            body
        }
        // UNMAP, WRITE SAME (16) and (10) unmap; unmapped blocks read as zeroes; thin provisioning.
        0xb2 => vec![0, 0xe4, 2, 0],
        _ => return None,
    };
    let mut data = vec![0, page];
    // Serial numbers are bounded by the options, the other pages by their nature.
    data.extend_from_slice(&(body.len() as u16).to_be_bytes());
    data.extend_from_slice(&body);
    Some(data)
}

/// Page 83: a registered world-wide name of Microsoft's number space, as Hyper-V makes them
/// (`/dev/disk/by-id/scsi-360022480...`), and a vendor-specific name.
fn identification(facts: &Facts<'_>) -> Vec<u8> {
    // NAA 6, the company id 00-22-48, and 100 bits of the identity.
    let id = u128::from_be_bytes(*facts.identity) >> 28;
    let naa = (0x600_2248_u128 << 100) | id;
    let mut body = vec![0x01, 0x03, 0, 16];
    body.extend_from_slice(&naa.to_be_bytes());
    let mut name = VENDOR.to_vec();
    name.extend_from_slice(facts.serial.as_bytes());
    body.extend_from_slice(&[0x02, 0x01, 0, name.len() as u8]);
    body.extend_from_slice(&name);
    body
}

/// Page b0. Offsets are those of the standard less the four bytes of the page's header.
fn block_limits(facts: &Facts<'_>) -> Vec<u8> {
    let mut body = vec![0; 60];
    let granularity = facts.physical / facts.logical;
    // Holes in a file are whole pages of its file system, mostly 4 KiB.
    let unmap_granularity = facts.physical.max(4096) / facts.logical;
    body[0] = 0x01; // WRITE SAME of zero blocks is not allowed.
    body[2..4].copy_from_slice(&(granularity as u16).to_be_bytes());
    body[4..8].copy_from_slice(&(facts.max_transfer / facts.logical).to_be_bytes());
    body[16..20].copy_from_slice(&MAX_UNMAP_BLOCKS.to_be_bytes());
    body[20..24].copy_from_slice(&MAX_UNMAP_DESCRIPTORS.to_be_bytes());
    body[24..28].copy_from_slice(&unmap_granularity.to_be_bytes());
    body[28] = 0x80; // The alignment (0) is valid.
    body[32..40].copy_from_slice(&u64::from(MAX_WRITE_SAME_BLOCKS).to_be_bytes());
    body
}
