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
//! Who looks later finds `begun.json`. So only a copy that counts on such packs waits, and only for what is left of that
//! time when all else is done. Both sides go by durations that they measure themselves; no two clocks are compared.

use tokio::time::Instant;

use super::{CopyError, Way};
use crate::failure::Failure;
use crate::format::{Begun, Committed, FORMAT_VERSION};
use crate::ops::TOOL;
use crate::plan::retention::LoosePacks;

/// A copy that has begun.
#[derive(Debug)]
pub(super) struct Announced {
    /// What says so at the destination.
    pub(super) begun: Begun,
    /// When it was known to stand there, by this process.
    since: Instant,
    /// Whether packs that a deleted backup has left stand there, and are counted on.
    pub(super) counts_on_remains: bool,
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
        let counts_on_remains = self.counts_on_remains(backup, &begun).await?;
        Ok(Announced { begun, since, counts_on_remains })
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

    /// Waits until nobody deletes any more what was left of deleted backups when the copy was announced.
    ///
    /// # Errors
    /// [`crate::failure::Kind::Stopped`] as soon as somebody wants it to stop.
    pub(super) async fn wait_out(
        &mut self,
        backup: &Committed,
        announced: &Announced,
    ) -> Result<(), Failure> {
        let until = announced.since + self.request.settle_after;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let (id, seconds) = (&backup.id, left.as_secs() + 1);
        tracing::info!(
            "backup {id} counts on packs that a deleted backup has left in {}; in {seconds} s it is looked whether they stand, lest an `expire` deletes them still",
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
