// SPDX-License-Identifier: GPL-2.0

//! Integration components: services whose host asks and whose guest answers.
//!
//! What is the same for all of them is here: the channel, negotiation of versions, answers, and
//! what to do about messages that make no sense. A driver adds an [`Actor`], which does what the
//! messages of its service ask for. Everything about a device is in its [`Binding`]; two devices of
//! a class know nothing of each other.
//!
//! What a device does is shown in the file `<driver>-<device>/state` of debugfs.
//!
//! C version: `drivers/hv/hv_util.c` in the kernel.

use crate::{
    log,
    Channel,
    Counter,
    Device,
    Handler,
    OpenChannel,
    OpenParams,
    ReadMode,
    Show, //
};
use hv_proto::{
    ic::{
        Event,
        Guest,
        Malformed,
        Reply,
        Service, //
    },
    packet::{
        Packet,
        PacketType, //
    },
    PAGE_SIZE, //
};
use kernel::{
    debugfs,
    device,
    fmt,
    new_spinlock_irq,
    prelude::*,
    str::CString,
    sync::{
        aref::ARef,
        Arc,
        SpinLockIrq, //
    }, //
};

/// Size of each ring: a control page and three pages for packets.
const RING_BYTES: usize = 4 * PAGE_SIZE;

/// What a driver does about the messages of its service.
pub trait Actor: Send + Sync + 'static {
    /// The service.
    type Service: Service<Event: Copy> + Send + Unpin;

    /// Name of the driver.
    const NAME: &'static str;

    /// Name of the service for people.
    const TITLE: &'static str;

    /// A message has come; its answer has not been sent. Softirq context; must not sleep.
    ///
    /// # Errors
    ///
    /// What is wrong with it after all. It is counted, and answered anyhow.
    fn receive(&self, event: <Self::Service as Service>::Event) -> Result<(), Malformed> {
        let _ = event;
        Ok(())
    }

    /// The answer to a message was sent, or could not be. Softirq context; must not sleep.
    fn answered(&self, event: <Self::Service as Service>::Event) {
        let _ = event;
    }

    /// Writes what is known of the service, one thing a line.
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let _ = f;
        Ok(())
    }
}

/// A service on an open channel.
#[pin_data]
struct Session<A: Actor> {
    device: ARef<device::Device>,
    actor: A,
    #[pin]
    guest: SpinLockIrq<Guest<A::Service>>,
    received: Counter,
    rejected: Counter,
    unanswered: Counter,
}

impl<A: Actor> Session<A> {
    fn reject(&self, why: Malformed) {
        self.rejected.count();
        if log::may_log() {
            dev_warn!(
                self.device,
                "{}: message dropped: {}\n",
                A::TITLE,
                Show(why)
            );
        }
    }

    fn reply(&self, channel: &Channel, request: &Packet<'_>, reply: &Reply) {
        let parts = reply.parts(request.payload());
        if channel
            .send_parts(&parts, request.transaction_id(), false)
            .is_err()
        {
            self.unanswered.count();
        }
    }

    fn negotiated(&self, event: &Event<<A::Service as Service>::Event>) {
        match event {
            Event::Negotiated(agreed) if log::may_tell() => dev_info!(
                self.device,
                "{} IC version {}\n",
                A::TITLE,
                Show(agreed.message)
            ),
            Event::NoCommonVersion if log::may_log() => dev_warn!(
                self.device,
                "{}: the host knows none of our versions\n",
                A::TITLE
            ),
            _ => {}
        }
    }

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.guest.lock().agreed() {
            Some(agreed) => writeln!(f, "version {}", agreed.message)?,
            None => writeln!(f, "version none")?,
        }
        writeln!(f, "received {}", self.received.get())?;
        writeln!(f, "rejected {}", self.rejected.get())?;
        writeln!(f, "unanswered {}", self.unanswered.get())?;
        self.actor.show(f)
    }
}

impl<A: Actor> Handler for Session<A> {
    fn on_packet(&self, channel: &Channel, packet: &Packet<'_>) {
        if packet.packet_type() != PacketType::IN_BAND {
            self.reject(Malformed::NotARequest);
            return;
        }
        let result = self.guest.lock().on_message(packet.payload());
        match result {
            Ok((reply, Event::Service(event))) => {
                self.received.count();
                if let Err(why) = self.actor.receive(event) {
                    self.reject(why);
                }
                self.reply(channel, packet, &reply);
                self.actor.answered(event);
            }
            Ok((reply, event)) => {
                self.reply(channel, packet, &reply);
                self.negotiated(&event);
            }
            Err(rejected) => {
                self.reject(rejected.why);
                if let Some(reply) = &rejected.reply {
                    self.reply(channel, packet, reply);
                }
            }
        }
    }

    fn on_error(&self, _channel: &Channel) {
        if log::may_log() {
            dev_err!(self.device, "{}: the host has damaged the ring\n", A::TITLE);
        }
    }
}

/// A service on a device that a driver is bound to. Dropping it closes the channel; after that the
/// [`Actor`] is not called any more, and is dropped.
#[pin_data]
pub struct Binding<A: Actor> {
    #[pin]
    state: debugfs::File<Arc<Session<A>>>,
    open: OpenChannel,
    // Last, so that the actor goes here and not in some callback.
    session: Arc<Session<A>>,
}

impl<A: Actor> Binding<A> {
    /// Opens the channel of a device, and serves it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or those of [`Channel::open`].
    pub fn new(
        dev: &Device<device::Core<'_>>,
        service: A::Service,
        actor: A,
    ) -> Result<impl PinInit<Self, Error>> {
        let bound: &device::Device<device::Core<'_>> = dev.as_ref();
        let bound: &device::Device<device::Bound> = bound;
        let normal: &device::Device = bound;
        let session = Arc::pin_init(
            pin_init!(Session {
                device: normal.into(),
                actor,
                guest <- new_spinlock_irq!(Guest::new(service)),
                received: Counter::new(),
                rejected: Counter::new(),
                unanswered: Counter::new(),
            }),
            GFP_KERNEL,
        )?;
        let name = CString::try_from_fmt(fmt!("{}-{}", A::NAME, normal.name()))?;
        let dir = debugfs::Dir::new(&name);
        let params = OpenParams {
            send_bytes: RING_BYTES,
            recv_bytes: RING_BYTES,
            user_data: &[],
            max_packet: PAGE_SIZE,
            mode: ReadMode::Direct,
        };
        let open = dev.channel().open(&params, session.clone())?;
        Ok(try_pin_init!(Self {
            state <- dir.read_callback_file(c"state", session.clone(), &|session, f| {
                session.show(f)
            }),
            open,
            session,
        }))
    }

    /// What was given to [`Binding::new`].
    pub fn actor(&self) -> &A {
        &self.session.actor
    }
}
