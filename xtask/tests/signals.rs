// SPDX-License-Identifier: MIT OR Apache-2.0

//! A signal to the one process of `xtask` ends its guest too. A shell script is in the harness's place.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use guest_agent::{Event, Request};
use rustix::process::{Pid, Signal, kill_process};

/// Less than any limit of a guest's.
const SOON: Duration = Duration::from_secs(30);

/// A folder for one guest.
struct Folder(PathBuf);

impl Folder {
    /// Starts a guest; `script` is what its harness does.
    fn guest(name: &str, script: &str, options: &[&str]) -> (Self, Child) {
        let path = std::env::temp_dir().join(format!("xtask-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder");
        // The harness's first argument is `run`: for a shell, a script.
        fs::write(path.join("run"), script).expect("a script");
        let child = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["guest", "--harness=/bin/sh", "--kernel=k"])
            .args(["--initramfs=i", "--cmdline=c", "--cpus=1", "--memory=64"])
            .args(options)
            .current_dir(&path)
            .env("TMPDIR", &path)
            .stdin(Stdio::null())
            .spawn()
            .expect("xtask");
        (Self(path), child)
    }

    fn wait_for(&self, name: &str) {
        let started = Instant::now();
        while !self.0.join(name).exists() {
            assert!(started.elapsed() < SOON, "no {name}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Takes the harness's place at the socket of the agent, and waits until it is asked for.
    fn agent(&self, xtask: &Child) -> UnixStream {
        let scratch = format!("viridian-guest-{}", xtask.id());
        self.wait_for(&scratch);
        let listener = UnixListener::bind(self.0.join(scratch).join("agent")).expect("a socket");
        listener.accept().expect("a connection").0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Sends SIGTERM to xtask alone, and gives its exit status.
fn terminate(xtask: &mut Child) -> Option<i32> {
    kill_process(Pid::from_child(xtask), Signal::TERM).expect("a process");
    let told = Instant::now();
    loop {
        if let Some(status) = xtask.try_wait().expect("a child") {
            return status.code();
        }
        if told.elapsed() > SOON {
            xtask.kill().expect("a process");
            panic!("it goes on");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_harness_of_a_console_ends_in_order() {
    let (folder, mut xtask) = Folder::guest(
        "console",
        "trap ': > tidied; exit 143' TERM; : > ready; while :; do sleep 0.1; done",
        &[],
    );
    folder.wait_for("ready");
    assert_eq!(terminate(&mut xtask), Some(130));
    assert!(folder.0.join("tidied").exists());
}

#[test]
fn a_guest_that_does_not_come_up_is_not_waited_for() {
    let (folder, mut xtask) = Folder::guest("silent", "exec sleep 300", &["--run=true"]);
    let _silent = folder.agent(&xtask);
    assert_eq!(terminate(&mut xtask), Some(130));
}

#[test]
fn a_command_that_does_not_end_is_not_waited_for() {
    let (folder, mut xtask) = Folder::guest("endless", "exec sleep 300", &["--run=sleep 300"]);
    let stream = folder.agent(&xtask);
    let mut requests = BufReader::new(stream.try_clone().expect("clone")).lines();
    let answer = |event: &Event| {
        let line = serde_json::to_string(event).expect("JSON");
        writeln!(&stream, "{line}").expect("write");
    };
    loop {
        let line = requests.next().expect("a request").expect("read");
        match serde_json::from_str(&line).expect("a request") {
            Request::Hello => answer(&Event::Ready),
            Request::Run { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(terminate(&mut xtask), Some(130));
}
