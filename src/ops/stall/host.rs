//! What is true of this host alone, and no repository can tell.
//!
//! Right for a server that writes nothing: then nothing waits, however long ago the last segment was archived.

use std::path::Path;
use std::time::SystemTime;

use serde::Serialize;

use super::{GapRecord, Stall};
use crate::failure::Failure;
use crate::ops::Which;
use crate::pg::{Lsn, PgTimestamp, Timeline};
use crate::pgdata::{Backlog, StallDirectory, share_a_disk, waiting_wal};

/// Everything of it. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct HostState {
    /// What the server wants archived; absent where no data directory is known here.
    pub waiting: Option<WaitingWal>,
    /// The spool; absent where none is set.
    pub spool: Option<SpoolState>,
    /// WAL that was let go here and is not closed by a backup yet.
    pub open_gaps: Vec<HostGap>,
    /// Whether the store was found away within the last minute and a half.
    pub store_is_away: bool,
}

/// WAL that PostgreSQL wants archived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct WaitingWal {
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// For how long the oldest of them has waited, in seconds; absent when none waits.
    pub oldest_seconds: Option<u64>,
}

/// The spool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SpoolState {
    /// Where it is.
    pub directory: String,
    /// Objects that are on this host only.
    pub files: u64,
    /// Their bytes, as stored.
    pub bytes: u64,
    /// The most that it may hold.
    pub max_bytes: u64,
    /// Since when the oldest of them lies there.
    pub since: Option<PgTimestamp>,
    /// Files of WAL that the repository would not take, because it holds something else under their names or they are
    /// damaged; they are kept in `refused`.
    pub refused: Vec<String>,
    /// Whether a process drains it now.
    pub is_being_drained: bool,
    /// Whether it lies on the file system of the WAL itself, and would fill it.
    pub shares_disk_with_wal: bool,
}

/// A gap that this host has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostGap {
    /// Its timeline.
    pub timeline: Timeline,
    /// The first byte that was let go (included).
    pub start_lsn: Lsn,
    /// Where WAL goes on (excluded).
    pub end_lsn: Lsn,
    /// When that began.
    pub let_go_at: PgTimestamp,
    /// Whether a repository has the record.
    pub stored: bool,
    /// Which of two repositories has a backup behind it already, while the other lacks one; absent for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub closed_in: Option<Which>,
    /// What became of the last backup that was to close it.
    pub last_backup: Option<String>,
}

impl HostState {
    /// Looks at a directory of WAL where nothing is set for a store that is away.
    pub fn of_wal(wal: &Path) -> Self {
        Self { waiting: waiting_at(wal), ..Self::default() }
    }

    /// Returns whether there is nothing to tell.
    pub fn is_calm(&self) -> bool {
        let holds = |spool: &SpoolState| spool.files > 0 || !spool.refused.is_empty();
        !self.store_is_away && self.open_gaps.is_empty() && !self.spool.as_ref().is_some_and(holds)
    }
}

impl Stall {
    /// Looks at this host. Changes nothing.
    ///
    /// # Errors
    /// What lies here cannot be read, or is another repository's.
    pub fn host_state(&self) -> Result<HostState, Failure> {
        let wal = self.wal_directory.as_deref();
        let mut state = HostState { waiting: wal.and_then(waiting_at), ..HostState::default() };
        let directory = self.find()?;
        if let Some(spool) = &self.spool {
            let held = match &directory {
                Some(directory) => self.held_in(directory)?,
                None => Backlog::default(),
            };
            let nearest = self.directory.ancestors().find(|path| path.exists());
            let beside = wal.zip(nearest).is_some_and(|(wal, spool)| share_a_disk(wal, spool));
            state.spool = Some(SpoolState {
                directory: self.directory.display().to_string(),
                files: held.files,
                bytes: held.bytes,
                max_bytes: spool.max_bytes,
                since: held.oldest.and_then(moment),
                refused: directory.as_ref().map(StallDirectory::refused_names).unwrap_or_default(),
                is_being_drained: self.is_being_drained(),
                shares_disk_with_wal: beside,
            });
        }
        if let Some(directory) = &directory {
            let records = self.records(directory)?;
            state.open_gaps = records.into_iter().map(|(_, record)| gap(record)).collect();
        }
        state.store_is_away = self.is_away();
        Ok(state)
    }
}

fn waiting_at(wal: &Path) -> Option<WaitingWal> {
    let waiting = waiting_wal(wal);
    waiting.inspect_err(|error| tracing::debug!("what waits is not known: {error}")).ok().map(told)
}

fn told(waiting: Backlog) -> WaitingWal {
    let age = |since: SystemTime| SystemTime::now().duration_since(since).unwrap_or_default();
    let oldest_seconds = waiting.oldest.map(|since| age(since).as_secs());
    WaitingWal { files: waiting.files, bytes: waiting.bytes, oldest_seconds }
}

fn moment(time: SystemTime) -> Option<PgTimestamp> {
    jiff::Timestamp::try_from(time).ok().map(PgTimestamp::from)
}

fn gap(record: GapRecord) -> HostGap {
    let GapRecord { gap, stored_in, closed_in, last_try } = record;
    HostGap {
        timeline: gap.timeline,
        start_lsn: gap.start_lsn,
        end_lsn: gap.end_lsn,
        let_go_at: gap.let_go_at,
        stored: !stored_in.is_empty(),
        closed_in: closed_in.first().copied(),
        last_backup: last_try.map(|last| format!("{}: {}", last.at, last.outcome)),
    }
}
