// SPDX-License-Identifier: GPL-2.0

//! Network devices: their registration, and the stack's calls.
//!
//! C header: [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h)

use super::{
    ethtool,
    skb::QueuedSkb,
    EthtoolOperations,
    Features,
    HasNapi,
    Napi,
    Rtnl,
    TxSkb, //
};
use crate::raw;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    device,
    error::{
        from_result,
        to_result, //
    },
    ffi,
    prelude::*,
    sync::Arc, //
};

/// What became of a packet that was to be sent.
pub(crate) enum Transmit {
    /// The driver has it, or has dropped it.
    Done,
    /// There is no room for it now, and the queue was stopped: it comes again later.
    Busy(TxSkb),
}

/// Which packets the stack wants, beside those for the device's own address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct RxFlags {
    /// All there are.
    pub(crate) promiscuous: bool,
    /// Those for all.
    pub(crate) broadcast: bool,
    /// Those for groups.
    pub(crate) multicast: bool,
}

/// Statistics of a device.
#[derive(Clone, Copy, Default)]
pub(crate) struct LinkStats {
    /// Packets received.
    pub(crate) rx_packets: u64,
    /// Bytes received.
    pub(crate) rx_bytes: u64,
    /// Packets received for groups or for all.
    pub(crate) multicast: u64,
    /// Packets from the host that were not delivered.
    pub(crate) rx_dropped: u64,
    /// Messages of the host that were not understood.
    pub(crate) rx_errors: u64,
    /// Packets sent.
    pub(crate) tx_packets: u64,
    /// Bytes sent.
    pub(crate) tx_bytes: u64,
    /// Packets that could not be sent.
    pub(crate) tx_dropped: u64,
}

/// A driver of a kind of network devices. A value of the type is the driver's data of one device.
///
/// The methods with a [`Rtnl`] run with that lock held and may sleep; none of them may wait for ever.
pub(crate) trait Operations: EthtoolOperations + Sized + Send + Sync + 'static {
    /// The device is brought up.
    ///
    /// # Errors
    ///
    /// Any error keeps it down.
    fn open(&self, rtnl: &Rtnl) -> Result;

    /// The device is brought down.
    fn stop(&self, rtnl: &Rtnl);

    /// Sends a packet. `more` says that others follow at once. Softirq context or with softirqs
    /// disabled; not twice at a time for one queue.
    fn start_xmit(&self, skb: TxSkb, more: bool) -> Transmit;

    /// Chooses the transmit queue of a packet, one of `queues`. Softirqs are disabled.
    fn select_queue(&self, skb: &mut QueuedSkb<'_>, queues: u16) -> u16;

    /// Says which packets are wanted.
    ///
    /// # Errors
    ///
    /// On any error it is tried again later.
    fn set_rx_mode(&self, rtnl: &Rtnl, flags: RxFlags) -> Result;

    /// Turns features on and off: those in `change` are to be as they are in `wanted`.
    ///
    /// # Errors
    ///
    /// Any error leaves them as they are.
    fn set_features(&self, rtnl: &Rtnl, wanted: Features, change: Features) -> Result;

    /// Changes the MTU. The driver sets it with [`NetDevice::set_mtu`].
    ///
    /// # Errors
    ///
    /// Any error is reported to the user.
    fn change_mtu(&self, rtnl: &Rtnl, mtu: u32) -> Result;

    /// Changes the device's address.
    ///
    /// # Errors
    ///
    /// Any error leaves it as it is.
    fn set_address(&self, rtnl: &Rtnl, address: [u8; 6]) -> Result;

    /// The statistics. Any context.
    fn stats(&self) -> LinkStats;
}

/// A network device, which may be registered or not.
///
/// # Invariants
///
/// The pointer is to a `struct net_device` that was made by `NetDevice::new()`, with `queues` queues in
/// each direction, and that this value frees.
pub(crate) struct NetDevice {
    dev: NonNull<bindings::net_device>,
    queues: u16,
}

// SAFETY: A network device can be used and freed by any thread.
unsafe impl Send for NetDevice {}
// SAFETY: The methods with `&self` do their own locking, or are given the lock that they need.
unsafe impl Sync for NetDevice {}

/// What is in the private area of a `struct net_device`: the driver's data, of which the registration
/// holds a reference. Null before there is one.
#[repr(transparent)]
struct Private<T>(*const T);

impl NetDevice {
    /// Makes an Ethernet device with at most `queues` queues in each direction, for a driver `T`. One
    /// queue is used to begin with.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new<T: Operations>(
        parent: &device::Device<device::Bound>,
        queues: u16,
    ) -> Result<Arc<Self>> {
        let size = i32::try_from(size_of::<Private<T>>())?;
        // SAFETY: The function can be called wherever one may sleep.
        let dev = unsafe { raw::netvsc_helper_alloc_etherdev(size, queues.into()) };
        // INVARIANT: The device was made just now.
        let this = Self {
            dev: NonNull::new(dev).ok_or(ENOMEM)?,
            queues,
        };
        // CAST: `device::Device` is a transparent wrapper of `struct device`.
        let parent = core::ptr::from_ref(parent).cast_mut().cast();
        // SAFETY: The device is valid and nobody else knows it. Its operations are called only when it
        // is registered. The parent is bound to the driver that makes the device.
        unsafe {
            raw::netvsc_helper_set_ops(dev, Callbacks::<T>::device(), ethtool::operations::<T>());
            raw::netvsc_helper_set_parent(dev, parent);
            raw::netif_set_real_num_tx_queues(dev, 1);
            raw::netif_set_real_num_rx_queues(dev, 1);
            raw::netif_carrier_off(dev);
            raw::netvsc_helper_lockdep_set_classes(dev);
        }
        Ok(Arc::new(this, GFP_KERNEL)?)
    }

    pub(super) fn as_raw(&self) -> *mut bindings::net_device {
        self.dev.as_ptr()
    }

    /// Whether the device is registered, or will be. It stays so while the lock is held.
    fn is_usable(&self, _rtnl: &Rtnl) -> bool {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_is_usable(self.as_raw()) }
    }

    /// Whether the device is registered now.
    pub(crate) fn is_registered(&self) -> bool {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_is_registered(self.as_raw()) }
    }

    /// Whether the device is up.
    pub(crate) fn is_running(&self, _rtnl: &Rtnl) -> bool {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_is_running(self.as_raw()) }
    }

    /// The MTU.
    pub(crate) fn mtu(&self) -> u32 {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_mtu(self.as_raw()) }
    }

    /// Sets the MTU.
    pub(crate) fn set_mtu(&self, _rtnl: &Rtnl, mtu: u32) {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_set_mtu(self.as_raw(), mtu) };
    }

    /// Sets what MTU a user may choose.
    pub(crate) fn set_mtu_range(&self, _rtnl: &Rtnl, min: u32, max: u32) {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_set_mtu_range(self.as_raw(), min, max) };
    }

    /// Asks the stack for so many bytes before each packet that it sends.
    pub(crate) fn set_headroom(&self, _rtnl: &Rtnl, bytes: u16) {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_set_headroom(self.as_raw(), bytes) };
    }

    /// Sets the address of a device that is not registered yet.
    ///
    /// # Errors
    ///
    /// `EBUSY` if it is; the stack does it then.
    pub(crate) fn set_first_address(&self, rtnl: &Rtnl, address: [u8; 6]) -> Result {
        if !self.is_usable(rtnl) || self.is_registered() {
            return Err(EBUSY);
        }
        // SAFETY: The device is valid; the address has six bytes.
        unsafe { raw::netvsc_helper_set_address(self.as_raw(), address.as_ptr()) };
        Ok(())
    }

    /// The address. It stays the same while the lock is held.
    pub(crate) fn address(&self, _rtnl: &Rtnl) -> [u8; 6] {
        // SAFETY: The device is valid, and an Ethernet device's address has six bytes.
        unsafe {
            raw::netvsc_helper_address(self.as_raw())
                .cast::<[u8; 6]>()
                .read()
        }
    }

    /// Whether somebody has given the device another name for people to read.
    pub(crate) fn has_alias(&self, _rtnl: &Rtnl) -> bool {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_has_alias(self.as_raw()) }
    }

    /// Gives the device a name for people to read.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or `EINVAL` if it is too long.
    pub(crate) fn set_alias(&self, _rtnl: &Rtnl, alias: &[u8]) -> Result {
        // SAFETY: The device is valid; the function copies the bytes.
        let ret = unsafe { raw::dev_set_alias(self.as_raw(), alias.as_ptr().cast(), alias.len()) };
        to_result(ret.min(0))
    }

    /// What is turned on.
    pub(crate) fn features(&self) -> Features {
        // SAFETY: The device is valid.
        Features::from_raw(unsafe { raw::netvsc_helper_features(self.as_raw()) })
    }

    /// Sets what is turned on, without asking the driver.
    pub(crate) fn set_features(&self, _rtnl: &Rtnl, features: Features) {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_set_features(self.as_raw(), features.as_raw()) };
    }

    /// What a user may turn on and off.
    pub(crate) fn hw_features(&self, _rtnl: &Rtnl) -> Features {
        // SAFETY: The device is valid.
        Features::from_raw(unsafe { raw::netvsc_helper_hw_features(self.as_raw()) })
    }

    /// Sets what a user may turn on and off.
    pub(crate) fn set_hw_features(&self, _rtnl: &Rtnl, features: Features) {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_set_hw_features(self.as_raw(), features.as_raw()) };
    }

    /// Sets what also works for packets with a VLAN tag.
    pub(crate) fn set_vlan_features(&self, _rtnl: &Rtnl, features: Features) {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_set_vlan_features(self.as_raw(), features.as_raw()) };
    }

    /// Sets how long a packet may be that the device cuts into segments.
    pub(crate) fn set_tso_max_size(&self, _rtnl: &Rtnl, bytes: u32) {
        // SAFETY: The device is valid.
        unsafe { raw::netif_set_tso_max_size(self.as_raw(), bytes) };
    }

    /// Whether a user has chosen how packets that come in are spread.
    pub(crate) fn rx_hash_is_configured(&self, _rtnl: &Rtnl) -> bool {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_rxfh_is_configured(self.as_raw()) }
    }

    /// There is a link.
    pub(crate) fn carrier_on(&self, rtnl: &Rtnl) {
        if self.is_usable(rtnl) {
            // SAFETY: The device is valid, and is not being unregistered.
            unsafe { raw::netif_carrier_on(self.as_raw()) };
        }
    }

    /// There is no link.
    pub(crate) fn carrier_off(&self, rtnl: &Rtnl) {
        if self.is_usable(rtnl) {
            // SAFETY: The device is valid, and is not being unregistered.
            unsafe { raw::netif_carrier_off(self.as_raw()) };
        }
    }

    /// Tells the neighbours where the device is, because it may have moved.
    pub(crate) fn notify_peers(&self, _rtnl: &Rtnl) {
        if self.is_registered() {
            // SAFETY: The device is valid and registered, and the lock is held.
            unsafe { raw::__netdev_notify_peers(self.as_raw()) };
        }
    }

    /// The device is there again.
    pub(crate) fn attach(&self, _rtnl: &Rtnl) {
        if self.is_registered() {
            // SAFETY: The device is valid and registered.
            unsafe { raw::netif_device_attach(self.as_raw()) };
        }
    }

    /// The device is not there for a while: nothing is sent, and a user cannot do much.
    pub(crate) fn detach(&self, _rtnl: &Rtnl) {
        if self.is_registered() {
            // SAFETY: The device is valid and registered.
            unsafe { raw::netif_device_detach(self.as_raw()) };
        }
    }

    /// Number of queues that there can be in each direction.
    pub(crate) fn max_queues(&self) -> u16 {
        self.queues
    }

    /// Sets how many queues there are in each direction.
    ///
    /// # Errors
    ///
    /// `EINVAL` if there cannot be so many, `ENOMEM`.
    pub(crate) fn set_queues(&self, rtnl: &Rtnl, count: u16) -> Result {
        if count == 0 || count > self.queues || !self.is_usable(rtnl) {
            return Err(EINVAL);
        }
        // SAFETY: The device is valid, has so many queues, and the lock is held.
        to_result(unsafe { raw::netif_set_real_num_tx_queues(self.as_raw(), count.into()) })?;
        // SAFETY: as above.
        to_result(unsafe { raw::netif_set_real_num_rx_queues(self.as_raw(), count.into()) })
    }

    /// Number of receive queues that there are now.
    pub(crate) fn rx_queues(&self) -> u32 {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_real_rx_queues(self.as_raw()) }
    }

    /// Number of transmit queues that there are now.
    pub(crate) fn tx_queues(&self) -> u32 {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_real_tx_queues(self.as_raw()) }
    }

    /// Lets users know which NAPI instance serves a queue, in both directions; `None`: no one.
    pub(crate) fn set_queue_napi<T: HasNapi>(
        &self,
        _rtnl: &Rtnl,
        queue: u16,
        napi: Option<&Napi<T>>,
    ) {
        if queue >= self.queues {
            return;
        }
        let napi = napi.map_or(core::ptr::null_mut(), Napi::as_raw).cast();
        for kind in [
            raw::netdev_queue_type_NETDEV_QUEUE_TYPE_RX,
            raw::netdev_queue_type_NETDEV_QUEUE_TYPE_TX,
        ] {
            // SAFETY: The device is valid and has such a queue; the lock is held.
            unsafe { raw::netif_queue_set_napi(self.as_raw(), queue.into(), kind, napi) };
        }
    }

    /// Lets the stack give no more packets to the queue. Any context.
    pub(crate) fn stop_queue(&self, queue: u16) {
        if queue < self.queues {
            // SAFETY: The device is valid and has such a queue.
            unsafe { raw::netvsc_helper_stop_queue(self.as_raw(), queue.into()) };
        }
    }

    /// Lets the stack give packets to the queue again. Any context.
    pub(crate) fn wake_queue(&self, queue: u16) {
        if queue < self.queues {
            // SAFETY: The device is valid and has such a queue.
            unsafe { raw::netvsc_helper_wake_queue(self.as_raw(), queue.into()) };
        }
    }

    /// Whether the driver has stopped the queue.
    pub(crate) fn is_queue_stopped(&self, queue: u16) -> bool {
        if queue >= self.queues {
            return false;
        }
        // SAFETY: The device is valid and has such a queue.
        unsafe { raw::netvsc_helper_queue_stopped(self.as_raw(), queue.into()) }
    }

    /// Whether the queue is stopped, by the driver or by the stack.
    pub(crate) fn is_xmit_stopped(&self, queue: u16) -> bool {
        if queue >= self.queues {
            return false;
        }
        // SAFETY: The device is valid and has such a queue.
        unsafe { raw::netvsc_helper_xmit_stopped(self.as_raw(), queue.into()) }
    }

    /// Stops all queues, and waits until no packet is being given to the driver. May sleep.
    pub(crate) fn disable_tx(&self) {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_disable_tx(self.as_raw()) };
    }

    /// Wakes all queues.
    pub(crate) fn wake_all_queues(&self) {
        // SAFETY: The device is valid.
        unsafe { raw::netvsc_helper_wake_all(self.as_raw()) };
    }
}

impl Drop for NetDevice {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the device is ours. It is not registered: a registration has a
        // reference to this value.
        unsafe { raw::free_netdev(self.as_raw()) };
    }
}

/// The registration of a network device. Dropping it unregisters the device; it sleeps, and returns when
/// no operation is running.
///
/// # Invariants
///
/// The device is registered, with the operations of `T`, and its private area points to `data`.
pub(crate) struct Registration<T: Operations> {
    dev: Arc<NetDevice>,
    /// Dropped after the device was unregistered.
    _data: Arc<T>,
}

impl<T: Operations> Registration<T> {
    /// Registers `dev` with the driver's data. Takes the [`Rtnl`] lock, and sleeps.
    ///
    /// # Errors
    ///
    /// `EBUSY` if the device is, or was, registered, or what the kernel says.
    pub(crate) fn new(dev: Arc<NetDevice>, data: Arc<T>) -> Result<Self> {
        let raw_dev = dev.as_raw();
        {
            let rtnl = Rtnl::lock();
            if !dev.is_usable(&rtnl) || dev.is_registered() {
                return Err(EBUSY);
            }
            // SAFETY: The device is valid and not registered, so that nobody calls its operations. The
            // private area has room for the pointer.
            unsafe {
                let private = raw::netvsc_helper_priv(raw_dev).cast::<Private<T>>();
                private.write(Private(Arc::as_ptr(&data)));
                raw::netvsc_helper_set_ops(
                    raw_dev,
                    Callbacks::<T>::device(),
                    ethtool::operations::<T>(),
                );
            }
        }
        // SAFETY: The device is valid and complete.
        to_result(unsafe { raw::register_netdev(raw_dev) })?;
        // INVARIANT: The device was registered just now.
        Ok(Self { dev, _data: data })
    }

    /// The name of the device, for messages.
    pub(crate) fn name(&self) -> &CStr {
        // SAFETY: The name of a registered device is a string. It may be changed meanwhile, but stays
        // terminated.
        unsafe { CStr::from_char_ptr(raw::netvsc_helper_name(self.dev.as_raw())) }
    }
}

impl<T: Operations> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the device is registered.
        unsafe { raw::unregister_netdev(self.dev.as_raw()) };
    }
}

/// The driver's data of a registered device.
///
/// # Safety
///
/// `dev` must be a device with the operations of `T` that stays registered for `'a`.
pub(super) unsafe fn data<'a, T>(dev: *mut bindings::net_device) -> &'a T {
    // SAFETY: The private area was set before the device was registered, to something of which the
    // registration holds a reference until the device is unregistered.
    unsafe { &*(*raw::netvsc_helper_priv(dev).cast::<Private<T>>()).0 }
}

/// The stack's way to the driver.
struct Callbacks<T: Operations>(PhantomData<T>);

impl<T: Operations> Callbacks<T> {
    const DEVICE: raw::net_device_ops = raw::net_device_ops {
        ndo_open: Some(Self::open),
        ndo_stop: Some(Self::stop),
        ndo_start_xmit: Some(Self::start_xmit),
        ndo_select_queue: Some(Self::select_queue),
        ndo_set_rx_mode_async: Some(Self::set_rx_mode),
        ndo_set_features: Some(Self::set_features),
        ndo_change_mtu: Some(Self::change_mtu),
        ndo_validate_addr: Some(raw::eth_validate_addr),
        ndo_set_mac_address: Some(Self::set_mac_address),
        ndo_get_stats64: Some(Self::stats),
        ..pin_init::zeroed()
    };

    const fn device() -> &'static raw::net_device_ops {
        &Self::DEVICE
    }

    extern "C" fn open(dev: *mut bindings::net_device) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { (data::<T>(dev), Rtnl::assume_held()) };
        from_result(|| this.open(&rtnl).map(|()| 0))
    }

    extern "C" fn stop(dev: *mut bindings::net_device) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { (data::<T>(dev), Rtnl::assume_held()) };
        this.stop(&rtnl);
        0
    }

    extern "C" fn start_xmit(
        skb: *mut bindings::sk_buff,
        dev: *mut bindings::net_device,
    ) -> raw::netdev_tx_t {
        let Some(skb) = NonNull::new(skb) else {
            return raw::netdev_tx_NETDEV_TX_OK;
        };
        // SAFETY: The stack calls this for a registered device, and hands the packet over.
        let (this, skb, more) = unsafe {
            (
                data::<T>(dev),
                TxSkb::from_raw(skb),
                raw::netvsc_helper_xmit_more(),
            )
        };
        match this.start_xmit(skb, more) {
            Transmit::Done => raw::netdev_tx_NETDEV_TX_OK,
            Transmit::Busy(skb) => {
                // The packet stays with the stack.
                skb.into_raw();
                raw::netdev_tx_NETDEV_TX_BUSY
            }
        }
    }

    extern "C" fn select_queue(
        dev: *mut bindings::net_device,
        skb: *mut bindings::sk_buff,
        _subordinate: *mut bindings::net_device,
    ) -> u16 {
        let Some(skb) = NonNull::new(skb) else {
            return 0;
        };
        // SAFETY: The stack calls this for a registered device and a valid packet.
        let (this, mut skb, queues) = unsafe {
            (
                data::<T>(dev),
                QueuedSkb::from_raw(skb),
                raw::netvsc_helper_real_tx_queues(dev),
            )
        };
        let queues = u16::try_from(queues).unwrap_or(u16::MAX).max(1);
        let queue = this.select_queue(&mut skb, queues);
        queue.checked_rem(queues).unwrap_or(0)
    }

    extern "C" fn set_rx_mode(
        dev: *mut bindings::net_device,
        _unicast: *mut raw::netdev_hw_addr_list,
        multicast: *mut raw::netdev_hw_addr_list,
    ) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl, flags) = unsafe {
            (
                data::<T>(dev),
                Rtnl::assume_held(),
                raw::netvsc_helper_flags(dev),
            )
        };
        // SAFETY: The stack passes a list.
        let some = unsafe { (*multicast).count } != 0;
        let flags = RxFlags {
            promiscuous: flags & bindings::net_device_flags_IFF_PROMISC != 0,
            broadcast: flags & bindings::net_device_flags_IFF_BROADCAST != 0,
            multicast: some || flags & bindings::net_device_flags_IFF_ALLMULTI != 0,
        };
        from_result(|| this.set_rx_mode(&rtnl, flags).map(|()| 0))
    }

    extern "C" fn set_features(dev: *mut bindings::net_device, features: u64) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl, now) = unsafe {
            (
                data::<T>(dev),
                Rtnl::assume_held(),
                raw::netvsc_helper_features(dev),
            )
        };
        let wanted = Features::from_raw(features);
        let change = wanted ^ Features::from_raw(now);
        from_result(|| this.set_features(&rtnl, wanted, change).map(|()| 0))
    }

    extern "C" fn change_mtu(dev: *mut bindings::net_device, mtu: ffi::c_int) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held.
        let (this, rtnl) = unsafe { (data::<T>(dev), Rtnl::assume_held()) };
        from_result(|| {
            this.change_mtu(&rtnl, u32::try_from(mtu)?)?;
            Ok(0)
        })
    }

    extern "C" fn set_mac_address(
        dev: *mut bindings::net_device,
        address: *mut ffi::c_void,
    ) -> ffi::c_int {
        // SAFETY: The stack calls this for a registered device, with the lock held, and with a `struct
        // sockaddr`: two bytes of family, then the address.
        let (this, rtnl, bytes) = unsafe {
            (
                data::<T>(dev),
                Rtnl::assume_held(),
                address.cast::<u8>().add(2).cast::<[u8; 6]>().read(),
            )
        };
        from_result(|| {
            // SAFETY: as above.
            to_result(unsafe { raw::eth_prepare_mac_addr_change(dev, address) })?;
            this.set_address(&rtnl, bytes)?;
            // SAFETY: as above.
            unsafe { raw::eth_commit_mac_addr_change(dev, address) };
            Ok(0)
        })
    }

    extern "C" fn stats(dev: *mut bindings::net_device, stats: *mut raw::rtnl_link_stats64) {
        // SAFETY: The stack calls this for a registered device.
        let now = unsafe { data::<T>(dev) }.stats();
        // SAFETY: The stack passes a zeroed structure.
        let stats = unsafe { &mut *stats };
        stats.rx_packets = now.rx_packets;
        stats.rx_bytes = now.rx_bytes;
        stats.multicast = now.multicast;
        stats.rx_dropped = now.rx_dropped;
        stats.rx_errors = now.rx_errors;
        stats.tx_packets = now.tx_packets;
        stats.tx_bytes = now.tx_bytes;
        stats.tx_dropped = now.tx_dropped;
    }
}
