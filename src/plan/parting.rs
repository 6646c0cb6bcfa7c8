//! When a server that shuts down is let go, although it has not our word for everything that it sent.
//!
//! ```text
//!   server  k? . k?  . k?  . k?      a reply is wanted, each time right after our status: it shuts down
//!   ours      r     r     r     r    the same flush position, since the store takes nothing
//!           |---- PATIENCE ----| then the stream is ended from here
//! ```
//!
//! A server that is asked to stop waits until `sent == flush` (`WalSndDone`), without a limit as long as statuses come.
//! It is waited with as long as the store makes progress: what is stored then is stored for good.
//!
//! It must not be mistaken for a server that is about to give up a silent client: that one asks half of
//! `wal_sender_timeout` after our last word (`WalSndKeepaliveIfNecessary`), never sooner, and these are the only two that
//! ask. Ending a stream is harmless all the same: nothing is told that is not so, and the slot stays where it is.
//!
//! Source: `src/backend/replication/walsender.c` of PostgreSQL 14 to 18.

use std::time::Duration;

/// How long a server that shuts down waits for a store that takes nothing.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How many requests for a reply, each right after our own word, are a shutdown.
const TIMES: u32 = 3;

/// Requests further apart than this have nothing to do with each other.
const APART: Duration = Duration::from_secs(10);

/// What speaks for a shutdown, and when something was stored last; times are of the caller's monotonic clock.
#[derive(Debug, Clone)]
pub struct Parting {
    /// How soon after our last word a server that lives on never asks for another; `None`: it never asks.
    asks_after: Option<Duration>,
    told: Duration,
    stored: Duration,
    asked: Option<Asked>,
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    first: Duration,
    last: Duration,
    times: u32,
}

impl Parting {
    /// Begins with a stream from a server of this `wal_sender_timeout`; `None`: it has none.
    pub fn begin(wal_sender_timeout: Option<Duration>, now: Duration) -> Self {
        let asks_after = wal_sender_timeout.map(|timeout| timeout / 2);
        Self { asks_after, told: now, stored: now, asked: None }
    }

    /// Takes note that a status was sent.
    pub fn told(&mut self, now: Duration) {
        self.told = now;
    }

    /// Takes note that the store has confirmed something.
    pub fn stored(&mut self, now: Duration) {
        self.stored = now;
    }

    /// Takes note that WAL came: a server that waits for our last word has none left to send.
    pub fn received(&mut self) {
        self.asked = None;
    }

    /// Takes note that the server wants a reply at once.
    pub fn asked(&mut self, now: Duration) {
        if self.asks_after.is_some_and(|after| now.saturating_sub(self.told) >= after) {
            return;
        }
        match &mut self.asked {
            Some(asked) if now.saturating_sub(asked.last) < APART => {
                asked.last = now;
                asked.times += 1;
            }
            _ => self.asked = Some(Asked { first: now, last: now, times: 1 }),
        }
    }

    /// Decides whether the stream is ended, so that the server can stop. `is_idle` says that nothing is on its way to the
    /// store: then waiting changes nothing.
    pub fn is_due(&self, is_idle: bool, now: Duration) -> bool {
        let Some(Asked { first, last, times }) = self.asked else { return false };
        let goes_on = now.saturating_sub(last) < APART;
        let waited = now.saturating_sub(first.max(self.stored));
        times >= TIMES && goes_on && (is_idle || waited >= PATIENCE)
    }

    /// Decides when to look whether the server shuts down, since nothing is read any more, from `unread` on, and so no
    /// request for a reply either.
    pub fn look_at(&self, unread: Duration) -> Duration {
        unread.max(self.stored) + PATIENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Option<Duration> = Some(Duration::from_mins(1));

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A server that asks right after each word of ours, once a second from `from` to `to`.
    fn pressed(timeout: Option<Duration>, from: u64, to: u64) -> Parting {
        let mut parting = Parting::begin(timeout, s(0));
        for second in from..=to {
            parting.told(s(second));
            parting.asked(s(second) + Duration::from_millis(5));
        }
        parting
    }

    #[test]
    fn a_server_that_asks_again_and_again_is_let_go_when_nothing_was_stored_for_a_while() {
        for timeout in [MINUTE, None] {
            assert!(!pressed(timeout, 100, 109).is_due(false, s(109)));
            assert!(pressed(timeout, 100, 110).is_due(false, s(111)));
        }
        let mut parting = pressed(MINUTE, 100, 110);
        parting.stored(s(105));
        assert!(!parting.is_due(false, s(111)), "the store makes progress");
        assert!(parting.is_due(false, s(115)));
    }

    #[test]
    fn where_nothing_is_on_its_way_nothing_is_waited_for() {
        assert!(!pressed(MINUTE, 100, 101).is_due(true, s(101)), "two may be chance");
        assert!(pressed(MINUTE, 100, 102).is_due(true, s(103)));
    }

    #[test]
    fn a_server_that_fears_for_its_client_does_not_shut_down() {
        let mut parting = Parting::begin(MINUTE, s(0));
        for _ in 0..100 {
            parting.asked(s(30));
        }
        assert!(!parting.is_due(true, s(31)) && !parting.is_due(false, s(41)));
    }

    #[test]
    fn requests_far_apart_and_those_before_more_wal_count_for_nothing() {
        let mut parting = Parting::begin(MINUTE, s(0));
        for minute in 1..100 {
            parting.told(s(60 * minute));
            parting.asked(s(60 * minute + 1));
        }
        assert!(!parting.is_due(true, s(60 * 99 + 2)));
        let mut parting = pressed(MINUTE, 100, 110);
        parting.received();
        assert!(!parting.is_due(true, s(111)));
        let parting = pressed(MINUTE, 100, 110);
        assert!(!parting.is_due(false, s(130)), "it has stopped asking");
    }

    #[test]
    fn a_server_that_is_not_read_is_looked_at_when_the_store_took_nothing_for_a_while() {
        let mut parting = Parting::begin(MINUTE, s(0));
        assert_eq!(parting.look_at(s(50)), s(60));
        parting.stored(s(55));
        assert_eq!(parting.look_at(s(50)), s(65));
    }
}
