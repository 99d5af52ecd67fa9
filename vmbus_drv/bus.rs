// SPDX-License-Identifier: GPL-2.0

//! The bus type: which driver gets which device.
//!
//! A device belongs to the drivers that have its class in their table, to those that were given the
//! class by `new_id`, or only to the one that its `driver_override` names.
//!
//! C header: [`include/linux/device/bus.h`](srctree/include/linux/device/bus.h)

use crate::{
    attributes,
    device::{
        self,
        RawDevice, //
    },
    raw, //
};
use core::ptr::addr_of_mut;
use hv_proto::guid::Guid;
use kernel::{
    bindings,
    container_of,
    error::{
        from_result,
        to_result, //
    },
    new_mutex,
    prelude::*,
    str::{
        as_char_ptr_in_const_context,
        NullTerminatedFormatter, //
    },
    sync::Mutex,
    types::Opaque, //
};

/// Classes that an administrator gave to a driver (`new_id`).
type DynamicIds = Mutex<KVec<Guid>>;

/// What a driver of this bus is for the bus. Part of the API for macros only.
#[doc(hidden)]
///
/// # Invariants
///
/// `id_table` is null, or a table that ends with an id of zeroes.
#[repr(C)]
pub struct RawDriver {
    pub(crate) driver: bindings::device_driver,
    id_table: *const raw::hv_vmbus_device_id,
    probe: Option<ProbeFn>,
    remove: Option<RemoveFn>,
    dynamic_ids: Option<Pin<KBox<DynamicIds>>>,
}

impl Default for RawDriver {
    fn default() -> Self {
        Self {
            driver: bindings::device_driver::default(),
            id_table: core::ptr::null(),
            probe: None,
            remove: None,
            dynamic_ids: None,
        }
    }
}

impl RawDriver {
    /// The table's entries without the last one.
    fn ids(&self) -> impl Iterator<Item = &raw::hv_vmbus_device_id> {
        let mut next = self.id_table;
        core::iter::from_fn(move || {
            // SAFETY: By the type invariants the table ends with an entry of zeroes, and the
            // iteration never steps over that one.
            let id = unsafe { next.as_ref() }?;
            if id.guid.b == [0; 16] {
                return None;
            }
            // SAFETY: This entry is not the last one.
            next = unsafe { next.add(1) };
            Some(id)
        })
    }

    /// The table's entry that fits a device; the first one if an administrator says that the driver
    /// fits.
    ///
    /// # Safety
    ///
    /// `dev` must be a valid device of this bus.
    unsafe fn find(&self, dev: *mut bindings::device) -> Option<&raw::hv_vmbus_device_id> {
        // SAFETY: By the safety requirements; `self.driver` is registered or about to be.
        let (forced, class) = unsafe {
            let forced = raw::vmbus_helper_dev_match_override(dev, &raw const self.driver);
            (forced, device::channel_of(dev).offer().interface_id)
        };
        if forced == 0 {
            return None;
        }
        let listed = self.ids().find(|id| id.guid.b == *class.as_bytes());
        if listed.is_some() || (forced < 0 && !self.has_dynamic_id(&class)) {
            return listed;
        }
        self.ids().next()
    }

    fn has_dynamic_id(&self, class: &Guid) -> bool {
        self.dynamic_ids
            .as_ref()
            .is_some_and(|ids| ids.lock().contains(class))
    }

    /// The driver of the bus in which `driver` is.
    ///
    /// # Safety
    ///
    /// `driver` must be a registered driver of this bus, and must stay so for `'a`.
    unsafe fn from_driver<'a>(driver: *const bindings::device_driver) -> &'a Self {
        // SAFETY: All drivers of this bus come from `register`.
        unsafe { &*container_of!(driver, RawDriver, driver) }
    }
}

/// Calls the driver's probe with an entry of its table.
pub(crate) type ProbeFn = unsafe fn(*mut RawDevice, *const raw::hv_vmbus_device_id) -> c_int;

/// Calls the driver's unbind.
pub(crate) type RemoveFn = unsafe fn(*mut RawDevice);

/// Registers a driver.
///
/// # Safety
///
/// `driver` must not move until [`unregister`] was called for it. `id_table` must be of an
/// `IdArray` that lives as long, with the information that `probe` expects.
pub(crate) unsafe fn register(
    driver: &Opaque<RawDriver>,
    name: &'static CStr,
    owner: &'static ThisModule,
    id_table: *const raw::hv_vmbus_device_id,
    probe: ProbeFn,
    remove: RemoveFn,
) -> Result {
    let ids = KBox::pin_init(new_mutex!(KVec::new()), GFP_KERNEL)?;
    let driver = driver.get();

    // SAFETY: `driver` is valid, and nobody else uses it yet.
    let result = to_result(unsafe {
        (*driver).id_table = id_table;
        (*driver).probe = Some(probe);
        (*driver).remove = Some(remove);
        (*driver).dynamic_ids = Some(ids);
        let driver = addr_of_mut!((*driver).driver);
        (*driver).name = name.as_char_ptr();
        (*driver).owner = owner.as_ptr();
        (*driver).bus = raw();
        (*driver).probe_type = bindings::probe_type_PROBE_PREFER_ASYNCHRONOUS;
        bindings::driver_register(driver)
    });
    if result.is_err() {
        // SAFETY: Nobody uses it any more, and nobody will drop it.
        drop(unsafe { (*driver).dynamic_ids.take() });
    }
    result
}

/// Unregisters a driver. Its devices are unbound first.
///
/// # Safety
///
/// `driver` must have been registered with [`register`].
pub(crate) unsafe fn unregister(driver: &Opaque<RawDriver>) {
    let driver = driver.get();

    // SAFETY: By the safety requirements the driver is registered.
    unsafe { bindings::driver_unregister(addr_of_mut!((*driver).driver)) };

    // SAFETY: Nobody uses it any more.
    drop(unsafe { (*driver).dynamic_ids.take() });
}

extern "C" fn match_device(
    dev: *mut bindings::device,
    driver: *const bindings::device_driver,
) -> c_int {
    // SAFETY: The driver core asks for devices and drivers of this bus.
    unsafe { RawDriver::from_driver(driver).find(dev) }
        .is_some()
        .into()
}

extern "C" fn probe(dev: *mut bindings::device) -> c_int {
    // SAFETY: The driver core calls this for a device of this bus that has its driver set.
    let (driver, channel) = unsafe {
        (
            RawDriver::from_driver((*dev).driver),
            device::channel_of(dev),
        )
    };
    // SAFETY: As above.
    channel.make_directories(Some(unsafe { kernel::device::Device::from_raw(dev) }));
    // SAFETY: As above.
    let id = unsafe { driver.find(dev) };
    let (Some(id), Some(probe)) = (id, driver.probe) else {
        return ENODEV.to_errno();
    };
    // SAFETY: `dev` is in a `RawDevice`, and `id` is of the driver's own table.
    unsafe { probe(container_of!(dev, RawDevice, dev), id) }
}

extern "C" fn remove(dev: *mut bindings::device) {
    // SAFETY: The driver core calls this for a device of this bus that is bound to its driver.
    let driver = unsafe { RawDriver::from_driver((*dev).driver) };
    if let Some(remove) = driver.remove {
        // SAFETY: `dev` is in a `RawDevice`, and the driver's probe has succeeded.
        unsafe { remove(container_of!(dev, RawDevice, dev)) };
    }
}

extern "C" fn uevent(dev: *const bindings::device, env: *mut bindings::kobj_uevent_env) -> c_int {
    // SAFETY: The driver core calls this for a device of this bus.
    let channel = unsafe { device::channel_of(dev) };
    let mut alias = [0u8; 48];
    from_result(|| {
        let mut out = NullTerminatedFormatter::new(&mut alias).ok_or(EINVAL)?;
        attributes::write_alias(&channel.offer().interface_id, &mut out)?;
        let alias = CStr::from_bytes_until_nul(&alias).map_err(|_| EINVAL)?;

        // SAFETY: `env` is valid during the callback, and `alias` is a C string.
        to_result(unsafe { raw::vmbus_helper_add_modalias(env, alias.as_char_ptr()) })?;
        Ok(0)
    })
}

/// The GUID that an administrator wrote to a file.
///
/// # Safety
///
/// `text` must be valid for reads of `len` bytes.
unsafe fn parse_guid(text: *const c_char, len: usize) -> Result<Guid> {
    // SAFETY: By the safety requirements.
    let text = unsafe { core::slice::from_raw_parts(text.cast::<u8>(), len) };
    let text = core::str::from_utf8(text).map_err(|_| EINVAL)?;
    text.trim().parse().map_err(|_| EINVAL)
}

extern "C" fn store_new_id(
    driver: *mut bindings::device_driver,
    text: *const c_char,
    len: usize,
) -> isize {
    from_result(|| {
        // SAFETY: sysfs passes a buffer of that length.
        let class = unsafe { parse_guid(text, len) }?;
        // SAFETY: This is a file of drivers of this bus, and sysfs keeps the driver meanwhile.
        let raw = unsafe { RawDriver::from_driver(driver) };
        let mut ids = raw.dynamic_ids.as_ref().ok_or(ENODEV)?.lock();
        if ids.contains(&class) {
            return Err(EEXIST);
        }
        ids.push(class, GFP_KERNEL)?;
        drop(ids);

        // SAFETY: The driver is registered.
        to_result(unsafe { bindings::driver_attach(driver) })?;
        isize::try_from(len).map_err(Error::from)
    })
}

extern "C" fn store_remove_id(
    driver: *mut bindings::device_driver,
    text: *const c_char,
    len: usize,
) -> isize {
    from_result(|| {
        // SAFETY: sysfs passes a buffer of that length.
        let class = unsafe { parse_guid(text, len) }?;
        // SAFETY: This is a file of drivers of this bus, and sysfs keeps the driver meanwhile.
        let raw = unsafe { RawDriver::from_driver(driver) };
        let mut ids = raw.dynamic_ids.as_ref().ok_or(ENODEV)?.lock();
        let before = ids.len();
        ids.retain(|id| *id != class);
        if ids.len() == before {
            return Err(ENODEV);
        }
        isize::try_from(len).map_err(Error::from)
    })
}

/// Hibernation is not supported by this driver, whatever the host thinks of it.
extern "C" fn show_hibernation(_bus: *const bindings::bus_type, buf: *mut c_char) -> isize {
    // SAFETY: sysfs passes the buffer; the format has no arguments.
    unsafe { bindings::sysfs_emit(buf, c"0\n".as_char_ptr()) as isize }
}

/// A C structure that nobody changes.
#[repr(transparent)]
struct Static<T>(T);

// SAFETY: Nobody changes it.
unsafe impl<T> Sync for Static<T> {}

type StoreFn = unsafe extern "C" fn(*mut bindings::device_driver, *const c_char, usize) -> isize;

/// A write-only file of a driver.
const fn driver_file(name: &'static CStr, store: StoreFn) -> bindings::driver_attribute {
    let mut file: bindings::driver_attribute = pin_init::zeroed();
    file.attr.name = as_char_ptr_in_const_context(name);
    file.attr.mode = 0o200;
    file.store = Some(store);
    file
}

static NEW_ID: Static<bindings::driver_attribute> = Static(driver_file(c"new_id", store_new_id));
static REMOVE_ID: Static<bindings::driver_attribute> =
    Static(driver_file(c"remove_id", store_remove_id));
static DRIVER_FILES: Static<[*const bindings::attribute; 3]> = Static([
    &raw const NEW_ID.0.attr,
    &raw const REMOVE_ID.0.attr,
    core::ptr::null(),
]);
static HIBERNATION: Static<bindings::bus_attribute> = Static({
    let mut file: bindings::bus_attribute = pin_init::zeroed();
    file.attr.name = as_char_ptr_in_const_context(c"hibernation");
    file.attr.mode = 0o444;
    file.show = Some(show_hibernation);
    file
});
static BUS_FILES: Static<[*const bindings::attribute; 2]> =
    Static([&raw const HIBERNATION.0.attr, core::ptr::null()]);

/// The group of a list of files.
const fn group(files: *const *const bindings::attribute) -> bindings::attribute_group {
    let mut group: bindings::attribute_group = pin_init::zeroed();
    group.__bindgen_anon_2.attrs_const = files;
    group
}

static DRIVER_GROUP: Static<bindings::attribute_group> =
    Static(group((&raw const DRIVER_FILES.0).cast()));
static DRIVER_GROUPS: Static<[*const bindings::attribute_group; 2]> =
    Static([&raw const DRIVER_GROUP.0, core::ptr::null()]);
static BUS_GROUP: Static<bindings::attribute_group> =
    Static(group((&raw const BUS_FILES.0).cast()));
static BUS_GROUPS: Static<[*const bindings::attribute_group; 2]> =
    Static([&raw const BUS_GROUP.0, core::ptr::null()]);

static BUS: Static<bindings::bus_type> = Static({
    let mut bus: bindings::bus_type = pin_init::zeroed();
    bus.name = as_char_ptr_in_const_context(c"vmbus");
    bus.bus_groups = (&raw const BUS_GROUPS.0).cast();
    bus.dev_groups = attributes::DEVICE_GROUPS.as_ptr();
    bus.drv_groups = (&raw const DRIVER_GROUPS.0).cast();
    bus.match_ = Some(match_device);
    bus.probe = Some(probe);
    bus.remove = Some(remove);
    bus.uevent = Some(uevent);
    bus.driver_override = true;
    bus
});

/// The bus type.
pub(crate) fn raw() -> *const bindings::bus_type {
    &raw const BUS.0
}

/// The registration of the bus type.
pub(crate) struct Registration(());

impl Registration {
    /// Registers the bus type. There can be one at a time.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The bus type is a static, and is registered once: modules are initialized once.
        to_result(unsafe { bindings::bus_register(raw()) })?;
        Ok(Self(()))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: `Self::new` registered it.
        unsafe { bindings::bus_unregister(raw()) };
    }
}
