// SPDX-License-Identifier: GPL-2.0

//! The driver of the ACPI device that says that there is a VMBus.

use crate::{
    connection::{
        Connection,
        Queues, //
    },
    cpu::{
        Hotplug,
        HotplugRegistration, //
    },
    exit::{
        self,
        ExitHandlers,
        Interrupts, //
    },
    hypercall, //
};
use kernel::{
    acpi,
    debugfs,
    device::Core,
    platform,
    prelude::*,
    sync::Arc, //
};

kernel::acpi_device_table!(
    ACPI_TABLE,
    <Vmbus as platform::Driver>::IdInfo,
    [
        (acpi::DeviceId::new(c"VMBUS"), ()),
        (acpi::DeviceId::new(c"VMBus"), ())
    ]
);

/// The bus while it is connected. The fields are dropped from the first to the last.
#[pin_data]
pub(crate) struct Vmbus {
    devices: Devices,
    #[pin]
    counters: debugfs::File<Arc<Connection>>,
    #[pin]
    exit: ExitHandlers,
    contact: Contact,
    hotplug: HotplugRegistration,
    interrupts: Interrupts,
    connection: Owner,
}

/// Removes the devices when dropped.
struct Devices(Arc<Connection>);

impl Drop for Devices {
    fn drop(&mut self) {
        self.0.remove_devices();
    }
}

/// Ends the contact with the host when dropped.
struct Contact(Arc<Connection>);

impl Drop for Contact {
    fn drop(&mut self) {
        self.0.unload();
    }
}

/// Owns the connection: when it is dropped, no work is left that uses it.
struct Owner {
    connection: Arc<Connection>,
    queues: Arc<Queues>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        // First: work that is queued meanwhile finds no connection.
        self.connection.forget_cpus();
        self.queues.flush();
    }
}

/// What happens on CPUs that come and go.
struct Cpus;

impl Hotplug for Cpus {
    fn online(cpu: u32) -> Result {
        exit::current().ok_or(ENODEV)?.cpu_online(cpu)
    }

    fn offline(cpu: u32) -> Result {
        exit::current().ok_or(ENODEV)?.cpu_offline(cpu)
    }
}

impl platform::Driver for Vmbus {
    type IdInfo = ();
    type Data<'bound> = Self;
    const ACPI_ID_TABLE: Option<acpi::IdTable<Self::IdInfo>> = Some(&ACPI_TABLE);

    fn probe<'bound>(
        pdev: &'bound platform::Device<Core<'_>>,
        _info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Self, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            let queues = Arc::new(Queues::new()?, GFP_KERNEL)?;
            let parent: &kernel::device::Device = pdev.as_ref();
            let owner = Owner {
                connection: Connection::new(parent.into(), queues.clone())?,
                queues,
            };
            let bus = owner.connection.clone();
            // In this order, which the drop of what is there follows backwards if a step fails.
            Ok(try_pin_init!(Self {
                connection: owner,
                interrupts: Interrupts::new(bus.clone())?,
                hotplug: HotplugRegistration::new::<Cpus>(c"viridian/vmbus:online")?,
                contact: Contact(bus.clone()),
                exit <- ExitHandlers::new(),
                counters <- debugfs::Dir::new(c"vmbus_drv").read_callback_file(
                    c"counters",
                    bus.clone(),
                    &|bus, f| bus.write_counters(f),
                ),
                devices: {
                    let devices = Devices(bus.clone());
                    bus.connect(hypercall::max_version())?;
                    devices
                },
            }))
        })
    }
}
