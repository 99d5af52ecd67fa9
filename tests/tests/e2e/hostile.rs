// SPDX-License-Identifier: MIT OR Apache-2.0

//! Storage hosts that fall silent, lose answers, or answer what nobody asked.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use host_harness::disk::DiskOptions;
use host_harness::vsp::storvsp::{ControllerCounters, FORGED_PACKETS, Stall};
use viridian_tests::guest::COMMAND;
use viridian_tests::{Drivers, Guest, on_one_guest, our_drivers};

use crate::images::{Images, MIB, sha256};

// The C storvsc waits for an answer for ever (`storvsc_eh_timed_out` always starts the timer anew), so that
// nothing of this ends with it; and it takes a second answer to a command for the first answer to the next
// command with that tag.
our_drivers!(silence_is_survived, wrong_answers_change_nothing);

/// What the drivers and the kernel say about commands that were not answered.
const NOT_ANSWERED: &[&str] = &[
    "tag#",
    "resetting the controller",
    "giving up on all commands",
    "unexpected packet",
    "sd ",
    "[sd",
    "suppressed",
];

/// A second disk, which nothing happens to at first.
const SECOND: u8 = 1;

/// Answers that do not come, on a controller with two disks whose driver has little patience.
fn silence_is_survived(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let mut second = DiskOptions::new(images.random("second.raw", 2 * MIB, 2)?);
    second.lun = Some(SECOND);
    let guest = Guest::with(drivers)
        .cpus(2)
        .disk(DiskOptions::new(images.random("first.raw", 8 * MIB, 1)?))
        .disk(second)
        .boot()?;
    set_patience(&guest)?;
    on_one_guest!(
        (&guest, &images),
        lost_answer_is_recovered,
        reset_brings_stuck_commands_back,
        dead_host_fails_io_and_may_come_back,
        commands_end_after_the_host_has_done_with_them,
        unbind_bind_and_rmmod_end_with_a_dead_host,
    );
    guest.check_log(&[NOT_ANSWERED, &["probe"]].concat())?;
    guest.power_off()
}

fn set_patience(guest: &Guest) -> Result<()> {
    let first = guest.disk(0, 0)?;
    let second = guest.disk(0, SECOND)?;
    // The second disk's commands would take longer than any command of a test may.
    guest.sh(&format!(
        "set -e; cd /sys/module/storvsc/parameters; echo 0 > timeout_extensions; echo 3 > host_timeout
         echo 2 > /sys/block/{first}/device/timeout; echo {} > /sys/block/{second}/device/timeout",
        COMMAND.as_secs() + 60
    ))?;
    Ok(())
}

fn stall(guest: &Guest, stall: Stall) -> Result<()> {
    Ok(guest.host().storage().stall("scsi0", stall)?)
}

/// Reads the disk of this name past the cache.
fn read(disk: &str) -> String {
    format!("dd if=/dev/{disk} bs=64k iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1")
}

fn check_disk(guest: &Guest, images: &Images, lun: u8, image: &str) -> Result<()> {
    let sum = guest.sh(&read(&guest.disk(0, lun)?))?;
    ensure!(
        sum == sha256(&images.path(image))?,
        "LUN {lun} reads something else"
    );
    Ok(())
}

fn counters(guest: &Guest) -> Result<ControllerCounters> {
    let controllers = guest.host().storage().controllers();
    let first = controllers.into_iter().find(|c| c.name == "scsi0");
    Ok(first.context("no controller")?.counters)
}

/// Sum of a counter of all channels, which the driver shows in debugfs.
fn driver_counter(guest: &Guest, name: &str) -> Result<u64> {
    let device = guest.controller("scsi0")?;
    let device = device.rsplit('/').next().unwrap_or_default();
    let text = guest.sh(&format!(
        "test -d /sys/kernel/debug/storvsc-{device} || mount -t debugfs none /sys/kernel/debug
         cat /sys/kernel/debug/storvsc-{device}/channels"
    ))?;
    let mut sum = 0;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        words.find(|&word| word == name);
        let value = words.next();
        sum += value
            .with_context(|| format!("no {name}: {text}"))?
            .parse::<u64>()?;
    }
    Ok(sum)
}

/// How often the kernel's log says something.
fn said(guest: &Guest, what: &str) -> Result<u32> {
    Ok(guest
        .sh(&format!("dmesg | grep -c '{what}'; true"))?
        .parse()?)
}

/// Waits until the log says something more often than `before`.
fn wait_to_say(guest: &Guest, what: &str, before: u32) -> Result<()> {
    guest.wait_for(&format!("test $(dmesg | grep -c '{what}') -gt {before}"))?;
    Ok(())
}

const GIVES_UP: &str = "giving up on all commands";
const IS_BACK: &str = "the host is back";

/// Brings the first disk back, and sees that both are whole.
fn bring_back(guest: &Guest, images: &Images) -> Result<()> {
    let first = guest.disk(0, 0)?;
    guest.sh(&format!("echo running > /sys/block/{first}/device/state"))?;
    check_disk(guest, images, 0, "first.raw")?;
    check_disk(guest, images, SECOND, "second.raw")
}

fn dead_host_fails_io_and_may_come_back(guest: &Guest, images: &Images) -> Result<()> {
    let (first, second) = (guest.disk(0, 0)?, guest.disk(0, SECOND)?);
    let (unknown, back) = (driver_counter(guest, "unknown")?, said(guest, IS_BACK)?);
    stall(guest, Stall::Everything)?;
    let users: Vec<_> = (0..4)
        .map(|n| {
            let rw = if n % 2 == 0 {
                format!("if=/dev/{first} of=/dev/null skip={n} iflag=direct")
            } else {
                format!("if=/dev/zero of=/dev/{first} seek={n} oflag=direct")
            };
            guest.spawn(&format!("dd {rw} bs=16k count=1"))
        })
        .collect::<Result<_>>()?;
    for user in users {
        let output = user.wait(COMMAND)?;
        ensure!(output.status != 0, "I/O succeeded: {output}");
    }
    ensure!(
        guest.sh(&format!("cat /sys/block/{first}/device/state"))? == "offline",
        "the disk is not offline"
    );
    // The other disk did not have to wait for anything yet; now its commands fail at once.
    for rw in [
        format!("if=/dev/{second} of=/dev/null iflag=direct"),
        format!("if=/dev/zero of=/dev/{second} oflag=direct"),
    ] {
        let output = guest.run(&format!("dd {rw} bs=4k count=1"))?;
        ensure!(output.status != 0, "I/O succeeded: {output}");
    }

    // The host has nothing that it could do late, in memory that has another owner by then.
    let now = counters(guest)?;
    ensure!(now.in_flight == 0, "the host still has commands: {now:?}");
    stall(guest, Stall::Off)?;
    wait_to_say(guest, IS_BACK, back)?;
    bring_back(guest, images)?;
    ensure!(
        driver_counter(guest, "unknown")? == unknown,
        "late answers came"
    );
    // Sub-channels, too.
    let now = counters(guest)?;
    ensure!(now.channels == 2, "not all channels are back: {now:?}");
    Ok(())
}

fn commands_end_after_the_host_has_done_with_them(guest: &Guest, images: &Images) -> Result<()> {
    let first = guest.disk(0, 0)?;
    let (given_up, back) = (said(guest, GIVES_UP)?, said(guest, IS_BACK)?);
    stall(guest, Stall::Running)?;
    let readers: Vec<_> = (0..4)
        .map(|n| {
            guest.spawn(&format!(
                "dd if=/dev/{first} of=/dev/null bs=16k skip={n} count=1 iflag=direct
                 status=$?; touch /tmp/ended.{n}; exit $status"
            ))
        })
        .collect::<Result<_>>()?;
    wait_to_say(guest, GIVES_UP, given_up)?;
    // The driver would end them now, if it did not wait for the host.
    std::thread::sleep(Duration::from_secs(2));
    let ended = guest.sh("ls /tmp/ended.* 2>/dev/null; true")?;
    let now = counters(guest)?;
    ensure!(
        ended.is_empty() && now.running > 0,
        "ended: {ended}, although the host is not done: {now:?}"
    );
    stall(guest, Stall::Off)?;
    for reader in readers {
        let output = reader.wait(COMMAND)?;
        ensure!(output.status != 0, "a read succeeded: {output}");
    }
    wait_to_say(guest, IS_BACK, back)?;
    bring_back(guest, images)
}

fn unbind_bind_and_rmmod_end_with_a_dead_host(guest: &Guest, images: &Images) -> Result<()> {
    let first = guest.disk(0, 0)?;
    let device = guest.controller("scsi0")?;
    let device = device.rsplit('/').next().unwrap_or_default();
    let driver = "/sys/bus/vmbus/drivers/storvsc";

    // Unbind, with commands on their way.
    stall(guest, Stall::Everything)?;
    let reader = guest.spawn(&format!(
        "dd if=/dev/{first} of=/dev/null bs=64k iflag=direct"
    ))?;
    guest.sh(&format!("echo {device} > {driver}/unbind"))?;
    ensure!(reader.wait(COMMAND)?.status != 0, "a read succeeded");
    guest.sh(&format!("! test -e /sys/block/{first}"))?;
    // Bind, with nobody who answers the handshake.
    let output = guest.run(&format!("echo {device} > {driver}/bind"))?;
    ensure!(output.status != 0, "a dead controller was bound: {output}");
    stall(guest, Stall::Off)?;
    guest.sh(&format!("echo {device} > {driver}/bind"))?;
    check_disk(guest, images, 0, "first.raw")?;

    // Unload, with caches to be flushed.
    set_patience(guest)?;
    guest.sh("for file in /sys/block/*/device/timeout; do echo 2 > $file; done")?;
    stall(guest, Stall::Everything)?;
    guest.sh("rmmod storvsc")?;
    stall(guest, Stall::Off)?;
    guest.sh("modprobe storvsc")?;
    check_disk(guest, images, 0, "first.raw")?;
    check_disk(guest, images, SECOND, "second.raw")?;
    Ok(())
}

fn reset_brings_stuck_commands_back(guest: &Guest, images: &Images) -> Result<()> {
    let first = guest.disk(0, 0)?;
    let resets = || counters(guest).map_or(0, |counters| counters.resets);
    let before = resets();
    stall(guest, Stall::Commands)?;
    let reader = guest.spawn(&read(&first))?;
    guest.until("the guest asks for a reset", || resets() > before)?;
    stall(guest, Stall::Off)?;
    let output = reader.wait(COMMAND)?;
    ensure!(
        output.stdout.trim_end() == sha256(&images.path("first.raw"))?,
        "the read came to nothing: {output}"
    );
    check_disk(guest, images, SECOND, "second.raw")?;
    Ok(())
}

fn lost_answer_is_recovered(guest: &Guest, images: &Images) -> Result<()> {
    for round in 1..=3 {
        guest.host().storage().drop_answers("scsi0", 1)?;
        check_disk(guest, images, 0, "first.raw")?;
        let counters = counters(guest)?;
        ensure!(
            (counters.lost_answers, counters.resets) == (round, round),
            "answers lost, resets: {counters:?}"
        );
    }
    Ok(())
}

fn wrong_answers_change_nothing(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let guest = Guest::with(drivers)
        .cpus(2)
        .disk(DiskOptions::new(images.blank("data.raw", 64 * MIB)?))
        .tools()
        .boot()?;
    let disk = guest.disk(0, 0)?;
    let storage = guest.host().storage();
    let (commands, unknown) = (
        counters(&guest)?.commands,
        driver_counter(&guest, "unknown")?,
    );
    storage.forge_answers("scsi0", u32::MAX)?;
    storage.duplicate_answers("scsi0", u32::MAX)?;
    guest.tool_for(
        &format!(
            "fio --name=v --filename=/dev/{disk} --rw=randrw --bs=4k --direct=1 --ioengine=libaio --iodepth=16 --size=4M \
             --numjobs=2 --offset_increment=32M --cpus_allowed=0-1 --cpus_allowed_policy=split --verify=crc32c \
             --verify_fatal=1 --do_verify=1 --group_reporting --minimal"
        ),
        Duration::from_secs(240),
    )?;
    storage.forge_answers("scsi0", 0)?;
    storage.duplicate_answers("scsi0", 0)?;
    let commands = counters(&guest)?.commands - commands;
    let unknown = driver_counter(&guest, "unknown")? - unknown;
    ensure!(commands > 1000, "no more than {commands} commands");
    ensure!(
        unknown == commands * (FORGED_PACKETS + 1),
        "{unknown} packets counted that {commands} commands were disturbed by"
    );
    let lines: u64 = guest.sh("dmesg | grep -c 'unexpected packet'")?.parse()?;
    ensure!(
        lines > 0 && lines * 10 < unknown,
        "{lines} lines in the log about {unknown} packets"
    );
    guest.check_log(&["unexpected packet"])?;
    guest.power_off()
}
