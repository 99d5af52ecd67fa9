// SPDX-License-Identifier: MIT OR Apache-2.0

//! The threads of the virtual processors: run, serve what KVM leaves to user space, pause, stop.
//! A vCPU thread does no device I/O: it moves bytes and wakes others.

use std::io;
use std::os::raw::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hv_proto::hypercall::{HypercallCode, HypercallInput};
use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_msr_entry,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::counters::ExitCounters;
use super::devices::Devices;
use super::power::PowerRequest;
use super::{CrashReport, VmError};
use crate::hypervisor::synic::Synic;
use crate::hypervisor::sys::{self, HypervExit};
use crate::hypervisor::{MessageSink, hypercall};

/// First of the five crash parameter MSRs (`HV_X64_MSR_CRASH_P0` in `hyperv/hvgdk_mini.h`).
const MSR_CRASH_P0: u32 = 0x4000_0100;

/// What a vCPU tells the VM. After all but `Crash` the vCPU waits to be stopped.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asks for a reset.
    Reset,
    /// The guest reported its own crash. It goes on running.
    Crash(CrashReport),
    /// A processor shut down after a fault in its fault handlers.
    TripleFault {
        /// Which processor.
        vp: u32,
    },
    /// KVM or the host failed.
    Error(VmError),
}

/// All that a vCPU thread needs.
pub struct VcpuContext {
    /// Processor number, VP index and APIC id.
    pub vp: u32,
    /// The vCPU.
    pub fd: VcpuFd,
    /// KVM reaches this memory while the vCPU runs, so it must not go away before.
    pub memory: Arc<GuestMemoryMmap>,
    /// Devices on I/O ports.
    pub devices: Arc<Devices>,
    /// The SynIC.
    pub synic: Arc<Synic>,
    /// The VMBus server, if there is one.
    pub sink: Option<Arc<dyn MessageSink>>,
    /// Counts.
    pub exits: Arc<ExitCounters>,
    /// Tells the VM.
    pub events: Box<dyn Fn(VcpuEvent) + Send>,
}

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// The order to all vCPU threads, and how many have followed it.
#[derive(Default)]
struct Gate {
    order: AtomicU8,
    /// vCPUs that wait at the gate or have ended.
    waiting: Mutex<u32>,
    changed: Condvar,
}

impl Gate {
    /// Waits while the order is to pause. `false` means stop.
    fn pass(&self) -> bool {
        if self.order.load(Ordering::Acquire) == RUN {
            return true;
        }
        let mut waiting = lock(&self.waiting);
        *waiting += 1;
        self.changed.notify_all();
        while self.order.load(Ordering::Acquire) == PAUSE {
            waiting = wait(&self.changed, waiting);
        }
        *waiting -= 1;
        self.order.load(Ordering::Acquire) == RUN
    }

    /// Waits to be stopped, whatever else is ordered.
    fn wait_for_stop(&self) {
        let mut waiting = lock(&self.waiting);
        *waiting += 1;
        self.changed.notify_all();
        while self.order.load(Ordering::Acquire) != STOP {
            waiting = wait(&self.changed, waiting);
        }
        *waiting -= 1;
    }

    fn set(&self, order: u8) {
        let _waiting = lock(&self.waiting);
        self.order.store(order, Ordering::Release);
        self.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// The running vCPU threads of one VM. Dropping it stops them.
pub struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; if `paused`, none runs the guest before [`Vcpus::resume`].
    ///
    /// # Errors
    /// [`VmError::System`] when the host has no more threads.
    pub fn start(contexts: Vec<VcpuContext>, paused: bool) -> Result<Vcpus, VmError> {
        extern "C" fn nothing(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}
        // The signal's only purpose is to make KVM_RUN return.
        register_signal_handler(SIGRTMIN(), nothing)
            .map_err(|e| VmError::System("registering a signal handler", e.into()))?;
        let mut vcpus = Vcpus {
            gate: Arc::default(),
            threads: Vec::with_capacity(contexts.len()),
        };
        if paused {
            vcpus.gate.set(PAUSE);
        }
        for context in contexts {
            let gate = vcpus.gate.clone();
            let thread = thread::Builder::new()
                .name(format!("vcpu{}", context.vp))
                .spawn(move || context.run(&gate))
                .map_err(|e| VmError::System("starting a vCPU thread", e))?;
            vcpus.threads.push(thread);
        }
        Ok(vcpus)
    }

    /// Pauses all vCPUs; returns when none runs the guest any more.
    pub fn pause(&self) {
        self.gate.set(PAUSE);
        let all = self.threads.len() as u32;
        let mut waiting = lock(&self.gate.waiting);
        while *waiting < all {
            self.kick();
            waiting = self
                .gate
                .changed
                .wait_timeout(waiting, Duration::from_millis(2))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Lets paused vCPUs run again.
    pub fn resume(&self) {
        self.gate.set(RUN);
    }

    /// Interrupts KVM_RUN on every thread. A signal that comes just before KVM_RUN is lost, so the
    /// caller repeats it until the thread has followed its order.
    fn kick(&self) {
        for thread in &self.threads {
            if !thread.is_finished()
                && let Err(error) = thread.kill(SIGRTMIN())
            {
                tracing::debug!(%error, "signalling a vCPU");
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.gate.set(STOP);
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            self.kick();
            thread::sleep(Duration::from_millis(1));
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

impl VcpuContext {
    fn run(mut self, gate: &Gate) {
        while gate.pass() {
            // A thread that just ended would be waited for at every pause, and the others would go on.
            let event = catch_unwind(AssertUnwindSafe(|| self.run_once()));
            let event = event.unwrap_or_else(|_| {
                let reason = format!("the thread of CPU {} panicked", self.vp);
                Some(VcpuEvent::Error(VmError::Run(reason)))
            });
            if let Some(event) = event {
                let goes_on = matches!(event, VcpuEvent::Crash(_));
                (self.events)(event);
                if !goes_on {
                    gate.wait_for_stop();
                    break;
                }
            }
        }
        if let (Ok(regs), Ok(state)) = (self.fd.get_regs(), self.fd.get_mp_state()) {
            let (rip, rflags) = (regs.rip, regs.rflags);
            tracing::debug!(
                vp = self.vp,
                "stopped at {rip:#x}, flags {rflags:#x}, {state:?}"
            );
        }
    }

    /// Runs the guest until its next exit and serves this. Returns what the VM must know.
    fn run_once(&mut self) -> Option<VcpuEvent> {
        let exits = &self.exits;
        let unexpected = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                return self.devices.write(port, data).map(|request| match request {
                    PowerRequest::PowerOff => VcpuEvent::PowerOff,
                    PowerRequest::Reset => VcpuEvent::Reset,
                });
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.devices.read(port, data);
                return None;
            }
            Ok(VcpuExit::MmioRead(_, data)) => {
                exits.mmio_read.add(1);
                data.fill(0xff);
                return None;
            }
            Ok(VcpuExit::MmioWrite(_, _)) => {
                exits.mmio_write.add(1);
                return None;
            }
            Ok(VcpuExit::Hyperv) => {
                self.hyperv();
                return None;
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                exits.system_event.add(1);
                match kind {
                    KVM_SYSTEM_EVENT_SHUTDOWN => return Some(VcpuEvent::PowerOff),
                    KVM_SYSTEM_EVENT_RESET => return Some(VcpuEvent::Reset),
                    KVM_SYSTEM_EVENT_CRASH => {
                        let report = self.crash_report();
                        return Some(VcpuEvent::Crash(report));
                    }
                    kind => format!("system event {kind}"),
                }
            }
            Ok(VcpuExit::Shutdown) => {
                exits.other.add(1);
                return Some(VcpuEvent::TripleFault { vp: self.vp });
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {
                exits.interrupted.add(1);
                return None;
            }
            Ok(VcpuExit::InternalError) => {
                let (suberror, data) = sys::internal_error(self.fd.get_kvm_run());
                format!("internal error {suberror} of KVM, data {data:#x?}")
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                format!("the processor refused to enter the guest, reason {reason:#x}")
            }
            Ok(other) => format!("{other:?}"),
            Err(error) => {
                let error = io::Error::from(error);
                match error.raw_os_error() {
                    // A signal; or a processor that waits for its start, which a signal woke.
                    Some(libc::EINTR | libc::EAGAIN) => {
                        exits.interrupted.add(1);
                        return None;
                    }
                    _ => format!("KVM_RUN: {error}"),
                }
            }
        };
        exits.other.add(1);
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        Some(VcpuEvent::Error(VmError::Run(format!(
            "CPU {} cannot go on at {rip:#x}: {unexpected}",
            self.vp
        ))))
    }

    fn hyperv(&mut self) {
        match sys::hyperv_exit(self.fd.get_kvm_run()) {
            HypervExit::Synic {
                control,
                siefp,
                simp,
            } => {
                self.exits.synic.add(1);
                self.synic.set_registers(self.vp, control, siefp, simp);
            }
            HypervExit::Hypercall { input, params } => {
                let counter = match HypercallInput::from_raw(input).code() {
                    HypercallCode::POST_MESSAGE => &self.exits.post_message,
                    HypercallCode::SIGNAL_EVENT => &self.exits.unbound_signal,
                    _ => &self.exits.other_hypercall,
                };
                counter.add(1);
                let status = hypercall::dispatch(&self.memory, self.sink.as_deref(), input, params);
                sys::set_hypercall_result(self.fd.get_kvm_run(), status.get().into());
            }
            HypervExit::Other(kind) => {
                // The synthetic debugger, which CPUID does not offer.
                self.exits.other.add(1);
                tracing::debug!(kind, "Hyper-V exit that nobody serves");
            }
        }
    }

    fn crash_report(&self) -> CrashReport {
        let entries: Vec<kvm_msr_entry> = (MSR_CRASH_P0..MSR_CRASH_P0 + 5)
            .map(|index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut parameters = [0; 5];
        if let Ok(mut msrs) = Msrs::from_entries(&entries)
            && self.fd.get_msrs(&mut msrs).is_ok()
        {
            for (parameter, entry) in parameters.iter_mut().zip(msrs.as_slice()) {
                *parameter = entry.data;
            }
        }
        CrashReport {
            vp: self.vp,
            parameters,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_pauses_resumes_and_stops() {
        let gate = Arc::new(Gate::default());
        assert!(gate.pass());
        gate.set(PAUSE);
        let thread = {
            let gate = gate.clone();
            thread::spawn(move || (gate.pass(), gate.pass()))
        };
        let mut waiting = lock(&gate.waiting);
        while *waiting == 0 {
            waiting = wait(&gate.changed, waiting);
        }
        drop(waiting);
        gate.set(STOP);
        assert_eq!(thread.join().unwrap(), (false, false));
        assert_eq!(*lock(&gate.waiting), 0);
    }
}
