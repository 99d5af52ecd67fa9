// SPDX-License-Identifier: MIT OR Apache-2.0

//! The command `host-harness`: runs a virtual machine as its options say. See `--help`.

mod cli;
mod ctl;

use std::env::VarError;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use clap::error::ErrorKind;
use host_harness::host::{Host, HostConfig, HostError};
use host_harness::vm::serial::{PORTS, SerialBackend, SerialOption};
use host_harness::vm::{ExitReason, VmConfig};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command, OnCrash, RunArgs};

/// Exit status for what the user can correct.
const USAGE: u8 = 2;
/// Exit status for a failure of the host.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            if matches!(
                error.kind(),
                ErrorKind::DisplayHelp
                    | ErrorKind::DisplayVersion
                    | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
            ) {
                error.exit();
            }
            report(&cli::one_line(&error));
            return ExitCode::from(USAGE);
        }
    };
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(text) => EnvFilter::try_new(text).map_err(|error| error.to_string()),
        Err(VarError::NotPresent) => Ok(EnvFilter::new("warn")),
        Err(error) => Err(error.to_string()),
    };
    let filter = match filter {
        Ok(filter) => filter,
        Err(error) => {
            report(&format!("{}: {error}", EnvFilter::DEFAULT_ENV));
            return ExitCode::from(USAGE);
        }
    };
    let no_color = std::env::var_os("NO_COLOR");
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal() && no_color.is_none_or(|v| v.is_empty()))
        .with_writer(std::io::stderr)
        .init();
    let result = match cli.command {
        Command::Run(args) => run(args),
        Command::Ctl(args) => ctl::run(&args),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            report(&format!("{error:#}"));
            let host = error.downcast_ref().map(HostError::exit_status);
            let client = error.downcast_ref().map(ctl::exit_status);
            let status = host.or(client).unwrap_or(USAGE);
            ExitCode::from(status)
        }
    }
}

/// Prints the one line that says why the program ends.
fn report(message: &str) {
    let line = message.replace('\n', " ");
    // Without stderr there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "host-harness: {line}");
}

fn run(args: RunArgs) -> anyhow::Result<u8> {
    let mut config = VmConfig::new(&args.kernel);
    config.initrd = args.initrd;
    config.cmdline = args.cmdline;
    config.cpus = args.cpus;
    config.memory = args.memory.0;
    config.serial = serial(args.serial)?;
    config.reboot = !args.no_reboot;
    config.run_after_crash = args.on_crash == OnCrash::Continue;

    let mut host = HostConfig::new(config);
    host.vmbus = (!args.no_vmbus).then_some(args.vmbus_max_version);
    host.monitor_latency = args.vmbus_monitor_latency.map(Duration::from_micros);
    host.trace = args.trace;
    host.storage.scsi_controllers = args.scsi_controllers;
    if let Some(count) = args.scsi_sub_channels {
        host.storage.max_sub_channels = count;
    }
    host.disks = args.disk;
    host.nics = args.net;
    host.pcap = args.pcap;
    host.api = args.api;
    let counters = args
        .counters
        .map(|path| {
            File::create(&path)
                .with_context(|| format!("counters {}", path.display()))
                .map(|file| (file, path))
        })
        .transpose()?;

    // Each channel that a guest opens takes several files, and a process begins with few.
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "raising the number of open files");
    }

    // From here on signals end the VM in order, so that the terminal and the disks are left well.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("catching signals")?;
    let host = Host::start(host)?;
    let caught = Arc::new(AtomicI32::new(0));
    {
        let (vm, caught) = (host.vm().control().clone(), caught.clone());
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in &mut signals {
                    caught.store(signal, Ordering::SeqCst);
                    vm.stop();
                }
            })
            .context("starting a thread")?;
    }

    let end = loop {
        if let Some(end) = host.vm().wait_timeout(Duration::from_secs(3600)) {
            break end;
        }
    };
    let mut done = 0;
    if let Some((file, path)) = counters {
        let counts = serde_json::json!({
            "vm": host.vm().counters(),
            "vmbus": host.server().map(|server| server.status()),
            "controllers": host.storage().controllers(),
            "disks": host.storage().disks(),
            "nics": host.network().nics(),
        });
        // What the guest came to, and complete images, matter more.
        if let Err(error) = serde_json::to_writer_pretty(file, &counts) {
            report(&format!("counters {}: {error}", path.display()));
            done = FAILED;
        }
    }
    if !host.shutdown() {
        report("a device did not stop in time, its images may be incomplete");
        done = FAILED;
    }

    let end = end.map_err(HostError::from)?;
    let status = match end {
        ExitReason::Stopped => match caught.load(Ordering::SeqCst) {
            0 => 0,
            signal => {
                report(&format!("ended by signal {signal}"));
                128u8.saturating_add(u8::try_from(signal).unwrap_or(0))
            }
        },
        ExitReason::Crash(_) | ExitReason::TripleFault { .. } => {
            report(&end.to_string());
            end.exit_status()
        }
        ExitReason::PowerOff | ExitReason::Reset => end.exit_status(),
    };
    Ok(if status == 0 { done } else { status })
}

/// The backends of the serial ports, from the options in their order.
fn serial(options: Vec<SerialOption>) -> anyhow::Result<[SerialBackend; PORTS.len()]> {
    if options.len() > PORTS.len() {
        bail!("--serial may be given {} times", PORTS.len());
    }
    if options
        .iter()
        .filter(|o| **o == SerialOption::Stdio)
        .count()
        > 1
    {
        bail!("--serial stdio may be given only once");
    }
    let mut backends = [SerialBackend::Stdio, SerialBackend::None];
    for (backend, option) in backends.iter_mut().zip(options) {
        *backend = option.into();
    }
    Ok(backends)
}
