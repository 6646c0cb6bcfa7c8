//! What the files of a backup are made of, and which of it stands on the disk already.
//!
//! ```text
//! entries -> chunk maps, some ahead -> what stands is read and hashed, 16 MiB at a time,
//!         on all processors -> one look for each map, in order
//! ```
//!
//! Never here: what is done about it.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::try_join_all;
use futures_util::stream::{self, Stream, StreamExt};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use crate::format::{
    CHUNK_BYTES, ChunkDigest, ChunkEntry, EntryKind, FileContent, FileEntry, FileIndex,
    MAP_CHUNKS_MAX, digest_chunk,
};
use crate::pgdata::{Places, safe_path};
use crate::plan::backup::{chunk_len, chunks_of};
use crate::repo::path_index::HashedSet;
use crate::repo::{FrameFetcher, RepoError, Repository};

/// Chunks that are read and hashed in one go: 16 MiB.
const PART_CHUNKS: usize = 256;

/// Maps that are looked at ahead of whoever takes them, which hides the way to the store; and how many
/// chunks they may have in all, about 170 bytes of memory each.
const MAPS_AHEAD: usize = 16;
const CHUNKS_AHEAD: usize = 2 * MAP_CHUNKS_MAX;

/// Room for paths that is taken at once, where a list says that it has so many.
const PATHS_RESERVED_MAX: usize = 8 << 20;

pub(super) const CONTROL_FILE: &[u8] = b"global/pg_control";
pub(super) const TABLESPACE_MAP: &[u8] = b"tablespace_map";

/// The chunks of one map of a file.
pub(super) struct Look {
    pub(super) chunks: Vec<ChunkEntry>,
    /// Which of them stand on the disk as they should be; empty where nothing was looked at.
    pub(super) same: Vec<bool>,
    /// Its share of what may be held ahead.
    _room: OwnedSemaphorePermit,
}

/// Looks at files.
#[derive(Clone)]
pub(super) struct Looking {
    pub(super) fetcher: FrameFetcher,
    /// Where files may stand; `None` if nothing does.
    standing: Option<Arc<Places>>,
    /// Parts that are read at a time.
    readers: Arc<Semaphore>,
    /// Chunks that may be held ahead.
    room: Arc<Semaphore>,
}

impl Looking {
    pub(super) fn new(repository: &Repository, standing: Option<Places>, jobs: usize) -> Self {
        Self {
            fetcher: FrameFetcher::new(repository.clone()),
            standing: standing.map(Arc::new),
            readers: Arc::new(Semaphore::new(jobs.max(1))),
            room: Arc::new(Semaphore::new(CHUNKS_AHEAD)),
        }
    }

    /// Looks at every map of every file of `entries` that [`is_streamed`], in their order.
    pub(super) fn at<'a>(
        &'a self,
        entries: &'a [FileEntry],
    ) -> impl Stream<Item = Result<Look, RepoError>> + 'a {
        let files = entries.iter().filter(|entry| is_streamed(entry));
        let maps = files.flat_map(|entry| (0..maps_of(entry)).map(move |map| (entry, map)));
        // Room is taken in the order of the files, so that the next one wanted always has it.
        let with_room = stream::iter(maps).then(move |(entry, map)| async move {
            let room = Arc::clone(&self.room).acquire_many_owned(chunks_in(entry, map)).await;
            (entry, map, room)
        });
        with_room.map(move |(entry, map, room)| self.look(entry, map, room)).buffered(MAPS_AHEAD)
    }

    /// Returns the chunks of a map.
    pub(super) async fn chunks(
        &self,
        entry: &FileEntry,
        map: usize,
    ) -> Result<Vec<ChunkEntry>, RepoError> {
        match &entry.content {
            FileContent::Inline(chunks) => Ok(chunks.clone()),
            FileContent::Maps(maps) => match maps.get(map) {
                Some(frame) => Ok(self.fetcher.map(frame).await?.chunks),
                None => Ok(Vec::new()),
            },
        }
    }

    async fn look(
        &self,
        entry: &FileEntry,
        map: usize,
        room: Result<OwnedSemaphorePermit, AcquireError>,
    ) -> Result<Look, RepoError> {
        let room = room.map_err(|error| RepoError::Task(error.into()))?;
        let chunks = self.chunks(entry, map).await?;
        let (Some(standing), Ok(path)) = (&self.standing, safe_path(&entry.path)) else {
            return Ok(Look { chunks, same: Vec::new(), _room: room });
        };
        let digests: Vec<ChunkDigest> = chunks.iter().map(|chunk| chunk.digest).collect();
        let parts = digests.chunks(PART_CHUNKS).enumerate().map(|(part, digests)| {
            let (standing, path) = (Arc::clone(standing), path.clone());
            let first = (map * MAP_CHUNKS_MAX + part * PART_CHUNKS) as u64;
            self.compare(standing, path, entry.size, first, digests.to_vec())
        });
        let same = try_join_all(parts).await?.concat();
        Ok(Look { chunks, same, _room: room })
    }

    async fn compare(
        &self,
        standing: Arc<Places>,
        path: PathBuf,
        size: u64,
        first: u64,
        digests: Vec<ChunkDigest>,
    ) -> Result<Vec<bool>, RepoError> {
        let permit = Arc::clone(&self.readers).acquire_owned().await;
        let permit = permit.map_err(|error| RepoError::Task(error.into()))?;
        let work = move || {
            let same = match standing.open_plain(&path) {
                Some(file) => same_chunks(&file, size, first, &digests),
                None => vec![false; digests.len()],
            };
            drop(permit);
            same
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| RepoError::Task(error.into()))
    }
}

/// Returns which chunks from number `first` on are in the file as they should be. What
/// cannot be read is not.
fn same_chunks(file: &File, size: u64, first: u64, digests: &[ChunkDigest]) -> Vec<bool> {
    let mut room = vec![0; CHUNK_BYTES as usize];
    let is_same = |(number, digest): (u64, &ChunkDigest)| {
        let bytes = &mut room[..chunk_len(size, number) as usize];
        let read = file.read_exact_at(bytes, number * u64::from(CHUNK_BYTES));
        read.is_ok() && digest_chunk(bytes) == *digest
    };
    (first..).zip(digests).map(is_same).collect()
}

/// Returns how many chunks a map of an entry should have, at least one.
fn chunks_in(entry: &FileEntry, map: usize) -> u32 {
    let max = MAP_CHUNKS_MAX as u64;
    let left = chunks_of(entry.size).saturating_sub(map as u64 * max);
    u32::try_from(left.clamp(1, max)).unwrap_or(1)
}

/// Returns whether an entry is a file that is written chunk by chunk; the others are known whole.
pub(super) fn is_streamed(entry: &FileEntry) -> bool {
    entry.kind == EntryKind::File && entry.path != CONTROL_FILE && entry.path != TABLESPACE_MAP
}

/// Returns how many maps an entry has.
pub(super) fn maps_of(entry: &FileEntry) -> usize {
    match &entry.content {
        FileContent::Inline(_) => 1,
        FileContent::Maps(maps) => maps.len(),
    }
}

/// Every path of a backup: eight bytes for each that is no directory, however long it is.
#[derive(Debug, Default)]
pub(super) struct Belongings {
    directories: HashSet<PathBuf>,
    paths: HashedSet,
}

impl Belongings {
    /// Reads the file list, and shows each directory.
    pub(super) async fn read(
        repository: &Repository,
        index: &FileIndex,
        mut on_directory: impl FnMut(&FileEntry),
    ) -> Result<Self, RepoError> {
        // As many as the list says; if that is wrong, it grows.
        let capacity = usize::try_from(index.entries).unwrap_or(0).min(PATHS_RESERVED_MAX);
        let mut belongings =
            Self { directories: HashSet::new(), paths: HashedSet::with_capacity(capacity) };
        for frame in &index.frames {
            for entry in repository.file_entries(frame).await? {
                // One that is not safe is refused where it would be made.
                let Ok(path) = safe_path(&entry.path) else { continue };
                // Its parents are known once one of them is.
                for parent in path.ancestors().skip(1) {
                    if belongings.directories.contains(parent) {
                        break;
                    }
                    belongings.directories.insert(parent.to_owned());
                }
                if entry.kind == EntryKind::Directory {
                    on_directory(&entry);
                    belongings.directories.insert(path);
                } else {
                    belongings.paths.add(path.as_os_str().as_bytes());
                }
            }
        }
        belongings.paths.close();
        Ok(belongings)
    }

    /// Returns whether the backup has this path.
    pub(super) fn hold(&self, path: &Path) -> bool {
        self.directories.contains(path) || self.paths.holds(path.as_os_str().as_bytes())
    }
}
