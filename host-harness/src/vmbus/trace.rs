// SPDX-License-Identifier: MIT OR Apache-2.0

//! The trace: every control message and every packet header as one line of JSON.
//!
//! A line has `t` (seconds since the trace began), `dir` (`to_host` or `to_guest`), `kind`
//! (`message` or `packet`) and `type` (its name in `hv_proto`, its number if it has none there,
//! `INVALID` for a message that cannot be parsed); what else there is depends on the type.
//! Payloads are not traced.

use std::fmt::Write as _;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use hv_proto::ids::ChannelId;
use hv_proto::message::{GuestMessage, HostMessage, OfferChannel};
use hv_proto::packet::Descriptor;
use serde_json::{Map, Value, json};

use crate::files;

/// Which way a message or packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Guest to host.
    ToHost,
    /// Host to guest.
    ToGuest,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::ToHost => "to_host",
            Self::ToGuest => "to_guest",
        }
    }
}

struct Output {
    writer: Box<dyn Write + Send>,
    /// Writing failed and was reported; the trace ends there.
    broken: bool,
}

/// A trace that is being written.
pub struct Trace {
    start: Instant,
    output: Mutex<Output>,
}

impl Trace {
    /// Starts a trace in a new file, replacing what was there.
    ///
    /// # Errors
    /// The file cannot be created, is not a regular file, or is in use.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self::to_writer(BufWriter::new(files::create(path)?)))
    }

    /// Starts a trace that goes to `writer`.
    pub fn to_writer(writer: impl Write + Send + 'static) -> Self {
        Self {
            start: Instant::now(),
            output: Mutex::new(Output {
                writer: Box::new(writer),
                broken: false,
            }),
        }
    }

    /// Writes what is still in memory to the file.
    pub fn flush(&self) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = output.writer.flush() {
            output.fail(&error);
        }
    }

    fn line(
        &self,
        kind: &str,
        direction: Direction,
        name: &str,
        fields: &Map<String, Value>,
        flush: bool,
    ) {
        let t = self.start.elapsed().as_secs_f64();
        // By hand, so that what every line has comes first.
        let mut text = format!(
            r#"{{"t":{t:.6},"dir":"{}","kind":"{kind}","type":"{name}""#,
            direction.name()
        );
        for (key, value) in fields {
            // Writing to a string does not fail.
            let _ = write!(text, r#","{key}":{value}"#);
        }
        text.push_str("}\n");
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        if output.broken {
            return;
        }
        let mut result = output.writer.write_all(text.as_bytes());
        if flush && result.is_ok() {
            result = output.writer.flush();
        }
        if let Err(error) = result {
            output.fail(&error);
        }
    }

    /// A packet header. `interrupt` tells, for packets to the guest, whether it was interrupted.
    pub(super) fn packet(
        &self,
        direction: Direction,
        channel: ChannelId,
        descriptor: &Descriptor,
        interrupt: Option<bool>,
    ) {
        let mut fields = object(json!({
            "channel": channel.get(),
            "flags": descriptor.flags.get(),
            "transaction_id": descriptor.transaction_id.get(),
            "header_len": descriptor.payload_offset(),
            "len": descriptor.len(),
        }));
        if let Some(interrupt) = interrupt {
            fields.insert("interrupt".into(), json!(interrupt));
        }
        let name = format!("{:?}", descriptor.packet_type);
        self.line("packet", direction, &name, &fields, false);
    }

    /// A message of the guest that could be parsed.
    pub(super) fn guest_message(&self, connection: u32, message: &GuestMessage<'_>) {
        let mut fields = object(guest_fields(message));
        fields.insert("connection".into(), json!(connection));
        let name = format!("{:?}", message.message_type());
        self.line("message", Direction::ToHost, &name, &fields, true);
    }

    /// A message of the guest that makes no sense.
    pub(super) fn bad_message(&self, connection: u32, bytes: &[u8], error: &str) {
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let fields = json!({
            "connection": connection, "error": error, "bytes": hex,
        });
        let fields = object(fields);
        self.line("message", Direction::ToHost, "INVALID", &fields, true);
    }

    /// A message to the guest.
    pub(super) fn host_message(&self, vp: u32, sint: u8, message: &HostMessage) {
        let mut fields = object(host_fields(message));
        fields.insert("vp".into(), json!(vp));
        fields.insert("sint".into(), json!(sint));
        let name = format!("{:?}", message.message_type());
        self.line("message", Direction::ToGuest, &name, &fields, true);
    }
}

impl Output {
    fn fail(&mut self, error: &io::Error) {
        if !self.broken {
            self.broken = true;
            tracing::error!(%error, "cannot write the trace; it ends here");
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.flush();
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn version_text(raw: u32) -> String {
    format!("{}.{}", raw >> 16, raw & 0xffff)
}

fn guest_fields(message: &GuestMessage<'_>) -> Value {
    match message {
        GuestMessage::OpenChannel(m) => json!({
            "channel": m.channel_id.get(),
            "open_id": m.open_id.get(),
            "ring_gpadl": m.ring_gpadl.get(),
            "target_vp": m.target_vp.get(),
            "downstream_page_offset": m.downstream_page_offset.get(),
        }),
        GuestMessage::CloseChannel(m) => json!({ "channel": m.channel_id.get() }),
        GuestMessage::GpadlHeader(m, words) => json!({
            "channel": m.channel_id.get(),
            "gpadl": m.gpadl_id.get(),
            "range_buf_len": m.range_buf_len.get(),
            "range_count": m.range_count.get(),
            "words": words.len(),
        }),
        GuestMessage::GpadlBody(m, words) => json!({
            "gpadl": m.gpadl_id.get(),
            "message_number": m.message_number.get(),
            "words": words.len(),
        }),
        GuestMessage::GpadlTeardown(m) => json!({
            "channel": m.channel_id.get(),
            "gpadl": m.gpadl_id.get(),
        }),
        GuestMessage::RelidReleased(m) => json!({ "channel": m.channel_id.get() }),
        GuestMessage::InitiateContact(m) => json!({
            "version": version_text(m.version.get()),
            "target_vp": m.target_vp.get(),
            "interrupt_page_or_target": format!("{:#x}", m.interrupt_page_or_target.get()),
            "monitor_page1": format!("{:#x}", m.monitor_page1.get()),
            "monitor_page2": format!("{:#x}", m.monitor_page2.get()),
        }),
        GuestMessage::TlConnectRequest(m) => json!({
            "guest_endpoint": m.guest_endpoint_id.to_string(),
            "host_service": m.host_service_id.to_string(),
        }),
        GuestMessage::ModifyChannel(m) => json!({
            "channel": m.channel_id.get(),
            "target_vp": m.target_vp.get(),
        }),
        GuestMessage::Unknown(t) => json!({ "number": t.get() }),
        _ => json!({}),
    }
}

fn host_fields(message: &HostMessage) -> Value {
    match message {
        HostMessage::OfferChannel(m) => offer_fields(m),
        HostMessage::RescindChannelOffer(m) => json!({ "channel": m.channel_id.get() }),
        HostMessage::OpenChannelResult(m) => json!({
            "channel": m.channel_id.get(),
            "open_id": m.open_id.get(),
            "status": m.status.get(),
        }),
        HostMessage::GpadlCreated(m) => json!({
            "channel": m.channel_id.get(),
            "gpadl": m.gpadl_id.get(),
            "status": m.status.get(),
        }),
        HostMessage::GpadlTorndown(m) => json!({ "gpadl": m.gpadl_id.get() }),
        HostMessage::TlConnectResult(m) => json!({
            "guest_endpoint": m.guest_endpoint_id.to_string(),
            "host_service": m.host_service_id.to_string(),
            "status": m.status.get(),
        }),
        HostMessage::VersionResponse(m) => json!({
            "version_supported": m.version_supported != 0,
            "connection_state": m.connection_state,
            "message_connection_id": m.message_connection_id.get(),
        }),
        HostMessage::ModifyChannelResponse(m) => json!({
            "channel": m.channel_id.get(),
            "status": m.status.get(),
        }),
        _ => json!({}),
    }
}

fn offer_fields(m: &OfferChannel) -> Value {
    json!({
        "channel": m.channel_id.get(),
        "interface": m.interface_id.to_string(),
        "instance": m.instance_id.to_string(),
        "subchannel_index": m.sub_channel_index.get(),
        "flags": m.channel_flags.get(),
        "monitor_id": m.monitor().map(|id| id.get()),
        "dedicated_interrupt": m.has_dedicated_interrupt(),
        "connection": m.connection_id.get(),
    })
}
