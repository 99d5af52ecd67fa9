// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Requests that a driver sends under tags which somebody else hands out: the life of one of them.
//!
//! Where the upper layer gives each request a tag (SCSI, block), the tag is the request's place in a
//! table, so that nothing is searched, allocated or shared between requests: each [`Place`] is kept
//! under a lock of its own. ([`crate::slots`] is for requests without tags.)
//!
//! What the peer says is checked against the place: an id that was not sent, was sent on another
//! channel, was answered already, or belonged to an earlier user of the tag finds nothing. Whoever
//! gets the request out of its place owns it and ends it; so it ends exactly once, whatever races there
//! are between an answer, a rescind, a reset and a timeout.
//!
//! ```text
//!            begin               commit                 answer, fail
//!     Free ---------> Sending ------------> Sent ---------------------> Free
//!      ^                 |                    |
//!      |    cancel, or   |                    | abandon (the upper layer has taken it back)
//!      +-- ended early --+                    v
//!      ^                                  Abandoned
//!      +---------- answer, fail --------------+
//! ```
//!
//! While a request is being written to a ring it still belongs to the sender. An answer that comes
//! before the sender is done (on another CPU, or from a peer that guesses) waits in the place, and the
//! sender ends the request.
//!
//! Data and state only: nothing here locks, waits, allocates or panics. Uses `core` only.

use core::mem::replace;

/// A request id: the number of a place plus one in the low 32 bits, a generation in the 31 bits above
/// them.
///
/// It is never 0, which means "no request" on the wire. Bit 63 is clear; ids that have it set are for
/// requests without tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId {
    /// Number of the place.
    pub index: u32,
    /// How many requests have used the place before, modulo 2^31.
    pub generation: u32,
}

impl RequestId {
    /// Bits of a generation.
    const GENERATION_MASK: u32 = u32::MAX >> 1;

    /// The id as it goes over the bus.
    pub const fn to_wire(self) -> u64 {
        let generation = self.generation & Self::GENERATION_MASK;
        // At most 2^32, which is added to a number whose low half is zero.
        (generation as u64) << 32 | (self.index as u64).saturating_add(1)
    }

    /// An id from the bus; `None` if no request can have it.
    pub const fn from_wire(id: u64) -> Option<Self> {
        let (low, generation) = (id as u32, (id >> 32) as u32);
        if generation > Self::GENERATION_MASK {
            return None;
        }
        match low.checked_sub(1) {
            Some(index) => Some(Self { index, generation }),
            None => None,
        }
    }
}

/// Why a request that is being sent has already come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Early<A, E> {
    /// The peer has answered it.
    Answered(A),
    /// It must end for this reason.
    Failed(E),
}

/// What an answer of the peer was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered<R, A> {
    /// The request is the caller's to end, with the answer.
    Request(R, A),
    /// The sender will end the request.
    Deferred,
    /// The upper layer had taken the request back already; what was held for it can be released.
    Late(R),
    /// No request waits for such an answer: the peer made a mistake.
    Unknown,
}

/// What became of a request that is to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed<R> {
    /// The request is the caller's to end.
    Request(R),
    /// The upper layer had taken the request back already; what was held for it can be released.
    Abandoned(R),
    /// There is none, or the sender will end it.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State<R, A, E> {
    Free,
    Sending(Option<Early<A, E>>),
    Sent(R),
    Abandoned(R),
}

/// The place of one request `R`, whose answer is an `A`, and which can fail for a reason `E`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<R, A, E> {
    generation: u32,
    /// Number of the channel that the request is sent on.
    channel: u16,
    /// How many times the request was given its time again.
    extensions: u32,
    state: State<R, A, E>,
}

impl<R, A, E> Place<R, A, E> {
    /// An empty place.
    pub const fn new() -> Self {
        Self {
            generation: 0,
            channel: 0,
            extensions: 0,
            state: State::Free,
        }
    }

    /// Whether there is no request.
    pub fn is_free(&self) -> bool {
        matches!(self.state, State::Free)
    }

    /// Starts to send a request on `channel`. Returns the generation of its id, and an abandoned
    /// request that was still here: the upper layer uses its tag again, so that it must not be touched
    /// any more. `None` if the place is in use, and the request must wait.
    pub fn begin(&mut self, channel: u16) -> Option<(u32, Option<R>)> {
        let old = match replace(&mut self.state, State::Sending(None)) {
            State::Free => None,
            State::Abandoned(old) => Some(old),
            busy => {
                self.state = busy;
                return None;
            }
        };
        self.generation = self.generation.wrapping_add(1) & RequestId::GENERATION_MASK;
        self.channel = channel;
        self.extensions = 0;
        Some((self.generation, old))
    }

    /// The request was sent: from now on it belongs to the place.
    ///
    /// # Errors
    /// Gives the request back if it has come to its end meanwhile; the caller ends it. No reason is
    /// given if [`Place::begin`] was not called for it.
    pub fn commit(&mut self, request: R) -> Result<(), (R, Option<Early<A, E>>)> {
        match replace(&mut self.state, State::Free) {
            State::Sending(None) => {
                self.state = State::Sent(request);
                Ok(())
            }
            State::Sending(early) => Err((request, early)),
            other => {
                self.state = other;
                Err((request, None))
            }
        }
    }

    /// The request could not be sent. Says whether it has come to its end all the same.
    pub fn cancel(&mut self) -> Option<Early<A, E>> {
        match replace(&mut self.state, State::Free) {
            State::Sending(early) => early,
            other => {
                self.state = other;
                None
            }
        }
    }

    /// The peer has answered the request with this generation on `channel`.
    pub fn answer(&mut self, generation: u32, channel: u16, answer: A) -> Answered<R, A> {
        if self.generation != generation || self.channel != channel {
            return Answered::Unknown;
        }
        match replace(&mut self.state, State::Free) {
            State::Sent(request) => Answered::Request(request, answer),
            State::Sending(None) => {
                self.state = State::Sending(Some(Early::Answered(answer)));
                Answered::Deferred
            }
            State::Abandoned(request) => Answered::Late(request),
            other => {
                self.state = other;
                Answered::Unknown
            }
        }
    }

    /// The request has timed out. Gives it its time again, at most `max` times; says whether it did.
    pub fn extend(&mut self, max: u32) -> bool {
        let extend = self.extensions < max;
        if extend {
            self.extensions = self.extensions.saturating_add(1);
        }
        extend
    }

    /// The upper layer takes the request back, without the peer having answered. Says whether it can:
    /// if not, the request is just being ended.
    pub fn abandon(&mut self) -> bool {
        let abandoned;
        (self.state, abandoned) = match replace(&mut self.state, State::Free) {
            State::Sent(request) => (State::Abandoned(request), true),
            other => (other, false),
        };
        abandoned
    }

    /// The request will not be answered any more if it was sent on `channel`, or on any if that is
    /// `None`.
    pub fn fail(&mut self, channel: Option<u16>, reason: E) -> Failed<R> {
        if channel.is_some_and(|channel| channel != self.channel) {
            return Failed::Nothing;
        }
        match replace(&mut self.state, State::Free) {
            State::Free => Failed::Nothing,
            State::Sending(early) => {
                self.state = State::Sending(early.or(Some(Early::Failed(reason))));
                Failed::Nothing
            }
            State::Sent(request) => Failed::Request(request),
            State::Abandoned(request) => Failed::Abandoned(request),
        }
    }
}

impl<R, A, E> Default for Place<R, A, E> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type TestPlace = Place<u32, char, &'static str>;

    #[test]
    fn ids_on_the_wire() {
        let first = RequestId {
            index: 0,
            generation: 0,
        };
        assert_eq!(first.to_wire(), 1);
        let last = RequestId {
            index: u32::MAX - 1,
            generation: u32::MAX >> 1,
        };
        assert_eq!(last.to_wire(), u64::MAX >> 1);
        assert_eq!(RequestId::from_wire(last.to_wire()), Some(last));
        for bad in [0, 1 << 32, 1 << 63, 1 << 63 | 1] {
            assert_eq!(RequestId::from_wire(bad), None);
        }
    }

    #[test]
    fn request_is_answered_once() {
        let mut place = TestPlace::new();
        let (generation, old) = place.begin(3).unwrap();
        assert_eq!(old, None);
        assert_eq!(place.begin(3), None);
        assert_eq!(place.commit(7), Ok(()));
        assert_eq!(place.answer(generation, 2, 'a'), Answered::Unknown);
        assert_eq!(place.answer(generation + 1, 3, 'a'), Answered::Unknown);
        assert_eq!(place.answer(generation, 3, 'a'), Answered::Request(7, 'a'));
        assert_eq!(place.answer(generation, 3, 'a'), Answered::Unknown);
        assert!(place.is_free());
        assert_ne!(place.begin(3).unwrap().0, generation);
        assert_eq!(place.answer(generation, 3, 'a'), Answered::Unknown);
    }

    #[test]
    fn early_answer_waits_for_the_sender() {
        let mut place = TestPlace::new();
        let (generation, _) = place.begin(0).unwrap();
        assert_eq!(place.answer(generation, 0, 'x'), Answered::Deferred);
        // The second one is a mistake, and a rescind comes too late.
        assert_eq!(place.answer(generation, 0, 'y'), Answered::Unknown);
        assert_eq!(place.fail(None, "rescind"), Failed::Nothing);
        assert_eq!(place.commit(9), Err((9, Some(Early::Answered('x')))));
        assert!(place.is_free());

        // Answered although it was not sent: the sender learns of it.
        let (generation, _) = place.begin(0).unwrap();
        assert_eq!(place.answer(generation, 0, 'x'), Answered::Deferred);
        assert_eq!(place.cancel(), Some(Early::Answered('x')));

        // Not sent, not ended.
        place.begin(0).unwrap();
        assert_eq!(place.cancel(), None);
        assert!(place.is_free());
    }

    #[test]
    fn rescind_while_it_is_sent() {
        let mut place = TestPlace::new();
        place.begin(1).unwrap();
        assert_eq!(place.fail(Some(2), "other channel"), Failed::Nothing);
        assert_eq!(place.fail(Some(1), "rescind"), Failed::Nothing);
        assert_eq!(place.commit(5), Err((5, Some(Early::Failed("rescind")))));
        place.begin(1).unwrap();
        assert_eq!(place.commit(6), Ok(()));
        assert_eq!(place.fail(None, "rescind"), Failed::Request(6));
        assert_eq!(place.fail(None, "rescind"), Failed::Nothing);
    }

    #[test]
    fn timeout() {
        let mut place = TestPlace::new();
        let (generation, _) = place.begin(0).unwrap();
        // It is not the table's yet.
        assert!(!place.abandon());
        place.commit(1).unwrap();
        assert!(place.extend(2) && place.extend(2) && !place.extend(2));
        assert!(place.abandon());
        assert!(!place.abandon());
        assert_eq!(place.answer(generation, 0, 'z'), Answered::Late(1));

        let (generation, _) = place.begin(0).unwrap();
        place.commit(2).unwrap();
        assert!(place.extend(2), "a new request has its own time");
        assert!(place.abandon());
        assert_eq!(place.fail(None, "reset"), Failed::Abandoned(2));
        assert_eq!(place.answer(generation, 0, 'z'), Answered::Unknown);

        place.begin(0).unwrap();
        place.commit(3).unwrap();
        assert!(place.abandon());
        // The tag is used again before any reset.
        assert_eq!(place.begin(0).unwrap().1, Some(3));
    }

    #[test]
    fn commit_without_begin() {
        let mut place = TestPlace::new();
        assert_eq!(place.commit(1), Err((1, None)));
        place.begin(0).unwrap();
        place.commit(2).unwrap();
        assert_eq!(place.commit(3), Err((3, None)));
        assert_eq!(place.cancel(), None);
        assert_eq!(place.fail(None, "end"), Failed::Request(2));
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Begin(u16),
        Commit,
        Cancel,
        Answer { stale: u32, channel: u16 },
        Fail(Option<u16>),
        Abandon,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..2u16).prop_map(Step::Begin),
            Just(Step::Commit),
            Just(Step::Cancel),
            (0..3u32, 0..2u16).prop_map(|(stale, channel)| Step::Answer { stale, channel }),
            proptest::option::of(0..2u16).prop_map(Step::Fail),
            Just(Step::Abandon),
        ]
    }

    proptest! {
        #[test]
        fn wire_round_trip(id in any::<u64>()) {
            if let Some(parsed) = RequestId::from_wire(id) {
                prop_assert_eq!(parsed.to_wire(), id);
            }
        }

        /// Whatever happens in whatever order: every request that began ends once, and only a right
        /// answer counts as one.
        #[test]
        fn every_request_ends_once(steps in proptest::collection::vec(step(), 1..200)) {
            let mut place: Place<u32, u32, ()> = Place::new();
            // The sender holds request `number` from begin to commit or cancel.
            let mut held: Option<u32> = None;
            let (mut number, mut generation, mut channel) = (0u32, 0u32, 0u16);
            let mut ended = std::collections::BTreeSet::new();
            let mut end = |request: u32| assert!(ended.insert(request), "{request} ended twice");
            for step in steps {
                match step {
                    Step::Begin(on) => {
                        // The upper layer does not use a tag twice, unless it took the first one back.
                        if held.is_none() && may_begin(&place) {
                            if let Some((new, old)) = place.begin(on) {
                                number += 1;
                                held = Some(number);
                                (generation, channel) = (new, on);
                                if let Some(old) = old {
                                    end(old);
                                }
                            }
                        }
                    }
                    Step::Commit => if let Some(request) = held.take() {
                        if let Err((request, early)) = place.commit(request) {
                            prop_assert!(early.is_some());
                            end(request);
                        }
                    },
                    Step::Cancel => if let Some(request) = held.take() {
                        // Ended early, or given back to the upper layer: an end in any case.
                        place.cancel();
                        end(request);
                    },
                    Step::Answer { stale, channel: on } => {
                        match place.answer(generation.wrapping_sub(stale), on, number) {
                            Answered::Request(request, _) | Answered::Late(request) => {
                                prop_assert!(stale == 0 && on == channel);
                                prop_assert_eq!(request, number);
                                end(request);
                            }
                            Answered::Deferred => prop_assert_eq!(held, Some(number)),
                            Answered::Unknown => (),
                        }
                    }
                    Step::Fail(on) => match place.fail(on, ()) {
                        Failed::Request(request) | Failed::Abandoned(request) => end(request),
                        Failed::Nothing => (),
                    },
                    Step::Abandon => { place.abandon(); }
                }
            }
            if let Some(request) = held.take() {
                match place.commit(request) {
                    Ok(()) => (),
                    Err((request, _)) => end(request),
                }
            }
            match place.fail(None, ()) {
                Failed::Request(request) | Failed::Abandoned(request) => end(request),
                Failed::Nothing => (),
            }
            prop_assert!(place.is_free());
            prop_assert_eq!(ended.len() as u32, number);
        }
    }

    fn may_begin(place: &Place<u32, u32, ()>) -> bool {
        matches!(place.state, State::Free | State::Abandoned(_))
    }
}
