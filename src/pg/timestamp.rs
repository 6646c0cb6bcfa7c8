//! PostgreSQL's moment in time.
//!
//! WAL carries times as `TimestampTz`: signed microseconds since 2000-01-01
//! 00:00:00 UTC (`src/include/datatype/timestamp.h`). The clock is never read here.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Microseconds from the Unix epoch to PostgreSQL's (2000-01-01 00:00:00 UTC).
const EPOCH_SHIFT_MICROS: i64 = 946_684_800_000_000;

/// 0000-01-01 00:00:00 UTC in microseconds since the Unix epoch: RFC 3339 has no
/// years before it.
const YEAR_ZERO_UNIX_MICROS: i64 = -62_167_219_200_000_000;

/// A moment as PostgreSQL stores it: microseconds since 2000-01-01 00:00:00 UTC.
///
/// Every `i64` is a legal value. Text forms cover the years 0 to 9999; a moment
/// outside shows as a number of microseconds, and no operation panics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PgTimestamp(pub i64);

impl PgTimestamp {
    /// Returns the moment `micros` microseconds after the Unix epoch. A value
    /// before PostgreSQL's range becomes the earliest moment.
    pub fn from_unix_micros(micros: i64) -> Self {
        Self(micros.saturating_sub(EPOCH_SHIFT_MICROS))
    }

    /// Returns the moment `seconds` after the Unix epoch, saturating at both ends.
    pub fn from_unix_seconds(seconds: i64) -> Self {
        Self::from_unix_micros(seconds.saturating_mul(1_000_000))
    }

    /// Returns microseconds since the Unix epoch, or `None` past the end of `i64`.
    pub fn to_unix_micros(self) -> Option<i64> {
        self.0.checked_add(EPOCH_SHIFT_MICROS)
    }

    /// Returns the moment as a `jiff::Timestamp`, or `None` outside the years 0 to 9999.
    pub fn to_jiff(self) -> Option<Timestamp> {
        let micros = self.to_unix_micros()?;
        (micros >= YEAR_ZERO_UNIX_MICROS).then_some(())?;
        Timestamp::from_microsecond(micros).ok()
    }

    /// Returns the moment in the form for `recovery_target_time`, always with an
    /// explicit UTC offset: `2026-11-22 00:29:27.243882+00`. `None` outside
    /// the years 1 to 9999, which that setting could not be given in this form.
    ///
    /// Source: manual, "Recovery Target" (without a zone the server's
    /// `timezone` setting would decide).
    pub fn to_recovery_target(self) -> Option<String> {
        let moment = self.to_jiff()?;
        let year = moment.to_zoned(jiff::tz::TimeZone::UTC).year();
        (year >= 1).then(|| moment.strftime("%Y-%m-%d %H:%M:%S.%6f+00").to_string())
    }
}

impl From<Timestamp> for PgTimestamp {
    /// Converts, cutting below the microsecond towards the Unix epoch.
    fn from(moment: Timestamp) -> Self {
        Self::from_unix_micros(moment.as_microsecond())
    }
}

impl fmt::Display for PgTimestamp {
    /// Writes RFC 3339 in UTC with microseconds: `2026-11-22T00:29:27.243882Z`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to_jiff() {
            Some(moment) => write!(f, "{}", moment.strftime("%Y-%m-%dT%H:%M:%S.%6fZ")),
            None => write!(f, "{} microseconds since 2000-01-01", self.0),
        }
    }
}

/// The text was not an RFC 3339 time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a time with an offset; one looks like `2026-11-22T00:29:27.243882Z`")]
pub struct ParsePgTimestampError(pub String);

impl FromStr for PgTimestamp {
    type Err = ParsePgTimestampError;

    /// Reads RFC 3339 with any offset, and the number form that [`fmt::Display`]
    /// gives a moment outside the calendar.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(number) = text.strip_suffix(" microseconds since 2000-01-01") {
            return number.parse().map(Self).map_err(|_| ParsePgTimestampError(text.to_owned()));
        }
        let moment: Timestamp = text.parse().map_err(|_| ParsePgTimestampError(text.to_owned()))?;
        Ok(Self::from(moment))
    }
}

impl Serialize for PgTimestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PgTimestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_epoch_is_the_year_2000() {
        assert_eq!(PgTimestamp(0).to_string(), "2000-01-01T00:00:00.000000Z");
        assert_eq!(PgTimestamp::from_unix_seconds(946_684_800), PgTimestamp(0));
        assert_eq!(PgTimestamp(0).to_unix_micros(), Some(946_684_800_000_000));
    }

    #[test]
    fn text_forms_carry_microseconds_and_utc() {
        let moment: PgTimestamp = "2026-11-22T02:29:27.243882+02:00".parse().unwrap();
        assert_eq!(moment.to_string(), "2026-11-22T00:29:27.243882Z");
        assert_eq!(moment.to_recovery_target().unwrap(), "2026-11-22 00:29:27.243882+00");
        assert_eq!(serde_json::to_string(&moment).unwrap(), "\"2026-11-22T00:29:27.243882Z\"");
    }

    #[test]
    fn a_time_without_offset_is_refused() {
        for bad in ["", "2026-11-22T00:29:27", "2026-11-22", "now", "5 microseconds"] {
            assert!(bad.parse::<PgTimestamp>().is_err(), "{bad}");
        }
    }

    #[test]
    fn moments_outside_the_calendar_show_as_a_number_and_come_back() {
        // Years before 0 have no RFC 3339 form; the property below once found that.
        for micros in [i64::MIN, i64::MAX, -63_200_000_000_000_000, 252_500_000_000_000_000] {
            let moment = PgTimestamp(micros);
            assert_eq!(moment.to_string(), format!("{micros} microseconds since 2000-01-01"));
            assert_eq!(moment.to_string().parse(), Ok(moment));
            assert_eq!(moment.to_recovery_target(), None);
        }
    }

    proptest! {
        #[test]
        fn every_value_survives_its_text(micros: i64) {
            let moment = PgTimestamp(micros);
            prop_assert_eq!(moment.to_string().parse::<PgTimestamp>().unwrap(), moment);
            let _ = moment.to_recovery_target();
        }

        #[test]
        fn calendar_moments_survive_their_text(micros in -63_000_000_000_000_000i64..252_000_000_000_000_000) {
            let moment = PgTimestamp(micros);
            prop_assert_eq!(moment.to_string().parse::<PgTimestamp>().unwrap(), moment);
            let unix = PgTimestamp::from_unix_micros(moment.to_unix_micros().unwrap());
            prop_assert_eq!(unix, moment);
        }
    }
}
