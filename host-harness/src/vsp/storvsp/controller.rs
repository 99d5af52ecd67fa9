// SPDX-License-Identifier: MIT OR Apache-2.0

//! One controller: a device on the bus, its channels and their threads, and its targets.

use hv_proto::guid::{self, Guid};
use hv_proto::packet::{Packet, PacketError, PacketType};
use hv_proto::scsi::ScsiStatus;
use hv_proto::storage::{
    HostConfig, HostHandshake, HostStep, LunAddress, Operation, ScsiRequest, SrbCode, SrbFlags,
    Status, Version, VstorPacket,
};
use serde::Serialize;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;

use super::hostile::Hostility;
use super::queue::{Job, Queue, Stall};
use crate::counters::Counter;
use crate::disk::{Bus, IoBuf};
use crate::scsi::{Completion, Data, LogicalUnit, Target};
use crate::vmbus::{
    ChannelError, ChannelReader, ChannelWriter, DeviceHandle, GpaError, GuestBuffer, GuestMem,
    HostChannel, OfferParams, OpenError, OpenParams, Vsp,
};

/// The most commands of one channel that are queued or run. Then the channel's ring is not read,
/// and the guest has to wait. Windows hosts take about as many.
pub const MAX_IN_FLIGHT: usize = 1024;

/// SCSI addresses that a guest looks at: Linux' `STORVSC_MAX_CHANNELS` and `STORVSC_MAX_TARGETS`.
const MAX_PATHS: u8 = 8;
const MAX_TARGETS: u8 = 2;

/// Ranges in one packet. Linux sends one.
const MAX_RANGES: u32 = 64;

/// Where a controller is among those of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Position {
    pub bus: Bus,
    pub number: u8,
    /// Drive of an IDE controller; 0 for SCSI.
    pub drive: u8,
}

impl Position {
    /// The name in logs and status: `scsi0`, `ide0.1`.
    pub fn name(self) -> String {
        match self.bus {
            Bus::Scsi => format!("scsi{}", self.number),
            Bus::Ide => format!("ide{}.{}", self.number, self.drive),
        }
    }

    /// How the device is offered. The instance GUID is the same in every run, so that what a
    /// guest remembers about its disks stays true. For an IDE drive it is the one that Hyper-V
    /// uses: bytes 4 and 5 are the drive, which is the target number for Linux.
    pub fn offer(self) -> OfferParams {
        let (class, instance) = match self.bus {
            Bus::Scsi => {
                let mut id = *hv_proto::guid!("1a9fd5c2-7b64-4c3e-9d20-5653435349ff").as_bytes();
                id[15] = self.number;
                (guid::SCSI, Guid::from_bytes(id))
            }
            Bus::Ide => {
                let mut id = *hv_proto::guid!("00000000-0000-8899-0000-000000000000").as_bytes();
                id[0] = self.number;
                id[4] = self.drive;
                (guid::IDE, Guid::from_bytes(id))
            }
        };
        OfferParams::new(self.name(), class, instance)
    }
}

/// What a controller has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ControllerCounters {
    /// SCSI commands that came.
    pub commands: u64,
    /// SCSI commands that were answered.
    pub answers: u64,
    /// Packets that made no sense, and commands whose buffer did not.
    pub invalid: u64,
    /// Resets of bus, adapter or unit.
    pub resets: u64,
    /// Answers that the guest did not take, and those dropped on purpose.
    pub lost_answers: u64,
    /// Commands that are queued or run now.
    pub in_flight: usize,
    /// Commands that run now.
    pub running: usize,
    /// Channels that are open now.
    pub channels: usize,
}

#[derive(Default)]
struct Counters {
    commands: AtomicU64,
    answers: AtomicU64,
    invalid: AtomicU64,
    resets: AtomicU64,
    lost_answers: AtomicU64,
    /// For the log.
    complaints: Counter,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// How a controller is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct ControllerConfig {
    pub position: Position,
    /// Largest transfer of one command in bytes.
    pub max_transfer: u32,
    /// Sub-channels that the guest may ask for.
    pub max_sub_channels: u16,
    /// Newest version of the storage protocol.
    pub max_version: Version,
    /// Threads that execute commands.
    pub workers: usize,
}

/// An open channel.
pub(super) struct Channel {
    /// Tells this opening from all others.
    pub serial: u64,
    index: u16,
    writer: ChannelWriter,
}

impl Channel {
    /// The ring to the guest.
    pub fn writer(&self) -> &ChannelWriter {
        &self.writer
    }
}

/// What all threads of a controller share.
struct Inner {
    config: ControllerConfig,
    targets: RwLock<BTreeMap<(u8, u8), Target>>,
    queue: Queue,
    handshake: Mutex<HostHandshake>,
    /// Open channels by index.
    channels: Mutex<BTreeMap<u16, Arc<Channel>>>,
    next_serial: AtomicU64,
    counters: Counters,
    hostility: Hostility,
}

impl Inner {
    // The data behind these locks are consistent at every point where a panic could happen.
    fn handshake(&self) -> MutexGuard<'_, HostHandshake> {
        self.handshake
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn channels(&self) -> MutexGuard<'_, BTreeMap<u16, Arc<Channel>>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn targets(&self) -> RwLockReadGuard<'_, BTreeMap<(u8, u8), Target>> {
        self.targets.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn targets_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<(u8, u8), Target>> {
        self.targets.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_handshake(config: &ControllerConfig) -> HostHandshake {
        HostHandshake::new(HostConfig {
            max_version: config.max_version,
            max_transfer_bytes: config.max_transfer,
            max_sub_channels: match config.position.bus {
                Bus::Scsi => config.max_sub_channels,
                Bus::Ide => 0,
            },
            wwn: None,
        })
    }

    /// The address that a request means. A guest knows an IDE drive by its target only.
    fn address(&self, request: &ScsiRequest) -> LunAddress {
        let address = request.address();
        match self.config.position.bus {
            Bus::Scsi => address,
            Bus::Ide => LunAddress { path: 0, ..address },
        }
    }

    fn units(&self) -> Vec<(LunAddress, Arc<LogicalUnit>)> {
        let mut units = Vec::new();
        for (&(path, target), units_of) in self.targets().iter() {
            for (lun, unit) in units_of.units() {
                units.push((LunAddress { path, target, lun }, Arc::clone(unit)));
            }
        }
        units
    }

    /// Executes a command; the answer.
    fn execute(&self, job: &Job) -> ScsiRequest {
        let request = &job.request;
        let mut answer = *request;
        let address = self.address(request);
        let length = request.data_transfer_length.get() as usize;
        let slices = job.buffer.slices();
        let (Some(cdb), Ok(slices)) = (request.cdb(), slices) else {
            answer.set_answer(SrbCode::INVALID_REQUEST, ScsiStatus::GOOD, 0);
            return answer;
        };
        let buf = IoBuf::new(slices).range(0, length);
        let data = match request.data_in {
            hv_proto::storage::DataIn::READ => Data::In(buf),
            hv_proto::storage::DataIn::WRITE => Data::Out(buf),
            _ => Data::None,
        };
        if address.path >= MAX_PATHS || address.target >= MAX_TARGETS {
            answer.set_answer(SrbCode::INVALID_TARGET_ID, ScsiStatus::GOOD, 0);
            return answer;
        }
        let unit = {
            let targets = self.targets();
            let empty = Target::default();
            let target = targets
                .get(&(address.path, address.target))
                .unwrap_or(&empty);
            match target.answer(address.lun, cdb, &data) {
                Some(completion) => {
                    Self::fill(&mut answer, &completion);
                    return answer;
                }
                None => target.unit(address.lun).cloned(),
            }
        };
        match unit {
            Some(unit) => {
                let completion = unit.execute(cdb, data);
                Self::fill(&mut answer, &completion);
            }
            None => answer.set_answer(SrbCode::INVALID_LUN, ScsiStatus::GOOD, 0),
        }
        answer
    }

    /// Translates the end of a command into the answer to a request.
    fn fill(answer: &mut ScsiRequest, completion: &Completion) {
        // No command moves more than its buffer, which is at most the transfer limit.
        let transferred = completion.transferred as u32;
        let room = usize::from(answer.sense_info_length);
        match completion.sense {
            Some(sense) if room > 0 && !answer.flags().contains(SrbFlags::DISABLE_AUTOSENSE) => {
                let sense = sense.to_fixed();
                answer.set_check_condition(sense.get(..room).unwrap_or(&sense), transferred);
            }
            Some(_) => answer.set_answer(SrbCode::ERROR, completion.status, transferred),
            None if completion.overrun => {
                answer.set_answer(SrbCode::DATA_OVERRUN, completion.status, transferred);
            }
            None => answer.set_answer(SrbCode::SUCCESS, completion.status, transferred),
        }
    }

    /// Sends the answer to a command.
    fn answer(&self, job: &Job, answer: &ScsiRequest) {
        let mut packet = VstorPacket::io_completion(answer);
        if answer.srb_status.code() != SrbCode::SUCCESS {
            packet.status = Status::UNSUCCESSFUL;
        }
        if self.hostility.drops() {
            count(&self.counters.lost_answers);
            return;
        }
        // Decided before anything is sent: the guest must not see the one of its next command.
        for _ in 0..self.hostility.times() {
            self.complete(
                &job.channel,
                job.transaction_id,
                job.wants_completion,
                packet.bytes(job.version),
            );
        }
    }

    /// Sends a completion, if it is wanted.
    fn complete(&self, channel: &Channel, transaction_id: u64, wanted: bool, bytes: &[u8]) {
        count(&self.counters.answers);
        if !wanted {
            return;
        }
        match channel.writer.complete(transaction_id, bytes) {
            Ok(()) => {}
            // The channel goes, and the guest knows.
            Err(ChannelError::Stopped) => count(&self.counters.lost_answers),
            Err(error) => {
                count(&self.counters.lost_answers);
                self.complain(channel, &error, "an answer is lost");
            }
        }
    }

    /// Tells of what a guest can bring about as often as it likes.
    fn complain(&self, channel: &Channel, error: &ChannelError, what: &str) {
        if let Some(times) = self.counters.complaints.complain() {
            let controller = self.config.position.name();
            tracing::warn!(controller, channel = channel.index, times, %error, "{what}");
        }
    }

    /// Executes commands until the end of the queue.
    fn work(&self) {
        while let Some(job) = self.queue.take() {
            self.queue.wait_to_run();
            // A bug in here must not leave the guest without an answer, or a close waiting.
            let answer = catch_unwind(AssertUnwindSafe(|| self.execute(&job)));
            let answer = answer.unwrap_or_else(|_| {
                tracing::error!(
                    controller = self.config.position.name(),
                    "a SCSI command panicked"
                );
                let mut answer = job.request;
                answer.set_answer(SrbCode::INTERNAL_ERROR, ScsiStatus::GOOD, 0);
                answer
            });
            self.answer(&job, &answer);
            self.queue.done(&job);
        }
    }

    /// Reads a channel until it closes.
    fn serve(&self, channel: &Arc<Channel>, mut reader: ChannelReader) {
        let mem = Arc::clone(reader.memory());
        let device = reader.device();
        loop {
            match reader.next(None) {
                Ok(Some(packet)) => {
                    if !self.handle(channel, &mem, &device, &packet) {
                        return;
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    if !matches!(error, ChannelError::Stopped) {
                        self.complain(channel, &error, "a storage channel failed");
                    }
                    return;
                }
            }
        }
    }

    /// Handles a packet of the guest. False when the channel is closing.
    fn handle(
        &self,
        channel: &Arc<Channel>,
        mem: &GuestMem,
        device: &DeviceHandle,
        packet: &Packet<'_>,
    ) -> bool {
        match packet.packet_type() {
            PacketType::IN_BAND | PacketType::GPA_DIRECT => {}
            // Nothing that is sent to the guest asks for a completion, and nothing else is known.
            _ => {
                count(&self.counters.invalid);
                return true;
            }
        }
        let stalled = self.queue.stall() == Stall::Everything;
        let reply = |answer: &VstorPacket, version: Version| {
            if packet.wants_completion() {
                let bytes = answer.bytes(version);
                // The next read of the channel finds out if this fails.
                if channel
                    .writer
                    .complete(packet.transaction_id(), bytes)
                    .is_err()
                {
                    count(&self.counters.lost_answers);
                }
            }
        };
        let (step, version) = {
            let mut handshake = self.handshake();
            let operation = VstorPacket::operation_of(packet.payload());
            // The handshake, and what belongs to it, is the primary channel's.
            let step = if channel.index != 0
                && !(handshake.is_ready() && operation.is_some_and(allowed_on_sub_channel))
            {
                Ok(HostStep::Answer(VstorPacket::completion(
                    Status::INVALID_DEVICE_STATE,
                )))
            } else if stalled && operation != Some(Operation::EXECUTE_SRB) {
                return true;
            } else {
                handshake.on_packet(packet.payload())
            };
            (step, handshake.version().unwrap_or(Version::V6_2))
        };
        match step {
            Err(error) => {
                count(&self.counters.invalid);
                tracing::debug!(controller = self.config.position.name(), %error);
                reply(&VstorPacket::completion(Status::INVALID_PARAMETER), version);
            }
            Ok(HostStep::Answer(answer)) => reply(&answer, version),
            Ok(HostStep::CreateSubChannels(count)) => {
                reply(&VstorPacket::completion(Status::SUCCESS), version);
                if let Err(error) = device.offer_subchannels(count) {
                    tracing::warn!(
                        controller = self.config.position.name(),
                        %error,
                        "sub-channels not offered"
                    );
                }
            }
            Ok(HostStep::Execute(request)) => {
                count(&self.counters.commands);
                let buffer = self.buffer(mem, packet, &request);
                let valid = buffer.is_ok();
                let job = Job {
                    channel: Arc::clone(channel),
                    transaction_id: packet.transaction_id(),
                    wants_completion: packet.wants_completion(),
                    version,
                    request,
                    buffer: buffer.unwrap_or_else(|error| {
                        tracing::debug!(controller = self.config.position.name(), %error);
                        GuestBuffer::empty(mem)
                    }),
                    ticket: 0,
                };
                if valid {
                    self.hostility
                        .forge(channel, job.transaction_id, &request, version);
                    return match self.queue.submit(job) {
                        Ok(()) => true,
                        Err(job) => {
                            self.abort([job]);
                            false
                        }
                    };
                }
                count(&self.counters.invalid);
                let mut answer = request;
                answer.set_answer(SrbCode::INVALID_REQUEST, ScsiStatus::GOOD, 0);
                self.answer(&job, &answer);
            }
            Ok(HostStep::Reset(operation, address)) => {
                count(&self.counters.resets);
                self.reset(operation, address);
                reply(&VstorPacket::completion(Status::SUCCESS), version);
            }
            // A step that a newer version of the state machine knows.
            Ok(_) => reply(&VstorPacket::completion(Status::NOT_SUPPORTED), version),
        }
        true
    }

    /// Answers commands that will not be executed because their channel or the controller goes.
    fn abort(&self, jobs: impl IntoIterator<Item = Job>) {
        // A dead host does not even do that.
        if self.queue.stall() == Stall::Everything {
            return;
        }
        for job in jobs {
            let mut answer = job.request;
            answer.set_answer(SrbCode::ABORTED, ScsiStatus::GOOD, 0);
            self.answer(&job, &answer);
        }
    }

    /// Ends all commands, or those of one unit, and resets what they were for.
    fn reset(&self, operation: Operation, address: LunAddress) {
        let only = (operation == Operation::RESET_LUN).then_some(address);
        for job in self.queue.abort(only) {
            let mut answer = job.request;
            answer.set_answer(SrbCode::BUS_RESET, ScsiStatus::GOOD, 0);
            self.answer(&job, &answer);
        }
        for (address, unit) in self.units() {
            if only.is_none_or(|only| only == address) {
                unit.reset();
            }
        }
    }

    /// The memory of a command's data, checked.
    fn buffer(
        &self,
        mem: &GuestMem,
        packet: &Packet<'_>,
        request: &ScsiRequest,
    ) -> Result<GuestBuffer, BufferError> {
        let mut buffer = GuestBuffer::empty(mem);
        if packet.packet_type() == PacketType::GPA_DIRECT {
            let direct = packet.gpa_direct(MAX_RANGES)?;
            if direct.byte_count() > self.config.max_transfer.into() {
                return Err(BufferError::TooLong(direct.byte_count()));
            }
            for range in direct.ranges() {
                buffer.append(GuestBuffer::from_pfns(
                    mem,
                    range.byte_offset(),
                    range.byte_count(),
                    range.pfns(),
                )?);
            }
        }
        let length = request.data_transfer_length.get();
        if length as usize > buffer.len() {
            return Err(BufferError::TooShort {
                length,
                buffer: buffer.len(),
            });
        }
        Ok(buffer)
    }

    /// Tells the guest that disks have come or gone, if it listens.
    fn notify(&self, operation: Operation) {
        let version = {
            let handshake = self.handshake();
            if !handshake.is_ready() {
                return;
            }
            handshake.version().unwrap_or(Version::V6_2)
        };
        let Some(primary) = self.channels().get(&0).cloned() else {
            return;
        };
        let packet = VstorPacket::notification(operation);
        // Transaction 0 is what nobody asked for.
        if let Err(error) = primary.writer.send(0, packet.bytes(version), false) {
            tracing::warn!(
                controller = self.config.position.name(),
                %error,
                "the guest was not told of a change of disks"
            );
        }
    }
}

/// What may come on a sub-channel.
fn allowed_on_sub_channel(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::EXECUTE_SRB
            | Operation::RESET_LUN
            | Operation::RESET_BUS
            | Operation::RESET_ADAPTER
    )
}

/// Why the data of a command cannot be used.
#[derive(Debug, thiserror::Error)]
enum BufferError {
    #[error("page list of a SCSI command: {0}")]
    Packet(PacketError),
    #[error("page list of a SCSI command: {0}")]
    Gpa(#[from] GpaError),
    #[error("page list of a SCSI command has {0} bytes, more than the transfer limit")]
    TooLong(u64),
    #[error("SCSI command for {length} bytes with a buffer of {buffer}")]
    TooShort { length: u32, buffer: usize },
}

impl From<PacketError> for BufferError {
    fn from(error: PacketError) -> Self {
        Self::Packet(error)
    }
}

/// A controller, with the threads that execute its commands.
pub(super) struct Controller {
    inner: Arc<Inner>,
    workers: Vec<JoinHandle<()>>,
}

impl Controller {
    /// A controller without disks.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn new(config: ControllerConfig) -> std::io::Result<Self> {
        let inner = Arc::new(Inner {
            handshake: Mutex::new(Inner::new_handshake(&config)),
            config,
            targets: RwLock::default(),
            queue: Queue::default(),
            channels: Mutex::default(),
            next_serial: AtomicU64::new(0),
            counters: Counters::default(),
            hostility: Hostility::default(),
        });
        let mut controller = Self {
            inner,
            workers: Vec::new(),
        };
        for number in 0..config.workers.max(1) {
            let inner = Arc::clone(&controller.inner);
            let thread = std::thread::Builder::new()
                .name(format!("{}-io{number}", config.position.name()))
                .spawn(move || inner.work())?;
            controller.workers.push(thread);
        }
        Ok(controller)
    }

    /// How the bus server offers it, and what serves it there.
    pub fn device(&self) -> (OfferParams, Box<dyn Vsp>) {
        let vsp = StorVsp {
            inner: Arc::clone(&self.inner),
            readers: BTreeMap::new(),
        };
        (self.inner.config.position.offer(), Box::new(vsp))
    }

    /// The lowest unit number that is free on a target.
    pub fn free_lun(&self, path: u8, target: u8) -> Option<u8> {
        let targets = self.inner.targets();
        let units = targets.get(&(path, target));
        (0..u8::MAX).find(|&lun| units.is_none_or(|units| units.unit(lun).is_none()))
    }

    /// Adds a unit, of which [`Controller::tell_of_units`] tells the guest. False if the address is
    /// taken.
    pub fn add(&self, address: LunAddress, unit: Arc<LogicalUnit>) -> bool {
        self.inner
            .targets_mut()
            .entry((address.path, address.target))
            .or_default()
            .add(address.lun, unit)
    }

    /// Tells the guest to look for new units. Waits if its ring is full.
    pub fn tell_of_units(&self) {
        self.inner.notify(Operation::ENUMERATE_BUS);
    }

    /// Takes a unit away, waits for its commands to end, and tells the guest.
    pub fn remove(&self, address: LunAddress) {
        let removed = self
            .inner
            .targets_mut()
            .get_mut(&(address.path, address.target))
            .and_then(|target| target.remove(address.lun));
        if removed.is_some() {
            self.inner.queue.wait_for_unit(address);
            self.inner.notify(Operation::REMOVE_DEVICE);
        }
    }

    /// Makes the controller stop answering, or answer again.
    pub fn set_stall(&self, stall: Stall) {
        self.inner.queue.set_stall(stall);
    }

    /// How it is to answer wrongly.
    pub fn hostility(&self) -> &Hostility {
        &self.inner.hostility
    }

    /// What was done so far.
    pub fn counters(&self) -> ControllerCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.inner.counters;
        ControllerCounters {
            commands: get(&counters.commands),
            answers: get(&counters.answers),
            invalid: get(&counters.invalid),
            resets: get(&counters.resets),
            lost_answers: get(&counters.lost_answers),
            in_flight: self.inner.queue.in_flight(),
            running: self.inner.queue.running(),
            channels: self.inner.channels().len(),
        }
    }

    /// The version of the storage protocol that the guest has negotiated.
    pub fn version(&self) -> Option<Version> {
        self.inner.handshake().version()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.inner.abort(self.inner.queue.end());
        for worker in self.workers.drain(..) {
            // A worker that panicked has been reported already.
            let _ = worker.join();
        }
    }
}

/// The controller as the bus server drives it.
struct StorVsp {
    inner: Arc<Inner>,
    /// Threads that read channels, by index.
    readers: BTreeMap<u16, JoinHandle<()>>,
}

impl Vsp for StorVsp {
    fn open(&mut self, channel: HostChannel, params: OpenParams) -> Result<(), OpenError> {
        let index = params.subchannel_index;
        if index == 0 {
            *self.inner.handshake() = Inner::new_handshake(&self.inner.config);
        }
        let (reader, writer) = channel.into_parts();
        let channel = Arc::new(Channel {
            serial: self.inner.next_serial.fetch_add(1, Ordering::Relaxed),
            index,
            writer,
        });
        self.inner.channels().insert(index, Arc::clone(&channel));
        let inner = Arc::clone(&self.inner);
        let thread = std::thread::Builder::new()
            .name(format!("{}-ch{index}", self.inner.config.position.name()))
            .spawn(move || inner.serve(&channel, reader));
        match thread {
            Ok(thread) => {
                self.readers.insert(index, thread);
                Ok(())
            }
            Err(error) => {
                self.inner.channels().remove(&index);
                Err(OpenError(format!("no thread for the channel: {error}")))
            }
        }
    }

    fn close(&mut self, subchannel_index: u16) {
        let Some(channel) = self.inner.channels().remove(&subchannel_index) else {
            return;
        };
        self.inner.abort(self.inner.queue.close(channel.serial));
        if let Some(reader) = self.readers.remove(&subchannel_index) {
            // If it panicked, the rest of the clean-up is still right.
            let _ = reader.join();
        }
        self.inner.queue.closed(channel.serial);
        if subchannel_index == 0 {
            *self.inner.handshake() = Inner::new_handshake(&self.inner.config);
        }
    }
}
