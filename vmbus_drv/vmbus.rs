// SPDX-License-Identifier: GPL-2.0

//! The VMBus of Hyper-V guests: the bus driver, and the API for drivers of devices on it.
//!
//! The module takes the place of the kernel's own `hv_vmbus`, which must not be active: boot with
//! `initcall_blacklist=hv_acpi_init` where that is built in. It connects to the host when it finds
//! the ACPI device `VMBUS`, makes a device for each offer of the host, and takes it away when the
//! host does.
//!
//! # For drivers
//!
//! A driver implements [`Driver`] and declares itself with [`module_vmbus_driver!`]. Its
//! probe gets a [`Device`] and opens the device's [`Channel`] with a [`Handler`]; the
//! [`OpenChannel`] that it keeps closes the channel when it is dropped. Packets are those of
//! [`hv_proto::packet`].
//!
//! # How it is made
//!
//! Everything about the protocol that can be said without a kernel is in [`hv_proto`]. Here, the
//! files that wrap a facility of the kernel for which there is no safe Rust yet are the only ones
//! with `unsafe`: `bus`, `cpu`, `device`, `driver`, `exit`, `hypercall`, `log`, `memory`, `noio`,
//! `queue`, `rcu`, `sysfs`, `wait`. The other ones are logic: `attributes`, `channel`, `connection`,
//! `ic`, `platform`, `request`, `slots`, `stats`, `synic`.
//!
//! What the host writes is copied once, checked, and then used. No number of it reaches an
//! index or an arithmetic operation that could panic, no wait for it is without end, and no
//! amount of its messages takes more than a bounded amount of memory.
//!
//! C version: `drivers/hv` in the kernel.

mod attributes;
mod bus;
mod channel;
mod connection;
mod cpu;
mod device;
mod driver;
mod exit;
mod hypercall;
pub mod ic;
mod log;
mod memory;
mod noio;
mod platform;
mod queue;
mod raw;
mod rcu;
mod request;
mod slots;
mod stats;
mod synic;
mod sysfs;
mod wait;

pub use self::{
    bus::RawDriver,
    channel::{
        Channel,
        Gpadl,
        Handler,
        OpenChannel,
        OpenParams,
        ReadMode,
        SubchannelHandler,
        SubchannelRegistration, //
    },
    device::Device,
    driver::{
        Adapter,
        DeviceId,
        Driver,
        IdTable, //
    },
    log::{
        may_log,
        may_tell,
        Show, //
    },
    memory::SharedBuffer,
    noio::NoIo,
    queue::OwnedQueue,
    rcu::RcuArc,
    slots::RequestSlots,
    stats::{
        Counter,
        Stats, //
    },
    wait::Event,
};
pub use hv_proto::packet::PageRange as GpaRange;

use kernel::{
    driver::Registration,
    platform::Adapter as PlatformAdapter,
    prelude::*,
    InPlaceModule,
    ModuleMetadata, //
};

module! {
    type: Module,
    name: "vmbus_drv",
    authors: ["The Viridian authors"],
    description: "VMBus of Hyper-V guests",
    license: "GPL",
}

/// The module while it is loaded. The fields are dropped from the first to the last.
#[pin_data]
struct Module {
    #[pin]
    platform: Registration<PlatformAdapter<platform::Vmbus>>,
    bus: bus::Registration,
}

/// Whether there can be a bus here at all.
fn check_environment() -> Result {
    if !hypercall::is_present() {
        pr_info!("not a guest of Hyper-V\n");
        return Err(ENODEV);
    }
    if hypercall::is_root_partition() {
        pr_info!("the root partition has no VMBus\n");
        return Err(ENODEV);
    }
    if hypercall::is_isolated() {
        pr_err!("confidential VMs are not supported\n");
        return Err(EOPNOTSUPP);
    }
    if hypercall::c_driver_is_active() {
        pr_err!(
            "the kernel's own VMBus driver is active; boot with initcall_blacklist=hv_acpi_init\n"
        );
        return Err(EBUSY);
    }
    Ok(())
}

impl InPlaceModule for Module {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            check_environment()?;
            Ok(try_pin_init!(Self {
                bus: bus::Registration::new()?,
                platform <- Registration::new(<Self as ModuleMetadata>::NAME, module),
                _: {
                    if exit::current().is_none() {
                        // The device is not there, or its probe has said why it failed.
                        return Err(ENODEV);
                    }
                },
            }))
        })
    }
}
