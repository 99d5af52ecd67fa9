// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The host's side of connection, channel and GPADL, as state machines.
//!
//! Each machine is a small value without tables, memory or I/O: a method for each event, which
//! returns what the server must do. The server keeps the tables of channels and GPADLs, sends the
//! messages, and runs the devices. Whatever a guest sends, in whatever order, a method answers
//! with a decision; none of them fails.
//!
//! What holds between the machines:
//!
//! * A device has let go of its ring before the guest hears of it: RESCIND, TORNDOWN and
//!   UNLOAD_RESPONSE are only sent after [`Channel::closed`], because the guest frees the memory
//!   then. (Linux frees rings of rescinded channels without GPADL_TEARDOWN.)
//! * A channel id is used again only after RELID_RELEASED, or on a new connection.
//!
//! Source: what `drivers/hv/connection.c`, `channel.c` and `channel_mgmt.c` of Linux 7.3 expect of
//! a host.
//!
//! ```
//! use hv_proto::ids::ConnectionId;
//! use hv_proto::message::{GuestMessage, RequestOffers};
//! use hv_proto::server::{Connection, ContactDecision};
//! use hv_proto::version::Version;
//! # use hv_proto::message::{ContactTarget, InitiateContact};
//! # use zerocopy::FromZeros;
//! # let mut contact = InitiateContact::new_zeroed();
//! # contact.version = Version::V5_3.raw().into();
//! # contact.interrupt_page_or_target =
//! #     ContactTarget { sint: 2, ..FromZeros::new_zeroed() }.to_field();
//!
//! let mut connection = Connection::new(Version::V6_0);
//! match connection.contact(&contact, ConnectionId::MESSAGE_V5) {
//!     ContactDecision::Accept(agreed) => assert_eq!(agreed.version, Version::V5_3),
//!     other => panic!("{other:?}"),
//! }
//! let message = GuestMessage::RequestOffers(RequestOffers {});
//! assert!(connection.admit(ConnectionId::MESSAGE_V5, &message).is_ok());
//! ```

mod channel;
mod connection;
mod gpadl;

pub use self::channel::{
    split_ring, Channel, ChannelState, CloseDecision, ClosedDecision, ModifyDecision, OpenDecision,
    OpenedDecision, RingPages,
};
pub use self::connection::{
    Agreed, Connection, ContactDecision, MessageTarget, Refusal, ResetDecision, UnloadDecision,
    REFUSED,
};
pub use self::gpadl::{refuse_gpadl, Gpadl, GpadlDecision, GpadlRefused, TeardownDecision};

#[cfg(test)]
mod tests;
