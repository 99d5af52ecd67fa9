// SPDX-License-Identifier: MIT OR Apache-2.0

//! Keyboard and mouse: what arrives in the guest's console and through evdev is what the operator did.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use host_harness::events::Event;
use host_harness::vsp::inputvsp::{Button, Key, KeyAction, MouseInput};
use hv_proto::input::hid;
use hv_proto::input::keyboard::{self, KeyFlags, Keystroke};
use hv_proto::pipe::PipeHeader;
use viridian_tests::guest::COMMAND;
use viridian_tests::{Drivers, Guest, both_drivers};
use zerocopy::IntoBytes;

both_drivers!(keys_and_pointer_arrive);

pub const KEYBOARD: &str = "AT Translated Set 2 keyboard";
pub const MOUSE: &str = "Microsoft Vmbus HID-compliant Mouse";

/// Types of evdev events, and the codes that matter here (`linux/input-event-codes.h`).
pub const EV_KEY: u16 = 1;
const EV_REL: u16 = 2;
pub const EV_ABS: u16 = 3;
pub const ABS_X: u16 = 0;
pub const ABS_Y: u16 = 1;
const REL_HWHEEL: u16 = 6;
const REL_WHEEL: u16 = 8;
pub const BTN_LEFT: u16 = 0x110;
const BTN_RIGHT: u16 = 0x111;
const BTN_MIDDLE: u16 = 0x112;
const BTN_SIDE: u16 = 0x113;
const BTN_EXTRA: u16 = 0x114;

/// An event of evdev: type, code, value.
type Input = (u16, u16, i32);

/// Size of `struct input_event`, in bytes.
const EVENT: usize = 24;

/// Loads the drivers of keyboard and mouse.
pub fn load(guest: &Guest) -> Result<()> {
    guest.load(&["evdev"], &[])?;
    guest.load(guest.drivers().input_modules(), &["keyboard", "mouse"])
}

/// Keys that may go down and up before their events were read: evdev keeps 64 events for a reader, and a key makes
/// up to 6, without Shift.
const FEW: usize = 8;

/// Everything that an input device says from now on.
pub struct Recorder<'a> {
    guest: &'a Guest,
    file: String,
    /// Types of events that count.
    types: &'a [u16],
    /// Events that were taken, of all types.
    taken: usize,
}

impl<'a> Recorder<'a> {
    /// Listens to events of these types from the device with this name.
    pub fn new(guest: &'a Guest, name: &str, types: &'a [u16]) -> Result<Self> {
        let event = guest.wait_for(&format!(
            "grep -lx '{name}' /sys/class/input/event*/device/name | cut -d/ -f5 | grep ."
        ))?;
        guest.wait_for(&format!("test -c /dev/input/{event}"))?;
        let file = format!("/tmp/{event}");
        // The shell opens the device before this command ends.
        guest.sh(&format!(
            "exec 3< /dev/input/{event}; cat <&3 > {file} 2> /dev/null &"
        ))?;
        Ok(Self {
            guest,
            file,
            types,
            taken: 0,
        })
    }

    /// The next events, of all types.
    fn new_ones(&self) -> Result<Vec<Input>> {
        let text = self.guest.sh(&format!(
            "tail -c +{} {} | hexdump -v -e '{EVENT}/1 \"%02x\" \"\\n\"'",
            EVENT * self.taken + 1,
            self.file
        ))?;
        Ok(text.lines().filter_map(parse).collect())
    }

    /// The next events, when there are enough of them.
    fn take(&mut self, enough: impl Fn(&[Input]) -> bool) -> Result<Vec<Input>> {
        let deadline = Instant::now() + COMMAND;
        loop {
            let all = self.new_ones()?;
            let counting = all.iter().filter(|input| self.types.contains(&input.0));
            let new: Vec<Input> = counting.copied().collect();
            if enough(&new) {
                self.taken += all.len();
                return Ok(new);
            }
            ensure!(Instant::now() < deadline, "there is no more than {new:?}");
            // The guest has something else to do than to be asked.
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Sees that the next events are those.
    pub fn expect(&mut self, wanted: &[Input]) -> Result<()> {
        let got = self.take(|new| new.len() >= wanted.len())?;
        ensure!(got == wanted, "{got:?} arrived, not {wanted:?}");
        Ok(())
    }
}

/// `struct input_event` in hexadecimal digits. What is not a whole one comes later.
fn parse(line: &str) -> Option<Input> {
    let byte = |at: usize| u8::from_str_radix(line.get(2 * at..2 * at + 2)?, 16).ok();
    let value = [byte(20)?, byte(21)?, byte(22)?, byte(23)?];
    Some((
        u16::from_le_bytes([byte(16)?, byte(17)?]),
        u16::from_le_bytes([byte(18)?, byte(19)?]),
        i32::from_le_bytes(value),
    ))
}

/// Keys that go down and up one after the other.
pub fn strokes(codes: &[u16]) -> Vec<Input> {
    let strokes = codes
        .iter()
        .map(|&code| [(EV_KEY, code, 1), (EV_KEY, code, 0)]);
    strokes.flatten().collect()
}

pub fn keys(guest: &Guest, keys: &str, action: KeyAction) -> Result<()> {
    let keys = Key::chord(keys)?;
    let services = guest.host().services();
    Ok(services.keyboard(None, |keyboard| keyboard.key(&keys, action))??)
}

fn type_text(guest: &Guest, text: &str) -> Result<()> {
    let services = guest.host().services();
    Ok(services.keyboard(None, |keyboard| keyboard.type_text(text))??)
}

fn mouse(guest: &Guest, input: &MouseInput) -> Result<()> {
    let services = guest.host().services();
    Ok(services.mouse(None, |mouse| mouse.input(input))??)
}

/// The lines that are typed from now on, on the console that a screen would show.
pub struct Lines<'a> {
    guest: &'a Guest,
    wanted: String,
}

impl<'a> Lines<'a> {
    pub fn new(guest: &'a Guest) -> Result<Self> {
        guest.sh("exec 3< /dev/tty1; cat <&3 > /tmp/typed 2> /dev/null &")?;
        let wanted = String::new();
        Ok(Self { guest, wanted })
    }

    /// Sees that these lines were typed, and nothing else.
    pub fn expect(&mut self, lines: &str) -> Result<()> {
        self.wanted.push_str(lines);
        let count = self.wanted.lines().count();
        self.guest
            .wait_for(&format!("test $(wc -l < /tmp/typed) -ge {count}"))?;
        let got = self.guest.sh("cat /tmp/typed")?;
        ensure!(
            got == self.wanted.trim_end(),
            "{got:?} was typed, not {:?}",
            self.wanted
        );
        Ok(())
    }

    /// Sees that this line is typed at last.
    fn expect_last(&self, line: &str) -> Result<()> {
        self.guest
            .wait_for(&format!("test \"$(tail -n 1 /tmp/typed)\" = '{line}'"))?;
        Ok(())
    }
}

/// Keys by their names in the control API and their numbers in Linux, one of each kind of scan code.
const KEYS: &[(&str, u16)] = &[
    ("esc", 1),
    ("tab", 15),
    ("f1", 59),
    ("f12", 88),
    ("102nd", 86),
    ("kp7", 71),
    ("kpasterisk", 55),
    ("leftshift", 42),
    ("rightshift", 54),
    ("leftctrl", 29),
    ("leftalt", 56),
    // With the prefix E0.
    ("rightctrl", 97),
    ("rightalt", 100),
    ("kpenter", 96),
    ("kpslash", 98),
    ("home", 102),
    ("up", 103),
    ("pageup", 104),
    ("left", 105),
    ("right", 106),
    ("end", 107),
    ("down", 108),
    ("pagedown", 109),
    ("insert", 110),
    ("delete", 111),
    ("leftmeta", 125),
    ("rightmeta", 126),
    ("menu", 127),
    // With the prefix E1.
    ("pause", 119),
];

fn keys_and_pointer_arrive(drivers: Drivers) -> Result<()> {
    let guest = Guest::with(drivers).boot()?;
    load(&guest)?;
    let mut pressed = Recorder::new(&guest, KEYBOARD, &[EV_KEY])?;
    let mut moved = Recorder::new(&guest, MOUSE, &[EV_KEY, EV_REL, EV_ABS])?;
    let mut lines = Lines::new(&guest)?;
    if drivers == Drivers::Rust {
        // The C driver tells the host of no lights and drops characters.
        lights_and_characters_arrive(&guest, &mut pressed, &mut lines)?;
    }
    typing_arrives(&guest, &mut pressed, &mut lines)?;
    for some in KEYS.chunks(FEW) {
        for (name, _) in some {
            keys(&guest, name, KeyAction::Press)?;
        }
        let codes: Vec<u16> = some.iter().map(|(_, code)| *code).collect();
        pressed.expect(&strokes(&codes))?;
    }
    modifiers_arrive(&guest, &mut pressed)?;
    keys_switch_consoles(&guest, &mut pressed)?;
    pointer_arrives(&guest, &mut moved)?;
    let identity = guest.sh(&format!(
        "grep -B1 -x 'N: Name=\"{MOUSE}\"' /proc/bus/input/devices"
    ))?;
    ensure!(
        identity.contains("Bus=0006 Vendor=045e Product=0621"),
        "the mouse is {identity}"
    );
    input_wakes(&guest, &mut pressed)?;
    guest.check_log(&[])?;
    malformed_input_is_survived(&guest, &mut pressed, &mut moved, &lines)?;
    input_goes_and_comes_back(&guest)?;
    guest.power_off()
}

/// Devices are taken away while the user uses them, and put back.
fn input_goes_and_comes_back(guest: &Guest) -> Result<()> {
    let services = guest.host().services();
    let press = || keys(guest, "a", KeyAction::Press);
    let turn = || {
        let input = MouseInput {
            wheel: 1,
            ..MouseInput::default()
        };
        mouse(guest, &input)
    };
    let uses: [(&str, &(dyn Fn() -> Result<()> + Sync)); 2] =
        [("keyboard", &press), ("mouse", &turn)];
    for (device, use_it) in uses {
        let path = format!("/sys/bus/vmbus/devices/{}", guest.service_instance(device)?);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while use_it().is_ok() {
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
            services.rescind(device)
        })?;
        guest.wait_for(&format!("! test -e {path}"))?;
        services.offer(device)?;
        guest.until_negotiated(&[device])?;
    }
    let mut pressed = Recorder::new(guest, KEYBOARD, &[EV_KEY])?;
    let mut moved = Recorder::new(guest, MOUSE, &[EV_ABS])?;
    press()?;
    pressed.expect(&strokes(&[30]))?;
    let to = MouseInput {
        x: Some(5),
        ..MouseInput::default()
    };
    mouse(guest, &to)?;
    moved.expect(&[(EV_ABS, ABS_X, 5)])
}

/// What the user does wakes the machine; a key is tried.
fn input_wakes(guest: &Guest, pressed: &mut Recorder) -> Result<()> {
    for device in ["keyboard", "mouse"] {
        let power = format!(
            "/sys/bus/vmbus/devices/{}/power",
            guest.service_instance(device)?
        );
        guest.sh(&format!(
            "test $(cat {power}/wakeup) = enabled && test $(cat {power}/wakeup_active_count) -gt 0"
        ))?;
    }
    // The kernel says on the console that it falls asleep.
    guest.sh("dmesg -n 7")?;
    // A key that comes before it sleeps keeps it from that.
    let mut sleep = guest.spawn(
        "until echo freeze > /sys/power/state; do sleep 1; done; cat /sys/power/suspend_stats/success",
    )?;
    guest.until("it falls asleep", || {
        guest.console().contains("PM: suspend entry (s2idle)")
    })?;
    let woken = std::thread::scope(|scope| -> Result<_> {
        let sleep = scope.spawn(|| sleep.wait_each(COMMAND, |_| {}));
        let mut pause = Duration::from_secs(1);
        while !sleep.is_finished() {
            keys(guest, "f9", KeyAction::Press)?;
            std::thread::sleep(pause);
            // A slow machine takes long to fall asleep.
            pause *= 2;
        }
        let woken = sleep.join();
        woken.map_err(|_| anyhow::anyhow!("the thread that waits panicked"))
    })?
    .context("no key wakes it")?;
    ensure!(woken.stdout.trim_end() == "1", "it did not sleep: {woken}");
    guest.sh("dmesg -n 3")?;
    // The key that woke it arrived too. What came before and after is of no interest.
    keys(guest, "f11", KeyAction::Press)?;
    let keys = pressed.take(|new| new.last() == Some(&(EV_KEY, 87, 0)))?;
    ensure!(keys.contains(&(EV_KEY, 67, 1)), "{keys:?}");
    Ok(())
}

fn typing_arrives(guest: &Guest, pressed: &mut Recorder, lines: &mut Lines) -> Result<()> {
    type_text(guest, "aB1!\n")?;
    let shifted = |code| {
        [
            (EV_KEY, 42, 1),
            (EV_KEY, code, 1),
            (EV_KEY, code, 0),
            (EV_KEY, 42, 0),
        ]
    };
    let wanted = [
        strokes(&[30]),
        shifted(48).to_vec(),
        strokes(&[2]),
        shifted(2).to_vec(),
        strokes(&[28]),
    ];
    pressed.expect(&wanted.concat())?;
    // Everything that a US keyboard has. The console takes it at any speed.
    let all: String = (' '..='~').collect();
    type_text(guest, &format!("{all}\nthe end\n"))?;
    lines.expect(&format!("aB1!\n{all}\nthe end\n"))?;
    // evdev does not, so only what comes then counts.
    keys(guest, "f11", KeyAction::Press)?;
    pressed.take(|new| new.last() == Some(&(EV_KEY, 87, 0)))?;
    Ok(())
}

fn modifiers_arrive(guest: &Guest, pressed: &mut Recorder) -> Result<()> {
    keys(guest, "ctrl-rightalt-x", KeyAction::Press)?;
    let codes = [29, 100, 45];
    let down = codes.iter().map(|&code| (EV_KEY, code, 1));
    let up = codes.iter().rev().map(|&code| (EV_KEY, code, 0));
    pressed.expect(&down.chain(up).collect::<Vec<_>>())?;
    // A key that stays down until it is let go.
    keys(guest, "shift", KeyAction::Down)?;
    pressed.expect(&[(EV_KEY, 42, 1)])?;
    keys(guest, "shift", KeyAction::Up)?;
    pressed.expect(&[(EV_KEY, 42, 0)])
}

fn keys_switch_consoles(guest: &Guest, pressed: &mut Recorder) -> Result<()> {
    // There is a second one as long as somebody has it open.
    guest.sh("exec 3< /dev/tty2; cat <&3 > /dev/null 2>&1 &")?;
    for (console, function, code) in [(2, "alt-f2", 60), (1, "alt-f1", 59)] {
        keys(guest, function, KeyAction::Press)?;
        guest.wait_for(&format!(
            "test $(cat /sys/class/tty/tty0/active) = tty{console}"
        ))?;
        pressed.expect(&[
            (EV_KEY, 56, 1),
            (EV_KEY, code, 1),
            (EV_KEY, code, 0),
            (EV_KEY, 56, 0),
        ])?;
    }
    Ok(())
}

fn pointer_arrives(guest: &Guest, moved: &mut Recorder) -> Result<()> {
    let mut wanted = Vec::new();
    for (x, y) in [(1, 2), (0x7fff, 0x7fff), (0, 0), (12_345, 23_456)] {
        let to = MouseInput {
            x: Some(x),
            y: Some(y),
            ..MouseInput::default()
        };
        mouse(guest, &to)?;
        wanted.extend([(EV_ABS, ABS_X, x.into()), (EV_ABS, ABS_Y, y.into())]);
    }
    let buttons = [
        (Button::Left, BTN_LEFT),
        (Button::Right, BTN_RIGHT),
        (Button::Middle, BTN_MIDDLE),
        (Button::Side, BTN_SIDE),
        (Button::Extra, BTN_EXTRA),
    ];
    for (button, code) in buttons {
        for (down, value) in [(vec![button], 1), (Vec::new(), 0)] {
            let input = MouseInput {
                buttons: Some(down),
                ..MouseInput::default()
            };
            mouse(guest, &input)?;
            wanted.push((EV_KEY, code, value));
        }
    }
    // A button stays down while the pointer moves.
    let drag = MouseInput {
        x: Some(1),
        buttons: Some(vec![Button::Left, Button::Right]),
        ..MouseInput::default()
    };
    mouse(guest, &drag)?;
    let last = [
        (EV_KEY, BTN_LEFT, 1),
        (EV_KEY, BTN_RIGHT, 1),
        (EV_ABS, ABS_X, 1),
    ];
    wanted.extend(last);
    moved.expect(&wanted)?;

    for (wheel, pan) in [(1, 0), (-127, 0), (0, 5)] {
        let input = MouseInput {
            wheel,
            pan,
            ..MouseInput::default()
        };
        mouse(guest, &input)?;
        let (code, value) = match wheel {
            0 => (REL_HWHEEL, pan),
            _ => (REL_WHEEL, wheel),
        };
        // In finer steps too, which newer programs use.
        let got = moved.take(|new| new.len() >= 2)?;
        ensure!(
            got.len() == 2 && got.contains(&(EV_REL, code, value.into())),
            "wheel {wheel}, pan {pan}: {got:?}"
        );
    }
    Ok(())
}

/// Messages to a keyboard that make no sense.
fn bad_keyboard_messages() -> Vec<Vec<u8>> {
    let key = Keystroke::new(0x1e, KeyFlags::empty());
    vec![
        Vec::new(),
        vec![3, 0, 0, 0],
        // Not a whole keystroke; packets are made of 8 bytes.
        key.as_bytes()[..8].to_vec(),
        // Answers and requests at the wrong time.
        keyboard::ProtocolResponse::new(true).as_bytes().to_vec(),
        [1, 0, 0, 0, 0, 0, 1, 0].to_vec(),
        vec![4, 0, 0, 0, 7, 0, 0, 0],
        vec![0xff; 16],
        vec![0xff; 4000],
    ]
}

/// Messages to a mouse: with the sizes of their parts as they should be, or not.
fn bad_mouse_messages(drivers: Drivers) -> Vec<Vec<u8>> {
    let message = |pipe: u32, message_type: u32, size: u32, body: &[u8]| {
        let header = [message_type.to_le_bytes(), size.to_le_bytes()].concat();
        [PipeHeader::data(pipe).as_bytes(), &header, body].concat()
    };
    let mut list = vec![
        // Not the pipe's kind of message.
        [2, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0].to_vec(),
        message(16, 0xffff, 8, &[0; 8]),
        message(16, 5, 8, &[0; 8]),
    ];
    if drivers == Drivers::Rust {
        // The C driver reads what is not there, or warns, which stops kernels that are told so.
        list.extend([
            Vec::new(),
            vec![1, 0, 0, 0],
            // Longer than the packet, in both sizes.
            message(u32::MAX, 4, 8, &[0; 8]),
            message(64, 4, 8, &[0; 8]),
            message(16, 4, u32::MAX, &[0; 8]),
            message(16, 4, 9, &[0; 8]),
            // The handshake once more, well-formed and not.
            message(13, 1, 5, &[0, 0, 2, 0, 0]),
            message(u32::MAX, 1, 5, &[0, 0, 2, 0, 1]),
            message(8 + 41 + 68, 2, 41 + 68, &[0; 41 + 68]),
            message(8, 2, 0, &[]),
            message(9, 3, 1, &[0]),
            message(12, 0, 4, &[0, 0, 2, 0]),
        ]);
        let info = hid::DeviceInfoStart::mouse(hid::REPORT_DESCRIPTOR.len());
        let info = info
            .map(|info| info.as_bytes().to_vec())
            .unwrap_or_default();
        list.push([&*info, &hid::REPORT_DESCRIPTOR].concat());
    }
    list
}

fn malformed_input_is_survived(
    guest: &Guest,
    pressed: &mut Recorder,
    moved: &mut Recorder,
    lines: &Lines,
) -> Result<()> {
    let drivers = guest.drivers();
    let port = |device: &str| guest.host().services().get(device).context("no device");
    for (device, messages) in [
        ("keyboard", bad_keyboard_messages()),
        ("mouse", bad_mouse_messages(drivers)),
    ] {
        let rejected = || match drivers {
            Drivers::C => Ok(0),
            Drivers::Rust => guest.driver_count("hid_vsc", device, "rejected"),
        };
        let service = port(device)?;
        let before = rejected()?;
        // Each twice.
        for message in messages.iter().chain(&messages) {
            service.port().send_raw(message)?;
        }
        if drivers == Drivers::Rust {
            // The bus driver drops it. The C one goes on in its middle, and does not come to an end.
            service.port().send_raw(&[0; 4096 + 8])?;
        }
        // A completion without a request is nothing.
        service.port().complete_raw(77, &[])?;
        guest.until_taken(device)?;
        let rejected = rejected()? - before;
        ensure!(
            drivers == Drivers::C || rejected == 2 * messages.len() as u64,
            "{device}: {rejected} messages rejected, not twice {}",
            messages.len()
        );
    }
    clear_line(guest, pressed)?;
    type_text(guest, "ready\n")?;
    lines.expect_last("ready")?;
    pressed.expect(&strokes(&[19, 18, 30, 32, 21, 28]))?;
    let to = MouseInput {
        x: Some(77),
        y: Some(88),
        buttons: Some(Vec::new()),
        ..MouseInput::default()
    };
    mouse(guest, &to)?;
    moved.expect(&[
        (EV_KEY, BTN_LEFT, 0),
        (EV_KEY, BTN_RIGHT, 0),
        (EV_ABS, ABS_X, 77),
        (EV_ABS, ABS_Y, 88),
    ])?;
    guest.check_log(&[
        "packet dropped",
        "bytes dropped",
        "callbacks suppressed",
        // The C drivers.
        "Illegal",
        "unhandled",
        "unsupported hid msg type",
    ])
}

/// Away with what keys that are no letters have left in the console's line.
fn clear_line(guest: &Guest, pressed: &mut Recorder) -> Result<()> {
    keys(guest, "ctrl-u", KeyAction::Press)?;
    pressed.expect(&[
        (EV_KEY, 29, 1),
        (EV_KEY, 22, 1),
        (EV_KEY, 22, 0),
        (EV_KEY, 29, 0),
    ])
}

/// Presses Caps Lock, and sees that the host hears of its light.
pub fn caps_lock(guest: &Guest, pressed: &mut Recorder, on: bool) -> Result<()> {
    let events = guest.host().events().subscribe();
    keys(guest, "capslock", KeyAction::Press)?;
    let light = |event: &Event| matches!(event, Event::Leds { caps_lock, .. } if *caps_lock == on);
    ensure!(
        events.find(COMMAND, light).is_some(),
        "no light ({on}): {}",
        guest.sh("cd /sys/class/leds; grep . *capslock/brightness *capslock/trigger /sys/kernel/debug/hid_vsc-*/state")?
    );
    // The host knows of the light before the driver has done with it: what is pressed then must not be lost.
    keys(guest, "f10", KeyAction::Press)?;
    pressed.expect(&strokes(&[58, 68]))
}

fn lights_and_characters_arrive(
    guest: &Guest,
    pressed: &mut Recorder,
    lines: &mut Lines,
) -> Result<()> {
    for on in [true, false, true] {
        caps_lock(guest, pressed, on)?;
    }
    // With the light on, letters still arrive as they were meant. So do characters that no key has.
    clear_line(guest, pressed)?;
    let text = "Grüße aus Köln, 5 € für 𝄞 und 漢字\n";
    type_text(guest, text)?;
    lines.expect(text)?;
    keys(guest, "f11", KeyAction::Press)?;
    pressed.take(|new| new.last() == Some(&(EV_KEY, 87, 0)))?;
    caps_lock(guest, pressed, false)?;
    clear_line(guest, pressed)
}
