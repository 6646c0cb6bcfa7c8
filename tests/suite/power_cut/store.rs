//! The local store alone: many writers in one repository, some of them killed in the middle, and every image of it.

use super::Recording;
use super::disk::{Disk, Image};
use super::trace::{self, Act, Effect, MARKS};
use futures_util::TryStreamExt;
use highwater::causes::in_one_line;
use highwater::store::file::FileStore;
use highwater::store::{Key, Store, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A disk that is slow is not what is tried here.
const LIMIT: Duration = Duration::from_mins(10);

/// Tells the second process of this program what to do.
const SUBJECT: &str = "HIGHWATER_POWER_CUT_SUBJECT";

/// The content of this number; another number, another content.
fn content(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; 200 + 977 * usize::try_from(number % 7).unwrap()];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Leaves a mark in the trace of whoever watches.
fn mark(what: &str, number: u64, key: &str) {
    std::fs::metadata(format!("{MARKS}{what} {number} {key}")).unwrap_err();
}

fn store_in(root: &Path) -> FileStore {
    FileStore::new(root, LIMIT)
}

async fn create(store: &FileStore, key: &str, number: u64) {
    mark("creates", number, key);
    match store.create(&Key::new(key), content(number).into()).await {
        Ok(()) => mark("stored", number, key),
        Err(StoreError::Exists { .. }) => mark("exists", 0, key),
        Err(error) => panic!("{error}"),
    }
}

async fn delete(store: &FileStore, key: &str) {
    mark("deletes", 0, key);
    store.delete(&Key::new(key)).await.unwrap();
    mark("deleted", 0, key);
}

/// What is watched: not a test by itself, but what the process does that the test below starts.
#[test]
fn a_writer_that_is_watched() {
    let Ok(subject) = std::env::var(SUBJECT) else { return };
    let (who, root) = subject.split_once(':').unwrap();
    let root = PathBuf::from(root);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let store = store_in(&root);
        store.prepare().await.unwrap();
        mark("prepared", 0, "all");
        match who {
            "naive" => naive(&root),
            who => write_and_delete(&store, &root, who.parse().unwrap()).await,
        }
    });
}

/// What one of two processes does that share a repository.
async fn write_and_delete(store: &FileStore, root: &Path, who: u64) {
    let own = |n: u64| n * 10 + who;
    // New directories, then ones that hold an object; taken names; the same names as the other process.
    create(store, &format!("c/wal/g1/own{who}"), own(1)).await;
    create(store, "c/wal/g1/shared", 7).await;
    create(store, &format!("c/wal/g1/own{who}"), own(2)).await;
    // Several at a time into one new directory.
    let keys: Vec<String> = (0..3).map(|n| format!("c/wal/g2/{who}-{n}")).collect();
    futures_util::future::join_all(keys.iter().zip(3..).map(|(key, n)| create(store, key, own(n))))
        .await;
    // Directories that a writer left which died before it had synced anything.
    let left = root.join(format!("c/left{who}/by"));
    std::fs::create_dir_all(&left).unwrap();
    create(store, &format!("c/left{who}/by/somebody"), own(6)).await;
    // What is deleted, and comes again under the same name.
    delete(store, &format!("c/wal/g1/own{who}")).await;
    create(store, &format!("c/wal/g1/own{who}"), own(8)).await;
    mark("discards", 0, &keys[0]);
    store.discard(&Key::new(&*keys[0])).await.unwrap();
    delete(store, &keys[1]).await;
    delete(store, &keys[1]).await;
    // Probes have a directory of their own, which goes with them.
    let probe = format!("probe/{who}/object");
    create(store, &probe, own(9)).await;
    delete(store, &probe).await;
}

/// A writer as it must not be: nothing is synced.
fn naive(root: &Path) {
    std::fs::create_dir_all(root.join("c/wal")).unwrap();
    mark("creates", 1, "c/wal/a");
    let staged = root.join(".staging/1-1-0123456789abcdef");
    std::fs::write(&staged, content(1)).unwrap();
    std::fs::rename(staged, root.join("c/wal/a")).unwrap();
    mark("stored", 1, "c/wal/a");
}

/// Runs one process for each of `who` under one strace; returns what was done.
fn watch(root: &Path, who: &[&str]) -> Vec<Effect> {
    let trace = watched(root).with_extension("trace");
    let program = std::env::current_exe().unwrap();
    let mut command = trace::strace(Command::new("strace"), &trace, true);
    let test = "power_cut::store::a_writer_that_is_watched";
    let subjects = who.iter().map(|who| {
        format!("{SUBJECT}='{who}:{}' '{}' --exact {test} &", root.display(), program.display())
    });
    let script = subjects.collect::<Vec<_>>().join(" pids=\"$pids $!\"; ");
    let script =
        format!("{script} pids=\"$pids $!\"; for pid in $pids; do wait $pid || exit 9; done");
    let output = command.args(["/bin/sh", "-c", &script]).output().expect("strace is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    trace::read(&trace, &[watched(root)])
}

/// The repository's own name is watched too.
fn watched(root: &Path) -> PathBuf {
    root.parent().unwrap().to_path_buf()
}

/// What each key may hold at a moment: `None` for nothing, else the number of its content.
fn allowed<'a>(marks: impl Iterator<Item = &'a str>) -> BTreeMap<String, BTreeSet<Option<u64>>> {
    let mut all: BTreeMap<String, BTreeSet<Option<u64>>> = BTreeMap::new();
    for mark in marks {
        let [what, number, key] = mark.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
        let number: u64 = number.parse().unwrap();
        let may = all.entry(key.to_owned()).or_insert_with(|| [None].into());
        match what {
            "creates" if may.contains(&None) => {
                may.insert(Some(number));
            }
            "stored" => *may = [Some(number)].into(),
            // What was found is durable, whoever stored it.
            "exists" => {
                may.remove(&None);
            }
            "deletes" | "discards" => {
                may.insert(None);
            }
            "deleted" => *may = [None].into(),
            _ => {}
        }
    }
    all
}

/// What every key holds in an image; an error says what is torn or does not fit together.
async fn held(store: &FileStore, keys: &[String]) -> Result<BTreeMap<String, Option<u64>>, String> {
    let mut held = BTreeMap::new();
    for key in keys {
        let bytes = match store.read(&Key::new(&**key), None).await {
            Ok(reading) => Some(reading.bytes.try_collect::<Vec<_>>().await.unwrap().concat()),
            Err(error) if error.is_absent() => None,
            Err(error) => return Err(in_one_line(&error)),
        };
        let number = match bytes {
            None => None,
            Some(bytes) => {
                Some((0..100).find(|number| content(*number) == bytes).ok_or_else(|| {
                    format!("`{key}` holds {} bytes that nobody stored", bytes.len())
                })?)
            }
        };
        held.insert(key.clone(), number);
    }
    let listed: BTreeSet<String> = store
        .list(&Key::new(""))
        .map_ok(|listed| listed.key.as_str().to_owned())
        .try_collect()
        .await
        .map_err(|error| in_one_line(&error))?;
    let read: BTreeSet<String> =
        held.iter().filter(|(_, held)| held.is_some()).map(|(key, _)| key.clone()).collect();
    if listed == read { Ok(held) } else { Err(format!("listed {listed:?}, read {read:?}")) }
}

/// Looks at one image with everything that was promised at any of its moments.
async fn check(disk: &Disk, root: &Path, image: &Image, moments: &[usize]) -> Result<(), String> {
    // In memory where there is such a place: nothing here is about what fsync costs.
    let memory = Path::new("/dev/shm");
    let place = tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir()).unwrap();
    let copy = place.path().join("watched");
    image.write(&watched(root), &copy);
    let copy = copy.join("repo");
    let store = store_in(&copy);
    let all = allowed(disk.marks_until(usize::MAX));
    let keys: Vec<String> = all.into_keys().filter(|key| key != "all").collect();
    let is_prepared =
        disk.marks_until(moments[moments.len() - 1]).any(|mark| mark.starts_with("prepared"));
    // Nothing was promised before: `init` runs again, and finishes what there is.
    if !is_prepared {
        store.prepare().await.map_err(|error| in_one_line(&error))?;
    }
    let held = held(&store, &keys).await?;
    for moment in moments {
        for (key, may) in allowed(disk.marks_until(*moment)) {
            let found = held.get(&key).copied().flatten();
            if key != "all" && !may.contains(&found) {
                return Err(format!("`{key}` is {found:?} where {may:?} was promised"));
            }
        }
    }
    // Leftovers are swept, and nothing else.
    let swept = store.sweep_leftovers(Duration::ZERO).await.map_err(|error| in_one_line(&error))?;
    let staged = copy.join(".staging");
    let left = std::fs::read_dir(&staged).unwrap().count();
    assert_eq!(left, 0, "{swept} were swept");
    // The same put again settles it, whatever is there.
    for (key, number) in &held {
        let number = number.unwrap_or(50);
        match store.create(&Key::new(&**key), content(number).into()).await {
            Ok(()) | Err(StoreError::Exists { .. }) => {}
            Err(error) => return Err(in_one_line(&error)),
        }
    }
    let settled = self::held(&store, &keys).await?;
    for (key, number) in settled {
        assert_eq!(number, Some(held[&key].unwrap_or(50)), "{key}");
    }
    Ok(())
}

/// Checks every image; returns how many there were, or what is wrong with the first bad one.
fn check_all(root: &Path, before: Disk, effects: &[Effect]) -> Result<usize, String> {
    let mut recording = Recording { roots: vec![watched(root)], disk: before };
    recording.disk.apply(effects);
    let images = recording.all_images(6);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        for (image, moments) in &images {
            let checked = check(&recording.disk, root, image, moments).await;
            checked.map_err(|error| format!("{error} in the image `{}`", image.how))?;
        }
        Ok(images.len())
    })
}

fn is_in_staging(path: &Path) -> bool {
    path.iter().any(|part| part == ".staging")
}

/// The trace without some of its fsyncs: what would be seen of a driver that lacks them.
fn without(effects: &[Effect], lacks: impl Fn(&Path) -> bool) -> Vec<Effect> {
    let keeps = |effect: &&Effect| !matches!(&effect.act, Act::Sync(path) if lacks(path));
    let kept: Vec<Effect> = effects.iter().filter(keeps).cloned().collect();
    assert!(kept.len() < effects.len(), "there was no such fsync");
    kept
}

type Lacks = dyn Fn(&Path) -> bool;

#[test]
fn whatever_the_power_leaves_of_a_repository_holds_what_was_confirmed_and_nothing_torn() {
    let (_place, root) = nowhere();
    let effects = watch(&root, &["1", "2"]);
    let images = check_all(&root, empty(&root), &effects).unwrap();
    eprintln!("{images} images");
    assert!(images > 500, "{images}");
    // Each kind of fsync is needed: without it, some image breaks a promise.
    let kinds: [(&str, &Lacks); 3] = [
        ("of bytes", &|path| is_in_staging(path) && !path.ends_with(".staging")),
        ("of the directory of an object", &|path| path.ends_with("g1")),
        ("of a directory above", &|path| path.ends_with("wal") || path.ends_with("c")),
    ];
    for (kind, lacks) in kinds {
        let checked = check_all(&root, empty(&root), &without(&effects, lacks));
        let error = checked.expect_err(kind);
        eprintln!("without the fsync {kind}: {error}");
    }
}

/// A place for a repository, and the disk as it is before there is one.
fn nowhere() -> (tempfile::TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("watched/repo");
    std::fs::create_dir(watched(&root)).unwrap();
    (place, root)
}

/// The watched directory was empty, and was there.
fn empty(root: &Path) -> Disk {
    Disk::empty(&watched(root))
}

#[test]
fn a_writer_that_syncs_nothing_is_found_out() {
    let (_place, root) = nowhere();
    let effects = watch(&root, &["naive"]);
    let error = check_all(&root, empty(&root), &effects).unwrap_err();
    assert!(error.contains("c/wal/a"), "{error}");
}
