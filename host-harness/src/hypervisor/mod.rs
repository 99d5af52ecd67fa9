// SPDX-License-Identifier: MIT OR Apache-2.0

//! The hypervisor interface that a Hyper-V guest expects, on KVM's own Hyper-V support.
//!
//! This file holds the seam between the hypervisor and the VMBus server: the server sends through
//! [`SynicPort`] and receives through [`MessageSink`], and sees nothing else of the virtual
//! machine. So it can be driven in memory by tests. Numbers are those of the Hypervisor Top Level
//! Functional Specification (TLFS), chapter "Inter-Partition Communication".

pub mod cpuid;
pub mod hypercall;
pub mod kvm;
pub mod synic;
pub(crate) mod sys;

use hv_proto::hypercall::HvStatus;
use hv_proto::ids::{ConnectionId, VpIndex};
use vmm_sys_util::eventfd::EventFd;

/// Why the SynIC could not do what the VMBus server asked.
#[derive(Debug, thiserror::Error)]
pub enum SynicError {
    /// There is no virtual processor with this index.
    #[error("no virtual processor {0:?}")]
    NoSuchVp(VpIndex),
    /// The SINT number is not below 16.
    #[error("no SINT {0}")]
    NoSuchSint(u8),
    /// The event flag number is not below 2048.
    #[error("no event flag {0}")]
    NoSuchFlag(u16),
    /// A message payload is longer than 240 bytes.
    #[error("message payload of {0} bytes, at most 240 are possible")]
    PayloadTooLong(usize),
    /// Too many messages wait for a guest that does not take them.
    #[error("message queue of virtual processor {0:?} is full")]
    QueueFull(VpIndex),
    /// The guest has not enabled the SynIC, or its page, on this virtual processor.
    #[error("the SynIC of virtual processor {0:?} is not enabled")]
    NotEnabled(VpIndex),
    /// The connection id is in use already or is not a valid number (24 bits).
    #[error("connection {0:?} cannot be bound")]
    BadConnection(ConnectionId),
    /// The system refused an operation.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The error of the system.
        source: std::io::Error,
    },
}

/// A moment on two clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReferenceTime {
    /// The partition's reference counter, which the guest reads too: 100 ns since it was started.
    pub counter: u64,
    /// The host's time: nanoseconds since 1970.
    pub unix_ns: i64,
}

/// What time it is, for the host and for the guest.
pub trait ReferenceClock: Send + Sync {
    /// Now. `None` while there is no machine, for instance during its reset.
    fn now(&self) -> Option<ReferenceTime>;
}

/// A clock that stands still, for tests.
#[cfg(test)]
pub(crate) struct FixedClock;

#[cfg(test)]
impl FixedClock {
    pub(crate) const TIME: ReferenceTime = ReferenceTime {
        counter: 1234,
        unix_ns: 1_700_000_000_000_000_000,
    };
}

#[cfg(test)]
impl ReferenceClock for FixedClock {
    fn now(&self) -> Option<ReferenceTime> {
        Some(Self::TIME)
    }
}

/// What the VMBus server needs of the guest's SynIC (host to guest, and the binding of signals).
///
/// None of the methods blocks on the guest.
pub trait SynicPort: Send + Sync {
    /// Queues a message for SINT `sint` of virtual processor `vp`. Messages of one (`vp`, `sint`)
    /// arrive in the order of the calls, each as soon as the guest has freed the message slot.
    ///
    /// # Errors
    /// The processor, SINT or payload length is out of range, or the (bounded) queue is full.
    /// A message for a SynIC page that the guest has not enabled waits in the queue.
    fn post_message(
        &self,
        vp: VpIndex,
        sint: u8,
        message_type: u32,
        payload: &[u8],
    ) -> Result<(), SynicError>;

    /// Sets event flag `flag` of SINT `sint` in the SIEFP page of `vp`, and raises the SINT if
    /// the flag was clear.
    ///
    /// # Errors
    /// A number is out of range, or the guest has not enabled that page.
    fn signal_event(&self, vp: VpIndex, sint: u8, flag: u16) -> Result<(), SynicError>;

    /// Makes HvSignalEvent on `connection` (guest to host) write to `event`. KVM does this
    /// without leaving the kernel. Dropping the returned guard unbinds.
    ///
    /// # Errors
    /// The connection id is not valid or already bound, or KVM refuses.
    fn bind_event(
        &self,
        connection: ConnectionId,
        event: EventFd,
    ) -> Result<Box<dyn Send>, SynicError>;
}

/// Where the guest's HvPostMessage calls go. The VMBus server implements it.
pub trait MessageSink: Send + Sync {
    /// Takes a message that the guest posted. `payload` has at most 240 bytes and is a private
    /// copy. The status goes back to the guest as the result of its hypercall.
    ///
    /// This runs on a vCPU thread: it must not block and must not do device I/O.
    fn post_message(&self, connection: ConnectionId, message_type: u32, payload: &[u8])
    -> HvStatus;

    /// The virtual machine is reset: forget everything about the guest. All vCPUs are stopped.
    fn reset(&self);
}
