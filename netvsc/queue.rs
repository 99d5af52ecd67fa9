// SPDX-License-Identifier: GPL-2.0

//! A queue of an adapter: one channel, one NAPI instance, one transmit queue of the stack.

use crate::{
    control::{
        Kind,
        Waiting, //
    },
    link::{
        Buffers,
        Link, //
    },
    net::{
        self,
        impl_has_napi,
        Napi,
        PollContext, //
    },
    nic::Change,
    rx::Receive,
    tx::{
        Request,
        Sender, //
    }, //
};
use hv_proto::{
    net::{
        control::Limits,
        nvsp::{
            self,
            HostMessage,
            Status, //
        }, //
    },
    packet::{
        Packet,
        PacketType, //
    }, //
};
use kernel::{
    new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        Arc,
        SetOnce,
        SpinLock, //
    }, //
};
use vmbus::{
    Channel,
    Handler,
    RequestSlots,
    Show, //
};

/// Bytes of a ring for each message that may be outstanding.
const BYTES_PER_REQUEST: usize = 256;

/// Bytes of the ring that are waited for when completions did not fit: some of them.
const COMPLETIONS_ROOM: u32 = 1024;

/// A queue stops when fewer places than this are left.
const SPARE_REQUESTS: u32 = 4;

/// One queue.
#[pin_data]
pub(crate) struct Queue {
    #[pin]
    napi: Napi<Queue>,
    link: Arc<Link>,
    index: u16,
    channel: SetOnce<Arc<Channel>>,
    /// What the host has been asked, and has not answered.
    #[pin]
    pub(crate) slots: RequestSlots<Kind, Request>,
    capacity: u32,
    /// Messages with packets that the host has.
    outstanding: Atomic<u32>,
    /// Used by who sends, one at a time.
    #[pin]
    pub(crate) sender: SpinLock<Option<Sender>>,
    /// Used by the poll.
    #[pin]
    receive: SpinLock<Receive>,
}

impl_has_napi! {
    impl HasNapi for Queue { self.napi, Queue::poll }
}

impl Queue {
    /// Makes a queue whose channel's rings have `ring_bytes` bytes.
    pub(crate) fn new(link: Arc<Link>, index: u16, ring_bytes: usize) -> Result<Arc<Self>> {
        let netdev = link.nic.netdev().clone();
        let capacity = ring_bytes / BYTES_PER_REQUEST;
        let receive = Receive::new(index)?;
        Arc::pin_init(
            try_pin_init!(Self {
                napi <- Napi::new(netdev),
                link,
                index,
                channel: SetOnce::new(),
                slots <- RequestSlots::new(capacity),
                capacity: u32::try_from(capacity)?,
                outstanding: Atomic::new(0),
                sender <- new_spinlock!(None, "netvsc_sender"),
                receive <- new_spinlock!(receive, "netvsc_receive"),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Number of the queue.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Whether the host serves the queue's channel.
    pub(crate) fn is_served(&self) -> bool {
        self.channel()
            .is_some_and(|channel| !channel.is_rescinded())
    }

    /// The channel, from when it is about to be opened.
    pub(crate) fn channel(&self) -> Option<&Arc<Channel>> {
        self.channel.as_ref()
    }

    /// Sets the channel, once.
    pub(crate) fn set_channel(&self, channel: Arc<Channel>) -> Result {
        self.channel.populate(channel).then_some(()).ok_or(EBUSY)
    }

    /// Makes ready for packets that come in, before there are any.
    pub(crate) fn prepare_receive(&self, buffers: &Buffers) -> Result {
        let owed = Receive::owed(&buffers.receive_sections)?;
        let _softirqs = net::BhDisabled::new();
        let before = core::mem::replace(&mut self.receive.lock().owed, owed);
        drop(before);
        Ok(())
    }

    /// Makes ready for packets to send.
    pub(crate) fn prepare_send(&self, buffers: &Buffers, limits: &Limits) {
        let sender = Sender::new(&buffers.send_sections, limits);
        let _softirqs = net::BhDisabled::new();
        *self.sender.lock() = Some(sender);
    }

    /// A message with packets is about to be sent.
    pub(crate) fn begin_send(&self) {
        self.outstanding.fetch_add(1, Full);
    }

    /// The host has answered one, or it could not be sent.
    pub(crate) fn end_send(&self) {
        self.outstanding.fetch_sub(1, Full);
    }

    /// Messages with packets that the host has.
    pub(crate) fn outstanding(&self) -> u32 {
        self.outstanding.load(Relaxed)
    }

    /// Whether there is hardly any place for another message.
    pub(crate) fn is_nearly_full(&self) -> bool {
        self.outstanding().saturating_add(SPARE_REQUESTS) >= self.capacity
    }

    /// Lets users know which NAPI instance serves the queue.
    pub(crate) fn show_napi(&self, rtnl: &net::Rtnl, on: bool) {
        let napi = on.then_some(&self.napi);
        self.link
            .nic
            .netdev()
            .set_queue_napi(rtnl, self.index, napi);
    }

    fn poll(&self, cx: &PollContext<'_>, budget: usize) -> usize {
        let Some(channel) = self.channel() else {
            cx.complete(0);
            return 0;
        };
        let link = &*self.link;
        let mut receive = self.receive.lock();
        let done = channel.poll(budget, &mut |packet| {
            self.packet(link, cx, channel, &mut receive, packet)
        });
        let told = receive.tell_host(link, channel);
        drop(receive);
        if done < budget {
            // If the ring was full, the host signals when there is room; there may be some by now.
            let again = !told && channel.request_send_interrupt(COMPLETIONS_ROOM);
            if cx.complete(done) && again {
                self.napi.schedule();
            }
        }
        done
    }

    /// Handles a packet. Returns how much of the budget it took.
    fn packet(
        &self,
        link: &Link,
        cx: &PollContext<'_>,
        channel: &Channel,
        receive: &mut Receive,
        packet: &Packet<'_>,
    ) -> usize {
        match packet.packet_type() {
            PacketType::COMPLETION => {
                self.completion(link, cx, packet.transaction_id(), packet.payload());
                1
            }
            PacketType::TRANSFER_PAGES => receive.packet(link, cx, channel, packet),
            PacketType::IN_BAND => {
                Self::in_band(link, packet.payload());
                1
            }
            other => {
                link.nic
                    .invalid(fmt!("unexpected packet {:#x}\n", other.get()));
                1
            }
        }
    }

    /// The host has answered a request.
    fn completion(&self, link: &Link, cx: &PollContext<'_>, id: u64, payload: &[u8]) {
        let message_type = nvsp::split_type(payload).map(|(message_type, _)| message_type);
        let request = message_type
            .ok()
            .and_then(Kind::completed_by)
            .and_then(|kind| self.slots.complete(id, &kind).ok());
        match request {
            Some(Request::Data(sent)) => {
                let status = match HostMessage::parse(payload, link.version()) {
                    Ok(HostMessage::PacketComplete(complete)) => complete.status,
                    _ => Status::FAILURE,
                };
                let ok = status == Status::SUCCESS;
                if !ok {
                    link.nic.warn(fmt!(
                        "host did not send a packet: status {}\n",
                        status.get()
                    ));
                }
                self.sent(link, cx, sent, ok);
            }
            // What counts is the answer, which comes by itself.
            Some(Request::Control(_)) => {}
            Some(Request::Nvsp(waiting)) => waiting.finish(payload),
            None => {
                link.nic.stats.events.invalid_completion.count();
                link.nic.warn(fmt!(
                    "completion of {} bytes for request {:#x}, which there is not\n",
                    payload.len(),
                    id
                ));
            }
        }
    }

    /// The host has something to say.
    fn in_band(link: &Link, payload: &[u8]) {
        let version = link.version();
        if version.is_none() {
            // What it says while the version is agreed on is not for us yet.
            return;
        }
        match HostMessage::parse(payload, version) {
            Ok(HostMessage::IndirectionTable(table)) => link.nic.steering.set_hosts_table(&table),
            // A virtual function beside the adapter is not made use of.
            Ok(HostMessage::VfAssociation(_)) => {}
            Ok(_) => link
                .nic
                .invalid(fmt!("unexpected message of {} bytes\n", payload.len())),
            Err(error) => link.nic.invalid(fmt!("{}\n", Show(error))),
        }
    }

    /// Sends a request of NVSP; `waiting` gets the completion.
    pub(crate) fn send_nvsp(&self, message: &[u8], kind: Kind, waiting: &Arc<Waiting>) -> Result {
        let channel = self.channel().ok_or(ENODEV)?;
        let request = Request::Nvsp(waiting.clone());
        self.slots
            .send(kind, request, |id| channel.send(message, id, true))
            .map_err(|(error, _)| error)
    }
}

impl Handler for Queue {
    fn on_packet(&self, _channel: &Channel, _packet: &Packet<'_>) {
        // Packets are taken in the poll.
    }

    fn on_interrupt(&self, _channel: &Channel) {
        self.napi.schedule();
    }

    fn on_rescind(&self, _channel: &Channel) {
        if self.index == 0 {
            self.link.die();
        }
    }

    fn on_error(&self, _channel: &Channel) {
        // A user can bring the device down and up again.
        self.link.nic.link_change(Change::Down);
        dev_err!(
            self.link.nic.dev(),
            "the host has damaged the ring of queue {}\n",
            self.index
        );
        self.link.die();
    }
}
