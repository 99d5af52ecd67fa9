// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Request ids: a fixed table of what is outstanding.
//!
//! A packet that asks for a completion carries an id of 64 bits, and the completion brings it
//! back. The id must tell the peer nothing (so no pointer), and a completion must not be believed:
//! it may name a request that never was, come twice, come for a request of another kind, or come
//! late, when the slot serves another request. So an id is the number of a slot (1 and up) with the
//! slot's generation above it, each slot knows the kind of its request, and a request is completed
//! once, as its own kind only. An id is never 0, which means "no request" on the wire.
//!
//! The table is plain data over storage that the caller brings (a slice, a vector, a box). It has
//! no lock: keep it under the lock of what it belongs to. All operations take constant time, but
//! for [`SlotTable::drain`].
//!
//! ```
//! use hv_proto::slots::{Slot, SlotError, SlotTable};
//!
//! #[derive(Clone, Copy, Debug, PartialEq)]
//! enum Kind {
//!     Control,
//!     Data,
//! }
//!
//! let mut storage: [Slot<Kind, &str>; 4] = core::array::from_fn(|_| Slot::new());
//! let mut slots = SlotTable::new(&mut storage[..]);
//! let id = slots.insert(Kind::Data, "first").unwrap();
//! assert_eq!(slots.complete(id.get(), &Kind::Control), Err(SlotError::WrongKind));
//! assert_eq!(slots.complete(id.get(), &Kind::Data), Ok("first"));
//! assert_eq!(slots.complete(id.get(), &Kind::Data), Err(SlotError::Stale));
//! ```

use core::fmt;
use core::marker::PhantomData;
use core::num::NonZeroU64;
use core::ops::DerefMut;

/// A request id as it goes over the wire. It is never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(NonZeroU64);

impl RequestId {
    /// The number.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// Puts the number of a slot and its generation together.
    const fn pack(index: u32, generation: u32) -> Self {
        // The low half is index + 1, at most 2^31, so it is neither 0 nor carries.
        let raw = (generation as u64) << 32 | (index as u64).saturating_add(1);
        match NonZeroU64::new(raw) {
            Some(raw) => Self(raw),
            None => Self(NonZeroU64::MIN),
        }
    }

    /// The number of a slot and its generation; `None` if no slot can have the id.
    fn unpack(raw: u64) -> Option<(usize, u32)> {
        let index = (raw as u32).checked_sub(1)?;
        Some((usize::try_from(index).ok()?, (raw >> 32) as u32))
    }
}

/// Why a completion is not believed. The table is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotError {
    /// No request has ever had, or could have, this id.
    Unknown,
    /// The request with this id was completed or cancelled before.
    Stale,
    /// The request with this id is of another kind. It stays outstanding.
    WrongKind,
}

impl fmt::Display for SlotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "no request has this id",
            Self::Stale => "request was completed before",
            Self::WrongKind => "request is of another kind",
        })
    }
}

impl core::error::Error for SlotError {}

#[derive(Clone, Debug)]
enum Content<K, T> {
    /// Not in use; `next` is the next free slot.
    Free { next: Option<u32> },
    /// An outstanding request.
    Used { kind: K, value: T },
}

/// Room for one request.
#[derive(Clone, Debug)]
pub struct Slot<K, T = ()> {
    /// Counts how often the slot was emptied, and wraps around.
    generation: u32,
    content: Content<K, T>,
}

impl<K, T> Slot<K, T> {
    /// An empty slot.
    pub const fn new() -> Self {
        Self {
            generation: 0,
            content: Content::Free { next: None },
        }
    }
}

impl<K, T> Default for Slot<K, T> {
    fn default() -> Self {
        Self::new()
    }
}

/// A table of outstanding requests over storage `S`, each with a kind and a value.
#[derive(Debug)]
pub struct SlotTable<K, T, S> {
    storage: S,
    /// The first free slot.
    free: Option<u32>,
    used: usize,
    _slots: PhantomData<Slot<K, T>>,
}

impl<K, T, S> SlotTable<K, T, S>
where
    K: PartialEq,
    S: DerefMut<Target = [Slot<K, T>]>,
{
    /// Most slots of a table; more of the storage is not used.
    pub const MAX_CAPACITY: usize = 1 << 31;

    /// An empty table over this storage. What was in the storage is dropped, but its generations
    /// go on.
    pub fn new(storage: S) -> Self {
        let mut table = Self {
            storage,
            free: None,
            used: 0,
            _slots: PhantomData,
        };
        // The lowest slot ends up first.
        let mut next = None;
        let slots = table.storage.iter_mut().take(Self::MAX_CAPACITY);
        let count = slots.len();
        for (index, slot) in (0..count as u32).zip(slots).rev() {
            if let Content::Used { .. } = slot.content {
                slot.generation = slot.generation.wrapping_add(1);
            }
            slot.content = Content::Free { next };
            next = Some(index);
        }
        table.free = next;
        table
    }

    /// Number of slots.
    pub fn capacity(&self) -> usize {
        self.storage.len().min(Self::MAX_CAPACITY)
    }

    /// Number of outstanding requests.
    pub fn len(&self) -> usize {
        self.used
    }

    /// Whether no request is outstanding.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Takes a slot for a request. `None` if all are in use; kind and value are dropped then, so
    /// ask [`is_full`](Self::is_full) first if that matters.
    pub fn insert(&mut self, kind: K, value: T) -> Option<RequestId> {
        let index = self.free?;
        let slot = self.storage.get_mut(usize::try_from(index).ok()?)?;
        let Content::Free { next } = slot.content else {
            return None;
        };
        slot.content = Content::Used { kind, value };
        self.free = next;
        self.used = self.used.saturating_add(1);
        Some(RequestId::pack(index, slot.generation))
    }

    /// Whether all slots are in use.
    pub fn is_full(&self) -> bool {
        self.free.is_none()
    }

    /// Finds the used slot that has this id.
    fn find(&mut self, id: u64) -> Result<(u32, &mut Slot<K, T>), SlotError> {
        let (index, generation) = RequestId::unpack(id).ok_or(SlotError::Unknown)?;
        let capacity = self.capacity();
        let slot = self
            .storage
            .get_mut(index)
            .filter(|_| index < capacity)
            .ok_or(SlotError::Unknown)?;
        match slot.content {
            Content::Used { .. } if slot.generation == generation => {}
            // Generations wrap around; the half behind the present one is the past.
            _ if slot.generation.wrapping_sub(generation) < 1 << 31
                && slot.generation != generation =>
            {
                return Err(SlotError::Stale)
            }
            _ => return Err(SlotError::Unknown),
        }
        Ok((index as u32, slot))
    }

    /// The request with this id is complete, if it is of kind `kind`: gives back its value.
    ///
    /// # Errors
    ///
    /// [`SlotError`], with nothing changed.
    pub fn complete(&mut self, id: u64, kind: &K) -> Result<T, SlotError> {
        let (_, slot) = self.find(id)?;
        match &slot.content {
            Content::Used { kind: own, .. } if own == kind => {}
            _ => return Err(SlotError::WrongKind),
        }
        self.cancel(id).map(|(_, value)| value)
    }

    /// Takes a request out whatever its kind, because it could not be sent or is given up: gives
    /// back kind and value. A completion that comes later is [`SlotError::Stale`].
    ///
    /// # Errors
    ///
    /// [`SlotError::Unknown`] or [`SlotError::Stale`].
    pub fn cancel(&mut self, id: u64) -> Result<(K, T), SlotError> {
        let next = self.free;
        let (index, slot) = self.find(id)?;
        let content = core::mem::replace(&mut slot.content, Content::Free { next });
        slot.generation = slot.generation.wrapping_add(1);
        self.free = Some(index);
        self.used = self.used.saturating_sub(1);
        match content {
            Content::Used { kind, value } => Ok((kind, value)),
            Content::Free { .. } => Err(SlotError::Unknown),
        }
    }

    /// Looks at an outstanding request without taking it out.
    ///
    /// # Errors
    ///
    /// [`SlotError::Unknown`] or [`SlotError::Stale`].
    pub fn get_mut(&mut self, id: u64) -> Result<(&K, &mut T), SlotError> {
        match &mut self.find(id)?.1.content {
            Content::Used { kind, value } => Ok((kind, value)),
            Content::Free { .. } => Err(SlotError::Unknown),
        }
    }

    /// Takes out the request in slot `index` (less than [`capacity`](Self::capacity)), if there is
    /// one: gives back id, kind and value.
    pub fn cancel_at(&mut self, index: usize) -> Option<(RequestId, K, T)> {
        let slot = self.storage.get(index)?;
        let Content::Used { .. } = slot.content else {
            return None;
        };
        let id = RequestId::pack(u32::try_from(index).ok()?, slot.generation);
        let (kind, value) = self.cancel(id.get()).ok()?;
        Some((id, kind, value))
    }

    /// Takes out all requests, one after the other, as a rescind or a reset must: for each one
    /// `each` gets id, kind and value.
    pub fn drain(&mut self, mut each: impl FnMut(RequestId, K, T)) {
        for index in 0..self.capacity() {
            if self.used == 0 {
                break;
            }
            if let Some((id, kind, value)) = self.cancel_at(index) {
                each(id, kind, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn table(len: usize) -> SlotTable<u8, u32, Vec<Slot<u8, u32>>> {
        SlotTable::new((0..len).map(|_| Slot::new()).collect())
    }

    #[test]
    fn ids_are_small_and_never_zero() {
        let mut slots = table(3);
        let ids: Vec<u64> = (0..3).map(|n| slots.insert(n, 0).unwrap().get()).collect();
        assert_eq!(ids, [1, 2, 3]);
        assert!(slots.is_full());
        assert_eq!(slots.insert(0, 0), None);
        assert_eq!(slots.complete(0, &0), Err(SlotError::Unknown));
        assert_eq!(slots.complete(4, &0), Err(SlotError::Unknown));
        assert_eq!(slots.complete(u64::MAX, &0), Err(SlotError::Unknown));
        assert_eq!(slots.len(), 3);
    }

    #[test]
    fn slot_is_reused_with_another_id() {
        let mut slots = table(1);
        let first = slots.insert(1, 10).unwrap();
        assert_eq!(slots.complete(first.get(), &1), Ok(10));
        let second = slots.insert(1, 20).unwrap();
        assert_ne!(first, second);
        assert_eq!(slots.complete(first.get(), &1), Err(SlotError::Stale));
        // An id of the future.
        let future = RequestId::pack(0, 2).get();
        assert_eq!(slots.complete(future, &1), Err(SlotError::Unknown));
        assert_eq!(slots.get_mut(second.get()), Ok((&1, &mut 20)));
        assert_eq!(slots.cancel(second.get()), Ok((1, 20)));
        assert!(slots.is_empty());
    }

    #[test]
    fn generations_wrap_around() {
        let mut slots = table(1);
        slots.storage[0].generation = u32::MAX;
        let last = slots.insert(0, 1).unwrap();
        assert_eq!(slots.complete(last.get(), &0), Ok(1));
        let first = slots.insert(0, 2).unwrap();
        assert_eq!(first.get(), 1);
        assert_eq!(slots.complete(last.get(), &0), Err(SlotError::Stale));
        assert_eq!(slots.complete(first.get(), &0), Ok(2));
    }

    #[test]
    fn storage_that_was_used_starts_empty() {
        let mut storage: [Slot<u8, u32>; 2] = core::array::from_fn(|_| Slot::new());
        let old = SlotTable::new(&mut storage[..]).insert(0, 7).unwrap();
        let mut slots = SlotTable::new(&mut storage[..]);
        assert!(slots.is_empty());
        assert_eq!(slots.complete(old.get(), &0), Err(SlotError::Stale));
    }

    #[test]
    fn empty_storage_has_no_room() {
        let mut slots = table(0);
        assert!(slots.is_full() && slots.is_empty() && slots.capacity() == 0);
        assert_eq!(slots.insert(0, 0), None);
        assert_eq!(slots.complete(1, &0), Err(SlotError::Unknown));
        slots.drain(|_, _, _| panic!("nothing is there"));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u8),
        /// Completes the n-th id that was ever given out, as this kind.
        Complete(usize, u8),
        Cancel(usize),
        Random(u64, u8),
        Drain,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0u8..3).prop_map(Op::Insert),
            4 => (any::<usize>(), 0u8..3).prop_map(|(n, kind)| Op::Complete(n, kind)),
            1 => any::<usize>().prop_map(Op::Cancel),
            1 => (any::<u64>(), 0u8..3).prop_map(|(id, kind)| Op::Random(id, kind)),
            1 => Just(Op::Drain),
        ]
    }

    proptest! {
        /// The table does what a map of everything that is outstanding does.
        #[test]
        fn agrees_with_a_map(len in 0usize..6, ops in prop::collection::vec(op(), 0..200)) {
            let mut slots = table(len);
            let mut model: HashMap<u64, (u8, u32)> = HashMap::new();
            let mut given: Vec<u64> = Vec::new();
            for (n, op) in ops.into_iter().enumerate() {
                match op {
                    Op::Insert(kind) => match slots.insert(kind, n as u32) {
                        Some(id) => {
                            prop_assert!(id.get() != 0 && !given.contains(&id.get()));
                            model.insert(id.get(), (kind, n as u32));
                            given.push(id.get());
                        }
                        None => prop_assert_eq!(model.len(), len),
                    },
                    Op::Complete(pick, kind) if !given.is_empty() => {
                        let id = given[pick % given.len()];
                        let expected = match model.get(&id) {
                            None => Err(SlotError::Stale),
                            Some((own, _)) if *own != kind => Err(SlotError::WrongKind),
                            Some((_, value)) => Ok(*value),
                        };
                        prop_assert_eq!(slots.complete(id, &kind), expected);
                        if expected.is_ok() {
                            model.remove(&id);
                        }
                    }
                    Op::Cancel(pick) if !given.is_empty() => {
                        let id = given[pick % given.len()];
                        prop_assert_eq!(
                            slots.cancel(id),
                            model.remove(&id).ok_or(SlotError::Stale)
                        );
                    }
                    Op::Random(id, kind) => {
                        let known = model.get(&id).copied();
                        let got = slots.complete(id, &kind);
                        prop_assert_eq!(got.is_ok(), known.is_some_and(|(own, _)| own == kind));
                        if got.is_ok() {
                            model.remove(&id);
                        }
                    }
                    Op::Drain => {
                        let mut all = HashMap::new();
                        slots.drain(|id, kind, value| {
                            all.insert(id.get(), (kind, value));
                        });
                        prop_assert_eq!(&all, &model);
                        model.clear();
                    }
                    Op::Complete(..) | Op::Cancel(_) => {}
                }
                prop_assert_eq!(slots.len(), model.len());
                prop_assert_eq!(slots.is_full(), model.len() == len);
            }
        }
    }
}
