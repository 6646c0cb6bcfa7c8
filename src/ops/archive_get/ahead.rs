//! Fetching the segments that recovery will ask for next, while it replays.
//!
//! ```text
//! archive-get 7   direct; leaves word that 7 was asked for, and a process of its own behind it
//! fetch-ahead     8, 9, 10 … into the spool, each checked as ever; a note of each
//! archive-get 8   a note, and the very file it is about? -> rename to where PostgreSQL wants it
//! ```
//!
//! Only what can never change is fetched ahead: complete segments. That a segment is not there is never taken from
//! the spool, for it may be there by now: the store is asked each time. The process that fetches ends by itself when
//! nothing was asked for some seconds, or the server is gone, and takes its files with it. Where an agent lives, it
//! fetches in its place, and no process is started.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::{Lineage, Report, Request, check_first_page};
use crate::failure::{Failure, Kind};
use crate::ops::ahead::{Ahead, COMING, FETCHED, WANTED, is_of_fetching, passed_over};
use crate::ops::{control_of, failures};
use crate::pg::{LONG_PAGE_HEADER_BYTES, SegmentName, WalFileName};
use crate::pgdata::{
    Durability, Existing, FileFacts, Moment, ServerState, Spool, StagedFile, free_bytes,
    server_state,
};
use crate::plan::spool::{Circumstances, Note, to_hold};
use crate::repo::{Repository, SegmentSource};

/// Segments fetched at a time: each holds up to 16 MiB as stored, of the 64 MiB that archiving may have.
const IN_FLIGHT: usize = 3;

/// How long the fetching process lives on while nothing is asked for.
const IDLE_MAX: Duration = Duration::from_secs(10);

/// How often it looks what was asked for.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// The same for a process that stays, while no recovery asks.
const LOOK_IDLE: Duration = Duration::from_millis(200);

/// How long `archive-get` waits for a segment that is just being fetched, and how often it looks. After that it
/// fetches the segment itself.
const COMING_MAX: Duration = Duration::from_secs(5);
const COMING_LOOK: Duration = Duration::from_millis(1);

/// At most one part in so many of the free disk is taken: WAL needs it more.
const FREE_PARTS: u64 = 4;

/// Where in the process table PostgreSQL itself inherits orphans, in a container without an init.
const INIT_PID: u32 = 1;

/// Serves a segment from the spool, without the repository. `None`: fetch it.
pub fn take_fetched(request: &Request) -> Option<Report> {
    let ahead = request.ahead.as_ref()?;
    let segment = SegmentName::parse(&request.name)?;
    let spool = ahead.find()?;
    wait_while_coming(&spool, segment);
    let note_name = format!("{segment}{FETCHED}");
    let note = ahead.note(&spool, &note_name, segment)?;
    let taken = take_noted(request, &spool, segment, &note);
    // A file that was not good enough once never will be.
    spool.remove(&note_name);
    if taken.is_none() {
        spool.remove(&segment.to_string());
        return None;
    }
    let source = Some(SegmentSource::Whole);
    Some(Report { name: WalFileName::Segment(segment), source })
}

fn take_noted(request: &Request, spool: &Spool, segment: SegmentName, note: &Note) -> Option<()> {
    let control = control_of(&request.data_directory)?;
    let lineage = Lineage { system_id: control.system_id, segment_size: control.wal_segment_size };
    let path = spool.path(&segment.to_string());
    let file = File::open(&path).ok()?;
    let facts = FileFacts::of(&file).ok()?;
    let same = note.is_of_file(facts, lineage.segment_size);
    same.inspect_err(|doubt| passed_over(&segment.to_string(), *doubt)).ok()?;
    let mut head = Vec::new();
    file.take(LONG_PAGE_HEADER_BYTES as u64).read_to_end(&mut head).ok()?;
    check_first_page(&head, lineage, segment)
        .inspect_err(|why| tracing::debug!("`{segment}` in the spool is passed over: {why}"))
        .ok()?;
    std::fs::rename(&path, &request.target)
        .inspect_err(|error| tracing::debug!("`{segment}` cannot be taken from the spool: {error}"))
        .ok()
}

/// Waits for a segment that another process is fetching, within bounds.
fn wait_while_coming(spool: &Spool, segment: SegmentName) {
    let coming = spool.path(&format!("{segment}{COMING}"));
    let began = Instant::now();
    while coming.exists() && began.elapsed() < COMING_MAX {
        // Whoever left the mark may be dead.
        if !matches!(spool.lock(), Ok(None)) {
            return;
        }
        std::thread::sleep(COMING_LOOK);
    }
}

fn leave_word(spool: &Spool, segment: SegmentName) {
    if let Err(error) = spool.write_note(WANTED, segment.to_string().as_bytes()) {
        tracing::debug!("nothing is fetched ahead: {error}");
    }
}

/// Leaves word that this segment was served, and returns whether a process should be started that
/// runs [`fetch_ahead`]: there is none yet, and there may be one.
pub fn wants_fetching(request: &Request, report: &Report) -> bool {
    let Some(ahead) = &request.ahead else { return false };
    let (WalFileName::Segment(segment), Some(source)) = (report.name, report.source) else {
        return false;
    };
    // Behind what is not complete there is nothing yet.
    let bytes = std::fs::metadata(&request.target).map_or(0, |metadata| metadata.len());
    if !is_complete(source, bytes) {
        return false;
    }
    // PostgreSQL that runs as process 1 takes an orphan that was killed for a crash of its own, and ends all
    // sessions (`src/backend/postmaster/postmaster.c`, `process_pm_child_exit`).
    let may_leave_orphans = server_pid(request) != Some(INIT_PID);
    let spool = if may_leave_orphans { ahead.open() } else { ahead.find() };
    let Some(spool) = spool else { return false };
    let somebody_fetches = matches!(spool.lock(), Ok(None));
    if somebody_fetches || may_leave_orphans {
        leave_word(&spool, segment);
    }
    !somebody_fetches && may_leave_orphans
}

fn server_pid(request: &Request) -> Option<u32> {
    match server_state(&request.data_directory) {
        Ok(ServerState::Running(server) | ServerState::Stale(server)) => Some(server.pid),
        _ => None,
    }
}

/// Fetches ahead until nothing was asked for during some seconds or the server of `data_directory` is gone.
/// Does nothing if another process does so already. Returns how many segments were put into the spool.
///
/// # Errors
/// Only what keeps it from beginning. What cannot be fetched is left to the direct way, which tells why.
pub async fn fetch_ahead(
    repositories: &[Repository],
    ahead: Ahead,
    data_directory: PathBuf,
) -> Result<u64, Failure> {
    let failed = |what: &str, next: &str| {
        Failure::new(Kind::Disk, what, "Recovery goes on without it.", next)
    };
    let spool = Spool::open(&ahead.spool).map_err(|error| {
        failed("the spool cannot be used", "Check the setting `spool`.").because(error)
    })?;
    let lock = spool.lock().map_err(|error| {
        failures::of_disk(error, "the spool cannot be locked", "Recovery goes on without it.")
    })?;
    let Some(_lock) = lock else { return Ok(0) };
    let fetched = AtomicU64::new(0);
    follow(repositories, &ahead, &spool, &data_directory, &fetched).await.ok_or_else(|| {
        failed("there is no readable global/pg_control here", "Run it in the data directory.")
    })?;
    Ok(fetched.into_inner())
}

/// Fetches ahead whenever recovery asks, one recovery after another, for a process that stays. Ends never; may be
/// dropped at any moment. `fetched` is told of each segment that was put into the spool.
pub async fn stand_by(
    repositories: &[Repository],
    ahead: &Ahead,
    data_directory: &Path,
    fetched: &AtomicU64,
) {
    loop {
        // One that `archive-get` had started may still be at work; it ends by itself.
        if let Some(spool) = ahead.find()
            && let Ok(Some(_lock)) = spool.lock()
        {
            // What one that was killed has left.
            spool.tidy(|name| !is_of_fetching(name));
            while spool.directory().exists() {
                if spool.path(WANTED).exists() {
                    let _ = follow(repositories, ahead, &spool, data_directory, fetched).await;
                }
                tokio::time::sleep(LOOK_IDLE).await;
            }
        }
        tokio::time::sleep(LOOK_IDLE).await;
    }
}

/// Fetches ahead until nothing was asked for during some seconds or the server is gone, and takes its files along.
/// The caller holds the lock. `None`: there is no readable `pg_control`.
async fn follow(
    repositories: &[Repository],
    ahead: &Ahead,
    spool: &Spool,
    data_directory: &Path,
    fetched: &AtomicU64,
) -> Option<()> {
    let control = control_of(data_directory)?;
    let lineage = Lineage { system_id: control.system_id, segment_size: control.wal_segment_size };
    let mut fetching = Fetching {
        repositories: repositories.to_vec(),
        spool: spool.clone(),
        ahead: ahead.clone(),
        lineage,
        on_the_way: JoinSet::new(),
        known: BTreeSet::new(),
        end: None,
        fetched,
    };
    fetching.follow(data_directory).await;
    fetching.on_the_way.shutdown().await;
    // Who comes late fetches by himself.
    fetching.spool.tidy(|name| !is_of_fetching(name));
    Some(())
}

struct Fetching<'a> {
    /// One or two; the first that has a segment whole gives it.
    repositories: Vec<Repository>,
    spool: Spool,
    ahead: Ahead,
    lineage: Lineage,
    on_the_way: JoinSet<(SegmentName, Outcome)>,
    /// On the way or fetched.
    known: BTreeSet<SegmentName>,
    /// The first segment that was not to be had when it was asked for.
    end: Option<SegmentName>,
    fetched: &'a AtomicU64,
}

/// What became of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Held,
    /// It is not there, is not complete, or could not be fetched.
    NotToBeHad,
}

impl Fetching<'_> {
    /// Follows what is asked for.
    async fn follow(&mut self, data_directory: &Path) {
        let mut wanted: Option<(SegmentName, FileFacts)> = None;
        let mut asked_at = Instant::now();
        loop {
            let now = self.wanted();
            if now != wanted {
                (wanted, asked_at, self.end) = (now, Instant::now(), None);
            }
            let Some((last, _)) = wanted else { return };
            let server_is_gone = matches!(server_state(data_directory), Ok(ServerState::NoPidFile));
            if asked_at.elapsed() > IDLE_MAX || server_is_gone {
                return;
            }
            self.fill(last);
            tokio::select! {
                Some(done) = self.on_the_way.join_next() => self.settle(done),
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    fn wanted(&self) -> Option<(SegmentName, FileFacts)> {
        let name = String::from_utf8(self.spool.note(WANTED)?).ok()?;
        // The same name again is another wish: the file is a new one.
        let facts = FileFacts::of(&File::open(self.spool.path(WANTED)).ok()?).ok()?;
        Some((SegmentName::parse(&name)?, facts))
    }

    /// Lets go what is not wanted any more, and begins to fetch what is.
    fn fill(&mut self, last: SegmentName) {
        let held: u64 = self.known.len() as u64 * self.lineage.segment_size.bytes();
        let free = free_bytes(self.spool.directory()).unwrap_or(0);
        let room = self.ahead.room_bytes.min((free.saturating_add(held)) / FREE_PARTS);
        let hold = to_hold(last, self.lineage.segment_size, room);
        let let_go: Vec<_> =
            self.known.iter().filter(|name| !hold.contains(name)).copied().collect();
        for segment in let_go {
            self.known.remove(&segment);
            for suffix in [FETCHED, ""] {
                self.spool.remove(&format!("{segment}{suffix}"));
            }
        }
        for segment in hold {
            let is_behind_the_end = self.end.is_some_and(|end| segment >= end);
            if self.on_the_way.len() >= IN_FLIGHT || is_behind_the_end {
                return;
            }
            if self.known.insert(segment) {
                self.begin(segment);
            }
        }
    }

    fn begin(&mut self, segment: SegmentName) {
        let (repositories, spool) = (self.repositories.clone(), self.spool.clone());
        let (place, lineage) = (self.ahead.place.clone(), self.lineage);
        self.on_the_way.spawn(async move {
            let coming = format!("{segment}{COMING}");
            let marked = spool.write_note(&coming, b"").is_ok();
            let mut held = false;
            for repository in repositories.iter().filter(|_| marked) {
                held = held || fetch(repository, &spool, &place, lineage, segment).await;
            }
            spool.remove(&coming);
            (segment, if held { Outcome::Held } else { Outcome::NotToBeHad })
        });
    }

    fn settle(&mut self, done: Result<(SegmentName, Outcome), tokio::task::JoinError>) {
        match done {
            Ok((segment, Outcome::Held)) => {
                self.fetched.fetch_add(1, Ordering::Relaxed);
                if !self.known.contains(&segment) {
                    // It was let go while it came.
                    self.spool.remove(&format!("{segment}{FETCHED}"));
                    self.spool.remove(&segment.to_string());
                }
            }
            Ok((segment, Outcome::NotToBeHad)) => {
                self.known.remove(&segment);
                self.end = Some(self.end.map_or(segment, |end| end.min(segment)));
            }
            Err(error) => tracing::info!("a segment was not fetched ahead: {error}"),
        }
    }
}

/// Fetches one segment into the spool; returns whether it is there, complete.
async fn fetch(
    repository: &Repository,
    spool: &Spool,
    place: &str,
    lineage: Lineage,
    segment: SegmentName,
) -> bool {
    let path = spool.path(&segment.to_string());
    let Ok(mut staged) = StagedFile::create(&path) else { return false };
    let sink = |block: &[u8]| staged.append(block).map_err(std::io::Error::other);
    let size = lineage.segment_size;
    match repository.fetch_segment(lineage.system_id, segment, size, sink).await {
        // Pieces and a `.partial` may be longer, or a whole segment, a moment later.
        Ok(Some(source)) if is_complete(source, size.bytes()) => {}
        Ok(_) => return false,
        Err(error) => {
            tracing::info!("`{segment}` was not fetched ahead: {error}");
            return false;
        }
    }
    if staged.publish(Durability::None, Existing::Replace).is_err() {
        return false;
    }
    let facts = File::open(&path).and_then(|file| FileFacts::of(&file));
    let (Ok(facts), Some(now)) = (facts, Moment::now()) else { return false };
    let note = Note::of_fetched(Circumstances { place, segment, now: &now }, facts);
    spool.write_note(&format!("{segment}{FETCHED}"), &note.to_bytes()).is_ok()
}

/// Returns whether what was fetched is all that there will ever be of a segment of so many bytes.
fn is_complete(source: SegmentSource, segment_bytes: u64) -> bool {
    match source {
        SegmentSource::Whole => true,
        SegmentSource::Pieces { valid_bytes } => valid_bytes == segment_bytes,
        SegmentSource::Partial { .. } => false,
    }
}
