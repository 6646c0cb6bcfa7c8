//! Segments that an earlier receiver had whole in pieces when it ended, and did not store complete or not tidy.

use super::source::Facts;
use crate::causes::in_one_line;
use crate::failure::Kind;
use crate::format::Codec;
use crate::ops::failures::kind_of_repo;
use crate::pg::{Lsn, SegmentName};
use crate::repo::{Repository, WalInventory};

/// How many segments are seen to at a start: as many as a receiver may have had in hand.
const SEGMENTS_MAX: usize = 32;

/// Stores complete what stands in pieces alone, and removes pieces that stand elsewhere too, of the newest segments that
/// end at or before `lsn`. Done before streaming begins, when there is room
/// for it in memory. Nothing depends on it: the pieces can be read as well, and what fails is tried at the next start.
pub(super) async fn finish(
    repository: &Repository,
    facts: &Facts,
    inventory: &WalInventory,
    lsn: Lsn,
    codec: Codec,
) {
    let size = facts.segment_size;
    let is_before = |segment: &SegmentName| {
        segment.start_lsn(size).is_some_and(|start| start.0.saturating_add(size.bytes()) <= lsn.0)
    };
    let timelines = inventory.timelines.values().rev();
    let untidy = timelines.flat_map(|wal| wal.untidy.iter().rev().copied()).filter(is_before);
    for segment in untidy.take(SEGMENTS_MAX) {
        match repository.complete_segment(facts.system_id, segment, size, codec).await {
            Ok(0) => tracing::debug!("pieces of {segment} that stand elsewhere too were removed"),
            Ok(_) => {
                tracing::info!("stored {segment} complete, of the pieces that were left of it");
            }
            // A store that keeps objects: retention sees to them, here and in all that are left.
            Err(error) if error.is_not_allowed() => break,
            Err(error) => {
                tracing::warn!(
                    "{segment} is stored, and pieces of it are left that should be one object; they are as good to read, and it is tried again at the next start: {}",
                    in_one_line(&error)
                );
                if kind_of_repo(&error) == Kind::Store {
                    break;
                }
            }
        }
    }
}
