//! What a system's error means to a caller of a store in a local directory.

use std::fs::File;
use std::io::{self, ErrorKind};

use rustix::io::Errno;

use super::{Key, StoreError};

/// No such name, or a part of the path is a file: in both cases no object of that key.
pub(super) fn is_no_such_file(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Sorts a system's error by what a caller can do about it. `NotFound` never
/// becomes `Absent` here: that is said only where the root was looked at.
pub(super) fn failed(key: &Key, error: io::Error) -> StoreError {
    let (key, errno) = (key.clone(), Errno::from_io_error(&error));
    let is_of_fsync =
        error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<FsyncFailed>);
    let cause = Box::new(error);
    if is_of_fsync {
        return StoreError::NotConfirmed { key, cause };
    }
    match errno {
        Some(Errno::NOSPC | Errno::DQUOT | Errno::ROFS | Errno::FBIG) => {
            StoreError::NoRoom { key, cause }
        }
        Some(Errno::ACCESS | Errno::PERM) => StoreError::Denied { key, cause },
        Some(Errno::NAMETOOLONG | Errno::INVAL | Errno::NOTDIR | Errno::ISDIR | Errno::LOOP) => {
            StoreError::Refused { key, cause }
        }
        // EIO, ESTALE, EMFILE, a vanished directory and all the rest: worth another try.
        _ => StoreError::Unavailable { key, cause },
    }
}

/// An fsync failed: what it was about may or may not be on the disk, and the next one may say nothing of it, since the
/// system tells of each failure once (fsync(2); PostgreSQL's `data_sync_retry`).
#[derive(Debug, thiserror::Error)]
#[error("fsync failed")]
struct FsyncFailed(#[source] io::Error);

/// Flushes a file or directory, so that [`failed`] tells from other errors what the disk did not confirm.
pub(super) fn fsync(file: &File) -> io::Result<()> {
    file.sync_all().map_err(|error| match Errno::from_io_error(&error) {
        // Nothing was lost that could not be written: there was no room for it.
        Some(Errno::NOSPC | Errno::DQUOT) => error,
        _ => io::Error::other(FsyncFailed(error)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_errors_are_sorted_by_what_can_be_done() {
        let sorted = |errno: Errno| failed(&Key::new("k"), errno.into());
        for errno in [Errno::NOSPC, Errno::DQUOT, Errno::ROFS] {
            assert!(matches!(sorted(errno), StoreError::NoRoom { .. }), "{errno}");
        }
        assert!(matches!(sorted(Errno::ACCESS), StoreError::Denied { .. }));
        assert!(matches!(sorted(Errno::NAMETOOLONG), StoreError::Refused { .. }));
        for errno in [Errno::IO, Errno::STALE, Errno::MFILE, Errno::NOENT] {
            assert!(matches!(sorted(errno), StoreError::Unavailable { .. }), "{errno}");
        }
        let unconfirmed = io::Error::other(FsyncFailed(Errno::IO.into()));
        assert!(matches!(failed(&Key::new("k"), unconfirmed), StoreError::NotConfirmed { .. }));
    }
}
