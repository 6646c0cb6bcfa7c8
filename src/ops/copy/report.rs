//! What came of a copy. Field names are part of the contract of `--json`.

use serde::Serialize;

use super::Side;
use super::wal::Brought;
use crate::failure::Kind;
use crate::format::BackupId;
use crate::pg::{Lsn, PgTimestamp};

/// What was copied.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The cluster's name.
    pub cluster: String,
    /// Whether nothing was copied, and only told.
    pub dry_run: bool,
    /// Each way that was gone.
    pub ways: Vec<WayReport>,
}

impl Report {
    /// Returns why the exit code must not be 0: the gravest trouble of any way. A backup without all WAL from its start
    /// to its stop is none that could be used.
    pub fn failed(&self) -> Option<Kind> {
        let backups = self.ways.iter().flat_map(|way| &way.backups);
        let lacks_wal = backups.filter(|backup| backup.wal_complete == Some(false));
        let lacking = lacks_wal.map(|_| Kind::Integrity);
        let kinds = self.ways.iter().filter_map(|way| way.gravest).chain(lacking);
        kinds.reduce(|one, other| if one == Kind::Integrity { one } else { other })
    }
}

/// From one repository to the other.
#[derive(Debug, Clone, Serialize)]
pub struct WayReport {
    /// The one that was read: `first` or `second`.
    pub from: &'static str,
    /// Its URL.
    pub from_repository: String,
    /// The one that was stored into.
    pub to: &'static str,
    /// Its URL.
    pub to_repository: String,
    /// The backups that were asked for and are in the one that was read.
    pub backups: Vec<BackupLine>,
    /// The WAL, that of these backups included.
    pub wal: WalLine,
    /// What could not be copied though both repositories answer; at most 100 are named.
    pub troubles: Vec<Trouble>,
    /// How many more there are.
    pub troubles_unnamed: u64,
    #[serde(skip)]
    gravest: Option<Kind>,
}

impl WayReport {
    pub(super) fn new(from: &Side, to: &Side) -> Self {
        Self {
            from: from.which.word(),
            from_repository: from.repository.describe(),
            to: to.which.word(),
            to_repository: to.repository.describe(),
            backups: Vec::new(),
            wal: WalLine::default(),
            troubles: Vec::new(),
            troubles_unnamed: 0,
            gravest: None,
        }
    }

    pub(super) fn note(&mut self, trouble: Trouble, kind: Kind, named_max: usize) {
        if self.troubles.len() < named_max {
            self.troubles.push(trouble);
        } else {
            self.troubles_unnamed += 1;
        }
        if self.gravest != Some(Kind::Integrity) {
            self.gravest = Some(kind);
        }
    }
}

/// What became of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It exists at the destination now.
    Copied,
    /// It would be copied.
    WouldBeCopied,
    /// It was there already; packs and WAL of it that were missing were brought.
    AlreadyThere,
    /// Retention at the destination would delete it at once.
    NotKept,
    /// Something is wrong with it; see the troubles.
    NotCopied,
}

/// One backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BackupLine {
    /// Its id.
    pub id: BackupId,
    /// What became of it.
    pub outcome: Outcome,
    /// Packs that were brought.
    pub packs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Whether all WAL from its start to its stop is at the destination now; absent where it was not looked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wal_complete: Option<bool>,
}

/// WAL that was brought, or is missing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct WalLine {
    /// Objects: segments, pieces, history files and others.
    pub objects: u64,
    /// Segments that they are of.
    pub segments: u64,
    /// Their bytes as stored.
    pub bytes: u64,
    /// Where the first of these segments begins.
    pub start_lsn: Option<Lsn>,
    /// Where the last of them ends (excluded).
    pub end_lsn: Option<Lsn>,
    /// When the oldest of them was stored in the repository that has it, by its clock.
    pub since: Option<PgTimestamp>,
}

impl WalLine {
    pub(super) fn add(&mut self, found: &Brought) {
        self.objects += found.objects;
        self.bytes += found.bytes;
        self.segments += found.segments.len() as u64;
        let starts = [self.start_lsn, found.start_lsn()];
        self.start_lsn = starts.into_iter().flatten().min();
        self.end_lsn = self.end_lsn.max(found.end_lsn());
        let times = [self.since, found.since];
        self.since = times.into_iter().flatten().min();
    }
}

/// Something that could not be copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Trouble {
    /// What.
    pub what: String,
    /// In which repository it is at fault: `first` or `second`.
    pub repository: &'static str,
    /// `integrity`, `conflict` or `usage`.
    pub kind: &'static str,
    /// Why.
    pub why: String,
}
