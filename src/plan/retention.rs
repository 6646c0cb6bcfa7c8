//! What is kept and what goes: the plan of `expire`, with a reason for each item.
//!
//! Pure: what the repository holds goes in as values, a plan comes out. The rules, in the order in
//! which they protect:
//!
//! - A backup is kept *for point-in-time recovery* or *self-contained*. From the former on, WAL is kept on every
//!   way that recovery could take from it; of the latter only the WAL from its start to its stop.
//! - The window is reached from one backup before it begins (its *anchor*), so that no moment inside is lost.
//! - Of each timeline that is alive, and of the whole place, at least `min_backups` usable backups stay.
//! - What cannot be judged is kept: documents that cannot be read, timelines without a history file,
//!   backups of the future, WAL that nobody has a backup for yet.
//! - History files and identities are never deleted. They are tiny, and they tell which timeline numbers are
//!   taken, which PostgreSQL asks before it chooses one at promotion, and whose place this is.
//!
//! ```text
//! window                      |<------------------------------ now
//! backups        A      B     |   C        D        E
//! WAL        ====|======|=====|===|========|========|=========
//!             goes      ^ anchor: everything from here on stays
//! ```
//!
//! Never here: how anything is deleted, and in which order (`ops::expire`).

mod backups;
mod packs;
mod wal;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;

use super::lineage::Coverage;
use super::restore::Holdings;
use crate::format::{BackupId, Begun, Committed};
use crate::pg::{PgTimestamp, SegmentSize, SystemId, Timeline, TimelineHistory};

pub use backups::{BackupFate, Reason};
pub use packs::{LoosePacks, NeededPacks, Protected};
pub use wal::{KeptWal, WalReason, WalStretch};

/// A timeline to which something was added within this time is alive, whatever the window: what was
/// written on it may be wanted though no backup of it is counted any more.
pub const ALIVE_FOR: Duration = Duration::from_hours(7 * 24);

/// By how much the clocks of servers, hosts and the store may differ before a decision goes by the
/// wrong one. It errs towards keeping.
pub const CLOCKS_DIFFER_MAX: Duration = Duration::from_hours(24);

/// How long `expire` relies on a look at who has begun: what it deletes afterwards it has asked the store to delete by
/// then, or it looks again.
pub const LOOK_HOLDS_FOR: Duration = Duration::from_mins(2);

/// How long after it was announced a copy believes that packs which a deleted backup has left, and which stand, are
/// about to be deleted by nobody: an `expire` that had looked before has asked for the last of them by then. The rest is
/// for deletions that are on their way to the store, which nobody can call back.
pub const REMAINS_SETTLE_AFTER: Duration = Duration::from_mins(5);

const _: () = assert!(REMAINS_SETTLE_AFTER.as_secs() > 2 * LOOK_HOLDS_FOR.as_secs());

/// What the operator wants to keep. Whatever one of these keeps is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Every moment of so long ago until now.
    pub window: Option<Duration>,
    /// So many newest backups, with all WAL since the oldest of them.
    pub backups: Option<usize>,
    /// The last backup of each of so many newest days (UTC) that have one, self-contained.
    pub daily: Option<usize>,
    /// The same for weeks, which begin on Monday.
    pub weekly: Option<usize>,
    /// The same for months.
    pub monthly: Option<usize>,
    /// Never fewer usable backups than this, with all WAL since; at least 1. By itself it deletes nothing.
    pub min_backups: usize,
    /// After how long without a sign of life a backup that never finished is taken for dead.
    pub unfinished: Duration,
}

impl Policy {
    /// The policy under which nothing is ever deleted.
    pub fn nothing_set() -> Self {
        Self {
            window: None,
            backups: None,
            daily: None,
            weekly: None,
            monthly: None,
            min_backups: 1,
            unfinished: ALIVE_FOR,
        }
    }

    /// The policy that lets most go.
    fn least() -> Self {
        Self { backups: Some(1), unfinished: Duration::ZERO, ..Self::nothing_set() }
    }

    /// Returns whether anything says what is to go. Where nothing does, nothing goes.
    pub fn is_set(&self) -> bool {
        self.window.is_some()
            || [self.backups, self.daily, self.weekly, self.monthly].iter().any(Option::is_some)
    }
}

/// A policy as reports tell it. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PolicyInfo {
    /// `retain_window`, in seconds.
    pub retain_window_seconds: Option<u64>,
    /// `retain_backups`
    pub retain_backups: Option<usize>,
    /// `retain_daily`
    pub retain_daily: Option<usize>,
    /// `retain_weekly`
    pub retain_weekly: Option<usize>,
    /// `retain_monthly`
    pub retain_monthly: Option<usize>,
    /// `min_backups`
    pub min_backups: usize,
}

impl PolicyInfo {
    /// Tells a policy.
    pub fn of(policy: &Policy) -> Self {
        Self {
            retain_window_seconds: policy.window.map(|window| window.as_secs()),
            retain_backups: policy.backups,
            retain_daily: policy.daily,
            retain_weekly: policy.weekly,
            retain_monthly: policy.monthly,
            min_backups: policy.min_backups,
        }
    }
}

/// What the repository holds, as far as this decision needs it.
#[derive(Debug, Clone, Default)]
pub struct Stock {
    /// The clusters that lived in this place one after the other; the last lives there now.
    pub incarnations: Vec<Incarnation>,
    /// Backups whose `committed.json` cannot be read.
    pub unreadable: Vec<Unreadable>,
    /// Backups without a `committed.json`.
    pub unfinished: Vec<Unfinished>,
    /// Pins, by backup.
    pub pins: BTreeMap<BackupId, Pinned>,
}

/// One cluster that lives or lived in the place.
#[derive(Debug, Clone)]
pub struct Incarnation {
    /// Who it is.
    pub system_id: SystemId,
    /// Its WAL segment size.
    pub segment_size: SegmentSize,
    /// Its committed backups, oldest first. Which packs they need is not looked at.
    pub backups: Vec<Committed>,
    /// Its stored WAL.
    pub coverage: Coverage,
    /// When an object of a timeline was stored last, by the store's clock; every timeline that has any object.
    pub last_stored: BTreeMap<Timeline, PgTimestamp>,
    /// Its history files.
    pub histories: BTreeMap<Timeline, TimelineHistory>,
}

impl Incarnation {
    /// Returns what decisions about ways of recovery look at.
    pub fn holdings(&self) -> Holdings<'_> {
        Holdings {
            backups: &self.backups,
            coverage: &self.coverage,
            histories: &self.histories,
            segment_size: self.segment_size,
        }
    }
}

/// A backup that is there and cannot be judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Its id.
    pub id: BackupId,
    /// The backups whose packs it may need, from its `begun.json`; `None` if that cannot be read either.
    pub leans_on: Option<Vec<BackupId>>,
}

/// A backup that is none (yet).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfinished {
    /// Its id.
    pub id: BackupId,
    /// What its `begun.json` says.
    pub begun: BegunState,
    /// When something of it was stored last, by the store's clock.
    pub last_stored: Option<PgTimestamp>,
}

/// What is known of how a backup began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BegunState {
    /// The document.
    Readable(Begun),
    /// There is one, and it cannot be read.
    Unreadable,
    /// There is none. It is created first and deleted before the rest, so that this is what an
    /// interrupted deletion has left.
    Absent,
}

/// How long pins keep a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pinned {
    /// Until it is unpinned.
    ForEver,
    /// Until this moment (excluded).
    Until(PgTimestamp),
}

impl Pinned {
    /// Returns what two pins of one backup come to: the longer of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Until(one), Self::Until(other)) => Self::Until(one.max(other)),
            _ => Self::ForEver,
        }
    }

    /// Returns whether it still holds.
    pub fn holds_at(self, moment: PgTimestamp) -> bool {
        match self {
            Self::ForEver => true,
            Self::Until(until) => moment < until,
        }
    }
}

/// What becomes of a backup without a `committed.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnfinishedFate {
    /// Its id.
    pub id: BackupId,
    /// Where it runs or ran.
    pub host: Option<String>,
    /// What becomes of it.
    pub fate: Unfinishedness,
}

/// What a backup without a `committed.json` is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinishedness {
    /// It may be running: it stays, with everything it leans on.
    Running,
    /// There was no sign of life for so long that it is dead: it goes.
    Dead,
    /// What is left of a deleted backup: it goes, as far as no other needs it.
    Remains,
}

/// What is kept and what goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The moment from which ages are counted: now, or when the last thing was stored.
    pub as_of: PgTimestamp,
    /// Where the window begins.
    pub window_start: Option<PgTimestamp>,
    /// Every committed backup that can be read, oldest first.
    pub backups: Vec<BackupFate>,
    /// Every backup that is none.
    pub unfinished: Vec<UnfinishedFate>,
    /// The WAL of each incarnation.
    pub wal: BTreeMap<SystemId, KeptWal>,
    /// Backups whose objects nobody may touch, though they do not exist (any more).
    pub protected: Protected,
    /// WAL that was stored at or after this moment stays whatever its place: a running backup may need it.
    pub wal_untouched_since: Option<PgTimestamp>,
}

impl Plan {
    /// Returns the backups that go, oldest first.
    pub fn expiring(&self) -> impl Iterator<Item = &BackupFate> {
        self.backups.iter().filter(|backup| !backup.is_kept())
    }

    /// Returns the backups that stay, oldest first.
    pub fn kept(&self) -> impl Iterator<Item = &BackupFate> {
        self.backups.iter().filter(|backup| backup.is_kept())
    }
}

/// Decides what is kept and what goes. `forced` are backups that stay whatever the policy says, each with its reason:
/// those that could not be deleted, for instance.
///
/// The same stock, policy and moment give the same plan; what a plan leaves is left by the same plan again.
pub fn plan(
    stock: &Stock,
    policy: &Policy,
    now: PgTimestamp,
    forced: &BTreeMap<BackupId, Reason>,
) -> Plan {
    let as_of = as_of(stock, now);
    let window_start = policy.window.map(|window| before(as_of, window));
    let unfinished = unfinished(stock, policy, as_of);
    let running: BTreeSet<&BackupId> = unfinished
        .iter()
        .filter(|fate| fate.fate == Unfinishedness::Running)
        .map(|fate| &fate.id)
        .collect();
    let begun_first = stock
        .unfinished
        .iter()
        .filter(|backup| running.contains(&backup.id))
        .filter_map(begun_at)
        .min();
    let lives = backups::Lives::of(stock, policy, as_of);
    let chosen = backups::choose(stock, policy, &lives, window_start, as_of, forced);
    let wal = wal::kept(stock, &lives, &chosen);
    Plan {
        as_of,
        window_start,
        backups: chosen,
        protected: packs::protected(stock, &running),
        unfinished,
        wal,
        wal_untouched_since: begun_first.map(untouched_since),
    }
}

/// Returns the WAL that every policy keeps, whatever is pinned, at any moment from `now` on until there is a newer backup.
pub fn always_kept(stock: Stock, now: PgTimestamp) -> BTreeMap<SystemId, KeptWal> {
    let unpinned = Stock { pins: BTreeMap::new(), ..stock };
    plan(&unpinned, &Policy::least(), now, &BTreeMap::new()).wal
}

/// Returns since when WAL must have been stored that a backup which began at this moment may need.
pub fn untouched_since(begun_at: PgTimestamp) -> PgTimestamp {
    before(begun_at, CLOCKS_DIFFER_MAX)
}

/// Returns the moment from which ages are counted: `now`, unless the last sign of life of the cluster is older. So
/// retention rests when backups and archiving do, and a clock that is far ahead deletes nothing.
fn as_of(stock: &Stock, now: PgTimestamp) -> PgTimestamp {
    let wal = stock.incarnations.iter().flat_map(|one| one.last_stored.values().copied());
    let backups = stock.incarnations.iter().flat_map(|one| &one.backups);
    let finished = backups.map(|backup| backup.finished_at);
    let unfinished = stock.unfinished.iter().filter_map(|backup| backup.last_stored);
    wal.chain(finished).chain(unfinished).max().map_or(now, |last| last.min(now))
}

/// Returns the moment so long before another.
fn before(moment: PgTimestamp, duration: Duration) -> PgTimestamp {
    let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
    PgTimestamp(moment.0.saturating_sub(micros))
}

fn begun_at(backup: &Unfinished) -> Option<PgTimestamp> {
    match &backup.begun {
        BegunState::Readable(begun) => Some(begun.begun_at),
        BegunState::Unreadable => Some(PgTimestamp(i64::MIN)),
        BegunState::Absent => None,
    }
}

fn unfinished(stock: &Stock, policy: &Policy, as_of: PgTimestamp) -> Vec<UnfinishedFate> {
    let dead_since = before(as_of, policy.unfinished);
    let fate = |backup: &Unfinished| {
        let Some(begun) = begun_at(backup) else { return Unfinishedness::Remains };
        let last_sign = backup.last_stored.map_or(begun, |stored| stored.max(begun));
        if last_sign < dead_since { Unfinishedness::Dead } else { Unfinishedness::Running }
    };
    let told = stock.unfinished.iter().map(|backup| UnfinishedFate {
        id: backup.id.clone(),
        host: match &backup.begun {
            BegunState::Readable(begun) => Some(begun.host.clone()),
            BegunState::Unreadable | BegunState::Absent => None,
        },
        fate: fate(backup),
    });
    told.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod oracle;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
