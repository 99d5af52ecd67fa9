// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The mouse: a HID device, whose descriptors and reports come through a message pipe.
//!
//! Guest: request. Host: response, then what the device is. Guest: acknowledgement. Then the host
//! sends reports ([`GuestMouse`], [`HostMouse`]).

use crate::message::split_prefix;
use crate::pipe::{self, PipeHeader};
use bitflags::bitflags;
use core::fmt;
use zerocopy::little_endian::{U16, U32};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The only version in use, 2.0.
pub const VERSION: u32 = 0x0002_0000;

/// The longest report descriptor, in bytes (`HID_MAX_DESCRIPTOR_SIZE` of the kernel).
pub const MAX_REPORT_DESCRIPTOR: usize = 4096;

/// Vendor of the mouse: Microsoft.
pub const VENDOR: u16 = 0x045e;

/// Product number of the mouse.
pub const PRODUCT: u16 = 0x0621;

open_enum! {
    /// What a message is.
    pub struct MessageType: u32 {
        /// Guest: proposes a version.
        PROTOCOL_REQUEST = 0,
        /// Host: accepts it or not.
        PROTOCOL_RESPONSE = 1,
        /// Host: what the device is.
        DEVICE_INFO = 2,
        /// Guest: has understood that.
        DEVICE_INFO_ACK = 3,
        /// Host: the user has done something.
        INPUT_REPORT = 4,
    }
}

/// What every message starts with, in its frame.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct MessageHeader {
    /// Frame of the pipe.
    pub pipe: PipeHeader,
    /// What the message is.
    pub message_type: MessageType,
    /// Size of what follows, in bytes.
    pub size: U32,
}

impl MessageHeader {
    const fn new(message_type: MessageType, size: u32) -> Self {
        Self {
            pipe: PipeHeader::data(size.saturating_add(8)),
            message_type,
            size: U32::new(size),
        }
    }

    /// The header of a report of `len` bytes, which follow it. `None` if it is too long.
    pub fn report(len: usize) -> Option<Self> {
        let size = u32::from(u16::try_from(len).ok()?);
        Some(Self::new(MessageType::INPUT_REPORT, size))
    }
}

/// Proposes a version.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ProtocolRequest {
    /// Header.
    pub header: MessageHeader,
    /// Major version in the upper half, minor version in the lower one.
    pub version: U32,
}

const _: () = assert!(size_of::<ProtocolRequest>() == 20);

/// Accepts a version or not.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ProtocolResponse {
    /// Header.
    pub header: MessageHeader,
    /// The version of the request.
    pub version: U32,
    /// Zero: not accepted.
    pub approved: u8,
}

const _: () = assert!(size_of::<ProtocolResponse>() == 21);

/// Acknowledges what the device is.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct DeviceInfoAck {
    /// Header.
    pub header: MessageHeader,
    /// Zero.
    pub reserved: u8,
}

const _: () = assert!(size_of::<DeviceInfoAck>() == 17);

/// Which device it is.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Attributes {
    /// Size of this structure in bytes: 32.
    pub size: U32,
    /// USB number of the vendor.
    pub vendor: U16,
    /// The vendor's number of the product.
    pub product: U16,
    /// Version of the product.
    pub version: U16,
    /// Zero.
    pub reserved: [U16; 11],
}

const _: () = assert!(size_of::<Attributes>() == 32);

/// HID descriptor with one subordinate descriptor (USB HID 1.11, 6.2.1).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct HidDescriptor {
    /// Size of this descriptor in bytes: at least 9.
    pub length: u8,
    /// 0x21.
    pub descriptor_type: u8,
    /// Version of the HID specification, in BCD.
    pub hid_version: U16,
    /// Country of the keyboard; 0: none.
    pub country: u8,
    /// Number of subordinate descriptors.
    pub descriptor_count: u8,
    /// Type of the first one; 0x22: report descriptor.
    pub report_type: u8,
    /// Size of the report descriptor in bytes.
    pub report_length: U16,
}

const _: () = assert!(size_of::<HidDescriptor>() == 9);

/// What a message about the device starts with; the report descriptor follows.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct DeviceInfoStart {
    /// Header.
    pub header: MessageHeader,
    /// Which device it is.
    pub attributes: Attributes,
    /// HID descriptor.
    pub descriptor: HidDescriptor,
}

impl DeviceInfoStart {
    /// For the mouse with a report descriptor of `len` bytes. `None` if it is too long.
    pub fn mouse(len: usize) -> Option<Self> {
        if len > MAX_REPORT_DESCRIPTOR {
            return None;
        }
        let report_length = u16::try_from(len).ok()?;
        let fixed = size_of::<Attributes>() + size_of::<HidDescriptor>();
        let size = u32::from(report_length).checked_add(u32::try_from(fixed).ok()?)?;
        Some(Self {
            header: MessageHeader::new(MessageType::DEVICE_INFO, size),
            attributes: Attributes {
                size: U32::new(size_of::<Attributes>() as u32),
                vendor: VENDOR.into(),
                product: PRODUCT.into(),
                version: U16::new(1),
                reserved: [U16::ZERO; 11],
            },
            descriptor: HidDescriptor {
                length: size_of::<HidDescriptor>() as u8,
                descriptor_type: 0x21,
                hid_version: U16::new(0x0101),
                country: 0,
                descriptor_count: 1,
                report_type: 0x22,
                report_length: report_length.into(),
            },
        })
    }
}

/// What a device is, with the report descriptor in the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo<'a> {
    /// USB number of the vendor.
    pub vendor: u16,
    /// The vendor's number of the product.
    pub product: u16,
    /// Version of the product.
    pub version: u16,
    /// Report descriptor: 1 to [`MAX_REPORT_DESCRIPTOR`] bytes. See also [`repair`].
    pub report_descriptor: &'a [u8],
}

impl<'a> DeviceInfo<'a> {
    /// Reads what follows the header.
    fn parse(body: &'a [u8]) -> Result<Self, GuestError> {
        let (attributes, descriptors): (Attributes, _) = split(body)?;
        let (descriptor, _): (HidDescriptor, _) = split(descriptors)?;
        let length = usize::from(descriptor.length);
        if length < size_of::<HidDescriptor>() {
            return Err(GuestError::HidDescriptor { length });
        }
        let rest = descriptors
            .get(length..)
            .ok_or(GuestError::HidDescriptor { length })?;
        let length = usize::from(descriptor.report_length.get());
        if length == 0 || length > MAX_REPORT_DESCRIPTOR {
            return Err(GuestError::ReportDescriptor { length });
        }
        Ok(Self {
            vendor: attributes.vendor.get(),
            product: attributes.product.get(),
            version: attributes.version.get(),
            report_descriptor: rest
                .get(..length)
                .ok_or(GuestError::ReportDescriptor { length })?,
        })
    }
}

/// Repairs the report descriptor of some hosts, which has "logical maximum" where it means "usage
/// maximum" of the buttons (the C driver knows it as SA-167).
pub fn repair(report_descriptor: &mut [u8]) {
    if let Some(item @ 0x25) = report_descriptor.get_mut(14) {
        *item = 0x29;
    }
}

fn split<T: zerocopy::FromBytes>(bytes: &[u8]) -> Result<(T, &[u8]), GuestError> {
    split_prefix(bytes).ok_or(GuestError::TooShort {
        needed: size_of::<T>(),
        len: bytes.len(),
    })
}

/// What the guest has to do after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestStep<'a> {
    /// Wait for the next one.
    Wait,
    /// Send [`GuestMouse::ack`]; the device is there. This comes once.
    Device(DeviceInfo<'a>),
    /// Hand on a report of the device.
    Report(&'a [u8]),
}

/// What is wrong with a message of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestError {
    /// Not a whole message, or one that is longer than its packet.
    NotAMessage,
    /// A part of a message is too short.
    TooShort {
        /// How many bytes are needed.
        needed: usize,
        /// How many there are.
        len: usize,
    },
    /// This message may not come now.
    Unexpected(MessageType),
    /// The host does not know the version.
    Refused,
    /// The length of the HID descriptor is impossible.
    HidDescriptor {
        /// The length.
        length: usize,
    },
    /// The length of the report descriptor is impossible.
    ReportDescriptor {
        /// The length.
        length: usize,
    },
}

impl GuestError {
    /// Whether the device cannot be used. Other errors mean that a message is dropped.
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Refused | Self::HidDescriptor { .. } | Self::ReportDescriptor { .. }
        )
    }
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAMessage => f.write_str("not a whole message"),
            Self::TooShort { needed, len } => write!(f, "{len} bytes instead of {needed}"),
            Self::Unexpected(message_type) => write!(f, "{message_type:?} is not expected now"),
            Self::Refused => f.write_str("host does not know version 2.0"),
            Self::HidDescriptor { length } => {
                write!(
                    f,
                    "HID descriptor of {length} bytes does not fit the message"
                )
            }
            Self::ReportDescriptor { length } => {
                write!(
                    f,
                    "report descriptor of {length} bytes does not fit the message"
                )
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestState {
    Idle,
    Asked,
    Approved,
    Ready,
}

/// The guest's side of a mouse.
#[derive(Clone, Debug)]
pub struct GuestMouse(GuestState);

impl Default for GuestMouse {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestMouse {
    /// The side of a channel that was opened just now.
    pub const fn new() -> Self {
        Self(GuestState::Idle)
    }

    /// Begins; what comes back is to be sent.
    pub fn start(&mut self) -> ProtocolRequest {
        self.0 = GuestState::Asked;
        ProtocolRequest {
            header: MessageHeader::new(MessageType::PROTOCOL_REQUEST, 4),
            version: U32::new(VERSION),
        }
    }

    /// The acknowledgement of what the device is.
    pub fn ack() -> DeviceInfoAck {
        DeviceInfoAck {
            header: MessageHeader::new(MessageType::DEVICE_INFO_ACK, 1),
            reserved: 0,
        }
    }

    /// A packet of the host has come.
    ///
    /// # Errors
    ///
    /// Nothing is to be done, and nothing has changed; if the error is fatal, the handshake is over.
    pub fn on_packet<'a>(&mut self, payload: &'a [u8]) -> Result<GuestStep<'a>, GuestError> {
        let message = pipe::message(payload).ok_or(GuestError::NotAMessage)?;
        let ([message_type, size], body): ([U32; 2], _) = split(message)?;
        let message_type = MessageType::new(message_type.get());
        let result = match (self.0, message_type) {
            (GuestState::Asked, MessageType::PROTOCOL_RESPONSE) => self.on_response(body),
            (GuestState::Approved, MessageType::DEVICE_INFO) => {
                DeviceInfo::parse(body).map(|info| {
                    self.0 = GuestState::Ready;
                    GuestStep::Device(info)
                })
            }
            (GuestState::Ready, MessageType::INPUT_REPORT) => usize::try_from(size.get())
                .ok()
                .and_then(|size| body.get(..size))
                .map(GuestStep::Report)
                .ok_or(GuestError::NotAMessage),
            (_, message_type) => Err(GuestError::Unexpected(message_type)),
        };
        if matches!(result, Err(error) if error.is_fatal()) {
            self.0 = GuestState::Idle;
        }
        result
    }

    fn on_response<'a>(&mut self, body: &[u8]) -> Result<GuestStep<'a>, GuestError> {
        let (_version, rest): (U32, _) = split(body)?;
        let (approved, _): (u8, _) = split(rest)?;
        if approved == 0 {
            return Err(GuestError::Refused);
        }
        self.0 = GuestState::Approved;
        Ok(GuestStep::Wait)
    }
}

/// What the host has to do after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostStep {
    /// Send this; then what the device is ([`DeviceInfoStart`] and the report descriptor).
    Approve(ProtocolResponse),
    /// Send this. The guest may try another version.
    Refuse(ProtocolResponse),
    /// The guest knows the device: reports may be sent.
    Ready,
}

/// What is wrong with a message of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostError {
    /// Not a whole message, or one that is longer than its packet.
    NotAMessage,
    /// This message may not come now.
    Unexpected(MessageType),
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAMessage => f.write_str("not a whole message"),
            Self::Unexpected(message_type) => write!(f, "{message_type:?} is not expected now"),
        }
    }
}

impl core::error::Error for HostError {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HostState {
    Start,
    Approved,
    Ready,
}

/// The host's side of a mouse.
#[derive(Clone, Debug)]
pub struct HostMouse(HostState);

impl Default for HostMouse {
    fn default() -> Self {
        Self::new()
    }
}

impl HostMouse {
    /// The side of a channel that was opened just now.
    pub const fn new() -> Self {
        Self(HostState::Start)
    }

    /// Whether reports may be sent.
    pub fn is_ready(&self) -> bool {
        self.0 == HostState::Ready
    }

    /// A packet of the guest has come.
    pub fn on_packet(&mut self, payload: &[u8]) -> Result<HostStep, HostError> {
        let message = pipe::message(payload).ok_or(HostError::NotAMessage)?;
        let ([message_type, _], body): ([U32; 2], _) =
            split_prefix(message).ok_or(HostError::NotAMessage)?;
        match (self.0, MessageType::new(message_type.get())) {
            (HostState::Start, MessageType::PROTOCOL_REQUEST) => {
                let (version, _): (U32, _) = split_prefix(body).ok_or(HostError::NotAMessage)?;
                let known = version.get() == VERSION;
                let response = ProtocolResponse {
                    header: MessageHeader::new(MessageType::PROTOCOL_RESPONSE, 5),
                    version,
                    approved: known.into(),
                };
                if known {
                    self.0 = HostState::Approved;
                    Ok(HostStep::Approve(response))
                } else {
                    Ok(HostStep::Refuse(response))
                }
            }
            (HostState::Approved, MessageType::DEVICE_INFO_ACK) => {
                self.0 = HostState::Ready;
                Ok(HostStep::Ready)
            }
            (_, message_type) => Err(HostError::Unexpected(message_type)),
        }
    }
}

/// Buttons of the mouse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Buttons(u8);

bitflags! {
    impl Buttons: u8 {
        /// Left.
        const LEFT = 0x01;
        /// Right.
        const RIGHT = 0x02;
        /// Middle, the wheel.
        const MIDDLE = 0x04;
        /// At the side, "back".
        const SIDE = 0x08;
        /// At the side, "forward".
        const EXTRA = 0x10;
    }
}

/// The largest coordinate of the pointer: right or lower edge of the screen.
pub const MAX_COORDINATE: u16 = 0x7fff;

/// Report descriptor of a mouse whose reports are [`MouseReport`] (USB HID 1.11, 6.2.2).
pub const REPORT_DESCRIPTOR: [u8; 68] = [
    0x05, 0x01, // usage page: generic desktop
    0x09, 0x02, // usage: mouse
    0xa1, 0x01, // collection: application
    0x09, 0x01, // usage: pointer
    0xa1, 0x00, // collection: physical
    0x05, 0x09, // usage page: buttons
    0x19, 0x01, // usage minimum: 1
    0x29, 0x05, // usage maximum: 5
    0x15, 0x00, // logical minimum: 0
    0x25, 0x01, // logical maximum: 1
    0x95, 0x05, // report count: 5
    0x75, 0x01, // report size: 1 bit
    0x81, 0x02, // input: variable, absolute
    0x95, 0x01, // report count: 1
    0x75, 0x03, // report size: 3 bits
    0x81, 0x03, // input: constant
    0x05, 0x01, // usage page: generic desktop
    0x09, 0x30, // usage: X
    0x09, 0x31, // usage: Y
    0x26, 0xff, 0x7f, // logical maximum: 0x7fff
    0x75, 0x10, // report size: 16 bits
    0x95, 0x02, // report count: 2
    0x81, 0x02, // input: variable, absolute
    0x09, 0x38, // usage: wheel
    0x15, 0x81, // logical minimum: -127
    0x25, 0x7f, // logical maximum: 127
    0x75, 0x08, // report size: 8 bits
    0x95, 0x01, // report count: 1
    0x81, 0x06, // input: variable, relative
    0x05, 0x0c, // usage page: consumer
    0x0a, 0x38, 0x02, // usage: AC pan
    0x81, 0x06, // input: variable, relative
    0xc0, // end of collection
    0xc0, // end of collection
];

/// A report of the mouse that [`REPORT_DESCRIPTOR`] describes, 7 bytes.
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
#[repr(C)]
pub struct MouseReport {
    /// [`Buttons`] that are down.
    pub buttons: u8,
    /// 0 (left) to [`MAX_COORDINATE`].
    pub x: U16,
    /// 0 (top) to [`MAX_COORDINATE`].
    pub y: U16,
    /// Turns of the wheel since the last report, away from the user.
    pub wheel: i8,
    /// Turns of the wheel to the right.
    pub pan: i8,
}

const _: () = assert!(size_of::<MouseReport>() == 7);
