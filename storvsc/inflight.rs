// SPDX-License-Identifier: GPL-2.0

//! The commands that the host has, and the request ids by which it answers them.
//!
//! A command's place in the table is its tag, so that nothing is searched or allocated. What the host
//! says is checked against the place: an id that was not sent, was sent on another channel, was
//! answered already, or belonged to an earlier user of the tag finds nothing. Whoever takes a command
//! out of its place owns it and ends it; so a command ends exactly once, whatever races there are
//! between an answer, a rescind, a reset and a timeout.
//!
//! ```text
//!            begin               commit                 answer, fail
//!     Free ---------> Sending ------------> Sent ---------------------> Free
//!      ^                 |                    |
//!      |    cancel, or   |                    | abandon (the kernel's error handler has it)
//!      +-- ended early --+                    v
//!      ^                                  Abandoned
//!      +---------- answer, fail --------------+
//! ```
//!
//! While a command is being written to a ring it still belongs to the sender. An answer that comes
//! before the sender is done (on another CPU, or from a host that guesses) waits in the place, and the
//! sender ends the command.

use crate::scsi::{
    Command,
    HostByte,
    Operations,
    UniqueTag, //
};
use core::num::NonZeroU64;
use kernel::{
    new_spinlock_irq,
    prelude::*,
    sync::SpinLockIrq, //
};

/// A request id of a command: `index + 1` in the low 32 bits, a generation in the 31 bits above them.
/// Bit 63 is clear; ids that have it set are for others to use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequestId {
    index: u32,
    generation: u32,
}

impl RequestId {
    const GENERATION_MASK: u32 = u32::MAX >> 1;

    /// The id as it goes over the bus. It is never 0, which the host uses for what nobody asked for.
    pub(crate) fn to_wire(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index) + 1
    }

    /// An id from the bus; `None` if no command can have it.
    fn from_wire(id: u64) -> Option<Self> {
        let id = NonZeroU64::new(id)?.get();
        // CAST: the two halves of the number.
        let (low, high) = (id as u32, (id >> 32) as u32);
        if high & !Self::GENERATION_MASK != 0 {
            return None;
        }
        Some(Self {
            index: low.checked_sub(1)?,
            generation: high,
        })
    }
}

/// Why a command that is being sent has already come to its end.
pub(crate) enum Early<A> {
    /// The host has answered it.
    Answered(A),
    /// It must end with this host byte.
    Failed(HostByte),
}

/// What an answer of the host was for.
pub(crate) enum Answered<T: Operations, A> {
    /// The command is the caller's to end.
    Command(Command<T>, A),
    /// The sender will end the command.
    Deferred,
    /// The kernel's error handler had the command already; nothing is left to do.
    Late,
    /// No command is waiting for such an answer: the host made a mistake.
    Unknown,
}

enum State<T: Operations, A> {
    Free,
    Sending(Option<Early<A>>),
    Sent(Command<T>),
    Abandoned(Command<T>),
}

/// The place of one command.
struct Entry<T: Operations, A> {
    generation: u32,
    /// Number of the channel that the command is sent on.
    channel: u16,
    /// How many times the command was given its time again.
    extensions: u32,
    state: State<T, A>,
}

#[pin_data]
struct Place<T: Operations, A> {
    /// It is taken for a few instructions, and by those only who deal with this one command.
    #[pin]
    entry: SpinLockIrq<Entry<T, A>>,
}

/// Places are allocated in pieces of this number, for they must not move.
const PIECE: usize = 32;

#[pin_data]
struct Piece<T: Operations, A> {
    #[pin]
    places: [Place<T, A>; PIECE],
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

    fn place() -> impl PinInit<Place<T, A>> {
        pin_init!(Place {
            entry <- new_spinlock_irq!(Entry {
                generation: 0,
                channel: 0,
                extensions: 0,
                state: State::Free,
            }, "storvsc_place"),
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

    /// Starts sending the command with this tag on `channel`. `None` if the place is in use: the
    /// command must wait.
    pub(crate) fn begin(&self, tag: UniqueTag, channel: u16) -> Option<RequestId> {
        let index = self.index(tag)?;
        let mut entry = self.at(index)?.lock();
        match core::mem::replace(&mut entry.state, State::Sending(None)) {
            State::Free => (),
            // The kernel has used the tag again, so that its error handler is through with the old
            // command.
            State::Abandoned(old) => old.forget(),
            busy => {
                entry.state = busy;
                return None;
            }
        }
        entry.generation = entry.generation.wrapping_add(1) & RequestId::GENERATION_MASK;
        entry.channel = channel;
        entry.extensions = 0;
        Some(RequestId {
            index,
            generation: entry.generation,
        })
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
    ) -> Result<(), (Command<T>, Early<A>)> {
        let Some(place) = self.at(id.index) else {
            return Err((cmd, Early::Failed(HostByte::ERROR)));
        };
        let mut entry = place.lock();
        match core::mem::replace(&mut entry.state, State::Free) {
            State::Sending(None) => {
                entry.state = State::Sent(cmd);
                Ok(())
            }
            State::Sending(Some(early)) => Err((cmd, early)),
            // Nobody else leaves the state `Sending`.
            other => {
                entry.state = other;
                Err((cmd, Early::Failed(HostByte::ERROR)))
            }
        }
    }

    /// The command could not be sent. Says whether it has come to its end all the same.
    pub(crate) fn cancel(&self, id: RequestId) -> Option<Early<A>> {
        let mut entry = self.at(id.index)?.lock();
        match core::mem::replace(&mut entry.state, State::Free) {
            State::Sending(early) => early,
            other => {
                entry.state = other;
                None
            }
        }
    }

    /// The host has answered the request `id` on `channel`.
    pub(crate) fn answer(&self, id: u64, channel: u16, answer: A) -> Answered<T, A> {
        let Some((id, place)) =
            RequestId::from_wire(id).and_then(|id| Some((id, self.at(id.index)?)))
        else {
            return Answered::Unknown;
        };
        let mut entry = place.lock();
        if entry.generation != id.generation || entry.channel != channel {
            return Answered::Unknown;
        }
        match core::mem::replace(&mut entry.state, State::Free) {
            State::Sent(cmd) => Answered::Command(cmd, answer),
            State::Sending(None) => {
                entry.state = State::Sending(Some(Early::Answered(answer)));
                Answered::Deferred
            }
            State::Abandoned(cmd) => {
                // Under the lock: the error handler uses the command again as soon as it sees that
                // the place is free.
                cmd.leave_to_error_handler();
                Answered::Late
            }
            other => {
                entry.state = other;
                Answered::Unknown
            }
        }
    }

    /// The command with this tag has timed out. Gives it its time again, at most `max` times; says
    /// whether it did.
    pub(crate) fn extend(&self, tag: UniqueTag, max: u32) -> bool {
        let Some(place) = self.index(tag).and_then(|index| self.at(index)) else {
            return false;
        };
        let mut entry = place.lock();
        let extend = entry.extensions < max;
        if extend {
            entry.extensions += 1;
        }
        extend
    }

    /// The command with this tag is left to the kernel's error handler. Says whether it could be: if
    /// not, it is just being ended.
    pub(crate) fn abandon(&self, tag: UniqueTag) -> bool {
        let Some(place) = self.index(tag).and_then(|index| self.at(index)) else {
            return false;
        };
        let mut entry = place.lock();
        let abandoned;
        (entry.state, abandoned) = match core::mem::replace(&mut entry.state, State::Free) {
            State::Sent(cmd) => (State::Abandoned(cmd), true),
            other => (other, false),
        };
        abandoned
    }

    /// Ends all commands that were sent on `channel`, or on any if it is `None`, with `host`.
    pub(crate) fn fail(&self, channel: Option<u16>, host: HostByte) {
        for piece in &self.pieces {
            for place in &piece.places {
                let mut entry = place.entry.lock();
                if channel.is_some_and(|channel| channel != entry.channel) {
                    continue;
                }
                match core::mem::replace(&mut entry.state, State::Free) {
                    State::Free => (),
                    State::Sending(early) => {
                        let early = early.unwrap_or(Early::Failed(host));
                        entry.state = State::Sending(Some(early));
                    }
                    State::Sent(cmd) => {
                        drop(entry);
                        cmd.complete(crate::scsi::Outcome::failed(host));
                    }
                    State::Abandoned(cmd) => cmd.leave_to_error_handler(),
                }
            }
        }
    }

    /// How many commands are in flight.
    pub(crate) fn count(&self) -> usize {
        self.pieces
            .iter()
            .flat_map(|piece| &piece.places)
            .filter(|place| !matches!(place.entry.lock().state, State::Free))
            .count()
    }
}
