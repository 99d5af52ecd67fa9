// SPDX-License-Identifier: GPL-2.0

//! Files in sysfs, of devices and of channels, whose contents safe code provides.
//!
//! A file is a value of an enum; a list of such values and their names becomes the C tables.
//!
//! C header: [`include/linux/sysfs.h`](srctree/include/linux/sysfs.h)

use crate::{
    channel::Channel,
    device, //
};
use core::{
    fmt,
    marker::PhantomData, //
};
use kernel::{
    bindings,
    container_of,
    error::{
        from_result,
        Error, //
    },
    page::PAGE_SIZE,
    prelude::*,
    str::as_char_ptr_in_const_context,
    sync::Arc, //
};

/// The contents of a file, as they are written. What does not fit is left out, and with it the rest of
/// its line: who reads the file gets whole lines only.
pub(crate) struct Contents<'a> {
    buf: &'a mut [u8],
    len: usize,
    /// Where the last whole line ends.
    line: usize,
    full: bool,
}

impl<'a> Contents<'a> {
    fn new(buf: &'a mut [u8]) -> Self {
        Self {
            buf,
            len: 0,
            line: 0,
            full: false,
        }
    }

    /// How much there is for the reader.
    fn len(&self) -> usize {
        if self.full {
            self.line
        } else {
            self.len
        }
    }
}

impl fmt::Write for Contents<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let bytes = text.as_bytes();
        let rest = self.buf.get_mut(self.len..);
        match rest.and_then(|rest| rest.get_mut(..bytes.len())) {
            Some(room) if !self.full => {
                room.copy_from_slice(bytes);
                if let Some(at) = bytes.iter().rposition(|&byte| byte == b'\n') {
                    self.line = self.len.saturating_add(at).saturating_add(1);
                }
                self.len = self.len.saturating_add(bytes.len());
            }
            _ => self.full = true,
        }
        Ok(())
    }
}

/// Name and permissions of a file.
const fn attribute(name: &'static CStr, mode: u16) -> bindings::attribute {
    let mut attribute: bindings::attribute = pin_init::zeroed();
    attribute.name = as_char_ptr_in_const_context(name);
    attribute.mode = mode;
    attribute
}

/// Files of the devices of the bus.
pub(crate) trait DeviceFiles: Copy + 'static {
    /// Writes the contents for the device with this primary channel.
    fn show(self, channel: &Arc<Channel>, out: &mut Contents<'_>) -> Result;

    /// Whether the device with this primary channel has the file.
    fn is_visible(self, channel: &Channel) -> bool;
}

/// One file of a device.
#[repr(C)]
pub(crate) struct DeviceFile<F> {
    raw: bindings::device_attribute,
    file: F,
}

impl<F: DeviceFiles> DeviceFile<F> {
    pub(crate) const fn new(name: &'static CStr, file: F) -> Self {
        let mut raw: bindings::device_attribute = pin_init::zeroed();
        raw.attr = attribute(name, 0o444);
        raw.__bindgen_anon_1.show_const = Some(show_device_file::<F>);
        Self { raw, file }
    }
}

extern "C" fn show_device_file<F: DeviceFiles>(
    dev: *mut bindings::device,
    attr: *const bindings::device_attribute,
    buf: *mut c_char,
) -> isize {
    // SAFETY: Only `DeviceFile::new` sets this callback, so `attr` is in a `DeviceFile<F>`.
    let file = unsafe { (*container_of!(attr, DeviceFile<F>, raw)).file };
    // SAFETY: Such files are those of devices of the bus, and sysfs keeps the device meanwhile.
    let channel = unsafe { device::channel_of(dev) };
    // SAFETY: The buffer is that of sysfs.
    unsafe { show(buf, |out| file.show(channel, out)) }
}

/// Calls `f` with the buffer of a sysfs read, and returns what sysfs wants to know.
///
/// # Safety
///
/// `buf` must be the buffer that sysfs passes: one page, zeroed, and used by nobody else.
unsafe fn show(buf: *mut c_char, f: impl FnOnce(&mut Contents<'_>) -> Result) -> isize {
    // SAFETY: By the safety requirements. The last byte stays zero: a full page is a mistake for
    // sysfs.
    let buf = unsafe { core::slice::from_raw_parts_mut(buf.cast::<u8>(), PAGE_SIZE - 1) };
    let mut out = Contents::new(buf);
    from_result(|| {
        f(&mut out)?;
        isize::try_from(out.len()).map_err(Error::from)
    })
}

/// Files of the devices of the bus, as C wants them: a list that ends with null.
#[repr(transparent)]
pub(crate) struct DeviceFileList<F, const N: usize>(
    [*const bindings::attribute; N],
    PhantomData<F>,
);

// SAFETY: The pointers are to statics that do not change.
unsafe impl<F: Sync, const N: usize> Sync for DeviceFileList<F, N> {}

// SAFETY: `bindings::device_attribute` is not changed by anyone.
unsafe impl<F: Sync> Sync for DeviceFile<F> {}

impl<F: DeviceFiles, const N: usize> DeviceFileList<F, N> {
    /// `N` must be one more than the number of `files`.
    pub(crate) const fn new(files: &'static [DeviceFile<F>]) -> Self {
        assert!(files.len() < N);
        let mut list = [core::ptr::null(); N];
        let mut i = 0;
        while i < files.len() {
            list[i] = &raw const files[i].raw.attr;
            i += 1;
        }
        Self(list, PhantomData)
    }

    /// The group of these files.
    pub(crate) const fn group(&'static self) -> Group {
        let mut group: bindings::attribute_group = pin_init::zeroed();
        group.__bindgen_anon_1.is_visible_const = Some(device_file_is_visible::<F>);
        group.__bindgen_anon_2.attrs_const = (&raw const self.0).cast();
        Group(group)
    }
}

extern "C" fn device_file_is_visible<F: DeviceFiles>(
    kobj: *mut bindings::kobject,
    attr: *const bindings::attribute,
    _index: c_int,
) -> bindings::umode_t {
    // SAFETY: Only lists of `DeviceFile<F>` have this callback, so `attr` is in a
    // `struct device_attribute`, and that in a `DeviceFile<F>`.
    let file = unsafe {
        let attr = container_of!(attr, bindings::device_attribute, attr);
        (*container_of!(attr, DeviceFile<F>, raw)).file
    };
    // SAFETY: Such files are those of devices of the bus, so `kobj` is in a `struct device` there,
    // which is valid while its files are made.
    let channel = unsafe { device::channel_of(container_of!(kobj, bindings::device, kobj)) };
    if file.is_visible(channel) {
        // SAFETY: `attr` is valid.
        unsafe { (*attr).mode }
    } else {
        0
    }
}

/// A group of files.
#[repr(transparent)]
pub(crate) struct Group(bindings::attribute_group);

// SAFETY: Nobody changes a group.
unsafe impl Sync for Group {}

/// A list of one group that ends with null.
#[repr(transparent)]
pub(crate) struct GroupList([*const bindings::attribute_group; 2]);

// SAFETY: The pointers are to statics that do not change.
unsafe impl Sync for GroupList {}

impl GroupList {
    pub(crate) const fn new(group: &'static Group) -> Self {
        Self([&raw const group.0, core::ptr::null()])
    }

    pub(crate) const fn as_ptr(&'static self) -> *const *const bindings::attribute_group {
        (&raw const self.0).cast()
    }
}

/// Files of the directory of a channel.
pub(crate) trait ChannelFiles: Copy + 'static {
    /// Writes the contents for a channel.
    fn show(self, channel: &Arc<Channel>, out: &mut Contents<'_>) -> Result;

    /// Takes what was written to the file.
    fn store(self, channel: &Arc<Channel>, text: &[u8]) -> Result;

    /// Whether a channel has the file.
    fn is_visible(self, channel: &Channel) -> bool;
}

/// One file of a channel.
#[repr(C)]
pub(crate) struct ChannelFile<F> {
    raw: bindings::attribute,
    file: F,
}

// SAFETY: Nobody changes a file.
unsafe impl<F: Sync> Sync for ChannelFile<F> {}

impl<F: ChannelFiles> ChannelFile<F> {
    pub(crate) const fn new(name: &'static CStr, mode: u16, file: F) -> Self {
        Self {
            raw: attribute(name, mode),
            file,
        }
    }
}

extern "C" fn show_channel_file<F: ChannelFiles>(
    kobj: *mut bindings::kobject,
    attr: *mut bindings::attribute,
    buf: *mut c_char,
) -> isize {
    // SAFETY: Kobjects with these operations have files of `ChannelFile<F>` only.
    let file = unsafe { (*container_of!(attr, ChannelFile<F>, raw)).file };
    // SAFETY: Such files are those of channels, and sysfs keeps the kobject meanwhile.
    let channel = unsafe { device::channel_of_directory(kobj) };
    // SAFETY: The buffer is that of sysfs.
    unsafe { show(buf, |out| file.show(channel, out)) }
}

extern "C" fn store_channel_file<F: ChannelFiles>(
    kobj: *mut bindings::kobject,
    attr: *mut bindings::attribute,
    buf: *const c_char,
    len: usize,
) -> isize {
    // SAFETY: Kobjects with these operations have files of `ChannelFile<F>` only.
    let file = unsafe { (*container_of!(attr, ChannelFile<F>, raw)).file };
    // SAFETY: sysfs passes a buffer of that length.
    let text = unsafe { core::slice::from_raw_parts(buf.cast::<u8>(), len) };

    // SAFETY: Such files are those of channels, and sysfs keeps the kobject meanwhile.
    let channel = unsafe { device::channel_of_directory(kobj) };
    from_result(|| {
        file.store(channel, text)?;
        isize::try_from(len).map_err(Error::from)
    })
}

extern "C" fn channel_file_is_visible<F: ChannelFiles>(
    kobj: *mut bindings::kobject,
    attr: *const bindings::attribute,
    _index: c_int,
) -> bindings::umode_t {
    // SAFETY: Only lists of `ChannelFile<F>` have this callback.
    let file = unsafe { (*container_of!(attr, ChannelFile<F>, raw)).file };

    // SAFETY: Such files are those of channels, and the kobject is valid while they are made.
    let channel = unsafe { device::channel_of_directory(kobj) };
    if file.is_visible(channel) {
        // SAFETY: `attr` is valid.
        unsafe { (*attr).mode }
    } else {
        0
    }
}

/// Files of a channel, as C wants them: a list that ends with null.
#[repr(transparent)]
pub(crate) struct ChannelFileList<F, const N: usize>(
    [*const bindings::attribute; N],
    PhantomData<F>,
);

// SAFETY: The pointers are to statics that do not change.
unsafe impl<F: Sync, const N: usize> Sync for ChannelFileList<F, N> {}

impl<F: ChannelFiles, const N: usize> ChannelFileList<F, N> {
    /// `N` must be one more than the number of `files`.
    pub(crate) const fn new(files: &'static [ChannelFile<F>]) -> Self {
        assert!(files.len() < N);
        let mut list = [core::ptr::null(); N];
        let mut i = 0;
        while i < files.len() {
            list[i] = &raw const files[i].raw;
            i += 1;
        }
        Self(list, PhantomData)
    }

    /// The group of these files.
    pub(crate) const fn group(&'static self) -> Group {
        let mut group: bindings::attribute_group = pin_init::zeroed();
        group.__bindgen_anon_1.is_visible_const = Some(channel_file_is_visible::<F>);
        group.__bindgen_anon_2.attrs_const = (&raw const self.0).cast();
        Group(group)
    }
}

/// The type of the kobjects of channels.
#[repr(transparent)]
pub(crate) struct ChannelType(bindings::kobj_type);

// SAFETY: Nobody changes a type.
unsafe impl Sync for ChannelType {}

/// The operations of such files.
#[repr(transparent)]
pub(crate) struct ChannelOps(bindings::sysfs_ops);

// SAFETY: Nobody changes the operations.
unsafe impl Sync for ChannelOps {}

impl ChannelOps {
    pub(crate) const fn new<F: ChannelFiles>() -> Self {
        Self(bindings::sysfs_ops {
            show: Some(show_channel_file::<F>),
            store: Some(store_channel_file::<F>),
        })
    }
}

impl ChannelType {
    pub(crate) const fn new(ops: &'static ChannelOps, groups: &'static GroupList) -> Self {
        let mut object: bindings::kobj_type = pin_init::zeroed();
        object.release = Some(device::release_directory);
        object.sysfs_ops = &raw const ops.0;
        object.default_groups = groups.as_ptr().cast_mut();
        Self(object)
    }

    pub(crate) const fn as_ptr(&'static self) -> *const bindings::kobj_type {
        &raw const self.0
    }
}
