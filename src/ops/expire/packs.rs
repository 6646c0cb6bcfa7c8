//! What is left of backups that do not exist: packs and file lists that nobody needs.

use futures_util::TryStreamExt;

use super::report::KeptPacks;
use super::sweeping::{Claim, Going};
use super::{Doomed, Expiring, LOOK_EVERY};
use crate::failure::Failure;
use crate::format::{BackupId, BackupObject};
use crate::ops::stock::moment_of;
use crate::plan::retention::{NeededPacks, Unfinishedness};

/// What of one backup's objects goes, and what stays.
#[derive(Debug, Default)]
pub(super) struct Remains {
    doomed: Vec<Doomed>,
    /// Packs that stay because kept backups need them.
    kept: u64,
}

impl Expiring<'_> {
    /// Deletes what is left of backups that do not exist, as far as nobody needs it.
    pub(super) async fn delete_packs(&mut self, needed: &NeededPacks) -> Result<(), Failure> {
        self.deleting.progress.note("deleting packs");
        let going: Vec<(BackupId, Option<Unfinishedness>)> =
            self.going().into_iter().map(|(id, fate)| (id.clone(), fate)).collect();
        for (id, fate) in going {
            if self.protected.covers(&id) {
                self.keep_all_packs(id);
            } else if self.buried.contains(&id)
                && let Some(remains) = self.look_at(&id, fate, needed).await?
            {
                self.delete_remains(id, remains).await?;
            }
        }
        Ok(())
    }

    async fn delete_remains(&mut self, id: BackupId, remains: Remains) -> Result<(), Failure> {
        let claimed = |doomed| Going { doomed, claim: Claim::Backup(id.clone()) };
        let going = remains.doomed.into_iter().map(claimed).collect();
        let what = format!("packs of backup `{id}`, which is gone,");
        let swept = self.sweep(&what, LOOK_EVERY, going).await?;
        if swept.has_spared {
            self.keep_all_packs(id);
        } else if remains.kept > 0 {
            let by = "backups that stay need them".to_owned();
            self.kept_packs.push(KeptPacks { backup: id, packs: Some(remains.kept), by });
        }
        Ok(())
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
    ) -> Result<Option<Remains>, Failure> {
        let failed = |error| self.failed(error, "list what is stored of a backup");
        let known = self.gathered.stock.unfinished.iter().find(|known| known.id == *id);
        let is_gone = self.buried.contains(id) && !self.request.dry_run;
        let mut remains = Remains::default();
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
                Some(BackupObject::Pack(pack)) if needed.needs(id, pack) => remains.kept += 1,
                Some(BackupObject::Pack(_) | BackupObject::Files) => remains.doomed.push(doomed),
                None => tracing::warn!("`{}` is not an object of Highwater; it stays", doomed.key),
            }
        }
        Ok(Some(remains))
    }
}
