// SPDX-License-Identifier: MIT OR Apache-2.0

//! A whole Debian, from its root disk.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use viridian_tests::guest::COMMAND;
use viridian_tests::{Drivers, Guest, both_drivers};

both_drivers!(boots_to_its_login_prompt);

fn boots_to_its_login_prompt(drivers: Drivers) -> Result<()> {
    let guest = Guest::with(drivers).debian().boot()?;
    ensure!(
        guest.wait_for("systemctl is-system-running --wait")? == "running",
        "systemd"
    );
    guest.wait_for("systemctl is-active serial-getty@ttyS0")?;
    let deadline = Instant::now() + COMMAND;
    while !guest.console().contains("login: ") {
        ensure!(
            Instant::now() < deadline,
            "no login prompt on the console:\n{}",
            guest.console()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    let root = guest.sh("findmnt -n -o SOURCE,FSTYPE /")?;
    ensure!(
        root.starts_with("/dev/sd") && root.ends_with("ext4"),
        "the root file system is {root}"
    );
    ensure!(guest.sh("lsscsi")?.contains("Msft"), "lsscsi");
    ensure!(
        guest.sh("systemd-detect-virt")? == "microsoft",
        "systemd-detect-virt"
    );
    guest.check_log(&[])?;
    let _ends = guest.spawn("systemctl poweroff")?;
    guest.ends_with(host_harness::vm::ExitReason::PowerOff)
}
