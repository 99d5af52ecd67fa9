// SPDX-License-Identifier: MIT OR Apache-2.0

//! A whole Debian, from its root disk.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use host_harness::events::Event;
use host_harness::net::link_pair;
use host_harness::vm::ExitReason;
use host_harness::vsp::netvsp::NicParams;
use serde_json::json;
use viridian_tests::guest::COMMAND;
use viridian_tests::{Drivers, Guest, both_drivers};

use crate::control;

both_drivers!(boots_to_its_login_prompt, modules_load_by_themselves);

fn boots_to_its_login_prompt(drivers: Drivers) -> Result<()> {
    let guest = Guest::with(drivers).debian().boot()?;
    ensure!(
        guest.wait_for("systemctl is-system-running --wait")? == "running",
        "systemd"
    );
    guest.wait_for("systemctl is-active serial-getty@ttyS0")?;
    let deadline = Instant::now() + COMMAND;
    while !guest.console().contains("login: ") {
        ensure!(
            Instant::now() < deadline,
            "no login prompt on the console:\n{}",
            guest.console()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    let root = guest.sh("findmnt -n -o SOURCE,FSTYPE /")?;
    ensure!(
        root.starts_with("/dev/sd") && root.ends_with("ext4"),
        "the root file system is {root}"
    );
    ensure!(guest.sh("lsscsi")?.contains("Msft"), "lsscsi");
    ensure!(
        guest.sh("systemd-detect-virt")? == "microsoft",
        "systemd-detect-virt"
    );
    guest.check_log(&[])?;
    let _ends = guest.spawn("systemctl poweroff")?;
    guest.ends_with(ExitReason::PowerOff)
}

/// Modules that are installed where `make modules_install` puts them are loaded when their devices are there, and
/// time synchronization is a source for chrony.
fn modules_load_by_themselves(drivers: Drivers) -> Result<()> {
    let mut guest = Guest::with(drivers).debian().reboot().boot()?;
    let (_folder, client) = control::listen(&mut guest)?;
    guest.wait_for("systemctl is-system-running --wait")?;
    if drivers == Drivers::Rust {
        guest.sh(
            "cp /run/viridian/modules/*.ko /lib/modules/$(uname -r)/updates/ && depmod && sync",
        )?;
    }
    control::ready_to_end(&guest, drivers)?;
    let events = guest.host().events().subscribe();
    client.post("/v1/reboot", &json!({}))?;
    let reset = |event: &Event| matches!(event, Event::Reset);
    ensure!(events.find(COMMAND, reset).is_some(), "no reset");
    guest.wait_for_restart()?;
    guest.wait_for("systemctl is-system-running --wait")?;

    guest.until_negotiated(&["heartbeat", "timesync", "shutdown", "keyboard", "mouse"])?;
    // A NIC that comes now.
    let (near, _far) = link_pair("far end", 1)?;
    guest
        .host()
        .network()
        .add_nic(NicParams::new(Arc::new(near)))?;
    guest.wait_for("ls -d /sys/bus/vmbus/devices/*/net/*")?;
    let modules = [
        drivers.service_modules(),
        drivers.input_modules(),
        &match drivers {
            Drivers::C => ["hv_netvsc", "hv_storvsc"],
            Drivers::Rust => ["netvsc", "storvsc"],
        },
    ];
    for module in modules.concat() {
        guest.sh(&format!("test -d /sys/module/{module}"))?;
    }
    chrony_follows_the_host(&guest)?;
    guest.check_log(&[])?;
    client.post("/v1/shutdown", &json!({}))?;
    guest.ends_with(ExitReason::PowerOff)
}

fn chrony_follows_the_host(guest: &Guest) -> Result<()> {
    // A quarter of an hour off, so that chrony has something to do.
    guest.sh("date -s '15 minutes ago'")?;
    guest.sh(
        "printf '%s\\n' 'refclock PHC /dev/ptp_hyperv poll 0 dpoll -2 stratum 2' 'makestep 1 -1' \
             'driftfile /tmp/drift' 'user root' > /tmp/chrony.conf
         chronyd -f /tmp/chrony.conf",
    )?;
    guest.wait_for("chronyc -n sources | grep '^#\\* PHC0'")?;
    guest.wait_for("chronyc -n waitsync 1 0.1 0 1")?;
    let host = || SystemTime::now().duration_since(UNIX_EPOCH);
    let before = host()?.as_secs();
    let theirs: u64 = guest.sh("date +%s")?.parse()?;
    let after = host()?.as_secs();
    ensure!(
        (before - 1..=after + 1).contains(&theirs),
        "the guest says {theirs}, and it is {before} to {after}"
    );
    Ok(())
}
