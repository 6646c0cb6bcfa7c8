//! Progress of long work, on stderr.
//!
//! A terminal gets a bar with bytes, rate and time left; anything else gets a line
//! at most every 30 seconds; `--quiet` and `--json` get nothing of it where they
//! must not. Never here: what is being done; `ops` reports it.
//!
//! ```text
//! highwater: backup: 1.2 GiB of 4 GiB (30%), 85 MiB/s, 33 s left
//! ```

use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{Output, one_line};
use super::units::{human_duration, human_size};
use crate::ops::{Progress, Silent};

/// Where there is no terminal, lines are at least this far apart.
const LINE_INTERVAL: Duration = Duration::from_secs(30);

/// The terminal is redrawn at most this often a second.
const REDRAWS_PER_SECOND: u8 = 5;

/// Returns the listener that fits this run, for work called `name`.
pub fn listener(name: &'static str, output: Output) -> Arc<dyn Progress> {
    if output.quiet {
        Arc::new(Silent)
    } else if output.stderr_is_terminal {
        Arc::new(Bar::new(name))
    } else {
        Arc::new(Lines::new(name, output))
    }
}

/// A bar on a terminal.
struct Bar {
    bar: ProgressBar,
}

impl Bar {
    fn new(name: &'static str) -> Self {
        let target = ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_SECOND);
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_style(style("{prefix}: {bytes} ({binary_bytes_per_sec}) {msg}"));
        bar.set_prefix(name);
        Self { bar }
    }
}

/// Our templates are constants; one that indicatif does not take would give its plain bar.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Progress for Bar {
    fn total(&self, bytes: Option<u64>) {
        let Some(bytes) = bytes else { return };
        self.bar.set_style(style(
            "{prefix}: {bytes} of {total_bytes} [{bar:24}] {binary_bytes_per_sec}, {eta} left {msg}",
        ));
        self.bar.set_length(bytes);
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn note(&self, message: &str) {
        self.bar.set_message(one_line(message));
        self.bar.tick();
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// A line now and then.
struct Lines {
    name: &'static str,
    output: Output,
    begun: Instant,
    state: Mutex<Pace>,
}

impl Lines {
    fn new(name: &'static str, output: Output) -> Self {
        Self { name, output, begun: Instant::now(), state: Mutex::new(Pace::default()) }
    }

    fn with_pace(&self, act: impl FnOnce(&mut Pace, Duration) -> Option<String>) {
        // A listener that panicked elsewhere leaves only counters behind.
        let mut pace = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = act(&mut pace, self.begun.elapsed()) {
            self.output.say(&format!("{}: {line}", self.name));
        }
    }
}

impl Progress for Lines {
    fn total(&self, bytes: Option<u64>) {
        self.with_pace(|pace, _| {
            pace.total = bytes;
            None
        });
    }

    fn advance(&self, bytes: u64) {
        self.with_pace(|pace, now| pace.advance(bytes, now));
    }

    fn note(&self, message: &str) {
        self.with_pace(|_, _| Some(message.to_owned()));
    }

    fn finish(&self) {}
}

/// How far the work is and when that was last said; time is since its beginning.
#[derive(Debug, Default)]
struct Pace {
    total: Option<u64>,
    done: u64,
    said_at: Duration,
    done_when_said: u64,
}

impl Pace {
    /// Counts `bytes` and returns a line if it is time for one.
    fn advance(&mut self, bytes: u64, now: Duration) -> Option<String> {
        self.done = self.done.saturating_add(bytes);
        let since = now.saturating_sub(self.said_at);
        if since < LINE_INTERVAL {
            return None;
        }
        let line = self.line(since);
        self.said_at = now;
        self.done_when_said = self.done;
        Some(line)
    }

    /// Describes the position and the rate since the last line.
    fn line(&self, since: Duration) -> String {
        let millis = since.as_millis().max(1);
        let moved = u128::from(self.done - self.done_when_said);
        let rate = u64::try_from(moved * 1000 / millis).unwrap_or(u64::MAX);
        let mut line = human_size(self.done);
        if let Some(total) = self.total.filter(|total| *total > 0) {
            // Estimates of the total can be too small; more than all is not shown.
            let percent = (u128::from(self.done) * 100 / u128::from(total)).min(100);
            let _ = write!(line, " of {} ({percent}%)", human_size(total));
        }
        let _ = write!(line, ", {}/s", human_size(rate));
        let left = self.total.map_or(0, |total| total.saturating_sub(self.done));
        if left > 0 && rate > 0 {
            let left = Duration::from_secs(left.div_ceil(rate));
            let _ = write!(line, ", {} left", human_duration(left));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_at_most_every_thirty_seconds() {
        let mut pace = Pace { total: Some(4 << 30), ..Pace::default() };
        assert_eq!(pace.advance(1 << 30, Duration::from_secs(29)), None);
        let line = pace.advance(1 << 30, Duration::from_secs(32));
        assert_eq!(line.as_deref(), Some("2 GiB of 4 GiB (50%), 64 MiB/s, 32 s left"));
        assert_eq!(pace.advance(1, Duration::from_secs(61)), None);
        assert!(pace.advance(1, Duration::from_secs(62)).is_some());
    }

    #[test]
    fn a_wrong_estimate_of_the_total_does_not_show_nonsense() {
        let mut pace = Pace { total: Some(10), ..Pace::default() };
        let line = pace.advance(3000, Duration::from_secs(30));
        assert_eq!(line.as_deref(), Some("2.9 KiB of 10 B (100%), 100 B/s"));
        let mut pace = Pace { total: Some(0), ..Pace::default() };
        assert_eq!(pace.advance(0, Duration::from_secs(30)).as_deref(), Some("0 B, 0 B/s"));
    }

    #[test]
    fn the_templates_are_ones_that_indicatif_takes() {
        assert!(
            ProgressStyle::with_template("{prefix}: {bytes} ({binary_bytes_per_sec}) {msg}")
                .is_ok()
        );
        let bar = Bar::new("x");
        bar.bar.set_draw_target(ProgressDrawTarget::hidden());
        bar.total(Some(5));
        bar.advance(3);
        assert_eq!((bar.bar.length(), bar.bar.position()), (Some(5), 3));
        bar.finish();
    }
}
