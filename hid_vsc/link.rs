// SPDX-License-Identifier: GPL-2.0

//! What mouse and keyboard have in common: a channel on which a handshake comes first, and counters.

use hv_proto::{
    packet::{
        Packet,
        PacketType, //
    },
    PAGE_SIZE, //
};
use kernel::{
    device,
    fmt,
    new_spinlock_irq,
    prelude::*,
    sync::{
        aref::ARef,
        SpinLockIrq, //
    }, //
};
use vmbus::{
    Counter,
    Event,
    OpenParams,
    ReadMode,
    Show, //
};

/// How long the host may take for the whole handshake, in milliseconds.
const HANDSHAKE_MS: u32 = 10_000;

/// The number of a packet that the host is to complete. Nobody looks at it again.
pub(crate) const REQUEST_ID: u64 = 1;

/// How the channels are opened, for packets of a page.
pub(crate) const PARAMS: OpenParams<'static> = OpenParams {
    send_bytes: 10 * PAGE_SIZE,
    recv_bytes: 10 * PAGE_SIZE,
    user_data: &[],
    max_packet: PAGE_SIZE,
    mode: ReadMode::Batched,
};

/// The driver's side of a channel, whose handshake gives a `T`.
#[pin_data]
pub(crate) struct Link<T> {
    device: ARef<device::Device>,
    #[pin]
    finished: Event,
    #[pin]
    outcome: SpinLockIrq<Option<Result<T>>>,
    /// Reports or keystrokes.
    pub(crate) received: Counter,
    rejected: Counter,
}

impl<T: Unpin> Link<T> {
    pub(crate) fn new(device: ARef<device::Device>) -> impl PinInit<Self> {
        pin_init!(Self {
            device,
            finished <- Event::new(),
            outcome <- new_spinlock_irq!(None),
            received: Counter::new(),
            rejected: Counter::new(),
        })
    }

    pub(crate) fn device(&self) -> &device::Device {
        &self.device
    }

    /// The handshake has come to its end, or nothing can come any more. What was first counts. Any
    /// context.
    pub(crate) fn finish(&self, result: Result<T>) {
        let mut outcome = self.outcome.lock();
        if outcome.is_none() {
            *outcome = Some(result);
        }
        drop(outcome);
        self.finished.set();
    }

    /// Waits for the end of the handshake. Once.
    ///
    /// # Errors
    ///
    /// `ETIMEDOUT`, or that of [`Link::finish`].
    pub(crate) fn wait(&self) -> Result<T> {
        self.finished.wait(HANDSHAKE_MS);
        let outcome = self.outcome.lock().take();
        let result = outcome.unwrap_or(Err(ETIMEDOUT));
        match &result {
            Err(e) if vmbus::may_log() => {
                dev_err!(self.device, "no handshake with the host: {:?}\n", e);
            }
            _ => {}
        }
        result
    }

    /// The host has taken the device away: nothing can come any more.
    pub(crate) fn rescinded(&self) {
        self.finish(Err(ENODEV));
    }

    /// The host has damaged the ring: nothing can come any more.
    pub(crate) fn damaged(&self) {
        if vmbus::may_log() {
            dev_err!(self.device, "the host has damaged the ring\n");
        }
        self.finish(Err(EIO));
    }

    /// Whether a packet is a message of the host.
    pub(crate) fn is_message(&self, packet: &Packet<'_>) -> bool {
        match packet.packet_type() {
            PacketType::IN_BAND => return true,
            // The answer to a message of ours says nothing.
            PacketType::COMPLETION => {}
            _ => self.reject("wrong kind of packet"),
        }
        false
    }

    /// A packet of the host makes no sense. Any context.
    pub(crate) fn reject(&self, why: impl core::fmt::Display) {
        self.rejected.count();
        if vmbus::may_log() {
            dev_warn!(self.device, "packet dropped: {}\n", Show(why));
        }
    }

    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "received {}", self.received.get())?;
        writeln!(f, "rejected {}", self.rejected.get())
    }
}
