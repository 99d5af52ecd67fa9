// SPDX-License-Identifier: MIT OR Apache-2.0

//! The PC's real-time clock (MC146818, I/O ports 0x70 and 0x71), read-only: it shows the host's
//! time in UTC, as BCD numbers and 24 hours (Linux takes them as BCD whatever the clock says). A
//! guest without it would start in 1970. Writes to its registers are dropped, and it raises no
//! interrupt.

use std::time::{SystemTime, UNIX_EPOCH};

/// Index port; the data port is the next one.
pub const RTC_INDEX_PORT: u16 = 0x70;
/// Data port.
pub const RTC_DATA_PORT: u16 = 0x71;

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
/// The register of the century, as the FADT tells the guest too.
pub const CENTURY: u8 = 0x32;
/// Status A: the usual divider (32.768 kHz) and rate; the update-in-progress bit is never set.
const STATUS_A_VALUE: u8 = 0x26;
/// Status B: BCD, 24 hours.
const STATUS_B_VALUE: u8 = 0x02;
/// Status D: the battery is good.
const STATUS_D_VALUE: u8 = 0x80;

/// The clock's only state: which register the index port names.
#[derive(Debug, Default)]
pub struct Rtc {
    index: u8,
}

impl Rtc {
    /// The guest wrote the index port. Bit 7 is the NMI mask of old PCs.
    pub fn select(&mut self, index: u8) {
        self.index = index & 0x7f;
    }

    /// The guest reads the data port.
    pub fn read(&self) -> u8 {
        let seconds = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        register(self.index, seconds)
    }
}

/// The value of a register at a time in seconds since 1970.
fn register(index: u8, seconds: u64) -> u8 {
    let days = seconds / 86_400;
    let in_day = seconds % 86_400;
    let (year, month, day) = civil(days);
    let value = match index {
        STATUS_A => return STATUS_A_VALUE,
        STATUS_B => return STATUS_B_VALUE,
        STATUS_D => return STATUS_D_VALUE,
        0x00 => in_day % 60,
        0x02 => in_day / 60 % 60,
        0x04 => in_day / 3600,
        // 1 January 1970 was a Thursday; Sunday is day 1.
        0x06 => (days + 4) % 7 + 1,
        0x07 => day,
        0x08 => month,
        0x09 => year % 100,
        CENTURY => year / 100,
        _ => 0,
    };
    // All values are below 100, but for the century of a clock that is very wrong.
    (((value / 10 % 10) << 4) | (value % 10)) as u8
}

/// Year, month and day of a number of days since 1970, in the Gregorian calendar.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    // Whole cycles of 400 years first, so that the loop below is short for any input.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    loop {
        let len = if leap(year) { 366 } else { 365 };
        if days < len {
            break;
        }
        days -= len;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for len in months {
        if days < len {
            break;
        }
        days -= len;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(59), (1970, 3, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_779), (2026, 11, 22));
        assert!(civil(u64::MAX / 86_400).1 <= 12);
    }

    #[test]
    fn registers_of_a_known_second() {
        // 2026-11-22 14:17:05 UTC, a Sunday.
        let t = 20_779 * 86_400 + 14 * 3600 + 17 * 60 + 5;
        let read = |index| register(index, t);
        assert_eq!([read(0), read(2), read(4)], [0x05, 0x17, 0x14]);
        assert_eq!(
            [read(6), read(7), read(8), read(9)],
            [0x01, 0x22, 0x11, 0x26]
        );
        assert_eq!(read(CENTURY), 0x20);
        assert_eq!(read(STATUS_A) & 0x80, 0);
        assert_eq!(read(0x7f), 0);
    }

    #[test]
    fn index_drops_the_nmi_bit() {
        let mut rtc = Rtc::default();
        rtc.select(0x80 | STATUS_D);
        assert_eq!(rtc.read(), STATUS_D_VALUE);
    }
}
