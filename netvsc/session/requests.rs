// SPDX-License-Identifier: GPL-2.0

//! What the host is asked, and told: RNDIS begins and ends, and the objects of the adapter are read and changed.

use super::{
    attachment::{
        Attachment,
        STEP,
        STEP_MS, //
    },
    Facts, //
};
use crate::{
    control::{
        Bytes,
        Kind,
        Reply, //
    },
    link::Link, //
};
use hv_proto::net::{
    control::{
        self,
        Limits, //
    },
    nvsp::{
        self,
        MESSAGE_SIZE, //
    },
    offload,
    oid::{
        MediaState,
        Oid, //
    },
    rndis::{
        self,
        Initialize,
        MessageType,
        RequestBuf, //
    },
    rss,
    MacAddress, //
};
use kernel::{
    prelude::*,
    time::delay::fsleep, //
};
use vmbus::Show;
use zerocopy::{
    little_endian::U32,
    IntoBytes, //
};

/// Most bytes of an RNDIS request.
const MAX_REQUEST: usize = 2048;

impl Attachment {
    /// Asks something of NVSP; returns the payload of the completion.
    pub(super) fn ask(&self, message: &[u8; MESSAGE_SIZE]) -> Result<Bytes> {
        let (message_type, _) = nvsp::split_type(message).map_err(|_| EINVAL)?;
        let kind = Kind::asked_by(message_type).ok_or(EINVAL)?;
        let link = &self.link;
        let reply = link.control.turn().ask_nvsp(link.timeout(), |waiting| {
            Self::retry(link, || self.primary.send_nvsp(message, kind, waiting))
        })?;
        match reply {
            Reply::Bytes(bytes) => Ok(bytes),
            _ => Err(EIO),
        }
    }

    /// Sends something that may find the ring full.
    pub(super) fn retry(link: &Link, mut send: impl FnMut() -> Result) -> Result {
        let mut left = link.timeout();
        loop {
            match send() {
                Err(error) if error == EAGAIN && left > STEP_MS && !link.is_dead() => {
                    left -= STEP_MS;
                    fsleep(STEP);
                }
                result => return result,
            }
        }
    }

    /// Asks something of RNDIS. `make` writes the request with the number that it is given.
    fn request(
        &self,
        kind: control::Kind,
        make: impl FnOnce(u32) -> Option<RequestBuf<MAX_REQUEST>>,
    ) -> Result<Reply> {
        let link = &self.link;
        let reply = link.control.turn().ask_rndis(kind, link.timeout(), |id| {
            let request = make(id).ok_or(EINVAL)?;
            self.send(request.as_bytes())
        })?;
        if let Reply::Failed(failure) = &reply {
            link.nic
                .debug(fmt!("{}: {}\n", format_args!("{kind:?}"), Show(failure)));
        }
        Ok(reply)
    }

    /// Sends a message of RNDIS.
    fn send(&self, message: &[u8]) -> Result {
        let mut bytes = KVec::new();
        bytes.extend_from_slice(message, GFP_KERNEL)?;
        let mut message = Some(bytes);
        Self::retry(&self.link, || {
            let bytes = message.take().ok_or(EIO)?;
            self.primary.send_rndis(bytes).map_err(|(error, bytes)| {
                message = bytes;
                error
            })
        })
    }

    /// The value of an object.
    fn query(&self, oid: Oid, value: &[u8]) -> Result<Bytes> {
        let reply = self.request(control::Kind::Query(oid), |id| {
            RequestBuf::query(id, oid, value)
        })?;
        match reply {
            Reply::Bytes(bytes) => Ok(bytes),
            _ => Err(EOPNOTSUPP),
        }
    }

    /// The value of an object that is a number.
    fn query_number(&self, oid: Oid) -> Result<u32> {
        let bytes = self.query(oid, &[])?;
        let number: Option<U32> = rndis::value(bytes.get());
        number.map(U32::get).ok_or(EIO)
    }

    /// Changes the value of an object.
    pub(super) fn set(&self, oid: Oid, value: &[u8]) -> Result {
        let reply = self.request(control::Kind::Set(oid), |id| {
            RequestBuf::set(id, oid, value)
        })?;
        match reply {
            Reply::Done => Ok(()),
            _ => Err(EOPNOTSUPP),
        }
    }

    /// Begins RNDIS.
    pub(super) fn initialize(&mut self) -> Result {
        let reply = self.request(control::Kind::Initialize, |id| {
            let body = Initialize {
                request_id: id.into(),
                major_version: rndis::MAJOR_VERSION.into(),
                minor_version: rndis::MINOR_VERSION.into(),
                max_transfer_size: Limits::DEFAULT.max_transfer_size.into(),
            };
            RequestBuf::new(MessageType::INITIALIZE, &body, &[])
        })?;
        match reply {
            Reply::Initialized(limits) => {
                self.initialized = true;
                let buffers = self.link.buffers().ok_or(EIO)?;
                self.primary.prepare_send(buffers, &limits);
                self.link.set_limits(limits);
                Ok(())
            }
            Reply::Failed(failure) => {
                dev_err!(self.link.nic.dev(), "{}\n", Show(failure));
                Err(EIO)
            }
            _ => Err(EIO),
        }
    }

    /// Asks what the adapter is like. Only the address must be known.
    pub(super) fn facts(&self) -> Result<Facts> {
        let version = self.link.version().ok_or(EIO)?;
        let mac = self.query(Oid::ETHERNET_PERMANENT_ADDRESS, &[])?;
        let mac = rndis::value::<MacAddress>(mac.get())
            .filter(|mac| mac.is_unicast())
            .ok_or_else(|| {
                dev_err!(self.link.nic.dev(), "the adapter has no address\n");
                EIO
            })?;
        let number = |oid| self.query_number(oid).map(Some).or_else(optional);

        let max_mtu = number(Oid::GEN_MAXIMUM_FRAME_SIZE)?;
        let name = self.query(Oid::GEN_FRIENDLY_NAME, &[]).map(Some);
        let name = name.or_else(optional)?.and_then(|name| text(name.get()));
        let ask = offload::Capabilities::empty(version);
        let offloads = self
            .query(Oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES, ask.as_value())
            .map(Some)
            .or_else(optional)?
            .and_then(|value| {
                offload::Capabilities::parse(value.get())
                    .inspect_err(|error| {
                        dev_warn!(self.link.nic.dev(), "no offloads: {}\n", Show(error));
                    })
                    .ok()
            });
        let media = number(Oid::GEN_MEDIA_CONNECT_STATUS)?;
        if let Some(speed) = number(Oid::GEN_LINK_SPEED)? {
            self.link.nic.set_speed(control::link_speed(speed));
        }
        let rss = if version.has_sub_channels() {
            self.query(
                Oid::GEN_RECEIVE_SCALE_CAPABILITIES,
                rss::Capabilities::query().as_bytes(),
            )
            .map(Some)
            .or_else(optional)?
            .and_then(|value| rss::Capabilities::parse(value.get()).ok())
            .map(|can| (can.queue_count.get(), can.table_entries()))
        } else {
            None
        };
        Ok(Facts {
            mac,
            max_mtu,
            name,
            offloads,
            link_up: media != Some(MediaState::DISCONNECTED.get()),
            rss,
        })
    }

    /// Tells the host that RNDIS ends. It does not answer.
    pub(super) fn halt(&self) -> Result {
        let body = rndis::Halt {
            request_id: U32::ZERO,
        };
        let request: RequestBuf<64> =
            RequestBuf::new(MessageType::HALT, &body, &[]).ok_or(EINVAL)?;
        self.send(request.as_bytes())
    }
}

/// Nothing, after an error that says only that the host does not know the object.
fn optional<T>(error: Error) -> Result<Option<T>> {
    if error == ENODEV || error == ETIMEDOUT {
        Err(error)
    } else {
        Ok(None)
    }
}

/// UTF-16 as UTF-8, up to its first zero; `None` if there is nothing, or no memory.
fn text(utf16: &[u8]) -> Option<KVec<u8>> {
    let units = utf16
        .chunks_exact(2)
        .map(|unit| unit.try_into().map_or(0, u16::from_le_bytes))
        .take_while(|&unit| unit != 0);
    let mut text = KVec::new();
    for character in char::decode_utf16(units) {
        let mut bytes = [0; 4];
        let character = character.unwrap_or(char::REPLACEMENT_CHARACTER);
        let bytes = character.encode_utf8(&mut bytes).as_bytes();
        text.extend_from_slice(bytes, GFP_KERNEL).ok()?;
    }
    (!text.is_empty()).then_some(text)
}
