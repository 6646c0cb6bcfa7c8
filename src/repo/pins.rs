//! Pins: objects of their own that say which backups are to be kept, and until when.

use std::collections::BTreeMap;

use futures_util::{StreamExt, TryStreamExt};

use super::{Put, RepoError, Repository};
use crate::format::{BackupId, Pin, parse_pin};
use crate::pg::PgTimestamp;
use crate::store::Key;

/// How many pins are read at a time.
const IN_FLIGHT: usize = 8;

/// Pins of one second and one backup that are told apart.
const ATTEMPTS_PER_SECOND: u32 = 20;

/// A pin as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPin {
    /// Where it stands.
    pub key: Key,
    /// What it says; why it cannot be read, if so. Then it must be taken for one without an end.
    pub pin: Result<Pin, String>,
}

impl Repository {
    /// Reads every pin, by backup. One that is damaged is no error.
    ///
    /// # Errors
    /// The store's only: then nothing is known.
    pub async fn pins(&self) -> Result<BTreeMap<BackupId, Vec<StoredPin>>, RepoError> {
        let root = self.place().pins_dir();
        let listing = self.store().list(&Key::new(root.clone()));
        let mut reading = listing
            .map(|listed| {
                let root = root.clone();
                async move {
                    let key = listed?.key;
                    let Some(id) = backup_of(&root, &key) else {
                        tracing::warn!("`{key}` is not a pin of Highwater; it is ignored");
                        return Ok(None);
                    };
                    match self.document::<Pin>(&key).await {
                        Ok(pin) => Ok(Some((id, StoredPin { key, pin: Ok(pin) }))),
                        // Unpinned since it was listed.
                        Err(error) if error.is_absent() => Ok(None),
                        Err(error) if error.is_damage() => {
                            Ok(Some((id, StoredPin { key, pin: Err(error.to_string()) })))
                        }
                        Err(error) => Err(error),
                    }
                }
            })
            .buffered(IN_FLIGHT);
        let mut pins: BTreeMap<BackupId, Vec<StoredPin>> = BTreeMap::new();
        while let Some(found) = reading.try_next().await? {
            if let Some((id, pin)) = found {
                pins.entry(id).or_default().push(pin);
            }
        }
        Ok(pins)
    }

    /// Lists the pins of one backup without reading them.
    pub async fn pins_of(&self, id: &BackupId) -> Result<Vec<Key>, RepoError> {
        let level = self.store().list_level(&Key::new(self.place().pins_of_dir(id))).await?;
        Ok(level.objects.into_iter().map(|object| object.key).collect())
    }

    /// Stores a pin under a name of its own; durable when it returns. Repeated with the same document it finds itself.
    /// Whether the backup exists is the caller's to see, afterwards.
    ///
    /// # Errors
    /// [`RepoError::Conflict`] if too many pins of this second are there.
    pub async fn put_pin(&self, pin: &Pin) -> Result<Key, RepoError> {
        let moment = PgTimestamp::to_jiff(pin.created_at).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        let mut attempt = 1;
        loop {
            let key = Key::new(self.place().pin(&pin.backup, moment, attempt));
            match self.put_document(&key, pin).await {
                Ok(Put::Stored | Put::AlreadyThere) => return Ok(key),
                Err(RepoError::Conflict { .. }) if attempt < ATTEMPTS_PER_SECOND => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Deletes all pins of a backup; returns how many there were. May be repeated.
    pub async fn remove_pins(&self, id: &BackupId) -> Result<u64, RepoError> {
        let mut removed = 0;
        for key in self.pins_of(id).await? {
            self.store().delete(&key).await?;
            removed += 1;
        }
        Ok(removed)
    }
}

/// Returns the backup that a pin's key names.
fn backup_of(root: &str, key: &Key) -> Option<BackupId> {
    parse_pin(key.as_str().strip_prefix(root)?.strip_prefix('/')?)
}
