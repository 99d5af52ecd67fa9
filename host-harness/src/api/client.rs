// SPDX-License-Identifier: MIT OR Apache-2.0

//! A client of the control API, for `host-harness ctl` and for tests.

use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::http;

/// Calls wait for the guest at most about half of this.
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);

/// The largest reply that is read.
const MAX_REPLY: u64 = 64 << 20;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No host listens there, or only for another user.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The host's answer: it will not do this.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Why.
        message: String,
    },
    /// No answer, or none that makes sense.
    #[error("no answer: {0}")]
    Broken(String),
}

/// A client of one host. Each call is a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

fn broken(error: impl ToString) -> ClientError {
    ClientError::Broken(error.to_string())
}

/// The body of a reply that ends.
fn read_body(rest: impl Read) -> Result<Value, ClientError> {
    let mut bytes = Vec::new();
    rest.take(MAX_REPLY)
        .read_to_end(&mut bytes)
        .map_err(broken)?;
    serde_json::from_slice(&bytes).map_err(broken)
}

/// The error that a reply's body tells of.
fn refused(status: u16, body: &Value) -> ClientError {
    let message = body.get("error").and_then(Value::as_str);
    let message = message.unwrap_or("no reason given").to_owned();
    ClientError::Refused { status, message }
}

impl Client {
    /// A client of the host that listens at `path`.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
        }
    }

    /// Sends a request, and reads the head of its reply.
    fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Box<dyn Read + Send>, UnixStream), ClientError> {
        let mut stream =
            UnixStream::connect(&self.path).map_err(|source| ClientError::Connect {
                path: self.path.clone(),
                source,
            })?;
        let timeout = Some(REPLY_TIMEOUT);
        stream.set_read_timeout(timeout).map_err(broken)?;
        stream.set_write_timeout(timeout).map_err(broken)?;
        let body = body.map_or_else(String::new, Value::to_string);
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        // A host that has seen enough closes before it has read all; its reply says why.
        let sent = stream.write_all(request.as_bytes());
        let (status, length, begun) = http::read_reply_head(&mut stream)
            .map_err(|error| broken(sent.err().map_or(error, |sent| sent.to_string())))?;
        let rest = stream.try_clone().map_err(broken)?;
        let rest = Cursor::new(begun).chain(rest);
        Ok((
            status,
            Box::new(rest.take(length.unwrap_or(u64::MAX))),
            stream,
        ))
    }

    /// Makes a call and gives its result.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn call(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, ClientError> {
        let (status, rest, _) = self.request(method, path, body)?;
        let value = read_body(rest)?;
        if status == 200 {
            return Ok(value);
        }
        Err(refused(status, &value))
    }

    /// Asks for something.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.call("GET", path, None)
    }

    /// Has something done.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        self.call("POST", path, Some(body))
    }

    /// Follows the events: an iterator that ends when the host does.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn events(
        &self,
    ) -> Result<impl Iterator<Item = Result<Value, ClientError>> + use<>, ClientError> {
        let (status, rest, stream) = self.request("GET", "/v1/events", None)?;
        if status != 200 {
            return Err(refused(status, &read_body(rest)?));
        }
        // Nothing may happen for long.
        stream.set_read_timeout(None).map_err(broken)?;
        Ok(BufReader::new(rest)
            .lines()
            .map(|line| serde_json::from_str(&line.map_err(broken)?).map_err(broken)))
    }
}
