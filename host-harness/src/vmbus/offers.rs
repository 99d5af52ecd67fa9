// SPDX-License-Identifier: MIT OR Apache-2.0

//! The part of [`Server`] that deals with devices and channels: offers, opening, closing,
//! rescinds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::thread;

use hv_proto::guid::Guid;
use hv_proto::ids::{ChannelId, ConnectionId, MAX_CHANNELS};
use hv_proto::message::{
    ModifyChannel, OfferChannel, OpenChannel, RescindChannelOffer, STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
};
use hv_proto::monitor::MonitorId;
use hv_proto::ring::Corrupt;
use hv_proto::server::{
    Channel, ChannelState, CloseDecision, ClosedDecision, OpenDecision, OpenedDecision, split_ring,
};
use zerocopy::FromZeros;

use super::channel::{HostChannel, SharedParams};
use super::counters::Counters;
use super::device::{self, Job};
use super::monitor;
use super::ring::GuestRing;
use super::server::{Device, Entry, OfferError, OfferHandle, Server, State, complain};
use super::vsp::{OfferParams, OpenError, OpenParams, Vsp};
use crate::events::Event;

/// Connection ids of channel events are this plus the channel's id.
const EVENT_CONNECTION_BASE: u32 = 0x1_0000;

fn event_connection(id: ChannelId) -> ConnectionId {
    ConnectionId::new(EVENT_CONNECTION_BASE | id.get())
}

/// The channels of a device, sub-channels first.
fn channels_of(st: &State, number: u64) -> Vec<ChannelId> {
    let mut channels: Vec<_> = st
        .channels
        .iter()
        .filter(|(_, c)| c.device == number)
        .map(|(id, c)| (c.index == 0, *id))
        .collect();
    channels.sort();
    channels.into_iter().map(|(_, id)| id).collect()
}

impl Server {
    /// Offers a device. If a guest has asked for offers already, it hears of this one at once.
    ///
    /// A device with the instance GUID of one that was taken away waits until the guest has let
    /// go of that one.
    ///
    /// # Errors
    /// [`OfferError`]: the instance or all numbers are in use, or there can be no more threads.
    pub fn offer(
        &self,
        mut params: OfferParams,
        vsp: Box<dyn Vsp>,
    ) -> Result<OfferHandle, OfferError> {
        params.monitor_latency = params.monitor_latency.or(self.monitor_latency());
        let mut st = self.lock();
        let mut same = st
            .devices
            .values()
            .filter(|d| d.params.instance == params.instance);
        let held = same.clone().next().is_some();
        if same.any(|d| !d.removed) {
            return Err(OfferError::Duplicate(params.instance));
        }
        let number = st.next_device;
        st.next_device += 1;
        let name: Arc<str> = params.name.as_str().into();
        let added = Event::DeviceAdded {
            device: params.name.clone(),
            class: params.class.to_string(),
            instance: params.instance.to_string(),
        };
        let (jobs, queue) = channel();
        let server = self.weak();
        let thread_name = name.clone();
        thread::Builder::new()
            .name(format!("vmbus-{name}"))
            .spawn(move || device::run(&thread_name, number, vsp, &queue, &server))
            .map_err(|e| OfferError::Thread(e.to_string()))?;
        st.devices.insert(
            number,
            Device {
                name,
                params,
                jobs: Some(jobs),
                busy: 0,
                used: false,
                removed: false,
                held,
            },
        );
        if !held && let Err(e) = self.add_channel(&mut st, number, 0) {
            st.devices.remove(&number);
            return Err(e);
        }
        self.publish(added);
        Ok(OfferHandle::new(self.weak(), number))
    }

    /// Makes a channel of a device, and offers it if a guest wants to hear of offers.
    fn add_channel(&self, st: &mut State, number: u64, index: u16) -> Result<(), OfferError> {
        let device = st.devices.get(&number).ok_or(OfferError::Gone)?;
        let monitor = if device.params.monitor_latency.is_some() {
            let free = (0..MonitorId::COUNT)
                .filter_map(MonitorId::new)
                .find(|m| st.channels.values().all(|c| c.monitor != Some(*m)));
            Some(free.ok_or(OfferError::NoMonitorId)?)
        } else {
            None
        };
        // Numbers go round, so that a number is not used again soon after it was released.
        let last = MAX_CHANNELS as u32 - 1;
        let from = st.next_channel;
        let id = (from..=last)
            .chain(1..from)
            .map(ChannelId::new)
            .find(|id| !st.channels.contains_key(id))
            .ok_or(OfferError::NoChannelId)?;
        st.next_channel = if id.get() == last { 1 } else { id.get() + 1 };
        st.channels.insert(
            id,
            Entry {
                device: number,
                index,
                machine: Channel::new(id),
                serial: 0,
                failed: false,
                rescinded: false,
                control: None,
                binding: None,
                ring_gpadl: None,
                target_vp: Arc::new(AtomicU32::new(0)),
                counters: Arc::new(Counters::default()),
                monitor,
            },
        );
        self.send_offer(st, id);
        Ok(())
    }

    /// Makes the primary channel of a device that has none.
    fn offer_device(&self, st: &mut State, number: u64) {
        if let Some(device) = st.devices.get_mut(&number) {
            device.held = false;
            let name = device.name.clone();
            if let Err(error) = self.add_channel(st, number, 0) {
                tracing::error!(device = %name, %error, "cannot offer the device again");
            }
        }
    }

    /// Makes the primary channels of devices that the guest let go of without being asked.
    pub(super) fn offer_missing(&self, st: &mut State) {
        let numbers: Vec<u64> = st
            .devices
            .iter()
            .filter(|(n, d)| !d.removed && !d.held && channels_of(st, **n).is_empty())
            .map(|(n, _)| *n)
            .collect();
        for number in numbers {
            self.offer_device(st, number);
        }
    }

    /// Tells the guest of a channel, if it wants to hear and does not know.
    pub(super) fn send_offer(&self, st: &mut State, id: ChannelId) {
        let Some(target) = st.connection.agreed().map(|a| a.target) else {
            return;
        };
        let Some(entry) = st.channels.get_mut(&id) else {
            return;
        };
        let Some(device) = st.devices.get(&entry.device) else {
            return;
        };
        if !st.connection.wants_offers() || !entry.machine.offer() {
            return;
        }
        let params = &device.params;
        let monitored = (entry.monitor, st.monitor_page, params.monitor_latency);
        if let (Some(monitor), Some(page), Some(latency)) = monitored {
            let connection = event_connection(id);
            monitor::describe(self.memory(), page, monitor, latency, connection);
        }
        if let Some(offer) = describe(st, id) {
            self.send(st, target, &offer);
        }
    }

    /// Takes a device away from the guest.
    pub(super) fn remove_device(&self, st: &mut State, number: u64) {
        let Some(device) = st.devices.get_mut(&number) else {
            return;
        };
        if std::mem::replace(&mut device.removed, true) {
            return;
        }
        for id in channels_of(st, number) {
            self.rescind(st, id);
        }
        self.settle_device(st, number);
    }

    /// Takes one sub-channel back, as a host may at any moment. Returns false if there is no such sub-channel.
    pub fn rescind_subchannel(&self, id: ChannelId) -> bool {
        let mut st = self.lock();
        let found = st.channels.get(&id).is_some_and(|c| c.index != 0);
        if found {
            self.rescind(&mut st, id);
        }
        found
    }

    /// Takes a channel back: the VSP closes it first, then the guest is told.
    pub(super) fn rescind(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.get_mut(&id) else {
            return;
        };
        entry.rescinded = true;
        match entry.machine.rescind() {
            CloseDecision::Done => self.send_rescind(st, id),
            other => self.follow(st, id, other),
        }
    }

    fn send_rescind(&self, st: &mut State, id: ChannelId) {
        self.reply(st, &RescindChannelOffer { channel_id: id });
    }

    /// Does what a channel's state machine says about the end of its use.
    pub(super) fn follow(&self, st: &mut State, id: ChannelId, decision: CloseDecision) {
        match decision {
            CloseDecision::StartClose => self.start_close(st, id),
            CloseDecision::Wait => {
                // Its VSP may be waiting for the guest.
                if let Some(control) = st.channels.get(&id).and_then(|c| c.control.as_ref()) {
                    control.stop();
                }
            }
            CloseDecision::Free => self.remove_channel(st, id),
            CloseDecision::Done | CloseDecision::Ignore => {}
        }
    }

    /// Forgets a channel that is closed and that the guest does not know (any more).
    fn remove_channel(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.remove(&id) else {
            return;
        };
        st.gpadls.forget_channel(id);
        self.settle_device(st, entry.device);
        self.notify();
    }

    /// Ends the thread of a device that was removed, once its channels are closed, and forgets
    /// it, once its channels are gone too. A device that waited for that is offered then.
    pub(super) fn settle_device(&self, st: &mut State, number: u64) {
        let mine = st.channels.values().filter(|c| c.device == number);
        let known = mine.clone().next().is_some();
        let in_use = mine.clone().any(|c| c.machine.uses_ring());
        let Some(device) = st.devices.get_mut(&number) else {
            return;
        };
        if !device.removed {
            return;
        }
        if device.busy == 0 && !in_use && device.jobs.take().is_some() {
            // Counted like a call, until the thread reports its end.
            device.busy = 1;
        }
        if known || device.busy > 0 || device.jobs.is_some() {
            return;
        }
        let instance: Guid = device.params.instance;
        self.publish(Event::DeviceRemoved {
            device: device.name.to_string(),
        });
        st.devices.remove(&number);
        let same = || {
            let devices = st.devices.iter();
            devices.filter(|(_, d)| d.params.instance == instance)
        };
        if same().all(|(_, d)| !d.removed) {
            let waiting = same().find(|(_, d)| d.held).map(|(n, _)| *n);
            if let Some(next) = waiting {
                self.offer_device(st, next);
            }
        }
        self.notify();
    }

    /// Offers sub-channels 1 to `count` of a device, as far as they are not offered yet.
    pub(super) fn offer_subchannels(&self, number: u64, count: u16) -> Result<(), OfferError> {
        let mut st = self.lock();
        let device = st.devices.get(&number).filter(|d| !d.removed);
        device.ok_or(OfferError::Gone)?;
        let live = |st: &State, index: u16| {
            let mut channels = st.channels.values();
            channels
                .find(|c| c.device == number && c.index == index && !c.rescinded)
                .map(|c| c.machine.state())
        };
        let primary = live(&st, 0);
        if !matches!(primary, Some(ChannelState::Open | ChannelState::Opening)) {
            return Err(OfferError::NotOpen);
        }
        for index in 1..=count {
            if live(&st, index).is_none() {
                self.add_channel(&mut st, number, index)?;
            }
        }
        Ok(())
    }

    pub(super) fn open(&self, st: &mut State, request: &OpenChannel) {
        let id = request.channel_id;
        let Some(entry) = st.channels.get_mut(&id) else {
            complain!(
                st,
                channel = id.get(),
                "OPENCHANNEL for a channel that is not there"
            );
            return;
        };
        match entry.machine.open(request) {
            OpenDecision::Start => self.start_open(st, request),
            OpenDecision::Later => {}
            OpenDecision::Refuse(answer) => {
                complain!(st, channel = id.get(), "OPENCHANNEL at the wrong moment");
                self.reply(st, &answer);
            }
        }
    }

    /// Checks the request and has the VSP open the channel.
    fn start_open(&self, st: &mut State, request: &OpenChannel) {
        let id = request.channel_id;
        if let Err(why) = self.try_open(st, request) {
            complain!(st, channel = id.get(), "OPENCHANNEL refused: {why}");
            self.opened(st, id, STATUS_UNSUCCESSFUL);
        }
    }

    fn try_open(&self, st: &mut State, request: &OpenChannel) -> Result<(), String> {
        let agreed = st.connection.agreed().copied().ok_or("no connection")?;
        let id = request.channel_id;
        let entry = st.channels.get_mut(&id).ok_or("no such channel")?;
        let device = st
            .devices
            .get_mut(&entry.device)
            .filter(|d| !d.removed)
            .ok_or("the device is gone")?;
        let target_vp = request.target_vp;
        if !self.has_vp(target_vp.get()) {
            return Err("no such virtual processor".into());
        }
        let (gpadl_serial, pages) = st
            .gpadls
            .use_for_rings(id, request.ring_gpadl)
            .ok_or("no GPADL of whole pages for the rings")?;
        // From here on the channel uses the GPADL, also if it cannot be opened: see `let_go`.
        entry.ring_gpadl = Some((request.ring_gpadl, gpadl_serial));
        entry.failed = false;
        entry.serial = st.next_serial;
        st.next_serial += 1;
        let page_count = u32::try_from(pages.len()).unwrap_or(u32::MAX);
        let (to_host, to_guest) = split_ring(page_count, request.downstream_page_offset.get())
            .and_then(|split| pages.split_at_checked(split.to_host as usize))
            .ok_or("the rings do not fit the GPADL")?;
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let ring = |pages| GuestRing::new(self.memory(), pages).map_err(|e| text(&e));
        entry.target_vp.store(target_vp.get(), Ordering::Relaxed);
        let params = SharedParams {
            id,
            subchannel_index: entry.index,
            serial: entry.serial,
            mem: self.memory().clone(),
            synic: self.synic().clone(),
            sint: agreed.target.sint,
            target_vp: entry.target_vp.clone(),
            counters: entry.counters.clone(),
            trace: self.trace().cloned(),
            server: self.weak(),
            device: entry.device,
        };
        let (channel, control) =
            HostChannel::new(params, ring(to_host)?, ring(to_guest)?).map_err(|e| text(&e))?;
        let event = control.shared.signal.try_clone().map_err(|e| text(&e))?;
        let binding = self.synic().bind_event(event_connection(id), event);
        entry.binding = Some(binding.map_err(|e| text(&e))?);
        entry.control = Some(control);
        device.used = true;
        let params = OpenParams {
            subchannel_index: entry.index,
            target_vp,
            version: agreed.version,
            user_data: request.user_data,
        };
        let called = device.call(Job::Open {
            id,
            channel: Box::new(channel),
            params: Box::new(params),
        });
        if called {
            Ok(())
        } else {
            Err("the device's thread has ended".into())
        }
    }

    /// A VSP has opened a channel, or has refused to.
    pub(super) fn open_done(&self, id: ChannelId, result: Result<(), OpenError>) {
        let mut st = self.lock();
        call_ended(&mut st, id);
        let status = match result {
            Ok(()) => STATUS_SUCCESS,
            Err(why) => {
                let device = device_name(&st, id);
                complain!(st, %device, channel = id.get(), "OPENCHANNEL refused: {why}");
                STATUS_UNSUCCESSFUL
            }
        };
        self.opened(&mut st, id, status);
    }

    fn opened(&self, st: &mut State, id: ChannelId, status: u32) {
        let Some(entry) = st.channels.get_mut(&id) else {
            return;
        };
        let decision = entry.machine.opened(status);
        let ok = status == STATUS_SUCCESS;
        let (failed, monitored, index) = (entry.failed, entry.monitor.is_some(), entry.index);
        if ok {
            entry.counters.open();
            self.publish(Event::ChannelOpened {
                device: device_name(st, id).to_string(),
                index,
            });
        } else {
            self.let_go(st, id);
        }
        match decision {
            OpenedDecision::Answer(answer) => {
                self.reply(st, &answer);
                if ok {
                    tracing::debug!(channel = id.get(), "open");
                    if monitored {
                        self.start_monitor(st);
                    }
                    if failed {
                        self.close(st, id);
                    }
                } else {
                    // A device may have been removed meanwhile, or a reset may wait.
                    self.after_close(st, id, ClosedDecision::Idle);
                }
            }
            OpenedDecision::StartClose => self.start_close(st, id),
            OpenedDecision::Closed(decision) => self.after_close(st, id, decision),
            OpenedDecision::Ignore => {}
        }
        self.notify();
    }

    /// The guest, or a damaged ring, ends the use of a channel.
    fn close(&self, st: &mut State, id: ChannelId) {
        if let Some(entry) = st.channels.get_mut(&id) {
            let decision = entry.machine.close();
            self.follow(st, id, decision);
        }
    }

    /// Has the VSP close a channel.
    fn start_close(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.get_mut(&id) else {
            return;
        };
        if let Some(control) = &entry.control {
            control.stop();
        }
        entry.binding = None;
        let job = Job::Close {
            id,
            subchannel_index: entry.index,
        };
        let device = st.devices.get_mut(&entry.device);
        if !device.is_some_and(|d| d.call(job)) {
            self.closed(st, id);
        }
    }

    /// A VSP has closed a channel.
    pub(super) fn close_done(&self, id: ChannelId) {
        let mut st = self.lock();
        call_ended(&mut st, id);
        self.closed(&mut st, id);
    }

    /// The VSP has let go of a channel.
    fn closed(&self, st: &mut State, id: ChannelId) {
        tracing::debug!(channel = id.get(), "closed");
        self.let_go(st, id);
        if let Some(index) = st.channels.get(&id).map(|c| c.index) {
            self.publish(Event::ChannelClosed {
                device: device_name(st, id).to_string(),
                index,
            });
        }
        if let Some(entry) = st.channels.get_mut(&id) {
            let decision = entry.machine.closed();
            self.after_close(st, id, decision);
        }
    }

    /// Nothing uses the rings of a channel any more.
    fn let_go(&self, st: &mut State, id: ChannelId) {
        if let Some(entry) = st.channels.get_mut(&id) {
            if let Some(control) = entry.control.take() {
                control.finish();
            }
            entry.binding = None;
            if let Some((gpadl, serial)) = entry.ring_gpadl.take() {
                self.end_gpadl_use(st, gpadl, serial);
            }
        }
    }

    /// Does what a channel's state machine says when nothing uses the channel any more.
    fn after_close(&self, st: &mut State, id: ChannelId, decision: ClosedDecision) {
        let Some((index, number)) = st.channels.get(&id).map(|c| (c.index, c.device)) else {
            return;
        };
        if index == 0 {
            // The guest cannot use sub-channels without the primary channel, and expects to hear
            // of new ones when it has opened that again.
            for sub in channels_of(st, number) {
                if sub != id {
                    self.rescind(st, sub);
                }
            }
        }
        match decision {
            ClosedDecision::Reopen(request) => self.start_open(st, &request),
            ClosedDecision::SendRescind => self.send_rescind(st, id),
            ClosedDecision::Free => self.remove_channel(st, id),
            ClosedDecision::Idle | ClosedDecision::Ignore => {}
        }
        self.settle_device(st, number);
        self.finish_reset(st);
        self.notify();
    }

    pub(super) fn reset_done(&self, number: u64) {
        let mut st = self.lock();
        if let Some(device) = st.devices.get_mut(&number) {
            device.busy = device.busy.saturating_sub(1);
        }
        self.settle_device(&mut st, number);
        self.finish_reset(&mut st);
        self.notify();
    }

    /// The thread of a device has ended, and its VSP is gone.
    pub(super) fn device_ended(&self, number: u64) {
        let mut st = self.lock();
        if let Some(device) = st.devices.get_mut(&number) {
            device.busy = 0;
            device.jobs = None;
        }
        self.settle_device(&mut st, number);
        self.notify();
    }

    /// A ring of an open channel was found damaged.
    pub(super) fn channel_failed(&self, id: ChannelId, serial: u64, what: Corrupt) {
        let mut st = self.lock();
        let device = device_name(&st, id);
        complain!(
            st,
            %device,
            channel = id.get(),
            "the guest damaged a ring, closing the channel: {what}"
        );
        let entry = st.channels.get_mut(&id);
        let Some(entry) = entry.filter(|c| c.serial == serial) else {
            return;
        };
        if entry.machine.state() == ChannelState::Opening {
            // The guest waits for the answer; the channel is closed right after that.
            entry.failed = true;
        } else {
            self.close(&mut st, id);
        }
    }

    pub(super) fn close_channel(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.get(&id) else {
            complain!(
                st,
                channel = id.get(),
                "CLOSECHANNEL for a channel that is not there"
            );
            return;
        };
        if entry.index == 0 {
            for sub in channels_of(st, entry.device) {
                if sub != id {
                    self.close(st, sub);
                }
            }
        }
        // Closing a closed channel is not a mistake: the host may have closed it.
        self.close(st, id);
    }

    pub(super) fn relid_released(&self, st: &mut State, id: ChannelId) {
        let Some(entry) = st.channels.get_mut(&id) else {
            complain!(
                st,
                channel = id.get(),
                "RELID_RELEASED for a channel that is not there"
            );
            return;
        };
        // Linux also sends it for an offer that it cannot use; the device is then offered again
        // on the guest's next connection.
        let decision = entry.machine.released();
        self.follow(st, id, decision);
    }

    pub(super) fn modify_channel(&self, st: &mut State, request: &ModifyChannel) {
        let (id, vp) = (request.channel_id, request.target_vp.get());
        let Some(version) = st.connection.version() else {
            return;
        };
        let Some(entry) = st.channels.get(&id) else {
            complain!(
                st,
                channel = id.get(),
                "MODIFYCHANNEL for a channel that is not there"
            );
            return;
        };
        let decision = entry.machine.modify(request, version, self.has_vp(vp));
        match decision.target_vp {
            Some(vp) => entry.target_vp.store(vp.get(), Ordering::Relaxed),
            None => complain!(st, channel = id.get(), vp, "MODIFYCHANNEL refused"),
        }
        if let Some(answer) = decision.response {
            self.reply(st, &answer);
        }
    }
}

/// What the guest is told of a channel.
pub(super) fn describe(st: &State, id: ChannelId) -> Option<OfferChannel> {
    let entry = st.channels.get(&id)?;
    let params = &st.devices.get(&entry.device)?.params;
    let monitor = entry
        .monitor
        .filter(|_| st.monitor_page.is_some() && params.monitor_latency.is_some());
    Some(OfferChannel {
        interface_id: params.class,
        instance_id: params.instance,
        channel_flags: params.flags.bits().into(),
        mmio_megabytes: params.mmio_megabytes.into(),
        user_defined: params.user_defined,
        sub_channel_index: entry.index.into(),
        channel_id: id,
        monitor_id: monitor.map_or(0, MonitorId::get),
        monitor_allocated: monitor.is_some().into(),
        is_dedicated_interrupt: 1.into(),
        connection_id: event_connection(id),
        ..OfferChannel::new_zeroed()
    })
}

/// The name of a channel's device, for the log.
fn device_name(st: &State, id: ChannelId) -> Arc<str> {
    let entry = st.channels.get(&id);
    let device = entry.and_then(|c| st.devices.get(&c.device));
    device.map_or_else(|| "gone".into(), |d| d.name.clone())
}

/// A call of the VSP of this channel's device has ended.
fn call_ended(st: &mut State, id: ChannelId) {
    let number = st.channels.get(&id).map(|c| c.device);
    if let Some(device) = number.and_then(|n| st.devices.get_mut(&n)) {
        device.busy = device.busy.saturating_sub(1);
    }
}
