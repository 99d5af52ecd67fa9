// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the virtual machine counts: exits of the vCPUs by reason, and the SynIC's work.

use serde::Serialize;

use crate::counters::Counter;
use crate::hypervisor::synic::SynicCounters;

macro_rules! exit_counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Exits of all vCPUs, by reason, since the VM was made.
        #[derive(Debug, Default)]
        pub struct ExitCounters {
            $($(#[$doc])* pub $name: Counter,)*
        }

        /// The values of [`ExitCounters`] at one moment.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct Exits {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl ExitCounters {
            /// The values now.
            pub fn snapshot(&self) -> Exits {
                Exits { $($name: self.$name.get(),)* }
            }
        }
    };
}

exit_counters! {
    /// Reads of I/O ports of the serial ports.
    serial_read,
    /// Writes of I/O ports of the serial ports.
    serial_write,
    /// Reads of other I/O ports.
    port_read,
    /// Writes of other I/O ports.
    port_write,
    /// Reads of memory that is not there.
    mmio_read,
    /// Writes of memory that is not there.
    mmio_write,
    /// Writes of SynIC registers.
    synic,
    /// HvPostMessage calls.
    post_message,
    /// HvSignalEvent calls that no channel is bound to.
    unbound_signal,
    /// Other hypercalls.
    other_hypercall,
    /// Reports of the hypervisor about the whole VM: reset, crash.
    system_event,
    /// Exits that only a signal of the harness caused.
    interrupted,
    /// Exits for other reasons.
    other,
}

/// All counts of a VM at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VmCounters {
    /// Exits of the vCPUs.
    pub exits: Exits,
    /// The SynIC.
    pub synic: SynicCounts,
    /// How often the VM was reset.
    pub resets: u64,
    /// Bytes of serial output that nobody took in time.
    pub serial_dropped: u64,
}

/// The values of [`SynicCounters`] at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "as the fields of SynicCounters")]
pub struct SynicCounts {
    pub messages_posted: u64,
    pub messages_delivered: u64,
    pub slot_busy: u64,
    pub events_signalled: u64,
    pub events_merged: u64,
    pub interrupts: u64,
}

impl From<&SynicCounters> for SynicCounts {
    fn from(counters: &SynicCounters) -> SynicCounts {
        SynicCounts {
            messages_posted: counters.messages_posted.get(),
            messages_delivered: counters.messages_delivered.get(),
            slot_busy: counters.slot_busy.get(),
            events_signalled: counters.events_signalled.get(),
            events_merged: counters.events_merged.get(),
            interrupts: counters.interrupts.get(),
        }
    }
}
