// SPDX-License-Identifier: MIT OR Apache-2.0

//! Running other programs: logged, ended with us, and stopped when the user interrupts.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::ui::Step;

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on SIGINT, SIGTERM and SIGHUP end the work in an orderly way; a second one ends it at once.
///
/// # Errors
///
/// When the signal handlers cannot be installed.
pub fn catch_signals() -> Result<()> {
    let flag = INTERRUPTED.get_or_init(|| Arc::new(AtomicBool::new(false)));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_conditional_default(signal, Arc::clone(flag))?;
        signal_hook::flag::register(signal, Arc::clone(flag))?;
    }
    Ok(())
}

/// Whether the user asked us to stop, or what runs beside us failed.
pub fn interrupted() -> bool {
    INTERRUPTED
        .get()
        .is_some_and(|flag| flag.load(Ordering::Relaxed))
        || ABANDONED.load(Ordering::Relaxed)
}

/// What ran side by side failed in one place: the rest ends too.
static ABANDONED: AtomicBool = AtomicBool::new(false);

/// Ends what runs side by side when `result` is an error.
///
/// # Errors
///
/// The result's.
pub fn together<T>(result: Result<T>) -> Result<T> {
    if result.is_err() {
        ABANDONED.store(true, Ordering::Relaxed);
    }
    result
}

/// The results of what ran side by side, where one failure interrupts the others.
///
/// # Errors
///
/// The failure.
pub fn both<A, B>(a: Result<A>, b: Result<B>) -> Result<(A, B)> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (Err(error), Err(other)) if error.is::<Interrupted>() => Err(other),
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

/// The error of a run that was interrupted.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// A command that is killed when this process dies, however it dies.
pub fn tied(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Runs a command to its end; what it prints goes to the step's log.
///
/// # Errors
///
/// When it cannot be started, fails, or the user interrupts.
pub fn run_logged(command: &mut Command, step: &mut Step) -> Result<()> {
    let name = name_of(command);
    step.line(&format!("+ {name}"));
    let (reader, writer) = std::io::pipe().context("cannot create a pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    // The command holds the writing ends; without this the reader would never see the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            if sender
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                break;
            }
        }
    });
    loop {
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => step.line(&line),
            Err(RecvTimeoutError::Disconnected) => break,
            // A daemon that the command left behind may still hold the pipe.
            Err(RecvTimeoutError::Timeout) if child.try_wait()?.is_some() => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if interrupted() {
            stop(&mut child);
            bail!(Interrupted);
        }
    }
    let status = child.wait()?;
    if interrupted() {
        bail!(Interrupted);
    }
    if !status.success() {
        bail!("{name}: {}{}", describe(status), step.failure_text());
    }
    Ok(())
}

fn stop(child: &mut Child) {
    // It may be gone already, which is as good.
    let _ = child.kill();
    let _ = child.wait();
}

/// Runs a command and gives what it printed.
///
/// # Errors
///
/// When it cannot be started or fails.
pub fn output(command: &mut Command) -> Result<String> {
    let name = name_of(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        bail!(
            "{name}: {}: {}",
            describe(output.status),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("{name}: output is not UTF-8"))
}

/// The program that a command runs, for messages.
fn name_of(command: &Command) -> String {
    let program = command.get_program().to_string_lossy().into_owned();
    if program == "setpriv"
        && let Some(name) = command.get_args().nth(3)
    {
        return name.to_string_lossy().into_owned();
    }
    program
}

/// An exit status in words.
pub fn describe(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("exit status {code}"),
        None => status.to_string(),
    }
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_counts_more_than_what_it_interrupted() {
        let failure = || Err::<(), _>(anyhow::anyhow!("no space"));
        let interruption =
            || Err::<(), _>(anyhow::Error::from(Interrupted).context("a step failed"));
        for result in [
            both(failure(), interruption()),
            both(interruption(), failure()),
            both(failure(), Ok(())),
            both(Ok(()), failure()),
        ] {
            assert_eq!(result.unwrap_err().to_string(), "no space");
        }
        assert!(
            both(interruption(), interruption())
                .unwrap_err()
                .is::<Interrupted>()
        );
        assert_eq!(both(Ok(1), Ok(2)).unwrap(), (1, 2));
    }
}
