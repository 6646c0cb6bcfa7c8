//! Making, giving, rotating and taking away keys of an encrypted cluster.
//!
//! Owns the order of the steps, so that whoever is killed between two of them, on any host, leaves a state in which
//! everything can be read and the step can be repeated. Never here: who may do it, and where user keys come from.
//!
//! ```text
//! add      every repository key wrapped under the new user key
//! rotate   new repository key wrapped under every user key  →  in-use.json
//! remove   leaving/<user key>-…  →  does our own user key open everything, and does it stay?
//!          no:  that mark deleted again, refused
//!          yes: its wrapped keys deleted, until none is listed any more  →  all marks about it deleted
//! ```
//!
//! Two hosts that remove each other's user key both say so before they look: at least one sees the other. Nobody deletes
//! another's mark while the key still opens something.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;

use super::encrypting::random_key;
use super::keyring::{
    KeyNames, KeySource, KeySourceError, Keyring, key_names, open_keys, opened, said_of,
};
use super::objects::Put;
use super::{KeyError, RepoError, Repository};
use crate::format::{
    Encryption, FORMAT_VERSION, KeyId, KeyMark, KeyObject, Made, RepositoryKeyName, SecretKey,
    WrappedKey,
};
use crate::pg::{PgTimestamp, SystemId};
use crate::store::Key;

/// Who changes keys, for the record.
#[derive(Debug, Clone)]
pub struct KeyTaker {
    /// The host.
    pub host: String,
    /// Its process.
    pub pid: u32,
    /// The time of its clock.
    pub at: PgTimestamp,
    /// The version of Highwater.
    pub tool: String,
}

impl KeyTaker {
    fn made(&self) -> Made {
        Made { at: self.at, host: self.host.clone(), tool: self.tool.clone() }
    }

    fn mark(&self, key: KeyId) -> KeyMark {
        let Self { host, pid, at, tool } = self.clone();
        KeyMark { format: FORMAT_VERSION, key, at, host, pid, tool }
    }
}

/// A user key that was read already.
#[derive(Debug)]
struct InHand(SecretKey);

impl KeySource for InHand {
    fn user_key(&self) -> Result<SecretKey, KeySourceError> {
        Ok(self.0.clone())
    }
}

/// A repository key as the names of stored objects show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RepositoryKeyState {
    /// Its id.
    pub repository_key: KeyId,
    /// 1 for the first of the cluster.
    pub number: u32,
    /// Whether objects are stored under it now.
    pub in_use: bool,
    /// Whether our user key opens it.
    pub opened: bool,
    /// The user keys that open it.
    pub user_keys: Vec<KeyId>,
}

/// The keys of a cluster as they stand.
#[derive(Debug, Clone)]
pub struct KeyRing {
    names: KeyNames,
    user_key: SecretKey,
    opened: BTreeMap<RepositoryKeyName, SecretKey>,
    /// What identities name.
    claimed: BTreeSet<RepositoryKeyName>,
    in_use: RepositoryKeyName,
}

impl KeyRing {
    /// Returns our user key's id.
    pub fn user_key(&self) -> KeyId {
        self.user_key.id()
    }

    /// Returns which repository key objects are stored under.
    pub fn in_use(&self) -> RepositoryKeyName {
        self.in_use
    }

    /// Returns every user key that opens at least one repository key.
    pub fn user_keys(&self) -> BTreeSet<KeyId> {
        self.names.wrapped.values().flatten().copied().collect()
    }

    /// Returns user keys whose removal was begun and not ended.
    pub fn leaving(&self) -> Vec<KeyId> {
        self.names.leaving.keys().copied().collect()
    }

    /// Returns the repository keys that are or were in use, oldest first. One that a rotation or an `init` made and died
    /// before it came into use is left out: nothing was stored under it.
    pub fn repository_keys(&self) -> Vec<RepositoryKeyState> {
        let state = |(name, users): (&RepositoryKeyName, &BTreeSet<KeyId>)| RepositoryKeyState {
            repository_key: name.id,
            number: name.number,
            in_use: *name == self.in_use,
            opened: self.opened.contains_key(name),
            user_keys: users.iter().copied().collect(),
        };
        self.used().map(state).collect()
    }

    /// Repository keys under which something may be stored.
    fn used(&self) -> impl Iterator<Item = (&RepositoryKeyName, &BTreeSet<KeyId>)> {
        let is_used = |name: &RepositoryKeyName| {
            self.claimed.contains(name) || self.names.in_use.contains(name)
        };
        self.names.wrapped.iter().filter(move |(name, _)| is_used(name))
    }

    /// Returns the repository keys that our user key does not open.
    pub fn not_opened(&self) -> Vec<RepositoryKeyName> {
        let closed = self.used().filter(|(name, _)| !self.opened.contains_key(name));
        closed.map(|(name, _)| *name).collect()
    }
}

impl Repository {
    /// Returns the same place as it is seen with another user key.
    ///
    /// # Errors
    /// [`KeyError::Missing`] if this one is not encrypted.
    pub fn with_user_key(&self, user_key: SecretKey) -> Result<Self, RepoError> {
        let below = self.keyring()?.below();
        Ok(Self::encrypted(below, self.cluster().clone(), Arc::new(InHand(user_key))))
    }

    fn keyring(&self) -> Result<&Keyring, RepoError> {
        let missing = || KeyError::Missing { cluster: self.cluster().clone() };
        Ok(self.its_keyring().ok_or_else(missing)?)
    }

    /// Reads all keys anew.
    ///
    /// # Errors
    /// [`RepoError::Key`] if no key is set, the cluster is not encrypted, or our key does not open the repository key
    /// that its identity names.
    pub async fn key_ring(&self) -> Result<KeyRing, RepoError> {
        let identities = self.identities().await?;
        let keyring = self.keyring()?;
        let named = identities.iter().filter_map(|identity| identity.encryption.as_ref());
        let claimed: BTreeSet<RepositoryKeyName> = named.map(Encryption::name).collect();
        let user_key = keyring.user_key().await?;
        let names = key_names(&**self.store(), self.place()).await?;
        let opened = open_keys(&**self.store(), self.place(), &names, &user_key).await?;
        let Some(in_use) = claimed.iter().chain(&names.in_use).max().copied() else {
            let key = Key::new(self.place().identity_dir());
            return Err(RepoError::NotClaimed { key });
        };
        Ok(KeyRing { names, user_key, opened, claimed, in_use })
    }

    /// Returns what the identity of a place is to say that is claimed now: of an encrypted place the repository key
    /// in use, of a new one a new key, which is wrapped under our user key first. `None` without a key.
    ///
    /// May be repeated: what an earlier call made is found again.
    pub async fn encryption_for_claim(
        &self,
        system_id: SystemId,
        is_free: bool,
        taker: &KeyTaker,
    ) -> Result<Option<Encryption>, RepoError> {
        let Some(keyring) = self.its_keyring() else { return Ok(None) };
        let said = |name, key: &SecretKey| Some(said_of(self.place(), system_id, name, key));
        if !is_free {
            let (name, key) = keyring.in_use().await?;
            return Ok(said(name, &key));
        }
        let user_key = keyring.user_key().await?;
        let names = key_names(&**self.store(), self.place()).await?;
        let opened = open_keys(&**self.store(), self.place(), &names, &user_key).await?;
        if let Some((name, key)) = opened.first_key_value() {
            return Ok(said(*name, key));
        }
        let key = random_key().map_err(RepoError::task)?;
        let name = RepositoryKeyName { number: 1, id: key.id() };
        self.put_wrapped(name, &key, &user_key, taker).await?;
        Ok(said(name, &key))
    }

    /// Lets `user_key` open everything that our own opens. Durable when it returns; may be repeated. Returns how many
    /// repository keys were wrapped.
    ///
    /// # Errors
    /// [`KeyError::NotOpened`] if our own does not open everything; [`RepoError::Leaving`] if it is being removed.
    pub async fn add_user_key(
        &self,
        user_key: &SecretKey,
        taker: &KeyTaker,
    ) -> Result<u64, RepoError> {
        let ring = self.key_ring().await?;
        self.check_opens_all(&ring)?;
        // Who removes it may be about to delete what we would find and count on.
        if ring.names.leaving.contains_key(&user_key.id()) {
            return Err(RepoError::Leaving { user_key: user_key.id() });
        }
        let mut added = 0;
        for (name, key) in &ring.opened {
            let users = ring.names.wrapped.get(name);
            if !users.is_some_and(|users| users.contains(&user_key.id())) {
                self.put_wrapped(*name, key, user_key, taker).await?;
                added += 1;
            }
        }
        Ok(added)
    }

    /// Makes a new repository key, which each of `user_keys` will open and our own, and then brings it into use. What was
    /// stored before stays under its old key.
    ///
    /// Interrupted before the last step it has changed nothing but names that nobody uses.
    pub async fn rotate(
        &self,
        user_keys: &[SecretKey],
        taker: &KeyTaker,
    ) -> Result<RepositoryKeyName, RepoError> {
        let ring = self.key_ring().await?;
        self.check_opens_all(&ring)?;
        let key = random_key().map_err(RepoError::task)?;
        let last = ring.names.wrapped.keys().map(|name| name.number).max().unwrap_or(0);
        let name = RepositoryKeyName { number: last.max(ring.in_use.number) + 1, id: key.id() };
        let own = std::iter::once(&ring.user_key);
        let mut wrapped = BTreeSet::new();
        for user_key in own.chain(user_keys) {
            if wrapped.insert(user_key.id()) {
                self.put_wrapped(name, &key, user_key, taker).await?;
            }
        }
        let mark = Key::new(self.place().key(KeyObject::InUse(name)));
        self.put_document(&mark, &taker.mark(name.id)).await?;
        Ok(name)
    }

    /// Takes the wrapped keys of a user key away: it opens nothing any more. May be repeated. Returns how many
    /// there were.
    ///
    /// # Errors
    /// [`RepoError::LastKey`] if a repository key would be left that no user key opens, or our own user key does not
    /// open everything; nothing was taken away then.
    pub async fn remove_user_key(
        &self,
        user_key: KeyId,
        taker: &KeyTaker,
    ) -> Result<u64, RepoError> {
        // With a wrong key nothing is written.
        self.key_ring().await?;
        let leaving = KeyObject::Leaving { user_key, remover: random_number()? };
        let mark = Key::new(self.place().key(leaving));
        self.put_document(&mark, &taker.mark(user_key)).await?;
        let mut removed = 0;
        loop {
            let ring = match self.key_ring().await {
                Ok(ring) => ring,
                Err(error) => {
                    // Nothing is deleted any more, so the mark may go; if it cannot, it makes others cautious.
                    let _ = self.store().delete(&mark).await;
                    return Err(error);
                }
            };
            if let Some(last) = last_without(&ring, user_key) {
                self.store().delete(&mark).await?;
                return Err(RepoError::LastKey { user_key, repository_key: last.id });
            }
            let wrapped = ring.names.wrapped.iter().filter(|(_, users)| users.contains(&user_key));
            let wrapped: Vec<RepositoryKeyName> = wrapped.map(|(name, _)| *name).collect();
            for key in &wrapped {
                let object = KeyObject::Wrapped { key: *key, user_key };
                self.store().delete(&Key::new(self.place().key(object))).await?;
                removed += 1;
            }
            if wrapped.is_empty() {
                for remover in ring.names.leaving.get(&user_key).into_iter().flatten() {
                    let mark = KeyObject::Leaving { user_key, remover: *remover };
                    self.store().delete(&Key::new(self.place().key(mark))).await?;
                }
                return Ok(removed);
            }
        }
    }

    fn check_opens_all(&self, ring: &KeyRing) -> Result<(), RepoError> {
        let Some(closed) = ring.not_opened().first().copied() else { return Ok(()) };
        let (cluster, user_key) = (self.cluster().clone(), ring.user_key());
        Err(KeyError::NotOpened { cluster, user_key, repository_key: closed.id }.into())
    }

    /// Stores a wrapped key. One that stands there already is as good, if it opens.
    async fn put_wrapped(
        &self,
        name: RepositoryKeyName,
        key: &SecretKey,
        user_key: &SecretKey,
        taker: &KeyTaker,
    ) -> Result<(), RepoError> {
        let object = KeyObject::Wrapped { key: name, user_key: user_key.id() };
        let at = Key::new(self.place().key(object));
        let wrapped = WrappedKey::new(self.cluster(), name, key, user_key, taker.made());
        match self.put_document(&at, &wrapped.map_err(RepoError::task)?).await {
            Ok(Put::Stored | Put::AlreadyThere) => Ok(()),
            Err(RepoError::Conflict { .. }) => {
                let standing: WrappedKey = self.document(&at).await?;
                opened(&at, self.place(), name, &standing, user_key).map(drop)
            }
            Err(error) => Err(error),
        }
    }
}

/// Returns a repository key that our own user key does not open, or would not once `user_key` and all that leave are gone:
/// what we cannot open ourselves we cannot vouch for.
fn last_without(ring: &KeyRing, user_key: KeyId) -> Option<RepositoryKeyName> {
    let ours = ring.user_key.id();
    let we_stay = ours != user_key && !ring.names.leaving.contains_key(&ours);
    let is_lost = |name: &RepositoryKeyName| !(we_stay && ring.opened.contains_key(name));
    ring.used().map(|(name, _)| *name).find(is_lost)
}

fn random_number() -> Result<u32, RepoError> {
    let mut bytes = [0; 4];
    aws_lc_rs::rand::fill(&mut bytes).map_err(RepoError::task)?;
    Ok(u32::from_le_bytes(bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests;
