//! Shipping WAL while it is written: where to begin, what may be acknowledged, when
//! a piece is cut and when small pieces are merged.
//!
//! ```text
//!   stored                    handed to uploads        received
//!     |==== piece ====|         |== piece ==|..........|
//!     ^ flush: the end of the unbroken prefix          ^ write
//!                     ^^^^^^^^^ still on its way: what is stored behind it does not count yet
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use super::lineage::{Coverage, holes, unbroken_end};
use crate::pg::{Lsn, SegmentSize, Timeline, TimelineHistory};

/// How many pieces are merged into one: many, so that fewer than one commit in a hundred is stored while
/// a merge is.
pub const MERGE_COUNT: usize = 256;

/// Pieces are merged only up to this size, in bytes: a segment of 16 MiB then has at most some
/// hundreds of small ones, or two thousand of 8 KiB, and no byte is stored more than `MERGE_LEVELS` times again.
pub const MERGE_BYTES_MAX: u32 = 2 << 20;

/// How often the result of a merge is merged again.
pub const MERGE_LEVELS: usize = 2;

/// The most segments that are received behind the first byte that is not stored.
pub const AHEAD_SEGMENTS: u64 = 32;

/// How far streaming on one timeline has come.
///
/// The rule that must never break: [`Self::flush_lsn`] is at most the end of the
/// unbroken stretch that the store has confirmed, and at most what was received.
#[derive(Debug, Clone)]
pub struct Progress {
    received: Lsn,
    stored: Lsn,
    /// Confirmed stretches behind a hole: start to end.
    beyond: BTreeMap<Lsn, Lsn>,
}

impl Progress {
    /// Begins at `start_lsn`, of which nothing is known yet.
    pub fn begin(start_lsn: Lsn) -> Self {
        Self { received: start_lsn, stored: start_lsn, beyond: BTreeMap::new() }
    }

    /// Takes note that WAL up to `end_lsn` (excluded) was received.
    pub fn receive(&mut self, end_lsn: Lsn) {
        self.received = self.received.max(end_lsn);
    }

    /// Takes note that the store has confirmed the bytes from `start_lsn` to `end_lsn` (excluded);
    /// confirmations come in any order, and may overlap.
    pub fn store(&mut self, start_lsn: Lsn, end_lsn: Lsn) {
        if start_lsn > self.stored {
            let known = self.beyond.entry(start_lsn).or_insert(end_lsn);
            *known = end_lsn.max(*known);
            return;
        }
        self.stored = self.stored.max(end_lsn);
        while let Some((start, end)) = self.beyond.pop_first() {
            if start > self.stored {
                self.beyond.insert(start, end);
                break;
            }
            self.stored = self.stored.max(end);
        }
    }

    /// Returns the end of what was received.
    pub fn write_lsn(&self) -> Lsn {
        self.received
    }

    /// Returns what may be acknowledged as flushed.
    pub fn flush_lsn(&self) -> Lsn {
        self.stored.min(self.received)
    }

    /// Returns whether so much was received behind the first byte that is not stored that no more is to be read: what a
    /// later receiver finds stored behind a hole begins within [`AHEAD_SEGMENTS`] of that hole.
    pub fn is_far_ahead(&self, size: SegmentSize) -> bool {
        self.received.0.saturating_sub(self.stored.0) > AHEAD_SEGMENTS * size.bytes()
    }

    /// Returns the end of the unbroken prefix that is stored; ahead of what was received
    /// where an earlier run stored more.
    pub fn stored_lsn(&self) -> Lsn {
        self.stored
    }
}

/// What decides when a piece is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutPolicy {
    /// The longest that received WAL may wait before it is cut.
    pub rpo: Duration,
    /// Whether commits wait for us.
    pub synchronous: bool,
    /// The most pieces on their way at a time.
    pub uploads_max: usize,
}

/// WAL that was received and is not cut yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Uncut {
    /// When its first byte came, on the caller's monotonic clock; `None`: there is none.
    pub since: Option<Duration>,
    /// How many records are in it that a client may be waiting for.
    pub commits: u32,
    /// Whether somebody waits for all of it: the server shuts down, or we do.
    pub hurry: bool,
}

/// When the next piece is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// At once.
    Now,
    /// At that time, unless something changes before.
    At(Duration),
    /// Not before something changes: there is nothing to cut, or no upload is free.
    Wait,
}

/// Decides when to cut. As a synchronous standby a piece is cut as soon as a commit
/// waits and an upload is free; while none is, the next commits gather in one piece.
pub fn when_to_cut(policy: &CutPolicy, uncut: &Uncut, uploads: usize, now: Duration) -> Cut {
    let Some(since) = uncut.since else { return Cut::Wait };
    if uploads >= policy.uploads_max {
        return Cut::Wait;
    }
    let mut due = since.saturating_add(policy.rpo);
    if policy.synchronous && uncut.commits > 0 {
        due = now;
    }
    if uncut.hurry || due <= now { Cut::Now } else { Cut::At(due) }
}

/// Decides whether the end of a unit that was just completed is worth a piece of its own, besides
/// the unit. A small one is there much sooner than the whole; a large one is not.
pub fn tail_is_cut(policy: &CutPolicy, tail_bytes: u64, unit_bytes: u64, commits: bool) -> bool {
    tail_bytes > 0 && ((policy.synchronous && commits) || tail_bytes <= unit_bytes / 4)
}

/// Pieces of one unit that are stored, as offsets, and which of them are to be merged.
#[derive(Debug, Clone, Default)]
pub struct Merges {
    levels: [BTreeMap<u32, u32>; MERGE_LEVELS],
}

/// Pieces that are to become one: from `start` to `end` (excluded).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merge {
    /// Where the first begins.
    pub start: u32,
    /// Where the last ends.
    pub end: u32,
    level: usize,
}

impl Merges {
    /// Takes note of a piece that is stored.
    pub fn store(&mut self, start: u32, end: u32) {
        self.levels[0].insert(start, end);
    }

    /// Takes note that a merge is stored.
    pub fn merged(&mut self, merge: Merge) {
        if let Some(level) = self.levels.get_mut(merge.level + 1) {
            level.insert(merge.start, merge.end);
        }
    }

    /// Returns the next merge that is worth while, and forgets its pieces.
    pub fn next_merge(&mut self) -> Option<Merge> {
        self.levels.iter_mut().enumerate().find_map(|(level, pieces)| next_merge(level, pieces))
    }
}

fn next_merge(level: usize, pieces: &mut BTreeMap<u32, u32>) -> Option<Merge> {
    while pieces.len() >= MERGE_COUNT {
        let (start, end, count) = adjacent(pieces)?;
        let is_run = count == MERGE_COUNT;
        if is_run && end - start <= MERGE_BYTES_MAX {
            pieces.retain(|at, _| !(start..end).contains(at));
            return Some(Merge { start, end, level });
        }
        if is_run {
            pieces.pop_first();
        } else if pieces.len() >= 2 * MERGE_COUNT {
            // What is missing behind them is not on its way any more.
            pieces.retain(|at, _| *at >= end);
        } else {
            return None;
        }
    }
    None
}

/// Returns the stretch of the first pieces that follow each other, at most [`MERGE_COUNT`], and
/// how many they are.
fn adjacent(pieces: &BTreeMap<u32, u32>) -> Option<(u32, u32, usize)> {
    let (&start, &first_end) = pieces.first_key_value()?;
    let (mut end, mut count) = (first_end, 1);
    for (&next_start, &next_end) in pieces.iter().take(MERGE_COUNT).skip(1) {
        if next_start != end {
            break;
        }
        (end, count) = (next_end, count + 1);
    }
    Some((start, end, count))
}

/// What is known when streaming is about to begin.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    /// The way to the server's timeline.
    pub history: &'a TimelineHistory,
    /// What the repository holds.
    pub coverage: &'a Coverage,
    /// From where on our slot makes the server keep WAL.
    pub slot_lsn: Option<Lsn>,
    /// Whether it was just made, so that its position says nothing of what earlier streams have stored.
    pub slot_is_new: bool,
    /// Where an earlier stream of this process came to, on this way.
    pub resume_lsn: Option<Lsn>,
    /// The end of the server's WAL.
    pub flush_lsn: Lsn,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
}

/// Where streaming begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// The timeline to ask for.
    pub timeline: Timeline,
    /// The first byte to ask for: the start of a segment, so that its records can be checked.
    pub lsn: Lsn,
    /// The first byte that the repository is not known to hold; behind `lsn` where some of the segment
    /// is stored, or where nothing before it is wanted.
    pub first_missing: Lsn,
}

/// Decides where to begin: at the first byte not stored that the server should still have.
///
/// The search begins at the lowest of the highest stored byte on the server's way, the slot's position and where
/// this process stood; holes before all of them are `archive_command`'s to fill. Where neither a slot nor this process
/// knows what earlier streams came to, one of them may have died while uploads overtook each other: the first hole that can
/// be of that kind is asked for, and if the server has it no more, that is a gap.
pub fn start_of(situation: &Situation<'_>) -> Start {
    let Situation { history, coverage, slot_lsn, resume_lsn, flush_lsn, segment_size, .. } =
        *situation;
    let highest = highest_on(history, coverage);
    let is_known = resume_lsn.is_some() || (slot_lsn.is_some() && !situation.slot_is_new);
    let overtaken = if is_known { None } else { highest.and_then(|end| overtaken(situation, end)) };
    let from = [highest, slot_lsn, resume_lsn, overtaken].into_iter().flatten().min();
    let from = from.unwrap_or(flush_lsn);
    let first_missing = unbroken_end(history, coverage, from, segment_size);
    // A server that has less than is stored is asked for what it has: its bytes are compared.
    let at = first_missing.min(flush_lsn);
    let lsn = segment_size.start_of(segment_size.segment_of(at));
    Start { timeline: history.owner_of(at), lsn, first_missing }
}

/// Returns where the first hole before `highest` begins that uploads may have left which overtook each other.
fn overtaken(situation: &Situation<'_>, highest: Lsn) -> Option<Lsn> {
    let Situation { history, coverage, segment_size, .. } = *situation;
    // One more, for the message that went beyond the bound.
    let ahead = (AHEAD_SEGMENTS + 1) * segment_size.bytes();
    let from = Lsn(highest.0.saturating_sub(ahead));
    let holes = holes(history, coverage, from, highest, segment_size).into_iter();
    // Where nothing is stored before it, the archive begins, or a hole that is older.
    holes.map(|(start, _)| start).find(|start| *start > from)
}

/// Returns where to begin when the server has nothing left before segment `number`.
pub fn start_after_gap(situation: &Situation<'_>, number: u64) -> Start {
    let Situation { history, coverage, segment_size, .. } = *situation;
    let lsn = segment_size.start_of(number);
    let first_missing = unbroken_end(history, coverage, lsn, segment_size);
    Start { timeline: history.owner_of(lsn), lsn, first_missing }
}

/// Returns where to begin on a timeline that the server has just switched to at `switch_lsn`: its first segment
/// repeats the old timeline's up to there, and is asked for whole.
pub fn start_at_switch(
    coverage: &Coverage,
    timeline: Timeline,
    switch_lsn: Lsn,
    size: SegmentSize,
) -> Start {
    let lsn = size.start_of(size.segment_of(switch_lsn));
    let ranges = coverage.get(&timeline).map(Vec::as_slice).unwrap_or_default();
    let stored = ranges.iter().find(|(start, end)| *start <= lsn && lsn < *end);
    Start { timeline, lsn, first_missing: stored.map_or(lsn, |(_, end)| *end) }
}

/// Returns the end of the highest stored stretch that lies on the way.
fn highest_on(history: &TimelineHistory, coverage: &Coverage) -> Option<Lsn> {
    let stretches = history.path();
    let ends = stretches.iter().filter_map(|stretch| {
        let ranges = coverage.get(&stretch.timeline)?;
        let within =
            ranges.iter().filter(|(start, _)| stretch.end_lsn.is_none_or(|end| *start < end));
        let highest = within.map(|(_, end)| *end).max()?;
        Some(stretch.end_lsn.map_or(highest, |end| end.min(highest)))
    });
    ends.max()
}

/// Returns the newest timeline that is known to have replaced `timeline`, and where it forked off.
///
/// A server that still writes a timeline which another has left is an old primary
/// that came back: following it would leave the new one unprotected.
pub fn superseded_by<'a>(
    timeline: Timeline,
    histories: impl IntoIterator<Item = &'a TimelineHistory>,
) -> Option<(Timeline, Lsn)> {
    histories
        .into_iter()
        .filter(|history| history.timeline() > timeline)
        .filter_map(|history| Some((history.timeline(), history.switch_point(timeline)?)))
        .max()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
