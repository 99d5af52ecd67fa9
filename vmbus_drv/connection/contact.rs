// SPDX-License-Identifier: GPL-2.0

//! The beginning and the end of a connection: versions, unload, and what a crashing guest does.

use super::{
    sleep,
    Connection,
    State, //
};
use crate::{
    cpu::{
        self,
        CONNECT_CPU, //
    },
    log::Show,
    memory::SharedPage,
    request::Key, //
};
use hv_proto::{
    client::{
        Agreed,
        ContactParams,
        Step, //
    },
    hypercall::HvStatus,
    ids::ConnectionId,
    message::{
        HostMessage,
        Message,
        RequestOffers,
        Unload, //
    },
    version::Version, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Acquire,
        Full,
        Relaxed,
        Release, //
    },
    time::{
        delay::{
            fsleep,
            udelay, //
        },
        Delta, //
    }, //
};

/// How long the offers are waited for that the host makes at once, in milliseconds.
const OFFERS_TIMEOUT_MS: u32 = 60_000;

/// How long a crashing guest waits for the host to let go of its memory, in steps of 10 ms.
const CRASH_UNLOAD_STEPS: u32 = 10_000;

impl Connection {
    /// Agrees on a version with the host, and asks for its offers.
    ///
    /// # Errors
    ///
    /// `EINVAL` if `max_version` is older than all, `EOPNOTSUPP` if there is no version that both
    /// know and allow, or those of posting and waiting.
    pub(crate) fn connect(&self, max_version: u32) -> Result {
        let Some(max_version) = Version::at_most(max_version) else {
            pr_err!("max_version {:#x} is older than all\n", max_version);
            return Err(EINVAL);
        };
        let params = ContactParams {
            max_version,
            ..ContactParams::new(
                cpu::vp_index(CONNECT_CPU),
                self.pages.interrupt.phys(),
                self.pages.monitor.each_ref().map(SharedPage::phys),
            )
        };
        let agreed = self.negotiate(&params)?;
        pr_info!(
            "Vmbus version:{}.{}\n",
            agreed.version.major(),
            agreed.version.minor()
        );
        self.request_offers()
    }

    /// Proposes versions until the host takes one.
    fn negotiate(&self, params: &ContactParams) -> Result<Agreed> {
        let mut step = self.protocol.lock().start(params);
        loop {
            let attempt = match step {
                Step::Post(attempt) => attempt,
                Step::Connected(agreed) => {
                    self.message_connection
                        .store(agreed.message_connection_id.get(), Relaxed);
                    self.version.store(agreed.version.raw(), Release);
                    self.set_state(State::Connected);
                    return Ok(agreed);
                }
                Step::Failed(error) => {
                    pr_err!("{}\n", Show(error));
                    return Err(EOPNOTSUPP);
                }
            };
            let message = attempt.message.encode();
            let mut failed = HvStatus::SUCCESS;
            let answer = self.ask(Key::Version, None, || {
                self.post_to(attempt.connection_id, &message, false, sleep)
                    .map_err(|status| {
                        failed = status;
                        EIO
                    })?;
                self.host_has_pages.store(true, Relaxed);
                Ok(())
            });
            let mut protocol = self.protocol.lock();
            step = match answer {
                Ok(HostMessage::VersionResponse(response)) => {
                    if response.version_supported == 0 {
                        self.host_has_pages.store(false, Relaxed);
                    }
                    protocol.version_response(&response).map_err(|_| EIO)?
                }
                Err(_) if !failed.is_success() => protocol.post_failed(failed),
                _ => protocol.contact_timed_out(),
            };
        }
    }

    fn request_offers(&self) -> Result {
        self.post(&RequestOffers {}.encode())?;
        if !self.offers_delivered.wait(OFFERS_TIMEOUT_MS) {
            pr_warn!("the host has not made all its offers yet\n");
        }
        // What is offered at once is there when the module has loaded.
        self.queues.devices.flush();
        Ok(())
    }

    /// Removes all devices and waits until nothing uses them any more.
    pub(crate) fn remove_devices(&self) {
        self.set_state(State::Leaving);
        // An offer may be at work.
        self.queues.flush();
        let _ = self.for_each_channel(|channel| {
            if channel.primary().is_none() {
                channel.leave();
            }
            Ok(())
        });
        self.queues.flush();
        // Most hosts take the sub-channels away when the primary channel is closed.
        let _ = self.for_each_channel(|channel| {
            channel.leave();
            Ok(())
        });
        self.queues.flush();
        // Somebody may hold a device for a moment longer; the module must not go before that.
        let mut waited = 0u32;
        while self.live.load(Acquire) != 0 {
            self.queues.flush();
            fsleep(Delta::from_millis(10));
            waited = waited.saturating_add(1);
            if waited % 1000 == 0 {
                pr_warn!("{} channels are still in use\n", self.live.load(Relaxed));
            }
        }
    }

    /// Tells the host that the guest lets go of everything, and waits until it has, too.
    pub(crate) fn unload(&self) {
        if self.state.xchg(State::Disconnected as u32, Full) == State::Disconnected as u32 {
            return;
        }
        let Some(message) = self.protocol.lock().unload() else {
            return;
        };
        let answer = self.ask(Key::Unload, None, || self.post(&message.encode()));
        let mut protocol = self.protocol.lock();
        if let Err(error) = answer {
            pr_err!("the host does not let go: {:?}\n", error);
            protocol.unload_timed_out();
        } else if protocol.unload_response().is_err() {
            protocol.unload_timed_out();
        } else {
            self.host_has_pages.store(false, Relaxed);
        }
        drop(protocol);
        self.version.store(0, Release);
    }

    /// The same in a guest that has crashed: interrupts are off. The other CPUs stand still and hold
    /// any lock, or run on and take the answer away from this one.
    pub(crate) fn crash_unload(&self) {
        if self.state.xchg(State::Disconnected as u32, Full) == State::Disconnected as u32 {
            return;
        }
        let connection = ConnectionId::new(self.message_connection.load(Relaxed));
        self.unloaded.store(false, Relaxed);
        if self
            .post_to(connection, &Unload {}.encode(), true, spin)
            .is_err()
        {
            return;
        }
        for step in 0..CRASH_UNLOAD_STEPS {
            for per_cpu in self.per_cpu.iter().flatten() {
                let Some(message) = per_cpu.synic.message() else {
                    continue;
                };
                if let Some(payload) = message.payload() {
                    if let Ok(HostMessage::UnloadResponse(_)) = HostMessage::parse(payload, None) {
                        self.unloaded.store(true, Relaxed);
                    }
                }
                // Another CPU's register cannot be written, but the host looks again by itself.
                per_cpu.synic.end_of_message(&message);
            }
            if self.unloaded.load(Acquire) {
                return;
            }
            if step % 500 == 499 {
                pr_notice!("waiting for the host to let go\n");
            }
            spin(10_000);
        }
        pr_err!("the host did not let go in time\n");
    }
}

/// Waits for `us` microseconds; any context. In steps, because the kernel has a limit for one.
fn spin(us: u32) {
    let mut left = us;
    while left != 0 {
        let step = left.min(1000);
        udelay(Delta::from_micros(i64::from(step)));
        left = left.saturating_sub(step);
    }
}
