// SPDX-License-Identifier: MIT OR Apache-2.0

//! Running other programs: logged, ended with us, and stopped when the user interrupts.

use std::{
    ffi::{OsStr, OsString},
    io::{BufRead, BufReader, Read},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group};
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
    read_lines(reader, sender, |line| line);
    // What runs in namespaces is deaf to a mere request to end.
    let status = follow(&mut child, &lines, Duration::ZERO, None, |line| {
        step.line(&line);
    })?;
    if !status.success() {
        bail!("{name}: {}{}", describe(status), step.failure_text());
    }
    Ok(())
}

/// How long a program may take to end when it is told to.
pub const GRACE: Duration = Duration::from_secs(5);

/// How often we look whether a command has ended, or has to.
const TICK: Duration = Duration::from_millis(100);

/// How long a command that has ended is still read from: a daemon that it left behind may hold the pipe.
const REST: Duration = Duration::from_secs(1);

/// The error of a command that was ended because it took longer than this.
#[derive(Debug)]
pub struct TooLong(Duration);

impl std::fmt::Display for TooLong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "stopped after {} s", self.0.as_secs())
    }
}

impl std::error::Error for TooLong {}

/// Sends what `reader` gives to `sender`, line by line and beside us, until its end.
pub fn read_lines<T: Send + 'static>(
    reader: impl Read + Send + 'static,
    sender: Sender<T>,
    item: impl Fn(String) -> T + Send + 'static,
) {
    std::thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            if sender.send(item(line)).is_err() {
                break;
            }
        }
    });
}

/// Waits for a child's end, with `grace` to end in when the user interrupts.
///
/// # Errors
///
/// When the user interrupts.
pub fn wait(child: &mut Child, grace: Duration) -> Result<ExitStatus> {
    let (_, nothing) = mpsc::channel::<()>();
    follow(child, &nothing, grace, None, drop)
}

/// Takes the lines that a child prints and waits for its end. When the user interrupts, or it takes longer than
/// `limit`, it is told to end, and killed when it has not after `grace`.
///
/// # Errors
///
/// [`Interrupted`], or [`TooLong`].
pub fn follow<T>(
    child: &mut Child,
    lines: &Receiver<T>,
    grace: Duration,
    limit: Option<Duration>,
    take: impl FnMut(T),
) -> Result<ExitStatus> {
    follow_unless(interrupted, child, lines, grace, limit, take)
}

fn follow_unless<T>(
    interrupted: impl Fn() -> bool,
    child: &mut Child,
    lines: &Receiver<T>,
    grace: Duration,
    limit: Option<Duration>,
    mut take: impl FnMut(T),
) -> Result<ExitStatus> {
    let begun = Instant::now();
    let mut quiet_since = begun;
    let status = loop {
        match lines.recv_timeout(TICK) {
            Ok(line) => {
                take(line);
                quiet_since = Instant::now();
            }
            Err(error) => {
                let closed = error == RecvTimeoutError::Disconnected;
                if let Some(status) = child.try_wait()?
                    && (closed || quiet_since.elapsed() > REST)
                {
                    break status;
                }
                if closed {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
        if interrupted() {
            end(child, grace);
            bail!(Interrupted);
        }
        if let Some(limit) = limit
            && begun.elapsed() > limit
        {
            end(child, grace);
            bail!(TooLong(limit));
        }
    };
    if interrupted() {
        bail!(Interrupted);
    }
    Ok(status)
}

/// Tells a child to end, and its process group if it leads one; kills it when it has not after `grace`.
fn end(child: &mut Child, grace: Duration) {
    // It may be gone already, which is as good.
    let pid = Pid::from_child(child);
    let leads = getpgid(Some(pid)) == Ok(pid);
    let send = |signal| {
        let _ = if leads {
            kill_process_group(pid, signal)
        } else {
            kill_process(pid, signal)
        };
    };
    if !grace.is_zero() {
        send(Signal::TERM);
    }
    let told = Instant::now();
    while told.elapsed() < grace && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(5));
    }
    if matches!(child.try_wait(), Ok(None)) {
        send(Signal::KILL);
    }
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
    Command::new(cargo_program())
}

/// Its program.
pub fn cargo_program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;

    use super::*;

    /// A shell that prints a line when it is ready.
    fn shell(script: &str) -> (Child, Receiver<String>) {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let (sender, lines) = mpsc::channel();
        read_lines(child.stdout.take().unwrap(), sender, |line| line);
        (child, lines)
    }

    #[test]
    fn an_interrupted_command_can_tidy_up() {
        let (mut child, lines) =
            shell("trap 'echo tidied; exit 9' TERM; sh -c 'echo ready; exec sleep 300' & wait");
        let mut said = Vec::new();
        let ready = std::cell::Cell::new(false);
        let result = follow_unless(
            || ready.get(),
            &mut child,
            &lines,
            Duration::from_secs(60),
            None,
            |line| {
                ready.set(true);
                said.push(line);
            },
        );
        assert!(result.unwrap_err().is::<Interrupted>());
        assert_eq!(child.try_wait().unwrap().unwrap().code(), Some(9));
        assert_eq!(said, ["ready"]);
        // The end of its pipe shows that its children have gone too.
        assert_eq!(lines.iter().collect::<Vec<_>>(), ["tidied"]);
    }

    #[test]
    fn a_deaf_command_is_killed_at_its_limit() {
        let (mut child, lines) = shell("trap '' TERM; echo ready; while :; do sleep 300; done");
        let limit = Some(Duration::from_millis(500));
        let result = follow(&mut child, &lines, Duration::from_millis(50), limit, drop);
        assert!(result.unwrap_err().is::<TooLong>());
        assert_eq!(child.try_wait().unwrap().unwrap().code(), None);
        assert_eq!(lines.iter().count(), 0);
    }

    #[test]
    fn the_end_counts_and_not_the_end_of_the_output() {
        let (mut child, lines) = shell("echo a; exec >&-; sleep 0.3; exit 3");
        let mut said = Vec::new();
        let status = follow(&mut child, &lines, GRACE, None, |line| said.push(line)).unwrap();
        assert_eq!((status.code(), said), (Some(3), vec!["a".to_owned()]));
        // A daemon holds the pipe.
        let (mut child, lines) = shell("sleep 300 & exit 4");
        let status = follow(&mut child, &lines, GRACE, None, drop).unwrap();
        assert_eq!(status.code(), Some(4));
        let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    }

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
