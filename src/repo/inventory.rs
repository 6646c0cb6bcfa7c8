//! What WAL the repository holds, from names alone: one listing for each 4 GiB of WAL.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use futures_util::{StreamExt, TryStreamExt};

use super::wal_fetch::{ListedPiece, unbroken_pieces};
use super::{PIECE_BYTES, RepoError, Repository, WHOLE_SEGMENT_BYTES_MAX};
use crate::format::{WalObject, parse_wal_object};
use crate::pg::{Lsn, SegmentName, SegmentSize, SystemId, Timeline, WalFileName};
use crate::store::{Key, Listed};

/// How many groups are listed at a time.
const IN_FLIGHT: usize = 8;

/// The WAL of one timeline.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TimelineWal {
    /// Stored stretches, ascending, disjoint and not touching: start included, end excluded. Complete
    /// segments and unbroken pieces from a segment's start count; `.partial` files do not.
    pub ranges: Vec<(Lsn, Lsn)>,
    /// Segments of which a `.partial` is stored.
    pub partials: Vec<SegmentName>,
    /// Segments that were accepted as damaged; they are holes in `ranges`.
    pub damaged: Vec<SegmentName>,
    /// Segments all of which is stored, but not as the object, or the units, that stand for a complete one.
    pub unfinished: Vec<SegmentName>,
    /// Segments of which pieces stand inside the object, or a unit, that stands for a complete one.
    pub beside: Vec<SegmentName>,
    /// Bytes as stored.
    pub stored_bytes: u64,
    /// When an object of it was stored last, by the store's clock.
    pub last_stored: Option<SystemTime>,
}

/// All WAL of one incarnation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WalInventory {
    /// By timeline.
    pub timelines: BTreeMap<Timeline, TimelineWal>,
    /// Timelines whose history file is stored.
    pub histories: BTreeSet<Timeline>,
}

impl WalInventory {
    /// Returns the stretches that are stored in this or in another repository of the same cluster.
    pub fn coverage_with(&self, other: &Self) -> BTreeMap<Timeline, Vec<(Lsn, Lsn)>> {
        let mut together = self.coverage();
        for (timeline, wal) in &other.timelines {
            let ranges = together.entry(*timeline).or_default();
            ranges.extend_from_slice(&wal.ranges);
            *ranges = merged(std::mem::take(ranges));
        }
        together
    }

    /// Returns the stored stretches alone.
    pub fn coverage(&self) -> BTreeMap<Timeline, Vec<(Lsn, Lsn)>> {
        self.timelines.iter().map(|(timeline, wal)| (*timeline, wal.ranges.clone())).collect()
    }
}

#[derive(Default)]
struct Found {
    /// Start and end of each stored stretch, unsorted.
    stretches: Vec<(Timeline, Lsn, Lsn)>,
    pieces: BTreeMap<SegmentName, Vec<ListedPiece>>,
    whole: BTreeSet<SegmentName>,
    /// Whether there are pieces that may be replaced by something larger.
    has_loose_pieces: bool,
    partials: Vec<SegmentName>,
    damaged: Vec<SegmentName>,
    unfinished: Vec<SegmentName>,
    beside: Vec<SegmentName>,
    bytes: BTreeMap<Timeline, u64>,
    last_stored: BTreeMap<Timeline, SystemTime>,
}

impl Repository {
    /// Lists all WAL of one incarnation. Memory grows with gaps, not with segments,
    /// except for one group at a time.
    pub async fn wal_inventory(
        &self,
        system_id: SystemId,
        size: SegmentSize,
    ) -> Result<WalInventory, RepoError> {
        self.wal_between(system_id, size, Lsn(0), Lsn(u64::MAX)).await
    }

    /// Lists the WAL of the groups that hold the bytes from `start_lsn` to `end_lsn`, of
    /// every timeline, and all history files.
    pub async fn wal_between(
        &self,
        system_id: SystemId,
        size: SegmentSize,
        start_lsn: Lsn,
        end_lsn: Lsn,
    ) -> Result<WalInventory, RepoError> {
        let logs = start_lsn.0 >> 32..=end_lsn.0 >> 32;
        let root = self.place().wal_dir(system_id);
        let level = self.store().list_level(&Key::new(root.clone())).await?;
        let mut inventory =
            WalInventory { histories: histories_among(&level.objects), ..WalInventory::default() };
        let root = &root;
        let wanted = level.directories.into_iter().filter(|group| {
            let log = group.get(8..16).and_then(|log| u64::from_str_radix(log, 16).ok());
            log.is_some_and(|log| logs.contains(&log))
        });
        let mut groups = futures_util::stream::iter(wanted)
            .map(|name| async move {
                self.list_group(Group { system_id, name: &name, root, size }).await
            })
            .buffered(IN_FLIGHT);
        while let Some(found) = groups.try_next().await? {
            inventory.add(found);
        }
        for wal in inventory.timelines.values_mut() {
            wal.ranges = merged(std::mem::take(&mut wal.ranges));
        }
        Ok(inventory)
    }

    /// Returns the timelines whose history file is stored: one listing.
    pub async fn stored_histories(
        &self,
        system_id: SystemId,
    ) -> Result<BTreeSet<Timeline>, RepoError> {
        let root = Key::new(self.place().wal_dir(system_id));
        Ok(histories_among(&self.store().list_level(&root).await?.objects))
    }

    /// Lists a group; again if the first listing shows that pieces come and go, or a hole. A listing of
    /// several pages can miss both a piece and what replaced it, but what either listing shows was stored.
    async fn list_group(&self, group: Group<'_>) -> Result<Found, RepoError> {
        let mut found = self.list_group_once(group).await?;
        if found.has_loose_pieces || found.has_hole() {
            let before = std::mem::take(&mut found.stretches);
            found = self.list_group_once(group).await?;
            found.stretches.extend(before);
        }
        Ok(found)
    }

    async fn list_group_once(&self, group: Group<'_>) -> Result<Found, RepoError> {
        let Group { system_id, name, root, size } = group;
        let mut found = Found::default();
        let prefix = Key::new(self.place().wal_group_dir(system_id, name));
        let mut listing = self.store().list(&prefix);
        while let Some(object) = listing.try_next().await? {
            let tail = object.key.as_str().strip_prefix(root).and_then(|t| t.strip_prefix('/'));
            let Some(known) = tail.and_then(parse_wal_object) else {
                tracing::warn!("`{}` is not an object of Highwater; it is ignored", object.key);
                continue;
            };
            if let Some(segment) = known.segment() {
                let last = found.last_stored.entry(segment.timeline).or_insert(object.modified);
                *last = object.modified.max(*last);
            }
            found.add(known, object.size_bytes, size);
        }
        found.settle_pieces(size);
        Ok(found)
    }
}

/// A group of segments that is listed.
#[derive(Clone, Copy)]
struct Group<'a> {
    system_id: SystemId,
    name: &'a str,
    /// The directory of all groups.
    root: &'a str,
    size: SegmentSize,
}

fn histories_among(objects: &[Listed]) -> BTreeSet<Timeline> {
    let names = objects.iter().map(|object| WalFileName::parse(object.key.file_name()));
    let timelines = names.filter_map(|name| match name {
        Ok(WalFileName::History(timeline)) => Some(timeline),
        _ => None,
    });
    timelines.collect()
}

impl Found {
    fn add(&mut self, object: WalObject, stored_bytes: u64, size: SegmentSize) {
        let timeline = match object {
            WalObject::File(WalFileName::Segment(name)) => {
                if let Some(start) = name.start_lsn(size) {
                    let end = Lsn(start.0.saturating_add(size.bytes()));
                    self.stretches.push((name.timeline, start, end));
                }
                self.whole.insert(name);
                name.timeline
            }
            WalObject::File(WalFileName::Partial(name)) => {
                self.partials.push(name);
                name.timeline
            }
            WalObject::Damaged(name) => {
                self.damaged.push(name);
                name.timeline
            }
            WalObject::Piece { segment, start, end } => {
                let piece = ListedPiece { start, end, size_bytes: stored_bytes };
                self.has_loose_pieces |= !piece.is_unit();
                self.pieces.entry(segment).or_default().push(piece);
                segment.timeline
            }
            WalObject::File(_) => return,
        };
        *self.bytes.entry(timeline).or_default() += stored_bytes;
    }
}

impl Found {
    /// Returns whether the stretches of some timeline do not touch.
    fn has_hole(&self) -> bool {
        let merged = merged_by_timeline(self.stretches.clone());
        merged.windows(2).any(|pair| pair[0].0 == pair[1].0)
    }

    /// Turns the unbroken pieces at each segment's start into a stretch.
    fn settle_pieces(&mut self, size: SegmentSize) {
        for (segment, mut pieces) in std::mem::take(&mut self.pieces) {
            pieces.sort_unstable();
            let has_units = size.bytes() > WHOLE_SEGMENT_BYTES_MAX;
            if self.whole.contains(&segment) || (has_units && has_pieces_inside_units(&pieces)) {
                self.beside.push(segment);
            }
            let chain = unbroken_pieces(&pieces, 0);
            let end = chain.last().map(|piece| u64::from(piece.end));
            let (Some(start), Some(end)) = (segment.start_lsn(size), end) else { continue };
            let is_finished = self.whole.contains(&segment)
                || (has_units && chain.iter().all(|piece| piece.is_unit()));
            if end >= size.bytes() && !is_finished {
                self.unfinished.push(segment);
            }
            let end = Lsn(start.0.saturating_add(end.min(size.bytes())));
            self.stretches.push((segment.timeline, start, end));
        }
    }
}

/// Returns whether some piece of a large segment is not needed, since a unit stands for it.
fn has_pieces_inside_units(pieces: &[ListedPiece]) -> bool {
    let unit_of = |piece: &ListedPiece| piece.start / PIECE_BYTES;
    let units: BTreeSet<u32> = pieces.iter().filter(|piece| piece.is_unit()).map(unit_of).collect();
    pieces.iter().any(|piece| !piece.is_unit() && units.contains(&unit_of(piece)))
}

impl WalInventory {
    fn add(&mut self, found: Found) {
        for (timeline, start, end) in merged_by_timeline(found.stretches) {
            self.timelines.entry(timeline).or_default().ranges.push((start, end));
        }
        for name in found.partials {
            self.timelines.entry(name.timeline).or_default().partials.push(name);
        }
        for name in found.damaged {
            self.timelines.entry(name.timeline).or_default().damaged.push(name);
        }
        for name in found.unfinished {
            self.timelines.entry(name.timeline).or_default().unfinished.push(name);
        }
        for name in found.beside {
            self.timelines.entry(name.timeline).or_default().beside.push(name);
        }
        for (timeline, bytes) in found.bytes {
            self.timelines.entry(timeline).or_default().stored_bytes += bytes;
        }
        for (timeline, stored) in found.last_stored {
            let wal = self.timelines.entry(timeline).or_default();
            wal.last_stored = wal.last_stored.max(Some(stored));
        }
    }
}

fn merged_by_timeline(mut stretches: Vec<(Timeline, Lsn, Lsn)>) -> Vec<(Timeline, Lsn, Lsn)> {
    stretches.sort_unstable();
    let mut out: Vec<(Timeline, Lsn, Lsn)> = Vec::new();
    for (timeline, start, end) in stretches {
        match out.last_mut() {
            Some(last) if last.0 == timeline && start <= last.2 => last.2 = last.2.max(end),
            _ => out.push((timeline, start, end)),
        }
    }
    out
}

fn merged(ranges: Vec<(Lsn, Lsn)>) -> Vec<(Lsn, Lsn)> {
    let one = ranges.into_iter().map(|(start, end)| (Timeline::FIRST, start, end)).collect();
    merged_by_timeline(one).into_iter().map(|(_, start, end)| (start, end)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::store::faults::{Call, Fault, FaultStore, Symptom};
    use crate::store::memory::MemoryStore;

    const SYSTEM: SystemId = SystemId(7_710_829_501_534_534_359);

    /// One listing showed neither the last pieces of a segment nor the segment that had just
    /// replaced them: `info` told of a gap that never was.
    #[tokio::test]
    async fn a_segment_that_one_listing_missed_is_no_gap() {
        let size = SegmentSize::new(1 << 20).unwrap();
        let memory = MemoryStore::new();
        let faults = FaultStore::new(Arc::new(memory.clone()));
        let repository = Repository::new(Arc::new(faults.clone()), "main".parse().unwrap());
        let name = |number| SegmentName::new(Timeline(1), number, size);
        let whole = |number| {
            let file = WalObject::File(WalFileName::Segment(name(number)));
            repository.wal_key(SYSTEM, file).as_str().to_owned()
        };
        let missed = whole(3);
        for number in [2, 4] {
            memory.overwrite(&whole(number), "names alone count");
        }
        let piece = WalObject::Piece { segment: name(5), start: 0, end: 100 };
        memory.overwrite(repository.wal_key(SYSTEM, piece).as_str(), "names alone count");
        let store = memory.clone();
        let second = Fault::on(Call::List).nth(2).symptom(Symptom::Slow(Duration::ZERO));
        faults.inject(second.hook(move |_, _| store.overwrite(&missed, "names alone count")));
        let inventory = repository.wal_inventory(SYSTEM, size).await.unwrap();
        let expected = [(size.start_of(2), Lsn(size.start_of(5).0 + 100))];
        assert_eq!(inventory.timelines[&Timeline(1)].ranges, expected);
        assert_eq!(faults.count(Call::List), 2);
    }

    proptest::proptest! {
        /// Merging neither makes up nor loses a byte, whatever the order and overlap.
        #[test]
        fn merged_ranges_hold_the_same_bytes_ascending_and_apart(
            ranges in proptest::collection::vec((0u64..40, 1u64..9), 0..12),
        ) {
            let ranges: Vec<(Lsn, Lsn)> =
                ranges.iter().map(|(start, len)| (Lsn(*start), Lsn(start + len))).collect();
            let out = merged(ranges.clone());
            let holds = |ranges: &[(Lsn, Lsn)], byte: Lsn| {
                ranges.iter().any(|(start, end)| (*start..*end).contains(&byte))
            };
            for byte in (0..60).map(Lsn) {
                proptest::prop_assert_eq!(holds(&ranges, byte), holds(&out, byte));
            }
            proptest::prop_assert!(out.windows(2).all(|pair| pair[0].1 < pair[1].0), "{:?}", out);
        }
    }
}
