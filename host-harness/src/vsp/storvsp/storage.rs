// SPDX-License-Identifier: MIT OR Apache-2.0

//! The storage of a machine: its controllers and disks, and what can be done with them while the
//! machine runs.

use hv_proto::storage::{LunAddress, Version};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::controller::{Controller, ControllerConfig, ControllerCounters, Position};
use super::queue::Stall;
use crate::disk::{self, Bus, Disk, DiskError, DiskOptions, Fault, OpenError};
use crate::scsi::{LogicalUnit, UnitCounters};
use crate::vmbus::{OfferError, OfferHandle, Server};

/// How long the removal of an IDE drive waits for the guest to let go.
const RESCIND_TIMEOUT: Duration = Duration::from_secs(10);

/// Most sub-channels of a controller.
pub const MAX_SUB_CHANNELS: u16 = 63;

/// What controllers are made with.
#[derive(Debug, Clone, Copy)]
pub struct StorageConfig {
    /// SCSI controllers that are there even without disks, so that disks can be added later.
    pub scsi_controllers: u8,
    /// Largest transfer of one command in bytes; a multiple of 4096.
    pub max_transfer: u32,
    /// Sub-channels that the guest may ask for, on each controller.
    pub max_sub_channels: u16,
    /// Newest version of the storage protocol that is accepted.
    pub max_version: Version,
    /// Threads on each controller that execute commands.
    pub workers: usize,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            scsi_controllers: 1,
            max_transfer: 512 << 10,
            max_sub_channels: 7,
            max_version: Version::V6_2,
            workers: 4,
        }
    }
}

/// An operation on the storage failed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The image cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is a disk of this name.
    #[error("there is a disk '{0}' already")]
    DuplicateName(String),
    /// The address is in use, or all are.
    #[error("disk {path}: {reason}", path = .path.display())]
    Address {
        /// The image.
        path: std::path::PathBuf,
        /// What is in the way.
        reason: String,
    },
    /// There is no disk of this name.
    #[error("there is no disk '{0}'")]
    NoSuchDisk(String),
    /// There is no controller of this name.
    #[error("there is no controller '{0}'")]
    NoSuchController(String),
    /// The disk refused.
    #[error("disk '{name}': {source}")]
    Disk {
        /// Name of the disk.
        name: String,
        /// The reason.
        source: DiskError,
    },
    /// The bus refused.
    #[error("controller {controller}: {source}")]
    Offer {
        /// Name of the controller.
        controller: String,
        /// The reason.
        source: OfferError,
    },
    /// The system refused a thread.
    #[error("controller {controller}: {source}")]
    Thread {
        /// Name of the controller.
        controller: String,
        /// The reason.
        source: std::io::Error,
    },
}

/// A disk, for display.
#[derive(Debug, Clone, Serialize)]
pub struct DiskStatus {
    /// Its name.
    pub name: String,
    /// Its controller.
    pub controller: String,
    /// SCSI path, target and unit number.
    pub address: (u8, u8, u8),
    /// Size in bytes.
    pub size: u64,
    /// What was done with it.
    #[serde(flatten)]
    pub counters: UnitCounters,
}

/// A controller, for display.
#[derive(Debug, Clone, Serialize)]
pub struct ControllerStatus {
    /// Its name.
    pub name: String,
    /// The instance GUID of its offer, as the guest's sysfs names the device.
    pub instance: String,
    /// Version of the storage protocol that the guest uses.
    pub version: Option<String>,
    /// What it has done.
    #[serde(flatten)]
    pub counters: ControllerCounters,
}

struct Entry {
    /// Before the controller: the guest lets go first.
    offer: Option<OfferHandle>,
    controller: Arc<Controller>,
}

#[derive(Clone)]
struct DiskEntry {
    position: Position,
    address: LunAddress,
    unit: Arc<LogicalUnit>,
}

#[derive(Default)]
struct State {
    server: Weak<Server>,
    controllers: BTreeMap<Position, Entry>,
    disks: BTreeMap<String, DiskEntry>,
    next_name: u32,
}

/// The controllers and disks of a machine. Dropping it takes all of them away.
///
/// Controllers are called `scsi0`, `scsi1`, ... and `ide0.0` (an IDE position is a controller of
/// its own on the bus); disks by their `id` option, else `disk0`, `disk1`, ...
pub struct Storage {
    config: StorageConfig,
    /// Held while a disk is added, so that two do not get the same name or address.
    adding: Mutex<()>,
    /// Never held while anything waits for a guest or for the system.
    state: Mutex<State>,
}

impl Storage {
    /// The storage of a machine, not connected to a bus yet.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn new(config: StorageConfig) -> Result<Self, StorageError> {
        let storage = Self {
            config,
            adding: Mutex::default(),
            state: Mutex::default(),
        };
        {
            let mut state = storage.lock();
            for number in 0..config.scsi_controllers {
                let position = Position {
                    bus: Bus::Scsi,
                    number,
                    drive: 0,
                };
                storage.controller(&mut state, position)?;
            }
        }
        Ok(storage)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The maps are consistent whenever something can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The controller at a position; makes it if it is not there. It is not offered yet.
    fn controller<'a>(
        &self,
        state: &'a mut State,
        position: Position,
    ) -> Result<&'a mut Entry, StorageError> {
        let entry = match state.controllers.entry(position) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                let controller = Controller::new(ControllerConfig {
                    position,
                    max_transfer: self.config.max_transfer,
                    max_sub_channels: self.config.max_sub_channels,
                    max_version: self.config.max_version,
                    workers: self.config.workers,
                })
                .map_err(|source| StorageError::Thread {
                    controller: position.name(),
                    source,
                })?;
                place.insert(Entry {
                    offer: None,
                    controller: Arc::new(controller),
                })
            }
        };
        Ok(entry)
    }

    /// Offers the controller on the bus, if there is one and it is not offered.
    fn offer(
        server: &Weak<Server>,
        position: Position,
        entry: &mut Entry,
    ) -> Result<(), StorageError> {
        if entry.offer.is_some() {
            return Ok(());
        }
        if let Some(server) = server.upgrade() {
            let (params, vsp) = entry.controller.device();
            let offer = server
                .offer(params, vsp)
                .map_err(|source| StorageError::Offer {
                    controller: position.name(),
                    source,
                })?;
            entry.offer = Some(offer);
        }
        Ok(())
    }

    /// Offers all controllers on a bus. Controllers that come later are offered when they come.
    ///
    /// # Errors
    /// The bus refuses an offer.
    pub fn connect(&self, server: &Arc<Server>) -> Result<(), StorageError> {
        let mut state = self.lock();
        state.server = Arc::downgrade(server);
        let State {
            server,
            controllers,
            ..
        } = &mut *state;
        for (&position, entry) in controllers {
            Self::offer(server, position, entry)?;
        }
        Ok(())
    }

    /// Opens an image and attaches it; a running guest is told. Returns the name of the disk.
    ///
    /// # Errors
    /// The name or address is taken, or the image cannot be opened.
    pub fn add_disk(&self, options: &DiskOptions) -> Result<String, StorageError> {
        let _adding = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.lock();
        let name = match &options.id {
            Some(id) => id.clone(),
            None => loop {
                let name = format!("disk{}", state.next_name);
                state.next_name += 1;
                if !state.disks.contains_key(&name) {
                    break name;
                }
            },
        };
        if state.disks.contains_key(&name) {
            return Err(StorageError::DuplicateName(name));
        }
        let in_use = |reason: String| StorageError::Address {
            path: options.path.clone(),
            reason,
        };
        let position = Position {
            bus: options.bus,
            number: options.controller,
            drive: match options.bus {
                Bus::Scsi => 0,
                Bus::Ide => options.target,
            },
        };
        let lun = match (options.lun, state.controllers.get(&position)) {
            (Some(lun), _) => lun,
            // An IDE drive is one unit, so that a second disk finds its address taken.
            (None, _) if options.bus == Bus::Ide => 0,
            (None, None) => 0,
            (None, Some(entry)) => entry
                .controller
                .free_lun(options.channel, options.target)
                .ok_or_else(|| in_use(format!("{} has no free unit", position.name())))?,
        };
        let address = LunAddress {
            path: options.channel,
            target: options.target,
            lun,
        };
        let taken = || {
            in_use(format!(
                "{} has a disk at channel {}, target {}, LUN {} already",
                position.name(),
                address.path,
                address.target,
                address.lun
            ))
        };
        // Before the image is opened: a bad command line must not touch it.
        if state
            .disks
            .values()
            .any(|disk| disk.position == position && disk.address == address)
        {
            return Err(taken());
        }
        drop(state);
        let opened = disk::open(options)?;
        let mut state = self.lock();
        let unit = Arc::new(LogicalUnit::new(opened, self.config.max_transfer));
        let server = state.server.clone();
        let entry = self.controller(&mut state, position)?;
        if !entry.controller.add(address, Arc::clone(&unit)) {
            return Err(taken());
        }
        if let Err(error) = Self::offer(&server, position, entry) {
            entry.controller.remove(address);
            return Err(error);
        }
        let controller = Arc::clone(&entry.controller);
        let disk = DiskEntry {
            position,
            address,
            unit,
        };
        state.disks.insert(name.clone(), disk);
        drop(state);
        controller.tell_of_units();
        Ok(name)
    }

    /// Takes a disk away at once, as if it were pulled out; the guest is told. Commands on it
    /// that run are finished, and then the image is closed. An IDE position goes with its disk.
    ///
    /// # Errors
    /// There is no such disk.
    pub fn remove_disk(&self, name: &str) -> Result<(), StorageError> {
        let mut state = self.lock();
        let disk = state
            .disks
            .remove(name)
            .ok_or_else(|| StorageError::NoSuchDisk(name.into()))?;
        if disk.position.bus == Bus::Ide {
            let entry = state.controllers.remove(&disk.position);
            drop(state);
            Self::take_off(entry, disk.position);
        } else if let Some(entry) = state.controllers.get(&disk.position) {
            let controller = Arc::clone(&entry.controller);
            drop(state);
            controller.remove(disk.address);
        }
        Ok(())
    }

    /// Takes a controller off the bus.
    fn take_off(entry: Option<Entry>, position: Position) {
        let Some(Entry { offer, controller }) = entry else {
            return;
        };
        if let Some(offer) = offer
            && !offer.rescind_and_wait(RESCIND_TIMEOUT)
        {
            tracing::warn!("the guest still holds {}", position.name());
        }
        // Not before: it ends the execution of commands, and waits for those that run.
        drop(controller);
    }

    fn unit(&self, name: &str) -> Result<Arc<LogicalUnit>, StorageError> {
        let state = self.lock();
        let disk = state.disks.get(name);
        disk.map(|disk| Arc::clone(&disk.unit))
            .ok_or_else(|| StorageError::NoSuchDisk(name.into()))
    }

    /// Changes the size of a disk; the guest hears of it with its next command.
    ///
    /// # Errors
    /// There is no such disk, or it cannot have this size.
    pub fn resize_disk(&self, name: &str, size: u64) -> Result<(), StorageError> {
        self.unit(name)?
            .resize(size)
            .map_err(|source| StorageError::Disk {
                name: name.into(),
                source,
            })
    }

    /// Replaces the injected faults of a disk; none heals it. A testing aid.
    ///
    /// # Errors
    /// There is no such disk.
    pub fn set_faults(&self, name: &str, faults: Vec<Fault>) -> Result<(), StorageError> {
        self.unit(name)?.disk().set_faults(faults);
        Ok(())
    }

    /// Makes each request on a disk take so much longer. A testing aid.
    ///
    /// # Errors
    /// There is no such disk.
    pub fn set_latency(&self, name: &str, latency: Duration) -> Result<(), StorageError> {
        self.unit(name)?.disk().set_latency(latency);
        Ok(())
    }

    fn with_controller<R>(
        &self,
        name: &str,
        f: impl FnOnce(&Controller) -> R,
    ) -> Result<R, StorageError> {
        let state = self.lock();
        state
            .controllers
            .iter()
            .find(|(position, _)| position.name() == name)
            .map(|(_, entry)| f(&entry.controller))
            .ok_or_else(|| StorageError::NoSuchController(name.into()))
    }

    /// Makes a controller stop answering, or answer again. A testing aid.
    ///
    /// # Errors
    /// There is no such controller.
    pub fn stall(&self, controller: &str, stall: Stall) -> Result<(), StorageError> {
        self.with_controller(controller, |c| c.set_stall(stall))
    }

    /// Hostile host: executes the next `count` commands, but does not answer them.
    ///
    /// # Errors
    /// There is no such controller.
    pub fn drop_answers(&self, controller: &str, count: u32) -> Result<(), StorageError> {
        self.with_controller(controller, |c| c.hostility().set_dropped(count))
    }

    /// Hostile host: answers each of the next `count` commands twice.
    ///
    /// # Errors
    /// There is no such controller.
    pub fn duplicate_answers(&self, controller: &str, count: u32) -> Result<(), StorageError> {
        self.with_controller(controller, |c| c.hostility().set_duplicated(count))
    }

    /// Hostile host: before it executes each of the next `count` commands, sends
    /// [`super::FORGED_PACKETS`] packets that claim that commands have succeeded, none of which is an
    /// answer to a command of the guest.
    ///
    /// # Errors
    /// There is no such controller.
    pub fn forge_answers(&self, controller: &str, count: u32) -> Result<(), StorageError> {
        self.with_controller(controller, |c| c.hostility().set_forged(count))
    }

    /// Takes a whole controller off the bus, with its disks; to the guest this is a rescind.
    ///
    /// # Errors
    /// There is no such controller.
    pub fn remove_controller(&self, controller: &str) -> Result<(), StorageError> {
        let mut state = self.lock();
        let position = state
            .controllers
            .keys()
            .find(|position| position.name() == controller)
            .copied()
            .ok_or_else(|| StorageError::NoSuchController(controller.into()))?;
        state.disks.retain(|_, disk| disk.position != position);
        let entry = state.controllers.remove(&position);
        drop(state);
        Self::take_off(entry, position);
        Ok(())
    }

    /// The disks.
    pub fn disks(&self) -> Vec<DiskStatus> {
        let status = |(name, disk): (String, DiskEntry)| DiskStatus {
            name,
            controller: disk.position.name(),
            address: (disk.address.path, disk.address.target, disk.address.lun),
            // Without the lock: the size of a disk that is being resized is waited for.
            size: disk.unit.disk().size(),
            counters: disk.unit.counters(),
        };
        let disks = self.lock().disks.clone();
        disks.into_iter().map(status).collect()
    }

    /// The controllers.
    pub fn controllers(&self) -> Vec<ControllerStatus> {
        let state = self.lock();
        let status = |(position, entry): (&Position, &Entry)| ControllerStatus {
            name: position.name(),
            instance: position.offer().instance.to_string(),
            version: entry
                .controller
                .version()
                .map(|version| version.to_string()),
            counters: entry.controller.counters(),
        };
        state.controllers.iter().map(status).collect()
    }
}
