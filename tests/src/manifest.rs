// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where the set-up put what a test needs: kernel, initramfs, root file system.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;

/// Names the manifest, which `cargo xtask test` writes.
const VARIABLE: &str = "VIRIDIAN_MANIFEST";

/// The files of one set-up. All paths are absolute.
#[derive(Debug, Clone, Deserialize)]
pub struct Manifest {
    /// The program `host-harness`.
    pub harness: PathBuf,
    /// The guest's kernel, a bzImage.
    pub kernel: PathBuf,
    /// Its release, as `uname -r` gives it.
    pub kernel_release: String,
    /// `lsvmbus` of the kernel's source, which Debian's hyperv-daemons package does not have.
    pub lsvmbus: PathBuf,
    /// The script of the kernel's source that unpacks the ELF image in a bzImage.
    pub extract_vmlinux: PathBuf,
    /// The small user space: busybox, all drivers, the agent.
    pub initramfs: PathBuf,
    /// Our modules.
    pub modules_dir: PathBuf,
    /// A Debian root file system: an ext4 image. Guests write to snapshots of it only.
    pub rootfs: PathBuf,
    /// A directory where tests may leave files for people to look at.
    pub artefacts: PathBuf,
}

impl Manifest {
    /// Read the manifest that the environment names.
    ///
    /// # Errors
    ///
    /// When there is none, which means that the tests were not started by `cargo xtask test`.
    pub fn load() -> Result<Self> {
        let path = std::env::var_os(VARIABLE).with_context(|| {
            format!("{VARIABLE} is not set: run these tests with `cargo xtask test`")
        })?;
        let path = PathBuf::from(path);
        let text =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("{} is not a manifest", path.display()))
    }

    /// A root file system that has our modules where `make modules_install` puts them, and nothing else.
    #[must_use]
    pub fn installed_modules(&self) -> PathBuf {
        self.modules_dir.join("installed")
    }
}
