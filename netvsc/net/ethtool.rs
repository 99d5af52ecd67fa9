// SPDX-License-Identifier: GPL-2.0

//! What `ethtool` shows and sets.
//!
//! C header: [`include/linux/ethtool.h`](srctree/include/linux/ethtool.h)

use super::{
    device::data,
    Operations,
    Rtnl, //
};
use crate::raw;
use core::marker::PhantomData;
use kernel::{
    bindings,
    error::{
        from_result,
        to_result, //
    },
    ffi,
    fmt,
    prelude::*, //
};

/// Channels: queues in both directions.
#[derive(Clone, Copy)]
pub(crate) struct Channels {
    /// How many there can be.
    pub(crate) max: u32,
    /// How many there are.
    pub(crate) count: u32,
}

/// Places for packets on their way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rings {
    /// How many there are for packets that come in.
    pub(crate) rx: u32,
    /// How many there can be.
    pub(crate) rx_max: u32,
    /// How many there are for packets that go out.
    pub(crate) tx: u32,
    /// How many there can be.
    pub(crate) tx_max: u32,
}

/// Speed and duplex of a link.
#[derive(Clone, Copy)]
pub(crate) struct LinkSettings {
    /// In megabits per second; all ones if it is not known.
    pub(crate) speed: u32,
    /// As the kernel numbers it.
    pub(crate) duplex: u8,
}

impl LinkSettings {
    /// A link of unknown speed.
    pub(crate) const UNKNOWN: Self = Self {
        speed: u32::MAX,
        duplex: 1,
    };
}

/// A level of messages (`NETIF_MSG_*`): a set of bits.
#[derive(Clone, Copy)]
pub(crate) struct Level(pub(crate) u32);

/// The kinds of flow for which a hash is chosen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlowType {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv4.
    Udp4,
    /// UDP over IPv6.
    Udp6,
}

/// How packets that come in are spread over the queues.
pub(crate) struct RxHash<'a> {
    /// Number of the queue for each remainder of the hash.
    pub(crate) table: Option<&'a mut [u32]>,
    /// The key of the hash.
    pub(crate) key: Option<&'a mut [u8]>,
}

/// Bytes of a name, with the zeros that fill it up.
const NAME_LEN: usize = raw::ETH_GSTRING_LEN as usize;

/// Names of statistics, as they are handed to a user.
pub(crate) struct Strings<'a> {
    left: &'a mut [[u8; NAME_LEN]],
}

impl Strings<'_> {
    /// Adds a name; what is too long is cut off, and too many names have no effect.
    pub(crate) fn push(&mut self, name: fmt::Arguments<'_>) {
        let Some((place, left)) = core::mem::take(&mut self.left).split_first_mut() else {
            return;
        };
        self.left = left;
        *place = [0; NAME_LEN];
        let mut cursor = Cursor { place, at: 0 };
        // Names that are too long are cut off.
        let _ = fmt::Write::write_fmt(&mut cursor, name);
    }
}

struct Cursor<'a> {
    place: &'a mut [u8; NAME_LEN],
    at: usize,
}

impl fmt::Write for Cursor<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // The last byte stays zero.
            if self.at >= NAME_LEN - 1 {
                return Err(fmt::Error);
            }
            *self.place.get_mut(self.at).ok_or(fmt::Error)? = byte;
            self.at += 1;
        }
        Ok(())
    }
}

/// The stack's way to a driver's level of messages. See [`message_level_callbacks!`].
#[derive(Clone, Copy)]
pub(crate) struct MessageLevelCallbacks {
    get: unsafe extern "C" fn(*mut bindings::net_device) -> u32,
    set: unsafe extern "C" fn(*mut bindings::net_device, u32),
}

impl MessageLevelCallbacks {
    /// # Safety
    ///
    /// The functions must be fine with any registered device of the driver that they are for, if the lock
    /// is held.
    pub(crate) const unsafe fn new(
        get: unsafe extern "C" fn(*mut bindings::net_device) -> u32,
        set: unsafe extern "C" fn(*mut bindings::net_device, u32),
    ) -> Self {
        Self { get, set }
    }
}

/// Makes the [`MessageLevelCallbacks`] of a driver, as functions of the module with these names.
macro_rules! message_level_callbacks {
    ($driver:ty, $get:ident, $set:ident) => {{
        /// # Safety
        ///
        /// `dev` must be a registered device of the driver, and the lock must be held.
        #[no_mangle]
        unsafe extern "C" fn $get(dev: *mut ::kernel::bindings::net_device) -> u32 {
            // SAFETY: as the caller promises.
            unsafe { $crate::net::message_level::<$driver>(dev) }
        }

        /// # Safety
        ///
        /// `dev` must be a registered device of the driver, and the lock must be held.
        #[no_mangle]
        unsafe extern "C" fn $set(dev: *mut ::kernel::bindings::net_device, level: u32) {
            // SAFETY: as the caller promises.
            unsafe { $crate::net::set_message_level::<$driver>(dev, level) }
        }

        // SAFETY: The functions want no more than that.
        unsafe { $crate::net::MessageLevelCallbacks::new($get, $set) }
    }};
}
pub(crate) use message_level_callbacks;

/// The level of messages of a device.
///
/// # Safety
///
/// `dev` must be a registered device with the operations of `T`, and the lock must be held.
pub(crate) unsafe fn message_level<T: Operations>(dev: *mut bindings::net_device) -> u32 {
    // SAFETY: as the caller promises.
    let (this, _) = unsafe { Callbacks::<T>::of(dev) };
    this.message_level().0
}

/// Sets the level of messages of a device.
///
/// # Safety
///
/// As [`message_level`].
pub(crate) unsafe fn set_message_level<T: Operations>(dev: *mut bindings::net_device, level: u32) {
    // SAFETY: as the caller promises.
    let (this, _) = unsafe { Callbacks::<T>::of(dev) };
    this.set_message_level(Level(level));
}

/// What a driver tells `ethtool`. All methods run with the [`Rtnl`] lock held and may sleep.
pub(crate) trait EthtoolOperations {
    /// Name of the driver.
    const DRIVER: &'static CStr;
    /// Number of registers of a dump.
    const REGISTERS: usize;
    /// Version of the dump's layout.
    const REGISTERS_VERSION: u32;
    /// Bytes of the key of the receive hash.
    const KEY_SIZE: usize;
    /// The stack's way to the level of messages.
    const MESSAGE_LEVEL: MessageLevelCallbacks;

    /// Reads the registers.
    fn registers(&self, rtnl: &Rtnl, registers: &mut [u32]);

    /// The level of messages.
    fn message_level(&self) -> Level;
    /// Sets the level of messages.
    fn set_message_level(&self, level: Level);

    /// The channels.
    ///
    /// # Errors
    ///
    /// If the device is not there.
    fn channels(&self, rtnl: &Rtnl) -> Result<Channels>;
    /// Sets how many channels there are, at least one.
    ///
    /// # Errors
    ///
    /// Any error is reported to the user.
    fn set_channels(&self, rtnl: &Rtnl, count: u32) -> Result;

    /// The rings.
    ///
    /// # Errors
    ///
    /// If the device is not there.
    fn rings(&self, rtnl: &Rtnl) -> Result<Rings>;
    /// Sets the sizes of the rings.
    ///
    /// # Errors
    ///
    /// Any error is reported to the user.
    fn set_rings(&self, rtnl: &Rtnl, rx: u32, tx: u32) -> Result;

    /// How many statistics there are.
    fn stat_count(&self, rtnl: &Rtnl) -> usize;
    /// Names of the statistics.
    fn stat_names(&self, rtnl: &Rtnl, names: &mut Strings<'_>);
    /// The statistics, in the same order.
    fn stat_values(&self, rtnl: &Rtnl, values: &mut [u64]);

    /// Speed and duplex.
    fn link_settings(&self) -> LinkSettings;
    /// Sets speed and duplex, which is a matter of taste for a virtual device.
    fn set_link_settings(&self, settings: LinkSettings);

    /// Number of entries of the indirection table; 0 if there is none.
    fn table_size(&self, rtnl: &Rtnl) -> u32;
    /// How packets that come in are spread.
    ///
    /// # Errors
    ///
    /// If the device is not there.
    fn rx_hash(&self, rtnl: &Rtnl, hash: RxHash<'_>) -> Result;
    /// Sets how packets that come in are spread; what is `None` stays.
    ///
    /// # Errors
    ///
    /// Any error is reported to the user.
    fn set_rx_hash(&self, rtnl: &Rtnl, hash: RxHash<'_>) -> Result;

    /// Whether ports are part of the hash of a kind of flow.
    fn hashes_ports(&self, flow: FlowType) -> bool;
    /// Sets whether ports are part of it.
    fn set_hashes_ports(&self, flow: FlowType, on: bool);
}

/// The table of operations for a driver.
pub(super) const fn operations<T: Operations>() -> &'static bindings::ethtool_ops {
    &Callbacks::<T>::ETHTOOL
}

/// Addresses, and addresses and ports, as `ethtool` names the parts of a hash.
const HASH_ADDRESSES: u32 = (1 << 4) | (1 << 5);
const HASH_PORTS: u32 = (1 << 6) | (1 << 7);

/// The hash function that devices of this kind have (`ETH_RSS_HASH_TOP`).
const HASH_TOEPLITZ: u32 = 1 << bindings::ETH_RSS_HASH_TOP_BIT;

/// A kind of flow; `None` for one whose hash cannot be chosen.
fn flow_type(raw: u32) -> Option<FlowType> {
    Some(match raw {
        1 => FlowType::Tcp4,
        2 => FlowType::Udp4,
        5 => FlowType::Tcp6,
        6 => FlowType::Udp6,
        _ => return None,
    })
}

struct Callbacks<T: Operations>(PhantomData<T>);

impl<T: Operations> Callbacks<T> {
    const ETHTOOL: bindings::ethtool_ops = bindings::ethtool_ops {
        get_drvinfo: Some(Self::get_drvinfo),
        get_regs_len: Some(Self::get_regs_len),
        get_regs: Some(Self::get_regs),
        get_msglevel: Some(T::MESSAGE_LEVEL.get),
        set_msglevel: Some(T::MESSAGE_LEVEL.set),
        get_link: Some(raw::ethtool_op_get_link),
        get_ringparam: Some(Self::get_ringparam),
        set_ringparam: Some(Self::set_ringparam),
        get_strings: Some(Self::get_strings),
        get_ethtool_stats: Some(Self::get_ethtool_stats),
        get_sset_count: Some(Self::get_sset_count),
        get_rx_ring_count: Some(Self::get_rx_ring_count),
        get_rxfh_key_size: Some(Self::get_rxfh_key_size),
        get_rxfh_indir_size: Some(Self::get_rxfh_indir_size),
        get_rxfh: Some(Self::get_rxfh),
        set_rxfh: Some(Self::set_rxfh),
        get_rxfh_fields: Some(Self::get_rxfh_fields),
        set_rxfh_fields: Some(Self::set_rxfh_fields),
        get_channels: Some(Self::get_channels),
        set_channels: Some(Self::set_channels),
        get_ts_info: Some(raw::ethtool_op_get_ts_info),
        get_link_ksettings: Some(Self::get_link_ksettings),
        set_link_ksettings: Some(Self::set_link_ksettings),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// `dev` must be a device with the operations of `T` that stays registered for `'a`, and the lock
    /// must be held for as long.
    unsafe fn of<'a>(dev: *mut bindings::net_device) -> (&'a T, Rtnl) {
        // SAFETY: as the caller promises.
        unsafe { (data(dev), Rtnl::assume_held()) }
    }

    extern "C" fn get_drvinfo(
        _dev: *mut bindings::net_device,
        info: *mut bindings::ethtool_drvinfo,
    ) {
        // SAFETY: The stack passes a zeroed structure.
        let info = unsafe { &mut *info };
        copy_text(&mut info.driver, T::DRIVER);
        copy_text(&mut info.fw_version, c"N/A");
    }

    extern "C" fn get_regs_len(_dev: *mut bindings::net_device) -> ffi::c_int {
        // CAST: a small number of the driver's own.
        (T::REGISTERS * size_of::<u32>()) as ffi::c_int
    }

    extern "C" fn get_regs(
        dev: *mut bindings::net_device,
        regs: *mut bindings::ethtool_regs,
        buffer: *mut ffi::c_void,
    ) {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        // SAFETY: The stack passes a structure with the length of the buffer, which is not more than
        // what `get_regs_len` has said; the buffer is zeroed and was made with `vzalloc()`.
        let registers = unsafe {
            (*regs).version = T::REGISTERS_VERSION;
            let count = ((*regs).len as usize / size_of::<u32>()).min(T::REGISTERS);
            core::slice::from_raw_parts_mut(buffer.cast::<u32>(), count)
        };
        this.registers(&rtnl, registers);
    }

    extern "C" fn get_ringparam(
        dev: *mut bindings::net_device,
        ring: *mut bindings::ethtool_ringparam,
        _kernel_ring: *mut bindings::kernel_ethtool_ringparam,
        _extack: *mut bindings::netlink_ext_ack,
    ) {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        if let Ok(rings) = this.rings(&rtnl) {
            // SAFETY: The stack passes a zeroed structure.
            let ring = unsafe { &mut *ring };
            ring.rx_pending = rings.rx;
            ring.rx_max_pending = rings.rx_max;
            ring.tx_pending = rings.tx;
            ring.tx_max_pending = rings.tx_max;
        }
    }

    extern "C" fn set_ringparam(
        dev: *mut bindings::net_device,
        ring: *mut bindings::ethtool_ringparam,
        _kernel_ring: *mut bindings::kernel_ethtool_ringparam,
        _extack: *mut bindings::netlink_ext_ack,
    ) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        // SAFETY: The stack passes a valid structure.
        let (rx, tx) = unsafe { ((*ring).rx_pending, (*ring).tx_pending) };
        from_result(|| this.set_rings(&rtnl, rx, tx).map(|()| 0))
    }

    extern "C" fn get_sset_count(dev: *mut bindings::net_device, set: ffi::c_int) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        if u32::try_from(set) != Ok(bindings::ethtool_stringset_ETH_SS_STATS) {
            return EOPNOTSUPP.to_errno();
        }
        i32::try_from(this.stat_count(&rtnl)).unwrap_or(0)
    }

    extern "C" fn get_strings(dev: *mut bindings::net_device, set: u32, buffer: *mut u8) {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        if set != bindings::ethtool_stringset_ETH_SS_STATS {
            return;
        }
        // SAFETY: The buffer has room for as many names as `get_sset_count` has said, and the lock has
        // been held since.
        let left =
            unsafe { core::slice::from_raw_parts_mut(buffer.cast(), this.stat_count(&rtnl)) };
        this.stat_names(&rtnl, &mut Strings { left });
    }

    extern "C" fn get_ethtool_stats(
        dev: *mut bindings::net_device,
        stats: *mut bindings::ethtool_stats,
        buffer: *mut u64,
    ) {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        // SAFETY: The buffer has room for `n_stats` numbers.
        let values = unsafe { core::slice::from_raw_parts_mut(buffer, (*stats).n_stats as usize) };
        this.stat_values(&rtnl, values);
    }

    extern "C" fn get_rx_ring_count(dev: *mut bindings::net_device) -> u32 {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        // The core divides by it.
        this.channels(&rtnl)
            .map_or(1, |channels| channels.count.max(1))
    }

    extern "C" fn get_rxfh_key_size(_dev: *mut bindings::net_device) -> u32 {
        // CAST: a small number of the driver's own.
        T::KEY_SIZE as u32
    }

    extern "C" fn get_rxfh_indir_size(dev: *mut bindings::net_device) -> u32 {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        this.table_size(&rtnl)
    }

    /// The table and the key that `rxfh` points to.
    ///
    /// # Safety
    ///
    /// `rxfh` must be valid for `'a`, and each pointer in it null or to as many entries as the driver
    /// has said.
    unsafe fn rx_hash<'a>(rxfh: *mut bindings::ethtool_rxfh_param, entries: u32) -> RxHash<'a> {
        // SAFETY: as the caller promises.
        unsafe {
            let (table, key) = ((*rxfh).indir, (*rxfh).key);
            RxHash {
                table: (!table.is_null())
                    .then(|| core::slice::from_raw_parts_mut(table, entries as usize)),
                key: (!key.is_null()).then(|| core::slice::from_raw_parts_mut(key, T::KEY_SIZE)),
            }
        }
    }

    extern "C" fn get_rxfh(
        dev: *mut bindings::net_device,
        rxfh: *mut bindings::ethtool_rxfh_param,
    ) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        // SAFETY: The stack passes a structure whose buffers have the sizes that the driver gave, with
        // the lock held since.
        let hash = unsafe {
            // CAST: the kernel's type for it.
            (*rxfh).hfunc = HASH_TOEPLITZ as u8;
            Self::rx_hash(rxfh, this.table_size(&rtnl))
        };
        from_result(|| this.rx_hash(&rtnl, hash).map(|()| 0))
    }

    extern "C" fn set_rxfh(
        dev: *mut bindings::net_device,
        rxfh: *mut bindings::ethtool_rxfh_param,
        _extack: *mut bindings::netlink_ext_ack,
    ) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        // SAFETY: as in `get_rxfh`.
        let (hash, function) = unsafe {
            (
                Self::rx_hash(rxfh, this.table_size(&rtnl)),
                u32::from((*rxfh).hfunc),
            )
        };
        if function != raw::ETH_RSS_HASH_NO_CHANGE && function != HASH_TOEPLITZ {
            return EOPNOTSUPP.to_errno();
        }
        from_result(|| this.set_rx_hash(&rtnl, hash).map(|()| 0))
    }

    extern "C" fn get_rxfh_fields(
        dev: *mut bindings::net_device,
        fields: *mut bindings::ethtool_rxfh_fields,
    ) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, _) = unsafe { Self::of(dev) };
        // SAFETY: The stack passes a valid structure.
        let fields = unsafe { &mut *fields };
        fields.data = match flow_type(fields.flow_type) {
            Some(flow) if this.hashes_ports(flow) => HASH_ADDRESSES | HASH_PORTS,
            Some(_) => HASH_ADDRESSES,
            // Plain IP.
            None if matches!(fields.flow_type, 0x10 | 0x11) => HASH_ADDRESSES,
            None => 0,
        };
        0
    }

    extern "C" fn set_rxfh_fields(
        dev: *mut bindings::net_device,
        fields: *const bindings::ethtool_rxfh_fields,
        _extack: *mut bindings::netlink_ext_ack,
    ) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, _) = unsafe { Self::of(dev) };
        // SAFETY: The stack passes a valid structure.
        let (flow, data) = unsafe { ((*fields).flow_type, (*fields).data) };
        let Some(flow) = flow_type(flow) else {
            return EOPNOTSUPP.to_errno();
        };
        if data == HASH_ADDRESSES || data == HASH_ADDRESSES | HASH_PORTS {
            this.set_hashes_ports(flow, data & HASH_PORTS != 0);
            0
        } else {
            EOPNOTSUPP.to_errno()
        }
    }

    extern "C" fn get_channels(
        dev: *mut bindings::net_device,
        channels: *mut bindings::ethtool_channels,
    ) {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        if let Ok(now) = this.channels(&rtnl) {
            // SAFETY: The stack passes a zeroed structure.
            let channels = unsafe { &mut *channels };
            channels.max_combined = now.max;
            channels.combined_count = now.count;
        }
    }

    extern "C" fn set_channels(
        dev: *mut bindings::net_device,
        channels: *mut bindings::ethtool_channels,
    ) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { Self::of(dev) };
        // SAFETY: The stack passes a valid structure.
        let wanted = unsafe { &*channels };
        if wanted.combined_count == 0
            || wanted.rx_count != 0
            || wanted.tx_count != 0
            || wanted.other_count != 0
        {
            return EINVAL.to_errno();
        }
        from_result(|| this.set_channels(&rtnl, wanted.combined_count).map(|()| 0))
    }

    extern "C" fn get_link_ksettings(
        dev: *mut bindings::net_device,
        settings: *mut bindings::ethtool_link_ksettings,
    ) -> ffi::c_int {
        /// `PORT_OTHER` of the kernel.
        const PORT_OTHER: u8 = 0xff;
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, _) = unsafe { Self::of(dev) };
        let now = this.link_settings();
        // SAFETY: The stack passes a zeroed structure.
        let base = unsafe { &mut (*settings).base };
        base.speed = now.speed;
        base.duplex = now.duplex;
        base.port = PORT_OTHER;
        0
    }

    extern "C" fn set_link_ksettings(
        dev: *mut bindings::net_device,
        settings: *const bindings::ethtool_link_ksettings,
    ) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, _) = unsafe { Self::of(dev) };
        let mut now = this.link_settings();
        from_result(|| {
            // SAFETY: as above; the two last pointers are to numbers of the right types.
            to_result(unsafe {
                raw::ethtool_virtdev_set_link_ksettings(
                    dev,
                    settings,
                    &mut now.speed,
                    &mut now.duplex,
                )
            })?;
            this.set_link_settings(now);
            Ok(0)
        })
    }
}

/// Copies a text to a field of characters, the last of which stays zero.
fn copy_text(to: &mut [ffi::c_char], text: &CStr) {
    let Some((_, to)) = to.split_last_mut() else {
        return;
    };
    for (to, from) in to.iter_mut().zip(text.to_bytes()) {
        *to = *from as ffi::c_char;
    }
}
