// SPDX-License-Identifier: GPL-2.0

//! Whether there is a link, as the host says, and how users hear of it: one change at a time, and then none for a
//! while, for listeners look once a second only.

use super::Nic;
use crate::net::Rtnl;
use kernel::{
    sync::{
        atomic::Relaxed,
        Arc, //
    },
    workqueue::WorkItem, //
};
use vmbus::OwnedQueue;

/// Time between two changes of the link that are told, in milliseconds.
const PAUSE_MS: u32 = 2000;

/// What happens to a link.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Up,
    Down,
    /// It is in another network: those who listen are to notice.
    Bounce,
}

/// Changes of the link that have not been told. However many there are, this is all that matters.
pub(super) struct Changes {
    latest: Option<Change>,
    bounce: bool,
    /// Where changes are worked on; `None` before the device is registered, and when it is about to go.
    queue: Option<OwnedQueue>,
}

impl Changes {
    pub(super) const fn none() -> Self {
        Self {
            latest: None,
            bounce: false,
            queue: None,
        }
    }

    fn is_empty(&self) -> bool {
        self.latest.is_none() && !self.bounce
    }
}

impl Nic {
    /// Changes of the link are worked on from now on.
    pub(crate) fn start(self: &Arc<Self>, queue: OwnedQueue) {
        let mut changes = self.changes.lock();
        if !changes.is_empty() {
            let _ = queue.enqueue(self.clone());
        }
        changes.queue = Some(queue);
    }

    /// Changes of the link are not worked on any more. Sleeps.
    pub(crate) fn leave(&self) {
        self.leaving.set();
        // Dropping the queue waits, so that it is done out of the lock.
        let _queue = self.changes.lock().queue.take();
    }

    /// The host says that the link has changed. Any context.
    pub(crate) fn link_change(self: &Arc<Self>, change: Change) {
        let mut changes = self.changes.lock();
        match change {
            Change::Bounce => changes.bounce = true,
            other => changes.latest = Some(other),
        }
        if let Some(queue) = &changes.queue {
            // If it is queued already, it sees the change.
            let _ = queue.enqueue(self.clone());
        }
    }

    /// Forgets what an attachment has said that is over.
    pub(super) fn forget_link_changes(&self) {
        let mut changes = self.changes.lock();
        changes.latest = None;
        changes.bounce = false;
    }

    /// Tells about one change of the link. Returns false if there was none.
    fn tell_link_change(&self) -> bool {
        let rtnl = Rtnl::lock();
        let mut changes = self.changes.lock();
        let up = self.link_up.load(Relaxed);
        let change = if core::mem::take(&mut changes.bounce) && up {
            // It is up again after a while, unless something else is said meanwhile.
            changes.latest.get_or_insert(Change::Up);
            Change::Down
        } else {
            match changes.latest.take() {
                Some(change) => change,
                None => return false,
            }
        };
        drop(changes);
        match change {
            Change::Up if up => self.netdev.notify_peers(&rtnl),
            Change::Up => {
                self.link_up.store(true, Relaxed);
                if self.netdev.is_running(&rtnl) && self.attached(&rtnl).is_ok() {
                    self.netdev.carrier_on(&rtnl);
                }
            }
            Change::Down | Change::Bounce => {
                self.link_up.store(false, Relaxed);
                self.netdev.carrier_off(&rtnl);
            }
        }
        true
    }

    /// The speed of the link, in bits per second.
    pub(crate) fn set_speed(&self, speed: u64) {
        let megabits = u32::try_from(speed / 1_000_000).unwrap_or(u32::MAX);
        self.speed.store(megabits, Relaxed);
    }
}

impl WorkItem for Nic {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        while this.tell_link_change() {
            if this.leaving.wait(PAUSE_MS) {
                break;
            }
        }
    }
}
