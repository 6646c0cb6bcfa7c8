//! Making a segment whole of the pieces that somebody left who died before it could.
//!
//! ```text
//! pieces reach the segment's end?  ->  read them, joined  ->  the object that is missing, checked and sealed as if it
//! had just been received  ->  created
//! ```
//!
//! May be done by several at a time, and while others read: what is created is what any of them would create. Never here:
//! which segments, and what becomes of the pieces. Where anything speaks against it they are just as good to read.

use std::io;

use super::wal_fetch::unbroken_pieces;
use super::{
    PIECE_BYTES, RepoError, Repository, SegmentAssembly, SegmentSource, Unsealed,
    WHOLE_SEGMENT_BYTES_MAX,
};
use crate::format::Codec;
use crate::pg::{SegmentName, SegmentSize, SystemId};

impl Repository {
    /// Stores what a segment lacks to be complete (its one object, or the units of one above 16 MiB) as far as its
    /// pieces hold it, durably. Returns how many objects were stored: none where it is complete already, or the pieces do
    /// not reach its end. The pieces stay. May be repeated.
    ///
    /// Memory: what [`Self::fetch_segment`] takes, and up to 16 MiB of compressed WAL.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] or [`RepoError::Sink`] where the pieces, joined, are not the segment;
    /// [`RepoError::Conflict`] where other content took the name meanwhile; the store's.
    pub async fn complete_segment(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
        codec: Codec,
    ) -> Result<u32, RepoError> {
        let mut stored = 0;
        for number in self.missing_units(system_id, segment, size).await? {
            let unit = self.unit_of_pieces(system_id, segment, size, codec, number).await?;
            let Some(unit) = unit else { return Ok(stored) };
            let failed =
                |cause| RepoError::Sink { key: self.segment_key(system_id, segment), cause };
            let unit = unit.seal().map_err(failed)?;
            self.put_sealed(&unit.key, &unit.sealed).await?;
            stored += 1;
        }
        Ok(stored)
    }

    /// Returns the numbers of the units that are not stored as one object each.
    async fn missing_units(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Vec<u32>, RepoError> {
        if size.bytes() > WHOLE_SEGMENT_BYTES_MAX {
            let pieces = self.pieces(system_id, segment).await?;
            let units = pieces.iter().filter(|piece| piece.is_unit());
            let stored: Vec<u32> = units.map(|unit| unit.start / PIECE_BYTES).collect();
            let all = 0..u32::from(size) / PIECE_BYTES;
            return Ok(all.filter(|number| !stored.contains(number)).collect());
        }
        match self.header(&self.segment_key(system_id, segment)).await {
            Ok(_) => Ok(Vec::new()),
            Err(error) if error.is_absent() => Ok(vec![0]),
            Err(error) => Err(error),
        }
    }

    /// Puts one unit together; `None` if the pieces do not reach the segment's end. Each unit takes a reading of all of
    /// them: it is the walk from the segment's first byte that proves them.
    async fn unit_of_pieces(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
        codec: Codec,
        wanted: u32,
    ) -> Result<Option<Unsealed>, RepoError> {
        let pieces = self.pieces(system_id, segment).await?;
        let end = unbroken_pieces(&pieces, 0).last().map_or(0, |piece| piece.end);
        if u64::from(end) < size.bytes() {
            return Ok(None);
        }
        let key = self.segment_key(system_id, segment);
        let failed = |cause| RepoError::Sink { key: key.clone(), cause };
        let begun = SegmentAssembly::begin(self, system_id, segment, size, codec, None, None);
        let mut assembly = begun.map_err(|error| failed(io::Error::other(error)))?;
        let (mut unit, mut number) = (None, 0);
        let fetched = self.fetch_segment(system_id, segment, size, |block| {
            assembly.push(block, &mut |_| {}).map_err(io::Error::other)?;
            for complete in assembly.take_units() {
                unit = if number == wanted { Some(complete) } else { unit.take() };
                number += 1;
            }
            Ok(())
        });
        let fetched = fetched.await?;
        // A complete object that came meanwhile is somebody else's: whether it is what the pieces hold is not known.
        let is_all = fetched.is_some_and(|source| source.is_all_of(size));
        if !is_all || fetched == Some(SegmentSource::Whole) {
            return Ok(None);
        }
        assembly.finish().map_err(|error| failed(io::Error::other(error)))?;
        Ok(unit)
    }
}
