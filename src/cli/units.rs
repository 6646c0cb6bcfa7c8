//! Sizes and durations, read from people and written for people.
//!
//! Owns the units that settings and output share. Never here: which setting
//! takes what, or where a number goes.
//!
//! ```text
//! 256MiB = 256 MB = 268435456      PostgreSQL's kB, MB, GB, TB are powers of 1024, and so are ours
//! 300 = 300s = 5min                PostgreSQL's ms, s, min, h, d; a bare number is seconds
//! ```
//!
//! Source: PostgreSQL manual, "Parameter Names and Values" (`doc/src/sgml/config.sgml`).

use std::time::Duration;

/// Reads a size in bytes.
///
/// A bare number is bytes. The unit may follow a space; letters must be as
/// PostgreSQL writes them (`kB`, `MB`, `GB`, `TB`) or binary (`KiB` … `TiB`), in any case.
///
/// # Errors
/// `None` for anything else, and for more than 2^64 - 1 bytes.
pub fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = split_unit(text)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "kb" | "kib" => 10,
        "mb" | "mib" => 20,
        "gb" | "gib" => 30,
        "tb" | "tib" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

/// Reads a duration; a bare number is seconds.
///
/// # Errors
/// `None` for an unknown unit (`m` is refused: it could be minutes or months)
/// and for more than 2^64 - 1 milliseconds.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = split_unit(text)?;
    let millis: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

/// Splits `12 MB` into the number and the unit, which may be empty.
fn split_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    // `parse` refuses the empty string; signs never get here.
    Some((number.parse().ok()?, unit.trim_start()))
}

/// Writes a size for a person: `512 B`, `1.2 GiB`. Never more than four digits.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    // Tenths, rounded half up, in whole numbers so that 1023.96 becomes the next unit and not `1024.0`.
    let mut tenths = (u128::from(bytes) * 10 + 512) / 1024;
    let mut divisor = 1024_u128;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        unit += 1;
        divisor *= 1024;
        tenths = (u128::from(bytes) * 10 + divisor / 2) / divisor;
    }
    let name = UNITS[unit];
    if tenths % 10 == 0 {
        format!("{} {name}", tenths / 10)
    } else {
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    }
}

/// Writes a duration for a person, in the two largest units that matter:
/// `250 ms`, `4.2 s`, `5 min 30 s`, `2 h`, `3 d 4 h`.
pub fn human_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    if millis < 1_000 {
        return format!("{millis} ms");
    }
    if millis < 60_000 {
        let tenths = millis / 100;
        return match tenths % 10 {
            0 => format!("{} s", tenths / 10),
            rest => format!("{}.{rest} s", tenths / 10),
        };
    }
    let seconds = duration.as_secs();
    let (large, large_unit, small, small_unit) = if seconds < 3_600 {
        (seconds / 60, "min", seconds % 60, "s")
    } else if seconds < 86_400 {
        (seconds / 3_600, "h", seconds % 3_600 / 60, "min")
    } else {
        (seconds / 86_400, "d", seconds % 86_400 / 3_600, "h")
    };
    if small == 0 {
        format!("{large} {large_unit}")
    } else {
        format!("{large} {large_unit} {small} {small_unit}")
    }
}

/// Writes a size as a setting takes it back: the largest unit that divides it.
pub fn setting_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes > 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Writes a duration as a setting takes it back: the largest unit that divides it.
pub fn setting_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    for (size, unit) in [(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")] {
        if millis > 0 && millis.is_multiple_of(size) {
            return format!("{}{unit}", millis / size);
        }
    }
    format!("{millis}ms")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_follow_postgresqls_units() {
        // `SELECT pg_size_bytes('256 MB')` gives 268435456.
        for text in ["256MB", "256 MB", "256MiB", "262144kB", "268435456", " 268435456 B "] {
            assert_eq!(parse_size(text), Some(268_435_456), "{text}");
        }
        for text in ["", "MB", "-1MB", "+1", "1.5GB", "1 XB", "99999999999TB", "0x10", "1M"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn durations_follow_postgresqls_units() {
        for text in ["300", "300s", "5min", "5 min", "300000ms"] {
            assert_eq!(parse_duration(text), Some(Duration::from_mins(5)), "{text}");
        }
        for text in ["", "5m", "5 minutes", "-5s", "1.5h", "1h30min", "99999999999999999999s"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }

    #[test]
    fn people_see_few_digits() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1_288_490_189, "1.2 GiB"),
            ((1 << 20) - 1, "1 MiB"),
            (16 << 20, "16 MiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human_size(bytes), text);
        }
        let cases = [
            (250, "250 ms"),
            (4_230, "4.2 s"),
            (59_999, "59.9 s"),
            (60_000, "1 min"),
            (330_000, "5 min 30 s"),
            (7_200_000, "2 h"),
            (273_600_000, "3 d 4 h"),
        ];
        for (millis, text) in cases {
            assert_eq!(human_duration(Duration::from_millis(millis)), text);
        }
    }

    proptest! {
        #[test]
        fn a_setting_survives_its_text(number: u64, millis in 0_u64..1 << 50) {
            prop_assert_eq!(parse_size(&setting_size(number)), Some(number));
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&setting_duration(duration)), Some(duration));
        }

        #[test]
        fn no_text_makes_the_parsers_stumble(text: String) {
            let _ = parse_size(&text);
            let _ = parse_duration(&text);
        }

        #[test]
        fn human_sizes_stay_short(bytes: u64) {
            prop_assert!(human_size(bytes).len() <= "1023.9 KiB".len());
        }
    }
}
