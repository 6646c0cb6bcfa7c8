//! How many pieces should be on their way at a time while commits wait for them.
//!
//! A store with some latency takes several at a time as quickly as one. One that has to work for each, a local
//! disk or a server on the same processors, becomes slower with every piece that is added, and the commits
//! that it delays would sooner have gone together in the next piece.
//!
//! With `n` pieces on their way, each taking `L(n)`, a commit waits `L(n) / 2n` on average until one
//! is cut, and then `L(n)` until that is stored:
//!
//! ```text
//! wait(n) = L(n) × (1 + 1/2n)         wait(1) = L(1) × 1.5
//! ```
//!
//! More than one is kept up as long as that is less than with one.
//!
//! Where it is one, two groups of commits would take turns, each waiting for both pieces. Clients that come back with
//! their next commit soon after the last was acknowledged are waited for, so that all go together:
//!
//! ```text
//! taking turns   [ A's piece ][ B's piece ][ A's piece ]      a commit waits for two
//! together       [ A and B   ]..[ A and B   ]..               for one, and the pause
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use crate::pg::Lsn;

/// How many pieces are looked at together.
const WINDOW: usize = 24;

/// What was tried in vain is tried again after so many windows at first, twice as many each time, up to the second number.
const REST_FIRST: u32 = 4;
const REST_MOST: u32 = 64;

/// Decides how many pieces may be on their way.
#[derive(Debug, Clone)]
pub struct Pace {
    most: usize,
    now: usize,
    /// How long one takes when no other is on its way; `None` before it is known.
    alone: Option<Duration>,
    window: Vec<Duration>,
    /// Whether a piece had to wait for a free upload since the window began.
    was_full: bool,
    /// Windows to go before one more is tried.
    rest: u32,
    /// How long the next rest will be.
    next_rest: u32,
    /// Pieces that are not acknowledged, in the order of WAL.
    sent: VecDeque<Sent>,
    /// How long it takes most of those whose commits were acknowledged to come with the next.
    coming_back: Option<Duration>,
    released: Released,
}

/// A piece on its way.
#[derive(Debug, Clone, Copy)]
struct Sent {
    end_lsn: Lsn,
    commits: u32,
    at: Duration,
}

/// The commits that were acknowledged last. Times are on the caller's monotonic clock.
#[derive(Debug, Clone, Copy, Default)]
struct Released {
    at: Duration,
    commits: u32,
    /// With those that waited already.
    all: u32,
    /// How many commits have come since.
    came: u32,
    /// Whether enough of them came to know how long it takes.
    is_measured: bool,
}

impl Pace {
    /// Begins with one piece at a time; there are never more than `most`, and never less than one.
    pub fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            now: 1,
            alone: None,
            window: Vec::with_capacity(WINDOW),
            was_full: false,
            rest: 0,
            next_rest: REST_FIRST,
            sent: VecDeque::new(),
            coming_back: None,
            released: Released { is_measured: true, ..Released::default() },
        }
    }

    /// Returns how many pieces may be on their way at a time.
    pub fn uploads_max(&self) -> usize {
        self.now
    }

    /// Takes note that a piece has waited because as many as allowed were on their way.
    pub fn was_full(&mut self) {
        self.was_full = true;
    }

    /// Takes note that `commits` have come at `at`.
    pub fn came(&mut self, commits: u32, at: Duration) {
        let released = &mut self.released;
        released.came = released.came.saturating_add(commits);
        if !released.is_measured && released.came >= released.commits.div_ceil(4) * 3 {
            released.is_measured = true;
            let took = at.saturating_sub(released.at);
            self.measured(took);
        }
    }

    /// Takes note that a piece that ends at `end_lsn` (excluded) and holds `commits` was sent on its way at `at`.
    pub fn sent(&mut self, end_lsn: Lsn, commits: u32, at: Duration) {
        self.sent.push_back(Sent { end_lsn, commits, at });
    }

    /// Takes note that everything before `flush_lsn` is acknowledged from `at` on, while `waiting` commits have come
    /// and were not sent. A piece counts from then on, not when it is stored itself: a commit waits for all before it.
    pub fn acknowledged(&mut self, flush_lsn: Lsn, waiting: u32, at: Duration) {
        let mut commits = None;
        while let Some(sent) = self.sent.pop_front_if(|sent| sent.end_lsn <= flush_lsn) {
            self.took(at.saturating_sub(sent.at));
            commits = Some(commits.unwrap_or(0) + sent.commits);
        }
        if let Some(commits) = commits {
            self.released(commits, waiting, at);
        }
    }

    /// Takes note that `commits` were acknowledged at `at`, while `waiting` others have come already.
    fn released(&mut self, commits: u32, waiting: u32, at: Duration) {
        if !self.released.is_measured {
            self.measured(at.saturating_sub(self.released.at));
        }
        let all = commits.saturating_add(waiting);
        self.released = Released { at, commits, all, came: 0, is_measured: commits == 0 };
    }

    fn measured(&mut self, took: Duration) {
        self.coming_back = Some(self.coming_back.map_or(took, |known| (known * 7 + took) / 8));
    }

    /// Returns until when `waiting` commits wait for others to go with; `None` if they do not.
    pub fn gathers_until(&self, waiting: u32) -> Option<Duration> {
        let pause = self.coming_back? * 3 / 2;
        let is_worth_while = self.now == 1 && pause * 2 <= self.alone?;
        let are_all_there = waiting >= self.released.all;
        (is_worth_while && !are_all_there).then(|| self.released.at + pause)
    }

    /// Takes note of how long it took until a piece was acknowledged.
    fn took(&mut self, took: Duration) {
        self.window.push(took);
        if self.window.len() < WINDOW {
            return;
        }
        self.window.sort_unstable();
        let median = self.window[WINDOW / 2];
        self.window.clear();
        let was_full = std::mem::take(&mut self.was_full);
        if self.now == 1 {
            self.alone = Some(median);
        }
        let alone = self.alone.unwrap_or(median);
        if self.now > 1 && waits(median, self.now) > waits(alone, 1) {
            self.now -= 1;
            self.rest = self.next_rest;
            self.next_rest = (self.next_rest * 2).min(REST_MOST);
        } else if self.rest > 0 {
            self.rest -= 1;
        } else if was_full && self.now < self.most {
            self.now += 1;
        } else if self.now > 1 {
            self.next_rest = REST_FIRST;
        }
    }
}

/// How long a commit waits on average, `uploads` being on their way, each taking `took`.
fn waits(took: Duration, uploads: usize) -> Duration {
    let uploads = u32::try_from(uploads).unwrap_or(u32::MAX).max(1);
    took + took / uploads.saturating_mul(2)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Runs `windows` full windows against a store of which `took` tells the latency.
    fn run(pace: &mut Pace, windows: usize, took: impl Fn(usize) -> Duration) {
        for _ in 0..windows * WINDOW {
            pace.was_full();
            let now = pace.uploads_max();
            pace.took(took(now));
        }
    }

    #[test]
    fn a_store_with_latency_gets_as_many_as_allowed() {
        let mut pace = Pace::new(8);
        run(&mut pace, 12, |_| 20 * MS);
        assert_eq!(pace.uploads_max(), 8);
    }

    #[test]
    fn a_store_that_works_for_each_gets_one_and_another_is_seldom_tried() {
        let mut pace = Pace::new(8);
        let mut with_two = 0;
        for _ in 0..1000 {
            run(&mut pace, 1, |now| 2 * MS * u32::try_from(now).unwrap());
            with_two += usize::from(pace.uploads_max() > 1);
        }
        assert!(with_two < 30, "{with_two} of 1000 windows");
    }

    #[test]
    fn commits_that_never_wait_for_a_free_upload_change_nothing() {
        let mut pace = Pace::new(8);
        for _ in 0..20 * WINDOW {
            pace.took(MS);
        }
        assert_eq!(pace.uploads_max(), 1);
    }

    #[test]
    fn a_store_that_becomes_slow_under_load_loses_uploads_and_gets_them_back() {
        let mut pace = Pace::new(8);
        run(&mut pace, 12, |_| 20 * MS);
        run(&mut pace, 40, |now| if now > 3 { 60 * MS } else { 20 * MS });
        assert!(pace.uploads_max() <= 4);
        run(&mut pace, 4 * REST_MOST as usize, |_| 20 * MS);
        assert_eq!(pace.uploads_max(), 8);
    }

    #[test]
    fn there_is_always_one_and_never_more_than_allowed() {
        for most in [0, 1, 2] {
            let mut pace = Pace::new(most);
            run(&mut pace, 20, |_| MS);
            assert_eq!(pace.uploads_max(), most.max(1));
        }
    }

    /// Eight clients that come back `back` after each piece, and a store that takes 10 ms; returns
    /// the pace and when the last piece was stored.
    fn turns(back: Duration) -> (Pace, Duration) {
        let (mut pace, mut now) = (Pace::new(1), Duration::ZERO);
        for _ in 0..2 * WINDOW {
            now += 10 * MS;
            pace.took(10 * MS);
            pace.released(8, 0, now);
            for client in 1..=8 {
                pace.came(1, now + back * client / 8);
            }
        }
        now += 10 * MS;
        pace.released(8, 0, now);
        (pace, now)
    }

    #[test]
    fn clients_that_come_back_soon_are_waited_for_until_all_are_there() {
        let (pace, now) = turns(2 * MS);
        let until = pace.gathers_until(3).unwrap();
        assert!(until > now + 2 * MS && until < now + 5 * MS, "{until:?} after {now:?}");
        assert_eq!(pace.gathers_until(8), None);
    }

    #[test]
    fn clients_that_take_long_are_not_waited_for() {
        assert_eq!(turns(8 * MS).0.gathers_until(3), None);
    }

    #[test]
    fn one_client_is_never_held_up() {
        let mut pace = Pace::new(1);
        for at in 0..200 {
            pace.took(10 * MS);
            pace.released(1, 0, 11 * at * MS);
            assert_eq!(pace.gathers_until(1), None);
            pace.came(1, (11 * at + 1) * MS);
        }
    }

    #[test]
    fn clients_that_never_come_back_are_not_waited_for_again() {
        let (mut pace, now) = turns(2 * MS);
        for turn in 1..6 {
            pace.released(8, 0, now + 20 * turn * MS);
        }
        assert_eq!(pace.gathers_until(1), None);
    }
}
