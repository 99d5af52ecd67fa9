// SPDX-License-Identifier: GPL-2.0

//! Requests of the driver itself: the handshake and resets. One at a time, each with a time limit,
//! each ended when the primary channel cannot be used any more.

use hv_proto::storage::{
    VstorPacket,
    PACKET_SIZE, //
};
use kernel::{
    new_mutex,
    new_spinlock_irq,
    prelude::*,
    sync::{
        Arc,
        Mutex,
        SpinLockIrq, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};
use vmbus::{
    Channel,
    Event, //
};
use zerocopy::IntoBytes;

/// Request ids with this bit belong to the driver's own requests.
const CONTROL: u64 = 1 << 63;

/// Whether a request id is one of the driver's own requests.
pub(crate) fn is_control(id: u64) -> bool {
    id & CONTROL != 0
}

/// Time between two tries to send a request when the ring is full.
const RETRY: Delta = Delta::from_millis(10);
const RETRY_MS: u32 = 10;

/// The payload of an answer, as far as a storage packet goes.
pub(crate) struct Reply {
    bytes: [u8; PACKET_SIZE],
    len: usize,
}

impl Reply {
    fn new(payload: &[u8]) -> Self {
        let mut bytes = [0; PACKET_SIZE];
        for (to, from) in bytes.iter_mut().zip(payload) {
            *to = *from;
        }
        Self {
            bytes,
            len: payload.len().min(PACKET_SIZE),
        }
    }

    /// The bytes of the answer.
    pub(crate) fn payload(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// A request that somebody waits for.
#[pin_data]
struct Waiting {
    #[pin]
    event: Event,
    #[pin]
    reply: SpinLockIrq<Option<Reply>>,
}

struct State {
    last_id: u64,
    /// The primary channel has gone: nothing will be answered any more.
    gone: bool,
    /// Nothing is to be asked any more.
    finished: bool,
    pending: Option<Arc<Waiting>>,
}

/// The driver's own requests on a controller's primary channel.
#[pin_data]
pub(crate) struct Control {
    /// Held by who makes a request.
    #[pin]
    turn: Mutex<()>,
    #[pin]
    state: SpinLockIrq<State>,
}

impl Control {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            turn <- new_mutex!((), "storvsc_control_turn"),
            state <- new_spinlock_irq!(State {
                last_id: CONTROL,
                gone: false,
                finished: false,
                pending: None,
            }, "storvsc_control"),
        })
    }

    /// Sends a packet and waits for the answer, for at most `timeout` seconds.
    ///
    /// # Errors
    ///
    /// `ETIMEDOUT` when no answer came, `ENODEV` when the channel has gone, `ENOMEM`, or what the bus
    /// says.
    pub(crate) fn execute(
        &self,
        channel: &Channel,
        packet: &VstorPacket,
        timeout: u32,
    ) -> Result<Reply> {
        let _turn = self.turn.lock();
        let waiting = Arc::pin_init(
            pin_init!(Waiting {
                event <- Event::new(),
                reply <- new_spinlock_irq!(None, "storvsc_reply"),
            }),
            GFP_KERNEL,
        )?;

        let id = {
            let mut state = self.state.lock();
            if state.gone {
                return Err(ENODEV);
            }
            state.last_id = state.last_id.wrapping_add(1) | CONTROL;
            state.pending = Some(waiting.clone());
            state.last_id
        };
        let answered = self.send_and_wait(channel, packet, id, &waiting, timeout);

        let mut state = self.state.lock();
        let pending = state.pending.take();
        let gone = state.gone;
        drop(state);
        drop(pending);

        answered?;
        let reply = waiting.reply.lock().take();
        reply.ok_or(if gone { ENODEV } else { ETIMEDOUT })
    }

    fn send_and_wait(
        &self,
        channel: &Channel,
        packet: &VstorPacket,
        id: u64,
        waiting: &Waiting,
        timeout: u32,
    ) -> Result {
        let mut left = timeout.saturating_mul(1000);
        loop {
            match channel.send(packet.as_bytes(), id, true) {
                // The host has not made room for this one yet.
                Err(e) if e == EAGAIN && left > RETRY_MS => {
                    left -= RETRY_MS;
                    fsleep(RETRY);
                }
                Err(e) => return Err(e),
                Ok(()) => break,
            }
        }
        // Whether it happened shows in the reply.
        waiting.event.wait(left);
        Ok(())
    }

    /// The host has answered the request `id`. Says whether anybody waits for that. Any context.
    pub(crate) fn answer(&self, id: u64, payload: &[u8]) -> bool {
        let mut state = self.state.lock();
        if state.last_id != id {
            return false;
        }
        let Some(waiting) = state.pending.take() else {
            return false;
        };
        drop(state);
        *waiting.reply.lock() = Some(Reply::new(payload));
        waiting.event.set();
        true
    }

    /// The primary channel is about to be opened: requests can be made.
    pub(crate) fn begin(&self) {
        let mut state = self.state.lock();
        state.gone = state.finished;
    }

    /// The primary channel has gone: ends the request that waits, and lets none begin on it.
    pub(crate) fn end(&self) {
        let mut state = self.state.lock();
        state.gone = true;
        let waiting = state.pending.take();
        drop(state);
        if let Some(waiting) = waiting {
            waiting.event.set();
        }
    }

    /// As [`Control::end`], for ever.
    pub(crate) fn finish(&self) {
        self.state.lock().finished = true;
        self.end();
    }
}
