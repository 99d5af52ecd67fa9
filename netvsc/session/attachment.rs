// SPDX-License-Identifier: GPL-2.0

//! An attachment from its beginning to its end: the channels are opened, the buffers are shared, and in the end
//! everything is given back.

use super::{
    ports::{
        Ports,
        Subchannels, //
    },
    Config, //
};
use crate::{
    link::{
        Buffers,
        Link, //
    },
    nic::Nic,
    params,
    queue::Queue, //
};
use hv_proto::net::{
    connect::{
        granted_sub_channels,
        Buffer,
        Connect,
        GuestConfig,
        Step, //
    },
    nvsp::{
        Body,
        SubChannelRequest,
        MESSAGE_SIZE, //
    },
    MAX_CHANNELS, //
};
use kernel::{
    prelude::*,
    sync::Arc,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};
use vmbus::{
    Channel,
    Gpadl,
    SharedBuffer,
    Show,
    SubchannelRegistration, //
};

/// Time between two looks at something that will come to pass soon.
pub(super) const STEP: Delta = Delta::from_millis(5);
pub(super) const STEP_MS: u32 = 5;

/// How long packets may be on their way when traffic ends, in milliseconds.
const DRAIN_MS: u32 = 2_000;

/// How long the host may take to take sub-channels away whose primary channel is closed, in
/// milliseconds.
const RETURN_MS: u32 = 5_000;

/// What an attachment holds. Dropping it gives everything back, and sleeps.
pub(super) struct Attachment {
    pub(super) link: Arc<Link>,
    /// One for each channel that there may be; at least one.
    pub(super) queues: KVec<Arc<Queue>>,
    pub(super) primary: Arc<Queue>,
    ports: Arc<Ports>,
    subchannels: Option<SubchannelRegistration>,
    /// The buffers, as long as they are not agreed on.
    receive: Option<Gpadl>,
    send: Option<Gpadl>,
    /// Take the buffers back.
    revoke: [Option<[u8; MESSAGE_SIZE]>; 2],
    /// RNDIS has begun.
    pub(super) initialized: bool,
}

impl Attachment {
    /// Opens the primary channel, and agrees with the host on a version and on the buffers.
    pub(super) fn new(nic: &Arc<Nic>, primary: &Arc<Channel>, config: &Config) -> Result<Self> {
        let link = Link::new(nic.clone(), primary.clone(), config.mtu)?;
        let queue = Queue::new(link.clone(), 0, params::ring_bytes())?;
        let mut queues = KVec::with_capacity(MAX_CHANNELS as usize, GFP_KERNEL)?;
        queues.push(queue.clone(), GFP_KERNEL)?;
        // From here on, `drop` sees to what was begun.
        let mut this = Self {
            link,
            queues,
            primary: queue,
            ports: Ports::new(MAX_CHANNELS)?,
            subchannels: None,
            receive: None,
            send: None,
            revoke: [None; 2],
            initialized: false,
        };
        this.ports.open(&this.primary, primary)?;
        this.connect(primary, config)?;
        Ok(this)
    }

    fn connect(&mut self, primary: &Arc<Channel>, config: &Config) -> Result {
        let link = self.link.clone();
        let mut connect = Connect::new(GuestConfig::new(config.mtu));
        let mut step = connect.start();
        let agreed = loop {
            let next = match step {
                Step::Request(message) => {
                    let answer = self.ask(&message)?;
                    connect.on_answer(answer.get())
                }
                Step::Notify(message) => {
                    Self::retry(&link, || primary.send(&message, 0, false))?;
                    connect.sent()
                }
                Step::ShareBuffer { buffer, max_size } => {
                    let (place, sections, size) = match buffer {
                        Buffer::Receive => (
                            &mut self.receive,
                            config.rx_sections,
                            config.rx_section_size,
                        ),
                        Buffer::Send => {
                            (&mut self.send, config.tx_sections, config.tx_section_size)
                        }
                    };
                    let len = sections.saturating_mul(size).max(1).min(max_size) as usize;
                    let shared = primary.establish_gpadl(SharedBuffer::new(len)?)?;
                    let len = u32::try_from(shared.buffer().len())?.min(max_size);
                    let id = shared.id();
                    *place = Some(shared);
                    connect.shared(id, len)
                }
                Step::Done(agreed) => break agreed,
            };
            self.revoke = connect.revoke();
            step = next.map_err(|error| {
                dev_err!(link.nic.dev(), "{}\n", Show(error));
                EIO
            })?;
        };
        let receive = self.receive.take().ok_or(EIO)?;
        let send = self.send.take().ok_or(EIO)?;
        let buffers = Buffers::new(receive, agreed.receive, send, agreed.send)?;
        self.primary.prepare_receive(&buffers)?;
        link.set_version(agreed.version);
        link.set_buffers(buffers)
    }

    /// Asks for sub-channels, and opens those that come, `wanted` channels in all. Returns how many can
    /// be used.
    pub(super) fn open_subchannels(&mut self, primary: &Arc<Channel>, wanted: u32) -> Result<u16> {
        let link = self.link.clone();
        let version = link.version().ok_or(EIO)?;
        let asked = wanted.saturating_sub(1);
        if asked == 0 {
            return Ok(1);
        }
        let buffers = link.buffers().ok_or(EIO)?;
        for index in 1..u16::try_from(wanted)? {
            let queue = Queue::new(link.clone(), index, params::ring_bytes())?;
            queue.prepare_receive(buffers)?;
            queue.prepare_send(buffers, &link.limits());
            self.queues.push(queue, GFP_KERNEL)?;
        }
        let answer = self.ask(&SubChannelRequest::allocate(asked).encode())?;
        let granted = match granted_sub_channels(answer.get(), version, asked) {
            Ok(granted) => granted,
            Err(error) => {
                dev_warn!(link.nic.dev(), "{}\n", Show(error));
                return Ok(1);
            }
        };
        if granted == 0 {
            return Ok(1);
        }
        self.ports.expect(granted);
        let mut queues = KVec::with_capacity(self.queues.len(), GFP_KERNEL)?;
        for queue in self.queues.iter() {
            queues.push(queue.clone(), GFP_KERNEL)?;
        }
        let handler = Arc::new(
            Subchannels {
                link: link.clone(),
                queues,
                ports: self.ports.clone(),
            },
            GFP_KERNEL,
        )?;
        self.subchannels = Some(primary.set_subchannel_handler(handler)?);
        let mut left = link.timeout();
        while !self.ports.all.wait(STEP_MS) {
            if link.is_dead() {
                return Err(ENODEV);
            }
            left = left.saturating_sub(STEP_MS);
            if left == 0 {
                dev_warn!(link.nic.dev(), "not all of {} sub-channels came\n", granted);
                break;
            }
        }
        Ok(self.ports.count().max(1))
    }

    /// Messages with packets that the host has.
    fn outstanding(&self) -> u32 {
        self.queues
            .iter()
            .map(|queue| queue.outstanding())
            .fold(0, u32::saturating_add)
    }

    /// Waits until the host has answered all messages with packets. Says whether it has.
    pub(super) fn drain(&self) -> bool {
        let mut left = DRAIN_MS;
        while self.outstanding() != 0 {
            if left == 0 || self.link.is_dead() {
                return false;
            }
            left = left.saturating_sub(STEP_MS);
            fsleep(STEP);
        }
        true
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let link = &self.link;
        link.set_tx_enabled(false);
        link.set_closing();
        if self.initialized && !link.is_dead() {
            // Without it, the host notices when the buffers are taken back.
            let _ = self.halt();
            self.drain();
        }
        if !link.is_dead() {
            for message in self.revoke.iter().flatten() {
                // Without it, the host notices when the channel is closed.
                let _ = link.primary.send(message, 0, false);
            }
        }
        self.subchannels = None;
        // The primary channel goes last.
        let mut let_go = true;
        for index in (0..MAX_CHANNELS as usize).rev() {
            let_go &= self.ports.close(index);
        }
        link.control.end();
        for queue in self.queues.iter() {
            queue.cancel_all(link, let_go);
        }
        // They may have been asked for, and offered later.
        if self.queues.len() > 1 {
            // The next attachment must not take them for its own.
            link.primary.wait_for_subchannels(RETURN_MS);
        }
    }
}
