// SPDX-License-Identifier: MIT OR Apache-2.0

//! Heartbeat: asks the guest every two seconds whether it is there, and knows since when it is not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hv_proto::ic::MessageType;
use hv_proto::ic::heartbeat::{Body, PERIOD_SECONDS, is_answer};
use serde::Serialize;
use zerocopy::IntoBytes;

use super::link::{Component, Link, LinkConfig, LinkStatus, Service};
use crate::events::{Event, Events};
use crate::vmbus::Vsp;
use crate::vsp::port::Port;

/// How often the guest is asked.
const PERIOD: Duration = Duration::from_secs(PERIOD_SECONDS as u64);
/// A guest that did not answer for so many periods is lost.
const LOST: u32 = 3;
/// A question that was not answered for so many periods is asked again. Before that, more questions
/// would only fill the ring of a guest that is paused.
const REPEAT: u32 = 5;

/// How the guest is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Heart {
    /// It has not answered yet, or has no driver.
    #[default]
    Unknown,
    /// It answers.
    Beats,
    /// It did, and does not any more.
    Lost,
}

/// The heartbeat, for display.
#[derive(Debug, Clone, Serialize)]
pub struct HeartbeatStatus {
    /// How the guest is.
    pub heart: Heart,
    /// How long ago the last right answer came.
    pub age_ms: Option<u64>,
    /// Right answers since the guest's driver opened the channel.
    pub beats: u64,
    /// Answers with a wrong number.
    pub wrong: u64,
    /// The link.
    #[serde(flatten)]
    pub link: LinkStatus,
}

struct Beating {
    period: Duration,
    heart: Heart,
    sequence: u64,
    /// The last right answer.
    last: Option<Instant>,
    /// When versions were agreed on.
    begun: Option<Instant>,
    beats: u64,
    wrong: u64,
}

impl Service for Beating {
    const MESSAGE_TYPE: MessageType = MessageType::HEARTBEAT;

    fn begin(&mut self, link: &mut Link) {
        self.end();
        self.begun = Some(Instant::now());
        self.beat(link);
    }

    fn answer(&mut self, link: &mut Link, body: &[u8]) {
        if !is_answer(self.sequence, body) {
            self.wrong += 1;
            tracing::debug!(device = link.name, "a heartbeat with a wrong number");
            return;
        }
        self.beats += 1;
        self.last = Some(Instant::now());
        if std::mem::replace(&mut self.heart, Heart::Beats) == Heart::Lost {
            let device = link.name.clone();
            link.events.publish(Event::HeartbeatRecovered { device });
        }
    }

    fn tick(&mut self, link: &mut Link) -> Option<Duration> {
        let Some(since) = self.last.or(self.begun) else {
            return Some(self.period);
        };
        let age = since.elapsed();
        if age >= self.period * LOST && self.heart != Heart::Lost {
            self.heart = Heart::Lost;
            link.events.publish(Event::HeartbeatLost {
                device: link.name.clone(),
                age_ms: milliseconds(age),
            });
        }
        if link
            .waiting()
            .is_none_or(|waiting| waiting >= self.period * REPEAT)
        {
            self.beat(link);
        }
        Some(self.period)
    }

    fn end(&mut self) {
        *self = Self {
            wrong: self.wrong,
            ..Self::new(self.period)
        };
    }
}

impl Beating {
    fn new(period: Duration) -> Self {
        Self {
            period,
            heart: Heart::Unknown,
            sequence: 0,
            last: None,
            begun: None,
            beats: 0,
            wrong: 0,
        }
    }

    fn beat(&mut self, link: &mut Link) {
        self.sequence = self.sequence.wrapping_add(1);
        // What cannot be sent is counted, and tried again.
        let _ = link.ask(Body::new(self.sequence).as_bytes());
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The provider of heartbeats.
pub struct Heartbeat(Arc<Component<Beating>>);

impl Heartbeat {
    /// A provider that speaks these versions.
    pub fn new(name: &str, config: LinkConfig, events: Events) -> Self {
        Self::with_period(name, config, events, PERIOD)
    }

    pub(super) fn with_period(
        name: &str,
        config: LinkConfig,
        events: Events,
        period: Duration,
    ) -> Self {
        Self(Component::new(name, config, events, Beating::new(period)))
    }

    pub(crate) fn vsp(&self) -> Box<dyn Vsp> {
        self.0.vsp()
    }

    /// For conformance tests.
    pub fn port(&self) -> &Port {
        self.0.port()
    }

    /// How the guest is.
    pub fn status(&self) -> HeartbeatStatus {
        let link = self.0.status();
        self.0.with(|beating| HeartbeatStatus {
            heart: beating.heart,
            age_ms: beating.last.map(|last| milliseconds(last.elapsed())),
            beats: beating.beats,
            wrong: beating.wrong,
            link,
        })
    }
}
