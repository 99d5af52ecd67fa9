// SPDX-License-Identifier: MIT OR Apache-2.0

//! Commands in a guest, from the host, over a serial port.
//!
//! The agent runs in the guest on a serial port of its own; [`Client`] is the host's end of that port. Both speak
//! JSON lines, one [`Request`] or [`Event`] a line, so that a person with `socat` can speak it too. Several commands
//! may run at a time. Nothing here knows about Hyper-V: a guest whose VMBus drivers are broken still answers.

mod client;
mod server;

pub use client::{AgentError, Client, Output, Running};
pub use server::serve;

use serde::{Deserialize, Serialize};

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Ask whether the agent is there; it answers [`Event::Ready`]. Sent first, and again until the answer comes,
    /// because a serial port drops what is written before the guest has opened it.
    Hello,
    /// Run `command` with `/bin/sh -c`, standard input empty.
    Run {
        /// Chosen by the host; names the command in the events.
        id: u64,
        /// The shell command.
        command: String,
    },
    /// Send SIGKILL to the process group of a running command; its [`Event::Exit`] follows.
    Kill {
        /// The command's id.
        id: u64,
    },
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The answer to [`Request::Hello`].
    Ready,
    /// A piece of a command's standard output. Bytes that are not UTF-8 are replaced.
    Stdout {
        /// The command's id.
        id: u64,
        /// The text.
        text: String,
    },
    /// A piece of a command's standard error.
    Stderr {
        /// The command's id.
        id: u64,
        /// The text.
        text: String,
    },
    /// The command ended. No output of it follows.
    Exit {
        /// The command's id.
        id: u64,
        /// The exit status as a shell gives it: 128 + N after signal N, 127 when it could not be started.
        status: i32,
    },
}
