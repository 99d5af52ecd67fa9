// SPDX-License-Identifier: GPL-2.0

//! The open channels of an attachment. The sub-channels are opened when the host offers them, and closed when it
//! takes one away.

use crate::{
    link::Link,
    net::{
        Enabled,
        Napi, //
    },
    params,
    queue::Queue, //
};
use hv_proto::net::MAX_TRANSFER_RANGES;
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
use vmbus::{
    Channel,
    Event,
    OpenChannel,
    OpenParams,
    ReadMode,
    SubchannelHandler, //
};

/// The largest packet that a host may send: descriptor, ranges, message, and something for what later
/// versions may append.
const MAX_PACKET: usize = 16 + 8 + 8 * MAX_TRANSFER_RANGES + 256;

/// An open channel, and who serves it. They are dropped in this order.
struct Port {
    _napi: Enabled<Queue>,
    open: OpenChannel,
}

impl Port {
    /// Closes the channel. Says whether the host has let go of what it was given. Sleeps.
    fn close(self) -> bool {
        let channel = self.open.channel().clone();
        let lost = channel.lost_memory();
        drop(self);
        channel.lost_memory() == lost
    }
}

/// The open channels.
#[pin_data]
pub(super) struct Ports {
    #[pin]
    list: Mutex<KVec<Option<Port>>>,
    /// How many sub-channels are still to come.
    missing: Atomic<u32>,
    /// The host has not answered when one of them was opened.
    silent: Atomic<bool>,
    /// None is.
    #[pin]
    pub(super) all: Event,
}

impl Ports {
    pub(super) fn new(count: u32) -> Result<Arc<Self>> {
        let mut list = KVec::new();
        for _ in 0..count {
            list.push(None, GFP_KERNEL)?;
        }
        Arc::pin_init(
            pin_init!(Self {
                list <- new_mutex!(list, "netvsc_ports"),
                missing: Atomic::new(u32::MAX),
                silent: Atomic::new(false),
                all <- Event::new(),
            }),
            GFP_KERNEL,
        )
    }

    /// Opens a channel for a queue.
    pub(super) fn open(&self, queue: &Arc<Queue>, channel: &Arc<Channel>) -> Result {
        let bytes = params::ring_bytes();
        queue.set_channel(channel.clone())?;
        // First, for the host may send at once.
        let napi = Napi::enable(queue.clone())?;
        let open = channel.open(
            &OpenParams {
                send_bytes: bytes,
                recv_bytes: bytes,
                user_data: &[],
                max_packet: MAX_PACKET,
                mode: ReadMode::Isr,
            },
            queue.clone(),
        )?;
        let port = Port { _napi: napi, open };
        let mut list = self.list.lock();
        let place = list.get_mut(usize::from(queue.index())).ok_or(EINVAL)?;
        let before = place.replace(port);
        drop(list);
        drop(before);
        Ok(())
    }

    /// So many sub-channels are to come.
    pub(super) fn expect(&self, missing: u32) {
        self.missing.store(missing, Relaxed);
    }

    /// A sub-channel has come, or will not.
    fn settle(&self) {
        let missing = self.missing.load(Relaxed).saturating_sub(1);
        self.missing.store(missing, Relaxed);
        if missing == 0 {
            self.all.set();
        }
    }

    /// Closes a channel. Says whether the host has let go of what it was given; it has of a channel that
    /// is not open. Sleeps.
    pub(super) fn close(&self, index: usize) -> bool {
        let port = self.list.lock().get_mut(index).and_then(Option::take);
        port.is_none_or(Port::close)
    }

    /// Number of channels that are open one after the other, from the first on.
    pub(super) fn count(&self) -> u16 {
        let list = self.list.lock();
        let open = list.iter().take_while(|port| port.is_some()).count();
        u16::try_from(open).unwrap_or(u16::MAX)
    }
}

/// Opens the sub-channels as they are offered.
pub(super) struct Subchannels {
    pub(super) link: Arc<Link>,
    pub(super) queues: KVec<Arc<Queue>>,
    pub(super) ports: Arc<Ports>,
}

impl SubchannelHandler for Subchannels {
    fn on_subchannel(&self, channel: Arc<Channel>) {
        let index = channel.subchannel_index();
        let result = match self.queues.get(usize::from(index)) {
            // Each wait for a host that does not answer is a long one.
            _ if self.ports.silent.load(Relaxed)
                || self.link.is_closing()
                || self.link.is_dead() =>
            {
                Err(ENODEV)
            }
            Some(queue) if index != 0 => self.ports.open(queue, &channel),
            _ => Err(EINVAL),
        };
        if let Err(error) = result {
            if error == ETIMEDOUT {
                self.ports.silent.store(true, Relaxed);
            }
            self.link
                .nic
                .warn(fmt!("sub-channel {} is not used: {:?}\n", index, error));
        }
        self.ports.settle();
    }

    fn on_subchannel_gone(&self, channel: &Channel) {
        let index = usize::from(channel.subchannel_index());
        let mut list = self.ports.list.lock();
        let port = list
            .get_mut(index)
            .and_then(|port| port.take_if(|port| port.open.channel().id() == channel.id()));
        drop(list);
        let Some(port) = port else {
            return;
        };
        let let_go = port.close();
        if let Some(queue) = self.queues.get(index) {
            queue.cancel_all(&self.link, let_go);
            // The first queue sends for it from now on.
            if self.link.is_tx_enabled() {
                self.link.nic.netdev().wake_queue(queue.index());
            }
        }
    }
}
