//! A repository in a local directory.
//!
//! Owns: turning the contract of [`Store`] into system calls that survive a
//! crash. Never here: retries, the grammar of keys beyond "safe as a path".
//!
//! ```text
//! /srv/highwater/.staging/7123-0-5f3c…   being written; a crash leaves it, `sweep_leftovers` removes it
//! /srv/highwater/main/wal/…/000000010000000000000001   an object: whole, fsynced, never changed
//! ```
//!
//! How an object gets its name so that a crash never shows half of it: `file_publish`.
//!
//! This is not `object_store::LocalFileSystem` because that one creates a
//! missing root (and so fills the disk under an unmounted volume), stages beside
//! the target (so finding leftovers means walking millions of files), does not
//! make deletes durable and does not choose file modes.
//!
//! Absent is said only when the root is there and holds something: a mount
//! point whose disk is not mounted is an empty directory, and must not look like
//! an archive that ends. `prepare` makes the root, and with it `.staging`, so
//! that a prepared repository is never empty.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};

use super::contract::{check_key, check_prefix, clip, time_limit};
use super::file_errors::{failed, is_no_such_file};
use super::file_publish::{Publisher, sync_directory};
use super::file_walk::Walk;
use super::open::PROBE_DIRECTORY;
use super::{Body, Cause, Key, Level, Listed, Reading, Store, StoreError};

/// How many bytes one piece of a reading has at most.
const PIECE_BYTES: u64 = 1024 * 1024;

/// How many listed objects are collected in one go.
const PAGE_OBJECTS: usize = 1000;

/// A [`Store`] in a local directory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FileStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    stall_timeout: Duration,
    publisher: Publisher,
}

impl FileStore {
    /// Makes a store in `root`, an absolute directory; touches nothing.
    ///
    /// `stall_timeout` bounds every call (a `create` has the time of its size
    /// at 128 KiB/s besides), because a network file system may hang for ever.
    pub fn new(root: impl Into<PathBuf>, stall_timeout: Duration) -> Self {
        let root = root.into();
        let publisher = Publisher::new(root.clone());
        Self { inner: Arc::new(Inner { root, stall_timeout, publisher }) }
    }

    /// Creates the root directory and what it needs, durably. Does nothing if it is there already.
    ///
    /// The one call that may create the root: `init` makes it, after the user has named the place.
    ///
    /// # Errors
    /// [`StoreError::Denied`], [`StoreError::NoRoom`], [`StoreError::Refused`]
    /// if something else stands there, [`StoreError::Unavailable`].
    pub async fn prepare(&self) -> Result<(), StoreError> {
        let inner = Arc::clone(&self.inner);
        self.run(Key::new(""), 0, move || {
            inner.publisher.prepare().map_err(|e| failed(&Key::new(""), e))
        })
        .await
    }

    /// Removes staging files that a crash left, if they are older than `older_than`.
    ///
    /// The age must exceed any upload's length: a file of a living process must
    /// not go. Returns how many were removed. Looks into one directory only.
    ///
    /// # Errors
    /// As [`Store::delete`]. What was removed stays removed.
    pub async fn sweep_leftovers(&self, older_than: Duration) -> Result<u64, StoreError> {
        let inner = Arc::clone(&self.inner);
        self.run(Key::new(""), 0, move || {
            let root = Key::new("");
            inner.require_root(&root)?;
            inner.publisher.sweep(older_than).map_err(|e| failed(&root, e))
        })
        .await
    }

    /// Runs blocking work aside, with a deadline for `bytes` of it. Work that is
    /// stuck in the kernel cannot be stopped: its thread is left behind.
    async fn run<T: Send + 'static>(
        &self,
        key: Key,
        bytes: u64,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let limit = time_limit(self.inner.stall_timeout, bytes);
        let working = tokio::task::spawn_blocking(work);
        // Work that waits for a thread when nobody waits for it any more is not begun: a deletion that was given up must
        // not be carried out minutes later.
        let _forgotten = AbortOnDrop(working.abort_handle());
        match tokio::time::timeout(limit, working).await {
            Ok(Ok(result)) => result,
            Ok(Err(join)) => Err(StoreError::Unavailable { key, cause: Box::new(join) }),
            Err(_) => {
                let cause = format!("the file system did not answer within {limit:?}");
                Err(StoreError::Unavailable { key, cause: cause.into() })
            }
        }
    }
}

impl Inner {
    fn path(&self, key: &Key) -> Result<PathBuf, StoreError> {
        check_key(key)?;
        Ok(self.root.join(key.as_str()))
    }

    /// Returns the path of a directory of keys; the empty prefix is the root.
    fn directory(&self, prefix: &Key) -> Result<PathBuf, StoreError> {
        check_prefix(prefix)?;
        Ok(self.root.join(prefix.as_str()))
    }

    /// Makes sure that the repository's directory is there and is not the empty mount point of
    /// a disk that is not mounted. Called before "no such file" is believed.
    fn require_root(&self, key: &Key) -> Result<(), StoreError> {
        let root = self.root.display();
        let cause: Cause = match fs::read_dir(&self.root) {
            Ok(mut entries) => match entries.next() {
                Some(Ok(_)) => return Ok(()),
                Some(Err(error)) => return Err(failed(key, error)),
                None => format!(
                    "the directory `{root}` is empty; is its disk mounted? A new repository is made by `init`"
                )
                .into(),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => {
                format!("the directory `{root}` does not exist; is its disk mounted?").into()
            }
            Err(error) if error.kind() == ErrorKind::NotADirectory => {
                let cause = format!("`{root}` is not a directory").into();
                return Err(StoreError::Refused { key: key.clone(), cause });
            }
            Err(error) => return Err(failed(key, error)),
        };
        Err(StoreError::Unavailable { key: key.clone(), cause })
    }

    fn create(&self, key: &Key, body: &Body) -> Result<(), StoreError> {
        let path = self.path(key)?;
        if !self.publisher.is_prepared() {
            self.require_root(key)?;
        }
        self.publisher.publish(key, body, &path)
    }

    fn open(&self, key: &Key) -> Result<(File, u64), StoreError> {
        let path = self.path(key)?;
        let opened = File::open(&path).and_then(|file| {
            let metadata = file.metadata()?;
            Ok((file, metadata))
        });
        match opened {
            Ok((file, metadata)) if metadata.is_file() => Ok((file, metadata.len())),
            Ok((_, metadata)) if metadata.is_dir() => Err(StoreError::Absent { key: key.clone() }),
            Ok(_) => {
                let cause = format!("`{}` is neither a file nor a directory", path.display());
                Err(StoreError::Refused { key: key.clone(), cause: cause.into() })
            }
            Err(error) if is_no_such_file(&error) => {
                self.require_root(key)?;
                Err(StoreError::Absent { key: key.clone() })
            }
            Err(error) => Err(failed(key, error)),
        }
    }

    /// Removes an object, if it is there; a crash may bring it back.
    fn discard(&self, key: &Key) -> Result<PathBuf, StoreError> {
        let path = self.path(key)?;
        self.require_root(key)?;
        match fs::remove_file(&path) {
            Ok(()) => Ok(path),
            Err(error) if is_no_such_file(&error) => Ok(path),
            Err(error) => Err(failed(key, error)),
        }
    }

    fn delete(&self, key: &Key) -> Result<(), StoreError> {
        // An earlier attempt may have removed it and died before the fsync,
        // so the directory is synced whether the file was there or not.
        let path = self.discard(key)?;
        match path.parent().map(sync_directory) {
            Some(Err(error)) if !is_no_such_file(&error) => return Err(failed(key, error)),
            _ => {}
        }
        if key.as_str().split('/').next() == Some(PROBE_DIRECTORY) {
            self.remove_empty_directories(&path);
        }
        Ok(())
    }

    fn settle(&self, prefix: &Key) -> Result<(), StoreError> {
        match sync_directory(&self.directory(prefix)?) {
            Err(error) if is_no_such_file(&error) => self.require_root(prefix),
            synced => synced.map_err(|e| failed(prefix, e)),
        }
    }

    /// Removes the directories above a deleted object that nothing is in: each probe has one of its
    /// own. Not done for other objects, for a writer may rely on their directories.
    fn remove_empty_directories(&self, path: &Path) {
        for above in path.ancestors().skip(1).take_while(|above| *above != self.root) {
            // Refused unless it is empty.
            if fs::remove_dir(above).is_err() {
                return;
            }
        }
    }

    fn walk(&self, prefix: &Key) -> Result<Walk, StoreError> {
        let directory = self.directory(prefix)?;
        self.require_root(prefix)?;
        Walk::new(&directory, prefix).map_err(|e| failed(prefix, e))
    }

    fn level(&self, prefix: &Key) -> Result<Level, StoreError> {
        let mut level = Level::default();
        let directory = self.directory(prefix)?;
        self.require_root(prefix)?;
        super::file_walk::read_level(&directory, prefix, &mut level)
            .map_err(|e| failed(prefix, e))?;
        level.directories.sort_unstable();
        level.objects.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(level)
    }
}

/// Takes work back that has not begun. What has begun goes on.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[async_trait]
impl Store for FileStore {
    async fn create(&self, key: &Key, body: Body) -> Result<(), StoreError> {
        let (inner, name) = (Arc::clone(&self.inner), key.clone());
        self.run(key.clone(), body.len(), move || inner.create(&name, &body)).await
    }

    async fn read(&self, key: &Key, range: Option<Range<u64>>) -> Result<Reading, StoreError> {
        let (inner, name) = (Arc::clone(&self.inner), key.clone());
        let (file, size_bytes) = self.run(key.clone(), 0, move || inner.open(&name)).await?;
        let range = clip(key, size_bytes, range)?;
        let state = (self.clone(), key.clone(), Arc::new(file), range);
        let bytes = stream::try_unfold(state, |(store, key, file, range)| async move {
            if range.is_empty() {
                return Ok(None);
            }
            let piece = range.start..range.end.min(range.start + PIECE_BYTES);
            let (source, name, at) = (Arc::clone(&file), key.clone(), piece.clone());
            let bytes = store
                .run(key.clone(), 0, move || read_piece(&source, &at).map_err(|e| failed(&name, e)))
                .await?;
            Ok(Some((bytes, (store, key, file, piece.end..range.end))))
        });
        Ok(Reading { size_bytes, bytes: bytes.boxed() })
    }

    fn list(&self, prefix: &Key) -> BoxStream<'static, Result<Listed, StoreError>> {
        let (store, prefix) = (self.clone(), prefix.clone());
        let pages = stream::try_unfold(None::<Walk>, move |walk| {
            let (store, prefix) = (store.clone(), prefix.clone());
            async move {
                let (inner, name) = (Arc::clone(&store.inner), prefix.clone());
                let work = move || {
                    let mut walk = match walk {
                        Some(walk) => walk,
                        None => inner.walk(&name)?,
                    };
                    let page = walk.page(PAGE_OBJECTS).map_err(|e| failed(&name, e))?;
                    Ok((page, walk))
                };
                let (page, walk) = store.run(prefix, 0, work).await?;
                if page.is_empty() { Ok(None) } else { Ok(Some((page, Some(walk)))) }
            }
        });
        pages
            .map_ok(|page| stream::iter(page.into_iter().map(Ok::<Listed, StoreError>)))
            .try_flatten()
            .boxed()
    }

    async fn list_level(&self, prefix: &Key) -> Result<Level, StoreError> {
        let (inner, name) = (Arc::clone(&self.inner), prefix.clone());
        self.run(prefix.clone(), 0, move || inner.level(&name)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let (inner, name) = (Arc::clone(&self.inner), key.clone());
        self.run(key.clone(), 0, move || inner.delete(&name)).await
    }

    async fn discard(&self, key: &Key) -> Result<(), StoreError> {
        let (inner, name) = (Arc::clone(&self.inner), key.clone());
        self.run(key.clone(), 0, move || inner.discard(&name).map(drop)).await
    }

    async fn settle(&self, prefix: &Key) -> Result<(), StoreError> {
        let (inner, name) = (Arc::clone(&self.inner), prefix.clone());
        self.run(prefix.clone(), 0, move || inner.settle(&name)).await
    }

    fn describe(&self) -> String {
        format!("file://{}", self.inner.root.display())
    }
}

fn read_piece(file: &File, range: &Range<u64>) -> io::Result<Bytes> {
    let length = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let mut buffer = vec![0; length];
    // Fails with `UnexpectedEof` if somebody has cut the file since it was opened.
    file.read_exact_at(&mut buffer, range.start)?;
    Ok(buffer.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::SystemTime;

    use super::super::file_publish::STAGING;
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    async fn prepared() -> (tempfile::TempDir, FileStore) {
        let directory = tempfile::tempdir().unwrap();
        let store = FileStore::new(directory.path().join("repo"), LIMIT);
        store.prepare().await.unwrap();
        (directory, store)
    }

    fn key(text: &str) -> Key {
        Key::new(text)
    }

    async fn keys(store: &FileStore, prefix: &str) -> Vec<String> {
        let mut keys: Vec<String> = store
            .list(&key(prefix))
            .map_ok(|o| o.key.as_str().to_owned())
            .try_collect()
            .await
            .unwrap();
        keys.sort_unstable();
        keys
    }

    /// A copy believes after a while that nobody deletes any more what somebody had begun to delete before.
    #[test]
    fn a_deletion_that_was_given_up_before_it_began_is_never_done() {
        let builder = &mut tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().max_blocking_threads(1).build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        runtime.block_on(async {
            let patient = FileStore::new(directory.path(), Duration::from_mins(1));
            patient.prepare().await.unwrap();
            let key = Key::new("a/b");
            patient.create(&key, b"bytes".to_vec().into()).await.unwrap();
            // The only thread is busy.
            let (release, busy) = std::sync::mpsc::channel::<()>();
            let holding = tokio::task::spawn_blocking(move || busy.recv());
            let hasty = FileStore::new(directory.path(), Duration::from_millis(20));
            assert!(hasty.discard(&key).await.unwrap_err().is_transient());
            drop(release);
            holding.await.unwrap().unwrap_err();
            // What waited for the thread is over by the time that this has its turn.
            patient.read(&key, None).await.unwrap();
        });
    }

    #[tokio::test]
    async fn a_missing_root_is_never_absent_and_never_created() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("repo");
        let store = FileStore::new(&root, LIMIT);
        let check = |error: StoreError| {
            let cause = std::error::Error::source(&error).unwrap().to_string();
            assert!(error.is_transient() && cause.contains("is its disk mounted"), "{cause}");
        };
        for _ in 0..2 {
            check(store.read(&key("a/b"), None).await.unwrap_err());
            check(store.create(&key("a/b"), vec![1].into()).await.unwrap_err());
            check(store.delete(&key("a/b")).await.unwrap_err());
            check(store.list_level(&key("a")).await.unwrap_err());
            check(store.list(&key("")).try_next().await.unwrap_err());
            assert_eq!(root.exists(), root.is_dir());
            // Second round: an empty mount point.
            fs::create_dir_all(&root).unwrap();
        }
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_prepared_root_says_absent() {
        let (_directory, store) = prepared().await;
        assert!(store.read(&key("a/b"), None).await.unwrap_err().is_absent());
        store.create(&key("a"), vec![1].into()).await.unwrap();
        // A file stands where a directory would have to be: no such key either.
        assert!(store.read(&key("a/b"), None).await.unwrap_err().is_absent());
        assert!(store.read(&key("x"), None).await.unwrap_err().is_absent());
        store.prepare().await.unwrap();
    }

    #[tokio::test]
    async fn others_cannot_read_what_is_stored_and_nothing_is_left_in_staging() {
        let (directory, store) = prepared().await;
        store.create(&key("c/wal/x"), vec![1; 10].into()).await.unwrap();
        store.create(&key("c/wal/x"), vec![2; 10].into()).await.unwrap_err();
        let root = directory.path().join("repo");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&root.join("c/wal/x")) & 0o137, 0);
        assert_eq!(mode(&root.join("c/wal")) & 0o027, 0);
        assert_eq!(fs::read_dir(root.join(STAGING)).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn keys_that_are_not_safe_as_paths_are_refused() {
        let (directory, store) = prepared().await;
        fs::write(directory.path().join("outside"), "x").unwrap();
        for bad in [
            "../outside",
            "a/../b",
            "/etc/passwd",
            "",
            "a//b",
            "a/",
            ".staging/x",
            "a b",
            "a\0b",
            "a#1",
        ] {
            let error = store.read(&key(bad), None).await.unwrap_err();
            assert!(matches!(error, StoreError::Refused { .. }), "{bad}: {error}");
            let error = store.create(&key(bad), vec![1].into()).await.unwrap_err();
            assert!(matches!(error, StoreError::Refused { .. }), "{bad}: {error}");
            let error = store.delete(&key(bad)).await.unwrap_err();
            assert!(matches!(error, StoreError::Refused { .. }), "{bad}: {error}");
        }
    }

    #[tokio::test]
    async fn only_old_staging_files_are_swept() {
        let (directory, store) = prepared().await;
        let staging = directory.path().join("repo").join(STAGING);
        let (old, young) =
            (staging.join("1-0-00000000000000ab"), staging.join("2-0-00000000000000cd"));
        let foreign = staging.join("notes.txt");
        for path in [&old, &young, &foreign] {
            fs::write(path, "x").unwrap();
        }
        let long_ago = SystemTime::now() - Duration::from_hours(2);
        for path in [&old, &foreign] {
            File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
        }
        assert_eq!(store.sweep_leftovers(Duration::from_hours(1)).await.unwrap(), 1);
        assert!(!old.exists() && young.exists() && foreign.exists());
        assert_eq!(keys(&store, "").await, Vec::<String>::new());
    }

    #[tokio::test]
    async fn names_that_no_key_has_are_passed_over_and_emptied_directories_too() {
        let (directory, store) = prepared().await;
        store.create(&key("c/wal/g1/s1"), vec![1].into()).await.unwrap();
        store.create(&key("c/wal/g2/s2"), vec![1].into()).await.unwrap();
        fs::create_dir(directory.path().join("repo/lost+found")).unwrap();
        fs::write(directory.path().join("repo/c/wal/.nfs0001"), "x").unwrap();
        assert_eq!(keys(&store, "").await, ["c/wal/g1/s1", "c/wal/g2/s2"]);
        store.delete(&key("c/wal/g1/s1")).await.unwrap();
        let level = store.list_level(&key("c/wal")).await.unwrap();
        assert_eq!(level.directories, ["g2"]);
        assert_eq!(keys(&store, "c/wal/g1").await, Vec::<String>::new());
    }

    #[tokio::test]
    async fn a_file_cut_while_it_is_read_is_an_error_and_not_a_shorter_object() {
        let (directory, store) = prepared().await;
        let bytes = vec![7; 3 * 1024 * 1024];
        store.create(&key("big"), bytes.into()).await.unwrap();
        let mut reading = store.read(&key("big"), None).await.unwrap();
        assert!(reading.bytes.try_next().await.unwrap().is_some());
        let file = File::options().write(true).open(directory.path().join("repo/big")).unwrap();
        file.set_len(1024 * 1024 + 5).unwrap();
        let error = reading.bytes.try_collect::<Vec<_>>().await.unwrap_err();
        assert!(error.is_transient(), "{error}");
    }
}
