//! Reading files that a server is writing to: stretches of them, and their pages until they are whole.
//!
//! Owns: opening without following links, reading past the page cache's contents without filling it,
//! and reading a page again that was caught half-written. Never here: which files, or what a damaged
//! page means for a backup.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Advice, OFlags, fadvise};
use rustix::io::{ReadWriteFlags, preadv2};

use super::disk::DiskError;
use crate::pg::{Lsn, PageState, page_state};

/// Pauses between the readings of a page that fails its checksum. A write of a page takes
/// microseconds, unless its process is not scheduled in the middle of it.
const PAGE_PAUSES: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(1),
    Duration::from_millis(10),
    Duration::from_millis(50),
    Duration::from_millis(100),
];

/// A file that is open for reading.
#[derive(Debug)]
pub struct ReadFile {
    file: File,
    place: PathBuf,
}

impl ReadFile {
    /// Opens a regular file; `None` if it is gone, or no regular file any more.
    ///
    /// Errors: any other refusal of the disk.
    pub fn open(place: &Path) -> Result<Option<Self>, DiskError> {
        let failed = |error| DiskError::new("open", place, error);
        // Whoever swaps a pipe in must not make us wait for its writer.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits();
        let flags = i32::try_from(flags).unwrap_or_default();
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(place) {
            Ok(file) => file,
            // A link in its place is no file of the server's.
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        if !file.metadata().map_err(failed)?.is_file() {
            return Ok(None);
        }
        // Stretches are read by several threads; the kernel's guess at what comes next would only
        // fill the server's page cache.
        let _ = fadvise(&file, 0, None, Advice::Random);
        Ok(Some(Self { file, place: place.to_owned() }))
    }

    /// Fills `buffer` from `offset` on; returns how many bytes there were, fewer only at the end of
    /// the file. What was not in the page cache before is not in it afterwards.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, DiskError> {
        let cached = self.read_cached(offset, buffer);
        let mut filled = cached.unwrap_or(0);
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(DiskError::new("read", &self.place, error)),
            }
        }
        // Where it is not known what was cached, the server's own pages are left alone.
        if let Some(cached) = cached
            && let Some(length) = NonZeroU64::new(filled.saturating_sub(cached) as u64)
        {
            let _ = fadvise(&self.file, offset + cached as u64, Some(length), Advice::DontNeed);
        }
        Ok(filled)
    }

    /// Reads as far as the page cache reaches; `None` if the file system cannot tell.
    fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> Option<usize> {
        let mut slices = [IoSliceMut::new(buffer)];
        match preadv2(&self.file, &mut slices, offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => Some(read),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Some(0),
            Err(_) => None,
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
    kinds.contains(&error.kind())
        || error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

/// What must be known to judge pages.
#[derive(Debug, Clone, Copy)]
pub struct PageRules {
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Blocks in each but the last file of a fork.
    pub blocks_per_file: u32,
    /// Where replay will begin: WAL holds each page that was changed since, whole.
    pub start_lsn: Lsn,
}

/// A page whose checksum was wrong whenever it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SuspectPage {
    /// The block, counted from the beginning of this file.
    pub block: u64,
    /// The position that its header names.
    pub lsn: Lsn,
}

/// Checks the whole pages in `buffer`, which was read from `file` at `offset`, file `segment` of its
/// fork. A page that fails is read again, and what was read last replaces it in `buffer`.
///
/// Returns the pages that stayed wrong, those among them that WAL will replace too: whether such a
/// one can have been written before the backup's end, its caller knows. Blocks the thread for up to
/// a fraction of a second for each wrong page that is older than the backup's start.
pub fn check_pages(
    file: &ReadFile,
    segment: u32,
    offset: u64,
    buffer: &mut [u8],
    rules: PageRules,
) -> Result<Vec<SuspectPage>, DiskError> {
    let mut suspects = Vec::new();
    if rules.page_bytes == 0 {
        return Ok(suspects);
    }
    let first = offset / rules.page_bytes as u64;
    for (block, page) in (first..).zip(buffer.chunks_exact_mut(rules.page_bytes)) {
        let in_fork = u64::from(segment) * u64::from(rules.blocks_per_file) + block;
        // A fork has at most 2^32 - 1 blocks (`MaxBlockNumber`).
        let in_fork = u32::try_from(in_fork).unwrap_or(u32::MAX);
        if let PageState::Broken { lsn } = page_state(page, in_fork) {
            let at = block * rules.page_bytes as u64;
            if let Some(lsn) = read_again(file, at, page, in_fork, lsn, rules.start_lsn)? {
                suspects.push(SuspectPage { block, lsn });
            }
        }
    }
    Ok(suspects)
}

/// Reads a page until it is sound; returns the position it names if it never was.
fn read_again(
    file: &ReadFile,
    at: u64,
    page: &mut [u8],
    in_fork: u32,
    mut lsn: Lsn,
    start_lsn: Lsn,
) -> Result<Option<Lsn>, DiskError> {
    for (attempt, pause) in PAGE_PAUSES.into_iter().enumerate() {
        // Torn or not, WAL replaces it; once more is enough to see that its position was no accident.
        if attempt > 0 && lsn >= start_lsn {
            break;
        }
        std::thread::sleep(pause);
        let mut again = vec![0; page.len()];
        if file.read_at(at, &mut again)? < page.len() {
            // Cut off meanwhile.
            return Ok(None);
        }
        page.copy_from_slice(&again);
        match page_state(page, in_fork) {
            PageState::Broken { lsn: found } => lsn = found,
            PageState::New | PageState::Sound => return Ok(None),
        }
    }
    Ok(Some(lsn))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::pg::page_checksum;

    const PAGE: usize = 8192;

    fn rules(start_lsn: u64) -> PageRules {
        PageRules { page_bytes: PAGE, blocks_per_file: 131_072, start_lsn: Lsn(start_lsn) }
    }

    /// A sound page of this position.
    fn page(lsn: u64, block: u32) -> Vec<u8> {
        let mut page = vec![u8::try_from(block % 251).unwrap(); PAGE];
        page[..4].copy_from_slice(&u32::try_from(lsn >> 32).unwrap().to_le_bytes());
        page[4..8].copy_from_slice(&u32::try_from(lsn & 0xFFFF_FFFF).unwrap().to_le_bytes());
        page[14] = 1;
        let sum = page_checksum(&page, block).to_le_bytes();
        page[8..10].copy_from_slice(&sum);
        page
    }

    fn file_of(bytes: &[u8]) -> (tempfile::TempDir, ReadFile) {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("1");
        fs::write(&place, bytes).unwrap();
        let file = ReadFile::open(&place).unwrap().unwrap();
        (dir, file)
    }

    #[test]
    fn a_file_is_read_from_any_place_up_to_its_end() {
        let (_dir, file) = file_of(b"0123456789");
        let mut buffer = [0; 6];
        assert_eq!(file.read_at(2, &mut buffer).unwrap(), 6);
        assert_eq!(&buffer, b"234567");
        assert_eq!(file.read_at(8, &mut buffer).unwrap(), 2);
        assert_eq!(file.read_at(10, &mut buffer).unwrap(), 0);
    }

    #[test]
    fn what_is_gone_or_no_file_any_more_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("x");
        assert!(ReadFile::open(&place).unwrap().is_none());
        assert!(ReadFile::open(&place.join("y")).unwrap().is_none());
        assert!(ReadFile::open(dir.path()).unwrap().is_none());
        fs::write(dir.path().join("z"), b"").unwrap();
        symlink(dir.path().join("z"), &place).unwrap();
        assert!(ReadFile::open(&place).unwrap().is_none());
    }

    #[test]
    fn damaged_pages_are_named_and_sound_new_and_cut_ones_are_not() {
        let mut bytes = [page(5, 0), page(5, 1), vec![0; PAGE], page(5, 3), page(5, 4)].concat();
        bytes[PAGE + 4000] ^= 1;
        bytes[3 * PAGE + 4000] ^= 1;
        bytes.truncate(4 * PAGE + 100);
        let (_dir, file) = file_of(&bytes);
        let mut buffer = vec![0; bytes.len()];
        file.read_at(0, &mut buffer).unwrap();
        let suspects = check_pages(&file, 0, 0, &mut buffer, rules(9)).unwrap();
        let lsn = Lsn(5);
        assert_eq!(suspects, [SuspectPage { block: 1, lsn }, SuspectPage { block: 3, lsn }]);
        assert_eq!(buffer, bytes);
    }

    #[test]
    fn a_page_is_judged_by_its_place_in_the_whole_fork() {
        let bytes = [page(5, 131_072), page(5, 131_073)].concat();
        let (_dir, file) = file_of(&bytes);
        let check = |segment, offset: usize| {
            let mut buffer = bytes[offset..].to_vec();
            check_pages(&file, segment, offset as u64, &mut buffer, rules(9)).unwrap().len()
        };
        assert_eq!((check(1, 0), check(1, PAGE), check(0, 0)), (0, 0, 2));
    }

    #[test]
    fn a_page_that_wal_replaces_is_reported_with_its_position() {
        let mut bytes = page(0x1_0000_0007, 0);
        bytes[4000] ^= 1;
        let (_dir, file) = file_of(&bytes);
        let suspects = check_pages(&file, 0, 0, &mut bytes, rules(9)).unwrap();
        assert_eq!(suspects, [SuspectPage { block: 0, lsn: Lsn(0x1_0000_0007) }]);
    }

    #[test]
    fn a_page_caught_half_written_is_taken_as_it_is_in_the_end() {
        let whole = page(5, 0);
        let (_dir, file) = file_of(&whole);
        let mut torn = whole.clone();
        torn[4096..].fill(0);
        assert_eq!(check_pages(&file, 0, 0, &mut torn, rules(9)).unwrap(), []);
        assert_eq!(torn, whole);
    }

    #[test]
    fn a_file_that_is_written_to_all_the_time_has_no_damaged_page() {
        let (dir, file) = file_of(&page(5, 0));
        let place = dir.path().join("1");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let writer = OpenOptions::new().write(true).open(&place).unwrap();
                let pages = [page(5, 0), page(6, 0)];
                for turn in 0.. {
                    writer.write_all_at(&pages[turn % 2], 0).unwrap();
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            let mut suspects = 0;
            for _ in 0..2000 {
                let mut buffer = vec![0; PAGE];
                file.read_at(0, &mut buffer).unwrap();
                suspects += check_pages(&file, 0, 0, &mut buffer, rules(9)).unwrap().len();
            }
            stop.store(true, Ordering::Relaxed);
            assert_eq!(suspects, 0);
        });
    }
}
