//! What becomes of each chunk of a backup: nothing, a reference, or stored bytes.

use crate::format::{CHUNK_BYTES, ChunkDigest, ChunkEntry};

/// What becomes of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChunkFate {
    /// All zeros: stored as nothing.
    Zeros,
    /// The parent holds the same bytes at the same place of the same file.
    Referenced(ChunkEntry),
    /// Its bytes are stored.
    Stored,
}

/// Decides the fate of a chunk of `bytes` bytes, given the parent's chunk at the same place.
pub fn chunk_fate(
    digest: ChunkDigest,
    is_zeros: bool,
    bytes: u32,
    parent: Option<&ChunkEntry>,
) -> ChunkFate {
    if is_zeros {
        return ChunkFate::Zeros;
    }
    match parent {
        // A chunk of zeros has no runs; the digest alone must not make one of other bytes.
        Some(entry)
            if entry.digest == digest && !entry.runs.is_empty() && entry.is_whole(bytes) =>
        {
            ChunkFate::Referenced(entry.clone())
        }
        _ => ChunkFate::Stored,
    }
}

/// Returns how many chunks a file of `size` bytes has.
pub fn chunks_of(size: u64) -> u64 {
    size.div_ceil(u64::from(CHUNK_BYTES))
}

/// Returns the length of chunk `number` of a file of `size` bytes.
pub fn chunk_len(size: u64, number: u64) -> u32 {
    let left = size.saturating_sub(number * u64::from(CHUNK_BYTES));
    u32::try_from(left).unwrap_or(u32::MAX).min(CHUNK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{BackupId, FrameRef, Packing, Run, digest_chunk};

    fn stored(bytes: &[u8], run: u32) -> ChunkEntry {
        let frame = FrameRef {
            backup: BackupId::at(jiff::Timestamp::UNIX_EPOCH, 1),
            pack: 0,
            offset: 1024,
            stored: 10,
            plain: 1 << 20,
            codec: Packing::Zstd,
        };
        let run = Run { frame, in_frame: 0, in_chunk: 0, bytes: run };
        ChunkEntry { digest: digest_chunk(bytes), runs: vec![run] }
    }

    #[test]
    fn only_the_same_bytes_at_the_same_place_are_referenced() {
        let digest = digest_chunk(b"new");
        assert_eq!(chunk_fate(digest, false, 3, None), ChunkFate::Stored);
        assert_eq!(chunk_fate(digest, false, 3, Some(&stored(b"old", 3))), ChunkFate::Stored);
        let same = stored(b"new", 3);
        assert_eq!(chunk_fate(digest, false, 3, Some(&same)), ChunkFate::Referenced(same));
    }

    #[test]
    fn a_parents_chunk_that_is_not_whole_is_not_trusted() {
        let digest = digest_chunk(b"new");
        assert_eq!(chunk_fate(digest, false, 3, Some(&stored(b"new", 2))), ChunkFate::Stored);
        let nothing = ChunkEntry { digest, runs: Vec::new() };
        assert_eq!(chunk_fate(digest, false, 3, Some(&nothing)), ChunkFate::Stored);
    }

    #[test]
    fn a_file_ends_with_a_shorter_chunk() {
        let size = u64::from(CHUNK_BYTES) * 2 + 5;
        assert_eq!(chunks_of(size), 3);
        assert_eq!([0, 1, 2, 3].map(|n| chunk_len(size, n)), [CHUNK_BYTES, CHUNK_BYTES, 5, 0]);
        assert_eq!(chunks_of(0), 0);
    }
}
