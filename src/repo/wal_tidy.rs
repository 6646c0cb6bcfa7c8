//! Deleting pieces that something larger stands for.
//!
//! The rule: what is deleted lies inside an object whose header was read back by the very
//! same call. Readers rely on that order (`wal_fetch`). The larger object is a merged piece, a unit (16 MiB
//! of a segment above that size) or the whole segment; nothing here decides when, and nothing else is ever deleted here.

use std::collections::BTreeSet;

use super::wal_fetch::ListedPiece;
use super::{RepoError, Repository, WHOLE_SEGMENT_BYTES_MAX};
use crate::format::{Header, Kind, WalObject};
use crate::pg::{SegmentName, SegmentSize, SystemId};
use crate::store::Key;

/// A stretch of a segment as byte offsets, the end excluded.
type Stretch = (u32, u32);

impl Repository {
    /// Deletes the pieces of a segment that lie in its complete object, or, of a segment above 16 MiB, in one of
    /// its units; returns how many. Does nothing where no such object is stored, and may be repeated.
    ///
    /// # Errors
    /// [`RepoError::is_not_allowed`] where the store keeps objects: redundant pieces harm nobody, and
    /// retention deletes them with the segment. [`RepoError::Damaged`] if the larger object
    /// cannot be believed: then nothing was deleted on its account.
    pub async fn drop_redundant_pieces(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<u64, RepoError> {
        self.drop_redundant(system_id, segment, size, |_| true).await
    }

    /// As [`Self::drop_redundant_pieces`], but only those of `same`, which were compared: see [`Self::compare_pieces`].
    ///
    /// # Errors
    /// As [`Self::drop_redundant_pieces`].
    pub async fn drop_same_pieces(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
        same: &BTreeSet<(u32, u32)>,
    ) -> Result<u64, RepoError> {
        if same.is_empty() {
            return Ok(0);
        }
        self.drop_redundant(system_id, segment, size, |at| same.contains(&at)).await
    }

    async fn drop_redundant(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
        is_wanted: impl Fn(Stretch) -> bool,
    ) -> Result<u64, RepoError> {
        if size.bytes() > WHOLE_SEGMENT_BYTES_MAX {
            let pieces = self.pieces(system_id, segment).await?;
            let units = pieces.into_iter().filter(|piece| piece.is_unit());
            let units: Vec<Stretch> = units.map(|unit| (unit.start, unit.end)).collect();
            for unit in &units {
                self.believe_piece(system_id, segment, *unit).await?;
            }
            let is_redundant = |piece: &ListedPiece| {
                is_inside(&units, piece) && is_wanted((piece.start, piece.end))
            };
            return self.drop_pieces(system_id, segment, is_redundant).await;
        }
        let key = self.segment_key(system_id, segment);
        match self.header(&key).await {
            Ok(header) => believe(&key, &header, Kind::Segment, system_id, size.bytes())?,
            Err(error) if error.is_absent() => return Ok(0),
            Err(error) => return Err(error),
        }
        let size_bytes = u32::from(size);
        let is_redundant =
            |piece: &ListedPiece| piece.end <= size_bytes && is_wanted((piece.start, piece.end));
        self.drop_pieces(system_id, segment, is_redundant).await
    }

    /// Deletes the pieces that lie in the piece from `start` to `end` (excluded), but not that one; returns how many.
    ///
    /// # Errors
    /// As [`Self::drop_redundant_pieces`]; also if that piece is not there.
    pub async fn drop_pieces_inside(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        start: u32,
        end: u32,
    ) -> Result<u64, RepoError> {
        self.believe_piece(system_id, segment, (start, end)).await?;
        self.drop_pieces(system_id, segment, |piece| is_inside(&[(start, end)], piece)).await
    }

    async fn believe_piece(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        (start, end): Stretch,
    ) -> Result<(), RepoError> {
        let key = self.wal_key(system_id, WalObject::Piece { segment, start, end });
        let header = self.header(&key).await?;
        believe(&key, &header, Kind::Piece, system_id, u64::from(end.saturating_sub(start)))
    }

    async fn drop_pieces(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        is_redundant: impl Fn(&ListedPiece) -> bool,
    ) -> Result<u64, RepoError> {
        let pieces = self.pieces(system_id, segment).await?;
        let mut deleted = 0;
        // One at a time, and without a flush of the disk for each: nobody waits for this, but commits may be
        // waiting for the pieces that are stored beside it.
        for ListedPiece { start, end, .. } in pieces.into_iter().filter(is_redundant) {
            let key = self.wal_key(system_id, WalObject::Piece { segment, start, end });
            self.store().discard(&key).await?;
            deleted += 1;
        }
        Ok(deleted)
    }
}

/// Returns whether a piece lies in one of `larger`, but is none of them.
fn is_inside(larger: &[Stretch], piece: &ListedPiece) -> bool {
    let is_around = |&(start, end): &Stretch| start <= piece.start && piece.end <= end;
    !larger.contains(&(piece.start, piece.end)) && larger.iter().any(is_around)
}

/// Checks that an object is what its name says, beyond that it bears it.
pub(super) fn believe(
    key: &Key,
    header: &Header,
    kind: Kind,
    system_id: SystemId,
    plain_bytes: u64,
) -> Result<(), RepoError> {
    let is_right = header.kind == kind
        && header.system_identifier == system_id
        && header.plain_bytes == plain_bytes
        && header.blake3.is_some();
    let wrong = || RepoError::damaged(key, "its header does not say what its name says");
    is_right.then_some(()).ok_or_else(wrong)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
