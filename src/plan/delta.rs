//! Restoring over what stands: which bytes are kept, cleared or brought.

/// What a chunk of a file needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkWork {
    /// Nothing: what stands is right.
    Keep,
    /// Zeros in place of what stands, and its room given back to the disk.
    Clear,
    /// Its bytes from the repository.
    Bring,
}

/// Decides what a chunk needs. `is_same` says that what stood at its place has its digest, which
/// counts only where the file's content was kept (`is_kept`): a file that was made anew is all zeros, for which it may have room.
pub fn chunk_work(is_kept: bool, is_same: bool, is_zeros: bool) -> ChunkWork {
    match (is_kept, is_zeros) {
        (true, _) if is_same => ChunkWork::Keep,
        (_, true) => ChunkWork::Clear,
        (_, false) => ChunkWork::Bring,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bytes_that_are_there_are_kept() {
        // kept, same, zeros
        for (case, expected) in [
            ((true, true, true), ChunkWork::Keep),
            ((true, true, false), ChunkWork::Keep),
            ((true, false, true), ChunkWork::Clear),
            ((true, false, false), ChunkWork::Bring),
            ((false, false, true), ChunkWork::Clear),
            ((false, false, false), ChunkWork::Bring),
            // Something stood there when it was looked at, and is gone with the file.
            ((false, true, true), ChunkWork::Clear),
            ((false, true, false), ChunkWork::Bring),
        ] {
            let (is_kept, is_same, is_zeros) = case;
            assert_eq!(chunk_work(is_kept, is_same, is_zeros), expected, "{case:?}");
        }
    }
}
