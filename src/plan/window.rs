//! The recovery window: from when to when this cluster can be brought back, and what a loss takes from it.
//!
//! ```text
//! backups         A     B              C          D
//! WAL        =====|=====|====      ====|==========|======
//! reachable         |------->           |---------------->    a stretch begins where its oldest backup is consistent
//!                            ^    ^ hole
//! ```

use super::lineage::{Coverage, unbroken_end};
use super::restore::{Candidate, Holdings, candidates, lies_on, way};
use super::target::TimelineChoice;
use crate::format::Committed;
use crate::pg::{Lsn, PgTimestamp, SegmentSize, Timeline, TimelineHistory};

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

/// Moments that recovery can reach on one way, without a hole between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch<'a> {
    /// The oldest backup that reaches any of them.
    pub oldest: &'a Committed,
    /// Where they begin (included): where that backup is consistent.
    pub start_lsn: Lsn,
    /// How far WAL goes (included: recovery can end there).
    pub end_lsn: Lsn,
}

impl Stretch<'_> {
    /// Returns the earliest time that can be asked for.
    pub fn earliest_time(&self) -> PgTimestamp {
        self.oldest.reaches_from
    }
}

/// Returns everything that can be reached on a way, ascending; stretches neither overlap nor touch.
pub fn stretches<'a>(holdings: &Holdings<'a>, way: &TimelineHistory) -> Vec<Stretch<'a>> {
    let mut usable = candidates(holdings, way, None).unwrap_or_default();
    usable.sort_by_key(|candidate| candidate.backup.stop_lsn);
    let mut found: Vec<Stretch<'a>> = Vec::new();
    for Candidate { backup, unbroken_end } in usable {
        match found.last_mut() {
            Some(last) if backup.stop_lsn <= last.end_lsn => {
                last.end_lsn = last.end_lsn.max(unbroken_end);
            }
            _ => found.push(Stretch {
                oldest: backup,
                start_lsn: backup.stop_lsn,
                end_lsn: unbroken_end,
            }),
        }
    }
    found
}

/// Moments that something takes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost<'a> {
    /// The last position that is still reached before them; `None` if nothing before them is.
    pub after_lsn: Option<Lsn>,
    /// The first of them.
    pub start_lsn: Lsn,
    /// Where they end: the last of them, or the first that is reached again.
    pub end_lsn: Lsn,
    /// What is reached again behind them; `None` where they go on up to the end of the archive.
    pub before: Option<Stretch<'a>>,
}

/// Returns which moments could be reached `before` and cannot be `after`; both as [`stretches`] gives them.
pub fn lost<'a>(before: &[Stretch<'_>], after: &[Stretch<'a>]) -> Vec<Lost<'a>> {
    let mut all = Vec::new();
    for whole in before {
        let mut at = whole.start_lsn;
        let mut reached: Option<Lsn> = None;
        let inside = after
            .iter()
            .filter(|left| left.end_lsn >= whole.start_lsn && left.start_lsn <= whole.end_lsn);
        for left in inside {
            if left.start_lsn > at {
                all.push(Lost {
                    after_lsn: reached,
                    start_lsn: at,
                    end_lsn: left.start_lsn,
                    before: Some(*left),
                });
            }
            at = at.max(left.end_lsn);
            reached = Some(left.end_lsn);
        }
        if at < whole.end_lsn || reached.is_none() {
            let before = after.iter().find(|left| left.start_lsn > whole.end_lsn).copied();
            all.push(Lost { after_lsn: reached, start_lsn: at, end_lsn: whole.end_lsn, before });
        }
    }
    all
}

/// A hole in stored WAL on a way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hole {
    /// The timeline that owns its first byte.
    pub timeline: Timeline,
    /// The first byte that is missing.
    pub start_lsn: Lsn,
    /// Where WAL is stored again (excluded).
    pub end_lsn: Lsn,
}

/// Returns the holes along a way from `from_lsn` up to the last WAL that is stored on it; and, if that does not
/// even reach `to_lsn`, the hole up to there.
pub fn holes(
    way: &TimelineHistory,
    coverage: &Coverage,
    size: SegmentSize,
    from_lsn: Lsn,
    to_lsn: Lsn,
) -> Vec<Hole> {
    let mut found = Vec::new();
    let mut at = from_lsn;
    loop {
        let end = unbroken_end(way, coverage, at, size);
        let next = next_stored(way, coverage, size, end);
        let Some(next) = next.or((end < to_lsn).then_some(to_lsn)) else { return found };
        found.push(Hole { timeline: way.owner_of(end), start_lsn: end, end_lsn: next });
        at = next;
        if next == to_lsn
            && next_stored(way, coverage, size, Lsn(next.0.saturating_sub(1))).is_none()
        {
            return found;
        }
    }
}

/// Returns the first position behind `lsn` at which WAL of a way is stored.
fn next_stored(
    way: &TimelineHistory,
    coverage: &Coverage,
    size: SegmentSize,
    lsn: Lsn,
) -> Option<Lsn> {
    let of_stretch = |stretch: crate::pg::TimelineStretch| {
        // The segment of the fork is stored on the new timeline from its first byte.
        let first = size.start_of(size.segment_of(stretch.start_lsn));
        let ranges = coverage.get(&stretch.timeline).map_or(&[][..], Vec::as_slice);
        let starts = ranges.iter().filter(move |(_, end)| *end > first.max(Lsn(lsn.0 + 1)));
        let starts = starts.map(move |(start, _)| (*start).max(first).max(Lsn(lsn.0 + 1)));
        starts.filter(move |start| stretch.end_lsn.is_none_or(|end| *start < end)).min()
    };
    way.path().into_iter().filter_map(of_stretch).min()
}

/// Returns stored WAL as it would be with the holes of a way filled.
pub fn filled(coverage: &Coverage, way: &TimelineHistory, holes: &[Hole]) -> Coverage {
    let mut all = coverage.clone();
    for hole in holes {
        for stretch in way.path() {
            let start = hole.start_lsn.max(stretch.start_lsn);
            let end = stretch.end_lsn.map_or(hole.end_lsn, |end| end.min(hole.end_lsn));
            if start < end {
                add(all.entry(stretch.timeline).or_default(), start, end);
            }
        }
    }
    all
}

fn add(ranges: &mut Vec<(Lsn, Lsn)>, start: Lsn, end: Lsn) {
    ranges.push((start, end));
    ranges.sort_unstable();
    let mut merged: Vec<(Lsn, Lsn)> = Vec::with_capacity(ranges.len());
    for (start, end) in ranges.drain(..) {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    *ranges = merged;
}

/// Returns stored WAL without that of one timeline from `start_lsn` to `end_lsn` (excluded).
pub fn without(coverage: &Coverage, timeline: Timeline, start_lsn: Lsn, end_lsn: Lsn) -> Coverage {
    let mut all = coverage.clone();
    if let Some(ranges) = all.get_mut(&timeline) {
        let parts = ranges.iter().flat_map(|(start, end)| {
            [(*start, (*end).min(start_lsn)), ((*start).max(end_lsn), *end)]
        });
        *ranges = parts.filter(|(start, end)| start < end).collect();
    }
    all
}

/// Returns the ways to all timelines of which WAL is stored or that a backup ended on, and whose history is known;
/// oldest timeline first.
pub fn ways(holdings: &Holdings<'_>) -> Vec<TimelineHistory> {
    let of_backups = holdings.backups.iter().map(|backup| backup.stop_timeline);
    let mut timelines: Vec<Timeline> =
        holdings.coverage.keys().copied().chain(of_backups).collect();
    timelines.sort_unstable();
    timelines.dedup();
    let ways = timelines.into_iter().filter_map(|timeline| {
        let known = holdings.histories.get(&timeline).cloned();
        known.or_else(|| (timeline == Timeline::FIRST).then(TimelineHistory::first))
    });
    ways.collect()
}

/// Returns the holes that keep backups from what should be reached from them: on each way the holes behind the oldest
/// backup from which `for_recovery` wants everything, and of every other backup those in its own WAL.
pub fn harmful_holes(
    holdings: &Holdings<'_>,
    for_recovery: impl Fn(&Committed) -> bool,
) -> Vec<Hole> {
    let mut found = Vec::new();
    let (coverage, size) = (holdings.coverage, holdings.segment_size);
    for way in ways(holdings) {
        let on_the_way = || holdings.backups.iter().filter(|backup| lies_on(&way, backup));
        let oldest = on_the_way().filter(|b| for_recovery(b)).min_by_key(|b| b.start_lsn);
        if let Some(oldest) = oldest {
            found.extend(holes(&way, coverage, size, oldest.start_lsn, oldest.stop_lsn));
        }
        for backup in on_the_way() {
            let own = holes(&way, coverage, size, backup.start_lsn, backup.stop_lsn).into_iter();
            found.extend(own.filter(|hole| hole.start_lsn < backup.stop_lsn));
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
