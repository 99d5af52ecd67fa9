// SPDX-License-Identifier: GPL-2.0

//! Abstraction of the kernel's network device interface, which the `kernel` crate does not have yet.
//!
//! It knows nothing of Hyper-V: a driver implements [`Operations`] and [`EthtoolOperations`] and
//! registers a [`NetDevice`]. It is safe to use from outside; all `unsafe` code that the interface
//! needs is in here.
//!
//! C headers: [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h),
//! [`include/linux/skbuff.h`](srctree/include/linux/skbuff.h)

mod device;
mod ethtool;
mod features;
mod napi;
mod rtnl;
mod skb;
mod system;

pub(crate) use self::{
    device::{
        LinkStats,
        NetDevice,
        Operations,
        Registration,
        RxFlags,
        Transmit, //
    },
    ethtool::{
        message_level,
        set_message_level,
        Channels,
        EthtoolOperations,
        FlowType,
        Level,
        LinkSettings,
        MessageLevelCallbacks,
        Rings,
        RxHash,
        Strings, //
    },
    features::Features,
    napi::{
        Enabled,
        HasNapi,
        Napi,
        PollContext, //
    },
    rtnl::Rtnl,
    skb::{
        Flow,
        Piece,
        QueuedSkb,
        RxSkb,
        Transport,
        TxSkb, //
    },
    system::{
        cpu_is_present,
        default_rss_queues,
        may_log,
        online_cpus,
        BhDisabled, //
    }, //
};
pub(crate) use ethtool::message_level_callbacks;
pub(crate) use napi::impl_has_napi;
