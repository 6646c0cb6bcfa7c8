//! WAL in the repository: sealing a file while it is read, and joining a
//! segment again from whatever stands for it.

use std::io::{self, Write};

use super::{Put, RepoError, Repository, SealedObject};
use crate::format::{Codec, FrameWriter, Header, Kind, WalObject, parse_wal_object};
use crate::pg::{SegmentName, SegmentSize, SystemId, Timeline, WalFileName};
use crate::store::{Body, Key};

/// The size of the pieces that stand for a segment larger than this (its *units*), so that one put and its
/// memory stay bounded (an archiving process has 64 MiB). No piece is longer or crosses from one unit to the next.
pub const PIECE_BYTES: u32 = 16 << 20;

/// Segments up to this size are one object when they are complete.
pub const WHOLE_SEGMENT_BYTES_MAX: u64 = PIECE_BYTES as u64;

/// A block of zeros for filling up a segment.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Seals a file while its bytes are read: compresses and hashes in one pass.
#[derive(Debug)]
pub struct WalSealer {
    hasher: blake3::Hasher,
    frames: FrameWriter,
    plain_bytes: u64,
}

impl WalSealer {
    /// Begins an object; `plain_bytes` must be its exact length where it is known.
    pub fn new(codec: Codec, plain_bytes: Option<u64>) -> io::Result<Self> {
        Ok(Self {
            hasher: blake3::Hasher::new(),
            frames: FrameWriter::new(codec, plain_bytes)?,
            plain_bytes: 0,
        })
    }

    /// Takes the next bytes.
    pub fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.plain_bytes += bytes.len() as u64;
        self.frames.write_all(bytes)
    }

    /// Ends the object and completes its header with lengths and digest.
    pub fn finish(self, mut header: Header) -> io::Result<SealedObject> {
        let body = Body::from(self.frames.finish()?);
        header.plain_bytes = self.plain_bytes;
        header.stored_bytes = body.len();
        header.blake3 = Some(self.hasher.finalize().to_hex().to_string());
        Ok(SealedObject { header, body })
    }
}

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

impl Repository {
    /// Returns the key of a WAL object.
    pub fn wal_key(&self, system_id: SystemId, object: WalObject) -> Key {
        Key::new(self.place().wal(system_id, object))
    }

    /// Stores a small WAL file (history or backup history) that is at hand; see
    /// [`Self::put_sealed`].
    pub async fn put_small(
        &self,
        system_id: SystemId,
        name: WalFileName,
        bytes: &[u8],
        codec: Codec,
    ) -> Result<(Put, SealedObject), RepoError> {
        let kind = match name {
            WalFileName::History(_) => Kind::TimelineHistory,
            _ => Kind::BackupHistory,
        };
        let key = self.wal_key(system_id, WalObject::File(name));
        let header = Header::new(kind, self.below(&key), system_id, codec.packing());
        let sealed = WalSealer::new(codec, Some(bytes.len() as u64))
            .and_then(|mut sealer| sealer.push(bytes).and_then(|()| sealer.finish(header)))
            .map_err(RepoError::task)?;
        Ok((self.put_sealed(&key, &sealed).await?, sealed))
    }

    /// Fetches one segment, always of full size, from the complete object, else from pieces, else
    /// from the `.partial`. `None` means that the store said of each that it is not
    /// there; that the repository itself is there is checked before that is believed.
    ///
    /// # Errors
    /// Anything but certain absence. The sink may have taken bytes by then.
    pub async fn fetch_segment(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
        mut sink: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<Option<SegmentSource>, RepoError> {
        let key = self.wal_key(system_id, WalObject::File(WalFileName::Segment(segment)));
        match self.fetch_sized(&key, size, &mut sink).await {
            Ok(_) => return Ok(Some(SegmentSource::Whole)),
            Err(error) if error.is_absent() => {}
            Err(error) => return Err(error),
        }
        let pieces = self.pieces(system_id, segment).await?;
        let chain = unbroken_prefix(&pieces);
        if let Some(valid_bytes) = chain.last().map(|piece| u64::from(piece.1)) {
            self.join_pieces(system_id, segment, &chain, &mut sink).await?;
            fill(size.bytes() - valid_bytes.min(size.bytes()), &mut sink)
                .map_err(|cause| RepoError::Sink { key, cause })?;
            return Ok(Some(SegmentSource::Pieces { valid_bytes }));
        }
        let partial = self.wal_key(system_id, WalObject::File(WalFileName::Partial(segment)));
        match self.fetch_partial(&partial, size, &mut sink).await {
            Ok(valid_bytes) => Ok(Some(SegmentSource::Partial { valid_bytes })),
            Err(error) if error.is_absent() => {
                self.identity(system_id).await?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Fetches a small WAL file (history or backup history) whole; `None` as for
    /// [`Self::fetch_segment`].
    pub async fn fetch_small(
        &self,
        system_id: SystemId,
        name: WalFileName,
    ) -> Result<Option<Vec<u8>>, RepoError> {
        let key = self.wal_key(system_id, WalObject::File(name));
        let mut bytes = Vec::new();
        let take = |block: &[u8]| {
            bytes.extend_from_slice(block);
            Ok(())
        };
        match self.fetch(&key, take).await {
            Ok(_) => Ok(Some(bytes)),
            Err(error) if error.is_absent() => {
                self.identity(system_id).await?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Fetches a timeline's history file.
    pub async fn fetch_history(
        &self,
        system_id: SystemId,
        timeline: Timeline,
    ) -> Result<Option<Vec<u8>>, RepoError> {
        self.fetch_small(system_id, WalFileName::History(timeline)).await
    }

    async fn fetch_sized(
        &self,
        key: &Key,
        size: SegmentSize,
        sink: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<Header, RepoError> {
        let header = self.fetch(key, |block| sink(block)).await?;
        if header.plain_bytes == size.bytes() {
            Ok(header)
        } else {
            Err(RepoError::damaged(
                key,
                format_args!("it holds {} bytes, not a segment of {size}", header.plain_bytes),
            ))
        }
    }

    /// Gives the `.partial` up to the end of its valid WAL and zeros behind it: what
    /// promotion left there may be remains of an older segment.
    async fn fetch_partial(
        &self,
        key: &Key,
        size: SegmentSize,
        sink: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<u64, RepoError> {
        let summary = self.header(key).await?.wal;
        let valid = summary.map_or(0, |wal| wal.end_lsn.0.saturating_sub(wal.start_lsn.0));
        let valid = valid.min(size.bytes());
        let mut left = valid;
        let take = |block: &[u8]| {
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
            left -= n as u64;
            sink(&block[..n])
        };
        self.fetch(key, take).await?;
        fill(size.bytes() - valid, sink)
            .map_err(|cause| RepoError::Sink { key: key.clone(), cause })?;
        Ok(valid)
    }

    /// Lists the pieces of a segment as offsets, sorted.
    async fn pieces(
        &self,
        system_id: SystemId,
        segment: SegmentName,
    ) -> Result<Vec<(u32, u32)>, RepoError> {
        let directory = self.place().pieces_dir(system_id, segment);
        let root = format!("{}/", self.place().wal_dir(system_id));
        let level = self.store().list_level(&Key::new(directory)).await?;
        let mut pieces: Vec<(u32, u32)> = level
            .objects
            .iter()
            .filter_map(|object| object.key.as_str().strip_prefix(&root))
            .filter_map(|tail| match parse_wal_object(tail)? {
                WalObject::Piece { start, end, .. } => Some((start, end)),
                WalObject::File(_) | WalObject::Damaged(_) => None,
            })
            .collect();
        pieces.sort_unstable();
        Ok(pieces)
    }

    async fn join_pieces(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        chain: &[(u32, u32)],
        sink: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), RepoError> {
        let mut at: u32 = 0;
        for &(start, end) in chain {
            let key = self.wal_key(system_id, WalObject::Piece { segment, start, end });
            let mut skip = (at - start) as usize;
            let take = |block: &[u8]| {
                let n = skip.min(block.len());
                skip -= n;
                sink(&block[n..])
            };
            let header = self.fetch(&key, take).await?;
            if header.plain_bytes != u64::from(end - start) {
                return Err(RepoError::damaged(&key, "it has another length than its name says"));
            }
            at = end;
        }
        Ok(())
    }
}

/// Chooses pieces that follow each other from offset 0 without a hole, as few as
/// possible; `pieces` is sorted and may overlap.
pub(super) fn unbroken_prefix(pieces: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let mut chain = Vec::new();
    let mut at = 0;
    loop {
        let reaching = pieces.iter().filter(|(start, end)| *start <= at && *end > at);
        match reaching.max_by_key(|(_, end)| *end) {
            Some(&piece) => {
                chain.push(piece);
                at = piece.1;
            }
            None => return chain,
        }
    }
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
mod tests {
    use super::*;

    #[test]
    fn pieces_are_joined_only_where_they_are_unbroken() {
        assert_eq!(unbroken_prefix(&[]), []);
        assert_eq!(unbroken_prefix(&[(8, 16)]), [], "no start");
        assert_eq!(unbroken_prefix(&[(0, 8), (8, 16), (24, 32)]), [(0, 8), (8, 16)]);
        assert_eq!(unbroken_prefix(&[(0, 4), (0, 12), (4, 8), (8, 20)]), [(0, 12), (8, 20)]);
    }

    proptest::proptest! {
        /// A byte is in the chain exactly if every byte up to it is in some piece.
        #[test]
        fn the_chain_covers_exactly_the_unbroken_bytes(
            mut pieces in proptest::collection::vec((0u32..24, 1u32..8), 0..10),
        ) {
            for piece in &mut pieces {
                piece.1 += piece.0;
            }
            pieces.sort_unstable();
            let stored = |byte: u32| pieces.iter().any(|(start, end)| (*start..*end).contains(&byte));
            let unbroken = (0..40).find(|byte| !stored(*byte)).unwrap_or(40);
            let chain = unbroken_prefix(&pieces);
            proptest::prop_assert_eq!(chain.last().map_or(0, |piece| piece.1), unbroken);
            let mut at = 0;
            for piece in &chain {
                proptest::prop_assert!(pieces.contains(piece));
                proptest::prop_assert!(piece.0 <= at && at < piece.1, "each carries on: {:?}", chain);
                at = piece.1;
            }
        }
    }
}
