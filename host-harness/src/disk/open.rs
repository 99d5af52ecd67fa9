// SPDX-License-Identifier: MIT OR Apache-2.0

//! From options to an open disk: which format, which access, locks and layers.

use super::{
    BlockSizes, Disk, DiskOptions, FaultInjector, Format, OpenError, Qcow2Disk, RawDisk,
    SnapshotDisk, VhdDisk, file, vhd,
};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::Arc;

/// An open disk, with what the guest is told about it.
#[derive(Clone)]
pub struct OpenDisk {
    /// The disk, under a layer that can inject faults.
    pub disk: Arc<FaultInjector>,
    /// Block sizes that the guest sees.
    pub blocks: BlockSizes,
    /// A stable identity: made from the `id` option if there is one, else of the image if the
    /// format has one, else made from the path.
    pub identity: [u8; 16],
    /// Serial number, if one was given.
    pub serial: Option<String>,
}

/// Opens the disk that the options describe.
///
/// # Errors
/// The image is missing, not accessible, in use, of another format than was named, or damaged;
/// the error names the file and says which.
pub fn open(options: &DiskOptions) -> Result<OpenDisk, OpenError> {
    let path = &options.path;
    let error = |reason: String| OpenError::new(path, reason);
    let metadata = path.metadata().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => error("no such file".into()),
        _ => error(e.to_string()),
    })?;
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(error("not a file or block device".into()));
    }
    let base_read_only = options.read_only || options.snapshot;
    let file = OpenOptions::new()
        .read(true)
        .write(!base_read_only)
        .open(path)
        .map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                if !base_read_only =>
            {
                error(format!(
                    "{e} (readonly=on or snapshot=on would not write to it)"
                ))
            }
            _ => error(e.to_string()),
        })?;
    file::lock(&file, !base_read_only).map_err(|reason| error(reason.into()))?;
    let format = format_of(path, &file, options.format).map_err(error)?;
    let base: Box<dyn Disk> = match format {
        Format::Raw => {
            Box::new(RawDisk::new(file, base_read_only).map_err(|e| error(e.to_string()))?)
        }
        Format::Vhd => Box::new(VhdDisk::open(file, base_read_only).map_err(error)?),
        Format::Qcow2 => Box::new(
            Qcow2Disk::open(path, base_read_only, file)
                .map_err(|e| error(format!("not a sound qcow2 image: {e}")))?,
        ),
    };
    let disk: Box<dyn Disk> = if options.snapshot && !options.read_only {
        Box::new(SnapshotDisk::new(base).map_err(|e| error(format!("snapshot=on: {e}")))?)
    } else {
        base
    };

    let own = disk.block_sizes();
    let logical = options.logical_block_size.unwrap_or(own.logical);
    let blocks = BlockSizes {
        logical,
        physical: options
            .physical_block_size
            .unwrap_or(own.physical)
            .max(logical),
    };
    if disk.size() == 0 {
        return Err(error("the disk is empty".into()));
    }
    if !disk.size().is_multiple_of(logical.into()) {
        return Err(error(format!(
            "its size of {} bytes is not a multiple of the logical block size {logical}",
            disk.size()
        )));
    }
    let identity = match (disk.identity(), &options.id) {
        (Some(identity), None) => identity,
        (_, Some(id)) => hash(id.as_bytes()),
        (None, None) => {
            let absolute = path.canonicalize().unwrap_or_else(|_| path.clone());
            hash(absolute.as_os_str().as_encoded_bytes())
        }
    };
    Ok(OpenDisk {
        disk: Arc::new(FaultInjector::new(disk, options.faults(logical))),
        blocks,
        identity,
        serial: options.serial.clone(),
    })
}

/// Image formats that are known by their first bytes (VHD's fixed kind: by its last sector).
fn recognize(file: &File) -> io::Result<Option<&'static str>> {
    const MAGICS: [(&[u8], &str); 8] = [
        (b"QFI\xfb", "qcow2"),
        (&vhd::FOOTER_COOKIE, "vhd"),
        (b"vhdxfile", "vhdx"),
        (b"KDMV", "vmdk"),
        (b"# Disk DescriptorFile", "vmdk"),
        (b"<<< ", "vdi"),
        (b"QED\0", "qed"),
        (b"WithoutFreeSpace", "parallels"),
    ];
    let mut first = [0; 32];
    let len = file::length(file)?;
    let n = file.read_at(&mut first, 0)?;
    let first = first.get(..n).unwrap_or_default();
    if let Some((_, name)) = MAGICS.iter().find(|(magic, _)| first.starts_with(magic)) {
        return Ok(Some(name));
    }
    if let Some(last) = len.checked_sub(512) {
        let mut cookie = [0; 8];
        file.read_exact_at(&mut cookie, last)?;
        if cookie == vhd::FOOTER_COOKIE {
            return Ok(Some("vhd"));
        }
    }
    Ok(None)
}

/// Decides on the format. A named format is binding. Otherwise the ending of the file's name
/// decides, raw if it says nothing, and contents that say something else are an error: a guest
/// can write anything into a raw image, the header of another format included, so contents alone
/// must not choose.
fn format_of(path: &Path, file: &File, named: Option<Format>) -> Result<Format, String> {
    let found = recognize(file).map_err(|e| format!("cannot be read: {e}"))?;
    let by_name = match path.extension().and_then(|ending| ending.to_str()) {
        Some("qcow2") => Format::Qcow2,
        Some("vhd" | "vpc") => Format::Vhd,
        Some(other @ ("vhdx" | "vmdk" | "vdi" | "qed")) if named.is_none() => {
            return Err(format!("the format {other} is not supported"));
        }
        _ => Format::Raw,
    };
    let format = named.unwrap_or(by_name);
    match (format, found) {
        (Format::Raw, None) => Ok(format),
        (Format::Raw, Some(_)) if named.is_some() => Ok(format),
        (Format::Raw, Some(other)) => Err(format!(
            "its contents look like {other}, its name does not: say format={} or format=raw",
            if other == "qcow2" || other == "vhd" {
                other
            } else {
                "..."
            }
        )),
        // Whatever is wrong with a VHD's footers is found, and said, when it is opened.
        (Format::Vhd, None | Some("vhd")) => Ok(format),
        (Format::Qcow2, Some("qcow2")) => Ok(format),
        (_, None) => Err(format!("not a {} image", format.name())),
        (_, Some(other)) => Err(format!(
            "not a {} image: its contents look like {other}",
            format.name()
        )),
    }
}

/// Sixteen bytes from any bytes, the same in every run and version (FNV-1a, twice with different
/// starting values). Not for secrets.
fn hash(bytes: &[u8]) -> [u8; 16] {
    let fnv = |start: u64| {
        bytes.iter().fold(start, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    };
    let low = fnv(0xcbf2_9ce4_8422_2325);
    let high = fnv(low.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15);
    let mut result = [0; 16];
    result[..8].copy_from_slice(&high.to_be_bytes());
    result[8..].copy_from_slice(&low.to_be_bytes());
    result
}
