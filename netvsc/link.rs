// SPDX-License-Identifier: GPL-2.0

//! One attachment to the host: what the channels of an adapter share from when the primary channel is
//! opened until it is closed.

use crate::{
    control::Control,
    nic::{
        Change,
        Nic, //
    },
    params, //
};
use hv_proto::net::{
    control::{
        Event,
        Limits, //
    },
    nvsp::Version,
    sections::Sections,
    transmit::{
        SectionMap,
        Words, //
    },
    ETHERNET_HEADER_SIZE, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        rcu,
        Arc,
        SetOnce, //
    }, //
};
use vmbus::{
    Channel,
    Gpadl,
    SharedBuffer, //
};

/// The shared buffers, once they are agreed on.
pub(crate) struct Buffers {
    /// The host writes what it sends to this.
    pub(crate) receive: Gpadl,
    pub(crate) receive_sections: Sections,
    /// We write what we send to this.
    pub(crate) send: Gpadl,
    pub(crate) send_sections: Sections,
    /// Which sections of the send buffer are in use.
    pub(crate) sections: SectionMap<Bits>,
}

/// The bits of a [`SectionMap`]. All CPUs use them.
pub(crate) struct Bits(KVec<Atomic<u64>>);

impl Words for Bits {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn load(&self, index: usize) -> u64 {
        self.0
            .get(index)
            .map_or(u64::MAX, |word| word.load(Relaxed))
    }

    fn exchange(&self, index: usize, old: u64, new: u64) -> bool {
        self.0
            .get(index)
            .is_some_and(|word| word.cmpxchg(old, new, Full).is_ok())
    }
}

impl Buffers {
    pub(crate) fn new(
        receive: Gpadl,
        receive_sections: Sections,
        send: Gpadl,
        send_sections: Sections,
    ) -> Result<Self> {
        let count = send_sections.count();
        let mut words = KVec::new();
        for _ in 0..SectionMap::<Bits>::words_needed(count) {
            words.push(Atomic::new(0), GFP_KERNEL)?;
        }
        Ok(Self {
            receive,
            receive_sections,
            send,
            send_sections,
            sections: SectionMap::new(Bits(words), count),
        })
    }

    /// The buffer that we write to.
    pub(crate) fn send_buffer(&self) -> &SharedBuffer {
        self.send.buffer()
    }

    /// The buffer that the host writes to.
    pub(crate) fn receive_buffer(&self) -> &SharedBuffer {
        self.receive.buffer()
    }
}

/// One attachment to the host.
#[pin_data]
pub(crate) struct Link {
    pub(crate) nic: Arc<Nic>,
    pub(crate) primary: Arc<Channel>,
    /// The longest frame, in bytes.
    pub(crate) frame_size: u32,
    #[pin]
    pub(crate) control: Control,
    /// Number of the agreed version; 0 before there is one.
    version: Atomic<u32>,
    buffers: SetOnce<Buffers>,
    limits: SetOnce<Limits>,
    /// Queues may be woken.
    tx_enabled: Atomic<bool>,
    /// Nothing is sent any more.
    closing: Atomic<bool>,
    /// The host has taken the adapter away, or has damaged a ring.
    dead: Atomic<bool>,
}

impl Link {
    pub(crate) fn new(nic: Arc<Nic>, primary: Arc<Channel>, mtu: u32) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                nic,
                primary,
                frame_size: mtu.saturating_add(ETHERNET_HEADER_SIZE),
                control <- Control::new(),
                version: Atomic::new(0),
                buffers: SetOnce::new(),
                limits: SetOnce::new(),
                tx_enabled: Atomic::new(false),
                closing: Atomic::new(false),
                dead: Atomic::new(false),
            }),
            GFP_KERNEL,
        )
    }

    /// The agreed version.
    pub(crate) fn version(&self) -> Option<Version> {
        Version::from_raw(self.version.load(Relaxed))
    }

    /// Sets the agreed version.
    pub(crate) fn set_version(&self, version: Version) {
        self.version.store(version.raw(), Relaxed);
    }

    /// What the host has said about messages.
    pub(crate) fn limits(&self) -> Limits {
        self.limits.copy().unwrap_or(Limits::DEFAULT)
    }

    /// Sets what the host has said about messages, once.
    pub(crate) fn set_limits(&self, limits: Limits) {
        self.limits.populate(limits);
    }

    /// The shared buffers.
    pub(crate) fn buffers(&self) -> Option<&Buffers> {
        self.buffers.as_ref()
    }

    /// Sets the shared buffers, once.
    pub(crate) fn set_buffers(&self, buffers: Buffers) -> Result {
        self.buffers.populate(buffers).then_some(()).ok_or(EBUSY)
    }

    /// Whether queues may be woken.
    pub(crate) fn is_tx_enabled(&self) -> bool {
        self.tx_enabled.load(Acquire)
    }

    /// Sets whether queues may be woken.
    pub(crate) fn set_tx_enabled(&self, on: bool) {
        self.tx_enabled.store(on, Release);
    }

    /// Whether nothing is sent any more.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Relaxed)
    }

    /// Lets nothing be sent any more.
    pub(crate) fn set_closing(&self) {
        self.closing.store(true, Relaxed);
    }

    /// Whether the host does not serve the adapter any more.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Relaxed)
    }

    /// The host does not serve the adapter any more: ends all waits. Any context.
    pub(crate) fn die(&self) {
        self.dead.store(true, Relaxed);
        self.control.end();
    }

    /// The host tells something by itself.
    pub(crate) fn event(&self, event: Event<'_>) {
        match event {
            Event::LinkUp => self.nic.link_change(Change::Up),
            Event::LinkDown => self.nic.link_change(Change::Down),
            Event::NetworkChange => self.nic.link_change(Change::Bounce),
            Event::LinkSpeed(speed) => self.nic.set_speed(speed),
            // `control` keeps the answers, and nothing depends on the other ones.
            Event::Answer(_) | Event::Other(_) => {}
            Event::Keepalive(message) => {
                // The host asks again if it gets no answer.
                let _ = self.answer_keepalive(message.as_bytes());
            }
        }
    }

    fn answer_keepalive(&self, message: &[u8]) -> Result {
        let mut bytes = KVec::new();
        bytes.extend_from_slice(message, GFP_ATOMIC)?;
        let guard = rcu::read_lock();
        let session = self.nic.session(&guard).ok_or(ENODEV)?;
        let sent = session.primary_queue().send_rndis(bytes);
        sent.map_err(|(error, _)| error)
    }

    /// Time that the host is given for an answer, in milliseconds.
    pub(crate) fn timeout(&self) -> u32 {
        params::host_timeout_ms()
    }
}
