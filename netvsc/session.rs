// SPDX-License-Identifier: GPL-2.0

//! An attachment from its beginning to its end: the channels are opened, the host is asked what the
//! adapter is like, and in the end everything is given back.
//!
//! Every wait has a time limit, and ends at once when the host takes the adapter away.

use crate::{
    control::{
        Bytes,
        Kind,
        Reply, //
    },
    link::{
        Buffers,
        Link, //
    },
    net::{
        BhDisabled,
        Enabled,
        Napi,
        Rtnl, //
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
    control::{
        self,
        Limits, //
    },
    nvsp::{
        self,
        Body,
        SubChannelRequest,
        MESSAGE_SIZE, //
    },
    offload,
    oid::{
        self,
        MediaState,
        Oid,
        PacketFilter, //
    },
    rndis::{
        self,
        Initialize,
        MessageType,
        RequestBuf, //
    },
    rss,
    MacAddress,
    MAX_CHANNELS,
    MAX_TRANSFER_RANGES, //
};
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
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};
use vmbus::{
    Channel,
    Event,
    Gpadl,
    OpenChannel,
    OpenParams,
    ReadMode,
    SharedBuffer,
    Show,
    SubchannelHandler,
    SubchannelRegistration, //
};
use zerocopy::{
    little_endian::U32,
    IntoBytes, //
};

/// The largest packet that a host may send: descriptor, ranges, message, and something for what later
/// versions may append.
const MAX_PACKET: usize = 16 + 8 + 8 * MAX_TRANSFER_RANGES + 256;

/// Most bytes of an RNDIS request.
const MAX_REQUEST: usize = 2048;

/// Time between two looks at something that will come to pass soon.
const STEP: Delta = Delta::from_millis(5);
const STEP_MS: u32 = 5;

/// How long packets may be on their way when traffic ends, in milliseconds.
const DRAIN_MS: u32 = 2_000;

/// How long the host may take to take sub-channels away whose primary channel is closed, in
/// milliseconds.
const RETURN_MS: u32 = 5_000;

/// What an attachment is to be like.
#[derive(Clone, Copy)]
pub(crate) struct Config {
    pub(crate) mtu: u32,
    /// Most channels.
    pub(crate) channels: u32,
    pub(crate) rx_sections: u32,
    pub(crate) rx_section_size: u32,
    pub(crate) tx_sections: u32,
    pub(crate) tx_section_size: u32,
}

/// What the host has said of the adapter.
pub(crate) struct Facts {
    pub(crate) mac: MacAddress,
    /// The largest MTU.
    pub(crate) max_mtu: Option<u32>,
    /// A name for people to read, in UTF-8.
    pub(crate) name: Option<KVec<u8>>,
    pub(crate) offloads: Option<offload::Capabilities>,
    pub(crate) link_up: bool,
    /// Channels that frames can come on, and entries of the table that spreads them.
    pub(crate) rss: Option<(u32, usize)>,
}

/// An open channel, and who serves it. They are dropped in this order.
struct Port {
    _napi: Enabled<Queue>,
    open: OpenChannel,
}

/// The open channels.
#[pin_data]
struct Ports {
    #[pin]
    list: Mutex<KVec<Option<Port>>>,
    /// How many sub-channels are still to come.
    missing: Atomic<u32>,
    #[pin]
    all: Event,
}

impl Ports {
    fn new(count: u32) -> Result<Arc<Self>> {
        let mut list = KVec::new();
        for _ in 0..count {
            list.push(None, GFP_KERNEL)?;
        }
        Arc::pin_init(
            pin_init!(Self {
                list <- new_mutex!(list, "netvsc_ports"),
                missing: Atomic::new(u32::MAX),
                all <- Event::new(),
            }),
            GFP_KERNEL,
        )
    }

    /// Opens a channel for a queue.
    fn open(&self, queue: &Arc<Queue>, channel: &Arc<Channel>) -> Result {
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

    /// A sub-channel has come, or will not.
    fn settle(&self) {
        let missing = self.missing.load(Relaxed).saturating_sub(1);
        self.missing.store(missing, Relaxed);
        if missing == 0 {
            self.all.set();
        }
    }

    /// Closes a channel. Sleeps.
    fn close(&self, index: usize) {
        let port = self.list.lock().get_mut(index).and_then(Option::take);
        drop(port);
    }

    /// Number of channels that are open one after the other, from the first on.
    fn count(&self) -> u16 {
        let list = self.list.lock();
        let open = list.iter().take_while(|port| port.is_some()).count();
        u16::try_from(open).unwrap_or(u16::MAX)
    }
}

/// Opens the sub-channels as they are offered.
struct Subchannels {
    link: Arc<Link>,
    queues: KVec<Arc<Queue>>,
    ports: Arc<Ports>,
}

impl SubchannelHandler for Subchannels {
    fn on_subchannel(&self, channel: Arc<Channel>) {
        let index = channel.subchannel_index();
        let result = match self.queues.get(usize::from(index)) {
            Some(queue) if index != 0 => self.ports.open(queue, &channel),
            _ => Err(EINVAL),
        };
        if let Err(error) = result {
            dev_warn!(
                self.link.nic.dev(),
                "sub-channel {} is not used: {:?}\n",
                index,
                error
            );
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
        drop(port);
    }
}

/// What an attachment holds. Dropping it gives everything back, and sleeps.
struct Attachment {
    link: Arc<Link>,
    /// One for each channel that there may be; at least one.
    queues: KVec<Arc<Queue>>,
    primary: Arc<Queue>,
    ports: Arc<Ports>,
    subchannels: Option<SubchannelRegistration>,
    /// Take the buffers back.
    revoke: [Option<[u8; MESSAGE_SIZE]>; 2],
    /// RNDIS has begun.
    initialized: bool,
}

impl Attachment {
    /// Opens the primary channel, and agrees with the host on a version and on the buffers.
    fn new(nic: &Arc<Nic>, primary: &Arc<Channel>, config: &Config) -> Result<Self> {
        let link = Link::new(nic.clone(), primary.clone())?;
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
        let mut receive = None;
        let mut send = None;
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
                        Buffer::Receive => {
                            (&mut receive, config.rx_sections, config.rx_section_size)
                        }
                        Buffer::Send => (&mut send, config.tx_sections, config.tx_section_size),
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
        let take = |place: Option<Gpadl>| place.ok_or(EIO);
        let buffers = Buffers::new(take(receive)?, agreed.receive, take(send)?, agreed.send)?;
        self.primary.prepare_receive(&buffers)?;
        link.set_version(agreed.version);
        link.set_buffers(buffers)
    }

    /// Asks something of NVSP; returns the payload of the completion.
    fn ask(&self, message: &[u8; MESSAGE_SIZE]) -> Result<Bytes> {
        let (message_type, _) = nvsp::split_type(message).map_err(|_| EINVAL)?;
        let kind = Kind::asked_by(message_type).ok_or(EINVAL)?;
        let link = &self.link;
        let reply = link.control.turn().ask_nvsp(link.timeout(), |waiting| {
            Self::retry(link, || self.primary.send_nvsp(message, kind, waiting))
        })?;
        match reply {
            Reply::Bytes(bytes) => Ok(bytes),
            _ => Err(EIO),
        }
    }

    /// Sends something that may find the ring full.
    fn retry(link: &Link, send: impl Fn() -> Result) -> Result {
        let mut left = link.timeout();
        loop {
            match send() {
                Err(error) if error == EAGAIN && left > STEP_MS && !link.is_dead() => {
                    left -= STEP_MS;
                    fsleep(STEP);
                }
                result => return result,
            }
        }
    }

    /// Asks something of RNDIS. `make` writes the request with the number that it is given.
    fn request(
        &self,
        kind: control::Kind,
        make: impl FnOnce(u32) -> Option<RequestBuf<MAX_REQUEST>>,
    ) -> Result<Reply> {
        let link = &self.link;
        let reply = link.control.turn().ask_rndis(kind, link.timeout(), |id| {
            let request = make(id).ok_or(EINVAL)?;
            let len = u32::try_from(request.as_bytes().len())?;
            link.request.write_at(0, request.as_bytes())?;
            Self::retry(link, || self.primary.send_rndis(0, len))
        })?;
        if let Reply::Failed(failure) = &reply {
            link.nic
                .debug(fmt!("{}: {}\n", format_args!("{kind:?}"), Show(failure)));
        }
        Ok(reply)
    }

    /// The value of an object.
    fn query(&self, oid: Oid, value: &[u8]) -> Result<Bytes> {
        let reply = self.request(control::Kind::Query(oid), |id| {
            RequestBuf::query(id, oid, value)
        })?;
        match reply {
            Reply::Bytes(bytes) => Ok(bytes),
            _ => Err(EOPNOTSUPP),
        }
    }

    /// The value of an object that is a number.
    fn query_number(&self, oid: Oid) -> Result<u32> {
        let bytes = self.query(oid, &[])?;
        let number: Option<U32> = rndis::value(bytes.get());
        number.map(U32::get).ok_or(EIO)
    }

    /// Changes the value of an object.
    fn set(&self, oid: Oid, value: &[u8]) -> Result {
        let reply = self.request(control::Kind::Set(oid), |id| {
            RequestBuf::set(id, oid, value)
        })?;
        match reply {
            Reply::Done => Ok(()),
            _ => Err(EOPNOTSUPP),
        }
    }

    /// Begins RNDIS.
    fn initialize(&mut self) -> Result {
        let reply = self.request(control::Kind::Initialize, |id| {
            let body = Initialize {
                request_id: id.into(),
                major_version: rndis::MAJOR_VERSION.into(),
                minor_version: rndis::MINOR_VERSION.into(),
                max_transfer_size: Limits::DEFAULT.max_transfer_size.into(),
            };
            RequestBuf::new(MessageType::INITIALIZE, &body, &[])
        })?;
        match reply {
            Reply::Initialized(limits) => {
                self.initialized = true;
                let buffers = self.link.buffers().ok_or(EIO)?;
                self.primary.prepare_send(buffers, &limits);
                self.link.set_limits(limits);
                Ok(())
            }
            Reply::Failed(failure) => {
                dev_err!(self.link.nic.dev(), "{}\n", Show(failure));
                Err(EIO)
            }
            _ => Err(EIO),
        }
    }

    /// Asks what the adapter is like. Only the address must be known.
    fn facts(&self) -> Result<Facts> {
        let version = self.link.version().ok_or(EIO)?;
        let mac = self.query(Oid::ETHERNET_PERMANENT_ADDRESS, &[])?;
        let mac = rndis::value::<MacAddress>(mac.get())
            .filter(|mac| mac.is_unicast())
            .ok_or_else(|| {
                dev_err!(self.link.nic.dev(), "the adapter has no address\n");
                EIO
            })?;
        let number = |oid| self.query_number(oid).map(Some).or_else(optional);

        let max_mtu = number(Oid::GEN_MAXIMUM_FRAME_SIZE)?;
        let name = self.query(Oid::GEN_FRIENDLY_NAME, &[]).map(Some);
        let name = name.or_else(optional)?.and_then(|name| text(name.get()));
        let ask = offload::Capabilities::empty(version);
        let offloads = self
            .query(Oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES, ask.as_value())
            .map(Some)
            .or_else(optional)?
            .and_then(|value| {
                offload::Capabilities::parse(value.get())
                    .inspect_err(|error| {
                        dev_warn!(self.link.nic.dev(), "no offloads: {}\n", Show(error));
                    })
                    .ok()
            });
        let media = number(Oid::GEN_MEDIA_CONNECT_STATUS)?;
        if let Some(speed) = number(Oid::GEN_LINK_SPEED)? {
            self.link.nic.set_speed(control::link_speed(speed));
        }
        let rss = if version.has_sub_channels() {
            self.query(
                Oid::GEN_RECEIVE_SCALE_CAPABILITIES,
                rss::Capabilities::query().as_bytes(),
            )
            .map(Some)
            .or_else(optional)?
            .and_then(|value| rss::Capabilities::parse(value.get()).ok())
            .map(|can| (can.queue_count.get(), can.table_entries()))
        } else {
            None
        };
        Ok(Facts {
            mac,
            max_mtu,
            name,
            offloads,
            link_up: media != Some(MediaState::DISCONNECTED.get()),
            rss,
        })
    }

    /// Asks for sub-channels, and opens those that come, `wanted` channels in all. Returns how many can
    /// be used.
    fn open_subchannels(&mut self, primary: &Arc<Channel>, wanted: u32) -> Result<u16> {
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
        self.ports.missing.store(granted, Relaxed);
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
    fn drain(&self) -> bool {
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

    /// Tells the host that RNDIS ends. It does not answer.
    fn halt(&self) -> Result {
        let body = rndis::Halt {
            request_id: U32::ZERO,
        };
        let request: RequestBuf<64> =
            RequestBuf::new(MessageType::HALT, &body, &[]).ok_or(EINVAL)?;
        let _turn = self.link.control.turn();
        let len = u32::try_from(request.as_bytes().len())?;
        self.link.request.write_at(0, request.as_bytes())?;
        self.primary.send_rndis(0, len)
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
        let had_subchannels = self.subchannels.take().is_some();
        // The primary channel goes last.
        for index in (0..MAX_CHANNELS as usize).rev() {
            self.ports.close(index);
        }
        link.control.end();
        for queue in self.queues.iter() {
            queue.cancel_all();
        }
        // The next attachment must not take them for its own.
        let mut left = RETURN_MS;
        while had_subchannels
            && left != 0
            && link.primary.subchannel_count() != 0
            && !link.primary.is_rescinded()
        {
            left = left.saturating_sub(STEP_MS);
            fsleep(STEP);
        }
    }
}

/// Nothing, after an error that says only that the host does not know the object.
fn optional<T>(error: Error) -> Result<Option<T>> {
    if error == ENODEV || error == ETIMEDOUT {
        Err(error)
    } else {
        Ok(None)
    }
}

/// UTF-16 as UTF-8, up to its first zero; `None` if there is nothing, or no memory.
fn text(utf16: &[u8]) -> Option<KVec<u8>> {
    let units = utf16
        .chunks_exact(2)
        .map(|unit| unit.try_into().map_or(0, u16::from_le_bytes))
        .take_while(|&unit| unit != 0);
    let mut text = KVec::new();
    for character in char::decode_utf16(units) {
        let mut bytes = [0; 4];
        let character = character.unwrap_or(char::REPLACEMENT_CHARACTER);
        let bytes = character.encode_utf8(&mut bytes).as_bytes();
        text.extend_from_slice(bytes, GFP_KERNEL).ok()?;
    }
    (!text.is_empty()).then_some(text)
}

/// One attachment, from when the adapter is known. Dropping it gives everything back, and sleeps.
#[pin_data]
pub(crate) struct Session {
    attachment: Attachment,
    /// Number of channels in use.
    count: u16,
    /// Most channels that host and guest can use.
    max_channels: u32,
    /// Which frames the host is to send.
    #[pin]
    filter: Mutex<PacketFilter>,
}

impl Session {
    /// Attaches. Returns what the host has said, too.
    ///
    /// # Errors
    ///
    /// Those of the bus; `EIO` if the host breaks the rules, `ENODEV` if it takes the adapter away,
    /// `ETIMEDOUT` if it does not answer.
    pub(crate) fn new(
        nic: &Arc<Nic>,
        primary: &Arc<Channel>,
        config: &Config,
    ) -> Result<(Arc<Self>, Facts)> {
        let mut attachment = Attachment::new(nic, primary, config)?;
        attachment.initialize()?;
        let facts = attachment.facts()?;
        let max_channels = match facts.rss {
            Some((queues, _)) => crate::net::online_cpus()
                .min(queues)
                .min(nic.netdev().max_queues().into())
                .max(1),
            None => 1,
        };
        let count = attachment.open_subchannels(primary, max_channels.min(config.channels))?;
        let session = Arc::pin_init(
            pin_init!(Self {
                attachment,
                count,
                max_channels,
                filter <- new_mutex!(PacketFilter::empty(), "netvsc_filter"),
            }),
            GFP_KERNEL,
        )?;
        Ok((session, facts))
    }

    /// The attachment's link.
    pub(crate) fn link(&self) -> &Link {
        &self.attachment.link
    }

    /// A queue; `None` if there is no such one.
    pub(crate) fn queue(&self, index: u16) -> Option<&Queue> {
        self.attachment
            .queues
            .get(usize::from(index))
            .map(|queue| &**queue)
    }

    /// The first queue.
    pub(crate) fn primary_queue(&self) -> &Queue {
        &self.attachment.primary
    }

    /// Number of channels in use.
    pub(crate) fn count(&self) -> u16 {
        self.count
    }

    /// Most channels that host and guest can use.
    pub(crate) fn max_channels(&self) -> u32 {
        self.max_channels
    }

    /// Lets users know which NAPI instances serve the queues.
    pub(crate) fn show_napi(&self, rtnl: &Rtnl, on: bool) {
        for queue in self.attachment.queues.iter().take(self.count.into()) {
            queue.show_napi(rtnl, on);
        }
    }

    /// Sets which frames the host sends.
    ///
    /// # Errors
    ///
    /// Those of a request.
    pub(crate) fn set_filter(&self, filter: PacketFilter) -> Result {
        let mut now = self.filter.lock();
        if *now != filter {
            let value = filter.bits().to_le_bytes();
            self.attachment
                .set(Oid::GEN_CURRENT_PACKET_FILTER, &value)?;
            *now = filter;
        }
        Ok(())
    }

    /// Turns offloads on and off.
    ///
    /// # Errors
    ///
    /// Those of a request.
    pub(crate) fn set_offloads(&self, parameters: &offload::Parameters) -> Result {
        self.attachment
            .set(Oid::TCP_OFFLOAD_PARAMETERS, parameters.as_value())
    }

    /// Sets how frames that come in are spread over the channels.
    ///
    /// # Errors
    ///
    /// Those of a request.
    pub(crate) fn set_rss(&self, table: &[u16], key: &[u8; rss::KEY_SIZE]) -> Result {
        let mut value = KVec::new();
        value.resize(rss::MAX_PARAMETERS_SIZE, 0, GFP_KERNEL)?;
        // Hosts want it to be off before it is changed; what they say to that is of no matter.
        for flags in [rss::ParameterFlags::DISABLE, rss::ParameterFlags::empty()] {
            let len = rss::encode_parameters(&mut value, flags, table, key).ok_or(EINVAL)?;
            let value = value.get(..len).ok_or(EINVAL)?;
            let set = self
                .attachment
                .set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, value);
            match set {
                Err(error) if flags.is_empty() || error != EOPNOTSUPP => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Changes the adapter's address.
    ///
    /// # Errors
    ///
    /// Those of a request.
    pub(crate) fn set_address(&self, address: [u8; 6]) -> Result {
        let value = oid::set_mac(MacAddress(address));
        self.attachment.set(Oid::GEN_RNDIS_CONFIG_PARAMETER, &value)
    }

    /// Lets packets be sent.
    pub(crate) fn start(&self) {
        self.link().set_tx_enabled(true);
        self.link().nic.netdev().wake_all_queues();
    }

    /// Lets no packet be sent, and waits until those that are on their way have gone. It takes limited
    /// time.
    pub(crate) fn stop(&self) {
        let link = self.link();
        link.set_tx_enabled(false);
        link.nic.netdev().disable_tx();
        {
            let _softirqs = BhDisabled::new();
            for queue in self.attachment.queues.iter() {
                queue.flush(link);
            }
        }
        if let Err(error) = self.set_filter(PacketFilter::empty()) {
            if !link.is_dead() {
                dev_warn!(link.nic.dev(), "the host goes on sending: {:?}\n", error);
            }
        }
        if !self.attachment.drain() && !link.is_dead() {
            dev_warn!(link.nic.dev(), "the host keeps packets\n");
        }
    }
}
