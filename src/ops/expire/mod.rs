//! `expire`: delete what the retention policy no longer keeps, and nothing else.
//!
//! ```text
//! take stock -> plan -> committed.json, begun.json of each backup that goes; begun.json of each dead one
//!                    -> look again: who has begun meanwhile, and leans on what?
//!                    -> packs and file lists that no kept backup needs
//!                    -> WAL that no kept backup needs, oldest first, looking again in between
//!                    -> records of WAL that was let go, where none of it would stay
//!                    -> pins of backups that are gone, old records of drills
//! ```
//!
//! It may end at any line and be run again: what is left is told apart by what is there. No lock is needed, neither
//! against a second `expire` nor against backups: one that begins names what it leans on in `begun.json` and looks
//! afterwards whether its parent still exists; here the parent's `committed.json` is deleted first, and looked for
//! any `begun.json` that leans on it afterwards. Whichever came first, one of them sees the other. The same holds for
//! a backup that goes on from what a dead one has stored, and the `begun.json` of that one. Only a copy counts on packs of
//! a backup that is gone, and on WAL that was stored long before it began: who has begun is looked for again and again while
//! packs and WAL are deleted, no look is relied on for longer than `LOOK_HOLDS_FOR`, and the copy waits for longer than that
//! (`ops::copy`).
//!
//! Never here: what is kept (`plan::retention`).

mod deleting;
mod gaps;
mod looking;
mod packs;
mod report;
mod sweeping;
mod wal;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::failures::of_repo;
use super::progress::Progress;
use super::stock::{Gathered, take_stock};
use super::stop::StopRequest;
use super::{never_claimed, now};
use crate::failure::{Failure, Kind};
use crate::format::BackupId;
use crate::pg::{PgTimestamp, SystemId};
use crate::plan::drill::{RECORD_DAYS_KEPT, records_to_remove};
use crate::plan::retention::{NeededPacks, Plan, Policy, Protected, Reason, Unfinishedness, plan};
use crate::repo::{RepoError, Repository};
use crate::store::Key;
use deleting::{Deleting, Doomed};
pub use report::{
    BackupLine, Deleted, KeptPacks, KeptStretch, Refusal, Refused, Report, UnfinishedLine,
    UnreadableLine, WalLine, WalRange,
};

/// It is looked for backups that have begun before this many packs are deleted: a copy leans on what a deleted backup
/// has left, which is no backup that it could look for.
pub(super) const LOOK_EVERY: usize = 64;

const UNHARMED: &str = "Backups and WAL that are kept are as they were.";

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// What is to be kept.
    pub policy: Policy,
    /// Tell what would go, and delete nothing.
    pub dry_run: bool,
    /// The present time; `None` for this host's clock.
    pub now: Option<PgTimestamp>,
    /// How long a look at who has begun is relied on: [`crate::plan::retention::LOOK_HOLDS_FOR`], but for trials.
    pub look_holds_for: Duration,
}

/// Plans and deletes, or only tells.
///
/// # Errors
/// [`Kind::Usage`] without a policy; [`Kind::Store`] if the store fails, and [`Kind::Stopped`] once `stop` is wanted:
/// then a part is deleted, and the next run goes on.
pub async fn run(
    repository: &Repository,
    request: &Request,
    progress: &dyn Progress,
    stop: StopRequest,
) -> Result<Report, Failure> {
    if !request.policy.is_set() {
        return Err(no_policy());
    }
    let failed = |error| {
        of_repo(error, format!("could not take stock of {}", repository.describe()), UNHARMED)
    };
    progress.note("taking stock");
    let identities = repository.identities().await.map_err(failed)?;
    if identities.is_empty() {
        return Err(never_claimed(repository, UNHARMED));
    }
    let gathered = take_stock(repository, &identities).await.map_err(failed)?;
    let now = request.now.unwrap_or_else(now);
    let plan = plan(&gathered.stock, &request.policy, now, &BTreeMap::new());
    let mut expiring = Expiring {
        repository,
        request,
        now,
        gathered,
        plan,
        forced: BTreeMap::new(),
        buried: BTreeSet::new(),
        vanished: BTreeSet::new(),
        protected: Protected::default(),
        wal_untouched_since: None,
        deleting: Deleting::new(repository, request.dry_run, stop, progress),
        kept_packs: Vec::new(),
        wal_going: BTreeMap::new(),
    };
    expiring.carry_out().await?;
    Ok(expiring.report())
}

fn no_policy() -> Failure {
    Failure::new(
        Kind::Usage,
        "no retention is set, so that nothing is ever deleted",
        UNHARMED,
        "Say what is to be kept: `retain_window = \"30d\"` for every moment of the last 30 days, or `retain_backups`, `retain_daily`, `retain_weekly`, `retain_monthly`. `expire --dry-run` shows what each would delete.",
    )
}

/// One run.
struct Expiring<'a> {
    repository: &'a Repository,
    request: &'a Request,
    now: PgTimestamp,
    gathered: Gathered,
    plan: Plan,
    /// Backups that stay whatever the policy says.
    forced: BTreeMap<BackupId, Reason>,
    /// Backups whose `begun.json` is gone, so that nobody begins to lean on them any more.
    buried: BTreeSet<BackupId>,
    /// Backups that were to stay and that somebody else has deleted meanwhile.
    vanished: BTreeSet<BackupId>,
    /// Whose objects must stay, as it was when it was looked last.
    protected: Protected,
    /// WAL that was stored at or after this moment stays, as it was when it was looked last.
    wal_untouched_since: Option<PgTimestamp>,
    deleting: Deleting<'a>,
    kept_packs: Vec<KeptPacks>,
    /// Objects and bytes of WAL that went, by incarnation and timeline.
    wal_going: BTreeMap<(SystemId, crate::pg::Timeline), (u64, u64)>,
}

impl Expiring<'_> {
    async fn carry_out(&mut self) -> Result<(), Failure> {
        self.delete_backups().await?;
        self.bury_dead().await?;
        if !self.forced.is_empty() {
            let (stock, policy) = (&self.gathered.stock, &self.request.policy);
            self.plan = plan(stock, policy, self.now, &self.forced);
        }
        let fresh = self.look_again().await?;
        let needed = self.needed_packs(&fresh).await?;
        self.delete_packs(&needed).await?;
        self.delete_wal().await?;
        self.delete_gaps().await?;
        self.delete_pins(&fresh).await?;
        self.delete_drills().await
    }

    fn failed(&self, error: RepoError, doing: &str) -> Failure {
        let what = format!("could not {doing} in {}", self.repository.describe());
        let failure = of_repo(error, what, self.deleting.unharmed());
        let again = "Run `highwater expire` again then: it goes on where it stopped.";
        let next = format!("{} {again}", failure.next);
        Failure { next, ..failure }
    }

    /// From here on the backups that go do not exist. One that was pinned since stays, and so does one whose
    /// deletion the store refuses.
    async fn delete_backups(&mut self) -> Result<(), Failure> {
        self.deleting.progress.note("deleting backups");
        let expiring: Vec<BackupId> = self.plan.expiring().map(|fate| fate.id.clone()).collect();
        for id in expiring {
            let known: Vec<&Key> =
                self.gathered.pins.get(&id).into_iter().flatten().map(|pin| &pin.key).collect();
            let pins = self.repository.pins_of(&id).await;
            let pins = pins.map_err(|error| self.failed(error, "look for pins"))?;
            if pins.iter().any(|key| !known.contains(&key)) {
                self.forced.insert(id, Reason::JustPinned);
                continue;
            }
            if self.deleting.one(&self.repository.committed_key(&id)).await? {
                self.deleting.backups += 1;
                if self.deleting.one(&self.repository.begun_key(&id)).await? {
                    self.buried.insert(id);
                }
            } else {
                self.forced.insert(id, Reason::Locked);
            }
        }
        Ok(())
    }

    /// From here on dead backups cannot be committed any more, should they live after all, nor does a new one begin to
    /// lean on them. What a deleted backup has left has no `begun.json` that could be deleted.
    async fn bury_dead(&mut self) -> Result<(), Failure> {
        let unfinished = self.plan.unfinished.clone();
        for one in unfinished.into_iter().filter(|one| !self.plan.protected.covers(&one.id)) {
            let is_gone = match one.fate {
                Unfinishedness::Running => false,
                Unfinishedness::Remains => true,
                Unfinishedness::Dead => {
                    let nobody = NeededPacks::default();
                    let is_silent = self.look_at(&one.id, Some(one.fate), &nobody).await?.is_some();
                    let begun = self.repository.begun_key(&one.id);
                    is_silent && self.deleting.one(&begun).await?
                }
            };
            if is_gone {
                self.buried.insert(one.id);
            }
        }
        Ok(())
    }

    /// Reads which packs of backups that go are needed by those that stay.
    async fn needed_packs(&mut self, fresh: &[BackupId]) -> Result<NeededPacks, Failure> {
        let going: BTreeSet<&BackupId> = self.going().into_iter().map(|(id, _)| id).collect();
        let kept: BTreeSet<&BackupId> = self.plan.kept().map(|fate| &fate.id).collect();
        let stock = self.gathered.stock.incarnations.iter().flat_map(|one| &one.backups);
        let leaning = stock.filter(|backup| kept.contains(&backup.id)).filter(|backup| {
            backup.references.iter().any(|reference| going.contains(&reference.backup))
        });
        let leaning: Vec<BackupId> = leaning.map(|backup| backup.id.clone()).collect();
        let mut needed = NeededPacks::default();
        for id in leaning.iter().chain(fresh) {
            let backup = self.repository.committed(id).await;
            let doing = "read what a backup that stays needs";
            match backup.map_err(|error| self.failed(error, doing))? {
                Some(backup) => needed.add(&backup),
                // It was deleted by another `expire`, and needs nothing, unless it is copied here anew.
                None => {
                    self.vanished.insert(id.clone());
                }
            }
        }
        Ok(needed)
    }

    /// Returns the backups whose objects go, and what they are.
    fn going(&self) -> Vec<(&BackupId, Option<Unfinishedness>)> {
        let expiring = self.plan.expiring().map(|fate| (&fate.id, None));
        let dead = self.plan.unfinished.iter().filter(|one| one.fate != Unfinishedness::Running);
        let mut all: Vec<_> = expiring.chain(dead.map(|one| (&one.id, Some(one.fate)))).collect();
        all.sort_unstable_by_key(|(id, _)| *id);
        all
    }

    /// Deletes the pins of backups that are gone.
    async fn delete_pins(&mut self, fresh: &[BackupId]) -> Result<(), Failure> {
        let stock = &self.gathered.stock;
        let running = self.plan.unfinished.iter().filter(|u| u.fate == Unfinishedness::Running);
        let mut there: BTreeSet<&BackupId> = self.plan.kept().map(|fate| &fate.id).collect();
        there.extend(running.map(|one| &one.id));
        there.extend(stock.unreadable.iter().map(|backup| &backup.id));
        there.extend(fresh);
        let orphans = self.gathered.pins.iter().filter(|(id, _)| !there.contains(id));
        let orphans: Vec<Doomed> = orphans
            .flat_map(|(_, pins)| pins)
            .map(|pin| Doomed { key: pin.key.clone(), bytes: 0 })
            .collect();
        self.deleting.all(orphans).await
    }

    /// Deletes records of drills that are old.
    async fn delete_drills(&mut self) -> Result<(), Failure> {
        let ids = self.repository.drill_ids().await;
        let ids = ids.map_err(|error| self.failed(error, "list records of drills"))?;
        let kept_micros = RECORD_DAYS_KEPT * 24 * 3600 * 1_000_000;
        let oldest_kept = self.now.to_unix_micros().unwrap_or_default() - kept_micros;
        let oldest_kept = jiff::Timestamp::from_microsecond(oldest_kept).unwrap_or_default();
        let going = records_to_remove(&ids, &BackupId::at(oldest_kept, 1)).into_iter();
        let going = going.map(|id| Doomed { key: self.repository.drill_key(id), bytes: 0 });
        self.deleting.all(going.collect()).await
    }
}
