// SPDX-License-Identifier: GPL-2.0

//! Shutdown of Hyper-V guests: the host asks the guest to power off, to reboot or to hibernate.
//!
//! The host hears that the guest will do so before it begins. Powering off and rebooting are left
//! to the programs `poweroff` and `reboot`, which end everything in order; where these cannot be
//! run, the kernel does it itself. The host's flag of force makes no difference, as in the C driver:
//! a guest that does not end is for the host to stop. Hibernation is left to a rule of udev, which
//! hears of it by a `change` event of the device with `EVENT=hibernate`.
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
    impl_has_work,
    new_work,
    prelude::*,
    sync::{
        aref::ARef,
        Arc, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};
use vmbus::{
    ic,
    Device,
    DeviceId,
    OwnedQueue,
    Show, //
};

/// Tells user space to hibernate.
#[pin_data]
struct Hibernation {
    device: ARef<device::Device>,
    #[pin]
    work: Work<Hibernation>,
}

impl_has_work! {
    impl HasWork<Self> for Hibernation { self.work }
}

impl WorkItem for Hibernation {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        match power::announce_hibernation(&this.device) {
            Ok(()) => dev_info!(this.device, "user space was asked to hibernate\n"),
            Err(e) => dev_err!(this.device, "cannot ask user space to hibernate: {:?}\n", e),
        }
    }
}

/// Does what the host asks for.
struct Power {
    device: ARef<device::Device>,
    hibernation: Arc<Hibernation>,
    /// Where `hibernation` runs. Dropping it waits for that.
    queue: OwnedQueue,
}

impl Power {
    fn new(device: &device::Device) -> Result<Self> {
        Ok(Self {
            device: device.into(),
            hibernation: Arc::pin_init(
                pin_init!(Hibernation {
                    device: device.into(),
                    work <- new_work!("shutdown"),
                }),
                GFP_KERNEL,
            )?,
            queue: OwnedQueue::ordered(c"shutdown")?,
        })
    }
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
                    Action::Hibernate => {
                        // If it is queued already, once is enough.
                        let _ = self.queue.enqueue(self.hibernation.clone());
                    }
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
            let service = Shutdown::new(power::can_hibernate());
            let bound: &device::Device<Core<'_>> = dev.as_ref();
            ic::Binding::new(dev, service, Power::new(bound)?)
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
