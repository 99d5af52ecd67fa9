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
use viridian_tests::{Drivers, Guest, both_drivers, our_drivers};
use zerocopy::IntoBytes;

both_drivers!(keys_and_pointer_arrive, malformed_input_is_survived);

// The C driver tells the host of no lights and drops characters.
our_drivers!(lights_and_characters_arrive);

const KEYBOARD: &str = "AT Translated Set 2 keyboard";
const MOUSE: &str = "Microsoft Vmbus HID-compliant Mouse";

/// Types of evdev events, and the codes that matter here (`linux/input-event-codes.h`).
const EV_KEY: u16 = 1;
const EV_REL: u16 = 2;
const EV_ABS: u16 = 3;
const ABS_X: u16 = 0;
const ABS_Y: u16 = 1;
const REL_HWHEEL: u16 = 6;
const REL_WHEEL: u16 = 8;
const BTN_LEFT: u16 = 0x110;
const BTN_RIGHT: u16 = 0x111;
const BTN_MIDDLE: u16 = 0x112;
const BTN_SIDE: u16 = 0x113;
const BTN_EXTRA: u16 = 0x114;

/// An event of evdev: type, code, value.
type Input = (u16, u16, i32);

fn guest_with_input(drivers: Drivers) -> Result<Guest> {
    let guest = Guest::with(drivers).boot()?;
    guest.load(&["evdev"], &[])?;
    guest.load(drivers.input_modules(), &["keyboard", "mouse"])?;
    Ok(guest)
}

/// Keys that may go down and up before their events were read: evdev keeps 64 events for a reader, and a key makes
/// up to 6, without Shift.
const FEW: usize = 8;

/// Everything that an input device says from now on.
struct Recorder<'a> {
    guest: &'a Guest,
    file: String,
    /// Types of events that count.
    types: &'a [u16],
    taken: usize,
}

impl<'a> Recorder<'a> {
    /// Listens to events of these types from the device with this name.
    fn new(guest: &'a Guest, name: &str, types: &'a [u16]) -> Result<Self> {
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

    /// All events so far.
    fn all(&self) -> Result<Vec<Input>> {
        let text = self.guest.sh(&format!(
            "hexdump -v -e '24/1 \"%02x\" \"\\n\"' {}",
            self.file
        ))?;
        let all = text.lines().filter_map(parse);
        Ok(all.filter(|input| self.types.contains(&input.0)).collect())
    }

    /// The next events, when there are enough of them.
    fn take(&mut self, enough: impl Fn(&[Input]) -> bool) -> Result<Vec<Input>> {
        let deadline = Instant::now() + COMMAND;
        loop {
            let all = self.all()?;
            let new = all.get(self.taken..).unwrap_or_default();
            if enough(new) {
                self.taken = all.len();
                return Ok(new.to_vec());
            }
            ensure!(Instant::now() < deadline, "there is no more than {new:?}");
            // The guest has something else to do than to be asked.
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Sees that the next events are those.
    fn expect(&mut self, wanted: &[Input]) -> Result<()> {
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
fn strokes(codes: &[u16]) -> Vec<Input> {
    let strokes = codes
        .iter()
        .map(|&code| [(EV_KEY, code, 1), (EV_KEY, code, 0)]);
    strokes.flatten().collect()
}

fn keys(guest: &Guest, keys: &str, action: KeyAction) -> Result<()> {
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

/// Collects what is typed on the console that a screen would show.
fn listen(guest: &Guest) -> Result<()> {
    guest.sh("exec 3< /dev/tty1; cat <&3 > /tmp/typed 2> /dev/null &")?;
    Ok(())
}

/// Sees that these lines were typed, and nothing else.
fn typed(guest: &Guest, text: &str) -> Result<()> {
    let lines = text.lines().count();
    guest.wait_for(&format!("test $(wc -l < /tmp/typed) -ge {lines}"))?;
    let got = guest.sh("cat /tmp/typed")?;
    ensure!(got == text.trim_end(), "{got:?} was typed, not {text:?}");
    Ok(())
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
    let guest = guest_with_input(drivers)?;
    let mut pressed = Recorder::new(&guest, KEYBOARD, &[EV_KEY])?;
    listen(&guest)?;
    typing_arrives(&guest, &mut pressed)?;
    for some in KEYS.chunks(FEW) {
        for (name, _) in some {
            keys(&guest, name, KeyAction::Press)?;
        }
        let codes: Vec<u16> = some.iter().map(|(_, code)| *code).collect();
        pressed.expect(&strokes(&codes))?;
    }
    modifiers_arrive(&guest, &mut pressed)?;
    pointer_arrives(&guest)?;
    let identity = guest.sh(&format!(
        "grep -B1 -x 'N: Name=\"{MOUSE}\"' /proc/bus/input/devices"
    ))?;
    ensure!(
        identity.contains("Bus=0006 Vendor=045e Product=0621"),
        "the mouse is {identity}"
    );
    for device in ["keyboard", "mouse"] {
        let power = format!(
            "/sys/bus/vmbus/devices/{}/power",
            guest.service_instance(device)?
        );
        // What the user did would have woken the machine.
        guest.sh(&format!(
            "test $(cat {power}/wakeup) = enabled && test $(cat {power}/wakeup_active_count) -gt 0"
        ))?;
    }
    guest.check_log(&[])?;
    guest.power_off()
}

fn typing_arrives(guest: &Guest, pressed: &mut Recorder) -> Result<()> {
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
    typed(guest, &format!("aB1!\n{all}\nthe end\n"))?;
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

fn pointer_arrives(guest: &Guest) -> Result<()> {
    let mut moved = Recorder::new(guest, MOUSE, &[EV_KEY, EV_REL, EV_ABS])?;
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

fn malformed_input_is_survived(drivers: Drivers) -> Result<()> {
    let guest = guest_with_input(drivers)?;
    let mut pressed = Recorder::new(&guest, KEYBOARD, &[EV_KEY])?;
    let mut moved = Recorder::new(&guest, MOUSE, &[EV_KEY, EV_ABS])?;
    listen(&guest)?;
    let port = |device: &str| guest.host().services().get(device).context("no device");
    for (device, messages) in [
        ("keyboard", bad_keyboard_messages()),
        ("mouse", bad_mouse_messages(drivers)),
    ] {
        let rejected = |guest: &Guest| match drivers {
            Drivers::C => Ok(0),
            Drivers::Rust => guest.driver_count("hid_vsc", device, "rejected"),
        };
        let service = port(device)?;
        let before = rejected(&guest)?;
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
        let rejected = rejected(&guest)? - before;
        ensure!(
            drivers == Drivers::C || rejected == 2 * messages.len() as u64,
            "{device}: {rejected} messages rejected, not twice {}",
            messages.len()
        );
    }
    type_text(&guest, "ready\n")?;
    typed(&guest, "ready\n")?;
    pressed.expect(&strokes(&[19, 18, 30, 32, 21, 28]))?;
    let to = MouseInput {
        x: Some(77),
        y: Some(88),
        ..MouseInput::default()
    };
    mouse(&guest, &to)?;
    moved.expect(&[(EV_ABS, ABS_X, 77), (EV_ABS, ABS_Y, 88)])?;
    guest.check_log(&[
        "packet dropped",
        "bytes dropped",
        "callbacks suppressed",
        // The C drivers.
        "Illegal",
        "unhandled",
        "unsupported hid msg type",
    ])?;
    guest.power_off()
}

fn lights_and_characters_arrive(drivers: Drivers) -> Result<()> {
    let guest = guest_with_input(drivers)?;
    let mut pressed = Recorder::new(&guest, KEYBOARD, &[EV_KEY])?;
    listen(&guest)?;
    let events = guest.host().events().subscribe();
    for on in [true, false, true] {
        keys(&guest, "capslock", KeyAction::Press)?;
        pressed.expect(&strokes(&[58]))?;
        let light =
            |event: &Event| matches!(event, Event::Leds { caps_lock, .. } if *caps_lock == on);
        ensure!(
            events.find(COMMAND, light).is_some(),
            "no light ({on}): {}",
            guest.sh("cd /sys/class/leds; grep . *capslock/brightness *capslock/trigger /sys/kernel/debug/hid_vsc-*/state")?
        );
    }
    // With the light on, letters still arrive as they were meant. So do characters that no key has.
    let text = "Grüße aus Köln, 5 € für 𝄞 und 漢字\n";
    type_text(&guest, text)?;
    typed(&guest, text)?;
    keys(&guest, "capslock", KeyAction::Press)?;
    let dark = |event: &Event| {
        matches!(
            event,
            Event::Leds {
                caps_lock: false,
                ..
            }
        )
    };
    ensure!(events.find(COMMAND, dark).is_some(), "the light stays");
    guest.check_log(&[])?;
    guest.power_off()
}
