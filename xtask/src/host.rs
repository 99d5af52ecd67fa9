// SPDX-License-Identifier: MIT OR Apache-2.0

//! The machine that we run on: its packages, and what its /dev/kvm can do.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail};
use kvm_ioctls::Kvm;

use crate::{Unmet, cmd, ui, ui::Step};

/// `KVM_CAP_HYPERV_SYNIC2` of the kernel's include/uapi/linux/kvm.h; kvm-ioctls has no name for it.
const KVM_CAP_HYPERV_SYNIC2: u64 = 148;

/// A Debian package, and a file that shows that it is installed.
struct HostPackage {
    name: &'static str,
    witness: Witness,
}

enum Witness {
    /// A program somewhere in the path for programs.
    Program(&'static str),
    /// A file at one place.
    File(&'static str),
}

const PACKAGES: &[HostPackage] = &[
    HostPackage {
        name: "gcc",
        witness: Witness::Program("cc"),
    },
    HostPackage {
        name: "libc6-dev",
        witness: Witness::File("/usr/lib/x86_64-linux-gnu/libc.a"),
    },
    HostPackage {
        name: "mmdebstrap",
        witness: Witness::Program("mmdebstrap"),
    },
    HostPackage {
        name: "debian-archive-keyring",
        witness: Witness::File("/usr/share/keyrings/debian-archive-keyring.gpg"),
    },
    // The tests make and check disk images.
    HostPackage {
        name: "e2fsprogs",
        witness: Witness::Program("mke2fs"),
    },
    HostPackage {
        name: "qemu-utils",
        witness: Witness::Program("qemu-img"),
    },
    // One of them unpacks the kernel.
    HostPackage {
        name: "zstd",
        witness: Witness::Program("zstd"),
    },
    // The guest's network, where nobody says otherwise.
    HostPackage {
        name: "passt",
        witness: Witness::Program("passt"),
    },
    // The tests make networks, send data over them, and read captures.
    HostPackage {
        name: "iproute2",
        witness: Witness::Program("ip"),
    },
    HostPackage {
        name: "iperf3",
        witness: Witness::Program("iperf3"),
    },
    HostPackage {
        name: "tshark",
        witness: Witness::Program("tshark"),
    },
    // The tests speak the control API with it.
    HostPackage {
        name: "curl",
        witness: Witness::Program("curl"),
    },
];

/// Needed only without root rights.
const UIDMAP: HostPackage = HostPackage {
    name: "uidmap",
    witness: Witness::Program("newuidmap"),
};

fn program_exists(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into))
        .any(|directory| directory.join(name).is_file())
}

fn is_installed(package: &HostPackage) -> bool {
    match package.witness {
        Witness::Program(name) => program_exists(name),
        Witness::File(path) => Path::new(path).exists(),
    }
}

/// Whether there is the program that guests reach the network through.
pub fn has_passt() -> bool {
    program_exists("passt")
}

/// Whether this process has root rights.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Installs the packages that are missing, when we may.
///
/// # Errors
///
/// Without root rights: the exact command that installs them. With: those of `apt-get`.
pub fn ensure_packages(log: &Path) -> Result<()> {
    let mut wanted: Vec<&HostPackage> = PACKAGES.iter().collect();
    if !is_root() {
        wanted.push(&UIDMAP);
    }
    let missing: Vec<&str> = wanted
        .into_iter()
        .filter(|package| !is_installed(package))
        .map(|package| package.name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let line = format!(
        "apt-get install --yes --no-install-recommends {}",
        missing.join(" ")
    );
    if !program_exists("apt-get") {
        bail!(Unmet(format!(
            "these Debian packages, or what they contain, are needed: {}",
            missing.join(" ")
        )));
    }
    if !is_root() {
        bail!(Unmet(format!(
            "packages are missing; run as root:\n    apt-get update && {line}"
        )));
    }
    ui::info(&format!(
        "installing missing Debian packages: {}",
        missing.join(" ")
    ));
    let mut step = Step::start("host packages", log, 60 * missing.len() as u64)?;
    // An installation that was interrupted is completed first. `apt-get` is not tied to our life:
    // it ends well by itself if we are killed.
    let script = format!(
        "export DEBIAN_FRONTEND=noninteractive; dpkg --configure --pending && \
         apt-get update --option DPkg::Lock::Timeout=600 && \
         {line} --option DPkg::Lock::Timeout=600"
    );
    cmd::run_logged(Command::new("sh").args(["-c", &script]), &mut step)
        .with_context(|| format!("cannot install packages with: {line}"))?;
    step.done();
    Ok(())
}

/// Where guests run, and why.
#[derive(Debug)]
pub enum KvmChoice {
    /// The machine's own KVM has what the harness needs.
    Direct,
    /// It has not, for this reason: an L1 VM with a KVM of its own is used.
    Nested(String),
}

impl KvmChoice {
    /// Asks /dev/kvm. The file alone says nothing: it may be there and not work.
    pub fn probe() -> Self {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => return Self::Nested(format!("/dev/kvm: {error}{}", cpu_remark())),
        };
        if kvm.check_extension_raw(KVM_CAP_HYPERV_SYNIC2) <= 0 {
            return Self::Nested(format!(
                "/dev/kvm has no KVM_CAP_HYPERV_SYNIC2{}",
                cpu_remark()
            ));
        }
        match kvm.create_vm() {
            Ok(_) => Self::Direct,
            Err(error) => Self::Nested(format!("/dev/kvm makes no VM: {error}{}", cpu_remark())),
        }
    }

    /// Whether the machine's own KVM is used.
    pub fn is_direct(&self) -> bool {
        matches!(self, Self::Direct)
    }

    /// Tells the user.
    pub fn announce(&self) {
        match self {
            Self::Direct => ui::info("KVM: direct (/dev/kvm has the Hyper-V capabilities)"),
            Self::Nested(reason) => ui::info(&format!(
                "KVM: nested in a VM with a software CPU, because {reason}"
            )),
        }
    }
}

fn cpu_remark() -> &'static str {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has_virtualization = flags
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "svm" || flag == "vmx");
    if has_virtualization {
        ""
    } else {
        " (and the CPU shows neither svm nor vmx)"
    }
}
