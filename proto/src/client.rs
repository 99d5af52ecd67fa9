// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's side of connection, offers, channel and GPADL, as state machines.
//!
//! Each machine is a small value without tables, memory, locks or waits: a method for each event,
//! which returns what the driver must do. A message of the host that does not fit is an error
//! value ([`Unexpected`]) to be counted and dropped, and it changes nothing.
//!
//! What the machines hold to, whatever the host does:
//!
//! * Memory that the host was told of is given back to the system only when the host has said
//!   that it let go of it; see [`Gpadl::may_free`]. Else it is leaked.
//! * Every wait may be given up (`*_timed_out`), and a late answer is then [`Unexpected`].
//! * A channel's id is released once, and only when nothing of the channel is left.
//!
//! Source: `drivers/hv/connection.c`, `channel.c`, `channel_mgmt.c` of Linux 7.3, and the weak
//! places known of them.
//!
//! ```
//! use hv_proto::client::{Connection, ContactParams, Step};
//! use hv_proto::hypercall::HvStatus;
//! use hv_proto::ids::VpIndex;
//! use hv_proto::message::VersionResponse;
//! use hv_proto::version::Version;
//! # use zerocopy::FromZeros;
//!
//! let mut connection = Connection::new();
//! let params = ContactParams::new(VpIndex::BOOT, 0x1000, [0x2000, 0x3000]);
//! // The host speaks 4.0 only: it does not even have the connection for 5.0 and later.
//! let mut step = connection.start(&params);
//! let agreed = loop {
//!     match step {
//!         Step::Post(attempt) if attempt.connection_id.get() == 4 => {
//!             step = connection.post_failed(HvStatus::INVALID_CONNECTION_ID);
//!         }
//!         Step::Post(attempt) => {
//!             let response = VersionResponse {
//!                 version_supported: u8::from(attempt.version == Version::V4_0),
//!                 ..FromZeros::new_zeroed()
//!             };
//!             step = connection.version_response(&response).unwrap();
//!         }
//!         Step::Connected(agreed) => break agreed,
//!         Step::Failed(error) => panic!("{error}"),
//!     }
//! };
//! assert_eq!(agreed.version, Version::V4_0);
//! ```

mod channel;
mod connection;
mod gpadl;
mod offer;

pub use self::channel::{Channel, ChannelError, ChannelState};
pub use self::connection::{Agreed, Attempt, ConnectError, Connection, ContactParams, Step};
pub use self::gpadl::{Gpadl, GpadlState};
pub use self::offer::{check_offer, place_offer, KnownChannel, OfferError, OfferRules, Placement};

use crate::message::STATUS_SUCCESS;
use core::fmt;
use zerocopy::little_endian::U32;

/// A message of the host that does not fit to what the guest has asked for. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unexpected {
    /// No such answer is waited for: it came unasked, twice, or too late.
    NotWaited,
    /// The answer names another channel, GPADL or request than the one it was given to.
    WrongId,
    /// The channel was rescinded before.
    Rescinded,
}

impl fmt::Display for Unexpected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotWaited => "message was not waited for",
            Self::WrongId => "message names another object",
            Self::Rescinded => "channel was rescinded before",
        })
    }
}

impl core::error::Error for Unexpected {}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The host did it.
    Done,
    /// The host did not, with this status.
    Refused(u32),
}

impl Outcome {
    fn of(status: U32) -> Self {
        match status.get() {
            STATUS_SUCCESS => Self::Done,
            status => Self::Refused(status),
        }
    }
}

#[cfg(test)]
mod tests;
