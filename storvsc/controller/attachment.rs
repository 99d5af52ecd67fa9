// SPDX-License-Identifier: GPL-2.0

//! How a controller is attached to its host: the channels are opened, and version, limits and
//! sub-channels are agreed on. And how it is detached.

use super::{
    Controller,
    Io,
    Limits, //
};
use crate::{
    inflight::Table,
    params,
    paths::Path, //
};
use hv_proto::{
    packet::Packet,
    storage::{
        ChannelProperties,
        GuestConfig,
        GuestHandshake,
        GuestStep,
        Negotiated,
        VstorPacket, //
    }, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};
use vmbus::{
    Channel,
    Handler,
    OpenChannel,
    OpenParams,
    ReadMode,
    SubchannelHandler,
    SubchannelRegistration, //
};

/// The largest packet that a host may send: a storage packet, and something for what later versions
/// may append.
const MAX_PACKET: usize = 256;

/// How long the host may take to offer the sub-channels that it has granted, in milliseconds. Those
/// that come later are used, too.
const SUBCHANNEL_TIME: u32 = 10_000;

/// How long the host may take to take sub-channels back whose primary channel is closed, in
/// milliseconds.
const RETURN_TIME: u32 = 5_000;

/// What keeps a controller attached, besides its open channels. Who holds the lock around it attaches
/// or detaches, or must not be disturbed by that. It is held while the host is waited for, with a time
/// limit; nobody takes it who serves commands or answers.
pub(super) type Attachment = Option<SubchannelRegistration>;

/// The driver's side of one channel.
struct Port {
    controller: Arc<Controller>,
    path: Arc<Path>,
}

impl Port {
    /// Opens `channel` as one of the controller's.
    fn open(controller: &Arc<Controller>, channel: &Arc<Channel>) -> Result {
        let bytes = params::ring_bytes();
        // All zero; hosts want it to be there.
        let user_data = [0; size_of::<ChannelProperties>()];
        let path = controller.paths.path(channel)?;
        let port = Arc::new(
            Port {
                controller: controller.clone(),
                path: path.clone(),
            },
            GFP_KERNEL,
        )?;
        let open: OpenChannel = channel.open(
            &OpenParams {
                send_bytes: bytes,
                recv_bytes: bytes,
                user_data: &user_data,
                max_packet: MAX_PACKET,
                mode: ReadMode::Batched,
            },
            port,
        )?;
        controller.paths.add(path, open)
    }
}

impl Handler for Port {
    fn on_packet(&self, _channel: &Channel, packet: &Packet<'_>) {
        self.controller.as_arc_borrow().packet(&self.path, packet);
    }

    fn on_rescind(&self, _channel: &Channel) {
        self.controller.as_arc_borrow().rescinded(&self.path);
    }

    fn on_error(&self, _channel: &Channel) {
        self.controller.as_arc_borrow().damaged(&self.path);
    }
}

/// Opens the sub-channels of a controller as they are offered.
struct Subchannels(Arc<Controller>);

impl SubchannelHandler for Subchannels {
    fn on_subchannel(&self, channel: Arc<Channel>) {
        // One that was there before may have the place still.
        self.0.close_rescinded();
        match Port::open(&self.0, &channel) {
            Err(e) if self.0.limit.allows() => dev_warn!(
                self.0.dev,
                "sub-channel {} is not used: {:?}\n",
                channel.subchannel_index(),
                e
            ),
            _ => (),
        }
    }
}

impl Controller {
    /// Attaches the controller for the first time. `limits` says what may be in flight. Sleeps.
    ///
    /// # Errors
    ///
    /// Those of the bus, `ETIMEDOUT` if the host does not answer, `EIO` if its answers make no sense;
    /// then the controller is to be detached.
    pub(crate) fn attach(
        self: &Arc<Self>,
        limits: impl FnOnce(&Negotiated) -> Limits,
    ) -> Result<(Negotiated, Limits)> {
        let mut attachment = self.attachment.lock();
        let agreed = self.open_primary()?;
        let limits = limits(&agreed);
        let io = Io {
            version: agreed.version,
            max_transfer_bytes: agreed.max_transfer_bytes,
            table: Table::new(limits.queues, limits.can_queue)?,
            max_depth: limits.max_depth.into(),
        };
        if !self.io.populate(io) {
            return Err(EBUSY);
        }
        self.open_others(&mut attachment, &agreed)?;
        Ok((agreed, limits))
    }

    /// Attaches the controller to the host that it was detached from. Sleeps.
    ///
    /// # Errors
    ///
    /// As [`Controller::attach`], `EPROTO` if the host cannot do what it did before.
    pub(super) fn attach_again(self: &Arc<Self>, attachment: &mut Attachment) -> Result {
        let io = self.io.as_ref().ok_or(ENODEV)?;
        let agreed = self.open_primary()?;
        // What the mid-layer knows of the controller cannot be changed any more.
        if agreed.version != io.version || agreed.max_transfer_bytes < io.max_transfer_bytes {
            if self.limit.allows() {
                dev_err!(
                    self.dev,
                    "the host is another one now: storage protocol {}, {} bytes a transfer\n",
                    format_args!("{}", agreed.version),
                    agreed.max_transfer_bytes
                );
            }
            return Err(EPROTO);
        }
        self.open_others(attachment, &agreed)
    }

    /// Opens the primary channel, and shakes hands on it.
    fn open_primary(self: &Arc<Self>) -> Result<Negotiated> {
        self.control.begin();
        Port::open(self, self.paths.primary())?;
        let mut handshake = GuestHandshake::new(GuestConfig {
            sub_channels: self.paths.subchannels(),
            fibre_channel: false,
        });
        let mut packet: VstorPacket = handshake.start();
        loop {
            let reply =
                self.control
                    .execute(self.paths.primary(), &packet, params::host_timeout())?;
            match handshake.on_completion(reply.payload()) {
                Ok(GuestStep::Send(next)) => packet = next,
                Ok(GuestStep::Done(agreed)) => return Ok(agreed),
                Err(e) => {
                    if self.limit.allows() {
                        dev_err!(self.dev, "handshake failed: {}\n", format_args!("{e}"));
                    }
                    return Err(EIO);
                }
            }
        }
    }

    /// Opens the sub-channels that the host has granted. Commands can be sent then.
    fn open_others(self: &Arc<Self>, attachment: &mut Attachment, agreed: &Negotiated) -> Result {
        if agreed.sub_channels != 0 {
            let wanted = agreed.sub_channels.saturating_add(1);
            let handler = Arc::new(Subchannels(self.clone()), GFP_KERNEL)?;
            *attachment = Some(self.paths.primary().set_subchannel_handler(handler)?);
            let usable = self.paths.wait(wanted, SUBCHANNEL_TIME);
            if usable < wanted && self.limit.allows() {
                dev_warn!(self.dev, "only {} of {} channels came\n", usable, wanted);
            }
        }
        self.presence.set_attached();
        // Who finds it damaged says so first, and then that it is lost: one of the two sees the other.
        if self.paths.is_primary_usable() {
            Ok(())
        } else {
            Err(EIO)
        }
    }

    /// Closes all channels. When it returns, the host does nothing any more with the memory of
    /// commands, unless it does not answer even that. Sleeps.
    pub(super) fn detach_locked(&self, attachment: &mut Attachment) {
        // No channel is added any more.
        let had_subchannels = attachment.take().is_some();
        self.paths.close_all();
        if had_subchannels {
            // The next attachment must not take them for its own.
            self.paths.primary().wait_for_subchannels(RETURN_TIME);
        }
    }

    /// Detaches the controller for ever. Sleeps.
    pub(crate) fn detach(&self) {
        let queue = self.rescue.lock().take();
        // Out of the lock: this waits.
        drop(queue);
        self.presence.set_away();
        self.detach_locked(&mut self.attachment.lock());
    }
}
