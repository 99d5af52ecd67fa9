// SPDX-License-Identifier: MIT OR Apache-2.0

//! The guest's end: reads requests, runs commands, reports what they print.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::{Event, Request};

/// How many pieces of output wait for the port: beyond that a command waits. The host always reads, whatever it does
/// besides, so a full queue gets empty.
const QUEUE: usize = 64;

type Groups = Arc<Mutex<HashMap<u64, Pid>>>;

/// Serve requests from `input` until it ends, events go to `output`.
///
/// # Errors
///
/// An I/O error of `input`. A line that is not a request is answered on standard error of the agent and skipped.
pub fn serve(input: impl Read, mut output: impl Write + Send + 'static) -> io::Result<()> {
    let (events, to_write) = mpsc::sync_channel::<Event>(QUEUE);
    thread::spawn(move || {
        for event in to_write {
            let mut line = serde_json::to_vec(&event).unwrap_or_default();
            line.push(b'\n');
            if output
                .write_all(&line)
                .and_then(|()| output.flush())
                .is_err()
            {
                return;
            }
        }
    });
    let groups = Groups::default();
    let mut input = BufReader::new(input);
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        match serde_json::from_slice(&line) {
            Ok(Request::Hello) => _ = events.send(Event::Ready),
            Ok(Request::Run { id, command }) => run(id, &command, &events, &groups),
            Ok(Request::Kill { id }) => {
                let group = groups
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get(&id)
                    .copied();
                if let Some(group) = group {
                    // The group may have ended just now: then there is nothing left to kill.
                    _ = kill_process_group(group, Signal::KILL);
                }
            }
            Err(error) => eprintln!("guest-agent: not a request: {error}"),
        }
    }
}

fn run(id: u64, command: &str, events: &SyncSender<Event>, groups: &Groups) {
    let child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    match child {
        Ok(child) => {
            groups
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(id, Pid::from_child(&child));
            let (events, groups) = (events.clone(), groups.clone());
            thread::spawn(move || attend(id, child, &events, &groups));
        }
        Err(error) => {
            let text = format!("guest-agent: cannot start /bin/sh: {error}\n");
            _ = events.send(Event::Stderr { id, text });
            _ = events.send(Event::Exit { id, status: 127 });
        }
    }
}

/// Forwards a command's output and reports its end.
fn attend(id: u64, mut child: Child, events: &SyncSender<Event>, groups: &Groups) {
    let status = match io::pipe() {
        Ok((ended, end)) => thread::scope(|scope| {
            let ended = &ended;
            if let Some(stdout) = child.stdout.take() {
                let event = move |text| Event::Stdout { id, text };
                scope.spawn(move || forward(stdout, ended, events, event));
            }
            if let Some(stderr) = child.stderr.take() {
                let event = move |text| Event::Stderr { id, text };
                scope.spawn(move || forward(stderr, ended, events, event));
            }
            let status = child.wait();
            drop(end);
            status
        }),
        Err(error) => Err(error),
    };
    let status = status.map_or(127, |status| {
        status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    });
    groups
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .remove(&id);
    _ = events.send(Event::Exit { id, status });
}

/// The most that a command can have left in a pipe.
const PIPE_SIZE: usize = 1 << 16;

/// Forwards what comes out of `pipe` until that is closed; or, when a background process holds it, until all has been
/// read that was in it when the command ended: when the other end of `ended` was closed.
fn forward(
    mut pipe: impl Read + AsFd,
    ended: &PipeReader,
    events: &SyncSender<Event>,
    event: impl Fn(String) -> Event,
) {
    let mut buffer = [0; 4096];
    let mut pending = Vec::new();
    let mut left = PIPE_SIZE;
    while left > 0 {
        let (has_data, has_ended) = {
            let mut fds = [
                PollFd::new(&pipe, PollFlags::IN),
                PollFd::new(ended, PollFlags::empty()),
            ];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
        };
        if !has_data {
            break;
        }
        let count = match pipe.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        if has_ended {
            left = left.saturating_sub(count);
        }
        pending.extend_from_slice(&buffer[..count]);
        let text = take_text(&mut pending);
        if !text.is_empty() && events.send(event(text)).is_err() {
            return;
        }
    }
    if !pending.is_empty() {
        _ = events.send(event(String::from_utf8_lossy(&pending).into_owned()));
    }
}

/// Takes all whole characters out of `bytes`; a character cut at the end stays for the next piece.
fn take_text(bytes: &mut Vec<u8>) -> String {
    let cut = match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        Err(error) => {
            // Broken bytes are replaced; only a tail that can still become a character waits.
            let tail = bytes[error.valid_up_to()..].len().min(3);
            let from = bytes.len() - tail;
            (from..bytes.len())
                .find(|&at| matches!(std::str::from_utf8(&bytes[at..]), Err(e) if e.valid_up_to() == 0 && e.error_len().is_none()))
                .unwrap_or(bytes.len())
        }
        Ok(_) => bytes.len(),
    };
    let rest = bytes.split_off(cut);
    let text = String::from_utf8_lossy(bytes).into_owned();
    *bytes = rest;
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_waits_for_a_character_that_is_cut() {
        let mut bytes = "aé".as_bytes()[..2].to_vec();
        assert_eq!(take_text(&mut bytes), "a");
        bytes.push(0xa9);
        assert_eq!(take_text(&mut bytes), "é");
        assert!(bytes.is_empty());
    }

    #[test]
    fn broken_bytes_are_replaced_and_a_cut_tail_still_waits() {
        let mut bytes = b"\xffab\xe2\x82".to_vec();
        assert_eq!(take_text(&mut bytes), "\u{fffd}ab");
        assert_eq!(bytes, b"\xe2\x82");
    }
}
