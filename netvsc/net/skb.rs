// SPDX-License-Identifier: GPL-2.0

//! Packets, on their way out and on their way in.
//!
//! C header: [`include/linux/skbuff.h`](srctree/include/linux/skbuff.h)

use super::NetDevice;
use crate::raw;
use core::{
    marker::PhantomData,
    mem::{
        ManuallyDrop,
        MaybeUninit, //
    },
    ptr::NonNull, //
};
use kernel::{
    bindings,
    error::to_result,
    prelude::*, //
};

/// Ethernet protocol numbers.
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;

/// IP protocol numbers.
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

/// The transport protocol of a packet whose checksum is to be computed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// TCP over IPv4.
    Tcp4,
    /// UDP over IPv4.
    Udp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv6.
    Udp6,
    /// Something else.
    Other,
}

/// What a flow of packets is, for the choice of hash.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv4.
    Udp4,
    /// UDP over IPv6.
    Udp6,
    /// Something else.
    Other,
}

/// A piece of a packet: memory of the kernel without gaps, in both virtual and physical addresses.
#[derive(Clone, Copy)]
pub(crate) struct Piece<'a> {
    address: *const u8,
    len: u32,
    _p: PhantomData<&'a ()>,
}

impl Piece<'_> {
    /// Bytes of the kernel's heap.
    pub(crate) fn of_heap(bytes: &KVec<u8>) -> Result<Piece<'_>> {
        Ok(Piece {
            address: bytes.as_ptr(),
            len: u32::try_from(bytes.len())?,
            _p: PhantomData,
        })
    }

    const EMPTY: Self = Self {
        address: core::ptr::null(),
        len: 0,
        _p: PhantomData,
    };

    /// Where it is. Others may change what is there, as a user does who sends a file.
    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.address
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// The physical address.
    pub(crate) fn phys(&self) -> u64 {
        // SAFETY: The address is in the kernel's linear mapping.
        unsafe { raw::netvsc_helper_phys(self.address.cast()) }
    }
}

/// Number of fragments of a packet, which is up to the kernel's configuration.
const fn frags<const N: usize>(_: fn(&raw_info) -> &[bindings::skb_frag_t; N]) -> usize {
    N
}

/// Most pieces of a packet: the linear part, and the fragments.
pub(crate) const MAX_PIECES: usize = 1 + frags(|info| &info.frags);

/// A packet to be sent. Dropping it counts as losing it.
///
/// # Invariants
///
/// The pointer is to a valid packet that belongs to this value.
pub(crate) struct TxSkb(NonNull<raw_skb>);

#[expect(non_camel_case_types, reason = "short for the C type")]
type raw_info = bindings::skb_shared_info;

#[expect(non_camel_case_types, reason = "short for the C type")]
type raw_skb = bindings::sk_buff;

// SAFETY: A packet belongs to no thread.
unsafe impl Send for TxSkb {}
// SAFETY: Shared references only read.
unsafe impl Sync for TxSkb {}

impl TxSkb {
    /// # Safety
    ///
    /// The packet must be valid, and is handed over.
    pub(super) unsafe fn from_raw(skb: NonNull<raw_skb>) -> Self {
        // INVARIANT: as the caller promises.
        Self(skb)
    }

    pub(super) fn into_raw(self) -> *mut raw_skb {
        ManuallyDrop::new(self).0.as_ptr()
    }

    fn as_raw(&self) -> *mut raw_skb {
        self.0.as_ptr()
    }

    fn raw(&self) -> &raw_skb {
        // SAFETY: By the type invariants the packet is valid, and nobody else changes the fields that
        // this type reads while it owns the packet.
        unsafe { self.0.as_ref() }
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u32 {
        self.raw().len
    }

    /// Number of the transmit queue.
    pub(crate) fn queue(&self) -> u16 {
        self.raw().queue_mapping
    }

    /// The linear part.
    fn head(&self) -> Piece<'_> {
        let skb = self.raw();
        Piece {
            address: skb.data,
            len: skb.len.saturating_sub(skb.data_len),
            _p: PhantomData,
        }
    }

    /// The pieces of the packet in their order; how many there are.
    pub(crate) fn pieces(&self) -> ([Piece<'_>; MAX_PIECES], usize) {
        let mut pieces = [Piece::EMPTY; MAX_PIECES];
        let mut count = 0;
        let mut add = |piece: Piece<'static>| {
            if let Some(place) = pieces.get_mut(count) {
                if piece.len != 0 {
                    *place = piece;
                    count += 1;
                }
            }
        };
        let head = self.head();
        add(Piece {
            address: head.address,
            len: head.len,
            _p: PhantomData,
        });
        // SAFETY: By the type invariants the packet is valid, and so is its shared info, which does not
        // change while a reference to the packet exists.
        let info = unsafe { raw::netvsc_helper_skb_shinfo(self.as_raw()) };
        // SAFETY: as above.
        let count_frags = unsafe { (*info).nr_frags };
        for n in 0..u32::from(count_frags) {
            // SAFETY: There are so many fragments, all of them pages with an address, for the device
            // does not claim to take others.
            let (address, len) = unsafe {
                (
                    raw::netvsc_helper_frag_address(info, n),
                    (*info).frags.get(n as usize).map_or(0, |frag| frag.len),
                )
            };
            add(Piece {
                address: address.cast(),
                len,
                _p: PhantomData,
            });
        }
        (pieces, count)
    }

    /// Puts the whole packet into the linear part.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn linearize(&mut self) -> Result {
        // SAFETY: By the type invariants the packet is valid and ours.
        to_result(unsafe { raw::netvsc_helper_skb_linearize(self.as_raw()) })
    }

    /// Sees to it that the headers may be changed, and that there are `len` bytes of room before them.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn make_headroom(&mut self, len: u32) -> Result {
        // SAFETY: By the type invariants the packet is valid and ours.
        to_result(unsafe { raw::netvsc_helper_skb_cow_head(self.as_raw(), len) })
    }

    /// Writes `bytes` to the start of the room before the headers, and returns where they are.
    ///
    /// # Errors
    ///
    /// `ENOSPC` if there is not so much room: call [`TxSkb::make_headroom`] first.
    pub(crate) fn write_headroom(&mut self, bytes: &[u8]) -> Result<Piece<'_>> {
        let skb = self.raw();
        // The buffer begins at `head`, and the packet at `data`, which is not before that.
        let room = (skb.data as usize).saturating_sub(skb.head as usize);
        if bytes.len() > room {
            return Err(ENOSPC);
        }
        // SAFETY: There are `room` bytes at `head` before the packet, of which nobody else makes use
        // once the packet belongs to a driver, as `skb_cow_head()` has seen to if there were clones.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), skb.head, bytes.len()) };
        Ok(Piece {
            address: skb.head,
            // CAST: not more than the room, which fits into a packet.
            len: bytes.len() as u32,
            _p: PhantomData,
        })
    }

    fn protocol(&self) -> u16 {
        // SAFETY: By the type invariants the packet is valid.
        unsafe { raw::netvsc_helper_skb_protocol(self.as_raw()) }
    }

    /// Whether the frame has a tag of a VLAN in it.
    pub(crate) fn has_inline_tag(&self) -> bool {
        matches!(self.protocol(), ETH_P_8021Q | ETH_P_8021AD)
    }

    /// Gives the packet up without freeing its memory, which somebody may be reading still. Its sender
    /// does not have to wait for it.
    pub(crate) fn leak(self) {
        // SAFETY: By the type invariants the packet is valid and ours.
        unsafe { raw::netvsc_helper_skb_orphan(self.into_raw()) };
    }

    /// Whether the device is to cut the packet into segments.
    pub(crate) fn is_gso(&self) -> bool {
        // SAFETY: By the type invariants the packet is valid.
        unsafe { raw::netvsc_helper_skb_is_gso(self.as_raw()) }
    }

    /// Size of a segment, without headers.
    pub(crate) fn gso_size(&self) -> u16 {
        // SAFETY: By the type invariants the packet is valid, and so is its shared info.
        unsafe { (*raw::netvsc_helper_skb_shinfo(self.as_raw())).gso_size }
    }

    /// Prepares the headers of a packet that the device is to cut into TCP segments: no lengths, and a
    /// checksum of the pseudo header without one. Says whether it is IPv6.
    pub(crate) fn prepare_tso(&mut self) -> bool {
        // SAFETY: By the type invariants the packet is valid.
        let v6 = unsafe { raw::netvsc_helper_skb_is_tso6(self.as_raw()) };
        // SAFETY: The packet is valid and ours, its headers may be changed (`make_headroom()`), and the
        // stack marks as GSO only packets with the headers of TCP in the linear part.
        unsafe {
            if v6 {
                raw::netvsc_helper_skb_prepare_tso6(self.as_raw());
            } else {
                raw::netvsc_helper_skb_prepare_tso4(self.as_raw());
            }
        }
        v6
    }

    /// Whether the checksum of the transport protocol is to be computed.
    pub(crate) fn wants_checksum(&self) -> bool {
        // SAFETY: By the type invariants the packet is valid.
        unsafe { raw::netvsc_helper_skb_wants_checksum(self.as_raw()) }
    }

    /// The transport protocol of a packet whose checksum is to be computed.
    pub(crate) fn transport(&self) -> Transport {
        // SAFETY: By the type invariants the packet is valid. A packet whose checksum is to be computed
        // has its headers, up to that of the transport protocol, in the linear part.
        unsafe {
            match self.protocol() {
                ETH_P_IP => match raw::netvsc_helper_skb_ipv4_protocol(self.as_raw()) {
                    IPPROTO_TCP => Transport::Tcp4,
                    IPPROTO_UDP => Transport::Udp4,
                    _ => Transport::Other,
                },
                ETH_P_IPV6 => match raw::netvsc_helper_skb_ipv6_protocol(self.as_raw()) {
                    IPPROTO_TCP => Transport::Tcp6,
                    IPPROTO_UDP => Transport::Udp6,
                    _ => Transport::Other,
                },
                _ => Transport::Other,
            }
        }
    }

    /// Where the header of the transport protocol starts, in bytes.
    pub(crate) fn transport_offset(&self) -> u32 {
        // SAFETY: By the type invariants the packet is valid.
        unsafe { raw::netvsc_helper_skb_transport_offset(self.as_raw()) }
    }

    /// Computes the checksum that the device cannot.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or `EINVAL` for packets that make no sense.
    pub(crate) fn compute_checksum(&mut self) -> Result {
        // SAFETY: By the type invariants the packet is valid and ours.
        to_result(unsafe { raw::skb_checksum_help(self.as_raw()) })
    }

    /// The VLAN tag beside the packet: priority, DEI bit and number.
    pub(crate) fn vlan(&self) -> Option<u16> {
        // SAFETY: By the type invariants the packet is valid.
        unsafe {
            raw::netvsc_helper_skb_has_vlan(self.as_raw())
                .then(|| raw::netvsc_helper_skb_vlan(self.as_raw()))
        }
    }

    /// Moves a VLAN tag that is in the packet to its place beside it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn hoist_vlan(&mut self) -> Result {
        if self.protocol() != ETH_P_8021Q || self.vlan().is_some() {
            return Ok(());
        }
        // SAFETY: By the type invariants the packet is valid and ours.
        to_result(unsafe { raw::netvsc_helper_skb_hoist_vlan(self.as_raw()) })
    }

    /// The hash of the packet's flow, if it is known already.
    pub(crate) fn known_hash(&self) -> Option<u32> {
        // SAFETY: By the type invariants the packet is valid.
        let hash = unsafe { raw::netvsc_helper_skb_hash_raw(self.as_raw()) };
        (hash != 0).then_some(hash)
    }

    /// The packet is about to be sent: takes a time stamp if somebody wants one.
    pub(crate) fn timestamp(&mut self) {
        // SAFETY: By the type invariants the packet is valid and ours.
        unsafe { raw::netvsc_helper_skb_timestamp(self.as_raw()) };
    }

    /// The packet has been sent, or copied to be. Any context.
    pub(crate) fn consume(self) {
        // SAFETY: By the type invariants the packet is ours to free.
        unsafe { raw::netvsc_helper_skb_consume(self.into_raw()) };
    }

    /// As [`TxSkb::consume`], in a NAPI poll.
    pub(crate) fn consume_in_poll(self, _cx: &super::PollContext<'_>) {
        // SAFETY: By the type invariants the packet is ours to free; a budget that is not zero says that
        // this is a poll.
        unsafe { raw::napi_consume_skb(self.into_raw(), 1) };
    }
}

impl Drop for TxSkb {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the packet is ours to free.
        unsafe { raw::netvsc_helper_skb_free(self.as_raw()) };
    }
}

/// A packet for which a transmit queue is to be chosen.
pub(crate) struct QueuedSkb<'a>(NonNull<raw_skb>, PhantomData<&'a ()>);

impl QueuedSkb<'_> {
    /// # Safety
    ///
    /// The packet must be valid, and the caller must be allowed to change it, for as long as the value
    /// exists.
    pub(super) unsafe fn from_raw(skb: NonNull<raw_skb>) -> Self {
        Self(skb, PhantomData)
    }

    /// The queue that the packet's socket used last.
    pub(crate) fn recorded_tx_queue(&self) -> Option<u16> {
        // SAFETY: The packet is valid.
        let queue = unsafe { raw::netvsc_helper_skb_recorded_tx_queue(self.0.as_ptr()) };
        u16::try_from(queue).ok()
    }

    /// Whether the packet may overtake, or be overtaken by, earlier ones of its flow.
    pub(crate) fn may_reorder(&self) -> bool {
        // SAFETY: The packet is valid.
        unsafe { raw::netvsc_helper_skb_may_reorder(self.0.as_ptr()) }
    }

    /// The queue on which a forwarded packet came in.
    pub(crate) fn recorded_rx_queue(&self) -> Option<u16> {
        // SAFETY: The packet is valid.
        let queue = unsafe { raw::netvsc_helper_skb_recorded_rx_queue(self.0.as_ptr()) };
        u16::try_from(queue).ok()
    }

    /// What kind of flow the packet belongs to.
    pub(crate) fn flow(&mut self) -> Flow {
        // SAFETY: The packet is valid.
        match unsafe { raw::netvsc_helper_skb_flow_kind(self.0.as_ptr()) } {
            1 => Flow::Tcp4,
            2 => Flow::Tcp6,
            3 => Flow::Udp4,
            4 => Flow::Udp6,
            _ => Flow::Other,
        }
    }

    /// The hash of addresses and ports.
    pub(crate) fn hash(&mut self) -> u32 {
        // SAFETY: The packet is valid, and may be changed.
        unsafe { raw::netvsc_helper_skb_hash(self.0.as_ptr()) }
    }

    /// The hash of the addresses only.
    pub(crate) fn address_hash(&mut self) -> u32 {
        // SAFETY: The packet is valid.
        unsafe { raw::netvsc_helper_skb_l3_hash(self.0.as_ptr()) }
    }

    /// Lets later packets of the socket use this queue.
    pub(crate) fn remember_tx_queue(&mut self, queue: u16) {
        // SAFETY: The packet is valid.
        unsafe { raw::netvsc_helper_skb_remember_tx_queue(self.0.as_ptr(), queue) };
    }
}

/// A packet that came in, while the driver puts it together.
///
/// # Invariants
///
/// The pointer is to a valid packet without fragments that belongs to this value.
pub(crate) struct RxSkb(NonNull<raw_skb>);

impl RxSkb {
    /// # Safety
    ///
    /// The packet must be valid and linear, and is handed over.
    pub(super) unsafe fn from_raw(skb: NonNull<raw_skb>) -> Self {
        // INVARIANT: as the caller promises.
        Self(skb)
    }

    pub(super) fn into_raw(self) -> *mut raw_skb {
        ManuallyDrop::new(self).0.as_ptr()
    }

    fn as_raw(&self) -> *mut raw_skb {
        self.0.as_ptr()
    }

    /// Appends `len` bytes, which `fill` writes and returns.
    ///
    /// # Errors
    ///
    /// `ENOSPC` if there is no room for them, or the error of `fill`.
    pub(crate) fn append(
        &mut self,
        len: u32,
        fill: impl FnOnce(&mut [MaybeUninit<u8>]) -> Result<&mut [u8]>,
    ) -> Result {
        let skb = self.as_raw();
        // SAFETY: By the type invariants the packet is valid; tail and end are offsets from its head.
        let room = unsafe { (*skb).end.saturating_sub((*skb).tail) };
        if len > room {
            return Err(ENOSPC);
        }
        // SAFETY: as above; the room begins at the tail.
        let start = unsafe { (*skb).head.add((*skb).tail as usize) };
        // SAFETY: There are `len` bytes of room, which belong to the packet, and nobody else knows them.
        let room = unsafe { core::slice::from_raw_parts_mut(start.cast(), len as usize) };
        let filled = fill(room)?;
        if filled.as_ptr() != start || filled.len() != len as usize {
            return Err(EINVAL);
        }
        // SAFETY: The packet is ours, linear, and has the room.
        unsafe { raw::skb_put(skb, len) };
        Ok(())
    }

    /// The bytes that are there: before [`RxSkb::set_device`] from the Ethernet header on.
    pub(crate) fn bytes(&self) -> &[u8] {
        let skb = self.as_raw();
        // SAFETY: By the type invariants the packet is valid, linear, and ours, and `append` has seen that
        // its bytes were written.
        unsafe { core::slice::from_raw_parts((*skb).data, (*skb).len as usize) }
    }

    /// The packet was put together from `count` segments of TCP with `size` bytes of payload, but for the
    /// last.
    pub(crate) fn set_segments(&mut self, ipv6: bool, size: u16, count: u16) {
        // SAFETY: By the type invariants the packet is ours.
        unsafe { raw::netvsc_helper_skb_set_segments(self.as_raw(), ipv6, size, count) };
    }

    /// The packet came in on `dev`: takes its Ethernet header off.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is too short for one.
    pub(crate) fn set_device(&mut self, dev: &NetDevice) -> Result {
        const ETHERNET_HEADER: u32 = 14;
        // SAFETY: By the type invariants the packet is valid.
        if unsafe { (*self.as_raw()).len } < ETHERNET_HEADER {
            return Err(EINVAL);
        }
        // SAFETY: The packet is ours and long enough; the device is valid.
        unsafe { raw::netvsc_helper_skb_set_protocol(self.as_raw(), dev.as_raw()) };
        Ok(())
    }

    /// The checksum of the transport protocol has been checked.
    pub(crate) fn set_checksum_ok(&mut self) {
        // SAFETY: By the type invariants the packet is ours.
        unsafe { raw::netvsc_helper_skb_checksum_ok(self.as_raw()) };
    }

    /// Computes the checksum of the IPv4 header, if there is such a header.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the header is not whole.
    pub(crate) fn fix_ipv4_checksum(&mut self) -> Result {
        // SAFETY: By the type invariants the packet is ours; the function checks its length.
        unsafe { raw::netvsc_helper_skb_fix_ipv4_checksum(self.as_raw()) }
            .then_some(())
            .ok_or(EINVAL)
    }

    /// Sets the hash of the packet's flow.
    pub(crate) fn set_hash(&mut self, hash: u32) {
        // SAFETY: By the type invariants the packet is ours.
        unsafe { raw::netvsc_helper_skb_set_hash(self.as_raw(), hash) };
    }

    /// Sets the VLAN tag beside the packet.
    pub(crate) fn set_vlan(&mut self, tci: u16) {
        // SAFETY: By the type invariants the packet is ours.
        unsafe { raw::netvsc_helper_skb_set_vlan(self.as_raw(), tci) };
    }

    /// Notes the queue on which the packet came in.
    pub(crate) fn set_queue(&mut self, queue: u16) {
        // SAFETY: By the type invariants the packet is ours.
        unsafe { raw::netvsc_helper_skb_record_rx_queue(self.as_raw(), queue) };
    }

    /// Whether the packet is for a group, or for all. Known after [`RxSkb::set_device`].
    pub(crate) fn is_multicast(&self) -> bool {
        // SAFETY: By the type invariants the packet is valid.
        unsafe { raw::netvsc_helper_skb_is_multicast(self.as_raw()) }
    }
}

impl Drop for RxSkb {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the packet is ours to free.
        unsafe { raw::netvsc_helper_skb_free(self.as_raw()) };
    }
}
