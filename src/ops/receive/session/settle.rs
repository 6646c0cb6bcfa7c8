//! What becomes of an object that is stored: what may be acknowledged then, and what can be joined or removed.

use super::Session;
use crate::failure::Failure;
use crate::ops::receive::troubles::no_memory;
use crate::ops::receive::uploads::{Purpose, Settled, Stored};
use crate::pg::Lsn;
use crate::repo::PIECE_BYTES;

/// How many of the newest segments that were tidied are remembered.
const COMPLETED_MAX: usize = 64;

impl Session<'_> {
    /// Takes note of what has ended; returns whether the store has taken something.
    pub(super) fn settle(&mut self, settled: Settled) -> bool {
        let stored = match settled {
            Settled::Stored(stored) => stored,
            Settled::Sealed(piece) => {
                if let Some(assembly) = &mut self.assembly {
                    assembly.adopt(&piece);
                }
                return false;
            }
            Settled::Tidied(segment) => {
                self.completed.extend(segment);
                if self.completed.len() > COMPLETED_MAX {
                    self.completed.pop_first();
                }
                return false;
            }
        };
        self.report.stored_bytes += stored.object_bytes;
        match stored.purpose {
            Purpose::Piece => {
                self.report.pieces += 1;
                if self.doubtful != Some(stored.segment) {
                    self.progress.store(stored.start_lsn, stored.end_lsn);
                }
                if let Some((start, end)) = self.offsets_in_unit(&stored) {
                    self.merges.store(start, end);
                }
            }
            Purpose::Unit => {
                self.report.segments += 1;
                self.progress.store(stored.start_lsn, stored.end_lsn);
                if self.uploads.take_pieced(stored.segment) {
                    self.untidy.insert(stored.segment, None);
                }
            }
            Purpose::Merge(merge) => {
                self.report.pieces += 1;
                if self.offsets_in_unit(&stored).is_some() {
                    self.merges.merged(merge);
                }
            }
        }
        let flush_lsn = self.progress.flush_lsn();
        self.pace.acknowledged(flush_lsn, self.began.elapsed());
        true
    }

    /// Returns where a stored piece lies in the segment in the making, if in its current unit.
    fn offsets_in_unit(&self, stored: &Stored) -> Option<(u32, u32)> {
        let assembly = self.assembly.as_ref()?;
        let offset = |lsn: Lsn| {
            let offset = lsn.0.checked_sub(assembly.start_lsn().0)?;
            u32::try_from(offset).ok()
        };
        let (start, end) = (offset(stored.start_lsn)?, offset(stored.end_lsn)?);
        let same_unit = start / PIECE_BYTES == assembly.position() / PIECE_BYTES;
        (assembly.segment() == stored.segment && same_unit).then_some((start, end))
    }

    /// Starts what makes reading back cheap, one thing at a time: joining small
    /// pieces, and removing those that stand in a complete segment.
    pub(super) fn merge_or_tidy(&mut self) -> Result<(), Failure> {
        if self.uploads.is_tidying() {
            return Ok(());
        }
        if let Some(assembly) = &mut self.assembly
            && let Some(merge) = self.merges.next_merge()
        {
            let pieces = assembly.to_merge(merge.start, merge.end).map_err(no_memory)?;
            self.uploads.put_merge(assembly.segment(), merge, pieces);
            return Ok(());
        }
        let uploads = &self.uploads;
        let ready = self.untidy.keys().find(|segment| !uploads.has_piece_of(**segment)).copied();
        if let Some(segment) = ready {
            let only = self.untidy.remove(&segment).flatten();
            self.uploads.tidy(segment, only);
        }
        Ok(())
    }
}
