//! Deleting WAL that no kept backup needs.
//!
//! It is swept as packs are: a copy of an old backup needs WAL that was stored long before it was announced.

use futures_util::TryStreamExt;

use super::Expiring;
use super::deleting::Doomed;
use super::sweeping::{Claim, Going};
use crate::failure::Failure;
use crate::pg::SystemId;
use crate::plan::retention::KeptWal;
use crate::repo::WalGroup;

/// The most objects of one group of WAL that are gathered before they are deleted; a group with more is
/// listed again.
const GROUP_OBJECTS_MAX: usize = 100_000;

/// It is looked for backups that have begun before this many objects are deleted.
const LOOK_EVERY: usize = 1024;

impl Expiring<'_> {
    pub(super) async fn delete_wal(&mut self) -> Result<(), Failure> {
        self.deleting.progress.note("deleting WAL");
        for (system_id, kept) in self.plan.wal.clone() {
            let groups = self.repository.wal_groups(system_id).await;
            for group in groups.map_err(|error| self.failed(error, "list WAL"))? {
                self.delete_wal_of(system_id, &kept, &group).await?;
            }
        }
        Ok(())
    }

    /// Deletes what goes of 4 GiB of WAL: oldest first, so that what an interruption leaves has no hole.
    async fn delete_wal_of(
        &mut self,
        system_id: SystemId,
        kept: &KeptWal,
        group: &WalGroup,
    ) -> Result<(), Failure> {
        let per_log = kept.segment_size.per_log();
        let first = u64::from(group.log) * per_log;
        if kept.keeps_all(group.timeline, first..first + per_log) {
            return Ok(());
        }
        loop {
            let going = self.going_wal(system_id, kept, group).await?;
            let is_all = going.len() < GROUP_OBJECTS_MAX;
            let before = self.deleting.refused;
            let swept = self.sweep("WAL that no kept backup needs", LOOK_EVERY, going).await?;
            if swept.objects > 0 {
                let tally = self.wal_going.entry((system_id, group.timeline)).or_default();
                tally.0 += swept.objects;
                tally.1 += swept.bytes;
            }
            // What the store does not let go would be listed for ever, and a dry run's as well.
            if is_all || self.request.dry_run || self.deleting.refused > before {
                return Ok(());
            }
        }
    }

    /// Lists what goes of a group, in the order in which it goes; no more than [`GROUP_OBJECTS_MAX`].
    async fn going_wal(
        &self,
        system_id: SystemId,
        kept: &KeptWal,
        group: &WalGroup,
    ) -> Result<Vec<Going>, Failure> {
        let failed = |error| self.failed(error, "list WAL");
        let mut going = Vec::new();
        let mut objects = self.repository.wal_objects(system_id, group);
        while let Some(found) = objects.try_next().await.map_err(failed)? {
            let segment = found.object.segment();
            let goes = segment.is_some_and(|segment| !kept.keeps(segment));
            let claim = Claim::Stored(found.modified);
            if goes && !self.is_claimed(&claim) {
                let key = self.repository.wal_key(system_id, found.object);
                let doomed = Doomed { key, bytes: found.size_bytes };
                going.push(((segment, found.object), Going { doomed, claim }));
            }
            if going.len() >= GROUP_OBJECTS_MAX {
                break;
            }
        }
        going.sort_unstable_by_key(|(order, _)| *order);
        Ok(going.into_iter().map(|(_, one)| one).collect())
    }
}
