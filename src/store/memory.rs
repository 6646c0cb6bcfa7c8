//! A store in memory: the model that the other drivers are measured against.
//!
//! Owns: the contract of [`Store`] in its plainest form, and ways for tests to
//! look at and to damage what is stored. Never here: durability. No URL leads
//! to it, so no user can mistake it for a repository.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};

use super::contract::{check_key, check_prefix, clip, rest_below};
use super::{Body, Key, Level, Listed, Reading, Store, StoreError};

/// How many bytes one piece of a reading has at most.
const PIECE_BYTES: usize = 256 * 1024;

#[derive(Debug, Clone)]
struct Object {
    bytes: Bytes,
    modified: SystemTime,
}

/// A [`Store`] in memory. Clones share their content.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    objects: Arc<Mutex<BTreeMap<Key, Object>>>,
}

impl MemoryStore {
    /// Makes an empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the bytes of an object, for a test to look at.
    pub fn bytes(&self, key: &str) -> Option<Bytes> {
        self.lock().get(&Key::new(key)).map(|object| object.bytes.clone())
    }

    /// Returns every key, sorted.
    pub fn keys(&self) -> Vec<String> {
        self.lock().keys().map(|key| key.as_str().to_owned()).collect()
    }

    /// Puts bytes under a key whether it is taken or not, as damage or a
    /// foreign hand would: the one way round the contract, for tests.
    pub fn overwrite(&self, key: &str, bytes: impl Into<Bytes>) {
        let object = Object { bytes: bytes.into(), modified: SystemTime::now() };
        self.lock().insert(Key::new(key), object);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Object>> {
        // A test that panicked elsewhere cannot have left the map half changed.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn below(&self, prefix: &Key) -> Vec<Listed> {
        self.lock()
            .iter()
            .filter(|(key, _)| rest_below(prefix, key).is_some())
            .map(|(key, object)| Listed {
                key: key.clone(),
                size_bytes: object.bytes.len() as u64,
                modified: object.modified,
            })
            .collect()
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn create(&self, key: &Key, body: Body) -> Result<(), StoreError> {
        check_key(key)?;
        let mut bytes = BytesMut::new();
        for piece in body.pieces() {
            bytes.extend_from_slice(piece);
        }
        let mut objects = self.lock();
        if objects.contains_key(key) {
            return Err(StoreError::Exists { key: key.clone() });
        }
        let object = Object { bytes: bytes.freeze(), modified: SystemTime::now() };
        objects.insert(key.clone(), object);
        Ok(())
    }

    async fn read(&self, key: &Key, range: Option<Range<u64>>) -> Result<Reading, StoreError> {
        check_key(key)?;
        let object = self.lock().get(key).cloned();
        let Some(object) = object else { return Err(StoreError::Absent { key: key.clone() }) };
        let size_bytes = object.bytes.len() as u64;
        let range = clip(key, size_bytes, range)?;
        let bytes = object.bytes.slice(to_usize(range.start)..to_usize(range.end));
        let pieces: Vec<_> = (0..bytes.len())
            .step_by(PIECE_BYTES)
            .map(|start| Ok(bytes.slice(start..(start + PIECE_BYTES).min(bytes.len()))))
            .collect();
        Ok(Reading { size_bytes, bytes: stream::iter(pieces).boxed() })
    }

    fn list(&self, prefix: &Key) -> BoxStream<'static, Result<Listed, StoreError>> {
        let listed = match check_prefix(prefix) {
            Ok(()) => self.below(prefix).into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        };
        stream::iter(listed).boxed()
    }

    async fn list_level(&self, prefix: &Key) -> Result<Level, StoreError> {
        check_prefix(prefix)?;
        let mut directories = BTreeSet::new();
        let mut objects = Vec::new();
        for listed in self.below(prefix) {
            match rest_below(prefix, &listed.key).and_then(|rest| rest.split_once('/')) {
                Some((directory, _)) => {
                    directories.insert(directory.to_owned());
                }
                None => objects.push(listed),
            }
        }
        Ok(Level { directories: directories.into_iter().collect(), objects })
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        check_key(key)?;
        self.lock().remove(key);
        Ok(())
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

/// The offset lies within bytes that are in memory, so it fits.
fn to_usize(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
