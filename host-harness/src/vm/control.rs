// SPDX-License-Identifier: MIT OR Apache-2.0

//! What can be asked of a running VM, from any thread and by any number of holders.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::counters::{ExitCounters, VmCounters};
use super::devices::Devices;
use super::serial::SerialPort;
use super::{CrashReport, Order};
use crate::counters::Counter;
use crate::hypervisor::synic::Synic;

/// Whether a VM runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// It runs, or is on its way from one reset to the next start.
    #[default]
    Running,
    /// Its processors are stopped by [`VmControl::pause`].
    Paused,
    /// It has ended.
    Ended,
}

/// A VM, for display.
#[derive(Debug, Clone, Serialize)]
pub struct VmStatus {
    /// Whether it runs.
    pub state: RunState,
    /// How long it has been there.
    pub uptime_ms: u64,
    /// Guest memory in bytes.
    pub memory: u64,
    /// How often it was reset.
    pub resets: u64,
    /// The guest's last report of a crash since its last start.
    pub crash: Option<CrashReport>,
    /// The virtual processors.
    pub vcpus: Vec<VcpuStatus>,
}

/// A virtual processor, for display.
#[derive(Debug, Clone, Serialize)]
pub struct VcpuStatus {
    /// Its number: VP index and APIC id.
    pub vp: u32,
    /// Whether the guest uses its synthetic interrupt controller.
    pub synic: bool,
}

#[derive(Default)]
pub(super) struct Phase {
    pub state: RunState,
    pub crash: Option<CrashReport>,
}

/// What is read while the VM runs.
pub(super) struct Shared {
    pub synic: Arc<Synic>,
    pub devices: Arc<Devices>,
    pub exits: Arc<ExitCounters>,
    pub resets: Arc<Counter>,
    pub phase: Mutex<Phase>,
    pub started: Instant,
    pub memory: u64,
}

impl Shared {
    pub fn phase(&self) -> MutexGuard<'_, Phase> {
        // Plain values, so nothing can panic with it held.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A hold on a VM that does not keep it alive.
#[derive(Clone)]
pub struct VmControl {
    pub(super) shared: Arc<Shared>,
    pub(super) orders: Sender<Order>,
}

impl VmControl {
    /// Asks the VM to end at once, as pulling the plug does.
    pub fn stop(&self) {
        // It may have ended already.
        let _ = self.orders.send(Order::Stop);
    }

    /// Pauses all vCPUs and returns when none runs any more. Devices go on with what they have.
    pub fn pause(&self) {
        let (done, wait) = channel();
        if self.orders.send(Order::Pause(done)).is_ok() {
            // An error means that the VM ended: nothing runs then either.
            let _ = wait.recv();
        }
    }

    /// Lets a paused VM run again, and returns when it does.
    pub fn resume(&self) {
        let (done, wait) = channel();
        if self.orders.send(Order::Resume(done)).is_ok() {
            let _ = wait.recv();
        }
    }

    /// The counts now.
    pub fn counters(&self) -> VmCounters {
        let shared = &self.shared;
        let ports = shared.devices.serial().iter().flatten();
        VmCounters {
            exits: shared.exits.snapshot(),
            synic: shared.synic.counters().into(),
            resets: shared.resets.get(),
            serial_dropped: ports.map(SerialPort::dropped).sum(),
        }
    }

    /// What it does now.
    pub fn status(&self) -> VmStatus {
        let shared = &self.shared;
        let (state, crash) = {
            let phase = shared.phase();
            (phase.state, phase.crash)
        };
        let uptime: Duration = shared.started.elapsed();
        VmStatus {
            state,
            uptime_ms: u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX),
            memory: shared.memory,
            resets: shared.resets.get(),
            crash,
            vcpus: (0..)
                .zip(shared.synic.enabled())
                .map(|(vp, synic)| VcpuStatus { vp, synic })
                .collect(),
        }
    }
}

#[cfg(test)]
impl VmControl {
    /// The control of a VM that is not there, and the orders that it gets.
    pub(crate) fn detached() -> (Self, std::sync::mpsc::Receiver<Order>) {
        let memory = Arc::new(super::memory::map(64 << 20).unwrap());
        let exits = Arc::<ExitCounters>::default();
        let (orders, ordered) = channel();
        let control = Self {
            shared: Arc::new(Shared {
                synic: Arc::new(Synic::new(memory, 2)),
                devices: Arc::new(Devices::new([None, None], exits.clone())),
                exits,
                resets: Arc::default(),
                phase: Mutex::default(),
                started: Instant::now(),
                memory: 64 << 20,
            }),
            orders,
        };
        (control, ordered)
    }
}
