//! WAL files in the repository: sealing one while it is read, storing and fetching small ones.
//! Segments are fetched by `wal_fetch`, streamed ones made by `assembly`.

use std::collections::BTreeSet;
use std::io::{self, Write};

use super::{Put, RepoError, Repository, SealedObject};
use crate::format::{Codec, FrameWriter, Header, Kind, WalObject};
use crate::pg::{SegmentName, SystemId, Timeline, WalFileName};
use crate::store::{BodyWriter, Key};

/// The size of the pieces that stand for a segment larger than this (its *units*), so that one put and its
/// memory stay bounded (an archiving process has 64 MiB). No piece is longer or crosses from one unit to the next.
pub const PIECE_BYTES: u32 = 16 << 20;

/// Segments up to this size are one object when they are complete.
pub const WHOLE_SEGMENT_BYTES_MAX: u64 = PIECE_BYTES as u64;

/// Seals a file while its bytes are read: compresses and hashes in one pass.
#[derive(Debug)]
pub struct WalSealer {
    hasher: blake3::Hasher,
    frames: FrameWriter<BodyWriter>,
    plain_bytes: u64,
}

impl WalSealer {
    /// Begins an object; `plain_bytes` must be its exact length where it is known.
    pub fn new(codec: Codec, plain_bytes: Option<u64>) -> io::Result<Self> {
        Ok(Self {
            hasher: blake3::Hasher::new(),
            frames: FrameWriter::into(codec, plain_bytes, BodyWriter::default())?,
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
        let body = self.frames.finish()?.finish();
        header.plain_bytes = self.plain_bytes;
        header.stored_bytes = body.len();
        header.blake3 = Some(self.hasher.finalize().to_hex().to_string());
        Ok(SealedObject { header, body })
    }
}

impl Repository {
    /// Returns the key of a WAL object.
    pub fn wal_key(&self, system_id: SystemId, object: WalObject) -> Key {
        Key::new(self.place().wal(system_id, object))
    }

    /// Returns the key of a segment's complete object.
    pub(super) fn segment_key(&self, system_id: SystemId, segment: SegmentName) -> Key {
        self.wal_key(system_id, WalObject::File(WalFileName::Segment(segment)))
    }

    /// Makes sure that what is seen of these segments is there after a crash too, though whoever stored it may have died
    /// in that very moment. To be called before somebody is told of it.
    pub async fn settle_segments(
        &self,
        system_id: SystemId,
        segments: impl IntoIterator<Item = SegmentName>,
    ) -> Result<(), RepoError> {
        let mut directories = BTreeSet::new();
        for segment in segments {
            directories.insert(self.place().wal_group_dir(system_id, &segment.group()));
            directories.insert(self.place().pieces_dir(system_id, segment));
        }
        for directory in directories {
            self.store().settle(&Key::new(directory)).await?;
        }
        Ok(())
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
}
