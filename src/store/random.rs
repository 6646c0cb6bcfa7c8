//! Numbers that differ between processes and calls.
//!
//! Owns: jitter and unique names. Never here: anything secret; these numbers
//! can be guessed.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};

/// Returns a number that is unlikely to come twice, in this process or another.
///
/// The standard library seeds each thread's `RandomState` from the system; the
/// counter makes successive calls differ.
pub(super) fn random_u64() -> u64 {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(CALLS.fetch_add(1, Ordering::Relaxed));
    hasher.write_u32(std::process::id());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn successive_numbers_differ() {
        let mut seen: Vec<u64> = (0..1000).map(|_| random_u64()).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 1000);
    }
}
