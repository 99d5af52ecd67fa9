// SPDX-License-Identifier: MIT OR Apache-2.0

//! A host that breaks the rules: for tests that show what a guest makes of it.
//!
//! [`Server::hostile`] gives access to what only the server should touch: it sends any message to the guest, whatever
//! the server's own state, and changes rings under the feet of both sides. The server knows nothing of it, so what the
//! guest answers may be news to it, about which it complains in the log, as about a guest's mistake.

use hv_proto::ids::{ChannelId, VpIndex};
use hv_proto::message::{Message, OfferChannel};
use hv_proto::ring::{Field, RingMem};
use hv_proto::synic::SynicMessageType;

use super::offers::describe;
use super::server::Server;
use super::trace::Direction;
use crate::hypervisor::SynicError;

/// The ways in which a server can break the rules. See [`Server::hostile`].
pub struct Hostile<'a>(&'a Server);

impl Server {
    /// Breaks the rules, for tests of guests.
    pub fn hostile(&self) -> Hostile<'_> {
        Hostile(self)
    }
}

impl Hostile<'_> {
    /// The offer of a channel, as the guest gets it: something to change and [`send`](Self::send). `None` if there is
    /// no such channel.
    pub fn offer(&self, id: ChannelId) -> Option<OfferChannel> {
        describe(&self.0.lock(), id)
    }

    /// Sends a message to the guest, after those that wait. Returns false if no guest is connected.
    pub fn send<M: Message>(&self, message: &M) -> bool {
        let mut st = self.0.lock();
        let connected = st.connection.agreed().is_some();
        self.0.reply(&mut st, message);
        connected
    }

    /// Sends bytes that need not be a message. Returns false if no guest is connected.
    ///
    /// # Errors
    /// Many messages wait already, or there are more than 240 bytes.
    pub fn send_bytes(&self, bytes: &[u8]) -> Result<bool, SynicError> {
        let st = self.0.lock();
        let Some(target) = st.connection.agreed().map(|a| a.target) else {
            return Ok(false);
        };
        let kind = SynicMessageType::CHANNEL.get();
        let synic = self.0.synic();
        synic.post_message(target.vp, target.sint, kind, bytes)?;
        Ok(true)
    }

    /// Raises event flag `flag` on a processor, as if the channel of that number had a packet. Returns false if no
    /// guest is connected.
    ///
    /// # Errors
    /// A number is out of range, or the guest has not enabled the processor's SynIC.
    pub fn interrupt(&self, vp: VpIndex, flag: u16) -> Result<bool, SynicError> {
        let st = self.0.lock();
        let Some(target) = st.connection.agreed().map(|a| a.target) else {
            return Ok(false);
        };
        self.0.synic().signal_event(vp, target.sint, flag)?;
        Ok(true)
    }

    /// Stores a control word of a ring, and signals the guest. Returns false if the channel is not open.
    ///
    /// The guest to host ring is read, and the other one written, by the server's side too, which does not look at the
    /// words that it owns itself.
    pub fn store(&self, id: ChannelId, ring: Direction, field: Field, value: u32) -> bool {
        self.with_ring(id, ring, |mem| mem.store(field, value))
    }

    /// Writes into the data area of a ring, from `offset` (less than its size) on, and signals the guest. Returns false
    /// if the channel is not open.
    pub fn write(&self, id: ChannelId, ring: Direction, offset: u32, bytes: &[u8]) -> bool {
        self.with_ring(id, ring, |mem| mem.write_at(offset, bytes))
    }

    /// A control word of a ring; `None` if the channel is not open.
    pub fn load(&self, id: ChannelId, ring: Direction, field: Field) -> Option<u32> {
        let st = self.0.lock();
        let control = st.channels.get(&id)?.control.as_ref()?;
        Some(control.ring(ring).load(field))
    }

    fn with_ring(&self, id: ChannelId, ring: Direction, f: impl FnOnce(&dyn RingMem)) -> bool {
        let st = self.0.lock();
        let control = st.channels.get(&id).and_then(|c| c.control.as_ref());
        let Some(control) = control else {
            return false;
        };
        f(control.ring(ring));
        control.shared.interrupt();
        true
    }
}

#[cfg(test)]
mod tests {
    use hv_proto::message::{HostMessage, MessageType, RescindChannelOffer};
    use hv_proto::version::Version;

    use super::super::test_guest::{FakeGuest, SOON, guid};
    use super::super::{HostChannel, OfferParams, OpenError, OpenParams, Vsp};
    use super::*;

    /// Opens channels and does nothing with them.
    struct Idle(Option<HostChannel>);

    impl Vsp for Idle {
        fn open(&mut self, channel: HostChannel, _: OpenParams) -> Result<(), OpenError> {
            self.0 = Some(channel);
            Ok(())
        }

        fn close(&mut self, _: u16) {
            self.0 = None;
        }
    }

    fn offer(guest: &FakeGuest) -> super::super::OfferHandle {
        let params = OfferParams::new("idle", guid(1), guid(2));
        guest.server.offer(params, Box::new(Idle(None))).unwrap()
    }

    #[test]
    fn messages_go_out_whatever_the_state() {
        let guest = FakeGuest::connected(Version::V5_3);
        let _device = offer(&guest);
        let known = guest.request_offers()[0];
        let hostile = guest.server.hostile();
        assert_eq!(
            hostile.offer(known.channel_id).unwrap().connection_id,
            known.connection_id
        );
        assert!(hostile.offer(ChannelId::new(77)).is_none());

        // The same offer again, and a rescind of what was never offered.
        assert!(hostile.send(&known));
        assert_eq!(guest.expect_offer().encode(), known.encode());
        assert!(hostile.send(&RescindChannelOffer {
            channel_id: ChannelId::new(77)
        }));
        assert_eq!(guest.expect_rescind(), ChannelId::new(77));
        let rescind = RescindChannelOffer {
            channel_id: ChannelId::new(u32::MAX),
        };
        assert!(hostile.send_bytes(&rescind.encode()).unwrap());
        assert_eq!(guest.expect_rescind(), rescind.channel_id);
        // The server's own account has not changed.
        assert_eq!(guest.server.status().channels.len(), 1);
    }

    #[test]
    fn nothing_goes_to_a_guest_that_is_not_there() {
        let guest = FakeGuest::new(Version::V5_3);
        let hostile = guest.server.hostile();
        assert!(!hostile.send(&RescindChannelOffer {
            channel_id: ChannelId::new(1)
        }));
        assert!(!hostile.send_bytes(&[0; 8]).unwrap());
        assert!(!hostile.interrupt(VpIndex::new(0), 1).unwrap());
        assert!(!hostile.store(ChannelId::new(1), Direction::ToGuest, Field::WriteIndex, 0));
    }

    #[test]
    fn rings_change_under_the_guest() {
        let mut guest = FakeGuest::connected(Version::V5_3);
        let _device = offer(&guest);
        let offer = guest.request_offers()[0];
        let id = offer.channel_id;
        let hostile_store = |guest: &FakeGuest, ring, field, value| {
            guest.server.hostile().store(id, ring, field, value)
        };
        // A closed channel has no rings.
        assert!(!hostile_store(
            &guest,
            Direction::ToGuest,
            Field::WriteIndex,
            8
        ));
        let mut channel = guest.open(&offer, 3, 0).unwrap();
        assert!(hostile_store(
            &guest,
            Direction::ToGuest,
            Field::WriteIndex,
            0xffff_fff8
        ));
        assert!(guest.synic.wait_event(SOON).is_some());
        let load = |ring, field| guest.server.hostile().load(id, ring, field);
        assert_eq!(
            load(Direction::ToGuest, Field::WriteIndex),
            Some(0xffff_fff8)
        );
        assert!(hostile_store(
            &guest,
            Direction::ToHost,
            Field::ReadIndex,
            12345
        ));
        assert!(channel.try_send(1, &[0; 8], false).is_err());
        assert!(
            guest
                .server
                .hostile()
                .write(id, Direction::ToGuest, 8188, &[1, 2, 3, 4, 5])
        );
        // Pages: two rings of one control page and two data pages each.
        assert_eq!(channel.page(5)[4092..], [1, 2, 3, 4]);
        assert_eq!(channel.page(4)[0], 5);
    }

    #[test]
    fn a_sub_channel_goes_alone() {
        let mut guest = FakeGuest::connected(Version::V5_3);
        let device = offer(&guest);
        let primary = guest.request_offers()[0];
        let _open = guest.open(&primary, 2, 0).unwrap();
        device.device().offer_subchannels(2).unwrap();
        let (first, second) = (guest.expect_offer(), guest.expect_offer());
        let server = &guest.server;
        assert!(!server.rescind_subchannel(primary.channel_id));
        assert!(!server.rescind_subchannel(ChannelId::new(99)));
        assert!(server.rescind_subchannel(first.channel_id));
        assert_eq!(guest.expect_rescind(), first.channel_id);
        guest.release(first.channel_id);
        let ids = || -> Vec<u32> { server.status().channels.iter().map(|c| c.id).collect() };
        assert_eq!(ids(), [primary.channel_id.get(), second.channel_id.get()]);
        // Its place can be filled again.
        device.device().offer_subchannels(2).unwrap();
        match guest.expect() {
            HostMessage::OfferChannel(again) => {
                assert_eq!(again.sub_channel_index, first.sub_channel_index);
                assert_ne!(again.channel_id, first.channel_id);
            }
            other => panic!("{:?} instead of {:?}", other, MessageType::OFFER_CHANNEL),
        }
    }
}
