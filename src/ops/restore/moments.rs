//! Which moments recovery can reach, so that one of them can be chosen at random.

use super::UNHARMED;
use crate::failure::Failure;
use crate::ops::current_identity;
use crate::ops::failures::of_repo;
use crate::ops::stock::take_stock;
use crate::ops::wal_times::{StoredWay, reach};
use crate::plan::drill::Moments;
use crate::plan::window::{stretches, ways};
use crate::repo::{RepoError, Repository};

/// The most stretches that are looked at, the newest: each costs the store a few reads.
const STRETCHES_MAX: usize = 64;

/// Returns everything that can be reached of the cluster that lives here now, on the way to each timeline, up to the
/// last whole record; each of them can be a target as an LSN.
///
/// # Errors
/// The store's, which a retry may cure; [`crate::failure::Kind::Integrity`] for a damaged history file.
pub async fn reachable_moments(repository: &Repository) -> Result<Vec<Moments>, Failure> {
    let identity = current_identity(repository, UNHARMED).await?;
    gather(repository, identity.system_identifier).await.map_err(|error| {
        of_repo(error, format!("could not take stock of {}", repository.describe()), UNHARMED)
    })
}

async fn gather(
    repository: &Repository,
    system_id: crate::pg::SystemId,
) -> Result<Vec<Moments>, RepoError> {
    let gathered = take_stock(repository, &repository.identities().await?).await?;
    let all = &gathered.stock.incarnations;
    let Some(current) = all.iter().find(|one| one.system_id == system_id) else {
        return Ok(Vec::new());
    };
    let holdings = current.holdings();
    let mut found = Vec::new();
    for way in ways(&holdings).into_iter().rev() {
        for stretch in stretches(&holdings, &way).into_iter().rev() {
            if found.len() == STRETCHES_MAX {
                return Ok(found);
            }
            let stored = StoredWay { repository, system_id, way: &way, size: current.segment_size };
            let end = reach(stored, stretch.oldest.start_lsn, stretch.end_lsn).await?;
            found.extend(end.last_record_lsn.map(|last_lsn| Moments {
                timeline: way.timeline(),
                first_lsn: stretch.start_lsn,
                last_lsn,
            }));
        }
    }
    Ok(found)
}
