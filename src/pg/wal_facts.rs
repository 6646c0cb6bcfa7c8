//! What a walked segment is known to hold. Plain values, bounded in size.

use super::wal_record::{Mark, RelFileLocator, WalEvent};
use super::{Lsn, MajorVersion, PgTimestamp, SegmentSize, SystemId, Timeline, WalDamage};

/// How many restore points of one segment are listed; the rest is counted.
pub const RESTORE_POINTS_LISTED_MAX: usize = 256;
/// How many dropping transactions of one segment are listed; the rest is counted.
pub const DROPS_LISTED_MAX: usize = 256;
/// How many relation files of one dropping transaction are listed; the rest is counted.
pub const RELATIONS_PER_DROP_LISTED_MAX: usize = 16;
/// How many timeline changes of one segment are listed: more cannot be useful.
pub const TIMELINE_CHANGES_LISTED_MAX: usize = 16;

/// Everything a walk found out about one segment (or the beginning of one).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentFacts {
    /// The cluster that wrote it.
    pub system_id: SystemId,
    /// The major version that wrote it.
    pub version: MajorVersion,
    /// The WAL segment size of the cluster.
    pub segment_size: SegmentSize,
    /// The WAL page size in bytes.
    pub block_size: u32,
    /// The LSN of the segment's first byte.
    pub start_lsn: Lsn,
    /// The timeline of the first page. Smaller than that of the name where the
    /// timeline forked in this segment.
    pub first_timeline: Timeline,
    /// The timeline of the last page that was walked.
    pub last_timeline: Timeline,
    /// Bytes at the start that belong to a record begun in an earlier segment
    /// (page headers not counted), or `None`.
    pub continued_bytes: Option<u32>,
    /// Whether that record was joined with its beginning and so checked.
    pub continued_is_joined: bool,
    /// The start of the first record that begins in this segment.
    pub first_record_lsn: Option<Lsn>,
    /// Where the last complete record begins; in an earlier segment if the walk went on from it
    /// and no record ended in this one.
    pub last_record_lsn: Option<Lsn>,
    /// The end of the last complete record, rounded up to 8 bytes (excluded); the end of the
    /// segment after a switch record; the start of the segment if no record ended in it.
    pub valid_end: Lsn,
    /// How the walk ended.
    pub end: WalkEnd,
    /// The record that runs past the end of the input, or that the end of valid WAL cut.
    pub incomplete: Option<IncompleteRecord>,
    /// What the complete records say.
    pub marks: WalMarks,
}

/// How the walk over a segment ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalkEnd {
    /// At the segment's last byte.
    Full,
    /// At a switch record; the rest of the segment is padding and was not looked at.
    Switched,
    /// The input ended before the segment did (a prefix).
    Cut,
    /// Inside the input, where valid WAL ended (a prefix, a `.partial` file): zeros,
    /// the remains of a recycled file, or damage.
    Stopped(WalDamage),
}

/// A record that is not whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IncompleteRecord {
    /// Where it begins, or `None` if that is in an earlier segment and was not seen.
    pub start_lsn: Option<Lsn>,
    /// Bytes of it that are missing, page headers not counted.
    pub missing_bytes: u64,
}

/// What the records of a segment say, in WAL order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WalMarks {
    /// Complete records, among them one begun in an earlier segment if it was joined.
    pub records: u64,
    /// Commits, of prepared transactions too.
    pub commits: EndTimes,
    /// Aborts, of prepared transactions too.
    pub aborts: EndTimes,
    /// The first [`RESTORE_POINTS_LISTED_MAX`] restore points.
    pub restore_points: Vec<RestorePoint>,
    /// How many restore points there are.
    pub restore_point_count: u64,
    /// The first [`DROPS_LISTED_MAX`] commits that removed relation files.
    pub drops: Vec<RelationDrop>,
    /// How many such commits there are.
    pub drop_count: u64,
    /// The first [`TIMELINE_CHANGES_LISTED_MAX`] places where a timeline began.
    pub timeline_changes: Vec<TimelineChange>,
    /// Completed checkpoints.
    pub checkpoint_count: u64,
    /// Ends of base backups taken from a primary.
    pub backup_end_count: u64,
    /// Records given up after a crash.
    pub abandoned_record_count: u64,
    /// Records that should have had an event but could not be understood, though their
    /// checksum was right. Not 0 means: something here is not known.
    pub unread_count: u64,
}

/// The times at which transactions ended. Clocks step, so order in WAL is not order in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EndTimes {
    /// How many transactions.
    pub count: u64,
    /// Time of the first in WAL order.
    pub first: Option<PgTimestamp>,
    /// Time of the last in WAL order.
    pub last: Option<PgTimestamp>,
    /// The smallest time.
    pub earliest: Option<PgTimestamp>,
    /// The largest time.
    pub latest: Option<PgTimestamp>,
}

/// A named restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestorePoint {
    /// Its name.
    pub name: String,
    /// Where its record begins.
    pub lsn: Lsn,
    /// When it was made.
    pub time: PgTimestamp,
}

/// A committed transaction that removed relation files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationDrop {
    /// Where the commit record begins.
    pub lsn: Lsn,
    /// The transaction, if the record says it.
    pub xid: Option<u32>,
    /// When it committed.
    pub time: PgTimestamp,
    /// The first [`RELATIONS_PER_DROP_LISTED_MAX`] files.
    pub relations: Vec<RelFileLocator>,
    /// How many files.
    pub relation_count: u32,
}

/// A place where a new timeline began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimelineChange {
    /// Where the record that says so begins.
    pub lsn: Lsn,
    /// The timeline before.
    pub from: Timeline,
    /// The timeline from here on.
    pub to: Timeline,
}

impl EndTimes {
    fn add(&mut self, time: PgTimestamp) {
        self.count += 1;
        self.first = self.first.or(Some(time));
        self.last = Some(time);
        self.earliest = Some(self.earliest.map_or(time, |earliest| earliest.min(time)));
        self.latest = self.latest.max(Some(time));
    }
}

impl WalMarks {
    /// Returns the largest time of any commit or abort: a `recovery_target_time`
    /// before it is reached in this segment at the latest.
    ///
    /// Source: `recoveryStopsBefore` in `src/backend/access/transam/xlogrecovery.c`
    /// stops at the first commit or abort later than the target.
    pub fn latest_end(&self) -> Option<PgTimestamp> {
        self.commits.latest.max(self.aborts.latest)
    }

    pub(super) fn add(&mut self, mark: &Mark) {
        match &mark.event {
            WalEvent::Transaction(end) => {
                if !end.committed {
                    self.aborts.add(end.time);
                    return;
                }
                self.commits.add(end.time);
                if end.dropped_count > 0 {
                    self.drop_count += 1;
                    let relations = end.dropped.iter().take(RELATIONS_PER_DROP_LISTED_MAX);
                    push_bounded(&mut self.drops, DROPS_LISTED_MAX, || RelationDrop {
                        lsn: mark.lsn,
                        xid: end.xid,
                        time: end.time,
                        relations: relations.copied().collect(),
                        relation_count: end.dropped_count,
                    });
                }
            }
            WalEvent::RestorePoint { name, time } => {
                self.restore_point_count += 1;
                push_bounded(&mut self.restore_points, RESTORE_POINTS_LISTED_MAX, || {
                    RestorePoint { name: name.clone(), lsn: mark.lsn, time: *time }
                });
            }
            WalEvent::EndOfRecovery { timeline, previous_timeline, .. } => {
                self.add_timeline(mark.lsn, *previous_timeline, *timeline);
            }
            WalEvent::Checkpoint { timeline, previous_timeline, .. } => {
                self.checkpoint_count += 1;
                self.add_timeline(mark.lsn, *previous_timeline, *timeline);
            }
            WalEvent::OverwriteContrecord { .. } => self.abandoned_record_count += 1,
            WalEvent::BackupEnd { .. } => self.backup_end_count += 1,
            WalEvent::Switch | WalEvent::Prepared => {}
        }
    }

    fn add_timeline(&mut self, lsn: Lsn, from: Timeline, to: Timeline) {
        if from != to {
            let change = TimelineChange { lsn, from, to };
            push_bounded(&mut self.timeline_changes, TIMELINE_CHANGES_LISTED_MAX, || change);
        }
    }
}

fn push_bounded<T>(list: &mut Vec<T>, max: usize, make: impl FnOnce() -> T) {
    if list.len() < max {
        list.push(make());
    }
}
