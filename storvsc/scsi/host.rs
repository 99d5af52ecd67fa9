// SPDX-License-Identifier: GPL-2.0

//! SCSI hosts: registration, and the mid-layer's callbacks.
//!
//! C header: [`include/scsi/scsi_host.h`](srctree/include/scsi/scsi_host.h)

use super::{
    command::Private,
    Address,
    Busy,
    Command,
    Device,
    DeviceConfig,
    DeviceRef,
    TimedOut, //
};
use crate::raw;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    device,
    error::to_result,
    ffi,
    module::this_module,
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        ArcBorrow,
        Mutex, //
    }, //
};

/// What the driver wants done with a command that has timed out.
pub(crate) enum TimeoutAction {
    /// Give the device the same time again.
    ResetTimer,
    /// Leave the command to the kernel's error handler.
    NotHandled,
}

/// What became of a reset.
pub(crate) enum ResetOutcome {
    /// The host is as new: no command from before the reset is in flight any more.
    Done,
    /// The host did not do it; no command from before is in flight any more either.
    Failed,
}

/// Geometry of a disk, for tools that still ask for one.
pub(crate) struct Geometry {
    /// Number of heads.
    pub(crate) heads: u16,
    /// Sectors a track.
    pub(crate) sectors: u16,
    /// Number of cylinders.
    pub(crate) cylinders: u16,
}

/// A driver for a kind of SCSI host. A value of the type is the driver's data of one host.
#[vtable]
pub(crate) trait Operations: Sized + Send + Sync + 'static {
    /// Name of the driver; what `/sys/class/scsi_host/host*/proc_name` shows.
    const NAME: &'static CStr;

    /// Alignment - 1 that each segment of a command's data but the first and last must have.
    const VIRT_BOUNDARY_MASK: usize;

    /// Queues a command. Atomic context; several CPUs at a time.
    ///
    /// Once the driver has kept the command, it ends it some time later by [`Command::complete`].
    ///
    /// # Errors
    ///
    /// [`Busy`] gives back a command that the driver cannot take just now; it comes again later.
    fn queue_command(this: ArcBorrow<'_, Self>, cmd: Command<Self>) -> Result<(), Busy<Self>>;

    /// A command was not completed in time. Process context; must not sleep for long.
    fn timed_out(&self, cmd: &TimedOut<'_>) -> TimeoutAction;

    /// Brings the host back to a state where commands can be sent. The kernel's error handler calls
    /// this when commands timed out and nothing else comes in. May sleep.
    ///
    /// On return, whatever its result, the driver holds no command from before the call.
    fn host_reset(this: ArcBorrow<'_, Self>) -> ResetOutcome;

    /// A device is about to be scanned. May sleep.
    ///
    /// # Errors
    ///
    /// Any error keeps the device from being scanned.
    fn device_init(&self, dev: &mut DeviceConfig<'_>) -> Result;

    /// A device was found and is about to be made visible. May sleep.
    ///
    /// # Errors
    ///
    /// Any error puts the device offline.
    fn device_configure(&self, dev: &mut DeviceConfig<'_>) -> Result;

    /// The largest queue depth that a device may be given.
    fn max_queue_depth(&self) -> u32;

    /// Tells which hardware queue each CPU uses. Called while the host is registered.
    fn map_queues(&self, map: &mut QueueMap<'_>);

    /// Geometry of a disk with so many sectors of 512 bytes.
    fn geometry(capacity: u64) -> Geometry;
}

/// Limits and sizes of a host.
pub(crate) struct HostParams {
    /// Commands that a hardware queue takes at a time.
    pub(crate) can_queue: u16,
    /// Commands that a device is given at a time, to begin with.
    pub(crate) commands_per_lun: u16,
    /// Number of hardware queues.
    pub(crate) hw_queues: u16,
    /// Segments that a command can have.
    pub(crate) sg_tablesize: u16,
    /// Sectors of 512 bytes that a command can transfer.
    pub(crate) max_sectors: u32,
    /// Length of the longest command descriptor block.
    pub(crate) max_cdb_len: u16,
    /// Number of buses.
    pub(crate) channels: u32,
    /// Number of targets on a bus.
    pub(crate) targets: u32,
    /// Number of logical units of a target.
    pub(crate) luns: u64,
}

/// The map from CPUs to hardware queues.
pub(crate) struct QueueMap<'a> {
    map: &'a mut [ffi::c_uint],
    queues: u16,
}

impl QueueMap<'_> {
    /// Number of hardware queues.
    pub(crate) fn queues(&self) -> u16 {
        self.queues
    }

    /// Number of CPUs that the kernel can have.
    pub(crate) fn cpus(&self) -> u32 {
        // CAST: there are far less than 2^32 CPUs.
        self.map.len() as u32
    }

    /// The NUMA node of a CPU; 0 if there can be no such CPU.
    pub(crate) fn node(cpu: u32) -> u32 {
        // SAFETY: The function is fine with any number.
        unsafe { raw::storvsc_helper_cpu_node(cpu) }
    }

    /// Lets `cpu` use `queue`. Numbers that are out of range have no effect.
    pub(crate) fn set(&mut self, cpu: u32, queue: u16) {
        if queue < self.queues {
            if let Some(entry) = self.map.get_mut(cpu as usize) {
                *entry = queue.into();
            }
        }
    }
}

/// What the driver keeps in the private area of a `struct Scsi_Host`.
///
/// It lives as long as the host itself, which may be longer than the registration, for a user may
/// have one of its files open.
#[pin_data]
struct Shared<T: Operations> {
    /// For the callbacks that come only while the host is registered: set before it is registered,
    /// and valid until the registration ended.
    operations: *const T,
    /// For callbacks that may come at any time. `None` when the registration ended.
    #[pin]
    owner: Mutex<Option<Arc<T>>>,
}

/// A reference to a SCSI host that keeps it from being freed.
///
/// # Invariants
///
/// The pointer is a valid `struct Scsi_Host` whose operations are `T`, and the value owns a reference
/// to it.
pub(crate) struct Host<T: Operations>(NonNull<raw::Scsi_Host>, PhantomData<T>);

// SAFETY: A `struct Scsi_Host` may be used and released by any task.
unsafe impl<T: Operations> Send for Host<T> {}
// SAFETY: The methods with `&self` do their own locking.
unsafe impl<T: Operations> Sync for Host<T> {}

impl<T: Operations> Host<T> {
    /// Number of the host, as in its name.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: The host is valid by the type invariants; its number does not change.
        unsafe { (*self.0.as_ptr()).host_no }
    }

    /// Looks for devices on all buses. Does nothing when the host is not registered. Sleeps.
    pub(crate) fn scan(&self) {
        // SAFETY: The host is valid by the type invariants; the function looks at the host's state.
        unsafe { raw::scsi_scan_host(self.0.as_ptr()) };
    }

    /// Looks for one device. Sleeps.
    ///
    /// # Errors
    ///
    /// `ENODEV` if there is none.
    pub(crate) fn add_device(&self, address: Address) -> Result {
        // SAFETY: The host is valid by the type invariants; the function looks at the host's state.
        to_result(unsafe {
            raw::scsi_add_device(
                self.0.as_ptr(),
                address.channel,
                address.id,
                address.lun, //
            )
        })
    }

    /// The device at `address`, if there is one.
    pub(crate) fn device(&self, address: Address) -> Option<DeviceRef> {
        // SAFETY: The host is valid by the type invariants.
        let dev = unsafe {
            raw::scsi_device_lookup(
                self.0.as_ptr(),
                address.channel,
                address.id,
                address.lun, //
            )
        };
        // SAFETY: `scsi_device_lookup()` takes a reference for its caller.
        NonNull::new(dev).map(|dev| unsafe { DeviceRef::from_raw(dev) })
    }

    /// Calls `f` with each device. `f` may sleep.
    pub(crate) fn for_each_device(&self, mut f: impl FnMut(&Device)) {
        let mut dev = core::ptr::null_mut();
        loop {
            // SAFETY: The host is valid by the type invariants. The function gives up the reference
            // of `dev`, the previous device, and takes one of the next.
            dev = unsafe { raw::__scsi_iterate_devices(self.0.as_ptr(), dev) };
            if dev.is_null() {
                return;
            }
            // SAFETY: There is a reference of `dev` until the next turn.
            f(unsafe { Device::from_raw(dev) });
        }
    }
}

impl<T: Operations> Clone for Host<T> {
    fn clone(&self) -> Self {
        // SAFETY: The host is valid by the type invariants.
        unsafe { raw::scsi_host_get(self.0.as_ptr()) };
        // INVARIANT: The reference was taken above.
        Self(self.0, PhantomData)
    }
}

impl<T: Operations> Drop for Host<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants there is a reference to give up.
        unsafe { raw::scsi_host_put(self.0.as_ptr()) };
    }
}

/// The registration of a SCSI host. Dropping it removes the host with all its devices; it sleeps, and
/// returns when no callback is running and no command is in flight.
///
/// # Invariants
///
/// The host is registered.
pub(crate) struct Registration<T: Operations>(Host<T>);

impl<T: Operations> Registration<T> {
    /// Registers a host with the operations and data of `owner`. It is not scanned yet.
    ///
    /// `parent` is also the device that data is mapped for.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or what the kernel says.
    pub(crate) fn new(
        parent: &device::Device<device::Bound>,
        params: &HostParams,
        owner: Arc<T>,
    ) -> Result<Self> {
        // `scsi_cmd_priv()` is right behind a `struct scsi_cmnd`.
        const {
            assert!(align_of::<Private>() <= align_of::<raw::scsi_cmnd>());
            assert!(align_of::<Shared<T>>() <= align_of::<ffi::c_ulong>());
        }
        // The bit field of the template is written as bytes below.
        let template = Callbacks::<T>::template();
        if template.track_queue_depth() == 0
            || template.skip_settle_delay() == 0
            || template.no_write_same() == 0
        {
            return Err(EINVAL);
        }

        let size = i32::try_from(size_of::<Shared<T>>())?;
        // SAFETY: The template is static, and complete.
        let host = unsafe { raw::scsi_host_alloc(template, size) };
        // INVARIANT: `scsi_host_alloc()` returns a reference.
        let host = Host(NonNull::new(host).ok_or(ENOMEM)?, PhantomData);
        let shost = host.0.as_ptr();

        let operations = Arc::as_ptr(&owner);
        // SAFETY: The private area of the new host has the size and alignment of `Shared`, is never
        // moved, and nobody else knows it yet.
        unsafe {
            pin_init::raw_init(
                Callbacks::<T>::shared(shost),
                pin_init!(Shared {
                    operations,
                    owner <- new_mutex!(Some(owner)),
                }),
            )
        };

        // SAFETY: The host is not registered yet: nobody else uses it.
        unsafe {
            (*shost).can_queue = params.can_queue.into();
            (*shost).cmd_per_lun = i16::try_from(params.commands_per_lun).unwrap_or(i16::MAX);
            (*shost).nr_hw_queues = params.hw_queues.into();
            (*shost).sg_tablesize = params.sg_tablesize;
            (*shost).max_sectors = params.max_sectors;
            (*shost).max_cmd_len = params.max_cdb_len;
            (*shost).max_channel = params.channels.saturating_sub(1);
            (*shost).max_id = params.targets;
            (*shost).max_lun = params.luns;
        }

        // CAST: `device::Device` is a transparent wrapper of `struct device`.
        let parent = core::ptr::from_ref(parent).cast_mut().cast();
        // Bounce buffers must keep the place of the data in its page.
        let mask = u32::try_from(T::VIRT_BOUNDARY_MASK)?;
        // SAFETY: The parent is bound; only its driver, which calls this, sets its DMA parameters.
        unsafe { raw::storvsc_helper_set_min_align(parent, mask) };
        // SAFETY: Both pointers are valid. The parent is bound, so that it is registered and can map
        // memory.
        let ret = unsafe { raw::storvsc_helper_add_host(shost, parent) };
        if ret != 0 {
            Callbacks::<T>::release(&host);
            to_result(ret)?;
        }
        // INVARIANT: The host was registered above.
        Ok(Self(host))
    }

    /// The host.
    pub(crate) fn host(&self) -> &Host<T> {
        &self.0
    }
}

impl<T: Operations> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: The host is registered, by the type invariants.
        unsafe { raw::scsi_remove_host(self.0 .0.as_ptr()) };
        Callbacks::<T>::release(&self.0);
    }
}

/// The mid-layer's way to the driver.
struct Callbacks<T: Operations>(PhantomData<T>);

impl<T: Operations> Callbacks<T> {
    const TEMPLATE: raw::scsi_host_template = raw::scsi_host_template {
        // CAST: the kernel takes an unsigned int; the private data of a command is small.
        cmd_size: size_of::<Private>() as ffi::c_uint,
        queuecommand: Some(Self::queuecommand),
        module: this_module::<T::OwnerModule>().as_ptr(),
        name: T::NAME.to_bytes_with_nul().as_ptr(),
        eh_host_reset_handler: Some(Self::eh_host_reset_handler),
        sdev_init: Some(Self::sdev_init),
        sdev_configure: Some(Self::sdev_configure),
        change_queue_depth: Some(Self::change_queue_depth),
        map_queues: Some(Self::map_queues),
        bios_param: Some(Self::bios_param),
        eh_timed_out: Some(Self::eh_timed_out),
        proc_name: T::NAME.to_bytes_with_nul().as_ptr(),
        this_id: -1,
        virt_boundary_mask: T::VIRT_BOUNDARY_MASK as ffi::c_ulong,
        // `track_queue_depth`, `skip_settle_delay` (there is no bus that would need it) and
        // `no_write_same`: bits 1, 5 and 6. bindgen's setters are not const.
        _bitfield_1: bindings::__BindgenBitfieldUnit::new([1 << 1 | 1 << 5 | 1 << 6, 0]),
        ..pin_init::zeroed()
    };

    const fn template() -> &'static raw::scsi_host_template {
        &Self::TEMPLATE
    }

    /// The driver's part of a host.
    fn shared(shost: *mut raw::Scsi_Host) -> *mut Shared<T> {
        // SAFETY: The function only computes an address from the one that it is given.
        unsafe { raw::storvsc_helper_shost_priv(shost) }.cast()
    }

    /// The operations of a registered host.
    ///
    /// # Safety
    ///
    /// `shost` must be a host of ours that is registered, or being registered, for `'a`.
    unsafe fn operations<'a>(shost: *mut raw::Scsi_Host) -> &'a T {
        // SAFETY: The private area is initialized before the host is registered, and `operations` is
        // valid until the registration has ended.
        unsafe { &*(*Self::shared(shost)).operations }
    }

    /// Lets go of the driver's data, once the host is not registered any more.
    fn release(host: &Host<T>) {
        // SAFETY: The host lives, and with it its private area.
        let shared = unsafe { &*Self::shared(host.0.as_ptr()) };
        let owner = shared.owner.lock().take();
        drop(owner);
    }

    extern "C" fn queuecommand(
        shost: *mut raw::Scsi_Host,
        cmd: *mut raw::scsi_cmnd,
    ) -> raw::scsi_qc_status {
        // SAFETY: Commands come only while the host is registered. `operations()` is what an `Arc`
        // points to, of which the host holds one until then.
        let this = unsafe { ArcBorrow::from_raw(Self::operations(shost)) };
        let Some(cmd) = NonNull::new(cmd) else {
            return raw::scsi_qc_status_SCSI_MLQUEUE_HOST_BUSY;
        };
        // SAFETY: The mid-layer hands the command over with this call.
        match T::queue_command(this, unsafe { Command::from_raw(cmd) }) {
            Ok(()) => 0,
            Err(Busy(cmd)) => {
                cmd.give_back();
                raw::scsi_qc_status_SCSI_MLQUEUE_HOST_BUSY
            }
        }
    }

    extern "C" fn eh_timed_out(cmd: *mut raw::scsi_cmnd) -> raw::scsi_timeout_action {
        // SAFETY: The mid-layer calls this with a started command of a registered host.
        let (this, cmd) = unsafe {
            (
                Self::operations((*(*cmd).device).host),
                TimedOut::new(cmd), //
            )
        };
        match this.timed_out(&cmd) {
            TimeoutAction::ResetTimer => raw::scsi_timeout_action_SCSI_EH_RESET_TIMER,
            TimeoutAction::NotHandled => raw::scsi_timeout_action_SCSI_EH_NOT_HANDLED,
        }
    }

    extern "C" fn eh_host_reset_handler(cmd: *mut raw::scsi_cmnd) -> ffi::c_int {
        // SAFETY: The command's device and host live. The private area lives as long as the host.
        let shared = unsafe { &*Self::shared((*(*cmd).device).host) };
        let owner = shared.owner.lock().clone();
        let result = match owner.map(|this| T::host_reset(this.as_arc_borrow())) {
            Some(ResetOutcome::Done) => raw::scsi_disposition_SUCCESS,
            Some(ResetOutcome::Failed) | None => raw::scsi_disposition_FAILED,
        };
        // CAST: the values of the enum fit in an int, which C takes for it here.
        result as ffi::c_int
    }

    extern "C" fn sdev_init(dev: *mut raw::scsi_device) -> ffi::c_int {
        // SAFETY: Devices are scanned only while the host is registered, and in this callback the
        // driver may change the device's settings.
        let (this, dev) = unsafe { (Self::operations((*dev).host), Device::from_raw(dev)) };
        // SAFETY: as above.
        let mut config = unsafe { DeviceConfig::new(dev) };
        match this.device_init(&mut config) {
            Ok(()) => 0,
            Err(e) => e.to_errno(),
        }
    }

    extern "C" fn sdev_configure(
        dev: *mut raw::scsi_device,
        _lim: *mut bindings::queue_limits,
    ) -> ffi::c_int {
        // SAFETY: Devices are scanned only while the host is registered, and in this callback the
        // driver may change the device's settings.
        let (this, dev) = unsafe { (Self::operations((*dev).host), Device::from_raw(dev)) };
        // SAFETY: as above.
        let mut config = unsafe { DeviceConfig::new(dev) };
        match this.device_configure(&mut config) {
            Ok(()) => 0,
            Err(e) => e.to_errno(),
        }
    }

    extern "C" fn change_queue_depth(dev: *mut raw::scsi_device, depth: ffi::c_int) -> ffi::c_int {
        // SAFETY: A device's attributes and commands, from which this is called, are there only while
        // the host is registered.
        let (this, dev) = unsafe { (Self::operations((*dev).host), Device::from_raw(dev)) };
        let max = i32::try_from(this.max_queue_depth()).unwrap_or(i32::MAX);
        dev.change_queue_depth(depth.min(max))
    }

    extern "C" fn map_queues(shost: *mut raw::Scsi_Host) {
        // SAFETY: The mid-layer calls this while the host is being registered, or is.
        let this = unsafe { Self::operations(shost) };
        // SAFETY: as above; a host has at least one map, with an entry for each possible CPU number.
        let (map, queues) = unsafe {
            let map = &raw mut (*shost).tag_set.map[0];
            (
                core::slice::from_raw_parts_mut(
                    (*map).mq_map,
                    kernel::cpu::nr_cpu_ids() as usize, //
                ),
                (*map).nr_queues,
            )
        };
        this.map_queues(&mut QueueMap {
            map,
            queues: u16::try_from(queues).unwrap_or(u16::MAX),
        });
    }

    extern "C" fn bios_param(
        _dev: *mut raw::scsi_device,
        _disk: *mut bindings::gendisk,
        capacity: bindings::sector_t,
        info: *mut ffi::c_int,
    ) -> ffi::c_int {
        let geometry = T::geometry(capacity);
        // SAFETY: The mid-layer gives an array of three numbers.
        unsafe {
            info.cast::<[ffi::c_int; 3]>().write([
                geometry.heads.into(),
                geometry.sectors.into(),
                geometry.cylinders.into(),
            ])
        };
        0
    }
}
