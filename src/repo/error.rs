//! Why an archive verb did not do what was asked.

use crate::causes::in_one_line;
use crate::format::{ChunkMapError, CodecError, DocumentError, ListError, SealError};
use crate::pg::SystemId;
use crate::store::{Key, StoreError};

/// Why an archive verb did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RepoError {
    /// The store failed; see [`StoreError::is_transient`].
    #[error(transparent)]
    Store(#[from] StoreError),
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
    /// An object was written by a newer version, or encrypted.
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

impl RepoError {
    /// Returns whether the store itself said that the object does not exist.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_absent())
    }

    /// Returns whether the store does not allow this and a retry cannot cure it: what was to be deleted
    /// stays, for instance, where the credentials may only create or a lock holds the objects.
    pub fn is_not_allowed(&self) -> bool {
        use StoreError::{Denied, NoRoom, Refused};
        matches!(self, Self::Store(Denied { .. } | Refused { .. } | NoRoom { .. }))
    }

    pub(super) fn damaged(key: &Key, why: impl std::fmt::Display) -> Self {
        Self::Damaged { key: key.clone(), why: why.to_string() }
    }

    pub(super) fn of_seal(key: &Key, error: SealError) -> Self {
        match error {
            SealError::Encrypted(_) | SealError::Document(DocumentError::Newer { .. }) => {
                Self::NotReadable { key: key.clone(), cause: error }
            }
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
