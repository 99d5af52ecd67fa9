// SPDX-License-Identifier: GPL-2.0

//! Questions to the host that wait for an answer.
//!
//! Each question has a key that its answer repeats. An answer that nobody waits for is dropped, so
//! a late or made-up answer does no harm. Every wait ends: with the answer, when the channel is
//! rescinded, or after [`TIMEOUT_MS`].

use crate::wait::Event;
use hv_proto::ids::{
    ChannelId,
    GpadlId,
    OpenId, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Release, //
        },
        Arc,
        Mutex, //
    }, //
};

/// How long an answer is waited for, in milliseconds.
pub(crate) const TIMEOUT_MS: u32 = 30_000;

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

/// A question that waits.
#[pin_data]
struct Question {
    key: Key,
    /// The question ends when this channel is rescinded.
    channel: Option<ChannelId>,
    answer: Atomic<u64>,
    rescinded: Atomic<bool>,
    #[pin]
    done: Event,
}

/// All questions that wait. There are never more than threads that ask.
#[pin_data]
pub(crate) struct Questions {
    #[pin]
    waiting: Mutex<KVec<Arc<Question>>>,
}

impl Questions {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            waiting <- new_mutex!(KVec::new()),
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
        channel: Option<&crate::Channel>,
        ask: impl FnOnce() -> Result,
    ) -> Result<u64> {
        let question = Arc::pin_init(
            pin_init!(Question {
                key,
                channel: channel.map(|channel| channel.id()),
                answer: Atomic::new(0),
                rescinded: Atomic::new(false),
                done <- Event::new(),
            }),
            GFP_KERNEL,
        )?;
        self.waiting.lock().push(question.clone(), GFP_KERNEL)?;

        // A rescind that came before the question was in the list did not see it.
        let asked = if channel.is_some_and(|channel| channel.is_rescinded()) {
            Err(ENODEV)
        } else {
            ask()
        };
        let answered = asked.is_ok() && question.done.wait(TIMEOUT_MS);
        self.waiting
            .lock()
            .retain(|other| !Arc::ptr_eq(other, &question));
        asked?;
        if !answered {
            return Err(ETIMEDOUT);
        }
        if question.rescinded.load(Acquire) {
            return Err(ENODEV);
        }
        Ok(question.answer.load(Acquire))
    }

    /// Passes on an answer. Returns false if nobody waits for it.
    pub(crate) fn answer(&self, key: Key, answer: u64) -> bool {
        let mut found = false;
        self.waiting.lock().retain(|question| {
            if found || question.key != key {
                return true;
            }
            found = true;
            question.answer.store(answer, Release);
            question.done.set();
            false
        });
        found
    }

    /// Ends all questions about `channel`.
    pub(crate) fn rescind(&self, channel: ChannelId) {
        self.waiting.lock().retain(|question| {
            if question.channel != Some(channel) {
                return true;
            }
            question.rescinded.store(true, Release);
            question.done.set();
            false
        });
    }
}
