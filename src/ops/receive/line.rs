//! The connection while WAL comes in: what the server was told, and when it was heard.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

use super::UNHARMED;
use super::troubles::{Trouble, trouble};
use crate::failure::{Failure, Kind};
use crate::ops::now;
use crate::ops::server_facts::ServerFacts;
use crate::pg::Lsn;
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

/// How often it is logged how far things are.
const LOG_INTERVAL: Duration = Duration::from_mins(10);

/// The connection while WAL comes in: what the server was told, and when it was heard.
pub(super) struct Line {
    pub(super) stream: WalStream,
    pub(super) timer: tokio::time::Interval,
    interval: Duration,
    silence_max: Duration,
    heard: Instant,
    listened: bool,
    start_lsn: Lsn,
    /// The flush position told last.
    told: Lsn,
    logged: Instant,
}

impl Line {
    pub(super) fn new(stream: WalStream, start_lsn: Lsn, facts: &ServerFacts) -> Self {
        let interval = status_interval(&facts.wal_sender_timeout);
        let mut timer = tokio::time::interval(interval);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            stream,
            timer,
            interval,
            silence_max: (interval * SILENT_INTERVALS).max(SILENCE_MIN),
            heard: Instant::now(),
            listened: true,
            start_lsn,
            told: Lsn::INVALID,
            logged: Instant::now(),
        }
    }

    pub(super) fn heard(&mut self) {
        self.heard = Instant::now();
    }

    /// Whoever does not listen cannot complain of silence.
    pub(super) fn listens(&mut self, listens: bool) {
        if listens && !self.listened {
            self.heard();
        }
        self.listened = listens;
    }

    /// Tells the server how far we are, if that is news or an answer is wanted.
    pub(super) async fn tell(&mut self, progress: &Progress, wanted: bool) -> Result<(), Trouble> {
        let flush_lsn = progress.flush_lsn();
        let is_news = flush_lsn > self.told.max(self.start_lsn);
        if is_news || wanted { self.send(progress, false).await } else { Ok(()) }
    }

    /// Lets the server know that we live, and looks whether it does.
    pub(super) async fn keep_alive(&mut self, progress: &Progress) -> Result<(), Trouble> {
        if self.listened && self.heard.elapsed() > self.silence_max {
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

/// Returns how often to report, for a server that gives up on silent clients after `timeout`, as
/// SHOW prints it: `1min`, `30s`, `500ms`, `0`.
fn status_interval(timeout: &str) -> Duration {
    let digits = timeout.find(|c: char| !c.is_ascii_digit()).unwrap_or(timeout.len());
    let (number, unit) = timeout.split_at(digits);
    let Ok(number) = number.parse::<u32>() else { return STATUS_INTERVAL_MAX };
    let one = match unit {
        "ms" => Duration::from_millis(1),
        "s" => Duration::from_secs(1),
        "min" => Duration::from_mins(1),
        "h" => Duration::from_hours(1),
        _ => return STATUS_INTERVAL_MAX,
    };
    (one.saturating_mul(number) / 4).clamp(STATUS_INTERVAL_MIN, STATUS_INTERVAL_MAX)
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
}
