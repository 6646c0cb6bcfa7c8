//! Sorted numbers in place of tables: what is known of millions of paths, in eight bytes for each.
//!
//! Never here: paths themselves, or what is done with an answer.

use std::hash::{BuildHasher, Hash, RandomState};

/// The low bits of an entry of [`PathIndex`] say where its line is; there are never more list frames (of 512 KiB).
const FRAME_BITS: u32 = 24;
const FRAME_MASK: u64 = (1 << FRAME_BITS) - 1;

/// A set of things of which only a 64-bit hash is kept. Of a million absent things, a set of a million holds one by
/// mistake once in 18 million times.
#[derive(Debug, Default)]
pub struct HashedSet {
    hasher: RandomState,
    hashes: Vec<u64>,
}

impl HashedSet {
    /// Makes a set that takes `capacity` things without growing.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { hasher: RandomState::new(), hashes: Vec::with_capacity(capacity) }
    }

    /// Adds a thing.
    pub fn add(&mut self, thing: impl Hash) {
        self.hashes.push(self.hasher.hash_one(thing));
    }

    /// Must be called after the last [`Self::add`], before the first question.
    pub fn close(&mut self) {
        self.hashes.sort_unstable();
    }

    /// Returns whether the thing was added.
    pub fn holds(&self, thing: impl Hash) -> bool {
        self.hashes.binary_search(&self.hasher.hash_one(thing)).is_ok()
    }
}

/// Where in a file list the line of a path may be.
#[derive(Debug, Default)]
pub(super) struct PathIndex {
    hasher: RandomState,
    /// 40 bits of the path's hash, then the number of the list frame.
    entries: Vec<u64>,
}

impl PathIndex {
    /// Makes an index that takes `capacity` paths without growing.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self { hasher: RandomState::new(), entries: Vec::with_capacity(capacity) }
    }

    /// Returns how many paths it has.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn add(&mut self, path: &[u8], frame: u32) {
        self.entries.push(self.hash(path) | u64::from(frame) & FRAME_MASK);
    }

    /// Must be called after the last `add`, before the first question.
    pub(super) fn close(&mut self) {
        self.entries.sort_unstable();
    }

    /// Returns the list frames that may have the line of `path`: mostly one, or none.
    pub(super) fn frames_of(&self, path: &[u8]) -> impl Iterator<Item = u32> {
        let hash = self.hash(path);
        let first = self.entries.partition_point(|entry| *entry < hash);
        let alike =
            self.entries[first..].iter().take_while(move |entry| **entry & !FRAME_MASK == hash);
        let frames = alike.map(|entry| u32::try_from(entry & FRAME_MASK).unwrap_or(u32::MAX));
        // Two paths of one frame may be alike.
        let mut last = None;
        frames.filter(move |frame| last.replace(*frame) != Some(*frame))
    }

    fn hash(&self, path: &[u8]) -> u64 {
        self.hasher.hash_one(path) & !FRAME_MASK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_is_found_in_its_frame_and_hardly_any_other() {
        let mut index = PathIndex::with_capacity(0);
        let path = |number: u32| format!("base/5/{number}").into_bytes();
        for number in (0..100_000).rev() {
            index.add(&path(number), number / 2600);
        }
        index.close();
        assert_eq!(index.len(), 100_000);
        for number in 0..100_000 {
            assert!(index.frames_of(&path(number)).any(|frame| frame == number / 2600), "{number}");
        }
        let mistaken = (100_000..200_000).filter(|n| index.frames_of(&path(*n)).count() > 0);
        assert!(mistaken.count() < 3, "one of a hundred expected at most");
    }

    #[test]
    fn a_set_holds_what_was_added_and_nothing_else() {
        let mut set = HashedSet::with_capacity(10);
        for number in 0..10_000u64 {
            set.add((number, "x"));
        }
        set.close();
        assert!((0..10_000u64).all(|number| set.holds((number, "x"))));
        assert!(!(10_000..20_000u64).any(|number| set.holds((number, "x"))));
        assert!(!HashedSet::default().holds(1));
    }
}
