//! Going on from what a backup had stored that was never finished.
//!
//! The new backup has an id, a start and a stop of its own; of the old one only packs are of use, and only for
//! bytes that were read anew and are the same (`repo/leftovers.rs`). Whether the old one is dead or still at
//! work somewhere makes no difference: what it has stored does not change, and its packs are not removed by anyone
//! who sees that the new one has named it.

use super::{Making, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::format::BackupId;
use crate::ops::failures::of_repo;
use crate::repo::{Leftovers, Uploads};

/// Unfinished backups that are looked through, the newest: each costs memory, and more than these hardly hold
/// what has not changed since.
const UNFINISHED_MAX: usize = 4;

/// Chooses among the unfinished backups, oldest first, those that a new one names and looks through.
pub(super) fn worth_looking_through(mut unfinished: Vec<BackupId>) -> Vec<BackupId> {
    unfinished.drain(..unfinished.len().saturating_sub(UNFINISHED_MAX));
    unfinished
}

/// Returns whether what a failed backup has stored is of use to the next one: it failed because a store or a server
/// went away, and may go on when that is back.
pub(super) fn is_worth_keeping(failure: &Failure, uploads: &Uploads) -> bool {
    matches!(failure.kind, Kind::Store | Kind::Postgres) && uploads.stored_bytes() > 0
}

impl Making<'_> {
    /// Finds what unfinished backups have stored, which `begun.json` names by now.
    pub(super) async fn leftovers(&self, unfinished: &[BackupId]) -> Result<Leftovers, Failure> {
        let system_id = self.identity.system_identifier;
        let found = Leftovers::find(self.repository, system_id, unfinished).await;
        let found = found.map_err(|error| {
            of_repo(error, "could not look for what unfinished backups have stored", UNHARMED)
        })?;
        if !found.is_empty() {
            let ids: Vec<&str> = found.ids().map(BackupId::as_str).collect();
            tracing::info!(
                "what is the same is taken over from unfinished backups: {}",
                ids.join(", ")
            );
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_unfinished_backups_are_looked_through() {
        let id = |number| BackupId::at(jiff::Timestamp::UNIX_EPOCH, number);
        let all: Vec<BackupId> = (2..9).map(id).collect();
        assert_eq!(worth_looking_through(all.clone()), all[all.len() - UNFINISHED_MAX..]);
        assert_eq!(worth_looking_through(vec![id(2)]), [id(2)]);
    }
}
