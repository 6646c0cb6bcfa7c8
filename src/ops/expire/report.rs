//! What `expire` tells. Field names are part of the contract of `--json`.

use serde::Serialize;

use super::Expiring;
use crate::failure::Kind;
use crate::format::BackupId;
use crate::pg::{Lsn, PgTimestamp, SegmentSize, SystemId, Timeline};
use crate::plan::retention::{PolicyInfo, Reason, Unfinishedness, WalStretch};

/// What was planned, and deleted if it was no dry run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The cluster's name.
    pub cluster: String,
    /// The repository's URL.
    pub repository: String,
    /// Whether nothing was deleted, only told.
    pub dry_run: bool,
    /// What is to be kept.
    pub policy: PolicyInfo,
    /// The moment from which ages are counted: now, or when the last thing was stored.
    pub as_of: PgTimestamp,
    /// Whether that lies more than a day back, so that retention rests.
    pub is_resting: bool,
    /// Where the window begins.
    pub window_start: Option<PgTimestamp>,
    /// Committed backups, oldest first.
    pub backups: Vec<BackupLine>,
    /// Backups that are none.
    pub unfinished_backups: Vec<UnfinishedLine>,
    /// Backups that cannot be read: they are kept, with everything they may need.
    pub damaged_backups: Vec<UnreadableLine>,
    /// Packs of backups that go, which stay.
    pub kept_packs: Vec<KeptPacks>,
    /// WAL, by timeline.
    pub wal: Vec<WalLine>,
    /// What was deleted, or would have been.
    pub deleted: Deleted,
    /// What the store did not let go.
    pub refused: Refused,
}

/// One committed backup.
#[derive(Debug, Clone, Serialize)]
pub struct BackupLine {
    /// Its id.
    pub id: BackupId,
    /// The system identifier, where it is not the current incarnation's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<SystemId>,
    /// Whether it stays.
    pub kept: bool,
    /// Why it stays, one word each.
    pub reasons: Vec<&'static str>,
    /// The same for people.
    pub why: Vec<String>,
    /// Whether any moment since can be reached from it, as far as WAL goes; else only itself.
    pub point_in_time: bool,
    /// Whether the WAL that makes it consistent is here.
    pub usable: bool,
}

/// A backup without a `committed.json`.
#[derive(Debug, Clone, Serialize)]
pub struct UnfinishedLine {
    /// Its id.
    pub id: BackupId,
    /// Where it runs or ran.
    pub host: Option<String>,
    /// `running`, `dead` or `remains`; only the first is kept.
    pub state: &'static str,
}

/// A backup that cannot be read.
#[derive(Debug, Clone, Serialize)]
pub struct UnreadableLine {
    /// Its id.
    pub id: BackupId,
    /// Which document it is, and what is wrong with it.
    pub why: String,
}

/// Packs of a backup that goes, which stay.
#[derive(Debug, Clone, Serialize)]
pub struct KeptPacks {
    /// The backup that goes.
    pub backup: BackupId,
    /// How many; `None` for everything it has.
    pub packs: Option<u64>,
    /// Who needs them.
    pub by: String,
}

/// The WAL of one timeline.
#[derive(Debug, Clone, Serialize)]
pub struct WalLine {
    /// The system identifier, where it is not the current incarnation's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<SystemId>,
    /// The timeline.
    pub timeline: Timeline,
    /// What stays.
    pub kept: Vec<KeptStretch>,
    /// What goes, in whole segments, as far as it is stored.
    pub deleted: Vec<WalRange>,
    /// Objects that went, or would have.
    pub deleted_objects: u64,
    /// Their bytes as stored.
    pub deleted_bytes: u64,
}

/// A stretch of WAL that stays.
#[derive(Debug, Clone, Serialize)]
pub struct KeptStretch {
    /// Its first byte.
    pub start_lsn: Lsn,
    /// The end (excluded); `None` where everything that comes stays.
    pub end_lsn: Option<Lsn>,
    /// Why.
    pub why: String,
}

/// A stretch of WAL that goes.
#[derive(Debug, Clone, Serialize)]
pub struct WalRange {
    /// Its first byte.
    pub start_lsn: Lsn,
    /// The end (excluded).
    pub end_lsn: Lsn,
}

/// What was deleted, or would have been.
#[derive(Debug, Clone, Serialize)]
pub struct Deleted {
    /// Backups.
    pub backups: u64,
    /// Objects of any kind.
    pub objects: u64,
    /// Their bytes as stored; documents are not counted.
    pub bytes: u64,
}

/// What the store did not let go.
#[derive(Debug, Clone, Serialize)]
pub struct Refused {
    /// How many objects.
    pub objects: u64,
    /// The first of them.
    pub named: Vec<Refusal>,
}

/// An object that the store did not let go.
#[derive(Debug, Clone, Serialize)]
pub struct Refusal {
    /// Its key.
    pub key: String,
    /// What the store said.
    pub why: String,
}

impl Report {
    /// Returns the exit code's meaning: [`Kind::Store`] if the store kept what should go, [`Kind::Integrity`] if
    /// something could not be judged.
    pub fn failed(&self) -> Option<Kind> {
        if self.refused.objects > 0 {
            return Some(Kind::Store);
        }
        (!self.damaged_backups.is_empty()).then_some(Kind::Integrity)
    }
}

impl Expiring<'_> {
    pub(super) fn report(self) -> Report {
        let current = self.gathered.stock.incarnations.last().map(|one| one.system_id);
        let other = |id: SystemId| (Some(id) != current).then_some(id);
        let backups = self.plan.backups.iter().map(|fate| BackupLine {
            id: fate.id.clone(),
            system_identifier: other(fate.system_id),
            kept: fate.is_kept(),
            reasons: fate.reasons.iter().map(Reason::word).collect(),
            why: fate.reasons.iter().map(ToString::to_string).collect(),
            point_in_time: fate.is_for_recovery(),
            usable: fate.is_usable,
        });
        let unfinished = self.plan.unfinished.iter().map(|one| UnfinishedLine {
            id: one.id.clone(),
            host: one.host.clone(),
            state: match one.fate {
                Unfinishedness::Running => "running",
                Unfinishedness::Dead => "dead",
                Unfinishedness::Remains => "remains",
            },
        });
        let damaged = self
            .gathered
            .unreadable
            .iter()
            .map(|backup| UnreadableLine { id: backup.id.clone(), why: backup.why.clone() });
        let day_micros = 24 * 3600 * 1_000_000;
        Report {
            cluster: self.repository.cluster().to_string(),
            repository: self.repository.describe(),
            dry_run: self.request.dry_run,
            policy: PolicyInfo::of(&self.request.policy),
            as_of: self.plan.as_of,
            is_resting: self.now.0.saturating_sub(self.plan.as_of.0) > day_micros,
            window_start: self.plan.window_start,
            backups: backups.collect(),
            unfinished_backups: unfinished.collect(),
            damaged_backups: damaged.collect(),
            wal: self.wal_lines(other),
            kept_packs: self.kept_packs,
            deleted: Deleted {
                backups: self.deleting.backups,
                objects: self.deleting.objects,
                bytes: self.deleting.bytes,
            },
            refused: Refused { objects: self.deleting.refused, named: self.deleting.refusals },
        }
    }

    fn wal_lines(&self, other: impl Fn(SystemId) -> Option<SystemId>) -> Vec<WalLine> {
        let mut lines = Vec::new();
        for one in &self.gathered.stock.incarnations {
            let Some(kept) = self.plan.wal.get(&one.system_id) else { continue };
            let size = one.segment_size;
            for (timeline, stretches) in &kept.timelines {
                let stored = one.coverage.get(timeline).into_iter().flatten();
                let going = stored.flat_map(|(start, end)| {
                    kept.going(*timeline, size.segment_of(*start)..size.segment_before(*end) + 1)
                });
                let going = going.map(|range| WalRange {
                    start_lsn: size.start_of(range.start),
                    end_lsn: size.start_of(range.end),
                });
                let gone = self.wal_going.get(&(one.system_id, *timeline)).copied();
                let (deleted_objects, deleted_bytes) = gone.unwrap_or_default();
                let line = WalLine {
                    system_identifier: other(one.system_id),
                    timeline: *timeline,
                    kept: stretches.iter().map(|stretch| kept_stretch(stretch, size)).collect(),
                    deleted: going.collect(),
                    deleted_objects,
                    deleted_bytes,
                };
                if one.last_stored.contains_key(timeline) {
                    lines.push(line);
                }
            }
        }
        lines
    }
}

fn kept_stretch(stretch: &WalStretch, size: SegmentSize) -> KeptStretch {
    KeptStretch {
        start_lsn: size.start_of(stretch.first),
        end_lsn: stretch.end.map(|end| size.start_of(end)),
        why: stretch.why.to_string(),
    }
}
