//! Asking archived WAL: which way leads to a timeline, and which commits it holds.

use std::collections::BTreeMap;

use crate::format::WalObject;
use crate::pg::{
    Extent, Lsn, Mark, PgTimestamp, SegmentExpectation, SegmentName, SegmentSize, SegmentWalk,
    SystemId, Timeline, TimelineHistory, WalCarry, WalEvent, WalFileName,
};
use crate::plan::lineage::segment_on;
use crate::repo::{RepoError, Repository};
use crate::store::Key;

/// Why the way to a timeline is not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum WayError {
    /// Its history file is certainly absent.
    #[error("the history file of timeline {0} is not in the repository")]
    NoHistory(Timeline),
    /// It could not be read.
    #[error(transparent)]
    Repo(#[from] RepoError),
}

/// Reads the way to a timeline from its history file.
pub(super) async fn way_to(
    repository: &Repository,
    system_id: SystemId,
    timeline: Timeline,
) -> Result<TimelineHistory, WayError> {
    if timeline == Timeline::FIRST {
        return Ok(TimelineHistory::first());
    }
    match history_of(repository, system_id, timeline).await? {
        Some(history) => Ok(history),
        None => Err(WayError::NoHistory(timeline)),
    }
}

/// Reads the history files of the timelines given.
pub(super) async fn histories_of(
    repository: &Repository,
    system_id: SystemId,
    timelines: impl IntoIterator<Item = Timeline>,
) -> Result<BTreeMap<Timeline, TimelineHistory>, RepoError> {
    let mut histories = BTreeMap::new();
    for timeline in timelines {
        if let Some(history) = history_of(repository, system_id, timeline).await? {
            histories.insert(timeline, history);
        }
    }
    Ok(histories)
}

async fn history_of(
    repository: &Repository,
    system_id: SystemId,
    timeline: Timeline,
) -> Result<Option<TimelineHistory>, RepoError> {
    let Some(bytes) = repository.fetch_history(system_id, timeline).await? else {
        return Ok(None);
    };
    TimelineHistory::parse(timeline, &bytes).map(Some).map_err(|error| RepoError::Damaged {
        key: Key::new(repository.place().history(system_id, timeline)),
        why: error.to_string(),
    })
}

/// Fetches a segment, walks it, and shows every mark in it. `carry` is what the walk of the
/// segment before has left, so that a record which spans the border is seen too.
///
/// Returns `None` where the store says that the segment is not there, else the new carry.
///
/// # Errors
/// [`RepoError::Damaged`] where stored WAL is not what was checked when it was stored.
pub(super) async fn each_mark(
    repository: &Repository,
    system_id: SystemId,
    segment: SegmentName,
    size: SegmentSize,
    carry: Option<WalCarry>,
    mut on_mark: impl FnMut(&Mark),
) -> Result<Option<Option<WalCarry>>, RepoError> {
    let damaged = |why: String| RepoError::Damaged {
        key: Key::new(repository.place().wal_group_dir(system_id, &segment.group())),
        why: format!("segment {segment}: {why}"),
    };
    let expectation = SegmentExpectation::of(segment, size, Some(system_id), Extent::Prefix)
        .ok_or_else(|| damaged("its name does not fit the segment size".to_owned()))?;
    let mut walk = match carry {
        Some(carry) => SegmentWalk::after(carry, expectation),
        None => SegmentWalk::new(expectation),
    };
    let sink = |block: &[u8]| {
        walk.feed_with(block, &mut |mark| on_mark(mark)).map_err(std::io::Error::other)
    };
    if repository.fetch_segment(system_id, segment, size, sink).await?.is_none() {
        return Ok(None);
    }
    let (_, carry) = walk.finish_with_carry().map_err(|error| damaged(error.to_string()))?;
    Ok(Some(carry))
}

/// Stored WAL along a way.
#[derive(Clone, Copy)]
pub(super) struct StoredWay<'a> {
    pub(super) repository: &'a Repository,
    pub(super) system_id: SystemId,
    pub(super) way: &'a TimelineHistory,
    pub(super) size: SegmentSize,
}

/// Returns the latest time of a commit or abort record that begins before `before_lsn`, in the
/// segment of that position and the one before it (not below `first`).
pub(super) async fn xact_time_at_end(
    stored: StoredWay<'_>,
    first: u64,
    before_lsn: Lsn,
) -> Result<Option<PgTimestamp>, RepoError> {
    let StoredWay { repository, system_id, way, size } = stored;
    let last = size.segment_before(before_lsn);
    let mut latest: Option<PgTimestamp> = None;
    let mut carry = None;
    for number in last.saturating_sub(1).max(first)..=last {
        let segment = segment_on(way, number, size, before_lsn);
        let left = each_mark(repository, system_id, segment, size, carry, |mark| {
            if let WalEvent::Transaction(end) = &mark.event
                && mark.lsn < before_lsn
            {
                latest = latest.max(Some(end.time));
            }
        });
        carry = left.await?.flatten();
    }
    Ok(latest)
}

/// What the WAL at the end of a way tells.
pub(super) async fn reach(
    stored: StoredWay<'_>,
    from_lsn: Lsn,
    end_lsn: Lsn,
) -> Result<EndOfWal, RepoError> {
    let StoredWay { repository, system_id, way, size } = stored;
    let mut found = EndOfWal::default();
    let (first, last) = (size.segment_of(from_lsn), size.segment_before(end_lsn));
    let walk = (stored, end_lsn);
    for number in (first..=last).rev() {
        let segment = segment_on(way, number, size, end_lsn);
        let is_cut = end_lsn < size.start_of(number + 1);
        let object = WalObject::File(WalFileName::Segment(segment));
        let header = if is_cut {
            None
        } else {
            match repository.header(&repository.wal_key(system_id, object)).await {
                Ok(header) => header.wal,
                Err(error) if error.is_absent() => None,
                Err(error) => return Err(error),
            }
        };
        match header {
            Some(wal) => {
                found.last_xact_time = found.last_xact_time.max(wal.last_xact_time);
                found.last_commit_time = found.last_commit_time.max(wal.last_commit_time);
                found.last_record_lsn = found.last_record_lsn.max(wal.last_record_lsn);
            }
            // Only pieces or a part of it count: look into the WAL itself.
            None => drop(found.add_walked(walk, segment, None).await?),
        }
        if found.is_complete() {
            if number < last {
                // A commit record that spans the border behind this segment is in neither
                // header, and nothing later hides it.
                let carry = found.add_walked(walk, segment, None).await?;
                let next = segment_on(way, number + 1, size, end_lsn);
                found.add_walked(walk, next, carry).await?;
            }
            break;
        }
    }
    Ok(found)
}

/// The last things in stored WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::struct_field_names)] // what they have in common is the point
pub(super) struct EndOfWal {
    /// The latest time of a commit or abort.
    pub(super) last_xact_time: Option<PgTimestamp>,
    /// The latest time of a commit.
    pub(super) last_commit_time: Option<PgTimestamp>,
    /// Where the last whole record begins.
    pub(super) last_record_lsn: Option<Lsn>,
}

impl EndOfWal {
    fn is_complete(&self) -> bool {
        self.last_xact_time.is_some()
            && self.last_commit_time.is_some()
            && self.last_record_lsn.is_some()
    }

    async fn add_walked(
        &mut self,
        (stored, end_lsn): (StoredWay<'_>, Lsn),
        segment: SegmentName,
        carry: Option<WalCarry>,
    ) -> Result<Option<WalCarry>, RepoError> {
        let StoredWay { repository, system_id, size, .. } = stored;
        let walked = each_mark(repository, system_id, segment, size, carry, |mark| {
            if mark.end_lsn > end_lsn {
                return;
            }
            self.last_record_lsn = self.last_record_lsn.max(Some(mark.lsn));
            if let WalEvent::Transaction(end) = &mark.event {
                self.last_xact_time = self.last_xact_time.max(Some(end.time));
                if end.committed {
                    self.last_commit_time = self.last_commit_time.max(Some(end.time));
                }
            }
        });
        Ok(walked.await?.flatten())
    }
}

/// Walks the WAL along `way` from `from_lsn` to `end_lsn` until `wanted` names a mark;
/// returns that mark's start and end.
pub(super) async fn find_mark(
    stored: StoredWay<'_>,
    from_lsn: Lsn,
    end_lsn: Lsn,
    wanted: impl Fn(&WalEvent) -> bool,
) -> Result<Option<(Lsn, Lsn)>, RepoError> {
    let StoredWay { repository, system_id, way, size } = stored;
    let mut carry = None;
    for number in size.segment_of(from_lsn)..=size.segment_before(end_lsn) {
        let segment = segment_on(way, number, size, end_lsn);
        let mut found = None;
        let left = each_mark(repository, system_id, segment, size, carry, |mark| {
            let inside = from_lsn <= mark.lsn && mark.end_lsn <= end_lsn;
            if found.is_none() && inside && wanted(&mark.event) {
                found = Some((mark.lsn, mark.end_lsn));
            }
        });
        carry = left.await?.flatten();
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}
