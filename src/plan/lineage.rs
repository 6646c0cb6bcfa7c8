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

use crate::pg::{Lsn, SegmentName, SegmentSize, Timeline, TimelineHistory, TimelineStretch};

/// Stored stretches of WAL by timeline: start included, end excluded, ascending, disjoint.
pub type Coverage = BTreeMap<Timeline, Vec<(Lsn, Lsn)>>;

/// Returns how far stored WAL goes without a hole from `start_lsn` on the way that a history
/// describes: the end (excluded), equal to `start_lsn` when not even that byte is stored.
pub fn unbroken_end(
    way: &TimelineHistory,
    coverage: &Coverage,
    start_lsn: Lsn,
    size: SegmentSize,
) -> Lsn {
    let stretches = way.path();
    let mut at = start_lsn;
    // Each step moves on into another stored stretch, or it is the last.
    while let Some(further) = stretches
        .iter()
        .filter_map(|stretch| step(stretch, coverage, at, size))
        .max()
        .filter(|further| *further > at)
    {
        at = further;
    }
    at
}

/// Returns the stretches between two positions of a way that are not stored, ascending: start included, end excluded.
pub fn holes(
    way: &TimelineHistory,
    coverage: &Coverage,
    from_lsn: Lsn,
    to_lsn: Lsn,
    size: SegmentSize,
) -> Vec<(Lsn, Lsn)> {
    let stretches = way.path();
    let mut holes = Vec::new();
    let mut at = unbroken_end(way, coverage, from_lsn, size);
    while at < to_lsn {
        let nexts = stretches.iter().filter_map(|stretch| next_stored(stretch, coverage, at, size));
        let next = nexts.min().map_or(to_lsn, |next| next.min(to_lsn));
        holes.push((at, next));
        at = unbroken_end(way, coverage, next, size);
    }
    holes
}

/// Returns the first byte behind `at` that is stored of one stretch.
fn next_stored(
    stretch: &TimelineStretch,
    coverage: &Coverage,
    at: Lsn,
    size: SegmentSize,
) -> Option<Lsn> {
    let first = size.start_of(size.segment_of(stretch.start_lsn));
    let ranges = coverage.get(&stretch.timeline)?.iter();
    let starts = ranges.filter(|(_, end)| *end > first).map(|(start, _)| first.max(*start));
    let inside = |start: &Lsn| *start > at && stretch.end_lsn.is_none_or(|end| *start < end);
    starts.filter(inside).min()
}

/// Returns the segment that recovery reads for segment `number`: that of the newest timeline
/// on the way that owns a byte of it below `end_lsn`.
pub fn segment_on(
    way: &TimelineHistory,
    number: u64,
    size: SegmentSize,
    end_lsn: Lsn,
) -> SegmentName {
    let last_byte = Lsn(size.start_of(number + 1).0.min(end_lsn.0).saturating_sub(1));
    SegmentName::new(way.owner_of(last_byte), number, size)
}

/// Returns how far one stretch's stored WAL carries on from `at`.
fn step(stretch: &TimelineStretch, coverage: &Coverage, at: Lsn, size: SegmentSize) -> Option<Lsn> {
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
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;
    const FORK: Lsn = Lsn(0x450_0000);

    fn seg(n: u64) -> Lsn {
        SIZE.start_of(n)
    }

    /// Timeline 2 forks off in the middle of segment 4.
    fn forked() -> TimelineHistory {
        TimelineHistory::parse(Timeline(2), b"1\t0/4500000\tno recovery target specified\n")
            .unwrap()
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
        assert_eq!(unbroken_end(&forked(), &stored, seg(2), SIZE), seg(9));
    }

    #[test]
    fn wal_of_the_old_timeline_past_the_fork_does_not_count() {
        let stored = coverage(&[(1, 1, 9)]);
        assert_eq!(unbroken_end(&forked(), &stored, seg(2), SIZE), FORK);
        assert_eq!(unbroken_end(&TimelineHistory::first(), &stored, seg(2), SIZE), seg(9));
    }

    #[test]
    fn a_hole_ends_the_way() {
        let stored = coverage(&[(1, 1, 3), (1, 4, 9)]);
        let way = TimelineHistory::first();
        assert_eq!(unbroken_end(&way, &stored, seg(1), SIZE), seg(3));
        assert_eq!(unbroken_end(&way, &stored, seg(3), SIZE), seg(3));
        assert_eq!(unbroken_end(&way, &stored, seg(5), SIZE), seg(9));
    }

    #[test]
    fn holes_are_what_lies_between_stored_stretches_of_the_way() {
        let way = TimelineHistory::first();
        let stored = coverage(&[(1, 1, 3), (1, 4, 6), (1, 9, 10)]);
        let holes_of = |from, to| holes(&way, &stored, seg(from), seg(to), SIZE);
        assert_eq!(holes_of(1, 10), [(seg(3), seg(4)), (seg(6), seg(9))]);
        assert_eq!(holes_of(4, 6), []);
        assert_eq!(holes_of(7, 8), [(seg(7), seg(8))]);
        assert_eq!(holes_of(9, 12), [(seg(10), seg(12))]);
        // Past the fork the old timeline's WAL is none of the way.
        let stored = coverage(&[(1, 1, 9), (2, 6, 8)]);
        assert_eq!(holes(&forked(), &stored, seg(2), seg(8), SIZE), [(FORK, seg(6))]);
        let stored = coverage(&[(1, 1, 3), (2, 4, 8)]);
        assert_eq!(holes(&forked(), &stored, seg(2), seg(8), SIZE), [(seg(3), seg(4))]);
    }

    #[test]
    fn the_fork_segment_is_read_from_the_newest_timeline_that_reaches_into_it() {
        let far = Lsn(u64::MAX);
        let name = |number, end| segment_on(&forked(), number, SIZE, end).to_string();
        assert_eq!(name(3, far), "000000010000000000000003");
        assert_eq!(name(4, far), "000000020000000000000004");
        assert_eq!(name(4, FORK), "000000010000000000000004", "WAL ends at the fork");
        assert_eq!(name(5, far), "000000020000000000000005");
    }
}
