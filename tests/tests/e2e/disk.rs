// SPDX-License-Identifier: MIT OR Apache-2.0

//! Disks: data, sizes, alignments, formats, hot plug, errors.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use host_harness::disk::{Bus, DiskOptions, Fault, FaultKind, Format};
use viridian_tests::{Drivers, Guest, both_drivers};

use crate::images::{Images, MIB, check_ext4, sha256, tool};

both_drivers!(
    reads_what_the_image_holds,
    reads_a_large_file,
    transfers_as_much_as_a_request_takes,
    writes_reach_the_image,
    ext4_keeps_files,
    fio_verifies_on_several_cpus,
    finds_every_lun,
    speaks_of_its_limits,
    parameters_limit_queues_and_depth,
    hot_adds_under_io,
    hot_removes_under_io,
    sees_a_new_size,
    read_only_disk_refuses_writes,
    media_error_has_its_sense,
    qcow2_and_vhd_hold_data,
);

/// The LUN after the one that a test uses most.
const SECOND: u8 = 1;

fn reads_what_the_image_holds(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("data.raw", 48 * MIB + 512, 7)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    let disk = guest.disk(0, 0)?;
    let sum = guest.sh(&format!("sha256sum < /dev/{disk} | cut -d' ' -f1"))?;
    ensure!(sum == sha256(&path)?, "the guest read something else");
    guest.check_log(&[])?;
    guest.power_off()
}

fn reads_a_large_file(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let file = images.random("large", 260 * MIB + 12345, 11)?;
    let want = sha256(&file)?;
    let path = images.ext4_with("fs.raw", 300 * MIB, &[(&file, "large")])?;
    std::fs::remove_file(file)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    let disk = guest.disk(0, 0)?;
    let sum = guest.sh_for(
        &format!("mkdir -p /mnt && mount -t ext4 -o ro /dev/{disk} /mnt && sha256sum < /mnt/large | cut -d' ' -f1"),
        Duration::from_secs(300),
    )?;
    ensure!(sum == want, "the guest read something else");
    guest.check_log(&[])?;
    guest.power_off()
}

fn transfers_as_much_as_a_request_takes(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("data.raw", 8 * MIB, 12)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    let disk = guest.disk(0, 0)?;
    let queue = format!("/sys/block/{disk}/queue");
    let largest: u64 = guest
        .sh(&format!(
            "cd {queue} && cat max_hw_sectors_kb > max_sectors_kb && cat max_sectors_kb"
        ))?
        .parse()?;
    let counters = || {
        let disks = guest.host().storage().disks();
        let disk = disks.into_iter().find(|disk| disk.name == "disk0");
        Ok::<_, anyhow::Error>(disk.context("no disk")?.counters)
    };
    // Ten commands; none may be split, or there were more.
    let before = counters()?;
    guest.sh(&format!(
        "dd if=/dev/{disk} of=/tmp/data bs={largest}k count=5 iflag=direct 2>&1 && \
         dd if=/tmp/data of=/dev/{disk} bs={largest}k count=5 seek=6 oflag=direct 2>&1"
    ))?;
    let after = counters()?;
    let bytes = 5 * largest * 1024;
    ensure!(
        after.read_bytes - before.read_bytes == bytes
            && after.written_bytes - before.written_bytes == bytes,
        "not {bytes} bytes each way: {before:?}, {after:?}"
    );
    ensure!(
        after.commands - before.commands == 10,
        "not ten commands of {largest} KiB: {before:?}, {after:?}"
    );
    let same = guest.sh(&format!(
        "dd if=/dev/{disk} bs={largest}k count=5 skip=6 2>/dev/null | cmp - /tmp/data && echo same"
    ))?;
    ensure!(same == "same", "what was written reads differently");
    guest.check_log(&[])?;
    guest.power_off()
}

fn writes_reach_the_image(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.blank("data.raw", 32 * MIB)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    let disk = guest.disk(0, 0)?;
    // Sizes from a sector to more than a request takes, each at an offset that is no multiple of a page.
    guest.sh(&format!(
        "set -e; dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null; at=3
         for size in 1 7 8 9 63 129 1025 4097 8191; do
             dd if=/tmp/data of=/dev/{disk} bs=512 count=$size seek=$at oflag=direct 2>/dev/null
             dd if=/tmp/data of=/tmp/want bs=512 count=$size 2>/dev/null
             dd if=/dev/{disk} of=/tmp/got bs=512 count=$size skip=$at iflag=direct 2>/dev/null
             cmp /tmp/want /tmp/got
             at=$((at + size + 1))
         done; sync"
    ))?;
    let sum = guest.sh(&format!("sha256sum < /dev/{disk} | cut -d' ' -f1"))?;
    guest.check_log(&[])?;
    guest.power_off()?;
    ensure!(sum == sha256(&path)?, "the image holds something else");
    Ok(())
}

fn ext4_keeps_files(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.ext4("fs.raw", 64 * MIB)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    let disk = guest.disk(0, 0)?;
    let sum = guest.sh(&format!(
        "set -e; mkdir -p /mnt; mount -t ext4 /dev/{disk} /mnt; dd if=/dev/urandom of=/mnt/file bs=1M count=24 2>/dev/null
         cp -r /lib /mnt/tree; sha256sum < /mnt/file; umount /mnt"
    ))?;
    let again = guest.sh(&format!(
        "set -e; mount -t ext4 /dev/{disk} /mnt; sha256sum < /mnt/file; diff -r /lib /mnt/tree >&2; umount /mnt"
    ))?;
    ensure!(sum == again, "the file changed");
    guest.check_log(&[])?;
    guest.power_off()?;
    check_ext4(&path)
}

/// The CPUs of [`fio_verifies_on_several_cpus`], and as many channels.
const CPUS: u32 = 4;

fn fio_verifies_on_several_cpus(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.blank("data.raw", 256 * MIB)?;
    let guest = Guest::with(drivers)
        .cpus(CPUS)
        .disk(DiskOptions::new(&path))
        .tools()
        .boot()?;
    let disk = guest.disk(0, 0)?;
    let channels = format!("{}/channels", guest.controller("scsi0")?);
    guest.wait_for(&format!("test $(ls {channels} | wc -l) = {CPUS}"))?;
    let interrupts = || {
        let text = guest.sh(&format!("cat {channels}/*/interrupts"))?;
        let numbers = text.lines().map(str::parse);
        Ok::<_, anyhow::Error>(numbers.collect::<Result<Vec<u64>, _>>()?)
    };
    let before = interrupts()?;
    // A job on each CPU; sizes from 512 bytes to 2 MiB, so that requests are as large as they can be and the largest
    // are split; buffers that start 512 bytes into a page.
    guest.sh(&format!(
        "cd /sys/block/{disk}/queue && cat max_hw_sectors_kb > max_sectors_kb"
    ))?;
    guest.tool_for(
        &format!(
            "fio --name=v --filename=/dev/{disk} --rw=randwrite --bsrange=512-2M --bs_unaligned=0 --blockalign=512 --direct=1 \
             --ioengine=libaio --iodepth=16 --iomem_align=512 --size=24M --numjobs={CPUS} --offset_increment=64M \
             --cpus_allowed=0-{} --cpus_allowed_policy=split --verify=crc32c --verify_fatal=1 --do_verify=1 \
             --group_reporting --minimal",
            CPUS - 1
        ),
        Duration::from_secs(300),
    )?;
    for (channel, (after, before)) in interrupts()?.into_iter().zip(before).enumerate() {
        ensure!(after > before, "channel {channel} was not used");
    }
    guest.check_log(&[])?;
    guest.power_off()
}

fn finds_every_lun(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let mut builder = Guest::with(drivers);
    for (controller, lun) in [(0, 0), (0, 1), (0, 7), (1, 0), (1, 63)] {
        let path = images.blank(
            &format!("{controller}-{lun}.raw"),
            MIB * (1 + u64::from(lun) + 100 * u64::from(controller)),
        )?;
        let mut disk = DiskOptions::new(path);
        disk.controller = controller;
        disk.lun = Some(lun);
        builder = builder.disk(disk);
    }
    let guest = builder.boot()?;
    for (controller, lun) in [(0, 0), (0, 1), (0, 7), (1, 0), (1, 63)] {
        let disk = guest.disk(controller, lun)?;
        let sectors: u64 = guest.sh(&format!("cat /sys/block/{disk}/size"))?.parse()?;
        let expected = MIB * (1 + u64::from(lun) + 100 * u64::from(controller)) / 512;
        ensure!(
            sectors == expected,
            "controller {controller} LUN {lun}: {sectors} sectors, not {expected}"
        );
    }
    guest.check_log(&[])?;
    guest.power_off()
}

fn speaks_of_its_limits(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.blank("data.raw", 16 * MIB)?;
    let guest = Guest::with(drivers)
        .cpus(2)
        .disk(DiskOptions::new(&path))
        .boot()?;
    let disk = guest.disk(0, 0)?;
    let number = |file: &str| -> Result<u64> {
        Ok(guest
            .sh(&format!("cat /sys/block/{disk}/{file}"))?
            .parse()?)
    };
    ensure!(
        number("queue/max_hw_sectors_kb")? >= 64,
        "a request takes less than 64 KiB"
    );
    ensure!(
        number("queue/logical_block_size")? == 512,
        "sectors are not of 512 bytes"
    );
    ensure!(number("queue/discard_max_bytes")? > 0, "no UNMAP");
    ensure!(number("device/queue_depth")? > 1, "no tagged queueing");
    // What VPD pages 80 and 83 say reaches sysfs, whose files have no size.
    for page in ["vpd_pg80", "vpd_pg83"] {
        guest.sh(&format!(
            "test $(wc -c < /sys/block/{disk}/device/{page}) -gt 4"
        ))?;
    }
    guest.sh(&format!("grep -q Msft /sys/block/{disk}/device/vendor"))?;
    guest.check_log(&[])?;
    guest.power_off()
}

/// Also: a disk of an IDE controller is one, and needs no more than one queue.
fn parameters_limit_queues_and_depth(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("data.raw", 4 * MIB, 3)?;
    let ide = images.random("ide.raw", 2 * MIB, 4)?;
    let mut position = DiskOptions::new(&ide);
    position.bus = Bus::Ide;
    (position.controller, position.target) = (1, 1);
    let guest = Guest::with(drivers)
        .cpus(2)
        .disk(DiskOptions::new(&path))
        .disk(position)
        .boot()?;
    let ide_disk = || {
        let device = guest.controller("ide1.1")?;
        guest.wait_for(&format!(
            "basename $(ls -d {device}/host*/target*/*:0:1:0/block/* {device}/host*/target*/*:0:0:0/block/* 2>/dev/null)"
        ))
    };
    let check = |disk: &str, image: &std::path::Path| -> Result<()> {
        let sum = guest.sh(&format!("sha256sum < /dev/{disk} | cut -d' ' -f1"))?;
        ensure!(sum == sha256(image)?, "{disk} reads something else");
        Ok(())
    };
    let queues = |disk: &str| guest.sh(&format!("ls /sys/block/{disk}/mq | wc -l"));
    let (disk, other) = (guest.disk(0, 0)?, ide_disk()?);
    check(&disk, &path)?;
    check(&other, &ide)?;
    ensure!(queues(&disk)? == "2", "{} queues", queues(&disk)?);
    ensure!(queues(&other)? == "1", "{} queues of IDE", queues(&other)?);

    // The depth of a unit's queue: what is asked for, but not more than the host takes.
    let depth = format!("/sys/block/{disk}/device/queue_depth");
    let most: u64 = guest
        .sh(&format!(
            "cat $(ls -d {}/host*/scsi_host/*)/can_queue",
            guest.controller("scsi0")?
        ))?
        .parse()?;
    for asked in [7, 1, most, 20] {
        guest.sh(&format!("echo {asked} > {depth}"))?;
        let now = guest.sh(&format!("cat {depth}"))?;
        ensure!(now == asked.to_string(), "depth {now} instead of {asked}");
    }
    for nonsense in [0, most + 1] {
        let output = guest.run(&format!("echo {nonsense} > {depth}"))?;
        ensure!(output.status != 0, "a depth of {nonsense} was taken");
    }
    check(&disk, &path)?;

    let module = drivers.storage_module();
    guest.sh(&format!(
        "rmmod {module} && modprobe {module} storvsc_max_hw_queues=1 storvsc_ringbuffer_size=65536"
    ))?;
    let (disk, other) = (guest.disk(0, 0)?, ide_disk()?);
    ensure!(queues(&disk)? == "1", "{} queues", queues(&disk)?);
    let less: u64 = guest
        .sh(&format!(
            "cat $(ls -d {}/host*/scsi_host/*)/can_queue",
            guest.controller("scsi0")?
        ))?
        .parse()?;
    ensure!(
        less < most * 2 / 3,
        "{less} commands fit half a ring, {most} a ring"
    );
    check(&disk, &path)?;
    check(&other, &ide)?;
    guest.check_log(&[])?;
    guest.power_off()
}

/// Keeps the first disk busy until `/tmp/stop` exists; its status tells whether all reads were right.
fn busy(disk: &str) -> String {
    format!(
        "want=$(sha256sum < /dev/{disk}); while ! test -e /tmp/stop; do echo 3 > /proc/sys/vm/drop_caches
         test \"$(sha256sum < /dev/{disk})\" = \"$want\" || exit 1; done"
    )
}

fn hot_adds_under_io(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("data.raw", 8 * MIB, 1)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    let work = guest.spawn(&busy(&guest.disk(0, 0)?))?;
    for lun in SECOND..=4 {
        let path = images.random(&format!("new{lun}.raw"), 4 * MIB, u64::from(lun))?;
        let mut disk = DiskOptions::new(&path);
        disk.lun = Some(lun);
        guest.host().storage().add_disk(&disk)?;
        let name = guest.disk(0, lun)?;
        let sum = guest.sh(&format!("sha256sum < /dev/{name} | cut -d' ' -f1"))?;
        ensure!(sum == sha256(&path)?, "LUN {lun} reads something else");
    }
    guest.sh("touch /tmp/stop")?;
    let output = work.wait(viridian_tests::guest::COMMAND)?;
    ensure!(
        output.status == 0,
        "the work on the first disk failed: {output}"
    );
    guest.check_log(&[])?;
    guest.power_off()
}

fn hot_removes_under_io(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let kept = images.random("kept.raw", 8 * MIB, 1)?;
    let gone = images.random("gone.raw", 8 * MIB, 2)?;
    let mut second = DiskOptions::new(&gone);
    second.lun = Some(SECOND);
    second.id = Some("gone".into());
    let guest = Guest::with(drivers)
        .disk(DiskOptions::new(&kept))
        .disk(second)
        .boot()?;
    let work = guest.spawn(&busy(&guest.disk(0, 0)?))?;
    let name = guest.disk(0, SECOND)?;
    // Direct reads of the disk that goes, until one fails.
    let doomed = guest.spawn(&format!(
        "while dd if=/dev/{name} of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done"
    ))?;
    guest.host().storage().remove_disk("gone")?;
    guest.wait_for(&format!("! test -e /sys/block/{name}"))?;
    doomed.wait(viridian_tests::guest::COMMAND)?;
    guest.sh("touch /tmp/stop")?;
    let output = work.wait(viridian_tests::guest::COMMAND)?;
    ensure!(
        output.status == 0,
        "the work on the disk that stays failed: {output}"
    );
    guest.check_log(&[&name, "tag#", "[sd", "suppressed"])?;
    guest.power_off()
}

fn sees_a_new_size(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.blank("data.raw", 8 * MIB)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    let disk = guest.disk(0, 0)?;
    for size in [24 * MIB, 16 * MIB] {
        guest.host().storage().resize_disk("disk0", size)?;
        // The next command hears of it: nothing needs to be done in the guest.
        guest.wait_for(&format!(
            "dd if=/dev/{disk} of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null; test $(cat /sys/block/{disk}/size) = {}",
            size / 512
        ))?;
    }
    guest.sh(&format!(
        "dd if=/dev/zero of=/dev/{disk} bs=1M seek=15 count=1 oflag=direct 2>&1"
    ))?;
    guest.check_log(&["apacity", "tag#"])?;
    guest.power_off()
}

fn read_only_disk_refuses_writes(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("data.raw", 4 * MIB, 5)?;
    let before = sha256(&path)?;
    let mut options = DiskOptions::new(&path);
    options.read_only = true;
    let guest = Guest::with(drivers).disk(options).boot()?;
    let disk = guest.disk(0, 0)?;
    ensure!(
        guest.sh(&format!("cat /sys/block/{disk}/ro"))? == "1",
        "the guest believes that it may write"
    );
    let output = guest.run(&format!(
        "dd if=/dev/zero of=/dev/{disk} bs=4k count=1 oflag=direct"
    ))?;
    ensure!(output.status != 0, "a write succeeded: {output}");
    guest.check_log(&[])?;
    guest.power_off()?;
    ensure!(before == sha256(&path)?, "the image changed");
    Ok(())
}

fn media_error_has_its_sense(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("data.raw", 4 * MIB, 5)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    let disk = guest.disk(0, 0)?;
    let bad = Fault {
        bytes: 256 * 4096..257 * 4096,
        kind: FaultKind::Read,
    };
    guest.host().storage().set_faults("disk0", vec![bad])?;
    let read = |at: u32| {
        guest.run(&format!(
            "dd if=/dev/{disk} of=/dev/null bs=4k skip={at} count=1 iflag=direct"
        ))
    };
    ensure!(read(255)?.status == 0, "the block before fails too");
    ensure!(read(256)?.status != 0, "the bad block can be read");
    ensure!(read(257)?.status == 0, "the block behind fails too");
    let log = guest.sh("dmesg")?;
    ensure!(
        log.contains("Sense Key : Medium Error"),
        "no sense in the log:\n{log}"
    );
    ensure!(
        log.contains("Unrecovered read error"),
        "no additional sense in the log:\n{log}"
    );
    guest.check_log(&["sd ", "tag#", &disk, "suppressed"])?;
    guest.power_off()
}

fn qcow2_and_vhd_hold_data(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let raw = images.random("source.raw", 12 * MIB, 9)?;
    let mut builder = Guest::with(drivers);
    let forms = [
        ("qcow2", "qcow2", "compat=1.1"),
        ("vpc", "vhd", "subformat=dynamic"),
        ("vpc", "vhd", "subformat=fixed"),
    ];
    for (lun, (qemu, ours, option)) in (0..).zip(forms) {
        let path = images.path(&format!("{lun}.{ours}"));
        // force_size: without it the size is rounded to what old BIOS geometry can say.
        let option = if qemu == "vpc" {
            format!("{option},force_size=on")
        } else {
            option.into()
        };
        tool(
            Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", qemu, "-o", &option])
                .arg(&raw)
                .arg(&path),
        )?;
        let mut disk = DiskOptions::new(&path);
        disk.format = Some(if ours == "vhd" {
            Format::Vhd
        } else {
            Format::Qcow2
        });
        disk.lun = Some(lun);
        builder = builder.disk(disk);
    }
    let guest = builder.boot()?;
    let want = sha256(&raw)?;
    for lun in 0..forms.len() as u8 {
        let disk = guest.disk(0, lun)?;
        let sum = guest.sh(&format!(
            "head -c {} /dev/{disk} | sha256sum | cut -d' ' -f1",
            12 * MIB
        ))?;
        ensure!(
            sum == want,
            "{:?} reads something else",
            forms[usize::from(lun)]
        );
        guest.sh(&format!(
            "dd if=/dev/urandom of=/dev/{disk} bs=64k seek=100 count=3 oflag=direct 2>&1; sync"
        ))?;
    }
    let mut written = Vec::new();
    for lun in 0..forms.len() as u8 {
        let disk = guest.disk(0, lun)?;
        written.push(guest.sh(&format!(
            "head -c {} /dev/{disk} | sha256sum | cut -d' ' -f1",
            12 * MIB
        ))?);
    }
    guest.check_log(&[])?;
    guest.power_off()?;
    for (lun, (qemu, ours, option)) in forms.into_iter().enumerate() {
        let (from, to) = (
            images.path(&format!("{lun}.{ours}")),
            images.path(&format!("{lun}.raw")),
        );
        tool(
            Command::new("qemu-img")
                .args(["convert", "-f", qemu, "-O", "raw"])
                .arg(&from)
                .arg(&to),
        )?;
        std::fs::File::options()
            .write(true)
            .open(&to)?
            .set_len(12 * MIB)?;
        ensure!(
            sha256(&to)? == written[lun],
            "{ours} {option}: qemu-img reads something else than the guest wrote"
        );
    }
    Ok(())
}
