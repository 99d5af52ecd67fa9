// SPDX-License-Identifier: GPL-2.0 OR MIT

//! How host and guest agree on versions.
//!
//! The host lists what it knows; the guest answers with one version of the frame and one of the
//! service, or with none.

use super::Version;
use crate::message::{read_prefix, split_prefix};
use core::fmt;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes as _, IntoBytes as _};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The longest list of versions that a guest reads
/// (`IC_VERSION_NEGOTIATION_MAX_VER_COUNT` in `linux/hyperv.h`).
pub const MAX_VERSIONS: usize = 100;

/// What the body of a negotiation starts with. The versions follow: first those of the frame, then
/// those of the service.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Counts {
    /// Number of versions of the frame.
    pub frame: U16,
    /// Number of versions of the service.
    pub message: U16,
    /// Zero.
    pub reserved: U32,
}

/// Size of an answer's body: the counts and one version of each kind.
pub(super) const ANSWER_SIZE: u16 = 16;

/// What both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Version of the frame.
    pub frame: Version,
    /// Version of the service.
    pub message: Version,
}

impl fmt::Display for Agreed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (frame {})", self.message, self.frame)
    }
}

/// The lists do not fit the message, or are too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadLists {
    /// Number of versions of the frame.
    pub frame: u16,
    /// Number of versions of the service.
    pub message: u16,
}

/// The versions of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered<'a> {
    /// Of the frame.
    pub frame: &'a [Version],
    /// Of the service.
    pub message: &'a [Version],
}

impl<'a> Offered<'a> {
    /// Reads the body of a negotiation. The outer `None` means that there is not even room for the
    /// counts.
    pub fn parse(body: &'a [u8]) -> Option<Result<Self, BadLists>> {
        let (counts, rest): (Counts, _) = split_prefix(body)?;
        let bad = BadLists {
            frame: counts.frame.get(),
            message: counts.message.get(),
        };
        Some(Self::lists(bad, rest).ok_or(bad))
    }

    fn lists(counts: BadLists, rest: &'a [u8]) -> Option<Self> {
        let (frame, message) = (usize::from(counts.frame), usize::from(counts.message));
        if frame > MAX_VERSIONS || message > MAX_VERSIONS {
            return None;
        }
        let (frame, rest) = <[Version]>::ref_from_prefix_with_elems(rest, frame).ok()?;
        let (message, _) = <[Version]>::ref_from_prefix_with_elems(rest, message).ok()?;
        Some(Self { frame, message })
    }

    /// Picks the first of `frame` and the first of `message` that the host knows. `None` if there
    /// is none of one kind.
    pub fn choose(&self, frame: &[Version], message: &[Version]) -> Option<Agreed> {
        let pick = |ours: &[Version], theirs: &[Version]| {
            ours.iter().find(|ours| theirs.contains(ours)).copied()
        };
        Some(Agreed {
            frame: pick(frame, self.frame)?,
            message: pick(message, self.message)?,
        })
    }
}

/// What the guest's answer begins with. Without a common version both counts are 0, and the
/// versions do not matter.
pub(super) fn answer(agreed: Option<Agreed>) -> [u8; ANSWER_SIZE as usize] {
    let count = u16::from(agreed.is_some());
    let counts = Counts {
        frame: count.into(),
        message: count.into(),
        reserved: U32::ZERO,
    };
    let (frame, message) = match agreed {
        Some(agreed) => (agreed.frame, agreed.message),
        None => (Version::new(0, 0), Version::new(0, 0)),
    };
    let mut bytes = [0; ANSWER_SIZE as usize];
    // The chunks have the sizes of their types.
    let parts = [counts.as_bytes(), frame.as_bytes(), message.as_bytes()];
    for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    bytes
}

/// The body of a host's question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    bytes: [u8; size_of::<Counts>() + 2 * MAX_VERSIONS * size_of::<Version>()],
    len: usize,
}

impl Question {
    /// Lists versions. `None` if there are more than [`MAX_VERSIONS`] of a kind.
    pub fn new(frame: &[Version], message: &[Version]) -> Option<Self> {
        if frame.len() > MAX_VERSIONS || message.len() > MAX_VERSIONS {
            return None;
        }
        let counts = Counts {
            frame: u16::try_from(frame.len()).ok()?.into(),
            message: u16::try_from(message.len()).ok()?.into(),
            reserved: U32::ZERO,
        };
        let mut this = Self {
            bytes: [0; size_of::<Counts>() + 2 * MAX_VERSIONS * size_of::<Version>()],
            len: 0,
        };
        for part in [counts.as_bytes(), frame.as_bytes(), message.as_bytes()] {
            let end = this.len.checked_add(part.len())?;
            this.bytes.get_mut(this.len..end)?.copy_from_slice(part);
            this.len = end;
        }
        Some(this)
    }

    /// The bytes of the body.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// What is wrong with the answer of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadAnswer {
    /// The body is too short for its counts.
    TooShort,
    /// The counts are neither 0 and 0 nor 1 and 1.
    Counts(BadLists),
    /// A version that the host did not list.
    NotOffered(Agreed),
}

/// Reads the body of a guest's answer to a question with these lists. `None` if the guest found no
/// common version.
pub fn parse_answer(
    body: &[u8],
    frame: &[Version],
    message: &[Version],
) -> Result<Option<Agreed>, BadAnswer> {
    let (counts, rest): (Counts, _) = split_prefix(body).ok_or(BadAnswer::TooShort)?;
    match (counts.frame.get(), counts.message.get()) {
        (0, 0) => Ok(None),
        (1, 1) => {
            let versions: [Version; 2] = read_prefix(rest).ok_or(BadAnswer::TooShort)?;
            let [chosen_frame, chosen_message] = versions;
            let agreed = Agreed {
                frame: chosen_frame,
                message: chosen_message,
            };
            if frame.contains(&chosen_frame) && message.contains(&chosen_message) {
                Ok(Some(agreed))
            } else {
                Err(BadAnswer::NotOffered(agreed))
            }
        }
        (frame, message) => Err(BadAnswer::Counts(BadLists { frame, message })),
    }
}
