// SPDX-License-Identifier: MIT OR Apache-2.0

//! The control API with a real guest: what it shows, what it does, and the clean end of a whole system.

use anyhow::{Context, Result, ensure};
use host_harness::api::Client;
use host_harness::events::Event;
use host_harness::vm::ExitReason;
use serde_json::{Value, json};
use viridian_tests::guest::COMMAND;
use viridian_tests::{Drivers, Guest, both_drivers};

both_drivers!(shows_and_drives_a_guest, shutdown_ends_debian_cleanly,);

/// Lets the guest's host listen, in a folder of its own.
pub fn listen(guest: &mut Guest) -> Result<(tempfile::TempDir, Client)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("api");
    guest.host_mut().listen(&path)?;
    Ok((folder, Client::new(path)))
}

/// Boots Debian with the modules of the services, and waits until it is up and can be asked to end.
fn debian(drivers: Drivers) -> Result<(Guest, tempfile::TempDir, Client)> {
    let mut guest = Guest::with(drivers).debian().reboot().boot()?;
    let (folder, client) = listen(&mut guest)?;
    guest.wait_for("systemctl is-system-running --wait")?;
    ready_to_end(&guest, drivers)?;
    Ok((guest, folder, client))
}

pub fn ready_to_end(guest: &Guest, drivers: Drivers) -> Result<()> {
    if drivers == Drivers::Rust {
        guest.sh("insmod /run/viridian/modules/shutdown.ko")?;
    } else {
        guest.sh("modprobe hv_utils")?;
    }
    let services = guest.host().services();
    guest.until("the guest can be asked to end", || {
        services
            .shutdown(None, |s| s.status().link.version)
            .is_ok_and(|version| version.is_some())
    })
}

/// What the API shows of a device.
pub fn device(client: &Client, name: &str) -> Result<Value> {
    let status = client.get("/v1/status")?;
    let devices = status["vmbus"]["devices"].as_array().cloned();
    let found = devices
        .into_iter()
        .flatten()
        .find(|device| device["name"] == name);
    found.with_context(|| format!("no {name} in {status:#}"))
}

fn shows_and_drives_a_guest(drivers: Drivers) -> Result<()> {
    let mut guest = Guest::with(drivers).cpus(2).reboot().boot()?;
    let (_folder, client) = listen(&mut guest)?;
    let status = client.get("/v1/status")?;
    ensure!(
        status["vm"]["state"] == "running"
            && status["vm"]["memory"] == 512 << 20
            && status["vm"]["vcpus"].as_array().map(Vec::len) == Some(2)
            && status["vmbus"]["version"] == "5.3",
        "{status:#}"
    );
    for kind in ["heartbeat", "timesync", "shutdown", "keyboard", "mouse"] {
        let shown = device(&client, kind)?;
        ensure!(shown[kind]["version"] == Value::Null, "{shown:#}");
        ensure!(
            shown["instance"] == json!(guest.service_instance(kind)?),
            "{shown:#}"
        );
    }
    load_all(&guest)?;
    guest.until("a beat", || {
        device(&client, "heartbeat").is_ok_and(|shown| shown["heartbeat"]["heart"] == "beats")
    })?;
    for (kind, version) in [
        ("heartbeat", "3.0"),
        ("timesync", "4.0"),
        ("shutdown", "3.2"),
        ("keyboard", "1.0"),
        ("mouse", "2.0"),
    ] {
        let shown = device(&client, kind)?;
        ensure!(
            shown[kind]["version"] == version && shown["channels"][0]["state"] == "open",
            "{shown:#}"
        );
    }
    let shown = device(&client, "heartbeat")?;
    ensure!(shown["heartbeat"]["age_ms"].is_u64(), "{shown:#}");

    for (path, body) in [
        ("/v1/type", json!({"text": "hello\n"})),
        ("/v1/key", json!({"keys": "leftctrl-c"})),
        ("/v1/mouse", json!({"x": 1, "y": 2, "buttons": ["left"]})),
        ("/v1/time", json!({"kind": "sync", "offset_ms": 0})),
        ("/v1/pause", json!({})),
        ("/v1/resume", json!({})),
        ("/v1/rescind", json!({"device": "heartbeat"})),
        ("/v1/offer", json!({"device": "heartbeat"})),
    ] {
        client.post(path, &body).context(path)?;
    }
    guest.until_negotiated(&["heartbeat"])?;
    ensure!(
        device(&client, "keyboard")?["keyboard"]["keystrokes"] == 16,
        "twelve keystrokes for the text, four for two keys"
    );
    let hibernate = client.post("/v1/hibernate", &json!({}));
    ensure!(hibernate.is_err(), "it said that it would hibernate");
    guest.check_log(&[])?;

    let events = guest.host().events().subscribe();
    client.post("/v1/reboot", &json!({}))?;
    let reset = |event: &Event| matches!(event, Event::Reset);
    ensure!(events.find(COMMAND, reset).is_some(), "no reset");
    guest.wait_for_restart()?;
    load_all(&guest)?;
    let status = client.get("/v1/status")?;
    ensure!(status["vm"]["resets"] == 1, "{status:#}");
    // There is no program here that could be asked to switch off: the kernel does it.
    client.post("/v1/shutdown", &json!({"force": true}))?;
    guest.ends_with(ExitReason::PowerOff)
}

fn load_all(guest: &Guest) -> Result<()> {
    guest.load_services()?;
    guest.load(guest.drivers().input_modules(), &["keyboard", "mouse"])
}

fn shutdown_ends_debian_cleanly(drivers: Drivers) -> Result<()> {
    let (guest, _folder, client) = debian(drivers)?;
    let events = guest.host().events().subscribe();
    // This runs only when systemd stops its units in order.
    guest.sh(
        "systemd-run --unit=witness --property=Type=oneshot --property=RemainAfterExit=yes \
         --property='ExecStop=/bin/sh -c \"echo stopped in order > /dev/ttyS0\"' /bin/true",
    )?;
    client.post("/v1/shutdown", &json!({"message": "the test is over"}))?;
    let agreed = |event: &Event| matches!(event, Event::ShutdownAgreed { .. });
    ensure!(events.find(COMMAND, agreed).is_some(), "not agreed");
    let console = guest.console_handle();
    guest.ends_with(ExitReason::PowerOff)?;
    ensure!(ExitReason::PowerOff.exit_status() == 0);
    ensure!(
        console.to_string().contains("stopped in order"),
        "systemd did not stop its units:\n{console}"
    );
    Ok(())
}
