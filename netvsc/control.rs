// SPDX-License-Identifier: GPL-2.0

//! Requests of the driver itself, which somebody waits for: one at a time, each with a time limit, each
//! ended by a rescind.
//!
//! A request of NVSP is answered by the completion of its packet, one of RNDIS by a message with the
//! request's number; `hv_proto::net::control` knows which answer fits.

use hv_proto::net::{
    control::{
        self,
        Answer,
        ControlError,
        Event,
        Failure,
        Limits,
        Requests, //
    },
    nvsp, //
};
use kernel::{
    new_mutex,
    new_spinlock_irq,
    prelude::*,
    sync::{
        lock::{
            mutex::MutexBackend,
            Guard, //
        },
        Arc,
        Mutex,
        SpinLockIrq, //
    }, //
};

/// Most bytes of an answer.
pub(crate) const MAX_ANSWER: usize = 1024;

/// What the host has answered.
pub(crate) enum Reply {
    /// The payload of a completion, or the value of an object.
    Bytes(Bytes),
    /// It is initialized.
    Initialized(Limits),
    /// It is done.
    Done,
    /// It is not done.
    Failed(Failure),
}

/// Bytes of an answer.
pub(crate) struct Bytes {
    room: KVec<u8>,
    len: usize,
}

impl Bytes {
    /// The bytes.
    pub(crate) fn get(&self) -> &[u8] {
        self.room.get(..self.len).unwrap_or_default()
    }
}

enum Slot {
    /// Nothing has come yet; there is room.
    Empty(KVec<u8>),
    Filled(Reply),
    Taken,
}

/// A request that somebody waits for.
#[pin_data]
pub(crate) struct Waiting {
    #[pin]
    event: vmbus::Event,
    #[pin]
    answer: SpinLockIrq<Slot>,
}

impl Waiting {
    fn new() -> Result<Arc<Self>> {
        let mut room = KVec::new();
        room.resize(MAX_ANSWER, 0, GFP_KERNEL)?;
        Arc::pin_init(
            pin_init!(Self {
                event <- vmbus::Event::new(),
                answer <- new_spinlock_irq!(Slot::Empty(room), "netvsc_answer"),
            }),
            GFP_KERNEL,
        )
    }

    fn fill(&self, reply: impl FnOnce(KVec<u8>) -> Reply) {
        let mut slot = self.answer.lock();
        if let Slot::Empty(room) = &mut *slot {
            *slot = Slot::Filled(reply(core::mem::take(room)));
        }
        drop(slot);
        self.event.set();
    }

    /// These bytes are the answer; what is too long is cut off. Any context.
    pub(crate) fn finish(&self, bytes: &[u8]) {
        self.fill(|mut room: KVec<u8>| {
            for (to, from) in room.iter_mut().zip(bytes) {
                *to = *from;
            }
            let len = bytes.len().min(room.len());
            Reply::Bytes(Bytes { room, len })
        });
    }

    fn finish_rndis(&self, answer: &Answer<'_>) {
        match answer.result {
            Ok(control::Reply::Value(value)) => self.finish(value),
            Ok(control::Reply::Initialized(limits)) => self.fill(|_| Reply::Initialized(limits)),
            Ok(control::Reply::Done) => self.fill(|_| Reply::Done),
            Err(failure) => self.fill(|_| Reply::Failed(failure)),
        }
    }

    /// Takes the answer, if there is one.
    fn take(&self) -> Option<Reply> {
        match core::mem::replace(&mut *self.answer.lock(), Slot::Taken) {
            Slot::Filled(reply) => Some(reply),
            _ => None,
        }
    }
}

struct State {
    /// Nothing will be answered any more.
    gone: bool,
    requests: Requests<1>,
    waiting: Option<Arc<Waiting>>,
}

/// The driver's own requests on one attachment.
#[pin_data]
pub(crate) struct Control {
    /// Held by who makes a request.
    #[pin]
    turn: Mutex<()>,
    #[pin]
    state: SpinLockIrq<State>,
}

/// The right to make a request, for as long as it exists.
pub(crate) struct Turn<'a> {
    control: &'a Control,
    _turn: Guard<'a, (), MutexBackend>,
}

impl Control {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            turn <- new_mutex!((), "netvsc_control_turn"),
            state <- new_spinlock_irq!(State {
                gone: false,
                requests: Requests::new(),
                waiting: None,
            }, "netvsc_control"),
        })
    }

    /// Waits for the right to make a request. Those who have it have a time limit.
    pub(crate) fn turn(&self) -> Turn<'_> {
        Turn {
            control: self,
            _turn: self.turn.lock(),
        }
    }

    /// A message of RNDIS has come that is not a frame. What it says, if it is no answer. Any context.
    ///
    /// # Errors
    ///
    /// [`ControlError`]; nothing has changed.
    pub(crate) fn receive<'a>(
        &self,
        bytes: &'a [u8],
    ) -> core::result::Result<Option<Event<'a>>, ControlError> {
        let mut state = self.state.lock();
        match state.requests.receive(bytes)? {
            Event::Answer(answer) => {
                let waiting = state.waiting.take();
                drop(state);
                if let Some(waiting) = waiting {
                    waiting.finish_rndis(&answer);
                }
                Ok(None)
            }
            event => Ok(Some(event)),
        }
    }

    /// The device has gone: ends the request that waits, and lets no more begin. Any context.
    pub(crate) fn end(&self) {
        let mut state = self.state.lock();
        state.gone = true;
        let waiting = state.waiting.take();
        drop(state);
        if let Some(waiting) = waiting {
            waiting.event.set();
        }
    }
}

impl Turn<'_> {
    /// Sends a request of NVSP with `send`, and waits for its completion, for at most `timeout`
    /// milliseconds.
    ///
    /// # Errors
    ///
    /// `ETIMEDOUT` when no answer came, `ENODEV` when the device has gone, `ENOMEM`, or the error of
    /// `send`.
    pub(crate) fn ask_nvsp(
        &self,
        timeout: u32,
        send: impl FnOnce(&Arc<Waiting>) -> Result,
    ) -> Result<Reply> {
        self.ask(timeout, None, |waiting, _| send(waiting))
    }

    /// The same for RNDIS; `send` gets the number of the request.
    ///
    /// # Errors
    ///
    /// As [`Turn::ask_nvsp`].
    pub(crate) fn ask_rndis(
        &self,
        kind: control::Kind,
        timeout: u32,
        send: impl FnOnce(u32) -> Result,
    ) -> Result<Reply> {
        self.ask(timeout, Some(kind), |_, id| send(id))
    }

    fn ask(
        &self,
        timeout: u32,
        kind: Option<control::Kind>,
        send: impl FnOnce(&Arc<Waiting>, u32) -> Result,
    ) -> Result<Reply> {
        let waiting = Waiting::new()?;
        let id = {
            let mut state = self.control.state.lock();
            if state.gone {
                return Err(ENODEV);
            }
            let id = match kind {
                Some(kind) => state.requests.begin(kind).ok_or(EBUSY)?,
                None => 0,
            };
            // A completion goes to who waits by itself.
            state.waiting = Some(waiting.clone());
            id
        };
        let sent = send(&waiting, id);
        if sent.is_ok() {
            // Whether it happened shows in the answer.
            waiting.event.wait(timeout);
        }
        let mut state = self.control.state.lock();
        let before = state.waiting.take();
        state.requests.cancel(id);
        let gone = state.gone;
        drop(state);
        drop(before);
        sent?;
        waiting.take().ok_or(if gone { ENODEV } else { ETIMEDOUT })
    }
}

/// What a packet to the host asks for: the kind of completion that it may get.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An RNDIS message.
    Rndis,
    /// A version.
    Init,
    /// The receive buffer.
    ReceiveBuffer,
    /// The send buffer.
    SendBuffer,
    /// Sub-channels.
    SubChannel,
}

impl Kind {
    /// The kind of request that a guest's message is.
    pub(crate) fn asked_by(message_type: nvsp::MessageType) -> Option<Self> {
        Some(match message_type {
            nvsp::MessageType::SEND_RNDIS_PACKET => Self::Rndis,
            nvsp::MessageType::INIT => Self::Init,
            nvsp::MessageType::SEND_RECEIVE_BUFFER => Self::ReceiveBuffer,
            nvsp::MessageType::SEND_SEND_BUFFER => Self::SendBuffer,
            nvsp::MessageType::SUB_CHANNEL => Self::SubChannel,
            _ => return None,
        })
    }

    /// The kind of request that a host's message completes.
    pub(crate) fn completed_by(message_type: nvsp::MessageType) -> Option<Self> {
        Some(match message_type {
            nvsp::MessageType::SEND_RNDIS_PACKET_COMPLETE => Self::Rndis,
            nvsp::MessageType::INIT_COMPLETE => Self::Init,
            nvsp::MessageType::SEND_RECEIVE_BUFFER_COMPLETE => Self::ReceiveBuffer,
            nvsp::MessageType::SEND_SEND_BUFFER_COMPLETE => Self::SendBuffer,
            nvsp::MessageType::SUB_CHANNEL => Self::SubChannel,
            _ => return None,
        })
    }
}
