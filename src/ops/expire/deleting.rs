//! Deleting objects: in order, several at a time, counted; a refusal is told and does not stop the rest.

use futures_util::future::join_all;

use super::UNHARMED;
use super::looking::Look;
use super::report::Refusal;
use crate::causes::in_one_line;
use crate::failure::Failure;
use crate::ops::failures::of_repo;
use crate::ops::progress::Progress;
use crate::ops::stop::StopRequest;
use crate::repo::{RepoError, Repository};
use crate::store::Key;

/// Objects deleted at a time. The next begin when all of these are gone, so that no more than these can be
/// missing behind one that is there still.
const AT_A_TIME: usize = 16;

/// Refusals that are named; more are only counted.
const REFUSALS_NAMED_MAX: usize = 10;

/// An object that goes.
#[derive(Debug, Clone)]
pub(super) struct Doomed {
    pub(super) key: Key,
    pub(super) bytes: u64,
}

/// What was deleted so far, and how.
pub(super) struct Deleting<'a> {
    repository: &'a Repository,
    dry_run: bool,
    stop: StopRequest,
    pub(super) progress: &'a dyn Progress,
    pub(super) backups: u64,
    pub(super) objects: u64,
    pub(super) bytes: u64,
    pub(super) refused: u64,
    pub(super) refusals: Vec<Refusal>,
}

impl<'a> Deleting<'a> {
    pub(super) fn new(
        repository: &'a Repository,
        dry_run: bool,
        stop: StopRequest,
        progress: &'a dyn Progress,
    ) -> Self {
        let refusals = Vec::new();
        let (backups, objects, bytes, refused) = (0, 0, 0, 0);
        Self { repository, dry_run, stop, progress, backups, objects, bytes, refused, refusals }
    }

    /// Deletes a document so that it stays deleted, whatever happens to the machine. Returns whether the store let it go.
    ///
    /// # Errors
    /// The store failed, or the work is to stop: then it may or may not be there.
    pub(super) async fn one(&mut self, key: &Key) -> Result<bool, Failure> {
        self.check_stop().await?;
        let deleted = if self.dry_run { Ok(()) } else { self.repository.delete(key).await };
        self.note(key, 0, deleted)
    }

    /// Deletes objects in order.
    ///
    /// # Errors
    /// As [`Self::one`]; those before are deleted.
    pub(super) async fn all(&mut self, doomed: Vec<Doomed>) -> Result<(), Failure> {
        for together in doomed.chunks(AT_A_TIME) {
            self.check_stop().await?;
            let outcomes = self.discard(together).await;
            self.note_all(together, outcomes)?;
        }
        Ok(())
    }

    /// Deletes objects in order, as long as a look is good. Returns how many were dealt with by then; `None` if the
    /// store has not answered by then: nothing more is asked of it, but what was asked is done, or may be done still.
    ///
    /// # Errors
    /// As [`Self::one`].
    pub(super) async fn while_good(
        &mut self,
        look: &Look,
        doomed: &[Doomed],
    ) -> Result<Option<usize>, Failure> {
        let mut dealt_with = 0;
        for together in doomed.chunks(AT_A_TIME) {
            self.check_stop().await?;
            if look.is_over() {
                break;
            }
            match tokio::time::timeout_at(look.end(), self.discard(together)).await {
                Ok(outcomes) => self.note_all(together, outcomes)?,
                Err(_) => return Ok(None),
            }
            dealt_with += together.len();
        }
        Ok(Some(dealt_with))
    }

    async fn discard(&self, together: &[Doomed]) -> Vec<Result<(), RepoError>> {
        let discards = together.iter().map(|doomed| async {
            if self.dry_run { Ok(()) } else { self.repository.discard(&doomed.key).await }
        });
        join_all(discards).await
    }

    fn note_all(
        &mut self,
        together: &[Doomed],
        outcomes: Vec<Result<(), RepoError>>,
    ) -> Result<(), Failure> {
        for (doomed, outcome) in together.iter().zip(outcomes) {
            self.note(&doomed.key, doomed.bytes, outcome)?;
        }
        Ok(())
    }

    fn note(
        &mut self,
        key: &Key,
        bytes: u64,
        outcome: Result<(), RepoError>,
    ) -> Result<bool, Failure> {
        match outcome {
            Ok(()) => {
                self.objects += 1;
                self.bytes += bytes;
                self.progress.advance(bytes);
                Ok(true)
            }
            Err(error) if error.is_not_allowed() => {
                self.refused += 1;
                if self.refusals.len() < REFUSALS_NAMED_MAX {
                    let why = in_one_line(&error);
                    self.refusals.push(Refusal { key: key.to_string(), why });
                }
                Ok(false)
            }
            Err(error) => {
                let what = format!("could not delete `{key}`");
                let failure = of_repo(error, what, self.unharmed());
                let next = "Run `highwater expire` again when the store answers: it goes on where it stopped.";
                Err(Failure { next: next.to_owned(), ..failure })
            }
        }
    }

    /// Says what was not harmed, whatever went wrong.
    pub(super) fn unharmed(&self) -> &'static str {
        if self.objects == 0 || self.dry_run { "Nothing was deleted." } else { UNHARMED }
    }

    async fn check_stop(&mut self) -> Result<(), Failure> {
        let objects = self.objects;
        let next = "Run `highwater expire` again when it suits: it goes on where it stopped.";
        self.stop.check(|| format!("{objects} objects were deleted"), UNHARMED, next).await
    }
}
