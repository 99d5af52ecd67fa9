// SPDX-License-Identifier: GPL-2.0

//! CPUs that come and go, and the channels that move with them.

use super::Connection;
use crate::{
    channel::Channel,
    cpu::{
        self,
        CONNECT_CPU, //
    }, //
};
use kernel::{
    cpu::nr_cpu_ids,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Release, //
        },
        barrier,
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

impl Connection {
    /// Runs on the CPU.
    pub(crate) fn cpu_online(&self, cpu: u32) -> Result {
        let per_cpu = self.per_cpu(cpu).ok_or(ENODEV)?;
        per_cpu.synic.enable();
        per_cpu.usable.store(true, Release);
        Ok(())
    }

    /// Whether channels may be given to `cpu`: it is online, and does not go offline just now.
    pub(super) fn is_usable(&self, cpu: u32) -> bool {
        self.per_cpu(cpu)
            .is_some_and(|per_cpu| per_cpu.usable.load(Acquire))
    }

    /// Runs on the CPU. Fails if the CPU is needed.
    pub(crate) fn cpu_offline(&self, cpu: u32) -> Result {
        let per_cpu = self.per_cpu(cpu).ok_or(ENODEV)?;
        if self.is_connected() && cpu == CONNECT_CPU {
            return Err(EBUSY);
        }
        // Also without a connection: there may be one soon.
        per_cpu.usable.store(false, Release);
        barrier::mb(barrier::Full);
        if self.is_connected() {
            if let Err(error) = self.move_channels(cpu) {
                per_cpu.usable.store(true, Release);
                return Err(error);
            }
        }
        self.disable_cpu(cpu);
        Ok(())
    }

    /// Gives all channels of CPU `from` to others.
    fn move_channels(&self, from: u32) -> Result {
        self.for_each_channel(|channel| self.move_channel(channel, from))?;
        let events = || {
            self.per_cpu(from)
                .is_some_and(|per_cpu| per_cpu.synic.has_events(self.highest.load(Acquire)))
        };
        // The interrupt handler takes what was on its way.
        for _ in 0..4 {
            if !events() {
                return Ok(());
            }
            fsleep(Delta::from_millis(10));
        }
        if events() {
            Err(EBUSY)
        } else {
            Ok(())
        }
    }

    /// Gives a channel of CPU `from` to another one.
    fn move_channel(&self, channel: &Arc<Channel>, from: u32) -> Result {
        if channel.target_cpu() != from {
            return Ok(());
        }
        let mut to = CONNECT_CPU;
        let mut least = usize::MAX;
        for cpu in (0..nr_cpu_ids()).filter(|&cpu| self.is_usable(cpu) && cpu::is_housekeeping(cpu))
        {
            let mut load = 0usize;
            let _ = self.for_each_channel(|other| {
                load = load.saturating_add(usize::from(other.target_cpu() == cpu));
                Ok(())
            });
            // The connect CPU has enough to do.
            if load < least && (cpu != CONNECT_CPU || least == usize::MAX) {
                (to, least) = (cpu, load);
            }
        }
        channel.leave_cpu(to).map_err(|_| EBUSY)
    }

    /// Takes the pages of this CPU back from the hypervisor.
    pub(crate) fn disable_cpu(&self, cpu: u32) {
        if let Some(per_cpu) = self.per_cpu(cpu) {
            per_cpu.synic.disable();
        }
    }
}
