//! Moments as the agent reports them: nanoseconds for messages, RFC 3339 text for log lines.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_REALTIME`.
pub(crate) fn now_ns() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap_or(nix::sys::time::TimeSpec::new(0, 0));
    now.tv_sec().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec())
}

/// A moment as `2026-01-31T23:59:59.123456789Z`.
#[derive(Debug)]
pub(crate) struct Timestamp(String);

impl Timestamp {
    pub(crate) fn now() -> Self {
        let now = now_ns();
        Self::from_unix(now.div_euclid(1_000_000_000), now.rem_euclid(1_000_000_000))
    }

    pub(crate) fn text(&self) -> &str {
        &self.0
    }

    pub(crate) fn from_unix(seconds: i64, nanoseconds: i64) -> Self {
        let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let (year, month, day) = date(days);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        Self(format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanoseconds:09}Z"))
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar. Years are counted from March
/// here, so that the leap day is a year's last.
fn date(days: i64) -> (i64, i64, i64) {
    let since_0000_03_01 = days + 719_468;
    let era = since_0000_03_01.div_euclid(146_097);
    let day_of_era = since_0000_03_01.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000007Z"),
            (951_827_696, "2000-02-29T12:34:56.000000007Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000000007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000007Z"),
            (1_767_225_599, "2025-12-31T23:59:59.000000007Z"),
        ] {
            assert_eq!(Timestamp::from_unix(seconds, 7).text(), text);
        }
    }
}
