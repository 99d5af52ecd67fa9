// SPDX-License-Identifier: MIT OR Apache-2.0

//! The control API with a real guest, by the tools that an operator has: `host-harness ctl` and curl.

use std::fs::Permissions;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use host_harness::api::ApiServer;
use host_harness::events::Event;
use host_harness::vm::ExitReason;
use host_harness::vsp::inputvsp::KeyAction;
use rustix::process::Uid;
use serde_json::{Value, json};
use viridian_tests::guest::COMMAND;
use viridian_tests::manifest::Manifest;
use viridian_tests::{Drivers, Guest, both_drivers};

use crate::images::MIB;
use crate::input::{
    self, ABS_X, ABS_Y, BTN_LEFT, EV_ABS, EV_KEY, KEYBOARD, Lines, MOUSE, Recorder, keys, strokes,
};
use crate::services::{DAY, until_ahead};

both_drivers!(shows_and_drives_a_guest);

/// A user who does not run the host.
const NOBODY: u32 = 65534;

/// The tools of an operator, for one host.
pub struct Operator {
    harness: PathBuf,
    socket: PathBuf,
}

/// Lets the guest's host listen, in a folder of its own.
pub fn listen(guest: &mut Guest) -> Result<(tempfile::TempDir, Operator)> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("api");
    guest.host_mut().listen(&socket)?;
    let harness = Manifest::load()?.harness;
    Ok((folder, Operator { harness, socket }))
}

/// The JSON that a tool printed; null for nothing.
fn json_of(output: &[u8]) -> Result<Value> {
    match output {
        [] => Ok(Value::Null),
        text => serde_json::from_slice(text)
            .with_context(|| format!("not JSON: {}", String::from_utf8_lossy(text))),
    }
}

impl Operator {
    /// `host-harness ctl`, where relative paths begin in the socket's folder.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.harness);
        command.args(["ctl", "--api"]).arg(&self.socket).args(words);
        if let Some(folder) = self.socket.parent() {
            command.current_dir(folder);
        }
        command.stdin(Stdio::null());
        command
    }

    /// A verb of `ctl` that must succeed; what it prints.
    pub fn ctl(&self, words: &[&str]) -> Result<Value> {
        let output = self.command(words).output()?;
        ensure!(output.status.success(), "ctl {words:?}: {output:?}");
        json_of(&output.stdout)
    }

    /// A verb of `ctl` that the host must refuse; why it does.
    pub fn refused(&self, words: &[&str]) -> Result<String> {
        let output = self.command(words).output()?;
        ensure!(
            output.status.code() == Some(1) && output.stdout.is_empty(),
            "ctl {words:?}: {output:?}"
        );
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn curl_command(&self, words: &[&str], path: &str) -> Command {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--unix-socket"])
            .arg(&self.socket)
            .args(words)
            .arg(format!("http://localhost{path}"));
        command.stdin(Stdio::null());
        command
    }

    /// A call by curl: the HTTP status and the reply.
    fn curl(&self, words: &[&str], path: &str) -> Result<(String, Value)> {
        let mut command = self.curl_command(words, path);
        let output = command.args(["--write-out", "\n%{http_code}"]).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        match text.rsplit_once('\n') {
            Some((body, status)) if output.status.success() => {
                Ok((status.to_owned(), json_of(body.as_bytes())?))
            }
            _ => bail!("curl {words:?} {path}: {output:?}"),
        }
    }

    /// What `status` shows of a device.
    pub fn device(&self, name: &str) -> Result<Value> {
        let status = self.ctl(&["status"])?;
        let devices = status["vmbus"]["devices"].as_array();
        let found = devices
            .into_iter()
            .flatten()
            .find(|device| device["name"] == name);
        found
            .cloned()
            .with_context(|| format!("no {name} in {status:#}"))
    }
}

fn load_all(guest: &Guest) -> Result<()> {
    guest.load_services()?;
    input::load(guest)
}

fn shows_and_drives_a_guest(drivers: Drivers) -> Result<()> {
    let mut guest = Guest::with(drivers).cpus(2).reboot().boot()?;
    let (folder, operator) = listen(&mut guest)?;
    let mut followers = Vec::new();
    let curl = operator.curl_command(&["--no-buffer"], "/v1/events");
    for mut command in [operator.command(&["events"]), curl] {
        followers.push(command.stdout(Stdio::piped()).spawn()?);
    }
    // Nobody has to care for these.
    let _odd = odd_clients(&operator)?;
    let _other = only_the_owner_can_connect(&guest, &operator)?;
    status_shows_the_guest(&guest, &operator)?;
    bad_calls_change_nothing(&guest, &operator)?;
    input_is_sent(&guest, &operator)?;
    the_time_is_told(&guest, &operator)?;
    devices_come_and_go(&guest, &operator, folder.path())?;
    stats_show_what_happened(&operator)?;
    guest.check_log(&["apacity", "tag#", "[sd", "suppressed"])?;

    let events = guest.host().events().subscribe();
    operator.ctl(&["reboot", "--timeout", "5", "--message", "again"])?;
    let reset = |event: &Event| matches!(event, Event::Reset);
    ensure!(
        events.find(COMMAND, reset).is_some(),
        "no reset\n--- console\n{}",
        guest.console()
    );
    guest.wait_for_restart()?;
    load_all(&guest)?;
    let status = operator.ctl(&["status"])?;
    ensure!(status["vm"]["resets"] == 1, "{status:#}");
    // There is no program here that could be asked to switch off: the kernel does it.
    operator.ctl(&["shutdown", "--force"])?;
    guest.ends_with(ExitReason::PowerOff)?;
    for follower in followers {
        all_was_told(&follower.wait_with_output()?)?;
    }
    Ok(())
}

/// Clients that say nothing, half of it, or do not read.
fn odd_clients(operator: &Operator) -> Result<Vec<UnixStream>> {
    [
        "",
        "POST /v1/power-off HTT",
        "GET /v1/events HTTP/1.1\r\n\r\n",
    ]
    .into_iter()
    .map(|request| {
        let mut client = UnixStream::connect(&operator.socket)?;
        client.write_all(request.as_bytes())?;
        Ok(client)
    })
    .collect()
}

/// Does something as a user who does not run the host. Credentials are those of a thread, and of those that it starts.
fn as_nobody<R: Send>(act: impl FnOnce() -> R + Send) -> Result<R> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let nobody = Uid::from_raw(NOBODY);
            rustix::thread::set_thread_res_uid(Uid::ROOT, nobody, Uid::ROOT)?;
            Ok(act())
        });
        let result = thread.join();
        result.map_err(|_| anyhow::anyhow!("the thread of another user panicked"))?
    })
}

/// What a host answers to this user; nothing where it does not take the connection.
fn ask(socket: &Path) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    // It may be closed already, which the reply then shows.
    _ = stream.write_all(b"GET /v1/status HTTP/1.1\r\n\r\n");
    let mut reply = String::new();
    _ = stream.read_to_string(&mut reply);
    Ok(reply)
}

/// Others cannot, whether the socket's mode lets them or not; nor can root, where it does not run the host.
///
/// Gives the server of another user, whose end would be that of the host's events.
fn only_the_owner_can_connect(guest: &Guest, operator: &Operator) -> Result<ApiServer> {
    let folder = tempfile::tempdir()?;
    let other = folder.path().join("other");
    chown(folder.path(), Some(NOBODY), None)?;
    let control = guest.host().control().clone();
    let server = as_nobody(|| ApiServer::start(&other, control))??;
    let file = std::fs::metadata(&other)?;
    ensure!(
        file.mode() & 0o7777 == 0o600 && file.uid() == NOBODY,
        "{:o} of {}",
        file.mode(),
        file.uid()
    );
    let owner = as_nobody(|| ask(&other))??;
    ensure!(owner.starts_with("HTTP/1.1 200"), "the owner: {owner}");
    // Root passes the file's mode.
    let root = ask(&other)?;
    ensure!(root.is_empty(), "root: {root}");

    let own = &operator.socket;
    let parent = own.parent().context("the socket's folder")?;
    std::fs::set_permissions(parent, Permissions::from_mode(0o755))?;
    let kept_out = as_nobody(|| ask(own))?;
    ensure!(
        kept_out
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::PermissionDenied),
        "{kept_out:?}"
    );
    std::fs::set_permissions(own, Permissions::from_mode(0o666))?;
    let turned_away = as_nobody(|| ask(own))??;
    std::fs::set_permissions(own, Permissions::from_mode(0o600))?;
    ensure!(turned_away.is_empty(), "another user: {turned_away}");
    Ok(server)
}

fn status_shows_the_guest(guest: &Guest, operator: &Operator) -> Result<()> {
    let status = operator.ctl(&["status"])?;
    ensure!(
        status["vm"]["state"] == "running"
            && status["vm"]["memory"] == 512 << 20
            && status["vm"]["vcpus"].as_array().map(Vec::len) == Some(2)
            && status["vmbus"]["version"] == "5.3",
        "{status:#}"
    );
    for kind in ["heartbeat", "timesync", "shutdown", "keyboard", "mouse"] {
        let shown = operator.device(kind)?;
        ensure!(shown[kind]["version"] == Value::Null, "{shown:#}");
        ensure!(
            shown["instance"] == json!(guest.service_instance(kind)?),
            "{shown:#}"
        );
    }
    load_all(guest)?;
    guest.until("a beat", || {
        operator
            .device("heartbeat")
            .is_ok_and(|shown| shown["heartbeat"]["heart"] == "beats")
    })?;
    for (kind, version) in [
        ("heartbeat", "3.0"),
        ("timesync", "4.0"),
        ("shutdown", "3.2"),
        ("keyboard", "1.0"),
        ("mouse", "2.0"),
    ] {
        let shown = operator.device(kind)?;
        ensure!(
            shown[kind]["version"] == version && shown["channels"][0]["state"] == "open",
            "{shown:#}"
        );
    }
    let shown = operator.device("heartbeat")?;
    ensure!(shown["heartbeat"]["age_ms"].is_u64(), "{shown:#}");
    for (verb, state) in [("pause", "paused"), ("resume", "running")] {
        operator.ctl(&[verb])?;
        let (status, shown) = operator.curl(&[], "/v1/status")?;
        ensure!(
            status == "200" && shown["vm"]["state"] == state,
            "{verb}: {status} {shown:#}"
        );
    }
    Ok(())
}

/// By tools that know nothing of the API, and by ours.
fn bad_calls_change_nothing(guest: &Guest, operator: &Operator) -> Result<()> {
    let names = |status: &Value| {
        let devices = status["vmbus"]["devices"].as_array().into_iter().flatten();
        devices
            .map(|device| device["name"].clone())
            .collect::<Vec<_>>()
    };
    let before = operator.ctl(&["status"])?;
    for (words, path, wanted) in [
        (&[][..], "/v1/nothing", "404"),
        (&[], "/v1/power-off", "405"),
        (&["--data", "power-off"], "/v1/power-off", "400"),
        (&["--data", "{\"now\": true}"], "/v1/power-off", "400"),
        (&["--data", "{\"device\": \"mouse"], "/v1/rescind", "400"),
        (&["--data", "{\"device\": \"mice\"}"], "/v1/rescind", "404"),
        (
            &["--data", "{}", "--header", "Transfer-Encoding: chunked"],
            "/v1/power-off",
            "501",
        ),
        (&["--request", "DELETE"], "/v1/status", "405"),
    ] {
        let (status, reply) = operator.curl(words, path)?;
        ensure!(
            status == wanted && reply["error"].is_string(),
            "{words:?} {path}: {status} {reply}"
        );
    }
    let hibernation = operator.refused(&["hibernate"])?;
    ensure!(hibernation.contains("refuse"), "{hibernation}");
    for words in [
        &["rescind", "mice"][..],
        &["offer", "mouse"],
        &["key", "anykey"],
        &["disk", "remove", "none"],
        &["disk", "add", "path=none.raw"],
        &["nic", "link", "none", "up"],
        &["time", "sync", "--offset", "9223372036854775807"],
        &["type", "x", "--device", "mouse"],
    ] {
        operator.refused(words)?;
    }
    let after = operator.ctl(&["status"])?;
    ensure!(
        after["vm"]["state"] == "running"
            && after["disks"] == before["disks"]
            && names(&after) == names(&before),
        "{after:#}"
    );
    guest.sh("true")?;
    Ok(())
}

fn input_is_sent(guest: &Guest, operator: &Operator) -> Result<()> {
    let mut pressed = Recorder::new(guest, KEYBOARD, &[EV_KEY])?;
    let mut moved = Recorder::new(guest, MOUSE, &[EV_KEY, EV_ABS])?;
    let mut lines = Lines::new(guest)?;
    operator.ctl(&["type", "hi\n"])?;
    lines.expect("hi\n")?;
    pressed.expect(&strokes(&[35, 23, 28]))?;
    operator.ctl(&["key", "shift", "--down"])?;
    operator.ctl(&["key", "e0:0x48"])?;
    operator.ctl(&["key", "shift", "--up"])?;
    pressed.expect(&[
        (EV_KEY, 42, 1),
        (EV_KEY, 103, 1),
        (EV_KEY, 103, 0),
        (EV_KEY, 42, 0),
    ])?;
    let (status, _) = operator.curl(&["--data", "{\"keys\": \"ctrl-u\"}"], "/v1/key")?;
    ensure!(status == "200", "{status}");
    operator.ctl(&["mouse", "--x", "300", "--y", "200", "--buttons", "left"])?;
    operator.ctl(&["mouse", "--buttons", "none"])?;
    moved.expect(&[
        (EV_KEY, BTN_LEFT, 1),
        (EV_ABS, ABS_X, 300),
        (EV_ABS, ABS_Y, 200),
        (EV_KEY, BTN_LEFT, 0),
    ])?;
    // A client that goes away while its text is typed: the text is typed, and others type after it.
    let mut hasty = UnixStream::connect(&operator.socket)?;
    let body = json!({"text": "gone\n"}).to_string();
    let length = body.len();
    hasty.write_all(
        format!("POST /v1/type HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}").as_bytes(),
    )?;
    drop(hasty);
    lines.expect("gone\n")?;
    keys(guest, "a", KeyAction::Press)?;
    keys(guest, "enter", KeyAction::Press)?;
    lines.expect("a\n")
}

fn the_time_is_told(guest: &Guest, operator: &Operator) -> Result<()> {
    let two_days = (2 * DAY * 1000).to_string();
    operator.ctl(&["time", "sync", "--offset", &two_days])?;
    until_ahead(guest, 2 * DAY)?;
    for kind in ["sample", "probe"] {
        operator.ctl(&["time", kind])?;
    }
    let (status, _) = operator.curl(&["--data", "{\"kind\": \"sync\"}"], "/v1/time")?;
    ensure!(status == "200", "{status}");
    until_ahead(guest, 0)
}

fn devices_come_and_go(guest: &Guest, operator: &Operator, folder: &Path) -> Result<()> {
    std::fs::File::create(folder.join("data.raw"))?.set_len(8 * MIB)?;
    let added = operator.ctl(&["disk", "add", "path=data.raw,id=data,lun=3"])?;
    ensure!(added == json!({"disk": "data"}), "{added}");
    let disk = guest.disk(0, 3)?;
    operator.ctl(&["disk", "resize", "data", "12M"])?;
    // The next command hears of it.
    guest.wait_for(&format!(
        "dd if=/dev/{disk} of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null; test $(cat /sys/block/{disk}/size) = {}",
        12 * MIB / 512
    ))?;
    operator.ctl(&["disk", "remove", "data"])?;
    guest.wait_for(&format!("! test -e /sys/block/{disk}"))?;

    guest.load_network_driver()?;
    let added = operator.ctl(&["nic", "add", "tap=operator,id=lan"])?;
    ensure!(added == json!({"nic": "lan"}), "{added}");
    let interface = guest.interface("lan")?;
    guest.sh(&format!("ip link set {interface} up"))?;
    for (state, carrier) in [("down", 0), ("up", 1)] {
        operator.ctl(&["nic", "link", "lan", state])?;
        guest.wait_for(&format!(
            "test $(cat /sys/class/net/{interface}/carrier) = {carrier}"
        ))?;
    }
    operator.ctl(&["nic", "remove", "lan"])?;
    guest.wait_for(&format!("! test -e /sys/class/net/{interface}"))?;

    let path = format!(
        "/sys/bus/vmbus/devices/{}",
        guest.service_instance("heartbeat")?
    );
    operator.ctl(&["rescind", "heartbeat"])?;
    guest.wait_for(&format!("! test -e {path}"))?;
    operator.ctl(&["offer", "heartbeat"])?;
    guest.until_negotiated(&["heartbeat"])
}

fn stats_show_what_happened(operator: &Operator) -> Result<()> {
    let stats = operator.ctl(&["stats"])?;
    let exits = &stats["vm"]["exits"];
    ensure!(
        ["serial_write", "synic", "post_message"]
            .iter()
            .all(|reason| exits[reason].as_u64() > Some(0)),
        "{stats:#}"
    );
    let channels = stats["channels"].as_array().context("no channels")?;
    let keyboard = channels
        .iter()
        .find(|channel| channel["device"] == "keyboard")
        .context("no keyboard")?;
    // At least its handshake, and the 28 keystrokes that this test has sent.
    ensure!(
        keyboard["packets_in"].as_u64() >= Some(1)
            && keyboard["packets_out"].as_u64() >= Some(29)
            && ["signals", "interrupts"]
                .iter()
                .all(|count| keyboard[count].as_u64() > Some(0))
            && keyboard["ring_full"].is_u64(),
        "{keyboard:#}"
    );
    Ok(())
}

/// What those who follow the events have printed in all that time; they have ended with the host.
fn all_was_told(output: &Output) -> Result<()> {
    ensure!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let events = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<Value>, _>>()?;
    for (event, device) in [
        ("channel-opened", Some("keyboard")),
        ("negotiated", Some("mouse")),
        ("paused", None),
        ("resumed", None),
        ("device-added", Some("lan")),
        ("device-removed", Some("lan")),
        ("device-removed", Some("heartbeat")),
        ("channel-closed", Some("heartbeat")),
        ("device-added", Some("heartbeat")),
        ("shutdown-agreed", Some("shutdown")),
        ("disconnected", None),
        ("reset", None),
        ("connected", None),
        ("ended", None),
    ] {
        ensure!(
            events.iter().any(|told| told["event"] == event
                && device.is_none_or(|device| told["device"] == device)),
            "no {event} of {device:?} in {text}"
        );
    }
    let sequence: Vec<_> = events
        .iter()
        .map(|event| event["sequence"].as_u64())
        .collect();
    ensure!(sequence.is_sorted(), "{sequence:?}");
    Ok(())
}
