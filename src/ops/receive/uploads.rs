//! Objects on their way to the store: several at a time, each tried until it is stored.

use std::time::Duration;

use tokio::task::JoinSet;

use super::UNHARMED;
use crate::failure::{Failure, Kind};
use crate::ops::failures::{kind_of_repo, of_repo, of_task};
use crate::pg::{Lsn, SegmentName, SegmentSize, SystemId};
use crate::plan::receive::Merge;
use crate::repo::{Put, RepoError, Repository, SealedPiece};

/// The pause before an upload is tried again, at first and at last.
const AGAIN_FIRST: Duration = Duration::from_millis(100);
const AGAIN_LAST: Duration = Duration::from_secs(5);

/// Above this pause each further attempt is told: before, it is the ordinary jitter of a store.
const TELL_FROM: Duration = Duration::from_secs(1);

/// What an upload is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// WAL that is nowhere else yet.
    Piece,
    /// A complete segment, or 16 MiB of a larger one.
    Unit,
    /// Pieces that are stored, as one.
    Merge(Merge),
}

/// One upload that has ended.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) purpose: Purpose,
    pub(super) segment: SegmentName,
    pub(super) start_lsn: Lsn,
    pub(super) end_lsn: Lsn,
    pub(super) object_bytes: u64,
}

/// What ended.
pub(super) enum Settled {
    /// An upload is stored.
    Stored(Stored),
    /// Pieces that are not needed any more were removed, or will be by retention.
    Tidied,
}

/// Objects on their way.
#[derive(Debug)]
pub(super) struct Uploads {
    repository: Repository,
    system_id: SystemId,
    size: SegmentSize,
    tasks: JoinSet<Result<Option<Stored>, (SegmentName, Lsn, RepoError)>>,
    /// Pieces on their way, by segment.
    pieces: Vec<SegmentName>,
    /// Bytes of units on their way; pieces share theirs with the segment in the making.
    unit_bytes: u64,
    others: usize,
}

impl Uploads {
    pub(super) fn new(repository: &Repository, system_id: SystemId, size: SegmentSize) -> Self {
        Self {
            repository: repository.clone(),
            system_id,
            size,
            tasks: JoinSet::new(),
            pieces: Vec::new(),
            unit_bytes: 0,
            others: 0,
        }
    }

    /// Returns how many pieces are on their way.
    pub(super) fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Returns whether pieces of `segment` are on their way.
    pub(super) fn has_piece_of(&self, segment: SegmentName) -> bool {
        self.pieces.contains(&segment)
    }

    /// Returns how much memory the units on their way hold, in bytes.
    pub(super) fn held_bytes(&self) -> u64 {
        self.unit_bytes
    }

    /// Returns whether nothing is on its way.
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Returns whether no WAL is on its way; what is left are merges and tidying.
    pub(super) fn is_settled(&self) -> bool {
        self.pieces.is_empty() && self.unit_bytes == 0
    }

    /// Sends an object on its way.
    pub(super) fn start(&mut self, purpose: Purpose, segment: SegmentName, piece: SealedPiece) {
        let object_bytes = piece.sealed.header.stored_bytes;
        match purpose {
            Purpose::Piece => self.pieces.push(segment),
            Purpose::Unit => self.unit_bytes += object_bytes.max(1),
            Purpose::Merge(_) => self.others += 1,
        }
        let repository = self.repository.clone();
        let system_id = self.system_id;
        self.tasks.spawn(async move {
            let put = put_until_stored(&repository, &piece).await;
            put.map_err(|error| (segment, piece.start_lsn, error))?;
            if let Purpose::Merge(merge) = purpose {
                let dropped =
                    repository.drop_pieces_inside(system_id, segment, merge.start, merge.end);
                tell_left_behind(dropped.await, segment);
            }
            let (start_lsn, end_lsn) = (piece.start_lsn, piece.end_lsn);
            Ok(Some(Stored { purpose, segment, start_lsn, end_lsn, object_bytes }))
        });
    }

    /// Removes the pieces of a segment that is stored complete.
    pub(super) fn tidy(&mut self, segment: SegmentName) {
        let repository = self.repository.clone();
        let (system_id, size) = (self.system_id, self.size);
        self.others += 1;
        self.tasks.spawn(async move {
            let dropped = repository.drop_redundant_pieces(system_id, segment, size);
            tell_left_behind(dropped.await, segment);
            Ok(None)
        });
    }

    /// Waits for the next upload to end. Cancel-safe. Must not be called when [`Self::is_empty`].
    pub(super) async fn next(&mut self) -> Result<Settled, Failure> {
        let Some(ended) = self.tasks.join_next().await else { return Ok(Settled::Tidied) };
        let ended = ended.map_err(|error| of_task(error, UNHARMED))?;
        let Some(stored) = ended.map_err(|(segment, lsn, error)| refused(segment, lsn, error))?
        else {
            self.others -= 1;
            return Ok(Settled::Tidied);
        };
        match stored.purpose {
            Purpose::Piece => {
                if let Some(at) = self.pieces.iter().position(|name| *name == stored.segment) {
                    self.pieces.swap_remove(at);
                }
            }
            Purpose::Unit => self.unit_bytes -= stored.object_bytes.max(1),
            Purpose::Merge(_) => self.others -= 1,
        }
        Ok(Settled::Stored(stored))
    }

    /// Returns whether a merge or a tidying is on its way: they are done one at a time.
    pub(super) fn is_tidying(&self) -> bool {
        self.others > 0
    }
}

/// Puts an object, again and again while the store is the reason that it fails.
async fn put_until_stored(repository: &Repository, piece: &SealedPiece) -> Result<Put, RepoError> {
    let mut pause = AGAIN_FIRST;
    loop {
        match repository.put_sealed(&piece.key, &piece.sealed).await {
            Err(error) if kind_of_repo(&error) == Kind::Store => {
                if pause >= TELL_FROM {
                    tracing::warn!(
                        "`{}` is not stored yet, and is tried again in {:.0} s: {}",
                        piece.key,
                        pause.as_secs_f64(),
                        with_causes(&error)
                    );
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AGAIN_LAST);
            }
            settled => return settled,
        }
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(deeper) = cause {
        text = format!("{text}: {deeper}");
        cause = deeper.source();
    }
    text
}

fn tell_left_behind(dropped: Result<u64, RepoError>, segment: SegmentName) {
    match dropped {
        Ok(count) => {
            tracing::debug!("removed {count} pieces of {segment} that stand elsewhere too");
        }
        Err(error) => tracing::info!(
            "pieces of {segment} that stand elsewhere too were left to retention: {}",
            with_causes(&error)
        ),
    }
}

/// What was received contradicts what is stored, or cannot be stored at all.
fn refused(segment: SegmentName, lsn: Lsn, error: RepoError) -> Failure {
    let what = match &error {
        RepoError::Conflict { .. } => format!(
            "WAL of segment {segment} from {lsn} on, as this server sends it, is not what is stored under the same name"
        ),
        _ => format!("could not store WAL of segment {segment} from {lsn} on"),
    };
    of_repo(error, what, UNHARMED)
}
