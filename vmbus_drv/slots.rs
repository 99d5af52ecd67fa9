// SPDX-License-Identifier: GPL-2.0

//! The requests that a driver has outstanding on a channel: [`hv_proto::slots`] with a lock.
//!
//! The id on the wire is the number of a slot and how often that was used, so it is never 0 and never
//! a pointer, and an answer that the host makes up, sends twice, or sends for a request of another
//! kind finds nothing.

use hv_proto::slots::{
    Slot,
    SlotError,
    SlotTable, //
};
use kernel::{
    new_spinlock_irq,
    prelude::*,
    sync::SpinLockIrq, //
};

type Table<K, T> = SlotTable<K, T, KVVec<Slot<K, T>>>;

/// Outstanding requests, each with a kind and with what belongs to it until it is answered.
///
/// All methods but [`RequestSlots::new`] can be called from any context.
#[pin_data]
pub struct RequestSlots<K, T> {
    #[pin]
    table: SpinLockIrq<Table<K, T>>,
}

impl<K: PartialEq + Unpin, T: Unpin> RequestSlots<K, T> {
    /// Room for `capacity` requests.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new(capacity: usize) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let mut slots = KVVec::with_capacity(capacity, GFP_KERNEL)?;
            for _ in 0..capacity {
                slots.push(Slot::new(), GFP_KERNEL)?;
            }
            Ok(try_pin_init!(Self {
                table <- new_spinlock_irq!(SlotTable::new(slots)),
            }))
        })
    }

    /// Takes a slot for a request and calls `send` with its id. If that fails, the slot is free
    /// again.
    ///
    /// The answer may come before this returns.
    ///
    /// # Errors
    ///
    /// `EBUSY` if all slots are in use, or the error of `send`; with `value`. There is no value if
    /// the host has answered what was never sent.
    pub fn send(
        &self,
        kind: K,
        value: T,
        send: impl FnOnce(u64) -> Result,
    ) -> core::result::Result<(), (Error, Option<T>)> {
        let mut table = self.table.lock();
        if table.is_full() {
            return Err((EBUSY, Some(value)));
        }
        let Some(id) = table.insert(kind, value) else {
            return Err((EBUSY, None));
        };
        drop(table);
        send(id.get()).map_err(|error| {
            let cancelled = self.table.lock().cancel(id.get());
            (error, cancelled.ok().map(|(_, value)| value))
        })
    }

    /// The host has answered request `id`, which must be of kind `kind`: gives back what belongs to
    /// it.
    ///
    /// # Errors
    ///
    /// [`SlotError`]; the host has made a mistake, and nothing has changed.
    pub fn complete(&self, id: u64, kind: &K) -> core::result::Result<T, SlotError> {
        self.table.lock().complete(id, kind)
    }

    /// Gives up a request that is outstanding: a late answer finds nothing.
    pub fn cancel(&self, id: u64) -> Option<T> {
        let cancelled = self.table.lock().cancel(id);
        cancelled.ok().map(|(_, value)| value)
    }

    /// Gives up all requests, as a driver must that closes its channel; `each` gets kind and value,
    /// with no lock held.
    pub fn cancel_all(&self, mut each: impl FnMut(K, T)) {
        let capacity = self.table.lock().capacity();
        for index in 0..capacity {
            let cancelled = self.table.lock().cancel_at(index);
            if let Some((_, kind, value)) = cancelled {
                each(kind, value);
            }
        }
    }

    /// Number of outstanding requests.
    pub fn len(&self) -> usize {
        self.table.lock().len()
    }

    /// Whether nothing is outstanding.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
