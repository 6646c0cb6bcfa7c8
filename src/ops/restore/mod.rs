//! `restore`: rebuild a data directory, ready to recover to a target.
//!
//! ```text
//! inventory -> plan (printed, and all that --dry-run does) -> empty directory taken
//!   -> files, chunk by chunk, each checked -> fsync -> recovery settings, signal file -> pg_control
//! ```
//!
//! PostgreSQL cannot start from what a restore that died has left: `pg_control` comes last.

mod files;
mod foreign;
mod looking;
mod moments;
mod outlook;
mod plan;
mod settings;
mod survey;
mod window;

use std::path::PathBuf;
use std::sync::Arc;

use super::failures::{of_disk, of_repo};
use super::progress::Progress;
use crate::failure::{Failure, Kind};
use crate::format::{BackupId, Committed};
use crate::pg::{ClusterState, ControlFile};
use crate::pgdata::{
    Access, RecoverySettingsError, TablespaceTarget, TreeError, TreePlan, free_bytes, holds_wal,
    read_control_bytes,
};
use crate::plan::target::RecoveryTarget;
use crate::repo::{FileList, Repository};

pub use foreign::{
    ForeignTablespace, LookBeside, MadeByReplay, foreign_tablespaces, tell_tablespaces,
};
pub use moments::reachable_moments;
pub use outlook::{MeasuredRate, Outlook, outlook};
pub use plan::{PlanReport, Planned, make_plan};
pub use survey::{Survey, survey};

const UNHARMED: &str =
    "The repository is as it was, and no existing file was overwritten or removed.";

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// The data directory to build; absolute.
    pub pgdata: PathBuf,
    /// The backup to begin from, if it was named.
    pub backup: Option<BackupId>,
    /// Where recovery goes.
    pub target: RecoveryTarget,
    /// New places of tablespaces, by their old place.
    pub tablespace_map: Vec<(String, PathBuf)>,
    /// Take over what stands in the directories, if it is this cluster's, and bring only what differs.
    pub delta: bool,
    /// Make a standby instead of recovering to a target.
    pub standby: bool,
    /// This copy becomes the cluster: archiving stays on.
    pub take_over: bool,
    /// Fetches at a time.
    pub jobs: usize,
    /// Stored bytes fetched in one request: what the ceiling of memory allows (`plan::memory`).
    pub range_bytes_max: u32,
    /// This program, by its full path.
    pub program: PathBuf,
    /// The flags with which it finds the repository again, for `restore_command`.
    pub program_flags: Vec<String>,
}

/// What was done.
#[derive(Debug, Clone)]
pub struct Report {
    /// The backup that was restored.
    pub backup: Committed,
    /// The data directory.
    pub pgdata: PathBuf,
    /// The `restore_command` that was written.
    pub restore_command: String,
    /// Whether archiving was left off.
    pub archiving_off: bool,
    /// Whether the backup brought a `postgresql.conf`; Debian keeps it elsewhere.
    pub has_postgresql_conf: bool,
    /// Bytes of files.
    pub size_bytes: u64,
    /// Bytes of them that stood already.
    pub kept_bytes: u64,
    /// Files, links and directories that were removed as the backup has none of them.
    pub removed: u64,
}

/// Carries a plan out.
pub async fn carry_out(
    repository: &Repository,
    request: &Request,
    planned: Planned,
    progress: Arc<dyn Progress>,
) -> Result<Report, Failure> {
    let backup = planned.backup;
    let settings = settings::recovery_settings(request, &planned.report)?;
    let restore_command = settings.restore_command.clone();
    let tree_plan = tree_plan(request, &backup)?;
    let list = FileList::open(repository, &backup.id).await.map_err(|error| {
        of_repo(error, format!("could not read the file list of backup {}", backup.id), UNHARMED)
    })?;
    progress.total(Some(backup.size_bytes));
    progress.note("restoring files");
    let restoring = files::Restoring {
        repository,
        backup: &backup,
        tree_plan: &tree_plan,
        jobs: request.jobs,
        range_bytes_max: request.range_bytes_max,
        progress: progress.clone(),
    };
    let restored = restoring.run(list).await?;
    check_control(&restored.control, &backup)?;
    progress.note("writing recovery settings");
    let written_at = super::now().to_string();
    let pgdata = request.pgdata.clone();
    let files::Restored { tree, control, has_postgresql_conf, kept_bytes, removed } = restored;
    let unharmed = if request.delta { files::HALF_TAKEN_OVER } else { UNHARMED };
    let published = tokio::task::spawn_blocking(move || {
        let owner = tree.owner();
        crate::pgdata::write_recovery_settings(&pgdata, &settings, &written_at, owner)?;
        tree.sync_all()?.publish_control(&control)?;
        Ok::<(), FinishError>(())
    })
    .await;
    match published {
        Ok(Ok(())) => {}
        Ok(Err(FinishError::Tree(error))) => return Err(of_tree(error, unharmed)),
        Ok(Err(FinishError::Settings(error))) => return Err(settings::not_written(error)),
        Err(error) => return Err(super::failures::of_task(error, unharmed)),
    }
    Ok(Report {
        pgdata: request.pgdata.clone(),
        restore_command,
        archiving_off: !request.take_over,
        has_postgresql_conf,
        size_bytes: backup.size_bytes,
        kept_bytes,
        removed,
        backup,
    })
}

enum FinishError {
    Tree(TreeError),
    Settings(RecoverySettingsError),
}

impl From<TreeError> for FinishError {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}

impl From<RecoverySettingsError> for FinishError {
    fn from(error: RecoverySettingsError) -> Self {
        Self::Settings(error)
    }
}

/// Looks at the directories that shall be filled; nothing is created.
pub async fn check_place(request: &Request, planned: &Planned) -> Result<(), Failure> {
    let plan = tree_plan(request, &planned.backup)?;
    if !request.delta {
        warn_of_little_room(&plan, &planned.backup);
    }
    let delta = request.delta;
    let checked = tokio::task::spawn_blocking(move || {
        plan.check()?;
        if delta {
            warn_of_a_crash(&plan);
        }
        Ok(())
    });
    match checked.await {
        Ok(result) => result.map_err(|error| of_tree(error, UNHARMED)),
        Err(error) => Err(super::failures::of_task(error, UNHARMED)),
    }
}

/// Says that WAL may be lost which no list names: a server that did not end in good order had no
/// time to archive its last segment.
fn warn_of_a_crash(plan: &TreePlan) {
    if !holds_wal(&plan.pgdata) {
        return;
    }
    let Ok(control) = read_control_bytes(&plan.pgdata) else { return };
    let Ok(control) = ControlFile::parse(&control) else { return };
    if !matches!(control.state, ClusterState::ShutDown | ClusterState::ShutDownInRecovery) {
        tracing::warn!(
            "the server of {} did not shut down in good order: the last segment in its pg_wal may be in no archive, and a restore over these files removes it. To keep it, copy pg_wal elsewhere first",
            plan.pgdata.display()
        );
    }
}

/// Says beforehand that the disk will be too small. Only a warning, since a file system that
/// compresses may hold more than its free space.
fn warn_of_little_room(plan: &TreePlan, backup: &Committed) {
    let existing = plan.pgdata.ancestors().find(|directory| directory.exists());
    let free = existing.and_then(|directory| free_bytes(directory).ok());
    if let Some(free) = free
        && free < backup.size_bytes
        && plan.tablespaces.is_empty()
    {
        let need = backup.size_bytes;
        tracing::warn!(
            "the backup has {need} bytes, and the file system of the data directory has {free} left"
        );
    }
}

fn tree_plan(request: &Request, backup: &Committed) -> Result<TreePlan, Failure> {
    for (old, _) in &request.tablespace_map {
        if !backup.tablespaces.iter().any(|tablespace| tablespace.location == *old) {
            let known: Vec<&str> =
                backup.tablespaces.iter().map(|tablespace| tablespace.location.as_str()).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(Failure::new(
                Kind::Usage,
                format!("backup {} has no tablespace at `{old}`", backup.id),
                UNHARMED,
                format!("Tablespaces of this backup: {known}."),
            ));
        }
    }
    let tablespaces = backup.tablespaces.iter().map(|tablespace| {
        let mapped = request.tablespace_map.iter().find(|(old, _)| *old == tablespace.location);
        let target =
            mapped.map_or_else(|| PathBuf::from(&tablespace.location), |(_, new)| new.clone());
        TablespaceTarget {
            oid: tablespace.oid,
            original: tablespace.location.clone().into(),
            target,
        }
    });
    Ok(TreePlan {
        pgdata: request.pgdata.clone(),
        // A tablespace inside the data directory arrives with the data directory's own files.
        tablespaces: tablespaces.filter(|tablespace| tablespace.target.is_absolute()).collect(),
        access: if backup.group_access { Access::Group } else { Access::Owner },
        owner: None,
        take_over: request.delta.then_some(backup.system_identifier),
    })
}

fn check_control(control: &[u8], backup: &Committed) -> Result<(), Failure> {
    let parsed = ControlFile::parse(control).ok();
    if parsed.is_some_and(|parsed| parsed.system_id == backup.system_identifier) {
        return Ok(());
    }
    Err(Failure::new(
        Kind::Integrity,
        format!("the pg_control of backup {} is not this cluster's", backup.id),
        "The repository is as it was. The directory cannot be started by PostgreSQL and may be emptied.",
        "Restore another backup with `--backup`; `highwater info` lists them.",
    ))
}

fn of_tree(error: TreeError, unharmed: &'static str) -> Failure {
    let what = "could not build the data directory";
    let refused = |next: &str, error: TreeError| {
        Failure::new(Kind::Usage, what, unharmed, next).because(error)
    };
    match error {
        TreeError::Disk(error) => of_disk(error, what, unharmed),
        TreeError::NotEmpty { .. } => refused(
            "Choose an empty directory with `--pgdata` (for a tablespace, with `--tablespace-map OLD=NEW`), or move away what is there. A directory of this cluster, as its global/pg_control says, is taken over with `--delta`; no other is ever cleared.",
            error,
        ),
        TreeError::DeadRestore { ref marker, .. } if marker.took_over.is_some() => refused(
            "It was run with `--delta`, so files of before are there as well: run it again with `--delta`, or move the directory away.",
            error,
        ),
        TreeError::DeadRestore { .. } => refused(
            "The directory holds only what that restore wrote; empty it and run `restore` again, or go on with what stands with `--delta`.",
            error,
        ),
        TreeError::ServerRunning { .. } => refused(
            "Stop that server first if it is the one to be replaced, and move its data directory away unless you restore with `--delta`; or choose another directory.",
            error,
        ),
        TreeError::PidFileUnreadable { .. } => refused(
            "Make sure that no server is running there, remove its postmaster.pid, and run `restore` again.",
            error,
        ),
        TreeError::OtherCluster { .. } => {
            let next = "Nothing of another cluster is touched: choose this one's directory, or an empty one, with `--pgdata` (for a tablespace, with `--tablespace-map OLD=NEW`).";
            Failure::new(Kind::Conflict, what, unharmed, next).because(error)
        }
        TreeError::NotProven { .. } => refused(
            "Move the directory away and restore into an empty one: without a control file that can be read, nothing says that these files may be changed.",
            error,
        ),
        TreeError::UnarchivedWal { .. } => refused(
            "It may be nowhere else, and a restore over these files would remove it. Store each of these files with `highwater archive-push`, or keep them by moving pg_wal out of the data directory; then run `restore` again.",
            error,
        ),
        other => refused("Choose other directories with `--pgdata` and `--tablespace-map`.", other),
    }
}
