// SPDX-License-Identifier: MIT OR Apache-2.0

//! The bus: enumeration, versions, sysfs, channels and CPUs, rescind and hot add.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use host_harness::disk::DiskOptions;
use hv_proto::ids::ChannelId;
use hv_proto::version::Version;
use viridian_tests::guest::COMMAND;
use viridian_tests::{Drivers, Guest, both_drivers, on_one_guest, our_drivers};

use crate::images::{Images, MIB, sha256};

both_drivers!(
    devices_and_channels_have_the_stable_sysfs,
    negotiates_every_version,
    channels_are_spread_over_cpus,
    channels_follow_cpus_under_io,
);

// With the C storvsc this does not end. What was seen: every command that the host took was answered, but those that
// were sent when the channel was already closed (two of them after an answer "aborted") stay in flight for ever,
// for after a rescind `storvsc_queuecommand` returns 0 for what it could not send, and `storvsc_eh_timed_out` always
// starts the timer anew. The readers wait in `submit_bio_wait`, and `hv_vmbus_rescind` in `scsi_remove_host`,
// `del_gendisk`, `blk_mq_freeze_queue_wait`.
our_drivers!(
    rescind_under_io_ends_it,
    releases_a_rescinded_subchannel,
    opens_the_largest_rings_with_small_request_ids,
);

/// What sysfs says of a device, and that it says it of one that comes while the guest runs, too.
fn devices_and_channels_have_the_stable_sysfs(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let guest = Guest::with(drivers)
        .disk(DiskOptions::new(images.blank("a.raw", MIB)?))
        .boot()?;
    enumerates(&guest)?;
    hot_adds_a_controller(&guest, &images)?;
    guest.check_log(&["sd ", "[sd", "tag#", "suppressed"])?;
    guest.power_off()
}

fn channels_are_spread_over_cpus(drivers: Drivers) -> Result<()> {
    const CPUS: u32 = 8;
    let images = Images::new()?;
    let path = images.random("a.raw", 4 * MIB, 3)?;
    let guest = Guest::with(drivers)
        .cpus(CPUS)
        .disk(DiskOptions::new(&path))
        .boot()?;
    let disk = guest.disk(0, 0)?;
    // A channel for each CPU, the primary one included.
    let channels = wait_for_channels(&guest, CPUS as usize)?;
    each_cpu_has_a_channel(&guest)?;
    read_on_every_cpu(&guest, &disk, CPUS)?;
    let device = guest.controller("scsi0")?;
    for channel in channels {
        let interrupts: u64 = guest
            .sh(&format!("cat {device}/channels/{channel}/interrupts"))?
            .parse()?;
        ensure!(interrupts > 0, "channel {channel} was never used");
    }
    guest.check_log(&[])?;
    guest.power_off()
}

/// The CPUs of [`channels_follow_cpus_under_io`].
const CPUS: u32 = 4;

/// Interrupts are moved and CPUs go off and on while a disk is read.
fn channels_follow_cpus_under_io(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("a.raw", 8 * MIB, 3)?;
    let guest = Guest::with(drivers)
        .cpus(CPUS)
        .disk(DiskOptions::new(&path))
        .boot()?;
    let disk = guest.disk(0, 0)?;
    wait_for_channels(&guest, CPUS as usize)?;
    let work = guest.spawn(&format!(
        "want=$(sha256sum < /dev/{disk}); while ! test -e /tmp/stop; do echo 3 > /proc/sys/vm/drop_caches
         test \"$(sha256sum < /dev/{disk})\" = \"$want\" || exit 1; done"
    ))?;
    on_one_guest!((&guest, &disk), moves_channels, survives_cpu_offline);
    guest.sh("touch /tmp/stop")?;
    let output = work.wait(COMMAND)?;
    ensure!(output.status == 0, "the work failed: {output}");
    guest.check_log(&[])?;
    guest.power_off()
}

fn enumerates(guest: &Guest) -> Result<()> {
    guest.disk(0, 0)?;
    let device = guest.controller("scsi0")?;
    let instance = device.rsplit('/').next().unwrap_or_default().to_owned();
    let read = |file: &str| guest.sh(&format!("cat {device}/{file}"));
    ensure!(
        read("class_id")? == "{ba6163d9-04a1-4d29-b605-72e2ffb1dc7f}",
        "class_id"
    );
    ensure!(read("device_id")? == format!("{{{instance}}}"), "device_id");
    ensure!(
        read("modalias")? == "vmbus:d96361baa104294db60572e2ffb1dc7f",
        "modalias"
    );
    ensure!(read("state")? == "3", "state");
    ensure!(read("vendor")? == "0x1414", "vendor");
    ensure!(read("device")? == "0x1", "device");
    let relid: u32 = read("id")?.parse()?;
    ensure!(
        read("channel_vp_mapping")?.starts_with(&format!("{relid}:")),
        "channel_vp_mapping"
    );
    for ring in ["out", "in"] {
        for value in [
            "intr_mask",
            "read_index",
            "write_index",
            "read_bytes_avail",
            "write_bytes_avail",
        ] {
            read(&format!("{ring}_{value}"))?.parse::<u32>()?;
        }
    }
    let before: u64 = read(&format!("channels/{relid}/interrupts"))?.parse()?;
    for file in [
        "cpu",
        "out_mask",
        "in_mask",
        "read_avail",
        "write_avail",
        "events",
        "intr_in_full",
        "intr_out_empty",
        "out_full_first",
        "out_full_total",
        "subchannel_id",
    ] {
        read(&format!("channels/{relid}/{file}"))?.parse::<u64>()?;
    }
    let disk = guest.disk(0, 0)?;
    guest.sh(&format!(
        "dd if=/dev/{disk} of=/dev/null bs=4k iflag=direct 2>/dev/null"
    ))?;
    let after: u64 = read(&format!("channels/{relid}/interrupts"))?.parse()?;
    ensure!(
        after > before,
        "interrupts do not count: {before}, then {after}"
    );
    Ok(())
}

fn read_all(guest: &Guest, image: &std::path::Path) -> Result<()> {
    let disk = guest.disk(0, 0)?;
    let sum = guest.sh(&format!("sha256sum < /dev/{disk} | cut -d' ' -f1"))?;
    ensure!(sum == sha256(image)?, "the guest read something else");
    Ok(())
}

/// Those that the host allows, and one that the guest's parameter asks for.
fn negotiates_every_version(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("a.raw", MIB, 3)?;
    let speaks = |guest: &Guest, version: Version| -> Result<()> {
        read_all(guest, &path)?;
        let negotiated = guest.negotiated_version();
        ensure!(
            negotiated == Some(version.to_string()),
            "{negotiated:?} instead of {version}"
        );
        guest.check_log(&[])
    };
    let start = |version| {
        Guest::with(drivers)
            .host_version(version)
            .disk(DiskOptions::new(&path))
            .boot()
    };
    let mut guest = start(Version::NEWEST)?;
    speaks(&guest, Version::NEWEST)?;
    for version in Version::NEWEST_FIRST.into_iter().skip(1) {
        match drivers {
            // The bus driver is built in: each connection takes another guest.
            Drivers::C => {
                guest.power_off()?;
                guest = start(version)?;
            }
            Drivers::Rust => {
                guest.sh("rmmod storvsc vmbus_drv")?;
                guest
                    .host()
                    .server()
                    .context("no bus")?
                    .set_max_version(version);
                guest.sh("modprobe storvsc")?;
            }
        }
        speaks(&guest, version)?;
    }
    guest.power_off()?;

    let guest = Guest::with(drivers)
        .host_version(Version::NEWEST)
        .guest_version(Version::V5_0)
        .disk(DiskOptions::new(&path))
        .boot()?;
    speaks(&guest, Version::V5_0)?;
    guest.power_off()
}

/// The numbers of a device's channels.
fn channels(guest: &Guest) -> Result<Vec<u32>> {
    let device = guest.controller("scsi0")?;
    let list = guest.sh(&format!("ls {device}/channels"))?;
    Ok(list
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?)
}

/// Waits until a guest has opened `count` channels of its first controller, and returns their numbers.
fn wait_for_channels(guest: &Guest, count: usize) -> Result<Vec<u32>> {
    let device = guest.controller("scsi0")?;
    guest.wait_for(&format!("test $(ls {device}/channels | wc -l) -ge {count}"))?;
    channels(guest)
}

/// Which CPU each channel of the first controller is on, as the guest says it.
fn mapping(guest: &Guest) -> Result<Vec<(u32, u32)>> {
    let device = guest.controller("scsi0")?;
    let text = guest.sh(&format!("cat {device}/channel_vp_mapping"))?;
    text.lines()
        .map(|line| {
            let (channel, cpu) = line.split_once(':').context("a line without colon")?;
            Ok((channel.parse()?, cpu.parse()?))
        })
        .collect()
}

/// Reads a disk on every CPU in turn, past the cache.
fn read_on_every_cpu(guest: &Guest, disk: &str, cpus: u32) -> Result<()> {
    for cpu in 0..cpus {
        guest.sh(&format!(
            "taskset {:x} dd if=/dev/{disk} of=/dev/null bs=64k iflag=direct 2>&1",
            1 << cpu
        ))?;
    }
    Ok(())
}

fn each_cpu_has_a_channel(guest: &Guest) -> Result<()> {
    let mapping = mapping(guest)?;
    let mut cpus: Vec<u32> = mapping.iter().map(|(_, cpu)| *cpu).collect();
    cpus.sort_unstable();
    cpus.dedup();
    ensure!(
        cpus.len() == mapping.len(),
        "two channels share a CPU while another has none: {mapping:?}"
    );
    let status = guest.host().server().context("no bus")?.status();
    for (channel, cpu) in mapping {
        let host = status.channels.iter().find(|c| c.id == channel);
        let vp = host.map(|c| c.target_vp);
        ensure!(
            vp == Some(cpu),
            "channel {channel} is on CPU {cpu}; the host says {vp:?}"
        );
    }
    Ok(())
}

fn moves_channels(guest: &Guest, disk: &str) -> Result<()> {
    let device = guest.controller("scsi0")?;
    let channel = channels(guest)?[0];
    let file = format!("{device}/channels/{channel}/cpu");
    for cpu in [3, 0, 2, 1, 3] {
        guest.sh(&format!("echo {cpu} > {file}"))?;
        ensure!(
            guest.sh(&format!("cat {file}"))? == cpu.to_string(),
            "cpu shows something else"
        );
        let status = guest.host().server().context("no bus")?.status();
        let vp = status
            .channels
            .iter()
            .find(|c| c.id == channel)
            .map(|c| c.target_vp);
        ensure!(
            vp == Some(cpu),
            "the host sends interrupts to {vp:?}, not to {cpu}"
        );
        guest.sh(&format!(
            "dd if=/dev/{disk} of=/dev/null bs=64k iflag=direct 2>&1"
        ))?;
    }
    for nonsense in ["4", "4096", "-1", "one", ""] {
        let output = guest.run(&format!("echo '{nonsense}' > {file}"))?;
        ensure!(output.status != 0, "CPU '{nonsense}' was taken");
    }
    Ok(())
}

fn survives_cpu_offline(guest: &Guest, disk: &str) -> Result<()> {
    let online = |cpu: u32, on: u32| {
        guest.sh(&format!(
            "echo {on} > /sys/devices/system/cpu/cpu{cpu}/online"
        ))
    };
    // One after the other until CPU 0 is alone, and back in another order.
    for off in [1, 3, 2] {
        online(off, 0)?;
        let mapping = mapping(guest)?;
        ensure!(
            mapping.iter().all(|(_, cpu)| *cpu != off),
            "channels on CPU {off}, which is off: {mapping:?}"
        );
    }
    ensure!(
        mapping(guest)?.iter().all(|(_, cpu)| *cpu == 0),
        "channels on CPUs that are off"
    );
    for cpu in [2, 1, 3] {
        online(cpu, 1)?;
    }
    for _ in 0..2 {
        for cpu in 1..CPUS {
            online(cpu, 0)?;
            online(cpu, 1)?;
        }
    }
    // A CPU that is back can have channels again.
    let channel = channels(guest)?[0];
    let file = format!("{}/channels/{channel}/cpu", guest.controller("scsi0")?);
    guest.sh(&format!("echo 3 > {file}"))?;
    read_on_every_cpu(guest, disk, CPUS)?;
    // The CPU that the connection lives on stays.
    let refused = guest.run("! test -e /sys/devices/system/cpu/cpu0/online || echo 0 > /sys/devices/system/cpu/cpu0/online")?;
    ensure!(
        refused.status != 0
            || guest
                .run("test -e /sys/devices/system/cpu/cpu0/online")?
                .status
                != 0,
        "CPU 0 went off"
    );
    Ok(())
}

fn releases_a_rescinded_subchannel(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("a.raw", 4 * MIB, 3)?;
    let guest = Guest::with(drivers)
        .cpus(CPUS)
        .disk(DiskOptions::new(&path))
        .boot()?;
    let disk = guest.disk(0, 0)?;
    let device = guest.controller("scsi0")?;
    wait_for_channels(&guest, CPUS as usize)?;
    let server = guest.host().server().context("no bus")?;
    let subchannels = || -> Vec<u32> {
        let mut ids: Vec<_> = server
            .status()
            .channels
            .iter()
            .filter(|c| c.subchannel_index != 0)
            .map(|c| c.id)
            .collect();
        ids.sort_unstable();
        ids
    };
    let work = guest.spawn(&format!(
        "while ! test -e /tmp/stop; do dd if=/dev/{disk} of=/dev/null bs=64k iflag=direct 2>&1 || exit 1; done"
    ))?;
    for id in subchannels() {
        ensure!(
            server.rescind_subchannel(ChannelId::new(id)),
            "no sub-channel {id}"
        );
        guest.wait_for(&format!("! test -e {device}/channels/{id}"))?;
        // The guest has given the number back while the device lives on.
        wait_until("the guest releases the channel", || {
            !subchannels().contains(&id)
        })?;
        read_on_every_cpu(&guest, &disk, CPUS)?;
    }
    ensure!(mapping(&guest)?.len() == 1, "channels are left");
    guest.sh("touch /tmp/stop")?;
    let output = work.wait(COMMAND)?;
    ensure!(output.status == 0, "the work failed: {output}");
    guest.check_log(&["tag#"])?;
    guest.power_off()
}

/// Waits until `done`.
fn wait_until(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + COMMAND;
    while !done() {
        ensure!(Instant::now() < deadline, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn opens_the_largest_rings_with_small_request_ids(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("a.raw", 8 * MIB, 3)?;
    let trace = images.path("trace");
    let guest = Guest::with(drivers)
        .trace(trace.clone())
        .disk(DiskOptions::new(&path))
        .boot()?;
    guest.disk(0, 0)?;
    guest.sh("rmmod storvsc && modprobe storvsc storvsc_ringbuffer_size=4194304")?;
    read_all(&guest, &path)?;
    guest.check_log(&[])?;
    guest.power_off()?;
    let trace = std::fs::read_to_string(&trace)?;
    // Two rings of 4 MiB: a header with 26 page numbers and bodies with 28 each.
    let bodies = trace
        .lines()
        .filter(|line| line.contains("\"GPADL_BODY\""))
        .count();
    ensure!(bodies >= (2048 - 26usize).div_ceil(28), "{bodies} bodies");
    let mut packets = 0;
    for line in trace.lines() {
        let line: serde_json::Value = serde_json::from_str(line)?;
        if line["kind"] != "packet" || line["dir"] != "to_host" {
            continue;
        }
        packets += 1;
        let id = line["transaction_id"].as_u64().context("no id")?;
        ensure!(id != 0, "a request with id 0");
        // Kernel addresses have their upper 16 bits set.
        ensure!(id >> 48 != 0xffff, "id {id:#x} looks like an address");
    }
    ensure!(packets > 10, "only {packets} packets in the trace");
    Ok(())
}

fn rescind_under_io_ends_it(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let kept = images.random("kept.raw", 4 * MIB, 1)?;
    let gone = images.random("gone.raw", 4 * MIB, 2)?;
    let mut second = DiskOptions::new(&gone);
    second.controller = 1;
    let guest = Guest::with(drivers)
        .cpus(2)
        .disk(DiskOptions::new(&kept))
        .disk(second)
        .boot()?;
    let name = guest.disk(1, 0)?;
    let device = guest.controller("scsi1")?;
    let readers: Vec<_> = (0..4)
        .map(|_| {
            guest.spawn(&format!(
                "while dd if=/dev/{name} of=/dev/null bs=16k iflag=direct 2>/dev/null; do :; done"
            ))
        })
        .collect::<Result<_>>()?;
    guest.host().storage().remove_controller("scsi1")?;
    for reader in readers {
        reader.wait(COMMAND)?;
    }
    guest.wait_for(&format!("! test -e {device}"))?;
    read_all(&guest, &kept)?;
    guest.check_log(&[&name, "tag#", "[sd", "sd ", "suppressed"])?;
    guest.power_off()
}

fn hot_adds_a_controller(guest: &Guest, images: &Images) -> Result<()> {
    for round in 0..5 {
        let path = images.random(&format!("new{round}.raw"), MIB, round + 10)?;
        let mut disk = DiskOptions::new(&path);
        disk.controller = 1;
        disk.id = Some("new".into());
        guest.host().storage().add_disk(&disk)?;
        let name = guest.disk(1, 0)?;
        let sum = guest.sh(&format!("sha256sum < /dev/{name} | cut -d' ' -f1"))?;
        ensure!(
            sum == sha256(&path)?,
            "round {round}: the guest read something else"
        );
        // As an operator does it: first the disk, then its controller. (What a driver does when a
        // controller goes first is `rescind_under_io_ends_it`.)
        let device = guest.controller("scsi1")?;
        guest.host().storage().remove_disk("new")?;
        // The block device goes first; the SCSI device when its driver has sent its last command,
        // for which the C driver would wait for ever if the controller went before.
        guest.wait_for(&format!(
            "! ls -d /sys/block/{name} {device}/host*/target*/*:0:0:0 2>/dev/null | grep ."
        ))?;
        // Drivers look for other disks then. For a command of that the C driver would wait for ever, too.
        guest.until("the guest has looked for disks", || {
            let commands = || {
                let controllers = guest.host().storage().controllers();
                let found = controllers.into_iter().find(|c| c.name == "scsi1");
                found.map(|c| c.counters.commands)
            };
            let before = commands();
            std::thread::sleep(Duration::from_secs(1));
            let looks =
                "cat /proc/[0-9]*/stack 2>/dev/null | grep -q 'scsi_scan\\|storvsc_host_scan'";
            before == commands() && guest.run(looks).is_ok_and(|output| output.status == 1)
        })?;
        guest.host().storage().remove_controller("scsi1")?;
        guest.wait_for(&format!("! test -e {device}"))?;
    }
    Ok(())
}
