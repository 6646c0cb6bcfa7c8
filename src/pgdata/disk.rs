//! What the local disk can say no with, and the few acts every file here shares.
//!
//! Owns: [`DiskError`], the owner given to what is written, the fsync of a
//! directory, the free space of a file system. Never here: what a file means.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// The disk refused. Each variant names the act (`create`, `rename`, ...) and the path.
///
/// None is cured by trying again at once; [`DiskError::Full`] and
/// [`DiskError::Denied`] are cured by an operator.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No space left, or the quota is used up (`ENOSPC`, `EDQUOT`).
    #[error("could not {action} `{}`: the disk or the quota is full: {source}", path.display())]
    Full {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Missing permission, or a read-only file system (`EACCES`, `EPERM`, `EROFS`).
    #[error("could not {action} `{}`: {source}", path.display())]
    Denied {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Something of that name is there already, and was left alone (`EEXIST`).
    #[error("could not {action} `{}`: {source}", path.display())]
    Exists {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// No such file or directory (`ENOENT`).
    #[error("could not {action} `{}`: {source}", path.display())]
    Missing {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Anything else.
    #[error("could not {action} `{}`: {source}", path.display())]
    Other {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl DiskError {
    /// Sorts a system error by its kind.
    pub fn new(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { action, path, source }
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::Denied { action, path, source }
            }
            io::ErrorKind::AlreadyExists => Self::Exists { action, path, source },
            io::ErrorKind::NotFound => Self::Missing { action, path, source },
            _ => Self::Other { action, path, source },
        }
    }

    /// Returns the file or directory that the error is about.
    pub fn path(&self) -> &Path {
        match self {
            Self::Full { path, .. }
            | Self::Denied { path, .. }
            | Self::Exists { path, .. }
            | Self::Missing { path, .. }
            | Self::Other { path, .. } => path,
        }
    }
}

/// The system user and group that shall own what is written.
///
/// Only root can give files away; everyone else leaves this out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Numeric user.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
}

impl Owner {
    pub(super) fn give_file(self, file: &File, path: &Path) -> Result<(), DiskError> {
        std::os::unix::fs::fchown(file, Some(self.uid), Some(self.gid))
            .map_err(|e| DiskError::new("change the owner of", path, e))
    }

    /// Gives away a directory or the symbolic link itself, never what a link points to.
    pub(super) fn give_path(self, path: &Path) -> Result<(), DiskError> {
        std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid))
            .map_err(|e| DiskError::new("change the owner of", path, e))
    }
}

/// Makes the names in directory `path` durable: without it a crash can undo a
/// rename or a create that had succeeded.
pub(super) fn sync_directory(path: &Path) -> Result<(), DiskError> {
    let open = File::open(path).map_err(|e| DiskError::new("open", path, e))?;
    open.sync_all().map_err(|e| DiskError::new("fsync the directory", path, e))
}

/// Returns the directory that holds `path`; `.` for a bare name.
pub(super) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Removes `path`; being absent already is success.
pub(super) fn remove_if_there(path: &Path) -> Result<(), DiskError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(DiskError::new("remove", path, e)),
        _ => Ok(()),
    }
}

/// Returns how many bytes an unprivileged user can still write at `path`, which
/// need not exist yet: its nearest existing ancestor is asked.
///
/// The figure is the file system's, so two directories on one file system share it.
pub fn free_bytes(path: &Path) -> Result<u64, DiskError> {
    let there = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
    let facts = rustix::fs::statvfs(there)
        .map_err(|e| DiskError::new("read the free space of", there, e.into()))?;
    Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sorted(errno: rustix::io::Errno) -> DiskError {
        DiskError::new("write", Path::new("/x"), errno.into())
    }

    #[test]
    fn system_errors_are_sorted_by_what_an_operator_must_do() {
        use rustix::io::Errno;
        assert!(matches!(sorted(Errno::NOSPC), DiskError::Full { .. }));
        assert!(matches!(sorted(Errno::DQUOT), DiskError::Full { .. }));
        assert!(matches!(sorted(Errno::ROFS), DiskError::Denied { .. }));
        assert!(matches!(sorted(Errno::ACCESS), DiskError::Denied { .. }));
        assert!(matches!(sorted(Errno::PERM), DiskError::Denied { .. }));
        assert!(matches!(sorted(Errno::EXIST), DiskError::Exists { .. }));
        assert!(matches!(sorted(Errno::NOENT), DiskError::Missing { .. }));
        assert!(matches!(sorted(Errno::IO), DiskError::Other { .. }));
    }

    #[test]
    fn a_real_full_device_is_recognised() {
        use std::io::Write;
        let mut full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = full.write_all(b"x").unwrap_err();
        let error = DiskError::new("write", Path::new("/dev/full"), error);
        assert!(matches!(error, DiskError::Full { .. }));
        assert_eq!(error.path(), Path::new("/dev/full"));
    }

    #[test]
    fn free_space_is_known_for_a_directory_yet_to_be_made() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(&dir.path().join("a/b/c")).unwrap() > 0);
    }
}
