// SPDX-License-Identifier: GPL-2.0

//! Devices on the bus, and their directories in sysfs.
//!
//! A device is made for each primary channel. `/sys/bus/vmbus/devices/<instance>/channels/<id>` is
//! there for each channel of the device; it is made before the driver's probe.
//!
//! C header: [`include/linux/device.h`](srctree/include/linux/device.h)

use crate::{
    attributes,
    bus,
    channel::Channel,
    cpu,
    log::Show,
    raw, //
};
use core::{
    marker::PhantomData,
    mem::offset_of,
    ptr::{
        addr_of_mut,
        NonNull, //
    },
};
use hv_proto::guid::Guid;
use kernel::{
    bindings,
    container_of,
    device,
    error::to_result,
    prelude::*,
    str::CString,
    sync::Arc,
    types::Opaque, //
};

/// What is allocated for a device.
///
/// `channel` never changes while the device exists.
#[repr(C)]
pub(crate) struct RawDevice {
    pub(crate) dev: bindings::device,
    dma_mask: u64,
    dma_parms: bindings::device_dma_parameters,
    channel: Arc<Channel>,
}

/// A device on the bus.
///
/// # Invariants
///
/// A [`Device`] is a `RawDevice` whose `struct device` is initialized.
#[repr(transparent)]
pub struct Device<Ctx: device::DeviceContext = device::Normal>(Opaque<RawDevice>, PhantomData<Ctx>);

impl<Ctx: device::DeviceContext> Device<Ctx> {
    fn as_raw(&self) -> *mut RawDevice {
        self.0.get()
    }

    /// The primary channel of the device.
    pub fn channel(&self) -> &Arc<Channel> {
        // SAFETY: By the type invariants this is a `RawDevice`; `channel` never changes.
        unsafe { &(*self.as_raw()).channel }
    }

    /// Which device of its kind this is. The host keeps the number over restarts of the guest.
    pub fn instance_id(&self) -> Guid {
        self.channel().offer().instance_id
    }
}

// SAFETY: `Device` is a transparent wrapper of `RawDevice`, and the offset is that of its
// `struct device`.
unsafe impl<Ctx: device::DeviceContext> device::AsBusDevice<Ctx> for Device<Ctx> {
    const OFFSET: usize = offset_of!(RawDevice, dev);
}

// SAFETY: `Device` is a transparent wrapper of a type that doesn't depend on `Device`'s generic
// argument.
kernel::impl_device_context_deref!(unsafe { Device });
kernel::impl_device_context_into_aref!(Device);

// SAFETY: Instances of `Device` are always reference-counted.
unsafe impl kernel::sync::aref::AlwaysRefCounted for Device {
    fn inc_ref(&self) {
        // SAFETY: The existence of a shared reference guarantees that the refcount is not zero.
        unsafe { bindings::get_device(addr_of_mut!((*self.as_raw()).dev)) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // CAST: `Self` is a transparent wrapper of `RawDevice`.
        let raw = obj.cast::<RawDevice>().as_ptr();

        // SAFETY: The safety requirements guarantee that the refcount is not zero.
        unsafe { bindings::put_device(addr_of_mut!((*raw).dev)) };
    }
}

impl<Ctx: device::DeviceContext> AsRef<device::Device<Ctx>> for Device<Ctx> {
    fn as_ref(&self) -> &device::Device<Ctx> {
        // SAFETY: By the type invariants this is an initialized `struct device`, which lives as
        // long as `self`.
        unsafe { device::Device::from_raw(addr_of_mut!((*self.as_raw()).dev)) }
    }
}

// SAFETY: A `Device` is always reference-counted and can be released from any thread.
unsafe impl Send for Device {}

// SAFETY: All methods of `Device<Normal>` are thread safe.
unsafe impl Sync for Device {}

// SAFETY: Same as `Device<Normal>`; `Bound` is a type-state marker that does not affect thread
// safety.
unsafe impl Sync for Device<device::Bound> {}

/// The channel of a device of this bus.
///
/// # Safety
///
/// `dev` must be a valid device of this bus, and must stay so for `'a`.
pub(crate) unsafe fn channel_of<'a>(dev: *const bindings::device) -> &'a Arc<Channel> {
    // SAFETY: All devices of this bus are made by `Registration::new`, in a `RawDevice`.
    let raw = unsafe { container_of!(dev, RawDevice, dev) };

    // SAFETY: `channel` never changes while the device exists.
    unsafe { &(*raw).channel }
}

extern "C" fn release(dev: *mut bindings::device) {
    // SAFETY: Only `Registration::new` sets this callback, for a device in a `RawDevice`.
    let raw = unsafe { container_of!(dev, RawDevice, dev) };

    // SAFETY: The memory comes from `KBox::into_raw` there, and the last reference is gone.
    drop(unsafe { KBox::from_raw(raw) });
}

/// A device that is registered on the bus. Dropping it unbinds its driver and removes it.
///
/// # Invariants
///
/// `raw` is of a registered device, to which this value holds a reference.
pub(crate) struct Registration {
    raw: NonNull<RawDevice>,
}

// SAFETY: Devices can be unregistered from any thread.
unsafe impl Send for Registration {}

// SAFETY: There is nothing to do with a shared reference.
unsafe impl Sync for Registration {}

impl Registration {
    /// Makes the device of a primary channel. Its driver's probe starts, and runs on by itself.
    pub(crate) fn new(channel: &Arc<Channel>) -> Result<Self> {
        let name = CString::try_from_fmt(fmt!("{}", Show(channel.offer().instance_id)))?;
        let raw = KBox::into_raw(KBox::new(
            RawDevice {
                dev: bindings::device::default(),
                dma_mask: 0,
                dma_parms: bindings::device_dma_parameters::default(),
                channel: channel.clone(),
            },
            GFP_KERNEL,
        )?);

        // SAFETY: `raw` was allocated just now and is used by nobody else.
        let dev = unsafe { addr_of_mut!((*raw).dev) };

        // SAFETY: `dev` is valid, zeroed and not in use yet; after `device_initialize` it belongs
        // to its reference count, and `release` frees it. The parent outlives all devices. The
        // DMA mask and parameters are part of the same allocation.
        let result = unsafe {
            (*dev).bus = bus::raw();
            // CAST: `device::Device` is a transparent wrapper of `struct device`.
            (*dev).parent = core::ptr::from_ref(channel.connection().parent())
                .cast_mut()
                .cast();
            (*dev).release = Some(release);
            bindings::device_initialize(dev);
            raw::vmbus_helper_init_dma(
                dev,
                addr_of_mut!((*raw).dma_mask),
                addr_of_mut!((*raw).dma_parms),
            );
            raw::vmbus_helper_set_node(dev, cpu::node(channel.target_cpu()));
            to_result(raw::vmbus_helper_set_dev_name(dev, name.as_char_ptr()))
                .and_then(|()| to_result(bindings::device_add(dev)))
        };
        if let Err(error) = result {
            // SAFETY: This drops the reference of `device_initialize`; `release` frees the memory.
            unsafe { bindings::put_device(dev) };
            return Err(error);
        }

        // INVARIANT: The device was registered just now.
        let this = Self {
            // SAFETY: `KBox::into_raw` never returns null.
            raw: unsafe { NonNull::new_unchecked(raw) },
        };
        // SAFETY: `dev` is a valid device, to which `this` holds a reference.
        channel.make_directories(Some(unsafe { device::Device::from_raw(dev) }));
        Ok(this)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let raw = self.raw.as_ptr();

        // SAFETY: By the type invariants the device exists.
        let channel = unsafe { &(*raw).channel }.clone();
        channel.remove_directories();

        // SAFETY: By the type invariants the device is registered; this also drops the reference.
        unsafe { bindings::device_unregister(addr_of_mut!((*raw).dev)) };
    }
}

/// The directory `channels` of a device.
///
/// # Invariants
///
/// The pointer is to a registered `struct kset` that belongs to this value.
pub(crate) struct ChannelsDirectory(NonNull<bindings::kset>);

// SAFETY: ksets can be used from any thread.
unsafe impl Send for ChannelsDirectory {}

// SAFETY: ksets have a lock of their own.
unsafe impl Sync for ChannelsDirectory {}

impl ChannelsDirectory {
    pub(crate) fn new(device: &device::Device) -> Result<Self> {
        // CAST: `device::Device` is a transparent wrapper of `struct device`.
        let dev: *mut bindings::device = core::ptr::from_ref(device).cast_mut().cast();

        // SAFETY: `dev` is a valid device, so its `kobj` can be a parent. This fails if it is not
        // registered.
        let kset = unsafe {
            bindings::kset_create_and_add(
                c"channels".as_char_ptr(),
                core::ptr::null(),
                addr_of_mut!((*dev).kobj),
            )
        };

        // INVARIANT: The kset was made just now.
        Ok(Self(NonNull::new(kset).ok_or(ENOMEM)?))
    }
}

impl Drop for ChannelsDirectory {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the kset is ours.
        unsafe { bindings::kset_unregister(self.0.as_ptr()) };
    }
}

/// What is allocated for the directory of a channel.
#[repr(C)]
pub(crate) struct RawDirectory {
    kobj: bindings::kobject,
    channel: Arc<Channel>,
}

/// The directory of one channel.
///
/// # Invariants
///
/// The pointer is to an initialized `RawDirectory`, to which this value holds a reference.
pub(crate) struct ChannelDirectory(NonNull<RawDirectory>);

// SAFETY: kobjects can be used from any thread.
unsafe impl Send for ChannelDirectory {}

// SAFETY: There is nothing to do with a shared reference.
unsafe impl Sync for ChannelDirectory {}

impl ChannelDirectory {
    pub(crate) fn new(parent: &ChannelsDirectory, channel: &Arc<Channel>) -> Result<Self> {
        let raw = KBox::into_raw(KBox::new(
            RawDirectory {
                kobj: bindings::kobject::default(),
                channel: channel.clone(),
            },
            GFP_KERNEL,
        )?);

        // SAFETY: `raw` was allocated just now and is used by nobody else; the kobject is zeroed.
        // After `kobject_init_and_add` it belongs to its reference count, and `release_directory`
        // frees it.
        let kobj = unsafe { addr_of_mut!((*raw).kobj) };

        // SAFETY: As above; the format takes one unsigned integer.
        let result = to_result(unsafe {
            (*kobj).kset = parent.0.as_ptr();
            bindings::kobject_init_and_add(
                kobj,
                attributes::CHANNEL_TYPE.as_ptr(),
                core::ptr::null_mut(),
                c"%u".as_char_ptr(),
                channel.id().get(),
            )
        });
        if let Err(error) = result {
            // SAFETY: This drops the first reference; `release_directory` frees the memory.
            unsafe { bindings::kobject_put(kobj) };
            return Err(error);
        }

        // SAFETY: `kobj` is registered.
        unsafe { bindings::kobject_uevent(kobj, bindings::kobject_action_KOBJ_ADD) };

        // INVARIANT: The first reference is this value's.
        // SAFETY: `KBox::into_raw` never returns null.
        Ok(Self(unsafe { NonNull::new_unchecked(raw) }))
    }
}

impl Drop for ChannelDirectory {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the kobject is valid and this value holds a reference.
        unsafe {
            let kobj = addr_of_mut!((*self.0.as_ptr()).kobj);
            bindings::kobject_del(kobj);
            bindings::kobject_put(kobj);
        }
    }
}

/// The channel of a directory.
///
/// # Safety
///
/// `kobj` must be the kobject of a [`ChannelDirectory`], and must stay so for `'a`.
pub(crate) unsafe fn channel_of_directory<'a>(kobj: *mut bindings::kobject) -> &'a Arc<Channel> {
    // SAFETY: By the safety requirements `kobj` is in a `RawDirectory`.
    let raw = unsafe { container_of!(kobj, RawDirectory, kobj) };

    // SAFETY: `channel` never changes while the directory exists.
    unsafe { &(*raw).channel }
}

/// Frees the memory of a directory when its last user is gone.
pub(crate) extern "C" fn release_directory(kobj: *mut bindings::kobject) {
    // SAFETY: This is called for kobjects of `ChannelDirectory` only.
    let raw = unsafe { container_of!(kobj, RawDirectory, kobj) };

    // SAFETY: The memory comes from `KBox::into_raw`, and the last reference is gone.
    drop(unsafe { KBox::from_raw(raw) });
}
