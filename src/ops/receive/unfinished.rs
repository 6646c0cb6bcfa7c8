//! What an earlier receiver left when it ended: segments that it had whole in pieces and did not store complete, and pieces
//! beside complete ones, which it did not remove.

use std::collections::BTreeSet;

use super::UNHARMED;
use super::source::Facts;
use crate::causes::in_one_line;
use crate::failure::{Failure, Kind};
use crate::format::Codec;
use crate::ops::failures::{kind_of_repo, of_repo};
use crate::pg::{Lsn, SegmentName, SegmentSize};
use crate::repo::{Repository, Rival, TimelineWal, WalInventory};

/// How many segments are seen to at a start, at most: as many as a receiver may have had in hand.
const SEGMENTS_MAX: u64 = 32;

/// How much WAL is read to compare pieces, about.
const COMPARED_BYTES: u64 = 64 << 20;

/// Compares pieces that stand beside complete segments, of the newest ones that end at or before `lsn`, and returns those
/// whose pieces are not needed. `known` are not compared again; what was compared joins them.
///
/// Who stored the complete one is not known: a server's `archive_command`, it may be, and another's than that whose
/// commits were acknowledged when the pieces were stored. A receiver compares what it completes itself; these it did not
/// see to their end.
///
/// # Errors
/// Of pieces that hold other WAL. The store's, which a retry can cure.
pub(super) async fn compare(
    repository: &Repository,
    facts: &Facts,
    inventory: &WalInventory,
    lsn: Lsn,
    known: &mut BTreeSet<SegmentName>,
) -> Result<Vec<SegmentName>, Failure> {
    let size = facts.segment_size;
    let most = (COMPARED_BYTES / size.bytes()).clamp(1, SEGMENTS_MAX);
    let mut same = Vec::new();
    for segment in newest(inventory, |wal| &wal.beside, size, lsn, most) {
        if known.contains(&segment) {
            continue;
        }
        match repository.compare_pieces(facts.system_id, segment, size).await {
            Ok(None) => same.push(segment),
            Ok(Some(rival)) => return Err(other_server(segment, &rival)),
            Err(error) if kind_of_repo(&error) == Kind::Store => {
                return Err(of_repo(error, "could not read stored WAL", UNHARMED));
            }
            // What cannot be read must not keep new WAL from being stored.
            Err(error) => tracing::error!(
                "whether the pieces of {segment} are what is stored complete under this name could not be told: {}",
                in_one_line(&error)
            ),
        }
        known.insert(segment);
    }
    Ok(same)
}

/// Pieces were acknowledged that readers do not look at, since another server's object stands for the segment.
fn other_server(segment: SegmentName, Rival { piece, complete }: &Rival) -> Failure {
    Failure::new(
        Kind::Conflict,
        format!("`{piece}`, which a receiver stored, holds other WAL than `{complete}`"),
        format!(
            "Both are in the repository. Readers prefer `{complete}`: what was acknowledged of segment {segment} in pieces comes back only when that is moved away."
        ),
        format!(
            "Two servers have written under this name: most often a copy of this cluster was started with archiving on. If this server is the real one, move `{complete}` away and start `highwater receive` again; if the pieces are the copy's, move them away instead. Then take a base backup. Give the copy a cluster name of its own."
        ),
    )
}

/// Returns the newest segments of a kind that end at or before `lsn`.
fn newest<'a>(
    inventory: &'a WalInventory,
    kind: impl Fn(&'a TimelineWal) -> &'a Vec<SegmentName>,
    size: SegmentSize,
    lsn: Lsn,
    most: u64,
) -> Vec<SegmentName> {
    let is_before = |segment: &SegmentName| {
        segment.start_lsn(size).is_some_and(|start| start.0.saturating_add(size.bytes()) <= lsn.0)
    };
    let timelines = inventory.timelines.values().rev();
    let all = timelines.flat_map(|wal| kind(wal).iter().rev().copied());
    all.filter(is_before).take(usize::try_from(most).unwrap_or(usize::MAX)).collect()
}

/// Stores complete what stands in pieces alone, of the newest segments that end at or before `lsn`, and returns those
/// whose pieces may be removed now: what stands for them was made of them.
///
/// Of a segment whose complete object was there before, the pieces stay where they are, unless [`compare`] knows them.
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
    let mut finished = Vec::new();
    for segment in newest(inventory, |wal| &wal.unfinished, size, lsn, SEGMENTS_MAX) {
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
