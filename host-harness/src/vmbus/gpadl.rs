// SPDX-License-Identifier: MIT OR Apache-2.0

//! The GPADLs of a connection: guest memory that the guest gave a number.
//!
//! Limits, so that a guest cannot make the host use memory without end: see [`MAX_PER_CHANNEL`]
//! and [`MAX_PAGES`]. A page takes 8 bytes here.

use std::collections::BTreeMap;
use std::fmt;

use hv_proto::gpadl::{GpadlAssembler, GpadlError as ProtoError, GpadlItem, Progress};
use hv_proto::ids::{ChannelId, GpadlId};
use hv_proto::message::{GpadlBody, GpadlHeader};
use zerocopy::little_endian::U64;

use super::gpa::{GpaError, GuestBuffer, GuestMem, PAGE_SIZE, page_address};

/// Most GPADLs that a channel can have at a time, complete or not.
pub const MAX_PER_CHANNEL: usize = 64;

/// Most pages of all GPADLs of a connection together (4 GiB of guest memory).
pub const MAX_PAGES: usize = 1 << 20;

/// Why the host refuses a GPADL.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The description is wrong.
    Description(ProtoError),
    /// A page is not guest memory.
    Page(GpaError),
    /// The number is in use.
    InUse,
    /// A limit is reached.
    TooMany,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Description(e) => e.fmt(f),
            Self::Page(e) => e.fmt(f),
            Self::InUse => f.write_str("the number is in use"),
            Self::TooMany => f.write_str("too many GPADLs or pages"),
        }
    }
}

struct Range {
    byte_count: u32,
    byte_offset: u32,
    first_page: usize,
}

struct Gpadl {
    channel: ChannelId,
    serial: u64,
    /// `Some` until the description is complete.
    assembler: Option<GpadlAssembler>,
    ranges: Vec<Range>,
    pfns: Vec<u64>,
    /// Rings and views that use it.
    users: u32,
    /// The guest wants it back; it gets it when `users` is 0.
    teardown: bool,
}

/// What came of a part of a description.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Added {
    /// More parts follow.
    More,
    /// The GPADL of this channel is complete.
    Complete(ChannelId),
    /// There is no such GPADL in the making; it may have been refused before.
    Unknown,
}

/// What came of a request to tear down.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Teardown {
    /// The guest has its memory back.
    Done,
    /// It is in use; the guest gets it later.
    Later,
    /// There is no such GPADL of that channel.
    Unknown,
}

/// All GPADLs of a connection, by their number.
#[derive(Default)]
pub(super) struct GpadlTable {
    map: BTreeMap<GpadlId, Gpadl>,
    pages: usize,
    next_serial: u64,
}

/// Checks items of a description, and adds them.
fn sink<'a>(
    mem: &'a GuestMem,
    ranges: &'a mut Vec<Range>,
    pfns: &'a mut Vec<u64>,
    error: &'a mut Option<GpaError>,
) -> impl FnMut(GpadlItem) + 'a {
    move |item| match item {
        GpadlItem::Range {
            byte_count,
            byte_offset,
            ..
        } => ranges.push(Range {
            byte_count,
            byte_offset,
            first_page: pfns.len(),
        }),
        GpadlItem::Pfn(pfn) => {
            if let Err(e) = page_address(mem, pfn) {
                error.get_or_insert(e);
            }
            pfns.push(pfn);
        }
    }
}

impl GpadlTable {
    /// Takes GPADL_HEADER.
    ///
    /// # Errors
    /// The GPADL is refused; nothing is kept of it.
    pub(super) fn start(
        &mut self,
        mem: &GuestMem,
        header: &GpadlHeader,
        words: &[U64],
    ) -> Result<Added, Refusal> {
        let channel = header.channel_id;
        if self.map.contains_key(&header.gpadl_id) {
            return Err(Refusal::InUse);
        }
        let mine = self.map.values().filter(|g| g.channel == channel).count();
        if mine >= MAX_PER_CHANNEL {
            return Err(Refusal::TooMany);
        }
        let (mut ranges, mut pfns, mut error) = (Vec::new(), Vec::new(), None);
        let started =
            GpadlAssembler::start(header, words, sink(mem, &mut ranges, &mut pfns, &mut error));
        let (assembler, progress) = started.map_err(Refusal::Description)?;
        if let Some(error) = error {
            return Err(Refusal::Page(error));
        }
        if self.pages + pfns.len() > MAX_PAGES {
            return Err(Refusal::TooMany);
        }
        self.pages += pfns.len();
        self.next_serial += 1;
        let complete = progress == Progress::Complete;
        self.map.insert(
            header.gpadl_id,
            Gpadl {
                channel,
                serial: self.next_serial,
                assembler: (!complete).then_some(assembler),
                ranges,
                pfns,
                users: 0,
                teardown: false,
            },
        );
        Ok(if complete {
            Added::Complete(channel)
        } else {
            Added::More
        })
    }

    /// Takes GPADL_BODY.
    ///
    /// # Errors
    /// The GPADL of this channel is refused; nothing is kept of it.
    pub(super) fn add(
        &mut self,
        mem: &GuestMem,
        body: &GpadlBody,
        words: &[U64],
    ) -> Result<Added, (ChannelId, Refusal)> {
        let Some(gpadl) = self.map.get_mut(&body.gpadl_id) else {
            return Ok(Added::Unknown);
        };
        let Some(assembler) = &mut gpadl.assembler else {
            return Ok(Added::Unknown);
        };
        let channel = gpadl.channel;
        let before = gpadl.pfns.len();
        let mut error = None;
        let added = assembler.add(
            body,
            words,
            sink(mem, &mut gpadl.ranges, &mut gpadl.pfns, &mut error),
        );
        let more = gpadl.pfns.len() - before;
        self.pages += more;
        let refusal = match (added, error) {
            (Err(e), _) => Refusal::Description(e),
            (_, Some(e)) => Refusal::Page(e),
            _ if self.pages > MAX_PAGES => Refusal::TooMany,
            (Ok(Progress::More), None) => return Ok(Added::More),
            (Ok(Progress::Complete), None) => {
                gpadl.assembler = None;
                return Ok(Added::Complete(channel));
            }
        };
        self.remove(body.gpadl_id);
        Err((channel, refusal))
    }

    fn remove(&mut self, id: GpadlId) {
        if let Some(gpadl) = self.map.remove(&id) {
            self.pages -= gpadl.pfns.len();
        }
    }

    fn usable(&mut self, channel: ChannelId, id: GpadlId) -> Option<&mut Gpadl> {
        self.map
            .get_mut(&id)
            .filter(|g| g.channel == channel && g.assembler.is_none() && !g.teardown)
    }

    /// The pages of a GPADL that is to hold rings: whole pages in one range. It is in use until
    /// [`GpadlTable::release`].
    pub(super) fn use_for_rings(
        &mut self,
        channel: ChannelId,
        id: GpadlId,
    ) -> Option<(u64, Vec<u64>)> {
        let gpadl = self.usable(channel, id)?;
        let [range] = gpadl.ranges.as_slice() else {
            return None;
        };
        let bytes = gpadl.pfns.len().checked_mul(PAGE_SIZE as usize)?;
        if range.byte_offset != 0 || range.byte_count as usize != bytes {
            return None;
        }
        gpadl.users += 1;
        Some((gpadl.serial, gpadl.pfns.clone()))
    }

    /// The memory of a GPADL. It is in use until [`GpadlTable::release`].
    pub(super) fn view(
        &mut self,
        mem: &GuestMem,
        channel: ChannelId,
        id: GpadlId,
    ) -> Option<Result<(u64, GuestBuffer), GpaError>> {
        let gpadl = self.usable(channel, id)?;
        let mut buffer = GuestBuffer::empty(mem);
        for range in &gpadl.ranges {
            let pfns = gpadl.pfns.iter().skip(range.first_page).copied();
            match GuestBuffer::from_pfns(mem, range.byte_offset, range.byte_count, pfns) {
                Ok(part) => buffer.append(part),
                Err(e) => return Some(Err(e)),
            }
        }
        gpadl.users += 1;
        Some(Ok((gpadl.serial, buffer)))
    }

    /// One use ends. Returns whether the GPADL is torn down by that.
    pub(super) fn release(&mut self, id: GpadlId, serial: u64) -> bool {
        let Some(gpadl) = self.map.get_mut(&id).filter(|g| g.serial == serial) else {
            return false;
        };
        gpadl.users = gpadl.users.saturating_sub(1);
        let done = gpadl.users == 0 && gpadl.teardown;
        if done {
            self.remove(id);
        }
        done
    }

    /// The guest wants a GPADL back.
    pub(super) fn teardown(&mut self, channel: ChannelId, id: GpadlId) -> Teardown {
        let Some(gpadl) = self.map.get_mut(&id).filter(|g| g.channel == channel) else {
            return Teardown::Unknown;
        };
        if gpadl.users > 0 {
            gpadl.teardown = true;
            return Teardown::Later;
        }
        self.remove(id);
        Teardown::Done
    }

    /// The guest has let go of a channel, and so of its GPADLs.
    pub(super) fn forget_channel(&mut self, channel: ChannelId) {
        let mut pages = 0;
        self.map.retain(|_, g| {
            let keep = g.channel != channel;
            if !keep {
                pages += g.pfns.len();
            }
            keep
        });
        self.pages -= pages;
    }

    /// The connection is over. Serial numbers go on, so that late releases match nothing.
    pub(super) fn clear(&mut self) {
        self.map.clear();
        self.pages = 0;
    }

    /// Number of GPADLs.
    pub(super) fn len(&self) -> usize {
        self.map.len()
    }
}
