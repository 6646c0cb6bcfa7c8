//! How a file of a local repository gets its name: durably, whole, and never twice.
//!
//! Owns: staging files, the link, and that every directory above is durable. Never here: what the
//! keys mean, reading, deleting.
//!
//! Create: write a staging file → fsync it → link(2) it to its name → fsync the
//! directory. link(2) fails when the name exists, so an object is never
//! replaced, and the name appears only when the bytes are durable. Where the
//! file system has no hard links, renameat2(2) with `RENAME_NOREPLACE` gives
//! the same promise; where it has neither, `create` refuses, for a plain rename
//! would replace.
//!
//! After an fsync that failed nobody knows what is on the disk, and the next fsync may say nothing of it: so a staging file is
//! written anew, and a name whose directory could not be synced is given anew, to a copy of the object, which changes
//! the directory once more. That a name is in doubt is known to the process that gave it.
//!
//! An object is durable only if the names of all directories above it are. Whoever creates one
//! makes that sure *before* the link, so an object that can be seen in a directory proves it
//! for that directory and for all above: by a writer that was killed just behind its link as
//! well as after a power cut, when only what was durable is there to be seen. A directory
//! without an object proves nothing; there every directory above is fsynced, once in each process.
//! So all but the first object of a directory cost two fsyncs: the bytes and the name. What
//! makes the argument hold: nothing but this file puts objects there (after a repository was copied or
//! moved by other means, `sync` first), and no directory that holds an object is ever removed.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::contract::is_key_part;
use super::file_errors::{failed, fsync, is_no_such_file};
use super::random::random_u64;
use super::{Body, Key, StoreError};

/// Where files are written before they get their name. No key can name it,
/// because no part of a key begins with a dot.
pub(super) const STAGING: &str = ".staging";

/// Mode of objects, less what the umask takes: a repository holds a whole
/// database, so others have no business in it; the group may read.
const FILE_MODE: u32 = 0o640;

/// Mode of directories, less what the umask takes.
const DIRECTORY_MODE: u32 = 0o750;

/// How many directories are remembered as durable before all are forgotten.
const DURABLE_DIRECTORIES_MAX: usize = 1024;

/// How many entries of a directory are looked at for an object. Where hundreds of directories come
/// before it, fsync is no slower than looking on.
const PROOF_ENTRIES_MAX: usize = 64;

/// Puts files into the directory `root`.
#[derive(Debug)]
pub(super) struct Publisher {
    root: PathBuf,
    /// Directories whose own names this process knows to be durable.
    durable: Mutex<BTreeSet<PathBuf>>,
    /// Objects whose names this process gave, and could not make durable.
    doubtful: Mutex<BTreeSet<PathBuf>>,
}

impl Publisher {
    /// Touches nothing.
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, durable: Mutex::default(), doubtful: Mutex::default() }
    }

    /// Creates the root and what it needs, durably.
    pub(super) fn prepare(&self) -> io::Result<()> {
        make_directories(&self.root.join(STAGING), None)
    }

    /// Returns whether the staging directory is there, so the root is no empty mount point.
    pub(super) fn is_prepared(&self) -> bool {
        self.root.join(STAGING).is_dir()
    }

    /// Writes `body` as the object `key` at `path`: when this returns it is durable.
    ///
    /// # Errors
    /// [`StoreError::Exists`] when the name is taken; what is there was not touched, and is durable.
    pub(super) fn publish(&self, key: &Key, body: &Body, path: &Path) -> Result<(), StoreError> {
        let staged = self.stage(key, body)?;
        let result = self.name(key, &staged, path);
        // After a link the staging name is a second name; after an error it is
        // rubbish. Either way a failure to remove it harms nothing: it is swept.
        let _ = fs::remove_file(&staged);
        result
    }

    /// Removes staging files that a crash left, if they are older than `older_than`; returns how many.
    pub(super) fn sweep(&self, older_than: Duration) -> io::Result<u64> {
        let entries = match fs::read_dir(self.root.join(STAGING)) {
            Ok(entries) => entries,
            Err(error) if is_no_such_file(&error) => return Ok(0),
            Err(error) => return Err(error),
        };
        let now = SystemTime::now();
        let mut removed = 0;
        for entry in entries {
            let entry = entry?;
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(error) if is_no_such_file(&error) => continue,
                Err(error) => return Err(error),
            };
            let is_old =
                now.duration_since(metadata.modified()?).is_ok_and(|age| age >= older_than);
            if metadata.is_file() && is_old && is_staging_name(&entry.file_name()) {
                match fs::remove_file(entry.path()) {
                    Ok(()) => removed += 1,
                    Err(error) if is_no_such_file(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(removed)
    }

    /// Writes a staging file, durable but for its name.
    fn stage(&self, key: &Key, body: &Body) -> Result<PathBuf, StoreError> {
        let (mut file, path) = self.open_staging().map_err(|e| failed(key, e))?;
        let written = body.pieces().iter().try_for_each(|piece| file.write_all(piece));
        if let Err(error) = written.and_then(|()| fsync(&file)) {
            let _ = fs::remove_file(&path);
            return Err(failed(key, error));
        }
        Ok(path)
    }

    fn open_staging(&self) -> io::Result<(File, PathBuf)> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let directory = self.root.join(STAGING);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("{}-{number}-{:016x}", std::process::id(), random_u64()));
        let open = || OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(&path);
        let file = match open() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make_directories(&directory, Some(&self.root))?;
                open()?
            }
            opened => opened?,
        };
        Ok((file, path))
    }

    /// Gives the staged file its name, unless the name is taken.
    fn name(&self, key: &Key, staged: &Path, path: &Path) -> Result<(), StoreError> {
        let parent = path.parent().unwrap_or(&self.root);
        self.settle(parent).map_err(|e| failed(key, e))?;
        // Opened before, so that it hears of every failure since, also of one that another writer's fsync met first.
        let directory = File::open(parent).map_err(|e| failed(key, e))?;
        match link_or_rename(staged, path) {
            Ok(()) => self.confirm(key, path, &directory),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                if self.doubtful().contains(path) {
                    self.name_anew(key, path)?;
                }
                // Whoever created it may have died before this fsync, and our
                // caller will trust the object that it now finds.
                self.confirm(key, path, &directory)?;
                Err(StoreError::Exists { key: key.clone() })
            }
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let cause = format!(
                    "the file system of `{}` has neither hard links nor rename without replacing, so a write could replace an object; use another file system",
                    self.root.display()
                );
                Err(StoreError::Refused { key: key.clone(), cause: cause.into() })
            }
            Err(error) if error.kind() == ErrorKind::CrossesDevices => {
                let cause = format!(
                    "`{}` is on another file system than `{}`; a repository must be on one",
                    parent.display(),
                    self.root.display()
                );
                Err(StoreError::Refused { key: key.clone(), cause: cause.into() })
            }
            Err(error) => Err(failed(key, error)),
        }
    }

    /// Makes the name of an object durable. Where that fails, the name is in doubt from then on.
    fn confirm(&self, key: &Key, path: &Path, directory: &File) -> Result<(), StoreError> {
        match fsync(directory) {
            Ok(()) => {
                self.doubtful().remove(path);
                Ok(())
            }
            Err(error) => {
                self.doubtful().insert(path.to_owned());
                Err(failed(key, error))
            }
        }
    }

    /// Puts a copy of an object in its own place, so that its name is written once more. Whoever reads it sees the same
    /// bytes before and after.
    fn name_anew(&self, key: &Key, path: &Path) -> Result<(), StoreError> {
        let bytes = fs::read(path).map_err(|e| failed(key, e))?;
        let copy = self.stage(key, &Body::from(bytes))?;
        fs::rename(&copy, path).map_err(|error| {
            let _ = fs::remove_file(&copy);
            failed(key, error)
        })
    }

    fn doubtful(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        self.doubtful.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that `directory` is there, and will be after a crash. Another process may
    /// have made it a moment ago and not have synced its parent yet; see the module's page.
    fn settle(&self, directory: &Path) -> io::Result<()> {
        let known = || self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        if known().contains(directory) && directory.is_dir() {
            return Ok(());
        }
        make_directories(directory, Some(&self.root))?;
        if !holds_an_object(directory)? {
            let above = directory.ancestors().skip(1);
            above.take_while(|above| above.starts_with(&self.root)).try_for_each(sync_directory)?;
        }
        let mut known = known();
        if known.len() >= DURABLE_DIRECTORIES_MAX {
            known.clear();
        }
        known.insert(directory.to_owned());
        Ok(())
    }
}

/// link(2), or renameat2(2) without replacing where there are no hard links.
/// `Unsupported` means that the file system has neither.
fn link_or_rename(staged: &Path, path: &Path) -> io::Result<()> {
    let Err(error) = fs::hard_link(staged, path) else { return Ok(()) };
    // EPERM is what Linux says of a file system without hard links (link(2)).
    let no_links = [Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS, Errno::MLINK];
    if !Errno::from_io_error(&error).is_some_and(|errno| no_links.contains(&errno)) {
        return Err(error);
    }
    match renameat_with(CWD, staged, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            Err(io::Error::from(ErrorKind::Unsupported))
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Creates `path` and its missing parents, each durable, with our mode.
/// Never creates `below` or anything above it.
fn make_directories(path: &Path, below: Option<&Path>) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let Some(parent) = path.parent() else { return Ok(()) };
    if below == Some(path) {
        return Err(io::Error::new(
            ErrorKind::NotFound,
            format!("the directory `{}` does not exist; is its disk mounted?", path.display()),
        ));
    }
    make_directories(parent, below)?;
    match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
        Ok(()) => {}
        // Another process made it just now; ours must not go on before it is durable.
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(error) => return Err(error),
    }
    sync_directory(parent).inspect_err(|_| {
        // It is made anew the next time. One that somebody has put something into meanwhile stays.
        let _ = fs::remove_dir(path);
    })
}

/// Returns whether an object is among the first entries of a directory.
fn holds_an_object(directory: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(directory)?.take(PROOF_ENTRIES_MAX) {
        let entry = entry?;
        if entry.file_type()?.is_file() && entry.file_name().to_str().is_some_and(is_key_part) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    fsync(&File::open(path)?)
}

/// Only what [`Publisher::stage`] names is swept: pid, number and 16 hexadecimal digits.
fn is_staging_name(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let parts: Vec<&str> = name.split('-').collect();
    parts.len() == 3
        && parts[..2].iter().all(|part| part.bytes().all(|b| b.is_ascii_digit()))
        && parts[2].len() == 16
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_an_object_in_the_very_directory_proves_that_its_name_is_durable() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert!(!holds_an_object(path).unwrap());
        // Anybody may make directories and die; and what no key can name was not put there by us.
        fs::create_dir_all(path.join("below/deeper")).unwrap();
        fs::write(path.join("below/object"), "x").unwrap();
        fs::write(path.join(".nfs0001"), "x").unwrap();
        fs::write(path.join("a b"), "x").unwrap();
        std::os::unix::fs::symlink(path.join("below/object"), path.join("link")).unwrap();
        assert!(!holds_an_object(path).unwrap());
        fs::write(path.join("object"), "x").unwrap();
        assert!(holds_an_object(path).unwrap());
        holds_an_object(&path.join("missing")).unwrap_err();
    }

    #[test]
    fn without_hard_links_a_rename_that_never_replaces_is_used() {
        // No file system without hard links is at hand, so the fallback is called alone.
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (directory.path().join("one"), directory.path().join("two"));
        fs::write(&one, "1").unwrap();
        fs::write(&two, "2").unwrap();
        let error = renameat_with(CWD, &one, CWD, &two, RenameFlags::NOREPLACE).unwrap_err();
        assert_eq!(io::Error::from(error).kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&two).unwrap(), b"2");
    }
}
