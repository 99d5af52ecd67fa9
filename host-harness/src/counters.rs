// SPDX-License-Identifier: MIT OR Apache-2.0

//! Counters: cheap to add to from any thread, read now and then.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds one for something that a guest can repeat for ever. The number if the log should tell
    /// of it: the first time, and then ever more rarely.
    pub(crate) fn complain(&self) -> Option<u64> {
        let times = self.0.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        times.is_power_of_two().then_some(times)
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_become_rare() {
        let counter = Counter::default();
        let told: Vec<u64> = (0..100).filter_map(|_| counter.complain()).collect();
        assert_eq!(told, [1, 2, 4, 8, 16, 32, 64]);
    }
}
