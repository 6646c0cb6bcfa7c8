//! `spool`: what lies on this host while the store is away goes into it, oldest first, and gaps are closed.
//!
//! ```text
//! each object    read, digest checked -> create if absent -> confirmed -> removed here
//!                                        other content    -> put aside, kept, and said
//! each gap       its record is stored -> a backup behind it? -> the record is removed here
//!                                        none: a backup is taken now
//! ```
//!
//! With two repositories all of this is done in both at once, and `takers` says when one is enough.
//!
//! One process at a time, by a lock that the kernel gives back. Killed anywhere it leaves what was not confirmed, and the
//! next one finds what was. Never here: what is put into the spool (`archive_push`), or how a backup is taken.

mod closing;
mod keeping;
mod takers;

use std::collections::BTreeSet;
use std::path::PathBuf;

use futures_util::TryStreamExt;
use serde::Serialize;

pub use self::closing::OwnProgram;
pub use self::keeping::{Keeping, keep_drained};
pub use self::takers::Destinations;
use self::takers::Takers;
use super::claimed_identity;
use super::failures::{of_disk, of_repo};
use super::stall::{SPOOL_STALL_MAX, Stall};
use crate::failure::{Failure, Kind};
use crate::format::{WalObject, parse_wal_object};
use crate::pg::{ArchiveOrder, SystemId, WalFileName};
use crate::pgdata::StallDirectory;
use crate::repo::{RepoError, Repository};
use crate::store::Key;
use crate::store::file::FileStore;
use crate::store::open::LEFTOVER_AGE_MIN;

const UNHARMED: &str =
    "What was not confirmed by the store lies in the spool as before; nothing of it was removed.";

/// What a drain did. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Drained {
    /// Objects that the store has confirmed, and that are removed here.
    pub stored: u64,
    /// Their bytes, as stored.
    pub stored_bytes: u64,
    /// Objects that were put aside in this run: where each lies now, and why.
    pub refused: Vec<RefusedObject>,
    /// Gaps of which the repository has got the record in this run.
    pub gaps_recorded: u64,
    /// Gaps that a backup has made unneeded.
    pub gaps_closed: u64,
    /// Gaps that are still open, and why.
    pub gaps_open: Vec<String>,
    /// Whether another process drains the spool, so that nothing was done here.
    pub is_drained_by_another: bool,
}

/// An object that the store did not take, or that is damaged here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RefusedObject {
    /// Its name.
    pub name: String,
    /// Where it is kept.
    pub kept_at: PathBuf,
    /// Whether the repository holds another content under its name; else it is damaged here.
    pub is_conflict: bool,
    /// Why.
    pub why: String,
}

/// Drains the spool and closes gaps, once.
///
/// # Errors
/// [`Kind::Store`] if the store is away: then it is worth trying again. What was done by then is done.
pub async fn drain(
    into: &Destinations,
    stall: &Stall,
    program: Option<&OwnProgram>,
) -> Result<Drained, Failure> {
    let mut drained = Drained::default();
    let Some(directory) = stall.find()? else { return Ok(drained) };
    let lock = directory.lock().map_err(|error| {
        of_disk(error, format!("could not use `{}`", directory.path().display()), UNHARMED)
    })?;
    let Some(_lock) = lock else {
        drained.is_drained_by_another = true;
        return Ok(drained);
    };
    let directory = &directory;
    Draining::new(into, stall, directory, &mut drained).once(program).await?;
    Ok(drained)
}

/// One run over the spool, for who has the lock.
struct Draining<'a> {
    takers: Takers<'a>,
    stall: &'a Stall,
    directory: &'a StallDirectory,
    drained: &'a mut Drained,
}

/// An object of the spool.
struct Waiting {
    system_id: SystemId,
    order: (ArchiveOrder, WalObject),
    key: Key,
    object: WalObject,
    bytes: u64,
}

impl<'a> Draining<'a> {
    fn new(
        into: &'a Destinations,
        stall: &'a Stall,
        directory: &'a StallDirectory,
        drained: &'a mut Drained,
    ) -> Self {
        Self { takers: Takers::new(into), stall, directory, drained }
    }

    /// Empties the spool, then closes gaps. Returns whether all is done that could be: `false` where one of two
    /// repositories is away, or a gap is open still.
    async fn once(&mut self, program: Option<&OwnProgram>) -> Result<bool, Failure> {
        let outcome = match self.empty().await {
            Ok(()) => self.close_gaps(program).await,
            Err(failure) => Err(failure),
        };
        match &outcome {
            Err(failure) if failure.kind == Kind::Store => self.directory.note_away(),
            _ => self.directory.note_back(),
        }
        outcome?;
        Ok(self.takers.away().is_none() && self.drained.gaps_open.is_empty())
    }

    async fn empty(&mut self) -> Result<(), Failure> {
        let Some(spool) = &self.stall.spool else { return Ok(()) };
        if self.stall.held_in(self.directory)?.files == 0 {
            return Ok(());
        }
        let root = StallDirectory::store_root(self.directory.path());
        // What killed writers left takes room of the spool.
        let files = FileStore::new(root, SPOOL_STALL_MAX);
        if let Err(error) = files.sweep_leftovers(LEFTOVER_AGE_MIN).await {
            tracing::debug!("leftovers in the spool were not looked for: {error}");
        }
        let mut waiting = waiting(&spool.repository).await.map_err(|e| self.not_read(e))?;
        waiting.sort_by_key(|one| one.order);
        // The place may be another cluster's by now.
        let owners: BTreeSet<SystemId> = waiting.iter().map(|one| one.system_id).collect();
        for owner in owners {
            let claim = async |_, repository: &Repository| {
                claimed_identity(repository, owner, UNHARMED).await.map(drop)
            };
            let claimed = self.takers.each(claim).await?;
            self.takers.require(&claimed)?;
        }
        let mut at = 0;
        while at < waiting.len() {
            // All pieces of a large segment go at once: until then it is found here whole.
            let end = waiting[at..].iter().position(|one| !is_same(one, &waiting[at]));
            let end = end.map_or(waiting.len(), |end| at + end);
            self.bring(&spool.repository, &waiting[at..end]).await?;
            at = end;
        }
        Ok(())
    }

    async fn bring(&mut self, spool: &Repository, all: &[Waiting]) -> Result<(), Failure> {
        for one in all {
            let object = match spool.fetch_object(&one.key).await {
                Ok(object) => object,
                // Brought by another one, who had the lock before us.
                Err(error) if error.is_absent() => continue,
                Err(error @ (RepoError::Damaged { .. } | RepoError::NotReadable { .. })) => {
                    return self.put_aside(all, false, &error);
                }
                Err(error) => return Err(self.not_read(error)),
            };
            let put = async |_, repository: &Repository| match repository
                .put_complete(one.object, object.clone())
                .await
            {
                Ok(_) => Ok(None),
                Err(error @ RepoError::Conflict { .. }) => Ok(Some(error)),
                Err(error) => Err(not_stored(repository, &one.key, error)),
            };
            let stored = self.takers.each(put).await?;
            if let Some(conflict) = stored.iter().find_map(|(_, conflict)| conflict.as_ref()) {
                return self.put_aside(all, true, conflict);
            }
            self.takers.require(&stored)?;
        }
        for one in all {
            spool.delete(&one.key).await.map_err(|error| self.not_read(error))?;
            self.drained.stored += 1;
            self.drained.stored_bytes += one.bytes;
        }
        self.say_brought(all[0].key.file_name());
        Ok(())
    }

    fn say_brought(&self, name: &str) {
        match self.takers.away() {
            Some((which, why)) => tracing::warn!(
                "`{name}` was brought from the spool into the {} repository only: {why}; `highwater copy --wal` brings it there",
                which.other().word()
            ),
            None => tracing::info!("`{name}` was brought from the spool into the repository"),
        }
    }

    /// Puts aside what cannot be stored: it is the only copy of what it holds.
    fn put_aside(
        &mut self,
        all: &[Waiting],
        is_conflict: bool,
        why: &RepoError,
    ) -> Result<(), Failure> {
        for one in all {
            let kept_at = self.directory.refuse(one.key.as_str()).map_err(|error| {
                of_disk(error, format!("could not put `{}` aside", one.key), UNHARMED)
            })?;
            tracing::error!(
                "`{}` was acknowledged to PostgreSQL and is NOT in the repository: {why}. It is kept at `{}`",
                one.key.file_name(),
                kept_at.display()
            );
            let (name, why) = (one.key.file_name().to_owned(), why.to_string());
            self.drained.refused.push(RefusedObject { name, kept_at, is_conflict, why });
        }
        Ok(())
    }

    fn not_read(&self, error: RepoError) -> Failure {
        let what = format!("could not use the spool `{}`", self.directory.path().display());
        let failure = of_repo(error, what, UNHARMED);
        // It is a disk of this host, whatever it is called below.
        let kind = if failure.kind == Kind::Store { Kind::Disk } else { failure.kind };
        Failure { kind, ..failure }
    }
}

fn not_stored(repository: &Repository, key: &Key, error: RepoError) -> Failure {
    let what = format!(
        "could not bring `{}` from the spool into {}",
        key.file_name(),
        repository.describe()
    );
    of_repo(error, what, UNHARMED)
}

fn is_same(one: &Waiting, other: &Waiting) -> bool {
    let segment = |waiting: &Waiting| match waiting.object {
        WalObject::Piece { segment, .. } => Some(segment),
        _ => None,
    };
    one.key == other.key || (segment(one).is_some() && segment(one) == segment(other))
}

/// Lists the WAL of all incarnations.
async fn waiting(spool: &Repository) -> Result<Vec<Waiting>, RepoError> {
    let root = format!("{}/wal", spool.cluster());
    let level = spool.store().list_level(&Key::new(root)).await?;
    let mut found = Vec::new();
    for system_id in level.directories.iter().filter_map(|name| name.parse::<SystemId>().ok()) {
        let root = spool.place().wal_dir(system_id);
        let listed: Vec<_> = spool.store().list(&Key::new(root.clone())).try_collect().await?;
        found.extend(listed.into_iter().filter_map(|listed| {
            let tail = listed.key.as_str().strip_prefix(&root)?.strip_prefix('/')?;
            let object = parse_wal_object(tail)?;
            let order = (archive_order(object), object);
            Some(Waiting { system_id, order, object, bytes: listed.size_bytes, key: listed.key })
        }));
    }
    Ok(found)
}

/// Returns the order in which PostgreSQL archives: history files first, then by position.
fn archive_order(object: WalObject) -> ArchiveOrder {
    match object {
        WalObject::File(name) => name.archive_order(),
        WalObject::Piece { segment, .. } | WalObject::Damaged(segment) => {
            WalFileName::Segment(segment).archive_order()
        }
    }
}
