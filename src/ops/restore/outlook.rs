//! What a restore to a target would use, and how long it would take by what was measured; nothing is created.

use serde::Serialize;

use super::plan::{Planned, make_plan};
use super::{Request, UNHARMED};
use crate::failure::Failure;
use crate::format::{BackupId, WalObject};
use crate::ops::failures::of_repo;
use crate::ops::wal_times::{StoredWay, WayError, way_to};
use crate::pg::{Lsn, PgTimestamp, Timeline, WalFileName};
use crate::plan::lineage::segment_on;
use crate::plan::target::RecoveryPoint;
use crate::repo::{RepoError, Repository};

/// Reports of `verify` among which a measured rate is looked for.
const REPORTS_ASKED: usize = 10;

/// What a restore to a target would use. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct Outlook {
    /// The target in words.
    pub target: String,
    /// The backup that it would begin with.
    pub backup: BackupId,
    /// The timeline that recovery would follow.
    pub timeline: Timeline,
    /// Where replay would begin.
    pub wal_start_lsn: Lsn,
    /// Where it would end, or the end of the segment in which it would.
    pub wal_end_lsn: Lsn,
    /// WAL between them.
    pub wal_bytes: u64,
    /// Bytes of the files to be written.
    pub size_bytes: u64,
    /// Bytes to be fetched for them, as stored.
    pub fetch_bytes: u64,
    /// How fast this repository was read last, where that was measured.
    pub measured: Option<MeasuredRate>,
    /// How long it would take to bring the files at that rate, in seconds. Replay of WAL comes on top: nobody has measured it.
    pub files_seconds: Option<u64>,
}

/// A rate that was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MeasuredRate {
    /// Stored bytes that `verify --deep` read and digested each second.
    pub bytes_per_second: u64,
    /// When.
    pub at: PgTimestamp,
    /// On which host.
    pub host: String,
}

/// Tells what a restore would use.
///
/// # Errors
/// Those of the plan: the target cannot be reached, and its message names the nearest that can.
pub async fn outlook(repository: &Repository, request: &Request) -> Result<Outlook, Failure> {
    let planned = make_plan(repository, request).await?;
    let failed = |error| of_repo(error, "could not look at the WAL up to the target", UNHARMED);
    let wal_end_lsn = match request.target.point {
        RecoveryPoint::Time { unix_micros } => {
            let time = PgTimestamp::from_unix_micros(unix_micros);
            end_for_time(repository, &planned, time).await.map_err(failed)?
        }
        _ => planned.report.wal_end_lsn,
    };
    let measured = measured_rate(repository).await.map_err(failed)?;
    let report = planned.report;
    Ok(Outlook {
        target: report.target,
        backup: report.backup,
        timeline: report.timeline,
        wal_start_lsn: report.wal_start_lsn,
        wal_end_lsn,
        wal_bytes: wal_end_lsn.0.saturating_sub(report.wal_start_lsn.0),
        size_bytes: report.size_bytes,
        fetch_bytes: report.fetch_bytes,
        files_seconds: measured
            .as_ref()
            .map(|rate| report.fetch_bytes.div_ceil(rate.bytes_per_second)),
        measured,
    })
}

/// Returns the end of the segment in which the first commit or abort behind a time is; the end of WAL, where no header tells.
async fn end_for_time(
    repository: &Repository,
    planned: &Planned,
    time: PgTimestamp,
) -> Result<Lsn, RepoError> {
    let (system_id, size) = (planned.backup.system_identifier, planned.backup.segment_size);
    let (start, end) = (planned.report.wal_start_lsn, planned.report.wal_end_lsn);
    let way = match way_to(repository, system_id, planned.report.timeline).await {
        Ok(way) => way,
        Err(WayError::NoHistory(_)) => return Ok(end),
        Err(WayError::Repo(error)) => return Err(error),
    };
    let stored = StoredWay { repository, system_id, way: &way, size };
    // Times of commits go up with WAL but for small steps back, so that halving finds the segment, or a neighbour.
    let (mut low, last_number) = (size.segment_of(start), size.segment_before(end));
    let mut high = last_number;
    while low < high {
        let middle = low + (high - low) / 2;
        // Segments without a commit tell nothing: the next that tells decides for them.
        let mut at = middle;
        let mut last = last_xact(stored, at, end).await?;
        while last.is_none() && at < high {
            at += 1;
            last = last_xact(stored, at, end).await?;
        }
        match last {
            Some(last) if last <= time => low = at + 1,
            _ => high = middle,
        }
    }
    // Halving ends at the first of those for which the same segment decides: it is that one, and not they.
    while low < last_number && last_xact(stored, low, end).await?.is_none() {
        low += 1;
    }
    Ok(size.start_of(low + 1).min(end))
}

/// Returns the latest time of a commit or abort in a segment, by its header.
async fn last_xact(
    stored: StoredWay<'_>,
    number: u64,
    end: Lsn,
) -> Result<Option<PgTimestamp>, RepoError> {
    let StoredWay { repository, system_id, way, size } = stored;
    let segment = segment_on(way, number, size, end);
    let object = WalObject::File(WalFileName::Segment(segment));
    match repository.header(&repository.wal_key(system_id, object)).await {
        Ok(header) => Ok(header.wal.and_then(|wal| wal.last_xact_time)),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns how fast this repository was read when it was last measured.
async fn measured_rate(repository: &Repository) -> Result<Option<MeasuredRate>, RepoError> {
    let reports = repository.verifications(REPORTS_ASKED).await?.into_iter();
    let mut rates = reports.filter_map(|report| {
        let millis = report.read_millis.filter(|millis| *millis > 0)?;
        let bytes_per_second = report.read_bytes.saturating_mul(1000) / millis;
        let rate = MeasuredRate { bytes_per_second, at: report.finished_at, host: report.host };
        (bytes_per_second > 0).then_some(rate)
    });
    Ok(rates.next())
}
