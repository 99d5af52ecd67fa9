// SPDX-License-Identifier: GPL-2.0

//! Heartbeat of Hyper-V guests: every two seconds the host asks whether the guest is alive.
//!
//! The answer comes from softirq context, so it stops when the kernel does, whatever its programs
//! do. It uses the crates `kernel`, `hv_proto` and `vmbus`; nothing uses it.
//!
//! C version of this driver: [`drivers/hv/hv_util.c`](srctree/drivers/hv/hv_util.c)

use hv_proto::ic::{
    heartbeat::Heartbeat,
    Malformed, //
};
use kernel::{
    device::Core,
    fmt,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};
use vmbus::{
    ic,
    Device,
    DeviceId, //
};

/// What is known of the heartbeats of a device.
struct Heart {
    /// Number of the last one.
    last: Atomic<u64>,
}

impl ic::Actor for Heart {
    type Service = Heartbeat;
    const NAME: &'static str = "heartbeat";
    const TITLE: &'static str = "Heartbeat";

    fn receive(&self, sequence: u64) -> Result<(), Malformed> {
        self.last.store(sequence, Relaxed);
        Ok(())
    }

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "sequence {}", self.last.load(Relaxed))
    }
}

struct HeartbeatDriver;

vmbus::device_table!(
    TABLE,
    <HeartbeatDriver as vmbus::Driver>::IdInfo,
    [(DeviceId::new(hv_proto::guid::HEARTBEAT), ())]
);

impl vmbus::Driver for HeartbeatDriver {
    type IdInfo = ();
    type Data<'bound> = ic::Binding<Heart>;

    const ID_TABLE: vmbus::IdTable<Self::IdInfo> = &TABLE;

    fn probe<'bound>(
        dev: &'bound Device<Core<'_>>,
        _info: &'bound Self::IdInfo,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            let heart = Heart {
                last: Atomic::new(0),
            };
            ic::Binding::new(dev, Heartbeat, heart)
        })
    }
}

vmbus::module_vmbus_driver! {
    type: HeartbeatDriver,
    name: "heartbeat",
    authors: ["The Viridian authors"],
    description: "Hyper-V heartbeat",
    license: "GPL",
}
