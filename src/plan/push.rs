//! What a WAL file that was read amounts to: the summary that its header carries.

use crate::format::{RestorePointMark, WalSummary};
use crate::pg::{Lsn, MajorVersion, Mark, SegmentFacts, SegmentWalk, Timeline, WalEvent};

/// How many bytes of a header's 16 KiB its restore points may take, as JSON. A count alone would
/// bound nothing: 63 bytes of name become up to 378 when each has to be escaped, and a
/// header that is too long makes the whole object unreadable.
const RESTORE_POINTS_BYTES_MAX: usize = 12 << 10;

/// What a restore point takes in a header beside its name: field names, LSN and time.
const RESTORE_POINT_BYTES: usize = 96;

/// Gathers what a header tells about the WAL behind it, mark by mark.
#[derive(Debug)]
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
            WalEvent::RestorePoint { name, time } => {
                let bytes = self.restore_points_bytes + RESTORE_POINT_BYTES + json_bytes(name);
                // Once one is left out, all later ones are: the list has no holes.
                if bytes <= RESTORE_POINTS_BYTES_MAX && summary.restore_points_unlisted == 0 {
                    self.restore_points_bytes = bytes;
                    summary.restore_points.push(RestorePointMark {
                        name: name.clone(),
                        lsn: mark.end_lsn,
                        time: *time,
                    });
                } else {
                    summary.restore_points_unlisted += 1;
                }
            }
            _ => {}
        }
    }

    /// Ends the summary of a whole file with what its walk found.
    pub fn finish(mut self, facts: &SegmentFacts) -> WalSummary {
        self.summary.end_lsn = facts.valid_end;
        self.summary.last_record_lsn = facts.last_record_lsn;
        self.summary.page_magic = facts.version.page_magic().unwrap_or(0);
        self.summary
    }

    /// Ends the summary of a piece of `bytes` bytes, with the walk at the piece's end.
    pub fn finish_piece(mut self, walk: &SegmentWalk, bytes: u32) -> WalSummary {
        self.summary.end_lsn = Lsn(self.summary.start_lsn.0 + u64::from(bytes));
        self.summary.timeline = walk.timeline().unwrap_or(self.summary.timeline);
        self.summary.last_record_lsn =
            walk.last_record_lsn().filter(|lsn| *lsn >= self.summary.start_lsn);
        self.summary.page_magic = walk.version().and_then(MajorVersion::page_magic).unwrap_or(0);
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
