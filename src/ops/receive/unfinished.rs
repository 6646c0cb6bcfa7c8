//! What an earlier receiver left when it ended: segments that it had whole in pieces and did not store complete, and pieces
//! beside complete ones, which it did not remove.

use std::collections::{BTreeMap, BTreeSet};

use super::UNHARMED;
use super::source::Facts;
use crate::causes::in_one_line;
use crate::failure::{Failure, Kind};
use crate::format::Codec;
use crate::ops::failures::{kind_of_repo, of_repo};
use crate::pg::{Lsn, SegmentName, TimelineHistory};
use crate::repo::{Comparison, Repository, Rival, TimelineWal, WalInventory};

/// How many segments are seen to at a start, at most: as many as a receiver may have had in hand.
const SEGMENTS_MAX: u64 = 32;

/// How much WAL is read to compare pieces, about.
const COMPARED_BYTES: u64 = 64 << 20;

/// Pieces that are not needed any more, by their offsets: they were compared with the complete segment that stands there.
pub(super) type Left = BTreeMap<SegmentName, BTreeSet<(u32, u32)>>;

/// What stands before the place where streaming will begin.
#[derive(Clone, Copy)]
pub(super) struct Before<'a> {
    pub(super) facts: &'a Facts,
    pub(super) history: &'a TimelineHistory,
    pub(super) inventory: &'a WalInventory,
    pub(super) lsn: Lsn,
}

impl Before<'_> {
    /// Compares pieces that stand beside complete segments, the newest ones, and returns those that hold the same.
    /// `known` are not compared again; what was compared joins them.
    ///
    /// Who stored the complete one is not known: a server's `archive_command`, it may be, and another's than that whose
    /// commits were acknowledged when the pieces were stored. A receiver compares what it completes itself; these it did
    /// not see to their end.
    ///
    /// # Errors
    /// Of pieces on the server's way that hold other WAL. The store's, which a retry can cure.
    pub(super) async fn compare(
        self,
        repository: &Repository,
        known: &mut BTreeSet<SegmentName>,
    ) -> Result<Left, Failure> {
        let Self { facts, history, .. } = self;
        let size = facts.segment_size;
        let most = (COMPARED_BYTES / size.bytes()).clamp(1, SEGMENTS_MAX);
        let mut left = Left::new();
        for segment in self.newest(|wal| &wal.beside, |one| !known.contains(one), most) {
            match repository.compare_pieces(facts.system_id, segment, size).await {
                Ok(Comparison { rival: None, same }) => drop(left.insert(segment, same)),
                Ok(Comparison { rival: Some(rival), .. }) => {
                    let failure = other_server(segment, &rival);
                    let start = segment.start_lsn(size);
                    if start.is_some_and(|start| history.owner_of(start) == segment.timeline) {
                        return Err(failure);
                    }
                    // A timeline that was left behind keeps nobody from following the one that goes on.
                    tracing::error!("{failure}. {}", failure.next);
                }
                Err(error) if kind_of_repo(&error) == Kind::Store && !error.is_not_allowed() => {
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
        Ok(left)
    }

    /// Stores complete what stands in pieces alone, of the newest segments, and returns the pieces that it was made of.
    ///
    /// Done before streaming begins, when there is room for it in memory. What fails is tried at the next start: pieces
    /// can be read as well.
    pub(super) async fn finish(self, repository: &Repository, codec: Codec) -> Left {
        let (system_id, size) = (self.facts.system_id, self.facts.segment_size);
        let mut left = Left::new();
        for segment in self.newest(|wal| &wal.unfinished, |_| true, SEGMENTS_MAX) {
            let finished = async {
                let stored = repository.complete_segment(system_id, segment, size, codec).await?;
                if stored == 0 {
                    return Ok(None);
                }
                tracing::info!("stored {segment} complete, of the pieces that were left of it");
                // Two streams may have cut it, and then it was made of some of the pieces only.
                repository.compare_pieces(system_id, segment, size).await.map(Some)
            };
            match finished.await {
                Ok(None) => {}
                Ok(Some(Comparison { rival, same })) => {
                    if let Some(rival) = rival {
                        // The next start finds it beside the complete segment, and ends.
                        let failure = other_server(segment, &rival);
                        tracing::error!("{failure}. {} {}", failure.unharmed, failure.next);
                    }
                    left.insert(segment, same);
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
        left
    }

    /// Returns the newest segments of a kind that end before streaming begins.
    fn newest(
        &self,
        kind: impl Fn(&TimelineWal) -> &Vec<SegmentName>,
        is_wanted: impl Fn(&SegmentName) -> bool,
        most: u64,
    ) -> Vec<SegmentName> {
        let size = self.facts.segment_size;
        let is_before = |segment: &SegmentName| {
            let start = segment.start_lsn(size);
            start.is_some_and(|start| start.0.saturating_add(size.bytes()) <= self.lsn.0)
        };
        let timelines = self.inventory.timelines.values().rev();
        let all = timelines.flat_map(|wal| kind(wal).iter().rev().copied());
        let wanted = all.filter(|segment| is_before(segment) && is_wanted(segment));
        wanted.take(usize::try_from(most).unwrap_or(usize::MAX)).collect()
    }
}

/// Pieces were acknowledged that readers do not look at, since another server's object stands for the segment.
pub(super) fn other_server(segment: SegmentName, Rival { piece, complete }: &Rival) -> Failure {
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
