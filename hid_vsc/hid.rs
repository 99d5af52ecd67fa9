// SPDX-License-Identifier: GPL-2.0

//! HID devices that a driver has the reports of, and a driver for them.
//!
//! Only devices that send input reports and take nothing are needed here.
//!
//! C header: [`include/linux/hid.h`](srctree/include/linux/hid.h)

use crate::raw;
use core::ptr::NonNull;
use kernel::{
    bindings,
    device,
    error::{
        from_err_ptr,
        to_result, //
    },
    ffi,
    new_spinlock_irq,
    prelude::*,
    sync::SpinLockIrq,
    types::Opaque, //
};

/// Length of the longest report that the kernel takes, in bytes.
const MAX_REPORT: usize = raw::HID_MAX_BUFFER_SIZE as usize;

/// Which device it is.
#[derive(Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) product: u16,
    pub(crate) version: u16,
}

/// What is allocated for a device.
#[pin_data]
pub(crate) struct Inner {
    report_descriptor: KVVec<u8>,
    /// Where reports are copied to: the kernel changes what it is given.
    #[pin]
    report: SpinLockIrq<KVVec<u8>>,
}

/// A HID device that is registered. Dropping it removes it.
///
/// # Invariants
///
/// `hid` is a device that was made here and is registered; its `driver_data` is `inner`.
pub(crate) struct Registration {
    hid: NonNull<raw::hid_device>,
    inner: Pin<KBox<Inner>>,
}

// SAFETY: HID devices can be used and removed by any task.
unsafe impl Send for Registration {}

// SAFETY: Reports can be handed in from several CPUs at once.
unsafe impl Sync for Registration {}

/// The device's own functions. There is nothing to be done to start or to stop it.
static LL_DRIVER: raw::hid_ll_driver = raw::hid_ll_driver {
    start: Some(nothing),
    stop: Some(nothing_ends),
    open: Some(nothing),
    close: Some(nothing_ends),
    parse: Some(parse),
    raw_request: Some(raw_request),
    ..pin_init::zeroed()
};

extern "C" fn nothing(_hid: *mut raw::hid_device) -> ffi::c_int {
    0
}

extern "C" fn nothing_ends(_hid: *mut raw::hid_device) {}

/// # Safety
///
/// `hid` must be a device of a [`Registration`].
unsafe extern "C" fn parse(hid: *mut raw::hid_device) -> ffi::c_int {
    // SAFETY: `driver_data` of all devices with these functions is an `Inner` that outlives them.
    let inner = unsafe { &*(*hid).driver_data.cast::<Inner>() };
    let descriptor = &inner.report_descriptor;
    let Ok(len) = ffi::c_uint::try_from(descriptor.len()) else {
        return EINVAL.to_errno();
    };

    // SAFETY: `hid` is valid; the descriptor is valid for reads of its length, and is copied.
    unsafe { raw::hid_parse_report(hid, descriptor.as_ptr(), len) }
}

/// Programs may ask for anything, but the device takes nothing.
extern "C" fn raw_request(
    _hid: *mut raw::hid_device,
    _report: ffi::c_uchar,
    _buf: *mut u8,
    _len: usize,
    _report_type: ffi::c_uchar,
    _request_type: ffi::c_int,
) -> ffi::c_int {
    EOPNOTSUPP.to_errno()
}

impl Registration {
    /// Makes a device known. May sleep. The report descriptor need not be a proper one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or what the kernel's parser says of the report descriptor.
    pub(crate) fn new(
        parent: &device::Device<device::Bound>,
        name: &CStr,
        identity: Identity,
        report_descriptor: KVVec<u8>,
    ) -> Result<Self> {
        let mut report = KVVec::new();
        report.resize(MAX_REPORT, 0, GFP_KERNEL)?;
        let inner = KBox::pin_init(
            pin_init!(Inner {
                report_descriptor,
                report <- new_spinlock_irq!(report),
            }),
            GFP_KERNEL,
        )?;

        // SAFETY: Can always be called; the result is an error pointer or a device of ours.
        let hid = from_err_ptr(unsafe { raw::hid_allocate_device() })?;
        let hid = NonNull::new(hid).ok_or(ENOMEM)?;

        // SAFETY: Nobody else knows the device yet. `inner` and the parent outlive it.
        let hid_ref = unsafe { &mut *hid.as_ptr() };
        hid_ref.ll_driver = &raw const LL_DRIVER;
        hid_ref.bus = raw::BUS_VIRTUAL as u16;
        hid_ref.vendor = identity.vendor.into();
        hid_ref.product = identity.product.into();
        hid_ref.version = identity.version.into();
        // CAST: `device::Device` is a transparent wrapper of `struct device`.
        hid_ref.dev.parent = core::ptr::from_ref(parent).cast_mut().cast();
        hid_ref.driver_data = core::ptr::from_ref(&*inner).cast_mut().cast();
        // The last byte stays zero.
        let room = hid_ref.name.len().saturating_sub(1);
        for (to, from) in hid_ref.name.iter_mut().take(room).zip(name.to_bytes()) {
            *to = *from as ffi::c_char;
        }

        // INVARIANT: The device will be registered, or `this` is dropped, which removes what there
        // is of it.
        let this = Self { hid, inner };
        // SAFETY: The device is set up.
        to_result(unsafe { raw::hid_add_device(hid.as_ptr()) })?;
        Ok(this)
    }

    /// The device has sent a report. Any context. One that is too long is an error of the sender,
    /// and is dropped.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` for such a report, or what the kernel says of it.
    pub(crate) fn report(&self, report: &[u8]) -> Result {
        let mut buffer = self.inner.report.lock();
        let size = buffer.len();
        let to = buffer.get_mut(..report.len()).ok_or(EMSGSIZE)?;
        to.copy_from_slice(report);

        // SAFETY: The device is registered; the buffer is valid for reads and writes of its size.
        to_result(unsafe {
            raw::hid_safe_input_report(
                self.hid.as_ptr(),
                raw::hid_report_type_HID_INPUT_REPORT,
                buffer.as_mut_ptr(),
                size,
                // CAST: Not longer than the buffer.
                report.len() as u32,
                1,
            )
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the device is ours. Nobody uses `inner` after this.
        unsafe { raw::hid_destroy_device(self.hid.as_ptr()) };
    }
}

/// Devices that a [`DriverRegistration`] is for, ended by zero.
pub(crate) type IdTable = [raw::hid_device_id; 2];

/// A table of one device.
pub(crate) const fn id_table(vendor: u16, product: u16) -> IdTable {
    [
        raw::hid_device_id {
            bus: raw::BUS_VIRTUAL as u16,
            vendor: vendor as u32,
            product: product as u32,
            ..pin_init::zeroed()
        },
        pin_init::zeroed(),
    ]
}

/// # Safety
///
/// `hid` must be a valid device that is being bound to a driver.
unsafe extern "C" fn probe(
    hid: *mut raw::hid_device,
    _id: *const raw::hid_device_id,
) -> ffi::c_int {
    // SAFETY: The HID core calls this with a valid device.
    let result = unsafe { raw::hid_open_report(hid) };
    if result != 0 {
        return result;
    }

    // SAFETY: As above; the reports were parsed.
    unsafe { raw::hid_hw_start(hid, raw::hid_vsc_helper_connect_mask()) }
}

/// A driver that makes input devices of HID devices, while this value exists. It needs no other
/// driver, so that the devices work before programs can load one.
#[pin_data(PinnedDrop)]
pub(crate) struct DriverRegistration {
    #[pin]
    driver: Opaque<raw::hid_driver>,
}

// SAFETY: The driver can be unregistered by any task.
unsafe impl Send for DriverRegistration {}

// SAFETY: There is nothing to do with a shared reference.
unsafe impl Sync for DriverRegistration {}

impl DriverRegistration {
    /// Registers a driver for the devices of `table`.
    pub(crate) fn new(
        name: &'static CStr,
        module: &'static ThisModule,
        table: &'static IdTable,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            driver <- Opaque::try_ffi_init(move |slot: *mut raw::hid_driver| {
                // SAFETY: `slot` is valid for writes and stays where it is. The names and the table
                // are static.
                unsafe {
                    slot.write(raw::hid_driver {
                        name: name.as_char_ptr(),
                        id_table: table.as_ptr(),
                        probe: Some(probe),
                        ..pin_init::zeroed()
                    });
                    let module: *mut bindings::module = module.as_ptr();
                    to_result(raw::__hid_register_driver(slot, module, name.as_char_ptr()))
                }
            }),
        })
    }
}

#[pinned_drop]
impl PinnedDrop for DriverRegistration {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: The driver is registered.
        unsafe { raw::hid_unregister_driver(self.driver.get()) };
    }
}
