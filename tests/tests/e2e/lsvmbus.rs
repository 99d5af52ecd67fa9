// SPDX-License-Identifier: MIT OR Apache-2.0

//! The users' tool `lsvmbus` (tools/hv in the kernel's source), which reads the bus driver's sysfs files.

use std::fmt::Write;

use anyhow::{Context, Result, bail, ensure};
use host_harness::disk::DiskOptions;
use hv_proto::guid::{self, Guid};
use hv_proto::ids::ChannelId;
use viridian_tests::manifest::Manifest;
use viridian_tests::{Drivers, Guest, both_drivers};

use crate::images::{Images, MIB};

both_drivers!(lsvmbus_shows_devices_and_channels);

/// What the tool calls a class of devices.
fn description(class: &Guid) -> Result<&'static str> {
    Ok(match *class {
        guid::SCSI => "Synthetic SCSI Controller",
        guid::NETWORK => "Synthetic network adapter",
        guid::KEYBOARD => "Synthetic keyboard",
        guid::MOUSE => "Synthetic mouse",
        guid::HEARTBEAT => "[Heartbeat]",
        guid::SHUTDOWN => "[Operating system shutdown]",
        guid::TIME_SYNC => "[Time Synchronization]",
        other => bail!("a device of class {other}"),
    })
}

/// What `lsvmbus` has to print, without option and with `-vv`, from what the host knows.
fn expected(guest: &Guest) -> Result<(String, String)> {
    let server = guest.host().server().context("no bus")?;
    let channels = server.status().channels;
    let mut devices: Vec<_> = channels
        .iter()
        .filter(|channel| channel.subchannel_index == 0)
        .collect();
    devices.sort_by_key(|device| device.id);
    let (mut short, mut long) = (String::new(), String::new());
    for device in devices {
        let offer = server.hostile().offer(ChannelId::new(device.id));
        let offer = offer.context("no offer")?;
        let (class, instance) = (offer.interface_id, offer.instance_id);
        let name = description(&class)?;
        writeln!(short, "VMBUS ID {:2}: {name}", device.id)?;
        writeln!(
            long,
            "VMBUS ID {:2}: Class_ID = {{{class}}} - {name}\n\
             \tDevice_ID = {{{instance}}}\n\tSysfs path: /sys/bus/vmbus/devices/{instance}",
            device.id
        )?;
        let mut mapping: Vec<_> = channels
            .iter()
            .filter(|channel| channel.name == device.name)
            .filter(|channel| channel.subchannel_index == 0 || channel.state == "open")
            .collect();
        mapping.sort_by_key(|channel| channel.id);
        for channel in mapping {
            writeln!(
                long,
                "\tRel_ID={}, target_cpu={}",
                channel.id, channel.target_vp
            )?;
        }
        long.push('\n');
    }
    let trim = |text: String| text.trim_end().to_owned();
    Ok((trim(short), trim(long)))
}

fn lsvmbus_shows_devices_and_channels(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let mut second = DiskOptions::new(images.blank("b.raw", MIB)?);
    second.controller = 1;
    let guest = Guest::with(drivers)
        .cpus(2)
        .disk(DiskOptions::new(images.blank("a.raw", MIB)?))
        .disk(second)
        .tools()
        .boot()?;
    guest.disk(0, 0)?;
    guest.disk(1, 0)?;
    // Sub-channels come when the disks are there already.
    for controller in ["scsi0", "scsi1"] {
        let device = guest.controller(controller)?;
        guest.wait_for(&format!("test $(ls {device}/channels | wc -l) = 2"))?;
    }
    let script = std::fs::read_to_string(Manifest::load()?.lsvmbus)?;
    guest.sh(&format!(
        "cat > /tmp/lsvmbus <<'END-OF-SCRIPT'\n{script}\nEND-OF-SCRIPT"
    ))?;
    let printed = guest.tool("python3 /tmp/lsvmbus -vv")?;
    let (short, long) = expected(&guest)?;
    ensure!(
        printed == long,
        "it printed:\n{printed}\ninstead of:\n{long}"
    );
    let printed = guest.tool("python3 /tmp/lsvmbus")?;
    ensure!(
        printed == short,
        "it printed:\n{printed}\ninstead of:\n{short}"
    );
    guest.check_log(&[])?;
    guest.power_off()
}
