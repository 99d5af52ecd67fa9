// SPDX-License-Identifier: GPL-2.0

//! What is to be done about logical units that come, change and go, outside of the path of I/O.
//!
//! However much the host reports, what waits to be done has a fixed size: reports about the same thing
//! are one, and where there are too many, all units are looked at.

use crate::scsi::Address;

/// What is to be done about one unit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    /// Its properties changed: read them again.
    Rescan(Address),
    /// It is not there any more: remove it.
    Remove(Address),
}

/// Units that are remembered singly.
const TASKS: usize = 16;

/// What waits to be done.
#[derive(Clone, Copy)]
pub(crate) struct Pending {
    tasks: [Option<Task>; TASKS],
    /// Look at each known unit: whether it is still there, and as it was.
    pub(crate) check: bool,
    /// Look for new units.
    pub(crate) scan: bool,
}

impl Pending {
    /// Nothing.
    pub(crate) const NONE: Self = Self {
        tasks: [None; TASKS],
        check: false,
        scan: false,
    };

    /// Adds a task, once.
    pub(crate) fn add(&mut self, task: Task) {
        for place in &mut self.tasks {
            match place {
                Some(other) if *other == task => return,
                Some(_) => (),
                None => {
                    *place = Some(task);
                    return;
                }
            }
        }
        self.check = true;
    }

    /// The tasks about single units.
    pub(crate) fn tasks(&self) -> impl Iterator<Item = Task> + '_ {
        self.tasks.iter().flatten().copied()
    }
}
