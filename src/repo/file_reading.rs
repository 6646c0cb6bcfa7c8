//! Reading a single file of a backup, from its beginning to its end.
//!
//! For the few small files that are looked into without a restore; a restore reads many, in the order of packs.

use std::collections::VecDeque;

use super::{FrameFetcher, RepoError};
use crate::format::{CHUNK_BYTES, ChunkEntry, FileContent, FileEntry, FrameRef, digest_chunk};

/// Plain frames that are held: chunks of one file stand in neighbouring ones.
const FRAMES_HELD: usize = 4;

/// Frames that were read last.
#[derive(Default)]
struct Held(VecDeque<(FrameRef, Vec<u8>)>);

impl FrameFetcher {
    /// Reads a file and gives its chunks of 64 KiB to `sink`, in order, each checked against its digest. Memory: a few
    /// frames, and a map of at most 1 GiB of the file.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] where the backup does not hold what its list says; else the store's.
    pub async fn read_file(
        &self,
        entry: &FileEntry,
        mut sink: impl FnMut(&[u8]),
    ) -> Result<(), RepoError> {
        let mut held = Held::default();
        let mut left = entry.size;
        match &entry.content {
            FileContent::Inline(chunks) => {
                for chunk in chunks {
                    left -= self.give(chunk, left, &mut held, &mut sink).await?;
                }
            }
            FileContent::Maps(maps) => {
                for frame in maps {
                    for chunk in &self.map(frame).await?.chunks {
                        left -= self.give(chunk, left, &mut held, &mut sink).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives one chunk to the sink, and returns its length.
    async fn give(
        &self,
        chunk: &ChunkEntry,
        left: u64,
        held: &mut Held,
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<u64, RepoError> {
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES as usize);
        let mut bytes = Vec::with_capacity(length);
        for run in &chunk.runs {
            let frame = self.held_frame(&run.frame, held).await?;
            let end = u64::from(run.in_frame) + u64::from(run.bytes);
            let stretch = usize::try_from(end).ok();
            let stretch = stretch.and_then(|end| frame.get(run.in_frame as usize..end));
            let why = "a chunk lies outside of its frame";
            bytes.extend_from_slice(
                stretch.ok_or_else(|| RepoError::damaged(&self.pack_key(&run.frame), why))?,
            );
        }
        if chunk.runs.is_empty() {
            bytes.resize(length, 0);
        }
        if let Some(run) = chunk.runs.first()
            && (bytes.len() != length || digest_chunk(&bytes) != chunk.digest)
        {
            let pack = self.pack_key(&run.frame);
            return Err(RepoError::damaged(&pack, "a chunk in it is not what the file list says"));
        }
        sink(&bytes);
        Ok(bytes.len() as u64)
    }

    async fn held_frame<'h>(
        &self,
        frame: &FrameRef,
        held: &'h mut Held,
    ) -> Result<&'h [u8], RepoError> {
        let at = match held.0.iter().position(|(known, _)| known == frame) {
            Some(at) => at,
            None => {
                let plain = self.frame(frame).await?;
                held.0.truncate(FRAMES_HELD - 1);
                held.0.push_front((frame.clone(), plain));
                0
            }
        };
        Ok(held.0.get(at).map_or(&[][..], |(_, plain)| plain))
    }
}
