// SPDX-License-Identifier: GPL-2.0

//! How channels come and go: devices, sub-channels, and rescinds.

use super::{
    Channel,
    SubchannelHandler,
    UPDATE, //
};
use crate::{
    device::{
        ChannelDirectory,
        ChannelsDirectory,
        Registration, //
    },
    log::err_limited, //
};
use kernel::{
    device,
    prelude::*,
    sync::{
        atomic::{
            Full,
            Relaxed,
            Release, //
        },
        rcu,
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Time between two looks at something that will come to pass soon.
const STEP: Delta = Delta::from_millis(5);
const STEP_MS: u32 = 5;

impl Channel {
    /// The host has rescinded the channel. Returns at once; the rest is done by work items.
    pub(crate) fn rescind(self: &Arc<Self>) {
        if self.rescinded.xchg(true, Full) {
            return;
        }
        self.connection.rescind_questions(self.id());
        self.clone().schedule_notify();
        self.schedule_update();
    }

    /// The bus goes: the device goes too, but the channel still works meanwhile.
    pub(crate) fn leave(self: &Arc<Self>) {
        self.leaving.store(true, Release);
        self.schedule_update();
    }

    /// Makes the device or sub-channel known, or removes it, soon.
    pub(crate) fn schedule_update(self: &Arc<Self>) {
        let queues = self.connection.queues();
        let queue = if self.primary.is_some() {
            &queues.subchannels
        } else {
            &queues.devices
        };
        // If it is queued already, it will see the state of now.
        let _ = queue.enqueue::<Arc<Channel>, UPDATE>(self.clone());
    }

    /// Tells the driver that the channel is rescinded or its rings are damaged, once.
    pub(super) fn notify(&self) {
        let _rescinding = self.rescinding.lock();
        if self.is_rescinded() {
            // From here on, no handler runs and no sender writes.
            if let Some(opened) = self.opened.replace(None) {
                opened.handler().on_rescind(self);
            }
            return;
        }
        let guard = rcu::read_lock();
        let handler = self
            .opened
            .get(&guard)
            .filter(|opened| opened.is_broken())
            .map(|opened| opened.handler().clone());
        drop(guard);
        if let Some(handler) = handler {
            handler.on_error(self);
        }
    }

    /// Makes or removes the device of a primary channel. One at a time for the whole bus.
    pub(super) fn update_device(self: &Arc<Self>) {
        if !self.is_leaving() {
            let mut device = self.device.lock();
            if device.is_none() {
                match Registration::new(self) {
                    Ok(registration) => *device = Some(registration),
                    Err(error) => {
                        err_limited!("channel {}: no device: {:?}\n", self.id().get(), error);
                    }
                }
            }
            return;
        }
        if self.is_rescinded() {
            self.notify();
        }
        let device = self.device.lock().take();
        // Unbinds the driver, which closes what it opened.
        drop(device);
        self.release();
    }

    /// Makes a sub-channel known to its driver, or removes it.
    pub(super) fn update_subchannel(self: &Arc<Self>, primary: &Arc<Channel>) {
        if self.is_leaving() {
            if self.is_rescinded() {
                self.notify();
            }
            self.remove_directory();
            self.withdraw(primary);
            self.release();
            return;
        }
        let added = primary
            .subchannels
            .lock()
            .list
            .push(self.clone(), GFP_KERNEL);
        if added.is_err() {
            err_limited!("channel {}: no memory for it\n", self.id().get());
            return;
        }
        primary.make_directories(None);
        primary.announce();
    }

    /// Makes the sysfs directories of those channels of a device that do not have one. The first
    /// time, `device` says where they go; without it, only more of them are made later.
    pub(crate) fn make_directories(self: &Arc<Self>, device: Option<&device::Device>) {
        let mut directories = self.directories.lock();
        if self.is_leaving() {
            return;
        }
        if let (None, Some(device)) = (&*directories, device) {
            *directories = ChannelsDirectory::new(device).ok();
        }
        let Some(parent) = &*directories else {
            return;
        };
        // A directory that cannot be made is missed by those who look for it, and by nobody else.
        let make = |channel: &Arc<Channel>| {
            let mut directory = channel.directory.lock();
            if directory.is_none() && !channel.is_leaving() {
                *directory = ChannelDirectory::new(parent, channel).ok();
            }
            Ok(())
        };
        let _ = make(self);
        let _ = self.for_each_subchannel(make);
    }

    /// Removes the sysfs directories of all channels of a device.
    pub(crate) fn remove_directories(self: &Arc<Self>) {
        let mut directories = self.directories.lock();
        self.remove_directory();
        let _ = self.for_each_subchannel(|channel| {
            channel.remove_directory();
            Ok(())
        });
        *directories = None;
    }

    /// Removes the channel's sysfs directory.
    fn remove_directory(&self) {
        let directory = self.directory.lock().take();
        drop(directory);
    }

    /// Tells the driver of sub-channels that it does not know.
    fn announce(&self) {
        let _announcing = self.announcing.lock();
        // Each call can take a while, and the driver of a device that goes need not know.
        while !self.is_leaving() {
            let subchannels = self.subchannels.lock();
            let Some(handler) = subchannels.handler.clone() else {
                return;
            };
            let next = subchannels
                .list
                .iter()
                .find(|channel| !channel.is_leaving() && !channel.announced.load(Relaxed))
                .cloned();
            drop(subchannels);
            let Some(channel) = next else {
                return;
            };
            channel.announced.store(true, Relaxed);
            handler.on_subchannel(channel);
        }
    }

    /// Takes a sub-channel out of the list, and tells the driver if that knows it.
    fn withdraw(self: &Arc<Self>, primary: &Channel) {
        let _announcing = primary.announcing.lock();
        let mut subchannels = primary.subchannels.lock();
        subchannels.list.retain(|other| !Arc::ptr_eq(other, self));
        let handler = subchannels.handler.clone();
        drop(subchannels);
        if self.announced.xchg(false, Relaxed) {
            if let Some(handler) = handler {
                handler.on_subchannel_gone(self);
            }
        }
    }

    /// Asks to be told of sub-channels, those that are there included, until the value that is
    /// returned is dropped.
    ///
    /// Process context; calls `handler` before it returns.
    ///
    /// # Errors
    ///
    /// `EBUSY` if there is such a handler already.
    pub fn set_subchannel_handler<H: SubchannelHandler>(
        self: &Arc<Self>,
        handler: Arc<H>,
    ) -> Result<SubchannelRegistration> {
        self.set_subchannel_handler_dyn(handler)
    }

    fn set_subchannel_handler_dyn(
        self: &Arc<Self>,
        handler: Arc<dyn SubchannelHandler>,
    ) -> Result<SubchannelRegistration> {
        let mut subchannels = self.subchannels.lock();
        if subchannels.handler.is_some() {
            return Err(EBUSY);
        }
        subchannels.handler = Some(handler);
        drop(subchannels);
        let registration = SubchannelRegistration {
            channel: self.clone(),
        };
        self.announce();
        Ok(registration)
    }

    /// Waits until the host has taken all sub-channels back, as it does when the primary channel is
    /// closed; at most `ms` milliseconds, and not for a primary channel that is rescinded.
    ///
    /// Process context; sleeps.
    pub fn wait_for_subchannels(&self, ms: u32) {
        let mut left = ms;
        while left != 0 && self.subchannel_count() != 0 && !self.is_rescinded() {
            left = left.saturating_sub(STEP_MS);
            fsleep(STEP);
        }
    }

    /// Takes the channel out of the table if nobody has it open, and, if the host has rescinded it,
    /// gives the id back.
    pub(super) fn release(&self) {
        let mut control = self.control.lock();
        if control.open {
            return;
        }
        let message = self.is_rescinded().then(|| {
            self.note_rescind(&mut control.protocol);
            control.protocol.release()
        });
        drop(control);
        match message {
            // It was released before.
            Some(None) => {}
            Some(message) => self.connection.release(self, message),
            None => self.connection.release(self, None),
        }
    }
}

/// A driver's wish to be told of sub-channels. See [`Channel::set_subchannel_handler`].
///
/// Dropping it takes the wish back, and waits for calls that run. It must not be dropped in such a
/// call.
pub struct SubchannelRegistration {
    channel: Arc<Channel>,
}

impl Drop for SubchannelRegistration {
    fn drop(&mut self) {
        // First, so that only the call that runs is waited for, not those for all sub-channels.
        let handler = self.channel.subchannels.lock().handler.take();
        let _announcing = self.channel.announcing.lock();
        let subchannels = self.channel.subchannels.lock();
        for channel in subchannels.list.iter() {
            // The next driver has not been told.
            channel.announced.store(false, Relaxed);
        }
        drop(subchannels);
        drop(handler);
    }
}
