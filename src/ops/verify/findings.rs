//! What `verify` finds, and what it tells. Field names are part of the contract of `--json`.

use serde::Serialize;

use crate::causes::in_one_line;
use crate::failure::Kind;
use crate::format::{BackupId, WalObject, finding_id};
use crate::pg::{Lsn, PgTimestamp, SegmentName, SystemId, Timeline};
use crate::plan::window::Hole;
use crate::repo::{KeyError, RepoError};
use crate::store::Key;

/// The most objects without an owner that are named.
pub(super) const STRAYS_NAMED_MAX: usize = 20;

/// What came of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The cluster's name.
    pub cluster: String,
    /// The repository's URL.
    pub repository: String,
    /// Whether every digest was looked at.
    pub deep: bool,
    /// When it began.
    pub started_at: PgTimestamp,
    /// When it ended.
    pub finished_at: PgTimestamp,
    /// Committed backups that were looked at.
    pub backups: u64,
    /// Objects that were proven in this run, documents and the contents of backups included.
    pub checked: u64,
    /// Those that had been proven before and cannot have changed.
    pub skipped: u64,
    /// Bytes that were read and digested, as stored.
    pub read_bytes: u64,
    /// What is wrong, the newest knowledge of what it means included.
    pub findings: Vec<Finding>,
    /// How much more is wrong than is named.
    pub findings_unnamed: u64,
    /// What is worth knowing and harms nothing.
    pub notes: Vec<String>,
}

impl Report {
    /// Returns what the exit code says: [`Kind::Integrity`] if anything is wrong that nobody has acknowledged.
    pub fn failed(&self) -> Option<Kind> {
        let is_new = |finding: &Finding| finding.acknowledged.is_none();
        (self.findings_unnamed > 0 || self.findings.iter().any(is_new)).then_some(Kind::Integrity)
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What it is called: the same for the same loss, in every run.
    pub id: String,
    /// `missing`, `damaged`, `unreadable`, `gap`, `accepted`, `changed` or `differs`.
    pub fault: &'static str,
    /// The object, where it is about one.
    pub object: Option<String>,
    /// What is wrong, in one sentence.
    pub what: String,
    /// What is lost by it.
    pub consequence: String,
    /// Backups that cannot be restored because of it.
    pub lost_backups: Vec<BackupId>,
    /// Moments that cannot be reached because of it.
    pub lost_moments: Vec<LostMoments>,
    /// What to do.
    pub remedy: String,
    /// Who knows of it.
    pub acknowledged: Option<Acknowledged>,
}

/// A stretch of moments that cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LostMoments {
    /// The timeline.
    pub timeline: Timeline,
    /// Where they begin. It can itself be reached unless `from_is_lost`.
    pub from_lsn: Lsn,
    /// Whether nothing before them can be reached either.
    pub from_is_lost: bool,
    /// Where they end.
    pub to_lsn: Lsn,
    /// Whether they go on up to the end of the archive, until a new backup is taken.
    pub open: bool,
    /// The last commit before them, or the earliest time of the backup they begin with, as far as it could be found out.
    pub from_time: Option<PgTimestamp>,
    /// The earliest time that can be reached behind them.
    pub to_time: Option<PgTimestamp>,
}

/// That somebody knows of a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Acknowledged {
    /// When.
    pub at: PgTimestamp,
    /// Why.
    pub reason: String,
    /// On which host.
    pub host: String,
}

/// What is wrong with something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// The store says that it is not there.
    Missing,
    /// It is there and cannot be believed.
    Damaged,
    /// This version cannot read it.
    Unreadable,
    /// WAL that was never stored.
    Gap,
    /// The server had damaged it, and an operator let it go.
    Accepted,
    /// It is whole, and yet not the bytes that were proven before.
    Changed,
    /// It is whole, and not the bytes that stand under another name for the same WAL.
    Differs,
}

impl Fault {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Damaged => "damaged",
            Self::Unreadable => "unreadable",
            Self::Gap => "gap",
            Self::Accepted => "accepted",
            Self::Changed => "changed",
            Self::Differs => "differs",
        }
    }

    /// Tells what an error says about the object that was read.
    ///
    /// # Errors
    /// The error itself where it is the store's, or ours: then nothing is known about any object.
    pub(super) fn of(error: RepoError) -> Result<(Self, String), RepoError> {
        let why = in_one_line(&error);
        match error {
            error if error.is_absent() => Ok((Self::Missing, why)),
            // With the key that is set nobody reads it, and which object is to blame stands in `why`.
            RepoError::Damaged { .. } | RepoError::Key(KeyError::Unreadable { .. }) => {
                Ok((Self::Damaged, why))
            }
            RepoError::NotReadable { .. } => Ok((Self::Unreadable, why)),
            error => Err(error),
        }
    }
}

/// What something wrong is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum About {
    Identity(SystemId, Key),
    History(SystemId, Timeline, Key),
    Wal(SystemId, WalObject, Key),
    Accepted(SystemId, SegmentName, Key),
    Hole(SystemId, Hole),
    /// `committed.json`.
    Committed(BackupId, Key),
    /// `begun.json`.
    Begun(BackupId, Key),
    /// A backup cannot be restored because of this object.
    Backup(BackupId, Key),
    Pin(Key),
    /// The record of a drill.
    Drill(Key),
    Acknowledgement(Key),
    /// The record of WAL that was let go.
    LetGo(Key),
    /// A document about keys.
    Key(Key),
    /// An object that is whole, stored anew or with bits changed that no codec reads.
    Changed(Key),
    /// Pieces of a segment beside a complete object that holds other WAL.
    Rival(SystemId, SegmentName, Key),
}

/// Something wrong, before it is known what it means.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Raw {
    pub(super) about: About,
    pub(super) fault: Fault,
    pub(super) why: String,
}

impl Raw {
    pub(super) fn object(&self) -> Option<&Key> {
        match &self.about {
            About::Identity(_, key)
            | About::History(_, _, key)
            | About::Wal(_, _, key)
            | About::Accepted(_, _, key)
            | About::Rival(_, _, key)
            | About::Committed(_, key)
            | About::Begun(_, key)
            | About::Backup(_, key)
            | About::Pin(key)
            | About::Drill(key)
            | About::Acknowledgement(key)
            | About::LetGo(key)
            | About::Key(key)
            | About::Changed(key) => Some(key),
            About::Hole(..) => None,
        }
    }

    /// Returns what it is called. A loss that reaches further, or is another backup's as well, is called otherwise.
    pub(super) fn id(&self) -> String {
        let subject = match &self.about {
            About::Hole(system_id, hole) => {
                format!("{system_id} {} {} {}", hole.timeline, hole.start_lsn, hole.end_lsn)
            }
            About::Backup(id, key) => format!("{id} {key}"),
            _ => self.object().map(ToString::to_string).unwrap_or_default(),
        };
        finding_id(self.fault.word(), &subject)
    }

    pub(super) fn what(&self) -> String {
        match &self.about {
            About::Hole(_, hole) => {
                let why = if self.why.is_empty() { "" } else { ": " };
                format!(
                    "WAL from {} to {} of timeline {} is not in the repository{why}{}",
                    hole.start_lsn, hole.end_lsn, hole.timeline, self.why
                )
            }
            About::Accepted(_, segment, _) => {
                format!("segment {segment} was damaged by the server, and accepted as lost")
            }
            About::Backup(id, _) => format!("backup {id}: {}", self.why),
            _ => self.why.clone(),
        }
    }
}
