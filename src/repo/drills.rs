//! Records of drills: what was proved by restoring, starting and asking.
//!
//! Never here: doing a drill, or which records are kept.

use super::{Put, RepoError, Repository};
use crate::format::{BackupId, Drill, parse_drill};
use crate::store::Key;

/// Drills of one second that are told apart.
const ATTEMPTS_PER_SECOND: u32 = 20;

impl Repository {
    /// Stores the record of a drill under the name of the second in which it began; durable when it returns. Where
    /// another drill has taken that name, the next is tried; returns the name that it has got.
    ///
    /// # Errors
    /// The store's, which a retry may cure, and [`RepoError::Conflict`] if very many drills began in one second.
    pub async fn put_drill(&self, drill: &mut Drill) -> Result<BackupId, RepoError> {
        let began = drill.started_at.to_unix_micros().unwrap_or_default();
        let began = jiff::Timestamp::from_microsecond(began).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        let mut attempt = 1;
        loop {
            drill.id = BackupId::at(began, attempt);
            match self.put_document(&self.drill_key(&drill.id), drill).await {
                Ok(Put::Stored | Put::AlreadyThere) => return Ok(drill.id.clone()),
                Err(RepoError::Conflict { .. }) if attempt < ATTEMPTS_PER_SECOND => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Lists the drills that are on record, newest first. What is none of ours is passed over.
    pub async fn drill_ids(&self) -> Result<Vec<BackupId>, RepoError> {
        let level = self.store().list_level(&Key::new(self.place().drills_dir())).await?;
        let names = level.objects.iter().map(|listed| listed.key.file_name());
        let mut ids: Vec<BackupId> = names.filter_map(parse_drill).collect();
        ids.sort_unstable_by(|one, other| other.cmp(one));
        Ok(ids)
    }

    /// Reads the record of a drill.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if it is not that drill's; [`RepoError::is_absent`] if there is none.
    pub async fn drill(&self, id: &BackupId) -> Result<Drill, RepoError> {
        let key = self.drill_key(id);
        let drill: Drill = self.document(&key).await?;
        if drill.id == *id {
            Ok(drill)
        } else {
            Err(RepoError::damaged(&key, format!("it is the record of drill {}", drill.id)))
        }
    }

    /// Reads the newest record that can be read; `None` where no drill was ever done.
    ///
    /// # Errors
    /// The store's only.
    pub async fn last_drill(&self) -> Result<Option<Drill>, RepoError> {
        for id in self.drill_ids().await? {
            match self.drill(&id).await {
                Ok(drill) => return Ok(Some(drill)),
                Err(error) if error.is_absent() => {}
                Err(error @ (RepoError::Damaged { .. } | RepoError::NotReadable { .. })) => {
                    tracing::warn!("the record of a drill is passed over: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Returns where the record of a drill stands.
    pub fn drill_key(&self, id: &BackupId) -> Key {
        Key::new(self.place().drill(id))
    }
}
