//! `key list`, `add`, `rotate`, `rewrap` and `remove`: who can open an encrypted cluster.
//!
//! The order of the steps, and why nobody is ever locked out by half of them, is `repo`'s. Never here: where user keys
//! come from.

use std::collections::BTreeSet;

use serde::Serialize;

use super::failures::of_repo;
use super::key_taker;
use crate::failure::{Failure, Kind};
use crate::format::{KeyId, SecretKey};
use crate::repo::{KeyRing, RepoError, Repository, RepositoryKeyState};

/// Nothing that was stored is ever touched by any of these.
const UNHARMED: &str = "Nothing that was stored was touched; whoever could read it still can.";

/// A user key, as the repository knows it. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UserKey {
    /// Its id.
    pub user_key: KeyId,
    /// Whether it is the one that is set here.
    pub in_hand: bool,
    /// Whether it opens every repository key.
    pub opens_all: bool,
    /// Whether its removal was begun and not ended.
    pub leaving: bool,
}

/// The keys of a cluster. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct Keys {
    /// The cluster's name.
    pub cluster: String,
    /// The repository's URL.
    pub repository: String,
    /// Who can open it.
    pub user_keys: Vec<UserKey>,
    /// What they open, oldest first.
    pub repository_keys: Vec<RepositoryKeyState>,
}

/// What a change did, and how the keys stand now. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct Changed {
    /// `added`, `rotated`, `rewrapped` or `removed`.
    pub done: &'static str,
    /// The key that it was about: a user key, or the new repository key.
    pub key: KeyId,
    /// How the keys stand now.
    #[serde(flatten)]
    pub keys: Keys,
}

/// Tells the keys of the cluster.
///
/// # Errors
/// [`Kind::Usage`] if no key is set, or one that does not open this cluster.
pub async fn list(repository: &Repository) -> Result<Keys, Failure> {
    Ok(keys(repository, &ring(repository).await?))
}

/// Lets another user key open everything.
///
/// # Errors
/// As [`list`]; [`Kind::Conflict`] if that key is being removed.
pub async fn add(
    repository: &Repository,
    user_key: &SecretKey,
    host: String,
) -> Result<Changed, Failure> {
    let id = user_key.id();
    let failed = |error| of_repo(error, format!("could not add user key {id}"), UNHARMED);
    repository.add_user_key(user_key, &key_taker(host)).await.map_err(failed)?;
    Ok(Changed { done: "added", key: id, keys: list(repository).await? })
}

/// Brings a new repository key into use. `user_keys` are all others that shall open it; `left_out` those
/// that shall not, each by name: nobody is locked out by being forgotten.
///
/// # Errors
/// As [`list`]; [`Kind::Usage`] if a user key is neither given nor left out.
pub async fn rotate(
    repository: &Repository,
    user_keys: &[SecretKey],
    left_out: &BTreeSet<KeyId>,
    host: String,
) -> Result<Changed, Failure> {
    let ring = ring(repository).await?;
    let given: BTreeSet<KeyId> =
        user_keys.iter().map(SecretKey::id).chain([ring.user_key()]).collect();
    let known = ring.user_keys();
    let forgotten: Vec<KeyId> =
        known.iter().filter(|id| !given.contains(id) && !left_out.contains(id)).copied().collect();
    let usage = |what: String, next: &str| Err(Failure::new(Kind::Usage, what, UNHARMED, next));
    if !forgotten.is_empty() {
        return usage(
            format!("user keys that open this cluster were not given: {}", in_words(&forgotten)),
            "Give the file of each with `--also FILE`, or say with `--leave-out ID` that it shall not open what is stored from now on.",
        );
    }
    if let Some(both) = left_out.iter().find(|id| given.contains(id) || !known.contains(id)) {
        return usage(
            format!("user key {both} cannot be left out: it is given as well, or opens nothing"),
            "`highwater key list` shows the user keys.",
        );
    }
    if let Some(stranger) = given.iter().find(|id| !known.contains(id)) {
        return usage(
            format!("user key {stranger} opens nothing of this cluster yet"),
            "Add it first, so that it opens what is stored already too: `highwater key add FILE`.",
        );
    }
    let failed = |error| of_repo(error, "could not bring a new repository key into use", UNHARMED);
    let rotated = repository.rotate(user_keys, &key_taker(host)).await.map_err(failed)?;
    Ok(Changed { done: "rotated", key: rotated.id, keys: list(repository).await? })
}

/// Lets a new user key open everything in the place of the one that is set, which opens nothing any more.
///
/// # Errors
/// As [`add`]. Interrupted, both may open everything; it may be repeated, or ended with `key remove`.
pub async fn rewrap(
    repository: &Repository,
    new: &SecretKey,
    host: String,
) -> Result<Changed, Failure> {
    let old = ring(repository).await?.user_key();
    if old == new.id() {
        let what = format!("key {old} is the one that is set already");
        let next = "Make a new one first: `highwater key new FILE`.";
        return Err(Failure::new(Kind::Usage, what, UNHARMED, next));
    }
    add(repository, new, host.clone()).await?;
    let failed = |error| of_repo(error, "could not look through the new key", UNHARMED);
    let successor = repository.with_user_key(new.clone()).map_err(failed)?;
    let removed = remove(&successor, old, host).await?;
    Ok(Changed { done: "rewrapped", key: new.id(), keys: removed.keys })
}

/// Makes a user key open nothing any more.
///
/// # Errors
/// As [`list`]; [`Kind::Conflict`] unless the key that is set is another and opens everything;
/// [`Kind::Absent`] if it opened nothing.
pub async fn remove(
    repository: &Repository,
    user_key: KeyId,
    host: String,
) -> Result<Changed, Failure> {
    let ring = ring(repository).await?;
    if !ring.user_keys().contains(&user_key) && !ring.leaving().contains(&user_key) {
        let what = format!("user key {user_key} opens nothing of this cluster");
        let next = "`highwater key list` shows the user keys.";
        return Err(Failure::new(Kind::Absent, what, UNHARMED, next));
    }
    let failed = |error: RepoError| {
        let unharmed =
            "Nothing that was stored was touched, and the key that is set opens as much as before.";
        of_repo(error, format!("could not remove user key {user_key}"), unharmed)
    };
    repository.remove_user_key(user_key, &key_taker(host)).await.map_err(failed)?;
    Ok(Changed { done: "removed", key: user_key, keys: list(repository).await? })
}

async fn ring(repository: &Repository) -> Result<KeyRing, Failure> {
    let what = || format!("could not read the keys of `{}`", repository.cluster());
    repository.key_ring().await.map_err(|error| of_repo(error, what(), UNHARMED))
}

fn keys(repository: &Repository, ring: &KeyRing) -> Keys {
    let repository_keys = ring.repository_keys();
    let leaving = ring.leaving();
    let user_key = |id: KeyId| UserKey {
        user_key: id,
        in_hand: id == ring.user_key(),
        opens_all: repository_keys.iter().all(|key| key.user_keys.contains(&id)),
        leaving: leaving.contains(&id),
    };
    Keys {
        cluster: repository.cluster().to_string(),
        repository: repository.describe(),
        user_keys: ring.user_keys().into_iter().map(user_key).collect(),
        repository_keys,
    }
}

fn in_words(ids: &[KeyId]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
