//! Looking who has begun since stock was taken, and how long such a look is relied on.
//!
//! A backup that begins says in `begun.json` what it leans on before it counts on it. One whose name is in the stock may
//! begin as well, where its `committed.json` is gone: a copy brings it again. So it is looked at every name of which it is
//! not known from the stock what it leans on.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::time::Instant;

use super::Expiring;
use crate::failure::Failure;
use crate::format::{BackupId, Begun};
use crate::ops::now;
use crate::ops::stock::begun_state;
use crate::pg::PgTimestamp;
use crate::plan::retention::{BegunState, Unfinishedness, untouched_since};
use crate::repo::{RepoError, Repository};

/// Documents read at a time.
const IN_FLIGHT: usize = 8;

/// A look, and until when it is good.
///
/// Time goes by whichever of this host's clocks says that more of it has passed: the one that cannot be set stands still
/// while the machine sleeps, and the other may be set. What either says in error only makes `expire` look again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    began: Instant,
    began_at: PgTimestamp,
    holds_for: Duration,
}

impl Look {
    /// Begins a look: it tells nothing of what begins from now on.
    pub(super) fn begin(holds_for: Duration) -> Self {
        Self { began: Instant::now(), began_at: now(), holds_for }
    }

    /// Returns until when it is good.
    pub(super) fn end(&self) -> Instant {
        self.began + self.holds_for
    }

    /// Returns whether it is good no longer.
    pub(super) fn is_over(&self) -> bool {
        self.is_older_than(self.holds_for)
    }

    /// Returns whether a copy that began behind it may have counted by now on what is being deleted: only a process that
    /// was suspended finds that so. `REMAINS_SETTLE_AFTER` is longer than twice `LOOK_HOLDS_FOR`.
    pub(super) fn is_long_over(&self) -> bool {
        self.is_older_than(2 * self.holds_for)
    }

    fn is_older_than(&self, duration: Duration) -> bool {
        let by_the_calendar = now().0.saturating_sub(self.began_at.0);
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        self.began.elapsed() >= duration || by_the_calendar >= micros
    }
}

/// That somebody makes a backup, or has made it.
struct Sign {
    /// What it leans on, where that can be read.
    leans_on: Option<Vec<BackupId>>,
    /// Since when WAL must have been stored that it may need; `None` for all.
    needs_wal_since: Option<PgTimestamp>,
}

impl Sign {
    /// Of a backup whose documents cannot be read.
    const UNREADABLE: Self = Self { leans_on: None, needs_wal_since: None };
}

/// Looks whether a backup has begun. One that was taken for dead may have been committed before its `begun.json` was
/// deleted.
async fn sign_of_life(
    repository: &Repository,
    id: &BackupId,
    was_dead: bool,
) -> Result<Option<Sign>, RepoError> {
    match begun_state(repository, id).await? {
        BegunState::Readable(Begun { leans_on, parent, begun_at, .. }) => {
            let leans_on = Some(leans_on.into_iter().chain(parent).collect());
            Ok(Some(Sign { leans_on, needs_wal_since: Some(untouched_since(begun_at)) }))
        }
        BegunState::Unreadable => Ok(Some(Sign::UNREADABLE)),
        BegunState::Absent if was_dead => match repository.committed(id).await {
            Ok(committed) => Ok(committed.map(|committed| {
                let owners = committed.references.into_iter().map(|reference| reference.backup);
                let needs_wal_since = Some(untouched_since(committed.started_at));
                Sign { leans_on: Some(owners.collect()), needs_wal_since }
            })),
            Err(error) if error.is_damage() => Ok(Some(Sign::UNREADABLE)),
            Err(error) => Err(error),
        },
        BegunState::Absent => Ok(None),
    }
}

impl Expiring<'_> {
    /// Looks which backups have begun since stock was taken, and protects what they lean on and the WAL that they may need.
    /// Returns them.
    pub(super) async fn look_again(&mut self) -> Result<Vec<BackupId>, Failure> {
        let doing = "look for backups that have begun meanwhile";
        let ids = self.repository.backup_ids().await;
        let ids = ids.map_err(|error| self.failed(error, doing))?;
        let (known, settled) = (self.known_ids(), self.settled());
        let (repository, dead) = (self.repository, &self.dead());
        let open: Vec<BackupId> = ids.into_iter().filter(|id| !settled.contains(id)).collect();
        let mut reading = stream::iter(open)
            .map(|id| async move {
                let sign = sign_of_life(repository, &id, dead.contains(&id)).await;
                sign.map(|sign| (id, sign))
            })
            .buffered(IN_FLIGHT);
        let mut protected = self.plan.protected.clone();
        let mut wal_untouched_since = self.plan.wal_untouched_since;
        let mut fresh = Vec::new();
        while let Some((id, sign)) =
            reading.try_next().await.map_err(|error| self.failed(error, doing))?
        {
            if let Some(Sign { leans_on, needs_wal_since }) = &sign {
                protected.add(&id, leans_on.as_deref());
                let since = needs_wal_since.unwrap_or(PgTimestamp(i64::MIN));
                wal_untouched_since =
                    Some(wal_untouched_since.map_or(since, |so_far| so_far.min(since)));
            }
            if sign.is_some() || !known.contains(&id) {
                fresh.push(id);
            }
        }
        drop(reading);
        self.protected = protected;
        self.wal_untouched_since = wal_untouched_since;
        Ok(fresh)
    }

    /// Returns those that were taken for dead.
    fn dead(&self) -> BTreeSet<BackupId> {
        let dead = self.plan.unfinished.iter().filter(|one| one.fate == Unfinishedness::Dead);
        dead.map(|one| one.id.clone()).collect()
    }

    fn known_ids(&self) -> BTreeSet<BackupId> {
        let stock = &self.gathered.stock;
        let committed = stock.incarnations.iter().flat_map(|one| &one.backups).map(|b| &b.id);
        let unreadable = stock.unreadable.iter().map(|backup| &backup.id);
        let unfinished = stock.unfinished.iter().map(|backup| &backup.id);
        committed.chain(unreadable).chain(unfinished).cloned().collect()
    }

    /// Returns the backups of which it is known from the stock what they lean on. Another that is there may be one that
    /// began since, under whatever name.
    fn settled(&self) -> BTreeSet<BackupId> {
        if self.request.dry_run {
            // Nothing is deleted, so that what goes looks as if it had begun.
            return self.known_ids();
        }
        let kept = self.plan.kept().map(|fate| &fate.id).filter(|id| !self.vanished.contains(id));
        let unreadable = self.gathered.stock.unreadable.iter().map(|backup| &backup.id);
        let running = self.plan.unfinished.iter();
        let running = running.filter(|one| one.fate == Unfinishedness::Running).map(|one| &one.id);
        kept.chain(unreadable).chain(running).cloned().collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_look_is_over_by_whichever_clock_says_so_first() {
        let hour = Duration::from_hours(1);
        let look = Look::begin(hour);
        assert!(!look.is_over());
        let slept = Look { began_at: PgTimestamp(look.began_at.0 - 3_600_000_000), ..look };
        assert!(slept.is_over() && !slept.is_long_over(), "the machine slept");
        let slept = Look { began_at: PgTimestamp(look.began_at.0 - 7_200_000_000), ..look };
        assert!(slept.is_long_over(), "it slept for longer");
        let set_back = Look { began_at: PgTimestamp(look.began_at.0 + 7_200_000_000), ..look };
        assert!(!set_back.is_over());
        let began = look.began.checked_sub(hour).unwrap();
        assert!(Look { began, ..set_back }.is_over(), "whatever the calendar says");
    }
}
