// SPDX-License-Identifier: MIT OR Apache-2.0

//! One guest on the harness, on a machine (or in an L1 VM) whose KVM is usable.

use std::{
    fs,
    io::Write,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use guest_agent::{AgentError, Client, Event};

use crate::{
    cache::Scratch,
    cmd::{self, Interrupted},
};

/// How long a guest may take until its agent answers. A software CPU is slow.
const BOOT_LIMIT: Duration = Duration::from_secs(300);

/// How long we wait for the guest before we look whether the user has interrupted.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long a guest may take to power off.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(60);

/// A guest, ready to be started. It is also the command line by which the L1 VM is told.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct GuestArgs {
    /// The harness
    #[arg(long)]
    pub harness: PathBuf,
    /// The kernel
    #[arg(long)]
    pub kernel: PathBuf,
    /// The initramfs
    #[arg(long)]
    pub initramfs: PathBuf,
    /// The kernel's command line
    #[arg(long)]
    pub cmdline: String,
    /// Virtual processors
    #[arg(long)]
    pub cpus: u32,
    /// Memory in MiB
    #[arg(long)]
    pub memory: u64,
    /// Disks, each as the harness takes it
    #[arg(long = "disk")]
    pub disks: Vec<String>,
    /// More options for the harness
    #[arg(long = "option", allow_hyphen_values = true)]
    pub options: Vec<String>,
    /// Runs this command in the guest, instead of giving its console to the user
    #[arg(long, allow_hyphen_values = true)]
    pub run: Option<String>,
    /// The guest's disk is kept: it has to be powered off in an orderly way
    #[arg(long)]
    pub power_off: bool,
}

impl GuestArgs {
    /// The arguments that [`GuestArgs`] is parsed from.
    pub fn to_arguments(&self) -> Vec<String> {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut arguments = vec![
            format!("--harness={}", path(&self.harness)),
            format!("--kernel={}", path(&self.kernel)),
            format!("--initramfs={}", path(&self.initramfs)),
            format!("--cmdline={}", self.cmdline),
            format!("--cpus={}", self.cpus),
            format!("--memory={}", self.memory),
        ];
        arguments.extend(self.disks.iter().map(|disk| format!("--disk={disk}")));
        arguments.extend(
            self.options
                .iter()
                .map(|option| format!("--option={option}")),
        );
        arguments.extend(self.run.iter().map(|command| format!("--run={command}")));
        if self.power_off {
            arguments.push("--power-off".to_owned());
        }
        arguments
    }

    fn harness_command(&self, console: &str, agent: &Path) -> std::process::Command {
        let mut command = cmd::tied(&self.harness);
        command
            .arg("run")
            .arg("--kernel")
            .arg(&self.kernel)
            .arg("--initrd")
            .arg(&self.initramfs)
            .args(["--cmdline", &self.cmdline])
            .args(["--cpus", &self.cpus.to_string()])
            .args(["--memory", &format!("{}M", self.memory)])
            .args(["--serial", console])
            .args(["--serial", &format!("socket:{}", agent.display())]);
        for disk in &self.disks {
            command.args(["--disk", disk]);
        }
        command.args(&self.options);
        command
    }
}

/// Ends the harness when dropped.
struct Harness(Child);

impl Drop for Harness {
    fn drop(&mut self) {
        // It may have ended, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a guest to its end, or a command in it, and gives the exit status.
///
/// # Errors
///
/// When the harness or the guest fails before there is one.
pub fn run(guest: &GuestArgs) -> Result<u8> {
    let scratch = Scratch::create("guest")?;
    let agent = scratch.path().join("agent");
    match &guest.run {
        None => {
            // The console is the user's.
            let mut harness = Harness(
                guest
                    .harness_command("stdio", &agent)
                    .spawn()
                    .context("cannot start host-harness")?,
            );
            let status = cmd::wait(&mut harness.0, cmd::GRACE)?;
            Ok(status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(1))
        }
        Some(command) => {
            let console = scratch.path().join("console");
            let mut harness = Harness(
                guest
                    .harness_command(&format!("file:{}", console.display()), &agent)
                    .stdin(Stdio::null())
                    .spawn()
                    .context("cannot start host-harness")?,
            );
            run_command(guest, &mut harness.0, &agent, command)
                .map_err(|error| error.context(console_tail(&console)))
        }
    }
}

/// Connects to the agent's socket as soon as the harness listens.
fn connect(harness: &mut Child, path: &Path) -> Result<UnixStream> {
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            return Ok(stream);
        }
        if let Some(status) = harness.try_wait()? {
            bail!("host-harness ended: {}", cmd::describe(status));
        }
        if cmd::interrupted() {
            bail!(Interrupted);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn run_command(guest: &GuestArgs, harness: &mut Child, agent: &Path, command: &str) -> Result<u8> {
    let client = Client::new(connect(harness, agent)?)?;
    wait_ready(&client).context("the guest did not come up")?;
    let mut running = client.spawn(command)?;
    let status = loop {
        // Whoever reads our output may have gone: the command's status still counts.
        let _ = match running.next_event(PATIENCE)? {
            Some(Event::Stdout { text, .. }) => {
                let mut stdout = std::io::stdout();
                stdout
                    .write_all(text.as_bytes())
                    .and_then(|()| stdout.flush())
            }
            Some(Event::Stderr { text, .. }) => std::io::stderr().write_all(text.as_bytes()),
            Some(Event::Exit { status, .. }) => break status,
            Some(Event::Ready) | None => Ok(()),
        };
        if cmd::interrupted() {
            bail!(Interrupted);
        }
    };
    if guest.power_off {
        power_off(&client, harness)?;
    }
    Ok(u8::try_from(status).unwrap_or(1))
}

/// Waits until the agent answers.
fn wait_ready(client: &Client) -> Result<()> {
    let deadline = Instant::now() + BOOT_LIMIT;
    loop {
        match client.wait_ready(PATIENCE) {
            Err(AgentError::NotReady(_)) if Instant::now() < deadline => {}
            Err(AgentError::NotReady(_)) => bail!(AgentError::NotReady(BOOT_LIMIT)),
            other => return Ok(other?),
        }
        if cmd::interrupted() {
            bail!(Interrupted);
        }
    }
}

/// Ends a guest whose disk is kept.
fn power_off(client: &Client, harness: &mut Child) -> Result<()> {
    // The answer may be cut off by the power-off itself.
    let _ = client.spawn("poweroff");
    let deadline = Instant::now() + POWER_OFF_LIMIT;
    while harness.try_wait()?.is_none() {
        if cmd::interrupted() {
            bail!(Interrupted);
        }
        if Instant::now() > deadline {
            bail!("the guest did not power off; its disk may need a check");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The end of the guest's console, for error messages.
fn console_tail(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let tail = lines
        .get(lines.len().saturating_sub(20)..)
        .unwrap_or_default();
    if tail.is_empty() {
        return "the guest printed nothing on its console".to_owned();
    }
    format!(
        "the guest's console ended with:\n    {}\n",
        tail.join("\n    ")
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        guest: GuestArgs,
    }

    #[test]
    fn arguments_make_the_same_guest() {
        let guest = GuestArgs {
            harness: "/h".into(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cmdline: "a=b c".into(),
            cpus: 2,
            memory: 1024,
            disks: vec!["path=/x,snapshot=on".into(), "path=/y".into()],
            options: vec!["--trace=/t".into(), "-v".into()],
            run: Some("--echo 'a b'\n".into()),
            power_off: true,
        };
        let line = ["x".to_owned()].into_iter().chain(guest.to_arguments());
        assert_eq!(Line::parse_from(line).guest, guest);
    }
}
