//! Objects on their way to the store: several at a time, each tried until it is stored.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

use tokio::task::{AbortHandle, JoinSet};
use tracing::Instrument;

use super::UNHARMED;
use super::sealer::Sealer;
use super::troubles::no_memory;
use super::unfinished::other_server;
use crate::causes::in_one_line;
use crate::failure::{Failure, Kind};
use crate::format::WalObject;
use crate::ops::failures::{kind_of_repo, of_repo, of_task};
use crate::pg::{Lsn, SegmentName, SegmentSize, SystemId};
use crate::plan::receive::Merge;
use crate::repo::{
    Put, RepoError, Repository, SealedPiece, Tidied, Unsealed, WHOLE_SEGMENT_BYTES_MAX,
};

/// The pause before an upload is tried again, at first and at last.
const AGAIN_FIRST: Duration = Duration::from_millis(100);
const AGAIN_LAST: Duration = Duration::from_secs(1);

/// When it is told first that an object is not stored yet, and how often after that: before, it is the
/// ordinary jitter of a store.
const TELL_FROM: Duration = Duration::from_secs(5);
const TELL_EVERY: Duration = Duration::from_mins(1);

/// How often an object is written anew after a disk that did not confirm it.
const WRITTEN_ANEW_MAX: u32 = 3;

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
    /// A unit or a merge is one object now, and on its way.
    Sealed(Box<SealedPiece>),
    /// Pieces that are not needed any more were removed, or will be by retention. Named is a complete segment beside
    /// which none is left.
    Tidied(Option<SegmentName>),
}

/// A task that ended well.
#[derive(Debug)]
enum Done {
    /// One made of `unsealed_bytes`, as they were counted.
    Sealed {
        purpose: Purpose,
        segment: SegmentName,
        unsealed_bytes: u64,
        piece: Box<SealedPiece>,
    },
    Stored(Stored),
    Tidied {
        segment: SegmentName,
        tidied: Option<Tidied>,
    },
}

/// A task that failed, and what it was about.
#[derive(Debug)]
enum Undone {
    Unsealed(io::Error),
    Refused { purpose: Purpose, segment: SegmentName, lsn: Lsn, error: RepoError },
}

/// A piece on its way.
#[derive(Debug)]
struct OnItsWay {
    segment: SegmentName,
    start_lsn: Lsn,
    end_lsn: Lsn,
    task: AbortHandle,
    /// Whether its unit is stored: nobody waits for it any more.
    redundant: bool,
}

/// What this session has stored of a segment: what another receiver may have stored is not its to remove.
#[derive(Debug, Default)]
struct Own {
    /// As offsets, the end excluded. Not those that were merged.
    pieces: BTreeSet<Stretch>,
    /// Units, or the complete segment, in the same way.
    units: Vec<Stretch>,
}

impl Own {
    fn take_inside(&mut self, larger: &[Stretch]) -> BTreeSet<Stretch> {
        let is_inside =
            |at: &Stretch| larger.iter().any(|(start, end)| *start <= at.0 && at.1 <= *end);
        self.pieces.extract_if(.., is_inside).collect()
    }
}

/// A stretch of a segment as byte offsets, the end excluded.
type Stretch = (u32, u32);

/// Objects on their way.
#[derive(Debug)]
pub(super) struct Uploads {
    repository: Repository,
    system_id: SystemId,
    size: SegmentSize,
    tasks: JoinSet<Result<Done, Undone>>,
    sealer: Sealer,
    pieces: Vec<OnItsWay>,
    /// Segments that have, or had, pieces, and are not stored complete.
    pieced: BTreeSet<SegmentName>,
    /// What is stored of segments that are not tidied.
    own: BTreeMap<SegmentName, Own>,
    /// Memory of units on their way; pieces share theirs with the segment in the making, and a merge is
    /// small.
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
            sealer: Sealer::default(),
            pieces: Vec::new(),
            pieced: BTreeSet::new(),
            own: BTreeMap::new(),
            unit_bytes: 0,
            others: 0,
        }
    }

    /// Returns how many pieces are on their way that stand nowhere else.
    pub(super) fn pieces(&self) -> usize {
        self.pieces.iter().filter(|piece| !piece.redundant).count()
    }

    /// Returns whether pieces of `segment` are on their way, needed or not: who tidied now would miss them.
    pub(super) fn has_piece_of(&self, segment: SegmentName) -> bool {
        self.pieces.iter().any(|piece| piece.segment == segment)
    }

    /// Takes note that an earlier receiver has stored pieces of `segment`.
    pub(super) fn note_pieces(&mut self, segment: SegmentName) {
        self.pieced.insert(segment);
    }

    /// Returns how much memory the units on their way hold, in bytes.
    pub(super) fn held_bytes(&self) -> u64 {
        self.unit_bytes
    }

    /// Returns whether nothing is on its way.
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Returns whether no WAL is on its way: what is left are merges and tidying, or nothing since the rest
    /// failed.
    pub(super) fn is_settled(&self) -> bool {
        self.is_empty() || (self.pieces() == 0 && self.unit_bytes == 0)
    }

    /// Sends a piece on its way.
    pub(super) fn put_piece(&mut self, segment: SegmentName, piece: SealedPiece) {
        let (start_lsn, end_lsn) = (piece.start_lsn, piece.end_lsn);
        let task = self.put(Purpose::Piece, segment, Box::new(piece));
        self.pieced.insert(segment);
        self.pieces.push(OnItsWay { segment, start_lsn, end_lsn, task, redundant: false });
    }

    /// Makes a complete unit one object and sends it on its way.
    pub(super) fn put_unit(&mut self, segment: SegmentName, unit: Unsealed) {
        self.unit_bytes += counted(unit.held_bytes());
        self.seal(Purpose::Unit, segment, unit);
    }

    /// Makes stored pieces one object, sends it on its way, and removes them then.
    pub(super) fn put_merge(&mut self, segment: SegmentName, merge: Merge, pieces: Unsealed) {
        self.others += 1;
        self.seal(Purpose::Merge(merge), segment, pieces);
    }

    fn spawn(
        &mut self,
        work: impl Future<Output = Result<Done, Undone>> + Send + 'static,
    ) -> AbortHandle {
        self.tasks.spawn(work.in_current_span())
    }

    /// Seals aside: whoever streams has no time for it.
    fn seal(&mut self, purpose: Purpose, segment: SegmentName, unsealed: Unsealed) {
        let unsealed_bytes = counted(unsealed.held_bytes());
        let sealed = self.sealer.seal(unsealed);
        self.spawn(async move {
            let piece = Box::new(sealed.await.map_err(Undone::Unsealed)?);
            Ok(Done::Sealed { purpose, segment, unsealed_bytes, piece })
        });
    }

    fn put(
        &mut self,
        purpose: Purpose,
        segment: SegmentName,
        piece: Box<SealedPiece>,
    ) -> AbortHandle {
        let object_bytes = piece.sealed.header.stored_bytes;
        let repository = self.repository.clone();
        let system_id = self.system_id;
        let merged = match purpose {
            Purpose::Merge(Merge { start, end, .. }) => self.own.get_mut(&segment).map(|own| {
                let stretch = (start, end);
                (stretch, own.take_inside(&[stretch]))
            }),
            Purpose::Piece | Purpose::Unit => None,
        };
        self.spawn(async move {
            let put = put_until_stored(&repository, &piece).await;
            let lsn = piece.start_lsn;
            put.map_err(|error| Undone::Refused { purpose, segment, lsn, error })?;
            if let Some((stretch, own)) = merged {
                let dropped = repository.drop_pieces_inside(system_id, segment, stretch, own);
                tell_left_behind(dropped.await, segment);
            }
            let (start_lsn, end_lsn) = (piece.start_lsn, piece.end_lsn);
            Ok(Done::Stored(Stored { purpose, segment, start_lsn, end_lsn, object_bytes }))
        })
    }

    /// Removes the pieces of a segment that is stored complete: these alone, where they are given. Must be called only when
    /// none is on its way ([`Self::has_piece_of`]).
    pub(super) fn tidy(&mut self, segment: SegmentName, only: Option<BTreeSet<Stretch>>) {
        let repository = self.repository.clone();
        let (system_id, size) = (self.system_id, self.size);
        self.others += 1;
        if let Some(same) = only {
            self.spawn(async move {
                let dropped = repository.drop_same_pieces(system_id, segment, size, &same).await;
                tell_left_behind(dropped, segment);
                Ok(Done::Tidied { segment, tidied: None })
            });
            return;
        }
        let mut own = self.own.remove(&segment).unwrap_or_default();
        let redundant = own.take_inside(&own.units.clone());
        if !own.pieces.is_empty() {
            // They lie in units that are not stored yet.
            self.own.insert(segment, Own { pieces: own.pieces, units: Vec::new() });
        }
        self.spawn(async move {
            let tidied = repository.drop_redundant_pieces(system_id, segment, size, &redundant);
            let (dropped, tidied) = match tidied.await {
                Ok(tidied) => (Ok(tidied.dropped), Some(tidied)),
                Err(error) => (Err(error), None),
            };
            tell_left_behind(dropped, segment);
            Ok(Done::Tidied { segment, tidied })
        });
    }

    /// Waits for the next thing to end. Cancel-safe. Must not be called when [`Self::is_empty`].
    pub(super) async fn next(&mut self) -> Result<Settled, Failure> {
        let ended = loop {
            match self.tasks.join_next().await {
                // Nobody waits for that piece any more.
                Some(Err(error)) if error.is_cancelled() => {}
                Some(ended) => break ended,
                None => return Ok(Settled::Tidied(None)),
            }
        };
        let ended = ended.map_err(|error| of_task(error, UNHARMED))?;
        let done = ended.map_err(|undone| match undone {
            Undone::Unsealed(error) => no_memory(error),
            Undone::Refused { purpose: Purpose::Unit, segment, lsn, error }
                if matches!(error, RepoError::Conflict { .. })
                    && self.pieced.contains(&segment) =>
            {
                self.covered(segment, lsn, error)
            }
            Undone::Refused { segment, lsn, error, .. } => refused(segment, lsn, error),
        })?;
        match done {
            Done::Sealed { purpose, segment, unsealed_bytes, piece } => {
                if purpose == Purpose::Unit {
                    self.unit_bytes += counted(piece.sealed.header.stored_bytes);
                    self.unit_bytes -= unsealed_bytes;
                }
                self.put(purpose, segment, piece.clone());
                Ok(Settled::Sealed(piece))
            }
            Done::Stored(stored) => {
                self.forget(&stored);
                Ok(Settled::Stored(stored))
            }
            Done::Tidied { segment, tidied } => {
                self.others -= 1;
                if let Some(Tidied { rival: Some(rival), .. }) = &tidied {
                    return Err(other_server(segment, rival));
                }
                // Of a large one the other units may not be stored yet.
                let is_whole = tidied.is_some() && self.size.bytes() <= WHOLE_SEGMENT_BYTES_MAX;
                Ok(Settled::Tidied(is_whole.then_some(segment)))
            }
        }
    }

    /// Counts an upload no more.
    fn forget(&mut self, stored: &Stored) {
        let stretch = self.stretch_of(stored);
        match stored.purpose {
            Purpose::Piece => {
                self.own.entry(stored.segment).or_default().pieces.extend(stretch);
                let is_it = |piece: &OnItsWay| {
                    (piece.start_lsn, piece.end_lsn) == (stored.start_lsn, stored.end_lsn)
                };
                if let Some(at) = self.pieces.iter().position(is_it) {
                    self.pieces.swap_remove(at);
                }
            }
            Purpose::Unit => {
                self.unit_bytes -= counted(stored.object_bytes);
                if self.pieced.contains(&stored.segment) || self.own.contains_key(&stored.segment) {
                    self.own.entry(stored.segment).or_default().units.extend(stretch);
                }
                self.let_go_of_pieces_in(stored);
            }
            Purpose::Merge(_) => {
                self.own.entry(stored.segment).or_default().pieces.extend(stretch);
                self.others -= 1;
            }
        }
    }

    fn stretch_of(&self, stored: &Stored) -> Option<Stretch> {
        let begin = stored.segment.start_lsn(self.size)?;
        let offset = |lsn: Lsn| u32::try_from(lsn.0.checked_sub(begin.0)?).ok();
        Some((offset(stored.start_lsn)?, offset(stored.end_lsn)?))
    }

    /// Pieces on their way whose bytes stand in a stored unit are waited for no longer. They may still arrive, and are
    /// tidied then: given up are only those that have not arrived when the next unit has, so that what a stuck store makes
    /// us hold is never more than one unit's.
    fn let_go_of_pieces_in(&mut self, unit: &Stored) {
        for stuck in self.pieces.extract_if(.., |piece| piece.redundant) {
            stuck.task.abort();
        }
        for piece in &mut self.pieces {
            piece.redundant = unit.start_lsn <= piece.start_lsn && piece.end_lsn <= unit.end_lsn;
        }
    }

    /// Takes note that a unit of `segment` is stored; returns whether it has pieces to tidy.
    pub(super) fn take_pieced(&mut self, segment: SegmentName) -> bool {
        self.pieced.remove(&segment) || self.own.contains_key(&segment)
    }

    /// Somebody else has stored a segment ahead of us that is not what this server sends, and pieces of ours were
    /// acknowledged before that was seen.
    fn covered(&self, segment: SegmentName, lsn: Lsn, error: RepoError) -> Failure {
        let piece = WalObject::Piece { segment, start: 0, end: 1 };
        let piece = self.repository.wal_key(self.system_id, piece);
        let pieces = piece.as_str().rsplit_once('/').map_or("", |(directory, _)| directory);
        let theirs = match &error {
            RepoError::Conflict { key, .. } => key.to_string(),
            _ => String::new(),
        };
        let unharmed = format!(
            "Everything that was acknowledged before segment {segment} is in the repository. What was acknowledged of this segment stands in its pieces (`{pieces}/`), and comes back only when `{theirs}` is moved away: readers prefer it to them."
        );
        let next = format!(
            "Find out who wrote `{theirs}`: most often a copy of this cluster that was started with archiving on. If this server is the real one, stop the copy or give it a cluster name of its own, move `{theirs}` away and start `highwater receive` again; nothing is overwritten."
        );
        let failure = refused(segment, lsn, error);
        Failure { unharmed, next, ..failure }
    }

    /// Returns whether a merge or a tidying is on its way: they are done one at a time.
    pub(super) fn is_tidying(&self) -> bool {
        self.others > 0
    }
}

/// What is on its way counts, even if it is next to nothing.
fn counted(bytes: u64) -> u64 {
    bytes.max(1)
}

/// Puts an object, again and again while the store is the reason that it fails.
async fn put_until_stored(repository: &Repository, piece: &SealedPiece) -> Result<Put, RepoError> {
    let mut pause = AGAIN_FIRST;
    let mut tell_at = Instant::now() + TELL_FROM;
    let mut not_confirmed = 0;
    loop {
        match repository.put_sealed(&piece.key, &piece.sealed).await {
            Err(error) if error.is_not_confirmed() && not_confirmed < WRITTEN_ANEW_MAX => {
                not_confirmed += 1;
                tracing::warn!("{}; it is written anew", in_one_line(&error));
                tokio::time::sleep(pause).await;
            }
            Err(error) if !error.is_not_confirmed() && kind_of_repo(&error) == Kind::Store => {
                if Instant::now() >= tell_at {
                    tell_at += TELL_EVERY;
                    tracing::warn!(
                        "`{}` is not stored yet, and is tried again and again: {}",
                        piece.key,
                        in_one_line(&error)
                    );
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AGAIN_LAST);
            }
            settled => return settled,
        }
    }
}

fn tell_left_behind(dropped: Result<u64, RepoError>, segment: SegmentName) {
    match dropped {
        Ok(count) => {
            tracing::debug!("removed {count} pieces of {segment} that stand elsewhere too");
        }
        Err(error) => tracing::info!(
            "pieces of {segment} that stand elsewhere too were left to retention: {}",
            in_one_line(&error)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
