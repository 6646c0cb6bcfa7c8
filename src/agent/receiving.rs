//! `receive` inside the agent: started again when it ends, since nobody else does.

use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::ops::{StopRequest, receive};
use crate::repo::Repository;

/// The pause before it is started again, at first and at last. What a moment cures it repeats by itself; what ends it
/// needs a person, who may come at any time.
const PAUSE_FIRST: Duration = Duration::from_secs(5);
const PAUSE_LAST: Duration = Duration::from_mins(5);

/// One that ran this long had begun well: the next pause is the shortest again.
const SOUND: Duration = Duration::from_mins(10);

/// What `receive` needs.
#[derive(Debug, Clone)]
pub struct Receiving {
    /// The repository, opened as `receive` wants it.
    pub repository: Repository,
    /// As for the command.
    pub request: receive::Request,
}

/// Runs it until it is asked to stop.
///
/// # Errors
/// An ordered stop that could not store what was in hand, as the command says it. Whatever else ends it is told in
/// the log, and it is started again: it acknowledges nothing that it should not, however often it starts.
pub(super) async fn keep(
    receiving: &Receiving,
    mut stop: StopRequest,
) -> Result<receive::Report, Failure> {
    let mut pause = PAUSE_FIRST;
    loop {
        let began = Instant::now();
        // On the heap: it is large.
        let run = receive::run(&receiving.repository, &receiving.request, stop.clone());
        let failure = match Box::pin(run).await {
            Ok(report) => return Ok(report),
            Err(failure) if stop.is_wanted() => return Err(failure),
            Err(failure) => failure,
        };
        if began.elapsed() >= SOUND {
            pause = PAUSE_FIRST;
        }
        tracing::error!(
            "receive has ended: {failure}. Next: {} It is started again in {} s; archiving goes on",
            failure.next,
            pause.as_secs()
        );
        if tokio::time::timeout(pause, stop.wanted()).await.is_ok() {
            return Ok(receive::Report::default());
        }
        pause = (pause * 2).min(PAUSE_LAST);
    }
}
