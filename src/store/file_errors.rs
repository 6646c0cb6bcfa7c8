//! What a system's error means to a caller of a store in a local directory.

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
    let cause = Box::new(error);
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
    }
}
