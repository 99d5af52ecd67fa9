// SPDX-License-Identifier: MIT OR Apache-2.0

//! The VMBus server: connection, offers, channels, GPADLs and rings.
//!
//! [`Server`] speaks the protocol with the guest. A device is a [`Vsp`] that is offered with
//! [`Server::offer`]; when the guest opens one of its channels, the VSP gets a [`HostChannel`] to
//! read and write packets. Message layouts, the ring's algorithm and packet parsing are those of
//! `hv_proto`, which the guest's drivers use too.
//!
//! Every channel is offered with a dedicated interrupt, in all versions: the guest signals by
//! HvSignalEvent on the channel's own connection, and the interrupt page that guests before
//! version 5.0 name is not used. Monitor pages (signals without hypercall) are an option of each
//! device, see [`OfferParams`].
//!
//! The server uses the hypervisor only through [`crate::hypervisor::SynicPort`], and guest memory
//! only through `vm-memory`. The guest is not trusted: whatever it does, at worst its own channel
//! is closed.
//!
//! For tests of guests, [`Server::hostile`] does what no host should.

mod channel;
mod connection;
mod counters;
mod device;
mod gpa;
mod gpadl;
mod hostile;
mod monitor;
mod offers;
mod ring;
mod server;
#[cfg(test)]
pub(crate) mod test_guest;
#[cfg(test)]
mod tests;
mod trace;
mod vsp;

pub use channel::{
    ChannelError, ChannelReader, ChannelWriter, GpadlError, GpadlView, HostChannel, SEND_TIMEOUT,
    Waker,
};
pub use counters::CounterSnapshot;
pub use gpa::{GpaError, GuestBuffer, GuestMem, GuestSlice, PAGE_SIZE};
pub use gpadl::{MAX_PAGES, MAX_PER_CHANNEL};
pub use hostile::Hostile;
pub use server::{
    ChannelStatus, DeviceHandle, DeviceStatus, OfferError, OfferHandle, Server, ServerConfig,
    Status,
};
pub use trace::{Direction, Trace};
pub use vsp::{OfferParams, OpenError, OpenParams, Vsp};
