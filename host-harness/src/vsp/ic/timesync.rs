// SPDX-License-Identifier: MIT OR Apache-2.0

//! Time synchronization: tells the guest what time it is when its driver comes, whenever the
//! operator wants, and every few seconds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hv_proto::ic::MessageType;
use hv_proto::ic::timesync::{Flags, HostTime, Leap, PlainBody, ReferenceBody, V4};
use serde::Serialize;
use zerocopy::IntoBytes;

use super::link::{AskError, Component, Link, LinkConfig, LinkStatus, Service};
use crate::events::Events;
use crate::hypervisor::ReferenceClock;
use crate::vmbus::Vsp;
use crate::vsp::port::Port;

/// How often a sample is sent.
const PERIOD: Duration = Duration::from_secs(5);

/// The time synchronization, for display.
#[derive(Debug, Clone, Serialize)]
pub struct TimesyncStatus {
    /// What is added to the host's time.
    pub offset_ms: i64,
    /// How long the last message and its answer took.
    pub round_trip_us: Option<u64>,
    /// The link.
    #[serde(flatten)]
    pub link: LinkStatus,
}

struct Telling {
    clock: Arc<dyn ReferenceClock>,
    /// What is added to the host's time.
    offset_ms: i64,
    /// Whether samples are sent.
    samples: bool,
    sent: Option<Instant>,
    round_trip: Option<Duration>,
}

impl Telling {
    /// A message for the version that was agreed on.
    fn body(&mut self, link: &Link, flags: Flags) -> Result<Vec<u8>, AskError> {
        let impossible = |why: &str| AskError::Impossible(why.into());
        let version = link.agreed().ok_or(AskError::NotReady)?.message;
        let now = self.clock.now();
        let now = now.ok_or_else(|| impossible("the machine has no clock now"))?;
        let time = self
            .offset_ms
            .checked_mul(1_000_000)
            .and_then(|offset| now.unix_ns.checked_add(offset))
            .and_then(HostTime::from_unix_ns)
            .ok_or_else(|| impossible("there is no such time"))?;
        self.sent = Some(Instant::now());
        Ok(if version >= V4 {
            let body = ReferenceBody {
                parent_time: time.raw().into(),
                reference_time: now.counter.into(),
                flags: flags.bits(),
                // How good this host's clock is is not known; 0 says so (RFC 5905, stratum).
                leap: Leap::NONE,
                stratum: 0,
                reserved: [0; 3],
            };
            body.as_bytes().to_vec()
        } else {
            let round_trip = self.round_trip.unwrap_or_default().as_nanos() / 100;
            let body = PlainBody {
                parent_time: time.raw().into(),
                child_time: 0.into(),
                round_trip_time: u64::try_from(round_trip).unwrap_or(u64::MAX).into(),
                flags: flags.bits(),
            };
            body.as_bytes().to_vec()
        })
    }

    /// Sends a message of the provider's own accord.
    fn tell(&mut self, link: &mut Link, flags: Flags) {
        let told = self.body(link, flags).and_then(|body| link.ask(&body));
        if let Err(error) = told {
            tracing::debug!(device = link.name, %error, "the guest is not told the time");
        }
    }
}

impl Service for Telling {
    const MESSAGE_TYPE: MessageType = MessageType::TIMESYNC;

    fn begin(&mut self, link: &mut Link) {
        self.tell(link, Flags::SYNC);
    }

    fn answer(&mut self, _link: &mut Link, _body: &[u8]) {
        self.round_trip = self.sent.take().map(|sent| sent.elapsed());
    }

    fn tick(&mut self, link: &mut Link) -> Option<Duration> {
        // A guest that does not answer is told again when the time is worth it.
        if self.samples && link.waiting().is_none_or(|waiting| waiting >= 4 * PERIOD) {
            self.tell(link, Flags::SAMPLE);
        }
        Some(PERIOD)
    }

    fn end(&mut self) {
        self.sent = None;
        self.round_trip = None;
    }
}

/// The provider of time synchronization.
pub struct Timesync(Arc<Component<Telling>>);

impl Timesync {
    /// A provider that speaks these versions and tells the time of this clock.
    pub fn new(
        name: &str,
        config: LinkConfig,
        events: Events,
        clock: Arc<dyn ReferenceClock>,
    ) -> Self {
        let service = Telling {
            clock,
            offset_ms: 0,
            samples: true,
            sent: None,
            round_trip: None,
        };
        Self(Component::new(name, config, events, service))
    }

    pub(crate) fn vsp(&self) -> Box<dyn Vsp> {
        self.0.vsp()
    }

    /// For conformance tests.
    pub fn port(&self) -> &Port {
        self.0.port()
    }

    /// Whether samples are sent every few seconds, as they are without this.
    pub fn set_samples(&self, samples: bool) {
        self.0.with(|service| service.samples = samples);
    }

    /// Tells the guest the time now, and waits for its answer. What is added to the host's time
    /// holds for all later messages too, until it is changed; after an error it is what it was.
    ///
    /// # Errors
    /// The guest has no driver, or does not answer, or the time cannot be told.
    pub fn send(&self, flags: Flags, offset_ms: i64) -> Result<(), AskError> {
        let mut before = offset_ms;
        let result = self.0.ask(|service, link| {
            before = std::mem::replace(&mut service.offset_ms, offset_ms);
            let body = service.body(link, flags);
            if body.is_err() {
                service.offset_ms = before;
            }
            body
        });
        if result.is_err() {
            self.0.with(|service| {
                // Unless another caller has changed it meanwhile.
                if service.offset_ms == offset_ms {
                    service.offset_ms = before;
                }
            });
        }
        result
    }

    /// How it stands.
    pub fn status(&self) -> TimesyncStatus {
        let link = self.0.status();
        self.0.with(|service| TimesyncStatus {
            offset_ms: service.offset_ms,
            round_trip_us: service
                .round_trip
                .map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
            link,
        })
    }
}
