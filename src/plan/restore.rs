//! Which backup a restore begins from, and whether its target can be reached.
//!
//! PostgreSQL's own rules decide (manual, "Recovery Target";
//! `src/backend/access/transam/xlogrecovery.c`, `recoveryStopsBefore` and `recoveryStopsAfter`):
//!
//! - a time is reached only when a commit or abort *later* than it is seen;
//! - an LSN is reached when a record *begins* at or behind it;
//! - a stop before the backup is consistent is fatal;
//! - a backup serves a timeline only if the fork lies behind the backup's end.
//!
//! What this page adds: everything is known before a byte is restored, and a
//! target that cannot be reached is refused with the nearest that can.

use std::collections::BTreeMap;

use super::lineage::{Coverage, unbroken_end};
use super::target::{RecoveryPoint, TimelineChoice};
use crate::format::{BackupId, Committed};
use crate::pg::{Lsn, PgTimestamp, SegmentSize, Timeline, TimelineHistory};

/// What the repository holds, as far as a decision needs it.
#[derive(Debug, Clone, Copy)]
pub struct Holdings<'a> {
    /// Committed backups of the incarnation, oldest first.
    pub backups: &'a [Committed],
    /// Stored WAL.
    pub coverage: &'a Coverage,
    /// History files, by timeline.
    pub histories: &'a BTreeMap<Timeline, TimelineHistory>,
    /// The WAL segment size.
    pub segment_size: SegmentSize,
}

/// A backup that recovery on some way can begin from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// The backup.
    pub backup: &'a Committed,
    /// How far WAL goes without a hole from it (excluded).
    pub unbroken_end: Lsn,
}

/// What the headers of the WAL at the end of a candidate's way tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reach {
    /// The latest time of a commit or abort in WAL that the candidate replays; `None` without any.
    pub last_xact_time: Option<PgTimestamp>,
    /// Where the last whole record begins.
    pub last_record_lsn: Option<Lsn>,
}

/// Where a transaction's end or a restore point was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundAt {
    /// Where replay ends: behind its record, or in front of it if the target is exclusive.
    pub end_lsn: Lsn,
}

/// Why nothing can be restored as asked, with the nearest that can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// There is no committed backup.
    #[error("there is no backup of this cluster in the repository")]
    NoBackup,
    /// The backup named is not there, or not committed.
    #[error("there is no backup `{0}`")]
    NoSuchBackup(BackupId),
    /// The timeline named has no history file.
    #[error("timeline {0} is not in the repository: its history file `{file}` is absent", file = .0.history_file_name())]
    NoSuchTimeline(Timeline),
    /// No backup lies on the way to the timeline.
    #[error(
        "no backup lies on the way to timeline {timeline}: each of them ended after its fork, or on another branch"
    )]
    NotOnTimeline {
        /// The timeline.
        timeline: Timeline,
    },
    /// A backup is there, but the WAL that makes it consistent is not.
    #[error(
        "backup `{id}` needs WAL from {start_lsn} to {stop_lsn}, and the repository holds it only up to {unbroken_end}"
    )]
    NotConsistent {
        /// The newest such backup.
        id: BackupId,
        /// Where its WAL begins.
        start_lsn: Lsn,
        /// Where it becomes consistent.
        stop_lsn: Lsn,
        /// How far stored WAL goes.
        unbroken_end: Lsn,
    },
    /// The target lies before what any usable backup can reach.
    #[error("{target} lies before {earliest}, the earliest point that can be reached{of}")]
    TooEarly {
        /// The target in words.
        target: String,
        /// The earliest point in words.
        earliest: String,
        /// ` from backup …` if one was named, else empty.
        of: String,
    },
    /// The target lies behind the end of stored WAL.
    #[error("{target} lies behind {latest}, the latest point that can be reached{because}")]
    TooLate {
        /// The target in words.
        target: String,
        /// The latest point in words.
        latest: String,
        /// Why not further: the end of the archive or a gap.
        because: String,
    },
    /// The target lies between moments that can be reached: in a hole of the WAL, or where no backup is consistent yet.
    #[error(
        "{target} cannot be reached: the nearest that can is {before} before it{because}, or {after} behind it, where a later backup is consistent"
    )]
    Between {
        /// The target in words.
        target: String,
        /// The latest point before it in words.
        before: String,
        /// Why not further.
        because: String,
        /// The earliest point behind it in words.
        after: String,
    },
    /// A restore point or transaction is nowhere in the WAL that can be replayed.
    #[error(
        "{target} is not in the archived WAL on the way to timeline {timeline} (looked from {from} to {to})"
    )]
    NotFound {
        /// The target in words.
        target: String,
        /// The timeline.
        timeline: Timeline,
        /// Where the search began.
        from: Lsn,
        /// Where it ended.
        to: Lsn,
    },
}

/// Returns the way to the timeline that was asked for.
///
/// `latest` is the highest timeline that anything is stored of, as PostgreSQL
/// chooses it; `current` is that of the backup named, or else of the newest one.
///
/// # Errors
/// [`Unreachable::NoBackup`], [`Unreachable::NoSuchBackup`], [`Unreachable::NoSuchTimeline`].
pub fn way(
    holdings: &Holdings<'_>,
    choice: TimelineChoice,
    named: Option<&BackupId>,
) -> Result<TimelineHistory, Unreachable> {
    let newest = holdings.backups.last().ok_or(Unreachable::NoBackup)?;
    let backup = match named {
        None => newest,
        Some(id) => holdings
            .backups
            .iter()
            .find(|backup| backup.id == *id)
            .ok_or_else(|| Unreachable::NoSuchBackup(id.clone()))?,
    };
    let timeline = match choice {
        TimelineChoice::Current => backup.stop_timeline,
        TimelineChoice::Number(timeline) => timeline,
        TimelineChoice::Latest => {
            let stored = holdings.coverage.keys().chain(holdings.histories.keys());
            stored.copied().max().unwrap_or(backup.stop_timeline).max(backup.stop_timeline)
        }
    };
    match holdings.histories.get(&timeline) {
        Some(history) => Ok(history.clone()),
        None if timeline == Timeline::FIRST => Ok(TimelineHistory::first()),
        None => Err(Unreachable::NoSuchTimeline(timeline)),
    }
}

/// Returns whether recovery on a way can begin from a backup, as far as timelines decide it.
pub fn lies_on(way: &TimelineHistory, backup: &Committed) -> bool {
    way.contains(backup.timeline, backup.start_lsn)
        && way.contains_end(backup.stop_timeline, backup.stop_lsn)
}

/// Returns the backups that recovery on a way can begin from, newest first.
///
/// # Errors
/// Why there is none.
pub fn candidates<'a>(
    holdings: &Holdings<'a>,
    way: &TimelineHistory,
    named: Option<&BackupId>,
) -> Result<Vec<Candidate<'a>>, Unreachable> {
    let wanted = |backup: &&Committed| named.is_none_or(|id| backup.id == *id);
    let on_the_way: Vec<&Committed> =
        holdings.backups.iter().filter(wanted).filter(|backup| lies_on(way, backup)).collect();
    let newest =
        *on_the_way.last().ok_or(Unreachable::NotOnTimeline { timeline: way.timeline() })?;
    let end_of = |backup: &Committed| {
        unbroken_end(way, holdings.coverage, backup.start_lsn, holdings.segment_size)
    };
    let usable: Vec<Candidate<'a>> = on_the_way
        .into_iter()
        .rev()
        .map(|backup| Candidate { backup, unbroken_end: end_of(backup) })
        .filter(|candidate| candidate.unbroken_end >= candidate.backup.stop_lsn)
        .collect();
    if usable.is_empty() {
        return Err(Unreachable::NotConsistent {
            id: newest.id.clone(),
            start_lsn: newest.start_lsn,
            stop_lsn: newest.stop_lsn,
            unbroken_end: end_of(newest),
        });
    }
    Ok(usable)
}

/// Returns the newest candidate that can stop at a time, given what the WAL at its end tells.
///
/// # Errors
/// [`Unreachable::TooEarly`] or [`Unreachable::TooLate`] with the nearest points.
pub fn for_time<'a>(
    candidates: &[Candidate<'a>],
    time: PgTimestamp,
    inclusive: bool,
    named: bool,
    reach_of: impl Fn(&Candidate<'a>) -> Reach,
) -> Result<Candidate<'a>, Unreachable> {
    // Inclusive stops before the first commit later than the time; exclusive
    // before the first that is as late.
    let margin = i64::from(!inclusive);
    let earliest_of = |candidate: &Candidate<'_>| {
        PgTimestamp(candidate.backup.reaches_from.0.saturating_add(margin))
    };
    let latest_of = |candidate: &Candidate<'a>| {
        let last = reach_of(candidate).last_xact_time?;
        Some(PgTimestamp(last.0.saturating_sub(1).saturating_add(margin)))
    };
    let Some(chosen) = candidates.iter().find(|candidate| earliest_of(candidate) <= time) else {
        let earliest = candidates.iter().map(earliest_of).min();
        let earliest = earliest.map_or_else(String::new, |earliest| earliest.to_string());
        let of = if named { " from that backup".to_owned() } else { String::new() };
        return Err(Unreachable::TooEarly { target: time.to_string(), earliest, of });
    };
    if latest_of(chosen).is_some_and(|latest| time <= latest) {
        return Ok(*chosen);
    }
    // What lies before the backup's own end is no point that it can reach.
    let reached = |candidate| latest_of(candidate).filter(|at| *at >= earliest_of(candidate));
    let latest = candidates.iter().filter_map(reached).max();
    let end = chosen.unbroken_end;
    let (latest, because) = match latest {
        Some(latest) => (latest.to_string(), format!(": WAL goes on without a hole up to {end}")),
        None => (
            format!("LSN {end}"),
            ": no commit or abort after the end of a backup is archived".to_owned(),
        ),
    };
    let because = format!(
        "{because}, and PostgreSQL stops at a time only when a commit or abort after it follows"
    );
    let target = time.to_string();
    let later = candidates.iter().map(earliest_of).filter(|earliest| *earliest > time).min();
    Err(match later {
        None => Unreachable::TooLate { target, latest, because },
        Some(after) => {
            // The end that matters is that of what begins before the time.
            let sooner = candidates.iter().filter(|candidate| earliest_of(candidate) <= time);
            let before = sooner.filter_map(reached).max();
            let before = before.map_or_else(|| format!("LSN {end}"), |at| at.to_string());
            Unreachable::Between { target, before, because, after: after.to_string() }
        }
    })
}

/// Returns the newest candidate that can stop at an LSN.
///
/// # Errors
/// [`Unreachable::TooEarly`] or [`Unreachable::TooLate`] with the nearest points.
pub fn for_lsn<'a>(
    candidates: &[Candidate<'a>],
    lsn: Lsn,
    named: bool,
    reach_of: impl Fn(&Candidate<'a>) -> Reach,
) -> Result<Candidate<'a>, Unreachable> {
    let target = format!("LSN {lsn}");
    let chosen = candidates.iter().find(|candidate| candidate.backup.stop_lsn <= lsn);
    let Some(chosen) = chosen else {
        let earliest = candidates
            .last()
            .map_or_else(String::new, |candidate| format!("LSN {}", candidate.backup.stop_lsn));
        let of = if named { " from that backup".to_owned() } else { String::new() };
        return Err(Unreachable::TooEarly { target, earliest, of });
    };
    let last = reach_of(chosen).last_record_lsn;
    if last.is_some_and(|last| last >= lsn) {
        return Ok(*chosen);
    }
    let latest = format!("LSN {}", last.unwrap_or(chosen.backup.stop_lsn));
    let because = ", where the last archived record begins".to_owned();
    let later = candidates.iter().map(|candidate| candidate.backup.stop_lsn);
    Err(match later.filter(|stop| *stop > lsn).min() {
        None => Unreachable::TooLate { target, latest, because },
        Some(after) => {
            let because = ", where the last record before a hole begins".to_owned();
            let after = format!("LSN {after}");
            Unreachable::Between { target, before: latest, because, after }
        }
    })
}

/// Returns the newest candidate that is consistent before what was found.
///
/// # Errors
/// [`Unreachable::TooEarly`] when it lies inside or before every backup.
pub fn for_found<'a>(
    candidates: &[Candidate<'a>],
    point: &RecoveryPoint,
    found: FoundAt,
    named: bool,
) -> Result<Candidate<'a>, Unreachable> {
    let reaches = |candidate: &&Candidate<'a>| {
        candidate.backup.stop_lsn <= found.end_lsn && found.end_lsn <= candidate.unbroken_end
    };
    candidates.iter().find(reaches).copied().ok_or_else(|| {
        let at = found.end_lsn;
        let ends = candidates.iter().filter(|candidate| candidate.backup.stop_lsn <= at);
        let before = ends.map(|candidate| candidate.unbroken_end).max();
        let later = candidates.iter().map(|candidate| candidate.backup.stop_lsn);
        let after = later.filter(|stop| *stop > at).min();
        if let (Some(before), Some(after)) = (before, after) {
            return Unreachable::Between {
                target: format!("{point}, at LSN {at},"),
                before: format!("LSN {before}"),
                because: ", where a hole in WAL begins".to_owned(),
                after: format!("LSN {after}"),
            };
        }
        let earliest = candidates
            .last()
            .map_or_else(String::new, |candidate| format!("LSN {}", candidate.backup.stop_lsn));
        let of = if named { " from that backup".to_owned() } else { String::new() };
        Unreachable::TooEarly { target: format!("{point}, at LSN {at},"), earliest, of }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
