// SPDX-License-Identifier: MIT OR Apache-2.0

//! Network adapters on TAPs of a bridge, in a network namespace of the test's own: NICs that come and go, and TAPs that
//! may not be opened.

use std::fs::Permissions;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use host_harness::net::NetOptions;
use viridian_tests::guest::COMMAND;
use viridian_tests::manifest::Manifest;
use viridian_tests::namespace::BRIDGE;
use viridian_tests::{Drivers, Guest, Namespace, both_drivers};

use crate::images::{Images, MIB};

both_drivers!(nics_come_and_go_under_traffic);

/// The NIC that a value of `--net` describes.
pub fn nic(options: &str) -> Result<NetOptions> {
    Ok(options.parse::<NetOptions>()?)
}

/// It is about the program, not about guests: it must say in one line why it ends, with status 2.
#[test]
fn a_tap_that_may_not_be_opened() -> Result<()> {
    let namespace = Namespace::new(1500)?;
    namespace.tap("t0", 1)?;
    namespace.tap("t1", 2)?;
    // As udev has it.
    std::fs::set_permissions("/dev/net/tun", Permissions::from_mode(0o666))?;
    // Where anybody can run it.
    let directory = Images::new()?;
    let program = directory.path("host-harness");
    std::fs::copy(Manifest::load()?.harness, &program)?;
    std::fs::set_permissions(directory.path(""), Permissions::from_mode(0o755))?;
    let refusal = |user: u32, net: &str| -> Result<String> {
        let mut command = Command::new(&program);
        command.args(["run", "--kernel", "/nowhere", "--net", net]);
        command.uid(user).gid(user).stdin(Stdio::null());
        let output = namespace.enter(|| Ok(command.output()?))?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(2) && text.lines().count() == 1,
            "{net}: {output:?}"
        );
        Ok(text.into_owned())
    };
    const ROOT: u32 = 0;
    const NOBODY: u32 = 65534;
    for (user, net, reason) in [
        (NOBODY, "tap=t0", "TAP t0: may not be opened; run as root"),
        (NOBODY, "tap=new", "TAP new: may not be opened; run as root"),
        (
            ROOT,
            "tap=t0,queues=2",
            "TAP t0: it has one queue; make it with",
        ),
        (ROOT, "tap=br0", "TAP br0: it is not a TAP"),
        // What it can open is opened, and then there is no kernel.
        (ROOT, "tap=t0", "/nowhere"),
        (ROOT, "tap=t1", "/nowhere"),
        (ROOT, "tap=t1,queues=2", "/nowhere"),
    ] {
        let line = refusal(user, net)?;
        ensure!(line.contains(reason), "{net}: {line}");
    }
    Ok(())
}

/// Our address on the bridge.
pub const HERE: &str = "10.77.0.1";

/// Gives an interface of the guest the addresses with this number, and opens it.
pub fn open(guest: &Guest, interface: &str, number: u8) -> Result<()> {
    guest.sh(&format!(
        "set -e; echo 0 > /proc/sys/net/ipv6/conf/{interface}/accept_dad
         ip address add 10.77.0.{number}/24 dev {interface}; ip address add fd77::{number}/64 dev {interface}
         ip link set {interface} up"
    ))?;
    guest.wait_for(&format!(
        "test $(cat /sys/class/net/{interface}/carrier) = 1"
    ))?;
    Ok(())
}

fn nics_come_and_go_under_traffic(drivers: Drivers) -> Result<()> {
    let namespace = Namespace::new(1500)?;
    namespace.sh(&format!("ip address add {HERE}/24 dev {BRIDGE}"))?;
    namespace.tap("t0", 1)?;
    let guest = Guest::with(drivers).cpus(2).boot()?;
    guest.load_network_driver()?;
    for round in 0..3 {
        let options = nic(&format!("tap=t0,id=hot{round}"))?;
        let name = namespace.enter(|| Ok(guest.host().network().add(&options)?))?;
        let eth = guest.interface(&name)?;
        open(&guest, &eth, 2)?;
        let listener = namespace.enter(|| Ok(TcpListener::bind((HERE, 0))?))?;
        let port = listener.local_addr()?.port();
        // Ends when nothing comes any more.
        std::thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(COMMAND))?;
            std::io::copy(&mut stream, &mut std::io::sink())?;
            Ok(())
        });
        let sender = guest.spawn(&format!("nc {HERE} {port} < /dev/zero"))?;
        guest.until("there is traffic", || {
            guest
                .nic(&name)
                .is_ok_and(|nic| nic.counters.sent_bytes > 2 * MIB)
        })?;
        if drivers == Drivers::C {
            // It did not let the adapter go under traffic: it waits for answers without a limit.
            guest.sh("killall nc")?;
            let quiet = || {
                let sent = || guest.nic(&name).map(|nic| nic.counters.sent);
                let before = sent();
                std::thread::sleep(std::time::Duration::from_secs(1));
                matches!((before, sent()), (Ok(a), Ok(b)) if a == b)
            };
            guest.until("the NIC is quiet", quiet)?;
        }
        guest.host().network().remove(&name)?;
        guest.wait_for(&format!("! test -e /sys/class/net/{eth}"))?;
        guest.sh("killall nc 2>/dev/null; true")?;
        sender.wait(COMMAND)?;
    }
    guest.check_log(&[])?;
    guest.power_off()
}
