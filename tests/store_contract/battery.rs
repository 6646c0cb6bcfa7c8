//! What every store must do, whatever it is made of.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::{StreamExt, TryStreamExt, stream};
use highwater::store::open::probe;
use highwater::store::{Key, Store, StoreError};
use tokio::sync::Barrier;

type Shared = Arc<dyn Store>;

/// More than one page of any store's listing (S3 and GCS: 1000, Azure: 5000 by
/// default, where the small size of the pages is set by the fake instead).
const MANY: usize = 1100;

pub(crate) fn key(text: &str) -> Key {
    Key::new(text)
}

/// Bytes that differ at every offset of a page and between seeds.
pub(crate) fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

pub(crate) async fn read(
    store: &Shared,
    name: &str,
    range: Option<Range<u64>>,
) -> Result<Vec<u8>, StoreError> {
    let reading = store.read(&key(name), range).await?;
    let pieces: Vec<_> = reading.bytes.try_collect().await?;
    Ok(pieces.concat())
}

pub(crate) async fn create(store: &Shared, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    store.create(&key(name), bytes.to_vec().into()).await
}

async fn listed(store: &Shared, prefix: &str) -> BTreeSet<String> {
    let all: Vec<_> = store.list(&key(prefix)).try_collect().await.unwrap();
    let names: BTreeSet<_> = all.iter().map(|o| o.key.as_str().to_owned()).collect();
    assert_eq!(names.len(), all.len(), "no object twice");
    names
}

/// Runs the whole battery on an empty store.
pub(crate) async fn run(store: Shared) {
    sound(&store).await;
    sizes_come_back(&store).await;
    create_never_replaces(&store).await;
    one_of_many_creators_wins(&store).await;
    ranges(&store).await;
    absence(&store).await;
    keys_of_every_allowed_character(&store).await;
    prefixes_are_whole_components(&store).await;
    levels(&store).await;
    deletes(&store).await;
    long_listings(&store).await;
}

async fn sound(store: &Shared) {
    let report = probe(&**store, "battery-1", SystemTime::now()).await;
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(report.conditional_put, Some(true));
    assert!(report.clock_ahead_ms.unwrap().abs() < 30_000, "{report:?}");
}

async fn sizes_come_back(store: &Shared) {
    for len in [0, 1, 1 << 20, 20 << 20] {
        let bytes = content(len as u64, len);
        let name = format!("sizes/{len}");
        create(store, &name, &bytes).await.unwrap();
        let reading = store.read(&key(&name), None).await.unwrap();
        assert_eq!(reading.size_bytes, len as u64);
        assert!(read(store, &name, None).await.unwrap() == bytes, "{len} bytes differ");
    }
    // A body of several pieces is one object.
    let mut body = highwater::store::Body::default();
    for piece in [&b"one"[..], b"", b"two"] {
        body.push(bytes::Bytes::from_static(piece));
    }
    store.create(&key("sizes/pieces"), body).await.unwrap();
    assert_eq!(read(store, "sizes/pieces", None).await.unwrap(), b"onetwo");
}

async fn create_never_replaces(store: &Shared) {
    create(store, "once/a", b"first").await.unwrap();
    for other in [&b"second"[..], b"first", b""] {
        let error = create(store, "once/a", other).await.unwrap_err();
        assert!(matches!(error, StoreError::Exists { .. }), "{error}");
        assert_eq!(read(store, "once/a", None).await.unwrap(), b"first");
    }
}

async fn one_of_many_creators_wins(store: &Shared) {
    const CREATORS: u64 = 8;
    for round in 0..4 {
        let name = format!("race/{round}");
        let start = Arc::new(Barrier::new(CREATORS as usize));
        let tasks: Vec<_> = (0..CREATORS)
            .map(|creator| {
                let (store, name, start) = (Arc::clone(store), name.clone(), Arc::clone(&start));
                tokio::spawn(async move {
                    let bytes = content(creator + 1, 64 * 1024);
                    start.wait().await;
                    create(&store, &name, &bytes).await
                })
            })
            .collect();
        let mut winners = Vec::new();
        for (creator, task) in tasks.into_iter().enumerate() {
            match task.await.unwrap() {
                Ok(()) => winners.push(creator as u64),
                Err(StoreError::Exists { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(winners.len(), 1, "{winners:?} all think that they created it");
        let stored = read(store, &name, None).await.unwrap();
        assert!(stored == content(winners[0] + 1, 64 * 1024), "not the winner's content");
    }
}

async fn ranges(store: &Shared) {
    let bytes = content(7, 100_000);
    create(store, "ranges/a", &bytes).await.unwrap();
    for (range, expected) in [
        (0..1, 0..1),
        (0..100_000, 0..100_000),
        (10..99_990, 10..99_990),
        (99_999..100_000, 99_999..100_000),
        // Clipped to the object's size.
        (99_000..200_000, 99_000..100_000),
        (0..u64::MAX, 0..100_000),
    ] {
        let reading = store.read(&key("ranges/a"), Some(range.clone())).await.unwrap();
        assert_eq!(reading.size_bytes, 100_000, "the size is always the whole one");
        let found = read(store, "ranges/a", Some(range.clone())).await.unwrap();
        assert!(found == bytes[expected], "{range:?}");
    }
    create(store, "ranges/empty", b"").await.unwrap();
    for (name, range) in [
        ("ranges/a", 100_000..100_001),
        ("ranges/a", 500_000..600_000),
        ("ranges/a", 5..5),
        ("ranges/empty", 0..1),
    ] {
        let error = read(store, name, Some(range.clone())).await.unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }), "{name} {range:?}: {error:?}");
    }
}

async fn absence(store: &Shared) {
    create(store, "absence/x/y", b"1").await.unwrap();
    for name in ["absence/nothing", "absence/x", "absence/x/y/z", "nowhere/at/all"] {
        for range in [None, Some(0..10)] {
            let error = store.read(&key(name), range).await.unwrap_err();
            assert!(error.is_absent(), "{name}: {error:?}");
        }
    }
    assert!(listed(store, "nowhere").await.is_empty());
    let level = store.list_level(&key("nowhere")).await.unwrap();
    assert!(level.directories.is_empty() && level.objects.is_empty());
}

async fn keys_of_every_allowed_character(store: &Shared) {
    let names = [
        "keys/main/wal/7300000000000000001/0000000100000000/0000000100000000000000AB",
        "keys/main/wal/7300000000000000001/0000000100000000/0000000100000000000000AB.00000028.backup",
        "keys/main/wal/7300000000000000001/0000000100000000/0000000100000000000000AB.partial",
        "keys/main/wal/7300000000000000001/0000000100000000/0000000100000000000000AB.parts/0-100000",
        "keys/main/backup/20261122T033107Z-f00d/pack/1",
        "keys/aZ0._-/..z/trailing.",
        "keys/UPPER/lower",
    ];
    // `..z` begins with a dot, so it is refused; the rest comes back as it was.
    for name in names {
        let result = create(store, name, name.as_bytes()).await;
        if name.contains("/..z") {
            assert!(matches!(result, Err(StoreError::Refused { .. })), "{result:?}");
            continue;
        }
        result.unwrap();
        assert_eq!(read(store, name, None).await.unwrap(), name.as_bytes());
    }
    let expected: BTreeSet<_> =
        names.iter().filter(|n| !n.contains("/..z")).map(|n| (*n).to_owned()).collect();
    assert_eq!(listed(store, "keys").await, expected);
}

async fn prefixes_are_whole_components(store: &Shared) {
    for name in ["pre/a/b/1", "pre/a/bc/2", "pre/a/b.x", "pre/ab/3"] {
        create(store, name, b"x").await.unwrap();
    }
    assert_eq!(listed(store, "pre/a/b").await, BTreeSet::from(["pre/a/b/1".to_owned()]));
    assert_eq!(listed(store, "pre/a").await.len(), 3);
    assert_eq!(store.list_level(&key("pre/a/b")).await.unwrap().objects.len(), 1);
}

async fn levels(store: &Shared) {
    for name in ["lev/z/1", "lev/z/2/3", "lev/a/1", "lev/m", "lev/b"] {
        create(store, name, name.as_bytes()).await.unwrap();
    }
    let level = store.list_level(&key("lev")).await.unwrap();
    assert_eq!(level.directories, ["a", "z"]);
    let objects: Vec<_> = level.objects.iter().map(|o| (o.key.as_str(), o.size_bytes)).collect();
    assert_eq!(objects, [("lev/b", 5), ("lev/m", 5)]);
    let top = store.list_level(&key("")).await.unwrap();
    assert!(top.directories.iter().any(|name| name == "lev"), "{top:?}");
    assert!(listed(store, "").await.contains("lev/z/2/3"));
}

async fn deletes(store: &Shared) {
    store.delete(&key("del/never")).await.unwrap();
    create(store, "del/a", b"one").await.unwrap();
    create(store, "del/ab", b"neighbour").await.unwrap();
    store.delete(&key("del/a")).await.unwrap();
    store.delete(&key("del/a")).await.unwrap();
    assert!(read(store, "del/a", None).await.unwrap_err().is_absent());
    assert_eq!(read(store, "del/ab", None).await.unwrap(), b"neighbour");
    create(store, "del/a", b"two").await.unwrap();
    assert_eq!(read(store, "del/a", None).await.unwrap(), b"two");
    store.discard(&key("del/a")).await.unwrap();
    store.discard(&key("del/a")).await.unwrap();
    assert!(read(store, "del/a", None).await.unwrap_err().is_absent());
    assert_eq!(read(store, "del/ab", None).await.unwrap(), b"neighbour");
}

async fn long_listings(store: &Shared) {
    fill(store, "many", MANY).await;
    let expected: BTreeSet<_> = (0..MANY).map(|n| format!("many/{n:06}")).collect();
    assert_eq!(listed(store, "many").await, expected);
    let level = store.list_level(&key("many")).await.unwrap();
    assert_eq!(level.objects.len(), MANY);
    assert!(level.objects.is_sorted_by(|a, b| a.key < b.key));
}

/// Creates `count` small objects below `prefix`.
pub(crate) async fn fill(store: &Shared, prefix: &str, count: usize) {
    stream::iter(0..count)
        .for_each_concurrent(16, |n| async move {
            create(store, &format!("{prefix}/{n:06}"), b"x").await.unwrap();
        })
        .await;
}
