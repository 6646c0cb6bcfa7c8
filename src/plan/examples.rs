//! Backups as values, for the tests of this room.

use std::collections::BTreeMap;

use super::lineage::Coverage;
use super::restore::Holdings;
use crate::format::{BackupId, Committed};
use crate::pg::{Lsn, PgTimestamp, SegmentSize, Timeline, TimelineHistory};

/// The segment size of every example.
pub(super) const SIZE: SegmentSize = SegmentSize::DEFAULT;

/// Returns the first byte of segment `number`.
pub(super) fn seg(number: u64) -> Lsn {
    SIZE.start_of(number)
}

/// A backup that began in second `second` of the epoch and whose WAL goes from `start_lsn` to `stop_lsn`.
pub(super) fn backup(
    second: i64,
    timeline: u32,
    start_lsn: Lsn,
    stop_lsn: Lsn,
    reaches_from: i64,
) -> Committed {
    let began = jiff::Timestamp::from_second(second).unwrap_or_default();
    Committed {
        segment_size: SIZE,
        timeline: Timeline(timeline),
        start_lsn,
        stop_lsn,
        stop_timeline: Timeline(timeline),
        reaches_from: PgTimestamp(reaches_from),
        ..Committed::example(BackupId::at(began, 1))
    }
}

/// What a repository holds, owned.
#[derive(Default)]
pub(super) struct Archive {
    pub(super) backups: Vec<Committed>,
    pub(super) coverage: Coverage,
    pub(super) histories: BTreeMap<Timeline, TimelineHistory>,
}

impl Archive {
    pub(super) fn with_backups(backups: impl IntoIterator<Item = Committed>) -> Self {
        Self { backups: backups.into_iter().collect(), ..Self::default() }
    }

    /// Adds stored WAL from segment `from` up to the start of segment `to`.
    pub(super) fn wal(mut self, timeline: u32, from: u64, to: u64) -> Self {
        self.coverage.entry(Timeline(timeline)).or_default().push((seg(from), seg(to)));
        self
    }

    /// Adds a timeline and the ancestors that its history file names.
    pub(super) fn history(mut self, timeline: u32, ancestors: &[(u32, Lsn)]) -> Self {
        let mut lines = String::new();
        for (parent, switch) in ancestors {
            lines.push_str(&format!("{parent}\t{switch}\ttest\n"));
        }
        let timeline = Timeline(timeline);
        if let Ok(history) = TimelineHistory::parse(timeline, lines.as_bytes()) {
            self.histories.insert(timeline, history);
        }
        self
    }

    pub(super) fn holdings(&self) -> Holdings<'_> {
        Holdings {
            backups: &self.backups,
            coverage: &self.coverage,
            histories: &self.histories,
            segment_size: SIZE,
        }
    }
}
