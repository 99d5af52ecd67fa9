// SPDX-License-Identifier: GPL-2.0

//! A limit on messages about what a host does: it must not be able to fill the log.

use kernel::{
    new_spinlock_irq,
    prelude::*,
    sync::SpinLockIrq,
    time::{
        Delta,
        Instant,
        Monotonic, //
    }, //
};

/// Messages in a period.
const BURST: u32 = 10;

/// Length of a period.
const PERIOD: Delta = Delta::from_secs(5);

struct Window {
    start: Option<Instant<Monotonic>>,
    messages: u32,
}

/// A limit on messages of one controller: ten in five seconds.
#[pin_data]
pub(crate) struct Limit {
    #[pin]
    window: SpinLockIrq<Window>,
}

impl Limit {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            window <- new_spinlock_irq!(Window {
                start: None,
                messages: 0,
            }, "storvsc_log_limit"),
        })
    }

    /// Whether one more message is all right now. Any context.
    pub(crate) fn allows(&self) -> bool {
        let mut window = self.window.lock();
        let now = Instant::<Monotonic>::now();
        if window.start.is_none_or(|start| now - start > PERIOD) {
            window.start = Some(now);
            window.messages = 0;
        }
        window.messages = window.messages.saturating_add(1);
        window.messages <= BURST
    }
}
