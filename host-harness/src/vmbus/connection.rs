// SPDX-License-Identifier: MIT OR Apache-2.0

//! The part of [`Server`] that deals with the connection as a whole, and with GPADLs: contact,
//! unload, reset, the guest's memory.

use hv_proto::ids::{ChannelId, ConnectionId, GpadlId};
use hv_proto::message::{
    AllOffersDelivered, GpadlBody, GpadlHeader, GpadlTeardown, InitiateContact, UnloadResponse,
};
use hv_proto::server::{ChannelState, ContactDecision, REFUSED, ResetDecision, refuse_gpadl};
use zerocopy::little_endian::U64;

use super::channel::{GpadlError, GpadlView};
use super::device::Job;
use super::gpa::{PAGE_SIZE, page_address};
use super::gpadl::Taken;
use super::server::{Server, State, complain};
use crate::events::Event;

impl Server {
    pub(super) fn initiate_contact(
        &self,
        st: &mut State,
        connection: ConnectionId,
        message: &InitiateContact,
    ) {
        let vp = message.target_vp.get();
        if !self.has_vp(vp) {
            complain!(
                st,
                vp,
                "INITIATE_CONTACT for a virtual processor that is not there"
            );
            return;
        }
        match st.connection.contact(message, connection) {
            ContactDecision::Accept(_) => self.connected(st),
            // A guest that makes contact has forgotten every earlier connection (kexec, kdump).
            ContactDecision::ResetFirst => self.begin_reset(st),
            ContactDecision::Refuse(target) => self.send(st, target, &REFUSED),
            ContactDecision::Ignore => tracing::debug!("INITIATE_CONTACT gets no answer now"),
        }
    }

    /// A connection stands: tells the guest.
    fn connected(&self, st: &mut State) {
        let Some(agreed) = st.connection.agreed().copied() else {
            return;
        };
        tracing::info!(version = %agreed.version, "the guest connected to the bus");
        st.connected = true;
        self.publish(Event::Connected {
            version: agreed.version.to_string(),
        });
        let page = agreed.monitor_pages;
        let pfn = page.map(|[_, to_host]| to_host / u64::from(PAGE_SIZE));
        st.monitor_page = pfn.and_then(|pfn| page_address(self.memory(), pfn).ok());
        self.offer_missing(st);
        self.send(st, agreed.target, &agreed.response());
    }

    /// The connection has ended: closes all channels, and forgets what the guest made.
    pub(super) fn begin_reset(&self, st: &mut State) {
        st.resetting = true;
        if std::mem::take(&mut st.connected) {
            self.publish(Event::Disconnected);
        }
        st.monitor_page = None;
        st.outbox.clear();
        // Sub-channels before primary channels.
        let mut ids: Vec<ChannelId> = st.channels.keys().copied().collect();
        ids.sort_by_key(|id| st.channels.get(id).is_none_or(|c| c.index == 0));
        for id in ids {
            if let Some(entry) = st.channels.get_mut(&id) {
                let decision = entry.machine.reset();
                self.follow(st, id, decision);
            }
        }
        self.finish_reset(st);
    }

    /// The last part of [`Server::begin_reset`], once all VSPs are done. Does nothing before that.
    pub(super) fn finish_reset(&self, st: &mut State) {
        let busy = st.devices.values().any(|d| d.busy > 0 && d.jobs.is_some());
        if !st.resetting || busy || st.channels.values().any(|c| c.machine.uses_ring()) {
            return;
        }
        st.resetting = false;
        st.gpadls.clear();
        for device in st.devices.values_mut() {
            if std::mem::take(&mut device.used) {
                device.call(Job::Reset);
            }
        }
        // Sub-channels are offered anew when the guest asks the device for them.
        let subs: Vec<ChannelId> = st
            .channels
            .iter()
            .filter(|(_, c)| c.index != 0)
            .map(|(id, _)| *id)
            .collect();
        for id in subs {
            self.rescind(st, id);
        }
        match st.connection.reset_done() {
            ResetDecision::Accept(_) => self.connected(st),
            ResetDecision::Unloaded(target) => {
                tracing::info!("the guest left the bus");
                self.send(st, target, &UnloadResponse {});
            }
            ResetDecision::Idle => {}
        }
        self.notify();
    }

    /// The machine is reset, or ends.
    pub(super) fn machine_reset(&self, st: &mut State) {
        if st.connection.machine_reset() {
            self.begin_reset(st);
        }
    }

    pub(super) fn request_offers(&self, st: &mut State) {
        if !st.connection.request_offers() {
            complain!(st, "REQUESTOFFERS came twice");
            return;
        }
        let ids: Vec<ChannelId> = st.channels.keys().copied().collect();
        for id in ids {
            self.send_offer(st, id);
        }
        self.reply(st, &AllOffersDelivered {});
    }

    pub(super) fn gpadl_header(&self, st: &mut State, header: &GpadlHeader, words: &[U64]) {
        let channel = header.channel_id;
        let entry = st.channels.get(&channel);
        if !entry.is_some_and(|c| c.machine.accepts_gpadl()) {
            complain!(
                st,
                channel = channel.get(),
                "GPADL for a channel that is not there"
            );
            self.reply(st, &refuse_gpadl(header));
            return;
        }
        let taken = st.gpadls.start(self.memory(), header, words);
        self.gpadl_taken(st, header.gpadl_id, taken);
    }

    pub(super) fn gpadl_body(&self, st: &mut State, body: &GpadlBody, words: &[U64]) {
        let taken = st.gpadls.add(self.memory(), body, words);
        self.gpadl_taken(st, body.gpadl_id, taken);
    }

    fn gpadl_taken(&self, st: &mut State, id: GpadlId, taken: Taken) {
        match taken {
            Taken::More => {}
            Taken::Created(answer) => self.reply(st, &answer),
            Taken::Refused(answer, why) => {
                complain!(st, gpadl = id.get(), "GPADL refused: {why}");
                self.reply(st, &answer);
            }
            // The rest of a GPADL that was refused, normally.
            Taken::Unknown => tracing::debug!(gpadl = id.get(), "GPADL_BODY ignored"),
        }
    }

    pub(super) fn gpadl_teardown(&self, st: &mut State, request: &GpadlTeardown) {
        match st.gpadls.teardown(request) {
            Ok(Some(answer)) => self.reply(st, &answer),
            // Refused for now: the answer follows when the channel is closed.
            Ok(None) => tracing::debug!(gpadl = request.gpadl_id.get(), "GPADL is in use"),
            Err(why) => {
                let (channel, gpadl) = (request.channel_id.get(), request.gpadl_id.get());
                complain!(st, channel, gpadl, "GPADL_TEARDOWN ignored: {why}");
            }
        }
    }

    /// One use of a GPADL ends.
    pub(super) fn end_gpadl_use(&self, st: &mut State, id: GpadlId, serial: u64) {
        if let Some(answer) = st.gpadls.end_use(id, serial) {
            self.reply(st, &answer);
        }
    }

    /// The memory of a GPADL, for a VSP.
    pub(super) fn view_gpadl(
        &self,
        channel: ChannelId,
        id: GpadlId,
    ) -> Result<GpadlView, GpadlError> {
        let mut st = self.lock();
        let state = st.channels.get(&channel).map(|c| c.machine.state());
        if !matches!(state, Some(ChannelState::Open | ChannelState::Opening)) {
            return Err(GpadlError::Unknown(id));
        }
        let view = st.gpadls.view(self.memory(), channel, id);
        let (serial, buffer) = view.ok_or(GpadlError::Unknown(id))??;
        Ok(GpadlView {
            id,
            serial,
            buffer,
            server: self.weak(),
        })
    }

    pub(super) fn gpadl_view_dropped(&self, id: GpadlId, serial: u64) {
        self.end_gpadl_use(&mut self.lock(), id, serial);
    }
}
