// SPDX-License-Identifier: MIT OR Apache-2.0

//! The SynIC's user-space half: message slots and event flags in guest memory, and the interrupts
//! that announce them. KVM keeps the registers, raises the vectors and tells of EOM. TLFS chapter
//! 11; Linux `Documentation/virt/kvm/api.rst`, `KVM_CAP_HYPERV_SYNIC2`.
//!
//! A message slot holds one message until the guest clears its type. While more messages wait, the
//! slot's flag "pending" asks the guest to write EOM afterwards; KVM then signals the EOM event,
//! and [`Synic::deliver`] fills the slot again. The event is armed only while messages wait:
//! without auto-EOI each end of an interrupt would signal it too.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use hv_proto::ids::{ConnectionId, VpIndex};
use hv_proto::synic::{
    EVENT_FLAGS_COUNT, HvMessage, MESSAGE_FLAGS_OFFSET, MESSAGE_PENDING, SINT_COUNT,
    SynicMessageType, is_enabled, page_address, slot_offset,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::{ReferenceClock, ReferenceTime, SynicError, SynicPort};
use crate::counters::Counter;

/// Most messages that wait for one SINT of one processor. The VMBus server's protocol keeps far
/// below it (an offer for each of 2047 channels at most, and the answers); a guest that does not
/// empty its slot fills this and no more.
const QUEUE_LIMIT: usize = 4096;

/// Most messages that wait for all of them. The server sends to one SINT at a time, but a guest
/// can name others without end.
const TOTAL_LIMIT: usize = 4 * QUEUE_LIMIT;

/// What the SynIC needs of the hypervisor below it. KVM is the implementation; tests have theirs.
pub trait Interrupts: Send + Sync {
    /// Raises SINT `sint` of processor `vp`. Numbers are checked by the caller.
    ///
    /// # Errors
    /// Of the system.
    fn raise(&self, vp: u32, sint: u8) -> io::Result<()>;
    /// Signals the EOM event of the VM whenever the guest ends an interrupt of this SINT or writes
    /// EOM, until the returned guard is dropped. Numbers are checked by the caller.
    ///
    /// # Errors
    /// Of the system.
    fn arm_eom(&self, vp: u32, sint: u8) -> io::Result<Box<dyn Send>>;
    /// Makes HvSignalEvent on the connection write to `event`.
    ///
    /// # Errors
    /// Of the system.
    fn bind(&self, connection: ConnectionId, event: &EventFd) -> io::Result<()>;
    /// Undoes [`Interrupts::bind`].
    fn unbind(&self, connection: ConnectionId);
    /// What time it is.
    ///
    /// # Errors
    /// Of the system.
    fn time(&self) -> io::Result<ReferenceTime>;
}

/// The SynIC of all virtual processors of one VM. It outlives a reset of the VM.
pub struct Synic {
    memory: Arc<GuestMemoryMmap>,
    vps: Vec<Vp>,
    interrupts: RwLock<Option<Arc<dyn Interrupts>>>,
    counters: SynicCounters,
    /// Messages that wait, in all queues.
    waiting: AtomicUsize,
}

/// Counts of the SynIC.
#[derive(Debug, Default)]
pub struct SynicCounters {
    /// Messages that the server posted.
    pub messages_posted: Counter,
    /// Messages that were put into a slot.
    pub messages_delivered: Counter,
    /// Deliveries that found the slot occupied.
    pub slot_busy: Counter,
    /// Event flags that the server signalled.
    pub events_signalled: Counter,
    /// Of these, those whose flag was set already, so that no interrupt was raised.
    pub events_merged: Counter,
    /// Interrupts raised.
    pub interrupts: Counter,
}

#[derive(Default)]
struct Vp {
    /// Held for reading while a page is written, so that the guest cannot take a page back in the
    /// middle of it.
    registers: RwLock<Registers>,
    queues: Mutex<[Queue; SINT_COUNT as usize]>,
}

/// Messages that wait for one SINT.
#[derive(Default)]
struct Queue {
    messages: VecDeque<HvMessage>,
    /// Keeps the EOM event armed.
    eom: Option<Box<dyn Send>>,
}

#[derive(Clone, Copy, Default)]
struct Registers {
    control: u64,
    siefp: u64,
    simp: u64,
}

impl Registers {
    fn slot(page: u64, control: u64, sint: u8) -> Option<GuestAddress> {
        let offset = slot_offset(sint)? as u64;
        if !is_enabled(control) || !is_enabled(page) {
            return None;
        }
        page_address(page).checked_add(offset).map(GuestAddress)
    }

    fn message_slot(&self, sint: u8) -> Option<GuestAddress> {
        Self::slot(self.simp, self.control, sint)
    }

    fn event_flags(&self, sint: u8) -> Option<GuestAddress> {
        Self::slot(self.siefp, self.control, sint)
    }
}

/// Whether a slot took a message.
#[derive(Debug, PartialEq, Eq)]
enum Slot {
    Filled,
    Busy,
    /// The slot lies outside of guest memory: the guest's own doing.
    Unreachable,
}

impl Synic {
    /// The SynIC of `cpus` processors, all off.
    pub fn new(memory: Arc<GuestMemoryMmap>, cpus: u32) -> Synic {
        Synic {
            memory,
            vps: (0..cpus).map(|_| Vp::default()).collect(),
            interrupts: RwLock::new(None),
            counters: SynicCounters::default(),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Connects to the hypervisor below, or to none. Everything about the guest is forgotten, as
    /// after a reset.
    pub fn attach(&self, interrupts: Option<Arc<dyn Interrupts>>) {
        *write(&self.interrupts) = interrupts;
        for vp in &self.vps {
            *write(&vp.registers) = Registers::default();
            for queue in lock(&vp.queues).iter_mut() {
                let forgotten = std::mem::take(queue).messages.len();
                self.waiting.fetch_sub(forgotten, Ordering::Relaxed);
            }
        }
    }

    /// The guest wrote SynIC registers of processor `vp`: their new values.
    pub fn set_registers(&self, vp: u32, control: u64, siefp: u64, simp: u64) {
        let Some(state) = self.vps.get(vp as usize) else {
            return;
        };
        tracing::debug!(vp, control, siefp, simp, "SynIC registers");
        *write(&state.registers) = Registers {
            control,
            siefp,
            simp,
        };
        drop(self.deliver_vp(vp));
    }

    /// Puts waiting messages of all processors into slots that are free. To be called at EOM.
    pub fn deliver(&self) {
        for vp in 0..self.vps.len() as u32 {
            let done = self.deliver_vp(vp);
            // Without the lock: this waits for KVM.
            drop(done);
        }
    }

    /// Whether each processor's SynIC is on, in the order of the processors.
    pub fn enabled(&self) -> Vec<bool> {
        let on = |vp: &Vp| is_enabled(read(&vp.registers).control);
        self.vps.iter().map(on).collect()
    }

    /// The counts.
    pub fn counters(&self) -> &SynicCounters {
        &self.counters
    }

    fn vp(&self, vp: VpIndex) -> Result<&Vp, SynicError> {
        usize::try_from(vp.get())
            .ok()
            .and_then(|index| self.vps.get(index))
            .ok_or(SynicError::NoSuchVp(vp))
    }

    /// Returns what keeps the EOM events of empty queues armed.
    fn deliver_vp(&self, vp: u32) -> Vec<Box<dyn Send>> {
        let Some(state) = self.vps.get(vp as usize) else {
            return Vec::new();
        };
        let mut queues = lock(&state.queues);
        let mut done = Vec::new();
        for (sint, queue) in (0..SINT_COUNT).zip(queues.iter_mut()) {
            self.deliver_queue(vp, sint, state, queue);
            if queue.messages.is_empty() {
                done.extend(queue.eom.take());
            }
        }
        done
    }

    fn deliver_queue(&self, vp: u32, sint: u8, state: &Vp, queue: &mut Queue) {
        while let Some(&message) = queue.messages.front() {
            let slot = {
                let registers = read(&state.registers);
                let Some(address) = registers.message_slot(sint) else {
                    return;
                };
                fill_slot(&self.memory, address, message, queue.messages.len() > 1)
            };
            match slot {
                Slot::Filled => {
                    queue.messages.pop_front();
                    self.waiting.fetch_sub(1, Ordering::Relaxed);
                    self.counters.messages_delivered.add(1);
                    self.raise(vp, sint);
                }
                Slot::Busy => {
                    self.counters.slot_busy.add(1);
                    // The guest may free the slot before the event is armed: then look again.
                    if queue.eom.is_some() || !self.arm_eom(vp, sint, queue) {
                        return;
                    }
                }
                Slot::Unreachable => {
                    tracing::debug!(vp, sint, "the message page is not in guest memory");
                    return;
                }
            }
        }
    }

    fn arm_eom(&self, vp: u32, sint: u8, queue: &mut Queue) -> bool {
        let Some(interrupts) = read(&self.interrupts).clone() else {
            return false;
        };
        match interrupts.arm_eom(vp, sint) {
            Ok(guard) => {
                queue.eom = Some(guard);
                true
            }
            Err(error) => {
                tracing::error!(vp, sint, %error, "messages may be late: arming EOM failed");
                false
            }
        }
    }

    fn raise(&self, vp: u32, sint: u8) {
        let interrupts = read(&self.interrupts).clone();
        if let Some(interrupts) = interrupts {
            self.counters.interrupts.add(1);
            if let Err(error) = interrupts.raise(vp, sint) {
                tracing::warn!(vp, sint, %error, "raising a SINT failed");
            }
        }
    }
}

/// Puts `message` into a slot if it is free; otherwise asks the guest for an EOM.
fn fill_slot(
    memory: &GuestMemoryMmap,
    slot: GuestAddress,
    mut message: HvMessage,
    more: bool,
) -> Slot {
    // The type is the first field, and says whether the slot is free.
    let free = |memory: &GuestMemoryMmap| {
        memory
            .load::<u32>(slot, Ordering::Acquire)
            .map(|kind| kind == SynicMessageType::NONE.get())
    };
    match free(memory) {
        Ok(true) => {}
        Ok(false) => {
            // The guest clears the type first and looks at the flag then. So after the flag is
            // set, either the type is clear now or the guest will see the flag.
            if set_bits(memory, slot, MESSAGE_FLAGS_OFFSET, MESSAGE_PENDING).is_none() {
                return Slot::Unreachable;
            }
            fence(Ordering::SeqCst);
            match free(memory) {
                Ok(true) => {}
                Ok(false) => return Slot::Busy,
                Err(_) => return Slot::Unreachable,
            }
        }
        Err(_) => return Slot::Unreachable,
    }
    message.flags = if more { MESSAGE_PENDING } else { 0 };
    let bytes = message.as_bytes();
    let (kind, body) = bytes.split_at(size_of::<u32>());
    let Some(body_address) = slot.0.checked_add(kind.len() as u64) else {
        return Slot::Unreachable;
    };
    let written = memory.write_slice(body, GuestAddress(body_address));
    let kind = message.message_type.get();
    match written.and_then(|()| memory.store(kind, slot, Ordering::Release)) {
        Ok(()) => Slot::Filled,
        Err(_) => Slot::Unreachable,
    }
}

/// Sets bits of the byte at `base + offset` atomically and returns the byte's old value. The
/// access is to the aligned 32-bit word around it.
fn set_bits(memory: &GuestMemoryMmap, base: GuestAddress, offset: usize, bits: u8) -> Option<u8> {
    let address = base.0.checked_add(offset as u64)?;
    let shift = (address % 4) * 8;
    let slice = memory
        .get_slice(GuestAddress(address & !3), size_of::<u32>())
        .ok()?;
    let word = slice.get_atomic_ref::<AtomicU32>(0).ok()?;
    let old = word.fetch_or(u32::from(bits) << shift, Ordering::SeqCst);
    Some((old >> shift) as u8)
}

impl ReferenceClock for Synic {
    fn now(&self) -> Option<ReferenceTime> {
        let interrupts = read(&self.interrupts).clone()?;
        let time = interrupts.time();
        time.inspect_err(|error| tracing::warn!(%error, "reading the guest's clock"))
            .ok()
    }
}

impl SynicPort for Synic {
    fn post_message(
        &self,
        vp: VpIndex,
        sint: u8,
        message_type: u32,
        payload: &[u8],
    ) -> Result<(), SynicError> {
        let state = self.vp(vp)?;
        let message = HvMessage::new(SynicMessageType::new(message_type), payload)
            .ok_or(SynicError::PayloadTooLong(payload.len()))?;
        let mut queues = lock(&state.queues);
        let queue = queues
            .get_mut(usize::from(sint))
            .ok_or(SynicError::NoSuchSint(sint))?;
        let waiting = self.waiting.load(Ordering::Relaxed);
        if queue.messages.len() >= QUEUE_LIMIT || waiting >= TOTAL_LIMIT {
            return Err(SynicError::QueueFull(vp));
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        queue.messages.push_back(message);
        self.counters.messages_posted.add(1);
        self.deliver_queue(vp.get(), sint, state, queue);
        Ok(())
    }

    fn signal_event(&self, vp: VpIndex, sint: u8, flag: u16) -> Result<(), SynicError> {
        let state = self.vp(vp)?;
        if sint >= SINT_COUNT {
            return Err(SynicError::NoSuchSint(sint));
        }
        if flag >= EVENT_FLAGS_COUNT {
            return Err(SynicError::NoSuchFlag(flag));
        }
        let bit = 1u8 << (flag % 8);
        let old = {
            let registers = read(&state.registers);
            let flags = registers
                .event_flags(sint)
                .ok_or(SynicError::NotEnabled(vp))?;
            set_bits(&self.memory, flags, usize::from(flag / 8), bit)
                .ok_or(SynicError::NotEnabled(vp))?
        };
        self.counters.events_signalled.add(1);
        if old & bit == 0 {
            self.raise(vp.get(), sint);
        } else {
            self.counters.events_merged.add(1);
        }
        Ok(())
    }

    fn bind_event(
        &self,
        connection: ConnectionId,
        event: EventFd,
    ) -> Result<Box<dyn Send>, SynicError> {
        if !connection.is_valid() {
            return Err(SynicError::BadConnection(connection));
        }
        let system = |source| SynicError::System {
            what: "binding an event",
            source,
        };
        let Some(interrupts) = read(&self.interrupts).clone() else {
            return Err(system(io::ErrorKind::NotConnected.into()));
        };
        interrupts.bind(connection, &event).map_err(|error| {
            if error.kind() == io::ErrorKind::AlreadyExists {
                SynicError::BadConnection(connection)
            } else {
                system(error)
            }
        })?;
        Ok(Box::new(Binding {
            interrupts: Arc::downgrade(&interrupts),
            connection,
            _event: event,
        }))
    }
}

/// A bound connection; unbinds when dropped, if its VM still exists.
struct Binding {
    interrupts: Weak<dyn Interrupts>,
    connection: ConnectionId,
    _event: EventFd,
}

impl Drop for Binding {
    fn drop(&mut self) {
        if let Some(interrupts) = self.interrupts.upgrade() {
            interrupts.unbind(self.connection);
        }
    }
}

// A panic while one of these locks is held leaves nothing half-done that matters here.

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {

    use hv_proto::synic::VMBUS_SINT;
    use zerocopy::FromZeros;

    use super::*;

    const SIMP: u64 = 0x1000;
    const SIEFP: u64 = 0x2000;
    const SLOT: u64 = SIMP + VMBUS_SINT as u64 * 256;
    const FLAGS: u64 = SIEFP + VMBUS_SINT as u64 * 256;

    #[derive(Default)]
    struct Recorder {
        raised: Mutex<Vec<(u32, u8)>>,
        bound: Mutex<Vec<u32>>,
        armed: Arc<AtomicUsize>,
    }

    struct Armed(Arc<AtomicUsize>);

    impl Drop for Armed {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl Interrupts for Recorder {
        fn time(&self) -> io::Result<ReferenceTime> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn raise(&self, vp: u32, sint: u8) -> io::Result<()> {
            lock(&self.raised).push((vp, sint));
            Ok(())
        }

        fn arm_eom(&self, vp: u32, sint: u8) -> io::Result<Box<dyn Send>> {
            assert_eq!((vp, sint), (1, VMBUS_SINT));
            self.armed.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(Armed(self.armed.clone())))
        }

        fn bind(&self, connection: ConnectionId, _event: &EventFd) -> io::Result<()> {
            let mut bound = lock(&self.bound);
            if bound.contains(&connection.get()) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            bound.push(connection.get());
            Ok(())
        }

        fn unbind(&self, connection: ConnectionId) {
            lock(&self.bound).retain(|&c| c != connection.get());
        }
    }

    struct Bench {
        synic: Arc<Synic>,
        recorder: Arc<Recorder>,
        memory: Arc<GuestMemoryMmap>,
    }

    impl Bench {
        /// Two processors; the SynIC of the second is on.
        fn new() -> Bench {
            let memory =
                Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap());
            let synic = Arc::new(Synic::new(memory.clone(), 2));
            let recorder = Arc::new(Recorder::default());
            synic.attach(Some(recorder.clone()));
            synic.set_registers(1, 1, SIEFP | 1, SIMP | 1);
            Bench {
                synic,
                recorder,
                memory,
            }
        }

        fn post(&self, payload: &[u8]) {
            self.synic
                .post_message(VpIndex::new(1), VMBUS_SINT, 1, payload)
                .unwrap();
        }

        fn slot(&self) -> HvMessage {
            let mut message = HvMessage::new_zeroed();
            self.memory
                .read_slice(message.as_mut_bytes(), GuestAddress(SLOT))
                .unwrap();
            message
        }

        /// The guest takes the message: clears the type and returns the payload and whether it
        /// must write EOM.
        fn take(&self) -> (Vec<u8>, bool) {
            let message = self.slot();
            assert_ne!(message.message_type, SynicMessageType::NONE);
            self.memory
                .store(0u32, GuestAddress(SLOT), Ordering::SeqCst)
                .unwrap();
            let pending = self.slot().is_pending();
            (message.payload().unwrap().to_vec(), pending)
        }

        fn armed(&self) -> usize {
            self.recorder.armed.load(Ordering::SeqCst)
        }

        fn raised(&self) -> usize {
            let mut raised = lock(&self.recorder.raised);
            assert!(raised.iter().all(|&r| r == (1, VMBUS_SINT)));
            std::mem::take(&mut *raised).len()
        }
    }

    #[test]
    fn messages_arrive_in_order_one_at_a_time() {
        let bench = Bench::new();
        for payload in [b"one", b"two", b"six"] {
            bench.post(payload);
        }
        assert_eq!((bench.raised(), bench.armed()), (1, 1));
        assert_eq!(bench.take(), (b"one".to_vec(), true));
        bench.synic.deliver();
        assert_eq!(bench.raised(), 1);
        assert_eq!(bench.take(), (b"two".to_vec(), true));
        bench.synic.deliver();
        assert_eq!(bench.armed(), 0);
        assert_eq!(bench.take(), (b"six".to_vec(), false));
        bench.synic.deliver();
        assert_eq!(bench.slot().message_type, SynicMessageType::NONE);
    }

    #[test]
    fn a_single_message_needs_no_eom() {
        let bench = Bench::new();
        bench.post(&[7; 240]);
        assert_eq!(bench.take(), (vec![7; 240], false));
        assert_eq!(bench.armed(), 0);
    }

    #[test]
    fn a_busy_slot_gets_the_pending_flag_and_nothing_else() {
        let bench = Bench::new();
        bench.post(b"first");
        assert!(!bench.slot().is_pending());
        bench.post(b"second");
        let slot = bench.slot();
        assert!(slot.is_pending());
        assert_eq!(slot.payload(), Some(&b"first"[..]));
    }

    #[test]
    fn messages_wait_until_the_guest_enables_the_page() {
        let bench = Bench::new();
        bench.synic.set_registers(1, 0, 0, 0);
        bench.post(b"early");
        assert_eq!(bench.raised(), 0);
        bench.synic.set_registers(1, 0, 0, SIMP | 1);
        assert_eq!(bench.raised(), 0);
        bench.synic.set_registers(1, 1, 0, SIMP | 1);
        assert_eq!(bench.raised(), 1);
        assert_eq!(bench.take().0, b"early");
    }

    #[test]
    fn the_queue_is_bounded() {
        let bench = Bench::new();
        // The first one goes into the slot.
        for _ in 0..=QUEUE_LIMIT {
            bench.post(b"x");
        }
        let result = bench
            .synic
            .post_message(VpIndex::new(1), VMBUS_SINT, 1, b"x");
        assert!(matches!(result, Err(SynicError::QueueFull(_))));
    }

    #[test]
    fn all_queues_together_are_bounded() {
        let bench = Bench::new();
        bench.synic.set_registers(1, 0, 0, 0);
        let post = |sint| {
            let vp = VpIndex::new(1);
            bench.synic.post_message(vp, sint, 1, b"x").is_ok()
        };
        let taken = |_| -> usize {
            (0..SINT_COUNT)
                .map(|sint| (0..QUEUE_LIMIT).filter(|_| post(sint)).count())
                .sum()
        };
        assert_eq!(taken(0), TOTAL_LIMIT);
        assert_eq!(taken(1), 0);
        // A reset forgets them.
        bench.synic.attach(None);
        assert_eq!(taken(2), TOTAL_LIMIT);
    }

    #[test]
    fn event_flag_raises_only_when_it_was_clear() {
        let bench = Bench::new();
        let signal = |flag| {
            bench
                .synic
                .signal_event(VpIndex::new(1), VMBUS_SINT, flag)
                .unwrap();
        };
        signal(13);
        signal(13);
        assert_eq!(bench.raised(), 1);
        let byte: u8 = bench.memory.read_obj(GuestAddress(FLAGS + 1)).unwrap();
        assert_eq!(byte, 1 << 5);
        signal(2047);
        assert_eq!(bench.raised(), 1);
        let byte: u8 = bench.memory.read_obj(GuestAddress(FLAGS + 255)).unwrap();
        assert_eq!(byte, 0x80);
        // The guest's other pages and slots are untouched.
        let word: u64 = bench.memory.read_obj(GuestAddress(FLAGS + 256)).unwrap();
        assert_eq!(word, 0);
    }

    #[test]
    fn numbers_out_of_range_are_errors() {
        let bench = Bench::new();
        let synic = &bench.synic;
        let vp = VpIndex::new(1);
        assert!(matches!(
            synic.signal_event(VpIndex::new(2), 2, 1),
            Err(SynicError::NoSuchVp(_))
        ));
        assert!(matches!(
            synic.signal_event(VpIndex::new(0), 2, 1),
            Err(SynicError::NotEnabled(_))
        ));
        assert!(matches!(
            synic.signal_event(vp, 16, 1),
            Err(SynicError::NoSuchSint(16))
        ));
        assert!(matches!(
            synic.signal_event(vp, 2, 2048),
            Err(SynicError::NoSuchFlag(2048))
        ));
        assert!(matches!(
            synic.post_message(vp, 16, 1, &[]),
            Err(SynicError::NoSuchSint(16))
        ));
        assert!(matches!(
            synic.post_message(vp, 2, 1, &[0; 241]),
            Err(SynicError::PayloadTooLong(241))
        ));
    }

    #[test]
    fn pages_outside_of_memory_do_no_harm() {
        let bench = Bench::new();
        for page in [0x4000, 0x3f_ffff_f000, !0xfff] {
            bench.synic.set_registers(1, 1, page | 1, page | 1);
            assert!(bench.synic.signal_event(VpIndex::new(1), 2, 5).is_err());
            bench.post(b"lost for now");
        }
        assert_eq!(bench.raised(), 0);
        bench.synic.set_registers(1, 1, SIEFP | 1, SIMP | 1);
        assert_eq!(bench.take().0, b"lost for now");
    }

    #[test]
    fn binding_ends_with_its_guard() {
        let bench = Bench::new();
        let event = || EventFd::new(0).unwrap();
        let connection = ConnectionId::new(0x1234);
        let guard = bench.synic.bind_event(connection, event()).unwrap();
        assert!(matches!(
            bench.synic.bind_event(connection, event()),
            Err(SynicError::BadConnection(_))
        ));
        drop(guard);
        assert!(lock(&bench.recorder.bound).is_empty());
        assert!(bench.synic.bind_event(connection, event()).is_ok());
        assert!(
            bench
                .synic
                .bind_event(ConnectionId::new(1 << 24), event())
                .is_err()
        );
    }

    #[test]
    fn reset_forgets_the_guest() {
        let bench = Bench::new();
        bench.post(b"one");
        bench.post(b"two");
        bench.synic.attach(None);
        assert_eq!(bench.armed(), 0);
        assert!(bench.synic.signal_event(VpIndex::new(1), 2, 1).is_err());
        assert!(
            bench
                .synic
                .bind_event(ConnectionId::new(9), EventFd::new(0).unwrap())
                .is_err()
        );
    }

    #[test]
    fn guest_and_host_race_on_one_slot() {
        const MESSAGES: u32 = 20_000;
        let bench = Bench::new();
        let eom = EventFd::new(0).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The guest: take, then EOM when asked for it.
                for expected in 0..MESSAGES {
                    while bench
                        .memory
                        .load::<u32>(GuestAddress(SLOT), Ordering::Acquire)
                        .unwrap()
                        == 0
                    {
                        std::hint::spin_loop();
                        std::thread::yield_now();
                    }
                    let (payload, pending) = bench.take();
                    assert_eq!(payload, expected.to_le_bytes());
                    if pending {
                        eom.write(1).unwrap();
                    }
                }
                eom.write(u64::from(u32::MAX)).unwrap();
            });
            scope.spawn(|| {
                while eom.read().unwrap() < u64::from(u32::MAX) {
                    bench.synic.deliver();
                }
            });
            for number in 0..MESSAGES {
                while bench
                    .synic
                    .post_message(VpIndex::new(1), VMBUS_SINT, 1, &number.to_le_bytes())
                    .is_err()
                {
                    std::thread::yield_now();
                }
            }
        });
        assert_eq!(
            bench.synic.counters.messages_delivered.get(),
            u64::from(MESSAGES)
        );
    }
}
