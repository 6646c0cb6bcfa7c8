//! Whose place this is: claiming it once, and finding its owner again.

use futures_util::{StreamExt, TryStreamExt};

use super::objects::Put;
use super::{RepoError, Repository};
use crate::format::Identity;
use crate::pg::SystemId;
use crate::store::Key;

/// How many identities are read at a time.
const IN_FLIGHT: usize = 8;

/// What a claim found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// The place is ours from now on.
    Claimed,
    /// It was ours already.
    AlreadyOurs(Identity),
}

/// Returns the incarnation that lives in the place now: the one that succeeded all others.
pub fn claim_of(identities: &[Identity]) -> Option<&Identity> {
    identities.iter().max_by_key(|identity| (identity.incarnation, identity.claimed_at))
}

impl Repository {
    /// Reads every incarnation that ever claimed the place, oldest first; none means that it is free.
    pub async fn identities(&self) -> Result<Vec<Identity>, RepoError> {
        let level = self.store.list_level(&Key::new(self.place.identity_dir())).await?;
        let keys = level.objects.into_iter().map(|object| object.key);
        let keys = keys.filter(|key| {
            let system_id = key.file_name().strip_suffix(".json");
            system_id.is_some_and(|text| text.parse::<SystemId>().is_ok())
        });
        let mut identities: Vec<Identity> = futures_util::stream::iter(keys)
            .map(|key| async move { named_by(&key, self.document::<Identity>(&key).await?) })
            .buffered(IN_FLIGHT)
            .try_collect()
            .await?;
        identities.sort_by_key(|identity| (identity.incarnation, identity.claimed_at));
        Ok(identities)
    }

    /// Reads the identity of one incarnation.
    ///
    /// # Errors
    /// [`RepoError::NotClaimed`] if the store says that it is not there.
    pub async fn identity(&self, system_id: SystemId) -> Result<Identity, RepoError> {
        let key = Key::new(self.place.identity(system_id));
        match self.document::<Identity>(&key).await {
            Ok(identity) => named_by(&key, identity),
            Err(error) if error.is_absent() => Err(RepoError::NotClaimed { key }),
            Err(error) => Err(error),
        }
    }

    /// Claims the place for one incarnation. Idempotent: a second claim by the same
    /// incarnation finds the first.
    ///
    /// # Errors
    /// [`RepoError::Store`]; whether the place may be claimed is decided before.
    pub async fn claim(&self, identity: &Identity) -> Result<Claim, RepoError> {
        let key = Key::new(self.place.identity(identity.system_identifier));
        match self.put_document(&key, identity).await {
            Ok(Put::Stored | Put::AlreadyThere) => Ok(Claim::Claimed),
            Err(RepoError::Conflict { .. }) => {
                let standing = self.identity(identity.system_identifier).await?;
                Ok(Claim::AlreadyOurs(standing))
            }
            Err(error) => Err(error),
        }
    }
}

/// Checks that an identity stands under its own name.
fn named_by(key: &Key, identity: Identity) -> Result<Identity, RepoError> {
    if key.file_name() == format!("{}.json", identity.system_identifier) {
        return Ok(identity);
    }
    Err(RepoError::damaged(key, "it holds another system identifier than its name"))
}
