// SPDX-License-Identifier: GPL-2.0

//! Shutdown of Hyper-V guests: the host asks the guest to power off or to reboot.
//!
//! The host hears that the guest will do so before it begins. Powering off and rebooting are left
//! to the programs `poweroff` and `reboot`, which end everything in order; where these cannot be
//! run, the kernel does it itself. The host's flag of force makes no difference, as in the C driver:
//! a guest that does not end is for the host to stop. To hibernate is refused, as the bus does.
//!
//! `unsafe` is in [`power`] only. It uses the crates `kernel`, `hv_proto` and `vmbus`; nothing uses
//! it.
//!
//! C version of this driver: [`drivers/hv/hv_util.c`](srctree/drivers/hv/hv_util.c)

mod power;
mod raw;

use hv_proto::ic::shutdown::{
    Action,
    Request,
    Shutdown, //
};
use kernel::{
    device::{
        self,
        Core, //
    },
    prelude::*,
    sync::aref::ARef, //
};
use vmbus::{
    ic,
    Device,
    DeviceId,
    Show, //
};

/// Does what the host asks for.
struct Power {
    device: ARef<device::Device>,
}

impl ic::Actor for Power {
    type Service = Shutdown;
    const NAME: &'static str = "shutdown";
    const TITLE: &'static str = "Shutdown";

    fn answered(&self, request: Request) {
        match request {
            Request::Do { action, force } => {
                if vmbus::may_tell() {
                    dev_info!(
                        self.device,
                        "the host asks the guest to {}{}\n",
                        Show(action),
                        if force { ", by force" } else { "" }
                    );
                }
                match action {
                    Action::PowerOff => power::off(),
                    Action::Reboot => power::reboot(),
                    // The service has refused that.
                    Action::Hibernate => {}
                }
            }
            Request::CannotHibernate => {
                if vmbus::may_tell() {
                    dev_info!(self.device, "refused to hibernate: not possible here\n");
                }
            }
            Request::Unknown { flags } => {
                if vmbus::may_tell() {
                    dev_info!(self.device, "refused an unknown request ({:#x})\n", flags);
                }
            }
        }
    }
}

struct ShutdownDriver;

vmbus::device_table!(
    TABLE,
    <ShutdownDriver as vmbus::Driver>::IdInfo,
    [(DeviceId::new(hv_proto::guid::SHUTDOWN), ())]
);

impl vmbus::Driver for ShutdownDriver {
    type IdInfo = ();
    type Data<'bound> = ic::Binding<Power>;

    const ID_TABLE: vmbus::IdTable<Self::IdInfo> = &TABLE;

    fn probe<'bound>(
        dev: &'bound Device<Core<'_>>,
        _info: &'bound Self::IdInfo,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            let bound: &device::Device<Core<'_>> = dev.as_ref();
            let normal: &device::Device = bound;
            let power = Power {
                device: normal.into(),
            };
            // The bus refuses to hibernate.
            ic::Binding::new(dev, Shutdown::new(false), power)
        })
    }
}

vmbus::module_vmbus_driver! {
    type: ShutdownDriver,
    name: "shutdown",
    authors: ["The Viridian authors"],
    description: "Hyper-V shutdown",
    license: "GPL",
}
