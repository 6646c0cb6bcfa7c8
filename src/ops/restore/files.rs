//! Filling the data directory: frames fetched in large ranges, each chunk checked
//! against its digest before it is written at its place.
//!
//! ```text
//! file list -> chunks, without those that stand already (looking.rs)
//!           -> wants (a run of a chunk: which frame, which file, where) -> a window of them
//!           -> by pack and offset -> ranges of neighbouring frames -> tasks: fetch, decode, check, write
//!           -> the file's last byte is written -> its fsync, on a thread of its own
//! ```
//!
//! Bounded by names below: open files, the window, the bytes of a range, and tasks at a time.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::{Stream, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::looking::{Belongings, CONTROL_FILE, Look, Looking, TABLESPACE_MAP, maps_of};
use super::{UNHARMED, of_tree};
use crate::failure::Failure;
use crate::format::{
    CHUNK_BYTES, ChunkDigest, ChunkEntry, Committed, EntryKind, FileEntry, FileIndex, FrameRef,
    digest_chunk,
};
use crate::ops::failures::{of_repo, of_task};
use crate::ops::progress::Progress;
use crate::pgdata::{
    FileAttributes, Finisher, NewFile, NewTree, Places, RestoreMarker, TreeError, TreePlan,
    safe_path,
};
use crate::plan::backup::{chunk_len, chunks_of};
use crate::plan::delta::{ChunkWork, chunk_work};
use crate::plan::memory::FETCHES_PER_JOB;
use crate::repo::{FrameFetcher, RepoError, Repository};

/// Files open at a time.
const OPEN_FILES_MAX: usize = 256;

/// Files being fsynced at a time. They wait for the disk and not for a processor, and fetching
/// does not wait for them.
const FINISHING_MAX: usize = 16;

/// Plain bytes that are gathered before they are sorted by where they are stored.
const WINDOW_BYTES: u64 = 128 << 20;

/// Bytes between two wanted frames that are fetched along rather than asked for apart.
const RANGE_GAP_MAX: u32 = 128 << 10;

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

/// A file being written; whoever writes its last byte sends it to be finished, and its permit
/// to be open with it.
struct OpenFile {
    /// Whether it stood already, with content that was kept.
    is_kept: bool,
    file: Mutex<Option<(NewFile, OwnedSemaphorePermit)>>,
    bytes_left: AtomicU64,
    finisher: Arc<Mutex<Finisher<OwnedSemaphorePermit>>>,
}

/// Bytes wanted from a frame.
struct Want {
    in_frame: u32,
    bytes: u32,
    file: Arc<OpenFile>,
    offset: u64,
    /// The digest of exactly these bytes, where the chunk has one run.
    digest: ChunkDigest,
}

#[derive(Debug, thiserror::Error)]
enum FillError {
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl Restoring<'_> {
    /// Restores every file but `pg_control`, which is returned.
    pub(super) async fn run(&self, index: &FileIndex) -> Result<Restored, Failure> {
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
        let (tree, removed) = self.without_strangers(tree, index).await?;
        let standing = self.tree_plan.take_over.map(|_| Places::of(self.tree_plan));
        let looking = Looking::new(self.repository, standing, self.jobs);
        let mut filling = Filling {
            restoring: self,
            looking: looking.clone(),
            tree,
            finisher: Arc::new(Mutex::new(Finisher::start(FINISHING_MAX))),
            permits: Arc::new(Semaphore::new(OPEN_FILES_MAX)),
            window: BTreeMap::new(),
            window_bytes: 0,
            tasks: JoinSet::new(),
            writers: Arc::new(Semaphore::new(self.jobs.max(1))),
            control: None,
            has_postgresql_conf: false,
            entries: 0,
            kept_bytes: 0,
            removed,
        };
        for frame in &index.frames {
            let entries = self.repository.file_entries(frame).await;
            let entries = entries.map_err(|e| self.not_fetched(e))?;
            let mut looks = pin!(looking.at(&entries));
            for entry in &entries {
                let filled = filling.entry(entry, &mut looks).await;
                filled.map_err(|error| self.not_filled(error))?;
            }
        }
        if filling.entries != index.entries {
            return Err(self.damaged(format!(
                "its file list has {} entries where its index says {}",
                filling.entries, index.entries
            )));
        }
        filling.finish().await.map_err(|error| self.not_filled(error))
    }

    /// Where a tree is taken over, makes its directories and removes what does not belong into them, before
    /// anything needs the room; returns how many names that were.
    async fn without_strangers(
        &self,
        tree: NewTree,
        index: &FileIndex,
    ) -> Result<(NewTree, u64), Failure> {
        if self.tree_plan.take_over.is_none() {
            return Ok((tree, 0));
        }
        let mut directories = Vec::new();
        let read = Belongings::read(self.repository, index, |directory| {
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
    window: BTreeMap<FrameRef, Vec<Want>>,
    window_bytes: u64,
    tasks: JoinSet<Result<(), FillError>>,
    /// Tasks that decompress and write at a time.
    writers: Arc<Semaphore>,
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
                self.send_window().await?;
                let permit = Arc::clone(&self.permits).acquire_owned().await;
                permit.map_err(|error| RepoError::Task(error.into()))?
            }
        };
        let new = self.tree.create_file(&path, attributes)?;
        let file = Arc::new(OpenFile {
            is_kept: new.is_kept(),
            file: Mutex::new(Some((new, permit))),
            bytes_left: AtomicU64::new(entry.size),
            finisher: Arc::clone(&self.finisher),
        });
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
                file.written(u64::from(bytes))?;
                return Ok(());
            }
            ChunkWork::Clear => {
                file.clear(offset, u64::from(bytes))?;
                self.restoring.progress.advance(u64::from(bytes));
                return Ok(());
            }
            ChunkWork::Bring => {}
        }
        match chunk.runs.as_slice() {
            [run] => {
                let want = Want {
                    in_frame: run.in_frame,
                    bytes,
                    file: Arc::clone(file),
                    offset,
                    digest: chunk.digest,
                };
                self.window.entry(run.frame.clone()).or_default().push(want);
                self.window_bytes += u64::from(bytes);
                if self.window_bytes >= WINDOW_BYTES {
                    self.send_window().await?;
                }
            }
            _ => {
                let content = self.assemble(&chunk, bytes).await?;
                file.write_at(&content, offset)?;
                self.restoring.progress.advance(u64::from(bytes));
            }
        }
        Ok(())
    }

    /// Joins a chunk of several runs and checks it.
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

    /// Starts the tasks of everything gathered.
    async fn send_window(&mut self) -> Result<(), FillError> {
        self.window_bytes = 0;
        let window = std::mem::take(&mut self.window);
        let range_bytes_max = self.restoring.range_bytes_max;
        // Frames sort by backup, pack and offset.
        let mut range: Vec<(FrameRef, Vec<Want>)> = Vec::new();
        for (frame, wants) in window {
            let fits = range.first().zip(range.last()).is_some_and(|((first, _), (last, _))| {
                let last_end = last.offset.saturating_add(last.stored);
                (&first.backup, first.pack) == (&frame.backup, frame.pack)
                    && frame.offset >= last_end
                    && frame.offset - last_end <= RANGE_GAP_MAX
                    && frame.offset.saturating_add(frame.stored) - first.offset <= range_bytes_max
            });
            if !fits && !range.is_empty() {
                self.start(std::mem::take(&mut range)).await?;
            }
            range.push((frame, wants));
        }
        if !range.is_empty() {
            self.start(range).await?;
        }
        Ok(())
    }

    async fn start(&mut self, range: Vec<(FrameRef, Vec<Want>)>) -> Result<(), FillError> {
        while self.tasks.len() >= FETCHES_PER_JOB as usize * self.restoring.jobs.max(1) {
            if let Some(done) = self.tasks.join_next().await {
                done.map_err(|error| RepoError::Task(error.into()))??;
            }
        }
        let fetcher = self.looking.fetcher.clone();
        let progress = Arc::clone(&self.restoring.progress);
        self.tasks.spawn(fill_range(fetcher, Arc::clone(&self.writers), progress, range));
        Ok(())
    }

    async fn finish(mut self) -> Result<Restored, FillError> {
        self.send_window().await?;
        while let Some(done) = self.tasks.join_next().await {
            done.map_err(|error| RepoError::Task(error.into()))??;
        }
        let Some(control) = self.control.take() else {
            return Err(self.wrong("it holds no global/pg_control".to_owned()));
        };
        let finisher = Arc::clone(&self.finisher);
        let finishing = tokio::task::spawn_blocking(move || locked(&finisher).join());
        finishing.await.map_err(|error| RepoError::Task(error.into()))??;
        let Self { tree, has_postgresql_conf, kept_bytes, removed, .. } = self;
        Ok(Restored { tree, control, has_postgresql_conf, kept_bytes, removed })
    }

    fn wrong(&self, why: String) -> FillError {
        let place = self.restoring.repository.place();
        let key = crate::store::Key::new(place.files(&self.restoring.backup.id));
        RepoError::Damaged { key, why }.into()
    }
}

impl OpenFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), TreeError> {
        if let Some((file, _)) = &*locked(&self.file) {
            file.write_at(bytes, offset)?;
        }
        self.written(bytes.len() as u64)
    }

    fn clear(&self, offset: u64, bytes: u64) -> Result<(), TreeError> {
        if let Some((file, _)) = &*locked(&self.file) {
            file.clear(offset, bytes)?;
        }
        self.written(bytes)
    }

    /// Counts bytes as done; after the last of them the file goes to be finished.
    fn written(&self, bytes: u64) -> Result<(), TreeError> {
        if self.bytes_left.fetch_sub(bytes, Ordering::AcqRel) > bytes {
            return Ok(());
        }
        let Some((file, permit)) = locked(&self.file).take() else { return Ok(()) };
        locked(&self.finisher).finish(file, permit)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fetches neighbouring frames in one request, and writes what is wanted of them.
async fn fill_range(
    fetcher: FrameFetcher,
    writers: Arc<Semaphore>,
    progress: Arc<dyn Progress>,
    range: Vec<(FrameRef, Vec<Want>)>,
) -> Result<(), FillError> {
    let (Some((first, _)), Some((last, _))) = (range.first(), range.last()) else { return Ok(()) };
    let pack = fetcher.pack_key(first);
    let start = first.offset;
    let stored = fetcher.range(&pack, start, last.offset.saturating_add(last.stored)).await?;
    let turn = writers.acquire_owned().await.map_err(|error| RepoError::Task(error.into()))?;
    let work = move || {
        let _turn = turn;
        for (frame, wants) in &range {
            let at = (frame.offset - start) as usize;
            let plain = fetcher.decode(frame, &stored[at..at + frame.stored as usize])?;
            for want in wants {
                let from = want.in_frame as usize;
                let bytes = plain.get(from..from + want.bytes as usize).unwrap_or_default();
                if digest_chunk(bytes) != want.digest {
                    let why = format!(
                        "the chunk at byte {from} of the frame at {} has another digest",
                        frame.offset
                    );
                    return Err(RepoError::Damaged { key: pack, why }.into());
                }
                want.file.write_at(bytes, want.offset)?;
                progress.advance(u64::from(want.bytes));
            }
        }
        Ok(())
    };
    tokio::task::spawn_blocking(work).await.map_err(|error| RepoError::Task(error.into()))?
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
