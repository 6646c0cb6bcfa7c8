//! `receive`: WAL into the repository while it is written.
//!
//! ```text
//! choose a server -> store its history -> find the first byte not stored -> stream
//!        ^                                                                    |
//!        |   connection lost: store what is in hand, wait a little            v
//!        +---------------------------------------- pieces, whole segments, acknowledgements
//! ```
//!
//! Nothing is acknowledged that the store has not confirmed, and nothing that was received is given
//! up: an upload is tried again until it succeeds or a person ends the service. What ends it
//! by itself is what no retry can cure: wrong settings, and content that contradicts
//! what is stored.

mod joint;
mod keeping;
mod line;
mod sealer;
mod session;
mod source;
mod troubles;
mod unfinished;
mod uploads;
mod watch;

use std::time::{Duration, Instant};

use serde::Serialize;

pub use self::keeping::{Beside, Stream, keep};
use self::session::{End, Session};
use self::source::{Memory, Source};
use self::troubles::Trouble;
use super::StopRequest;
use super::server_facts::store_history;
use crate::failure::{Failure, Kind};
use crate::format::Codec;
use crate::pg::{Lsn, Timeline};
use crate::repo::{RepoError, Repository};
use crate::walsender::{ConnInfo, SlotName};

/// The pause before the server is looked for again, at first and at last.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LAST: Duration = Duration::from_secs(15);

/// A stream that lived this long was no failed attempt: the next pause is the shortest again.
const SOUND_STREAM: Duration = Duration::from_secs(30);

/// How often WAL that does not pass its checks is asked for again before the service ends.
const DAMAGED_READINGS: u32 = 3;

const UNHARMED: &str = "Everything that was acknowledged is in the repository, and the server keeps what is not where it has a slot or archive_command.";

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// The servers; the one that is the primary is followed.
    pub server: ConnInfo,
    /// The physical replication slot that makes the server keep WAL for us; `None`: none.
    pub slot: Option<SlotName>,
    /// Whether commits wait for us (`synchronous_standby_names`).
    pub synchronous: bool,
    /// The longest that received WAL may wait before it is sent to the store.
    pub rpo: Duration,
    /// The most pieces on their way to the store at a time; at least 1.
    pub uploads_max: usize,
    /// How objects are compressed.
    pub codec: Codec,
    /// Follow a standby where no primary is to be found.
    pub from_standby: bool,
    /// Follow a server whose timeline another one has replaced.
    pub old_timeline: bool,
    /// How long an ordered stop may take to store what is in hand.
    pub stop_deadline: Duration,
}

/// What was done until the service was asked to stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Default)]
pub struct Report {
    /// The timeline streamed last.
    pub timeline: Option<Timeline>,
    /// The end of the unbroken WAL that is stored, excluded.
    pub stored_lsn: Option<Lsn>,
    /// WAL received, in bytes.
    pub wal_bytes: u64,
    /// Bytes put into the store, headers not counted.
    pub stored_bytes: u64,
    /// Pieces stored, merged ones included.
    pub pieces: u64,
    /// Complete segments stored, or 16 MiB parts of larger ones.
    pub segments: u64,
}

/// Streams until somebody wants it to stop.
///
/// # Errors
/// What no retry can cure: settings ([`Kind::Usage`]), a place of another cluster or content
/// that contradicts what is stored ([`Kind::Conflict`]), WAL that fails its checks again and again
/// ([`Kind::Integrity`]), a disk under a local repository that does not confirm what is written to it ([`Kind::Disk`]); and an ordered stop that could not store what was in hand ([`Kind::Store`]).
pub async fn run(
    repository: &Repository,
    request: &Request,
    stop: StopRequest,
) -> Result<Report, Failure> {
    let mut service = Service {
        repository,
        request,
        stop,
        report: Report::default(),
        memory: Memory::default(),
        ever_streamed: false,
        damaged: None,
    };
    let mut pause = PAUSE_FIRST;
    while !service.stop.is_wanted() {
        let began = Instant::now();
        match service.stream_once().await {
            Ok(End::Asked) => break,
            Ok(End::ServerStopped) => tracing::info!("the server shut down in good order"),
            Ok(End::LetGo | End::Switched { .. }) => {}
            // What was in hand is not stored: whoever asked for the stop must know.
            Err(failure) if failure.kind == Kind::Store && service.stop.is_wanted() => {
                return Err(failure);
            }
            Err(failure) if service.is_curable(&failure) => {
                tracing::warn!("{failure}; trying again in {:.1} s", pause.as_secs_f64());
            }
            // A disk that forgets is no store that is away for a while.
            Err(failure) if is_not_confirmed(&failure) => {
                return Err(Failure { kind: Kind::Disk, ..failure });
            }
            Err(failure) => return Err(failure),
        }
        if began.elapsed() >= SOUND_STREAM {
            pause = PAUSE_FIRST;
        }
        if service.pause(pause).await {
            break;
        }
        pause = (pause * 2).min(PAUSE_LAST);
    }
    Ok(service.report)
}

struct Service<'a> {
    repository: &'a Repository,
    request: &'a Request,
    stop: StopRequest,
    report: Report,
    memory: Memory,
    ever_streamed: bool,
    /// Where WAL failed its checks last, and how often.
    damaged: Option<(Lsn, u32)>,
}

impl Service<'_> {
    /// Chooses a server and streams from it, from timeline to timeline, until the connection ends.
    async fn stream_once(&mut self) -> Result<End, Failure> {
        let mut stop = self.stop.clone();
        let source = tokio::select! {
            source = source::choose(self.repository, self.request, &mut self.memory) => source?,
            _ = stop.wanted() => return Ok(End::Asked),
        };
        // On the heap: it is the largest part of the service's state.
        match Box::pin(self.follow(source)).await {
            Ok(end) => Ok(end),
            Err(Trouble::Other(failure)) => Err(failure),
            Err(Trouble::WalRemoved(failure)) => {
                self.memory.wal_removed = true;
                Err(failure)
            }
            Err(Trouble::SlotLost(failure)) => {
                self.memory.slot_lost = true;
                Err(failure)
            }
        }
    }

    async fn follow(&mut self, mut source: Source) -> Result<End, Trouble> {
        let mut watch = watch::begin(self.request, &source);
        loop {
            tracing::info!(
                "streaming timeline {} from {}, beginning at {}",
                source.start.timeline,
                source.facts.place,
                source.start.lsn,
            );
            let Source { connection, facts, start, left } = source;
            let timeline = start.timeline;
            let mut session =
                Session::new(self.repository, self.request, &facts, start, &mut self.report);
            session.tidy_later(left);
            let end = session.run(connection, &mut watch, self.stop.clone()).await;
            self.memory.note(timeline, session.stored_lsn());
            self.memory.note_compared(session.take_completed());
            self.ever_streamed = true;
            let (next, switch_lsn, connection) = match end? {
                End::Switched { next, switch_lsn, connection } => (next, switch_lsn, connection),
                end => return Ok(end),
            };
            let mut connection = *connection;
            // Before any of its WAL.
            let (of, codec) = ((facts.system_id, next), self.request.codec);
            let mut stop = self.stop.clone();
            let history = store_history(self.repository, &mut connection, of, codec, UNHARMED);
            tokio::select! {
                stored = history => drop(stored?),
                _ = stop.wanted() => return Ok(End::Asked),
            }
            tracing::warn!("timeline {next} began at {switch_lsn}; following it");
            let memory = &mut self.memory;
            let start = tokio::select! {
                start = source::at_switch(self.repository, &facts, next, switch_lsn, memory) => start?,
                _ = stop.wanted() => return Ok(End::Asked),
            };
            source = Source { connection, facts, start, left: unfinished::Left::new() };
        }
    }

    /// Waits; returns whether the service was asked to stop meanwhile.
    async fn pause(&mut self, pause: Duration) -> bool {
        tokio::time::timeout(pause, self.stop.wanted()).await.is_ok()
    }

    /// Returns whether the service goes on after such a failure. Before the first stream
    /// an operator is watching, and is told at once what the server refuses.
    fn is_curable(&mut self, failure: &Failure) -> bool {
        match failure.kind {
            Kind::Store => !is_not_confirmed(failure),
            Kind::Postgres => self.ever_streamed || !is_refused(failure),
            Kind::Integrity => self.may_be_read_again(),
            _ => false,
        }
    }

    /// WAL that fails its checks may have been damaged on its way; it is asked for again.
    fn may_be_read_again(&mut self) -> bool {
        let at = self.report.stored_lsn.unwrap_or(Lsn(0));
        let times = match self.damaged {
            Some((before, times)) if before == at => times + 1,
            _ => 1,
        };
        self.damaged = Some((at, times));
        times < DAMAGED_READINGS
    }
}

/// Returns whether the disk of a local repository did not confirm what was written to it.
fn is_not_confirmed(failure: &Failure) -> bool {
    let cause = failure.cause.as_deref();
    let error = cause.and_then(|cause| cause.downcast_ref::<RepoError>());
    error.is_some_and(RepoError::is_not_confirmed)
}

/// Returns whether the server was reached and will not have us, as settings say.
fn is_refused(failure: &Failure) -> bool {
    let cause = failure.cause.as_deref();
    let error = cause.and_then(|cause| cause.downcast_ref::<crate::walsender::PgError>());
    error.is_none_or(|error| !error.is_transient())
}
