//! What the repository holds, gathered for decisions about what to keep.
//!
//! Shared by `expire`, which acts on it, `info`, which tells it, and `verify`, which proves it. Never here: the decision (`plan::retention`).
//!
//! Memory grows with backups (a few hundred bytes each; which packs they reference is dropped at once), with pins and
//! with holes in WAL, not with objects.

use std::collections::BTreeMap;
use std::time::SystemTime;

use futures_util::{StreamExt, TryStreamExt};

use super::wal_times::histories_of;
use crate::format::{BackupId, Committed, Identity};
use crate::pg::{PgTimestamp, SegmentSize, SystemId, Timeline};
use crate::plan::retention::{BegunState, Incarnation, Pinned, Stock, Unfinished, Unreadable};
use crate::repo::{BackupState, RepoError, Repository, StoredPin, UnreadableBackup, WalInventory};

/// How many backups are looked at at a time.
const IN_FLIGHT: usize = 8;

/// Everything that was gathered.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    /// What decisions need.
    pub(super) stock: Stock,
    /// The WAL of each incarnation.
    pub(super) inventories: BTreeMap<SystemId, WalInventory>,
    /// Backups of which a document cannot be read, oldest first: `committed.json`, or `begun.json` of one without.
    pub(super) unreadable: Vec<UnreadableBackup>,
    /// Pins, by backup.
    pub(super) pins: BTreeMap<BackupId, Vec<StoredPin>>,
    /// When any WAL was stored last, by the store's clock.
    pub(super) last_wal_stored: Option<SystemTime>,
}

/// Gathers what the place of a cluster holds; `identities` are those that ever claimed it, oldest first.
///
/// # Errors
/// The store's, and a damaged history file's: then nothing can be decided.
pub(super) async fn take_stock(
    repository: &Repository,
    identities: &[Identity],
) -> Result<Gathered, RepoError> {
    let (gathered, damaged) = take_stock_despite(repository, identities).await?;
    match damaged.into_iter().next() {
        Some((_, _, error)) => Err(error),
        None => Ok(gathered),
    }
}

/// A history file that cannot be used: whose, of which timeline, and why.
pub(super) type DamagedHistory = (SystemId, Timeline, RepoError);

/// Does the same where history files are damaged: they are told instead.
///
/// # Errors
/// The store's only.
pub(super) async fn take_stock_despite(
    repository: &Repository,
    identities: &[Identity],
) -> Result<(Gathered, Vec<DamagedHistory>), RepoError> {
    let mut gathered = Gathered::default();
    let mut damaged = Vec::new();
    let mut backups = gathered.take_backups(repository).await?;
    // After the backups: a pin is always made after its backup began.
    gathered.pins = repository.pins().await?;
    gathered.stock.pins =
        gathered.pins.iter().map(|(id, pins)| (id.clone(), effective(pins))).collect();
    for (system_id, segment_size) in incarnations(identities, &backups) {
        let inventory = repository.wal_inventory(system_id, segment_size).await?;
        let mut histories = BTreeMap::new();
        for timeline in &inventory.histories {
            match histories_of(repository, system_id, [*timeline]).await {
                Ok(one) => histories.extend(one),
                Err(error) if error.is_damage() => {
                    damaged.push((system_id, *timeline, error));
                }
                Err(error) => return Err(error),
            }
        }
        let last_stored = inventory.timelines.iter().filter_map(|(timeline, wal)| {
            gathered.last_wal_stored = gathered.last_wal_stored.max(wal.last_stored);
            Some((*timeline, moment_of(wal.last_stored?)))
        });
        gathered.stock.incarnations.push(Incarnation {
            system_id,
            segment_size,
            backups: backups.remove(&system_id).unwrap_or_default(),
            coverage: inventory.coverage(),
            last_stored: last_stored.collect(),
            histories,
        });
        gathered.inventories.insert(system_id, inventory);
    }
    Ok((gathered, damaged))
}

/// Returns who lived in the place, oldest first; those that only backups tell of come before all others.
fn incarnations(
    identities: &[Identity],
    backups: &BTreeMap<SystemId, Vec<Committed>>,
) -> Vec<(SystemId, SegmentSize)> {
    let is_known = |id: &SystemId| identities.iter().any(|known| known.system_identifier == *id);
    let unclaimed = backups.iter().filter(|(id, _)| !is_known(id));
    let unclaimed = unclaimed.filter_map(|(id, all)| Some((*id, all.last()?.segment_size)));
    let claimed = identities.iter().map(|known| (known.system_identifier, known.segment_size));
    unclaimed.chain(claimed).collect()
}

impl Gathered {
    async fn take_backups(
        &mut self,
        repository: &Repository,
    ) -> Result<BTreeMap<SystemId, Vec<Committed>>, RepoError> {
        let mut reading = futures_util::stream::iter(repository.backup_ids().await?)
            .map(|id| look_at(repository, id))
            .buffered(IN_FLIGHT);
        let mut backups: BTreeMap<SystemId, Vec<Committed>> = BTreeMap::new();
        while let Some(found) = reading.try_next().await? {
            match found {
                Found::Committed(backup) => {
                    backups.entry(backup.system_identifier).or_default().push(*backup);
                }
                Found::Unfinished(unfinished, unreadable) => {
                    self.stock.unfinished.push(unfinished);
                    self.unreadable.extend(unreadable);
                }
                Found::Unreadable(judged, told) => {
                    self.stock.unreadable.push(judged);
                    self.unreadable.push(told);
                }
            }
        }
        Ok(backups)
    }
}

enum Found {
    Committed(Box<Committed>),
    Unfinished(Unfinished, Option<UnreadableBackup>),
    Unreadable(Unreadable, UnreadableBackup),
}

async fn look_at(repository: &Repository, id: BackupId) -> Result<Found, RepoError> {
    match repository.backup_state(&id).await? {
        BackupState::Committed(mut backup) => {
            for reference in &mut backup.references {
                reference.packs = Vec::new();
            }
            Ok(Found::Committed(Box::new(backup)))
        }
        BackupState::Unfinished(unfinished) => {
            let begun = unfinished.begun.map_or(BegunState::Absent, BegunState::Readable);
            Ok(Found::Unfinished(unfinished_of(repository, id, begun).await?, None))
        }
        BackupState::Unreadable(told) => {
            if repository.has_committed(&id).await? {
                let begun = begun_state(repository, &id).await?;
                let leans_on = match begun {
                    BegunState::Readable(begun) => {
                        Some(begun.leans_on.into_iter().chain(begun.parent).collect())
                    }
                    BegunState::Unreadable | BegunState::Absent => None,
                };
                Ok(Found::Unreadable(Unreadable { id, leans_on }, told))
            } else {
                let unfinished = unfinished_of(repository, id, BegunState::Unreadable).await?;
                Ok(Found::Unfinished(unfinished, Some(told)))
            }
        }
    }
}

async fn unfinished_of(
    repository: &Repository,
    id: BackupId,
    begun: BegunState,
) -> Result<Unfinished, RepoError> {
    let last_stored = match begun {
        BegunState::Absent => None,
        _ => repository.last_stored_of(&id).await?.map(moment_of),
    };
    Ok(Unfinished { id, begun, last_stored })
}

/// Reads how a backup began, as far as that can be known.
pub(super) async fn begun_state(
    repository: &Repository,
    id: &BackupId,
) -> Result<BegunState, RepoError> {
    match repository.begun(id).await {
        Ok(Some(begun)) => Ok(BegunState::Readable(begun)),
        Ok(None) => Ok(BegunState::Absent),
        Err(error) if error.is_damage() => Ok(BegunState::Unreadable),
        Err(error) => Err(error),
    }
}

/// Returns how long the pins of one backup keep it. One that cannot be read keeps it for ever.
fn effective(pins: &[StoredPin]) -> Pinned {
    let until = pins.iter().map(|stored| match &stored.pin {
        Ok(pin) => pin.until.map_or(Pinned::ForEver, Pinned::Until),
        Err(_) => Pinned::ForEver,
    });
    until.reduce(Pinned::and).unwrap_or(Pinned::Until(PgTimestamp(i64::MIN)))
}

/// Returns a time of the store's clock; one that no calendar knows is taken for the far future.
pub(super) fn moment_of(time: SystemTime) -> PgTimestamp {
    jiff::Timestamp::try_from(time).map_or(PgTimestamp(i64::MAX), PgTimestamp::from)
}
