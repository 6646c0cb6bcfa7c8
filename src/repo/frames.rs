//! Reading frames back from packs, and the file list that stands in them: ranged, coalesced, bounded.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use futures_util::future::try_join;
use futures_util::stream::{self, Stream};

use super::encrypting::is_refusal_of_ours;
use super::{RepoError, Repository};
use crate::format::{BackupId, ChunkMap, FileEntry, FileIndex, FrameRef, parse_line, read_whole};
use crate::store::{Key, StoreError};

/// No frame of ours is longer before compression (a map of 16384 chunks with nine runs each is below 5 MiB).
const FRAME_PLAIN_MAX: u32 = 8 << 20;

/// Packs of which it is remembered that their header was checked.
const CHECKED_MAX: usize = 4096;

/// Reads frames of the packs of a repository.
#[derive(Debug, Clone)]
pub struct FrameFetcher {
    repository: Repository,
    /// Packs whose header was checked, the last ones.
    checked: Arc<Mutex<BTreeSet<Key>>>,
}

impl FrameFetcher {
    /// Makes a fetcher.
    pub fn new(repository: Repository) -> Self {
        Self { repository, checked: Arc::default() }
    }

    /// Returns the key of the pack that holds `frame`.
    pub fn pack_key(&self, frame: &FrameRef) -> Key {
        Key::new(self.repository.place().pack(&frame.backup, frame.pack))
    }

    /// Reads the bytes from `start` to `end` (excluded) of the pack of `frame`, as stored.
    pub async fn range(&self, pack: &Key, start: u32, end: u32) -> Result<Vec<u8>, RepoError> {
        let wanted = u64::from(end.saturating_sub(start));
        let range = u64::from(start)..u64::from(end);
        let reading = match self.repository.store().read(pack, Some(range)).await {
            Ok(reading) => reading,
            // A range behind the end is refused by every store: the pack was cut.
            Err(error @ StoreError::Refused { .. }) if !is_refusal_of_ours(&error) => {
                let first = self.repository.store().read(pack, Some(0..1)).await;
                if first.is_ok_and(|reading| reading.size_bytes > u64::from(start)) {
                    return Err(error.into());
                }
                return Err(RepoError::damaged(pack, "it ends before the frames it should hold"));
            }
            Err(error) => return Err(error.into()),
        };
        // In one piece from the start: many small ones beside it would be held as well.
        let mut stored = Vec::with_capacity(end.saturating_sub(start) as usize);
        let mut bytes = reading.bytes;
        while let Some(piece) = bytes.next().await {
            let piece = piece?;
            if (stored.len() + piece.len()) as u64 > wanted {
                return Err(RepoError::damaged(pack, "it is longer than the store said"));
            }
            stored.extend_from_slice(&piece);
        }
        if stored.len() as u64 != wanted {
            return Err(RepoError::damaged(pack, "it ends before the frames that it should hold"));
        }
        Ok(stored)
    }

    /// Decompresses one frame.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] naming the pack.
    pub fn decode(&self, frame: &FrameRef, stored: &[u8]) -> Result<Vec<u8>, RepoError> {
        decode_frame(&self.pack_key(frame), frame, stored)
    }

    /// Reads a chunk map.
    pub async fn map(&self, frame: &FrameRef) -> Result<ChunkMap, RepoError> {
        let bytes = self.frame(frame).await?;
        ChunkMap::decode(&bytes).map_err(|error| RepoError::of_map(&self.pack_key(frame), error))
    }

    /// Reads one frame and returns its plain bytes, with a look that the pack is the one it should be:
    /// no digest covers lists and maps, so those of another backup's pack would be believed.
    pub async fn frame(&self, frame: &FrameRef) -> Result<Vec<u8>, RepoError> {
        self.decode(frame, &self.stored(frame).await?)
    }

    /// Reads the entries in one frame of a file list.
    pub async fn entries(&self, frame: &FrameRef) -> Result<Vec<FileEntry>, RepoError> {
        self.decode_entries(frame, &self.stored(frame).await?)
    }

    fn decode_entries(&self, frame: &FrameRef, stored: &[u8]) -> Result<Vec<FileEntry>, RepoError> {
        let lines = self.decode(frame, stored)?;
        let lines = lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let parse = |line| {
            parse_line(line).map_err(|error| RepoError::of_list(&self.pack_key(frame), &error))
        };
        lines.map(parse).collect()
    }

    /// Reads one frame as it is stored. The look at the pack's header does not delay it.
    async fn stored(&self, frame: &FrameRef) -> Result<Vec<u8>, RepoError> {
        let pack = self.pack_key(frame);
        let end = frame.offset.saturating_add(frame.stored);
        let bytes = self.range(&pack, frame.offset, end);
        Ok(try_join(self.check_pack(&pack), bytes).await?.1)
    }
}

impl FrameFetcher {
    async fn check_pack(&self, pack: &Key) -> Result<(), RepoError> {
        let checked = || self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if !checked().contains(pack) {
            self.repository.header(pack).await?;
            let mut checked = checked();
            if checked.len() >= CHECKED_MAX {
                checked.clear();
            }
            checked.insert(pack.clone());
        }
        Ok(())
    }
}

/// Decompresses one frame.
///
/// # Errors
/// [`RepoError::Damaged`] naming the pack.
fn decode_frame(pack: &Key, frame: &FrameRef, stored: &[u8]) -> Result<Vec<u8>, RepoError> {
    let plain_bytes = frame.plain;
    if plain_bytes > FRAME_PLAIN_MAX {
        return Err(RepoError::damaged(pack, format_args!("a frame claims {plain_bytes} bytes")));
    }
    let plain = read_whole(frame.codec, stored, plain_bytes as usize);
    plain.map_err(|error| RepoError::of_codec(pack, &error))
}

/// Frames of a file list that are read ahead of whoever takes their entries, up to 2 MiB of memory each.
const LIST_FRAMES_AHEAD: usize = 4;

/// Stored bytes of a file list that [`FileList::kept`] holds at most: the list of some 200,000 files.
const LIST_KEPT_BYTES_MAX: usize = 16 << 20;

/// The file list of a backup.
#[derive(Debug)]
pub struct FileList {
    fetcher: FrameFetcher,
    index: FileIndex,
    /// Frames as they are stored, by their place in the list, where they are held for a second reading.
    kept: Option<Mutex<Kept>>,
}

#[derive(Debug, Default)]
struct Kept {
    frames: BTreeMap<usize, Arc<Vec<u8>>>,
    bytes: usize,
}

impl FileList {
    /// Opens the list of a backup.
    ///
    /// # Errors
    /// [`RepoError`]; those of the store that [`crate::store::StoreError::is_transient`] names can be cured by a retry.
    pub async fn open(repository: &Repository, id: &BackupId) -> Result<Self, RepoError> {
        let index = repository.file_index(id).await?;
        Ok(Self { fetcher: FrameFetcher::new(repository.clone()), index, kept: None })
    }

    /// Makes it hold what is read, up to 16 MiB of it, so that a second reading costs the store nothing, or less.
    #[must_use]
    pub fn kept(mut self) -> Self {
        self.kept = Some(Mutex::default());
        self
    }

    /// Returns what reads its frames, and remembers which packs it has checked.
    pub fn fetcher(&self) -> &FrameFetcher {
        &self.fetcher
    }

    /// Returns how many entries the list has.
    pub fn entries(&self) -> u64 {
        self.index.entries
    }

    /// Returns the places of its frames, in order.
    pub fn frames(&self) -> &[FrameRef] {
        &self.index.frames
    }

    /// Reads all entries in order, those of one frame at a time, some frames ahead.
    pub fn read(&self) -> impl Stream<Item = Result<Vec<FileEntry>, RepoError>> + '_ {
        let frames = self.index.frames.iter().enumerate();
        stream::iter(frames.map(|(number, frame)| self.frame(number, frame)))
            .buffered(LIST_FRAMES_AHEAD)
    }

    async fn frame(&self, number: usize, frame: &FrameRef) -> Result<Vec<FileEntry>, RepoError> {
        let kept = || self.kept.as_ref().map(|k| k.lock().unwrap_or_else(PoisonError::into_inner));
        let held = kept().and_then(|kept| kept.frames.get(&number).cloned());
        let stored = match held {
            Some(stored) => stored,
            None => Arc::new(self.fetcher.stored(frame).await?),
        };
        let entries = self.fetcher.decode_entries(frame, &stored)?;
        if let Some(mut kept) = kept()
            && kept.bytes + stored.len() <= LIST_KEPT_BYTES_MAX
            && !kept.frames.contains_key(&number)
        {
            kept.bytes += stored.len();
            kept.frames.insert(number, stored);
        }
        Ok(entries)
    }
}
