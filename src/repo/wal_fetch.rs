//! Bringing a segment together again from whatever stands for it.
//!
//! Owns the order in which that is looked for, and what it takes to say that a segment ends, or
//! is not there. Pieces are stored, merged, replaced by the whole and deleted while others
//! read, always in this order: the larger object is created, read back, and only then what
//! lies in it goes. A reader that finds a piece gone therefore finds something larger in its place, if it looks again:
//!
//! ```text
//! whole segment?  ->  list pieces, read them in order  ->  to the end: done
//!        ^                    | a piece is gone, or they end early
//!        '--------------------'
//! ```
//!
//! What was read before stays; it is never given to the sink twice. An end before the segment's
//! is believed after a second listing, and a last look for the whole segment behind it: one
//! listing that takes several pages can miss both a piece and what replaced it.

use std::io;

use futures_util::future::try_join_all;

use super::objects::Fetched;
use super::{PIECE_BYTES, RepoError, Repository, WHOLE_SEGMENT_BYTES_MAX};
use crate::format::{Header, WalObject, parse_wal_object};
use crate::pg::{
    Extent, SegmentExpectation, SegmentName, SegmentSize, SegmentWalk, SystemId, WalFileName,
    WalkEnd,
};
use crate::store::{Key, StoreError};

/// How many pieces are read at a time, and how many stored bytes of them.
const PIECES_IN_FLIGHT: usize = 8;
const PIECES_IN_FLIGHT_BYTES: u64 = 16 << 20;

/// How many listings must have been read to their end before an end of the pieces is believed.
const LISTINGS: u32 = 2;

/// How often a segment is looked for when pieces go away while they are read.
const ATTEMPTS_MAX: u32 = 8;

/// A block of zeros for filling up a segment.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What stood for a segment that was fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentSource {
    /// The complete segment.
    Whole,
    /// Pieces, joined; `valid_bytes` from the start are WAL and the rest was filled with zeros.
    Pieces {
        /// The length of the unbroken prefix, in bytes.
        valid_bytes: u64,
    },
    /// The `.partial` that promotion left; `valid_bytes` as above.
    Partial {
        /// The length of the valid part, in bytes.
        valid_bytes: u64,
    },
}

impl SegmentSource {
    /// Returns whether every byte of the segment is stored.
    pub fn is_all_of(self, size: SegmentSize) -> bool {
        match self {
            Self::Whole => true,
            Self::Pieces { valid_bytes } => valid_bytes == size.bytes(),
            Self::Partial { .. } => false,
        }
    }
}

/// What the repository holds of a segment from its first byte on, without a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredPrefix {
    /// The offset behind its last byte.
    pub end: u32,
    /// BLAKE3 of the plain bytes before `end`.
    pub digest: blake3::Hash,
    /// Whether the complete segment is stored as `archive-push` stores it: nothing is left to do.
    pub is_complete: bool,
}

/// One piece as a listing shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ListedPiece {
    /// The offset of its first byte in the segment.
    pub(super) start: u32,
    /// The offset behind its last byte.
    pub(super) end: u32,
    /// Its length as stored.
    pub(super) size_bytes: u64,
}

impl ListedPiece {
    /// Returns whether it is what stands for 16 MiB of a large segment once they are complete.
    pub(super) fn is_unit(self) -> bool {
        is_unit(self.start, self.end)
    }
}

/// Returns whether a piece from `start` to `end` is what stands for 16 MiB of a large segment.
pub(super) fn is_unit(start: u32, end: u32) -> bool {
    start.is_multiple_of(PIECE_BYTES) && end.checked_sub(start) == Some(PIECE_BYTES)
}

/// Which segment of which cluster.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    system_id: SystemId,
    segment: SegmentName,
    size: SegmentSize,
}

impl Repository {
    /// Fetches one segment, always of full size, from the complete object, else from pieces, else
    /// from the `.partial`. `None` means that the store said of each that it is not
    /// there; that the repository itself is there is checked before that is believed.
    ///
    /// No byte is given to the sink twice. Memory: 16 MiB of stored bytes and the codec's, for any segment size.
    ///
    /// # Errors
    /// Anything but certain absence. The sink may have taken bytes by then.
    /// [`RepoError::Damaged`] also if pieces, joined, are no valid WAL up to their end.
    pub async fn fetch_segment(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
        sink: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<Option<SegmentSource>, RepoError> {
        let wanted = Wanted { system_id, segment, size };
        let mut joined = Joined::new(wanted, sink);
        if self.join_segment(wanted, &mut joined).await? {
            return Ok(Some(SegmentSource::Whole));
        }
        if joined.end > 0 {
            let key = self.pieces_key(wanted);
            joined.check(&key)?;
            let valid_bytes = u64::from(joined.end);
            fill(size.bytes().saturating_sub(valid_bytes), &mut joined.sink)
                .map_err(|cause| RepoError::Sink { key, cause })?;
            return Ok(Some(SegmentSource::Pieces { valid_bytes }));
        }
        let partial = self.wal_key(system_id, WalObject::File(WalFileName::Partial(segment)));
        match self.fetch_partial(&partial, size, &mut joined.sink).await {
            Ok(valid_bytes) => Ok(Some(SegmentSource::Partial { valid_bytes })),
            Err(error) if error.is_absent() => {
                self.identity(system_id).await?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns what the repository holds of a segment without a hole from its first byte on; `None`
    /// if nothing is stored of it. A `.partial` does not count. Of a complete segment of up to 16 MiB only the
    /// header is read, else everything that is stored of it.
    ///
    /// # Errors
    /// As [`Self::fetch_segment`].
    pub async fn stored_prefix(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Option<StoredPrefix>, RepoError> {
        let wanted = Wanted { system_id, segment, size };
        let key = self.segment_key(wanted.system_id, wanted.segment);
        match self.header(&key).await {
            Ok(header) => {
                check_length(&key, &header, size.bytes())?;
                let digest = header.blake3.as_deref().unwrap_or_default();
                let digest = blake3::Hash::from_hex(digest)
                    .map_err(|_| RepoError::damaged(&key, "its header holds no digest"))?;
                return Ok(Some(StoredPrefix { end: u32::from(size), digest, is_complete: true }));
            }
            Err(error) if error.is_absent() => {}
            Err(error) => return Err(error),
        }
        let mut joined = Joined::new(wanted, |_: &[u8]| Ok(()));
        let is_whole = self.join_segment(wanted, &mut joined).await?;
        if joined.end == 0 {
            return Ok(None);
        }
        if !is_whole {
            joined.check(&self.pieces_key(wanted))?;
        }
        let is_all_units = joined.has_units_only
            && u64::from(joined.end) == size.bytes()
            && size.bytes() > WHOLE_SEGMENT_BYTES_MAX;
        Ok(Some(StoredPrefix {
            end: joined.end,
            digest: joined.hasher.finalize(),
            is_complete: is_whole || is_all_units,
        }))
    }

    /// Lists the pieces of a segment, sorted by their offsets.
    pub(super) async fn pieces(
        &self,
        system_id: SystemId,
        segment: SegmentName,
    ) -> Result<Vec<ListedPiece>, RepoError> {
        let directory = self.place().pieces_dir(system_id, segment);
        let root = format!("{}/", self.place().wal_dir(system_id));
        let level = self.store().list_level(&Key::new(directory)).await?;
        let mut pieces: Vec<ListedPiece> = level
            .objects
            .iter()
            .filter_map(|object| {
                let size_bytes = object.size_bytes;
                match parse_wal_object(object.key.as_str().strip_prefix(&root)?)? {
                    WalObject::Piece { start, end, .. } => {
                        Some(ListedPiece { start, end, size_bytes })
                    }
                    WalObject::File(_) | WalObject::Damaged(_) => None,
                }
            })
            .collect();
        pieces.sort_unstable();
        Ok(pieces)
    }

    /// Gives all that is stored of a segment to `joined`; returns whether the complete object stood for it
    /// or for the rest of it.
    async fn join_segment<S: FnMut(&[u8]) -> io::Result<()>>(
        &self,
        wanted: Wanted,
        joined: &mut Joined<S>,
    ) -> Result<bool, RepoError> {
        let mut listings = 0;
        let mut listed_end = 0;
        for _ in 0..ATTEMPTS_MAX {
            if self.join_whole(wanted, joined).await? {
                return Ok(true);
            }
            if listings == LISTINGS {
                // What was listed behind it is gone, and nothing stands in its place.
                let is_certain = joined.end >= listed_end;
                return if is_certain { Ok(false) } else { Err(self.went_away(wanted)) };
            }
            let pieces = self.pieces(wanted.system_id, wanted.segment).await?;
            let chain = unbroken_pieces(&pieces, joined.end);
            listed_end = chain.last().map_or(listed_end, |piece| piece.end.max(listed_end));
            match self.join_pieces(wanted, &chain, joined).await {
                Ok(()) => {}
                Err(error) if error.is_absent() => continue,
                Err(error) => return Err(error),
            }
            if u64::from(joined.end) >= wanted.size.bytes() {
                return Ok(false);
            }
            // A listing without anything is one page: it cannot have missed what came and went.
            listings = if pieces.is_empty() { LISTINGS } else { listings + 1 };
        }
        Err(self.went_away(wanted))
    }

    /// Gives what `joined` does not have yet of the complete segment; `false` if there is none.
    async fn join_whole<S: FnMut(&[u8]) -> io::Result<()>>(
        &self,
        wanted: Wanted,
        joined: &mut Joined<S>,
    ) -> Result<bool, RepoError> {
        let key = self.segment_key(wanted.system_id, wanted.segment);
        let whole = match self.fetch_sealed(&key).await {
            Ok(whole) => whole,
            Err(error) if error.is_absent() => return Ok(false),
            Err(error) => return Err(error),
        };
        check_length(&key, &whole.header, wanted.size.bytes())?;
        joined.take_whole(whole)?;
        Ok(true)
    }

    async fn join_pieces<S: FnMut(&[u8]) -> io::Result<()>>(
        &self,
        wanted: Wanted,
        mut chain: &[ListedPiece],
        joined: &mut Joined<S>,
    ) -> Result<(), RepoError> {
        let Wanted { system_id, segment, .. } = wanted;
        while !chain.is_empty() {
            let (now, later) = chain.split_at(in_flight(chain));
            let fetches = now.iter().map(|piece| {
                let &ListedPiece { start, end, .. } = piece;
                let key = self.wal_key(system_id, WalObject::Piece { segment, start, end });
                async move { self.fetch_sealed(&key).await }
            });
            for (piece, fetched) in now.iter().zip(try_join_all(fetches).await?) {
                check_length(&fetched.key, &fetched.header, u64::from(piece.end - piece.start))?;
                joined.take_piece(*piece, fetched)?;
            }
            chain = later;
        }
        Ok(())
    }

    /// Gives the `.partial` up to the end of its valid WAL and zeros behind it: what
    /// promotion left there may be remains of an older segment.
    async fn fetch_partial(
        &self,
        key: &Key,
        size: SegmentSize,
        sink: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<u64, RepoError> {
        let partial = self.fetch_sealed(key).await?;
        let summary = partial.header.wal.as_ref();
        let valid = summary.map_or(0, |wal| wal.end_lsn.0.saturating_sub(wal.start_lsn.0));
        let valid = valid.min(size.bytes());
        let mut left = valid;
        partial.unseal(|block| {
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
            left -= n as u64;
            sink(&block[..n])
        })?;
        fill(size.bytes() - valid, sink)
            .map_err(|cause| RepoError::Sink { key: key.clone(), cause })?;
        Ok(valid)
    }

    fn pieces_key(&self, wanted: Wanted) -> Key {
        Key::new(self.place().pieces_dir(wanted.system_id, wanted.segment))
    }

    fn went_away(&self, wanted: Wanted) -> RepoError {
        let cause =
            "pieces went away while they were read, and what replaced them was not found".into();
        StoreError::Unavailable { key: self.pieces_key(wanted), cause }.into()
    }
}

/// What was given to the sink so far: the bytes from the segment's start to `end`.
struct Joined<S> {
    end: u32,
    /// Over those bytes.
    hasher: blake3::Hasher,
    /// Over the same, as long as they come from pieces.
    walk: Option<SegmentWalk>,
    has_units_only: bool,
    sink: S,
}

impl<S: FnMut(&[u8]) -> io::Result<()>> Joined<S> {
    fn new(wanted: Wanted, sink: S) -> Self {
        let Wanted { system_id, segment, size } = wanted;
        let expectation = SegmentExpectation::of(segment, size, Some(system_id), Extent::Prefix);
        let hasher = blake3::Hasher::new();
        Self { end: 0, hasher, walk: expectation.map(SegmentWalk::new), has_units_only: true, sink }
    }

    /// Takes a piece that begins at or before the end so far.
    fn take_piece(&mut self, piece: ListedPiece, fetched: Fetched) -> Result<(), RepoError> {
        let mut skip = (self.end - piece.start) as usize;
        fetched.unseal(|block| {
            let n = skip.min(block.len());
            skip -= n;
            let fresh = &block[n..];
            self.hasher.update(fresh);
            if let Some(walk) = &mut self.walk {
                // A prefix that ends as WAL is found by `check`; one that is none from its first page on as well.
                let _ = walk.feed(fresh);
            }
            (self.sink)(fresh)
        })?;
        self.end = piece.end;
        self.has_units_only &= piece.is_unit();
        Ok(())
    }

    /// Takes the rest from the complete segment, whose beginning must be what was taken before.
    fn take_whole(&mut self, whole: Fetched) -> Result<(), RepoError> {
        let key = whole.key.clone();
        let mut skip = self.end as usize;
        let mut skipped = blake3::Hasher::new();
        let before = self.hasher.finalize();
        let (mut is_compared, mut differs) = (self.end == 0, false);
        let outcome = whole.unseal(|block| {
            let (known, fresh) = block.split_at(skip.min(block.len()));
            skip -= known.len();
            skipped.update(known);
            if skip == 0 && !is_compared {
                is_compared = true;
                differs = skipped.finalize() != before;
            }
            if differs {
                return Err(io::Error::other("the bytes differ"));
            }
            self.hasher.update(fresh);
            if fresh.is_empty() { Ok(()) } else { (self.sink)(fresh) }
        });
        if differs {
            let why = "it differs from the pieces that stood for it before";
            return Err(RepoError::damaged(&key, why));
        }
        let header = outcome?;
        self.end = u32::try_from(header.plain_bytes).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Checks that the pieces, joined, are valid WAL: a record or page may be cut by their very end only.
    fn check(&mut self, key: &Key) -> Result<(), RepoError> {
        let walk = self.walk.take();
        let walk = walk.ok_or_else(|| RepoError::damaged(key, "no segment has that name"))?;
        let valid_end = walk.valid_end();
        let damage = match walk.finish().map(|facts| facts.end) {
            Ok(WalkEnd::Full | WalkEnd::Switched | WalkEnd::Cut) => return Ok(()),
            Ok(WalkEnd::Stopped(damage)) | Err(damage) => damage,
        };
        Err(RepoError::damaged(
            key,
            format_args!("joined, its pieces are valid WAL only up to {valid_end}: {damage}"),
        ))
    }
}

/// Returns how many of the first pieces are read at a time, at least one.
fn in_flight(chain: &[ListedPiece]) -> usize {
    let mut bytes = 0;
    let fits = |piece: &&ListedPiece| {
        bytes += piece.size_bytes;
        bytes <= PIECES_IN_FLIGHT_BYTES
    };
    chain.iter().take(PIECES_IN_FLIGHT).take_while(fits).count().max(1)
}

/// Chooses pieces that go on from `at` and follow each other without a hole, as few as possible;
/// `pieces` is sorted and may overlap.
pub(super) fn unbroken_pieces(pieces: &[ListedPiece], mut at: u32) -> Vec<ListedPiece> {
    let mut chain = Vec::new();
    let mut rest = pieces;
    loop {
        // Those that begin later are looked at again from the next place on, the others never.
        let reaching = rest.partition_point(|piece| piece.start <= at);
        let (candidates, later) = rest.split_at(reaching);
        match candidates.iter().max_by_key(|piece| piece.end).filter(|piece| piece.end > at) {
            Some(&piece) => {
                chain.push(piece);
                at = piece.end;
                rest = later;
            }
            None => return chain,
        }
    }
}

fn check_length(key: &Key, header: &Header, expected_bytes: u64) -> Result<(), RepoError> {
    if header.plain_bytes == expected_bytes {
        return Ok(());
    }
    let found_bytes = header.plain_bytes;
    Err(RepoError::damaged(
        key,
        format_args!("it holds {found_bytes} bytes, and its name says {expected_bytes}"),
    ))
}

fn fill(mut bytes: u64, sink: &mut impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    while bytes > 0 {
        let n = usize::try_from(bytes).unwrap_or(usize::MAX).min(ZEROS.len());
        sink(&ZEROS[..n])?;
        bytes -= n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
