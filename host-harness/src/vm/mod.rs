// SPDX-License-Identifier: MIT OR Apache-2.0

//! The virtual machine: memory, vCPUs, boot, ACPI, serial ports and power.
//!
//! [`Vm::new`] checks the configuration and makes the machine; the VMBus server is built on its
//! [`memory`](Vm::memory) and [`synic`](Vm::synic) and given back with
//! [`set_message_sink`](Vm::set_message_sink); [`Vm::start`] runs it, and the [`VmHandle`] waits
//! for its end, pauses or stops it.
//!
//! ```no_run
//! use host_harness::vm::serial::SerialBackend;
//! use host_harness::vm::{ExitReason, Vm, VmConfig, VmError};
//!
//! let mut config = VmConfig::new("/boot/vmlinuz");
//! config.initrd = Some("initrd.img".into());
//! config.cmdline = "console=ttyS0".into();
//! config.cpus = 2;
//! config.serial[0] = SerialBackend::Streams {
//!     output: Box::new(std::io::stdout()),
//!     input: None,
//! };
//! let running = Vm::new(config)?.start()?;
//! assert_eq!(running.wait()?, ExitReason::PowerOff);
//! # Ok::<(), VmError>(())
//! ```

pub mod acpi;
pub mod boot;
mod control;
pub mod counters;
pub mod devices;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod power;
pub mod rtc;
pub mod serial;
mod vcpu;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use serde::Serialize;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::boot::Images;
use self::control::{Phase, Shared};
pub use self::control::{RunState, VcpuStatus, VmControl, VmStatus};
use self::counters::{ExitCounters, VmCounters};
use self::devices::Devices;
use self::machine::Machine;
use self::serial::{PORTS, SerialBackend, SerialPort};
use self::vcpu::{VcpuContext, VcpuEvent, Vcpus};
use crate::counters::Counter;
use crate::events::{Event, Events};
use crate::hypervisor::MessageSink;
use crate::hypervisor::synic::Synic;

/// Most virtual processors of a VM.
pub const MAX_CPUS: u32 = 128;

/// Why a VM cannot be made or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// An option has a value that is not possible.
    #[error("{0}")]
    BadOption(String),
    /// A file is missing, damaged or does not fit.
    #[error("{what} {}: {reason}", path.display())]
    Image {
        /// What the file is for.
        what: String,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// This machine has no usable KVM.
    #[error("{0}")]
    NoKvm(String),
    /// Guest memory cannot be mapped.
    #[error("guest memory: {0}")]
    Memory(String),
    /// The boot structures cannot be written.
    #[error("{0}")]
    Boot(String),
    /// The host system refused an operation.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
    /// A vCPU cannot go on.
    #[error("{0}")]
    Run(String),
}

impl VmError {
    /// Exit status of a program that ends with this error: 2 when its user can do something about
    /// it (a bad option, a bad image, no KVM), else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            VmError::BadOption(_) | VmError::Image { .. } | VmError::NoKvm(_) => 2,
            VmError::Memory(_) | VmError::Boot(_) | VmError::System(..) | VmError::Run(_) => 1,
        }
    }
}

/// What a guest wrote into the crash registers: MSRs 0x40000100 to 0x40000104,
/// `HV_X64_MSR_CRASH_P0` and its four successors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CrashReport {
    /// The processor that reported.
    pub vp: u32,
    /// The five parameters. Linux puts there: error, guest id, instruction pointer, RAX, stack
    /// pointer.
    pub parameters: [u64; 5],
}

impl std::fmt::Display for CrashReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CPU {}, parameters", self.vp)?;
        for parameter in self.parameters {
            write!(f, " {parameter:#x}")?;
        }
        Ok(())
    }
}

/// How a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself, and [`VmConfig::reboot`] is off.
    Reset,
    /// [`VmHandle::stop`], or the user at the terminal.
    Stopped,
    /// The guest reported a crash, and [`VmConfig::run_after_crash`] is off.
    Crash(CrashReport),
    /// A processor shut down after a triple fault.
    TripleFault {
        /// Which processor. (Where it was is not known: KVM resets it on AMD processors.)
        vp: u32,
    },
}

impl ExitReason {
    /// Exit status of a program that ran the VM: 3 for a crash of the guest, else 0.
    pub fn exit_status(&self) -> u8 {
        match self {
            ExitReason::PowerOff | ExitReason::Reset | ExitReason::Stopped => 0,
            ExitReason::Crash(_) | ExitReason::TripleFault { .. } => 3,
        }
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitReason::PowerOff => write!(f, "the guest switched itself off"),
            ExitReason::Reset => write!(f, "the guest reset itself"),
            ExitReason::Stopped => write!(f, "the VM was stopped"),
            ExitReason::Crash(report) => write!(f, "the guest crashed ({report})"),
            ExitReason::TripleFault { vp } => {
                write!(f, "the guest crashed (triple fault on CPU {vp})")
            }
        }
    }
}

/// A VM as its user describes it.
#[derive(Debug)]
pub struct VmConfig {
    /// Linux kernel: bzImage or ELF vmlinux.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Number of virtual processors, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// COM1 and COM2.
    pub serial: [SerialBackend; PORTS.len()],
    /// Boot again when the guest resets itself; otherwise this ends the VM.
    pub reboot: bool,
    /// Go on when the guest reports a crash, so that its crash kernel can run; otherwise this ends
    /// the VM.
    pub run_after_crash: bool,
}

impl VmConfig {
    /// One CPU, 512 MiB, no serial ports, reboots.
    pub fn new(kernel: impl Into<PathBuf>) -> VmConfig {
        VmConfig {
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            cpus: 1,
            memory: 512 << 20,
            serial: [SerialBackend::None, SerialBackend::None],
            reboot: true,
            run_after_crash: false,
        }
    }
}

/// A VM that is ready to start.
pub struct Vm {
    kvm: Kvm,
    guest: Guest,
    /// What is in memory, until it runs for the first time.
    loaded: Option<boot::Entry>,
    reboot: bool,
    run_after_crash: bool,
    memory: Arc<GuestMemoryMmap>,
    synic: Arc<Synic>,
    sink: Option<Arc<dyn MessageSink>>,
    devices: Arc<Devices>,
    exits: Arc<ExitCounters>,
    resets: Arc<Counter>,
    eom: EomThread,
    orders: Sender<Order>,
    ordered: Receiver<Order>,
    events: Events,
}

/// What the guest's memory holds when it starts.
struct Guest {
    images: Images,
    cmdline: String,
    cpus: u32,
    memory_size: u64,
    /// Which serial ports there are.
    serial: [bool; PORTS.len()],
}

impl Guest {
    /// Puts the kernel and all it needs at its entry into memory.
    fn load(&mut self, memory: &GuestMemoryMmap) -> Result<boot::Entry, VmError> {
        let rsdp = acpi::write_tables(memory, self.cpus, &self.serial)?;
        boot::load(
            memory,
            self.memory_size,
            &mut self.images,
            &self.cmdline,
            rsdp,
        )
    }
}

/// What was ordered while a machine was reset.
struct OrdersAfterReset {
    /// Whether the new machine begins paused.
    paused: bool,
    /// Those who wait until it does, or runs.
    waiting: Vec<Sender<()>>,
}

/// Takes all orders for a machine that was `paused` before its reset. Events of the old machine
/// mean nothing to the new one; what the operator wants does. `None` if that is to stop.
fn orders_after_reset(ordered: &Receiver<Order>, paused: bool) -> Option<OrdersAfterReset> {
    let mut orders = OrdersAfterReset {
        paused,
        waiting: Vec::new(),
    };
    while let Ok(order) = ordered.try_recv() {
        let (paused, done) = match order {
            Order::Vcpu(_) => continue,
            Order::Stop => return None,
            Order::Pause(done) => (true, done),
            Order::Resume(done) => (false, done),
        };
        orders.paused = paused;
        orders.waiting.push(done);
    }
    Some(orders)
}

/// What the control thread is told.
#[cfg_attr(test, derive(Debug))]
pub(crate) enum Order {
    Vcpu(VcpuEvent),
    Pause(Sender<()>),
    Resume(Sender<()>),
    Stop,
}

impl Vm {
    /// Checks the configuration, opens the images and serial ports, and makes the memory.
    ///
    /// # Errors
    /// Any [`VmError`]; [`VmError::exit_status`] tells those that the user caused.
    pub fn new(config: VmConfig) -> Result<Vm, VmError> {
        if config.cpus == 0 || config.cpus > MAX_CPUS {
            return Err(VmError::BadOption(format!(
                "{} CPUs: must be between 1 and {MAX_CPUS}",
                config.cpus
            )));
        }
        memory::check_size(config.memory)?;
        let images = Images::open(&config.kernel, config.initrd.as_deref())?;
        let memory = Arc::new(memory::map(config.memory)?);
        let mut guest = Guest {
            images,
            cmdline: config.cmdline,
            cpus: config.cpus,
            memory_size: config.memory,
            serial: std::array::from_fn(|port| {
                !matches!(config.serial.get(port), None | Some(SerialBackend::None))
            }),
        };
        // Finds damaged images before anything is asked of KVM or changed on the host.
        let loaded = Some(guest.load(&memory)?);
        let kvm = machine::open_kvm()?;
        let max = kvm.get_max_vcpus();
        if config.cpus as usize > max {
            return Err(VmError::BadOption(format!(
                "{} CPUs: this machine's KVM takes at most {max}",
                config.cpus
            )));
        }
        let synic = Arc::new(Synic::new(memory.clone(), config.cpus));
        let eom = EomThread::start(synic.clone())?;
        let (orders, ordered) = channel();
        let mut serial = [None, None];
        for (port, backend) in serial.iter_mut().zip(config.serial) {
            let orders = orders.clone();
            *port = SerialPort::open(backend, move || {
                // The VM may have ended already.
                let _ = orders.send(Order::Stop);
            })?;
        }
        let exits = Arc::<ExitCounters>::default();
        Ok(Vm {
            kvm,
            guest,
            loaded,
            reboot: config.reboot,
            run_after_crash: config.run_after_crash,
            memory,
            synic,
            sink: None,
            devices: Arc::new(Devices::new(serial, exits.clone())),
            exits,
            resets: Arc::default(),
            eom,
            orders,
            ordered,
            events: Events::default(),
        })
    }

    /// The guest's memory.
    pub fn memory(&self) -> Arc<GuestMemoryMmap> {
        self.memory.clone()
    }

    /// The guest's SynIC.
    pub fn synic(&self) -> Arc<Synic> {
        self.synic.clone()
    }

    /// Sets who gets the guest's messages: the VMBus server. Without it the guest finds no VMBus.
    pub fn set_message_sink(&mut self, sink: Arc<dyn MessageSink>) {
        self.sink = Some(sink);
    }

    /// Sets where to publish what happens to the VM.
    pub fn set_events(&mut self, events: Events) {
        self.events = events;
    }

    /// Starts the guest.
    ///
    /// # Errors
    /// [`VmError::System`] when KVM or the host refuses.
    pub fn start(mut self) -> Result<VmHandle, VmError> {
        let vcpus = self.power_on(false)?;
        let shared = Arc::new(Shared {
            synic: self.synic.clone(),
            devices: self.devices.clone(),
            exits: self.exits.clone(),
            resets: self.resets.clone(),
            phase: Mutex::default(),
            started: Instant::now(),
            memory: self.guest.memory_size,
        });
        let control = VmControl {
            shared: shared.clone(),
            orders: self.orders.clone(),
        };
        let (ended, end) = channel();
        let thread = thread::Builder::new()
            .name("vm".into())
            .spawn(move || {
                let result = self.control(vcpus, &shared);
                shared.phase().state = RunState::Ended;
                let reason = match &result {
                    Ok(reason) => reason.to_string(),
                    Err(error) => error.to_string(),
                };
                self.events.publish(Event::Ended { reason });
                // Serial output is complete before the end is known.
                for port in self.devices.serial().iter().flatten() {
                    port.finish();
                }
                // The handle may be gone: nobody wants to know then.
                let _ = ended.send(result);
            })
            .map_err(|e| VmError::System("starting a thread", e))?;
        Ok(VmHandle {
            control,
            end: Mutex::new(End::Running(end)),
            thread: Some(thread),
        })
    }

    /// Makes a machine, loads the guest and starts its vCPUs, which wait first if it is paused.
    fn power_on(&mut self, paused: bool) -> Result<Vcpus, VmError> {
        let machine = Machine::new(
            &self.kvm,
            &self.memory,
            self.guest.cpus,
            &self.devices,
            &self.eom.event,
        )?;
        let entry = match self.loaded.take() {
            Some(entry) => entry,
            None => self.guest.load(&self.memory)?,
        };
        machine.set_entry(entry)?;
        self.synic.attach(Some(machine.interrupts.clone()));
        let contexts = (0..)
            .zip(machine.vcpus)
            .map(|(vp, fd)| VcpuContext {
                vp,
                fd,
                memory: self.memory.clone(),
                devices: self.devices.clone(),
                synic: self.synic.clone(),
                sink: self.sink.clone(),
                exits: self.exits.clone(),
                events: {
                    let orders = self.orders.clone();
                    Box::new(move |event| {
                        // Nobody listens only when the VM ends, and it stops its vCPUs then.
                        let _ = orders.send(Order::Vcpu(event));
                    })
                },
            })
            .collect();
        Vcpus::start(contexts, paused)
    }

    /// Stops the vCPUs, then the server's channels, then cuts the SynIC off.
    fn power_off(&self, vcpus: Vcpus) {
        drop(vcpus);
        if let Some(sink) = &self.sink {
            sink.reset();
        }
        self.synic.attach(None);
    }

    /// The control thread: runs the VM until its end.
    fn control(&mut self, mut vcpus: Vcpus, shared: &Shared) -> Result<ExitReason, VmError> {
        loop {
            let end = self.wait_for_end(&vcpus, shared);
            self.power_off(vcpus);
            match end {
                Ok(ExitReason::Reset) if self.reboot => {
                    tracing::info!("the guest resets itself");
                    self.resets.add(1);
                    let was_paused = shared.phase().state == RunState::Paused;
                    let Some(orders) = orders_after_reset(&self.ordered, was_paused) else {
                        return Ok(ExitReason::Stopped);
                    };
                    for port in self.devices.serial().iter().flatten() {
                        port.reset()?;
                    }
                    vcpus = self.power_on(orders.paused)?;
                    *shared.phase() = Phase {
                        state: if was_paused {
                            RunState::Paused
                        } else {
                            RunState::Running
                        },
                        ..Phase::default()
                    };
                    self.events.publish(Event::Reset);
                    match orders.paused {
                        true => self.change(shared, RunState::Paused, Event::Paused),
                        false => self.change(shared, RunState::Running, Event::Resumed),
                    }
                    for done in orders.waiting {
                        // The one who asked may not wait for it.
                        let _ = done.send(());
                    }
                }
                end => return end,
            }
        }
    }

    /// Notes a change, if it is one, and tells of it.
    fn change(&self, shared: &Shared, state: RunState, event: Event) {
        let before = std::mem::replace(&mut shared.phase().state, state);
        if before != state {
            self.events.publish(event);
        }
    }

    fn wait_for_end(&self, vcpus: &Vcpus, shared: &Shared) -> Result<ExitReason, VmError> {
        /// A guest that goes on can report as often as it likes; so many are told of.
        const REPORTS: u32 = 8;
        let mut reports = 0;
        loop {
            // `self.orders` is a sender, so receiving cannot fail; if it did, stopping is right.
            let order = self.ordered.recv().unwrap_or(Order::Stop);
            match order {
                Order::Stop => return Ok(ExitReason::Stopped),
                Order::Pause(done) => {
                    vcpus.pause();
                    self.change(shared, RunState::Paused, Event::Paused);
                    // The one who asked may not wait for it.
                    let _ = done.send(());
                }
                Order::Resume(done) => {
                    vcpus.resume();
                    self.change(shared, RunState::Running, Event::Resumed);
                    let _ = done.send(());
                }
                Order::Vcpu(VcpuEvent::PowerOff) => return Ok(ExitReason::PowerOff),
                Order::Vcpu(VcpuEvent::Reset) => return Ok(ExitReason::Reset),
                Order::Vcpu(VcpuEvent::Error(error)) => return Err(error),
                Order::Vcpu(VcpuEvent::TripleFault { vp }) => {
                    return Ok(ExitReason::TripleFault { vp });
                }
                Order::Vcpu(VcpuEvent::Crash(report)) => {
                    shared.phase().crash = Some(report);
                    let CrashReport { vp, parameters } = report;
                    if !self.run_after_crash || reports < REPORTS {
                        self.events.publish(Event::Crashed { vp, parameters });
                    }
                    if !self.run_after_crash {
                        return Ok(ExitReason::Crash(report));
                    }
                    if reports < REPORTS {
                        reports += 1;
                        tracing::warn!("the guest crashed and goes on ({report})");
                    }
                }
            }
        }
    }
}

enum End {
    Running(Receiver<Result<ExitReason, VmError>>),
    /// Reported to the one who waited.
    Taken,
}

/// A running VM. Dropping it stops the VM.
pub struct VmHandle {
    control: VmControl,
    end: Mutex<End>,
    thread: Option<JoinHandle<()>>,
}

impl VmHandle {
    /// Waits for the end of the VM. All serial output is written then, and all devices are stopped.
    ///
    /// # Errors
    /// [`VmError`] when KVM or the host failed.
    pub fn wait(self) -> Result<ExitReason, VmError> {
        loop {
            if let Some(end) = self.wait_timeout(Duration::from_secs(3600)) {
                return end;
            }
        }
    }

    /// Waits for the end of the VM, at most `timeout`; `None` if it still runs. The end is reported
    /// once; afterwards this returns [`ExitReason::Stopped`].
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Result<ExitReason, VmError>> {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let End::Running(receiver) = &*end else {
            return Some(Ok(ExitReason::Stopped));
        };
        let result = match receiver.recv_timeout(timeout) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => {
                Err(VmError::Run("the control thread of the VM panicked".into()))
            }
        };
        *end = End::Taken;
        Some(result)
    }

    /// A hold on the VM for other threads.
    pub fn control(&self) -> &VmControl {
        &self.control
    }

    /// Asks the VM to end at once, as pulling the plug does.
    pub fn stop(&self) {
        self.control.stop();
    }

    /// Pauses all vCPUs and returns when none runs any more. Devices go on with what they have.
    pub fn pause(&self) {
        self.control.pause();
    }

    /// Lets a paused VM run again.
    pub fn resume(&self) {
        self.control.resume();
    }

    /// The counts now.
    pub fn counters(&self) -> VmCounters {
        self.control.counters()
    }
}

impl Drop for VmHandle {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control thread of the VM panicked");
        }
    }
}

/// Fills message slots again when the guest wrote EOM.
struct EomThread {
    event: EventFd,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EomThread {
    fn start(synic: Arc<Synic>) -> Result<EomThread, VmError> {
        let event = EventFd::new(0).map_err(|e| VmError::System("creating an eventfd", e))?;
        let ended = Arc::new(AtomicBool::new(false));
        let thread = {
            let event = event
                .try_clone()
                .map_err(|e| VmError::System("duplicating an eventfd", e))?;
            let ended = ended.clone();
            thread::Builder::new()
                .name("synic-eom".into())
                .spawn(move || {
                    while !ended.load(Ordering::Acquire) {
                        match event.read() {
                            Ok(_) => synic.deliver(),
                            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                            Err(error) => {
                                tracing::error!(%error, "waiting for EOM");
                                return;
                            }
                        }
                    }
                })
                .map_err(|e| VmError::System("starting a thread", e))?
        };
        Ok(EomThread {
            event,
            ended,
            thread: Some(thread),
        })
    }
}

impl Drop for EomThread {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        if self.event.write(1).is_err() {
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the EOM thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_keeps_what_the_operator_ordered() {
        let (orders, ordered) = channel();
        let paused = |was| orders_after_reset(&ordered, was).map(|after| after.paused);
        assert_eq!(paused(false), Some(false));
        assert_eq!(paused(true), Some(true));
        let (done, wait) = channel();
        orders.send(Order::Vcpu(VcpuEvent::Reset)).unwrap();
        orders.send(Order::Pause(done)).unwrap();
        let after = orders_after_reset(&ordered, false).unwrap();
        assert!(after.paused);
        // Only when the new machine is paused.
        assert!(wait.try_recv().is_err());
        after.waiting.iter().for_each(|done| done.send(()).unwrap());
        wait.recv().unwrap();
        orders.send(Order::Pause(channel().0)).unwrap();
        orders.send(Order::Resume(channel().0)).unwrap();
        assert_eq!(paused(true), Some(false));
        orders.send(Order::Stop).unwrap();
        assert_eq!(paused(false), None);
    }
}
