// SPDX-License-Identifier: MIT OR Apache-2.0

//! The whole host in one value: a machine, its bus and its devices, put together and taken apart
//! in the right order. For programs that run a guest, the binary and the tests among them. Uses
//! every other module.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hv_proto::version::Version;

use crate::disk::DiskOptions;
use crate::hypervisor::SynicPort;
use crate::vm::{Vm, VmConfig, VmError, VmHandle};
use crate::vmbus::{Server, ServerConfig, Trace};
use crate::vsp::storvsp::{Storage, StorageConfig, StorageError};

/// Why a host does not start.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Disks and controllers.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The trace file cannot be written.
    #[error("trace {}: {source}", path.display())]
    Trace {
        /// The file.
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
            Self::Storage(_) | Self::Trace { .. } => 2,
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
}

impl HostConfig {
    /// This machine with a bus of the newest version, one SCSI controller, as many sub-channels as
    /// its processors can use, and no disks.
    pub fn new(vm: VmConfig) -> Self {
        let processors = u16::try_from(vm.cpus).unwrap_or(u16::MAX);
        let storage = StorageConfig {
            max_sub_channels: processors.saturating_sub(1),
            ..StorageConfig::default()
        };
        Self {
            vm,
            vmbus: Some(Version::V6_0),
            monitor_latency: None,
            trace: None,
            storage,
            disks: Vec::new(),
        }
    }
}

/// A host that runs a guest. Dropping it ends the guest.
///
/// The fields are dropped in their order: the processors stop first, the images close last.
pub struct Host {
    vm: VmHandle,
    server: Option<Arc<Server>>,
    storage: Storage,
}

impl Host {
    /// Puts the machine together and starts the guest.
    ///
    /// # Errors
    /// Anything that [`HostError`] names. Bad images are reported before KVM is looked for.
    pub fn start(config: HostConfig) -> Result<Self, HostError> {
        let storage = Storage::new(config.storage)?;
        for disk in &config.disks {
            storage.add_disk(disk)?;
        }
        let trace = match config.trace {
            Some(path) => match Trace::create(&path) {
                Ok(trace) => Some(Arc::new(trace)),
                Err(source) => return Err(HostError::Trace { path, source }),
            },
            None => None,
        };
        let vp_count = config.vm.cpus;
        let mut vm = Vm::new(config.vm)?;
        let mut server = None;
        if let Some(max_version) = config.vmbus {
            let synic: Arc<dyn SynicPort> = vm.synic();
            let monitor_latency = config.monitor_latency;
            let config = ServerConfig {
                max_version,
                vp_count,
                trace,
                monitor_latency,
            };
            let bus = Server::new(vm.memory(), synic, config);
            vm.set_message_sink(bus.clone());
            storage.connect(&bus)?;
            server = Some(bus);
        }
        let vm = vm.start()?;
        Ok(Self {
            vm,
            server,
            storage,
        })
    }

    /// The machine.
    pub fn vm(&self) -> &VmHandle {
        &self.vm
    }

    /// The bus.
    pub fn server(&self) -> Option<&Arc<Server>> {
        self.server.as_ref()
    }

    /// The disks and their controllers.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Ends the guest, its devices, and closes the images. False if a device did not stop in time.
    pub fn shutdown(self) -> bool {
        let Self {
            vm,
            server,
            storage,
        } = self;
        drop(vm);
        let stopped = server.is_none_or(|server| server.shutdown());
        drop(storage);
        stopped
    }
}
