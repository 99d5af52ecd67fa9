// SPDX-License-Identifier: GPL-2.0 OR MIT

//! From the segments of a buffer, as a scatter-gather list gives them, to the one range of a
//! GPA-direct packet ([`crate::packet::PageRange`]).
//!
//! A range is a number of bytes, the place in the first page where they start, and page frame
//! numbers. So the buffer must be without gaps: every segment but the first starts, and every segment
//! but the last ends, at a page boundary. [`start`] checks it. [`frames`] gives the numbers one by one,
//! so that they can go straight into a ring and no list of them is needed.
//!
//! Uses `core` only; does not panic whatever the segments are.

use crate::PAGE_SIZE;

/// Size of a page in bytes.
const PAGE: u64 = PAGE_SIZE as u64;

/// A piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Checks that `len` bytes lie in the segments without gaps. Returns where in the first page they
/// start, in bytes; `None` if there are gaps, or less bytes.
///
/// ```
/// use hv_proto::segments::{start, Segment};
/// let first = Segment { address: 0x1e00, len: 0x200 };
/// let second = Segment { address: 0x7000, len: 0x1100 };
/// assert_eq!(start([first, second].into_iter(), 0x1300), Some(0xe00));
/// assert_eq!(start([second, first].into_iter(), 0x1300), None);
/// ```
pub fn start(segments: impl Iterator<Item = Segment>, len: u32) -> Option<u32> {
    let mut start = None;
    let mut end = 0;
    let mut total: u64 = 0;
    for segment in segments {
        if start.is_some() && (end % PAGE != 0 || segment.address % PAGE != 0) {
            return None;
        }
        // Less than the size of a page.
        start = start.or(Some((segment.address % PAGE) as u32));
        end = segment.address.checked_add(segment.len)?;
        total = total.checked_add(segment.len)?;
    }
    if total < len.into() {
        return None;
    }
    start
}

/// The frame numbers of the pages that the segments touch.
///
/// ```
/// use hv_proto::segments::{frames, Segment};
/// let segment = Segment { address: 0x1e00, len: 0x201 };
/// assert!(frames([segment].into_iter()).eq([1, 2]));
/// ```
pub fn frames(segments: impl Iterator<Item = Segment>) -> impl Iterator<Item = u64> {
    segments.flat_map(|segment| {
        let end = segment.address.saturating_add(segment.len);
        segment.address / PAGE..end.div_ceil(PAGE)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::pages_spanned;
    use proptest::prelude::*;

    fn segment(address: u64, len: u64) -> Segment {
        Segment { address, len }
    }

    #[test]
    fn gaps_are_refused() {
        let ok = [
            segment(0x1ff0, 0x10),
            segment(0x9000, 0x2000),
            segment(0x4000, 4),
        ];
        assert_eq!(start(ok.into_iter(), 0x2014), Some(0xff0));
        assert!(frames(ok.into_iter()).eq([1, 9, 10, 4]));
        for bad in [
            [segment(0x1000, 0x10), segment(0x2000, 0x10)],
            [segment(0x1000, 0x1000), segment(0x2010, 0x10)],
        ] {
            assert_eq!(start(bad.into_iter(), 0x20), None);
        }
    }

    #[test]
    fn impossible_segments() {
        assert_eq!(start([].into_iter(), 1), None);
        assert_eq!(start([segment(0x1000, 0x10)].into_iter(), 0x11), None);
        let wraps = segment(u64::MAX - 3, 8);
        assert_eq!(start([wraps].into_iter(), 4), None);
        assert_eq!(frames([wraps].into_iter()).count(), 1);
    }

    proptest! {
        /// What `start` accepts has exactly the pages that a range of this length touches.
        #[test]
        fn as_many_frames_as_a_range_has(
            offset in 0u64..PAGE,
            pages in proptest::collection::vec((1u64..1 << 30, 1u64..5), 1..20),
            cut in 0u64..PAGE,
        ) {
            let mut segments: Vec<Segment> = pages
                .iter()
                .map(|&(page, count)| segment(page * PAGE, count * PAGE))
                .collect();
            segments[0].address += offset;
            segments[0].len -= offset;
            let last = segments.last_mut().unwrap();
            last.len = last.len.saturating_sub(cut).max(1);
            let len = segments.iter().map(|s| s.len).sum::<u64>() as u32;
            let at = start(segments.iter().copied(), len);
            prop_assert_eq!(at, Some(offset as u32));
            let frames = frames(segments.iter().copied());
            prop_assert_eq!(frames.count() as u64, pages_spanned(offset as u32, len));
        }
    }
}
