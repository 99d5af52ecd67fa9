// SPDX-License-Identifier: MIT OR Apache-2.0

//! Segmentation and checksums in software, for networks that carry plain frames: RFC 9293 (TCP),
//! RFC 791 and RFC 8200 (IP), RFC 1071 (the checksum).

use etherparse::checksum::Sum16BitWords;

use super::frame::{Checksum, Frame};
use super::headers::{Headers, Transport, write};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Completes the checksum that a frame says is partial. A place outside the frame is left alone.
pub(super) fn complete_checksum(frame: &mut [u8], checksum: Checksum) {
    let Checksum::Partial { start, offset } = checksum else {
        return;
    };
    let (start, offset) = (usize::from(start), usize::from(offset));
    let at = start + offset;
    if at + 2 > frame.len() {
        return;
    }
    // An Ethernet frame may be padded behind the packet; padding is not summed.
    let end = Headers::find(frame).map_or(frame.len(), |headers| headers.end);
    let sum = frame
        .get(start..end)
        .map(|bytes| Sum16BitWords::new().add_slice(bytes));
    if let Some(sum) = sum {
        // UDP over IPv6 has no sum of 0; for TCP both forms of zero are the same.
        let sum = sum.to_ones_complement_with_no_zero();
        write(frame, at, &sum.to_ne_bytes());
    }
}

impl Frame {
    /// Does in software what is left of the checksum. Segmentation must not be left.
    pub fn complete(&mut self) {
        if matches!(self.checksum, Checksum::Partial { .. }) {
            complete_checksum(&mut self.bytes, self.checksum);
            self.checksum = Checksum::Valid;
        }
    }
}

/// Calls `f` with the frames that go on a wire: the segments of a frame that is to be cut, else the
/// frame itself, with all checksums computed. Stops when `f` says false.
///
/// A frame that claims segments which it does not have is passed as it is.
pub fn for_each_wire_frame(frame: &Frame, mut f: impl FnMut(&[u8]) -> bool) {
    let whole = |f: &mut dyn FnMut(&[u8]) -> bool| {
        let mut frame = frame.clone();
        frame.complete();
        f(&frame.bytes);
    };
    let Some(gso) = frame.gso else {
        if frame.checksum == Checksum::Unknown || frame.checksum == Checksum::Valid {
            f(&frame.bytes);
        } else {
            whole(&mut f);
        }
        return;
    };
    let headers = Headers::find(&frame.bytes);
    let Some((headers, tcp)) = headers.and_then(|headers| match headers.transport {
        Some((tcp, Transport::Tcp)) => Some((headers, tcp)),
        _ => None,
    }) else {
        return whole(&mut f);
    };
    let (Some(head), Some(payload)) = (
        frame.bytes.get(..headers.payload),
        frame.bytes.get(headers.payload..headers.end),
    ) else {
        return whole(&mut f);
    };
    let sequence = field::<4>(head, tcp + 4).map_or(0, u32::from_be_bytes);
    let identification = field::<2>(head, headers.network + 4).map_or(0, u16::from_be_bytes);
    let flags = head.get(tcp + 13).copied().unwrap_or(0);
    let parts = payload.chunks(usize::from(gso.segment).max(1));
    let last = parts.len().saturating_sub(1);
    let mut segment = Vec::with_capacity(head.len() + usize::from(gso.segment));
    let mut done: u32 = 0;
    for (number, part) in parts.enumerate() {
        segment.clear();
        segment.extend_from_slice(head);
        segment.extend_from_slice(part);
        let headers = Headers {
            end: segment.len(),
            ..headers
        };
        if !headers.v6 {
            let identification = identification.wrapping_add(number as u16);
            write(
                &mut segment,
                headers.network + 4,
                &identification.to_be_bytes(),
            );
        }
        write(
            &mut segment,
            tcp + 4,
            &sequence.wrapping_add(done).to_be_bytes(),
        );
        let mut flags = flags;
        if number != last {
            flags &= !(FIN | PSH);
        }
        if number != 0 {
            flags &= !CWR;
        }
        write(&mut segment, tcp + 13, &[flags]);
        headers.write_lengths(&mut segment);
        if let Some(checksum) = headers.write_partial_checksum(&mut segment) {
            complete_checksum(&mut segment, checksum);
        }
        if !f(&segment) {
            return;
        }
        // A frame is below 4 GiB.
        done = done.wrapping_add(part.len() as u32);
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}
