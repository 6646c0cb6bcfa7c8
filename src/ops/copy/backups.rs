//! Copying backups: announced first, committed last, and resumed by what stands there already.
//!
//! A backup's packs and those of other backups that it references go to the very same names, so that its file list and
//! chunk maps need no change, and no pack is brought twice for two backups. Where such another backup is not at the
//! destination, its packs stand there as those of a deleted one do. The copy is complete in itself all the same:
//! `committed.json` names every pack that it needs, and so keeps them.
//!
//! Retention at the destination may be at work meanwhile. `begun.json` names every backup that is leaned on, and stands
//! before anything is counted on. What a deleted backup has left, and WAL that nobody there needs, may be about to go all the
//! same (`footing.rs`): such a copy is committed a while later, and others are brought meanwhile. Behind the commit it is
//! looked once more whether everything stands: that finds what went though nobody should have deleted it any more, while this
//! process was suspended for instance.

use std::collections::VecDeque;

use futures_util::{StreamExt, stream};

use super::footing::Announced;
use super::report::{BackupLine, Outcome};
use super::wal::Found;
use super::{Choice, CopyError, Way, failed_at};
use crate::failure::Failure;
use crate::format::{BackupId, Committed, Identity};
use crate::pg::SystemId;
use crate::plan::retention::Plan;
use crate::repo::Transfer;

/// Packs on their way at a time: each is held whole, 8 to 12 MiB as a rule.
const IN_FLIGHT: usize = 3;

/// How often it is looked whether packs that stood are still there.
const LOOKS_MAX: usize = 3;

/// Backups that may be copied, oldest first.
#[derive(Debug, Default)]
pub(super) struct Candidates(Vec<Committed>);

impl Candidates {
    /// Gathers those that were asked for and are in the repository that is read.
    pub(super) async fn find(way: &Way<'_>, identities: &[Identity]) -> Result<Self, Failure> {
        let choice = &way.request.backups;
        if *choice == Choice::Nothing {
            return Ok(Self::default());
        }
        let mut here = Vec::new();
        let mut newest_there = None;
        for identity in identities {
            for side in [way.from, way.to] {
                let found = side.repository.committed_backups(identity.system_identifier).await;
                let found = found.map_err(|error| failed_at(side, error, "list backups"))?;
                if side.which == way.from.which {
                    here.extend(found.readable);
                } else if let Some(last) = found.readable.last() {
                    newest_there = newest_there.max(Some(last.id.clone()));
                }
            }
        }
        here.sort_by(|a, b| a.id.cmp(&b.id));
        match choice {
            Choice::Named(id) => here.retain(|backup| backup.id == *id),
            Choice::Newest => {
                here.drain(..here.len().saturating_sub(1));
                here.retain(|backup| newest_there.as_ref().is_none_or(|other| *other < backup.id));
            }
            Choice::All | Choice::Nothing => {}
        }
        Ok(Self(here))
    }

    pub(super) fn of(&self, system_id: SystemId) -> impl Iterator<Item = &Committed> {
        self.0.iter().filter(move |backup| backup.system_identifier == system_id)
    }
}

/// A copy that was announced and whose objects stand, and that is not committed yet.
struct Waiting {
    backup: Committed,
    announced: Announced,
    line: BackupLine,
}

/// How far one backup was brought.
enum Step {
    /// It is dealt with.
    Done(BackupLine),
    /// All stands, and it is to be committed later.
    Waits(Box<Waiting>),
}

impl Way<'_> {
    /// Brings the backups, oldest first; `plan` is what retention at the destination would keep.
    pub(super) async fn bring_backups(
        &mut self,
        candidates: Candidates,
        plan: Option<&Plan>,
    ) -> Result<(), Failure> {
        let mut waiting: VecDeque<Waiting> = VecDeque::new();
        for backup in candidates.0 {
            self.check_stop().await?;
            while let Some(one) = waiting.pop_front_if(|one| one.announced.has_settled(self)) {
                self.settle(one).await?;
            }
            let is_kept = plan.is_none_or(|plan| {
                plan.kept().any(|fate| fate.id == backup.id)
                    || !plan.backups.iter().any(|fate| fate.id == backup.id)
            });
            let brought = if is_kept || matches!(self.request.backups, Choice::Named(_)) {
                self.bring_backup(backup).await?
            } else {
                Step::Done(line(&backup, Outcome::NotKept))
            };
            match brought {
                Step::Done(line) => self.report.backups.push(line),
                Step::Waits(one) => waiting.push_back(*one),
            }
        }
        for one in waiting {
            self.settle(one).await?;
        }
        self.report.backups.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(())
    }

    async fn bring_backup(&mut self, backup: Committed) -> Result<Step, Failure> {
        self.progress.note(&format!("copying backup {}", backup.id));
        let mut line = line(&backup, Outcome::NotCopied);
        let known = self.transfer().committed(&backup.id).await;
        let Some((_, is_there)) = self.noted(&backup, known)? else {
            return Ok(Step::Done(line));
        };
        if self.request.dry_run {
            line.outcome = if is_there { Outcome::AlreadyThere } else { Outcome::WouldBeCopied };
        } else if is_there {
            if self.bring_parts(&backup, false, &mut line).await?
                && self.bring_list(&backup).await?
            {
                line.outcome = Outcome::AlreadyThere;
            }
        } else {
            return self.bring_anew(backup, line).await;
        }
        Ok(Step::Done(line))
    }

    /// Brings a backup that is not there, and commits it unless that must wait.
    async fn bring_anew(
        &mut self,
        backup: Committed,
        mut line: BackupLine,
    ) -> Result<Step, Failure> {
        let announced = self.announce(&backup).await;
        let Some(announced) = self.noted(&backup, announced)? else {
            return Ok(Step::Done(line));
        };
        if !self.bring_parts(&backup, false, &mut line).await? {
            return Ok(Step::Done(line));
        }
        if announced.must_wait {
            return Ok(Step::Waits(Box::new(Waiting { backup, announced, line })));
        }
        self.commit(&backup, &announced, &mut line).await?;
        Ok(Step::Done(line))
    }

    /// Commits a copy that had to wait, once it has waited and everything that it needs stands.
    async fn settle(&mut self, waiting: Waiting) -> Result<(), Failure> {
        let Waiting { backup, announced, mut line } = waiting;
        self.wait_out(&backup, &announced).await?;
        if self.bring_parts(&backup, true, &mut line).await? {
            self.commit(&backup, &announced, &mut line).await?;
        }
        self.report.backups.push(line);
        Ok(())
    }

    /// Makes a copy a backup. The line says that it is copied if everything that it needs stands afterwards.
    async fn commit(
        &mut self,
        backup: &Committed,
        announced: &Announced,
        line: &mut BackupLine,
    ) -> Result<(), Failure> {
        let committed = self.transfer().commit(backup, &announced.begun).await;
        let is_committed = self.noted(backup, committed)?.is_some();
        if is_committed && self.look_behind(backup, announced, line).await? {
            line.outcome = Outcome::Copied;
        }
        Ok(())
    }

    /// Looks, once a backup is committed, whether everything that it needs stands, and brings what does not.
    async fn look_behind(
        &mut self,
        backup: &Committed,
        announced: &Announced,
        line: &mut BackupLine,
    ) -> Result<bool, Failure> {
        let stands = self.transfer().is_announced(&announced.begun).await;
        let Some(stands) = self.noted(backup, stands)? else { return Ok(false) };
        if !stands {
            // Suspended right before it was committed, it was taken for dead. An `expire` that began before that may
            // go on deleting what it leans on until it finds it announced again.
            let again = self.announce(backup).await;
            let Some(again) = self.noted(backup, again)? else { return Ok(false) };
            self.wait_out(backup, &again).await?;
        }
        Ok(self.bring_list(backup).await? && self.bring_parts(backup, true, line).await?)
    }

    /// Brings the packs and the WAL that a backup needs; returns whether all packs stand. `looked_before` as for
    /// [`Self::bring_packs`].
    async fn bring_parts(
        &mut self,
        backup: &Committed,
        looked_before: bool,
        line: &mut BackupLine,
    ) -> Result<bool, Failure> {
        if !self.bring_packs(backup, looked_before, line).await? {
            return Ok(false);
        }
        let of = (backup.system_identifier, backup.segment_size);
        let brought = self.bring_wal(of, Found::Of(backup)).await?;
        self.report.wal.add(&brought);
        line.wal_complete = Some(self.has_wal_of(backup).await?);
        Ok(true)
    }

    /// Brings the file list of a committed backup if it is missing; returns whether it stands.
    async fn bring_list(&mut self, backup: &Committed) -> Result<bool, Failure> {
        let brought = self.transfer().file_list(backup).await;
        Ok(self.noted(backup, brought)?.is_some())
    }

    /// Returns what came of a step; `None` if it failed and that was noted, so that other backups are copied still.
    fn noted<T>(
        &mut self,
        backup: &Committed,
        outcome: Result<T, CopyError>,
    ) -> Result<Option<T>, Failure> {
        match outcome {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                self.troubled(&format!("backup {}", backup.id), error)?;
                Ok(None)
            }
        }
    }
}

impl Way<'_> {
    /// Brings every pack that a backup needs; returns whether all stand at the destination. Those that stand are
    /// compared with the source's, unless it was `looked_before`.
    async fn bring_packs(
        &mut self,
        backup: &Committed,
        looked_before: bool,
        line: &mut BackupLine,
    ) -> Result<bool, Failure> {
        for look in 0..LOOKS_MAX {
            let missing = self.missing_packs(backup, looked_before || look > 0).await;
            let Some(missing) = self.noted(backup, missing)? else { return Ok(false) };
            if missing.is_empty() {
                return Ok(true);
            }
            let (transfer, system_id) = (
                Transfer { from: &self.from.repository, to: &self.to.repository },
                backup.system_identifier,
            );
            let mut on_their_way = stream::iter(&missing)
                .map(|(owner, pack)| transfer.pack(system_id, owner, *pack))
                .buffer_unordered(IN_FLIGHT);
            while let Some(outcome) = on_their_way.next().await {
                let Some(bytes) = self.noted(backup, outcome)? else { return Ok(false) };
                line.packs += 1;
                line.bytes += bytes;
                self.progress.advance(bytes);
                self.check_stop().await?;
            }
        }
        let why = "its packs go away at the destination while they are copied";
        tracing::warn!("backup {} was not copied: {why}; copy it again", backup.id);
        Ok(false)
    }

    /// Lists the packs that a backup needs and that are not at the destination.
    async fn missing_packs(
        &self,
        backup: &Committed,
        is_second_look: bool,
    ) -> Result<Vec<(BackupId, u32)>, CopyError> {
        let transfer = self.transfer();
        let mut missing = Vec::new();
        for reference in &backup.references {
            let wanted: Vec<u32> = reference.packs.iter().map(|pack| pack.pack).collect();
            let owner = &reference.backup;
            let is_same = is_second_look || transfer.is_on_both_sides(owner).await?;
            let there = transfer.packs_on_both_sides(owner, &wanted, is_same).await?;
            let absent = wanted.into_iter().filter(|number| !there.contains_key(number));
            missing.extend(absent.map(|number| (owner.clone(), number)));
        }
        Ok(missing)
    }
}

fn line(backup: &Committed, outcome: Outcome) -> BackupLine {
    BackupLine { id: backup.id.clone(), outcome, packs: 0, bytes: 0, wal_complete: None }
}
