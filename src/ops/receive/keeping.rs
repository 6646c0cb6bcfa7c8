//! A stream that is started again when it ends by itself, since nobody else does it; alone, or one of two.
//!
//! Never here: what a stream does.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{Instrument, Span};

use super::{Report, Request, run};
use crate::failure::Failure;
use crate::ops::{StopRequest, Which};
use crate::repo::Repository;

/// The pause before it is started again, at first and at last. What a moment cures it repeats by itself; what ends it
/// needs a person, who may come at any time.
const PAUSE_FIRST: Duration = Duration::from_secs(5);
const PAUSE_LAST: Duration = Duration::from_mins(5);

/// One that ran this long had begun well: the next pause is the shortest again.
const SOUND: Duration = Duration::from_mins(10);

/// A stream of WAL into one repository.
#[derive(Debug, Clone)]
pub struct Stream {
    /// Which of two repositories it is; `None` where there is one.
    pub which: Option<Which>,
    /// The repository, opened as `receive` wants it.
    pub repository: Repository,
    /// What is asked.
    pub request: Request,
}

/// How many of two streams have ended and were not started again: neither stops the other, but when both have ended
/// there is nothing left to go on for. Clones speak of the same two.
#[derive(Debug, Clone)]
pub struct Beside(watch::Sender<usize>);

impl Default for Beside {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl Beside {
    /// Counts one that has ended; returns whether both have now.
    fn one_has_ended(&self) -> bool {
        self.0.send_modify(|ended| *ended += 1);
        *self.0.borrow() == 2
    }

    /// Counts it no more; returns whether it may start again, which it may not once both have ended.
    fn one_is_started_again(&self) -> bool {
        self.0.send_if_modified(|ended| {
            let may = *ended < 2;
            *ended -= usize::from(may);
            may
        })
    }

    async fn both_have_ended(&self) {
        // It never fails: the sender is here.
        let _ = self.0.subscribe().wait_for(|ended| *ended == 2).await;
    }
}

/// Streams until it is asked to stop. A stream that ends is told in the log and started again: it acknowledges nothing
/// that it should not, however often it starts.
///
/// # Errors
/// An ordered stop that could not store what was in hand. With `beside`, also why this one ended, as [`run`] says it: when
/// the other has ended too, or when the stop is ordered before it is started again.
pub async fn keep(
    stream: &Stream,
    beside: Option<&Beside>,
    mut stop: StopRequest,
) -> Result<Report, Failure> {
    let mut pause = PAUSE_FIRST;
    loop {
        let began = Instant::now();
        // On the heap: it is large.
        let run = Box::pin(run(&stream.repository, &stream.request, stop.clone()));
        let failure = match run.instrument(span_of(stream.which)).await {
            Ok(report) => return Ok(report),
            Err(failure) if stop.is_wanted() => return Err(failure),
            Err(failure) => failure,
        };
        if began.elapsed() >= SOUND {
            pause = PAUSE_FIRST;
        }
        let Some(beside) = beside else {
            tell(&failure, stream.which, pause);
            if tokio::time::timeout(pause, stop.wanted()).await.is_ok() {
                return Ok(Report::default());
            }
            pause = (pause * 2).min(PAUSE_LAST);
            continue;
        };
        if beside.one_has_ended() {
            return Err(failure);
        }
        tell(&failure, stream.which, pause);
        tokio::select! {
            biased;
            () = beside.both_have_ended() => return Err(failure),
            _ = stop.wanted() => return Err(failure),
            () = tokio::time::sleep(pause) => {}
        }
        if !beside.one_is_started_again() {
            return Err(failure);
        }
        pause = (pause * 2).min(PAUSE_LAST);
    }
}

/// Names the repository in the log, where there are two.
fn span_of(which: Option<Which>) -> Span {
    match which {
        None => Span::none(),
        Some(Which::First) => tracing::error_span!("first repository"),
        Some(Which::Second) => tracing::error_span!("second repository"),
    }
}

fn tell(failure: &Failure, which: Option<Which>, pause: Duration) {
    let (into, goes_on) = match which {
        None => (String::new(), "archiving goes on"),
        Some(which) => (format!(" into the {} repository", which.word()), "the other goes on"),
    };
    tracing::error!(
        "receive{into} has ended: {failure}. Next: {} It is started again in {} s; {goes_on}",
        failure.next,
        pause.as_secs()
    );
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn both_have_ended_only_while_neither_is_started_again() {
        let first = Beside::default();
        let second = first.clone();
        assert!(!first.one_has_ended());
        assert_eq!(second.both_have_ended().now_or_never(), None);
        assert!(first.one_is_started_again());
        assert!(!second.one_has_ended());
        assert_eq!(first.both_have_ended().now_or_never(), None);
        assert!(first.one_has_ended());
        assert_eq!(first.both_have_ended().now_or_never(), Some(()));
        assert_eq!(second.both_have_ended().now_or_never(), Some(()));
        assert!(!second.one_is_started_again());
    }
}
