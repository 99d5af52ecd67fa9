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

use crate::guid::{self, Guid};
use crate::hypercall::HvStatus;
use crate::ids::{ChannelId, ConnectionId, GpadlId, OpenId, VpIndex};
use crate::message::{
    CloseChannel, ContactTarget, FeatureFlags, GpadlCreated, GpadlTeardown, GpadlTorndown,
    HostMessage, InitiateContact, ModifyChannel, ModifyChannelResponse, OfferChannel, OfferFlags,
    OpenChannel, OpenChannelResult, RelidReleased, RescindChannelOffer, Unload, VersionResponse,
    STATUS_SUCCESS,
};
use crate::synic::VMBUS_SINT;
use crate::version::Version;
use core::fmt;
use zerocopy::little_endian::{U32, U64};

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

/// What a guest tells the host of itself in INITIATE_CONTACT.
#[derive(Clone, Copy, Debug)]
pub struct ContactParams {
    /// The processor that handles the host's messages.
    pub target_vp: VpIndex,
    /// Guest physical address of the interrupt page; only hosts before version 5.0 hear of it.
    pub interrupt_page: u64,
    /// Guest physical addresses of the monitor pages: host to guest, guest to host.
    pub monitor_pages: [u64; 2],
    /// The VTL that the guest runs in, 0 nearly always.
    pub vtl: u8,
    /// Whether a paravisor offers confidential channels.
    pub confidential: bool,
    /// The newest version to try.
    pub max_version: Version,
    /// The oldest version to be content with: 4.0, or 5.2 for an isolated guest.
    pub min_version: Version,
}

impl ContactParams {
    /// The usual case: VTL 0, not confidential, all versions.
    pub const fn new(target_vp: VpIndex, interrupt_page: u64, monitor_pages: [u64; 2]) -> Self {
        Self {
            target_vp,
            interrupt_page,
            monitor_pages,
            vtl: 0,
            confidential: false,
            max_version: Version::NEWEST,
            min_version: Version::OLDEST,
        }
    }

    /// The message that asks for `version`.
    pub fn message(&self, version: Version) -> InitiateContact {
        let field = if version.names_message_sint() {
            let features = if self.confidential && version.has_confidential_channels() {
                FeatureFlags::CONFIDENTIAL_CHANNELS
            } else {
                FeatureFlags::empty()
            };
            ContactTarget {
                sint: VMBUS_SINT,
                vtl: self.vtl,
                reserved: [0; 2],
                feature_flags: U32::new(features.bits()),
            }
            .to_field()
        } else {
            U64::new(self.interrupt_page)
        };
        let [to_guest, to_host] = self.monitor_pages;
        InitiateContact {
            version: U32::new(version.raw()),
            target_vp: self.target_vp,
            interrupt_page_or_target: field,
            monitor_page1: U64::new(to_guest),
            monitor_page2: U64::new(to_host),
        }
    }

    /// The connection to try first for `version`.
    fn first_connection(&self, version: Version) -> ConnectionId {
        if !version.uses_message_connection_id() {
            ConnectionId::MESSAGE
        } else if self.vtl == 2 {
            ConnectionId::MESSAGE_REDIRECT
        } else {
            ConnectionId::MESSAGE_V5
        }
    }
}

/// One try to make contact.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// The version that is asked for.
    pub version: Version,
    /// Where to post the message.
    pub connection_id: ConnectionId,
    /// The message.
    pub message: InitiateContact,
}

/// What guest and host have agreed upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The version of the protocol.
    pub version: Version,
    /// Where to post all later messages.
    pub message_connection_id: ConnectionId,
}

/// Why there is no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectError {
    /// The host speaks none of the versions.
    NoCommonVersion,
    /// The message could not be posted.
    Post(HvStatus),
    /// The host speaks the version, but does not make the connection.
    Refused {
        /// The host's reason; see VERSION_RESPONSE.
        connection_state: u8,
    },
    /// The host names a connection id for later messages that cannot be one.
    InvalidConnectionId(ConnectionId),
    /// The host did not answer.
    TimedOut,
    /// There is a connection, or one is being made or left.
    Busy,
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCommonVersion => f.write_str("host speaks no version of VMBus that we speak"),
            Self::Post(status) => write!(f, "posting INITIATE_CONTACT failed: {status:?}"),
            Self::Refused { connection_state } => {
                write!(f, "host refused the connection, state {connection_state}")
            }
            Self::InvalidConnectionId(id) => write!(f, "host gave message connection {id}"),
            Self::TimedOut => f.write_str("host did not answer INITIATE_CONTACT"),
            Self::Busy => f.write_str("there is a connection already"),
        }
    }
}

impl core::error::Error for ConnectError {}

/// What to do next to make contact.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Post this, and wait for VERSION_RESPONSE.
    Post(Attempt),
    /// There is a connection.
    Connected(Agreed),
    /// There is none, and there will not be one.
    Failed(ConnectError),
}

#[derive(Clone, Copy, Debug)]
enum ConnectionState {
    Disconnected,
    Contacting {
        params: ContactParams,
        version: Version,
        connection_id: ConnectionId,
    },
    Connected(Agreed),
    Unloading(Agreed),
}

/// The guest's side of the connection with the host.
#[derive(Clone, Debug)]
pub struct Connection {
    state: ConnectionState,
}

impl Default for Connection {
    fn default() -> Self {
        Self::new()
    }
}

impl Connection {
    /// No connection.
    pub const fn new() -> Self {
        Self {
            state: ConnectionState::Disconnected,
        }
    }

    /// Starts to make contact, with the newest version.
    pub fn start(&mut self, params: &ContactParams) -> Step {
        match self.state {
            ConnectionState::Disconnected => self.attempt(*params, Some(params.max_version)),
            _ => Step::Failed(ConnectError::Busy),
        }
    }

    fn attempt(&mut self, params: ContactParams, version: Option<Version>) -> Step {
        match version.filter(|v| *v >= params.min_version) {
            Some(version) => self.attempt_on(params, version, params.first_connection(version)),
            None => self.fail(ConnectError::NoCommonVersion),
        }
    }

    fn attempt_on(
        &mut self,
        params: ContactParams,
        version: Version,
        connection_id: ConnectionId,
    ) -> Step {
        self.state = ConnectionState::Contacting {
            params,
            version,
            connection_id,
        };
        Step::Post(Attempt {
            version,
            connection_id,
            message: params.message(version),
        })
    }

    fn fail(&mut self, error: ConnectError) -> Step {
        self.state = ConnectionState::Disconnected;
        Step::Failed(error)
    }

    /// The message of the last [`Step::Post`] could not be posted, for good.
    pub fn post_failed(&mut self, status: HvStatus) -> Step {
        let ConnectionState::Contacting {
            params,
            version,
            connection_id,
        } = self.state
        else {
            return Step::Failed(ConnectError::Busy);
        };
        if status != HvStatus::INVALID_CONNECTION_ID {
            self.fail(ConnectError::Post(status))
        } else if connection_id == ConnectionId::MESSAGE_REDIRECT {
            self.attempt_on(params, version, ConnectionId::MESSAGE_V5)
        } else {
            // A host that is too old for the version does not have the connection.
            self.attempt(params, version.older())
        }
    }

    /// VERSION_RESPONSE came.
    ///
    /// # Errors
    ///
    /// [`Unexpected::NotWaited`] if no contact is being made.
    pub fn version_response(&mut self, response: &VersionResponse) -> Result<Step, Unexpected> {
        let ConnectionState::Contacting {
            params, version, ..
        } = self.state
        else {
            return Err(Unexpected::NotWaited);
        };
        if response.version_supported == 0 {
            return Ok(self.attempt(params, version.older()));
        }
        // Hosts before 5.0 need not set the field.
        if version.uses_message_connection_id() && response.connection_state != 0 {
            return Ok(self.fail(ConnectError::Refused {
                connection_state: response.connection_state,
            }));
        }
        let message_connection_id = if version.uses_message_connection_id() {
            let id = response.message_connection_id;
            if id.get() == 0 || !id.is_valid() {
                return Ok(self.fail(ConnectError::InvalidConnectionId(id)));
            }
            id
        } else {
            ConnectionId::MESSAGE
        };
        let agreed = Agreed {
            version,
            message_connection_id,
        };
        self.state = ConnectionState::Connected(agreed);
        Ok(Step::Connected(agreed))
    }

    /// VERSION_RESPONSE does not come. The host may still take the monitor pages for its own, so
    /// they must not be used for anything else.
    pub fn contact_timed_out(&mut self) -> Step {
        match self.state {
            ConnectionState::Contacting { .. } => self.fail(ConnectError::TimedOut),
            _ => Step::Failed(ConnectError::Busy),
        }
    }

    /// What is agreed, while there is a connection.
    pub fn agreed(&self) -> Option<Agreed> {
        match self.state {
            ConnectionState::Connected(agreed) | ConnectionState::Unloading(agreed) => Some(agreed),
            _ => None,
        }
    }

    /// The agreed version: what [`HostMessage::parse`] wants to know.
    pub fn version(&self) -> Option<Version> {
        self.agreed().map(|agreed| agreed.version)
    }

    /// Whether a message of the host may be looked at now. While the guest leaves the bus, only
    /// the answer to that is of interest.
    pub fn accepts(&self, message: &HostMessage) -> bool {
        match self.state {
            ConnectionState::Disconnected => false,
            ConnectionState::Contacting { .. } => {
                matches!(message, HostMessage::VersionResponse(_))
            }
            ConnectionState::Connected(_) => !matches!(
                message,
                HostMessage::VersionResponse(_) | HostMessage::UnloadResponse(_)
            ),
            ConnectionState::Unloading(_) => matches!(message, HostMessage::UnloadResponse(_)),
        }
    }

    /// The guest leaves the bus. `Some`: post this, and wait for UNLOAD_RESPONSE.
    pub fn unload(&mut self) -> Option<Unload> {
        match self.state {
            ConnectionState::Connected(agreed) => {
                self.state = ConnectionState::Unloading(agreed);
                Some(Unload {})
            }
            _ => None,
        }
    }

    /// UNLOAD_RESPONSE came: the host does not touch the guest's memory any more.
    ///
    /// # Errors
    ///
    /// [`Unexpected::NotWaited`] if the guest is not leaving.
    pub fn unload_response(&mut self) -> Result<(), Unexpected> {
        match self.state {
            ConnectionState::Unloading(_) => {
                self.state = ConnectionState::Disconnected;
                Ok(())
            }
            _ => Err(Unexpected::NotWaited),
        }
    }

    /// UNLOAD_RESPONSE does not come. All memory that the host knows of must be leaked.
    pub fn unload_timed_out(&mut self) {
        if let ConnectionState::Unloading(_) = self.state {
            self.state = ConnectionState::Disconnected;
        }
    }
}

/// What the guest can do with channels that a host offers.
#[derive(Clone, Copy, Debug)]
pub struct OfferRules {
    /// The agreed version.
    pub version: Version,
    /// Whether the guest and its paravisor know confidential channels.
    pub confidential: bool,
    /// Whether the guest is isolated from the host, and so takes few kinds of devices from it.
    pub isolated: bool,
}

/// Why an offer is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OfferError {
    /// The channel id is not between 1 and 2047.
    InvalidChannelId,
    /// A channel that is still there has the id.
    DuplicateChannelId,
    /// The class or the instance is all zero.
    ZeroGuid,
    /// Confidential memory behind a ring that is not: no secret would be kept.
    ConfidentialMemoryOnly,
    /// A confidential channel, which this guest or this version does not know.
    ConfidentialNotSupported,
    /// An isolated guest takes no device of this class.
    NotAllowedWhenIsolated,
    /// The instance exists with another class.
    ClassMismatch,
    /// The device exists with a channel of this index.
    DuplicateIndex,
    /// A sub-channel of a device that does not exist.
    NoPrimary,
}

impl OfferError {
    /// Whether the guest must say RELID_RELEASED, so that the host need not keep the channel for
    /// it. Not when the id is none, or belongs to a channel that the guest has.
    pub fn must_release(self) -> bool {
        !matches!(self, Self::InvalidChannelId | Self::DuplicateChannelId)
    }
}

impl fmt::Display for OfferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InvalidChannelId => "channel id is out of bounds",
            Self::DuplicateChannelId => "channel id is in use",
            Self::ZeroGuid => "class or instance is zero",
            Self::ConfidentialMemoryOnly => "confidential memory without a confidential ring",
            Self::ConfidentialNotSupported => "confidential channels are not supported",
            Self::NotAllowedWhenIsolated => "class is not allowed in an isolated guest",
            Self::ClassMismatch => "instance exists with another class",
            Self::DuplicateIndex => "device has a channel of this index",
            Self::NoPrimary => "sub-channel without a device",
        })
    }
}

impl core::error::Error for OfferError {}

/// The classes that an isolated guest takes from the host; their drivers are hardened
/// (`allowed_in_isolated` in `drivers/hv/channel_mgmt.c`).
const ISOLATED_CLASSES: [Guid; 6] = [
    guid::SCSI,
    guid::NETWORK,
    guid::PCI,
    guid::TIME_SYNC,
    guid::HEARTBEAT,
    guid::SHUTDOWN,
];

/// Judges an offer by itself.
///
/// A monitor id for which the page has no place is no error: [`OfferChannel::monitor`] answers
/// `None` for it, and the channel is signalled by hypercall.
///
/// # Errors
///
/// Why the offer is not taken; see [`OfferError::must_release`].
pub fn check_offer(offer: &OfferChannel, rules: &OfferRules) -> Result<(), OfferError> {
    if !offer.channel_id.is_valid() {
        return Err(OfferError::InvalidChannelId);
    }
    if offer.interface_id.is_zero() || offer.instance_id.is_zero() {
        return Err(OfferError::ZeroGuid);
    }
    let flags = offer.flags();
    let ring = flags.contains(OfferFlags::CONFIDENTIAL_RING_BUFFER);
    let memory = flags.contains(OfferFlags::CONFIDENTIAL_EXTERNAL_MEMORY);
    if memory && !ring {
        return Err(OfferError::ConfidentialMemoryOnly);
    }
    if ring && !(rules.confidential && rules.version.has_confidential_channels()) {
        return Err(OfferError::ConfidentialNotSupported);
    }
    if rules.isolated
        && !flags.contains(OfferFlags::TLNPI_PROVIDER_OFFER)
        && !ISOLATED_CLASSES.contains(&offer.interface_id)
    {
        return Err(OfferError::NotAllowedWhenIsolated);
    }
    Ok(())
}

/// What the guest knows of a channel that it has taken and not released.
#[derive(Clone, Copy, Debug)]
pub struct KnownChannel {
    /// Its id.
    pub channel_id: ChannelId,
    /// Its device's class.
    pub interface_id: Guid,
    /// Its device's instance.
    pub instance_id: Guid,
    /// 0 for a primary channel.
    pub sub_channel_index: u16,
    /// Whether the host has taken it back.
    pub rescinded: bool,
}

/// Where an offered channel belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// A new device.
    Primary,
    /// A new device, but its former self, with this channel, has not quite gone: take the offer
    /// up again when that channel is released.
    PrimaryAfter(ChannelId),
    /// One more channel for the device that has this primary channel.
    Subchannel {
        /// The primary channel.
        primary: ChannelId,
    },
}

/// Decides where an offer that [`check_offer`] takes belongs, among the channels that the guest
/// has.
///
/// # Errors
///
/// [`OfferError::DuplicateChannelId`], [`ClassMismatch`](OfferError::ClassMismatch),
/// [`DuplicateIndex`](OfferError::DuplicateIndex) or [`NoPrimary`](OfferError::NoPrimary).
pub fn place_offer(
    offer: &OfferChannel,
    known: impl IntoIterator<Item = KnownChannel>,
) -> Result<Placement, OfferError> {
    let index = offer.sub_channel_index.get();
    let mut mismatch = false;
    let mut duplicate = false;
    let mut primary = None;
    let mut old_primary = None;
    for channel in known {
        if channel.channel_id == offer.channel_id {
            return Err(OfferError::DuplicateChannelId);
        }
        if channel.instance_id != offer.instance_id {
            continue;
        }
        if channel.rescinded {
            // Names in sysfs are by instance, so its class does not matter.
            if channel.sub_channel_index == 0 {
                old_primary = Some(channel.channel_id);
            }
            continue;
        }
        mismatch |= channel.interface_id != offer.interface_id;
        duplicate |= channel.sub_channel_index == index;
        if channel.sub_channel_index == 0 {
            primary = Some(channel.channel_id);
        }
    }
    if mismatch {
        return Err(OfferError::ClassMismatch);
    }
    if duplicate {
        return Err(OfferError::DuplicateIndex);
    }
    match (index, primary, old_primary) {
        (0, _, None) => Ok(Placement::Primary),
        (0, _, Some(old)) => Ok(Placement::PrimaryAfter(old)),
        (_, Some(primary), _) => Ok(Placement::Subchannel { primary }),
        (_, None, _) => Err(OfferError::NoPrimary),
    }
}

/// Where a channel stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelState {
    /// Not open.
    Closed,
    /// OPENCHANNEL was sent with this id, and the result has not come.
    Opening(OpenId),
    /// Open.
    Open,
}

/// Why a channel cannot be opened or modified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChannelError {
    /// The host has taken it back.
    Rescinded,
    /// It is in the wrong state, or the answer to the same request has not come yet.
    Busy,
    /// There are more than 120 bytes of user data.
    UserDataTooLong,
    /// The agreed version does not have this.
    NotInVersion,
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rescinded => "channel was rescinded",
            Self::Busy => "channel is busy",
            Self::UserDataTooLong => "user data is longer than 120 bytes",
            Self::NotInVersion => "not part of the agreed version",
        })
    }
}

impl core::error::Error for ChannelError {}

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

/// The guest's side of one channel.
#[derive(Clone, Debug)]
pub struct Channel {
    channel_id: ChannelId,
    state: ChannelState,
    rescinded: bool,
    released: bool,
    /// Times that it was opened; makes open ids different.
    opens: u16,
    /// MODIFYCHANNEL was sent, and its answer has not come.
    modifying: bool,
}

impl Channel {
    /// A channel that was just offered.
    pub const fn new(channel_id: ChannelId) -> Self {
        Self {
            channel_id,
            state: ChannelState::Closed,
            rescinded: false,
            released: false,
            opens: 0,
            modifying: false,
        }
    }

    /// Its id.
    pub fn channel_id(&self) -> ChannelId {
        self.channel_id
    }

    /// Where it stands.
    pub fn state(&self) -> ChannelState {
        self.state
    }

    /// Whether it is open and the host has not taken it back.
    pub fn is_usable(&self) -> bool {
        self.state == ChannelState::Open && !self.rescinded
    }

    /// Whether the host has taken it back.
    pub fn is_rescinded(&self) -> bool {
        self.rescinded
    }

    /// Opens the channel: post what comes back, and wait for OPENCHANNEL_RESULT.
    ///
    /// # Errors
    ///
    /// [`ChannelError`]; then there is nothing to post.
    pub fn open(
        &mut self,
        ring_gpadl: GpadlId,
        target_vp: VpIndex,
        downstream_page_offset: u32,
        user_data: &[u8],
    ) -> Result<OpenChannel, ChannelError> {
        if self.rescinded {
            return Err(ChannelError::Rescinded);
        }
        if self.state != ChannelState::Closed {
            return Err(ChannelError::Busy);
        }
        // Linux always uses the channel's id. With the count above its 11 bits, a result that
        // comes too late cannot be taken for that of a later request.
        let open_id = OpenId::new(self.channel_id.get() | u32::from(self.opens) << 16);
        let message = OpenChannel::new(
            self.channel_id,
            open_id,
            ring_gpadl,
            target_vp,
            downstream_page_offset,
            user_data,
        )
        .ok_or(ChannelError::UserDataTooLong)?;
        self.opens = self.opens.wrapping_add(1);
        self.state = ChannelState::Opening(open_id);
        Ok(message)
    }

    /// OPENCHANNEL_RESULT came.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] when it does not belong to the request that waits.
    pub fn open_result(&mut self, result: &OpenChannelResult) -> Result<Outcome, Unexpected> {
        let ChannelState::Opening(open_id) = self.state else {
            return Err(Unexpected::NotWaited);
        };
        if result.channel_id != self.channel_id || result.open_id != open_id {
            return Err(Unexpected::WrongId);
        }
        let outcome = Outcome::of(result.status);
        self.state = match outcome {
            Outcome::Done => ChannelState::Open,
            Outcome::Refused(_) => ChannelState::Closed,
        };
        Ok(outcome)
    }

    /// OPENCHANNEL could not be posted: the host has not heard of it.
    pub fn open_not_posted(&mut self) {
        if let ChannelState::Opening(_) = self.state {
            self.state = ChannelState::Closed;
        }
    }

    /// OPENCHANNEL_RESULT does not come. `Some`: post this. The ring's GPADL must be torn down
    /// before its memory is used for anything else, as after any close.
    pub fn open_timed_out(&mut self) -> Option<CloseChannel> {
        match self.state {
            ChannelState::Opening(_) => self.stop(),
            _ => None,
        }
    }

    /// Closes an open channel. `Some`: post this (there is no answer), and then tear down the
    /// GPADLs. `None`: it was not open, or the host has closed it itself.
    pub fn close(&mut self) -> Option<CloseChannel> {
        match self.state {
            ChannelState::Open => self.stop(),
            _ => None,
        }
    }

    fn stop(&mut self) -> Option<CloseChannel> {
        self.state = ChannelState::Closed;
        self.modifying = false;
        (!self.rescinded).then_some(CloseChannel {
            channel_id: self.channel_id,
        })
    }

    /// RESCIND_CHANNELOFFER came. The driver must end every wait and every outstanding request of
    /// the channel; a request to open has failed. What comes back is where the channel stood.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] when it came before, or names another channel.
    pub fn rescind(&mut self, message: &RescindChannelOffer) -> Result<ChannelState, Unexpected> {
        if message.channel_id != self.channel_id {
            return Err(Unexpected::WrongId);
        }
        if self.rescinded {
            return Err(Unexpected::Rescinded);
        }
        self.rescinded = true;
        self.modifying = false;
        let was = self.state;
        if let ChannelState::Opening(_) = was {
            self.state = ChannelState::Closed;
        }
        Ok(was)
    }

    /// Nothing of a rescinded channel is left in the guest. `Some`: post this, and forget the
    /// channel. `None`: it is open still, not rescinded, or released before.
    pub fn release(&mut self) -> Option<RelidReleased> {
        if !self.rescinded || self.released || self.state != ChannelState::Closed {
            return None;
        }
        self.released = true;
        Some(RelidReleased {
            channel_id: self.channel_id,
        })
    }

    /// Moves the channel's interrupts to another processor: post what comes back. From version
    /// 5.3 on ([`Version::has_modify_channel_response`]) wait for MODIFYCHANNEL_RESPONSE; older
    /// hosts do not say when it is done.
    ///
    /// # Errors
    ///
    /// [`ChannelError`]; then there is nothing to post.
    pub fn modify(
        &mut self,
        target_vp: VpIndex,
        version: Version,
    ) -> Result<ModifyChannel, ChannelError> {
        if !version.has_modify_channel() {
            return Err(ChannelError::NotInVersion);
        }
        if self.rescinded {
            return Err(ChannelError::Rescinded);
        }
        if self.state != ChannelState::Open || self.modifying {
            return Err(ChannelError::Busy);
        }
        self.modifying = version.has_modify_channel_response();
        Ok(ModifyChannel {
            channel_id: self.channel_id,
            target_vp,
        })
    }

    /// MODIFYCHANNEL_RESPONSE came.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] when it is not waited for, or names another channel.
    pub fn modify_response(
        &mut self,
        response: &ModifyChannelResponse,
    ) -> Result<Outcome, Unexpected> {
        if response.channel_id != self.channel_id {
            return Err(Unexpected::WrongId);
        }
        if !core::mem::replace(&mut self.modifying, false) {
            return Err(Unexpected::NotWaited);
        }
        Ok(Outcome::of(response.status))
    }

    /// MODIFYCHANNEL could not be posted, or its answer does not come. Where the interrupts go
    /// now is not known.
    pub fn modify_timed_out(&mut self) {
        self.modifying = false;
    }
}

/// Where a GPADL stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpadlState {
    /// The host has not heard of it.
    Unsent,
    /// The host is being told of it, or its answer has not come.
    Creating,
    /// The host may use the memory.
    Live,
    /// The host did not want it.
    Refused,
    /// The host shall let go of the memory, and has not said that it did.
    TearingDown,
    /// The host has let go of the memory.
    Released,
    /// The host never said that it let go of the memory, and it is not waited for any more.
    Leaked,
}

/// The guest's side of one GPADL.
///
/// The owner of the memory asks [`may_free`](Self::may_free) at the end; if the answer is no, it
/// must leak the memory, since the host may write to it at any later time.
#[derive(Clone, Debug)]
pub struct Gpadl {
    channel_id: ChannelId,
    gpadl_id: GpadlId,
    state: GpadlState,
}

impl Gpadl {
    /// A GPADL of which the host has not heard.
    pub const fn new(channel_id: ChannelId, gpadl_id: GpadlId) -> Self {
        Self {
            channel_id,
            gpadl_id,
            state: GpadlState::Unsent,
        }
    }

    /// Its id.
    pub fn gpadl_id(&self) -> GpadlId {
        self.gpadl_id
    }

    /// Where it stands.
    pub fn state(&self) -> GpadlState {
        self.state
    }

    /// Whether the memory may be used for something else: the host has never heard of it, did
    /// not want it, or has let go of it.
    pub fn may_free(&self) -> bool {
        matches!(
            self.state,
            GpadlState::Unsent | GpadlState::Refused | GpadlState::Released
        )
    }

    /// The first message that describes the memory is about to be posted. `false`, and it must
    /// not be: the GPADL was sent before.
    #[must_use]
    pub fn start(&mut self) -> bool {
        if self.state != GpadlState::Unsent {
            return false;
        }
        self.state = GpadlState::Creating;
        true
    }

    /// Not one of the messages could be posted.
    pub fn not_posted(&mut self) {
        if self.state == GpadlState::Creating {
            self.state = GpadlState::Unsent;
        }
    }

    /// GPADL_CREATED came.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] when it is not waited for, or names another GPADL or channel.
    pub fn created(&mut self, message: &GpadlCreated) -> Result<Outcome, Unexpected> {
        if message.gpadl_id != self.gpadl_id || message.channel_id != self.channel_id {
            return Err(Unexpected::WrongId);
        }
        if self.state != GpadlState::Creating {
            return Err(Unexpected::NotWaited);
        }
        let outcome = Outcome::of(message.status);
        self.state = match outcome {
            Outcome::Done => GpadlState::Live,
            Outcome::Refused(_) => GpadlState::Refused,
        };
        Ok(outcome)
    }

    /// The memory is wanted back; also when only some of the messages could be posted, and when
    /// GPADL_CREATED does not come. `Some`: post this, and wait for GPADL_TORNDOWN. `None`: there
    /// is nothing to tear down.
    pub fn teardown(&mut self) -> Option<GpadlTeardown> {
        match self.state {
            GpadlState::Creating | GpadlState::Live => {
                self.state = GpadlState::TearingDown;
                Some(GpadlTeardown {
                    channel_id: self.channel_id,
                    gpadl_id: self.gpadl_id,
                })
            }
            _ => None,
        }
    }

    /// GPADL_TORNDOWN came.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] when it is not waited for, or names another GPADL.
    pub fn torndown(&mut self, message: &GpadlTorndown) -> Result<(), Unexpected> {
        if message.gpadl_id != self.gpadl_id {
            return Err(Unexpected::WrongId);
        }
        if self.state != GpadlState::TearingDown {
            return Err(Unexpected::NotWaited);
        }
        self.state = GpadlState::Released;
        Ok(())
    }

    /// GPADL_TEARDOWN could not be posted, or GPADL_TORNDOWN does not come.
    pub fn teardown_timed_out(&mut self) {
        if self.state == GpadlState::TearingDown {
            self.state = GpadlState::Leaked;
        }
    }

    /// The host has rescinded the channel, or has answered UNLOAD: with it, it has let go of all
    /// memory of the channel, and answers no teardown any more.
    pub fn host_let_go(&mut self) {
        if !self.may_free() {
            self.state = GpadlState::Released;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    const ID: ChannelId = ChannelId::new(5);

    fn params(max_version: Version) -> ContactParams {
        ContactParams {
            max_version,
            ..ContactParams::new(VpIndex::new(1), 0x1000, [0x2000, 0x3000])
        }
    }

    /// Runs the negotiation against a host, and counts the messages that were posted.
    fn negotiate(
        params: &ContactParams,
        host: &mut server::Connection,
    ) -> (Result<Agreed, ConnectError>, u32, Connection) {
        let mut guest = Connection::new();
        let mut step = guest.start(params);
        let mut posted = 0;
        loop {
            step = match step {
                Step::Post(attempt) => {
                    posted += 1;
                    assert!(posted <= 16);
                    if !host.has_connection(attempt.connection_id) {
                        guest.post_failed(HvStatus::INVALID_CONNECTION_ID)
                    } else {
                        let response = match host.contact(&attempt.message, attempt.connection_id) {
                            server::ContactDecision::Accept(agreed) => agreed.response(),
                            server::ContactDecision::Refuse(target) => {
                                assert_eq!(target.sint, VMBUS_SINT);
                                server::REFUSED
                            }
                            other => panic!("{other:?}"),
                        };
                        guest.version_response(&response).unwrap()
                    }
                }
                Step::Connected(agreed) => return (Ok(agreed), posted, guest),
                Step::Failed(error) => return (Err(error), posted, guest),
            }
        }
    }

    #[test]
    fn guest_and_host_agree_on_the_newest_common_version() {
        for of_guest in Version::NEWEST_FIRST {
            for of_host in Version::NEWEST_FIRST {
                let mut host = server::Connection::new(of_host);
                let (agreed, _, guest) = negotiate(&params(of_guest), &mut host);
                let agreed = agreed.unwrap();
                assert_eq!(agreed.version, of_guest.min(of_host));
                assert_eq!(guest.version(), host.version());
                let host_side = host.agreed().unwrap();
                assert_eq!(
                    host_side.message_connection_id,
                    agreed.message_connection_id
                );
                assert_eq!(host_side.target.vp, VpIndex::new(1));
                assert_eq!(host_side.monitor_pages, Some([0x2000, 0x3000]));
            }
        }
    }

    #[test]
    fn isolated_guest_is_not_content_with_old_hosts() {
        let isolated = ContactParams {
            min_version: Version::V5_2,
            ..params(Version::NEWEST)
        };
        let (agreed, posted, guest) =
            negotiate(&isolated, &mut server::Connection::new(Version::V5_1));
        assert_eq!(agreed, Err(ConnectError::NoCommonVersion));
        assert_eq!(posted, 3);
        assert_eq!(guest.agreed(), None);
        let (agreed, _, _) = negotiate(&isolated, &mut server::Connection::new(Version::V5_2));
        assert_eq!(agreed.unwrap().version, Version::V5_2);
    }

    #[test]
    fn vtl2_tries_the_redirect_connection_first() {
        let mut guest = Connection::new();
        let params = ContactParams {
            vtl: 2,
            confidential: true,
            ..params(Version::NEWEST)
        };
        let Step::Post(first) = guest.start(&params) else {
            panic!("nothing to post");
        };
        assert_eq!(first.connection_id, ConnectionId::MESSAGE_REDIRECT);
        assert_eq!(first.message.target().vtl, 2);
        assert_eq!(first.message.target().feature_flags.get(), 0x10);
        let Step::Post(second) = guest.post_failed(HvStatus::INVALID_CONNECTION_ID) else {
            panic!("nothing to post");
        };
        assert_eq!(second.connection_id, ConnectionId::MESSAGE_V5);
        assert_eq!(second.version, first.version);
        let Step::Post(third) = guest.post_failed(HvStatus::INVALID_CONNECTION_ID) else {
            panic!("nothing to post");
        };
        assert_eq!(third.connection_id, ConnectionId::MESSAGE_REDIRECT);
        assert_eq!(third.version, Version::V5_3);
        assert_eq!(third.message.target().feature_flags.get(), 0);
    }

    #[test]
    fn bad_answers_end_the_negotiation() {
        let answer = |response: VersionResponse, max| {
            let mut guest = Connection::new();
            assert!(matches!(guest.start(&params(max)), Step::Post(_)));
            let step = guest.version_response(&response).unwrap();
            // Whatever came of it, a second answer is one too many, unless one more was asked for.
            if !matches!(step, Step::Post(_)) {
                assert_eq!(
                    guest.version_response(&response).unwrap_err(),
                    Unexpected::NotWaited
                );
            }
            step
        };
        let good = VersionResponse {
            version_supported: 1,
            message_connection_id: ConnectionId::new(4),
            ..FromZeros::new_zeroed()
        };
        assert!(matches!(answer(good, Version::V5_3), Step::Connected(_)));
        let busy = VersionResponse {
            connection_state: 1,
            ..good
        };
        assert!(matches!(
            answer(busy, Version::V5_3),
            Step::Failed(ConnectError::Refused {
                connection_state: 1
            })
        ));
        assert!(matches!(answer(busy, Version::V4_0), Step::Connected(_)));
        for id in [0, 0x100_0000, u32::MAX] {
            let strange = VersionResponse {
                message_connection_id: ConnectionId::new(id),
                ..good
            };
            assert!(matches!(
                answer(strange, Version::V5_0),
                Step::Failed(ConnectError::InvalidConnectionId(_))
            ));
            assert!(matches!(answer(strange, Version::V4_1), Step::Connected(_)));
        }
    }

    #[test]
    fn contact_can_be_given_up() {
        let mut guest = Connection::new();
        guest.start(&params(Version::NEWEST));
        assert!(matches!(
            guest.start(&params(Version::NEWEST)),
            Step::Failed(ConnectError::Busy)
        ));
        assert!(matches!(
            guest.post_failed(HvStatus::ACCESS_DENIED),
            Step::Failed(ConnectError::Post(HvStatus::ACCESS_DENIED))
        ));
        guest.start(&params(Version::NEWEST));
        assert!(matches!(
            guest.contact_timed_out(),
            Step::Failed(ConnectError::TimedOut)
        ));
        assert!(guest.version_response(&FromZeros::new_zeroed()).is_err());
    }

    #[test]
    fn only_what_fits_the_connection_is_accepted() {
        let offers_done = HostMessage::AllOffersDelivered(FromZeros::new_zeroed());
        let response = HostMessage::VersionResponse(FromZeros::new_zeroed());
        let unloaded = HostMessage::UnloadResponse(FromZeros::new_zeroed());
        let accepted = |guest: &Connection| {
            [&offers_done, &response, &unloaded].map(|message| guest.accepts(message))
        };
        let mut guest = Connection::default();
        assert_eq!(accepted(&guest), [false, false, false]);
        assert!(guest.unload().is_none() && guest.unload_response().is_err());
        guest.start(&params(Version::V4_0));
        assert_eq!(accepted(&guest), [false, true, false]);
        guest
            .version_response(&VersionResponse {
                version_supported: 1,
                ..FromZeros::new_zeroed()
            })
            .unwrap();
        assert_eq!(accepted(&guest), [true, false, false]);
        assert!(guest.unload().is_some() && guest.unload().is_none());
        assert_eq!(accepted(&guest), [false, false, true]);
        // The message connection is needed for the last message.
        assert!(guest.agreed().is_some());
        assert_eq!(guest.unload_response(), Ok(()));
        assert_eq!(accepted(&guest), [false, false, false]);
        guest.unload_timed_out();
        assert_eq!(guest.agreed(), None);
    }

    fn offer(id: u32, class: Guid, instance: u8, index: u16) -> OfferChannel {
        let mut offer = OfferChannel::new_zeroed();
        offer.channel_id = ChannelId::new(id);
        offer.interface_id = class;
        offer.instance_id = Guid::from_bytes([instance; 16]);
        offer.sub_channel_index.set(index);
        offer
    }

    fn rules(version: Version) -> OfferRules {
        OfferRules {
            version,
            confidential: false,
            isolated: false,
        }
    }

    #[test]
    fn offers_are_judged() {
        let check = |offer: &OfferChannel| check_offer(offer, &rules(Version::V5_3));
        let good = offer(7, guid::SCSI, 1, 0);
        assert_eq!(check(&good), Ok(()));
        for id in [0, 2048, u32::MAX] {
            let error = check(&offer(id, guid::SCSI, 1, 0)).unwrap_err();
            assert_eq!(error, OfferError::InvalidChannelId);
            assert!(!error.must_release());
        }
        assert_eq!(
            check(&offer(7, Guid::ZERO, 1, 0)),
            Err(OfferError::ZeroGuid)
        );
        assert_eq!(
            check(&offer(7, guid::SCSI, 0, 0)),
            Err(OfferError::ZeroGuid)
        );
    }

    #[test]
    fn confidential_offers_need_support_and_sense() {
        let ring = OfferFlags::CONFIDENTIAL_RING_BUFFER;
        let memory = OfferFlags::CONFIDENTIAL_EXTERNAL_MEMORY;
        let check = |flags: OfferFlags, version, confidential| {
            let mut offer = offer(7, guid::SCSI, 1, 0);
            offer.channel_flags.set(flags.bits());
            check_offer(
                &offer,
                &OfferRules {
                    confidential,
                    ..rules(version)
                },
            )
        };
        assert_eq!(
            check(memory, Version::V6_0, true),
            Err(OfferError::ConfidentialMemoryOnly)
        );
        assert_eq!(
            check(ring, Version::V6_0, false),
            Err(OfferError::ConfidentialNotSupported)
        );
        assert_eq!(
            check(ring, Version::V5_3, true),
            Err(OfferError::ConfidentialNotSupported)
        );
        assert_eq!(check(ring | memory, Version::V6_0, true), Ok(()));
    }

    #[test]
    fn isolated_guest_takes_few_classes() {
        let rules = OfferRules {
            isolated: true,
            ..rules(Version::V5_3)
        };
        let check = |class| check_offer(&offer(7, class, 1, 0), &rules);
        assert_eq!(check(guid::SCSI), Ok(()));
        assert_eq!(check(guid::KVP), Err(OfferError::NotAllowedWhenIsolated));
        let mut socket = offer(7, Guid::from_bytes([9; 16]), 1, 0);
        socket
            .channel_flags
            .set(OfferFlags::TLNPI_PROVIDER_OFFER.bits());
        assert_eq!(check_offer(&socket, &rules), Ok(()));
    }

    fn known(id: u32, class: Guid, instance: u8, index: u16, rescinded: bool) -> KnownChannel {
        KnownChannel {
            channel_id: ChannelId::new(id),
            interface_id: class,
            instance_id: Guid::from_bytes([instance; 16]),
            sub_channel_index: index,
            rescinded,
        }
    }

    #[test]
    fn offers_find_their_place() {
        let scsi = known(1, guid::SCSI, 1, 0, false);
        let sub = known(2, guid::SCSI, 1, 1, false);
        let gone = known(3, guid::SCSI, 2, 0, true);
        let all = [scsi, sub, gone];
        let place =
            |id, class, instance, index| place_offer(&offer(id, class, instance, index), all);
        let primary = ChannelId::new(1);
        assert_eq!(place(9, guid::SCSI, 9, 0), Ok(Placement::Primary));
        assert_eq!(
            place(9, guid::SCSI, 1, 2),
            Ok(Placement::Subchannel { primary })
        );
        assert_eq!(place(9, guid::SCSI, 1, 1), Err(OfferError::DuplicateIndex));
        assert_eq!(place(9, guid::SCSI, 1, 0), Err(OfferError::DuplicateIndex));
        assert_eq!(
            place(9, guid::NETWORK, 1, 0),
            Err(OfferError::ClassMismatch)
        );
        assert_eq!(
            place(9, guid::NETWORK, 1, 2),
            Err(OfferError::ClassMismatch)
        );
        assert_eq!(place(9, guid::SCSI, 9, 1), Err(OfferError::NoPrimary));
        assert_eq!(
            place(2, guid::SCSI, 9, 0),
            Err(OfferError::DuplicateChannelId)
        );
        assert_eq!(
            place(3, guid::SCSI, 9, 0),
            Err(OfferError::DuplicateChannelId)
        );
        // The old self of the device is on its way out.
        let old = ChannelId::new(3);
        assert_eq!(place(9, guid::SCSI, 2, 0), Ok(Placement::PrimaryAfter(old)));
        assert_eq!(
            place(9, guid::NETWORK, 2, 0),
            Ok(Placement::PrimaryAfter(old))
        );
        assert_eq!(place(9, guid::SCSI, 2, 1), Err(OfferError::NoPrimary));
    }

    fn opened() -> Channel {
        let mut channel = Channel::new(ID);
        let message = channel
            .open(GpadlId::FIRST, VpIndex::BOOT, 4, &[1])
            .unwrap();
        assert_eq!(
            channel.open_result(&result(message.open_id, 0)),
            Ok(Outcome::Done)
        );
        assert!(channel.is_usable());
        channel
    }

    fn result(open_id: OpenId, status: u32) -> OpenChannelResult {
        OpenChannelResult {
            channel_id: ID,
            open_id,
            status: U32::new(status),
        }
    }

    const RESCIND: RescindChannelOffer = RescindChannelOffer { channel_id: ID };

    #[test]
    fn results_must_belong_to_the_request() {
        let mut channel = Channel::new(ID);
        let open = |channel: &mut Channel| {
            channel
                .open(GpadlId::FIRST, VpIndex::BOOT, 4, &[])
                .map(|m| m.open_id)
        };
        assert_eq!(
            channel.open_result(&result(OpenId::new(5), 0)),
            Err(Unexpected::NotWaited)
        );
        let first = open(&mut channel).unwrap();
        assert_eq!(first.get(), 5);
        assert_eq!(open(&mut channel), Err(ChannelError::Busy));
        assert!(channel.open_timed_out().is_some());
        let second = open(&mut channel).unwrap();
        assert_eq!(
            channel.open_result(&result(first, 0)),
            Err(Unexpected::WrongId)
        );
        let mut other = result(second, 0);
        other.channel_id = ChannelId::new(6);
        assert_eq!(channel.open_result(&other), Err(Unexpected::WrongId));
        assert_eq!(
            channel.open_result(&result(second, 7)),
            Ok(Outcome::Refused(7))
        );
        assert_eq!(channel.state(), ChannelState::Closed);
        assert_eq!(
            channel
                .open(GpadlId::FIRST, VpIndex::BOOT, 4, &[0; 121])
                .map(|m| m.open_id),
            Err(ChannelError::UserDataTooLong)
        );
        open(&mut channel).unwrap();
        channel.open_not_posted();
        assert_eq!(channel.state(), ChannelState::Closed);
        assert!(channel.close().is_none());
    }

    #[test]
    fn rescind_ends_everything_and_the_id_is_released_once() {
        let mut channel = opened();
        assert!(channel.release().is_none());
        assert_eq!(
            channel.rescind(&RescindChannelOffer {
                channel_id: ChannelId::new(6)
            }),
            Err(Unexpected::WrongId)
        );
        assert_eq!(channel.rescind(&RESCIND), Ok(ChannelState::Open));
        assert_eq!(channel.rescind(&RESCIND), Err(Unexpected::Rescinded));
        assert!(channel.is_rescinded() && !channel.is_usable());
        // The driver has not let go yet.
        assert!(channel.release().is_none());
        assert!(channel.close().is_none());
        assert!(channel.open(GpadlId::FIRST, VpIndex::BOOT, 4, &[]).is_err());
        assert_eq!(channel.release().unwrap().channel_id, ID);
        assert!(channel.release().is_none());

        let mut opening = Channel::new(ID);
        let message = opening.open(GpadlId::FIRST, VpIndex::BOOT, 4, &[]).unwrap();
        assert!(matches!(
            opening.rescind(&RESCIND),
            Ok(ChannelState::Opening(_))
        ));
        assert!(opening.open_result(&result(message.open_id, 0)).is_err());
        assert!(opening.release().is_some());
    }

    #[test]
    fn modify_waits_only_where_there_is_an_answer() {
        let response = ModifyChannelResponse {
            channel_id: ID,
            status: U32::ZERO,
        };
        let mut channel = opened();
        let vp = VpIndex::new(1);
        let modify = |channel: &mut Channel, version| channel.modify(vp, version).map(|_| ());
        assert_eq!(
            modify(&mut channel, Version::V4_0),
            Err(ChannelError::NotInVersion)
        );
        assert_eq!(modify(&mut channel, Version::V5_2), Ok(()));
        assert_eq!(
            channel.modify_response(&response),
            Err(Unexpected::NotWaited)
        );
        assert_eq!(modify(&mut channel, Version::V5_3), Ok(()));
        assert_eq!(modify(&mut channel, Version::V5_3), Err(ChannelError::Busy));
        assert_eq!(channel.modify_response(&response), Ok(Outcome::Done));
        assert_eq!(modify(&mut channel, Version::V5_3), Ok(()));
        channel.modify_timed_out();
        assert_eq!(
            channel.modify_response(&response),
            Err(Unexpected::NotWaited)
        );
        channel.rescind(&RESCIND).unwrap();
        assert_eq!(
            modify(&mut channel, Version::V5_3),
            Err(ChannelError::Rescinded)
        );
        assert_eq!(
            modify(&mut Channel::new(ID), Version::V5_3),
            Err(ChannelError::Busy)
        );
    }

    fn created(status: u32) -> GpadlCreated {
        GpadlCreated {
            channel_id: ID,
            gpadl_id: GpadlId::FIRST,
            status: U32::new(status),
        }
    }

    const TORNDOWN: GpadlTorndown = GpadlTorndown {
        gpadl_id: GpadlId::FIRST,
    };

    #[test]
    fn memory_is_freed_only_when_the_host_let_go() {
        let mut gpadl = Gpadl::new(ID, GpadlId::FIRST);
        assert!(gpadl.may_free());
        assert!(gpadl.start() && !gpadl.start());
        assert!(!gpadl.may_free());
        assert_eq!(gpadl.torndown(&TORNDOWN), Err(Unexpected::NotWaited));
        assert_eq!(gpadl.created(&created(0)), Ok(Outcome::Done));
        assert_eq!(gpadl.created(&created(0)), Err(Unexpected::NotWaited));
        assert_eq!(gpadl.teardown().unwrap().channel_id, ID);
        assert!(gpadl.teardown().is_none() && !gpadl.may_free());
        assert_eq!(
            gpadl.torndown(&GpadlTorndown {
                gpadl_id: GpadlId::new(1)
            }),
            Err(Unexpected::WrongId)
        );
        let mut silent = gpadl.clone();
        assert_eq!(gpadl.torndown(&TORNDOWN), Ok(()));
        assert!(gpadl.may_free());

        silent.teardown_timed_out();
        assert_eq!(silent.state(), GpadlState::Leaked);
        assert!(!silent.may_free());
        // It is too late: the owner of the memory may have left it for good.
        assert_eq!(silent.torndown(&TORNDOWN), Err(Unexpected::NotWaited));
    }

    #[test]
    fn gpadl_that_never_came_to_life() {
        let mut refused = Gpadl::new(ID, GpadlId::FIRST);
        assert!(refused.start());
        assert_eq!(refused.created(&created(9)), Ok(Outcome::Refused(9)));
        assert!(refused.may_free() && refused.teardown().is_none());

        let mut unsent = Gpadl::new(ID, GpadlId::FIRST);
        assert!(unsent.start());
        unsent.not_posted();
        assert!(unsent.may_free());

        // The answer does not come: only a teardown makes sure.
        let mut unanswered = Gpadl::new(ID, GpadlId::FIRST);
        assert!(unanswered.start());
        assert!(unanswered.teardown().is_some());
        assert_eq!(unanswered.created(&created(0)), Err(Unexpected::NotWaited));
        assert!(!unanswered.may_free());
        unanswered.host_let_go();
        assert!(unanswered.may_free());
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Open,
        Result { stale: bool, status: u32 },
        OpenTimedOut,
        Close,
        Rescind,
        Release,
        Modify,
        Modified,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop::sample::select(vec![
            Event::Open,
            Event::Open,
            Event::Result {
                stale: false,
                status: 0,
            },
            Event::Result {
                stale: false,
                status: 0,
            },
            Event::Result {
                stale: false,
                status: 1,
            },
            Event::Result {
                stale: true,
                status: 0,
            },
            Event::OpenTimedOut,
            Event::Close,
            Event::Rescind,
            Event::Release,
            Event::Modify,
            Event::Modified,
        ])
    }

    #[derive(Clone, Copy, Debug)]
    enum GpadlEvent {
        Start,
        NotPosted,
        Created(u32),
        Teardown,
        Torndown,
        TimedOut,
        LetGo,
    }

    proptest! {
        /// In any order of events: a result opens only the request that waits, nothing is opened
        /// after a rescind, and the id is released at most once, when the channel is closed.
        #[test]
        fn any_order_of_channel_events(events in prop::collection::vec(event(), 0..80)) {
            let mut channel = Channel::new(ID);
            let mut waiting = None;
            let mut closes_due = 0u32;
            let mut releases = 0;
            let mut rescinded = false;
            for event in events {
                match event {
                    Event::Open => {
                        if let Ok(message) = channel.open(GpadlId::FIRST, VpIndex::BOOT, 2, &[]) {
                            prop_assert!(!rescinded && waiting.is_none());
                            waiting = Some(message.open_id);
                        }
                    }
                    Event::Result { stale, status } => {
                        let id = waiting.map_or(5, OpenId::get) ^ (u32::from(stale) << 20);
                        let got = channel.open_result(&result(OpenId::new(id), status));
                        prop_assert_eq!(got.is_ok(), waiting.is_some() && !stale);
                        if got.is_ok() {
                            waiting = None;
                            closes_due += u32::from(status == 0);
                        }
                    }
                    Event::OpenTimedOut => {
                        let close = channel.open_timed_out();
                        prop_assert_eq!(close.is_some(), waiting.take().is_some());
                    }
                    Event::Close => {
                        if channel.close().is_some() {
                            prop_assert!(!rescinded);
                            closes_due -= 1;
                        }
                    }
                    Event::Rescind => {
                        prop_assert_eq!(channel.rescind(&RESCIND).is_ok(), !rescinded);
                        rescinded = true;
                        waiting = None;
                    }
                    Event::Release => {
                        if channel.release().is_some() {
                            prop_assert!(rescinded);
                            prop_assert_eq!(channel.state(), ChannelState::Closed);
                            releases += 1;
                        }
                    }
                    Event::Modify => {
                        let open = channel.is_usable();
                        if channel.modify(VpIndex::BOOT, Version::V5_3).is_ok() {
                            prop_assert!(open);
                        }
                    }
                    Event::Modified => {
                        let response =
                            ModifyChannelResponse { channel_id: ID, status: U32::ZERO };
                        if channel.modify_response(&response).is_ok() {
                            prop_assert!(channel.is_usable());
                        }
                    }
                }
                prop_assert!(releases <= 1 && closes_due <= 1);
                prop_assert_eq!(
                    matches!(channel.state(), ChannelState::Opening(_)),
                    waiting.is_some()
                );
                if channel.is_usable() {
                    prop_assert!(!rescinded && closes_due == 1);
                }
            }
        }

        /// In any order of events, memory of which the host may hold on is never free.
        #[test]
        fn any_order_of_gpadl_events(
            events in prop::collection::vec(
                prop::sample::select(vec![
                    GpadlEvent::Start,
                    GpadlEvent::NotPosted,
                    GpadlEvent::Created(0),
                    GpadlEvent::Created(1),
                    GpadlEvent::Teardown,
                    GpadlEvent::Torndown,
                    GpadlEvent::TimedOut,
                    GpadlEvent::LetGo,
                ]),
                0..30,
            ),
        ) {
            let mut gpadl = Gpadl::new(ID, GpadlId::FIRST);
            let mut held = false;
            for event in events {
                match event {
                    GpadlEvent::Start => held |= gpadl.start(),
                    GpadlEvent::NotPosted => {
                        held &= gpadl.state() != GpadlState::Creating;
                        gpadl.not_posted();
                    }
                    GpadlEvent::Created(status) => {
                        if let Ok(Outcome::Refused(_)) = gpadl.created(&created(status)) {
                            held = false;
                        }
                    }
                    GpadlEvent::Teardown => {
                        let sent = gpadl.teardown().is_some();
                        prop_assert!(held || !sent);
                    }
                    GpadlEvent::Torndown => {
                        if gpadl.torndown(&TORNDOWN).is_ok() {
                            held = false;
                        }
                    }
                    GpadlEvent::TimedOut => gpadl.teardown_timed_out(),
                    GpadlEvent::LetGo => {
                        gpadl.host_let_go();
                        held = false;
                    }
                }
                prop_assert_eq!(gpadl.may_free(), !held);
            }
        }

        /// No order of events of the connection makes it panic or try for ever.
        #[test]
        fn any_order_of_contact_events(events in prop::collection::vec(0u8..8, 0..60), vtl: u8) {
            let mut guest = Connection::new();
            let params = ContactParams { vtl, ..params(Version::NEWEST) };
            for event in events {
                let response = |supported, id| VersionResponse {
                    version_supported: supported,
                    message_connection_id: ConnectionId::new(id),
                    ..FromZeros::new_zeroed()
                };
                let before = guest.version();
                match event {
                    0 => drop(guest.start(&params)),
                    1 => drop(guest.post_failed(HvStatus::INVALID_CONNECTION_ID)),
                    2 => drop(guest.post_failed(HvStatus::INSUFFICIENT_BUFFERS)),
                    3 => drop(guest.version_response(&response(0, 0))),
                    4 => drop(guest.version_response(&response(1, 4))),
                    5 => drop(guest.unload()),
                    6 => drop(guest.unload_response()),
                    _ => guest.unload_timed_out(),
                }
                // Only an answer makes a connection, and only its end ends it.
                if guest.version() != before {
                    prop_assert!(matches!(event, 4 | 6 | 7));
                }
            }
        }
    }
}
