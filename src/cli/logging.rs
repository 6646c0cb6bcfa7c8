//! Events of the floors below, on stderr.
//!
//! One line each: `highwater: warn: message name=value`. There is no time in front: PostgreSQL,
//! systemd and container engines write their own, and a person at a terminal
//! has a clock. Where two do the same beside each other, a span names which of them speaks:
//! `highwater: warn: second repository: message`. Never here: what is worth an event.
//!
//! | flags | ours | other crates |
//! |---|---|---|
//! | `-q` | errors | errors |
//! | none | warnings | errors |
//! | `-v` | info | warnings |
//! | `-vv` | debug | warnings |

use std::fmt::{self, Write as _};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::{LookupSpan, Scope};

use crate::causes::in_one_line;

/// Sends events to stderr from here on. A second call in one process changes nothing.
pub fn start(verbose: u8, quiet: bool) {
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        // A closed stderr must not end a backup with a panic.
        .log_internal_errors(false)
        .event_format(OneLine);
    let subscriber = tracing_subscriber::registry().with(layer).with(levels(verbose, quiet));
    // An error means that a subscriber is set already, which then goes on.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

fn levels(verbose: u8, quiet: bool) -> Targets {
    let (ours, others) = match (quiet, verbose) {
        (true, _) => (LevelFilter::ERROR, LevelFilter::ERROR),
        (false, 0) => (LevelFilter::WARN, LevelFilter::ERROR),
        (false, 1) => (LevelFilter::INFO, LevelFilter::WARN),
        (false, _) => (LevelFilter::DEBUG, LevelFilter::WARN),
    };
    Targets::new().with_default(others).with_target("highwater", ours)
}

/// Formats an event as one line, whatever its fields hold.
struct OneLine;

impl<S, N> FormatEvent<S, N> for OneLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = Line::default();
        event.record(&mut line);
        let word = level_word(*event.metadata().level());
        let mut text = String::new();
        for span in context.event_scope().into_iter().flat_map(Scope::from_root) {
            text = text + span.name() + ": ";
        }
        let text = super::output::one_line(&(text + &line.message + &line.fields));
        writeln!(writer, "highwater: {word}: {text}")
    }
}

fn level_word(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        _ => "debug",
    }
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn put(&mut self, field: &Field, text: &dyn fmt::Display) {
        if field.name() == "message" {
            self.message = text.to_string();
        } else {
            let _ = write!(self.fields, " {}={text}", field.name());
        }
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, &value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, &in_one_line(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, &format_args!("{value:?}"));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(verbose: u8, quiet: bool, act: impl FnOnce()) -> String {
        let page = Page::default();
        let for_layer = page.clone();
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(move || for_layer.clone())
            .event_format(OneLine);
        let subscriber = tracing_subscriber::registry().with(layer).with(levels(verbose, quiet));
        tracing::subscriber::with_default(subscriber, act);
        let bytes = page.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn an_event_is_one_marked_line() {
        let seen = logged(0, false, || {
            tracing::warn!(target: "highwater::store", attempt = 2, key = "a\nb", "slow");
            tracing::info!(target: "highwater::store", "not shown");
            tracing::warn!(target: "hyper", "not shown");
        });
        assert_eq!(seen, "highwater: warning: slow attempt=2 key=a b\n");
    }

    #[test]
    fn of_two_it_is_told_which_one_speaks() {
        let seen = logged(0, false, || {
            let span = tracing::error_span!(target: "highwater::ops", "second repository");
            span.in_scope(|| tracing::warn!(target: "highwater::store", "slow"));
        });
        assert_eq!(seen, "highwater: warning: second repository: slow\n");
    }

    #[test]
    fn quiet_leaves_errors_and_verbose_adds_ours() {
        let act = || {
            tracing::error!(target: "highwater", "e");
            tracing::warn!(target: "highwater", "w");
            tracing::debug!(target: "highwater", "d");
            tracing::debug!(target: "hyper", "h");
        };
        assert_eq!(logged(0, true, act), "highwater: error: e\n");
        let all = "highwater: error: e\nhighwater: warning: w\nhighwater: debug: d\n";
        assert_eq!(logged(2, false, act), all);
    }
}
