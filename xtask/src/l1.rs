// SPDX-License-Identifier: MIT OR Apache-2.0

//! A VM with a software CPU that has AMD's virtualization, so that the kernel in it has a complete KVM.
//!
//! One command runs in it with the machine's files around it: `/` to read only at its own place, an empty
//! `/tmp`, and some folders to read and write. Its standard streams and exit status are passed. The VM ends
//! with the command, with us, or at a time limit.

use std::{
    fs::{self, File},
    io::{IsTerminal, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::{
    cache::Scratch,
    cmd::{self, Interrupted},
    qemu::Qemu,
    root::quote,
};

/// The software CPU, an AMD one with SVM and nested paging.
///
/// Without xsave, avx and pku: their nested CPUID leaves are inconsistent, and a guest's kernel panics at them.
/// Without 5-level paging, which makes every miss of the nested TLB dearer. Family 0x11 has no GART, which
/// kernels look for in 33,000 accesses to PCI configuration space on older ones.
const CPU: &str = "max,family=17,model=3,+svm,+npt,-mpx,-xsave,-avx,-avx2,-pku,-la57";

/// Words for the VM's kernel. It must not check the timer interrupt, for which it waits a fixed number of cycles: on a
/// busy machine an emulated processor gets there first, and the kernel panics.
const CMDLINE: &str = "console=ttyS0 panic=-1 loglevel=1 mitigations=off no_timer_check";

/// What the VM is made of.
pub struct L1 {
    /// The QEMU.
    pub qemu: Qemu,
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// Memory in MiB.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// How long it may run.
    pub timeout: Option<Duration>,
    /// Folders of the machine that can be written inside; they must exist.
    pub writable: Vec<PathBuf>,
    /// Files and folders under the machine's /tmp that must be visible inside.
    pub keep: Vec<PathBuf>,
}

/// The user's terminal in raw mode, until this is dropped.
pub struct RawTerminal(Termios);

impl RawTerminal {
    /// Sets the terminal of standard input to raw mode, if it is one.
    ///
    /// # Errors
    ///
    /// When its modes cannot be set.
    pub fn enter() -> Result<Option<Self>> {
        let input = std::io::stdin();
        if !input.is_terminal() {
            return Ok(None);
        }
        let saved = tcgetattr(&input).context("cannot read the terminal's modes")?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(&input, OptionalActions::Now, &raw).context("cannot set the terminal's modes")?;
        Ok(Some(Self(saved)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done for a terminal that has gone.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// The commands that a user gives to us rather than to the guest, as the harness has them: Ctrl-A x ends the run,
/// Ctrl-A Ctrl-A is one Ctrl-A for the guest.
struct Keys {
    enabled: bool,
    after_escape: bool,
    quit: bool,
}

impl Keys {
    const ESCAPE: u8 = 1;

    fn new(enabled: bool) -> Self {
        Self {
            enabled,
            after_escape: false,
            quit: false,
        }
    }

    /// Takes the commands out of what was typed and gives the rest.
    fn filter(&mut self, typed: &[u8]) -> Vec<u8> {
        if !self.enabled {
            return typed.to_vec();
        }
        let mut rest = Vec::with_capacity(typed.len());
        for byte in typed.iter().copied() {
            if self.after_escape {
                self.after_escape = false;
                match byte {
                    b'x' => self.quit = true,
                    Self::ESCAPE => rest.push(byte),
                    _ => rest.extend([Self::ESCAPE, byte]),
                }
            } else if byte == Self::ESCAPE {
                self.after_escape = true;
            } else {
                rest.push(byte);
            }
        }
        rest
    }
}

/// What to run inside.
pub struct Job {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment, complete.
    pub environment: Vec<(String, String)>,
    /// Working directory.
    pub directory: PathBuf,
    /// Whether our standard input is passed.
    pub input: bool,
    /// Whether our terminal, if that is our standard input, is set to raw mode.
    pub raw: bool,
}

/// The shell script that runs a job.
fn job_script(job: &Job) -> String {
    let mut script = format!(
        "cd {} || exit 125\nexec env -i",
        quote(&job.directory.to_string_lossy())
    );
    for (name, value) in &job.environment {
        script.push_str(&format!(" {}", quote(&format!("{name}={value}"))));
    }
    for word in &job.command {
        script.push_str(&format!(" {}", quote(word)));
    }
    script.push('\n');
    script
}

/// Waits for QEMU's end of a socket.
fn accept(listener: &UnixListener, qemu: &mut Child) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("cannot connect to QEMU"),
        }
        if let Some(status) = qemu.try_wait()? {
            bail!("QEMU ended at once: {}", cmd::describe(status));
        }
        if cmd::interrupted() {
            bail!(Interrupted);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Passes all that comes from a stream on, at once.
fn relay(mut from: UnixStream, mut to: impl Write + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length) = from.read(&mut buffer) {
            if length == 0
                || to
                    .write_all(buffer.get(..length).unwrap_or_default())
                    .is_err()
                || to.flush().is_err()
            {
                break;
            }
        }
    })
}

/// Ends QEMU when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl L1 {
    fn command(&self, control: &Path) -> Command {
        let mut command = self.qemu.command();
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-accel", "tcg,thread=multi"])
            .args(["-cpu", CPU])
            .args(["-smp", &self.cpus.to_string()])
            .args(["-m", &self.memory.to_string()])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            .args(["-append", CMDLINE])
            .args(["-serial", &format!("file:{}/console", comma(control))])
            .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
            .args(["-netdev", "user,id=net"])
            .args(["-device", "virtio-net-pci,netdev=net,romfile="]);
        for (number, name) in ["in", "out", "err"].iter().enumerate() {
            command
                .arg("-chardev")
                .arg(format!("socket,id={name},path={}/{name}", comma(control)))
                .arg("-device")
                .arg(format!("virtserialport,chardev={name},nr={}", number + 1));
        }
        let shares = [
            ("host".to_owned(), Path::new("/"), true),
            ("ctl".to_owned(), control, false),
        ];
        let writable = self
            .writable
            .iter()
            .enumerate()
            .map(|(number, path)| (format!("w{number}"), path.as_path(), false));
        for (tag, path, read_only) in shares.into_iter().chain(writable) {
            command.arg("-fsdev").arg(format!(
                "local,id={tag},path={},security_model=none,multidevs=remap{}",
                comma(path),
                if read_only { ",readonly=on" } else { "" }
            ));
            command
                .arg("-device")
                .arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
        }
        command
    }

    /// Runs a job and gives its exit status.
    ///
    /// # Errors
    ///
    /// When the VM does not start, ends without a status (for example by a kernel panic), or runs too long.
    pub fn run(&self, job: &Job) -> Result<u8> {
        let scratch = Scratch::create("l1")?;
        let control = scratch.path();
        fs::write(control.join("command"), job_script(job))?;
        let lines = |lines: Vec<String>| lines.concat();
        fs::write(
            control.join("writable"),
            lines(
                self.writable
                    .iter()
                    .enumerate()
                    .map(|(number, path)| format!("w{number} {}\n", path.display()))
                    .collect(),
            ),
        )?;
        fs::write(
            control.join("keep"),
            lines(
                self.keep
                    .iter()
                    .filter(|path| is_covered(path))
                    .map(|path| format!("{}\n", path.display()))
                    .collect(),
            ),
        )?;
        if job.input {
            fs::write(control.join("stdin"), "")?;
        }
        let listen =
            |name: &str| UnixListener::bind(control.join(name)).context("cannot create a socket");
        let (input, output, error) = (listen("in")?, listen("out")?, listen("err")?);
        let mut qemu = Process(
            self.command(control)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(control.join("qemu"))?)
                .spawn()
                .context("cannot start QEMU")?,
        );
        let mut input = accept(&input, &mut qemu.0)?;
        let relays = [
            relay(accept(&output, &mut qemu.0)?, std::io::stdout()),
            relay(accept(&error, &mut qemu.0)?, std::io::stderr()),
        ];
        let raw = if job.raw { RawTerminal::enter()? } else { None };
        let quit = Arc::new(AtomicBool::new(false));
        if job.input {
            let mut keys = Keys::new(raw.is_some());
            let quit = Arc::clone(&quit);
            // This thread ends with the process: a read of a terminal cannot be called off.
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                let mut stdin = std::io::stdin();
                while let Ok(length @ 1..) = stdin.read(&mut buffer) {
                    let bytes = keys.filter(buffer.get(..length).unwrap_or_default());
                    if keys.quit {
                        quit.store(true, Ordering::Relaxed);
                    }
                    if input.write_all(&bytes).is_err() {
                        break;
                    }
                }
            });
        }

        let started = Instant::now();
        let status = loop {
            if let Some(status) = qemu.0.try_wait()? {
                break status;
            }
            if cmd::interrupted() {
                bail!(Interrupted);
            }
            if quit.load(Ordering::Relaxed) {
                // As the harness ends when it gets these keys itself.
                return Ok(0);
            }
            if self.timeout.is_some_and(|limit| started.elapsed() > limit) {
                drop(raw);
                bail!(
                    "the L1 VM was stopped: it ran longer than {} s{}",
                    self.timeout.unwrap_or_default().as_secs(),
                    console_tail(control)
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        for relay in relays {
            if relay.join().is_err() {
                bail!("passing on the output of the L1 VM failed");
            }
        }
        drop(raw);
        let text = fs::read_to_string(control.join("status")).unwrap_or_default();
        text.trim().parse().map_err(|_| {
            anyhow::anyhow!(
                "the L1 VM ended without a result (QEMU: {}){}",
                cmd::describe(status),
                console_tail(control)
            )
        })
    }
}

/// Whether a path of the machine is under one that the VM has something else at.
fn is_covered(path: &Path) -> bool {
    ["/tmp", "/run"]
        .iter()
        .any(|place| path.starts_with(place) && path != Path::new(place))
}

/// A path as a value of an option of QEMU or of the harness: a comma is written twice.
pub fn comma(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// What QEMU said and the last lines of the VM's console, for error messages.
fn console_tail(control: &Path) -> String {
    let mut bytes = fs::read(control.join("qemu")).unwrap_or_default();
    bytes.extend(fs::read(control.join("console")).unwrap_or_default());
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let tail = lines
        .get(lines.len().saturating_sub(20)..)
        .unwrap_or_default();
    if tail.is_empty() {
        return String::new();
    }
    format!("; it printed at last:\n    {}", tail.join("\n    "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_taken_out() {
        let mut keys = Keys::new(true);
        assert_eq!(keys.filter(b"a\x01"), b"a");
        assert_eq!(keys.filter(b"\x01b\x01c"), b"\x01b\x01c");
        assert!(!keys.quit);
        keys.filter(b"\x01x");
        assert!(keys.quit);
        assert_eq!(Keys::new(false).filter(b"\x01x"), b"\x01x");
    }

    #[test]
    fn only_what_is_covered_is_kept() {
        for (path, kept) in [
            ("/tmp/a", true),
            ("/run/a/b", true),
            ("/tmp", false),
            ("/tmpfs", false),
            ("/home/tmp", false),
        ] {
            assert_eq!(is_covered(Path::new(path)), kept, "{path}");
        }
    }

    #[test]
    fn job_script_keeps_every_byte() {
        let job = Job {
            command: vec![
                "/bin/echo".into(),
                "it's".into(),
                "a b".into(),
                String::new(),
            ],
            environment: vec![("K".into(), "v w".into())],
            directory: "/some where".into(),
            input: false,
            raw: false,
        };
        assert_eq!(
            job_script(&job),
            "cd '/some where' || exit 125\nexec env -i 'K=v w' '/bin/echo' 'it'\\''s' 'a b' ''\n"
        );
    }

    #[test]
    fn job_script_runs() {
        let job = Job {
            command: vec![
                "/bin/sh".into(),
                "-c".into(),
                "echo \"$K:$1\"; exit 7".into(),
                "sh".into(),
                "a  'b".into(),
            ],
            environment: vec![("K".into(), "v\nw".into())],
            directory: "/".into(),
            input: false,
            raw: false,
        };
        let output = Command::new("/bin/sh")
            .args(["-c", &job_script(&job)])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(7));
        assert_eq!(output.stdout, b"v\nw:a  'b\n");
    }
}
