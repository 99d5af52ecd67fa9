// SPDX-License-Identifier: MIT OR Apache-2.0

//! VHD images, the older of Hyper-V's own two formats: fixed and dynamic ones are read, written,
//! resized and made. Differencing images are refused.
//!
//! Facts from Microsoft's "Virtual Hard Disk Image Format Specification" (2006). All numbers in
//! the file are big-endian.
//! - A fixed image is the disk's bytes and then a 512-byte footer.
//! - A dynamic image has a copy of the footer first, then a 1024-byte header and a block
//!   allocation table (BAT) at places that each names, then blocks, then the footer. A block is a
//!   bitmap of its sectors (1: the sector has data), padded to whole sectors, and the data.
//!
//! Written for this project because no maintained crate that writes VHD was found (crate `vhd`
//! is a reader for forensics).

use super::{BlockSizes, Disk, DiskError, IoBuf, OpenError, SECTOR, check_range, file};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{SystemTime, UNIX_EPOCH};
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// First bytes of a footer.
pub const FOOTER_COOKIE: [u8; 8] = *b"conectix";
/// First bytes of a dynamic image's header.
const HEADER_COOKIE: [u8; 8] = *b"cxsparse";
/// Version 1.0 of footer and header.
const VERSION: u32 = 0x0001_0000;
/// A reserved bit that is always set in the footer.
const FEATURES_RESERVED: u32 = 2;
/// "No offset".
const NO_OFFSET: u64 = u64::MAX;
/// BAT entry of a block that is not there.
const UNUSED: u32 = u32::MAX;
/// The largest disk that the format is specified for: 2040 GiB.
pub const MAX_SIZE: u64 = 2040 << 30;
/// Block size of the dynamic images made here, as everywhere.
const DEFAULT_BLOCK: u32 = 2 << 20;
/// Longest BAT that is accepted: more than 2040 GiB need with blocks of 256 KiB.
const MAX_BAT_ENTRIES: u32 = 1 << 23;
/// Seconds from 1970 to 2000, where the format's time begins.
const EPOCH_2000: u64 = 946_684_800;

/// Kind of image, in the footer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VhdKind {
    /// All bytes are in the file.
    Fixed,
    /// Blocks are added to the file when they are first written.
    Dynamic,
}

impl VhdKind {
    fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
        }
    }
}

/// The footer, 512 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Footer {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    /// Where the header of a dynamic image is; [`NO_OFFSET`] for a fixed one.
    data_offset: U64,
    /// Seconds since 2000.
    timestamp: U32,
    creator_application: [u8; 4],
    creator_version: U32,
    creator_host_os: [u8; 4],
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors_per_track: u8,
    disk_type: U32,
    /// One's complement of the sum of all the bytes, this field taken as zero.
    checksum: U32,
    unique_id: [u8; 16],
    saved_state: u8,
    reserved: [u8; 427],
}

const _: () = assert!(size_of::<Footer>() == 512);

/// The header of a dynamic image, 1024 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Header {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    version: U32,
    max_table_entries: U32,
    block_size: U32,
    checksum: U32,
    parent_unique_id: [u8; 16],
    parent_timestamp: U32,
    reserved1: U32,
    parent_name: [u8; 512],
    parent_locators: [u8; 192],
    reserved2: [u8; 256],
}

const _: () = assert!(size_of::<Header>() == 1024);

/// One's complement of the sum of the bytes.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(0u32, |sum, &byte| sum.wrapping_add(u32::from(byte)))
}

impl Footer {
    fn new(kind: VhdKind, size: u64, unique_id: [u8; 16]) -> Self {
        let (cylinders, heads, sectors) = geometry(size);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs().saturating_sub(EPOCH_2000));
        let mut footer = Self {
            cookie: FOOTER_COOKIE,
            features: FEATURES_RESERVED.into(),
            version: VERSION.into(),
            data_offset: match kind {
                VhdKind::Fixed => NO_OFFSET,
                VhdKind::Dynamic => SECTOR,
            }
            .into(),
            timestamp: (now as u32).into(),
            // The tools that read VHD take the size from `current_size`, and not from the
            // geometry, when they know the application: "win " stands for Hyper-V.
            creator_application: *b"win ",
            creator_version: 0x000a_0000.into(),
            creator_host_os: *b"Wi2k",
            original_size: size.into(),
            current_size: size.into(),
            cylinders: cylinders.into(),
            heads,
            sectors_per_track: sectors,
            disk_type: kind.number().into(),
            unique_id,
            ..Self::new_zeroed()
        };
        footer.seal();
        footer
    }

    fn computed_checksum(&self) -> u32 {
        let mut copy = *self;
        copy.checksum = 0.into();
        checksum(copy.as_bytes())
    }

    fn seal(&mut self) {
        self.checksum = self.computed_checksum().into();
    }

    fn set_size(&mut self, size: u64) {
        let (cylinders, heads, sectors) = geometry(size);
        self.current_size = size.into();
        self.cylinders = cylinders.into();
        self.heads = heads;
        self.sectors_per_track = sectors;
        self.seal();
    }

    /// Says what is wrong with the footer.
    fn check(&self, place: &str) -> Result<VhdKind, String> {
        if self.cookie != FOOTER_COOKIE {
            return Err(format!("no VHD footer {place} (no 'conectix' there)"));
        }
        if self.checksum.get() != self.computed_checksum() {
            return Err(format!(
                "damaged VHD footer {place}: checksum {:#010x} instead of {:#010x}",
                self.checksum.get(),
                self.computed_checksum()
            ));
        }
        if self.version.get() >> 16 != VERSION >> 16 {
            return Err(format!(
                "VHD format version {:#x} is not supported",
                self.version.get()
            ));
        }
        let size = self.current_size.get();
        if size == 0 || !size.is_multiple_of(SECTOR) || size > MAX_SIZE {
            return Err(format!("damaged VHD footer {place}: disk size {size}"));
        }
        match self.disk_type.get() {
            2 => Ok(VhdKind::Fixed),
            3 => Ok(VhdKind::Dynamic),
            4 => Err("differencing VHD images are not supported".into()),
            other => Err(format!("VHD disk type {other} is not supported")),
        }
    }
}

impl Header {
    fn new(table_offset: u64, entries: u32, block_size: u32) -> Self {
        let mut header = Self {
            cookie: HEADER_COOKIE,
            data_offset: NO_OFFSET.into(),
            table_offset: table_offset.into(),
            version: VERSION.into(),
            max_table_entries: entries.into(),
            block_size: block_size.into(),
            ..Self::new_zeroed()
        };
        header.seal();
        header
    }

    fn computed_checksum(&self) -> u32 {
        let mut copy = *self;
        copy.checksum = 0.into();
        checksum(copy.as_bytes())
    }

    fn seal(&mut self) {
        self.checksum = self.computed_checksum().into();
    }

    /// Says what is wrong with the header of a disk of `size` bytes.
    fn check(&self, size: u64) -> Result<(), String> {
        if self.cookie != HEADER_COOKIE {
            return Err("no header of a dynamic VHD (no 'cxsparse' there)".into());
        }
        if self.checksum.get() != self.computed_checksum() {
            return Err(format!(
                "damaged header of a dynamic VHD: checksum {:#010x} instead of {:#010x}",
                self.checksum.get(),
                self.computed_checksum()
            ));
        }
        if self.version.get() >> 16 != VERSION >> 16 {
            return Err(format!(
                "dynamic VHD header version {:#x} is not supported",
                self.version.get()
            ));
        }
        let block = self.block_size.get();
        if !block.is_power_of_two() || !(4096..=1 << 28).contains(&block) {
            return Err(format!("damaged VHD: block size of {block} bytes"));
        }
        let entries = self.max_table_entries.get();
        if entries > MAX_BAT_ENTRIES {
            return Err(format!("damaged VHD: table of {entries} blocks"));
        }
        if u64::from(entries) < size.div_ceil(block.into()) {
            return Err(format!(
                "damaged VHD: a table of {entries} blocks of {block} bytes for a disk of {size} bytes"
            ));
        }
        Ok(())
    }
}

/// Cylinders, heads and sectors for a disk of `size` bytes, by the format's own rule.
fn geometry(size: u64) -> (u16, u8, u8) {
    let total = (size / SECTOR).min(65535 * 16 * 255);
    let (sectors, heads, cylinders_heads);
    if total >= 65535 * 16 * 63 {
        (sectors, heads) = (255, 16);
        cylinders_heads = total / sectors;
    } else {
        let mut s = 17;
        let mut ch = total / s;
        let mut h = ch.div_ceil(1024).max(4);
        if ch >= h * 1024 || h > 16 {
            s = 31;
            h = 16;
            ch = total / s;
        }
        if ch >= h * 1024 {
            s = 63;
            h = 16;
            ch = total / s;
        }
        (sectors, heads, cylinders_heads) = (s, h, ch);
    }
    // All three fit by the limits above.
    ((cylinders_heads / heads) as u16, heads as u8, sectors as u8)
}

/// Which sectors of a block have data.
#[derive(Debug)]
enum Bitmap {
    Full,
    Partial(Box<[u8]>),
}

/// The moving parts of a dynamic image.
#[derive(Debug)]
struct Dynamic {
    header: Header,
    header_offset: u64,
    /// First sector of each block, or [`UNUSED`].
    bat: Vec<u32>,
    /// Bitmaps seen so far. A block that is filled in whole costs a few bytes here.
    bitmaps: HashMap<u32, Bitmap>,
    /// Where the next block goes, in bytes. The footer is there.
    end: u64,
}

#[derive(Debug)]
struct State {
    footer: Footer,
    /// `None` in a fixed image.
    dynamic: Option<Dynamic>,
}

/// A VHD image.
#[derive(Debug)]
pub struct VhdDisk {
    file: File,
    read_only: bool,
    /// Requests share it; what changes the layout takes it alone.
    state: RwLock<State>,
}

impl Dynamic {
    fn block_size(&self) -> u64 {
        self.header.block_size.get().into()
    }

    /// Bytes of a block's bitmap, padding included.
    fn bitmap_len(&self) -> u64 {
        (self.block_size() / SECTOR / 8).next_multiple_of(SECTOR)
    }

    /// Where a block's bitmap is in the file.
    fn block_offset(&self, block: u32) -> Option<u64> {
        match self.bat.get(block as usize) {
            None | Some(&UNUSED) => None,
            Some(&sector) => Some(u64::from(sector) * SECTOR),
        }
    }

    /// Checks that no two things in the file are at one place and that all is inside the file.
    /// Returns the end of the last thing.
    fn check_layout(&self, file_len: u64) -> Result<u64, String> {
        let table = self.header.table_offset.get();
        let table_len = (self.bat.len() as u64 * 4).next_multiple_of(SECTOR);
        let block_len = self.bitmap_len() + self.block_size();
        let mut areas: Vec<(u64, u64, &str)> = vec![
            (0, SECTOR, "the copy of the footer"),
            (self.header_offset, 1024, "the header"),
            (table, table_len, "the block table"),
        ];
        areas.extend(
            self.bat
                .iter()
                .filter(|&&sector| sector != UNUSED)
                .map(|&sector| (u64::from(sector) * SECTOR, block_len, "a block")),
        );
        areas.sort_unstable();
        let mut end = 0;
        for (start, len, what) in areas {
            if start < end {
                return Err(format!(
                    "damaged VHD: {what} at byte {start} overlaps something else"
                ));
            }
            end = start
                .checked_add(len)
                .filter(|&end| end <= file_len)
                .ok_or_else(|| {
                    format!("damaged VHD: {what} at byte {start} is beyond the end of the file")
                })?;
        }
        Ok(end)
    }
}

/// Reads a fixed-size structure.
fn read_struct<T: FromBytes + IntoBytes>(file: &File, offset: u64) -> io::Result<T> {
    let mut value = T::new_zeroed();
    file.read_exact_at(value.as_mut_bytes(), offset)?;
    Ok(value)
}

impl VhdDisk {
    /// Opens the image in `file`, which is open for reading, and for writing unless `read_only`.
    ///
    /// A dynamic image whose last footer was lost in a crash is opened by its first one.
    ///
    /// # Errors
    /// The reason in words, if this is not a sound VHD image of a supported kind.
    pub fn open(file: File, read_only: bool) -> Result<Self, String> {
        let io = |e: io::Error| format!("cannot read the VHD structures: {e}");
        let len = file::length(&file).map_err(io)?;
        let last = len.checked_sub(SECTOR).ok_or("too short for a VHD image")?;
        let mut footer: Footer = read_struct(&file, last).map_err(io)?;
        let kind = match footer.check("at the end") {
            Ok(kind) => kind,
            Err(reason) => {
                let first: Footer = read_struct(&file, 0).map_err(io)?;
                match first.check("at the beginning") {
                    Ok(VhdKind::Dynamic) => {
                        tracing::warn!("{reason}; the copy at the beginning is used");
                        footer = first;
                        VhdKind::Dynamic
                    }
                    _ => return Err(reason),
                }
            }
        };
        let size = footer.current_size.get();
        let dynamic = match kind {
            VhdKind::Fixed => {
                if size > last {
                    return Err(format!(
                        "damaged fixed VHD: {len} bytes of file for a disk of {size} bytes"
                    ));
                }
                None
            }
            VhdKind::Dynamic => Some(Self::open_dynamic(&file, &footer, len)?),
        };
        Ok(Self {
            file,
            read_only,
            state: RwLock::new(State { footer, dynamic }),
        })
    }

    fn open_dynamic(file: &File, footer: &Footer, len: u64) -> Result<Dynamic, String> {
        let header_offset = footer.data_offset.get();
        let header: Header = read_struct(file, header_offset)
            .map_err(|e| format!("damaged VHD: no header at byte {header_offset} ({e})"))?;
        header.check(footer.current_size.get())?;
        let mut table = vec![U32::ZERO; header.max_table_entries.get() as usize];
        file.read_exact_at(table.as_mut_bytes(), header.table_offset.get())
            .map_err(|e| {
                format!(
                    "damaged VHD: no block table at byte {} ({e})",
                    header.table_offset
                )
            })?;
        let mut dynamic = Dynamic {
            header,
            header_offset,
            bat: table.iter().map(|entry| entry.get()).collect(),
            bitmaps: HashMap::new(),
            end: 0,
        };
        // Some writers leave the last block's data short of its full length where the disk ends
        // inside it, with the footer right behind; so the end of the file plus a block is the limit.
        dynamic.end = dynamic
            .check_layout(len.saturating_add(dynamic.block_size()))?
            .next_multiple_of(SECTOR);
        Ok(dynamic)
    }

    /// Makes an image of `size` bytes, of zeroes, at `path`, where nothing may be yet.
    ///
    /// # Errors
    /// The size is 0, not a multiple of 512 or above [`MAX_SIZE`], or the file cannot be made.
    pub fn create(
        path: &Path,
        kind: VhdKind,
        size: u64,
        unique_id: [u8; 16],
    ) -> Result<(), OpenError> {
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
            return Err(OpenError::new(
                path,
                format!("a VHD image cannot have {size} bytes"),
            ));
        }
        let write = || -> io::Result<()> {
            let file = OpenOptions::new().write(true).create_new(true).open(path)?;
            let footer = Footer::new(kind, size, unique_id);
            match kind {
                VhdKind::Fixed => file.write_all_at(footer.as_bytes(), size)?,
                VhdKind::Dynamic => {
                    // At most 2040 GiB / 2 MiB entries.
                    let entries = size.div_ceil(DEFAULT_BLOCK.into()) as u32;
                    let table_offset = SECTOR + 1024;
                    let table_len = (u64::from(entries) * 4).next_multiple_of(SECTOR);
                    let header = Header::new(table_offset, entries, DEFAULT_BLOCK);
                    file.write_all_at(footer.as_bytes(), 0)?;
                    file.write_all_at(header.as_bytes(), SECTOR)?;
                    file.write_all_at(&vec![0xff; table_len as usize], table_offset)?;
                    file.write_all_at(footer.as_bytes(), table_offset + table_len)?;
                }
            }
            file.sync_all()
        };
        write().map_err(|e| OpenError::new(path, e))
    }

    /// Fixed or dynamic.
    pub fn kind(&self) -> VhdKind {
        if self.shared().dynamic.is_some() {
            VhdKind::Dynamic
        } else {
            VhdKind::Fixed
        }
    }

    // Every change of the state is complete in memory before something can panic, so a poisoned
    // lock is usable.
    fn shared(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Splits a range at block boundaries: block number, offset in the block, length, and offset
    /// in the request.
    fn parts(block: u64, offset: u64, len: u64) -> impl Iterator<Item = (u32, u64, u64, u64)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done >= len {
                return None;
            }
            let at = offset + done;
            let within = at % block;
            let n = (block - within).min(len - done);
            // Disk sizes are bounded, so the number of blocks is too.
            let part = ((at / block) as u32, within, n, done);
            done += n;
            Some(part)
        })
    }

    /// Loads the bitmaps of the blocks that a request touches, if they are not known.
    fn load_bitmaps(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let missing: Vec<u32> = {
            let state = self.shared();
            let Some(dynamic) = &state.dynamic else {
                return Ok(());
            };
            Self::parts(dynamic.block_size(), offset, len)
                .map(|(block, ..)| block)
                .filter(|&block| {
                    dynamic.block_offset(block).is_some() && !dynamic.bitmaps.contains_key(&block)
                })
                .collect()
        };
        if missing.is_empty() {
            return Ok(());
        }
        let mut state = self.alone();
        let Some(dynamic) = &mut state.dynamic else {
            return Ok(());
        };
        for block in missing {
            let Some(at) = dynamic.block_offset(block) else {
                continue;
            };
            if dynamic.bitmaps.contains_key(&block) {
                continue;
            }
            let mut bits = vec![0; dynamic.bitmap_len() as usize];
            self.file.read_exact_at(&mut bits, at)?;
            let used = (dynamic.block_size() / SECTOR / 8) as usize;
            let full = bits.iter().take(used).all(|&byte| byte == 0xff);
            let bitmap = if full {
                Bitmap::Full
            } else {
                Bitmap::Partial(bits.into_boxed_slice())
            };
            dynamic.bitmaps.insert(block, bitmap);
        }
        Ok(())
    }

    /// Adds a block of zeroes at the end of the file and moves the footer behind it.
    fn allocate(&self, state: &mut State, block: u32) -> Result<(), DiskError> {
        let footer = state.footer;
        let Some(dynamic) = &mut state.dynamic else {
            return Ok(());
        };
        if dynamic.block_offset(block).is_some() {
            return Ok(());
        }
        let at = dynamic.end;
        let sector = u32::try_from(at / SECTOR)
            .ok()
            .filter(|&sector| sector != UNUSED)
            .ok_or_else(|| DiskError::Unsupported("the VHD file has reached 2 TiB".into()))?;
        let data = at + dynamic.bitmap_len();
        let end = data + dynamic.block_size();
        // The footer behind the new block first: from then on the file has a good footer at its
        // end whatever happens, and the copy at the beginning is good all the time. The block is
        // valid only when the table names it, last.
        self.file.write_all_at(footer.as_bytes(), end)?;
        // Here are the old footer, and leftovers if a resize has moved the end down.
        file::zero_at(&self.file, data, dynamic.block_size(), true)?;
        self.file
            .write_all_at(&vec![0xff; dynamic.bitmap_len() as usize], at)?;
        let entry = dynamic.header.table_offset.get() + u64::from(block) * 4;
        self.file.write_all_at(&sector.to_be_bytes(), entry)?;
        if let Some(slot) = dynamic.bat.get_mut(block as usize) {
            *slot = sector;
        }
        dynamic.bitmaps.insert(block, Bitmap::Full);
        dynamic.end = end;
        Ok(())
    }

    /// Marks sectors of a partly filled block as having data, in the file too. The data must have
    /// been written before.
    fn mark(
        &self,
        dynamic: &mut Dynamic,
        block: u32,
        sectors: Range<u64>,
    ) -> Result<(), DiskError> {
        let Some(at) = dynamic.block_offset(block) else {
            return Ok(());
        };
        if let Some(Bitmap::Partial(bits)) = dynamic.bitmaps.get_mut(&block) {
            for sector in sectors {
                if let Some(byte) = bits.get_mut((sector / 8) as usize) {
                    *byte |= 0x80 >> (sector % 8);
                }
            }
            self.file.write_all_at(bits, at)?;
        }
        Ok(())
    }

    /// Whether a sector of a block has data.
    fn has_data(bits: &[u8], sector: u64) -> bool {
        bits.get((sector / 8) as usize)
            .is_some_and(|byte| byte & (0x80 >> (sector % 8)) != 0)
    }

    fn read_dynamic(
        &self,
        dynamic: &Dynamic,
        offset: u64,
        buf: &IoBuf<'_>,
    ) -> Result<(), DiskError> {
        for (block, within, len, done) in
            Self::parts(dynamic.block_size(), offset, buf.len() as u64)
        {
            let part = buf.range(done as usize, len as usize);
            let Some(at) = dynamic.block_offset(block) else {
                part.fill_zero();
                continue;
            };
            file::read_at(&self.file, at + dynamic.bitmap_len() + within, &part)?;
            if let Some(Bitmap::Partial(bits)) = dynamic.bitmaps.get(&block) {
                for sector in 0..len / SECTOR {
                    if !Self::has_data(bits, within / SECTOR + sector) {
                        part.range((sector * SECTOR) as usize, SECTOR as usize)
                            .fill_zero();
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes to blocks that are there. Returns the blocks' parts that are not, or whose bitmap
    /// has to change: (block, offset in the block, length, offset in the request).
    fn write_present(
        &self,
        dynamic: &Dynamic,
        offset: u64,
        buf: &IoBuf<'_>,
    ) -> Result<Vec<(u32, u64, u64, u64)>, DiskError> {
        let mut rest = Vec::new();
        for part in Self::parts(dynamic.block_size(), offset, buf.len() as u64) {
            let (block, within, len, done) = part;
            match (dynamic.block_offset(block), dynamic.bitmaps.get(&block)) {
                (Some(at), Some(Bitmap::Full)) => {
                    let at = at + dynamic.bitmap_len() + within;
                    file::write_at(&self.file, at, &buf.range(done as usize, len as usize))?;
                }
                _ => rest.push(part),
            }
        }
        Ok(rest)
    }

    fn writable(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        Ok(())
    }

    fn resize_dynamic(&self, state: &mut State, size: u64) -> Result<(), DiskError> {
        let mut footer = state.footer;
        let old_size = footer.current_size.get();
        footer.set_size(size);
        let Some(dynamic) = &mut state.dynamic else {
            return Ok(());
        };
        let block_size = dynamic.block_size();
        let needed = size.div_ceil(block_size);
        if needed > dynamic.bat.len() as u64 {
            // A longer table goes to the end of the file, and the header names it afterwards.
            let table_offset = dynamic.end;
            let table_len = (needed * 4).next_multiple_of(SECTOR);
            let mut bat = dynamic.bat.clone();
            bat.resize(needed as usize, UNUSED);
            let mut bytes: Vec<u8> = bat.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            bytes.resize(table_len as usize, 0xff);
            let mut header = dynamic.header;
            header.table_offset = table_offset.into();
            header.max_table_entries = u32::try_from(needed)
                .ok()
                .filter(|&entries| entries <= MAX_BAT_ENTRIES)
                .ok_or_else(|| DiskError::Unsupported(format!("{size} bytes in {needed} blocks")))?
                .into();
            header.seal();
            self.file
                .write_all_at(state.footer.as_bytes(), table_offset + table_len)?;
            self.file.write_all_at(&bytes, table_offset)?;
            self.file.sync_data()?;
            self.file
                .write_all_at(header.as_bytes(), dynamic.header_offset)?;
            dynamic.header = header;
            dynamic.bat = bat;
            dynamic.end = table_offset + table_len;
        }
        if size < old_size {
            // Blocks after the new end are forgotten (the file keeps their space), and below the rest
            // of the last block becomes zeroes, so that nothing comes back when the disk grows again.
            for block in needed..old_size.div_ceil(block_size) {
                let entry = dynamic.header.table_offset.get() + block * 4;
                self.file.write_all_at(&UNUSED.to_be_bytes(), entry)?;
                if let Some(slot) = dynamic.bat.get_mut(block as usize) {
                    *slot = UNUSED;
                }
                dynamic.bitmaps.remove(&(block as u32));
            }
        }
        // Also when it grows: another program may have left something behind the old end.
        let end = size.min(old_size);
        let within = end % block_size;
        if within != 0
            && let Some(at) = dynamic.block_offset((end / block_size) as u32)
        {
            let at = at + dynamic.bitmap_len() + within;
            file::zero_at(&self.file, at, block_size - within, true)?;
        }
        self.file.write_all_at(footer.as_bytes(), dynamic.end)?;
        self.file.write_all_at(footer.as_bytes(), 0)?;
        // Blocks that were forgotten may be behind the last one in use, with the footer in the
        // middle: cut the file, so that its footer is its end.
        self.file.set_len(dynamic.end + SECTOR)?;
        state.footer = footer;
        Ok(())
    }
}

impl Disk for VhdDisk {
    fn size(&self) -> u64 {
        self.shared().footer.current_size.get()
    }

    fn block_sizes(&self) -> BlockSizes {
        BlockSizes {
            logical: 512,
            physical: 512,
        }
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn identity(&self) -> Option<[u8; 16]> {
        let id = self.shared().footer.unique_id;
        (id != [0; 16]).then_some(id)
    }

    fn read_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        check_range(self.size(), offset, buf.len() as u64)?;
        self.load_bitmaps(offset, buf.len() as u64)?;
        let state = self.shared();
        match &state.dynamic {
            None => Ok(file::read_at(&self.file, offset, buf)?),
            Some(dynamic) => self.read_dynamic(dynamic, offset, buf),
        }
    }

    fn write_at(&self, offset: u64, buf: &IoBuf<'_>) -> Result<(), DiskError> {
        self.writable()?;
        let len = buf.len() as u64;
        check_range(self.size(), offset, len)?;
        self.load_bitmaps(offset, len)?;
        let rest = {
            let state = self.shared();
            check_range(state.footer.current_size.get(), offset, len)?;
            match &state.dynamic {
                None => return Ok(file::write_at(&self.file, offset, buf)?),
                Some(dynamic) => self.write_present(dynamic, offset, buf)?,
            }
        };
        if rest.is_empty() {
            return Ok(());
        }
        let mut state = self.alone();
        check_range(state.footer.current_size.get(), offset, len)?;
        for (block, within, len, done) in rest {
            self.allocate(&mut state, block)?;
            let Some(dynamic) = &mut state.dynamic else {
                break;
            };
            let Some(at) = dynamic.block_offset(block) else {
                continue;
            };
            let at = at + dynamic.bitmap_len() + within;
            file::write_at(&self.file, at, &buf.range(done as usize, len as usize))?;
            let first = within / SECTOR;
            self.mark(dynamic, block, first..first + len / SECTOR)?;
        }
        Ok(())
    }

    fn zero_at(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.writable()?;
        let state = self.shared();
        check_range(state.footer.current_size.get(), offset, len)?;
        let Some(dynamic) = &state.dynamic else {
            return Ok(file::zero_at(&self.file, offset, len, unmap)?);
        };
        // A block that is not there reads as zeroes already, and so does a sector without data.
        // A block that is there stays, but the host's file gets holes.
        for (block, within, len, _) in Self::parts(dynamic.block_size(), offset, len) {
            if let Some(at) = dynamic.block_offset(block) {
                let at = at + dynamic.bitmap_len() + within;
                file::zero_at(&self.file, at, len, unmap)?;
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        Ok(self.file.sync_data()?)
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.writable()?;
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Unsupported(format!(
                "a VHD image cannot have {size} bytes"
            )));
        }
        let mut state = self.alone();
        if state.dynamic.is_some() {
            return self.resize_dynamic(&mut state, size);
        }
        let old_size = state.footer.current_size.get();
        let mut footer = state.footer;
        footer.set_size(size);
        let grow = || {
            // What is there already may be behind the old footer, which goes last.
            let new = old_size + SECTOR;
            file::zero_at(&self.file, new, size.saturating_sub(new), false)?;
            self.file.write_all_at(footer.as_bytes(), size)?;
            file::zero_at(&self.file, old_size, SECTOR, false)
        };
        if size > old_size {
            if let Err(error) = grow() {
                // Such as no space: the image stays what it was.
                self.file.write_all_at(state.footer.as_bytes(), old_size)?;
                self.file.set_len(old_size + SECTOR)?;
                return Err(error.into());
            }
        } else {
            self.file.write_all_at(footer.as_bytes(), size)?;
        }
        self.file.set_len(size + SECTOR)?;
        state.footer = footer;
        Ok(())
    }
}
