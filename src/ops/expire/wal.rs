//! Deleting WAL that no kept backup needs.
//!
//! As with packs it is looked who has begun before each stretch, and what is not deleted while that look is good is not
//! deleted by it: a copy of an old backup needs WAL that was stored long before it was announced.

use std::time::SystemTime;

use futures_util::TryStreamExt;

use super::Expiring;
use super::deleting::Doomed;
use super::looking::Look;
use crate::failure::Failure;
use crate::format::WalObject;
use crate::ops::stock::moment_of;
use crate::pg::{SegmentName, SystemId};
use crate::plan::retention::KeptWal;
use crate::repo::WalGroup;

/// The most objects of one group of WAL that are gathered before they are deleted; a group with more is
/// listed again.
const GROUP_OBJECTS_MAX: usize = 100_000;

/// It is looked for backups that have begun before this many objects are deleted.
const LOOK_EVERY: usize = 1024;

/// An object that goes unless somebody begins who may need it.
struct Going {
    /// What it belongs to, and itself: the order in which it goes.
    order: (Option<SegmentName>, WalObject),
    doomed: Doomed,
    stored: SystemTime,
}

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
            self.sweep_wal(system_id, group, going).await?;
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
            if goes && !self.is_too_young(found.modified) {
                let key = self.repository.wal_key(system_id, found.object);
                going.push(Going {
                    order: (segment, found.object),
                    doomed: Doomed { key, bytes: found.size_bytes },
                    stored: found.modified,
                });
            }
            if going.len() >= GROUP_OBJECTS_MAX {
                break;
            }
        }
        going.sort_unstable_by_key(|one| one.order);
        Ok(going)
    }

    /// Deletes these objects, as long as nobody begins who may need them.
    async fn sweep_wal(
        &mut self,
        system_id: SystemId,
        group: &WalGroup,
        mut going: Vec<Going>,
    ) -> Result<(), Failure> {
        // The last that was stored of what went late.
        let mut went_late: Option<SystemTime> = None;
        while !going.is_empty() || went_late.is_some() {
            let look = Look::begin(self.request.look_holds_for);
            self.look_again().await?;
            if went_late.is_some_and(|stored| self.is_too_young(stored)) {
                return Err(self.deleted_late("WAL"));
            }
            going.retain(|one| !self.is_too_young(one.stored));
            let together = &going[..going.len().min(LOOK_EVERY)];
            let doomed: Vec<Doomed> = together.iter().map(|one| one.doomed.clone()).collect();
            let dealt_with = self.deleting.while_good(&look, &doomed).await?;
            let asked = &together[..dealt_with.unwrap_or(together.len())];
            let last_stored = asked.iter().map(|one| one.stored).max();
            went_late = last_stored.filter(|_| look.is_long_over());
            let Some(number) = dealt_with.filter(|number| *number > 0 || together.is_empty())
            else {
                if went_late.is_some() {
                    self.look_again().await?;
                }
                let is_needed = went_late.is_some_and(|stored| self.is_too_young(stored));
                let what = "WAL that no kept backup needs";
                return Err(if is_needed { self.deleted_late("WAL") } else { self.gave_up(what) });
            };
            let tally = self.wal_going.entry((system_id, group.timeline)).or_default();
            tally.0 += number as u64;
            tally.1 += doomed[..number].iter().map(|one| one.bytes).sum::<u64>();
            going.drain(..number);
        }
        Ok(())
    }

    /// Whether WAL was stored since stock was taken, or so late that a backup which has begun may need it.
    fn is_too_young(&self, stored: SystemTime) -> bool {
        self.gathered.last_wal_stored.is_some_and(|last| stored > last)
            || self.wal_untouched_since.is_some_and(|since| moment_of(stored) >= since)
    }
}
