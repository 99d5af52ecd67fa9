// SPDX-License-Identifier: MIT OR Apache-2.0

//! `test`: the checks, and all tests of the workspace. Those that boot guests run in L1 VMs where there is no usable KVM.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{
    KernelArgs, Unmet, boot,
    cache::Cache,
    check, checkout, cmd, e2e,
    l1::L1,
    setup::{self, Ready},
    ui::{self, Step},
};

/// The crate whose tests boot guests.
const END_TO_END: &str = "viridian-tests";

/// Memory of the guests of one test, all together, in MiB.
const GUEST_MEMORY: u64 = 2048;

/// The most batches of them at once.
const WORKERS: usize = 8;

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
        unit(test)?;
    }
    let booted = match &ready {
        Some(ready) => end_to_end(cache, ready, test)?,
        None => 0,
    };
    // Cargo does not mind when there is nothing to run.
    let found = test.filters.is_empty() || booted > 0 || !test.e2e && has_unit(test)?;
    if !found {
        bail!(Unmet(format!(
            "no test has such a name: {}",
            test.filters.join(" ")
        )));
    }
    Ok(())
}

/// What cargo is told for the tests that boot no guest.
const UNIT: [&[&str]; 2] = [
    &["--workspace", "--exclude", END_TO_END],
    &["--package", END_TO_END, "--lib"],
];

fn cargo_test(mut cargo: Command, arguments: &[&str], test: &TestArgs) -> Command {
    cargo
        .current_dir(checkout())
        .args(["test", "--locked"])
        .args(arguments)
        .arg("--")
        .args(&test.filters)
        .stdin(Stdio::null());
    cargo
}

/// All tests that boot no guest.
fn unit(test: &TestArgs) -> Result<()> {
    for arguments in UNIT {
        let mut cargo = cargo_test(cmd::tied(cmd::cargo_program()), arguments, test)
            // What cargo runs does not end with it, but with its group.
            .process_group(0)
            .spawn()
            .context("cannot start cargo")?;
        if !cmd::wait(&mut cargo, cmd::GRACE)?.success() {
            bail!("tests failed");
        }
    }
    Ok(())
}

/// Whether there is a test that boots no guest with such a name.
fn has_unit(test: &TestArgs) -> Result<bool> {
    for arguments in UNIT {
        let mut cargo = cargo_test(cmd::cargo(), arguments, test);
        let list = cmd::output(cargo.args(["--list", "--format", "terse"]))?;
        if list.lines().any(|line| line.ends_with(": test")) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Builds the program of the tests that boot guests. Optimized: the harness is part of it.
fn build(cache: &Cache) -> Result<PathBuf> {
    let mut step = Step::start_quiet("end-to-end tests", &cache.log_path("e2e"), 120)?;
    let build = || {
        let mut command = cmd::cargo();
        command
            .current_dir(checkout())
            .args(["test", "--locked", "--release", "--no-run"])
            .args(["--package", END_TO_END, "--test", "e2e"]);
        command
    };
    cmd::run_logged(&mut build(), &mut step).context("the build of the end-to-end tests failed")?;
    // It is built: now cargo only says where.
    let messages = cmd::output(build().arg("--message-format=json"))?;
    let program = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .context("cargo does not name the program of the end-to-end tests")?;
    step.done();
    Ok(program)
}

/// How many batches run at once: each has its VM's or guests' memory and keeps a processor busy.
fn workers(ready: &Ready) -> usize {
    let memory = ready.l1(GUEST_MEMORY).map_or(GUEST_MEMORY, |l1| l1.memory);
    let available = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find(|line| line.starts_with("MemAvailable:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .map_or(memory, |kib| kib / 1024);
    let fit = usize::try_from(available / memory).unwrap_or(WORKERS);
    crate::cpus().min(fit).clamp(1, WORKERS)
}

fn end_to_end(cache: &Cache, ready: &Ready, test: &TestArgs) -> Result<usize> {
    ready.kvm.announce();
    let artefacts = ready.target.join("artefacts");
    fs::create_dir_all(&artefacts)
        .with_context(|| format!("cannot create {}", artefacts.display()))?;
    let manifest = artefacts.join("manifest.json");
    fs::write(&manifest, format!("{:#}\n", ready.manifest(&artefacts)))
        .with_context(|| format!("cannot write {}", manifest.display()))?;
    ui::info(&format!("tests leave logs in {}", artefacts.display()));

    let path = build(cache)?;
    let mut runner = Vec::new();
    if let Some(l1) = ready.l1(GUEST_MEMORY) {
        let mut keep = l1.keep.clone();
        keep.extend([checkout(), ready.target.clone()]);
        runner = boot::l1_command(&L1 {
            timeout: Some(e2e::BATCH_LIMIT),
            writable: vec![artefacts],
            keep,
            ..l1
        })?;
    }
    e2e::Program {
        path,
        runner,
        environment: vec![(
            "VIRIDIAN_MANIFEST".to_owned(),
            manifest.to_string_lossy().into_owned(),
        )],
        workers: workers(ready),
        // The VM's own limit, which says more, comes first.
        limit: e2e::BATCH_LIMIT + Duration::from_secs(60),
    }
    .run(&test.filters)
}
