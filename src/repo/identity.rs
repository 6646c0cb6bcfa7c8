//! Whose place this is: claiming it once, and finding its owner again.

use futures_util::future::try_join_all;

use super::objects::Put;
use super::{KeyError, RepoError, Repository};
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
    ///
    /// # Errors
    /// [`RepoError::Key`] if the cluster is encrypted and we are not set up for it, or the other way round.
    pub async fn identities(&self) -> Result<Vec<Identity>, RepoError> {
        let level = self.store.list_level(&Key::new(self.place.identity_dir())).await?;
        let keys = level.objects.into_iter().map(|object| object.key);
        let keys = keys.filter(|key| {
            let system_id = key.file_name().strip_suffix(".json");
            system_id.is_some_and(|text| text.parse::<SystemId>().is_ok())
        });
        let keys: Vec<Key> = keys.collect();
        let mut identities = Vec::with_capacity(keys.len());
        for keys in keys.chunks(IN_FLIGHT) {
            let read = keys.iter().map(|key| async move {
                let identity = self.document::<Identity>(key).await?;
                named_by(key, identity)
            });
            identities.extend(try_join_all(read).await?);
        }
        identities.sort_by_key(|identity| (identity.incarnation, identity.claimed_at));
        for identity in &identities {
            self.vet(identity).await?;
        }
        Ok(identities)
    }

    /// Reads the identity of one incarnation.
    ///
    /// # Errors
    /// [`RepoError::NotClaimed`] if the store says that it is not there; [`RepoError::Key`] as for
    /// [`Self::identities`].
    pub async fn identity(&self, system_id: SystemId) -> Result<Identity, RepoError> {
        let key = Key::new(self.place.identity(system_id));
        match self.document::<Identity>(&key).await {
            Ok(identity) => {
                let identity = named_by(&key, identity)?;
                self.vet(&identity).await?;
                Ok(identity)
            }
            Err(error) if error.is_absent() => Err(RepoError::NotClaimed { key }),
            Err(error) => Err(error),
        }
    }

    /// Checks that the cluster is encrypted as we are set up, and that our key is the right one. From then on this
    /// process may store in the place.
    async fn vet(&self, identity: &Identity) -> Result<(), RepoError> {
        let key = Key::new(self.place.identity(identity.system_identifier));
        match (self.its_keyring(), &identity.encryption) {
            (None, None) => {}
            (None, Some(_)) => {
                return Err(KeyError::Missing { cluster: self.cluster().clone() }.into());
            }
            (Some(keyring), _) => keyring.vet(&key, identity).await?,
        }
        // Set by another task meanwhile: to the same.
        let _ = self.vetted.set(());
        Ok(())
    }

    /// Makes sure that [`Self::vet`] was passed before anything is stored under `key`, whatever the caller did.
    pub(super) async fn vet_before_storing(&self, key: &Key) -> Result<(), RepoError> {
        if self.vetted.initialized() || self.place.encrypted_name(key.as_str()).is_none() {
            return Ok(());
        }
        self.identities().await.map(drop)
    }

    /// Claims the place for one incarnation. Idempotent: a second claim by the same
    /// incarnation finds the first.
    ///
    /// # Errors
    /// [`RepoError::Store`]; whether the place may be claimed is decided before.
    pub async fn claim(&self, identity: &Identity) -> Result<Claim, RepoError> {
        let key = Key::new(self.place.identity(identity.system_identifier));
        match self.put_document(&key, identity).await {
            Ok(Put::Stored | Put::AlreadyThere) => {
                self.vet(identity).await?;
                Ok(Claim::Claimed)
            }
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
