// SPDX-License-Identifier: MIT OR Apache-2.0

//! The SynIC's [`Interrupts`] on KVM: an irqfd with a `KVM_IRQ_ROUTING_HV_SINT` route for each SINT
//! in use, one more whose resample event tells of EOM while that is armed, and
//! `KVM_HYPERV_EVENTFD` for HvSignalEvent.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use hv_proto::ids::ConnectionId;
use hv_proto::synic::SINT_COUNT;
use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::synic::Interrupts;
use super::{ReferenceTime, sys};

/// Pins of the I/O APIC: their interrupt numbers (GSIs) come first.
const IOAPIC_PINS: u32 = 24;
/// GSI of SINT 0 of processor 0; 16 for each processor.
const FIRST_SINT_GSI: u32 = IOAPIC_PINS;

/// SINTs and connections of one KVM virtual machine.
pub struct KvmInterrupts {
    vm: Arc<VmFd>,
    /// One for each SINT of each processor, made when it is first raised.
    irqfds: Vec<OnceLock<EventFd>>,
    creation: Mutex<()>,
    eom: EventFd,
}

impl KvmInterrupts {
    /// Sets the VM's interrupt routes: the I/O APIC's pins and the SINTs of `cpus` processors.
    /// `eom` is written when a guest that was interrupted may have emptied a message slot. All
    /// vCPUs must exist and have their SynIC enabled: KVM ties SINTs to routes at this moment.
    ///
    /// # Errors
    /// Of KVM.
    pub fn new(vm: Arc<VmFd>, cpus: u32, eom: EventFd) -> io::Result<KvmInterrupts> {
        let sints = cpus * u32::from(SINT_COUNT);
        let mut routes: Vec<_> = (0..IOAPIC_PINS).map(ioapic_route).collect();
        routes.extend((0..sints).map(sint_route));
        let routes = KvmIrqRouting::from_entries(&routes)
            .map_err(|e| io::Error::other(format!("interrupt routes: {e:?}")))?;
        vm.set_gsi_routing(&routes)?;
        Ok(KvmInterrupts {
            vm,
            irqfds: (0..sints).map(|_| OnceLock::new()).collect(),
            creation: Mutex::new(()),
            eom,
        })
    }

    fn irqfd(&self, index: u32) -> io::Result<&EventFd> {
        let slot = self
            .irqfds
            .get(index as usize)
            .ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(fd) = slot.get() {
            return Ok(fd);
        }
        // Two threads may come here for one SINT: the second one waits and finds it made.
        let _creation = self.creation.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fd) = slot.get() {
            return Ok(fd);
        }
        let fd = EventFd::new(0)?;
        self.vm.register_irqfd(&fd, FIRST_SINT_GSI + index)?;
        Ok(slot.get_or_init(|| fd))
    }
}

fn ioapic_route(pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip {
                irqchip: KVM_IRQCHIP_IOAPIC,
                pin,
            },
        },
        ..Default::default()
    }
}

fn sint_route(index: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi: FIRST_SINT_GSI + index,
        type_: KVM_IRQ_ROUTING_HV_SINT,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            hv_sint: kvm_irq_routing_hv_sint {
                vcpu: index / u32::from(SINT_COUNT),
                sint: index % u32::from(SINT_COUNT),
            },
        },
        ..Default::default()
    }
}

/// The number of a SINT among those of all processors.
fn sint_index(vp: u32, sint: u8) -> u32 {
    vp * u32::from(SINT_COUNT) + u32::from(sint)
}

/// The host's time in nanoseconds since 1970.
fn unix_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX))
}

/// An irqfd that is never written, for its resample event.
struct EomIrqfd {
    vm: Arc<VmFd>,
    fd: EventFd,
    gsi: u32,
}

impl Drop for EomIrqfd {
    fn drop(&mut self) {
        if let Err(error) = self.vm.unregister_irqfd(&self.fd, self.gsi) {
            tracing::warn!(%error, "disarming EOM");
        }
    }
}

impl Interrupts for KvmInterrupts {
    fn raise(&self, vp: u32, sint: u8) -> io::Result<()> {
        self.irqfd(sint_index(vp, sint))?.write(1)
    }

    fn arm_eom(&self, vp: u32, sint: u8) -> io::Result<Box<dyn Send>> {
        let gsi = FIRST_SINT_GSI + sint_index(vp, sint);
        let fd = EventFd::new(0)?;
        self.vm.register_irqfd_with_resample(&fd, &self.eom, gsi)?;
        Ok(Box::new(EomIrqfd {
            vm: self.vm.clone(),
            fd,
            gsi,
        }))
    }

    fn bind(&self, connection: ConnectionId, event: &EventFd) -> io::Result<()> {
        sys::bind_connection(&self.vm, connection.get(), event)
    }

    fn time(&self) -> io::Result<ReferenceTime> {
        // KVM's reference counter is its clock (`get_time_ref_counter` in `arch/x86/kvm/hyperv.c`).
        let before = unix_ns();
        let clock = self.vm.get_clock()?;
        let after = unix_ns();
        let unix_ns = if clock.flags & KVM_CLOCK_REALTIME != 0 {
            i64::try_from(clock.realtime).unwrap_or(i64::MAX)
        } else {
            before + after.saturating_sub(before) / 2
        };
        Ok(ReferenceTime {
            counter: clock.clock / 100,
            unix_ns,
        })
    }

    fn unbind(&self, connection: ConnectionId) {
        if let Err(error) = sys::unbind_connection(&self.vm, connection.get()) {
            tracing::warn!(%connection, %error, "unbinding an event failed");
        }
    }
}
