//! Segments that an earlier receiver had whole in pieces when it ended, and did not store complete.

use super::source::Facts;
use crate::causes::in_one_line;
use crate::failure::Kind;
use crate::format::Codec;
use crate::ops::failures::kind_of_repo;
use crate::pg::{Lsn, SegmentName};
use crate::repo::{Repository, WalInventory};

/// How many segments are seen to at a start: as many as a receiver may have had in hand.
const SEGMENTS_MAX: usize = 32;

/// Stores complete what stands in pieces alone, of the newest segments that end at or before `lsn`, and returns those
/// whose pieces may be removed now: what stands for them was made of them.
///
/// Of a segment whose complete object was there before, the pieces stay where they are: who stored it is not known, and
/// if it is not what they hold, they are what was acknowledged.
///
/// Done before streaming begins, when there is room for it in memory. What fails is tried at the next start: pieces can
/// be read as well.
pub(super) async fn finish(
    repository: &Repository,
    facts: &Facts,
    inventory: &WalInventory,
    lsn: Lsn,
    codec: Codec,
) -> Vec<SegmentName> {
    let size = facts.segment_size;
    let is_before = |segment: &SegmentName| {
        segment.start_lsn(size).is_some_and(|start| start.0.saturating_add(size.bytes()) <= lsn.0)
    };
    let timelines = inventory.timelines.values().rev();
    let unfinished = timelines.flat_map(|wal| wal.unfinished.iter().rev().copied());
    let mut finished = Vec::new();
    for segment in unfinished.filter(is_before).take(SEGMENTS_MAX) {
        match repository.complete_segment(facts.system_id, segment, size, codec).await {
            Ok(0) => {}
            Ok(_) => {
                tracing::info!("stored {segment} complete, of the pieces that were left of it");
                finished.push(segment);
            }
            Err(error) => {
                tracing::warn!(
                    "{segment} is stored in pieces, which are as good to read, and could not be stored complete; it is tried again at the next start: {}",
                    in_one_line(&error)
                );
                if kind_of_repo(&error) == Kind::Store {
                    break;
                }
            }
        }
    }
    finished
}
