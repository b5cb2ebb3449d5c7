//! The CMOS clock, as far as kernels need it (MC146818): the date, and the bytes that they store there.
//!
//! Owns the registers behind ports 0x70 and 0x71. The time is the host's, in UTC. A guest's writes to the
//! time have no effect, and there is no alarm and no interrupt.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::lanes::each_byte;
use crate::bus::{BusDevice, Outcome};
use crate::layout;

/// Length of the ports in bytes: index, data.
pub const LEN: u64 = 2;

const SECONDS: usize = 0x00;
const MINUTES: usize = 0x02;
const HOURS: usize = 0x04;
const WEEKDAY: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const STATUS_A: usize = 0x0a;
const STATUS_B: usize = 0x0b;
const STATUS_C: usize = 0x0c;
const STATUS_D: usize = 0x0d;
/// Where PCs keep the century; the FADT says so.
const CENTURY: usize = layout::CMOS_CENTURY as usize;

/// Status A: an update is in progress.
const A_UPDATING: u8 = 0x80;
/// Status A: a divider for 32.768 kHz, and the usual rate.
const A_NORMAL: u8 = 0x26;
/// Status B: hours count to 24.
const B_24_HOURS: u8 = 0x02;
/// Status B: numbers are binary, not BCD.
const B_BINARY: u8 = 0x04;
/// Status D: RAM and time are valid.
const D_VALID: u8 = 0x80;
const PM: u8 = 0x80;
/// The start of the interval at the end of each second in which an update is reported, as on the real chip
/// (2.2 ms). A reader that sees no update in progress has time to read all registers.
const UPDATE_FROM_NS: u32 = 1_000_000_000 - 2_228_000;

/// The clock and its 128 bytes.
pub struct Rtc {
    index: usize,
    bytes: [u8; 128],
    /// Returns seconds and nanoseconds since 1970; a test sets its own.
    now: fn() -> (u64, u32),
}

impl Default for Rtc {
    fn default() -> Self {
        Self::with_clock(|| {
            // A host clock before 1970 reads as 1970.
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            (now.as_secs(), now.subsec_nanos())
        })
    }
}

impl Rtc {
    fn with_clock(now: fn() -> (u64, u32)) -> Self {
        let mut bytes = [0; 128];
        bytes[STATUS_B] = B_24_HOURS;
        Self { index: 0, bytes, now }
    }

    fn register(&self) -> u8 {
        let (seconds, ns) = (self.now)();
        let date = Date::from_unix(seconds);
        match self.index {
            SECONDS => self.coded(date.second),
            MINUTES => self.coded(date.minute),
            HOURS => self.coded_hour(date.hour),
            WEEKDAY => self.coded(date.weekday),
            DAY => self.coded(date.day),
            MONTH => self.coded(date.month),
            YEAR => self.coded(date.year_of_century),
            CENTURY => self.coded(date.century),
            STATUS_A => A_NORMAL | if ns >= UPDATE_FROM_NS { A_UPDATING } else { 0 },
            STATUS_C => 0,
            STATUS_D => D_VALID,
            index => self.bytes.get(index).copied().unwrap_or_default(),
        }
    }

    fn coded(&self, value: u8) -> u8 {
        if self.bytes[STATUS_B] & B_BINARY != 0 { value } else { value / 10 * 16 + value % 10 }
    }

    fn coded_hour(&self, hour: u8) -> u8 {
        if self.bytes[STATUS_B] & B_24_HOURS != 0 {
            return self.coded(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.coded(twelve) | if hour >= 12 { PM } else { 0 }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = if port == 1 { self.register() } else { 0 };
        }
    }

    /// A 16-bit write to the index port is an index and its value, as PC software writes them.
    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        each_byte(offset, data, |port, value| {
            match port {
                // Bit 7 masks NMIs.
                0 => self.index = usize::from(value & 0x7f),
                1 => {
                    if let Some(byte) = self.bytes.get_mut(self.index) {
                        *byte = value;
                    }
                }
                _ => {}
            }
            Outcome::Continue
        })
    }
}

/// A date of the proleptic Gregorian calendar, in UTC, split as the clock's registers hold it.
#[derive(Debug, PartialEq, Eq)]
struct Date {
    second: u8,
    minute: u8,
    hour: u8,
    /// 1 is Sunday.
    weekday: u8,
    day: u8,
    month: u8,
    year_of_century: u8,
    century: u8,
}

impl Date {
    fn from_unix(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let second_of_day = seconds % 86_400;
        // Years are counted from 1 March 0000, so that the leap day is the last day of a year; 400 years have
        // 146,097 days. 1970-01-01 is day 719,468 of that count.
        let day_count = days + 719_468;
        let era = day_count / 146_097;
        let day_of_era = day_count % 146_097;
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let months_from_march = (5 * day_of_year + 2) / 153;
        let month = if months_from_march < 10 { months_from_march + 3 } else { months_from_march - 9 };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        Self {
            second: small(second_of_day % 60),
            minute: small(second_of_day / 60 % 60),
            hour: small(second_of_day / 3600),
            weekday: small((days + 4) % 7 + 1),
            day: small(day_of_year - (153 * months_from_march + 2) / 5 + 1),
            month: small(month),
            year_of_century: small(year % 100),
            century: small(year / 100 % 100),
        }
    }
}

/// Converts a value that the preceding division keeps below 256.
fn small(value: u64) -> u8 {
    u8::try_from(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn register(rtc: &mut Rtc, index: usize) -> u8 {
        rtc.write(0, &[u8::try_from(index).unwrap() | 0x80]);
        let mut data = [0];
        rtc.read(1, &mut data);
        data[0]
    }

    #[test]
    fn the_date_is_right_round_leap_days_and_centuries() {
        for (seconds, date) in [
            (0, (1970, 1, 1, 5, 0, 0, 0)),
            (951_782_399, (2000, 2, 28, 2, 23, 59, 59)),
            (951_782_400, (2000, 2, 29, 3, 0, 0, 0)),
            (951_868_800, (2000, 3, 1, 4, 0, 0, 0)),
            (1_798_761_599, (2026, 12, 31, 5, 23, 59, 59)),
            (4_107_542_400, (2100, 3, 1, 2, 0, 0, 0)),
        ] {
            let found = Date::from_unix(seconds);
            let year = u32::from(found.century) * 100 + u32::from(found.year_of_century);
            let found = (year, found.month, found.day, found.weekday, found.hour, found.minute, found.second);
            assert_eq!(found, date, "{seconds}");
        }
    }

    #[test]
    fn numbers_are_bcd_unless_the_guest_wants_binary() {
        let mut rtc = Rtc::with_clock(|| (1_798_761_599, 0));
        assert_eq!(register(&mut rtc, YEAR), 0x26);
        assert_eq!(register(&mut rtc, CENTURY), 0x20);
        assert_eq!(register(&mut rtc, HOURS), 0x23);
        rtc.write(0, &[0x0b]);
        rtc.write(1, &[B_BINARY]);
        assert_eq!(register(&mut rtc, YEAR), 26);
        assert_eq!(register(&mut rtc, HOURS), 11 | PM);
    }

    #[test]
    fn an_update_is_announced_at_the_end_of_a_second_only() {
        assert_eq!(register(&mut Rtc::with_clock(|| (0, 0)), STATUS_A), A_NORMAL);
        assert_eq!(register(&mut Rtc::with_clock(|| (0, 999_000_000)), STATUS_A), A_NORMAL | A_UPDATING);
        assert_eq!(register(&mut Rtc::default(), STATUS_D), D_VALID);
    }

    #[test]
    fn the_guest_keeps_bytes_and_no_access_fails() {
        let mut rtc = Rtc::default();
        rtc.write(0, &[0x0f]);
        rtc.write(1, &[0x0a]);
        assert_eq!(register(&mut rtc, 0x0f), 0x0a);
        rtc.write(0, &[0x10, 0x5a]);
        assert_eq!(register(&mut rtc, 0x10), 0x5a, "index and value at once");
        rtc.write(0, &[0x10]);
        let mut both = [0xee; 2];
        rtc.read(0, &mut both);
        assert_eq!(both, [0, 0x5a]);
        for index in 0..=255 {
            rtc.write(0, &[index]);
            rtc.write(1, &[0xff, 1, 2]);
            rtc.read(1, &mut [0; 8]);
            rtc.read(0, &mut []);
        }
    }
}
