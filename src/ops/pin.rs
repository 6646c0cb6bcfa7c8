//! `pin` and `unpin`: keep a backup whatever the retention policy says.

use serde::Serialize;

use super::failures::of_repo;
use super::{check_in_future, current_identity, new_pin};
use crate::failure::{Failure, Kind};
use crate::format::{BackupId, Pin};
use crate::pg::PgTimestamp;
use crate::repo::{RepoError, Repository};

const UNHARMED: &str = "Nothing was changed.";

const MAY_STAND: &str = "Nothing was deleted. The pin may stand all the same: pinned again, the backup has two, which harms nothing, and `highwater unpin` takes off both.";

/// What is asked of `pin`.
#[derive(Debug, Clone)]
pub struct Request {
    /// The backup.
    pub backup: BackupId,
    /// Until when (excluded); `None` until it is unpinned.
    pub until: Option<PgTimestamp>,
    /// Why.
    pub reason: Option<String>,
    /// The name of this host, for the record.
    pub host: String,
}

/// What `unpin` did. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct Unpinned {
    /// The backup.
    pub backup: BackupId,
    /// How many pins it had.
    pub removed: u64,
}

/// Pins a committed backup. A pin that it has already stays beside it; the longest counts.
///
/// # Errors
/// [`Kind::Absent`] if there is no such backup, or none any more once the pin stood.
pub async fn pin(repository: &Repository, request: &Request) -> Result<Pin, Failure> {
    check_in_future(request.until, UNHARMED)?;
    current_identity(repository, UNHARMED).await?;
    let id = &request.backup;
    let failed = |error| of_repo(error, format!("could not pin backup {id}"), UNHARMED);
    if !repository.has_committed(id).await.map_err(failed)? {
        return Err(no_such_backup(id));
    }
    let Request { until, reason, host, .. } = request.clone();
    let pin = Pin { until, reason, ..new_pin(id.clone(), host) };
    // From here on nobody knows what a store that fails has done.
    let failed = |error| of_repo(error, format!("could not pin backup {id}"), MAY_STAND);
    let key = repository.put_pin(&pin).await.map_err(failed)?;
    // `expire` looks for pins before it deletes a backup, and we look for the backup once the pin stands.
    if repository.has_committed(id).await.map_err(failed)? {
        return Ok(pin);
    }
    repository.store().delete(&key).await.map_err(|error| failed(RepoError::from(error)))?;
    Err(no_such_backup(id))
}

/// Takes every pin off a backup: from now on the retention policy decides alone. Also where the backup is gone.
///
/// # Errors
/// [`Kind::Absent`] if it has no pin.
pub async fn unpin(repository: &Repository, id: &BackupId) -> Result<Unpinned, Failure> {
    current_identity(repository, UNHARMED).await?;
    let removed = repository.remove_pins(id).await.map_err(|error| {
        let unharmed = "The backup is there; pins that are left keep it.";
        of_repo(error, format!("could not take the pins off backup {id}"), unharmed)
    })?;
    if removed == 0 {
        return Err(Failure::new(
            Kind::Absent,
            format!("backup `{id}` has no pin"),
            UNHARMED,
            "`highwater info` shows pins.",
        ));
    }
    Ok(Unpinned { backup: id.clone(), removed })
}

fn no_such_backup(id: &BackupId) -> Failure {
    Failure::new(
        Kind::Absent,
        format!("there is no backup `{id}`"),
        UNHARMED,
        "`highwater info` lists the backups; one that is unfinished cannot be pinned, but `backup --keep-until` pins from the beginning.",
    )
}
