// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Shutdown: the host asks the guest to power off, to reboot or to hibernate.
//!
//! The guest says whether it will before it begins: after that it might not be able to.

use super::guest::read_body;
use super::{Malformed, MessageType, Reply, Service, Status, Version};
use core::fmt;
use zerocopy::little_endian::{U16, U32};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Versions of the service, the best first.
pub const VERSIONS: &[Version] = &[
    Version::new(3, 2),
    Version::new(3, 1),
    Version::new(3, 0),
    Version::new(1, 0),
];

/// Room for the text of a request, in UTF-16 code units.
pub const MESSAGE_UNITS: usize = 1024;

/// What the host asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Power off.
    PowerOff,
    /// Reboot.
    Reboot,
    /// Save memory to disk and power off.
    Hibernate,
}

impl Action {
    /// The number of the request, without the flag of force.
    const fn raw(self) -> u32 {
        match self {
            Self::PowerOff => 0,
            Self::Reboot => 2,
            Self::Hibernate => 4,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "power off",
            Self::Reboot => "reboot",
            Self::Hibernate => "hibernate",
        })
    }
}

/// Flag of a request: also if programs object.
const FORCE: u32 = 1;

/// Body of a request, 2060 bytes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Body {
    /// Why, a number of Windows (`SHTDN_REASON_…`).
    pub reason: U32,
    /// How long programs may take, in seconds.
    pub timeout_seconds: U32,
    /// What to do, see [`Body::action`].
    pub flags: U32,
    /// A text for the user, ended by zero.
    pub message: [U16; MESSAGE_UNITS],
}

const _: () = assert!(size_of::<Body>() == 2060);

impl Body {
    /// A request. As much of `message` is taken as there is room for.
    pub fn new(action: Action, force: bool, timeout_seconds: u32, message: &str) -> Self {
        let mut units = [U16::ZERO; MESSAGE_UNITS];
        // One is left for the zero at the end.
        let room = units.iter_mut().take(MESSAGE_UNITS - 1);
        for (to, from) in room.zip(message.encode_utf16()) {
            *to = from.into();
        }
        Self {
            reason: U32::ZERO,
            timeout_seconds: timeout_seconds.into(),
            flags: (action.raw() | if force { FORCE } else { 0 }).into(),
            message: units,
        }
    }

    /// What to do, and whether by force. `None` if it is none of what is known.
    pub fn action(&self) -> Option<(Action, bool)> {
        action(self.flags.get())
    }
}

fn action(flags: u32) -> Option<(Action, bool)> {
    let action = match flags & !FORCE {
        0 => Action::PowerOff,
        2 => Action::Reboot,
        4 => Action::Hibernate,
        _ => return None,
    };
    Some((action, flags & FORCE != 0))
}

/// What a request asks of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The guest has agreed to do this, as soon as the answer is sent.
    Do {
        /// What to do.
        action: Action,
        /// Also if programs object.
        force: bool,
    },
    /// The guest has refused to hibernate: it cannot.
    CannotHibernate,
    /// The guest has refused: it does not know what these flags mean.
    Unknown {
        /// The flags.
        flags: u32,
    },
}

/// The guest's service.
#[derive(Clone, Copy, Debug)]
pub struct Shutdown {
    can_hibernate: bool,
}

impl Shutdown {
    /// The service of a guest that can or cannot hibernate.
    pub const fn new(can_hibernate: bool) -> Self {
        Self { can_hibernate }
    }
}

impl Service for Shutdown {
    const MESSAGE_TYPE: MessageType = MessageType::SHUTDOWN;
    const VERSIONS: &'static [Version] = VERSIONS;
    type Event = Request;

    fn on_request(
        &mut self,
        _version: Version,
        body: &[u8],
        reply: &mut Reply,
    ) -> Result<Request, Malformed> {
        if body.len() < size_of::<Body>() {
            return Err(Malformed::TooShort {
                needed: size_of::<Body>(),
                len: body.len(),
            });
        }
        // The text would be much on a small stack.
        let [_reason, _timeout, flags]: [U32; 3] = read_body(body)?;
        let request = match action(flags.get()) {
            Some((Action::Hibernate, _)) if !self.can_hibernate => Request::CannotHibernate,
            Some((action, force)) => Request::Do { action, force },
            None => Request::Unknown { flags: flags.get() },
        };
        if !matches!(request, Request::Do { .. }) {
            reply.set_header(|header| header.status = Status::FAIL);
        }
        Ok(request)
    }
}
