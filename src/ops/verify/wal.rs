//! Looking at every object of WAL, group by group.

use futures_util::TryStreamExt;
use std::collections::{BTreeMap, BTreeSet};

use super::Verifying;
use super::crew::{Job, Subject};
use super::findings::{About, Fault, Raw};
use crate::failure::Failure;
use crate::format::{Depth, WalObject, parse_wal_object};
use crate::pg::{Lsn, SegmentName, SegmentSize, SystemId, WalFileName};
use crate::plan::window::Hole;
use crate::repo::{Comparison, RepoError, Rival, WalGroup};
use crate::store::{Key, Listed};

/// The pieces of one segment in a listing, and whether the whole segment stands beside them.
#[derive(Default)]
struct Pieced {
    pieces: Vec<(u32, u32)>,
    is_whole: bool,
}

/// A segment whose pieces do not join, when they were listed first.
#[derive(Debug, Clone, Copy)]
pub(super) struct Torn {
    system_id: SystemId,
    size: SegmentSize,
    segment: SegmentName,
}

/// Returns the first stretch that is missing before the last of these pieces, which are sorted.
fn hole_in(pieces: &[(u32, u32)]) -> Option<(u32, u32)> {
    let mut at = 0;
    for (start, end) in pieces {
        if *start > at {
            return Some((at, *start));
        }
        at = at.max(*end);
    }
    None
}

impl Verifying<'_> {
    /// Lists the pieces once more of segments whose pieces did not join: some may have been on their way, or going.
    pub(super) async fn look_at_torn_again(&mut self) -> Result<Vec<Raw>, Failure> {
        let mut found = Vec::new();
        for Torn { system_id, size, segment } in std::mem::take(&mut self.torn) {
            let place = self.repository.place();
            let whole = WalObject::File(WalFileName::Segment(segment));
            let whole = self.repository.header(&self.repository.wal_key(system_id, whole)).await;
            match whole {
                Err(error) if error.is_absent() => {}
                Ok(_) => continue,
                Err(error) if error.is_damage() => continue,
                Err(error) => return Err(self.failed(error, "list WAL")),
            }
            let directory = Key::new(place.pieces_dir(system_id, segment));
            let level = self.repository.store().list_level(&directory).await;
            let level = level.map_err(|error| self.failed(error.into(), "list WAL"))?;
            let root = format!("{}/", place.wal_dir(system_id));
            let piece =
                |listed: &Listed| match parse_wal_object(listed.key.as_str().strip_prefix(&root)?)?
                {
                    WalObject::Piece { start, end, .. } => Some((start, end)),
                    _ => None,
                };
            let mut pieces: Vec<(u32, u32)> = level.objects.iter().filter_map(piece).collect();
            pieces.sort_unstable();
            let Some((start, end)) = hole_in(&pieces) else { continue };
            let Some(first) = segment.start_lsn(size) else { continue };
            let at = |offset: u32| Lsn(first.0.saturating_add(u64::from(offset)));
            let hole = Hole { timeline: segment.timeline, start_lsn: at(start), end_lsn: at(end) };
            let is_needed = self.incarnation(system_id).is_some_and(|one| {
                one.backups.iter().any(|backup| backup.start_lsn <= hole.start_lsn)
            });
            if is_needed {
                let about = About::Hole(system_id, hole);
                found.push(Raw { about, fault: Fault::Gap, why: String::new() });
            }
        }
        Ok(found)
    }

    /// Looks at all WAL of one incarnation.
    pub(super) async fn look_at_wal(
        &mut self,
        system_id: SystemId,
        size: SegmentSize,
    ) -> Result<(), Failure> {
        let root = Key::new(self.repository.place().wal_dir(system_id));
        let level = self.repository.store().list_level(&root).await;
        let level = level.map_err(|error| self.failed(error.into(), "list WAL"))?;
        for listed in &level.objects {
            self.look_at_wal_object(system_id, size, &root, listed).await?;
        }
        let groups = self.repository.wal_groups(system_id).await;
        for group in groups.map_err(|error| self.failed(error, "list WAL"))? {
            self.progress
                .note(&format!("WAL of timeline {}, {:X}/00000000", group.timeline, group.log));
            self.look_at_group(system_id, size, &root, &group).await?;
        }
        self.settle_all().await
    }

    async fn look_at_group(
        &mut self,
        system_id: SystemId,
        size: SegmentSize,
        root: &Key,
        group: &WalGroup,
    ) -> Result<(), Failure> {
        let name = format!("{:08X}{:08X}", group.timeline.0, group.log);
        let prefix = Key::new(self.repository.place().wal_group_dir(system_id, &name));
        let mut pieced: BTreeMap<SegmentName, Pieced> = BTreeMap::new();
        let mut whole: BTreeSet<SegmentName> = BTreeSet::new();
        // Read to its end before anything is proven, which may take longer than a listing lives.
        let listing = self.repository.store().list(&prefix).try_collect::<Vec<Listed>>().await;
        let mut objects = listing.map_err(|error| self.failed(error.into(), "list WAL"))?;
        objects.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        for listed in objects {
            match self.look_at_wal_object(system_id, size, root, &listed).await? {
                Some(WalObject::File(WalFileName::Segment(segment))) => {
                    whole.insert(segment);
                }
                Some(WalObject::Piece { segment, start, end }) => {
                    pieced.entry(segment).or_default().pieces.push((start, end));
                }
                _ => {}
            }
        }
        for (segment, mut pieced) in pieced {
            pieced.is_whole = whole.contains(&segment);
            self.look_at_pieces(system_id, size, segment, pieced).await?;
        }
        Ok(())
    }

    /// Looks at one object; returns what it is.
    async fn look_at_wal_object(
        &mut self,
        system_id: SystemId,
        size: SegmentSize,
        root: &Key,
        listed: &Listed,
    ) -> Result<Option<WalObject>, Failure> {
        let tail = listed.key.as_str().strip_prefix(root.as_str());
        let tail = tail.and_then(|tail| tail.strip_prefix('/'));
        let Some(object) = tail.and_then(parse_wal_object) else {
            self.stray(&listed.key);
            return Ok(None);
        };
        if let WalObject::Damaged(segment) = object {
            let about = About::Accepted(system_id, segment, listed.key.clone());
            self.raw.push(Raw { about, fault: Fault::Accepted, why: String::new() });
        }
        self.prove(Job::of(Subject::Wal { system_id, size, object }, listed)).await?;
        Ok(Some(object))
    }

    /// Joined pieces must be valid WAL, which each alone does not show.
    async fn look_at_pieces(
        &mut self,
        system_id: SystemId,
        size: SegmentSize,
        segment: SegmentName,
        mut pieced: Pieced,
    ) -> Result<(), Failure> {
        let unit = crate::repo::PIECE_BYTES;
        let is_unit =
            |piece: &(u32, u32)| piece.0.is_multiple_of(unit) && piece.1 - piece.0 == unit;
        if pieced.is_whole {
            self.redundant_pieces += pieced.pieces.len() as u64;
            return self.compare_with_complete(system_id, size, segment).await;
        }
        pieced.pieces.sort_unstable();
        if hole_in(&pieced.pieces).is_some() {
            self.torn.push(Torn { system_id, size, segment });
            return Ok(());
        }
        // All units of a large segment were walked together when they were stored.
        let units = pieced.pieces.iter().filter(|piece| is_unit(piece)).count();
        if units > 0 && units < pieced.pieces.len() {
            self.compare_with_complete(system_id, size, segment).await?;
        }
        let is_all_units = units as u64 * u64::from(unit) == size.bytes();
        if self.request.depth != Depth::Whole || is_all_units {
            return Ok(());
        }
        self.settle_all().await?;
        if self.is_faulty(segment) {
            return Ok(());
        }
        match self.repository.stored_prefix(system_id, segment, size).await {
            Ok(_) => Ok(()),
            Err(error) => self.wrong_pieces(system_id, segment, size, error),
        }
    }

    /// Pieces inside a complete segment, or inside the unit of a large one, hold the same WAL, or two servers wrote under one name.
    async fn compare_with_complete(
        &mut self,
        system_id: SystemId,
        size: SegmentSize,
        segment: SegmentName,
    ) -> Result<(), Failure> {
        if self.request.depth != Depth::Whole {
            return Ok(());
        }
        self.settle_all().await?;
        if self.is_faulty(segment) {
            return Ok(());
        }
        match self.repository.compare_pieces(system_id, segment, size).await {
            Ok(Comparison { rival: None, .. }) => Ok(()),
            Ok(Comparison { rival: Some(Rival { piece, complete }), .. }) => {
                let why = format!(
                    "it holds other WAL than `{complete}`: two servers wrote under this name"
                );
                let about = About::Rival(system_id, segment, piece);
                self.raw.push(Raw { about, fault: Fault::Differs, why });
                Ok(())
            }
            Err(error) => self.wrong_pieces(system_id, segment, size, error),
        }
    }

    /// Whether something was found of this segment's objects.
    fn is_faulty(&self, segment: SegmentName) -> bool {
        let is_of = |raw: &Raw| matches!(&raw.about, About::Wal(_, object, _) if object.segment() == Some(segment));
        self.raw.iter().any(is_of)
    }

    fn wrong_pieces(
        &mut self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
        error: RepoError,
    ) -> Result<(), Failure> {
        let (fault, why) = Fault::of(error).map_err(|e| self.failed(e, "read pieces of WAL"))?;
        // They went away while they were read, and the whole segment stands in their place.
        if fault != Fault::Missing {
            let object = WalObject::Piece { segment, start: 0, end: u32::from(size) };
            let key = Key::new(self.repository.place().pieces_dir(system_id, segment));
            let about = About::Wal(system_id, object, key);
            self.raw.push(Raw { about, fault, why });
        }
        Ok(())
    }
}
