//! Filling the data directory: frames fetched in large ranges, each chunk checked
//! against its digest before it is written at its place.
//!
//! ```text
//! file list -> chunks, without those that stand already (looking.rs)
//!           -> what is wanted of which frames (window.rs) -> fetched, decoded, checked, written
//!           -> the file's last byte is written -> its fsync, on a thread of its own
//! ```
//!
//! Bounded by names here and there: open files, the window, the bytes of a range, and tasks at a time.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex};

use futures_util::{Stream, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::looking::{Belongings, CONTROL_FILE, Look, Looking, TABLESPACE_MAP, maps_of};
use super::window::{FillError, OpenFile, Window, locked};
use super::{UNHARMED, of_tree};
use crate::failure::Failure;
use crate::format::{CHUNK_BYTES, ChunkEntry, Committed, EntryKind, FileEntry, digest_chunk};
use crate::ops::failures::{of_repo, of_task};
use crate::ops::progress::Progress;
use crate::pgdata::{
    FileAttributes, Finisher, NewTree, Places, RestoreMarker, TreeError, TreePlan, safe_path,
};
use crate::plan::backup::{chunk_len, chunks_of};
use crate::plan::delta::{ChunkWork, chunk_work};
use crate::repo::{FileList, RepoError, Repository};

/// Files open at a time.
const OPEN_FILES_MAX: usize = 256;

/// Files being fsynced at a time. They wait for the disk and not for a processor, and fetching
/// does not wait for them.
const FINISHING_MAX: usize = 16;

/// What a restore over standing files says once it has begun.
pub(super) const HALF_TAKEN_OVER: &str = "The repository is as it was. The directory holds files of before and files of the backup and cannot be started by PostgreSQL; the same command with `--delta` goes on with what stands.";

/// A file kept in memory is never longer.
const SMALL_FILE_BYTES_MAX: u64 = 1 << 20;

/// What came out.
pub(super) struct Restored {
    pub(super) tree: NewTree,
    /// `pg_control`, held back.
    pub(super) control: Vec<u8>,
    pub(super) has_postgresql_conf: bool,
    /// What stood and was right, in bytes; what did not belong, in names.
    pub(super) kept_bytes: u64,
    pub(super) removed: u64,
}

/// A restore of files.
pub(super) struct Restoring<'a> {
    pub(super) repository: &'a Repository,
    pub(super) backup: &'a Committed,
    pub(super) tree_plan: &'a TreePlan,
    pub(super) jobs: usize,
    /// Stored bytes fetched in one request.
    pub(super) range_bytes_max: u32,
    pub(super) progress: Arc<dyn Progress>,
}

impl Restoring<'_> {
    /// Restores every file but `pg_control`, which is returned.
    pub(super) async fn run(&self, mut list: FileList) -> Result<Restored, Failure> {
        let marker = RestoreMarker {
            backup: self.backup.id.to_string(),
            started: crate::ops::now().to_string(),
            took_over: self.tree_plan.take_over,
        };
        let plan = self.tree_plan.clone();
        let tree = tokio::task::spawn_blocking(move || NewTree::open(&plan, &marker))
            .await
            .map_err(|error| of_task(error, UNHARMED))?
            .map_err(|error| of_tree(error, self.unharmed()))?;
        let standing = self.tree_plan.take_over.map(|_| Places::of(self.tree_plan));
        let (mut tree, mut removed) = (tree, 0);
        if standing.is_some() {
            // Read here for the first time, and for its files below.
            list = list.kept();
            (tree, removed) = self.without_strangers(tree, &list).await?;
        }
        let fetcher = list.fetcher();
        let looking = Looking::new(fetcher.clone(), standing, self.jobs);
        let progress = Arc::clone(&self.progress);
        let mut filling = Filling {
            restoring: self,
            looking: looking.clone(),
            tree,
            finisher: Arc::new(Mutex::new(Finisher::start(FINISHING_MAX))),
            permits: Arc::new(Semaphore::new(OPEN_FILES_MAX)),
            window: Window::new(fetcher.clone(), progress, self.jobs, self.range_bytes_max),
            control: None,
            has_postgresql_conf: false,
            entries: 0,
            kept_bytes: 0,
            removed,
        };
        let mut reading = pin!(list.read());
        while let Some(entries) = reading.next().await {
            let entries = entries.map_err(|e| self.not_fetched(e))?;
            let mut looks = pin!(looking.at(&entries));
            for entry in &entries {
                let filled = filling.entry(entry, &mut looks).await;
                filled.map_err(|error| self.not_filled(error))?;
            }
        }
        if filling.entries != list.entries() {
            return Err(self.damaged(format!(
                "its file list has {} entries where its index says {}",
                filling.entries,
                list.entries()
            )));
        }
        filling.finish().await.map_err(|error| self.not_filled(error))
    }

    /// Makes the directories of a tree that is taken over, and removes what does not belong into them, before
    /// anything needs the room; returns how many names that were.
    async fn without_strangers(
        &self,
        tree: NewTree,
        list: &FileList,
    ) -> Result<(NewTree, u64), Failure> {
        let mut directories = Vec::new();
        let read = Belongings::read(list, |directory| {
            directories.push((directory.path.clone(), directory.mode));
        });
        let belongings = read.await.map_err(|error| self.not_fetched(error))?;
        let removing = tokio::task::spawn_blocking(move || {
            for (path, mode) in directories {
                tree.create_directory(&safe_path(&path)?, mode)?;
            }
            let removed = tree.remove_strangers(&|path| belongings.hold(path))?;
            Ok::<_, TreeError>((tree, removed))
        });
        let removed = removing.await.map_err(|error| of_task(error, self.unharmed()))?;
        removed.map_err(|error| of_tree(error, self.unharmed()))
    }

    /// What an error may say for comfort.
    fn unharmed(&self) -> &'static str {
        if self.tree_plan.take_over.is_some() { HALF_TAKEN_OVER } else { UNHARMED }
    }

    fn not_fetched(&self, error: RepoError) -> Failure {
        let what = format!(
            "could not restore backup {} from {}",
            self.backup.id,
            self.repository.describe()
        );
        let unharmed = match self.tree_plan.take_over {
            Some(_) => HALF_TAKEN_OVER,
            None => {
                "The repository is as it was. The directory holds a part of the files, cannot be started by PostgreSQL, and may be emptied."
            }
        };
        of_repo(error, what, unharmed)
    }

    fn damaged(&self, why: String) -> Failure {
        let key = crate::store::Key::new(self.repository.place().files(&self.backup.id));
        self.not_fetched(RepoError::Damaged { key, why })
    }

    fn not_filled(&self, error: FillError) -> Failure {
        match error {
            FillError::Repo(error) => self.not_fetched(error),
            FillError::Tree(error) => of_tree(error, self.unharmed()),
        }
    }
}

struct Filling<'a> {
    restoring: &'a Restoring<'a>,
    looking: Looking,
    tree: NewTree,
    finisher: Arc<Mutex<Finisher<OwnedSemaphorePermit>>>,
    permits: Arc<Semaphore>,
    window: Window,
    control: Option<Vec<u8>>,
    has_postgresql_conf: bool,
    entries: u64,
    kept_bytes: u64,
    removed: u64,
}

/// Looks at the files of a part of the list, in its order.
trait Looks: Stream<Item = Result<Look, RepoError>> + Unpin {}

impl<T: Stream<Item = Result<Look, RepoError>> + Unpin> Looks for T {}

impl Filling<'_> {
    async fn entry(&mut self, entry: &FileEntry, looks: &mut impl Looks) -> Result<(), FillError> {
        self.entries += 1;
        let path = safe_path(&entry.path).map_err(TreeError::from)?;
        if entry.kind == EntryKind::Directory {
            return Ok(self.tree.create_directory(&path, entry.mode)?);
        }
        if entry.path == CONTROL_FILE {
            self.control = Some(self.whole(entry).await?);
            return Ok(());
        }
        if entry.path == TABLESPACE_MAP {
            return self.tablespace_map(path, entry).await;
        }
        self.has_postgresql_conf |= entry.path == b"postgresql.conf";
        self.file(path, entry, looks).await
    }

    async fn file(
        &mut self,
        path: PathBuf,
        entry: &FileEntry,
        looks: &mut impl Looks,
    ) -> Result<(), FillError> {
        let attributes =
            FileAttributes { size_bytes: entry.size, mode: entry.mode, mtime_unix: entry.mtime };
        // A window that holds files open must not wait for itself.
        let permit = match Arc::clone(&self.permits).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                self.window.send().await?;
                let permit = Arc::clone(&self.permits).acquire_owned().await;
                permit.map_err(FillError::of_task)?
            }
        };
        let new = self.tree.create_file(&path, attributes)?;
        let finisher = Arc::clone(&self.finisher);
        let file = Arc::new(OpenFile::new(new, permit, entry.size, finisher));
        let mut number = 0;
        for _ in 0..maps_of(entry) {
            let Some(look) = looks.next().await.transpose()? else { break };
            let same = look.same.into_iter().chain(std::iter::repeat(false));
            for (chunk, is_same) in look.chunks.into_iter().zip(same) {
                self.chunk(&file, entry, number, chunk, is_same).await?;
                number += 1;
            }
        }
        if number != chunks_of(entry.size) {
            let path = path.display();
            return Err(self.wrong(format!(
                "`{path}` has {number} chunks listed, not those of its {} bytes",
                entry.size
            )));
        }
        if entry.size == 0 {
            file.written(0)?;
        }
        Ok(())
    }

    async fn chunk(
        &mut self,
        file: &Arc<OpenFile>,
        entry: &FileEntry,
        number: u64,
        chunk: ChunkEntry,
        is_same: bool,
    ) -> Result<(), FillError> {
        let offset = number * u64::from(CHUNK_BYTES);
        let bytes = chunk_len(entry.size, number);
        let name = String::from_utf8_lossy(&entry.path);
        if bytes == 0 || !chunk.is_whole(bytes) {
            return Err(self.wrong(format!("chunk {number} of `{name}` is not whole")));
        }
        let is_zeros = chunk.runs.is_empty();
        if is_zeros && chunk.digest != digest_chunk(&vec![0; bytes as usize]) {
            return Err(self.wrong(format!("chunk {number} of `{name}` has no bytes")));
        }
        match chunk_work(file.is_kept, is_same, is_zeros) {
            ChunkWork::Keep => {
                self.kept_bytes += if file.is_kept { u64::from(bytes) } else { 0 };
                self.restoring.progress.advance(u64::from(bytes));
                Ok(file.written(u64::from(bytes))?)
            }
            ChunkWork::Clear => {
                file.clear(offset, u64::from(bytes))?;
                self.restoring.progress.advance(u64::from(bytes));
                Ok(())
            }
            ChunkWork::Bring => self.window.want(file, offset, bytes, chunk).await,
        }
    }

    /// Joins a chunk of a file that is kept in memory and checks it.
    async fn assemble(&self, chunk: &ChunkEntry, bytes: u32) -> Result<Vec<u8>, FillError> {
        let mut content = Vec::with_capacity(bytes as usize);
        for run in &chunk.runs {
            let plain = self.looking.fetcher.frame(&run.frame).await?;
            let at = run.in_frame as usize;
            content.extend_from_slice(&plain[at..at + run.bytes as usize]);
        }
        if digest_chunk(&content) != chunk.digest {
            let key = self.looking.fetcher.pack_key(&chunk.runs[0].frame);
            let why = "a chunk joined from several runs has another digest".to_owned();
            return Err(RepoError::Damaged { key, why }.into());
        }
        Ok(content)
    }

    /// Reads a small file whole.
    async fn whole(&self, entry: &FileEntry) -> Result<Vec<u8>, FillError> {
        let name = String::from_utf8_lossy(&entry.path);
        if entry.size > SMALL_FILE_BYTES_MAX {
            return Err(self.wrong(format!("`{name}` is {} bytes long", entry.size)));
        }
        let mut content = Vec::new();
        for (number, chunk) in (0..).zip(self.looking.chunks(entry, 0).await?) {
            let bytes = chunk_len(entry.size, number);
            if bytes == 0 || !chunk.is_whole(bytes) {
                return Err(self.wrong(format!("chunk {number} of `{name}` is not whole")));
            }
            if chunk.runs.is_empty() {
                content.resize(content.len() + bytes as usize, 0);
            } else {
                content.extend(self.assemble(&chunk, bytes).await?);
            }
        }
        if content.len() as u64 != entry.size {
            return Err(self.wrong(format!("`{name}` has another length than its chunks")));
        }
        Ok(content)
    }

    /// Writes `tablespace_map`; where a tablespace goes elsewhere, with its new place, since
    /// PostgreSQL makes the links from it when it starts from a backup label.
    async fn tablespace_map(&mut self, path: PathBuf, entry: &FileEntry) -> Result<(), FillError> {
        let old = self.whole(entry).await?;
        let tablespaces = &self.restoring.tree_plan.tablespaces;
        let moved = tablespaces.iter().any(|tablespace| tablespace.original != tablespace.target);
        let content = if moved {
            let mut map = crate::pg::TablespaceMap::parse(&old)
                .map_err(|error| self.wrong(format!("tablespace_map: {error}")))?;
            for tablespace in tablespaces {
                use std::os::unix::ffi::OsStrExt;
                let path = tablespace.target.as_os_str().as_bytes();
                for entry in map.entries.iter_mut().filter(|entry| entry.oid == tablespace.oid) {
                    path.clone_into(&mut entry.path);
                }
            }
            map.to_bytes()
        } else {
            old
        };
        self.restoring.progress.advance(entry.size);
        Ok(self.tree.write_file(&path, &content, entry.mode, entry.mtime)?)
    }

    async fn finish(mut self) -> Result<Restored, FillError> {
        let Some(control) = self.control.take() else {
            return Err(self.wrong("it holds no global/pg_control".to_owned()));
        };
        let Self { tree, has_postgresql_conf, kept_bytes, removed, window, finisher, .. } = self;
        window.finish().await?;
        let finishing = tokio::task::spawn_blocking(move || locked(&finisher).join());
        finishing.await.map_err(FillError::of_task)??;
        Ok(Restored { tree, control, has_postgresql_conf, kept_bytes, removed })
    }

    fn wrong(&self, why: String) -> FillError {
        let place = self.restoring.repository.place();
        let key = crate::store::Key::new(place.files(&self.restoring.backup.id));
        RepoError::Damaged { key, why }.into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
