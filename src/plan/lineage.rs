//! Which timeline owns which part of the WAL on the way to a target, and how far
//! stored WAL reaches along it.
//!
//! ```text
//! timeline 1  |=====================|- - - -   WAL past the fork is not on the way
//! timeline 2                    |===|=======>  its first segment repeats the old WAL up to the fork
//!                               ^   ^
//!                  segment start    switch LSN
//! ```
//!
//! Source: PostgreSQL `src/backend/access/transam/xlogrecovery.c`
//! (`XLogFileReadAnyTLI`) and `timeline.c`.

use std::collections::BTreeMap;

use crate::pg::{Lsn, SegmentSize, Timeline, TimelineHistory};

/// Stored stretches of WAL by timeline: start included, end excluded, ascending, disjoint.
pub type Coverage = BTreeMap<Timeline, Vec<(Lsn, Lsn)>>;

/// The part of the WAL that one timeline owns on the way to a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// The timeline.
    pub timeline: Timeline,
    /// Its first byte (included).
    pub start_lsn: Lsn,
    /// Where the next timeline forks off (excluded); `None` on the last.
    pub end_lsn: Option<Lsn>,
}

/// The way from the beginning to a timeline, oldest stretch first; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lineage {
    stretches: Vec<Stretch>,
}

impl Lineage {
    /// Returns the way to a timeline that has no ancestors.
    pub fn first(timeline: Timeline) -> Self {
        Self { stretches: vec![Stretch { timeline, start_lsn: Lsn(0), end_lsn: None }] }
    }

    /// Returns the way that a history file describes.
    pub fn of(history: &TimelineHistory) -> Self {
        let mut stretches = Vec::with_capacity(history.ancestors.len() + 1);
        let mut start_lsn = Lsn(0);
        for &(timeline, switch_lsn) in &history.ancestors {
            stretches.push(Stretch { timeline, start_lsn, end_lsn: Some(switch_lsn) });
            start_lsn = switch_lsn;
        }
        stretches.push(Stretch { timeline: history.timeline, start_lsn, end_lsn: None });
        Self { stretches }
    }

    /// Returns the stretches, oldest first.
    pub fn stretches(&self) -> &[Stretch] {
        &self.stretches
    }

    /// Returns the timeline it leads to.
    pub fn target(&self) -> Timeline {
        self.stretches.last().map_or(Timeline::FIRST, |stretch| stretch.timeline)
    }

    /// Returns whether `lsn` on `timeline` is on the way. The switch LSN itself is the last
    /// position of the old timeline and the first of the new one.
    pub fn contains(&self, timeline: Timeline, lsn: Lsn) -> bool {
        self.stretches.iter().any(|stretch| {
            stretch.timeline == timeline
                && stretch.start_lsn <= lsn
                && stretch.end_lsn.is_none_or(|end| lsn <= end)
        })
    }

    /// Returns the timeline that owns the byte at `lsn`.
    pub fn owner(&self, lsn: Lsn) -> Timeline {
        let owner = self.stretches.iter().rfind(|stretch| stretch.start_lsn <= lsn);
        owner.map_or(Timeline::FIRST, |stretch| stretch.timeline)
    }

    /// Returns how far stored WAL goes without a hole from `start_lsn`: the end
    /// (excluded), equal to `start_lsn` when not even that byte is stored.
    pub fn unbroken_end(&self, coverage: &Coverage, start_lsn: Lsn, size: SegmentSize) -> Lsn {
        let mut at = start_lsn;
        // Each step moves into another stored stretch or ends.
        while let Some(further) = self
            .stretches
            .iter()
            .filter_map(|stretch| step(stretch, coverage, at, size))
            .max()
            .filter(|further| *further > at)
        {
            at = further;
        }
        at
    }
}

/// Returns how far one stretch's stored WAL carries on from `at`.
fn step(stretch: &Stretch, coverage: &Coverage, at: Lsn, size: SegmentSize) -> Option<Lsn> {
    // The segment of the fork is stored on the new timeline from its first byte.
    let first = size.start_of(size.segment_of(stretch.start_lsn));
    let inside = first <= at && stretch.end_lsn.is_none_or(|end| at < end);
    if !inside {
        return None;
    }
    let ranges = coverage.get(&stretch.timeline)?;
    let (_, range_end) = ranges.iter().find(|(start, end)| *start <= at && at < *end)?;
    Some(stretch.end_lsn.map_or(*range_end, |end| end.min(*range_end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn seg(n: u64) -> Lsn {
        Lsn(n * 16 * MIB)
    }

    fn forked() -> Lineage {
        // Timeline 2 forks off in the middle of segment 4.
        Lineage::of(&TimelineHistory {
            timeline: Timeline(2),
            ancestors: vec![(Timeline(1), Lsn(seg(4).0 + 5 * MIB))],
        })
    }

    fn coverage(parts: &[(u32, u64, u64)]) -> Coverage {
        let mut coverage = Coverage::new();
        for &(timeline, from, to) in parts {
            coverage.entry(Timeline(timeline)).or_default().push((seg(from), seg(to)));
        }
        coverage
    }

    #[test]
    fn the_fork_segment_of_the_new_timeline_stands_for_the_old_one() {
        // The old timeline's segment 4 was never archived; the new one's begins at its start.
        let stored = coverage(&[(1, 1, 4), (2, 4, 9)]);
        let end = forked().unbroken_end(&stored, seg(2), SegmentSize::DEFAULT);
        assert_eq!(end, seg(9));
    }

    #[test]
    fn wal_of_the_old_timeline_past_the_fork_does_not_count() {
        let stored = coverage(&[(1, 1, 9)]);
        let end = forked().unbroken_end(&stored, seg(2), SegmentSize::DEFAULT);
        assert_eq!(end, Lsn(seg(4).0 + 5 * MIB));
        let own = Lineage::first(Timeline(1)).unbroken_end(&stored, seg(2), SegmentSize::DEFAULT);
        assert_eq!(own, seg(9));
    }

    #[test]
    fn a_hole_ends_the_way() {
        let stored = coverage(&[(1, 1, 3), (1, 4, 9)]);
        let way = Lineage::first(Timeline(1));
        assert_eq!(way.unbroken_end(&stored, seg(1), SegmentSize::DEFAULT), seg(3));
        assert_eq!(way.unbroken_end(&stored, seg(3), SegmentSize::DEFAULT), seg(3));
        assert_eq!(way.unbroken_end(&stored, seg(5), SegmentSize::DEFAULT), seg(9));
    }

    #[test]
    fn a_backup_past_the_fork_on_the_old_timeline_is_not_on_the_way() {
        let way = forked();
        assert!(way.contains(Timeline(1), seg(4)));
        assert!(!way.contains(Timeline(1), seg(5)));
        assert!(way.contains(Timeline(2), seg(5)));
        assert!(!way.contains(Timeline(2), seg(4)));
        assert_eq!((way.owner(seg(4)), way.owner(seg(5))), (Timeline(1), Timeline(2)));
    }
}
