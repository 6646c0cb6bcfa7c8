//! Timeline history files: which timeline owns which stretch of WAL.
//!
//! `00000003.history` lists the ancestors of timeline 3, oldest first, each with
//! the LSN at which it was left; the reason is free text and may end in a blank line:
//!
//! ```text
//! 1<TAB>0/23002B0<TAB>no recovery target specified
//! 2<TAB>0/5000000<TAB>before 2026-11-22 00:29:27+00
//! ```
//!
//! Source: `src/backend/access/transam/timeline.c` (`readTimeLineHistory`,
//! `writeTimeLineHistory`), the same from PostgreSQL 13 to 19.

use super::{Lsn, Timeline};

/// The longest history file that is read, in bytes. A line has some 60 bytes, so this
/// is tens of thousands of promotions.
pub const HISTORY_FILE_BYTES_MAX: usize = 4 << 20;

/// A timeline and the way that led to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: Timeline,
    ancestors: Vec<(Timeline, Lsn)>,
}

/// One stretch of the way to a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimelineStretch {
    /// Who owns it.
    pub timeline: Timeline,
    /// Its first byte (included).
    pub start_lsn: Lsn,
    /// Where the next timeline takes over (excluded), or `None` for the last, which is open.
    pub end_lsn: Option<Lsn>,
}

/// Why bytes are not the history file of a timeline. Reading again cures nothing
/// unless the file was being written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// The file names no ancestor, yet only timeline 1 has none.
    #[error("the history file of timeline {timeline} is empty")]
    Empty {
        /// The timeline in the file's name.
        timeline: Timeline,
    },
    /// The file is larger than any real one.
    #[error("the history file has {found} bytes, more than {HISTORY_FILE_BYTES_MAX}")]
    TooLong {
        /// How many bytes.
        found: usize,
    },
    /// The last line has no end: the file is cut.
    #[error("the history file ends inside line {line}")]
    Cut {
        /// The line, from 1.
        line: usize,
    },
    /// A line is not `timeline<TAB>LSN<TAB>reason`.
    #[error("line {line} of the history file is not `timeline<TAB>LSN<TAB>reason`")]
    BadLine {
        /// The line, from 1.
        line: usize,
    },
    /// Timelines must ascend, and stay below the file's own.
    #[error("line {line} of the history file names timeline {found} out of order")]
    TimelineOutOfOrder {
        /// The line, from 1.
        line: usize,
        /// The timeline found.
        found: Timeline,
    },
    /// Switch points never go back.
    #[error("line {line} of the history file switches at {found}, before the line above it")]
    SwitchOutOfOrder {
        /// The line, from 1.
        line: usize,
        /// The switch point found.
        found: Lsn,
    },
}

impl TimelineHistory {
    /// Returns the history of timeline 1, which has no file.
    pub fn first() -> Self {
        Self { timeline: Timeline::FIRST, ancestors: Vec::new() }
    }

    /// Returns the history in the bytes of `timeline`'s history file.
    pub fn parse(timeline: Timeline, bytes: &[u8]) -> Result<Self, HistoryError> {
        if bytes.len() > HISTORY_FILE_BYTES_MAX {
            return Err(HistoryError::TooLong { found: bytes.len() });
        }
        let mut ancestors: Vec<(Timeline, Lsn)> = Vec::new();
        for (index, text) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
            let line = index + 1;
            let Some(text) = text.strip_suffix(b"\n") else {
                return Err(HistoryError::Cut { line });
            };
            let text = text.trim_ascii_start();
            if text.is_empty() || text.starts_with(b"#") {
                continue;
            }
            let (parent, switch) = parse_line(text).ok_or(HistoryError::BadLine { line })?;
            let last = ancestors.last();
            if parent >= timeline || last.is_some_and(|last| last.0 >= parent) {
                return Err(HistoryError::TimelineOutOfOrder { line, found: parent });
            }
            if last.is_some_and(|last| last.1 > switch) {
                return Err(HistoryError::SwitchOutOfOrder { line, found: switch });
            }
            ancestors.push((parent, switch));
        }
        if ancestors.is_empty() && timeline > Timeline::FIRST {
            return Err(HistoryError::Empty { timeline });
        }
        Ok(Self { timeline, ancestors })
    }

    /// Returns the timeline whose history this is.
    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    /// Returns the ancestors, oldest first, each with the LSN at which it was left (excluded).
    pub fn ancestors(&self) -> &[(Timeline, Lsn)] {
        &self.ancestors
    }

    /// Returns the whole way, oldest first: stretches without hole or overlap,
    /// from LSN 0 to the open end. A stretch is empty where a timeline was left as it began.
    pub fn path(&self) -> Vec<TimelineStretch> {
        let mut start_lsn = Lsn::INVALID;
        let mut path = Vec::with_capacity(self.ancestors.len() + 1);
        for &(timeline, end) in &self.ancestors {
            path.push(TimelineStretch { timeline, start_lsn, end_lsn: Some(end) });
            start_lsn = end;
        }
        path.push(TimelineStretch { timeline: self.timeline, start_lsn, end_lsn: None });
        path
    }

    /// Returns the timeline that owns the byte at `lsn`. The byte at a switch point belongs to the child.
    pub fn owner_of(&self, lsn: Lsn) -> Timeline {
        let left = self.ancestors.iter().find(|(_, switch)| lsn < *switch);
        left.map_or(self.timeline, |(timeline, _)| *timeline)
    }

    /// Returns whether the byte at `lsn` of `timeline` is on the way to this timeline.
    pub fn contains(&self, timeline: Timeline, lsn: Lsn) -> bool {
        self.owner_of(lsn) == timeline
    }

    /// Returns whether WAL of `timeline` that ends at `end_lsn` (excluded) is on
    /// the way to this timeline. A backup that ends exactly at the switch point is.
    pub fn contains_end(&self, timeline: Timeline, end_lsn: Lsn) -> bool {
        match self.switch_point(timeline) {
            Some(switch) => end_lsn <= switch,
            None => timeline == self.timeline,
        }
    }

    /// Returns where `ancestor` was left, or `None` if it is no ancestor.
    pub fn switch_point(&self, ancestor: Timeline) -> Option<Lsn> {
        self.ancestors.iter().find(|(timeline, _)| *timeline == ancestor).map(|(_, lsn)| *lsn)
    }
}

/// Reads `timeline LSN anything`; PostgreSQL takes any white space between them.
fn parse_line(text: &[u8]) -> Option<(Timeline, Lsn)> {
    let mut words =
        text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).map(str::from_utf8);
    let timeline = words.next()?.ok()?;
    let plain = timeline.bytes().all(|byte| byte.is_ascii_digit());
    let timeline: u32 = plain.then(|| timeline.parse().ok()).flatten()?;
    let switch = words.next()?.ok()?.parse().ok()?;
    (timeline != 0).then_some((Timeline(timeline), switch))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use proptest::prelude::*;

    fn three() -> TimelineHistory {
        let text = b"1\t0/23002B0\tno recovery target specified\n\n# remark\n\
                     2\t0/5000000\tbefore 2026-11-22 00:29:27+00\n\n";
        TimelineHistory::parse(Timeline(3), text).unwrap()
    }

    #[test]
    fn each_stretch_ends_where_the_next_begins() {
        let path: Vec<_> = three()
            .path()
            .iter()
            .map(|part| (part.timeline.0, part.start_lsn.0, part.end_lsn.map(|end| end.0)))
            .collect();
        assert_eq!(
            path,
            [
                (1, 0, Some(0x0230_02B0)),
                (2, 0x0230_02B0, Some(0x0500_0000)),
                (3, 0x0500_0000, None)
            ]
        );
    }

    #[test]
    fn the_byte_at_a_switch_belongs_to_the_child() {
        let history = three();
        assert_eq!(history.owner_of(Lsn(0x0230_02AF)), Timeline(1));
        assert_eq!(history.owner_of(Lsn(0x0230_02B0)), Timeline(2));
        assert_eq!(history.owner_of(Lsn(u64::MAX)), Timeline(3));
        assert!(history.contains(Timeline(2), Lsn(0x04FF_FFFF)));
        assert!(!history.contains(Timeline(2), Lsn(0x0500_0000)));
        assert!(history.contains_end(Timeline(2), Lsn(0x0500_0000)));
        assert!(!history.contains_end(Timeline(2), Lsn(0x0500_0001)));
        assert!(history.contains_end(Timeline(3), Lsn(0x0600_0000)));
        assert!(!history.contains_end(Timeline(4), Lsn(0)));
    }

    #[test]
    fn an_empty_file_is_refused_above_timeline_one() {
        for text in [&b""[..], b"\n", b"# nothing\n"] {
            assert_eq!(
                TimelineHistory::parse(Timeline(2), text),
                Err(HistoryError::Empty { timeline: Timeline(2) })
            );
        }
        let first = TimelineHistory::parse(Timeline(1), b"").unwrap();
        assert_eq!(first, TimelineHistory::first());
        assert_eq!(first.owner_of(Lsn(5)), Timeline(1));
    }

    #[test]
    fn garbled_files_are_refused() {
        let bad = |text: &str| TimelineHistory::parse(Timeline(3), text.as_bytes()).unwrap_err();
        assert_eq!(bad("1\t0/100\tx"), HistoryError::Cut { line: 1 });
        for text in ["x\n", "1\n", "1\tnope\tx\n", "+1\t0/1\tx\n", "0\t0/1\tx\n", "\0\0\0\n"] {
            assert_eq!(bad(text), HistoryError::BadLine { line: 1 }, "{text}");
        }
        for text in ["3\t0/100\tx\n", "2\t0/100\tx\n1\t0/200\tx\n", "1\t0/1\tx\n1\t0/2\tx\n"] {
            assert!(matches!(bad(text), HistoryError::TimelineOutOfOrder { .. }), "{text}");
        }
        assert_eq!(
            bad("1\t0/200\tx\n2\t0/100\tx\n"),
            HistoryError::SwitchOutOfOrder { line: 2, found: Lsn(0x100) }
        );
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), timeline: u32) {
            let _ = TimelineHistory::parse(Timeline(timeline), &bytes);
        }

        #[test]
        fn every_lsn_has_exactly_the_owner_whose_stretch_holds_it(
            switches in proptest::collection::vec(0u64..1000, 0..6), lsn in 0u64..1100,
        ) {
            let mut switches = switches;
            switches.sort_unstable();
            let mut text = String::new();
            for (at, switch) in switches.iter().enumerate() {
                writeln!(text, "{}\t0/{switch:X}\tx", at + 1).unwrap();
            }
            let own = Timeline(u32::try_from(switches.len() + 1).unwrap());
            let history = TimelineHistory::parse(own, text.as_bytes()).unwrap();
            let owners: Vec<_> = history.path().into_iter()
                .filter(|part| part.start_lsn.0 <= lsn && part.end_lsn.is_none_or(|end| lsn < end.0))
                .map(|part| part.timeline).collect();
            prop_assert_eq!(owners, vec![history.owner_of(Lsn(lsn))]);
        }
    }
}
