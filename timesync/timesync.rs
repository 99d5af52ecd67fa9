// SPDX-License-Identifier: GPL-2.0

//! Time synchronization of Hyper-V guests: the host sends what time it is.
//!
//! * A message with SYNC sets the clock: the guest was started or restored.
//! * A SAMPLE is for those who want it: the PTP clock `hyperv` shows the host's time as the last
//!   message and the partition's reference counter tell it, and chrony can follow that. With the
//!   module's parameter `timesync_implicit`, a clock that is five or more seconds behind is set by
//!   any message; a clock that is ahead never is.
//!
//! When no message has come for ten minutes, reading the PTP clock fails with `ESTALE`, and nothing
//! is set. `unsafe` is in [`clock`] and [`ptp`] only. It uses the crates `kernel`, `hv_proto` and
//! `vmbus`; nothing uses it.
//!
//! C version of this driver: [`drivers/hv/hv_util.c`](srctree/drivers/hv/hv_util.c)

mod clock;
mod ptp;
mod raw;

use hv_proto::ic::{
    timesync::{
        self,
        Anchor,
        Flags,
        Quality,
        Sample,
        Timesync, //
    },
    Malformed, //
};
use kernel::{
    device::{
        self,
        Core, //
    },
    fmt,
    impl_has_work,
    new_spinlock_irq,
    new_work,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        SpinLockIrq, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};
use vmbus::{
    ic,
    Counter,
    Device,
    DeviceId,
    OwnedQueue, //
};

/// What the last message said.
#[derive(Clone, Copy)]
struct Last {
    anchor: Anchor,
    quality: Option<Quality>,
}

/// The host's clock, as far as it is known.
#[pin_data]
struct HostClock {
    device: ARef<device::Device>,
    #[pin]
    last: SpinLockIrq<Option<Last>>,
    /// Times that the guest's clock was set.
    set: Counter,
    /// It was said that the last message is too old.
    said_stale: Atomic<bool>,
    #[pin]
    work: Work<HostClock>,
}

impl_has_work! {
    impl HasWork<Self> for HostClock { self.work }
}

impl HostClock {
    /// The host's time now, in nanoseconds since 1970. Any context.
    ///
    /// # Errors
    ///
    /// `ESTALE` if no message has come lately.
    fn now(&self) -> Result<i64> {
        // Within the lock, so that the counter is not read before the message came.
        let last = self.last.lock();
        let anchor = last.as_ref().ok_or(ESTALE)?.anchor;
        let now = anchor.unix_ns(clock::reference_counter());
        drop(last);
        now.map_err(|_| {
            if !self.said_stale.xchg(true, Relaxed) {
                dev_warn!(self.device, "the host has not told the time for long\n");
            }
            ESTALE
        })
    }
}

/// Sets the guest's clock.
impl WorkItem for HostClock {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        match this.now().and_then(clock::set) {
            Ok(()) => this.set.count(),
            Err(e) if vmbus::may_log() => {
                dev_warn!(this.device, "the clock was not set: {:?}\n", e);
            }
            Err(_) => {}
        }
    }
}

#[vtable]
impl ptp::Clock for HostClock {
    fn read(&self) -> Result<i64> {
        self.now()
    }
}

/// What messages do.
struct Follower {
    clock: Arc<HostClock>,
    /// Where the clock is set. Dropping it waits for that.
    queue: OwnedQueue,
}

impl ic::Actor for Follower {
    type Service = Timesync;
    const NAME: &'static str = "timesync";
    const TITLE: &'static str = "TimeSync";

    fn receive(&self, sample: Sample) -> Result<(), Malformed> {
        let mut last = self.clock.last.lock();
        let now = clock::reference_counter();
        let anchor = sample.anchor(now).ok_or(Malformed::OutOfRange)?;
        *last = Some(Last {
            anchor,
            quality: sample.quality,
        });
        drop(last);
        self.clock.said_stale.store(false, Relaxed);
        let behind = || {
            let host = anchor.unix_ns(now);
            host.is_ok_and(|host| timesync::is_far_behind(clock::now(), host))
        };
        if sample.flags.contains(Flags::SYNC) || (clock::sets_implicitly() && behind()) {
            // If it is queued already, it will use what is known now.
            let _ = self.queue.enqueue(self.clock.clone());
        }
        Ok(())
    }

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = *self.clock.last.lock();
        writeln!(f, "clock_set {}", self.clock.set.get())?;
        let Some(last) = last else {
            return Ok(());
        };
        let age = last.anchor.age(clock::reference_counter());
        writeln!(f, "age_ms {}", age / 10_000)?;
        if let Some(quality) = last.quality {
            writeln!(f, "leap {}", quality.leap.get())?;
            writeln!(f, "stratum {}", quality.stratum)?;
        }
        Ok(())
    }
}

/// What belongs to a bound device.
#[pin_data]
struct Data {
    ptp: Option<ptp::Registration<HostClock>>,
    #[pin]
    binding: ic::Binding<Follower>,
}

struct TimesyncDriver;

vmbus::device_table!(
    TABLE,
    <TimesyncDriver as vmbus::Driver>::IdInfo,
    [(DeviceId::new(hv_proto::guid::TIME_SYNC), ())]
);

impl vmbus::Driver for TimesyncDriver {
    type IdInfo = ();
    type Data<'bound> = Data;

    const ID_TABLE: vmbus::IdTable<Self::IdInfo> = &TABLE;

    fn probe<'bound>(
        dev: &'bound Device<Core<'_>>,
        _info: &'bound Self::IdInfo,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            let bound: &device::Device<Core<'_>> = dev.as_ref();
            let normal: &device::Device = bound;
            let clock = Arc::pin_init(
                pin_init!(HostClock {
                    device: normal.into(),
                    last <- new_spinlock_irq!(None),
                    set: Counter::new(),
                    said_stale: Atomic::new(false),
                    work <- new_work!("timesync"),
                }),
                GFP_KERNEL,
            )?;
            let follower = Follower {
                clock: clock.clone(),
                queue: OwnedQueue::ordered(c"timesync")?,
            };
            let binding = ic::Binding::new(dev, Timesync, follower)?;
            // The clock can also be set where it cannot be shown.
            let ptp = match ptp::Registration::new(bound, c"hyperv", clock) {
                Ok(ptp) => ptp,
                Err(e) => {
                    if vmbus::may_log() {
                        dev_err!(normal, "no PTP clock: {:?}\n", e);
                    }
                    None
                }
            };
            Ok(try_pin_init!(Data {
                ptp,
                binding <- binding,
            }))
        })
    }
}

vmbus::module_vmbus_driver! {
    type: TimesyncDriver,
    name: "timesync",
    authors: ["The Viridian authors"],
    description: "Hyper-V time synchronization",
    license: "GPL",
}
