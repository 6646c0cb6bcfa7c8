//! Reading recovery targets as people write them.
//!
//! Owns the grammar of times, LSNs, transaction ids, restore point names and
//! timelines on the command line. Never here: whether a target can be reached.
//!
//! ```text
//! 2026-11-22 03:00:00                 the machine's zone
//! 2026-11-22T03:00:00.123456+02:00    an offset: +02, +0200, +02:00, Z
//! 2026-11-22 03:00 Europe/Helsinki    a zone's name, also in brackets
//! ```
//!
//! Microseconds are all that PostgreSQL keeps, so a finer time is refused
//! instead of being rounded to the wrong side of a commit.
//!
//! Source: PostgreSQL manual, "Recovery Target" and "Date/Time Input"
//! (`doc/src/sgml/config.sgml`, `datatype.sgml`).

use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};
use jiff::{Timestamp, Zoned};

use crate::pg::{Lsn, Timeline};
use crate::plan::target::{RecoveryPoint, TimelineChoice};

/// The longest restore point name, in bytes (`MAXFNAMELEN` - 1 in `xlog_internal.h`).
const NAME_BYTES_MAX: usize = 63;

/// `FirstNormalTransactionId` in `src/include/access/transam.h`: lower ids never commit.
const FIRST_NORMAL_XID: u32 = 3;

/// What a user wrote for a target that cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Not a time in any form that we read.
    #[error(
        "`{0}` is not a time; one looks like 2026-11-22 03:00:00, with a fraction of up to 6 digits \
         and an offset (+02:00), Z or a zone (Europe/Helsinki) if wanted"
    )]
    NotATime(String),
    /// A word that means another time each time it is read.
    #[error(
        "`{0}` is not taken, because it means another moment each time it is read; write the time out"
    )]
    Moving(String),
    /// Neither an offset nor a zone of the time zone database.
    #[error(
        "`{zone}` in `{text}` is not a time zone; write an offset such as +02:00 or a name such as Europe/Helsinki \
         (short forms like EST mean different zones in different places)"
    )]
    UnknownZone {
        /// What was given.
        text: String,
        /// Its zone.
        zone: String,
    },
    /// The time has no zone and the machine's is not known.
    #[error(
        "`{0}` has no zone and the machine's zone could not be found; add an offset such as +00"
    )]
    NoZone(String),
    /// The clock was set forward over this time.
    #[error(
        "`{text}` never was in {zone}: the clock was set forward over it; write {earlier} or {later}"
    )]
    Skipped {
        /// What was given.
        text: String,
        /// The zone's name.
        zone: String,
        /// The moment by the offset before the change.
        earlier: String,
        /// The moment by the offset after the change.
        later: String,
    },
    /// The clock was set back over this time.
    #[error("`{text}` was twice in {zone}: the clock was set back; write {earlier} or {later}")]
    Twice {
        /// What was given.
        text: String,
        /// The zone's name.
        zone: String,
        /// The first of the two.
        earlier: String,
        /// The second of the two.
        later: String,
    },
    /// The offset and the zone contradict each other.
    #[error("`{0}` has an offset that its zone did not have at that time; leave one of them out")]
    OffsetAndZoneDiffer(String),
    /// Not a transaction id.
    #[error(
        "`{0}` is not a transaction id; it takes a decimal number from 3 to 4294967295 \
         (of a 64-bit id, as pg_current_xact_id() shows it, the rest of a division by 4294967296)"
    )]
    NotAnXid(String),
    /// Not the name of a restore point.
    #[error("a restore point's name has 1 to 63 bytes; this one has {0}")]
    NameLength(usize),
    /// Not a timeline.
    #[error(
        "`{0}` is not a timeline; it takes current, latest, a decimal number or 0x and hex digits"
    )]
    NotATimeline(String),
}

/// A time target: the moment, and how it reads in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetTime {
    /// The moment.
    pub point: RecoveryPoint,
    /// The same moment with its offset, and its zone where one was used:
    /// `2026-11-22 03:00:00+02:00 (Europe/Helsinki)`.
    pub in_full: String,
}

/// Reads `--to-time`; `machine_zone` is used when the text names none.
///
/// # Errors
/// See [`TargetError`]; a time that the zone skipped or had twice is refused
/// with both possibilities.
pub fn parse_time(
    text: &str,
    machine_zone: impl FnOnce() -> Option<TimeZone>,
) -> Result<TargetTime, TargetError> {
    let trimmed = text.trim();
    let moving = ["now", "today", "yesterday", "tomorrow", "midnight", "noon", "infinity", "epoch"];
    let word = trimmed.trim_start_matches('-').to_ascii_lowercase();
    if moving.iter().any(|moving| word.starts_with(moving)) {
        return Err(TargetError::Moving(trimmed.to_owned()));
    }
    let not_a_time = || TargetError::NotATime(trimmed.to_owned());
    let (datetime, rest) = take_datetime(trimmed).ok_or_else(not_a_time)?;
    let (offset, zone_name) = split_zone(rest.trim());
    let unknown = |zone: &str| TargetError::UnknownZone { text: trimmed.into(), zone: zone.into() };
    let offset = match offset {
        "" => None,
        offset => Some(parse_offset(offset).ok_or_else(|| unknown(offset))?),
    };
    let zone = match zone_name {
        "" => None,
        name => Some(named_zone(name).ok_or_else(|| unknown(name))?),
    };
    let zoned = match (offset, zone) {
        (None, None) => {
            let zone = machine_zone().ok_or_else(|| TargetError::NoZone(trimmed.to_owned()))?;
            in_zone(trimmed, datetime, &zone)?
        }
        (None, Some(zone)) => in_zone(trimmed, datetime, &zone)?,
        (Some(offset), zone) => {
            let moment = offset.to_timestamp(datetime).map_err(|_| not_a_time())?;
            if zone.is_some_and(|zone| zone.to_offset(moment) != offset) {
                return Err(TargetError::OffsetAndZoneDiffer(trimmed.to_owned()));
            }
            moment.to_zoned(TimeZone::fixed(offset))
        }
    };
    Ok(TargetTime {
        point: RecoveryPoint::Time { unix_micros: zoned.timestamp().as_microsecond() },
        in_full: in_full(&zoned),
    })
}

/// Takes `YYYY-MM-DD[T ]HH:MM[:SS[.f{1,6}]]` from the front; returns what follows.
fn take_datetime(text: &str) -> Option<(DateTime, &str)> {
    let mut at = text;
    let year = take_digits(&mut at, 4, 4)?;
    take_one(&mut at, "-")?;
    let month = take_digits(&mut at, 2, 2)?;
    take_one(&mut at, "-")?;
    let day = take_digits(&mut at, 2, 2)?;
    take_one(&mut at, "Tt ")?;
    let hour = take_digits(&mut at, 2, 2)?;
    take_one(&mut at, ":")?;
    let minute = take_digits(&mut at, 2, 2)?;
    let (mut second, mut nanos) = (0, 0);
    if take_one(&mut at, ":").is_some() {
        second = take_digits(&mut at, 2, 2)?;
        if take_one(&mut at, ".").is_some() {
            let before = at.len();
            let fraction = take_digits(&mut at, 1, 6)?;
            let digits = u32::try_from(before - at.len()).ok()?;
            nanos = fraction * 10_i32.pow(9 - digits);
            if at.starts_with(|c: char| c.is_ascii_digit()) {
                return None;
            }
        }
    }
    let small = |number: i32| i8::try_from(number).ok();
    let datetime = DateTime::new(
        i16::try_from(year).ok()?,
        small(month)?,
        small(day)?,
        small(hour)?,
        small(minute)?,
        small(second)?,
        nanos,
    );
    Some((datetime.ok()?, at))
}

/// Takes `min` to `max` digits from the front of `at`.
fn take_digits(at: &mut &str, min: usize, max: usize) -> Option<i32> {
    let digits = at.bytes().take(max).take_while(u8::is_ascii_digit).count();
    let (number, rest) = at.split_at_checked(digits)?;
    *at = rest;
    (digits >= min).then(|| number.parse().ok()).flatten()
}

/// Takes one character out of `set` from the front of `at`.
fn take_one(at: &mut &str, set: &str) -> Option<()> {
    let first = at.chars().next().filter(|first| set.contains(*first))?;
    *at = &at[first.len_utf8()..];
    Some(())
}

/// Splits what follows the time into an offset and a zone's name; both may be empty.
fn split_zone(rest: &str) -> (&str, &str) {
    let (offset, zone) = match rest.find('[') {
        Some(at) => (&rest[..at], &rest[at..]),
        None if rest.starts_with(['+', '-', 'Z', 'z']) => match rest.split_once(' ') {
            Some((offset, zone)) => (offset, zone),
            // `Zulu` and the like are names, not `Z`.
            None if rest.len() > 1 && rest.starts_with(['Z', 'z']) => ("", rest),
            None => (rest, ""),
        },
        None => ("", rest),
    };
    let zone = zone.trim();
    let bare = zone.strip_prefix('[').and_then(|zone| zone.strip_suffix(']')).unwrap_or(zone);
    (offset.trim(), bare)
}

/// Reads `Z`, `+HH`, `+HHMM`, `+HH:MM` or `+HH:MM:SS`, up to 15:59:59 as PostgreSQL does.
fn parse_offset(text: &str) -> Option<Offset> {
    if text.eq_ignore_ascii_case("z") {
        return Some(Offset::UTC);
    }
    let mut at = text;
    let sign = if text.starts_with('-') { -1 } else { 1 };
    take_one(&mut at, "+-")?;
    let hours = take_digits(&mut at, 2, 2)?;
    let mut rest = [0, 0];
    for part in &mut rest {
        if at.is_empty() {
            break;
        }
        let _ = take_one(&mut at, ":");
        *part = take_digits(&mut at, 2, 2)?;
    }
    let legal = at.is_empty() && hours <= 15 && rest.iter().all(|part| *part < 60);
    legal.then(|| Offset::from_seconds(sign * (hours * 3600 + rest[0] * 60 + rest[1])).ok())?
}

/// Looks up `Region/City`, or one of the few short names that mean one thing only.
fn named_zone(name: &str) -> Option<TimeZone> {
    if ["utc", "gmt", "zulu"].contains(&name.to_ascii_lowercase().as_str()) {
        return Some(TimeZone::UTC);
    }
    name.contains('/').then(|| TimeZone::get(name).ok())?
}

/// Finds the moment at which the clocks of `zone` showed `datetime`.
fn in_zone(text: &str, datetime: DateTime, zone: &TimeZone) -> Result<Zoned, TargetError> {
    let name = zone.iana_name().unwrap_or("the machine's zone").to_owned();
    let ambiguous = zone.to_ambiguous_zoned(datetime);
    let (before, after) = match ambiguous.offset() {
        AmbiguousOffset::Unambiguous { .. } => {
            return ambiguous.compatible().map_err(|_| TargetError::NotATime(text.to_owned()));
        }
        AmbiguousOffset::Gap { before, after } | AmbiguousOffset::Fold { before, after } => {
            (before, after)
        }
    };
    let by = |offset: Offset| {
        let moment = offset.to_timestamp(datetime).ok();
        // Shown by the zone's own clock: in a gap the two differ from what was written.
        moment.map(|moment: Timestamp| offset_text(&moment.to_zoned(zone.clone())))
    };
    let (Some(first), Some(second)) = (by(before), by(after)) else {
        return Err(TargetError::NotATime(text.to_owned()));
    };
    Err(match ambiguous.offset() {
        // In a gap, the offset before the change gives the later moment.
        AmbiguousOffset::Gap { .. } => TargetError::Skipped {
            text: text.to_owned(),
            zone: name,
            earlier: second,
            later: first,
        },
        _ => {
            TargetError::Twice { text: text.to_owned(), zone: name, earlier: first, later: second }
        }
    })
}

/// `2026-11-22 03:00:00.5+02:00`: the fraction only where there is one.
fn offset_text(zoned: &Zoned) -> String {
    let format = if zoned.subsec_nanosecond() == 0 {
        "%Y-%m-%d %H:%M:%S%:z"
    } else {
        "%Y-%m-%d %H:%M:%S.%6f%:z"
    };
    zoned.strftime(format).to_string()
}

fn in_full(zoned: &Zoned) -> String {
    match zoned.time_zone().iana_name() {
        Some(name) if name != "UTC" => format!("{} ({name})", offset_text(zoned)),
        _ => offset_text(zoned),
    }
}

/// Reads `--to-xid`: 32 bits, decimal.
///
/// # Errors
/// [`TargetError::NotAnXid`] also for ids below 3, which no transaction has.
pub fn parse_xid(text: &str) -> Result<RecoveryPoint, TargetError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let xid = digits.then(|| text.parse().ok()).flatten().filter(|xid| *xid >= FIRST_NORMAL_XID);
    xid.map(RecoveryPoint::Xid).ok_or_else(|| TargetError::NotAnXid(text.to_owned()))
}

/// Reads `--to-lsn`.
///
/// # Errors
/// Text that is not an LSN.
pub fn parse_lsn(text: &str) -> Result<RecoveryPoint, crate::pg::ParseLsnError> {
    text.trim().parse::<Lsn>().map(RecoveryPoint::Lsn)
}

/// Reads `--to-name`: 1 to 63 bytes, taken exactly as they are.
///
/// # Errors
/// [`TargetError::NameLength`].
pub fn parse_name(text: &str) -> Result<RecoveryPoint, TargetError> {
    let legal = (1..=NAME_BYTES_MAX).contains(&text.len());
    legal.then(|| RecoveryPoint::Name(text.to_owned())).ok_or(TargetError::NameLength(text.len()))
}

/// Reads `--timeline`.
///
/// # Errors
/// [`TargetError::NotATimeline`]. Hex digits need `0x`, as PostgreSQL wants them:
/// `0000000A` is a file name's part, and `10` is timeline ten.
pub fn parse_timeline(text: &str) -> Result<TimelineChoice, TargetError> {
    let number = match text {
        "current" => return Ok(TimelineChoice::Current),
        "latest" => return Ok(TimelineChoice::Latest),
        _ => match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(hex) if hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                u32::from_str_radix(hex, 16).ok()
            }
            None if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
            _ => None,
        },
    };
    let timeline = number.filter(|number| *number != 0).map(Timeline);
    timeline.map(TimelineChoice::Number).ok_or_else(|| TargetError::NotATimeline(text.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn helsinki() -> Option<TimeZone> {
        TimeZone::get("Europe/Helsinki").ok()
    }

    fn micros(text: &str) -> i64 {
        match parse_time(text, helsinki) {
            Ok(TargetTime { point: RecoveryPoint::Time { unix_micros }, .. }) => unix_micros,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn every_way_to_write_one_moment_is_that_moment() {
        // `date -u -d '2026-11-22 01:00:00' +%s` gives 1795309200.
        let moment = 1_795_309_200_000_000;
        for text in [
            "2026-11-22 03:00:00",
            "2026-11-22 03:00",
            "2026-11-22T03:00:00",
            "2026-11-22 03:00:00.000000",
            "2026-11-22 03:00:00+02",
            "2026-11-22 03:00:00 +02",
            "2026-11-22 03:00:00+0200",
            "2026-11-22T03:00:00+02:00",
            "2026-11-22 01:00:00Z",
            "2026-11-22 01:00:00 UTC",
            "2026-11-22 01:00:00-00",
            "2026-11-21 20:00:00-05:00",
            "2026-11-22 03:00:00 Europe/Helsinki",
            "2026-11-22 03:00:00[Europe/Helsinki]",
            "2026-11-22T03:00:00+02:00[Europe/Helsinki]",
            " 2026-11-21 20:00:00 America/New_York ",
        ] {
            assert_eq!(micros(text), moment, "{text}");
        }
        assert_eq!(micros("2026-11-22 03:00:00.5"), moment + 500_000);
        assert_eq!(micros("2026-11-22 03:00:00.000001+02"), moment + 1);
    }

    #[test]
    fn a_time_is_told_back_with_its_offset() {
        let cases = [
            ("2026-11-22 03:00:00", "2026-11-22 03:00:00+02:00 (Europe/Helsinki)"),
            ("2026-07-01 03:00:00.25", "2026-07-01 03:00:00.250000+03:00 (Europe/Helsinki)"),
            ("2026-11-22 03:00:00-03:30", "2026-11-22 03:00:00-03:30"),
            ("2026-11-22 03:00:00Z", "2026-11-22 03:00:00+00:00"),
        ];
        for (text, full) in cases {
            assert_eq!(parse_time(text, helsinki).unwrap().in_full, full);
        }
    }

    #[test]
    fn what_is_not_a_time_is_refused() {
        for text in [
            "",
            "3",
            "2026-11-22",
            "22.11.2026 03:00",
            "2026-13-01 00:00:00",
            "2026-02-30 00:00:00",
            "2026-11-22 24:00:00",
            "2026-11-22 03:00:60",
            "2026-11-22 03:00:00.1234567",
            "2026-11-22 03:00:00.",
            "2026-11-22  03:00:00",
            "26-11-22 03:00:00",
            "1795309200",
        ] {
            let error = parse_time(text, helsinki).unwrap_err();
            assert!(matches!(error, TargetError::NotATime(_)), "{text}: {error}");
        }
        for text in
            ["now", "Today", "yesterday", "infinity", "-infinity", "epoch", "tomorrow 03:00"]
        {
            let error = parse_time(text, helsinki).unwrap_err();
            assert!(matches!(error, TargetError::Moving(_)), "{text}: {error}");
        }
        for zone in ["EST", "PST", "Europe/Atlantis", "+2", "+16", "+02:60", "+02:00:00:00", "03"] {
            let error = parse_time(&format!("2026-11-22 03:00:00 {zone}"), helsinki).unwrap_err();
            assert!(matches!(error, TargetError::UnknownZone { .. }), "{zone}: {error}");
        }
        let error = parse_time("2026-11-22 03:00:00", || None).unwrap_err();
        assert!(matches!(error, TargetError::NoZone(_)));
        let error = parse_time("2026-11-22 03:00:00+03:00[Europe/Helsinki]", helsinki).unwrap_err();
        assert!(matches!(error, TargetError::OffsetAndZoneDiffer(_)));
    }

    #[test]
    fn a_skipped_hour_names_both_possibilities() {
        // Finland set its clocks from 03:00 to 04:00 on 29 March 2026.
        let error = parse_time("2026-03-29 03:30:00", helsinki).unwrap_err().to_string();
        assert!(
            error.contains("2026-03-29 02:30:00+02:00 or 2026-03-29 04:30:00+03:00"),
            "{error}"
        );
    }

    #[test]
    fn an_hour_that_was_twice_names_both_possibilities() {
        // Finland set its clocks from 04:00 to 03:00 on 25 October 2026.
        let error = parse_time("2026-10-25 03:30:00", helsinki).unwrap_err().to_string();
        assert!(
            error.contains("2026-10-25 03:30:00+03:00 or 2026-10-25 03:30:00+02:00"),
            "{error}"
        );
        assert_eq!(
            micros("2026-10-25 03:30:00+02") - micros("2026-10-25 03:30:00+03"),
            3_600_000_000
        );
    }

    #[test]
    fn xids_names_and_timelines_have_their_bounds() {
        assert_eq!(parse_xid("3"), Ok(RecoveryPoint::Xid(3)));
        assert_eq!(parse_xid("4294967295"), Ok(RecoveryPoint::Xid(u32::MAX)));
        for text in ["", "0", "2", "4294967296", "+5", "-5", "0x10", "7 "] {
            assert!(parse_xid(text).is_err(), "{text}");
        }
        assert!(parse_name(&"ä".repeat(31)).is_ok());
        assert_eq!(parse_name(&"ä".repeat(32)), Err(TargetError::NameLength(64)));
        assert_eq!(parse_name(""), Err(TargetError::NameLength(0)));
        let number = |n| Ok(TimelineChoice::Number(Timeline(n)));
        assert_eq!(parse_timeline("10"), number(10));
        assert_eq!(parse_timeline("0x0000000A"), number(10));
        assert_eq!(parse_timeline("current"), Ok(TimelineChoice::Current));
        for text in ["", "0", "0x", "0x0", "-1", "+1", "A", "Latest", "4294967296"] {
            assert!(parse_timeline(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_time_told_back_is_the_same_moment(seconds in 0_i64..4_000_000_000, micro in 0_i64..1_000_000) {
            let moment = Timestamp::from_microsecond(seconds * 1_000_000 + micro).unwrap();
            let zoned = moment.to_zoned(helsinki().unwrap());
            prop_assert_eq!(micros(&offset_text(&zoned)), moment.as_microsecond());
        }

        #[test]
        fn no_text_makes_the_parsers_stumble(text in "\\PC{0,40}|2026-1[0-9]-2[0-9][T ]0[0-9]:00\\PC{0,12}") {
            let _ = parse_time(&text, helsinki);
            let _ = parse_xid(&text);
            let _ = parse_timeline(&text);
        }
    }
}
