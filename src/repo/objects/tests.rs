//! A name that the store says is taken, and then is not, is tried again until it is settled.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use super::*;
use crate::format::{Codec, Kind};
use crate::repo::WalSealer;
use crate::repo::encrypting::tests::{SYSTEM, claim, seen_by};
use crate::store::memory::MemoryStore;
use crate::store::{Level, Listed, Reading, Store};

/// Says so many times that the name of a segment is taken, as stores do whose creates met.
#[derive(Debug)]
struct Fickle {
    below: MemoryStore,
    lies_left: AtomicU32,
}

#[async_trait]
impl Store for Fickle {
    async fn create(&self, key: &Key, body: Body) -> Result<(), StoreError> {
        let lies = |left: u32| left.checked_sub(1);
        let is_segment = key.as_str().contains("/wal/");
        if is_segment
            && self.lies_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, lies).is_ok()
        {
            return Err(StoreError::Exists { key: key.clone() });
        }
        self.below.create(key, body).await
    }

    async fn read(&self, key: &Key, range: Option<Range<u64>>) -> Result<Reading, StoreError> {
        self.below.read(key, range).await
    }

    fn list(&self, prefix: &Key) -> BoxStream<'static, Result<Listed, StoreError>> {
        self.below.list(prefix)
    }

    async fn list_level(&self, prefix: &Key) -> Result<Level, StoreError> {
        self.below.list_level(prefix).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.below.delete(key).await
    }

    fn describe(&self) -> String {
        self.below.describe()
    }
}

#[tokio::test]
async fn an_object_handed_over_is_stored_though_its_name_seemed_taken_encrypted_or_not() {
    let plain: Vec<u8> =
        (0..3_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for is_encrypted in [false, true] {
        let lies_left = AtomicU32::new(SETTLE_ATTEMPTS - 1);
        let store = Arc::new(Fickle { below: MemoryStore::new(), lies_left });
        let repository = if is_encrypted {
            seen_by(store.clone(), 1)
        } else {
            Repository::new(store.clone(), "main".parse().unwrap())
        };
        claim(&repository).await.unwrap();
        let key = Key::new("main/wal/7/000000010000000000000001");
        let sealed = || {
            let mut sealer = WalSealer::new(Codec::DEFAULT, None).unwrap();
            sealer.push(&plain).unwrap();
            let packing = Codec::DEFAULT.packing();
            sealer
                .finish(Header::new(Kind::Segment, repository.below(&key), SYSTEM, packing))
                .unwrap()
        };
        assert!(sealed().body.pieces().len() > 2, "in several pieces");

        let (put, header) = repository.hand_over(&key, sealed()).await.unwrap();
        assert_eq!(put, Put::Stored);
        assert_eq!(header, sealed().header);
        let mut read = Vec::new();
        let take = |block: &[u8]| {
            read.extend_from_slice(block);
            Ok(())
        };
        assert_eq!(repository.fetch(&key, take).await.unwrap(), header);
        assert!(read == plain);
        let (again, _) = repository.hand_over(&key, sealed()).await.unwrap();
        assert_eq!(again, Put::AlreadyThere);

        // One that says so for ever is a store that fails, and nothing stands there.
        let key = Key::new("main/wal/7/000000010000000000000002");
        store.lies_left.store(SETTLE_ATTEMPTS, Ordering::SeqCst);
        let error = repository.hand_over(&key, sealed()).await.unwrap_err();
        assert!(matches!(error, RepoError::Store(StoreError::Unavailable { .. })), "{error}");
        assert_eq!(store.below.bytes(key.as_str()), None);
    }
}
