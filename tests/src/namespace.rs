// SPDX-License-Identifier: MIT OR Apache-2.0

//! A network of a test's own: a network namespace with a bridge, and TAPs on the bridge for guests.
//!
//! Needs root rights, which tests have in the L1 VM. Uses the program `ip` and the kernel's modules tun, bridge and
//! 8021q.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The bridge in a namespace.
pub const BRIDGE: &str = "br0";

/// A network namespace with a bridge. Dropping it takes the name away; the namespace ends when nothing uses it.
pub struct Namespace(String);

/// Moves the thread back when dropped.
struct Inside(File);

impl Drop for Inside {
    fn drop(&mut self) {
        // A thread may always go back to where its process is.
        _ = move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network));
    }
}

impl Namespace {
    /// A namespace with a bridge, which lets frames of `mtu` bytes through.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn new(mtu: u32) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("viridian-{}-{number}", std::process::id());
        check(
            Command::new("ip").args(["netns", "add", &name]),
            "root rights, which there are in the L1 VM, are needed",
        )?;
        let namespace = Self(name);
        namespace.sh(&format!(
            "set -e; for f in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 > $f; done
             ip link set lo up; ip link add {BRIDGE} type bridge mcast_snooping 0
             ip link set {BRIDGE} mtu {mtu} up"
        ))?;
        Ok(namespace)
    }

    /// Add a TAP to the bridge, for a guest.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn tap(&self, name: &str, queues: u16) -> Result<()> {
        let kind = if queues > 1 { "multi_queue" } else { "" };
        self.sh(&format!(
            "set -e; ip tuntap add dev {name} mode tap {kind}
             mtu=$(cat /sys/class/net/{BRIDGE}/mtu); ip link set {name} mtu $mtu master {BRIDGE} up"
        ))?;
        Ok(())
    }

    /// Do something with this thread in the namespace: open TAPs, and start what inherits it.
    ///
    /// # Errors
    ///
    /// When the thread cannot go there, and those of `f`.
    pub fn enter<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let outside = File::open("/proc/thread-self/ns/net")?;
        let inside = File::open(format!("/run/netns/{}", self.0))?;
        move_into_link_name_space(inside.as_fd(), Some(LinkNameSpaceType::Network))
            .context("cannot enter a network namespace")?;
        let _back = Inside(outside);
        f()
    }

    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, "/bin/sh", "-c", script]);
        command.stdin(Stdio::null());
        command
    }

    /// Run a shell command in the namespace that must succeed, and give its standard output without the last line's end.
    ///
    /// # Errors
    ///
    /// When its status is not 0.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = check(&mut self.command(script), script)?;
        Ok(String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .to_owned())
    }

    /// Start a shell command in the namespace that runs beside the test.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn spawn(&self, script: &str) -> Result<Running> {
        let mut command = self.command(script);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().context("cannot start `ip netns exec`")?;
        Ok(Running {
            child: Some(child),
            script: script.to_owned(),
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // What is left ends with the VM.
        _ = Command::new("ip")
            .args(["netns", "delete", &self.0])
            .status();
    }
}

/// A command in a namespace. Dropping it ends it.
pub struct Running {
    child: Option<Child>,
    script: String,
}

impl Running {
    /// Wait for its end, which must be a success, and give its standard output.
    ///
    /// # Errors
    ///
    /// When its status is not 0.
    pub fn wait(mut self) -> Result<String> {
        let child = self.child.take().context("it has ended")?;
        let output = child.wait_with_output()?;
        judge(&output, &self.script)?;
        Ok(String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .to_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have ended, which is what is wanted.
            _ = child.kill();
            _ = child.wait();
        }
    }
}

fn judge(output: &Output, what: &str) -> Result<()> {
    ensure!(
        output.status.success(),
        "{what}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn check(command: &mut Command, what: &str) -> Result<Output> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    judge(&output, what)?;
    Ok(output)
}
