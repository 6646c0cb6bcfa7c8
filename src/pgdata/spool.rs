//! A small directory beside the WAL: what was done ahead of PostgreSQL's asking.
//!
//! Owns: who may use it, whole files or none, the one process that fills it, and the facts by which a file
//! or a moment is known again. Never here: what a note says, or whether it is to be believed.
//!
//! ```text
//! pg_wal/highwater.spool/
//!   000000010000000000000007.stored     a note: this segment is in the repository already
//!   000000010000000000000009            a segment that was fetched and checked
//!   000000010000000000000009.fetched    a note about it
//!   000000010000000000000009.coming     it is being fetched
//!   wanted                              the segment that recovery asked for last
//!   lock                                held by the process that fetches
//!   agent.lock, agent.sock              held by the agent, and how it is asked
//! ```
//!
//! Nothing in it is needed: every file may be missing at any moment, and then things are done as if there were no
//! spool. Nothing is fsynced, for nothing is believed after a restart of the machine ([`Moment::boot`]).
//! PostgreSQL leaves such names in `pg_wal` alone: they match no WAL file pattern (`IsXLogFileName` in
//! `src/include/access/xlog_internal.h`), and base backups leave out all that `pg_wal` holds (`src/backend/backup/basebackup.c`).

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use super::disk::{DiskError, remove_if_there};
use super::staged::{Durability, Existing, StagedFile, is_abandoned, is_temporary};

/// No note is longer, in bytes.
const NOTE_BYTES_MAX: u64 = 4096;

/// The name of the file that the one filling process holds locked.
const LOCK: &str = "lock";

/// Once a file's times are so old, every later write shows in them: far more than a tick of any kernel's clock, and
/// than the second or two in which some file systems count.
pub(super) const TIMES_MARGIN: Duration = Duration::from_secs(3);

/// Write permission of group and others.
const OTHERS_WRITE: u32 = 0o022;

/// A moment that means something only on a machine that was not restarted since. No clock that somebody
/// may set takes part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Linux's name for the time since its start (`random(4)`: `boot_id`).
    pub boot: String,
    /// Whole seconds since then (`proc_uptime(5)`).
    pub seconds: u64,
}

impl Moment {
    /// Returns the present moment; `None` where the system does not tell.
    pub fn now() -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let uptime = fs::read_to_string("/proc/uptime").ok()?;
        let seconds = uptime.split('.').next()?.parse().ok()?;
        Some(Self { boot: boot.trim().to_owned(), seconds })
    }
}

/// What tells that a file is the very one seen before and was not written to, linked or renamed since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    /// Nobody can set this one.
    changed: (i64, i64),
}

impl FileFacts {
    /// Returns the facts of an open file.
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    /// Returns the facts of the file that `path` leads to now.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        Self::of(&File::open(path)?)
    }

    /// Returns its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns whether a write at `time` or later shows in the facts: they are some seconds older. Never, if they
    /// are of the future, since then some clock stood wrong.
    pub fn would_show_a_write_at(&self, time: SystemTime) -> bool {
        let before = time.checked_sub(TIMES_MARGIN);
        let before = before.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        let seconds = before.and_then(|before| i64::try_from(before.as_secs()).ok());
        seconds.is_some_and(|seconds| self.modified.0 < seconds && self.changed.0 < seconds)
    }
}

/// Why a spool is not used.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// It cannot be made, read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Somebody else could put files into it.
    #[error(
        "`{0}` is not a directory of this user alone: its owner must be the user who runs PostgreSQL, and nobody else may write to it"
    )]
    NotPrivate(PathBuf),
}

/// A spool that is there and is ours.
#[derive(Debug, Clone)]
pub struct Spool {
    directory: PathBuf,
}

/// The right to fill a spool, or another one; gone with the process at the latest.
#[derive(Debug)]
pub struct SpoolLock {
    file: File,
}

impl Drop for SpoolLock {
    fn drop(&mut self) {
        // Closing is not enough at once: a child that another thread is just starting shares the lock until its
        // exec. When this fails, closing is all that happens.
        let _ = self.file.unlock();
    }
}

impl Spool {
    /// Opens the spool, and makes its directory (but none above it).
    ///
    /// # Errors
    /// [`SpoolError`]; then there is no spool for this call.
    pub fn open(directory: &Path) -> Result<Self, SpoolError> {
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(DiskError::new("create", directory, error).into())
            }
            _ => Self::find(directory),
        }
    }

    /// Opens the spool if it is there.
    ///
    /// # Errors
    /// [`SpoolError`], also if it is missing.
    pub fn find(directory: &Path) -> Result<Self, SpoolError> {
        let metadata = fs::symlink_metadata(directory);
        let metadata = metadata.map_err(|error| DiskError::new("read", directory, error))?;
        let is_ours = metadata.uid() == geteuid().as_raw();
        if metadata.is_dir() && is_ours && metadata.mode() & OTHERS_WRITE == 0 {
            return Ok(Self { directory: directory.to_owned() });
        }
        Err(SpoolError::NotPrivate(directory.to_owned()))
    }

    /// Returns its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns where the file of this name is, or would be.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Reads a note; `None` if it is missing or cannot be read, which are the same to everybody.
    pub fn note(&self, name: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.path(name)).ok()?.take(NOTE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// Writes a note, whole or not at all, over an older one.
    pub fn write_note(&self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
        let mut staged = StagedFile::create(&self.path(name))?;
        staged.append(bytes)?;
        staged.publish(Durability::None, Existing::Replace)
    }

    /// Removes a file; that it is not there, or cannot be removed, harms nothing.
    pub fn remove(&self, name: &str) {
        if let Err(error) = remove_if_there(&self.path(name)) {
            tracing::debug!("a file stays in the spool: {error}");
        }
    }

    /// Returns the names of the files in it; none if it cannot be read.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Removes all files but those that `keep` wants and those that a living process is writing.
    pub fn tidy(&self, keep: impl Fn(&str) -> bool) {
        for name in self.names() {
            let goes = if is_temporary(&name) { is_abandoned(&name) } else { !keep(&name) };
            if goes && name != LOCK {
                self.remove(&name);
            }
        }
    }

    /// Takes the right to fill the spool; `None` while another process has it.
    ///
    /// The kernel gives it back when that process ends, however it ends.
    pub fn lock(&self) -> Result<Option<SpoolLock>, DiskError> {
        self.lock_file(LOCK)
    }

    /// As [`Self::lock`], for another right that one process has at a time; `name` is its file, which is made.
    pub fn lock_file(&self, name: &str) -> Result<Option<SpoolLock>, DiskError> {
        let path = self.path(name);
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.map_err(|error| DiskError::new("open", &path, error))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(SpoolLock { file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(DiskError::new("lock", &path, error)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn spool() -> (tempfile::TempDir, Spool) {
        let place = tempfile::tempdir().unwrap();
        let spool = Spool::open(&place.path().join("spool")).unwrap();
        (place, spool)
    }

    #[test]
    fn a_spool_is_made_for_this_user_alone_and_its_parent_never() {
        let (place, spool) = spool();
        let mode = fs::metadata(spool.directory()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        Spool::open(spool.directory()).unwrap();
        assert!(matches!(Spool::open(&place.path().join("a/b")), Err(SpoolError::Disk(_))));
        assert!(matches!(Spool::find(&place.path().join("c")), Err(SpoolError::Disk(_))));
        assert!(!place.path().join("a").exists() && !place.path().join("c").exists());
    }

    #[test]
    fn a_spool_that_others_can_write_to_is_not_used() {
        let (place, spool) = spool();
        for mode in [0o770, 0o702] {
            fs::set_permissions(spool.directory(), fs::Permissions::from_mode(mode)).unwrap();
            assert!(matches!(Spool::open(spool.directory()), Err(SpoolError::NotPrivate(_))));
        }
        fs::set_permissions(spool.directory(), fs::Permissions::from_mode(0o755)).unwrap();
        Spool::open(spool.directory()).unwrap();
        // Who can place a link decides where it leads.
        let link = place.path().join("link");
        std::os::unix::fs::symlink(spool.directory(), &link).unwrap();
        assert!(matches!(Spool::open(&link), Err(SpoolError::NotPrivate(_))));
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(Spool::open(&file), Err(SpoolError::NotPrivate(_))));
    }

    #[test]
    fn a_note_is_read_back_and_a_long_one_cut() {
        let (_place, spool) = spool();
        assert_eq!(spool.note("x"), None);
        spool.write_note("x", b"1").unwrap();
        spool.write_note("x", b"22").unwrap();
        assert_eq!(spool.note("x").as_deref(), Some(&b"22"[..]));
        spool.write_note("x", &[b'y'; 10_000]).unwrap();
        assert_eq!(spool.note("x").map(|note| note.len()), Some(4096));
        spool.remove("x");
        spool.remove("x");
        assert_eq!(spool.names(), Vec::<String>::new());
    }

    #[test]
    fn one_process_fills_it_and_tidying_spares_its_files() {
        let (_place, spool) = spool();
        let held = spool.lock().unwrap().unwrap();
        assert!(spool.lock().unwrap().is_none(), "another open file of the same process");
        let as_a_child_has_it = held.file.try_clone().unwrap();
        drop(held);
        assert!(spool.lock().unwrap().is_some());
        drop(as_a_child_has_it);
        let being_written = StagedFile::create(&spool.path("b")).unwrap();
        for name in ["a", "b", "c.highwater-4194321-0.tmp"] {
            spool.write_note(name, b"").unwrap();
        }
        spool.tidy(|name| name == "b");
        let mut left = spool.names();
        left.sort();
        let temporary = format!("b.highwater-{}-", std::process::id());
        assert!(
            matches!(&left[..], [b, t, l] if b == "b" && t.starts_with(&temporary) && l == LOCK),
            "{left:?}"
        );
        drop(being_written);
    }

    #[test]
    fn a_file_that_was_touched_has_other_facts() {
        let (_place, spool) = spool();
        spool.write_note("x", b"1").unwrap();
        let path = spool.path("x");
        let facts = || FileFacts::of(&File::open(&path).unwrap()).unwrap();
        let before = facts();
        assert_eq!((facts(), before.bytes()), (before, 1));
        // Copied over with its times, as `cp -p` does.
        let copy = spool.path("copy");
        fs::copy(&path, &copy).unwrap();
        let times =
            fs::FileTimes::new().set_modified(fs::metadata(&path).unwrap().modified().unwrap());
        File::options().write(true).open(&copy).unwrap().set_times(times).unwrap();
        fs::rename(&copy, &path).unwrap();
        assert_ne!(facts(), before);
    }

    #[test]
    fn only_times_that_have_rested_would_show_a_write() {
        let (_place, spool) = spool();
        spool.write_note("x", b"1").unwrap();
        let facts = FileFacts::of_path(&spool.path("x")).unwrap();
        let after = |seconds| SystemTime::now() + Duration::from_secs(seconds);
        assert!(!facts.would_show_a_write_at(after(0)), "it was written just now");
        assert!(!facts.would_show_a_write_at(after(2)));
        assert!(facts.would_show_a_write_at(after(5)));
        assert!(!facts.would_show_a_write_at(SystemTime::UNIX_EPOCH), "it is of the future");
        // Who sets one time back moves the other.
        let old = fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
        File::options().write(true).open(spool.path("x")).unwrap().set_times(old).unwrap();
        let facts = FileFacts::of_path(&spool.path("x")).unwrap();
        assert!(!facts.would_show_a_write_at(after(0)));
    }

    #[test]
    fn two_rights_are_held_by_two() {
        let (_place, spool) = spool();
        let _one = spool.lock().unwrap().unwrap();
        let other = spool.lock_file("agent.lock").unwrap().unwrap();
        assert!(spool.lock_file("agent.lock").unwrap().is_none());
        drop(other);
        assert!(spool.lock_file("agent.lock").unwrap().is_some());
    }

    #[test]
    fn a_moment_is_of_this_boot_and_never_goes_back() {
        let (first, second) = (Moment::now().unwrap(), Moment::now().unwrap());
        assert_eq!(first.boot, second.boot);
        assert!(first.seconds <= second.seconds && first.boot.len() == 36);
    }
}
