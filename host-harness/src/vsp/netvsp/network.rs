// SPDX-License-Identifier: MIT OR Apache-2.0

//! The NICs of a machine, and what can be done with them while the machine runs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use hv_proto::net::nvsp::Version;

use super::nic::{Injection, Nic, NicConfig, NicStatus, Tamper};
use crate::net::{
    Backend, BackendOption, Capture, CaptureInterface, MAX_QUEUES, NetError, NetOptions, Passt, Tap,
};
use crate::vmbus::{OfferError, OfferHandle, Server};

/// How long the removal of a NIC waits for the guest to let go.
const RESCIND_TIMEOUT: Duration = Duration::from_secs(10);

/// Most queues of a NIC whose user did not say how many.
const DEFAULT_QUEUES: u16 = 8;

/// An operation on the network failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The network behind a NIC, or a capture.
    #[error(transparent)]
    Net(#[from] NetError),
    /// There is a NIC of this name.
    #[error("there is a NIC '{0}' already")]
    DuplicateName(String),
    /// There is no NIC of this name.
    #[error("there is no NIC '{0}'")]
    NoSuchNic(String),
    /// There are as many as can be.
    #[error("there are 256 NICs already")]
    TooMany,
    /// The bus refused.
    #[error("NIC {nic}: {source}")]
    Offer {
        /// Name of the NIC.
        nic: String,
        /// The reason.
        source: OfferError,
    },
    /// The system refused a thread.
    #[error("NIC {nic}: {source}")]
    Thread {
        /// Name of the NIC.
        nic: String,
        /// The reason.
        source: std::io::Error,
    },
    /// The guest has not opened the NIC, or does not read.
    #[error("NIC {nic}: {reason}")]
    Injection {
        /// Name of the NIC.
        nic: String,
        /// The reason.
        reason: String,
    },
}

/// A NIC on a network that is open already.
pub struct NicParams {
    /// Its name; made up without one.
    pub id: Option<String>,
    /// The address; made from its number without one.
    pub mac: Option<[u8; 6]>,
    /// The largest MTU of the guest.
    pub mtu: u16,
    /// Most channels.
    pub queues: u16,
    /// Newest version of NVSP that is accepted.
    pub max_version: Version,
    /// Whether the cable is in.
    pub link: bool,
    /// A capture of its own.
    pub capture: Option<Arc<Capture>>,
    /// The network.
    pub backend: Arc<dyn Backend>,
}

impl NicParams {
    /// A NIC with as many channels as its network has queues.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self {
            id: None,
            mac: None,
            mtu: 1500,
            queues: backend.queues(),
            max_version: Version::V6_1,
            link: true,
            capture: None,
            backend,
        }
    }
}

struct Entry {
    number: u8,
    /// Before the NIC: the guest lets go first.
    offer: Option<OfferHandle>,
    nic: Arc<Nic>,
}

#[derive(Default)]
struct State {
    server: Weak<Server>,
    nics: BTreeMap<String, Entry>,
}

/// The NICs of a machine. Dropping it takes all of them away.
///
/// They are called by their `id` option, else `net0`, `net1`, ...
pub struct Network {
    /// Queues of a NIC whose user did not say how many.
    default_queues: u16,
    capture: Option<Arc<Capture>>,
    state: Mutex<State>,
}

impl Network {
    /// The network of a machine with so many processors, without NICs and not connected to a bus
    /// yet. All that crosses its NICs goes to the file `pcap`.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn new(processors: u32, pcap: Option<&Path>) -> Result<Self, NetworkError> {
        let processors = u16::try_from(processors).unwrap_or(u16::MAX);
        Ok(Self {
            default_queues: processors.clamp(1, DEFAULT_QUEUES),
            capture: pcap.map(Capture::create).transpose()?,
            state: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The map is consistent whenever something can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offers all NICs on a bus. NICs that come later are offered when they come.
    ///
    /// # Errors
    /// The bus refuses an offer.
    pub fn connect(&self, server: &Arc<Server>) -> Result<(), NetworkError> {
        let mut state = self.lock();
        state.server = Arc::downgrade(server);
        let State { server, nics } = &mut *state;
        for (name, entry) in nics {
            entry.offer(name, server)?;
        }
        Ok(())
    }

    /// Opens a network and adds a NIC on it; a running guest sees it at once. Returns its name.
    ///
    /// # Errors
    /// The network cannot be opened, or the name is taken.
    pub fn add(&self, options: &NetOptions) -> Result<String, NetworkError> {
        if let Some(id) = &options.id
            && self.lock().nics.contains_key(id)
        {
            return Err(NetworkError::DuplicateName(id.clone()));
        }
        let capture = options.pcap.as_deref().map(Capture::create).transpose()?;
        let backend: Arc<dyn Backend> = match &options.backend {
            BackendOption::Tap(name) => {
                Arc::new(Tap::open(name, options.queues, self.default_queues)?)
            }
            BackendOption::Passt(passt) => Arc::new(Passt::start(passt, options.mtu)?),
        };
        self.add_nic(NicParams {
            id: options.id.clone(),
            mac: options.mac,
            mtu: options.mtu,
            queues: options.queues.unwrap_or(self.default_queues),
            link: options.link,
            capture,
            ..NicParams::new(backend)
        })
    }

    /// Adds a NIC on a network that is open; a running guest sees it at once. Returns its name.
    ///
    /// # Errors
    /// The name is taken, or the bus refuses.
    pub fn add_nic(&self, params: NicParams) -> Result<String, NetworkError> {
        let mut state = self.lock();
        let number = (0..=u8::MAX)
            .find(|number| state.nics.values().all(|entry| entry.number != *number))
            .ok_or(NetworkError::TooMany)?;
        let name = match params.id {
            Some(id) => id,
            None => (0u32..)
                .map(|number| format!("net{number}"))
                .find(|name| !state.nics.contains_key(name))
                .unwrap_or_default(),
        };
        if state.nics.contains_key(&name) {
            return Err(NetworkError::DuplicateName(name));
        }
        // The prefix is the one of Hyper-V's adapters.
        let mac = params.mac.unwrap_or([0x00, 0x15, 0x5d, 0x56, 0x44, number]);
        let captures: Vec<CaptureInterface> = [&self.capture, &params.capture]
            .into_iter()
            .flatten()
            .map(|capture| capture.interface(&name, mac))
            .collect();
        let nic = Nic::new(NicConfig {
            name: name.clone(),
            number,
            mac,
            mtu: params.mtu,
            queues: params.queues.clamp(1, MAX_QUEUES),
            max_version: params.max_version,
            link: params.link,
            backend: params.backend,
            captures,
        })
        .map_err(|source| NetworkError::Thread {
            nic: name.clone(),
            source,
        })?;
        let mut entry = Entry {
            number,
            offer: None,
            nic: Arc::new(nic),
        };
        entry.offer(&name, &state.server)?;
        state.nics.insert(name.clone(), entry);
        Ok(name)
    }

    /// Takes a NIC off the bus; to the guest this is a rescind.
    ///
    /// # Errors
    /// There is no such NIC.
    pub fn remove(&self, name: &str) -> Result<(), NetworkError> {
        let entry = self.lock().nics.remove(name);
        let entry = entry.ok_or_else(|| NetworkError::NoSuchNic(name.into()))?;
        if let Some(offer) = entry.offer
            && !offer.rescind_and_wait(RESCIND_TIMEOUT)
        {
            tracing::warn!("the guest still holds {name}");
        }
        Ok(())
    }

    fn with_nic<R>(&self, name: &str, f: impl FnOnce(&Nic) -> R) -> Result<R, NetworkError> {
        // Without the lock, because the guest may have to be waited for.
        let nic = self.lock().nics.get(name).map(|entry| entry.nic.clone());
        nic.map(|nic| f(&nic))
            .ok_or_else(|| NetworkError::NoSuchNic(name.into()))
    }

    /// Puts the cable of a NIC in or takes it out; the guest is told.
    ///
    /// # Errors
    /// There is no such NIC.
    pub fn set_link(&self, name: &str, up: bool) -> Result<(), NetworkError> {
        self.with_nic(name, |nic| nic.set_link(up))
    }

    /// Lets a NIC take what the guest sends, and answer nothing of it, until it is told otherwise. What came
    /// meanwhile is never answered. A testing aid.
    ///
    /// # Errors
    /// There is no such NIC.
    pub fn set_silent(&self, name: &str, silent: bool) -> Result<(), NetworkError> {
        self.with_nic(name, |nic| nic.set_silent(silent))
    }

    /// Does to the guest what a host must not do. A testing aid.
    ///
    /// # Errors
    /// There is no such NIC, or the guest has not opened it.
    pub fn inject(&self, name: &str, injection: &Injection) -> Result<(), NetworkError> {
        self.with_nic(name, |nic| nic.inject(injection))?
            .map_err(|reason| NetworkError::Injection {
                nic: name.into(),
                reason,
            })
    }

    /// Lets this see the control messages and completions of a NIC, and replace them, before the guest sees
    /// them; `None` ends that. A testing aid.
    ///
    /// # Errors
    /// There is no such NIC.
    pub fn tamper(&self, name: &str, tamper: Option<Arc<Tamper>>) -> Result<(), NetworkError> {
        self.with_nic(name, |nic| nic.set_tamper(tamper))
    }

    /// The NICs.
    pub fn nics(&self) -> Vec<NicStatus> {
        let state = self.lock();
        state
            .nics
            .values()
            .map(|entry| entry.nic.status())
            .collect()
    }
}

impl Entry {
    /// Offers the NIC, if there is a bus and it is not offered.
    fn offer(&mut self, name: &str, server: &Weak<Server>) -> Result<(), NetworkError> {
        if self.offer.is_none()
            && let Some(server) = server.upgrade()
        {
            let (params, vsp) = self.nic.device();
            let offer = server.offer(params, vsp);
            self.offer = Some(offer.map_err(|source| NetworkError::Offer {
                nic: name.into(),
                source,
            })?);
        }
        Ok(())
    }
}
