//! What was proven before, and what this run proves: so that nothing is read again that cannot have changed.
//!
//! Stored objects are never modified. So one that was proven, and that the store still lists with the same size and
//! the same time of storing, is what it was: unless the medium lost bits behind the store's back, which is why a proof
//! is believed for a limited time only, and never when everything is asked for again.

use std::time::{Duration, Instant};

use crate::format::{BackupId, Depth, PROOFS_MAX, Proof};
use crate::pg::{PgTimestamp, SystemId};
use crate::repo::{RepoError, Repository};
use crate::store::Key;

/// Proofs of earlier runs that are held: 32 MiB. What is beyond is proven again each time, which is dearer and never wrong.
const PROOFS_HELD_MAX: usize = (32 << 20) / size_of::<Proof>();

/// What was proven is stored at least so often, so that a run that is killed loses no more than this.
const STORED_EVERY: Duration = Duration::from_secs(10);

/// What a run wants of proofs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) depth: Depth,
    /// Believe no proof.
    pub(super) again: bool,
    /// Believe a proof for so long.
    pub(super) older_than: Duration,
}

/// Proofs, old and new.
#[derive(Debug)]
pub(super) struct Ledger {
    wanted: Wanted,
    run: BackupId,
    system_id: SystemId,
    today: u16,
    /// Sorted.
    known: Vec<Proof>,
    fresh: Vec<Proof>,
    stored: u32,
    stored_at: Instant,
    /// Objects of earlier runs, which this one replaces once it has seen everything.
    replaced: Vec<Key>,
    /// Of them, those that could not be read.
    pub(super) unreadable: u64,
}

/// Returns the day of a moment, since 1970.
fn day_of(moment: PgTimestamp) -> u16 {
    let days = moment.to_unix_micros().unwrap_or(0) / 86_400_000_000;
    u16::try_from(days).unwrap_or(0)
}

impl Ledger {
    /// Reads what earlier runs have left, the newest first.
    ///
    /// # Errors
    /// The store's only: what is damaged is as if it were not there.
    pub(super) async fn open(
        repository: &Repository,
        system_id: SystemId,
        run: BackupId,
        now: PgTimestamp,
        wanted: Wanted,
    ) -> Result<Self, RepoError> {
        let mut ledger = Self {
            wanted,
            run,
            system_id,
            today: day_of(now),
            known: Vec::new(),
            fresh: Vec::new(),
            stored: 0,
            stored_at: Instant::now(),
            replaced: Vec::new(),
            unreadable: 0,
        };
        for earlier in repository.verify_runs().await? {
            for key in repository.proof_keys(&earlier).await? {
                ledger.read(repository, key).await?;
            }
        }
        ledger.known.sort_unstable();
        Ok(ledger)
    }

    async fn read(&mut self, repository: &Repository, key: Key) -> Result<(), RepoError> {
        if self.known.len() >= PROOFS_HELD_MAX {
            self.replaced.push(key);
            return Ok(());
        }
        match repository.proofs(&key).await {
            Ok(proofs) => self.known.extend(proofs),
            Err(error) if error.is_absent() => return Ok(()),
            Err(error) if error.is_damage() => {
                tracing::warn!("what an earlier run of verify has proven is proven again: {error}");
                self.unreadable += 1;
            }
            Err(error) => return Err(error),
        }
        self.replaced.push(key);
        Ok(())
    }

    fn of(&self, object: u64) -> impl Iterator<Item = &Proof> {
        let first = self.known.partition_point(|proof| proof.object < object);
        self.known[first..].iter().take_while(move |proof| proof.object == object)
    }

    /// Returns a proof that spares looking at an object with this look.
    pub(super) fn believed(&self, object: u64, look: u64) -> Option<Proof> {
        let days = u16::try_from(self.wanted.older_than.as_secs() / 86_400).unwrap_or(u16::MAX);
        let fits = |proof: &&Proof| {
            let age = self.today.checked_sub(proof.day());
            proof.look() == look
                && proof.depth() >= self.wanted.depth
                && age.is_some_and(|age| age < days)
        };
        let best = self.of(object).filter(fits).max_by_key(|proof| (proof.depth(), proof.day()));
        best.filter(|_| !self.wanted.again).copied()
    }

    /// Returns the digest that an object had when all of it was proven last.
    pub(super) fn content_of(&self, object: u64) -> Option<u64> {
        let known = self.of(object).filter(|proof| proof.content != 0);
        known.max_by_key(|proof| proof.day()).map(|proof| proof.content)
    }

    /// Keeps a proof of an earlier run.
    pub(super) fn keep(&mut self, proof: Proof) {
        self.fresh.push(proof);
    }

    /// Keeps whatever earlier runs have proven of an object.
    pub(super) fn keep_all(&mut self, object: u64) {
        let all: Vec<Proof> = self.of(object).copied().collect();
        self.fresh.extend(all);
    }

    /// Notes what was proven now.
    pub(super) fn add(&mut self, object: u64, look: u64, content: Option<u64>, depth: Depth) {
        let content = content.or_else(|| self.content_of(object)).unwrap_or(0);
        self.fresh.push(Proof::new(object, look, content, self.today, depth));
    }

    /// Stores what is new, if it is much or some time has passed.
    pub(super) async fn store_now_and_then(
        &mut self,
        repository: &Repository,
    ) -> Result<(), RepoError> {
        if self.fresh.len() >= PROOFS_MAX || self.stored_at.elapsed() >= STORED_EVERY {
            self.store(repository).await?;
        }
        Ok(())
    }

    /// Stores what is new.
    pub(super) async fn store(&mut self, repository: &Repository) -> Result<(), RepoError> {
        self.stored_at = Instant::now();
        while !self.fresh.is_empty() {
            let count = self.fresh.len().min(PROOFS_MAX);
            let (system_id, run) = (self.system_id, self.run.clone());
            repository.put_proofs(system_id, &run, self.stored, &self.fresh[..count]).await?;
            self.stored += 1;
            self.fresh.drain(..count);
        }
        Ok(())
    }

    /// Stores what is new and removes what earlier runs have left: everything was seen, and what still holds is kept.
    pub(super) async fn finish(&mut self, repository: &Repository) -> Result<(), RepoError> {
        self.store(repository).await?;
        for key in std::mem::take(&mut self.replaced) {
            match repository.discard(&key).await {
                Ok(()) => {}
                // A lock keeps it; it costs its room, and nothing else.
                Err(error) if error.is_not_allowed() => {
                    tracing::debug!("`{key}` stays: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
