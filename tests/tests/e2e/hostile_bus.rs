// SPDX-License-Identifier: MIT OR Apache-2.0

//! A host that breaks the rules of the bus: the guest must survive, go on with what is not concerned, and tell.
//!
//! The C drivers do not run these. From their source: the second of two offers of one instance takes the place of the
//! first, or ends in a `BUG_ON`; an offer with flag 4 alone leaves a count behind for which every later rescind waits
//! for ever; messages that make no sense are a `WARN`; and a write index out of bounds is read from without end. Seen:
//! a device that is rescinded while the C storvsc waits for its first answer is not given back within a minute, in both
//! of the last two tests.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use host_harness::disk::DiskOptions;
use host_harness::vmbus::{
    Direction, HostChannel, Hostile, OfferParams, OpenError, OpenParams, Server, Vsp,
};
use hv_proto::guid::{self, Guid};
use hv_proto::ids::{ChannelId, GpadlId, VpIndex};
use hv_proto::message::{
    GpadlCreated, GpadlTorndown, HostMessage, Message, ModifyChannelResponse, OfferChannel,
    OfferFlags, OpenChannelResult, RescindChannelOffer, UnloadResponse, VersionResponse,
};
use hv_proto::ring::Field;
use viridian_tests::guest::COMMAND;
use viridian_tests::{Drivers, Guest, our_drivers};
use zerocopy::FromZeros;

use crate::images::{Images, MIB, sha256};

our_drivers!(
    refuses_offers_that_contradict,
    ignores_messages_that_make_no_sense,
    bad_rings_are_opened_anew,
    survives_rapid_offers_and_rescinds,
    binds_unknown_devices_by_new_id,
);

/// A class that no driver knows.
const UNKNOWN: Guid = Guid::literal("7ab34a0c-1d0e-4fd6-9a53-02f5c3a7e001");

/// An instance of that class.
fn instance(n: u8) -> Guid {
    let mut bytes = *UNKNOWN.as_bytes();
    bytes[15] = n;
    Guid::from_bytes(bytes)
}

/// An offer of a channel of its own.
fn unknown_offer(channel: u32, n: u8) -> OfferChannel {
    OfferChannel {
        interface_id: UNKNOWN,
        instance_id: instance(n),
        channel_id: ChannelId::new(channel),
        is_dedicated_interrupt: 1.into(),
        ..OfferChannel::new_zeroed()
    }
}

/// The counters of the bus driver by name.
fn mistakes(guest: &Guest) -> Result<BTreeMap<String, u64>> {
    let text = guest.sh(
        "test -d /sys/kernel/debug/vmbus_drv || mount -t debugfs none /sys/kernel/debug
         head -n 1 /sys/kernel/debug/vmbus_drv/counters",
    )?;
    let words: Vec<_> = text.split_whitespace().collect();
    words
        .chunks_exact(2)
        .map(|pair| Ok((pair[0].to_owned(), pair[1].parse()?)))
        .collect()
}

/// Waits until a counter of the bus driver has this value.
fn wait_for_count(guest: &Guest, name: &str, value: u64) -> Result<()> {
    let deadline = Instant::now() + COMMAND;
    loop {
        let counts = mistakes(guest)?;
        let now = *counts.get(name).context("no such counter")?;
        if now == value {
            return Ok(());
        }
        ensure!(
            now < value && Instant::now() < deadline,
            "{name} is {now} instead of {value}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn server(guest: &Guest) -> Result<&std::sync::Arc<Server>> {
    guest.host().server().context("no bus")
}

/// The number of the primary channel of a controller.
fn primary(guest: &Guest, name: &str) -> Result<ChannelId> {
    let status = server(guest)?.status();
    let found = status
        .channels
        .iter()
        .find(|c| c.name == name && c.subchannel_index == 0);
    Ok(ChannelId::new(found.context("no channel")?.id))
}

fn rescind(hostile: &Hostile<'_>, channel: u32) -> bool {
    hostile.send(&RescindChannelOffer {
        channel_id: ChannelId::new(channel),
    })
}

fn read_all(guest: &Guest, image: &std::path::Path) -> Result<()> {
    let disk = guest.disk(0, 0)?;
    let sum = guest.sh(&format!(
        "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /dev/{disk} | cut -d' ' -f1"
    ))?;
    ensure!(sum == sha256(image)?, "the guest read something else");
    Ok(())
}

fn refuses_offers_that_contradict(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("a.raw", 2 * MIB, 3)?;
    let trace = images.path("trace");
    let guest = Guest::with(drivers)
        .cpus(2)
        .trace(trace.clone())
        .disk(DiskOptions::new(&path))
        .boot()?;
    read_all(&guest, &path)?;
    let server = server(&guest)?;
    let hostile = server.hostile();
    let live = hostile
        .offer(primary(&guest, "scsi0")?)
        .context("no offer")?;
    let devices = guest.sh("ls /sys/bus/vmbus/devices")?;

    let mut bad = Vec::new();
    // Numbers that no channel can have, and the number of another channel.
    for channel in [0, 2048, 0x8000_0000, u32::MAX] {
        bad.push(unknown_offer(channel, 1));
    }
    bad.push(live);
    bad.push(OfferChannel {
        channel_id: live.channel_id,
        ..unknown_offer(0, 2)
    });
    // A live device by another number, as another class, and as a sub-channel of another class.
    let again = OfferChannel {
        channel_id: ChannelId::new(1000),
        ..live
    };
    bad.push(again);
    bad.push(OfferChannel {
        interface_id: UNKNOWN,
        ..again
    });
    bad.push(OfferChannel {
        interface_id: UNKNOWN,
        sub_channel_index: 1.into(),
        ..again
    });
    // A sub-channel of nothing, nothing at all, and memory that is more confidential than its ring.
    bad.push(OfferChannel {
        sub_channel_index: 3.into(),
        ..unknown_offer(1001, 3)
    });
    bad.push(OfferChannel {
        interface_id: Guid::ZERO,
        ..unknown_offer(1002, 4)
    });
    bad.push(OfferChannel {
        channel_flags: OfferFlags::CONFIDENTIAL_EXTERNAL_MEMORY.bits().into(),
        ..unknown_offer(1003, 5)
    });
    for offer in &bad {
        ensure!(hostile.send(offer), "no connection");
    }
    wait_for_count(&guest, "refused_offers", bad.len() as u64)?;
    ensure!(
        guest.sh("ls /sys/bus/vmbus/devices")? == devices,
        "the guest has other devices now"
    );

    // What is good goes on: a device that no driver knows comes and goes.
    let path_of = |n| format!("/sys/bus/vmbus/devices/{}", instance(n));
    ensure!(hostile.send(&unknown_offer(1000, 9)), "no connection");
    guest.wait_for(&format!("test -e {}", path_of(9)))?;
    ensure!(
        guest.sh(&format!(
            "cat {}/state; cat {}/device",
            path_of(9),
            path_of(9)
        ))? == "0\n0x10",
        "state and device of a device without driver"
    );
    ensure!(rescind(&hostile, 1000), "no connection");
    guest.wait_for(&format!("! test -e {}", path_of(9)))?;
    // A second rescind, and one of what never was.
    for channel in [1000, 1500, 0, 5000] {
        ensure!(rescind(&hostile, channel), "no connection");
    }
    wait_for_count(&guest, "unknown_rescinds", 4)?;

    read_all(&guest, &path)?;
    let log = guest.sh("dmesg")?;
    for reason in [
        "channel id is out of bounds",
        "instance exists with another class",
    ] {
        ensure!(log.contains(reason), "the log does not say: {reason}");
    }
    guest.check_log(&["offer of channel", "rescind of channel", "suppressed"])?;
    guest.power_off()?;
    // Each number that the guest did not take is the host's again.
    let trace = std::fs::read_to_string(&trace)?;
    for channel in [1000, 1001, 1002, 1003] {
        let released = trace.lines().any(|line| {
            line.contains("\"RELID_RELEASED\"") && line.contains(&format!("\"channel\":{channel},"))
        });
        ensure!(released, "the guest keeps channel {channel}");
    }
    Ok(())
}

fn ignores_messages_that_make_no_sense(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("a.raw", 2 * MIB, 3)?;
    let guest = Guest::with(drivers)
        .cpus(2)
        .disk(DiskOptions::new(&path))
        .boot()?;
    read_all(&guest, &path)?;
    let id = primary(&guest, "scsi0")?;
    let hostile = server(&guest)?.hostile();
    let send = |bytes: &[u8]| -> Result<()> {
        // The queue of the interrupt controller is short.
        let deadline = Instant::now() + COMMAND;
        while let Err(error) = hostile.send_bytes(bytes) {
            ensure!(Instant::now() < deadline, "{error}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };

    // Too short, unknown, cut off, a message that only guests send, and a long one full of ones.
    let mut invalid = 0;
    let mut offer = unknown_offer(1000, 1).encode().as_bytes().to_vec();
    offer.truncate(40);
    let open = [5u8, 0, 0, 0].iter().chain([0; 100].iter()).copied();
    let junk: [&[u8]; 6] = [
        &[],
        &[1],
        &[99, 0, 0, 0, 0, 0, 0, 0],
        &offer,
        &open.collect::<Vec<_>>(),
        &[0xff; 240],
    ];
    for round in 0..300 {
        send(junk[round % junk.len()])?;
        invalid += 1;
    }

    // Answers to no question.
    let answers = [
        OpenChannelResult {
            channel_id: id,
            ..OpenChannelResult::new_zeroed()
        }
        .encode(),
        GpadlCreated {
            channel_id: id,
            gpadl_id: GpadlId::new(1),
            ..GpadlCreated::new_zeroed()
        }
        .encode(),
        GpadlTorndown {
            gpadl_id: GpadlId::new(1),
        }
        .encode(),
        ModifyChannelResponse {
            channel_id: id,
            ..ModifyChannelResponse::new_zeroed()
        }
        .encode(),
        VersionResponse::new_zeroed().encode(),
        UnloadResponse {}.encode(),
    ];
    for answer in &answers {
        ensure!(
            HostMessage::parse(answer, None).is_ok()
                || HostMessage::parse(answer, Some(hv_proto::version::Version::V5_3)).is_ok(),
            "not a message: {answer:?}"
        );
        send(answer)?;
    }

    // Events of channels that are not there.
    for flag in [0, 1, 63, 64, 1999, 2047] {
        hostile.interrupt(VpIndex::new(0), flag)?;
        hostile.interrupt(VpIndex::new(1), flag)?;
    }

    let deadline = Instant::now() + COMMAND;
    loop {
        let counts = mistakes(&guest)?;
        let seen = counts["invalid_messages"] + counts["unexpected_messages"];
        if seen == invalid + answers.len() as u64 {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "of {invalid} messages and {} answers the guest counted {counts:?}",
            answers.len()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    read_all(&guest, &path)?;
    // All of that has left no more than a few lines.
    let lines: usize = guest.sh("dmesg | grep -c vmbus_drv: || true")?.parse()?;
    ensure!(lines < 100, "{lines} lines in the log");
    guest.check_log(&["vmbus_drv:"])?;
    // The bus still unloads and loads.
    guest.sh("rmmod storvsc && rmmod vmbus_drv && modprobe storvsc")?;
    read_all(&guest, &path)?;
    guest.power_off()
}

fn bad_rings_are_opened_anew(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let kept = images.random("kept.raw", 2 * MIB, 1)?;
    // One controller for each.
    const DAMAGES: [(u8, Direction, Field, u32); 3] = [
        (1, Direction::ToGuest, Field::WriteIndex, 0xffff_fff8),
        (2, Direction::ToGuest, Field::WriteIndex, 13),
        (3, Direction::ToHost, Field::ReadIndex, 0x7fff_fff0),
    ];
    const ROUNDS: u32 = 3;
    let mut builder = Guest::with(drivers).disk(DiskOptions::new(&kept));
    for (controller, ..) in DAMAGES {
        let mut disk = DiskOptions::new(images.random(&format!("{controller}.raw"), 2 * MIB, 2)?);
        disk.controller = controller;
        builder = builder.disk(disk);
    }
    let guest = builder.boot()?;
    read_all(&guest, &kept)?;
    let mut names = Vec::new();
    for (controller, ring, field, value) in DAMAGES {
        let name = guest.disk(controller, 0)?;
        let id = primary(&guest, &format!("scsi{controller}"))?;
        guest.sh("dmesg -c > /dev/null")?;
        // That is noticed with the index or with the next request, and heals, however soon it comes again.
        for round in 1..=ROUNDS {
            ensure!(
                server(&guest)?.hostile().store(id, ring, field, value),
                "the channel is not open"
            );
            let sum = guest.sh(&format!(
                "dd if=/dev/{name} bs=16k iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1"
            ))?;
            ensure!(
                sum == sha256(&images.path(&format!("{controller}.raw")))?,
                "round {round}: the disk reads something else"
            );
            guest.wait_for(&format!(
                "test $(dmesg | grep -c 'the channels were opened anew') = {round}"
            ))?;
        }
        let log = guest.sh("dmesg")?;
        ensure!(
            log.contains("bad ring write index") || log.contains("damaged the ring"),
            "the log says nothing of the ring:\n{log}"
        );
        let counters = guest.sh(&format!(
            "test -d /sys/kernel/debug/vmbus_drv || mount -t debugfs none /sys/kernel/debug
             grep '^channel {} ' /sys/kernel/debug/vmbus_drv/counters",
            id.get()
        ))?;
        ensure!(
            counters.ends_with(&format!("corrupt {ROUNDS}")),
            "{counters}"
        );
        read_all(&guest, &kept)?;
        names.push(name);
        let mut expected = vec!["tag#", "[sd", "sd ", "ring", "storvsc", "suppressed"];
        expected.extend(names.iter().map(String::as_str));
        guest.check_log(&expected)?;
    }
    guest.power_off()
}

/// Opens channels and never says a word.
struct Silent {
    open: Option<HostChannel>,
}

impl Vsp for Silent {
    fn open(&mut self, channel: HostChannel, _: OpenParams) -> Result<(), OpenError> {
        self.open = Some(channel);
        Ok(())
    }

    fn close(&mut self, _: u16) {
        self.open = None;
    }
}

fn survives_rapid_offers_and_rescinds(drivers: Drivers) -> Result<()> {
    const ROUNDS: u32 = 200;
    let images = Images::new()?;
    let path = images.random("a.raw", 2 * MIB, 3)?;
    let guest = Guest::with(drivers)
        .cpus(4)
        .disk(DiskOptions::new(&path))
        .boot()?;
    read_all(&guest, &path)?;
    let server = server(&guest)?;
    for round in 0..ROUNDS {
        // Every fourth device is one that a driver probes, and waits for an answer of.
        let class = if round % 4 == 0 { guid::SCSI } else { UNKNOWN };
        let params = OfferParams::new("brief", class, instance((round % 8) as u8));
        let device = server.offer(params, Box::new(Silent { open: None }))?;
        if round % 3 == 0 {
            std::thread::sleep(Duration::from_millis(u64::from(round % 7) * 10));
        }
        // Without a wait: the next one may have the same instance.
        device.rescind();
    }
    let deadline = Instant::now() + COMMAND;
    loop {
        let status = server.status();
        if status.channels.iter().all(|c| c.name != "brief") {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "the guest does not let go: {:?}",
            status.channels
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    for n in 0..8 {
        guest.wait_for(&format!("! test -e /sys/bus/vmbus/devices/{}", instance(n)))?;
    }
    read_all(&guest, &path)?;
    // A probe that is interrupted says so.
    guest.check_log(&["storvsc", "vmbus"])?;
    guest.power_off()
}

fn binds_unknown_devices_by_new_id(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("a.raw", 2 * MIB, 3)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    read_all(&guest, &path)?;
    let server = server(&guest)?;
    let driver = format!("/sys/bus/vmbus/drivers/{}", drivers.storage_module());
    let offer = |n: u8| {
        server.offer(
            OfferParams::new("mystery", UNKNOWN, instance(n)),
            Box::new(Silent { open: None }),
        )
    };
    let opened = |wanted: bool| -> Result<()> {
        let deadline = Instant::now() + COMMAND;
        loop {
            let status = server.status();
            let mystery = status.channels.iter().find(|c| c.name == "mystery");
            if mystery.is_some_and(|c| (c.counters.opens > 0) == wanted) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "open is not {wanted}: {:?}",
                status.channels
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let device = offer(1)?;
    let path_of = |n| format!("/sys/bus/vmbus/devices/{}", instance(n));
    guest.wait_for(&format!("test -e {}", path_of(1)))?;
    let alias = "vmbus:0c4ab37a0e1dd64f9a5302f5c3a7e001";
    ensure!(
        guest.sh(&format!("cat {}/modalias", path_of(1)))? == alias,
        "modalias"
    );
    ensure!(
        guest
            .sh(&format!("cat {}/uevent", path_of(1)))?
            .lines()
            .any(|line| line == format!("MODALIAS={alias}")),
        "uevent"
    );
    guest.sh(&format!("! test -e {}/driver", path_of(1)))?;
    opened(false)?;

    // Nonsense, and twice the same, are errors.
    for text in ["nonsense", "", "7ab34a0c-1d0e-4fd6-9a53"] {
        let output = guest.run(&format!("echo '{text}' > {driver}/new_id"))?;
        ensure!(output.status != 0, "new_id takes '{text}'");
    }
    // The driver probes the device, which never answers; the probe ends when the device goes.
    let id = UNKNOWN.to_string();
    let binding = guest.spawn(&format!("echo {id} > {driver}/new_id"))?;
    opened(true)?;
    ensure!(
        device.rescind_and_wait(Duration::from_secs(60)),
        "the guest does not let go"
    );
    binding.wait(COMMAND)?;
    guest.wait_for(&format!("! test -e {}", path_of(1)))?;
    let output = guest.run(&format!("echo {id} > {driver}/new_id"))?;
    ensure!(output.status != 0, "new_id takes an id twice");

    // The next one of the class is probed by itself, until the class is taken back.
    let device = offer(2)?;
    opened(true)?;
    ensure!(
        device.rescind_and_wait(Duration::from_secs(60)),
        "the guest does not let go"
    );
    guest.sh(&format!("echo {id} > {driver}/remove_id"))?;
    let device = offer(3)?;
    guest.wait_for(&format!("test -e {}", path_of(3)))?;
    guest.sh(&format!("! test -e {}/driver", path_of(3)))?;

    // A device that an administrator gives to one driver is that driver's only.
    guest.sh(&format!("echo nobody > {}/driver_override", path_of(3)))?;
    let bind = format!("echo {} > {driver}/bind", instance(3));
    ensure!(
        guest.run(&bind)?.status != 0,
        "bound against driver_override"
    );
    guest.sh(&format!(
        "echo {} > {}/driver_override",
        drivers.storage_module(),
        path_of(3)
    ))?;
    let binding = guest.spawn(&bind)?;
    opened(true)?;
    ensure!(
        device.rescind_and_wait(Duration::from_secs(60)),
        "the guest does not let go"
    );
    binding.wait(COMMAND)?;
    read_all(&guest, &path)?;

    // The alias of a device finds its driver; it may find the other one too, which then refuses.
    let module = drivers.storage_module();
    let alias = format!("{}/modalias", guest.controller("scsi0")?);
    guest.sh(&format!(
        "rmmod {module} && ! grep -q '^{module} ' /proc/modules"
    ))?;
    guest.run(&format!("modprobe $(cat {alias})"))?;
    guest.sh(&format!("grep -q '^{module} ' /proc/modules"))?;
    read_all(&guest, &path)?;
    guest.check_log(&["storvsc", "vmbus"])?;
    guest.power_off()
}
