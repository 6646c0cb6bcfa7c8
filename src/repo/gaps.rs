//! Records of WAL that was let go.
//!
//! Never here: whether a gap still harms anybody (`plan::stall`).

use futures_util::{StreamExt, TryStreamExt};

use super::{Put, RepoError, Repository};
use crate::format::{WalGap, parse_gap};
use crate::store::Key;

/// How many records are read at a time.
const IN_FLIGHT: usize = 8;

/// A record as it was read, and where it stands.
pub type StoredGap = (Key, Result<WalGap, RepoError>);

impl Repository {
    /// Stores the record of a gap; durable when it returns, and may be repeated.
    ///
    /// # Errors
    /// [`RepoError::Conflict`] if another host has recorded the very same gap in other words: it is recorded then.
    pub async fn put_gap(&self, gap: &WalGap) -> Result<Put, RepoError> {
        self.put_document(&self.gap_key(gap), gap).await
    }

    fn gap_key(&self, gap: &WalGap) -> Key {
        Key::new(self.place().gap(gap.system_identifier, &gap.tail()))
    }

    /// Reads all records, in order of their keys. One that cannot be read is told as an error of its own.
    ///
    /// # Errors
    /// The store's only.
    pub async fn gaps(&self) -> Result<Vec<StoredGap>, RepoError> {
        let root = self.place().gaps_dir();
        let listing = self.store().list(&Key::new(root.clone()));
        let keys: Vec<Key> = listing.map_ok(|listed| listed.key).try_collect().await?;
        let is_ours = |key: &Key| {
            let tail = key.as_str().strip_prefix(&root).and_then(|tail| tail.strip_prefix('/'));
            tail.is_some_and(|tail| parse_gap(tail).is_some())
        };
        let mut reading = futures_util::stream::iter(keys.into_iter().filter(is_ours))
            .map(|key| async move {
                match self.document::<WalGap>(&key).await {
                    Ok(gap) if key == self.gap_key(&gap) => Ok(Some((key, Ok(gap)))),
                    Ok(gap) => {
                        let why = format!("it is the record of `{}`", self.gap_key(&gap));
                        let error = RepoError::damaged(&key, why);
                        Ok(Some((key, Err(error))))
                    }
                    // Deleted by `expire` since it was listed.
                    Err(error) if error.is_absent() => Ok(None),
                    Err(error @ (RepoError::Damaged { .. } | RepoError::NotReadable { .. })) => {
                        Ok(Some((key, Err(error))))
                    }
                    Err(error) => Err(error),
                }
            })
            .buffered(IN_FLIGHT);
        let mut found = Vec::new();
        while let Some(one) = reading.try_next().await? {
            found.extend(one);
        }
        found.sort_by(|one: &StoredGap, other| one.0.cmp(&other.0));
        Ok(found)
    }
}
