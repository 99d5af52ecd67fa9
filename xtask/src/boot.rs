// SPDX-License-Identifier: MIT OR Apache-2.0

//! `boot`: the Debian guest, for a user at its console or for one command; and the `l1` runner.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use rustix::termios::tcgetwinsize;

use crate::{
    KernelArgs, Unmet,
    cache::Cache,
    guest::{self, GuestArgs},
    host::{self, KvmChoice},
    l1::{Job, L1, comma},
    qemu::Qemu,
    rootfs, setup, ui,
};

/// Which drivers the guest uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Drivers {
    /// This project's
    #[default]
    Rust,
    /// The kernel's own
    C,
}

/// Options of `boot`.
#[derive(Args, Clone, Debug)]
pub struct BootArgs {
    /// Run this shell command in the guest and exit with its status
    #[arg(long, value_name = "CMD", allow_hyphen_values = true)]
    pub run: Option<String>,
    /// Drivers for the bus and the disk
    #[arg(long, value_enum, default_value_t)]
    pub drivers: Drivers,
    /// Virtual processors (default: 2, or 1 where the guest runs in an L1 VM, which has one)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: Option<u32>,
    /// Memory, such as 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = setup::parse_memory)]
    pub memory: u64,
    /// Keep what the guest writes in this file, a disk image that is made if it does not exist
    /// (without it the guest starts from the same disk each time)
    #[arg(long, value_name = "FILE")]
    pub keep: Option<PathBuf>,
    /// Stay in the initramfs (a busybox shell): no root file system
    #[arg(long, conflicts_with = "keep")]
    pub initramfs: bool,
    /// Words to add to the kernel's command line
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Write every VMBus message and packet header to this file, as JSON lines
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// A NIC, as `host-harness run --net` has it; may be repeated (default: passt, which is user-mode
    /// networking). A TAP needs a guest that runs on this machine's KVM
    #[arg(long, value_name = "KEY=VALUE,...", conflicts_with = "no_net")]
    pub net: Vec<String>,
    /// No NIC
    #[arg(long)]
    pub no_net: bool,
    /// Write what crosses the NICs to this file, for Wireshark and tshark
    #[arg(long, value_name = "FILE", conflicts_with = "no_net")]
    pub pcap: Option<PathBuf>,
    #[command(flatten)]
    pub kernel: KernelArgs,
}

/// The kernel's command line for a guest.
fn command_line(boot: &BootArgs, size: Option<(u16, u16)>) -> String {
    let mut words = vec![
        "console=ttyS0 panic=-1 quiet mitigations=off cryptomgr.notests net.ifnames=0".to_owned(),
    ];
    words.push(match boot.drivers {
        // Keeps the C bus driver, which is built in, from starting.
        Drivers::Rust => "viridian.drivers=rust initcall_blacklist=hv_acpi_init".to_owned(),
        Drivers::C => "viridian.drivers=c".to_owned(),
    });
    if !boot.initramfs {
        words.push(format!("viridian.root=LABEL={}", rootfs::LABEL));
    } else if boot.run.is_none() {
        words.push("viridian.shell".to_owned());
    }
    if !boot.no_net {
        words.push("viridian.dhcp".to_owned());
    }
    if let Some((rows, columns)) = size {
        words.push(format!("viridian.size={rows}x{columns}"));
    }
    words.extend(boot.append.clone());
    words.join(" ")
}

/// The NICs of a guest, as the harness takes them.
fn nics(boot: &BootArgs, has_passt: bool) -> Vec<String> {
    if boot.no_net || !boot.net.is_empty() {
        return boot.net.clone();
    }
    if !has_passt {
        ui::info("no network: there is no `passt` here (it is in the Debian package of that name)");
        return Vec::new();
    }
    vec!["passt".to_owned()]
}

/// Makes a path absolute, so that it means the same in the L1 VM.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("bad path {}", path.display()))
}

/// A NIC as the user describes it, for a harness that runs elsewhere.
#[derive(Debug, Default, PartialEq, Eq)]
struct Nic {
    /// The description, with absolute paths.
    option: String,
    /// The TAP that it names.
    tap: Option<String>,
    /// The program that it names by a path.
    program: Option<PathBuf>,
    /// The file of its capture.
    pcap: Option<PathBuf>,
}

/// Makes the paths in a NIC's description absolute. What is wrong with it, the harness says.
fn nic(text: &str) -> Result<Nic> {
    // A doubled comma stands for one in a value, where no NUL can be.
    const COMMA: &str = "\0";
    let mut nic = Nic::default();
    let mut items = Vec::new();
    for item in text.replace(",,", COMMA).split(',') {
        let value = |value: &str| value.replace(COMMA, ",");
        items.push(match item.split_once('=') {
            Some(("pcap", path)) if !path.is_empty() => {
                let path = absolute(Path::new(&value(path)))?;
                let item = format!("pcap={}", comma(&path));
                nic.pcap = Some(path);
                item
            }
            // Without a slash it is looked for in the path.
            Some(("passt", program)) if program.contains('/') => {
                let path = absolute(Path::new(&value(program)))?;
                let item = format!("passt={}", comma(&path));
                nic.program = Some(path);
                item
            }
            Some(("tap", name)) => {
                nic.tap = Some(value(name));
                item.replace(COMMA, ",,")
            }
            _ => item.replace(COMMA, ",,"),
        });
    }
    nic.option = items.join(",");
    Ok(nic)
}

/// The existing directory that a file is or will be in.
fn directory_of(path: &Path) -> Result<PathBuf> {
    match path.parent().filter(|parent| parent.is_dir()) {
        Some(parent) => Ok(parent.to_owned()),
        None => bail!(Unmet(format!(
            "{}: its directory does not exist",
            path.display()
        ))),
    }
}

/// Sets up, starts the guest, and gives the exit status.
///
/// # Errors
///
/// Those of the set-up and of the guest.
pub fn run(cache: &Cache, boot: &BootArgs) -> Result<u8> {
    let ready = setup::run(cache, &boot.kernel.source(), false)?;
    ready.kvm.announce();
    let mut writable = Vec::new();
    let mut disks = Vec::new();
    let mut _kept = None;
    if let Some(path) = &boot.keep {
        let path = absolute(path)?;
        _kept = Some(setup::kept_disk(&ready, &path)?);
        writable.push(directory_of(&path)?);
        disks.push(format!("path={},format=raw", comma(&path)));
    } else if !boot.initramfs {
        disks.push(format!(
            "path={},format=raw,snapshot=on",
            comma(&ready.debian)
        ));
    }
    let mut options = Vec::new();
    if let Some(path) = &boot.trace {
        let path = absolute(path)?;
        writable.push(directory_of(&path)?);
        options.push(format!("--trace={}", path.display()));
    }
    let nics = nics(boot, host::has_passt());
    let mut keep = Vec::new();
    for nic in &nics {
        let nic = self::nic(nic)?;
        if let (Some(name), KvmChoice::Nested(reason)) = (&nic.tap, &ready.kvm) {
            bail!(Unmet(format!(
                "--net tap={name}: this machine's TAPs are not in the VM that the guest runs in here, because \
                 {reason}"
            )));
        }
        options.push(format!("--net={}", nic.option));
        if let Some(path) = &nic.pcap {
            writable.push(directory_of(path)?);
        }
        keep.extend(nic.program);
    }
    if let (Some(path), false) = (&boot.pcap, nics.is_empty()) {
        let path = absolute(path)?;
        writable.push(directory_of(&path)?);
        options.push(format!("--pcap={}", path.display()));
    }
    writable.sort();
    writable.dedup();
    let interactive = boot.run.is_none();
    let size = tcgetwinsize(std::io::stdin())
        .ok()
        .filter(|size| interactive && size.ws_row > 0 && size.ws_col > 0)
        .map(|size| (size.ws_row, size.ws_col));
    let guest = GuestArgs {
        harness: ready.harness.clone(),
        kernel: ready.kernel.image.clone(),
        initramfs: ready.initramfs.clone(),
        cmdline: command_line(boot, size),
        cpus: boot
            .cpus
            .unwrap_or(if ready.kvm.is_direct() { 2 } else { 1 }),
        memory: boot.memory,
        disks,
        options,
        run: boot.run.clone(),
        power_off: boot.keep.is_some(),
    };
    if interactive {
        ui::info("the guest's console follows; `poweroff` in it or Ctrl-A x ends it");
    }
    let Some(l1) = ready.l1(boot.memory) else {
        return guest::run(&guest);
    };
    keep.extend(l1.keep);
    let l1 = L1 {
        writable,
        keep,
        ..l1
    };
    let mut command = vec![
        crate::program().to_string_lossy().into_owned(),
        "guest".to_owned(),
    ];
    command.extend(guest.to_arguments());
    l1.run(&Job {
        command,
        environment: environment(),
        directory: "/".into(),
        input: interactive,
        raw: interactive,
    })
}

/// Our environment, for a command in the L1 VM.
fn environment() -> Vec<(String, String)> {
    usable_in_l1(std::env::vars_os())
}

/// Those variables that are text and mean something there: of places for temporary files it has only /tmp.
fn usable_in_l1(variables: impl Iterator<Item = (OsString, OsString)>) -> Vec<(String, String)> {
    variables
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name != "TMPDIR")
        .collect()
}

/// Options of the hidden verb `l1`, the runner for test programs.
#[derive(Args, Clone, Debug)]
pub struct L1Args {
    /// Where QEMU is unpacked
    #[arg(long)]
    qemu: PathBuf,
    /// Kernel of the VM
    #[arg(long)]
    kernel: PathBuf,
    /// Initramfs of the VM
    #[arg(long)]
    initramfs: PathBuf,
    /// Its memory
    #[arg(long, value_parser = setup::parse_memory)]
    memory: u64,
    /// Its processors
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Longest time, in seconds
    #[arg(long)]
    timeout: Option<u64>,
    /// Folders that can be written
    #[arg(long)]
    writable: Vec<PathBuf>,
    /// Files and folders under /tmp that are visible
    #[arg(long)]
    keep: Vec<PathBuf>,
    /// Program and arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// The command that runs what follows it in the L1 VM.
///
/// # Errors
///
/// When our own program cannot be found.
pub fn l1_command(l1: &L1) -> Result<Vec<String>> {
    let mut command = vec![
        crate::program().to_string_lossy().into_owned(),
        "l1".to_owned(),
        format!("--qemu={}", l1.qemu.root().display()),
        format!("--kernel={}", l1.kernel.display()),
        format!("--initramfs={}", l1.initramfs.display()),
        format!("--memory={}M", l1.memory),
        format!("--cpus={}", l1.cpus),
    ];
    command.extend(
        l1.timeout
            .map(|limit| format!("--timeout={}", limit.as_secs())),
    );
    let path_options = |name: &str, paths: &[PathBuf]| -> Vec<String> {
        paths
            .iter()
            .map(|path| format!("--{name}={}", path.display()))
            .collect()
    };
    command.extend(path_options("writable", &l1.writable));
    command.extend(path_options("keep", &l1.keep));
    command.push("--".to_owned());
    Ok(command)
}

/// Runs a command in the L1 VM and gives its exit status.
///
/// # Errors
///
/// Those of the VM.
pub fn run_l1(arguments: &L1Args) -> Result<u8> {
    let mut keep = arguments.keep.clone();
    // cargo names a test program by its full path.
    keep.extend(arguments.command.first().map(PathBuf::from));
    let directory = std::env::current_dir().context("there is no current directory")?;
    keep.push(directory.clone());
    keep.retain(|path| path.exists());
    let l1 = L1 {
        qemu: Qemu::at(arguments.qemu.clone()),
        kernel: arguments.kernel.clone(),
        initramfs: arguments.initramfs.clone(),
        memory: arguments.memory,
        cpus: arguments.cpus,
        timeout: arguments.timeout.map(Duration::from_secs),
        writable: arguments.writable.clone(),
        keep,
    };
    l1.run(&Job {
        command: arguments.command.clone(),
        environment: environment(),
        directory,
        input: false,
        raw: false,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        boot: BootArgs,
    }

    fn parse(words: &[&str]) -> Result<BootArgs, clap::Error> {
        Line::try_parse_from([&["boot"], words].concat()).map(|line| line.boot)
    }

    #[test]
    fn defaults() {
        let boot = parse(&[]).unwrap();
        assert_eq!(
            (boot.drivers, boot.cpus, boot.memory),
            (Drivers::Rust, None, 1024)
        );
        let line = command_line(&boot, Some((40, 120)));
        for word in [
            "initcall_blacklist=hv_acpi_init",
            "viridian.root=LABEL=viridian-root",
            "viridian.size=40x120",
            "viridian.dhcp",
        ] {
            assert!(line.contains(word), "{line}");
        }
    }

    #[test]
    fn c_drivers_are_not_kept_from_starting() {
        let boot = parse(&["--drivers", "c", "--append", "a b=c"]).unwrap();
        let line = command_line(&boot, None);
        assert!(!line.contains("initcall_blacklist"));
        assert!(line.ends_with(" a b=c"));
    }

    #[test]
    fn there_is_a_network_unless_it_is_refused_or_cannot_be() {
        let of = |words: &[&str], has_passt| nics(&parse(words).unwrap(), has_passt);
        assert_eq!(of(&[], true), ["passt"]);
        assert!(of(&[], false).is_empty());
        assert!(of(&["--no-net"], true).is_empty());
        let two = ["--net", "tap=a,mtu=9000", "--net", "passt"];
        assert_eq!(of(&two, false), ["tap=a,mtu=9000", "passt"]);
    }

    #[test]
    fn paths_of_nics_are_absolute() {
        let here = std::env::current_dir().unwrap();
        let here = here.to_str().unwrap();
        let escaped = here.replace(',', ",,");
        let found = nic("passt=bin/passt,tcp_ports=1,,2,pcap=a,,b.pcap,id=x").unwrap();
        assert_eq!(
            found,
            Nic {
                option: format!(
                    "passt={escaped}/bin/passt,tcp_ports=1,,2,pcap={escaped}/a,,b.pcap,id=x"
                ),
                tap: None,
                program: Some(format!("{here}/bin/passt").into()),
                pcap: Some(format!("{here}/a,b.pcap").into()),
            }
        );
        let found = nic("mtu=9000,tap=a").unwrap();
        assert_eq!(found.tap.as_deref(), Some("a"));
        for as_it_is in [
            "passt",
            "passt=other",
            "tap=a,pcap=/x",
            "pcap=",
            "",
            "a,,,b",
        ] {
            assert_eq!(nic(as_it_is).unwrap().option, as_it_is);
        }
    }

    #[test]
    fn variables_that_mean_nothing_in_the_l1_are_left_out() {
        use std::os::unix::ffi::OsStringExt;
        let broken = || OsString::from_vec(vec![0xff]);
        let all = [
            ("A".into(), "b".into()),
            ("C".into(), broken()),
            (broken(), "d".into()),
            ("TMPDIR".into(), "/var/tmp".into()),
        ];
        assert_eq!(usable_in_l1(all.into_iter()), [("A".into(), "b".into())]);
    }

    #[test]
    fn command_may_look_like_an_option() {
        let boot = parse(&["--run", "-x; echo 'a b'"]).unwrap();
        assert_eq!(boot.run.as_deref(), Some("-x; echo 'a b'"));
    }

    #[test]
    fn bad_options_are_refused() {
        for words in [
            &["--cpus", "0"][..],
            &["--memory", "1"],
            &["--drivers", "go"],
            &["--kdir", "a", "--kernel-package", "b"],
            &["--keep", "a", "--initramfs"],
            &["--no-net", "--net", "passt"],
            &["--no-net", "--pcap", "a"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }
}
