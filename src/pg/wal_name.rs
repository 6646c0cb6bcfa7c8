//! Names of the files that PostgreSQL archives and asks back.
//!
//! ```text
//! 000000010000000A000000FE               segment: timeline, log, segment, 8 hex digits each
//! 000000010000000A000000FE.partial       last segment of a timeline that was left by promotion
//! 000000010000000A000000FE.00000028.backup   backup history file
//! 00000002.history                       timeline history file
//! ```
//!
//! Source: PostgreSQL `src/include/access/xlog_internal.h` (`XLogFileName` and
//! its siblings) and `src/backend/postmaster/pgarch.c` (upper-case hex only).

use std::fmt;

use super::{Lsn, SegmentSize, Timeline};

/// The name of one WAL segment. Its position needs the segment size as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline in the first eight digits.
    pub timeline: Timeline,
    /// The 4 GiB unit of WAL in the second eight digits.
    pub log: u32,
    /// The number within the unit, in the last eight digits.
    pub seg: u32,
}

impl SegmentName {
    /// Returns the name of segment `number` on `timeline`.
    pub fn new(timeline: Timeline, number: u64, size: SegmentSize) -> Self {
        let per_log = size.per_log();
        // A segment number of a 64-bit LSN divided by at most 4096 per log fits 32 bits.
        #[allow(clippy::cast_possible_truncation)]
        Self { timeline, log: (number / per_log) as u32, seg: (number % per_log) as u32 }
    }

    /// Returns the name of the segment holding the byte at `lsn`.
    pub fn containing(timeline: Timeline, lsn: Lsn, size: SegmentSize) -> Self {
        Self::new(timeline, size.segment_of(lsn), size)
    }

    /// Returns the segment number, or `None` when the last part is too large for `size`.
    pub fn number(self, size: SegmentSize) -> Option<u64> {
        let per_log = size.per_log();
        (u64::from(self.seg) < per_log).then(|| u64::from(self.log) * per_log + u64::from(self.seg))
    }

    /// Returns the LSN of the segment's first byte, or `None` as [`Self::number`] does.
    pub fn start_lsn(self, size: SegmentSize) -> Option<Lsn> {
        self.number(size).map(|number| size.start_of(number))
    }

    /// Parses exactly 24 upper-case hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        let part = |range: std::ops::Range<usize>| {
            let digits = text.get(range)?;
            is_upper_hex(digits).then(|| u32::from_str_radix(digits, 16).ok()).flatten()
        };
        if text.len() != 24 {
            return None;
        }
        let timeline = Timeline(part(0..8)?);
        (timeline.0 != 0).then_some(Self { timeline, log: part(8..16)?, seg: part(16..24)? })
    }

    /// Returns the 16 digits (timeline and log) under which the repository groups segments.
    pub fn group(self) -> String {
        format!("{:08X}{:08X}", self.timeline.0, self.log)
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.0, self.log, self.seg)
    }
}

/// Any name that PostgreSQL offers to `archive_command` or asks of `restore_command`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalFileName {
    /// A complete segment.
    Segment(SegmentName),
    /// The incomplete last segment of a timeline, kept at promotion.
    Partial(SegmentName),
    /// A backup history file; the number is the start offset within the segment.
    Backup(SegmentName, u32),
    /// A timeline history file.
    History(Timeline),
}

/// What [`WalFileName::archive_order`] compares: false for histories; timeline, segment, and what stands behind it.
pub type ArchiveOrder = (bool, Timeline, Option<SegmentName>, u64);

/// The text is not the name of a WAL file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not the name of a WAL file (24 upper-case hex digits, or the same with `.partial` or `.<8 digits>.backup`, or `<8 digits>.history`)"
)]
pub struct WalFileNameError(pub String);

impl WalFileName {
    /// Parses a bare file name, without any directory.
    pub fn parse(text: &str) -> Result<Self, WalFileNameError> {
        Self::parse_opt(text).ok_or_else(|| WalFileNameError(text.to_owned()))
    }

    fn parse_opt(text: &str) -> Option<Self> {
        if let Some(digits) = text.strip_suffix(".history") {
            let legal = digits.len() == 8 && is_upper_hex(digits);
            let timeline = legal.then(|| u32::from_str_radix(digits, 16).ok()).flatten()?;
            return (timeline != 0).then_some(Self::History(Timeline(timeline)));
        }
        let (name, rest) = text.split_at_checked(24)?;
        let segment = SegmentName::parse(name)?;
        match rest {
            "" => Some(Self::Segment(segment)),
            ".partial" => Some(Self::Partial(segment)),
            _ => {
                let digits = rest.strip_prefix('.')?.strip_suffix(".backup")?;
                let legal = digits.len() == 8 && is_upper_hex(digits);
                let offset = legal.then(|| u32::from_str_radix(digits, 16).ok()).flatten()?;
                Some(Self::Backup(segment, offset))
            }
        }
    }

    /// Returns what puts files into the order in which PostgreSQL archives those that wait: timeline histories first,
    /// then by name (`ready_file_comparator` in `src/backend/postmaster/pgarch.c`).
    pub fn archive_order(self) -> ArchiveOrder {
        match self {
            Self::History(timeline) => (false, timeline, None, 0),
            Self::Segment(name) => (true, name.timeline, Some(name), 0),
            Self::Backup(name, offset) => (true, name.timeline, Some(name), 1 + u64::from(offset)),
            Self::Partial(name) => (true, name.timeline, Some(name), u64::MAX),
        }
    }

    /// Returns the segment that the name contains; a history file has none.
    pub fn segment(self) -> Option<SegmentName> {
        match self {
            Self::Segment(name) | Self::Partial(name) | Self::Backup(name, _) => Some(name),
            Self::History(_) => None,
        }
    }
}

impl fmt::Display for WalFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(name) => write!(f, "{name}"),
            Self::Partial(name) => write!(f, "{name}.partial"),
            Self::Backup(name, offset) => write!(f, "{name}.{offset:08X}.backup"),
            Self::History(timeline) => write!(f, "{:08X}.history", timeline.0),
        }
    }
}

fn is_upper_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_archived_kind_of_name_is_understood() {
        for text in [
            "000000010000000A000000FE",
            "000000010000000A000000FE.partial",
            "000000010000000A000000FE.00000028.backup",
            "0000000A.history",
        ] {
            assert_eq!(WalFileName::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn files_wait_for_the_archiver_histories_first_and_then_by_name() {
        // As `strcmp` has them, but for the histories.
        let wanted = [
            "00000002.history",
            "0000000A.history",
            "000000010000000A000000FE",
            "000000010000000A000000FE.00000028.backup",
            "000000010000000A000000FE.FFFFFFFF.backup",
            "000000010000000A000000FE.partial",
            "000000010000000B00000000",
            "000000020000000000000000",
        ];
        let mut names: Vec<_> = wanted.map(|text| WalFileName::parse(text).unwrap()).to_vec();
        names.reverse();
        names.sort_by_key(|name| name.archive_order());
        let sorted: Vec<_> = names.iter().map(ToString::to_string).collect();
        assert_eq!(sorted, wanted);
    }

    #[test]
    fn malformed_names_are_refused() {
        for text in [
            "",
            "RECOVERYXLOG",
            "000000010000000a000000fe",
            "000000010000000A000000F",
            "000000010000000A000000FE0",
            "000000000000000A000000FE",
            "00000000.history",
            "2.history",
            "000000010000000A000000FE.backup",
            "000000010000000A000000FE.00000028",
            "000000010000000A000000FE.gz",
            "pg_wal/000000010000000A000000FE",
            "00000001000000000000000é",
        ] {
            assert!(WalFileName::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_third_part_wraps_at_four_gib_for_every_segment_size() {
        for (mib, last) in [(1, 0xFFF), (16, 0xFF), (64, 0x3F), (1024, 0x3)] {
            let size = SegmentSize::new(mib << 20).unwrap();
            let name = SegmentName::new(Timeline(3), size.per_log() - 1, size);
            assert_eq!((name.log, name.seg), (0, last));
            let next = SegmentName::new(Timeline(3), size.per_log(), size);
            assert_eq!((next.log, next.seg), (1, 0));
            let too_large = SegmentName { seg: last + 1, ..name };
            assert_eq!(too_large.number(size), None);
        }
    }

    proptest! {
        #[test]
        fn a_segment_name_finds_its_position_again(
            timeline in 1u32.., lsn: u64, shift in 20u32..=30,
        ) {
            let size = SegmentSize::new(1 << shift).unwrap();
            let name = SegmentName::containing(Timeline(timeline), Lsn(lsn), size);
            let start = name.start_lsn(size).unwrap();
            prop_assert!(start.0 <= lsn && lsn - start.0 < size.bytes());
            prop_assert_eq!(WalFileName::parse(&name.to_string()).unwrap(), WalFileName::Segment(name));
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = WalFileName::parse(&text);
        }
    }
}
