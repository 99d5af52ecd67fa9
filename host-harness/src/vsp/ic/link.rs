// SPDX-License-Identifier: MIT OR Apache-2.0

//! The link between an integration component and its guest: negotiation, questions, answers.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hv_proto::ic::{Agreed, FRAME_VERSIONS, Host, HostEvent, MessageType, Status, Version};
use serde::Serialize;
use zerocopy::IntoBytes;

use crate::events::{Event, Events};
use crate::vmbus::Vsp;
use crate::vsp::port::{Handler, Port, PortError, SingleChannel, lock};

/// How long a question to the guest may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What a component speaks.
#[derive(Debug, Clone, Copy)]
pub struct LinkConfig {
    /// Versions of the frame that are offered to the guest, the best first.
    pub frames: &'static [Version],
    /// Versions of the service.
    pub versions: &'static [Version],
}

impl LinkConfig {
    /// All versions of the frame, and these of the service.
    pub fn new(versions: &'static [Version]) -> Self {
        Self {
            frames: FRAME_VERSIONS,
            versions,
        }
    }
}

/// Where a link stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// No driver of the guest has opened the channel.
    #[default]
    Closed,
    /// The guest has not yet said which version it speaks.
    Negotiating,
    /// The guest speaks none of the versions.
    NoCommonVersion,
    /// The service works.
    Ready,
}

/// What happened on a link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct LinkCounters {
    /// Messages of the service that were sent.
    pub requests: u64,
    /// Answers to them.
    pub answers: u64,
    /// Answers that say that the guest will not, or cannot.
    pub refusals: u64,
    /// Messages of the guest that make no sense, or that came too late.
    pub rejected: u64,
    /// Messages that could not be sent, because the guest does not empty its ring.
    pub unsent: u64,
}

/// A link, for display.
#[derive(Debug, Clone, Serialize)]
pub struct LinkStatus {
    /// Where it stands.
    pub state: LinkState,
    /// The version of the service that was negotiated.
    pub version: Option<String>,
    /// The version of the frame.
    pub frame: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub counters: LinkCounters,
}

/// Why the guest was not asked, or what came of it.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is no driver, or the message cannot be sent.
    #[error(transparent)]
    Port(#[from] PortError),
    /// No version was agreed on.
    #[error("the guest's driver has not agreed on a version")]
    NotReady,
    /// There is no answer.
    #[error("the guest does not answer")]
    NoAnswer,
    /// The guest says no.
    #[error("the guest refused, with status {0:#010x}")]
    Refused(u32),
    /// The message cannot be made now.
    #[error("{0}")]
    Impossible(String),
}

/// The part that is different for each service.
pub(super) trait Service: Send + 'static {
    /// Its messages.
    const MESSAGE_TYPE: MessageType;

    /// Versions were agreed on: the service begins.
    fn begin(&mut self, link: &mut Link);

    /// The guest has answered the last message. Answers that refuse do not come here.
    fn answer(&mut self, link: &mut Link, body: &[u8]);

    /// Looks at the clock; called often enough. Returns when to be called again.
    fn tick(&mut self, _link: &mut Link) -> Option<Duration> {
        None
    }

    /// The channel is closed: the guest is forgotten.
    fn end(&mut self);
}

/// The link as its service sees it.
pub(super) struct Link {
    pub name: String,
    pub events: Events,
    port: Arc<Port>,
    config: LinkConfig,
    session: Host<'static>,
    state: LinkState,
    counters: LinkCounters,
    /// Number of the last question, and of the last answered one with its answer.
    asked: u64,
    answered: (u64, Status),
    asked_at: Option<Instant>,
}

impl Link {
    /// The version that was agreed on.
    pub fn agreed(&self) -> Option<Agreed> {
        self.session.agreed()
    }

    /// How long ago the question was asked that is still open.
    pub fn waiting(&self) -> Option<Duration> {
        let asked_at = self.asked_at.filter(|_| self.session.is_waiting());
        asked_at.map(|at| at.elapsed())
    }

    /// Sends a message of the service.
    pub fn ask(&mut self, body: &[u8]) -> Result<(), AskError> {
        let header = self.session.request(body.len());
        let header = header.ok_or(AskError::NotReady)?;
        self.asked += 1;
        self.asked_at = Some(Instant::now());
        match self.port.send(&[header.as_bytes(), body]) {
            Ok(()) => self.counters.requests += 1,
            Err(error) => {
                self.counters.unsent += 1;
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn reset(&mut self, message_type: MessageType) {
        self.session = Host::new(message_type, self.config.frames, self.config.versions);
        self.state = LinkState::Closed;
        self.asked_at = None;
    }
}

struct State<S> {
    link: Link,
    service: S,
}

/// A component: a service and its link.
pub(super) struct Component<S> {
    port: Arc<Port>,
    state: Mutex<State<S>>,
    /// An answer came, or the channel closed.
    changed: Condvar,
}

impl<S: Service> Component<S> {
    pub fn new(name: &str, config: LinkConfig, events: Events, service: S) -> Arc<Self> {
        let port = Arc::<Port>::default();
        let link = Link {
            name: name.to_owned(),
            events,
            port: port.clone(),
            config,
            session: Host::new(S::MESSAGE_TYPE, config.frames, config.versions),
            state: LinkState::Closed,
            counters: LinkCounters::default(),
            asked: 0,
            answered: (0, Status::OK),
            asked_at: None,
        };
        Arc::new(Self {
            port,
            state: Mutex::new(State { link, service }),
            changed: Condvar::new(),
        })
    }

    pub fn vsp(self: &Arc<Self>) -> Box<dyn Vsp> {
        let name = self.lock().link.name.clone();
        Box::new(SingleChannel::new(&name, self.clone()))
    }

    pub fn port(&self) -> &Port {
        &self.port
    }

    fn lock(&self) -> MutexGuard<'_, State<S>> {
        lock(&self.state)
    }

    /// Looks at the service.
    pub fn with<R>(&self, f: impl FnOnce(&mut S) -> R) -> R {
        f(&mut self.lock().service)
    }

    pub fn status(&self) -> LinkStatus {
        let link = &self.lock().link;
        let agreed = link.agreed();
        LinkStatus {
            state: link.state,
            version: agreed.map(|agreed| agreed.message.to_string()),
            frame: agreed.map(|agreed| agreed.frame.to_string()),
            counters: link.counters,
        }
    }

    /// Sends a message that `make` makes, and waits for the answer.
    pub fn ask(
        &self,
        make: impl FnOnce(&mut S, &mut Link) -> Result<Vec<u8>, AskError>,
    ) -> Result<(), AskError> {
        let wait = |state, until: fn(&Link, u64) -> bool, ticket| {
            self.changed
                .wait_timeout_while(state, ANSWER_TIMEOUT, |state: &mut State<S>| {
                    state.link.state == LinkState::Ready && !until(&state.link, ticket)
                })
                .unwrap_or_else(PoisonError::into_inner)
                .0
        };
        // One question at a time: an earlier one is answered first, or never.
        let mut guard = wait(self.lock(), |link, _| link.waiting().is_none(), 0);
        let state = &mut *guard;
        match state.link.state {
            LinkState::Ready => {}
            LinkState::Closed => return Err(PortError::Closed.into()),
            LinkState::Negotiating | LinkState::NoCommonVersion => return Err(AskError::NotReady),
        }
        let body = make(&mut state.service, &mut state.link)?;
        state.link.ask(&body)?;
        let ticket = state.link.asked;
        let state = wait(guard, |link, ticket| link.answered.0 >= ticket, ticket);
        match state.link.answered {
            (number, Status::OK) if number == ticket => Ok(()),
            (number, status) if number == ticket => Err(AskError::Refused(status.get())),
            _ if state.link.state == LinkState::Closed => Err(PortError::Closed.into()),
            _ => Err(AskError::NoAnswer),
        }
    }
}

impl<S: Service> Handler for Component<S> {
    fn port(&self) -> &Port {
        &self.port
    }

    fn opened(&self) {
        let link = &mut self.lock().link;
        link.reset(S::MESSAGE_TYPE);
        link.state = LinkState::Negotiating;
        let Some((header, question)) = link.session.negotiate() else {
            tracing::error!(device = link.name, "too many versions to negotiate");
            return;
        };
        if let Err(error) = self.port.send(&[header.as_bytes(), question.as_bytes()]) {
            tracing::warn!(device = link.name, %error, "the negotiation is not sent");
        }
    }

    fn message(&self, payload: &[u8]) {
        let mut state = self.lock();
        let State { link, service } = &mut *state;
        match link.session.on_message(payload) {
            Ok(HostEvent::Agreed(agreed)) => {
                link.state = LinkState::Ready;
                link.events.publish(Event::Negotiated {
                    device: link.name.clone(),
                    version: agreed.message.to_string(),
                });
                service.begin(link);
            }
            Ok(HostEvent::NoCommonVersion) => {
                tracing::warn!(device = link.name, "the guest speaks none of our versions");
                link.state = LinkState::NoCommonVersion;
            }
            Ok(HostEvent::Answer { status, body }) => {
                link.counters.answers += 1;
                link.answered = (link.asked, status);
                if status == Status::OK {
                    service.answer(link, body);
                } else {
                    link.counters.refusals += 1;
                }
            }
            Err(error) => {
                tracing::debug!(device = link.name, %error, "a message is rejected");
                link.counters.rejected += 1;
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn tick(&self) -> Option<Duration> {
        let State { link, service } = &mut *self.lock();
        service.tick(link)
    }

    fn closed(&self) {
        let State { link, service } = &mut *self.lock();
        link.reset(S::MESSAGE_TYPE);
        service.end();
        self.changed.notify_all();
    }
}
