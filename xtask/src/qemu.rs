// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMU for the L1 VM, from Debian's packages but beside the machine's own: Debian 12's loses interrupts.
//!
//! QEMU before 10.2 changes `CPUState::interrupt_request` from two threads without a lock: when its SVM code
//! clears `CPU_INTERRUPT_VIRQ` while the main loop sets `CPU_INTERRUPT_HARD`, the latter is lost, and with a one-shot
//! timer the VM stands still for ever. The packages are unpacked, not installed, and their programs run with their own
//! loader and libraries, so the machine's Debian release does not matter.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::{
    cache::{Cache, Key, Recipe},
    cmd, root,
};

/// What is unpacked, with everything that it depends on.
const PACKAGES: &str = "qemu-system-x86";

/// Libraries, and among them the loader.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// An unpacked QEMU.
#[derive(Clone, Debug)]
pub struct Qemu(PathBuf);

impl Qemu {
    /// The one that is unpacked here.
    pub fn at(root: PathBuf) -> Self {
        Self(root)
    }

    /// Where it is unpacked.
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// Prepares to start it; ends with us.
    pub fn command(&self) -> std::process::Command {
        let libraries = self.0.join(LIBRARIES);
        let mut command = cmd::tied(libraries.join("ld-linux-x86-64.so.2"));
        command
            .env("QEMU_MODULE_DIR", libraries.join("qemu"))
            .arg("--library-path")
            .arg(&libraries)
            .arg(self.0.join("usr/bin/qemu-system-x86_64"));
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(self.0.join(firmware));
        }
        command
    }
}

/// Fetches and unpacks it.
///
/// # Errors
///
/// Those of `mmdebstrap`.
pub fn ensure(cache: &Cache) -> Result<Qemu> {
    let recipe = Recipe {
        name: "qemu",
        title: "QEMU for the L1 VM",
        key: Key::new("qemu 1").add("packages", PACKAGES.as_bytes()),
        expected_lines: 300,
    };
    let path = cache.get(&recipe, |tmp, step| {
        let suites = ["trixie", "trixie-updates", "trixie-backports"];
        let mut command = root::unpack(PACKAGES, &tmp.join("root"), &suites, "trixie-backports");
        cmd::run_logged(&mut command, step)
    })?;
    Ok(Qemu(path.join("root")))
}
