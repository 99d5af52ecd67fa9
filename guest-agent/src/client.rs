// SPDX-License-Identifier: MIT OR Apache-2.0

//! The host's end: a client that runs commands and collects what they print.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Event, Request};

/// How often the greeting is repeated until the agent answers.
const HELLO_INTERVAL: Duration = Duration::from_millis(250);

/// Why a command in the guest gave no exit status.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent did not answer in time: the guest did not come up, or hangs.
    #[error("no answer from the guest's agent within {0:?}")]
    NotReady(Duration),
    /// The command did not end in time; it was told to stop.
    #[error("the guest's command did not end within {timeout:?}: {command}\n{output}")]
    Timeout {
        /// The command.
        command: String,
        /// How long it was given.
        timeout: Duration,
        /// What it had printed.
        output: Output,
    },
    /// The serial port closed: the guest ended.
    #[error("the guest ended while its agent was asked to run: {0}")]
    Closed(String),
    /// The port could not be written.
    #[error("cannot write to the guest's agent: {0}")]
    Io(#[from] io::Error),
}

/// What a command printed and how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// The exit status as a shell gives it.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "status {}\n--- stdout\n{}\n--- stderr\n{}",
            self.status, self.stdout, self.stderr
        )
    }
}

#[derive(Default)]
struct Routes {
    /// `None` once the port has closed.
    commands: Option<HashMap<u64, Sender<Event>>>,
    ready: bool,
    next_id: u64,
}

/// A connection to the agent of one guest. Cheap to clone; commands of several threads may overlap.
#[derive(Clone)]
pub struct Client {
    writer: Arc<Mutex<UnixStream>>,
    routes: Arc<Mutex<Routes>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    /// Speak to the agent on the other end of `stream`, which is the guest's serial port.
    ///
    /// # Errors
    ///
    /// [`AgentError::Io`] when the stream cannot be duplicated.
    pub fn new(stream: UnixStream) -> Result<Self, AgentError> {
        let reader = stream.try_clone()?;
        let routes = Arc::new(Mutex::new(Routes {
            commands: Some(HashMap::new()),
            ..Routes::default()
        }));
        let dispatch = routes.clone();
        thread::spawn(move || {
            for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
                // What is no event is the noise of a serial port that comes up.
                if let Ok(event) = serde_json::from_slice::<Event>(&line) {
                    route(&mut locked(&dispatch), event);
                }
            }
            locked(&dispatch).commands = None;
        });
        Ok(Self {
            writer: Arc::new(Mutex::new(stream)),
            routes,
        })
    }

    /// Wait until the guest's agent answers.
    ///
    /// # Errors
    ///
    /// [`AgentError::NotReady`] after `timeout`, [`AgentError::Closed`] when the guest ends first.
    pub fn wait_ready(&self, timeout: Duration) -> Result<(), AgentError> {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            // A port that nobody has opened yet refuses or drops this: the next round repeats it.
            _ = self.write(&Request::Hello);
            thread::sleep(HELLO_INTERVAL);
            let routes = locked(&self.routes);
            if routes.ready {
                return Ok(());
            }
            if routes.commands.is_none() {
                return Err(AgentError::Closed("its greeting".into()));
            }
        }
        Err(AgentError::NotReady(timeout))
    }

    /// The guest is about to start anew: what runs is given up ([`AgentError::Closed`]), and
    /// [`Client::wait_ready`] waits for a new greeting.
    pub fn expect_restart(&self) {
        let mut routes = locked(&self.routes);
        routes.ready = false;
        if let Some(commands) = routes.commands.as_mut() {
            commands.clear();
        }
    }

    /// Run `command` with the guest's shell and wait for its end, at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`Running::wait`]. A command that fails is no error: see [`Output::status`].
    pub fn run(&self, command: &str, timeout: Duration) -> Result<Output, AgentError> {
        self.spawn(command)?.wait(timeout)
    }

    /// Start `command` with the guest's shell.
    ///
    /// # Errors
    ///
    /// [`AgentError::Closed`] when the guest has ended, [`AgentError::Io`] when the port cannot be written.
    pub fn spawn(&self, command: &str) -> Result<Running, AgentError> {
        let (sender, events) = mpsc::channel();
        let id = {
            let mut routes = locked(&self.routes);
            routes.next_id += 1;
            let id = routes.next_id;
            let commands = routes
                .commands
                .as_mut()
                .ok_or_else(|| AgentError::Closed(command.into()))?;
            commands.insert(id, sender);
            id
        };
        self.write(&Request::Run {
            id,
            command: command.into(),
        })?;
        Ok(Running {
            client: self.clone(),
            id,
            command: command.into(),
            events,
            output: Output::default(),
        })
    }

    fn write(&self, request: &Request) -> Result<(), AgentError> {
        let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
        line.push(b'\n');
        Ok(locked(&self.writer).write_all(&line)?)
    }
}

fn route(routes: &mut Routes, event: Event) {
    let id = match event {
        Event::Ready => {
            routes.ready = true;
            return;
        }
        Event::Stdout { id, .. } | Event::Stderr { id, .. } | Event::Exit { id, .. } => id,
    };
    let Some(commands) = routes.commands.as_mut() else {
        return;
    };
    let ended = matches!(event, Event::Exit { .. });
    if let Some(sender) = commands.get(&id) {
        // A command that nobody waits for any more: its output has no reader.
        _ = sender.send(event);
    }
    if ended {
        commands.remove(&id);
    }
}

/// A command that runs in the guest. Dropping it leaves the command running.
pub struct Running {
    client: Client,
    id: u64,
    command: String,
    events: Receiver<Event>,
    output: Output,
}

impl Running {
    /// Wait for the command's end, at most `timeout`; a command that takes longer is killed.
    ///
    /// # Errors
    ///
    /// [`AgentError::Timeout`] with what was printed so far, [`AgentError::Closed`] when the guest ends first.
    pub fn wait(mut self, timeout: Duration) -> Result<Output, AgentError> {
        self.wait_each(timeout, |_| {})
    }

    /// As [`Running::wait`], and show each piece of output to `each` when it comes.
    ///
    /// # Errors
    ///
    /// As [`Running::wait`].
    pub fn wait_each(
        &mut self,
        timeout: Duration,
        mut each: impl FnMut(&Event),
    ) -> Result<Output, AgentError> {
        // A timeout too long to add is no bound at all: a day is.
        let deadline = Instant::now() + timeout.min(Duration::from_secs(86_400));
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            let Some(event) = self.next_event(rest)? else {
                self.kill()?;
                let output = std::mem::take(&mut self.output);
                return Err(AgentError::Timeout {
                    command: self.command.clone(),
                    timeout,
                    output,
                });
            };
            each(&event);
            match event {
                Event::Stdout { text, .. } => self.output.stdout.push_str(&text),
                Event::Stderr { text, .. } => self.output.stderr.push_str(&text),
                Event::Exit { status, .. } => {
                    self.output.status = status;
                    return Ok(std::mem::take(&mut self.output));
                }
                Event::Ready => {}
            }
        }
    }

    /// The next of its events, or none within `timeout`. Nothing is collected: for a command that prints without end.
    ///
    /// # Errors
    ///
    /// [`AgentError::Closed`] when the guest ends first, and after [`Event::Exit`].
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, AgentError> {
        match self.events.recv_timeout(timeout) {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(AgentError::Closed(self.command.clone())),
        }
    }

    /// Kill the command and what it started.
    ///
    /// # Errors
    ///
    /// [`AgentError::Io`] when the port cannot be written.
    pub fn kill(&self) -> Result<(), AgentError> {
        self.client.write(&Request::Kill { id: self.id })
    }
}
