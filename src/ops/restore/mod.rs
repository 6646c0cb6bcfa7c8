//! `restore`: rebuild a data directory, ready to recover to a target.
//!
//! ```text
//! inventory -> plan (printed, and all that --dry-run does) -> empty directory taken
//!   -> files, chunk by chunk, each checked -> fsync -> recovery settings, signal file -> pg_control
//! ```
//!
//! PostgreSQL cannot start from what a restore that died has left: `pg_control` comes last.

mod files;
mod plan;
mod settings;

use std::path::PathBuf;
use std::sync::Arc;

use super::failures::{of_disk, of_repo};
use super::progress::Progress;
use crate::failure::{Failure, Kind};
use crate::format::{BackupId, Committed};
use crate::pg::ControlFile;
use crate::pgdata::{
    Access, RecoverySettingsError, TablespaceTarget, TreeError, TreePlan, free_bytes,
};
use crate::plan::target::RecoveryTarget;
use crate::repo::Repository;

pub use plan::{PlanReport, Planned, make_plan};

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
    /// Make a standby instead of recovering to a target.
    pub standby: bool,
    /// This copy becomes the cluster: archiving stays on.
    pub take_over: bool,
    /// Fetches at a time.
    pub jobs: usize,
    /// The ceiling of memory.
    pub memory_max_bytes: u64,
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
    let index = repository.file_index(&backup.id).await.map_err(|error| {
        of_repo(error, format!("could not read the file list of backup {}", backup.id), UNHARMED)
    })?;
    progress.total(Some(backup.size_bytes));
    progress.note("restoring files");
    let restoring = files::Restoring {
        repository,
        backup: &backup,
        tree_plan: &tree_plan,
        jobs: request.jobs,
        memory_max_bytes: request.memory_max_bytes,
        progress: progress.clone(),
    };
    let restored = restoring.run(&index).await?;
    check_control(&restored.control, &backup)?;
    progress.note("writing recovery settings");
    let written_at = super::now().to_string();
    let pgdata = request.pgdata.clone();
    let files::Restored { tree, control, has_postgresql_conf } = restored;
    let published = tokio::task::spawn_blocking(move || {
        let owner = tree.owner();
        crate::pgdata::write_recovery_settings(&pgdata, &settings, &written_at, owner)?;
        tree.sync_all()?.publish_control(&control)?;
        Ok::<(), FinishError>(())
    })
    .await;
    match published {
        Ok(Ok(())) => {}
        Ok(Err(FinishError::Tree(error))) => return Err(of_tree(error)),
        Ok(Err(FinishError::Settings(error))) => return Err(settings::not_written(error)),
        Err(error) => return Err(super::failures::of_task(error, UNHARMED)),
    }
    Ok(Report {
        pgdata: request.pgdata.clone(),
        restore_command,
        archiving_off: !request.take_over,
        has_postgresql_conf,
        size_bytes: backup.size_bytes,
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
    warn_of_little_room(&plan, &planned.backup);
    let checked = tokio::task::spawn_blocking(move || plan.check().map(drop)).await;
    match checked {
        Ok(result) => result.map_err(of_tree),
        Err(error) => Err(super::failures::of_task(error, UNHARMED)),
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

fn of_tree(error: TreeError) -> Failure {
    let what = "could not build the data directory";
    match error {
        TreeError::Disk(error) => of_disk(error, what, UNHARMED),
        TreeError::NotEmpty { .. } => Failure::new(
            Kind::Usage,
            what,
            UNHARMED,
            "Choose an empty directory with `--pgdata` (for a tablespace, with `--tablespace-map OLD=NEW`), or move away what is there. Highwater never clears a directory.",
        )
        .because(error),
        TreeError::DeadRestore { .. } => Failure::new(
            Kind::Usage,
            what,
            UNHARMED,
            "The directory holds only what that restore wrote; empty it and run `restore` again.",
        )
        .because(error),
        TreeError::ServerRunning { .. } => Failure::new(
            Kind::Usage,
            what,
            UNHARMED,
            "Stop that server first if it is the one to be replaced, and move its data directory away; or choose another directory.",
        )
        .because(error),
        other => Failure::new(
            Kind::Usage,
            what,
            UNHARMED,
            "Choose other directories with `--pgdata` and `--tablespace-map`.",
        )
        .because(other),
    }
}
