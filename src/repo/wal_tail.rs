//! The end of a segment as it is stored: its last pages that hold something.

use std::collections::VecDeque;
use std::io;

use super::{PIECE_BYTES, RepoError, Repository, WHOLE_SEGMENT_BYTES_MAX};
use crate::format::WalObject;
use crate::pg::{SegmentName, SegmentSize, SystemId};

/// The usual page of WAL. Where pages are larger these are parts of them.
const PAGE_BYTES: usize = 8 << 10;

/// How many pages are returned, at most: a last record alone may be the same in two histories by chance.
const PAGES_MAX: usize = 16;

/// The last pages of a segment that hold something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTail {
    /// The offset of their first byte in the segment.
    pub offset: u64,
    /// They; up to 128 KiB.
    pub bytes: Vec<u8>,
}

impl Repository {
    /// Returns the last pages of a segment that are not all zeros; `None` where not all of the segment is stored, or it
    /// holds only zeros. Of a large segment no more is read than its last units, where they are stored.
    ///
    /// # Errors
    /// As [`Self::fetch_segment`].
    pub async fn stored_tail(
        &self,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Option<StoredTail>, RepoError> {
        if size.bytes() > WHOLE_SEGMENT_BYTES_MAX {
            for start in (0..u32::from(size)).step_by(PIECE_BYTES as usize).rev() {
                let object = WalObject::Piece { segment, start, end: start + PIECE_BYTES };
                let mut tail = Tail::default();
                let key = self.wal_key(system_id, object);
                match self.fetch(&key, tail.sink()).await {
                    Ok(_) if tail.is_empty() => {}
                    Ok(_) => return Ok(Some(tail.end(u64::from(start)))),
                    Err(error) if error.is_absent() => break,
                    Err(error) => return Err(error),
                }
            }
        }
        let mut tail = Tail::default();
        let source = self.fetch_segment(system_id, segment, size, tail.sink()).await?;
        let is_all = source.is_some_and(|source| source.is_all_of(size));
        Ok((is_all && !tail.is_empty()).then(|| tail.end(0)))
    }
}

/// The last pages that are not all zeros, of bytes that come in order. Behind a switch there are only zeros.
#[derive(Default)]
struct Tail {
    pages: VecDeque<Vec<u8>>,
    /// The bytes of a page that is not complete.
    page: Vec<u8>,
    /// Where the last of `pages` ends.
    end: u64,
    taken: u64,
}

impl Tail {
    fn sink(&mut self) -> impl FnMut(&[u8]) -> io::Result<()> {
        |block| {
            self.feed(block);
            Ok(())
        }
    }

    fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = PAGE_BYTES - self.page.len();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.page.extend_from_slice(now);
            self.taken += now.len() as u64;
            bytes = later;
            if self.page.len() == PAGE_BYTES {
                self.take_page();
            }
        }
    }

    fn take_page(&mut self) {
        let page = std::mem::take(&mut self.page);
        if page.iter().all(|byte| *byte == 0) {
            return;
        }
        if self.end + (PAGE_BYTES as u64) < self.taken {
            // Zeros lie between.
            self.pages.clear();
        }
        if self.pages.len() == PAGES_MAX {
            self.pages.pop_front();
        }
        self.pages.push_back(page);
        self.end = self.taken;
    }

    fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Returns the pages, and the offset of the first in what has `before` bytes more before it.
    fn end(self, before: u64) -> StoredTail {
        let bytes: Vec<u8> = self.pages.into_iter().flatten().collect();
        StoredTail { offset: before + self.end - bytes.len() as u64, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what is kept of pages of these bytes, fed in blocks of that size: the offset, and a byte of each page.
    fn kept(pages: &[u8], block: usize) -> (u64, Vec<u8>) {
        let mut tail = Tail::default();
        let bytes: Vec<u8> = pages.iter().flat_map(|byte| vec![*byte; PAGE_BYTES]).collect();
        bytes.chunks(block).for_each(|block| tail.feed(block));
        let StoredTail { offset, bytes } = tail.end(0);
        (offset / PAGE_BYTES as u64, bytes.chunks(PAGE_BYTES).map(|page| page[0]).collect())
    }

    #[test]
    fn the_last_pages_that_hold_something_are_kept() {
        for block in [1000, PAGE_BYTES, 50_000] {
            assert_eq!(kept(&[1, 2, 3], block), (0, vec![1, 2, 3]));
            assert_eq!(kept(&[1, 2, 3, 0, 0], block), (0, vec![1, 2, 3]));
            assert_eq!(kept(&[1, 2, 0, 3, 0], block), (3, vec![3]));
            assert_eq!(kept(&[0, 0], block), (0, vec![]));
            let many: Vec<u8> = (1..=40).collect();
            assert_eq!(kept(&many, block), (24, many[24..].to_vec()));
        }
    }
}
