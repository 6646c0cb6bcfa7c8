//! Bringing each of two repositories the WAL that it lacks, while the agent lives.
//!
//! What is missing shows in listings, so that nothing need be remembered; an agent that knows of a segment which one
//! repository did not take looks sooner. Never here: what is copied, and how (`ops::copy`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Kind};
use crate::ops::archive_push::Second;
use crate::ops::copy::{self, Choice, Side};
use crate::ops::{Silent, StopRequest};
use crate::plan::retention::REMAINS_SETTLE_AFTER;

/// How often it looks while something is missing, or may be.
const LOOK_OWING: Duration = Duration::from_mins(1);

/// How often it looks all the same: a command that ran without the agent may have met an outage. Listings cost money.
const LOOK_ALWAYS: Duration = Duration::from_mins(10);

/// Both repositories.
#[derive(Debug, Clone)]
pub struct Both {
    /// The first.
    pub first: Side,
    /// The second.
    pub second: Side,
    /// The name of this host, for the record.
    pub host: String,
}

/// Copies WAL both ways until it is asked to stop; returns how many objects.
///
/// A repository that is away is no failure: what it lacks waits.
pub(super) async fn pay(both: &Both, storing: Option<&Arc<Second>>, mut stop: StopRequest) -> u64 {
    let request = copy::Request {
        backups: Choice::Nothing,
        wal: true,
        from: None,
        dry_run: false,
        host: both.host.clone(),
        settle_after: REMAINS_SETTLE_AFTER,
    };
    let mut copied = 0;
    // Something may have been missing before it came.
    let mut owing = true;
    let mut looked: Option<Instant> = None;
    loop {
        if looked.is_some() {
            tokio::select! {
                () = tokio::time::sleep(LOOK_OWING) => {}
                _ = stop.wanted() => return copied,
            }
        }
        owing |= storing.is_some_and(|second| second.take_debt());
        if !owing && looked.is_some_and(|looked| looked.elapsed() < LOOK_ALWAYS) {
            continue;
        }
        looked = Some(Instant::now());
        let run = copy::run(&both.first, &both.second, &request, &Silent, stop.clone());
        match run.await {
            Ok(report) => {
                let objects: u64 = report.ways.iter().map(|way| way.wal.objects).sum();
                if objects > 0 {
                    tracing::info!(
                        "brought {objects} objects of WAL to the repository that lacked them"
                    );
                }
                copied += objects;
                owing = false;
            }
            Err(Failure { kind: Kind::Stopped(_), .. }) => return copied,
            Err(failure) => {
                tracing::info!("what one repository lacks is not brought yet: {failure}");
                owing = true;
            }
        }
    }
}
