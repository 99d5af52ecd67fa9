// SPDX-License-Identifier: MIT OR Apache-2.0

//! The socket: who may connect, how many, and how long they may take.
//!
//! Each connection has a thread of its own, so a client that hangs only holds its own. A client
//! that asks for events keeps its connection until it or the host goes.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::RecvFlags;

use super::calls::{self, Answer};
use super::http::{self, Deadline, RequestError, Status};
use crate::control::Control;
use crate::events::{Next, Subscription};
use crate::files;

/// Connections at a time, those that follow events included.
pub(super) const MAX_CLIENTS: usize = 32;
/// How long a whole request may take to come, and a reply to go.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection without events is looked at, whether its client is still there.
const ALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// How long the end of the server waits for calls that are under way.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// The open connections.
#[derive(Default)]
struct Clients {
    next: u64,
    open: HashMap<u64, UnixStream>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    clients: Mutex<Clients>,
    gone: Condvar,
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        // The table is consistent whenever something can panic.
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server of the control API. Dropping it ends it: calls that are under way are finished, the
/// socket is removed, and the host's events end.
pub struct ApiServer {
    socket: ApiSocket,
    shared: Arc<Shared>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

/// The socket of a control API that is not served yet: who connects waits. Dropping it removes it.
pub struct ApiSocket {
    path: PathBuf,
    listener: Arc<UnixListener>,
}

impl ApiSocket {
    /// Makes the socket.
    ///
    /// # Errors
    /// The socket cannot be made, for instance because somebody listens there already, or there is
    /// a file of this name.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = Self {
            listener: Arc::new(files::listen(path)?),
            path: path.to_owned(),
        };
        // Somebody else may connect before this, and is turned away by `is_owner`.
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
        Ok(socket)
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "removing the API's socket");
        }
    }
}

impl ApiServer {
    /// Makes the socket and serves it.
    ///
    /// # Errors
    /// As [`ApiSocket::bind`], and the system refuses a thread.
    pub fn start(path: &Path, control: Arc<Control>) -> io::Result<Self> {
        Self::serve(ApiSocket::bind(path)?, control)
    }

    /// Serves a socket.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn serve(socket: ApiSocket, control: Arc<Control>) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let thread = {
            let (listener, shared) = (socket.listener.clone(), shared.clone());
            let control = control.clone();
            thread::Builder::new()
                .name("api".into())
                .spawn(move || accept(&listener, &shared, &control))?
        };
        Ok(Self {
            socket,
            shared,
            control,
            thread: Some(thread),
        })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.shared.clients().ended = true;
        // Ends `accept`, which then fails.
        if let Err(error) =
            rustix::net::shutdown(&self.socket.listener, rustix::net::Shutdown::Both)
        {
            tracing::warn!(%error, "ending the control API");
        } else if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control API's thread panicked");
        }
        self.control.events.close();
        let clients = self.shared.clients();
        for stream in clients.open.values() {
            // Those who have not asked yet are not answered any more; it may be closed already.
            let _ = stream.shutdown(Shutdown::Read);
        }
        let waited = self
            .shared
            .gone
            .wait_timeout_while(clients, END_TIMEOUT, |clients| !clients.open.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        if waited.1.timed_out() {
            tracing::error!("a call of the control API does not end");
        }
    }
}

/// Takes connections until the listener is shut down.
fn accept(listener: &UnixListener, shared: &Arc<Shared>, control: &Arc<Control>) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(_) if shared.clients().ended => return,
            Err(error) => {
                // Out of file descriptors, perhaps; it must not become a busy loop.
                tracing::warn!(%error, "the control API cannot take a connection");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if !is_owner(&stream) {
            tracing::warn!("another user was turned away from the control API");
            continue;
        }
        if let Err(error) = admit(stream, shared, control) {
            tracing::warn!(%error, "the control API cannot serve a connection");
        }
    }
}

/// Whether this process' own user is at the other end.
fn is_owner(stream: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(stream)
        .is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

/// Gives a connection a thread, if there are not too many.
fn admit(stream: UnixStream, shared: &Arc<Shared>, control: &Arc<Control>) -> io::Result<()> {
    let mut clients = shared.clients();
    if clients.open.len() >= MAX_CLIENTS {
        drop(clients);
        let body = serde_json::json!({
            "error": format!("{MAX_CLIENTS} clients are connected already")
        });
        stream.set_nonblocking(true)?;
        // It fits the socket's buffer, or else nobody needs it.
        let _ = (&stream).write(&http::reply(Status::UNAVAILABLE, &body));
        return Ok(());
    }
    let number = clients.next;
    clients.next += 1;
    clients.open.insert(number, stream.try_clone()?);
    drop(clients);
    let leave = Leave(shared.clone(), number);
    let control = control.clone();
    thread::Builder::new()
        .name(format!("api-{number}"))
        .spawn(move || {
            let _leave = leave;
            serve(&stream, &control);
        })?;
    Ok(())
}

/// Takes a connection out of the table.
struct Leave(Arc<Shared>, u64);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.clients().open.remove(&self.1);
        self.0.gone.notify_all();
    }
}

/// Serves one connection: one request.
fn serve(stream: &UnixStream, control: &Control) {
    let request = http::read_request(&mut Deadline::new(stream, REQUEST_TIMEOUT));
    let answer = match request {
        Ok(request) => calls::call(control, &request),
        Err(RequestError::Gone) => return,
        Err(error) => Answer::error(error.status(), error.to_string()),
    };
    match answer {
        Answer::Value(status, body) => {
            send(stream, &http::reply(status, &body));
        }
        Answer::Events(events) => follow(stream, &events),
    }
}

/// Sends bytes. False if the client does not take them.
fn send(stream: &UnixStream, bytes: &[u8]) -> bool {
    let sent = Deadline::new(stream, REQUEST_TIMEOUT).write_all(bytes);
    if let Err(error) = &sent {
        tracing::debug!(%error, "a client of the control API does not take its reply");
    }
    sent.is_ok()
}

/// Sends bytes, for as long as the client is there and the host has not ended. Meanwhile the events
/// that it does not take are counted as lost. False if it does not take these.
fn send_patiently(stream: &UnixStream, mut bytes: &[u8]) -> bool {
    let mut patience = Deadline::new(stream, REQUEST_TIMEOUT);
    while !bytes.is_empty() {
        match patience.write(bytes) {
            Ok(sent) if sent > 0 => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A write that times out is one that would block.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) && is_there(stream) =>
            {
                patience = Deadline::new(stream, REQUEST_TIMEOUT);
            }
            _ => return false,
        }
    }
    true
}

/// Sends events until one side goes.
fn follow(stream: &UnixStream, events: &Subscription) {
    let head = http::reply_head(Status::OK, "application/x-ndjson", None);
    let mut there = send(stream, head.as_bytes());
    while there {
        there = match events.next(ALIVE_INTERVAL) {
            Next::Closed => return,
            Next::Timeout => is_there(stream),
            Next::Record(record) => match serde_json::to_string(&record) {
                Ok(line) => send_patiently(stream, format!("{line}\n").as_bytes()),
                Err(error) => {
                    tracing::error!(%error, "an event cannot be written");
                    true
                }
            },
        };
    }
}

/// Whether the other end of a connection is open.
fn is_there(stream: &UnixStream) -> bool {
    let mut byte = [0];
    match rustix::net::recv(stream, &mut byte[..], RecvFlags::DONTWAIT) {
        Ok((_, 0)) => false,
        Ok(_) => true,
        Err(error) => matches!(
            io::Error::from(error).kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
        ),
    }
}
