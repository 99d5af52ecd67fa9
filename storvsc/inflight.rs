// SPDX-License-Identifier: GPL-2.0

//! The commands that the host has: a table with a place for each tag.
//!
//! What can happen to a command in its place, and why it ends exactly once, is in
//! [`hv_proto::inflight`]. Here are the locks, one for each place, and the ways in which commands end
//! that only the SCSI mid-layer knows.

use crate::scsi::{
    Command,
    HostByte,
    Operations,
    Outcome,
    UniqueTag, //
};
use hv_proto::inflight::{
    Early,
    Failed,
    Place,
    RequestId, //
};
use kernel::{
    new_spinlock_irq,
    prelude::*,
    sync::SpinLockIrq, //
};

/// What an answer of the host was for.
pub(crate) enum Answered<T: Operations, A> {
    /// The command is the caller's to end.
    Command(Command<T>, A),
    /// It is taken care of.
    Done,
    /// No command is waiting for such an answer: the host made a mistake.
    Unknown,
}

type Entry<T, A> = Place<Command<T>, A, HostByte>;

#[pin_data]
struct Locked<T: Operations, A> {
    /// It is taken for a few instructions, and by those only who deal with this one command.
    #[pin]
    entry: SpinLockIrq<Entry<T, A>>,
}

/// Places are allocated in pieces of this number, for they must not move.
const PIECE: usize = 32;

#[pin_data]
struct Piece<T: Operations, A> {
    #[pin]
    places: [Locked<T, A>; PIECE],
}

/// The places of all commands that a controller can have in flight.
pub(crate) struct Table<T: Operations, A> {
    pieces: KVec<Pin<KBox<Piece<T, A>>>>,
    depth: u16,
}

impl<T: Operations, A: Send + Unpin> Table<T, A> {
    /// A table for `queues` hardware queues with `depth` commands each.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(queues: u16, depth: u16) -> Result<Self> {
        let places = usize::from(queues) * usize::from(depth);
        let mut pieces = KVec::with_capacity(places.div_ceil(PIECE), GFP_KERNEL)?;
        for _ in 0..places.div_ceil(PIECE) {
            let piece = KBox::pin_init(
                pin_init!(Piece {
                    places <- pin_init::pin_init_array_from_fn(|_| Self::place()),
                }),
                GFP_KERNEL,
            )?;
            pieces.push(piece, GFP_KERNEL)?;
        }
        Ok(Self { pieces, depth })
    }

    fn place() -> impl PinInit<Locked<T, A>> {
        pin_init!(Locked {
            entry <- new_spinlock_irq!(Place::new(), "storvsc_place"),
        })
    }

    fn index(&self, tag: UniqueTag) -> Option<u32> {
        if tag.tag >= self.depth {
            return None;
        }
        Some(u32::from(tag.queue) * u32::from(self.depth) + u32::from(tag.tag))
    }

    fn at(&self, index: u32) -> Option<&SpinLockIrq<Entry<T, A>>> {
        let index = index as usize;
        let piece = self.pieces.get(index / PIECE)?;
        Some(&piece.places.get(index % PIECE)?.entry)
    }

    fn of(&self, tag: UniqueTag) -> Option<&SpinLockIrq<Entry<T, A>>> {
        self.at(self.index(tag)?)
    }

    fn all(&self) -> impl Iterator<Item = &SpinLockIrq<Entry<T, A>>> {
        let places = self.pieces.iter().flat_map(|piece| &piece.places);
        places.map(|place| &place.entry)
    }

    /// Starts sending the command with this tag on `channel`. `None` if the place is in use: the
    /// command must wait.
    pub(crate) fn begin(&self, tag: UniqueTag, channel: u16) -> Option<RequestId> {
        let index = self.index(tag)?;
        let (generation, old) = self.at(index)?.lock().begin(channel)?;
        if let Some(old) = old {
            old.forget();
        }
        Some(RequestId { index, generation })
    }

    /// The command was sent: from now on it belongs to the table.
    ///
    /// # Errors
    ///
    /// Gives the command back if it has come to its end meanwhile; the caller ends it.
    pub(crate) fn commit(
        &self,
        id: RequestId,
        cmd: Command<T>,
    ) -> Result<(), (Command<T>, Early<A, HostByte>)> {
        let Some(place) = self.at(id.index) else {
            return Err((cmd, Early::Failed(HostByte::ERROR)));
        };
        let result = place.lock().commit(cmd);
        result.map_err(|(cmd, early)| (cmd, early.unwrap_or(Early::Failed(HostByte::ERROR))))
    }

    /// The command could not be sent. Says whether it has come to its end all the same.
    pub(crate) fn cancel(&self, id: RequestId) -> Option<Early<A, HostByte>> {
        self.at(id.index)?.lock().cancel()
    }

    /// The host has answered the request `id` on `channel`.
    pub(crate) fn answer(&self, id: u64, channel: u16, answer: A) -> Answered<T, A> {
        use hv_proto::inflight::Answered as Is;

        let Some(id) = RequestId::from_wire(id) else {
            return Answered::Unknown;
        };
        let Some(place) = self.at(id.index) else {
            return Answered::Unknown;
        };
        let mut entry = place.lock();
        match entry.answer(id.generation, channel, answer) {
            Is::Request(cmd, answer) => Answered::Command(cmd, answer),
            Is::Deferred => Answered::Done,
            Is::Late(cmd) => {
                // Under the lock: the kernel's error handler uses the command again as soon as it
                // sees that the place is free.
                cmd.leave_to_error_handler();
                Answered::Done
            }
            Is::Unknown => Answered::Unknown,
        }
    }

    /// The command with this tag has timed out. Gives it its time again, at most `max` times; says
    /// whether it did.
    pub(crate) fn extend(&self, tag: UniqueTag, max: u32) -> bool {
        self.of(tag).is_some_and(|place| place.lock().extend(max))
    }

    /// The command with this tag is left to the kernel's error handler. Says whether it could be: if
    /// not, it is just being ended.
    pub(crate) fn abandon(&self, tag: UniqueTag) -> bool {
        self.of(tag).is_some_and(|place| place.lock().abandon())
    }

    /// Ends all commands that were sent on `channel`, or on any if it is `None`, with `host`.
    pub(crate) fn fail(&self, channel: Option<u16>, host: HostByte) {
        for place in self.all() {
            let mut entry = place.lock();
            match entry.fail(channel, host) {
                Failed::Request(cmd) => {
                    drop(entry);
                    cmd.complete(Outcome::failed(host));
                }
                // Under the lock, as above.
                Failed::Abandoned(cmd) => cmd.leave_to_error_handler(),
                Failed::Nothing => (),
            }
        }
    }

    /// How many commands are in flight.
    pub(crate) fn count(&self) -> usize {
        self.all().filter(|place| !place.lock().is_free()).count()
    }
}
