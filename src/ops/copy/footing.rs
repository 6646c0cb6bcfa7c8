//! What a copy may count on of that which stands at the destination already.
//!
//! A pack that a committed backup there needs stays: who wants to delete it deletes that backup's `committed.json` first,
//! and looks for whoever has begun afterwards. A copy that read it after its own `begun.json` stood is seen. What a deleted
//! backup has left has no such document, and whoever deletes it may have looked already:
//!
//! ```text
//! expire   looks: nobody      deletes 64 packs ....... or has given up: LOOK_HOLDS_FOR
//! copy            begun.json stands | the packs stand  ...............................  | do they still? | committed.json
//!                                   |------------- at least REMAINS_SETTLE_AFTER ------|
//! ```
//!
//! WAL is no different: what stands there may be going because no backup there needs it. What every retention keeps, as
//! long as the backups there are those that there are, goes with nobody; that is all behind the newest backup, as a rule.
//!
//! Who looks later finds `begun.json`. So only a copy that counts on such packs or WAL waits, and only for what is left of that
//! time when all else is done, other copies included. Both sides go by durations that they measure themselves; no two clocks are compared.

use std::collections::BTreeSet;

use futures_util::TryStreamExt;
use tokio::time::Instant;

use super::wal::Found;
use super::{CopyError, Way};
use crate::failure::Failure;
use crate::format::{Begun, Committed, FORMAT_VERSION};
use crate::ops::stock::take_stock;
use crate::ops::{TOOL, now};
use crate::pg::SegmentName;
use crate::plan::retention::{LoosePacks, always_kept};
use crate::repo::RepoError;

/// A copy that has begun.
#[derive(Debug)]
pub(super) struct Announced {
    /// What says so at the destination.
    pub(super) begun: Begun,
    /// When it was known to stand there, by this process.
    since: Instant,
    /// Whether it counts on packs that a deleted backup has left there, or on WAL that no backup there may need.
    pub(super) must_wait: bool,
}

impl Announced {
    /// Returns when nobody deletes any more what was going when the copy was announced.
    fn settles_at(&self, way: &Way<'_>) -> Instant {
        self.since + way.request.settle_after
    }

    /// Returns whether that is so by now.
    pub(super) fn has_settled(&self, way: &Way<'_>) -> bool {
        self.settles_at(way) <= Instant::now()
    }
}

impl Way<'_> {
    /// Announces a copy at the destination, and finds out what it counts on there.
    pub(super) async fn announce(&self, backup: &Committed) -> Result<Announced, CopyError> {
        let transfer = self.transfer();
        let mut begun = self.begun(backup);
        // Read before it is announced: packs that an earlier copy has brought stand behind what that one announced.
        if transfer.has_packs(&backup.id).await? {
            begun.leans_on.push(backup.id.clone());
        }
        let begun = transfer.begin(&begun).await?;
        let since = Instant::now();
        let must_wait = self.counts_on_remains(backup, &begun).await?
            || self.counts_on_wal(backup).await.map_err(CopyError::To)?;
        Ok(Announced { begun, since, must_wait })
    }

    /// Returns whether packs that are needed stand below the name of a backup of which there is something at the
    /// destination, and no committed backup there needs them. `begun` stands.
    async fn counts_on_remains(
        &self,
        backup: &Committed,
        begun: &Begun,
    ) -> Result<bool, CopyError> {
        let mut loose = LoosePacks::default();
        for reference in &backup.references {
            let stood = if reference.backup == backup.id {
                begun.leans_on.contains(&backup.id)
            } else {
                self.transfer().has_packs(&reference.backup).await?
            };
            if stood {
                loose.add(reference);
            }
        }
        // As a rule those whose packs they are are there, and nothing else need be read.
        let mut holders: Vec<_> = loose.owners().cloned().collect();
        let ids = self.to.repository.backup_ids().await.map_err(CopyError::To)?;
        let others: Vec<_> = ids.into_iter().rev().filter(|id| !holders.contains(id)).collect();
        holders.extend(others);
        for id in &holders {
            if loose.is_empty() {
                break;
            }
            match self.to.repository.committed(id).await {
                Ok(Some(holder)) => loose.hold(&holder),
                Ok(None) => {}
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(CopyError::To(error)),
            }
        }
        Ok(!loose.is_empty())
    }

    /// Returns whether WAL that is needed stands at the destination which some retention may let go. It is announced.
    async fn counts_on_wal(&self, backup: &Committed) -> Result<bool, RepoError> {
        let there = &self.to.repository;
        let (system_id, size) = (backup.system_identifier, backup.segment_size);
        let mut standing: BTreeSet<SegmentName> = BTreeSet::new();
        for group in there.wal_groups(system_id).await? {
            if !Found::Of(backup).wants_group(&group) {
                continue;
            }
            let mut objects = there.wal_objects(system_id, &group);
            while let Some(found) = objects.try_next().await? {
                standing.extend(
                    found.object.segment().filter(|_| Found::Of(backup).wants(found.object, size)),
                );
            }
        }
        if standing.is_empty() {
            return Ok(false);
        }
        let stock = match take_stock(there, &there.identities().await?).await {
            Ok(gathered) => gathered.stock,
            // Whoever could read it has decided already.
            Err(error) if error.is_damage() => return Ok(true),
            Err(error) => return Err(error),
        };
        let always_kept = always_kept(stock, now());
        let kept = always_kept.get(&system_id);
        Ok(kept.is_some_and(|kept| standing.into_iter().any(|segment| !kept.keeps(segment))))
    }

    /// Waits until nobody deletes any more what was going when the copy was announced.
    ///
    /// # Errors
    /// [`crate::failure::Kind::Stopped`] as soon as somebody wants it to stop.
    pub(super) async fn wait_out(
        &mut self,
        backup: &Committed,
        announced: &Announced,
    ) -> Result<(), Failure> {
        let until = announced.settles_at(self);
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let (id, seconds) = (&backup.id, left.as_secs() + 1);
        tracing::info!(
            "backup {id} counts on packs or WAL in {} that no backup there may need; in {seconds} s it is looked whether all stands, lest an `expire` deletes it still",
            self.to.named()
        );
        self.progress.note(&format!("waiting {seconds} s for what `expire` may be deleting"));
        tokio::select! {
            () = tokio::time::sleep_until(until) => {}
            _ = self.stop.wanted() => {}
        }
        self.check_stop().await
    }

    /// Returns what is announced at the destination. It began when the backup itself did: WAL that was stored there
    /// since is left alone, as for a backup that runs.
    fn begun(&self, backup: &Committed) -> Begun {
        let others = backup.references.iter().map(|reference| &reference.backup);
        Begun {
            format: FORMAT_VERSION,
            id: backup.id.clone(),
            begun_at: backup.started_at,
            host: self.request.host.clone(),
            pid: std::process::id(),
            parent: None,
            leans_on: others.filter(|other| **other != backup.id).cloned().collect(),
            tool: TOOL.to_owned(),
        }
    }
}
