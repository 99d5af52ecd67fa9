// SPDX-License-Identifier: MIT OR Apache-2.0

//! The mouse: a pointer with absolute positions, five buttons and two wheels.

use std::sync::{Arc, Mutex, MutexGuard};

use hv_proto::input::hid::{
    Buttons, DeviceInfoStart, HostMouse, HostStep, MAX_COORDINATE, MessageHeader, MouseReport,
    REPORT_DESCRIPTOR, VERSION,
};
use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::keyboard::{InputError, version};
use crate::events::{Event, Events};
use crate::vmbus::Vsp;
use crate::vsp::port::{Handler, Port, PortError, SingleChannel, lock};

/// What the operator does with the mouse. What is left out stays as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MouseInput {
    /// 0 (left) to 32767.
    pub x: Option<u16>,
    /// 0 (top) to 32767.
    pub y: Option<u16>,
    /// The buttons that are down now.
    pub buttons: Option<Vec<Button>>,
    /// Turns of the wheel away from the user, -127 to 127.
    pub wheel: i8,
    /// Turns of the wheel to the right.
    pub pan: i8,
}

/// A button.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "these are all of them")]
pub enum Button {
    Left,
    Right,
    Middle,
    Side,
    Extra,
}

impl Button {
    fn bit(self) -> Buttons {
        match self {
            Self::Left => Buttons::LEFT,
            Self::Right => Buttons::RIGHT,
            Self::Middle => Buttons::MIDDLE,
            Self::Side => Buttons::SIDE,
            Self::Extra => Buttons::EXTRA,
        }
    }
}

/// The mouse, for display.
#[derive(Debug, Clone, Serialize)]
pub struct MouseStatus {
    /// Version of the protocol that the guest's driver speaks; nothing before the handshake.
    pub version: Option<String>,
    /// Reports that were sent.
    pub reports: u64,
    /// Messages of the guest that make no sense.
    pub rejected: u64,
}

#[derive(Default)]
struct State {
    session: HostMouse,
    position: (u16, u16),
    buttons: Buttons,
    reports: u64,
    rejected: u64,
}

struct Inner {
    name: String,
    events: Events,
    port: Port,
    state: Mutex<State>,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn describe(&self) -> Result<(), PortError> {
        // The length of the descriptor is a constant that fits.
        let Some(info) = DeviceInfoStart::mouse(REPORT_DESCRIPTOR.len()) else {
            return Ok(());
        };
        self.port.send(&[info.as_bytes(), &REPORT_DESCRIPTOR])
    }
}

impl Handler for Inner {
    fn port(&self) -> &Port {
        &self.port
    }

    fn opened(&self) {
        let mut state = self.state();
        state.session = HostMouse::new();
        state.position = (0, 0);
        state.buttons = Buttons::empty();
    }

    fn message(&self, payload: &[u8]) {
        let mut state = self.state();
        let step = state.session.on_packet(payload);
        if step.is_err() {
            state.rejected += 1;
        }
        drop(state);
        let sent = match step {
            Ok(HostStep::Approve(response)) => self
                .port
                .send(&[response.as_bytes()])
                .and_then(|()| self.describe()),
            Ok(HostStep::Refuse(response)) => self.port.send(&[response.as_bytes()]),
            Ok(HostStep::Ready) => {
                self.events.publish(Event::Negotiated {
                    device: self.name.clone(),
                    version: version(VERSION),
                });
                Ok(())
            }
            Err(error) => {
                tracing::debug!(device = self.name, %error, "a message is rejected");
                Ok(())
            }
        };
        if let Err(error) = sent {
            self.port.lost(&self.name, &error);
        }
    }

    fn closed(&self) {
        self.opened();
    }
}

/// A synthetic mouse.
pub struct Mouse(Arc<Inner>);

impl Mouse {
    /// A mouse.
    pub fn new(name: &str, events: Events) -> Self {
        Self(Arc::new(Inner {
            name: name.to_owned(),
            events,
            port: Port::default(),
            state: Mutex::default(),
        }))
    }

    pub(crate) fn vsp(&self) -> Box<dyn Vsp> {
        Box::new(SingleChannel::new(&self.0.name, self.0.clone()))
    }

    /// For conformance tests.
    pub fn port(&self) -> &Port {
        &self.0.port
    }

    /// Sends one report of what the operator does.
    ///
    /// # Errors
    /// A value is out of range, or the guest has no driver or does not take it; then nothing has
    /// changed.
    pub fn input(&self, input: &MouseInput) -> Result<(), InputError> {
        let mut state = self.0.state();
        let x = input.x.unwrap_or(state.position.0);
        let y = input.y.unwrap_or(state.position.1);
        for (name, value) in [("x", x), ("y", y)] {
            if value > MAX_COORDINATE {
                return Err(InputError::Impossible(format!(
                    "{name}: {value} is more than {MAX_COORDINATE}"
                )));
            }
        }
        for (name, value) in [("wheel", input.wheel), ("pan", input.pan)] {
            if value == i8::MIN {
                return Err(InputError::Impossible(format!("{name}: -127 is the least")));
            }
        }
        if !state.session.is_ready() {
            return Err(if self.0.port.is_open() {
                InputError::NotReady
            } else {
                PortError::Closed.into()
            });
        }
        let buttons = match &input.buttons {
            Some(buttons) => buttons.iter().map(|button| button.bit()).collect(),
            None => state.buttons,
        };
        let report = MouseReport {
            buttons: buttons.bits(),
            x: x.into(),
            y: y.into(),
            wheel: input.wheel,
            pan: input.pan,
        };
        // The length is a constant that fits.
        if let Some(header) = MessageHeader::report(size_of::<MouseReport>()) {
            self.0.port.send(&[header.as_bytes(), report.as_bytes()])?;
            (state.position, state.buttons) = ((x, y), buttons);
            state.reports += 1;
        }
        Ok(())
    }

    /// How it stands.
    pub fn status(&self) -> MouseStatus {
        let state = self.0.state();
        MouseStatus {
            version: state.session.is_ready().then(|| version(VERSION)),
            reports: state.reports,
            rejected: state.rejected,
        }
    }
}
