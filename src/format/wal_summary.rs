//! What a WAL file that was read amounts to: the summary that its header carries.

use super::{RestorePointMark, WalSummary};
use crate::pg::{Lsn, MajorVersion, Mark, SegmentFacts, SegmentWalk, Timeline, WalEvent};

/// How many bytes of a header's 16 KiB its restore points may take, as JSON. A count alone would
/// bound nothing: 63 bytes of name become up to 378 when each has to be escaped, and a
/// header that is too long makes the whole object unreadable.
const RESTORE_POINTS_BYTES_MAX: usize = 12 << 10;

/// What a restore point takes in a header beside its name: field names, LSN and time.
const RESTORE_POINT_BYTES: usize = 96;

/// Gathers what a header tells about the WAL behind it, mark by mark.
#[derive(Debug, Clone)]
pub struct SummaryBuilder {
    summary: WalSummary,
    restore_points_bytes: usize,
}

impl SummaryBuilder {
    /// Begins the summary of WAL that begins at `start_lsn`.
    pub fn new(timeline: Timeline, start_lsn: Lsn) -> Self {
        Self {
            summary: WalSummary {
                timeline,
                start_lsn,
                end_lsn: start_lsn,
                page_magic: 0,
                xacts: 0,
                first_xact_time: None,
                last_xact_time: None,
                last_commit_time: None,
                last_record_lsn: None,
                restore_points: Vec::new(),
                restore_points_unlisted: 0,
                dropping_commits: 0,
            },
            restore_points_bytes: 0,
        }
    }

    /// Takes the next mark, in WAL order.
    pub fn add(&mut self, mark: &Mark) {
        let summary = &mut self.summary;
        match &mark.event {
            WalEvent::Transaction(end) => {
                summary.xacts += 1;
                let first = summary.first_xact_time.map_or(end.time, |first| first.min(end.time));
                summary.first_xact_time = Some(first);
                summary.last_xact_time = summary.last_xact_time.max(Some(end.time));
                if end.committed {
                    summary.last_commit_time = summary.last_commit_time.max(Some(end.time));
                    summary.dropping_commits += u64::from(end.dropped_count > 0);
                }
            }
            WalEvent::RestorePoint { name, time } => self.add_restore_point(RestorePointMark {
                name: name.clone(),
                lsn: mark.end_lsn,
                time: *time,
            }),
            _ => {}
        }
    }

    fn add_restore_point(&mut self, point: RestorePointMark) {
        let bytes = self.restore_points_bytes + RESTORE_POINT_BYTES + json_bytes(&point.name);
        // Once one is left out, all later ones are: the list has no holes.
        if bytes <= RESTORE_POINTS_BYTES_MAX && self.summary.restore_points_unlisted == 0 {
            self.restore_points_bytes = bytes;
            self.summary.restore_points.push(point);
        } else {
            self.summary.restore_points_unlisted += 1;
        }
    }

    /// Takes what comes behind: the result is that of one builder which saw the marks of both.
    pub fn absorb(&mut self, later: Self) {
        let (ours, later) = (&mut self.summary, later.summary);
        ours.timeline = later.timeline;
        ours.end_lsn = later.end_lsn;
        ours.page_magic = later.page_magic;
        ours.last_record_lsn = later.last_record_lsn.or(ours.last_record_lsn);
        ours.xacts += later.xacts;
        let earliest = ours.first_xact_time.into_iter().chain(later.first_xact_time).min();
        ours.first_xact_time = earliest;
        ours.last_xact_time = ours.last_xact_time.max(later.last_xact_time);
        ours.last_commit_time = ours.last_commit_time.max(later.last_commit_time);
        ours.dropping_commits += later.dropping_commits;
        for point in later.restore_points {
            self.add_restore_point(point);
        }
        self.summary.restore_points_unlisted += later.restore_points_unlisted;
    }

    /// Notes where `walk` stands when it has taken every byte before `end_lsn`.
    pub fn reach(&mut self, walk: &SegmentWalk, end_lsn: Lsn) {
        self.summary.end_lsn = end_lsn;
        self.summary.timeline = walk.timeline().unwrap_or(self.summary.timeline);
        self.summary.last_record_lsn = walk.last_record_lsn();
        self.summary.page_magic = walk.version().and_then(MajorVersion::page_magic).unwrap_or(0);
    }

    /// Takes back that WAL from `end_lsn` on was seen: a timeline ended there. What was received
    /// beyond is part of one record, so no mark is lost.
    pub fn cut_short(&mut self, end_lsn: Lsn) {
        self.summary.end_lsn = end_lsn;
        self.summary.last_record_lsn = self.summary.last_record_lsn.filter(|lsn| *lsn < end_lsn);
    }

    /// Ends the summary of a whole file with what its walk found.
    pub fn finish(mut self, facts: &SegmentFacts) -> WalSummary {
        self.summary.end_lsn = facts.valid_end;
        self.summary.last_record_lsn = facts.last_record_lsn;
        self.summary.page_magic = facts.version.page_magic().unwrap_or(0);
        self.summary
    }

    /// Ends the summary of a whole segment at the end of its walk, which may have gone on from the
    /// segment before: the same as [`Self::finish`] gives for a walk that knows nothing of it.
    pub fn finish_segment(mut self, timeline: Timeline, walk: &SegmentWalk) -> WalSummary {
        self.summary.timeline = timeline;
        self.summary.end_lsn = walk.valid_end();
        self.finish_piece()
    }

    /// Ends the summary of a piece, which ends where [`Self::reach`] was called last.
    pub fn finish_piece(mut self) -> WalSummary {
        let start_lsn = self.summary.start_lsn;
        self.summary.last_record_lsn = self.summary.last_record_lsn.filter(|lsn| *lsn >= start_lsn);
        self.summary
    }
}

/// Returns how many bytes a text takes in JSON, quotes included.
fn json_bytes(text: &str) -> usize {
    let escaped = |c: char| match c {
        '"' | '\\' => 2,
        c if c.is_ascii_control() => 6,
        c => c.len_utf8(),
    };
    2 + text.chars().map(escaped).sum::<usize>()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
