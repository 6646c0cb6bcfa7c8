//! The place of one test: its scratch directory, its turn, its randomness.

use super::binary::Highwater;
use super::cluster::ClusterBuilder;
use super::script;
use super::templates::Kind;
use super::trees::give_to_server_user;
use super::wait::wait_for;
use super::weather::Way;
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How many labs are open at once: each runs servers, and waits for them more than it computes. Many more than
/// processors would make waits run into their limits.
const LABS_AT_ONCE: usize = 3;

/// One test's place. Removed when the last thing made in it is dropped.
#[derive(Clone)]
pub struct Lab {
    inner: Arc<Inner>,
}

struct Inner {
    /// The kinds of cluster of which this lab has had the copy of a template.
    copied: Mutex<BTreeSet<Kind>>,
    // Fields drop in this order: first the directory, then the turn.
    directory: tempfile::TempDir,
    _turn: Turn,
}

impl Lab {
    /// Waits for a turn and opens an empty place.
    pub fn open() -> Self {
        let turn = Turn::take();
        // Short, because the path of a unix socket has at most 107 bytes.
        let directory =
            tempfile::Builder::new().prefix("hw-").tempdir_in("/tmp").expect("/tmp is writable");
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        give_to_server_user(directory.path());
        Self { inner: Arc::new(Inner { copied: Mutex::default(), directory, _turn: turn }) }
    }

    /// Returns the place's directory.
    pub fn path(&self) -> &Path {
        self.inner.directory.path()
    }

    /// Makes an empty directory of the server's user that nobody else may enter.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir(&path).unwrap_or_else(|e| panic!("mkdir {}: {e}", path.display()));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
        give_to_server_user(&path);
        path
    }

    /// Writes a file of the server's user.
    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, bytes).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        give_to_server_user(&path);
        path
    }

    /// Makes an empty local-directory repository and returns the binary set up
    /// for the cluster `main` in it.
    pub fn highwater(&self) -> Highwater {
        let root = self.path().join("repo");
        if !root.exists() {
            self.directory("repo");
        }
        Highwater::new(self.clone(), &format!("file://{}", root.display()), "main")
    }

    /// The same for a prefix of its own in the bucket of an S3 server, which is started for the
    /// first test that wants it.
    pub fn highwater_on_s3(&self) -> Highwater {
        self.highwater_on_s3_at(script::rgw().port)
    }

    /// The same repository, and a way to it whose weather can be made.
    pub fn highwater_on_s3_by_a_way(&self) -> (Highwater, Way) {
        let way = Way::to(script::rgw().port);
        (self.highwater_on_s3_at(way.port), way)
    }

    fn highwater_on_s3_at(&self, port: u16) -> Highwater {
        let name = self.path().file_name().unwrap().to_string_lossy().to_lowercase();
        let settings = format!(
            "[repo.options]\nendpoint = \"http://127.0.0.1:{port}\"\nallow_http = true\n\
             access_key_id = \"{}\"\nsecret_access_key = \"{}\"\n",
            script::RGW_KEY,
            script::RGW_SECRET
        );
        // A file, because servers start commands in an environment of their own.
        let file = self.write(&format!("s3-{port}.toml"), settings.as_bytes());
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
        Highwater::new(self.clone(), &format!("s3://{}/{name}", script::BUCKET), "main")
            .with_env("HIGHWATER_CONFIG", file.to_str().unwrap())
    }

    /// Returns true if no cluster of this kind was copied into this lab before.
    pub(super) fn copies_first(&self, kind: Kind) -> bool {
        self.inner.copied.lock().unwrap_or_else(PoisonError::into_inner).insert(kind)
    }

    /// Begins a new cluster.
    pub fn cluster(&self, major: u32) -> ClusterBuilder {
        ClusterBuilder::new(self.clone(), major)
    }
}

/// One of the [`LABS_AT_ONCE`] turns; given back when dropped.
struct Turn;

static TURNS: (Mutex<usize>, Condvar) = (Mutex::new(LABS_AT_ONCE), Condvar::new());

impl Turn {
    fn take() -> Self {
        let (free, changed) = &TURNS;
        let free = free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free =
            changed.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (free, changed) = &TURNS;
        *free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        changed.notify_one();
    }
}

/// Returns how many rounds a test takes that does something at random moments: what
/// `make soak` says, else `usual`.
pub fn rounds(usual: u64) -> u64 {
    let set = std::env::var("HIGHWATER_SOAK_ROUNDS").ok();
    set.map_or(usual, |rounds| rounds.parse().expect("HIGHWATER_SOAK_ROUNDS is a number"))
}

/// Random numbers whose seed is printed, so that a failure can be repeated
/// with `HIGHWATER_TEST_SEED`.
pub struct Random(u64);

impl Random {
    /// Seeds from `HIGHWATER_TEST_SEED` or the clock.
    pub fn new(what: &str) -> Self {
        let seed = std::env::var("HIGHWATER_TEST_SEED").ok().and_then(|s| s.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            now.as_secs() ^ u64::from(now.subsec_nanos())
        });
        eprintln!("{what}: HIGHWATER_TEST_SEED={seed}");
        Self(seed | 1)
    }

    /// Returns a number from 0 to `bound`, `bound` excluded (xorshift64*).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16) % bound
    }

    /// Returns one of the items.
    pub fn one_of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let bound = u64::try_from(items.len()).unwrap();
        &items[usize::try_from(self.below(bound)).unwrap()]
    }
}

/// Lists every file below a directory, relative to it, sorted.
pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_path_buf()];
    while let Some(next) = open.pop() {
        let entries = match std::fs::read_dir(&next) {
            Ok(entries) => entries,
            // A receiver that runs removes directories of pieces.
            Err(e) if e.kind() == ErrorKind::NotFound && next != directory => continue,
            Err(e) => panic!("{}: {e}", next.display()),
        };
        for entry in entries {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                found.push(entry.path().strip_prefix(directory).unwrap().to_path_buf());
            }
        }
    }
    found.sort();
    found
}

/// Maps every file below a directory to its content's BLAKE3 digest.
pub fn fingerprint(directory: &Path) -> BTreeMap<PathBuf, String> {
    let digest = |name: &PathBuf| {
        let bytes = std::fs::read(directory.join(name)).unwrap();
        blake3::hash(&bytes).to_hex().to_string()
    };
    files_below(directory).into_iter().map(|name| (name.clone(), digest(&name))).collect()
}

/// Copies a directory with everything in it, as the server's user sees it.
pub fn copy_tree(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(status.success(), "cp -a {} {}", from.display(), to.display());
}

/// Removes the directory of a server that has ended. What it has left behind (a fetch of the WAL that comes next, which ends by
/// itself) may still put something there.
pub fn remove_tree(path: &Path) {
    wait_for("the directory is gone", Duration::from_secs(30), || {
        std::fs::remove_dir_all(path).is_ok() || !path.exists()
    });
}

/// Flips one bit of a file in place.
pub fn flip_bit(path: &Path, offset: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[offset] ^= 0x10;
    let mut permissions = std::fs::metadata(path).unwrap().permissions();
    permissions.set_mode(permissions.mode() | 0o200);
    std::fs::set_permissions(path, permissions).unwrap();
    std::fs::write(path, bytes).unwrap();
}
