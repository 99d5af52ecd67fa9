// SPDX-License-Identifier: MIT OR Apache-2.0

//! Monitor pages: channels that the guest signals by a bit in memory.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use host_harness::disk::DiskOptions;
use viridian_tests::{Drivers, Guest, both_drivers};

use crate::images::{Images, MIB, sha256};

both_drivers!(signals_through_monitor_pages);

fn signals_through_monitor_pages(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("a.raw", 2 * MIB, 7)?;
    let guest = Guest::with(drivers)
        .monitor_latency(Duration::from_millis(1))
        .disk(DiskOptions::new(&path))
        .boot()?;
    let disk = guest.disk(0, 0)?;
    let sum = guest.sh(&format!("sha256sum /dev/{disk}"))?;
    ensure!(sum.starts_with(&sha256(&path)?), "the disk reads as {sum}");

    let device = guest.controller("scsi0")?;
    let status = guest.host().server().context("no bus")?.status();
    for channel in status.channels.iter().filter(|c| c.name == "scsi0") {
        let (id, signals) = (channel.id, channel.counters.signals);
        let read = |file: &str| guest.sh(&format!("cat {device}/channels/{id}/{file}"));
        ensure!(signals > 0, "the host saw no signal on channel {id}");
        ensure!(read("events")? == "0", "hypercalls on channel {id}");
        ensure!(read("latency")? == "10000", "latency of channel {id}");
        ensure!(
            read("monitor_id")?.parse::<u8>()? < 128,
            "monitor id of channel {id}"
        );
    }
    let read = |file: &str| guest.sh(&format!("cat {device}/client_monitor_{file}"));
    ensure!(read("latency")? == "10000", "latency");
    ensure!(read("conn_id")?.parse::<u32>()? > 0xffff, "connection");
    guest.check_log(&[])?;
    guest.power_off()
}
