//! The seam to object storage: one small trait, its drivers and decorators.
//!
//! Owns: how an object is created once, read, listed and deleted, and what a
//! failure to do so means. Never here: WAL, backups, the grammar of keys,
//! compression.
//!
//! The invariant everything above relies on: [`Store::create`] never replaces
//! an object, and [`StoreError::Absent`] is returned only when the store itself
//! said that the key does not exist.

mod aws_credentials;
mod body;
pub mod clients;
mod cloud;
mod cloud_errors;
mod contract;
pub mod faults;
pub mod file;
mod file_errors;
mod file_publish;
mod file_walk;
pub mod memory;
pub mod open;
pub mod options;
mod random;
pub mod retry;
pub mod url;

pub use body::{Body, BodyWriter};

use std::fmt;
use std::ops::Range;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;

/// The name of an object: `/`-separated, relative to the repository's root,
/// without a leading or trailing slash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// Makes a key from text that `format::names` has built.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the part after the last slash.
    pub fn file_name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The object's key.
    pub key: Key,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// When the store says that it was written, by the store's own clock.
    pub modified: SystemTime,
}

/// One level of the tree below a prefix.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Level {
    /// Names (last part only) that have objects below them, sorted.
    pub directories: Vec<String>,
    /// Objects directly at this level, sorted by key.
    pub objects: Vec<Listed>,
}

/// An object that is being read.
pub struct Reading {
    /// The size of the whole object, in bytes, also when a range was asked for.
    pub size_bytes: u64,
    /// The bytes asked for, in order. Ends early only with an error.
    pub bytes: BoxStream<'static, Result<Bytes, StoreError>>,
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading").field("size_bytes", &self.size_bytes).finish_non_exhaustive()
    }
}

/// Any cause a driver keeps.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why a store call did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store said that there is no such key. Note that some stores say the
    /// same of a missing bucket: callers for whom that matters look for an
    /// object that must exist.
    #[error("`{key}` does not exist")]
    Absent {
        /// The key asked for.
        key: Key,
    },
    /// The key was there already, or another writer (perhaps an earlier attempt
    /// of our own whose answer was lost) is creating it. The caller settles
    /// it by reading the object back.
    #[error("`{key}` exists already")]
    Exists {
        /// The key that was to be created.
        key: Key,
    },
    /// Credentials are missing, wrong, or do not allow this. A retry cannot cure it.
    #[error("access to `{key}` was denied")]
    Denied {
        /// The key, or the prefix listed.
        key: Key,
        /// What the store said.
        #[source]
        cause: Cause,
    },
    /// There is no room left, or the store is read-only.
    #[error("`{key}` could not be written: the store is full or read-only")]
    NoRoom {
        /// The key that was to be written.
        key: Key,
        /// What the store said.
        #[source]
        cause: Cause,
    },
    /// The store could not be reached, was too slow or answered that it is busy.
    /// A later attempt may succeed. Whether a `create` took effect is unknown.
    #[error("the store did not complete the request for `{key}`")]
    Unavailable {
        /// The key, or the prefix listed.
        key: Key,
        /// What went wrong on the way.
        #[source]
        cause: Cause,
    },
    /// The disk of a local repository did not confirm what was written (`fsync` failed), so that nobody knows what of it
    /// is there after a crash. The same call made again writes it anew.
    #[error("the disk did not confirm what was written for `{key}`")]
    NotConfirmed {
        /// The key that was to be written.
        key: Key,
        /// What the system said.
        #[source]
        cause: Cause,
    },
    /// The store understood and refused, for a reason that a retry cannot cure
    /// (no such bucket, an unsupported request, a bad argument).
    #[error("the store refused the request for `{key}`")]
    Refused {
        /// The key, or the prefix listed.
        key: Key,
        /// What the store said.
        #[source]
        cause: Cause,
    },
}

impl StoreError {
    /// Returns whether the same call may succeed later without anybody's help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::NotConfirmed { .. })
    }

    /// Returns whether the store itself said that the key does not exist.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Absent { .. })
    }
}

/// A place that keeps objects.
///
/// Every driver passes the same contract battery (`tests/store_contract/`).
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync {
    /// Creates the object if the key is free; never replaces one.
    ///
    /// When this returns `Ok`, the object is durable and whole; no reader ever
    /// sees a part of it. Of several concurrent creates of one key exactly one succeeds.
    ///
    /// # Errors
    /// [`StoreError::Exists`] if the key is taken. After
    /// [`StoreError::Unavailable`] the object may or may not exist.
    async fn create(&self, key: &Key, body: Body) -> Result<(), StoreError>;

    /// Opens the object for reading; `range` is in bytes, its end excluded and
    /// clipped to the object's size. A range that begins at or behind the end is [`StoreError::Refused`].
    ///
    /// # Errors
    /// [`StoreError::Absent`] if the store says that there is no such key.
    async fn read(&self, key: &Key, range: Option<Range<u64>>) -> Result<Reading, StoreError>;

    /// Lists every object whose key begins with the directory `prefix` (whole
    /// path components; empty for all), in no particular order, page by page.
    ///
    /// After an error the stream must not be taken for complete: it may end, or
    /// go on where it stood if it is polled again.
    fn list(&self, prefix: &Key) -> BoxStream<'static, Result<Listed, StoreError>>;

    /// Lists one level below the directory `prefix`. A directory that does not exist is empty.
    async fn list_level(&self, prefix: &Key) -> Result<Level, StoreError>;

    /// Deletes the object. Deleting what is not there is success.
    async fn delete(&self, key: &Key) -> Result<(), StoreError>;

    /// As [`Self::delete`], for an object whose return would harm nobody: where the machine loses power soon, it
    /// may be there again. A local directory then waits for no flush of the disk.
    async fn discard(&self, key: &Key) -> Result<(), StoreError> {
        self.delete(key).await
    }

    /// Makes sure that the objects which are seen directly below the directory `prefix` are there after a crash too, whoever
    /// made them: a local directory shows an object a moment before its name is durable, and its writer may have died
    /// in that moment. Others show nothing that is not.
    async fn settle(&self, prefix: &Key) -> Result<(), StoreError> {
        let _ = prefix;
        Ok(())
    }

    /// Returns the place as a URL, without secrets, for messages.
    fn describe(&self) -> String;
}
