// SPDX-License-Identifier: GPL-2.0

//! Memory that is shared with the host for as long as a channel needs it.

use super::Channel;
use crate::{
    log::err_limited,
    memory::SharedBuffer,
    request::Key, //
};
use hv_proto::{
    client::{
        self,
        Outcome, //
    },
    gpadl::GpadlMessages,
    ids::GpadlId,
    message::{
        HostMessage,
        Message, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc, //
    }, //
};

/// Memory that the host knows by an id.
pub(super) struct GpadlHandle<T> {
    channel: Arc<Channel>,
    /// Where the protocol stands.
    protocol: client::Gpadl,
    len: u32,
    /// What must not be freed before the host has let go of it.
    memory: Arc<T>,
}

impl<T> GpadlHandle<T> {
    /// Describes `len` bytes to the host.
    pub(super) fn create(
        channel: &Arc<Channel>,
        len: usize,
        pfn: impl FnMut(u32) -> u64,
        memory: &Arc<T>,
    ) -> Result<Self> {
        let connection = &channel.connection;
        if !connection.may_share() {
            err_limited!(
                "channel {}: the host has kept too much memory, it gets no more\n",
                channel.id().get()
            );
            return Err(ENOMEM);
        }
        let id = connection.next_gpadl_id();
        let len = u32::try_from(len).map_err(|_| EINVAL)?;
        let messages = GpadlMessages::new(channel.id(), id, len, 0, pfn).map_err(|_| EINVAL)?;

        // From here on, dropping it takes the memory back from the host.
        let mut this = Self {
            channel: channel.clone(),
            protocol: client::Gpadl::new(channel.id(), id),
            len,
            memory: memory.clone(),
        };
        if !this.protocol.start() {
            return Err(EBUSY);
        }
        let mut posted = false;
        let key = Key::GpadlCreate(channel.id(), id);
        let answer = connection.ask(key, Some(channel), || {
            for message in messages {
                if channel.is_rescinded() {
                    return Err(ENODEV);
                }
                connection.post(&message)?;
                posted = true;
            }
            Ok(())
        });
        match answer {
            Ok(HostMessage::GpadlCreated(created)) => {
                match this.protocol.created(&created).map_err(|_| EIO)? {
                    Outcome::Done => Ok(this),
                    Outcome::Refused(status) => {
                        err_limited!(
                            "channel {}: host refuses {} bytes of memory, status {:#x}\n",
                            channel.id().get(),
                            len,
                            status
                        );
                        Err(EIO)
                    }
                }
            }
            Ok(_) => Err(EIO),
            Err(error) => {
                if !posted {
                    this.protocol.not_posted();
                }
                Err(error)
            }
        }
    }

    pub(super) fn id(&self) -> GpadlId {
        self.protocol.gpadl_id()
    }

    /// Asks the host to let go of the memory.
    fn tear_down(&mut self) {
        let channel = &self.channel;
        // With the channel, the host took back what belongs to it.
        if channel.is_rescinded() {
            self.protocol.host_let_go();
            return;
        }
        let Some(message) = self.protocol.teardown() else {
            return;
        };
        let key = Key::GpadlTeardown(message.gpadl_id);
        let answer = channel.connection.ask(key, Some(channel), || {
            channel.connection.post(&message.encode())
        });
        match answer {
            Ok(HostMessage::GpadlTorndown(torn)) => {
                // It cannot be another one's: the key has the id.
                let _ = self.protocol.torndown(&torn);
            }
            Err(_) if channel.is_rescinded() => self.protocol.host_let_go(),
            _ => self.protocol.teardown_timed_out(),
        }
    }
}

impl<T> Drop for GpadlHandle<T> {
    /// Without the host's word that it has let go of the memory, that is never freed.
    fn drop(&mut self) {
        self.tear_down();
        if !self.protocol.may_free() {
            self.channel.lost.add(1, Relaxed);
            self.channel.connection.memory_lost(u64::from(self.len));
            err_limited!(
                "channel {}: the host keeps memory, it is lost\n",
                self.channel.id().get()
            );
            core::mem::forget(self.memory.clone());
        }
    }
}

/// A buffer that the host knows. See [`Channel::establish_gpadl`].
///
/// Dropping it asks the host to let go of the buffer, and sleeps until it has.
pub struct Gpadl {
    handle: GpadlHandle<SharedBuffer>,
    buffer: Arc<SharedBuffer>,
}

impl Gpadl {
    /// The id by which the host knows the buffer.
    pub fn id(&self) -> GpadlId {
        self.handle.id()
    }

    /// The buffer.
    pub fn buffer(&self) -> &SharedBuffer {
        &self.buffer
    }
}

impl Channel {
    /// Shares `buffer` with the host, for as long as the value that is returned exists.
    ///
    /// Process context; sleeps.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the channel was rescinded, `EINVAL` if the buffer is larger than the protocol
    /// can describe (8190 pages), `EIO` if the host refused, `ETIMEDOUT` if it did not answer; then
    /// the buffer is never freed. `ENOMEM` also if the host has kept too much memory before.
    pub fn establish_gpadl(self: &Arc<Self>, buffer: SharedBuffer) -> Result<Gpadl> {
        let buffer = Arc::new(buffer, GFP_KERNEL)?;
        let handle = GpadlHandle::create(self, buffer.len(), |page| buffer.pfn(page), &buffer)?;
        Ok(Gpadl { handle, buffer })
    }
}
