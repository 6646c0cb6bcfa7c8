//! The backup before this one: looking up a file's chunks in it, in bounded memory.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use super::frames::FrameFetcher;
use super::path_index::{HashedSet, PathIndex};
use super::{RepoError, Repository};
use crate::format::{BackupId, ChunkEntry, ChunkMap, FileContent, FileEntry, FileStamp, FrameRef};

/// List frames that are held, of about 1 MiB each.
const CACHED_MAX: usize = 4;

/// Bytes that the index holds for one file: its path, and its look or its size.
const INDEX_ENTRY_BYTES: u64 = 24;

/// Files of an earlier backup that can be told unchanged by how they look, as hashes of path, size and
/// stamp. Two that share one of 64 bits are told apart when the file's line is looked up.
#[derive(Debug, Default)]
pub struct KnownFiles {
    looks: HashedSet,
    hasher: RandomState,
    /// Hash of a path, then the size, for files whose chunks stand in maps; sorted.
    mapped: Vec<(u64, u64)>,
}

impl KnownFiles {
    /// Returns whether a file that looks like this is among them.
    pub fn holds(&self, path: &[u8], size: u64, stamp: FileStamp) -> bool {
        self.looks.holds((path, size, stamp))
    }

    /// Returns the size of a file whose chunks stand in maps.
    pub fn size_of(&self, path: &[u8]) -> Option<u64> {
        let hash = self.hasher.hash_one(path);
        let at = self.mapped.binary_search_by_key(&hash, |(hash, _)| *hash).ok()?;
        Some(self.mapped[at].1)
    }

    fn add_mapped(&mut self, entry: &FileEntry) {
        if matches!(entry.content, FileContent::Maps(_)) {
            self.mapped.push((self.hasher.hash_one(entry.path.as_slice()), entry.size));
        }
    }

    fn add(&mut self, entry: &FileEntry) {
        if let Some(stamp) = entry.stamp {
            self.looks.add((entry.path.as_slice(), entry.size, stamp));
        }
    }

    fn close(&mut self) {
        self.looks.close();
        self.mapped.sort_unstable();
    }
}

/// An index from path to line of the parent's file list.
#[derive(Debug)]
pub struct ParentFiles {
    repository: Repository,
    fetcher: FrameFetcher,
    id: BackupId,
    index: PathIndex,
    frames: Vec<FrameRef>,
    known: Arc<KnownFiles>,
    /// The list frames read last, the newest last: neighbours in one backup are neighbours in the next, or were so
    /// in another order of one directory.
    cached: VecDeque<(u32, HashMap<Vec<u8>, FileEntry>)>,
}

impl ParentFiles {
    /// Reads the parent's whole file list once and indexes it. Of files with a stamp, those that
    /// `can_be_known` takes are remembered by how they looked. Files beyond `index_bytes_max` are stored anew instead of
    /// being referenced: dearer, never wrong.
    pub async fn load(
        repository: &Repository,
        id: &BackupId,
        index_bytes_max: u64,
        can_be_known: impl Fn(&FileEntry) -> bool,
    ) -> Result<Self, RepoError> {
        let list = repository.file_index(id).await?;
        let entries_max =
            usize::try_from(index_bytes_max / INDEX_ENTRY_BYTES).unwrap_or(usize::MAX);
        let capacity = usize::try_from(list.entries).unwrap_or(usize::MAX).min(entries_max);
        let mut index = PathIndex::with_capacity(capacity);
        let mut known = KnownFiles::default();
        for (number, frame) in list.frames.iter().enumerate() {
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            for entry in repository.file_entries(frame).await? {
                if index.len() < entries_max {
                    index.add(&entry.path, number);
                    known.add_mapped(&entry);
                    if entry.stamp.is_some() && can_be_known(&entry) {
                        known.add(&entry);
                    }
                }
            }
        }
        if list.entries > entries_max as u64 {
            tracing::warn!(
                "backup {id} has {} files, of which {entries_max} can be looked up in the memory that there is: the others are stored anew; a higher memory_max changes that",
                list.entries
            );
        }
        index.close();
        known.close();
        let (fetcher, frames) = (FrameFetcher::new(repository.clone()), list.frames);
        let repository = repository.clone();
        let (id, known, cached) = (id.clone(), Arc::new(known), VecDeque::new());
        Ok(Self { repository, fetcher, id, index, frames, known, cached })
    }

    /// Returns the files that can be told unchanged.
    pub fn known(&self) -> Arc<KnownFiles> {
        Arc::clone(&self.known)
    }

    /// Returns the parent's id.
    pub fn id(&self) -> &BackupId {
        &self.id
    }

    /// Returns the parent's entry of a path.
    pub async fn entry(&mut self, path: &[u8]) -> Result<Option<FileEntry>, RepoError> {
        let frames: Vec<u32> = self.index.frames_of(path).collect();
        for number in frames {
            if let Some(entry) = self.entry_in(number, path).await? {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    async fn entry_in(&mut self, number: u32, path: &[u8]) -> Result<Option<FileEntry>, RepoError> {
        if !self.cached.iter().any(|(cached, _)| *cached == number) {
            let Some(frame) = self.frames.get(number as usize) else { return Ok(None) };
            let entries = self.repository.file_entries(frame).await?;
            let by_path = entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect();
            if self.cached.len() >= CACHED_MAX {
                self.cached.pop_front();
            }
            self.cached.push_back((number, by_path));
        }
        let found = self.cached.iter().find(|(cached, _)| *cached == number);
        Ok(found.and_then(|(_, entries)| entries.get(path).cloned()))
    }

    /// Returns the chunks of an entry that one of its maps describes, or all if they are inline.
    pub async fn chunks(
        &self,
        entry: &FileEntry,
        map: usize,
    ) -> Result<Vec<ChunkEntry>, RepoError> {
        Ok(self.map(entry, map).await?.chunks)
    }

    /// Returns one map of an entry, as [`Self::chunks`] does, with the checksums that it has.
    pub async fn map(&self, entry: &FileEntry, map: usize) -> Result<ChunkMap, RepoError> {
        match &entry.content {
            FileContent::Inline(chunks) if map == 0 => {
                Ok(ChunkMap { chunks: chunks.clone(), crcs: Vec::new() })
            }
            FileContent::Inline(_) => Ok(ChunkMap::default()),
            FileContent::Maps(maps) => match maps.get(map) {
                None => Ok(ChunkMap::default()),
                Some(frame) => self.fetcher.map(frame).await,
            },
        }
    }
}
