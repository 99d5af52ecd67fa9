// SPDX-License-Identifier: MIT OR Apache-2.0

//! MODE SENSE (SPC-4 sections 6.13 and 7.5, SBC-3 section 6.5). Nothing can be changed, so there
//! is no MODE SELECT.

use hv_proto::scsi::{AdditionalSense, PageControl};

/// The pages, each with its code and length first: caching, with the write cache on; control;
/// informational exceptions, off.
const PAGES: [&[u8]; 3] = [
    &[
        0x08, 18, 0x04, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ],
    // Queued commands may be done in any order.
    &[0x0a, 10, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0],
    &[0x1c, 10, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0],
];

/// All pages.
const ALL: u8 = 0x3f;

/// What MODE SENSE is asked for, and what it needs to know.
#[derive(Debug)]
pub(super) struct Request {
    pub long: bool,
    pub no_block_descriptors: bool,
    pub page_control: PageControl,
    pub page: u8,
    pub subpage: u8,
    pub read_only: bool,
    pub blocks: u64,
    pub block_size: u32,
}

/// The answer: header, block descriptor, pages.
pub(super) fn sense(request: &Request) -> Result<Vec<u8>, AdditionalSense> {
    if request.page_control == PageControl::Saved {
        return Err(AdditionalSense::SAVING_PARAMETERS_NOT_SUPPORTED);
    }
    if request.subpage != 0 && request.subpage != 0xff {
        return Err(AdditionalSense::INVALID_FIELD_IN_CDB);
    }
    let mut body = Vec::new();
    if !request.no_block_descriptors {
        // The short form, of both commands: the number of blocks, all ones when it does not fit, a
        // reserved byte, and three bytes of block size.
        let count = u32::try_from(request.blocks).unwrap_or(u32::MAX);
        body.extend_from_slice(&count.to_be_bytes());
        body.extend_from_slice(&request.block_size.to_be_bytes());
    }
    let descriptors = body.len();
    for page in PAGES {
        let (Some(&code), Some(values)) = (page.first(), page.get(2..)) else {
            continue;
        };
        if request.page != ALL && request.page != code {
            continue;
        }
        body.extend_from_slice(&page[..2]);
        if request.page_control == PageControl::Changeable {
            body.resize(body.len() + values.len(), 0);
        } else {
            body.extend_from_slice(values);
        }
    }
    if body.len() == descriptors {
        return Err(AdditionalSense::INVALID_FIELD_IN_CDB);
    }
    // Write protection, and that forced unit access is understood.
    let device = if request.read_only { 0x90 } else { 0x10 };
    // The whole is less than 80 bytes long.
    let mut data = if request.long {
        let [high, low] = (body.len() as u16 + 6).to_be_bytes();
        vec![high, low, 0, device, 0, 0, 0, descriptors as u8]
    } else {
        vec![body.len() as u8 + 3, 0, device, descriptors as u8]
    };
    data.extend_from_slice(&body);
    Ok(data)
}
