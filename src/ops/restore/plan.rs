//! What a restore will do, before it does anything.

use std::path::PathBuf;

use futures_util::future::try_join;
use serde::Serialize;

use super::{Request, Survey, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::format::{BackupId, Committed, Identity};
use crate::ops::current_identity;
use crate::ops::failures::of_repo;
use crate::ops::wal_times::{EndOfWal, StoredWay, find_mark, histories_of, reach};
use crate::pg::{Lsn, PgTimestamp, Timeline, TimelineHistory, WalEvent};
use crate::plan::restore::{
    Candidate, FoundAt, Holdings, Reach, Unreachable, candidates, for_found, for_lsn, for_time, way,
};
use crate::plan::target::{RecoveryPoint, TimelineChoice};
use crate::repo::{CommittedBackups, RepoError, Repository, UnreadableBackup, claim_of};

/// A restore that can be carried out.
#[derive(Debug, Clone)]
pub struct Planned {
    /// The backup.
    pub backup: Committed,
    /// The plan for people and scripts.
    pub report: PlanReport,
}

/// A restore's plan. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct PlanReport {
    /// The backup.
    pub backup: BackupId,
    /// Its server's version.
    pub postgres_version: u32,
    /// Where the data directory goes.
    pub pgdata: PathBuf,
    /// Tablespaces: OID, old place, new place.
    pub tablespaces: Vec<TablespacePlan>,
    /// The target in words.
    pub target: String,
    /// The timeline that recovery follows.
    pub timeline: Timeline,
    /// Where replay begins.
    pub wal_start_lsn: Lsn,
    /// Where it ends: at the target where its position is known, else where stored WAL ends.
    pub wal_end_lsn: Lsn,
    /// Bytes of the files to be written.
    pub size_bytes: u64,
    /// Bytes to be fetched for them.
    pub fetch_bytes: u64,
    /// Files.
    pub files: u64,
    /// What stands already, if that was looked at: by a dry run over standing files. Of another,
    /// `fetch_bytes` is the most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub survey: Option<Survey>,
    /// Whether what stands is taken over.
    pub delta: bool,
    /// The time of the last commit that the archive holds on this way.
    pub last_commit_time: Option<PgTimestamp>,
    /// Where the last whole record begins that the archive holds on this way.
    #[serde(skip)]
    pub last_record_lsn: Option<Lsn>,
    /// Backups that were not considered, because a document of theirs cannot be read.
    pub damaged_backups: Vec<DamagedPlan>,
}

/// A backup that a plan leaves out.
#[derive(Debug, Clone, Serialize)]
pub struct DamagedPlan {
    /// Its id.
    pub backup: BackupId,
    /// Which document cannot be read, and why.
    pub why: String,
}

/// One tablespace of a plan.
#[derive(Debug, Clone, Serialize)]
pub struct TablespacePlan {
    /// Its OID.
    pub oid: u32,
    /// Where it stood.
    pub from: String,
    /// Where it goes.
    pub to: PathBuf,
}

/// What was gathered for the decision.
struct Gathered {
    identity: Identity,
    backups: Vec<Committed>,
    unreadable: Vec<UnreadableBackup>,
    coverage: crate::plan::lineage::Coverage,
    histories: std::collections::BTreeMap<Timeline, TimelineHistory>,
}

/// Plans a restore: which backup, which way, whether the target can be reached.
///
/// # Errors
/// [`Kind::Integrity`] when the target cannot be reached; its message names the
/// nearest that can.
pub async fn make_plan(repository: &Repository, request: &Request) -> Result<Planned, Failure> {
    let failed = |error| {
        let what = format!("could not read the inventory of {}", repository.describe());
        of_repo(error, what, UNHARMED)
    };
    let identity = incarnation(repository, request).await?;
    let gathered = gather(repository, request, identity).await.map_err(failed)?;
    let holdings = Holdings {
        backups: &gathered.backups,
        coverage: &gathered.coverage,
        histories: &gathered.histories,
        segment_size: gathered.identity.segment_size,
    };
    let named = request.backup.as_ref();
    for backup in &gathered.unreadable {
        warn_of_unreadable(backup, request.target.timeline);
    }
    let refused = |why| gathered.unreachable(why);
    let way = way(&holdings, request.target.timeline, named).map_err(refused)?;
    let usable = candidates(&holdings, &way, named).map_err(refused)?;
    let choosing = Choosing { repository, request, gathered: &gathered, way: &way };
    let (chosen, end) = choosing.choose(&usable).await?;
    let report = report(request, &chosen, &gathered, &way, end);
    Ok(Planned { backup: chosen.backup.clone(), report })
}

/// The incarnation that the backup named belongs to, else the one that lives here now.
async fn incarnation(repository: &Repository, request: &Request) -> Result<Identity, Failure> {
    let Some(id) = &request.backup else { return current_identity(repository, UNHARMED).await };
    let failed = |error| of_repo(error, format!("could not read backup {id}"), UNHARMED);
    let backup = repository.committed(id).await.map_err(failed)?;
    let identities = repository.identities().await.map_err(failed)?;
    let owner = match &backup {
        Some(backup) => {
            identities.iter().find(|known| known.system_identifier == backup.system_identifier)
        }
        None => return Err(unreachable(Unreachable::NoSuchBackup(id.clone()))),
    };
    match owner.or_else(|| claim_of(&identities)) {
        Some(identity) => Ok(identity.clone()),
        None => current_identity(repository, UNHARMED).await,
    }
}

async fn gather(
    repository: &Repository,
    request: &Request,
    identity: Identity,
) -> Result<Gathered, RepoError> {
    let system_id = identity.system_identifier;
    // A damaged backup must not stand in the way of another, asked for by name or not.
    let backups = async {
        Ok::<_, RepoError>(match &request.backup {
            Some(id) => CommittedBackups {
                readable: repository.committed(id).await?.into_iter().collect(),
                ..CommittedBackups::default()
            },
            None => repository.committed_backups(system_id).await?,
        })
    };
    let inventory = repository.wal_inventory(system_id, identity.segment_size);
    let (backups, inventory) = try_join(backups, inventory).await?;
    let CommittedBackups { readable: backups, unreadable, .. } = backups;
    let histories = histories_of(repository, system_id, inventory.histories.clone()).await?;
    Ok(Gathered { identity, backups, unreadable, coverage: inventory.coverage(), histories })
}

impl Gathered {
    /// Says why nothing can be restored as asked; and that a backup which cannot be read
    /// might have reached it, if there is one.
    fn unreachable(&self, why: Unreachable) -> Failure {
        let failure = unreachable(why);
        if self.unreadable.is_empty() {
            return failure;
        }
        let cures: Vec<String> = self.unreadable.iter().map(cure).collect();
        let next = format!(
            "{} But what cannot be read may have reached it. {}",
            failure.next,
            cures.join(" ")
        );
        // Certainly absent is only what every backup could be asked for.
        let kind = if failure.kind == Kind::Absent { Kind::Integrity } else { failure.kind };
        Failure { kind, next, ..failure }
    }
}

/// What to do about a backup that cannot be read.
fn cure(backup: &UnreadableBackup) -> String {
    let UnreadableBackup { id, why, is_newer } = backup;
    let next = if *is_newer {
        "to restore from it, run the version of Highwater that wrote it, or a newer one"
    } else {
        "its other objects may be whole: keep them, and put that document back from a copy of the repository"
    };
    format!("Backup {id}: {why}; {next}.")
}

fn warn_of_unreadable(backup: &UnreadableBackup, timeline: TimelineChoice) {
    let id = &backup.id;
    let current = if timeline == TimelineChoice::Current {
        ", and it may have been the newest, whose timeline `current` means"
    } else {
        ""
    };
    tracing::warn!(
        "BACKUP {id} IS LEFT OUT, AS IT CANNOT BE READ: from an older one recovery takes longer, and what only {id} reaches is lost to it{current}. {} To choose the backup yourself, name it with `--backup`",
        cure(backup)
    );
}

struct Choosing<'a> {
    repository: &'a Repository,
    request: &'a Request,
    gathered: &'a Gathered,
    way: &'a TimelineHistory,
}

/// Where replay ends and what is known of it.
#[derive(Clone, Copy)]
struct ReplayEnd {
    lsn: Lsn,
    last_commit_time: Option<PgTimestamp>,
    last_record_lsn: Option<Lsn>,
}

impl<'a> Choosing<'a> {
    async fn choose(
        &self,
        usable: &[Candidate<'a>],
    ) -> Result<(Candidate<'a>, ReplayEnd), Failure> {
        let named = self.request.backup.is_some();
        let ends = self.ends_of_wal(usable).await?;
        let end_of = |candidate: &Candidate<'_>| {
            let known = ends.iter().find(|(end, _)| *end == candidate.unbroken_end);
            known.map(|(_, found)| *found).unwrap_or_default()
        };
        let reach_of = |candidate: &Candidate<'a>| {
            let end = end_of(candidate);
            Reach { last_xact_time: end.last_xact_time, last_record_lsn: end.last_record_lsn }
        };
        let refused = |why| self.gathered.unreachable(why);
        let target = &self.request.target;
        let mut replay_end = None;
        let chosen = match &target.point {
            RecoveryPoint::Latest | RecoveryPoint::Immediate => {
                let newest = usable.first().copied();
                let newest = newest.ok_or_else(|| refused(Unreachable::NoBackup))?;
                if target.point == RecoveryPoint::Immediate {
                    replay_end = Some(newest.backup.stop_lsn);
                }
                newest
            }
            RecoveryPoint::Time { unix_micros } => {
                let time = PgTimestamp::from_unix_micros(*unix_micros);
                for_time(usable, time, target.inclusive, named, reach_of).map_err(refused)?
            }
            RecoveryPoint::Lsn(lsn) => {
                replay_end = Some(*lsn);
                for_lsn(usable, *lsn, named, reach_of).map_err(refused)?
            }
            point @ (RecoveryPoint::Xid(_) | RecoveryPoint::Name(_)) => {
                let found = self.find(usable, point).await?;
                replay_end = Some(found.end_lsn);
                for_found(usable, point, found, named).map_err(refused)?
            }
        };
        let end = ReplayEnd {
            lsn: replay_end.unwrap_or(chosen.unbroken_end),
            last_commit_time: end_of(&chosen).last_commit_time,
            last_record_lsn: end_of(&chosen).last_record_lsn,
        };
        Ok((chosen, end))
    }

    fn stored(&self) -> StoredWay<'_> {
        StoredWay {
            repository: self.repository,
            system_id: self.gathered.identity.system_identifier,
            way: self.way,
            size: self.gathered.identity.segment_size,
        }
    }

    /// Reads what the WAL tells at each distinct end that candidates reach.
    async fn ends_of_wal(&self, usable: &[Candidate<'a>]) -> Result<Vec<(Lsn, EndOfWal)>, Failure> {
        let mut ends: Vec<(Lsn, EndOfWal)> = Vec::new();
        for candidate in usable {
            let end = candidate.unbroken_end;
            if ends.iter().any(|(known, _)| *known == end) {
                continue;
            }
            let found = reach(self.stored(), candidate.backup.start_lsn, end);
            let failed =
                |error| of_repo(error, "could not read the end of the archived WAL", UNHARMED);
            ends.push((end, found.await.map_err(failed)?));
        }
        Ok(ends)
    }

    /// Looks for a transaction's end or a restore point: in the WAL behind the newest
    /// usable backup first, then further back.
    async fn find(
        &self,
        usable: &[Candidate<'a>],
        point: &RecoveryPoint,
    ) -> Result<FoundAt, Failure> {
        let wanted = |event: &WalEvent| match (point, event) {
            (RecoveryPoint::Xid(xid), WalEvent::Transaction(end)) => end.xid == Some(*xid),
            (RecoveryPoint::Name(name), WalEvent::RestorePoint { name: found, .. }) => {
                found == name
            }
            _ => false,
        };
        let mut looked: Option<(Lsn, Lsn)> = None;
        for candidate in usable {
            let from = candidate.backup.start_lsn;
            let to = match looked {
                // What lies behind was looked through already.
                Some((from, _)) => from.min(candidate.unbroken_end),
                None => candidate.unbroken_end,
            };
            let found = find_mark(self.stored(), from, to, wanted);
            let failed = |error| of_repo(error, format!("could not look for {point}"), UNHARMED);
            if let Some((start, end)) = found.await.map_err(failed)? {
                // An exclusive target ends replay in front of the record.
                let end_lsn = if self.request.target.inclusive { end } else { start };
                return Ok(FoundAt { end_lsn });
            }
            looked = Some((from, looked.map_or(candidate.unbroken_end, |(_, to)| to)));
        }
        let (from, to) = looked.unwrap_or_default();
        let target = point.to_string();
        let timeline = self.way.timeline();
        Err(self.gathered.unreachable(Unreachable::NotFound { target, timeline, from, to }))
    }
}

fn report(
    request: &Request,
    chosen: &Candidate<'_>,
    gathered: &Gathered,
    way: &TimelineHistory,
    end: ReplayEnd,
) -> PlanReport {
    let backup = chosen.backup;
    let packs = backup.references.iter().flat_map(|reference| &reference.packs);
    let moved = |old: &str| {
        let mapped = request.tablespace_map.iter().find(|(from, _)| from == old);
        mapped.map_or_else(|| PathBuf::from(old), |(_, new)| new.clone())
    };
    PlanReport {
        backup: backup.id.clone(),
        postgres_version: backup.postgres_version,
        pgdata: request.pgdata.clone(),
        tablespaces: backup
            .tablespaces
            .iter()
            .map(|tablespace| TablespacePlan {
                oid: tablespace.oid,
                from: tablespace.location.clone(),
                to: moved(&tablespace.location),
            })
            .collect(),
        target: if request.standby {
            "a standby that follows the archive".to_owned()
        } else {
            request.target.to_string()
        },
        timeline: way.timeline(),
        wal_start_lsn: backup.start_lsn,
        wal_end_lsn: end.lsn,
        size_bytes: backup.size_bytes,
        fetch_bytes: packs.map(|pack| pack.live_bytes).sum(),
        files: backup.files,
        survey: None,
        delta: request.delta,
        last_commit_time: end.last_commit_time,
        last_record_lsn: end.last_record_lsn,
        damaged_backups: gathered
            .unreadable
            .iter()
            .map(|backup| DamagedPlan { backup: backup.id.clone(), why: backup.why.clone() })
            .collect(),
    }
}

fn unreachable(why: Unreachable) -> Failure {
    let kind = match why {
        Unreachable::NoBackup | Unreachable::NoSuchBackup(_) => Kind::Absent,
        _ => Kind::Integrity,
    };
    let next = match &why {
        Unreachable::NoBackup => "Take one with `highwater backup`.".to_owned(),
        Unreachable::NoSuchBackup(_) => "`highwater info` lists the backups.".to_owned(),
        Unreachable::NoSuchTimeline(_) | Unreachable::NotOnTimeline { .. } => {
            "`highwater info` lists timelines and backups; `--timeline current` follows the newest backup's own.".to_owned()
        }
        Unreachable::NotConsistent { .. } => {
            "See with `highwater info` which WAL is missing; archive it from the server's pg_wal if it is still there, or restore an older backup with `--backup`.".to_owned()
        }
        Unreachable::TooEarly { .. } | Unreachable::TooLate { .. } | Unreachable::Between { .. } => {
            "Choose a target inside the window that `highwater info` shows; without a target, everything that is archived is brought back.".to_owned()
        }
        Unreachable::NotFound { .. } => {
            "Check the spelling. A transaction that never committed or aborted, or a point on another timeline, cannot be found here.".to_owned()
        }
    };
    let unharmed = "Nothing was created or changed, neither here nor in the repository.";
    Failure::new(kind, "this target cannot be restored", unharmed, next).because(why)
}

/// The recovery target's timeline as PostgreSQL's setting: the number that was planned for,
/// so that a branch which appears meanwhile is not followed by surprise.
pub(super) fn timeline_setting(request: &Request, report: &PlanReport) -> String {
    match (request.standby, request.target.timeline) {
        (true, TimelineChoice::Latest) => "latest".to_owned(),
        _ => report.timeline.to_string(),
    }
}
