//! The use cases, one file each: gather, plan, act, report.
//!
//! The only maker of [`Failure`]s besides `cli`. Never here: printing, the
//! process environment, or one use case importing another.

pub mod ahead;
/// The same once more over an encrypted cluster: `archive.rs` looks which of the two it is.
#[cfg(test)]
#[path = "trials/mod.rs"]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::duplicate_mod)]
mod encrypted_trials;
pub(crate) mod failures;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod trials;
mod wal_times;

pub mod archive_get;
pub mod archive_push;
pub mod backup;
pub mod check;
pub mod copy;
pub mod expire;
pub mod info;
pub mod init;
pub mod key;
pub mod log;
pub mod pin;
pub mod progress;
pub mod receive;
pub mod restore;
mod server_facts;
mod slot_view;
pub mod spool;
pub mod stall;
mod stock;
mod stop;
pub mod verify;

pub use progress::{Progress, Silent};
pub use stop::StopRequest;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Kind};
use crate::format::{BackupId, FORMAT_VERSION, Identity, Pin};
use crate::pg::{ControlFile, PgTimestamp, SystemId};
use crate::pgdata::{Rereads, read_control_bytes, read_stable};
use crate::repo::{KeyTaker, RepoError, Repository, claim_of};

/// Which of two repositories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    /// `repo`
    First,
    /// `second_repo`
    Second,
}

impl Which {
    /// Returns the word that flags, reports and logs have for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Second => "second",
        }
    }

    /// Returns the other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// What documents name as their writer.
pub(crate) const TOOL: &str = concat!("highwater ", env!("CARGO_PKG_VERSION"));

/// Returns this host's clock.
pub(crate) fn now() -> PgTimestamp {
    PgTimestamp::from_unix_micros(jiff::Timestamp::now().as_microsecond())
}

/// Returns a pin on a backup, made now, without an end and without a reason.
fn new_pin(backup: BackupId, host: String) -> Pin {
    Pin {
        format: FORMAT_VERSION,
        backup,
        created_at: now(),
        until: None,
        reason: None,
        host,
        pid: std::process::id(),
        tool: TOOL.to_owned(),
    }
}

/// Returns who changes keys now.
fn key_taker(host: String) -> KeyTaker {
    KeyTaker { host, pid: std::process::id(), at: now(), tool: TOOL.to_owned() }
}

/// Refuses to keep a backup until a moment that is over already.
fn check_in_future(until: Option<PgTimestamp>, unharmed: &str) -> Result<(), Failure> {
    match until {
        Some(until) if until <= now() => Err(Failure::new(
            Kind::Usage,
            format!("{until}, until when the backup is to be kept, is over already"),
            unharmed,
            "Give a time in the future, with its year in full.",
        )),
        _ => Ok(()),
    }
}

/// Returns a name for a probe that no other probe has.
fn nonce() -> String {
    format!("{}-{}", jiff::Timestamp::now().as_nanosecond(), std::process::id())
}

/// Reads `global/pg_control` of a data directory; `None` when it cannot be read or is not whole.
pub(crate) fn control_of(data_directory: &Path) -> Option<ControlFile> {
    let read = || read_control_bytes(data_directory);
    read_stable(Rereads::DEFAULT, read, ControlFile::parse).ok()
}

/// Finds the identity of the cluster whose data directory this is; without a readable
/// `pg_control` there, that of the incarnation that lives in the place now.
async fn identity_of(
    repository: &Repository,
    data_directory: &Path,
    unharmed: &str,
) -> Result<Identity, Failure> {
    if let Some(control) = control_of(data_directory) {
        return claimed_identity(repository, control.system_id, unharmed).await;
    }
    current_identity(repository, unharmed).await
}

/// Finds the incarnation that lives in the place now.
async fn current_identity(repository: &Repository, unharmed: &str) -> Result<Identity, Failure> {
    let what = || format!("could not read who owns `{}`", repository.cluster());
    let identities = repository
        .identities()
        .await
        .map_err(|error| failures::of_repo(error, what(), unharmed))?;
    claim_of(&identities).cloned().ok_or_else(|| never_claimed(repository, unharmed))
}

/// Reads the identity of the cluster `system_id`, or says whose place this is instead.
async fn claimed_identity(
    repository: &Repository,
    system_id: SystemId,
    unharmed: &str,
) -> Result<Identity, Failure> {
    let what = || format!("could not read who owns `{}`", repository.cluster());
    match repository.identity(system_id).await {
        Ok(identity) => return Ok(identity),
        Err(RepoError::NotClaimed { .. }) => {}
        Err(error) => return Err(failures::of_repo(error, what(), unharmed)),
    }
    let owner = current_identity(repository, unharmed).await?.system_identifier;
    let cluster = repository.cluster().to_string();
    let error = RepoError::OtherCluster { cluster, owner, ours: system_id };
    let what = format!("this place in {} belongs to another cluster", repository.describe());
    Err(failures::of_repo(error, what, unharmed))
}

/// As [`RepoError::NotClaimed`]: an empty mount point looks like a place that was never set up,
/// so this too says that the store is not there.
fn never_claimed(repository: &Repository, unharmed: &str) -> Failure {
    Failure::new(
        Kind::Store,
        format!("`{}` was never set up in {}", repository.cluster(), repository.describe()),
        unharmed,
        "Check repository URL, cluster name and (for a directory) that it is mounted. If they are right, run `highwater init` once for this cluster.",
    )
}
