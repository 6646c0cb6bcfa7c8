//! What backups that were never finished have stored: found again by its digest.
//!
//! Packs tell by themselves what is in them (their index). A piece is only taken where the bytes that the
//! new backup has in hand have its digest and its length, so nothing rests on what was read back then; what is
//! saved is compressing and storing it again. A pack is believed if its header and its index can be read
//! and it has the length that they say, as a parent's packs are.
//!
//! Memory is bounded whatever had been stored: backups of one server come by their files in the same order, so
//! of each unfinished backup the packs around the last find are held, and those further back are let go.
//!
//! Never here: which unfinished backups may be leaned on. Whoever asks must have named them in its own
//! `begun.json` before.

use std::collections::{HashMap, VecDeque};

use futures_util::{StreamExt, stream};

use super::{RepoError, Repository};
use crate::format::{
    BackupId, ChunkDigest, FrameRef, Header, IndexedFrame, Kind, PACK_HEADER_BYTES, Packing, Run,
    decode_pack_index, read_frames,
};
use crate::pg::SystemId;
use crate::store::Key;

/// Pieces of one unfinished backup that are held, about 100 bytes each: 512 MiB of chunks. What one more batch of
/// packs brings may come on top.
const PIECES_HELD_MAX: usize = 8 << 10;

/// Packs that are held behind the one that something was found in last: pieces are recorded in order, but
/// pages of a few files may come a little later.
const PACKS_BEHIND: usize = 2;

/// Packs whose index is read at a time.
const IN_FLIGHT: usize = 4;

/// No index of ours is longer before compression: 64 MiB of pages of 8 KiB that compress 100 times.
const INDEX_PLAIN_MAX: u32 = 32 << 20;

/// What unfinished backups have stored.
#[derive(Debug, Default)]
pub struct Leftovers {
    backups: Vec<Leftover>,
}

#[derive(Debug)]
struct Leftover {
    id: BackupId,
    /// Packs that were not read yet.
    ahead: VecDeque<u32>,
    /// Packs that are held, in order, each with its frames.
    held: VecDeque<PackPieces>,
    pieces: HashMap<ChunkDigest, Place>,
    taken_bytes: u64,
}

#[derive(Debug)]
struct PackPieces {
    number: u32,
    digests: Vec<ChunkDigest>,
}

/// Where a piece stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    pack: u32,
    packing: Packing,
    offset: u32,
    stored: u32,
    plain: u32,
    in_frame: u32,
    bytes: u32,
}

impl Leftovers {
    /// Returns what the unfinished backups `ids`, oldest first, have stored of the cluster `system_id`. The backup in
    /// the making must name them in its `begun.json`, which must stand by now. One whose `begun.json` is gone, or
    /// that has a file list, is left alone: whoever removes a backup may be at work on it.
    ///
    /// # Errors
    /// The store's only. What is damaged is left alone.
    pub async fn find(
        repository: &Repository,
        system_id: SystemId,
        ids: &[BackupId],
    ) -> Result<Self, RepoError> {
        let mut backups = Vec::new();
        for id in ids {
            if !repository.may_be_leaned_on(id).await? {
                continue;
            }
            let ahead = repository.pack_numbers(id).await?.into();
            let mut leftover = Leftover {
                id: id.clone(),
                ahead,
                held: VecDeque::new(),
                pieces: HashMap::new(),
                taken_bytes: 0,
            };
            leftover.fill(repository, system_id).await?;
            if !leftover.held.is_empty() {
                backups.push(leftover);
            }
        }
        Ok(Self { backups })
    }

    /// Returns whether there is nothing to be found.
    pub fn is_empty(&self) -> bool {
        self.backups.is_empty()
    }

    /// Returns the backups of which something is held, oldest first.
    pub fn ids(&self) -> impl Iterator<Item = &BackupId> {
        self.backups.iter().map(|backup| &backup.id)
    }

    /// Returns the backups of which something was found, oldest first.
    pub fn ids_taken(&self) -> Vec<BackupId> {
        let taken = self.backups.iter().filter(|backup| backup.taken_bytes > 0);
        taken.map(|backup| backup.id.clone()).collect()
    }

    /// Returns the plain bytes that were found so far.
    pub fn taken_bytes(&self) -> u64 {
        self.backups.iter().map(|backup| backup.taken_bytes).sum()
    }

    /// Returns where bytes with this digest and length stand, as a run that begins a chunk.
    pub(super) async fn take(
        &mut self,
        repository: &Repository,
        system_id: SystemId,
        digest: ChunkDigest,
        bytes: u32,
    ) -> Result<Option<Run>, RepoError> {
        for backup in &mut self.backups {
            let Some(place) = backup.pieces.get(&digest).copied() else { continue };
            if place.bytes != bytes {
                continue;
            }
            backup.taken_bytes += u64::from(bytes);
            let frame = FrameRef {
                backup: backup.id.clone(),
                pack: place.pack,
                offset: place.offset,
                stored: place.stored,
                plain: place.plain,
                codec: place.packing,
            };
            backup.go_on_from(place.pack);
            backup.fill(repository, system_id).await?;
            return Ok(Some(Run { frame, in_frame: place.in_frame, in_chunk: 0, bytes }));
        }
        Ok(None)
    }
}

impl Leftover {
    /// Lets go of packs that lie well behind one, as long as others wait for their room.
    fn go_on_from(&mut self, pack: u32) {
        while !self.ahead.is_empty()
            && let Some(kept_from) = self.held.get(PACKS_BEHIND)
            && kept_from.number <= pack
            && let Some(gone) = self.held.pop_front()
        {
            for digest in gone.digests {
                if self.pieces.get(&digest).is_some_and(|place| place.pack == gone.number) {
                    self.pieces.remove(&digest);
                }
            }
        }
    }

    /// Reads the indexes of further packs while there is room for them.
    async fn fill(
        &mut self,
        repository: &Repository,
        system_id: SystemId,
    ) -> Result<(), RepoError> {
        while !self.ahead.is_empty() && self.pieces.len() < PIECES_HELD_MAX {
            let next = self.ahead.len().min(IN_FLIGHT);
            let numbers: Vec<u32> = self.ahead.drain(..next).collect();
            let id = &self.id;
            let mut reading = stream::iter(numbers)
                .map(|number| async move {
                    (number, repository.pack_index(id, number, system_id).await)
                })
                .buffered(IN_FLIGHT);
            let mut found = Vec::new();
            while let Some((number, outcome)) = reading.next().await {
                match outcome {
                    Ok(Some((packing, frames))) => found.push((number, packing, frames)),
                    Ok(None) => {}
                    Err(error) if error.is_damage() => {
                        tracing::warn!("a pack of the unfinished backup {id} is not used: {error}");
                    }
                    Err(error) if error.is_absent() => {
                        tracing::warn!("a pack of the unfinished backup {id} is not used: {error}");
                    }
                    Err(error) => return Err(error),
                }
            }
            drop(reading);
            for (number, packing, frames) in found {
                self.hold(number, packing, frames);
            }
        }
        Ok(())
    }

    fn hold(&mut self, number: u32, packing: Packing, frames: Vec<IndexedFrame>) {
        let mut digests = Vec::new();
        for frame in frames {
            for piece in frame.pieces {
                let place = Place {
                    pack: number,
                    packing,
                    offset: frame.offset,
                    stored: frame.stored,
                    plain: frame.plain,
                    in_frame: piece.in_frame,
                    bytes: piece.bytes,
                };
                self.pieces.insert(piece.digest, place);
                digests.push(piece.digest);
            }
        }
        self.held.push_back(PackPieces { number, digests });
    }
}

impl Repository {
    /// Returns whether an unfinished backup may be leaned on by one that has named it: its `begun.json` stands, and
    /// it has no file list, so that it was never committed.
    async fn may_be_leaned_on(&self, id: &BackupId) -> Result<bool, RepoError> {
        // In this order: who removes a backup that was committed once removes its list after its packs.
        let files = self.header(&Key::new(self.place().files(id))).await;
        let never_committed = matches!(&files, Err(error) if error.is_absent());
        if !never_committed {
            return match files {
                Ok(_) => Ok(false),
                Err(error) if error.is_damage() => Ok(false),
                Err(error) => Err(error),
            };
        }
        match self.begun(id).await {
            Ok(begun) => Ok(begun.is_some()),
            Err(error) if error.is_damage() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns the numbers of the packs that a backup has, ascending.
    async fn pack_numbers(&self, id: &BackupId) -> Result<Vec<u32>, RepoError> {
        let level = self.store().list_level(&Key::new(self.place().packs_dir(id))).await?;
        let of_name = |key: &Key| key.as_str().rsplit('/').next()?.parse().ok();
        let mut numbers: Vec<u32> =
            level.objects.iter().filter_map(|object| of_name(&object.key)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Reads the index of a pack; `None` if it holds no data, or another cluster's.
    pub(super) async fn pack_index(
        &self,
        id: &BackupId,
        number: u32,
        system_id: SystemId,
    ) -> Result<Option<(Packing, Vec<IndexedFrame>)>, RepoError> {
        let key = Key::new(self.place().pack(id, number));
        let header: Header = self.header(&key).await?;
        let Some(at) = header.index else { return Ok(None) };
        if header.kind != Kind::Pack || header.system_identifier != system_id {
            return Ok(None);
        }
        let wrong = |why: &str| RepoError::damaged(&key, why);
        let body_end = PACK_HEADER_BYTES as u64 + header.stored_bytes;
        if u64::from(at.offset) + u64::from(at.stored) > body_end || at.plain > INDEX_PLAIN_MAX {
            return Err(wrong("its index lies outside of it"));
        }
        let range = u64::from(at.offset)..u64::from(at.offset) + u64::from(at.stored);
        let reading = self.store().read(&key, Some(range)).await?;
        let stored = super::objects::collect(&key, reading.bytes, u64::from(at.stored)).await?;
        let mut plain = Vec::with_capacity(at.plain as usize);
        read_frames(header.codec, &stored.concat()[..], u64::from(at.plain), |block| {
            plain.extend_from_slice(block);
            Ok::<_, crate::format::CodecError>(())
        })
        .map_err(|error| RepoError::of_codec(&key, &error))?;
        let frames = decode_pack_index(&plain).map_err(|error| RepoError::damaged(&key, error))?;
        let fits = |frame: &IndexedFrame| {
            frame.offset as usize >= PACK_HEADER_BYTES
                && u64::from(frame.offset) + u64::from(frame.stored) <= u64::from(at.offset)
        };
        if !frames.iter().all(fits) {
            return Err(wrong("its index names frames outside of it"));
        }
        Ok(Some((header.codec, frames)))
    }
}
