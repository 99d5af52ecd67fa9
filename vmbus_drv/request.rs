// SPDX-License-Identifier: GPL-2.0

//! Questions to the host that wait for an answer.
//!
//! Each question has a key that its answer repeats. An answer that nobody waits for is dropped, so
//! a late or made-up answer does no harm. Every wait ends: with the answer, when the channel is
//! rescinded, or after a time ([`Key::timeout_ms`]). When a rescind and a question cross, an answer may follow the
//! rescind: that is no mistake of the host's.

use crate::{
    channel::Channel,
    noio::NoIo,
    wait::Event, //
};
use hv_proto::{
    ids::{
        ChannelId,
        GpadlId,
        OpenId, //
    },
    message::HostMessage, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    }, //
};

/// How long a silent host has to let go of more memory, in milliseconds. All channels of a host that
/// is dead have to be closed before the bus can be left.
const SILENT_MS: u32 = 1_000;

/// What a question is about, as the answer says it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    /// `INITIATE_CONTACT`.
    Version,
    /// `OPEN_CHANNEL`.
    Open(ChannelId, OpenId),
    /// `GPADL_HEADER` and bodies.
    GpadlCreate(ChannelId, GpadlId),
    /// `GPADL_TEARDOWN`.
    GpadlTeardown(GpadlId),
    /// `MODIFY_CHANNEL`.
    Modify(ChannelId),
    /// `UNLOAD`.
    Unload,
}

impl Key {
    /// How long the answer is waited for, in milliseconds.
    fn timeout_ms(self) -> u32 {
        match self {
            // Azure was seen to take 50 seconds.
            Self::Unload => 100_000,
            _ => 30_000,
        }
    }

    /// The question that a message answers, if it is an answer.
    fn of(message: &HostMessage) -> Option<Self> {
        Some(match message {
            HostMessage::VersionResponse(_) => Self::Version,
            HostMessage::OpenChannelResult(result) => Self::Open(result.channel_id, result.open_id),
            HostMessage::GpadlCreated(created) => {
                Self::GpadlCreate(created.channel_id, created.gpadl_id)
            }
            HostMessage::GpadlTorndown(torn) => Self::GpadlTeardown(torn.gpadl_id),
            HostMessage::ModifyChannelResponse(response) => Self::Modify(response.channel_id),
            HostMessage::UnloadResponse(_) => Self::Unload,
            _ => return None,
        })
    }
}

/// How a question ended.
enum End {
    Answered(HostMessage),
    Rescinded,
}

/// A question that waits.
#[pin_data]
struct Question {
    key: Key,
    /// The question ends when this channel is rescinded.
    channel: Option<ChannelId>,
    #[pin]
    end: Mutex<Option<End>>,
    #[pin]
    done: Event,
}

impl Question {
    fn finish(&self, end: End) {
        *self.end.lock() = Some(end);
        self.done.set();
    }
}

/// Questions ended by a rescind whose answers may still come. Only the last ones are known: a host
/// need not answer, and could make the list grow for ever.
struct Ended {
    keys: [Option<Key>; Self::MAX],
    next: usize,
}

impl Ended {
    const MAX: usize = 16;

    const NONE: Self = Self {
        keys: [None; Self::MAX],
        next: 0,
    };

    fn add(&mut self, key: Key) {
        if let Some(place) = self.keys.get_mut(self.next) {
            *place = Some(key);
        }
        let next = self.next.wrapping_add(1);
        self.next = if next < Self::MAX { next } else { 0 };
    }

    /// Forgets a question. Says whether it was known.
    fn take(&mut self, key: Key) -> bool {
        let place = self.keys.iter_mut().find(|place| **place == Some(key));
        place.is_some_and(|place| place.take().is_some())
    }
}

struct State {
    /// There are never more than threads that ask.
    waiting: KVec<Arc<Question>>,
    ended: Ended,
}

/// All questions.
#[pin_data]
pub(crate) struct Questions {
    #[pin]
    state: Mutex<State>,
    /// Nothing was heard of the host since it did not answer.
    silent: Atomic<bool>,
}

impl Questions {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            silent: Atomic::new(false),
            state <- new_mutex!(State {
                waiting: KVec::new(),
                ended: Ended::NONE,
            }),
        })
    }

    /// Asks by calling `ask`, and waits for the answer.
    ///
    /// # Errors
    ///
    /// `ENODEV` if `channel` is rescinded first, `ETIMEDOUT`, or the error of `ask`.
    pub(crate) fn ask(
        &self,
        key: Key,
        channel: Option<&Channel>,
        ask: impl FnOnce() -> Result,
    ) -> Result<HostMessage> {
        let question = Arc::pin_init(
            pin_init!(Question {
                key,
                channel: channel.map(|channel| channel.id()),
                end <- new_mutex!(None),
                done <- Event::new(),
            }),
            GFP_KERNEL,
        )?;
        // A disk may be waiting for a rescind, and that for the lock.
        let noio = NoIo::begin();
        self.state
            .lock()
            .waiting
            .push(question.clone(), GFP_KERNEL)?;
        drop(noio);

        // A rescind that came before the question was in the list did not see it.
        let asked = if channel.is_some_and(|channel| channel.is_rescinded()) {
            Err(ENODEV)
        } else {
            ask()
        };
        if asked.is_ok() {
            let teardown = matches!(key, Key::GpadlTeardown(_));
            let silent = teardown && self.silent.load(Relaxed);
            let ms = if silent { SILENT_MS } else { key.timeout_ms() };
            if !question.done.wait(ms) && teardown {
                self.silent.store(true, Relaxed);
            }
        }
        self.state
            .lock()
            .waiting
            .retain(|other| !Arc::ptr_eq(other, &question));
        asked?;
        let end = question.end.lock().take();
        match end {
            Some(End::Answered(message)) => Ok(message),
            Some(End::Rescinded) => Err(ENODEV),
            None => Err(ETIMEDOUT),
        }
    }

    /// Something was heard of the host.
    pub(crate) fn heard(&self) {
        self.silent.store(false, Relaxed);
    }

    /// Passes on an answer. Returns false if it is none, or to no question.
    pub(crate) fn answer(&self, message: HostMessage) -> bool {
        let Some(key) = Key::of(&message) else {
            return false;
        };
        let mut found = false;
        let mut state = self.state.lock();
        state.waiting.retain(|question| {
            if found || question.key != key {
                return true;
            }
            found = true;
            question.finish(End::Answered(message));
            false
        });
        found || state.ended.take(key)
    }

    /// Ends all questions about `channel`.
    pub(crate) fn rescind(&self, channel: ChannelId) {
        let mut state = self.state.lock();
        let State { waiting, ended } = &mut *state;
        waiting.retain(|question| {
            if question.channel != Some(channel) {
                return true;
            }
            ended.add(question.key);
            question.finish(End::Rescinded);
            false
        });
    }
}
