//! Digests of the pages of chunks, by which a later backup knows which pages of a changed chunk it must store.
//!
//! They stand in frames of their own, the *page maps*, which only a backup reads, and only those of
//! files that have changed. An entry says: the chunk with this digest has these pages. Where in which file
//! that chunk stands makes no difference, so entries of several page maps can be put together in any order.
//! Little endian:
//!
//! ```text
//! "HWP1"                                    4
//! u32 entries, then each:
//!     digest of the chunk                  16
//!     digest of each page              8 × 16
//! ```
//!
//! A page here is an eighth of a chunk, 8 KiB, whatever the server's block size. Only whole chunks have
//! an entry. A page's digest is the first 128 bits of the chaining value of its subtree in the BLAKE3 tree of
//! the chunk: it comes out of the chunk's own digest for nothing, and two pages that differ and share it
//! are as hard to find as two chunks that do.

use std::collections::HashMap;

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use super::{CHUNK_BYTES, ChunkDigest, MAP_CHUNKS_MAX, digest_chunk};

/// The bytes of a page of a chunk.
pub const PAGE_BYTES: u32 = 8 << 10;

/// The pages of a chunk.
pub const PAGES: usize = (CHUNK_BYTES / PAGE_BYTES) as usize;

const MAGIC: &[u8; 4] = b"HWP1";

/// Bytes of an entry.
const ENTRY_BYTES: usize = 16 + PAGES * 16;

/// The plain bytes of the page map of so many chunks.
pub const fn page_map_bytes(chunks: usize) -> usize {
    8 + chunks * ENTRY_BYTES
}

/// The digests of the pages of a whole chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageDigests(pub [[u8; 16]; PAGES]);

/// Returns the digest of a chunk's bytes, as [`digest_chunk`] does, and those of its pages if it is a
/// whole one; no byte is hashed twice.
pub fn digest_pages(bytes: &[u8]) -> (ChunkDigest, Option<PageDigests>) {
    if bytes.len() != CHUNK_BYTES as usize {
        return (digest_chunk(bytes), None);
    }
    let mut subtrees: Vec<ChainingValue> = Vec::with_capacity(PAGES);
    for (number, page) in bytes.chunks(PAGE_BYTES as usize).enumerate() {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset((number * PAGE_BYTES as usize) as u64).update(page);
        subtrees.push(hasher.finalize_non_root());
    }
    let mut pages = [[0; 16]; PAGES];
    for (page, subtree) in pages.iter_mut().zip(&subtrees) {
        page.copy_from_slice(&subtree[..16]);
    }
    while subtrees.len() > 2 {
        let pairs = subtrees.chunks_exact(2);
        subtrees = pairs.map(|two| merge_subtrees_non_root(&two[0], &two[1], Mode::Hash)).collect();
    }
    let root = merge_subtrees_root(&subtrees[0], &subtrees[1], Mode::Hash);
    let mut short = [0; 16];
    short.copy_from_slice(&root.as_bytes()[..16]);
    (ChunkDigest(short), Some(PageDigests(pages)))
}

/// Pages of chunks, by the chunk's digest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PageMap {
    /// The pages of each chunk.
    pub chunks: HashMap<ChunkDigest, PageDigests>,
}

/// The bytes are not a page map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is not a page map")]
pub struct PageMapError;

/// Returns the bytes of the page map with these entries, at most [`MAP_CHUNKS_MAX`] of them.
pub fn encode_page_map(entries: &[(ChunkDigest, PageDigests)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(page_map_bytes(entries.len()));
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&u32::try_from(entries.len()).unwrap_or(u32::MAX).to_le_bytes());
    for (chunk, pages) in entries {
        out.extend_from_slice(&chunk.0);
        out.extend_from_slice(pages.0.as_flattened());
    }
    out
}

impl PageMap {
    /// Adds the entries of a page map.
    ///
    /// # Errors
    /// [`PageMapError`] if `bytes` are none; a retry does not help.
    pub fn add_encoded(&mut self, bytes: &[u8]) -> Result<(), PageMapError> {
        let (magic, rest) = bytes.split_at_checked(4).ok_or(PageMapError)?;
        let (count, rest) = rest.split_first_chunk::<4>().ok_or(PageMapError)?;
        let count = u32::from_le_bytes(*count) as usize;
        if magic != MAGIC || count > MAP_CHUNKS_MAX || rest.len() != count * ENTRY_BYTES {
            return Err(PageMapError);
        }
        for entry in rest.chunks_exact(ENTRY_BYTES) {
            let (digests, _) = entry.as_chunks::<16>();
            let (chunk, pages) = digests.split_first().ok_or(PageMapError)?;
            let pages = pages.try_into().map_err(|_| PageMapError)?;
            self.chunks.insert(ChunkDigest(*chunk), PageDigests(pages));
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn the_digest_of_a_chunk_is_the_same_with_and_without_its_pages() {
        for len in [0, 1, 8192, 65_535, 65_536] {
            let bytes = noise(1, len);
            let (digest, pages) = digest_pages(&bytes);
            assert_eq!(digest, digest_chunk(&bytes), "{len}");
            assert_eq!(pages.is_some(), len == 65_536);
        }
    }

    proptest! {
        #[test]
        fn exactly_the_pages_that_differ_have_other_digests(
            seed: u64,
            changed in prop::collection::btree_set(0usize..65_536, 0..5),
        ) {
            let old = noise(seed, CHUNK_BYTES as usize);
            let mut new = old.clone();
            for at in &changed {
                new[*at] ^= 1;
            }
            let (old, new) = (digest_pages(&old).1.unwrap().0, digest_pages(&new).1.unwrap().0);
            for page in 0..PAGES {
                let differs = changed.iter().any(|at| at / PAGE_BYTES as usize == page);
                prop_assert_eq!(old[page] != new[page], differs, "page {}", page);
            }
        }

        #[test]
        fn page_maps_come_back_and_add_up(seeds in prop::collection::vec(any::<u64>(), 0..6)) {
            let entries: Vec<_> = seeds
                .iter()
                .map(|seed| {
                    let (digest, pages) = digest_pages(&noise(*seed, CHUNK_BYTES as usize));
                    (digest, pages.unwrap())
                })
                .collect();
            let (one, other) = entries.split_at(entries.len() / 2);
            let mut map = PageMap::default();
            for part in [one, other] {
                let bytes = encode_page_map(part);
                prop_assert_eq!(bytes.len(), page_map_bytes(part.len()));
                map.add_encoded(&bytes).unwrap();
            }
            prop_assert_eq!(map.chunks, entries.into_iter().collect());
        }

        #[test]
        fn other_bytes_are_refused(bytes: Vec<u8>, cut in 0usize..152) {
            prop_assume!(bytes.len() >= 8 || !bytes.starts_with(MAGIC));
            let _ = PageMap::default().add_encoded(&bytes);
            let whole = encode_page_map(&[(digest_chunk(b""), PageDigests([[7; 16]; PAGES]))]);
            prop_assert_eq!(PageMap::default().add_encoded(&whole[..cut]), Err(PageMapError));
        }
    }
}
