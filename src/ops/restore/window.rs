//! What is wanted from packs: gathered, sorted by where it is stored, fetched in large ranges, checked
//! and written at its place.
//!
//! ```text
//! wants (a run of a chunk: which frame, which file, where) -> a window of them
//!   -> by pack and offset -> ranges of neighbouring frames -> tasks: fetch, decode, check, write
//! ```
//!
//! A chunk of one run is checked before it is written. The runs of another come from several frames, at
//! any time and in any order: each is written at its place, and whoever writes the last of them reads the
//! whole chunk back and checks it. So no chunk waits in memory, and none costs a request of its own.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::format::{ChunkDigest, ChunkEntry, FrameRef, digest_chunk};
use crate::ops::progress::Progress;
use crate::pgdata::{Finisher, NewFile, TreeError};
use crate::plan::memory::FETCHES_PER_JOB;
use crate::repo::{FrameFetcher, RepoError};
use crate::store::Key;

/// Plain bytes that are gathered before they are sorted by where they are stored.
const WINDOW_BYTES: u64 = 128 << 20;

/// Bytes between two wanted frames that are fetched along rather than asked for apart.
const RANGE_GAP_MAX: u32 = 128 << 10;

#[derive(Debug, thiserror::Error)]
pub(super) enum FillError {
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl FillError {
    pub(super) fn of_task(
        error: impl Into<Box<dyn std::error::Error + Send + Sync + 'static>>,
    ) -> Self {
        RepoError::Task(error.into()).into()
    }
}

/// A file being written; whoever writes its last byte sends it to be finished, and its permit
/// to be open with it.
pub(super) struct OpenFile {
    /// Whether it stood already, with content that was kept.
    pub(super) is_kept: bool,
    file: Mutex<Option<(NewFile, OwnedSemaphorePermit)>>,
    bytes_left: AtomicU64,
    finisher: Arc<Mutex<Finisher<OwnedSemaphorePermit>>>,
}

impl OpenFile {
    pub(super) fn new(
        new: NewFile,
        permit: OwnedSemaphorePermit,
        size: u64,
        finisher: Arc<Mutex<Finisher<OwnedSemaphorePermit>>>,
    ) -> Self {
        Self {
            is_kept: new.is_kept(),
            file: Mutex::new(Some((new, permit))),
            bytes_left: AtomicU64::new(size),
            finisher,
        }
    }

    /// Makes bytes zero, and counts them as done.
    pub(super) fn clear(&self, offset: u64, bytes: u64) -> Result<(), TreeError> {
        if let Some((file, _)) = &*locked(&self.file) {
            file.clear(offset, bytes)?;
        }
        self.written(bytes)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), TreeError> {
        match &*locked(&self.file) {
            Some((file, _)) => file.write_at(bytes, offset),
            None => Ok(()),
        }
    }

    /// Returns the digest of what stands in a file whose bytes are not all done.
    fn digest_at(&self, offset: u64, bytes: u32) -> Result<Option<ChunkDigest>, TreeError> {
        let mut room = vec![0; bytes as usize];
        let Some((file, _)) = &*locked(&self.file) else { return Ok(None) };
        file.read_at(&mut room, offset)?;
        Ok(Some(digest_chunk(&room)))
    }

    /// Counts bytes as done; after the last of them the file goes to be finished.
    pub(super) fn written(&self, bytes: u64) -> Result<(), TreeError> {
        if self.bytes_left.fetch_sub(bytes, Ordering::AcqRel) > bytes {
            return Ok(());
        }
        let Some((file, permit)) = locked(&self.file).take() else { return Ok(()) };
        locked(&self.finisher).finish(file, permit)
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A chunk of a file that is to be brought.
struct Chunk {
    file: Arc<OpenFile>,
    offset: u64,
    bytes: u32,
    digest: ChunkDigest,
}

/// Bytes wanted from a frame.
enum Want {
    /// A whole chunk.
    Whole { in_frame: u32, chunk: Chunk },
    /// A run of a chunk that has several.
    Part { in_frame: u32, in_chunk: u32, bytes: u32, joined: Arc<Joined> },
}

/// A chunk that is joined of several runs.
struct Joined {
    chunk: Chunk,
    runs_left: AtomicU32,
    /// The packs it is joined from, for a message.
    packs: Vec<Key>,
}

impl Want {
    /// Writes what is wanted of a plain frame; returns how many bytes that was.
    fn write(&self, plain: &[u8], pack: &Key, frame: &FrameRef) -> Result<u32, FillError> {
        let slice = |in_frame: u32, bytes: u32| {
            let from = in_frame as usize;
            plain.get(from..from + bytes as usize).unwrap_or_default()
        };
        match self {
            Self::Whole { in_frame, chunk } => {
                let bytes = slice(*in_frame, chunk.bytes);
                if digest_chunk(bytes) != chunk.digest {
                    let why = format!(
                        "the chunk at byte {in_frame} of the frame at {} has another digest",
                        frame.offset
                    );
                    return Err(RepoError::Damaged { key: pack.clone(), why }.into());
                }
                chunk.file.write_at(bytes, chunk.offset)?;
                chunk.file.written(u64::from(chunk.bytes))?;
                Ok(chunk.bytes)
            }
            Self::Part { in_frame, in_chunk, bytes, joined } => {
                let chunk = &joined.chunk;
                let part = slice(*in_frame, *bytes);
                chunk.file.write_at(part, chunk.offset + u64::from(*in_chunk))?;
                if joined.runs_left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    joined.check(pack)?;
                }
                Ok(*bytes)
            }
        }
    }
}

impl Joined {
    /// Checks the whole chunk, as it was written.
    fn check(&self, pack: &Key) -> Result<(), FillError> {
        let Chunk { file, offset, bytes, digest } = &self.chunk;
        if file.digest_at(*offset, *bytes)? != Some(*digest) {
            let others: Vec<String> = self
                .packs
                .iter()
                .filter(|key| *key != pack)
                .map(|key| format!("`{key}`"))
                .collect();
            let with = if others.is_empty() { "it".to_owned() } else { others.join(" and ") };
            let why = format!("a chunk that is joined from it and {with} has another digest");
            return Err(RepoError::Damaged { key: pack.clone(), why }.into());
        }
        Ok(file.written(u64::from(*bytes))?)
    }
}

/// Wants that are gathered, and those that are on their way.
pub(super) struct Window {
    fetcher: FrameFetcher,
    progress: Arc<dyn Progress>,
    wants: BTreeMap<FrameRef, Vec<Want>>,
    wanted_bytes: u64,
    range_bytes_max: u32,
    fetches_max: usize,
    tasks: JoinSet<Result<(), FillError>>,
    /// Tasks that decompress and write at a time.
    writers: Arc<Semaphore>,
}

impl Window {
    pub(super) fn new(
        fetcher: FrameFetcher,
        progress: Arc<dyn Progress>,
        jobs: usize,
        range_bytes_max: u32,
    ) -> Self {
        let jobs = jobs.max(1);
        Self {
            fetcher,
            progress,
            wants: BTreeMap::new(),
            wanted_bytes: 0,
            range_bytes_max,
            fetches_max: FETCHES_PER_JOB as usize * jobs,
            tasks: JoinSet::new(),
            writers: Arc::new(Semaphore::new(jobs)),
        }
    }

    /// Wants a chunk of `bytes` bytes at `offset` of a file. It has runs, which cover it.
    pub(super) async fn want(
        &mut self,
        file: &Arc<OpenFile>,
        offset: u64,
        bytes: u32,
        entry: ChunkEntry,
    ) -> Result<(), FillError> {
        let chunk = Chunk { file: Arc::clone(file), offset, bytes, digest: entry.digest };
        match entry.runs.as_slice() {
            [run] => {
                let want = Want::Whole { in_frame: run.in_frame, chunk };
                self.wants.entry(run.frame.clone()).or_default().push(want);
            }
            runs => {
                let mut packs: Vec<Key> =
                    runs.iter().map(|run| self.fetcher.pack_key(&run.frame)).collect();
                packs.sort();
                packs.dedup();
                let runs_left = AtomicU32::new(u32::try_from(runs.len()).unwrap_or(u32::MAX));
                let joined = Arc::new(Joined { chunk, runs_left, packs });
                for run in entry.runs {
                    let (in_frame, in_chunk, bytes) = (run.in_frame, run.in_chunk, run.bytes);
                    let joined = Arc::clone(&joined);
                    let want = Want::Part { in_frame, in_chunk, bytes, joined };
                    self.wants.entry(run.frame).or_default().push(want);
                }
            }
        }
        self.wanted_bytes += u64::from(bytes);
        if self.wanted_bytes >= WINDOW_BYTES {
            self.send().await?;
        }
        Ok(())
    }

    /// Starts the tasks of everything gathered.
    pub(super) async fn send(&mut self) -> Result<(), FillError> {
        self.wanted_bytes = 0;
        let wants = std::mem::take(&mut self.wants);
        // Frames sort by backup, pack and offset.
        let mut range: Vec<(FrameRef, Vec<Want>)> = Vec::new();
        for (frame, wants) in wants {
            let fits = range.first().zip(range.last()).is_some_and(|((first, _), (last, _))| {
                let last_end = last.offset.saturating_add(last.stored);
                (&first.backup, first.pack) == (&frame.backup, frame.pack)
                    && frame.offset >= last_end
                    && frame.offset - last_end <= RANGE_GAP_MAX
                    && frame.offset.saturating_add(frame.stored) - first.offset
                        <= self.range_bytes_max
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
        while self.tasks.len() >= self.fetches_max {
            self.one_done().await?;
        }
        let (fetcher, progress) = (self.fetcher.clone(), Arc::clone(&self.progress));
        self.tasks.spawn(fill_range(fetcher, Arc::clone(&self.writers), progress, range));
        Ok(())
    }

    async fn one_done(&mut self) -> Result<(), FillError> {
        match self.tasks.join_next().await {
            Some(done) => done.map_err(FillError::of_task)?,
            None => Ok(()),
        }
    }

    /// Brings everything that was wanted.
    pub(super) async fn finish(mut self) -> Result<(), FillError> {
        self.send().await?;
        while !self.tasks.is_empty() {
            self.one_done().await?;
        }
        Ok(())
    }
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
    let turn = writers.acquire_owned().await.map_err(FillError::of_task)?;
    let work = move || {
        let _turn = turn;
        for (frame, wants) in &range {
            let at = (frame.offset - start) as usize;
            let plain = fetcher.decode(frame, &stored[at..at + frame.stored as usize])?;
            for want in wants {
                let bytes = want.write(&plain, &pack, frame)?;
                progress.advance(u64::from(bytes));
            }
        }
        Ok(())
    };
    tokio::task::spawn_blocking(work).await.map_err(FillError::of_task)?
}
