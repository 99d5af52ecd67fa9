// SPDX-License-Identifier: MIT OR Apache-2.0

//! User-mode networking without privileges: the program `passt`, which gives the guest DHCP, names
//! and outgoing connections. It is started here and ends with its socket, which carries frames as
//! QEMU's stream sockets do: each behind its length, 32 bits in network order. See passt(1).

use std::io::{self, BufRead, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use super::frame::{Checksum, Frame, MAX_FRAME};
use super::segment::for_each_wire_frame;
use super::vnet::{wait_readable, wait_writable};
use super::{Backend, NetError, ReceiveOffloads, Received, Sent};

/// Size of the length before each frame.
const LENGTH: usize = 4;

/// How long it may take to start; it takes some hundredths of a second on a quick machine.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How passt is started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PasstOptions {
    /// The program; `passt` in the path without it.
    pub program: Option<PathBuf>,
    /// TCP ports to forward to the guest, as passt's `--tcp-ports` has them.
    pub tcp_ports: Option<String>,
    /// UDP ports to forward to the guest.
    pub udp_ports: Option<String>,
}

/// A running passt.
pub struct Passt {
    program: Child,
    socket: OwnedFd,
    sender: Mutex<Sender>,
    receiver: Mutex<Receiver>,
}

/// What could not be sent yet of frames that were begun.
#[derive(Default)]
struct Sender {
    rest: Vec<u8>,
}

/// What came and is not taken yet.
struct Receiver {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that can panic leaves these in a state that is wrong.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Passt {
    /// Starts it, for a NIC of this MTU, and waits until it works.
    ///
    /// # Errors
    /// It is not installed, or ends at once; says what to do.
    pub fn start(options: &PasstOptions, mtu: u16) -> Result<Self, NetError> {
        let system = |error: io::Error| NetError::Passt(error.to_string());
        let (here, there) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| system(error.into()))?;
        rustix::io::ioctl_fionbio(&here, true).map_err(|error| system(error.into()))?;
        let (mut ready, readiness) = io::pipe().map_err(system)?;
        // passt opens the pipe by its name, when it has become another user already.
        rustix::fs::fchmod(&readiness, Mode::from_raw_mode(0o622))
            .map_err(|error| system(error.into()))?;
        let mut program = Self::spawn(options, mtu, there.as_fd(), readiness.as_fd())?;
        drop((there, readiness));
        let mut started = Ok(false);
        if wait_readable(ready.as_fd(), START_LIMIT).map_err(system)? {
            // It may keep the pipe open, so there need not be an end.
            started = ready.read(&mut [0; 32]).map(|length| length > 0);
        }
        if !started.map_err(system)? {
            // It has ended, or does now.
            let _ = program.kill();
            // If that was a script, passt itself ends with its socket, and what it says with it.
            drop(here);
            let mut text = String::new();
            if let Some(mut stderr) = program.stderr.take() {
                let _ = stderr.read_to_string(&mut text);
            }
            let _ = program.wait();
            let last = text.lines().rfind(|line| is_message(line));
            let reason = last.unwrap_or("it ended at once, without a word");
            return Err(NetError::Passt(reason.trim().to_owned()));
        }
        if let Some(stderr) = program.stderr.take() {
            // Ends with the program.
            std::thread::Builder::new()
                .name("passt-log".into())
                .spawn(move || {
                    for line in io::BufReader::new(stderr).lines().map_while(Result::ok) {
                        if is_message(&line) {
                            tracing::info!("passt: {line}");
                        }
                    }
                })
                .map_err(system)?;
        }
        Ok(Self {
            program,
            socket: here,
            sender: Mutex::default(),
            receiver: Mutex::new(Receiver {
                // Room for many frames at once.
                buffer: vec![0; 4 * (LENGTH + MAX_FRAME)],
                start: 0,
                end: 0,
            }),
        })
    }

    fn spawn(
        options: &PasstOptions,
        mtu: u16,
        socket: BorrowedFd<'_>,
        readiness: BorrowedFd<'_>,
    ) -> Result<Child, NetError> {
        let name = options.program.clone().unwrap_or_else(|| "passt".into());
        let mut command = Command::new(&name);
        command
            .args(["--foreground", "--quiet", "--stderr"])
            .args(["--mtu", &mtu.to_string()])
            .args(["--fd", &socket.as_raw_fd().to_string()])
            // It is written when all is set up, just before the work begins.
            .args(["--pid", &format!("/dev/fd/{}", readiness.as_raw_fd())]);
        for (option, ports) in [
            ("--tcp-ports", &options.tcp_ports),
            ("--udp-ports", &options.udp_ports),
        ] {
            if let Some(ports) = ports {
                command.args([option, ports]);
            }
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let inherited = [socket.as_raw_fd(), readiness.as_raw_fd()];
        // SAFETY: between fork and exec only `fcntl` is called, which is async-signal-safe, on
        // descriptors that are open until the child was made.
        unsafe {
            command.pre_exec(move || {
                for fd in inherited {
                    fcntl_setfd(BorrowedFd::borrow_raw(fd), FdFlags::empty())?;
                }
                Ok(())
            });
        }
        command.spawn().map_err(|error| {
            NetError::Passt(match error.kind() {
                io::ErrorKind::NotFound => format!(
                    "cannot find the program `{}`; install the Debian package passt",
                    name.display()
                ),
                _ => format!("{}: {error}", name.display()),
            })
        })
    }
}

/// Whether a line of passt's is worth showing: where there is no system log, it says so for each
/// line.
fn is_message(line: &str) -> bool {
    let noise = line.trim().is_empty()
        || line.starts_with("Don't run as root")
        || line.starts_with("Failed to send ") && line.ends_with(" to syslog");
    !noise
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It may have ended, which is what is wanted.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

impl Sender {
    /// Writes what is left, waiting at most [`SEND_LIMIT`] if `wait`; whether all is written.
    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let mut done = 0;
        let mut waited = false;
        let result = loop {
            let rest = self.rest.get(done..).unwrap_or_default();
            if rest.is_empty() {
                break Ok(true);
            }
            match send(socket, rest, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    done += count;
                    waited = false;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if !waited => {
                    waited = true;
                    match wait_writable(socket) {
                        Ok(true) => {}
                        Ok(false) => break Ok(false),
                        Err(error) => break Err(error),
                    }
                }
                Err(Errno::AGAIN) => break Ok(false),
                Err(error) => break Err(error.into()),
            }
        };
        self.rest.drain(..done);
        result
    }
}

impl Receiver {
    /// The frame at the start of what has come, if it is all there.
    fn take(&mut self, frame: &mut Vec<u8>) -> io::Result<bool> {
        let bytes = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH>() else {
            return Ok(false);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if length > MAX_FRAME {
            return Err(io::Error::other("passt sent a frame that is too long"));
        }
        let Some(bytes) = rest.get(..length) else {
            return Ok(false);
        };
        frame.clear();
        frame.extend_from_slice(bytes);
        self.start += LENGTH + length;
        Ok(true)
    }

    /// Makes room behind what has come.
    fn make_room(&mut self) -> &mut [u8] {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }
}

impl Backend for Passt {
    fn describe(&self) -> String {
        "passt".into()
    }

    fn queues(&self) -> u16 {
        1
    }

    fn set_receive_offloads(&self, _: ReceiveOffloads) -> io::Result<()> {
        // Plain frames only.
        Ok(())
    }

    fn send(&self, _: u16, frame: &Frame) -> io::Result<Sent> {
        let mut sender = lock(&self.sender);
        if !sender.flush(self.socket.as_fd())? {
            return Ok(Sent::Lost);
        }
        for_each_wire_frame(frame, |bytes| {
            let length = u32::try_from(bytes.len()).unwrap_or(0);
            sender.rest.extend_from_slice(&length.to_be_bytes());
            sender.rest.extend_from_slice(bytes);
            true
        });
        // What is left goes before the next frame.
        sender.flush(self.socket.as_fd())?;
        Ok(Sent::Done)
    }

    fn readiness(&self, _: u16) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn receive(&self, _: u16, frame: &mut Frame) -> io::Result<Received> {
        let mut receiver = lock(&self.receiver);
        frame.checksum = Checksum::Unknown;
        frame.gso = None;
        loop {
            if receiver.take(&mut frame.bytes)? {
                return Ok(Received::Frame);
            }
            let room = receiver.make_room();
            match recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(Received::Closed),
                Ok((count, _)) => receiver.end += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_script_around_a_passt_that_does_not_start_is_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passt");
        // Arguments: ... --fd 7 --pid /dev/fd/8, at the end.
        let script = "#!/bin/bash\nwhile [ \"$1\" != --fd ]; do shift; done; ready=${4##*/}\n\
                      eval \"timeout 30 cat <&$2 $ready>&- &\"; echo 'No luck' >&2\n\
                      eval \"exec $ready>&-\"; wait\n";
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let options = PasstOptions {
            program: Some(path),
            ..PasstOptions::default()
        };
        let begun = Instant::now();
        let error = Passt::start(&options, 1500).err().unwrap().to_string();
        assert_eq!(error, "passt: No luck");
        assert!(begun.elapsed() < Duration::from_secs(15));
    }
}
