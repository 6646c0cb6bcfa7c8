//! Taking objects from one repository of a cluster to another: sealed as they are, and checked on the way.
//!
//! Never here: which objects, when, and what becomes of those that were taken.

use futures_util::TryStreamExt;

use super::objects::DOCUMENT_BYTES_MAX;
use super::{RepoError, Repository, SealedObject};
use crate::store::{Body, Key, StoreError};

impl Repository {
    /// Reads a whole sealed object, with its digest checked, ready to be stored elsewhere under the same key.
    ///
    /// # Errors
    /// As [`Self::fetch`]: [`RepoError::Damaged`] if it is not what its header says.
    pub async fn fetch_object(&self, key: &Key) -> Result<SealedObject, RepoError> {
        let fetched = self.fetch_sealed(key).await?;
        let body = fetched.body();
        let header = fetched.unseal(|_| Ok(()))?;
        Ok(SealedObject { header, body })
    }

    /// Makes `self` claimed as `other` is: identities and documents about keys are brought over, and what is gone there
    /// goes here. A key that was removed there opens nothing new here, then.
    ///
    /// # Errors
    /// The stores'. What was brought over by then stands; it may be repeated.
    pub async fn take_claims_of(&self, other: &Self) -> Result<(), RepoError> {
        // Keys first: an identity that says that the cluster is encrypted is of no use without.
        for directory in [other.place().keys_dir(), other.place().identity_dir()] {
            let root = Key::new(directory);
            let theirs: Vec<Key> =
                other.store().list(&root).map_ok(|listed| listed.key).try_collect().await?;
            for key in &theirs {
                let bytes = other.read_whole(key, DOCUMENT_BYTES_MAX).await?.concat();
                match self.store().create(key, Body::from(bytes)).await {
                    Ok(()) | Err(StoreError::Exists { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let ours: Vec<Key> =
                self.store().list(&root).map_ok(|listed| listed.key).try_collect().await?;
            for key in ours.iter().filter(|key| !theirs.contains(key)) {
                self.store().delete(key).await?;
            }
        }
        Ok(())
    }
}
