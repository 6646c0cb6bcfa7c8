//! Copying backups: announced first, committed last, and resumed by what stands there already.
//!
//! A backup's packs and those of other backups that it references go to the very same names, so that its file list and
//! chunk maps need no change, and no pack is brought twice for two backups. Where such another backup is not at the
//! destination, its packs stand there as those of a deleted one do. The copy is complete in itself all the same:
//! `committed.json` names every pack that it needs, and so keeps them.
//!
//! Retention at the destination may be at work meanwhile. `begun.json` names every backup that is leaned on, and stands
//! before any pack is counted on; and before and after the backup is committed it is looked once more whether every pack
//! stands.

use futures_util::{StreamExt, stream};

use super::report::{BackupLine, Outcome};
use super::wal::Found;
use super::{Choice, CopyError, Way, failed_at};
use crate::failure::Failure;
use crate::format::{BackupId, Begun, Committed, FORMAT_VERSION, Identity};
use crate::ops::TOOL;
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

impl Way<'_> {
    /// Brings the backups, oldest first; `plan` is what retention at the destination would keep.
    pub(super) async fn bring_backups(
        &mut self,
        candidates: Candidates,
        plan: Option<&Plan>,
    ) -> Result<(), Failure> {
        for backup in candidates.0 {
            self.check_stop().await?;
            let is_kept = plan.is_none_or(|plan| {
                plan.kept().any(|fate| fate.id == backup.id)
                    || !plan.backups.iter().any(|fate| fate.id == backup.id)
            });
            let line = if is_kept || matches!(self.request.backups, Choice::Named(_)) {
                self.bring_backup(&backup).await?
            } else {
                line(&backup, Outcome::NotKept)
            };
            self.report.backups.push(line);
        }
        Ok(())
    }

    async fn bring_backup(&mut self, backup: &Committed) -> Result<BackupLine, Failure> {
        let id = backup.id.clone();
        self.progress.note(&format!("copying backup {id}"));
        let mut line = line(backup, Outcome::NotCopied);
        let is_there = match self.transfer().committed(&id).await {
            Ok((_, is_there)) => is_there,
            Err(error) => {
                self.troubled(&format!("backup {id}"), error)?;
                return Ok(line);
            }
        };
        if self.request.dry_run {
            line.outcome = if is_there { Outcome::AlreadyThere } else { Outcome::WouldBeCopied };
            return Ok(line);
        }
        if !is_there && let Err(error) = self.transfer().begin(&self.begun(backup)).await {
            self.troubled(&format!("backup {id}"), error)?;
            return Ok(line);
        }
        if !self.bring_packs(backup, &mut line).await? {
            return Ok(line);
        }
        let of = (backup.system_identifier, backup.segment_size);
        let brought = self.bring_wal(of, Found::Of(backup)).await?;
        self.report.wal.add(&brought);
        line.wal_complete = Some(self.has_wal_of(backup).await?);
        if is_there {
            line.outcome = Outcome::AlreadyThere;
            return Ok(line);
        }
        match self.transfer().commit(backup).await {
            // From here on nobody deletes a pack of it who has not looked long ago.
            Ok(()) if self.bring_packs(backup, &mut line).await? => line.outcome = Outcome::Copied,
            Ok(()) => {}
            Err(error) => self.troubled(&format!("backup {id}"), error)?,
        }
        Ok(line)
    }
}

impl Way<'_> {
    /// Brings every pack that a backup needs; returns whether all stand at the destination.
    async fn bring_packs(
        &mut self,
        backup: &Committed,
        line: &mut BackupLine,
    ) -> Result<bool, Failure> {
        for look in 0..LOOKS_MAX {
            let missing = match self.missing_packs(backup, look > 0).await {
                Ok(missing) => missing,
                Err(error) => {
                    self.troubled(&format!("backup {}", backup.id), error)?;
                    return Ok(false);
                }
            };
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
                match outcome {
                    Ok(bytes) => {
                        line.packs += 1;
                        line.bytes += bytes;
                        self.progress.advance(bytes);
                    }
                    Err(error) => {
                        self.troubled(&format!("backup {}", backup.id), error)?;
                        return Ok(false);
                    }
                }
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

    /// Returns what is announced at the destination. It began when the backup itself did: WAL that was stored there
    /// since is left alone, as for a backup that runs.
    fn begun(&self, backup: &Committed) -> Begun {
        let others = backup.references.iter().map(|reference| &reference.backup);
        Begun {
            format: FORMAT_VERSION,
            id: backup.id.clone(),
            begun_at: backup.started_at,
            host: self.request.host.clone(),
            pid: std::process::id(),
            parent: None,
            leans_on: others.filter(|other| **other != backup.id).cloned().collect(),
            tool: TOOL.to_owned(),
        }
    }
}

fn line(backup: &Committed, outcome: Outcome) -> BackupLine {
    BackupLine { id: backup.id.clone(), outcome, packs: 0, bytes: 0, wal_complete: None }
}
