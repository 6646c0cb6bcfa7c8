//! Tablespaces that replay would make where they stood on the origin.
//!
//! A backup's own tablespaces are put elsewhere by `--tablespace-map`. One that was made after the backup began is
//! made by replay, at the path that WAL names: `create_tablespace_directories` in
//! `src/backend/commands/tablespace.c` links to it and recovery writes there, even where that directory is in use by
//! the cluster that the copy was made of. Whoever starts a copy beside its origin must know of them before.

use std::io;

use serde::Serialize;
use tokio::task::JoinSet;

use super::{Planned, Request, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::ops::failures::of_repo;
use crate::ops::progress::{Progress, Silent};
use crate::ops::wal_times::{WayError, way_to};
use crate::pg::{
    Extent, Lsn, SegmentExpectation, SegmentName, SegmentWalk, StorageChange, WalCarry, WalEvent,
    WalRecord,
};
use crate::plan::drill::ends_before;
use crate::plan::lineage::segment_on;
use crate::repo::{RepoError, Repository};
use crate::store::Key;

/// More are not named.
const NAMED_MAX: usize = 100;

/// A restore reads no more WAL than this for it, in bytes: whoever restores after an accident has no time to have a
/// week's WAL read twice. A dry run reads all of it.
const READ_BESIDE_BYTES_MAX: u64 = 256 << 20;

/// A tablespace that replay makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignTablespace {
    /// Its OID.
    pub oid: u32,
    /// The path at which it is made.
    pub location: String,
    /// Where the record begins that makes it.
    pub lsn: Lsn,
}

/// A tablespace that replay makes, as a plan tells it.
#[derive(Debug, Clone, Serialize)]
pub struct MadeByReplay {
    /// Its OID.
    pub oid: u32,
    /// The path at which it is made.
    pub location: String,
    /// Where the record begins that makes it.
    pub lsn: Lsn,
    /// Whether something stands there on this host: replay writes into it.
    pub stands_here: bool,
}

impl MadeByReplay {
    fn of(found: ForeignTablespace) -> Self {
        let ForeignTablespace { oid, location, lsn } = found;
        let entries = std::fs::read_dir(&location).map(|mut entries| entries.next().is_some());
        // What cannot be looked into may be anything.
        let stands_here = entries.unwrap_or_else(|error| error.kind() != io::ErrorKind::NotFound);
        Self { oid, location, lsn, stands_here }
    }
}

/// Puts into the plan which tablespaces replay would make at a path of their own, however much WAL has to be read for
/// it; leaves it out where WAL cannot be read.
///
/// # Errors
/// Those of the store, which a retry may cure.
pub async fn tell_tablespaces(
    repository: &Repository,
    request: &Request,
    planned: &mut Planned,
) -> Result<(), Failure> {
    match foreign_tablespaces(repository, request, planned, &Silent).await {
        Ok(found) => planned.report.made_by_replay = Some(made(found)),
        // Recovery may end before it comes there; and if not, it says so.
        Err(failure) if failure.kind == Kind::Integrity => say_not_looked_for(&failure),
        Err(failure) => return Err(failure),
    }
    Ok(())
}

fn made(found: Vec<ForeignTablespace>) -> Vec<MadeByReplay> {
    found.into_iter().map(MadeByReplay::of).collect()
}

fn say_not_looked_for(failure: &Failure) {
    tracing::warn!("tablespaces that replay would make were not looked for: {failure}");
}

/// The same look while files are restored, which it does not hold up: what it finds must be known before the copy is
/// started, not before it is made. Ends when it is dropped.
#[derive(Debug)]
pub struct LookBeside(JoinSet<Option<Vec<MadeByReplay>>>);

impl LookBeside {
    /// Begins, if there is little enough WAL on the way to the target.
    pub fn begin(repository: &Repository, request: &Request, planned: &Planned) -> Self {
        let mut looking = JoinSet::new();
        let report = &planned.report;
        let bytes = report.wal_end_lsn.0.saturating_sub(report.wal_start_lsn.0);
        if bytes <= READ_BESIDE_BYTES_MAX {
            let (repository, request, planned) =
                (repository.clone(), request.clone(), planned.clone());
            looking.spawn(async move {
                let found = foreign_tablespaces(&repository, &request, &planned, &Silent).await;
                // The files are worth having all the same.
                found.map(made).inspect_err(say_not_looked_for).ok()
            });
        }
        Self(looking)
    }

    /// Returns what was found; `None` if not all WAL was read.
    pub async fn found(mut self) -> Option<Vec<MadeByReplay>> {
        self.0.join_next().await?.ok()?
    }
}

/// Reads the WAL that this restore would replay and returns the tablespaces that are made in it at a path of their
/// own; at most 100. `wal_end_lsn` of the plan bounds what is read: what is archived later is not looked at.
///
/// # Errors
/// Those of the store, which a retry may cure; [`Kind::Integrity`] where WAL is damaged or missing.
pub async fn foreign_tablespaces(
    repository: &Repository,
    request: &Request,
    planned: &Planned,
    progress: &dyn Progress,
) -> Result<Vec<ForeignTablespace>, Failure> {
    let failed = |error| of_repo(error, "could not read the WAL up to the target", UNHARMED);
    let report = &planned.report;
    let way = match way_to(repository, planned.backup.system_identifier, report.timeline).await {
        Ok(way) => way,
        Err(WayError::Repo(error)) => return Err(failed(error)),
        Err(error @ WayError::NoHistory(_)) => {
            let next = "`highwater verify` tells what else is missing.";
            let what = "could not read the WAL up to the target";
            return Err(Failure::new(Kind::Integrity, what, UNHARMED, next).because(error));
        }
    };
    let (start, end) = (report.wal_start_lsn, report.wal_end_lsn);
    let size = planned.backup.segment_size;
    let (first, last) = (size.segment_of(start), size.segment_before(end));
    progress.total(Some((last + 1).saturating_sub(first) * size.bytes()));
    let mut looking = Looking { request, start, end, found: Vec::new(), is_over: false };
    let mut carry = None;
    // The record at an LSN that recovery still replays may begin in the segment behind it.
    for number in first..=last + 1 {
        let segment = segment_on(&way, number, size, end);
        match looking.at(repository, planned, segment, carry).await.map_err(failed)? {
            Some(left) => carry = left,
            None if number > last => break,
            None => return Err(failed(looking.gone(repository, planned, segment))),
        }
        progress.advance(size.bytes());
        if looking.is_over {
            break;
        }
    }
    Ok(looking.found)
}

struct Looking<'a> {
    request: &'a Request,
    start: Lsn,
    end: Lsn,
    found: Vec<ForeignTablespace>,
    /// Whether recovery ends before what comes now.
    is_over: bool,
}

impl Looking<'_> {
    fn gone(&self, repository: &Repository, planned: &Planned, segment: SegmentName) -> RepoError {
        let system_id = planned.backup.system_identifier;
        RepoError::Damaged {
            key: Key::new(repository.place().wal_group_dir(system_id, &segment.group())),
            why: format!(
                "segment {segment}, on the way from {} to {}, is not in the repository any more",
                self.start, self.end
            ),
        }
    }

    /// Walks a segment; `None` if it is not there, else what the walk of the next one goes on with.
    async fn at(
        &mut self,
        repository: &Repository,
        planned: &Planned,
        segment: SegmentName,
        carry: Option<WalCarry>,
    ) -> Result<Option<Option<WalCarry>>, RepoError> {
        let backup = &planned.backup;
        let group = repository.place().wal_group_dir(backup.system_identifier, &segment.group());
        let damaged = |why: String| RepoError::Damaged {
            key: Key::new(group.clone()),
            why: format!("segment {segment}: {why}"),
        };
        let system_id = Some(backup.system_identifier);
        let expectation =
            SegmentExpectation::of(segment, backup.segment_size, system_id, Extent::Prefix)
                .ok_or_else(|| damaged("its name does not fit the segment size".to_owned()))?;
        let mut walk = match carry {
            Some(carry) => SegmentWalk::after(carry, expectation),
            None => SegmentWalk::new(expectation),
        };
        let sink = |block: &[u8]| {
            let fed = walk.feed_records(block, &mut |record| self.add(record));
            fed.map_err(io::Error::other)
        };
        let fetched =
            repository.fetch_segment(backup.system_identifier, segment, backup.segment_size, sink);
        if fetched.await?.is_none() {
            return Ok(None);
        }
        let (_, carry) = walk.finish_with_carry().map_err(|error| damaged(error.to_string()))?;
        Ok(Some(carry))
    }

    fn add(&mut self, record: &WalRecord<'_>) {
        if record.lsn < self.start || self.is_over {
            return;
        }
        self.is_over = record.lsn >= self.end;
        if let Some(WalEvent::Transaction(end)) = record.event {
            let ended = end.time.to_unix_micros();
            self.is_over |= ended.is_some_and(|at| ends_before(&self.request.target.point, at));
        } else if let Some(StorageChange::TablespaceCreated { tablespace, location }) =
            record.storage_change()
            && !location.is_empty()
            && self.found.len() < NAMED_MAX
        {
            self.found.push(ForeignTablespace { oid: tablespace, location, lsn: record.lsn });
        }
    }
}
