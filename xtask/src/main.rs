// SPDX-License-Identifier: MIT OR Apache-2.0

//! `cargo xtask`: set-up, builds, images and runs.
//!
//! It needs a rustup toolchain, a C compiler's linker and git; everything else it gets by itself.
//! It may use any other crate's binaries; nothing may use it.

mod boot;
mod cache;
mod cargo;
mod check;
mod cmd;
mod debian;
mod e2e;
mod guest;
mod host;
mod initramfs;
mod kernel;
mod kmod;
mod l1;
mod panics;
mod qemu;
mod root;
mod rootfs;
mod setup;
mod test;
mod tree;
mod ui;

use std::{
    fmt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::OnceLock,
};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::{cache::Cache, cmd::Interrupted, kernel::KernelSource};

/// Something that the user must provide is not there: exit status 2, like bad usage.
#[derive(Debug)]
pub struct Unmet(pub String);

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unmet {}

/// The directory of the checkout.
pub fn checkout() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// This program's file. It is asked for at the start: while the program runs, cargo may put a new one in its place.
pub fn program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    // Without /proc nothing else works either.
    let find = || std::env::current_exe().unwrap_or_default();
    PROGRAM.get_or_init(find).clone()
}

/// Processors that we may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Set-up, builds, images and runs of Viridian.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Boot the Debian guest from a disk behind StorVSC, to a login shell on its console
    ///
    /// Does all the set-up first. The guest starts from the same disk each time and what it writes is
    /// forgotten, unless --keep names a file for it.
    Boot(boot::BootArgs),
    /// Set up, check formatting and lints, and run all tests
    Test(test::TestArgs),
    /// Get and build everything that `boot` and `test` need
    Setup {
        #[command(flatten)]
        kernel: KernelArgs,
        /// Look for a newer kernel in Debian's archive
        #[arg(long)]
        update: bool,
    },
    /// Build the kernel modules and print the directory that they are in
    Kmod {
        #[command(flatten)]
        kernel: KernelArgs,
    },
    /// Check formatting and lints, of the crates and of the kernel modules
    Check {
        #[command(flatten)]
        kernel: KernelArgs,
    },
    /// Remove everything that was fetched and built outside the checkout
    Clean,
    /// Run one guest here (how the L1 VM is told what to do)
    #[command(hide = true)]
    Guest(guest::GuestArgs),
    /// Run a command in the L1 VM (the runner of test programs)
    #[command(hide = true)]
    L1(boot::L1Args),
}

/// Which kernel the guest runs.
#[derive(Args, Clone, Debug, Default)]
struct KernelArgs {
    /// Use the kernel of the .deb files in this directory (image, modules, headers and source of one version)
    #[arg(long, value_name = "DIR", conflicts_with = "kdir")]
    kernel_package: Option<PathBuf>,
    /// Use a kernel that you built with CONFIG_RUST=y: its build tree
    #[arg(long, value_name = "BUILD_TREE")]
    kdir: Option<PathBuf>,
}

impl KernelArgs {
    fn source(&self) -> KernelSource {
        match (&self.kernel_package, &self.kdir) {
            (Some(directory), _) => KernelSource::Packages(directory.clone()),
            (None, Some(tree)) => KernelSource::Tree(tree.clone()),
            (None, None) => KernelSource::Archive,
        }
    }
}

fn main() -> ExitCode {
    program();
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            if error.downcast_ref::<Interrupted>().is_some() {
                ui::info("interrupted");
                return ExitCode::from(130);
            }
            eprintln!("error: {error:#}");
            let unmet = error.downcast_ref::<Unmet>().is_some();
            ExitCode::from(if unmet { 2 } else { 1 })
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    cmd::catch_signals()?;
    let status = match &cli.verb {
        Verb::Boot(boot) => boot::run(&Cache::open()?, boot)?,
        Verb::Guest(guest) => guest::run(guest)?,
        Verb::L1(arguments) => boot::run_l1(arguments)?,
        Verb::Test(test) => {
            test::run(&Cache::open()?, test)?;
            0
        }
        Verb::Setup { kernel, update } => {
            let ready = setup::run(&Cache::open()?, &kernel.source(), *update)?;
            ready.kvm.announce();
            ui::info(&format!("ready, with Linux {}", ready.kernel.release));
            0
        }
        Verb::Kmod { kernel } => {
            let modules = setup::modules(&Cache::open()?, &kernel.source())?;
            println!("{}", modules.display());
            0
        }
        Verb::Check { kernel } => {
            check::run(&Cache::open()?, &kernel.source())?;
            0
        }
        Verb::Clean => {
            cache::clean()?;
            0
        }
    };
    Ok(ExitCode::from(status))
}
