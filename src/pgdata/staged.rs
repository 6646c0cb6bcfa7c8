//! Crash-safe files: written beside the target, then renamed over it.
//!
//! Owns: the temporary name, the order fsync file, rename, fsync directory, and
//! the sweep of what dead processes left. Never here: what is written.
//!
//! A temporary file is called after its target and its writer, so that a sweep
//! can tell whose it is and whether that process still lives:
//!
//! ```text
//! pg_wal/RECOVERYXLOG.highwater-4711-0.tmp
//!        target                 pid  counter within the process
//! ```
//!
//! PostgreSQL ignores such names in `pg_wal`: they match no WAL file pattern
//! (`IsXLogFileName` in `src/include/access/xlog_internal.h`).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::disk::{DiskError, Owner, parent_of, remove_if_there, sync_directory};
use super::running::process_is_alive;

/// How many names one create tries. Names clash only with leftovers of an
/// earlier process of the same pid, as containers that restart make them.
const NAME_ATTEMPTS_MAX: u32 = 10_000;

const MARK: &[u8] = b".highwater-";
const SUFFIX: &[u8] = b".tmp";

/// Gives each temporary file of this process its own name.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// What a published file must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// A power cut: file and directory are fsynced before success is told.
    Fsync,
    /// Only the end of this process. Enough for `RECOVERYXLOG`, which PostgreSQL
    /// fsyncs itself when it keeps it, and asks for again when it does not.
    None,
}

/// What happens when the target is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It is replaced in one step; readers see the old or the new, never a part.
    Replace,
    /// It is left alone and the publish fails with [`DiskError::Exists`].
    Refuse,
}

/// A file being written beside its target. Dropped without
/// [`publish`](Self::publish), it leaves nothing behind.
#[derive(Debug)]
pub struct StagedFile {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
}

impl StagedFile {
    /// Creates an empty file beside `target`, readable by its owner only (0600).
    ///
    /// The directory must exist; the target is not touched.
    pub fn create(target: &Path) -> Result<Self, DiskError> {
        let name = target.file_name().ok_or_else(|| {
            DiskError::new("write", target, io::Error::other("the path has no file name"))
        })?;
        for _ in 0..NAME_ATTEMPTS_MAX {
            let number = NEXT.fetch_add(1, Ordering::SeqCst);
            let temporary =
                parent_of(target).join(temporary_name(name, std::process::id(), number));
            let mut options = OpenOptions::new();
            match options.write(true).create_new(true).mode(0o600).open(&temporary) {
                Ok(file) => return Ok(Self { file, temporary, target: target.to_owned() }),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(DiskError::new("create", &temporary, e)),
            }
        }
        let taken = io::Error::other("too many leftover temporary files beside it");
        Err(DiskError::new("write", target, taken))
    }

    /// Sets the permission bits that the published file will have.
    pub fn set_mode(&self, mode: u32) -> Result<(), DiskError> {
        self.file
            .set_permissions(fs::Permissions::from_mode(mode & 0o777))
            .map_err(|e| DiskError::new("set the mode of", &self.temporary, e))
    }

    /// Sets the owner that the published file will have; only root can.
    pub fn set_owner(&self, owner: Owner) -> Result<(), DiskError> {
        owner.give_file(&self.file, &self.temporary)
    }

    /// Writes all of `bytes` at the end, with the path in the error.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        self.file.write_all(bytes).map_err(|e| DiskError::new("write", &self.temporary, e))
    }

    /// Makes the bytes written so far durable, still under the temporary name.
    pub fn sync(&self) -> Result<(), DiskError> {
        self.file.sync_all().map_err(|e| DiskError::new("fsync", &self.temporary, e))
    }

    /// Gives the file its name.
    ///
    /// With [`Durability::Fsync`] the file and its name survive a power cut once
    /// this returned `Ok`. On an error the target is as it was, but for one case:
    /// when only the fsync of the directory failed, the new file stands and its
    /// name is not known to be durable.
    pub fn publish(self, durability: Durability, existing: Existing) -> Result<(), DiskError> {
        if durability == Durability::Fsync {
            self.sync()?;
        }
        match existing {
            Existing::Replace => fs::rename(&self.temporary, &self.target)
                .map_err(|e| DiskError::new("rename a file to", &self.target, e))?,
            // A link fails when the name is taken, in one step; looking first and
            // renaming then would have a gap. The temporary name goes before the fsync
            // that both names share, or a power cut would bring it back.
            Existing::Refuse => {
                fs::hard_link(&self.temporary, &self.target)
                    .map_err(|e| DiskError::new("create", &self.target, e))?;
                remove_if_there(&self.temporary)?;
            }
        }
        if durability == Durability::Fsync {
            sync_directory(parent_of(&self.target))?;
        }
        Ok(())
    }
}

impl Write for StagedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        // After a rename the name is gone, which is success here.
        if let Err(error) = remove_if_there(&self.temporary) {
            tracing::warn!(%error, "a temporary file stays behind");
        }
    }
}

/// Removes the temporary files of `target` that dead processes left, and returns how many.
///
/// Files of live processes, of other targets and of anyone else are left alone.
/// A process id that has been given to a new process keeps its file until that one
/// ends; the file's age is no evidence either way and is not looked at. A writer in
/// another container that shares the directory cannot be seen and counts as dead: its
/// publish then fails, and the target stays as it was.
pub fn sweep(target: &Path) -> Result<usize, DiskError> {
    let Some(name) = target.file_name() else { return Ok(0) };
    let directory = parent_of(target);
    let read = |e| DiskError::new("list", directory, e);
    let mut removed = 0;
    for entry in fs::read_dir(directory).map_err(read)? {
        let entry = entry.map_err(read)?;
        if let Some((pid, number)) = parse_temporary_name(name, &entry.file_name())
            && writer_is_gone(pid, number)
        {
            remove_if_there(&entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn writer_is_gone(pid: u32, number: u64) -> bool {
    if pid == std::process::id() {
        // Ours only if we have counted that far: the counter moves before the file
        // appears, and is read here after the file was seen. Anything beyond is from
        // a process that had our pid before us, as in a restarted container.
        return number >= NEXT.load(Ordering::SeqCst);
    }
    !process_is_alive(pid)
}

/// Returns whether a file of this name is one that is being written, or was left by a writer that died.
pub(super) fn is_temporary(name: &str) -> bool {
    split_temporary_name(name).is_some()
}

/// Returns whether a file of this name was left by a writer that died; see [`sweep`].
pub(super) fn is_abandoned(name: &str) -> bool {
    split_temporary_name(name).is_some_and(|(pid, number)| writer_is_gone(pid, number))
}

/// Reads writer and number from the temporary name of any target.
fn split_temporary_name(name: &str) -> Option<(u32, u64)> {
    let mark = std::str::from_utf8(MARK).ok()?;
    let (target, _) = name.rsplit_once(mark)?;
    parse_temporary_name(OsStr::new(target), OsStr::new(name))
}

fn temporary_name(target: &OsStr, pid: u32, number: u64) -> OsString {
    let mut name = target.as_bytes().to_vec();
    name.extend_from_slice(MARK);
    name.extend_from_slice(format!("{pid}-{number}").as_bytes());
    name.extend_from_slice(SUFFIX);
    OsString::from_vec(name)
}

fn parse_temporary_name(target: &OsStr, name: &OsStr) -> Option<(u32, u64)> {
    let rest = name.as_bytes().strip_prefix(target.as_bytes())?;
    let middle = rest.strip_prefix(MARK)?.strip_suffix(SUFFIX)?;
    let (pid, number) = std::str::from_utf8(middle).ok()?.split_once('-')?;
    let plain = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if !plain(pid) || !plain(number) {
        return None;
    }
    Some((pid.parse().ok()?, number.parse().ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Above Linux's largest possible pid (`PID_MAX_LIMIT`, 2^22).
    const DEAD_PID: u32 = 4_194_304 + 17;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn published_file_replaces_the_target_and_leaves_no_other_name() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("RECOVERYXLOG");
        fs::write(&target, b"old").unwrap();
        for durability in [Durability::None, Durability::Fsync] {
            let mut staged = StagedFile::create(&target).unwrap();
            staged.write_all(b"new").unwrap();
            assert_eq!(names(dir.path()).len(), 2);
            staged.publish(durability, Existing::Replace).unwrap();
            assert_eq!(fs::read(&target).unwrap(), b"new");
            assert_eq!(names(dir.path()), ["RECOVERYXLOG"]);
        }
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o7777, 0o600);
    }

    #[test]
    fn refusing_publish_leaves_the_target_and_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x");
        let publish = |bytes: &[u8]| {
            let mut staged = StagedFile::create(&target).unwrap();
            staged.append(bytes).unwrap();
            staged.publish(Durability::Fsync, Existing::Refuse)
        };
        publish(b"first").unwrap();
        assert!(matches!(publish(b"second"), Err(DiskError::Exists { .. })));
        assert_eq!(fs::read(&target).unwrap(), b"first");
        assert_eq!(names(dir.path()), ["x"]);
    }

    #[test]
    fn dropped_file_leaves_nothing_and_keeps_the_target() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x");
        fs::write(&target, b"old").unwrap();
        let mut staged = StagedFile::create(&target).unwrap();
        staged.write_all(b"half").unwrap();
        drop(staged);
        assert_eq!(names(dir.path()), ["x"]);
        assert_eq!(fs::read(&target).unwrap(), b"old");
    }

    #[test]
    fn missing_directory_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let error = StagedFile::create(&dir.path().join("no/x")).unwrap_err();
        assert!(matches!(error, DiskError::Missing { .. }), "{error}");
    }

    #[test]
    fn sweep_removes_only_what_dead_writers_of_this_target_left() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x");
        let own = std::process::id();
        let live = std::os::unix::process::parent_id();
        let kept = [
            "x".to_owned(),
            format!("x.highwater-{live}-0.tmp"),
            format!("y.highwater-{DEAD_PID}-0.tmp"),
            format!("x.highwater-{DEAD_PID}.tmp"),
            format!("x.highwater-{DEAD_PID}-+1.tmp"),
            format!("x.highwater-{DEAD_PID}-1.tmp.bak"),
        ];
        let swept = [
            format!("x.highwater-{DEAD_PID}-0.tmp"),
            // Left by an earlier process that had our pid.
            format!("x.highwater-{own}-{}.tmp", u64::MAX),
        ];
        for name in kept.iter().chain(&swept) {
            fs::write(dir.path().join(name), b"").unwrap();
        }
        let staged = StagedFile::create(&target).unwrap();
        assert_eq!(sweep(&target).unwrap(), swept.len());
        assert!(staged.temporary.exists(), "a file in work was swept");
        drop(staged);
        let mut kept = kept.to_vec();
        kept.sort();
        assert_eq!(names(dir.path()), kept);
    }

    #[test]
    fn create_steps_over_names_left_by_an_earlier_process_of_the_same_pid() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x");
        let from = NEXT.load(Ordering::SeqCst);
        for number in from..from + 40 {
            let name = temporary_name(OsStr::new("x"), std::process::id(), number);
            fs::write(dir.path().join(name), b"theirs").unwrap();
        }
        let mut staged = StagedFile::create(&target).unwrap();
        staged.append(b"ours").unwrap();
        staged.publish(Durability::None, Existing::Replace).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"ours");
    }

    proptest! {
        #[test]
        fn temporary_names_are_read_back(name in "[a-zA-Z0-9._-]{1,40}", pid: u32, number: u64) {
            let name = OsString::from(name);
            let temporary = temporary_name(&name, pid, number);
            prop_assert_eq!(parse_temporary_name(&name, &temporary), Some((pid, number)));
        }
    }
}
