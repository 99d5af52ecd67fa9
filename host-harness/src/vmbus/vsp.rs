// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a service provider (VSP) implements, and how it describes the device that it serves.
//!
//! A VSP serves one device: one primary channel and any number of sub-channels. The server calls
//! it on a thread of that device's own, one call at a time, never with a lock of the server held;
//! so a call may block for a while without harm to other devices. The data of a channel is handled
//! on threads that the VSP starts.

use hv_proto::guid::Guid;
use hv_proto::ids::VpIndex;
use hv_proto::message::{OfferFlags, USER_DATA_SIZE};
use hv_proto::version::Version;

use super::channel::HostChannel;

/// What the guest said when it opened a channel.
#[derive(Debug, Clone)]
pub struct OpenParams {
    /// 0 for the primary channel.
    pub subchannel_index: u16,
    /// The virtual processor that gets the channel's interrupts; it can change later.
    pub target_vp: VpIndex,
    /// The version that the bus has negotiated.
    pub version: Version,
    /// Data of the guest's driver for the VSP, not looked at by the server.
    pub user_data: [u8; USER_DATA_SIZE],
}

/// Why a VSP refuses to open a channel. The guest gets a failure status; the text is logged.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct OpenError(pub String);

/// A service provider: the host's side of one device.
pub trait Vsp: Send {
    /// The guest opens a channel. On success the VSP starts to serve it, normally on a new thread
    /// that owns the reader; it ends its threads when they see [`super::ChannelError::Stopped`].
    ///
    /// # Errors
    /// The VSP cannot serve the channel; the guest then gets a failure status.
    fn open(&mut self, channel: HostChannel, params: OpenParams) -> Result<(), OpenError>;

    /// The channel is closed: by the guest, by a rescind, by a reset, or because its ring was
    /// found damaged. Its reader fails already; writers work until this returns (unless the ring
    /// is full or damaged), so that requests that were read before can be answered, and should
    /// be: the guest may wait for the answers. When this returns, no thread of the VSP uses the
    /// channel or guest memory on its behalf any more.
    ///
    /// It is called once for each successful [`Vsp::open`].
    fn close(&mut self, subchannel_index: u16);

    /// The guest is gone (it unloaded its bus driver, made contact anew, or the machine was
    /// reset), after all channels have been closed. Forget what the former guest set up.
    fn reset(&mut self) {}
}

/// How a device is offered to the guest.
#[derive(Debug, Clone)]
pub struct OfferParams {
    /// What the device is called in logs and in the trace.
    pub name: String,
    /// The interface type, which the guest matches with its drivers.
    pub class: Guid,
    /// Identifies this device; two live devices of one server cannot have the same.
    pub instance: Guid,
    /// Flags of the offer, none for most devices.
    pub flags: OfferFlags,
    /// Memory-mapped I/O space that the guest should set aside, in MiB.
    pub mmio_megabytes: u16,
    /// Data for the guest's driver.
    pub user_defined: [u8; USER_DATA_SIZE],
    /// If set, the guest signals through monitor pages instead of a hypercall, and the server
    /// looks at these pages about once in this time. `None` for most devices, unless the server's
    /// configuration says otherwise: looking costs host time for ever, while a signal costs
    /// nothing when it is not sent.
    pub monitor_latency: Option<std::time::Duration>,
}

impl OfferParams {
    /// A plain device of this class.
    pub fn new(name: impl Into<String>, class: Guid, instance: Guid) -> Self {
        Self {
            name: name.into(),
            class,
            instance,
            flags: OfferFlags::empty(),
            mmio_megabytes: 0,
            user_defined: [0; USER_DATA_SIZE],
            monitor_latency: None,
        }
    }
}
