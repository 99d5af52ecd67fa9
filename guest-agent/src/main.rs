// SPDX-License-Identifier: MIT OR Apache-2.0

//! `guest-agent TTY`: serve the host's commands on a serial port.

use std::fs::OpenOptions;
use std::process::ExitCode;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(tty), None) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: guest-agent TTY (such as /dev/ttyS1)");
        return ExitCode::from(2);
    };
    match serve(&tty) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(tty: &str) -> Result<()> {
    let input = OpenOptions::new()
        .read(true)
        .write(true)
        .open(tty)
        .with_context(|| format!("cannot open {tty}"))?;
    let mut modes = tcgetattr(&input).with_context(|| format!("{tty} is not a terminal"))?;
    modes.make_raw();
    tcsetattr(&input, OptionalActions::Now, &modes)
        .with_context(|| format!("cannot set {tty} to raw mode"))?;
    let output = input
        .try_clone()
        .with_context(|| format!("cannot open {tty} twice"))?;
    guest_agent::serve(input, output).with_context(|| format!("cannot read {tty}"))
}
