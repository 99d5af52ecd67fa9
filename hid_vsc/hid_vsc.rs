// SPDX-License-Identifier: GPL-2.0

//! Mouse and keyboard of Hyper-V guests.
//!
//! * [`mouse`]: a HID device 045E:0621 that the kernel's HID core makes an input device of;
//! * [`keyboard`]: a port for the kernel's driver of PC keyboards;
//! * [`link`]: what both have in common;
//! * [`hid`], [`serio`], [`wakeup`]: abstractions of the kernel's interfaces; `unsafe` code is only
//!   there.
//!
//! The protocols are in `hv_proto::input`. It uses the crates `kernel`, `hv_proto` and `vmbus`;
//! nothing uses it. The file `hid_vsc-<device>/state` of debugfs has counters.
//!
//! C versions of this driver: [`drivers/hid/hid-hyperv.c`](srctree/drivers/hid/hid-hyperv.c),
//! [`drivers/input/serio/hyperv-keyboard.c`](srctree/drivers/input/serio/hyperv-keyboard.c)

mod hid;
mod keyboard;
mod link;
mod mouse;
mod raw;
mod serio;
mod wakeup;

use hv_proto::input::hid::{
    PRODUCT,
    VENDOR, //
};
use kernel::{
    debugfs,
    device::{
        self,
        Core, //
    },
    driver::Registration,
    fmt,
    prelude::*,
    str::CString,
    sync::Arc,
    InPlaceModule,
    ModuleMetadata, //
};
use vmbus::{
    Device,
    DeviceId, //
};

module! {
    type: Module,
    name: "hid_vsc",
    authors: ["The Viridian authors"],
    description: "Hyper-V mouse and keyboard",
    license: "GPL",
}

/// The kinds of devices.
#[derive(Clone, Copy)]
enum Kind {
    Mouse,
    Keyboard,
}

/// A device that the driver is bound to.
enum Binding {
    Mouse(mouse::Binding),
    Keyboard(keyboard::Binding),
}

impl Binding {
    fn shown(&self) -> Shown {
        match self {
            Self::Mouse(binding) => Shown::Mouse(binding.mouse().clone()),
            Self::Keyboard(binding) => Shown::Keyboard(binding.keyboard().clone()),
        }
    }
}

/// What can be shown of a device.
enum Shown {
    Mouse(Arc<mouse::Mouse>),
    Keyboard(Arc<keyboard::Keyboard>),
}

impl Shown {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mouse(mouse) => mouse.show(f),
            Self::Keyboard(keyboard) => keyboard.show(f),
        }
    }
}

/// What belongs to a bound device.
#[pin_data]
struct Data {
    #[pin]
    state: debugfs::File<Shown>,
    binding: Binding,
}

struct InputDriver;

vmbus::device_table!(
    TABLE,
    <InputDriver as vmbus::Driver>::IdInfo,
    [
        (DeviceId::new(hv_proto::guid::MOUSE), Kind::Mouse),
        (DeviceId::new(hv_proto::guid::KEYBOARD), Kind::Keyboard),
    ]
);

impl vmbus::Driver for InputDriver {
    type IdInfo = Kind;
    type Data<'bound> = Data;

    const ID_TABLE: vmbus::IdTable<Self::IdInfo> = &TABLE;

    fn probe<'bound>(
        dev: &'bound Device<Core<'_>>,
        info: &'bound Self::IdInfo,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            let binding = match info {
                Kind::Mouse => Binding::Mouse(mouse::Binding::new(dev)?),
                Kind::Keyboard => Binding::Keyboard(keyboard::Binding::new(dev)?),
            };
            let device: &device::Device<Core<'_>> = dev.as_ref();
            let name = CString::try_from_fmt(fmt!("hid_vsc-{}", device.name()))?;
            let dir = debugfs::Dir::new(&name);
            Ok(try_pin_init!(Data {
                state <- dir.read_callback_file(c"state", binding.shown(), &|shown, f| shown.show(f)),
                binding,
            }))
        })
    }
}

static HID_DEVICES: hid::IdTable = hid::id_table(VENDOR, PRODUCT);

/// The module while it is loaded. The fields are dropped from the first to the last.
#[pin_data]
struct Module {
    #[pin]
    vmbus: Registration<vmbus::Adapter<InputDriver>>,
    #[pin]
    hid: hid::DriverRegistration,
}

impl InPlaceModule for Module {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        let name = <Self as ModuleMetadata>::NAME;
        try_pin_init!(Self {
            hid <- hid::DriverRegistration::new(name, module, &HID_DEVICES),
            vmbus <- Registration::new(name, module),
        })
    }
}
