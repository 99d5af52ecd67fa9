// SPDX-License-Identifier: MIT OR Apache-2.0

//! The command line of the binary.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use host_harness::disk::DiskOptions;
use host_harness::vm::MAX_CPUS;
use host_harness::vm::serial::SerialOption;
use hv_proto::version::Version;

/// A KVM host for Hyper-V guest drivers: a small virtual machine with the hypervisor interface of
/// Hyper-V, a VMBus server and its devices.
#[derive(Debug, Parser)]
#[command(name = "host-harness", version, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine until it ends
    #[command(after_help = AFTER_HELP)]
    Run(RunArgs),
}

const AFTER_HELP: &str = "\
Exit status:
  0      the guest switched itself off, or reset itself under --no-reboot, or
         the user ended it (Ctrl-A x)
  1      KVM or the host failed while the guest ran
  2      a bad option, a missing or damaged image, or no usable KVM
  3      the guest crashed: it wrote the crash registers, or a processor had a
         triple fault
  128+N  ended by signal N

Disks (--disk):
  path      the image, a file or block device; a comma in it is written twice
  format    raw, qcow2 or vhd (fixed or dynamic). Without it the ending of the
            name decides, raw if it says nothing; an image whose contents say
            something else is refused
  readonly  on: the guest may not write
  snapshot  on: what the guest writes goes to a temporary file and is forgotten
  bus       scsi (default), or ide: an IDE position, named by controller and
            target (0 or 1 each)
  controller, channel, target, lun
            the SCSI address [default: 0, 0, 0, and the lowest free unit]
  id        a name for the disk, from which its SCSI identity is made
  serial    the serial number that the guest sees
  logical_block_size, physical_block_size
            512 or 4096; a power of two [default: of the format]
  fault     read:FIRST-LAST, write:FIRST-LAST or all:FIRST-LAST: these blocks
            give media errors. A testing aid; may be repeated

Keys on a terminal (--serial stdio):
  Ctrl-A x       end the virtual machine
  Ctrl-A Ctrl-A  send Ctrl-A to the guest
  Ctrl-A h       show these keys

Environment:
  RUST_LOG  what to log to stderr, such as `info` or `host_harness::vmbus=debug`
            [default: warn]
  NO_COLOR  when set, no colours in the log

Example:
  host-harness run --kernel vmlinuz --initrd initrd.img --cpus 2 --memory 1G \\
    --append 'console=ttyS0 root=/dev/sda' --disk path=root.vhd";

/// Options of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Linux kernel to boot: a bzImage (vmlinuz) or an ELF vmlinux
    #[arg(long, short, value_name = "FILE")]
    pub kernel: PathBuf,

    /// Initramfs
    #[arg(long, short, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(
        long,
        visible_alias = "append",
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub cmdline: String,

    /// Number of virtual processors
    #[arg(long, visible_alias = "smp", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CPUS)))]
    pub cpus: u32,

    /// Guest memory: a number with K, M, G or T behind it; without a letter it counts MiB
    #[arg(long, short, value_name = "SIZE", default_value = "512M")]
    pub memory: MemorySize,

    /// What is behind a serial port: stdio, none, file:PATH or socket:PATH (listens; Unix socket).
    /// The first use is ttyS0, the second ttyS1 [default: stdio, none]
    #[arg(long, value_name = "WHERE", action = ArgAction::Append)]
    pub serial: Vec<SerialOption>,

    /// A disk:
    /// path=FILE[,format=raw|qcow2|vhd][,readonly=on][,snapshot=on][,bus=scsi|ide][,controller=N]
    /// [,channel=N][,target=N][,lun=N][,id=NAME][,serial=TEXT][,logical_block_size=N]
    /// [,physical_block_size=N]; see below. May be repeated
    #[arg(long, value_name = "KEY=VALUE,...", action = ArgAction::Append,
          conflicts_with = "no_vmbus")]
    pub disk: Vec<DiskOptions>,

    /// Number of SCSI controllers that are there even without disks
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(0..=4))]
    pub scsi_controllers: u8,

    /// Sub-channels that the guest may open on each SCSI controller [default: one less than there
    /// are processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=63))]
    pub scsi_sub_channels: Option<u16>,

    /// End with status 0 when the guest resets itself, instead of booting again
    #[arg(long)]
    pub no_reboot: bool,

    /// When the guest reports a crash: end with status 3, or go on so that its crash kernel can run
    #[arg(long, value_name = "WHAT", default_value = "end")]
    pub on_crash: OnCrash,

    /// Newest VMBus version to offer: 4.0, 4.1, 5.0, 5.1, 5.2, 5.3 or 6.0
    #[arg(long, value_name = "VERSION", default_value_t = Version::V6_0)]
    pub vmbus_max_version: Version,

    /// Let the guest signal through monitor pages, which the host looks at every so many
    /// microseconds (100 to 100000), instead of by hypercalls
    #[arg(long, value_name = "MICROSECONDS",
          value_parser = clap::value_parser!(u64).range(100..=100_000))]
    pub vmbus_monitor_latency: Option<u64>,

    /// Offer no VMBus to the guest
    #[arg(long, conflicts_with_all = ["vmbus_max_version", "vmbus_monitor_latency", "trace"])]
    pub no_vmbus: bool,

    /// Write every VMBus message and packet header to FILE as JSON lines
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,

    /// At the end, write the counters of the machine and its channels to FILE as JSON
    #[arg(long, value_name = "FILE")]
    pub counters: Option<PathBuf>,
}

/// What to do when the guest reports a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnCrash {
    /// End the virtual machine.
    End,
    /// Let the guest go on.
    Continue,
}

/// A size of memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize(pub u64);

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<MemorySize, String> {
        let number = text.strip_prefix("size=").unwrap_or(text);
        let (digits, shift) = match number.as_bytes().last() {
            Some(b'k' | b'K') => (&number[..number.len() - 1], 10),
            Some(b'm' | b'M') => (&number[..number.len() - 1], 20),
            Some(b'g' | b'G') => (&number[..number.len() - 1], 30),
            Some(b't' | b'T') => (&number[..number.len() - 1], 40),
            _ => (number, 20),
        };
        // `parse` alone would take a plus sign.
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err("expected a size such as 512M or 2G".to_owned());
        }
        let value: u64 = digits
            .parse()
            .map_err(|_| "expected a size such as 512M or 2G".to_owned())?;
        value
            .checked_mul(1 << shift)
            .map(MemorySize)
            .ok_or_else(|| "this is more memory than can be".to_owned())
    }
}

/// Makes one line of clap's report, which has several.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    lines
        .join(" ")
        .trim_start_matches("error: ")
        .replace(" tip: ", "; ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(args: &[&str]) -> Result<RunArgs, clap::Error> {
        let args = ["host-harness", "run"].iter().chain(args);
        Cli::try_parse_from(args).map(|cli| match cli.command {
            Command::Run(run) => run,
        })
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_fits_a_terminal() {
        for line in AFTER_HELP.lines() {
            assert!(line.len() <= 80, "{line}");
        }
    }

    #[test]
    fn defaults() {
        let args = parse(&["--kernel", "k"]).unwrap();
        assert_eq!(args.cpus, 1);
        assert_eq!(args.memory, MemorySize(512 << 20));
        assert!(args.serial.is_empty() && !args.no_reboot);
        assert_eq!(args.vmbus_max_version, Version::V6_0);
        assert_eq!(args.on_crash, OnCrash::End);
    }

    #[test]
    fn options_as_qemu_users_write_them() {
        let args = parse(&[
            "--kernel=k",
            "--append",
            "console=ttyS0 -- -x",
            "--smp",
            "4",
            "-m",
            "1024",
            "--serial",
            "none",
            "--serial",
            "socket:/run/s",
            "--vmbus-max-version",
            "5.3",
        ])
        .unwrap();
        assert_eq!(args.cmdline, "console=ttyS0 -- -x");
        assert_eq!(args.cpus, 4);
        assert_eq!(args.memory, MemorySize(1 << 30));
        assert_eq!(
            args.serial,
            [SerialOption::None, SerialOption::Socket("/run/s".into())]
        );
        assert_eq!(args.vmbus_max_version, Version::V5_3);
    }

    #[test]
    fn sizes() {
        let bytes = |text: &str| text.parse::<MemorySize>().map(|size| size.0);
        assert_eq!(bytes("64"), Ok(64 << 20));
        assert_eq!(bytes("65536K"), Ok(64 << 20));
        assert_eq!(bytes("size=2g"), Ok(2 << 30));
        assert_eq!(bytes("1T"), Ok(1 << 40));
        for bad in [
            "",
            "M",
            "-1",
            "+1",
            "1.5G",
            "1GB",
            "0x10",
            "99999999999999T",
            "size=",
        ] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn errors_are_one_line() {
        for (args, part) in [
            (&["--kernel", "k", "--cpus", "0"][..], "--cpus"),
            (&["--kernel", "k", "--memory", "lots"], "--memory"),
            (&["--kernel", "k", "--serial", "tcp:1"], "--serial"),
            (
                &["--kernel", "k", "--vmbus-max-version", "3.0"],
                "--vmbus-max-version",
            ),
            (&["--kernel", "k", "--colour"], "--colour"),
            (&[], "--kernel"),
        ] {
            let line = one_line(&parse(args).unwrap_err());
            assert!(line.contains(part), "{line}");
            assert!(!line.contains("tip:"), "{line}");
            assert!(!line.contains('\n') && !line.contains("Usage"), "{line}");
        }
    }
}
