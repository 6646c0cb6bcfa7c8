//! Whether pieces of a segment are what its complete object says, which readers prefer.
//!
//! Pieces outlive the complete object for a moment, or for as long as nobody removes them; then they hold the same bytes.
//! Where they do not, two servers have written under one name, and what was acknowledged may stand in either.

use super::{RepoError, Repository};
use crate::format::WalObject;
use crate::pg::{SegmentName, SegmentSize, SystemId};
use crate::store::Key;

impl Repository {
    /// Reads the complete object of a segment and the pieces beside it, and compares them. What goes away meanwhile is
    /// passed over. Holds the plain bytes of the segment and of one piece: for segments that have a complete object, up to
    /// 16 MiB of each.
    ///
    /// Returns the first piece that holds other bytes.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] of what cannot be believed; the store's.
    pub async fn compare_pieces(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Option<Key>, RepoError> {
        let whole = self.segment_key(system_id, segment);
        let mut bytes = Vec::new();
        let fetched = self.fetch(&whole, |block| {
            bytes.extend_from_slice(block);
            Ok(())
        });
        match fetched.await {
            Ok(_) => {}
            Err(error) if error.is_absent() => return Ok(None),
            Err(error) => return Err(error),
        }
        for piece in self.pieces(system_id, segment).await? {
            let (start, end) = (piece.start, piece.end.min(u32::from(size)));
            let key = self.wal_key(system_id, WalObject::Piece { segment, start, end: piece.end });
            let wanted = bytes.get(start as usize..end as usize).unwrap_or_default();
            let (mut at, mut is_same) = (0, true);
            let compared = self.fetch(&key, |block| {
                is_same &= wanted.get(at..at + block.len()) == Some(block);
                at += block.len();
                Ok(())
            });
            match compared.await {
                Ok(_) if is_same && at == wanted.len() => {}
                Ok(_) => return Ok(Some(key)),
                Err(error) if error.is_absent() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}
