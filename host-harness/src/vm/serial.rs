// SPDX-License-Identifier: MIT OR Apache-2.0

//! The serial ports COM1 and COM2: 16550 UARTs (`vm-superio`) in front of a terminal, a file, a
//! Unix socket, or streams that a test gives.
//!
//! A vCPU thread only puts bytes into a bounded queue; a thread of the port writes them out. A
//! reader that is slower than the guest makes the guest's transmitter wait, at most [`STALL_LIMIT`]
//! at a time, and then output is dropped until there is room again. Input is taken from its source
//! only as fast as the guest empties the UART's receive FIFO.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::VmError;
use crate::counters::Counter;
use crate::files;

/// Where a serial port is in the guest.
#[derive(Clone, Copy, Debug)]
pub struct PortAddress {
    /// First of its 8 I/O ports.
    pub base: u16,
    /// Its interrupt.
    pub irq: u32,
}

/// COM1 and COM2, ttyS0 and ttyS1 of a Linux guest.
pub const PORTS: [PortAddress; 2] = [
    PortAddress {
        base: 0x3f8,
        irq: 4,
    },
    PortAddress {
        base: 0x2f8,
        irq: 3,
    },
];

/// I/O ports of one UART.
pub const PORT_COUNT: u16 = 8;

/// Output that waits for its reader, in bytes.
const QUEUE_SIZE: usize = 256 << 10;
/// Output that is kept while nobody is connected to a socket: the newest bytes.
const BACKLOG_SIZE: usize = 64 << 10;
/// Longest time that one byte of the guest waits for room in the queue.
pub const STALL_LIMIT: Duration = Duration::from_secs(5);
/// Longest time for the rest of the output when the VM ends.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// How long input waits for a guest that takes none when its sender has left.
const INPUT_LIMIT: Duration = Duration::from_secs(3);
/// In a terminal, this character (Ctrl-A) starts a command to the harness.
const ESCAPE: u8 = 1;

/// What is behind a serial port.
pub enum SerialBackend {
    /// No port.
    None,
    /// The terminal (or whatever is there) of the process: standard input and output. A terminal
    /// is set to raw mode, and Ctrl-A starts a command: x ends the VM, Ctrl-A sends a Ctrl-A.
    Stdio,
    /// Output to a file, which is truncated. No input.
    File(PathBuf),
    /// A Unix socket, which the harness listens on: one client at a time. Output while nobody is
    /// connected is kept (the newest 64 KiB).
    Socket(PathBuf),
    /// Streams of the library's user. A `None` input is as a silent one.
    Streams {
        /// Gets what the guest writes.
        output: Box<dyn Write + Send>,
        /// Gives what the guest reads.
        input: Option<Box<dyn Read + Send>>,
    },
}

impl std::fmt::Debug for SerialBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SerialBackend::None => write!(f, "none"),
            SerialBackend::Stdio => write!(f, "stdio"),
            SerialBackend::File(path) => write!(f, "file:{}", path.display()),
            SerialBackend::Socket(path) => write!(f, "socket:{}", path.display()),
            SerialBackend::Streams { .. } => write!(f, "streams"),
        }
    }
}

/// A backend as the command line names it. (`SerialBackend` itself cannot be cloned.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialOption {
    /// `none`
    None,
    /// `stdio`
    Stdio,
    /// `file:PATH`
    File(PathBuf),
    /// `socket:PATH`
    Socket(PathBuf),
}

impl FromStr for SerialOption {
    type Err = String;

    fn from_str(text: &str) -> Result<SerialOption, String> {
        let path = |path: &str, what| {
            if path.is_empty() {
                return Err(format!("{what}: needs a path"));
            }
            Ok(PathBuf::from(path))
        };
        match text.split_once(':') {
            None if text == "none" => Ok(SerialOption::None),
            None if text == "stdio" => Ok(SerialOption::Stdio),
            Some(("file", rest)) => Ok(SerialOption::File(path(rest, "file")?)),
            Some(("socket", rest)) => Ok(SerialOption::Socket(path(rest, "socket")?)),
            _ => Err("expected stdio, none, file:PATH or socket:PATH".to_owned()),
        }
    }
}

impl From<SerialOption> for SerialBackend {
    fn from(option: SerialOption) -> SerialBackend {
        match option {
            SerialOption::None => SerialBackend::None,
            SerialOption::Stdio => SerialBackend::Stdio,
            SerialOption::File(path) => SerialBackend::File(path),
            SerialOption::Socket(path) => SerialBackend::Socket(path),
        }
    }
}

/// Bytes on their way from the guest to the reader.
#[derive(Default)]
struct Output {
    state: Mutex<OutputState>,
    /// Bytes came, or the end.
    filled: Condvar,
    /// Room came.
    drained: Condvar,
    dropped: Counter,
}

#[derive(Default)]
struct OutputState {
    bytes: VecDeque<u8>,
    /// Nobody reads at the moment: keep the newest bytes and do not make the guest wait.
    detached: bool,
    /// The last byte that waited did so in vain: do not wait again until there is room.
    stalled: bool,
    closed: bool,
}

impl Output {
    fn push(&self, byte: u8) {
        let mut state = lock(&self.state);
        if state.detached && state.bytes.len() >= BACKLOG_SIZE {
            state.bytes.pop_front();
            self.dropped.add(1);
        }
        let deadline = Instant::now() + STALL_LIMIT;
        while state.bytes.len() >= QUEUE_SIZE {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || state.stalled || left.is_zero() {
                state.stalled = true;
                self.dropped.add(1);
                return;
            }
            state = self
                .drained
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.stalled = false;
        state.bytes.push_back(byte);
        if state.bytes.len() == 1 {
            self.filled.notify_one();
        }
    }

    /// Takes all bytes; waits for some. `None` at the end.
    fn take(&self) -> Option<Vec<u8>> {
        let mut state = lock(&self.state);
        loop {
            if !state.bytes.is_empty() && !state.detached {
                let bytes = state.bytes.drain(..).collect();
                self.drained.notify_all();
                return Some(bytes);
            }
            if state.closed {
                return None;
            }
            state = self
                .filled
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn set_detached(&self, detached: bool) {
        lock(&self.state).detached = detached;
        self.filled.notify_all();
        self.drained.notify_all();
    }

    fn close(&self) {
        lock(&self.state).closed = true;
        self.filled.notify_all();
        self.drained.notify_all();
    }
}

/// The UART's end of the output queue.
struct OutputEnd(Arc<Output>);

impl Write for OutputEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.0.push(byte);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The UART's interrupt line, an irqfd.
struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the input thread that the receive FIFO is empty.
#[derive(Default)]
struct Fifo {
    emptied: Condvar,
}

struct FifoEvents(Arc<Fifo>);

impl SerialEvents for FifoEvents {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.emptied.notify_all();
    }
}

type Uart = Serial<Irq, FifoEvents, OutputEnd>;

/// The part of a serial port that its threads and the vCPUs share.
struct Line {
    uart: Mutex<UartState>,
    fifo: Arc<Fifo>,
    output: Arc<Output>,
}

struct UartState {
    uart: Uart,
    closed: bool,
}

impl Line {
    /// Gives input to the guest, as fast as it takes it. `false` at the end of the port.
    fn feed(&self, bytes: &[u8]) -> bool {
        self.feed_from(bytes, || true)
    }

    /// As [`Line::feed`], also `false` when the guest has taken nothing for a while and the sender
    /// is not there any more.
    fn feed_from(&self, mut bytes: &[u8], is_there: impl Fn() -> bool) -> bool {
        let mut state = lock(&self.uart);
        let mut progress = Instant::now();
        while !bytes.is_empty() {
            if state.closed {
                return false;
            }
            // In loop-back mode the UART takes no input, and 0 comes back here.
            let taken = state.uart.enqueue_raw_bytes(bytes).unwrap_or(0);
            bytes = bytes.get(taken..).unwrap_or_default();
            if taken > 0 {
                progress = Instant::now();
            } else if progress.elapsed() > INPUT_LIMIT && !is_there() {
                return false;
            }
            if !bytes.is_empty() {
                state = self
                    .fifo
                    .emptied
                    .wait_timeout(state, Duration::from_millis(100))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
        !state.closed
    }
}

/// A serial port of the VM. It outlives a reset.
pub struct SerialPort {
    line: Arc<Line>,
    interrupt: EventFd,
    writer: Mutex<Option<JoinHandle<()>>>,
    socket: Mutex<Option<Arc<Socket>>>,
    raw_terminal: Mutex<Option<RawTerminal>>,
}

impl SerialPort {
    /// Opens the backend; `None` for [`SerialBackend::None`]. `on_quit` is called when the user
    /// asks on the terminal to end the VM.
    ///
    /// # Errors
    /// [`VmError::Image`] when a file or socket cannot be opened; [`VmError::System`].
    pub fn open(
        backend: SerialBackend,
        on_quit: impl Fn() + Send + 'static,
    ) -> Result<Option<SerialPort>, VmError> {
        let interrupt = EventFd::new(0).map_err(|e| VmError::System("creating an eventfd", e))?;
        let output = Arc::new(Output::default());
        let fifo = Arc::new(Fifo::default());
        let line = Arc::new(Line {
            uart: Mutex::new(UartState {
                uart: new_uart(&interrupt, &fifo, &output)?,
                closed: false,
            }),
            fifo,
            output: output.clone(),
        });
        let port = SerialPort {
            line: line.clone(),
            interrupt,
            writer: Mutex::default(),
            socket: Mutex::default(),
            raw_terminal: Mutex::default(),
        };
        match backend {
            SerialBackend::None => return Ok(None),
            SerialBackend::Stdio => {
                *lock(&port.writer) = Some(spawn_writer("stdout", output, Box::new(io::stdout()))?);
                let commands = io::stdin().is_terminal();
                // Not `io::Stdin`: its lock would be held while the thread waits for a key.
                let input = io::stdin()
                    .as_fd()
                    .try_clone_to_owned()
                    .map(File::from)
                    .map_err(|e| VmError::System("duplicating standard input", e))?;
                if commands {
                    *lock(&port.raw_terminal) = Some(RawTerminal::set()?);
                }
                spawn("serial-stdin", move || {
                    let mut keys = Keys::new(commands);
                    read_all(input, |bytes| {
                        let (bytes, quit) = keys.filter(bytes);
                        let open = line.feed(&bytes);
                        if quit {
                            on_quit();
                        }
                        open && !quit
                    });
                })?;
            }
            SerialBackend::File(path) => {
                let file = File::create(&path).map_err(|e| cannot_open(&path, &e))?;
                *lock(&port.writer) = Some(spawn_writer("file", output, Box::new(file))?);
            }
            SerialBackend::Socket(path) => {
                let socket = Arc::new(Socket::listen(path)?);
                output.set_detached(true);
                *lock(&port.socket) = Some(socket.clone());
                let (writer_socket, writer_output) = (socket.clone(), output.clone());
                *lock(&port.writer) = Some(spawn("serial-socket-out", move || {
                    while let Some(bytes) = writer_output.take() {
                        writer_socket.send(&bytes);
                    }
                })?);
                spawn("serial-socket-in", move || socket.serve(&line))?;
            }
            SerialBackend::Streams {
                output: stream,
                input,
            } => {
                *lock(&port.writer) = Some(spawn_writer("stream", output, stream)?);
                if let Some(input) = input {
                    spawn("serial-stream-in", move || {
                        read_all(input, |bytes| line.feed(bytes));
                    })?;
                }
            }
        }
        Ok(Some(port))
    }

    /// The event that raises the port's interrupt: to be an irqfd of the VM.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Sets the UART to its state after power-on.
    ///
    /// # Errors
    /// [`VmError::System`] when the process has no descriptors left.
    pub fn reset(&self) -> Result<(), VmError> {
        let uart = new_uart(&self.interrupt, &self.line.fifo, &self.line.output)?;
        lock(&self.line.uart).uart = uart;
        Ok(())
    }

    /// The guest reads a register.
    pub fn read(&self, offset: u8) -> u8 {
        lock(&self.line.uart).uart.read(offset)
    }

    /// The guest writes a register.
    pub fn write(&self, offset: u8, value: u8) {
        if let Err(error) = lock(&self.line.uart).uart.write(offset, value) {
            tracing::warn!(%error, "serial port");
        }
    }

    /// Ends the port: writes out what the guest has written, within a few seconds, gives the
    /// terminal back and ends the threads. A thread that reads standard input or a user's stream
    /// ends with its next byte, or not at all.
    pub fn finish(&self) {
        self.line.output.close();
        lock(&self.line.uart).closed = true;
        self.line.fifo.emptied.notify_all();
        if let Some(writer) = lock(&self.writer).take() {
            let deadline = Instant::now() + DRAIN_LIMIT;
            while !writer.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(2));
            }
            if writer.is_finished() && writer.join().is_err() {
                tracing::error!("a serial port's thread panicked");
            }
        }
        if let Some(socket) = lock(&self.socket).take() {
            socket.close();
        }
        drop(lock(&self.raw_terminal).take());
    }

    /// Bytes that were dropped because nobody read them in time.
    pub fn dropped(&self) -> u64 {
        self.line.output.dropped.get()
    }
}

impl Drop for SerialPort {
    fn drop(&mut self) {
        self.finish();
    }
}

fn new_uart(interrupt: &EventFd, fifo: &Arc<Fifo>, output: &Arc<Output>) -> Result<Uart, VmError> {
    let interrupt = interrupt
        .try_clone()
        .map_err(|e| VmError::System("duplicating an eventfd", e))?;
    Ok(Serial::with_events(
        Irq(interrupt),
        FifoEvents(fifo.clone()),
        OutputEnd(output.clone()),
    ))
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, VmError> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|e| VmError::System("starting a thread", e))
}

fn spawn_writer(
    name: &'static str,
    output: Arc<Output>,
    mut stream: Box<dyn Write + Send>,
) -> Result<JoinHandle<()>, VmError> {
    spawn(&format!("serial-{name}"), move || {
        let mut broken = false;
        while let Some(bytes) = output.take() {
            if broken {
                output.dropped.add(bytes.len() as u64);
                continue;
            }
            if let Err(error) = stream.write_all(&bytes).and_then(|()| stream.flush()) {
                // The reader is gone. The guest does not notice.
                tracing::warn!(%error, name, "serial output");
                output.dropped.add(bytes.len() as u64);
                broken = true;
            }
        }
    })
}

/// Reads to the end and passes all bytes on, until `take` says that it wants no more.
fn read_all(mut input: impl Read, mut take: impl FnMut(&[u8]) -> bool) {
    let mut buffer = [0; 4096];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => {
                if !take(buffer.get(..len).unwrap_or_default()) {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::debug!(%error, "serial input");
                return;
            }
        }
    }
}

/// Finds the commands to the harness among the keys that the user types.
struct Keys {
    enabled: bool,
    escaped: bool,
}

impl Keys {
    fn new(enabled: bool) -> Keys {
        Keys {
            enabled,
            escaped: false,
        }
    }

    /// Returns what goes to the guest, and whether the user asks to end the VM.
    fn filter(&mut self, keys: &[u8]) -> (Vec<u8>, bool) {
        if !self.enabled {
            return (keys.to_vec(), false);
        }
        let mut bytes = Vec::with_capacity(keys.len());
        for &key in keys {
            match (std::mem::take(&mut self.escaped), key) {
                (false, ESCAPE) => self.escaped = true,
                (false, key) => bytes.push(key),
                (true, ESCAPE) => bytes.push(ESCAPE),
                (true, b'x' | b'X') => return (bytes, true),
                (true, b'h' | b'?') => help(),
                // Not a command: nothing is lost.
                (true, key) => bytes.extend([ESCAPE, key]),
            }
        }
        (bytes, false)
    }
}

/// Prints the commands.
fn help() {
    let text = "\nCtrl-A x       end the virtual machine\n\
                Ctrl-A Ctrl-A  send Ctrl-A to the guest\n\
                Ctrl-A h       this help\n";
    // Help that cannot be printed is not worth an error.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// The process's terminal in raw mode; as it was before when dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn set() -> Result<RawTerminal, VmError> {
        let set = || -> rustix::io::Result<RawTerminal> {
            let before = tcgetattr(io::stdin())?;
            let mut raw = before.clone();
            raw.make_raw();
            // Lines that the harness itself prints still begin at the left.
            raw.output_modes |= OutputModes::OPOST;
            tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
            Ok(RawTerminal { before })
        };
        set().map_err(|e| VmError::System("setting the terminal to raw mode", e.into()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &self.before) {
            tracing::warn!(%error, "restoring the terminal");
        }
    }
}

/// Whether the other end of a connection is closed altogether. One that has only sent all that it
/// has still reads.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    // A failure, of which none is known, says nothing.
    poll(&mut fds, Some(&Timespec::default())).is_ok()
        && fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP))
}

/// A listening socket with at most one client.
struct Socket {
    path: PathBuf,
    listener: UnixListener,
    client: Mutex<Option<UnixStream>>,
    closed: std::sync::atomic::AtomicBool,
}

impl Socket {
    fn listen(path: PathBuf) -> Result<Socket, VmError> {
        let listener = files::listen(&path).map_err(|e| cannot_open(&path, &e))?;
        Ok(Socket {
            path,
            listener,
            client: Mutex::new(None),
            closed: false.into(),
        })
    }

    fn is_closed(&self) -> bool {
        self.closed.load(std::sync::atomic::Ordering::SeqCst)
    }

    /// Serves one client after the other: what they send goes to the guest.
    fn serve(&self, line: &Line) {
        loop {
            let client = match self.listener.accept() {
                Ok((client, _)) => client,
                Err(error) => {
                    tracing::warn!(%error, "serial socket");
                    // Such as too many open files: it may pass.
                    thread::sleep(Duration::from_millis(100));
                    if self.is_closed() {
                        return;
                    }
                    continue;
                }
            };
            if self.is_closed() {
                return;
            }
            let Ok(reader) = client.try_clone() else {
                continue;
            };
            *lock(&self.client) = Some(client);
            line.output.set_detached(false);
            let peer = reader.try_clone();
            let is_there = || peer.as_ref().is_ok_and(|peer| !has_hung_up(peer));
            read_all(reader, |bytes| line.feed_from(bytes, is_there));
            line.output.set_detached(true);
            *lock(&self.client) = None;
            if self.is_closed() {
                return;
            }
        }
    }

    /// Sends to the client; without one, or when it goes away, the bytes are lost.
    fn send(&self, bytes: &[u8]) {
        let client = lock(&self.client)
            .as_ref()
            .and_then(|client| client.try_clone().ok());
        if let Some(mut client) = client
            && let Err(error) = client.write_all(bytes)
        {
            tracing::debug!(%error, "serial socket");
        }
    }

    /// Ends the serving thread.
    fn close(&self) {
        self.closed.store(true, std::sync::atomic::Ordering::SeqCst);
        if let Some(client) = lock(&self.client).as_ref() {
            // The client may have gone at this moment; the thread ends all the same.
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
        // Wakes the thread if it waits for a client.
        drop(UnixStream::connect(&self.path));
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "removing a serial socket");
        }
    }
}

fn cannot_open(path: &Path, error: &io::Error) -> VmError {
    VmError::Image {
        what: "serial port".into(),
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter, pipe};

    use super::*;

    const DATA: u8 = 0;
    const INTERRUPT_ENABLE: u8 = 1;
    const LINE_STATUS: u8 = 5;

    fn streams() -> (SerialPort, PipeReader, PipeWriter) {
        let (out_reader, out_writer) = pipe().unwrap();
        let (in_reader, in_writer) = pipe().unwrap();
        let backend = SerialBackend::Streams {
            output: Box::new(out_writer),
            input: Some(Box::new(in_reader)),
        };
        let port = SerialPort::open(backend, || ()).unwrap().unwrap();
        (port, out_reader, in_writer)
    }

    /// Reads as a guest's driver does, waiting for the interrupt.
    fn guest_read(port: &SerialPort, len: usize) -> Vec<u8> {
        port.write(INTERRUPT_ENABLE, 1);
        let mut bytes = Vec::new();
        while bytes.len() < len {
            if port.read(LINE_STATUS) & 1 == 0 {
                port.interrupt().read().unwrap();
                continue;
            }
            bytes.push(port.read(DATA));
        }
        bytes
    }

    #[test]
    fn output_reaches_the_reader() {
        let (port, mut reader, _input) = streams();
        for byte in b"hello\n" {
            port.write(DATA, *byte);
        }
        drop(port);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n");
    }

    #[test]
    fn long_input_arrives_complete_and_with_interrupts() {
        let (port, _output, mut input) = streams();
        let sent: Vec<u8> = (0..=255).cycle().take(5000).collect();
        let expected = sent.clone();
        let writer = thread::spawn(move || {
            input.write_all(&sent).unwrap();
            input
        });
        assert_eq!(guest_read(&port, expected.len()), expected);
        writer.join().unwrap();
    }

    #[test]
    fn a_reader_that_goes_away_does_not_stop_the_guest() {
        let (port, reader, _input) = streams();
        drop(reader);
        for _ in 0..QUEUE_SIZE + 10 {
            port.write(DATA, b'x');
        }
    }

    #[test]
    fn socket_keeps_output_for_the_next_client() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial");
        let backend = SerialBackend::Socket(path.clone());
        let port = SerialPort::open(backend, || ()).unwrap().unwrap();
        for byte in b"before" {
            port.write(DATA, *byte);
        }
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            let mut buffer = [0; 6];
            client.read_exact(&mut buffer).unwrap();
            assert_eq!(&buffer, b"before");
            client.write_all(b"in").unwrap();
            assert_eq!(guest_read(&port, 2), b"in");
            client.shutdown(std::net::Shutdown::Both).unwrap();
            drop(client);
            // The port must have noticed before it gets output for the next one.
            while !lock(&port.line.output.state).detached {
                thread::sleep(Duration::from_millis(1));
            }
            for byte in b"before" {
                port.write(DATA, *byte);
            }
        }
        drop(port);
        assert!(!path.exists());
    }

    #[test]
    fn a_client_that_leaves_makes_room_although_the_guest_does_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial");
        let backend = SerialBackend::Socket(path.clone());
        let port = SerialPort::open(backend, || ()).unwrap().unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(&[b'x'; 1000]).unwrap();
        while lock(&port.line.output.state).detached {
            thread::sleep(Duration::from_millis(1));
        }
        // One that waits for output is there.
        client.shutdown(std::net::Shutdown::Write).unwrap();
        thread::sleep(INPUT_LIMIT + Duration::from_millis(500));
        assert!(!lock(&port.line.output.state).detached);
        drop(client);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !lock(&port.line.output.state).detached {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn unread_output_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let backend = SerialBackend::Socket(folder.path().join("serial"));
        let port = SerialPort::open(backend, || ()).unwrap().unwrap();
        for _ in 0..BACKLOG_SIZE + 100 {
            port.write(DATA, b'x');
        }
        assert_eq!(port.dropped(), 100);
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let stale = folder.path().join("stale");
        drop(UnixListener::bind(&stale).unwrap());
        assert!(SerialPort::open(SerialBackend::Socket(stale), || ()).is_ok());
        let file = folder.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(SerialPort::open(SerialBackend::Socket(file.clone()), || ()).is_err());
        assert_eq!(std::fs::read(file).unwrap(), b"precious");
    }

    #[test]
    fn keys_after_ctrl_a_are_commands() {
        let mut keys = Keys::new(true);
        assert_eq!(keys.filter(b"a\x01"), (b"a".to_vec(), false));
        assert_eq!(keys.filter(b"\x01b"), (b"\x01b".to_vec(), false));
        assert_eq!(keys.filter(b"\x01c"), (b"\x01c".to_vec(), false));
        assert_eq!(keys.filter(b"d\x01xe"), (b"d".to_vec(), true));
        let mut pipe = Keys::new(false);
        assert_eq!(pipe.filter(b"\x01x"), (b"\x01x".to_vec(), false));
    }

    #[test]
    fn options() {
        let parse = |text: &str| text.parse::<SerialOption>();
        assert_eq!(parse("stdio"), Ok(SerialOption::Stdio));
        assert_eq!(parse("none"), Ok(SerialOption::None));
        assert_eq!(parse("file:/a:b"), Ok(SerialOption::File("/a:b".into())));
        assert_eq!(parse("socket:s"), Ok(SerialOption::Socket("s".into())));
        for bad in ["", "stdio:", "file:", "socket:", "file", "tcp:1", "pty"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
