// SPDX-License-Identifier: MIT OR Apache-2.0

//! `test`: the checks, and all tests of the workspace. Those that boot guests run in one L1 VM where there is no usable KVM.

use std::{fs, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{
    KernelArgs, boot,
    cache::Cache,
    check, checkout, cmd,
    cmd::Interrupted,
    l1::L1,
    setup::{self, Ready},
    ui,
};

/// The crate whose tests boot guests.
const END_TO_END: &str = "viridian-tests";

/// Memory of the guests of one test, all together, in MiB.
const GUEST_MEMORY: u64 = 2048;

/// Longest time of the end-to-end tests in the L1 VM.
const LIMIT: Duration = Duration::from_secs(60 * 60);

/// Options of `test`.
#[derive(Args, Clone, Debug)]
pub struct TestArgs {
    /// Run only the tests whose names contain one of these
    filters: Vec<String>,
    /// Only the tests that boot guests
    #[arg(long, conflicts_with = "unit")]
    e2e: bool,
    /// Only the tests that boot no guest (needs no set-up)
    #[arg(long)]
    unit: bool,
    #[command(flatten)]
    kernel: KernelArgs,
}

/// Sets up and runs the tests.
///
/// # Errors
///
/// When the set-up or a test fails.
pub fn run(cache: &Cache, test: &TestArgs) -> Result<()> {
    let ready = if test.unit {
        None
    } else {
        Some(setup::run(cache, &test.kernel.source(), false)?)
    };
    if !test.e2e {
        // Someone who names tests wants those only.
        if ready.is_some() && test.filters.is_empty() {
            check::run(cache, &test.kernel.source())?;
        }
        cargo_test(
            cmd::cargo().args(["test", "--locked", "--workspace", "--exclude", END_TO_END]),
            &[],
            test,
        )?;
    }
    if let Some(ready) = &ready {
        end_to_end(ready, test)?;
    }
    Ok(())
}

fn cargo_test(
    command: &mut std::process::Command,
    options: &[&str],
    test: &TestArgs,
) -> Result<()> {
    let status = command
        .current_dir(checkout())
        .arg("--")
        .args(options)
        .args(&test.filters)
        .status()
        .context("cannot start cargo")?;
    if cmd::interrupted() {
        bail!(Interrupted);
    }
    if !status.success() {
        bail!("tests failed");
    }
    Ok(())
}

fn end_to_end(ready: &Ready, test: &TestArgs) -> Result<()> {
    ready.kvm.announce();
    let artefacts = ready.target.join("artefacts");
    fs::create_dir_all(&artefacts)
        .with_context(|| format!("cannot create {}", artefacts.display()))?;
    let manifest = artefacts.join("manifest.json");
    fs::write(&manifest, format!("{:#}\n", ready.manifest(&artefacts)))
        .with_context(|| format!("cannot write {}", manifest.display()))?;
    ui::info(&format!("tests leave logs in {}", artefacts.display()));

    let mut command = cmd::cargo();
    // Optimized: the harness is part of the test programs.
    command
        .args(["test", "--locked", "--release", "--package", END_TO_END])
        .env("VIRIDIAN_MANIFEST", &manifest);
    if let Some(l1) = ready.l1(GUEST_MEMORY) {
        let mut keep = l1.keep.clone();
        keep.extend([checkout(), ready.target.clone()]);
        let runner = boot::l1_command(&L1 {
            timeout: Some(LIMIT),
            writable: vec![artefacts],
            keep,
            ..l1
        })?;
        // A list of strings in TOML is one in JSON.
        command.arg("--config").arg(format!(
            "target.x86_64-unknown-linux-gnu.runner={}",
            serde_json::to_string(&runner)?
        ));
    }
    // These tests take long: what one says is shown when it says it.
    cargo_test(&mut command, &["--nocapture"], test)
}
