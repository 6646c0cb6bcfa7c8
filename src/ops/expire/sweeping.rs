//! Deleting what nobody needs, as long as nobody begins who may need it.
//!
//! Before each stretch it is looked who has begun, and what is not deleted while that look is good is not deleted by it:
//! a copy that begins behind the look waits for longer than that before it counts on what stood there.

use std::time::SystemTime;

use super::looking::Look;
use super::{Doomed, Expiring};
use crate::failure::{Failure, Kind};
use crate::format::BackupId;
use crate::ops::stock::moment_of;

/// What tells whether an object is needed after all.
#[derive(Debug, Clone)]
pub(super) enum Claim {
    /// It belongs to this backup: who leans on that needs it.
    Backup(BackupId),
    /// It is WAL that was stored then: who began early enough may need it.
    Stored(SystemTime),
}

/// An object that goes unless somebody begins who may need it.
#[derive(Debug)]
pub(super) struct Going {
    pub(super) doomed: Doomed,
    pub(super) claim: Claim,
}

/// What became of objects that were to go.
#[derive(Debug, Default)]
pub(super) struct Swept {
    pub(super) objects: u64,
    pub(super) bytes: u64,
    /// Whether some stay because somebody has begun.
    pub(super) has_spared: bool,
}

impl Expiring<'_> {
    /// Deletes these objects in order, looking who has begun before each `at_a_look` of them.
    ///
    /// # Errors
    /// [`Kind::Store`] if the store fails or is too slow for a look; [`Kind::Integrity`] if this process was suspended, and
    /// something went that is needed by now.
    pub(super) async fn sweep(
        &mut self,
        what: &str,
        at_a_look: usize,
        mut going: Vec<Going>,
    ) -> Result<Swept, Failure> {
        let mut swept = Swept::default();
        // What went when its look was long over.
        let mut late: Vec<Claim> = Vec::new();
        while !going.is_empty() || !late.is_empty() {
            let look = Look::begin(self.request.look_holds_for);
            self.look_again().await?;
            if late.iter().any(|claim| self.is_claimed(claim)) {
                return Err(self.deleted_late(what));
            }
            let before = going.len();
            going.retain(|one| !self.is_claimed(&one.claim));
            swept.has_spared |= going.len() < before;
            let together = &going[..going.len().min(at_a_look)];
            let doomed: Vec<Doomed> = together.iter().map(|one| one.doomed.clone()).collect();
            let dealt_with = self.deleting.while_good(&look, &doomed).await?;
            let asked = &together[..dealt_with.unwrap_or(together.len())];
            // Somebody who began since may have counted on it by then.
            let are_late = asked.iter().filter(|_| look.is_long_over());
            late = are_late.map(|one| one.claim.clone()).collect();
            match dealt_with {
                Some(number) if number > 0 || doomed.is_empty() => {
                    swept.objects += number as u64;
                    swept.bytes += doomed[..number].iter().map(|one| one.bytes).sum::<u64>();
                    going.drain(..number);
                }
                Some(_) | None => return Err(self.too_slow(what, &late).await?),
            }
        }
        Ok(swept)
    }

    /// Whether somebody who was there when it was looked last may need what has this claim.
    pub(super) fn is_claimed(&self, claim: &Claim) -> bool {
        match claim {
            Claim::Backup(id) => self.protected.covers(id),
            Claim::Stored(stored) => {
                // What came since stock was taken is not judged by that.
                self.gathered.last_wal_stored.is_some_and(|last| *stored > last)
                    || self.wal_untouched_since.is_some_and(|since| moment_of(*stored) >= since)
            }
        }
    }

    /// `what` was not deleted while a look was good, and these may have gone when it was long over.
    async fn too_slow(&mut self, what: &str, late: &[Claim]) -> Result<Failure, Failure> {
        if !late.is_empty() {
            self.look_again().await?;
        }
        let is_needed = late.iter().any(|claim| self.is_claimed(claim));
        Ok(if is_needed { self.deleted_late(what) } else { self.gave_up(what) })
    }

    /// `what` was not deleted while a look was good.
    fn gave_up(&self, what: &str) -> Failure {
        let holds_for = self.request.look_holds_for;
        Failure::new(
            Kind::Store,
            format!("the store did not delete {what} within {holds_for:?}"),
            self.deleting.unharmed(),
            "Run `highwater expire` again when the store answers faster: it goes on where it stopped. It waits no longer, since it must look again who needs that.",
        )
    }

    /// `what` was deleted on account of a look that was over.
    fn deleted_late(&self, what: &str) -> Failure {
        let long = 2 * self.request.look_holds_for;
        Failure::new(
            Kind::Integrity,
            format!(
                "{what} went {long:?} or more after it was looked who needs that, as if this process had been suspended, and a backup that was copied here meanwhile may need it"
            ),
            "Backups and WAL that are kept and were there before are as they were.",
            "Run `highwater copy --all`, which brings what is missing, and `highwater verify`, which tells whether any are; then `highwater expire` again.",
        )
    }
}
