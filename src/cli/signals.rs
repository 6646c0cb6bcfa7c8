//! Signals that end a command early: SIGINT and SIGTERM.
//!
//! The first asks the use case to stop and to clear up behind itself; the second ends
//! the command at once, as a user wants who presses the keys again. Never here: what
//! stopping means; each use case knows.

use std::future::Future;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::output::Output;
use crate::failure::{Failure, Kind, StopSignal};
use crate::ops::StopRequest;

/// Runs `work` until it ends, which it should soon once its request is made, or until a
/// second signal comes. Must be called inside a runtime.
///
/// # Errors
/// What `work` says; [`Kind::Stopped`] by a second signal; [`Kind::Bug`] where the system takes no handler.
pub(super) async fn stoppable<T, W>(
    output: Output,
    work: impl FnOnce(StopRequest) -> W,
) -> Result<T, Failure>
where
    W: Future<Output = Result<T, Failure>>,
{
    let mut interrupt = register(SignalKind::interrupt())?;
    let mut terminate = register(SignalKind::terminate())?;
    let (sender, request) = StopRequest::new();
    let (tell_second, second) = oneshot::channel();
    // On a task of its own, so that signals are seen whatever the work is doing.
    tokio::spawn(async move {
        let first = next(&mut interrupt, &mut terminate).await;
        output.say(&format!("{first}: stopping and clearing up; once more ends at once"));
        sender.send_replace(Some(first));
        let _ = tell_second.send(next(&mut interrupt, &mut terminate).await);
    });
    tokio::select! {
        outcome = work(request) => outcome,
        Ok(signal) = second => Err(ended_at_once(signal)),
    }
}

fn register(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| {
        Failure::new(
            Kind::Bug,
            "could not listen for signals",
            "Nothing was begun.",
            "Check the limits of this user, then try again.",
        )
        .because(error)
    })
}

fn ended_at_once(signal: StopSignal) -> Failure {
    Failure::new(
        Kind::Stopped(signal),
        format!("ended at once by {signal}, without clearing up"),
        "Earlier backups, archived WAL and the server are as they were.",
        "`highwater info` shows what is left: listed as unfinished, it is no backup and disturbs nobody.",
    )
}

async fn next(interrupt: &mut Signal, terminate: &mut Signal) -> StopSignal {
    tokio::select! {
        _ = interrupt.recv() => StopSignal::Interrupt,
        _ = terminate.recv() => StopSignal::Terminate,
    }
}
