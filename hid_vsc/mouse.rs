// SPDX-License-Identifier: GPL-2.0

//! The mouse: a HID device whose descriptors and reports come from the host.

use crate::{
    hid,
    link::{
        Link,
        PARAMS,
        REQUEST_ID, //
    },
    wakeup::{
        self,
        Wakeup, //
    }, //
};
use hv_proto::{
    input::hid::{
        repair,
        DeviceInfo,
        GuestMouse,
        GuestStep, //
    },
    packet::Packet, //
};
use kernel::{
    device::{
        self,
        Core, //
    },
    fmt,
    new_spinlock_irq,
    prelude::*,
    sync::{
        Arc,
        SpinLockIrq, //
    }, //
};
use vmbus::{
    Channel,
    Device,
    Handler,
    OpenChannel, //
};
use zerocopy::IntoBytes;

/// What the host says that the device is.
struct Description {
    identity: hid::Identity,
    report_descriptor: KVVec<u8>,
}

impl Description {
    /// Any context.
    fn new(info: &DeviceInfo<'_>) -> Result<Self> {
        let mut report_descriptor = KVVec::new();
        report_descriptor.extend_from_slice(info.report_descriptor, GFP_ATOMIC)?;
        repair(&mut report_descriptor);
        Ok(Self {
            identity: hid::Identity {
                vendor: info.vendor,
                product: info.product,
                version: info.version,
            },
            report_descriptor,
        })
    }
}

/// The driver's side of a mouse.
#[pin_data]
pub(crate) struct Mouse {
    #[pin]
    link: Link<Description>,
    #[pin]
    protocol: SpinLockIrq<GuestMouse>,
    /// The HID device, when there is one.
    #[pin]
    hid: SpinLockIrq<Option<Arc<hid::Registration>>>,
}

impl Mouse {
    fn device_info(&self, channel: &Channel, info: &DeviceInfo<'_>) -> Result<Description> {
        let description = Description::new(info)?;
        channel.send(GuestMouse::ack().as_bytes(), REQUEST_ID, true)?;
        Ok(description)
    }

    fn report(&self, report: &[u8]) {
        let hid = self.hid.lock().clone();
        // Before there is a device, the user's doings are of no interest.
        if let Some(hid) = hid {
            match hid.report(report) {
                Ok(()) => self.link.received.count(),
                Err(_) => self.link.reject("not a report of this device"),
            }
            wakeup::wake(self.link.device());
        }
    }

    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.link.show(f)
    }
}

impl Handler for Mouse {
    fn on_packet(&self, channel: &Channel, packet: &Packet<'_>) {
        if !self.link.is_message(packet) {
            return;
        }
        let step = self.protocol.lock().on_packet(packet.payload());
        match step {
            Ok(GuestStep::Wait) => {}
            Ok(GuestStep::Device(info)) => self.link.finish(self.device_info(channel, &info)),
            Ok(GuestStep::Report(report)) => self.report(report),
            Err(error) => {
                self.link.reject(error);
                if error.is_fatal() {
                    self.link.finish(Err(EPROTO));
                }
            }
        }
    }

    fn on_rescind(&self, _channel: &Channel) {
        self.link.rescinded();
    }

    fn on_error(&self, _channel: &Channel) {
        self.link.damaged();
    }
}

/// A mouse that a driver is bound to. Dropping it closes the channel and removes the HID device.
pub(crate) struct Binding {
    mouse: Arc<Mouse>,
    open: Option<OpenChannel>,
    _wakeup: Wakeup,
}

impl Binding {
    /// Opens the channel, shakes hands and makes the HID device. Sleeps, but not for long.
    pub(crate) fn new(dev: &Device<Core<'_>>) -> Result<Self> {
        let bound: &device::Device<Core<'_>> = dev.as_ref();
        let bound: &device::Device<device::Bound> = bound;
        let normal: &device::Device = bound;
        let mouse = Arc::pin_init(
            pin_init!(Mouse {
                link <- Link::new(normal.into()),
                protocol <- new_spinlock_irq!(GuestMouse::new()),
                hid <- new_spinlock_irq!(None),
            }),
            GFP_KERNEL,
        )?;
        // From here on, `drop` sees to what was begun.
        let this = Self {
            mouse: mouse.clone(),
            open: Some(dev.channel().open(&PARAMS, mouse.clone())?),
            _wakeup: Wakeup::new(bound)?,
        };
        let request = mouse.protocol.lock().start();
        dev.channel().send(request.as_bytes(), REQUEST_ID, true)?;
        let description = mouse.link.wait()?;
        let hid = hid::Registration::new(
            bound,
            c"Microsoft Vmbus HID-compliant Mouse",
            description.identity,
            description.report_descriptor,
        )?;
        *mouse.hid.lock() = Some(Arc::new(hid, GFP_KERNEL)?);
        Ok(this)
    }

    pub(crate) fn mouse(&self) -> &Arc<Mouse> {
        &self.mouse
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        // No report comes after this, so the HID device is used by nobody.
        self.open = None;
        let hid = self.mouse.hid.lock().take();
        drop(hid);
    }
}
