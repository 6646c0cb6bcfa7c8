//! Where a backup that the server did not stream starts and stops.

use std::path::Path;

use super::super::UNHARMED;
use super::super::recording::unexpected;
use super::super::server::Facts;
use super::read_control;
use super::session::{Ended, Started};
use crate::failure::Failure;
use crate::ops::failures::of_disk;
use crate::pg::{
    BackupFrom, BackupLabel, Lsn, Timeline, TimelineHistory, WalFileName, WalRange, wal_ranges_of,
};
use crate::pgdata::DiskError;

/// Where the backup starts and stops, timelines included.
pub(super) struct Ends {
    pub(super) timeline: Timeline,
    pub(super) stop_timeline: Timeline,
    pub(super) wal_ranges: Vec<WalRange>,
}

impl Ends {
    pub(super) async fn find(
        pgdata: &Path,
        started: &Started,
        ended: &Ended,
        facts: &Facts,
    ) -> Result<Self, Failure> {
        let label = BackupLabel::parse(ended.label.as_bytes()).map_err(|error| {
            unexpected(format!("the server's backup label cannot be understood: {error}"))
        })?;
        let timeline = label.start_timeline;
        if (label.from == BackupFrom::Standby) != facts.in_recovery {
            return Err(unexpected("the server changed between primary and standby"));
        }
        let mut history = TimelineHistory::first();
        if facts.in_recovery {
            // Its recovery point was at the stop or further when the backup ended.
            let after = read_control(pgdata).await?.1;
            let newest = Timeline(after.min_recovery_point_timeline);
            if newest != timeline {
                history = read_history(pgdata, newest)?;
            }
        }
        if history.timeline() == timeline || history == TimelineHistory::first() {
            let range =
                WalRange { timeline, start_lsn: started.start_lsn, end_lsn: ended.stop_lsn };
            return Ok(Self { timeline, stop_timeline: timeline, wal_ranges: vec![range] });
        }
        // The stop itself is excluded: at a switch point it still ends the older timeline.
        let stop_timeline = history.owner_of(Lsn(ended.stop_lsn.0.saturating_sub(1)));
        let wal_ranges = wal_ranges_of(&history, timeline, started.start_lsn, ended.stop_lsn);
        let wal_ranges = wal_ranges
            .ok_or_else(|| unexpected("the server left the timeline on which the backup began"))?;
        Ok(Self { timeline, stop_timeline, wal_ranges })
    }
}

fn read_history(pgdata: &Path, timeline: Timeline) -> Result<TimelineHistory, Failure> {
    let place = pgdata.join("pg_wal").join(WalFileName::History(timeline).to_string());
    let failed = |error| {
        let error = DiskError::new("read", &place, error);
        of_disk(error, format!("could not read the history of timeline {timeline}"), UNHARMED)
    };
    let bytes = std::fs::read(&place).map_err(failed)?;
    TimelineHistory::parse(timeline, &bytes).map_err(|error| {
        unexpected(format!("the history of timeline {timeline} cannot be understood: {error}"))
    })
}
