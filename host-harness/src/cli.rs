// SPDX-License-Identifier: MIT OR Apache-2.0

//! The command line of the binary.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use host_harness::disk::DiskOptions;
use host_harness::net::NetOptions;
use host_harness::vm::MAX_CPUS;
use host_harness::vm::serial::SerialOption;
use host_harness::vsp::storvsp::MAX_SUB_CHANNELS;
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
    /// Ask a running host for something, or have it do something, through its control API
    #[command(after_help = CTL_AFTER_HELP)]
    Ctl(CtlArgs),
}

const AFTER_HELP: &str = "\
Exit status:
  0      the guest switched itself off, or reset itself under --no-reboot, or
         the user ended it (Ctrl-A x)
  1      KVM or the host failed while the guest ran, or at its end: a device did
         not stop, or the counters were not written
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

NICs (--net):
  tap       a TAP of this machine; it is made if there is none and you may
  passt     user-mode networking by the program passt (Debian package passt):
            DHCP and outgoing connections, without privileges
  mac       the guest's address [default: made from the NIC's number]
  mtu       the largest MTU of the guest, 576 to 65521 [default: 1500]
  queues    most channels, 1 to 64 [default: one a processor, 8 at most]
  link      off: the cable is not in
  pcap      a file for what crosses this NIC alone
  id        a name for the NIC [default: net0, net1, ...]
  tcp_ports, udp_ports
            with passt: ports of this machine that lead to the guest, as
            passt(1) has them, such as 2222:22; a comma is written twice

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

    /// A NIC:
    /// tap=NAME|passt[=PROGRAM][,mac=ADDRESS][,mtu=N][,queues=N][,link=on|off][,pcap=FILE]
    /// [,id=NAME][,tcp_ports=SPEC][,udp_ports=SPEC]; see below. May be repeated
    #[arg(long, value_name = "KEY=VALUE,...", action = ArgAction::Append,
          conflicts_with = "no_vmbus")]
    pub net: Vec<NetOptions>,

    /// Write what crosses all NICs to FILE as pcapng, for Wireshark and tshark
    #[arg(long, value_name = "FILE", requires = "net")]
    pub pcap: Option<PathBuf>,

    /// Number of SCSI controllers that are there even without disks
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(0..=4))]
    pub scsi_controllers: u8,

    /// Sub-channels that the guest may open on each SCSI controller [default: one less than there
    /// are processors, 63 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=i64::from(MAX_SUB_CHANNELS)))]
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
    #[arg(long, conflicts_with_all = ["vmbus_max_version", "vmbus_monitor_latency", "trace",
                                      "scsi_controllers", "scsi_sub_channels"])]
    pub no_vmbus: bool,

    /// Write every VMBus message and packet header to FILE as JSON lines
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,

    /// Listen on a Unix socket for the control API; see `host-harness ctl --help`
    #[arg(long, value_name = "PATH")]
    pub api: Option<PathBuf>,

    /// At the end, write the counters of the machine and its channels to FILE as JSON
    #[arg(long, value_name = "FILE")]
    pub counters: Option<PathBuf>,
}

const CTL_AFTER_HELP: &str = "\
The result is JSON on standard output.

Exit status:
  0  done
  1  the host refused, or did not answer, or its answer cannot be written
  2  a bad option, or no host listens at PATH

Example:
  host-harness ctl --api /run/vm.sock disk add path=data.qcow2,id=data";

/// Options of `ctl`.
#[derive(Debug, Args)]
pub struct CtlArgs {
    /// The socket that the host was given with --api
    #[arg(long, value_name = "PATH")]
    pub api: PathBuf,

    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs of `ctl`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show the machine, its devices and what they have negotiated
    Status,
    /// Show counts: exits by reason, and packets, signals and interrupts per channel
    Stats,
    /// Follow what happens, a line for each event, until the host ends
    Events,
    /// End the machine at once, as if the plug was pulled
    PowerOff,
    /// Stop all processors
    Pause,
    /// Let the processors go on
    Resume,
    /// Ask the guest to switch itself off
    Shutdown(EndArgs),
    /// Ask the guest to restart
    Reboot(EndArgs),
    /// Ask the guest to save its memory and switch itself off
    Hibernate(EndArgs),
    /// Type a text on the keyboard
    Type {
        /// The text, for a US keyboard; $'...' of the shell helps with Enter (\n), Tab and Escape
        text: String,
        #[command(flatten)]
        device: DeviceArg,
    },
    /// Use keys
    Key {
        /// A key, or several that are pressed together: a, enter, ctrl-alt-delete, 0x1e, e0:0x48
        keys: String,
        /// Press them down, and leave them so
        #[arg(long, conflicts_with = "up")]
        down: bool,
        /// Let them up
        #[arg(long)]
        up: bool,
        #[command(flatten)]
        device: DeviceArg,
    },
    /// Move the mouse, use its buttons and wheels: sends one report
    Mouse {
        /// Where to: 0 (left) to 32767 [default: where it is]
        #[arg(long)]
        x: Option<u16>,
        /// 0 (top) to 32767
        #[arg(long)]
        y: Option<u16>,
        /// The buttons that are down, or none [default: those that are down already]
        #[arg(long, value_name = "BUTTON,...", value_delimiter = ',')]
        buttons: Option<Vec<ButtonArg>>,
        /// Turns of the wheel away from the user
        #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true,
              value_parser = clap::value_parser!(i8).range(-127..))]
        wheel: i8,
        /// Turns of the wheel to the right
        #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true,
              value_parser = clap::value_parser!(i8).range(-127..))]
        pan: i8,
        #[command(flatten)]
        device: DeviceArg,
    },
    /// Tell the guest the time
    Time {
        /// What it shall do with it
        kind: TimeKindArg,
        /// Milliseconds that are added to the host's time, now and from now on: a testing aid
        #[arg(
            long,
            value_name = "MS",
            default_value_t = 0,
            allow_negative_numbers = true
        )]
        offset: i64,
        #[command(flatten)]
        device: DeviceArg,
    },
    /// Put a device back on the bus that was rescinded
    Offer {
        /// Its name
        device: String,
    },
    /// Take a device off the bus, with what is attached to it
    Rescind {
        /// Its name, as `status` shows it
        device: String,
    },
    /// Work on the disks
    #[command(subcommand)]
    Disk(DiskVerb),
    /// Work on the NICs
    #[command(subcommand)]
    Nic(NicVerb),
}

/// Options of the verbs that ask the guest to end.
#[derive(Debug, Args)]
pub struct EndArgs {
    /// Also if programs in the guest object
    #[arg(long)]
    pub force: bool,
    /// How long programs in the guest may take
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub timeout: u32,
    /// A text for the guest's users
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub message: String,
    #[command(flatten)]
    pub device: DeviceArg,
}

/// Which device, if there are several of a kind.
#[derive(Debug, Args)]
pub struct DeviceArg {
    /// Name of the device [default: the first of its kind]
    #[arg(long = "device", value_name = "NAME")]
    pub name: Option<String>,
}

/// Buttons of the mouse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ButtonArg {
    /// No button is down.
    None,
    /// Left.
    Left,
    /// Right.
    Right,
    /// The wheel.
    Middle,
    /// At the side, "back".
    Side,
    /// At the side, "forward".
    Extra,
}

/// What a guest does with the time that it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TimeKindArg {
    /// Set its clock.
    Sync,
    /// Use it as one of many samples.
    Sample,
    /// Nothing: only the way is measured.
    Probe,
}

/// The verbs of `ctl disk`.
#[derive(Debug, Subcommand)]
pub enum DiskVerb {
    /// Attach a disk; shows its name
    Add {
        /// As after `run --disk`
        #[arg(value_name = "KEY=VALUE,...", value_parser = here)]
        options: String,
    },
    /// Take a disk away, as if it was pulled out
    Remove {
        /// Its name
        disk: String,
    },
    /// Change a disk's size
    Resize {
        /// Its name
        disk: String,
        /// The new size: a number with K, M, G or T behind it; without a letter it counts MiB
        size: MemorySize,
    },
}

/// The verbs of `ctl nic`.
#[derive(Debug, Subcommand)]
pub enum NicVerb {
    /// Attach a NIC; shows its name
    Add {
        /// As after `run --net`; its paths begin where the host was started
        #[arg(value_name = "KEY=VALUE,...", value_parser = net)]
        options: String,
    },
    /// Take a NIC away, as if it was pulled out
    Remove {
        /// Its name
        nic: String,
    },
    /// Put the cable in, or take it out
    Link {
        /// Its name
        nic: String,
        /// Whether the cable is in
        state: LinkState,
    },
}

/// Where a cable is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LinkState {
    /// In.
    Up,
    /// Out.
    Down,
}

/// What to do when the guest reports a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnCrash {
    /// End the virtual machine.
    End,
    /// Let the guest go on.
    Continue,
}

/// A NIC as it is described to a host, which reads it again.
fn net(text: &str) -> Result<String, String> {
    match text.parse::<NetOptions>() {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// A disk as it is described to a host that may run elsewhere: paths begin here.
fn here(text: &str) -> Result<String, String> {
    let directory = std::env::current_dir().map_err(|error| error.to_string())?;
    DiskOptions::absolute(text, &directory).map_err(|error| error.to_string())
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
            Command::Ctl(_) => unreachable!(),
        })
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_fits_a_terminal() {
        for line in AFTER_HELP.lines().chain(CTL_AFTER_HELP.lines()) {
            assert!(line.len() <= 80, "{line}");
        }
    }

    #[test]
    fn defaults() {
        let args = parse(&["--kernel", "k"]).unwrap();
        assert_eq!(args.cpus, 1);
        assert_eq!(args.memory, MemorySize(512 << 20));
        assert!(args.serial.is_empty() && !args.no_reboot);
        assert!(parse(&["--kernel", "k", "--no-vmbus"]).unwrap().no_vmbus);
        assert_eq!(args.vmbus_max_version, Version::V6_0);
        assert_eq!(args.on_crash, OnCrash::End);
    }

    #[test]
    fn paths_of_hot_added_disks_begin_where_ctl_runs() {
        let args = ["host-harness", "ctl", "--api", "s", "disk", "add"];
        let add = |text| Cli::try_parse_from(args.iter().chain(&[text]));
        let Ok(Cli {
            command:
                Command::Ctl(CtlArgs {
                    verb: Verb::Disk(DiskVerb::Add { options }),
                    ..
                }),
        }) = add("lun=1,path=a,,b.raw")
        else {
            panic!("not understood");
        };
        let here = std::env::current_dir().unwrap();
        let want = here.join("a,b.raw");
        assert!(options.starts_with("lun=1,path=/") && options.ends_with("/a,,b.raw"));
        assert_eq!(options.parse::<DiskOptions>().unwrap().path, want);
        assert!(add("lun=1").is_err());
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
            (
                &["--kernel", "k", "--no-vmbus", "--scsi-controllers", "2"],
                "--scsi-controllers",
            ),
            (
                &["--kernel", "k", "--no-vmbus", "--scsi-sub-channels", "2"],
                "--scsi-sub-channels",
            ),
            (&[], "--kernel"),
        ] {
            let line = one_line(&parse(args).unwrap_err());
            assert!(line.contains(part), "{line}");
            assert!(!line.contains("tip:"), "{line}");
            assert!(!line.contains('\n') && !line.contains("Usage"), "{line}");
        }
    }
}
