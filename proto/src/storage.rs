// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The storage protocol: how a synthetic SCSI, IDE or Fibre Channel controller speaks over a
//! channel.
//!
//! Every packet carries one [`VstorPacket`]. The guest's packets are requests; the host answers
//! each with a completion packet whose operation is [`Operation::COMPLETE_IO`], and sends two
//! operations by itself when disks come and go. A channel begins with a handshake
//! ([`GuestHandshake`], [`HostHandshake`]). After it, the guest sends SCSI commands; [`judge`]
//! decides what an answer means for the command.
//!
//! State machines only: packets in, packets and decisions out. Nothing here waits, allocates or
//! panics. Uses [`crate::scsi`], `zerocopy` and `bitflags`.
//!
//! Source of layouts and numbers: the kernel's `drivers/scsi/storvsc_drv.c`. Values of SRB status
//! are those of Windows' storage drivers (`srb.h`), values of the packet status are NTSTATUS codes
//! ([MS-ERREF] 2.3).

mod guest;
mod host;
mod verdict;

pub use guest::{GuestConfig, GuestError, GuestHandshake, GuestStep, Negotiated};
pub use host::{HostConfig, HostHandshake, HostStep};
pub use verdict::{judge, Action, SentCommand, Verdict};

use crate::scsi::{ScsiStatus, MAX_CDB_SIZE};
use bitflags::bitflags;
use core::fmt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes as _, FromZeros, IntoBytes as _};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a storage packet since version 5.1, in bytes.
pub const PACKET_SIZE: usize = 64;

/// Size of a storage packet before version 5.1, in bytes: the last 16 bytes of the request are
/// missing.
pub const OLD_PACKET_SIZE: usize = 48;

/// Room for sense data in a storage packet, in bytes.
pub const SENSE_SIZE: usize = 20;

/// Size of the part of a storage packet whose meaning depends on the operation, in bytes.
const BODY_SIZE: usize = 52;

/// The smallest sensible limit of the size of a transfer, in bytes: one page.
const MIN_TRANSFER_SIZE: u32 = 4096;

/// Version of the storage protocol. Each is written `major.minor`; later ones compare greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// 2.0, of Windows Server 2008.
    V2_0,
    /// 4.2, of Windows Server 2008 R2.
    V4_2,
    /// 5.1, of Windows Server 2012: longer requests, sub-channels.
    V5_1,
    /// 6.0, of Windows Server 2012 R2.
    V6_0,
    /// 6.2, of Windows Server 2016.
    V6_2,
}

impl Version {
    /// All versions, newest first.
    pub const NEWEST_FIRST: [Self; 5] =
        [Self::V6_2, Self::V6_0, Self::V5_1, Self::V4_2, Self::V2_0];

    /// The versions that the guest offers, in order. Hosts that know older ones only are out of
    /// support.
    pub const GUEST: [Self; 2] = [Self::V6_2, Self::V6_0];

    /// The number on the wire: major version in the upper byte, minor version in the lower one.
    pub const fn raw(self) -> u16 {
        match self {
            Self::V2_0 => 0x0200,
            Self::V4_2 => 0x0402,
            Self::V5_1 => 0x0501,
            Self::V6_0 => 0x0600,
            Self::V6_2 => 0x0602,
        }
    }

    /// The version with number `raw`, if it is a known one.
    pub fn from_raw(raw: u16) -> Option<Self> {
        Self::NEWEST_FIRST
            .into_iter()
            .find(|version| version.raw() == raw)
    }

    /// Size of a storage packet, in bytes.
    pub const fn packet_size(self) -> usize {
        match self {
            Self::V2_0 | Self::V4_2 => OLD_PACKET_SIZE,
            Self::V5_1 | Self::V6_0 | Self::V6_2 => PACKET_SIZE,
        }
    }

    /// Whether a controller may have sub-channels.
    pub fn has_sub_channels(self) -> bool {
        self >= Self::V5_1
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.raw() >> 8, self.raw() & 0xff)
    }
}

open_enum! {
    /// What a storage packet asks for or tells.
    pub struct Operation: u32 {
        /// Host to guest, as answer: the request is finished.
        COMPLETE_IO = 1,
        /// Host to guest, unasked: a disk has gone.
        REMOVE_DEVICE = 2,
        /// Run a SCSI command.
        EXECUTE_SRB = 3,
        /// Reset a logical unit.
        RESET_LUN = 4,
        /// Reset the controller.
        RESET_ADAPTER = 5,
        /// Reset the bus: every command that runs is aborted.
        RESET_BUS = 6,
        /// First step of the handshake.
        BEGIN_INITIALIZATION = 7,
        /// Last step of the handshake.
        END_INITIALIZATION = 8,
        /// Handshake: propose a version.
        QUERY_PROTOCOL_VERSION = 9,
        /// Handshake: ask for the properties of the channel.
        QUERY_PROPERTIES = 10,
        /// Host to guest, unasked: disks have come or gone.
        ENUMERATE_BUS = 11,
        /// Handshake: ask for the names of a Fibre Channel port.
        FCHBA_DATA = 12,
        /// Ask for sub-channels.
        CREATE_SUB_CHANNELS = 13,
    }
}

open_enum! {
    /// Status of a storage packet: an NTSTATUS code.
    pub struct Status: u32 {
        /// Success.
        SUCCESS = 0,
        /// The request failed (`STATUS_UNSUCCESSFUL`).
        UNSUCCESSFUL = 0xc000_0001,
        /// A field of the request has an impossible value.
        INVALID_PARAMETER = 0xc000_000d,
        /// The operation is unknown.
        INVALID_DEVICE_REQUEST = 0xc000_0010,
        /// The version is not supported.
        REVISION_MISMATCH = 0xc000_0059,
        /// The operation is known, but not supported by this controller.
        NOT_SUPPORTED = 0xc000_00bb,
        /// The operation is not allowed at this time.
        INVALID_DEVICE_STATE = 0xc000_0184,
    }
}

open_enum! {
    /// Direction of the data of a SCSI request.
    pub struct DataIn: u8 {
        /// Guest to host.
        WRITE = 0,
        /// Host to guest.
        READ = 1,
        /// There is no data.
        NONE = 2,
    }
}

open_enum! {
    /// Lower six bits of the status of a SCSI request, without its flags.
    pub struct SrbCode: u8 {
        /// Not finished; never part of an answer.
        PENDING = 0x00,
        /// Success.
        SUCCESS = 0x01,
        /// The request was aborted.
        ABORTED = 0x02,
        /// The request could not be aborted.
        ABORT_FAILED = 0x03,
        /// The request failed; SCSI status and sense data tell more.
        ERROR = 0x04,
        /// The device or the host is busy.
        BUSY = 0x05,
        /// The host does not know this request.
        INVALID_REQUEST = 0x06,
        /// There is no such bus.
        INVALID_PATH_ID = 0x07,
        /// There is no such device.
        NO_DEVICE = 0x08,
        /// The request took too long.
        TIMEOUT = 0x09,
        /// The device did not answer.
        SELECTION_TIMEOUT = 0x0a,
        /// The command took too long.
        COMMAND_TIMEOUT = 0x0b,
        /// The bus was reset.
        BUS_RESET = 0x0e,
        /// There is no controller.
        NO_HBA = 0x11,
        /// More or less data than asked for; the transfer length tells how much.
        DATA_OVERRUN = 0x12,
        /// The queue of the device was emptied.
        REQUEST_FLUSHED = 0x16,
        /// There is no such logical unit.
        INVALID_LUN = 0x20,
        /// There is no such target.
        INVALID_TARGET_ID = 0x21,
        /// The function of the request is not supported.
        BAD_FUNCTION = 0x22,
        /// The host failed in another way.
        INTERNAL_ERROR = 0x30,
    }
}

/// Status of a SCSI request: a [`SrbCode`] and two flags.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct SrbStatus(u8);

impl SrbStatus {
    const QUEUE_FROZEN: u8 = 0x40;
    const AUTOSENSE_VALID: u8 = 0x80;

    /// A status without flags.
    pub const fn new(code: SrbCode) -> Self {
        Self(code.get() & !(Self::QUEUE_FROZEN | Self::AUTOSENSE_VALID))
    }

    /// A status from its byte on the wire.
    pub const fn from_raw(raw: u8) -> Self {
        Self(raw)
    }

    /// The byte on the wire.
    pub const fn raw(self) -> u8 {
        self.0
    }

    /// The same status, and the packet contains sense data.
    pub const fn with_autosense(self) -> Self {
        Self(self.0 | Self::AUTOSENSE_VALID)
    }

    /// The status without flags.
    pub const fn code(self) -> SrbCode {
        SrbCode::new(self.0 & !(Self::QUEUE_FROZEN | Self::AUTOSENSE_VALID))
    }

    /// Whether the packet is said to contain sense data.
    pub const fn has_autosense(self) -> bool {
        self.0 & Self::AUTOSENSE_VALID != 0
    }
}

/// Flags of a SCSI request. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct SrbFlags(u32);

bitflags! {
    impl SrbFlags: u32 {
        /// The queue action counts.
        const QUEUE_ACTION_ENABLE = 0x0000_0002;
        /// Do not disconnect from the bus.
        const DISABLE_DISCONNECT = 0x0000_0004;
        /// Do not use synchronous transfers.
        const DISABLE_SYNCH_TRANSFER = 0x0000_0008;
        /// Run also when the queue is frozen.
        const BYPASS_FROZEN_QUEUE = 0x0000_0010;
        /// Do not send sense data with the answer.
        const DISABLE_AUTOSENSE = 0x0000_0020;
        /// Data goes from host to guest.
        const DATA_IN = 0x0000_0040;
        /// Data goes from guest to host.
        const DATA_OUT = 0x0000_0080;
        /// An error does not freeze the queue.
        const NO_QUEUE_FREEZE = 0x0000_0100;
        const _ = !0;
    }
}

/// Tag of a request that has none.
pub const UNTAGGED: u8 = 0xff;

/// Queue action: the command may be reordered with others (SIMPLE task attribute).
pub const SIMPLE_TAG_REQUEST: u8 = 0x20;

/// A SCSI request and its answer, in the body of a [`VstorPacket`].
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ScsiRequest {
    /// Size of this structure in bytes: 52, before version 5.1 36.
    pub length: U16,
    /// Answer: what became of the request.
    pub srb_status: SrbStatus,
    /// Answer: SCSI status.
    pub scsi_status: ScsiStatus,
    /// Number of the controller; chosen by the guest.
    pub port_number: u8,
    /// Bus.
    pub path_id: u8,
    /// Target.
    pub target_id: u8,
    /// Logical unit.
    pub lun: u8,
    /// Length of the command block, in bytes.
    pub cdb_length: u8,
    /// Request: room for sense data; answer: length of the sense data. In bytes.
    pub sense_info_length: u8,
    /// Direction of the data.
    pub data_in: DataIn,
    /// Zero.
    pub reserved: u8,
    /// Request: size of the data; answer: how much was transferred. In bytes.
    pub data_transfer_length: U32,
    /// Request: the command block; answer: the sense data. [`ScsiRequest::cdb`] and
    /// [`ScsiRequest::sense`] give the valid part.
    pub cdb_or_sense: [u8; SENSE_SIZE],
    /// Zero.
    pub reserved2: U16,
    /// Tag, or [`UNTAGGED`].
    pub queue_tag: u8,
    /// Kind of queueing, e.g. [`SIMPLE_TAG_REQUEST`].
    pub queue_action: u8,
    /// [`SrbFlags`].
    pub srb_flags: U32,
    /// How long the command may take, in seconds.
    pub time_out_value: U32,
    /// Hint for sorting.
    pub queue_sort_key: U32,
}

const _: () = assert!(size_of::<ScsiRequest>() == BODY_SIZE);

/// Address of a logical unit behind a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LunAddress {
    /// Bus.
    pub path: u8,
    /// Target.
    pub target: u8,
    /// Logical unit.
    pub lun: u8,
}

impl ScsiRequest {
    /// A request for `cdb` with `data_length` bytes of data. `None` if the command block is too
    /// long or empty.
    pub fn new(address: LunAddress, cdb: &[u8], data_in: DataIn, data_length: u32) -> Option<Self> {
        if cdb.is_empty() || cdb.len() > MAX_CDB_SIZE {
            return None;
        }
        let mut cdb_or_sense = [0; SENSE_SIZE];
        cdb_or_sense.get_mut(..cdb.len())?.copy_from_slice(cdb);
        let direction = match data_in {
            DataIn::WRITE => SrbFlags::DATA_OUT,
            DataIn::READ => SrbFlags::DATA_IN,
            _ => SrbFlags::empty(),
        };
        let flags = direction | SrbFlags::DISABLE_SYNCH_TRANSFER;
        Some(Self {
            length: U16::new(size_of::<Self>() as u16),
            path_id: address.path,
            target_id: address.target,
            lun: address.lun,
            cdb_length: u8::try_from(cdb.len()).ok()?,
            sense_info_length: SENSE_SIZE as u8,
            data_in,
            data_transfer_length: data_length.into(),
            cdb_or_sense,
            srb_flags: flags.bits().into(),
            ..Self::new_zeroed()
        })
    }

    /// Makes the request one of a tagged queue, which the device may reorder.
    pub fn set_simple_tag(&mut self) {
        let flags = SrbFlags::QUEUE_ACTION_ENABLE | SrbFlags::NO_QUEUE_FREEZE;
        self.srb_flags = U32::new(self.srb_flags.get() | flags.bits());
        self.queue_tag = UNTAGGED;
        self.queue_action = SIMPLE_TAG_REQUEST;
    }

    /// The logical unit that the request is for.
    pub fn address(&self) -> LunAddress {
        LunAddress {
            path: self.path_id,
            target: self.target_id,
            lun: self.lun,
        }
    }

    /// The command block of a request; `None` if its length is not 1 to 16 bytes.
    pub fn cdb(&self) -> Option<&[u8]> {
        match usize::from(self.cdb_length) {
            len @ 1..=MAX_CDB_SIZE => self.cdb_or_sense.get(..len),
            _ => None,
        }
    }

    /// Flags of the request.
    pub fn flags(&self) -> SrbFlags {
        SrbFlags::from_bits_retain(self.srb_flags.get())
    }

    /// The sense data of an answer, not parsed; empty if there is none. At most [`SENSE_SIZE`]
    /// bytes.
    pub fn sense(&self) -> &[u8] {
        if !self.srb_status.has_autosense() {
            return &[];
        }
        let len = usize::from(self.sense_info_length).min(SENSE_SIZE);
        self.cdb_or_sense.get(..len).unwrap_or_default()
    }

    /// Turns a request into an answer without sense data: what the command block was is gone.
    pub fn set_answer(&mut self, srb: SrbCode, status: ScsiStatus, transferred: u32) {
        self.srb_status = SrbStatus::new(srb);
        self.scsi_status = status;
        self.data_transfer_length = transferred.into();
        self.sense_info_length = 0;
        self.cdb_or_sense = [0; SENSE_SIZE];
    }

    /// Turns a request into a failure with sense data, of which the first [`SENSE_SIZE`] bytes are
    /// sent.
    pub fn set_check_condition(&mut self, sense: &[u8], transferred: u32) {
        self.set_answer(SrbCode::ERROR, ScsiStatus::CHECK_CONDITION, transferred);
        self.srb_status = self.srb_status.with_autosense();
        let mut len = 0u8;
        for (to, from) in self.cdb_or_sense.iter_mut().zip(sense) {
            *to = *from;
            len = len.saturating_add(1);
        }
        self.sense_info_length = len;
    }
}

bitflags! {
    impl PropertyFlags: u32 {
        /// The controller can have sub-channels.
        const MULTI_CHANNEL = 1;
        const _ = !0;
    }
}

/// Flags of [`ChannelProperties`]. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct PropertyFlags(u32);

/// Properties of a channel: answer to [`Operation::QUERY_PROPERTIES`], and, all zero, the user data
/// of the request to open the channel.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ChannelProperties {
    /// Zero.
    pub reserved: U32,
    /// How many sub-channels the host allows.
    pub max_channel_count: U16,
    /// Zero.
    pub reserved2: U16,
    /// [`PropertyFlags`].
    pub flags: U32,
    /// The largest transfer of one command, in bytes.
    pub max_transfer_bytes: U32,
    /// Zero.
    pub reserved3: U64,
}

const _: () = assert!(size_of::<ChannelProperties>() == 24);

/// Body of [`Operation::QUERY_PROTOCOL_VERSION`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct VersionBody {
    /// [`Version::raw`].
    major_minor: U16,
    /// Build number of the Windows driver; zero.
    revision: U16,
}

/// Names of a Fibre Channel port: answer to [`Operation::FCHBA_DATA`].
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct WwnPacket {
    /// Non-zero if the primary names are in use, zero for the secondary ones.
    pub primary_active: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// World-wide name of the port, big-endian.
    pub primary_port_wwn: [u8; 8],
    /// World-wide name of the node, big-endian.
    pub primary_node_wwn: [u8; 8],
    /// Name of the port after a migration, big-endian.
    pub secondary_port_wwn: [u8; 8],
    /// Name of the node after a migration, big-endian.
    pub secondary_node_wwn: [u8; 8],
}

const _: () = assert!(size_of::<WwnPacket>() == 36);

impl WwnPacket {
    /// World-wide name of the port that is in use.
    pub fn port_name(&self) -> u64 {
        u64::from_be_bytes(match self.primary_active {
            0 => self.secondary_port_wwn,
            _ => self.primary_port_wwn,
        })
    }

    /// World-wide name of the node that is in use.
    pub fn node_name(&self) -> u64 {
        u64::from_be_bytes(match self.primary_active {
            0 => self.secondary_node_wwn,
            _ => self.primary_node_wwn,
        })
    }
}

/// Flag of a storage packet: the guest waits for an answer.
pub const REQUEST_COMPLETION: u32 = 1;

/// A storage packet.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct VstorPacket {
    /// What it is.
    pub operation: Operation,
    /// [`REQUEST_COMPLETION`] or zero.
    pub flags: U32,
    /// Answer: whether the operation was successful.
    pub status: Status,
    /// Depends on the operation.
    pub body: [u8; BODY_SIZE],
}

const _: () = assert!(size_of::<VstorPacket>() == PACKET_SIZE);

impl VstorPacket {
    /// A request with an empty body. The host shall answer it.
    pub fn request(operation: Operation) -> Self {
        Self {
            operation,
            flags: REQUEST_COMPLETION.into(),
            status: Status::SUCCESS,
            body: [0; BODY_SIZE],
        }
    }

    /// A request to run a SCSI command.
    pub fn execute(request: &ScsiRequest) -> Self {
        let mut packet = Self::request(Operation::EXECUTE_SRB);
        packet.set_body(request);
        packet
    }

    /// An answer with `status` and an empty body.
    pub fn completion(status: Status) -> Self {
        Self {
            operation: Operation::COMPLETE_IO,
            flags: 0.into(),
            status,
            body: [0; BODY_SIZE],
        }
    }

    /// The answer to a SCSI command.
    pub fn io_completion(answer: &ScsiRequest) -> Self {
        let mut packet = Self::completion(Status::SUCCESS);
        packet.set_body(answer);
        packet
    }

    /// A message of the host that nobody asked for: [`Operation::ENUMERATE_BUS`] or
    /// [`Operation::REMOVE_DEVICE`].
    pub fn notification(operation: Operation) -> Self {
        Self {
            operation,
            flags: 0.into(),
            status: Status::SUCCESS,
            body: [0; BODY_SIZE],
        }
    }

    /// Parses the payload of a packet. Bytes that follow are ignored; in a packet of an old
    /// version, the bytes that are missing are zero.
    ///
    /// # Errors
    /// [`TooShort`] if there are less than `min_size` bytes, which is [`Version::packet_size`], or
    /// less than [`OLD_PACKET_SIZE`].
    pub fn parse(payload: &[u8], min_size: usize) -> Result<Self, TooShort> {
        if payload.len() < min_size.max(OLD_PACKET_SIZE) {
            return Err(TooShort { len: payload.len() });
        }
        let mut packet = Self::new_zeroed();
        for (to, from) in packet.as_mut_bytes().iter_mut().zip(payload) {
            *to = *from;
        }
        Ok(packet)
    }

    /// The bytes to send when `version` is in use.
    pub fn bytes(&self, version: Version) -> &[u8] {
        let bytes = self.as_bytes();
        bytes.get(..version.packet_size()).unwrap_or(bytes)
    }

    /// The operation alone, which is all that a message of the host that nobody asked for must
    /// contain.
    pub fn operation_of(payload: &[u8]) -> Option<Operation> {
        Operation::read_from_prefix(payload)
            .ok()
            .map(|(operation, _)| operation)
    }

    /// The body as SCSI request.
    pub fn scsi_request(&self) -> ScsiRequest {
        zerocopy::transmute!(self.body)
    }

    /// The body as channel properties.
    pub fn properties(&self) -> ChannelProperties {
        self.read_body()
    }

    /// The body as names of a Fibre Channel port.
    pub fn wwn(&self) -> WwnPacket {
        self.read_body()
    }

    /// The body as number of sub-channels.
    pub fn sub_channel_count(&self) -> u16 {
        self.read_body::<U16>().get()
    }

    /// The body as number of a version.
    pub fn version(&self) -> u16 {
        self.read_body::<VersionBody>().major_minor.get()
    }

    /// Reads the start of the body. All types that are used for it are smaller than the body.
    fn read_body<T: zerocopy::FromBytes>(&self) -> T {
        match T::read_from_prefix(&self.body) {
            Ok((value, _)) => value,
            Err(_) => T::new_zeroed(),
        }
    }

    /// Overwrites the start of the body.
    fn set_body<T: zerocopy::IntoBytes + zerocopy::Immutable>(&mut self, value: &T) {
        for (to, from) in self.body.iter_mut().zip(value.as_bytes()) {
            *to = *from;
        }
    }
}

/// A storage packet is too short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooShort {
    /// Its size in bytes.
    pub len: usize,
}

impl fmt::Display for TooShort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "storage packet of {} bytes is too short", self.len)
    }
}

impl core::error::Error for TooShort {}

#[cfg(test)]
mod tests;
