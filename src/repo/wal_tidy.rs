//! Deleting pieces that something larger stands for.
//!
//! The rule: what is deleted lies inside an object whose header was read back by the very
//! same call. Readers rely on that order (`wal_fetch`). It holds the same: the caller has stored both, or they were compared. The larger object is a merged piece, a unit (16 MiB
//! of a segment above that size) or the whole segment; nothing here decides when, and nothing else is ever deleted here.

use std::collections::BTreeSet;

use super::wal_compare::{Comparison, Rival};
use super::{RepoError, Repository, WHOLE_SEGMENT_BYTES_MAX};
use crate::format::{Header, Kind, WalObject};
use crate::pg::{SegmentName, SegmentSize, SystemId};
use crate::store::Key;

/// A stretch of a segment as byte offsets, the end excluded.
type Stretch = (u32, u32);

/// What became of the pieces of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tidied {
    /// How many were deleted.
    pub dropped: u64,
    /// One that holds other WAL than the larger object in which it lies: it stays, and those beside it.
    pub rival: Option<Rival>,
}

impl Repository {
    /// Deletes the pieces of a segment that lie in its complete object, or, of a segment above 16 MiB, in one of
    /// its units, and hold the same. Does nothing where no such object is stored, and may be repeated.
    ///
    /// `own` are pieces of which the caller knows that they hold the same: it stored them, and what they lie in. Any other
    /// is somebody else's, and compared first ([`Self::compare_pieces`]).
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
        own: &BTreeSet<Stretch>,
    ) -> Result<Tidied, RepoError> {
        let larger = self.larger(system_id, segment, size).await?;
        let pieces = self.pieces(system_id, segment).await?;
        let stretches = pieces.into_iter().map(|piece| (piece.start, piece.end));
        let (ours, others): (Vec<Stretch>, Vec<Stretch>) =
            stretches.filter(|at| larger.holds(*at)).partition(|at| own.contains(at));
        let mut dropped = self.drop_pieces(system_id, segment, ours).await?;
        if others.is_empty() {
            return Ok(Tidied { dropped, rival: None });
        }
        let Comparison { rival, same } = self.compare_pieces(system_id, segment, size).await?;
        dropped += self.drop_same_pieces(system_id, segment, size, &same).await?;
        Ok(Tidied { dropped, rival })
    }

    /// As [`Self::drop_redundant_pieces`], but only those of `same`, which were compared: see [`Self::compare_pieces`].
    /// Returns how many were deleted.
    ///
    /// # Errors
    /// As [`Self::drop_redundant_pieces`].
    pub async fn drop_same_pieces(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
        same: &BTreeSet<Stretch>,
    ) -> Result<u64, RepoError> {
        if same.is_empty() {
            return Ok(0);
        }
        let larger = self.larger(system_id, segment, size).await?;
        let redundant = same.iter().copied().filter(|at| larger.holds(*at));
        self.drop_pieces(system_id, segment, redundant).await
    }

    /// Looks up what pieces may lie in, and reads back its header.
    async fn larger(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Larger, RepoError> {
        if size.bytes() > WHOLE_SEGMENT_BYTES_MAX {
            let pieces = self.pieces(system_id, segment).await?;
            let units = pieces.into_iter().filter(|piece| piece.is_unit());
            let units: Vec<Stretch> = units.map(|unit| (unit.start, unit.end)).collect();
            for unit in &units {
                self.believe_piece(system_id, segment, *unit).await?;
            }
            return Ok(Larger::Units(units));
        }
        let key = self.segment_key(system_id, segment);
        match self.header(&key).await {
            Ok(header) => believe(&key, &header, Kind::Segment, system_id, size.bytes())?,
            Err(error) if error.is_absent() => return Ok(Larger::Units(Vec::new())),
            Err(error) => return Err(error),
        }
        Ok(Larger::Whole { bytes: u32::from(size) })
    }

    /// Deletes those of `own`, pieces of the caller, that lie in the piece from `start` to `end` (excluded), which was made
    /// of them, but not that one; returns how many.
    ///
    /// # Errors
    /// As [`Self::drop_redundant_pieces`]; also if that piece is not there.
    pub async fn drop_pieces_inside(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        merged: Stretch,
        own: BTreeSet<Stretch>,
    ) -> Result<u64, RepoError> {
        self.believe_piece(system_id, segment, merged).await?;
        let inside = own.into_iter().filter(|own| is_inside(&[merged], *own));
        self.drop_pieces(system_id, segment, inside).await
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
        pieces: impl IntoIterator<Item = Stretch>,
    ) -> Result<u64, RepoError> {
        let mut deleted = 0;
        // One at a time, and without a flush of the disk for each: nobody waits for this, but commits may be
        // waiting for the pieces that are stored beside it.
        for (start, end) in pieces {
            let key = self.wal_key(system_id, WalObject::Piece { segment, start, end });
            self.store().discard(&key).await?;
            deleted += 1;
        }
        Ok(deleted)
    }
}

/// What pieces may lie in.
enum Larger {
    /// The complete segment, of that length.
    Whole { bytes: u32 },
    /// Pieces themselves; none, if nothing is stored.
    Units(Vec<Stretch>),
}

impl Larger {
    fn holds(&self, piece: Stretch) -> bool {
        match self {
            Self::Whole { bytes } => piece.1 <= *bytes,
            Self::Units(units) => is_inside(units, piece),
        }
    }
}

/// Returns whether a piece lies in one of `larger`, but is none of them.
fn is_inside(larger: &[Stretch], piece: Stretch) -> bool {
    let is_around = |&(start, end): &Stretch| start <= piece.0 && piece.1 <= end;
    !larger.contains(&piece) && larger.iter().any(is_around)
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
