//! Paths from outside: a member of a tar stream, a line of a file list.
//!
//! Owns the one rule for all of them: a path that could leave the directory it
//! is meant for never becomes a [`PathBuf`]. Never here: opening anything.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Longest path taken, in bytes: PostgreSQL's `MAXPGPATH` (`src/include/pg_config_manual.h`).
pub const PATH_BYTES_MAX: usize = 1024;

/// A path that must not be followed below the data directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the path `{path}` {reason}")]
pub struct UnsafePath {
    /// The path, with bytes that are not UTF-8 replaced.
    pub path: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// Returns `raw` as a relative path of plain names, without `.`, doubled or
/// trailing slashes.
///
/// Refused: empty paths, absolute ones, any `..`, NUL bytes, and more than
/// [`PATH_BYTES_MAX`] bytes. Bytes that are not UTF-8 are kept as they are.
pub fn safe_path(raw: &[u8]) -> Result<PathBuf, UnsafePath> {
    let refuse = |reason| {
        let shown = raw.get(..PATH_BYTES_MAX).unwrap_or(raw);
        Err(UnsafePath { path: String::from_utf8_lossy(shown).into_owned(), reason })
    };
    if raw.len() > PATH_BYTES_MAX {
        return refuse("is too long");
    }
    if raw.contains(&0) {
        return refuse("contains a NUL byte");
    }
    if raw.starts_with(b"/") {
        return refuse("is absolute");
    }
    let mut path = PathBuf::new();
    for name in raw.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return refuse("contains `..`"),
            _ => path.push(OsStr::from_bytes(name)),
        }
    }
    if path.as_os_str().is_empty() {
        return refuse("is empty");
    }
    Ok(path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Component;

    #[test]
    fn plain_paths_are_kept_and_dots_dropped() {
        for (raw, clean) in [
            (&b"base/5/1259"[..], "base/5/1259"),
            (b"./pg_wal/", "pg_wal"),
            (b"././a//b/.", "a/b"),
            (b"..a/b..", "..a/b.."),
        ] {
            assert_eq!(safe_path(raw).unwrap(), PathBuf::from(clean));
        }
        assert_eq!(safe_path(b"a/\xff").unwrap().as_os_str().as_bytes(), b"a/\xff");
    }

    #[test]
    fn paths_that_could_leave_the_directory_are_refused() {
        let long = vec![b'a'; PATH_BYTES_MAX + 1];
        for raw in
            [&b""[..], b".", b"./", b"/etc/passwd", b"../x", b"a/../b", b"a/..", b"a\0b", &long]
        {
            assert!(safe_path(raw).is_err(), "{}", String::from_utf8_lossy(raw));
        }
    }

    proptest! {
        #[test]
        fn every_accepted_path_stays_below(raw in proptest::collection::vec(
            prop_oneof![Just(b'/'), Just(b'.'), Just(0), any::<u8>()], 0..30)) {
            if let Ok(path) = safe_path(&raw) {
                prop_assert!(path.components().count() > 0);
                prop_assert!(path.components().all(|c| matches!(c, Component::Normal(_))));
            }
        }
    }
}
