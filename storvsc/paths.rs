// SPDX-License-Identifier: GPL-2.0

//! The channels of a controller, and which one a command goes over.
//!
//! Hardware queue n of the block layer belongs to channel n: the primary channel is 0, a sub-channel has
//! the index that the host gave it. Each CPU uses the queue whose channel interrupts it, if there is
//! one, else one of its NUMA node, else any, so that they are spread evenly. When a channel is not
//! open, or has hardly any room, another one serves its queue.

use crate::{
    params,
    scsi::QueueMap, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SetOnce, //
    }, //
};
use vmbus::{
    Channel,
    Event,
    OpenChannel, //
};

/// A counter of what a channel did.
struct Counter(Atomic<u64>);

impl Counter {
    const fn new() -> Self {
        Self(Atomic::new(0))
    }

    fn count(&self) {
        self.0.add(1, Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// An open channel.
pub(crate) struct Path {
    channel: Arc<Channel>,
    /// It was rescinded or is damaged; never used again.
    dead: Atomic<bool>,
    /// Commands sent.
    sent: Counter,
    /// Commands answered.
    completed: Counter,
    /// Commands that found the ring full.
    busy: Counter,
    /// Packets that made no sense.
    unknown: Counter,
}

impl Path {
    fn new(channel: Arc<Channel>) -> Self {
        Self {
            channel,
            dead: Atomic::new(false),
            sent: Counter::new(),
            completed: Counter::new(),
            busy: Counter::new(),
            unknown: Counter::new(),
        }
    }

    /// The channel.
    pub(crate) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Whether the channel cannot be used any more.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Relaxed)
    }

    /// Counts a command that was sent.
    pub(crate) fn count_sent(&self) {
        self.sent.count();
    }

    /// Counts a command that found the ring full.
    pub(crate) fn count_busy(&self) {
        self.busy.count();
    }
}

/// The channels of a controller.
#[pin_data]
pub(crate) struct Paths {
    primary: Arc<Channel>,
    list: KVec<SetOnce<Path>>,
    /// How many channels were opened.
    opened: Atomic<u32>,
    /// For how many of them somebody waits.
    wanted: Atomic<u32>,
    #[pin]
    complete: Event,
    /// What keeps the channels open.
    #[pin]
    open: Mutex<KVec<OpenChannel>>,
}

impl Paths {
    /// A primary channel that is not open yet, and room for `subchannels`.
    pub(crate) fn new(primary: Arc<Channel>, subchannels: u16) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            primary,
            list: {
                let mut list = KVec::new();
                for _ in 0..=subchannels {
                    list.push(SetOnce::new(), GFP_KERNEL)?;
                }
                list
            },
            opened: Atomic::new(0),
            wanted: Atomic::new(u32::MAX),
            complete <- Event::new(),
            open <- new_mutex!(KVec::new(), "storvsc_open_channels"),
        })
    }

    /// The primary channel.
    pub(crate) fn primary(&self) -> &Arc<Channel> {
        &self.primary
    }

    fn path(&self, index: u16) -> Option<&Path> {
        self.list.get(usize::from(index))?.as_ref()
    }

    fn usable(&self, index: u16) -> Option<(u16, &Path)> {
        let path = self.path(index)?;
        (!path.is_dead()).then_some((index, path))
    }

    /// Whether there is a place for a channel with this index.
    pub(crate) fn has_place(&self, index: u16) -> bool {
        self.list
            .get(usize::from(index))
            .is_some_and(|place| place.as_ref().is_none())
    }

    /// Adds an open channel.
    ///
    /// # Errors
    ///
    /// `EINVAL` if there is no place for it, `ENOMEM`.
    pub(crate) fn add(&self, index: u16, open: OpenChannel) -> Result {
        let place = self.list.get(usize::from(index)).ok_or(EINVAL)?;
        let channel = open.channel().clone();
        self.open.lock().push(open, GFP_KERNEL)?;
        if !place.populate(Path::new(channel)) {
            return Err(EINVAL);
        }
        let opened = self.opened.fetch_add(1, Relaxed).saturating_add(1);
        if opened >= self.wanted.load(Relaxed) {
            self.complete.set();
        }
        Ok(())
    }

    /// Says how many channels [`Paths::wait`] is to wait for. To be called before the last of them can
    /// come.
    pub(crate) fn expect(&self, count: u16) {
        self.wanted.store(count.into(), Relaxed);
    }

    /// Waits until there are as many channels as are expected, at most `ms` milliseconds. Returns how
    /// many there are.
    pub(crate) fn wait(&self, ms: u32) -> u32 {
        if self.opened.load(Relaxed) < self.wanted.load(Relaxed) {
            self.complete.wait(ms);
        }
        self.opened.load(Relaxed)
    }

    /// A channel was rescinded or is damaged.
    pub(crate) fn set_dead(&self, index: u16) {
        if let Some(path) = self.path(index) {
            path.dead.store(true, Relaxed);
        }
        if index == 0 {
            // Nobody needs to wait for sub-channels.
            self.complete.set();
        }
    }

    /// Whether the primary channel has gone, and the controller with it.
    pub(crate) fn is_gone(&self) -> bool {
        self.usable(0).is_none()
    }

    /// Closes the sub-channels that were rescinded. Sleeps.
    pub(crate) fn close_dead(&self) {
        loop {
            let dead = {
                let mut open = self.open.lock();
                let place = open.iter().position(|open| {
                    open.channel().subchannel_index() != 0 && open.channel().is_rescinded()
                });
                place.and_then(|place| open.remove(place).ok())
            };
            // Out of the lock.
            if dead.is_none() {
                return;
            }
        }
    }

    /// Closes all channels, the primary one last. Sleeps.
    pub(crate) fn close_all(&self) {
        loop {
            let last = self.open.lock().pop();
            // Out of the lock.
            if last.is_none() {
                return;
            }
        }
    }

    /// The channel for a command of this hardware queue; `None` if the controller has gone.
    pub(crate) fn select(&self, queue: u16) -> Option<(u16, &Path)> {
        if self.is_gone() {
            return None;
        }
        let own = self.usable(queue).or_else(|| self.usable(0))?;
        let percent = params::ring_low_water();
        if self.list.len() == 1 || own.1.channel.has_send_room(percent) {
            return Some(own);
        }
        // CAST: the list has at most 2^16 places.
        let other = (0..self.list.len() as u16)
            .filter_map(|index| self.usable(index))
            .find(|(_, path)| path.channel.has_send_room(percent));
        other.or(Some(own))
    }

    /// Counts a command that was answered on channel `index`.
    pub(crate) fn count_completed(&self, index: u16) {
        if let Some(path) = self.path(index) {
            path.completed.count();
        }
    }

    /// Counts a packet on channel `index` that made no sense.
    pub(crate) fn count_unknown(&self, index: u16) {
        if let Some(path) = self.path(index) {
            path.unknown.count();
        }
    }

    /// Tells which queue each CPU uses.
    pub(crate) fn map_queues(&self, map: &mut QueueMap<'_>) {
        let node = QueueMap::node;
        let queues = map.queues();
        let target = |queue: u16| Some(self.path(queue)?.channel.target_cpu());
        // What a queue is not worth for a CPU: the less, the better. Among equals, the round robin
        // spreads the CPUs.
        let cost = |cpu: u32, queue: u16| match target(queue) {
            Some(target) if target == cpu => 0,
            Some(target) if node(target) == node(cpu) => 1,
            Some(_) => 2,
            None => 3,
        };
        let mut next = 0;
        for cpu in 0..map.cpus() {
            let order = Iterator::chain(next..queues, 0..next);
            let best = order.min_by_key(|&queue| cost(cpu, queue)).unwrap_or(0);
            if cost(cpu, best) != 0 {
                next = best.checked_add(1).filter(|&n| n < queues).unwrap_or(0);
            }
            map.set(cpu, best);
        }
    }

    /// Writes the counters, a line for each channel.
    pub(crate) fn write_counters(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        for (index, place) in self.list.iter().enumerate() {
            if let Some(path) = place.as_ref() {
                writeln!(
                    f,
                    "channel {} cpu {} sent {} completed {} ring_full {} unknown {}",
                    index,
                    path.channel.target_cpu(),
                    path.sent.get(),
                    path.completed.get(),
                    path.busy.get(),
                    path.unknown.get(),
                )?;
            }
        }
        Ok(())
    }
}
