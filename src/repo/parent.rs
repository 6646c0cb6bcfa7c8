//! The backup before this one: looking up a file's chunks in it, in bounded memory.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::pin::pin;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::future::try_join_all;

use super::frames::{FileList, FrameFetcher};
use super::{RepoError, Repository};
use crate::format::{
    BackupId, ChunkEntry, ChunkMap, FileContent, FileEntry, FileStamp, FrameRef, PageMap,
};

/// Paths that the index holds at most (48 MiB of memory). Files beyond are stored
/// anew instead of being referenced: dearer, never wrong.
const INDEX_MAX: usize = 1_500_000;

/// Files of an earlier backup that can be told unchanged by how they look, as hashes of path, size and
/// stamp. Two that share one of 64 bits are told apart when the file's line is looked up.
#[derive(Debug, Default)]
pub struct KnownFiles {
    hasher: RandomState,
    looks: HashSet<u64>,
    /// Hash of a path to the size, for files whose chunks stand in maps.
    mapped: HashMap<u64, u64>,
}

impl KnownFiles {
    /// Returns whether a file that looks like this is among them.
    pub fn holds(&self, path: &[u8], size: u64, stamp: FileStamp) -> bool {
        self.looks.contains(&self.hasher.hash_one((path, size, stamp)))
    }

    /// Returns the size of a file whose chunks stand in maps.
    pub fn size_of(&self, path: &[u8]) -> Option<u64> {
        self.mapped.get(&self.hasher.hash_one(path)).copied()
    }

    fn add_mapped(&mut self, entry: &FileEntry) {
        if matches!(entry.content, FileContent::Maps(_)) {
            self.mapped.insert(self.hasher.hash_one(entry.path.as_slice()), entry.size);
        }
    }

    fn add(&mut self, entry: &FileEntry) {
        if let Some(stamp) = entry.stamp {
            let look = self.hasher.hash_one((entry.path.as_slice(), entry.size, stamp));
            self.looks.insert(look);
        }
    }
}

/// An index from path to line of the parent's file list: 16 bytes and change for each.
#[derive(Debug)]
pub struct ParentFiles {
    fetcher: FrameFetcher,
    id: BackupId,
    hasher: RandomState,
    /// Hash of a path to the list frame that holds its line. Two paths with one hash: the later wins,
    /// and the other is stored anew, since the path in the line is compared.
    index: HashMap<u64, u32>,
    frames: Vec<FrameRef>,
    known: Arc<KnownFiles>,
    /// The list frame read last; neighbours in one backup are mostly neighbours in the next.
    cached: Option<(u32, HashMap<Vec<u8>, FileEntry>)>,
}

impl ParentFiles {
    /// Reads the parent's whole file list once and indexes it. Of files with a stamp, those that
    /// `can_be_known` takes are remembered by how they looked.
    pub async fn load(
        repository: &Repository,
        id: &BackupId,
        can_be_known: impl Fn(&FileEntry) -> bool,
    ) -> Result<Self, RepoError> {
        let list = FileList::open(repository, id).await?;
        let hasher = RandomState::new();
        let mut index = HashMap::new();
        let mut known = KnownFiles::default();
        let mut reading = pin!(list.read());
        let mut number = 0;
        while let Some(entries) = reading.next().await.transpose()? {
            for entry in entries {
                if index.len() < INDEX_MAX {
                    index.insert(hasher.hash_one(&entry.path), number);
                    known.add_mapped(&entry);
                    if entry.stamp.is_some() && can_be_known(&entry) {
                        known.add(&entry);
                    }
                }
            }
            number += 1;
        }
        let (fetcher, frames) = (list.fetcher().clone(), list.frames().to_vec());
        let (id, known, cached) = (id.clone(), Arc::new(known), None);
        Ok(Self { fetcher, id, hasher, index, frames, known, cached })
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
        let Some(&number) = self.index.get(&self.hasher.hash_one(path)) else { return Ok(None) };
        if self.cached.as_ref().is_none_or(|(cached, _)| *cached != number) {
            let Some(frame) = self.frames.get(number as usize) else { return Ok(None) };
            let entries = self.fetcher.entries(frame).await?;
            let by_path = entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect();
            self.cached = Some((number, by_path));
        }
        Ok(self.cached.as_ref().and_then(|(_, entries)| entries.get(path).cloned()))
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

    /// Returns what is known of the pages of chunks in one map of an entry.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] where it cannot be believed; the chunks can be stored whole instead.
    pub async fn pages(&self, entry: &FileEntry, map: usize) -> Result<PageMap, RepoError> {
        let frames = entry.page_maps.get(map).map(Vec::as_slice).unwrap_or_default();
        let read = try_join_all(frames.iter().map(|frame| self.fetcher.frame(frame))).await?;
        let mut pages = PageMap::default();
        for (frame, bytes) in frames.iter().zip(read) {
            let added = pages.add_encoded(&bytes);
            added.map_err(|error| RepoError::damaged(&self.fetcher.pack_key(frame), error))?;
        }
        Ok(pages)
    }
}
