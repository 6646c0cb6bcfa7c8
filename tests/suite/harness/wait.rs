//! Waiting for a condition, always with a limit. The only place that sleeps.

use std::time::{Duration, Instant};

/// Time between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `condition` holds and fails the test after `limit`, saying what
/// was waited for.
pub fn wait_for(what: &str, limit: Duration, condition: impl FnMut() -> bool) {
    assert!(passes_within(limit, condition), "not within {limit:?}: {what}");
}

/// Returns true as soon as `condition` holds, or false after `limit`.
pub fn passes_within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        std::thread::sleep(LOOK_EVERY.min(left));
    }
}
