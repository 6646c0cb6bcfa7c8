//! Which stored WAL lies on a way, and the gaps in it.
//!
//! ```text
//! timeline 1  |========|   |=====|                 legs: 1, then a gap, 1, 2
//! timeline 2                   |=========>         its first segment stands for the end of timeline 1
//! ```

use std::collections::BTreeMap;

use crate::pg::{Lsn, SegmentName, SegmentSize, Timeline, TimelineHistory};
use crate::plan::lineage::Coverage;
use crate::plan::window::Gap;

/// A stretch of WAL that is stored on one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leg {
    /// The timeline in the names of its segments.
    pub timeline: Timeline,
    /// Its first byte: that of a segment.
    pub start_lsn: Lsn,
    /// Its end (excluded); inside a segment where the timeline was left, or where stored WAL ends.
    pub end_lsn: Lsn,
}

/// One segment to be read, or a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// A segment.
    Segment(SegmentStop),
    /// Bytes that are not stored.
    Gap(Gap),
}

/// One segment of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentStop {
    /// Its name.
    pub name: SegmentName,
    /// Its number, counted from LSN 0.
    pub number: u64,
    /// Where the timeline was left in it (excluded), or its end.
    pub end_lsn: Lsn,
    /// The segment that goes on where this one ends, if it is stored.
    pub next: Option<SegmentName>,
}

/// The stored WAL on a way, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    legs: Vec<Leg>,
    size: SegmentSize,
}

impl Route {
    /// Finds the route along `way`. A `.partial` counts as its whole segment where nothing else stands for it.
    pub fn along(
        way: &TimelineHistory,
        coverage: &Coverage,
        partials: &BTreeMap<Timeline, Vec<SegmentName>>,
        size: SegmentSize,
    ) -> Self {
        let mut legs: Vec<Leg> = Vec::new();
        for stretch in way.path().into_iter().rev() {
            // The segment of the fork is stored on the new timeline from its first byte.
            let first = size.start_of(size.segment_of(stretch.start_lsn));
            let taken_over = legs.last().map_or(Lsn(u64::MAX), |newer| newer.start_lsn);
            let end = stretch.end_lsn.unwrap_or(Lsn(u64::MAX)).min(taken_over);
            let stored = coverage.get(&stretch.timeline).map_or(&[][..], Vec::as_slice);
            let own = partials.get(&stretch.timeline).map_or(&[][..], Vec::as_slice);
            for (start, stop) in with_partials(stored, own, size).into_iter().rev() {
                let (start_lsn, end_lsn) = (start.max(first), stop.min(end));
                if start_lsn < end_lsn {
                    legs.push(Leg { timeline: stretch.timeline, start_lsn, end_lsn });
                }
            }
        }
        legs.reverse();
        Self { legs, size }
    }

    /// Returns the stretches, oldest first.
    pub fn legs(&self) -> &[Leg] {
        &self.legs
    }

    /// Returns the same WAL without what lies outside `start_lsn` to `end_lsn`; segments stay whole.
    #[must_use]
    pub fn between(&self, start_lsn: Lsn, end_lsn: Lsn) -> Self {
        let first = self.size.start_of(self.size.segment_of(start_lsn));
        let clipped = self.legs.iter().map(|leg| Leg {
            start_lsn: leg.start_lsn.max(first),
            end_lsn: leg.end_lsn.min(end_lsn),
            ..*leg
        });
        Self { legs: clipped.filter(|leg| leg.start_lsn < leg.end_lsn).collect(), ..*self }
    }

    /// Returns the gaps, oldest first.
    pub fn gaps(&self) -> impl Iterator<Item = Gap> + '_ {
        (0..self.legs.len()).filter_map(|at| self.gap_before(at))
    }

    /// Returns every segment and gap, oldest first. Nothing is held: there may be millions of segments.
    pub fn stops(&self) -> impl DoubleEndedIterator<Item = Stop> + '_ {
        (0..self.legs.len()).flat_map(move |at| {
            let gap = self.gap_before(at).map(Stop::Gap);
            let leg = self.legs[at];
            let numbers =
                self.size.segment_of(leg.start_lsn)..self.size.segment_before(leg.end_lsn) + 1;
            let segments = numbers.map(move |number| Stop::Segment(self.stop(at, number)));
            gap.into_iter().chain(segments)
        })
    }

    fn gap_before(&self, at: usize) -> Option<Gap> {
        let before = self.legs.get(at.checked_sub(1)?)?;
        let (start_lsn, end_lsn) = (before.end_lsn, self.legs[at].start_lsn);
        (start_lsn < end_lsn).then_some(Gap { start_lsn, end_lsn })
    }

    fn stop(&self, at: usize, number: u64) -> SegmentStop {
        let leg = self.legs[at];
        let behind = self.size.start_of(number + 1);
        let next_leg = if behind < leg.end_lsn {
            Some(&leg)
        } else {
            // A leg that ends inside a segment has nothing behind it.
            self.legs.get(at + 1).filter(|_| leg.end_lsn == behind)
        };
        let next = next_leg.filter(|next| next.start_lsn <= behind);
        SegmentStop {
            name: SegmentName::new(leg.timeline, number, self.size),
            number,
            end_lsn: leg.end_lsn.min(behind),
            next: next.map(|next| SegmentName::new(next.timeline, number + 1, self.size)),
        }
    }
}

/// Adds the segments that only a `.partial` stands for.
fn with_partials(
    stored: &[(Lsn, Lsn)],
    partials: &[SegmentName],
    size: SegmentSize,
) -> Vec<(Lsn, Lsn)> {
    let mut all = stored.to_vec();
    for start in partials.iter().filter_map(|name| name.start_lsn(size)) {
        if !stored.iter().any(|(from, to)| *from <= start && start < *to) {
            all.push((start, Lsn(start.0.saturating_add(size.bytes()))));
        }
    }
    all.sort_unstable();
    let mut joined: Vec<(Lsn, Lsn)> = Vec::new();
    for (start, end) in all {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    joined
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn seg(n: u64) -> Lsn {
        SIZE.start_of(n)
    }

    /// Timeline 2 forks off in the middle of segment 4.
    fn forked() -> TimelineHistory {
        TimelineHistory::parse(Timeline(2), b"1\t0/4500000\tno recovery target specified\n")
            .unwrap()
    }

    fn route(parts: &[(u32, u64, u64)], partial: Option<u64>) -> Route {
        let mut coverage = Coverage::new();
        for &(timeline, from, to) in parts {
            coverage.entry(Timeline(timeline)).or_default().push((seg(from), seg(to)));
        }
        let partials = partial.map(|number| SegmentName::new(Timeline(1), number, SIZE));
        let partials = partials.map(|name| (Timeline(1), vec![name])).into_iter().collect();
        Route::along(&forked(), &coverage, &partials, SIZE)
    }

    fn told(route: &Route) -> Vec<String> {
        let told = route.stops().map(|stop| match stop {
            Stop::Segment(one) => {
                let end = if one.end_lsn == seg(one.number + 1) { "" } else { "<" };
                let next = one.next.map_or(0, |next| next.timeline.0);
                format!("{}:{}{end}>{next}", one.name.timeline.0, one.number)
            }
            Stop::Gap(gap) => format!("gap {}-{}", gap.start_lsn, gap.end_lsn),
        });
        told.collect()
    }

    #[test]
    fn the_new_timelines_fork_segment_stands_for_the_old_ones() {
        let found = route(&[(1, 3, 6), (2, 4, 6)], None);
        assert_eq!(told(&found), ["1:3>2", "2:4>2", "2:5>0"]);
    }

    #[test]
    fn without_it_the_old_timeline_counts_up_to_the_fork() {
        let found = route(&[(1, 3, 6), (2, 5, 6)], None);
        assert_eq!(told(&found), ["1:3>1", "1:4<>0", "gap 0/4500000-0/5000000", "2:5>0"]);
        let found = route(&[(1, 3, 4)], Some(4));
        assert_eq!(told(&found), ["1:3>1", "1:4<>0"]);
        assert_eq!(told(&found.between(seg(4), seg(9))), ["1:4<>0"]);
    }

    proptest! {
        /// Backwards is the same turned round, and nothing is told twice.
        #[test]
        fn a_route_reads_the_same_both_ways(
            parts in proptest::collection::vec((1u32..3, 1u64..12, 1u64..4), 0..6),
        ) {
            let mut coverage = Coverage::new();
            for (timeline, from, length) in parts {
                coverage.entry(Timeline(timeline)).or_default().push((seg(from), seg(from + length)));
            }
            let found = Route::along(&forked(), &coverage, &BTreeMap::new(), SIZE);
            let forward: Vec<Stop> = found.stops().collect();
            let mut backward: Vec<Stop> = found.stops().rev().collect();
            backward.reverse();
            prop_assert_eq!(&forward, &backward);
            let mut numbers: Vec<u64> = forward.iter().filter_map(|stop| match stop {
                Stop::Segment(one) => Some(one.number),
                Stop::Gap(_) => None,
            }).collect();
            let count = numbers.len();
            numbers.sort_unstable();
            numbers.dedup();
            prop_assert_eq!(numbers.len(), count);
        }
    }
}
