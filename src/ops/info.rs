//! `info`: backups, WAL with its gaps, and the recovery window.

mod report;

use std::collections::BTreeMap;

pub use self::report::{
    AcknowledgedInfo, BackupInfo, DamagedInfo, DrillInfo, EncryptionInfo, GapInfo, LetGoInfo,
    PinInfo, Report, UnfinishedInfo, VerificationInfo, WalInfo, WindowInfo,
};
use super::failures::of_repo;
use super::stock::{Gathered, take_stock};
use super::wal_times::{StoredWay, reach};
use super::{current_identity, now};
use crate::failure::Failure;
use crate::format::{BackupId, Committed, Identity, Verification};
use crate::pg::{Lsn, SystemId, Timeline};
use crate::plan::retention::{BegunState, Incarnation, Policy, PolicyInfo, Reason, Stock, plan};
use crate::plan::stall::{closed_by, is_stored};
use crate::plan::window::{Gap, gaps, stretches, ways, window};
use crate::repo::{RepoError, Repository, StoredPin, WalInventory};

const UNHARMED: &str = "Nothing was changed.";

/// Stretches of one timeline of which the latest time is found out; each costs the store a few reads.
const TIMED_MAX: usize = 32;

/// Gathers what there is to tell; `policy` says which backups `expire` would keep.
pub async fn run(repository: &Repository, policy: &Policy) -> Result<Report, Failure> {
    let identity = current_identity(repository, UNHARMED).await?;
    gather(repository, &identity, policy).await.map_err(|error| {
        of_repo(error, format!("could not take stock of {}", repository.describe()), UNHARMED)
    })
}

async fn gather(
    repository: &Repository,
    identity: &Identity,
    policy: &Policy,
) -> Result<Report, RepoError> {
    let system_id = identity.system_identifier;
    let size = identity.segment_size;
    let gathered = take_stock(repository, &repository.identities().await?).await?;
    let current = gathered.stock.incarnations.iter().find(|one| one.system_id == system_id);
    let recovery_window = match current {
        Some(current) => window_info(repository, current).await?,
        None => None,
    };
    let reachable = match current {
        Some(current) => reachable(repository, current).await?,
        None => Vec::new(),
    };
    let acknowledged = acknowledged(repository).await?;
    let verification = repository.verifications(1).await?.pop();
    let drill = repository.last_drill().await?.map(DrillInfo::of);
    let own = current.and_then(|current| current.backups.last());
    let newest = own.map(|backup| version_text(backup.postgres_version));
    let inventory = gathered.inventories.get(&system_id).cloned().unwrap_or_default();
    let let_go = let_go(repository, current).await?;
    Ok(Report {
        cluster: repository.cluster().to_string(),
        repository: repository.describe(),
        system_identifier: system_id,
        postgres_version: newest.unwrap_or_else(|| identity.postgres_major.to_string()),
        wal_segment_bytes: size.bytes(),
        encryption: encryption(repository, identity).await?,
        retention: policy.is_set().then(|| PolicyInfo::of(policy)),
        unfinished_backups: unfinished(&gathered.stock),
        damaged_backups: damaged(&gathered),
        backups: backups_info(&gathered, system_id, policy),
        wal: wal_info(&inventory, &inventory.coverage(), &let_go),
        recovery_window,
        reachable,
        verification: verification.map(|report| verification_info(&report, &acknowledged)),
        acknowledged,
        let_go,
        host: None,
        drill,
    })
}

async fn encryption(
    repository: &Repository,
    identity: &Identity,
) -> Result<Option<EncryptionInfo>, RepoError> {
    if identity.encryption.is_none() {
        return Ok(None);
    }
    let ring = repository.key_ring().await?;
    Ok(Some(EncryptionInfo {
        repository_key: ring.in_use().id,
        repository_keys: ring.repository_keys().len() as u64,
        user_keys: ring.user_keys().into_iter().collect(),
        in_hand: ring.user_key(),
    }))
}

/// Tells what was let go of the cluster that lives here now, and did not come all the same. A record that cannot be read is `verify`'s to find.
async fn let_go(
    repository: &Repository,
    current: Option<&Incarnation>,
) -> Result<Vec<LetGoInfo>, RepoError> {
    let Some(current) = current else { return Ok(Vec::new()) };
    let read = repository.gaps().await?.into_iter().filter_map(|(_, gap)| gap.ok());
    let ranges = |timeline| current.coverage.get(&timeline).map_or(&[][..], Vec::as_slice);
    let own = read.filter(|gap| gap.system_identifier == current.system_id);
    let own = own.filter(|gap| !is_stored(gap, ranges(gap.timeline)));
    let told = own.map(|gap| LetGoInfo {
        closed_by: closed_by(&gap, &current.backups).cloned(),
        timeline: gap.timeline,
        start_lsn: gap.start_lsn,
        end_lsn: gap.end_lsn,
        let_go_at: gap.let_go_at,
        host: gap.host,
        why: gap.why,
    });
    Ok(told.collect())
}

async fn window_info(
    repository: &Repository,
    current: &Incarnation,
) -> Result<Option<WindowInfo>, RepoError> {
    let (system_id, size) = (current.system_id, current.segment_size);
    let holdings = current.holdings();
    let Some(window) = window(&holdings) else { return Ok(None) };
    let (lsn, from) = (window.latest_lsn(), window.oldest.backup.start_lsn);
    let stored = StoredWay { repository, system_id, way: &window.way, size };
    let end = reach(stored, from, lsn).await?;
    Ok(Some(WindowInfo {
        earliest_time: window.earliest_time(),
        latest_time: end.last_commit_time,
        earliest_lsn: window.earliest_lsn(),
        latest_lsn: lsn,
        timeline: window.way.timeline(),
    }))
}

/// Tells what can be reached on the way to each timeline. Of very many stretches, those of the past have no latest time.
async fn reachable(
    repository: &Repository,
    current: &Incarnation,
) -> Result<Vec<WindowInfo>, RepoError> {
    let (system_id, size) = (current.system_id, current.segment_size);
    let holdings = current.holdings();
    let mut all = Vec::new();
    for way in ways(&holdings) {
        let stretches = stretches(&holdings, &way);
        let untimed = stretches.len().saturating_sub(TIMED_MAX);
        for (number, stretch) in stretches.into_iter().enumerate() {
            let stored = StoredWay { repository, system_id, way: &way, size };
            let latest_time = if number < untimed {
                None
            } else {
                let end = reach(stored, stretch.oldest.start_lsn, stretch.end_lsn).await?;
                end.last_commit_time
            };
            all.push(WindowInfo {
                earliest_time: stretch.earliest_time(),
                latest_time,
                earliest_lsn: stretch.start_lsn,
                latest_lsn: stretch.end_lsn,
                timeline: way.timeline(),
            });
        }
    }
    Ok(all)
}

async fn acknowledged(repository: &Repository) -> Result<Vec<AcknowledgedInfo>, RepoError> {
    let all = repository.acknowledgements().await?.into_iter().filter_map(|(_, read)| read.ok());
    let mut all: Vec<AcknowledgedInfo> = all
        .map(|one| AcknowledgedInfo {
            finding: one.finding,
            what: one.what,
            consequence: one.consequence,
            at: one.acknowledged_at,
            reason: one.reason,
        })
        .collect();
    all.sort_by_key(|one| one.at);
    Ok(all)
}

fn verification_info(report: &Verification, known: &[AcknowledgedInfo]) -> VerificationInfo {
    let is_new = |id: &str| !known.iter().any(|one| one.finding == id);
    let new = report.findings.iter().filter(|finding| is_new(&finding.id)).count();
    VerificationInfo {
        finished_at: report.finished_at,
        deep: report.deep,
        findings: report.findings.len() as u64 + report.findings_unnamed,
        unacknowledged: new as u64 + report.findings_unnamed,
    }
}

fn version_text(version: u32) -> String {
    crate::pg::ServerVersion(version).to_string()
}

fn unfinished(stock: &Stock) -> Vec<UnfinishedInfo> {
    let unfinished = stock.unfinished.iter().filter_map(|backup| {
        let begun = match &backup.begun {
            BegunState::Readable(begun) => Some(begun),
            BegunState::Absent => None,
            // It is told as damaged.
            BegunState::Unreadable => return None,
        };
        Some(UnfinishedInfo {
            id: backup.id.clone(),
            begun_at: begun.map(|begun| begun.begun_at),
            host: begun.map(|begun| begun.host.clone()),
            needed_by: needing(stock, &backup.id),
        })
    });
    unfinished.collect()
}

/// Returns the committed backups that need a pack of another one.
fn needing(stock: &Stock, id: &BackupId) -> Vec<BackupId> {
    let all = stock.incarnations.iter().flat_map(|one| one.backups.iter());
    let needs = |backup: &&Committed| backup.references.iter().any(|needed| needed.backup == *id);
    all.filter(needs).map(|backup| backup.id.clone()).collect()
}

fn damaged(gathered: &Gathered) -> Vec<DamagedInfo> {
    let damaged = gathered.unreadable.iter();
    damaged.map(|backup| DamagedInfo { id: backup.id.clone(), why: backup.why.clone() }).collect()
}

/// Tells every committed backup, of all incarnations: after `pg_upgrade` those of the one before are the only way
/// back to a time before it.
fn backups_info(gathered: &Gathered, system_id: SystemId, policy: &Policy) -> Vec<BackupInfo> {
    let plan = plan(&gathered.stock, policy, now(), &BTreeMap::new());
    let all = gathered.stock.incarnations.iter().flat_map(|one| one.backups.iter());
    let all: BTreeMap<&BackupId, &Committed> = all.map(|backup| (&backup.id, backup)).collect();
    let told = plan.backups.into_iter().filter_map(|fate| {
        let backup = (*all.get(&fate.id)?).clone();
        let pins = gathered.pins.get(&fate.id).into_iter().flatten();
        Some(BackupInfo {
            usable: fate.is_usable,
            pins: pins.map(pin_info).collect(),
            kept: policy.is_set().then(|| fate.reasons.iter().map(Reason::word).collect()),
            kept_why: fate.reasons.iter().map(ToString::to_string).collect(),
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
    });
    told.collect()
}

fn pin_info(stored: &StoredPin) -> PinInfo {
    match &stored.pin {
        Ok(pin) => PinInfo { until: pin.until, reason: pin.reason.clone(), damaged: None },
        Err(why) => PinInfo { until: None, reason: None, damaged: Some(why.clone()) },
    }
}

fn wal_info(
    inventory: &WalInventory,
    coverage: &BTreeMap<Timeline, Vec<(Lsn, Lsn)>>,
    let_go: &[LetGoInfo],
) -> Vec<WalInfo> {
    let why = |timeline: Timeline, gap: &Gap| {
        let is_it = |one: &&LetGoInfo| {
            one.timeline == timeline && one.start_lsn < gap.end_lsn && gap.start_lsn < one.end_lsn
        };
        let of = let_go.iter().find(is_it)?;
        Some(format!("let go at {} on {}: {}", of.let_go_at, of.host, of.why))
    };
    let timelines = inventory.timelines.iter().filter_map(|(timeline, wal)| {
        let (first, last) = (wal.ranges.first()?, wal.ranges.last()?);
        let holes = gaps(coverage, *timeline).into_iter();
        Some(WalInfo {
            timeline: *timeline,
            start_lsn: first.0,
            end_lsn: last.1,
            gaps: holes
                .map(|gap| GapInfo {
                    start_lsn: gap.start_lsn,
                    end_lsn: gap.end_lsn,
                    why: why(*timeline, &gap),
                })
                .collect(),
            damaged: wal.damaged.iter().map(ToString::to_string).collect(),
            stored_bytes: wal.stored_bytes,
        })
    });
    timelines.collect()
}
