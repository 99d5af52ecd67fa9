// SPDX-License-Identifier: GPL-2.0

//! One controller: what it does with commands, with their answers, and with news of its units.
//!
//! Nothing in here is shared between controllers.

mod attachment;
mod recovery;

use self::attachment::Attachment;

use crate::{
    control::{
        self,
        Control, //
    },
    inflight::{
        Answered,
        Table, //
    },
    log::Limit,
    luns::{
        Pending,
        Task, //
    },
    params::{
        self,
        LogLevel, //
    },
    paths::{
        Path,
        Paths, //
    },
    presence::Presence,
    scsi::{
        self,
        Busy,
        Command,
        DeviceConfig,
        Direction,
        Geometry,
        Host,
        HostByte,
        Outcome,
        QueueMap,
        ResetOutcome,
        TimedOut,
        TimeoutAction, //
    }, //
};
use hv_proto::{
    inflight::Early,
    packet::{
        Packet,
        PacketType, //
    },
    scsi::{
        Opcode,
        ScsiStatus,
        Sense,
        SenseKey, //
    },
    segments,
    storage::{
        judge,
        Action,
        DataIn,
        LunAddress,
        Operation,
        ScsiRequest,
        SentCommand,
        SrbCode,
        Version,
        VstorPacket,
        PACKET_SIZE, //
    }, //
};
use kernel::{
    device,
    impl_has_work,
    new_mutex,
    new_spinlock_irq,
    new_work,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::Atomic,
        rcu,
        Arc,
        ArcBorrow,
        Mutex,
        SetOnce,
        SpinLockIrq, //
    },
    time::msecs_to_jiffies,
    workqueue::{
        Work,
        WorkItem, //
    }, //
};
use vmbus::{
    Channel,
    Event,
    OwnedQueue, //
};

/// How long the host is told that a command may take, in seconds.
const COMMAND_TIME: u32 = 60;

/// Time that a unit is given to say whether it is ready, in milliseconds.
const CHECK_TIME: u32 = 30_000;

/// An answer of the host to a command: `None` if it cannot be understood.
type Answer = Option<VstorPacket>;

/// What is known only when the host has been asked.
struct Io {
    version: Version,
    max_transfer_bytes: u32,
    table: Table<Controller, Answer>,
    /// Commands that one unit may have at a time.
    max_depth: u32,
}

/// A controller.
#[pin_data]
pub(crate) struct Controller {
    dev: ARef<device::Device>,
    #[pin]
    paths: Paths,
    #[pin]
    control: Control,
    io: SetOnce<Io>,
    presence: Presence,
    #[pin]
    attachment: Mutex<Attachment>,
    /// Time until the next try to attach a controller that is not, in milliseconds.
    patience: Atomic<u32>,
    /// The host is about to go.
    #[pin]
    stopping: Event,
    host: SetOnce<Host<Controller>>,
    #[pin]
    limit: Limit,
    /// For what must not be missed for the rest.
    #[pin]
    news: Limit,
    #[pin]
    pending: SpinLockIrq<Pending>,
    /// Where units are looked after; `None` before the host is registered, and when it is about to go.
    #[pin]
    queue: SpinLockIrq<Option<OwnedQueue>>,
    #[pin]
    work: Work<Controller, UNITS>,
    /// Where channels are looked after, which commands, also those about units, may be waiting for;
    /// `None` when all are about to be closed.
    #[pin]
    rescue: SpinLockIrq<Option<OwnedQueue>>,
    #[pin]
    rescue_work: Work<Controller, CHANNELS>,
}

/// Work item: units that have come, changed or gone are looked after.
const UNITS: u64 = 0;
/// Work item: channels that have gone are closed, and the controller is attached again.
const CHANNELS: u64 = 1;

impl_has_work! {
    impl HasWork<Self, 0> for Controller { self.work }
    impl HasWork<Self, 1> for Controller { self.rescue_work }
}

/// Limits of a controller, for its registration with the SCSI mid-layer.
pub(crate) struct Limits {
    /// Commands that a hardware queue takes at a time.
    pub(crate) can_queue: u16,
    /// Commands that one unit may have at a time.
    pub(crate) max_depth: u16,
    /// Number of hardware queues.
    pub(crate) queues: u16,
}

impl Controller {
    /// A controller with a primary channel that is not open yet, and room for `subchannels`.
    pub(crate) fn new(
        dev: ARef<device::Device>,
        primary: Arc<Channel>,
        subchannels: u16,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                dev,
                paths <- Paths::new(primary, subchannels),
                control <- Control::new(),
                io: SetOnce::new(),
                presence: Presence::new(),
                attachment <- new_mutex!(None, "storvsc_attachment"),
                patience: Atomic::new(recovery::RETRY_TIME),
                stopping <- Event::new(),
                host: SetOnce::new(),
                limit <- Limit::new(),
                news <- Limit::new(),
                pending <- new_spinlock_irq!(Pending::NONE, "storvsc_pending"),
                queue <- new_spinlock_irq!(None, "storvsc_queue"),
                work <- new_work!("storvsc_units"),
                rescue <- new_spinlock_irq!(
                    Some(OwnedQueue::rescue(c"storvsc_rescue")?),
                    "storvsc_rescue"
                ),
                rescue_work <- new_work!("storvsc_channels"),
            }),
            GFP_KERNEL,
        )
    }

    /// The channels.
    pub(crate) fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The host is registered: news of its units are acted on from now on.
    pub(crate) fn start(&self, host: Host<Controller>, queue: OwnedQueue) {
        self.host.populate(host);
        *self.queue.lock() = Some(queue);
    }

    /// Units are not looked after any more; waits until that has ended. Sleeps.
    pub(crate) fn stop(&self) {
        self.stopping.set();
        if !self.presence.is_attached() {
            // It need not be any more.
            self.control.finish();
        }
        // Dropping the queue waits, so that it is done out of the lock.
        let _queue = self.queue.lock().take();
    }

    /// The host has taken a channel back: ends all commands in flight on it. With the primary channel
    /// the others are closed, too. Process context.
    fn rescinded(self: ArcBorrow<'_, Self>, path: &Path) {
        path.set_dead();
        if path.index() == 0 {
            self.control.end();
        }
        if let Some(io) = self.io.as_ref() {
            io.table.fail(Some(path.index()), self.end_of(path));
        }
        self.look_after_channels();
    }

    /// The end of commands on a channel that the host has taken back.
    fn end_of(&self, path: &Path) -> HostByte {
        if path.index() == 0 || self.paths.is_gone() {
            HostByte::NO_CONNECT
        } else {
            // They can go over another channel.
            HostByte::REQUEUE
        }
    }

    /// A ring cannot be used any more. The host has the commands still: they end when the channels
    /// are closed. Any context.
    fn damaged(self: ArcBorrow<'_, Self>, path: &Path) {
        if path.set_dead() && self.news.allows() {
            dev_err!(
                self.dev,
                "the host has damaged the ring of channel {}\n",
                path.index()
            );
        }
        if path.index() == 0 {
            self.control.end();
        }
        self.presence.lose();
        self.look_after_channels();
    }

    /// Closes the sub-channels that the host has taken back. Sleeps.
    fn close_rescinded(&self) {
        self.paths.close_rescinded(|index| {
            if let Some(io) = self.io.as_ref() {
                io.table.fail(Some(index), HostByte::REQUEUE);
            }
        });
    }

    /// A packet has come. Softirq context.
    fn packet(self: ArcBorrow<'_, Self>, path: &Path, packet: &Packet<'_>) {
        let known = match packet.packet_type() {
            PacketType::COMPLETION => {
                self.completion(path, packet.transaction_id(), packet.payload())
            }
            PacketType::IN_BAND => match VstorPacket::operation_of(packet.payload()) {
                Some(Operation::ENUMERATE_BUS | Operation::REMOVE_DEVICE) => {
                    self.maintain(|pending| {
                        pending.check = true;
                        pending.scan = true;
                    });
                    true
                }
                _ => false,
            },
            _ => false,
        };
        if !known {
            path.count_unknown();
            if self.limit.allows() {
                dev_warn!(
                    self.dev,
                    "unexpected packet on channel {}: type {}, id {:#x}, {} bytes\n",
                    path.index(),
                    packet.packet_type().get(),
                    packet.transaction_id(),
                    packet.payload().len()
                );
            }
        }
    }

    /// A completion has come. Says whether it was one for something.
    fn completion(self: ArcBorrow<'_, Self>, path: &Path, id: u64, payload: &[u8]) -> bool {
        if control::is_control(id) {
            return path.index() == 0 && self.control.answer(id, payload);
        }
        let Some(io) = self.io.as_ref() else {
            return false;
        };
        let answer = VstorPacket::parse(payload, PACKET_SIZE)
            .ok()
            .filter(|packet| packet.operation == Operation::COMPLETE_IO);
        let known = match io.table.answer(id, path.index(), answer) {
            Answered::Command(cmd, answer) => {
                self.finish(cmd, answer);
                true
            }
            Answered::Done => true,
            Answered::Unknown => false,
        };
        if known {
            path.count_completed();
        }
        known
    }

    /// Ends a command with the host's answer.
    fn finish(self: ArcBorrow<'_, Self>, mut cmd: Command<Self>, answer: Answer) {
        let Some(packet) = answer else {
            cmd.complete(Outcome::failed(HostByte::ERROR));
            return;
        };
        let answer = packet.scsi_request();
        let verdict = judge(
            &SentCommand {
                opcode: Opcode::new(cmd.opcode()),
                data_length: cmd.data_len(),
                min_transfer: cmd.min_transfer(),
            },
            &answer,
        );
        if answer.srb_status.code() != SrbCode::SUCCESS || answer.scsi_status != ScsiStatus::GOOD {
            self.log_failure(&cmd, &packet, &answer);
        }

        let (status, host) = match verdict.action {
            Action::Finish(status) => (status, HostByte::OK),
            Action::PassThrough(status) => (status, HostByte::PASSTHROUGH),
            Action::Fail => (ScsiStatus::GOOD, HostByte::ERROR),
            Action::RescanAndRequeue => {
                let address = cmd.device().address();
                self.maintain(|pending| pending.add(Task::Rescan(address)));
                (ScsiStatus::GOOD, HostByte::REQUEUE)
            }
            Action::RemoveLun => {
                // A unit that is only being looked for is not there to be removed.
                if cmd.device().is_running() {
                    let address = cmd.device().address();
                    self.maintain(|pending| pending.add(Task::Remove(address)));
                }
                (ScsiStatus::GOOD, HostByte::NO_CONNECT)
            }
        };
        if !verdict.sense().is_empty() {
            cmd.set_sense(verdict.sense());
        }
        let transferred = cmd.data_len().saturating_sub(verdict.residual);
        cmd.complete(Outcome {
            status: status.get(),
            host,
            transferred,
        });
    }

    /// Ends a command that came to its end while it was being sent.
    fn finish_early(self: ArcBorrow<'_, Self>, cmd: Command<Self>, early: Early<Answer, HostByte>) {
        match early {
            Early::Answered(answer) => self.finish(cmd, answer),
            Early::Failed(host) => cmd.complete(Outcome::failed(host)),
        }
    }

    fn log_failure(&self, cmd: &Command<Self>, packet: &VstorPacket, answer: &ScsiRequest) {
        // What a scan tries in vain, and what is news rather than an error, is no more than a warning.
        let expected = cmd.opcode() == Opcode::TEST_UNIT_READY.get()
            || Sense::parse(answer.sense()).is_some_and(|sense| {
                matches!(
                    sense.key,
                    SenseKey::ILLEGAL_REQUEST | SenseKey::UNIT_ATTENTION
                )
            })
            || !cmd.device().is_running();
        let level = if expected {
            LogLevel::Warning
        } else {
            LogLevel::Error
        };
        if params::logs(level) && self.limit.allows() {
            dev_warn!(
                self.dev,
                "tag#{} cmd {:#x} status: scsi {:#x} srb {:#x} host {:#x}\n",
                cmd.tag(),
                cmd.opcode(),
                answer.scsi_status.get(),
                answer.srb_status.raw(),
                packet.status.get()
            );
        }
    }

    /// Notes something to be done outside of the path of I/O, and sees to it that it is. Any context.
    fn maintain(self: ArcBorrow<'_, Self>, note: impl FnOnce(&mut Pending)) {
        let queue = self.queue.lock();
        if let Some(queue) = &*queue {
            note(&mut self.pending.lock());
            // It may be queued already; it sees the note then.
            let _ = queue.enqueue::<Arc<Self>, UNITS>(Arc::from(self));
        }
    }

    /// Sees to it that channels that have gone are closed, and the controller is attached again. Any
    /// context. Says whether it will be.
    fn look_after_channels(self: ArcBorrow<'_, Self>) -> bool {
        let queue = self.rescue.lock();
        if let Some(queue) = &*queue {
            // It may be queued already; it sees what is to be done then.
            let _ = queue.enqueue::<Arc<Self>, CHANNELS>(Arc::from(self));
        }
        queue.is_some()
    }

    /// Does the tasks about single units.
    fn run_tasks(&self, host: &Host<Self>, pending: &Pending) {
        for task in pending.tasks() {
            match task {
                Task::Rescan(address) => {
                    if let Some(device) = host.device(address) {
                        device.rescan();
                    }
                }
                Task::Remove(address) => {
                    if let Some(device) = host.device(address) {
                        device.remove();
                    }
                }
            }
        }
    }

    fn take_pending(&self) -> Pending {
        core::mem::replace(&mut *self.pending.lock(), Pending::NONE)
    }

    /// The request for a command.
    ///
    /// # Errors
    ///
    /// The host byte that the command must end with.
    fn request(cmd: &Command<Self>) -> Result<ScsiRequest, HostByte> {
        let address = cmd.device().address();
        let address = LunAddress {
            path: u8::try_from(address.channel).map_err(|_| HostByte::NO_CONNECT)?,
            target: u8::try_from(address.id).map_err(|_| HostByte::NO_CONNECT)?,
            lun: u8::try_from(address.lun).map_err(|_| HostByte::NO_CONNECT)?,
        };
        let data_in = match cmd.direction().map_err(|_| HostByte::ERROR)? {
            Direction::None => DataIn::NONE,
            Direction::ToDevice => DataIn::WRITE,
            Direction::FromDevice => DataIn::READ,
        };
        let mut request =
            ScsiRequest::new(address, cmd.cdb(), data_in, cmd.data_len()).ok_or(HostByte::ERROR)?;
        request.time_out_value = COMMAND_TIME.into();
        if cmd.device().tagged_supported() {
            request.set_simple_tag();
        }
        Ok(request)
    }

    /// Puts a packet with a command into the ring of `path`.
    fn send(path: &Path, cmd: &Command<Self>, packet: &[u8], start: u32, id: u64) -> Result {
        match cmd.data_len() {
            0 => path.channel().send(packet, id, true),
            len => path.channel().send_gpa_iter(
                len,
                start,
                segments::frames(cmd.segments()),
                packet,
                id,
            ),
        }
    }

    /// Sends a command, and takes it over; gives it back if it must wait.
    fn queue(self: ArcBorrow<'_, Self>, mut cmd: Command<Self>) -> Result<(), Busy<Self>> {
        let Some(io) = self.io.as_ref() else {
            cmd.complete(Outcome::failed(HostByte::NO_CONNECT));
            return Ok(());
        };
        let request = match Self::request(&cmd) {
            Ok(request) => request,
            Err(host) => {
                cmd.complete(Outcome::failed(host));
                return Ok(());
            }
        };
        let packet = VstorPacket::execute(&request);

        let mut start = 0;
        if cmd.data_len() != 0 {
            if cmd.map().is_err() {
                return Err(Busy(cmd));
            }
            match segments::start(cmd.segments(), cmd.data_len()) {
                Some(offset) => start = offset,
                None => {
                    cmd.complete(Outcome::failed(HostByte::ERROR));
                    return Ok(());
                }
            }
        }

        let tag = cmd.unique_tag();
        // Who closes the channels says so first, then waits for this to be let go, and then ends the
        // commands in the table.
        let guard = rcu::read_lock();
        let path = if self.presence.is_attached() {
            self.paths.select(&guard, tag.queue)
        } else {
            None
        };
        let Some(path) = path else {
            if self.presence.is_reattaching() && !self.paths.is_gone() && self.look_after_channels()
            {
                return Err(Busy(cmd));
            }
            cmd.complete(Outcome::failed(HostByte::NO_CONNECT));
            return Ok(());
        };
        let Some(id) = io.table.begin(tag, path.index()) else {
            return Err(Busy(cmd));
        };
        // The order matters: a channel that goes is marked first, and then its commands in the table
        // are ended. Either that sees this command there, or this sees the mark.
        let sent = if path.is_dead() || self.paths.is_gone() {
            Err(ENODEV)
        } else {
            Self::send(&path, &cmd, packet.bytes(io.version), start, id.to_wire())
        };
        match sent {
            Ok(()) => {
                path.count_sent();
                if let Err((cmd, early)) = io.table.commit(id, cmd) {
                    self.finish_early(cmd, early);
                }
            }
            Err(e) => {
                if let Some(early) = io.table.cancel(id) {
                    self.finish_early(cmd, early);
                } else if e == EAGAIN {
                    path.count_busy();
                    return Err(Busy(cmd));
                } else if e == EMSGSIZE || e == EINVAL {
                    cmd.complete(Outcome::failed(HostByte::ERROR));
                } else {
                    // The host has taken the channel back, or its ring is damaged, which this may be
                    // the first to see.
                    let end = if path.channel().is_rescinded() || self.paths.is_gone() {
                        path.set_dead();
                        self.end_of(&path)
                    } else {
                        self.damaged(&path);
                        HostByte::REQUEUE
                    };
                    cmd.complete(Outcome::failed(end));
                }
            }
        }
        Ok(())
    }
}

impl WorkItem<CHANNELS> for Controller {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.close_rescinded();
        if !this.restore() {
            this.as_arc_borrow().look_after_channels();
        }
    }
}

impl WorkItem<UNITS> for Controller {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let Some(host) = this.host.as_ref() else {
            return;
        };
        let pending = this.take_pending();
        this.run_tasks(host, &pending);
        if pending.check {
            // The answers tell which units are gone; they become tasks.
            host.for_each_device(|device| device.test_unit_ready(msecs_to_jiffies(CHECK_TIME)));
            let found = this.take_pending();
            this.run_tasks(host, &found);
            // What came meanwhile and is not of the check must not be lost.
            if found.check || found.scan {
                this.as_arc_borrow().maintain(|pending| {
                    pending.check |= found.check;
                    pending.scan |= found.scan;
                });
            }
        }
        if pending.scan {
            host.scan();
        }
    }
}

#[vtable]
impl scsi::Operations for Controller {
    const NAME: &'static CStr = c"storvsc_host";

    const VIRT_BOUNDARY_MASK: usize = hv_proto::PAGE_SIZE - 1;

    fn queue_command(this: ArcBorrow<'_, Self>, cmd: Command<Self>) -> Result<(), Busy<Self>> {
        this.queue(cmd)
    }

    fn timed_out(&self, cmd: &TimedOut<'_>) -> TimeoutAction {
        self.timed_out(cmd.unique_tag())
    }

    fn host_reset(this: ArcBorrow<'_, Self>) -> ResetOutcome {
        this.reset()
    }

    fn device_init(&self, dev: &mut DeviceConfig<'_>) -> Result {
        // Hyper-V's disks claim SPC-2 but know VPD pages; its DVD drives answer REPORT LUNS.
        dev.set_modern();
        Ok(())
    }

    fn device_configure(&self, dev: &mut DeviceConfig<'_>) -> Result {
        let version = self.io.as_ref().ok_or(ENODEV)?.version;
        dev.set_timeout(msecs_to_jiffies(
            params::request_timeout().saturating_mul(1000),
        ));
        // Hosts do not know MAINTENANCE IN, which this would be asked with.
        dev.set_no_report_opcodes();
        let microsoft = dev.vendor().starts_with(b"Msft");
        // 6.0 hosts make disks that are SPC-3 and say that they are less.
        if microsoft && version == Version::V6_0 {
            dev.set_level(scsi::Level::Spc3);
        }
        dev.set_no_write_same(!(microsoft && version >= Version::V6_2));
        Ok(())
    }

    fn max_queue_depth(&self) -> u32 {
        self.io.as_ref().map_or(1, |io| io.max_depth)
    }

    fn map_queues(&self, map: &mut QueueMap<'_>) {
        self.paths.map_queues(map);
    }

    fn geometry(capacity: u64) -> Geometry {
        const HEADS: u16 = 255;
        const SECTORS: u16 = 63;
        let cylinders = capacity / (u64::from(HEADS) * u64::from(SECTORS));
        Geometry {
            heads: HEADS,
            sectors: SECTORS,
            cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX),
        }
    }
}
