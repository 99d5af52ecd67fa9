// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Time synchronization: the host sends what time it is.
//!
//! Times of the host count 100 ns since 1601 (UTC), as Windows does. Since version 4 a message also
//! says what the partition's reference counter, which counts 100 ns too, showed at that moment:
//! that makes up for the time that the message was on its way. Before version 4 the moment is when
//! the message arrives.

use super::guest::read_body;
use super::{Malformed, MessageType, Reply, Service, Version};
use bitflags::bitflags;
use zerocopy::little_endian::U64;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version 4.0: messages are [`ReferenceBody`].
pub const V4: Version = Version::new(4, 0);

/// Versions of the service, the best first.
pub const VERSIONS: &[Version] = &[V4, Version::new(3, 0), Version::new(1, 0)];

/// From 1601 to 1970, in units of 100 ns.
const UNIX_EPOCH: i64 = 116_444_736_000_000_000;

/// Age at which a sample is of no use any more, in units of 100 ns: 600 s.
pub const MAX_AGE: u64 = 600 * 10_000_000;

/// How far the guest's clock must be behind to be set also without [`Flags::SYNC`] where the
/// administrator wants that, in nanoseconds.
pub const IMPLICIT_SYNC_NS: i64 = 5_000_000_000;

/// A time of the host: 100 ns since 1601.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostTime(u64);

impl HostTime {
    /// A time from its number on the wire.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The number on the wire.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// A time in nanoseconds since 1970, rounded down to 100 ns. `None` if it is too far away.
    pub fn from_unix_ns(ns: i64) -> Option<Self> {
        let raw = ns.div_euclid(100).checked_add(UNIX_EPOCH)?;
        u64::try_from(raw).ok().map(Self)
    }

    /// Nanoseconds since 1970. `None` before that, and after April 2262.
    pub fn to_unix_ns(self) -> Option<i64> {
        let since_1970 = i64::try_from(self.0).ok()?.checked_sub(UNIX_EPOCH)?;
        if since_1970 < 0 {
            return None;
        }
        since_1970.checked_mul(100)
    }
}

/// What a message is for. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Flags(u8);

bitflags! {
    impl Flags: u8 {
        /// The guest must set its clock: it was started, or restored.
        const SYNC = 1;
        /// A sample that the guest may use.
        const SAMPLE = 2;
        const _ = !0;
    }
}

/// Without any flag, the host only measures how long the message and its answer take.
pub const PROBE: Flags = Flags::empty();

/// Body of a message before version 4, 25 bytes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PlainBody {
    /// The host's time, see [`HostTime`].
    pub parent_time: U64,
    /// The guest's time as the host knew it.
    pub child_time: U64,
    /// How long a message and its answer took.
    pub round_trip_time: U64,
    /// [`Flags`].
    pub flags: u8,
}

const _: () = assert!(size_of::<PlainBody>() == 25);

open_enum! {
    /// What the host's own source of time says of leap seconds (NTP's "leap indicator").
    pub struct Leap: u8 {
        /// None comes.
        NONE = 0,
        /// The last minute of the day has 61 seconds.
        INSERT = 1,
        /// The last minute of the day has 59 seconds.
        DELETE = 2,
        /// The host's clock is not synchronized.
        UNSYNCHRONIZED = 3,
    }
}

/// Body of a message since version 4, 22 bytes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ReferenceBody {
    /// The host's time, see [`HostTime`].
    pub parent_time: U64,
    /// The partition's reference counter at that time.
    pub reference_time: U64,
    /// [`Flags`].
    pub flags: u8,
    /// Leap seconds.
    pub leap: Leap,
    /// How far the host is from its source of time (NTP's "stratum").
    pub stratum: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

const _: () = assert!(size_of::<ReferenceBody>() == 22);

/// What the host says about the quality of its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quality {
    /// Leap seconds.
    pub leap: Leap,
    /// How far the host is from its source of time.
    pub stratum: u8,
}

/// A message of the host, of any version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The host's time.
    pub time: HostTime,
    /// The reference counter at that time; before version 4 it is that of the arrival.
    pub reference: Option<u64>,
    /// What the message is for.
    pub flags: Flags,
    /// Since version 4.
    pub quality: Option<Quality>,
}

impl Sample {
    /// Reads a body of this version.
    pub fn parse(version: Version, body: &[u8]) -> Result<Self, Malformed> {
        let sample = if version >= V4 {
            let body: ReferenceBody = read_body(body)?;
            Self {
                time: HostTime(body.parent_time.get()),
                reference: Some(body.reference_time.get()),
                flags: Flags::from_bits_retain(body.flags),
                quality: Some(Quality {
                    leap: body.leap,
                    stratum: body.stratum,
                }),
            }
        } else {
            let body: PlainBody = read_body(body)?;
            Self {
                time: HostTime(body.parent_time.get()),
                reference: None,
                flags: Flags::from_bits_retain(body.flags),
                quality: None,
            }
        };
        match sample.time.to_unix_ns() {
            Some(_) => Ok(sample),
            None => Err(Malformed::OutOfRange),
        }
    }

    /// What the sample says about now, when the reference counter shows `now`. `None` if that is a
    /// time that cannot be.
    pub fn anchor(&self, now: u64) -> Option<Anchor> {
        let on_its_way = match self.reference {
            // The counter of another CPU may be a little ahead.
            Some(then) => signed_difference(now, then)?,
            None => 0,
        };
        let time = HostTime(self.time.0.checked_add_signed(on_its_way)?);
        time.to_unix_ns()?;
        Some(Anchor {
            time,
            reference: now,
        })
    }
}

/// `a - b`, if it fits.
fn signed_difference(a: u64, b: u64) -> Option<i64> {
    let size = i64::try_from(a.abs_diff(b)).ok()?;
    if a >= b {
        Some(size)
    } else {
        size.checked_neg()
    }
}

/// The sample is too old to say what time it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stale;

/// Which time it was when the reference counter showed what: enough to know the host's time later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor {
    time: HostTime,
    reference: u64,
}

impl Anchor {
    /// The host's time when the reference counter shows `now`, in nanoseconds since 1970.
    pub fn unix_ns(&self, now: u64) -> Result<i64, Stale> {
        let age = signed_difference(now, self.reference).ok_or(Stale)?;
        if age.unsigned_abs() > MAX_AGE {
            return Err(Stale);
        }
        let time = self.time.0.checked_add_signed(age).ok_or(Stale)?;
        HostTime(time).to_unix_ns().ok_or(Stale)
    }

    /// Age of the sample when the reference counter shows `now`, in units of 100 ns.
    pub fn age(&self, now: u64) -> u64 {
        now.saturating_sub(self.reference)
    }
}

/// Whether a clock that shows `guest_ns` is so far behind `host_ns` that it is set also without
/// [`Flags::SYNC`], where the administrator wants that.
pub fn is_far_behind(guest_ns: i64, host_ns: i64) -> bool {
    host_ns
        .checked_sub(guest_ns)
        .is_some_and(|behind| behind >= IMPLICIT_SYNC_NS)
}

/// The guest's service.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timesync;

impl Service for Timesync {
    const MESSAGE_TYPE: MessageType = MessageType::TIMESYNC;
    const VERSIONS: &'static [Version] = VERSIONS;
    type Event = Sample;

    fn on_request(
        &mut self,
        version: Version,
        body: &[u8],
        _reply: &mut Reply,
    ) -> Result<Sample, Malformed> {
        Sample::parse(version, body)
    }
}
