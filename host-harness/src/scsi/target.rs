// SPDX-License-Identifier: MIT OR Apache-2.0

//! A target: the logical units under one address.

use super::{Completion, Data, LogicalUnit, inquiry};
use hv_proto::scsi::{AdditionalSense, Command};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The logical units of a target by their numbers.
#[derive(Default, Clone)]
pub struct Target {
    units: BTreeMap<u8, Arc<LogicalUnit>>,
}

impl Target {
    /// The unit with this number.
    pub fn unit(&self, lun: u8) -> Option<&Arc<LogicalUnit>> {
        self.units.get(&lun)
    }

    /// All units, by number.
    pub fn units(&self) -> impl Iterator<Item = (u8, &Arc<LogicalUnit>)> {
        self.units.iter().map(|(&lun, unit)| (lun, unit))
    }

    /// Adds a unit; false if the number is taken.
    pub fn add(&mut self, lun: u8, unit: Arc<LogicalUnit>) -> bool {
        if self.units.contains_key(&lun) {
            return false;
        }
        self.units.insert(lun, unit);
        true
    }

    /// Takes a unit away.
    pub fn remove(&mut self, lun: u8) -> Option<Arc<LogicalUnit>> {
        self.units.remove(&lun)
    }

    /// Answers what the target answers, and not one of its units: REPORT LUNS, and INQUIRY to a
    /// unit that is not there. `None` if the unit has to do it, or if there is no such unit.
    ///
    /// A guest looks at unit 0 first and goes on to REPORT LUNS only if that INQUIRY succeeds;
    /// and Linux takes every INQUIRY for a success (`storvsc_host_mishandles_cmd`), so that the
    /// data has to say that there is no unit.
    pub fn answer(&self, lun: u8, cdb: &[u8], data: &Data<'_>) -> Option<Completion> {
        let empty = Default::default();
        let buf = match data {
            Data::In(buf) => buf,
            _ => &empty,
        };
        match Command::decode(cdb) {
            Ok(Command::ReportLuns {
                select_report,
                allocation_length,
            }) => Some(self.report_luns(select_report, allocation_length as usize, buf)),
            Ok(Command::Inquiry {
                vpd_page: None,
                allocation_length,
            }) if !self.units.contains_key(&lun) => Some(Completion::respond(
                buf,
                &inquiry::absent(),
                allocation_length.into(),
            )),
            _ => None,
        }
    }

    /// REPORT LUNS (SPC-4 section 6.33).
    fn report_luns(
        &self,
        select_report: u8,
        allocation_length: usize,
        buf: &crate::disk::IoBuf<'_>,
    ) -> Completion {
        let all = match select_report {
            0x00 | 0x02 => true,
            0x01 => false, // Only well-known units, of which there is none.
            _ => return Completion::illegal(AdditionalSense::INVALID_FIELD_IN_CDB),
        };
        let mut list = Vec::new();
        if all {
            for &lun in self.units.keys() {
                // Peripheral device addressing.
                list.extend_from_slice(&[0, lun, 0, 0, 0, 0, 0, 0]);
            }
        }
        // At most 256 units.
        let mut response = (list.len() as u32).to_be_bytes().to_vec();
        response.extend_from_slice(&[0; 4]);
        response.extend_from_slice(&list);
        Completion::respond(buf, &response, allocation_length)
    }
}
