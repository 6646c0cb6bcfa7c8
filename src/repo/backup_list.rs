//! Which backups there are, and reading one's file list.

use futures_util::{StreamExt, TryStreamExt};

use super::frames::FrameFetcher;
use super::{RepoError, Repository};
use crate::format::{
    BackupId, Begun, Committed, Document, FileEntry, FileIndex, FrameRef, parse_line,
};
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

/// A backup as the repository shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // a handful of these exist at a time
pub enum BackupState {
    /// It exists.
    Committed(Committed),
    /// It does not exist (yet).
    Unfinished(UnfinishedBackup),
}

impl Repository {
    /// Reads all backups, oldest first.
    pub async fn backups(&self) -> Result<Vec<BackupState>, RepoError> {
        futures_util::stream::iter(self.backup_ids().await?)
            .map(|id| async move { self.backup(&id).await })
            .buffered(IN_FLIGHT)
            .try_collect()
            .await
    }

    /// Reads all committed backups of one incarnation, oldest first. What is left of an
    /// unfinished backup is not looked at, so damage there stands in nobody's way.
    pub async fn committed_backups(
        &self,
        system_id: crate::pg::SystemId,
    ) -> Result<Vec<Committed>, RepoError> {
        let backups: Vec<Option<Committed>> = futures_util::stream::iter(self.backup_ids().await?)
            .map(|id| async move { self.committed(&id).await })
            .buffered(IN_FLIGHT)
            .try_collect()
            .await?;
        let ours = backups.into_iter().flatten();
        Ok(ours.filter(|backup| backup.system_identifier == system_id).collect())
    }

    /// Lists the ids of all backups, whatever their state, oldest first.
    async fn backup_ids(&self) -> Result<Vec<BackupId>, RepoError> {
        let level = self.store().list_level(&Key::new(self.place().backups_dir())).await?;
        Ok(level.directories.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Reads one backup's state.
    pub async fn backup(&self, id: &BackupId) -> Result<BackupState, RepoError> {
        match self.committed(id).await? {
            Some(backup) => Ok(BackupState::Committed(backup)),
            None => {
                let begun = self.document::<Begun>(&Key::new(self.place().begun(id))).await;
                let begun = match begun {
                    Ok(begun) => Some(begun),
                    Err(error) if error.is_absent() => None,
                    Err(error) => return Err(error),
                };
                Ok(BackupState::Unfinished(UnfinishedBackup { id: id.clone(), begun }))
            }
        }
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

    /// Reads the entries in one frame of a file list.
    pub async fn file_entries(&self, frame: &FrameRef) -> Result<Vec<FileEntry>, RepoError> {
        let fetcher = FrameFetcher::new(self.clone());
        let lines = fetcher.frame(frame).await?;
        let lines = lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines
            .map(|line| {
                parse_line(line).map_err(|e| RepoError::of_list(&fetcher.pack_key(frame), &e))
            })
            .collect()
    }
}
