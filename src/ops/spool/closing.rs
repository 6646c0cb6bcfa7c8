//! Closing gaps: their records go into the repository, and a backup is taken behind them.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::{Draining, UNHARMED};
use crate::failure::Failure;
use crate::format::{Committed, WalGap};
use crate::ops::failures::{of_disk, of_repo, of_task};
use crate::ops::stall::{BackupTry, GapRecord};
use crate::ops::{claimed_identity, now};
use crate::pgdata::StallDirectory;
use crate::plan::stall::closed_by;
use crate::repo::{BackupState, RepoError, Repository};

/// How a backup is taken: this program, in a process of its own.
#[derive(Debug, Clone)]
pub struct BackupCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments; never a secret.
    pub arguments: Vec<String>,
    /// Variables besides those of this process.
    pub variables: Vec<(String, String)>,
}

impl BackupCommand {
    /// Runs it to its end; returns what came of it, in words, and whether it succeeded. Blocks.
    fn run(&self, directory: &StallDirectory) -> (String, bool) {
        let log = directory.backup_log();
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).envs(self.variables.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&log).map_or_else(|_| Stdio::null(), Stdio::from));
        let said = || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let first = text.lines().find(|line| line.contains("error:")).unwrap_or_default();
            first.trim().to_owned()
        };
        match command.status() {
            Ok(status) if status.success() => ("a backup was taken".to_owned(), true),
            Ok(status) => (format!("the backup failed ({status}) {}", said()), false),
            Err(error) => (format!("no backup could be started: {error}"), false),
        }
    }
}

impl Draining<'_> {
    /// Stores the records of gaps, takes a backup where none stands behind them yet, and removes records of gaps that
    /// are closed.
    pub(super) async fn close_gaps(
        &mut self,
        backup: Option<&BackupCommand>,
    ) -> Result<(), Failure> {
        for (name, record) in self.stall.records(self.directory)? {
            if !record.stored {
                let whose = record.gap.system_identifier;
                claimed_identity(self.repository, whose, UNHARMED).await?;
                store_record(self.repository, &record.gap).await?;
                let stored = GapRecord { stored: true, ..record.clone() };
                if self.change(&name, &record, Some(&stored))? {
                    self.drained.gaps_recorded += 1;
                }
            }
        }
        let open = self.remove_closed().await?;
        if open.is_empty() {
            return Ok(());
        }
        let Some(backup) = backup else {
            self.drained.gaps_open = open.iter().map(|(_, record)| in_words(&record.gap)).collect();
            return Ok(());
        };
        tracing::warn!(
            "WAL was let go: a backup is taken now, so that recovery is possible again from there on"
        );
        let (command, place) = (backup.clone(), self.directory.clone());
        let ran = tokio::task::spawn_blocking(move || command.run(&place)).await;
        let (outcome, succeeded) = ran.map_err(|error| of_task(error, UNHARMED))?;
        if succeeded {
            tracing::info!("{outcome}");
        } else {
            tracing::error!(
                "a gap stays open: {outcome}. It is tried again; `highwater backup` closes it as well"
            );
        }
        let last_try = Some(BackupTry { at: now(), outcome });
        for (name, record) in &open {
            let tried = GapRecord { last_try: last_try.clone(), ..record.clone() };
            self.change(name, record, Some(&tried))?;
        }
        let open = self.remove_closed().await?;
        self.drained.gaps_open = open.iter().map(|(_, record)| in_words(&record.gap)).collect();
        Ok(())
    }

    /// Removes the records of gaps behind which a backup begins; returns the others that the repository has.
    async fn remove_closed(&mut self) -> Result<Vec<(String, GapRecord)>, Failure> {
        let records = self.stall.records(self.directory)?;
        if records.is_empty() {
            return Ok(records);
        }
        let backups = committed(self.repository).await.map_err(|error| {
            let what = format!("could not list the backups in {}", self.repository.describe());
            of_repo(error, what, UNHARMED)
        })?;
        let mut open = Vec::new();
        for (name, record) in records {
            match closed_by(&record.gap, &backups) {
                Some(id) if record.stored => {
                    if self.change(&name, &record, None)? {
                        let gap = in_words(&record.gap);
                        tracing::info!("the gap {gap} is closed by backup {id}");
                        self.drained.gaps_closed += 1;
                    }
                }
                _ => open.push((name, record)),
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
