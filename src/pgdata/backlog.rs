//! How much WAL waits on this host, and how much room its disks have.
//!
//! Never here: what is done about it (`plan::stall`), and any write.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use super::disk::DiskError;
use crate::pg::WalFileName;

/// Files, their bytes, and the age of the oldest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backlog {
    /// How many.
    pub files: u64,
    /// Their lengths together.
    pub bytes: u64,
    /// When the oldest of them was complete, by this host's clock.
    pub oldest: Option<SystemTime>,
}

impl Backlog {
    fn add(&mut self, bytes: u64, since: Option<SystemTime>) {
        self.files += 1;
        self.bytes += bytes;
        self.oldest = match (self.oldest, since) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
    }
}

/// Returns what PostgreSQL wants archived and has not got archived: files with a `.ready` beside them. Right for a
/// server that writes nothing: then nothing waits.
///
/// # Errors
/// The directory cannot be read; it may be again at another call.
pub fn waiting_wal(wal_directory: &Path) -> Result<Backlog, DiskError> {
    let status = wal_directory.join("archive_status");
    let failed = |error| DiskError::new("read", &status, error);
    let mut all = Backlog::default();
    for entry in fs::read_dir(&status).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".ready")) else {
            continue;
        };
        if WalFileName::parse(name).is_err() {
            continue;
        }
        // Archived and recycled since it was listed: it does not wait.
        let Ok(file) = fs::metadata(wal_directory.join(name)) else { continue };
        let since = entry.metadata().and_then(|metadata| metadata.modified()).ok();
        all.add(file.len(), since);
    }
    Ok(all)
}

/// Returns the regular files below a directory; nothing if it is not there. Files that go away meanwhile are no error.
///
/// # Errors
/// A directory cannot be read.
pub fn files_held(directory: &Path) -> Result<Backlog, DiskError> {
    let mut all = Backlog::default();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let failed = |error| DiskError::new("read", &directory, error);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let Ok(metadata) = fs::symlink_metadata(entry.path()) else { continue };
            if metadata.is_dir() {
                directories.push(entry.path());
            } else if metadata.is_file() {
                all.add(metadata.len(), metadata.modified().ok());
            }
        }
    }
    Ok(all)
}

/// Returns what an unprivileged user can still write on the file system of `path`, and its size; in bytes.
///
/// # Errors
/// It cannot be asked.
pub fn disk_room(path: &Path) -> Result<(u64, u64), DiskError> {
    let facts = rustix::fs::statvfs(path)
        .map_err(|error| DiskError::new("read the free space of", path, error.into()))?;
    let bytes = |blocks: u64| blocks.saturating_mul(facts.f_frsize);
    Ok((bytes(facts.f_bavail), bytes(facts.f_blocks)))
}

/// Returns whether both lie on one file system, as far as that can be seen.
pub fn share_a_disk(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => one.dev() == other.dev(),
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_are_the_files_that_are_ready_and_nothing_else() {
        let wal = tempfile::tempdir().unwrap();
        let status = wal.path().join("archive_status");
        assert!(waiting_wal(wal.path()).is_err(), "not a directory of WAL");
        fs::create_dir(&status).unwrap();
        assert_eq!(waiting_wal(wal.path()).unwrap(), Backlog::default());
        for (name, bytes) in [
            ("000000010000000000000007", 10),
            ("000000010000000000000008", 20),
            ("00000002.history", 3),
        ] {
            fs::write(wal.path().join(name), vec![0; bytes]).unwrap();
            fs::write(status.join(format!("{name}.ready")), "").unwrap();
        }
        fs::write(wal.path().join("000000010000000000000006"), "done").unwrap();
        fs::write(status.join("000000010000000000000006.done"), "").unwrap();
        fs::write(status.join("000000010000000000000005.ready"), "").unwrap();
        fs::write(status.join("nonsense.ready"), "").unwrap();
        let old = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
        let file = fs::File::open(status.join("000000010000000000000008.ready")).unwrap();
        file.set_times(fs::FileTimes::new().set_modified(old)).unwrap();
        let found = waiting_wal(wal.path()).unwrap();
        assert_eq!((found.files, found.bytes, found.oldest), (3, 33, Some(old)));
    }

    #[test]
    fn files_are_counted_at_any_depth_and_links_are_not_followed() {
        let place = tempfile::tempdir().unwrap();
        assert_eq!(files_held(&place.path().join("none")).unwrap(), Backlog::default());
        fs::create_dir_all(place.path().join("a/b")).unwrap();
        fs::write(place.path().join("a/b/x"), "12345").unwrap();
        fs::write(place.path().join("a/y"), "123").unwrap();
        std::os::unix::fs::symlink("/", place.path().join("a/root")).unwrap();
        let held = files_held(place.path()).unwrap();
        assert_eq!((held.files, held.bytes), (2, 8));
        assert!(held.oldest.is_some());
    }

    #[test]
    fn the_room_of_a_disk_is_known_and_never_more_than_its_size() {
        let place = tempfile::tempdir().unwrap();
        let (free, total) = disk_room(place.path()).unwrap();
        assert!(0 < free && free <= total);
        assert!(disk_room(&place.path().join("none")).is_err());
        assert!(share_a_disk(place.path(), place.path()));
        assert!(!share_a_disk(place.path(), Path::new("/proc")));
        assert!(!share_a_disk(place.path(), &place.path().join("none")));
    }
}
