// SPDX-License-Identifier: MIT OR Apache-2.0

//! The calls of the control API: their paths, what they take, what they do.
//!
//! [`CALLS`] is the one table of them. A body must be exactly what the call takes: a field that is
//! not known is refused, because a request that is half understood must not be half done.

use hv_proto::ic::shutdown::Action;
use hv_proto::ic::timesync::{Flags, PROBE};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::http::{Request, Status};
use crate::control::{Control, ControlError};
use crate::disk::DiskOptions;
use crate::events::Subscription;
use crate::net::NetOptions;
use crate::vsp::ic::{AskError, Shutdown, Timesync};
use crate::vsp::inputvsp::{Button, InputError, Key, KeyAction, Keyboard, Mouse, MouseInput};
use crate::vsp::netvsp::NetworkError;
use crate::vsp::services::ServiceError;
use crate::vsp::storvsp::StorageError;

/// What comes back.
#[derive(Debug)]
pub(super) enum Answer {
    /// A reply.
    Value(Status, Value),
    /// Events, for as long as they come.
    Events(Subscription),
}

impl Answer {
    pub(super) fn error(status: Status, message: impl Into<String>) -> Self {
        Self::Value(status, json!({ "error": message.into() }))
    }
}

/// Why a call fails.
struct Failure(Status, String);

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let text = error.to_string();
        let status = match error {
            ControlError::NoSuchDevice(_) => Status::NOT_FOUND,
            ControlError::Storage(error) => storage_status(&error),
            ControlError::Network(error) => network_status(&error),
            ControlError::Service(error) => service_status(&error),
        };
        Self(status, text)
    }
}

/// How bad it is that something about NICs cannot be done.
fn network_status(error: &NetworkError) -> Status {
    match error {
        NetworkError::NoSuchNic(_) => Status::NOT_FOUND,
        NetworkError::Thread { .. } => Status::INTERNAL,
        _ => Status::CONFLICT,
    }
}

impl From<NetworkError> for Failure {
    fn from(error: NetworkError) -> Self {
        Self(network_status(&error), error.to_string())
    }
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        Self(storage_status(&error), error.to_string())
    }
}

impl From<ServiceError> for Failure {
    fn from(error: ServiceError) -> Self {
        Self(service_status(&error), error.to_string())
    }
}

impl From<AskError> for Failure {
    fn from(error: AskError) -> Self {
        Self(Status::CONFLICT, error.to_string())
    }
}

impl From<InputError> for Failure {
    fn from(error: InputError) -> Self {
        let text = error.to_string();
        match error {
            InputError::Impossible(_) => bad_body(text),
            InputError::Port(_) | InputError::NotReady | InputError::Busy | InputError::Slow(_) => {
                Self(Status::CONFLICT, text)
            }
        }
    }
}

fn service_status(error: &ServiceError) -> Status {
    match error {
        ServiceError::NoSuchDevice(_) => Status::NOT_FOUND,
        ServiceError::Offer { .. } => Status::CONFLICT,
    }
}

fn storage_status(error: &StorageError) -> Status {
    match error {
        StorageError::NoSuchDisk(_) | StorageError::NoSuchController(_) => Status::NOT_FOUND,
        StorageError::Open(_)
        | StorageError::DuplicateName(_)
        | StorageError::Address { .. }
        | StorageError::Disk { .. } => Status::CONFLICT,
        StorageError::Offer { .. } | StorageError::Thread { .. } => Status::INTERNAL,
    }
}

type Outcome = Result<Answer, Failure>;

fn value(value: impl serde::Serialize) -> Outcome {
    match serde_json::to_value(value) {
        Ok(value) => Ok(Answer::Value(Status::OK, value)),
        Err(error) => Err(Failure(Status::INTERNAL, error.to_string())),
    }
}

/// The answer to what has no result.
fn done() -> Outcome {
    value(json!({}))
}

/// One call.
pub(super) struct Call {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    run: fn(&Control, &[u8]) -> Outcome,
}

/// Every call.
pub(super) const CALLS: &[Call] = &[
    Call {
        method: "GET",
        path: "/",
        run: |_, body| {
            let Nothing {} = parse(body)?;
            let calls: Vec<_> = CALLS.iter().map(|c| json!([c.method, c.path])).collect();
            value(json!({
                "name": env!("CARGO_PKG_NAME"),
                "version": env!("CARGO_PKG_VERSION"),
                "api": 1,
                "calls": calls,
            }))
        },
    },
    Call {
        method: "GET",
        path: "/v1/status",
        run: |control, body| {
            let Nothing {} = parse(body)?;
            value(control.status())
        },
    },
    Call {
        method: "GET",
        path: "/v1/stats",
        run: |control, body| {
            let Nothing {} = parse(body)?;
            value(control.stats())
        },
    },
    Call {
        method: "GET",
        path: "/v1/events",
        run: |control, body| {
            let Nothing {} = parse(body)?;
            Ok(Answer::Events(control.events.subscribe()))
        },
    },
    Call {
        method: "POST",
        path: "/v1/power-off",
        run: |control, body| {
            let Nothing {} = parse(body)?;
            control.vm.stop();
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/pause",
        run: |control, body| {
            let Nothing {} = parse(body)?;
            control.vm.pause();
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/resume",
        run: |control, body| {
            let Nothing {} = parse(body)?;
            control.vm.resume();
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/shutdown",
        run: |control, body| end(control, body, Action::PowerOff),
    },
    Call {
        method: "POST",
        path: "/v1/reboot",
        run: |control, body| end(control, body, Action::Reboot),
    },
    Call {
        method: "POST",
        path: "/v1/hibernate",
        run: |control, body| end(control, body, Action::Hibernate),
    },
    Call {
        method: "POST",
        path: "/v1/time",
        run: |control, body| {
            let call: Time = parse(body)?;
            let flags = match call.kind {
                TimeKind::Sync => Flags::SYNC,
                TimeKind::Sample => Flags::SAMPLE,
                TimeKind::Probe => PROBE,
            };
            let send = |timesync: &Timesync| timesync.send(flags, call.offset_ms);
            let services = &control.services;
            services.timesync(call.device.as_deref(), send)??;
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/type",
        run: |control, body| {
            let call: Type = parse(body)?;
            let send = |keyboard: &Keyboard| keyboard.type_text(&call.text);
            let services = &control.services;
            services.keyboard(call.device.as_deref(), send)??;
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/key",
        run: |control, body| {
            let call: Keys = parse(body)?;
            let keys = Key::chord(&call.keys).map_err(|error| bad_body(error.to_string()))?;
            let send = |keyboard: &Keyboard| keyboard.key(&keys, call.action);
            let services = &control.services;
            services.keyboard(call.device.as_deref(), send)??;
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/mouse",
        run: |control, body| {
            let call: Pointer = parse(body)?;
            let send = |mouse: &Mouse| mouse.input(&call.input());
            control.services.mouse(call.device.as_deref(), send)??;
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/offer",
        run: |control, body| {
            let Device { device } = parse(body)?;
            control.services.offer(&device)?;
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/rescind",
        run: |control, body| {
            let Device { device } = parse(body)?;
            control.rescind(&device)?;
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/disk/add",
        run: |control, body| {
            let Options { options } = parse(body)?;
            let options: DiskOptions = options
                .parse()
                .map_err(|error| bad_body(format!("options: {error}")))?;
            has_bus(control)?;
            let name = control.storage.add_disk(&options)?;
            value(json!({ "disk": name }))
        },
    },
    Call {
        method: "POST",
        path: "/v1/disk/remove",
        run: |control, body| {
            let DiskName { disk } = parse(body)?;
            control.storage.remove_disk(&disk)?;
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/disk/resize",
        run: |control, body| {
            let Resize { disk, size } = parse(body)?;
            control.storage.resize_disk(&disk, size)?;
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/nic/add",
        run: |control, body| {
            let Options { options } = parse(body)?;
            let options: NetOptions = options
                .parse()
                .map_err(|error| bad_body(format!("options: {error}")))?;
            has_bus(control)?;
            let name = control.network.add(&options)?;
            value(json!({ "nic": name }))
        },
    },
    Call {
        method: "POST",
        path: "/v1/nic/remove",
        run: |control, body| {
            let NicName { nic } = parse(body)?;
            control.network.remove(&nic)?;
            done()
        },
    },
    Call {
        method: "POST",
        path: "/v1/nic/link",
        run: |control, body| {
            let Link { nic, up } = parse(body)?;
            control.network.set_link(&nic, up)?;
            done()
        },
    },
];

/// Without a bus, nobody would ever see a device that is added.
fn has_bus(control: &Control) -> Result<(), Failure> {
    match control.server {
        Some(_) => Ok(()),
        None => Err(Failure(
            Status::CONFLICT,
            "this machine has no VMBus".into(),
        )),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Device {
    device: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    options: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskName {
    disk: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    disk: String,
    size: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NicName {
    nic: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Link {
    nic: String,
    up: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct End {
    device: Option<String>,
    #[serde(default)]
    force: bool,
    #[serde(default)]
    timeout_seconds: u32,
    #[serde(default)]
    message: String,
}

/// Asks the guest to end.
fn end(control: &Control, body: &[u8], action: Action) -> Outcome {
    let call: End = parse(body)?;
    let ask = |service: &Shutdown| {
        service.request(action, call.force, call.timeout_seconds, &call.message)
    };
    let services = &control.services;
    services.shutdown(call.device.as_deref(), ask)??;
    done()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Time {
    device: Option<String>,
    kind: TimeKind,
    #[serde(default)]
    offset_ms: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum TimeKind {
    Sync,
    Sample,
    Probe,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Type {
    device: Option<String>,
    text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    device: Option<String>,
    keys: String,
    #[serde(default)]
    action: KeyAction,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pointer {
    device: Option<String>,
    x: Option<u16>,
    y: Option<u16>,
    buttons: Option<Vec<Button>>,
    #[serde(default)]
    wheel: i8,
    #[serde(default)]
    pan: i8,
}

impl Pointer {
    fn input(&self) -> MouseInput {
        MouseInput {
            x: self.x,
            y: self.y,
            buttons: self.buttons.clone(),
            wheel: self.wheel,
            pan: self.pan,
        }
    }
}

fn bad_body(message: String) -> Failure {
    Failure(Status::BAD_REQUEST, message)
}

/// What a call takes. No body is the same as an empty object.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    let body = if body.is_empty() { b"{}" } else { body };
    // Serde takes an array of a struct's fields too.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(bad_body("the body: a JSON object expected".into()));
    }
    serde_json::from_slice(body).map_err(|error| bad_body(format!("the body: {error}")))
}

/// Makes a call.
pub(super) fn call(control: &Control, request: &Request) -> Answer {
    let mut of_path = CALLS.iter().filter(|call| call.path == request.path);
    let Some(call) = of_path.clone().find(|call| call.method == request.method) else {
        let path = &request.path;
        return match of_path.next() {
            Some(other) => Answer::error(
                Status::METHOD_NOT_ALLOWED,
                format!("{path} is called with {}", other.method),
            ),
            None => Answer::error(
                Status::NOT_FOUND,
                format!("there is no call {path}; / lists all"),
            ),
        };
    };
    match (call.run)(control, &request.body) {
        Ok(answer) => answer,
        Err(Failure(status, message)) => Answer::error(status, message),
    }
}
