// SPDX-License-Identifier: GPL-2.0

//! The keyboard: scan codes for the kernel's driver of PC keyboards, so that its key maps, its
//! console switching and its magic keys all work.
//!
//! That driver asks a keyboard who it is and sets its lights. The answers are made here
//! ([`Ps2Keyboard`]); the host hears of the lights.
//!
//! # Characters
//!
//! A host can send characters in place of keys, for text that its user pastes. Linux has no input
//! event for a character, so they are typed: what a US keyboard has a key for with that key, as
//! other hypervisors paste text, so that it arrives in consoles and in windows; all else with Alt
//! and the number on the keypad, which the text console understands whatever its key map is.

use crate::{
    link::{
        Link,
        PARAMS,
        REQUEST_ID, //
    },
    serio,
    wakeup::{
        self,
        Wakeup, //
    }, //
};
use hv_proto::{
    input::{
        keyboard::{
            GuestError,
            GuestKeyboard,
            GuestStep,
            Key,
            LedIndicators, //
        },
        ps2::Ps2Keyboard,
        typing::{
            Strokes,
            Utf16, //
        },
    },
    packet::Packet, //
};
use kernel::{
    device::{
        self,
        Core, //
    },
    fmt,
    new_spinlock_irq,
    prelude::*,
    str::CString,
    sync::{
        Arc,
        SpinLockIrq, //
    }, //
};
use vmbus::{
    Channel,
    Device,
    Handler,
    OpenChannel, //
};
use zerocopy::IntoBytes;

/// The driver's side of a keyboard.
#[pin_data]
pub(crate) struct Keyboard {
    #[pin]
    link: Link<()>,
    channel: Arc<Channel>,
    #[pin]
    protocol: SpinLockIrq<GuestKeyboard>,
    #[pin]
    ps2: SpinLockIrq<Ps2Keyboard>,
    #[pin]
    characters: SpinLockIrq<Utf16>,
    #[pin]
    line: serio::Line,
}

impl Keyboard {
    fn key(&self, key: Key) {
        self.link.received.count();
        let down = match key {
            Key::Scan { codes, down } => {
                // The lock is held until they are sent, so that no answer gets between.
                let mut ps2 = self.ps2.lock();
                self.line.receive(ps2.scan(codes.as_bytes()));
                down
            }
            Key::Unicode { unit, down } => {
                if down {
                    self.character(unit);
                }
                down
            }
        };
        // The key that sends the machine to sleep goes up after that.
        if down {
            wakeup::wake(self.link.device());
        }
    }

    fn character(&self, unit: u16) {
        let character = self.characters.lock().push(unit);
        if let Some(character) = character {
            let mut ps2 = self.ps2.lock();
            let strokes = Strokes::of(character, ps2.leds());
            self.line.receive(ps2.scan(strokes.as_bytes()));
        }
    }

    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.link.show(f)?;
        writeln!(f, "leds {}", self.ps2.lock().leds().bits())
    }
}

impl Handler for Keyboard {
    fn on_packet(&self, _channel: &Channel, packet: &Packet<'_>) {
        if !self.link.is_message(packet) {
            return;
        }
        let step = self.protocol.lock().on_packet(packet.payload());
        match step {
            Ok(GuestStep::Ready) => self.link.finish(Ok(())),
            Ok(GuestStep::Key(key)) => self.key(key),
            Err(error) => {
                self.link.reject(error);
                if error == GuestError::Refused {
                    self.link.finish(Err(EPROTO));
                }
            }
        }
    }

    fn on_rescind(&self, _channel: &Channel) {
        self.link.rescinded();
    }

    fn on_error(&self, _channel: &Channel) {
        self.link.damaged();
    }
}

#[vtable]
impl serio::Port for Keyboard {
    fn line(&self) -> &serio::Line {
        &self.line
    }

    fn write(&self, byte: u8) {
        let leds = {
            // As for keys.
            let mut ps2 = self.ps2.lock();
            let answer = ps2.write(byte);
            self.line.receive(answer.as_bytes());
            answer.leds
        };
        if let Some(leds) = leds {
            // A host that does not hear of it shows the wrong lights; nothing else is lost. It hears of
            // it when the command is answered: before that, the keys of a user who has seen the light
            // would be taken for the answer.
            let _ = self
                .channel
                .send(LedIndicators::new(leds).as_bytes(), 0, false);
        }
    }
}

/// A keyboard that a driver is bound to. Dropping it removes the port and closes the channel.
pub(crate) struct Binding {
    port: Option<serio::Registration<Keyboard>>,
    keyboard: Arc<Keyboard>,
    _open: OpenChannel,
    _wakeup: Wakeup,
}

impl Binding {
    /// Opens the channel, shakes hands and makes the port. Sleeps, but not for long.
    pub(crate) fn new(dev: &Device<Core<'_>>) -> Result<Self> {
        let bound: &device::Device<Core<'_>> = dev.as_ref();
        let bound: &device::Device<device::Bound> = bound;
        let normal: &device::Device = bound;
        let channel = dev.channel();
        let keyboard = Arc::pin_init(
            pin_init!(Keyboard {
                link <- Link::new(normal.into()),
                channel: channel.clone(),
                protocol <- new_spinlock_irq!(GuestKeyboard::new()),
                ps2 <- new_spinlock_irq!(Ps2Keyboard::new()),
                characters <- new_spinlock_irq!(Utf16::default()),
                line <- serio::Line::new(),
            }),
            GFP_KERNEL,
        )?;
        let mut this = Self {
            port: None,
            keyboard: keyboard.clone(),
            _open: channel.open(&PARAMS, keyboard.clone())?,
            _wakeup: Wakeup::new(bound)?,
        };
        let request = keyboard.protocol.lock().start();
        channel.send(request.as_bytes(), REQUEST_ID, true)?;
        keyboard.link.wait()?;
        let name = CString::try_from_fmt(fmt!("{}", normal.name()))?;
        this.port = Some(serio::Registration::keyboard(bound, &name, keyboard)?);
        Ok(this)
    }

    pub(crate) fn keyboard(&self) -> &Arc<Keyboard> {
        &self.keyboard
    }
}
