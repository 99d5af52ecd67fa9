// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest under test: the harness that runs it and the agent in it, in this process.

use std::fmt;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guest_agent::{Client, Output, Running};
use host_harness::disk::DiskOptions;
use host_harness::host::{Host, HostConfig};
use host_harness::net::NetOptions;
use host_harness::vm::serial::SerialBackend;
use host_harness::vm::{ExitReason, VmConfig};
use host_harness::vsp::netvsp::NicStatus;
use host_harness::vsp::services::ServiceKind;
use hv_proto::version::Version;

use crate::klog;
use crate::manifest::Manifest;

/// No guest takes longer to its agent's greeting, nor to its power-off. Generous: the processor may be emulated.
const BOOT: Duration = Duration::from_secs(600);

/// No command of a test takes longer, unless the test says so.
pub const COMMAND: Duration = Duration::from_secs(300);

/// Words that save a third of the time that an emulated processor takes to the first process: nothing here is about
/// side channels, self-tests of ciphers or the keys of modules.
const QUICK: &str =
    "mitigations=off cryptomgr.notests initcall_blacklist=load_system_certificate_list";

/// The controller of the disk with Debian's tools.
const TOOLS_CONTROLLER: u8 = 3;

/// Where Debian's tools are mounted.
const TOOLS: &str = "/debian";

/// Which drivers the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drivers {
    /// The kernel's own, in C: `hv_vmbus` (built in) and `hv_storvsc`.
    C,
    /// Ours: `vmbus_drv` and `storvsc`.
    Rust,
}

impl Drivers {
    /// Words for the kernel's command line that load these drivers.
    fn cmdline(self) -> &'static str {
        match self {
            Self::C => "viridian.drivers=c",
            // The built-in C bus driver must not start, or it has the bus.
            Self::Rust => "viridian.drivers=rust initcall_blacklist=hv_acpi_init",
        }
    }

    /// The storage driver's module.
    pub fn storage_module(self) -> &'static str {
        match self {
            Self::C => "hv_storvsc",
            Self::Rust => "storvsc",
        }
    }

    /// The network driver's module.
    pub fn network_module(self) -> &'static str {
        match self {
            Self::C => "hv_netvsc",
            Self::Rust => "netvsc",
        }
    }

    /// The word for the kernel's command line that caps the VMBus version, as the bus driver's parameter.
    fn max_version(self, version: Version) -> String {
        match self {
            Self::C => format!("hv_vmbus.max_version={}", version.raw()),
            Self::Rust => format!("viridian.vmbus=max_version={}", version.raw()),
        }
    }
}

/// Describes a guest; [`GuestBuilder::boot`] starts it.
pub struct GuestBuilder {
    drivers: Drivers,
    cpus: u32,
    memory_mib: u64,
    kernel: Option<PathBuf>,
    disks: Vec<DiskOptions>,
    nics: Vec<NetOptions>,
    host_version: Version,
    monitor_latency: Option<Duration>,
    trace: Option<PathBuf>,
    words: Vec<String>,
    debian: bool,
    tools: bool,
    reboot: bool,
    run_after_crash: bool,
    services: Vec<ServiceKind>,
}

impl GuestBuilder {
    /// Processors; 1 without this, which is quickest where processors are emulated.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Another file with the kernel.
    #[must_use]
    pub fn kernel(mut self, kernel: PathBuf) -> Self {
        self.kernel = Some(kernel);
        self
    }

    /// Add a disk.
    #[must_use]
    pub fn disk(mut self, disk: DiskOptions) -> Self {
        self.disks.push(disk);
        self
    }

    /// Add a NIC.
    #[must_use]
    pub fn nic(mut self, nic: NetOptions) -> Self {
        self.nics.push(nic);
        self
    }

    /// The newest VMBus version that the host speaks.
    #[must_use]
    pub fn host_version(mut self, version: Version) -> Self {
        self.host_version = version;
        self
    }

    /// The newest VMBus version that the guest speaks, by the bus driver's parameter.
    #[must_use]
    pub fn guest_version(mut self, version: Version) -> Self {
        self.words.push(self.drivers.max_version(version));
        self
    }

    /// Let the guest signal through monitor pages, at which the host looks so often.
    #[must_use]
    pub fn monitor_latency(mut self, latency: Duration) -> Self {
        self.monitor_latency = Some(latency);
        self
    }

    /// Write a trace of the bus to this file; see [`host_harness::vmbus::Trace`].
    #[must_use]
    pub fn trace(mut self, file: PathBuf) -> Self {
        self.trace = Some(file);
        self
    }

    /// Add a word to the kernel's command line.
    #[must_use]
    pub fn word(mut self, word: &str) -> Self {
        self.words.push(word.into());
        self
    }

    /// Start Debian from its root disk, which becomes LUN 0 of controller 0, instead of the small user space.
    #[must_use]
    pub fn debian(mut self) -> Self {
        self.debian = true;
        self.memory_mib = 1024;
        self
    }

    /// Stay in the small user space, with Debian's tools beside it for [`Guest::tool`]: its root file system is mounted
    /// from a disk of a controller of its own.
    #[must_use]
    pub fn tools(mut self) -> Self {
        self.tools = true;
        self
    }

    /// Let a reset of the guest start it again.
    #[must_use]
    pub fn reboot(mut self) -> Self {
        self.reboot = true;
        self
    }

    /// Let a guest that crashes go on with whatever it does then.
    #[must_use]
    pub fn run_after_crash(mut self) -> Self {
        self.run_after_crash = true;
        self
    }

    /// Add an integration component or input device to those that every guest has.
    #[must_use]
    pub fn service(mut self, service: ServiceKind) -> Self {
        self.services.push(service);
        self
    }

    /// Start the guest and wait for its agent.
    ///
    /// # Errors
    ///
    /// With the guest's console, when the guest does not come up.
    pub fn boot(self) -> Result<Guest> {
        LazyLock::force(&COMPLAINTS);
        let manifest = Manifest::load()?;
        let (agent_here, agent_there) = UnixStream::pair()?;
        let console = Console::default();
        let mut words = format!(
            "console=ttyS0 quiet loglevel=3 panic=-1 {QUICK} {}",
            self.drivers.cmdline()
        );
        if !self.debian {
            words.push_str(" lsm=");
        }
        let mut disks = self.disks;
        if self.debian {
            words.push_str(" viridian.root=LABEL=viridian-root");
            let mut root = DiskOptions::new(&manifest.rootfs);
            root.snapshot = true;
            disks.push(root);
        }
        if self.tools {
            let mut root = DiskOptions::new(&manifest.rootfs);
            root.snapshot = true;
            root.controller = TOOLS_CONTROLLER;
            disks.push(root);
        }
        for word in &self.words {
            words.push(' ');
            words.push_str(word);
        }
        let mut vm = VmConfig::new(self.kernel.as_ref().unwrap_or(&manifest.kernel));
        vm.initrd = Some(manifest.initramfs.clone());
        vm.cmdline = words;
        vm.cpus = self.cpus;
        vm.memory = self.memory_mib << 20;
        vm.reboot = self.reboot;
        vm.run_after_crash = self.run_after_crash;
        vm.serial = [
            SerialBackend::Streams {
                output: Box::new(console.clone()),
                input: None,
            },
            SerialBackend::Streams {
                output: Box::new(agent_there.try_clone()?),
                input: Some(Box::new(agent_there)),
            },
        ];
        let mut config = HostConfig::new(vm);
        config.vmbus = Some(self.host_version);
        config.monitor_latency = self.monitor_latency;
        config.trace = self.trace;
        config.disks = disks;
        config.nics = self.nics;
        config.services.extend(self.services);
        let host = Host::start(config)?;
        let agent = Client::new(agent_here)?;
        let guest = Guest {
            host,
            agent,
            console,
            drivers: self.drivers,
        };
        if let Err(error) = guest.agent.wait_ready(BOOT) {
            bail!("{error}\n--- console\n{}", guest.console);
        }
        if self.tools {
            guest.mount_tools()?;
        }
        Ok(guest)
    }
}

/// What the host warned of: of all guests of this program, which runs one test at a time.
static COMPLAINTS: LazyLock<Console> = LazyLock::new(|| {
    let complaints = Console::default();
    let writer = complaints.clone();
    // Without it, only the host's words are missing where a test fails.
    _ = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .try_init();
    complaints
});

/// What a guest prints on its console.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl fmt::Display for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(
            &self.0.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }
}

/// A guest that runs.
pub struct Guest {
    host: Host,
    agent: Client,
    console: Console,
    drivers: Drivers,
}

impl Guest {
    /// A guest with these drivers.
    pub fn with(drivers: Drivers) -> GuestBuilder {
        GuestBuilder {
            drivers,
            cpus: 1,
            memory_mib: 512,
            kernel: None,
            disks: Vec::new(),
            nics: Vec::new(),
            host_version: Version::V5_3,
            monitor_latency: None,
            trace: None,
            words: Vec::new(),
            debian: false,
            tools: false,
            reboot: false,
            run_after_crash: false,
            services: Vec::new(),
        }
    }

    /// The host's side.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The host's side, to be changed.
    pub fn host_mut(&mut self) -> &mut Host {
        &mut self.host
    }

    /// The VMBus version in use, as the host knows it.
    pub fn negotiated_version(&self) -> Option<String> {
        self.host
            .server()
            .and_then(|server| server.status().version)
    }

    /// Where the guest's sysfs has a controller, `scsi0` or so.
    ///
    /// # Errors
    ///
    /// When there is no such controller.
    pub fn controller(&self, name: &str) -> Result<String> {
        let controllers = self.host.storage().controllers();
        let found = controllers
            .into_iter()
            .find(|controller| controller.name == name);
        let controller = found.with_context(|| format!("no controller {name}"))?;
        Ok(format!("/sys/bus/vmbus/devices/{}", controller.instance))
    }

    /// What the host knows of a NIC, `net0` or so.
    ///
    /// # Errors
    ///
    /// When there is no such NIC.
    pub fn nic(&self, name: &str) -> Result<NicStatus> {
        let nics = self.host.network().nics();
        let found = nics.into_iter().find(|nic| nic.name == name);
        found.with_context(|| format!("no NIC {name}"))
    }

    /// Load the network driver: it is not there in a guest that had no NIC when it started.
    ///
    /// # Errors
    ///
    /// As [`Guest::sh`].
    pub fn load_network_driver(&self) -> Result<()> {
        self.sh(&format!("modprobe {}", self.drivers.network_module()))?;
        Ok(())
    }

    /// The guest's name of a NIC, `eth0` or so, waited for.
    ///
    /// # Errors
    ///
    /// When the NIC does not appear.
    pub fn interface(&self, nic: &str) -> Result<String> {
        let device = self.nic(nic)?.instance;
        self.wait_for(&format!(
            "ls /sys/bus/vmbus/devices/{device}/net 2>/dev/null | grep ."
        ))
    }

    /// Wait until something holds on the host's side.
    ///
    /// # Errors
    ///
    /// When it did not within [`COMMAND`].
    pub fn until(&self, what: &str, holds: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + COMMAND;
        while !holds() {
            ensure!(
                Instant::now() < deadline,
                "never came true: {what}\n--- log\n{}",
                self.last_words()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Which drivers it runs.
    pub fn drivers(&self) -> Drivers {
        self.drivers
    }

    /// Wait for the agent of a guest that starts again.
    ///
    /// # Errors
    ///
    /// With the guest's console, when it does not come up.
    pub fn wait_for_restart(&self) -> Result<()> {
        self.agent.expect_restart();
        match self.agent.wait_ready(BOOT) {
            Ok(()) => Ok(()),
            Err(error) => bail!("{error}\n--- console\n{}", self.console),
        }
    }

    /// What it printed on its console so far.
    pub fn console(&self) -> String {
        self.console.to_string()
    }

    /// The console, which can still be read when the guest has ended.
    pub fn console_handle(&self) -> Console {
        self.console.clone()
    }

    /// Run a shell command and give its end, whatever its status.
    ///
    /// # Errors
    ///
    /// When it does not end within [`COMMAND`], or the guest ends.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.run_for(command, COMMAND)
    }

    /// As [`Guest::run`], with a time limit of its own.
    ///
    /// # Errors
    ///
    /// As [`Guest::run`].
    pub fn run_for(&self, command: &str, timeout: Duration) -> Result<Output> {
        match self.agent.run(command, timeout) {
            Ok(output) => Ok(output),
            Err(error) => bail!("{error}\n--- log\n{}", self.last_words()),
        }
    }

    /// Run a shell command that must succeed and give its standard output, without the last line's end.
    ///
    /// # Errors
    ///
    /// As [`Guest::run`], and when its status is not 0.
    pub fn sh(&self, command: &str) -> Result<String> {
        self.sh_for(command, COMMAND)
    }

    /// As [`Guest::sh`], with a time limit of its own.
    ///
    /// # Errors
    ///
    /// As [`Guest::sh`].
    pub fn sh_for(&self, command: &str, timeout: Duration) -> Result<String> {
        let output = self.run_for(command, timeout)?;
        ensure!(
            output.status == 0,
            "{command}: {output}\n--- log\n{}",
            self.last_words()
        );
        Ok(output.stdout.trim_end().to_owned())
    }

    fn mount_tools(&self) -> Result<()> {
        let disk = self.disk(TOOLS_CONTROLLER, 0)?;
        self.sh(&format!(
            "set -e; mkdir -p {TOOLS}; mount -t ext4 -o noatime /dev/{disk} {TOOLS}
             for directory in dev proc sys tmp; do mount -o bind /$directory {TOOLS}/$directory; done"
        ))?;
        Ok(())
    }

    /// Run a command that must succeed with Debian's tools; see [`GuestBuilder::tools`].
    ///
    /// # Errors
    ///
    /// As [`Guest::sh`].
    pub fn tool(&self, command: &str) -> Result<String> {
        self.tool_for(command, COMMAND)
    }

    /// As [`Guest::tool`], with a time limit of its own.
    ///
    /// # Errors
    ///
    /// As [`Guest::sh`].
    pub fn tool_for(&self, command: &str, timeout: Duration) -> Result<String> {
        self.sh_for(
            &format!(
                "chroot {TOOLS} /bin/sh -c '{}'",
                command.replace('\'', r"'\''")
            ),
            timeout,
        )
    }

    /// Jump into the kernel that was loaded for kexec with Debian's tools, and wait for the agent and the tools there.
    ///
    /// # Errors
    ///
    /// When it does not come up.
    pub fn kexec(&self) -> Result<()> {
        let boot_id = "cat /proc/sys/kernel/random/boot_id";
        let old = self.sh(boot_id)?;
        let _ends = self.spawn(&format!("chroot {TOOLS} kexec -e"))?;
        let deadline = Instant::now() + BOOT;
        while Instant::now() < deadline {
            self.agent.expect_restart();
            if let Err(error) = self.agent.wait_ready(BOOT) {
                bail!("{error}\n--- console\n{}", self.console);
            }
            // The old kernel may have answered: only another boot is the new one.
            match self.agent.run(boot_id, Duration::from_secs(5)) {
                Ok(output) if output.status == 0 && output.stdout.trim_end() != old => {
                    return self.mount_tools();
                }
                _ => std::thread::sleep(Duration::from_millis(200)),
            }
        }
        bail!(
            "the second kernel did not come up\n--- console\n{}",
            self.console
        )
    }

    /// Start a command that runs beside the test.
    ///
    /// # Errors
    ///
    /// When the guest has ended.
    pub fn spawn(&self, command: &str) -> Result<Running> {
        Ok(self.agent.spawn(command)?)
    }

    /// Repeat a command until it succeeds, and give its output then.
    ///
    /// # Errors
    ///
    /// With its last output, when it did not within [`COMMAND`].
    pub fn wait_for(&self, command: &str) -> Result<String> {
        let deadline = Instant::now() + COMMAND;
        loop {
            let output = self.run(command)?;
            if output.status == 0 {
                return Ok(output.stdout.trim_end().to_owned());
            }
            ensure!(
                Instant::now() < deadline,
                "never came true: {command}: {output}\n--- log\n{}",
                self.last_words()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The block device (`sda`) of a LUN, waited for.
    ///
    /// # Errors
    ///
    /// When it does not appear.
    pub fn disk(&self, controller: u8, lun: u8) -> Result<String> {
        let device = self.controller(&format!("scsi{controller}"))?;
        self.wait_for(&format!(
            "basename $(ls -d {device}/host*/target*/*:0:0:{lun}/block/*)"
        ))
    }

    /// Check that the kernel's log shows no broken kernel and no warning of a driver, but for lines that contain one
    /// of `expected`.
    ///
    /// # Errors
    ///
    /// With the lines.
    pub fn check_log(&self, expected: &[&str]) -> Result<()> {
        let log = self.sh("dmesg -r")?;
        let problems = klog::problems(&log, expected);
        ensure!(
            problems.is_empty(),
            "the kernel's log:\n{}",
            problems.join("\n")
        );
        Ok(())
    }

    /// Switch the guest off from inside, and see that it was a clean end.
    ///
    /// # Errors
    ///
    /// When the guest does not end, or crashes instead.
    pub fn power_off(self) -> Result<()> {
        // The answer races with the end of the guest: the end is what counts.
        _ = self.agent.spawn("sync; poweroff -f");
        self.ends_with(ExitReason::PowerOff)
    }

    /// Wait for the guest's end.
    ///
    /// # Errors
    ///
    /// When it does not come, or for another reason.
    pub fn ends_with(self, reason: ExitReason) -> Result<()> {
        let console = self.console.clone();
        let end = self.end()?;
        ensure!(
            end == reason,
            "the guest's end was {end:?}, not {reason:?}\n--- console\n{console}"
        );
        Ok(())
    }

    /// Wait for the guest's end, whatever it is.
    ///
    /// # Errors
    ///
    /// When it does not come.
    pub fn end(self) -> Result<ExitReason> {
        match self.host.vm().wait_timeout(BOOT) {
            Some(end) => Ok(end?),
            None => bail!("the guest does not end\n--- console\n{}", self.console),
        }
    }

    /// What both sides say at the end of a test that fails.
    fn last_words(&self) -> String {
        // Tasks that wait: the driver may wait for the host, or the host for the driver.
        let guest = self.agent.run(
            "dmesg | tail -n 40
             for task in /proc/[0-9]*; do
                 grep -q '^State:.*D' $task/status 2>/dev/null || continue
                 echo \"--- $(cat $task/comm) waits\"; cat $task/stack
             done",
            Duration::from_secs(60),
        );
        let guest = match guest {
            Ok(output) => output.stdout,
            Err(error) => format!("{error}\n--- console\n{}", self.console),
        };
        let status = self.host.server().map(|server| server.status());
        let channels = status.into_iter().flat_map(|status| status.channels);
        let channels: Vec<_> = channels
            .map(|channel| {
                format!(
                    "{} {}.{}: {}",
                    channel.id, channel.name, channel.subchannel_index, channel.state
                )
            })
            .collect();
        format!(
            "{guest}\n--- channels\n{}\n--- the host's warnings\n{}",
            channels.join("\n"),
            *COMPLAINTS
        )
    }
}
