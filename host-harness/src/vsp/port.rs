// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the providers with one channel each have in common (integration components, input): the
//! thread that reads the channel, and a [`Port`] through which everything is sent.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hv_proto::packet::PacketType;

use crate::counters::Counter;
use crate::vmbus::{
    ChannelError, ChannelReader, ChannelWriter, HostChannel, OpenError, OpenParams, Vsp,
};

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The data behind the locks of providers are consistent wherever something can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a message was not sent.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// No driver of the guest has the channel open.
    #[error("the guest has no driver for it")]
    Closed,
    /// [`Port::set_quiet`] is in force.
    #[error("the provider was told to be quiet")]
    Quiet,
    /// The channel does not take it.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// The channel of a provider, if it is open. Besides the provider, tests of a guest use it, to send
/// what a provider would not.
#[derive(Default)]
pub struct Port {
    writer: Mutex<Option<ChannelWriter>>,
    next_transaction: AtomicU64,
    quiet: AtomicBool,
    tap: Mutex<Option<Sender<Vec<u8>>>>,
    complaints: Counter,
}

impl Port {
    /// A writer for the open channel.
    fn writer(&self) -> Result<ChannelWriter, PortError> {
        lock(&self.writer).clone().ok_or(PortError::Closed)
    }

    /// Whether a driver of the guest has the channel open.
    pub fn is_open(&self) -> bool {
        lock(&self.writer).is_some()
    }

    fn next_transaction(&self) -> u64 {
        self.next_transaction.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn own_writer(&self) -> Result<ChannelWriter, PortError> {
        if self.quiet.load(Ordering::Relaxed) {
            return Err(PortError::Quiet);
        }
        self.writer()
    }

    /// Sends a message of the provider, without waiting for space in the ring.
    pub(super) fn send(&self, parts: &[&[u8]]) -> Result<(), PortError> {
        let writer = self.own_writer()?;
        Ok(writer.try_send(self.next_transaction(), &parts.concat(), false)?)
    }

    /// As [`Port::send`], but waits for space. No lock may be held that the reading thread takes.
    pub(super) fn send_waiting(&self, parts: &[&[u8]]) -> Result<(), PortError> {
        let writer = self.own_writer()?;
        Ok(writer.send(self.next_transaction(), &parts.concat(), false)?)
    }

    /// Conformance tests: sends these bytes as an in-band packet, whatever they are.
    ///
    /// # Errors
    /// The channel is not open, or its ring is full.
    pub fn send_raw(&self, payload: &[u8]) -> Result<(), PortError> {
        Ok(self
            .writer()?
            .send(self.next_transaction(), payload, false)?)
    }

    /// Conformance tests: sends a completion of a request that the guest may not have made.
    ///
    /// # Errors
    /// As [`Port::send_raw`].
    pub fn complete_raw(&self, transaction_id: u64, payload: &[u8]) -> Result<(), PortError> {
        Ok(self.writer()?.complete(transaction_id, payload)?)
    }

    /// Conformance tests: while this is in force, the provider sends nothing of its own accord, not
    /// even the negotiation of a channel that is opened.
    pub fn set_quiet(&self, quiet: bool) {
        self.quiet.store(quiet, Ordering::Relaxed);
    }

    /// Conformance tests: copies of all messages that the guest sends from now on. Only the last
    /// caller gets them.
    pub fn tap(&self) -> Receiver<Vec<u8>> {
        let (sender, receiver) = channel();
        *lock(&self.tap) = Some(sender);
        receiver
    }

    /// An answer could not be sent, as when a guest asks on and on and reads nothing.
    pub(super) fn lost(&self, device: &str, error: &PortError) {
        if let Some(times) = self.complaints.complain() {
            tracing::warn!(device, times, %error, "an answer is lost");
        }
    }

    /// Shows a message of the guest to the tap.
    fn show(&self, payload: &[u8]) {
        let mut tap = lock(&self.tap);
        if tap
            .as_ref()
            .is_some_and(|tap| tap.send(payload.to_vec()).is_err())
        {
            *tap = None;
        }
    }
}

/// What a provider does on its channel. All but `closed` is called by the thread that reads it.
pub(super) trait Handler: Send + Sync + 'static {
    /// The channel's port.
    fn port(&self) -> &Port;
    /// The channel was opened.
    fn opened(&self);
    /// A message came.
    fn message(&self, payload: &[u8]);
    /// Called after `opened`, and again whenever the time that it returned is over. `None`: never.
    fn tick(&self) -> Option<Duration> {
        None
    }
    /// The channel is closed.
    fn closed(&self);
}

/// A device with one channel.
pub(super) struct SingleChannel<H> {
    name: String,
    handler: Arc<H>,
    reader: Option<JoinHandle<()>>,
}

impl<H: Handler> SingleChannel<H> {
    pub(super) fn new(name: &str, handler: Arc<H>) -> Self {
        Self {
            name: name.to_owned(),
            handler,
            reader: None,
        }
    }
}

impl<H: Handler> Vsp for SingleChannel<H> {
    fn open(&mut self, channel: HostChannel, params: OpenParams) -> Result<(), OpenError> {
        if params.subchannel_index != 0 {
            return Err(OpenError("this device has no sub-channels".into()));
        }
        let (reader, writer) = channel.into_parts();
        let answers = writer.clone();
        *lock(&self.handler.port().writer) = Some(writer);
        let (name, handler) = (self.name.clone(), self.handler.clone());
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || serve(&name, &*handler, reader, &answers));
        match thread {
            Ok(thread) => {
                self.reader = Some(thread);
                Ok(())
            }
            Err(error) => {
                *lock(&self.handler.port().writer) = None;
                Err(OpenError(format!("no thread for the channel: {error}")))
            }
        }
    }

    fn close(&mut self, _: u16) {
        if let Some(reader) = self.reader.take()
            && reader.join().is_err()
        {
            tracing::error!(device = self.name, "the service provider panicked");
        }
        *lock(&self.handler.port().writer) = None;
        self.handler.closed();
    }
}

/// Reads a channel until it closes.
fn serve(name: &str, handler: &impl Handler, mut reader: ChannelReader, answers: &ChannelWriter) {
    handler.opened();
    let due = |wait: Option<Duration>| wait.map(|wait| Instant::now() + wait);
    let mut next = due(handler.tick());
    loop {
        let wait = next.map(|next| next.saturating_duration_since(Instant::now()));
        if wait.is_some_and(|wait| wait.is_zero()) {
            next = due(handler.tick());
            continue;
        }
        match reader.next(wait) {
            Ok(Some(packet)) => {
                if packet.wants_completion() {
                    let id = packet.transaction_id();
                    if let Err(error) = answers.try_complete(id, &[]) {
                        tracing::debug!(device = name, %error, "a completion is lost");
                    }
                }
                // Nothing that is sent to the guest asks for a completion.
                if packet.packet_type() == PacketType::IN_BAND {
                    handler.port().show(packet.payload());
                    handler.message(packet.payload());
                }
            }
            Ok(None) => {}
            Err(ChannelError::Stopped) => return,
            Err(error) => {
                if let Some(times) = handler.port().complaints.complain() {
                    tracing::warn!(device = name, times, %error, "a channel failed");
                }
                return;
            }
        }
    }
}
