// SPDX-License-Identifier: GPL-2.0

//! The channels of a controller, and which one a command goes over.
//!
//! Hardware queue n of the block layer belongs to channel n: the primary channel is 0, a sub-channel has
//! the index that the host gave it. Each CPU uses the queue whose channel interrupts it, if there is
//! one when the host is registered, else one of its NUMA node, else any, so that they are spread evenly.
//! When a channel is not open, or has hardly any room, another one serves its queue.

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
        rcu,
        Arc,
        ArcBorrow,
        Mutex, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};
use vmbus::{
    Channel,
    Counter,
    OpenChannel,
    RcuArc, //
};

/// Time between two looks at whether all channels have come.
const STEP: Delta = Delta::from_millis(5);
const STEP_MS: u32 = 5;

/// What was done over the channels that had one index.
struct Counters {
    /// Commands sent.
    sent: Counter,
    /// Commands answered.
    completed: Counter,
    /// Commands that found the ring full.
    busy: Counter,
    /// Packets that made no sense.
    unknown: Counter,
}

/// A channel that is open, or about to be.
pub(crate) struct Path {
    index: u16,
    channel: Arc<Channel>,
    /// It was rescinded or is damaged; never used again.
    dead: Atomic<bool>,
    counters: Arc<Counters>,
}

impl Path {
    /// Index of the channel among those of the controller.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// The channel.
    pub(crate) fn channel(&self) -> &Arc<Channel> {
        &self.channel
    }

    /// Whether the channel cannot be used any more.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Relaxed)
    }

    /// The channel was rescinded or is damaged. Says whether that is news.
    pub(crate) fn set_dead(&self) -> bool {
        !self.dead.xchg(true, Relaxed)
    }

    /// Counts a command that was sent.
    pub(crate) fn count_sent(&self) {
        self.counters.sent.count();
    }

    /// Counts a command that was answered.
    pub(crate) fn count_completed(&self) {
        self.counters.completed.count();
    }

    /// Counts a command that found the ring full.
    pub(crate) fn count_busy(&self) {
        self.counters.busy.count();
    }

    /// Counts a packet that made no sense.
    pub(crate) fn count_unknown(&self) {
        self.counters.unknown.count();
    }
}

/// Where a channel is, if it is there.
struct Place {
    path: RcuArc<Path>,
    counters: Arc<Counters>,
}

impl Place {
    fn new() -> Result<Self> {
        let counters = Counters {
            sent: Counter::new(),
            completed: Counter::new(),
            busy: Counter::new(),
            unknown: Counter::new(),
        };
        Ok(Self {
            path: RcuArc::empty(),
            counters: Arc::new(counters, GFP_KERNEL)?,
        })
    }

    fn usable<'a>(&'a self, guard: &'a rcu::Guard) -> Option<ArcBorrow<'a, Path>> {
        self.path.get(guard).filter(|path| !path.is_dead())
    }
}

/// The channels of a controller.
#[pin_data]
pub(crate) struct Paths {
    primary: Arc<Channel>,
    places: KVec<Place>,
    /// What keeps the channels open.
    #[pin]
    open: Mutex<KVec<OpenChannel>>,
}

impl Paths {
    /// A primary channel that is not open yet, and room for `subchannels`.
    pub(crate) fn new(primary: Arc<Channel>, subchannels: u16) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            primary,
            places: {
                let mut places = KVec::new();
                for _ in 0..=subchannels {
                    places.push(Place::new()?, GFP_KERNEL)?;
                }
                places
            },
            open <- new_mutex!(KVec::new(), "storvsc_open_channels"),
        })
    }

    /// The primary channel.
    pub(crate) fn primary(&self) -> &Arc<Channel> {
        &self.primary
    }

    /// Whether the host has taken the controller away.
    pub(crate) fn is_gone(&self) -> bool {
        self.primary.is_rescinded()
    }

    /// Whether commands can go over the primary channel.
    pub(crate) fn is_primary_usable(&self) -> bool {
        let guard = rcu::read_lock();
        let primary = self.places.first();
        primary.is_some_and(|place| place.usable(&guard).is_some())
    }

    /// How many sub-channels there can be.
    pub(crate) fn subchannels(&self) -> u16 {
        u16::try_from(self.places.len().saturating_sub(1)).unwrap_or(u16::MAX)
    }

    /// A path for a channel that is going to be opened.
    ///
    /// # Errors
    ///
    /// `EINVAL` if there is no place for it, `ENOMEM`.
    pub(crate) fn path(&self, channel: &Arc<Channel>) -> Result<Arc<Path>> {
        let index = channel.subchannel_index();
        let place = self.places.get(usize::from(index)).ok_or(EINVAL)?;
        let path = Path {
            index,
            channel: channel.clone(),
            dead: Atomic::new(false),
            counters: place.counters.clone(),
        };
        Ok(Arc::new(path, GFP_KERNEL)?)
    }

    /// Adds a path whose channel is open.
    ///
    /// # Errors
    ///
    /// `EINVAL` if its place is taken, `ENOMEM`.
    pub(crate) fn add(&self, path: Arc<Path>, open: OpenChannel) -> Result {
        let place = self.places.get(usize::from(path.index)).ok_or(EINVAL)?;
        let mut list = self.open.lock();
        list.reserve(1, GFP_KERNEL)?;
        place.path.fill(path).map_err(|_| EINVAL)?;
        list.push_within_capacity(open).map_err(|_| ENOMEM)
    }

    /// Number of channels that can be used.
    fn count(&self) -> u16 {
        let guard = rcu::read_lock();
        let usable = |place: &&Place| place.usable(&guard).is_some();
        u16::try_from(self.places.iter().filter(usable).count()).unwrap_or(u16::MAX)
    }

    /// Waits until `wanted` channels can be used, at most `ms` milliseconds. Returns how many can.
    /// Sleeps.
    pub(crate) fn wait(&self, wanted: u16, ms: u32) -> u16 {
        let mut left = ms;
        loop {
            let count = self.count();
            if count >= wanted || left == 0 || !self.is_primary_usable() {
                return count;
            }
            left = left.saturating_sub(STEP_MS);
            fsleep(STEP);
        }
    }

    /// Closes the sub-channels that were rescinded, calls `ended` with the index of each, and frees
    /// their places. Sleeps.
    pub(crate) fn close_rescinded(&self, mut ended: impl FnMut(u16)) {
        loop {
            let dead = {
                let mut open = self.open.lock();
                let place = open.iter().position(|open| {
                    open.channel().subchannel_index() != 0 && open.channel().is_rescinded()
                });
                place.and_then(|place| open.remove(place).ok())
            };
            let Some(dead) = dead else {
                return;
            };
            let index = dead.channel().subchannel_index();
            // Out of the lock.
            drop(dead);
            // The next channel with this index does not come before the place is free.
            ended(index);
            if let Some(place) = self.places.get(usize::from(index)) {
                drop(place.path.replace(None));
            }
        }
    }

    /// Closes all channels, the primary one last. When it returns, the host has said that it has done
    /// with what it was given, or has taken the channels away, or does not answer. Sleeps.
    ///
    /// Nobody may be about to add one.
    pub(crate) fn close_all(&self) {
        // After this, nobody sends, and who was sending has finished.
        for place in self.places.iter() {
            drop(place.path.replace(None));
        }
        loop {
            let last = self.open.lock().pop();
            // Out of the lock.
            if last.is_none() {
                return;
            }
        }
    }

    /// The channel for a command of this hardware queue, for as long as the RCU read side is held;
    /// `None` if there is none.
    pub(crate) fn select<'a>(
        &'a self,
        guard: &'a rcu::Guard,
        queue: u16,
    ) -> Option<ArcBorrow<'a, Path>> {
        let usable = |place: &'a Place| place.usable(guard);
        let primary = usable(self.places.first()?)?;
        let own = self.places.get(usize::from(queue)).and_then(usable);
        let own = own.unwrap_or(primary);
        let percent = params::ring_low_water();
        let has_room = |path: &ArcBorrow<'_, Path>| path.channel.has_send_room(percent);
        if self.places.len() == 1 || has_room(&own) {
            return Some(own);
        }
        let mut others = self.places.iter().filter_map(usable);
        others.find(has_room).or(Some(own))
    }

    /// Tells which queue each CPU uses.
    pub(crate) fn map_queues(&self, map: &mut QueueMap<'_>) {
        let node = QueueMap::node;
        let queues = map.queues();
        let guard = rcu::read_lock();
        let target = |queue: u16| {
            let path = self.places.get(usize::from(queue))?.path.get(&guard)?;
            Some(path.channel.target_cpu())
        };
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
        for (index, place) in self.places.iter().enumerate() {
            let guard = rcu::read_lock();
            let cpu = place.path.get(&guard).map(|path| path.channel.target_cpu());
            drop(guard);
            write!(f, "channel {} ", index)?;
            match cpu {
                Some(cpu) => write!(f, "cpu {} ", cpu)?,
                None => write!(f, "closed ")?,
            }
            writeln!(
                f,
                "sent {} completed {} ring_full {} unknown {}",
                place.counters.sent.get(),
                place.counters.completed.get(),
                place.counters.busy.get(),
                place.counters.unknown.get(),
            )?;
        }
        Ok(())
    }
}
