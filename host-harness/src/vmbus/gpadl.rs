// SPDX-License-Identifier: MIT OR Apache-2.0

//! The GPADLs of a connection: guest memory that the guest gave a number.
//!
//! Limits, so that a guest cannot make the host use memory without end: see [`MAX_PER_CHANNEL`]
//! and [`MAX_PAGES`]. A page takes 8 bytes here.

use std::collections::BTreeMap;
use std::fmt;

use hv_proto::gpadl::{GpadlError, GpadlItem};
use hv_proto::ids::{ChannelId, GpadlId};
use hv_proto::message::{
    GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown, STATUS_UNSUCCESSFUL,
};
use hv_proto::server::{Gpadl, GpadlDecision, GpadlRefused, TeardownDecision, refuse_gpadl};
use zerocopy::little_endian::U64;

use super::gpa::{GpaError, GuestBuffer, GuestMem, PAGE_SIZE, page_address};

/// Most GPADLs that a channel can have at a time, complete or not.
pub const MAX_PER_CHANNEL: usize = 64;

/// Most pages of all GPADLs of a connection together (4 GiB of guest memory).
pub const MAX_PAGES: usize = 1 << 20;

/// Why the host refuses a GPADL.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// The description is wrong.
    Description(GpadlError),
    /// A page is not guest memory.
    Page(GpaError),
    /// The number is in use.
    InUse,
    /// A limit is reached.
    TooMany,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Description(e) => e.fmt(f),
            Self::Page(e) => e.fmt(f),
            Self::InUse => f.write_str("the number is in use"),
            Self::TooMany => f.write_str("too many GPADLs or pages"),
        }
    }
}

/// What came of a part of a description.
#[derive(Debug)]
pub(super) enum Taken {
    /// More parts must follow.
    More,
    /// It is complete: send this.
    Created(GpadlCreated),
    /// The guest cannot have it: send this. Nothing is kept of it.
    Refused(GpadlCreated, Reason),
    /// There is no such GPADL in the making; it may have been refused before.
    Unknown,
}

struct Range {
    byte_count: u32,
    byte_offset: u32,
    first_page: usize,
}

/// What a description describes.
#[derive(Default)]
struct Pages {
    ranges: Vec<Range>,
    pfns: Vec<u64>,
    /// The first page that is not guest memory.
    error: Option<GpaError>,
}

impl Pages {
    fn take(&mut self, mem: &GuestMem, item: GpadlItem) {
        match item {
            GpadlItem::Range {
                byte_count,
                byte_offset,
                ..
            } => self.ranges.push(Range {
                byte_count,
                byte_offset,
                first_page: self.pfns.len(),
            }),
            GpadlItem::Pfn(pfn) => {
                if let Err(e) = page_address(mem, pfn) {
                    self.error.get_or_insert(e);
                }
                self.pfns.push(pfn);
            }
        }
    }
}

struct Entry {
    machine: Gpadl,
    /// Tells it from an earlier one with the same number.
    serial: u64,
    pages: Pages,
}

/// All GPADLs of a connection, by their number.
#[derive(Default)]
pub(super) struct GpadlTable {
    map: BTreeMap<GpadlId, Entry>,
    pages: usize,
    next_serial: u64,
}

impl GpadlTable {
    /// Takes GPADL_HEADER for a channel that may have GPADLs.
    pub(super) fn start(&mut self, mem: &GuestMem, header: &GpadlHeader, words: &[U64]) -> Taken {
        let channel = header.channel_id;
        let refused = |why| Taken::Refused(refuse_gpadl(header), why);
        if self.map.contains_key(&header.gpadl_id) {
            return refused(Reason::InUse);
        }
        let mine = self.map.values();
        let mine = mine.filter(|g| g.machine.channel_id() == channel).count();
        if mine >= MAX_PER_CHANNEL {
            return refused(Reason::TooMany);
        }
        let mut pages = Pages::default();
        let (machine, decision) = match Gpadl::create(header, words, |item| pages.take(mem, item)) {
            Ok(created) => created,
            Err(GpadlRefused { answer, error }) => {
                return Taken::Refused(answer, Reason::Description(error));
            }
        };
        if let Some(error) = pages.error {
            return refused(Reason::Page(error));
        }
        if self.pages + pages.pfns.len() > MAX_PAGES {
            return refused(Reason::TooMany);
        }
        self.pages += pages.pfns.len();
        let serial = self.next_serial;
        self.next_serial += 1;
        self.map.insert(
            header.gpadl_id,
            Entry {
                machine,
                serial,
                pages,
            },
        );
        match decision {
            GpadlDecision::Wait => Taken::More,
            GpadlDecision::Created(answer) => Taken::Created(answer),
        }
    }

    /// Takes GPADL_BODY.
    pub(super) fn add(&mut self, mem: &GuestMem, body: &GpadlBody, words: &[U64]) -> Taken {
        let Some(entry) = self.map.get_mut(&body.gpadl_id) else {
            return Taken::Unknown;
        };
        let pages = &mut entry.pages;
        let before = pages.pfns.len();
        let added = entry
            .machine
            .body(body, words, |item| pages.take(mem, item));
        self.pages += pages.pfns.len() - before;
        let reason = match (added, pages.error) {
            (None, _) => return Taken::Unknown,
            (Some(Err(refused)), _) => Reason::Description(refused.error),
            (_, Some(error)) => Reason::Page(error),
            _ if self.pages > MAX_PAGES => Reason::TooMany,
            (Some(Ok(GpadlDecision::Wait)), None) => return Taken::More,
            (Some(Ok(GpadlDecision::Created(answer))), None) => return Taken::Created(answer),
        };
        let answer = GpadlCreated {
            channel_id: entry.machine.channel_id(),
            gpadl_id: body.gpadl_id,
            status: STATUS_UNSUCCESSFUL.into(),
        };
        self.remove(body.gpadl_id);
        Taken::Refused(answer, reason)
    }

    fn remove(&mut self, id: GpadlId) {
        if let Some(entry) = self.map.remove(&id) {
            self.pages -= entry.pages.pfns.len();
        }
    }

    /// The pages of a GPADL that is to hold rings: whole pages in one range. It is in use until
    /// [`GpadlTable::end_use`].
    pub(super) fn use_for_rings(
        &mut self,
        channel: ChannelId,
        id: GpadlId,
    ) -> Option<(u64, Vec<u64>)> {
        let entry = self.map.get_mut(&id)?;
        let [range] = entry.pages.ranges.as_slice() else {
            return None;
        };
        let bytes = entry.pages.pfns.len().checked_mul(PAGE_SIZE as usize)?;
        let whole = range.byte_offset == 0 && range.byte_count as usize == bytes;
        if !whole || !entry.machine.start_use(channel) {
            return None;
        }
        Some((entry.serial, entry.pages.pfns.clone()))
    }

    /// The memory of a GPADL. It is in use until [`GpadlTable::end_use`].
    pub(super) fn view(
        &mut self,
        mem: &GuestMem,
        channel: ChannelId,
        id: GpadlId,
    ) -> Option<Result<(u64, GuestBuffer), GpaError>> {
        let entry = self.map.get_mut(&id)?;
        let mut buffer = GuestBuffer::empty(mem);
        for range in &entry.pages.ranges {
            let pfns = entry.pages.pfns.iter().skip(range.first_page).copied();
            match GuestBuffer::from_pfns(mem, range.byte_offset, range.byte_count, pfns) {
                Ok(part) => buffer.append(part),
                Err(e) => return Some(Err(e)),
            }
        }
        entry
            .machine
            .start_use(channel)
            .then_some(Ok((entry.serial, buffer)))
    }

    /// One use ends. Returns what to send if the guest waits for that.
    pub(super) fn end_use(&mut self, id: GpadlId, serial: u64) -> Option<GpadlTorndown> {
        let entry = self.map.get_mut(&id).filter(|g| g.serial == serial)?;
        let answer = entry.machine.end_use()?;
        self.remove(id);
        Some(answer)
    }

    /// The guest wants a GPADL back. Returns what to send; `None` if it is in use, so that the
    /// answer must wait.
    ///
    /// # Errors
    /// The request makes no sense; the text says why.
    pub(super) fn teardown(
        &mut self,
        request: &GpadlTeardown,
    ) -> Result<Option<GpadlTorndown>, &'static str> {
        let id = request.gpadl_id;
        let entry = self.map.get_mut(&id).ok_or("no such GPADL")?;
        match entry.machine.teardown(request) {
            TeardownDecision::Torndown(answer) => {
                self.remove(id);
                Ok(Some(answer))
            }
            TeardownDecision::Later => Ok(None),
            TeardownDecision::Ignore => Err("another channel's, or asked twice"),
        }
    }

    /// The guest has let go of a channel, and so of its GPADLs.
    pub(super) fn forget_channel(&mut self, channel: ChannelId) {
        let mut pages = 0;
        self.map.retain(|_, g| {
            let keep = g.machine.channel_id() != channel;
            if !keep {
                pages += g.pages.pfns.len();
            }
            keep
        });
        self.pages -= pages;
    }

    /// The connection is over. Serial numbers go on, so that late ends of use match nothing.
    pub(super) fn clear(&mut self) {
        self.map.clear();
        self.pages = 0;
    }

    /// Number of GPADLs.
    pub(super) fn len(&self) -> usize {
        self.map.len()
    }
}
