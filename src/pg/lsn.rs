//! The small numbers of WAL: LSN, timeline, segment size, system identifier.
//!
//! Sources: PostgreSQL `src/include/access/xlogdefs.h`,
//! `src/include/access/xlog_internal.h`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A byte position in the WAL (`XLogRecPtr`), shown as `X/X` in hexadecimal.
///
/// PostgreSQL 19 pads the low half to eight digits, earlier versions do not;
/// parsing takes both, and comparison is always of the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// `InvalidXLogRecPtr`: no position.
    pub const INVALID: Self = Self(0);

    /// Returns the position `bytes` further on, or `None` past the end of the number space.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// The text was not an LSN of the form `X/X`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an LSN; one looks like `16/B374D848`")]
pub struct ParseLsnError(pub String);

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseLsnError(text.to_owned());
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        let half = |part: &str| {
            // `from_str_radix` would accept a sign.
            let plain = !part.is_empty() && part.len() <= 8 && !part.starts_with('+');
            plain.then(|| u32::from_str_radix(part, 16).ok()).flatten().ok_or_else(bad)
        };
        Ok(Self(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
    }
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A timeline number; never 0. Decimal for people, eight hex digits in file names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Timeline(pub u32);

impl Timeline {
    /// The timeline that `initdb` starts.
    pub const FIRST: Self = Self(1);

    /// Returns the eight hex digits used in file names.
    pub fn hex(self) -> String {
        format!("{:08X}", self.0)
    }

    /// Returns the name of this timeline's history file, `XXXXXXXX.history`.
    pub fn history_file_name(self) -> String {
        format!("{:08X}.history", self.0)
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The 64-bit number that `initdb` gives a cluster; all its physical copies share it.
///
/// Serialised as a decimal string, because JSON readers lose digits above 2^53.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for SystemId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl Serialize for SystemId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for SystemId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The size of a WAL segment: a power of two from 1 MiB to 1 GiB, fixed by
/// `initdb --wal-segsize` (`IsValidWalSegSize` in `xlog_internal.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct SegmentSize(u32);

impl SegmentSize {
    /// PostgreSQL's default, 16 MiB.
    pub const DEFAULT: Self = Self(16 << 20);

    /// Returns the size if `bytes` is legal.
    pub fn new(bytes: u32) -> Option<Self> {
        let legal = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        legal.then_some(Self(bytes))
    }

    /// Parses what `SHOW wal_segment_size` answers, such as `16MB` or `1GB`.
    pub fn parse_setting(text: &str) -> Option<Self> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim() {
            "GB" => 30,
            "MB" => 20,
            "kB" => 10,
            "B" | "" => 0,
            _ => return None,
        };
        let number: u32 = number.parse().ok()?;
        Self::new(number.checked_mul(1 << shift)?)
    }

    /// Returns the size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// Returns how many segments share one `log` number (4 GiB of WAL).
    pub fn per_log(self) -> u64 {
        (1 << 32) / self.bytes()
    }

    /// Returns the number of the segment that contains the byte at `lsn`.
    pub fn segment_of(self, lsn: Lsn) -> u64 {
        lsn.0 / self.bytes()
    }

    /// Returns the number of the segment that holds the last byte before `end_lsn`
    /// (excluded). On a border that is the segment before it.
    pub fn segment_before(self, end_lsn: Lsn) -> u64 {
        end_lsn.0.saturating_sub(1) / self.bytes()
    }

    /// Returns the LSN of the first byte of segment `number`.
    pub fn start_of(self, number: u64) -> Lsn {
        Lsn(number * self.bytes())
    }

    /// Returns the offset of `lsn` within its segment.
    pub fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.0 % self.bytes()
    }
}

impl TryFrom<u32> for SegmentSize {
    type Error = String;

    fn try_from(bytes: u32) -> Result<Self, Self::Error> {
        Self::new(bytes).ok_or_else(|| {
            format!("{bytes} is not a WAL segment size (a power of two, 1 MiB to 1 GiB)")
        })
    }
}

impl From<SegmentSize> for u32 {
    fn from(size: SegmentSize) -> Self {
        size.0
    }
}

impl fmt::Display for SegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0 >> 20)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lsn_text_is_postgresqls() {
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert_eq!(Lsn(0x28).to_string(), "0/28");
        assert_eq!("0/00000028".parse::<Lsn>().unwrap(), Lsn(0x28));
        for bad in ["", "/", "16", "1/2/3", "+1/2", "1/+2", "g/1", "123456789/0", " 1/2"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }

    #[test]
    fn segment_arithmetic_on_a_border_belongs_to_the_segment_before() {
        let size = SegmentSize::DEFAULT;
        assert_eq!(size.segment_of(Lsn(16 << 20)), 1);
        assert_eq!(size.segment_before(Lsn(16 << 20)), 0);
        assert_eq!(size.segment_before(Lsn((16 << 20) + 1)), 1);
        assert_eq!(size.per_log(), 256);
        assert_eq!(SegmentSize::new(1 << 30).unwrap().per_log(), 4);
    }

    #[test]
    fn the_servers_own_text_of_a_size_is_understood() {
        for (text, mib) in [("16MB", 16), ("1GB", 1024), ("1MB", 1), ("65536kB", 64)] {
            assert_eq!(SegmentSize::parse_setting(text), SegmentSize::new(mib << 20), "{text}");
        }
        for bad in ["", "MB", "16", "16TB", "3MB", "9999999999GB", "-16MB"] {
            assert_eq!(SegmentSize::parse_setting(bad), None, "{bad}");
        }
    }

    #[test]
    fn illegal_segment_sizes_are_refused() {
        for bytes in [0, 1, 1 << 19, (16 << 20) + 1, 1 << 31, 3 << 20] {
            assert_eq!(SegmentSize::new(bytes), None, "{bytes}");
        }
    }

    proptest! {
        #[test]
        fn lsn_survives_its_text(n: u64) {
            prop_assert_eq!(Lsn(n).to_string().parse::<Lsn>().unwrap(), Lsn(n));
        }
    }
}
