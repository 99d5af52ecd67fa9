// SPDX-License-Identifier: MIT OR Apache-2.0

//! Monitor pages: the guest signals by setting a bit, and the server looks at the bits every so
//! often. KVM knows nothing of them. Layout: `hv_proto::monitor`.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hv_proto::ids::ConnectionId;
use hv_proto::monitor::{MonitorId, MonitorPage, MonitorParameter};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};
use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

use super::gpa::PAGE_SIZE;

/// Bounds of how often the server looks, whatever a device asks for.
const SHORTEST: Duration = Duration::from_micros(100);
const LONGEST: Duration = Duration::from_millis(100);

/// How long to wait between two looks for this latency.
pub(super) fn poll_interval(latency: Duration) -> Duration {
    latency.clamp(SHORTEST, LONGEST)
}

/// Runs `f` on a word of the page, which was checked to be guest memory.
fn word<R>(
    mem: &GuestMemoryMmap,
    page: GuestAddress,
    offset: usize,
    f: impl FnOnce(&AtomicU32) -> R,
) -> Option<R> {
    let slice = mem.get_slice(page, PAGE_SIZE as usize).ok()?;
    let word = slice.get_atomic_ref::<AtomicU32>(offset).ok();
    word.map(f)
}

/// Clears the bit of `id` and returns whether it was set.
pub(super) fn take_pending(mem: &GuestMemoryMmap, page: GuestAddress, id: MonitorId) -> bool {
    let offset = id.pending_offset();
    // Reading is cheaper than writing, and mostly there is nothing.
    let set = |w: &AtomicU32| w.load(Ordering::Relaxed) & id.mask() != 0;
    if !word(mem, page, offset, set).unwrap_or(false) {
        return false;
    }
    let clear = |w: &AtomicU32| w.fetch_and(!id.mask(), Ordering::AcqRel) & id.mask() != 0;
    word(mem, page, offset, clear).unwrap_or(false)
}

/// Writes into the page what the host tells of `id`: that it looks, how often, and what for.
pub(super) fn describe(
    mem: &GuestMemoryMmap,
    page: GuestAddress,
    id: MonitorId,
    latency: Duration,
    connection: ConnectionId,
) {
    let units = poll_interval(latency).as_nanos() / 100;
    let units = U16::new(u16::try_from(units).unwrap_or(u16::MAX));
    let parameter = MonitorParameter {
        connection_id: connection,
        flag_number: U16::ZERO,
        reserved: U16::ZERO,
    };
    let put = |offset: usize, bytes: &[u8]| {
        let addr = GuestAddress(page.0 + offset as u64);
        if let Err(error) = mem.write_slice(bytes, addr) {
            tracing::warn!(%error, "cannot write the monitor page");
        }
    };
    put(id.latency_offset(), units.as_bytes());
    put(id.parameter_offset(), parameter.as_bytes());
    let state = std::mem::offset_of!(MonitorPage, trigger_state);
    word(mem, page, state, |w| {
        w.fetch_or(1 << id.group(), Ordering::AcqRel)
    });
}
