// SPDX-License-Identifier: GPL-2.0

//! The pages of a command's data: what a GPA-direct packet describes it by.
//!
//! A packet has one range: a number of bytes, the place in the first page where they start, and the
//! page frame numbers. So the data must be without gaps: every segment but the first starts, and every
//! segment but the last ends, at a page boundary. The block layer sees to that (virt boundary), and
//! [`start`] checks it. The numbers go straight into the ring: no list of them is made.

use crate::scsi::Segment;

/// Bytes in a page of the bus.
const PAGE: u64 = hv_proto::PAGE_SIZE as u64;

/// Checks that `len` bytes of data lie in the segments without gaps. Returns where in the first page
/// they start; `None` if there are gaps, or less data.
pub(crate) fn start(segments: impl Iterator<Item = Segment>, len: u32) -> Option<u32> {
    let mut start = None;
    let mut end = 0;
    let mut total: u64 = 0;
    for segment in segments {
        if start.is_some() && (end % PAGE != 0 || segment.address % PAGE != 0) {
            return None;
        }
        // CAST: less than the size of a page.
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
pub(crate) fn frames(segments: impl Iterator<Item = Segment>) -> impl Iterator<Item = u64> {
    segments.flat_map(|segment| {
        let end = segment.address.saturating_add(segment.len);
        segment.address / PAGE..end.div_ceil(PAGE)
    })
}
