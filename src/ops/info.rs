//! `info`: backups, WAL with its gaps, and the recovery window.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::current_identity;
use super::failures::of_repo;
use super::wal_times::{StoredWay, histories_of, reach};
use crate::failure::Failure;
use crate::format::{BackupId, Committed, DamagedPages, Identity};
use crate::pg::{Lsn, PgTimestamp, SystemId, Timeline, TimelineHistory};
use crate::plan::restore::{Holdings, candidates};
use crate::plan::window::{gaps, window};
use crate::repo::{BackupState, RepoError, Repository, WalInventory};

const UNHARMED: &str = "Nothing was changed.";

/// Everything that `info` tells. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The cluster's name.
    pub cluster: String,
    /// The repository's URL.
    pub repository: String,
    /// The system identifier of the incarnation that lives here now.
    pub system_identifier: SystemId,
    /// The server's version: of the newest backup, else the major version that was claimed.
    pub postgres_version: String,
    /// The WAL segment size, in bytes.
    pub wal_segment_bytes: u64,
    /// Committed backups, oldest first.
    pub backups: Vec<BackupInfo>,
    /// Backups that began and are not committed.
    pub unfinished_backups: Vec<UnfinishedInfo>,
    /// Backups of which a document is damaged or of a newer format; what they hold is not known.
    pub damaged_backups: Vec<DamagedInfo>,
    /// WAL, by timeline.
    pub wal: Vec<WalInfo>,
    /// From when to when the cluster can be brought back; absent without a usable backup.
    pub recovery_window: Option<WindowInfo>,
}

/// One backup.
#[derive(Debug, Clone, Serialize)]
pub struct BackupInfo {
    /// Its id.
    pub id: BackupId,
    /// When it began.
    pub started_at: PgTimestamp,
    /// When it was committed.
    pub finished_at: PgTimestamp,
    /// Its timeline.
    pub timeline: Timeline,
    /// Where replay begins.
    pub start_lsn: Lsn,
    /// Where it becomes consistent.
    pub stop_lsn: Lsn,
    /// Bytes of its files.
    pub size_bytes: u64,
    /// Bytes it added to the repository.
    pub stored_bytes: u64,
    /// How it was taken.
    pub source: String,
    /// `primary` or `standby`.
    pub taken_from: String,
    /// What the operator wrote beside it.
    pub annotations: BTreeMap<String, String>,
    /// Pages that were damaged on the server's disk when they were read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damaged_pages: Option<DamagedPages>,
    /// Whether the WAL that makes it consistent is here.
    pub usable: bool,
    /// The system identifier, where it is not the current incarnation's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<SystemId>,
}

/// A backup that is not one (yet).
#[derive(Debug, Clone, Serialize)]
pub struct UnfinishedInfo {
    /// Its id.
    pub id: BackupId,
    /// When it began.
    pub begun_at: Option<PgTimestamp>,
    /// Where.
    pub host: Option<String>,
    /// Backups that need packs of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub needed_by: Vec<BackupId>,
}

/// A backup of which a document cannot be read.
#[derive(Debug, Clone, Serialize)]
pub struct DamagedInfo {
    /// Its id.
    pub id: BackupId,
    /// Which document it is, and what is wrong with it.
    pub why: String,
}

/// The WAL of one timeline.
#[derive(Debug, Clone, Serialize)]
pub struct WalInfo {
    /// The timeline.
    pub timeline: Timeline,
    /// The first byte stored (included).
    pub start_lsn: Lsn,
    /// The end (excluded).
    pub end_lsn: Lsn,
    /// Holes between them.
    pub gaps: Vec<GapInfo>,
    /// Segments that the server had damaged and an operator accepted as lost.
    pub damaged: Vec<String>,
    /// Bytes as stored.
    pub stored_bytes: u64,
}

/// A hole in a timeline's WAL.
#[derive(Debug, Clone, Serialize)]
pub struct GapInfo {
    /// The first missing byte (included).
    pub start_lsn: Lsn,
    /// The end (excluded).
    pub end_lsn: Lsn,
}

/// The recovery window.
#[derive(Debug, Clone, Serialize)]
pub struct WindowInfo {
    /// The earliest time that can be asked for.
    pub earliest_time: PgTimestamp,
    /// The time of the last commit that is archived; absent when no commit is.
    pub latest_time: Option<PgTimestamp>,
    /// The earliest LSN that can be asked for.
    pub earliest_lsn: Lsn,
    /// How far archived WAL goes without a hole (excluded).
    pub latest_lsn: Lsn,
    /// The timeline.
    pub timeline: Timeline,
}

/// Gathers what there is to tell.
pub async fn run(repository: &Repository) -> Result<Report, Failure> {
    let identity = current_identity(repository, UNHARMED).await?;
    gather(repository, &identity).await.map_err(|error| {
        of_repo(error, format!("could not take stock of {}", repository.describe()), UNHARMED)
    })
}

async fn gather(repository: &Repository, identity: &Identity) -> Result<Report, RepoError> {
    let system_id = identity.system_identifier;
    let size = identity.segment_size;
    let states = repository.backups().await?;
    let inventory = repository.wal_inventory(system_id, size).await?;
    let histories = histories_of(repository, system_id, inventory.histories.clone()).await?;
    let coverage = inventory.coverage();
    let own: Vec<Committed> = states
        .iter()
        .filter_map(|state| match state {
            BackupState::Committed(backup) if backup.system_identifier == system_id => {
                Some(backup.clone())
            }
            _ => None,
        })
        .collect();
    let holdings =
        Holdings { backups: &own, coverage: &coverage, histories: &histories, segment_size: size };
    let recovery_window = match window(&holdings) {
        None => None,
        Some(window) => {
            let (lsn, from) = (window.latest_lsn(), window.oldest.backup.start_lsn);
            let stored = StoredWay { repository, system_id, way: &window.way, size };
            let end = reach(stored, from, lsn).await?;
            Some(WindowInfo {
                earliest_time: window.earliest_time(),
                latest_time: end.last_commit_time,
                earliest_lsn: window.earliest_lsn(),
                latest_lsn: lsn,
                timeline: window.way.timeline(),
            })
        }
    };
    let mut usable = usable_backups(&holdings);
    usable.extend(usable_of_predecessors(repository, &states, system_id).await?);
    let newest = own.last().map(|backup| version_text(backup.postgres_version));
    Ok(Report {
        cluster: repository.cluster().to_string(),
        repository: repository.describe(),
        system_identifier: system_id,
        postgres_version: newest.unwrap_or_else(|| identity.postgres_major.to_string()),
        wal_segment_bytes: size.bytes(),
        unfinished_backups: unfinished(&states),
        damaged_backups: damaged(&states),
        backups: backups_info(states, system_id, &usable),
        wal: wal_info(&inventory, &coverage),
        recovery_window,
    })
}

fn version_text(version: u32) -> String {
    crate::pg::ServerVersion(version).to_string()
}

/// Returns the backups that are consistent along the way to their own timeline.
fn usable_backups(holdings: &Holdings<'_>) -> BTreeSet<BackupId> {
    let usable = holdings.backups.iter().filter(|backup| {
        let way = match holdings.histories.get(&backup.stop_timeline) {
            Some(history) => history.clone(),
            None => TimelineHistory::first(),
        };
        candidates(holdings, &way, Some(&backup.id)).is_ok()
    });
    usable.map(|backup| backup.id.clone()).collect()
}

/// Returns the usable backups of the incarnations before the present one: after `pg_upgrade` they
/// are the only way back to a time before it. Each has WAL of its own.
async fn usable_of_predecessors(
    repository: &Repository,
    states: &[BackupState],
    current: SystemId,
) -> Result<BTreeSet<BackupId>, RepoError> {
    let mut by_incarnation: BTreeMap<SystemId, Vec<Committed>> = BTreeMap::new();
    for state in states {
        if let BackupState::Committed(backup) = state
            && backup.system_identifier != current
        {
            by_incarnation.entry(backup.system_identifier).or_default().push(backup.clone());
        }
    }
    let mut usable = BTreeSet::new();
    for (system_id, backups) in by_incarnation {
        let Some(size) = backups.last().map(|backup| backup.segment_size) else { continue };
        let inventory = repository.wal_inventory(system_id, size).await?;
        let histories = histories_of(repository, system_id, inventory.histories.clone()).await?;
        usable.extend(usable_backups(&Holdings {
            backups: &backups,
            coverage: &inventory.coverage(),
            histories: &histories,
            segment_size: size,
        }));
    }
    Ok(usable)
}

fn unfinished(states: &[BackupState]) -> Vec<UnfinishedInfo> {
    let unfinished = states.iter().filter_map(|state| match state {
        BackupState::Unfinished(backup) => Some(UnfinishedInfo {
            id: backup.id.clone(),
            begun_at: backup.begun.as_ref().map(|begun| begun.begun_at),
            host: backup.begun.as_ref().map(|begun| begun.host.clone()),
            needed_by: needing(states, &backup.id),
        }),
        BackupState::Committed(_) | BackupState::Unreadable(_) => None,
    });
    unfinished.collect()
}

/// Returns the committed backups that need a pack of another one.
fn needing(states: &[BackupState], id: &BackupId) -> Vec<BackupId> {
    let needing = states.iter().filter_map(|state| match state {
        BackupState::Committed(backup) => {
            let needs = backup.references.iter().any(|reference| reference.backup == *id);
            needs.then(|| backup.id.clone())
        }
        BackupState::Unfinished(_) | BackupState::Unreadable(_) => None,
    });
    needing.collect()
}

fn damaged(states: &[BackupState]) -> Vec<DamagedInfo> {
    let damaged = states.iter().filter_map(|state| match state {
        BackupState::Unreadable(backup) => {
            Some(DamagedInfo { id: backup.id.clone(), why: backup.why.clone() })
        }
        BackupState::Committed(_) | BackupState::Unfinished(_) => None,
    });
    damaged.collect()
}

fn backups_info(
    states: Vec<BackupState>,
    system_id: SystemId,
    usable: &BTreeSet<BackupId>,
) -> Vec<BackupInfo> {
    let committed = states.into_iter().filter_map(|state| match state {
        BackupState::Committed(backup) => Some(backup),
        BackupState::Unfinished(_) | BackupState::Unreadable(_) => None,
    });
    committed
        .map(|backup| BackupInfo {
            usable: usable.contains(&backup.id),
            damaged_pages: (!backup.damaged_pages.is_empty()).then_some(backup.damaged_pages),
            started_at: backup.started_at,
            finished_at: backup.finished_at,
            timeline: backup.timeline,
            start_lsn: backup.start_lsn,
            stop_lsn: backup.stop_lsn,
            size_bytes: backup.size_bytes,
            stored_bytes: backup.stored_bytes,
            source: backup.source,
            taken_from: backup.taken_from,
            annotations: backup.annotations,
            system_identifier: (backup.system_identifier != system_id)
                .then_some(backup.system_identifier),
            id: backup.id,
        })
        .collect()
}

fn wal_info(
    inventory: &WalInventory,
    coverage: &BTreeMap<Timeline, Vec<(Lsn, Lsn)>>,
) -> Vec<WalInfo> {
    let timelines = inventory.timelines.iter().filter_map(|(timeline, wal)| {
        let (first, last) = (wal.ranges.first()?, wal.ranges.last()?);
        let holes = gaps(coverage, *timeline).into_iter();
        Some(WalInfo {
            timeline: *timeline,
            start_lsn: first.0,
            end_lsn: last.1,
            gaps: holes
                .map(|gap| GapInfo { start_lsn: gap.start_lsn, end_lsn: gap.end_lsn })
                .collect(),
            damaged: wal.damaged.iter().map(ToString::to_string).collect(),
            stored_bytes: wal.stored_bytes,
        })
    });
    timelines.collect()
}
