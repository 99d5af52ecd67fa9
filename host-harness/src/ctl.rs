// SPDX-License-Identifier: MIT OR Apache-2.0

//! `host-harness ctl`: the command line of the control API. Each verb is one call; see `API.md`.

use std::io::{self, Write};

use clap::ValueEnum;
use host_harness::api::{Client, ClientError};
use serde_json::{Value, json};

use crate::cli::{ButtonArg, CtlArgs, DiskVerb, EndArgs, LinkState, NicVerb, Verb};

/// Exit status of a program that ends with this error.
pub fn exit_status(error: &ClientError) -> u8 {
    match error {
        ClientError::Connect { .. } => 2,
        ClientError::Refused { .. } | ClientError::Broken(_) => 1,
    }
}

/// Does what the command line says.
pub fn run(args: &CtlArgs) -> anyhow::Result<u8> {
    let client = Client::new(&args.api);
    let post = |path: &str, body: Value| client.post(path, &body);
    let result = match &args.verb {
        Verb::Status => client.get("/v1/status")?,
        Verb::Stats => client.get("/v1/stats")?,
        Verb::Events => return follow(&client),
        Verb::PowerOff => post("/v1/power-off", json!({}))?,
        Verb::Pause => post("/v1/pause", json!({}))?,
        Verb::Resume => post("/v1/resume", json!({}))?,
        Verb::Shutdown(args) => end(&client, "/v1/shutdown", args)?,
        Verb::Reboot(args) => end(&client, "/v1/reboot", args)?,
        Verb::Hibernate(args) => end(&client, "/v1/hibernate", args)?,
        Verb::Type { text, device } => {
            post("/v1/type", json!({ "device": device.name, "text": text }))?
        }
        Verb::Key {
            keys,
            down,
            up,
            device,
        } => {
            let action = match (down, up) {
                (true, _) => "down",
                (_, true) => "up",
                _ => "press",
            };
            let body = json!({ "device": device.name, "keys": keys, "action": action });
            post("/v1/key", body)?
        }
        Verb::Mouse {
            x,
            y,
            buttons,
            wheel,
            pan,
            device,
        } => {
            let buttons = buttons.as_ref().map(|buttons| {
                let down = buttons.iter().filter(|button| **button != ButtonArg::None);
                down.map(name).collect::<Vec<_>>()
            });
            let body = json!({
                "device": device.name, "x": x, "y": y, "buttons": buttons,
                "wheel": wheel, "pan": pan,
            });
            post("/v1/mouse", body)?
        }
        Verb::Time {
            kind,
            offset,
            device,
        } => {
            let body = json!({ "device": device.name, "kind": name(kind), "offset_ms": offset });
            post("/v1/time", body)?
        }
        Verb::Offer { device } => post("/v1/offer", json!({ "device": device }))?,
        Verb::Rescind { device } => post("/v1/rescind", json!({ "device": device }))?,
        Verb::Disk(verb) => match verb {
            DiskVerb::Add { options } => post("/v1/disk/add", json!({ "options": options }))?,
            DiskVerb::Remove { disk } => post("/v1/disk/remove", json!({ "disk": disk }))?,
            DiskVerb::Resize { disk, size } => {
                post("/v1/disk/resize", json!({ "disk": disk, "size": size.0 }))?
            }
        },
        Verb::Nic(verb) => match verb {
            NicVerb::Add { options } => post("/v1/nic/add", json!({ "options": options }))?,
            NicVerb::Remove { nic } => post("/v1/nic/remove", json!({ "nic": nic }))?,
            NicVerb::Link { nic, state } => {
                let up = *state == LinkState::Up;
                post("/v1/nic/link", json!({ "nic": nic, "up": up }))?
            }
        },
    };
    // The empty result of what is simply done needs no line.
    if result.as_object().is_none_or(|fields| !fields.is_empty()) {
        return status_of(print(&format!("{result:#}")));
    }
    Ok(0)
}

/// Asks the guest to end.
fn end(client: &Client, path: &str, args: &EndArgs) -> Result<Value, ClientError> {
    let body = json!({
        "device": args.device.name,
        "force": args.force,
        "timeout_seconds": args.timeout,
        "message": args.message,
    });
    client.post(path, &body)
}

/// What a value is called on the command line, and in the API.
fn name(value: &impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Prints events until the host ends or nobody reads.
fn follow(client: &Client) -> anyhow::Result<u8> {
    for event in client.events()? {
        let printed = print(&event?.to_string());
        if printed.is_err() {
            return status_of(printed);
        }
    }
    Ok(0)
}

/// Prints a line.
fn print(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush())
}

/// The exit status after a line was printed. That nobody takes it is no failure: `ctl events |
/// head` is one use.
fn status_of(printed: io::Result<()>) -> anyhow::Result<u8> {
    match printed {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            crate::report(&format!("writing the result: {error}"));
            Ok(crate::FAILED)
        }
        _ => Ok(0),
    }
}
