// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's transmit path: which frames are copied to the send buffer, and how many go together.
//!
//! A small frame is copied to a section of the send buffer. If more are coming, the section waits for
//! them, and one packet announces all. When the next frame does not fit any more, but its head does,
//! the head is copied and the host gets the frame itself from the guest's pages. A large frame goes from
//! the pages altogether. [`Batcher`] decides; the driver copies and sends.
//!
//! [`SectionMap`] says which sections are free. It works on words that the caller provides
//! ([`Words`]): atomic ones if several CPUs use it without a lock.
//!
//! Uses `core` and modules of this crate.
//!
//! Source: `netvsc_send` in `drivers/net/hyperv/netvsc.c` of the kernel.

use super::control::Limits;
use super::frame::Head;
use super::nvsp::{ChannelType, RndisPacket};
use super::sections::Sections;

/// Words of a bit map.
pub trait Words {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Word `index`, which is less than [`Words::len`].
    fn load(&self, index: usize) -> u64;

    /// Changes word `index` from `old` to `new`; `false` if it is not `old` any more. What was written
    /// before to the memory of a section must be visible to whoever takes the section next.
    fn exchange(&self, index: usize, old: u64, new: u64) -> bool;
}

/// How often a change is tried again that another CPU has come before.
const TRIES: usize = 64;

/// Which sections are in use: a set bit for each.
#[derive(Debug)]
pub struct SectionMap<W> {
    words: W,
    count: u32,
}

impl<W: Words> SectionMap<W> {
    /// How many words a map of `count` sections needs.
    pub const fn words_needed(count: u32) -> usize {
        count.div_ceil(64) as usize
    }

    /// A map of `count` sections, or of as many as there are bits. All words must be zero.
    pub fn new(words: W, count: u32) -> Self {
        let bits = u32::try_from(words.len().saturating_mul(64)).unwrap_or(u32::MAX);
        Self {
            words,
            count: count.min(bits),
        }
    }

    /// Takes a free section; `None` if there is none. The search begins at `hint`: give each CPU
    /// another one, so that they do not meet.
    pub fn take(&self, hint: u32) -> Option<u32> {
        let words = Self::words_needed(self.count);
        let start = (hint / 64) as usize;
        for n in 0..words {
            let index = start.wrapping_add(n).checked_rem(words)?;
            for _ in 0..TRIES {
                let word = self.words.load(index);
                let bit = (!word).trailing_zeros();
                let section = u32::try_from(index)
                    .ok()?
                    .checked_mul(64)?
                    .checked_add(bit)?;
                if bit >= 64 || section >= self.count {
                    break;
                }
                if self.words.exchange(index, word, word | 1 << bit) {
                    return Some(section);
                }
            }
        }
        None
    }

    /// Gives a section back. `false` if it was not in use.
    pub fn give(&self, section: u32) -> bool {
        if section >= self.count {
            return false;
        }
        let (index, bit) = ((section / 64) as usize, section % 64);
        loop {
            let word = self.words.load(index);
            if word & 1 << bit == 0 {
                return false;
            }
            if self.words.exchange(index, word, word & !(1 << bit)) {
                return true;
            }
        }
    }

    /// How many sections are in use.
    pub fn used(&self) -> u32 {
        (0..Self::words_needed(self.count))
            .map(|index| self.words.load(index).count_ones())
            .fold(0, u32::saturating_add)
    }

    /// Number of sections.
    pub fn count(&self) -> u32 {
        self.count
    }
}

/// A section with messages in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Index of the section.
    pub section: u32,
    /// How many bytes of it are used.
    pub used: u32,
    /// Number of messages in it.
    pub packets: u32,
}

impl Batch {
    /// The message that announces it to the host.
    pub fn message(&self) -> RndisPacket {
        RndisPacket::in_section(ChannelType::DATA, self.section, self.used)
    }
}

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Copy head and frame to `offset` of the section, and fill `padding` bytes after them with zeros.
    Copy {
        /// Index of the section.
        section: u32,
        /// Where in the section, in bytes.
        offset: u32,
        /// How many zeros follow.
        padding: u32,
    },
    /// Copy the head to `offset` of the section, and give the pages of the frame to the host in a
    /// GPA-direct packet.
    CopyHead {
        /// Index of the section.
        section: u32,
        /// Where in the section, in bytes.
        offset: u32,
    },
    /// Give the pages of head and frame to the host in a GPA-direct packet.
    Direct,
}

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Send this section before anything else. The frame is not in it.
    pub before: Option<Batch>,
    /// Where the frame goes.
    pub place: Place,
    /// Send this section with the frame, after it was copied. `None` if more frames may follow it, or
    /// the frame is in no section.
    pub send: Option<Batch>,
    /// The frame was to be copied, but no section was free.
    pub no_section: bool,
}

/// Puts the frames of one channel together.
#[derive(Clone, Copy, Debug)]
pub struct Batcher {
    section_size: u32,
    alignment: u32,
    max_packets: u32,
    pending: Option<Batch>,
}

impl Batcher {
    /// For sections of the send buffer, with the limits that the host has named.
    pub fn new(sections: &Sections, limits: &Limits) -> Self {
        Self {
            section_size: sections.size(),
            alignment: limits.alignment,
            max_packets: limits.max_packets,
            pending: None,
        }
    }

    /// The section that waits for more frames, which it will not get: send it.
    pub fn flush(&mut self) -> Option<Batch> {
        self.pending.take()
    }

    /// Whether a section waits for more frames.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Decides where the frame with this head goes. `more` says that another one follows at once.
    /// `take` finds a free section. A head whose frame is padded is changed.
    pub fn place(
        &mut self,
        head: &mut Head,
        more: bool,
        take: impl FnOnce() -> Option<u32>,
    ) -> Plan {
        let direct = |before, no_section| Plan {
            before,
            place: Place::Direct,
            send: None,
            no_section,
        };
        let old = self.pending.take();
        let open = old.filter(|batch| batch.packets < self.max_packets);
        if let Some(batch) = open {
            if self.fits(batch.used, head.message_length()) {
                return self.copy(batch, head, more, None);
            }
            if let Some(used) = batch.used.checked_add(head.size()) {
                if used <= self.section_size {
                    return Plan {
                        before: None,
                        place: Place::CopyHead {
                            section: batch.section,
                            offset: batch.used,
                        },
                        send: Some(Batch {
                            used,
                            packets: batch.packets.saturating_add(1),
                            ..batch
                        }),
                        no_section: false,
                    };
                }
            }
        }
        if !self.fits(0, head.message_length()) {
            return direct(old, false);
        }
        match take() {
            Some(section) => {
                let empty = Batch {
                    section,
                    used: 0,
                    packets: 0,
                };
                self.copy(empty, head, more, old)
            }
            None => direct(old, true),
        }
    }

    /// Whether a message fits behind `used` bytes, padded for the next one.
    fn fits(&self, used: u32, message_length: u32) -> bool {
        used.checked_add(message_length)
            .and_then(|end| end.checked_next_multiple_of(self.alignment))
            .is_some_and(|end| end <= self.section_size)
    }

    /// Puts head and frame behind what is in `batch`.
    fn copy(&mut self, batch: Batch, head: &mut Head, more: bool, before: Option<Batch>) -> Plan {
        let length = head.message_length();
        let padded = length.checked_next_multiple_of(self.alignment);
        let padding = padded
            .filter(|_| more)
            .map_or(0, |padded| padded.saturating_sub(length));
        // `fits` has seen that this is not too long.
        let padding = if head.pad(padding) { padding } else { 0 };
        let after = Batch {
            used: batch.used.saturating_add(head.message_length()),
            packets: batch.packets.saturating_add(1),
            ..batch
        };
        if more {
            self.pending = Some(after);
        }
        Plan {
            before,
            place: Place::Copy {
                section: batch.section,
                offset: batch.used,
                padding,
            },
            send: (!more).then_some(after),
            no_section: false,
        }
    }
}
