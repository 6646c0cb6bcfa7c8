//! The recovery window: from when to when this cluster can be brought back.

use super::lineage::Coverage;
use super::restore::{Candidate, Holdings, candidates, way};
use super::target::TimelineChoice;
use crate::pg::{Lsn, PgTimestamp, Timeline, TimelineHistory};

/// A hole in the WAL of one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The first byte that is missing (included).
    pub start_lsn: Lsn,
    /// The first byte that is stored again (excluded from the gap).
    pub end_lsn: Lsn,
}

/// Returns the holes between the stored stretches of one timeline.
pub fn gaps(coverage: &Coverage, timeline: Timeline) -> Vec<Gap> {
    let ranges = coverage.get(&timeline).map_or(&[][..], Vec::as_slice);
    ranges.windows(2).map(|pair| Gap { start_lsn: pair[0].1, end_lsn: pair[1].0 }).collect()
}

/// The window along the newest timeline that a backup can follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window<'a> {
    /// The way it lies on.
    pub way: TimelineHistory,
    /// The oldest usable backup whose WAL goes on unbroken to the end; recovery can begin from it.
    pub oldest: Candidate<'a>,
    /// The newest usable backup.
    pub newest: Candidate<'a>,
}

impl Window<'_> {
    /// Returns the earliest time that can be asked for.
    pub fn earliest_time(&self) -> PgTimestamp {
        self.oldest.backup.reaches_from
    }

    /// Returns the earliest LSN that can be asked for.
    pub fn earliest_lsn(&self) -> Lsn {
        self.oldest.backup.stop_lsn
    }

    /// Returns how far WAL goes without a hole (excluded).
    pub fn latest_lsn(&self) -> Lsn {
        self.newest.unbroken_end
    }
}

/// Returns the window that ends latest: along the newest timeline, from the oldest backup from which
/// WAL is unbroken up to the end. Backups before a gap have windows of their own, which end there.
pub fn window<'a>(holdings: &Holdings<'a>) -> Option<Window<'a>> {
    let newest_first = |choice| {
        let way = way(holdings, choice, None).ok()?;
        let candidates = candidates(holdings, &way, None).ok()?;
        let newest = *candidates.first()?;
        let oldest = *candidates.iter().rfind(|c| c.unbroken_end == newest.unbroken_end)?;
        Some(Window { way, oldest, newest })
    };
    // The newest timeline may be one that no backup leads to: that of a copy
    // which archived into this place by mistake.
    newest_first(TimelineChoice::Latest).or_else(|| newest_first(TimelineChoice::Current))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
