// SPDX-License-Identifier: MIT OR Apache-2.0

//! The keyboard: keystrokes to the guest, indicator lights from it.

use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use hv_proto::input::keyboard::{HostKeyboard, HostStep, KeyFlags, Keystroke, Leds, VERSION};
use hv_proto::input::typing::{LEFT_SHIFT, us_key};
use serde::Serialize;
use zerocopy::IntoBytes;

use super::keys::Key;
use crate::events::{Event, Events};
use crate::vmbus::Vsp;
use crate::vsp::port::{Handler, Port, PortError, SingleChannel, lock};

/// The pause between two characters: guests drop what comes faster than they read, and nobody types
/// faster.
const PACE: Duration = Duration::from_millis(2);

/// Most characters of a text: what is typed in about a minute.
pub const MAX_TEXT: usize = 16 << 10;

/// How long a text may take. A guest that takes each keystroke late must not hold up the operator.
const TEXT_TIMEOUT: Duration = Duration::from_secs(60);

/// Why the operator's input does not reach the guest.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// No driver, or it does not take more.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The handshake is not finished.
    #[error("the guest's driver has not agreed on a version")]
    NotReady,
    /// Another caller is at it.
    #[error("another text is being typed")]
    Busy,
    /// The guest takes too long; so many characters of the text are typed.
    #[error("the guest reads too slowly: only {0} characters of the text are typed")]
    Slow(usize),
    /// It cannot be typed.
    #[error("{0}")]
    Impossible(String),
}

/// What is done with keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyAction {
    /// All go down in their order, then up in the reverse order.
    #[default]
    Press,
    /// They go down and stay.
    Down,
    /// They go up.
    Up,
}

/// The keyboard, for display.
#[derive(Debug, Clone, Serialize)]
pub struct KeyboardStatus {
    /// Version of the protocol that the guest's driver speaks; nothing before the handshake.
    pub version: Option<String>,
    /// Keystrokes that were sent.
    pub keystrokes: u64,
    /// Messages of the guest that make no sense.
    pub rejected: u64,
    /// The indicator lights that the guest has switched on; nothing as long as it has not said.
    pub leds: Option<LedStatus>,
}

/// Indicator lights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "they are called so on every keyboard")]
pub struct LedStatus {
    pub scroll_lock: bool,
    pub num_lock: bool,
    pub caps_lock: bool,
}

impl From<Leds> for LedStatus {
    fn from(leds: Leds) -> Self {
        Self {
            scroll_lock: leds.contains(Leds::SCROLL_LOCK),
            num_lock: leds.contains(Leds::NUM_LOCK),
            caps_lock: leds.contains(Leds::CAPS_LOCK),
        }
    }
}

#[derive(Default)]
struct State {
    session: HostKeyboard,
    keystrokes: u64,
    rejected: u64,
    leds: Option<Leds>,
}

struct Inner {
    name: String,
    events: Events,
    port: Port,
    state: Mutex<State>,
    /// Held while keys are sent, so that two texts do not mix.
    typing: Mutex<()>,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Does not wait for its turn: a text can take long, and callers are few.
    fn begin(&self) -> Result<MutexGuard<'_, ()>, InputError> {
        match self.typing.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(InputError::Busy),
        }
    }

    fn send(&self, keystroke: Keystroke) -> Result<(), InputError> {
        if !self.state().session.is_ready() {
            return Err(if self.port.is_open() {
                InputError::NotReady
            } else {
                PortError::Closed.into()
            });
        }
        self.port.send_waiting(&[keystroke.as_bytes()])?;
        self.state().keystrokes += 1;
        Ok(())
    }
}

impl Handler for Inner {
    fn port(&self) -> &Port {
        &self.port
    }

    fn opened(&self) {
        let mut state = self.state();
        state.session = HostKeyboard::new();
        state.leds = None;
    }

    fn message(&self, payload: &[u8]) {
        let mut state = self.state();
        match state.session.on_packet(payload) {
            Ok(HostStep::Respond(response)) => {
                let ready = state.session.is_ready();
                drop(state);
                if let Err(error) = self.port.send(&[response.as_bytes()]) {
                    self.port.lost(&self.name, &error);
                } else if ready {
                    self.events.publish(Event::Negotiated {
                        device: self.name.clone(),
                        version: version(VERSION),
                    });
                }
            }
            Ok(HostStep::Leds(leds)) => {
                let before = state.leds.replace(leds);
                drop(state);
                if before != Some(leds) {
                    let LedStatus {
                        scroll_lock,
                        num_lock,
                        caps_lock,
                    } = leds.into();
                    self.events.publish(Event::Leds {
                        device: self.name.clone(),
                        scroll_lock,
                        num_lock,
                        caps_lock,
                    });
                }
            }
            Err(error) => {
                tracing::debug!(device = self.name, %error, "a message is rejected");
                state.rejected += 1;
            }
        }
    }

    fn closed(&self) {
        self.opened();
    }
}

/// A version as it is on the wire of the input devices.
pub(super) fn version(number: u32) -> String {
    format!("{}.{}", number >> 16, number & 0xffff)
}

/// A synthetic keyboard.
pub struct Keyboard(Arc<Inner>);

impl Keyboard {
    /// A keyboard.
    pub fn new(name: &str, events: Events) -> Self {
        Self(Arc::new(Inner {
            name: name.to_owned(),
            events,
            port: Port::default(),
            state: Mutex::default(),
            typing: Mutex::default(),
        }))
    }

    pub(crate) fn vsp(&self) -> Box<dyn Vsp> {
        Box::new(SingleChannel::new(&self.0.name, self.0.clone()))
    }

    /// For conformance tests.
    pub fn port(&self) -> &Port {
        &self.0.port
    }

    #[cfg(test)]
    pub(super) fn typing(&self) -> MutexGuard<'_, ()> {
        lock(&self.0.typing)
    }

    /// Types a text on a US keyboard, at most [`MAX_TEXT`] characters. What has no key there is
    /// sent as UNICODE keystrokes, which some drivers ignore. Returns when all is sent.
    ///
    /// # Errors
    /// Another text is being typed, the guest has no driver, or it does not take the keystrokes
    /// within a minute; a part may be typed then.
    pub fn type_text(&self, text: &str) -> Result<(), InputError> {
        self.type_until(text, Instant::now() + TEXT_TIMEOUT)
    }

    pub(super) fn type_until(&self, text: &str, deadline: Instant) -> Result<(), InputError> {
        let length = text.chars().count();
        if length > MAX_TEXT {
            return Err(InputError::Impossible(format!(
                "a text of {length} characters: at most {MAX_TEXT} are possible"
            )));
        }
        let _typing = self.0.begin()?;
        for (typed, character) in text.chars().enumerate() {
            if Instant::now() >= deadline {
                return Err(InputError::Slow(typed));
            }
            self.type_character(character)?;
            std::thread::sleep(PACE);
        }
        Ok(())
    }

    fn type_character(&self, character: char) -> Result<(), InputError> {
        let Some(key) = us_key(character) else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                self.0.send(Keystroke::new(*unit, KeyFlags::UNICODE))?;
                let up = KeyFlags::UNICODE | KeyFlags::BREAK;
                self.0.send(Keystroke::new(*unit, up))?;
            }
            return Ok(());
        };
        let caps_lock = self.0.state().leds.unwrap_or_default();
        let caps_lock = caps_lock.contains(Leds::CAPS_LOCK) && character.is_ascii_alphabetic();
        let shift = key.shift != caps_lock;
        let stroke = |code: u8, flags| self.0.send(Keystroke::new(code.into(), flags));
        if shift {
            stroke(LEFT_SHIFT, KeyFlags::empty())?;
        }
        stroke(key.code, KeyFlags::empty())?;
        stroke(key.code, KeyFlags::BREAK)?;
        if shift {
            stroke(LEFT_SHIFT, KeyFlags::BREAK)?;
        }
        Ok(())
    }

    /// Uses keys.
    ///
    /// # Errors
    /// As [`Keyboard::type_text`].
    pub fn key(&self, keys: &[Key], action: KeyAction) -> Result<(), InputError> {
        let _typing = self.0.begin()?;
        let send = |keys: &mut dyn Iterator<Item = &Key>, down| {
            keys.flat_map(|key| key.strokes(down))
                .try_for_each(|stroke| self.0.send(stroke))
        };
        if action != KeyAction::Up {
            send(&mut keys.iter(), true)?;
        }
        if action != KeyAction::Down {
            send(&mut keys.iter().rev(), false)?;
        }
        Ok(())
    }

    /// How it stands.
    pub fn status(&self) -> KeyboardStatus {
        let state = self.0.state();
        KeyboardStatus {
            version: state.session.is_ready().then(|| version(VERSION)),
            keystrokes: state.keystrokes,
            rejected: state.rejected,
            leds: state.leds.map(LedStatus::from),
        }
    }
}
