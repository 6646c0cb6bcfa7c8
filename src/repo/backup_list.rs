//! Which backups there are, and reading one's file list.

use futures_util::{StreamExt, TryStreamExt};

use super::{RepoError, Repository};
use crate::causes::in_one_line;
use crate::format::{BackupId, Begun, Committed, Document, FileIndex};
use crate::store::Key;

/// How many documents are read at a time.
const IN_FLIGHT: usize = 8;

/// A backup that has begun and is not committed: running, or dead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnfinishedBackup {
    /// Its id.
    pub id: BackupId,
    /// Who began it; absent when even that is missing.
    pub begun: Option<Begun>,
}

/// A backup one of whose documents is stored and cannot be used: it is damaged, or was written by a
/// newer version. Whether the rest of the backup is whole, and whose it is, is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadableBackup {
    /// Its id.
    pub id: BackupId,
    /// Which document it is and what is wrong with it.
    pub why: String,
    /// Whether nothing is wrong but that this version is too old.
    pub is_newer: bool,
}

/// The committed backups of one incarnation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CommittedBackups {
    /// Those that can be read, oldest first.
    pub readable: Vec<Committed>,
    /// Those whose `committed.json` cannot be read, oldest first. They may be another
    /// incarnation's.
    pub unreadable: Vec<UnreadableBackup>,
    /// Those that have no `committed.json`, running or dead, oldest first. They may be another incarnation's.
    pub unfinished: Vec<BackupId>,
}

/// A backup as the repository shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // a handful of these exist at a time
pub enum BackupState {
    /// It exists.
    Committed(Committed),
    /// It does not exist (yet).
    Unfinished(UnfinishedBackup),
    /// One of its documents cannot be read.
    Unreadable(UnreadableBackup),
}

impl UnreadableBackup {
    /// Tells damage of one backup from a store that does not answer, which is given back: that
    /// says nothing about any backup.
    fn of(id: &BackupId, error: RepoError) -> Result<Self, RepoError> {
        let is_newer = matches!(error, RepoError::NotReadable { .. });
        if error.is_damage() {
            return Ok(Self { id: id.clone(), why: in_one_line(&error), is_newer });
        }
        Err(error)
    }
}

impl Repository {
    /// Reads all backups, oldest first. A damaged document makes its own backup
    /// [`BackupState::Unreadable`] and is no error.
    ///
    /// # Errors
    /// The store's only: then nothing is known.
    pub async fn backups(&self) -> Result<Vec<BackupState>, RepoError> {
        futures_util::stream::iter(self.backup_ids().await?)
            .map(|id| async move { self.backup_state(&id).await })
            .buffered(IN_FLIGHT)
            .try_collect()
            .await
    }

    /// Reads one backup's state; a damaged document makes it [`BackupState::Unreadable`] and is no error.
    ///
    /// # Errors
    /// The store's only: then nothing is known.
    pub async fn backup_state(&self, id: &BackupId) -> Result<BackupState, RepoError> {
        match self.backup(id).await {
            Err(error) => UnreadableBackup::of(id, error).map(BackupState::Unreadable),
            state => state,
        }
    }

    /// Returns whether `committed.json` is stored, whatever it says.
    pub async fn has_committed(&self, id: &BackupId) -> Result<bool, RepoError> {
        match self.committed(id).await {
            Ok(backup) => Ok(backup.is_some()),
            Err(error) if error.is_damage() => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Reads all committed backups of one incarnation. What is left of an unfinished backup
    /// is not looked at, so damage there stands in nobody's way.
    ///
    /// # Errors
    /// The store's only: then nothing is known.
    pub async fn committed_backups(
        &self,
        system_id: crate::pg::SystemId,
    ) -> Result<CommittedBackups, RepoError> {
        let mut reading = futures_util::stream::iter(self.backup_ids().await?)
            .map(|id| async move { (self.committed(&id).await, id) })
            .buffered(IN_FLIGHT);
        let mut found = CommittedBackups::default();
        while let Some((outcome, id)) = reading.next().await {
            match outcome {
                Ok(Some(backup)) if backup.system_identifier == system_id => {
                    found.readable.push(backup);
                }
                Ok(Some(_)) => {}
                Ok(None) => found.unfinished.push(id),
                Err(error) => found.unreadable.push(UnreadableBackup::of(&id, error)?),
            }
        }
        Ok(found)
    }

    /// Reads who began a backup; `None` when the store says that `begun.json` is not there.
    pub async fn begun(&self, id: &BackupId) -> Result<Option<Begun>, RepoError> {
        match self.document::<Begun>(&Key::new(self.place().begun(id))).await {
            Ok(begun) => Ok(Some(begun)),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lists the ids of all backups, whatever their state, oldest first: everything below which
    /// any object is stored.
    pub async fn backup_ids(&self) -> Result<Vec<BackupId>, RepoError> {
        let level = self.store().list_level(&Key::new(self.place().backups_dir())).await?;
        Ok(level.directories.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Reads one backup's state.
    pub async fn backup(&self, id: &BackupId) -> Result<BackupState, RepoError> {
        match self.committed(id).await? {
            Some(backup) => Ok(BackupState::Committed(backup)),
            None => {
                let begun = self.begun(id).await?;
                Ok(BackupState::Unfinished(UnfinishedBackup { id: id.clone(), begun }))
            }
        }
    }

    /// Returns whether any other backup leans on this one: a committed one needs a pack of it, or one that is not
    /// committed may reference some. A document that cannot be read might say so, and counts.
    pub(super) async fn is_leaned_on(&self, id: &BackupId) -> Result<bool, RepoError> {
        let others = self.backup_ids().await?.into_iter().filter(|other| other != id);
        let mut reading = futures_util::stream::iter(others)
            .map(|other| async move {
                match self.leans_on(&other, id).await {
                    Err(error) if error.is_damage() => Ok(true),
                    outcome => outcome,
                }
            })
            .buffer_unordered(IN_FLIGHT);
        while let Some(leans) = reading.next().await {
            if leans? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn leans_on(&self, other: &BackupId, id: &BackupId) -> Result<bool, RepoError> {
        // In this order: one that commits meanwhile has its `begun.json` all the while.
        if let Some(committed) = self.committed(other).await? {
            return Ok(committed.references.iter().any(|reference| reference.backup == *id));
        }
        let begun = self.begun(other).await?;
        Ok(begun
            .is_some_and(|begun| begun.parent.as_ref() == Some(id) || begun.leans_on.contains(id)))
    }

    /// Reads `committed.json`; `None` when the store says that it is not there.
    pub async fn committed(&self, id: &BackupId) -> Result<Option<Committed>, RepoError> {
        let key = Key::new(self.place().committed(id));
        match self.document::<Committed>(&key).await {
            Ok(backup) if backup.id != *id => {
                Err(RepoError::damaged(&key, format_args!("it says that it is `{}`", backup.id)))
            }
            Ok(backup) => Ok(Some(backup)),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads the index of a backup's file list.
    pub async fn file_index(&self, id: &BackupId) -> Result<FileIndex, RepoError> {
        let key = Key::new(self.place().files(id));
        let mut json = Vec::new();
        let take = |block: &[u8]| {
            json.extend_from_slice(block);
            Ok(())
        };
        self.fetch(&key, take).await?;
        let index = FileIndex::parse(&json).map_err(|error| RepoError::of_document(&key, error))?;
        if index.id != *id || index.chunk_bytes != crate::format::CHUNK_BYTES {
            return Err(RepoError::damaged(&key, "it is the index of another backup"));
        }
        Ok(index)
    }
}
