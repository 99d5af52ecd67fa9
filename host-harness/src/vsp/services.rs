// SPDX-License-Identifier: MIT OR Apache-2.0

//! The integration components and input devices of a machine: which there are, and their places on
//! the bus.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use hv_proto::guid::{self, Guid};
use hv_proto::ic::{heartbeat, shutdown, timesync};
use serde::Serialize;

use super::ic::{
    Heartbeat, HeartbeatStatus, LinkConfig, Shutdown, ShutdownStatus, Timesync, TimesyncStatus,
};
use super::inputvsp::{Keyboard, KeyboardStatus, Mouse, MouseStatus};
use super::port::{Port, lock};
use crate::events::Events;
use crate::hypervisor::ReferenceClock;
use crate::vmbus::{OfferError, OfferHandle, OfferParams, Server, Vsp};

/// How long the removal of a device waits for the guest to let go.
const RESCIND_TIMEOUT: Duration = Duration::from_secs(10);

/// What a device does.
#[derive(Debug, Clone, Copy)]
pub enum ServiceKind {
    /// Heartbeat, with these versions.
    Heartbeat(LinkConfig),
    /// Time synchronization.
    Timesync(LinkConfig),
    /// Shutdown.
    Shutdown(LinkConfig),
    /// Keyboard.
    Keyboard,
    /// Mouse.
    Mouse,
}

impl ServiceKind {
    fn name(self) -> &'static str {
        match self {
            Self::Heartbeat(_) => "heartbeat",
            Self::Timesync(_) => "timesync",
            Self::Shutdown(_) => "shutdown",
            Self::Keyboard => "keyboard",
            Self::Mouse => "mouse",
        }
    }

    /// The class, and the instance that Hyper-V gives the first device of it.
    fn guids(self) -> (Guid, Guid) {
        match self {
            Self::Heartbeat(_) => (
                guid::HEARTBEAT,
                hv_proto::guid!("fd149e91-82e0-4a7d-afa6-2a4166cbd7c0"),
            ),
            Self::Timesync(_) => (
                guid::TIME_SYNC,
                hv_proto::guid!("2dd1ce17-079e-403c-b352-a1921ee207ee"),
            ),
            Self::Shutdown(_) => (
                guid::SHUTDOWN,
                hv_proto::guid!("b6650ff7-33bc-4840-8048-e0676786f393"),
            ),
            Self::Keyboard => (
                guid::KEYBOARD,
                hv_proto::guid!("d34b2567-b9b6-42b9-8778-0a4ec0b955bf"),
            ),
            Self::Mouse => (
                guid::MOUSE,
                hv_proto::guid!("99221fa0-24ad-11e2-be98-001aa01bbf6e"),
            ),
        }
    }

    /// One of each, with all their versions: what a machine normally has.
    pub fn all() -> Vec<Self> {
        vec![
            Self::Heartbeat(LinkConfig::new(heartbeat::VERSIONS)),
            Self::Timesync(LinkConfig::new(timesync::VERSIONS)),
            Self::Shutdown(LinkConfig::new(shutdown::VERSIONS)),
            Self::Keyboard,
            Self::Mouse,
        ]
    }
}

/// A device of a machine.
pub enum Service {
    /// Heartbeat.
    Heartbeat(Heartbeat),
    /// Time synchronization.
    Timesync(Timesync),
    /// Shutdown.
    Shutdown(Shutdown),
    /// Keyboard.
    Keyboard(Keyboard),
    /// Mouse.
    Mouse(Mouse),
}

impl Service {
    fn vsp(&self) -> Box<dyn Vsp> {
        match self {
            Self::Heartbeat(service) => service.vsp(),
            Self::Timesync(service) => service.vsp(),
            Self::Shutdown(service) => service.vsp(),
            Self::Keyboard(device) => device.vsp(),
            Self::Mouse(device) => device.vsp(),
        }
    }

    /// For conformance tests.
    pub fn port(&self) -> &Port {
        match self {
            Self::Heartbeat(service) => service.port(),
            Self::Timesync(service) => service.port(),
            Self::Shutdown(service) => service.port(),
            Self::Keyboard(device) => device.port(),
            Self::Mouse(device) => device.port(),
        }
    }

    /// How it stands.
    pub fn status(&self) -> ServiceStatus {
        match self {
            Self::Heartbeat(service) => ServiceStatus::Heartbeat(service.status()),
            Self::Timesync(service) => ServiceStatus::Timesync(service.status()),
            Self::Shutdown(service) => ServiceStatus::Shutdown(service.status()),
            Self::Keyboard(device) => ServiceStatus::Keyboard(device.status()),
            Self::Mouse(device) => ServiceStatus::Mouse(device.status()),
        }
    }
}

/// How a device stands, for display.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "as the variants of Service")]
pub enum ServiceStatus {
    Heartbeat(HeartbeatStatus),
    Timesync(TimesyncStatus),
    Shutdown(ShutdownStatus),
    Keyboard(KeyboardStatus),
    Mouse(MouseStatus),
}

/// Why something cannot be done with a device.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// There is none of this name.
    #[error("there is no device '{0}'")]
    NoSuchDevice(String),
    /// It is on the bus, or there is no bus.
    #[error("device '{name}' cannot be offered: {source}")]
    Offer {
        /// Its name.
        name: String,
        /// Why.
        source: OfferError,
    },
}

struct Entry {
    service: Arc<Service>,
    offer: OfferParams,
    handle: Option<OfferHandle>,
}

#[derive(Default)]
struct State {
    server: Weak<Server>,
    entries: BTreeMap<String, Entry>,
}

/// The devices of a machine. Dropping it takes them off the bus.
///
/// They are called as what they do: `heartbeat`, `timesync`, `shutdown`, `keyboard`, `mouse`; a
/// second one of a kind is `heartbeat1`, and so on.
#[derive(Default)]
pub struct Services(Mutex<State>);

impl Services {
    /// The devices of a machine, not on a bus yet.
    pub fn new(kinds: &[ServiceKind], events: &Events, clock: &Arc<dyn ReferenceClock>) -> Self {
        let mut entries = BTreeMap::new();
        for &kind in kinds {
            let known = |name: &String| entries.contains_key(name);
            let mut names = (0..).map(|number| match number {
                0 => (number, kind.name().to_owned()),
                _ => (number, format!("{}{number}", kind.name())),
            });
            // There are always more names than devices.
            let Some((number, name)) = names.find(|(_, name)| !known(name)) else {
                continue;
            };
            let events = events.clone();
            let service = match kind {
                ServiceKind::Heartbeat(link) => {
                    Service::Heartbeat(Heartbeat::new(&name, link, events))
                }
                ServiceKind::Timesync(link) => {
                    Service::Timesync(Timesync::new(&name, link, events, clock.clone()))
                }
                ServiceKind::Shutdown(link) => {
                    Service::Shutdown(Shutdown::new(&name, link, events))
                }
                ServiceKind::Keyboard => Service::Keyboard(Keyboard::new(&name, events)),
                ServiceKind::Mouse => Service::Mouse(Mouse::new(&name, events)),
            };
            let (class, first) = kind.guids();
            let mut instance = *first.as_bytes();
            if let Some(last) = instance.last_mut() {
                *last = last.wrapping_add(number);
            }
            let entry = Entry {
                service: Arc::new(service),
                offer: OfferParams::new(name.clone(), class, Guid::from_bytes(instance)),
                handle: None,
            };
            entries.insert(name, entry);
        }
        let server = Weak::new();
        Self(Mutex::new(State { server, entries }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// Puts all devices on a bus.
    ///
    /// # Errors
    /// The bus refuses one.
    pub fn connect(&self, server: &Arc<Server>) -> Result<(), ServiceError> {
        let mut state = self.lock();
        state.server = Arc::downgrade(server);
        let names: Vec<String> = state.entries.keys().cloned().collect();
        drop(state);
        names.iter().try_for_each(|name| self.offer(name))
    }

    /// Puts a device on the bus that is not there.
    ///
    /// # Errors
    /// There is no such device, or it is on the bus already, or the bus refuses.
    pub fn offer(&self, name: &str) -> Result<(), ServiceError> {
        let mut state = self.lock();
        let server = state.server.upgrade();
        let entry = state.entries.get_mut(name);
        let entry = entry.ok_or_else(|| ServiceError::NoSuchDevice(name.into()))?;
        let server = server.ok_or(OfferError::Gone);
        let handle = server.and_then(|server| match entry.handle {
            Some(_) => Err(OfferError::Duplicate(entry.offer.instance)),
            None => server.offer(entry.offer.clone(), entry.service.vsp()),
        });
        let handle = handle.map_err(|source| ServiceError::Offer {
            name: name.into(),
            source,
        })?;
        entry.handle = Some(handle);
        Ok(())
    }

    /// Takes a device off the bus, and waits for a while that the guest lets go of it.
    ///
    /// # Errors
    /// There is no such device on the bus.
    pub fn rescind(&self, name: &str) -> Result<(), ServiceError> {
        let handle = {
            let mut state = self.lock();
            let entry = state.entries.get_mut(name);
            entry.and_then(|entry| entry.handle.take())
        };
        let handle = handle.ok_or_else(|| ServiceError::NoSuchDevice(name.into()))?;
        if !handle.rescind_and_wait(RESCIND_TIMEOUT) {
            tracing::warn!("the guest still holds {name}");
        }
        Ok(())
    }

    /// A device by its name.
    pub fn get(&self, name: &str) -> Option<Arc<Service>> {
        let state = self.lock();
        state.entries.get(name).map(|entry| entry.service.clone())
    }

    /// Where the guest's sysfs has a device: its instance.
    pub fn instance(&self, name: &str) -> Option<Guid> {
        let state = self.lock();
        state.entries.get(name).map(|entry| entry.offer.instance)
    }
}

macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident: $variant:ident = $default:literal,)*) => {
        /// A device of the right kind.
        impl Services {
            $($(#[$doc])*
            ///
            /// # Errors
            /// There is no such device, or it does something else.
            pub fn $name<R>(
                &self,
                name: Option<&str>,
                f: impl FnOnce(&$variant) -> R,
            ) -> Result<R, ServiceError> {
                let name = name.unwrap_or($default);
                match self.get(name).as_deref() {
                    Some(Service::$variant(service)) => Ok(f(service)),
                    _ => Err(ServiceError::NoSuchDevice(name.into())),
                }
            })*
        }
    };
}

getters! {
    /// Works with a heartbeat; without a name the first.
    heartbeat: Heartbeat = "heartbeat",
    /// Works with a time synchronization.
    timesync: Timesync = "timesync",
    /// Works with a shutdown service.
    shutdown: Shutdown = "shutdown",
    /// Works with a keyboard.
    keyboard: Keyboard = "keyboard",
    /// Works with a mouse.
    mouse: Mouse = "mouse",
}
