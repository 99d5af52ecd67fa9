// SPDX-License-Identifier: MIT OR Apache-2.0

//! The programs that cargo builds: the harness for the machine, and the agent for the guest.
//!
//! Both are optimized: on a software CPU an unoptimized harness takes several times as long.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{cache::Cache, checkout, cmd, ui::Step};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where cargo puts what it builds, and where it keeps `bitflags`.
pub struct Workspace {
    /// Cargo's target directory.
    pub target: PathBuf,
    /// The directory of the source of `bitflags` 2, which the kernel modules are built with too.
    pub bitflags: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    ///
    /// # Errors
    ///
    /// When cargo fails, for example because it cannot fetch a crate.
    pub fn load() -> Result<Self> {
        let text = cmd::output(
            cmd::cargo()
                .args([
                    "metadata",
                    "--format-version=1",
                    "--locked",
                    "--manifest-path",
                ])
                .arg(checkout().join("Cargo.toml")),
        )?;
        let metadata: serde_json::Value =
            serde_json::from_str(&text).context("`cargo metadata` did not print JSON")?;
        let bitflags = metadata["packages"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|package| {
                package["name"] == "bitflags"
                    && package["version"]
                        .as_str()
                        .is_some_and(|version| version.starts_with("2."))
            })
            .find_map(|package| {
                let manifest = Path::new(package["manifest_path"].as_str()?);
                Some(manifest.parent()?.join("src"))
            })
            .context("`cargo metadata` names no bitflags 2")?;
        let target = metadata["target_directory"]
            .as_str()
            .map(PathBuf::from)
            .context("`cargo metadata` names no target directory")?;
        Ok(Self { target, bitflags })
    }

    /// Builds the harness.
    ///
    /// # Errors
    ///
    /// Those of the build.
    pub fn harness(&self, cache: &Cache) -> Result<PathBuf> {
        let mut step = Step::start_quiet("host-harness", &cache.log_path("harness"), 120)?;
        cmd::run_logged(
            cmd::cargo().current_dir(checkout()).args([
                "build",
                "--locked",
                "--release",
                "--package",
                "host-harness",
            ]),
            &mut step,
        )
        .context("host-harness failed")?;
        step.done();
        Ok(self.target.join("release/host-harness"))
    }

    /// Builds the agent, statically linked: the guest's initramfs has no libraries.
    ///
    /// # Errors
    ///
    /// Those of the build.
    pub fn agent(&self, cache: &Cache) -> Result<PathBuf> {
        let mut step = Step::start_quiet("guest agent", &cache.log_path("agent"), 30)?;
        // A target directory of its own: other flags would build everything else again.
        let target = self.target.join("guest");
        cmd::run_logged(
            cmd::cargo()
                .current_dir(checkout())
                .args(["build", "--locked", "--release", "--package", "guest-agent"])
                .args(["--target", TARGET, "--target-dir"])
                .arg(&target)
                .env_remove("CARGO_ENCODED_RUSTFLAGS")
                .env(
                    "RUSTFLAGS",
                    "-C target-feature=+crt-static -C strip=symbols",
                ),
            &mut step,
        )
        .context("guest agent failed")?;
        step.done();
        Ok(target.join(TARGET).join("release/guest-agent"))
    }
}
