// SPDX-License-Identifier: GPL-2.0

//! What a driver says when it opens a channel, and what it is told then.

use super::Channel;
use hv_proto::packet::Packet;
use kernel::sync::Arc;

/// How a channel's packets reach its [`Handler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadMode {
    /// [`Handler::on_packet`] in softirq context; the host's signals are masked meanwhile. For all
    /// devices with much to say.
    Batched,
    /// The same without masking. For devices that send a message now and then.
    Direct,
    /// [`Handler::on_interrupt`] in hard interrupt context, with the host's signals masked. The
    /// driver calls [`Channel::poll`] later, from softirq context (NAPI), until that says that the
    /// ring is empty; there is no other signal before that.
    ///
    /// The host may signal before [`Channel::open`] has returned, so whatever polls must be ready
    /// before that.
    Isr,
}

/// What a driver chooses when it opens a channel.
#[derive(Clone, Copy, Debug)]
pub struct OpenParams<'a> {
    /// Size of the ring to the host in bytes, its control page included: at least two pages.
    pub send_bytes: usize,
    /// Size of the ring from the host in bytes, its control page included: at least two pages.
    pub recv_bytes: usize,
    /// What the host's service wants to know, at most 120 bytes.
    pub user_data: &'a [u8],
    /// Largest packet that the host may send, in bytes, descriptor included. Larger ones are
    /// counted and dropped.
    pub max_packet: usize,
    /// How packets reach the handler.
    pub mode: ReadMode,
}

/// The driver's side of an open channel.
///
/// No method is called after the [`OpenChannel`] was dropped.
pub trait Handler: Send + Sync + 'static {
    /// A packet has come. It is a private copy, and its lengths have been checked; what is in the
    /// payload has not.
    ///
    /// Softirq context; must not sleep. Not called in [`ReadMode::Isr`].
    fn on_packet(&self, channel: &Channel, packet: &Packet<'_>) {
        let _ = (channel, packet);
    }

    /// There is room in the ring again, after [`Channel::request_send_interrupt`].
    ///
    /// Softirq context; must not sleep. In [`ReadMode::Isr`], [`Channel::poll`] calls it.
    fn on_send_space(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The host has signalled the channel ([`ReadMode::Isr`] only).
    ///
    /// Hard interrupt context, or softirq context after the channel has changed its CPU.
    fn on_interrupt(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The host has taken the channel away. Everything that waits for a packet of it must be ended
    /// here; no packet comes any more, and sending fails with `ENODEV`.
    ///
    /// Process context, may sleep. Called at most once, possibly before [`Channel::open`] has
    /// returned, which may succeed all the same. Must not drop the channel's [`OpenChannel`], nor
    /// wait for the one who does, nor for the one who opens it.
    fn on_rescind(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The host has damaged the ring. No packet comes any more, and sending fails with `EIO`.
    ///
    /// Process context, may sleep. Called at most once. As in [`Handler::on_rescind`], the
    /// [`OpenChannel`] must not be dropped.
    fn on_error(&self, channel: &Channel) {
        let _ = channel;
    }
}

/// A driver's interest in the sub-channels of its device.
pub trait SubchannelHandler: Send + Sync + 'static {
    /// A sub-channel was offered. Called once for each, also for those that were there before.
    ///
    /// Process context, may sleep and may open the channel.
    fn on_subchannel(&self, channel: Arc<Channel>);

    /// The host has taken a sub-channel away for which [`on_subchannel`](Self::on_subchannel) was
    /// called. Its [`Handler::on_rescind`] has run.
    ///
    /// Process context, may sleep. The driver should drop the channel's [`OpenChannel`] here, not
    /// only when the device goes: the host cannot use the id again before that.
    fn on_subchannel_gone(&self, channel: &Channel) {
        let _ = channel;
    }
}
