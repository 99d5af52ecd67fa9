// SPDX-License-Identifier: MIT OR Apache-2.0

//! The API over its socket, without KVM: the bus, the storage and the socket are real, the machine
//! is not.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use hv_proto::version::Version;
use serde_json::{Value, json};

use super::calls::CALLS;
use super::server::{MAX_CLIENTS, REQUEST_TIMEOUT};
use super::{ApiServer, Client, ClientError};
use crate::control::Control;
use crate::events::Event;
use crate::hypervisor::{FixedClock, ReferenceClock};
use crate::net::link_pair;
use crate::vm::{Order, VmControl};
use crate::vmbus::test_guest::FakeGuest;
use crate::vsp::netvsp::{Network, NicParams};
use crate::vsp::services::{ServiceKind, Services};
use crate::vsp::storvsp::{Storage, StorageConfig};

/// A host without a machine.
struct Setup {
    folder: tempfile::TempDir,
    orders: Receiver<Order>,
    guest: FakeGuest,
    control: Arc<Control>,
    server: ApiServer,
    client: Client,
}

impl Setup {
    fn new() -> Self {
        Self::with_bus(true)
    }

    fn with_bus(bus: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (vm, orders) = VmControl::detached();
        let guest = FakeGuest::new(Version::V5_3);
        let storage = Storage::new(StorageConfig::default()).unwrap();
        storage.connect(&guest.server).unwrap();
        let clock: Arc<dyn ReferenceClock> = Arc::new(FixedClock);
        let services = Services::new(&ServiceKind::all(), &guest.events, &clock);
        services.connect(&guest.server).unwrap();
        let network = Network::new(1, None).unwrap();
        network.connect(&guest.server).unwrap();
        let control = Arc::new(Control {
            vm,
            server: bus.then(|| guest.server.clone()),
            storage,
            network,
            services,
            events: guest.events.clone(),
        });
        let path = folder.path().join("api");
        let server = ApiServer::start(&path, control.clone()).unwrap();
        let client = Client::new(&path);
        Self {
            folder,
            orders,
            guest,
            control,
            server,
            client,
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("api")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    /// Sends bytes as they are and gives the whole reply.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // The server may close before it has read all.
        let _ = stream.write_all(bytes);
        let mut reply = String::new();
        let _ = stream.read_to_string(&mut reply);
        reply
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        path
    }

    /// Everything that a bad request must not change.
    fn state(&self) -> Value {
        let mut status = self.client.get("/v1/status").unwrap();
        status["vm"]["uptime_ms"] = 0.into();
        status
    }

    fn refused(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, String) {
        match self.client.call(method, path, body) {
            Err(ClientError::Refused { status, message }) => (status, message),
            other => panic!("{method} {path}: {other:?}"),
        }
    }
}

#[test]
fn the_root_lists_all_calls() {
    let setup = Setup::new();
    let root = setup.client.get("/").unwrap();
    assert_eq!(root["api"], 1);
    assert_eq!(root["calls"].as_array().unwrap().len(), CALLS.len());
}

#[test]
fn the_reference_has_all_calls() {
    let reference = include_str!("../../API.md");
    for call in CALLS {
        let name = format!("`{} {}`", call.method, call.path);
        assert!(reference.contains(&name), "{name}");
    }
}

#[test]
fn status_and_stats_show_the_bus() {
    let mut setup = Setup::new();
    assert!(setup.guest.connect(Version::V5_3));
    let status = setup.client.get("/v1/status").unwrap();
    assert_eq!(status["vm"]["state"], "running");
    assert_eq!(status["vm"]["vcpus"].as_array().unwrap().len(), 2);
    assert_eq!(status["vmbus"]["version"], "5.3");
    let device = &status["vmbus"]["devices"][0];
    assert_eq!(device["name"], "scsi0");
    assert_eq!(device["class"], hv_proto::guid::SCSI.to_string());
    assert_eq!(device["channels"][0]["index"], 0);
    assert_eq!(device["storage"]["version"], Value::Null);
    let stats = setup.client.get("/v1/stats").unwrap();
    assert_eq!(stats["channels"][0]["device"], "scsi0");
    assert_eq!(stats["channels"][0]["ring_full"], 0);
    assert_eq!(stats["vm"]["exits"]["post_message"], 0);
}

#[test]
fn disks_come_grow_and_go() {
    let setup = Setup::new();
    let image = setup.image("a.raw");
    let options = json!({"options": format!("path={},id=data,lun=3", image.display())});
    let added = setup.client.post("/v1/disk/add", &options).unwrap();
    assert_eq!(added, json!({"disk": "data"}));
    let (status, message) = setup.refused("POST", "/v1/disk/add", Some(&options));
    assert_eq!(status, 409, "{message}");
    setup
        .client
        .post("/v1/disk/resize", &json!({"disk": "data", "size": 2 << 20}))
        .unwrap();
    assert_eq!(setup.state()["disks"][0]["size"], 2 << 20);
    assert_eq!(setup.state()["disks"][0]["address"], json!([0, 0, 3]));
    let name = json!({"disk": "data"});
    setup.client.post("/v1/disk/remove", &name).unwrap();
    assert_eq!(setup.state()["disks"], json!([]));
    assert_eq!(setup.refused("POST", "/v1/disk/remove", Some(&name)).0, 404);
}

#[test]
fn nics_come_change_and_go() {
    let setup = Setup::new();
    let nic = |setup: &Setup| {
        let state = setup.state();
        let devices = state["vmbus"]["devices"].as_array().unwrap().clone();
        devices.into_iter().find(|device| device["name"] == "lan")
    };
    // A network in memory: what `options` can open needs rights that a test may not have.
    let (network, _other_end) = link_pair("lan", 1).unwrap();
    let mut params = NicParams::new(Arc::new(network));
    params.id = Some("lan".into());
    setup.control.network.add_nic(params).unwrap();
    assert_eq!(nic(&setup).unwrap()["network"]["link"], true);
    for up in [false, true] {
        let link = json!({"nic": "lan", "up": up});
        setup.client.post("/v1/nic/link", &link).unwrap();
        assert_eq!(nic(&setup).unwrap()["network"]["link"], up);
    }
    // The name is taken; no network is opened for that.
    let options = json!({"options": "passt=/nowhere/passt,id=lan"});
    let (status, message) = setup.refused("POST", "/v1/nic/add", Some(&options));
    assert_eq!(status, 409, "{message}");
    assert!(message.contains("'lan'"), "{message}");
    let name = json!({"nic": "lan"});
    setup.client.post("/v1/nic/remove", &name).unwrap();
    assert_eq!(nic(&setup), None);
    assert_eq!(setup.refused("POST", "/v1/nic/remove", Some(&name)).0, 404);
}

#[test]
fn without_a_bus_nothing_is_added() {
    let setup = Setup::with_bus(false);
    let options = format!("path={}", setup.image("a.raw").display());
    for (path, options) in [
        ("/v1/disk/add", options.as_str()),
        ("/v1/nic/add", "passt=/nowhere/passt"),
    ] {
        let body = json!({ "options": options });
        let (status, message) = setup.refused("POST", path, Some(&body));
        assert_eq!(status, 409);
        assert!(message.contains("no VMBus"), "{message}");
    }
    assert_eq!(setup.state()["disks"], json!([]));
}

#[test]
fn a_rescinded_device_is_gone() {
    let setup = Setup::new();
    let events = setup.control.events.subscribe();
    let device = json!({"device": "scsi0"});
    setup.client.post("/v1/rescind", &device).unwrap();
    let removed = |event: &Event| matches!(event, Event::DeviceRemoved { .. });
    assert!(events.find(Duration::from_secs(5), removed).is_some());
    let there = |name: &str| {
        let status = setup.state();
        let devices = status["vmbus"]["devices"].as_array().unwrap();
        devices.iter().any(|device| device["name"] == name)
    };
    assert!(!there("scsi0"));
    assert_eq!(setup.refused("POST", "/v1/rescind", Some(&device)).0, 404);
    // Integration components can come back.
    let device = json!({"device": "heartbeat"});
    assert_eq!(setup.refused("POST", "/v1/offer", Some(&device)).0, 409);
    setup.client.post("/v1/rescind", &device).unwrap();
    assert!(!there("heartbeat"));
    setup.client.post("/v1/offer", &device).unwrap();
    assert!(there("heartbeat"));
}

#[test]
fn power_off_ends_the_machine() {
    let setup = Setup::new();
    setup.client.post("/v1/power-off", &json!({})).unwrap();
    assert!(matches!(setup.orders.try_recv(), Ok(Order::Stop)));
}

#[test]
fn bad_requests_get_an_error_and_change_nothing() {
    let setup = Setup::new();
    let before = setup.state();
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(20_000));
    for (bytes, status) in [
        (&b"\x00\x01\x02\r\n\r\n"[..], "400"),
        (b"{\"execute\":\"quit\"}\n\n", "400"),
        (
            b"POST /v1/power-off HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            "400",
        ),
        (
            b"POST /v1/power-off HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
            "413",
        ),
        (
            b"POST /v1/power-off HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "501",
        ),
        (long.as_bytes(), "431"),
    ] {
        let reply = setup.raw(bytes);
        assert!(
            reply.starts_with(&format!("HTTP/1.1 {status} ")),
            "{bytes:?}: {reply}"
        );
        assert!(reply.contains("{\"error\":\""), "{reply}");
    }
    for (method, path, body, want) in [
        ("GET", "/v2/status", json!({}), 404),
        ("GET", "/v1/status/", json!({}), 404),
        ("GET", "/v1/power-off", json!({}), 405),
        ("PUT", "/v1/power-off", json!({}), 405),
        ("POST", "/v1/power-off", json!({"force": true}), 400),
        ("POST", "/v1/power-off", json!([]), 400),
        ("POST", "/v1/rescind", json!({}), 400),
        ("POST", "/v1/rescind", json!({"device": 1}), 400),
        (
            "POST",
            "/v1/rescind",
            json!({"device": "scsi0", "x": 1}),
            400,
        ),
        ("POST", "/v1/rescind", json!({"device": "scsi9"}), 404),
        // No driver of the guest is there.
        ("POST", "/v1/shutdown", json!({}), 409),
        (
            "POST",
            "/v1/reboot",
            json!({"force": true, "message": "x"}),
            409,
        ),
        ("POST", "/v1/hibernate", json!({"device": "heartbeat"}), 404),
        ("POST", "/v1/time", json!({"kind": "sync"}), 409),
        ("POST", "/v1/time", json!({"kind": "now"}), 400),
        ("POST", "/v1/type", json!({"text": "a"}), 409),
        ("POST", "/v1/key", json!({"keys": "nokey"}), 400),
        (
            "POST",
            "/v1/key",
            json!({"keys": "a", "action": "hold"}),
            400,
        ),
        ("POST", "/v1/mouse", json!({"x": 1}), 409),
        ("POST", "/v1/mouse", json!({"x": 32768}), 400),
        ("POST", "/v1/mouse", json!({"buttons": ["left", "up"]}), 400),
        (
            "POST",
            "/v1/disk/add",
            json!({"options": "path=/nowhere/x.raw"}),
            409,
        ),
        (
            "POST",
            "/v1/disk/add",
            json!({"options": "lun=300,path=x"}),
            400,
        ),
        (
            "POST",
            "/v1/disk/resize",
            json!({"disk": "x", "size": -1}),
            400,
        ),
        ("POST", "/v1/nic/add", json!({"options": "mtu=1500"}), 400),
        (
            "POST",
            "/v1/nic/add",
            json!({"options": "passt=/nowhere/passt"}),
            409,
        ),
        ("POST", "/v1/nic/add", json!({"nic": "lan"}), 400),
        ("POST", "/v1/nic/remove", json!({"nic": "lan"}), 404),
        ("POST", "/v1/nic/link", json!({"nic": "lan", "up": 1}), 400),
        (
            "POST",
            "/v1/nic/link",
            json!({"nic": "lan", "up": true}),
            404,
        ),
    ] {
        let (status, message) = setup.refused(method, path, Some(&body));
        assert_eq!(status, want, "{method} {path} {body}: {message}");
        assert!(!message.is_empty());
    }
    assert_eq!(setup.state(), before);
    assert!(setup.orders.try_recv().is_err());
}

#[test]
fn events_are_followed_to_the_end() {
    let setup = Setup::new();
    let mut events = setup.client.events().unwrap();
    setup.control.events.publish(Event::Reset);
    let first = events.next().unwrap().unwrap();
    assert_eq!(first["event"], "reset");
    assert!(first["sequence"].is_u64() && first["time_ms"].is_u64());
    setup.control.events.publish(Event::Paused);
    // The end of the host loses nothing.
    drop(setup.server);
    assert_eq!(events.next().unwrap().unwrap()["event"], "paused");
    assert!(events.next().is_none());
}

#[test]
fn a_reader_of_events_that_stalls_loses_only_whole_ones() {
    let setup = Setup::new();
    let mut events = setup.client.events().unwrap();
    // More than the socket and the queue take.
    let reason = "x".repeat(10_000);
    for _ in 0..1100 {
        let reason = reason.clone();
        setup.control.events.publish(Event::Ended { reason });
    }
    std::thread::sleep(REQUEST_TIMEOUT + Duration::from_secs(1));
    setup.control.events.publish(Event::Paused);
    let mut lost = false;
    loop {
        let event = events.next().unwrap().unwrap();
        lost |= event["event"] == "lost";
        if event["event"] == "paused" {
            break;
        }
    }
    assert!(lost);
    // The end does not wait for one that stalls for ever.
    for _ in 0..1100 {
        let reason = reason.clone();
        setup.control.events.publish(Event::Ended { reason });
    }
    let started = Instant::now();
    drop(setup.server);
    assert!(started.elapsed() < 2 * REQUEST_TIMEOUT);
}

#[test]
fn clients_that_hang_harm_nobody() {
    let setup = Setup::new();
    let mut hanging: Vec<_> = (1..MAX_CLIENTS).map(|_| setup.connect()).collect();
    hanging[0].write_all(b"GET /v1/st").unwrap();
    // To the end of the connection, when its place is free.
    let reply = setup.raw(b"GET /v1/status HTTP/1.1\r\n\r\n");
    assert!(reply.contains("running"), "{reply}");
    hanging.push(setup.connect());
    // Too many: told, and not served.
    let mut reply = String::new();
    setup.connect().read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 503 "), "{reply}");
    match setup.client.events().map(drop) {
        Err(ClientError::Refused {
            status: 503,
            message,
        }) => {
            assert!(message.contains("connected already"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    // Their time ends, and there is room again.
    reply.clear();
    hanging[0].read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 408 "), "{reply}");
    let deadline = Instant::now() + Duration::from_secs(20);
    while setup.client.get("/").is_err() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn clients_that_go_away_leave_their_places() {
    let setup = Setup::new();
    for _ in 0..MAX_CLIENTS {
        let mut stream = setup.connect();
        let request = b"GET /v1/events HTTP/1.1\r\n\r\n";
        stream.write_all(request).unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while setup.client.get("/").is_err() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_end_does_not_wait_for_clients_that_hang() {
    let setup = Setup::new();
    let _hanging = setup.connect();
    let started = Instant::now();
    drop(setup.server);
    assert!(started.elapsed() < REQUEST_TIMEOUT);
    assert!(!setup.folder.path().join("api").exists());
}

#[test]
fn the_socket_is_its_owners_and_nobody_elses() {
    let setup = Setup::new();
    let mode = std::fs::metadata(setup.path()).unwrap().permissions();
    assert_eq!(mode.mode() & 0o7777, 0o600);
}

#[test]
fn a_stale_socket_is_replaced_but_nothing_else() {
    let setup = Setup::new();
    let start = |name: &str| {
        let path = setup.folder.path().join(name);
        ApiServer::start(&path, setup.control.clone()).map(drop)
    };
    assert!(start("api").is_err(), "somebody listens there");
    assert!(setup.client.get("/").is_ok());
    setup.image("file");
    assert!(start("file").is_err());
    assert!(setup.folder.path().join("file").exists());
    drop(UnixListener::bind(setup.folder.path().join("stale")).unwrap());
    assert!(start("stale").is_ok());
}
