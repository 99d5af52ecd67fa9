// SPDX-License-Identifier: GPL-2.0

//! Questions to the host that wait for an answer.
//!
//! Each question has a key that its answer repeats. An answer that nobody waits for is dropped, so
//! a late or made-up answer does no harm. Every wait ends: with the answer, when the channel is
//! rescinded, or after [`TIMEOUT_MS`].

use crate::{
    channel::Channel,
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

impl Key {
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
        self.waiting.lock().push(question.clone(), GFP_KERNEL)?;

        // A rescind that came before the question was in the list did not see it.
        let asked = if channel.is_some_and(|channel| channel.is_rescinded()) {
            Err(ENODEV)
        } else {
            ask()
        };
        if asked.is_ok() {
            question.done.wait(TIMEOUT_MS);
        }
        self.waiting
            .lock()
            .retain(|other| !Arc::ptr_eq(other, &question));
        asked?;
        let end = question.end.lock().take();
        match end {
            Some(End::Answered(message)) => Ok(message),
            Some(End::Rescinded) => Err(ENODEV),
            None => Err(ETIMEDOUT),
        }
    }

    /// Passes on an answer. Returns false if it is none, or nobody waits for it.
    pub(crate) fn answer(&self, message: HostMessage) -> bool {
        let Some(key) = Key::of(&message) else {
            return false;
        };
        let mut found = false;
        self.waiting.lock().retain(|question| {
            if found || question.key != key {
                return true;
            }
            found = true;
            question.finish(End::Answered(message));
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
            question.finish(End::Rescinded);
            false
        });
    }
}
