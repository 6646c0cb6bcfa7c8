//! Reading frames back from packs: ranged, coalesced, bounded.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;

use super::{RepoError, Repository};
use crate::format::{ChunkMap, FrameRef, read_whole};
use crate::store::{Key, StoreError};

/// No frame of ours is longer before compression (a map of 16384 chunks with four runs each is below 3 MiB).
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
            Err(error @ StoreError::Refused { .. }) => {
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

    /// Reads one frame and returns its plain bytes, after a look that the pack is the one it should be:
    /// no digest covers lists and maps, so those of another backup's pack would be believed.
    pub async fn frame(&self, frame: &FrameRef) -> Result<Vec<u8>, RepoError> {
        let pack = self.pack_key(frame);
        self.check_pack(&pack).await?;
        let stored = self.range(&pack, frame.offset, frame.offset.saturating_add(frame.stored));
        decode_frame(&pack, frame, &stored.await?)
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
