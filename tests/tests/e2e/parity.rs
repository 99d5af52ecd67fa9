// SPDX-License-Identifier: MIT OR Apache-2.0

//! What users and their tools see of a disk: the same with the C driver and with ours.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use host_harness::disk::DiskOptions;
use viridian_tests::{Drivers, Guest};

use crate::images::{Images, MIB};

/// Attributes by name.
type Attributes = BTreeMap<String, String>;

/// Reads all attributes of a disk, its queue, its SCSI device and host, and the parameters of the driver's module.
fn attributes(drivers: Drivers, images: &Images) -> Result<Attributes> {
    let guest = Guest::with(drivers)
        .cpus(2)
        .disk(DiskOptions::new(images.path("data.raw")))
        .boot()?;
    let disk = guest.disk(0, 0)?;
    let host = guest.sh(&format!(
        "ls -d {}/host*/scsi_host/*",
        guest.controller("scsi0")?
    ))?;
    // Binary files are shown by their checksum. What cannot be read says so.
    let text = guest.sh(&format!(
        "show() {{
             cd $2; for file in $3; do
                 if test -f $file -a -r $file; then case $file in
                     *inquiry | *vpd_pg*) echo \"$1/$file=$(sha256sum < $file)\";;
                     *) echo \"$1/$file=$(cat $file 2>&1 | tr '\\n' ' ')\";;
                 esac; fi
             done
         }}
         show disk /sys/block/{disk} 'size ro removable ext_range alignment_offset discard_alignment capability'
         show queue /sys/block/{disk}/queue '*'
         show device /sys/block/{disk}/device '*'
         show sd /sys/block/{disk}/device/scsi_disk/* '*'
         show host {host} '*'
         show parameters /sys/module/{}/parameters '*'",
        drivers.storage_module()
    ))?;
    guest.check_log(&[])?;
    guest.power_off()?;
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    Ok(pairs
        .map(|(name, value)| (name.into(), value.trim_end().into()))
        .collect())
}

/// Counts of what happened.
const DIFFERENT: &[&str] = &[
    "device/iodone_cnt",
    "device/ioerr_cnt",
    "device/iorequest_cnt",
    "device/iotmo_cnt",
    "host/host_busy",
];

/// Parameters that the C driver lacks: it waits for ever.
const OURS: &[&str] = &[
    "parameters/host_timeout",
    "parameters/request_timeout",
    "parameters/timeout_extensions",
];

#[test]
fn disks_look_the_same_with_both_drivers() -> Result<()> {
    let images = Images::new()?;
    images.blank("data.raw", 64 * MIB)?;
    let mut c = attributes(Drivers::C, &images)?;
    let mut ours = attributes(Drivers::Rust, &images)?;
    ensure!(
        c.get("device/timeout").map(String::as_str) == Some("180")
            && c.contains_key("device/vpd_pg83")
            && c.contains_key("queue/max_hw_sectors_kb")
            && c.contains_key("host/can_queue")
            && c.contains_key("parameters/storvsc_ringbuffer_size"),
        "the list is not complete: {c:#?}"
    );
    for name in OURS {
        ensure!(ours.remove(*name).is_some(), "no {name}");
    }
    for name in DIFFERENT {
        c.remove(*name);
        ours.remove(*name);
    }
    let mut differences = Vec::new();
    for name in c
        .keys()
        .chain(ours.keys().filter(|name| !c.contains_key(*name)))
    {
        let (c, ours) = (c.get(name), ours.get(name));
        if c != ours {
            differences.push(format!(
                "{name}: {c:?} with the C driver, {ours:?} with ours"
            ));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}
