//! Proving single objects: that each is what its name says, and whole.
//!
//! Owns what is looked at in each kind of object, either in its header alone or in every byte. Never here: which objects
//! there should be, or what is lost where one is not (`ops::verify`).

use super::frames::FrameFetcher;
use super::objects::collect;
use super::wal_tidy::believe;
use super::{RepoError, Repository};
use crate::format::{
    BackupId, Depth, Document, FileIndex, FrameRef, Header, KeyMark, KeyObject, Kind, WalObject,
    WalSummary, WrappedKey, digest_chunk,
};
use crate::pg::{Lsn, SegmentSize, SystemId, Timeline, TimelineHistory, WalFileName};
use crate::store::Key;

/// No pack is longer; see `docs/format.md`.
const PACK_BYTES_MAX: u64 = 64 << 20;

/// What proving an object took, and showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Proven {
    /// Bytes that were read, as stored.
    pub read_bytes: u64,
    /// The digest of its body as it is stored; only where all of it was read.
    pub stored_digest: Option<blake3::Hash>,
}

impl Repository {
    /// Proves one object of WAL.
    ///
    /// # Errors
    /// [`RepoError::Damaged`], [`RepoError::NotReadable`] and absence tell about the object; others about the store.
    pub async fn prove_wal(
        &self,
        system_id: SystemId,
        size: SegmentSize,
        object: WalObject,
        depth: Depth,
    ) -> Result<Proven, RepoError> {
        let key = self.wal_key(system_id, object);
        let expected = expected_of(object, size);
        // A history file is small, and what it says must be usable.
        if depth == Depth::Header && expected.kind != Kind::TimelineHistory {
            let header = self.header(&key).await?;
            expected.check(&key, &header, system_id)?;
            return Ok(Proven::default());
        }
        let fetched = self.fetch_sealed(&key).await?;
        expected.check(&key, &fetched.header, system_id)?;
        let stored_digest = Some(fetched.body_digest());
        let mut small = Vec::new();
        let keeps = expected.kind == Kind::TimelineHistory;
        let header = fetched.unseal(|block| {
            if keeps {
                small.extend_from_slice(block);
            }
            Ok(())
        })?;
        if let WalObject::File(WalFileName::History(timeline)) = object {
            TimelineHistory::parse(timeline, &small)
                .map_err(|error| RepoError::damaged(&key, error))?;
        }
        Ok(Proven { read_bytes: header.stored_bytes, stored_digest })
    }

    /// Proves a pack: its header, or also every piece of data in it by the digest in its index. Maps and
    /// lists in it are read where they are referred to, by [`super::ContentProver`].
    ///
    /// # Errors
    /// As [`Self::prove_wal`].
    pub async fn prove_pack(
        &self,
        system_id: SystemId,
        id: &BackupId,
        number: u32,
        depth: Depth,
    ) -> Result<Proven, RepoError> {
        if depth == Depth::Header {
            let key = Key::new(self.place().pack(id, number));
            of_cluster(&key, &self.header(&key).await?, Kind::Pack, system_id)?;
            return Ok(Proven::default());
        }
        let bytes = self.proven_pack(system_id, id, number).await?;
        let read_bytes = bytes.len() as u64;
        Ok(Proven { read_bytes, stored_digest: Some(blake3::hash(&bytes)) })
    }

    /// Reads a whole pack, proves every piece of data in it, and returns its bytes.
    ///
    /// # Errors
    /// As [`Self::prove_wal`].
    pub(super) async fn proven_pack(
        &self,
        system_id: SystemId,
        id: &BackupId,
        number: u32,
    ) -> Result<Vec<u8>, RepoError> {
        let key = Key::new(self.place().pack(id, number));
        let header = self.header(&key).await?;
        of_cluster(&key, &header, Kind::Pack, system_id)?;
        let index = self.pack_index(id, number, system_id).await?;
        let reading = self.store().read(&key, None).await?;
        let size_bytes = reading.size_bytes;
        if size_bytes > PACK_BYTES_MAX {
            return Err(RepoError::damaged(&key, format_args!("it is {size_bytes} bytes long")));
        }
        let bytes = collect(&key, reading.bytes, PACK_BYTES_MAX).await?.concat();
        let fetcher = FrameFetcher::new(self.clone());
        if let Some((codec, frames)) = index {
            for indexed in frames {
                let frame = FrameRef {
                    backup: id.clone(),
                    pack: number,
                    offset: indexed.offset,
                    stored: indexed.stored,
                    plain: indexed.plain,
                    codec,
                };
                let range = frame.offset as usize..(frame.offset + frame.stored) as usize;
                let stored = bytes.get(range);
                let stored = stored.ok_or_else(|| RepoError::damaged(&key, "it was cut"))?;
                let plain = fetcher.decode(&frame, stored)?;
                for piece in indexed.pieces {
                    let (from, len) = (piece.in_frame as usize, piece.bytes as usize);
                    let fits = plain.get(from..from + len).map(digest_chunk) == Some(piece.digest);
                    if !fits {
                        let why = "a piece of data in it has not the digest in its index";
                        return Err(RepoError::damaged(&key, why));
                    }
                }
            }
        }
        Ok(bytes)
    }

    /// Proves a document about keys: that it can be read, and is about what its name says.
    ///
    /// # Errors
    /// As [`Self::prove_wal`].
    pub async fn prove_key_document(&self, object: KeyObject) -> Result<(), RepoError> {
        let key = Key::new(self.place().key(object));
        let is_its_own = match object {
            KeyObject::Wrapped { key: name, user_key } => {
                let wrapped: WrappedKey = self.document(&key).await?;
                wrapped.user_key == user_key
                    && (wrapped.number, wrapped.repository_key) == (name.number, name.id)
            }
            KeyObject::InUse(name) => self.document::<KeyMark>(&key).await?.key == name.id,
            KeyObject::Leaving { user_key, .. } => {
                self.document::<KeyMark>(&key).await?.key == user_key
            }
        };
        if is_its_own {
            return Ok(());
        }
        Err(RepoError::damaged(&key, "it is about another key than its name says"))
    }

    /// Proves the index of a backup's file list: always all of it, as it is small.
    ///
    /// # Errors
    /// As [`Self::prove_wal`].
    pub async fn prove_file_index(
        &self,
        system_id: SystemId,
        id: &BackupId,
    ) -> Result<Proven, RepoError> {
        let key = Key::new(self.place().files(id));
        let fetched = self.fetch_sealed(&key).await?;
        of_cluster(&key, &fetched.header, Kind::Files, system_id)?;
        let stored_digest = Some(fetched.body_digest());
        let mut json = Vec::new();
        let header = fetched.unseal(|block| {
            json.extend_from_slice(block);
            Ok(())
        })?;
        let index = FileIndex::parse(&json).map_err(|error| RepoError::of_document(&key, error))?;
        if index.id != *id || index.chunk_bytes != crate::format::CHUNK_BYTES {
            return Err(RepoError::damaged(&key, "it is the index of another backup"));
        }
        Ok(Proven { read_bytes: header.stored_bytes, stored_digest })
    }
}

/// What the header of an object of WAL must say.
pub(super) struct Expected {
    kind: Kind,
    plain_bytes: Option<u64>,
    /// Where its WAL begins, and on which timeline, as far as its name tells.
    start_lsn: Option<Lsn>,
    timeline: Option<Timeline>,
}

pub(super) fn expected_of(object: WalObject, size: SegmentSize) -> Expected {
    let start_of = |offset: u32| {
        let start = object.segment().and_then(|segment| segment.start_lsn(size));
        start.and_then(|start| start.checked_add(u64::from(offset)))
    };
    let timeline = object.segment().map(|segment| segment.timeline);
    let small = |kind| Expected { kind, plain_bytes: None, start_lsn: None, timeline: None };
    match object {
        WalObject::File(WalFileName::Segment(_)) => Expected {
            kind: Kind::Segment,
            plain_bytes: Some(size.bytes()),
            start_lsn: start_of(0),
            timeline,
        },
        WalObject::Piece { start, end, .. } => Expected {
            kind: Kind::Piece,
            plain_bytes: Some(u64::from(end - start)),
            start_lsn: start_of(start),
            // The first segment of a timeline begins with pages of the one before.
            timeline: None,
        },
        WalObject::File(WalFileName::Partial(_)) => {
            Expected { start_lsn: start_of(0), timeline, ..small(Kind::Partial) }
        }
        WalObject::File(WalFileName::Backup(..)) => small(Kind::BackupHistory),
        WalObject::File(WalFileName::History(_)) => small(Kind::TimelineHistory),
        WalObject::Damaged(_) => small(Kind::Damaged),
    }
}

impl Expected {
    pub(super) fn check(
        &self,
        key: &Key,
        header: &Header,
        system_id: SystemId,
    ) -> Result<(), RepoError> {
        believe(key, header, self.kind, system_id, self.plain_bytes.unwrap_or(header.plain_bytes))?;
        let fits = |wal: &WalSummary| {
            self.start_lsn.is_none_or(|start| start == wal.start_lsn)
                && self.timeline.is_none_or(|timeline| timeline == wal.timeline)
        };
        if header.wal.as_ref().is_none_or(fits) {
            return Ok(());
        }
        Err(RepoError::damaged(key, "its header tells of other WAL than its name"))
    }
}

/// Checks that an object is of a kind and of this cluster.
pub(super) fn of_cluster(
    key: &Key,
    header: &Header,
    kind: Kind,
    system_id: SystemId,
) -> Result<(), RepoError> {
    if header.kind != kind {
        return Err(RepoError::damaged(key, "its header does not say what its name says"));
    }
    if header.system_identifier != system_id {
        let owner = header.system_identifier;
        return Err(RepoError::damaged(key, format_args!("it is of the cluster {owner}")));
    }
    Ok(())
}
