// SPDX-License-Identifier: GPL-2.0

//! Disks of Hyper-V: synthetic SCSI and IDE controllers on the VMBus, as SCSI hosts.
//!
//! One controller is one SCSI host. Its primary channel and its sub-channels are the hardware queues of
//! the block layer. What goes over them is in `hv_proto::storage`: the handshake, the layout of requests
//! and answers, and the judgement of answers. Here is what the kernel needs around it:
//!
//! * [`controller`]: commands on their way out and back, units that come and go, how the controller is
//!   attached to the host, timeouts and resets;
//! * [`inflight`]: the commands that the host has;
//! * [`paths`]: the channels, and which one a command takes; [`presence`]: whether they can be used;
//! * [`control`]: the driver's own requests; [`luns`]: what waits to be done about units;
//! * [`scsi`]: the abstraction of the kernel's SCSI host interface; `unsafe` code is only there and in
//!   [`params`], the module parameters.
//!
//! It uses the crates `kernel`, `hv_proto` and `vmbus`; nothing uses it.
//!
//! What a user can rely on: every command that is given to this driver ends, once, with the host's
//! answer or with an error. Time limits: a command has `request_timeout` seconds, `1 +
//! timeout_extensions` times; then the controller is reset, for which the host has `host_timeout`
//! seconds; then the channels are closed, for which it has 30 seconds, and one more for each further
//! channel; then all commands fail, and later ones at once, until the host shakes hands again, which it
//! is asked for every few seconds. A controller that is rescinded fails them at once. Disks whose commands failed so are offline for the
//! kernel; when the host is back, `echo running > /sys/block/sdX/device/state` brings them back. When the
//! host has damaged a ring, the channels are opened anew, and commands wait meanwhile.
//!
//! What the driver cannot do: keep a host that does not even answer the closing of a channel from
//! finishing an old read into memory that has another use by then.
//!
//! Fibre Channel adapters are not supported.
//!
//! To try it: boot a guest of the host harness with a disk (`--disk`), load `scsi_mod`,
//! `sd_mod`, `vmbus_drv.ko` and `storvsc.ko`; `lsscsi` shows the disk.
//!
//! C version of this driver: [`drivers/scsi/storvsc_drv.c`](srctree/drivers/scsi/storvsc_drv.c)

mod control;
mod controller;
mod inflight;
mod log;
mod luns;
mod params;
mod paths;
mod presence;
mod raw;
mod scsi;

use crate::{
    controller::{
        Controller,
        Limits, //
    },
    scsi::{
        Address,
        HostParams, //
    }, //
};
use hv_proto::{
    packet::{
        DESCRIPTOR_SIZE,
        TRAILER_SIZE, //
    },
    storage::{
        Negotiated,
        PACKET_SIZE, //
    }, //
};
use kernel::{
    debugfs,
    device::{
        self,
        Core, //
    },
    prelude::*,
    str::CString,
    sync::Arc, //
};
use vmbus::{
    Device,
    DeviceId,
    OwnedQueue, //
};

/// Commands that one unit gets at a time, if the controller has so many places.
const COMMANDS_PER_LUN: u16 = 2048;

/// Pages of the request by which the number of requests that fit a ring is reckoned.
const TYPICAL_PAGES: usize = 32;

/// Bytes in the ring of a request with that many pages: descriptor, number of ranges, the range,
/// storage packet, trailer.
const fn request_bytes(pages: usize) -> usize {
    DESCRIPTOR_SIZE as usize + 8 + (8 + 8 * pages) + PACKET_SIZE + TRAILER_SIZE as usize
}

/// Bytes of a ring that are not for data.
const RING_HEADER: usize = hv_proto::PAGE_SIZE;

/// The kind of a controller.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Synthetic SCSI: up to 64 disks, sub-channels, disks that come and go.
    Scsi,
    /// Synthetic IDE: the fast way to one disk of the emulated IDE controller.
    Ide {
        /// Number of the disk.
        target: u16,
    },
}

/// The kinds of controllers, by class of device.
#[derive(Clone, Copy)]
enum Class {
    Scsi,
    Ide,
}

impl Class {
    /// The kind of the controller `dev` of this class.
    fn kind(self, dev: &Device<Core<'_>>) -> Kind {
        match self {
            Class::Scsi => Kind::Scsi,
            Class::Ide => {
                let &[_, _, _, _, low, high, ..] = dev.instance_id().as_bytes();
                Kind::Ide {
                    target: u16::from_le_bytes([low, high]),
                }
            }
        }
    }
}

/// A controller that a driver is bound to. Dropping it gives up everything, in the order that is
/// needed; it sleeps.
struct Binding {
    controller: Arc<Controller>,
    registration: Option<scsi::Registration<Controller>>,
}

impl Binding {
    fn new(dev: &Device<Core<'_>>, class: Class) -> Result<Self> {
        let kind = class.kind(dev);
        let cpus = params::online_cpus();
        let subchannels = match kind {
            Kind::Scsi => {
                let queues = params::max_hw_queues().map_or(cpus, |max| cpus.min(max.into()));
                u16::try_from(queues.saturating_sub(1)).unwrap_or(u16::MAX - 1)
            }
            Kind::Ide { .. } => 0,
        };
        let bound: &device::Device<Core<'_>> = dev.as_ref();
        let bound: &device::Device<device::Bound> = bound;
        let normal: &device::Device = bound;
        let controller = Controller::new(normal.into(), dev.channel().clone(), subchannels)?;
        // From here on, `drop` sees to what was begun.
        let mut this = Self {
            controller,
            registration: None,
        };
        let controller = &this.controller;
        let (agreed, limits) = controller.attach(|agreed| Self::limits(kind, agreed, cpus))?;
        let params = Self::host_params(kind, &agreed, &limits);
        let registration = scsi::Registration::new(bound, &params, controller.clone())?;
        let host = registration.host().clone();
        this.registration = Some(registration);
        controller.start(host.clone(), OwnedQueue::ordered(c"storvsc")?);
        dev_info!(
            normal,
            "host{}: storage protocol {}, {} hardware queues, {} bytes a transfer\n",
            host.number(),
            format_args!("{}", agreed.version),
            limits.queues,
            agreed.max_transfer_bytes
        );
        match kind {
            Kind::Scsi => host.scan(),
            Kind::Ide { target } => host.add_device(Address {
                channel: 0,
                id: target.into(),
                lun: 0,
            })?,
        }
        Ok(this)
    }

    fn limits(kind: Kind, agreed: &Negotiated, cpus: u32) -> Limits {
        let in_ring =
            params::ring_bytes().saturating_sub(RING_HEADER) / request_bytes(TYPICAL_PAGES);
        let expected_channels = match kind {
            Kind::Scsi => 1 + cpus.saturating_sub(1) / params::cpus_per_subchannel(),
            Kind::Ide { .. } => 1,
        };
        // The block layer's own limit is 10240.
        let can_queue = (in_ring as u64)
            .saturating_mul(expected_channels.into())
            .saturating_mul(u64::from(100_u32.saturating_sub(params::ring_low_water())))
            / 100;
        let can_queue = u16::try_from(can_queue.clamp(1, 10_240)).unwrap_or(1);
        Limits {
            can_queue,
            max_depth: can_queue,
            queues: agreed.sub_channels.saturating_add(1),
        }
    }

    fn host_params(kind: Kind, agreed: &Negotiated, limits: &Limits) -> HostParams {
        // A request must fit the ring with something to spare.
        let room =
            (params::ring_bytes().saturating_sub(RING_HEADER) / 2).saturating_sub(request_bytes(0));
        let pages = (agreed.max_transfer_bytes / hv_proto::PAGE_SIZE as u32)
            .min(u32::try_from((room / 8).saturating_sub(1)).unwrap_or(u32::MAX))
            .min(u32::from(u16::MAX) - 1);
        let (channels, targets, luns) = match kind {
            Kind::Scsi => (8, 2, 255),
            Kind::Ide { .. } => (1, 1, 64),
        };
        HostParams {
            can_queue: limits.can_queue,
            commands_per_lun: COMMANDS_PER_LUN,
            hw_queues: limits.queues,
            // CAST: limited to 16 bits above. The data may start and end within a page.
            sg_tablesize: (pages + 1) as u16,
            max_sectors: pages * (hv_proto::PAGE_SIZE as u32 / 512),
            max_cdb_len: hv_proto::scsi::MAX_CDB_SIZE as u16,
            channels,
            targets,
            luns,
        }
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        // Nobody looks at units.
        self.controller.stop();
        // The last commands go over the channels, or fail if there are none any more.
        self.registration = None;
        self.controller.detach();
    }
}

/// What belongs to a bound device.
#[pin_data]
struct Data {
    /// Counters of the channels, in a directory of debugfs.
    #[pin]
    counters: debugfs::File<Arc<Controller>>,
    binding: Binding,
}

struct StorvscDriver;

vmbus::device_table!(
    TABLE,
    <StorvscDriver as vmbus::Driver>::IdInfo,
    [
        (DeviceId::new(hv_proto::guid::SCSI), Class::Scsi),
        (DeviceId::new(hv_proto::guid::IDE), Class::Ide),
    ]
);

impl vmbus::Driver for StorvscDriver {
    type IdInfo = Class;
    type Data<'bound> = Data;

    const ID_TABLE: vmbus::IdTable<Self::IdInfo> = &TABLE;

    fn probe<'bound>(
        dev: &'bound Device<Core<'_>>,
        info: &'bound Self::IdInfo,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            let binding = Binding::new(dev, *info)?;
            let device: &device::Device<Core<'_>> = dev.as_ref();
            let name = CString::try_from_fmt(fmt!("storvsc-{}", device.name()))?;
            let dir = debugfs::Dir::new(&name);
            let controller = binding.controller.clone();
            Ok(try_pin_init!(Data {
                counters <- dir.read_callback_file(c"channels", controller, &|c, f| {
                    c.paths().write_counters(f)
                }),
                binding,
            }))
        })
    }
}

vmbus::module_vmbus_driver! {
    type: StorvscDriver,
    name: "storvsc",
    authors: ["The Viridian authors"],
    description: "Hyper-V synthetic storage driver",
    license: "GPL",
}
