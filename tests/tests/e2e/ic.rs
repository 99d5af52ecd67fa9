// SPDX-License-Identifier: MIT OR Apache-2.0

//! The host's end of an integration component, in the hands of a test: it sends what it likes, in any version.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use anyhow::{Context, Result, bail, ensure};
use host_harness::vsp::services::Service;
use hv_proto::ic::negotiation::{Question, parse_answer};
use hv_proto::ic::{
    Agreed, FRAME_VERSIONS, Flags, HEADER_SIZE, Header, MessageType, Status, Version,
};
use hv_proto::pipe::PipeHeader;
use viridian_tests::Guest;
use viridian_tests::guest::COMMAND;
use zerocopy::{FromBytes, IntoBytes};

/// A message of the guest.
pub struct Reply {
    pub header: Header,
    pub body: Vec<u8>,
}

/// The host's end of a device. While it is there, the device's provider sends nothing of its own accord.
pub struct Peer {
    service: Arc<Service>,
    replies: Receiver<Vec<u8>>,
    message_type: MessageType,
    version: Cell<Agreed>,
    transaction: Cell<u8>,
}

impl Peer {
    /// Takes over a device that has agreed on a version.
    pub fn new(guest: &Guest, device: &str, message_type: MessageType) -> Result<Self> {
        let service = guest.host().services().get(device).context("no device")?;
        service.port().set_quiet(true);
        let peer = Self {
            replies: service.port().tap(),
            service,
            message_type,
            version: Cell::new(Agreed {
                frame: Version::new(1, 0),
                message: Version::new(1, 0),
            }),
            // Away from those of the provider, which counts from 1.
            transaction: Cell::new(100),
        };
        Ok(peer)
    }

    /// A message with a transaction id of its own.
    pub fn message(&self, message_type: MessageType, body: &[u8]) -> Vec<u8> {
        let transaction = match self.transaction.get() {
            u8::MAX => 100,
            last => last + 1,
        };
        self.transaction.set(transaction);
        let size = u16::try_from(body.len()).unwrap_or(u16::MAX);
        let version = self.version.get();
        let pipe = u32::from(size) + HEADER_SIZE as u32 - size_of::<PipeHeader>() as u32;
        let header = Header {
            pipe: PipeHeader::data(pipe),
            frame_version: version.frame,
            message_type,
            message_version: version.message,
            body_size: size.into(),
            status: Status::OK,
            transaction_id: transaction,
            flags: (Flags::TRANSACTION | Flags::REQUEST).bits(),
            reserved: [0; 2],
        };
        [header.as_bytes(), body].concat()
    }

    /// A message of the service.
    pub fn request(&self, body: &[u8]) -> Vec<u8> {
        self.message(self.message_type, body)
    }

    /// Sends a message, whatever it is.
    pub fn send(&self, message: &[u8]) -> Result<()> {
        Ok(self.service.port().send_raw(message)?)
    }

    /// Sends an empty completion of a request that the guest did not make.
    pub fn complete(&self, transaction: u64) -> Result<()> {
        Ok(self.service.port().complete_raw(transaction, &[])?)
    }

    /// Sends a message, and gives the answer to it. What the guest says next must be that.
    pub fn ask(&self, message: &[u8]) -> Result<Reply> {
        self.send(message)?;
        self.answer(message)
    }

    /// The answer to a message that was sent.
    pub fn answer(&self, message: &[u8]) -> Result<Reply> {
        let (asked, _) = Header::split(message).context("a message without a header")?;
        loop {
            let reply = self.replies.recv_timeout(COMMAND).context("no answer")?;
            let (header, body) = Header::split(&reply).context("an answer without a header")?;
            if header.transaction_id < 100 {
                // The answer to what the provider had sent before.
                continue;
            }
            ensure!(
                header.transaction_id == asked.transaction_id
                    && header.message_type == asked.message_type
                    && header.flags() == Flags::TRANSACTION | Flags::RESPONSE,
                "{header:?} is no answer to {asked:?}"
            );
            let body = body.to_vec();
            return Ok(Reply { header, body });
        }
    }

    /// The question which of these versions the guest speaks.
    pub fn question(&self, frames: &[Version], versions: &[Version]) -> Result<Vec<u8>> {
        let question = Question::new(frames, versions).context("too many versions")?;
        Ok(self.message(MessageType::NEGOTIATE, question.as_bytes()))
    }

    /// Agrees on a version with the guest, or on none.
    pub fn negotiate(&self, frames: &[Version], versions: &[Version]) -> Result<Option<Agreed>> {
        let reply = self.ask(&self.question(frames, versions)?)?;
        match parse_answer(&reply.body, frames, versions) {
            Ok(agreed) => {
                if let Some(agreed) = agreed {
                    self.version.set(agreed);
                }
                Ok(agreed)
            }
            Err(error) => bail!("{error:?} in the answer to {frames:?}, {versions:?}"),
        }
    }

    /// Agrees on one version with the guest.
    pub fn speak(&self, frame: Version, version: Version) -> Result<()> {
        let agreed = self.negotiate(&[frame], &[version])?;
        let wanted = Agreed {
            frame,
            message: version,
        };
        ensure!(agreed == Some(wanted), "{agreed:?} in place of {wanted:?}");
        Ok(())
    }

    /// Gives the device back to its provider, in the version that this believes in.
    pub fn give_back(self, versions: &[Version]) -> Result<()> {
        let agreed = self.negotiate(FRAME_VERSIONS, versions)?;
        ensure!(
            agreed.map(|agreed| agreed.message) == versions.first().copied(),
            "{agreed:?} is not the best version"
        );
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.service.port().set_quiet(false);
    }
}

/// A number at the start of a body.
pub fn number(body: &[u8]) -> Result<u64> {
    let (number, _) = zerocopy::little_endian::U64::read_from_prefix(body)
        .map_err(|_| anyhow::anyhow!("an answer without a number"))?;
    Ok(number.get())
}
