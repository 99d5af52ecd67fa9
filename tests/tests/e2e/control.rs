// SPDX-License-Identifier: MIT OR Apache-2.0

//! The control API with a real guest: the clean end of a whole system.

use anyhow::{Result, ensure};
use host_harness::api::Client;
use host_harness::events::Event;
use host_harness::vm::ExitReason;
use serde_json::json;
use viridian_tests::guest::COMMAND;
use viridian_tests::{Drivers, Guest, both_drivers};

both_drivers!(shutdown_ends_debian_cleanly);

/// Lets the guest's host listen, in a folder of its own.
fn listen(guest: &mut Guest) -> Result<(tempfile::TempDir, Client)> {
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

fn ready_to_end(guest: &Guest, drivers: Drivers) -> Result<()> {
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
