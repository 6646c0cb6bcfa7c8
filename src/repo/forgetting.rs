//! What retention looks at and deletes, object by object.
//!
//! Owns the listings by which objects are told apart, and the order inside one backup: `committed.json` first, so that
//! the backup does not exist any more, then `begun.json`, so that nobody takes the rest for a backup in the making.
//! Never here: which of them go.

use std::time::SystemTime;

use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};

use super::{RepoError, Repository};
use crate::format::{BackupId, BackupObject, WalObject, parse_backup_object, parse_wal_object};
use crate::pg::{SystemId, Timeline};
use crate::store::{Key, Listed};

/// 4 GiB of WAL of one timeline, as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct WalGroup {
    /// The timeline.
    pub timeline: Timeline,
    /// The number of the 4 GiB.
    pub log: u32,
}

/// An object of a group of WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedWalObject {
    /// What it is.
    pub object: WalObject,
    /// Its size as stored.
    pub size_bytes: u64,
    /// When it was stored, by the store's clock.
    pub modified: SystemTime,
}

/// An object of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedBackupObject {
    /// What it is; `None` for what this version does not store.
    pub object: Option<BackupObject>,
    /// How the store lists it.
    pub listed: Listed,
}

impl Repository {
    /// Lists the groups of WAL of one incarnation: oldest WAL first, timeline by timeline.
    pub async fn wal_groups(&self, system_id: SystemId) -> Result<Vec<WalGroup>, RepoError> {
        let root = Key::new(self.place().wal_dir(system_id));
        let level = self.store().list_level(&root).await?;
        let mut groups: Vec<WalGroup> =
            level.directories.iter().filter_map(|name| parse_group(name)).collect();
        groups.sort_unstable();
        Ok(groups)
    }

    /// Lists what is stored in a group of WAL, in no particular order. What is not ours is passed over.
    pub fn wal_objects(
        &self,
        system_id: SystemId,
        group: &WalGroup,
    ) -> BoxStream<'static, Result<ListedWalObject, RepoError>> {
        let name = format!("{:08X}{:08X}", group.timeline.0, group.log);
        let root = self.place().wal_dir(system_id);
        let prefix = Key::new(self.place().wal_group_dir(system_id, &name));
        let known = move |listed: Listed| {
            let tail = listed.key.as_str().strip_prefix(&root).and_then(|t| t.strip_prefix('/'));
            let object = tail.and_then(parse_wal_object);
            let Listed { size_bytes, modified, .. } = listed;
            object.map(|object| ListedWalObject { object, size_bytes, modified })
        };
        let listing = self.store().list(&prefix).map_err(RepoError::from);
        listing.try_filter_map(move |listed| std::future::ready(Ok(known(listed)))).boxed()
    }

    /// Lists what is stored of a backup, in no particular order.
    pub fn backup_objects(
        &self,
        id: &BackupId,
    ) -> BoxStream<'static, Result<ListedBackupObject, RepoError>> {
        let directory = self.place().backup_dir(id);
        let listing = self.store().list(&Key::new(directory.clone())).map_err(RepoError::from);
        let told = move |listed: Listed| {
            let tail = listed.key.as_str().strip_prefix(&directory);
            let object = tail.and_then(|t| t.strip_prefix('/')).and_then(parse_backup_object);
            ListedBackupObject { object, listed }
        };
        listing.map_ok(told).boxed()
    }

    /// Returns when something of a backup was stored last, by the store's clock; `None` if nothing is stored.
    pub async fn last_stored_of(&self, id: &BackupId) -> Result<Option<SystemTime>, RepoError> {
        let mut last = None;
        let mut objects = self.backup_objects(id);
        while let Some(object) = objects.try_next().await? {
            last = last.max(Some(object.listed.modified));
        }
        Ok(last)
    }

    /// Returns the key of a backup's `committed.json`. Once that is deleted, the backup does not exist. Everything
    /// else of it stays, and whoever deletes that looks first for backups that lean on it.
    pub fn committed_key(&self, id: &BackupId) -> Key {
        Key::new(self.place().committed(id))
    }

    /// Returns the key of a backup's `begun.json`. Once that is deleted, a backup in the making cannot be committed any more.
    pub fn begun_key(&self, id: &BackupId) -> Key {
        Key::new(self.place().begun(id))
    }

    /// Deletes an object so that it stays deleted, whatever happens to the machine. That it is not there is success.
    pub async fn delete(&self, key: &Key) -> Result<(), RepoError> {
        Ok(self.store().delete(key).await?)
    }

    /// Deletes an object whose return after a crash of the machine would harm nobody.
    pub async fn discard(&self, key: &Key) -> Result<(), RepoError> {
        Ok(self.store().discard(key).await?)
    }
}

fn parse_group(name: &str) -> Option<WalGroup> {
    let is_upper_hex = |byte: u8| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte);
    if name.len() != 16 || !name.bytes().all(is_upper_hex) {
        return None;
    }
    let part = |range: std::ops::Range<usize>| u32::from_str_radix(&name[range], 16).ok();
    Some(WalGroup { timeline: Timeline(part(0..8)?), log: part(8..16)? })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pg::{SegmentName, SegmentSize};

    #[test]
    fn groups_are_what_segments_call_theirs() {
        let segment = SegmentName::new(Timeline(0x1A), 0x12_3456, SegmentSize::DEFAULT);
        let group = parse_group(&segment.group()).unwrap();
        assert_eq!(group, WalGroup { timeline: Timeline(0x1A), log: segment.log });
        for foreign in ["", "00000001", "000000010000000a", "00000001000000000", "+000000100000000"]
        {
            assert_eq!(parse_group(foreign), None, "{foreign}");
        }
    }
}
