//! Closing gaps: their records go into the repository, and a backup is taken behind them.
//!
//! With two repositories a gap is one in both, and each needs a backup behind it: the one that was away too, once it is
//! back, where it is copied from the other.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::{Draining, UNHARMED};
use crate::failure::Failure;
use crate::format::{Committed, WalGap};
use crate::ops::failures::{of_disk, of_repo, of_task};
use crate::ops::stall::{BackupTry, GapRecord};
use crate::ops::{Which, claimed_identity, now};
use crate::pgdata::StallDirectory;
use crate::plan::stall::closed_by;
use crate::repo::{BackupState, RepoError, Repository};

/// This program with its settings, to be run in a process of its own.
#[derive(Debug, Clone)]
pub struct OwnProgram {
    /// The program.
    pub program: PathBuf,
    /// The flags that name repositories and settings; never a secret.
    pub flags: Vec<String>,
    /// Variables besides those of this process.
    pub variables: Vec<(String, String)>,
}

/// What brings a backup behind a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    /// A new one, in each repository or in one alone.
    Backup(Option<Which>),
    /// The other repository has one. What was archived while this one was away stands there alone as well.
    Copy,
}

impl Remedy {
    fn of(open: &[OpenGap], are_two: bool) -> Self {
        if open.iter().all(|gap| !gap.record.closed_in.is_empty()) {
            return Self::Copy;
        }
        let lacking: BTreeSet<Which> = open.iter().flat_map(|gap| &gap.lacking).copied().collect();
        Self::Backup(lacking.first().copied().filter(|_| are_two && lacking.len() == 1))
    }

    fn arguments(self) -> Vec<&'static str> {
        match self {
            Self::Backup(None) => vec!["backup", "--fast"],
            Self::Backup(Some(only)) => vec!["--only", only.word(), "backup", "--fast"],
            Self::Copy => vec!["copy", "--newest", "--wal"],
        }
    }
}

impl OwnProgram {
    /// Runs it to its end; returns what came of it, in words, and whether it succeeded. Blocks.
    fn run(&self, directory: &StallDirectory, remedy: Remedy) -> (String, bool) {
        let log = directory.backup_log();
        let mut command = Command::new(&self.program);
        command.args(&self.flags).args(remedy.arguments()).envs(self.variables.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&log).map_or_else(|_| Stdio::null(), Stdio::from));
        let said = || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let first = text.lines().find(|line| line.contains("error:")).unwrap_or_default();
            first.trim().to_owned()
        };
        let (done, what) = match remedy {
            Remedy::Backup(_) => ("a backup was taken", "the backup"),
            Remedy::Copy => {
                ("a backup was copied from the other repository", "the copy of a backup")
            }
        };
        match command.status() {
            Ok(status) if status.success() => (done.to_owned(), true),
            Ok(status) => (format!("{what} failed ({status}) {}", said()), false),
            Err(error) => (format!("{what} could not be started: {error}"), false),
        }
    }
}

impl Draining<'_> {
    /// Stores the records of gaps, takes a backup where none stands behind them yet, and removes records of gaps that
    /// are closed everywhere.
    pub(super) async fn close_gaps(&mut self, program: Option<&OwnProgram>) -> Result<(), Failure> {
        self.record_gaps().await?;
        let open = self.look_for_backups().await?;
        let Some(program) = program.filter(|_| !open.is_empty()) else {
            self.drained.gaps_open = open.iter().map(OpenGap::in_words).collect();
            return Ok(());
        };
        let remedy = Remedy::of(&open, self.takers.are_two());
        match remedy {
            Remedy::Backup(_) => tracing::warn!(
                "WAL was let go: a backup is taken now, so that recovery is possible again from there on"
            ),
            Remedy::Copy => tracing::info!(
                "WAL was let go: a backup behind it is copied from the other repository now"
            ),
        }
        let (command, place) = (program.clone(), self.directory.clone());
        let ran = tokio::task::spawn_blocking(move || command.run(&place, remedy)).await;
        let (outcome, succeeded) = ran.map_err(|error| of_task(error, UNHARMED))?;
        if succeeded {
            tracing::info!("{outcome}");
        } else {
            tracing::error!(
                "a gap stays open: {outcome}. It is tried again; `highwater backup` closes it as well"
            );
        }
        let last_try = Some(BackupTry { at: now(), outcome });
        for OpenGap { name, record, .. } in &open {
            let tried = GapRecord { last_try: last_try.clone(), ..record.clone() };
            self.change(name, record, Some(&tried))?;
        }
        let open = self.look_for_backups().await?;
        self.drained.gaps_open = open.iter().map(OpenGap::in_words).collect();
        Ok(())
    }

    /// Stores each record wherever it is not yet.
    async fn record_gaps(&mut self) -> Result<(), Failure> {
        for (name, record) in self.stall.records(self.directory)? {
            if record.stored_in.is_superset(&self.takers.names()) {
                continue;
            }
            let gap = &record.gap;
            let put = async |which, repository: &Repository| {
                if !record.stored_in.contains(&which) {
                    claimed_identity(repository, gap.system_identifier, UNHARMED).await?;
                    store_record(repository, gap).await?;
                }
                Ok(())
            };
            let stored = self.takers.each(put).await?;
            self.takers.require_one(&stored)?;
            let stored_in = stored.into_iter().map(|(which, ())| which);
            let stored_in = record.stored_in.iter().copied().chain(stored_in).collect();
            let after = GapRecord { stored_in, ..record.clone() };
            if after != record && self.change(&name, &record, Some(&after))? {
                self.drained.gaps_recorded += 1;
            }
        }
        Ok(())
    }

    /// Notes where a backup begins behind a gap by now, and removes the records of gaps behind which one does
    /// everywhere. Returns those that a repository which could be asked has no backup behind.
    async fn look_for_backups(&mut self) -> Result<Vec<OpenGap>, Failure> {
        let records = self.stall.records(self.directory)?;
        if records.is_empty() {
            return Ok(Vec::new());
        }
        let list = async |_, repository: &Repository| {
            committed(repository).await.map_err(|error| {
                let what = format!("could not list the backups in {}", repository.describe());
                of_repo(error, what, UNHARMED)
            })
        };
        let backups = self.takers.each(list).await?;
        self.takers.require_one(&backups)?;
        let everywhere = self.takers.names();
        let mut open = Vec::new();
        for (name, record) in records {
            let known = backups.iter().filter(|(which, _)| record.stored_in.contains(which));
            let found = |(which, backups): &(Which, Vec<Committed>)| {
                (*which, closed_by(&record.gap, backups).cloned())
            };
            let (mut after, mut lacking) = (record.clone(), Vec::new());
            for (which, closed) in known.map(found) {
                match closed {
                    Some(id) if after.closed_in.insert(which) => {
                        let gap = in_words(&record.gap);
                        let place = if everywhere.len() > 1 {
                            format!(", in the {} repository", which.word())
                        } else {
                            String::new()
                        };
                        tracing::info!("the gap {gap} is closed by backup {id}{place}");
                    }
                    Some(_) => {}
                    None => {
                        after.closed_in.remove(&which);
                        lacking.push(which);
                    }
                }
            }
            if after.closed_in.is_superset(&everywhere) {
                self.drained.gaps_closed += u64::from(self.change(&name, &record, None)?);
                continue;
            }
            let is_current = after == record || self.change(&name, &record, Some(&after))?;
            if is_current && !lacking.is_empty() {
                open.push(OpenGap { name, record: after, lacking });
            }
        }
        Ok(open)
    }

    /// Changes or removes a record, if it still is what it was: it may have grown meanwhile. Returns whether it was
    /// changed.
    fn change(
        &self,
        name: &str,
        before: &GapRecord,
        after: Option<&GapRecord>,
    ) -> Result<bool, Failure> {
        let directory = self.directory;
        let _lock = self.stall.lock_records(directory)?;
        let records = self.stall.records(directory)?;
        if !records.iter().any(|(known, record)| known == name && record == before) {
            return Ok(false);
        }
        match after {
            Some(record) => self.stall.write_record(directory, name, record)?,
            None => directory.remove(name).map_err(|error| {
                let place = directory.path().display();
                of_disk(error, format!("could not remove `{name}` from `{place}`"), UNHARMED)
            })?,
        }
        Ok(true)
    }
}

/// A gap that is to be closed by a backup.
struct OpenGap {
    /// The name of its record.
    name: String,
    record: GapRecord,
    /// Which repositories could be asked, and have no backup behind it.
    lacking: Vec<Which>,
}

impl OpenGap {
    fn in_words(&self) -> String {
        in_words(&self.record.gap)
    }
}

fn in_words(gap: &WalGap) -> String {
    format!("{} to {} on timeline {}", gap.start_lsn, gap.end_lsn, gap.timeline)
}

async fn store_record(repository: &Repository, gap: &WalGap) -> Result<(), Failure> {
    match repository.put_gap(gap).await {
        // In conflict, if another host has let the very same WAL go, and said so.
        Ok(_) | Err(RepoError::Conflict { .. }) => Ok(()),
        Err(error) => {
            let what = format!("could not record in {} that WAL was let go", repository.describe());
            Err(of_repo(error, what, UNHARMED))
        }
    }
}

async fn committed(repository: &Repository) -> Result<Vec<Committed>, RepoError> {
    let mut backups = Vec::new();
    for id in repository.backup_ids().await? {
        if let BackupState::Committed(backup) = repository.backup_state(&id).await? {
            // Which packs it needs is not looked at, and may be long.
            backups.push(Committed { references: Vec::new(), ..backup });
        }
    }
    Ok(backups)
}
