// SPDX-License-Identifier: GPL-2.0

//! NAPI: packets are taken in batches, in softirq context.
//!
//! C header: [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h)

use super::{
    NetDevice,
    RxSkb, //
};
use crate::raw;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Release, //
        },
        Arc, //
    },
    types::Opaque, //
};

/// A NAPI instance of a device, to be a field of `T` (see [`impl_has_napi!`]). It is not enabled at first.
///
/// # Invariants
///
/// The instance is in the list of the device. `enabled` says whether it is enabled; while it is, it owns
/// a reference of the `Arc<T>` that it is in.
#[pin_data(PinnedDrop)]
pub(crate) struct Napi<T: HasNapi> {
    #[pin]
    napi: Opaque<raw::napi_struct>,
    dev: Arc<NetDevice>,
    enabled: Atomic<bool>,
    _p: PhantomData<fn() -> T>,
}

// SAFETY: An instance can be scheduled, enabled and deleted by any thread.
unsafe impl<T: HasNapi> Send for Napi<T> {}
// SAFETY: as above; the functions do their own locking.
unsafe impl<T: HasNapi> Sync for Napi<T> {}

/// A type with a [`Napi`], and what that does.
///
/// # Safety
///
/// `OFFSET` must be where the `Napi<Self>` is in `Self`. Use [`impl_has_napi!`].
pub(crate) unsafe trait HasNapi: Send + Sync + Sized + 'static {
    /// Where the [`Napi`] is, in bytes.
    const OFFSET: usize;

    /// Takes at most `budget` packets, and returns how many. With fewer than `budget`, the instance sleeps
    /// until it is scheduled again; the implementation calls [`PollContext::complete`] then.
    ///
    /// Softirq context.
    fn poll(&self, cx: &PollContext<'_>, budget: usize) -> usize;

    /// The [`Napi`].
    fn napi(&self) -> &Napi<Self> {
        // SAFETY: By the safety requirements of the trait this is where it is.
        unsafe { &*core::ptr::from_ref(self).byte_add(Self::OFFSET).cast() }
    }
}

/// Says which field of a type is its [`Napi`], and which function polls.
macro_rules! impl_has_napi {
    (impl HasNapi for $self:ty { self.$field:ident, $poll:path }) => {
        // SAFETY: The offset is that of the field, whose type the closure checks.
        unsafe impl $crate::net::HasNapi for $self {
            const OFFSET: usize = {
                let _: fn(&$self) -> &$crate::net::Napi<$self> = |this| &this.$field;
                ::core::mem::offset_of!($self, $field)
            };

            fn poll(&self, cx: &$crate::net::PollContext<'_>, budget: usize) -> usize {
                $poll(self, cx, budget)
            }
        }
    };
}
pub(crate) use impl_has_napi;

impl<T: HasNapi> Napi<T> {
    /// Adds an instance to `dev`. May sleep.
    pub(crate) fn new(dev: Arc<NetDevice>) -> impl PinInit<Self> {
        let raw_dev = dev.as_raw();
        pin_init!(Self {
            napi <- Opaque::ffi_init(|slot: *mut raw::napi_struct| {
                // SAFETY: `slot` is valid for writes, will not move, and the instance is deleted before
                // the device is freed, which `dev` sees to. The kernel expects zeroed memory.
                unsafe {
                    slot.write_bytes(0, 1);
                    raw::netvsc_helper_napi_add(raw_dev, slot, Some(Self::poll_callback));
                }
            }),
            dev,
            enabled: Atomic::new(false),
            _p: PhantomData,
        })
    }

    /// Enables the NAPI instance of `owner`. Sleeps.
    ///
    /// # Errors
    ///
    /// `EBUSY` if it is enabled.
    pub(crate) fn enable(owner: Arc<T>) -> Result<Enabled<T>> {
        let this = owner.napi();
        if this.enabled.xchg(true, Full) {
            return Err(EBUSY);
        }
        // SAFETY: The instance is in the device's list and not enabled, by the type invariants.
        unsafe { raw::napi_enable(this.napi.get()) };
        // INVARIANT: The value holds the reference that an enabled instance needs.
        Ok(Enabled(owner))
    }

    /// Has the instance polled soon. Does nothing while it is not enabled. Any context.
    pub(crate) fn schedule(&self) {
        // SAFETY: The instance is initialized; one that is not enabled looks as if it were scheduled.
        unsafe { raw::netvsc_helper_napi_schedule(self.napi.get()) };
    }

    pub(super) fn as_raw(&self) -> *mut raw::napi_struct {
        self.napi.get()
    }

    extern "C" fn poll_callback(napi: *mut raw::napi_struct, budget: i32) -> i32 {
        // CAST: `Opaque` is transparent, and `napi` is the first field in this order of addresses:
        // `offset_of` is used all the same.
        let this = napi
            .cast::<u8>()
            .wrapping_sub(core::mem::offset_of!(Self, napi))
            .wrapping_sub(T::OFFSET)
            .cast::<T>();
        // SAFETY: The instance is polled only while it is enabled, or while the one who disables it waits
        // for the poll to end; until then there is a reference of the `Arc<T>` that it is in.
        let this = unsafe { &*this };
        let cx = PollContext {
            napi,
            _p: PhantomData,
        };
        let budget = usize::try_from(budget).unwrap_or(0);
        // CAST: not more than `budget`.
        this_poll(this, &cx, budget).min(budget) as i32
    }
}

fn this_poll<T: HasNapi>(this: &T, cx: &PollContext<'_>, budget: usize) -> usize {
    T::poll(this, cx, budget)
}

#[pinned_drop]
impl<T: HasNapi> PinnedDrop for Napi<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: The instance is in the device's list. It is not enabled: then there would be a
        // reference to what it is in, which could not be dropped.
        unsafe { raw::netvsc_helper_napi_del(self.napi.get()) };
    }
}

/// An enabled NAPI instance. Dropping this disables it, and sleeps until no poll is running.
pub(crate) struct Enabled<T: HasNapi>(Arc<T>);

impl<T: HasNapi> Drop for Enabled<T> {
    fn drop(&mut self) {
        let this = self.0.napi();
        // SAFETY: The instance is enabled, by the type invariants, and only this value disables it.
        unsafe { raw::napi_disable(this.napi.get()) };
        this.enabled.store(false, Release);
    }
}

/// The poll of a NAPI instance that is going on.
pub(crate) struct PollContext<'a> {
    napi: *mut raw::napi_struct,
    _p: PhantomData<&'a ()>,
}

impl PollContext<'_> {
    /// The instance sleeps from now on, after `done` packets. Returns false if it was scheduled
    /// meanwhile, and is polled again.
    pub(crate) fn complete(&self, done: usize) -> bool {
        // CAST: a poll does not take more packets than its budget, which is an `int`.
        // SAFETY: This is called in the poll of the instance.
        unsafe { raw::napi_complete_done(self.napi, done as i32) }
    }

    /// Makes an empty packet with room for `len` bytes.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn alloc(&self, len: u32) -> Result<RxSkb> {
        // SAFETY: This is called in the poll of the instance.
        let skb = unsafe { raw::napi_alloc_skb(self.napi, len) };
        // SAFETY: The packet is new, linear, and ours.
        Ok(unsafe { RxSkb::from_raw(NonNull::new(skb).ok_or(ENOMEM)?) })
    }

    /// Passes a packet on, as the device's `dev`.
    pub(crate) fn receive(&self, skb: RxSkb) {
        // SAFETY: This is called in the poll of the instance, and the packet is ours to hand over.
        unsafe { raw::netvsc_helper_gro_receive(self.napi, skb.into_raw()) };
    }
}
