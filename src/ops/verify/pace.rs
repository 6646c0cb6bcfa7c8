//! Not reading faster than somebody wants.

use std::time::Duration;

use tokio::time::Instant;

use crate::ops::stop::StopRequest;

/// Spreads reading over time.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: Option<u64>,
    /// When the next bytes may be read.
    next: Instant,
}

impl Pace {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, next: Instant::now() }
    }

    /// Waits until so many more bytes may be read, or somebody wants the work to stop.
    pub(super) async fn spend(&mut self, bytes: u64, stop: &mut StopRequest) {
        let Some(from) = self.reserve(bytes, Instant::now()) else { return };
        tokio::select! {
            () = tokio::time::sleep_until(from) => {}
            _ = stop.wanted() => {}
        }
    }

    /// Returns from when on so many more bytes may be read; `None` without a rate.
    fn reserve(&mut self, bytes: u64, now: Instant) -> Option<Instant> {
        let rate = self.bytes_per_second?;
        // What was not used is not saved up: a store that hung is not to be flooded afterwards.
        let from = self.next.max(now);
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
        self.next = from + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        Some(from)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_the_time_that_the_rate_gives_them_and_rest_is_not_saved_up() {
        let mut pace = Pace::new(Some(100));
        let begun = pace.next;
        let half = Duration::from_millis(500);
        assert_eq!(pace.reserve(50, begun), Some(begun));
        assert_eq!(pace.reserve(50, begun), Some(begun + half));
        assert_eq!(pace.reserve(50, begun), Some(begun + 2 * half));
        let later = begun + Duration::from_mins(1);
        assert_eq!(pace.reserve(50, later), Some(later));
        assert_eq!(pace.reserve(50, later), Some(later + half));
        assert_eq!(Pace::new(None).reserve(u64::MAX, later), None);
    }

    #[tokio::test]
    async fn a_stop_ends_waiting() {
        let (sender, mut stop) = StopRequest::new();
        let mut slow = Pace::new(Some(1));
        slow.spend(1_000_000, &mut stop).await;
        sender.send(Some(crate::failure::StopSignal::Terminate)).unwrap();
        let wait = slow.spend(1, &mut stop);
        tokio::time::timeout(Duration::from_mins(1), wait).await.unwrap();
    }
}
