// SPDX-License-Identifier: MIT OR Apache-2.0

//! Disks: data, sizes, alignments, formats, hot plug, errors.
//!
//! Cases that need nothing special of the guest share one; each adds disks of its own, under numbers of its own.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use host_harness::disk::{Bus, DiskOptions, Fault, FaultKind, Format};
use viridian_tests::guest::COMMAND;
use viridian_tests::{Drivers, Guest, both_drivers, on_one_guest};

use crate::images::{Images, MIB, check_ext4, sha256, tool};

both_drivers!(
    disks_hold_data,
    disks_change_under_io,
    fio_verifies_on_several_cpus,
    parameters_limit_queues_and_depth,
);

/// Data in every format, with every size of request; what the guest knows of its disks.
fn disks_hold_data(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let guest = Guest::with(drivers)
        .disk(DiskOptions::new(images.blank("first.raw", MIB)?))
        .boot()?;
    on_one_guest!(
        (&guest, &images),
        reads_what_the_image_holds,
        transfers_as_much_as_a_request_takes,
        writes_reach_the_image,
        ext4_keeps_files,
        reads_a_large_file,
        finds_every_lun,
        speaks_of_its_limits,
        read_only_disk_refuses_writes,
    );
    let written = qcow2_and_vhd_hold_data(&guest, &images)?;
    guest.check_log(&[])?;
    guest.power_off()?;
    check_formats(&images, &written)
}

/// Disks that come, go, change and fail while another one is busy.
fn disks_change_under_io(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("busy.raw", 8 * MIB, 1)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    let work = guest.spawn(&busy(&guest.disk(0, 0)?))?;
    on_one_guest!(
        (&guest, &images),
        hot_adds,
        hot_removes,
        sees_a_new_size,
        media_error_has_its_sense,
    );
    guest.sh("touch /tmp/stop")?;
    let output = work.wait(COMMAND)?;
    ensure!(
        output.status == 0,
        "the work on the first disk failed: {output}"
    );
    guest.check_log(&["[sd", "sd ", "tag#", "apacity", "suppressed"])?;
    guest.power_off()
}

/// Keeps a disk busy until `/tmp/stop` exists; its status tells whether all reads were right.
fn busy(disk: &str) -> String {
    format!(
        "want=$(sha256sum < /dev/{disk}); while ! test -e /tmp/stop; do echo 3 > /proc/sys/vm/drop_caches
         test \"$(sha256sum < /dev/{disk})\" = \"$want\" || exit 1; done"
    )
}

/// Adds a disk to the running guest as this LUN of the first controller, and gives the guest's name for it.
fn add(guest: &Guest, lun: u8, image: &Path) -> Result<String> {
    add_disk(guest, lun, DiskOptions::new(image))
}

fn add_disk(guest: &Guest, lun: u8, mut disk: DiskOptions) -> Result<String> {
    disk.lun = Some(lun);
    guest.host().storage().add_disk(&disk)?;
    guest.disk(disk.controller, lun)
}

/// Checks that a disk reads as its image.
fn reads_as(guest: &Guest, disk: &str, image: &Path) -> Result<()> {
    let sum = guest.sh(&format!("sha256sum < /dev/{disk} | cut -d' ' -f1"))?;
    ensure!(sum == sha256(image)?, "{disk} reads something else");
    Ok(())
}

fn reads_what_the_image_holds(guest: &Guest, images: &Images) -> Result<()> {
    // Not a whole number of pages.
    let path = images.random("data.raw", 24 * MIB + 512, 7)?;
    let disk = add(guest, 1, &path)?;
    reads_as(guest, &disk, &path)
}

/// The disk of [`transfers_as_much_as_a_request_takes`].
const TRANSFERS: &str = "transfers";

fn transfers_as_much_as_a_request_takes(guest: &Guest, images: &Images) -> Result<()> {
    let mut options = DiskOptions::new(images.random("transfers.raw", 8 * MIB, 12)?);
    options.id = Some(TRANSFERS.into());
    let disk = add_disk(guest, 2, options)?;
    let queue = format!("/sys/block/{disk}/queue");
    let largest: u64 = guest
        .sh(&format!(
            "cd {queue} && cat max_hw_sectors_kb > max_sectors_kb && cat max_sectors_kb"
        ))?
        .parse()?;
    let counters = || {
        let disks = guest.host().storage().disks();
        let disk = disks.into_iter().find(|disk| disk.name == TRANSFERS);
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
    Ok(())
}

fn writes_reach_the_image(guest: &Guest, images: &Images) -> Result<()> {
    let path = images.blank("writes.raw", 32 * MIB)?;
    let disk = add(guest, 3, &path)?;
    // Sizes from a sector to more than a request takes, each at an offset that is no multiple of a page.
    guest.sh(&format!(
        "set -e; dd if=/dev/urandom of=/tmp/data bs=1M count=5 2>/dev/null; at=3
         for sectors in 1 7 8 9 63 129 1025 4097 8191; do
             size=$((sectors * 512)) place=$((at * 512))
             dd if=/tmp/data of=/dev/{disk} bs=$size count=1 seek=$place oflag=direct,seek_bytes 2>/dev/null
             head -c $size /tmp/data > /tmp/want
             dd if=/dev/{disk} of=/tmp/got bs=$size count=1 skip=$place iflag=direct,skip_bytes 2>/dev/null
             cmp /tmp/want /tmp/got
             at=$((at + sectors + 1))
         done; sync"
    ))?;
    reads_as(guest, &disk, &path)
}

fn ext4_keeps_files(guest: &Guest, images: &Images) -> Result<()> {
    let path = images.ext4("fs.raw", 64 * MIB)?;
    let disk = add(guest, 4, &path)?;
    let sum = guest.sh(&format!(
        "set -e; mkdir -p /mnt; mount -t ext4 /dev/{disk} /mnt; dd if=/dev/urandom of=/mnt/file bs=1M count=24 2>/dev/null
         cp -r /lib /mnt/tree; sha256sum < /mnt/file; umount /mnt"
    ))?;
    let again = guest.sh(&format!(
        "set -e; mount -t ext4 /dev/{disk} /mnt; sha256sum < /mnt/file; diff -r /lib /mnt/tree >&2; umount /mnt"
    ))?;
    ensure!(sum == again, "the file changed");
    check_ext4(&path)
}

fn reads_a_large_file(guest: &Guest, images: &Images) -> Result<()> {
    let file = images.random("large", 130 * MIB + 12345, 11)?;
    let want = sha256(&file)?;
    let path = images.ext4_with("large.raw", 150 * MIB, &[(&file, "large")])?;
    std::fs::remove_file(file)?;
    let disk = add(guest, 5, &path)?;
    let sum = guest.sh(&format!(
        "mount -t ext4 -o ro /dev/{disk} /mnt && sha256sum < /mnt/large | cut -d' ' -f1 && umount /mnt"
    ))?;
    ensure!(sum == want, "the guest read something else");
    Ok(())
}

/// Those of one controller, and of another one that comes with its first disk.
fn finds_every_lun(guest: &Guest, images: &Images) -> Result<()> {
    for (controller, lun) in [(0, 7), (0, 254), (1, 0), (1, 63)] {
        let size = MIB * (1 + u64::from(lun) + 300 * u64::from(controller));
        let path = images.blank(&format!("{controller}-{lun}.raw"), size)?;
        let mut options = DiskOptions::new(path);
        options.controller = controller;
        let disk = add_disk(guest, lun, options)?;
        let sectors: u64 = guest.sh(&format!("cat /sys/block/{disk}/size"))?.parse()?;
        ensure!(
            sectors == size / 512,
            "controller {controller} LUN {lun}: {sectors} sectors, not {}",
            size / 512
        );
    }
    Ok(())
}

fn speaks_of_its_limits(guest: &Guest, images: &Images) -> Result<()> {
    let disk = add(guest, 8, &images.blank("limits.raw", 16 * MIB)?)?;
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
    Ok(())
}

fn read_only_disk_refuses_writes(guest: &Guest, images: &Images) -> Result<()> {
    let path = images.random("read-only.raw", 4 * MIB, 5)?;
    let before = sha256(&path)?;
    let mut options = DiskOptions::new(&path);
    options.read_only = true;
    let disk = add_disk(guest, 9, options)?;
    ensure!(
        guest.sh(&format!("cat /sys/block/{disk}/ro"))? == "1",
        "the guest believes that it may write"
    );
    let output = guest.run(&format!(
        "dd if=/dev/zero of=/dev/{disk} bs=4k count=1 oflag=direct"
    ))?;
    ensure!(output.status != 0, "a write succeeded: {output}");
    ensure!(before == sha256(&path)?, "the image changed");
    Ok(())
}

/// A format of `qemu-img`, ours for it, and the former's options.
const FORMATS: [(&str, Format, &str); 3] = [
    ("qcow2", Format::Qcow2, "compat=1.1"),
    // force_size: without it the size is rounded to what old BIOS geometry can say.
    ("vpc", Format::Vhd, "subformat=dynamic,force_size=on"),
    ("vpc", Format::Vhd, "subformat=fixed,force_size=on"),
];

/// Their bytes.
const FORMAT_SIZE: u64 = 12 * MIB;

/// Reads images of all formats and writes to them. Gives what they hold then, as SHA-256.
fn qcow2_and_vhd_hold_data(guest: &Guest, images: &Images) -> Result<Vec<String>> {
    let raw = images.random("source.raw", FORMAT_SIZE, 9)?;
    let want = sha256(&raw)?;
    let mut written = Vec::new();
    for (number, (name, format, option)) in (0u8..).zip(FORMATS) {
        let path = images.path(&format!("format{number}"));
        tool(
            Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", name, "-o", option])
                .arg(&raw)
                .arg(&path),
        )?;
        let mut options = DiskOptions::new(&path);
        options.format = Some(format);
        let disk = add_disk(guest, 10 + number, options)?;
        let sum = || {
            guest.sh(&format!(
                "head -c {FORMAT_SIZE} /dev/{disk} | sha256sum | cut -d' ' -f1"
            ))
        };
        ensure!(sum()? == want, "{name} {option} reads something else");
        guest.sh(&format!(
            "dd if=/dev/urandom of=/dev/{disk} bs=64k seek=100 count=3 oflag=direct 2>&1; sync"
        ))?;
        written.push(sum()?);
    }
    Ok(written)
}

/// Checks with `qemu-img` what a guest wrote to the images.
fn check_formats(images: &Images, written: &[String]) -> Result<()> {
    for (number, ((name, _, option), written)) in FORMATS.into_iter().zip(written).enumerate() {
        let raw = images.path(&format!("format{number}.raw"));
        tool(
            Command::new("qemu-img")
                .args(["convert", "-f", name, "-O", "raw"])
                .arg(images.path(&format!("format{number}")))
                .arg(&raw),
        )?;
        std::fs::File::options()
            .write(true)
            .open(&raw)?
            .set_len(FORMAT_SIZE)?;
        ensure!(
            sha256(&raw)? == *written,
            "{name} {option}: qemu-img reads something else than the guest wrote"
        );
    }
    Ok(())
}

fn hot_adds(guest: &Guest, images: &Images) -> Result<()> {
    for lun in 1..=3 {
        let path = images.random(&format!("new{lun}.raw"), 4 * MIB, u64::from(lun))?;
        let disk = add(guest, lun, &path)?;
        reads_as(guest, &disk, &path)?;
    }
    Ok(())
}

fn hot_removes(guest: &Guest, images: &Images) -> Result<()> {
    let mut options = DiskOptions::new(images.random("gone.raw", 8 * MIB, 2)?);
    options.id = Some("gone".into());
    let disk = add_disk(guest, 4, options)?;
    // Direct reads of the disk that goes, until one fails.
    let doomed = guest.spawn(&format!(
        "while dd if=/dev/{disk} of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done"
    ))?;
    guest.host().storage().remove_disk("gone")?;
    guest.wait_for(&format!("! test -e /sys/block/{disk}"))?;
    doomed.wait(COMMAND)?;
    Ok(())
}

fn sees_a_new_size(guest: &Guest, images: &Images) -> Result<()> {
    let mut options = DiskOptions::new(images.blank("size.raw", 8 * MIB)?);
    options.id = Some("size".into());
    let disk = add_disk(guest, 5, options)?;
    for size in [24 * MIB, 16 * MIB] {
        guest.host().storage().resize_disk("size", size)?;
        // The next command hears of it: nothing needs to be done in the guest.
        guest.wait_for(&format!(
            "dd if=/dev/{disk} of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null; test $(cat /sys/block/{disk}/size) = {}",
            size / 512
        ))?;
    }
    guest.sh(&format!(
        "dd if=/dev/zero of=/dev/{disk} bs=1M seek=15 count=1 oflag=direct 2>&1"
    ))?;
    Ok(())
}

fn media_error_has_its_sense(guest: &Guest, images: &Images) -> Result<()> {
    let mut options = DiskOptions::new(images.random("bad.raw", 4 * MIB, 5)?);
    options.id = Some("bad".into());
    let disk = add_disk(guest, 6, options)?;
    let bad = Fault {
        bytes: 256 * 4096..257 * 4096,
        kind: FaultKind::Read,
    };
    guest.host().storage().set_faults("bad", vec![bad])?;
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
    Ok(())
}

/// The CPUs of [`fio_verifies_on_several_cpus`], and as many channels.
const CPUS: u32 = 4;

/// A command that moves less data than there is room for: INQUIRY says how much it has.
fn says_how_much_is_missing(guest: &Guest, disk: &str) -> Result<()> {
    const ROOM: usize = 1024;
    let text = guest.tool(&format!(
        "sg_raw --request={ROOM} /dev/{disk} 12 00 00 04 00 00 2>&1"
    ))?;
    let word = |after: &str, number: usize| -> Result<&str> {
        let rest = text.split_once(after).map(|(_, rest)| rest);
        let word = rest.and_then(|rest| rest.split_whitespace().nth(number));
        word.with_context(|| format!("sg_raw says something else:\n{text}"))
    };
    let came: usize = word("Received", 0)?.parse()?;
    // The fifth byte: how many follow it. Before it are the offset and four bytes.
    let holds = usize::from_str_radix(word("bytes of data:", 5)?, 16)? + 5;
    ensure!(
        came == holds && came < ROOM,
        "of INQUIRY data of {holds} bytes came {came}"
    );
    Ok(())
}

fn fio_verifies_on_several_cpus(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.blank("data.raw", 256 * MIB)?;
    let guest = Guest::with(drivers)
        .cpus(CPUS)
        .disk(DiskOptions::new(&path))
        .tools()
        .boot()?;
    let disk = guest.disk(0, 0)?;
    says_how_much_is_missing(&guest, &disk)?;
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
             --ioengine=libaio --iodepth=16 --iomem_align=512 --size=16M --numjobs={CPUS} --offset_increment=64M \
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
