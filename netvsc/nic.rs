// SPDX-License-Identifier: GPL-2.0

//! An adapter, from probe to removal: what outlives an attachment to the host.
//!
//! The attachment is replaced when the MTU, the number of channels or the sizes of the buffers change.
//! Who sends finds it by RCU; all else that uses it holds the `Rtnl` lock.

mod link_state;
mod settle;

pub(crate) use self::link_state::Change;

use self::link_state::Changes;
use crate::{
    net::{
        self,
        Features,
        Level,
        LinkSettings,
        NetDevice,
        Rtnl, //
    },
    params,
    session::{
        Config,
        Session, //
    },
    stats::Stats,
    steering::Steering, //
};
use hv_proto::net::{
    nvsp::Version,
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
    workqueue::Work, //
};
use vmbus::{
    Channel,
    Event,
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

/// Frames that an adapter takes as long as nobody has said which are wanted.
const DEFAULT_FILTER: PacketFilter = PacketFilter::DIRECTED
    .union(PacketFilter::ALL_MULTICAST)
    .union(PacketFilter::BROADCAST);

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
    pub(crate) steering: Steering,
    /// Kinds of transport protocols whose checksums the host computes, one bit each.
    checksums: Atomic<u32>,
    /// Which frames are wanted when the device is up.
    filter: Atomic<u32>,
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
    /// CPUs that were there at first, for which there are statistics.
    pub(crate) cpus: KVec<u32>,
}

impl_has_work! {
    impl HasWork<Self> for Nic { self.link_work }
}

impl Nic {
    /// An adapter that is not attached yet.
    pub(crate) fn new(
        dev: ARef<device::Device>,
        netdev: Arc<NetDevice>,
        primary: Arc<Channel>,
    ) -> Result<Arc<Self>> {
        let stats = Stats::new(netdev.max_queues())?;
        let mut cpus = KVec::new();
        for cpu in (0..kernel::cpu::nr_cpu_ids()).filter(|&cpu| net::cpu_is_present(cpu)) {
            cpus.push(cpu, GFP_KERNEL)?;
        }
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
                steering: Steering::new(),
                checksums: Atomic::new(0),
                filter: Atomic::new(DEFAULT_FILTER.bits()),
                message_level: Atomic::new(params::message_level().0),
                speed: Atomic::new(unknown.speed),
                duplex: Atomic::new(unknown.duplex.into()),
                link_up: Atomic::new(false),
                changes <- new_spinlock_irq!(Changes::none(), "netvsc_link"),
                link_work <- new_work!("netvsc_link"),
                leaving <- Event::new(),
                cpus,
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
        self.config.lock().mtu = netdev.mtu();
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

    /// Ends the attachment, if there is one.
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
        self.forget_link_changes();
        let (session, facts) = Session::new(self, &self.primary, config)?;
        self.netdev.set_mtu(rtnl, config.mtu);
        self.settle(rtnl, &session, &facts)?;
        self.session.fill(session.clone()).map_err(|_| EBUSY)?;
        session.show_napi(rtnl, true);
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
    /// Those of [`Session::new`]; `EINVAL` if the host does not take frames as long as the MTU. If there
    /// is no attachment afterwards, [`Nic::open`] makes one.
    pub(crate) fn reconfigure(self: &Arc<Self>, rtnl: &Rtnl, new: Config) -> Result {
        if self.leaving.wait(0) {
            return Err(ENODEV);
        }
        let old = self.config();
        self.detach(rtnl);
        let result = self.attach(rtnl, &new).and_then(|()| {
            // One that the host has lowered is no matter of other settings.
            if new.mtu == old.mtu || self.netdev.mtu() == new.mtu {
                return Ok(());
            }
            dev_warn!(
                self.dev,
                "the host takes no larger MTU than {}\n",
                self.netdev.mtu()
            );
            Err(EINVAL)
        });
        match &result {
            Ok(()) => {
                let mtu = self.netdev.mtu();
                *self.config.lock() = Config { mtu, ..new };
            }
            Err(error) => {
                dev_warn!(self.dev, "new settings do not work: {:?}\n", error);
                self.detach(rtnl);
                self.netdev.set_mtu(rtnl, old.mtu);
                // A host that is silent is not waited for again.
                let again = if *error == ETIMEDOUT {
                    Err(ETIMEDOUT)
                } else {
                    self.attach(rtnl, &old)
                };
                if let Err(error) = again {
                    dev_err!(self.dev, "nor do the old ones: {:?}\n", error);
                    self.detach(rtnl);
                    // So that a user can bring it down and up again.
                    self.netdev.attach(rtnl);
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

    /// The device is brought up. An attachment that has failed is replaced.
    ///
    /// # Errors
    ///
    /// Those of [`Session::new`].
    pub(crate) fn open(self: &Arc<Self>, rtnl: &Rtnl) -> Result {
        self.netdev.carrier_off(rtnl);
        if self.leaving.wait(0) {
            return Err(ENODEV);
        }
        let session = self.attached(rtnl);
        // It must not be held on to when it is detached.
        if session.is_ok_and(|session| !session.link().is_dead()) {
            return self.bring_up(rtnl);
        }
        self.detach(rtnl);
        let result = self.attach(rtnl, &self.config());
        self.netdev.attach(rtnl);
        result
    }

    /// The device is brought down.
    pub(crate) fn close(&self, rtnl: &Rtnl) {
        if let Ok(session) = self.attached(rtnl) {
            session.stop();
        }
        self.netdev.carrier_off(rtnl);
    }

    /// Traffic begins.
    fn bring_up(&self, rtnl: &Rtnl) -> Result {
        let session = self.attached(rtnl)?;
        session.set_filter(PacketFilter::from_bits_retain(self.filter.load(Relaxed)))?;
        session.start();
        if self.link_up.load(Relaxed) {
            self.netdev.carrier_on(rtnl);
        }
        Ok(())
    }

    /// Sets which frames are wanted while the device is up.
    ///
    /// # Errors
    ///
    /// Those of a request. They are wanted all the same, when the device is attached again.
    pub(crate) fn set_filter(&self, rtnl: &Rtnl, filter: PacketFilter) -> Result {
        self.filter.store(filter.bits(), Relaxed);
        self.attached(rtnl)?.set_filter(filter)
    }

    // --------------------------------------------------------------------------------------------
    // What a user sees and sets

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
}
