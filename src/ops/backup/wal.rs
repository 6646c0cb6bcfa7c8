//! A backup is usable only with its WAL: waiting for it, and learning from it the
//! earliest time that recovery from this backup can be asked for.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};

use super::recording::Received;
use super::server::Facts;
use super::{Making, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::format::WalObject;
use crate::ops::failures::of_repo;
use crate::ops::wal_times::{StoredWay, WayError, each_mark, way_to, xact_time_at_end};
use crate::pg::{Lsn, PgTimestamp, TimelineHistory, WalEvent, WalFileName};
use crate::plan::lineage::{segment_on, unbroken_end};
use crate::repo::RepoError;
use crate::walsender::{Connection, Mode};

/// The pause between two looks, at first and at last.
const LOOK_FIRST: Duration = Duration::from_millis(100);
const LOOK_LAST: Duration = Duration::from_secs(5);

/// Headers read at a time.
const IN_FLIGHT: usize = 8;

/// Waits until the WAL from start to stop is in the repository; returns the earliest
/// time that recovery from the backup can be asked for.
pub(super) async fn settle(
    making: &Making<'_>,
    facts: &Facts,
    received: &Received,
) -> Result<PgTimestamp, Failure> {
    let way = wait(making, facts, received).await?;
    reaches_from(making, facts, received, &way).await.map_err(|error| {
        of_repo(error, "could not read the backup's WAL back from the repository", UNHARMED)
    })
}

async fn wait(
    making: &Making<'_>,
    facts: &Facts,
    received: &Received,
) -> Result<TimelineHistory, Failure> {
    let began = Instant::now();
    let mut pause = LOOK_FIRST;
    let mut asked = false;
    loop {
        let (way, end) = look(making, facts, received).await?;
        if end >= received.stop_lsn {
            return Ok(way);
        }
        if facts.in_recovery && !asked {
            asked = true;
            ask_primary_to_switch(making).await;
        }
        if began.elapsed() >= making.request.wal_timeout {
            return Err(wal_missing(making, received, end));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK_LAST);
    }
}

/// Returns the way to the backup's end and how far stored WAL goes along it.
async fn look(
    making: &Making<'_>,
    facts: &Facts,
    received: &Received,
) -> Result<(TimelineHistory, Lsn), Failure> {
    let failed = |error| of_repo(error, "could not look for the backup's WAL", UNHARMED);
    let (system_id, size) = (facts.system_id, facts.segment_size);
    let way = match way_to(making.repository, system_id, received.stop_timeline).await {
        Ok(way) => way,
        // The history file of a new timeline may be on its way still.
        Err(WayError::NoHistory(_)) => {
            return Ok((TimelineHistory::first(), Lsn(0)));
        }
        Err(WayError::Repo(error)) => return Err(failed(error)),
    };
    let inventory = making
        .repository
        .wal_between(system_id, size, received.start_lsn, received.stop_lsn)
        .await
        .map_err(failed)?;
    let end = unbroken_end(&way, &inventory.coverage(), received.start_lsn, size);
    Ok((way, end))
}

/// A standby cannot end a segment; its primary can, if our role may ask it to.
async fn ask_primary_to_switch(making: &Making<'_>) {
    for host in making.request.server.each_host() {
        let Ok(mut connection) = Connection::connect(&host, Mode::Sql).await else { continue };
        if connection.parameter("in_hot_standby") == Some("off") {
            if let Err(error) = connection.query("SELECT pg_switch_wal()").await {
                tracing::warn!("could not ask the primary for a WAL switch: {error}");
            }
            connection.close().await;
            return;
        }
        connection.close().await;
    }
    tracing::warn!(
        "the last WAL of this backup arrives when the primary's current segment is full or archive_timeout passes"
    );
}

fn wal_missing(making: &Making<'_>, received: &Received, end: Lsn) -> Failure {
    let have = if end > received.start_lsn { end } else { received.start_lsn };
    Failure::new(
        Kind::Integrity,
        format!(
            "the backup needs WAL from {} to {}, and after {} s the repository holds it only up to {have}",
            received.start_lsn,
            received.stop_lsn,
            making.request.wal_timeout.as_secs(),
        ),
        "No backup was recorded, since it could not be restored without that WAL; earlier backups and the server are as they were.",
        "Look at pg_stat_archiver and the server's log for why archive_command fails, or run `highwater check`. If archiving is only slow, raise `wal_timeout`.",
    )
}

/// No commit before the backup's end is later than what this returns.
///
/// Commits before the backup's start are not later than the last one whose WAL is stored, nor than
/// the moment when the server wrote the label; those between start and end are in the WAL that was
/// just waited for.
async fn reaches_from(
    making: &Making<'_>,
    facts: &Facts,
    received: &Received,
    way: &TimelineHistory,
) -> Result<PgTimestamp, RepoError> {
    let (system_id, size) = (facts.system_id, facts.segment_size);
    let first = size.segment_of(received.start_lsn);
    let last = size.segment_before(received.stop_lsn);
    let repository = making.repository;
    let whole = (first..last).map(|number| segment_on(way, number, size, received.stop_lsn));
    let times: Vec<Option<PgTimestamp>> = futures_util::stream::iter(whole)
        .map(|segment| async move {
            let object = WalObject::File(WalFileName::Segment(segment));
            match repository.header(&repository.wal_key(system_id, object)).await {
                Ok(header) => Ok(header.wal.and_then(|wal| wal.last_xact_time)),
                // Stored as pieces: read it instead.
                Err(error) if error.is_absent() => {
                    let mut latest: Option<PgTimestamp> = None;
                    each_mark(repository, system_id, segment, size, None, |mark| {
                        if let WalEvent::Transaction(end) = &mark.event {
                            latest = latest.max(Some(end.time));
                        }
                    })
                    .await?;
                    Ok(latest)
                }
                Err(error) => Err(error),
            }
        })
        .buffered(IN_FLIGHT)
        .try_collect()
        .await?;
    // A commit record that spans the border of the last two segments is in neither header.
    let stored = StoredWay { repository, system_id, way, size };
    let at_end = xact_time_at_end(stored, first, received.stop_lsn).await?;
    // The label's time has whole seconds, rounded down; the last commit before the start, where
    // its segment is stored, is a closer bound.
    let label = PgTimestamp::from_unix_seconds(received.label_written_unix + 1);
    let at_start = xact_time_at_end(stored, 0, received.start_lsn).await?;
    let before = at_start.map_or(label, |last| last.min(label));
    let latest = times.into_iter().flatten().chain(at_end).max();
    Ok(latest.map_or(before, |latest| latest.max(before)))
}
