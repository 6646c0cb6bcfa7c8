//! Pieces of the contract of [`Store`](super::Store) that every driver keeps alike.
//!
//! Owns: which keys are safe, what a prefix covers, how a range is clipped, when
//! a transfer is too slow. Never here: the grammar of our own keys (`format`).

use std::ops::Range;
use std::time::Duration;

use super::{Key, StoreError};

/// A slower transfer than this (bytes per second) is taken for a stalled one.
const SLOWEST_BYTES_PER_SECOND: u64 = 128 * 1024;

/// Returns how long a transfer of `bytes` may take.
pub(super) fn time_limit(stall_timeout: Duration, bytes: u64) -> Duration {
    stall_timeout.saturating_add(Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND))
}

/// Returns whether `part` may stand between two slashes of a key: one or more
/// of `A-Z a-z 0-9 . _ -`, without a leading dot, so that neither `..` nor the
/// hidden staging directory of a local repository can be addressed.
pub(super) fn is_key_part(part: &str) -> bool {
    !part.is_empty()
        && !part.starts_with('.')
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Makes sure that a key means the same place in every store.
///
/// # Errors
/// [`StoreError::Refused`] for any other characters, an empty part or an empty key.
pub(super) fn check_key(key: &Key) -> Result<(), StoreError> {
    if key.as_str().split('/').all(is_key_part) {
        return Ok(());
    }
    let cause =
        "a key is made of A-Z a-z 0-9 . _ - and single slashes, and no part begins with a dot";
    Err(StoreError::Refused { key: key.clone(), cause: cause.into() })
}

/// Makes sure of a prefix as [`check_key`] does of a key; the empty one means everything.
///
/// # Errors
/// As [`check_key`].
pub(super) fn check_prefix(prefix: &Key) -> Result<(), StoreError> {
    if prefix.as_str().is_empty() { Ok(()) } else { check_key(prefix) }
}

/// Returns what follows the directory `prefix` in `key`, by whole components.
pub(super) fn rest_below<'a>(prefix: &Key, key: &'a Key) -> Option<&'a str> {
    if prefix.as_str().is_empty() {
        return Some(key.as_str());
    }
    key.as_str().strip_prefix(prefix.as_str())?.strip_prefix('/').filter(|rest| !rest.is_empty())
}

/// Clips `range` to an object of `size` bytes, end excluded.
///
/// # Errors
/// [`StoreError::Refused`] if the range is empty or begins at or behind the end.
pub(super) fn clip(
    key: &Key,
    size: u64,
    range: Option<Range<u64>>,
) -> Result<Range<u64>, StoreError> {
    let Some(range) = range else { return Ok(0..size) };
    let clipped = range.start..range.end.min(size);
    if clipped.is_empty() {
        let cause = format!("bytes {}..{} lie outside its {size} bytes", range.start, range.end);
        return Err(StoreError::Refused { key: key.clone(), cause: cause.into() });
    }
    Ok(clipped)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_means_whole_components() {
        let rest = |prefix: &str, key: &str| {
            rest_below(&Key::new(prefix), &Key::new(key)).map(str::to_owned)
        };
        assert_eq!(rest("a/b", "a/b/c").as_deref(), Some("c"));
        assert_eq!(rest("a/b", "a/bc"), None);
        assert_eq!(rest("a/b", "a/b"), None);
        assert_eq!(rest("", "a").as_deref(), Some("a"));
    }

    #[test]
    fn a_range_is_clipped_and_one_that_misses_is_refused() {
        let key = Key::new("k");
        assert_eq!(clip(&key, 10, Some(8..100)).unwrap(), 8..10);
        assert_eq!(clip(&key, 10, None).unwrap(), 0..10);
        assert!(matches!(clip(&key, 10, Some(10..11)), Err(StoreError::Refused { .. })));
        assert!(matches!(clip(&key, 0, Some(0..1)), Err(StoreError::Refused { .. })));
        assert!(matches!(clip(&key, 10, Some(3..3)), Err(StoreError::Refused { .. })));
    }

    #[test]
    fn a_large_upload_has_the_time_of_its_size() {
        let stall = Duration::from_secs(30);
        assert_eq!(time_limit(stall, 0), stall);
        assert_eq!(time_limit(stall, 16 << 20), Duration::from_secs(30 + 128));
        assert_eq!(time_limit(Duration::MAX, u64::MAX), Duration::MAX);
    }

    #[test]
    fn keys_that_could_leave_their_place_are_refused() {
        for bad in
            ["", "a//b", "/a", "a/", "..", "a/../b", ".staging/x", "a b", "a#1", "a%2Fb", "é"]
        {
            assert!(check_key(&Key::new(bad)).is_err(), "{bad}");
        }
        for good in ["a", "a/b.c_d-E/0", "00000001.history"] {
            check_key(&Key::new(good)).unwrap();
        }
        check_prefix(&Key::new("")).unwrap();
    }
}
