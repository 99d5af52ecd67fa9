// SPDX-License-Identifier: MIT OR Apache-2.0

//! Events: what happens in a host, for those who want to follow it (the control API, tests).
//!
//! [`Events`] is the one place where they are published; a [`Subscription`] gets those that come
//! after it was made. Nobody waits for a slow reader: its queue is bounded, the oldest events are
//! dropped, and it is told how many.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Events that a reader may be behind.
const MAX_QUEUED: usize = 1024;

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The reader was too slow: so many events before this one are lost to it.
    Lost {
        /// How many.
        count: u64,
    },
    /// The virtual processors were stopped by the operator.
    Paused,
    /// They go on.
    Resumed,
    /// The guest reset itself and starts again.
    Reset,
    /// The guest reported a crash.
    Crashed {
        /// The processor that reported.
        vp: u32,
        /// The crash registers.
        parameters: [u64; 5],
    },
    /// The virtual machine has ended.
    Ended {
        /// Why, as text.
        reason: String,
    },
    /// The guest's bus driver has connected.
    Connected {
        /// The version of VMBus.
        version: String,
    },
    /// The guest's bus driver has left, or its connection was cut by a reset.
    Disconnected,
    /// A device was put on the bus.
    DeviceAdded {
        /// Its name.
        device: String,
        /// Its class GUID.
        class: String,
        /// Its instance GUID, by which the guest's sysfs calls it.
        instance: String,
    },
    /// A device was taken off the bus, and the guest has let go of it.
    DeviceRemoved {
        /// Its name.
        device: String,
    },
    /// The guest opened a channel.
    ChannelOpened {
        /// Name of the device.
        device: String,
        /// 0 for the primary channel.
        index: u16,
    },
    /// The guest's driver of a device has agreed on a version.
    Negotiated {
        /// Name of the device.
        device: String,
        /// The version.
        version: String,
    },
    /// The guest does not answer heartbeats any more.
    HeartbeatLost {
        /// Name of the device.
        device: String,
        /// How long ago the last answer came.
        age_ms: u64,
    },
    /// A guest whose heartbeat was lost answers again.
    HeartbeatRecovered {
        /// Name of the device.
        device: String,
    },
    /// The guest has agreed to end.
    ShutdownAgreed {
        /// Name of the device.
        device: String,
        /// What it will do: `power off`, `reboot` or `hibernate`.
        action: String,
    },
    /// The guest has switched the keyboard's indicator lights.
    Leds {
        /// Name of the device.
        device: String,
        /// Whether it is on.
        scroll_lock: bool,
        /// Whether it is on.
        num_lock: bool,
        /// Whether it is on.
        caps_lock: bool,
    },
    /// A channel is closed.
    ChannelClosed {
        /// Name of the device.
        device: String,
        /// 0 for the primary channel.
        index: u16,
    },
}

/// An event with its number and time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Record {
    /// Counts the events of a host; the first is 1.
    pub sequence: u64,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// Where events are published. Clones are the same place.
#[derive(Debug, Clone, Default)]
pub struct Events(Arc<Mutex<Hub>>);

#[derive(Debug, Default)]
struct Hub {
    sequence: u64,
    closed: bool,
    readers: Vec<Weak<Reader>>,
}

#[derive(Debug, Default)]
struct Reader {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    records: VecDeque<Record>,
    /// Events that were dropped before the first of `records`.
    lost: u64,
    closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing can panic while one of these is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| {
        u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
    })
}

impl Events {
    /// Tells all readers. Never waits for one, and may be called with any lock held.
    pub fn publish(&self, event: Event) {
        let mut hub = lock(&self.0);
        if hub.closed {
            return;
        }
        hub.sequence += 1;
        let record = Record {
            sequence: hub.sequence,
            time_ms: now_ms(),
            event,
        };
        hub.readers.retain(|reader| {
            let Some(reader) = reader.upgrade() else {
                return false;
            };
            let mut queue = lock(&reader.queue);
            if queue.records.len() >= MAX_QUEUED {
                queue.records.pop_front();
                queue.lost += 1;
            }
            queue.records.push_back(record.clone());
            reader.changed.notify_all();
            true
        });
    }

    /// Starts to collect events for a reader.
    pub fn subscribe(&self) -> Subscription {
        let mut hub = lock(&self.0);
        let reader = Arc::<Reader>::default();
        lock(&reader.queue).closed = hub.closed;
        hub.readers.push(Arc::downgrade(&reader));
        Subscription(reader)
    }

    /// The end: readers get what is left, then learn that nothing follows.
    pub fn close(&self) {
        let mut hub = lock(&self.0);
        hub.closed = true;
        for reader in hub.readers.drain(..).filter_map(|reader| reader.upgrade()) {
            lock(&reader.queue).closed = true;
            reader.changed.notify_all();
        }
    }
}

/// What a reader gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// The next event.
    Record(Record),
    /// None came in time.
    Timeout,
    /// None will come any more.
    Closed,
}

/// A reader's place among the events.
#[derive(Debug)]
pub struct Subscription(Arc<Reader>);

impl Subscription {
    /// Waits for the next event.
    pub fn next(&self, timeout: Duration) -> Next {
        let deadline = Instant::now() + timeout;
        let mut queue = lock(&self.0.queue);
        loop {
            if queue.lost > 0
                && let Some(first) = queue.records.front()
            {
                // Takes the place of the last one that was dropped.
                let (sequence, time_ms) = (first.sequence.saturating_sub(1), first.time_ms);
                let count = std::mem::take(&mut queue.lost);
                return Next::Record(Record {
                    sequence,
                    time_ms,
                    event: Event::Lost { count },
                });
            }
            if let Some(record) = queue.records.pop_front() {
                return Next::Record(record);
            }
            if queue.closed {
                return Next::Closed;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Next::Timeout;
            }
            queue = self
                .0
                .changed
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for an event that `wanted` picks out, and forgets those before it. `None` if it does
    /// not come in time.
    pub fn find(&self, timeout: Duration, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.next(deadline.saturating_duration_since(Instant::now())) {
                Next::Record(record) if wanted(&record.event) => return Some(record.event),
                Next::Record(_) => {}
                Next::Timeout | Next::Closed => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_get_what_comes_after_them_in_order() {
        let events = Events::default();
        events.publish(Event::Paused);
        let reader = events.subscribe();
        events.publish(Event::Resumed);
        events.publish(Event::Reset);
        events.close();
        events.publish(Event::Paused);
        for (sequence, event) in [(2, Event::Resumed), (3, Event::Reset)] {
            let Next::Record(record) = reader.next(Duration::ZERO) else {
                panic!("no event");
            };
            assert_eq!((record.sequence, record.event), (sequence, event));
        }
        assert_eq!(reader.next(Duration::from_secs(9)), Next::Closed);
        assert_eq!(
            events.subscribe().next(Duration::from_secs(9)),
            Next::Closed
        );
    }

    #[test]
    fn a_slow_reader_loses_the_oldest_and_is_told() {
        let events = Events::default();
        let reader = events.subscribe();
        for _ in 0..MAX_QUEUED + 3 {
            events.publish(Event::Reset);
        }
        let mut got = Vec::new();
        while let Next::Record(record) = reader.next(Duration::ZERO) {
            got.push(record);
        }
        assert_eq!(got.len(), MAX_QUEUED + 1);
        assert_eq!(got[0].event, Event::Lost { count: 3 });
        assert_eq!((got[0].sequence, got[1].sequence), (3, 4));
    }

    #[test]
    fn a_reader_that_went_is_forgotten() {
        let events = Events::default();
        drop(events.subscribe());
        events.publish(Event::Reset);
        assert!(lock(&events.0).readers.is_empty());
    }

    #[test]
    fn json_names_the_event() {
        let record = Record {
            sequence: 1,
            time_ms: 2,
            event: Event::Lost { count: 3 },
        };
        assert_eq!(
            serde_json::to_string(&record).unwrap(),
            r#"{"sequence":1,"time_ms":2,"event":"lost","count":3}"#
        );
    }
}
