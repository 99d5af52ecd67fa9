// SPDX-License-Identifier: MIT OR Apache-2.0

//! A whole Debian, from its root disk: it starts, loads the drivers by itself, follows the host's clock, and ends in order.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use host_harness::disk::DiskOptions;
use host_harness::events::Event;
use host_harness::net::link_pair;
use host_harness::vm::ExitReason;
use host_harness::vsp::netvsp::NicParams;
use viridian_tests::guest::COMMAND;
use viridian_tests::manifest::Manifest;
use viridian_tests::{Drivers, Guest, both_drivers};

use crate::control::{self, Operator};
use crate::images::{Images, MIB, check_unmounted};

both_drivers!(debian_boots_loads_its_drivers_and_ends_cleanly);

/// The controller of the disk beside the root disk.
const SECOND: u8 = 1;

fn debian_boots_loads_its_drivers_and_ends_cleanly(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    // It shows whether file systems are unmounted, which the root disk cannot: that one is forgotten.
    let data = images.ext4_of("data.raw", 64 * MIB, &Manifest::load()?.installed_modules())?;
    let mut disk = DiskOptions::new(&data);
    disk.controller = SECOND;
    let mut guest = Guest::with(drivers).debian().disk(disk).reboot().boot()?;
    let (_folder, operator) = control::listen(&mut guest)?;
    boots_to_its_login_prompt(&guest)?;
    guest.check_log(&[])?;
    mount(&guest)?;
    if drivers == Drivers::Rust {
        guest.sh("cp -a /mnt/lib/modules/. /lib/modules/ && depmod && sync")?;
    }
    ready_to_end(&guest)?;
    let events = guest.host().events().subscribe();
    ask_to_end(&guest, &operator, "reboot")?;
    let reset = |event: &Event| matches!(event, Event::Reset);
    ensure!(
        events.find(COMMAND, reset).is_some(),
        "no reset\n--- console\n{}",
        guest.console()
    );
    ended_in_order(&guest.console(), "reboot", &data)?;

    guest.wait_for_restart()?;
    guest.wait_for("systemctl is-system-running --wait")?;
    modules_have_loaded(&guest)?;
    chrony_follows_the_host(&guest, &operator)?;
    // The root file system too was unmounted in order.
    guest.check_log(&[])?;
    guest.sh("! dmesg | grep -i 'ext4.*recover'")?;
    mount(&guest)?;
    ask_to_end(&guest, &operator, "shutdown")?;
    let console = guest.console_handle();
    guest.ends_with(ExitReason::PowerOff)?;
    ensure!(ExitReason::PowerOff.exit_status() == 0);
    ended_in_order(&console.to_string(), "shutdown", &data)
}

fn boots_to_its_login_prompt(guest: &Guest) -> Result<()> {
    ensure!(
        guest.wait_for("systemctl is-system-running --wait")? == "running",
        "systemd"
    );
    guest.wait_for("systemctl is-active serial-getty@ttyS0")?;
    guest.until("there is a login prompt", || {
        guest.console().contains("login: ")
    })?;
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
    Ok(())
}

fn mount(guest: &Guest) -> Result<()> {
    let disk = guest.disk(SECOND, 0)?;
    guest.sh(&format!("mount /dev/{disk} /mnt && touch /mnt/used"))?;
    Ok(())
}

/// Waits until the guest can be asked to end; nobody has loaded the driver for that yet.
fn ready_to_end(guest: &Guest) -> Result<()> {
    match guest.drivers() {
        Drivers::Rust => guest.sh("insmod /run/viridian/modules/shutdown.ko")?,
        Drivers::C => guest.sh("modprobe hv_utils")?,
    };
    guest.until_negotiated(&["shutdown"])
}

/// What is printed on the console when systemd stops its units in order.
fn witness(verb: &str) -> String {
    format!("stopped in order for {verb}")
}

/// Asks the guest to end.
fn ask_to_end(guest: &Guest, operator: &Operator, verb: &str) -> Result<()> {
    let events = guest.host().events().subscribe();
    let witness = witness(verb);
    guest.sh(&format!(
        "systemd-run --unit=witness --property=Type=oneshot --property=RemainAfterExit=yes \
         --property='ExecStop=/bin/sh -c \"echo {witness} > /dev/ttyS0\"' /bin/true",
    ))?;
    operator.ctl(&[verb, "--message", "the test goes on"])?;
    let agreed = |event: &Event| matches!(event, Event::ShutdownAgreed { .. });
    ensure!(events.find(COMMAND, agreed).is_some(), "not agreed");
    Ok(())
}

/// Sees that the guest has ended as it should.
fn ended_in_order(console: &str, verb: &str, data: &Path) -> Result<()> {
    ensure!(
        console.contains(&witness(verb)),
        "systemd did not stop its units:\n{console}"
    );
    check_unmounted(data)
}

/// Modules that `make modules_install` has installed are loaded when their devices are there.
fn modules_have_loaded(guest: &Guest) -> Result<()> {
    guest.until_negotiated(&["heartbeat", "timesync", "shutdown", "keyboard", "mouse"])?;
    // A NIC that comes now.
    let (near, _far) = link_pair("far end", 1)?;
    guest
        .host()
        .network()
        .add_nic(NicParams::new(Arc::new(near)))?;
    guest.wait_for("ls -d /sys/bus/vmbus/devices/*/net/*")?;
    let drivers = guest.drivers();
    let modules = [
        drivers.service_modules(),
        drivers.input_modules(),
        &[drivers.network_module(), drivers.storage_module()],
    ];
    for module in modules.concat() {
        guest.sh(&format!("test -d /sys/module/{module}"))?;
    }
    if drivers == Drivers::Rust {
        // The initramfs had to load this one for the root disk; udev would have found it by the ACPI device.
        guest.sh("modprobe --resolve-alias $(cat /sys/bus/acpi/devices/VMBUS:00/modalias) | grep -x vmbus_drv")?;
    }
    Ok(())
}

fn chrony_follows_the_host(guest: &Guest, operator: &Operator) -> Result<()> {
    // A quarter of an hour off, so that chrony has something to do.
    guest.sh("date -s '15 minutes ago'")?;
    guest.sh(
        "printf '%s\\n' 'refclock PHC /dev/ptp_hyperv poll 0 dpoll -2 stratum 2' 'makestep 1 -1' \
             'driftfile /tmp/drift' 'user root' > /tmp/chrony.conf
         chronyd -f /tmp/chrony.conf",
    )?;
    guest.wait_for("chronyc -n sources | grep '^#\\* PHC0'")?;
    guest.wait_for("chronyc -n waitsync 1 0.1 0 1")?;
    until_ahead(guest, 0)?;
    stays_ahead(guest, 0)?;
    // The host's clock moves by less than what chrony steps.
    operator.ctl(&["time", "sample", "--offset", "700"])?;
    until_ahead(guest, 700)
}

/// By how many milliseconds the guest's clock is ahead of the host's: at least and at most.
fn ahead(guest: &Guest) -> Result<(i128, i128)> {
    let now = || -> Result<i128> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
        Ok(i128::try_from(since.as_millis())?)
    };
    let before = now()?;
    let theirs: i128 = guest.sh("date +%s%3N")?.parse()?;
    // It was read at some time between.
    Ok((theirs - now()?, theirs - before))
}

/// How far the guest's clock may be from where it should be, in milliseconds.
const NEAR: i128 = 250;

/// Waits until the guest's clock is ahead by so many milliseconds.
fn until_ahead(guest: &Guest, ms: i128) -> Result<()> {
    let deadline = Instant::now() + COMMAND;
    // Only a quick answer says enough.
    let is_there = |(least, most)| least >= ms - NEAR && most <= ms + NEAR;
    while !is_there(ahead(guest)?) {
        ensure!(
            Instant::now() < deadline,
            "the guest's clock is ahead by {:?} ms, not by {ms} ms",
            ahead(guest)?
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// Sees that the guest's clock stays ahead by so many milliseconds.
fn stays_ahead(guest: &Guest, ms: i128) -> Result<()> {
    // The host says every five seconds what time it is; in between too the guest must know.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(11) {
        let (least, most) = ahead(guest)?;
        ensure!(
            least <= ms + NEAR && most >= ms - NEAR,
            "the guest's clock does not stay: it is ahead by {least} to {most} ms"
        );
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}
