//! How many pieces should be on their way at a time while commits wait for them.
//!
//! A store with some latency takes several at a time as quickly as one. One that has to work for each, a local
//! disk or a server on the same processors, becomes slower with every piece that is added, and the commits
//! that it delays would sooner have gone together in the next piece.
//!
//! So what commits wait for is measured, and half as many or twice as many are tried now and then:
//!
//! ```text
//! commits come   |  |   |
//! piece                 [ cut ........ stored ... acknowledged ]
//!                \________ what the first of them waits ______/
//! ```
//!
//! The mean is taken of the squares: of two numbers with which commits wait equally long on average, the one is better
//! with which none of them waits for two pieces one after the other.

use std::collections::VecDeque;
use std::time::Duration;

use crate::pg::Lsn;

/// How many pieces with commits are looked at together.
const WINDOW: u32 = 24;

/// After what was tried in vain, so many windows pass before something is tried again at first, twice as many each
/// time, up to the second number.
const REST_FIRST: u32 = 4;
const REST_MOST: u32 = 64;

/// Decides how many pieces may be on their way.
#[derive(Debug, Clone)]
pub struct Pace {
    most: usize,
    now: usize,
    trial: Option<Trial>,
    /// What is tried next.
    next: Step,
    /// What commits wait with `now` at a time; `None` before it is known.
    waits: Option<Duration>,
    window: Window,
    /// Pieces on their way that were sent when another number was allowed: they tell nothing.
    strangers: usize,
    /// Windows to go before something is tried.
    rest: u32,
    /// How long the next rest will be.
    next_rest: u32,
    uncut: Waiting,
    /// Pieces that are not acknowledged, in the order of WAL.
    sent: VecDeque<Sent>,
}

/// What may be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Half,
    Double,
    /// As many as there may be: where a few more bring nothing, since they all are cut and stored together, so many
    /// that no commit waits for a free one may bring much.
    Most,
}

impl Step {
    /// Returns how many pieces at a time that means; `None` if it means no other number.
    fn from(self, now: usize, most: usize, was_full: bool) -> Option<usize> {
        let uploads = match self {
            Self::Half => now / 2,
            Self::Double => (now * 2).min(most),
            Self::Most => most,
        };
        (uploads > 0 && uploads != now && (was_full || uploads < now)).then_some(uploads)
    }

    fn after(self) -> Self {
        match self {
            Self::Half => Self::Double,
            Self::Double => Self::Most,
            Self::Most => Self::Half,
        }
    }
}

/// Another number is tried for a window, then the old one again: what changes by itself must not decide.
#[derive(Debug, Clone, Copy)]
struct Trial {
    uploads: usize,
    /// What commits waited then; `None` while it is being tried.
    waited: Option<Duration>,
}

/// What is known of the pieces that were acknowledged with the same number allowed.
#[derive(Debug, Clone, Copy, Default)]
struct Window {
    pieces: u32,
    commits: u32,
    /// The sum of the squares of what commits waited, in square microseconds.
    waited: u128,
    /// Whether commits had to wait for a free upload.
    was_full: bool,
}

/// Commits that wait: how many, and the sums of the times at which they came and of their squares, in microseconds.
#[derive(Debug, Clone, Copy, Default)]
struct Waiting {
    commits: u32,
    came: u128,
    squares: u128,
}

impl Waiting {
    /// Returns the sum of the squares of what they have waited at `at`.
    fn waited(self, at: Duration) -> u128 {
        let at = at.as_micros();
        (u128::from(self.commits) * at * at + self.squares).saturating_sub(2 * at * self.came)
    }
}

/// A piece on its way.
#[derive(Debug, Clone, Copy)]
struct Sent {
    end_lsn: Lsn,
    waiting: Waiting,
}

impl Pace {
    /// Begins with `most` pieces at a time, as a store with latency needs them; there are never more, and never less than one.
    pub fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            now: most.max(1),
            trial: None,
            next: Step::Half,
            waits: None,
            window: Window::default(),
            strangers: 0,
            // The first pieces wait for connections to be made, and tell nothing.
            rest: REST_FIRST,
            next_rest: REST_FIRST,
            uncut: Waiting::default(),
            sent: VecDeque::new(),
        }
    }

    /// Returns how many pieces may be on their way at a time.
    pub fn uploads_max(&self) -> usize {
        match self.trial {
            Some(Trial { uploads, waited: None }) => uploads,
            _ => self.now,
        }
    }

    /// Takes note that a piece has waited because as many as allowed were on their way.
    pub fn was_full(&mut self) {
        self.window.was_full = true;
    }

    /// Takes note that `commits` have come at `at`.
    pub fn came(&mut self, commits: u32, at: Duration) {
        let at = at.as_micros();
        self.uncut.commits = self.uncut.commits.saturating_add(commits);
        self.uncut.came += at * u128::from(commits);
        self.uncut.squares += at * at * u128::from(commits);
    }

    /// Takes note that a piece that ends at `end_lsn` (excluded), with all commits that have come, was sent on its way.
    pub fn sent(&mut self, end_lsn: Lsn) {
        let waiting = std::mem::take(&mut self.uncut);
        self.sent.push_back(Sent { end_lsn, waiting });
    }

    /// Takes note that everything before `flush_lsn` is acknowledged from `at` on. A piece counts from then on, not
    /// when it is stored itself: its commits wait for all before it.
    pub fn acknowledged(&mut self, flush_lsn: Lsn, at: Duration) {
        while let Some(sent) = self.sent.pop_front_if(|sent| sent.end_lsn <= flush_lsn) {
            if self.strangers > 0 {
                self.strangers -= 1;
            } else {
                self.took(sent.waiting, at);
            }
        }
    }

    /// Takes note of commits that were acknowledged at `at`.
    fn took(&mut self, waiting: Waiting, at: Duration) {
        if waiting.commits == 0 {
            return;
        }
        self.window.pieces += 1;
        self.window.commits = self.window.commits.saturating_add(waiting.commits);
        self.window.waited += waiting.waited(at);
        if self.window.pieces == WINDOW {
            let window = std::mem::take(&mut self.window);
            let mean = (window.waited / u128::from(window.commits)).isqrt();
            let waited = Duration::from_micros(u64::try_from(mean).unwrap_or(u64::MAX));
            self.decide(waited, window.was_full);
        }
    }

    /// Goes on with what was tried if commits waited less, and decides what is tried next.
    fn decide(&mut self, waited: Duration, was_full: bool) {
        let before = self.uploads_max();
        match self.trial {
            None => {
                self.waits = Some(smoothed(self.waits, waited));
                self.rest = self.rest.saturating_sub(1);
            }
            Some(Trial { uploads, waited: None }) => {
                self.trial = Some(Trial { uploads, waited: Some(waited) });
            }
            Some(Trial { uploads, waited: Some(tried) }) => self.judge(uploads, tried, waited),
        }
        if self.rest == 0 && self.trial.is_none() {
            let (now, most) = (self.now, self.most);
            let steps = [self.next, self.next.after(), self.next.after().after()];
            let possible = |step: Step| Some((step, step.from(now, most, was_full)?));
            if let Some((step, uploads)) = steps.into_iter().find_map(possible) {
                self.next = step;
                self.trial = Some(Trial { uploads, waited: None });
            }
        }
        if self.uploads_max() != before {
            self.strangers = self.sent.len();
        }
    }

    /// Commits waited `tried` with `uploads` at a time, and `again` with the old number after that.
    fn judge(&mut self, uploads: usize, tried: Duration, again: Duration) {
        self.trial = None;
        let is_more = uploads > self.now;
        let waits = self.waits.map_or(again, |waits| waits.min(again));
        if is_better(tried, waits, is_more) {
            (self.now, self.waits) = (uploads, Some(tried));
            self.next_rest = REST_FIRST;
        } else {
            self.waits = Some(smoothed(self.waits, again));
            self.next = self.next.after();
            self.rest = self.next_rest;
            self.next_rest = (self.next_rest * 2).min(REST_MOST);
        }
    }
}

/// Whether `waited` is reason enough to leave a number with which commits wait `waits`. More pieces at a time cost
/// more requests, so they must earn it.
fn is_better(waited: Duration, waits: Duration, is_more: bool) -> bool {
    if is_more { waited * 20 < waits * 19 } else { waited <= waits }
}

fn smoothed(known: Option<Duration>, now: Duration) -> Duration {
    known.map_or(now, |known| (known * 7 + now) / 8)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const STEP: Duration = Duration::from_micros(100);

    /// Clients, each with one commit at a time, and a store, in steps of a tenth of a millisecond.
    struct Run {
        pace: Pace,
        now: Duration,
        /// When each client comes with its next commit; `None` while it waits.
        comes: Vec<Option<Duration>>,
        /// Clients whose commits are not sent.
        waiting: Vec<usize>,
        /// When each piece is stored, and whose commits it holds.
        sent: VecDeque<(Duration, Vec<usize>)>,
        acknowledged: u64,
        acknowledged_commits: u64,
    }

    impl Run {
        fn new(most: usize, clients: usize) -> Self {
            Self {
                pace: Pace::new(most),
                now: Duration::ZERO,
                comes: vec![Some(Duration::ZERO); clients],
                waiting: Vec::new(),
                sent: VecDeque::new(),
                acknowledged: 0,
                acknowledged_commits: 0,
            }
        }

        /// Lets `millis` pass. Clients come back within `back`; a piece takes as long as `took` says of how many are on their
        /// way. Returns how much of the time no more than `uploads` were allowed, in percent.
        fn pass(
            &mut self,
            millis: u32,
            back: Duration,
            uploads: usize,
            took: impl Fn(u32) -> Duration,
        ) -> u32 {
            let mut few = 0;
            for _ in 0..millis * 10 {
                self.now += STEP;
                self.step(back, &took);
                few += u32::from(self.pace.uploads_max() <= uploads);
            }
            few / (millis / 10)
        }

        fn step(&mut self, back: Duration, took: &impl Fn(u32) -> Duration) {
            let (now, clients) = (self.now, self.comes.len());
            for client in 0..clients {
                if self.comes[client].take_if(|at| *at <= now).is_some() {
                    self.pace.came(1, now);
                    self.waiting.push(client);
                }
            }
            while let Some((_, whose)) = self.sent.pop_front_if(|(stored, _)| *stored <= now) {
                self.acknowledged += 1;
                self.pace.acknowledged(Lsn(self.acknowledged), now);
                self.acknowledged_commits += u64::try_from(whose.len()).unwrap();
                for client in whose {
                    let share = u32::try_from(client + 1).unwrap();
                    self.comes[client] = Some(now + back * share / u32::try_from(clients).unwrap());
                }
            }
            if self.waiting.is_empty() {
                return;
            }
            if self.sent.len() >= self.pace.uploads_max() {
                self.pace.was_full();
            } else {
                let on_way = u32::try_from(self.sent.len()).unwrap();
                self.pace.sent(Lsn(self.acknowledged + u64::from(on_way) + 1));
                self.sent.push_back((now + took(on_way + 1), std::mem::take(&mut self.waiting)));
            }
        }
    }

    #[test]
    fn what_commits_waited_is_summed_as_squares() {
        let mut pace = Pace::new(1);
        pace.came(2, 3 * MS);
        pace.came(1, 5 * MS);
        // Two have waited 7 ms, one 5 ms.
        assert_eq!(pace.uncut.waited(10 * MS), 1_000_000 * (49 + 49 + 25));
        assert_eq!(pace.uncut.waited(Duration::ZERO), 1_000_000 * (9 + 9 + 25));
    }

    #[test]
    fn a_store_with_latency_gets_several() {
        let mut run = Run::new(8, 32);
        run.pass(10_000, 30 * MS, 1, |_| 20 * MS);
        let few = run.pass(20_000, 30 * MS, 2, |_| 20 * MS);
        assert!(few < 20, "{few} % of the time");
    }

    #[test]
    fn a_store_that_works_for_each_gets_one_and_another_is_seldom_tried() {
        let mut run = Run::new(8, 32);
        run.pass(10_000, 10 * MS, 1, |on_way| 2 * MS * on_way);
        let few = run.pass(20_000, 10 * MS, 1, |on_way| 2 * MS * on_way);
        assert!(few > 90, "{few} % of the time");
    }

    #[test]
    fn few_clients_that_come_back_at_once_wait_for_their_own_piece_alone() {
        let mut run = Run::new(8, 8);
        // Connections are opened.
        run.pass(300, 2 * MS, 1, |_| 80 * MS);
        run.pass(2_000, 2 * MS, 1, |_| 20 * MS);
        let before = run.acknowledged_commits;
        run.pass(10_000, 2 * MS, 1, |_| 20 * MS);
        let rounds = (run.acknowledged_commits - before) / 8;
        assert!(rounds > 10_000 / 26, "{rounds} rounds");
    }

    #[test]
    fn a_store_that_becomes_slow_under_load_loses_uploads_and_gets_them_back() {
        let mut run = Run::new(8, 32);
        run.pass(10_000, 30 * MS, 1, |_| 20 * MS);
        let slow = |on_way| 20 * MS * on_way;
        run.pass(120_000, 30 * MS, 1, slow);
        let few = run.pass(10_000, 30 * MS, 1, slow);
        assert!(few > 80, "{few} % of the time");
        run.pass(60_000, 30 * MS, 1, |_| 20 * MS);
        let few = run.pass(10_000, 30 * MS, 1, |_| 20 * MS);
        assert!(few < 20, "{few} % of the time");
    }

    #[test]
    fn what_was_slow_at_the_beginning_is_not_believed_for_ever() {
        let mut run = Run::new(8, 32);
        run.pass(1_000, 10 * MS, 1, |_| 40 * MS);
        run.pass(30_000, 10 * MS, 1, |on_way| 2 * MS * on_way);
        let few = run.pass(20_000, 10 * MS, 1, |on_way| 2 * MS * on_way);
        assert!(few > 90, "{few} % of the time");
    }

    #[test]
    fn there_is_always_one_and_never_more_than_allowed() {
        for most in [0, 1, 2] {
            let mut run = Run::new(most, 32);
            for _ in 0..1000 {
                run.pass(10, 30 * MS, 1, |_| 20 * MS);
                assert!((1..=most.max(1)).contains(&run.pace.uploads_max()));
            }
        }
    }
}
