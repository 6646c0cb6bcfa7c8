//! Proving that a backup's files come back: the file list, every map, and every chunk by its digest.
//!
//! A chunk that stands whole in one frame is proven by the index of its pack, which tells the digest of these very bytes
//! and was compared with them when the pack was proven ([`Repository::prove_pack`]). Every other chunk, joined from
//! several runs or too short for an index, is joined here as a restore joins it.
//!
//! Memory: frames, indexes and maps in caches with a bound, whatever the size of the backup.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::pin::pin;
use std::sync::Arc;

use futures_util::{StreamExt, stream};

use super::{FileList, FrameFetcher, RepoError, Repository};
use crate::format::{
    BackupId, CHUNK_BYTES, ChunkDigest, ChunkEntry, EntryKind, FileContent, FileEntry, FrameRef,
    IndexedFrame, MAP_CHUNKS_MAX, PageMap, Run, digest_chunk,
};
use crate::pg::SystemId;
use crate::store::Key;

/// Decompressed frames that are held, of about 512 KiB each: chunks of several runs need up to five at a time.
const FRAMES_HELD: usize = 16;

/// Indexes of packs that are held, of about 32 KiB each.
const INDEXES_HELD: usize = 128;

/// Maps that are read ahead, of up to 3 MiB each.
const MAPS_AHEAD: usize = 8;

/// Maps of which it is remembered that they were proven: later backups name those of files that did not change.
const MAPS_REMEMBERED_MAX: usize = 512 << 10;

/// What proving the content of a backup took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProvenContent {
    /// Files.
    pub files: u64,
    /// Chunks.
    pub chunks: u64,
    /// Of them, those that were joined and digested here.
    pub joined_chunks: u64,
    /// Bytes that were read for it, as stored.
    pub read_bytes: u64,
}

/// The data frames of a pack, sorted by their offset.
#[derive(Debug)]
struct HeldIndex {
    backup: BackupId,
    pack: u32,
    frames: Arc<Vec<IndexedFrame>>,
}

/// Proves the content of backups, one after the other.
#[derive(Debug)]
pub struct ContentProver {
    repository: Repository,
    system_id: SystemId,
    fetcher: FrameFetcher,
    frames: VecDeque<(FrameRef, Arc<Vec<u8>>)>,
    indexes: VecDeque<HeldIndex>,
    hasher: RandomState,
    maps: HashSet<u64>,
    zeros: ChunkDigest,
    took: ProvenContent,
}

impl ContentProver {
    /// Makes a prover for backups of one incarnation.
    pub fn new(repository: &Repository, system_id: SystemId) -> Self {
        Self {
            repository: repository.clone(),
            system_id,
            fetcher: FrameFetcher::new(repository.clone()),
            frames: VecDeque::new(),
            indexes: VecDeque::new(),
            hasher: RandomState::new(),
            maps: HashSet::new(),
            zeros: digest_chunk(&vec![0; CHUNK_BYTES as usize]),
            took: ProvenContent::default(),
        }
    }

    /// Proves that every file of a backup comes back as it was read. The packs themselves must have been proven.
    ///
    /// # Errors
    /// [`RepoError::Damaged`], [`RepoError::NotReadable`] and absence tell about the backup, which is then not
    /// looked at any further; others about the store.
    pub async fn prove(&mut self, id: &BackupId) -> Result<ProvenContent, RepoError> {
        self.took = ProvenContent::default();
        let list = FileList::open(&self.repository, id).await?;
        self.took.read_bytes = list.frames().iter().map(|frame| u64::from(frame.stored)).sum();
        let key = Key::new(self.repository.place().files(id));
        let mut entries_read = 0;
        let mut reading = pin!(list.read());
        while let Some(entries) = reading.next().await.transpose()? {
            entries_read += entries.len() as u64;
            self.prove_entries(&entries).await?;
        }
        if entries_read != list.entries() {
            let why = format!("it tells {} entries, and {entries_read} are there", list.entries());
            return Err(RepoError::damaged(&key, why));
        }
        Ok(self.took)
    }

    async fn prove_entries(&mut self, entries: &[FileEntry]) -> Result<(), RepoError> {
        let mut wanted = Vec::new();
        for entry in entries.iter().filter(|entry| entry.kind == EntryKind::File) {
            self.took.files += 1;
            let count = maps_of(entry);
            let needed =
                entry.size.div_ceil(u64::from(CHUNK_BYTES)).div_ceil(MAP_CHUNKS_MAX as u64);
            if count as u64 != needed.max(1) {
                return Err(
                    self.damaged_entry(entry, "has not the number of maps that its size asks for")
                );
            }
            wanted.extend((0..count).map(|number| (entry, number)));
        }
        // What was proven for an earlier backup is not read again.
        wanted.retain(|(entry, number)| match &entry.content {
            FileContent::Maps(maps) => {
                !self.maps.contains(&self.name_of(&maps[*number], entry, *number))
            }
            FileContent::Inline(_) => true,
        });
        let fetcher = self.fetcher.clone();
        let mut maps = stream::iter(wanted)
            .map(|(entry, number)| {
                let fetcher = fetcher.clone();
                async move { (entry, number, read_map(&fetcher, entry, number).await) }
            })
            .buffered(MAPS_AHEAD);
        while let Some((entry, number, read)) = maps.next().await {
            let (chunks, read_bytes) = read?;
            self.took.read_bytes += read_bytes;
            self.prove_map(entry, number, &chunks).await?;
        }
        Ok(())
    }

    async fn prove_map(
        &mut self,
        entry: &FileEntry,
        number: usize,
        chunks: &[ChunkEntry],
    ) -> Result<(), RepoError> {
        let first = (number * MAP_CHUNKS_MAX) as u64;
        let all = entry.size.div_ceil(u64::from(CHUNK_BYTES));
        if chunks.len() as u64 != all.saturating_sub(first).min(MAP_CHUNKS_MAX as u64) {
            return Err(self.damaged_entry(entry, "has not as many chunks as its size asks for"));
        }
        for (at, chunk) in (first..).zip(chunks) {
            let left = entry.size - at * u64::from(CHUNK_BYTES);
            let bytes = u32::try_from(left).unwrap_or(u32::MAX).min(CHUNK_BYTES);
            self.took.chunks += 1;
            self.prove_chunk(entry, at, chunk, bytes).await?;
        }
        if let FileContent::Maps(maps) = &entry.content
            && self.maps.len() < MAPS_REMEMBERED_MAX
        {
            let name = self.name_of(&maps[number], entry, number);
            self.maps.insert(name);
        }
        Ok(())
    }

    /// A map says nothing of the length of its last chunk: that is the file's.
    fn name_of(&self, map: &FrameRef, entry: &FileEntry, number: usize) -> u64 {
        let page_maps = entry.page_maps.get(number);
        self.hasher.hash_one((map, page_maps, entry.size, number))
    }

    async fn prove_chunk(
        &mut self,
        entry: &FileEntry,
        at: u64,
        chunk: &ChunkEntry,
        bytes: u32,
    ) -> Result<(), RepoError> {
        if !chunk.is_whole(bytes) {
            return Err(self.damaged_entry(entry, &format!("has a hole in its chunk {at}")));
        }
        let is_right = match chunk.runs.as_slice() {
            [] if bytes == CHUNK_BYTES => chunk.digest == self.zeros,
            [] => chunk.digest == digest_chunk(&vec![0; bytes as usize]),
            [run] if self.is_indexed(run, chunk.digest).await? => true,
            runs => self.join(runs).await? == chunk.digest,
        };
        if is_right {
            return Ok(());
        }
        let what = format!("chunk {at} of `{}` has another digest", text_of(&entry.path));
        let key = match chunk.runs.first() {
            Some(run) => self.fetcher.pack_key(&run.frame),
            None => Key::new(self.repository.place().backups_dir()),
        };
        Err(RepoError::damaged(&key, what))
    }

    /// Returns whether the index of a pack tells these very bytes with this digest.
    async fn is_indexed(&mut self, run: &Run, digest: ChunkDigest) -> Result<bool, RepoError> {
        let frame = &run.frame;
        let index = self.index(&frame.backup, frame.pack).await?;
        let Ok(at) = index.binary_search_by_key(&frame.offset, |indexed| indexed.offset) else {
            return Ok(false);
        };
        let indexed = &index[at];
        let is_piece = |piece: &&crate::format::Piece| {
            piece.in_frame == run.in_frame && piece.bytes == run.bytes
        };
        Ok(indexed.stored == frame.stored
            && indexed.plain == frame.plain
            && indexed.pieces.iter().find(is_piece).is_some_and(|piece| piece.digest == digest))
    }

    async fn index(
        &mut self,
        id: &BackupId,
        pack: u32,
    ) -> Result<Arc<Vec<IndexedFrame>>, RepoError> {
        let is_it = |held: &HeldIndex| held.pack == pack && held.backup == *id;
        if let Some(at) = self.indexes.iter().position(is_it)
            && let Some(held) = self.indexes.remove(at)
        {
            let frames = Arc::clone(&held.frames);
            self.indexes.push_back(held);
            return Ok(frames);
        }
        let read = self.repository.pack_index(id, pack, self.system_id).await?;
        let mut frames = read.map(|(_, frames)| frames).unwrap_or_default();
        frames.sort_unstable_by_key(|frame| frame.offset);
        let frames = Arc::new(frames);
        if self.indexes.len() >= INDEXES_HELD {
            self.indexes.pop_front();
        }
        let held = HeldIndex { backup: id.clone(), pack, frames: Arc::clone(&frames) };
        self.indexes.push_back(held);
        Ok(frames)
    }

    /// Joins a chunk as a restore does, and returns its digest.
    async fn join(&mut self, runs: &[Run]) -> Result<ChunkDigest, RepoError> {
        self.took.joined_chunks += 1;
        let mut bytes = Vec::with_capacity(CHUNK_BYTES as usize);
        for run in runs {
            let plain = self.frame(&run.frame).await?;
            let (from, len) = (run.in_frame as usize, run.bytes as usize);
            bytes.extend_from_slice(plain.get(from..from + len).unwrap_or_default());
        }
        Ok(digest_chunk(&bytes))
    }

    async fn frame(&mut self, frame: &FrameRef) -> Result<Arc<Vec<u8>>, RepoError> {
        if let Some(at) = self.frames.iter().position(|(known, _)| known == frame)
            && let Some(held) = self.frames.remove(at)
        {
            let plain = Arc::clone(&held.1);
            self.frames.push_back(held);
            return Ok(plain);
        }
        let plain = Arc::new(self.fetcher.frame(frame).await?);
        self.took.read_bytes += u64::from(frame.stored);
        if self.frames.len() >= FRAMES_HELD {
            self.frames.pop_front();
        }
        self.frames.push_back((frame.clone(), Arc::clone(&plain)));
        Ok(plain)
    }

    fn damaged_entry(&self, entry: &FileEntry, what: &str) -> RepoError {
        let key = match &entry.content {
            FileContent::Maps(maps) => maps.first().map(|frame| self.fetcher.pack_key(frame)),
            FileContent::Inline(_) => None,
        };
        let key = key.unwrap_or_else(|| Key::new(self.repository.place().backups_dir()));
        RepoError::damaged(&key, format_args!("`{}` {what}", text_of(&entry.path)))
    }
}

fn text_of(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// Returns how many maps an entry has; chunks in its line count as one.
fn maps_of(entry: &FileEntry) -> usize {
    match &entry.content {
        FileContent::Inline(_) => 1,
        FileContent::Maps(maps) => maps.len(),
    }
}

/// Reads one map of an entry, and the page maps beside it, which must be such; returns the chunks and the stored bytes read.
async fn read_map(
    fetcher: &FrameFetcher,
    entry: &FileEntry,
    number: usize,
) -> Result<(Vec<ChunkEntry>, u64), RepoError> {
    let mut read_bytes = 0;
    for frame in entry.page_maps.get(number).into_iter().flatten() {
        let bytes = fetcher.frame(frame).await?;
        read_bytes += u64::from(frame.stored);
        let added = PageMap::default().add_encoded(&bytes);
        added.map_err(|error| RepoError::damaged(&fetcher.pack_key(frame), error))?;
    }
    match &entry.content {
        FileContent::Inline(chunks) => Ok((chunks.clone(), read_bytes)),
        FileContent::Maps(maps) => match maps.get(number) {
            Some(frame) => {
                Ok((fetcher.map(frame).await?.chunks, read_bytes + u64::from(frame.stored)))
            }
            None => Ok((Vec::new(), read_bytes)),
        },
    }
}
