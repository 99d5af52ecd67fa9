// SPDX-License-Identifier: MIT OR Apache-2.0

//! The program `host-harness` with networks that cannot be: one line that says what is wrong, and exit status 2. It
//! needs no KVM, because networks are opened first.

use std::process::Command;

/// The one line that the program ends with, when it is run with this `--net`.
fn refusal(net: &str, path: Option<&str>) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_host-harness"));
    command.args(["run", "--kernel", "/nowhere", "--net", net]);
    if let Some(path) = path {
        command.env("PATH", path);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{net}: {text}");
    assert!(output.stdout.is_empty());
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 1, "{net}: {text}");
    assert!(lines[0].starts_with("host-harness: "), "{text}");
    lines[0].to_owned()
}

#[test]
fn bad_options() {
    for (net, part) in [
        ("nothing", "key=value expected"),
        ("mtu=1500", "tap=NAME or passt is missing"),
        ("tap=a,passt", "exclude each other"),
        ("tap=", "key=value expected"),
        ("passt,mtu=10", "a number from 576"),
        ("passt,mtu=70000", "a number from 576"),
        ("passt,queues=0", "a number from 1"),
        ("passt,mac=01:00:00:00:00:01", "an address of one station"),
        ("passt,mac=02:00:00:00:00", "an address of one station"),
        ("passt,link=maybe", "on or off"),
        ("passt,colour=red", "unknown key 'colour'"),
        ("passt,mtu=1500,mtu=1500", "given twice"),
        ("tap=a,tcp_ports=80", "go with passt only"),
    ] {
        let line = refusal(net, None);
        assert!(line.contains("--net") && line.contains(part), "{line}");
    }
}

#[test]
fn a_name_that_no_interface_has() {
    for name in ["a/b", "a name", "longer-than-a-name-can-be", "tap%d"] {
        let line = refusal(&format!("tap={name}"), None);
        assert!(line.contains(&format!("TAP {name}: not a name")), "{line}");
    }
}

#[test]
fn an_interface_that_is_no_tap() {
    // Where TAPs cannot be made at all, it is that which the line says.
    let line = refusal("tap=lo", None);
    assert!(line.contains("TAP lo: "), "{line}");
}

#[test]
fn a_missing_passt() {
    for net in ["passt", "passt=/nowhere/passt"] {
        let line = refusal(net, Some("/nowhere"));
        assert!(
            line.contains("cannot find the program")
                && line.contains("install the Debian package passt"),
            "{line}"
        );
    }
}

#[test]
fn a_passt_that_does_not_work() {
    let line = refusal("passt=/bin/false", None);
    assert!(line.contains("passt: it ended at once"), "{line}");
}

#[test]
fn a_capture_that_cannot_be_made() {
    let line = refusal("passt,pcap=/nowhere/file", None);
    assert!(line.contains("capture /nowhere/file: "), "{line}");
}
