// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tests of mouse and keyboard: layouts, guest against host, odd peers.

use super::hid::{
    repair, Attributes, DeviceInfo, DeviceInfoStart, GuestError, GuestMouse, GuestStep,
    HidDescriptor, HostMouse, HostStep, MessageHeader, MessageType, MouseReport,
    MAX_REPORT_DESCRIPTOR, PRODUCT, REPORT_DESCRIPTOR, VENDOR,
};
use super::keyboard::{
    self, GuestKeyboard, HostKeyboard, Key, KeyFlags, Keystroke, LedIndicators, Leds,
    ProtocolResponse,
};
use super::ps2::Ps2Keyboard;
use super::typing::{us_key, Strokes, UsKey, Utf16};
use proptest::prelude::*;
use std::{string::String, vec, vec::Vec};
use zerocopy::IntoBytes as _;

/// A packet as the ring hands it over: rounded up to 8 bytes.
fn padded(parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = parts.concat();
    bytes.resize(bytes.len().next_multiple_of(8), 0xee);
    bytes
}

fn device_info() -> Vec<u8> {
    let start = DeviceInfoStart::mouse(REPORT_DESCRIPTOR.len()).unwrap();
    padded(&[start.as_bytes(), &REPORT_DESCRIPTOR])
}

/// A mouse with which everything went well.
fn ready_mouse() -> (GuestMouse, HostMouse) {
    let (mut guest, mut host) = (GuestMouse::new(), HostMouse::new());
    let request = guest.start();
    let Ok(HostStep::Approve(response)) = host.on_packet(&padded(&[request.as_bytes()])) else {
        panic!("not approved");
    };
    let response = padded(&[response.as_bytes()]);
    assert_eq!(guest.on_packet(&response), Ok(GuestStep::Wait));
    let info = device_info();
    let expected = DeviceInfo {
        vendor: VENDOR,
        product: PRODUCT,
        version: 1,
        report_descriptor: &REPORT_DESCRIPTOR,
    };
    assert_eq!(guest.on_packet(&info), Ok(GuestStep::Device(expected)));
    assert!(!host.is_ready());
    let ack = padded(&[GuestMouse::ack().as_bytes()]);
    assert_eq!(host.on_packet(&ack), Ok(HostStep::Ready));
    assert!(host.is_ready());
    (guest, host)
}

/// A mouse whose version was accepted.
fn approved_mouse() -> GuestMouse {
    let (mut guest, mut host) = (GuestMouse::new(), HostMouse::new());
    let request = guest.start();
    let Ok(HostStep::Approve(response)) = host.on_packet(request.as_bytes()) else {
        panic!("not approved");
    };
    guest.on_packet(response.as_bytes()).unwrap();
    guest
}

#[test]
fn mouse_messages_are_laid_out_as_in_c() {
    let request = GuestMouse::new().start();
    let expected = [1, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0];
    assert_eq!(request.as_bytes(), expected);
    let expected = [1, 0, 0, 0, 9, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0];
    assert_eq!(GuestMouse::ack().as_bytes(), expected);
    let info = device_info();
    assert_eq!(info[4..8], (8u32 + 32 + 9 + 68).to_le_bytes());
    assert_eq!(info[20..24], [0x5e, 0x04, 0x21, 0x06]);
    assert_eq!(info[48..57], [9, 0x21, 1, 1, 0, 1, 0x22, 68, 0]);
}

#[test]
fn mouse_reports_arrive_as_they_were_sent() {
    let (mut guest, _) = ready_mouse();
    let report = MouseReport {
        buttons: 5,
        x: 0x1234.into(),
        y: 0x7fff.into(),
        wheel: -1,
        pan: 1,
    };
    let header = MessageHeader::report(report.as_bytes().len()).unwrap();
    let packet = padded(&[header.as_bytes(), report.as_bytes()]);
    let step = guest.on_packet(&packet);
    assert_eq!(step, Ok(GuestStep::Report(report.as_bytes())));
    assert_eq!(report.as_bytes(), [5, 0x34, 0x12, 0xff, 0x7f, 0xff, 1]);
}

#[test]
fn mouse_is_refused() {
    let (mut guest, mut host) = (GuestMouse::new(), HostMouse::new());
    let mut request = guest.start();
    request.version = 0x0001_0000.into();
    let Ok(HostStep::Refuse(response)) = host.on_packet(request.as_bytes()) else {
        panic!("not refused");
    };
    let error = guest.on_packet(response.as_bytes()).unwrap_err();
    assert_eq!(error, GuestError::Refused);
    assert!(error.is_fatal());
    // Another try may follow.
    assert!(matches!(
        host.on_packet(guest.start().as_bytes()),
        Ok(HostStep::Approve(_))
    ));
}

#[test]
fn mouse_messages_in_wrong_order_change_nothing() {
    let unexpected = |message_type| Err(GuestError::Unexpected(message_type));
    let info = device_info();
    let report = padded(&[MessageHeader::report(7).unwrap().as_bytes(), &[0; 7]]);
    let mut host = HostMouse::new();
    let Ok(HostStep::Approve(response)) = host.on_packet(GuestMouse::new().start().as_bytes())
    else {
        panic!("not approved");
    };
    let response = response.as_bytes();

    let mut guest = GuestMouse::new();
    assert_eq!(
        guest.on_packet(response),
        unexpected(MessageType::PROTOCOL_RESPONSE)
    );
    guest.start();
    assert_eq!(guest.on_packet(&info), unexpected(MessageType::DEVICE_INFO));
    assert_eq!(
        guest.on_packet(&report),
        unexpected(MessageType::INPUT_REPORT)
    );
    assert_eq!(guest.on_packet(response), Ok(GuestStep::Wait));
    // A second response does not stand for the device.
    assert_eq!(
        guest.on_packet(response),
        unexpected(MessageType::PROTOCOL_RESPONSE)
    );
    assert_eq!(
        guest.on_packet(&report),
        unexpected(MessageType::INPUT_REPORT)
    );
    assert!(guest.on_packet(&info).is_ok());
    assert_eq!(guest.on_packet(&info), unexpected(MessageType::DEVICE_INFO));
    assert!(guest.on_packet(&report).is_ok());

    let (_, mut host) = ready_mouse();
    let ack = padded(&[GuestMouse::ack().as_bytes()]);
    assert!(host.on_packet(&ack).is_err());
    assert!(host.on_packet(&[0; 15]).is_err());
    assert!(host.is_ready());
}

#[test]
fn lengths_of_descriptors_are_checked_against_the_message() {
    // Offsets in the packet: length of the HID descriptor, length of the report descriptor.
    let (hid, report) = (48, 55);
    let check = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut info = device_info();
        change(&mut info);
        approved_mouse().on_packet(&info).map(|_| ()).unwrap_err()
    };
    for length in [0, 8, 200, 255] {
        let error = check(&|info| info[hid] = length);
        let length = length.into();
        assert_eq!(error, GuestError::HidDescriptor { length });
        assert!(error.is_fatal());
    }
    for length in [0u16, 69, 4097, 0xffff] {
        let error = check(&|info| info[report..report + 2].copy_from_slice(&length.to_le_bytes()));
        let length = length.into();
        assert_eq!(error, GuestError::ReportDescriptor { length });
        assert!(error.is_fatal());
    }
    // The frame is longer than the packet; the packet is cut off.
    let error = check(&|info| info[4] += 8);
    assert_eq!(error, GuestError::NotAMessage);
    let error = check(&|info| info.truncate(120));
    assert_eq!(error, GuestError::NotAMessage);
    let error = check(&|info| info[4..8].copy_from_slice(&u32::MAX.to_le_bytes()));
    assert_eq!(error, GuestError::NotAMessage);
    // The frame ends within the attributes.
    let error = check(&|info| info[4..8].copy_from_slice(&20u32.to_le_bytes()));
    let attributes = size_of::<Attributes>();
    let short = GuestError::TooShort {
        needed: attributes,
        len: 12,
    };
    assert_eq!(error, short);
    assert!(!error.is_fatal());
    // A longer HID descriptor is skipped.
    let start = DeviceInfoStart::mouse(4).unwrap();
    let mut info = [start.as_bytes(), &[0x22, 1, 0], &[1, 2, 3, 4]].concat();
    info[4] += 3;
    info[hid] = 9 + 3;
    match approved_mouse().on_packet(&info) {
        Ok(GuestStep::Device(info)) => assert_eq!(info.report_descriptor, [1, 2, 3, 4]),
        other => panic!("{other:?}"),
    }
    assert_eq!(size_of::<HidDescriptor>(), 9);
    assert_eq!(DeviceInfoStart::mouse(MAX_REPORT_DESCRIPTOR + 1), None);
}

#[test]
fn reports_are_not_longer_than_their_packet() {
    let (mut guest, _) = ready_mouse();
    let mut packet = padded(&[MessageHeader::report(7).unwrap().as_bytes(), &[1; 7]]);
    packet[12..16].copy_from_slice(&8u32.to_le_bytes());
    assert_eq!(guest.on_packet(&packet), Err(GuestError::NotAMessage));
    packet[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(guest.on_packet(&packet), Err(GuestError::NotAMessage));
    packet[12..16].copy_from_slice(&0u32.to_le_bytes());
    assert_eq!(guest.on_packet(&packet), Ok(GuestStep::Report(&[])));
}

#[test]
fn odd_report_descriptor_is_repaired() {
    let mut descriptor = REPORT_DESCRIPTOR;
    assert_eq!(descriptor[14], 0x29);
    descriptor[14] = 0x25;
    repair(&mut descriptor);
    assert_eq!(descriptor, REPORT_DESCRIPTOR);
    repair(&mut descriptor);
    assert_eq!(descriptor, REPORT_DESCRIPTOR);
    repair(&mut descriptor[..14]);
    repair(&mut []);
}

fn ready_keyboard() -> (GuestKeyboard, HostKeyboard) {
    let (mut guest, mut host) = (GuestKeyboard::new(), HostKeyboard::new());
    let request = guest.start();
    assert_eq!(request.as_bytes(), [1, 0, 0, 0, 0, 0, 1, 0]);
    let response = match host.on_packet(request.as_bytes()) {
        Ok(keyboard::HostStep::Respond(response)) => response,
        other => panic!("{other:?}"),
    };
    assert_eq!(response, ProtocolResponse::new(true));
    let step = guest.on_packet(&padded(&[response.as_bytes()]));
    assert_eq!(step, Ok(keyboard::GuestStep::Ready));
    assert!(host.is_ready());
    (guest, host)
}

#[test]
fn keystrokes_become_scan_codes() {
    let (mut guest, _) = ready_keyboard();
    let mut codes = |make_code: u16, flags: KeyFlags| {
        let stroke = Keystroke::new(make_code, flags);
        match guest.on_packet(&padded(&[stroke.as_bytes()])) {
            Ok(keyboard::GuestStep::Key(Key::Scan { codes, down })) => {
                (codes.as_bytes().to_vec(), down)
            }
            other => panic!("{other:?}"),
        }
    };
    let (e0, e1, up) = (KeyFlags::E0, KeyFlags::E1, KeyFlags::BREAK);
    assert_eq!(codes(0x1e, KeyFlags::empty()), (vec![0x1e], true));
    assert_eq!(codes(0x1e, up), (vec![0x9e], false));
    assert_eq!(codes(0xf1, KeyFlags::empty()), (vec![0xf1], true));
    assert_eq!(codes(0xf2, KeyFlags::empty()), (vec![0xf2], true));
    assert_eq!(codes(0x48, e0), (vec![0xe0, 0x48], true));
    assert_eq!(codes(0x48, e0 | up), (vec![0xe0, 0xc8], false));
    assert_eq!(codes(0x1d, e1), (vec![0xe1, 0x1d], true));
    assert_eq!(codes(0x1d, e1 | up), (vec![0xe1, 0x9d], false));
    assert_eq!(codes(0x1d, e0 | e1), (vec![0xe0, 0xe1, 0x1d], true));
}

#[test]
fn odd_keyboard_messages_are_refused() {
    let error = GuestKeyboard::new().on_packet(Keystroke::new(1, KeyFlags::empty()).as_bytes());
    let unexpected = keyboard::GuestError::Unexpected(keyboard::MessageType::EVENT);
    assert_eq!(error, Err(unexpected));
    let mut guest = GuestKeyboard::new();
    guest.start();
    let refused = guest.on_packet(ProtocolResponse::new(false).as_bytes());
    assert_eq!(refused, Err(keyboard::GuestError::Refused));
    // Too late after that.
    assert!(guest
        .on_packet(ProtocolResponse::new(true).as_bytes())
        .is_err());

    let (mut guest, mut host) = ready_keyboard();
    // Keys, not answers: ACK, NAK, and that of the self test.
    for code in [0x80, 0xaa, 0xee, 0xf0, 0xf3, 0xfa, 0xfe, 0xff] {
        for flags in [KeyFlags::empty(), KeyFlags::BREAK, KeyFlags::E0] {
            let stroke = Keystroke::new(code, flags);
            assert_eq!(stroke.key(), Err(keyboard::GuestError::MakeCode(code)));
        }
    }
    let stroke = Keystroke::new(0x100, KeyFlags::empty());
    let error = Err(keyboard::GuestError::MakeCode(0x100));
    assert_eq!(guest.on_packet(stroke.as_bytes()), error);
    for len in 0..12 {
        assert!(guest.on_packet(&stroke.as_bytes()[..len]).is_err());
    }
    assert!(guest
        .on_packet(ProtocolResponse::new(true).as_bytes())
        .is_err());
    assert!(host.on_packet(guest.start().as_bytes()).is_err());
    assert!(host.on_packet(&[4, 0, 0, 0]).is_err());
    let mut host = HostKeyboard::new();
    assert!(host
        .on_packet(LedIndicators::new(Leds::empty()).as_bytes())
        .is_err());
    let other = [1, 0, 0, 0, 0, 0, 2, 0];
    let refusal = keyboard::HostStep::Respond(ProtocolResponse::new(false));
    assert_eq!(host.on_packet(&other), Ok(refusal));
    assert!(!host.is_ready());
}

#[test]
fn host_hears_of_lights() {
    let (_, mut host) = ready_keyboard();
    let leds = Leds::CAPS_LOCK | Leds::SCROLL_LOCK;
    let message = LedIndicators::new(leds);
    assert_eq!(message.as_bytes(), [4, 0, 0, 0, 5, 0, 0, 0]);
    let step = host.on_packet(message.as_bytes());
    assert_eq!(step, Ok(keyboard::HostStep::Leds(leds)));
}

#[test]
fn ps2_keyboard_answers_as_linux_expects() {
    let mut keyboard = Ps2Keyboard::new();
    let write = |keyboard: &mut Ps2Keyboard, byte| {
        let answer = keyboard.write(byte);
        (answer.as_bytes().to_vec(), answer.leds)
    };
    // Identify, disable, lights off, fastest repetition, enable: what atkbd does first.
    assert_eq!(write(&mut keyboard, 0xf2), (vec![0xfa, 0xab, 0x41], None));
    assert_eq!(write(&mut keyboard, 0xf5), (vec![0xfa], None));
    assert!(!keyboard.is_scanning());
    assert_eq!(write(&mut keyboard, 0xed), (vec![0xfa], None));
    assert_eq!(write(&mut keyboard, 0), (vec![0xfa], Some(Leds::empty())));
    assert_eq!(write(&mut keyboard, 0xf3), (vec![0xfa], None));
    assert_eq!(write(&mut keyboard, 0), (vec![0xfa], None));
    assert_eq!(write(&mut keyboard, 0xf4), (vec![0xfa], None));
    assert!(keyboard.is_scanning());
    // Caps lock.
    write(&mut keyboard, 0xed);
    assert_eq!(write(&mut keyboard, 4), (vec![0xfa], Some(Leds::CAPS_LOCK)));
    assert_eq!(keyboard.leds(), Leds::CAPS_LOCK);
    // A command in place of the parameter.
    write(&mut keyboard, 0xed);
    assert_eq!(write(&mut keyboard, 0xf4), (vec![0xfa], None));
    assert_eq!(write(&mut keyboard, 2), (vec![0xfe], None));
    assert_eq!(write(&mut keyboard, 0xee), (vec![0xee], None));
    write(&mut keyboard, 0xf0);
    assert_eq!(write(&mut keyboard, 0), (vec![0xfa, 0x41], None));
    assert_eq!(
        write(&mut keyboard, 0xff),
        (vec![0xfa, 0xaa], Some(Leds::empty()))
    );
    assert_eq!(keyboard.leds(), Leds::empty());
}

#[test]
fn no_scan_code_comes_between_a_command_and_its_parameter() {
    let mut keyboard = Ps2Keyboard::new();
    assert_eq!(keyboard.scan(&[0x3a]), [0x3a]);
    keyboard.write(0xed);
    assert_eq!(keyboard.scan(&[0xba]), []);
    assert_eq!(keyboard.scan(&[0xe0, 0x48]), []);
    let answer = keyboard.write(4);
    assert_eq!(answer.as_bytes(), [0xfa, 0xba, 0xe0, 0x48]);
    assert_eq!(answer.leds, Some(Leds::CAPS_LOCK));
    // Once, and not later ones.
    assert_eq!(keyboard.scan(&[0xe0, 0xc8]), [0xe0, 0xc8]);
    assert_eq!(keyboard.write(0xee).as_bytes(), [0xee]);
    // A command in place of the parameter, with one of its own.
    keyboard.write(0xed);
    assert_eq!(keyboard.scan(&[0x1e]), []);
    assert_eq!(keyboard.write(0xf3).as_bytes(), [0xfa]);
    assert_eq!(keyboard.write(0).as_bytes(), [0xfa, 0x1e]);
    // A key is sent whole or not at all, however many there are.
    keyboard.write(0xed);
    for _ in 0..100 {
        assert_eq!(keyboard.scan(&[0xe0, 0x48, 0xe0]), []);
    }
    assert_eq!(keyboard.write(0).as_bytes().len(), 1 + 63);
    // A keyboard that is off sends nothing, then or later.
    keyboard.write(0xf5);
    assert_eq!(keyboard.scan(&[0x1e]), []);
    assert_eq!(keyboard.write(0xf4).as_bytes(), [0xfa]);
    // A reset forgets keys.
    keyboard.write(0xed);
    assert_eq!(keyboard.scan(&[0x1e]), []);
    assert_eq!(keyboard.write(0xff).as_bytes(), [0xfa, 0xaa]);
}

#[test]
fn text_is_typed() {
    let key = |code, shift| Some(UsKey { code, shift });
    assert_eq!(us_key('a'), key(0x1e, false));
    assert_eq!(us_key('A'), key(0x1e, true));
    assert_eq!(us_key('1'), key(0x02, false));
    assert_eq!(us_key('0'), key(0x0b, false));
    assert_eq!(us_key('~'), key(0x29, true));
    assert_eq!(us_key('\\'), key(0x2b, false));
    assert_eq!(us_key('?'), key(0x35, true));
    assert_eq!(us_key(' '), key(0x39, false));
    assert_eq!(us_key('\n'), key(0x1c, false));
    assert_eq!(us_key('\r'), key(0x1c, false));
    assert_eq!(us_key('\t'), key(0x0f, false));
    assert_eq!(us_key('\x08'), key(0x0e, false));
    assert_eq!(us_key('\x1b'), key(0x01, false));
    assert_eq!(us_key('ä'), None);
    for character in (0x20..0x7f).map(char::from) {
        assert!(us_key(character).is_some(), "{character:?}");
    }
    let strokes = |character, leds| Strokes::of(character, leds).as_bytes().to_vec();
    let (none, caps) = (Leds::empty(), Leds::CAPS_LOCK);
    assert_eq!(strokes('x', none), [0x2d, 0xad]);
    assert_eq!(strokes('X', none), [0x2a, 0x2d, 0xad, 0xaa]);
    assert_eq!(strokes('x', caps), [0x2a, 0x2d, 0xad, 0xaa]);
    assert_eq!(strokes('X', caps), [0x2d, 0xad]);
    assert_eq!(strokes('!', caps), [0x2a, 0x02, 0x82, 0xaa]);
    // 228, on the keypad.
    let umlaut = [0x38, 0x50, 0xd0, 0x50, 0xd0, 0x48, 0xc8, 0xb8];
    assert_eq!(strokes('ä', none), umlaut);
    assert_eq!(strokes('\0', none), [0x38, 0x52, 0xd2, 0xb8]);
    assert_eq!(strokes(char::MAX, none).len(), 16);
}

#[test]
fn characters_come_in_halves() {
    let mut utf16 = Utf16::default();
    assert_eq!(utf16.push(0x41), Some('A'));
    assert_eq!(utf16.push(0xd83d), None);
    assert_eq!(utf16.push(0xde00), Some('😀'));
    // Halves that are alone.
    assert_eq!(utf16.push(0xde00), None);
    assert_eq!(utf16.push(0xd83d), None);
    assert_eq!(utf16.push(0xd83d), None);
    assert_eq!(utf16.push(0x42), Some('B'));
    assert_eq!(utf16.push(0xde00), None);
}

proptest! {
    #[test]
    fn machines_survive_any_bytes(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..8)) {
        let (mut mouse, mut host_mouse) = ready_mouse();
        let (mut keyboard, mut host_keyboard) = ready_keyboard();
        let mut approved = approved_mouse();
        for packet in &packets {
            let _ = mouse.on_packet(packet);
            let _ = approved.on_packet(packet);
            let _ = host_mouse.on_packet(packet);
            let _ = keyboard.on_packet(packet);
            let _ = host_keyboard.on_packet(packet);
        }
    }

    #[test]
    fn damaged_device_info_is_never_read_beyond_its_end(at in 0usize..57, byte: u8, len in 0usize..130) {
        let mut info = device_info();
        info[at] = byte;
        info.truncate(len);
        if let Ok(GuestStep::Device(device)) = approved_mouse().on_packet(&info) {
            prop_assert!(!device.report_descriptor.is_empty());
            prop_assert!(device.report_descriptor.len() <= len - 57);
        }
    }

    #[test]
    fn ps2_keyboard_answers_every_byte(bytes in prop::collection::vec(any::<u8>(), 0..32)) {
        let mut keyboard = Ps2Keyboard::new();
        for byte in bytes {
            prop_assert!(!keyboard.write(byte).as_bytes().is_empty());
        }
    }

    #[test]
    fn utf16_gives_the_text_again(text: String) {
        let mut utf16 = Utf16::default();
        let again: String = text.encode_utf16().filter_map(|unit| utf16.push(unit)).collect();
        prop_assert_eq!(again, text);
    }

    #[test]
    fn strokes_go_down_and_up(character: char, leds in 0u16..8) {
        let strokes = Strokes::of(character, Leds::from_bits_truncate(leds));
        let bytes = strokes.as_bytes();
        for code in bytes.iter().filter(|code| *code & 0x80 == 0) {
            let count = |wanted: u8| bytes.iter().filter(|byte| **byte == wanted).count();
            prop_assert_eq!(count(*code), count(code | 0x80));
        }
    }
}
