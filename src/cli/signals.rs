//! Signals that end a command early: SIGINT and SIGTERM.
//!
//! The first asks the use case to stop and to clear up behind itself; the second ends
//! the process at once, as a user wants who presses the keys again. Never here: what
//! stopping means; each use case knows.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::output::Output;
use crate::failure::{Failure, Kind, StopSignal};
use crate::ops::StopRequest;

/// Listens from now on; must be called inside a runtime.
///
/// # Errors
/// [`Kind::Bug`] where the system takes no handler.
pub(super) fn listen(output: Output) -> Result<StopRequest, Failure> {
    let register = |kind| {
        signal(kind).map_err(|error| {
            Failure::new(
                Kind::Bug,
                "could not listen for signals",
                "Nothing was begun.",
                "Check the limits of this user, then try again.",
            )
            .because(error)
        })
    };
    let mut interrupt = register(SignalKind::interrupt())?;
    let mut terminate = register(SignalKind::terminate())?;
    let (sender, request) = StopRequest::new();
    tokio::spawn(async move {
        let first = next(&mut interrupt, &mut terminate).await;
        output.say(&format!("{first}: stopping and clearing up; once more ends at once"));
        sender.send_replace(Some(first));
        let second = next(&mut interrupt, &mut terminate).await;
        std::process::exit(i32::from(second.exit_code()));
    });
    Ok(request)
}

async fn next(interrupt: &mut Signal, terminate: &mut Signal) -> StopSignal {
    tokio::select! {
        _ = interrupt.recv() => StopSignal::Interrupt,
        _ = terminate.recv() => StopSignal::Terminate,
    }
}
