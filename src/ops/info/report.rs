//! What `info` tells: the fields of its JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::format::{BackupId, DamagedPages, Drill, DrillOutcome, KeyId};
use crate::ops::stall::HostState;
use crate::pg::{Lsn, PgTimestamp, SystemId, Timeline};
use crate::plan::retention::PolicyInfo;

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
    /// How what is stored is encrypted; absent where it is not.
    pub encryption: Option<EncryptionInfo>,
    /// What `expire` keeps; absent where no retention is set and nothing is ever deleted.
    pub retention: Option<PolicyInfo>,
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
    /// Everything that can be reached, on the way to each timeline, ascending: between two windows of one timeline
    /// nothing can. The one above is the last of them, or the last on the newest timeline that backups lead to.
    pub reachable: Vec<WindowInfo>,
    /// The last run of `verify` that ended.
    pub verification: Option<VerificationInfo>,
    /// Losses that somebody has acknowledged.
    pub acknowledged: Vec<AcknowledgedInfo>,
    /// The last drill that is on record; absent where none was ever done.
    pub drill: Option<DrillInfo>,
    /// WAL that was let go because the store could not take it.
    pub let_go: Vec<LetGoInfo>,
    /// What is true of this host alone; absent where no data directory and no spool is known here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<HostState>,
}

/// WAL that was let go.
#[derive(Debug, Clone, Serialize)]
pub struct LetGoInfo {
    /// Its timeline.
    pub timeline: Timeline,
    /// The first byte that was let go (included).
    pub start_lsn: Lsn,
    /// Where WAL goes on (excluded).
    pub end_lsn: Lsn,
    /// When.
    pub let_go_at: PgTimestamp,
    /// On which host.
    pub host: String,
    /// Why.
    pub why: String,
    /// The backup that makes it unneeded for the newest moments; absent as long as there is none.
    pub closed_by: Option<BackupId>,
}

/// What a drill came to.
#[derive(Debug, Clone, Serialize)]
pub struct DrillInfo {
    /// Its name.
    pub id: BackupId,
    /// When it ended.
    pub finished_at: PgTimestamp,
    /// What it came to.
    pub outcome: DrillOutcome,
    /// The backup that was restored.
    pub backup: Option<BackupId>,
    /// The target in words.
    pub target: String,
    /// From the first byte fetched to a server that took connections at the target.
    pub recovery_millis: Option<u64>,
    /// Where recovery ended.
    pub reached_lsn: Option<Lsn>,
    /// Checks that failed.
    pub failed_checks: Vec<String>,
    /// What ended it early.
    pub failure: Option<String>,
}

impl DrillInfo {
    pub(super) fn of(drill: Drill) -> Self {
        Self {
            failed_checks: drill.failed_checks().into_iter().map(str::to_owned).collect(),
            id: drill.id,
            finished_at: drill.finished_at,
            outcome: drill.outcome,
            backup: drill.backup,
            target: drill.target,
            recovery_millis: drill.recovery_millis,
            reached_lsn: drill.reached.map(|reached| reached.end_lsn),
            failure: drill.failure.map(|failure| failure.what),
        }
    }
}

/// The keys of an encrypted cluster; `key list` tells more.
#[derive(Debug, Clone, Serialize)]
pub struct EncryptionInfo {
    /// The repository key that objects are stored under now.
    pub repository_key: KeyId,
    /// How many repository keys there are: one, and one more for each rotation.
    pub repository_keys: u64,
    /// The user keys that open at least one of them.
    pub user_keys: Vec<KeyId>,
    /// The one of these that is set here.
    pub in_hand: KeyId,
}

/// What a run of `verify` came to.
#[derive(Debug, Clone, Serialize)]
pub struct VerificationInfo {
    /// When it ended.
    pub finished_at: PgTimestamp,
    /// Whether it looked at every byte that was not proven before.
    pub deep: bool,
    /// How much was wrong.
    pub findings: u64,
    /// Of it, what nobody has acknowledged since.
    pub unacknowledged: u64,
}

/// A loss that somebody knows of.
#[derive(Debug, Clone, Serialize)]
pub struct AcknowledgedInfo {
    /// The finding of `verify`.
    pub finding: String,
    /// What was wrong.
    pub what: String,
    /// What was lost by it.
    pub consequence: String,
    /// When it was acknowledged.
    pub at: PgTimestamp,
    /// Why.
    pub reason: String,
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
    /// Its pins.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<PinInfo>,
    /// Why `expire` keeps it, one word each; empty if it goes, absent where no retention is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Vec<&'static str>>,
    /// The same for people.
    #[serde(skip)]
    pub kept_why: Vec<String>,
    /// The system identifier, where it is not the current incarnation's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<SystemId>,
}

/// A pin on a backup.
#[derive(Debug, Clone, Serialize)]
pub struct PinInfo {
    /// Until when; absent: until it is unpinned.
    pub until: Option<PgTimestamp>,
    /// Why.
    pub reason: Option<String>,
    /// Why it cannot be read; it then keeps the backup for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
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
    /// Why it is there, where that was recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
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
