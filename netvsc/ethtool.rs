// SPDX-License-Identifier: GPL-2.0

//! What `ethtool` shows of an adapter, and sets.

use crate::{
    adapter::Adapter,
    net::{
        message_level_callbacks,
        Channels,
        EthtoolOperations,
        FlowType,
        Level,
        LinkSettings,
        MessageLevelCallbacks,
        Rings,
        Rtnl,
        RxHash,
        Strings, //
    },
    nic::{
        MIN_RX_SECTIONS,
        MIN_TX_SECTIONS, //
    },
    session::Config,
    stats::{
        Events,
        QueueStats, //
    }, //
};
use hv_proto::net::{
    nvsp::{
        Version,
        SEND_TABLE_SIZE, //
    },
    rss,
    sections::Sections, //
};
use kernel::prelude::*;

/// Statistics of a virtual function beside the adapter, in the C driver; there is none here.
const VF: [&str; 5] = [
    "vf_rx_packets",
    "vf_rx_bytes",
    "vf_tx_packets",
    "vf_tx_bytes",
    "vf_tx_dropped",
];

/// Statistics of a queue. Those of XDP are those of the C driver; there is no XDP here.
const QUEUE: [(&str, &str); 8] = [
    ("tx", "packets"),
    ("tx", "bytes"),
    ("tx", "xdp_xmit"),
    ("rx", "packets"),
    ("rx", "bytes"),
    ("rx", "xdp_drop"),
    ("rx", "xdp_redirect"),
    ("rx", "xdp_tx"),
];

/// Statistics of a CPU: of the channels that it serves.
const CPU: [&str; 8] = [
    "rx_packets",
    "rx_bytes",
    "tx_packets",
    "tx_bytes",
    "vf_rx_packets",
    "vf_rx_bytes",
    "vf_tx_packets",
    "vf_tx_bytes",
];

fn queue_values(stats: &QueueStats) -> [u64; QUEUE.len()] {
    [
        stats.tx_packets.get(),
        stats.tx_bytes.get(),
        0,
        stats.rx_packets.get(),
        stats.rx_bytes.get(),
        0,
        0,
        0,
    ]
}

impl Adapter {
    /// Number of queues that have statistics.
    fn queues(&self, rtnl: &Rtnl) -> u16 {
        self.0.attached(rtnl).map_or(1, |session| session.count())
    }

    /// What the queues that a CPU serves have done.
    fn cpu_values(&self, rtnl: &Rtnl, cpu: u32) -> [u64; CPU.len()] {
        let mut sum = [0u64; CPU.len()];
        let Ok(session) = self.0.attached(rtnl) else {
            return sum;
        };
        for index in 0..session.count() {
            let serves = session
                .queue(index)
                .and_then(|queue| queue.channel())
                .is_some_and(|channel| channel.target_cpu() == cpu);
            if let Some(stats) = self.0.stats.queue(index).filter(|_| serves) {
                let values = [
                    stats.rx_packets.get(),
                    stats.rx_bytes.get(),
                    stats.tx_packets.get(),
                    stats.tx_bytes.get(),
                ];
                for (to, from) in sum.iter_mut().zip(values) {
                    *to = to.wrapping_add(from);
                }
            }
        }
        sum
    }
}

/// What of a buffer a user sees.
fn sections(sections: &Sections, max_bytes: u32) -> (u32, u32) {
    let most = max_bytes.checked_div(sections.size()).unwrap_or(0);
    (sections.count(), most.max(sections.count()))
}

impl EthtoolOperations for Adapter {
    const DRIVER: &'static CStr = c"netvsc";
    const REGISTERS: usize = SEND_TABLE_SIZE;
    const REGISTERS_VERSION: u32 = 1;
    const KEY_SIZE: usize = rss::KEY_SIZE;
    // Users' tests look for these names, which are those of the C driver, among the module's symbols.
    const MESSAGE_LEVEL: MessageLevelCallbacks =
        message_level_callbacks!(Adapter, netvsc_get_msglevel, netvsc_set_msglevel);

    fn registers(&self, _rtnl: &Rtnl, registers: &mut [u32]) {
        for (to, from) in registers.iter_mut().zip(self.0.steering.table().0) {
            *to = from;
        }
    }

    fn message_level(&self) -> Level {
        self.0.message_level()
    }

    fn set_message_level(&self, level: Level) {
        self.0.set_message_level(level);
    }

    fn channels(&self, rtnl: &Rtnl) -> Result<Channels> {
        let session = self.0.attached(rtnl)?;
        Ok(Channels {
            max: session.max_channels(),
            count: session.served_count(),
        })
    }

    fn set_channels(&self, rtnl: &Rtnl, count: u32) -> Result {
        let session = self.0.attached(rtnl)?;
        let version = session.link().version().ok_or(EIO)?;
        if !version.has_sub_channels() || count == 0 || count > session.max_channels() {
            return Err(EINVAL);
        }
        drop(session);
        let config = self.0.config();
        let channels = count;
        self.0.reconfigure(rtnl, Config { channels, ..config })
    }

    fn rings(&self, rtnl: &Rtnl) -> Result<Rings> {
        let session = self.0.attached(rtnl)?;
        let link = session.link();
        let buffers = link.buffers().ok_or(EIO)?;
        let version = link.version().unwrap_or(Version::V1);
        let (rx, rx_max) = sections(&buffers.receive_sections, version.max_receive_buffer());
        let (tx, tx_max) = sections(&buffers.send_sections, version.max_send_buffer());
        Ok(Rings {
            rx,
            rx_max,
            tx,
            tx_max,
        })
    }

    fn set_rings(&self, rtnl: &Rtnl, rx: u32, tx: u32) -> Result {
        let now = self.rings(rtnl)?;
        let rx = rx.clamp(MIN_RX_SECTIONS.min(now.rx_max), now.rx_max);
        let tx = tx.clamp(MIN_TX_SECTIONS.min(now.tx_max), now.tx_max);
        if rx == now.rx && tx == now.tx {
            return Ok(());
        }
        let session = self.0.attached(rtnl)?;
        let buffers = session.link().buffers().ok_or(EIO)?;
        let config = Config {
            rx_sections: rx,
            rx_section_size: buffers.receive_sections.size(),
            tx_sections: tx,
            tx_section_size: buffers.send_sections.size(),
            ..self.0.config()
        };
        drop(session);
        self.0.reconfigure(rtnl, config)
    }

    fn stat_count(&self, rtnl: &Rtnl) -> usize {
        let queues = QUEUE.len().saturating_mul(self.queues(rtnl).into());
        let cpus = CPU.len().saturating_mul(self.0.cpus.len());
        (Events::NAMES.len() + VF.len())
            .saturating_add(queues)
            .saturating_add(cpus)
    }

    fn stat_names(&self, rtnl: &Rtnl, names: &mut Strings<'_>) {
        for name in Iterator::chain(Events::NAMES.iter(), &VF) {
            names.push(fmt!("{}", name));
        }
        for index in 0..self.queues(rtnl) {
            for (direction, name) in QUEUE {
                names.push(fmt!("{}_queue_{}_{}", direction, index, name));
            }
        }
        for cpu in &self.0.cpus {
            for name in CPU {
                names.push(fmt!("cpu{}_{}", cpu, name));
            }
        }
    }

    fn stat_values(&self, rtnl: &Rtnl, values: &mut [u64]) {
        let stats = &self.0.stats;
        let queues = (0..self.queues(rtnl))
            .filter_map(|index| stats.queue(index))
            .flat_map(queue_values);
        let cpus = self.0.cpus.iter();
        let cpus = cpus.flat_map(|&cpu| self.cpu_values(rtnl, cpu));
        let adapter = Iterator::chain(stats.events.values(), [0; VF.len()]);
        let all = Iterator::chain(adapter, Iterator::chain(queues, cpus));
        for (to, from) in values.iter_mut().zip(all) {
            *to = from;
        }
    }

    fn link_settings(&self) -> LinkSettings {
        self.0.link_settings()
    }

    fn set_link_settings(&self, settings: LinkSettings) {
        self.0.set_link_settings(settings);
    }

    fn table_size(&self, rtnl: &Rtnl) -> u32 {
        // CAST: at most 256.
        self.0
            .attached(rtnl)
            .map_or(0, |_| self.0.rss.lock().size as u32)
    }

    fn rx_hash(&self, _rtnl: &Rtnl, hash: RxHash<'_>) -> Result {
        let rss = self.0.rss.lock();
        if let Some(table) = hash.table {
            for (to, &from) in table.iter_mut().zip(rss.table()) {
                *to = from.into();
            }
        }
        if let Some(key) = hash.key {
            for (to, from) in key.iter_mut().zip(rss.key) {
                *to = from;
            }
        }
        Ok(())
    }

    fn set_rx_hash(&self, rtnl: &Rtnl, hash: RxHash<'_>) -> Result {
        let session = self.0.attached(rtnl)?;
        let mut rss = self.0.rss.lock();
        if rss.size == 0 {
            return Err(EOPNOTSUPP);
        }
        let mut table = rss.table;
        let mut key = rss.key;
        if let Some(wanted) = &hash.table {
            if wanted
                .iter()
                .any(|&channel| channel >= session.count().into())
            {
                return Err(EINVAL);
            }
            for (to, &from) in table.iter_mut().zip(wanted.iter()) {
                // CAST: less than the number of channels.
                *to = from as u16;
            }
        }
        if let Some(wanted) = &hash.key {
            for (to, &from) in key.iter_mut().zip(wanted.iter()) {
                *to = from;
            }
        }
        let used = table.get(..rss.size).ok_or(EINVAL)?;
        // With one channel, there is nothing to be told; the table is used when there are more.
        if session.count() > 1 {
            session.set_rss(used, &key)?;
        }
        rss.table = table;
        rss.key = key;
        Ok(())
    }

    fn hashes_ports(&self, flow: FlowType) -> bool {
        self.0.steering.hashes_ports(flow)
    }

    fn set_hashes_ports(&self, flow: FlowType, on: bool) {
        self.0.steering.set_hashes_ports(flow, on);
    }
}
