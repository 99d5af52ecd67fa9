// SPDX-License-Identifier: GPL-2.0

//! An adapter, from probe to removal: what outlives an attachment to the host, and what the stack asks.
//!
//! The attachment is replaced when the MTU, the number of channels or the sizes of the buffers change.
//! Who sends finds it by RCU; all else that uses it holds the `Rtnl` lock.

use crate::{
    net::{
        self,
        Features,
        Flow,
        FlowType,
        Level,
        LinkSettings,
        LinkStats,
        NetDevice,
        Operations,
        QueuedSkb,
        Rtnl,
        RxFlags,
        Transmit,
        Transport,
        TxSkb, //
    },
    params,
    session::{
        Config,
        Facts,
        Session, //
    },
    stats::Stats, //
};
use hv_proto::net::{
    nvsp::{
        SendTable,
        Version,
        SEND_TABLE_SIZE, //
    },
    offload::{
        ChecksumSetting,
        Ipv4Checksums,
        Ipv6Checksums,
        Parameters,
        Setting, //
    },
    oid::PacketFilter,
    rss,
    ETHERNET_HEADER_SIZE,
    MIN_SECTION_SIZE, //
};
use kernel::{
    device,
    fmt,
    impl_has_work,
    new_mutex,
    new_spinlock_irq,
    new_work,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        rcu,
        Arc,
        ArcBorrow,
        Mutex,
        SpinLockIrq, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};
use vmbus::{
    Channel,
    Event,
    OwnedQueue,
    RcuArc, //
};

/// The MTU of an adapter that nobody has set another one for.
const DEFAULT_MTU: u32 = 1500;
/// The largest MTU.
const MAX_MTU: u32 = 65535 - ETHERNET_HEADER_SIZE;

/// Sections of the buffers, if nobody asks for others.
const DEFAULT_RX_SECTIONS: u32 = 9709;
const RX_SECTION_SIZE: u32 = 1728;
const DEFAULT_TX_SECTIONS: u32 = 170;
const TX_SECTION_SIZE: u32 = 6144;
/// The fewest that a user may ask for.
pub(crate) const MIN_RX_SECTIONS: u32 = 10;
pub(crate) const MIN_TX_SECTIONS: u32 = 10;

/// Channels that are used, if host and guest have so many and nobody asks for others.
const DEFAULT_CHANNELS: u32 = 16;

/// The longest packet that is given to the host to be cut into segments.
const MAX_TSO_SIZE: u32 = 65536;
/// A host that takes less than this is not given any.
const MIN_TSO_SIZE: u32 = 8192;

/// Time between two changes of the link that are told, in milliseconds: listeners look once a second.
const LINK_CHANGE_MS: u32 = 2000;

/// The features that depend on the host.
const HOST_FEATURES: Features = Features::union(&[
    Features::RXCSUM,
    Features::IP_CSUM,
    Features::TSO,
    Features::IPV6_CSUM,
    Features::TSO6,
    Features::LRO,
    Features::SG,
    Features::RXHASH,
]);

/// What happens to a link.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Up,
    Down,
    /// It is in another network: those who listen are to notice.
    Bounce,
}

/// Changes of the link that have not been told. However many there are, this is all that matters.
struct Changes {
    latest: Option<Change>,
    bounce: bool,
    /// Where changes are worked on; `None` before the device is registered, and when it is about to go.
    queue: Option<OwnedQueue>,
}

/// How frames that come in are spread.
pub(crate) struct Rss {
    pub(crate) table: [u16; rss::MAX_TABLE_SIZE],
    /// Entries that are used; 0 if nothing is spread.
    pub(crate) size: usize,
    pub(crate) key: [u8; rss::KEY_SIZE],
}

impl Rss {
    /// The entries that are used.
    pub(crate) fn table(&self) -> &[u16] {
        self.table.get(..self.size).unwrap_or_default()
    }
}

/// An adapter.
#[pin_data]
pub(crate) struct Nic {
    dev: ARef<device::Device>,
    netdev: Arc<NetDevice>,
    primary: Arc<Channel>,
    pub(crate) stats: Stats,
    session: RcuArc<Session>,
    /// What the next attachment is to be like. Changed with the `Rtnl` lock.
    #[pin]
    config: Mutex<Config>,
    #[pin]
    pub(crate) rss: Mutex<Rss>,
    /// The channel for each remainder of a hash.
    send_table: [Atomic<u32>; SEND_TABLE_SIZE],
    /// Kinds of transport protocols whose checksums the host computes, one bit each.
    checksums: Atomic<u32>,
    /// Kinds of flows whose ports are part of the hash, one bit each.
    port_hashes: Atomic<u32>,
    message_level: Atomic<u32>,
    speed: Atomic<u32>,
    duplex: Atomic<u32>,
    /// What the host says.
    link_up: Atomic<bool>,
    #[pin]
    changes: SpinLockIrq<Changes>,
    #[pin]
    link_work: Work<Nic>,
    /// The adapter goes.
    #[pin]
    leaving: Event,
    /// The adapter is gone for good, though the device may still be there.
    is_leaving: Atomic<bool>,
}

impl_has_work! {
    impl HasWork<Self> for Nic { self.link_work }
}

fn setting(on: bool) -> Setting {
    if on {
        Setting::ENABLED
    } else {
        Setting::DISABLED
    }
}

fn bit(kind: Transport) -> u32 {
    match kind {
        Transport::Tcp4 => 1 << 0,
        Transport::Udp4 => 1 << 1,
        Transport::Tcp6 => 1 << 2,
        Transport::Udp6 => 1 << 3,
        Transport::Other => 0,
    }
}

fn flow_bit(flow: FlowType) -> u32 {
    match flow {
        FlowType::Tcp4 => 1 << 0,
        FlowType::Tcp6 => 1 << 1,
        FlowType::Udp4 => 1 << 2,
        FlowType::Udp6 => 1 << 3,
    }
}

impl Nic {
    /// An adapter that is not attached yet.
    pub(crate) fn new(
        dev: ARef<device::Device>,
        netdev: Arc<NetDevice>,
        primary: Arc<Channel>,
    ) -> Result<Arc<Self>> {
        let stats = Stats::new(netdev.max_queues())?;
        let config = Config {
            mtu: DEFAULT_MTU,
            channels: net::default_rss_queues().max(DEFAULT_CHANNELS),
            rx_sections: DEFAULT_RX_SECTIONS,
            rx_section_size: RX_SECTION_SIZE,
            tx_sections: DEFAULT_TX_SECTIONS,
            tx_section_size: TX_SECTION_SIZE,
        };
        let unknown = LinkSettings::UNKNOWN;
        Arc::pin_init(
            pin_init!(Self {
                dev,
                netdev,
                primary,
                stats,
                session: RcuArc::empty(),
                config <- new_mutex!(config, "netvsc_config"),
                rss <- new_mutex!(Rss {
                    table: [0; rss::MAX_TABLE_SIZE],
                    size: 0,
                    key: rss::DEFAULT_KEY,
                }, "netvsc_rss"),
                send_table: [const { Atomic::new(0) }; SEND_TABLE_SIZE],
                checksums: Atomic::new(0),
                port_hashes: Atomic::new(u32::MAX),
                message_level: Atomic::new(params::message_level().0),
                speed: Atomic::new(unknown.speed),
                duplex: Atomic::new(unknown.duplex.into()),
                link_up: Atomic::new(false),
                changes <- new_spinlock_irq!(Changes {
                    latest: None,
                    bounce: false,
                    queue: None,
                }, "netvsc_link"),
                link_work <- new_work!("netvsc_link"),
                leaving <- Event::new(),
                is_leaving: Atomic::new(false),
            }),
            GFP_KERNEL,
        )
    }

    /// The device on the bus, for messages.
    pub(crate) fn dev(&self) -> &device::Device {
        &self.dev
    }

    /// The network device.
    pub(crate) fn netdev(&self) -> &Arc<NetDevice> {
        &self.netdev
    }

    /// Says what is wrong with what the host sends, but not too often. Any context.
    pub(crate) fn warn(&self, message: fmt::Arguments<'_>) {
        if net::may_log() {
            dev_warn!(self.dev, "{}", message);
        }
    }

    /// Says something that only developers want to know.
    pub(crate) fn debug(&self, message: fmt::Arguments<'_>) {
        dev_dbg!(self.dev, "{}", message);
    }

    /// Something of the host breaks the rules.
    pub(crate) fn invalid(&self, message: fmt::Arguments<'_>) {
        self.stats.events.rx_invalid.count();
        self.warn(message);
    }

    // --------------------------------------------------------------------------------------------
    // The attachment

    /// The attachment, for as long as the RCU read side is held.
    pub(crate) fn session<'a>(&'a self, guard: &'a rcu::Guard) -> Option<ArcBorrow<'a, Session>> {
        self.session.get(guard)
    }

    /// The attachment, for who may sleep.
    ///
    /// # Errors
    ///
    /// `ENODEV` if there is none.
    pub(crate) fn attached(&self, _rtnl: &Rtnl) -> Result<Arc<Session>> {
        let guard = rcu::read_lock();
        let session = self.session.get(&guard).ok_or(ENODEV)?;
        Ok(session.into())
    }

    /// What the attachment is like.
    pub(crate) fn config(&self) -> Config {
        *self.config.lock()
    }

    /// Attaches for the first time, and sets the device up. It is not registered yet.
    ///
    /// # Errors
    ///
    /// Those of [`Session::new`].
    pub(crate) fn attach_first(self: &Arc<Self>) -> Result {
        let (session, facts) = Session::new(self, &self.primary, &self.config())?;
        let rtnl = Rtnl::lock();
        let netdev = &self.netdev;
        netdev.set_first_address(&rtnl, facts.mac.0)?;
        netdev.set_headroom(&rtnl, crate::tx::HEADROOM as u16);
        // As a user would have it who has not said anything.
        netdev.set_features(&rtnl, Features::LRO);
        self.settle(&rtnl, &session, &facts)?;
        let version = session.link().version().unwrap_or(Version::V1);
        let features =
            netdev.hw_features(&rtnl) | Features::HIGHDMA | Features::VLAN_TX | Features::VLAN_RX;
        netdev.set_features(&rtnl, features);
        netdev.set_vlan_features(&rtnl, features);
        let max_mtu = if version.has_ndis_config() {
            MAX_MTU
        } else {
            DEFAULT_MTU
        };
        netdev.set_mtu_range(&rtnl, MIN_SECTION_SIZE, max_mtu);
        self.session.fill(session).map_err(|_| EBUSY)
    }

    /// Sets the device up for an attachment.
    fn settle(&self, rtnl: &Rtnl, session: &Session, facts: &Facts) -> Result {
        let netdev = &self.netdev;
        if let Some(max) = facts.max_mtu.filter(|&max| max < netdev.mtu()) {
            netdev.set_mtu(rtnl, max.max(MIN_SECTION_SIZE));
        }
        if let (Some(name), false) = (&facts.name, netdev.has_alias(rtnl)) {
            // That is what hosts call an adapter that nobody has named.
            if &**name != b"Network Adapter" {
                // It is for people to read only.
                let _ = netdev.set_alias(rtnl, name);
            }
        }
        self.link_up.store(facts.link_up, Relaxed);
        self.settle_offloads(rtnl, session, facts)?;
        self.settle_channels(rtnl, session, facts)
    }

    /// Turns on what both sides can do.
    fn settle_offloads(&self, rtnl: &Rtnl, session: &Session, facts: &Facts) -> Result {
        let netdev = &self.netdev;
        let version = session.link().version().ok_or(EIO)?;
        let mut features = Features::RXCSUM | Features::SG | Features::RXHASH;
        let mut checksums = 0;
        let mut max_tso = MAX_TSO_SIZE;
        if let Some(can) = &facts.offloads {
            const ON: ChecksumSetting = ChecksumSetting::ENABLED;
            let mut wanted = Parameters::unchanged(version);
            // The stack computes it anyway.
            wanted.ipv4_checksum = ChecksumSetting::DISABLED;
            let tcp4 = Ipv4Checksums::TCP | Ipv4Checksums::TCP_OPTIONS;
            if can.ipv4_send().contains(tcp4) {
                features |= Features::IP_CSUM;
                checksums |= bit(Transport::Tcp4);
                wanted.tcp_ipv4_checksum = ON;
                if let Some(max) = can.ipv4_lso().filter(|&max| max >= MIN_TSO_SIZE) {
                    features |= Features::TSO;
                    wanted.lso_v2_ipv4 = Setting::ENABLED;
                    max_tso = max_tso.min(max);
                }
                if can.ipv4_send().contains(Ipv4Checksums::UDP) {
                    checksums |= bit(Transport::Udp4);
                    wanted.udp_ipv4_checksum = ON;
                }
            }
            let tcp6 = Ipv6Checksums::TCP | Ipv6Checksums::TCP_OPTIONS;
            if can.ipv6_send().contains(tcp6) {
                features |= Features::IPV6_CSUM;
                checksums |= bit(Transport::Tcp6);
                wanted.tcp_ipv6_checksum = ON;
                if let Some(max) = can.ipv6_lso().filter(|&max| max >= MIN_TSO_SIZE) {
                    features |= Features::TSO6;
                    wanted.lso_v2_ipv6 = Setting::ENABLED;
                    max_tso = max_tso.min(max);
                }
                if can.ipv6_send().contains(Ipv6Checksums::UDP) {
                    checksums |= bit(Transport::Udp6);
                    wanted.udp_ipv6_checksum = ON;
                }
            }
            if can.rsc() {
                features |= Features::LRO;
                let on = setting(netdev.features().contains(Features::LRO));
                wanted.rsc_ipv4 = on;
                wanted.rsc_ipv6 = on;
            }
            session.set_offloads(&wanted)?;
        }
        self.checksums.store(checksums, Relaxed);
        let others = netdev.hw_features(rtnl) & !HOST_FEATURES;
        netdev.set_hw_features(rtnl, others | features);
        netdev.set_features(rtnl, netdev.features() & (!HOST_FEATURES | features));
        netdev.set_tso_max_size(rtnl, max_tso);
        Ok(())
    }

    /// Spreads packets over the channels, both ways.
    fn settle_channels(&self, rtnl: &Rtnl, session: &Session, facts: &Facts) -> Result {
        let count = session.count();
        self.set_send_table(&SendTable::spread(count.into()));
        self.netdev.set_queues(rtnl, count)?;
        let mut rss = self.rss.lock();
        let before = core::mem::replace(&mut rss.size, facts.rss.map_or(0, |(_, entries)| entries));
        let keeps = self.netdev.rx_hash_is_configured(rtnl)
            && before == rss.size
            && rss.table().iter().all(|&channel| channel < count);
        if !keeps {
            for (n, entry) in (0u16..).zip(&mut rss.table) {
                *entry = n.checked_rem(count).unwrap_or(0);
            }
        }
        if count > 1 && rss.size != 0 {
            if let Err(error) = session.set_rss(rss.table(), &rss.key) {
                // All comes on the first channel then.
                dev_warn!(self.dev, "packets are not spread: {:?}\n", error);
            }
        }
        Ok(())
    }

    /// Ends the attachment.
    fn detach(&self, rtnl: &Rtnl) {
        let Ok(session) = self.attached(rtnl) else {
            return;
        };
        session.stop();
        self.netdev.carrier_off(rtnl);
        self.netdev.detach(rtnl);
        session.show_napi(rtnl, false);
        drop(session);
        // Waits until nobody sends.
        drop(self.session.replace(None));
    }

    /// Attaches again.
    fn attach(self: &Arc<Self>, rtnl: &Rtnl, config: &Config) -> Result {
        let (session, facts) = Session::new(self, &self.primary, config)?;
        self.netdev.set_mtu(rtnl, config.mtu);
        self.settle(rtnl, &session, &facts)?;
        session.show_napi(rtnl, true);
        if self.session.fill(session).is_err() {
            return Err(EBUSY);
        }
        self.netdev.attach(rtnl);
        if self.netdev.is_running(rtnl) {
            self.bring_up(rtnl)?;
        }
        Ok(())
    }

    /// Replaces the attachment by one with another configuration. If that fails, the old configuration
    /// is tried again.
    ///
    /// # Errors
    ///
    /// Those of [`Session::new`]; there may be no attachment afterwards.
    pub(crate) fn reconfigure(self: &Arc<Self>, rtnl: &Rtnl, new: Config) -> Result {
        if self.is_leaving.load(Relaxed) {
            return Err(ENODEV);
        }
        self.attached(rtnl)?;
        let old = self.config();
        self.detach(rtnl);
        let result = self.attach(rtnl, &new);
        match &result {
            Ok(()) => *self.config.lock() = new,
            Err(error) => {
                dev_warn!(self.dev, "new settings do not work: {:?}\n", error);
                self.detach(rtnl);
                if let Err(error) = self.attach(rtnl, &old) {
                    dev_err!(self.dev, "nor do the old ones: {:?}\n", error);
                    self.detach(rtnl);
                }
            }
        }
        result
    }

    /// The device was registered, as `name`: tells users about it.
    pub(crate) fn show(&self, rtnl: &Rtnl, name: &CStr) {
        let Ok(session) = self.attached(rtnl) else {
            return;
        };
        session.show_napi(rtnl, true);
        if let Some(version) = session.link().version() {
            dev_info!(
                self.dev,
                "{}: NVSP {}, {} of {} channels\n",
                name,
                format_args!("{version}"),
                session.count(),
                session.max_channels()
            );
        }
    }

    /// Ends the last attachment. Nobody uses the device any more.
    pub(crate) fn detach_last(&self) {
        let rtnl = Rtnl::lock();
        self.detach(&rtnl);
    }

    /// Traffic begins.
    fn bring_up(&self, rtnl: &Rtnl) -> Result {
        let session = self.attached(rtnl)?;
        let filter = PacketFilter::DIRECTED | PacketFilter::ALL_MULTICAST | PacketFilter::BROADCAST;
        session.set_filter(filter)?;
        session.start();
        if self.link_up.load(Relaxed) {
            self.netdev.carrier_on(rtnl);
        }
        Ok(())
    }

    // --------------------------------------------------------------------------------------------
    // The link

    /// Changes of the link are worked on from now on.
    pub(crate) fn start(&self, queue: OwnedQueue) {
        self.changes.lock().queue = Some(queue);
    }

    /// Changes of the link are not worked on any more. Sleeps.
    pub(crate) fn leave(&self) {
        self.is_leaving.store(true, Relaxed);
        self.leaving.set();
        // Dropping the queue waits, so that it is done out of the lock.
        let _queue = self.changes.lock().queue.take();
    }

    /// The host says that the link has changed. Any context.
    pub(crate) fn link_change(self: &Arc<Self>, change: Change) {
        let mut changes = self.changes.lock();
        match change {
            Change::Bounce => changes.bounce = true,
            other => changes.latest = Some(other),
        }
        if let Some(queue) = &changes.queue {
            // If it is queued already, it sees the change.
            let _ = queue.enqueue(self.clone());
        }
    }

    /// Tells about one change of the link. Returns false if there was none.
    fn tell_link_change(&self) -> bool {
        let rtnl = Rtnl::lock();
        let mut changes = self.changes.lock();
        let up = self.link_up.load(Relaxed);
        let change = if core::mem::take(&mut changes.bounce) && up {
            // It is up again after a while, unless something else is said meanwhile.
            changes.latest.get_or_insert(Change::Up);
            Change::Down
        } else {
            match changes.latest.take() {
                Some(change) => change,
                None => return false,
            }
        };
        drop(changes);
        match change {
            Change::Up if up => self.netdev.notify_peers(&rtnl),
            Change::Up => {
                self.link_up.store(true, Relaxed);
                if self.netdev.is_running(&rtnl) && self.attached(&rtnl).is_ok() {
                    self.netdev.carrier_on(&rtnl);
                }
            }
            Change::Down | Change::Bounce => {
                self.link_up.store(false, Relaxed);
                self.netdev.carrier_off(&rtnl);
            }
        }
        true
    }

    /// The speed of the link, in bits per second.
    pub(crate) fn set_speed(&self, speed: u64) {
        let megabits = u32::try_from(speed / 1_000_000).unwrap_or(u32::MAX);
        self.speed.store(megabits, Relaxed);
    }

    // --------------------------------------------------------------------------------------------
    // Sending

    /// Sets the channel for each remainder of a hash.
    pub(crate) fn set_send_table(&self, table: &SendTable) {
        for (to, from) in self.send_table.iter().zip(table.0) {
            to.store(from, Relaxed);
        }
    }

    fn send_table(&self) -> SendTable {
        SendTable(core::array::from_fn(|n| {
            self.send_table
                .get(n)
                .map_or(0, |entry| entry.load(Relaxed))
        }))
    }

    /// Whether the host computes checksums of this kind.
    pub(crate) fn computes_checksum(&self, kind: Transport) -> bool {
        self.checksums.load(Relaxed) & bit(kind) != 0
    }

    /// The hash by which a packet's channel is chosen.
    fn hash(&self, skb: &mut QueuedSkb<'_>) -> u32 {
        let ports = self.port_hashes.load(Relaxed);
        let all = flow_bit(FlowType::Tcp4)
            | flow_bit(FlowType::Tcp6)
            | flow_bit(FlowType::Udp4)
            | flow_bit(FlowType::Udp6);
        if ports & all == all {
            return skb.hash();
        }
        let flow = match skb.flow() {
            Flow::Tcp4 => FlowType::Tcp4,
            Flow::Tcp6 => FlowType::Tcp6,
            Flow::Udp4 => FlowType::Udp4,
            Flow::Udp6 => FlowType::Udp6,
            Flow::Other => return skb.hash(),
        };
        if ports & flow_bit(flow) != 0 {
            skb.hash()
        } else {
            skb.address_hash()
        }
    }

    // --------------------------------------------------------------------------------------------
    // What a user sees and sets

    pub(crate) fn dump_send_table(&self, registers: &mut [u32]) {
        for (to, from) in registers.iter_mut().zip(self.send_table().0) {
            *to = from;
        }
    }

    pub(crate) fn message_level(&self) -> Level {
        Level(self.message_level.load(Relaxed))
    }

    pub(crate) fn set_message_level(&self, level: Level) {
        self.message_level.store(level.0, Relaxed);
    }

    pub(crate) fn link_settings(&self) -> LinkSettings {
        LinkSettings {
            speed: self.speed.load(Relaxed),
            duplex: u8::try_from(self.duplex.load(Relaxed)).unwrap_or(u8::MAX),
        }
    }

    pub(crate) fn set_link_settings(&self, settings: LinkSettings) {
        self.speed.store(settings.speed, Relaxed);
        self.duplex.store(settings.duplex.into(), Relaxed);
    }

    pub(crate) fn hashes_ports(&self, flow: FlowType) -> bool {
        self.port_hashes.load(Relaxed) & flow_bit(flow) != 0
    }

    /// Sets whether ports are part of the hash. With the `Rtnl` lock.
    pub(crate) fn set_hashes_ports(&self, flow: FlowType, on: bool) {
        let now = self.port_hashes.load(Relaxed);
        let bit = flow_bit(flow);
        self.port_hashes
            .store(if on { now | bit } else { now & !bit }, Relaxed);
    }
}

impl WorkItem for Nic {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        // One change at a time, and then none for a while: it would not be noticed.
        while this.tell_link_change() {
            if this.leaving.wait(LINK_CHANGE_MS) {
                break;
            }
        }
    }
}

/// The adapter, as the stack knows it.
pub(crate) struct Adapter(pub(crate) Arc<Nic>);

impl Operations for Adapter {
    fn open(&self, rtnl: &Rtnl) -> Result {
        let nic = &self.0;
        nic.netdev.carrier_off(rtnl);
        nic.bring_up(rtnl).inspect_err(|error| {
            dev_err!(nic.dev, "the adapter does not open: {:?}\n", error);
        })
    }

    fn stop(&self, rtnl: &Rtnl) {
        let nic = &self.0;
        if let Ok(session) = nic.attached(rtnl) {
            session.stop();
        }
        nic.netdev.carrier_off(rtnl);
    }

    fn start_xmit(&self, skb: TxSkb, more: bool) -> Transmit {
        let guard = rcu::read_lock();
        let Some(session) = self.0.session.get(&guard) else {
            self.0.stats.tx_dropped.count();
            return Transmit::Done;
        };
        match session.queue(skb.queue()) {
            Some(queue) => queue.xmit(session.link(), skb, more),
            None => {
                self.0.stats.tx_dropped.count();
                Transmit::Done
            }
        }
    }

    fn select_queue(&self, skb: &mut QueuedSkb<'_>, queues: u16) -> u16 {
        if queues == 1 {
            return 0;
        }
        let recorded = skb.recorded_tx_queue();
        if let Some(queue) = recorded.filter(|&queue| queue < queues && !skb.may_reorder()) {
            return queue;
        }
        // A packet that is forwarded stays on its CPU.
        if let Some(queue) = skb.recorded_rx_queue() {
            return queue;
        }
        let hash = self.0.hash(skb);
        // CAST: less than `queues`.
        let queue = self.0.send_table().channel(hash, queues.into()) as u16;
        if recorded != Some(queue) {
            skb.remember_tx_queue(queue);
        }
        queue
    }

    fn set_rx_mode(&self, rtnl: &Rtnl, flags: RxFlags) -> Result {
        let mut filter = PacketFilter::DIRECTED;
        if flags.promiscuous {
            filter = PacketFilter::PROMISCUOUS;
        } else {
            filter.set(PacketFilter::ALL_MULTICAST, flags.multicast);
            filter.set(PacketFilter::BROADCAST, flags.broadcast);
        }
        self.0.attached(rtnl)?.set_filter(filter)
    }

    fn set_features(&self, rtnl: &Rtnl, wanted: Features, change: Features) -> Result {
        if !change.contains(Features::LRO) {
            return Ok(());
        }
        let session = self.0.attached(rtnl)?;
        let version = session.link().version().ok_or(EIO)?;
        let mut parameters = Parameters::unchanged(version);
        let on = setting(wanted.contains(Features::LRO));
        parameters.rsc_ipv4 = on;
        parameters.rsc_ipv6 = on;
        session.set_offloads(&parameters)
    }

    fn change_mtu(&self, rtnl: &Rtnl, mtu: u32) -> Result {
        let nic = &self.0;
        let config = nic.config();
        nic.reconfigure(rtnl, Config { mtu, ..config })
    }

    fn set_address(&self, rtnl: &Rtnl, address: [u8; 6]) -> Result {
        self.0.attached(rtnl)?.set_address(address)
    }

    fn stats(&self) -> LinkStats {
        let stats = &self.0.stats;
        let mut all = LinkStats {
            rx_dropped: stats.rx_dropped.get(),
            rx_errors: stats.events.rx_invalid.get(),
            tx_dropped: stats.tx_dropped.get(),
            ..LinkStats::default()
        };
        for queue in stats.queues() {
            all.rx_packets = all.rx_packets.wrapping_add(queue.rx_packets.get());
            all.rx_bytes = all.rx_bytes.wrapping_add(queue.rx_bytes.get());
            all.multicast = all.multicast.wrapping_add(queue.rx_multicast.get());
            all.tx_packets = all.tx_packets.wrapping_add(queue.tx_packets.get());
            all.tx_bytes = all.tx_bytes.wrapping_add(queue.tx_bytes.get());
        }
        all
    }
}
