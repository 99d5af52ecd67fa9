// SPDX-License-Identifier: MIT OR Apache-2.0

//! The program `host-harness` with options that cannot be: one line that says what is wrong, and exit status 2. It
//! needs no KVM, because nothing of this gets as far as a guest.

use std::process::Command;

/// The one line that the program ends with.
fn refusal(args: &[&str], log: Option<&str>) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_host-harness"));
    command.args(["run", "--kernel", "/nowhere"]).args(args);
    command.env_remove("RUST_LOG");
    if let Some(log) = log {
        command.env("RUST_LOG", log);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
    assert!(output.stdout.is_empty());
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 1, "{args:?}: {text}");
    assert!(lines[0].starts_with("host-harness: "), "{text}");
    lines[0].to_owned()
}

#[test]
fn what_to_log_is_understood_or_refused() {
    let line = refusal(&[], Some("host_harness=loud"));
    assert!(line.contains("RUST_LOG: "), "{line}");
}

#[test]
fn a_socket_of_the_api_that_cannot_be_is_found_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    std::fs::write(&path, "a file").unwrap();
    let line = refusal(&["--api", path.to_str().unwrap()], None);
    assert!(line.contains("api /") && line.contains("in use"), "{line}");
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    // One that can be goes again.
    let path = dir.path().join("other");
    let line = refusal(&["--api", path.to_str().unwrap()], None);
    assert!(line.contains("/nowhere") && !path.exists(), "{line}");
}
