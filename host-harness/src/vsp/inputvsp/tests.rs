// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests of the input devices, with a guest in memory: the real bus server and rings, and the
//! guest's side of `hv_proto::input`.

use std::time::Instant;

use hv_proto::input::hid::{
    GuestMouse, GuestStep as MouseStep, MouseReport, PRODUCT, REPORT_DESCRIPTOR, VENDOR,
};
use hv_proto::input::keyboard::{
    GuestKeyboard, GuestStep as KeyStep, Key as GuestKey, LedIndicators, Leds,
};
use hv_proto::packet::PacketType;
use hv_proto::version::Version as BusVersion;
use zerocopy::{FromBytes, IntoBytes};

use super::*;
use crate::events::{Event, Events, Subscription};
use crate::vmbus::test_guest::{FakeChannel, FakeGuest, SOON};
use crate::vmbus::{OfferHandle, OfferParams, Vsp};
use crate::vsp::port::PortError;

struct Rig {
    guest: FakeGuest,
    channel: FakeChannel,
    events: Subscription,
    _offer: OfferHandle,
}

impl Rig {
    fn new(events: &Events, vsp: Box<dyn Vsp>) -> Self {
        let mut guest = FakeGuest::connected(BusVersion::V5_3);
        let class = hv_proto::guid::KEYBOARD;
        let instance = hv_proto::guid!("00000000-0000-0000-0000-000000000001");
        let params = OfferParams::new("input", class, instance);
        let offer = guest.server.offer(params, vsp).unwrap();
        let channel = guest.request_offers().remove(0);
        let channel = guest.open(&channel, 10, 0).unwrap();
        Self {
            guest,
            channel,
            events: events.subscribe(),
            _offer: offer,
        }
    }

    /// Sends a message and takes its completion, as drivers do.
    fn send(&mut self, message: &[u8]) {
        self.channel.send(1, message);
        assert_eq!(self.channel.completion(1), b"");
    }

    fn receive(&mut self) -> Vec<u8> {
        let packet = self.channel.receive();
        assert_eq!(packet.packet_type, PacketType::IN_BAND);
        packet.payload
    }
}

fn keyboard() -> (Keyboard, GuestKeyboard, Rig) {
    let events = Events::default();
    let host = Keyboard::new("input", events.clone());
    let rig = Rig::new(&events, host.vsp());
    (host, GuestKeyboard::new(), rig)
}

fn ready_keyboard() -> (Keyboard, GuestKeyboard, Rig) {
    let (host, mut guest, mut rig) = keyboard();
    rig.send(guest.start().as_bytes());
    let answer = rig.receive();
    assert_eq!(guest.on_packet(&answer), Ok(KeyStep::Ready));
    (host, guest, rig)
}

/// The scan codes of so many keystrokes.
fn codes(guest: &mut GuestKeyboard, rig: &mut Rig, count: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..count {
        let message = rig.receive();
        match guest.on_packet(&message).unwrap() {
            KeyStep::Key(GuestKey::Scan { codes, .. }) => bytes.extend(codes.as_bytes()),
            other => panic!("{other:?}"),
        }
    }
    bytes
}

#[test]
fn text_is_typed_with_the_keys_of_a_us_keyboard() {
    let (host, mut guest, mut rig) = ready_keyboard();
    assert_eq!(host.status().version.as_deref(), Some("1.0"));
    host.type_text("aB!\n").unwrap();
    assert_eq!(
        codes(&mut guest, &mut rig, 12),
        [
            0x1e, 0x9e, 0x2a, 0x30, 0xb0, 0xaa, 0x2a, 0x02, 0x82, 0xaa, 0x1c, 0x9c
        ]
    );
    assert_eq!(host.status().keystrokes, 12);
}

#[test]
fn a_text_has_an_end_and_others_do_not_wait_for_it() {
    let (host, _, _rig) = ready_keyboard();
    let late = host.type_until("a", Instant::now());
    assert!(matches!(late, Err(InputError::Slow(0))));
    assert_eq!(host.status().keystrokes, 0);
    let other = host.typing();
    assert!(matches!(host.type_text("a"), Err(InputError::Busy)));
    let chord = Key::chord("a").unwrap();
    let pressed = host.key(&chord, KeyAction::Press);
    assert!(matches!(pressed, Err(InputError::Busy)));
    drop(other);
    host.key(&chord, KeyAction::Press).unwrap();
}

#[test]
fn text_without_keys_is_typed_as_unicode() {
    let (host, mut guest, mut rig) = ready_keyboard();
    host.type_text("ä😀").unwrap();
    for want in [0xe4, 0xd83d, 0xde00] {
        for want_down in [true, false] {
            let message = rig.receive();
            match guest.on_packet(&message).unwrap() {
                KeyStep::Key(GuestKey::Unicode { unit, down }) => {
                    assert_eq!((unit, down), (want, want_down));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn caps_lock_of_the_guest_is_made_up_for() {
    let (host, mut guest, mut rig) = ready_keyboard();
    rig.send(LedIndicators::new(Leds::CAPS_LOCK).as_bytes());
    let leds = |event: &Event| matches!(event, Event::Leds { .. });
    assert_eq!(
        rig.events.find(SOON, leds),
        Some(Event::Leds {
            device: "input".into(),
            scroll_lock: false,
            num_lock: false,
            caps_lock: true
        })
    );
    assert!(host.status().leds.unwrap().caps_lock);
    host.type_text("A1b").unwrap();
    assert_eq!(
        codes(&mut guest, &mut rig, 8),
        [0x1e, 0x9e, 0x02, 0x82, 0x2a, 0x30, 0xb0, 0xaa]
    );
}

#[test]
fn keys_go_down_in_order_and_up_in_reverse() {
    let (host, mut guest, mut rig) = ready_keyboard();
    let chord = Key::chord("ctrl-alt-delete").unwrap();
    host.key(&chord, KeyAction::Press).unwrap();
    assert_eq!(
        codes(&mut guest, &mut rig, 6),
        [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d]
    );
    let pause = Key::chord("pause").unwrap();
    host.key(&pause, KeyAction::Down).unwrap();
    host.key(&pause, KeyAction::Up).unwrap();
    assert_eq!(
        codes(&mut guest, &mut rig, 4),
        [0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5]
    );
}

#[test]
fn names_of_keys() {
    for good in [
        "a", "-", "minus", "enter", "f12", "e0:0x48", "0x1e", "ctrl-c", "pause", "shift-1",
    ] {
        assert!(Key::chord(good).is_ok(), "{good}");
    }
    assert_eq!(Key::chord("up"), Key::chord("e0:0x48"));
    for bad in [
        "", "A", "!", "ä", "ctrl-", "--", "e2:0x1e", "0x80", "0x100", "0x+1", "f13", "nokey",
    ] {
        assert!(Key::chord(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_keyboard_without_a_driver_is_an_error() {
    let (host, mut guest, mut rig) = keyboard();
    assert!(matches!(host.type_text("a"), Err(InputError::NotReady)));
    // An unknown version is refused, and the guest may try another.
    let mut request = guest.start();
    request.version = 0x0002_0000.into();
    rig.send(request.as_bytes());
    let refused = rig.receive();
    assert!(guest.on_packet(&refused).is_err());
    for bad in [&b""[..], b"\x04\0\0\0\x01\0\0\0", b"\x09\0\0\0\0\0\0\0"] {
        rig.send(bad);
    }
    let deadline = Instant::now() + SOON;
    while host.status().rejected < 3 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    rig.send(guest.start().as_bytes());
    let accepted = rig.receive();
    assert_eq!(guest.on_packet(&accepted), Ok(KeyStep::Ready));
    rig.guest.close(rig.channel);
    assert!(matches!(
        host.type_text("a"),
        Err(InputError::Port(PortError::Closed))
    ));
    assert_eq!(host.status().version, None);
}

#[test]
fn a_text_that_is_too_long_is_refused() {
    let (host, _guest, _rig) = ready_keyboard();
    let text = "x".repeat(MAX_TEXT + 1);
    assert!(matches!(
        host.type_text(&text),
        Err(InputError::Impossible(_))
    ));
    assert_eq!(host.status().keystrokes, 0);
}

#[test]
fn the_mouse_describes_itself_and_reports() {
    let events = Events::default();
    let host = Mouse::new("input", events.clone());
    let mut rig = Rig::new(&events, host.vsp());
    let mut guest = GuestMouse::new();
    let at = |x, y| MouseInput {
        x: Some(x),
        y: Some(y),
        ..MouseInput::default()
    };
    assert!(matches!(host.input(&at(1, 2)), Err(InputError::NotReady)));
    rig.send(guest.start().as_bytes());
    let response = rig.receive();
    assert_eq!(guest.on_packet(&response), Ok(MouseStep::Wait));
    let info = rig.receive();
    match guest.on_packet(&info) {
        Ok(MouseStep::Device(info)) => {
            assert_eq!((info.vendor, info.product), (VENDOR, PRODUCT));
            assert_eq!(info.report_descriptor, REPORT_DESCRIPTOR);
        }
        other => panic!("{other:?}"),
    }
    rig.send(GuestMouse::ack().as_bytes());
    let ready =
        |event: &Event| matches!(event, Event::Negotiated { version, .. } if version == "2.0");
    assert!(rig.events.find(SOON, ready).is_some());

    let mut report = |input: &MouseInput| {
        host.input(input).unwrap();
        let message = rig.receive();
        match guest.on_packet(&message) {
            Ok(MouseStep::Report(bytes)) => MouseReport::read_from_bytes(bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let moved = report(&at(0x7fff, 0x1234));
    assert_eq!(
        (moved.x.get(), moved.y.get(), moved.buttons),
        (0x7fff, 0x1234, 0)
    );
    let pressed = report(&MouseInput {
        buttons: Some(vec![Button::Left, Button::Extra]),
        ..MouseInput::default()
    });
    assert_eq!((pressed.x.get(), pressed.buttons), (0x7fff, 0x11));
    let turned = report(&MouseInput {
        wheel: -127,
        pan: 3,
        ..MouseInput::default()
    });
    assert_eq!((turned.wheel, turned.pan, turned.buttons), (-127, 3, 0x11));
    assert_eq!(report(&MouseInput::default()).wheel, 0);

    assert!(matches!(
        host.input(&at(0x8000, 0)),
        Err(InputError::Impossible(_))
    ));
    assert_eq!(report(&MouseInput::default()).x.get(), 0x7fff);
    assert_eq!(host.status().reports, 5);
}

#[test]
fn a_ring_that_is_not_emptied_is_an_error_not_a_hang() {
    let events = Events::default();
    let host = Mouse::new("input", events.clone());
    let mut rig = Rig::new(&events, host.vsp());
    let mut guest = GuestMouse::new();
    rig.send(guest.start().as_bytes());
    rig.receive();
    rig.receive();
    rig.send(GuestMouse::ack().as_bytes());
    let ready = |event: &Event| matches!(event, Event::Negotiated { .. });
    assert!(rig.events.find(SOON, ready).is_some());
    let started = Instant::now();
    let full = (0..100_000).find_map(|_| host.input(&MouseInput::default()).err());
    assert!(matches!(
        full,
        Some(InputError::Port(PortError::Channel(_)))
    ));
    assert!(started.elapsed() < SOON);
}
