// SPDX-License-Identifier: MIT OR Apache-2.0

//! `check`: formatting and lints, of cargo's crates and of the kernel modules. Every warning is an error.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    Unmet,
    cache::Cache,
    cargo::Workspace,
    checkout, cmd, host,
    kernel::{self, KernelSource},
    kmod, panics,
    root::{self, BuildRoot},
    ui::Step,
};

/// Checks everything.
///
/// # Errors
///
/// Names the first check that found something, with what it printed.
pub fn run(cache: &Cache, source: &KernelSource) -> Result<()> {
    source.check()?;
    host::ensure_packages(&cache.log_path("packages"))?;
    ensure_components(cache)?;
    let cargo = |title: &str, arguments: &[&str]| -> Result<()> {
        let log = cache.log_path("check");
        let mut step = Step::start(title, &log, 200)?;
        let result = cmd::run_logged(
            cmd::cargo().current_dir(checkout()).args(arguments),
            &mut step,
        );
        finish(step, result, &log)
    };
    cargo("cargo fmt", &["fmt", "--all", "--check"])?;
    cargo(
        "cargo clippy",
        &[
            "clippy",
            "--locked",
            "--workspace",
            "--all-targets",
            "--",
            "--deny=warnings",
        ],
    )?;

    let workspace = Workspace::load()?;
    let root = root::ensure(cache)?;
    let kernel = kernel::ensure(cache, source, false)?;
    let directory = cache.temporary("check")?;
    let work = directory.path().join("build");
    let sources = kmod::sources()?;
    kmod::copy_sources(&sources, &work)?;

    let log = cache.log_path("check");
    let mut step = Step::start("rustfmt of the kernel", &log, 10)?;
    let files: Vec<&Path> = sources
        .iter()
        .map(std::path::PathBuf::as_path)
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect();
    let result = format_check(&root, &kernel, &work, &files, &mut step);
    finish(step, result, &log)?;

    // `W=e` turns the warnings of all compilers into errors.
    let mut step = Step::start("clippy of the kernel", &log, 40)?;
    let result = kmod::make(
        &kernel.build,
        &workspace.bitflags,
        &work,
        "CLIPPY=1 W=e modules",
        &mut step,
    );
    finish(step, result, &log)?;

    let mut step = Step::start("no panics in the modules", &log, 10)?;
    let result = panic_check(&work, &mut step);
    finish(step, result, &log)
}

/// Gets rustfmt and clippy when the toolchain has come without them, as rustup's minimal profile does.
fn ensure_components(cache: &Cache) -> Result<()> {
    let missing: Vec<&str> = [("fmt", "rustfmt"), ("clippy", "clippy")]
        .into_iter()
        .filter(|(verb, _)| cmd::output(cmd::cargo().args([verb, "--version"])).is_err())
        .map(|(_, component)| component)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let log = cache.log_path("components");
    let mut step = Step::start(&missing.join(" and "), &log, 5)?;
    cmd::run_logged(
        Command::new("rustup")
            .args(["component", "add"])
            .args(&missing),
        &mut step,
    )
    .map_err(|error| {
        Unmet(format!(
            "the toolchain has no {}, and rustup does not add it: {error:#}",
            missing.join(" and no ")
        ))
    })?;
    step.done();
    Ok(())
}

/// Ends a check; a failed one shows all that it printed.
fn finish(step: Step, result: Result<()>, log: &Path) -> Result<()> {
    if let Err(error) = result {
        drop(step);
        if error.downcast_ref::<cmd::Interrupted>().is_some() {
            return Err(error);
        }
        eprint!("{}", fs::read_to_string(log).unwrap_or_default());
        // The lines that follow the first are the end of the log.
        let text = format!("{error:#}");
        bail!(
            "the check failed (see above): {}",
            text.lines().next().unwrap_or_default()
        );
    }
    step.done();
    Ok(())
}

/// Looks for code that can panic in the modules that are built in `work`.
fn panic_check(work: &Path, step: &mut Step) -> Result<()> {
    let mut found = false;
    for entry in fs::read_dir(work)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "ko") {
            continue;
        }
        let module = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let places = panics::find(&module).with_context(|| path.display().to_string())?;
        for place in places {
            step.line(&format!("{place}: this can panic"));
            found = true;
        }
    }
    if found {
        bail!("code of the modules can panic");
    }
    Ok(())
}

/// Runs the kernel's rustfmt, with the kernel's settings, over the modules' sources.
fn format_check(
    root: &BuildRoot,
    kernel: &kernel::Kernel,
    work: &Path,
    files: &[&Path],
    step: &mut Step,
) -> Result<()> {
    let names: Vec<String> = files
        .iter()
        .map(|path| root::quote(&path.to_string_lossy()))
        .collect();
    root.script(format!(
        "cd {}; rustfmt --check --edition 2021 --config-path {}/.rustfmt.toml {}",
        root::WORK,
        root::SOURCE,
        names.join(" ")
    ))
    .read(&kernel.source(), root::SOURCE)
    .read(work, root::WORK)
    .run(step)
    .context("rustfmt")
}
