//! The repository keys that a user key opens.
//!
//! Owns: when they are read, which one objects are stored under, and what is said when a key is missing, wrong or too
//! much. Never here: how bytes are encrypted (`format`), where a user key comes from (`cli`).
//!
//! Objects say under which repository key they stand, so readers need no order among keys. Writers take the last one
//! that is in use: the identity names the first, `in-use.json` each later one. A process reads the keys when it
//! needs one, again when it meets one that it does not know, and, to store, when they are older than [`RING_AGE_MAX`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use futures_util::future::try_join_all;
use tokio::sync::Mutex;

use super::objects::{DOCUMENT_BYTES_MAX, collect};
use super::{KeyError, RepoError};
use crate::format::{
    Document, Encryption, Identity, KeyId, KeyObject, Place, RepositoryKeyName, SecretKey,
    WrappedKey,
};
use crate::store::{Key, Store};

/// Objects are stored under keys that were read at most so long ago: a rotation reaches every process by then.
const RING_AGE_MAX: Duration = Duration::from_mins(5);

/// A key that was not there is looked for again after this.
const MISSED_AGE_MAX: Duration = Duration::from_secs(10);

/// How many wrapped keys are read at a time.
const IN_FLIGHT: usize = 8;

/// Where the user key comes from.
pub trait KeySource: fmt::Debug + Send + Sync {
    /// Returns the key. May block for a bounded time; is called once in a process.
    ///
    /// # Errors
    /// A sentence without the key or any part of it.
    fn user_key(&self) -> Result<SecretKey, KeySourceError>;
}

/// The user key could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KeySourceError(pub String);

/// What stands below `key/`, by names alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct KeyNames {
    /// By repository key, the user keys under which it is wrapped.
    pub(super) wrapped: BTreeMap<RepositoryKeyName, BTreeSet<KeyId>>,
    /// Repository keys that are marked as in use.
    pub(super) in_use: BTreeSet<RepositoryKeyName>,
    /// User keys that are being removed, with the marks of who does it.
    pub(super) leaving: BTreeMap<KeyId, Vec<u32>>,
}

/// Lists what stands below `key/`.
pub(super) async fn key_names(store: &dyn Store, place: &Place) -> Result<KeyNames, RepoError> {
    let root = place.keys_dir();
    let mut names = KeyNames::default();
    let mut listing = store.list(&Key::new(root.clone()));
    while let Some(listed) = listing.try_next().await? {
        let tail = listed.key.as_str().strip_prefix(&root).and_then(|tail| tail.strip_prefix('/'));
        match tail.and_then(KeyObject::parse) {
            Some(KeyObject::Wrapped { key, user_key }) => {
                names.wrapped.entry(key).or_default().insert(user_key);
            }
            Some(KeyObject::InUse(key)) => {
                names.in_use.insert(key);
            }
            Some(KeyObject::Leaving { user_key, remover }) => {
                names.leaving.entry(user_key).or_default().push(remover);
            }
            None => tracing::warn!("`{}` is not an object of Highwater; it is ignored", listed.key),
        }
    }
    Ok(names)
}

/// Reads and opens every repository key that `names` says is wrapped under `user_key`. One that is gone since, or
/// damaged, is left out, with a warning: what stands under the others needs it not.
///
/// # Errors
/// The store's only.
pub(super) async fn open_keys(
    store: &dyn Store,
    place: &Place,
    names: &KeyNames,
    user_key: &SecretKey,
) -> Result<BTreeMap<RepositoryKeyName, SecretKey>, RepoError> {
    let id = user_key.id();
    let ours = names.wrapped.iter().filter(|(_, users)| users.contains(&id));
    let ours: Vec<RepositoryKeyName> = ours.map(|(name, _)| *name).collect();
    let mut keys = BTreeMap::new();
    for names in ours.chunks(IN_FLIGHT) {
        let read = names.iter().map(|name| async move {
            let key = Key::new(place.key(KeyObject::Wrapped { key: *name, user_key: id }));
            let read = read_document(store, &key).await;
            let opened = read.and_then(|wrapped| opened(&key, place, *name, &wrapped, user_key));
            match opened {
                Ok(key) => Ok(Some((*name, key))),
                Err(RepoError::Store(error)) if !error.is_absent() => Err(RepoError::Store(error)),
                Err(error) => {
                    tracing::warn!("repository key {name} is not opened: {error}");
                    Ok(None)
                }
            }
        });
        keys.extend(try_join_all(read).await?.into_iter().flatten());
    }
    Ok(keys)
}

/// Opens a wrapped key that stands under the name `key`.
pub(super) fn opened(
    key: &Key,
    place: &Place,
    name: RepositoryKeyName,
    wrapped: &WrappedKey,
    user_key: &SecretKey,
) -> Result<SecretKey, RepoError> {
    let is_named = wrapped.number == name.number && wrapped.repository_key == name.id;
    let opened = wrapped.open(place.cluster(), user_key).filter(|_| is_named);
    opened.ok_or_else(|| {
        RepoError::damaged(key, "the key in it is not the one that was wrapped under this name")
    })
}

/// Reads a document that is never encrypted.
pub(super) async fn read_document<D: Document>(
    store: &dyn Store,
    key: &Key,
) -> Result<D, RepoError> {
    let reading = store.read(key, None).await?;
    let bytes = collect(key, reading.bytes, DOCUMENT_BYTES_MAX).await?.concat();
    D::parse(&bytes).map_err(|error| RepoError::of_document(key, error))
}

/// The keys as they were read.
struct Ring {
    names: KeyNames,
    opened: BTreeMap<RepositoryKeyName, SecretKey>,
    read_at: Instant,
}

impl Ring {
    fn key(&self, id: KeyId) -> Option<&SecretKey> {
        self.opened.iter().find(|(name, _)| name.id == id).map(|(_, key)| key)
    }
}

#[derive(Default)]
struct State {
    user_key: Option<SecretKey>,
    ring: Option<Ring>,
    /// The last repository key that an identity names, once one was read.
    claimed: Option<RepositoryKeyName>,
    /// Keys that were asked for and not found, and when.
    missed: BTreeMap<KeyId, Instant>,
}

/// The keys of one cluster, as this process has them.
pub(super) struct Keyring {
    source: Arc<dyn KeySource>,
    store: Arc<dyn Store>,
    place: Place,
    state: Mutex<State>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Keyring {
    /// `store` is the one below any encryption.
    pub(super) fn new(source: Arc<dyn KeySource>, store: Arc<dyn Store>, place: Place) -> Self {
        Self { source, store, place, state: Mutex::default() }
    }

    /// Returns the store below any encryption.
    pub(super) fn below(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Returns the user key.
    ///
    /// # Errors
    /// [`KeyError::Source`].
    pub(super) async fn user_key(&self) -> Result<SecretKey, RepoError> {
        self.state.lock().await.user_key(&self.source).await
    }

    /// Returns the repository key with this id.
    ///
    /// # Errors
    /// [`KeyError::Wrong`] or [`KeyError::NotOpened`] if our user key does not open it; [`KeyError::Unreadable`] if it
    /// would, but for a damaged object.
    pub(super) async fn key(&self, id: KeyId) -> Result<SecretKey, RepoError> {
        let mut state = self.state.lock().await;
        if let Some(key) = self.ring(&mut state).await?.key(id) {
            return Ok(key.clone());
        }
        let is_fresh = |missed: &Instant| missed.elapsed() < MISSED_AGE_MAX;
        if !state.missed.get(&id).is_some_and(is_fresh) {
            // It may have been made since.
            let ring = self.read(&mut state).await?;
            let found = ring.key(id).cloned();
            state.ring = Some(ring);
            if let Some(key) = found {
                return Ok(key);
            }
            state.missed.insert(id, Instant::now());
        }
        Err(self.not_opened(&mut state, id).await)
    }

    /// Checks that an identity is this cluster's, that it is encrypted with a key that we open, and that this
    /// is the very key.
    pub(super) async fn vet(&self, key: &Key, identity: &Identity) -> Result<(), RepoError> {
        let Some(said) = &identity.encryption else {
            return Err(KeyError::NotEncrypted { cluster: self.place.cluster().clone() }.into());
        };
        match self.key(said.repository_key).await {
            Ok(repository_key) => {
                let (cluster, system_id) = (self.place.cluster(), identity.system_identifier);
                if !said.is_proven_by(cluster, system_id, &repository_key) {
                    let why = "it was not made with the repository key that it names";
                    return Err(RepoError::damaged(key, why));
                }
            }
            // Where that one is damaged, or was never ours, a later one that we open will do: the wrapped key has a proof
            // of its own.
            Err(RepoError::Key(KeyError::NotOpened { .. } | KeyError::Unreadable { .. }))
                if self.opens_later(said).await? => {}
            Err(error) => return Err(error),
        }
        let mut state = self.state.lock().await;
        state.claimed = state.claimed.max(Some(said.name()));
        Ok(())
    }

    /// Returns whether we open the last repository key that is marked as in use, and it is later than the one in an
    /// identity.
    async fn opens_later(&self, said: &Encryption) -> Result<bool, RepoError> {
        let mut state = self.state.lock().await;
        let ring = self.ring(&mut state).await?;
        let last = ring.names.in_use.last();
        Ok(last.is_some_and(|last| *last > said.name() && ring.opened.contains_key(last)))
    }

    /// Returns the repository key that objects are stored under.
    ///
    /// # Errors
    /// As [`Self::key`]: a writer whose key was left out of a rotation does not go on under the old key.
    pub(super) async fn in_use(&self) -> Result<(RepositoryKeyName, SecretKey), RepoError> {
        let mut state = self.state.lock().await;
        let read_at = self.ring(&mut state).await?.read_at;
        if read_at.elapsed() > RING_AGE_MAX {
            match self.read(&mut state).await {
                Ok(ring) => state.ring = Some(ring),
                // Those that we have are as good for some time more.
                Err(error) => {
                    tracing::warn!("could not read the keys of the repository again: {error}");
                    if let Some(ring) = &mut state.ring {
                        ring.read_at = Instant::now();
                    }
                }
            }
        }
        let claimed = state.claimed;
        let ring = self.ring(&mut state).await?;
        let name = claimed.max(ring.names.in_use.last().copied());
        let name = name.ok_or_else(|| RepoError::task("no identity was read before a write"))?;
        match ring.opened.get(&name) {
            Some(key) => Ok((name, key.clone())),
            None => Err(self.not_opened(&mut state, name.id).await),
        }
    }

    async fn ring<'a>(&self, state: &'a mut State) -> Result<&'a Ring, RepoError> {
        if state.ring.is_none() {
            state.ring = Some(self.read(state).await?);
        }
        state.ring.as_ref().ok_or_else(|| RepoError::task("keys were read and are not there"))
    }

    async fn read(&self, state: &mut State) -> Result<Ring, RepoError> {
        let user_key = state.user_key(&self.source).await?;
        let names = key_names(&*self.store, &self.place).await?;
        let opened = open_keys(&*self.store, &self.place, &names, &user_key).await?;
        Ok(Ring { names, opened, read_at: Instant::now() })
    }

    async fn not_opened(&self, state: &mut State, repository_key: KeyId) -> RepoError {
        let user_key = match state.user_key(&self.source).await {
            Ok(key) => key.id(),
            Err(error) => return error,
        };
        let cluster = self.place.cluster().clone();
        let Some(ring) = &state.ring else { return KeyError::Missing { cluster }.into() };
        let wrapped = ring.names.wrapped.iter().find(|(name, _)| name.id == repository_key);
        if let Some((name, users)) = wrapped
            && users.contains(&user_key)
        {
            let document = Key::new(self.place.key(KeyObject::Wrapped { key: *name, user_key }));
            let others = users.iter().copied().filter(|other| *other != user_key).collect();
            return KeyError::Unreadable { cluster, document, user_key, repository_key, others }
                .into();
        }
        if !ring.opened.is_empty() {
            return KeyError::NotOpened { cluster, user_key, repository_key }.into();
        }
        let known: BTreeSet<KeyId> = ring.names.wrapped.values().flatten().copied().collect();
        KeyError::Wrong { cluster, user_key, known: known.into_iter().collect() }.into()
    }
}

impl State {
    async fn user_key(&mut self, source: &Arc<dyn KeySource>) -> Result<SecretKey, RepoError> {
        if let Some(key) = &self.user_key {
            return Ok(key.clone());
        }
        let source = Arc::clone(source);
        let read = tokio::task::spawn_blocking(move || source.user_key());
        let key = read.await.map_err(RepoError::task)?.map_err(KeyError::Source)?;
        self.user_key = Some(key.clone());
        Ok(key)
    }
}

/// Returns what an identity is to say that is made now.
pub(super) fn said_of(
    place: &Place,
    system_id: crate::pg::SystemId,
    name: RepositoryKeyName,
    key: &SecretKey,
) -> Encryption {
    Encryption::new(place.cluster(), system_id, name, key)
}
