//! Copying WAL: what one repository has and the other has not, object by object.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::{StreamExt, TryStreamExt, stream};

use super::backups::Candidates;
use super::{CopyError, Side, Way, failed_at};
use crate::failure::Failure;
use crate::format::{Committed, Identity, WalObject};
use crate::ops::now;
use crate::ops::stock::{Gathered, moment_of, take_stock};
use crate::ops::wal_times::histories_of;
use crate::pg::{Lsn, PgTimestamp, SegmentName, SegmentSize, SystemId, WalFileName};
use crate::plan::retention::{Plan, plan};
use crate::repo::{ListedWalObject, RepoError, Transfer, WalGroup};

/// Objects on their way at a time: each is held whole, up to 16 MiB as stored.
const IN_FLIGHT: usize = 3;

/// How often a group is listed again because pieces went while they were copied: something larger stands for them.
const ROUNDS_MAX: usize = 5;

/// Which WAL is brought.
#[derive(Clone, Copy)]
pub(super) enum Found<'a> {
    /// What retention at the destination keeps.
    Kept(Kept<'a>),
    /// What this backup needs to become consistent.
    Of(&'a Committed),
}

/// What retention at the destination keeps of one incarnation.
#[derive(Clone, Copy)]
pub(super) struct Kept<'a> {
    /// `None` keeps everything.
    pub(super) plan: Option<&'a Plan>,
    pub(super) identity: &'a Identity,
}

impl Found<'_> {
    pub(super) fn wants(&self, object: WalObject, size: SegmentSize) -> bool {
        let Some(segment) = object.segment() else { return true };
        match self {
            Self::Kept(Kept { plan: None, .. }) => true,
            Self::Kept(Kept { plan: Some(plan), identity }) => {
                let kept = plan.wal.get(&identity.system_identifier);
                kept.is_none_or(|kept| kept.keeps(segment))
            }
            Self::Of(backup) => {
                let numbers =
                    size.segment_of(backup.start_lsn)..=size.segment_before(backup.stop_lsn);
                (backup.timeline..=backup.stop_timeline).contains(&segment.timeline)
                    && segment.number(size).is_some_and(|number| numbers.contains(&number))
            }
        }
    }

    pub(super) fn wants_group(&self, group: &WalGroup) -> bool {
        match self {
            Self::Kept(_) => true,
            Self::Of(backup) => {
                let logs = backup.start_lsn.0 >> 32..=backup.stop_lsn.0 >> 32;
                (backup.timeline..=backup.stop_timeline).contains(&group.timeline)
                    && logs.contains(&u64::from(group.log))
            }
        }
    }
}

/// What was brought, or would be.
#[derive(Debug, Default)]
pub(super) struct Brought {
    pub(super) objects: u64,
    pub(super) bytes: u64,
    /// By where they begin, with where they end.
    pub(super) segments: BTreeMap<SegmentName, (Lsn, Lsn)>,
    pub(super) since: Option<PgTimestamp>,
}

impl Brought {
    pub(super) fn start_lsn(&self) -> Option<Lsn> {
        self.segments.values().map(|(start, _)| *start).min()
    }

    pub(super) fn end_lsn(&self) -> Option<Lsn> {
        self.segments.values().map(|(_, end)| *end).max()
    }

    fn add(&mut self, listed: &ListedWalObject, bytes: u64, size: SegmentSize) {
        self.objects += 1;
        self.bytes += bytes;
        let stored = moment_of(listed.modified);
        self.since = Some(self.since.map_or(stored, |since| since.min(stored)));
        if let Some(segment) = listed.object.segment()
            && let Some(start) = segment.start_lsn(size)
        {
            let end = Lsn(start.0.saturating_add(size.bytes()));
            self.segments.insert(segment, (start, end));
        }
    }
}

impl Way<'_> {
    /// Brings history files that are missing: they come before any WAL of their timelines.
    pub(super) async fn bring_histories(&mut self, identity: &Identity) -> Result<(), Failure> {
        let (system_id, size) = (identity.system_identifier, identity.segment_size);
        let listed = async |side: &Side| {
            let histories = side.repository.stored_histories(system_id).await;
            histories.map_err(|error| failed_at(side, error, "list history files"))
        };
        let there = listed(self.to).await?;
        let missing: Vec<_> = listed(self.from).await?.difference(&there).copied().collect();
        for timeline in missing {
            self.check_stop().await?;
            self.report.wal.objects += 1;
            if self.request.dry_run {
                continue;
            }
            let file = WalFileName::History(timeline);
            match self.transfer().wal(system_id, size, WalObject::File(file)).await {
                Ok((_, bytes)) => self.report.wal.bytes += bytes,
                Err(error) => {
                    self.report.wal.objects -= 1;
                    self.troubled(&format!("`{file}`"), error)?;
                }
            }
        }
        Ok(())
    }

    /// Decides what retention at the destination would keep if it had all that the other has: its own backups, these
    /// candidates, and the WAL of both. `None`: everything.
    pub(super) async fn kept_there(
        &self,
        identities: &[Identity],
        candidates: &Candidates,
    ) -> Result<Option<Plan>, Failure> {
        if !self.to.policy.is_set() {
            return Ok(None);
        }
        self.progress.note("taking stock");
        let at_source = |error| failed_at(self.from, error, "list WAL");
        let gathered = take_stock(&self.to.repository, identities).await;
        let Gathered { mut stock, inventories, .. } =
            gathered.map_err(|error| failed_at(self.to, error, "take stock"))?;
        for one in &mut stock.incarnations {
            let source = &self.from.repository;
            let theirs = source.wal_inventory(one.system_id, one.segment_size).await;
            let theirs = theirs.map_err(at_source)?;
            if let Some(ours) = inventories.get(&one.system_id) {
                one.coverage = ours.coverage_with(&theirs);
            }
            for (timeline, wal) in &theirs.timelines {
                let stored = wal.last_stored.map(moment_of);
                if let Some(stored) = stored {
                    let last = one.last_stored.entry(*timeline).or_insert(stored);
                    *last = stored.max(*last);
                }
            }
            // Those that are known are there: they were brought before. In a dry run they are still here.
            let unknown: Vec<_> =
                theirs.histories.into_iter().filter(|t| !one.histories.contains_key(t)).collect();
            match histories_of(source, one.system_id, unknown).await {
                Ok(more) => one.histories.extend(more),
                Err(RepoError::Damaged { .. } | RepoError::NotReadable { .. }) => {}
                Err(error) => return Err(at_source(error)),
            }
            one.backups.extend(candidates.of(one.system_id).cloned());
            one.backups.sort_by(|a, b| a.id.cmp(&b.id));
        }
        Ok(Some(plan(&stock, &self.to.policy, now(), &BTreeMap::new())))
    }

    /// Brings the WAL of one incarnation that is wanted and missing, oldest first.
    pub(super) async fn bring_wal(
        &mut self,
        (system_id, size): (SystemId, SegmentSize),
        wanted: Found<'_>,
    ) -> Result<Brought, Failure> {
        let groups = self.from.repository.wal_groups(system_id).await;
        let groups = groups.map_err(|error| failed_at(self.from, error, "list WAL"))?;
        let mut brought = Brought::default();
        for group in groups.iter().filter(|group| wanted.wants_group(group)) {
            let mut failed = BTreeSet::new();
            for _ in 0..ROUNDS_MAX {
                self.check_stop().await?;
                let missing = self.missing(system_id, group, |object| {
                    wanted.wants(object, size) && !failed.contains(&object)
                });
                let missing = missing.await?;
                if missing.is_empty() {
                    break;
                }
                if self.request.dry_run {
                    for object in &missing {
                        brought.add(object, object.size_bytes, size);
                    }
                    break;
                }
                let went = self.bring(system_id, size, &missing, &mut brought, &mut failed).await?;
                if !went {
                    break;
                }
            }
        }
        Ok(brought)
    }

    /// Lists what of a group is here, wanted, and not there; oldest first.
    async fn missing(
        &self,
        system_id: SystemId,
        group: &WalGroup,
        wants: impl Fn(WalObject) -> bool,
    ) -> Result<Vec<ListedWalObject>, Failure> {
        let list = async |side: &Side| {
            let listing = side.repository.wal_objects(system_id, group);
            let listed: Result<Vec<_>, RepoError> = listing.try_collect().await;
            listed.map_err(|error| failed_at(side, error, "list WAL"))
        };
        let here = list(self.from).await?;
        let there: BTreeSet<WalObject> =
            list(self.to).await?.into_iter().map(|listed| listed.object).collect();
        let known_here: BTreeSet<WalObject> = here.iter().map(|listed| listed.object).collect();
        let mut missing: Vec<ListedWalObject> = here
            .into_iter()
            .filter(|listed| wants(listed.object))
            .filter(|listed| !there.contains(&listed.object))
            .filter(|listed| !is_held_by(&there, listed.object))
            .filter(|listed| !lies_in_another(listed.object, &known_here))
            .collect();
        missing.sort_unstable_by_key(|listed| (listed.object.segment(), listed.object));
        Ok(missing)
    }

    /// Brings these objects; returns whether any of them was gone, so that another look is worth while.
    async fn bring(
        &mut self,
        system_id: SystemId,
        size: SegmentSize,
        missing: &[ListedWalObject],
        brought: &mut Brought,
        failed: &mut BTreeSet<WalObject>,
    ) -> Result<bool, Failure> {
        let (from, to) = (self.from, self.to);
        let transfer = Transfer { from: &from.repository, to: &to.repository };
        let mut on_their_way =
            stream::iter(missing)
                .map(|listed| async move {
                    (listed, transfer.wal(system_id, size, listed.object).await)
                })
                .buffered(IN_FLIGHT);
        let mut any_went = false;
        while let Some((listed, outcome)) = on_their_way.next().await {
            match outcome {
                Ok((_, bytes)) => {
                    brought.add(listed, bytes, size);
                    self.progress.advance(bytes);
                    tidy(to, system_id, size, listed.object).await;
                }
                Err(CopyError::From(error)) if error.is_absent() => any_went = true,
                Err(error) => {
                    failed.insert(listed.object);
                    self.troubled(&told(listed.object), error)?;
                }
            }
            self.check_stop().await?;
        }
        Ok(any_went)
    }

    /// Returns whether the destination holds all WAL that a backup needs to become consistent.
    pub(super) async fn has_wal_of(&self, backup: &Committed) -> Result<bool, Failure> {
        let side = if self.request.dry_run { self.from } else { self.to };
        let size = backup.segment_size;
        let inventory = side.repository.wal_between(
            backup.system_identifier,
            size,
            backup.start_lsn,
            backup.stop_lsn,
        );
        let inventory = inventory.await.map_err(|error| failed_at(side, error, "list WAL"))?;
        let timelines = backup.timeline..=backup.stop_timeline;
        let mut at = backup.start_lsn;
        // Each step goes on in another stored stretch, or it is the last.
        while at < backup.stop_lsn {
            let stretches = inventory.timelines.iter().filter(|(t, _)| timelines.contains(t));
            let further = stretches
                .flat_map(|(_, wal)| &wal.ranges)
                .filter(|(start, end)| *start <= at && at < *end)
                .map(|(_, end)| *end)
                .max();
            match further {
                Some(end) => at = end,
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// Deletes the pieces that lie in a complete segment which was just brought, and hold the same.
async fn tidy(to: &Side, system_id: SystemId, size: SegmentSize, object: WalObject) {
    let WalObject::File(WalFileName::Segment(segment)) = object else { return };
    let place = &to.repository;
    let dropped = async {
        let same = place.compare_pieces(system_id, segment, size).await?.same;
        place.drop_same_pieces(system_id, segment, size, &same).await
    };
    if let Err(error) = dropped.await {
        // They harm nobody, and go with the segment.
        tracing::debug!("pieces of `{segment}` stay: {error}");
    }
}

/// Returns whether a piece lies in a complete segment among these, or in pieces that join: two streams cut the same WAL
/// at different places.
fn is_held_by(there: &BTreeSet<WalObject>, object: WalObject) -> bool {
    let WalObject::Piece { segment, start, end } = object else { return false };
    if there.contains(&WalObject::File(WalFileName::Segment(segment))) {
        return true;
    }
    let first = WalObject::Piece { segment, start: 0, end: 0 };
    let last = WalObject::Piece { segment, start: end, end: 0 };
    let mut held_until = start;
    for other in there.range(first..last) {
        if let WalObject::Piece { start: from, end: to, .. } = *other
            && from <= held_until
        {
            held_until = held_until.max(to);
        }
    }
    held_until >= end
}

/// Returns whether a piece lies in a complete segment or in a longer piece among these.
fn lies_in_another(object: WalObject, among: &BTreeSet<WalObject>) -> bool {
    let WalObject::Piece { segment, start, end } = object else { return false };
    if among.contains(&WalObject::File(WalFileName::Segment(segment))) {
        return true;
    }
    // One that holds it begins no later.
    let first = WalObject::Piece { segment, start: 0, end: 0 };
    let last = WalObject::Piece { segment, start, end: u32::MAX };
    among.range(first..=last).any(|other| match *other {
        WalObject::Piece { start: from, end: to, .. } => end <= to && (from, to) != (start, end),
        WalObject::File(_) | WalObject::Damaged(_) => false,
    })
}

fn told(object: WalObject) -> String {
    format!("`{}`", object.tail())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pg::Timeline;

    fn piece(start: u32, end: u32) -> WalObject {
        let segment = SegmentName::new(Timeline(1), 3, SegmentSize::new(1 << 20).unwrap());
        WalObject::Piece { segment, start, end }
    }

    #[test]
    fn a_piece_is_held_by_pieces_that_join_and_by_none_with_a_hole() {
        let there = BTreeSet::from([piece(0, 10), piece(5, 20), piece(20, 30), piece(40, 50)]);
        for (start, end) in [(0, 10), (2, 8), (0, 30), (15, 25), (40, 50), (41, 42)] {
            assert!(is_held_by(&there, piece(start, end)), "{start} to {end}");
        }
        for (start, end) in [(0, 31), (29, 31), (30, 40), (35, 45), (49, 51), (60, 70)] {
            assert!(!is_held_by(&there, piece(start, end)), "{start} to {end}");
        }
        let WalObject::Piece { segment, .. } = piece(0, 1) else { return };
        let whole = BTreeSet::from([WalObject::File(WalFileName::Segment(segment))]);
        assert!(is_held_by(&whole, piece(60, 70)));
    }
}
