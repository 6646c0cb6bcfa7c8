//! The directory that holds what the store cannot take, and what must be told it when it can again.
//!
//! Owns: whose it is, its places, durable records, the one process that drains it. Never here: what is put there
//! and when (`ops::stall`, `plan::stall`), the objects themselves (a little repository, below `store`).
//!
//! ```text
//! <stall_spool>/<cluster>/
//!   repository             the URL that all of this is for, without secrets
//!   store/                 a repository of the same layout: identities, keys, WAL
//!   refused/               WAL that the store would not take because it holds something else
//!   gap-<start>.json       WAL that was let go, until a backup has made it unneeded; fsynced
//!   away                   when the store was found away last
//!   drain.lock             held by the process that drains
//!   records.lock           held while a record is changed
//!   backup.log             what the last backup said that was to close a gap
//! ```

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::backlog::{Backlog, files_held};
use super::disk::{DiskError, remove_if_there, sync_directory};
use super::spool::{Moment, Spool, SpoolError, SpoolLock};
use super::staged::{Durability, Existing, StagedFile};

const STORE: &str = "store";
const REFUSED: &str = "refused";
const REPOSITORY: &str = "repository";
const AWAY: &str = "away";
const DRAIN_LOCK: &str = "drain.lock";
const RECORDS_LOCK: &str = "records.lock";
const GAP_PREFIX: &str = "gap-";
const GAP_SUFFIX: &str = ".json";

/// The file with what the last closing backup said.
pub const BACKUP_LOG: &str = "backup.log";

/// No record is longer, in bytes.
const RECORD_BYTES_MAX: u64 = 64 << 10;

/// A directory that is there and is ours.
#[derive(Debug, Clone)]
pub struct StallDirectory {
    spool: Spool,
}

impl StallDirectory {
    /// Opens it, and makes it durably (but none above it).
    ///
    /// # Errors
    /// [`SpoolError`]; then nothing can be kept there.
    pub fn open(directory: &Path) -> Result<Self, SpoolError> {
        let is_new = !directory.exists();
        let spool = Spool::open(directory)?;
        for part in [STORE, REFUSED] {
            let path = spool.path(part);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(DiskError::new("create", &path, error).into());
                }
                _ => {}
            }
        }
        if is_new {
            sync_directory(directory)?;
            sync_directory(super::disk::parent_of(directory))?;
        }
        Ok(Self { spool })
    }

    /// Opens it if it is there; `None` if it was never made.
    ///
    /// # Errors
    /// [`SpoolError`] if it is there and cannot be used, or somebody else could write to it.
    pub fn find(directory: &Path) -> Result<Option<Self>, SpoolError> {
        match Spool::find(directory) {
            Ok(spool) => Ok(Some(Self { spool })),
            Err(SpoolError::Disk(DiskError::Missing { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        self.spool.directory()
    }

    /// Returns where the little repository is.
    pub fn store_root(directory: &Path) -> PathBuf {
        directory.join(STORE)
    }

    /// Returns where WAL is put that the store refused.
    pub fn refused(&self) -> PathBuf {
        self.spool.path(REFUSED)
    }

    /// Returns where a closing backup writes what it has to say.
    pub fn backup_log(&self) -> PathBuf {
        self.spool.path(BACKUP_LOG)
    }

    /// Reads which repository all of this is for.
    pub fn repository(&self) -> Option<String> {
        String::from_utf8(self.spool.note(REPOSITORY)?).ok()
    }

    /// Writes down which repository all of this is for, durably.
    pub fn set_repository(&self, url: &str) -> Result<(), DiskError> {
        self.write(REPOSITORY, url.as_bytes())
    }

    /// Returns the WAL of a cluster in the little repository: files and bytes.
    ///
    /// # Errors
    /// A directory of it cannot be read.
    pub fn held(&self, cluster: &str) -> Result<Backlog, DiskError> {
        files_held(&self.spool.path(STORE).join(cluster).join("wal"))
    }

    /// Returns all that lies in it, what is half written too, and what was refused.
    ///
    /// # Errors
    /// A directory of it cannot be read.
    pub fn bytes(&self) -> Result<u64, DiskError> {
        Ok(files_held(&self.spool.path(STORE))?.bytes + files_held(&self.refused())?.bytes)
    }

    /// Returns the names of what was refused.
    pub fn refused_names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.refused()).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// Moves an object out of the little repository, durably, to what was refused. `tail` is its path below `store`.
    ///
    /// # Errors
    /// It cannot be moved; it is in one of the two places.
    pub fn refuse(&self, tail: &str) -> Result<PathBuf, DiskError> {
        let from = self.spool.path(STORE).join(tail);
        let name: String = tail.rsplit('/').next().unwrap_or(tail).to_owned();
        let mut to = self.refused().join(&name);
        let mut attempt = 1;
        while to.exists() {
            attempt += 1;
            to = self.refused().join(format!("{name}.{attempt}"));
        }
        fs::rename(&from, &to).map_err(|error| DiskError::new("rename a file to", &to, error))?;
        sync_directory(&self.refused())?;
        if let Some(parent) = from.parent().filter(|parent| parent.exists()) {
            sync_directory(parent)?;
        }
        Ok(to)
    }

    /// Reads a note that nothing depends on; `None` if it is missing or cannot be read.
    pub fn note(&self, name: &str) -> Option<Vec<u8>> {
        self.spool.note(name)
    }

    /// Writes such a note. That it cannot be written costs doing something once more.
    pub fn set_note(&self, name: &str, bytes: &[u8]) {
        if let Err(error) = self.spool.write_note(name, bytes) {
            tracing::debug!("a note was not written: {error}");
        }
    }

    /// Notes that the store was found away now. That it cannot be noted costs a look at the store.
    pub fn note_away(&self) {
        let Some(now) = Moment::now() else { return };
        if let Ok(text) = serde_json::to_vec(&now) {
            self.set_note(AWAY, &text);
        }
    }

    /// Takes that note away.
    pub fn note_back(&self) {
        self.spool.remove(AWAY);
    }

    /// Returns how many seconds ago the store was found away last; `None` if that is not known, or of an earlier start
    /// of the machine.
    pub fn away_since(&self) -> Option<u64> {
        let noted: Moment = serde_json::from_slice(&self.spool.note(AWAY)?).ok()?;
        let now = Moment::now()?;
        (now.boot == noted.boot).then(|| now.seconds.checked_sub(noted.seconds)).flatten()
    }

    /// Takes the right to drain it; `None` while another process has it.
    pub fn lock(&self) -> Result<Option<SpoolLock>, DiskError> {
        self.spool.lock_file(DRAIN_LOCK)
    }

    /// Takes the right to change records of gaps; `None` while another process has it.
    pub fn lock_records(&self) -> Result<Option<SpoolLock>, DiskError> {
        self.spool.lock_file(RECORDS_LOCK)
    }

    /// Reads all records of gaps, by name.
    ///
    /// # Errors
    /// One cannot be read: then it is not known what was let go.
    pub fn gap_records(&self) -> Result<Vec<(String, Vec<u8>)>, DiskError> {
        let mut names = self.spool.names();
        names.retain(|name| name.starts_with(GAP_PREFIX) && name.ends_with(GAP_SUFFIX));
        names.sort();
        let read = |name: String| {
            let path = self.spool.path(&name);
            let mut bytes = Vec::new();
            let file = File::open(&path);
            let read = file.and_then(|file| file.take(RECORD_BYTES_MAX).read_to_end(&mut bytes));
            match read {
                Ok(_) => Some(Ok((name, bytes))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => Some(Err(DiskError::new("read", &path, error))),
            }
        };
        names.into_iter().filter_map(read).collect()
    }

    /// Returns the name of the record of a gap that begins there.
    pub fn gap_name(timeline: u32, start_lsn: u64) -> String {
        format!("{GAP_PREFIX}{timeline:08X}-{start_lsn:016X}{GAP_SUFFIX}")
    }

    /// Writes a record of that name, over an older one; durable when it returns.
    ///
    /// # Errors
    /// What was to be recorded must not happen then. The older record stands, or the new one.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
        let mut staged = StagedFile::create(&self.spool.path(name))?;
        staged.append(bytes)?;
        staged.publish(Durability::Fsync, Existing::Replace)
    }

    /// Removes a record, durably.
    pub fn remove(&self, name: &str) -> Result<(), DiskError> {
        remove_if_there(&self.spool.path(name))?;
        sync_directory(self.path())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn directory() -> (tempfile::TempDir, StallDirectory) {
        let place = tempfile::tempdir().unwrap();
        let directory = StallDirectory::open(&place.path().join("main")).unwrap();
        (place, directory)
    }

    #[test]
    fn it_is_made_once_and_its_parent_never() {
        let (place, directory) = directory();
        assert!(StallDirectory::find(directory.path()).unwrap().is_some());
        assert!(StallDirectory::find(&place.path().join("other")).unwrap().is_none());
        assert!(StallDirectory::open(&place.path().join("a/b")).is_err());
        StallDirectory::open(directory.path()).unwrap();
        assert_eq!(directory.repository(), None);
        directory.set_repository("s3://b").unwrap();
        assert_eq!(directory.repository().as_deref(), Some("s3://b"));
    }

    #[test]
    fn records_are_read_back_in_order_and_nothing_else_is_taken_for_one() {
        let (_place, directory) = directory();
        directory.note_away();
        let _lock = directory.lock().unwrap().unwrap();
        assert!(directory.lock().unwrap().is_none());
        for start in [9, 7] {
            directory
                .write(&StallDirectory::gap_name(1, start), start.to_string().as_bytes())
                .unwrap();
        }
        let records = directory.gap_records().unwrap();
        let bytes: Vec<_> = records.iter().map(|(_, bytes)| bytes[0]).collect();
        assert_eq!(bytes, *b"79");
        directory.remove(&records[0].0).unwrap();
        directory.remove(&records[0].0).unwrap();
        assert_eq!(directory.gap_records().unwrap().len(), 1);
    }

    #[test]
    fn what_is_refused_leaves_the_repository_and_replaces_nothing() {
        let (_place, directory) = directory();
        let store = StallDirectory::store_root(directory.path()).join("main/wal/7");
        fs::create_dir_all(&store).unwrap();
        for content in ["1", "22"] {
            fs::write(store.join("x"), content).unwrap();
            directory.refuse("main/wal/7/x").unwrap();
        }
        assert_eq!(directory.refused_names(), ["x", "x.2"]);
        assert_eq!(directory.held("main").unwrap().files, 0);
        assert_eq!(directory.bytes().unwrap(), 3, "it takes room still");
        assert!(directory.refuse("main/wal/7/x").is_err());
    }

    #[test]
    fn that_the_store_is_away_is_noted_for_this_start_of_the_machine() {
        let (_place, directory) = directory();
        assert_eq!(directory.away_since(), None);
        directory.note_away();
        assert!(directory.away_since().unwrap() < 5);
        directory.note_back();
        assert_eq!(directory.away_since(), None);
        let other = r#"{"boot":"another","seconds":0}"#;
        directory.write(AWAY, other.as_bytes()).unwrap();
        assert_eq!(directory.away_since(), None);
    }
}
