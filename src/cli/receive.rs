//! `receive`: from settings to its report, into one repository or into both beside each other.
//!
//! Owns: what a stream into the second repository calls itself, so that PostgreSQL can tell the two apart. Never here:
//! what a stream does (`ops::receive`).

use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use super::dispatch::{Ended, Surroundings};
use super::drivers::{Opened, THREAD_STACK_BYTES, open_repository_retrying, run_light, server};
use super::requests::ReceiveRequest;
use super::second_repo::Only;
use super::settings::Origin;
use super::two::{Reported, tell};
use super::{reports, signals};
use crate::failure::{Failure, Kind};
use crate::ops::receive::{Beside, Report, Request, Stream, keep, run};
use crate::ops::{StopRequest, Which};
use crate::walsender::{ConnInfo, SlotName};

/// `receive` repeats by itself what the store did not take, without the long pauses of the store's own
/// repetitions: commits may be waiting.
const RETRY_DEADLINE: Duration = Duration::from_secs(3);

/// How long `receive` tries to store what it holds once it was asked to stop; service
/// managers commonly kill after 90 s.
const STOP_DEADLINE: Duration = Duration::from_mins(1);

/// What is behind the name of the first stream in that of the second.
const OF_SECOND: &str = "_second";

/// The longest `application_name` that PostgreSQL does not cut, in bytes: `NAMEDATALEN` less one
/// (`src/include/pg_config_manual.h`).
const NAME_BYTES_MAX: usize = 63;

/// Streams into the repository, or into both.
pub(super) fn receive(
    request: ReceiveRequest,
    surroundings: &Surroundings<'_>,
) -> Result<(), Ended> {
    let output = surroundings.output;
    let mut both = opened_streams(request, surroundings)?.into_iter();
    let (Some((opened, first)), second) = (both.next(), both.next()) else { return Ok(()) };
    let Some((opened_second, second)) = second else {
        // On one thread: handing each piece to another and back would cost a commit more than the piece itself.
        let report = run_light(async {
            opened.sweep().await;
            let work = |stop| run(&first.repository, &first.request, stop);
            signals::stoppable(output, work).await
        })?;
        return Ok(output.report(&report, reports::receive)?);
    };
    let work = async |stop: StopRequest| {
        let beside = Beside::default();
        let aside = aside(opened_second, second, beside.clone(), stop.clone())?;
        opened.sweep().await;
        let first = keep(&first, Some(&beside), stop).await;
        Ok([first, aside.await.unwrap_or_else(|ended| Err(no_thread().because(ended)))])
    };
    let ends = run_light(signals::stoppable(output, work))?;
    let reported = |end: Result<Report, Failure>| Reported::new(&end?, reports::receive, None);
    let ends = [Which::First, Which::Second].into_iter().zip(ends.map(reported));
    tell(output, ends.collect(), || Ok(None))
}

/// Streams into the second repository on a thread and a runtime of its own, so that a disk which holds every thread of
/// one does not hold up the other.
fn aside(
    opened: Opened,
    stream: Stream,
    beside: Beside,
    stop: StopRequest,
) -> Result<oneshot::Receiver<Result<Report, Failure>>, Failure> {
    let (sender, ended) = oneshot::channel();
    let work = move || {
        let end = run_light(async {
            opened.sweep().await;
            keep(&stream, Some(&beside), stop).await
        });
        // Whoever does not wait any more was told to end at once.
        let _ = sender.send(end);
    };
    let thread = thread::Builder::new().name("second".to_owned()).stack_size(THREAD_STACK_BYTES);
    thread.spawn(work).map_err(|error| no_thread().because(error))?;
    Ok(ended)
}

fn no_thread() -> Failure {
    let what = "could not stream into the second repository on a thread of its own";
    let unharmed = "Everything that was acknowledged is in the repositories.";
    Failure::new(Kind::Bug, what, unharmed, "Check the limits on threads and memory of this user.")
}

/// Returns the streams, one for each repository.
pub(super) fn streams(
    request: ReceiveRequest,
    surroundings: &Surroundings<'_>,
) -> Result<Vec<Stream>, Failure> {
    let opened = opened_streams(request, surroundings)?;
    Ok(opened.into_iter().map(|(_, stream)| stream).collect())
}

fn opened_streams(
    request: ReceiveRequest,
    surroundings: &Surroundings<'_>,
) -> Result<Vec<(Opened, Stream)>, Failure> {
    let settings = surroundings.settings;
    let Some(second) = settings.of_second() else {
        return Ok(vec![opened_stream(request, surroundings, false)?]);
    };
    let both = [settings.of_first(), second];
    let of = |settings| opened_stream(request, &Surroundings { settings, ..*surroundings }, true);
    both.iter().map(of).collect()
}

fn opened_stream(
    request: ReceiveRequest,
    surroundings: &Surroundings<'_>,
    is_one_of_two: bool,
) -> Result<(Opened, Stream), Failure> {
    let settings = surroundings.settings;
    let opened = open_repository_retrying(surroundings, RETRY_DEADLINE)?;
    let request = Request {
        server: receiving_server(surroundings)?,
        slot: slot(surroundings)?,
        synchronous: settings.synchronous.value,
        rpo: settings.rpo.value,
        uploads_max: settings.uploads.value,
        codec: settings.compression.value,
        from_standby: request.from_standby,
        old_timeline: request.old_timeline,
        stop_deadline: STOP_DEADLINE,
    };
    let which = is_one_of_two.then_some(settings.which);
    let repository = opened.repository.clone();
    Ok((opened, Stream { which, repository, request }))
}

/// Returns the server as the stream into this repository speaks to it: under a name of its own, for
/// `synchronous_standby_names`.
pub(super) fn receiving_server(surroundings: &Surroundings<'_>) -> Result<ConnInfo, Failure> {
    let server = server(surroundings)?;
    if surroundings.settings.which == Which::First {
        return Ok(server);
    }
    let name = server.application_name();
    let kept = name.floor_char_boundary(NAME_BYTES_MAX - OF_SECOND.len());
    let name = format!("{}{OF_SECOND}", &name[..kept]);
    Ok(server.with_application_name(&name))
}

/// Returns the replication slot of the stream into this repository.
pub(super) fn slot(surroundings: &Surroundings<'_>) -> Result<Option<SlotName>, Failure> {
    let settings = surroundings.settings;
    let (slot, by_flag) = match &settings.slot {
        Some(said) => (said.value.0.clone(), matches!(said.origin, Origin::Flag(_))),
        None => (Some(SlotName::of_cluster(settings.require_cluster()?)), false),
    };
    // Beside `--only second` no other can be meant.
    let is_meant = by_flag && surroundings.only == Some(Only::Second);
    let is_first = settings.which == Which::First;
    Ok(if is_first || is_meant { slot } else { slot.map(|slot| slot.of_second()) })
}
