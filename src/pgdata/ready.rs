//! The files that PostgreSQL wants archived: `pg_wal/archive_status/<name>.ready`.
//!
//! Owns reading that directory, cheaply while nothing changes in it and within bounds however much waits.
//! Never here: archiving, and any write: the status files are PostgreSQL's.
//!
//! The server makes `<name>.ready` when a file is complete and on disk, and renames it to `<name>.done` when
//! `archive_command` has exited 0 (`src/backend/postmaster/pgarch.c`, `src/backend/access/transam/xlogarchive.c`).

use std::collections::BinaryHeap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::disk::DiskError;
use super::spool::TIMES_MARGIN;
use crate::pg::{ArchiveOrder, WalFileName};

/// The oldest files that wait to be archived.
#[derive(Debug)]
pub struct ReadyFiles {
    directory: PathBuf,
    most: usize,
    /// The directory's times when it was read, if a change since then must show in them.
    read_at: Option<(i64, i64)>,
    oldest: Vec<WalFileName>,
}

impl ReadyFiles {
    /// Will look into `archive_status` of this directory of WAL, for at most so many files.
    pub fn new(wal_directory: &Path, most: usize) -> Self {
        let directory = wal_directory.join("archive_status");
        Self { directory, most, read_at: None, oldest: Vec::new() }
    }

    /// Looks which files wait, in the order in which PostgreSQL hands them over. Reads the directory only if it
    /// may have changed; then it takes time for each of its entries, and memory for the files returned alone.
    ///
    /// # Errors
    /// The directory cannot be read; it may be again at another call.
    pub fn look(&mut self) -> Result<&[WalFileName], DiskError> {
        let failed = |error: io::Error| DiskError::new("read", &self.directory, error);
        let metadata = fs::metadata(&self.directory).map_err(failed)?;
        let times = (metadata.mtime(), metadata.mtime_nsec());
        if self.read_at != Some(times) {
            self.oldest = oldest_of(&self.directory, self.most).map_err(failed)?;
            // In the same tick of the clock as the last change another one would not show.
            let settled = SystemTime::now().checked_sub(TIMES_MARGIN);
            let since = settled.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
            let modified = Duration::from_secs(u64::try_from(times.0).unwrap_or(u64::MAX));
            self.read_at = since.is_some_and(|since| modified < since).then_some(times);
        }
        Ok(&self.oldest)
    }
}

fn oldest_of(directory: &Path, most: usize) -> io::Result<Vec<WalFileName>> {
    let mut oldest: BinaryHeap<(ArchiveOrder, WalFileName)> = BinaryHeap::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let ready = name.to_str().and_then(|name| name.strip_suffix(".ready"));
        if let Some(name) = ready.and_then(|name| WalFileName::parse(name).ok()) {
            oldest.push((name.archive_order(), name));
            if oldest.len() > most {
                oldest.pop();
            }
        }
    }
    Ok(oldest.into_sorted_vec().into_iter().map(|(_, name)| name).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn wal_with(names: &[&str]) -> tempfile::TempDir {
        let wal = tempfile::tempdir().unwrap();
        fs::create_dir(wal.path().join("archive_status")).unwrap();
        for name in names {
            fs::write(wal.path().join("archive_status").join(name), "").unwrap();
        }
        wal
    }

    fn look(files: &mut ReadyFiles) -> Vec<String> {
        files.look().unwrap().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_waits_comes_in_the_archivers_order_and_nothing_else_does() {
        let wal = wal_with(&[
            "000000010000000000000009.ready",
            "000000010000000000000007.ready",
            "000000010000000000000007.partial.ready",
            "000000010000000000000007.00000028.backup.ready",
            "000000010000000000000006.done",
            "00000002.history.ready",
            "RECOVERYXLOG.ready",
            "nonsense",
        ]);
        let wanted = [
            "00000002.history",
            "000000010000000000000007",
            "000000010000000000000007.00000028.backup",
            "000000010000000000000007.partial",
            "000000010000000000000009",
        ];
        assert_eq!(look(&mut ReadyFiles::new(wal.path(), 64)), wanted);
        assert_eq!(look(&mut ReadyFiles::new(wal.path(), 2)), wanted[..2]);
    }

    #[test]
    fn a_change_is_seen_however_soon_it_comes() {
        let wal = wal_with(&["000000010000000000000007.ready"]);
        let mut files = ReadyFiles::new(wal.path(), 64);
        let path = |name: &str| wal.path().join("archive_status").join(name);
        assert_eq!(look(&mut files).len(), 1);
        fs::write(path("000000010000000000000008.ready"), "").unwrap();
        assert_eq!(look(&mut files).len(), 2);
        let of = |name: &str| (path(&format!("{name}.ready")), path(&format!("{name}.done")));
        let (ready, done) = of("000000010000000000000007");
        fs::rename(ready, done).unwrap();
        assert_eq!(look(&mut files), ["000000010000000000000008"]);
    }

    #[test]
    fn a_directory_that_has_rested_is_not_read_again() {
        let wal = wal_with(&["000000010000000000000007.ready"]);
        let directory = fs::File::open(wal.path().join("archive_status")).unwrap();
        let set = |seconds: u64| {
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            directory.set_times(fs::FileTimes::new().set_modified(time)).unwrap();
        };
        set(1_700_000_000);
        let mut files = ReadyFiles::new(wal.path(), 64);
        assert_eq!(look(&mut files).len(), 1);
        fs::write(wal.path().join("archive_status/000000010000000000000008.ready"), "").unwrap();
        set(1_700_000_000);
        assert_eq!(look(&mut files).len(), 1, "its times are as they were");
        // From a clock that stood wrong: then nothing is sure.
        set(4_000_000_000);
        assert_eq!(look(&mut files).len(), 2);
        fs::remove_file(wal.path().join("archive_status/000000010000000000000008.ready")).unwrap();
        set(4_000_000_000);
        assert_eq!(look(&mut files).len(), 1);
    }

    #[test]
    fn a_directory_that_is_gone_is_an_error_and_not_an_empty_one() {
        let wal = tempfile::tempdir().unwrap();
        assert!(ReadyFiles::new(wal.path(), 64).look().is_err());
    }
}
