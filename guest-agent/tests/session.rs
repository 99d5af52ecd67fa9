// SPDX-License-Identifier: MIT OR Apache-2.0

//! Client and agent against each other over a socket pair, with real commands.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use guest_agent::{AgentError, Client, Event, Request, serve};

const SOON: Duration = Duration::from_secs(20);

fn session() -> Client {
    let (host, guest) = UnixStream::pair().expect("socket pair");
    let output = guest.try_clone().expect("clone");
    thread::spawn(move || serve(guest, output));
    let client = Client::new(host).expect("client");
    client.wait_ready(SOON).expect("ready");
    client
}

#[test]
fn output_and_status_arrive_apart() {
    let output = session()
        .run("echo out; echo err >&2; exit 7", SOON)
        .expect("run");
    assert_eq!(
        (
            output.status,
            output.stdout.as_str(),
            output.stderr.as_str()
        ),
        (7, "out\n", "err\n")
    );
}

#[test]
fn commands_overlap() {
    let client = session();
    let slow = client.spawn("while :; do sleep 0.05; done").expect("spawn");
    assert_eq!(
        client.run("echo quick", SOON).expect("run").stdout,
        "quick\n"
    );
    slow.kill().expect("kill");
    assert_eq!(slow.wait(SOON).expect("wait").status, 128 + 9);
}

#[test]
fn large_output_is_whole() {
    let output = session().run("seq 1 20000", SOON).expect("run");
    let expected: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert!(
        output.stdout == expected,
        "got {} bytes of {}",
        output.stdout.len(),
        expected.len()
    );
}

#[test]
fn a_command_waits_for_a_host_that_does_not_read() {
    let (mut host, guest) = UnixStream::pair().expect("socket pair");
    let output = guest.try_clone().expect("clone");
    thread::spawn(move || serve(guest, output));
    let ended = std::env::temp_dir().join(format!("guest-agent-ended-{}", std::process::id()));
    let request = Request::Run {
        id: 1,
        command: format!(
            "head -c 4194304 /dev/zero | tr '\\0' x; touch {}",
            ended.display()
        ),
    };
    let line = serde_json::to_string(&request).expect("JSON");
    writeln!(host, "{line}").expect("write");
    thread::sleep(Duration::from_secs(1));
    let early = ended.exists();
    let mut printed = 0;
    for line in BufReader::new(host).lines() {
        match serde_json::from_str(&line.expect("read")).expect("event") {
            Event::Stdout { text, .. } => printed += text.len(),
            Event::Exit { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    std::fs::remove_file(&ended).expect("it has ended");
    assert_eq!((early, printed), (false, 4_194_304));
}

#[test]
fn events_can_be_taken_one_by_one() {
    let client = session();
    let mut running = client
        .spawn("echo a; echo b >&2; sleep 0.5; exit 5")
        .expect("spawn");
    let mut seen = Vec::new();
    let mut waited = false;
    loop {
        match running
            .next_event(Duration::from_millis(50))
            .expect("event")
        {
            Some(Event::Exit { status, .. }) => break assert_eq!(status, 5),
            Some(Event::Stdout { text, .. } | Event::Stderr { text, .. }) => seen.push(text),
            Some(Event::Ready) => {}
            None => waited = true,
        }
    }
    seen.sort();
    assert_eq!((seen.concat().as_str(), waited), ("a\nb\n", true));
    assert!(matches!(
        running.next_event(SOON),
        Err(AgentError::Closed(_))
    ));
}

#[test]
fn a_background_process_does_not_hold_the_end_back() {
    let output = session()
        .run("sleep 300 & echo started", SOON)
        .expect("run");
    assert_eq!((output.status, output.stdout.as_str()), (0, "started\n"));
    // Whether it is silent or not, what the command has printed is whole.
    for background in ["sleep 5", "timeout 5 yes"] {
        let command = format!("seq 1 9000; {background} &");
        let output = session().run(&command, SOON).expect("run");
        let expected: String = (1..=9000).map(|n| format!("{n}\n")).collect();
        assert_eq!(output.status, 0);
        assert!(output.stdout.starts_with(&expected), "{background}");
    }
}

#[test]
fn a_command_that_takes_too_long_is_killed_and_named() {
    let client = session();
    let error = client
        .run("echo begun; sleep 300", Duration::from_secs(2))
        .expect_err("timeout");
    match error {
        AgentError::Timeout {
            command, output, ..
        } => {
            assert!(command.contains("sleep 300"));
            assert_eq!(output.stdout, "begun\n");
        }
        other => panic!("{other}"),
    }
    assert_eq!(
        client.run("echo alive", SOON).expect("run").stdout,
        "alive\n"
    );
}

#[test]
fn noise_before_and_between_lines_is_skipped() {
    let (host, guest) = UnixStream::pair().expect("socket pair");
    let mut noisy = guest.try_clone().expect("clone");
    std::io::Write::write_all(&mut noisy, b"\0\xffSeaBIOS\n{}\n").expect("noise");
    thread::spawn(move || serve(guest, noisy));
    let client = Client::new(host).expect("client");
    client.wait_ready(SOON).expect("ready");
    assert_eq!(client.run("true", SOON).expect("run").status, 0);
}

#[test]
fn the_guests_end_is_an_error_not_a_hang() {
    let (host, guest) = UnixStream::pair().expect("socket pair");
    let client = Client::new(host).expect("client");
    let running = client.spawn("true").expect("spawn");
    drop(guest);
    assert!(matches!(running.wait(SOON), Err(AgentError::Closed(_))));
}

#[test]
fn a_restart_ends_what_runs_and_greets_again() {
    let client = session();
    let running = client.spawn("sleep 300").expect("spawn");
    client.expect_restart();
    assert!(matches!(running.wait(SOON), Err(AgentError::Closed(_))));
    client.wait_ready(SOON).expect("ready again");
    assert_eq!(client.run("echo anew", SOON).expect("run").stdout, "anew\n");
}
