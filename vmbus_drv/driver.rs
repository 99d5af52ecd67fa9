// SPDX-License-Identifier: GPL-2.0

//! Drivers of devices on the bus.
//!
//! The shape is that of the kernel's own bus abstractions, see
//! [`kernel::driver`]; [`auxiliary`](kernel::auxiliary) is the shortest of them.
//!
//! # Examples
//!
//! ```ignore
//! struct Heartbeat;
//!
//! vmbus::device_table!(
//!     TABLE,
//!     <Heartbeat as vmbus::Driver>::IdInfo,
//!     [(vmbus::DeviceId::new(hv_proto::guid::HEARTBEAT), ())]
//! );
//!
//! impl vmbus::Driver for Heartbeat {
//!     type IdInfo = ();
//!     type Data<'bound> = Data;
//!     const ID_TABLE: vmbus::IdTable<Self::IdInfo> = &TABLE;
//!
//!     fn probe<'bound>(
//!         dev: &'bound vmbus::Device<Core<'_>>,
//!         _info: &'bound Self::IdInfo,
//!     ) -> impl PinInit<Data, Error> + 'bound {
//!         // Opens `dev.channel()`.
//!     }
//! }
//!
//! vmbus::module_vmbus_driver! {
//!     type: Heartbeat,
//!     name: "heartbeat",
//!     authors: ["…"],
//!     description: "Hyper-V heartbeat",
//!     license: "GPL",
//! }
//! ```

use crate::{
    bus::{
        self,
        RawDriver, //
    },
    device::{
        Device,
        RawDevice, //
    },
    raw, //
};
use core::mem::offset_of;
use hv_proto::guid::Guid;
use kernel::{
    device,
    device_id::{
        RawDeviceId,
        RawDeviceIdIndex, //
    },
    driver,
    error::from_result,
    prelude::*,
    types::Opaque, //
};

/// A class of devices that a driver is for.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct DeviceId(raw::hv_vmbus_device_id);

impl DeviceId {
    /// The class with this GUID.
    pub const fn new(class: Guid) -> Self {
        let mut id: raw::hv_vmbus_device_id = pin_init::zeroed();
        id.guid.b = *class.as_bytes();
        Self(id)
    }
}

// SAFETY: `DeviceId` is a transparent wrapper of `hv_vmbus_device_id` without further invariants.
unsafe impl RawDeviceId for DeviceId {
    type RawType = raw::hv_vmbus_device_id;
}

// SAFETY: The offset is that of `driver_data`, which has the size of a pointer.
unsafe impl RawDeviceIdIndex for DeviceId {
    const DRIVER_DATA_OFFSET: usize = offset_of!(raw::hv_vmbus_device_id, driver_data);
}

/// The table of classes of a driver.
pub type IdTable<T> = &'static dyn kernel::device_id::IdTable<DeviceId, T>;

/// Makes the table of classes of a driver, with the aliases by which `modprobe` finds the module.
#[macro_export]
macro_rules! device_table {
    ($($tt:tt)*) => {
        ::kernel::module_device_table!("vmbus", $crate::DeviceId, $($tt)*);
    };
}

/// A driver of devices on the bus.
pub trait Driver {
    /// What the driver wants to know of each entry of its table.
    type IdInfo: 'static;

    /// The driver's data for a device.
    type Data<'bound>: Send + 'bound;

    /// The classes that the driver is for.
    const ID_TABLE: IdTable<Self::IdInfo>;

    /// A device has come.
    ///
    /// Runs in a thread of its own, side by side with the probes of other devices, and may sleep.
    /// `info` is that of the table's entry; when an administrator bound the device to the driver
    /// without that, of the first entry.
    fn probe<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        info: &'bound Self::IdInfo,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound;

    /// The device goes, or the driver does. `this` is dropped after that.
    ///
    /// May sleep. If the host has rescinded the device, the handlers of its channels have been told
    /// before.
    fn unbind<'bound>(dev: &'bound Device<device::Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
    }
}

/// Between the callbacks of the bus and a [`Driver`].
pub struct Adapter<T: Driver>(T);

// SAFETY:
// - `RawDriver` is `repr(C)`,
// - `T::Data` is the type of the driver's device private data,
// - `RawDriver` embeds a `struct device_driver` at that offset.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = RawDriver;
    type DriverData<'bound> = T::Data<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = offset_of!(RawDriver, driver);
}

// SAFETY: A call to `unregister` is valid if a preceding call to `register` has been successful.
unsafe impl<T: Driver> driver::RegistrationOps for Adapter<T> {
    unsafe fn register(
        driver: &Opaque<RawDriver>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        // SAFETY: The safety requirements of this function are those of `bus::register`; the
        // callbacks and the table are both those of `T`.
        unsafe {
            bus::register(
                driver,
                name,
                module,
                T::ID_TABLE.as_ptr(),
                Self::probe_callback,
                Self::remove_callback,
            )
        }
    }

    unsafe fn unregister(driver: &Opaque<RawDriver>) {
        // SAFETY: The driver was registered.
        unsafe { bus::unregister(driver) };
    }
}

impl<T: Driver> Adapter<T> {
    /// # Safety
    ///
    /// `dev` must be a valid device of the bus, and `id` an entry of `T::ID_TABLE`.
    unsafe fn probe_callback(dev: *mut RawDevice, id: *const raw::hv_vmbus_device_id) -> c_int {
        // SAFETY: The bus calls this with a valid device.
        //
        // INVARIANT: `dev` is valid for the duration of the callback.
        let dev = unsafe { &*dev.cast::<Device<device::CoreInternal<'_>>>() };

        // SAFETY: `DeviceId` is a transparent wrapper; the bus passes an entry of `T::ID_TABLE`.
        let info = unsafe { (*id.cast::<DeviceId>()).info_unchecked::<T::IdInfo>() };

        from_result(|| {
            let data = T::probe(dev, info);

            dev.as_ref().set_drvdata(data)?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// `dev` must be a device of the bus for which `probe_callback` has succeeded.
    unsafe fn remove_callback(dev: *mut RawDevice) {
        // SAFETY: The bus calls this with a valid device.
        //
        // INVARIANT: `dev` is valid for the duration of the callback.
        let dev = unsafe { &*dev.cast::<Device<device::CoreInternal<'_>>>() };

        // SAFETY: The bus calls this after a successful `probe_callback` only, which has set the
        // data to a `Pin<KBox<T::Data<'_>>>`.
        let data = unsafe { dev.as_ref().drvdata_borrow::<T::Data<'_>>() };

        T::unbind(dev, data);
    }
}

/// Declares a kernel module that is one driver of devices on the bus.
#[macro_export]
macro_rules! module_vmbus_driver {
    ($($f:tt)*) => {
        ::kernel::module_driver!(<T>, $crate::Adapter<T>, { $($f)* });
    };
}
