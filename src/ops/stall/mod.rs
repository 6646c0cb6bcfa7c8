//! What was set for a store that is away, and what such times have left on this host.
//!
//! Shared by `archive-push`, which fills it, `spool`, which drains it, `archive-get`, which reads it, and those who tell
//! of it. Never here: when WAL is put there or let go (`plan::stall`), or how it is drained (`spool`).

mod host;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::host::{HostGap, HostState, SpoolState, WaitingWal};
use super::Which;
use super::failures::{of_disk, of_repo};
use crate::failure::{Failure, Kind};
use crate::format::WalGap;
use crate::pg::PgTimestamp;
use crate::pgdata::{Backlog, Moment, SpoolError, SpoolLock, StallDirectory, disk_room};
use crate::plan::stall::{AWAY_SECONDS_MAX, SpoolSpace};
use crate::repo::Repository;
use crate::store::file::FileStore;

/// How often the copy of identities and keys is renewed, in seconds.
const CLAIMS_SECONDS_MAX: u64 = 3_600;

/// The note that says when that was done.
const CLAIMS: &str = "claims";

/// How long the spool's disk may take for anything.
pub const SPOOL_STALL_MAX: Duration = Duration::from_secs(30);

/// How often and at what pauses the right to change records is asked for: five seconds in all.
const RECORDS_LOCK_ATTEMPTS: u32 = 500;
const RECORDS_LOCK_PAUSE: Duration = Duration::from_millis(10);

const UNHARMED: &str =
    "What lies in the spool stays there, and the server keeps what was not acknowledged.";

/// What is set.
#[derive(Debug, Clone)]
pub struct Stall {
    /// Where its state is kept, and the spool.
    pub directory: PathBuf,
    /// The spool, where one is set.
    pub spool: Option<StallSpool>,
    /// From how many waiting bytes on WAL is let go; `None`: never.
    pub backlog_max_bytes: Option<u64>,
    /// The repository that it stands in for, the first of two, as a URL without secrets: its keys seal what lies here.
    pub stands_in_for: String,
    /// The directory of WAL, as its server names it to its commands, or as far as it is known.
    pub wal_directory: Option<PathBuf>,
    /// The name of this host, for the record.
    pub host: String,
}

/// The spool: a little repository of the same layout, in which objects stand as they will be stored.
#[derive(Debug, Clone)]
pub struct StallSpool {
    /// It, sealed and encrypted as the other.
    pub repository: Repository,
    /// The most that may lie in it, in bytes.
    pub max_bytes: u64,
}

/// A gap as it is recorded on the host that let it go, until a backup has closed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapRecord {
    /// What was let go.
    pub gap: WalGap,
    /// Which repositories have the record.
    #[serde(default)]
    pub stored_in: BTreeSet<Which>,
    /// Which have a backup behind it.
    #[serde(default)]
    pub closed_in: BTreeSet<Which>,
    /// What became of the last backup that was to close it.
    #[serde(default)]
    pub last_try: Option<BackupTry>,
}

/// An attempt to close a gap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupTry {
    /// When it ended.
    pub at: PgTimestamp,
    /// How, in words.
    pub outcome: String,
}

impl Stall {
    /// Opens the directory, and makes it where that is ours to do.
    ///
    /// # Errors
    /// [`Kind::Disk`] if it cannot be used, [`Kind::Usage`] if what lies in it is another repository's.
    pub(super) fn open(&self) -> Result<StallDirectory, Failure> {
        let directory = StallDirectory::open(&self.directory).map_err(|e| self.unusable(e))?;
        match directory.repository() {
            Some(url) if url == self.stands_in_for => {}
            Some(url) if self.holds_anything(&directory)? => return Err(self.is_of_another(&url)),
            _ => directory
                .set_repository(&self.stands_in_for)
                .map_err(|error| of_disk(error, self.what(), UNHARMED))?,
        }
        Ok(directory)
    }

    /// Opens the directory if it is there.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(super) fn find(&self) -> Result<Option<StallDirectory>, Failure> {
        let found = StallDirectory::find(&self.directory).map_err(|e| self.unusable(e))?;
        let Some(directory) = found else { return Ok(None) };
        match directory.repository() {
            Some(url) if url != self.stands_in_for && self.holds_anything(&directory)? => {
                Err(self.is_of_another(&url))
            }
            _ => Ok(Some(directory)),
        }
    }

    fn what(&self) -> String {
        format!(
            "could not use `{}`, where WAL is kept while the store is away",
            self.directory.display()
        )
    }

    fn unusable(&self, error: SpoolError) -> Failure {
        match error {
            SpoolError::Disk(error) => of_disk(error, self.what(), UNHARMED),
            other @ SpoolError::NotPrivate(_) => {
                let next = "Run this as the user who runs PostgreSQL. The directory must be his alone (mode 0700).";
                Failure::new(Kind::Disk, self.what(), UNHARMED, next).because(other)
            }
        }
    }

    fn is_of_another(&self, url: &str) -> Failure {
        Failure::new(
            Kind::Usage,
            format!(
                "`{}` holds what is meant for the repository {url}, and {} is set",
                self.directory.display(),
                self.stands_in_for
            ),
            UNHARMED,
            "Run `highwater spool --drain` with the settings of that repository, or name another `stall_spool`.",
        )
    }

    fn holds_anything(&self, directory: &StallDirectory) -> Result<bool, Failure> {
        Ok(self.held_in(directory)?.files > 0 || !self.records(directory)?.is_empty())
    }

    /// Returns the WAL that lies in the spool.
    pub(super) fn held_in(&self, directory: &StallDirectory) -> Result<Backlog, Failure> {
        let Some(spool) = &self.spool else { return Ok(Backlog::default()) };
        let held = directory.held(spool.repository.cluster().as_str());
        held.map_err(|error| of_disk(error, self.what(), UNHARMED))
    }

    /// Returns what the spool holds and may hold; `None` without one.
    pub(super) fn space(&self, directory: &StallDirectory) -> Result<Option<SpoolSpace>, Failure> {
        let Some(spool) = &self.spool else { return Ok(None) };
        let failed = |error| of_disk(error, self.what(), UNHARMED);
        let held = directory.bytes().map_err(failed)?;
        let (free, total) = disk_room(directory.path()).map_err(failed)?;
        Ok(Some(SpoolSpace { held, max: spool.max_bytes, free, total }))
    }

    /// Reads what was let go here and is not closed yet, oldest first, with the names of the records.
    ///
    /// # Errors
    /// [`Kind::Disk`] and [`Kind::Integrity`]: then it is not known what was let go.
    pub(super) fn records(
        &self,
        directory: &StallDirectory,
    ) -> Result<Vec<(String, GapRecord)>, Failure> {
        let records = directory.gap_records();
        let records = records.map_err(|error| of_disk(error, self.what(), UNHARMED))?;
        let read = |(name, bytes): (String, Vec<u8>)| match serde_json::from_slice(&bytes) {
            Ok(record) => Ok((name, record)),
            Err(error) => Err(Failure::new(
                Kind::Integrity,
                format!(
                    "`{}` cannot be read, and records WAL that was let go",
                    directory.path().join(&name).display()
                ),
                UNHARMED,
                "Keep a copy of the file, take a backup now, and then move the file away.",
            )
            .because(error)),
        };
        records.into_iter().map(read).collect()
    }

    /// Takes the right to change records of gaps: two who read, change and write could lose what one of them wrote.
    ///
    /// # Errors
    /// Another process holds it for longer than a change takes, or the disk refuses.
    pub(super) fn lock_records(&self, directory: &StallDirectory) -> Result<SpoolLock, Failure> {
        for _ in 0..RECORDS_LOCK_ATTEMPTS {
            let lock = directory.lock_records();
            match lock.map_err(|error| of_disk(error, self.what(), UNHARMED))? {
                Some(lock) => return Ok(lock),
                None => std::thread::sleep(RECORDS_LOCK_PAUSE),
            }
        }
        let next = "Look for a process of highwater that hangs on that disk.";
        Err(Failure::new(Kind::Disk, self.what(), UNHARMED, next))
    }

    /// Writes a record, durably.
    pub(super) fn write_record(
        &self,
        directory: &StallDirectory,
        name: &str,
        record: &GapRecord,
    ) -> Result<(), Failure> {
        let bytes = serde_json::to_vec_pretty(record).unwrap_or_default();
        let written = directory.write(name, &bytes);
        written.map_err(|error| of_disk(error, self.what(), UNHARMED))
    }

    /// Returns whether anything on this host waits for the store: WAL in the spool, or a gap to be closed; as far as that
    /// can be looked at.
    pub fn is_pending(&self) -> bool {
        let found = self.find().ok().flatten();
        found.is_some_and(|directory| self.holds_anything(&directory).unwrap_or(true))
    }

    /// Returns whether a process drains it now.
    pub fn is_being_drained(&self) -> bool {
        let directory = StallDirectory::find(&self.directory).ok().flatten();
        directory.is_some_and(|directory| matches!(directory.lock(), Ok(None)))
    }

    /// Returns whether the store was found away so lately that it need not be asked.
    pub fn is_away(&self) -> bool {
        self.away_since().is_some_and(|seconds| seconds <= AWAY_SECONDS_MAX)
    }

    /// Returns how many seconds ago the store was found away.
    pub(super) fn away_since(&self) -> Option<u64> {
        StallDirectory::find(&self.directory).ok().flatten()?.away_since()
    }

    /// Renews the copy of identities and keys without which nothing could be checked or sealed while the store is away.
    /// Done now and then, while it is there. That it fails is told, and no failure: the spool is not needed now.
    pub async fn keep_claims(&self, repository: &Repository) {
        let Some(spool) = &self.spool else { return };
        let Ok(directory) = self.open().inspect_err(|failure| {
            tracing::warn!(
                "{failure}. While the store is away nothing will be kept there. {}",
                failure.next
            );
        }) else {
            return;
        };
        let now = Moment::now();
        if let (Some(now), Some(noted)) = (&now, directory.note(CLAIMS)) {
            let noted: Option<Moment> = serde_json::from_slice(&noted).ok();
            let is_fresh = |noted: &Moment| {
                let age = now.seconds.checked_sub(noted.seconds);
                noted.boot == now.boot && age.is_some_and(|age| age < CLAIMS_SECONDS_MAX)
            };
            if noted.as_ref().is_some_and(is_fresh) {
                return;
            }
        }
        let root = StallDirectory::store_root(directory.path());
        let prepared = FileStore::new(root, SPOOL_STALL_MAX).prepare().await;
        let taken = match prepared {
            Ok(()) => spool.repository.take_claims_of(repository).await,
            Err(error) => Err(error.into()),
        };
        match taken {
            Ok(()) => {
                if let Some(text) = now.and_then(|now| serde_json::to_vec(&now).ok()) {
                    directory.set_note(CLAIMS, &text);
                }
            }
            Err(error) => {
                let failure = of_repo(error, self.what(), UNHARMED);
                tracing::warn!("{failure}. While the store is away nothing may be kept there");
            }
        }
    }
}
