// SPDX-License-Identifier: MIT OR Apache-2.0

//! The value of `--disk`: `path=F,format=qcow2,readonly=on,...`.

use super::{Fault, FaultKind};
use crate::key_values;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk, in a file or block device.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// Hyper-V's older format, fixed or dynamic.
    Vhd,
}

impl Format {
    /// The name that the option uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
        }
    }
}

/// A bad `--disk` value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OptionError(String);

/// A range of bad blocks that a disk begins with: a testing aid.
#[derive(Debug, Clone, PartialEq, Eq)]
struct BadBlocks {
    kind: FaultKind,
    first: u64,
    last: u64,
}

/// Which kind of controller a disk is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bus {
    /// A synthetic SCSI controller, with channels, targets and LUNs.
    Scsi,
    /// An IDE position with the storage protocol ("IDE accelerator" of a generation 1 machine).
    Ide,
}

/// What a disk of the machine is made of and where it is attached.
///
/// Written as `key=value` pairs with commas between; a comma inside a value is written twice.
///
/// | key | value | default |
/// |---|---|---|
/// | `path` | the image: a file or block device | must be given |
/// | `format` | `raw`, `qcow2` or `vhd` | by the name's ending, else raw; never against the contents |
/// | `readonly` | `on`, `off` | `off` |
/// | `snapshot` | `on`, `off`: changes go to a temporary file and are forgotten | `off` |
/// | `bus` | `scsi`, `ide` | `scsi` |
/// | `controller` | number of the controller (IDE: 0 or 1) | 0 |
/// | `channel`, `target` | SCSI path and target on the controller (IDE: `target` 0 or 1) | 0 |
/// | `lun` | 0 to 254 (IDE: 0) | the lowest free one |
/// | `id` | a name to refer to the disk by, also the seed of its identity | none |
/// | `serial` | serial number that the guest sees, up to 36 characters | made from the identity |
/// | `logical_block_size` | 512 or 4096 | of the format |
/// | `physical_block_size` | power of two from the logical size to 1 MiB | of the format |
/// | `fault` | `read:FIRST-LAST`, `write:...` or `all:...`: these logical blocks give medium errors (a testing aid; may be repeated) | none |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// The image.
    pub path: PathBuf,
    /// Its format, if it was named.
    pub format: Option<Format>,
    /// The guest may not write.
    pub read_only: bool,
    /// Writes are forgotten at the end.
    pub snapshot: bool,
    /// Kind of controller.
    pub bus: Bus,
    /// Number of the controller among those of its kind.
    pub controller: u8,
    /// SCSI path (channel) on the controller.
    pub channel: u8,
    /// SCSI target.
    pub target: u8,
    /// Logical unit; `None` means the lowest free one.
    pub lun: Option<u8>,
    /// Name of the disk.
    pub id: Option<String>,
    /// Serial number for the guest.
    pub serial: Option<String>,
    /// Logical block size in bytes.
    pub logical_block_size: Option<u32>,
    /// Physical block size in bytes.
    pub physical_block_size: Option<u32>,
    bad_blocks: Vec<BadBlocks>,
}

impl DiskOptions {
    /// The defaults for the image at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: None,
            read_only: false,
            snapshot: false,
            bus: Bus::Scsi,
            controller: 0,
            channel: 0,
            target: 0,
            lun: None,
            id: None,
            serial: None,
            logical_block_size: None,
            physical_block_size: None,
            bad_blocks: Vec::new(),
        }
    }

    /// The same text, checked, with the path made absolute: for a host that was started in another
    /// directory than `directory`.
    ///
    /// # Errors
    /// It is not a good description of a disk, or the path would not be text.
    pub fn absolute(text: &str, directory: &Path) -> Result<String, OptionError> {
        let options: Self = text.parse()?;
        let path = directory.join(&options.path);
        let path = path
            .to_str()
            .ok_or_else(|| OptionError("path: this directory's name is not text".into()))?;
        let items = key_values::split(text).into_iter().map(|item| {
            let item = match item.strip_prefix("path=") {
                Some(_) => format!("path={path}"),
                None => item,
            };
            item.replace(',', ",,")
        });
        Ok(items.collect::<Vec<_>>().join(","))
    }

    /// The injected faults, for a disk of this logical block size.
    pub(super) fn faults(&self, logical_block_size: u32) -> Vec<Fault> {
        let size = u64::from(logical_block_size);
        self.bad_blocks
            .iter()
            .map(|bad| Fault {
                bytes: bad.first.saturating_mul(size)
                    ..bad.last.saturating_add(1).saturating_mul(size),
                kind: bad.kind,
            })
            .collect()
    }

    fn check(&self) -> Result<(), OptionError> {
        let error = |text: String| Err(OptionError(text));
        if let (Some(logical), Some(physical)) = (self.logical_block_size, self.physical_block_size)
            && physical < logical
        {
            return error(format!(
                "physical_block_size={physical} is below logical_block_size={logical}"
            ));
        }
        match self.bus {
            Bus::Scsi => {
                if self.controller > 3 {
                    return error(format!(
                        "controller={}: 0 to 3 are possible",
                        self.controller
                    ));
                }
                if self.channel > 7 {
                    return error(format!("channel={}: 0 to 7 are possible", self.channel));
                }
                if self.target > 1 {
                    return error(format!("target={}: 0 or 1 are possible", self.target));
                }
                if self.lun == Some(255) {
                    return error("lun=255: 0 to 254 are possible".into());
                }
            }
            Bus::Ide => {
                if self.controller > 1 || self.target > 1 {
                    return error("bus=ide: controller and target are 0 or 1".into());
                }
                if self.channel != 0 || self.lun.unwrap_or(0) != 0 {
                    return error("bus=ide: channel and lun are 0".into());
                }
            }
        }
        Ok(())
    }
}

fn switch(key: &str, value: &str) -> Result<bool, OptionError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(OptionError(format!("{key}={value}: on or off expected"))),
    }
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, OptionError> {
    value
        .parse()
        .map_err(|_| OptionError(format!("{key}={value}: not a number in range")))
}

fn bad_blocks(value: &str) -> Result<BadBlocks, OptionError> {
    let parse = || {
        let (kind, range) = value.split_once(':')?;
        let kind = match kind {
            "read" => FaultKind::Read,
            "write" => FaultKind::Write,
            "all" => FaultKind::All,
            _ => return None,
        };
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (first <= last).then_some(BadBlocks { kind, first, last })
    };
    parse().ok_or_else(|| {
        OptionError(format!(
            "fault={value}: read:FIRST-LAST, write:FIRST-LAST or all:FIRST-LAST expected"
        ))
    })
}

impl FromStr for DiskOptions {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let mut options = Self::new("");
        let mut seen = Vec::new();
        for item in key_values::split(text) {
            let (key, value) = item.split_once('=').ok_or_else(|| {
                OptionError(format!("'{item}': key=value expected, as in path=disk.img"))
            })?;
            if key != "fault" {
                if seen.iter().any(|known| known == key) {
                    return Err(OptionError(format!("{key} is given twice")));
                }
                seen.push(key.to_owned());
            }
            match key {
                "path" => options.path = value.into(),
                "format" => {
                    options.format = Some(match value {
                        "raw" => Format::Raw,
                        "qcow2" => Format::Qcow2,
                        "vhd" | "vpc" => Format::Vhd,
                        _ => {
                            return Err(OptionError(format!(
                                "format={value}: raw, qcow2 or vhd expected"
                            )));
                        }
                    });
                }
                "readonly" => options.read_only = switch(key, value)?,
                "snapshot" => options.snapshot = switch(key, value)?,
                "bus" => {
                    options.bus = match value {
                        "scsi" => Bus::Scsi,
                        "ide" => Bus::Ide,
                        _ => {
                            return Err(OptionError(format!("bus={value}: scsi or ide expected")));
                        }
                    };
                }
                "controller" => options.controller = number(key, value)?,
                "channel" => options.channel = number(key, value)?,
                "target" => options.target = number(key, value)?,
                "lun" => options.lun = Some(number(key, value)?),
                "id" if value.is_empty() => return Err(OptionError("id=: a name expected".into())),
                "id" => options.id = Some(value.into()),
                "serial" => {
                    if value.is_empty()
                        || value.len() > 36
                        || !value.bytes().all(|c| c.is_ascii_graphic())
                    {
                        return Err(OptionError(format!(
                            "serial={value}: 1 to 36 visible ASCII characters expected"
                        )));
                    }
                    options.serial = Some(value.into());
                }
                "logical_block_size" => {
                    let size = number(key, value)?;
                    if size != 512 && size != 4096 {
                        return Err(OptionError(format!("{key}={value}: 512 or 4096 expected")));
                    }
                    options.logical_block_size = Some(size);
                }
                "physical_block_size" => {
                    let size: u32 = number(key, value)?;
                    if !size.is_power_of_two() || !(512..=1 << 20).contains(&size) {
                        return Err(OptionError(format!(
                            "{key}={value}: a power of two from 512 to 1048576 expected"
                        )));
                    }
                    options.physical_block_size = Some(size);
                }
                "fault" => options.bad_blocks.push(bad_blocks(value)?),
                _ => {
                    return Err(OptionError(format!(
                        "unknown key '{key}': path, format, readonly, snapshot, bus, controller, \
                         channel, target, lun, id, serial, logical_block_size, \
                         physical_block_size or fault expected"
                    )));
                }
            }
        }
        if options.path.as_os_str().is_empty() {
            return Err(OptionError("path=FILE is missing".into()));
        }
        options.check()?;
        Ok(options)
    }
}
