// SPDX-License-Identifier: MIT OR Apache-2.0

//! Direct boot of a Linux kernel: a bzImage or an ELF vmlinux, entered in long mode by the 64-bit
//! boot protocol (kernel documentation, `arch/x86/boot.rst`).
//!
//! Memory below 1 MiB while the kernel starts: the GDT, the page tables, the zero page
//! (`boot_params`), the command line; then the ACPI tables. The initramfs lies at the top of the
//! RAM that the kernel can address early.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{Cmdline, KernelLoader, bzimage::BzImage, elf::Elf, load_cmdline};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::VmError;
use super::memory::{self, EBDA_START, HIGH_MEMORY_START};
use super::power::{RESET_CODE, RESET_VECTOR};

/// Global descriptor table.
const GDT: u64 = 0x500;
/// Zero page.
const ZERO_PAGE: u64 = 0x7000;
/// Stack for the first instructions; the kernel switches to its own at once.
const BOOT_STACK: u64 = 0x8ff0;
/// Page map level 4, page directory pointers, then [`DIRECTORIES`] page directories.
const PAGE_MAP: u64 = 0x9000;
/// Page directories: each maps 1 GiB with 2 MiB pages.
const DIRECTORIES: u64 = 4;
/// Command line.
const CMDLINE: u64 = 0x2_0000;
/// Room for the command line (the kernel itself takes at most 2048 bytes, `COMMAND_LINE_SIZE`).
const CMDLINE_SIZE: usize = 0x1_0000;
/// Where a relocatable bzImage is loaded, unless it prefers another place.
const DEFAULT_LOAD: u64 = 16 << 20;

/// `boot_flag` of the setup header.
const BOOT_FLAG: u16 = 0xaa55;
/// `header` of the setup header, "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Type of a boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the kernel may use the heap that `heap_end_ptr` bounds.
const CAN_USE_HEAP: u8 = 1 << 7;
/// `xloadflags`: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point is this far into a bzImage's protected-mode part.
const ENTRY_64: u64 = 0x200;
/// Oldest boot protocol with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020c;
/// Where an initramfs may end when the header does not say (boot protocol 2.02).
const INITRD_MAX_DEFAULT: u64 = 0x37ff_ffff;
/// An ELF image starts with this.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

/// e820 types.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The opened images of a guest. They stay open, so that a reset boots the same files again.
#[derive(Debug)]
pub struct Images {
    kernel: Image,
    initrd: Option<Image>,
}

#[derive(Debug)]
struct Image {
    file: File,
    path: PathBuf,
}

impl Image {
    fn open(path: &Path, what: &str) -> Result<Image, VmError> {
        let open = || -> std::io::Result<File> {
            let file = File::open(path)?;
            if file.metadata()?.is_dir() {
                return Err(std::io::ErrorKind::IsADirectory.into());
            }
            Ok(file)
        };
        let file = open().map_err(|e| VmError::Image {
            what: what.to_owned(),
            path: path.to_owned(),
            reason: e.to_string(),
        })?;
        Ok(Image {
            file,
            path: path.to_owned(),
        })
    }

    fn bad(&self, what: &str, reason: impl std::fmt::Display) -> VmError {
        VmError::Image {
            what: what.to_owned(),
            path: self.path.clone(),
            reason: reason.to_string(),
        }
    }
}

impl Images {
    /// Opens the kernel and the initramfs.
    ///
    /// # Errors
    /// [`VmError::Image`] names the file that cannot be opened.
    pub fn open(kernel: &Path, initrd: Option<&Path>) -> Result<Images, VmError> {
        Ok(Images {
            kernel: Image::open(kernel, "kernel")?,
            initrd: initrd
                .map(|path| Image::open(path, "initramfs"))
                .transpose()?,
        })
    }
}

/// A loaded kernel: where the first CPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Physical address of the first instruction.
    pub rip: u64,
}

/// Loads the images and all that the kernel's entry needs into guest memory.
///
/// # Errors
/// [`VmError::Image`] for an image that is damaged or does not fit; [`VmError::BadOption`] for a
/// command line that is too long or has characters which the kernel cannot take.
pub fn load(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    images: &mut Images,
    cmdline: &str,
    rsdp: u64,
) -> Result<Entry, VmError> {
    let kernel = load_kernel(memory, memory_size, &mut images.kernel)?;
    let mut params = boot_params {
        hdr: kernel.header,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };

    let mut line = Cmdline::new(CMDLINE_SIZE)
        .map_err(|e| VmError::BadOption(format!("kernel command line: {e}")))?;
    let limit = match kernel.header.cmdline_size {
        0 => CMDLINE_SIZE - 1,
        size => (size as usize).min(CMDLINE_SIZE - 1),
    };
    if cmdline.len() > limit {
        return Err(VmError::BadOption(format!(
            "the kernel command line has {} bytes, the kernel takes {limit}",
            cmdline.len()
        )));
    }
    if !cmdline.trim().is_empty() {
        line.insert_str(cmdline)
            .map_err(|e| VmError::BadOption(format!("kernel command line: {e}")))?;
    }
    load_cmdline(memory, GuestAddress(CMDLINE), &line)
        .map_err(|e| VmError::Boot(format!("writing the command line: {e}")))?;
    params.hdr.cmd_line_ptr = CMDLINE as u32;

    if let Some(initrd) = &mut images.initrd {
        let end_max = match kernel.header.initrd_addr_max {
            0 => INITRD_MAX_DEFAULT,
            max => u64::from(max),
        };
        let (start, len) = load_initrd(memory, memory_size, initrd, kernel.end, end_max)?;
        params.hdr.ramdisk_image = start;
        params.hdr.ramdisk_size = len;
    }

    let map = e820(memory_size);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = *entry;
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(ZERO_PAGE)),
        memory,
    )
    .map_err(|e| VmError::Boot(format!("writing the boot parameters: {e}")))?;

    write_tables(memory).map_err(|e| VmError::Boot(format!("writing the boot tables: {e}")))?;
    Ok(Entry { rip: kernel.entry })
}

struct Kernel {
    entry: u64,
    /// First address that the kernel does not need while it unpacks itself.
    end: u64,
    header: setup_header,
}

fn load_kernel(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    image: &mut Image,
) -> Result<Kernel, VmError> {
    const WHAT: &str = "kernel";
    let mut magic = [0; 4];
    let file = &mut image.file;
    let read = file
        .seek(SeekFrom::Start(0))
        .and_then(|_| file.read_exact(&mut magic));
    read.map_err(|e| image.bad(WHAT, e))?;
    if magic == ELF_MAGIC {
        return load_elf(memory, memory_size, image);
    }
    load_bzimage(memory, memory_size, image)
}

fn load_elf(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    image: &mut Image,
) -> Result<Kernel, VmError> {
    const WHAT: &str = "kernel";
    let loaded = Elf::load(
        memory,
        None,
        &mut image.file,
        Some(GuestAddress(HIGH_MEMORY_START)),
    )
    .map_err(|e| image.bad(WHAT, format!("not a usable ELF vmlinux: {e}")))?;
    let entry = loaded.kernel_load.0;
    let end = loaded.kernel_end;
    if entry >= end || end > memory::low_end(memory_size) {
        return Err(image.bad(WHAT, "its segments do not fit into guest memory"));
    }
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        type_of_loader: LOADER_UNDEFINED,
        kernel_alignment: 0x100_0000,
        ..Default::default()
    };
    Ok(Kernel { entry, end, header })
}

fn load_bzimage(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    image: &mut Image,
) -> Result<Kernel, VmError> {
    const WHAT: &str = "kernel";
    let wrong = "not a Linux kernel (neither a bzImage nor an ELF vmlinux)";
    let header = peek_header(&mut image.file).map_err(|e| image.bad(WHAT, e))?;
    let Some(header) = header else {
        return Err(image.bad(WHAT, wrong));
    };
    if header.version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(image.bad(WHAT, "this kernel has no 64-bit entry point"));
    }
    let load = if header.relocatable_kernel == 0 || header.pref_address >= HIGH_MEMORY_START {
        header.pref_address
    } else {
        DEFAULT_LOAD
    };
    let needed = load.checked_add(u64::from(header.init_size));
    let end = match needed {
        Some(end) if load >= HIGH_MEMORY_START && end <= memory::low_end(memory_size) => end,
        _ => {
            return Err(image.bad(
                WHAT,
                format!("does not fit into {}M of guest memory", memory_size >> 20),
            ));
        }
    };
    let loaded = BzImage::load(
        memory,
        Some(GuestAddress(load)),
        &mut image.file,
        Some(GuestAddress(HIGH_MEMORY_START)),
    )
    .map_err(|e| image.bad(WHAT, format!("damaged bzImage: {e}")))?;
    let Some(mut header) = loaded.setup_header else {
        return Err(image.bad(WHAT, wrong));
    };
    // `syssize` counts the protected-mode code in 16-byte units: a file that is shorter was cut.
    let code = u64::from(header.syssize) * 16;
    if loaded.kernel_end.saturating_sub(load) < code {
        return Err(image.bad(
            WHAT,
            "damaged bzImage: the file is shorter than its header says",
        ));
    }
    header.type_of_loader = LOADER_UNDEFINED;
    header.loadflags |= CAN_USE_HEAP;
    header.heap_end_ptr = 0xfe00;
    Ok(Kernel {
        entry: load + ENTRY_64,
        end: end.max(loaded.kernel_end),
        header,
    })
}

/// Reads the setup header, or returns `None` for a file without one.
fn peek_header(file: &mut File) -> std::io::Result<Option<setup_header>> {
    use vm_memory::ByteValued;
    const HEADER_OFFSET: u64 = 0x1f1;
    let len = file.metadata()?.len();
    let mut header = setup_header::default();
    if len < HEADER_OFFSET + size_of::<setup_header>() as u64 {
        return Ok(None);
    }
    file.seek(SeekFrom::Start(HEADER_OFFSET))?;
    file.read_exact(header.as_mut_slice())?;
    Ok((header.header == HEADER_MAGIC && header.boot_flag == BOOT_FLAG).then_some(header))
}

/// Loads the initramfs as high as it may be, and returns its address and length.
fn load_initrd(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    image: &mut Image,
    kernel_end: u64,
    end_max: u64,
) -> Result<(u32, u32), VmError> {
    const WHAT: &str = "initramfs";
    let len = image
        .file
        .seek(SeekFrom::End(0))
        .and_then(|len| image.file.seek(SeekFrom::Start(0)).map(|_| len))
        .map_err(|e| image.bad(WHAT, e))?;
    if len == 0 {
        return Err(image.bad(WHAT, "the file is empty"));
    }
    let top = memory::low_end(memory_size).min(end_max.saturating_add(1));
    let start = top
        .checked_sub(len)
        .map(|start| start & !0xfff)
        .filter(|&start| start >= kernel_end);
    let (Some(start), Ok(len32)) = (start, u32::try_from(len)) else {
        return Err(image.bad(
            WHAT,
            format!(
                "{} MiB do not fit beside the kernel into {}M of guest memory",
                len >> 20,
                memory_size >> 20
            ),
        ));
    };
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut image.file, len32 as usize)
        .map_err(|e| image.bad(WHAT, e))?;
    // Below the hole, so below 4 GiB.
    Ok((start as u32, len32))
}

/// The memory map that the guest sees.
fn e820(memory_size: u64) -> Vec<boot_e820_entry> {
    let entry = |addr, end: u64, kind| boot_e820_entry {
        addr,
        size: end - addr,
        r#type: kind,
    };
    let mut map = vec![
        entry(0, EBDA_START, E820_RAM),
        entry(EBDA_START, HIGH_MEMORY_START, E820_RESERVED),
        entry(HIGH_MEMORY_START, memory::low_end(memory_size), E820_RAM),
    ];
    for (start, len) in memory::ranges(memory_size).into_iter().skip(1) {
        map.push(entry(start, start + len, E820_RAM));
    }
    map
}

/// A segment of the boot GDT. The boot protocol wants `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18.
#[derive(Clone, Copy)]
struct Segment {
    selector: u16,
    /// Type field of the descriptor: 0xb code, 0x3 data, 0xb also a busy 64-bit TSS.
    kind: u8,
    system: bool,
    long: bool,
}

const CODE: Segment = Segment {
    selector: 0x10,
    kind: 0xb,
    system: false,
    long: true,
};
const DATA: Segment = Segment {
    selector: 0x18,
    kind: 0x3,
    system: false,
    long: false,
};
const TASK: Segment = Segment {
    selector: 0x20,
    kind: 0xb,
    system: true,
    long: false,
};

impl Segment {
    /// The descriptor in the GDT: base 0, limit 4 GiB.
    fn descriptor(self) -> u64 {
        let access = u64::from(self.kind) | u64::from(!self.system) << 4 | 1 << 7;
        // Flags: granularity 4 KiB, then long mode or 32-bit size.
        let flags: u64 = if self.long { 0xa } else { 0xc };
        0xffff | access << 40 | 0xf << 48 | flags << 52
    }

    fn register(self) -> kvm_segment {
        kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: self.selector,
            type_: self.kind,
            present: 1,
            dpl: 0,
            db: u8::from(!self.long),
            s: u8::from(!self.system),
            l: u8::from(self.long),
            g: 1,
            avl: 0,
            unusable: 0,
            padding: 0,
        }
    }
}

/// Writes the firmware's few bytes, the GDT, and the page tables, which map the first 4 GiB one to
/// one.
fn write_tables(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    for segment in [CODE, DATA, TASK] {
        memory.write_obj(
            segment.descriptor(),
            GuestAddress(GDT + u64::from(segment.selector)),
        )?;
    }
    memory.write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))?;
    memory.write_obj(0u64, GuestAddress(GDT))?;
    memory.write_obj(0u64, GuestAddress(GDT + 8))?;
    memory.write_obj(0u64, GuestAddress(GDT + u64::from(TASK.selector) + 8))?;

    let pointers = PAGE_MAP + 0x1000;
    let mut page = [0u64; 512];
    page[0] = pointers | PRESENT_WRITABLE;
    write_page(memory, PAGE_MAP, &page)?;
    page = [0; 512];
    for index in 0..DIRECTORIES {
        let directory = pointers + 0x1000 * (index + 1);
        page[index as usize] = directory | PRESENT_WRITABLE;
        let mut entries = [0u64; 512];
        for (slot, address) in entries.iter_mut().zip((index << 30..).step_by(2 << 20)) {
            *slot = address | LARGE | PRESENT_WRITABLE;
        }
        write_page(memory, directory, &entries)?;
    }
    write_page(memory, pointers, &page)
}

fn write_page(
    memory: &GuestMemoryMmap,
    address: u64,
    page: &[u64; 512],
) -> Result<(), vm_memory::GuestMemoryError> {
    use zerocopy::IntoBytes;
    memory.write_slice(page.as_bytes(), GuestAddress(address))
}

/// General registers of the first CPU at the kernel's entry.
pub fn entry_registers(entry: Entry) -> kvm_regs {
    kvm_regs {
        rip: entry.rip,
        rsi: ZERO_PAGE,
        rsp: BOOT_STACK,
        rflags: 2,
        ..Default::default()
    }
}

/// Puts the first CPU into long mode with interrupts off. `sregs` are its registers after reset.
pub fn long_mode(mut sregs: kvm_sregs) -> kvm_sregs {
    const CR0_PE: u64 = 1;
    const CR0_ET: u64 = 1 << 4;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME: u64 = 1 << 8;
    const EFER_LMA: u64 = 1 << 10;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = TASK.selector + 15;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = CODE.register();
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = DATA.register();
    }
    sregs.tr = TASK.register();
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PAGE_MAP;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const SIZE: u64 = 64 << 20;

    fn memory() -> GuestMemoryMmap {
        memory::map(SIZE).unwrap()
    }

    /// A file in the form of a bzImage: one setup sector beside the boot sector, then `code`.
    fn bzimage(code: &[u8], change: impl Fn(&mut setup_header)) -> Vec<u8> {
        use vm_memory::ByteValued;
        let mut header = setup_header {
            setup_sects: 1,
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: 0x020f,
            loadflags: 1,
            code32_start: 0x10_0000,
            xloadflags: XLF_KERNEL_64,
            relocatable_kernel: 1,
            pref_address: 16 << 20,
            init_size: 8 << 20,
            syssize: code.len().div_ceil(16) as u32,
            cmdline_size: 64,
            initrd_addr_max: 0x7fff_ffff,
            ..Default::default()
        };
        change(&mut header);
        let mut file = vec![0; 1024];
        let bytes = header.as_slice();
        file[0x1f1..0x1f1 + bytes.len()].copy_from_slice(bytes);
        file.extend_from_slice(code);
        file
    }

    fn boot(kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<Booted, VmError> {
        let file = |bytes: &[u8]| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(bytes).unwrap();
            file
        };
        let kernel = file(kernel);
        let initrd = initrd.map(file);
        let memory = memory();
        let mut images = Images::open(kernel.path(), initrd.as_ref().map(|f| f.path()))?;
        let entry = load(&memory, SIZE, &mut images, cmdline, 0xe_0000)?;
        let params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        Ok(Booted {
            entry,
            params,
            memory,
        })
    }

    struct Booted {
        entry: Entry,
        params: boot_params,
        memory: GuestMemoryMmap,
    }

    #[test]
    fn bzimage_is_loaded_where_it_prefers() {
        let code = [0x90; 4096];
        let vm = boot(&bzimage(&code, |_| ()), Some(&[7; 5000]), "console=ttyS0").unwrap();
        assert_eq!(vm.entry.rip, (16 << 20) + 0x200);
        let byte: u8 = vm.memory.read_obj(GuestAddress(vm.entry.rip)).unwrap();
        assert_eq!(byte, 0x90);

        let hdr = vm.params.hdr;
        let start = u64::from(hdr.ramdisk_image);
        assert_eq!({ hdr.ramdisk_size }, 5000);
        assert_eq!(start % 4096, 0);
        assert!(start + 5000 <= SIZE && start >= 24 << 20);
        let byte: u8 = vm.memory.read_obj(GuestAddress(start + 4999)).unwrap();
        assert_eq!(byte, 7);

        let mut line = [0; 14];
        vm.memory
            .read_slice(&mut line, GuestAddress(u64::from(hdr.cmd_line_ptr)))
            .unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        assert_eq!({ vm.params.acpi_rsdp_addr }, 0xe_0000);
        assert_eq!(vm.params.e820_entries, 3);
    }

    #[test]
    fn damaged_kernels_are_refused() {
        let code = [0x90; 4096];
        let cut = bzimage(&code, |h| h.syssize = 1000);
        let cases: Vec<Vec<u8>> = vec![
            vec![],
            b"#!/bin/sh\necho no kernel\n".to_vec(),
            vec![0; 100_000],
            bzimage(&code, |h| h.header = 0),
            bzimage(&code, |h| h.version = 0x0200),
            bzimage(&code, |h| h.xloadflags = 0),
            bzimage(&code, |h| h.init_size = u32::MAX),
            bzimage(&code, |h| h.pref_address = u64::MAX),
            bzimage(&code, |h| {
                h.relocatable_kernel = 0;
                h.pref_address = 0;
            }),
            bzimage(&code, |h| h.setup_sects = 255),
            cut,
            b"\x7fELF".to_vec(),
            [&b"\x7fELF\x02\x01\x01"[..], &[0; 200]].concat(),
        ];
        for (index, kernel) in cases.iter().enumerate() {
            assert!(
                matches!(boot(kernel, None, ""), Err(VmError::Image { .. })),
                "case {index}"
            );
        }
    }

    /// An ELF file for x86-64 with one program header and `tail` behind it.
    fn elf(entry: u64, header: [u64; 6], kind: u32, tail: &[u8]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        file.extend(entry.to_le_bytes());
        file.extend(64u64.to_le_bytes());
        file.extend([0; 12]);
        file.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for field in header {
            file.extend(field.to_le_bytes());
        }
        file.extend_from_slice(tail);
        file
    }

    #[test]
    fn vmlinux_is_entered_at_its_entry() {
        // Offset, virtual address, physical address, file size, memory size, alignment.
        let header = [120, 0, 16 << 20, 4096, 8192, 4096];
        let vm = boot(&elf(16 << 20, header, 1, &[0x90; 4096]), None, "").unwrap();
        assert_eq!(vm.entry.rip, 16 << 20);
        assert_eq!({ vm.params.hdr.header }, HEADER_MAGIC);
    }

    fn any_number() -> impl proptest::strategy::Strategy<Value = u64> {
        use proptest::prelude::*;
        prop_oneof![
            any::<u64>(),
            0..8192u64,
            (0..128u64).prop_map(|n| n << 20),
            (0..4096u64).prop_map(|n| u64::MAX - n),
        ]
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(512))]

        #[test]
        fn no_elf_header_panics(
            entry in any_number(),
            header in proptest::array::uniform6(any_number()),
            kind in 0..8u32,
            tail in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        ) {
            let _ = boot(&elf(entry, header, kind, &tail), None, "");
        }

        #[test]
        fn no_bzimage_header_panics(
            setup in proptest::collection::vec(proptest::num::u8::ANY, 119),
            keep_magic in proptest::bool::ANY,
            load in any_number(),
            size in any_number(),
        ) {
            let mut file = bzimage(&[0x90; 4096], |h| {
                h.pref_address = load;
                h.init_size = size as u32;
            });
            if !keep_magic {
                file[0x1f1..0x1f1 + 119].copy_from_slice(&setup);
                file[0x1fe..0x200].copy_from_slice(&BOOT_FLAG.to_le_bytes());
                file[0x202..0x206].copy_from_slice(&HEADER_MAGIC.to_le_bytes());
            }
            let _ = boot(&file, None, "");
        }
    }

    #[test]
    fn initrd_must_fit_and_not_be_empty() {
        let kernel = bzimage(&[0x90; 512], |_| ());
        assert!(boot(&kernel, Some(&[]), "").is_err());
        assert!(boot(&kernel, Some(&vec![1; 41 << 20]), "").is_err());
    }

    #[test]
    fn long_command_line_is_refused() {
        let kernel = bzimage(&[0x90; 512], |_| ());
        assert!(boot(&kernel, None, &"x".repeat(64)).is_ok());
        let result = boot(&kernel, None, &"x".repeat(65));
        assert!(matches!(result, Err(VmError::BadOption(_))));
    }

    #[test]
    fn descriptors_are_those_of_a_flat_long_mode() {
        assert_eq!(CODE.descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(DATA.descriptor(), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn memory_map_has_no_overlap() {
        for size in [64 << 20, 3 << 30, 6 << 30] {
            let map = e820(size);
            let ram: u64 = map
                .iter()
                .filter(|e| { e.r#type } == E820_RAM)
                .map(|e| e.size)
                .sum();
            assert_eq!(ram, size - (HIGH_MEMORY_START - EBDA_START));
            for pair in map.windows(2) {
                assert!(pair[0].addr + pair[0].size <= pair[1].addr);
            }
        }
    }
}
