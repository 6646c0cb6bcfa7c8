//! Where new WAL joins what is stored: right before it the server must have what is stored there.
//!
//! A server that was put back to an earlier state without recovery goes on under the same timeline, and writes other WAL at
//! positions that are stored. Within a segment the session compares every stored byte with the server's; where a stream
//! begins at a segment's border it would compare none, so the end of the segment before is compared here:
//!
//! ```text
//!   stored   … | segment before  [ up to 128 KiB, and the last page that holds something ] 0 0 0 |
//!   server   … |                 [ the same bytes?                                       ]       | stream from here
//! ```

use std::collections::VecDeque;
use std::io;

use super::UNHARMED;
use super::source::{Facts, connect_aside};
use super::troubles::diverges;
use crate::causes::in_one_line;
use crate::failure::{Failure, Kind};
use crate::format::WalObject;
use crate::ops::failures::{kind_of_repo, of_postgres, of_repo};
use crate::pg::{Lsn, SegmentName, Timeline, TimelineHistory};
use crate::plan::receive::Start;
use crate::repo::{PIECE_BYTES, RepoError, Repository, SegmentSource, WHOLE_SEGMENT_BYTES_MAX};
use crate::walsender::{PgError, StreamEvent, StreamStart};

/// The usual page of WAL. Where pages are larger these are parts of them.
const PAGE_BYTES: usize = 8 << 10;

/// How many pages are compared, at most: a last record alone may be the same in two histories by chance.
const PAGES_MAX: usize = 16;

/// A stretch of stored WAL.
struct Stretch {
    timeline: Timeline,
    start_lsn: Lsn,
    bytes: Vec<u8>,
}

/// Fails if the server's WAL right before `start` is not what is stored there, as far as both have it.
pub(super) async fn check(
    repository: &Repository,
    facts: &Facts,
    history: &TimelineHistory,
    start: Start,
) -> Result<(), Failure> {
    if start.first_missing != start.lsn {
        return Ok(());
    }
    let Some(stored) = stored_before(repository, facts, history, start.lsn).await? else {
        return Ok(());
    };
    match sent(facts, &stored).await {
        Ok(Some(sent)) if sent != stored.bytes => {
            let end = Lsn(stored.start_lsn.0 + stored.bytes.len() as u64);
            Err(diverges(facts, &format!(" between {} and {end}", stored.start_lsn)))
        }
        Ok(_) => Ok(()),
        Err(error) if error.is_without_room() => {
            tracing::warn!(
                "whether this server is the one whose WAL is stored before {} could not be told, since it takes no second connection: {error}. Raise max_wal_senders",
                start.lsn
            );
            Ok(())
        }
        Err(error) => Err(of_postgres(error, "could not compare stored WAL", UNHARMED)),
    }
}

/// Returns the end of what is stored before `lsn`, a segment's border, with its last record; `None` where not all of that
/// segment is stored, or it cannot be read.
async fn stored_before(
    repository: &Repository,
    facts: &Facts,
    history: &TimelineHistory,
    lsn: Lsn,
) -> Result<Option<Stretch>, Failure> {
    let size = facts.segment_size;
    let Some(number) = size.segment_of(lsn).checked_sub(1) else { return Ok(None) };
    let timeline = history.owner_of(Lsn(lsn.0 - 1));
    let segment = SegmentName::new(timeline, number, size);
    match tail_of(repository, facts, segment).await {
        Ok(tail) => Ok(tail.map(|(offset, bytes)| {
            let start_lsn = Lsn(size.start_of(number).0 + offset);
            Stretch { timeline, start_lsn, bytes }
        })),
        Err(error) if kind_of_repo(&error) == Kind::Store => {
            Err(of_repo(error, "could not read stored WAL", UNHARMED))
        }
        // An old object that cannot be read must not keep new ones from being stored.
        Err(error) => {
            tracing::error!(
                "whether this server is the one whose WAL is stored before {lsn} could not be told: {}",
                in_one_line(&error)
            );
            Ok(None)
        }
    }
}

/// Returns the last pages of a segment that are not all zeros, and the offset of the first.
async fn tail_of(
    repository: &Repository,
    facts: &Facts,
    segment: SegmentName,
) -> Result<Option<(u64, Vec<u8>)>, RepoError> {
    let (system_id, size) = (facts.system_id, facts.segment_size);
    if size.bytes() > WHOLE_SEGMENT_BYTES_MAX {
        // From the last unit on: the rest need not be read.
        for start in (0..u32::from(size)).step_by(PIECE_BYTES as usize).rev() {
            let object = WalObject::Piece { segment, start, end: start + PIECE_BYTES };
            let mut tail = Tail::default();
            let key = repository.wal_key(system_id, object);
            match repository.fetch(&key, tail.sink()).await {
                Ok(_) if tail.is_empty() => {}
                Ok(_) => return Ok(Some(tail.end(u64::from(start)))),
                Err(error) if error.is_absent() => break,
                Err(error) => return Err(error),
            }
        }
    }
    let mut tail = Tail::default();
    let source = repository.fetch_segment(system_id, segment, size, tail.sink()).await?;
    let is_all = match source {
        Some(SegmentSource::Whole) => true,
        Some(SegmentSource::Pieces { valid_bytes }) => valid_bytes == size.bytes(),
        Some(SegmentSource::Partial { .. }) | None => false,
    };
    Ok((is_all && !tail.is_empty()).then(|| tail.end(0)))
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
    fn end(self, before: u64) -> (u64, Vec<u8>) {
        let bytes: Vec<u8> = self.pages.into_iter().flatten().collect();
        (before + self.end - bytes.len() as u64, bytes)
    }
}

/// Asks the server for the same stretch; `None` where it has not all of it.
async fn sent(facts: &Facts, stored: &Stretch) -> Result<Option<Vec<u8>>, PgError> {
    let connection = connect_aside(facts).await?;
    let start = StreamStart { slot: None, start_lsn: stored.start_lsn, timeline: stored.timeline };
    let mut stream = match connection.stream_wal(&start).await {
        Ok(stream) => stream,
        Err(error) if error.is_wal_removed() => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    while bytes.len() < stored.bytes.len() {
        match stream.next().await {
            Ok(StreamEvent::Wal { data, .. }) => bytes.extend_from_slice(&data),
            Ok(StreamEvent::Keepalive { .. }) => {}
            Ok(StreamEvent::TimelineEnd { .. } | StreamEvent::ServerStopped) => return Ok(None),
            Err(error) if error.is_wal_removed() => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(stored.bytes.len());
    // Only a matter of good manners.
    drop(stream.stop().await);
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what is kept of pages of these bytes, fed in blocks of that size: the offset, and a byte of each page.
    fn kept(pages: &[u8], block: usize) -> (u64, Vec<u8>) {
        let mut tail = Tail::default();
        let bytes: Vec<u8> = pages.iter().flat_map(|byte| vec![*byte; PAGE_BYTES]).collect();
        bytes.chunks(block).for_each(|block| tail.feed(block));
        let (offset, bytes) = tail.end(0);
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
