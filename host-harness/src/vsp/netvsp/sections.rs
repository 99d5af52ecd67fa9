// SPDX-License-Identifier: MIT OR Apache-2.0

//! The receive buffer of a guest: which of its sections are free, and which packets hold the others.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hv_proto::net::Span;
use hv_proto::net::sections::Sections;

use crate::vmbus::GpadlView;

/// Sections that frames leave to control messages, which must not be lost.
const RESERVED: usize = 4;

struct State {
    /// Indices. The one that was used last is used next: it may still be in a cache.
    free: Vec<u32>,
    /// The buffer is being taken back.
    closed: bool,
}

/// A receive buffer that the guest shares.
pub(super) struct ReceiveBuffer {
    view: GpadlView,
    sections: Sections,
    state: Mutex<State>,
    given: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that can panic runs with these held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ReceiveBuffer {
    pub fn new(view: GpadlView, sections: Sections) -> Arc<Self> {
        Arc::new(Self {
            view,
            sections,
            state: Mutex::new(State {
                free: (0..sections.count()).rev().collect(),
                closed: false,
            }),
            given: Condvar::new(),
        })
    }

    /// Bytes of a section.
    pub fn section_size(&self) -> u32 {
        self.sections.size()
    }

    /// Number of free sections.
    pub fn free(&self) -> usize {
        lock(&self.state).free.len()
    }

    /// Number of sections.
    pub fn count(&self) -> usize {
        self.sections.count() as usize
    }

    /// Takes a section for a message, waiting for one so long.
    fn take(self: &Arc<Self>, leave: usize, limit: Duration) -> Option<Section> {
        let (mut state, _) = self
            .given
            .wait_timeout_while(lock(&self.state), limit, |state| {
                state.free.len() <= leave && !state.closed
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.closed || state.free.len() <= leave {
            return None;
        }
        let index = state.free.pop()?;
        drop(state);
        Some(Section {
            buffer: Arc::clone(self),
            index,
        })
    }

    /// Takes a section for a frame.
    pub fn take_for_frame(self: &Arc<Self>, limit: Duration) -> Option<Section> {
        // A small buffer is not all reserve.
        self.take(RESERVED.min(self.count() / 2), limit)
    }

    /// Takes a section for a control message.
    pub fn take_for_control(self: &Arc<Self>, limit: Duration) -> Option<Section> {
        self.take(0, limit)
    }

    /// Ends all waiting for sections.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.given.notify_all();
    }

    /// Waits until nobody writes to a section of a closed buffer. They have no reason to take long.
    pub fn wait_unused(&self) {
        const LIMIT: Duration = Duration::from_secs(5);
        let (_state, timeout) = self
            .given
            .wait_timeout_while(lock(&self.state), LIMIT, |state| {
                state.free.len() < self.count()
            })
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            tracing::warn!("a receive buffer is still written to");
        }
    }
}

/// A section in use. Dropping it gives it back, so it is given back exactly once.
pub(super) struct Section {
    buffer: Arc<ReceiveBuffer>,
    index: u32,
}

impl Section {
    /// Whether the buffer was closed.
    fn is_taken_back(&self) -> bool {
        lock(&self.buffer.state).closed
    }

    /// Writes the parts of a message, one behind the other; where they are in the buffer. `None`
    /// if they do not fit.
    pub fn write(&self, parts: &[&[u8]]) -> Option<Span> {
        let len = parts.iter().map(|part| part.len()).sum::<usize>();
        let sections = &self.buffer.sections;
        let span = sections
            .section(self.index, u32::try_from(len).ok()?)
            .ok()?;
        let mut at = span.offset as usize;
        for part in parts {
            self.buffer.view.buffer().write_at(at, part).ok()?;
            at += part.len();
        }
        Some(span)
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        lock(&self.buffer.state).free.push(self.index);
        self.buffer.given.notify_all();
    }
}

/// The packets of a channel that the guest has not completed, with the sections that they hold.
#[derive(Default)]
pub(super) struct Outstanding(Mutex<OutstandingState>);

#[derive(Default)]
struct OutstandingState {
    packets: HashMap<u64, Vec<Section>>,
    next: u64,
    /// The channel is closed: nothing is kept any more.
    ended: bool,
}

impl Outstanding {
    /// Keeps sections until the packet with the number that is returned is completed. `None` if
    /// the channel is closed, or the guest takes the buffer back: [`Outstanding::clear`], which
    /// follows that, must find all of its sections.
    pub fn add(&self, sections: Vec<Section>) -> Option<u64> {
        let mut state = lock(&self.0);
        if state.ended || sections.iter().any(Section::is_taken_back) {
            return None;
        }
        // Numbers are not used again, so an answer that comes twice means nothing. 0 is what
        // nobody asked for.
        state.next += 1;
        let id = state.next;
        state.packets.insert(id, sections);
        Some(id)
    }

    /// Frees the sections of a packet. False if there is no such packet.
    pub fn complete(&self, id: u64) -> bool {
        let sections = lock(&self.0).packets.remove(&id);
        sections.is_some()
    }

    /// The channel is closed. Gives the sections of what the guest has not completed.
    pub fn end(&self) -> Vec<Section> {
        let mut state = lock(&self.0);
        state.ended = true;
        let packets = std::mem::take(&mut state.packets);
        packets.into_values().flatten().collect()
    }

    /// Frees all sections: the guest takes its buffer back.
    pub fn clear(&self) {
        let packets = std::mem::take(&mut lock(&self.0).packets);
        drop(packets);
    }

    /// Packets that are not completed.
    pub fn len(&self) -> usize {
        lock(&self.0).packets.len()
    }
}
