//! Deleting what is left of backups that do not exist: packs and file lists that nobody needs.
//!
//! Before each stretch it is looked who has begun, and what is not deleted while that look is good is not deleted by it:
//! a copy that begins behind the look waits for longer than that before it counts on these packs.

use futures_util::TryStreamExt;

use super::looking::Look;
use super::report::KeptPacks;
use super::{Doomed, Expiring, LOOK_EVERY};
use crate::failure::{Failure, Kind};
use crate::format::{BackupId, BackupObject};
use crate::ops::stock::moment_of;
use crate::plan::retention::{NeededPacks, Unfinishedness};

/// What goes of one backup's objects.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    doomed: Vec<Doomed>,
    /// Packs that stay because kept backups need them.
    kept: u64,
}

fn packs_of(id: &BackupId) -> String {
    format!("packs of backup `{id}`, which is gone,")
}

impl Expiring<'_> {
    /// Deletes what is left of backups that do not exist, as far as nobody needs it.
    pub(super) async fn sweep_backups(&mut self, needed: &NeededPacks) -> Result<(), Failure> {
        self.deleting.progress.note("deleting packs");
        let going: Vec<(BackupId, Option<Unfinishedness>)> =
            self.going().into_iter().map(|(id, fate)| (id.clone(), fate)).collect();
        for (id, fate) in going {
            if self.protected.covers(&id) {
                self.keep_all_packs(id);
            } else if self.buried.contains(&id)
                && let Some(sweep) = self.look_at(&id, fate, needed).await?
            {
                self.sweep(id, sweep).await?;
            }
        }
        Ok(())
    }

    /// Deletes what is left of one backup, as long as nobody begins to lean on it.
    async fn sweep(&mut self, id: BackupId, sweep: Sweep) -> Result<(), Failure> {
        let mut left = &sweep.doomed[..];
        let mut was_late = false;
        while !left.is_empty() || was_late {
            let look = Look::begin(self.request.look_holds_for);
            if self.is_leaned_on(&id).await? {
                if was_late {
                    return Err(self.deleted_late(&packs_of(&id)));
                }
                self.keep_all_packs(id);
                return Ok(());
            }
            let together = &left[..left.len().min(LOOK_EVERY)];
            let dealt_with = self.deleting.while_good(&look, together).await?;
            // Somebody who began since may have counted on what went by then.
            was_late = look.is_long_over() && dealt_with != Some(0);
            match dealt_with {
                Some(number) if number > 0 || together.is_empty() => left = &left[number..],
                None if was_late && self.is_leaned_on(&id).await? => {
                    return Err(self.deleted_late(&packs_of(&id)));
                }
                Some(_) | None => return Err(self.gave_up(&packs_of(&id))),
            }
        }
        if sweep.kept > 0 {
            let by = "backups that stay need them".to_owned();
            self.kept_packs.push(KeptPacks { backup: id, packs: Some(sweep.kept), by });
        }
        Ok(())
    }

    /// `what` was not deleted while a look was good.
    pub(super) fn gave_up(&self, what: &str) -> Failure {
        let holds_for = self.request.look_holds_for;
        Failure::new(
            Kind::Store,
            format!("the store did not delete {what} within {holds_for:?}"),
            self.deleting.unharmed(),
            "Run `highwater expire` again when the store answers faster: it goes on where it stopped. It waits no longer, since it must look again who needs that.",
        )
    }

    /// `what` was deleted on account of a look that was over.
    pub(super) fn deleted_late(&self, what: &str) -> Failure {
        let long = 2 * self.request.look_holds_for;
        Failure::new(
            Kind::Integrity,
            format!(
                "{what} went {long:?} or more after it was looked who needs that, as if this process had been suspended, and a backup that was copied here meanwhile may need it"
            ),
            "Backups and WAL that are kept and were there before are as they were.",
            "Run `highwater copy --all`, which brings what is missing, and `highwater verify`, which tells whether any are; then `highwater expire` again.",
        )
    }

    fn keep_all_packs(&mut self, id: BackupId) {
        let by = "a backup that runs or cannot be read may need them".to_owned();
        self.kept_packs.push(KeptPacks { backup: id, packs: None, by });
    }

    /// Lists what of a backup goes; `None` if it has shown a sign of life since stock was taken.
    pub(super) async fn look_at(
        &self,
        id: &BackupId,
        fate: Option<Unfinishedness>,
        needed: &NeededPacks,
    ) -> Result<Option<Sweep>, Failure> {
        let failed = |error| self.failed(error, "list what is stored of a backup");
        let known = self.gathered.stock.unfinished.iter().find(|known| known.id == *id);
        let is_gone = self.buried.contains(id) && !self.request.dry_run;
        let mut sweep = Sweep::default();
        let mut objects = self.repository.backup_objects(id);
        while let Some(found) = objects.try_next().await.map_err(failed)? {
            let is_new = known
                .and_then(|known| known.last_stored)
                .is_some_and(|last| moment_of(found.listed.modified) > last);
            let doomed = Doomed { key: found.listed.key, bytes: found.listed.size_bytes };
            match found.object {
                Some(BackupObject::Committed) if fate.is_some() => return Ok(None),
                _ if is_new => return Ok(None),
                // Somebody has begun under this very name.
                Some(BackupObject::Begun) if fate == Some(Unfinishedness::Remains) => {
                    return Ok(None);
                }
                // Both were deleted: it is copied here anew.
                Some(BackupObject::Committed | BackupObject::Begun) if is_gone => return Ok(None),
                // They went already, or would have.
                Some(BackupObject::Committed | BackupObject::Begun) => {}
                Some(BackupObject::Pack(pack)) if needed.needs(id, pack) => sweep.kept += 1,
                Some(BackupObject::Pack(_) | BackupObject::Files) => sweep.doomed.push(doomed),
                None => tracing::warn!("`{}` is not an object of Highwater; it stays", doomed.key),
            }
        }
        Ok(Some(sweep))
    }
}
