//! Which WAL stays, segment by segment, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use super::backups::{Lives, timelines, way_to};
use super::{BackupFate, Incarnation, Stock};
use crate::format::{BackupId, Committed};
use crate::pg::{Lsn, SegmentName, SegmentSize, SystemId, Timeline, TimelineHistory};
use crate::plan::restore::lies_on;

/// The segment behind the last: a stretch that goes on for ever ends there.
const OPEN_END: u64 = u64::MAX;

/// Why a stretch of WAL stays.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum WalReason {
    /// Recovery from this backup on reads it.
    Recovery(BackupId),
    /// This self-contained backup needs it to become consistent.
    Own(BackupId),
    /// The timeline is alive, and no usable backup lies on the way to it yet.
    NoBackupYet,
    /// The timeline's history file is not stored, so that nobody can tell who needs it.
    NoHistory,
    /// A backup cannot be read, so that nobody can tell which WAL it needs.
    Unreadable,
}

impl fmt::Display for WalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Recovery(id) => write!(f, "recovery to any moment since backup {id}"),
            Self::Own(id) => write!(f, "backup {id} alone"),
            Self::NoBackupYet => f.write_str("no usable backup leads to this timeline yet"),
            Self::NoHistory => f.write_str("the history file of this timeline is missing"),
            Self::Unreadable => f.write_str("a backup cannot be read, and may need it"),
        }
    }
}

/// A stretch of one timeline's WAL that stays.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct WalStretch {
    /// The first segment's number (included).
    pub first: u64,
    /// The number behind the last segment (excluded); `None` where it goes on for ever.
    pub end: Option<u64>,
    /// Why it stays.
    pub why: WalReason,
}

/// Which WAL of one incarnation stays. Timelines that the plan does not know stay whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptWal {
    /// The WAL segment size.
    pub segment_size: SegmentSize,
    /// For each timeline that was known, what stays of it, ascending; the rest goes.
    pub timelines: BTreeMap<Timeline, Vec<WalStretch>>,
    /// The same as ranges of segment numbers that neither touch nor overlap.
    ranges: BTreeMap<Timeline, Vec<Range<u64>>>,
}

impl KeptWal {
    fn new(segment_size: SegmentSize, stretches: BTreeMap<Timeline, BTreeSet<WalStretch>>) -> Self {
        let ranges = stretches.iter().map(|(timeline, stretches)| (*timeline, joined(stretches)));
        let ranges = ranges.collect();
        let stretches = stretches.into_iter();
        let timelines = stretches.map(|(timeline, all)| (timeline, all.into_iter().collect()));
        Self { segment_size, timelines: timelines.collect(), ranges }
    }

    /// Returns whether everything that belongs to a segment stays: itself, its pieces, its `.partial`, its `.backup`.
    pub fn keeps(&self, segment: SegmentName) -> bool {
        let Some(number) = segment.number(self.segment_size) else { return true };
        self.keeps_all(segment.timeline, number..number + 1)
    }

    /// Returns whether all of these segments of a timeline stay.
    pub fn keeps_all(&self, timeline: Timeline, numbers: Range<u64>) -> bool {
        let Some(ranges) = self.ranges.get(&timeline) else { return true };
        ranges.iter().any(|kept| kept.start <= numbers.start && numbers.end <= kept.end)
    }

    /// Returns what of these segments of a timeline goes, ascending.
    pub fn going(&self, timeline: Timeline, numbers: Range<u64>) -> Vec<Range<u64>> {
        let Some(kept) = self.ranges.get(&timeline) else { return Vec::new() };
        let mut going = Vec::new();
        let mut at = numbers.start;
        for range in kept {
            if range.start > at {
                going.push(at..range.start.min(numbers.end));
            }
            at = at.max(range.end);
            if at >= numbers.end {
                break;
            }
        }
        if at < numbers.end {
            going.push(at..numbers.end);
        }
        going.retain(|range| !range.is_empty());
        going
    }
}

fn joined(stretches: &BTreeSet<WalStretch>) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    // Sorted by their first segment.
    for WalStretch { first, end, .. } in stretches {
        let end = end.unwrap_or(OPEN_END);
        match out.last_mut() {
            Some(last) if *first <= last.end => last.end = last.end.max(end),
            _ => out.push(*first..end),
        }
    }
    out
}

/// Decides about the WAL of every incarnation.
pub(super) fn kept(
    stock: &Stock,
    lives: &Lives,
    backups: &[BackupFate],
) -> BTreeMap<SystemId, KeptWal> {
    let fates: BTreeMap<&BackupId, &BackupFate> =
        backups.iter().map(|fate| (&fate.id, fate)).collect();
    let of = |one: &Incarnation| {
        let mut keeping = Keeping { one, stretches: BTreeMap::new() };
        for timeline in timelines(one) {
            keeping.stretches.entry(timeline).or_default();
        }
        if !stock.unreadable.is_empty() {
            keeping.keep_everything();
        }
        keeping.keep_for_recovery(lives, &fates);
        keeping.keep_own(&fates);
        (one.system_id, KeptWal::new(one.segment_size, keeping.stretches))
    };
    stock.incarnations.iter().map(of).collect()
}

struct Keeping<'a> {
    one: &'a Incarnation,
    stretches: BTreeMap<Timeline, BTreeSet<WalStretch>>,
}

impl Keeping<'_> {
    fn keep_everything(&mut self) {
        for timeline in timelines(self.one) {
            self.keep_timeline(timeline, WalReason::Unreadable);
        }
    }

    fn keep_timeline(&mut self, timeline: Timeline, why: WalReason) {
        let whole = WalStretch { first: 0, end: None, why };
        self.stretches.entry(timeline).or_default().insert(whole);
    }

    /// From the oldest backup for point-in-time recovery on each way to that way's end: also on ways that were
    /// left behind, as long as such a backup can take them.
    fn keep_for_recovery(&mut self, lives: &Lives, fates: &BTreeMap<&BackupId, &BackupFate>) {
        for timeline in timelines(self.one) {
            let Some(way) = way_to(self.one, timeline) else {
                self.keep_timeline(timeline, WalReason::NoHistory);
                continue;
            };
            let for_recovery = |backup: &&Committed| {
                fates.get(&backup.id).is_some_and(|fate| fate.is_for_recovery())
            };
            let on_way = self.one.backups.iter().filter(for_recovery);
            let first = on_way.filter(|b| lies_on(&way, b)).min_by_key(|b| b.start_lsn);
            match first {
                Some(backup) => {
                    let why = WalReason::Recovery(backup.id.clone());
                    self.keep_along(&way, backup.start_lsn, None, &why);
                }
                None if lives.has(self.one.system_id, timeline) => {
                    self.keep_timeline(timeline, WalReason::NoBackupYet);
                }
                None => {}
            }
        }
    }

    /// From start to stop of each backup that stays by itself.
    fn keep_own(&mut self, fates: &BTreeMap<&BackupId, &BackupFate>) {
        let one = self.one;
        for backup in &one.backups {
            let Some(fate) = fates.get(&backup.id) else { continue };
            if !fate.is_kept() || fate.is_for_recovery() {
                continue;
            }
            let why = WalReason::Own(backup.id.clone());
            match way_to(one, backup.stop_timeline) {
                Some(way) => {
                    self.keep_along(&way, backup.start_lsn, Some(backup.stop_lsn), &why);
                }
                None => self.keep_timeline(backup.timeline, WalReason::NoHistory),
            }
        }
    }

    /// Keeps every segment that holds a byte of a way from `start_lsn` to `end_lsn` (excluded), of each
    /// timeline that owns a part of it. The segment of a fork stays on both: which of them was stored, and whether as
    /// a whole, is chance.
    fn keep_along(
        &mut self,
        way: &TimelineHistory,
        start_lsn: Lsn,
        end_lsn: Option<Lsn>,
        why: &WalReason,
    ) {
        let size = self.one.segment_size;
        for stretch in way.path() {
            let start = stretch.start_lsn.max(start_lsn);
            let ends = [stretch.end_lsn, end_lsn];
            let end = ends.into_iter().flatten().min();
            if end.is_some_and(|end| end <= start) {
                continue;
            }
            let first = size.segment_of(start);
            let end = end.map(|end| size.segment_before(end) + 1);
            let kept = WalStretch { first, end, why: why.clone() };
            self.stretches.entry(stretch.timeline).or_default().insert(kept);
        }
    }
}
