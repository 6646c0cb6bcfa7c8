//! The resident service beside a cluster: it runs the use cases before they are asked for.
//!
//! Owns: its loops, its seat and socket, what it says to commands. Never here: rules about WAL (`plan`, `ops`).
//!
//! ```text
//! seat.rs        one agent for each spool; the socket
//! front.rs       connections: a question, an answer              asking.rs: the other side, in archive-push
//! message.rs     what goes over the socket
//! pushing.rs     what is ready is stored before its command comes (ops::archive_push::Resident)
//! paying.rs      of two repositories, each is brought the WAL that it lacks (ops::copy)
//! ops::receive::keep    WAL as it is written, if that is wanted
//! scheduled.rs   backups, expire, verify and drills in their time (plan::schedule), as children
//! stalling.rs    what lay on this host while the store was away (ops::spool)
//! ops::archive_get::stand_by    what recovery will ask for next, into the spool, where archive-get finds it
//! ```
//!
//! The invariant: an agent is never needed. Commands believe it only what they could have found out themselves, of the
//! very file that they name, and do their work without it where it is absent, stuck, older, newer or wrong. Killed at
//! any moment, it leaves nothing that anybody would take for more than it is.

mod asking;
mod front;
mod message;
mod paying;
mod pushing;
mod scheduled;
mod seat;
mod stalling;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;

pub use self::asking::ask_stored;
pub use self::paying::Both;
use self::pushing::Pushing;
pub use self::scheduled::{Runs, Scheduled};
use self::seat::Seat;
pub use self::stalling::Stalling;
use crate::failure::Failure;
use crate::format::Codec;
use crate::ops::ahead::Ahead;
use crate::ops::archive_push::{Resident, Second};
use crate::ops::{StopRequest, archive_get, receive};
use crate::repo::Repository;

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// The spool, which is also where commands look for the agent.
    pub ahead: Ahead,
    /// The data directory; absolute.
    pub data_directory: PathBuf,
    /// Its directory of WAL, as PostgreSQL names it to its commands.
    pub wal_directory: PathBuf,
    /// How objects are compressed.
    pub codec: Codec,
    /// How long one file may take to be stored.
    pub push_deadline: Duration,
    /// A second repository that takes WAL too.
    pub second: Option<Arc<Second>>,
    /// Both repositories, each of which is brought the WAL that it lacks.
    pub both: Option<Both>,
    /// Receive WAL too, into each of these repositories.
    pub receiving: Vec<receive::Stream>,
    /// Run commands in their time.
    pub scheduled: Option<Scheduled>,
    /// What is set for a store that is away.
    pub stalling: Option<Stalling>,
}

/// What was done until it was asked to stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// WAL files that the store has confirmed.
    pub stored_files: u64,
    /// `archive-push` commands that were told so.
    pub answered: u64,
    /// Segments that were fetched ahead of recovery.
    pub fetched_segments: u64,
    /// Objects of WAL that were brought from one of two repositories to the other, where there are two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copied_objects: Option<u64>,
    /// Commands that were run in their time, where any were wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduled: Option<Runs>,
    /// What `receive` did, where it was wanted.
    pub received: Option<receive::Report>,
    /// What it did for the second repository, where there are two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub received_into_second: Option<receive::Report>,
}

/// Serves a data directory until somebody wants it to stop.
///
/// # Errors
/// What keeps it from beginning (another agent, a spool that cannot be used); its socket was taken away; and an ordered
/// stop at which `receive` could not store what it had in hand.
pub async fn run(
    repository: &Repository,
    request: &Request,
    stop: StopRequest,
) -> Result<Report, Failure> {
    let seat = Seat::take(&request.ahead)?;
    let resident =
        Resident::new(repository, request.second.clone(), request.codec, request.push_deadline);
    let pushing = Pushing::new(resident, &request.wal_directory);
    let second = request.second.as_deref().map(Second::repository);
    let repositories: Vec<Repository> =
        [Some(repository), second].into_iter().flatten().cloned().collect();
    let (ask, questions) = mpsc::channel(front::CONVERSATIONS_MAX);
    let fetched = AtomicU64::new(0);
    tracing::info!("serving {} for {}", request.data_directory.display(), repository.describe());
    let (tally, copied_objects, scheduled, received, (), ()) = tokio::try_join!(
        async { Ok(pushing.run(questions, stop.clone()).await) },
        async {
            match &request.both {
                Some(both) => {
                    Ok(Some(paying::pay(both, request.second.as_ref(), stop.clone()).await))
                }
                None => Ok(None),
            }
        },
        async {
            Ok(match &request.scheduled {
                Some(scheduled) => {
                    let directory = &request.data_directory;
                    Some(scheduled::keep(scheduled, &repositories, directory, stop.clone()).await)
                }
                None => None,
            })
        },
        receive_all(&request.receiving, &stop),
        async {
            stalling::keep(repository, request.stalling.as_ref(), stop.clone()).await;
            Ok(())
        },
        async {
            let mut stop = stop.clone();
            tokio::select! {
                // The socket goes first, so that no command comes who would wait in vain.
                _ = stop.wanted() => { drop(seat); Ok(()) }
                failure = seat.lost() => Err(failure),
                () = front::serve(&seat.listener, &request.ahead.place, ask) => Ok(()),
                () = archive_get::stand_by(
                    &repositories, &request.ahead, &request.data_directory, &fetched,
                ) => Ok(()),
            }
        },
    )?;
    let mut received = received.into_iter();
    Ok(Report {
        stored_files: tally.stored,
        answered: tally.answered,
        fetched_segments: fetched.load(Ordering::Relaxed),
        copied_objects,
        scheduled,
        received: received.next(),
        received_into_second: received.next(),
    })
}

/// Receives into each repository; one that fails disturbs none.
async fn receive_all(
    streams: &[receive::Stream],
    stop: &StopRequest,
) -> Result<Vec<receive::Report>, Failure> {
    let all = streams.iter().map(|stream| receive::keep(stream, None, stop.clone()));
    let ended = futures_util::future::join_all(all).await;
    ended.into_iter().collect()
}
