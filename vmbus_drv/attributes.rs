// SPDX-License-Identifier: GPL-2.0

//! What the files in sysfs say. Names and contents are an interface of the kernel that programs
//! (`lsvmbus`) rely on: `Documentation/ABI/stable/sysfs-bus-vmbus`.

use crate::{
    channel::Channel,
    cpu,
    sysfs::{
        ChannelFile,
        ChannelFileList,
        ChannelFiles,
        ChannelOps,
        ChannelType,
        Contents,
        DeviceFile,
        DeviceFileList,
        DeviceFiles,
        Group,
        GroupList, //
    }, //
};
use core::fmt::Write;
use hv_proto::{
    guid,
    guid::Guid,
    monitor::MonitorId, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc, //
    }, //
};

/// PCI vendor id of Microsoft, which the ABI gives to all devices.
const VENDOR: u32 = 0x1414;

/// The number of a device class in the file `device`; classes without one have the last number.
fn class_number(class: &Guid) -> usize {
    const CLASSES: [Guid; 16] = [
        guid::IDE,
        guid::SCSI,
        guid::FIBRE_CHANNEL,
        guid::NETWORK,
        guid::NETWORK_DIRECT,
        guid::PCI,
        guid::VIDEO,
        guid::KEYBOARD,
        guid::MOUSE,
        guid::KVP,
        guid::TIME_SYNC,
        guid::HEARTBEAT,
        guid::SHUTDOWN,
        guid::FILE_COPY,
        guid::VSS,
        guid::DYNAMIC_MEMORY,
    ];
    CLASSES
        .iter()
        .position(|known| known == class)
        .unwrap_or(CLASSES.len())
}

/// A GUID without dashes, as module aliases have it.
struct Hex<'a>(&'a Guid);

impl core::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for byte in self.0.as_bytes() {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Writes the module alias of a device class.
pub(crate) fn write_alias(class: &Guid, out: &mut dyn Write) -> core::fmt::Result {
    write!(out, "vmbus:{}", Hex(class))
}

/// Files of a device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OfDevice {
    Id,
    State,
    MonitorId,
    ClassId,
    DeviceId,
    Modalias,
    NumaNode,
    ServerMonitorPending,
    ClientMonitorPending,
    ServerMonitorLatency,
    ClientMonitorLatency,
    ServerMonitorConnId,
    ClientMonitorConnId,
    OutIntrMask,
    OutReadIndex,
    OutWriteIndex,
    OutReadBytesAvail,
    OutWriteBytesAvail,
    InIntrMask,
    InReadIndex,
    InWriteIndex,
    InReadBytesAvail,
    InWriteBytesAvail,
    ChannelVpMapping,
    Vendor,
    Device,
}

impl DeviceFiles for OfDevice {
    fn is_visible(self, channel: &Channel) -> bool {
        channel.offer().monitor().is_some()
            || !matches!(
                self,
                Self::MonitorId
                    | Self::ServerMonitorPending
                    | Self::ClientMonitorPending
                    | Self::ServerMonitorLatency
                    | Self::ClientMonitorLatency
                    | Self::ServerMonitorConnId
                    | Self::ClientMonitorConnId
            )
    }

    fn show(self, channel: &Arc<Channel>, out: &mut Contents<'_>) -> Result {
        let offer = channel.offer();
        match self {
            Self::Id => writeln!(out, "{}", channel.id().get())?,
            Self::State => writeln!(out, "{}", channel.state())?,
            Self::MonitorId => writeln!(out, "{}", offer.monitor_id)?,
            Self::ClassId => writeln!(out, "{{{}}}", offer.interface_id)?,
            Self::DeviceId => writeln!(out, "{{{}}}", offer.instance_id)?,
            Self::Modalias => {
                write_alias(&offer.interface_id, out)?;
                writeln!(out)?;
            }
            Self::NumaNode => writeln!(out, "{}", cpu::node(channel.target_cpu()))?,
            Self::ServerMonitorPending => writeln!(out, "{}", monitor_pending(channel, 0)?)?,
            Self::ClientMonitorPending => writeln!(out, "{}", monitor_pending(channel, 1)?)?,
            Self::ServerMonitorLatency => writeln!(out, "{}", monitor_latency(channel, 0)?)?,
            Self::ClientMonitorLatency => writeln!(out, "{}", monitor_latency(channel, 1)?)?,
            Self::ServerMonitorConnId => writeln!(out, "{}", monitor_connection(channel, 0)?)?,
            Self::ClientMonitorConnId => writeln!(out, "{}", monitor_connection(channel, 1)?)?,
            Self::OutIntrMask => ring(channel, true, out, |ring| Some(ring.interrupt_mask))?,
            Self::OutReadIndex => ring(channel, true, out, |ring| Some(ring.read_index))?,
            Self::OutWriteIndex => ring(channel, true, out, |ring| Some(ring.write_index))?,
            Self::OutReadBytesAvail => ring(channel, true, out, |ring| ring.readable)?,
            Self::OutWriteBytesAvail => ring(channel, true, out, |ring| ring.writable)?,
            Self::InIntrMask => ring(channel, false, out, |ring| Some(ring.interrupt_mask))?,
            Self::InReadIndex => ring(channel, false, out, |ring| Some(ring.read_index))?,
            Self::InWriteIndex => ring(channel, false, out, |ring| Some(ring.write_index))?,
            Self::InReadBytesAvail => ring(channel, false, out, |ring| ring.readable)?,
            Self::InWriteBytesAvail => ring(channel, false, out, |ring| ring.writable)?,
            Self::ChannelVpMapping => {
                writeln!(out, "{}:{}", channel.id().get(), channel.target_cpu())?;
                channel.for_each_subchannel(|sub| {
                    writeln!(out, "{}:{}", sub.id().get(), sub.target_cpu())?;
                    Ok(())
                })?;
            }
            Self::Vendor => writeln!(out, "{VENDOR:#x}")?,
            Self::Device => writeln!(out, "{:#x}", class_number(&offer.interface_id))?,
        }
        Ok(())
    }
}

/// Writes a number of a ring. `EINVAL` if the channel is closed or the ring is damaged.
fn ring(
    channel: &Channel,
    outgoing: bool,
    out: &mut Contents<'_>,
    what: impl FnOnce(&hv_proto::ring::Snapshot) -> Option<u32>,
) -> Result {
    let snapshot = channel.ring(outgoing).ok_or(EINVAL)?;
    writeln!(out, "{}", what(&snapshot).ok_or(EINVAL)?)?;
    Ok(())
}

/// A 32-bit word of a monitor page.
fn monitor_word(channel: &Channel, page: usize, offset: usize) -> Result<u32> {
    let page = channel.connection().monitor_page(page).ok_or(EINVAL)?;
    Ok(page.word::<u32>(offset).ok_or(EINVAL)?.load(Relaxed))
}

fn monitor_id(channel: &Channel) -> Result<MonitorId> {
    channel.offer().monitor().ok_or(EINVAL)
}

fn monitor_pending(channel: &Channel, page: usize) -> Result<u32> {
    monitor_word(channel, page, monitor_id(channel)?.pending_offset())
}

/// The latency has 16 bits: one half of a word.
fn monitor_latency(channel: &Channel, page: usize) -> Result<u32> {
    let offset = monitor_id(channel)?.latency_offset();
    let word = monitor_word(channel, page, offset & !3)?;
    Ok(if offset & 2 == 0 {
        word & 0xffff
    } else {
        word >> 16
    })
}

fn monitor_connection(channel: &Channel, page: usize) -> Result<u32> {
    let word = monitor_word(channel, page, monitor_id(channel)?.parameter_offset())?;
    Ok(word & hv_proto::ids::ConnectionId::MASK)
}

static DEVICE_FILES: [DeviceFile<OfDevice>; 26] = [
    DeviceFile::new(c"id", OfDevice::Id),
    DeviceFile::new(c"state", OfDevice::State),
    DeviceFile::new(c"monitor_id", OfDevice::MonitorId),
    DeviceFile::new(c"class_id", OfDevice::ClassId),
    DeviceFile::new(c"device_id", OfDevice::DeviceId),
    DeviceFile::new(c"modalias", OfDevice::Modalias),
    DeviceFile::new(c"numa_node", OfDevice::NumaNode),
    DeviceFile::new(c"server_monitor_pending", OfDevice::ServerMonitorPending),
    DeviceFile::new(c"client_monitor_pending", OfDevice::ClientMonitorPending),
    DeviceFile::new(c"server_monitor_latency", OfDevice::ServerMonitorLatency),
    DeviceFile::new(c"client_monitor_latency", OfDevice::ClientMonitorLatency),
    DeviceFile::new(c"server_monitor_conn_id", OfDevice::ServerMonitorConnId),
    DeviceFile::new(c"client_monitor_conn_id", OfDevice::ClientMonitorConnId),
    DeviceFile::new(c"out_intr_mask", OfDevice::OutIntrMask),
    DeviceFile::new(c"out_read_index", OfDevice::OutReadIndex),
    DeviceFile::new(c"out_write_index", OfDevice::OutWriteIndex),
    DeviceFile::new(c"out_read_bytes_avail", OfDevice::OutReadBytesAvail),
    DeviceFile::new(c"out_write_bytes_avail", OfDevice::OutWriteBytesAvail),
    DeviceFile::new(c"in_intr_mask", OfDevice::InIntrMask),
    DeviceFile::new(c"in_read_index", OfDevice::InReadIndex),
    DeviceFile::new(c"in_write_index", OfDevice::InWriteIndex),
    DeviceFile::new(c"in_read_bytes_avail", OfDevice::InReadBytesAvail),
    DeviceFile::new(c"in_write_bytes_avail", OfDevice::InWriteBytesAvail),
    DeviceFile::new(c"channel_vp_mapping", OfDevice::ChannelVpMapping),
    DeviceFile::new(c"vendor", OfDevice::Vendor),
    DeviceFile::new(c"device", OfDevice::Device),
];
static DEVICE_FILE_LIST: DeviceFileList<OfDevice, 27> = DeviceFileList::new(&DEVICE_FILES);
static DEVICE_GROUP: Group = DEVICE_FILE_LIST.group();

/// The files of every device of the bus.
pub(crate) static DEVICE_GROUPS: GroupList = GroupList::new(&DEVICE_GROUP);

/// Files of a channel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OfChannel {
    OutMask,
    InMask,
    ReadAvail,
    WriteAvail,
    Cpu,
    Pending,
    Latency,
    Interrupts,
    Events,
    IntrInFull,
    IntrOutEmpty,
    OutFullFirst,
    OutFullTotal,
    MonitorId,
    SubchannelId,
}

impl ChannelFiles for OfChannel {
    fn is_visible(self, channel: &Channel) -> bool {
        channel.offer().monitor().is_some()
            || !matches!(self, Self::Pending | Self::Latency | Self::MonitorId)
    }

    fn show(self, channel: &Arc<Channel>, out: &mut Contents<'_>) -> Result {
        let stats = channel.stats();
        match self {
            Self::OutMask => ring(channel, true, out, |ring| Some(ring.interrupt_mask))?,
            Self::InMask => ring(channel, false, out, |ring| Some(ring.interrupt_mask))?,
            Self::ReadAvail => ring(channel, false, out, |ring| ring.readable)?,
            Self::WriteAvail => ring(channel, true, out, |ring| ring.writable)?,
            Self::Cpu => writeln!(out, "{}", channel.target_cpu())?,
            Self::Pending => writeln!(out, "{}", monitor_pending(channel, 1)?)?,
            Self::Latency => writeln!(out, "{}", monitor_latency(channel, 1)?)?,
            Self::Interrupts => writeln!(out, "{}", stats.interrupts.get())?,
            Self::Events => writeln!(out, "{}", stats.events.get())?,
            Self::IntrInFull => writeln!(out, "{}", stats.in_full.get())?,
            Self::IntrOutEmpty => writeln!(out, "{}", stats.out_empty.get())?,
            Self::OutFullFirst => writeln!(out, "{}", stats.out_full_first.get())?,
            Self::OutFullTotal => writeln!(out, "{}", stats.out_full_total.get())?,
            Self::MonitorId => writeln!(out, "{}", channel.offer().monitor_id)?,
            Self::SubchannelId => writeln!(out, "{}", channel.subchannel_index())?,
        }
        Ok(())
    }

    fn store(self, channel: &Arc<Channel>, text: &[u8]) -> Result {
        if self != Self::Cpu {
            return Err(EIO);
        }
        let text = core::str::from_utf8(text).map_err(|_| EINVAL)?;
        let cpu = text.trim().parse::<u32>().map_err(|_| EINVAL)?;
        let _lock = cpu::HotplugLock::read();
        channel.set_target_cpu(cpu)
    }
}

static CHANNEL_FILES: [ChannelFile<OfChannel>; 15] = [
    ChannelFile::new(c"out_mask", 0o444, OfChannel::OutMask),
    ChannelFile::new(c"in_mask", 0o444, OfChannel::InMask),
    ChannelFile::new(c"read_avail", 0o444, OfChannel::ReadAvail),
    ChannelFile::new(c"write_avail", 0o444, OfChannel::WriteAvail),
    ChannelFile::new(c"cpu", 0o644, OfChannel::Cpu),
    ChannelFile::new(c"pending", 0o444, OfChannel::Pending),
    ChannelFile::new(c"latency", 0o444, OfChannel::Latency),
    ChannelFile::new(c"interrupts", 0o444, OfChannel::Interrupts),
    ChannelFile::new(c"events", 0o444, OfChannel::Events),
    ChannelFile::new(c"intr_in_full", 0o444, OfChannel::IntrInFull),
    ChannelFile::new(c"intr_out_empty", 0o444, OfChannel::IntrOutEmpty),
    ChannelFile::new(c"out_full_first", 0o444, OfChannel::OutFullFirst),
    ChannelFile::new(c"out_full_total", 0o444, OfChannel::OutFullTotal),
    ChannelFile::new(c"monitor_id", 0o444, OfChannel::MonitorId),
    ChannelFile::new(c"subchannel_id", 0o444, OfChannel::SubchannelId),
];
static CHANNEL_FILE_LIST: ChannelFileList<OfChannel, 16> = ChannelFileList::new(&CHANNEL_FILES);
static CHANNEL_GROUP: Group = CHANNEL_FILE_LIST.group();
static CHANNEL_GROUPS: GroupList = GroupList::new(&CHANNEL_GROUP);
static CHANNEL_OPS: ChannelOps = ChannelOps::new::<OfChannel>();
/// The type of the kobjects of channels.
pub(crate) static CHANNEL_TYPE: ChannelType = ChannelType::new(&CHANNEL_OPS, &CHANNEL_GROUPS);
