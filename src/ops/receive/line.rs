//! The connection while WAL comes in: what the server was told, and when it was heard.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

use super::UNHARMED;
use super::troubles::{Trouble, trouble};
use crate::failure::{Failure, Kind};
use crate::ops::now;
use crate::ops::server_facts::ServerFacts;
use crate::pg::Lsn;
use crate::plan::parting::Parting;
use crate::plan::receive::Progress;
use crate::walsender::{StreamStatus, WalStream};

/// The longest pause between two status messages, as `pg_receivewal` has it.
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(10);

/// The shortest, for servers with a tiny `wal_sender_timeout`.
const STATUS_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// How many status intervals may pass without a word from the server, which is asked for one in
/// each, before it is given up.
const SILENT_INTERVALS: u32 = 4;

/// The least patience with a silent server.
const SILENCE_MIN: Duration = Duration::from_secs(20);

/// The least pause between two statuses that bring nothing new: a server that shuts down answers each with a request for
/// the next.
const ANSWER_PAUSE: Duration = Duration::from_secs(1);

/// How long WAL may have come before the server is told that it did: commits may be waiting for that alone
/// (`synchronous_commit = remote_write`), and the store may take its time.
const WRITE_PAUSE: Duration = Duration::from_millis(100);

/// The pause between two looks whether a server shuts down that is not read.
const LOOK_PAUSE: Duration = Duration::from_secs(5);

/// How often it is logged how far things are.
const LOG_INTERVAL: Duration = Duration::from_mins(10);

/// The connection while WAL comes in: what the server was told, and when it was heard.
pub(super) struct Line {
    pub(super) stream: WalStream,
    pub(super) timer: tokio::time::Interval,
    interval: Duration,
    silence_max: Duration,
    heard: Instant,
    /// Since when nothing is read, because too much is on its way to the store.
    unread: Option<Instant>,
    start_lsn: Lsn,
    /// The flush position told last, and when anything was.
    told: Lsn,
    told_at: Instant,
    /// When a reply that the server wants is sent at the latest.
    answer_at: Option<Instant>,
    /// When WAL that came is told of at the latest.
    write_at: Option<Instant>,
    parting: Parting,
    /// When it was last looked whether the server shuts down.
    looked: Option<Instant>,
    began: Instant,
    logged: Instant,
}

impl Line {
    pub(super) fn new(stream: WalStream, start_lsn: Lsn, facts: &ServerFacts) -> Self {
        let interval = status_interval(&facts.wal_sender_timeout);
        let mut timer = tokio::time::interval(interval);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let began = Instant::now();
        Self {
            stream,
            timer,
            interval,
            silence_max: silence_max(facts),
            heard: began,
            unread: None,
            start_lsn,
            told: Lsn::INVALID,
            told_at: began,
            answer_at: None,
            write_at: None,
            parting: Parting::begin(patience_of_server(&facts.wal_sender_timeout), Duration::ZERO),
            looked: None,
            began,
            logged: began,
        }
    }

    pub(super) fn heard(&mut self) {
        self.heard = Instant::now();
    }

    /// Takes note of WAL that came.
    pub(super) fn received(&mut self) {
        self.parting.received();
        self.write_at.get_or_insert_with(|| Instant::now() + WRITE_PAUSE);
    }

    /// Takes note that the store has confirmed something.
    pub(super) fn stored(&mut self) {
        self.parting.stored(self.began.elapsed());
    }

    /// Whoever does not listen cannot complain of silence.
    pub(super) fn listens(&mut self, listens: bool) {
        if listens {
            if self.unread.take().is_some() {
                self.heard();
            }
        } else {
            self.unread.get_or_insert_with(Instant::now);
        }
    }

    /// Takes note that the server wants a reply. It has one at once where there is something to say; otherwise
    /// [`Self::tell_at`] says when.
    pub(super) fn asked(&mut self) {
        self.parting.asked(self.began.elapsed());
        self.answer_at = Some(self.told_at + self.interval.min(ANSWER_PAUSE));
    }

    /// Returns when the server is told the next time: since it wants a reply, or since WAL came.
    pub(super) fn tell_at(&self) -> Option<Instant> {
        self.answer_at.into_iter().chain(self.write_at).min()
    }

    /// Returns whether the server shuts down, and the stream must be ended for it to come to an end; `is_idle` says that
    /// nothing is on its way to the store.
    pub(super) fn holds_up_a_shutdown(&self, is_idle: bool) -> bool {
        self.parting.is_due(is_idle, self.began.elapsed())
    }

    /// Returns from when on a server that is found to shut down is held up by us; `None` as long as it can say so
    /// itself.
    fn held_up_from(&self) -> Option<Instant> {
        let unread = self.unread?.saturating_duration_since(self.began);
        Some(self.began + self.parting.look_at(unread))
    }

    /// Returns whether the stream must be ended for a server that was found to shut down.
    pub(super) fn holds_up_unread(&self) -> bool {
        self.held_up_from().is_some_and(|from| from <= Instant::now())
    }

    /// Returns when to look whether the server shuts down, since nothing is read that would say so.
    pub(super) fn look_at(&self) -> Option<Instant> {
        let from = self.held_up_from()?;
        Some(self.looked.map_or(from, |looked| from.max(looked + LOOK_PAUSE)))
    }

    /// Takes note that it is being looked.
    pub(super) fn looks(&mut self) {
        self.looked = Some(Instant::now());
    }

    /// Tells the server how far we are, if that is news.
    pub(super) async fn tell(&mut self, progress: &Progress) -> Result<(), Trouble> {
        let flush_lsn = progress.flush_lsn();
        let is_news = flush_lsn > self.told.max(self.start_lsn);
        if is_news { self.send(progress, false).await } else { Ok(()) }
    }

    /// Tells the server how far we are, whether it knows it or not.
    pub(super) async fn answer(&mut self, progress: &Progress) -> Result<(), Trouble> {
        self.send(progress, false).await
    }

    /// Lets the server know that we live, and looks whether it does.
    pub(super) async fn keep_alive(&mut self, progress: &Progress) -> Result<(), Trouble> {
        if self.unread.is_none() && self.heard.elapsed() > self.silence_max {
            return Err(Trouble::Other(Failure::new(
                Kind::Postgres,
                format!("the server has not said a word for {} s", self.heard.elapsed().as_secs()),
                UNHARMED,
                "Check the network between this host and the server.",
            )));
        }
        self.log(progress);
        let is_quiet = self.heard.elapsed() >= self.interval;
        self.send(progress, is_quiet).await
    }

    /// Says now and then how far things are.
    fn log(&mut self, progress: &Progress) {
        if self.logged.elapsed() >= LOG_INTERVAL {
            self.logged = Instant::now();
            tracing::info!(
                "stored up to {}, received up to {}",
                progress.stored_lsn(),
                progress.write_lsn()
            );
        }
    }

    async fn send(&mut self, progress: &Progress, reply_requested: bool) -> Result<(), Trouble> {
        let write_lsn = progress.write_lsn();
        // Nothing was received yet: 0 leaves the slot where it is.
        let has_news = progress.flush_lsn() > self.start_lsn;
        let flush_lsn = if has_news { progress.flush_lsn() } else { Lsn::INVALID };
        let status = StreamStatus { write_lsn, flush_lsn, reply_requested };
        let sent = tokio::time::timeout(self.silence_max, self.stream.send_status(&status, now()));
        match sent.await {
            Ok(Ok(())) => {
                self.told = flush_lsn;
                self.told_at = Instant::now();
                (self.answer_at, self.write_at) = (None, None);
                self.parting.told(self.began.elapsed());
                Ok(())
            }
            Ok(Err(error)) => Err(trouble(error, "lost the stream")),
            Err(_) => Err(Trouble::Other(Failure::new(
                Kind::Postgres,
                "the server takes no more messages",
                UNHARMED,
                "Check the network between this host and the server.",
            ))),
        }
    }
}

/// Returns how long a server may be silent that has something to say: an answer is wanted, or it is asked for a word in
/// each status.
pub(super) fn silence_max(facts: &ServerFacts) -> Duration {
    (status_interval(&facts.wal_sender_timeout) * SILENT_INTERVALS).max(SILENCE_MIN)
}

/// Returns how often to report, for a server that gives up on silent clients after `timeout`, as SHOW prints it.
fn status_interval(timeout: &str) -> Duration {
    let patience = patience_of_server(timeout);
    patience.map_or(STATUS_INTERVAL_MAX, |patience| {
        (patience / 4).clamp(STATUS_INTERVAL_MIN, STATUS_INTERVAL_MAX)
    })
}

/// Reads `wal_sender_timeout` as SHOW prints it: `1min`, `30s`, `500ms`, `0`; `None` where there is none.
fn patience_of_server(timeout: &str) -> Option<Duration> {
    let digits = timeout.find(|c: char| !c.is_ascii_digit()).unwrap_or(timeout.len());
    let (number, unit) = timeout.split_at(digits);
    let number = number.parse::<u32>().ok().filter(|number| *number > 0)?;
    let one = match unit {
        "ms" => Duration::from_millis(1),
        "s" => Duration::from_secs(1),
        "min" => Duration::from_mins(1),
        "h" => Duration::from_hours(1),
        "d" => Duration::from_hours(24),
        _ => return None,
    };
    Some(one.saturating_mul(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_comes_well_within_the_servers_patience() {
        let cases = [("1min", 10_000), ("30s", 7_500), ("500ms", 125), ("0", 10_000), ("1ms", 100)];
        for (shown, millis) in cases {
            assert_eq!(status_interval(shown), Duration::from_millis(millis), "{shown}");
        }
        assert_eq!(status_interval("never"), STATUS_INTERVAL_MAX);
    }

    #[test]
    fn the_servers_patience_is_read_as_it_prints_it() {
        let minutes = |minutes| Some(Duration::from_mins(minutes));
        let cases =
            [("1min", minutes(1)), ("90min", minutes(90)), ("1d", minutes(24 * 60)), ("0", None)];
        for (shown, patience) in cases {
            assert_eq!(patience_of_server(shown), patience, "{shown}");
        }
    }
}
