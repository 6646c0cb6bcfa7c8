//! Why an archive verb did not do what was asked.

use super::encrypting::Refusal;
use super::keyring::KeySourceError;
use crate::causes::in_one_line;
use crate::format::{
    ChunkMapError, ClusterName, CodecError, DocumentError, EncryptionError, KeyId, ListError,
    SealError,
};
use crate::pg::SystemId;
use crate::store::{Key, StoreError};

/// Why an archive verb did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RepoError {
    /// The store failed; see [`StoreError::is_transient`].
    #[error(transparent)]
    Store(StoreError),
    /// The cluster is encrypted and our key does not fit, or it is not and we have one. Nothing was stored.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The store answers, but this cluster's identity is not there: the wrong bucket, prefix or
    /// name, an unmounted directory, or `init` was never run. Nothing can be said about what is absent.
    #[error("the repository holds no identity `{key}`")]
    NotClaimed {
        /// The identity that was looked for.
        key: Key,
    },
    /// The place belongs to another cluster.
    #[error("`{cluster}` belongs to the cluster with system identifier {owner}, not {ours}")]
    OtherCluster {
        /// The name in the repository.
        cluster: String,
        /// The incarnation that lives there.
        owner: SystemId,
        /// Ours.
        ours: SystemId,
    },
    /// The name is taken by other content. The stored object was not touched.
    #[error("`{key}` is stored already with other content ({stored}, not {ours})")]
    Conflict {
        /// The object's key.
        key: Key,
        /// What is stored: its digest or another mark.
        stored: String,
        /// The same of ours.
        ours: String,
    },
    /// An object is there but cannot be believed.
    #[error("`{key}` is damaged: {why}")]
    Damaged {
        /// The object's key.
        key: Key,
        /// What is wrong with it.
        why: String,
    },
    /// Without this user key nobody would be known to open a repository key.
    #[error("without user key {user_key} nobody is known to open repository key {repository_key}")]
    LastKey {
        /// The user key that was to go.
        user_key: KeyId,
        /// What it may be the last to open.
        repository_key: KeyId,
    },
    /// Somebody is removing this user key, or began to.
    #[error("user key {user_key} is being removed")]
    Leaving {
        /// The user key.
        user_key: KeyId,
    },
    /// An object was written by a newer version.
    #[error("`{key}` cannot be read by this version")]
    NotReadable {
        /// The object's key.
        key: Key,
        /// The reason.
        #[source]
        cause: SealError,
    },
    /// Taking the plain bytes failed, for instance because the disk is full.
    #[error("the bytes of `{key}` could not be written")]
    Sink {
        /// The object's key.
        key: Key,
        /// The local error.
        #[source]
        cause: std::io::Error,
    },
    /// A background task ended unexpectedly: a bug or no memory.
    #[error("a background task failed")]
    Task(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Why a cluster cannot be used with the key that is set, or without one. A retry cures none of them.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The cluster is encrypted, and no key is set.
    #[error("cluster `{cluster}` is encrypted, and no key is set")]
    Missing {
        /// The cluster.
        cluster: ClusterName,
    },
    /// A key is set, and the cluster is not encrypted.
    #[error("a key is set, and cluster `{cluster}` was set up without encryption")]
    NotEncrypted {
        /// The cluster.
        cluster: ClusterName,
    },
    /// The key could not be had.
    #[error("the key could not be read")]
    Source(#[source] KeySourceError),
    /// The key opens nothing here.
    #[error(
        "key {user_key} opens nothing of cluster `{cluster}`{}", these_do(.known)
    )]
    Wrong {
        /// The cluster.
        cluster: ClusterName,
        /// Our key.
        user_key: KeyId,
        /// The keys that open something.
        known: Vec<KeyId>,
    },
    /// The key opens something here, but not this.
    #[error("key {user_key} does not open repository key {repository_key} of cluster `{cluster}`")]
    NotOpened {
        /// The cluster.
        cluster: ClusterName,
        /// Our key.
        user_key: KeyId,
        /// What it was needed for.
        repository_key: KeyId,
    },
    /// The key would open this, but the object that says how is damaged.
    #[error(
        "`{document}`, by which key {user_key} opens repository key {repository_key} of cluster `{cluster}`, is damaged or of a newer format{}", these_do(.others)
    )]
    Unreadable {
        /// The cluster.
        cluster: ClusterName,
        /// The wrapped key that cannot be read.
        document: Key,
        /// Our key.
        user_key: KeyId,
        /// What it was needed for.
        repository_key: KeyId,
        /// The other keys that open it.
        others: Vec<KeyId>,
    },
}

fn these_do(known: &[KeyId]) -> String {
    let known: Vec<String> = known.iter().map(ToString::to_string).collect();
    if known.is_empty() { String::new() } else { format!("; {} would", known.join(" or ")) }
}

/// What an encrypted cluster's store refused becomes what it was.
impl From<StoreError> for RepoError {
    fn from(error: StoreError) -> Self {
        let StoreError::Refused { key, cause } = error else { return Self::Store(error) };
        match cause.downcast::<Refusal>() {
            Ok(refusal) => match *refusal {
                Refusal::Keys(error) => error,
                Refusal::Object(newer @ EncryptionError::Newer(_)) => {
                    Self::NotReadable { key, cause: SealError::Encryption(newer) }
                }
                Refusal::Object(error) => Self::damaged(&key, error),
            },
            Err(cause) => Self::Store(StoreError::Refused { key, cause }),
        }
    }
}

impl RepoError {
    /// Returns whether the store itself said that the object does not exist.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_absent())
    }

    /// Returns whether something is known about the very object: it is damaged, of a newer format, or stored under a
    /// key of which our share is damaged. It is not so of a store that fails.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. }
                | Self::NotReadable { .. }
                | Self::Key(KeyError::Unreadable { .. })
        )
    }

    /// Returns whether the store does not allow this and a retry cannot cure it: what was to be deleted
    /// stays, for instance, where the credentials may only create or a lock holds the objects.
    pub fn is_not_allowed(&self) -> bool {
        use StoreError::{Denied, NoRoom, Refused};
        matches!(self, Self::Store(Denied { .. } | Refused { .. } | NoRoom { .. }))
    }

    /// Returns whether the disk of a local repository did not confirm what was written: to be written anew, and not for ever.
    pub fn is_not_confirmed(&self) -> bool {
        matches!(self, Self::Store(StoreError::NotConfirmed { .. }))
    }

    pub(super) fn damaged(key: &Key, why: impl std::fmt::Display) -> Self {
        Self::Damaged { key: key.clone(), why: why.to_string() }
    }

    pub(super) fn of_seal(key: &Key, error: SealError) -> Self {
        match error {
            SealError::Document(DocumentError::Newer { .. }) => {
                Self::NotReadable { key: key.clone(), cause: error }
            }
            SealError::Encrypted => match key.as_str().split('/').next().map(str::parse) {
                Some(Ok(cluster)) => KeyError::Missing { cluster }.into(),
                _ => Self::damaged(key, error),
            },
            other => Self::damaged(key, other),
        }
    }

    pub(super) fn of_document(key: &Key, error: DocumentError) -> Self {
        Self::of_seal(key, SealError::Document(error))
    }

    pub(super) fn of_codec(key: &Key, error: &CodecError) -> Self {
        Self::damaged(key, in_one_line(error))
    }

    pub(super) fn of_map(key: &Key, error: ChunkMapError) -> Self {
        Self::damaged(key, error)
    }

    pub(super) fn of_list(key: &Key, error: &ListError) -> Self {
        Self::damaged(key, in_one_line(error))
    }

    pub(super) fn task(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Task(error.into())
    }
}
