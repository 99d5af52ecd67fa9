// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Which offloads are used: the choice that the guest makes of what the host can do, and what the host
//! makes of the guest's choice. [`super::offload`] has the structures.
//!
//! ```
//! use hv_proto::net::features::Offloads;
//! use hv_proto::net::nvsp::Version;
//!
//! // The host tells what it can do, the guest chooses, the host turns it on.
//! let told = Offloads::ALL.to_capabilities(None);
//! let chosen = Offloads::choose(&told, Version::V6_1);
//! let set = chosen.to_parameters(&chosen, Version::V6_1);
//! let on = Offloads::default().apply(&set, &Offloads::ALL).unwrap();
//! assert_eq!(on, chosen);
//! ```
//!
//! Uses the other modules of [`super`].
//!
//! Source: `rndis_netdev_set_hwcaps` in `drivers/net/hyperv/rndis_filter.c` of the kernel.

use super::nvsp::Version;
use super::offload::*;
use zerocopy::little_endian::U32;

/// Offloads: those that an adapter has, or those that are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums of TCP over IPv4 from the guest.
    pub tcp_ipv4_send: bool,
    /// Checksums of UDP over IPv4 from the guest.
    pub udp_ipv4_send: bool,
    /// Checksums of TCP over IPv6 from the guest.
    pub tcp_ipv6_send: bool,
    /// Checksums of UDP over IPv6 from the guest.
    pub udp_ipv6_send: bool,
    /// Checksums of IPv4 headers from the guest.
    pub ipv4_send: bool,
    /// Checksums of frames to the guest are looked at: TCP and UDP, IPv4 and IPv6.
    pub receive: bool,
    /// Largest frame of IPv4 that is divided, in bytes; 0 if none is.
    pub lso_ipv4: u32,
    /// Largest frame of IPv6 that is divided, in bytes; 0 if none is.
    pub lso_ipv6: u32,
    /// Segments of one connection to the guest may be put together.
    pub rsc: bool,
}

impl Offloads {
    /// All, with frames of up to 64 KiB.
    pub const ALL: Self = Self {
        tcp_ipv4_send: true,
        udp_ipv4_send: true,
        tcp_ipv6_send: true,
        udp_ipv6_send: true,
        ipv4_send: true,
        receive: true,
        lso_ipv4: 0xffff,
        lso_ipv6: 0xffff,
        rsc: true,
    };

    /// As the guest is told. `asked` is the header that the guest has sent with its query: the answer
    /// has no later revision.
    pub fn to_capabilities(&self, asked: Option<ObjectHeader>) -> Capabilities {
        let mut capabilities =
            Capabilities::with_revision(asked.map_or(3, |header| header.revision));
        let wrapped = Encapsulation::IEEE_802_3 | Encapsulation::IEEE_802_3_PQ_OOB;
        let wrapped = |on: bool| U32::new(if on { wrapped.bits() } else { 0 });
        let ipv4 = |tcp: bool, udp: bool, ip: bool| {
            let mut checksums = Ipv4Checksums::empty();
            checksums.set(Ipv4Checksums::TCP | Ipv4Checksums::TCP_OPTIONS, tcp);
            checksums.set(Ipv4Checksums::UDP, udp);
            checksums.set(Ipv4Checksums::IP, ip);
            checksums.set(Ipv4Checksums::IP_OPTIONS, tcp || udp || ip);
            U32::new(checksums.bits())
        };
        let ipv6 = |tcp: bool, udp: bool| {
            let mut checksums = Ipv6Checksums::empty();
            checksums.set(Ipv6Checksums::TCP | Ipv6Checksums::TCP_OPTIONS, tcp);
            checksums.set(Ipv6Checksums::UDP, udp);
            checksums.set(Ipv6Checksums::EXTENSION_HEADERS, tcp || udp);
            U32::new(checksums.bits())
        };
        let checksum = &mut capabilities.checksum;
        checksum.ipv4_send = ipv4(self.tcp_ipv4_send, self.udp_ipv4_send, self.ipv4_send);
        checksum.ipv4_send_encapsulation = wrapped(checksum.ipv4_send != U32::ZERO);
        checksum.ipv4_receive = ipv4(self.receive, self.receive, self.receive);
        checksum.ipv4_receive_encapsulation = wrapped(self.receive);
        checksum.ipv6_send = ipv6(self.tcp_ipv6_send, self.udp_ipv6_send);
        checksum.ipv6_send_encapsulation = wrapped(checksum.ipv6_send != U32::ZERO);
        checksum.ipv6_receive = ipv6(self.receive, self.receive);
        checksum.ipv6_receive_encapsulation = wrapped(self.receive);
        let lso = &mut capabilities.lso_v2;
        let segments = |on: bool| U32::new(if on { 2 } else { 0 });
        lso.ipv4_encapsulation = wrapped(self.lso_ipv4 != 0);
        lso.ipv4_max_size = self.lso_ipv4.into();
        lso.ipv4_min_segments = segments(self.lso_ipv4 != 0);
        lso.ipv6_encapsulation = wrapped(self.lso_ipv6 != 0);
        lso.ipv6_max_size = self.lso_ipv6.into();
        lso.ipv6_min_segments = segments(self.lso_ipv6 != 0);
        if self.lso_ipv6 != 0 {
            let options = Ipv6LsoOptions::EXTENSION_HEADERS | Ipv6LsoOptions::TCP_OPTIONS;
            lso.ipv6_options = options.bits().into();
        }
        capabilities.rsc_ipv4 = self.rsc.into();
        capabilities.rsc_ipv6 = self.rsc.into();
        capabilities
    }

    /// What a guest uses of what the host can do. The checksum of the IPv4 header is none of it: the
    /// guest computes it itself.
    pub fn choose(capabilities: &Capabilities, version: Version) -> Self {
        let ipv4 = capabilities.ipv4_send();
        let ipv6 = capabilities.ipv6_send();
        let tcp_ipv4 = ipv4.contains(Ipv4Checksums::TCP | Ipv4Checksums::TCP_OPTIONS);
        let tcp_ipv6 = ipv6.contains(
            Ipv6Checksums::TCP | Ipv6Checksums::TCP_OPTIONS | Ipv6Checksums::EXTENSION_HEADERS,
        );
        // Older hosts do not let it be turned on.
        let udp = version > Version::V4;
        Self {
            tcp_ipv4_send: tcp_ipv4,
            udp_ipv4_send: udp && tcp_ipv4 && ipv4.contains(Ipv4Checksums::UDP),
            tcp_ipv6_send: tcp_ipv6,
            udp_ipv6_send: udp && tcp_ipv6 && ipv6.contains(Ipv6Checksums::UDP),
            ipv4_send: false,
            receive: tcp_ipv4 || tcp_ipv6,
            lso_ipv4: capabilities.ipv4_lso().filter(|_| tcp_ipv4).unwrap_or(0),
            lso_ipv6: capabilities.ipv6_lso().filter(|_| tcp_ipv6).unwrap_or(0),
            rsc: version >= Version::V6_1 && capabilities.rsc(),
        }
    }

    /// What a guest sets to have these offloads of those that are `available`, and no others. What the
    /// host has not is not named.
    pub fn to_parameters(&self, available: &Self, version: Version) -> Parameters {
        let checksum = |on: bool, available: bool| match (available, on) {
            (false, _) => ChecksumSetting::NO_CHANGE,
            (true, false) => ChecksumSetting::DISABLED,
            (true, true) => ChecksumSetting::ENABLED,
        };
        let setting = |on: bool, available: bool| match (available, on) {
            (false, _) => Setting::NO_CHANGE,
            (true, false) => Setting::DISABLED,
            (true, true) => Setting::ENABLED,
        };
        let mut parameters = Parameters::unchanged(version);
        // Linux computes the checksum of the IPv4 header, and wants to see it.
        parameters.ipv4_checksum = ChecksumSetting::DISABLED;
        parameters.tcp_ipv4_checksum = checksum(self.tcp_ipv4_send, available.tcp_ipv4_send);
        parameters.tcp_ipv6_checksum = checksum(self.tcp_ipv6_send, available.tcp_ipv6_send);
        parameters.udp_ipv4_checksum = checksum(self.udp_ipv4_send, available.udp_ipv4_send);
        parameters.udp_ipv6_checksum = checksum(self.udp_ipv6_send, available.udp_ipv6_send);
        parameters.lso_v2_ipv4 = setting(self.lso_ipv4 != 0, available.lso_ipv4 != 0);
        parameters.lso_v2_ipv6 = setting(self.lso_ipv6 != 0, available.lso_ipv6 != 0);
        parameters.rsc_ipv4 = setting(self.rsc, available.rsc);
        parameters.rsc_ipv6 = setting(self.rsc, available.rsc);
        parameters
    }

    /// What is on after the guest has set `parameters`; `None` if it wants what `available` has not.
    pub fn apply(&self, parameters: &Parameters, available: &Self) -> Option<Self> {
        let send = |setting: ChecksumSetting, now, can: bool| {
            let on = setting.apply_to_send(now);
            // What is on is there; only the wish for what is not there fails.
            (can || !on).then_some(on)
        };
        let lso = |setting: Setting, now: u32, max: u32| {
            let on = setting.apply(now != 0);
            (max != 0 || !on).then_some(if on { max } else { 0 })
        };
        let receive = [
            parameters.tcp_ipv4_checksum,
            parameters.udp_ipv4_checksum,
            parameters.tcp_ipv6_checksum,
            parameters.udp_ipv6_checksum,
        ]
        .into_iter()
        .filter(|setting| *setting != ChecksumSetting::NO_CHANGE)
        .map(|setting| setting.apply_to_receive(self.receive))
        .reduce(|a, b| a || b)
        .unwrap_or(self.receive);
        let rsc_ipv4 = parameters.rsc_ipv4.apply(self.rsc);
        let rsc = rsc_ipv4 && parameters.rsc_ipv6.apply(self.rsc);
        if rsc && !available.rsc {
            return None;
        }
        Some(Self {
            tcp_ipv4_send: send(
                parameters.tcp_ipv4_checksum,
                self.tcp_ipv4_send,
                available.tcp_ipv4_send,
            )?,
            udp_ipv4_send: send(
                parameters.udp_ipv4_checksum,
                self.udp_ipv4_send,
                available.udp_ipv4_send,
            )?,
            tcp_ipv6_send: send(
                parameters.tcp_ipv6_checksum,
                self.tcp_ipv6_send,
                available.tcp_ipv6_send,
            )?,
            udp_ipv6_send: send(
                parameters.udp_ipv6_checksum,
                self.udp_ipv6_send,
                available.udp_ipv6_send,
            )?,
            ipv4_send: send(
                parameters.ipv4_checksum,
                self.ipv4_send,
                available.ipv4_send,
            )?,
            receive: receive && available.receive,
            lso_ipv4: lso(parameters.lso_v2_ipv4, self.lso_ipv4, available.lso_ipv4)?,
            lso_ipv6: lso(parameters.lso_v2_ipv6, self.lso_ipv6, available.lso_ipv6)?,
            rsc,
        })
    }
}
