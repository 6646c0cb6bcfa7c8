//! Which chunks of relation files WAL has changed, as the server's summaries of it say.
//!
//! Only main forks are asked about: the free space map is not in WAL at all, and bits of the visibility map are
//! cleared by records that do not name its blocks; both are small. A chunk that is not read must be
//! the parent's whole chunk, so a chunk at the end of a file that grew or shrank is read.
//!
//! Sources: `src/backend/postmaster/walsummarizer.c`, `src/backend/backup/basebackup_incremental.c`
//! (`GetFileBackupMethod`), `src/common/blkreftable.c` (limit blocks).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;

use super::backup::chunks_of;
use crate::format::CHUNK_BYTES;
use crate::pg::{Fork, Lsn, RelFileLocator, RelationDirectory, RelationFile};

/// What changed between two positions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChangedChunks {
    chunks_per_file: u64,
    blocks_per_chunk: u64,
    relations: HashMap<RelFileLocator, Relation>,
    /// Tablespace and database of databases that were made or moved as a whole.
    databases: HashSet<(u32, u32)>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Relation {
    /// Blocks from here on were cut off at some time, whatever stands there now.
    limit_block: Option<u64>,
    /// Counted through all files of the fork.
    chunks: BTreeSet<u64>,
}

impl ChangedChunks {
    /// Makes an empty record; `None` for a block size that chunks cannot be counted in.
    pub fn new(block_bytes: u32, blocks_per_file: u32) -> Option<Self> {
        let fits = block_bytes > 0 && CHUNK_BYTES.is_multiple_of(block_bytes);
        let blocks_per_chunk = u64::from(fits.then(|| CHUNK_BYTES / block_bytes)?);
        let chunks_per_file = u64::from(blocks_per_file) / blocks_per_chunk;
        let whole = chunks_per_file * blocks_per_chunk == u64::from(blocks_per_file);
        whole.then(|| Self { chunks_per_file, blocks_per_chunk, ..Self::default() })
    }

    /// Returns how many blocks a chunk has.
    pub fn blocks_per_chunk(&self) -> u64 {
        self.blocks_per_chunk
    }

    /// Adds what the summaries say of one main fork: the least block from which on it was cut off or
    /// made anew, and its changed chunks. Relation 0 stands for a whole database.
    pub fn add(
        &mut self,
        relation: RelFileLocator,
        limit_block: Option<u64>,
        chunks: impl IntoIterator<Item = u64>,
    ) {
        if relation.relation == 0 {
            self.databases.insert((relation.tablespace, relation.database));
            return;
        }
        let known = self.relations.entry(relation).or_default();
        known.limit_block = match (known.limit_block, limit_block) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        known.chunks.extend(chunks);
    }

    /// Returns the chunks of a file that must be read, as ranges in order; the others are as they were
    /// in the parent, where the file had `parent_size` bytes. `None` if it is to be read whole.
    pub fn chunks_to_read(
        &self,
        directory: RelationDirectory,
        file: RelationFile,
        size: u64,
        parent_size: u64,
    ) -> Option<Vec<Range<u64>>> {
        let of_whole = (directory.tablespace, directory.database);
        if file.fork != Fork::Main || self.databases.contains(&of_whole) {
            return None;
        }
        let relation = self.relations.get(&directory.relation(file));
        let first = u64::from(file.segment) * self.chunks_per_file;
        let stays = |chunk: u64| {
            let end = (chunk + 1) * u64::from(CHUNK_BYTES);
            let is_in_both = end <= size.min(parent_size) || size == parent_size;
            let is_changed = relation.is_some_and(|relation| {
                let (in_fork, blocks) = (first + chunk, self.blocks_per_chunk);
                relation.chunks.contains(&in_fork)
                    || relation.limit_block.is_some_and(|limit| (in_fork + 1) * blocks > limit)
            });
            is_in_both && !is_changed
        };
        let mut wanted: Vec<Range<u64>> = Vec::new();
        for chunk in (0..chunks_of(size)).filter(|chunk| !stays(*chunk)) {
            match wanted.last_mut() {
                Some(last) if last.end == chunk => last.end = chunk + 1,
                _ => wanted.push(chunk..chunk + 1),
            }
        }
        Some(wanted)
    }
}

/// How far summaries cover WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coverage {
    /// To the end.
    Whole,
    /// Up to here, and more may come.
    Until(Lsn),
    /// There is a hole, which nothing fills any more.
    Hole,
}

/// Tells how far summaries, each from a start (included) to an end (excluded), cover the WAL from
/// `from` to `to`.
pub fn coverage(summaries: &[(Lsn, Lsn)], from: Lsn, to: Lsn) -> Coverage {
    let mut summaries = summaries.to_vec();
    summaries.sort_unstable();
    let mut reached = from;
    for (start, end) in summaries {
        if start > reached && reached < to {
            return Coverage::Hole;
        }
        reached = reached.max(end);
    }
    if reached >= to { Coverage::Whole } else { Coverage::Until(reached) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHUNK: u64 = CHUNK_BYTES as u64;
    const HERE: RelationDirectory = RelationDirectory { tablespace: 1663, database: 5 };

    fn relation(number: u32) -> RelFileLocator {
        RelFileLocator { tablespace: 1663, database: 5, relation: number }
    }

    fn file(number: u32, fork: Fork, segment: u32) -> RelationFile {
        RelationFile { number, fork, segment }
    }

    fn nothing() -> ChangedChunks {
        ChangedChunks::new(8192, 131_072).unwrap()
    }

    fn read(
        changes: &ChangedChunks,
        file: RelationFile,
        size: u64,
        before: u64,
    ) -> Option<Vec<Range<u64>>> {
        changes.chunks_to_read(HERE, file, size, before)
    }

    #[test]
    fn of_a_main_fork_only_what_changed_or_was_not_whole_before_is_read() {
        let mut changes = nothing();
        changes.add(relation(7), None, [2, 3, 9]);
        let main = file(7, Fork::Main, 0);
        assert_eq!(read(&changes, main, 12 * CHUNK, 12 * CHUNK), Some(vec![2..4, 9..10]));
        assert_eq!(
            read(&changes, main, 12 * CHUNK, 11 * CHUNK + 8192),
            Some(vec![2..4, 9..10, 11..12])
        );
        assert_eq!(read(&changes, main, 8 * CHUNK + 8192, 12 * CHUNK), Some(vec![2..4, 8..9]));
        assert_eq!(read(&changes, file(8, Fork::Main, 0), 5 * CHUNK, 5 * CHUNK), Some(vec![]));
        for fork in [Fork::FreeSpaceMap, Fork::VisibilityMap, Fork::Init] {
            assert_eq!(read(&changes, file(8, fork, 0), 5 * CHUNK, 5 * CHUNK), None);
        }
    }

    #[test]
    fn later_files_of_a_fork_are_counted_on() {
        let mut changes = nothing();
        changes.add(relation(7), None, [16_384, 16_386]);
        let size = 4 * CHUNK;
        assert_eq!(read(&changes, file(7, Fork::Main, 0), size, size), Some(vec![]));
        assert_eq!(read(&changes, file(7, Fork::Main, 1), size, size), Some(vec![0..1, 2..3]));
    }

    #[test]
    fn what_was_cut_off_or_made_anew_is_read() {
        let mut changes = nothing();
        changes.add(relation(7), Some(20), [0]);
        changes.add(relation(7), Some(30), []);
        let size = 4 * CHUNK;
        assert_eq!(read(&changes, file(7, Fork::Main, 0), size, size), Some(vec![0..1, 2..4]));
        changes.add(relation(8), Some(0), []);
        assert_eq!(
            read(&changes, file(8, Fork::Main, 0), size, size),
            Some(std::iter::once(0..4).collect())
        );
        changes.add(relation(0), Some(0), []);
        assert_eq!(read(&changes, file(9, Fork::Main, 0), size, size), None);
        let elsewhere = RelationDirectory { tablespace: 1663, database: 6 };
        let other = changes.chunks_to_read(elsewhere, file(9, Fork::Main, 0), size, size);
        assert_eq!(other, Some(vec![]));
    }

    #[test]
    fn block_sizes_that_do_not_divide_a_chunk_are_left_alone() {
        assert_eq!(ChangedChunks::new(0, 131_072), None);
        assert_eq!(ChangedChunks::new(8192, 131_073), None);
        assert_eq!(ChangedChunks::new(32_768, 32_768).unwrap().blocks_per_chunk(), 2);
    }

    #[test]
    fn summaries_with_a_hole_do_not_cover() {
        let found = |summaries: &[(u64, u64)]| {
            let summaries: Vec<_> = summaries.iter().map(|(s, e)| (Lsn(*s), Lsn(*e))).collect();
            coverage(&summaries, Lsn(10), Lsn(50))
        };
        for whole in [&[(5, 20), (20, 60)][..], &[(20, 50), (10, 20)], &[(0, 30), (15, 50)]] {
            assert_eq!(found(whole), Coverage::Whole, "{whole:?}");
        }
        assert_eq!(found(&[]), Coverage::Until(Lsn(10)));
        assert_eq!(found(&[(5, 49)]), Coverage::Until(Lsn(49)));
        assert_eq!(found(&[(11, 60)]), Coverage::Hole);
        assert_eq!(found(&[(5, 20), (21, 60)]), Coverage::Hole);
    }

    proptest! {
        #[test]
        fn no_changed_block_is_left_unread(
            changed in prop::collection::btree_set(0u64..40, 0..8),
            limit in prop::option::of(0u64..320),
            size in 0u64..(40 * CHUNK), parent_size in 0u64..(40 * CHUNK),
        ) {
            let mut changes = nothing();
            changes.add(relation(7), limit, changed.iter().copied());
            let wanted = read(&changes, file(7, Fork::Main, 0), size, parent_size).unwrap();
            let read = |chunk| wanted.iter().any(|range| range.contains(&chunk));
            for chunk in 0..chunks_of(size) {
                let must = changed.contains(&chunk)
                    || limit.is_some_and(|limit| limit < (chunk + 1) * 8)
                    || chunk >= chunks_of(parent_size)
                    || (parent_size != size && parent_size.min(size) < (chunk + 1) * CHUNK);
                prop_assert_eq!(read(chunk), must, "chunk {}", chunk);
            }
        }
    }
}
