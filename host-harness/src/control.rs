// SPDX-License-Identifier: MIT OR Apache-2.0

//! What an operator can do with a host while it runs, and see of it. The control API
//! ([`crate::api`]) is this over a socket; programs that have a [`crate::host::Host`] use it
//! directly.

use std::sync::Arc;

use serde::Serialize;

use crate::events::Events;
use crate::vm::counters::VmCounters;
use crate::vm::{VmControl, VmStatus};
use crate::vmbus::{ChannelStatus, CounterSnapshot, DeviceStatus, Server};
use crate::vsp::netvsp::{Network, NetworkError, NicStatus};
use crate::vsp::services::{self, ServiceError, Services};
use crate::vsp::storvsp::{ControllerStatus, DiskStatus, Storage, StorageError};

/// Why something cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no such device.
    #[error("there is no device '{0}'")]
    NoSuchDevice(String),
    /// Disks and controllers.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// NICs.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Integration components and input devices.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// A host, for display.
#[derive(Debug, Clone, Serialize)]
pub struct HostStatus {
    /// The machine and its processors.
    pub vm: VmStatus,
    /// The bus; nothing if the machine has none.
    pub vmbus: Option<BusStatus>,
    /// The disks.
    pub disks: Vec<DiskStatus>,
}

/// The bus and its devices, for display.
#[derive(Debug, Clone, Serialize)]
pub struct BusStatus {
    /// The version that the guest has negotiated; nothing while it is not connected.
    pub version: Option<String>,
    /// Number of GPADLs.
    pub gpadls: usize,
    /// The devices.
    pub devices: Vec<DeviceDetails>,
}

/// A device, for display.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceDetails {
    /// The device on the bus.
    #[serde(flatten)]
    pub device: DeviceStatus,
    /// Its channels.
    pub channels: Vec<ChannelDetails>,
    /// What its service provider knows.
    #[serde(flatten)]
    pub service: Option<ServiceStatus>,
}

/// A channel, for display.
#[derive(Debug, Clone, Serialize)]
pub struct ChannelDetails {
    /// 0 for the primary channel.
    pub index: u16,
    /// The channel's number on the bus.
    pub id: u32,
    /// Where it stands: see [`ChannelStatus::state`].
    pub state: String,
    /// The virtual processor that gets its interrupts.
    pub target_vp: u32,
}

/// What a service provider says of its device.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceStatus {
    /// A storage controller.
    Storage(ControllerStatus),
    /// A NIC.
    Network(NicStatus),
    /// An integration component or input device.
    #[serde(untagged)]
    Service(services::ServiceStatus),
}

/// Counts, for display. Most only grow; some show how things stand, such as the commands of a
/// controller that run.
#[derive(Debug, Clone, Serialize)]
pub struct Stats {
    /// Exits of the virtual processors by reason, and more of the machine.
    pub vm: VmCounters,
    /// Per channel.
    pub channels: Vec<ChannelStats>,
    /// Per storage controller.
    pub controllers: Vec<ControllerStatus>,
    /// Per disk.
    pub disks: Vec<DiskStatus>,
    /// Per NIC.
    pub nics: Vec<NicStatus>,
}

/// The counts of a channel.
#[derive(Debug, Clone, Serialize)]
pub struct ChannelStats {
    /// Name of the device.
    pub device: String,
    /// 0 for the primary channel.
    pub index: u16,
    /// The channel's number on the bus.
    pub id: u32,
    /// The counts.
    #[serde(flatten)]
    pub counters: CounterSnapshot,
}

/// A running host.
pub struct Control {
    /// The machine.
    pub vm: VmControl,
    /// The bus.
    pub server: Option<Arc<Server>>,
    /// Disks and their controllers.
    pub storage: Storage,
    /// NICs.
    pub network: Network,
    /// Integration components and input devices.
    pub services: Services,
    /// Where what happens is published.
    pub events: Events,
}

impl Control {
    /// Everything that is there, and how it stands.
    pub fn status(&self) -> HostStatus {
        HostStatus {
            vm: self.vm.status(),
            vmbus: self.server.as_ref().map(|server| self.bus(server)),
            disks: self.storage.disks(),
        }
    }

    fn bus(&self, server: &Server) -> BusStatus {
        let status = server.status();
        let mut controllers = self.storage.controllers();
        let mut nics = self.network.nics();
        let devices = status.devices.into_iter().map(|device| {
            let of_device = |channel: &&ChannelStatus| channel.name == device.name;
            let channels = status.channels.iter().filter(of_device);
            let channels = channels.map(|channel| ChannelDetails {
                index: channel.subchannel_index,
                id: channel.id,
                state: channel.state.clone(),
                target_vp: channel.target_vp,
            });
            DeviceDetails {
                channels: channels.collect(),
                service: controllers
                    .iter()
                    .position(|controller| controller.name == device.name)
                    .map(|at| ServiceStatus::Storage(controllers.swap_remove(at)))
                    .or_else(|| {
                        let at = nics.iter().position(|nic| nic.name == device.name)?;
                        Some(ServiceStatus::Network(nics.swap_remove(at)))
                    })
                    .or_else(|| {
                        let service = self.services.get(&device.name);
                        service.map(|service| ServiceStatus::Service(service.status()))
                    }),
                device,
            }
        });
        BusStatus {
            devices: devices.collect(),
            version: status.version,
            gpadls: status.gpadls,
        }
    }

    /// What was counted.
    pub fn stats(&self) -> Stats {
        let channels = self.server.as_ref().map(|server| server.status().channels);
        let channel = |channel: ChannelStatus| ChannelStats {
            device: channel.name,
            index: channel.subchannel_index,
            id: channel.id,
            counters: channel.counters,
        };
        Stats {
            vm: self.vm.counters(),
            channels: channels.into_iter().flatten().map(channel).collect(),
            controllers: self.storage.controllers(),
            disks: self.storage.disks(),
            nics: self.network.nics(),
        }
    }

    /// Takes a device off the bus, with what is attached to it, and waits for a while that the
    /// guest lets go of it.
    ///
    /// # Errors
    /// There is no such device.
    pub fn rescind(&self, device: &str) -> Result<(), ControlError> {
        match self.services.rescind(device) {
            Err(ServiceError::NoSuchDevice(_)) => {}
            other => return Ok(other?),
        }
        match self.network.remove(device) {
            Err(NetworkError::NoSuchNic(_)) => {}
            other => return Ok(other?),
        }
        match self.storage.remove_controller(device) {
            Err(StorageError::NoSuchController(name)) => Err(ControlError::NoSuchDevice(name)),
            other => Ok(other?),
        }
    }
}
