//! Whether pieces of a segment hold what the complete object says, which readers prefer.
//!
//! Pieces outlive the complete object for a moment, or for as long as nobody removes them; then they hold the same bytes.
//! Where they do not, two servers have written under one name, and what was acknowledged may stand in either.
//!
//! ```text
//! the complete object   |--------------------------------|   its plain bytes are hashed between the ends of each piece
//! pieces inside         |------|----|      |-------------|   of these only the header is read, which says their digest
//! ```

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::StreamExt;

use super::objects::{Fetched, in_short};
use super::wal_fetch::{ListedPiece, is_unit};
use super::{Put, RepoError, Repository, SealedObject, WHOLE_SEGMENT_BYTES_MAX};
use crate::causes::in_one_line;
use crate::format::{Header, WalObject};
use crate::pg::{SegmentName, SegmentSize, SystemId, WalFileName};
use crate::store::{Key, StoreError};

/// How many headers are read at a time.
const IN_FLIGHT: usize = 8;

/// How often pieces are listed that go away while their headers are read.
const LISTINGS_MAX: u32 = 8;

/// The pause before they are listed again.
const PAUSE: Duration = Duration::from_millis(100);

/// What became of a comparison.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Comparison {
    /// The first piece that holds other WAL; what follows was not looked at.
    pub rival: Option<Rival>,
    /// Where those lie that hold the same WAL, as offsets, the end excluded. Those that could not be read are left out.
    pub same: BTreeSet<(u32, u32)>,
}

/// A piece that holds other WAL than the object in which it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rival {
    /// The piece.
    pub piece: Key,
    /// The complete segment, or the unit of one above 16 MiB.
    pub complete: Key,
}

impl Repository {
    /// Creates the object of a complete segment, or a unit of a large one, unless pieces that stand there hold other WAL;
    /// anything else as [`Self::hand_over`].
    ///
    /// A piece that comes in this very moment may be missed: its receiver compares what it completes itself, and the next
    /// one compares what it left.
    ///
    /// # Errors
    /// As [`Self::hand_over`]. [`RepoError::Conflict`] may name a piece too: then nothing was stored.
    pub async fn put_complete(
        &self,
        object: WalObject,
        sealed: SealedObject,
    ) -> Result<(Put, Header), RepoError> {
        let key = self.wal_key(sealed.header.system_identifier, object);
        if let Some(complete) = Complete::of(object, sealed.header.plain_bytes) {
            self.vet_pieces(&key, complete, &sealed).await?;
        }
        self.hand_over(&key, sealed).await
    }

    /// Compares what is to be stored with the pieces that stand in its place.
    pub(super) async fn vet_pieces(
        &self,
        key: &Key,
        complete: Complete,
        sealed: &SealedObject,
    ) -> Result<(), RepoError> {
        let system_id = sealed.header.system_identifier;
        for listing in 0..LISTINGS_MAX {
            if listing > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            let pieces = self.pieces(system_id, complete.segment).await?;
            let mut digests = Digests::of(complete.start, complete.around(&pieces));
            if digests.is_empty() {
                return Ok(());
            }
            // Where it stands already, the create compares with that, and whoever stored it with the pieces. They may be
            // many where the store deletes none.
            match self.header(key).await {
                Ok(_) => return Ok(()),
                Err(error) if error.is_absent() => {}
                Err(error) => return Err(error),
            }
            Fetched::of_ours(key, sealed).unseal(|block| {
                digests.feed(block);
                Ok(())
            })?;
            match self.look_at_headers(system_id, complete.segment, digests).await? {
                Found::Same(_) => return Ok(()),
                Found::Other { piece, stored } => {
                    let ours = format!("that of `{}`", key.file_name());
                    return Err(RepoError::Conflict { key: piece, stored, ours });
                }
                // Something larger stands in their place: this object, or a piece that the next listing shows.
                Found::Gone => {}
            }
        }
        let cause = "pieces of it went away again and again while they were compared".into();
        Err(StoreError::Unavailable { key: key.clone(), cause }.into())
    }

    /// Reads the complete object of a segment, or the units of one above 16 MiB, and compares the pieces beside it by the
    /// digests in their headers; whether these are true is not looked at. Where pieces go away meanwhile they are listed
    /// again; where they do so again and again nothing is said of them.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] of a complete object that cannot be believed; the store's.
    pub async fn compare_pieces(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Comparison, RepoError> {
        for listing in 0..LISTINGS_MAX {
            if listing > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            if let Some(comparison) = self.compare_listed(system_id, segment, size).await? {
                return Ok(comparison);
            }
        }
        Ok(Comparison::default())
    }

    /// Compares once; `None` where a piece went away.
    async fn compare_listed(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Option<Comparison>, RepoError> {
        let mut comparison = Comparison::default();
        let pieces = self.pieces(system_id, segment).await?;
        let units = pieces.iter().filter(|piece| piece.is_unit()).map(|unit| {
            let object = WalObject::Piece { segment, start: unit.start, end: unit.end };
            Complete { object, segment, start: unit.start, end: unit.end }
        });
        let complete: Vec<Complete> = if size.bytes() > WHOLE_SEGMENT_BYTES_MAX {
            units.collect()
        } else {
            let object = WalObject::File(WalFileName::Segment(segment));
            Complete::of(object, size.bytes()).into_iter().collect()
        };
        for complete in complete {
            let mut digests = Digests::of(complete.start, complete.around(&pieces));
            if digests.is_empty() {
                continue;
            }
            let key = self.wal_key(system_id, complete.object);
            let fetched = self.fetch(&key, |block| {
                digests.feed(block);
                Ok(())
            });
            match fetched.await {
                Ok(_) => {}
                Err(error) if error.is_absent() => continue,
                Err(error) => return Err(error),
            }
            match self.look_at_headers(system_id, segment, digests).await? {
                Found::Same(same) => comparison.same.extend(same),
                Found::Gone => return Ok(None),
                Found::Other { piece, .. } => {
                    comparison.rival = Some(Rival { piece, complete: key });
                    return Ok(Some(comparison));
                }
            }
        }
        Ok(Some(comparison))
    }

    /// Reads the header of each piece, until one is gone or does not say the digest of these bytes.
    async fn look_at_headers(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        digests: Digests,
    ) -> Result<Found, RepoError> {
        let mut same = BTreeSet::new();
        let mut headers = futures_util::stream::iter(digests.end())
            .map(|(piece, digest)| async move {
                let at = (piece.start, piece.end);
                let key =
                    self.wal_key(system_id, WalObject::Piece { segment, start: at.0, end: at.1 });
                let header = self.header(&key).await;
                (at, key, digest, header)
            })
            .buffered(IN_FLIGHT);
        while let Some((at, key, digest, header)) = headers.next().await {
            match header {
                Ok(header) if header.blake3.as_deref() == Some(digest.to_hex().as_str()) => {
                    same.insert(at);
                }
                Ok(header) => {
                    return Ok(Found::Other { piece: key, stored: in_short(&header) });
                }
                Err(error) if error.is_absent() => return Ok(Found::Gone),
                // What cannot be read must not keep other WAL from being stored; reading and `verify` tell of it.
                Err(error) if error.is_damage() || error.is_not_allowed() => {
                    tracing::warn!("a piece was not compared: {}", in_one_line(&error));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Found::Same(same))
    }
}

/// What headers say.
enum Found {
    /// Nothing speaks against it; these were read.
    Same(BTreeSet<(u32, u32)>),
    /// One was gone; the others were not all looked at.
    Gone,
    Other {
        piece: Key,
        /// What it is, in words.
        stored: String,
    },
}

/// An object that pieces may lie in: from `start` to `end` (excluded) of the segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Complete {
    object: WalObject,
    segment: SegmentName,
    start: u32,
    end: u32,
}

impl Complete {
    /// Returns `None` of what is neither a complete segment nor a unit.
    pub(super) fn of(object: WalObject, plain_bytes: u64) -> Option<Self> {
        let (segment, start, end) = match object {
            WalObject::File(WalFileName::Segment(segment)) => {
                (segment, 0, u32::try_from(plain_bytes).ok()?)
            }
            WalObject::Piece { segment, start, end } if is_unit(start, end) => {
                (segment, start, end)
            }
            WalObject::File(_) | WalObject::Piece { .. } | WalObject::Damaged(_) => return None,
        };
        Some(Self { object, segment, start, end })
    }

    /// Returns those that lie in it, itself excepted; they stay sorted.
    fn around(self, pieces: &[ListedPiece]) -> impl Iterator<Item = ListedPiece> {
        let (is_piece, start, end) =
            (matches!(self.object, WalObject::Piece { .. }), self.start, self.end);
        let is_itself =
            move |piece: &ListedPiece| is_piece && (piece.start, piece.end) == (start, end);
        let is_inside = move |piece: &ListedPiece| start <= piece.start && piece.end <= end;
        pieces.iter().copied().filter(move |piece| is_inside(piece) && !is_itself(piece))
    }
}

/// Hashes stretches of bytes that come in order; stretches may overlap. Memory: one hasher for each that is begun.
struct Digests {
    /// Sorted by their start, the last first.
    later: Vec<ListedPiece>,
    begun: Vec<(ListedPiece, blake3::Hasher)>,
    done: Vec<(ListedPiece, blake3::Hash)>,
    at: u32,
}

impl Digests {
    /// Will hash these, which are sorted; the first byte is that at offset `at`.
    fn of(at: u32, pieces: impl Iterator<Item = ListedPiece>) -> Self {
        let mut later: Vec<ListedPiece> = pieces.collect();
        later.reverse();
        Self { later, begun: Vec::new(), done: Vec::new(), at }
    }

    fn is_empty(&self) -> bool {
        self.later.is_empty() && self.begun.is_empty() && self.done.is_empty()
    }

    fn feed(&mut self, block: &[u8]) {
        let from = self.at;
        let to = from.saturating_add(u32::try_from(block.len()).unwrap_or(u32::MAX));
        while let Some(piece) = self.later.pop_if(|piece| piece.start < to) {
            self.begun.push((piece, blake3::Hasher::new()));
        }
        for (piece, hasher) in &mut self.begun {
            let within = piece.start.max(from) - from..piece.end.min(to) - from;
            hasher.update(&block[within.start as usize..within.end as usize]);
        }
        let ended = self.begun.extract_if(.., |(piece, _)| piece.end <= to);
        self.done.extend(ended.map(|(piece, hasher)| (piece, hasher.finalize())));
        self.at = to;
    }

    /// Returns the digest of each that has ended.
    fn end(self) -> Vec<(ListedPiece, blake3::Hash)> {
        self.done
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However the bytes come, and however stretches overlap.
        #[test]
        fn each_stretch_has_the_digest_of_its_bytes(
            stretches in proptest::collection::btree_set((0u32..500, 1u32..300), 0..12),
            block in 1usize..600,
            at in 0u32..50,
        ) {
            let bytes: Vec<u8> = (0..900u32).map(|n| (n * 7 % 251) as u8).collect();
            let mut pieces: Vec<ListedPiece> = stretches
                .iter()
                .map(|(start, len)| ListedPiece { start: at + start, end: at + start + len, size_bytes: 0 })
                .collect();
            pieces.sort_unstable();
            let mut digests = Digests::of(at, pieces.iter().copied());
            prop_assert_eq!(digests.is_empty(), pieces.is_empty());
            bytes.chunks(block).for_each(|block| digests.feed(block));
            let mut found = digests.end();
            found.sort_unstable_by_key(|(piece, _)| *piece);
            let expected: Vec<_> = pieces
                .iter()
                .map(|piece| {
                    let within = (piece.start - at) as usize..(piece.end - at) as usize;
                    (*piece, blake3::hash(&bytes[within]))
                })
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
