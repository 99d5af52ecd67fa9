// SPDX-License-Identifier: MIT OR Apache-2.0

//! The whole host in one value: a machine, its bus and its devices, put together and taken apart
//! in the right order. For programs that run a guest, the binary and the tests among them. Uses
//! every other module.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hv_proto::version::Version;

use crate::api::{ApiServer, ApiSocket};
use crate::control::Control;
use crate::disk::DiskOptions;
use crate::events::Events;
use crate::hypervisor::{ReferenceClock, SynicPort};
use crate::net::NetOptions;
use crate::vm::{Vm, VmConfig, VmError, VmHandle};
use crate::vmbus::{Server, ServerConfig, Trace};
use crate::vsp::netvsp::{Network, NetworkError};
use crate::vsp::services::{ServiceError, ServiceKind, Services};
use crate::vsp::storvsp::{MAX_SUB_CHANNELS, Storage, StorageConfig, StorageError};

/// Why a host does not start.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Disks and controllers.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// NICs and their networks.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Integration components and input devices.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The trace file cannot be written.
    #[error("trace {}: {source}", path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The socket of the control API cannot be made.
    #[error("api {}: {source}", path.display())]
    Api {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl HostError {
    /// Exit status of a program that ends with this error: 2 when its user can do something about
    /// it, else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Vm(error) => error.exit_status(),
            Self::Storage(_) | Self::Network(_) | Self::Trace { .. } | Self::Api { .. } => 2,
            Self::Service(_) => 1,
        }
    }
}

/// A host as its user describes it.
#[derive(Debug)]
pub struct HostConfig {
    /// The machine.
    pub vm: VmConfig,
    /// The newest VMBus version to speak; `None` for a machine without VMBus, and so without
    /// devices.
    pub vmbus: Option<Version>,
    /// Lets the guest signal through monitor pages, at which the host looks so often, instead of
    /// by hypercalls.
    pub monitor_latency: Option<Duration>,
    /// Where the trace of the bus goes.
    pub trace: Option<PathBuf>,
    /// The controllers.
    pub storage: StorageConfig,
    /// The disks.
    pub disks: Vec<DiskOptions>,
    /// The NICs.
    pub nics: Vec<NetOptions>,
    /// A capture of what crosses all NICs.
    pub pcap: Option<PathBuf>,
    /// Integration components and input devices.
    pub services: Vec<ServiceKind>,
    /// The socket of the control API; see [`crate::api`].
    pub api: Option<PathBuf>,
}

impl HostConfig {
    /// This machine with a bus of the newest version, one SCSI controller, as many sub-channels as
    /// its processors can use, no disks, no NICs, and one of each of the other devices.
    pub fn new(vm: VmConfig) -> Self {
        let processors = u16::try_from(vm.cpus).unwrap_or(u16::MAX);
        let storage = StorageConfig {
            max_sub_channels: processors.saturating_sub(1).min(MAX_SUB_CHANNELS),
            ..StorageConfig::default()
        };
        Self {
            vm,
            vmbus: Some(Version::V6_0),
            monitor_latency: None,
            trace: None,
            storage,
            disks: Vec::new(),
            nics: Vec::new(),
            pcap: None,
            services: ServiceKind::all(),
            api: None,
        }
    }
}

/// A host that runs a guest. Dropping it ends the guest.
///
/// The fields are dropped in their order: the operator first, then the processors stop, and the
/// images close last.
pub struct Host {
    api: Option<ApiServer>,
    vm: VmHandle,
    control: Arc<Control>,
}

impl Host {
    /// Puts the machine together and starts the guest.
    ///
    /// # Errors
    /// Anything that [`HostError`] names. Bad images and networks are reported before KVM is looked for.
    pub fn start(config: HostConfig) -> Result<Self, HostError> {
        // Before the guest runs, which would end with a socket that cannot be.
        let api = config.api.map(|path| bind(&path)).transpose()?;
        let storage = Storage::new(config.storage)?;
        for disk in &config.disks {
            storage.add_disk(disk)?;
        }
        let network = Network::new(config.vm.cpus, config.pcap.as_deref())?;
        for nic in &config.nics {
            network.add(nic)?;
        }
        let trace = match config.trace {
            Some(path) => match Trace::create(&path) {
                Ok(trace) => Some(Arc::new(trace)),
                Err(source) => return Err(HostError::Trace { path, source }),
            },
            None => None,
        };
        let events = Events::default();
        let vp_count = config.vm.cpus;
        let mut vm = Vm::new(config.vm)?;
        vm.set_events(events.clone());
        let clock: Arc<dyn ReferenceClock> = vm.synic();
        let services = Services::new(&config.services, &events, &clock);
        let mut server = None;
        if let Some(max_version) = config.vmbus {
            let synic: Arc<dyn SynicPort> = vm.synic();
            let monitor_latency = config.monitor_latency;
            let config = ServerConfig {
                max_version,
                vp_count,
                trace,
                monitor_latency,
                events: events.clone(),
            };
            let bus = Server::new(vm.memory(), synic, config);
            vm.set_message_sink(bus.clone());
            storage.connect(&bus)?;
            network.connect(&bus)?;
            services.connect(&bus)?;
            server = Some(bus);
        }
        let vm = vm.start()?;
        let control = Control {
            vm: vm.control().clone(),
            server,
            storage,
            network,
            services,
            events,
        };
        let mut host = Self {
            api: None,
            vm,
            control: Arc::new(control),
        };
        if let Some((socket, path)) = api {
            host.serve(socket, &path)?;
        }
        Ok(host)
    }

    /// Listens for the operator's calls on a Unix socket; see [`crate::api`].
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn listen(&mut self, path: &Path) -> Result<(), HostError> {
        let (socket, path) = bind(path)?;
        self.serve(socket, &path)
    }

    fn serve(&mut self, socket: ApiSocket, path: &Path) -> Result<(), HostError> {
        let server = ApiServer::serve(socket, self.control.clone());
        self.api = Some(server.map_err(|source| HostError::Api {
            path: path.into(),
            source,
        })?);
        Ok(())
    }

    /// The machine.
    pub fn vm(&self) -> &VmHandle {
        &self.vm
    }

    /// The bus.
    pub fn server(&self) -> Option<&Arc<Server>> {
        self.control.server.as_ref()
    }

    /// The disks and their controllers.
    pub fn storage(&self) -> &Storage {
        &self.control.storage
    }

    /// The NICs.
    pub fn network(&self) -> &Network {
        &self.control.network
    }

    /// Integration components and input devices.
    pub fn services(&self) -> &Services {
        &self.control.services
    }

    /// All that can be done with the host while it runs.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// What happens in it.
    pub fn events(&self) -> &Events {
        &self.control.events
    }

    /// Ends the guest, its devices, and closes the images. False if a device did not stop in time:
    /// then its threads are left alone, and its images may be incomplete.
    pub fn shutdown(self) -> bool {
        let Self { api, vm, control } = self;
        drop(api);
        drop(vm);
        let stopped = control.server.as_ref().is_none_or(|s| s.shutdown());
        if !stopped {
            // To drop a device is to wait for its threads, without a limit.
            std::mem::forget(control);
        }
        stopped
    }
}

/// Makes the socket of the control API.
fn bind(path: &Path) -> Result<(ApiSocket, PathBuf), HostError> {
    match ApiSocket::bind(path) {
        Ok(socket) => Ok((socket, path.into())),
        Err(source) => Err(HostError::Api {
            path: path.into(),
            source,
        }),
    }
}
