//! Draining the stall spool and closing gaps inside the agent; what goes wrong is told in the log, and tried again.

use std::time::Duration;

use crate::ops::StopRequest;
use crate::ops::spool::{Destinations, Keeping, OwnProgram, keep_drained};
use crate::ops::stall::Stall;
use crate::repo::Repository;

/// How often the copy of identities and keys is looked at.
const CLAIMS_EVERY: Duration = Duration::from_mins(10);

/// The pause after a directory that cannot be used: a person must look.
const PAUSE: Duration = Duration::from_mins(1);

/// What is needed for it.
#[derive(Debug, Clone)]
pub struct Stalling {
    /// What is set.
    pub stall: Stall,
    /// Where WAL goes that was kept meanwhile.
    pub into: Destinations,
    /// How a backup is taken that closes a gap.
    pub program: OwnProgram,
}

/// Works until it is asked to stop. A seat at which nothing is set waits for that as well.
pub(super) async fn keep(
    repository: &Repository,
    stalling: Option<&Stalling>,
    mut stop: StopRequest,
) {
    let Some(Stalling { stall, into, program }) = stalling else {
        stop.wanted().await;
        return;
    };
    let claims = async {
        loop {
            stall.keep_claims(repository).await;
            tokio::time::sleep(CLAIMS_EVERY).await;
        }
    };
    let draining = async {
        while !stop.is_wanted() {
            let kept = keep_drained(into, stall, Some(program), Keeping::ForEver, stop.clone());
            if let Err(failure) = Box::pin(kept).await {
                tracing::error!(
                    "the stall spool is not drained: {failure}. Next: {}",
                    failure.next
                );
                let _ = tokio::time::timeout(PAUSE, stop.wanted()).await;
            }
        }
    };
    tokio::select! {
        () = claims => {}
        () = draining => {}
    }
}
