// SPDX-License-Identifier: MIT OR Apache-2.0

//! Loading and unloading, kexec, crash.

use anyhow::{Result, ensure};
use host_harness::disk::DiskOptions;
use host_harness::vm::ExitReason;
use viridian_tests::manifest::Manifest;
use viridian_tests::{Drivers, Guest, both_drivers};

use crate::images::{Images, MIB, sha256};

both_drivers!(
    reloads_twenty_times,
    kexec_finds_the_disk_again,
    a_crash_is_reported
);

fn reloads_twenty_times(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let path = images.random("a.raw", 2 * MIB, 1)?;
    let guest = Guest::with(drivers).disk(DiskOptions::new(&path)).boot()?;
    let want = sha256(&path)?;
    // The kernel's C bus driver is built in and stays.
    let modules: &[&str] = match drivers {
        Drivers::C => &["hv_storvsc"],
        Drivers::Rust => &["storvsc", "vmbus_drv"],
    };
    for round in 0..20 {
        let disk = guest.disk(0, 0)?;
        let sum = guest.sh(&format!("sha256sum < /dev/{disk} | cut -d' ' -f1"))?;
        ensure!(sum == want, "round {round}: the guest read something else");
        for module in modules {
            guest.sh(&format!("rmmod {module}"))?;
        }
        guest.sh(&format!("! test -e /sys/block/{disk}"))?;
        for module in modules.iter().rev() {
            guest.sh(&format!("modprobe {module}"))?;
        }
    }
    guest.check_log(&[])?;
    guest.power_off()
}

fn kexec_finds_the_disk_again(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let manifest = Manifest::load()?;
    let files = images.ext4_with(
        "kernel.raw",
        160 * MIB,
        &[
            (&manifest.kernel, "vmlinuz"),
            (&manifest.initramfs, "initramfs"),
        ],
    )?;
    let guest = Guest::with(drivers)
        .disk(DiskOptions::new(&files))
        .tools()
        .boot()?;
    let disk = guest.disk(0, 0)?;
    let boot_id = guest.sh("cat /proc/sys/kernel/random/boot_id")?;
    guest.tool(&format!("mount /dev/{disk} /mnt && kexec -s -l /mnt/vmlinuz --initrd=/mnt/initramfs --reuse-cmdline && umount /mnt"))?;
    guest.kexec()?;
    ensure!(
        guest.sh("cat /proc/sys/kernel/random/boot_id")? != boot_id,
        "it is the same kernel"
    );
    let disk = guest.disk(0, 0)?;
    guest.sh(&format!("mount -t ext4 -o ro /dev/{disk} /mnt && cmp -n 1000000 /mnt/vmlinuz /mnt/vmlinuz && umount /mnt"))?;
    guest.check_log(&[])?;
    guest.power_off()
}

fn a_crash_is_reported(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let guest = Guest::with(drivers)
        .disk(DiskOptions::new(images.blank("a.raw", MIB)?))
        .boot()?;
    guest.disk(0, 0)?;
    let _ends = guest.spawn("echo c > /proc/sysrq-trigger")?;
    match guest.end()? {
        ExitReason::Crash(_) => Ok(()),
        other => anyhow::bail!("the host saw {other:?}"),
    }
}
