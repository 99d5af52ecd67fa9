// SPDX-License-Identifier: MIT OR Apache-2.0

//! Kernels of both forms, loading and unloading, kexec, crash.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use host_harness::disk::DiskOptions;
use host_harness::vm::ExitReason;
use viridian_tests::guest::COMMAND;
use viridian_tests::manifest::Manifest;
use viridian_tests::{Drivers, Guest, both_drivers, our_drivers};

use crate::images::{Images, MIB, sha256};

both_drivers!(reloads_twenty_times_and_crashes, kexec_finds_the_disk_again);

// For what the C drivers do see `bus::rescind_under_io_ends_it`.
our_drivers!(controller_goes_and_comes_under_io);

/// The other form of a kernel than the bzImage that all other guests boot.
#[test]
fn an_elf_kernel_boots() -> Result<()> {
    let images = Images::new()?;
    let manifest = Manifest::load()?;
    let output = Command::new("sh")
        .arg(&manifest.extract_vmlinux)
        .arg(&manifest.kernel)
        .output()?;
    ensure!(output.stdout.starts_with(b"\x7fELF"), "{output:?}");
    let kernel = images.path("vmlinux");
    std::fs::write(&kernel, output.stdout)?;
    let guest = Guest::with(Drivers::Rust)
        .kernel(kernel)
        .disk(DiskOptions::new(images.blank("a.raw", MIB)?))
        .boot()?;
    guest.disk(0, 0)?;
    ensure!(guest.sh("uname -r")? == manifest.kernel_release);
    guest.check_log(&[])?;
    guest.power_off()
}

/// The crash comes last: what a driver leaves behind when it goes would be found by the crash's notifiers.
fn reloads_twenty_times_and_crashes(drivers: Drivers) -> Result<()> {
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
    let _ends = guest.spawn("echo c > /proc/sysrq-trigger")?;
    match guest.end()? {
        ExitReason::Crash(_) => Ok(()),
        other => anyhow::bail!("the host saw {other:?}"),
    }
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
    let want = sha256(&manifest.initramfs)?;
    let guest = Guest::with(drivers)
        .cpus(2)
        .disk(DiskOptions::new(&files))
        .tools()
        .boot()?;
    // Twice: the second time it is a kernel that was itself started so.
    let mut boots = vec![guest.sh("cat /proc/sys/kernel/random/boot_id")?];
    for _ in 0..2 {
        let disk = guest.disk(0, 0)?;
        guest.tool(&format!("mount /dev/{disk} /mnt && kexec -s -l /mnt/vmlinuz --initrd=/mnt/initramfs --reuse-cmdline && umount /mnt"))?;
        guest.kexec()?;
        let boot = guest.sh("cat /proc/sys/kernel/random/boot_id")?;
        ensure!(!boots.contains(&boot), "it is a kernel from before");
        boots.push(boot);
        let disk = guest.disk(0, 0)?;
        let sum = guest.sh(&format!("mkdir -p /mnt && mount -t ext4 -o ro /dev/{disk} /mnt && sha256sum < /mnt/initramfs && umount /mnt"))?;
        ensure!(
            sum.starts_with(&want),
            "the new kernel reads something else"
        );
        guest.check_log(&[])?;
    }
    guest.power_off()
}

fn controller_goes_and_comes_under_io(drivers: Drivers) -> Result<()> {
    let images = Images::new()?;
    let kept = images.random("kept.raw", 2 * MIB, 1)?;
    let path = images.random("gone.raw", 4 * MIB, 2)?;
    let mut options = DiskOptions::new(&path);
    options.controller = 1;
    let guest = Guest::with(drivers)
        .cpus(2)
        .disk(DiskOptions::new(&kept))
        .boot()?;
    let storage = guest.host().storage();
    for round in 0..6 {
        let want = sha256(&path)?;
        storage.add_disk(&options)?;
        let name = guest.disk(1, 0)?;
        let device = guest.controller("scsi1")?;
        let sum = guest.sh(&format!("sha256sum < /dev/{name} | cut -d' ' -f1"))?;
        ensure!(sum == want, "round {round}: the guest read something else");
        let workers: Vec<_> = (0..4)
            .map(|n| {
                let work = if n % 2 == 0 {
                    format!("if=/dev/{name} of=/dev/null bs=16k iflag=direct")
                } else {
                    format!("if=/dev/zero of=/dev/{name} bs=4k seek={n} count=1 oflag=direct")
                };
                // Once the disk has gone, dd may leave a file in its place.
                guest.spawn(&format!(
                    "while test -b /dev/{name} && dd {work} 2>/dev/null; do :; done"
                ))
            })
            .collect::<Result<_>>()?;
        // In every other round the commands are with a host that is slow.
        if round % 2 == 1 {
            let disk = storage
                .disks()
                .into_iter()
                .find(|disk| disk.controller == "scsi1");
            let disk = disk.context("no disk")?;
            storage.set_latency(&disk.name, Duration::from_millis(500))?;
        }
        std::thread::sleep(Duration::from_millis(300));
        storage.remove_controller("scsi1")?;
        for worker in workers {
            worker.wait(COMMAND)?;
        }
        guest.wait_for(&format!("! test -e {device}"))?;
        guest.sh(&format!("rm -f /dev/{name}"))?;
    }
    guest.check_log(&["tag#", "[sd", "sd ", "suppressed"])?;
    guest.power_off()
}
