// SPDX-License-Identifier: GPL-2.0 OR MIT

//! GPADLs: how guest memory gets an id that the host understands.
//!
//! The guest describes the memory as ranges of page frames, and sends the description in one
//! GPADL_HEADER (up to 26 frame numbers) and as many GPADL_BODY messages (up to 28 each) as it
//! takes. [`GpadlMessages`] makes these messages on the guest's side; [`GpadlAssembler`] takes
//! them on the host's side and hands out ranges and frames. Neither of them allocates, and both
//! are bounded by the 16 bits that the header has for the length of the ranges.
//!
//! Source: `struct vmbus_channel_gpadl_header` and the comment before it in `linux/hyperv.h`;
//! `create_gpadl_header()` in `drivers/hv/channel.c`.
//!
//! ```
//! use hv_proto::gpadl::{GpadlAssembler, GpadlItem, GpadlMessages, Progress};
//! use hv_proto::ids::{ChannelId, GpadlId};
//! use hv_proto::message::GuestMessage;
//! use hv_proto::version::Version;
//!
//! // The guest: 100 pages from frame 0x1000 on.
//! let pfn = |page: u32| 0x1000 + u64::from(page);
//! let messages =
//!     GpadlMessages::new(ChannelId::new(3), GpadlId::FIRST, 100 * 4096, 0, pfn).unwrap();
//! assert_eq!(messages.message_count(), 4);
//!
//! // The host.
//! let mut assembler = None;
//! let mut frames = Vec::new();
//! let sink = |item| {
//!     if let GpadlItem::Pfn(pfn) = item {
//!         frames.push(pfn);
//!     }
//! };
//! let mut sink = sink;
//! let mut done = false;
//! for message in messages {
//!     let progress = match GuestMessage::parse(&message, Some(Version::V5_3)).unwrap() {
//!         GuestMessage::GpadlHeader(header, words) => {
//!             let (new, progress) = GpadlAssembler::start(&header, words, &mut sink).unwrap();
//!             assembler = Some(new);
//!             progress
//!         }
//!         GuestMessage::GpadlBody(body, words) => {
//!             assembler.as_mut().unwrap().add(&body, words, &mut sink).unwrap()
//!         }
//!         other => panic!("{other:?}"),
//!     };
//!     done = progress == Progress::Complete;
//! }
//! assert!(done && frames.len() == 100 && frames[99] == 0x1063);
//! ```

use crate::ids::{ChannelId, GpadlId};
use crate::message::{
    GpadlBody, GpadlHeader, Message, MessageBuf, GPADL_BODY_PFNS, GPADL_HEADER_PFNS,
};
use crate::packet::pages_spanned;
use crate::PAGE_SIZE;
use core::fmt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::IntoBytes;

/// Bytes of a range before its frame numbers: length and offset.
const RANGE_HEADER_SIZE: u32 = 8;
/// Bytes of a frame number.
const PFN_SIZE: u32 = 8;

/// Most pages of one GPADL of a single range: the length of the ranges has 16 bits.
pub const MAX_PAGES: u32 = (u16::MAX as u32 - RANGE_HEADER_SIZE) / PFN_SIZE;

const _: () = assert!(MAX_PAGES == 8190);

/// Why a GPADL cannot be described, or a description cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GpadlError {
    /// The GPADL's id is 0, or the channel's id is none that a channel can have.
    InvalidId,
    /// A range has no bytes, or there is no range.
    Empty,
    /// A range's offset is not within its first page.
    InvalidOffset {
        /// The offset, in bytes.
        byte_offset: u32,
    },
    /// More pages than a description has room for.
    TooLarge {
        /// Pages that the range touches.
        pages: u64,
    },
    /// The length of the ranges is no multiple of 8, or too short for their number.
    InvalidLength {
        /// The length, in bytes.
        range_buf_len: u16,
    },
    /// A range's bytes need another number of frame numbers than the description has.
    CountMismatch,
    /// A body came for another GPADL.
    WrongId {
        /// The id that came.
        gpadl_id: GpadlId,
    },
    /// A body came without any frame number.
    EmptyBody,
    /// A body came after the last range was complete, or after an error.
    NotExpected,
}

impl fmt::Display for GpadlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidId => f.write_str("GPADL or channel id is not valid"),
            Self::Empty => f.write_str("GPADL without memory"),
            Self::InvalidOffset { byte_offset } => {
                write!(
                    f,
                    "GPADL range starts {byte_offset} bytes into its first page"
                )
            }
            Self::TooLarge { pages } => write!(f, "GPADL range of {pages} pages is too large"),
            Self::InvalidLength { range_buf_len } => {
                write!(f, "GPADL ranges of {range_buf_len} bytes are not possible")
            }
            Self::CountMismatch => f.write_str("GPADL range and number of its frames do not match"),
            Self::WrongId { gpadl_id } => write!(f, "GPADL body for {gpadl_id:?}"),
            Self::EmptyBody => f.write_str("GPADL body without frames"),
            Self::NotExpected => f.write_str("GPADL body was not expected"),
        }
    }
}

impl core::error::Error for GpadlError {}

/// The guest's side: an iterator over the messages that describe one range of memory.
///
/// The frame numbers come from a closure, which is asked once for each page, in order, only when
/// the message with it is made.
#[derive(Clone, Debug)]
pub struct GpadlMessages<F> {
    channel_id: ChannelId,
    gpadl_id: GpadlId,
    byte_count: u32,
    byte_offset: u32,
    pages: u32,
    next_page: u32,
    pfn: F,
}

impl<F: FnMut(u32) -> u64> GpadlMessages<F> {
    /// Describes `byte_count` bytes which start `byte_offset` bytes into the first page;
    /// `pfn(n)` is the frame number of page `n`, counted from 0.
    ///
    /// # Errors
    ///
    /// [`GpadlError::InvalidId`], [`Empty`](GpadlError::Empty),
    /// [`InvalidOffset`](GpadlError::InvalidOffset), and [`TooLarge`](GpadlError::TooLarge) for
    /// more than [`MAX_PAGES`] pages.
    pub fn new(
        channel_id: ChannelId,
        gpadl_id: GpadlId,
        byte_count: u32,
        byte_offset: u32,
        pfn: F,
    ) -> Result<Self, GpadlError> {
        if gpadl_id.get() == 0 || !channel_id.is_valid() {
            return Err(GpadlError::InvalidId);
        }
        let pages = check_range(byte_count, byte_offset)?;
        Ok(Self {
            channel_id,
            gpadl_id,
            byte_count,
            byte_offset,
            pages,
            next_page: 0,
            pfn,
        })
    }

    /// Number of pages of the memory.
    pub fn page_count(&self) -> u32 {
        self.pages
    }

    /// Number of messages that describe all of it, those that were made already included.
    pub fn message_count(&self) -> u32 {
        let bodies = self.pages.saturating_sub(GPADL_HEADER_PFNS as u32);
        bodies.div_ceil(GPADL_BODY_PFNS as u32).saturating_add(1)
    }

    /// Adds up to `max` frame numbers.
    fn append_pfns(&mut self, message: &mut MessageBuf, max: usize) {
        let left = self.pages.saturating_sub(self.next_page);
        let end = self.next_page.saturating_add(left.min(max as u32));
        while self.next_page < end {
            let pfn = U64::new((self.pfn)(self.next_page));
            let fits = message.append(pfn.as_bytes());
            debug_assert!(fits);
            self.next_page = self.next_page.saturating_add(1);
        }
    }
}

impl<F: FnMut(u32) -> u64> Iterator for GpadlMessages<F> {
    type Item = MessageBuf;

    fn next(&mut self) -> Option<MessageBuf> {
        if self.next_page >= self.pages {
            return None;
        }
        if self.next_page == 0 {
            // At most 8 + 8190 * 8, which has 16 bits.
            let range_buf_len = self
                .pages
                .saturating_mul(PFN_SIZE)
                .saturating_add(RANGE_HEADER_SIZE);
            let mut message = GpadlHeader {
                channel_id: self.channel_id,
                gpadl_id: self.gpadl_id,
                range_buf_len: U16::new(range_buf_len as u16),
                range_count: U16::new(1),
            }
            .encode();
            let range = [U32::new(self.byte_count), U32::new(self.byte_offset)];
            let fits = message.append(range.as_bytes());
            debug_assert!(fits);
            self.append_pfns(&mut message, GPADL_HEADER_PFNS);
            Some(message)
        } else {
            let mut message = GpadlBody {
                message_number: U32::ZERO,
                gpadl_id: self.gpadl_id,
            }
            .encode();
            self.append_pfns(&mut message, GPADL_BODY_PFNS);
            Some(message)
        }
    }
}

/// Checks a range, and returns the number of its pages: 1 to [`MAX_PAGES`].
fn check_range(byte_count: u32, byte_offset: u32) -> Result<u32, GpadlError> {
    if byte_count == 0 {
        return Err(GpadlError::Empty);
    }
    if byte_offset as usize >= PAGE_SIZE {
        return Err(GpadlError::InvalidOffset { byte_offset });
    }
    let pages = pages_spanned(byte_offset, byte_count);
    match u32::try_from(pages) {
        Ok(pages) if pages <= MAX_PAGES => Ok(pages),
        _ => Err(GpadlError::TooLarge { pages }),
    }
}

/// What the host's side finds in a description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpadlItem {
    /// A range starts; its frame numbers follow.
    Range {
        /// Length, in bytes; not 0.
        byte_count: u32,
        /// Where it starts in its first page, in bytes; below 4096.
        byte_offset: u32,
        /// Number of its pages: so many [`Pfn`](Self::Pfn) items follow.
        pages: u32,
    },
    /// The frame number of the next page of the range. It is any number that the guest likes.
    Pfn(u64),
}

/// Whether a description is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// GPADL_BODY messages must follow.
    More,
    /// All ranges are there.
    Complete,
}

/// The host's side: takes the messages that describe a GPADL, and hands out what is in them.
///
/// The items go to a sink (a closure), which gets at most 8191 of them in all. After an error the
/// GPADL must be refused, and what the sink got thrown away; more bodies for it are refused too.
#[derive(Clone, Debug)]
pub struct GpadlAssembler {
    channel_id: ChannelId,
    gpadl_id: GpadlId,
    /// 64-bit words of the description that have not come yet.
    words_left: u32,
    /// Ranges that have not started yet.
    ranges_left: u32,
    /// Frame numbers of the current range that have not come yet.
    pfns_left: u32,
}

impl GpadlAssembler {
    /// Takes GPADL_HEADER with the words that follow it in the message. Words after the length
    /// that the header names are padding.
    ///
    /// # Errors
    ///
    /// [`GpadlError`] when the ids or the length are not possible, or a range is not.
    pub fn start(
        header: &GpadlHeader,
        words: &[U64],
        sink: impl FnMut(GpadlItem),
    ) -> Result<(Self, Progress), GpadlError> {
        if header.gpadl_id.get() == 0 || !header.channel_id.is_valid() {
            return Err(GpadlError::InvalidId);
        }
        let range_count = u32::from(header.range_count.get());
        if range_count == 0 {
            return Err(GpadlError::Empty);
        }
        let range_buf_len = header.range_buf_len.get();
        let words_left = u32::from(range_buf_len) / 8;
        // Each range has its own header and at least one page.
        if range_buf_len % 8 != 0 || words_left / 2 < range_count {
            return Err(GpadlError::InvalidLength { range_buf_len });
        }
        let mut assembler = Self {
            channel_id: header.channel_id,
            gpadl_id: header.gpadl_id,
            words_left,
            ranges_left: range_count,
            pfns_left: 0,
        };
        let progress = assembler.take(words, sink)?;
        Ok((assembler, progress))
    }

    /// Takes the next GPADL_BODY with the words that follow it.
    ///
    /// # Errors
    ///
    /// [`GpadlError`] when the body is not for this GPADL, is not expected any more, or has no
    /// words, or when a range is not possible.
    pub fn add(
        &mut self,
        body: &GpadlBody,
        words: &[U64],
        sink: impl FnMut(GpadlItem),
    ) -> Result<Progress, GpadlError> {
        if body.gpadl_id != self.gpadl_id {
            return Err(GpadlError::WrongId {
                gpadl_id: body.gpadl_id,
            });
        }
        if self.words_left == 0 {
            return Err(GpadlError::NotExpected);
        }
        if words.is_empty() {
            // It would make no progress; a guest could go on so for ever.
            self.words_left = 0;
            return Err(GpadlError::EmptyBody);
        }
        self.take(words, sink)
    }

    /// The channel that the memory belongs to.
    pub fn channel_id(&self) -> ChannelId {
        self.channel_id
    }

    /// The GPADL's id.
    pub fn gpadl_id(&self) -> GpadlId {
        self.gpadl_id
    }

    fn take(&mut self, words: &[U64], sink: impl FnMut(GpadlItem)) -> Result<Progress, GpadlError> {
        let result = self.take_words(words, sink);
        if result.is_err() {
            self.words_left = 0;
        }
        result
    }

    fn take_words(
        &mut self,
        words: &[U64],
        mut sink: impl FnMut(GpadlItem),
    ) -> Result<Progress, GpadlError> {
        for word in words {
            // The rest of the message is padding.
            let Some(words_left) = self.words_left.checked_sub(1) else {
                break;
            };
            self.words_left = words_left;
            if let Some(pfns_left) = self.pfns_left.checked_sub(1) {
                self.pfns_left = pfns_left;
                sink(GpadlItem::Pfn(word.get()));
                continue;
            }
            let Some(ranges_left) = self.ranges_left.checked_sub(1) else {
                return Err(GpadlError::CountMismatch);
            };
            self.ranges_left = ranges_left;
            let byte_count = word.get() as u32;
            let byte_offset = (word.get() >> 32) as u32;
            let pages = check_range(byte_count, byte_offset)?;
            // What is left has room for this range's frames, and two words for each later range.
            let later = ranges_left.saturating_mul(2);
            let room = words_left.saturating_sub(later);
            if pages > room || (ranges_left == 0 && pages != room) {
                return Err(GpadlError::CountMismatch);
            }
            self.pfns_left = pages;
            sink(GpadlItem::Range {
                byte_count,
                byte_offset,
                pages,
            });
        }
        Ok(if self.words_left == 0 {
            Progress::Complete
        } else {
            Progress::More
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::GuestMessage;
    use crate::version::Version;
    use proptest::prelude::*;

    const CHANNEL: ChannelId = ChannelId::new(3);

    fn pfn(page: u32) -> u64 {
        0xabcd_0000_0000 + u64::from(page) * 7
    }

    fn messages(byte_count: u32, byte_offset: u32) -> Vec<MessageBuf> {
        GpadlMessages::new(CHANNEL, GpadlId::FIRST, byte_count, byte_offset, pfn)
            .unwrap()
            .collect()
    }

    /// Runs messages through parser and assembler; the progress after the last one.
    fn assemble_into(
        messages: &[MessageBuf],
        mut sink: impl FnMut(GpadlItem),
    ) -> Result<Progress, GpadlError> {
        let mut assembler = None;
        let mut last = Err(GpadlError::NotExpected);
        for message in messages {
            last = match GuestMessage::parse(message, Some(Version::V5_3)).unwrap() {
                GuestMessage::GpadlHeader(header, words) => {
                    GpadlAssembler::start(&header, words, &mut sink).map(|(new, progress)| {
                        assembler = Some(new);
                        progress
                    })
                }
                GuestMessage::GpadlBody(body, words) => {
                    assembler.as_mut().unwrap().add(&body, words, &mut sink)
                }
                other => panic!("{other:?}"),
            };
            if last.is_err() {
                break;
            }
        }
        last
    }

    fn assemble(messages: &[MessageBuf]) -> (Result<Progress, GpadlError>, Vec<GpadlItem>) {
        let mut items = Vec::new();
        let last = assemble_into(messages, |item| items.push(item));
        (last, items)
    }

    fn header(range_buf_len: u16, range_count: u16) -> GpadlHeader {
        GpadlHeader {
            channel_id: CHANNEL,
            gpadl_id: GpadlId::FIRST,
            range_buf_len: U16::new(range_buf_len),
            range_count: U16::new(range_count),
        }
    }

    fn range(byte_count: u32, byte_offset: u32) -> U64 {
        U64::new(u64::from(byte_count) | u64::from(byte_offset) << 32)
    }

    fn start(header: &GpadlHeader, words: &[U64]) -> Result<Progress, GpadlError> {
        GpadlAssembler::start(header, words, |_| ()).map(|(_, progress)| progress)
    }

    #[test]
    fn every_size_makes_the_round_trip() {
        for pages in 1..=MAX_PAGES {
            let messages = messages(pages * 4096, 0);
            let source = GpadlMessages::new(CHANNEL, GpadlId::FIRST, pages * 4096, 0, pfn).unwrap();
            assert_eq!(source.message_count() as usize, messages.len());
            assert_eq!(source.page_count(), pages);
            let mut next = None;
            let progress = assemble_into(&messages, |item| match (item, next) {
                (GpadlItem::Pfn(got), Some(page)) if got == pfn(page) => next = Some(page + 1),
                (GpadlItem::Range { byte_count, .. }, None) if byte_count == pages * 4096 => {
                    next = Some(0);
                }
                _ => panic!("{item:?} after {next:?}"),
            });
            assert_eq!(progress, Ok(Progress::Complete), "{pages} pages");
            assert_eq!(next, Some(pages));
        }
    }

    #[test]
    fn last_message_is_needed() {
        for pages in [27, 54, 55, 1000, MAX_PAGES] {
            let messages = messages(pages * 4096, 0);
            let (progress, items) = assemble(&messages[..messages.len() - 1]);
            assert_eq!(progress, Ok(Progress::More));
            assert!(items.len() < pages as usize + 1);
        }
    }

    #[test]
    fn messages_are_filled() {
        let messages = messages(4096 * 4096, 0);
        assert_eq!(messages.len(), 147);
        assert_eq!(messages[0].len(), 28 + 26 * 8);
        assert_eq!(messages[1].len(), 16 + 28 * 8);
        assert_eq!(messages[146].len(), 16 + ((4096 - 26) % 28) * 8);
    }

    #[test]
    fn guest_cannot_describe_what_has_no_description() {
        let new = |channel, gpadl, bytes, offset| {
            GpadlMessages::new(
                ChannelId::new(channel),
                GpadlId::new(gpadl),
                bytes,
                offset,
                pfn,
            )
            .err()
        };
        assert_eq!(new(1, 1, 4096, 0), None);
        assert_eq!(new(0, 1, 4096, 0), Some(GpadlError::InvalidId));
        assert_eq!(new(1, 0, 4096, 0), Some(GpadlError::InvalidId));
        assert_eq!(new(1, 1, 0, 0), Some(GpadlError::Empty));
        assert_eq!(
            new(1, 1, 1, 4096),
            Some(GpadlError::InvalidOffset { byte_offset: 4096 })
        );
        assert_eq!(new(1, 1, 8190 * 4096 - 5, 5), None);
        assert_eq!(
            new(1, 1, 8190 * 4096 - 4, 5),
            Some(GpadlError::TooLarge { pages: 8191 })
        );
        assert_eq!(
            new(1, 1, u32::MAX, 4095),
            Some(GpadlError::TooLarge { pages: 0x10_0001 })
        );
    }

    #[test]
    fn bad_headers_are_refused() {
        let page = [range(4096, 0), U64::new(1)];
        assert_eq!(start(&header(16, 1), &page), Ok(Progress::Complete));
        assert_eq!(start(&header(16, 0), &page), Err(GpadlError::Empty));
        let mut no_id = header(16, 1);
        no_id.gpadl_id = GpadlId::new(0);
        assert_eq!(start(&no_id, &page), Err(GpadlError::InvalidId));
        let mut no_channel = header(16, 1);
        no_channel.channel_id = ChannelId::new(2048);
        assert_eq!(start(&no_channel, &page), Err(GpadlError::InvalidId));
        for (range_buf_len, range_count) in [(0, 1), (8, 1), (15, 1), (17, 1), (16, 2), (24, 2)] {
            assert_eq!(
                start(&header(range_buf_len, range_count), &page),
                Err(GpadlError::InvalidLength { range_buf_len })
            );
        }
    }

    #[test]
    fn bad_ranges_are_refused() {
        let one = |first, range_buf_len| start(&header(range_buf_len, 1), &[first, U64::new(1)]);
        assert_eq!(one(range(0, 0), 16), Err(GpadlError::Empty));
        assert_eq!(
            one(range(1, 4096), 16),
            Err(GpadlError::InvalidOffset { byte_offset: 4096 })
        );
        assert_eq!(one(range(4096, 1), 16), Err(GpadlError::CountMismatch));
        assert_eq!(one(range(4097, 0), 16), Err(GpadlError::CountMismatch));
        assert_eq!(one(range(4096, 0), 24), Err(GpadlError::CountMismatch));
        assert_eq!(one(range(4097, 0), 24), Ok(Progress::More));
        assert_eq!(
            one(range(u32::MAX, 4095), 0xfff8),
            Err(GpadlError::TooLarge { pages: 0x10_0001 })
        );
    }

    #[test]
    fn several_ranges() {
        let words = [
            range(8192, 0),
            U64::new(1),
            U64::new(2),
            range(10, 4095),
            U64::new(3),
            U64::new(4),
        ];
        let mut items = Vec::new();
        let (_, progress) =
            GpadlAssembler::start(&header(48, 2), &words, |item| items.push(item)).unwrap();
        assert_eq!(progress, Progress::Complete);
        assert_eq!(items.len(), 6);
        assert_eq!(
            items[3],
            GpadlItem::Range {
                byte_count: 10,
                byte_offset: 4095,
                pages: 2
            }
        );
        // The first range leaves no room for the second.
        assert_eq!(
            start(&header(32, 2), &words[..4]),
            Err(GpadlError::CountMismatch)
        );
    }

    #[test]
    fn padding_is_not_read() {
        let words = [range(4096, 0), U64::new(1), U64::new(2)];
        assert_eq!(start(&header(16, 1), &words), Ok(Progress::Complete));
    }

    #[test]
    fn bodies_must_belong_and_make_progress() {
        let words = [range(3 * 4096, 0), U64::new(1)];
        let (assembler, progress) = GpadlAssembler::start(&header(32, 1), &words, |_| ()).unwrap();
        assert_eq!(progress, Progress::More);
        assert_eq!(assembler.channel_id(), CHANNEL);
        let body = |id| GpadlBody {
            message_number: U32::new(77),
            gpadl_id: id,
        };
        let pfns = [U64::new(2), U64::new(3), U64::new(4)];

        let mut ours = assembler.clone();
        let other = GpadlId::new(5);
        assert_eq!(
            ours.add(&body(other), &pfns, |_| ()),
            Err(GpadlError::WrongId { gpadl_id: other })
        );
        let mine = body(ours.gpadl_id());
        assert_eq!(ours.add(&mine, &pfns[..1], |_| ()), Ok(Progress::More));
        assert_eq!(ours.add(&mine, &pfns, |_| ()), Ok(Progress::Complete));
        assert_eq!(ours.add(&mine, &pfns, |_| ()), Err(GpadlError::NotExpected));

        let mut ours = assembler;
        assert_eq!(ours.add(&mine, &[], |_| ()), Err(GpadlError::EmptyBody));
        assert_eq!(ours.add(&mine, &pfns, |_| ()), Err(GpadlError::NotExpected));
    }

    proptest! {
        #[test]
        fn any_range_makes_the_round_trip(byte_count in 1u32..=8190 * 4096, offset in 0u32..4096) {
            let new = GpadlMessages::new(CHANNEL, GpadlId::FIRST, byte_count, offset, pfn);
            let pages = (u64::from(byte_count) + u64::from(offset)).div_ceil(4096);
            let Ok(messages) = new else {
                prop_assert_eq!(pages, 8191);
                return Ok(());
            };
            let messages: Vec<_> = messages.collect();
            let (progress, items) = assemble(&messages);
            prop_assert_eq!(progress, Ok(Progress::Complete));
            prop_assert_eq!(items.len() as u64, pages + 1);
            prop_assert_eq!(
                items[0],
                GpadlItem::Range { byte_count, byte_offset: offset, pages: pages as u32 }
            );
        }

        /// Whatever comes, the sink gets no more than the header's length allows, ranges are
        /// followed by their frames, and after an error nothing is taken.
        #[test]
        fn any_words_are_bounded(
            range_buf_len in prop_oneof![any::<u16>(), (0u16..40).prop_map(|n| n * 8)],
            range_count in prop_oneof![any::<u16>(), 0u16..4],
            bodies in prop::collection::vec(
                prop::collection::vec(
                    prop_oneof![
                        any::<u64>(),
                        (1u64..40_000, 0u64..4200).prop_map(|(n, o)| n | o << 32),
                    ],
                    0..29,
                ),
                1..20,
            ),
        ) {
            let bodies: Vec<Vec<U64>> = bodies
                .into_iter()
                .map(|words| words.into_iter().map(U64::new).collect())
                .collect();
            let mut items = Vec::new();
            let sink = |item| items.push(item);
            let started = GpadlAssembler::start(&header(range_buf_len, range_count), &bodies[0], sink);
            let mut done = matches!(started, Ok((_, Progress::Complete)));
            let body = GpadlBody { message_number: U32::ZERO, gpadl_id: GpadlId::FIRST };
            if let Ok((mut assembler, _)) = started {
                let mut failed = false;
                for words in &bodies[1..] {
                    let before = items.len();
                    let result = assembler.add(&body, words, |item| items.push(item));
                    if done || failed {
                        prop_assert_eq!(result, Err(GpadlError::NotExpected));
                        prop_assert_eq!(items.len(), before);
                    }
                    failed |= result.is_err();
                    done |= result == Ok(Progress::Complete);
                }
            }
            prop_assert!(items.len() <= usize::from(range_buf_len / 8));
            let mut due = 0;
            let mut ranges = 0;
            for item in &items {
                match item {
                    GpadlItem::Range { byte_count, byte_offset, pages } => {
                        prop_assert_eq!(due, 0);
                        prop_assert!(*byte_count > 0 && *byte_offset < 4096);
                        let bytes = u64::from(*byte_count) + u64::from(*byte_offset);
                        prop_assert_eq!(u64::from(*pages), bytes.div_ceil(4096));
                        due = *pages;
                        ranges += 1;
                    }
                    GpadlItem::Pfn(_) => due -= 1,
                }
            }
            if done {
                prop_assert_eq!(due, 0);
                prop_assert_eq!(ranges, range_count);
                prop_assert_eq!(items.len(), usize::from(range_buf_len / 8));
            }
        }
    }
}
