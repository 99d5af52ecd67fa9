// SPDX-License-Identifier: MIT OR Apache-2.0

//! The thread of a device: calls its VSP, one call at a time, and tells the server what came of
//! it.
//!
//! The queue of calls is bounded by the server's states: at most one opening or closing of each
//! channel and one reset for each connection are under way.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Weak;
use std::sync::mpsc::Receiver;

use hv_proto::ids::ChannelId;

use super::channel::HostChannel;
use super::server::Server;
use super::vsp::{OpenError, OpenParams, Vsp};

/// A call for the VSP.
pub(super) enum Job {
    Open {
        id: ChannelId,
        channel: Box<HostChannel>,
        params: Box<OpenParams>,
    },
    Close {
        id: ChannelId,
        subchannel_index: u16,
    },
    Reset,
}

/// Calls `f`. A panic in a VSP is a bug, but it must end neither the other devices nor the
/// server's account of what is under way.
fn guarded<R>(name: &str, f: impl FnOnce() -> R) -> Option<R> {
    let result = catch_unwind(AssertUnwindSafe(f)).ok();
    if result.is_none() {
        tracing::error!(device = name, "the service provider panicked");
    }
    result
}

/// Runs until the server drops its end of the queue.
pub(super) fn run(
    name: &str,
    device: u64,
    mut vsp: Box<dyn Vsp>,
    jobs: &Receiver<Job>,
    server: &Weak<Server>,
) {
    let mut open = BTreeSet::new();
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Open {
                id,
                channel,
                params,
            } => {
                let index = params.subchannel_index;
                let result = match guarded(name, || vsp.open(*channel, *params)) {
                    Some(result) => result,
                    None => Err(OpenError("the service provider panicked".into())),
                };
                if result.is_ok() {
                    open.insert(index);
                }
                if let Some(server) = server.upgrade() {
                    server.open_done(id, result);
                }
            }
            Job::Close {
                id,
                subchannel_index,
            } => {
                open.remove(&subchannel_index);
                guarded(name, || vsp.close(subchannel_index));
                if let Some(server) = server.upgrade() {
                    server.close_done(id);
                }
            }
            Job::Reset => {
                guarded(name, || vsp.reset());
                if let Some(server) = server.upgrade() {
                    server.reset_done(device);
                }
            }
        }
    }
    // Channels are open here only if the server went away without closing them.
    for index in open.into_iter().rev() {
        guarded(name, || vsp.close(index));
    }
    guarded(name, || drop(vsp));
    if let Some(server) = server.upgrade() {
        server.device_ended(device);
    }
}
