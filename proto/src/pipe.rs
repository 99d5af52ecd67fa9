// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Message pipes: the frame that some services put around each of their messages.
//!
//! The packet of the ring is rounded up to 8 bytes; the frame says how long the message is.
//! Integration components and the mouse use it.
//!
//! Source: `struct vmbuspipe_hdr` in `linux/hyperv.h`, `struct pipe_prt_msg` in
//! `drivers/hid/hid-hyperv.c`.

use crate::message::split_prefix;
use zerocopy::little_endian::U32;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

open_enum! {
    /// What a frame of a pipe holds.
    pub struct PipeType: u32 {
        /// A whole message.
        DATA = 1,
    }
}

/// What a message in a pipe starts with, 8 bytes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PipeHeader {
    /// What follows.
    pub pipe_type: PipeType,
    /// Size of what follows, in bytes.
    pub size: U32,
}

impl PipeHeader {
    /// The header of a message of `size` bytes.
    pub const fn data(size: u32) -> Self {
        Self {
            pipe_type: PipeType::DATA,
            size: U32::new(size),
        }
    }
}

/// The message in `payload`. `None` if it is not a whole message, or is longer than the packet.
pub fn message(payload: &[u8]) -> Option<&[u8]> {
    let (header, rest): (PipeHeader, _) = split_prefix(payload)?;
    match header.pipe_type {
        PipeType::DATA => rest.get(..usize::try_from(header.size.get()).ok()?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes as _;

    #[test]
    fn message_is_as_long_as_its_header_says() {
        let mut packet = [0xaa; 16];
        packet[..8].copy_from_slice(PipeHeader::data(5).as_bytes());
        assert_eq!(message(&packet), Some(&[0xaa; 5][..]));
        packet[..8].copy_from_slice(PipeHeader::data(0).as_bytes());
        assert_eq!(message(&packet), Some(&[][..]));
        for size in [9, 0x1000, u32::MAX] {
            packet[..8].copy_from_slice(PipeHeader::data(size).as_bytes());
            assert_eq!(message(&packet), None);
        }
        packet[..8].copy_from_slice(PipeHeader::data(8).as_bytes());
        packet[0] = 2;
        assert_eq!(message(&packet), None);
        assert_eq!(message(&packet[..7]), None);
    }
}
