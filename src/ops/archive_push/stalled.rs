//! Pushing where something was set for a store that is away.
//!
//! ```text
//! push -> stored                                        as ever; in one of two repositories, if that is enough
//!      -> the store is away -> push into the spool      the same push, into a little repository on this host
//!                           -> or keep trying           the default
//!                           -> or record the gap, durably, and let go
//! ```
//!
//! Into the spool goes nothing that was not checked as it would be for the store: it is the same push. Never here: the
//! decision (`plan::stall`), or how the spool is drained.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use super::{Report, Request, data_directory_of, run};
use crate::failure::{Failure, Kind};
use crate::format::{FORMAT_VERSION, WalGap};
use crate::ops::stall::{GapRecord, Stall};
use crate::ops::{TOOL, Which, control_of, now};
use crate::pg::{
    LONG_PAGE_HEADER_BYTES, Lsn, PageHeader, SegmentName, SegmentSize, SystemId, WalFileName,
};
use crate::pgdata::{Backlog, StallDirectory, waiting_wal};
use crate::plan::stall::{
    AWAY_SECONDS_MAX_TO_LET_GO, Fate, Room, Stalled, Waiting, decide, extended,
};

/// How long the store may take before a file goes into the spool: the server waits, and more WAL comes meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

/// What became of a file.
#[derive(Debug, Clone)]
pub enum Pushed {
    /// The store has it.
    Stored(Report),
    /// It is kept on this host only.
    Spooled {
        /// What was put into the spool.
        report: Report,
        /// What lies there now.
        held: Backlog,
    },
    /// It was let go.
    LetGo {
        /// Its name.
        name: WalFileName,
        /// The gap that it is part of; `None` for a file that no recovery needs.
        gap: Option<Box<WalGap>>,
    },
}

/// Stores a file, or does with it what was set for a store that is away.
///
/// # Errors
/// As [`run`]; the file is not acknowledged then.
pub async fn run_despite(
    repository: &crate::repo::Repository,
    request: &Request,
    stall: &Stall,
) -> Result<Pushed, Failure> {
    let name = request.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let (Ok(name), false) = (WalFileName::parse(name), request.accept_damaged) else {
        return run(repository, request).await.map(Pushed::Stored);
    };
    let mut spool = Room::Absent;
    if stall.is_away() {
        match into_spool(request, stall).await? {
            Ok(pushed) => return Ok(pushed),
            Err(room) => spool = room,
        }
        let is_fresh = stall.away_since().is_some_and(|age| age <= AWAY_SECONDS_MAX_TO_LET_GO);
        if is_fresh && judge(request, stall, name, spool) == Fate::LetGo {
            // Asked again for each file, the store would take longer to fail than the server to write the next.
            match let_go(request, stall, name) {
                Ok(pushed) => return Ok(pushed),
                Err(why) => not_let_go(name, &why),
            }
        }
    }
    let patience = if stall.spool.is_some() { PATIENCE } else { request.deadline };
    let attempt = Request { deadline: request.deadline.min(patience), ..request.clone() };
    let failure = match run(repository, &attempt).await {
        Ok(report) => {
            // One that is away now would only make the server wait.
            if !request.second.as_ref().is_some_and(|second| second.is_away(request, Which::First))
            {
                stall.keep_claims(repository).await;
            }
            return Ok(Pushed::Stored(report));
        }
        Err(failure) if failure.kind != Kind::Store => return Err(failure),
        Err(failure) => failure,
    };
    if let Ok(directory) = stall.open() {
        directory.note_away();
    }
    if spool == Room::Absent && stall.spool.is_some() {
        match into_spool(request, stall).await? {
            Ok(pushed) => {
                tracing::info!("the store is away: {failure}");
                return Ok(pushed);
            }
            Err(room) => spool = room,
        }
    }
    match judge(request, stall, name, spool) {
        Fate::LetGo => let_go(request, stall, name).map_err(|why| {
            not_let_go(name, &why);
            failure
        }),
        Fate::KeepTrying | Fate::Spool => Err(failure),
    }
}

fn not_let_go(name: WalFileName, why: &Failure) {
    tracing::error!("`{name}` is not let go, though too much WAL waits: {why}. {}", why.next);
}

/// Puts a file into the spool, checked and sealed as for the store. The inner error: it does not take it.
///
/// # Errors
/// What the store would refuse as well: another content under this name, a damaged segment, another cluster's file.
async fn into_spool(request: &Request, stall: &Stall) -> Result<Result<Pushed, Room>, Failure> {
    let Some(spool) = &stall.spool else { return Ok(Err(Room::Absent)) };
    let opened = stall.open().and_then(|directory| {
        let space = stall.space(&directory)?;
        Ok((directory, space))
    });
    let (directory, space) = match opened {
        Ok(opened) => opened,
        Err(failure) => {
            tracing::warn!("{failure}. {}", failure.next);
            return Ok(Err(Room::Full));
        }
    };
    let bytes = std::fs::metadata(&request.path).map_or(0, |metadata| metadata.len());
    if space.is_some_and(|space| space.room_for(bytes) != Room::Free) {
        tracing::warn!(
            "the stall spool `{}` takes no more: {} of {} MiB are held, and some of its disk must stay free",
            directory.path().display(),
            space.map_or(0, |space| space.held) >> 20,
            spool.max_bytes >> 20
        );
        return Ok(Err(Room::Full));
    }
    let local = Request { ahead: None, second: None, ..request.clone() };
    match run(&spool.repository, &local).await {
        Ok(report) => {
            let held = stall.held_in(&directory)?;
            Ok(Ok(Pushed::Spooled { report, held }))
        }
        Err(failure) if failure.kind == Kind::Store => {
            tracing::warn!("the stall spool cannot take `{}`: {failure}", request.path.display());
            Ok(Err(Room::Full))
        }
        Err(failure) => Err(failure),
    }
}

fn judge(request: &Request, stall: &Stall, name: WalFileName, spool: Room) -> Fate {
    // Only what the server itself asks for, of its own files, can be in its way.
    let is_servers = |wal: &&Path| request.path.parent() == Some(*wal) && is_ready(wal, name);
    let wal = stall.wal_directory.as_deref().filter(is_servers);
    let Some(wal) = wal else { return Fate::KeepTrying };
    let held = stall.find().ok().flatten().and_then(|directory| stall.held_in(&directory).ok());
    let waiting = waiting_wal(wal).inspect_err(|error| {
        tracing::warn!("how much WAL waits is not known, so that none is let go: {error}");
    });
    let Ok(waiting) = waiting else { return Fate::KeepTrying };
    let file = match name {
        WalFileName::History(_) => Waiting::TimelineHistory,
        WalFileName::Backup(..) => Waiting::BackupHistory,
        WalFileName::Segment(_) | WalFileName::Partial(_) => Waiting::Wal,
    };
    decide(Stalled {
        store_is_away: true,
        spool,
        backlog_bytes: waiting.bytes.saturating_add(held.unwrap_or_default().bytes),
        backlog_max_bytes: stall.backlog_max_bytes,
        file,
    })
}

fn is_ready(wal: &Path, name: WalFileName) -> bool {
    wal.join("archive_status").join(format!("{name}.ready")).exists()
}

/// Records that a file is let go, durably, and only then lets it go.
fn let_go(request: &Request, stall: &Stall, name: WalFileName) -> Result<Pushed, Failure> {
    let segment = match name {
        WalFileName::Segment(segment) | WalFileName::Partial(segment) => segment,
        WalFileName::Backup(..) | WalFileName::History(_) => {
            return Ok(Pushed::LetGo { name, gap: None });
        }
    };
    let (system_id, size) = owner_of(&request.path, segment)?;
    let start = segment.start_lsn(size).ok_or_else(|| unknown(&request.path))?;
    let end = Lsn(start.0.saturating_add(size.bytes()));
    let directory = stall.open()?;
    let gap = record(stall, &directory, system_id, segment, (start, end))?;
    Ok(Pushed::LetGo { name, gap: Some(Box::new(gap)) })
}

fn record(
    stall: &Stall,
    directory: &StallDirectory,
    system_id: SystemId,
    segment: SegmentName,
    (start, end): (Lsn, Lsn),
) -> Result<WalGap, Failure> {
    let _lock = stall.lock_records(directory)?;
    let records = stall.records(directory)?;
    // One that the repository has stays as it is: another one follows it.
    let open = records.into_iter().filter(|(_, one)| one.stored_in.is_empty());
    let mut open = open.filter(|(_, one)| one.gap.system_identifier == system_id);
    let grown = open.find_map(|(name, one)| {
        let gap = extended(&one.gap, segment.timeline, start, end)?;
        Some((name, GapRecord { gap, ..one }))
    });
    let (name, record) = grown.unwrap_or_else(|| {
        let maximum = stall.backlog_max_bytes.unwrap_or_default() >> 20;
        let gap = WalGap {
            format: FORMAT_VERSION,
            system_identifier: system_id,
            timeline: segment.timeline,
            start_lsn: start,
            end_lsn: end,
            let_go_at: now(),
            why: format!(
                "the store could not take it, and {maximum} MiB of WAL waited (`wal_backlog_max`)"
            ),
            host: stall.host.clone(),
            tool: TOOL.to_owned(),
        };
        let name = StallDirectory::gap_name(segment.timeline.0, start.0);
        (
            name,
            GapRecord {
                gap,
                stored_in: BTreeSet::new(),
                closed_in: BTreeSet::new(),
                last_try: None,
            },
        )
    });
    stall.write_record(directory, &name, &record)?;
    Ok(record.gap)
}

/// Returns whose segment it is and how large segments are, as file, name and data directory agree.
fn owner_of(path: &Path, segment: SegmentName) -> Result<(SystemId, SegmentSize), Failure> {
    let control = control_of(&data_directory_of(path)).ok_or_else(|| unknown(path))?;
    let mut head = Vec::with_capacity(LONG_PAGE_HEADER_BYTES);
    let read = File::open(path)
        .and_then(|file| file.take(LONG_PAGE_HEADER_BYTES as u64).read_to_end(&mut head));
    read.map_err(|error| unknown(path).because(error))?;
    let page = PageHeader::parse(&head).map_err(|error| unknown(path).because(error))?;
    let is_ours = page.cluster.is_some_and(|cluster| cluster.system_id == control.system_id);
    let size = control.wal_segment_size;
    if is_ours && segment.start_lsn(size) == Some(page.address) {
        return Ok((control.system_id, size));
    }
    Err(unknown(path))
}

fn unknown(path: &Path) -> Failure {
    Failure::new(
        Kind::Integrity,
        format!("whose WAL `{}` is cannot be told", path.display()),
        super::UNHARMED,
        "Look at the file and at global/pg_control; `pg_waldump` and `pg_controldata` show them.",
    )
}
