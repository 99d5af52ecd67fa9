// SPDX-License-Identifier: MIT OR Apache-2.0

//! The queue between the threads that read channels and those that execute commands.
//!
//! It knows which commands are queued and which run, so that a channel can be drained, a unit
//! waited for, and a reset can tell earlier commands from later ones.

use hv_proto::storage::{LunAddress, ScsiRequest, Version};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::controller::{Channel, MAX_IN_FLIGHT};
use crate::vmbus::GuestBuffer;

/// Whether a controller answers, for tests of what a guest does with a host that does not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stall {
    /// It works.
    #[default]
    Off,
    /// SCSI commands stay in the queue. Resets work, and abort them.
    Commands,
    /// SCSI commands begin, but do not get on, as with a backing store that does not answer. Resets and
    /// closes wait for them.
    Running,
    /// Nothing is answered. What is not a SCSI command is lost.
    Everything,
}

/// A SCSI command of the guest.
pub(super) struct Job {
    pub channel: Arc<Channel>,
    pub transaction_id: u64,
    pub wants_completion: bool,
    pub version: Version,
    pub request: ScsiRequest,
    pub buffer: GuestBuffer,
    /// Place in the order of arrival; given by the queue.
    pub ticket: u64,
}

struct Running {
    channel: u64,
    address: LunAddress,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    running: BTreeMap<u64, Running>,
    /// Queued and running commands of each channel.
    in_flight: BTreeMap<u64, usize>,
    /// Channels that are closing: nothing new is taken from them.
    closing: BTreeSet<u64>,
    next_ticket: u64,
    stall: Stall,
    ended: bool,
}

impl State {
    fn forget(&mut self, channel: u64) {
        if let Some(count) = self.in_flight.get_mut(&channel) {
            *count = count.saturating_sub(1);
        }
    }

    fn remove_queued(&mut self, matches: impl Fn(&Job) -> bool) -> Vec<Job> {
        let (taken, rest): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut self.queue)
            .into_iter()
            .partition(matches);
        self.queue = rest;
        taken.into()
    }
}

/// A queue of commands.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// There is work, or an end of it.
    work: Condvar,
    /// Something was finished or taken out.
    progress: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs with the lock held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a command. Waits while the channel has too many in flight.
    ///
    /// # Errors
    /// The channel is closing, or there is nobody who executes commands any more: gives the command
    /// back, which the caller must answer.
    pub fn submit(&self, mut job: Job) -> Result<(), Job> {
        let channel = job.channel.serial;
        let mut state = self.lock();
        loop {
            if state.ended || state.closing.contains(&channel) {
                return Err(job);
            }
            let in_flight = state.in_flight.entry(channel).or_default();
            if *in_flight < MAX_IN_FLIGHT {
                *in_flight += 1;
                break;
            }
            state = self
                .progress
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        job.ticket = state.next_ticket;
        state.next_ticket += 1;
        state.queue.push_back(job);
        drop(state);
        // All: one that waits to run would take a single call, and not heed it.
        self.work.notify_all();
        Ok(())
    }

    /// Waits for a command to execute; [`Queue::done`] must follow. `None` at the end.
    pub fn take(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.ended {
                return None;
            }
            if matches!(state.stall, Stall::Off | Stall::Running)
                && let Some(job) = state.queue.pop_front()
            {
                let running = Running {
                    channel: job.channel.serial,
                    address: job.request.address(),
                };
                state.running.insert(job.ticket, running);
                return Some(job);
            }
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until a command that was taken may get on.
    pub fn wait_to_run(&self) {
        let state = self.lock();
        let guard = self
            .work
            .wait_while(state, |state| state.stall == Stall::Running && !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        drop(guard);
    }

    /// A command that was taken is finished and answered.
    pub fn done(&self, job: &Job) {
        let mut state = self.lock();
        state.running.remove(&job.ticket);
        state.forget(job.channel.serial);
        drop(state);
        self.progress.notify_all();
    }

    /// Takes the queued commands to `address` (or to any) out of the queue, for the caller to
    /// answer, and waits for those that run. Commands that come later are not touched.
    pub fn abort(&self, address: Option<LunAddress>) -> Vec<Job> {
        let concerned = |a: LunAddress| address.is_none_or(|address| address == a);
        let mut state = self.lock();
        let limit = state.next_ticket;
        let taken = state.remove_queued(|job| concerned(job.request.address()));
        for job in &taken {
            state.forget(job.channel.serial);
        }
        self.progress.notify_all();
        self.wait_while(state, |state| {
            state
                .running
                .range(..limit)
                .any(|(_, running)| concerned(running.address))
        });
        taken
    }

    /// Waits until no command that came before this call runs on `address`.
    pub fn wait_for_unit(&self, address: LunAddress) {
        let state = self.lock();
        let limit = state.next_ticket;
        self.wait_while(state, |state| {
            state
                .running
                .range(..limit)
                .any(|(_, running)| running.address == address)
        });
    }

    fn wait_while(&self, state: MutexGuard<'_, State>, condition: impl Fn(&State) -> bool) {
        let guard = self
            .progress
            .wait_while(state, |state| condition(state))
            .unwrap_or_else(PoisonError::into_inner);
        drop(guard);
    }

    /// A channel closes: takes its queued commands out, for the caller to answer, and takes no new
    /// ones.
    pub fn close(&self, channel: u64) -> Vec<Job> {
        let mut state = self.lock();
        state.closing.insert(channel);
        let taken = state.remove_queued(|job| job.channel.serial == channel);
        drop(state);
        self.progress.notify_all();
        taken
    }

    /// The reader of a closing channel has ended: waits for the commands that run, and forgets
    /// the channel.
    pub fn closed(&self, channel: u64) {
        self.wait_while(self.lock(), |state| {
            state
                .running
                .values()
                .any(|running| running.channel == channel)
        });
        let mut state = self.lock();
        state.in_flight.remove(&channel);
        state.closing.remove(&channel);
    }

    /// Stops or lets go the execution of commands.
    pub fn set_stall(&self, stall: Stall) {
        self.lock().stall = stall;
        self.work.notify_all();
    }

    /// Whether the controller shall answer.
    pub fn stall(&self) -> Stall {
        self.lock().stall
    }

    /// Number of commands that are queued or run.
    pub fn in_flight(&self) -> usize {
        let state = self.lock();
        state.queue.len() + state.running.len()
    }

    /// Number of commands that run.
    pub fn running(&self) -> usize {
        self.lock().running.len()
    }

    /// Ends the threads that take commands. Gives those that none will take, for the caller to
    /// answer.
    pub fn end(&self) -> Vec<Job> {
        let mut state = self.lock();
        state.ended = true;
        let left = std::mem::take(&mut state.queue);
        drop(state);
        self.work.notify_all();
        self.progress.notify_all();
        left.into()
    }
}
