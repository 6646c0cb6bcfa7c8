//! Whatever is read of an encrypted cluster is what was stored, or an error.

use std::sync::Arc;

use futures_util::TryStreamExt;
use proptest::prelude::*;

use super::*;
use crate::format::{ENCRYPTED_IDENTITY_VERSION, FORMAT_VERSION, Identity, encrypted_bytes};
use crate::pg::{PgTimestamp, SegmentSize, SystemId};
use crate::repo::{KeyError, KeySource, KeySourceError, KeyTaker, Repository};
use crate::store::memory::MemoryStore;

pub(in crate::repo) const SYSTEM: SystemId = SystemId(7);

/// A user key that a test has in hand.
#[derive(Debug)]
pub(in crate::repo) struct Hand(pub(in crate::repo) u8);

impl KeySource for Hand {
    fn user_key(&self) -> Result<SecretKey, KeySourceError> {
        Ok(user_key(self.0))
    }
}

pub(in crate::repo) fn user_key(seed: u8) -> SecretKey {
    SecretKey::new([seed; 32])
}

pub(in crate::repo) fn taker() -> KeyTaker {
    KeyTaker { host: "host".to_owned(), pid: 1, at: PgTimestamp(0), tool: "test".to_owned() }
}

/// The place as who holds this user key sees it, in a new process.
pub(in crate::repo) fn seen_by(store: Arc<dyn Store>, user_key: u8) -> Repository {
    Repository::encrypted(store, "main".parse().unwrap(), Arc::new(Hand(user_key)))
}

/// Claims the place, as `init` does.
pub(in crate::repo) async fn claim(repository: &Repository) -> Result<(), RepoError> {
    let encryption = repository.encryption_for_claim(SYSTEM, true, &taker()).await?;
    let identity = Identity {
        format: if encryption.is_some() { ENCRYPTED_IDENTITY_VERSION } else { FORMAT_VERSION },
        cluster: repository.cluster().clone(),
        system_identifier: SYSTEM,
        segment_size: SegmentSize::DEFAULT,
        postgres_major: 17,
        incarnation: 1,
        succeeds: None,
        encryption,
        claimed_at: PgTimestamp(0),
        claimed_by: "host".to_owned(),
        tool: "test".to_owned(),
    };
    repository.claim(&identity).await.map(drop)
}

pub(in crate::repo) async fn claimed(memory: &MemoryStore) -> Repository {
    let repository = seen_by(Arc::new(memory.clone()), 1);
    claim(&repository).await.unwrap();
    repository
}

/// Reads as everything above does.
pub(in crate::repo) async fn read(
    repository: &Repository,
    key: &str,
    range: Option<Range<u64>>,
) -> Result<(u64, Vec<u8>), RepoError> {
    let reading = repository.store().read(&Key::new(key), range).await?;
    let bytes: Vec<Bytes> = reading.bytes.try_collect().await?;
    Ok((reading.size_bytes, bytes.concat()))
}

pub(in crate::repo) async fn put(repository: &Repository, key: &str, bytes: &[u8]) {
    repository.store().create(&Key::new(key), bytes.to_vec().into()).await.unwrap();
}

const PACK: &str = "main/backup/20261122T031500Z/pack/00000000";

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

#[tokio::test]
async fn every_range_is_that_of_the_plain_bytes() {
    const BLOCK: usize = 16 << 10;
    for len in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 70 * BLOCK + 5] {
        let memory = MemoryStore::new();
        let repository = claimed(&memory).await;
        let plain = noise(len);
        let mut body = Body::default();
        for piece in plain.chunks(10_000) {
            body.push(Bytes::copy_from_slice(piece));
        }
        repository.store().create(&Key::new(PACK), body).await.unwrap();
        let stored = memory.bytes(PACK).unwrap();
        assert_eq!(stored.len() as u64, encrypted_bytes(len as u64));
        let (size, whole) = read(&repository, PACK, None).await.unwrap();
        assert!(size == len as u64 && whole == plain, "{len}");
        let edges = [0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 64 * BLOCK, len, len + 1];
        for start in edges {
            for end in edges {
                // Each in a process of its own as well, that has not seen the head yet.
                for repository in [repository.clone(), seen_by(Arc::new(memory.clone()), 1)] {
                    let range = Some(start as u64..end as u64);
                    match read(&repository, PACK, range).await {
                        Ok((size, bytes)) => {
                            assert_eq!(size, len as u64);
                            assert!(bytes == plain[start..end.min(len)], "{len}: {start}..{end}");
                        }
                        Err(RepoError::Store(StoreError::Refused { .. })) => {
                            assert!(start >= end.min(len), "{len}: {start}..{end}");
                        }
                        Err(error) => panic!("{len}: {start}..{end}: {error}"),
                    }
                }
            }
        }
        let listed: Vec<Listed> =
            repository.store().list(&Key::new("main/backup")).try_collect().await.unwrap();
        assert_eq!(listed[0].size_bytes, len as u64);
        let directory = Key::new(PACK.rsplit_once('/').unwrap().0);
        let level = repository.store().list_level(&directory).await.unwrap();
        assert_eq!(level.objects, listed);
    }
}

#[tokio::test]
async fn the_same_bytes_are_stored_as_others_each_time() {
    let memory = MemoryStore::new();
    let repository = claimed(&memory).await;
    let plain = b"the same text in two objects, and in one that was deleted and stored again";
    put(&repository, "main/wal/a", plain).await;
    put(&repository, "main/wal/b", plain).await;
    let first = memory.bytes("main/wal/a").unwrap();
    repository.store().delete(&Key::new("main/wal/a")).await.unwrap();
    put(&repository, "main/wal/a", plain).await;
    let others = [memory.bytes("main/wal/a").unwrap(), memory.bytes("main/wal/b").unwrap()];
    for other in others {
        assert!(first[16..] != other[16..]);
        assert!(first.windows(8).skip(16).all(|part| !other[16..].windows(8).any(|o| o == part)));
    }
}

#[tokio::test]
async fn what_stands_under_another_name_or_in_plain_is_not_believed() {
    let memory = MemoryStore::new();
    let repository = claimed(&memory).await;
    put(&repository, "main/wal/a", b"a").await;
    put(&repository, "main/wal/b", b"b").await;
    let stored = memory.bytes("main/wal/a").unwrap();
    memory.overwrite("main/wal/b", stored.clone());
    memory.overwrite("main/wal/plain", "plain");
    memory.overwrite("main/wal/empty", "");
    memory.overwrite("main/wal/cut", stored.slice(..stored.len() - 1));
    for key in ["main/wal/b", "main/wal/plain", "main/wal/empty", "main/wal/cut"] {
        for range in [None, Some(0..1)] {
            if range.is_some() && key.ends_with("empty") {
                continue;
            }
            let error = read(&repository, key, range).await.unwrap_err();
            assert!(matches!(error, RepoError::Damaged { .. }), "{key}: {error}");
        }
    }
    assert_eq!(read(&repository, "main/wal/a", None).await.unwrap().1, b"a");
}

#[tokio::test]
async fn a_place_takes_only_writers_that_are_set_up_as_it_is() {
    let memory = MemoryStore::new();
    let cluster = || "main".parse().unwrap();
    let store = || -> Arc<dyn Store> { Arc::new(memory.clone()) };
    claimed(&memory).await;
    let before = memory.keys();
    let plain = Repository::new(store(), cluster());
    let wrong = seen_by(store(), 2);
    let pin = crate::format::Pin {
        format: FORMAT_VERSION,
        backup: "20261122T031500Z".parse().unwrap(),
        created_at: PgTimestamp(0),
        until: None,
        reason: None,
        host: "host".to_owned(),
        pid: 1,
        tool: "test".to_owned(),
    };
    let error = plain.put_pin(&pin).await.unwrap_err();
    assert!(matches!(error, RepoError::Key(KeyError::Missing { .. })), "{error}");
    let error = wrong.put_pin(&pin).await.unwrap_err();
    assert!(matches!(error, RepoError::Key(KeyError::Wrong { .. })), "{error}");
    assert!(error.to_string().contains(&user_key(1).id().to_string()), "{error}");
    assert_eq!(memory.keys(), before);

    let memory = MemoryStore::new();
    let store = || -> Arc<dyn Store> { Arc::new(memory.clone()) };
    claim(&Repository::new(store(), cluster())).await.unwrap();
    let error = seen_by(store(), 1).put_pin(&pin).await.unwrap_err();
    assert!(matches!(error, RepoError::Key(KeyError::NotEncrypted { .. })), "{error}");
    assert_eq!(memory.keys().len(), 1);
}

#[tokio::test]
async fn a_reader_without_a_key_is_told_so_and_takes_nothing_for_damaged() {
    let memory = MemoryStore::new();
    let repository = claimed(&memory).await;
    let key = Key::new("main/wal/7/00000002.history");
    let sealed = crate::repo::WalSealer::new(crate::format::Codec::DEFAULT, None)
        .and_then(|mut sealer| {
            sealer.push(b"history")?;
            let kind = crate::format::Kind::TimelineHistory;
            let name = repository.below(&key);
            let packing = crate::format::Codec::DEFAULT.packing();
            sealer.finish(crate::format::Header::new(kind, name, SYSTEM, packing))
        })
        .unwrap();
    repository.put_sealed(&key, &sealed).await.unwrap();
    let plain = Repository::new(Arc::new(memory.clone()), "main".parse().unwrap());
    for error in [
        plain.header(&key).await.unwrap_err(),
        plain.fetch(&key, |_| Ok(())).await.unwrap_err(),
        plain.identities().await.unwrap_err(),
    ] {
        assert!(matches!(error, RepoError::Key(KeyError::Missing { .. })), "{error}");
    }
    assert_eq!(repository.header(&key).await.unwrap(), sealed.header);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_damaged_object_gives_an_error_or_a_true_beginning(
        len in 0usize..70_000,
        at: prop::sample::Index,
        xor in 1u8..,
        start in 0u64..70_000,
        span in 1u64..40_000,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let memory = MemoryStore::new();
            let repository = claimed(&memory).await;
            let plain = noise(len);
            put(&repository, PACK, &plain).await;
            let mut bad = memory.bytes(PACK).unwrap().to_vec();
            let at = at.index(bad.len());
            bad[at] ^= xor;
            memory.overwrite(PACK, bad);
            assert!(read(&repository, PACK, None).await.is_err());
            if let Ok((_, bytes)) = read(&repository, PACK, Some(start..start + span)).await {
                let start = usize::try_from(start).unwrap();
                assert!(bytes == plain[start..start + bytes.len()]);
            }
        });
    }
}
