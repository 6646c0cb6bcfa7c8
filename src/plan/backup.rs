//! What becomes of each chunk of a backup: nothing, a reference, or stored bytes.

use std::collections::BTreeSet;

use crate::format::{
    CHUNK_BYTES, ChunkDigest, ChunkEntry, ChunkPart, PAGE_BYTES, PAGES, PageDigests, RUNS_MAX, Run,
};

/// Changed pages of a chunk beyond which it is stored whole.
const CHANGED_PAGES_MAX: usize = PAGES / 2;

/// Frames that a chunk may be joined from, so that a restore need not decompress many for each.
const FRAMES_MAX: usize = 5;

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

/// Decides which parts of a whole chunk are stored: the pages that are not as the parent has them, if they are
/// few. `None` if the chunk is to be stored whole. `old` are the pages of `parent`.
pub fn changed_parts(
    parent: &ChunkEntry,
    old: &PageDigests,
    new: &PageDigests,
) -> Option<Vec<ChunkPart>> {
    let changed = old.0.iter().zip(&new.0).map(|(old, new)| old != new);
    let pages: Vec<(u32, bool)> = (0..).zip(changed).collect();
    let changes = pages.iter().filter(|(_, is_changed)| *is_changed).count();
    // No page differs and yet the chunk does: what is known of its pages is wrong.
    if parent.runs.is_empty()
        || !parent.is_whole(CHUNK_BYTES)
        || !(1..=CHANGED_PAGES_MAX).contains(&changes)
    {
        return None;
    }
    let mut parts = Vec::new();
    for stretch in pages.chunk_by(|(_, one), (_, next)| one == next) {
        let (Some((first, is_changed)), Some((last, _))) = (stretch.first(), stretch.last()) else {
            continue;
        };
        let (start, end) = (first * PAGE_BYTES, (last + 1) * PAGE_BYTES);
        if *is_changed {
            parts.push(ChunkPart::New { in_chunk: start, bytes: end - start });
        } else {
            let cut = parent.runs.iter().filter_map(|run| cut_run(run, start, end));
            parts.extend(cut.map(ChunkPart::Kept));
        }
    }
    let kept = parts.iter().filter_map(|part| match part {
        ChunkPart::Kept(run) => Some(&run.frame),
        ChunkPart::New { .. } => None,
    });
    // The new ones go into one frame.
    let frames = kept.collect::<BTreeSet<_>>().len() + 1;
    (parts.len() <= RUNS_MAX && frames <= FRAMES_MAX).then_some(parts)
}

/// Returns what of a run lies between two places of its chunk.
fn cut_run(run: &Run, start: u32, end: u32) -> Option<Run> {
    let from = run.in_chunk.max(start);
    let to = (run.in_chunk + run.bytes).min(end);
    (from < to).then(|| Run {
        frame: run.frame.clone(),
        in_frame: run.in_frame + (from - run.in_chunk),
        in_chunk: from,
        bytes: to - from,
    })
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
    use proptest::prelude::*;

    use super::*;
    use crate::format::{BackupId, FrameRef, Packing, digest_chunk};

    /// A frame of another backup for each number.
    fn frame(number: u32) -> FrameRef {
        FrameRef {
            backup: BackupId::at(jiff::Timestamp::UNIX_EPOCH, number + 2),
            pack: 0,
            offset: 1024,
            stored: 10,
            plain: 1 << 20,
            codec: Packing::Zstd,
        }
    }

    fn pages(versions: [u8; PAGES]) -> PageDigests {
        PageDigests(versions.map(|version| [version; 16]))
    }

    /// Which backup each page comes from, as the runs say; `u32::MAX` for those to be stored.
    fn sources(parts: &[ChunkPart]) -> Vec<u32> {
        let of = |part: &ChunkPart| match part {
            ChunkPart::New { bytes, .. } => (u32::MAX, *bytes),
            ChunkPart::Kept(run) => {
                // Every frame holds the whole chunk from byte 100 on, so that places can be told.
                assert_eq!(run.in_frame, run.in_chunk + 100);
                let number = (0..20).find(|number| run.frame == frame(*number));
                (number.unwrap_or(99), run.bytes)
            }
        };
        let pages = |(source, bytes)| vec![source; (bytes / PAGE_BYTES) as usize];
        parts.iter().map(of).flat_map(pages).collect()
    }

    fn entry(parts: &[ChunkPart], number: u32) -> ChunkEntry {
        let runs = parts.iter().map(|part| match part {
            ChunkPart::Kept(run) => run.clone(),
            ChunkPart::New { in_chunk, bytes } => Run {
                frame: frame(number),
                in_frame: in_chunk + 100,
                in_chunk: *in_chunk,
                bytes: *bytes,
            },
        });
        ChunkEntry { digest: digest_chunk(b""), runs: runs.collect() }
    }

    const ALL: ChunkPart = ChunkPart::New { in_chunk: 0, bytes: CHUNK_BYTES };

    #[test]
    fn of_a_chunk_with_few_changed_pages_only_these_are_stored() {
        const NEW: u32 = u32::MAX;
        let parent = entry(&[ALL], 0);
        let old = pages([0; PAGES]);
        let parts = |new| changed_parts(&parent, &old, &pages(new)).map(|parts| sources(&parts));
        assert_eq!(parts([0, 0, 0, 1, 0, 0, 0, 0]), Some(vec![0, 0, 0, NEW, 0, 0, 0, 0]));
        assert_eq!(parts([1, 1, 0, 0, 0, 0, 1, 1]), Some(vec![NEW, NEW, 0, 0, 0, 0, NEW, NEW]));
        assert_eq!(parts([1, 1, 1, 1, 1, 0, 0, 0]), None, "most of it changed");
        assert_eq!(parts([0; PAGES]), None, "a chunk differs although no page does");
    }

    #[test]
    fn a_chunk_whose_parent_is_zeros_or_not_whole_is_stored_whole() {
        let (old, new) = (pages([0; PAGES]), pages([0, 0, 0, 1, 0, 0, 0, 0]));
        let zeros = ChunkEntry { digest: digest_chunk(b""), runs: Vec::new() };
        assert_eq!(changed_parts(&zeros, &old, &new), None);
        let half = ChunkPart::New { in_chunk: 0, bytes: CHUNK_BYTES / 2 };
        assert_eq!(changed_parts(&entry(&[half], 0), &old, &new), None);
    }

    proptest! {
        /// One backup after another, each changing some pages: what is kept comes from the backup that
        /// last changed it, and neither runs nor frames grow beyond their limits.
        #[test]
        fn each_page_comes_from_the_backup_that_changed_it_last(
            changes in prop::collection::vec(prop::collection::btree_set(0..PAGES, 1..6), 1..20),
        ) {
            let mut parent = entry(&[ALL], 0);
            let mut versions = [0u8; PAGES];
            let mut wanted = [0u32; PAGES];
            for (number, changed) in (1u32..).zip(changes) {
                let old = pages(versions);
                for page in &changed {
                    versions[*page] = u8::try_from(number).unwrap_or(u8::MAX);
                }
                let parts = changed_parts(&parent, &old, &pages(versions));
                match &parts {
                    Some(_) => changed.iter().for_each(|page| wanted[*page] = number),
                    None => wanted = [number; PAGES],
                }
                parent = entry(&parts.unwrap_or_else(|| vec![ALL]), number);
                prop_assert!(parent.is_whole(CHUNK_BYTES) && parent.runs.len() <= RUNS_MAX);
                let kept: Vec<ChunkPart> =
                    parent.runs.iter().cloned().map(ChunkPart::Kept).collect();
                prop_assert_eq!(&sources(&kept)[..], &wanted[..]);
                let frames: BTreeSet<_> = parent.runs.iter().map(|run| &run.frame).collect();
                prop_assert!(frames.len() <= FRAMES_MAX);
            }
        }
    }

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
