//! The mark of a restore that is not done: `highwater-restore-in-progress`.
//!
//! Owns: the file's content, and the lock that tells a working restore from a
//! dead one. Never here: the directory around it.
//!
//! While it stands there is no `global/pg_control`, so PostgreSQL cannot start.
//! It stands in the data directory and in each tablespace directory:
//!
//! ```json
//! {"backup":"20261122T030000Z-1","started":"2026-11-22T03:10:00Z"}
//! ```
//!
//! The restoring process holds a lock (`flock`) on it. Locks end with their
//! process, so, other than a pid, one cannot outlive it or be taken for another's.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::disk::{DiskError, Owner, remove_if_there};
use super::places::plain_only;
use super::running::read_at_most;
use crate::pg::SystemId;

/// The file's name, in each directory that a restore fills.
pub const RESTORE_MARKER_NAME: &str = "highwater-restore-in-progress";

/// Largest marker read.
const MARKER_BYTES_MAX: u64 = 4 << 10;

/// What a restore says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RestoreMarker {
    /// Which backup is being restored.
    pub backup: String,
    /// When it began, RFC 3339 in UTC.
    pub started: String,
    /// The cluster whose files stood there when it began; absent where the directory was empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub took_over: Option<SystemId>,
}

/// What a marker found in a directory means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FoundMarker {
    /// None is there.
    Absent,
    /// Its process is at work, on this host.
    Live,
    /// Its process is gone. The content is empty where a crash left none.
    Dead(RestoreMarker),
}

/// A marker that we have written and hold locked.
#[derive(Debug)]
pub(super) struct HeldMarker {
    path: PathBuf,
    locked: File,
}

impl HeldMarker {
    /// Writes the marker into `directory`; fails with [`DiskError::Exists`] where one is.
    pub(super) fn create(
        directory: &Path,
        marker: &RestoreMarker,
        owner: Option<Owner>,
    ) -> Result<Self, DiskError> {
        let path = directory.join(RESTORE_MARKER_NAME);
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| DiskError::new("create", &path, e))?;
        // Waits only for the moment in which another process may look at it.
        file.lock().map_err(|e| DiskError::new("lock", &path, e))?;
        Self::write(path, file, marker, owner)
    }

    /// As [`Self::create`], but takes the place of one whose process is gone.
    ///
    /// # Errors
    /// [`DiskError::Exists`] where that process is at work.
    pub(super) fn take(
        directory: &Path,
        marker: &RestoreMarker,
        owner: Option<Owner>,
    ) -> Result<Self, DiskError> {
        let path = directory.join(RESTORE_MARKER_NAME);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(plain_only());
        let file = options.open(&path).map_err(|e| DiskError::new("create", &path, e))?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => {
                DiskError::new("take over", &path, io::ErrorKind::AlreadyExists.into())
            }
            TryLockError::Error(e) => DiskError::new("lock", &path, e),
        })?;
        file.set_len(0).map_err(|e| DiskError::new("write", &path, e))?;
        Self::write(path, file, marker, owner)
    }

    fn write(
        path: PathBuf,
        mut file: File,
        marker: &RestoreMarker,
        owner: Option<Owner>,
    ) -> Result<Self, DiskError> {
        if let Some(owner) = owner {
            owner.give_file(&file, &path)?;
        }
        let text = serde_json::to_vec(marker).map_err(|e| {
            DiskError::new("write", &path, io::Error::new(io::ErrorKind::InvalidInput, e))
        })?;
        file.write_all(&text).map_err(|e| DiskError::new("write", &path, e))?;
        file.sync_all().map_err(|e| DiskError::new("fsync", &path, e))?;
        Ok(Self { path, locked: file })
    }

    /// Ends the mark; the caller makes that durable with the directory's fsync.
    pub(super) fn remove(self) -> Result<(), DiskError> {
        remove_if_there(&self.path)
    }
}

impl Drop for HeldMarker {
    fn drop(&mut self) {
        // Closing is not enough at once: a child that another thread is just starting
        // shares the lock until its exec. When this fails, that is all that happens.
        let _ = self.locked.unlock();
    }
}

/// Looks for a marker in `directory`.
pub(super) fn find_marker(directory: &Path) -> Result<FoundMarker, DiskError> {
    let path = directory.join(RESTORE_MARKER_NAME);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(FoundMarker::Absent),
        Err(e) => return Err(DiskError::new("open", &path, e)),
    };
    match file.try_lock_shared() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(FoundMarker::Live),
        Err(TryLockError::Error(e)) => return Err(DiskError::new("lock", &path, e)),
    }
    match read_at_most(&path, MARKER_BYTES_MAX) {
        // A crash between create and fsync leaves it empty; it is a marker all the same.
        Ok(bytes) => Ok(FoundMarker::Dead(serde_json::from_slice(&bytes).unwrap_or_default())),
        // The restore ended while we looked.
        Err(DiskError::Missing { .. }) => Ok(FoundMarker::Absent),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn marker_is_live_while_held_and_dead_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let marker = RestoreMarker { backup: "b1".into(), started: "then".into(), took_over: None };
        assert_eq!(find_marker(dir.path()).unwrap(), FoundMarker::Absent);
        let held = HeldMarker::create(dir.path(), &marker, None).unwrap();
        assert_eq!(find_marker(dir.path()).unwrap(), FoundMarker::Live);
        let second = HeldMarker::create(dir.path(), &marker, None);
        assert!(matches!(second, Err(DiskError::Exists { .. })));
        drop(held);
        assert_eq!(find_marker(dir.path()).unwrap(), FoundMarker::Dead(marker));
    }

    #[test]
    fn a_dead_marker_is_taken_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let long =
            RestoreMarker { backup: "b".repeat(300), started: "then".into(), took_over: None };
        drop(HeldMarker::create(dir.path(), &long, None).unwrap());
        let marker = RestoreMarker { took_over: Some(SystemId(7)), ..RestoreMarker::default() };
        let held = HeldMarker::take(dir.path(), &marker, None).unwrap();
        let second = HeldMarker::take(dir.path(), &long, None);
        assert!(matches!(second, Err(DiskError::Exists { .. })));
        drop(held);
        assert_eq!(find_marker(dir.path()).unwrap(), FoundMarker::Dead(marker));
    }

    #[test]
    fn empty_or_damaged_marker_is_still_one() {
        let dir = tempfile::tempdir().unwrap();
        for content in ["", "{\"backup\":", "[]"] {
            std::fs::write(dir.path().join(RESTORE_MARKER_NAME), content).unwrap();
            let found = find_marker(dir.path()).unwrap();
            assert_eq!(found, FoundMarker::Dead(RestoreMarker::default()));
        }
    }

    #[test]
    fn removed_marker_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let held = HeldMarker::create(dir.path(), &RestoreMarker::default(), None).unwrap();
        held.remove().unwrap();
        assert_eq!(find_marker(dir.path()).unwrap(), FoundMarker::Absent);
    }
}
