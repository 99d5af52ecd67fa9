// SPDX-License-Identifier: MIT OR Apache-2.0

//! TCP connections between a guest and the test, for data that both sides hash.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use sha2::{Digest, Sha256};

use crate::guest::COMMAND;

/// Bytes that do not repeat, the same for the same seed.
pub fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        // xorshift64: enough to make every packet different.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// SHA-256 in hexadecimal, as `sha256sum` prints it.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// What happens on connections, beside the test.
pub struct Work<R>(JoinHandle<Result<R>>);

impl<R> Work<R> {
    /// Wait for its end.
    ///
    /// # Errors
    ///
    /// When something went wrong on a connection, or none came within [`COMMAND`].
    pub fn join(self) -> Result<R> {
        self.0
            .join()
            .unwrap_or_else(|_| Err(anyhow!("a thread of the test panicked")))
    }
}

/// Where a guest can connect to.
pub struct Listener(TcpListener);

impl Listener {
    /// Listens at this address, on a port that is free, in the thread's network namespace.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn new(address: &str) -> Result<Self> {
        Ok(Self(TcpListener::bind((address, 0))?))
    }

    /// The port.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn port(&self) -> Result<u16> {
        Ok(self.0.local_addr()?.port())
    }

    fn accept(&self) -> Result<TcpStream> {
        self.accept_within(COMMAND)
    }

    fn accept_within(&self, limit: Duration) -> Result<TcpStream> {
        let deadline = Instant::now() + limit;
        self.0.set_nonblocking(true)?;
        let stream = loop {
            match self.0.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ensure!(Instant::now() < deadline, "nobody connects");
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(error.into()),
            }
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(COMMAND))?;
        stream.set_write_timeout(Some(COMMAND))?;
        Ok(stream)
    }

    /// Take all that comes on one connection.
    pub fn receive(self) -> Work<Vec<u8>> {
        Work(std::thread::spawn(move || receive(self.accept()?)))
    }

    /// Send this on one connection, and end it.
    pub fn send(self, bytes: Vec<u8>) -> Work<()> {
        Work(std::thread::spawn(move || send(self.accept()?, &bytes)))
    }

    /// Take so many connections, all of them at the same time, and answer the line that comes on each.
    pub fn answer(self, connections: usize) -> Work<()> {
        Work(std::thread::spawn(move || {
            let all_are_there = Arc::new(Barrier::new(connections));
            let mut threads = Vec::new();
            for _ in 0..connections {
                let stream = self.accept()?;
                let barrier = Arc::clone(&all_are_there);
                threads.push(Work(std::thread::spawn(move || {
                    let mut line = String::new();
                    let read = BufReader::new(&stream).read_line(&mut line);
                    // The others wait for this one, whatever has come.
                    barrier.wait();
                    read?;
                    send(stream, format!("answer to {line}").as_bytes())
                })));
            }
            threads.into_iter().try_for_each(Work::join)
        }))
    }
}

fn receive(mut stream: TcpStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn send(mut stream: TcpStream, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes)?;
    stream.shutdown(Shutdown::Write)?;
    // So that nothing is reset that is still on its way.
    let rest = receive(stream)?;
    ensure!(
        rest.is_empty(),
        "{} bytes that nobody asked for",
        rest.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_waited_for_with_a_limit() {
        let listener = Listener::new("127.0.0.1").unwrap();
        let error = listener.accept_within(Duration::from_millis(50));
        assert_eq!(error.err().unwrap().to_string(), "nobody connects");
    }

    #[test]
    fn data_arrives() {
        let listener = Listener::new("127.0.0.1").unwrap();
        let port = listener.port().unwrap();
        let received = listener.receive();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        // It comes later than the connection, which must not be in a hurry.
        std::thread::sleep(Duration::from_millis(100));
        stream.write_all(b"abc").unwrap();
        drop(stream);
        assert_eq!(received.join().unwrap(), b"abc");
    }
}
