// SPDX-License-Identifier: GPL-2.0

//! Network adapters of Hyper-V: synthetic NICs on the VMBus, as network devices.
//!
//! What goes over the bus is in `hv_proto::net`: the negotiation, the requests of RNDIS, what of the
//! host's is believed, and which packets go together. Here is what the kernel needs around it:
//!
//! * [`adapter`], [`ethtool`]: what the stack and a user ask; [`nic`]: an adapter, which outlives its
//!   attachments; [`steering`]: the choice of a channel;
//! * [`session`]: an attachment to the host from its beginning to its end; [`link`]: what its channels
//!   share; [`control`]: requests that somebody waits for;
//! * [`queue`]: one channel with its NAPI instance; [`tx`]: packets on their way out; [`rx`]: what comes
//!   in;
//! * [`net`]: the abstraction of the kernel's network device interface. `unsafe` code is only there, in
//!   [`params`], and where [`tx`] copies a packet to the send buffer.
//!
//! It uses the crates `kernel`, `hv_proto` and `vmbus`; nothing uses it.
//!
//! What a user can rely on: nothing that the host does or leaves undone makes a wait last for ever. The
//! host has `host_timeout` seconds for an answer; all waits end at once when it takes the adapter away.
//!
//! Virtual functions (SR-IOV) and XDP are not supported; confidential VMs are not, as in the bus driver.
//!
//! To try it: boot a guest of the host harness, load `vmbus_drv.ko` and `netvsc.ko`; `ip link` shows the
//! device.
//!
//! C version of this driver: [`drivers/net/hyperv`](srctree/drivers/net/hyperv/netvsc_drv.c)

mod adapter;
mod control;
mod ethtool;
mod link;
mod net;
mod nic;
mod params;
mod queue;
mod raw;
mod rx;
mod session;
mod stats;
mod steering;
mod tx;

use crate::{
    adapter::Adapter,
    net::{
        NetDevice,
        Registration,
        Rtnl, //
    },
    nic::Nic, //
};
use hv_proto::net::MAX_CHANNELS;
use kernel::{
    device::{
        self,
        Core, //
    },
    prelude::*,
    sync::Arc, //
};
use vmbus::{
    Device,
    DeviceId,
    OwnedQueue, //
};

/// An adapter that a driver is bound to. Dropping it gives up everything, in the order that is needed;
/// it sleeps.
struct Binding {
    nic: Arc<Nic>,
    registration: Option<Registration<Adapter>>,
}

impl Binding {
    fn new(dev: &Device<Core<'_>>) -> Result<Self> {
        let bound: &device::Device<Core<'_>> = dev.as_ref();
        let bound: &device::Device<device::Bound> = bound;
        let normal: &device::Device = bound;
        let netdev = NetDevice::new::<Adapter>(bound, u16::try_from(MAX_CHANNELS)?)?;
        let nic = Nic::new(normal.into(), netdev.clone(), dev.channel().clone())?;
        // From here on, `drop` sees to what was begun.
        let mut this = Self {
            nic: nic.clone(),
            registration: None,
        };
        nic.attach_first()?;
        let adapter = Arc::new(Adapter(nic.clone()), GFP_KERNEL)?;
        let registration = Registration::new(netdev, adapter)?;
        nic.show(&Rtnl::lock(), registration.name());
        this.registration = Some(registration);
        nic.start(OwnedQueue::ordered(c"netvsc")?);
        Ok(this)
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        // Nobody looks at the link any more, and nothing is attached again.
        self.nic.leave();
        // The stack brings the device down, and uses it no more.
        self.registration = None;
        self.nic.detach_last();
    }
}

/// What belongs to a bound device.
#[pin_data]
struct Data {
    binding: Binding,
}

struct NetvscDriver;

vmbus::device_table!(
    TABLE,
    <NetvscDriver as vmbus::Driver>::IdInfo,
    [(DeviceId::new(hv_proto::guid::NETWORK), ())]
);

impl vmbus::Driver for NetvscDriver {
    type IdInfo = ();
    type Data<'bound> = Data;

    const ID_TABLE: vmbus::IdTable<Self::IdInfo> = &TABLE;

    fn probe<'bound>(
        dev: &'bound Device<Core<'_>>,
        _info: &'bound Self::IdInfo,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            let binding = Binding::new(dev)?;
            Ok(try_pin_init!(Data { binding }))
        })
    }
}

vmbus::module_vmbus_driver! {
    type: NetvscDriver,
    name: "netvsc",
    authors: ["The Viridian authors"],
    description: "Hyper-V synthetic network driver",
    license: "GPL",
}
