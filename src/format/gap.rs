//! `gap/<system id>/<timeline>-<start>-<end>.json`: WAL that was let go because the store could not take it.
//!
//! Never here: when WAL is let go, or when a gap harms nobody any more (`plan::stall`).

use serde::{Deserialize, Serialize};

use super::Document;
use crate::pg::{Lsn, PgTimestamp, SystemId, Timeline};

/// A stretch of WAL of which the server was told that it is archived, and which nobody has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalGap {
    /// The format version.
    pub format: u32,
    /// Whose WAL it is.
    pub system_identifier: SystemId,
    /// Its timeline.
    pub timeline: Timeline,
    /// The first byte that was let go (included).
    pub start_lsn: Lsn,
    /// Where WAL goes on (excluded from the gap).
    pub end_lsn: Lsn,
    /// When its first segment was let go, by the clock of the host that did it.
    pub let_go_at: PgTimestamp,
    /// Why, in words.
    pub why: String,
    /// The host that let it go.
    pub host: String,
    /// The version of Highwater.
    pub tool: String,
}

impl WalGap {
    /// Returns the tail of its key below `gap/<system id>/`: 8 hex digits of the timeline and 16 of each end.
    pub fn tail(&self) -> String {
        format!("{:08X}-{:016X}-{:016X}.json", self.timeline.0, self.start_lsn.0, self.end_lsn.0)
    }

    /// Returns whether any byte from `start` to `end` (excluded) of a timeline is in it.
    pub fn overlaps(&self, timeline: Timeline, start: Lsn, end: Lsn) -> bool {
        self.timeline == timeline && self.start_lsn < end && start < self.end_lsn
    }
}

impl Document for WalGap {
    const WHAT: &'static str = "record of a gap";

    fn format(&self) -> u32 {
        self.format
    }
}

/// Parses the tail of a key below `gap/`: whose WAL, of which timeline, from where to where.
pub fn parse_gap(tail: &str) -> Option<(SystemId, Timeline, Lsn, Lsn)> {
    let (system_id, name) = tail.split_once('/')?;
    let mut parts = name.strip_suffix(".json")?.split('-');
    let mut number = |digits: usize| {
        let part = parts.next().filter(|part| part.len() == digits)?;
        let is_hex = part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
        is_hex.then(|| u64::from_str_radix(part, 16).ok()).flatten()
    };
    let (timeline, start, end) = (number(8)?, number(16)?, number(16)?);
    let timeline = Timeline(u32::try_from(timeline).ok()?);
    let is_all = parts.next().is_none() && start < end;
    is_all.then_some((system_id.parse().ok()?, timeline, Lsn(start), Lsn(end)))
}

#[cfg(test)]
impl WalGap {
    /// A gap on timeline 1 of cluster 7, for tests here and above.
    pub fn sample(start: u64, end: u64) -> Self {
        Self {
            format: 1,
            system_identifier: SystemId(7),
            timeline: Timeline(1),
            start_lsn: Lsn(start),
            end_lsn: Lsn(end),
            let_go_at: PgTimestamp(0),
            why: "the store was away".to_owned(),
            host: "h".to_owned(),
            tool: "t".to_owned(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn gap(timeline: u32, start: u64, end: u64) -> WalGap {
        WalGap { timeline: Timeline(timeline), ..WalGap::sample(start, end) }
    }

    #[test]
    fn its_name_is_as_the_format_page_draws_it() {
        let gap = gap(1, 0xA_FE00_0000, 0xA_FF00_0000);
        assert_eq!(gap.tail(), "00000001-0000000AFE000000-0000000AFF000000.json");
        for bad in ["7/x", "7/1-2-3.json", "x/00000001-0000000AFE000000-0000000AFF000000.json"] {
            assert_eq!(parse_gap(bad), None, "{bad}");
        }
        let swapped = format!("7/{}", super::tests::gap(1, 5, 5).tail());
        assert_eq!(parse_gap(&swapped), None, "nothing between its ends");
    }

    proptest! {
        #[test]
        fn names_are_read_back(timeline: u32, start: u64, length in 1_u64..u64::MAX) {
            let Some(end) = start.checked_add(length) else { return Ok(()) };
            let gap = gap(timeline, start, end);
            let read = parse_gap(&format!("7/{}", gap.tail()));
            prop_assert_eq!(read, Some((SystemId(7), gap.timeline, gap.start_lsn, gap.end_lsn)));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = parse_gap(&text);
        }
    }
}
