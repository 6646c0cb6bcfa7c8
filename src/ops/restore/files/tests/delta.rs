//! Over whatever stands, a restore gives the very tree that it gives in an empty directory.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::pgdata::RESTORE_MARKER_NAME;

/// Everything below a directory but the markers: kind, mode, time of files, content or target.
type Snapshot = BTreeMap<PathBuf, (u32, i64, Vec<u8>)>;

fn snapshot(directory: &Path) -> Snapshot {
    let mut found = Snapshot::new();
    let mut left = vec![directory.to_owned()];
    while let Some(directory_now) = left.pop() {
        for entry in fs::read_dir(&directory_now).unwrap() {
            let path = entry.unwrap().path();
            let facts = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(directory).unwrap().to_owned();
            let (mut time, mut content) = (0, Vec::new());
            if facts.is_dir() {
                left.push(path.clone());
            } else if facts.is_symlink() {
                content = fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes();
            } else if facts.is_file() {
                time = facts.mtime();
                content = digest_chunk(&fs::read(&path).unwrap()).0.to_vec();
            }
            if name != Path::new(RESTORE_MARKER_NAME) {
                found.insert(name, (facts.mode(), time, content));
            }
        }
    }
    found
}

fn plan(pgdata: &Path, take_over: Option<SystemId>) -> TreePlan {
    TreePlan {
        pgdata: pgdata.to_owned(),
        tablespaces: Vec::new(),
        access: Access::Owner,
        owner: rustix::process::geteuid().is_root().then_some(Owner { uid: 65534, gid: 65534 }),
        take_over,
    }
}

/// Restores, and leaves what a restore leaves that was given up before its end.
async fn restore(
    repository: &Repository,
    backup: &Committed,
    pgdata: &Path,
    take_over: Option<SystemId>,
) -> (u64, u64) {
    let restoring = Restoring {
        repository,
        backup,
        tree_plan: &plan(pgdata, take_over),
        jobs: 2,
        range_bytes_max: 1 << 20,
        progress: Arc::new(Silent),
    };
    let index = repository.file_index(&backup.id).await.unwrap();
    let restored = restoring.run(&index).await.unwrap();
    (restored.kept_bytes, restored.removed)
}

fn small_files() -> Files {
    BTreeMap::from([
        ("base/1/1", Content::new(4 * CHUNK, [(0, 1), (1, 2), (3, 3)])),
        ("base/1/2", Content::new(7 * CHUNK + 11, (0..8).map(|n| (n, n + 10)))),
        ("base/1/3", Content::new(5, [(0, 300)])),
        ("base/1/4", Content::new(0, [])),
        ("base/2/5", Content::new(3 * CHUNK, [])),
        ("base/2/6", Content::new(20 * CHUNK, [(2, 1), (17, 2)])),
        ("deep/er/7", Content::new(CHUNK + 1, [(0, 500), (1, 501)])),
        ("global/1", Content::new(9, [(0, 700)])),
        ("global/pg_control", Content::new(8192, [(0, 600)])),
    ])
}

const PATHS: [&str; 8] = [
    "base/1/1",
    "base/1/2",
    "base/1/3",
    "base/1/4",
    "base/2/5",
    "base/2/6",
    "deep/er/7",
    "global/1",
];

/// Does something to a tree that no server does; `elsewhere` must never be changed by it.
fn damage(pgdata: &Path, elsewhere: &Path, path: &str, kind: u32, number: u64) {
    let path = pgdata.join(path);
    let away = elsewhere.join(format!("{kind}-{number}"));
    let parent = path.parent().unwrap();
    let size = fs::symlink_metadata(&path).map_or(0, |facts| facts.len());
    // Opening a pipe that an earlier damage made would wait for a reader.
    let options =
        || path.is_file().then(|| fs::OpenOptions::new().write(true).open(&path).ok()).flatten();
    let clear = || match fs::symlink_metadata(&path) {
        Ok(facts) if facts.is_dir() => fs::remove_dir_all(&path).unwrap(),
        Ok(_) => fs::remove_file(&path).unwrap(),
        Err(_) => {}
    };
    match kind {
        0..=2 if size > 0 => drop(options().map(|file| file.write_all_at(&[77], number % size))),
        3 => drop(options().map(|file| file.set_len(number % (size + 1)))),
        4 => drop(options().map(|file| file.write_all_at(&vec![7; 70_000], size))),
        5 => clear(),
        6 => drop(fs::set_permissions(&path, fs::Permissions::from_mode(0o777))),
        7 if parent.is_dir() => {
            fs::write(&away, vec![1; 100_000]).unwrap();
            clear();
            symlink(&away, &path).unwrap();
        }
        8 if path.is_file() => drop(fs::hard_link(&path, &away)),
        9 if parent.is_dir() => {
            clear();
            fs::create_dir_all(path.join("in/side")).unwrap();
            fs::write(path.join("in/side/file"), "x").unwrap();
        }
        10 if parent.is_dir() => {
            fs::write(parent.join(format!("extra{number}")), "x").unwrap();
            fs::create_dir_all(parent.join(format!("more{number}/deep"))).unwrap();
            fs::write(parent.join(format!("more{number}/deep/file")), "x").unwrap();
            symlink(elsewhere, parent.join(format!("link{number}"))).ok();
        }
        // The directory is elsewhere, with all that belongs into it.
        11 if !parent.is_symlink() && !away.exists() && parent.is_dir() => {
            fs::rename(parent, &away).unwrap();
            symlink(&away, parent).unwrap();
        }
        12 if parent.is_dir() && !path.exists() => {
            rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).ok();
        }
        13 => drop(fs::set_permissions(parent, fs::Permissions::from_mode(0o755))),
        14 => drop(options().map(|file| file.set_len(0))),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn a_damaged_tree_becomes_what_an_empty_directory_becomes(
        damages in proptest::collection::vec((0usize..8, 0u32..15, 0u64..2_000_000), 0..14),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build();
        runtime.unwrap().block_on(async {
            let (repository, files) = (repository(), small_files());
            let backup = back_up(&repository, 1, &files, None).await;
            let place = tempfile::tempdir().unwrap();
            let at = |name: &str| place.path().join(name);
            fs::create_dir(at("elsewhere")).unwrap();
            restore(&repository, &backup, &at("fresh"), None).await;
            restore(&repository, &backup, &at("data"), None).await;
            for (which, kind, number) in &damages {
                let mut number = *number;
                while at("elsewhere").join(format!("{kind}-{number}")).exists() {
                    number += 1;
                }
                damage(&at("data"), &at("elsewhere"), PATHS[*which], *kind, number);
            }
            let before = snapshot(&at("elsewhere"));
            let (kept, removed) = restore(&repository, &backup, &at("data"), Some(SYSTEM_ID)).await;
            assert_eq!(snapshot(&at("data")), snapshot(&at("fresh")));
            assert_eq!(snapshot(&at("elsewhere")), before);
            let whole: u64 = PATHS.iter().map(|path| files[path].size).sum();
            assert!(kept <= whole);
            if damages.is_empty() {
                assert_eq!((kept, removed), (whole, 0));
            }
            // What stands now is right to the last byte.
            let again = restore(&repository, &backup, &at("data"), Some(SYSTEM_ID)).await;
            assert_eq!(again, (whole, 0));
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_another_backup_become_those_of_this_one_on_both_sides_of_a_map() {
    let (repository, files) = (repository(), first_files());
    let first = back_up(&repository, 1, &files, None).await;
    let mut changed = files.clone();
    let big = changed.get_mut("base/2/big").unwrap();
    big.size = (MAP + 7) * CHUNK;
    big.seeds.extend([(2, 1000), (MAP - 1, 1001), (MAP + 2, 1002), (MAP + 6, 1003)]);
    big.seeds.remove(&MAP);
    changed.get_mut("base/2/exactly").unwrap().size = (MAP - 1) * CHUNK;
    changed.get_mut("base/2/exactly").unwrap().seeds = BTreeMap::from([(0, 400)]);
    changed.remove("base/2/small");
    let second = back_up(&repository, 2, &changed, Some(&first.id)).await;
    let place = tempfile::tempdir().unwrap();
    let pgdata = place.path().join("data");
    restore(&repository, &first, &pgdata, None).await;
    for (backup, files) in [(&second, &changed), (&first, &files)] {
        let (kept, _) = restore(&repository, backup, &pgdata, Some(SYSTEM_ID)).await;
        // Bytes of zeros that stood as a hole are kept as well, and stay holes.
        assert!(kept > MAP * CHUNK && kept < backup.size_bytes, "{kept}");
        for (path, content) in files.iter().filter(|(path, _)| **path != "global/pg_control") {
            assert_holds(&pgdata.join(path), content);
        }
        let on_disk = fs::metadata(pgdata.join("base/2/big")).unwrap().blocks() * 512;
        assert!(on_disk < 40 * CHUNK, "zeros that came in place of bytes are holes: {on_disk}");
    }
}
