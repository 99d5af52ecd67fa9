// SPDX-License-Identifier: MIT OR Apache-2.0

//! The value of `--net`: `tap=tap0,mac=52:54:00:12:34:56,...` or `passt,...`.

use std::path::PathBuf;
use std::str::FromStr;

use super::passt::PasstOptions;
use crate::key_values;

/// Most queues of a NIC: as many channels as guests use.
pub const MAX_QUEUES: u16 = 64;

/// A bad `--net` value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OptionError(String);

/// What a NIC is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendOption {
    /// A TAP of the host, by its name.
    Tap(String),
    /// User-mode networking.
    Passt(PasstOptions),
}

/// A NIC as its user describes it.
///
/// Written as items with commas between; a comma inside a value is written twice. One of `tap` and
/// `passt` must be there.
///
/// | key | value | default |
/// |---|---|---|
/// | `tap` | name of a TAP of the host; it is made if there is none and the user may | |
/// | `passt` | nothing, or the program: user-mode networking | `passt` in the path |
/// | `tcp_ports`, `udp_ports` | with `passt`: ports to forward to the guest, as passt(1) has them | none |
/// | `mac` | the address of the guest | made from the NIC's number |
/// | `mtu` | the largest MTU of the guest, which begins with 1500 or this if it is less, 576 to 65521 | 1500 |
/// | `queues` | most channels, 1 to 64; queues of a TAP | one for each processor, 8 at most |
/// | `link` | `on`, `off`: whether the cable is in | `on` |
/// | `pcap` | a file for what crosses this NIC | none |
/// | `id` | a name to refer to the NIC by | `net0`, ... |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetOptions {
    /// The network.
    pub backend: BackendOption,
    /// Address of the guest.
    pub mac: Option<[u8; 6]>,
    /// The largest MTU of the guest.
    pub mtu: u16,
    /// Most channels.
    pub queues: Option<u16>,
    /// Whether the cable is in.
    pub link: bool,
    /// A capture of its own.
    pub pcap: Option<PathBuf>,
    /// Name.
    pub id: Option<String>,
}

/// The MTU of a NIC without `mtu`.
const DEFAULT_MTU: u16 = 1500;

impl NetOptions {
    /// The defaults for this network.
    pub fn new(backend: BackendOption) -> Self {
        Self {
            backend,
            mac: None,
            mtu: DEFAULT_MTU,
            queues: None,
            link: true,
            pcap: None,
            id: None,
        }
    }
}

fn error<T>(text: String) -> Result<T, OptionError> {
    Err(OptionError(text))
}

fn mac(value: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = value.split([':', '-']);
    for byte in &mut bytes {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    // The lowest bit of the first byte marks groups.
    (parts.next().is_none() && bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(bytes)
}

/// Whether devices that are not NICs have such a name. Devices are told apart by their names.
fn is_other_device(name: &str) -> bool {
    const KINDS: [&str; 7] = [
        "heartbeat",
        "timesync",
        "shutdown",
        "keyboard",
        "mouse",
        "scsi",
        "ide",
    ];
    KINDS.contains(&name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.'))
}

fn number(key: &str, value: &str, first: u16, last: u16) -> Result<u16, OptionError> {
    match value.parse() {
        Ok(number) if (first..=last).contains(&number) => Ok(number),
        _ => error(format!(
            "{key}={value}: a number from {first} to {last} expected"
        )),
    }
}

impl FromStr for NetOptions {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let mut tap = None;
        let mut passt = None;
        let mut ports: [Option<String>; 2] = [None, None];
        // The network comes last: it can be anywhere among the items.
        let mut options = Self::new(BackendOption::Tap(String::new()));
        let mut seen: Vec<String> = Vec::new();
        for item in key_values::split(text) {
            let (key, value) = match item.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (item.as_str(), None),
            };
            if seen.iter().any(|known| known == key) {
                return error(format!("{key} is given twice"));
            }
            seen.push(key.to_owned());
            let value = match (key, value) {
                ("passt", value) => {
                    passt = Some(value.filter(|value| !value.is_empty()).map(PathBuf::from));
                    continue;
                }
                (_, Some(value)) if !value.is_empty() => value,
                _ => {
                    return error(format!(
                        "'{item}': key=value expected, as in tap=tap0, or passt"
                    ));
                }
            };
            match key {
                "tap" => tap = Some(value.to_owned()),
                "tcp_ports" => ports[0] = Some(value.to_owned()),
                "udp_ports" => ports[1] = Some(value.to_owned()),
                "mac" => match mac(value) {
                    Some(mac) => options.mac = Some(mac),
                    None => {
                        return error(format!(
                            "mac={value}: an address of one station expected, as in \
                             52:54:00:12:34:56"
                        ));
                    }
                },
                "mtu" => options.mtu = number(key, value, 576, 65521)?,
                "queues" => options.queues = Some(number(key, value, 1, MAX_QUEUES)?),
                "link" => {
                    options.link = match value {
                        "on" => true,
                        "off" => false,
                        _ => return error(format!("link={value}: on or off expected")),
                    };
                }
                "pcap" => options.pcap = Some(value.into()),
                "id" if is_other_device(value) => {
                    return error(format!("id={value}: so are other devices called"));
                }
                "id" => options.id = Some(value.to_owned()),
                _ => {
                    return error(format!(
                        "unknown key '{key}': tap, passt, tcp_ports, udp_ports, mac, mtu, queues, \
                         link, pcap or id expected"
                    ));
                }
            }
        }
        let [tcp_ports, udp_ports] = ports;
        let forwards = tcp_ports.is_some() || udp_ports.is_some();
        options.backend = match (tap, passt) {
            (Some(_), None) if forwards => {
                return error("tcp_ports and udp_ports go with passt only".into());
            }
            (Some(name), None) => BackendOption::Tap(name),
            (None, Some(program)) => BackendOption::Passt(PasstOptions {
                program,
                tcp_ports,
                udp_ports,
            }),
            (Some(_), Some(_)) => return error("tap and passt exclude each other".into()),
            (None, None) => return error("tap=NAME or passt is missing".into()),
        };
        Ok(options)
    }
}
