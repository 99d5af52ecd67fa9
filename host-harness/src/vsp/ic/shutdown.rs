// SPDX-License-Identifier: MIT OR Apache-2.0

//! Shutdown: asks the guest to power off, reboot or hibernate, and says what it answered.

use std::sync::Arc;

use hv_proto::ic::MessageType;
use hv_proto::ic::shutdown::{Action, Body};
use serde::Serialize;
use zerocopy::IntoBytes;

use super::link::{AskError, Component, Link, LinkConfig, LinkStatus, Service};
use crate::events::{Event, Events};
use crate::vmbus::Vsp;
use crate::vsp::port::Port;

/// The shutdown service, for display.
#[derive(Debug, Clone, Serialize)]
pub struct ShutdownStatus {
    /// What the guest agreed to do, since its driver opened the channel.
    pub agreed: Option<String>,
    /// The link.
    #[serde(flatten)]
    pub link: LinkStatus,
}

#[derive(Default)]
struct Asking {
    action: Option<Action>,
    agreed: Option<Action>,
}

impl Service for Asking {
    const MESSAGE_TYPE: MessageType = MessageType::SHUTDOWN;

    fn begin(&mut self, _link: &mut Link) {}

    fn answer(&mut self, link: &mut Link, _body: &[u8]) {
        self.agreed = self.action;
        if let Some(action) = self.action {
            link.events.publish(Event::ShutdownAgreed {
                device: link.name.clone(),
                action: action.to_string(),
            });
        }
    }

    fn end(&mut self) {
        *self = Self::default();
    }
}

/// The provider of shutdown.
pub struct Shutdown(Arc<Component<Asking>>);

impl Shutdown {
    /// A provider that speaks these versions.
    pub fn new(name: &str, config: LinkConfig, events: Events) -> Self {
        Self(Component::new(name, config, events, Asking::default()))
    }

    pub(crate) fn vsp(&self) -> Box<dyn Vsp> {
        self.0.vsp()
    }

    /// For conformance tests.
    pub fn port(&self) -> &Port {
        self.0.port()
    }

    /// Asks the guest, and waits for its answer: success means that it will, and the end of the
    /// machine then comes when the guest is done.
    ///
    /// # Errors
    /// The guest has no driver, or does not answer, or will not.
    pub fn request(
        &self,
        action: Action,
        force: bool,
        timeout_seconds: u32,
        message: &str,
    ) -> Result<(), AskError> {
        self.0.ask(|service, _| {
            service.action = Some(action);
            let body = Body::new(action, force, timeout_seconds, message);
            Ok(body.as_bytes().to_vec())
        })
    }

    /// How it stands.
    pub fn status(&self) -> ShutdownStatus {
        let link = self.0.status();
        self.0.with(|service| ShutdownStatus {
            agreed: service.agreed.map(|action| action.to_string()),
            link,
        })
    }
}
