// SPDX-License-Identifier: GPL-2.0

//! Where in the guest's memory a message is, for the host to fetch it from there.

use crate::net::{
    Piece,
    TxSkb, //
};
use hv_proto::{
    net::nvsp::{
        Body,
        RndisPacket, //
    },
    packet::pages_spanned, //
};
use kernel::prelude::*;
use vmbus::{
    Channel,
    GpaRange, //
};

/// Most pages of a packet that the host takes, its head included.
pub(super) const MAX_PAGES: usize = 32;
/// Most ranges of a packet: its head, and its pieces.
const MAX_RANGES: usize = 19;

/// The pages of a packet, as the host is told them.
pub(super) struct Ranges {
    pfns: [u64; MAX_PAGES],
    pages: usize,
    /// Offset, length, number of pages.
    ranges: [(u32, u32, usize); MAX_RANGES],
    count: usize,
}

impl Ranges {
    pub(super) const fn new() -> Self {
        Self {
            pfns: [0; MAX_PAGES],
            pages: 0,
            ranges: [(0, 0, 0); MAX_RANGES],
            count: 0,
        }
    }

    pub(super) fn add(&mut self, piece: &Piece<'_>) -> Result {
        const PAGE: u64 = hv_proto::PAGE_SIZE as u64;
        let phys = piece.phys();
        // CAST: less than a page.
        let offset = (phys % PAGE) as u32;
        let pages = usize::try_from(pages_spanned(offset, piece.len()))?;
        let end = self.pages.checked_add(pages).ok_or(EMSGSIZE)?;
        let places = self.pfns.get_mut(self.pages..end).ok_or(EMSGSIZE)?;
        for (place, pfn) in places.iter_mut().zip(phys / PAGE..) {
            *place = pfn;
        }
        *self.ranges.get_mut(self.count).ok_or(EMSGSIZE)? = (offset, piece.len(), pages);
        self.pages = end;
        self.count = self.count.saturating_add(1);
        Ok(())
    }

    /// Adds the pieces of a packet.
    pub(super) fn add_all(&mut self, skb: &TxSkb) -> Result {
        let (pieces, count) = skb.pieces();
        pieces
            .iter()
            .take(count)
            .try_for_each(|piece| self.add(piece))
    }

    /// Sends a packet with these ranges.
    pub(super) fn send(&self, channel: &Channel, message: &RndisPacket, id: u64) -> Result {
        const EMPTY: GpaRange<'static> = GpaRange {
            byte_count: 0,
            byte_offset: 0,
            pfns: &[],
        };
        let mut ranges = [EMPTY; MAX_RANGES];
        let mut pfns = self.pfns.as_slice();
        for (to, &(byte_offset, byte_count, pages)) in ranges.iter_mut().zip(&self.ranges) {
            let (own, rest) = pfns.split_at_checked(pages).ok_or(EINVAL)?;
            pfns = rest;
            *to = GpaRange {
                byte_count,
                byte_offset,
                pfns: own,
            };
        }
        let ranges = ranges.get(..self.count).ok_or(EINVAL)?;
        channel.send_gpa_ranges(ranges, &message.encode(), id)
    }
}

/// Number of pages that the pieces of a packet touch.
pub(super) fn pages(skb: &TxSkb) -> u64 {
    let (pieces, count) = skb.pieces();
    pieces
        .iter()
        .take(count)
        .map(|piece| {
            pages_spanned(
                (piece.phys() % hv_proto::PAGE_SIZE as u64) as u32,
                piece.len(),
            )
        })
        .fold(0, u64::saturating_add)
}
